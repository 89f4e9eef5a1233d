"""What spot checks of earlier measurements have shown: step sizes, and where V2 is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

NEW_SHARE = 0.5
"""Weight of a new measurement in the running means."""


@dataclass(kw_only=True)
class SpotHistory:
    """Running means over measurements with one plan; they decide which checks are drawn next.

    They only steer: a later estimate comes from its own checks alone.

    Attributes:
        etas: Size η of the step of every parameter.
        values: V2 of every parameter.
        spreads: By kind of layer, the sum of squared relative deviations of single checks from the
            mean of their layer, and its degrees of freedom.
        guarded: Kinds of parameters whose shifted passes were compared with single samples.
    """

    etas: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, tuple[float, float]] = field(default_factory=dict)
    guarded: set[str] = field(default_factory=set)

    def covers(self, parameters: Iterable[str]) -> bool:
        """Whether all these parameters have been checked before."""
        return all(name in self.values for name in parameters)

    def note_values(self, values: Mapping[str, float]) -> None:
        """Add V2 of some parameters by one measurement."""
        for name, value in values.items():
            before = self.values.get(name, value)
            self.values[name] = (1 - NEW_SHARE) * before + NEW_SHARE * value

    def note_spread(self, kind: str, values: Sequence[float]) -> None:
        """Add the spread of the checks of one layer.

        Args:
            kind: The kind of the layer.
            values: The values of its checks; fewer than two show no spread.
        """
        square, freedom = self.spreads.get(kind, (0.0, 0.0))
        mean, count = sum(values) / max(len(values), 1), len(values)
        if mean > 0 and count > 1:
            # two values differ from their mean at most by it: the ratio is too small by about this
            spread = sum((x / mean - 1) ** 2 for x in values) * count / (count - 1)
            self.spreads[kind] = square + spread, freedom + count - 1

    def fade(self) -> None:
        """Halve the weight of the spreads, before those of a new measurement are added."""
        self.spreads = {
            kind: ((1 - NEW_SHARE) * square, (1 - NEW_SHARE) * freedom)
            for kind, (square, freedom) in self.spreads.items()
        }
