"""The recorded forward pass of a chunk of samples, with everything that computes from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.plan import Plan
from fimprobe.engines.tracing.tape import FallbackCall, Tape
from fimprobe.model.batch import Batch


@dataclass(frozen=True, kw_only=True)
class AssignedCall:
    """A fallback call and the parameters whose gradient it provides.

    Attributes:
        call: The recorded call; its path is "" for the whole model.
        parameters: These parameters, by their name inside the module.
    """

    call: FallbackCall
    parameters: dict[str, Tensor]


@dataclass(kw_only=True)
class Chunk:
    """One chunk's recorded forward pass.

    Attributes:
        problem: The measurement that the chunk belongs to.
        plan: How each parameter is reached.
        tape: Uses of parameters and fallback calls in the forward pass.
        outputs: The outputs h [b, ...], with their graph.
        batch: The b samples.
        rows: Their places in the problem's batch.
        fallbacks: Calls that are re-evaluated for single samples.
        workspace_bytes: Memory for the per-sample gradients that are formed at once.
    """

    problem: Problem
    plan: Plan
    tape: Tape
    outputs: Tensor
    batch: Batch
    rows: slice
    fallbacks: list[AssignedCall]
    workspace_bytes: float
    parameter_names: dict[int, str] = field(init=False)
    """Names of the trainable parameters by id."""
    fallback_parameters: set[str] = field(init=False)
    """Names of the parameters with a share in a fallback call."""

    def __post_init__(self) -> None:
        """Index the parameters by id, and those of the fallback calls by name."""
        self.parameter_names = {id(p): n for n, p in self.problem.parameters.items()}
        self.fallback_parameters = {
            self.parameter_names[id(p)]
            for assigned in self.fallbacks
            for p in assigned.parameters.values()
        }

    @property
    def size(self) -> int:
        """Number of samples."""
        return self.batch.size
