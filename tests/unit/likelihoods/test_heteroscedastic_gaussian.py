"""A Gaussian with a predicted variance, against Gauss-Hermite quadrature over its labels."""

import numpy as np
import pytest
import torch

from fimprobe.errors import BatchError, FimprobeError
from fimprobe.likelihoods import HeteroscedasticGaussian, get_likelihood, sample
from fimprobe.likelihoods.mean_and_variance import find_mean_and_variance, natural_parameters
from fimprobe.likelihoods.output_mask import spread_mask
from fimprobe.likelihoods.size_biased import has_size_biased_draws

FAMILY = HeteroscedasticGaussian()
MEAN = torch.tensor([[0.4, -3.0], [0.0, 20.0]], dtype=torch.float64)
VARIANCE = torch.tensor([[0.7, 2.0], [1e-3, 5.0]], dtype=torch.float64)
H = natural_parameters(MEAN, VARIANCE)
_NODES, _WEIGHTS = (torch.tensor(x) for x in np.polynomial.hermite_e.hermegauss(20))
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def scores(mean, variance):
    """Score in natural parameters of one label at the nodes [20, 2], by autograd of the density."""
    labels = mean + variance.sqrt() * _NODES
    rows = []
    for y in labels:
        h = torch.stack([mean / variance, -1 / (2 * variance)]).requires_grad_()
        m, v = -h[0] / (2 * h[1]), -1 / (2 * h[1])
        log_density = torch.distributions.Normal(m, v.sqrt()).log_prob(y)
        rows.append(torch.autograd.grad(log_density, h)[0])
    return torch.stack(rows), labels


def whole(b):
    """Weights and scores [400, 4] of both labels of one input."""
    of_labels = [scores(MEAN[b, k], VARIANCE[b, k])[0] for k in range(2)]
    pairs = [torch.cat([x, y]) for x in of_labels[0] for y in of_labels[1]]
    return torch.outer(_WEIGHTS, _WEIGHTS).flatten(), torch.stack(pairs)


def test_scores_are_derivatives_of_the_log_density():
    for b in range(2):
        for k in range(2):
            want, labels = scores(MEAN[b, k], VARIANCE[b, k])
            have = FAMILY.score(H[b, k].expand(20, 2), labels)
            torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


def test_norms_and_factors_equal_quadrature():
    norms = FAMILY.norms(H, None)
    for b in range(2):
        weights, delta = whole(b)
        fisher = (delta * weights[:, None]).T @ delta
        products = torch.einsum("ni,nj->nij", delta, delta).flatten(1) - fisher.flatten()
        moment = (products * weights[:, None]).T @ products
        want = {
            "fisher_norm": fisher.norm(),
            "fisher_trace": fisher.trace(),
            "fisher_max": torch.linalg.eigvalsh(fisher)[-1],
            "fisher_min": torch.linalg.eigvalsh(fisher)[0],
            "moment_norm": moment.norm(),
            "moment_trace": moment.trace(),
            "moment_max": torch.linalg.eigvalsh(moment)[-1],
        }
        for name, value in want.items():
            assert float(getattr(norms, name)[b]) == pytest.approx(float(value), rel=1e-6), name
        blocks = torch.block_diag(*FAMILY.output_fisher(H)[b])
        torch.testing.assert_close(blocks, fisher, rtol=1e-9, atol=1e-9 * float(fisher.max()))
        w = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        quadratic = FAMILY.fisher_quadratic(H[b : b + 1], w.view(1, 2, 2), None)
        assert float(quadratic) == pytest.approx(float(w @ fisher @ w), rel=1e-9)
        columns = torch.stack([p.cotangent[b].flatten() for p in FAMILY.hutchinson_passes(H, None)])
        torch.testing.assert_close(columns.T @ columns, blocks, rtol=1e-12, atol=0)


def test_five_labels_have_the_moments_of_all():
    """Second and fourth moments of any projection; fourth cumulants add over the two labels."""
    passes = list(FAMILY.exact_passes(H, None))
    assert len(passes) == FAMILY.count_passes(H) == 10
    direction = torch.tensor([0.3, -1.1, 2.0, 0.2], dtype=torch.float64)
    for b in range(2):
        weights, delta = whole(b)
        g = delta @ direction
        second = [0.0, 0.0]
        fourth = [0.0, 0.0]
        for p in passes:
            value = p.cotangent[b].flatten() @ direction
            second[p.block] += float(p.square[b] * value**2)
            fourth[p.block] += float(p.quartic[b] * value**4)
        cumulants = sum(m - 3 * v**2 for m, v in zip(fourth, second, strict=True))
        assert sum(second) == pytest.approx(float(weights @ g**2), rel=1e-9)
        assert cumulants + 3 * sum(second) ** 2 == pytest.approx(float(weights @ g**4), rel=1e-9)


