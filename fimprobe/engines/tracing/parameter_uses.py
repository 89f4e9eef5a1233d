"""Where each parameter is used, and which uses depend on each other's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.graph import nodes_behind
from fimprobe.engines.tracing.plan import Plan
from fimprobe.engines.tracing.tape import FallbackCall, ParameterUse, Tape
from fimprobe.model.batch import Batch

Calls = list[tuple[FallbackCall, dict[str, Tensor]]]


@dataclass(frozen=True)
class ParameterUses:
    """Where a parameter is used: under rules, and inside replayed calls by its name there."""

    uses: list[ParameterUse]
    calls: list[tuple[FallbackCall, str]]


def find_uses(
    problem: Problem,
    plan: Plan,
    tape: Tape,
    batch: Batch,
    calls: Calls,
    names: dict[int, str],
) -> dict[str, ParameterUses]:
    """Where each parameter is used: under rules, and inside replayed calls."""
    found = {n: ParameterUses([], []) for n in problem.parameters}
    for name, parameter in problem.parameters.items():
        if name not in plan.replay:
            found[name].uses.extend(tape.uses.get(id(parameter), []))
    for call, inside in calls:
        if call.path == "":
            call = FallbackCall("", call.module, batch.args, batch.kwargs, (), ())
        for local, held in inside.items():
            found[names[id(held)]].calls.append((call, local))
    return found


def find_interacting_uses(
    problem: Problem, tape: Tape, site: dict[str, ParameterUses]
) -> dict[str, set[str]]:
    """Parameters of one layer whose uses depend on each other's outputs (reuse, recurrence)."""
    layers: dict[str, list[str]] = {}
    for name in site:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    found: dict[str, set[str]] = {}
    for members in layers.values():
        used = [(n, u) for n in members for u in site[n].uses]
        called = [(n, c) for n in members for c, _ in site[n].calls]
        one_use = len({u.edge for _, u in used}) <= 1 and not any(u.steps for _, u in used)
        if (one_use and not called) or (not used and len({id(c) for _, c in called}) <= 1):
            continue
        if called:  # tied between calls, or between a call and a layer
            for n in members:
                if len(site[n].uses) + len(site[n].calls) > 0:
                    found[n] = set(members)
            continue
        for n, use in used:
            below = _below(tape, use.sources)
            for m, other in used:
                place = tape.edges[other.edge]
                key = id(place) if isinstance(place, Tensor) else place.node
                if key in below:
                    found.setdefault(n, set()).add(m)
                    found.setdefault(m, set()).add(n)
    return found


def _below(tape: Tape, sources: Sequence[int | None]) -> set[Any]:
    """Graph nodes (and ids of leaves) that the sources depend on."""
    places = [tape.sources[index] for index in sources if index is not None]
    found: set[Any] = {id(place) for place in places if isinstance(place, Tensor)}
    for node in nodes_behind([place.node for place in places if not isinstance(place, Tensor)]):
        found.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
    return found
