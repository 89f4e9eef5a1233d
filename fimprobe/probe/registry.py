"""The probes of this process: one for each model, until it detaches or the model is freed."""

from __future__ import annotations

import atexit
import os
from typing import Any

from torch import nn

from fimprobe.errors import ErrorHandler, FimprobeError
from fimprobe.model.twin import unwrap

_probes: dict[int, tuple[Any, int]] = {}
"""The probe of each model, by the model's identity, and the process that attached it."""


def model_key(model: nn.Module) -> int:
    """Return the identity of a model, wrapped or not."""
    return id(unwrap(model))


def find_probe(model: nn.Module) -> Any:
    """Return the probe that a model has, or None."""
    known = _probes.get(model_key(model))
    return None if known is None else known[0]


def register(key: int, probe: Any) -> None:
    """Record the probe of a model.

    Args:
        key: The identity of the model.
        probe: Its probe.
    """
    _probes[key] = (probe, os.getpid())


def unregister(key: int, probe: Any) -> None:
    """Forget the probe of a model, unless the model has another one by now.

    Args:
        key: The identity of the model.
        probe: The probe.
    """
    if key in _probes and _probes[key][0] is probe:
        del _probes[key]


def make_room(model: nn.Module, errors: ErrorHandler, *, replace: bool) -> None:
    """Detach the probe that a model has, if there is one.

    Args:
        model: The model.
        errors: Logs that it was detached.
        replace: Whether that is allowed.

    Raises:
        FimprobeError: If it is not.
    """
    previous = find_probe(model)
    if previous is None:
        return
    if not replace:
        raise FimprobeError(
            "`model` must have no other probe, but it already has a probe. Call "
            "fimprobe.detach(model) before you attach another."
        )
    previous.detach()
    errors.warn_once(
        "the model had a probe, which was detached: a model has one probe. Call "
        "fimprobe.detach(model) where a training ends, also by an error"
    )


@atexit.register
def _detach_all() -> None:
    """Detach the probes that are left when the interpreter ends, so that their files are whole."""
    for probe, process_id in list(_probes.values()):
        if process_id == os.getpid():  # a fork's probes are those of its parent
            probe.detach()
