"""The autograd engine: moments of every parameter of any model, by recorded layers and replays.

One forward of the twin, one ``torch.autograd.grad`` per draw that yields δ at every recorded layer,
and per parameter a contraction of inputs and δ. Parameters used where no rule sees it are
differentiated by replaying the smallest module that contains all their uses.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.autograd.first_order import accumulate_moments, add_ggn
from fimprobe.engines.autograd.results import RunningResults
from fimprobe.engines.curvature.accumulator import CurvatureAccumulator
from fimprobe.engines.curvature.double_backward import DoubleBackward, use_differentiable_attention
from fimprobe.engines.curvature.measure import measure_curvature
from fimprobe.engines.moments.fallback import assign_fallbacks
from fimprobe.engines.problem.cotangents import (
    Cotangents,
    check_num_passes,
    curvature_cotangents,
    data_cotangents,
    fisher_cotangents,
    hutchinson_cotangents,
    label_cotangents,
    labels_per_draw,
    mask_of,
    output_cotangents,
)
from fimprobe.engines.problem.problem import MemoryLimitExceeded, Problem
from fimprobe.engines.problem.saved_tensors import limit_saved_bytes
from fimprobe.engines.tracing.chunk import Chunk
from fimprobe.engines.tracing.graph import foreign_uses, hidden_reads
from fimprobe.engines.tracing.plan import Plan, PlanMismatch
from fimprobe.engines.tracing.smoothness import find_kinks
from fimprobe.engines.tracing.tape import FallbackCall, record
from fimprobe.statistics import Measured

FRESH_BYTES = 4.5 * 2**20
"""On a CPU, samples are taken in chunks whose largest layer output stays below this."""

DRAWN = 3
"""Copies of outputs in float64 that are held while their labels are drawn."""


def measure_moments(problem: Problem, plan: Plan) -> Measured:
    """Everything asked for, over the whole batch, chunk by chunk."""
    size = problem.batch.size
    run = RunningResults()
    start, chunk = 0, min(plan.chunk or size, size)
    while start < size:
        rows = slice(start, min(start + chunk, size))
        try:
            _measure_chunk(problem, plan, rows, run)
        except MemoryLimitExceeded as error:  # raised before anything was accumulated
            chunk = plan.chunk = error.fit
            continue
        except torch.OutOfMemoryError:
            if chunk == 1 or problem.shards is not None:  # the other processes went on
                raise
            # some accumulators hold this chunk and some do not: start afresh
            chunk = plan.chunk = chunk // 2
            run, start = RunningResults(), 0
            continue
        start = rows.stop
    plan.unused = set(problem.parameters) - run.reached
    return run.finish(problem, plan)


def _measure_chunk(problem: Problem, plan: Plan, rows: slice, run: RunningResults) -> None:
    """Add one chunk."""
    batch, ask = problem.batch[rows], problem.ask
    ceiling = problem.memory_mb * 2**20
    clock = _Clock(run.seconds)
    guard = limit_saved_bytes(problem, batch.size)
    kernels = use_differentiable_attention() if ask.i2 else contextlib.nullcontext()
    plain = not (ask.ih or ask.bounds or ask.i2 or ask.labels is not None)
    recording = record(problem.twin, batch.size, plan.layouts, plan.replay, twice=ask.i2)
    with recording as tape, guard as saved, kernels:
        h = problem.forward(batch, run.unseen if plain else None)
    if tape.failed:
        raise PlanMismatch(tape.failed)
    reached, foreign = foreign_uses(h, tape, problem.parameters, plan.replay)
    if foreign:
        raise PlanMismatch(dict.fromkeys(foreign, "used outside its layer"))
    hidden = hidden_reads(tape) if ask.i2 else {}
    if hidden:
        raise PlanMismatch(hidden)
    stash = sum(_numel(edge) for edge in tape.edges) * h.element_size()
    if problem.draws.count is None:
        passes = problem.likelihood.count_passes(h)
        check_num_passes(problem, h, stash / batch.size, ceiling)
    else:
        passes = problem.draws.count
    kept = passes * (1 + (ask.probes + 5) * ask.i2)
    if ask.exact and problem.draws.count is not None:
        columns = problem.likelihood.count_passes(h)
        told = "second_order='exact'", "second_order={'probes': 2}"
        check_num_passes(problem, h, stash / batch.size, ceiling, *told)
        kept += columns
    fit, needed = batch.size, saved() + max(kept * stash, DRAWN * 8 * labels_per_draw(h))
    if needed > ceiling:
        fit = max(1, min(batch.size - 1, int(batch.size * ceiling / needed)))
    if problem.shards is not None:
        fit = problem.shards.smallest(fit)
    elif fit < batch.size:
        fit = _even(problem.batch.size, fit)
    if fit < batch.size:
        raise MemoryLimitExceeded(fit)
    if h.device.type == "cpu" and plan.chunk is None and tape.edges and problem.shards is None:
        # large fresh tensors cost more in page faults than the chunks cost in calls
        largest = max(_numel(edge) for edge in tape.edges) * h.element_size()
        if largest > FRESH_BYTES and batch.size > 1:
            raise MemoryLimitExceeded(_even(batch.size, int(batch.size * FRESH_BYTES / largest)))
    clock.stop("forward")
    names = {id(p): n for n, p in problem.parameters.items()}
    calls = assign_fallbacks(problem, plan, tape, names)
    if calls and problem.shards is not None:
        raise PlanMismatch({call.path or "the model": "has to be replayed" for call, _ in calls})
    pieces: dict[str, list[tuple[FallbackCall, str]]] = {}
    for call, inside in calls:
        for local, held in inside.items():
            pieces.setdefault(names[id(held)], []).append((call, local))
    unseen = {
        name
        for name in reached - set(pieces)
        if name in plan.replay or id(problem.parameters[name]) not in tape.uses
    }
    if unseen:
        raise PlanMismatch(dict.fromkeys(unseen, "its module was not called"))
    chunk = Chunk(problem, plan, tape, calls, pieces, names, batch, rows, ceiling / 8)
    detached = h.detach()
    labels = label_cotangents(problem, rows, detached)
    drawn = len(labels.seeds)
    bent = curvature_cotangents(problem, rows, detached, labels) if ask.i2 else None
    bender = None if bent is None else _prepare_double_backward(chunk, run, h, bent)
    arrived = [] if bender is None else bender.arrived(0, drawn)
    run.reached |= accumulate_moments(
        chunk, run, "i1", labels, h, reached, last=plain, arrived=arrived
    )
    clock.stop("i1")
    if plain:
        return
    exact_fisher = ask.exact and problem.draws.count is not None
    if ask.ih or (ask.i2 and not exact_fisher):
        accumulate_moments(
            chunk, run, "ih", hutchinson_cotangents(problem, rows, detached), h, reached
        )
        clock.stop("ih")
    if exact_fisher:
        if ask.backpack:
            add_ggn(chunk, run)
        else:
            accumulate_moments(
                chunk, run, "ggn", fisher_cotangents(problem, rows, detached), h, reached
            )
        clock.stop("ggn")
    if ask.labels is not None:
        accumulate_moments(
            chunk, run, "empirical", data_cotangents(problem, rows, detached), h, reached
        )
        clock.stop("empirical")
    if ask.bounds:
        family: Any = problem.likelihood
        norms = family.norms(detached, mask_of(problem, rows, detached))
        run.norms.append(norms)
        axis = getattr(family, "class_dim", None)
        run.classes = None if axis is None else h.shape[axis]
        outputs = output_cotangents(problem, rows, detached, norms)
        # drawn labels: ‖H‖ has random signs that ‖J‖ has too
        signs = bender is not None and problem.draws.count is not None
        arrived = bender.arrived(drawn) if bender is not None and signs else []
        accumulate_moments(chunk, run, "jacobian", outputs, h, reached, arrived=arrived)
        if outputs.mix is not None:
            run.ledger("jacobian", problem).mix(outputs.mix)
        clock.stop("bounds")
    del arrived
    if bent is not None:
        if plan.kinks is None:
            plan.kinks = find_kinks(h, problem.twin)
        _accumulate_curvature(chunk, run, bender, bent)
        clock.stop("i2")


def _prepare_double_backward(
    chunk: Chunk, run: RunningResults, h: Tensor, seeds: Cotangents
) -> DoubleBackward | None:
    """The seeds pulled back so that it can be differentiated; None where it cannot."""
    if "i2" in run.notes:
        return None
    bender = DoubleBackward(
        h, chunk.tape, [p for n, p in chunk.problem.parameters.items() if n in chunk.pieces]
    )
    try:
        with use_differentiable_attention():
            bender.take(seeds.seeds)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        run.notes["i2"] = _failure_note(error)
        return None
    return bender


def _failure_note(error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"Î₂ was not measured: the model has no second derivative here ({first})"


def _accumulate_curvature(
    chunk: Chunk, run: RunningResults, bender: DoubleBackward | None, seeds: Cotangents
) -> None:
    """Add the second derivatives; what cannot be differentiated twice is told, not raised."""
    problem = chunk.problem
    if bender is None:
        return
    assert seeds.weights is not None and seeds.weights.second is not None
    for name, parameter in problem.parameters.items():
        if name not in run.curves:
            run.curves[name] = CurvatureAccumulator(parameter, problem.diagonals, chunk.room)
        run.curves[name].seeds = seeds.seeds
    try:
        with use_differentiable_attention(), torch.no_grad():
            run.partners = measure_curvature(
                problem,
                chunk.plan,
                chunk.tape,
                bender,
                seeds,
                chunk.rows,
                chunk.batch,
                chunk.calls,
                chunk.names,
                run.curves,
                run.seconds,
            )
    except (PlanMismatch, MemoryLimitExceeded, torch.OutOfMemoryError):
        raise
    except (RuntimeError, NotImplementedError) as error:
        run.notes["i2"] = _failure_note(error)
        return
    for curve in run.curves.values():
        curve.end()
    run.second.append(seeds.weights.second)


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.last = seconds, time.perf_counter()

    def stop(self, key: str) -> None:
        """Add the time since the last stop to ``key``."""
        now = time.perf_counter()
        self.seconds[key] = self.seconds.get(key, 0.0) + now - self.last
        self.last = now


def _even(size: int, chunk: int) -> int:
    """The chunk no larger than ``chunk`` that cuts ``size`` most evenly."""
    return math.ceil(size / math.ceil(size / max(chunk, 1)))


def _numel(edge: Any) -> int:
    if isinstance(edge, Tensor):
        return edge.numel()
    metadata = edge.node._input_metadata[edge.output_nr]
    return math.prod(metadata.shape)
