"""Î₂ = F − R, minus the mean Hessian: its estimate, variance over labels and matrix total.

R = Σ_a δ_a ∂²h_a has mean zero over labels and V2_ii = E R_ii². F, at fixed inputs, has no label
variance; it comes from Hutchinson's seeds (or exact labels). Source: eq. (4), (11), (15), (16).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fimprobe.estimators.estimate import Estimate
from fimprobe.estimators.groups import Groups, GroupSums
from fimprobe.estimators.i1 import (
    InputSums,
    diagonal_inputs,
    effective_inputs,
    relative_error,
    row_of,
    skewness,
)
from fimprobe.estimators.pair_variance import pair_variances
from fimprobe.statistics import CurvatureBatch, Measured, MomentsBatch


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
    common: InputSums,
    grams: Mapping[str, Tensor],
    *,
    diagonals: bool,
) -> dict[str, Estimate]:
    """Î₂ of each group. ``common``: the sums that tell F's variance over inputs and its norm best.

    The trace in the report is made of the cotangents that F comes from and, where labels are drawn
    from the model, of R: so is its standard error. Size-biased and exact labels leave R out, whose
    expectation is 0.
    """
    curvature = measured.curvature
    assert curvature is not None
    fisher, subtracted = fisher_part(measured), subtracts_residual(measured)
    weights, draws, bent = curvature.weights, curvature.draws, curvature.parameters
    size = fisher.batch_size
    members = GroupSums(groups)
    own = InputSums.of(fisher, groups)
    squares = (members.sum(bent, "square")[..., :draws] * weights).sum(-1)  # [G, B]: Σ_i V2_ii
    probes = members.sum_known(bent, "probe_squares")
    random = None if probes is None else probe_error(probes[..., :draws, :], weights)
    trace, error_square = own.trace, own.error_square
    if subtracted:
        trace = trace - (members.sum(bent, "trace")[..., :draws] * weights).sum(-1)
        if error_square is not None:
            error_square = error_square + _residual_error_square(members, curvature)
    pairs = pair_variances(
        squares if common.square is None else common.square + squares,
        common.square,
        common.trace,
        common.norm_square,
    )
    blocks = torch.stack([diagonal_of(grams[group], draws)[..., :draws] for group in groups], 1)
    whole = (blocks * weights).sum(-1)  # [J, G, B]
    columns = {
        "trace": trace.mean(-1),
        "norm": common.norm_square.clamp(min=0).sqrt(),
        "label_variance": squares.mean(-1),
        "label_variance_error": _variance_error(squares, random, curvature.exact),
        "input_variance": None
        if common.square is None or size < 2
        else common.square.mean(-1) - common.norm_square,
        "total_variance": None
        if common.square is None
        else common.square.mean(-1) + squares.mean(-1) - common.norm_square,
        "std_error": trace.std(-1) / size**0.5 if size > 1 else None,
        "rel_error": relative_error(error_square, common.norm_square),
        "effective_inputs": effective_inputs(common.trace),
        "skewness": skewness(trace),
        "total_label_variance": whole.mean((0, -1)),
        "total_label_variance_error": block_error(whole, curvature.exact),
        "probe_error": random,
    }
    values = {n: [None] * len(groups) if c is None else c.tolist() for n, c in columns.items()}
    found = {}
    for row, (group, names) in enumerate(groups.items()):
        found[group] = Estimate(
            **row_of(values, row),
            pair_variance=pairs[row] if common.square is not None else None,
            diagonal=_diagonal(measured, names) if diagonals else None,
            diagonal_label_variance=_squares(curvature, names, size) if diagonals else None,
            diagonal_input_variance=diagonal_inputs(
                measured.moments["i1"], {n: measured.moments["i1"].parameters[n] for n in names}
            )
            if diagonals
            else None,
        )
    return found


def subtracts_residual(measured: Measured) -> bool:
    """Whether the estimate is F − R, or F alone: of size-biased and exact labels E R = 0 is known."""
    curvature, labels = measured.curvature, measured.moments["i1"]
    assert curvature is not None
    return not curvature.exact and labels.inverse_weights is None


def block_error(blocks: Tensor, exact: bool) -> Tensor | None:
    """Standard error [G] of L2 from ‖R‖² of J directions, G groups and B inputs [J, G, B].

    Drawn labels: the spread over inputs, which has the noise of labels and of the flips; that of a
    direction, the same for all inputs, only where there are several.
    """
    directions, _, size = blocks.shape
    parts = []
    if directions > 1:
        parts.append(blocks.mean(-1).var(0) / directions)
    if not exact and size > 1:
        parts.append(blocks.mean(0).var(-1) / size)
    return torch.stack(parts).sum(0).sqrt() if parts else None


def _residual_error_square(members: GroupSums, curvature: CurvatureBatch) -> Tensor:
    """Σ_i Var of the mean of R_ii over inputs and draws, the noise of its probes included [G]."""
    draws, probes = curvature.draws, curvature.probes
    square = members.sum(curvature.parameters, "square")[..., :draws]
    each = members.sum_known(curvature.parameters, "probe_squares")
    if each is not None:
        square = square + (each[..., :draws, :].mean(-1) - square) / probes
    size = square.shape[-2]
    return square.mean(-1).clamp(min=0).mean(-1) / draws / size


def _variance_error(squares: Tensor, random: Tensor | None, exact: bool) -> Tensor | None:
    """Standard error of V2 [G] from draws and probes.

    The spread over inputs of ``squares`` [G, B] holds both, and how the inputs differ: with exact
    labels it bounds the probes' part from above, as ``random`` does.
    """
    size = squares.shape[-1]
    if exact and (random is None or size < 5):
        return random
    spread = squares.std(-1) / size**0.5 if size > 1 else random
    if exact and random is not None and spread is not None:
        return torch.minimum(random, spread)
    return spread


def _diagonal(measured: Measured, names: Sequence[str]) -> dict[str, Tensor]:
    curvature = measured.curvature
    assert curvature is not None
    fisher = fisher_part(measured)
    count = fisher.batch_size * (1 if curvature.exact else (fisher.draws or 1))
    found = {}
    for n in names:
        mean = fisher.parameters[n].a2.double() / count
        bent = curvature.parameters[n].diagonal
        if subtracts_residual(measured) and bent is not None:
            mean = mean - bent / fisher.batch_size
        found[n] = mean
    return found


def _squares(curvature: CurvatureBatch, names: Sequence[str], size: int) -> dict[str, Tensor]:
    squares = {n: curvature.parameters[n].diagonal_square for n in names}
    return {n: square / size for n, square in squares.items() if square is not None}
