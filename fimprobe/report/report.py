"""The report of one measurement: estimates by parameter, by layer and for the model."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fimprobe.errors import FimprobeError
from fimprobe.estimators.estimate import (
    Estimate,
    GroupEstimates,
    OutputSummary,
    one_label_numbers,
)
from fimprobe.estimators.names import KEYS, LAYER_KEYS, RECORD_KEYS, UNBIASED_KEYS
from fimprobe.report.format import terminal_width
from fimprobe.report.table import format_report, format_table


def _no_advice(report: Report) -> list[str]:
    return []


@dataclass(frozen=True, kw_only=True)
class Report:
    """One measurement of one or more estimators, by parameter, by layer and for the model.

    ``rel_error`` and ``std_error`` are the errors of its numbers. ``error_of`` and ``pairs_for`` are
    the errors of an estimator with other numbers of inputs and labels.
    """

    step: int
    batch_size: int
    draws: int | None
    """Labels drawn for each input; None for the exact expectation."""
    seconds: float
    likelihood: str
    parameters: dict[str, GroupEstimates]
    layers: dict[str, GroupEstimates]
    total: GroupEstimates
    coverage: dict[str, str] = field(default_factory=dict)
    """How each parameter was measured."""
    kinks: list[str] = field(default_factory=list)
    """Modules or autograd nodes that are not twice differentiable, where Î₂ was measured."""
    notes: list[str] = field(default_factory=list)
    """Requested quantities that could not be measured, with the reason."""
    sizes: list[tuple[float, float]] = field(default_factory=list)
    """Histogram of the positive entries of diag F̂ (Î₁): log10 of the lower end of half a decade, and
    the number of entries in it. Empty for a sharded model."""
    seconds_by_part: dict[str, float] = field(default_factory=dict)
    """Seconds of each part: forward, i1, ih, bounds, i2, and "i2 diagonal", which i2 includes."""
    advise: Callable[[Report], list[str]] = field(default=_no_advice, repr=False, compare=False)
    """Function that makes ``advice``."""
    label_sampling: str = "model"
    """How the labels of the measurement were sampled: size_biased, model, or exact."""
    seen_mass: float | None = None
    """Σ‖δ‖² of labels drawn from the model over its expectation: far from 1 they miss F."""
    outputs: OutputSummary | None = None
    """tr I(h) of the outputs; with bounds also ‖I(h)‖_F and ‖M‖_F."""
    convergence: list[tuple[int, float]] = field(default_factory=list)
    """Numbers n of inputs, and the relative standard deviation of the trace by Î₁ over groups of n
    inputs of this report. It falls as 1/√n where inputs are independent. Empty where the error of the
    trace is unknown."""

    @property
    def advice(self) -> list[str]:
        """Sentences on the meaning of the numbers, and on what to do."""
        return self.advise(self)

    def error_of(
        self,
        estimator: str,
        *,
        inputs: int | None = None,
        labels: int | None = 1,
        layer: str | None = None,
    ) -> float | None:
        """Return the relative error of an estimator with labels drawn from the model.

        It is √((V_x + V_y/S)/N) / ‖diag F‖₂, for any labels that this report was measured with.

        Args:
            estimator: "i1", "i2" or "ih".
            inputs: N; None for the number of this report.
            labels: S for each input; None for exact labels.
            layer: The name of a layer; None for the whole model.

        Returns:
            The error; None where it is unknown.

        Raises:
            FimprobeError: If the estimator or the layer was not measured.
        """
        return self._estimate(estimator, layer).error_of(
            inputs=self.batch_size if inputs is None else inputs, labels=labels
        )

    def pairs_for(
        self, estimator: str, eps: float = 0.1, *, layer: str | None = None
    ) -> float | None:
        """Return the (input, label) pairs that an estimator needs for a relative error.

        Args:
            estimator: "i1", "i2" or "ih".
            eps: The relative error.
            layer: The name of a layer; None for the whole model.

        Returns:
            The number of pairs; None where it is unknown.

        Raises:
            FimprobeError: If the estimator or the layer was not measured.
        """
        return self._estimate(estimator, layer).pairs_for(eps)

    def _estimate(self, estimator: str, layer: str | None) -> Estimate:
        group = self.total if layer is None else self.layers.get(layer)
        if group is None:
            known = ", ".join(map(repr, self.layers))
            raise FimprobeError(f"`layer` must be one of {known}, got {layer!r}.")
        estimate = group.get(estimator) if estimator in UNBIASED_KEYS else None
        if estimate is None:
            known = ", ".join(repr(key) for key in UNBIASED_KEYS if group.get(key) is not None)
            raise FimprobeError(
                f"`estimator` must be one of {known}, got {estimator!r}. No other was measured."
            )
        return estimate

    def to_dict(self) -> dict[str, Any]:
        """Return the report as numbers, names and lists, which JSON can hold: a new record."""
        return self._describe(self.parameters, self.advice)

    def _describe(
        self, parameters: Mapping[str, GroupEstimates], advice: list[str]
    ) -> dict[str, Any]:
        """Return the record with the given parameters and advice."""
        return {
            "step": self.step,
            "batch_size": self.batch_size,
            "draws": "exact" if self.draws is None else self.draws,
            "seconds": self.seconds,
            "likelihood": self.likelihood,
            "label_sampling": self.label_sampling,
            "seen_mass": _finite(self.seen_mass),
            "outputs": None
            if self.outputs is None
            else {name: _finite(x) for name, x in vars(self.outputs).items()},
            "total": self._group_record(self.total),
            "layers": {name: self._group_record(g) for name, g in self.layers.items()},
            "parameters": {name: self._group_record(g) for name, g in parameters.items()},
            "coverage": dict(self.coverage),
            "kinks": list(self.kinks),
            "notes": list(self.notes),
            "sizes": [list(pair) for pair in self.sizes],
            "convergence": [list(pair) for pair in self.convergence if math.isfinite(pair[1])],
            "advice": advice,
        }

    def scalars(self, layers: Collection[str] | None = None) -> dict[str, float]:
        """Return the finite numbers by tag, for any logger.

        The tags are ``fim/<estimator>/<value>`` and ``fim_bounds/<estimator>/<value>`` for the model,
        ``fim_layers/<layer>/<estimator>_<value>`` for layers, ``fim_outputs/<value>`` and
        ``fim_probe/seconds``.

        Args:
            layers: The layers to include; None for all.

        >>> import fimprobe, torch
        >>> report = fimprobe.measure(torch.nn.Linear(2, 2), torch.ones(4, 2), likelihood="gaussian")
        >>> report.scalars()["fim/i1/trace"] == report.total.i1.trace
        True
        """
        values: dict[str, float | None] = {}
        for key in KEYS:
            total = self.total.get(key)
            if total is not None:
                values |= {f"fim/{key}/{name}": getattr(total, name) for name in _TOTAL}
                values |= {f"fim_bounds/{key}/{name}": getattr(total, name) for name in _BOUNDS}
                if key in UNBIASED_KEYS:
                    values[f"fim/{key}/pairs_for_10_percent"] = total.pairs_for(0.1)
                    values[f"fim/{key}/one_label_error"] = self._one_label_error(total)
        if self.outputs is not None:
            for name, value in vars(self.outputs).items():
                values[f"fim_outputs/{name}"] = value
        values["fim_probe/seconds"] = self.seconds
        for layer, group in self.layers.items():
            if layers is None or layer in layers:
                values |= self._layer_scalars(f"fim_layers/{layer}/", group)
        return {
            tag: float(value)
            for tag, value in values.items()
            if value is not None and math.isfinite(value)
        }

    def table(self, view: str = "errors", *, width: int | None = None) -> str:
        """Return a table with a row for each layer, and the meaning of its columns.

        Args:
            view: "errors" for traces, their errors and verdicts; "variances" for the errors of Î₁ and
                Î₂ with one label for each input and what they come from; "bounds" for bounds over
                what they bound; "all" for all columns.
            width: Number of characters of a line; columns that do not fit are named below the table.
                None for any.

        Raises:
            FimprobeError: If there is no such view.
        """
        return format_table(self._describe({}, []), view=view, width=width)

    def __str__(self) -> str:
        """Return the table of errors with a summary and the advice, as wide as the terminal."""
        return format_report(self._describe({}, self.advice), width=terminal_width())

    def _one_label_error(self, estimate: Estimate) -> float | None:
        """Return the relative error with one label for each of this report's inputs."""
        return estimate.error_of(inputs=self.batch_size, labels=1)

    def _group_record(self, group: GroupEstimates) -> dict[str, Any]:
        record: dict[str, Any] = {"numel": group.numel}
        for key in RECORD_KEYS:
            estimate = getattr(group, key)
            if isinstance(estimate, Estimate):
                record[key] = self._record(estimate)
        if group.geometry is not None:
            record["geometry"] = {name: _finite(x) for name, x in vars(group.geometry).items()}
        return record

    def _record(self, e: Estimate) -> dict[str, Any]:
        record = vars(e).copy()
        for name in _NOT_NUMBERS:
            del record[name]
        error, pairs, pairs_error = one_label_numbers(e, self.batch_size)
        record |= {
            "trace_range": None,
            "one_label_error": error,
            "pairs_for_10_percent": pairs,
            "pairs_error": pairs_error,
            "tightness": e.tightness,
            "sharp_tightness": e.sharp_tightness,
            "trace_tightness": e.trace_tightness,
            "diagonal_tightness": e.diagonal_tightness,
        }
        unknown = dict(e.unknown)
        if not math.isfinite(sum(filter(None, record.values()))):  # or the sum alone is not
            lost = {name: _NOT_FINITE for name, x in record.items() if _finite(x) is not x}
            record |= dict.fromkeys(lost)
            unknown = lost | unknown
        if e.trace_range is not None and all(map(math.isfinite, e.trace_range)):
            record["trace_range"] = list(e.trace_range)
        record["unknown"] = unknown
        return record

    def _layer_scalars(self, prefix: str, group: GroupEstimates) -> dict[str, float | None]:
        values: dict[str, float | None] = {}
        for key in LAYER_KEYS:
            estimate = group.get(key)
            if estimate is not None:
                for name in ("trace", "rel_error", "label_variance", "tightness", "trace_tightness"):
                    values[f"{prefix}{key}_{name}"] = getattr(estimate, name)
                values[f"{prefix}{key}_pairs_for_10_percent"] = estimate.pairs_for(0.1)
                values[f"{prefix}{key}_one_label_error"] = self._one_label_error(estimate)
        if group.activation is not None:
            values[f"{prefix}input_i1_trace"] = group.activation.trace
            values[f"{prefix}input_i1_label_variance"] = group.activation.label_variance
        if group.geometry is not None:
            for name in ("jacobian_norm", "spectral_bound", "weight_spectral_norm"):
                values[f"{prefix}{name}"] = getattr(group.geometry, name)
        return values


_last: tuple[weakref.ref[Report], dict[str, Any]] | None = None


def shared_record(report: Report) -> dict[str, Any]:
    """Return the record of a report for readers that never change it: made once for all sinks.

    Only the last one is kept: reports stay in memory by the thousand, and a record is as large.
    """
    global _last
    last = _last  # another thread may set it
    if last is None or last[0]() is not report:
        last = _last = (weakref.ref(report), report.to_dict())
    return last[1]


def _finite(value: Any) -> Any:
    """Return a value, None in place of a number that JSON does not have: NaN or an infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


_NOT_FINITE = "not a finite number: a ratio or a power leaves float64's range"

_NOT_NUMBERS = (
    "diagonal",
    "diagonal_label_variance",
    "diagonal_input_variance",
    "pair_variance",
    "unknown",
)
"""The other fields of an estimate."""

_TOTAL = (
    "trace",
    "std_error",
    "rel_error",
    "label_variance",
    "input_variance",
    "cosine",
    "trace_ratio",
    "noise_scale",
)
"""The values of the whole model in charts."""

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
"""The bounds of the whole model in charts, and the norms next to them."""
