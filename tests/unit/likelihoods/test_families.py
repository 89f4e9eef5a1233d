"""The families against enumerated labels in 60-digit decimals, and what they draw."""

import itertools
import math
from decimal import Decimal, getcontext

import pytest
import torch

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods import Bernoulli, Categorical, Gaussian, Poisson, get_likelihood, sample

getcontext().prec = 60
FAMILIES = {
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(sigma=0.7),
    "poisson": Poisson(),
}


def softmax(logits):
    """Probabilities as decimals."""
    raw = [Decimal(x).exp() for x in logits]
    return [x / sum(raw) for x in raw]


def dense(p, scores):
    """I, ‖I‖, tr M and ‖M‖ of scores with probabilities p, from the 4-index tensor."""
    n = range(len(scores[0]))
    table = list(zip(p, scores, strict=True))
    fisher = [[sum(w * d[i] * d[j] for w, d in table) for j in n] for i in n]
    square = trace = Decimal(0)
    for i, j, k, l in itertools.product(n, repeat=4):
        entry = sum(w * d[i] * d[j] * d[k] * d[l] for w, d in table) - fisher[i][j] * fisher[k][l]
        square += entry**2
        if i == k and j == l:
            trace += entry
    norm = sum(x**2 for row in fisher for x in row).sqrt()
    return fisher, norm, trace, square.sqrt()


def categorical_oracle(logits):
    p = softmax(logits)
    scores = [[(i == y) - q for i, q in enumerate(p)] for y in range(len(p))]
    return dense(p, scores)


def support(name, h):
    """Labels, probabilities and scores of one component, enumerated (Gauss-Hermite: exact)."""
    h = Decimal(h)
    if name == "bernoulli":
        p = 1 / (1 + (-h).exp())
        return [(1 - p, -p), (p, 1 - p)]
    if name == "gaussian":
        # nodes 0, ±√3 have the moments 1, 0, 1, 0, 3 of the standard normal
        root, sigma = Decimal(3).sqrt(), Decimal(0.7)
        return [(Decimal(w) / 6, z * root / sigma) for w, z in ((4, 0), (1, 1), (1, -1))]
    rate, weight, out = h.exp(), (-h.exp()).exp(), []
    for y in range(80):
        out.append((weight, y - rate))
        weight = weight * rate / (y + 1)
    return out


def close(have, want, rtol=1e-9):
    """Equal within ``rtol`` of the largest entry."""
    have = torch.as_tensor(have).double().flatten()
    want = torch.tensor([float(x) for x in want], dtype=torch.float64)
    assert have.shape == want.shape and bool(torch.isfinite(have).all())
    assert (have - want).abs().max() <= rtol * want.abs().max(), (have, want)


def logits_of(classes):
    """Random, skewed and near one-hot logits, 1 − p_max down to 1e-12."""
    out = [torch.randn(classes) * s for s in (0.3, 1, 3)]
    for e in (1e-2, 1e-4, 1e-8, 1e-12):
        x = torch.randn(classes)
        x[1] = math.log((1 - e) / e) + torch.cat([x[:1], x[2:]]).logsumexp(0)
        out.append(x)
    return torch.stack(out)


@pytest.mark.parametrize("classes", range(2, 7))
def test_categorical_norms_equal_the_dense_tensor(classes, double):
    h = logits_of(classes)
    want = [categorical_oracle(row.tolist()) for row in h]
    family = Categorical()
    for b, (fisher, norm, trace, fourth) in enumerate(want):
        row = h[b : b + 1]
        diagonal = [fisher[i][i] for i in range(classes)]
        have = family.output_fisher(row)[0]
        close(have, [x for r in fisher for x in r])
        for i in range(classes):  # each entry to its own precision
            assert float(have[i, i]) == pytest.approx(float(diagonal[i]), rel=1e-9, abs=0)
        close(family.fisher_norm(row), [norm])
        close(family.fourth_moment_trace(row), [trace], 1e-6)
        close(family.fourth_moment_norm(row), [fourth], 1e-6)


@pytest.mark.parametrize("classes", [3, 4, 6, 100, 10000])
def test_uniform_categorical(classes, double):
    have = float(Categorical().fourth_moment_norm(torch.zeros(1, classes)) ** 2)
    assert have == pytest.approx((classes - 1) * (classes - 2) ** 2 / classes**4, rel=1e-9, abs=0)