def test_draws_have_the_mean_and_the_variance():
    labels = sample(FAMILY, H[:1].expand(40000, 2, 2), torch.Generator().manual_seed(0))
    residual = labels - MEAN[0]
    for values, mean in (
        (residual, 0.0),
        (residual**2, VARIANCE[0]),
        (residual**4, 3 * VARIANCE[0] ** 2),
    ):
        error = values.std(0) / 200
        assert bool(((values.mean(0) - mean).abs() <= 4 * error).all())
    assert not has_size_biased_draws(FAMILY, H)  # no label is rare


def test_masks_leave_labels_out():
    mask = torch.tensor([[True, False], [False, False]])
    alone = FAMILY.norms(H[:, :1], None)
    masked = FAMILY.norms(H, mask)
    assert float(masked.moment_trace[0]) == pytest.approx(float(alone.moment_trace[0]))
    assert float(masked.fisher_trace[1]) == 0.0
    assert [float(p.square[0]) > 0 for p in FAMILY.exact_passes(H, mask)] == [True] * 5 + [False] * 5
    assert spread_mask(FAMILY, mask, H).shape == (2, 2, 1)
    xi = torch.ones_like(H)
    assert FAMILY.fisher_factor(H, xi).shape == H.shape and FAMILY.label_shape(H) == (2, 2)


SHAPES = [((4, 3), (4, 3)), ((4, 3), (4, 1)), ((4, 3), (4,)), ((4, 3), (1, 3)), ((4,), (4,))]


@pytest.mark.parametrize(("mean", "variance"), SHAPES)
def test_shapes_of_the_variance_are_those_of_the_criterion(mean, variance):
    m, v = torch.randn(mean), torch.rand(variance) + 0.5
    torch.nn.GaussianNLLLoss()(m, m, v)  # it accepts them
    spread = v.unsqueeze(-1) if v.dim() < m.dim() else v
    h = FAMILY.select_outputs((m, v))
    assert h.shape == (*mean, 2)
    torch.testing.assert_close(-0.5 / h[..., 1], spread.expand(mean))
    torch.testing.assert_close(-0.5 * h[..., 0] / h[..., 1], m)


@pytest.mark.parametrize("variance", [(4, 2), (3,), (1, 1), ()])
def test_other_shapes_are_refused(variance):
    with pytest.raises(
        FimprobeError, match=r"must have the shape of the mean, \[4, 3\].*Pass output="
    ):
        natural_parameters(torch.zeros(4, 3), torch.ones(variance))


def test_what_is_a_mean_and_a_variance_is_not_guessed():
    m, v = torch.zeros(3), torch.ones(3)
    for returned in ((m, v), [m, v], {"mean": m, "var": v}, {"variance": v, "mean": m, "z": m}):
        found = find_mean_and_variance(returned)
        assert found[0] is m and found[1] is v
    for returned, words in (
        (torch.zeros(3, 2), r"got a tensor \[3, 2\]"),
        ((m, v, m), "got tuple"),
        ((m, None), "got tuple"),
        ({"loc": m, "scale": v}, r"got dict with \['loc', 'scale'\]"),
    ):
        with pytest.raises(FimprobeError, match=words + r"\. Pass output= a function"):
            find_mean_and_variance(returned)


BATCHES = [
    (0.0, 0.0, FAMILY, "variance must be positive and finite, got 1 of 2"),
    (0.0, -2.0, FAMILY, "got 1 of 2 others, such as -2"),
    (0.0, float("inf"), FAMILY, "positive and finite"),
    (0.0, 1e-7, HeteroscedasticGaussian(eps=1e-6), "at least eps=1e-06.*clamps it at eps"),
    (1e6, 1.0, FAMILY, "within 4e.04 standard deviations of 0 for torch.float32, got 1e.06"),
]


@pytest.mark.parametrize(("mean", "variance", "family", "words"), BATCHES)
def test_batches_that_no_number_could_describe(mean, variance, family, words):
    h = natural_parameters(torch.tensor([0.0, mean]), torch.tensor([1.0, variance]))
    with pytest.raises(BatchError, match=words):
        family.check_outputs(h)


def test_what_is_accepted():
    HeteroscedasticGaussian(eps=1e-6).check_outputs(
        natural_parameters(torch.ones(2), torch.full((2,), 1e-6))  # in float32 below 1e-6
    )
    FAMILY.check_outputs(H)
    FAMILY.check_labels(H, MEAN)
    assert get_likelihood("heteroscedastic_gaussian") == FAMILY
    for action, words in (
        (lambda: FAMILY.check_outputs(torch.zeros(3, 3)), r"natural parameters \[B, ..., 2\]"),
        (lambda: FAMILY.check_labels(H, MEAN[:, :1]), r"must have the outputs' shape \(2, 2\)"),
        (lambda: HeteroscedasticGaussian(eps=-1), "eps must be a finite number from 0, got -1"),
        (lambda: get_likelihood({"0": FAMILY}), "one tensor for each head"),
    ):
        with pytest.raises(FimprobeError, match=words):
            action()
