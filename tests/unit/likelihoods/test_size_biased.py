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

from fimprobe.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Independent,
    Poisson,
    softmax_sampler,
)
from fimprobe.likelihoods.base import Likelihood
from fimprobe.likelihoods.draws import Draws
from fimprobe.likelihoods.independent import MAX_MISSING_SHARE
from fimprobe.likelihoods.size_biased import draw_size_biased, expected_squares, has_size_biased_draws

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
    cut_off = Independent.cut_off

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


def categorical_setting(shape, classes, e, *, dtype, top, axis=-1, mask=None):
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
        plain = steps(lambda u: family.quantile(many.double(), u), shape, most).view(most, size)
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
    length, some = scores.square().sum(1), truth.square[of] > 0
    torch.testing.assert_close(length[some], drawn.expected[some], rtol=1e-12, atol=0)
    torch.testing.assert_close(scores * root, truth.delta[of], rtol=1e-12, atol=0)

    def same(of_q, of_p):
        """E_q of values at the cells [N, n] is E_p of values at the labels [M, n]."""
        have, want = drawn.volume @ of_q, truth.p @ of_p
        largest = max(float((truth.p @ of_p.abs()).max()), truth.tau)
        bound = (drawn.volume * error) @ of_q.abs() + coarse * largest
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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("e", UNSURE)
@pytest.mark.parametrize("classes", [3, 5])
def test_one_class_label_is_drawn_from_q(classes, e, dtype):
    for top in (0, classes - 1):
        check(categorical_setting((), classes, e, dtype=dtype, top=top))


