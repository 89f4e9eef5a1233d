"""BackPACK's hooks on a model for a while, without a trace of them afterwards."""

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
    """BackPACK active on ``modules`` only; afterwards they, and its globals, are as before."""
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
            # of the first layer, whose inputs need no gradient; BackPACK does not ask for it
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            yield
    finally:
        disable.store_io = stored
        torch.set_default_dtype(default)
        for handle in CTX.hook_handles[mark:]:
            handle.remove()
        del CTX.hook_handles[mark:]
        for thing, attributes in before:
            for name in set(thing.__dict__) - set(attributes):
                del thing.__dict__[name]
            for name, value in attributes.items():
                if name not in thing.__dict__ or thing.__dict__[name] is not value:
                    thing.__dict__[name] = value
