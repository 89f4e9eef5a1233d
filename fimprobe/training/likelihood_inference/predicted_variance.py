"""Which outputs of a model are the mean and the variance that ``torch.nn.GaussianNLLLoss`` reads.

The loss c Σ (log v + (y − m)²/v)/2 has the gradients c(m − y)/v and c(1/v − (y − m)²/v²)/2. Without y
they determine c for each variance. It is the same for all of them if, and only if, the outputs are a
mean and a variance, in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods.mean_and_variance import align_variance
from fimprobe.training.capture.captured_output import CapturedOutput
from fimprobe.training.likelihood_inference.loss_inference import gradient_tolerance

MIN_VARIANCES = 4
"""Variances with a gradient below which nothing is concluded from their values."""


class Pair(NamedTuple):
    """The outputs that are read, or why they are not known.

    Attributes:
        paths: Names of the mean and of the variance; empty if they are not known.
        reason: Why they are not known.
        final: Whether further batches cannot change that.
    """

    paths: tuple[str, ...]
    reason: str = ""
    final: bool = True


def find_pair(read: Mapping[str, CapturedOutput], eps: float) -> Pair:
    """Return which of the outputs that the loss reads are the mean and the variance.

    Args:
        read: The outputs with a gradient, both known and finite.
        eps: Below it the criterion takes this variance, without a change of the gradient.
    """
    # a gradient arrives at what the outputs are computed from, too
    last = {path: head for path, head in read.items() if not head.feeds & set(read)}
    read = last if len(last) == 2 else read
    names = ", ".join(map(repr, read))
    if len(read) != 2:
        outputs = "one output" if len(read) == 1 else f"{len(read)} outputs, {names}"
        return Pair((), f"the loss reads {outputs} of the model, not a mean and a variance")
    first, second = read
    verdicts = {
        order: _verdict(read[order[0]], read[order[1]], eps)
        for order in ((first, second), (second, first))
    }
    fitting = [order for order, verdict in verdicts.items() if verdict == "yes"]
    if len(fitting) == 1:
        return Pair(fitting[0])
    if fitting or "undecided" in verdicts.values():
        return Pair((), "the variances of a batch are too few to show which output is one", False)
    return Pair(
        (),
        f"the gradients at the outputs {names} are not those of a mean and its variance (a "
        "logarithm, a standard deviation, weights of the loss, or one output computed from the "
        "other)",
    )


def _verdict(mean: CapturedOutput, variance: CapturedOutput, eps: float) -> str:
    """Return "yes", "no" or "undecided": whether two outputs are a mean and its variance."""
    assert mean.outputs is not None and mean.gradient is not None
    assert variance.outputs is not None and variance.gradient is not None
    try:
        v = align_variance(variance.outputs.double(), mean.outputs.shape).clamp(min=eps)
    except FimprobeError:
        return "no"
    if bool((variance.outputs < 0).any()):
        return "no"
    g_v = variance.gradient.double().reshape(v.shape)
    squares = mean.gradient.double().square().sum_to_size(v.shape)
    labels = mean.outputs.numel() / v.numel()
    # the positive root of c² n/v − 2 g_v c − Σ g_m² = 0, without cancellation
    root = (g_v.square() + labels * squares / v).sqrt()
    scales = torch.where(g_v > 0, (g_v + root) * v / labels, squares / (root - g_v))
    scales = scales[(g_v != 0) | (squares != 0)]
    tolerance = 10 * gradient_tolerance(mean.outputs.dtype)
    same = bool(((scales / scales.median() - 1).abs() <= tolerance).all()) if len(scales) else True
    if not same:
        return "no"
    return "yes" if len(scales) >= MIN_VARIANCES else "undecided"
