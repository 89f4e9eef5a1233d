"""A report: estimates grouped by parameter, layer and model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from fimprobe.errors import FimprobeError
from fimprobe.estimators.estimate import Estimate, GroupEstimates, OutputSummary
from fimprobe.report.table import format_table


def _no_advice(report: Report) -> list[str]:
    return []


@dataclass(frozen=True)
class Report:
    """One measurement of one or more estimators, by parameter, by layer and for the model.

    ``rel_error`` and ``std_error`` say how far off its numbers are; ``error_of`` and ``pairs_for``
    how far off an estimator is with other numbers of inputs and labels.
    """

    step: int
    batch_size: int
    draws: int | None
    """Labels drawn for each input; None: exact expectation."""
    seconds: float
    likelihood: str
    parameters: dict[str, GroupEstimates]
    layers: dict[str, GroupEstimates]
    total: GroupEstimates
    coverage: dict[str, str] = field(default_factory=dict)
    kinks: list[str] = field(default_factory=list)
    """Modules (or autograd nodes) that are not twice differentiable, where Î₂ was measured."""
    notes: list[str] = field(default_factory=list)
    """What was asked for and could not be measured, with the reason."""
    sizes: list[tuple[float, float]] = field(default_factory=list)
    """How large the entries of diag F̂ (Î₁) are: log10 of the lower end of half a decade, entries in
    it; those that are not above 0 are left out. Empty of a sharded model."""
    seconds_by_part: dict[str, float] = field(default_factory=dict)
    """Where the time went: forward, i1, ih, bounds, i2, and of that "i2 diagonal"."""
    advise: Callable[[Report], list[str]] = field(default=_no_advice, repr=False, compare=False)
    """Makes ``advice`` when it is asked for."""
    label_sampling: str = "model"
    """How the labels of the measurement came about: size_biased, model, or exact."""
    seen_mass: float | None = None
    """Of labels drawn from the model: Σ‖δ‖² over its expectation; far from 1 nothing is known."""
    outputs: OutputSummary | None = None
    """tr I(h) of the outputs; with bounds also ‖I(h)‖_F and ‖M‖_F."""
    convergence: list[tuple[int, float]] = field(default_factory=list)
    """Numbers n of inputs, and the relative spread of Î₁'s trace over groups of n inputs of this
    report: it falls as 1/√n where inputs are independent. Empty where an error is not known."""

    @property
    def advice(self) -> list[str]:
        """What the numbers say and what to do about it, in sentences."""
        return self.advise(self)

    def error_of(
        self,
        estimator: str,
        *,
        inputs: int | None = None,
        labels: int | None = 1,
        layer: str | None = None,
    ) -> float | None:
        """Relative error of an estimator with labels drawn from the model.

        √((V_x + V_y/S)/N) / ‖diag F‖₂, whatever labels this report was measured with.

        Args:
            estimator: "i1", "i2" or "ih".
            inputs: N; None: as many as in this report.
            labels: S for each input; None: exact.
            layer: a layer's name; None: the whole model.

        Raises:
            FimprobeError: an estimator or layer that was not measured.
        """
        return self._estimate(estimator, layer).error_of(
            inputs=self.batch_size if inputs is None else inputs, labels=labels
        )

    def pairs_for(
        self, estimator: str, eps: float = 0.1, *, layer: str | None = None
    ) -> float | None:
        """Pairs (input, label) that an estimator takes for a relative error ``eps``."""
        return self._estimate(estimator, layer).pairs_for(eps)

    def _estimate(self, estimator: str, layer: str | None) -> Estimate:
        group = self.total if layer is None else self.layers.get(layer)
        if group is None:
            known = ", ".join(map(repr, self.layers))
            raise FimprobeError(f"layer={layer!r} was not measured; use one of {known}")
        found = getattr(group, estimator, None) if estimator in ("i1", "i2", "ih") else None
        if found is None:
            known = ", ".join(k for k in ("i1", "i2", "ih") if getattr(group, k) is not None)
            raise FimprobeError(f"estimator={estimator!r} was not measured; use one of {known}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Numbers and names only: what JSON can hold."""

        def group(g: GroupEstimates) -> dict[str, Any]:
            found: dict[str, Any] = {"numel": g.numel, "i1": self._record(g.i1)}
            for kind in ("i2", "ih", "empirical", "activation"):
                estimate = getattr(g, kind)
                if estimate is not None:
                    found[kind] = self._record(estimate)
            if g.geometry is not None:
                found["geometry"] = {
                    name: None if isinstance(x, float) and not math.isfinite(x) else x
                    for name, x in dataclasses.asdict(g.geometry).items()
                }
            return found

        return {
            "step": self.step,
            "batch_size": self.batch_size,
            "draws": "exact" if self.draws is None else self.draws,
            "seconds": self.seconds,
            "likelihood": self.likelihood,
            "label_sampling": self.label_sampling,
            "seen_mass": self.seen_mass,
            "outputs": None if self.outputs is None else dataclasses.asdict(self.outputs),
            "total": group(self.total),
            "layers": {name: group(g) for name, g in self.layers.items()},
            "parameters": {name: group(g) for name, g in self.parameters.items()},
            "coverage": self.coverage,
            "kinks": self.kinks,
            "notes": self.notes,
            "sizes": [list(pair) for pair in self.sizes],
            "convergence": [list(pair) for pair in self.convergence],
            "advice": self.advice,
        }

    def scalars(self, layers: Collection[str] | None = None) -> dict[str, float]:
        """What TensorBoard is given, by its tags: finite numbers only, for loggers of any kind.

        ``fim/<estimator>/<value>`` and ``fim_bounds/<estimator>/<value>`` for the model,
        ``fim_layers/<layer>/<estimator>_<value>`` for each of ``layers`` (None: all; TensorBoard
        charts fewer values of them), ``fim_outputs/<value>``, ``fim_probe/seconds``.

        >>> import fimprobe, torch
        >>> report = fimprobe.measure(torch.nn.Linear(2, 2), torch.ones(4, 2), likelihood="gaussian")
        >>> report.scalars()["fim/i1/trace"] == report.total.i1.trace
        True
        """
        values: dict[str, float | None] = {}
        for kind in ("i1", "i2", "ih", "empirical"):
            total = getattr(self.total, kind)
            if total is not None:
                values |= {f"fim/{kind}/{name}": getattr(total, name) for name in _TOTAL}
                values |= {f"fim_bounds/{kind}/{name}": getattr(total, name) for name in _BOUNDS}
                if kind != "empirical":
                    values[f"fim/{kind}/pairs_for_10_percent"] = total.pairs_for(0.1)
                    values[f"fim/{kind}/one_label_error"] = self._one_label_error(total)
        if self.outputs is not None:
            for name, value in dataclasses.asdict(self.outputs).items():
                values[f"fim_outputs/{name}"] = value
        values["fim_probe/seconds"] = self.seconds
        for layer, group in self.layers.items():
            if layers is None or layer in layers:
                values |= self._of_layer(f"fim_layers/{layer}/", group)
        return {
            tag: float(value)
            for tag, value in values.items()
            if value is not None and math.isfinite(value)
        }

    def __str__(self) -> str:
        """A table of the layers."""
        return format_table(self.to_dict())

    def _one_label_error(self, estimate: Estimate) -> float | None:
        """With one label for each of this report's inputs."""
        return estimate.error_of(inputs=self.batch_size, labels=1)

    def _record(self, e: Estimate) -> dict[str, Any]:
        values = {name: getattr(e, name) for name in _VALUES}
        if e.trace_range is not None:
            finite = all(map(math.isfinite, e.trace_range))
            values["trace_range"] = list(e.trace_range) if finite else None
        derived = {
            "one_label_error": self._one_label_error(e),
            "pairs_for_10_percent": e.pairs_for(0.1),
            "pairs_error": e.pairs_error,
            "tightness": e.tightness,
            "sharp_tightness": e.sharp_tightness,
            "trace_tightness": e.trace_tightness,
            "diagonal_tightness": e.diagonal_tightness,
            "unknown": dict(e.unknown),
        }
        return values | derived

    def _of_layer(self, prefix: str, group: GroupEstimates) -> dict[str, float | None]:
        values: dict[str, float | None] = {}
        for kind in ("i1", "i2"):
            estimate = getattr(group, kind)
            if estimate is not None:
                for name in ("trace", "rel_error", "label_variance", "tightness", "trace_tightness"):
                    values[f"{prefix}{kind}_{name}"] = getattr(estimate, name)
                values[f"{prefix}{kind}_pairs_for_10_percent"] = estimate.pairs_for(0.1)
                values[f"{prefix}{kind}_one_label_error"] = self._one_label_error(estimate)
        if group.activation is not None:
            values[f"{prefix}input_i1_trace"] = group.activation.trace
            values[f"{prefix}input_i1_label_variance"] = group.activation.label_variance
        if group.geometry is not None:
            for name in ("jacobian_norm", "spectral_bound", "weight_spectral_norm"):
                values[f"{prefix}{name}"] = getattr(group.geometry, name)
        return values


_NO_NUMBERS = (
    "diagonal",
    "diagonal_label_variance",
    "diagonal_input_variance",
    "pair_variance",
    "unknown",
)


_VALUES = tuple(f.name for f in dataclasses.fields(Estimate) if f.name not in _NO_NUMBERS)


_TOTAL = (
    "trace",
    "std_error",
    "rel_error",
    "label_variance",
    "input_variance",
    "cosine",
    "trace_ratio",
)


_BOUNDS = (
    "total_label_variance",
    "bound",
    "sharp_bound",
    "trace_bound",
    "diagonal_bound",
    "covariance_norm",
    "covariance_spectral_norm",
    "tightness",
    "probe_error",
)
