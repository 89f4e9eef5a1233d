"""Checks of the arguments of ``estimate``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.errors import FimprobeError
from fimprobe.measurement.arguments import check_model
from fimprobe.measurement.tensor_checks import check_readable
from fimprobe.model.fsdp.placement import is_sharded
from fimprobe.model.twin import trainable


def check_options(
    model: nn.Module,
    *,
    rel_error: float | Mapping[str, float],
    entries: Mapping[str, Tensor] | None,
    max_inputs: int | None,
    max_seconds: float | None,
    functions: Mapping[str, Callable[[Any], Any] | None],
    draws: int | str,
    input_sampling: str,
    memory_mb: float,
    seed: int,
    state: Any,
    ranks: Any,
) -> None:
    """Check types and ranges.

    Args:
        model: The model.
        rel_error: As in :func:`fimprobe.estimate`; so are the others.
        entries: Chosen entries.
        max_inputs: Largest number of inputs.
        max_seconds: Longest time.
        functions: Arguments that must be functions or None, by name.
        draws: Labels per input.
        input_sampling: How inputs are chosen.
        memory_mb: The memory limit.
        seed: The random seed.
        state: The file, or None.
        ranks: The processes, or None.

    Raises:
        FimprobeError: With the argument, its value and the remedy.
    """
    check_model(model)
    check_readable(model)
    if is_sharded(model):
        raise FimprobeError(
            "`model` must not be sharded (FSDP) for an estimate over a data set. Pass the whole "
            "model on each process."
        )
    targets = rel_error.values() if isinstance(rel_error, Mapping) else [rel_error]
    if not targets or not all(_is_positive(x) for x in targets):
        raise FimprobeError(
            f"`rel_error` must be a positive number, or a mapping of names to them, got "
            f"{rel_error!r}. Use 0.1 for 10 %."
        )
    if max_inputs is not None and (not isinstance(max_inputs, int) or max_inputs < 2):
        raise FimprobeError(
            f"`max_inputs` must be an integer of at least 2, got {max_inputs!r}. Use None for all."
        )
    if max_seconds is not None and not _is_positive(max_seconds):
        raise FimprobeError(
            f"`max_seconds` must be a positive number, got {max_seconds!r}. Use None for no limit."
        )
    if not _is_positive(memory_mb):
        raise FimprobeError(f"`memory_mb` must be a positive number, got {memory_mb!r}. Use 512.")
    if input_sampling not in ("auto", "uniform", "trace"):
        raise FimprobeError(
            f"`input_sampling` must be 'auto', 'uniform' or 'trace', got {input_sampling!r}. Use "
            "'auto'."
        )
    whole = isinstance(draws, int) and not isinstance(draws, bool) and draws >= 1
    if draws not in ("auto", "exact") and not whole:
        raise FimprobeError(
            f"`draws` must be 'auto', 'exact' or a positive integer, got {draws!r}. Use draws=2 for "
            "two labels per input."
        )
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise FimprobeError(
                f"`{name}` must be a function, got {type(function).__name__}. Pass one of the batch, "
                "or of what the model returns for `output`."
            )
    check_run_options(seed, state, ranks)
    _check_entries(model, entries)


def check_run_options(seed: Any, state: Any, ranks: Any) -> None:
    """Check the types of what a run uses.

    Args:
        seed: The random seed.
        state: The file, or None.
        ranks: The processes, or None.

    Raises:
        FimprobeError: With the argument, its value and the remedy.
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise FimprobeError(f"`seed` must be an integer, got {seed!r}. Use 0.")
    if state is not None and not isinstance(state, (str, os.PathLike)):
        raise FimprobeError(f"`state` must be the path of a file, got {state!r}. Use 'f.state'.")
    if ranks is not None and not hasattr(ranks, "run_everywhere"):
        raise FimprobeError(
            f"`ranks` must be a group of processes, got {type(ranks).__name__}. Use "
            "fimprobe.join_processes()."
        )


def _check_entries(model: nn.Module, entries: Mapping[str, Tensor] | None) -> None:
    known = trainable(model)
    for name, mask in (entries or {}).items():
        fits = name in known and isinstance(mask, Tensor) and mask.dtype == torch.bool
        if not fits or mask.shape != known[name].shape:
            is_tensor = isinstance(mask, Tensor)
            form = f"{mask.dtype} {tuple(mask.shape)}" if is_tensor else type(mask).__name__
            raise FimprobeError(
                f"`entries` must map parameters to boolean tensors of their shapes, got {name!r} "
                f"with {form}. Use names of model.named_parameters()."
            )
    if entries is not None and not any(bool(mask.any()) for mask in entries.values()):
        raise FimprobeError(
            "`entries` must choose some entries, got none that is True. Leave it out for all entries."
        )


def _is_positive(x: Any) -> bool:
    return not isinstance(x, bool) and isinstance(x, (int, float)) and x > 0
