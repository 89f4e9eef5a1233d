"""Size-biased draws against enumerated labels in 50-digit numbers.

The sampler is a step function of its uniforms: every step is found by bisection over the doubles,
the cells between them are drawn once each, and their volumes are the probabilities of what was
drawn. Nothing of the oracle (p, δ, τ, q) comes from the package.
"""

import math
from dataclasses import dataclass
from typing import Any

import mpmath
import pytest
import torch

from fimprobe.likelihoods import Bernoulli, Categorical, Gaussian, Independent, Poisson
from fimprobe.likelihoods.independent import REMAINDER
from fimprobe.likelihoods.size_biased import (
    draw_size_biased,
    expected_squares,
    has_size_biased_draws,
)
from fimprobe.types import Draws

F64 = torch.float64
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
UNSURE = (0.5, 1e-3, 1e-6, 1e-12)
LAST = 1 - 2.0**-53  # the largest uniform that is drawn
mp = mpmath.mp.clone()
mp.dps = 50


class Binomial(Independent):
    """An own family: y successes of n, whose probabilities are all there."""

    name = "binomial"
    n = 4

    def _p(self, h):
        return torch.sigmoid(h.double()), torch.sigmoid(-h.double())

    def probabilities(self, outputs):
        p, q = (x.unsqueeze(-1) for x in self._p(outputs))
        ways = torch.tensor([math.comb(self.n, y) for y in range(self.n + 1)], dtype=F64)
        y = torch.arange(self.n + 1.0, dtype=F64)
        return ways * p**y * q ** (self.n - y)

    def quantile(self, outputs, uniforms):
        cdf = self.probabilities(outputs).cumsum(-1)
        return (cdf[..., :-1] < uniforms.unsqueeze(-1)).sum(-1).double()

    def score(self, outputs, labels):
        p, q = self._p(outputs)
        return labels * q - (self.n - labels) * p

    def variance(self, outputs):
        p, q = self._p(outputs)
        return self.n * p * q

    def fourth_moment(self, outputs):
        p, q = self._p(outputs)
        return self.n * p * q * (1 + (3 * self.n - 6) * p * q)


class Cut(Poisson):
    """An own family of counts that knows the probabilities of the first few only."""

    def __init__(self, count):
        super().__init__("cut")
        object.__setattr__(self, "count", count)

    size_biased_quantile = Independent.size_biased_quantile

    def probabilities(self, outputs):
        if self.count is None:
            return None
        y = torch.arange(float(self.count), dtype=F64)
        h = outputs.double().unsqueeze(-1)
        return torch.exp(y * h - h.exp() - torch.lgamma(y + 1))


@dataclass
class Setting:
    """Outputs of one input, and each position's labels by the book: p [K], δ [K, C]."""

    family: Any
    outputs: torch.Tensor  # [1, ...]
    tables: list[tuple[torch.Tensor, torch.Tensor]]
    mask: torch.Tensor | None = None  # [1, ...]

    @property
    def kept(self):
        flags = [True] * len(self.tables) if self.mask is None else self.mask.flatten().tolist()
        return [t for t, keep in enumerate(flags) if keep]

    def split(self, scores):
        """[N, ...] as [N, T, C]: the outputs of each position."""
        axis = getattr(self.family, "class_dim", None)
        if axis is None:
            return scores.reshape(len(scores), -1, 1)
        return scores.movedim(axis, -1).reshape(len(scores), -1, scores.shape[axis])

    def labels_of(self, deltas):
        """Which label of its table each δ [N, T, C] is."""
        found = [
            torch.cdist(deltas[:, t].contiguous(), d).argmin(1)
            for t, (_, d) in enumerate(self.tables)
        ]
        return torch.stack(found, 1)


def numbers(values):
    return torch.tensor([float(x) for x in values], dtype=F64)


def softmax_table(logits):
    raw = [mp.exp(mp.mpf(x)) for x in logits]
    p = [x / mp.fsum(raw) for x in raw]
    n = range(len(p))
    delta = [[mp.fsum(p[z] for z in n if z != y) if k == y else -p[k] for k in n] for y in n]
    return numbers(p), torch.stack([numbers(row) for row in delta])


def bernoulli_table(h):
    p, q = 1 / (1 + mp.exp(-mp.mpf(h))), 1 / (1 + mp.exp(mp.mpf(h)))
    return numbers([q, p]), numbers([-p, q]).unsqueeze(1)


def binomial_table(h, n=Binomial.n):
    p, q = 1 / (1 + mp.exp(-mp.mpf(h))), 1 / (1 + mp.exp(mp.mpf(h)))
    y = range(n + 1)
    chances = [math.comb(n, k) * p**k * q ** (n - k) for k in y]
    return numbers(chances), numbers([k * q - (n - k) * p for k in y]).unsqueeze(1)


