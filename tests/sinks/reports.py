"""Reports with realistic numbers, without a model: what sinks and pictures are tried on."""

import numpy as np

from fimprobe.report import Report
from fimprobe.types import Estimate, GroupEstimates

_BLOCK = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


def make_names(layers):
    """Names as in a small MLP, a CNN, and a transformer."""
    if layers < 5:
        return [str(i) for i in range(layers)]
    if layers < 50:
        return [f"features.{i}.conv" for i in range(layers)]
    return [f"model.layers.{i // 5}.{_BLOCK[i % 5]}" for i in range(layers)]


def make_report(layers, step, *, i2=True, known=True):
    """Errors that grow with the step; every fifth layer's Î₂ without variance from labels."""
    rng = np.random.default_rng([layers, step])
    groups = {}
    for i, name in enumerate(make_names(layers)):
        size = int(10 ** np.random.default_rng(i).uniform(2, 5))
        second = _estimate(rng, size, step, known, silent=i % 5 == 4) if i2 else None
        groups[name] = GroupEstimates(size, _estimate(rng, size, step, known), second)
    total = [_estimate(rng, 10_000, step, known) for _ in range(2)]
    return Report(
        step, 32, 2, 0.3, "categorical",
        {f"{name}.weight": group for name, group in groups.items()}, groups,
        GroupEstimates(10_000, total[0], total[1] if i2 else None),
        coverage={f"{name}.weight": "contracted" for name in groups},
    )  # fmt: skip


def _estimate(rng, size, step, known, silent=False):
    trace = size * 10 ** rng.normal(-4, 0.7)
    norm, need = trace / size**0.5, 10 ** rng.normal(2 + min(step, 9000) / 4500, 0.5)
    both = need * 0.01 * norm**2
    labels = 0.0 if silent else 0.9 * both
    if not known:
        return Estimate(trace, norm, None, None, None, None, None, None)
    return Estimate(
        trace, norm, labels, both - labels, both, 0.2 * trace, 0.1 * (need / 64) ** 0.5, both * size**0.5,
        covariance_norm=both, bound=100 * both, sharp_bound=10 * both, trace_bound=both * size,
        diagonal_bound=10 * both,
    )  # fmt: skip
