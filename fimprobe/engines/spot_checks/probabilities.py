"""Draws from probabilities, with random numbers that are spread evenly."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Probabilities from the largest to the smallest, so that similar ones are neighbours.

    Attributes:
        probabilities: Of each index; their sum is 1.
        order: The indices by falling probability.
        cumulative: Sums of probabilities in this order.
    """

    probabilities: list[float]
    order: list[int]
    cumulative: list[float]

    @classmethod
    def of(cls, probabilities: Tensor) -> Ranked:
        """Rank probabilities [n], float64 on the CPU."""
        ranked, order = probabilities.sort(descending=True, stable=True)
        return cls(
            probabilities=probabilities.tolist(),
            order=order.tolist(),
            cumulative=ranked.cumsum(0).tolist(),
        )

    def draw(self, uniform: float) -> int:
        """The index at a random number between 0 and 1."""
        place = bisect.bisect_right(self.cumulative, uniform * self.cumulative[-1])
        return self.order[min(place, len(self.order) - 1)]


def evenly_spaced(count: int, generator: torch.Generator, *, mixed: bool = False) -> list[float]:
    """Return random numbers, one in each of ``count`` equal parts of the interval from 0 to 1.

    Args:
        count: How many.
        generator: Source of the random numbers.
        mixed: Whether the parts come in random order, and each number has a place of its own in its
            part; otherwise all have the same place.

    Returns:
        The numbers; each alone is uniform.
    """
    if not mixed:
        shift = float(torch.rand(1, generator=generator, dtype=torch.float64))
        return [(place + shift) / count for place in range(count)]
    places = torch.randperm(count, generator=generator).tolist()
    shifts = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    return [(place + shift) / count for place, shift in zip(places, shifts, strict=True)]


def place_of(uniform: float, count: int) -> int:
    """Return the part of the interval from 0 to 1 in which a number lies.

    Args:
        uniform: The number.
        count: Number of parts.
    """
    return min(int(uniform * count), count - 1)


def indices(probabilities: Sequence[float], uniform: Sequence[float]) -> list[int]:
    """Return the indices of probabilities at random numbers between 0 and 1, in their order.

    Args:
        probabilities: Of each index.
        uniform: The numbers.
    """
    cumulative = list(itertools.accumulate(probabilities))
    last = len(cumulative) - 1
    return [min(bisect.bisect_right(cumulative, u * cumulative[-1]), last) for u in uniform]


def normalised(weights: Tensor) -> Tensor:
    """Return weights divided by their sum along the last dimension; even ones where all are zero.

    Args:
        weights: Non-negative, [..., n].
    """
    weights = weights.nan_to_num(0.0, 0.0, 0.0)
    shares = weights / weights.sum(-1, keepdim=True)
    return shares.nan_to_num_(1 / weights.shape[-1])  # 0/0 where all are zero


def mixed_with_even(weights: Tensor, share: float) -> Tensor:
    """Return normalised weights, of which a share is spread evenly.

    Args:
        weights: Non-negative, [..., n].
        share: The share that is spread evenly.
    """
    return normalised(weights).mul_(1 - share).add_(share / weights.shape[-1])
