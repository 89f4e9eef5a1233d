"""What cannot be believed is None, and its reason is told in the record, the table and the advice."""

import json
import math
import re

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.estimators import reliability
from fimprobe.estimators.estimate import Estimate
from fimprobe.estimators.pair_variance import PairVariance
from fimprobe.likelihoods import Gaussian
from fimprobe.report.table import format_report

KINDS = ("i1", "i2", "ih")
DERIVED = {"pairs": ("one_label_error", "pairs_for_10_percent", "pairs_error", "total_variance")}
ERRORS = ("std_error", "rel_error", "pairs")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def bare(text):
    """Without what stands in brackets."""
    return re.sub(r" \([^()]*\)", "", text)


def bare_pattern(pattern):
    """The same of a pattern of text."""
    return re.sub(r" \\\(.*?\\\)", "", pattern)


def unknown(report, where, kind, field, reason, *, table=True, advice=True):
    """A number is missing everywhere, with the reason everywhere."""
    group = report.total if where == "total" else report.layers[where]
    e = getattr(group, kind)
    assert re.search(reason, e.unknown[field]), (where, kind, field, e.unknown)
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    mine = (record["total"] if where == "total" else record["layers"][where])[kind]
    assert mine["unknown"] == e.unknown
    if field == "pairs":
        assert e.pair_variance is None
        assert e.error_of(inputs=5) is e.pairs_for(0.1) is e.pairs_error is e.total_variance is None
        layer = None if where == "total" else where
        assert report.error_of(kind, layer=layer) is report.pairs_for(kind, layer=layer) is None
    else:
        assert getattr(e, field) is None
    for name in DERIVED.get(field, (field,)):
        assert mine[name] is None, name
    scalars = report.scalars()
    for name in DERIVED.get(field, (field,)):
        assert f"fim/{kind}/{name}" not in scalars or where != "total"
    if table:
        assert re.search(bare_pattern(reason), bare(report.table("all"))), (
            reason,
            report.table("all"),
        )
        assert str(report) == format_report(record)
    if advice:
        told = bare("\n".join(report.advice))
        assert re.search(bare_pattern(reason), told), (reason, report.advice)


def measure(model, x, **options):
    options = {"likelihood": "categorical", "estimators": KINDS} | options
    return fimprobe.measure(model, x, **options)


# -- inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "says", "draws"),
    [
        *((1, "one input is", d) for d in (2, "exact")),
        *((2, "2 inputs are", d) for d in (1, 2, "exact")),
        *((4, "4 inputs are", d) for d in (1, 2, "exact")),
    ],
)
def test_few_inputs_tell_no_error(size, says, draws):
    report = measure(net(), torch.randn(size, 3), draws=draws)
    for where in ("total", "0", "2"):
        for kind in KINDS:
            for field in ERRORS:
                unknown(report, where, kind, field, f"{says}.* too few for an error; take 5 or")
            e = getattr(report.total if where == "total" else report.layers[where], kind)
            assert e.trace > 0 and e.norm is not None  # what they are, they are
    assert report.total.i2.label_variance is not None or report.total.i2.unknown["label_variance"]
    assert report.convergence == []


def test_more_inputs_may_tell_one():
    report = measure(net(), torch.ones(6, 3), draws="exact")
    for kind in KINDS:
        e = getattr(report.total, kind)
        assert e.std_error is not None and e.rel_error is not None
        assert e.effective_inputs == pytest.approx(6)


