"""Which inputs hold the samples, and which all samples share although they are as long as the batch.

A table of class descriptions, a memory bank or a mask is passed with every batch. At a step whose
batch has as many samples as the table has rows, the shapes do not show the difference. Two facts do.
A tensor that once had another length than the batch is shared. And a sample alone gives the outputs
that it has in a batch only if every input was read in its own role.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from fimprobe.errors import FimprobeError
from fimprobe.model.batch import Batch
from fimprobe.model.checked_twin import make_checked_twin
from fimprobe.model.runs import Selector, almost_equal, run_forward
from fimprobe.model.twin import TwinSettings


@dataclass
class InputRoles:
    """The roles of a model's inputs, learned over all batches.

    Attributes:
        batched: For an input's place among the arguments, whether it holds the samples; inputs whose
            role is not known are missing.
    """

    batched: dict[str, bool] = field(default_factory=dict)

    def apply(self, batch: Batch) -> Batch:
        """Return the batch with the roles that are known, and learn from its shapes.

        A length of 1 shows nothing: such a tensor is broadcast over the batch.
        """
        places = _places(batch)
        whole = batch.origin or batch
        for i, (place, x) in places.items():
            length = x.shape[0] if batch.origin is None else _places(whole)[i][1].shape[0]
            if length not in (1, whole.size):
                self.batched[place] = False
        shared = [i for i, (place, _) in places.items() if self.batched.get(place) is False]
        return batch.with_shared(shared)

    def undecided(self, batch: Batch) -> list[int]:
        """Return the leaves that may hold the samples or not.

        The first tensor defines the number of samples and holds them.
        """
        places = _places(batch)
        first = min(places)
        return [i for i in batch.batched if i != first and places[i][0] not in self.batched]

    def decide(self, batch: Batch, undecided: list[int]) -> None:
        """Keep the roles that a batch has."""
        places = _places(batch)
        self.batched |= {places[i][0]: i in batch.batched for i in undecided}


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
    undecided = roles.undecided(batch)
    if not undecided or batch.size == 1:
        return (*make_checked_twin(model, batch, select_outputs, settings), batch)
    first = None
    error: FimprobeError | None = None
    for shared in _candidates(undecided):
        trial = batch.with_shared(shared)
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
            roles.decide(trial, undecided)
            return twin, _add_note(checked, batch, shared), trial
    if first is None:
        assert error is not None
        raise error
    return first  # the measurement reports that the samples are coupled


def _candidates(undecided: list[int]) -> Iterator[tuple[int, ...]]:
    """Sets of inputs that may be shared: none, each, all."""
    yield ()
    yield from ((i,) for i in undecided)
    if len(undecided) > 1:
        yield tuple(undecided)


def _samples_are_independent(twin: nn.Module, batch: Batch, select_outputs: Selector) -> bool:
    """Whether two samples have the same outputs alone as together."""
    try:
        together = run_forward(twin, batch[:2], select_outputs)
        alone = [run_forward(twin, batch[i : i + 1], select_outputs) for i in range(2)]
    except Exception:  # the model needs more samples, or the roles are wrong
        return False
    if len(together) != 2 or any(len(x) != 1 for x in alone):
        return False
    return all(almost_equal(x[0], y) for (x, y) in zip(alone, together, strict=True))


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
    leaves, _ = tree_flatten_with_path((batch.args, batch.kwargs))
    return {
        i: (_name(path), x)
        for i, (path, x) in enumerate(leaves)
        if isinstance(x, Tensor) and x.dim() > 0
    }


def _name(path: tuple[Any, ...]) -> str:
    """A place in words: ``args[1]``, ``kwargs['mask']``."""
    kind = "kwargs" if str(path[0]) == "[1]" else "args"
    return kind + keystr(path[1:])
