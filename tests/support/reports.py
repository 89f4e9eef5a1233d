"""Reports with realistic numbers, without a model: what sinks and pictures are tried on."""

import numpy as np

from fimprobe.estimators.estimate import Estimate, GroupEstimates, OutputSummary
from fimprobe.estimators.pair_variance import PairVariance
from fimprobe.report.report import Report

_BLOCK = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")

BATCH = 32


def make_names(layers):
    """Names as in a small MLP, a CNN, and a transformer."""
    if layers < 5:
        return [str(i) for i in range(layers)]
    if layers < 50:
        return [f"features.{i}.conv" for i in range(layers)]
    return [f"model.layers.{i // 5}.{_BLOCK[i % 5]}" for i in range(layers)]


def build_report(layers, step, *, i2=True, known=True):
    """Errors that grow with the step; every fifth layer's Î₂ without variance from labels."""
    rng = np.random.default_rng([layers, step])
    groups = {}
    for i, name in enumerate(make_names(layers)):
        size = int(10 ** np.random.default_rng(i).uniform(2, 5))
        second = _estimate(rng, size, step, known, silent=i % 5 == 4) if i2 else None
        groups[name] = GroupEstimates(numel=size, i1=_estimate(rng, size, step, known), i2=second)
    total = [_estimate(rng, 10_000, step, known) for _ in range(2)]
    trace = 0.9 * 10 ** (-min(step, 9000) / 3000)
    spread = [(n, 0.2 * (BATCH / n) ** 0.5 * 10 ** rng.normal(0, 0.05)) for n in (1, 2, 4, 8)]
    return Report(
        step=step, batch_size=BATCH, draws=2, seconds=0.3, likelihood="categorical",
        parameters={f"{name}.weight": group for name, group in groups.items()}, layers=groups,
        total=GroupEstimates(numel=10_000, i1=total[0], i2=total[1] if i2 else None),
        coverage={f"{name}.weight": "contracted" for name in groups}, label_sampling="size_biased",
        outputs=OutputSummary(fisher_trace=trace, fisher_norm=0.5 * trace, moment_norm=0.4 * trace),
        convergence=spread if known else [],
    )  # fmt: skip


FEW = "too few inputs have a gradient that counts (2 of 32); take more inputs"


def _estimate(rng, size, step, known, silent=False):
    trace = size * 10 ** rng.normal(-4, 0.7)
    norm, need = trace / size**0.5, 10 ** rng.normal(2 + min(step, 9000) / 4500, 0.5)
    both = need * 0.01 * norm**2
    labels = 0.0 if silent else 0.9 * both
    if not known:
        return Estimate(trace=trace, norm=norm, unknown=dict.fromkeys(_ERRORS, FEW))
    noise = (0.1 * both) ** 2  # of the pairs: 10 %
    sure = (0.0, 0.0, 0.0)
    return Estimate(
        trace=trace, norm=norm, label_variance=labels, input_variance=both - labels,
        total_variance=both, std_error=0.2 * trace, rel_error=0.05 * (need / BATCH) ** 0.5,
        total_label_variance=both * size**0.5, covariance_norm=both, bound=100 * both,
        sharp_bound=10 * both, trace_bound=both * size, diagonal_bound=10 * both,
        pair_variance=PairVariance(
            fourth=norm**2 + both, square=norm**2 + both - labels, norm_square=norm**2,
            covariance=((noise, 0.0, 0.0), sure, sure),
        ),
    )  # fmt: skip


_ERRORS = ("std_error", "rel_error", "pairs")
