"""Whether a loss that matches no family's score may be that of a regression.

Squared error has the gradient c(h − y) with any real y, so no gradient contradicts it. It is assumed
where a classifier is ruled out instead. The gradient of a softmax classifier sums to zero over the
classes, whatever its loss. That of a binary one (focal, hinge, squared error of a sigmoid) has two
values at each h: one for either label.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fimprobe.likelihoods import Gaussian
from fimprobe.training.likelihood_inference.loss_inference import Decision, gradient_tolerance

SIGMA_NOTICE = (
    "the noise level of a regression is not part of the model, so sigma=1 is used. The relative "
    "errors of Î₁ do not depend on it; traces scale with 1/sigma², and the relative errors of Î₂ "
    "from labels with sigma. Pass likelihood=fimprobe.likelihoods.Gaussian(sigma=...) with the "
    "standard deviation of the residuals"
)

MIN_OUTPUTS = 8
"""Outputs with a gradient below which nothing is concluded from their values."""


def infer_regression(outputs: Tensor, gradient: Tensor) -> Decision | None:
    """Return the Gaussian family unless the gradient may be that of a classifier.

    Args:
        outputs: h [B, ...], real numbers that are no probabilities.
        gradient: Of the loss at the outputs, of the same shape, which matches no family's score.

    Returns:
        The decision, which warns of the noise level; not final if there are too few outputs to rule a
        classifier out. None if it may be one.

    >>> h, y = torch.randn(2, 32, 1, generator=torch.Generator().manual_seed(0))
    >>> infer_regression(h, h - y).likelihood.name
    'gaussian'
    """
    g = gradient.double()
    if zero_sum_dims(outputs, g):
        return None
    nonzero = g != 0
    verdict = _binary_verdict(outputs.double()[nonzero], g[nonzero])
    if verdict == "classifier":
        return None
    if verdict == "undecided":
        reason = "the outputs are too few to separate a regression from a binary classifier"
        return Decision(likelihood=None, reason=reason, final=False)
    reason = (
        "the outputs are real numbers and the loss gradient fits no classifier, so the labels are "
        f"taken as Gaussian around the outputs, as for squared error; {SIGMA_NOTICE}, or loss= the "
        "criterion"
    )
    return Decision(likelihood=Gaussian(), reason=reason, warn=True)


def zero_sum_dims(outputs: Tensor, gradient: Tensor) -> list[int]:
    """Return the dimensions, of the last and the second, over which the gradient sums to zero.

    Args:
        outputs: h [B, ...].
        gradient: Of the loss at the outputs, of the same shape.
    """
    tolerance, g = gradient_tolerance(outputs.dtype), gradient.double()
    dims = [dim for dim in (-1, 1)[: max(0, g.dim() - 1)] if g.shape[dim] > 1]
    if g.dim() == 2:
        dims = dims[:1]
    largest = g.abs().max()
    return [
        dim
        for dim in dims
        if bool((g.sum(dim).abs() <= 4 * tolerance * (g.abs().amax(dim) + largest)).all())
    ]


def _binary_verdict(h: Tensor, g: Tensor) -> str:
    """Return "classifier", "regression" or "undecided" from entries [n] and their gradients.

    A binary classifier has one gradient for each label at an h; the sign of g shows the label.
    """
    if len(h) < MIN_OUTPUTS:
        return "undecided"
    groups = [(h[mask], g[mask]) for mask in (g > 0, g < 0)]
    if not all(_is_function(*group) for group in groups):
        return "regression"
    (h_up, g_up), (h_down, g_down) = groups
    if not len(h_up) or not len(h_down):
        return "undecided"
    if h_up.max() > h_down.min() and h_down.max() > h_up.min():
        return "classifier"  # both labels at the same h
    # one function of h: the gradient of a squared error grows with the distance from its zero, that
    # of a separated classifier falls
    boundary = (max(h_up.min(), h_down.min()) + min(h_up.max(), h_down.max())) / 2
    distance = torch.cat([h_up, h_down]).sub(boundary).abs()
    size = torch.cat([g_up, g_down]).abs()
    slope = (distance - distance.mean()) @ (size - size.mean())
    return "regression" if bool(slope > 0) else "classifier"


def _is_function(h: Tensor, g: Tensor) -> bool:
    """Return whether g [n] varies smoothly with h [n]: von Neumann's ratio of ranks, 1 for noise."""
    n = len(h)
    if n < 4:
        return True  # too few to contradict it
    if bool(g.var() <= 1e-12 * g.square().mean()):
        return True  # constant, as for hinge loss
    ranks = g.argsort().argsort().double()[h.argsort()]
    ratio = ranks.diff().square().sum() / (2 * (n - 1) * ranks.var())
    return bool(ratio < max(0.25, 8 / n**2))
