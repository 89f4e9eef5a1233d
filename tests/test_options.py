"""Options of measure: bad ones are explained, good ones yield exactly what was asked for."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe import FimprobeError

pytestmark = pytest.mark.usefixtures("raw_numbers")

ESTIMATORS = ("i1", "i2", "ih", "empirical")
SIZE = 5
LABELS = torch.tensor([0, 1, 2, 0, 1])


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def inputs():
    return torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(1))


def measure(model=None, **options):
    return fimprobe.measure(model or mlp(), inputs(), **{"likelihood": "categorical", **options})


WITH = {"estimators": ("i1", "empirical")}
BAD = [
    # options, what the message must hold: argument, value, remedy
    ({"estimators": ()}, ["estimators=()", "use some of i1, i2, ih, empirical"]),
    ({"estimators": []}, ["estimators=[]", "use some of"]),
    ({"estimators": ""}, ["estimators=''", "use some of"]),
    ({"estimators": None}, ["estimators=None", "use some of"]),
    ({"estimators": 3}, ["estimators=3", "use some of"]),
    ({"estimators": "i1,i2"}, ["estimators='i1,i2'", "use some of"]),
    ({"estimators": ("i1", "i3")}, ["estimators=('i1', 'i3')", "use some of"]),
    ({"estimators": ["I1"]}, ["estimators=['I1']", "use some of"]),
    ({"estimators": ("i1", 2)}, ["estimators=('i1', 2)", "use some of"]),
    ({"estimators": [["i1"]]}, ["estimators=[['i1']]", "use some of"]),
    ({"estimators": ("empirical",)}, ["estimators", "'empirical'", "pass labels="]),
    ({"estimators": "empirical"}, ["estimators", "'empirical'", "pass labels="]),
    ({"labels": LABELS}, ["labels", "estimators=('i1', 'i2')", "Add 'empirical'"]),
    ({"estimators": "ih", "labels": "y"}, ["labels", "estimators='ih'", "leave labels out"]),
    ({**WITH, "labels": [0, 1, 2, 0, 1]}, ["labels=list", "torch.as_tensor(labels)"]),
    ({**WITH, "labels": LABELS[:3]}, ["labels has 3", "5 samples", "pass the labels of these"]),
    ({**WITH, "labels": LABELS[0]}, ["labels", "single number", "[B, ...]"]),
    ({**WITH, "labels": LABELS.float()}, ["labels", "torch.float32", "labels.long()"]),
    ({**WITH, "labels": LABELS > 0}, ["labels", "torch.bool", "whole numbers"]),
    ({**WITH, "labels": LABELS + 1}, ["labels hold 1 of 5", "the first 3", "from 0"]),
    ({**WITH, "labels": LABELS - 1}, ["labels hold 2 of 5", "the first -1", "-100"]),
    ({**WITH, "labels": torch.eye(3)[LABELS]}, ["labels", "(5, 3)", "labels.argmax(-1)"]),
    ({**WITH, "labels": LABELS[:, None]}, ["labels", "(5, 1)", "labels.reshape"]),
    ({"second_order": "on"}, ["second_order='on'", "{'probes': 2}, 'exact' or 'off'"]),
    ({"second_order": None}, ["second_order=None", "'exact' or 'off'"]),
    ({"second_order": True}, ["second_order=True", "'exact' or 'off'"]),
    ({"second_order": 2}, ["second_order=2", "{'probes': 2}"]),
    ({"second_order": [2]}, ["second_order=[2]", "{'probes': 2}"]),
    ({"second_order": {"probes": 1}}, ["second_order={'probes': 1}", "2 probes or more"]),
    ({"second_order": {"probes": 0}}, ["second_order={'probes': 0}", "2 probes or more"]),
    ({"second_order": {"probes": -2}}, ["second_order={'probes': -2}", "2 probes or more"]),
    ({"second_order": {"probes": 2.0}}, ["second_order={'probes': 2.0}", "2 probes or more"]),
    ({"second_order": {"probes": "2"}}, ["second_order={'probes': '2'}", "2 probes or more"]),
    ({"second_order": {"probes": True}}, ["second_order={'probes': True}", "{'probes': 2}"]),
    ({"second_order": {"probes": None}}, ["second_order={'probes': None}", "2 probes"]),
    ({"second_order": {}}, ["second_order={}", "{'probes': 2}"]),
    ({"second_order": {"probs": 2}}, ["second_order={'probs': 2}", "{'probes': 2}"]),
    ({"second_order": {"probes": 2, "x": 1}}, ["'x': 1", "{'probes': 2}"]),
    # wrong where it would not be used, too
    ({"estimators": "i1", "second_order": "on"}, ["second_order='on'", "'exact' or 'off'"]),
    ({"bounds": 1}, ["bounds=1", "True or False"]),
    ({"bounds": None}, ["bounds=None", "True or False"]),
    ({"bounds": "yes"}, ["bounds='yes'", "True or False"]),
    ({"engine": "BackPACK"}, ["engine='BackPACK'", "auto, autograd or backpack"]),
    ({"engine": None}, ["engine=None", "auto, autograd or backpack"]),
    ({"engine": ["auto"]}, ["engine=['auto']", "auto, autograd or backpack"]),
    ({"draws": 0}, ["draws=0", "pass 1, 2, ..., 'exact' or 'auto'"]),
    ({"draws": -1}, ["draws=-1", "pass 1, 2, ..., 'exact' or 'auto'"]),
    ({"draws": 2.0}, ["draws=2.0", "pass 1, 2, ..., 'exact' or 'auto'"]),
    ({"draws": True}, ["draws=True", "pass 1, 2, ..., 'exact' or 'auto'"]),
    ({"draws": None}, ["draws=None", "pass 1, 2, ..., 'exact' or 'auto'"]),
    ({"draws": "many"}, ["draws='many'", "pass 1, 2, ..., 'exact' or 'auto'"]),
    ({"draws": torch.tensor(2)}, ["draws=tensor(2)", "pass 1, 2, ..., 'exact' or 'auto'"]),
    ({"memory_mb": 0}, ["memory_mb=0", "above 0"]),
    ({"memory_mb": -1.0}, ["memory_mb=-1.0", "above 0"]),
    ({"memory_mb": math.nan}, ["memory_mb=nan", "above 0"]),
    ({"memory_mb": math.inf}, ["memory_mb=inf", "above 0"]),
    ({"memory_mb": "512"}, ["memory_mb='512'", "above 0"]),
    ({"memory_mb": None}, ["memory_mb=None", "above 0"]),
    ({"memory_mb": True}, ["memory_mb=True", "above 0"]),
    ({"seed": 1.5}, ["seed=1.5", "whole number"]),
    ({"seed": "0"}, ["seed='0'", "whole number"]),
    ({"seed": None}, ["seed=None", "whole number"]),
    ({"seed": True}, ["seed=True", "whole number"]),
    ({"seed": 2**64}, [f"seed={2**64}", "64 bits"]),
    ({"mask": [True] * 5}, ["mask=list", "boolean tensor"]),
    ({"mask": torch.ones(5)}, ["mask=torch.float32", ".bool()"]),
    ({"mask": torch.ones(5, dtype=torch.int64)}, ["mask=torch.int64", ".bool()"]),
    ({"mask": torch.ones(5, 3, dtype=torch.bool)}, ["mask", "(5, 3)", "one entry for each"]),
    ({"output": 3}, ["output=3", "pass one from what the model returns"]),
    ({"output": lambda out: 3}, ["output= returns int", "tensor of outputs"]),
    ({"output": lambda out: out.sum()}, ["outputs", "shape ()", "output="]),
    ({"likelihood": None}, ["likelihood=None", "pass one of", "'categorical'"]),
    ({"likelihood": "softmax"}, ["likelihood='softmax'", "use one of", "'categorical'"]),
    ({"likelihood": fimprobe.likelihoods.Gaussian}, ["likelihood=<class", "instance"]),
]


@pytest.mark.parametrize(
    ("options", "words"),
    BAD,
    ids=lambda x: re.sub(" at 0x.*?>", ">", str(x))[:50] if isinstance(x, dict) else "",
)
def test_bad_options_of_measure(options, words):
    with pytest.raises(FimprobeError) as error:
        measure(**options)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_what_is_no_model_and_has_no_parameters():
    with pytest.raises(FimprobeError, match="model=function is no torch.nn.Module"):
        fimprobe.measure(lambda x: x, inputs(), likelihood="categorical")
    with pytest.raises(FimprobeError, match="no trainable parameters"):
        fimprobe.measure(nn.Tanh(), inputs(), likelihood="categorical")


# -- what is asked for is what there is ------------------------------------------------------

BOUNDS = ("bound", "sharp_bound", "trace_bound", "diagonal_bound")
BASE = {"trace", "norm", "label_variance", "input_variance", "total_variance", "std_error",
        "rel_error", "total_label_variance", "effective_inputs", "skewness"}  # fmt: skip


def present(estimate):
    fields = [f.name for f in dataclasses.fields(estimate)]
    fields = [n for n in fields if n not in ("unknown", "pair_variance")]
    return {n for n in fields if getattr(estimate, n) is not None}


def expected(kind, *, draws, bounds, second_order, diagonals):
    """The fields of a group's estimate that are not None."""
    exact = draws == "exact"
    want = set(BASE)
    if draws == 1:
        want -= {"label_variance", "input_variance", "total_label_variance"}
        if kind == "i2":  # R has a variance over labels of its own
            want |= {"label_variance", "total_label_variance"}
            want.discard("total_variance")  # F's variance over inputs is not known
    if kind == "empirical":  # the data's labels do not vary
        want -= {"label_variance", "input_variance", "total_label_variance"}
        want |= {"cosine", "trace_ratio"}
    if kind == "i2" and second_order != "exact":
        want.add("probe_error")
    if "label_variance" in want and (not exact or "probe_error" in want):
        want.add("label_variance_error")
    if "total_label_variance" in want and (not exact or kind == "i2"):
        want.add("total_label_variance_error")
    if bounds and kind == "i1":
        want |= {*BOUNDS, "trace_range"}
        want |= (
            {"covariance_norm", "covariance_spectral_norm", "diagonal_range_bound"}
            if exact
            else {"bound_error"}
        )
    if bounds and kind == "i2":
        want |= {"bound", "bound_error", "trace_bound"}
        if exact:
            want |= {"covariance_norm", "covariance_spectral_norm", "sharp_bound", "diagonal_bound"}
    if diagonals:
        want.add("diagonal")
        if "label_variance" in want:
            want.add("diagonal_label_variance")
        if "input_variance" in want:
            want.add("diagonal_input_variance")
    return want


