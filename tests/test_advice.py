"""Advice: every number in a sentence against one computed here; nothing odd from odd reports."""

import re

import oracles
import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.report import Report
from fimprobe.types import Estimate, Geometry, GroupEstimates

NUMBER = r"([\d.,]+(?:e[+-]\d+)?)"


def estimate(labels=0.0, inputs=0.0, norm=1.0, **more):
    """An estimate whose pairs vary by ``labels`` + ``inputs``; None for what is not known."""
    total = None if labels is None or inputs is None else labels + inputs
    fields = {
        "trace": 2 * norm,
        "norm": norm,
        "label_variance": labels,
        "input_variance": inputs,
        "total_variance": total,
        "std_error": 0.1,
        "rel_error": 0.2,
        "total_label_variance": None,
    }
    return Estimate(**{**fields, **more})


def report(total=None, layers=None, **more):
    total = total or GroupEstimates(10, estimate())
    fields = {
        "step": 0,
        "batch_size": 8,
        "draws": 2,
        "seconds": 1.0,
        "likelihood": "categorical",
        "parameters": {},
        "layers": layers or {},
        "total": total,
    }
    return Report(**{**fields, **more})


def line(given, start):
    """The one sentence that starts so."""
    (found,) = [x for x in given.advice if x.startswith(start)]
    return found


def numbers(pattern, text):
    """The numbers in the places of # in a pattern that the text holds."""
    match = re.search(re.escape(pattern).replace(r"\#", NUMBER), text)
    assert match, (pattern, text)
    return [float(x.replace(",", "")) for x in match.groups()]


def geometry(weight):
    return Geometry(4.0, 3.0, spectral_bound=6.0, weight_spectral_norm=weight)


def test_pairs_for_ten_percent_in_the_model_and_in_the_layer_that_needs_most():
    total = GroupEstimates(9, estimate(3.0, 1.5, norm=0.25, rel_error=0.123))
    layers = {
        "small": GroupEstimates(3, estimate(1.0, 1.0, norm=1.0)),
        "needy": GroupEstimates(3, estimate(0.5, 0.1, norm=0.1)),
        "dead": GroupEstimates(3, estimate(1.0, 1.0, norm=0.0)),
    }
    given = report(total, layers)
    text = line(given, "Î₁ of the whole model")
    # n pairs leave the relative error √((V_x + V_y)/n)/‖diag F‖
    error, size, draws, pairs, need = numbers(
        "is off by # % at # inputs with # drawn labels each (# pairs); an error of 10 % takes # (input, "
        "label) pairs.",
        text,
    )
    assert (error, size, draws, pairs) == (12.3, 8, 2, 16)
    assert (4.5 / need) ** 0.5 / 0.25 == pytest.approx(0.1, rel=1e-3)
    text = line(given, "The layer that needs most")
    (need,) = numbers("is 'needy': # (input, label) pairs.", text)
    assert (0.6 / need) ** 0.5 / 0.1 == pytest.approx(0.1, rel=1e-2)
    assert line(given, "No gradient reaches") == (
        "No gradient reaches 'dead' at these inputs: its Fisher information is zero."
    )
    exact = line(report(total, layers, draws=None), "F of the whole model")
    off, size, one, need = numbers(
        "is off by # % at # inputs with labels integrated over: from the choice of inputs alone. With one "
        "drawn label for each input it is off by # % (Î₁); an error of 10 % takes # (input, label) pairs "
        "with Î₁.",
        exact,
    )
    assert (off, size, need) == (12.3, 8, 7200)
    assert one == pytest.approx(100 * (4.5 / 8) ** 0.5 / 0.25, rel=5e-3)


def test_a_variance_below_zero_is_no_error():
    noisy = GroupEstimates(3, estimate(-3.0, 1.0))
    assert report(noisy, draws=None).one_label_error(noisy.i1) == 0


def choice(layers, seconds, **more):
    given = report(layers=layers, seconds_by_part=seconds, **more)
    found = [x for x in given.advice if "For the same computing time" in x]
    return found[0] if found else None


