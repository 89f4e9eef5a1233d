"""Advice: every number in a sentence against one computed here; nothing odd from odd reports."""

import dataclasses
import re

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.estimators.estimate import Estimate, Geometry, GroupEstimates
from fimprobe.estimators.pair_variance import PairVariance
from fimprobe.report.advice import make_advice
from fimprobe.report.error_advice import LAST_KNOWN
from fimprobe.report.record import verdict
from fimprobe.report.report import Report
from tests.oracles import brute_force

NUMBER = r"(\d[\d.,]*(?:e[+-]\d+)?)"

FEW = "too few inputs have a gradient that counts ({} of 8); take more inputs"


def estimate(labels=0.0, inputs=0.0, norm=1.0, *, noise=0.0, **more):
    """An estimate whose pairs vary by ``labels`` + ``inputs``; None for what is not known.

    ``noise``: the relative standard error of the pairs' variance.
    """
    known = labels is not None and inputs is not None
    spread = (noise * (labels + inputs)) ** 2 if known else 0.0
    pair = PairVariance(
        fourth=norm**2 + labels + inputs,
        square=norm**2 + inputs,
        norm_square=norm**2,
        covariance=((spread, 0.0, 0.0), (0.0,) * 3, (0.0,) * 3),
    ) if known else None  # fmt: skip
    fields = {
        "trace": 2 * norm,
        "norm": norm,
        "label_variance": labels,
        "input_variance": inputs,
        "total_variance": labels + inputs if known else None,
        "std_error": 0.1,
        "rel_error": 0.2,
        "pair_variance": pair,
    }
    return Estimate(**{**fields, **more})


def unknown(reason, *fields, **more):
    """An estimate of which some numbers were withheld."""
    gone = {"pairs": "pair_variance"}
    lost = {gone.get(name, name): None for name in fields}
    reasons = dict.fromkeys(fields, reason)
    return dataclasses.replace(estimate(**more), **lost, unknown=reasons)


def report(total=None, layers=None, **more):
    total = total or GroupEstimates(numel=10, i1=estimate())
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
    made = Report(**{**fields, **more})
    return dataclasses.replace(made, advise=make_advice)


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
    return Geometry(
        jacobian_norm=4.0, jacobian_spectral_norm=3.0, spectral_bound=6.0, weight_spectral_norm=weight
    )


def test_how_far_off_f_is_and_how_many_inputs_it_takes():
    total = GroupEstimates(numel=9, i1=estimate(3.0, 1.5, norm=0.25, rel_error=0.323))
    text = report(total).advice[0]
    off, size, draws, need = numbers(
        "F of the whole model is off by # % at # inputs, # labels from the model for each input; an "
        "error of 10 % takes about # inputs measured in the same way.",
        text,
    )
    assert (off, size, draws) == (32.3, 8, 2)
    # the error falls as 1/√inputs
    assert 0.323 * (8 / need) ** 0.5 == pytest.approx(0.1, rel=1e-2)
    text = report(total, label_sampling="size_biased").advice[0]
    assert (
        "at 8 inputs, 2 size-biased labels for each input; an error of 10 % takes about 83 inputs"
        in text
    )
    text = report(total, draws=None, label_sampling="exact").advice[0]
    assert "at 8 inputs, exact labels; an error of 10 % takes about 83 inputs" in text
    both = GroupEstimates(numel=9, i1=estimate(rel_error=0.366), i2=estimate(rel_error=0.184))
    text = report(both).advice[0]
    assert text.startswith("F of the whole model is off by 36.6 % by Î₁ and by 18.4 % by Î₂ at 8 ")
    assert text.endswith("about 107 inputs measured in the same way with Î₁.")
    noisy = GroupEstimates(
        numel=9, i1=estimate(rel_error=0.343), i2=estimate(0.5, 0.0, rel_error=0.399)
    )
    assert report(noisy, label_sampling="size_biased").advice[0] == (
        "F of the whole model is off by 34.3 % by Î₁ at 8 inputs, 2 size-biased labels for each input; "
        "an error of 10 % takes about 94 inputs measured in the same way with Î₁. Measured here with "
        "random vectors, Î₂ is off by 39.9 %; with exact Hessians and 1 label it would be off by 25 %."
    )
    good = GroupEstimates(numel=9, i1=estimate(3.0, 1.5, rel_error=0.1))
    assert (
        report(good)
        .advice[0]
        .endswith("is off by 10 % at 8 inputs, 2 labels from the model for each input.")
    )


