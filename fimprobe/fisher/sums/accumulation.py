"""Sums over the inputs of a data set, from which the diagonal of F and its errors follow.

Every sum is additive over batches of any size and over processes. a_b is the estimate of one input's
diagonal: the mean over its draws of w g², or the exact expectation. All sums are float64.
See docs/theory.md, "Inputs and labels".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fimprobe.estimators.groups import Groups, GroupSums
from fimprobe.statistics import Moments, MomentsBatch

COLUMNS = (
    "trace",
    "trace_square",
    "trace_cube",
    "trace_fourth",
    "trace_label",
    "trace_label_square",
    "square",
    "root",
    "square_root_product",
    "fourth",
    "label",
    "label_square",
    "batch_trace",
)
"""Sums over the inputs b of a group of parameters. With t_b = Σ_i a_bi, Q_b = Σ_i a_bi² and the label
variances u_b of t_b and v_b of all a_bi: powers of t, u, u², Q, √Q, Q^(3/2), Q², v, v², and the sum
over batches of (Σt)²/B."""


def make_groups(parameters: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the groups: each parameter, each layer and the whole model ("").

    >>> list(make_groups({"0.weight": 1, "0.bias": 1}))
    ['parameter 0.weight', 'parameter 0.bias', 'layer 0', '']
    """
    layers: dict[str, list[str]] = {}
    for name in parameters:
        layers.setdefault(name.rpartition(".")[0] or "(model)", []).append(name)
    groups = {f"parameter {name}": [name] for name in parameters}
    return groups | {f"layer {n}": members for n, members in layers.items()} | {"": list(parameters)}


@dataclass(kw_only=True)
class EntrySums:
    """Sums over the inputs for every entry of one parameter, float64.

    Attributes:
        total: Σ a_b.
        square: Σ a_b².
        label: Σ of the label variance of a_b, unbiased; zero where it is not known.
    """

    total: Tensor
    square: Tensor
    label: Tensor

    @classmethod
    def like(cls, parameter: Tensor) -> EntrySums:
        """Return empty sums in the shape of a parameter."""

        def zeros() -> Tensor:
            return torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)

        return cls(total=zeros(), square=zeros(), label=zeros())

    def add(self, moments: Moments, draws: int | None) -> None:
        """Add the sums of a batch.

        Args:
            moments: The moments, with those of every entry.
            draws: S; None for exact labels.
        """
        assert moments.q is not None and moments.r is not None
        count = draws or 1
        device = self.total.device
        self.total += moments.a2.to(device, torch.float64) / count
        self.square += moments.q.to(device) / count**2
        if count > 1:
            self.label += _label_variance(moments.q, moments.r, count).to(device)


@dataclass(kw_only=True)
class FisherSums:
    """Sums over the inputs that were measured.

    Attributes:
        groups: Parameters of each group.
        entries: Sums for every entry, by parameter.
        columns: Sums for every group [G, len(COLUMNS)]; the columns are those of ``COLUMNS``.
        inputs: Number of inputs.
        labels: Number of labels drawn, or of exact passes.
        batches: Number of batches.
        knows_labels: Whether the label variance is known for all inputs.
        score_mass: Σ‖δ‖² of the drawn labels, and its expectation; zeros where it is not known.
        sorted_labels: Whether the labels of the data came in an order that is not random.
    """

    groups: Groups
    entries: dict[str, EntrySums]
    columns: Tensor
    inputs: int = 0
    labels: int = 0
    batches: int = 0
    knows_labels: bool = True
    score_mass: tuple[float, float] = (0.0, 0.0)
    sorted_labels: bool = False

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> FisherSums:
        """Return empty sums for some parameters."""
        groups = make_groups(parameters)
        columns = torch.zeros(len(groups), len(COLUMNS), dtype=torch.float64)
        entries = {name: EntrySums.like(p) for name, p in parameters.items()}
        return cls(groups=groups, entries=entries, columns=columns)

    def add(self, moments: MomentsBatch) -> None:
        """Add a batch. Parameters that its outputs do not depend on have the diagonal zero."""
        draws, known = moments.draws, moments.parameters
        for name, parameter in known.items():
            self.entries[name].add(parameter, draws)
        groups = {g: [n for n in names if n in known] for g, names in self.groups.items()}
        if known:
            self.columns += _columns_of(moments, groups)
        passes = 1 if moments.square_weights is None else moments.square_weights.shape[1]
        self.inputs += moments.batch_size
        self.labels += moments.batch_size * (draws or passes)
        self.batches += 1
        self.knows_labels &= draws is None or draws > 1
        if moments.seen_mass is not None and moments.fisher_trace is not None:
            seen, expected = self.score_mass
            mass = moments.seen_mass * moments.fisher_trace
            self.score_mass = seen + mass, expected + moments.fisher_trace

    def column(self, name: str) -> Tensor:
        """Return one column [G]."""
        return self.columns[:, COLUMNS.index(name)]

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of all tensors by name, on the CPU; counts are one of them.

        Those of several processes add up.
        """
        flags = not self.knows_labels, self.sorted_labels
        counts = [self.inputs, self.labels, self.batches, *flags, *self.score_mass]
        tensors = {
            "columns": self.columns.clone(),
            "counts": torch.tensor(counts, dtype=torch.float64),
        }
        for name, sums in self.entries.items():
            for field, x in vars(sums).items():
                tensors[f"{field}/{name}"] = x.to("cpu", copy=True)
        return tensors

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> FisherSums:
        """Return these sums with the values of :meth:`tensors` of equal or of merged ones."""
        counts = tensors["counts"].tolist()
        return FisherSums(
            groups=self.groups,
            entries={
                name: EntrySums(
                    **{
                        field: tensors[f"{field}/{name}"].to(x.device)
                        for field, x in vars(sums).items()
                    }
                )
                for name, sums in self.entries.items()
            },
            columns=tensors["columns"],
            inputs=round(counts[0]),
            labels=round(counts[1]),
            batches=round(counts[2]),
            knows_labels=counts[3] == 0,  # a sum over processes
            sorted_labels=counts[4] > 0,
            score_mass=(counts[5], counts[6]),
        )


def _label_variance(q: Tensor, r: Tensor, draws: int) -> Tensor:
    """The unbiased variance of the mean over S ≥ 2 draws, from Q and R."""
    return (r - q / draws) / (draws * (draws - 1))


def _columns_of(moments: MomentsBatch, groups: Groups) -> Tensor:
    """The columns of one batch [G, len(COLUMNS)]."""
    sums, draws = GroupSums(groups), moments.draws
    norms = sums.sum(moments.parameters, "squared_norms")
    _, q, r, _ = sums.sum(moments.parameters, "powers").unbind(1)
    label = trace_label = torch.zeros_like(q)
    if draws is None:
        assert moments.square_weights is not None
        trace = (norms * moments.square_weights.double().cpu()).sum(-1)
    else:
        trace = norms.mean(-1)
        if draws > 1:
            label, trace_label = _label_variance(q, r, draws), norms.var(-1) / draws
        q = q / draws**2
    root = q.sqrt()
    batch_trace = trace.sum(-1).square() / moments.batch_size
    columns = {
        "trace": trace,
        "trace_square": trace.square(),
        "trace_cube": trace**3,
        "trace_fourth": trace**4,
        "trace_label": trace_label,
        "trace_label_square": trace_label.square(),
        "square": q,
        "root": root,
        "square_root_product": q * root,
        "fourth": q.square(),
        "label": label,
        "label_square": label.square(),
    }
    return torch.stack([*(columns[n].sum(-1) for n in COLUMNS[:-1]), batch_trace], 1)
