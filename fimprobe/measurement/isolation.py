"""Isolation of a measurement: autograd and autocast are those of the training afterwards."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fimprobe.measurement.checkpointing import without_checkpoints
from fimprobe.model.twin import unwrap


@contextmanager
def isolated_autograd(model: nn.Module) -> Iterator[None]:
    """Run the block with autograd on, autocast and checkpoints off, in this thread.

    Args:
        model: Autocast is off for its device, too.
    """
    device_type = next(iter(unwrap(model).parameters())).device.type
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device_type, enabled=False),
        torch.autocast("cpu", enabled=False),
        without_checkpoints(),
    ):
        yield


@contextmanager
def isolated_state(model: nn.Module, seed: int) -> Iterator[None]:
    """Isolate a pass over data too: loaders draw from the global streams, which are restored.

    Args:
        model: Its devices are those whose generators are restored.
        seed: Seed of torch's generators inside of the block.
    """
    devices = {p.device for p in model.parameters()} if torch.cuda.is_initialized() else set()
    generators = [torch.default_generator]
    gpus = [d for d in devices if d.type == "cuda"]
    generators += [torch.cuda.default_generators[d.index or 0] for d in gpus]
    states = [g.get_state() for g in generators]
    # numpy is not imported for this: a module that is not loaded draws no numbers
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    try:
        with isolated_autograd(model):
            for generator in generators:
                generator.manual_seed(seed)
            yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
