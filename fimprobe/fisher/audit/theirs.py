"""Reading the diagonal that is audited, whatever holds it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.errors import FimprobeError, describe_error
from fimprobe.fisher.file import read_tensors
from fimprobe.fisher.records import FisherRecord
from fimprobe.model.twin import trainable, unwrap
from fimprobe.report.format import some

FORMS = (
    "a mapping from parameters' names to tensors, one vector of all entries, a .pt or .safetensors "
    "file of these, a Fisher, nngeometry's PMatDiag, laplace-torch's DiagLaplace or an optimizer"
)

_ACCUMULATOR = "exp_avg_sq"
_PREFIXES = ("module.", "_orig_mod.")


def read_theirs(theirs: Any, model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Return a diagonal by parameter, float64 on the devices of the parameters, and notes.

    Args:
        theirs: What :func:`fimprobe.audit` accepts.
        model: The model; its trainable parameters are the ones that are compared.

    Returns:
        Tensors in the shapes of the parameters; those that are missing are left out with a note.

    Raises:
        FimprobeError: If no parameter is in ``theirs``, a shape differs or an entry is not finite.
    """
    known = trainable(model)
    named = _named(theirs, model)
    missing = [name for name in known if name not in named]
    if len(missing) == len(known):
        raise FimprobeError(
            f"`theirs` must be named as the model's parameters ({some(list(known))}), got "
            f"{some(list(named)) or 'nothing'}. Pass what was computed for this model, under the "
            "names of model.named_parameters()."
        )
    for name, parameter in known.items():
        if name in named:
            _check(name, named[name], parameter)
    diagonal = {
        name: named[name].detach().to(p.device, torch.float64)
        for name, p in known.items()
        if name in named
    }
    notes = []
    if missing:
        notes.append(
            f"{len(missing)} of {len(known)} parameters are not in `theirs` ({some(missing)}): the "
            "comparison leaves them out."
        )
    unknown = [name for name in named if name not in known]
    if unknown:
        notes.append(
            f"{len(unknown)} names in `theirs` are not trainable parameters of the model "
            f"({some(unknown)}): they are not compared."
        )
    negative = [name for name, x in diagonal.items() if bool((x < 0).any())]
    if negative:
        notes.append(f"`theirs` has negative entries ({some(negative)}): F has none.")
    return diagonal, notes


def _check(name: str, x: Tensor, parameter: Tensor) -> None:
    if x.shape != parameter.shape:
        raise FimprobeError(
            f"`theirs` must have the shapes of the parameters, but {name!r} is {tuple(x.shape)} and "
            f"the parameter {tuple(parameter.shape)}. Pass what was computed for this model."
        )
    if x.is_meta or x.is_complex() or not bool(torch.isfinite(x).all()):
        raise FimprobeError(
            f"`theirs` must hold finite real numbers, but {name!r} has others, or none (device "
            "'meta'). Check for overflow in half precision."
        )


def _named(theirs: Any, model: nn.Module) -> dict[str, Tensor]:
    """The tensors by name, whatever the form of ``theirs``."""
    if isinstance(theirs, (str, os.PathLike)):
        theirs = _read(Path(theirs))
    bases = [base.__name__ for base in type(theirs).__mro__]
    if isinstance(theirs, FisherRecord):
        return dict(theirs.diagonal)
    if isinstance(theirs, torch.optim.Optimizer):
        return _of_optimizer(theirs, model)
    if "PMatDiag" in bases:
        return _of_nngeometry(theirs, model)
    if "DiagLaplace" in bases:
        theirs = theirs.H
    if isinstance(theirs, Tensor):
        return _of_vector(theirs, model)
    if isinstance(theirs, Mapping):
        if {"state", "param_groups"} <= set(theirs):
            return _of_optimizer_state(theirs, model)
        return {_without_prefix(str(name)): _tensor(name, x) for name, x in theirs.items()}
    raise FimprobeError(f"`theirs` must be {FORMS}, got {type(theirs).__name__}. Pass one of these.")


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        tensors, _ = read_tensors(path, "theirs")
        hidden = ("std_error/", "parameter/")  # of a file that Fisher.save wrote
        return {name: x for name, x in tensors.items() if not name.startswith(hidden)}
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FimprobeError(
            f"`theirs` must be a file, got {str(path)!r}, which does not exist."
        ) from None
    except Exception as error:
        raise FimprobeError(
            f"`theirs` must be a file of tensors, but {str(path)!r} cannot be read "
            f"({describe_error(error).splitlines()[0]}). Save a mapping of plain tensors by "
            "torch.save."
        ) from None