class Scaled(nn.Module):
    """An input is given its gradient by its size."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Linear(3, 2, bias=False), nn.Linear(1, 2)

    def forward(self, x):
        return self.weight(x) + self.bias(x.new_ones(len(x), 1))


@pytest.mark.parametrize("draws", [2, "exact"])
@pytest.mark.parametrize(
    ("size", "large", "told"), [(40, 3, False), (40, 4, False), (64, 8, False), (30, 8, True)]
)
def test_few_inputs_that_carry_the_trace_tell_no_error(size, large, told, draws):
    """Eight of 64 are few, as others like them are likely; eight of 30 are a share that is known."""
    x = 1e-3 * torch.ones(size, 3)
    x[:large] = 5 * torch.ones(3)
    # exact or nearly: labels of one large input would count as several
    report = measure(Scaled(), x, likelihood="bernoulli", draws=draws, bounds=False)
    assert report.layers["weight"].i1.effective_inputs == pytest.approx(large, rel=0.35)
    for kind in KINDS:
        few = report.layers["weight"]
        assert getattr(few, kind).trace > 0
        if kind == "i1" and told:
            assert few.i1.std_error is not None and "std_error" not in few.i1.unknown
        if not told:
            for field in ERRORS:
                reason = rf"too few inputs have a gradient that counts \([\d.]+ of {size}\); take more inputs"
                unknown(report, "weight", kind, field, reason)
        # each layer by itself: every input has the same gradient of the bias
        bias = getattr(report.layers["bias"], kind)
        assert bias.std_error is not None and bias.effective_inputs > 0.5 * size


def test_effective_inputs_are_those_of_the_shares():
    x = torch.tensor([[1.0], [1.0], [0.0], [0.0], [2.0], [0.0]])
    model = nn.Linear(1, 1, bias=False)
    report = measure(model, x, likelihood=Gaussian(1.0), draws="exact", estimators=("i1",))
    e = report.total.i1  # F(x) = x²: 1, 1, 4
    assert e.effective_inputs == pytest.approx(36 / 18)
    unknown(
        report, "total", "i1", "std_error", r"too few inputs have a gradient that counts \(2 of 6\)"
    )


# -- labels ---------------------------------------------------------------------------------------


def sure(confidence):
    model = net()
    with torch.no_grad():
        model[2].weight *= 0.1
        model[2].bias[1] += confidence
    return model


@pytest.mark.parametrize("bounds", [True, False])
def test_labels_that_were_not_drawn_tell_nothing(bounds):
    model, x = sure(9.0), torch.randn(24, 3)
    report = measure(model, x, label_sampling="model", bounds=bounds, diagonals=True)
    assert report.label_sampling == "model" and report.seen_mass < 0.01
    reason = (
        r"the drawn labels carry [\d.e-]+ % of the expected score; pass label_sampling='size_biased'"
    )
    everything = ("trace", "norm", "label_variance", "input_variance", "total_variance")
    everything += ("total_label_variance", "effective_inputs")
    for where in ("total", "0", "2"):
        for field in (*everything, *ERRORS):
            unknown(report, where, "i1", field, reason)
        # of Î₂ and Î_H F comes from vectors that always see it, but R from these labels
        for field in ("trace", "label_variance", "total_label_variance", *ERRORS):
            unknown(report, where, "i2", field, reason)
        e = (report.total if where == "total" else report.layers[where]).ih
        assert e.trace > 0 and e.std_error > 0 and not {"trace", *ERRORS} & set(e.unknown)
    for group in (*report.parameters.values(), report.total):
        for field in ("diagonal", "diagonal_label_variance", "diagonal_input_variance"):
            assert getattr(group.i1, field) is None and re.search(reason, group.i1.unknown[field])
            assert getattr(group.ih, field) is not None
    assert report.convergence == [] == report.sizes
    if bounds:
        for field in ("trace", "label_variance", "total_label_variance"):
            assert getattr(report.layers["2"].activation, field) is None
            assert re.search(reason, report.layers["2"].activation.unknown[field])
    for options in ({}, {"draws": "exact"}):
        other = measure(model, x, bounds=bounds, **options)
        assert other.seen_mass is None and other.total.i1.std_error > 0
        assert abs(other.total.ih.trace - report.total.ih.trace) < 0.5 * report.total.ih.trace


def test_labels_that_were_drawn_by_luck_tell_nothing():
    """A single rare label among few carries many times the expected score."""
    model, x, found = sure(6.0), torch.randn(8, 3), []
    for seed in range(60):
        report = measure(model, x, label_sampling="model", seed=seed, estimators=("i1",))
        if report.seen_mass > 2:
            found.append(report)
            reason = r"the drawn labels carry [\d.]+ times the expected score"
            for field in ("trace", "norm", *ERRORS):
                unknown(report, "total", "i1", field, reason)
        elif report.seen_mass >= 0.5:
            assert report.total.i1.trace is not None
        else:
            assert report.total.i1.trace is None
    assert len(found) >= 2


def test_the_share_of_the_score_is_that_of_the_labels():
    """Of one uncertain binary label: (1 − p)² or p² over p(1 − p)."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(math.log(3.0))
    options = {"likelihood": "bernoulli", "label_sampling": "model", "estimators": ("i1",)}
    for seed in range(20):
        report = measure(model, torch.ones(6, 1), draws=1, seed=seed, **options)
        shares = [(k / 6) * (1 / 3) + (1 - k / 6) * 3 for k in range(7)]
        assert min(abs(report.seen_mass - s) for s in shares) < 1e-5
        assert (report.total.i1.trace is None) == (not 0.5 <= report.seen_mass <= 2)
    for family in (Gaussian(1.0), "poisson"):
        report = measure(model, torch.ones(6, 1), **options | {"likelihood": family})
        assert (report.seen_mass is None) == (family != "poisson")  # Gaussians have no rare labels


