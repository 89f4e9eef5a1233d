"""The result of an estimate: the diagonal of F, its errors, and what was measured."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fimprobe.estimators.names import ESTIMATOR_DESCRIPTIONS
from fimprobe.fisher.decisions import (
    EwcPenalty,
    LaplaceErrors,
    Mask,
    Ratio,
    ewc_penalty,
    set_laplace,
    top_mask,
)
from fimprobe.fisher.file import write_file
from fimprobe.fisher.merging import Merged, merge
from fimprobe.fisher.records import FisherRecord, GroupFisher
from fimprobe.report.format import Row, align, number, percent, quantity, with_error
from fimprobe.report.layer_names import name_layers
from fimprobe.report.record import SIZE_BIASED

SHOWN_LAYERS = 12
"""Number of layers in a table; those with the largest traces."""


@dataclass(kw_only=True)
class Fisher(FisherRecord):
    """The diagonal of the Fisher information, mean over a data set.

    Attributes:
        diagonal: F_ii by parameter, float64, in its shape.
        std_error: Standard error of each entry, of the mean over this data set.
        values: The parameters at which F was measured.
        total: Numbers of the whole model.
        layers: The same for every layer.
        parameters: The same for every parameter.
        metadata: What was measured, as plain values: see docs/reference/estimate.md.
    """

    @property
    def trace(self) -> float:
        """Σ_i F_ii."""
        return self.total.trace

    @property
    def trace_error(self) -> float | None:
        """Standard error of ``trace``."""
        return self.total.std_error

    @property
    def rel_error(self) -> float | None:
        """√(Σ_i Var F̂_ii) / ‖diag F‖₂ for the mean over this data set."""
        return self.total.rel_error

    @property
    def stopped(self) -> str:
        """Why the estimate ended, in words."""
        return str(self.metadata["stopped"])

    @property
    def reached(self) -> bool:
        """Whether the requested error was reached."""
        return bool(self.metadata["reached"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; :func:`fimprobe.load_fisher` reads it.

        Args:
            path: The file. Its tensors are ``<name>`` (the diagonal), ``std_error/<name>`` and
                ``parameter/<name>``; the metadata are JSON under the key ``fimprobe``.

        Raises:
            FimprobeError: If the package safetensors is not installed.
        """
        groups = {
            "total": vars(self.total),
            "layers": {n: vars(g) for n, g in self.layers.items()},
            "parameters": {n: vars(g) for n, g in self.parameters.items()},
        }
        tensors = {"": self.diagonal, "std_error/": self.std_error, "parameter/": self.values}
        write_file(path, tensors, {**self.metadata, **groups})

    def __str__(self) -> str:
        """A table of the layers with the largest traces, and the summary."""
        return "\n".join([*self._table(SHOWN_LAYERS), "", self.summary()])

    def summary(self) -> str:
        """Return what was measured, how far it is off, and why it ended, in sentences."""
        m = self.metadata
        size = "" if m["data_size"] is None else f" of {m['data_size']:,}"
        inputs = f"{m['inputs']:,} input{'' if m['inputs'] == 1 else 's'}{size}"
        labels = f"{m['labels']:,} label{'' if m['labels'] == 1 else 's'}, " if m["draws"] else ""
        lines = [
            f"F is off by {percent(self.rel_error)} ({inputs}, {labels}{m['estimator']}). "
            f"{m['stopped']}"
        ]
        if m.get("population_rel_error") is not None:
            lines.append(
                "As an estimate for the distribution that the inputs come from, it is off by "
                f"{percent(m['population_rel_error'])}."
            )
        return "\n".join([*lines, *m["notes"]])

    def report(self) -> str:
        """Return the whole table, the summary and the metadata as text."""
        hidden = ("notes", "stopped", "population_rel_error", "layer_classes")
        lines = [f"{k}: {v}" for k, v in self.metadata.items() if k not in hidden]
        return "\n".join([*self._table(None), "", self.summary(), "", *lines])

    def _table(self, most: int | None) -> list[str]:
        ranked = sorted(self.layers.items(), key=lambda item: -item[1].trace)
        names = {name for name, _ in ranked[:most]}
        labels = name_layers_of(self)
        rows: list[Row] = [
            ("layer", "parameters", "trace F", "error", "effective inputs"),
            *(_row(labels[name], group) for name, group in self.layers.items() if name in names),
            _row("total", self.total),
        ]
        hidden = len(ranked) - len(names)
        more = [f"and {quantity(hidden, 'layer')} with smaller traces"] if hidden else []
        size_biased = [SIZE_BIASED] if "size-biased" in self.metadata["estimator"] else []
        return [*align(rows), *more, *_MEANINGS, ESTIMATOR_DESCRIPTIONS["i1"], *size_biased]

    def ewc_penalty(
        self, model: nn.Module, *, anchor: Mapping[str, Tensor] | None = None
    ) -> EwcPenalty:
        """Return ½ Σ_i F_ii (θ_i − θ*_i)², differentiable, with its relative error.

        Args:
            model: The model in training, whose parameters are θ.
            anchor: θ* by name; by default the parameters at which F was measured.

        Raises:
            FimprobeError: If parameters are missing, or have other shapes.
        """
        return ewc_penalty(self, model, self.values if anchor is None else anchor)

    def mask(self, top: float = 0.1) -> Mask:
        """Return the entries with the largest F_ii, and the expected overlap with the true ones.

        Args:
            top: Share of the entries of all parameters.

        Raises:
            FimprobeError: If the share is not between 0 and 1.
        """
        return top_mask(self, top)

    def ratio(self, other: Fisher) -> Ratio:
        """Return F_ii / F'_ii of every entry with its error, for unlearning.

        Args:
            other: F' of the same model on other data.

        Raises:
            FimprobeError: If the parameters differ, in name, shape or value.
        """
        return Ratio.of(self, other)

    @staticmethod
    def merge(
        fishers: Sequence[Fisher], states: Sequence[Mapping[str, Tensor]] | None = None
    ) -> Merged:
        """Return the mean of several models' parameters, weighted by their F, with its error.

        Args:
            fishers: F of each model.
            states: State dictionaries of the models; by default the parameters at which the F were
                measured. Entries without an F are averaged with equal weights; tied ones have
                that of their other name.

        Raises:
            FimprobeError: If the models differ in names or shapes, or states are in another order.
        """
        return merge(fishers, [f.values for f in fishers] if states is None else states)

    def to_laplace(self, la: Any, *, num_inputs: int | None = None) -> LaplaceErrors:
        """Set the Hessian of a diagonal Laplace approximation of laplace-torch.

        Args:
            la: A ``DiagLaplace`` of the same model; a fit of it is not needed.
            num_inputs: Number of inputs of the data set, over which the Hessian sums. It is needed
                where a generator was read in part, whose size is not known.

        Returns:
            The posterior variances with their errors.

        Raises:
            FimprobeError: If the approximation is not diagonal, or of another model.
        """
        return set_laplace(self, la, num_inputs)


def name_layers_of(fisher: Fisher) -> dict[str, str]:
    """Return the short name that tables show for each layer, by its name in the model."""
    return name_layers(list(fisher.layers), fisher.metadata.get("layer_classes", {}))


def _row(name: str, group: GroupFisher) -> Row:
    return (
        name,
        f"{group.numel:,}",
        with_error(group.trace, group.std_error),
        percent(group.rel_error),
        number(group.effective_inputs),
    )


_MEANINGS = (
    "trace F: the sum of the diagonal of F, the Fisher information, ± its standard error",
    "error: how far off the diagonal is; 10 % is good, from 100 % on it is noise",
    "effective inputs: how many inputs the trace comes from",
)
"""The meaning of the columns."""
