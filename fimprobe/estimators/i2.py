"""Î₂ = F − R, minus the mean Hessian: its estimate, variance over labels and matrix total.

R = Σ_a δ_a ∂²h_a has mean zero over labels and V2_ii = E R_ii². F, at fixed inputs, has no label
variance; it comes from Hutchinson's seeds (or exact labels). Source: eq. (4), (11), (15), (16).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fimprobe.estimators.groups import Groups, Members
from fimprobe.types import CurvatureBatch, Estimate, Measured, MomentsBatch


def label_variance(squares: Tensor, weights: Tensor) -> Tensor:
    """Σ_i V2_ii, mean over inputs: Σ_y w_by Σ_i R_byi² for ``squares`` and ``weights`` [B, n].

    >>> label_variance(torch.tensor([[4.0, 2.0]]), torch.tensor([[0.5, 0.5]])).item()
    3.0
    """
    return (squares * weights).sum(-1).mean(-1)


def probe_error(probe_squares: Tensor, weights: Tensor) -> Tensor:
    """Standard error of ``label_variance`` from K probes' own squares [..., B, n, K].

    r_k = R_ii + noise; the spread over k of Σ r_k² is that of the noise. Exact for K = 2 and
    noise of Gaussian third moments, an upper bound for more probes.
    """
    each = (probe_squares * weights.unsqueeze(-1)).sum(-2)  # [..., B, K]
    return (each.var(-1) / each.shape[-1]).sum(-1).sqrt() / each.shape[-2]


def block_gram(curvature: CurvatureBatch, names: Sequence[str]) -> Tensor:
    """⟨R_y, R_z⟩ of the block of some parameters: [J, B, n, n] (or its diagonal [J, B, n]).

    Unbiased: with directions u and flips σ, E σ_q ⟨(Ru)_p, (Rσu)_p⟩ = ‖R_pq‖_F².
    """
    parts = [curvature.parameters[n] for n in names]
    flips = torch.stack([p.signs for p in parts]).sum(0)  # [J, B]
    total = torch.zeros_like(parts[0].block)
    for name, part in zip(names, parts, strict=True):
        meets = curvature.partners.get(name, set()) & set(names)
        total += part.joint if meets and part.joint is not None else part.block
    # each parameter's inner product is multiplied by the sum of the group's flips
    return total * flips.view(*flips.shape, *[1] * (total.dim() - 2))


def whole_gram(curvature: CurvatureBatch) -> Tensor:
    """⟨R_y, R_z⟩ of all parameters together: [J, B, n, n] (or its diagonal [J, B, n])."""
    return torch.stack([p.whole for p in curvature.parameters.values()]).sum(0)


def diagonal_of(gram: Tensor, seeds: int) -> Tensor:
    """The seeds' own ⟨R_y, R_y⟩ [J, B, n], whether or not the rest of the Gram matrix is there."""
    return gram.diagonal(dim1=-2, dim2=-1) if gram.dim() == 4 else gram


def fisher_part(measured: Measured) -> MomentsBatch:
    """Where F comes from: exact labels, BackPACK's exact diagonals, or Hutchinson's seeds."""
    assert measured.curvature is not None
    if measured.curvature.exact:
        return measured.moments["i1"]
    return measured.moments["ggn"] if "ggn" in measured.moments else measured.moments["ih"]


def estimate_groups(
    measured: Measured,
    groups: Groups,
    scores: Mapping[str, Estimate],
    grams: Mapping[str, Tensor],
    *,
    diagonals: bool,
) -> dict[str, Estimate]:
    """Î₂ of each group. ``scores``: Î₁ of the same groups, whose input variance is that of any F̂."""
    curvature = measured.curvature
    assert curvature is not None
    exact = curvature.exact
    fisher = fisher_part(measured)
    weights, draws, bent = curvature.weights, curvature.draws, curvature.parameters
    size = fisher.batch_size
    count = size * (1 if exact else (fisher.draws or 1))
    members = Members(groups)
    variances = label_variance(members.sum(bent, "square")[..., :draws], weights)
    squares = members.sum_known(bent, "probe_squares")
    errors = None if squares is None else probe_error(squares[..., :draws, :], weights)
    observed = members.sum(fisher.parameters, "squared_norms")
    if fisher.second is not None:
        observed = (observed * fisher.second.double().cpu()).sum(-1)
    else:
        observed = observed.mean(-1)
    if not exact:  # over exact labels R's mean is zero
        observed = observed - (members.sum(bent, "trace")[..., :draws] * weights).sum(-1)
    spreads = observed.std(-1) / size**0.5 if size > 1 else None
    norms = (members.sum_numbers(fisher.parameters, "a2_square")[0] / count**2).sqrt()
    own = torch.stack([diagonal_of(grams[group], draws).mean(0)[:, :draws] for group in groups])
    matrices = (own * weights).sum(-1).mean(-1)

    columns = (observed.mean(-1), norms, variances, spreads, errors, matrices)
    told = [[None] * len(groups) if c is None else c.tolist() for c in columns]
    found = {}
    for (group, names), values in zip(groups.items(), zip(*told, strict=True), strict=True):
        trace, norm, variance, spread, error, matrix = values
        # a square that only noise of the probes made negative says nothing about Î₂'s error
        known = variance > 0 or not error
        inputs = scores[group].input_variance
        total = inputs + variance if inputs is not None and known else None
        per_entry = None
        if inputs is not None and known:
            per_entry = (inputs + (0 if exact else variance / draws)) / size
        found[group] = Estimate(
            trace=trace,
            norm=norm,
            label_variance=variance,
            input_variance=inputs,
            total_variance=total if size > 1 else (variance if known else None),
            std_error=spread,
            rel_error=None if per_entry is None or norm == 0 else max(per_entry, 0.0) ** 0.5 / norm,
            total_label_variance=matrix,
            probe_error=error,
            diagonal=_diagonal(measured, names, count) if diagonals else None,
            diagonal_label_variance=_squares(curvature, names, size) if diagonals else None,
            diagonal_input_variance=scores[group].diagonal_input_variance,
        )
    return found


def _diagonal(measured: Measured, names: Sequence[str], count: int) -> dict[str, Tensor]:
    curvature = measured.curvature
    assert curvature is not None
    fisher = fisher_part(measured)
    found = {}
    for n in names:
        mean = fisher.parameters[n].a2.double() / count
        bent = curvature.parameters[n].diagonal
        if not curvature.exact and bent is not None:
            mean = mean - bent / fisher.batch_size
        found[n] = mean
    return found


def _squares(curvature: CurvatureBatch, names: Sequence[str], size: int) -> dict[str, Tensor]:
    squares = {n: curvature.parameters[n].diagonal_square for n in names}
    return {n: square / size for n, square in squares.items() if square is not None}