@pytest.mark.parametrize(
    ("seen", "told"),
    [(None, ""), (0.5, ""), (1.0, ""), (2.0, ""), (0.49, "49 % of"), (2.01, "2 times"),
     (0.0, "0 % of"), (1e-5, "0.001 % of"), (37.2, "37 times")],
)  # fmt: skip
def test_between_half_and_twice_the_score_was_seen(seen, told):
    reason = reliability.seen_mass_reason(seen)
    assert bool(reason) == bool(told) and told in reason


# -- estimates that contradict each other ------------------------------------------------------------


def test_traces_that_are_far_apart_have_no_errors(monkeypatch):
    model, x = net(), torch.randn(32, 3)
    before = measure(model, x)
    assert before.total.i1.std_error > 0 and before.total.i2.std_error > 0
    monkeypatch.setattr(reliability, "MAX_JOINT_ERRORS", 0.0)
    report = measure(model, x)
    reason = r"the traces of Î₁ and Î₂ estimate the same F and differ by [\d.]+ joint standard errors"
    for where in ("total", "0"):
        for kind in ("i1", "i2"):
            for field in ERRORS:
                unknown(report, where, kind, field, reason)
            group, old = (r.total if where == "total" else r.layers[where] for r in (report, before))
            assert getattr(group, kind).trace == getattr(old, kind).trace
    assert report.total.ih.std_error > 0  # takes no part in it


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ((1.0, 0.1), (1.5, 0.05), True),
        ((1.0, 0.1), (1.44, 0.05), False),
        ((1.0, 0.1), (0.5, 0.05), True),
        ((1.0, 0.0), (1.0 + 1e-7, 0.0), False),
        ((1.0, 0.0), (2.0, 1e-3), True),
        ((1.0, None), (2.0, 1e-3), False),
        ((None, 0.1), (2.0, 1e-3), False),
    ],
)
def test_four_joint_standard_errors_are_the_limit(one, other, apart):
    a, b = (Estimate(trace=t, norm=1.0, std_error=s) for t, s in (one, other))
    reason = reliability.disagreement_reason(a, b)
    assert bool(reason) == apart == bool(reliability.disagreement_reason(b, a))
    assert reliability.disagreement_reason(a, None) == ""


# -- noise ------------------------------------------------------------------------------------------


