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
    """The attributes of :class:`fimprobe.Fisher`, which explains them and has the methods."""

    diagonal: dict[str, Tensor] = field(repr=False)
    std_error: dict[str, Tensor] = field(repr=False)
    values: dict[str, Tensor] = field(repr=False)
    total: GroupFisher
    layers: dict[str, GroupFisher] = field(repr=False)
    parameters: dict[str, GroupFisher] = field(repr=False)
    metadata: dict[str, Any] = field(repr=False)
