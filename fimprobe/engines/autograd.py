"""The autograd engine: moments of every parameter of any model, by recorded layers and replays.

One forward of the twin, one ``torch.autograd.grad`` per draw that yields δ at every recorded layer,
and per parameter a contraction of inputs and δ. Parameters used where no rule sees it are
differentiated by replaying the smallest module that contains all their uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.batch import Batch
from fimprobe.engines.contract import Accumulator, Weights, power_of_two
from fimprobe.engines.graph import foreign_uses
from fimprobe.engines.replay import replay_gradients
from fimprobe.engines.rules import embedding_tokens, rules_for
from fimprobe.engines.tape import (
    Layouts,
    Replayed,
    Tape,
    Use,
    check_inputs_unchanged,
    record,
)
from fimprobe.engines.unrolled import UNROLLED
from fimprobe.types import BatchError, Draws, FimprobeError, Likelihood, MomentsBatch

PASS_LIMIT = 4096
"""Most backward passes that ``draws="exact"`` takes."""

Outputs = Callable[[Any], Tensor]


@dataclass
class Plan:
    """How each parameter is reached; made and verified on the first samples, then reused.

    ``replay`` maps a parameter to the module replayed for it, ``loop`` names the modules that
    ``vmap`` cannot run, ``unused`` the parameters the outputs do not depend on.
    """

    layouts: Layouts = field(default_factory=Layouts)
    replay: dict[str, str] = field(default_factory=dict)
    loop: set[str] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)
    chunk: int | None = None
    verified: int = 0
    """Samples that the guard has compared; 0 before it ran."""


@dataclass
class Problem:
    """One measurement's question, as the engine needs it."""

    twin: nn.Module
    batch: Batch
    likelihood: Likelihood
    draws: Draws
    outputs: Outputs
    mask: Tensor | None
    memory_mb: float
    diagonals: bool

    def __post_init__(self) -> None:
        """Index the trainable parameters."""
        self.parameters = {n: p for n, p in self.twin.named_parameters() if p.requires_grad}

    def forward(self, batch: Batch) -> Tensor:
        """The outputs for a part of the batch, checked."""
        h = self.outputs(self.twin(*batch.args, **batch.kwargs))
        if h.dim() == 0 or h.shape[0] != batch.size:
            raise FimprobeError(
                f"the outputs have shape {tuple(h.shape)}, but the batch holds {batch.size} "
                "samples; give inputs and outputs batch first, or pass output= a function that "
                "returns the outputs [B, ...]"
            )
        self.likelihood.check_outputs(h)
        return h


class OverMemory(Exception):
    """A chunk needs more memory than the ceiling; ``fit`` samples should not."""

    def __init__(self, fit: int) -> None:
        super().__init__(fit)
        self.fit = max(1, fit)


class PlanMismatch(Exception):
    """The plan does not fit this batch: parameter or module -> reason."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(str(reasons))
        self.reasons = reasons


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
        second=torch.cat([w.second for w in exact]) if exact else None,
        fourth=torch.cat([w.fourth for w in exact]) if exact else None,
        blocks=torch.tensor(weights.blocks) if weights else None,
        coverage=coverage(problem, plan),
    )


def coverage(problem: Problem, plan: Plan) -> dict[str, str]:
    """Parameter -> how it is measured, or why not."""
    told = {}
    for name, parameter in problem.twin.named_parameters():
        owner = problem.twin.get_submodule(name.rpartition(".")[0])
        if not parameter.requires_grad:
            told[name] = "left out: frozen"
        elif name in plan.unused:
            told[name] = "left out: the outputs do not depend on it"
        elif name in plan.replay or not rules_for(owner):
            path = plan.replay.get(name, name.rpartition(".")[0])
            if name not in plan.replay and type(owner) in UNROLLED:
                told[name] = f"autograd: {type(owner).__name__} written out"
            else:
                how = "loop over samples" if path in plan.loop else "vmap"
                told[name] = f"autograd: replay of {path or 'the whole model'} ({how})"
        else:
            told[name] = f"autograd: {type(owner).__name__} rule"
    return told


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
    with record(problem.twin, batch.size, plan.layouts, plan.replay) as tape:
        with _memory_guard(problem, ceiling / 2, batch.size) as saved:
            h = problem.forward(batch)
    if not bool(torch.isfinite(h).all()):
        raise BatchError(f"{int((~torch.isfinite(h)).sum())} of {h.numel()} outputs are not finite")
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
    seeds, weights = _seeds(problem, rows, h, mask)
    deltas = _backward(h, tape, seeds)
    check_inputs_unchanged(tape)
    with torch.no_grad():
        names = {id(p): n for n, p in problem.parameters.items()}
        replays = _replayed_parameters(problem, plan, tape, names)
        for name, parameter in problem.parameters.items():
            if name not in accumulators:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                zeros = torch.zeros_like(
                    parameter, dtype=dtype, memory_format=torch.contiguous_format
                )
                accumulators[name] = Accumulator(zeros, problem.diagonals)
        seeds_stacked = torch.stack(seeds, 1)
        pieces: dict[str, list[tuple[Replayed, str]]] = {}
        for call, inside in replays:
            for local, parameter in inside.items():
                pieces.setdefault(names[id(parameter)], []).append((call, local))
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
            _contract(accumulators[name], uses, deltas, batch.size, weights, ceiling / 8)
        _contract_replays(
            problem,
            plan,
            tape,
            replays,
            pieces,
            deltas,
            seeds_stacked,
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


def _backward(h: Tensor, tape: Tape, seeds: list[Tensor]) -> list[Tensor | None]:
    """δ [B?, S, ...] at every edge: one backward per draw, weights' gradients never asked for."""
    if not tape.edges:
        return []
    collected: list[list[Tensor | None]] = []
    for i, seed in enumerate(seeds):
        last = i == len(seeds) - 1
        collected.append(
            list(torch.autograd.grad(h, tape.edges, seed, retain_graph=not last, allow_unused=True))
        )
    stacked: list[Tensor | None] = []
    for parts in zip(*collected, strict=True):
        present = next((p for p in parts if p is not None), None)
        if present is None:
            stacked.append(None)
            continue
        filled = [torch.zeros_like(present) if p is None else p for p in parts]
        stacked.append(torch.stack(filled) if len(filled) > 1 else filled[0].unsqueeze(0))
    return stacked