def counts(rate):
    """So many labels of a Poisson variable that q leaves out less than 1e-19 beyond them."""
    return math.ceil(rate + 12 * math.sqrt(rate) + 25)


def poisson_table(h):
    rate = mp.exp(mp.mpf(h))
    y = range(counts(float(rate)))
    chances = [mp.exp(k * mp.mpf(h) - rate - mp.loggamma(k + 1)) for k in y]
    return numbers(chances), numbers([k - rate for k in y]).unsqueeze(1)


def confident(classes, top, e, generator):
    """Logits with 1 − p_top = e."""
    h = torch.randn(classes, generator=generator, dtype=F64)
    rest = torch.cat([h[:top], h[top + 1 :]]).logsumexp(0)
    h[top] = math.log((1 - e) / e) + rest
    return h


def categorical_setting(shape, classes, e, dtype, top, axis=-1, mask=None):
    """Positions of different confidence near e, in any layout."""
    generator = torch.Generator().manual_seed(classes)
    size = math.prod(shape)
    sizes = [e * (1, 0.3, 0.9, 0.5)[t % 4] for t in range(size)]
    h = torch.stack([confident(classes, top, x, generator) for x in sizes])
    h = h.view(1, *shape, classes).movedim(-1, axis).contiguous().to(dtype)
    rows = h.movedim(axis, -1).reshape(size, classes).tolist()
    mask = None if mask is None else torch.tensor(mask).view(1, *shape)
    return Setting(Categorical(class_dim=axis), h, [softmax_table(row) for row in rows], mask)


def elementwise_setting(family, h, table, dtype, mask=None):
    h = torch.as_tensor(h, dtype=F64).unsqueeze(0).to(dtype)
    mask = None if mask is None else torch.tensor([mask])
    return Setting(family, h, [table(x) for x in h.flatten().tolist()], mask)


def steps(labels, shape, most):
    """The smallest uniforms, over all doubles, at which a label is 1, ..., most; 1 where none is.

    ``labels`` takes uniforms [most, *shape]; so are the steps.
    """
    k = torch.arange(1, most + 1).view(-1, *[1] * len(shape))
    high = torch.full((most, *shape), LAST, dtype=F64).view(torch.int64)
    low = torch.zeros_like(high)
    never = labels(high.view(F64)) < k
    while bool((high - low > 1).any()):
        middle = (low + high) // 2  # halves the doubles between, not the interval
        enough = labels(middle.view(F64).clamp(min=5e-324)) >= k
        high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
    return high.view(F64).masked_fill(never, 1.0)


def cells(edges):
    """Intervals [a, b) between the edges, and a double inside each."""
    edges = torch.cat([torch.tensor([0.0, 1.0], dtype=F64), edges.flatten()]).unique()
    a, b = edges[:-1], edges[1:]
    return a, b, torch.where(a > 0, a, b / 2)


@dataclass
class Drawn:
    """What the sampler draws in each cell: probability, its relative error, label, scores, 1/w."""

    volume: torch.Tensor
    slack: torch.Tensor
    labels: torch.Tensor
    scores: torch.Tensor  # √w δ [N, T, C]
    inverse: torch.Tensor
    expected: torch.Tensor


