"""The numbers of an estimate, without what is done with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GroupFisher:
    """The trace and norm of F over a group of parameters, and their errors.

    Attributes:
        numel: Number of entries.
        trace: Σ_i F_ii.
        std_error: Standard error of ``trace``; None where it is not known.
        norm: ‖diag F‖₂, corrected for noise.
        rel_error: √(Σ_i Var F̂_ii) / ``norm``; None where noise hides the norm.
        effective_inputs: (Σt)²/Σt² of the inputs' shares t of the trace.
    """

    numel: int
    trace: float
    std_error: float | None
    norm: float
    rel_error: float | None
    effective_inputs: float


@dataclass(kw_only=True)
class FisherRecord:
    """The diagonal of F with its errors; :class:`fimprobe.Fisher` has the methods.

    Attributes:
        diagonal: F_ii by parameter, float64, in its shape.
        std_error: Standard error of each entry, of the mean over this data set.
        values: The parameters at which F was measured.
        total: Numbers of the whole model.
        layers: The same for every layer.
        parameters: The same for every parameter.
        metadata: What was measured, as plain values: see docs/reference/estimate.md.
    """

    diagonal: dict[str, Tensor] = field(repr=False)
    std_error: dict[str, Tensor] = field(repr=False)
    values: dict[str, Tensor] = field(repr=False)
    total: GroupFisher
    layers: dict[str, GroupFisher] = field(repr=False)
    parameters: dict[str, GroupFisher] = field(repr=False)
    metadata: dict[str, Any] = field(repr=False)
