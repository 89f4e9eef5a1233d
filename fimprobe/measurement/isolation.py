"""A measurement leaves autograd, autocast and random streams as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fimprobe.model.twin import unwrap


@contextmanager
def _isolated_state(model: nn.Module, seed: int) -> Iterator[None]:
    """Autograd on, autocast off, and every random stream put back as it was."""
    devices = {p.device for p in model.parameters()} if torch.cuda.is_initialized() else set()
    generators = [torch.default_generator]
    on_gpu = [d for d in devices if d.type == "cuda"]
    generators += [torch.cuda.default_generators[d.index or 0] for d in on_gpu]
    states = [g.get_state() for g in generators]
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    kind = next(iter(unwrap(model).parameters())).device.type
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(kind, enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            for generator in generators:
                generator.manual_seed(seed)
            yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
