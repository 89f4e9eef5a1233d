"""Norms over all positions, Hutchinson's factor and data labels, against dense tensors."""

import importlib.util
import itertools
import math
import sys
from decimal import Decimal, getcontext

import pytest
import torch

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from fimprobe.likelihoods.base import Likelihood, OutputNorms
from fimprobe.likelihoods.output_norms import combine_positions
from tests.support.paths import EXAMPLES

getcontext().prec = 60
FIELDS = list(OutputNorms.__dataclass_fields__)
SIGMA = 0.7


def own_family():
    """The example's negative binomial: a subclass with the four elementwise methods only."""
    path = EXAMPLES / "own_family.py"
    spec = importlib.util.spec_from_file_location("own_family_for_norms", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.NegativeBinomial(2.0)


INDEPENDENT = [Bernoulli(), Gaussian(SIGMA), Poisson(), own_family()]


def softmax_table(logits):
    """Probabilities [C] and scores [C, C], from 60-digit decimals."""
    raw = [Decimal(x).exp() for x in logits]
    p = [x / sum(raw) for x in raw]
    n = range(len(p))
    scores = [[float((i == y) - p[i]) for i in n] for y in n]
    fisher = [[float(p[i] * ((i == j) - p[j])) for j in n] for i in n]
    return torch.tensor([float(x) for x in p]), torch.tensor(scores), torch.tensor(fisher)


def component_table(family, h):
    """Probabilities [n] and scores [n, 1] of one component: enumerated, or by quadrature."""
    if family.name == "bernoulli":
        p = 1 / (1 + math.exp(-h))
        w, d = [1 - p, p], [-p, 1 / (1 + math.exp(h))]
    elif family.name == "gaussian":  # Gauss-Hermite: moments 1, 0, 1, 0, 3
        w, d = [2 / 3, 1 / 6, 1 / 6], [0.0, 3**0.5 / SIGMA, -(3**0.5) / SIGMA]
    elif family.name == "poisson":
        rate = math.exp(h)
        w = [math.exp(k * h - rate - math.lgamma(k + 1)) for k in range(40)]
        d = [k - rate for k in range(40)]
    else:
        r, mean = family.r, math.exp(h)
        w = [
            math.exp(math.lgamma(k + r) - math.lgamma(r) - math.lgamma(k + 1))
            * (r / (r + mean)) ** r
            * (mean / (r + mean)) ** k
            for k in range(200)
        ]
        d = [k - (r + k) * mean / (r + mean) for k in range(200)]
    return torch.tensor(w), torch.tensor(d)[:, None]


def tables(family, h):
    """A table for each position of one input's outputs h, classes last."""
    if isinstance(family, Categorical):
        return [softmax_table(row.tolist()) for row in h.reshape(-1, h.shape[-1])]
    out = []
    for x in h.flatten().tolist():
        w, d = component_table(family, x)
        out.append((w, d, (w * d[:, 0] ** 2).sum().reshape(1, 1)))
    return out


def dense(positions):
    """I and M = E vec(δδᵀ − I) vec(δδᵀ − I)ᵀ of the concatenated outputs, all labels enumerated."""
    fisher = torch.block_diag(*[f for _, _, f in positions])
    size, moment = len(fisher), 0.0
    for choice in itertools.product(*[range(len(w)) for w, _, _ in positions]):
        weight = math.prod(float(w[y]) for (w, _, _), y in zip(positions, choice, strict=True))
        delta = torch.cat([d[y] for (_, d, _), y in zip(positions, choice, strict=True)])
        centred = (torch.outer(delta, delta) - fisher).flatten()
        moment = moment + weight * torch.outer(centred, centred)
    assert moment.shape == (size**2, size**2)
    return fisher, moment


def summary(fisher, moment):
    """The seven values of dense I and M."""
    low, high = torch.linalg.eigvalsh(fisher)[[0, -1]]
    return OutputNorms(
        fisher_norm=fisher.norm(),
        fisher_trace=fisher.trace(),
        fisher_max=high,
        fisher_min=low,
        moment_norm=moment.norm(),
        moment_trace=moment.trace(),
        moment_max=torch.linalg.eigvalsh(moment)[-1],
    )


def agree(have, b, want, rtol=1e-9, floor=1e-13):
    """All seven of input ``b``; near-zero ones to ``floor`` of tr K's scale."""
    scale = float(want.moment_trace + want.fisher_norm**2)
    for field in FIELDS:
        x, y = float(getattr(have, field)[b]), float(getattr(want, field))
        size = scale if field.startswith("moment") else float(want.fisher_norm)
        assert x == pytest.approx(y, rel=rtol, abs=max(floor, 1e-8 * (y == 0)) * size), field


CASES = {
    "random": lambda t, c: torch.randn(t, c),
    "sharp": lambda t, c: 4 * torch.randn(t, c),
    "uniform": lambda t, c: torch.zeros(t, c),
    "one-hot": lambda t, c: one_hot(t, c, [1e-12, 1e-8, 1e-4]),
    "mixed": lambda t, c: one_hot(t, c, [0.3, 1e-12, 0.1]),
}


def one_hot(positions, classes, rests):
    """Logits with 1 − p_max as given."""
    out = torch.randn(positions, classes)
    for row, e in zip(out, itertools.cycle(rests)):
        row[1] = math.log((1 - e) / e) + torch.cat([row[:1], row[2:]]).logsumexp(0)
    return out


@pytest.mark.parametrize("positions, classes", [(1, 2), (1, 5), (2, 3), (3, 2), (4, 2)])
@pytest.mark.parametrize("case", CASES)
def test_categorical_equals_the_dense_tensor(case, positions, classes, double):
    h = torch.stack([CASES[case](positions, classes) for _ in range(2)])
    have = Categorical().norms(h, None)
    assert {getattr(have, f).shape for f in FIELDS} == {(2,)}
    for b in range(2):
        want = summary(*dense(tables(Categorical(), h[b])))
        # ‖M‖_F is the square root of a difference where M is far below K
        agree(have, b, want, rtol=1e-6, floor=1e-8)
        for field in set(FIELDS) - {"moment_norm", "fisher_min"}:
            x, y = float(getattr(have, field)[b]), float(getattr(want, field))
            scale = float(want.fisher_trace) if field.startswith("fisher") else float(y)
            floor = 1e-15 * float(want.moment_trace + want.fisher_norm**2)
            assert x == pytest.approx(y, rel=1e-9, abs=max(1e-15 * scale, floor)), (field, x, y)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("family", INDEPENDENT, ids=lambda f: f.name)
def test_independent_equals_the_dense_tensor(family, size, double):
    if family.name == "negative binomial" and size == 3:
        size = 2  # 200 labels each
    h = torch.randn(2, size) * 0.6 - 0.5
    have = family.norms(h, None)
    for b in range(2):
        assert isinstance(family, Likelihood)
        agree(have, b, dense_independent(family, h[b]))


def dense_independent(family, h):
    """Dense I and M from the product of the components' moments (they are independent)."""
    moments = [[float((w * d[:, 0] ** k).sum()) for k in range(5)] for w, d, _ in tables(family, h)]
    for m in moments:
        m[1] = 0.0
    n = len(moments)
    fisher, moment = torch.zeros(n, n), torch.zeros(n, n, n, n)

    def expect(*index):
        return math.prod(m[index.count(a)] for a, m in enumerate(moments))

    for i, j in itertools.product(range(n), repeat=2):
        fisher[i, j] = expect(i, j)
    for i, j, k, l in itertools.product(range(n), repeat=4):
        moment[i, j, k, l] = expect(i, j, k, l) - fisher[i, j] * fisher[k, l]
    return summary(fisher, moment.reshape(n * n, n * n))


@pytest.mark.parametrize("family", [Bernoulli(), Gaussian(SIGMA)], ids=lambda f: f.name)
def test_enumerated_labels_give_the_products_of_moments(family, double):
    h = torch.randn(3)
    have = summary(*dense(tables(family, h)))
    want = dense_independent(family, h)
    for field in FIELDS:
        assert float(getattr(have, field)) == pytest.approx(
            float(getattr(want, field)), rel=1e-9, abs=1e-14
        )


@pytest.mark.parametrize("h", [0.0, 1e-3, 5.0, -30.0])
def test_confident_and_undecided_bernoulli(h, double):
    have = Bernoulli().norms(torch.full((1, 2), h), None)
    p, q = 1 / (1 + math.exp(-h)), 1 / (1 + math.exp(h))
    v, own = p * q, p * q * (p - q) ** 2
    assert float(have.moment_norm) == pytest.approx((2 * own**2 + 4 * v**4) ** 0.5, rel=1e-10, abs=0)
    assert float(have.moment_max) == pytest.approx(max(own, 2 * v**2), rel=1e-10, abs=0)
    assert float(have.fisher_min) == pytest.approx(v, rel=1e-12, abs=0)


FAMILIES = [Categorical(), *INDEPENDENT]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_masked_positions_are_as_if_absent(family, double):
    h = torch.randn(3, 4, 3) * 0.5
    shape = family.label_shape(h)
    mask = torch.rand(shape) < 0.6
    mask[2] = False
    have = family.norms(h, mask)
    flat = family.norms(h, mask.reshape(3, -1))
    for b in range(3):
        if b == 2:
            want = dict.fromkeys(FIELDS, 0.0)
        else:
            left = h[b][mask[b]]
            absent = family.norms(left[None], None)
            want = {f: float(getattr(absent, f)[0]) for f in FIELDS}
        for f in FIELDS:
            assert float(getattr(have, f)[b]) == pytest.approx(want[f], rel=1e-12, abs=1e-300)
            assert torch.equal(getattr(have, f), getattr(flat, f))


def test_masked_outputs_do_not_matter(double):
    h = torch.randn(1, 3, 4)
    wild = h.clone()
    wild[:, 1] = torch.tensor([1e300, -1e300, 0, 7])
    mask = torch.tensor([[True, False, True]])
    for f in FIELDS:
        assert torch.equal(*(getattr(Categorical().norms(x, mask), f) for x in (h, wild)))


def test_a_mask_of_another_shape_is_refused():
    for family in FAMILIES:
        with pytest.raises(FimprobeError, match=r"labels for each of 2 inputs, got \(2, 7\)"):
            family.norms(torch.zeros(2, 3, 2), torch.ones(2, 7, dtype=torch.bool))


def test_pairs_do_not_cancel(double):
    size = torch.tensor([[1.0, 1e-9, 1e-9]])
    zero = torch.zeros_like(size)
    have = combine_positions(
        OutputNorms(
            fisher_norm=size,
            fisher_trace=size,
            fisher_max=size,
            fisher_min=size,
            moment_norm=zero,
            moment_trace=zero,
            moment_max=zero,
        )
    )
    assert float(have.moment_trace) == pytest.approx(4e-9 + 2e-18, rel=1e-12, abs=0)
    assert float(have.moment_norm) == pytest.approx((8e-18 + 4e-36) ** 0.5, rel=1e-12, abs=0)
    assert float(have.moment_max) == pytest.approx(2e-9, rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_low_precision_outputs_are_taken_in_float64(family, dtype):
    h = (torch.randn(3, 4, 5)).to(dtype)
    have, want = family.norms(h, None), family.norms(h.double(), None)
    for f in FIELDS:
        assert getattr(have, f).dtype == torch.float64
        assert torch.equal(getattr(have, f), getattr(want, f))


def test_classes_in_another_dimension(double):
    h = torch.randn(2, 4, 3, 2)
    here, there = Categorical(class_dim=1), Categorical(class_dim=3)
    moved, mask = h.movedim(1, -1), torch.rand(2, 3, 2) < 0.7
    xi = torch.randn(h.shape)
    for f in FIELDS:
        have, want = (getattr(l.norms(x, mask), f) for l, x in ((here, h), (there, moved)))
        assert torch.allclose(have, want, rtol=1e-12, atol=0)
    factor = here.fisher_factor(h, xi)
    assert torch.allclose(factor.movedim(1, -1), there.fisher_factor(moved, xi.movedim(1, -1)))
    pairs = zip(here.hutchinson_passes(h, mask), there.hutchinson_passes(moved, mask), strict=True)
    for a, b in pairs:
        assert torch.equal(a.cotangent.movedim(1, -1), b.cotangent)
        assert torch.equal(a.square, b.square) and a.block == b.block


def exact_largest(p):
    """λ_max of I and of M for C classes, from I and the 4-index tensor's Gram matrix."""
    scores = torch.eye(len(p)) - p
    fisher = torch.diag(p) - torch.outer(p, p)
    flat = torch.stack([(torch.outer(d, d) - fisher).flatten() for d in scores])
    flat = flat * p.sqrt()[:, None]
    return torch.linalg.eigvalsh(fisher)[-1], torch.linalg.eigvalsh(flat @ flat.T)[-1]


def test_upper_bounds_hold_for_300_distributions(double, monkeypatch):
    monkeypatch.setattr("fimprobe.likelihoods.softmax_norms.MAX_EIGENVALUE_WORK", 0)
    slack = []
    for i in range(300):
        classes = int(torch.randint(2, 41, ()))
        h = torch.randn(classes) * 6 * torch.rand(())
        if i % 3 == 1:
            h[1] += 25 * torch.rand(())
        if i % 3 == 2:  # two nearly equal classes, where M is nearly 0
            h[0] = h[1] = h.max() + 20 * torch.rand(())
            h[1] += 10 ** (-8 * torch.rand(())) * torch.randn(())
        have = Categorical().norms(h[None], None)
        fisher, moment = exact_largest(torch.softmax(h, 0))
        scale = float(have.moment_trace + have.fisher_norm**2)
        assert float(have.fisher_max) >= float(fisher) * (1 - 1e-12)
        assert float(have.moment_max) >= float(moment) - 1e-13 * scale
        closed = 2 * min(float(torch.softmax(h, 0).max()), float(have.fisher_trace))
        assert float(have.moment_max) <= closed * (1 + 1e-12)
        slack.append(float(have.fisher_max / fisher))
    assert torch.tensor(slack).median() < 1.2 and max(slack) < 2


@pytest.mark.parametrize("e", [1e-4, 1e-8, 1e-12, 1e-30])
@pytest.mark.parametrize("classes", [2, 6, 64, 65])
def test_largest_eigenvalues_near_one_hot(classes, e, double):
    h = one_hot(1, classes, [e])
    have = Categorical().norms(h, None)
    p, scores, fisher = softmax_table(h[0].tolist())
    flat = torch.stack([(torch.outer(d, d) - fisher).flatten() for d in scores])
    flat = flat * p.sqrt()[:, None]
    want = (torch.linalg.eigvalsh(fisher)[-1], torch.linalg.svdvals(flat)[0] ** 2)
    for x, y in zip((have.fisher_max, have.moment_max), want, strict=True):
        assert float(x) >= float(y) * (1 - 1e-12)
        assert float(x) <= float(y) * (1 + 1e-12 if classes <= 64 else 2)


def test_many_classes_and_positions():
    """50,257 × 128 × 2 (98 MB of float64 per array): 1.5 s; only chunks of it exist at once."""
    h = 3 * torch.randn(2, 128, 50257)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            fresh = isinstance(out, torch.Tensor) and out.data_ptr() != h.data_ptr()
            if fresh and not out._is_view():
                sizes.append(out.numel())
            return out

    with Sizes():
        have = Categorical().norms(h, None)
    assert max(sizes) <= 2**20 and len(sizes) > 100
    p = torch.softmax(h[0, :, :].double(), -1)
    traces = 1 - p.square().sum(-1)
    assert float(have.fisher_trace[0]) == pytest.approx(float(traces.sum()), rel=1e-9, abs=0)
    assert float(have.fisher_max[0]) <= float(p.max()) + 1e-12
    for f in FIELDS:
        assert bool(torch.isfinite(getattr(have, f)).all())


def position_factor(family, h):
    """L of one input [n, n] from the unit vectors, n outputs."""
    n = h.numel()
    basis = torch.eye(n).view(n, *h.shape)
    return family.fisher_factor(h.expand(n, *h.shape), basis).reshape(n, n).T


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_factor_times_its_transpose_is_fisher(family, double):
    for h in (torch.randn(3, 4), torch.zeros(2, 3), one_hot(3, 4, [1e-12, 1e-4, 1e-8]) / 1.0):
        if not isinstance(family, Categorical):
            h = h.clamp(-3, 3)
        factor = position_factor(family, h)
        want = torch.block_diag(*family.output_fisher(h[None])[0])
        have = factor @ factor.T
        scale = want.diagonal().sqrt()
        assert ((have - want).abs() <= 1e-14 * torch.outer(scale, scale) + 1e-300).all()


def test_factor_near_one_hot_keeps_its_digits(double):
    h = one_hot(1, 4, [1e-12])
    xi = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    have = Categorical().fisher_factor(h, xi)
    raw = [Decimal(x).exp() for x in h[0].tolist()]
    p = [x / sum(raw) for x in raw]
    inner = sum(q.sqrt() * int(s) for q, s in zip(p, xi[0].tolist(), strict=True))
    for q, s, x in zip(p, xi[0].tolist(), have[0].tolist(), strict=True):
        assert x == pytest.approx(float(q.sqrt() * int(s) - q * inner), rel=1e-9, abs=0)
    assert Categorical().fisher_factor(h.float(), xi.float()).dtype == torch.float32
    assert torch.allclose(
        Categorical().fisher_factor(h.float(), xi.float()).double(),
        Categorical().fisher_factor(h.float().double(), xi),
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("e", [1e-4, 1e-12, 1e-20])
def test_columns_of_the_factor_keep_each_entrys_digits(e, double):
    h = one_hot(1, 4, [e])
    raw = [Decimal(x).exp() for x in h[0].tolist()]
    p = [x / sum(raw) for x in raw]
    passes = list(Categorical().hutchinson_passes(h[None], None))
    for c, root in enumerate(q.sqrt() for q in p):
        column = Categorical().fisher_factor(h, torch.eye(4)[c : c + 1])[0]
        for y in range(4):
            want = pytest.approx(float(root * ((y == c) - p[y])), rel=1e-12, abs=0)
            assert float(column[y]) == want
            assert float(passes[c].cotangent[0, 0, y]) == want


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_hutchinson_passes_equal_all_sign_vectors(family, masked, double):
    h = torch.randn(2, 3, 2)
    shape = family.label_shape(h)
    mask = (torch.rand(shape) < 0.6) if masked else None
    keep = torch.ones(shape) if mask is None else mask.double()
    keep = keep.unsqueeze(-1) if len(shape) == 2 else keep
    jacobian = torch.randn(2, 6, 5)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)))
    second, fourth = torch.zeros(2, 5), torch.zeros(2, 5)
    for xi in signs:
        seed = family.fisher_factor(h, xi.view(1, 3, 2).expand_as(h)) * keep
        g = torch.einsum("bc,bcp->bp", seed.reshape(2, 6), jacobian)
        second, fourth = second + g**2 / len(signs), fourth + g**4 / len(signs)
    want = fourth - second**2
    passes = list(family.hutchinson_passes(h, mask))
    assert len({x.block for x in passes}) == len(passes) == 6
    a2, a4, r = torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 5)
    for one in passes:
        assert one.cotangent.shape == h.shape
        g = torch.einsum("bc,bcp->bp", one.cotangent.reshape(2, 6), jacobian)
        a2 = a2 + one.square[:, None] * g**2
        a4 = a4 + one.quartic[:, None] * g**4
        r = r + (one.square[:, None] * g**2) ** 2
    assert torch.allclose(a2, second, rtol=1e-12)
    assert torch.allclose(a4 - 3 * r + 2 * a2**2, want, rtol=1e-10, atol=1e-14)
    assert torch.allclose(2 * (a2**2 - a4), want, rtol=1e-10, atol=1e-14)
    fisher = family.output_fisher(h) * keep.unsqueeze(-1)
    if len(shape) == 3:
        fisher = fisher * keep.unsqueeze(-2)
    full = torch.stack([torch.block_diag(*f) for f in fisher])
    assert torch.allclose(a2, torch.einsum("bcp,bcd,bdp->bp", jacobian, full, jacobian))


