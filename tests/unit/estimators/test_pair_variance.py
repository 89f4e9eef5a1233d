"""``error_of``, ``pairs_for`` and how well they are known, against simulated estimators."""

import functools
import json
import math

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe import FimprobeError
from fimprobe.engines.tracing.plan import Plan
from fimprobe.estimators.estimate import Estimate
from fimprobe.estimators.pair_variance import PairVariance, pair_variances
from fimprobe.likelihoods import Gaussian
from tests.models.cases import lively
from tests.oracles import brute_force
from tests.support.repetitions import few_or_many

KINDS = ("i1", "i2", "ih")


def variance(fourth=3.0, square=2.0, norm_square=1.0, covariance=None):
    zero = ((0.0,) * 3,) * 3
    return PairVariance(
        fourth=fourth, square=square, norm_square=norm_square, covariance=covariance or zero
    )


def estimate(**values):
    return Estimate(trace=1.0, norm=1.0, pair_variance=variance(**values))


# -- formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("labels", "want"), [(1, 1.5), (2, 1.0), (4, 0.75), (None, 0.5)])
def test_relative_variance_is_that_of_inputs_and_labels(labels, want):
    """M₄ = 5, E₂ = 3, U = 2: V_x = 1, V_y = 2."""
    value, error = variance(5.0, 3.0, 2.0).relative(labels)
    assert value == pytest.approx(want, rel=1e-12) and error == 0
    e = estimate(fourth=5.0, square=3.0, norm_square=2.0)
    for inputs in (1, 7, 1000):
        assert e.error_of(inputs=inputs, labels=labels) == pytest.approx((want / inputs) ** 0.5)
    assert e.pairs_for(0.25) == pytest.approx(1.5 / 0.0625)
    assert e.error_of(inputs=24) == pytest.approx(0.25)  # 24 pairs, one label each


@pytest.mark.parametrize("labels", [1, 2, 5, None])
def test_its_error_is_the_delta_method(labels):
    torch.manual_seed(0)
    root = torch.randn(3, 3, dtype=torch.float64) / 10
    matrix = root @ root.T
    made = variance(5.0, 3.0, 2.0, tuple(map(tuple, matrix.tolist())))
    at = torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64, requires_grad=True)
    share = 0 if labels is None else 1 / labels
    value = (share * at[0] + (1 - share) * at[1]) / at[2] - 1
    (slope,) = torch.autograd.grad(value, at)
    found = made.relative(labels)
    assert found[0] == pytest.approx(float(value.detach()), rel=1e-12)
    assert found[1] == pytest.approx(float(slope @ matrix @ slope) ** 0.5, rel=1e-12)
    e = Estimate(trace=1.0, norm=1.0, pair_variance=made)
    if labels == 1:
        assert e.pairs_error == pytest.approx(found[1] / found[0], rel=1e-12)


def test_a_record_of_inputs_has_their_means_and_covariance():
    torch.manual_seed(0)
    fourth, square, trace = torch.rand(3, 2, 9, dtype=torch.float64)
    norm = torch.tensor([0.5, 0.25], dtype=torch.float64)
    found = pair_variances(fourth, square, trace, norm)
    for row, made in enumerate(found):
        assert made.fourth == pytest.approx(float(fourth[row].mean()))
        assert made.square == pytest.approx(float(square[row].mean()))
        assert made.norm_square == float(norm[row])
        moved = 2 * norm[row] * trace[row] / trace[row].mean()
        want = torch.cov(torch.stack([fourth[row], square[row], moved])) / 9
        assert torch.allclose(torch.tensor(made.covariance).double(), want, rtol=1e-10)
    (alone,) = pair_variances(fourth[:1, :1], None, trace[:1, :1], norm[:1])
    assert alone.square is None and all(math.isnan(x) for row in alone.covariance for x in row)
    assert alone.relative(2) is None and alone.relative(None) is None
    assert alone.relative(1)[0] == pytest.approx(float(fourth[0, 0]) / 0.5 - 1)
    (dead,) = pair_variances(*[torch.zeros(1, 4)] * 3, torch.zeros(1))
    assert dead.relative() is None


@pytest.mark.parametrize("norm_square", [0.0, -0.1])
def test_without_a_norm_nothing_is_told(norm_square):
    e = estimate(norm_square=norm_square)
    assert e.pairs_for(0.1) is e.error_of(inputs=3) is e.pairs_error is None
    assert Estimate(trace=1.0, norm=1.0).pairs_for(0.1) is None