def integrate(s: Setting) -> Drawn:
    """The sampler's distribution, from its own steps."""
    h, family, size = s.outputs, s.family, len(s.tables)
    shape = family.label_shape(h)[1:]
    most = max(len(p) for p, _ in s.tables) - 1
    many = h.expand(most, *h.shape[1:])
    biased = steps(lambda u: family.size_biased_quantile(many, u), shape, most).view(most, size)
    edges = [biased[:, t] for t in range(size)]
    if size > 1:
        plain = steps(lambda u: family.quantile(many, u), shape, most).view(most, size)
        edges = [torch.cat([plain[:, t], biased[:, t]]) for t in range(size)]
    parts = [cells(x) for x in edges]

    def draw(uniforms, positions):
        n = len(uniforms)
        mask = None if s.mask is None else s.mask.expand(n, *shape)
        outputs = h.expand(n, *h.shape[1:])
        found = draw_size_biased(family, outputs, uniforms.view(n, *shape), positions, mask)
        deltas = s.split(found.scores) * found.inverse_weights.sqrt().view(-1, 1, 1)
        return found, s.labels_of(deltas)

    if size > 1:
        # uniforms at which the plain label is not the size-biased one tell which was picked
        at, differs, label = torch.empty(size, dtype=F64), [], []
        for t, (a, b, inside) in enumerate(parts):
            of_p = (plain[:, t] <= inside.unsqueeze(1)).sum(1)
            of_q = (biased[:, t] <= inside.unsqueeze(1)).sum(1)
            best = ((of_p != of_q) * (b - a)).argmax()
            at[t] = inside[best]
            differs.append(bool(of_p[best] != of_q[best]))
            label.append(of_p[best])
        hidden = [t for t in s.kept if not differs[t]]
        assert len(hidden) <= 1  # p = q there

        def picked(positions):
            _, labels = draw(at.expand(len(positions), size), positions)
            other = labels != torch.stack(label)
            other[:, [t for t in range(size) if t not in s.kept]] = False
            assert bool((other.sum(1) <= 1).all())
            none = torch.full((len(positions),), hidden[0] if hidden else -1)
            found = torch.where(other.any(1), other.int().argmax(1), none)
            assert bool((found >= 0).all())
            return found

        parts.append(cells(steps(picked, (), size - 1)))
    index = torch.cartesian_prod(*[torch.arange(len(a)) for a, _, _ in parts])
    index = index.view(len(index), len(parts))
    volume, slack = torch.ones(len(index), dtype=F64), torch.zeros(len(index), dtype=F64)
    for t, (a, b, _) in enumerate(parts):
        volume = volume * (b - a)[index[:, t]]
        # a step is a double: each interval is right to b·2^-53, times a few for what it was made of
        slack = slack + (2.0**-49 * b / (b - a))[index[:, t]]
    inside = torch.stack([x[index[:, t]] for t, (_, _, x) in enumerate(parts)], 1)
    positions = inside[:, -1] if size > 1 else torch.full((len(index),), 0.5, dtype=F64)
    found, labels = draw(inside[:, :size], positions)
    return Drawn(volume, slack, labels, s.split(found.scores), found.inverse_weights, found.expected)


@dataclass
class Truth:
    """All labels of the positions that are not masked: p, δ [N, T·C], ‖δ‖², τ, q."""

    labels: torch.Tensor
    p: torch.Tensor
    delta: torch.Tensor
    square: torch.Tensor
    tau: float
    q: torch.Tensor


def enumerate_labels(s: Setting) -> Truth:
    tables = [s.tables[t] for t in s.kept]
    index = torch.cartesian_prod(*[torch.arange(len(p)) for p, _ in tables])
    index = index.view(len(index), len(tables))
    p = torch.ones(len(index), dtype=F64)
    labels = torch.zeros((len(index), len(s.tables)), dtype=torch.int64)
    delta = torch.zeros((len(index), len(s.tables), tables[0][1].shape[1]), dtype=F64)
    for i, t in enumerate(s.kept):
        chances, scores = s.tables[t]
        p = p * chances[index[:, i]]
        labels[:, t] = index[:, i]
        delta[:, t] = scores[index[:, i]]
    square = delta.square().sum((1, 2))
    tau = float((p * square).sum())
    return Truth(labels, p, delta.flatten(1), square, tau, p * square / tau)


