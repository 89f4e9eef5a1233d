"""The gradient noise scale tr Σ/‖G‖² from sums of per-sample gradients with the data's labels.

G is the mean gradient and Σ the covariance of one input's gradient, both of the distribution that the
inputs are a sample of. A batch of that many inputs has a gradient as large as its noise (McCandlish
et al., 2018). Both parts are unbiased: products of gradients of different inputs for ‖G‖², squared
norms without these for tr Σ. Groups of inputs that are left out in turn give the errors (jackknife).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fimprobe.statistics import GradientGroups, MomentsBatch

NEAR_ZERO = "‖G‖² is within two standard errors of zero, so that it is undetermined: more inputs help"

TOO_FEW = "at least four inputs are needed"

SEVERAL_PROCESSES = "it is measured by a single process only"

DEVIATIONS = 2.0
"""Standard errors by which ‖G‖² must exceed zero."""


def noise_scale(
    groups: GradientGroups | None, moments: MomentsBatch, names: list[str]
) -> tuple[float | None, float | None, str]:
    """Return tr Σ/‖G‖² in inputs, its standard error, and why they are None.

    Args:
        groups: Inner products of the gradients of groups of inputs; None if there are none.
        moments: Moments with the data's labels, for the squared norm of each input's gradient.
        names: The parameters.
    """
    if groups is None:
        return None, None, SEVERAL_PROCESSES
    if len(groups.sizes) < MIN_GROUPS:
        return None, None, groups.reason or TOO_FEW
    inner = torch.stack([groups.inner[name] for name in names]).sum(0)
    norms = torch.stack([moments.parameters[n].squared_norms.double().sum(1) for n in names]).sum(0)
    squares = torch.stack([part.sum() for part in norms.cpu().split(groups.sizes)])
    sizes = torch.tensor(groups.sizes, dtype=torch.float64)
    trace, square = _estimates(inner.sum(), squares.sum(), sizes.sum())
    rest = inner.sum() - 2 * inner.sum(1) + inner.diagonal()
    traces, norms_square = _estimates(rest, squares.sum() - squares, sizes.sum() - sizes)
    if not bool(torch.isfinite(square)) or not float(square) > DEVIATIONS * _jackknife(norms_square):
        return None, None, NEAR_ZERO
    scale = float(trace / square)
    error = _jackknife(traces - scale * norms_square) / float(square)
    if not (math.isfinite(scale) and math.isfinite(error)):
        return None, None, NEAR_ZERO
    return max(scale, 0.0), error, ""


MIN_GROUPS = 4
"""Groups of inputs from which an error is known."""


def _estimates(total_square: Tensor, squares: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """tr Σ and ‖G‖² without bias.

    Args:
        total_square: ‖Σ_b g_b‖².
        squares: Σ_b ‖g_b‖².
        size: Number of inputs B.
    """
    square = (total_square - squares) / (size * (size - 1))
    return (squares - total_square / size) / (size - 1), square


def _jackknife(values: Tensor) -> float:
    """The standard error from values with one group left out."""
    count = len(values)
    return math.sqrt((count - 1) / count * float((values - values.mean()).square().sum()))
