"""The empirical Fisher (labels of the data) and how far it is from the Fisher information."""

from __future__ import annotations

import torch

from fimprobe.statistics import MomentsBatch


def compare(
    empirical: MomentsBatch, fisher: MomentsBatch, names: list[str]
) -> tuple[float | None, float | None]:
    """Cosine between the diagonals of the two matrices, and the ratio of their traces.

    eF − F = Σ_y (q_y − p_y) g_y g_yᵀ, q the data's labels: zero only where the model is calibrated
    (Kunstner, Hennig & Balles 2019). Both None where a matrix is zero.
    """
    inner = ours = theirs = trace = data = 0.0
    for name in names:
        e, f = (m.parameters[name] for m in (empirical, fisher))
        inner += float(torch.dot(e.a2.flatten().double(), f.a2.flatten().double()))
        theirs += e.a2_square
        ours += f.a2_square
        data += e.a2_sum
        trace += f.a2_sum
    if ours <= 0 or theirs <= 0 or trace <= 0:
        return None, None
    count = fisher.draws or 1
    return inner / (ours * theirs) ** 0.5, data / (trace / count)
