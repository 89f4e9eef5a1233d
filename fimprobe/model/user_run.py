"""A run of the user's own modules on copies of their tensors, after which everything is as it was."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.model.batch import Batch
from fimprobe.model.copies.model_copies import (
    BACKWARD_HOOKS,
    FORWARD_HOOKS,
    ModelCopier,
    without_foreign_hooks,
)
from fimprobe.model.copies.user_state import UserState
from fimprobe.model.process_wide import ProcessWide
from fimprobe.model.runs import Run, Selector, run_model
from fimprobe.model.storage_guard import StorageGuard, storage_address
from fimprobe.model.twin import (
    TwinSettings,
    keep_padded_positions,
    switch_cache_off,
    take_autocast_off,
)


def run_user_model(
    model: nn.Module,
    batch: Batch,
    select_outputs: Selector,
    *,
    copier: ModelCopier,
    guard: StorageGuard,
    settings: TwinSettings,
) -> Run:
    """Run the user's modules, with modes and tensors lent to them for the time of the run.

    Hooks of fimprobe and backward hooks do not run. Attributes, lists and counters are restored.

    Args:
        model: The user's model, unwrapped.
        batch: The samples.
        select_outputs: From what the model returns to the outputs.
        copier: Made a twin, whose tensors the run uses.
        guard: Stops an operation that writes a tensor of the user's.
        settings: How the twin was made: the modules in training mode, and what was adjusted.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    copies = {name: copier.memo[id(p)] for name, p in trained.items()}
    views = {storage_address(x) for x in copier.originals if _keeps_graph(x)}
    viewed = {f"{_VIEWED} {n}": p for n, p in trained.items() if views & {storage_address(p)}}
    state = UserState(copier.originals)
    try:
        for path, module in model.named_modules():
            _lend_tensors(module, copier)
            keep_padded_positions(module)  # reads the flags of layers, which come later
            module.__dict__["training"] = path in settings.training_modules
            switch_cache_off(module)
            if settings.adjusts_foreign_classes:
                take_autocast_off(module)
        with _without_compilation():
            run = run_model(
                model,
                batch,
                select_outputs,
                {**copies, **viewed},
                guard,
                host=settings.draws_from_host,
            )
    finally:
        try:
            state.restore()
        except BaseException:  # such as a lack of memory that has passed, or the user's interrupt
            state.restore()
            raise
    for name in viewed:
        _add_gradient(run.gradients, name.removeprefix(f"{_VIEWED} "), run.gradients.pop(name))
    return run


_VIEWED = "viewed"
"""Marks a parameter of the user's that a module reaches through a view kept as an attribute."""


def _add_gradient(gradients: dict[str, Tensor | None], name: str, more: Tensor | None) -> None:
    gradient = gradients[name]
    if more is not None:
        gradients[name] = more if gradient is None else gradient + more


def _keeps_graph(x: Any) -> bool:
    """Return whether an object is a tensor, no parameter, that passes gradients on."""
    return isinstance(x, Tensor) and x.requires_grad and not isinstance(x, nn.Parameter)


def _lend_tensors(module: nn.Module, copier: ModelCopier) -> None:
    """Give one of the user's modules copies of its tensors, and only hooks that are its function."""
    attributes, memo = module.__dict__, copier.memo
    for table in ("_parameters", "_buffers"):
        attributes[table] = {n: memo.get(id(x), x) for n, x in attributes[table].items()}
    attributes["_modules"] = {
        name: part._modules["_orig_mod"] if "_orig_mod" in getattr(part, "_modules", ()) else part
        for name, part in attributes["_modules"].items()
    }
    for name in FORWARD_HOOKS:
        attributes[name] = without_foreign_hooks(attributes[name])
    for name in BACKWARD_HOOKS:
        attributes[name] = {}
    attributes["_compiled_call_impl"] = None


_EAGER = ProcessWide(lambda: torch.compiler.set_stance("force_eager"))


def _without_compilation() -> AbstractContextManager[None]:
    """Run compiled functions as they were written: other tensors would compile them again."""
    return _EAGER.changed() if "torch._dynamo" in sys.modules else nullcontext()