def subsets():
    for count in range(1, 5):
        yield from itertools.combinations(ESTIMATORS, count)


def groups(report):
    return [*report.parameters.values(), *report.layers.values(), report.total]


def finite(report):
    def walk(x):
        if isinstance(x, dict):
            return all(walk(v) for v in x.values())
        if isinstance(x, (list, tuple)):
            return all(walk(v) for v in x)
        return not isinstance(x, float) or math.isfinite(x)

    return walk(report.to_dict())


ORDERS = [{"probes": 2}, {"probes": 3}, "exact", "off"]
ASKED = [(e, o) for e in subsets() for o in (ORDERS if "i2" in e else ORDERS[:1])]


@pytest.mark.parametrize("draws", [1, 2, "exact"])
@pytest.mark.parametrize("bounds", [True, False])
@pytest.mark.parametrize(
    ("estimators", "second_order"), ASKED, ids=["+".join(e) + f" {o}" for e, o in ASKED]
)
def test_every_combination_yields_the_fields_asked_for(estimators, second_order, bounds, draws):
    diagonals = bounds
    report = measure(
        estimators=estimators,
        second_order=second_order,
        bounds=bounds,
        draws=draws,
        diagonals=diagonals,
        labels=LABELS if "empirical" in estimators else None,
    )
    there = {"i1", *estimators} - ({"i2"} if second_order == "off" else set())
    told = {"draws": draws, "bounds": bounds, "second_order": second_order, "diagonals": diagonals}
    for group in groups(report):
        assert {k for k in ESTIMATORS if getattr(group, k) is not None} == there
        for kind in there:
            assert present(getattr(group, kind)) == expected(kind, **told), kind
    for name, group in report.layers.items():
        assert (group.geometry is not None) == bounds
        assert (group.activation is not None) == (bounds and name != "0")  # whose input is data
    assert finite(report)
    shown = report.to_dict()["total"]
    assert set(shown) == {"numel", *there} | ({"geometry"} if bounds else set())


