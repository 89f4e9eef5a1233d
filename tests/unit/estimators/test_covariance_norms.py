"""Cov Î₁ and Cov Î₂ as whole tensors, eq. (12)–(16): theory, pure functions and reports against them."""

import itertools
import math

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.engines.tracing.plan import Plan
from fimprobe.estimators.covariance_norms import (
    MAX_DENSE_PASSES,
    hessian_covariance_square,
    score_covariance_norm,
    score_covariance_spectral_norm,
)
from fimprobe.likelihoods import Gaussian, get_likelihood
from tests.oracles import brute_force, dense
from tests.support.repetitions import few_or_many, limit

pytestmark = pytest.mark.usefixtures("raw_numbers")

KINDS = (
    "covariance_norm",
    "covariance_spectral_norm",
    "label_variance",
    "total_label_variance",
)


def quiet(report):
    return not any("VIOLATED" in line for line in report.advice)


def passes_of(setting, b=0):
    """Γ's ingredients of one input: seeds [n, C], weights of g² and g⁴, blocks."""
    h = setting.model(setting.args[0][b : b + 1]).detach()
    found = list(get_likelihood(setting.likelihood).exact_passes(h, None))
    seeds = torch.stack([p.cotangent.flatten() for p in found])
    second = torch.stack([p.square[0] for p in found])
    fourth = torch.stack([p.quartic[0] for p in found])
    return seeds, second, fourth, torch.tensor([p.block for p in found])


@pytest.mark.parametrize("name", dense.MAKERS)
def test_equations_12_13_15_16(name, double):
    """The tensors by labels equal those by I(h) and M; diagonals and sums are their traces."""
    _, truth = dense.setting(name)
    for t in truth:
        everything = torch.arange(len(t.fisher))
        j, count, size = t.jacobian, len(everything), len(t.scores[0])
        moment = t.moment.view(size, size, size, size)
        twelve = torch.einsum("ai,bj,ck,dl,abcd->ijkl", j, j, j, j, moment)
        cov = t.cov1(everything)
        assert torch.allclose(cov, twelve.reshape(count**2, count**2), rtol=1e-9, atol=1e-13)
        quartic = t.weights @ t.g(everything).pow(4)
        thirteen = quartic - t.fisher.diagonal().square()
        assert torch.allclose(t.v1(everything), thirteen, rtol=1e-9, atol=1e-13)
        h = t.hessian
        fifteen = torch.einsum("aij,ab,bkl->ijkl", h, t.output_fisher, h)
        cov2 = t.cov2(everything)
        assert torch.allclose(cov2, fifteen.reshape(count**2, count**2), rtol=1e-9, atol=1e-13)
        own = h.diagonal(dim1=1, dim2=2)
        sixteen = torch.einsum("ai,ab,bi->i", own, t.output_fisher, own)
        assert torch.allclose(t.v2, sixteen, rtol=1e-9, atol=1e-13)
        assert float(cov2.trace()) == pytest.approx(t.l2(everything), rel=1e-9)
        assert float(cov2.trace()) > 1e-6 and float(cov.trace()) > 1e-6


@pytest.mark.parametrize("name", dense.MAKERS)
def test_exact_reports_equal_the_tensors(name, double):
    setting, truth = dense.setting(name)
    report = fimprobe.measure(
        setting.model,
        setting.args,
        likelihood=setting.likelihood,
        draws="exact",
        estimators=("i1",),
    )
    assert quiet(report)
    for key, index in brute_force.groups(setting.model).items():
        want, have = dense.averaged(truth, index, "first"), brute_force.group_of(report, key).i1
        for kind in KINDS:
            value = getattr(have, kind)
            if value is None:  # one output: Γ is a number, of which i1 makes no matrix total
                assert (name, kind) == ("bernoulli 1", "total_label_variance")
                continue
            assert value == pytest.approx(want[kind], rel=1e-9, abs=1e-15), (key, kind)


@pytest.mark.parametrize("name", dense.MAKERS)
def test_pure_functions_equal_the_tensors(name, double):
    """Each input and every group by itself, from Γ and S of dense Jacobians and Hessians."""
    setting, truth = dense.setting(name)
    for b, t in enumerate(truth):
        seeds, second, fourth, blocks = passes_of(setting, b)
        for index in brute_force.groups(setting.model).values():
            g = seeds @ t.jacobian[:, index]
            want = t.cov1(index)
            have = score_covariance_norm(g @ g.T, second, fourth, blocks)
            assert float(have) == pytest.approx(float(want.norm()), rel=1e-9, abs=1e-15)
            assert len(blocks) <= MAX_DENSE_PASSES
            top = score_covariance_spectral_norm(g @ g.T, second, fourth, blocks)
            largest = float(torch.linalg.eigvalsh(want)[-1])
            assert float(top) == pytest.approx(largest, rel=1e-9, abs=1e-15)
            r = seeds @ t.block(index)
            square = hessian_covariance_square((r @ r.T).unsqueeze(0), second)
            assert float(square) == pytest.approx(
                float(t.cov2(index).square().sum()), rel=1e-9, abs=1e-18
            )


