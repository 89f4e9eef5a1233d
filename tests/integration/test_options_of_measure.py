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
from tests.models.small import mlp
from tests.support.options import LABELS, inputs, measure, numbers

pytestmark = pytest.mark.usefixtures("raw_numbers")

ESTIMATORS = ("i1", "i2", "ih", "empirical")


WITH = {"estimators": ("i1", "empirical")}
ESTIMATORS_MUST_BE = "`estimators` must be a list of at least one of 'i1', 'i2', 'ih', 'empirical'"
SECOND_ORDER_MUST_BE = "`second_order` must be 'auto', {probes: 2}, 'spot_checks', 'exact' or 'off'"
PROBES_MUST_BE = "`second_order.probes` must be an integer of at least 2"
DRAWS_MUST_BE = "`draws` must be a positive integer, 'exact' or 'auto'"
MEMORY_MUST_BE = "`memory_mb` must be a finite number of megabytes above 0"
ENGINE_MUST_BE = "`engine` must be 'auto', 'autograd' or 'backpack'"
SEED_MUST_BE = "`seed` must be a 64-bit integer"
BAD = [
    # options, what the message must hold: argument, value, remedy
    ({"estimators": ()}, [ESTIMATORS_MUST_BE, "got []", "Use ['i1', 'i2']"]),
    ({"estimators": []}, [ESTIMATORS_MUST_BE, "got []"]),
    ({"estimators": ""}, [ESTIMATORS_MUST_BE, "got '' at position 0"]),
    ({"estimators": None}, [ESTIMATORS_MUST_BE, "got None"]),
    ({"estimators": 3}, [ESTIMATORS_MUST_BE, "got 3"]),
    ({"estimators": {"i1": True}}, [ESTIMATORS_MUST_BE, "got {'i1': True}"]),
    ({"estimators": "i1,i2"}, [ESTIMATORS_MUST_BE, "got 'i1,i2' at position 0"]),
    ({"estimators": ("i1", "i3")}, [ESTIMATORS_MUST_BE, "got 'i3' at position 1"]),
    ({"estimators": ["I1"]}, [ESTIMATORS_MUST_BE, "got 'I1'", "Did you mean 'i1'?"]),
    ({"estimators": ("i1", 2)}, [ESTIMATORS_MUST_BE, "got 2 at position 1"]),
    ({"estimators": [["i1"]]}, [ESTIMATORS_MUST_BE, "got ['i1'] at position 0"]),
    ({"estimators": ("empirical",)}, ["`labels` must be given", "['empirical']", "Pass labels="]),
    ({"estimators": "empirical"}, ["`labels` must be given", "['empirical']", "Pass labels="]),
    ({"labels": LABELS}, ["`labels` must be None", "['i1', 'i2']", "Add 'empirical'"]),
    ({"estimators": "ih", "labels": "y"}, ["`labels` must be None", "['ih']", "leave labels out"]),
    (
        {**WITH, "labels": [0, 1, 2, 0, 1]},
        ["`labels` must be a tensor", "got list", "torch.as_tensor"],
    ),
    ({**WITH, "labels": LABELS[:3]}, ["`labels` must be [B, ...] with B = 5", "got shape (3,)"]),
    ({**WITH, "labels": LABELS[0]}, ["`labels` must be [B, ...] with B = 5", "got shape ()"]),
    ({**WITH, "labels": LABELS.float()}, ["labels", "torch.float32", "labels.long()"]),
    ({**WITH, "labels": LABELS > 0}, ["labels", "torch.bool", "whole numbers"]),
    ({**WITH, "labels": LABELS + 1}, ["got 1 of 5 outside", "the first 3", "from 0"]),
    ({**WITH, "labels": LABELS - 1}, ["got 2 of 5 outside", "the first -1", "-100"]),
    ({**WITH, "labels": torch.eye(3)[LABELS]}, ["labels", "(5, 3)", "labels.argmax(-1)"]),
    ({**WITH, "labels": LABELS[:, None]}, ["labels", "(5, 1)", "labels.reshape"]),
    ({"second_order": "on"}, [SECOND_ORDER_MUST_BE, "got 'on'"]),
    ({"second_order": None}, [SECOND_ORDER_MUST_BE, "got None", "Use 'auto'"]),
    ({"second_order": True}, [SECOND_ORDER_MUST_BE, "got True"]),
    ({"second_order": 2}, [SECOND_ORDER_MUST_BE, "got 2"]),
    ({"second_order": [2]}, [SECOND_ORDER_MUST_BE, "got [2]"]),
    ({"second_order": {"probes": 1}}, [PROBES_MUST_BE, "got 1", "Use 2 probes or more"]),
    ({"second_order": {"probes": 0}}, [PROBES_MUST_BE, "got 0"]),
    ({"second_order": {"probes": -2}}, [PROBES_MUST_BE, "got -2"]),
    ({"second_order": {"probes": 2.0}}, [PROBES_MUST_BE, "got 2.0"]),
    ({"second_order": {"probes": "2"}}, [PROBES_MUST_BE, "got '2'"]),
    ({"second_order": {"probes": True}}, [PROBES_MUST_BE, "got True"]),
    ({"second_order": {"probes": None}}, [PROBES_MUST_BE, "got None"]),
    ({"second_order": {"probs": 2}}, ["`second_order.probs` is not", "Did you mean 'probes'?"]),
    ({"second_order": {"probes": 2, "x": 1}}, ["`second_order.x` is not", "Known keys: probes."]),
    # wrong where it would not be used, too
    ({"estimators": "i1", "second_order": "on"}, [SECOND_ORDER_MUST_BE, "got 'on'"]),
    ({"bounds": 1}, ["`bounds` must be true or false", "got 1"]),
    ({"bounds": None}, ["`bounds` must be true or false", "got None"]),
    ({"bounds": "yes"}, ["`bounds` must be true or false", "got 'yes'"]),
    ({"engine": "BackPACK"}, [ENGINE_MUST_BE, "got 'BackPACK'", "Did you mean 'backpack'?"]),
    ({"engine": None}, [ENGINE_MUST_BE, "got None", "Use 'auto'"]),
    ({"engine": ["auto"]}, [ENGINE_MUST_BE, "got ['auto']"]),
    ({"draws": 0}, [DRAWS_MUST_BE, "got 0", "Use 2"]),
    ({"draws": 10**12}, ["`draws` must be at most 1000000", f"got {10**12}", "Use 2"]),
    ({"draws": 2**70}, ["`draws` must be at most 1000000", f"got {2**70}"]),
    ({"second_order": {"probes": 10**12}}, ["`second_order.probes` must be at most 10000"]),
    ({"draws": -1}, [DRAWS_MUST_BE, "got -1"]),
    ({"draws": 2.0}, [DRAWS_MUST_BE, "got 2.0"]),
    ({"draws": True}, [DRAWS_MUST_BE, "got True"]),
    ({"draws": None}, [DRAWS_MUST_BE, "got None"]),
    ({"draws": "many"}, [DRAWS_MUST_BE, "got 'many'"]),
    ({"draws": torch.tensor(2)}, [DRAWS_MUST_BE, "got tensor(2)"]),
    ({"label_sampling": "exact"}, ["`label_sampling` must be 'size_biased' or 'model', got 'exact'"]),
    ({"label_sampling": None}, ["`label_sampling` must be 'size_biased' or 'model', got None"]),
    ({"memory_mb": 0}, [MEMORY_MUST_BE, "got 0"]),
    ({"memory_mb": -1.0}, [MEMORY_MUST_BE, "got -1.0"]),
    ({"memory_mb": math.nan}, [MEMORY_MUST_BE, "got nan"]),
    ({"memory_mb": math.inf}, [MEMORY_MUST_BE, "got inf"]),
    ({"memory_mb": 1e305}, ["`memory_mb` must be at most 1000000000, got 1e+305", "Use 512"]),
    ({"memory_mb": 10**400}, ["`memory_mb` must be", "Use 512"]),
    ({"memory_mb": "512"}, [MEMORY_MUST_BE, "got '512'"]),
    ({"memory_mb": None}, [MEMORY_MUST_BE, "got None"]),
    ({"memory_mb": True}, [MEMORY_MUST_BE, "got True"]),
    ({"seed": 1.5}, [SEED_MUST_BE, "got 1.5"]),
    ({"step": "a"}, ["`step` must be an integer, got 'a'. Use 0."]),
    ({"step": math.nan}, ["`step` must be an integer, got nan"]),
    ({"step": True}, ["`step` must be an integer, got True"]),
    ({"step": None}, ["`step` must be an integer, got None"]),
    ({"diagonals": "yes"}, ["`diagonals` must be True or False, got 'yes'", "Use True"]),
    ({"diagonals": None}, ["`diagonals` must be True or False, got None"]),
    ({"plan": 3}, ["`plan` must be a Plan or None, got int", "earlier measurement"]),
    ({"plan": {}}, ["`plan` must be a Plan or None, got dict"]),
    ({"ranks": 2}, ["`ranks` must be a group of processes or None, got int", "join_processes"]),
    ({"seed": "0"}, [SEED_MUST_BE, "got '0'"]),
    ({"seed": None}, [SEED_MUST_BE, "got None"]),
    ({"seed": True}, [SEED_MUST_BE, "got True"]),
    ({"seed": 2**64}, [SEED_MUST_BE, f"got {2**64}"]),
    # all mistakes at once
    ({"draws": 0, "seed": 1.5}, [DRAWS_MUST_BE, SEED_MUST_BE]),
    ({"mask": [True] * 5}, ["`mask` must be a boolean tensor", "got list"]),
    ({"mask": torch.ones(5)}, ["`mask` must be a boolean tensor", "got torch.float32", ".bool()"]),
    ({"mask": torch.ones(5, dtype=torch.int64)}, ["`mask` must be", "got torch.int64", ".bool()"]),
    ({"mask": torch.ones(5, 3, dtype=torch.bool)}, ["mask", "(5, 3)"]),
    ({"mask": torch.tensor(True)}, ["`mask` must have an entry for each label, got shape ()"]),
    ({"mask": torch.ones(5, dtype=torch.bool, device="meta")}, ["`mask` must be dense", "meta"]),
    ({"mask": torch.ones(5).bool().to_sparse()}, ["`mask` must be dense", "mask.to_dense()"]),
    ({**WITH, "labels": LABELS.to("meta")}, ["`labels` must be dense with values", "meta device"]),
    ({**WITH, "labels": LABELS.to_sparse()}, ["`labels` must be dense", "labels.to_dense()"]),
    ({"output": lambda out: out.detach()}, ["outputs without a graph", "`output` detaches"]),
    ({"output": lambda out: out["x"]}, ["`output` must be", "Error for Tensor"]),
    ({"output": lambda out: out.logits}, ["`output` must be", "got AttributeError for Tensor"]),
    ({"output": 3}, ["`output` must be a function, got 3", "Pass one from what the model returns"]),
    ({"output": lambda out: 3}, ["output", "int", "outputs"]),
    ({"output": lambda out: out.sum()}, ["outputs", "shape ()", "`output`"]),
    ({"likelihood": None}, ["likelihood", "None", "'categorical'"]),
    ({"likelihood": "softmax"}, ["likelihood", "'softmax'", "'categorical'"]),
    ({"likelihood": "gausian"}, ["likelihood", "'gausian'", "Did you mean 'gaussian'?"]),
    ({"likelihood": "auto"}, ["likelihood", "'auto'", "'categorical'"]),
    ({"likelihood": fimprobe.likelihoods.Gaussian}, ["likelihood", "<class", "instance"]),
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
    with pytest.raises(FimprobeError, match="`model` must be a torch.nn.Module, got function"):
        fimprobe.measure(lambda x: x, inputs(), likelihood="categorical")
    with pytest.raises(FimprobeError, match="`model` must have trainable parameters"):
        fimprobe.measure(nn.Tanh(), inputs(), likelihood="categorical")


# -- what is asked for is what there is ------------------------------------------------------

BOUNDS = ("bound", "sharp_bound", "trace_bound", "diagonal_bound")
BASE = {"trace", "norm", "label_variance", "input_variance", "total_variance", "std_error",
        "rel_error", "total_label_variance", "effective_inputs", "skewness"}  # fmt: skip


def present(estimate):
    fields = [f.name for f in dataclasses.fields(estimate)]
    fields = [n for n in fields if n not in ("unknown", "pair_variance")]
    return {n for n in fields if getattr(estimate, n) is not None}


def expected_bounds(kind, exact):
    """The fields of a group's estimate that hold bounds."""
    norms = {"covariance_norm", "covariance_spectral_norm"}
    if kind == "i1":
        more = {*norms, "diagonal_range_bound"} if exact else {"bound_error"}
        return {*BOUNDS, "trace_range", *more}
    if kind == "i2":
        more = {*norms, "sharp_bound", "diagonal_bound"} if exact else set()
        return {"bound", "bound_error", "trace_bound", *more}
    return set()


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
        want |= {"cosine", "trace_ratio"}  # ‖G‖² of few inputs is not known
    if kind == "i2" and second_order != "exact":
        want.add("probe_error")
    if "label_variance" in want and (not exact or "probe_error" in want):
        want.add("label_variance_error")
    if "total_label_variance" in want and (not exact or kind == "i2"):
        want.add("total_label_variance_error")
    if bounds:
        want |= expected_bounds(kind, exact)
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


def combinations():
    """Every combination; the half of them that holds all pairs of options is run by default."""
    counts = [(n, d, b) for n in range(len(ASKED)) for d in range(3) for b in range(2)]
    for n, d, b in counts:
        (estimators, second_order), draws, bounds = ASKED[n], (1, 2, "exact")[d], (True, False)[b]
        marks = [] if (n + d + b) % 2 == 0 else [pytest.mark.long]
        name = f"{'+'.join(estimators)} {second_order}-{bounds}-{draws}"
        yield pytest.param(estimators, second_order, bounds, draws, marks=marks, id=name)


@pytest.mark.parametrize(("estimators", "second_order", "bounds", "draws"), list(combinations()))
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


@pytest.mark.parametrize("draws", [2, "exact"])
def test_order_duplicates_and_kinds_of_sequence_do_not_matter(draws):
    net = mlp(hidden=5)
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
    net = mlp(hidden=5)
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
    net = mlp(hidden=5)
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
            "Use second_order='auto'",
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
    net = mlp(hidden=5)
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
