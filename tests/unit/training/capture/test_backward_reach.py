"""How far backward passes reach, and what a captured batch keeps of each."""

import pytest
import torch
from torch import nn

from fimprobe.training.capture.backward_reach import Reach, current_reach
from fimprobe.training.capture.captured_output import CapturedOutput
from tests.models.small import mlp


def reaches(backward, freeze=False):
    """The reach of each backward pass through one forward, seen at its outputs."""
    model, x = mlp(3, 4, 2).requires_grad_(not freeze), torch.randn(5, 3, requires_grad=True)
    seen = []
    out = model(x)
    out.register_hook(lambda gradient: seen.append(current_reach(model)))
    backward(model, x, out)
    return seen


def parameters(model):
    return list(model.parameters())


def penalty(model, x, out):
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (out.square().sum() + slope.square().sum()).backward()


CASES = {
    "backward": (lambda model, x, out: out.sum().backward(), [Reach.ACCUMULATED]),
    "of one parameter": (
        lambda model, x, out: out.sum().backward(inputs=[model[2].weight]),
        [Reach.ACCUMULATED],
    ),
    "of the inputs": (lambda model, x, out: out.sum().backward(inputs=[x]), [Reach.OUTPUTS]),
    "gradients of the inputs": (
        lambda model, x, out: torch.autograd.grad(out.sum(), x),
        [Reach.OUTPUTS],
    ),
    "gradients of the parameters": (
        lambda model, x, out: torch.autograd.grad(out.sum(), parameters(model)),
        [Reach.RETURNED],
    ),
    "gradients of the last layer": (
        lambda model, x, out: torch.autograd.grad(out.sum(), model[2].bias),
        [Reach.RETURNED],
    ),
    "gradient penalty": (penalty, [Reach.OUTPUTS, Reach.ACCUMULATED]),
}


@pytest.mark.parametrize("name", CASES)
def test_reach_of_a_backward_pass(name):
    backward, expected = CASES[name]
    assert reaches(backward) == expected


def test_frozen_parameters_are_not_reached():
    assert reaches(lambda model, x, out: out.sum().backward(), freeze=True) == [Reach.OUTPUTS]


def test_only_the_farthest_passes_count():
    captured = CapturedOutput()
    assert captured.accepts(Reach.OUTPUTS)
    captured.store_gradient(torch.ones(2))
    assert captured.accepts(Reach.ACCUMULATED) and captured.gradient is None
    captured.store_gradient(torch.full((2,), 3.0))
    assert not captured.accepts(Reach.OUTPUTS) and not captured.accepts(Reach.RETURNED)
    assert captured.accepts(Reach.ACCUMULATED)
    captured.store_gradient(torch.tensor([0.0, 1.0]))
    assert captured.gradient.tolist() == [3.0, 4.0]


def test_a_gradient_that_was_overwritten_does_not_come_back():
    captured = CapturedOutput()
    captured.accepts(Reach.ACCUMULATED)
    first = torch.ones(2)
    captured.store_gradient(first)
    assert captured.gradient is not None
    first.mul_(2)
    assert captured.gradient is None
    captured.store_gradient(torch.ones(2))  # the sum is not known any more
    assert captured.gradient is None


def test_outputs_and_their_changes():
    outputs = nn.Linear(2, 2)(torch.ones(1, 2))
    captured = CapturedOutput()
    assert captured.outputs is None and not captured.changed
    captured = CapturedOutput(outputs.detach())
    assert captured.outputs is not None and not captured.changed_before_loss
    captured.store_gradient(torch.ones(1, 2))
    with torch.no_grad():
        outputs[0, 0] = 1.0
    assert captured.outputs is None and captured.changed
    assert not captured.changed_before_loss  # the gradient came first
    captured.store_gradient(torch.ones(1, 2))
    assert captured.changed_before_loss
    captured.release()
    assert captured.outputs is None and captured.gradient is None and not captured.changed