def test_a_single_output_is_no_label_even_where_its_moments_are_alike(double):
    """σ² = 3 has 1/σ² = 3/σ⁴: weights alone do not tell a component from a class."""
    third = torch.tensor([1 / 3])
    gram = torch.tensor([[2.0]])
    want = (1 / 3 - 1 / 9) * 4
    for f in (score_covariance_norm, score_covariance_spectral_norm):
        assert float(f(gram, third, third, torch.tensor([0]))) == pytest.approx(want, rel=1e-12)


def test_many_passes_have_a_norm_and_no_dense_spectrum(double):
    """Five components with their moments, in 8 dimensions, against enumeration of the sum of terms."""
    g, v = torch.randn(8, 8), torch.rand(8)
    m = v.square() * (1 + 3 * torch.rand(8))
    fisher = (g.T * v) @ g
    cov = torch.einsum("s,si,sj,sk,sl->ijkl", m - 3 * v.square(), g, g, g, g)
    cov += torch.einsum("ik,jl->ijkl", fisher, fisher) + torch.einsum("il,jk->ijkl", fisher, fisher)
    have = score_covariance_norm(g @ g.T, v, m, torch.arange(8))
    assert float(have) == pytest.approx(float(cov.norm()), rel=1e-10)
    assert score_covariance_spectral_norm(g @ g.T, v, m, torch.arange(8)) is None
    few = slice(0, MAX_DENSE_PASSES)
    fisher = (g[few].T * v[few]) @ g[few]
    cov = torch.einsum("s,si,sj,sk,sl->ijkl", (m - 3 * v.square())[few], *[g[few]] * 4)
    cov += torch.einsum("ik,jl->ijkl", fisher, fisher) + torch.einsum("il,jk->ijkl", fisher, fisher)
    top = score_covariance_spectral_norm(
        g[few] @ g[few].T, v[few], m[few], torch.arange(MAX_DENSE_PASSES)
    )
    assert float(top) == pytest.approx(
        float(torch.linalg.eigvalsh(cov.reshape(64, 64))[-1]), rel=1e-10
    )


@pytest.mark.parametrize("classes", [(3, 3), (2, 3, 2)])
def test_positions_of_several_classes(classes, double):
    """Three positions, the whole against enumeration of all labellings."""
    blocks = torch.tensor([t for t, c in enumerate(classes) for _ in range(c)])
    p = torch.cat([torch.randn(c).mul(2).softmax(0) for c in classes])
    first = torch.randn(len(p), 4)
    g = torch.cat(
        [first[blocks == t] - p[blocks == t] @ first[blocks == t] for t in range(len(classes))]
    )
    rows = [torch.arange(len(p))[blocks == t] for t in range(len(classes))]
    outers, weights = [], []
    for picks in torch.cartesian_prod(*rows):
        whole = g[picks].sum(0)
        outers.append(torch.outer(whole, whole).flatten())
        weights.append(p[picks].prod())
    cov = dense._covariance(torch.stack(outers), torch.stack(weights))
    have = score_covariance_norm(g @ g.T, p, p, blocks)
    assert float(have) == pytest.approx(float(cov.norm()), rel=1e-10)
    top = score_covariance_spectral_norm(g @ g.T, p, p, blocks)
    if len(p) <= MAX_DENSE_PASSES:
        assert float(top) == pytest.approx(float(torch.linalg.eigvalsh(cov)[-1]), rel=1e-10)
    else:
        assert top is None


@pytest.mark.parametrize("name", ["categorical", "two positions", "bernoulli 3", "poisson"])
def test_probed_squares_are_unbiased(name, double):
    """E Σ w w (mean of different probes' products) = ‖Cov Î₂‖², from random signs and dense R."""
    setting, truth = dense.setting(name)
    seeds, second, _, _ = passes_of(setting)
    t = truth[0]
    index = torch.arange(len(t.fisher))
    r = torch.einsum("yc,cpq->ypq", seeds, t.hessian)
    u = torch.randint(2, (4000, 4, len(index))).double() * 2 - 1
    bent = torch.einsum("ypq,njq->jnyp", r, u)
    squares = hessian_covariance_square(bent @ bent.mT, second.expand(4000, -1))
    want = float(t.cov2(index).square().sum())
    error = float(squares.std()) / len(squares) ** 0.5
    assert abs(float(squares.mean()) - want) < 4 * error < 0.4 * want
    # with a probe's own products kept, it would be far off
    biased = (second[:, None] * second * (bent @ bent.mT).mean(0).square()).sum((-2, -1))
    assert float(biased.mean()) > want + 8 * error