def test_how_far_off_the_estimators_are_with_one_label():
    total = GroupEstimates(
        numel=9,
        i1=estimate(3.0, 1.5, norm=0.25, noise=0.123),
        i2=estimate(0.5, 1.5, norm=0.25, noise=0.04),
        ih=estimate(1.0, 1.5, norm=0.25),
    )
    text = line(report(total), "With one label from the model")
    size, first, second, third, *needs = numbers(
        "With one label from the model for each of # inputs, Î₁ would be off by # %, Î₂ by # % and Î_H by "
        "# % (with one random vector each). An error of 10 % takes # ± # (input, label) pairs with Î₁, "
        "# ± # with Î₂, # with Î_H.",
        text,
    )
    assert size == 8
    for off, need, error, variance, known in (
        (first, needs[0], needs[1], 4.5, 0.123),
        (second, needs[2], needs[3], 2.0, 0.04),
        (third, needs[4], 0.0, 2.5, 0.0),
    ):
        assert off == pytest.approx(100 * (variance / 8) ** 0.5 / 0.25, rel=5e-3)
        # n pairs leave the relative error √((V_x + V_y)/n)/‖diag F‖
        assert (variance / need) ** 0.5 / 0.25 == pytest.approx(0.1, rel=1e-3)
        assert error == pytest.approx(known * need, rel=0.03)
    alone = line(report(GroupEstimates(numel=9, i1=estimate(3.0, 1.5))), "With one label")
    assert (
        "Î₁ would be off by 75 %. An error of 10 % takes 450 (input, label) pairs with Î₁." in alone
    )


def test_verdicts_of_layers():
    layers = {
        "fine": GroupEstimates(numel=3, i1=estimate(rel_error=0.0312)),
        "edge": GroupEstimates(numel=3, i1=estimate(rel_error=0.1)),
        "over": GroupEstimates(numel=3, i1=estimate(rel_error=0.2)),
        "far": GroupEstimates(numel=3, i1=estimate(rel_error=30.0)),
        "few": GroupEstimates(
            numel=3, i1=unknown(FEW.format(2.1), "rel_error", "pairs", "std_error")
        ),
        "fewer": GroupEstimates(
            numel=3, i1=unknown(FEW.format(1.5), "rel_error", "pairs", "std_error")
        ),
        "lost": GroupEstimates(
            numel=3, i1=unknown("the norm of F is lost in its noise", "norm", "rel_error")
        ),
        "dead": GroupEstimates(numel=3, i1=estimate(norm=0.0, rel_error=None)),
    }
    given = report(layers=layers)
    assert line(given, "Trusted") == "Trusted to 10 %: 'fine' (3.12 %), 'edge' (10 %)."
    text = line(given, "More inputs")
    far, over = numbers(  # the worst first
        "More inputs are needed for 10 %: 'far' takes # (3,000 % now), 'over' takes # (20 % now).",
        text,
    )
    assert (over, far) == (32, 720_000)
    told = [x for x in given.advice if x.startswith("The error of ")]
    assert told == [
        "The error of 'few', 'fewer' is unknown: too few inputs have a gradient that counts (2.1 of 8 in 'few'); "
        "take more inputs.",
        "The error of 'lost' is unknown: the norm of F is lost in its noise.",
    ]
    assert line(given, "No gradient") == (
        "No gradient reaches 'dead' at these inputs: F is zero there, whatever the label."
    )
    verdicts = {"fine": "trusted", "over": "needs 32 inputs", "few": "unknown", "dead": "zero"}
    for name, text in verdicts.items():
        assert verdict(vars(layers[name].i1), 8) == text
    # more than were measured, however near the error is to 10 %
    assert verdict({"trace": 1.0, "rel_error": 0.1001}, 29) == "needs 30 inputs"
    # every layer has one verdict
    told = " ".join(x for x in given.advice if not x.startswith(("F of", "With one", "Labels")))
    assert all(told.count(f"'{name}'") == (2 if name == "few" else 1) for name in layers)


