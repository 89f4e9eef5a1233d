"""The autograd engine: moments of every parameter of any model, by recorded layers and replays.

One forward of the twin, one ``torch.autograd.grad`` per draw that yields δ at every recorded layer,
and per parameter a contraction of inputs and δ. Parameters used where no rule sees it are
differentiated by replaying the smallest module that contains all their uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.contract import Accumulator, Weights
from fimprobe.engines.gather import contract_uses
from fimprobe.engines.graph import foreign_uses
from fimprobe.engines.problem import OverMemory, Plan, PlanMismatch, Problem, coverage
from fimprobe.engines.replayed import contract_replays, replayed_parameters
from fimprobe.engines.tape import Replayed, Tape, check_inputs_unchanged, record
from fimprobe.types import FimprobeError, MomentsBatch

PASS_LIMIT = 4096
"""Most backward passes that ``draws="exact"`` takes."""

FRESH_BYTES = 4.5 * 2**20
"""On a CPU, samples are taken in chunks whose largest layer output stays below this."""


def measure_moments(problem: Problem, plan: Plan) -> MomentsBatch:
    """Moments of every trainable parameter over the whole batch, chunk by chunk."""
    size = problem.batch.size
    accumulators: dict[str, Accumulator] = {}
    reached: set[str] = set()
    exact: list[Weights] = []
    start, chunk = 0, min(plan.chunk or size, size)
    while start < size:
        rows = slice(start, min(start + chunk, size))
        try:
            reached |= _measure_chunk(problem, plan, rows, accumulators, exact)
        except OverMemory as error:  # raised before anything was accumulated
            chunk = plan.chunk = error.fit
            continue
        except torch.OutOfMemoryError:
            if chunk == 1:
                raise
            # some accumulators hold this chunk and some do not: start afresh
            chunk = plan.chunk = chunk // 2
            accumulators, reached, exact, start = {}, set(), [], 0
            continue
        start = rows.stop
    unused = set(problem.parameters) - reached
    plan.unused = unused
    weights = exact[0] if exact else None
    return MomentsBatch(
        parameters={n: a.finish() for n, a in accumulators.items() if n not in unused},
        batch_size=size,
        draws=problem.draws.count,
        second=torch.cat([w.second for w in exact]).cpu() if exact else None,
        fourth=torch.cat([w.fourth for w in exact]).cpu() if exact else None,
        blocks=torch.tensor(weights.blocks) if weights else None,
        coverage=coverage(problem, plan),
    )


def _measure_chunk(
    problem: Problem,
    plan: Plan,
    rows: slice,
    accumulators: dict[str, Accumulator],
    exact: list[Weights],
) -> set[str]:
    """Add one chunk's moments; returns the parameters that its outputs depend on."""
    batch = problem.batch[rows]
    mask = None if problem.mask is None else problem.mask[rows]
    ceiling = problem.memory_mb * 2**20
    guard = _memory_guard(problem, ceiling / 2, batch.size)
    with record(problem.twin, batch.size, plan.layouts, plan.replay) as tape, guard as saved:
        h = problem.forward(batch)
    if tape.failed:
        raise PlanMismatch(tape.failed)
    reached, foreign = foreign_uses(h, tape, problem.parameters, plan.replay)
    if foreign:
        raise PlanMismatch(dict.fromkeys(foreign, "used outside its layer"))
    stash = sum(_numel(edge) for edge in tape.edges) * h.element_size()
    if problem.draws.count is None:
        passes = problem.likelihood.count_passes(h)
        _check_passes(passes, stash / batch.size, ceiling)
    else:
        passes = problem.draws.count
    if saved() + passes * stash > ceiling and batch.size > 1:
        fit = int(batch.size * ceiling / (saved() + passes * stash))
        raise OverMemory(min(batch.size - 1, fit))
    if h.device.type == "cpu" and plan.chunk is None and tape.edges:
        # large fresh tensors cost more in page faults than the chunks cost in calls
        largest = max(_numel(edge) for edge in tape.edges) * h.element_size()
        if largest > FRESH_BYTES and batch.size > 1:
            raise OverMemory(_even(batch.size, int(batch.size * FRESH_BYTES / largest)))
    seeds, weights = _seeds(problem, rows, h, mask)
    deltas = _backward(h, tape, seeds)
    check_inputs_unchanged(tape)
    with torch.no_grad():
        names = {id(p): n for n, p in problem.parameters.items()}
        replays = replayed_parameters(problem, plan, tape, names)
        for name, parameter in problem.parameters.items():
            if name not in accumulators:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                a2 = torch.empty_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
                accumulators[name] = Accumulator(a2, problem.diagonals)
        pieces: dict[str, list[tuple[Replayed, str]]] = {}
        for call, inside in replays:
            for local, held in inside.items():
                pieces.setdefault(names[id(held)], []).append((call, local))
        unseen = {
            name
            for name in reached - set(pieces)
            if name in plan.replay or id(problem.parameters[name]) not in tape.uses
        }
        if unseen:
            raise PlanMismatch(dict.fromkeys(unseen, "its module was not called"))
        for accumulator in accumulators.values():
            accumulator.begin(batch.size, passes)
        for name, parameter in problem.parameters.items():
            uses = [] if name in plan.replay else tape.uses.get(id(parameter), [])
            if name in pieces:
                continue
            if any(deltas[use.edge] is not None for use in uses):
                reached.add(name)
            contract_uses(accumulators[name], uses, deltas, batch.size, weights, ceiling / 8)
        contract_replays(
            problem,
            plan,
            tape,
            replays,
            pieces,
            deltas,
            seeds,
            accumulators,
            weights,
            names,
            batch,
            ceiling / 8,
        )
    if weights is not None:
        exact.append(weights)
    return reached


