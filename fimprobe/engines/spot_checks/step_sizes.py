"""Step sizes of second differences, from how large the differences are.

A step is η times the size of the layer's output over that of its derivative by the entry: the shift
changes the output by η of its root mean square at the entry's unit. Truncation grows as η², rounding
falls as 1/η². ρ is the size of a second difference over that of the outputs; rounding contributes
some ``FLOOR`` of the machine precision to it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

START = 0.1
"""First η: truncation stays below 1 % for most layers of the networks measured."""

MIN_STEP, MAX_STEP = 1e-6, 0.25
"""Range of η. Steps of 1 lose up to a third of V2 where outputs are large beside their changes."""

FLOOR = 6.0
"""ρ of rounding alone, over the machine precision of the computation; largest on a GPT-2."""

TARGET = {torch.float32: 1e-4, torch.float64: 1e-10}
"""ρ to which η is adapted, by type.

In float32 rounding is 140 times smaller. At 10 times it changes single squares by 20 %, and sums that
few of them carry by up to 7 %: an error of ε in a difference is one of 2ε in its square.
"""

MAX_ROUNDING = 0.05
"""Share of rounding above which a check is repeated with another step."""

MAX_DIFFERENCE = {torch.float32: 1e-3, torch.float64: 3e-8}
"""ρ above which a check is repeated with another step, by type."""


class StepSizes:
    """η of every parameter.

    Attributes:
        dtype: The coarsest floating-point type of the computation.
        etas: η of the parameters that were adapted.
    """

    def __init__(self, dtype: torch.dtype, etas: Mapping[str, float]) -> None:
        self.dtype, self.etas = dtype, dict(etas)
        self._start = START if dtype == torch.float32 else START / 30

    def __getitem__(self, parameter: str) -> float:
        """η of a parameter."""
        return self.etas.get(parameter, self._start)

    def rounding_share(self, difference: float) -> float:
        """The share of a squared difference of size ρ that may be rounding, from 0 to 1."""
        floor = FLOOR * torch.finfo(self.dtype).eps
        return 1.0 if difference <= floor else (floor / difference) ** 2

    def better(self, eta: float, difference: float) -> float:
        """Return η that brings a second difference closer to its target.

        Args:
            eta: η of a check.
            difference: Its ρ.
        """
        # of a difference below rounding only that much is known
        factor = (TARGET[self.dtype] / difference) ** 0.5 if difference > 0 else 30.0
        return min(max(eta * min(max(factor, 1 / 30), 30.0), MIN_STEP), MAX_STEP)

    def is_settled(self, eta: float, difference: float) -> bool:
        """Whether a check with this η need not be repeated.

        Args:
            eta: η of the check.
            difference: Its ρ.
        """
        if difference > MAX_DIFFERENCE[self.dtype]:
            return eta <= MIN_STEP
        small = self.rounding_share(difference) > MAX_ROUNDING
        return not small or self.better(eta, difference) < 1.5 * eta
