"""A GPU that does not exist: tensors claim to be on it, and every wait for it is counted.

Every torch function passes through ``FakeGpu``. A result is where the arguments are; what is made
without a device, or fetched, is on the host. The computation itself runs on the CPU.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.support.paths import ROOT

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
PACKAGE = ROOT / "fimprobe"

READ_VALUES = {"item", "__float__", "__int__", "__bool__", "__index__", "tolist", "numpy"}
READ_VALUES |= {"__array__", "__format__", "__repr__", "__contains__", "__complex__", "is_nonzero"}
"""The result is a Python object made of the tensor's values."""

SIZE_FROM_VALUES = {"nonzero", "argwhere", "unique", "_unique2", "unique_consecutive", "bincount"}
SIZE_FROM_VALUES |= {"_return_inverse", "_return_counts", "_return_output", "masked_select"}
SIZE_FROM_VALUES |= {"equal", "allclose", "histc", "one_hot"}
"""The result's shape, or the only number in it, depends on the tensor's values."""

CHECKED = {"linalg_eigvalsh", "linalg_eigh", "linalg_cholesky", "linalg_inv", "linalg_solve"}
CHECKED |= {"linalg_svd", "linalg_svdvals", "linalg_qr"}
"""LAPACK's error codes are read back."""

INDEXED = ("__getitem__", "__setitem__", "index_put_")
MIXES_DEVICES = ("copy_", *INDEXED, "index_copy_")
"""These accept tensors of both devices, and transfer one of them."""


@dataclass(kw_only=True)
class Call:
    """One call of a torch function; every device in its arguments is replaced by the CPU."""

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    host: list[Tensor]
    """The arguments on the host."""
    gpu: list[Tensor]
    """The arguments on the fake GPU."""
    device: torch.device | None
    """The device that an argument names."""
    real: bool
    """Whether a ``torch.device`` of the CPU is named: autograd's metadata hold the real one, where
    code of the package writes a string."""

    @classmethod
    def parse(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call with its tensors sorted by device."""
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        device = next((place for x in leaves if (place := device_of(x)) is not None), None)
        args, kwargs = tree_map(lambda x: x if device_of(x) is None else "cpu", (args, kwargs))
        if device is None and kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
        return cls(
            func=func, name=getattr(func, "__name__", str(func)), args=args, kwargs=kwargs,
            host=[x for x in tensors if on_host(x)], gpu=[x for x in tensors if not on_host(x)],
            device=device,
            real=any(isinstance(x, torch.device) and x.type == "cpu" for x in leaves),
        )  # fmt: skip

    def run(self) -> Any:
        """The result, computed on the CPU."""
        return self.func(*self.args, **self.kwargs)

    def names(self, kind: str) -> bool:
        """Whether an argument names a device of this kind."""
        return self.device is not None and self.device.type == kind

    def fetches(self) -> bool:
        """Whether the result is on the host because the call asks for it."""
        return self.func is torch.Tensor.cpu or (self.names("cpu") and bool(self.gpu))

    def uploads(self) -> bool:
        """Whether the call moves something from the host to the fake GPU."""
        return self.names("cuda") and (bool(self.host) or self.name in ("tensor", "as_tensor"))

    def result_on_host(self) -> bool:
        """Where the result of a call is that transfers nothing."""
        made_for_autograd = self.real and not self.host
        return not self.gpu and not made_for_autograd and not self.names("cuda")


class FakeGpu(TorchFunctionMode):
    """Counts waits by (kind, place in the package); ``fetched``: the bytes of each fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.fetched: list[int] = []
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return CPU if on_host(args[0]) else GPU
        if getattr(func, "__name__", "") == "__get__" or func in (
            torch.Tensor.size,
            torch.Tensor.dim,
            torch.Tensor.stride,
        ):
            return mark(func(*args, **(kwargs or {})), args, on_host(args[0]))
        self.calls += 1
        call = Call.parse(func, args, kwargs or {})
        if call.fetches():
            return self._fetch(call)
        if call.name == "pin_memory" and call.host:
            return mark(torch.clone(*call.args), (), True)
        if call.names("cuda") and call.kwargs.get("non_blocking"):
            return mark(torch.clone(call.args[0]), (), False)
        if call.uploads():
            self._wait("upload")
            result = call.run()
            is_argument = bool(call.host) and result is call.args[0]
            return mark(result.clone() if is_argument else result, (), False)
        self._note_wait(call)
        return mark(call.run(), call.args, call.result_on_host())

    def _fetch(self, call: Call) -> Any:
        if not call.gpu:
            return mark(call.run(), call.args, True)
        self._wait("fetch")
        self.fetched.append(call.gpu[0].numel() * call.gpu[0].element_size())
        result = call.run()
        return mark(result.clone() if result is call.args[0] else result, call.args, True)

    def _note_wait(self, call: Call) -> None:
        """Count the wait of a call that names no device to move to."""
        if not call.gpu:
            return
        if call.name == "new_tensor":
            self._wait("upload")
        elif any(x.dim() for x in call.host):  # numbers without a dimension are passed by value
            if call.name not in MIXES_DEVICES:
                shapes = [tuple(x.shape) for x in call.host]
                raise AssertionError(
                    f"{shapes} {call.name} mixes the host's and the GPU's tensors: {where()}"
                )
            self._wait("fetch" if on_host(call.args[0]) else "upload")
        elif (kind := wait_for_values(call)) is not None:
            self._wait(kind)

    def _wait(self, kind: str) -> None:
        self.waits[kind, where()] += 1


def wait_for_values(call: Call) -> str | None:
    """The kind of wait of a call whose result depends on values on the fake GPU; None without."""
    if call.name in READ_VALUES | SIZE_FROM_VALUES | CHECKED:
        return call.name
    if call.name in INDEXED and is_boolean(call.args[1]):
        return "boolean index"
    if call.name == "where" and len(call.args) == 1:
        return "nonzero"
    if call.name == "repeat_interleave" and isinstance(call.args[1], Tensor):
        return call.name
    return None


def on_host(x: Tensor) -> bool:
    """Whether the tensor was made on the host or fetched."""
    return x.__dict__.get("_on_host", False)


def device_of(x: Any) -> torch.device | None:
    """The device that an argument names."""
    if isinstance(x, torch.device):
        return x
    return torch.device(x) if isinstance(x, str) and x.split(":")[0] in ("cpu", "cuda") else None


def mark(result: Any, args: tuple[Any, ...], host: bool) -> Any:
    """Note where results are; a tensor that was changed in place stays where it was."""
    for x in tree_leaves(result):
        if isinstance(x, Tensor) and not any(x is a for a in args):
            x.__dict__["_on_host"] = host
    return result


def is_boolean(index: Any) -> bool:
    """Whether a mask is among the indices."""
    entries = index if isinstance(index, tuple) else (index,)
    return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in entries)


def where() -> str:
    """The innermost two functions of the package on the stack."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(PACKAGE)]
    return " < ".join(f"{Path(f.filename).stem}.{f.name}" for f in reversed(frames[-2:]))