SECONDS = {"forward": 0.5, "i1": 1.5, "ih": 2.5, "i2 diagonal": 6.0}
COSTS = {"i1": 2.0, "i2": 9.0, "ih": 3.0}  # the forward pass, and F for Î₂


def error(variance, cost, budget=3600.0):
    """Of a mean over the pairs that the budget buys."""
    return (variance / (budget / cost)) ** 0.5


@pytest.mark.parametrize(
    ("variances", "best"),
    [
        ({"i1": 100.0, "i2": 2.0}, "Î₂"),
        ({"i1": 100.0, "i2": 30.0}, "Î₁"),
        ({"i1": 7.0, "i2": 5.0}, "Î₁"),
        ({"i1": 100.0, "ih": 20.0}, "Î_H"),
        ({"i1": 100.0, "i2": 2.0, "ih": 20.0}, "Î₂"),
        ({"i1": 100.0, "i2": 30.0, "ih": 3.0}, "Î_H"),
        ({"i1": 10.0, "i2": 30.0, "ih": 30.0}, "Î₁"),
        ({"i1": 90.0, "i2": 20.0}, None),  # 180 to 180: alike
        ({"i1": 91.0, "i2": 20.0}, None),
    ],
)
def test_the_estimator_with_the_least_error_at_equal_compute(variances, best):
    group = GroupEstimates(3, **{k: estimate(v - 1, 1.0) for k, v in variances.items()})
    text = choice({"fc": group}, SECONDS, total=group)
    names = {"i1": "Î₁", "i2": "Î₂", "ih": "Î_H"}
    for kind in variances:
        if kind != "i1":
            assert f"by {names[kind]} takes {COSTS[kind] / 2:.2g} " in text
    assert text.endswith(" times as long as by Î₁.")
    errors = sorted((error(v, COSTS[k]), names[k]) for k, v in variances.items())
    if best is None:
        assert "err alike" in text
        return
    assert errors[0][1] == best
    (gain,) = numbers(f"{best} errs least in 'fc' (#×).", text)
    assert ("than the next best." if len(variances) == 3 else "than the other.") in text
    assert gain == pytest.approx(errors[1][0] / errors[0][0], rel=0.05)


def test_choices_of_several_layers_and_their_limits():
    def group(first, second):
        return GroupEstimates(3, estimate(first, 1.0), i2=estimate(second, 1.0))

    layers = {"a": group(99.0, 0.0), "b": group(0.0, 99.0), "c": group(80.0, 17.0)}
    text = choice(layers, SECONDS, total=group(1.0, 1.0))
    assert "Î₂ errs least in 'a' (4.7×); Î₁ in 'b' (21×). In" in text and "'c'" not in text
    given = report(group(1.0, 1.0), layers)
    assert line(given, "Labels add no variance").startswith(
        "Labels add no variance to the diagonal of Î₂ in 'a': "
    )
    none = {"a": GroupEstimates(3, estimate(5.0, 0.0), i2=estimate(0.0, 0.0))}
    assert "Î₂ errs least in 'a' (no error seen)." in choice(none, SECONDS, total=none["a"])
    # exact labels: F comes with Î₁'s passes, so that Î₂ costs 0.5 + 1.5 + 6
    text = choice({"a": group(99.0, 0.0)}, SECONDS, total=group(1.0, 1.0), draws=None)
    assert "a diagonal by Î₂ takes 4 times as long as by Î₁." in text and "'a' (5×)" in text
    # nothing to compare
    assert choice({"a": GroupEstimates(3, estimate(1.0, 1.0))}, SECONDS) is None
    assert choice({"a": group(1.0, 9.0)}, {"forward": 1.0, "i1": 1.0}) is None
    unknown = GroupEstimates(3, estimate(None, None), i2=estimate(1.0, None))
    assert choice({"a": unknown}, SECONDS, draws=1) is None


