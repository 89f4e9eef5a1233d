"""The outputs among what a forward returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError

MAX_DEPTH = 4
"""Depth of containers in what a model returns down to which outputs have names."""


def select_outputs(out: Any) -> Tensor:
    """The network's outputs among what a forward returns."""
    if isinstance(out, Tensor):
        return out
    if isinstance(out, Mapping) and isinstance(out.get("logits"), Tensor):
        return out["logits"]  # type: ignore[no-any-return]
    if isinstance(getattr(out, "logits", None), Tensor):
        return out.logits  # type: ignore[no-any-return]
    if isinstance(out, (tuple, list)):
        for x in out:
            if isinstance(x, Tensor) and x.dim() > 0:
                return x
    keys = f" with keys {sorted(map(str, out))}" if isinstance(out, Mapping) else ""
    raise FimprobeError(
        f"the model returns {type(out).__name__}{keys}, which has no logits; pass output= a "
        "function from it to the outputs [B, ...], or, if it holds none, call probe.step(inputs) "
        "with inputs for which the model returns them"
    )


@dataclass(frozen=True, kw_only=True)
class FamilyOutputs:
    """Selects outputs by the method ``select_outputs`` of a family that reads several tensors.

    Args:
        family: The family.
        output: From what the model returns to what the family reads; None for all that it returns.
    """

    family: Any
    output: Callable[[Any], Any] | None = None

    def __call__(self, returned: Any) -> Tensor:
        """Return the outputs [B, ...]."""
        selected = returned if self.output is None else self.output(returned)
        outputs: Tensor = self.family.select_outputs(selected)
        return outputs


def selector_for(family: Any, output: Callable[[Any], Any] | None) -> Callable[[Any], Tensor]:
    """Return what selects the outputs of a family of one head.

    Args:
        family: The family; with a method ``select_outputs`` where it reads several tensors.
        output: The user's function from what the model returns, or None.
    """
    if hasattr(family, "select_outputs"):
        return FamilyOutputs(family=family, output=output)
    return output or select_outputs


class MissingOutputError(FimprobeError):
    """The model did not return a named output, perhaps in eval mode only."""


def named_outputs(out: Any) -> dict[str, Tensor]:
    """Return the tensors with a batch dimension in what a forward returns, by field or position.

    >>> named_outputs({"scores": torch.ones(2, 3), "more": (torch.ones(2), 0.5)}).keys()
    dict_keys(['scores', 'more.0'])
    """
    return {path: x for path, x in _walk(out, "", MAX_DEPTH) if isinstance(x, Tensor) and x.dim() > 0}


@dataclass(frozen=True, kw_only=True)
class NamedOutput:
    """Selects one output of a model by its name.

    Args:
        path: A name of ``named_outputs``.
        output: From what the model returns to the outputs; None for all that it returns.
    """

    path: str
    output: Callable[[Any], Any] | None = None

    def __call__(self, returned: Any) -> Tensor:
        """Return the output [B, ...].

        Raises:
            MissingOutputError: If the model returned none of this name.
        """
        named = named_outputs(returned if self.output is None else self.output(returned))
        if self.path not in named:
            raise MissingOutputError(
                f"the model must return the output {self.path!r}, which the loss reads, got "
                f"{list(named)}. Pass output= a function that selects it in both modes."
            )
        return named[self.path]


@dataclass(frozen=True, kw_only=True)
class NamedParts:
    """Selects several outputs of a model by their names, as one tuple.

    Args:
        paths: Names of ``named_outputs``.
        output: From what the model returns to the outputs; None for all that it returns.
    """

    paths: tuple[str, ...]
    output: Callable[[Any], Any] | None = None

    def __call__(self, returned: Any) -> tuple[Tensor, ...]:
        """Return the outputs.

        Raises:
            MissingOutputError: If the model returned none of a name.
        """
        return tuple(NamedOutput(path=path, output=self.output)(returned) for path in self.paths)


@dataclass(frozen=True, kw_only=True)
class JoinedOutputs:
    """Selects several outputs of a model and joins them to one tensor [B, Σ outputs].

    Args:
        paths: Names of ``named_outputs``, or positions among them.
        output: From what the model returns to the outputs; None for all that it returns.
    """

    paths: tuple[str, ...]
    output: Callable[[Any], Any] | None = None

    def heads(self, returned: Any) -> dict[str, Tensor]:
        """Return the selected tensors [B, ...] of what the model returned.

        Raises:
            MissingOutputError: If one is missing.
            FimprobeError: If they differ in the first dimension.
        """
        named = named_outputs(returned if self.output is None else self.output(returned))
        ordered = list(named.values())
        heads = {}
        for path in self.paths:
            is_position = path.isdecimal() and int(path) < len(ordered)
            if path not in named and not is_position:
                returned_words = "a tensor" if list(named) == [""] else str(list(named))
                raise MissingOutputError(
                    f"`likelihood` must name outputs of the model, got {path!r}; it returned "
                    f"{returned_words}. Use the names of outputs or their positions, and let the "
                    "model return them in eval mode, too, where it is measured."
                )
            heads[path] = named[path] if path in named else ordered[int(path)]
        lengths = {path: len(head) for path, head in heads.items()}
        if len(set(lengths.values())) > 1:
            raise FimprobeError(
                f"the outputs of all heads must have one row for each sample, got {lengths}. Name "
                "outputs whose first dimension is the batch."
            )
        return heads

    def __call__(self, returned: Any) -> Tensor:
        """Return the selected outputs, each flattened, side by side."""
        return torch.cat([h.reshape(len(h), -1) for h in self.heads(returned).values()], 1)


def _walk(out: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested containers with their paths."""
    fields: dict[Any, Any]
    if isinstance(out, Mapping):
        fields = dict(out)
    elif isinstance(out, tuple) and hasattr(out, "_fields"):
        fields = dict(zip(out._fields, out, strict=True))
    elif isinstance(out, (tuple, list)):
        fields = dict(enumerate(out))
    elif dataclasses.is_dataclass(out) and not isinstance(out, type):
        fields = vars(out)
    else:
        fields = {}
    if not fields or not depth:
        yield path, out
        return
    for name, x in fields.items():
        yield from _walk(x, f"{path}.{name}" if path else str(name), depth - 1)