def test_label_variance_that_is_noise_of_probes():
    """Two probes of Î₂ for weights that are used at 64 places; many probes tell it."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(512, 3),
    )  # fmt: skip
    x = torch.randn(8, 1, 8, 8)
    report = measure(model, x, second_order={"probes": 2})
    for where in ("0", "2", "total"):
        unknown(report, where, "i2", "label_variance", r"lost in its noise \(.* ± .*\)", advice=False)
    (line,) = [line for line in report.advice if "probes" in line]
    assert all(where in line for where in ("the whole model", "'0'", "'2'", "a larger K"))
    # the rule, for all that has an error of its own
    for group in (*report.parameters.values(), *report.layers.values(), report.total):
        for e in (group.i1, group.i2, group.ih):
            for name in ("label_variance", "total_label_variance"):
                value, error = getattr(e, name), getattr(e, f"{name}_error")
                assert value is not None or name in e.unknown
                assert value is None or error is None or value >= 2 * error
    many = measure(model, x, second_order={"probes": 16})
    assert many.layers["2"].i2.label_variance > 0 and many.total.i2.label_variance > 0


def test_input_variance_that_is_noise_of_labels():
    """All inputs are alike: what F̂ varies by over them is the labels' noise."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
    x = torch.randn(1, 3).repeat(20, 1)
    report = measure(model, x, seed=1)
    for kind in KINDS:
        unknown(
            report,
            "total",
            kind,
            "input_variance",
            r"lost in its noise",
            advice=False,
            table=kind == "i1",
        )
    assert report.total.i1.pairs_for(0.1) > 0  # its labels vary more


