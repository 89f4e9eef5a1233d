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


def replay_gradients(
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