def _check_passes(passes: int, stash_per_pass: float, ceiling: float) -> None:
    if passes > PASS_LIMIT:
        raise FimprobeError(
            f"draws='exact' would take {passes} backward passes for each chunk (labels × positions "
            f"of one sample), more than the limit of {PASS_LIMIT}; pass draws=2 instead"
        )
    if passes * stash_per_pass > ceiling:
        raise FimprobeError(
            f"draws='exact' would take {passes} backward passes that keep "
            f"{passes * stash_per_pass / 2**20:.0f} MB for one sample, more than memory_mb="
            f"{ceiling / 2**20:.0f}; pass draws=2 instead, or a larger memory_mb"
        )


def _seeds(
    problem: Problem, rows: slice, h: Tensor, mask: Tensor | None
) -> tuple[list[Tensor], Weights | None]:
    """δ at the outputs of each draw or exact pass."""
    detached, likelihood = h.detach(), problem.likelihood
    shape = likelihood.label_shape(detached)
    if mask is not None and mask.shape != shape:
        raise FimprobeError(
            f"mask has shape {tuple(mask.shape)}, but the labels have shape {tuple(shape)}; pass a "
            "boolean tensor with one entry for each label"
        )
    if problem.draws.count is None:
        passes = list(likelihood.exact_passes(detached, mask))
        return [p.seed.to(h.dtype) for p in passes], Weights(
            torch.stack([p.second for p in passes], 1),
            torch.stack([p.fourth for p in passes], 1),
            [p.block for p in passes],
        )
    uniforms = problem.draws.uniforms_for(rows, problem.batch.size, shape).to(h.device)
    seeds = []
    for draw in range(problem.draws.count):
        score = likelihood.score(detached, likelihood.quantile(detached, uniforms[:, draw]))
        if mask is not None:
            where = mask
            if where.dim() < score.dim():
                where = where.unsqueeze(getattr(likelihood, "class_dim", -1))
            score = score.masked_fill(~where, 0)
        seeds.append(score.to(h.dtype))
    return seeds, None


def _backward(h: Tensor, tape: Tape, seeds: list[Tensor]) -> list[list[Tensor] | None]:
    """δ of each draw at every edge: one backward per draw, weights' gradients never asked for."""
    if not tape.edges:
        return []
    collected = []
    for i, seed in enumerate(seeds):
        last = i == len(seeds) - 1
        collected.append(
            torch.autograd.grad(h, tape.edges, seed, retain_graph=not last, allow_unused=True)
        )
    by_edge: list[list[Tensor] | None] = []
    for parts in zip(*collected, strict=True):
        present = next((p for p in parts if p is not None), None)
        if present is None:
            by_edge.append(None)
        else:
            by_edge.append([torch.zeros_like(present) if p is None else p for p in parts])
    return by_edge


def _even(size: int, chunk: int) -> int:
    """The chunk no larger than ``chunk`` that cuts ``size`` most evenly."""
    return math.ceil(size / math.ceil(size / max(chunk, 1)))


def _numel(edge: Any) -> int:
    if isinstance(edge, Tensor):
        return edge.numel()
    metadata = edge.node._input_metadata[edge.output_nr]
    return math.prod(metadata.shape)


class _memory_guard:  # noqa: N801 - reads as a function where it is used
    """Count the bytes autograd saves in the forward; stop it once they pass the limit."""

    def __init__(self, problem: Problem, limit: float, size: int) -> None:
        own = {p.untyped_storage().data_ptr() for p in problem.twin.parameters()}
        self.seen, self.total, self.limit, self.size = own, 0, limit, size
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        try:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                self.total += storage.nbytes()
        except (RuntimeError, NotImplementedError):  # tensors without storage
            pass
        if self.total > self.limit and self.size > 1:
            raise OverMemory(self.size // 2)
        return x

    def __enter__(self) -> Callable[[], int]:
        self.hooks.__enter__()
        return lambda: self.total

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