def check(s: Setting, rtol=1e-12, coarse=0.0):
    """The sampler is q, and its weighted scores have the moments of p.

    To ``rtol`` and each interval's own rounding, or ``coarse`` of τ and the largest entry.
    """
    drawn, truth = integrate(s), enumerate_labels(s)
    size = math.prod(len(p) for p, _ in s.tables)
    place = torch.tensor(
        [math.prod(len(p) for p, _ in s.tables[t + 1 :]) for t in range(len(s.tables))]
    )
    keep = torch.zeros(len(s.tables), dtype=torch.int64)
    keep[s.kept] = 1
    key, true_key = ((drawn.labels * keep) @ place, truth.labels @ place)

    def add_up(values):
        return torch.zeros(size, dtype=F64).index_add(0, key, values)[true_key]

    error = drawn.slack + rtol
    have = add_up(drawn.volume)
    assert float(have.sum()) == pytest.approx(1, abs=1e-13)
    beyond = 1 - float(truth.q.sum())  # labels past the tables
    assert abs(beyond) < 1e-14
    # no uniform is left for what is below 2^-53
    bound = add_up(drawn.volume * error) + 2.0**-52 * (truth.q < 2.0**-48) + coarse
    assert bool(((have - truth.q).abs() <= bound).all()), (have, truth.q)

    of = torch.zeros(size, dtype=torch.int64)
    of[true_key] = torch.arange(len(true_key))
    of = of[key]
    torch.testing.assert_close(
        drawn.expected, torch.full_like(drawn.volume, truth.tau), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(drawn.inverse, truth.square[of] / truth.tau, rtol=1e-12, atol=0)
    root = drawn.inverse.sqrt().unsqueeze(1)
    scores = drawn.scores.flatten(1)
    torch.testing.assert_close(scores * root, truth.delta[of], rtol=1e-12, atol=0)

    def same(of_q, of_p):
        """E_q of values at the cells [N, n] is E_p of values at the labels [M, n]."""
        have, want = drawn.volume @ of_q, truth.p @ of_p
        size = max(float((truth.p @ of_p.abs()).max()), truth.tau)
        bound = (drawn.volume * error) @ of_q.abs() + coarse * size
        assert bool(((have - want).abs() <= bound).all()), (have, want, bound)

    def pairs(x):
        return (x.unsqueeze(2) * x.unsqueeze(1)).flatten(1)

    # f = 1, but where the score is zero: such a label is never drawn, and no power of it is missed
    same(1 / drawn.inverse.unsqueeze(1), (truth.square > 0).double().unsqueeze(1))
    same(pairs(scores), pairs(truth.delta))
    same(scores**4 * drawn.inverse.unsqueeze(1), truth.delta**4)
    same(pairs(scores) * scores[:, :1] * root, pairs(truth.delta) * truth.delta[:, :1])


# Labels of the positions that were not picked are plain draws, from a softmax or sigmoid in float32
# for outputs of float32 and below: right to 1e-7 of the largest.
def coarse_of(dtype):
    return 0.0 if dtype == torch.float64 else 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("e", UNSURE)
@pytest.mark.parametrize("classes", [3, 5])
def test_one_class_label_is_drawn_from_q(classes, e, dtype):
    for top in (0, classes - 1):
        check(categorical_setting((), classes, e, dtype, top))


LAYOUTS = {
    "two positions": dict(shape=(2,), classes=3),
    "three positions": dict(shape=(3,), classes=3),
    "five classes": dict(shape=(2,), classes=5),
    "a map": dict(shape=(1, 2), classes=4, axis=1),
    "a masked map": dict(shape=(2, 2), classes=3, axis=1, mask=[True, False, True, False]),
    "the last of three": dict(shape=(3,), classes=3, mask=[False, False, True]),
    "classes before positions": dict(shape=(3,), classes=3, axis=-2, mask=[True, True, False]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("e", UNSURE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_of_several_positions_are_drawn_from_q(layout, e, dtype):
    top = len(layout) % 2  # the rounding of the rare and of the sure label lies in different places
    check(categorical_setting(**LAYOUTS[layout], e=e, dtype=dtype, top=top), coarse=coarse_of(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("e", UNSURE)
@pytest.mark.parametrize("size", range(1, 5))
def test_binary_labels_are_drawn_from_q(size, e, dtype):
    sure = math.log((1 - e) / e)
    h = [sure * x + y for x, y in ((-1, 0), (1.1, 0.25), (-0.8, -0.5), (0.9, 1))][:size]
    coarse = coarse_of(dtype) if size > 1 else 0.0
    check(elementwise_setting(Bernoulli(), h, bernoulli_table, dtype), coarse=coarse)
    check(elementwise_setting(Bernoulli(), [-x for x in h], bernoulli_table, dtype), coarse=coarse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_binary_labels_are_left_out(dtype):
    h, mask = [3.0, -8.0, 0.5], [True, True, False]
    for turn in range(3):
        turned = h[turn:] + h[:turn], mask[turn:] + mask[:turn]
        setting = elementwise_setting(Bernoulli(), turned[0], bernoulli_table, dtype, turned[1])
        check(setting, coarse=coarse_of(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", [1e-6, 1e-3, 0.2, 1, 3.7, 10.3])
def test_a_count_is_drawn_from_q(rate, dtype):
    check(elementwise_setting(Poisson(), [math.log(rate)], poisson_table, dtype))


def test_a_large_count_is_drawn_from_q():
    # torch.special.gammaincc is right to 4e-10 there, whatever the type
    check(elementwise_setting(Poisson(), [math.log(29.6)], poisson_table, F64), rtol=0, coarse=4e-9)


@pytest.mark.parametrize("rates", [(1e-4, 0.3), (1.0, 1e-6), (0.5, 0.7)])
def test_counts_are_drawn_from_q(rates):
    h = [math.log(rate) for rate in rates]
    check(elementwise_setting(Poisson(), h, poisson_table, torch.float64))
    check(elementwise_setting(Poisson(), h, poisson_table, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("e", UNSURE)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_labels_of_an_own_family_are_drawn_from_q(size, e, dtype):
    h = [math.log((1 - e) / e) * x for x in (1, -0.9, 1.1)][:size]
    mask = None if size < 3 else [True, False, True]
    check(elementwise_setting(Binomial(), h, binomial_table, dtype, mask))