def test_what_is_unknown_everywhere_is_told_once():
    few = {"fields": ("std_error", "rel_error", "pairs")}
    layers = {
        name: GroupEstimates(
            numel=3, i1=unknown(FEW.format(n), *few["fields"]), i2=estimate(None, None)
        )
        for name, n in (("a", 2.1), ("b", 1.3))
    }
    total = GroupEstimates(
        numel=9,
        i1=unknown(FEW.format(1.9), *few["fields"]),
        i2=unknown(FEW.format(1.7), *few["fields"]),
    )
    given = report(total, layers)
    assert given.advice[0] == (
        "The error of F of the whole model and of each layer at 8 inputs, 2 labels from the model for "
        f"each input is unknown: {FEW.format(1.9)}."
    )
    assert sum("too few inputs" in text for text in given.advice) == 1
    layers["c"] = GroupEstimates(numel=3, i1=estimate(1.0, 1.0, rel_error=0.05))
    first, *rest = report(total, layers).advice
    assert first.startswith("The error of F of the whole model at 8 inputs")
    assert rest[0] == "Trusted to 10 %: 'c' (5 %)."
    assert rest[1].startswith(
        "The error of 'a', 'b' is unknown: too few inputs have a gradient that counts (2.1 of 8 "
    )


def test_an_estimator_whose_error_is_unknown_beside_one_that_is_known():
    total = GroupEstimates(numel=9, i1=estimate(3.0, 1.0), i2=unknown(FEW.format(4.2), "pairs"))
    known, lost = [x for x in report(total).advice if x.startswith("With one label")]
    assert "Î₁ would be off by 70.7 %." in known and "Î₂" not in known
    assert lost == (
        "With one label from the model for each of 8 inputs, the error of Î₂ is unknown: "
        f"{FEW.format(4.2)}."
    )


def test_labels_that_were_not_seen():
    why = "the drawn labels carry 0.3 % of the expected score; pass draws='exact'"
    fields = ("trace", "norm", "label_variance", "input_variance", "std_error", "rel_error", "pairs")
    lost = unknown(why, *fields)
    second = unknown(why, "label_variance", "pairs", "rel_error", "std_error", probe_error=0.3)
    group = GroupEstimates(numel=9, i1=lost, i2=second)
    given = report(group, {"a": group, "b": group}, seen_mass=0.003)
    # nothing is said of layers, labels or probes of which nothing is known
    assert given.advice == [
        f"Î₁ gives no estimate of F: {why}. Labels that carry F are too rare to be drawn from the model."
    ]


def choice(layers, seconds, **more):
    given = report(layers=layers, seconds_by_part=seconds, **more)
    found = [x for x in given.advice if "At equal compute" in x]
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
    group = GroupEstimates(numel=3, **{k: estimate(v - 1, 1.0) for k, v in variances.items()})
    text = choice({"fc": group}, SECONDS, total=group)
    names = {"i1": "Î₁", "i2": "Î₂", "ih": "Î_H"}
    for kind in variances:
        if kind != "i1":
            assert f"{COSTS[kind] / 2:.2g} times as long by {names[kind]}" in text
    assert text.endswith(" as by Î₁.")
    errors = sorted((error(v, COSTS[k]), names[k]) for k, v in variances.items())
    if best is None:
        assert "have similar errors" in text
        return
    assert errors[0][1] == best
    degree = "smallest" if len(variances) == 3 else "smaller"
    (gain,) = numbers(
        f"{best} has the {degree} error in layer 'fc' (at least # times smaller).", text
    )
    assert ("The factors compare with the second best." in text) == (len(variances) == 3)
    assert gain == pytest.approx(errors[1][0] / errors[0][0], rel=0.05)