def numbers(report):
    shown = report.to_dict()
    return {k: shown[k] for k in ("total", "layers", "parameters")}


@pytest.mark.parametrize("draws", [2, "exact"])
def test_order_duplicates_and_kinds_of_sequence_do_not_matter(draws):
    net = mlp()
    want = numbers(measure(net, estimators=("i1", "i2", "ih"), draws=draws))
    for given in (
        ["ih", "i2", "i1"],
        ("i2", "ih"),
        ("i2", "i2", "ih", "i1", "i1"),
        {"i1", "i2", "ih"},
    ):
        assert numbers(measure(net, estimators=given, draws=draws)) == want
    assert numbers(measure(net, estimators="i2")) == numbers(measure(net, estimators=["i1", "i2"]))


@pytest.mark.parametrize("more", [("ih",), ("i2",), ("empirical",), ("i2", "ih", "empirical")])
@pytest.mark.parametrize("draws", [2, "exact"])
def test_what_else_is_measured_changes_no_number(more, draws):
    net = mlp()
    data = {"labels": LABELS} if "empirical" in more else {}
    plain = measure(net, estimators="i1", draws=draws, bounds=False)
    for bounds in (False, True):
        report = measure(net, estimators=more, draws=draws, bounds=bounds, **data)
        for one, other in zip(groups(report), groups(plain), strict=True):
            for name in BASE:
                assert getattr(one.i1, name) == pytest.approx(
                    getattr(other.i1, name), rel=1e-5, abs=1e-12
                )