def test_a_pair_variance_that_is_noise():
    """ReLU networks have Î₂ without label variance: of like inputs nothing is left."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    x = torch.randn(1, 3).repeat(20, 1)
    report = measure(model, x, seed=1)
    reason = r"the variance of a pair is lost in its noise"
    unknown(report, "total", "i2", "pairs", reason)
    assert report.total.i2.label_variance == 0


def sample(**values):
    """An estimate in which nothing is wrong."""
    zero = ((0.0,) * 3,) * 3
    pair = PairVariance(fourth=4.0, square=2.0, norm_square=1.0, covariance=zero)
    made = {
        "trace": 3.0, "norm": 1.0, "label_variance": 2.0, "label_variance_error": 0.2,
        "input_variance": 1.0, "total_variance": 3.0, "std_error": 0.1, "rel_error": 0.1,
        "effective_inputs": 20.0, "total_label_variance": 6.0, "total_label_variance_error": 0.3,
        "bound": 30.0, "bound_error": 1.0, "sharp_bound": 20.0, "trace_bound": 25.0,
        "diagonal_bound": 8.0, "pair_variance": pair,
    }  # fmt: skip
    return Estimate(**made | values)


def pair(**values):
    return sample(pair_variance=PairVariance(**{
        "fourth": 4.0, "square": 2.0, "norm_square": 1.0, "covariance": ((0.0,) * 3,) * 3, **values
    }))  # fmt: skip


def covariance(a, b, c):
    return ((a**2, 0.0, 0.0), (0.0, b**2, 0.0), (0.0, 0.0, c**2))


NOISE = {
    "label variance": (sample(label_variance_error=1.1), {"label_variance"}),
    "negative label variance": (sample(label_variance=-0.1), {"label_variance"}),
    "exact and negative": (
        sample(label_variance=-0.1, label_variance_error=None), {"label_variance"},
    ),
    "matrix": (sample(total_label_variance_error=3.1), {"total_label_variance"}),
    "bound": (sample(bound_error=16.0), {"bound", "sharp_bound", "trace_bound"}),
    "negative bound": (sample(bound=-1.0), {"bound", "sharp_bound", "trace_bound"}),
    "negative sharp bound": (sample(sharp_bound=-1.0), {"sharp_bound"}),
    "trace bound below L by noise": (
        sample(trace_bound=5.5), {"bound", "sharp_bound", "trace_bound"},
    ),
    "diagonal bound below V by noise": (sample(diagonal_bound=1.9), {"diagonal_bound"}),
    "norm": (sample(norm=0.0), {"norm", "rel_error", "pairs"}),
    "input variance": (pair(covariance=covariance(0.0, 0.6, 0.0)), {"input_variance"}),
    "input variance below zero": (pair(square=0.9), {"input_variance"}),
    "pairs": (pair(covariance=covariance(1.6, 0.0, 0.0)), {"pairs"}),
    "all of F": (pair(norm_square=-0.1), {"pairs", "input_variance"}),
    "negative covariance": (sample(covariance_norm=-1.0), {"covariance_norm"}),
}  # fmt: skip


@pytest.mark.parametrize("name", NOISE)
def test_what_is_noise_is_withheld_and_nothing_else(name):
    estimate, gone = NOISE[name]
    gone = gone | ({"total_variance"} if "pairs" in gone else set())  # the same number, unscaled
    have = reliability.withhold(estimate, batch_size=32)
    assert set(have.unknown) == gone
    assert all("noise" in reason for reason in have.unknown.values())
    lost = {"pair_variance" if n == "pairs" else n for n in gone}
    lost |= {"total_variance"} if "pairs" in gone else set()
    for field in estimate.__dataclass_fields__:
        if field in lost:
            assert getattr(have, field) is None, field
        elif field not in ("unknown", "std_error"):
            assert getattr(have, field) == getattr(estimate, field), field


def test_what_can_be_believed_stays():
    estimate = sample()
    have = reliability.withhold(estimate, batch_size=32)
    assert have == estimate and have.unknown == {}
    # of labels that were integrated over the inputs' part has no noise
    sure = pair(covariance=covariance(0.0, 0.6, 0.0))
    assert reliability.withhold(sure, batch_size=32, exact_labels=True) == sure
    # a bound above which its value lies by more than noise is an error of ours, to be seen
    wrong = sample(trace_bound=1.0)
    assert reliability.withhold(wrong, batch_size=32).trace_bound == 1.0
    exact = sample(diagonal_bound=1.9, bound_error=None)
    assert reliability.withhold(exact, batch_size=32).diagonal_bound == 1.9


def test_the_first_reason_is_told():
    """Labels before estimates that contradict each other, these before few inputs, then noise."""
    estimate = sample(effective_inputs=2.0, label_variance_error=5.0)
    few = reliability.withhold(estimate, batch_size=32)
    assert few.unknown["std_error"].startswith("too few") and "noise" in few.unknown["label_variance"]
    apart = reliability.withhold(estimate, batch_size=32, disagreement="apart")
    assert apart.unknown["std_error"] == apart.unknown["pairs"] == "apart"
    unseen = reliability.withhold(
        estimate, batch_size=32, disagreement="apart", labels_unseen="unseen"
    )
    assert set(unseen.unknown.values()) == {"unseen"}
    second = reliability.withhold(estimate, batch_size=32, labels_unseen="unseen", only_labels=True)
    assert second.trace == 3.0 and second.norm == 1.0 and second.label_variance is None


@pytest.mark.parametrize("batch", [5, 32, 1000])
@pytest.mark.parametrize("skewness", [0.0, 1.0, -1.0, 3.0])
def test_skewed_inputs_widen_the_standard_error(skewness, batch):
    have = reliability.withhold(sample(skewness=skewness), batch_size=batch)
    assert have.std_error == pytest.approx(0.1 * (1 + (7 / 6 * skewness**2 + 7 / 4) / batch))
    assert have.rel_error == 0.1


def test_a_report_has_its_standard_error_widened(raw_numbers, monkeypatch):
    model, x = net(), torch.randn(20, 3)
    raw = measure(model, x).total.i1.std_error
    monkeypatch.undo()
    have = measure(model, x).total.i1
    assert have.std_error == pytest.approx(raw * reliability.widening(have.skewness, 20), rel=1e-6)
    trace = torch.stack([measure(model, x[b : b + 1], draws="exact").total.i1.trace * torch.ones(())
                         for b in range(20)])  # fmt: skip
    exact = measure(model, x, draws="exact").total.i1
    centred = trace - trace.mean()
    want = float(centred.pow(3).mean() / centred.square().mean() ** 1.5)
    assert exact.skewness == pytest.approx(want, rel=1e-3)


# -- no gradient ----------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 2, "exact"])
def test_a_layer_without_a_gradient_has_a_trace_of_zero_and_no_error(draws):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].bias -= 100
    report = measure(model, torch.randn(16, 3), draws=draws)
    for kind in KINDS:
        e = getattr(report.layers["0"], kind)
        assert e.trace == 0 and e.norm == 0 and e.effective_inputs == 0
        for field in ERRORS:
            reason = "no gradient reaches it at these inputs"
            unknown(report, "0", kind, field, reason, advice=False)
        assert getattr(report.layers["2"], kind).trace > 0
    assert any(line.startswith("No gradient reaches '0'") for line in report.advice)


@pytest.mark.parametrize("draws", [2, "exact"])
def test_a_mask_of_nothing_leaves_zeros(draws):
    report = measure(net(), torch.randn(8, 3), likelihood="bernoulli", draws=draws,
                     mask=torch.zeros(8, 3, dtype=torch.bool))  # fmt: skip
    for kind in KINDS:
        e = getattr(report.total, kind)
        assert e.trace == 0
        for field in ERRORS:
            unknown(report, "total", kind, field, "no gradient reaches it", advice=False)
    assert report.advice[0].startswith("Î₁ of the whole model is zero")


# -- whatever is measured ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "draws"),
    [(n, d) for n in (1, 2, 5, 24) for d in (1, 2, "exact") if n > 1 or d != 1],
)
@pytest.mark.parametrize("confidence", [0.0, 12.0, 60.0])
def test_every_record_is_json_and_every_gap_has_a_reason(size, confidence, draws):
    labels = torch.arange(size) % 3
    for sampling in ("size_biased", "model"):
        report = measure(
            sure(confidence),
            torch.randn(size, 3),
            draws=draws,
            label_sampling=sampling,
            estimators=(*KINDS, "empirical"),
            labels=labels,
        )
        record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert str(report) == format_report(report.to_dict()) and report.advice
        assert all(math.isfinite(v) for v in report.scalars().values())
        for group in (record["total"], *record["layers"].values(), *record["parameters"].values()):
            for kind in (*KINDS, "empirical"):
                e = group[kind]
                for name in ("trace", "norm", "std_error", "rel_error"):
                    assert e[name] is not None or e["unknown"][name], (kind, name)
                gone = e["pairs_for_10_percent"] is None
                if not (kind == "i2" and draws == 1):  # of one label: told by the table
                    assert not gone or e["unknown"]["pairs"], kind
                if draws != 1 and kind != "empirical":
                    for name in ("label_variance", "total_label_variance"):
                        assert e[name] is not None or e["unknown"][name], (kind, name)
                for name, reason in e["unknown"].items():
                    told = name == "pairs" or name.startswith("diagonal") or e[name] is None
                    assert reason and told, (kind, name)


@pytest.mark.parametrize("sigma", [0.5, 1.5])
def test_squares_that_few_inputs_carry_have_no_variance(sigma):
    """Exact labels at the same inputs are the truth; sizes of inputs are log-normal."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 50))
    x = torch.randn(512, 30) * torch.exp(sigma * torch.randn(512, 1))
    options = {"likelihood": "categorical", "estimators": ["i1"], "bounds": False}
    exact = fimprobe.measure(net, x, draws="exact", **options).layers["0"].i1
    for seed in range(3):
        e = fimprobe.measure(net, x, draws=2, seed=seed, **options).layers["0"].i1
        if sigma == 1.5:  # here errors were up to 27 standard errors
            assert "too few inputs carry it" in e.unknown["label_variance"]
        else:
            error = e.label_variance - exact.label_variance
            assert abs(error) < 4 * e.label_variance_error