@pytest.mark.parametrize("draws", [2, 3, 9])
@pytest.mark.parametrize("share", [0.2, 0.8, 0.9, 0.985])
def test_labels_against_inputs(share, draws):
    labels, inputs = share * 40, (1 - share) * 40
    text = line(report(GroupEstimates(9, estimate(labels, inputs)), draws=draws), "Drawn labels")
    # per second, S labels for an input cost 1 + S and leave V_x + V_y/S
    best = min(range(1, 100), key=lambda s: (1 + s) * (inputs + labels / s))
    percent, told = numbers("cause # % of the variance of one pair. Where an input costs as much as a "
                            "label, draws=# ", text)  # fmt: skip
    assert percent == pytest.approx(100 * share, abs=0.51)
    ideal = (share / (1 - share)) ** 0.5
    near = draws / 1.5 <= max(ideal, 1.0) <= 1.5 * draws
    assert ("near the best" in text) == near
    assert told == (draws if near else best)
    assert ("more inputs is best" in text) == (not near and draws > best)


def test_labels_alone():
    given = report(GroupEstimates(9, estimate(2.0, -0.5)))  # an estimate below zero
    assert line(given, "Drawn labels") == (
        "Drawn labels cause 100 % of the variance of one pair: more labels for each input (draws=) help "
        "as much as more inputs."
    )
    for labels, inputs in ((-1.0, -1.0), (0.0, 0.0), (None, 1.0), (1.0, None)):
        given = report(GroupEstimates(9, estimate(labels, inputs)))
        assert not [x for x in given.advice if "Drawn labels" in x]


def test_weights_that_make_the_bound_large():
    def layers(*norms):
        groups = {
            f"l{i}": GroupEstimates(3, estimate(), geometry=geometry(s)) for i, s in enumerate(norms)
        }
        groups["none"] = GroupEstimates(3, estimate(), geometry=Geometry(1.0, 1.0, reason="forked"))
        return groups

    text = line(report(layers=layers(50.0, 1.5, 7.0, 0.9, 3.0, 2.0)), "The bound (21)")
    # (21) of layer l multiplies the weights after it: never the first layer's own
    assert "of 'l2' (s_max 7), 'l4' (s_max 3), 'l5' (s_max 2);" in text
    assert "(2 times the true value at 'l0')" in text
    for quiet in ((50.0,), (50.0, 0.5, 1.0), ()):
        assert not [x for x in report(layers=layers(*quiet)).advice if "(21)" in x]


@pytest.mark.parametrize(
    ("kind", "value", "error", "shouts"),
    [
        ("i1", 3.0, None, True),
        ("i1", 2.1, None, True),
        ("i1", 2.0, None, False),
        ("i1", 2.001, None, False),  # rounding
        ("i1", 1.0, None, False),
        ("i1", None, None, False),
        ("i2", 4.1, 0.0, True),
        ("i2", 3.9, 0.0, False),  # both sides are probed
        ("i2", 5.0, 0.2, False),
        ("i2", 6.0, 0.2, True),  # 2 (2 + 4 · 0.2) = 5.6
    ],
)
def test_violated_bounds(kind, value, error, shouts):
    bad = estimate(covariance_norm=value, bound=2.0, bound_error=error)
    groups = {"i1": estimate(), kind: bad}
    group, fine = GroupEstimates(3, **groups), GroupEstimates(3, estimate())
    for where in ("parameters", "layers", "total"):
        more = {where: {"fc": group}} if where != "total" else {"total": group}
        found = [x for x in report(**{"total": fine, **more}).advice if "VIOLATED" in x]
        assert len(found) == shouts
        for text in found:
            name = "the model" if where == "total" else "fc"
            equation, sign = ("(17)", "Î₁") if kind == "i1" else ("(18)", "Î₂")
            assert f"in {name} (‖Cov {sign}‖ = {value:.3g}, bound {equation} 2):" in text
            assert "report it" in text


def test_noise_of_the_probes():
    def probed(labels, error):
        group = GroupEstimates(3, estimate(1.0, 1.0), i2=estimate(labels, 1.0, probe_error=error))
        return [x for x in report(group).advice if x.startswith("Random probes")]

    (text,) = probed(4.0, 1.3)
    assert numbers("add # % of noise to Î₂'s label variance", text) == [32.5]
    assert not probed(4.0, 0.9) and not probed(4.0, None) and not probed(0.0, 0.0)


