"""Which outputs of a training forward are watched, and what of them the measurement needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fimprobe.errors import BatchError, FimprobeError
from fimprobe.likelihoods import Joint
from fimprobe.likelihoods.categorical import Categorical
from fimprobe.model.outputs import JoinedOutputs, named_outputs, select_outputs, selector_for
from fimprobe.training.capture.capture import Watched
from fimprobe.training.capture.captured_batch import CapturedBatch
from fimprobe.training.capture.captured_output import CapturedOutput
from fimprobe.training.likelihood_inference.data_labels import labels_from_gradient
from fimprobe.training.likelihood_inference.heads import find_feeds, find_heads, find_other_heads
from fimprobe.training.likelihood_inference.loss_inference import positions_with_gradient

OTHER = "other: "
"""Start of the keys of outputs that are watched although they are not measured."""

CHANGED_OUTPUTS = "the outputs of the model were changed in place after the forward"
"""What keeps labels and positions from being known."""


def watch_candidates(
    captured: CapturedBatch, returned: Any, output: Callable[[Any], Any] | None
) -> Watched:
    """Watch all outputs that the loss may read, to infer the likelihood from their gradients.

    Args:
        captured: The batch, which keeps what arrives.
        returned: What the model returned.
        output: The user's function from it to its outputs, or None.
    """
    heads = find_heads(returned, output)
    feeds = find_feeds(heads) if len(heads) > 1 else {}
    default = _default_output(returned) if output is None else None
    for path, x in heads.items():
        captured.heads[path] = CapturedOutput(
            x.detach(),
            has_positions=x.dim() > 2,
            feeds=feeds.get(path, frozenset()),
            is_default=x is default,
        )
    return {path: (x, CapturedOutput.store_gradient) for path, x in heads.items()}


def watch_measured(
    captured: CapturedBatch,
    returned: Any,
    likelihood: Any,
    output: Callable[[Any], Any] | None,
    *,
    labels: bool,
    positions: bool,
    others: bool,
) -> Watched:
    """Watch the outputs that are measured; notice whether the loss reads others.

    Args:
        captured: The batch, which keeps what arrives.
        returned: What the model returned.
        likelihood: The family of the labels.
        output: From what the model returned to the measured outputs; None for the default.
        labels: Whether the labels of the data are needed.
        positions: Whether the positions with a label are needed.
        others: Whether to notice outputs that are not measured.
    """
    watched: Watched = {}
    if isinstance(likelihood, Joint):
        measured = JoinedOutputs(paths=tuple(likelihood.families), output=output).heads(returned)
        for path, x in measured.items():
            captured.heads[path] = CapturedOutput(x.detach())
            store = positions_of(likelihood.families[path])
            watched[path] = (x, CapturedOutput.store_gradient if labels else store)
    else:
        x = selector_for(likelihood, output)(returned)
        measured = {"": x}
        captured.heads[""] = CapturedOutput(x.detach() if labels else None, has_positions=x.dim() > 2)
        if labels:
            watched[""] = (x, CapturedOutput.store_gradient)
        elif positions and x.dim() > 2:
            watched[""] = (x, positions_of(likelihood))
    unmeasured = find_other_heads(returned, measured) if others else {}
    if unmeasured and list(measured) == [""]:  # its name is for a note
        same = (path for path, other in named_outputs(returned).items() if other is measured[""])
        captured.heads[""].name = next(same, "")
    for path, x in unmeasured.items():
        captured.heads[OTHER + path] = CapturedOutput()
        watched[OTHER + path] = (x, CapturedOutput.store_presence)
    return watched


def positions_of(likelihood: Any) -> Callable[[CapturedOutput, Tensor], None]:
    """Return what stores the positions at which the gradient of one backward pass is not zero.

    Args:
        likelihood: The family of the labels.
    """

    def store(head: CapturedOutput, gradient: Tensor) -> None:
        head.gradient_arrived = True
        positions = _positions_with_gradient(gradient, likelihood, head)
        if head.label_positions is not None and positions is not None:
            positions = head.label_positions | positions
        head.label_positions = positions

    return store


def unmeasured_outputs(captured: CapturedBatch) -> tuple[set[str], list[str]]:
    """Return the outputs that the loss read and that are not measured, and the measured ones."""
    unmeasured = {
        path.removeprefix(OTHER)
        for path, head in captured.heads.items()
        if path.startswith(OTHER) and head.is_read is not None and bool(head.is_read)
    }
    measured = {
        path or head.name for path, head in captured.heads.items() if not path.startswith(OTHER)
    }
    return unmeasured, sorted(measured)


def joint_mask(captured: CapturedBatch, likelihood: Joint, chosen: bool) -> Tensor | None:
    """Return which labels of several heads the loss read, bool [B, Σ labels]; None for all.

    An output at which no gradient arrived has no labels in this batch.

    Args:
        captured: The batch.
        likelihood: The distribution of the labels.
        chosen: Whether a function of the user computes the outputs. The loss need not read what it
            returns: without a gradient there, all labels count.

    Raises:
        BatchError: If the outputs were changed in place.
    """
    masks = []
    for path, family in likelihood.families.items():
        head = captured.heads[path]
        outputs = _unchanged(head)
        positions = head.label_positions
        if positions is None and head.gradient is not None:
            positions = _positions_with_gradient(head.gradient, family, head)
        if positions is None:
            shape = family.label_shape(outputs)
            read = head.gradient_arrived or chosen
            positions = torch.full(shape, read, device=outputs.device)
        masks.append(positions.reshape(len(outputs), -1))
    mask = torch.cat(masks, 1)
    return None if bool(mask.all()) else mask


def joint_labels(captured: CapturedBatch, likelihood: Joint) -> Tensor:
    """Return the labels of several heads that the loss gradients imply, float64 [B, Σ labels].

    Args:
        captured: The batch.
        likelihood: The distribution of the labels.

    Raises:
        BatchError: If some labels are not known.
        FimprobeError: If a family's labels cannot be read off the loss.
    """
    labels = []
    for path, family in likelihood.families.items():
        head = captured.heads[path]
        outputs, gradient = _unchanged(head), head.gradient
        if gradient is None:
            gradient = torch.zeros_like(outputs)
        of_head = labels_from_gradient(outputs, gradient, family)
        labels.append(of_head.reshape(len(outputs), -1).double())
    return torch.cat(labels, 1)


def _positions_with_gradient(
    gradient: Tensor, likelihood: Any, head: CapturedOutput
) -> Tensor | None:
    """Return the labels that the loss reads; of a single output [B, C] they are not looked up."""
    if head.outputs is not None and isinstance(likelihood, Categorical) and gradient.dim() == 2:
        return gradient.any(likelihood.class_dim)
    return positions_with_gradient(gradient, likelihood)


def _unchanged(head: CapturedOutput) -> Tensor:
    """Return the values of an output."""
    if head.outputs is None:
        raise BatchError(f"{CHANGED_OUTPUTS}. Change them out of place.")
    return head.outputs


def _default_output(returned: Any) -> Tensor | None:
    """Return the output that is measured by default, or None."""
    try:
        return select_outputs(returned)
    except FimprobeError:
        return None
