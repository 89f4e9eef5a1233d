"""Recording one chunk: the forward pass, the memory it leaves, and the calls without rules."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fimprobe.engines.curvature.double_backward import use_differentiable_attention
from fimprobe.engines.layers.activations import is_derivative
from fimprobe.engines.moments.fallback import assign_fallbacks
from fimprobe.engines.problem.cotangents import check_num_passes
from fimprobe.engines.problem.label_cotangents import labels_per_draw
from fimprobe.engines.problem.problem import MemoryLimitExceeded, Problem
from fimprobe.engines.problem.saved_tensors import forbids_hooks, limit_saved_bytes
from fimprobe.engines.tracing.chunk import Chunk
from fimprobe.engines.tracing.graph import (
    bypassed_outputs,
    foreign_uses,
    hidden_reads,
    nodes_behind,
    saved_tensors,
)
from fimprobe.engines.tracing.order_check import check_order
from fimprobe.engines.tracing.plan import Plan, PlanMismatch
from fimprobe.engines.tracing.recording import record_forward
from fimprobe.engines.tracing.tape import Tape
from fimprobe.model.batch import Batch
from fimprobe.model.storage_guard import storage_address

MAX_CPU_OUTPUT_BYTES = 4.5 * 2**20
"""On a CPU, chunks are cut so that no layer's output is larger.

