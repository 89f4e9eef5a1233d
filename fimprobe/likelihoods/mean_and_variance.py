"""A mean and a variance among what a model returns, and their natural parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods.independent import precise

PAIR_REMEDY = (
    "Pass output= a function from what the model returns to the pair (mean, variance), as in "
    "output=lambda y: (y[:, :1], torch.nn.functional.softplus(y[:, 1:]))"
)


def find_mean_and_variance(returned: Any) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance among what a model or ``output`` returned.

    Args:
        returned: A pair (mean, variance), or a mapping or record with the fields ``mean`` and ``var``
            or ``variance``.

    Raises:
        FimprobeError: For anything else.

    >>> mean, variance = find_mean_and_variance({"mean": torch.zeros(2), "var": torch.ones(2)})
    """
    named = _fields(returned)
    variance = named.get("var", named.get("variance"))
    pair: Any = (named["mean"], variance) if "mean" in named else returned
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        mean, variance = pair
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            return mean, variance
    if isinstance(returned, Tensor):
        given = f"a tensor {list(returned.shape)}"
    else:
        given = type(returned).__name__ + (f" with {sorted(map(str, named))}" if named else "")
    raise FimprobeError(
        "the outputs must be a mean and a variance, as a pair or with the names 'mean' and 'var', "
        f"got {given}. {PAIR_REMEDY}."
    )


def natural_parameters(mean: Tensor, variance: Tensor) -> Tensor:
    """Return (m/v, −1/(2v)) [B, ..., 2], in at least float32.

    Args:
        mean: m [B, ...].
        variance: v, of a shape that :func:`align_variance` accepts.
    """
    v = precise(align_variance(variance, mean.shape)).expand(mean.shape)
    # as a negative number a variance of 0 stays finite, and is refused for what it is
    precision = torch.where(v == 0, -1e-30, v).reciprocal()
    return torch.stack([precise(mean) * precision, -precision / 2], -1)


def align_variance(variance: Tensor, shape: torch.Size) -> Tensor:
    """Return the variance in a shape that broadcasts to that of the mean.

    Args:
        variance: Of the mean's shape, of one dimension fewer, or of length 1 in one dimension.
        shape: That of the mean.

    Raises:
        FimprobeError: For another shape of the variance.

    >>> align_variance(torch.ones(8), torch.Size([8, 3])).shape
    torch.Size([8, 1])
    """
    if variance.shape == shape:
        return variance
    if variance.shape == shape[:-1]:
        return variance.unsqueeze(-1)
    if variance.dim() == len(shape):
        mismatched = [n for n, m in zip(variance.shape, shape, strict=True) if n != m]
        if mismatched == [1]:
            return variance
    raise FimprobeError(
        f"the variance must have the shape of the mean, {list(shape)}, one dimension fewer, or the "
        f"length 1 in one dimension, got {list(variance.shape)}. {PAIR_REMEDY}."
    )


def _fields(returned: Any) -> dict[str, Any]:
    """Return the named fields of a mapping or a record; empty for anything else."""
    if isinstance(returned, Mapping):
        return {str(key): value for key, value in returned.items()}
    if isinstance(returned, tuple) and hasattr(returned, "_asdict"):
        return dict(returned._asdict())
    if dataclasses.is_dataclass(returned) and not isinstance(returned, type):
        return dict(vars(returned))
    return {}