def test_two_equal_classes_have_constant_squares(double):
    assert float(Categorical().fourth_moment_norm(torch.zeros(1, 2))) < 1e-7
    assert abs(float(Categorical().fourth_moment_trace(torch.zeros(1, 2)))) < 1e-15


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_categorical_score_near_one_hot(classes, double):
    h = logits_of(classes)
    for y in range(classes):
        score = Categorical().score(h, torch.full((len(h),), y))
        for row, have in zip(h.tolist(), score.tolist(), strict=True):
            p = softmax(row)
            for k in range(classes):
                want = (1 - p[k]) if k == y else -p[k]
                assert have[k] == pytest.approx(float(want), rel=1e-9, abs=0)


@pytest.mark.parametrize("size", range(1, 4))
@pytest.mark.parametrize("name", FAMILIES)
def test_independent_norms_equal_the_dense_tensor(name, size, double):
    family = FAMILIES[name]
    h = torch.randn(3, size)
    for b, row in enumerate(h.tolist()):
        one = [support(name, x) for x in row]
        moment = [[sum(w * (d**k if k else 1) for w, d in s) for k in range(5)] for s in one]
        n = range(size)

        def expect(*index, m=moment):
            return math.prod(m[a][index.count(a)] for a in range(len(m)))

        fisher = [[expect(i, j) for j in n] for i in n]
        tensor = {
            (i, j, k, l): expect(i, j, k, l) - fisher[i][j] * fisher[k][l]
            for i, j, k, l in itertools.product(n, repeat=4)
        }
        mine = h[b : b + 1]
        close(family.output_fisher(mine), [x for r in fisher for x in r])
        close(family.fisher_norm(mine), [sum(x**2 for r in fisher for x in r).sqrt()])
        close(family.fourth_moment_trace(mine), [sum(tensor[i, j, i, j] for i in n for j in n)])
        close(family.fourth_moment_norm(mine), [sum(x**2 for x in tensor.values()).sqrt()], 1e-8)


@pytest.mark.parametrize("name", FAMILIES)
def test_independent_scores_are_derivatives_of_the_log_density(name, double):
    h = torch.randn(5, 2, requires_grad=True)
    y = torch.tensor([[0.0, 1.0]]).expand(5, 2)
    density = {
        "bernoulli": lambda: y * h - torch.log(1 + torch.exp(h)),
        "gaussian": lambda: -((y - h) ** 2) / (2 * 0.7**2),
        "poisson": lambda: y * h - torch.exp(h),
    }[name]
    (want,) = torch.autograd.grad(density().sum(), h)
    close(FAMILIES[name].score(h.detach(), y), want.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [Categorical(), *FAMILIES.values()], ids=lambda f: f.name)
def test_low_precision_logits_agree_with_float64(family, dtype):
    h = torch.cat([torch.randn(6, 5), 4 * torch.randn(6, 5)]).to(dtype)
    y = sample(family, h, torch.Generator().manual_seed(1))
    calls = ["output_fisher", "fisher_norm", "fourth_moment_trace", "fourth_moment_norm"]
    pairs = [(getattr(family, f)(h), getattr(family, f)(h.double())) for f in calls]
    pairs.append((family.score(h, y), family.score(h.double(), y)))
    for (have, want), rtol in zip(pairs, (1e-5, 1e-5, 1e-4, 1e-3, 1e-5), strict=True):
        assert have.dtype == torch.float32
        for a, b in zip(have, want, strict=True):
            close(a, b.flatten().tolist(), rtol)


@pytest.mark.parametrize("gap", [15.0, 25.0, 80.0])
def test_float32_near_one_hot(gap):
    h = torch.tensor([[0.0, gap, 1.0]])
    for call, rtol in (
        ("fisher_norm", 1e-5),
        ("fourth_moment_trace", 1e-5),
        ("fourth_moment_norm", 1e-3),
    ):
        want = float(getattr(Categorical(), call)(h.double()))
        assert want > 0
        assert float(getattr(Categorical(), call)(h)) == pytest.approx(want, rel=rtol, abs=0)


def test_classes_in_another_dimension(double):
    h = torch.randn(2, 4, 3, 2)
    here, there = Categorical(class_dim=1), Categorical(class_dim=3)
    moved = h.movedim(1, -1)
    y = torch.randint(4, (2, 3, 2))
    assert torch.equal(here.score(h, y).movedim(1, -1), there.score(moved, y))
    assert here.label_shape(h) == (2, 3, 2)
    assert here.count_passes(h) == 24
    u = torch.rand(2, 3, 2)
    assert torch.equal(here.quantile(h, u), there.quantile(moved, u))
    norms = here.fourth_moment_norm(h)
    assert norms.shape == (2, 3, 2)
    close(norms[1, 2, 0], [categorical_oracle(h[1, :, 2, 0].tolist())[3]], 1e-8)


