"""Differences of forward passes with the kinks of the unshifted pass.

Where a shift crosses the kink of a ReLU, the second difference is of the order of the first
derivative, and wrong by orders of magnitude. The Hessian is that of the smooth branch at its point.
The unshifted pass therefore records the branch of every operation with kinks, and the shifted passes
follow it: masks, indices of maxima, comparisons and rounded numbers stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fimprobe.errors import FimprobeError

aten = torch.ops.aten

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


class CannotHold(FimprobeError):
    """The branch of the unshifted pass cannot be followed; the message is the reason."""


class HeldKinks(TorchDispatchMode):
    """Records the branches of one forward pass, and lets later passes follow them.

    Attributes:
        branches: The recorded operations with kinks, in their order, each with its branch.
        following: Whether the branches are followed; otherwise they are recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.branches: list[tuple[Any, Any]] = []
        self.following = False
        self._position = 0
        self._paused = False

    def restart(self) -> None:
        """Forget all branches; let the next pass record its own."""
        self.branches, self.following = [], False

    def follow(self) -> None:
        """Let the next pass follow the recorded branches from the first one on."""
        self.following, self._position = True, 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Neither record nor follow inside the context."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, on the recorded branch if it has kinks."""
        kwargs = kwargs or {}
        if self._paused or not _reads_floats(args):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        in_place = name.endswith("_") and not name.startswith("_") and not name.endswith("__")
        bare = name[:-1] if in_place else name
        kink = _KINKS.get(bare)
        if kink is not None:
            return self._run_kink(func, kink, args, kwargs, in_place=in_place)
        if bare in _NOT_HELD:
            raise CannotHold(f"the branch of {bare} cannot be held between forward passes")
        if self.following and self._is_next(func):
            return self._next(func)
        result = func(*args, **kwargs)
        if bare in _CONSTANT or _is_discrete(result):
            if self.following:
                return self._next(func)
            self.branches.append((func, result))
        return result

    def _run_kink(
        self, func: Any, kink: Kink, args: Any, kwargs: Mapping[str, Any], *, in_place: bool
    ) -> Any:
        if self.following:
            branch = self._next(func)
        else:
            branch = kink.branch(func, args, kwargs)
            self.branches.append((func, branch))
        result = kink.apply(branch, args, kwargs)
        return args[0].copy_(result) if in_place else result

    def _is_next(self, func: Any) -> bool:
        """Whether an operation without kinks of its own is the next recorded one."""
        known = self._position < len(self.branches)
        name = func.overloadpacket.__name__
        return known and name not in _KINKS and self.branches[self._position][0] is func

    def _next(self, func: Any) -> Any:
        """The branch of the next recorded operation, which must be ``func``."""
        if self._position >= len(self.branches) or self.branches[self._position][0] is not func:
            raise CannotHold("the model runs other operations at slightly shifted parameters")
        branch = self.branches[self._position][1]
        self._position += 1
        return branch


@dataclass(frozen=True, kw_only=True)
class Kink:
    """An operation that is smooth on each of its branches.

    Attributes:
        branch: Maps the operation and its arguments to the branch: a mask, or indices.
        apply: Maps a branch and arguments to the result on that branch.
    """

    branch: Callable[[Any, Any, Mapping[str, Any]], Any]
    apply: Callable[[Any, Any, Mapping[str, Any]], Any]


def _argument(args: Any, kwargs: Mapping[str, Any], index: int, name: str, default: Any) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


def _pointwise(
    positive: Callable[[Any, Any, Mapping[str, Any]], Any],
    negative: Callable[[Any, Any, Mapping[str, Any]], Any],
    condition: Callable[[Any, Any, Mapping[str, Any]], Tensor] = lambda x, a, k: x > 0,
) -> Kink:
    """A function with one kink: ``positive`` where ``condition`` holds, else ``negative``."""
    return Kink(
        branch=lambda func, a, k: condition(a[0], a, k),
        apply=lambda mask, a, k: torch.where(
            # a branch continues beyond the kink, but not to where it might overflow
            mask,
            positive(a[0], a, k),
            negative(torch.where(mask, 0, a[0]), a, k),
        ),
    )