def test_choices_of_several_layers_and_their_limits():
    def group(first, second):
        return GroupEstimates(numel=3, i1=estimate(first, 1.0), i2=estimate(second, 1.0))

    layers = {"a": group(99.0, 0.0), "b": group(0.0, 99.0), "c": group(80.0, 17.0)}
    text = choice(layers, SECONDS, total=group(1.0, 1.0))
    assert (
        "At equal compute and one drawn label for each input, Î₂ has the smaller error in layer 'a' (at least 4.7 times smaller); Î₁ in layer 'b' "
        "(at least 21 times smaller). Measured here, "
    ) in text and "'c'" not in text
    given = report(group(1.0, 1.0), layers)
    assert line(given, "The diagonal of Î₂") == (
        "The diagonal of Î₂ in 'a' has no variance from labels, only that from inputs."
    )
    # where its error is unknown, no sentence sounds as if it were not
    lost = {"a": GroupEstimates(numel=3, i1=estimate(), i2=unknown("lost", "pairs"))}
    assert line(report(group(1.0, 1.0), lost), "The diagonal of Î₂") == (
        "The diagonal of Î₂ in 'a' has no variance from labels: its error with 1 label is that from "
        "the choice of inputs, and is unknown here."
    )
    none = {"a": GroupEstimates(numel=3, i1=estimate(5.0, 0.0), i2=estimate(0.0, 0.0))}
    assert "Î₂ has the smaller error in layer 'a' (zero error)." in choice(
        none, SECONDS, total=none["a"]
    )
    # factors of 100 and more are whole numbers
    wide = {"a": group(2e6, 0.0)}
    assert "error in layer 'a' (at least 667 times smaller)" in choice(
        wide, SECONDS, total=group(1.0, 1.0)
    )
    # exact labels: F comes with Î₁'s passes, so that Î₂ costs 0.5 + 1.5 + 6
    text = choice({"a": group(99.0, 0.0)}, SECONDS, total=group(1.0, 1.0), draws=None)
    assert "the diagonal takes 4 times as long by Î₂ as by Î₁." in text
    assert "'a' (at least 5 times smaller)" in text
    # nothing to compare
    assert choice({"a": GroupEstimates(numel=3, i1=estimate(1.0, 1.0))}, SECONDS) is None
    assert choice({"a": group(1.0, 9.0)}, {"forward": 1.0, "i1": 1.0}) is None
    nowhere = GroupEstimates(numel=3, i1=estimate(None, None), i2=estimate(1.0, None))
    assert choice({"a": nowhere}, SECONDS, draws=1) is None


def test_a_choice_within_its_noise_is_none():
    """10 % of noise of Î₂'s variance hides a gain of 1.1, not one of 2."""
    for labels, told in ((20.2, False), (5.0, True)):
        group = GroupEstimates(
            numel=3, i1=estimate(89.0, 1.0), i2=estimate(labels - 1.0, 1.0, noise=0.1)
        )
        text = choice({"fc": group}, SECONDS, total=group)
        assert (text is not None and "'fc'" in text) == told


def labels_line(total, **more):
    found = [x for x in report(total, **more).advice if x.startswith("Labels cause")]
    assert len(found) < 2
    return found[0] if found else None


@pytest.mark.parametrize("share", [0.2, 0.49, 0.51, 0.8, 0.985])
def test_labels_against_inputs(share):
    labels, inputs = share * 40, (1 - share) * 40
    text = labels_line(GroupEstimates(numel=9, i1=estimate(labels, inputs)))
    (percent,) = numbers(
        "Labels cause # % of the variance of Î₁ from one (input, label) pair: ", text
    )
    assert percent == pytest.approx(100 * share, abs=0.51)
    # 4 labels for each input against 4 times the inputs, of one label each: √((V_x + V_y/S)/N)
    more_labels, more_inputs = inputs + labels / 4, (inputs + labels) / 4
    assert (more_labels < 2.5 * more_inputs) == (share > 0.5)
    assert ("more inputs lower its error, more labels for each of them do little" in text) == (
        share < 0.5
    )
    assert ("more labels for each input lower its error, exact ones most" in text) == (share > 0.5)


def test_shares_are_not_rounded_to_all_or_nothing():
    for labels, inputs, told in (
        (1.0, 0.0, "all"),
        (1e5, 1.0, "over 99.9 %"),
        (994.0, 6.0, "99.4 %"),
        (3.0, 997.0, "0.3 %"),
        (1.0, 1e5, "under 0.1 %"),
        (0.0, 1.0, "none"),
    ):
        assert f"Labels cause {told} of" in labels_line(
            GroupEstimates(numel=9, i1=estimate(labels, inputs))
        )
    for labels, inputs in ((-1.0, -1.0), (0.0, 0.0), (None, 1.0), (1.0, None)):
        assert labels_line(GroupEstimates(numel=9, i1=estimate(labels, inputs))) is None