def _delta(use: Use, deltas: list[Tensor | None], size: int) -> Tensor | None:
    """δ of a use as [B, S, ...]."""
    delta = deltas[use.edge]
    if delta is None:
        return None
    if use.layout == 0:
        return delta.transpose(0, 1)
    if use.layout == 1:
        return delta.movedim(2, 0)
    return delta.unflatten(1, (size, -1)).transpose(0, 1)


def _precise(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _contract(
    accumulator: Accumulator,
    uses: list[Use],
    deltas: list[Tensor | None],
    size: int,
    weights: Weights | None,
    room: float,
) -> None:
    """Add the moments of one parameter from all its uses."""
    shape = accumulator.a2.shape
    live = []
    for use in uses:
        delta = _delta(use, deltas, size)
        if delta is not None:
            inputs = tuple(_precise(x) for x in use.call.inputs)
            call = type(use.call)(use.call.module, inputs, use.call.folded)
            live.append((use, call, _precise(delta)))
    if not live:
        return
    scale = _scale([(call.inputs if use.rule.outer else (), d) for use, call, d in live])
    live = [(use, call, _rescaled(d, scale)) for use, call, d in live]
    use, call, delta = live[0]
    if len(live) == 1 and use.rows is None:
        if (
            use.rule.outer
            and call.inputs[0].dim() == 2
            and shape
            == (
                delta.shape[-1],
                call.inputs[0].shape[-1],
            )
        ):
            accumulator.add_outer(delta, call.inputs[0], scale, weights)
            return
        if use.rule.tokens:
            accumulator.add_tokens(*embedding_tokens(call, delta), scale, weights)
            return
    draws = delta.shape[1]
    bytes_each = draws * math.prod(shape) * delta.element_size()
    tiled = all(u.rule.tiles and u.rows is None for u, _, _ in live) and len(shape) > 0
    tile = shape[0] if len(shape) > 0 else 1
    step = size
    if bytes_each * size > room:
        step = max(1, int(room / bytes_each))
        if bytes_each > room and tiled:
            tile = max(1, int(shape[0] * room / bytes_each))
    for start in range(0, size, step):
        samples = slice(start, min(start + step, size))
        part = None if weights is None else weights.rows(samples)
        for row in range(0, shape[0] if len(shape) else 1, tile):
            where = slice(row, row + tile) if tiled else slice(None)
            total = _sum_uses(live, samples, where, tiled, shape)
            accumulator.add(total, samples, where if len(shape) else ..., scale, part)  # type: ignore[arg-type]
            if not tiled:
                break


def _sum_uses(
    live: list[Any], samples: slice, where: slice, tiled: bool, shape: torch.Size
) -> Tensor:
    """Σ over uses of g [b, S, *tile]: before any power is taken."""
    total: Tensor | None = None
    for use, call, delta in live:
        part = delta[samples]
        if tiled:
            part = part[..., where]
        g = use.rule.gradient(call.rows(samples), part)
        if use.rows is not None:
            if total is None:
                total = g.new_zeros(*g.shape[:2], *shape)
            total[:, :, use.rows] += g
        else:
            total = g if total is None else total + g
    assert total is not None
    return total


def _scale(groups: list[tuple[tuple[Tensor, ...], Tensor]]) -> Tensor:
    first = groups[0][1]
    if first.dtype == torch.float64:
        return torch.ones((), dtype=torch.float64, device=first.device)
    return torch.stack([power_of_two(delta, *inputs) for inputs, delta in groups]).max()


def _rescaled(delta: Tensor, scale: Tensor) -> Tensor:
    if delta.dtype == torch.float64 or (delta.device.type == "cpu" and float(scale) == 1):
        return delta
    return delta * (1 / scale).to(delta.dtype)


def _replayed_parameters(
    problem: Problem, plan: Plan, tape: Tape, names: dict[int, str]
) -> list[tuple[Replayed, dict[str, Tensor]]]:
    """Each replayed call with the parameters it stands for, named as inside the module."""
    owned: list[tuple[Replayed, dict[str, Tensor]]] = []
    calls = list(tape.replayed)
    if "" in plan.replay.values() or _root_owns(problem):
        calls.append(Replayed("", problem.twin, problem.batch.args, problem.batch.kwargs, ()))
    for call in calls:
        inside: dict[str, Tensor] = {}
        rules = rules_for(call.module)
        for local, parameter in call.module.named_parameters():
            name = names.get(id(parameter))
            if name is None:
                continue
            planned = plan.replay.get(name)
            own = "." not in local and local not in rules
            if planned == call.path if planned is not None else own:
                inside[local] = parameter
        if inside:
            owned.append((call, inside))
    return owned


def _root_owns(problem: Problem) -> bool:
    """Whether the model itself, not a layer of it, holds parameters that no rule covers."""
    names = {n for n, p in problem.twin._parameters.items() if p is not None and p.requires_grad}
    return not names <= set(rules_for(problem.twin))


def _contract_replays(
    problem: Problem,
    plan: Plan,
    tape: Tape,
    replays: list[tuple[Replayed, dict[str, Tensor]]],
    pieces: dict[str, list[tuple[Replayed, str]]],
    deltas: list[Tensor | None],
    seeds: Tensor,
    accumulators: dict[str, Accumulator],
    weights: Weights | None,
    names: dict[int, str],
    batch: Batch,
    room: float,
) -> None:
    """Add the moments of replayed parameters, all calls and rule uses summed first."""
    if not replays:
        return
    draws = seeds.shape[1]
    each = max(sum(p.numel() for p in inside.values()) * draws * 4 for _, inside in replays) * max(
        1, len(replays) // 4
    )
    step = max(1, min(batch.size, int(room / each)))
    one = torch.ones((), dtype=torch.float64, device=seeds.device)
    for start in range(0, batch.size, step):
        samples = slice(start, min(start + step, batch.size))
        totals: dict[str, Tensor] = {}
        for call, inside in replays:
            found = _replay(problem, plan, call, inside, deltas, seeds, batch, samples)
            for local, g in found.items():
                name = names[id(inside[local])]
                totals[name] = totals[name] + _precise(g) if name in totals else _precise(g)
        for name, total in totals.items():
            if name not in plan.replay:
                uses = tape.uses.get(id(problem.parameters[name]), [])
                for use in uses:
                    delta = _delta(use, deltas, batch.size)
                    if delta is None:
                        continue
                    live = [(use, use.call, delta)]
                    total = total + _precise(
                        _sum_uses(live, samples, slice(None), False, problem.parameters[name].shape)
                    )
            part = None if weights is None else weights.rows(samples)
            scale = one if total.dtype == torch.float64 else power_of_two(total)
            total = total if total.dtype == torch.float64 else total * (1 / scale).to(total.dtype)
            where: Any = slice(None) if total.dim() > 2 else ...
            accumulators[name].add(total.contiguous(), samples, where, scale, part)


def _replay(
    problem: Problem,
    plan: Plan,
    call: Replayed,
    inside: dict[str, Tensor],
    deltas: list[Tensor | None],
    seeds: Tensor,
    batch: Batch,
    samples: slice,
) -> dict[str, Tensor]:
    if call.path == "":
        cut = batch[samples]
        args, kwargs, incoming = cut.args, cut.kwargs, [seeds[samples]]
        select: Any = lambda out: [problem.outputs(out)]  # noqa: E731
        size = cut.size
    else:
        cut = Batch(call.args, call.kwargs, batch.size)[samples]
        args, kwargs, size, select = cut.args, cut.kwargs, cut.size, None
        incoming = []
        for edge in call.edges:
            delta = None if edge is None else deltas[edge]
            incoming.append(None if delta is None else delta.transpose(0, 1)[samples])
        if all(d is None for d in incoming):
            return {}
    detached = {n: p.detach() for n, p in inside.items()}
    for vectorise in (True, False) if call.path not in plan.loop else (False,):
        try:
            return replay_gradients(
                call.module,
                detached,
                args,
                kwargs,
                incoming,
                batch_size=size,
                select=select,
                vectorise=vectorise,
            )
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if not vectorise:
                raise
            plan.loop.add(call.path)  # not every operation can be vmapped: a loop always can
    raise AssertionError


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
