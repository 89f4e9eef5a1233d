"""Reach of the gradient of a backward pass: to the outputs, or on to the parameters."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import nn

from fimprobe.model.fsdp.placement import is_part


class Reach(IntEnum):
    """Extent of the backward passes of one forward; the batch with the largest value is measured.

    An optimizer uses the gradients that a backward pass accumulates. A pass that stops at the inputs
    (adversarial examples, saliency, gradient penalties) does not change them.
    """

    UNFINISHED = 0
    """The forward did not return."""
    UNREACHED = 1
    """The outputs are differentiable, and no gradient arrived at them."""
    UNKNOWN = 2
    """No output is differentiable, so an arriving gradient cannot be observed."""
    OUTPUTS = 3
    """A gradient arrived at the outputs; none is returned or accumulated for the parameters."""
    RETURNED = 4
    """``torch.autograd.grad`` returns the gradients of the parameters."""
    ACCUMULATED = 5
    """The backward pass accumulates into the parameters."""


def current_reach(model: nn.Module) -> Reach:
    """Return how far the backward pass that is running reaches beyond the outputs of ``model``.

    Call it inside a hook on a gradient. Only the autograd graph is read, no tensor.

    >>> net, reaches = nn.Linear(2, 1), []
    >>> out = net(torch.ones(1, 2))
    >>> handle = out.register_hook(lambda gradient: reaches.append(current_reach(net)))
    >>> out.sum().backward()
    >>> reaches[0].name
    'ACCUMULATED'
    """
    for parameter in model.parameters():
        # the sharded parameters of FSDP are not themselves part of the graph
        if not parameter.requires_grad or is_part(parameter):
            continue
        try:
            node = torch.autograd.graph.get_gradient_edge(parameter).node
        except AttributeError:  # inside a transform of torch.func
            continue
        try:
            if torch._C._will_engine_execute_node(node):
                return Reach.ACCUMULATED
        except RuntimeError:  # raised for the parameters whose gradient autograd.grad returns
            return Reach.RETURNED
    return Reach.OUTPUTS
