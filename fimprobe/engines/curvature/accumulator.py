"""The second-derivative sums of one parameter over all chunks of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.engines.curvature.diagonal_accumulator import DiagonalAccumulator
from fimprobe.engines.curvature.norm_accumulator import NormAccumulator
from fimprobe.statistics import Curvature

_PER_DIRECTION = ("block", "whole", "signs", "joint")
"""Results [J, B, ...], whose second dimension counts samples."""


@dataclass(kw_only=True)
class CurvatureAccumulator:
    """The running results of one parameter; see :class:`fimprobe.statistics.Curvature`.

    Attributes:
        diagonal: Sums of the diagonal of R.
        norms: Inner products of R along directions.
        per_sample: Per-sample results of each chunk.
    """

    diagonal: DiagonalAccumulator
    norms: NormAccumulator
    per_sample: dict[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, parameter: Tensor, *, every_entry: bool, workspace_bytes: float
    ) -> CurvatureAccumulator:
        """An empty accumulator.

        Args:
            parameter: The parameter.
            every_entry: Whether the diagonal is kept for every entry.
            workspace_bytes: Memory for the per-sample tensors that are formed at once.
        """
        return cls(
            diagonal=DiagonalAccumulator(
                parameter=parameter, every_entry=every_entry, workspace_bytes=workspace_bytes
            ),
            norms=NormAccumulator(parameter=parameter, workspace_bytes=workspace_bytes),
        )

    def start_chunk(
        self, size: int, count: int, weights: Tensor, *, exact: bool, self_interacting: bool
    ) -> None:
        """Start a chunk.

        Args:
            size: Number of samples B.
            count: Number of vectors n.
            weights: Weights of R² [B, labels].
            exact: Whether labels are exact.
            self_interacting: Whether the parameter has uses that depend on each other.
        """
        self.diagonal.start_chunk(size, count, weights, self_interacting=self_interacting)
        self.norms.start_chunk(size, count, weights.shape[1], exact=exact)

    def finish_chunk(self) -> None:
        """Keep the chunk's results."""
        for key, value in (self.diagonal.chunk | self.norms.chunk).items():
            self.per_sample.setdefault(key, []).append(value)

    def joined(self) -> dict[str, Tensor]:
        """Per-sample results of all chunks, still on the device."""
        return {k: torch.cat(v, 1 if k in _PER_DIRECTION else 0) for k, v in self.per_sample.items()}

    def finish(self, per_sample: dict[str, Tensor]) -> Curvature:
        """The results of all chunks; ``per_sample`` is :meth:`joined`, on the host."""
        return Curvature(
            trace=per_sample["trace"],
            square=per_sample["square"],
            probe_squares=per_sample.get("probe_squares"),
            block=per_sample["block"],
            whole=per_sample["whole"],
            signs=per_sample["signs"],
            joint=per_sample.get("joint"),
            diagonal=self.diagonal.diagonal,
            diagonal_square=self.diagonal.diagonal_square,
        )
