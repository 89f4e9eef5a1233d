"""BackPACK's hooks on a model inside of a context, which removes every trace of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backpack import backpack, disable, extend
from backpack.context import CTX
from torch import nn


@contextmanager
def extended(modules: list[nn.Module], extension: Any) -> Iterator[None]:
    """Activate BackPACK on some modules, and restore them and BackPACK's global state afterwards.

    Args:
        modules: The modules that get hooks. BackPACK leaves attributes on them, on their parameters
            and in its context, and does not remove all of them itself.
        extension: The BackPACK extension to run in backward passes.
    """
    parameters = [p for m in modules for p in m._parameters.values() if p is not None]
    before = [(x, dict(x.__dict__)) for x in (*modules, *parameters)]
    mark, stored = len(CTX.hook_handles), disable.store_io
    default = torch.get_default_dtype()
    try:
        for module in modules:
            module.__dict__.pop("_backpack_extend", None)  # a copy of a user's extended model
            extend(module)
        disable.store_io = True
        with warnings.catch_warnings(), backpack(extension):
            # torch warns about the first layer, whose inputs need no gradient
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            yield
    finally:
        disable.store_io = stored
        torch.set_default_dtype(default)
        for handle in CTX.hook_handles[mark:]:
            handle.remove()
        del CTX.hook_handles[mark:]
        for owner, attributes in before:
            for name in set(owner.__dict__) - set(attributes):
                del owner.__dict__[name]
            for name, value in attributes.items():
                if name not in owner.__dict__ or owner.__dict__[name] is not value:
                    owner.__dict__[name] = value