@pytest.mark.parametrize("second_order", [{"probes": 5}, "exact", "off"], ids=str)
def test_second_order_without_i2_does_nothing(second_order):
    net = mlp()
    plain = measure(net, estimators=("i1", "ih"), bounds=False)
    report = measure(net, estimators=("i1", "ih"), bounds=False, second_order=second_order)
    assert numbers(report) == numbers(plain) and report.total.i2 is None
    assert not report.notes and not report.kinks


def test_probes_are_as_many_as_asked_for():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    two, three, again = (
        measure(net, second_order={"probes": k}, draws="exact").total for k in (2, 3, 2)
    )
    assert two.i2 == again.i2 and two.i1.trace == three.i1.trace
    assert two.i2.label_variance != three.i2.label_variance


def test_off_leaves_i2_out_whoever_asks():
    report = measure(estimators=("i2",), second_order="off")
    assert report.total.i2 is None and not [x for x in report.advice if "Î₂" in x]


# -- BackPACK's domain -----------------------------------------------------------------------


class Scaled(nn.Linear):
    """A subclass may do anything."""

    def forward(self, x):
        return 2 * super().forward(x)


class Outside(nn.Module):
    """Several modules that BackPACK gets wrong or does not know, and some that it does."""

    def __init__(self):
        super().__init__()
        self.inside, self.scaled, self.clipped = nn.Linear(4, 6), Scaled(6, 6), nn.ReLU6()
        self.one, self.curve, self.other = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)
        self.bag, self.head = nn.Bilinear(6, 6, 4), nn.Linear(4, 3)
        self.other.weight = self.one.weight

    def forward(self, x):
        x = self.clipped(self.scaled(self.inside(x)))
        x = self.other(self.curve(self.one(x)))
        return self.head(self.bag(x, x))


FIRST = {"scaled": "no verified rule", "one": "shares a parameter", "other": "shares a parameter",
         "bag": "no verified rule"}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "argument", "remedy", "named"),
    [
        ({"engine": "backpack"}, "engine='backpack'", "Use engine='auto'", FIRST),
        (
            {"second_order": "exact"},
            "second_order='exact'",
            "Use second_order={'probes': 2}",
            FIRST | {"clipped": "no verified rule"},
        ),
    ],
)
@pytest.mark.parametrize("draws", [2, "exact"])
def test_every_module_outside_of_the_domain_is_named(draws, options, argument, remedy, named):
    with pytest.raises(FimprobeError) as error:
        measure(Outside(), draws=draws, **options)
    message = str(error.value)
    assert message.startswith(argument) and message.endswith(remedy)
    reasons = message.partition("because of ")[2].rpartition(". Use")[0]
    told = dict(x.split(": ", 1) for x in reasons.split("; "))
    assert set(told) == set(named)
    for name, reason in named.items():
        assert reason in told[name]


def test_the_remedies_work_and_a_domain_not_entered_is_nobodys_business():
    assert measure(Outside(), engine="auto", second_order={"probes": 2}).total.i2 is not None
    assert measure(Outside(), estimators=("i1",), second_order="exact").total.i2 is None


@pytest.mark.parametrize("draws", [2, "exact"])
@pytest.mark.parametrize("second_order", [{"probes": 2}, "exact"], ids=str)
def test_engines_agree(second_order, draws, double):
    net = mlp()
    x = inputs().double()
    options = {
        "likelihood": "categorical",
        "draws": draws,
        "second_order": second_order,
        "diagonals": True,
    }
    auto, ours, theirs = (
        fimprobe.measure(net, x, engine=engine, **options)
        for engine in ("auto", "autograd", "backpack")
    )
    assert numbers(auto) == numbers(ours)
    for one, other in zip(groups(theirs), groups(ours), strict=True):
        for kind in ("i1", "i2"):
            mine, its = getattr(one, kind), getattr(other, kind)
            assert present(mine) == present(its)
            for name in present(mine):
                a, b = getattr(mine, name), getattr(its, name)
                if b is None:
                    assert a is None
                elif isinstance(a, dict):
                    assert all(torch.allclose(a[n], b[n], rtol=1e-9, atol=1e-12) for n in b)
                else:
                    assert a == pytest.approx(b, rel=1e-8, abs=1e-12), (kind, name)
