"""Which differences of squared gradients the guard takes for rounding."""

from types import SimpleNamespace

import pytest
import torch

from fimprobe.engines.autograd.tolerances import allowed_differences
from fimprobe.engines.autograd.verification import _disagreeing

ROUNDING = {torch.float64: 1e-15, torch.float32: 1e-6}


def moments_of(gradients):
    """Moments as an engine returns them, of gradients [B, ...] by name."""
    parameters = {
        name: SimpleNamespace(
            a2=g.square().sum(0), squared_norms=g.double().flatten(1).square().sum(1)[:, None]
        )
        for name, g in gradients.items()
    }
    return SimpleNamespace(parameters=parameters)


def singles_of(gradients):
    return {name: [(x, float(x.double().square().sum())) for x in g] for name, g in gradients.items()}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("fault", ["twice as large", "samples exchanged", "entries exchanged"])
def test_a_wrong_gradient_is_seen_at_a_thousandth_of_the_largest(dtype, fault):
    torch.manual_seed(0)
    right = {"large": torch.randn(3, 5, dtype=dtype), "small": 1e-3 * torch.randn(3, 5, dtype=dtype)}
    small = right["small"]
    wrong = {
        "twice as large": 2 * small,
        "samples exchanged": small.roll(1, 0),
        "entries exchanged": small.roll(1, 1),
    }[fault]
    singles = singles_of(right)
    assert _disagreeing(moments_of(right), singles, {dtype}) == []
    assert _disagreeing(moments_of(right | {"small": wrong}), singles, {dtype}) == ["small"]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", [1.0, 1e-3, 0.0])
def test_rounding_that_the_largest_gradient_explains_is_allowed(dtype, size):
    torch.manual_seed(0)
    right = {"large": torch.randn(3, 5, dtype=dtype), "small": size * torch.randn(3, 5, dtype=dtype)}
    rounded = right["small"] + ROUNDING[dtype] * torch.randn(3, 5, dtype=dtype)
    assert _disagreeing(moments_of(right | {"small": rounded}), singles_of(right), {dtype}) == []


def test_a_missing_parameter_is_seen_however_small():
    right = {"large": torch.ones(3, 5), "small": torch.full((3, 5), 1e-4)}
    computed = moments_of({"large": right["large"]})
    assert _disagreeing(computed, singles_of(right), {torch.float32}) == ["small"]


def test_half_precision_is_compared_coarsely():
    squares = torch.tensor([1.0, 0.0], dtype=torch.float64)
    allowed = allowed_differences(squares, 1.0, {torch.bfloat16, torch.float32})
    torch.testing.assert_close(allowed, torch.tensor([0.64, 0.04], dtype=torch.float64))