@pytest.mark.parametrize(("spread", "known"), [(0.9, True), (1.1, False)])
def test_what_is_below_twice_its_error_is_not_told(spread, known):
    """(5 − 2)/2 = 1.5 ± spread·0.75."""
    covariance = (((1.5 * spread) ** 2, 0.0, 0.0), (0.0,) * 3, (0.0,) * 3)
    e = estimate(fourth=5.0, square=3.0, norm_square=2.0, covariance=covariance)
    assert (e.pairs_for(0.1) is not None) == (e.error_of(inputs=2) is not None) == known
    if known:
        assert e.pairs_error == pytest.approx(spread / 2)
    # labels that are integrated over leave the part that is known
    assert e.error_of(inputs=8, labels=None) == pytest.approx(0.25)
    # below zero is noise, whatever the error
    assert estimate(fourth=0.5).pairs_for(0.1) is None


def test_no_variance_is_no_error():
    e = estimate(fourth=1.0, square=1.0)
    assert e.pairs_for(0.1) == 0 and e.error_of(inputs=1) == 0 and e.pairs_error == 0


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
def test_counts_and_errors_are_checked(wrong):
    e = estimate()
    with pytest.raises(FimprobeError, match="`inputs` must be a positive integer"):
        e.error_of(inputs=wrong)
    with pytest.raises(FimprobeError, match="`labels` must be a positive integer"):
        e.error_of(inputs=2, labels=wrong)
    if wrong not in (1.5, True):
        with pytest.raises(FimprobeError, match="`eps` must be a positive number"):
            e.pairs_for(wrong)
    for eps in (True, math.nan, None):
        with pytest.raises(FimprobeError, match="`eps` must be a positive number"):
            e.pairs_for(eps)


# -- reports --------------------------------------------------------------------------------------


POOL = 60


def net(bias=0.0):
    torch.manual_seed(2)
    model = lively(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3)))
    with torch.no_grad():
        model[2].bias[0] += bias
    return model, torch.randn(POOL, 2)


FAMILIES = {
    "categorical": ("categorical", lambda h: brute_force.categorical_labels(h, 1, 3)),
    "bernoulli": ("bernoulli", brute_force.bernoulli_labels),
    "gaussian": (Gaussian(0.7), lambda h: brute_force.gaussian_labels(h, 0.7)),
}


class Pool:
    """All inputs' labels with their draws of each estimator's diagonal."""

    def __init__(self, model, x, family):
        labels = FAMILIES[family][1]
        found = [brute_force.Dense(model, (x,), b, labels) for b in range(len(x))]
        self.fisher = torch.stack([t.fisher.diagonal() for t in found])  # [B, P]
        self.weights = torch.stack([t.weights for t in found])  # [B, Y]
        g = torch.stack([t.scores @ t.jacobian for t in found])
        bends = [t.scores @ t.hessian.diagonal(dim1=1, dim2=2) for t in found]
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
        roots = [torch.linalg.cholesky(t.output_fisher + 1e-15 * torch.eye(3)) for t in found]
        if family == "categorical":  # L = D^½ − p √pᵀ, which is no triangle
            p = self.weights
            roots = [torch.diag(q.sqrt()) - torch.outer(q, q.sqrt()) for q in p]
        self.draws = {  # [B, Y, P] with probabilities [B, Y]
            "i1": (g.square(), self.weights),
            "i2": (self.fisher.unsqueeze(1) - torch.stack(bends), self.weights),
            "ih": (
                torch.stack(
                    [(signs @ r.T @ t.jacobian).square() for t, r in zip(found, roots, strict=True)]
                ),
                torch.full((len(x), len(signs)), 1 / len(signs)),
            ),
        }

    def label_variance(self, kind):
        """V_y of every input and entry [B, P]."""
        values, p = self.draws[kind]
        mean = (p.unsqueeze(-1) * values).sum(1)
        return (p.unsqueeze(-1) * values.square()).sum(1) - mean.square()

    def simulate(self, kind, inputs, labels, runs):
        """‖diag F̂ − diag F‖/‖diag F‖ of many estimates, inputs drawn from the pool."""
        values, p = self.draws[kind]
        truth = self.fisher.mean(0)
        rows = torch.randint(len(self.fisher), (runs, inputs))
        if labels is None:
            means = self.fisher[rows].mean(1)
        else:
            picks = torch.multinomial(p[rows.flatten()], labels, replacement=True)
            each = values[rows.unsqueeze(2), picks.view(runs, inputs, labels)]
            means = each.mean((1, 2))  # [runs, P]
        return (means - truth).norm(dim=1) / truth.norm()