def test_hutchinson_passes_come_one_at_a_time():
    h = torch.zeros(1, 512, 30000)
    one = next(Categorical().hutchinson_passes(h, None))
    assert one.cotangent.shape == h.shape and int((one.cotangent != 0).sum()) == 30000


def test_data_scores_are_scores_and_zero_where_ignored(double):
    h = torch.randn(2, 3, 4)
    y = torch.tensor([[0, -100, 3], [-100, 1, 2]], dtype=torch.int32)
    Categorical().check_labels(h, y)
    have = Categorical().data_score(h, y)
    for b, t in itertools.product(range(2), range(3)):
        if y[b, t] == -100:
            want = torch.zeros(4)
        else:
            want = Categorical().score(h[b : b + 1, t], y[b : b + 1, t].long())[0]
        assert torch.equal(have[b, t], want)
    moved = Categorical(class_dim=1).data_score(h.movedim(-1, 1), y)
    assert torch.equal(moved.movedim(1, -1), have)
    h.requires_grad_()
    loss = torch.nn.functional.cross_entropy(h.flatten(0, 1), y.long().flatten(), reduction="sum")
    (want,) = torch.autograd.grad(-loss, h)
    assert torch.allclose(have, want, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("family", INDEPENDENT, ids=lambda f: f.name)
def test_data_scores_of_independent_families_take_any_type(family, dtype):
    h = torch.randn(3, 2)
    y = torch.tensor([[0, 1], [1, 1], [0, 0]])
    family.check_labels(h, y.to(dtype))
    have = family.data_score(h, y.to(dtype))
    assert have.dtype == torch.float32
    assert torch.equal(have, family.score(h, y.double()))


def test_large_counts_keep_their_digits():
    h, y = torch.tensor([[9.0]]).bfloat16(), torch.tensor([[8101]])
    assert float(Poisson().data_score(h, y)) == pytest.approx(8101 - math.exp(9), rel=1e-5, abs=0)


@pytest.mark.parametrize(
    "family, shape, labels, message",
    [
        (Categorical(), (2, 3), torch.tensor([[0], [1]]), r"shape \(2,\) .*got \(2, 1\).*reshape\(2,\)"),
        (Categorical(), (2, 3), torch.eye(3)[:2], r"labels.argmax\(-1\) of one-hot"),
        (Categorical(), (2, 3), torch.zeros(4).long(), r"got \(4,\).*-100 where"),
        (Categorical(), (2, 3), torch.zeros(2), r"type torch.float32.*labels.long\(\)"),
        (Categorical(), (2, 3), torch.tensor([0, 3]), r"from 0 to 2, got 1 of 2 outside, the first 3"),
        (Categorical(), (2, 3), torch.tensor([-1, 2]), r"the first -1. .*ignored positions to -100"),
        (Bernoulli(), (2, 1), torch.zeros(2), r"shape \(2, 1\).*got \(2,\).*labels.view_as\(outputs\)"),
        (Bernoulli(), (2, 2), torch.zeros(2), r"one label per output component\.$"),
        (Bernoulli(), (2,), torch.tensor([0.5, 1]), r"0 or 1.*got 1 of 2 other values, the first 0.5"),
        (Bernoulli(), (2,), torch.tensor([0, 2]), "0 or 1.*the first 2"),
        (Poisson(), (2,), torch.tensor([-1, 2]), "whole numbers from 0.*the first -1"),
        (Poisson(), (2,), torch.tensor([1.5, 2]), r"'poisson', got 1 of 2 other values, the first 1.5"),
        (Poisson(), (2,), torch.tensor([torch.inf, 2]), "the first inf"),
        (Gaussian(), (2,), torch.tensor([torch.nan, 2]), "finite numbers.*the first nan"),
        (Gaussian(), (2,), torch.zeros(2, dtype=torch.complex64), "must be real numbers"),
        (own_family(), (2,), torch.tensor([torch.nan, 2]), "'negative binomial', got 1 of 2 other values, the first nan"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit(family, shape, labels, message):
    with pytest.raises(FimprobeError, match=message):
        family.check_labels(torch.zeros(shape), labels)
