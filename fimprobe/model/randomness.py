"""Random numbers of a measurement, from streams of its own.

Other threads draw from the global streams while a measurement runs, as where batches are made in the
background. These streams are therefore neither seeded nor restored: operations of this thread that
would draw from them get another generator.

Python's ``random`` and numpy have no such entry. A forward that draws from them in eval mode is
rare. Where one does, their streams are restored after it, as nothing else could.
"""

from __future__ import annotations

import functools
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NUM_TRIALS = 3
"""Runs that must all move the streams of Python and numpy, for the moves to be theirs."""

_SHORTEST_WAIT_S = 0.002
"""Seconds in which the streams must rest after each of these runs, and at least as long as the run.

A thread that makes batches draws for each sample of a batch, many times in two milliseconds."""


class PrivateRandomness(TorchDispatchMode):
    """Lets torch's random operations of this thread draw from generators of its own.

    Args:
        seed: Random seed of the generators.

    Attributes:
        drew: Whether an operation drew random numbers.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.drew = False
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler, which takes seconds, to leave this class out."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; one that would draw from a global stream gets another generator."""
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation, with a private generator if it would draw from a global stream.

        Args:
            func: The operation.
            args: Its arguments.
            kwargs: Its keyword arguments.
        """
        if not is_random(func) or not _draws(func, args, kwargs):
            return func(*args, **kwargs)
        given = _argument(func, args, kwargs, "generator")
        if given is not None and not _is_global(given):
            return func(*args, **kwargs)
        self.drew = True
        generator = self._generator(_device(args, kwargs))
        taking = _with_generator(func)
        if taking is None:
            return _lend(generator, func, args, kwargs)
        place = _position(taking, "generator")
        if len(args) > place:
            args = (*args[:place], generator, *args[place + 1 :])
            return taking(*args, **kwargs)
        return taking(*args, **{**kwargs, "generator": generator})

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


@functools.cache
def is_random(func: Any) -> bool:
    """Return whether an operation may draw random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether an operation draws: not dropout of rate 0, nor in eval mode."""
    rates = ("dropout_p", "dropout", "p") if "dropout" in str(func) else ("dropout_p", "dropout")
    rate = [_argument(func, args, kwargs, name) for name in rates]
    modes = [_argument(func, args, kwargs, name) for name in ("train", "training")]
    return 0.0 not in rate and not any(mode is False for mode in modes)


def _argument(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    """Return the value of an argument, which may be its default; None if there is none."""
    place = _position(func, name)
    if place < 0:
        return None
    if place < len(args):
        return args[place]
    return kwargs[name] if name in kwargs else func._schema.arguments[place].default_value


@functools.cache
def _position(func: Any, name: str) -> int:
    """Return the position of an argument of an operation; -1 if it has none of this name."""
    names = [argument.name for argument in func._schema.arguments]
    return names.index(name) if name in names else -1


@functools.cache
def _with_generator(func: Any) -> Any:
    """Return the form of an operation that takes a generator; None if there is none."""
    wanted = [argument.name for argument in func._schema.arguments if argument.name != "generator"]
    packet = func.overloadpacket
    for form in (func, *(getattr(packet, name) for name in packet.overloads())):
        names = [argument.name for argument in form._schema.arguments]
        if "generator" in names and [name for name in names if name != "generator"] == wanted:
            return form
    return None


def _device(args: Any, kwargs: Any) -> torch.device:
    """Return the device on which an operation draws."""
    given = kwargs.get("device")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if given is None and tensors:
        given = tensors[0].device
    device = torch.device("cpu" if given is None else given)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _is_global(generator: torch.Generator) -> bool:
    streams = [torch.default_generator]
    if torch.cuda.is_initialized():
        streams += torch.cuda.default_generators
    # operations get another Python object for the same generator
    address = getattr(generator, "_cdata", None)
    return any(address == getattr(stream, "_cdata", None) for stream in streams)


def _lend(generator: torch.Generator, func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation that takes no generator; the global stream is another one meanwhile.

    Args:
        generator: Holds the numbers that it draws.
        func: The operation, such as ``native_dropout``.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    device = generator.device
    stream = (
        torch.cuda.default_generators[device.index or 0]
        if device.type == "cuda"
        else torch.default_generator
    )
    state = stream.get_state()
    stream.set_state(generator.get_state())
    try:
        return func(*args, **kwargs)
    finally:
        generator.set_state(stream.get_state())
        stream.set_state(state)


# streams of Python and numpy


@dataclass(kw_only=True)
class HostStreams:
    """The states of the streams of Python and numpy at one moment.

    numpy is not imported for this: a module that is not loaded draws no numbers.
    """

    python: Any
    numpy: Any

    @classmethod
    def read(cls) -> HostStreams:
        """Return the present states."""
        numpy = sys.modules.get("numpy")
        return cls(
            python=random.getstate(), numpy=None if numpy is None else numpy.random.get_state()
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """What equals that of another moment if nothing was drawn."""
        numpy = None if self.numpy is None else (self.numpy[1].tobytes(), *self.numpy[2:])
        return self.python, numpy

    def restore(self) -> None:
        """Give both streams these states."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def undo_own_draws(before: HostStreams | None, run: Callable[[], object]) -> bool:
    """Restore the streams of Python and numpy if it was a run of this thread that moved them.

    Another thread may have moved them: the streams then also move while this thread waits, or rest
    in one of the runs. They are left as they are in that case.

    Args:
        before: The states before the run; None if they have not moved.
        run: Runs again.

    Returns:
        Whether the run draws from them.
    """
    if before is None or HostStreams.read().key == before.key:
        return False
    for _ in range(_NUM_TRIALS):
        start, started = HostStreams.read(), time.perf_counter()
        run()
        ended = HostStreams.read()
        if ended.key == start.key:
            return False
        time.sleep(max(time.perf_counter() - started, _SHORTEST_WAIT_S))
        if HostStreams.read().key != ended.key:
            return False
    before.restore()
    return True


@contextmanager
def private_streams(seed: int, *, torch_draws: bool, host_draws: bool) -> Iterator[None]:
    """Keep what a measurement draws from the global streams.

    Args:
        seed: Random seed of the streams that it draws from.
        torch_draws: Whether it draws from torch's.
        host_draws: Whether it draws from those of Python or numpy, which are restored then.
    """
    before = HostStreams.read() if host_draws else None
    try:
        if torch_draws:
            with PrivateRandomness(seed):
                yield
        else:
            yield
    finally:
        if before is not None:
            before.restore()