def test_what_is_passed_on():
    coverage = {f"p{i}": "left out: frozen" for i in range(10)} | {"w": "autograd: Linear rule"}
    given = report(coverage=coverage, kinks=["ReLU: 1", "ReLU: 3"], notes=["A note."])
    assert "A note." in given.advice
    assert "ReLU: 1; ReLU: 3" in line(given, "Not twice differentiable")
    text = line(given, "Left out")
    assert "p0 (frozen), " in text and text.endswith("p7 (frozen) and 2 more.") and "w" not in text


def test_a_model_without_any_gradient():
    for draws, words in ((2, "draws='exact' sees"), (None, "whatever the label")):
        given = report(GroupEstimates(9, estimate(0.0, 0.0, norm=0.0, rel_error=None)), draws=draws)
        (text,) = given.advice
        assert words in text and "zero" in text


def test_every_number_of_a_real_measure(double):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    for p in net.parameters():
        p.data *= 2
    x = torch.randn(6, 3)
    given = fimprobe.measure(
        net, x, likelihood="categorical", draws="exact", second_order="exact", diagonals=True
    )
    dense = [
        oracles.Dense(net, (x,), b, lambda h: oracles.categorical_labels(h, 1, 3)) for b in range(6)
    ]

    def of(index):
        """‖diag F‖, V_x, V_y of Î₁ and V_y of Î₂, by enumeration."""
        f = torch.stack([d.fisher.diagonal()[index] for d in dense])
        g = [(d.scores @ d.jacobian)[:, index] for d in dense]
        fourth = torch.stack([d.weights @ s.pow(4) for d, s in zip(dense, g, strict=True)])
        first = float((fourth - f.square()).mean(0).sum())
        second = float(torch.stack([d.v2[index] for d in dense]).mean(0).sum())
        return float(f.mean(0).norm()), float(f.var(0).sum()), first, second

    truth = {key: of(index) for key, index in oracles.groups(net).items()}
    norm, across, labels, _ = truth["total", ""]
    off, size, first, second, need = numbers(
        "is off by # % at # inputs with labels integrated over: from the choice of inputs alone. With one "
        "drawn label for each input it is off by # % (Î₁) and # % (Î₂); an error of 10 % takes # (input, "
        "label) pairs with Î₁.",
        given.advice[0],
    )
    assert size == 6
    for shown, variance in ((first, labels), (second, truth["total", ""][3])):
        assert shown == pytest.approx(100 * ((across + variance) / 6) ** 0.5 / norm, rel=5e-3)
    assert off == pytest.approx(100 * (across / 6) ** 0.5 / norm, rel=5e-3)
    assert need == pytest.approx(100 * (across + labels) / norm**2, abs=0.51)
    needs = {n: 100 * (truth["layers", n][1] + truth["layers", n][2]) / truth["layers", n][0] ** 2
             for n in given.layers}  # fmt: skip
    worst = max(needs, key=needs.get)
    (need,) = numbers(f"is {worst!r}: # (input, label) pairs", line(given, "The layer that needs"))
    assert need == pytest.approx(needs[worst], abs=0.51)
    parts = given.seconds_by_part
    cost = {"Î₁": parts["forward"] + parts["i1"]}
    cost["Î₂"] = cost["Î₁"] + parts["i2 diagonal"]
    text = choice_of(given)
    assert f"by Î₂ takes {cost['Î₂'] / cost['Î₁']:.2g} times as long" in text
    for n in given.layers:
        _, across, first, second = truth["layers", n]
        errors = {"Î₁": error(across + first, cost["Î₁"]), "Î₂": error(across + second, cost["Î₂"])}
        best, other = sorted(errors, key=errors.get)
        gain = errors[other] / errors[best]
        if gain >= 1.1:
            side = re.split(f"{best} (?:errs least )?in ", text)[1].split(";")[0]
            assert numbers(f"'{n}' (#×)", side) == [pytest.approx(gain, rel=0.05)]
        else:
            assert f"'{n}' (" not in text
    assert "'4'" in line(given, "Labels add no variance") and truth["layers", "4"][3] < 1e-20
    assert "'2'" not in line(given, "Labels add no variance")
    text = line(given, "The bound (21)")
    svd = {n: float(torch.linalg.svdvals(net[int(n)].weight.detach())[0]) for n in ("0", "2", "4")}
    large = sorted((n for n in ("2", "4") if svd[n] > 1), key=svd.get, reverse=True)
    assert numbers(", ".join(f"{n!r} (s_max #)" for n in large), text) == [
        pytest.approx(svd[n], rel=6e-3) for n in large
    ]
    own = oracles.groups(net)["layers", "0"]
    tops = [float(torch.linalg.svdvals(d.jacobian[:, own])[0]) for d in dense]
    inputs = torch.cat([x, torch.ones(6, 1)], 1).norm(dim=1)
    bound = svd["2"] * svd["4"] * float(inputs.square().mean()) ** 0.5
    ratio = bound / float(torch.tensor(tops).square().mean()) ** 0.5
    assert numbers("(# times the true value at '0')", text) == [pytest.approx(ratio, rel=6e-3)]


