"""Probabilities with which entries of a layer are drawn, from what Î₁'s own backward has computed.

Any positive probabilities are right; those in proportion to an entry's share of V2 give the least
noise. R_oi of a weight sums x_ti² times a curvature at unit o over positions t, so that its square
follows Σ_t x_ti⁴ along the inputs i and the gradients' squares along the units o. A share that is
spread evenly bounds the weights of entries that seem unimportant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

EVEN_ENTRIES = 0.2
"""Share of the probability that is spread evenly over entries, units or columns."""

EVEN_INPUTS = 0.3
"""Share of the probability that is spread evenly over inputs."""

EVEN_PARAMETERS = 0.1
"""Share of the probability that is spread evenly over the parameters of a layer."""


class EntryProposal(Protocol):
    """Draws entries of one parameter."""

    def draw(self, row: int, generator: torch.Generator) -> tuple[int, float]:
        """Return an entry's index in the flattened parameter, and its probability.

        Args:
            row: Place of the input in the batch.
            generator: Source of the random numbers.
        """


@dataclass(kw_only=True)
class FlatProposal:
    """Entries in proportion to their share of diag F, the same for all inputs.

    Attributes:
        squares: Σ g² of every entry, in the parameter's shape.
    """

    squares: Tensor
    _probabilities: Tensor | None = None

    def draw(self, row: int, generator: torch.Generator) -> tuple[int, float]:
        """Return an entry and its probability; ``row`` is not read."""
        if self._probabilities is None:
            self._probabilities = mixed_with_even(self.squares.flatten().double(), EVEN_ENTRIES)
        return draw_index(self._probabilities, generator)


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

    def draw(self, row: int, generator: torch.Generator) -> tuple[int, float]:
        """Return an entry and its probability, for the input at ``row``."""
        o, unit_probability = draw_index(self.units, generator)
        i, column_probability = draw_index(self.columns[row], generator)
        units, columns = len(self.units), self.columns.shape[1]
        entry = o * columns + i if self.unit_first else i * units + o
        return entry, unit_probability * column_probability


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

    def draw(self, row: int, generator: torch.Generator) -> tuple[int, float]:
        """Return an entry and its probability, for the input at ``row``."""
        o, unit_probability = draw_index(self.units, generator)
        t, token_probability = draw_index(self.probabilities[row], generator)
        token = int(self.tokens[row][t])
        return token * len(self.units) + o, unit_probability * token_probability


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
    _cumulative: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Sum the probabilities of the inputs up."""
        self._cumulative = self.inputs.cumsum(0)

    def draw_inputs(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw inputs systematically: an input of probability π occurs π · count times, rounded.

        Args:
            count: Number of draws.
            generator: Source of the random numbers.

        Returns:
            Their places in the batch [count].
        """
        start = torch.rand(1, generator=generator, dtype=torch.float64)
        places = (torch.arange(count, dtype=torch.float64) + start) / count
        rows = torch.searchsorted(self._cumulative, places * float(self._cumulative[-1]), right=True)
        return rows.clamp_(max=len(self.inputs) - 1)

    def draw_parameter(self, generator: torch.Generator) -> tuple[str, float]:
        """Return the name of a parameter and its probability."""
        names = list(self.parameters)
        index, probability = draw_index(
            torch.tensor(list(self.parameters.values()), dtype=torch.float64), generator
        )
        return names[index], probability


def draw_index(probabilities: Tensor, generator: torch.Generator) -> tuple[int, float]:
    """Draw one index.

    Args:
        probabilities: Of each index, float64 [n] on the CPU; their sum is 1.
        generator: Source of the random numbers.

    Returns:
        The index and its probability.
    """
    if len(probabilities) == 1:
        return 0, 1.0
    cumulative = probabilities.cumsum(0)
    target = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
    index = int(torch.searchsorted(cumulative, target, right=True).clamp_(max=len(cumulative) - 1))
    return index, float(probabilities[index])


def normalised(weights: Tensor) -> Tensor:
    """Return weights divided by their sum along the last dimension; even ones where all are zero."""
    weights = weights.nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
    total = weights.sum(-1, keepdim=True)
    even = torch.full_like(weights, 1 / weights.shape[-1])
    return torch.where(total > 0, weights / total.where(total > 0, 1), even)


def mixed_with_even(weights: Tensor, share: float) -> Tensor:
    """Return normalised weights, of which a share is spread evenly.

    Args:
        weights: Non-negative, [..., n].
        share: The share that is spread evenly.
    """
    return (1 - share) * normalised(weights) + share / weights.shape[-1]
