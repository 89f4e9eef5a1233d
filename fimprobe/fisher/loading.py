"""Reading a Fisher back."""

from __future__ import annotations

import os

from torch import nn

from fimprobe.errors import FimprobeError
from fimprobe.fisher.decisions import check_shapes
from fimprobe.fisher.file import read_file
from fimprobe.fisher.fisher import Fisher
from fimprobe.fisher.records import GroupFisher
from fimprobe.model.twin import trainable


def load_fisher(path: str | os.PathLike[str], model: nn.Module | None = None) -> Fisher:
    """Read what :meth:`Fisher.save` wrote.

    Args:
        path: The file.
        model: If given, its parameters must have the names and shapes of the file, and the tensors
            are moved to its device.

    Raises:
        FimprobeError: If the file cannot be read, or belongs to another model.
    """
    tensors, metadata = read_file(path)
    named = {
        prefix: {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
        for prefix in ("std_error/", "parameter/")
    }
    diagonal = {
        key: x for key, x in tensors.items() if not key.startswith(("std_error/", "parameter/"))
    }
    if set(named["std_error/"]) != set(diagonal):
        raise FimprobeError(
            f"`path` must hold a standard error for each parameter, but {os.fspath(path)!r} does "
            "not. Save the Fisher again."
        )
    order = list(metadata["parameters"])
    total, layers, parameters = (metadata.pop(key) for key in ("total", "layers", "parameters"))
    metadata.pop("format")
    fisher = Fisher(
        diagonal={name: diagonal[name] for name in order},
        std_error={name: named["std_error/"][name] for name in order},
        values={name: named["parameter/"][name] for name in order},
        total=GroupFisher(**total),
        layers={name: GroupFisher(**group) for name, group in layers.items()},
        parameters={name: GroupFisher(**group) for name, group in parameters.items()},
        metadata=metadata,
    )
    if model is not None:
        known = trainable(model)
        check_shapes("model", known, fisher.diagonal)
        for tensors_by_name in (fisher.diagonal, fisher.std_error, fisher.values):
            for name, x in tensors_by_name.items():
                tensors_by_name[name] = x.to(known[name].device)
    return fisher