def choice_of(given):
    (text,) = [x for x in given.advice if "For the same computing time" in x]
    return text


def saturated(bias):
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    net[2].weight.data.zero_()
    net[2].bias.data = torch.tensor([bias, 0.0, 0.0])
    return net


def plain():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


ODD = {
    "single layer": (lambda: nn.Linear(6, 3), {}),
    "no bias": (lambda: nn.Linear(6, 3, bias=False), {"draws": "exact"}),
    "zero Fisher": (lambda: saturated(800.0), {}),
    "zero Fisher, exact": (lambda: saturated(800.0), {"draws": "exact"}),
    "almost zero": (lambda: saturated(60.0), {}),
    "almost zero, exact": (lambda: saturated(60.0), {"draws": "exact"}),
    "layers without gradient": (lambda: saturated(0.0), {"draws": "exact"}),
    "one draw": (plain, {"draws": 1}),
    "exact": (plain, {"draws": "exact"}),
    "one input": (plain, {"size": 1}),
    "one input, exact": (plain, {"size": 1, "draws": "exact"}),
    "i2": (plain, {"estimators": ("i2",)}),
    "ih": (plain, {"estimators": ("ih",)}),
    "empirical": (plain, {"estimators": ("empirical",)}),
    "i1 alone": (plain, {"estimators": ("i1",), "bounds": False}),
    "all": (plain, {"estimators": ("i1", "i2", "ih", "empirical"), "draws": "exact"}),
    "one draw, no i1": (plain, {"estimators": ("i2", "ih"), "draws": 1, "size": 2}),
    "no label": (plain, {"mask": torch.zeros(8, dtype=torch.bool)}),
    "gaussian": (plain, {"likelihood": "gaussian"}),
}


@pytest.mark.parametrize("name", ODD)
def test_advice_of_odd_reports(name):
    make, options = ODD[name]
    size = options.get("size", 8)
    options = {"likelihood": "categorical", **options}
    options.pop("size", None)
    if "empirical" in options.get("estimators", ()):
        options["labels"] = torch.randint(3, (size,))
    given = fimprobe.measure(make(), torch.randn(size, 6), **options)
    assert given.advice
    for text in given.advice:
        assert text[0].isupper() and text.endswith(".")
        assert not re.search(r"\b(nan|inf|None|True|False)\b|\{|  ", text), text
        assert "VIOLATED" not in text
        assert not re.search(r"\b1 (inputs|labels|pairs|drawn labels)\b", text), text
    said = " ".join(given.advice)
    compared = given.total.i2 is not None and given.total.i1.norm > 0
    assert ("Î₂" in said.split("Not twice")[0]) == compared
    assert ("is zero" in given.advice[0]) == (given.total.i1.norm == 0)
    assert ("No gradient reaches '0'" in said) == (
        name in ("almost zero, exact", "layers without gradient")
    )
    assert "nan" not in str(given)