def test_what_size_biased_labels_gained():
    total = GroupEstimates(numel=9, i1=estimate(39.0, 1.0, norm=0.5, rel_error=0.4))
    text = labels_line(total, label_sampling="size_biased")
    here, drawn = numbers(
        "with the size-biased labels of this report its error is # %, with as many from the model it would be "
        "# %",
        text,
    )
    assert here == 40
    assert drawn == pytest.approx(100 * ((1 + 39 / 2) / 8) ** 0.5 / 0.5, rel=5e-3)
    for more in ({"label_sampling": "model"}, {"label_sampling": "exact", "draws": None}):
        assert "size-biased labels of this report" not in labels_line(total, **more)
    assert "and so do size-biased ones where the model is confident" in labels_line(total)
    # where they gained nothing it is not claimed: √((1 + 39/2)/8)/0.5 = 3.2
    poor = GroupEstimates(numel=9, i1=estimate(39.0, 1.0, norm=0.5, rel_error=3.2))
    assert "size-biased" not in labels_line(poor, label_sampling="size_biased")


def test_an_estimator_that_is_much_better_at_as_many_pairs():
    for second, told in ((9.0, True), (11.0, False)):  # a fourth of 40
        total = GroupEstimates(numel=9, i1=estimate(39.0, 1.0), i2=estimate(second - 1.0, 1.0))
        assert ("; Î₂ has a smaller error with as many pairs" in labels_line(total)) == told
    both = GroupEstimates(
        numel=9, i1=estimate(39.0, 1.0), i2=estimate(1.0, 1.0), ih=estimate(2.0, 1.0)
    )
    assert labels_line(both).endswith("; Î₂ and Î_H have a smaller error with as many pairs.")


def test_weights_that_make_the_bound_large():
    def layers(*norms):
        groups = {
            f"l{i}": GroupEstimates(numel=3, i1=estimate(), geometry=geometry(s))
            for i, s in enumerate(norms)
        }
        groups["none"] = GroupEstimates(
            numel=3,
            i1=estimate(),
            geometry=Geometry(jacobian_norm=1.0, jacobian_spectral_norm=1.0, reason="forked"),
        )
        return groups

    text = line(report(layers=layers(50.0, 1.5, 7.0, 0.9, 3.0, 2.0)), "The bound on the Jacobian")
    # eq. 21 of layer l multiplies the weights after it: never the first layer's own
    assert "spectral norm of each weight: 'l2' (7), 'l4' (3), 'l5' (2)." in text
    assert "(2 times the true value at 'l0')" in text
    for quiet in ((50.0,), (50.0, 0.5, 1.0), ()):
        assert not [x for x in report(layers=layers(*quiet)).advice if "Jacobian" in x]


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
    group, fine = GroupEstimates(numel=3, **groups), GroupEstimates(numel=3, i1=estimate())
    for where in ("parameters", "layers", "total"):
        more = {where: {"fc": group}} if where != "total" else {"total": group}
        found = [x for x in report(**{"total": fine, **more}).advice if "VIOLATED" in x]
        assert len(found) == shouts
        for text in found:
            name = "the model" if where == "total" else "fc"
            sign = "Î₁" if kind == "i1" else "Î₂"
            assert f"in {name} (covariance norm of {sign} {value:.3g}, bound 2):" in text
            assert "report it" in text


def test_noise_of_the_probes():
    def probed(*layers, total=None):
        groups = {f"l{i}": GroupEstimates(numel=3, i1=estimate(), i2=e) for i, e in enumerate(layers)}
        whole = GroupEstimates(numel=3, i1=estimate(1.0, 1.0), i2=total or estimate(4.0, 1.0))
        return [x for x in report(whole, groups).advice if x.startswith("Random probes")]

    def noisy(labels, error):
        return estimate(labels, 1.0, probe_error=error, label_variance_error=error)

    def lost(probes, error):
        reason = "lost in its noise (1 ± 2)"
        more = {"probe_error": probes, "label_variance_error": error}
        return unknown(reason, "label_variance", **more)

    (text,) = probed(total=noisy(4.0, 1.3))
    assert numbers("make Î₂'s label variance uncertain by # %; second_order={'probes': K}", text) == [
        32.5
    ]
    assert not probed(total=noisy(4.0, 0.9)) and not probed(total=noisy(4.0, None))
    assert not probed(total=noisy(0.0, 0.0))
    (text,) = probed(lost(1.9, 2.0), noisy(4.0, 0.1), lost(2.0, 2.0), total=noisy(4.0, 1.3))
    assert "uncertain by 32.5 % and hide that of 'l0', 'l2'; second_order" in text
    (text,) = probed(lost(1.9, 2.0), total=lost(1.9, 2.0))
    assert "Random probes hide Î₂'s label variance of the whole model, 'l0'; second_order" in text
    # the noise of inputs and labels, of labels that were not seen: more probes do not help
    assert not probed(lost(1.0, 2.0)) and not probed(lost(0.0, 2.0)) and not probed(lost(1.0, None))


