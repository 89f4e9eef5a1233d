"""The empirical Fisher (labels of the data) compared with the Fisher information."""

from __future__ import annotations

import math

import torch

from fimprobe.statistics import MomentsBatch


def compare_with_fisher(
    empirical: MomentsBatch, fisher: MomentsBatch, names: list[str]
) -> tuple[float | None, float | None]:
    """Return the cosine between the diagonals of the two matrices, and the ratio of their traces.

    Their difference is eF − F = Σ_y (q_y − p_y) g_y g_yᵀ, q the data's labels: it is zero only where
    the model is calibrated (Kunstner, Hennig & Balles, 2019).

    Args:
        empirical: Moments of the scores of the data's labels.
        fisher: Moments whose A2 estimates F.
        names: The parameters to compare.

    Returns:
        (cosine, trace of the empirical Fisher / trace of F); each None where a matrix is
        zero or the number leaves float64's range.
    """
    inner = fisher_square = empirical_square = fisher_trace = empirical_trace = 0.0
    for name in names:
        e, f = (moments.parameters[name] for moments in (empirical, fisher))
        inner += float(torch.dot(e.a2.flatten().double(), f.a2.flatten().double()))
        empirical_square += e.a2_square
        fisher_square += f.a2_square
        empirical_trace += e.a2_sum
        fisher_trace += f.a2_sum
    if fisher_square <= 0 or empirical_square <= 0 or fisher_trace <= 0:
        return None, None
    draws = fisher.draws or 1
    # the roots first: the product of the squares may leave the range where they do not
    cosine = inner / fisher_square**0.5 / empirical_square**0.5
    ratio = empirical_trace / (fisher_trace / draws)
    return cosine if math.isfinite(cosine) else None, ratio if math.isfinite(ratio) else None
