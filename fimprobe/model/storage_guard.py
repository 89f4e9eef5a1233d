"""Watches every operation of a forward for the memory that it reads and writes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fimprobe.errors import FimprobeError
from fimprobe.model.randomness import PrivateRandomness, is_random
from fimprobe.model.twin import refuse_data_swap


class ReachesUserError(FimprobeError):
    """An operation would have read or written memory of the user's model."""


class WritesSharedError(Exception):
    """An operation would have written a frozen parameter that the twin shares."""


class StorageGuard(TorchDispatchMode):
    """Stops an operation before it touches the user's tensors, and notes writes to the twin's.

    Every operation is seen below autograd, also those on ``.data``, on views and without gradients.

    Args:
        user: Names of the user's tensors by their storage's address; the memory of ``shared``
            may be read.
        shared: Addresses that the twin shares with the user.
        own: Names of the twin's tensors by address; of inputs, too.

    Attributes:
        written: Names of the twin's tensors that were written.
        random: Whether an operation drew random numbers.
        batch_statistics: Whether an operation normalised by statistics of the batch.
    """

    def __init__(
        self, user: Mapping[int, str], shared: Iterable[int], own: Mapping[int, str]
    ) -> None:
        super().__init__()
        self._user, self._shared, self._own = user, set(shared), own
        self._reads_user = False
        self._randomness: PrivateRandomness | None = None
        self.written: set[str] = set()
        self.random = False
        self.batch_statistics = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler, which takes seconds, to leave this class out."""
        return False

    def allow_reading(self) -> None:
        """Let operations read the user's tensors; writes are stopped still."""
        self._reads_user = True

    def watch_inputs(self, inputs: Mapping[int, str]) -> None:
        """Note writes to these addresses as writes to their names."""
        self._own = {**self._own, **inputs}

    @contextmanager
    def drawing_from(self, randomness: PrivateRandomness) -> Iterator[None]:
        """Let random operations under this guard draw from private generators."""
        self._randomness = randomness
        try:
            yield
        finally:
            self._randomness = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check an operation, then run it."""
        kwargs = kwargs or {}
        writes, draws, is_normalisation = _traits(func)
        if is_normalisation:
            self.batch_statistics |= bool(args[5])
        if writes or not self._reads_user:
            for key, arg in chain(enumerate(args), kwargs.items()):
                if isinstance(arg, Tensor):
                    self._check(arg, func, write=key in writes)
                elif isinstance(arg, (list, tuple)):
                    for x in arg:
                        if isinstance(x, Tensor):
                            self._check(x, func, write=key in writes)
        if draws:
            self.random = True
            if self._randomness is not None:
                return self._randomness.run(func, args, kwargs)
        return func(*args, **kwargs)

    def _check(self, tensor: Tensor, func: Any, *, write: bool) -> None:
        address = storage_address(tensor)
        if address in self._shared:
            if write:
                raise WritesSharedError
        elif address in self._user and (write or not self._reads_user):
            raise ReachesUserError(
                f"the forward of a copy of the model {'writes' if write else 'reads'} "
                f"{self._user[address]!r} of the model itself, in `{func}`"
            )
        elif write and address in self._own:
            self.written.add(self._own[address])


@functools.cache
def _traits(func: Any) -> tuple[frozenset[Any], bool, bool]:
    """Positions and names of written arguments; whether it is random; whether it is batch norm."""
    arguments = func._schema.arguments
    written = {
        key
        for i, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for key in (i, argument.name)
    }
    name = func._schema.name
    normalises = name in (
        "aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm",
    )  # fmt: skip
    return frozenset(written), is_random(func), normalises


def storage_address(tensor: Tensor) -> int:
    """The address of a tensor's memory; 0 where it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def addresses(tensors: Mapping[str, Any]) -> dict[int, str]:
    """The names of tensors by their memory's address."""
    return {
        address: name
        for name, value in tensors.items()
        for tensor in tree_leaves(value)
        if isinstance(tensor, Tensor) and (address := storage_address(tensor))
    }


_DROPOUTS = (
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
)  # fmt: skip


class WithoutDropout(TorchFunctionMode):
    """Lets dropout called as a function pass its input on.

    Attributes:
        suppressed: Whether there was any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.suppressed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, without dropout."""
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            options = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
            self.suppressed |= bool(options.get("p", 0.5)) and bool(options.get("training", True))
            return options["input"]
        if func is F.scaled_dot_product_attention:
            rate = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
            self.suppressed |= bool(rate)
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs = {**kwargs, "dropout_p": 0.0} if "dropout_p" in kwargs else kwargs
        return func(*args, **kwargs)


class RefusesDataSwaps(TorchFunctionMode):
    """Stops ``tensor.data = ...`` under transformations of ``torch.func``: it ends the process."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, unless it replaces a tensor's data."""
        if func == _SET_DATA:
            refuse_data_swap()
        return func(*args, **(kwargs or {}))


_SET_DATA: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]
