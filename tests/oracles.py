"""Brute force in float64: dense Jacobians, enumerated labels, no code of the package."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def jacobian(model: nn.Module, args: tuple[Any, ...], b: int, pick: Callable = lambda o: o):
    """{name: [n_outputs, numel]} of sample b's flattened outputs, one row at a time."""
    one = tuple(a[b : b + 1] if isinstance(a, Tensor) else a for a in args)
    h = pick(model(*one)).reshape(-1)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    params = [p for p in model.parameters() if p.requires_grad]
    rows = {n: [] for n in names}
    for i in range(len(h)):
        gs = torch.autograd.grad(h[i], params, retain_graph=True, allow_unused=True)
        for n, p, g in zip(names, params, gs, strict=True):
            rows[n].append(torch.zeros_like(p).flatten() if g is None else g.flatten())
    return {n: torch.stack(r) for n, r in rows.items()}, h.detach()


def categorical_labels(h: Tensor, positions: int, classes: int):
    """Every labelling of the positions, its probability and its score at the outputs."""
    logits = h.view(positions, classes)
    p = torch.exp(logits - logits.logsumexp(1, keepdim=True))
    for ys in itertools.product(range(classes), repeat=positions):
        delta, weight = -p.clone(), torch.ones((), dtype=h.dtype)
        for t, y in enumerate(ys):
            delta[t, y] += 1
            weight = weight * p[t, y]
        yield weight, delta.flatten()


def bernoulli_labels(h: Tensor):
    p = 1 / (1 + torch.exp(-h))
    for ys in itertools.product((0.0, 1.0), repeat=len(h)):
        y = torch.tensor(ys, dtype=h.dtype)
        yield torch.prod(torch.where(y > 0, p, 1 - p)), y - p


def poisson_labels(h: Tensor, most: int = 60):
    rate = torch.exp(h)
    for ys in itertools.product(range(most), repeat=len(h)):
        y = torch.tensor(ys, dtype=h.dtype)
        yield torch.exp((y * h - rate - torch.lgamma(y + 1)).sum()), y - rate


def gaussian_labels(h: Tensor, sigma: float, order: int = 6):
    """Gauss-Hermite nodes: exact for polynomials up to degree 11."""
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    weights = weights / weights.sum()
    for picks in itertools.product(range(order), repeat=len(h)):
        z = torch.tensor([nodes[i] for i in picks], dtype=h.dtype)
        yield torch.tensor(float(np.prod([weights[i] for i in picks])), dtype=h.dtype), z / sigma


def enumerate_fisher(model, args, labels, pick=lambda o: o):
    """Per input and parameter: diag F, diagonal label variance, L1 of the block; and of the whole."""
    size = args[0].shape[0]
    diag, var, l1 = [], [], []
    for b in range(size):
        jac, h = jacobian(model, args, b, pick)
        whole = torch.cat(list(jac.values()), 1)
        jac = {**jac, "": whole}
        table = list(labels(h))
        w = torch.stack([x for x, _ in table])
        d = torch.stack([x for _, x in table])
        mine = {}, {}, {}
        for n, j in jac.items():
            g = d @ j
            f = w @ g**2
            mine[0][n] = f
            mine[1][n] = w @ g**4 - f**2
            fisher = (g * w[:, None]).T @ g
            mine[2][n] = float(w @ (g**2).sum(1) ** 2 - (fisher**2).sum())
        diag.append(mine[0])
        var.append(mine[1])
        l1.append(mine[2])
    return diag, var, l1


def summarise(diag, var, l1, name):
    """What the report states for one parameter (or "" for all): exact draws."""
    f = torch.stack([d[name] for d in diag])
    out = {
        "diagonal": f.mean(0),
        "label": torch.stack([v[name] for v in var]).mean(0),
        "l1": sum(x[name] for x in l1) / len(l1),
        "per_input_trace": f.sum(1),
    }
    if len(f) > 1:
        out["input"] = f.var(0)
    return out
