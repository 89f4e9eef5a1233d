"""Second derivatives R = Σ_a seed_a ∂²h_a of every parameter, by Hessian-vector products.

R's diagonal is probed at the layers' outputs z: with random signs v over all z, (Hv) at z is one
double backward, and (Σ_t v_to x_ti)(Σ_t (Hv)_to x_ti) is an unbiased ∂²/∂W_oi² (theory §2).
R's norms are probed with directions u of the parameters. Within one call a layer's output is affine
in its parameters, so that only z bends: directions ẑ = ẑ(x; u) held fixed give the blocks exactly
where they are zero (piecewise-linear nets, last layers). ``whole`` moves all parameters at once.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fimprobe.batch import Batch
from fimprobe.engines.curves import CurvatureSums, Curve, Pull, Site
from fimprobe.engines.problem import Plan, Problem
from fimprobe.engines.replay import module_direction
from fimprobe.engines.seeds import Seeds
from fimprobe.engines.signs import signs
from fimprobe.engines.tape import Replayed, Tape, along_batch, batch_first, from_batch_first

Calls = list[tuple[Replayed, dict[str, Tensor]]]


def twice_differentiable() -> Any:
    """Attention's flash kernels have no second derivative; the plain one has."""
    return sdpa_kernel(SDPBackend.MATH)


def direction_of(parameter: Tensor, key: str, seed: int) -> Tensor:
    """A direction ±1 of a parameter."""
    shape = (1, *parameter.shape)
    return signs(shape, key, seed, dtype=parameter.dtype, device=parameter.device)[0]


class Bender:
    """The second-order pass over one chunk: holds δ with its graph, and yields Hv for directions."""

    def __init__(self, h: Tensor, tape: Tape, seeds: list[Tensor], replayed: list[Tensor]) -> None:
        self.tape, self.replayed = tape, replayed
        self.places = [*tape.edges, *tape.sources, *replayed]
        self.first: list[list[Tensor | None]] = []
        for seed in seeds:
            self.first.append(
                list(
                    torch.autograd.grad(
                        h,
                        self.places,
                        seed,
                        create_graph=True,
                        retain_graph=True,
                        allow_unused=True,
                    )
                )
                if self.places
                else []
            )
        self.edges, self.sources = len(tape.edges), len(tape.sources)

    def delta(self, seed: int) -> list[Tensor | None]:
        """δ at the edges, detached."""
        return [None if d is None else d.detach() for d in self.first[seed][: self.edges]]

    def bend(
        self,
        seed: int,
        at_edges: list[Tensor | None],
        at_parameters: list[Tensor | None] | None = None,
    ) -> Curve:
        """Derivatives of δ at the edges, and of the sources' inputs, along a direction.

        s = ⟨direction, δ⟩; ∂s/∂z is δ's derivative, ∂s/∂δ_x that of the input x.
        """
        first = self.first[seed]
        directions = [*at_edges, *[None] * self.sources, *(at_parameters or [])]
        parts = [
            (v * d).sum()
            for v, d in zip(directions, first, strict=False)
            if v is not None and d is not None and (d.requires_grad or v.requires_grad)
        ]
        middle = first[self.edges : self.edges + self.sources]
        nothing = Curve([None] * self.edges, [None] * self.sources)
        if not parts:
            return nothing
        total = torch.stack(parts).sum()
        wanted = [m for m in middle if m is not None and m.requires_grad]
        if not total.requires_grad or not (self.edges or wanted):
            return nothing
        found: list[Tensor | None] = list(
            torch.autograd.grad(
                total, [*self.tape.edges, *wanted], retain_graph=True, allow_unused=True
            )
        )
        later = iter(found[self.edges :])
        inputs = [next(later) if m is not None and m.requires_grad else None for m in middle]
        return Curve(found[: self.edges], inputs)


