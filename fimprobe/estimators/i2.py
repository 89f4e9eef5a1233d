"""Î₂ = F − R, minus the mean Hessian: its estimate, variance over labels and matrix total.

R = Σ_a δ_a ∂²h_a has mean zero over labels, and V2_ii = E R_ii². At fixed inputs F has no label
variance; it is estimated with Hutchinson's vectors or exact labels. See Soen & Sun (2021), eq. 4, 11,
15 and 16. Symbols: B inputs, n cotangents, K probes, J directions, G groups of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fimprobe.estimators.estimate import Estimate, make_estimates
from fimprobe.estimators.groups import Groups, GroupSums
from fimprobe.estimators.i1 import (
    InputSums,
    diagonal_input_variance,
    effective_inputs,
    relative_error,
    skewness,
)
from fimprobe.estimators.pair_variance import pair_variances
from fimprobe.statistics import CurvatureBatch, Measured, MomentsBatch


def label_variance(squares: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_i V2_ii = Σ_y w_by Σ_i R_byi², mean over the inputs.

    Args:
        squares: Σ_i R_byi² [..., B, n].
        weights: w [B, n].

    >>> label_variance(torch.tensor([[4.0, 2.0]]), torch.tensor([[0.5, 0.5]])).item()
    3.0
    """
    return (squares * weights).sum(-1).mean(-1)


def probe_error(probe_squares: Tensor, weights: Tensor) -> Tensor:
    """Return the standard error of ``label_variance`` from the squares of the single probes.

    r_k = R_ii + noise, so that the variance over k of Σ r_k² is that of the noise. It is exact for
    K = 2 and noise with the third moments of a Gaussian, an upper bound for more probes.

    Args:
        probe_squares: Σ_i r_byik² [..., B, n, K].
        weights: w [B, n].

    Returns:
        The standard error of each leading index [...].
    """
    squares = (probe_squares * weights.unsqueeze(-1)).sum(-2)  # [..., B, K]
    return (squares.var(-1) / squares.shape[-1]).sum(-1).sqrt() / squares.shape[-2]


def block_grams(curvature: CurvatureBatch, groups: Groups) -> Tensor:
    """Return ⟨R_y, R_z⟩ of the blocks of G groups of parameters.

    It is unbiased: with directions u and sign flips σ, E σ_q ⟨(Ru)_p, (Rσu)_p⟩ = ‖R_pq‖_F².

    Args:
        curvature: The second derivatives of all parameters.
        groups: The parameters of each block.

    Returns:
        The Gram matrices [J, G, B, n, n], or their diagonal [J, G, B, n].
    """
    group_sums = GroupSums.of(groups)
    products: list[Tensor] = []
    index: dict[tuple[str, bool], int] = {}
    columns = []
    for names in groups.values():
        for name in names:
            record = curvature.parameters[name]
            joint = record.joint
            if curvature.partners.get(name, set()).isdisjoint(names):
                joint = None
            key = (name, joint is not None)
            if key not in index:
                index[key] = len(products)
                products.append(record.block if joint is None else joint)
            columns.append(index[key])
    total = group_sums.total(torch.stack(products), torch.tensor(columns))
    flips = group_sums.sum(curvature.parameters, "signs")
    # each parameter's inner product is multiplied by the sum of the group's flips
    grams = total * flips.view(*flips.shape, *[1] * (total.dim() - 3))
    return grams.transpose(0, 1).contiguous()


def whole_gram(curvature: CurvatureBatch) -> Tensor:
    """Return ⟨R_y, R_z⟩ of all parameters together [J, B, n, n], or its diagonal [J, B, n]."""
    return torch.stack([record.whole for record in curvature.parameters.values()]).sum(0)


def diagonal_of(gram: Tensor) -> Tensor:
    """Return ⟨R_y, R_y⟩ [J, G, B, n] of Gram matrices [J, G, B, n, n] or of their diagonals."""
    return gram.diagonal(dim1=-2, dim2=-1) if gram.dim() == 5 else gram


def fisher_part(measured: Measured) -> MomentsBatch:
    """Return the moments that F comes from.

    Exact labels, exact factors of I(h), Hutchinson's vectors, or size-biased labels.
    """
    moments = measured.moments
    if moments["i1"].draws is None:
        return moments["i1"]
    return moments["ggn"] if "ggn" in moments else moments.get("ih", moments["i1"])