def _tensor(name: Any, x: Any) -> Tensor:
    """A tensor; some libraries wrap it in an object with ``data``."""
    held = x if isinstance(x, Tensor) else getattr(x, "data", None)
    if isinstance(held, Tensor):
        return held
    try:
        return torch.as_tensor(x)
    except Exception:
        raise FimprobeError(
            f"`theirs` must map names to tensors, but {name!r} is a {type(x).__name__}. Pass the "
            "inner mapping, whose keys are the names of the parameters."
        ) from None


def _without_prefix(name: str) -> str:
    name = name.replace("_orig_mod.", "")
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _of_vector(vector: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """The parts of a vector in the order of ``model.parameters()``."""
    trained = trainable(model)
    every = {_without_prefix(n): p for n, p in unwrap(model).named_parameters()}
    for parameters in (trained, every):
        sizes = [p.numel() for p in parameters.values()]
        if vector.numel() == sum(sizes):
            parts = vector.reshape(-1).split(sizes)
            pairs = zip(parameters.items(), parts, strict=True)
            return {n: part.view(p.shape) for (n, p), part in pairs if n in trained}
    raise FimprobeError(
        f"`theirs` must have an entry for each of the model's "
        f"{sum(p.numel() for p in trained.values()):,} trainable ones, got a tensor of "
        f"{vector.numel():,}. Pass what was computed for this model."
    )


def _of_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Adam's accumulators of the model's parameters."""
    named = {
        name: optimizer.state[p][_ACCUMULATOR]
        for name, p in trainable(model).items()
        if _ACCUMULATOR in optimizer.state.get(p, {})
    }
    if not named:
        raise FimprobeError(
            f"`theirs` must be an optimizer with {_ACCUMULATOR!r} of this model's parameters, got a "
            f"{type(optimizer).__name__} without. Pass an Adam of this model after a step."
        )
    return named


def _of_optimizer_state(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Adam's accumulators in a state dictionary, whose parameters have numbers."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    names = list(trainable(model))
    if len(numbers) != len(names):
        raise FimprobeError(
            f"`theirs` must be the state of an optimizer of this model's {len(names)} trainable "
            f"parameters, got one of {len(numbers)}. Pass the optimizer itself."
        )
    entries = {n: state["state"].get(i, {}) for n, i in zip(names, numbers, strict=True)}
    named = {n: entry[_ACCUMULATOR] for n, entry in entries.items() if _ACCUMULATOR in entry}
    if not named:
        raise FimprobeError(
            f"`theirs` must be the state of an optimizer with {_ACCUMULATOR!r}, got one without. "
            "Pass that of an Adam after a step."
        )
    return named


def _of_nngeometry(matrix: Any, model: nn.Module) -> dict[str, Tensor]:
    """The diagonal of a PMatDiag: layer after layer, weight before bias."""
    collection = getattr(matrix, "layer_collection", None) or matrix.generator.layer_collection
    names = trainable(model)
    diagonal, named, start = matrix.get_diag(), {}, 0
    for layer in collection.layers:
        for local in ("weight", "bias"):
            name = _without_prefix(f"{layer}.{local}")
            if name in names:
                stop = start + names[name].numel()
                named[name] = diagonal[start:stop].view(names[name].shape)
                start = stop
    if start != diagonal.numel():
        raise FimprobeError(
            f"`theirs` must be a PMatDiag of this model, but it has {diagonal.numel():,} entries and "
            f"its layers have {start:,} here. Pass the model that it was computed for."
        )
    return named