@functools.cache
def pool_of(family, bias):
    """A net, its inputs and their labels; needs float64 as the default type."""
    model, x = net(bias)
    return model, x, Pool(model, x, family)


def exact_report(model, x, family):
    """The report of exact labels and exact second derivatives."""
    return fimprobe.measure(
        model,
        x,
        likelihood=FAMILIES[family][0],
        draws="exact",
        estimators=KINDS,
        second_order="exact",
        bounds=False,
    )


@pytest.mark.parametrize("bias", [0.0, 3.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_labels_tell_the_errors_of_every_estimator(family, bias, double, raw_numbers):
    """Closed formulas; the sample variance over inputs and the norm without its bias."""
    model, x, pool = pool_of(family, bias)
    report = exact_report(model, x, family)
    told = 0
    for key, index in brute_force.groups(model).items():
        f = pool.fisher[:, index]
        inner, norm = float(f.var(0).sum()), brute_force.debiased_norm(f)
        for kind in KINDS:
            e = getattr(brute_force.group_of(report, key), kind)
            outer = float(pool.label_variance(kind)[:, index].sum(1).mean())
            assert e.input_variance == pytest.approx(inner, rel=1e-8)
            for inputs, labels in ((1, 1), (32, 1), (32, 2), (5, 10), (9, None)):
                share = 0 if labels is None else 1 / labels
                want = ((inner + share * outer) / inputs) ** 0.5 / norm
                have = e.error_of(inputs=inputs, labels=labels)
                known, error = e.pair_variance.relative(labels)
                if abs(known) < 1e-12:  # inputs that do not differ, nor do labels count
                    assert want < 1e-6 and have in (None, pytest.approx(0, abs=1e-6))
                    continue
                if known < 2 * error:  # few inputs carry the variance over inputs
                    assert have is None and (kind != "i1" or labels is None), (key, kind, labels)
                    continue
                told += 1
                if labels == 1:
                    pairs = (inner + outer) / (0.2 * norm) ** 2
                    assert e.pairs_for(0.2) == pytest.approx(pairs, rel=1e-6)
                limit = 1e-6 if kind == "ih" else 1e-7  # of Î_H's zeros digits are lost
                assert have == pytest.approx(want, rel=limit), (key, kind, inputs, labels)
            layer = key[1] if key[0] == "layers" else None
            if key[0] != "parameters":
                for labels in (1, 3, None):
                    want = e.error_of(inputs=POOL, labels=labels)
                    assert report.error_of(kind, labels=labels, layer=layer) == want
                want = e.error_of(inputs=7)
                assert report.error_of(kind, inputs=7, layer=layer) == want
                assert report.pairs_for(kind, layer=layer) == e.pairs_for(0.1)
                assert report.pairs_for(kind, 0.3, layer=layer) == e.pairs_for(0.3)
    assert told >= 90  # of 7 groups, 3 estimators, 5 numbers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("inputs", "labels"), [(4, 1), (16, 1), (16, 3), (16, None)])
def test_simulated_estimators_err_as_told(family, inputs, labels, double, raw_numbers):
    """Inputs from the pool, labels from the model, over and over."""
    model, x, pool = pool_of(family, 0.0)
    torch.manual_seed(2)  # the same inputs and labels whether or not the pool was made just now
    report = exact_report(model, x, family)
    for kind in KINDS:
        squares = pool.simulate(kind, inputs, labels, 2000).square()
        off, error = float(squares.mean()), float(squares.std()) / 2000**0.5
        told = report.error_of(kind, inputs=inputs, labels=labels) ** 2
        # the pool is its own population: its variance lacks the factor 60/59, its norm the bias
        assert abs(off - told) <= 4 * error + 0.04 * told, (kind, off, told)
        assert error < 0.1 * off


@pytest.mark.parametrize(
    ("label_sampling", "bias"),
    [
        *(("size_biased", 0.0), ("model", 3.0), ("exact", 3.0)),
        *(
            pytest.param(*pair, marks=pytest.mark.long)
            for pair in (("size_biased", 3.0), ("model", 0.0), ("exact", 0.0))
        ),
    ],
)
@pytest.mark.parametrize("runs", few_or_many(60, 120))
def test_pairs_of_random_batches_err_as_they_say(label_sampling, bias, runs, double):
    """Batches of the pool: the pairs that they tell, over the true number, and ``pairs_error``."""
    (model, x, pool), plan = pool_of("categorical", bias), Plan()
    generator = torch.Generator().manual_seed(2)
    truth = pool.fisher.mean(0)
    inner = float((pool.fisher - truth).square().sum(1).mean())
    options = {"draws": "exact"}
    if label_sampling != "exact":
        options = {"draws": 3, "label_sampling": label_sampling}
    found = {kind: [] for kind in KINDS}
    for seed in range(runs):
        rows = torch.randint(len(x), (80,), generator=generator)
        report = fimprobe.measure(
            model,
            x[rows],
            likelihood="categorical",
            estimators=KINDS,
            second_order={"probes": 8},
            bounds=False,
            seed=seed,
            plan=plan,
            **options,
        )
        for kind in KINDS:
            e = getattr(report.total, kind)
            if e.pairs_for(0.1) is not None:
                found[kind].append((e.pairs_for(0.1), e.pairs_error))
    for kind in KINDS:
        outer = float(pool.label_variance(kind).sum(1).mean())
        want = (inner + outer) / float(truth.square().sum()) / 0.01
        if len(found[kind]) < 0.9 * runs:  # known in too few batches to average over
            assert label_sampling != "exact" and kind != "i1", (kind, len(found[kind]))
            continue
        pairs, errors = torch.tensor(found[kind]).T
        assert 0.85 < float(pairs.median()) / want < 1.15, (kind, pairs.median(), want)
        covered = ((pairs - want).abs() <= 2 * errors * pairs).double().mean()
        # two standard errors of a share of these batches below 90 %
        assert covered >= 0.9 - 2 * (0.09 / len(pairs)) ** 0.5, (kind, covered)
        claimed, true = float(errors.square().mean()) ** 0.5, float((pairs / want).std())
        assert 1 / 1.6 < claimed / true < 1.6, (kind, claimed, true)


def test_one_label_for_each_input_tells_the_error_of_one(double):
    """M₄ and U are known, E₂ is not; more labels or more draws tell the rest."""
    model, x = net()
    options = {"likelihood": "categorical", "estimators": KINDS, "bounds": False}
    one = fimprobe.measure(model, x, draws=1, **options)
    exact = fimprobe.measure(model, x, draws="exact", **options)
    for kind in ("i1", "ih"):
        e = getattr(one.total, kind)
        assert e.label_variance is None and e.input_variance is None and e.total_variance > 0
        assert e.error_of(inputs=5, labels=2) is None and e.error_of(inputs=5, labels=None) is None
        want = getattr(exact.total, kind).error_of(inputs=5)
        assert e.error_of(inputs=5) == pytest.approx(want, rel=0.3)
    assert one.total.i2.label_variance > 0 and one.total.i2.error_of(inputs=5) is None


def test_reports_refuse_what_was_not_measured(double):
    model, x = net()
    report = fimprobe.measure(model, x, likelihood="categorical", estimators=("i1", "ih"))
    for act in (report.error_of, report.pairs_for):
        for name in ("i2", "empirical", "I1", ""):
            with pytest.raises(FimprobeError, match="must be one of 'i1', 'ih', got"):
                act(name)
        with pytest.raises(FimprobeError, match="`layer` must be one of '0', '2', got '3'"):
            act("i1", layer="3")
    with pytest.raises(FimprobeError, match="`inputs` must be a positive integer"):
        report.error_of("i1", inputs=0)


def test_the_record_holds_the_same(double):
    model, x = net()
    report = fimprobe.measure(model, x, likelihood="categorical", estimators=KINDS)
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    for name, group in [("total", report.total), *report.layers.items()]:
        mine = record["total"] if name == "total" else record["layers"][name]
        layer = None if name == "total" else name
        for kind in KINDS:
            e = getattr(group, kind)
            assert mine[kind]["one_label_error"] == report.error_of(kind, layer=layer)
            assert mine[kind]["pairs_for_10_percent"] == e.pairs_for(0.1)
            assert mine[kind]["pairs_error"] == e.pairs_error
            assert mine[kind]["unknown"] == e.unknown
    assert record["total"]["i1"]["one_label_error"] > 0