def test_what_is_passed_on():
    why = "left out: the measured outputs do not depend on it"
    coverage = {f"p{i}": why for i in range(10)} | {"w": "autograd: Linear rule"}
    coverage |= {f"f{i}": "left out: frozen" for i in range(3)}
    given = report(coverage=coverage, kinks=["ReLU: 1", "ReLU: 3"], notes=["A note."])
    assert "A note." in given.advice
    assert "ReLU: 1; ReLU: 3" in line(given, "Not twice differentiable")
    text = line(given, "Left out")
    why = why.removeprefix("left out: ")
    assert f"p0 ({why}), " in text and text.endswith(f"p7 ({why}) and 2 more.") and "f0" not in text
    assert "3 parameter tensors are frozen and not measured." in given.advice


def test_a_model_without_any_gradient():
    for draws, sampling, words in (
        (2, "model", "draws='exact' also uses"),
        (2, "size_biased", "whatever the label"),
        (None, "exact", "whatever the label"),
    ):
        zero = GroupEstimates(numel=9, i1=estimate(0.0, 0.0, norm=0.0, rel_error=None))
        (text,) = report(zero, draws=draws, label_sampling=sampling).advice
        assert words in text and "zero" in text


def test_every_number_of_a_real_measure(double):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    for p in net.parameters():
        p.data *= 2
    size = 12
    x = torch.randn(size, 3)
    given = fimprobe.measure(
        net, x, likelihood="categorical", draws="exact", second_order="exact", diagonals=True
    )
    dense = [
        brute_force.Dense(net, (x,), b, lambda h: brute_force.categorical_labels(h, 1, 3))
        for b in range(size)
    ]

    def of(index):
        """‖diag F‖ without the noise of the inputs, V_x, V_y of Î₁ and V_y of Î₂, by enumeration."""
        f = torch.stack([d.fisher.diagonal()[index] for d in dense])
        g = [(d.scores @ d.jacobian)[:, index] for d in dense]
        fourth = torch.stack([d.weights @ s.pow(4) for d, s in zip(dense, g, strict=True)])
        first = float((fourth - f.square()).mean(0).sum())
        second = float(torch.stack([d.v2[index] for d in dense]).mean(0).sum())
        across = float(f.var(0).sum())
        return (float(f.mean(0).square().sum()) - across / size) ** 0.5, across, first, second

    truth = {key: of(index) for key, index in brute_force.groups(net).items()}
    norm, across, labels, _ = truth["total", ""]
    off, inputs, need = numbers(
        "is off by # % at # inputs, exact labels; an error of 10 % takes about # inputs measured in the "
        "same way.",
        given.advice[0],
    )
    assert inputs == size
    assert off == pytest.approx(100 * (across / size) ** 0.5 / norm, rel=5e-3)
    assert need == pytest.approx(max(100 * across / norm**2, size + 1), abs=0.51)
    inputs, first, second, need, _, other, _ = numbers(
        "With one label from the model for each of # inputs, Î₁ would be off by # % and Î₂ by # %. An "
        "error of 10 % takes # ± # (input, label) pairs with Î₁, # ± # with Î₂.",
        line(given, "With one label"),
    )
    assert inputs == size
    for shown, pairs, variance in ((first, need, labels), (second, other, truth["total", ""][3])):
        assert shown == pytest.approx(100 * ((across + variance) / size) ** 0.5 / norm, rel=5e-3)
        assert pairs == pytest.approx(100 * (across + variance) / norm**2, abs=0.51)
    off = {n: (truth["layers", n][1] / size) ** 0.5 / truth["layers", n][0] for n in given.layers}
    trusted = [x for x in given.advice if x.startswith("Trusted")]
    needy = [x for x in given.advice if x.startswith("More inputs")]
    for name, error_now in off.items():
        if error_now <= 0.1:
            (shown,) = numbers(f"'{name}' (# %)", trusted[0])
        else:
            inputs, shown = numbers(f"'{name}' takes # (# % now)", needy[0])
            assert inputs == pytest.approx(max(size * (error_now / 0.1) ** 2, size + 1), abs=0.51)
        assert shown == pytest.approx(100 * error_now, rel=5e-3)
    (share,) = numbers("Labels cause # % of the variance", line(given, "Labels cause"))
    assert share == pytest.approx(100 * labels / (labels + across), abs=0.51)
    parts = given.seconds_by_part
    cost = {"Î₁": parts["forward"] + parts["i1"]}
    cost["Î₂"] = cost["Î₁"] + parts["i2 diagonal"]
    text = choice_of(given)
    assert f"diagonal takes {cost['Î₂'] / cost['Î₁']:.2g} times as long by Î₂ as by Î₁" in text
    for n in given.layers:
        _, across, first, second = truth["layers", n]
        errors = {"Î₁": error(across + first, cost["Î₁"]), "Î₂": error(across + second, cost["Î₂"])}
        best, other = sorted(errors, key=errors.get)
        # two standard errors of Î₂'s variance may turn the choice: so much less is claimed
        noise = 2 * given.layers[n].i2.pairs_error
        gain = errors[other] / errors[best]
        gain *= (1 - noise) ** 0.5 if best == "Î₁" else 1 / (1 + noise) ** 0.5
        if gain >= 1.1:
            side = re.split(f"{best} (?:has the smaller error )?in ", text)[1].split(";")[0]
            assert numbers(f"'{n}' (at least # times smaller)", side) == [
                pytest.approx(gain, rel=0.05)
            ]
        else:
            assert f"'{n}' (" not in text
    assert "'4'" in line(given, "The diagonal of Î₂") and truth["layers", "4"][3] < 1e-20
    assert "'2'" not in line(given, "The diagonal of Î₂")
    text = line(given, "The bound on the Jacobian")
    svd = {n: float(torch.linalg.svdvals(net[int(n)].weight.detach())[0]) for n in ("0", "2", "4")}
    large = sorted((n for n in ("2", "4") if svd[n] > 1), key=svd.get, reverse=True)
    assert numbers(", ".join(f"{n!r} (#)" for n in large), text) == [
        pytest.approx(svd[n], rel=6e-3) for n in large
    ]
    own = brute_force.groups(net)["layers", "0"]
    tops = [float(torch.linalg.svdvals(d.jacobian[:, own])[0]) for d in dense]
    inputs = torch.cat([x, torch.ones(size, 1)], 1).norm(dim=1)
    bound = svd["2"] * svd["4"] * float(inputs.square().mean()) ** 0.5
    ratio = bound / float(torch.tensor(tops).square().mean()) ** 0.5
    assert numbers("(# times the true value at '0')", text) == [pytest.approx(ratio, rel=6e-3)]


