"""Probabilities with which entries of a layer are drawn, from what Î₁'s own backward has computed.

Any positive probabilities are right; those in proportion to an entry's share of V2 give the least
noise. R_oi of a weight sums x_ti² times a curvature at unit o over positions t, so that its square
follows Σ_t x_ti⁴ along the inputs i and the gradients' squares along the units o. A share that is
spread evenly bounds the weights of entries that seem unimportant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fimprobe.engines.spot_checks.probabilities import (
    Ranked,
    evenly_spaced,
    indices,
    mixed_with_even,
    place_of,
)

EVEN_ENTRIES = 0.2
"""Share of the probability that is spread evenly over entries, units or columns."""

EVEN_INPUTS = 0.5
"""Share of the probability that is spread evenly over inputs."""

EVEN_DRAWS = 0.15
"""Share of the draws that are even over all entries of all inputs of a layer."""

EVEN_PARAMETERS = 0.1
"""Share of the probability that is spread evenly over the parameters of a layer."""


class EntryProposal(Protocol):
    """Maps random numbers to entries of one parameter."""

    def draw(self, row: int, uniform: tuple[float, float]) -> int:
        """Return an entry's index in the flattened parameter.

        Args:
            row: Place of the input in the batch.
            uniform: Two random numbers, each uniform between 0 and 1.
        """

    def probability(self, row: int, entry: int) -> float:
        """Return the probability of an entry.

        Args:
            row: Place of the input in the batch.
            entry: The entry.
        """

    def draw_evenly(self, row: int, uniform: tuple[float, float]) -> int:
        """Return an entry; all that may have curvature for this input are equally likely.

        Args:
            row: Place of the input in the batch.
            uniform: Two random numbers, each uniform between 0 and 1.
        """

    def num_entries(self, row: int) -> int:
        """Return the number of entries that may have curvature for an input."""


@dataclass(kw_only=True)
class FlatProposal:
    """Entries in proportion to their share of diag F, the same for all inputs.

    Attributes:
        squares: Σ g² of every entry, in the parameter's shape.
    """

    squares: Tensor
    _probabilities: Ranked | None = None

    def draw(self, row: int, uniform: tuple[float, float]) -> int:
        """Return an entry; ``row`` and the second number are not read."""
        return self._ranked().draw(uniform[0])

    def probability(self, row: int, entry: int) -> float:
        """Return the probability of an entry; ``row`` is not read."""
        return self._ranked().probabilities[entry]

    def draw_evenly(self, row: int, uniform: tuple[float, float]) -> int:
        """Return an entry, all equally likely; ``row`` is not read."""
        return place_of(uniform[0], self.squares.numel())

    def num_entries(self, row: int) -> int:
        """Return the number of entries of the parameter; ``row`` is not read."""
        return self.squares.numel()

    def _ranked(self) -> Ranked:
        if self._probabilities is None:
            even = mixed_with_even(self.squares.flatten().double(), EVEN_ENTRIES)
            self._probabilities = Ranked.of(even)
        return self._probabilities


@dataclass(kw_only=True)
class OuterProposal:
    """Entries (unit o, column i) of a weight whose gradient is a sum of outer products.

    Attributes:
        units: Probabilities of the units [O].
        columns: Probabilities of the columns for each input [B, I].
        unit_first: Whether the parameter is [O, I]; else [I, O].
    """

    units: Tensor
    columns: Tensor
    unit_first: bool
    _ranked_units: Ranked | None = None
    _ranked_columns: dict[int, Ranked] = field(default_factory=dict)

    def draw(self, row: int, uniform: tuple[float, float]) -> int:
        """Return an entry, for the input at ``row``."""
        unit = self._ranked().draw(uniform[0])
        return self._entry(unit, self._ranked_at(row).draw(uniform[1]))

    def probability(self, row: int, entry: int) -> float:
        """Return the probability of an entry, for the input at ``row``."""
        first, second = divmod(entry, self.columns.shape[1] if self.unit_first else len(self.units))
        unit, column = (first, second) if self.unit_first else (second, first)
        return self._ranked().probabilities[unit] * self._ranked_at(row).probabilities[column]

    def draw_evenly(self, row: int, uniform: tuple[float, float]) -> int:
        """Return an entry, all equally likely; ``row`` is not read."""
        columns = self.columns.shape[1]
        return self._entry(place_of(uniform[0], len(self.units)), place_of(uniform[1], columns))

    def num_entries(self, row: int) -> int:
        """Return the number of entries of the parameter; ``row`` is not read."""
        return len(self.units) * self.columns.shape[1]

    def _ranked(self) -> Ranked:
        if self._ranked_units is None:
            self._ranked_units = Ranked.of(self.units)
        return self._ranked_units

    def _ranked_at(self, row: int) -> Ranked:
        if row not in self._ranked_columns:
            self._ranked_columns[row] = Ranked.of(self.columns[row])
        return self._ranked_columns[row]

    def _entry(self, unit: int, column: int) -> int:
        if self.unit_first:
            return unit * self.columns.shape[1] + column
        return column * len(self.units) + unit


@dataclass(kw_only=True)
class LookupProposal:
    """Entries (token, unit) of a lookup, among the tokens of the input: the others have no curvature.

    Attributes:
        units: Probabilities of the units [D].
        tokens: Tokens of each input, each once.
        probabilities: Their probabilities.
    """

    units: Tensor
    tokens: list[Tensor]
    probabilities: list[Tensor]
    _ranked_units: Ranked | None = None
    _ranked_tokens: dict[int, tuple[Ranked, list[int]]] = field(default_factory=dict)

    def draw(self, row: int, uniform: tuple[float, float]) -> int:
        """Return an entry, for the input at ``row``."""
        unit = self._ranked().draw(uniform[0])
        return self._entry(row, self._ranked_at(row)[0].draw(uniform[1]), unit)

    def probability(self, row: int, entry: int) -> float:
        """Return the probability of an entry, for the input at ``row``."""
        token, unit = divmod(entry, len(self.units))
        ranked, tokens = self._ranked_at(row)
        if token not in tokens:
            return 0.0
        return self._ranked().probabilities[unit] * ranked.probabilities[tokens.index(token)]

    def draw_evenly(self, row: int, uniform: tuple[float, float]) -> int:
        """Return an entry of a token of the input at ``row``, all equally likely."""
        place = place_of(uniform[1], len(self.tokens[row]))
        return self._entry(row, place, place_of(uniform[0], len(self.units)))

    def num_entries(self, row: int) -> int:
        """Return the number of entries of the tokens of the input at ``row``."""
        return len(self.tokens[row]) * len(self.units)

    def _ranked(self) -> Ranked:
        if self._ranked_units is None:
            self._ranked_units = Ranked.of(self.units)
        return self._ranked_units

    def _ranked_at(self, row: int) -> tuple[Ranked, list[int]]:
        if row not in self._ranked_tokens:
            ranked = Ranked.of(self.probabilities[row])
            self._ranked_tokens[row] = ranked, self.tokens[row].tolist()
        return self._ranked_tokens[row]

    def _entry(self, row: int, place: int, unit: int) -> int:
        return self._ranked_at(row)[1][place] * len(self.units) + unit


@dataclass(kw_only=True)
class LayerProposal:
    """Draws an input, a parameter of a layer, and one of its entries.

    Attributes:
        inputs: Probabilities of the inputs [B].
        parameters: Probability of each parameter, by name.
        entries: What draws its entries, by name.
        kind: Name that layers of the same kind share.
    """

    inputs: Tensor
    parameters: dict[str, float]
    entries: dict[str, EntryProposal]
    kind: str

    def draw(self, count: int, generator: torch.Generator) -> list[DrawnEntry]:
        """Draw entries whose inputs, parameters, units and columns are spread evenly.

        Each n-th part of the probability of an input has one of n draws: with enough of them, every
        input has some. A share of the draws is even over all entries, so that one that first
        derivatives underrate has a bounded weight. Units and columns of one parameter are a Latin
        hypercube. What values owe to one of these alone is then no noise.

        Args:
            count: Number of draws.
            generator: Source of the random numbers.
        """
        names, inputs = list(self.parameters), self.inputs.tolist()
        sizes = [self.entries[n].num_entries(0) for n in names]
        even = [size / sum(sizes) for size in sizes]
        guided = [(1 - EVEN_DRAWS) * self.parameters[n] for n in names]
        guided += [EVEN_DRAWS * share for share in even]
        rows = indices(inputs, evenly_spaced(count, generator))
        order = torch.randperm(count, generator=generator).tolist()
        of_cells: dict[int, list[int]] = {}
        cells = indices(guided, evenly_spaced(count, generator))
        for cell, place in zip(cells, order, strict=True):
            of_cells.setdefault(cell, []).append(rows[place])
        drawn = []
        for cell, of_cell in of_cells.items():
            of_even, number = divmod(cell, len(names))
            name, entries = names[number], self.entries[names[number]]
            uniforms = [evenly_spaced(len(of_cell), generator, mixed=True) for _ in range(2)]
            draw = entries.draw_evenly if of_even else entries.draw
            for row, first, second in zip(of_cell, *uniforms, strict=True):
                entry = draw(row, (first, second))
                probability = (1 - EVEN_DRAWS) * self.parameters[name]
                probability *= entries.probability(row, entry)
                probability += EVEN_DRAWS * even[number] / entries.num_entries(row)
                drawn.append(DrawnEntry(name, row, entry, inputs[row] * probability))
        return drawn


class DrawnEntry(NamedTuple):
    """An entry of a parameter, and the input for which it was drawn.

    Attributes:
        parameter: The parameter's name.
        row: Place of the input in the batch.
        entry: Index of the entry in the flattened parameter.
        probability: Of both in one draw.
    """

    parameter: str
    row: int
    entry: int
    probability: float