@pytest.mark.parametrize("seeds", few_or_many(16, 40))
@pytest.mark.parametrize("name", ["categorical", "two positions", "bernoulli 3", "gaussian"])
def test_reported_second_norms_square_to_the_tensors(name, seeds, double):
    """Of one input, where every group's square is positive; with many probes λ_max comes out too."""
    setting, truth = dense.setting(name)
    groups, plan, seen = brute_force.groups(setting.model), Plan(), {}
    kinds = ("covariance_norm", "label_variance", "total_label_variance")
    for seed in range(seeds):
        report = fimprobe.measure(
            setting.model,
            setting.args[0][:1],
            likelihood=setting.likelihood,
            draws="exact",
            second_order={"probes": 12},
            seed=seed,
            plan=plan,
        )
        assert quiet(report)
        for key in groups:
            e = brute_force.group_of(report, key).i2
            for kind in kinds:
                value = getattr(e, kind)
                seen.setdefault((key, kind), []).append(value**2 if kind == kinds[0] else value)
    told = most = 0
    for (key, kind), values in seen.items():
        want = truth[0].second(groups[key])[kind]
        x = torch.tensor(values)
        error = float(x.std()) / len(x) ** 0.5
        if kind == kinds[0]:
            want = want**2
            if want < 1e-20:
                assert float(x.max()) < 1e-20
                continue
            if float(x.min()) <= 0:  # a square that was cut off at zero is biased
                continue
        assert abs(float(x.mean()) - want) <= limit(seeds) * error + 1e-10 * want + 1e-20, (key, kind)
        told += error < 0.25 * want * (40 / seeds) ** 0.5
        most += want > 0  # not in the last layer
    assert told >= 0.7 * most > 5, (told, most)


@pytest.mark.parametrize("seeds", few_or_many(1, 3))
def test_many_probes_give_the_largest_eigenvalue(seeds, double):
    setting, truth = dense.setting("categorical")
    tops = [
        fimprobe.measure(
            setting.model,
            setting.args,
            likelihood="categorical",
            draws="exact",
            second_order={"probes": 150},
            seed=seed,
        ).total.i2
        for seed in range(seeds)
    ]
    want = dense.averaged(truth, torch.arange(len(truth[0].fisher)), "second")
    for kind in ("covariance_spectral_norm", "covariance_norm", "sharp_bound"):
        have = dense.mean(getattr(t, kind) for t in tops)
        assert have == pytest.approx(want[kind], rel=0.1 * (3 / seeds) ** 0.5), kind


# -- numbers near one-hot and near even odds ------------------------------------------------------


def reference(jacobian, logits):
    """‖Cov Î₁‖_F, λ_max, Σ V1, L1, ‖M‖_F, s_max⁴‖M‖ of a softmax in 60 digits."""
    from mpmath import mp, mpf

    with mp.workdps(60):
        h = [mpf(x) for x in logits.tolist()]
        top = max(h)
        z = [mp.e ** (x - top) for x in h]
        total = sum(z)
        p = [x / total for x in z]
        rows = [[mpf(x) for x in row] for row in jacobian.tolist()]
        count, width = len(p), len(rows[0])
        mean = [sum(p[a] * rows[a][i] for a in range(count)) for i in range(width)]
        g = [[rows[a][i] - mean[i] for i in range(width)] for a in range(count)]
        delta = [[(y == a) - p[a] for a in range(count)] for y in range(count)]

        def centred(vectors):
            gram = [
                [sum(a * b for a, b in zip(x, y, strict=True)) ** 2 for y in vectors] for x in vectors
            ]
            m = [sum(p[z] * gram[y][z] for z in range(count)) for y in range(count)]
            whole = sum(p[y] * m[y] for y in range(count))
            return [[gram[y][z] - m[y] - m[z] + whole for z in range(count)] for y in range(count)]

        def norm(c):
            return mp.sqrt(
                sum(p[y] * p[z] * c[y][z] ** 2 for y in range(count) for z in range(count))
            )

        c = centred(g)
        weighed = mp.matrix(
            [[mp.sqrt(p[y] * p[z]) * c[y][z] for z in range(count)] for y in range(count)]
        )
        squares = [
            [sum(p[y] * g[y][i] ** k for y in range(count)) for i in range(width)] for k in (2, 4)
        ]
        return {
            "covariance_norm": float(norm(c)),
            "covariance_spectral_norm": float(max(mp.eigsy(weighed, eigvals_only=True))),
            "label_variance": float(sum(q - s**2 for s, q in zip(*squares, strict=True))),
            "total_label_variance": float(sum(p[y] * c[y][y] for y in range(count))),
            "moment": float(norm(centred(delta))),
        }