def choice_of(given):
    (text,) = [x for x in given.advice if "At equal compute" in x]
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
    e = given.total.i1
    compared = given.total.i2 is not None and e.norm > 0
    assert ("Î₂" in said.split("Not twice")[0]) == compared
    assert ("is zero" in given.advice[0]) == (e.trace == 0)
    # size-biased labels see what is there of F in the last layer
    assert ("No gradient reaches '0'" in said) == (
        name in ("almost zero", "almost zero, exact", "layers without gradient")
    )
    assert (e.rel_error is None and e.trace != 0) == (
        given.advice[0].startswith("The error of F of the whole model")
    )
    assert not re.search(r"\b(nan|inf|None)\b", str(given))


def test_the_worst_layers_and_the_last_known_error_are_stated():
    layers = {f"l{i}": GroupEstimates(numel=3, i1=estimate(rel_error=0.2 + i / 10)) for i in range(5)}
    text = line(report(layers=layers), "More inputs")
    assert re.findall(r"'(l\d)' takes", text) == ["l4", "l3", "l2"] and text.endswith("and 2 more.")
    lost = GroupEstimates(numel=3, i1=unknown(FEW.format(2), "rel_error", "std_error", "pairs"))
    known = f"{LAST_KNOWN}step 50: 45.5 %, an error of 10 % takes 662 inputs."
    advice = report(lost, notes=["A note.", known]).advice
    assert advice[0].endswith(f"(2 of 8); take more inputs. {known}")
    assert sum(LAST_KNOWN in x for x in advice) == 1 and "A note." in advice
