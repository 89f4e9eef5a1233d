"""Brute force in float64: dense Jacobians, enumerated labels, no code of the package."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


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


def mean_and_variance_labels(h: Tensor, order: int = 6):
    """Scores in the natural parameters (m/v, −1/(2v)) of each label, at Gauss-Hermite nodes."""
    first, second = h.view(-1, 2).unbind(1)
    m, v = -first / (2 * second), -1 / (2 * second)
    for weight, z in gaussian_labels(m, 1.0, order):
        y = m + v.sqrt() * z
        yield weight, torch.stack([y - m, y**2 - m**2 - v], 1).flatten()


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


def debiased_norm(f: Tensor) -> float:
    """‖diag F‖₂ from F_ii of inputs [B, P]: the mean product of two different inputs, not below 0.

    The square of the mean is larger by the variance of the mean. One input has its own norm.
    """
    size = len(f)
    if size == 1:
        return float(f.norm())
    products = f @ f.T
    return max(float(products.sum() - products.trace()) / (size * (size - 1)), 0.0) ** 0.5


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def _score(model, args, b: int, seed: Tensor, pick, graph: bool = False) -> Tensor:
    """The flat gradient Jᵀ seed_b of sample b, all trainable parameters in their order."""
    one = tuple(a[b : b + 1] if isinstance(a, Tensor) else a for a in args)
    h = pick(model(*one))
    params = list(_named(model).values())
    gs = torch.autograd.grad(h, params, seed[b : b + 1], create_graph=graph, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(params, gs, strict=True)]
    )


def _derivative(model: nn.Module, total: Tensor) -> Tensor:
    params = list(_named(model).values())
    none: Any = [None] * len(params)
    if total.requires_grad:
        none = torch.autograd.grad(total, params, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(params, none, strict=True)
        ]
    )


def _derivatives(model: nn.Module, totals: Tensor) -> Tensor:
    """The derivative of every entry: all at once, or one by one where torch cannot batch them."""
    params = list(_named(model).values())
    units = torch.eye(len(totals), dtype=totals.dtype)
    try:
        gs = torch.autograd.grad(
            totals, params, units, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError:
        return torch.stack([_derivative(model, total) for total in totals])
    none = [units.new_zeros(len(units), p.numel()) for p in params]
    rows = [z if g is None else g.reshape(len(units), -1) for g, z in zip(gs, none, strict=True)]
    batched = torch.cat(rows, 1)
    # torch 2.13 batches some wrongly: 5 % off behind a GroupNorm and a convolution
    total = _derivative(model, totals.sum())
    if not torch.allclose(batched.sum(0), total, rtol=1e-9, atol=1e-11 * float(batched.abs().max())):
        return torch.stack([_derivative(model, total) for total in totals])
    return batched


def hessians(model: nn.Module, args, seeds, pick=lambda o: o) -> Tensor:
    """R = Σ_a seed_a ∂²h_a/∂θ∂θᵀ, [B, len(seeds), P, P], by double backward of single samples."""
    found = []
    for b in range(len(seeds[0])):
        mine = []
        for seed in seeds:
            with sdpa_kernel(SDPBackend.MATH):
                g = _score(model, args, b, seed, pick, graph=True)
            mine.append(_derivatives(model, g))
        found.append(torch.stack(mine))
    return torch.stack(found).detach()


def bent(model: nn.Module, args, seeds, u: Tensor, pick=lambda o: o) -> Tensor:
    """R u, [B, len(seeds), P], by double backward of single samples."""
    found = []
    for b in range(len(seeds[0])):
        for seed in seeds:
            with sdpa_kernel(SDPBackend.MATH):
                g = _score(model, args, b, seed, pick, graph=True)
            found.append(_derivative(model, g @ u))
    return torch.stack(found).unflatten(0, (-1, len(seeds))).detach()


def bent_by_differences(
    model: nn.Module, args, seeds, u: Tensor, step: float = 2e-4, pick=lambda o: o
) -> Tensor:
    """R u, [B, len(seeds), P], by central differences (fourth order) of first-order gradients."""
    params = list(_named(model).values())
    before = [p.detach().clone() for p in params]
    found = torch.zeros(len(seeds[0]), len(seeds), sum(p.numel() for p in params))
    for times, factor in ((1, 8.0), (-1, -8.0), (2, -1.0), (-2, 1.0)):
        with torch.no_grad():
            parts = u.split([p.numel() for p in params])
            for p, old, part in zip(params, before, parts, strict=True):
                p.copy_(old + times * step * part.view_as(p))
        for b in range(len(seeds[0])):
            for y, seed in enumerate(seeds):
                found[b, y] += factor / (12 * step) * _score(model, args, b, seed, pick)
    with torch.no_grad():
        for p, old in zip(params, before, strict=True):
            p.copy_(old)
    return found


def spans(model: nn.Module) -> dict[str, slice]:
    """Where each trainable parameter lies in the flat vector of all of them."""
    found, start = {}, 0
    for name, p in _named(model).items():
        found[name] = slice(start, start + p.numel())
        start += p.numel()
    return found


class GatheredBag(nn.Module):
    """EmbeddingBag (sum, mean, weights) by a lookup and a sum, which torch differentiates twice."""

    def __init__(self, bag: nn.EmbeddingBag) -> None:
        super().__init__()
        self.weight, self.mode, self.padding = bag.weight, bag.mode, bag.padding_idx

    def forward(self, tokens: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        keep = (tokens != self.padding).to(self.weight.dtype)
        each = keep if per_sample_weights is None else keep * per_sample_weights
        total = (self.weight[tokens] * each.unsqueeze(-1)).sum(1)
        return total / keep.sum(1, keepdim=True).clamp(min=1) if self.mode == "mean" else total


def without_bags(model: nn.Module) -> nn.Module:
    """The model with every EmbeddingBag written out; the parameters are the same."""
    for name, child in list(model.named_children()):
        setattr(model, name, GatheredBag(child) if isinstance(child, nn.EmbeddingBag) else child)
        without_bags(child)
    return model


class Dense:
    """Every matrix of one input, by enumerated labels: J, H, E over labels of g gᵀ, R∘R, ‖R‖²."""

    def __init__(self, model: nn.Module, args, b: int, labels: Callable, pick=lambda o: o) -> None:
        jac, h = jacobian(model, args, b, pick)
        self.jacobian = torch.cat(list(jac.values()), 1)
        one = tuple(a[b : b + 1] if isinstance(a, Tensor) else a for a in args)
        shape = pick(model(*one)).shape
        units = [e.view(shape) for e in torch.eye(len(h), dtype=h.dtype)]
        self.hessian = hessians(model, one, units, pick)[0]  # [C, P, P]
        table = list(labels(h))
        self.weights = torch.stack([w for w, _ in table])
        self.scores = torch.stack([d for _, d in table])
        self.output_fisher = (self.scores * self.weights[:, None]).T @ self.scores
        self.fisher = self.jacobian.T @ self.output_fisher @ self.jacobian
        # V2_ii = E R_ii²
        bent = self.scores @ self.hessian.diagonal(dim1=1, dim2=2)
        self.v2 = self.weights @ bent.square()

    def l2(self, index: Tensor) -> float:
        """Σ_ij Var of the block: E‖R‖_F² = Σ_ab I_ab ⟨H^a, H^b⟩."""
        block = self.hessian[:, index][:, :, index].flatten(1)
        return float((self.output_fisher * (block @ block.T)).sum())


def groups(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Entries of every parameter, of every layer that owns some, and of all, as reports have them."""
    found, layers = {}, {}
    for n, span in spans(model).items():
        found["parameters", n] = torch.arange(span.start, span.stop)
        layers.setdefault(n.rpartition(".")[0] or "(model)", []).append(found["parameters", n])
    found |= {("layers", n): torch.cat(parts) for n, parts in layers.items()}
    found["total", ""] = torch.cat([part for parts in layers.values() for part in parts])
    return found


def group_of(report: Any, key: tuple[str, str]) -> Any:
    """The report's group that ``groups`` calls ``key``."""
    return report.total if key[0] == "total" else getattr(report, key[0])[key[1]]