def within(values, mean, errors=4.0):
    """The sample mean along dimension 0 within 4 standard errors of ``mean``."""
    error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - mean).abs() <= errors * error).all()


N = 40000


def test_categorical_frequencies():
    h = torch.tensor([[0.3, -1.0, 1.2, 0.0]])
    y = sample(Categorical(), h.expand(N, 4), torch.Generator().manual_seed(0))
    within(
        torch.nn.functional.one_hot(y, 4).double(),
        torch.tensor([float(p) for p in softmax(h[0].tolist())]),
    )


def test_bernoulli_frequencies():
    h = torch.tensor([-2.0, 0.0, 1.5])
    y = sample(Bernoulli(), h.expand(N, 3), torch.Generator().manual_seed(0)).double()
    within(y[:, :2], torch.tensor([1 / (1 + math.exp(2)), 0.5]))
    within(y[:, 2:], torch.tensor([1 / (1 + math.exp(-1.5))]))
    assert set(y.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("rate", [0.2, 3.0, 40.0])
def test_poisson_frequencies(rate, double):
    h = torch.tensor([math.log(rate)])
    y = sample(Poisson(), h.expand(N, 1), torch.Generator().manual_seed(0))[:, 0]
    pmf = [math.exp(k * math.log(rate) - rate - math.lgamma(k + 1)) for k in range(80)]
    common = [k for k in range(80) if pmf[k] > 1e-3]
    within((y[:, None] == torch.tensor(common)).double(), torch.tensor([pmf[k] for k in common]))


def test_gaussian_moments(double):
    h, sigma = 1.3, 0.7
    y = sample(Gaussian(sigma), torch.full((N, 1), h), torch.Generator().manual_seed(0)) - h
    within(y, 0.0)
    within(y**2, sigma**2)
    within(y**4, 3 * sigma**4)


@pytest.mark.parametrize("family", [Categorical(), *FAMILIES.values()], ids=lambda f: f.name)
def test_samples_come_from_their_generator_alone(family):
    h = torch.randn(20, 3)
    before = torch.get_rng_state()
    first, again, other = (sample(family, h, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("rate", [1e-3, 0.5, 7.0, 100.0])
def test_poisson_quantile_is_the_smallest_sufficient_count(rate, double):
    u = torch.cat([torch.linspace(1e-6, 1 - 1e-9, 500), torch.tensor([2.0**-54])]).sort()[0]
    y = Poisson().quantile(torch.full_like(u, math.log(rate)), u)
    cdf, term = [], (-Decimal(rate)).exp()
    for k in range(300):
        cdf.append(term + (cdf[-1] if cdf else 0))
        term = term * Decimal(rate) / (k + 1)
    want = [next(k for k, c in enumerate(cdf) if c >= Decimal(x)) for x in u.tolist()]
    assert y.tolist() == want
    assert bool((y.diff() >= 0).all())


def test_messages_name_the_remedy():
    cases = [
        (torch.zeros(3, 1), "at least 2 classes.*likelihood='bernoulli'"),
        (torch.zeros(2, 3, 4, 4), r"class_dim must be given.*class_dim=1\).*class_dim=3"),
        (torch.zeros(3), r"must be logits \[B, ..., C\].*\(3,\)"),
    ]
    for outputs, message in cases:
        with pytest.raises(FimprobeError, match=message):
            Categorical().check_outputs(outputs)
    with pytest.raises(FimprobeError, match=r"must be logits.*class_dim=2"):
        Categorical(class_dim=2).check_outputs(torch.zeros(3, 4))
    with pytest.raises(
        FimprobeError, match=r"batch dimension, \[B, ...\], for likelihood='gaussian'"
    ):
        Gaussian().check_outputs(torch.zeros(()))
    with pytest.raises(
        FimprobeError, match="sigma must be a positive and finite standard deviation, got 0"
    ):
        Gaussian(sigma=0)
    with pytest.raises(FimprobeError, match="likelihood must be one of .*, got 'weibull'"):
        get_likelihood("weibull")
    with pytest.raises(
        FimprobeError, match="likelihood must be one of .* or an instance with the methods"
    ):
        get_likelihood(Poisson)
