"""Moments of the parameters that are reached by replaying a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.layers.per_sample import per_sample_vjp
from fimprobe.engines.layers.rules import rules_for
from fimprobe.engines.moments.accumulator import MomentAccumulator
from fimprobe.engines.moments.contraction import precise, sum_uses, use_deltas
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.problem.weights import Weights
from fimprobe.engines.tracing.plan import Plan, PlanMismatch
from fimprobe.engines.tracing.tape import FallbackCall, Tape
from fimprobe.model.batch import Batch


def assign_fallbacks(
    problem: Problem, plan: Plan, tape: Tape, names: dict[int, str]
) -> list[tuple[FallbackCall, dict[str, Tensor]]]:
    """Each replayed call with the parameters it stands for, named as inside the module."""
    owned: list[tuple[FallbackCall, dict[str, Tensor]]] = []
    calls = list(tape.replayed)
    if "" in plan.replay.values() or _root_owns(problem):
        calls.append(FallbackCall("", problem.twin, problem.batch.args, problem.batch.kwargs, ()))
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


def accumulate_fallback_moments(
    problem: Problem,
    plan: Plan,
    tape: Tape,
    replays: list[tuple[FallbackCall, dict[str, Tensor]]],
    pieces: dict[str, list[tuple[FallbackCall, str]]],
    deltas: list[list[Tensor] | None],
    draws: list[Tensor],
    accumulators: dict[str, MomentAccumulator],
    weights: Weights | None,
    names: dict[int, str],
    batch: Batch,
    room: float,
) -> None:
    """Add the moments of replayed parameters, all calls and rule uses summed first."""
    if not replays:
        return
    seeds = torch.stack(draws, 1)
    each = max(
        sum(p.numel() for p in inside.values()) * len(draws) * 4 for _, inside in replays
    ) * max(1, len(replays) // 4)
    step = max(1, min(batch.size, int(room / each)))
    one = torch.ones((), dtype=torch.float64, device=seeds.device)
    for start in range(0, batch.size, step):
        samples = slice(start, min(start + step, batch.size))
        totals: dict[str, Tensor] = {}
        for call, inside in replays:
            found = _replay(problem, plan, call, inside, deltas, seeds, batch, samples)
            for local, g in found.items():
                name = names[id(inside[local])]
                totals[name] = totals[name] + precise(g) if name in totals else precise(g)
        for name, total in totals.items():
            if name not in plan.replay:
                uses = tape.uses.get(id(problem.parameters[name]), [])
                for use in uses:
                    delta = use_deltas(use, deltas, batch.size)
                    if delta is None:
                        continue
                    live = [(use, use.call, delta)]
                    total = total + precise(
                        sum_uses(live, samples, None, problem.parameters[name].shape, one)
                    )
            part = None if weights is None else weights.rows(samples)
            where: Any = slice(None) if total.dim() > 2 else ...
            accumulator, total = accumulators[name], total.contiguous()
            looks = total.device.type == "cpu"
            if not (looks and accumulator.add(total, samples, where, part)):
                accumulator.add(total, samples, where, part, one)


def _replay(
    problem: Problem,
    plan: Plan,
    call: FallbackCall,
    inside: dict[str, Tensor],
    deltas: list[list[Tensor] | None],
    seeds: Tensor,
    batch: Batch,
    samples: slice,
) -> dict[str, Tensor]:
    incoming: list[Tensor | None]
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
            incoming.append(None if delta is None else torch.stack([d[samples] for d in delta], 1))
        if all(d is None for d in incoming):
            return {}
    detached = {n: p.detach() for n, p in inside.items()}
    for vectorise in (True, False) if call.path not in plan.loop else (False,):
        try:
            return per_sample_vjp(
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
        except Exception as error:
            if vectorise:
                plan.loop.add(call.path)  # not every operation can be vmapped
            elif call.path == "":
                raise
            else:  # a table as long as the batch is large, or state that the first pass left
                plan.loop.discard(call.path)
                raise PlanMismatch({call.path: "it does not run on single samples"}) from error
    raise AssertionError
