"""Which inputs hold the samples, and which all samples share although they are as long as the batch.

A table of class descriptions, a memory bank or a mask is passed with every batch. At a step whose
batch has as many samples as the table has rows, the shapes do not show the difference. Two facts do.
A tensor that once had another length than the batch is shared. And a sample alone gives the outputs
that it has in a batch only if every input was read in its own role.

A mask of B·heads rows holds k rows for each sample. Its length is a multiple of the batch, as that of
a memory bank may be; samples alone show the difference again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from fimprobe.errors import FimprobeError
from fimprobe.model.batch import Batch, flatten_arguments
from fimprobe.model.checked_twin import make_checked_twin
from fimprobe.model.runs import Selector, almost_equal, run_forward
from fimprobe.model.twin import TwinSettings

_COMPARED = 16
"""About as many samples of a batch are compared."""


@dataclass
class InputRoles:
    """The roles of a model's inputs, learned over all batches.

    Attributes:
        batched: For an input's place among the arguments, whether it holds the samples, or "folded"
            where it holds several rows for each; inputs whose role is not known are missing.
    """

    batched: dict[str, bool | str] = field(default_factory=dict)

    def apply(self, batch: Batch) -> Batch:
        """Return the batch with the roles that are known, and learn from its shapes.

        A length of 1 shows nothing: such a tensor is broadcast over the batch.
        """
        places = _places(batch)
        whole = batch.origin or batch
        for i, (place, x) in places.items():
            length = x.shape[0] if batch.origin is None else _places(whole)[i][1].shape[0]
            may_be_folded = length % whole.size == 0 and self.batched.get(place) in (None, "folded")
            if length not in (1, whole.size) and not may_be_folded:
                self.batched[place] = False
        roles = {i: self.batched.get(place) for i, (place, _) in places.items()}
        folded = [i for i, role in roles.items() if role == "folded"]
        return batch.with_shared([i for i, role in roles.items() if role is False]).with_folded(
            folded
        )

    def undecided(self, batch: Batch) -> list[int]:
        """Return the leaves that may hold the samples or not.

        The first tensor defines the number of samples and holds them.
        """
        places = _places(batch)
        first = min(places)
        return [i for i in batch.batched if i != first and places[i][0] not in self.batched]

    def foldable(self, batch: Batch) -> list[int]:
        """Return the leaves of unknown role whose length is a multiple of the batch."""
        whole = batch.origin or batch
        return [
            i
            for i, (place, x) in _places(whole).items()
            if whole.size > 1
            and x.dim() > 1
            and place not in self.batched
            and len(x) > whole.size
            and len(x) % whole.size == 0
        ]

    def decide(self, batch: Batch, undecided: list[int]) -> None:
        """Keep the roles that a batch has."""
        places = _places(batch)
        for i in undecided:
            self.batched[places[i][0]] = "folded" if batch.batched.get(i) else i in batch.batched

    def forget_samples(self) -> bool:
        """Forget which inputs were seen to hold samples; return whether there were any.

        An input that no sample has read yet may be a table that later samples share.
        """
        known = {place: role for place, role in self.batched.items() if role is not False}
        for place in known:
            del self.batched[place]
        return bool(known)


def make_twin_for_batch(
    model: nn.Module,
    batch: Batch,
    select_outputs: Selector,
    settings: TwinSettings | None,
    roles: InputRoles,
) -> tuple[nn.Module, TwinSettings | None, Batch]:
    """Return a checked twin and the batch with the role of each input.

    Inputs of unknown role are assumed to hold the samples. If samples then influence each other, or
    the model fails, one input after the other is tried as a table that all samples share.

    Args:
        model: The user's model.
        batch: The inputs of the measurement.
        select_outputs: From what the model returns to the outputs [B, ...].
        settings: Those of the last measurement, or None.
        roles: The roles known so far; changed in place.

    Returns:
        The twin, the settings to make the next one with, and the batch.

    Raises:
        FimprobeError: If no copy can be the model; it names what differs.
    """
    batch = roles.apply(batch)
    undecided, foldable = roles.undecided(batch), roles.foldable(batch)
    if not (undecided or foldable) or batch.size == 1:
        return (*make_checked_twin(model, batch, select_outputs, settings), batch)
    first = None
    error: FimprobeError | None = None
    for shared, folded in _candidates(undecided, foldable):
        trial = batch.with_shared(shared).with_folded(folded)
        try:
            twin, checked = make_checked_twin(model, trial, select_outputs, settings)
        except FimprobeError as failure:
            error = error or failure
            continue
        if checked is None:  # the outputs are not finite: nothing can be compared
            return twin, checked, batch
        if first is None:
            first = twin, checked, batch
        if _samples_are_independent(twin, trial, select_outputs):
            roles.decide(trial, [*undecided, *foldable])
            return twin, _add_note(checked, batch, shared), trial
    if first is None:
        assert error is not None
        raise error
    return first  # the measurement reports that the samples are coupled


def _candidates(
    undecided: list[int], foldable: list[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Sets of inputs that are shared (none, each, all), and of those that are folded (none, all)."""
    shared: list[tuple[int, ...]] = [(), *((i,) for i in undecided)]
    if len(undecided) > 1:
        shared.append(tuple(undecided))
    for folded in [(), tuple(foldable)] if foldable else [()]:
        yield from ((each, folded) for each in shared)


def _samples_are_independent(twin: nn.Module, batch: Batch, select_outputs: Selector) -> bool:
    """Whether samples have the same outputs in two halves of a batch, and two of them alone.

    The halves show a table that only some of the samples read.
    """
    batch = batch[torch.arange(0, batch.size, max(1, batch.size // _COMPARED))]
    half = batch.size // 2
    try:
        together = run_forward(twin, batch, select_outputs)
        halves = [run_forward(twin, x, select_outputs) for x in (batch[:half], batch[half:])]
        alone = [run_forward(twin, batch[i : i + 1], select_outputs) for i in range(2)]
    except Exception:  # the model needs more samples, or the roles are wrong
        return False
    if len(together) != batch.size or any(len(x) != 1 for x in alone):
        return False
    first = zip(alone, together[:2], strict=True)
    return all(almost_equal(x[0], y) for x, y in first) and almost_equal(torch.cat(halves), together)


def _add_note(settings: TwinSettings, batch: Batch, shared: tuple[int, ...]) -> TwinSettings:
    if not shared:
        return settings
    names = ", ".join(f"`{_places(batch)[i][0]}`" for i in shared)
    note = (
        f"The input {names} was as long as the batch when it was first seen. It was measured as "
        "shared by all samples: with a row for each sample, the samples would influence each other."
    )
    return replace(settings, notes=(*settings.notes, note))


def _places(batch: Batch) -> dict[int, tuple[str, Tensor]]:
    """The place and the value of each tensor with dimensions, by its index among the leaves."""
    leaves, structure = flatten_arguments(batch.args, batch.kwargs)
    if structure is None:
        names = [f"args[{i}]" for i in range(len(leaves))]
    else:
        paths, _ = tree_flatten_with_path((batch.args, batch.kwargs))
        names = [_name(path) for path, _ in paths]
    places = enumerate(zip(names, leaves, strict=True))
    return {i: (name, x) for i, (name, x) in places if isinstance(x, Tensor) and x.dim() > 0}


def _name(path: tuple[Any, ...]) -> str:
    """A place in words: ``args[1]``, ``kwargs['mask']``."""
    kind = "kwargs" if str(path[0]) == "[1]" else "args"
    return kind + keystr(path[1:])
