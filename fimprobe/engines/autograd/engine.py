"""The autograd engine: moments and second derivatives of every parameter of any model.

One recorded forward pass of the twin, and one ``torch.autograd.grad`` for each vector at the outputs,
which gives the cotangents δ at every recorded layer. Each parameter's moments are contracted from
its layer's inputs and δ. A parameter that is used where no rule applies is differentiated by
re-evaluating the smallest module that contains all its uses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fimprobe.engines.autograd.chunk_recording import (
    cached_chunk_size,
    check_memory,
    make_chunk,
    record_chunk,
)
from fimprobe.engines.autograd.first_order import accumulate_moments, add_ggn
from fimprobe.engines.autograd.results import RunningResults
from fimprobe.engines.autograd.spot_checking import run_spot_checks
from fimprobe.engines.curvature.accumulator import CurvatureAccumulator
from fimprobe.engines.curvature.double_backward import DoubleBackward, use_differentiable_attention
from fimprobe.engines.curvature.measure import measure_curvature
from fimprobe.engines.problem.cotangents import (
    Cotangents,
    curvature_cotangents,
    data_cotangents,
    fisher_cotangents,
    hutchinson_cotangents,
    mask_of,
    output_cotangents,
)
from fimprobe.engines.problem.label_cotangents import label_cotangents
from fimprobe.engines.problem.problem import MemoryLimitExceeded, Problem
from fimprobe.engines.tracing.chunk import Chunk
from fimprobe.engines.tracing.plan import Plan, PlanMismatch
from fimprobe.engines.tracing.smoothness import find_kinks
from fimprobe.statistics import Measured


def measure_moments(problem: Problem, plan: Plan) -> Measured:
    """Compute all requested statistics over the whole batch, chunk by chunk.

    Args:
        problem: The measurement.
        plan: How each parameter is reached; its chunk size is reduced where memory is short.

    Raises:
        PlanMismatch: If the batch shows a use of a parameter that the plan does not cover.
    """
    size = problem.batch.size
    run = RunningResults()
    if plan.chunk_size is None and problem.shards is None:
        plan.chunk_size = cached_chunk_size(plan, size)
    start, chunk_size = 0, min(plan.chunk_size or size, size)
    while start < size:
        rows = slice(start, min(start + chunk_size, size))
        try:
            _measure_chunk(problem, plan, rows, run)
        except MemoryLimitExceeded as error:  # raised before anything was accumulated
            chunk_size = plan.chunk_size = error.feasible
            continue
        except torch.OutOfMemoryError:
            if chunk_size == 1 or problem.shards is not None:  # the other processes continued
                raise
            # some accumulators contain this chunk and some do not: start again
            chunk_size = plan.chunk_size = chunk_size // 2
            run, start = RunningResults(), 0
            continue
        start = rows.stop
    plan.unused = set(problem.parameters) - run.reached
    if problem.request.spot_checks:
        clock = _Clock(run.seconds)
        run.spot_checks = run_spot_checks(problem, plan, run)
        clock.stop("i2")
    return run.finish(problem, plan)


def _measure_chunk(problem: Problem, plan: Plan, rows: slice, run: RunningResults) -> None:
    """Add one chunk to the running results."""
    clock = _Clock(run.seconds)
    recording = record_chunk(problem, plan, rows, run.non_finite)
    check_memory(problem, plan, recording)
    clock.stop("forward")
    chunk = make_chunk(problem, plan, recording)
    run.reached |= recording.reached
    h = chunk.outputs.detach()
    labels = label_cotangents(problem, rows, h)
    vectors: Cotangents | None = None
    if problem.request.double_backward:
        vectors = curvature_cotangents(problem, rows, h, labels)
    double_backward = None if vectors is None else _prepare_double_backward(chunk, run, vectors)
    for entry in _first_order_passes(chunk, run, labels):
        if not entry.needed:
            continue
        if entry.kind == "ggn" and problem.request.backpack:
            add_ggn(chunk, run)
        else:
            known: list[list[torch.Tensor | None]] = []
            if double_backward is not None and entry.shared is not None:
                # what the second-order pass has pulled back is not pulled back again
                known = double_backward.edge_cotangents(entry.shared)
            keep_graph = not problem.request.only_i1
            deltas = accumulate_moments(
                chunk, run, entry.kind, entry.cotangents(), known, keep_graph=keep_graph
            )
            if entry.kind == "i1" and problem.request.spot_checks:
                run.first_order_notes.add_chunk(chunk, deltas)
        clock.stop(entry.timer or entry.kind)
    if problem.request.i2:
        if plan.kinks is None:
            plan.kinks = find_kinks(chunk.outputs, problem.twin)
        if vectors is not None and double_backward is not None:
            _accumulate_curvature(chunk, run, double_backward, vectors)
        clock.stop("i2")


@dataclass(frozen=True, kw_only=True)
class _FirstOrderPass:
    """One kind of cotangents to pull back.

    Attributes:
        kind: The key of its moments.
        cotangents: Computes the vectors at the outputs.
        needed: Whether they are requested.
        shared: The vectors of the second-order pass that are the first ones of this kind; None if
            there are none.
        timer: The key of its time; ``kind`` by default.
    """

    kind: str
    cotangents: Callable[[], Cotangents]
    needed: bool
    shared: slice | None = None
    timer: str | None = None


def _first_order_passes(
    chunk: Chunk, run: RunningResults, labels: Cotangents
) -> list[_FirstOrderPass]:
    """All kinds of cotangents, in the order in which they are pulled back."""
    problem, request, rows = chunk.problem, chunk.problem.request, chunk.rows
    h = chunk.outputs.detach()
    sampled_labels = problem.draws.count is not None
    num_labels = len(labels.vectors)
    exact_fisher = request.exact and sampled_labels
    if run.fisher_by_labels is None:  # size-biased labels miss no part of F
        run.fisher_by_labels = request.spot_checks and labels.are_size_biased
    needs_vectors = request.i2 and not exact_fisher and not run.fisher_by_labels
    return [
        _FirstOrderPass(
            kind="i1", cotangents=lambda: labels, needed=True, shared=slice(0, num_labels)
        ),
        _FirstOrderPass(
            kind="ih",
            cotangents=lambda: hutchinson_cotangents(problem, rows, h),
            needed=request.ih or needs_vectors,
        ),
        _FirstOrderPass(
            kind="ggn",
            cotangents=lambda: fisher_cotangents(problem, rows, h),
            needed=exact_fisher,
        ),
        _FirstOrderPass(
            kind="empirical",
            cotangents=lambda: data_cotangents(problem, rows, h),
            needed=request.labels is not None,
        ),
        _FirstOrderPass(
            kind="jacobian",
            cotangents=lambda: _bound_cotangents(chunk, run),
            needed=request.bounds,
            # with sampled labels ‖H‖ uses some of the random signs of ‖J‖
            shared=slice(num_labels, None) if sampled_labels else None,
            timer="bounds",
        ),
    ]


def _bound_cotangents(chunk: Chunk, run: RunningResults) -> Cotangents:
    """The vectors that measure ‖J‖; adds the norms of I(h) and M to the running results."""
    problem, rows, h = chunk.problem, chunk.rows, chunk.outputs.detach()
    family: Any = problem.likelihood
    norms = family.norms(h, mask_of(problem, rows, h))
    run.norms.append(norms)
    axis = getattr(family, "class_dim", None)
    run.classes = None if axis is None else h.shape[axis]
    return output_cotangents(problem, rows, h, norms)


def _prepare_double_backward(
    chunk: Chunk, run: RunningResults, cotangents: Cotangents
) -> DoubleBackward | None:
    """Pull the vectors back such that the result can be differentiated.

    None if it cannot: a note then gives the reason, and the rest is measured.
    """
    if "i2" in run.notes:
        return None
    fallback_parameters: dict[str, torch.Tensor] = {
        n: p for n, p in chunk.problem.parameters.items() if n in chunk.fallback_parameters
    }
    double_backward = DoubleBackward(chunk.outputs, chunk.tape, fallback_parameters)
    try:
        with use_differentiable_attention():
            double_backward.pull_back(cotangents.vectors)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        run.notes["i2"] = _failure_note(error)
        return None
    return double_backward


def _accumulate_curvature(
    chunk: Chunk, run: RunningResults, double_backward: DoubleBackward, cotangents: Cotangents
) -> None:
    """Add the second derivatives; if the model has none, a note gives the reason."""
    assert cotangents.weights is not None and cotangents.weights.square is not None
    for name, parameter in chunk.problem.parameters.items():
        if name not in run.curvature:
            run.curvature[name] = CurvatureAccumulator.of(
                parameter,
                every_entry=chunk.problem.diagonals,
                workspace_bytes=chunk.workspace_bytes,
            )
    try:
        with use_differentiable_attention(), torch.no_grad():
            run.interacting = measure_curvature(
                chunk, double_backward, cotangents, run.curvature, run.seconds
            )
    except (PlanMismatch, MemoryLimitExceeded, torch.OutOfMemoryError):
        raise
    except (RuntimeError, NotImplementedError) as error:
        run.notes["i2"] = _failure_note(error)
        return
    for accumulator in run.curvature.values():
        accumulator.finish_chunk()
    run.curvature_weights.append(cotangents.weights.square)


def _failure_note(error: Exception) -> str:
    message = str(error).strip()
    first_line = message.splitlines()[0] if message else type(error).__name__
    return (
        f"Î₂ was not measured: the model has no second derivative in torch ({first_line}). "
        "second_order='spot_checks' needs none."
    )


class _Clock:
    """Adds the time of consecutive parts to a dictionary."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def stop(self, key: str) -> None:
        """Add the time since the last stop to ``key``."""
        now = time.perf_counter()
        self._seconds[key] = self._seconds.get(key, 0.0) + now - self._last
        self._last = now
