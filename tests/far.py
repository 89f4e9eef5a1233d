"""A GPU that is not there: tensors say that they are on one, and who waits for it is written down.

Every torch function passes through the mode. What comes from a tensor is where that tensor is; what
is made with no device named, or fetched, is on the host. Computing happens on the CPU.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

FAR = torch.device("cuda", 0)
PACKAGE = Path(__file__).parent.parent / "fimprobe"

# the size of the result, or a Python number, is in the tensor's values
LOOKS = {"item", "__float__", "__int__", "__bool__", "__index__", "tolist", "numpy", "__array__"}
LOOKS |= {"__format__", "__repr__", "__contains__", "__complex__", "__len__of_values"}
SIZED = {"nonzero", "argwhere", "unique", "_unique2", "_return_inverse", "unique_consecutive"}
SIZED |= {"masked_select", "equal", "allclose", "bincount", "histc", "_return_counts", "one_hot"}
SIZED |= {"_return_output", "is_nonzero"}
CHECKED = {"linalg_eigvalsh", "linalg_eigh", "linalg_cholesky", "linalg_inv", "linalg_solve"}
CHECKED |= {"linalg_svd", "linalg_svdvals", "linalg_qr"}
"""LAPACK's error codes are read back."""


class Far(TorchFunctionMode):
    """``waits`` counts (what, where in the package); ``moved`` bytes fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.fetched: list[int] = []
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if func == torch.Tensor.device.__get__:
            return torch.device("cpu") if on_host(args[0]) else FAR
        if name == "__get__" or func in (torch.Tensor.size, torch.Tensor.dim, torch.Tensor.stride):
            return mark(func(*args, **kwargs), args, on_host(args[0]))
        self.calls += 1
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        near = [x for x in tensors if on_host(x)]
        far = [x for x in tensors if not on_host(x)]
        named = next((place for x in leaves if (place := device_of(x)) is not None), None)
        args, kwargs = tree_map(lambda x: x if device_of(x) is None else "cpu", (args, kwargs))
        if named is None and "device" in kwargs and kwargs["device"] is not None:
            named = torch.device(kwargs["device"])
        if func is torch.Tensor.cpu or (named is not None and named.type == "cpu" and far):
            if not far:
                return mark(func(*args, **kwargs), args, True)
            self.wait("fetch")
            self.fetched.append(far[0].numel() * far[0].element_size())
            found = func(*args, **kwargs)
            return mark(found.clone() if found is args[0] else found, args, True)
        if name == "pin_memory" and near:
            return mark(torch.clone(*args), (), True)
        if named is not None and named.type == "cuda" and kwargs.get("non_blocking"):
            return mark(torch.clone(args[0]), (), False)
        if named is not None and named.type == "cuda" and (near or name in ("tensor", "as_tensor")):
            self.wait("upload")
            found = func(*args, **kwargs)
            return mark(found.clone() if near and found is args[0] else found, (), False)
        if name == "new_tensor" and far:
            self.wait("upload")
        elif near and far and any(x.dim() for x in near):
            if name in ("copy_", "__getitem__", "__setitem__", "index_put_", "index_copy_"):
                self.wait("upload" if not on_host(args[0]) else "fetch")
            else:
                raise AssertionError(
                    f"{[tuple(x.shape) for x in near]} {name} mixes the host's and the GPU's tensors: {where()}"
                )
        elif far and (name in LOOKS or name in SIZED or name in CHECKED):
            self.wait(name)
        elif far and name in ("__getitem__", "__setitem__", "index_put_") and by_truth(args[1]):
            self.wait("boolean index")
        elif far and name == "where" and len(args) == 1:
            self.wait("nonzero")
        elif far and name == "repeat_interleave" and isinstance(args[1], Tensor):
            self.wait(name)
        found = func(*args, **kwargs)
        # autograd's own metadata names the real device: an object, where code writes a string
        real = any(isinstance(x, torch.device) and x.type == "cpu" for x in leaves)
        here = not far and not (real and not tensors) and (named is None or named.type == "cpu")
        return mark(found, args, here)

    def wait(self, what: str) -> None:
        self.waits[what, where()] += 1


def on_host(x: Tensor) -> bool:
    return x.__dict__.get("_on_host", False)


def device_of(x) -> torch.device | None:
    """The device that an argument names."""
    if isinstance(x, torch.device):
        return x
    return torch.device(x) if isinstance(x, str) and x.split(":")[0] in ("cpu", "cuda") else None


def mark(found, args, host: bool):
    """Note where results are; a tensor changed in place stays where it was."""
    for x in tree_leaves(found):
        if isinstance(x, Tensor) and not any(x is a for a in args):
            x.__dict__["_on_host"] = host
    return found


def by_truth(index) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in parts)


def where() -> str:
    """The innermost lines of the package."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(PACKAGE)]
    return " < ".join(f"{Path(f.filename).stem}.{f.name}" for f in reversed(frames[-2:]))