def measure_curvature(
    problem: Problem,
    plan: Plan,
    tape: Tape,
    h: Tensor,
    seeds: Seeds,
    rows: slice,
    batch: Batch,
    calls: Calls,
    names: dict[int, str],
    sums: dict[str, CurvatureSums],
    seconds: dict[str, float],
) -> dict[str, set[str]]:
    """Add one chunk's second derivatives; returns which parameters of a layer meet each other."""
    started = time.perf_counter()
    size, count = batch.size, len(seeds.seeds)
    exact = problem.draws.count is None
    site = _sites(problem, plan, tape, batch, calls, names)
    replayed: list[Tensor] = [problem.parameters[n] for n, s in site.items() if s.calls]
    partners = meetings(problem, tape, site)
    bender = Bender(h, tape, seeds.seeds, replayed)
    deltas = [bender.delta(y) for y in range(count)]
    assert seeds.weights is not None
    second = seeds.weights.second
    for name, s in sums.items():
        s.begin(size, count, second, exact, self_meeting=name in partners.get(name, ()))
    seed = problem.draws.seed
    if not problem.ask.exact:
        # R's diagonal: K probes of random signs at the layers' outputs
        first = [
            [
                None
                if d is None
                else from_batch_first(
                    signs(
                        _batched_shape(d, tape.layout_of[e], size),
                        f"diagonal {k} {e}",
                        seed,
                        first=rows.start,
                        dtype=d.dtype,
                        device=d.device,
                    ),
                    tape.layout_of[e],
                )
                for e, d in enumerate(_present(deltas, len(tape.edges)))
            ]
            for k in range(problem.ask.probes)
        ]
        bent = [[bender.bend(y, v) for v in first] for y in range(count)]
        for name, s in sums.items():
            pull = Pull(problem, plan, site[name], name, size)
            s.add_diagonal(pull, first, bent, deltas, seed)
        del first, bent
    else:
        from fimprobe.engines import backpack  # optional

        for y, one in enumerate(seeds.seeds):
            diagonals = backpack.hessian_diagonals(problem, batch, one, verified=True)
            for name, s in sums.items():
                s.add_exact(y, diagonals.get(name))
    assert seeds.weights is not None
    labels = seeds.weights.second.shape[1]  # the other seeds serve the bounds
    share = (time.perf_counter() - started) * labels / count
    seconds["i2 diagonal"] = seconds.get("i2 diagonal", 0.0) + share
    # R's norms: directions of the parameters, with and without flipped signs
    for j in range(problem.ask.probes if exact else 1):
        along = {
            n: direction_of(p, f"direction {j} {n}", seed) for n, p in problem.parameters.items()
        }
        flips = {
            n: signs((1,), f"flip {j} {n}", seed, dtype=h.dtype, device=h.device).expand(size)
            if site[n].calls
            else signs(
                (size,), f"flip {j} {n}", seed, first=rows.start, dtype=h.dtype, device=h.device
            )
            for n in along
        }
        plain = _directions(problem, tape, site, along, None, calls, names, size)
        flipped = _directions(problem, tape, site, along, flips, calls, names, size)
        fixed = [_held(plain), _held(flipped)]
        local = [[bender.bend(y, v) for y in range(count)] for v in fixed]
        for name, s in sums.items():
            pull = Pull(problem, plan, site[name], name, size, along, flips)
            s.add_block(pull, local, deltas, flips[name])
        del local, fixed
        whole_directions = _directions(
            problem, tape, site, along, None, calls, names, size, live=True
        )
        at_parameters: list[Tensor | None] = [along[n] for n, s in site.items() if s.calls]
        whole = [bender.bend(y, whole_directions, at_parameters) for y in range(count)]
        turned: list[Curve] | None = None
        if partners:
            directions = _directions(problem, tape, site, along, flips, calls, names, size, live=True)
            at_parameters = [along[n] * flips[n][0] for n, s in site.items() if s.calls]
            turned = [bender.bend(y, directions, at_parameters) for y in range(count)]
        meeting = set(partners) | {q for group in partners.values() for q in group}
        for name, s in sums.items():
            pull = Pull(problem, plan, site[name], name, size, along, flips)
            s.add_whole(pull, whole, turned if name in meeting else None, deltas)
        del whole, turned
    return partners


def _held(directions: list[Tensor | None]) -> list[Tensor | None]:
    return [None if v is None else v.detach() for v in directions]


def _present(deltas: list[list[Tensor | None]], edges: int) -> list[Tensor | None]:
    """For each edge, some δ that arrives there."""
    return [next((d[e] for d in deltas if d[e] is not None), None) for e in range(edges)]


def _batched_shape(x: Tensor, layout: int | str, size: int) -> torch.Size:
    return batch_first(x, layout, size).shape


def _sites(
    problem: Problem,
    plan: Plan,
    tape: Tape,
    batch: Batch,
    calls: Calls,
    names: dict[int, str],
) -> dict[str, Site]:
    """Where each parameter is used: under rules, and inside replayed calls."""
    found = {n: Site([], []) for n in problem.parameters}
    for name, parameter in problem.parameters.items():
        if name not in plan.replay:
            found[name].uses.extend(tape.uses.get(id(parameter), []))
    for call, inside in calls:
        if call.path == "":
            call = Replayed("", call.module, batch.args, batch.kwargs, (), ())
        for local, held in inside.items():
            found[names[id(held)]].calls.append((call, local))
    return found


def meetings(problem: Problem, tape: Tape, site: dict[str, Site]) -> dict[str, set[str]]:
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


def _below(tape: Tape, sources: Any) -> set[Any]:
    """Graph nodes (and ids of leaves) that the sources depend on."""
    seen: set[Any] = set()
    stack: list[Any] = []
    for index in sources:
        if index is None:
            continue
        place = tape.sources[index]
        if isinstance(place, Tensor):
            seen.add(id(place))
        else:
            stack.append(place.node)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            seen.add(id(variable))
        stack.extend(following for following, _ in node.next_functions)
    return seen


def _directions(
    problem: Problem,
    tape: Tape,
    site: dict[str, Site],
    along: dict[str, Tensor],
    flips: dict[str, Tensor] | None,
    calls: Calls,
    names: dict[int, str],
    size: int,
    live: bool = False,
) -> list[Tensor | None]:
    """At each edge, its derivative along the parameters' directions within the call.

    ``live``: differentiable through the calls' inputs, and without the replayed calls (their
    parameters' own gradients take that part, see :meth:`Bender.bend`).
    """
    found: list[Tensor | None] = [None] * len(tape.edges)
    with torch.enable_grad() if live else torch.no_grad():
        for name, s in site.items():
            if live and s.calls:
                continue
            for use in s.uses:
                assert use.direction is not None
                moved = use.direction(along[name])
                if flips is not None:
                    moved = moved * along_batch(flips[name], moved, use.layout)
                old = found[use.edge]
                found[use.edge] = moved if old is None else old + moved
    if live:
        return found
    for call, inside in calls:
        if call.path == "":
            continue
        for local, held in inside.items():
            name = names[id(held)]
            parts = module_direction(call.module, {local: along[name]}, call.args, call.kwargs)
            for edge, v in zip(call.edges, parts, strict=True):
                if edge is None or v is None:
                    continue
                if flips is not None:
                    v = v * along_batch(flips[name], v, 0)
                old = found[edge]
                found[edge] = v if old is None else old + v
    return found