Larger new tensors cost more in page faults than the chunks cost in calls (docs/performance.md).
"""

FLOAT64_COPIES = 3
"""Copies of the outputs in float64 that are alive while their labels are drawn."""

STORED_PER_CURVATURE_VECTOR = 5
"""Sets of edge tensors that the second-order pass keeps for each vector, besides one per probe."""


_MAX_KEYS = 100
"""Shapes whose memory is remembered."""


@dataclass(kw_only=True)
class Recording:
    """A recorded forward pass.

    Attributes:
        tape: Uses of parameters.
        outputs: The outputs h [b, ...], with their graph.
        batch: The b samples.
        rows: Their places in the problem's batch.
        reached: Parameters on which the outputs depend.
        saved_bytes: Memory that the graph keeps.
    """

    tape: Tape
    outputs: Tensor
    batch: Batch
    rows: slice
    reached: set[str]
    saved_bytes: int

    @property
    def edge_bytes(self) -> int:
        """Memory of one set of cotangents at all output edges."""
        elements = sum(_numel(edge) for edge in self.tape.output_edges)
        return elements * self.outputs.element_size()


def record_chunk(problem: Problem, plan: Plan, rows: slice, unchecked: list[Tensor]) -> Recording:
    """Run the twin on some samples and record it.

    Args:
        problem: The measurement.
        plan: How each parameter is reached.
        rows: Places of the samples in the batch.
        unchecked: Receives counts of non-finite outputs; see :meth:`Problem.forward`.

    Raises:
        PlanMismatch: If a parameter is used where the plan does not see it.
        MemoryLimitExceeded: If the forward keeps too much for its backward.
    """
    request, batch = problem.request, problem.batch[rows]
    try:
        tape, outputs, saved_bytes = _run_forward(problem, plan, batch, unchecked)
    except RuntimeError as error:
        if plan.takes_derivatives or not forbids_hooks(error):
            raise
        plan.takes_derivatives = True  # by torch.func, which allows no hooks on saved tensors
        tape, outputs, saved_bytes = _run_forward(problem, plan, batch, unchecked)
    matters = (request.double_backward or request.spot_checks) and not plan.takes_derivatives
    if matters and any(map(is_derivative, nodes_behind([outputs.grad_fn]))):
        plan.takes_derivatives = True
        tape, outputs, saved_bytes = _run_forward(problem, plan, batch, unchecked)
    if tape.failures:
        raise PlanMismatch(tape.failures)
    reached, foreign = foreign_uses(outputs, tape, problem.parameters, plan.fallbacks)
    if foreign:
        raise PlanMismatch(dict.fromkeys(foreign, "used outside its layer"))
    check_order(problem, plan.layouts, batch, tape)
    hidden = {**hidden_reads(tape), **bypassed_outputs(outputs, tape)}
    if not request.double_backward:
        hidden = {}
    if hidden:
        raise PlanMismatch(hidden)
    return Recording(
        tape=tape,
        outputs=outputs,
        batch=batch,
        rows=rows,
        reached=reached,
        saved_bytes=saved_bytes,
    )


def _run_forward(
    problem: Problem, plan: Plan, batch: Batch, unchecked: list[Tensor]
) -> tuple[Tape, Tensor, int]:
    """Run the twin; return the tape, the outputs [b, ...] and the bytes that the graph keeps."""
    request = problem.request
    twice = request.double_backward
    attention = use_differentiable_attention() if twice else contextlib.nullcontext()
    recording = record_forward(
        problem.twin,
        batch.size,
        plan.layouts,
        plan.fallbacks,
        twice_differentiable=request.double_backward and not plan.takes_derivatives,
    )
    key = _memory_key(problem, plan, batch)
    known = plan.saved_bytes.get(key, 0)
    limit: Any = contextlib.nullcontext(lambda: known)
    if not known and not plan.takes_derivatives:
        limit = limit_saved_bytes(problem, batch.size)
    with recording as tape, limit as saved_bytes, attention:
        outputs = problem.forward(batch, unchecked if request.only_i1 else None)
    if not plan.takes_derivatives:
        if key and len(plan.saved_bytes) < _MAX_KEYS:
            plan.saved_bytes[key] = saved_bytes()
        return tape, outputs, saved_bytes()
    kept = [x for node in nodes_behind([outputs.grad_fn]) for x in saved_tensors(node)]
    sizes = {storage_address(x): x.untyped_storage().nbytes() for x in kept if storage_address(x)}
    return tape, outputs, sum(sizes.values())


def _memory_key(problem: Problem, plan: Plan, batch: Batch) -> str:
    """What decides how much a forward keeps; empty where that may depend on more than shapes.

    Counting takes an operation for each saved tensor in forward and backward.
    """
    may_vary = problem.shards is not None or not plan.layouts.traced or plan.layouts.unsure
    if may_vary or plan.twin is None or not plan.layouts.settled:
        return ""
    shapes = [tuple(x.shape) for x in batch.tensors()]
    return str([plan.twin.fingerprint, problem.memory_mb, problem.request.double_backward, shapes])


def check_memory(problem: Problem, plan: Plan, recording: Recording) -> None:
    """Raise :class:`MemoryLimitExceeded` if the chunk should be smaller.

    The first pass over a batch thus finds the chunk size, which the plan keeps.

    Args:
        problem: The measurement, with its memory limit.
        plan: How each parameter is reached, and the chunk size if one is known.
        recording: The recorded forward pass of the chunk.

    Raises:
        MemoryLimitExceeded: If the chunk needs more than ``memory_mb``, in any process of a sharded
            model. Otherwise, on a CPU, if a layer's output is above ``MAX_CPU_OUTPUT_BYTES`` and the
            plan has no chunk size yet.
        FimprobeError: If exact expectations take too many passes, or too much memory for one sample.
    """
    h, size = recording.outputs, recording.batch.size
    limit = problem.memory_mb * 2**20
    passes = _count_stored_passes(problem, recording, limit)
    label_bytes = FLOAT64_COPIES * 8 * labels_per_draw(h)
    needed = recording.saved_bytes + max(passes * recording.edge_bytes, label_bytes)
    feasible = size
    if needed > limit:
        feasible = max(1, min(size - 1, int(size * limit / needed)))
    if problem.shards is not None:  # all processes use the same chunk size
        feasible = problem.shards.smallest(feasible)
    elif feasible < size:
        feasible = _even_chunk_size(problem.batch.size, feasible)
    if feasible < size:
        raise MemoryLimitExceeded(feasible)
    output_edges = recording.tape.output_edges
    undecided = plan.chunk_size is None and problem.shards is None
    if h.device.type == "cpu" and undecided and output_edges:
        largest = max(_numel(edge) for edge in output_edges) * h.element_size()
        plan.output_bytes = largest / size
        cached = cached_chunk_size(plan, size)
        if cached is not None and size > 1:
            raise MemoryLimitExceeded(cached)


def cached_chunk_size(plan: Plan, size: int) -> int | None:
    """Return the chunk size at which no layer's output is above ``MAX_CPU_OUTPUT_BYTES``.

    Args:
        plan: It knows the size of outputs once samples were recorded on a CPU.
        size: Number of samples.

    Returns:
        None if all samples may be one chunk.
    """
    if plan.output_bytes * size <= MAX_CPU_OUTPUT_BYTES:
        return None
    return _even_chunk_size(size, int(MAX_CPU_OUTPUT_BYTES / plan.output_bytes))


def _count_stored_passes(problem: Problem, recording: Recording, limit: float) -> int:
    """Number of sets of edge tensors alive together; raises if exact labels need too many."""
    h, request = recording.outputs, problem.request
    bytes_per_pass = recording.edge_bytes / recording.batch.size
    if problem.draws.count is None:
        passes = problem.likelihood.count_passes(h)
        check_num_passes(problem, h, bytes_per_pass, limit)
    else:
        passes = problem.draws.count
    stored = passes
    if request.double_backward:
        stored += passes * (request.probes + STORED_PER_CURVATURE_VECTOR)
    if request.exact and problem.draws.count is not None:
        columns = problem.likelihood.count_passes(h)
        option, remedy = "second_order='exact'", "second_order={'probes': 2}"
        check_num_passes(problem, h, bytes_per_pass, limit, option, remedy)
        stored += columns
    return stored


def make_chunk(problem: Problem, plan: Plan, recording: Recording) -> Chunk:
    """Assign the parameters without a rule to fallback calls; raises if one has no call.

    Args:
        problem: The measurement.
        plan: How each parameter is reached.
        recording: The recorded forward pass of the chunk.

    Returns:
        The chunk, with its fallback calls.

    Raises:
        PlanMismatch: If a parameter that the outputs depend on has no fallback call although it needs
            one, or if a sharded model needs one.
    """
    tape = recording.tape
    chunk = Chunk(
        problem=problem,
        plan=plan,
        tape=tape,
        outputs=recording.outputs,
        batch=recording.batch,
        rows=recording.rows,
        fallbacks=assign_fallbacks(problem, plan, tape, recording.batch),
        workspace_bytes=problem.memory_mb * 2**20 / 8,
    )
    if chunk.fallbacks and problem.shards is not None:
        # a re-evaluation needs whole weights, which no process has
        paths = [assigned.call.path or "the model" for assigned in chunk.fallbacks]
        raise PlanMismatch(dict.fromkeys(paths, "no rule covers it"))
    unassigned = {
        name
        for name in recording.reached - chunk.fallback_parameters
        if name in plan.fallbacks or id(problem.parameters[name]) not in tape.uses
    }
    if unassigned:
        raise PlanMismatch(dict.fromkeys(unassigned, "its module was not called"))
    return chunk


def _even_chunk_size(size: int, limit: int) -> int:
    """The chunk size up to ``limit`` that cuts ``size`` samples most evenly."""
    return math.ceil(size / math.ceil(size / max(limit, 1)))


def _numel(edge: Any) -> int:
    """Number of entries of the tensor at an edge."""
    if isinstance(edge, Tensor):
        return edge.numel()
    metadata = edge.node._input_metadata[edge.output_nr]
    return math.prod(metadata.shape)