def estimate_groups(
    measured: Measured,
    groups: Groups,
    common: InputSums,
    grams: Tensor,
    *,
    diagonals: bool,
) -> dict[str, Estimate]:
    """Estimate Î₂ for each group of parameters.

    The trace combines the moments that F comes from with R where labels are drawn from the model;
    its standard error covers both. Size-biased and exact labels leave R out, whose expectation is 0.

    Args:
        measured: The statistics of the batch.
        groups: The parameters of each group.
        common: The sums with the most reliable norm of F and variance over inputs.
        grams: The Gram matrices of R (``block_grams``, ``whole_gram``).
        diagonals: Whether to keep the diagonals and their variances.

    Returns:
        The estimate of each group, by its name.
    """
    curvature = measured.curvature
    assert curvature is not None
    fisher, weights, draws = fisher_part(measured), curvature.weights, curvature.draws
    size = fisher.batch_size
    group_sums = GroupSums.of(groups)
    fisher_sums = InputSums.of(fisher, groups)
    square = group_sums.sum(curvature.parameters, "square")[..., :draws]
    squares = (square * weights).sum(-1)  # [G, B]: Σ_i V2_ii
    probe_squares = group_sums.sum_known(curvature.parameters, "probe_squares")
    noise = None if probe_squares is None else probe_error(probe_squares[..., :draws, :], weights)
    trace, error_square = fisher_sums.trace, fisher_sums.error_square
    if subtracts_residual(measured):
        residual = group_sums.sum(curvature.parameters, "trace")[..., :draws]
        trace = trace - (residual * weights).sum(-1)
        if error_square is not None:
            error_square = error_square + _residual_error_square(group_sums, curvature)
    pairs = pair_variances(
        squares if common.square is None else common.square + squares,
        common.square,
        common.trace,
        common.norm_square,
    )
    blocks = diagonal_of(grams)[..., :draws].contiguous()
    total = (blocks * weights).sum(-1)  # [J, G, B]
    columns = {
        "trace": trace.mean(-1),
        "norm": common.norm_square.clamp(min=0).sqrt(),
        "label_variance": squares.mean(-1),
        "label_variance_error": _label_variance_error(squares, noise, curvature.exact),
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
        "total_label_variance": total.mean((0, -1)),
        "total_label_variance_error": total_label_variance_error(total, curvature.exact),
        "probe_error": noise,
        "pair_variance": None if common.square is None else pairs,
    }
    estimates = make_estimates(groups, columns)
    if not diagonals:
        return estimates
    return {key: estimates[key].changed(**_diagonals(measured, groups[key])) for key in groups}


def subtracts_residual(measured: Measured) -> bool:
    """Return whether Î₂ is F − R, not F alone: with drawn labels of equal weight and probes only.

    Size-biased and exact labels, and spot checks, use E R = 0 instead.
    """
    curvature, labels = measured.curvature, measured.moments["i1"]
    if curvature is None or measured.spot_checks is not None:
        return False
    return not curvature.exact and labels.inverse_weights is None


def total_label_variance_error(blocks: Tensor, exact: bool) -> Tensor | None:
    """Return the standard error [G] of L2 from ‖R‖² of J directions, G groups, B inputs [J, G, B].

    With drawn labels the variance over inputs includes the noise of labels and of sign flips. The
    noise of a direction, which all inputs share, is included only where there are several directions.
    """
    directions, _, size = blocks.shape
    variances = []
    if directions > 1:
        variances.append(blocks.mean(-1).var(0) / directions)
    if not exact and size > 1:
        variances.append(blocks.mean(0).var(-1) / size)
    return torch.stack(variances).sum(0).sqrt() if variances else None


def _residual_error_square(group_sums: GroupSums, curvature: CurvatureBatch) -> Tensor:
    """Return Σ_i Var of the mean of R_ii over inputs and draws, with the noise of its probes [G]."""
    draws, probes = curvature.draws, curvature.probes
    square = group_sums.sum(curvature.parameters, "square")[..., :draws]
    probe_squares = group_sums.sum_known(curvature.parameters, "probe_squares")
    if probe_squares is not None:
        square = square + (probe_squares[..., :draws, :].mean(-1) - square) / probes
    size = square.shape[-2]
    return square.mean(-1).clamp(min=0).mean(-1) / draws / size


def _label_variance_error(squares: Tensor, noise: Tensor | None, exact: bool) -> Tensor | None:
    """Return the standard error of V2 [G] from draws and probes.

    The variance over inputs of ``squares`` [G, B] includes the noise of both, and the differences
    between inputs. With exact labels it therefore bounds the noise of the probes from above, and so
    does ``noise`` [G]: the smaller one is used.
    """
    size = squares.shape[-1]
    if exact and (noise is None or size < 5):
        return noise
    standard_error = squares.std(-1) / size**0.5 if size > 1 else noise
    if exact and noise is not None and standard_error is not None:
        return torch.minimum(noise, standard_error)
    return standard_error


def _diagonals(measured: Measured, names: Sequence[str]) -> dict[str, Any]:
    """Return the diagonals of some parameters and their variances, by the fields of ``Estimate``."""
    curvature, scores = measured.curvature, measured.moments["i1"]
    assert curvature is not None
    fisher = fisher_part(measured)
    count = fisher.batch_size * (1 if curvature.exact else (fisher.draws or 1))
    means, squares = {}, {}
    for name in names:
        record = curvature.parameters[name]
        means[name] = fisher.parameters[name].a2.double() / count
        if subtracts_residual(measured) and record.diagonal is not None:
            means[name] = means[name] - record.diagonal / fisher.batch_size
        if record.diagonal_square is not None:
            squares[name] = record.diagonal_square / fisher.batch_size
    return {
        "diagonal": means,
        "diagonal_label_variance": squares,
        "diagonal_input_variance": diagonal_input_variance(
            scores, {name: scores.parameters[name] for name in names}
        ),
    }
