"""Per-sample gradients of any module: run it again for one sample at a time.

``vmap(grad)`` over the samples where the module allows it, a loop where it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten


def per_sample_vjp(
    module: nn.Module,
    parameters: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    deltas: list[Tensor | None],
    *,
    batch_size: int,
    select: Callable[[Any], list[Tensor]] | None = None,
    vectorise: bool = True,
) -> dict[str, Tensor]:
    """``{name: [B, S, *shape]}`` for ``parameters`` (named as inside ``module``).

    ``deltas`` holds δ [B, S, ...] for each tensor among the outputs, None where none arrives.
    """
    args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
    leaves, tree = tree_flatten((args, kwargs))
    mapped = [
        i
        for i, x in enumerate(leaves)
        if isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == batch_size
    ]
    seeds = [d for d in deltas if d is not None]
    outputs = select or (lambda out: [x for x in tree_leaves(out) if isinstance(x, Tensor)])

    def inner(params: dict[str, Tensor], samples: list[Tensor], seed: list[Tensor]) -> Tensor:
        mine = list(leaves)
        for i, x in zip(mapped, samples, strict=True):
            mine[i] = x.unsqueeze(0)
        one_args, one_kwargs = tree_unflatten(mine, tree)
        out = outputs(functional_call(module, params, one_args, one_kwargs))
        live = [x for x, d in zip(out, deltas, strict=True) if d is not None]
        total = sum((x.squeeze(0) * d).sum() for x, d in zip(live, seed, strict=True))
        assert isinstance(total, Tensor)
        return total

    rows = [leaves[i] for i in mapped]
    if vectorise:
        per_draw = vmap(grad(inner), in_dims=(None, None, 0))
        return vmap(per_draw, in_dims=(None, 0, 0))(parameters, rows, seeds)
    collected: dict[str, list[Tensor]] = {name: [] for name in parameters}
    copies = {n: p.detach().requires_grad_() for n, p in parameters.items()}
    for b in range(batch_size):
        for s in range(seeds[0].shape[1]):
            with torch.enable_grad():
                value = inner(copies, [x[b] for x in rows], [d[b, s] for d in seeds])
            found: tuple[Tensor | None, ...] = (None,) * len(copies)
            if value.requires_grad:
                found = torch.autograd.grad(value, list(copies.values()), allow_unused=True)
            for (name, p), g in zip(copies.items(), found, strict=True):
                collected[name].append(torch.zeros_like(p) if g is None else g)
    draws = seeds[0].shape[1]
    return {name: torch.stack(gs).unflatten(0, (batch_size, draws)) for name, gs in collected.items()}


Direction = list[Tensor | None]


def per_sample_vjp_tangent(
    module: nn.Module,
    inside: dict[str, Tensor],
    along: dict[str, Tensor],
    scales: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: Direction,
    delta: list[Tensor | None],
    bend: list[Tensor | None],
    *,
    batch_size: int,
    select: Callable[[Any], list[Tensor]] | None = None,
    vectorise: bool = True,
) -> dict[str, Tensor]:
    """The derivative of each sample's gradient ∂(δᵀz)/∂θ along a direction: {name: [B, *shape]}.

    The direction moves the parameters by ``scales``[b]·``along``, the module's inputs by ``inputs``
    and δ by ``bend`` (None: not at all); inputs without a batch move alike for all samples. By
    symmetry of second derivatives it is ∂/∂θ of ⟨along, ∂φ/∂θ⟩ + ⟨inputs, ∂φ/∂x⟩ + ⟨bend, z⟩ with
    φ = δᵀz(θ, x).
    """
    args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
    leaves, tree = tree_flatten((args, kwargs))
    tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    mapped = [i for i in tensors if leaves[i].dim() > 0 and leaves[i].shape[0] == batch_size]
    moved_by = dict(zip(tensors, inputs or [None] * len(tensors), strict=True))
    moving = [i for i in mapped if moved_by[i] is not None]
    shared = [i for i in tensors if moved_by[i] is not None and i not in mapped]
    steps = [moved_by[i] for i in moving]
    fixed = [i for i in mapped if i not in moving]
    outputs = select or (lambda out: [x for x in tree_leaves(out) if isinstance(x, Tensor)])
    every = {**along, **inside}  # own parameters, and those that only move
    moved = [n for n in every if n in along]
    live = [i for i, d in enumerate(delta) if d is not None]
    seeds: list[Any] = [delta[i] for i in live]
    bends: list[Any] = [
        b if b is not None else torch.zeros_like(d)
        for d, b in ((delta[i], bend[i]) for i in live)
        if d is not None
    ]
    everything = {n: p.detach() for n, p in module.named_parameters() if n in every}

    def forward(params: dict[str, Tensor], moves: list[Tensor], rest: list[Tensor]) -> list[Tensor]:
        mine = list(leaves)
        for i, x in zip([*moving, *shared], moves, strict=True):
            mine[i] = x if i in shared else x.unsqueeze(0)
        for i, x in zip(fixed, rest, strict=True):
            mine[i] = x.unsqueeze(0)
        one_args, one_kwargs = tree_unflatten(mine, tree)
        out = outputs(functional_call(module, params, one_args, one_kwargs))
        return [out[i].squeeze(0) for i in live]

    def inner(params, own_moves, rest, seed, curve, own_steps, scale):  # type: ignore[no-untyped-def]
        moves = [*own_moves, *(leaves[i] for i in shared)]
        step = [*own_steps, *(moved_by[i] for i in shared)]

        def phi(moved_params, moves):  # type: ignore[no-untyped-def]
            out = forward(params | moved_params, moves, rest)
            return sum((x * d).sum() for x, d in zip(out, seed, strict=True))

        total = sum((x * c).sum() for x, c in zip(forward(params, moves, rest), curve, strict=True))
        if moved or moves:
            of = {n: params[n] for n in moved}
            by_params, by_inputs = derive(phi, of, moves)
            total = total + sum((scale[n] * along[n] * by_params[n]).sum() for n in moved)
            total = total + sum((s * g).sum() for s, g in zip(step, by_inputs, strict=True))
        return total

    one: dict[str, Tensor] = {
        n: scales.get(n, torch.ones(batch_size, dtype=everything[n].dtype)).to(everything[n])
        for n in moved
    }
    data = (
        [leaves[i] for i in moving],
        [leaves[i] for i in fixed],
        seeds,
        bends,
        steps,
        one,
    )
    own = {n: everything[n] for n in inside}
    others = {n: p for n, p in everything.items() if n not in inside}
    if vectorise:

        def derive(f, of, moves):  # type: ignore[no-untyped-def]
            return grad(f, argnums=(0, 1))(of, moves)

        def single(mine, *rest):  # type: ignore[no-untyped-def]
            return inner(mine | others, *rest)

        result: dict[str, Tensor] = vmap(grad(single), in_dims=(None, 0, 0, 0, 0, 0, 0))(own, *data)
        return result
    collected: dict[str, list[Tensor]] = {name: [] for name in own}
    for b in range(batch_size):
        mine = {n: p.clone().requires_grad_() for n, p in everything.items()}
        rows = tree_map(lambda x: x[b], data)  # noqa: B023
        rows = ([x.clone().requires_grad_() for x in rows[0]], *rows[1:])
        for i in shared:
            leaves[i] = leaves[i].detach().requires_grad_()

        def derive(f, of, moves):  # type: ignore[no-untyped-def]
            value = f(of, moves)
            wanted = [*of.values(), *moves]
            found: Any = (None,) * len(wanted)
            if isinstance(value, Tensor) and value.requires_grad:
                found = torch.autograd.grad(value, wanted, create_graph=True, allow_unused=True)
            filled = [
                torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)
            ]
            return dict(zip(of, filled[: len(of)], strict=True)), filled[len(of) :]

        with torch.enable_grad():
            total = inner(mine, *rows)
        found: Any = (None,) * len(own)
        if isinstance(total, Tensor) and total.requires_grad:
            found = torch.autograd.grad(total, [mine[n] for n in own], allow_unused=True)
        for name, g in zip(own, found, strict=True):
            collected[name].append(torch.zeros_like(own[name]) if g is None else g)
    return {name: torch.stack(gs) for name, gs in collected.items()}


def module_jvp(
    module: nn.Module, along: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor | None]:
    """The outputs' derivatives along a direction of the parameters, by two backward passes."""
    args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
    with torch.enable_grad():
        moved = {n: p.detach().requires_grad_() for n, p in module.named_parameters() if n in along}
        out = functional_call(module, moved, args, kwargs)
        leaves = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        live = [x for x in leaves if x.requires_grad]
        dummies = [torch.zeros_like(x).requires_grad_() for x in live]
        gradients = torch.autograd.grad(
            live, list(moved.values()), dummies, create_graph=True, allow_unused=True
        )
        parts = [(g * along[n]).sum() for n, g in zip(moved, gradients, strict=True) if g is not None]
        found: Any = (None,) * len(live)
        if parts and any(p.requires_grad for p in parts):
            found = torch.autograd.grad(torch.stack(parts).sum(), dummies, allow_unused=True)
    answers = iter(found)
    return [next(answers) if x.requires_grad else None for x in leaves]
