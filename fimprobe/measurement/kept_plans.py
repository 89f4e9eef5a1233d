"""Plans of models that were measured before: the second measurement plans and verifies nothing.

A plan is kept outside of the model, which it does not keep alive. It is used again only for a model
of the same structure, types, devices, hooks, trainable parameters and plain attributes, and for
inputs of the same kind.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from fimprobe.engines.tracing.plan import Plan
from fimprobe.engines.tracing.spot_history import SpotHistory
from fimprobe.model.batch import Batch, flatten_arguments
from fimprobe.model.checked_twin import compute_fingerprint
from fimprobe.model.twin import unwrap

_MOST_PLANS = 8
"""Plans that are kept for each model: that many kinds of inputs."""

_PLAIN = (bool, int, float, str, type(None))

_Sizes = tuple[Any, ...]
_Plans = dict[Hashable, tuple[_Sizes, Plan]]

_plans: dict[int, tuple[weakref.ref[nn.Module], _Plans]] = {}
"""The plans of each model, by the model's identity."""

_lock = threading.RLock()  # a model may be freed, and its entry with it, while the lock is held


@contextmanager
def kept_plan(
    model: nn.Module, batch: Batch, output: Callable[[Any], Tensor] | None, memory_mb: float
) -> Iterator[Plan]:
    """Lend the plan of a model, and keep it if the measurement inside the context succeeds.

    A measurement at the same time in another thread makes a plan of its own.

    Args:
        model: The user's model.
        batch: The inputs.
        output: From what the model returns to the outputs. A function with a state of its own keeps
            no plan.
        memory_mb: The memory limit, on which the size of chunks depends.

    Yields:
        The plan, a new one where none is kept.
    """
    leaves, structure = flatten_arguments(batch.args, batch.kwargs)
    kinds = tuple(_kind(x) for x in leaves)
    shapes = tuple(x.shape if isinstance(x, Tensor) else None for x in leaves)
    if not _is_stateless(output):
        yield Plan()
        return
    code = None if output is None else getattr(output, "__code__", None)
    key = (_fingerprint(model), str(structure), kinds, tuple(batch.batched.items()), code)
    sizes = (shapes, memory_mb)
    plan = _take(model, key, sizes)
    yield plan
    if _fingerprint(model) == key[0]:
        _put(model, key, sizes, plan)


def _kind(x: Any) -> Hashable:
    """What of an input a plan may depend on. A dimension of length 1 is broadcast."""
    if isinstance(x, Tensor):
        return x.dim(), x.dtype, x.device, tuple(n == 1 for n in x.shape)
    kind: Any = type(x)
    return (kind, x) if kind in _PLAIN else kind


def _is_stateless(output: Callable[[Any], Tensor] | None) -> bool:
    """Whether a function is known by its code: it has no closure, no defaults, no attributes."""
    if output is None:
        return True
    return isinstance(output, FunctionType) and not (
        output.__closure__ or output.__defaults__ or output.__kwdefaults__ or output.__dict__
    )


def _fingerprint(model: nn.Module) -> int:
    """The fingerprint of the twin's checks, with plain attributes of modules and their options.

    A forward may take another way after ``model.config.option = True``.
    """
    inner, known = unwrap(model), dict[int, Hashable]()
    attributes = [
        (path, name, _plain_state(value, known))
        for path, module in inner.named_modules()
        for name, value in module.__dict__.items()
        if name not in _INTERNALS
    ]
    return hash((compute_fingerprint(inner), tuple(attributes)))


_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}


def _plain_state(value: Any, known: dict[int, Hashable], depth: int = 0) -> Hashable:
    """Numbers, strings and flags inside a value; objects of other kinds count by their type.

    Args:
        value: An attribute.
        known: Results by identity: all layers may hold one object with the model's options.
        depth: Number of objects around the value; two levels are read.
    """
    if type(value) in _PLAIN:
        return type(value), value
    kind: Any = type(value)
    if isinstance(value, (Tensor, nn.Module)) or depth == _DEPTH:
        return kind
    if id(value) not in known:
        plain = tuple(_plain_state(x, known, depth + 1) for x in _entries(value))
        known[id(value)] = kind, plain
    return known[id(value)]


def _entries(value: Any) -> list[Any]:
    """What an object holds, by built-in means only: its own methods may compute or load data.

    Long containers hold data, not options; of them only the length counts.
    """
    if type(value) in (list, tuple, set, frozenset):
        entries = value
    else:
        mapping = (
            value
            if type(value) is dict
            else object.__getattribute__(value, "__dict__")
            if (type(value).__dictoffset__)
            else {}
        )
        entries = [x for item in list(mapping.items()) for x in item]
    return list(entries) if len(entries) <= _MOST_ENTRIES else [len(entries)]


_MOST_ENTRIES = 2_000
"""Several times the entries of the options of transformers' models."""

_DEPTH = 2


def _take(model: nn.Module, key: Hashable, sizes: _Sizes) -> Plan:
    """Remove the plan of a model from those that are kept; return a new one if there is none.

    Chunks and scales that other sizes needed are not used: they change the rounding of the sums.
    """
    with _lock:
        known = _plans.get(id(model))
        if known is None or known[0]() is not model or key not in known[1]:
            return Plan()
        of_sizes, plan = known[1].pop(key)
    if of_sizes != sizes:
        plan.chunk_size = None
    plan.rescaled = set()
    plan.spot_history = SpotHistory()  # the checks of a measurement follow from its seed
    return plan


def _put(model: nn.Module, key: Hashable, sizes: _Sizes, plan: Plan) -> None:
    identity = id(model)

    def forget(reference: weakref.ref[nn.Module]) -> None:
        with _lock:
            known = _plans.get(identity)
            if known is not None and known[0] is reference:
                del _plans[identity]

    with _lock:
        known = _plans.get(identity)
        if known is None or known[0]() is not model:
            known = _plans[identity] = (weakref.ref(model, forget), {})
        plans = known[1]
        plans[key] = sizes, plan
        while len(plans) > _MOST_PLANS:
            del plans[next(iter(plans))]