LAYOUTS = {
    "two positions": {"shape": (2,), "classes": 3},
    "three positions": {"shape": (3,), "classes": 3},
    "five classes": {"shape": (2,), "classes": 5},
    "a map": {"shape": (1, 2), "classes": 4, "axis": 1},
    "a masked map": {"shape": (2, 2), "classes": 3, "axis": 1, "mask": [True, False, True, False]},
    "the last of three": {"shape": (3,), "classes": 3, "mask": [False, False, True]},
    "classes before positions": {
        "shape": (3,),
        "classes": 3,
        "axis": -2,
        "mask": [True, True, False],
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("e", UNSURE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_of_several_positions_are_drawn_from_q(layout, e, dtype):
    top = len(layout) % 2  # the rounding of the rare and of the sure label lies in different places
    check(categorical_setting(**LAYOUTS[layout], e=e, dtype=dtype, top=top))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("e", UNSURE)
@pytest.mark.parametrize("size", range(1, 5))
def test_binary_labels_are_drawn_from_q(size, e, dtype):
    sure = math.log((1 - e) / e)
    h = [sure * x + y for x, y in ((-1, 0), (1.1, 0.25), (-0.8, -0.5), (0.9, 1))][:size]
    check(elementwise_setting(Bernoulli(), h, bernoulli_table, dtype))
    check(elementwise_setting(Bernoulli(), [-x for x in h], bernoulli_table, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_binary_labels_are_left_out(dtype):
    h, mask = [3.0, -8.0, 0.5], [True, True, False]
    for turn in range(3):
        turned = h[turn:] + h[:turn], mask[turn:] + mask[:turn]
        setting = elementwise_setting(Bernoulli(), turned[0], bernoulli_table, dtype, turned[1])
        check(setting)


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


def test_labels_of_cut_probabilities_are_drawn_from_q():
    check(elementwise_setting(Cut(40), [math.log(0.7)], poisson_table, F64))
    check(elementwise_setting(Cut(40), [math.log(0.7), math.log(1e-5)], poisson_table, F64))


def filled(*shape, u=0.5):
    """All uniforms alike."""
    return torch.full(shape, u, dtype=F64)


def batch(kind, dtype, size=64):
    """A family, outputs from unsure to 1 − p_max = 1e-13, and a mask with an empty input."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        scale = torch.logspace(-1, 1.5, size).view(-1, *[1] * (len(shape) - 1))
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    family, h, label_shape = {
        "class": (Categorical(), normal(size, 4), (size,)),
        "tokens": (Categorical(), normal(size, 5, 4), (size, 5)),
        "map": (Categorical(class_dim=1), normal(size, 4, 2, 3), (size, 2, 3)),
        "binary": (Bernoulli(), normal(size, 6), (size, 6)),
        "flat": (Bernoulli(), normal(size), (size,)),
        "counts": (Poisson(), normal(size, 3).clamp(-20, 2), (size, 3)),
        "own": (Binomial(), normal(size, 2, 2), (size, 2, 2)),
    }[kind]
    mask = torch.rand(label_shape, generator=generator) < 0.6
    mask[3] = False
    return family, h, mask


KINDS = ["class", "tokens", "map", "binary", "flat", "counts", "own"]


def tau_of(family, h, mask):
    """τ of each input from the tables."""
    table = {
        "bernoulli": bernoulli_table,
        "poisson": poisson_table,
        "binomial": binomial_table,
    }.get(family.name)
    if table is None:
        rows = h.movedim(family.class_dim, -1).reshape(-1, h.shape[family.class_dim]).tolist()
        tables = [softmax_table(row) for row in rows]
    else:
        tables = [table(x) for x in h.flatten().tolist()]
    each = torch.stack([p @ delta.square().sum(1) for p, delta in tables])
    return (each.view(len(h), -1) * mask.view(len(h), -1)).sum(1)


def uniforms_of(mask, seed=0):
    draws = Draws(count=1, seed=seed, size_biased=True)
    rows = slice(0, len(mask))
    return draws.uniforms_for(rows, len(mask), mask.shape)[:, 0], draws.positions_for(
        rows, len(mask)
    )[:, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_score_has_the_length_root_tau(kind, masked, dtype):
    family, h, mask = batch(kind, dtype, 32)
    keep = mask if masked else torch.ones_like(mask)
    tau = tau_of(family, h, keep)
    for seed in range(3):
        u, positions = uniforms_of(mask, seed)
        found = draw_size_biased(family, h, u, positions, mask if masked else None)
        assert found.scores.shape == h.shape and found.inverse_weights.shape == (32,)
        assert found.inverse_weights.dtype == found.expected.dtype == F64
        torch.testing.assert_close(found.expected, tau, rtol=1e-12, atol=0)
        length = found.scores.double().square().flatten(1).sum(1) if h.dim() > 1 else found.scores**2
        torch.testing.assert_close(length, tau, rtol=1e-12, atol=0)
        assert bool((found.inverse_weights[tau > 0] > 0).all())
    if masked:
        assert tau[3] == 0 and found.inverse_weights[3] == 0 and not found.scores[3].any()
    told = expected_squares(family, h, mask if masked else None)
    torch.testing.assert_close(told, tau, rtol=1e-12, atol=0)


def pairs(first, second):
    """Corresponding values of two draws, the scores first."""
    return list(zip(vars(first).values(), vars(second).values(), strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_do_not_meet(kind, masked):
    family, h, mask = batch(kind, torch.float32)
    u, positions = uniforms_of(mask)
    whole = draw_size_biased(family, h, u, positions, mask if masked else None)
    order = torch.arange(len(h)).flip(0)
    turned = draw_size_biased(
        family, h[order], u[order], positions[order], mask[order] if masked else None
    )
    for have, want in pairs(turned, whole):
        torch.testing.assert_close(have[order], want, rtol=1e-13, atol=0)
    for part in (slice(0, 1), slice(1, 20), slice(20, 64)):
        keep = mask[part] if masked else None
        alone = draw_size_biased(family, h[part], u[part], positions[part], keep)
        for have, want in pairs(alone, whole):
            torch.testing.assert_close(have, want[part], rtol=1e-13, atol=0)


def test_arguments_are_left_as_they_were():
    for kind in KINDS:
        family, h, mask = batch(kind, torch.float64)
        u, positions = uniforms_of(mask)
        given = (h, u, positions, mask)
        before = [x.clone() for x in given]
        draw_size_biased(family, *given)
        assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_outputs_have_no_score(dtype):
    sure = torch.tensor([1e4, -1e4, 0.0]).to(dtype)
    cases = [
        (Categorical(), torch.stack([sure, sure.flip(0), -sure]), (3,)),
        (Categorical(), torch.stack([sure, -sure]).unsqueeze(0).repeat(3, 1, 1), (3, 2)),
        (Categorical(class_dim=1), torch.stack([sure, -sure], 1).repeat(3, 1, 1), (3, 2)),
        (Bernoulli(), torch.tensor([1e4, -1e4, 800.0]).to(dtype), (3,)),
        (Bernoulli(), torch.tensor([[1e4, -1e4]] * 3).to(dtype), (3, 2)),
        (Poisson(), torch.full((3, 1), -1e4).to(dtype), (3, 1)),
        (Poisson(), torch.full((3, 2), -1e4).to(dtype), (3, 2)),
        (Binomial(), torch.tensor([[1e4], [-1e4], [800.0]]).to(dtype), (3, 1)),
    ]
    for family, h, shape in cases:
        for u in (2.0**-54, 0.5, LAST):
            found = draw_size_biased(family, h, filled(*shape, u=u), filled(3, u=u))
            for x in (found.scores, found.inverse_weights, found.square, found.expected):
                assert bool((x == 0).all()), (family, h, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saturated_label_beside_an_unsure_one(dtype):
    cases = [
        (Categorical(), [[[1e4, 0.0, -1e4], [0.5, 0.0, 1.0]]], 1, 3),
        (Categorical(), [[[0.5, 0.0, 1.0], [-1e4, 1e4, 0.0]]], 0, 3),
        (Bernoulli(), [[1e4, 0.5, -1e4]], 1, 1),
        (Poisson(), [[-1e4, 0.5]], 1, 1),
    ]
    for family, h, unsure, width in cases:
        h = torch.tensor(h).to(dtype)
        shape = family.label_shape(h)
        for u in (2.0**-54, 0.2, 0.6, LAST):
            found = draw_size_biased(family, h, filled(*shape, u=u), filled(1, u=u))
            scores = found.scores.view(-1, width)
            others = torch.arange(len(scores)) != unsure
            tau = tau_of(family, h[:, unsure : unsure + 1], torch.ones(1, 1))
            assert not scores[others].any()
            torch.testing.assert_close(scores[unsure].square().sum()[None], tau, rtol=1e-12, atol=0)
            assert 0 < found.inverse_weights < torch.inf


def test_an_impossible_class_is_not_drawn():
    h = torch.tensor([[0.3, -torch.inf, 1.0, -torch.inf], [-torch.inf, 30.0, -torch.inf, 0.0]])
    for u in (2.0**-54, 0.3, 0.7, LAST):
        for rows in (h, h.unsqueeze(1).expand(2, 3, 4)):
            shape = rows.shape[:-1]
            found = draw_size_biased(Categorical(), rows, filled(*shape, u=u), filled(2, u=u))
            assert bool(torch.isfinite(found.scores).all()) and bool(
                (found.inverse_weights > 0).all()
            )
            assert not found.scores[torch.isinf(rows)].any()


@pytest.mark.parametrize("gap", [712.0, 740.0])
def test_scores_below_the_range_have_finite_weights(gap):
    found = draw_size_biased(Categorical(), torch.tensor([[gap, 0.0, 0.0]]), filled(1), filled(1))
    assert bool(torch.isfinite(found.inverse_weights).all())


def sure_tokens(size, positions, classes=3):
    """Logits whose plain label at u = ½ is 0, and whose size-biased one is another."""
    generator = torch.Generator().manual_seed(2)
    h = torch.randn(size, positions, classes, generator=generator)
    h[..., 0] = 6 + 6 * torch.rand(size, positions, generator=generator)
    return h


MASKS = {
    "the last": lambda m: m[:, -4:].fill_(False),
    "the first": lambda m: m[:, :4].fill_(False),
    "but one": lambda m: m.fill_(False)[:, 3].fill_(True),
    "some": lambda m: m.copy_(torch.rand(m.shape, generator=torch.Generator().manual_seed(1)) < 0.5),
}


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("which", MASKS)
def test_masked_positions_are_never_picked(which, axis):
    inner = torch.linspace(0.01, 0.99, 60).tolist()
    positions = torch.tensor([2.0**-54, 1e-9, *inner, 1 - 1e-9, LAST], dtype=F64)
    size, length = len(positions), 9
    h, mask = sure_tokens(size, length), torch.ones(size, length, dtype=torch.bool)
    MASKS[which](mask)
    found = draw_size_biased(
        Categorical(class_dim=axis), h.movedim(-1, axis), filled(size, length), positions, mask
    )
    scores = found.scores.movedim(axis, -1)
    assert not scores[~mask].any()
    drawn = scores.argmax(-1) * mask
    there = mask.any(1)
    assert (drawn != 0).sum(1)[there].tolist() == [1] * int(there.sum())
    picked = (drawn != 0).int().argmax(1)
    place = torch.arange(length).expand(size, length)
    ends = place.masked_fill(~mask, length).min(1)[0], place.masked_fill(~mask, -1).max(1)[0]
    assert int(picked[0]) == int(ends[0][0]) and int(picked[-1]) == int(ends[1][-1])
    # where the positions' uniform falls into the shares of τ
    share = torch.stack(
        [tau_of(Categorical(), h[:, t], mask[:, t : t + 1]) for t in range(length)], 1
    )
    before = (share.cumsum(1) - share) / share.sum(1, keepdim=True)
    inside = (before < positions.unsqueeze(1)).logical_and(mask)
    assert torch.equal(picked[there], place.masked_fill(~inside, -1).max(1)[0][there])


def test_masked_binary_labels_are_never_picked():
    h = torch.tensor([[-9.0, -7.0, -8.0, -30.0, 0.0, 40.0]]).repeat(3, 1)
    mask = torch.tensor([[True, True, True, True, False, False]] * 3)
    positions = torch.tensor([LAST, 0.5, 2.0**-54], dtype=F64)
    found = draw_size_biased(Bernoulli(), h, filled(3, 6), positions, mask)
    # τ of the fourth is 1e-13 of the whole: the last uniform's share of it
    assert (found.scores > 0).int().argmax(1).tolist() == [3, 1, 0]
    assert not found.scores[:, 4:].any() and bool((found.scores[:, :4] != 0).all())


def test_rounded_shares_do_not_reach_into_the_mask():
    """The sum of many shares, cumulated one by one, may be above or below each input's own sum."""
    generator = torch.Generator().manual_seed(9)
    h = torch.randn(64, 700, generator=generator) - 8
    mask = torch.rand(64, 700, generator=generator) < 0.5
    mask[:, 350:] = False
    found = draw_size_biased(Bernoulli(), h, filled(64, 700), filled(64, u=LAST), mask)
    last = (torch.arange(700) * mask).max(1)[0]
    assert torch.equal((found.scores > 0).int().argmax(1), last)
    assert not found.scores[~mask].any()


def test_what_is_below_the_range_counts_as_nothing():
    """A τ near 5e-324 has no weights: scores and weights are 0, as F is to rounding."""
    h = torch.tensor([[[740.0, 0.0, 0.0], [0.0, 740.0, 0.0], [9.0, 0.0, 0.0]]])
    mask = torch.tensor([[True, True, False]])
    found = draw_size_biased(Categorical(), h, filled(1, 3), filled(1, u=LAST), mask)
    assert not found.scores.any() and not found.inverse_weights.any()


N = 20000


@pytest.mark.parametrize("e", [0.3, 1e-4, 1e-9])
@pytest.mark.parametrize("kind", ["classes", "tokens", "masked map", "binary", "counts", "own"])
def test_means_of_draws_are_those_of_the_model(kind, e):
    setting = {
        "classes": lambda: categorical_setting((), 5, e, dtype=torch.float32, top=2),
        "tokens": lambda: categorical_setting((3,), 3, e, dtype=torch.float32, top=0),
        "masked map": lambda: categorical_setting(
            (2, 2), 3, e, dtype=torch.float32, top=1, axis=1, mask=[True, False, True, False]
        ),
        "binary": lambda: elementwise_setting(
            Bernoulli(),
            [math.log(e), -math.log(3 * e), 0.9 * math.log(e)],
            bernoulli_table,
            torch.float32,
        ),
        "counts": lambda: elementwise_setting(
            Poisson(), [math.log(e), math.log(2.1 * e)], poisson_table, torch.float32
        ),
        "own": lambda: elementwise_setting(
            Binomial(), [math.log(e), -math.log(3 * e)], binomial_table, torch.float32
        ),
    }[kind]()
    truth, h = enumerate_labels(setting), setting.outputs.expand(N, *setting.outputs.shape[1:])
    shape = setting.family.label_shape(h)
    draws = Draws(count=1, seed=11, size_biased=True)
    u, positions = (
        draws.uniforms_for(slice(None), N, shape)[:, 0],
        draws.positions_for(slice(None), N)[:, 0],
    )
    mask = None if setting.mask is None else setting.mask.expand(shape)
    found = draw_size_biased(setting.family, h, u, positions, mask)
    scores = setting.split(found.scores).flatten(1)

    def within(values, at_labels):
        """Means of values [N, n] within 4 standard errors of E_p of f [M, n], both enumerated."""
        mean, weights = truth.p @ at_labels, (truth.tau / truth.square).nan_to_num(posinf=0)
        variance = (truth.p * weights) @ at_labels**2 - mean**2
        error = (variance.clamp(min=0) / N).sqrt()
        have, rounding = values.mean(0), 1e-12 * values.abs().mean(0)
        assert bool(((have - mean).abs() <= 4 * error + rounding).all()), (have, mean, error)
        return error

    def pairs(x):
        return (x.unsqueeze(2) * x.unsqueeze(1)).flatten(1)

    error = within(pairs(scores), pairs(truth.delta))
    fisher = truth.p @ truth.delta**2
    large = fisher > 1e-3 * fisher.max()
    error = error.view(len(fisher), -1).diagonal()
    assert bool((error < 0.25 * fisher)[large].all())  # few draws are enough to see a bias
    within(scores**4 * found.inverse_weights.unsqueeze(1), truth.delta**4)
    within(1 / found.inverse_weights.unsqueeze(1), (truth.square > 0).double().unsqueeze(1))


class Protocol:
    """What :class:`fimprobe.likelihoods.base.Likelihood` asks for and no more."""

    def __init__(self, family):
        for name in dir(Likelihood):
            if not name.startswith("_"):
                setattr(self, name, getattr(family, name))


class Own(Gaussian):
    """A Gaussian by another name that tells probabilities, of which it has none."""

    def probabilities(self, outputs):
        return torch.ones(*outputs.shape, 1, dtype=F64)

    def size_biased_quantile(self, outputs, uniforms):
        return uniforms


def test_which_families_have_size_biased_draws():
    h = torch.randn(3, 4)
    for family in (Categorical(), Bernoulli(), Poisson(), Binomial(), Cut(60)):
        assert has_size_biased_draws(family, h) is True
    assert has_size_biased_draws(Categorical(class_dim=1), torch.randn(2, 3, 4, 5)) is True
    assert has_size_biased_draws(Categorical(), torch.randn(2, 3, 4).bfloat16()) is True
    assert has_size_biased_draws(Bernoulli(), torch.randn(5)) is True
    for family in (Gaussian(), Gaussian(0.3), Own(), Cut(None)):
        assert has_size_biased_draws(family, h) is False
    for inner in (Categorical(), Bernoulli(), Binomial()):
        family = Protocol(inner)
        assert isinstance(family, Likelihood)
        assert has_size_biased_draws(family, h) is False
        assert expected_squares(family, h) is None
    for empty in (torch.zeros(0, 4), torch.zeros(3, 0), torch.zeros(0)):
        assert has_size_biased_draws(Bernoulli(), empty) is False
    assert has_size_biased_draws(Categorical(), torch.zeros(2, 0, 3)) is False


@pytest.mark.parametrize("rate", [0.01, 1.3, 6.4])
def test_probabilities_may_leave_out_no_more_than_the_remainder(rate):
    h = torch.tensor([[math.log(rate)]], dtype=F64)
    exact = mp.exp(mp.mpf(float(h)))

    def left_out(count):
        """The share of E δ² in the labels count, count + 1, ..."""
        p = [mp.exp(k * mp.log(exact) - exact - mp.loggamma(k + 1)) for k in range(count, count + 60)]
        return float(mp.fsum(x * (k - exact) ** 2 for k, x in enumerate(p, count)) / exact)

    enough = next(count for count in range(1, 200) if left_out(count) < MAX_MISSING_SHARE)
    for count in range(1, enough + 3):
        assert abs(left_out(count) / MAX_MISSING_SHARE - 1) > 1e-3
        assert bool(Cut(count).cut_off(h).any()) is (count < enough), count


def test_the_remainder_counts_what_is_missing_or_too_much():
    for share in (-1.01, -0.99, 0.0, 0.99, 1.01):

        class Scaled(Binomial):
            def probabilities(self, outputs, factor=1 - share * MAX_MISSING_SHARE):
                return super().probabilities(outputs) * factor

        for h in (0.3, -12.0):
            cut = Scaled().cut_off(torch.tensor([[h, h]]))
            assert bool(cut.all()) is bool(cut.any()) is (abs(share) > 1), (share, h)


@pytest.mark.parametrize("size", [1, 2])
def test_an_input_whose_probabilities_are_cut_has_labels_of_the_model(size):
    h = torch.tensor([0.0, 4.0]).unsqueeze(1).expand(2, size)
    assert Cut(40).cut_off(h).tolist() == [[False] * size, [True] * size]
    found = draw_size_biased(Cut(40), h, filled(2, size), filled(2))
    own = Poisson().score(h[1:], Poisson().quantile(h[1:], filled(1, size)))
    torch.testing.assert_close(found.scores[1:].float(), own)
    assert found.inverse_weights[1] == 1 and found.square[1] == found.scores[1].square().sum()
    assert found.square[0] == found.expected[0]
    torch.testing.assert_close(found.scores[0].square().sum(), found.expected[0])


SHAPE = torch.Size([10, 4, 2])


def test_processes_that_share_a_batch_draw_the_same():
    whole = Draws(count=3, seed=7, size_biased=True)
    u, positions = whole.uniforms_for(slice(0, 10), 10, SHAPE), whole.positions_for(slice(0, 10), 10)
    assert u.shape == (10, 3, 4, 2) and positions.shape == (10, 3)
    assert u.dtype == positions.dtype == F64
    for first, size in ((0, 6), (6, 4)):
        part = Draws(count=3, seed=7, first=first, total=10, size_biased=True)
        mine = slice(first, first + size)
        # the order in which they are asked for does not matter
        assert torch.equal(part.positions_for(slice(0, size), size), positions[mine])
        assert torch.equal(part.uniforms_for(slice(0, size), size, SHAPE), u[mine])
        again = Draws(count=3, seed=7, first=first, total=10, size_biased=True)
        chunks = [slice(0, 1), slice(1, 3), slice(3, size)]
        chunked = [again.positions_for(rows, size) for rows in chunks]
        assert torch.equal(torch.cat(chunked), positions[mine])
        chunked = [again.uniforms_for(rows, size, SHAPE) for rows in chunks]
        assert torch.equal(torch.cat(chunked), u[mine])


def test_positions_are_a_stream_of_their_own():
    draws, plain = Draws(count=5, seed=3, size_biased=True), Draws(count=5, seed=3)
    shape = torch.Size([1000])
    u, positions = (
        draws.uniforms_for(slice(None), 1000, shape),
        draws.positions_for(slice(None), 1000),
    )
    assert torch.equal(u, plain.uniforms_for(slice(None), 1000, shape))
    assert torch.equal(u, draws.uniforms_for(slice(None), 1000, shape))
    both = torch.stack([u.flatten(), positions.flatten()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 4 / 5000**0.5
    for x in both:
        assert float(x.min()) > 0 and float(x.max()) < 1 and len(x.unique()) == 5000
        assert abs(float(x.mean()) - 0.5) < 4 / (12 * 5000) ** 0.5
    other = Draws(count=5, seed=4, size_biased=True).positions_for(slice(None), 1000)
    assert not bool((other == positions).any())


@pytest.mark.parametrize("drawn", [0.0, 0.5, LAST])
def test_no_uniform_is_0_or_1(monkeypatch, drawn):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: filled(*shape, u=drawn))
    draws = Draws(count=2, seed=0, size_biased=True)
    for x in (draws.uniforms_for(slice(None), 3, SHAPE), draws.positions_for(slice(None), 3)):
        assert bool(((x > 0) & (x < 1) & ((x - drawn).abs() < 1e-15)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_inputs_keep_probabilities_in_float32(dtype, monkeypatch):
    """Of language models: the same labels, scores and weights to float32's rounding."""
    generator = torch.Generator().manual_seed(3)
    h = (4 * torch.randn(6, 5, 40, generator=generator)).to(dtype)
    h[0, :, 0] += 30
    mask = torch.rand(6, 5, generator=generator) > 0.3
    uniforms = torch.rand(6, 5, generator=generator, dtype=F64)
    positions = torch.rand(6, generator=generator, dtype=F64)
    want = draw_size_biased(Categorical(), h, uniforms, positions, mask)
    monkeypatch.setattr(softmax_sampler, "MAX_FLOAT64_OUTPUTS", 0)
    have = draw_size_biased(Categorical(), h, uniforms, positions, mask)
    assert want.scores.dtype == F64 and have.scores.dtype == torch.float32
    torch.testing.assert_close(have.scores.double(), want.scores, rtol=1e-5, atol=1e-9)
    for a, b in pairs(have, want)[1:]:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("classes", [2, 10, 5000])
def test_draws_that_share_a_softmax_are_those_of_the_family(classes, dtype):
    """Beyond 4096 outputs the sampler's probabilities are float32; those of the labels never are."""
    family, h = Categorical(), 3 * torch.randn(6, classes, dtype=dtype)
    sampler = family.size_biased_sampler(h, None)
    for _ in range(3):
        uniforms = torch.rand(6, dtype=F64)
        labels = family.size_biased_quantile(h, uniforms)
        assert torch.equal(sampler.draw(uniforms, torch.rand(6, dtype=F64)).labels, labels)
        assert sampler.plain_labels(uniforms).shape == labels.shape