def _clamp(low: Callable[[Any, Any], Any], high: Callable[[Any, Any], Any]) -> Kink:
    """x between two bounds, each a number, a tensor or None."""

    def branch(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        x, lo, hi = args[0], low(args, kwargs), high(args, kwargs)
        return None if lo is None else x < lo, None if hi is None else x > hi

    def apply(masks: Any, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        x = args[0]
        for mask, bound in zip(masks, (low(args, kwargs), high(args, kwargs)), strict=True):
            if mask is not None:
                x = torch.where(mask, bound, x)
        return x

    return Kink(branch=branch, apply=apply)


def _elu(args: Any, kwargs: Mapping[str, Any]) -> tuple[float, float, float]:
    """alpha, scale and input scale of an ELU."""
    values = [
        _argument(args, kwargs, i, n, 1) for i, n in enumerate(("alpha", "scale", "input_scale"), 1)
    ]
    return values[0], values[1], values[2]


def _celu(args: Any, kwargs: Mapping[str, Any]) -> tuple[float, float, float]:
    """alpha, scale and input scale of a CELU, as an ELU."""
    alpha = _argument(args, kwargs, 1, "alpha", 1)
    return alpha, 1, 1 / alpha


def _elu_kink(constants: Callable[[Any, Mapping[str, Any]], tuple[float, float, float]]) -> Kink:
    def positive(x: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        return x * constants(args, kwargs)[1]

    def negative(x: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        alpha, scale, input_scale = constants(args, kwargs)
        return torch.expm1(x * input_scale) * (alpha * scale)

    return _pointwise(positive, negative)


def _dim_of(args: Any, kwargs: Mapping[str, Any]) -> int:
    return _argument(args, kwargs, 1, "dim", -1)


def _by_indices(dim: Callable[[Any, Mapping[str, Any]], int], *, keepdim: bool) -> Kink:
    """Functions that return values and their indices along a dimension."""

    def branch(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        return func(*args, **kwargs)[1]

    def apply(indices: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Any:
        x, axis = args[0], dim(args, kwargs)
        if keepdim or _argument(args, kwargs, 2, "keepdim", False):
            return x.gather(axis, indices), indices
        return x.gather(axis, indices.unsqueeze(axis)).squeeze(axis), indices

    return Kink(branch=branch, apply=apply)


def _pool(spatial: int) -> Kink:
    """Max pooling with the indices of the maxima, over the last ``spatial`` dimensions."""

    def apply(indices: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Any:
        flat = args[0].flatten(-spatial)
        return flat.gather(-1, indices.flatten(-spatial)).view(indices.shape), indices

    return Kink(branch=lambda func, a, k: func(*a, **k)[1], apply=apply)


def _extremum() -> Kink:
    """amax, amin, max and min over several dimensions: the mean of the entries that attain it."""

    def dims(args: Any, kwargs: Mapping[str, Any]) -> Any:
        chosen = _argument(args, kwargs, 1, "dim", [])
        return list(chosen) if chosen else list(range(args[0].dim()))

    def branch(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        result = func(*args, **kwargs)
        if not _argument(args, kwargs, 2, "keepdim", False):
            for d in sorted(d % max(args[0].dim(), 1) for d in dims(args, kwargs)):
                result = result.unsqueeze(d)
        mask = (args[0] == result).to(args[0].dtype)
        return mask / mask.sum(dims(args, kwargs), keepdim=True)

    def apply(share: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        x = torch.where(share > 0, args[0], 0) * share
        return x.sum(dims(args, kwargs), keepdim=_argument(args, kwargs, 2, "keepdim", False))

    return Kink(branch=branch, apply=apply)


def _max_or_min() -> Kink:
    """max and min, whose overloads take no dimension, a dimension, or a second tensor."""
    along, whole = _by_indices(_dim_of, keepdim=False), _extremum()

    def branch(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        kink = along if len(args) > 1 or "dim" in kwargs else whole
        return kink, kink.branch(func, args, kwargs)

    return Kink(branch=branch, apply=lambda held, a, k: held[0].apply(held[1], a, k))


def _bound(index: int, name: str, default: Any = None) -> Callable[[Any, Any], Any]:
    return lambda args, kwargs: _argument(args, kwargs, index, name, default)


def _nothing(args: Any, kwargs: Any) -> None:
    return None


def _hard_swish(masks: Any, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """x (x + 3)/6 between −3 and 3, 0 below, x above."""
    x = args[0]
    return torch.where(masks[0], 0, torch.where(masks[1], x, x * (x + 3) / 6))


def _hard_sigmoid(masks: Any, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """(x + 3)/6 between −3 and 3, 0 below, 1 above."""
    return torch.where(masks[0], 0, torch.where(masks[1], 1, (args[0] + 3) / 6))


def _three_branches(apply: Callable[[Any, Any, Mapping[str, Any]], Tensor]) -> Kink:
    return Kink(branch=lambda func, a, k: (a[0] < -3, a[0] > 3), apply=apply)


def _shrink(x: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    width = _argument(args, kwargs, 1, "lambd", 0.5)
    return x - width * x.sign()


_ZERO = lambda x, a, k: torch.zeros_like(x)  # noqa: E731
_SAME = lambda x, a, k: x  # noqa: E731
_OUTSIDE = lambda x, a, k: x.abs() > _argument(a, k, 1, "lambd", 0.5)  # noqa: E731

_KINKS: dict[str, Kink] = {
    "relu": _pointwise(_SAME, _ZERO),
    "leaky_relu": _pointwise(
        _SAME, lambda x, a, k: x * _argument(a, k, 1, "negative_slope", 0.01)
    ),
    "_prelu_kernel": _pointwise(_SAME, lambda x, a, k: x * a[1]),
    "abs": _pointwise(_SAME, lambda x, a, k: -x),
    "threshold": _pointwise(
        _SAME,
        lambda x, a, k: torch.full_like(x, _argument(a, k, 2, "value", 0)),
        lambda x, a, k: x > _argument(a, k, 1, "threshold", 0),
    ),
    "elu": _elu_kink(_elu),
    "celu": _elu_kink(_celu),
    "selu": _elu_kink(lambda a, k: (_SELU_ALPHA, _SELU_SCALE, 1)),
    "hardswish": _three_branches(_hard_swish),
    "hardsigmoid": _three_branches(_hard_sigmoid),
    "hardshrink": _pointwise(_SAME, _ZERO, _OUTSIDE),
    "softshrink": _pointwise(_shrink, _ZERO, _OUTSIDE),
    "clamp": _clamp(_bound(1, "min"), _bound(2, "max")),
    "clamp_min": _clamp(_bound(1, "min"), _nothing),
    "clamp_max": _clamp(_nothing, _bound(1, "max")),
    "hardtanh": _clamp(_bound(1, "min_val", -1), _bound(2, "max_val", 1)),
    "maximum": _pointwise(_SAME, lambda x, a, k: a[1], lambda x, a, k: x >= a[1]),
    "minimum": _pointwise(_SAME, lambda x, a, k: a[1], lambda x, a, k: x <= a[1]),
    "fmax": _pointwise(_SAME, lambda x, a, k: a[1], lambda x, a, k: x >= a[1]),
    "fmin": _pointwise(_SAME, lambda x, a, k: a[1], lambda x, a, k: x <= a[1]),
    "max": _max_or_min(),
    "min": _max_or_min(),
    "amax": _extremum(),
    "amin": _extremum(),
    "topk": _by_indices(lambda a, k: _argument(a, k, 2, "dim", -1), keepdim=True),
    "sort": _by_indices(lambda a, k: k.get("dim", a[1] if len(a) > 1 else -1), keepdim=True),
    "max_pool2d_with_indices": _pool(2),
    "max_pool3d_with_indices": _pool(3),
    "adaptive_max_pool2d": _pool(2),
    "adaptive_max_pool3d": _pool(3),
}  # fmt: skip
"""Operations with kinks, by their name in torch."""

_CONSTANT = {"ceil", "floor", "heaviside", "round", "sgn", "sign", "trunc"}
"""Operations whose derivative is zero between jumps: the result stays."""

_NOT_HELD = {
    "_adaptive_max_pool", "aminmax", "cummax", "cummin", "fractional_max_pool2d",
    "fractional_max_pool3d", "kthvalue", "max_pool1d", "median", "mode", "nanmedian",
    "rrelu_with_noise",
}  # fmt: skip
"""Operations with kinks whose branch is not followed."""


def _reads_floats(args: Any) -> bool:
    return any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves(args))


def _is_discrete(result: Any) -> bool:
    """Whether a result that was computed from floating-point numbers holds none itself.

    Numbers are results too: ``x.item()`` lets values decide what a model does.
    """
    leaves = [x for x in tree_leaves(result) if x is not None]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    if not tensors:
        return any(isinstance(x, (bool, int, float)) and math.isfinite(x) for x in leaves)
    return not any(x.is_floating_point() or x.is_complex() for x in tensors)