@pytest.mark.parametrize("rest", [1e-4, 1e-10, 1e-12])
def test_near_one_hot_all_digits_stay(rest, double):
    """p_max = 1 − rest: nothing is negative, NaN or lost."""
    torch.manual_seed(2)
    net = dense.lively(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    with torch.no_grad():
        net[2].bias[1] += math.log(1 / rest)
    x = torch.randn(2, 3)
    report = fimprobe.measure(net, x, likelihood="categorical", draws="exact")
    assert quiet(report)
    for key, index in brute_force.groups(net).items():
        want, bounds = [], []
        for b in range(2):
            jac, h = brute_force.jacobian(net, (x,), b)
            j = torch.cat(list(jac.values()), 1)[:, index]
            one = reference(j, h)
            low = j - j.mean(0)
            bounds.append(
                (
                    one["moment"] * float(j.square().sum()) ** 2,
                    one["moment"] * float(torch.linalg.matrix_norm(low, 2)) ** 4,
                )
            )
            want.append(one)
        e = brute_force.group_of(report, key).i1
        for kind in KINDS:
            truth = dense.mean(w[kind] for w in want)
            # an entry that all labels but the top one leave alone has g of 1e-10 and less
            assert getattr(e, kind) == pytest.approx(truth, rel=1e-8), (key, kind)
        assert e.bound == pytest.approx(dense.mean(a for a, _ in bounds), rel=1e-8)
        assert e.sharp_bound == pytest.approx(dense.mean(a for _, a in bounds), rel=1e-8)
        sizes = e.covariance_spectral_norm, e.covariance_norm, e.sharp_bound, e.bound
        assert sizes[0] > 0
        for small, large in itertools.pairwise(sizes):
            assert small <= large * (1 + 1e-12)
        second = brute_force.group_of(report, key).i2
        assert second.bound >= 0 and second.trace_bound >= 0
        assert second.covariance_norm >= 0 and "covariance_norm" not in second.unknown


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-1, 3e-3, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("outputs", [1, 2])
def test_undecided_bernoulli_violates_no_bound(outputs, scale, dtype):
    """A fresh binary classifier: (17) is an equality for one output, and m − v² is next to nothing."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).to(dtype)
    with torch.no_grad():
        for p in net[2].parameters():
            p.mul_(scale)
    x = torch.randn(6, 3, dtype=dtype)
    report = fimprobe.measure(net, x, likelihood="bernoulli", draws="exact", estimators=("i1",))
    assert quiet(report)
    e = report.total.i1
    if outputs == 2:
        assert 0 < e.covariance_norm < e.bound
        return
    h = net(x).detach().double().flatten()
    p, want = torch.sigmoid(h), []
    for b in range(6):
        j = torch.cat(list(brute_force.jacobian(net, (x,), b)[0].values()), 1).double()
        excess = p[b] * (1 - p[b]) * torch.tanh(h[b] / 2) ** 2  # m − v² = pq(1 − 2p)²
        want.append(j.square().sum() ** 2 * excess)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3 if scale < 1e-5 else 1e-6
    assert e.covariance_norm == pytest.approx(dense.mean(want), rel=tolerance)
    assert e.bound == pytest.approx(e.covariance_norm, rel=tolerance)


def test_gaussian_covariance_is_twice_fisher_squared(double):
    """(12) for Gaussian outputs is F⊗F(1 + swap): ‖Cov‖² = 2(‖F‖⁴ + ‖F²‖²)."""
    net = dense.lively(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3)))
    x = torch.randn(1, 2)
    report = fimprobe.measure(net, x, likelihood=Gaussian(0.5), draws="exact", estimators=("i1",))
    j = torch.cat(list(brute_force.jacobian(net, (x,), 0)[0].values()), 1)
    fisher = 4 * j.T @ j
    want = (2 * fisher.square().sum() ** 2 + 2 * (fisher @ fisher).square().sum()).sqrt()
    assert report.total.i1.covariance_norm == pytest.approx(float(want), rel=1e-10)
