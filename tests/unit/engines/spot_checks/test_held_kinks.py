"""Second differences of functions with kinks, against the smooth branch at the point."""

import pytest
import torch
import torch.nn.functional as F

from fimprobe.engines.spot_checks.held_kinks import CannotHold, HeldKinks

SMALL, WIDE = 0.3, 4.0
"""Steps that cross kinks: of values near zero, and of values up to five."""

FUNCTIONS = {
    "relu": torch.relu,
    "relu in place": lambda x: (x * 1).relu_(),
    "leaky relu": F.leaky_relu,
    "prelu": lambda x: F.prelu(x, torch.tensor([0.3])),
    "abs": torch.abs,
    "threshold": lambda x: F.threshold(x, 0.1, 0.2),
    "elu": lambda x: F.elu(x, 0.7),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 1.3),
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "softsign": F.softsign,
    "clamp": lambda x: x.clamp(-0.2, 0.4),
    "clamp by tensors": lambda x: torch.clamp(x, torch.tensor(-0.2), torch.tensor(0.4)),
    "maximum": lambda x: torch.maximum(x, x.square() - 0.1),
    "minimum": lambda x: torch.minimum(x, 0.2 - x.square()),
    "largest": lambda x: x.square().max(),
    "largest of rows": lambda x: x.view(2, -1).sin().max(1)[0],
    "largest of both dimensions": lambda x: x.view(2, -1).sin().amax((0, 1)),
    "smallest of columns": lambda x: x.view(2, -1).sin().min(0, keepdim=True)[0],
    "largest two": lambda x: x.sin().topk(2)[0],
    "sorted": lambda x: x.sin().sort()[0],
    "sorted stably": lambda x: x.sin().sort(dim=0, stable=True)[0],
    "pooled": lambda x: F.max_pool2d(x.sin().view(1, 1, 2, 3), (1, 2), stride=1),
    "pooled in one dimension": lambda x: F.max_pool1d(x.sin().view(1, 1, 6), 2),
    "pooled adaptively": lambda x: F.adaptive_max_pool2d(x.sin().view(1, 1, 2, 3), 1),
    "written by hand": lambda x: torch.where(x > 0, x.square(), x.exp()),
    "gated by comparison": lambda x: x * (x > 0),
    "rounded": lambda x: x * x.round(),
    "decided by a value": lambda x: x.exp() if x.sum().item() > 0 else x.sin(),
}


def held_values(f, x, step):
    """f(x), and [f(x + step), f(x − step)] of the branch at x."""
    held = HeldKinks()
    with held:
        middle = f(x)
    moved = []
    for sign in (1, -1):
        held.follow()
        with held:
            moved.append(f(x + sign * step))
    return middle, moved


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "hardsigmoid"])  # torch has no R of it
@pytest.mark.parametrize("scale", [SMALL, WIDE])
def test_a_held_difference_is_that_of_the_smooth_branch(double, name, scale):
    f = FUNCTIONS[name]
    x = torch.randn(6) * scale
    direction = torch.randn(6)
    far, near = 0.3 * scale, 1e-4
    for step in (near, far):
        middle, moved = held_values(f, x, step * direction)
        if step == near:
            with torch.no_grad():
                assert torch.allclose(middle, f(x))
            second = torch.autograd.functional.hvp(lambda v: f(v).sum(), x, direction)[1] @ direction
            difference = (sum(moved) - 2 * middle).sum() / step**2
            assert abs(difference - second) < 1e-4 * (1 + abs(second))
        assert all(torch.isfinite(m).all() for m in moved)


@pytest.mark.parametrize("name", ["relu", "hardtanh", "hardsigmoid", "abs", "clamp"])
def test_a_piecewise_linear_function_has_no_second_difference(double, name):
    f = FUNCTIONS[name]
    x, direction = torch.randn(6), torch.randn(6)
    middle, moved = held_values(f, x, 3 * direction)
    assert (sum(moved) - 2 * middle).abs().max() < 1e-12


def test_other_operations_at_the_shifted_point_are_refused():
    held = HeldKinks()
    with held:
        torch.relu(torch.randn(3))
    held.follow()
    with held, pytest.raises(CannotHold, match="other operations"):
        torch.abs(torch.randn(3))


def test_an_operation_that_is_not_held_is_refused():
    with HeldKinks(), pytest.raises(CannotHold, match="median"):
        torch.randn(3, 3).median(1)


def test_no_branch_of_whole_numbers_is_recorded():
    held = HeldKinks()
    with held:
        torch.where(torch.arange(3) > 1, torch.randn(3), torch.zeros(3)).sin()
    assert held.branches == []
