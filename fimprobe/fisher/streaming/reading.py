"""From the batches of a data set to inputs of the model and masks of labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fimprobe.errors import FimprobeError
from fimprobe.fisher.streaming.family import positions_of_labels
from fimprobe.model.batch import Batch
from fimprobe.model.twin import unwrap

LABEL_NAMES = ("label", "labels", "target", "targets", "y")
"""Names of labels in mappings, and of arguments that take them."""


@dataclass(kw_only=True)
class InputReader:
    """Turns batches into inputs of the model and masks of labels.

    Attributes:
        model: The model, for the names of its arguments and its device.
        inputs: From a batch to the model's inputs; None for the rules of :meth:`read`.
        mask: From a batch to a boolean tensor of the labels' shape; None for all labels.
        ignored: The label of positions without one; None where the family has none.
        notes: What a reader of the numbers must know about the batches.
    """

    model: nn.Module
    inputs: Callable[[Any], Any] | None
    mask: Callable[[Any], Tensor | None] | None
    ignored: int | None = None
    notes: list[str] = field(default_factory=list)

    def read(self, raw: Any) -> tuple[Batch, Tensor | None] | None:
        """Return inputs and mask on the model's device; None for an empty batch.

        A tensor is the input, the first of a pair is, and a mapping holds keyword arguments, of which
        those that the forward does not accept are left out.

        Raises:
            FimprobeError: If the batch has another form.
        """
        selected = self.inputs(raw) if self.inputs is not None else self._select(raw)
        leaves = [x for x in tree_leaves(_plain(selected)) if isinstance(x, Tensor) and x.dim() > 0]
        if not leaves:
            raise FimprobeError(
                "`data` must yield tensors, pairs (inputs, labels) or mappings of tensors, batch "
                f"first, got {type(raw).__name__} without a tensor of a batch. Pass `inputs`, a "
                "function from a batch to the model's inputs."
            )
        if leaves[0].shape[0] == 0:
            return None
        parameter = next(unwrap(self.model).parameters())
        moved = _to(_plain(selected), parameter.device)
        mask = self._known_labels(raw) if self.mask is None else self.mask(raw)
        if isinstance(moved, dict):
            moved, positions = positions_of_labels(self.model, moved)
            mask = positions if self.mask is None else mask
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
            raise FimprobeError(
                "`mask` must return a boolean tensor with an entry for each label, got "
                f"{mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}. Return "
                "attention_mask.bool() or the like."
            )
        return Batch.of(moved), None if mask is None else mask.to(parameter.device)

    def _select(self, raw: Any) -> Any:
        if isinstance(raw, Mapping):
            accepted = _keywords(unwrap(self.model))
            chosen = {k: v for k, v in raw.items() if accepted is None or k in accepted}
            if not chosen:
                raise FimprobeError(
                    f"`data` must yield mappings with arguments of the model, got keys "
                    f"{sorted(map(str, raw))}. Pass `inputs`, a function from a batch to the model's "
                    "inputs."
                )
            return chosen
        if isinstance(raw, (tuple, list)):
            if not 1 <= len(raw) <= 2:
                raise FimprobeError(
                    f"`data` must yield tensors, pairs (inputs, labels) or mappings, got a "
                    f"{type(raw).__name__} of {len(raw)}. Pass `inputs`, a function from a batch to "
                    "the model's inputs, such as lambda batch: batch[:2]."
                )
            self._note_second(raw)
            return raw[0]
        return raw

    def _known_labels(self, raw: Any) -> Tensor | None:
        """Which labels of a pair are not the ignored one; None if all are known."""
        labels = raw[1] if isinstance(raw, (tuple, list)) and len(raw) == 2 else None
        if self.ignored is None or not isinstance(labels, Tensor) or labels.is_floating_point():
            return None
        known = labels != self.ignored
        if bool(known.all()):
            return None
        self.note(f"Positions whose label is {self.ignored} are left out, as losses leave them out.")
        if not bool(known.flatten(1).any(1).all() if known.dim() > 1 else known.all()):
            self.note("Inputs without a label add nothing to F, but count in its mean.")
        return known

    def _note_second(self, raw: Any) -> None:
        """Note that what looks like an input is taken as labels."""
        second = raw[1] if len(raw) == 2 else None
        name = _second_argument(unwrap(self.model))
        if not isinstance(second, Tensor) or name is None or name in LABEL_NAMES:
            return
        if second.is_floating_point() or second.dtype == torch.bool or second.dim() > 1:
            self.note(
                f"The second of each pair is taken as labels, though the forward accepts {name!r}. "
                "Pass inputs=lambda batch: tuple(batch) if it is an input."
            )

    def note(self, text: str) -> None:
        """Add a note once; an empty one is none."""
        if text and text not in self.notes:
            self.notes.append(text)


def _plain(inputs: Any) -> Any:
    """A mapping of any class as a dictionary, so that its tensors are found."""
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


def _to(inputs: Any, device: torch.device) -> Any:
    def moved(x: Any) -> Any:
        return x.detach().to(device) if isinstance(x, Tensor) else x

    return tree_map(moved, inputs)


def _keywords(model: nn.Module) -> set[str] | None:
    """Names of the forward's arguments; None where it accepts any."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def _second_argument(model: nn.Module) -> str | None:
    """The name of the second positional argument of the forward; None if there is none."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in kinds]
    return names[1] if len(names) > 1 else None


def class_labels(raw: Any) -> Tensor | None:
    """Return one class label for each input [B], if a batch as the data yield it has these."""
    labels = None
    if isinstance(raw, Mapping):
        labels = next((raw[name] for name in LABEL_NAMES if name in raw), None)
    elif isinstance(raw, (tuple, list)) and len(raw) == 2:
        labels = raw[1]
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        return None
    return labels
