"""From the sums of a run to a Fisher."""

from __future__ import annotations

import math
import platform
import re
from datetime import datetime
from typing import Any

import torch

from fimprobe._version import __version__
from fimprobe.estimators.reliability import seen_mass_reason
from fimprobe.fisher.fisher import Fisher
from fimprobe.fisher.records import GroupFisher
from fimprobe.fisher.streaming.run import EstimateRun
from fimprobe.fisher.streaming.stopping import MIN_EFFECTIVE_INPUTS
from fimprobe.fisher.sums.accumulation import FisherSums
from fimprobe.fisher.sums.errors_of_sums import drift, entry_estimates, group_errors
from fimprobe.model.twin import unwrap


def assemble(run: EstimateRun, end: str, description: dict[str, Any]) -> Fisher:
    """Return the result of a run.

    Args:
        run: The run, at its end.
        end: How it ended.
        description: Further metadata.
    """
    sums, design = run.merged(), run.design
    diagonal, std_error = entry_estimates(sums, design)
    columns = group_errors(sums, design)
    numbers = {name: column.tolist() for name, column in vars(columns).items()}
    groups = {}
    for row, (group, names) in enumerate(sums.groups.items()):
        values = {name: _known(column[row]) for name, column in numbers.items()}
        groups[group] = GroupFisher(
            numel=sum(diagonal[name].numel() for name in names),
            trace=float(numbers["trace"][row]),
            std_error=values["trace_error"],
            norm=float(numbers["norm"][row]),
            rel_error=values["rel_error"],
            effective_inputs=float(numbers["effective"][row]),
        )
    metadata = _metadata(run, sums, end) | description
    population = math.nan if run.sampler else numbers["population_rel_error"][-1]
    metadata["population_rel_error"] = _known(population)
    return Fisher(
        diagonal=diagonal,
        std_error=std_error,
        values={n: p.detach().clone() for n, p in run.measurer.parameters().items()},
        total=groups[""],
        layers=_with_prefix(groups, "layer "),
        parameters=_with_prefix(groups, "parameter "),
        metadata=metadata | {"notes": _notes(run, sums, groups[""], end)},
    )


def _with_prefix(groups: dict[str, GroupFisher], prefix: str) -> dict[str, GroupFisher]:
    return {g.removeprefix(prefix): x for g, x in groups.items() if g.startswith(prefix)}


def _known(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _metadata(run: EstimateRun, sums: FisherSums, end: str) -> dict[str, Any]:
    """What was measured, as plain values."""
    model, likelihood = unwrap(run.measurer.model), run.measurer.likelihood
    parameters = run.measurer.parameters()
    first = next(iter(parameters.values()))
    layers = {name.rpartition(".")[0] for name in parameters}
    draws = run.position.labels
    target = run.rule.rel_error
    return {
        "fimprobe": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "written": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(run.seconds, 3),
        "model": type(model).__name__,
        "layer_classes": {
            name: type(module).__name__ for name, module in model.named_modules() if name in layers
        },
        "entries": sum(p.numel() for p in parameters.values()),
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": str(first.device),
        "likelihood": re.sub(r"(, )?name='\w*'|\(name='\w*'\)", "", str(likelihood)),
        "sigma": getattr(likelihood, "sigma", None),
        "target": "mean over the data set",
        "estimator": _estimator(run, draws),
        "draws": draws,
        "input_sampling": "uniform" if run.sampler is None else "trace",
        "inputs": sums.inputs,
        "labels": sums.labels,
        "forward_inputs": sums.inputs + (run.source.size or 0) * (run.sampler is not None),
        "batches": sums.batches,
        "data_size": run.source.size,
        "processes": run.processes.size,
        "seed": run.measurer.seed,
        "requested": dict(target) if not isinstance(target, (int, float)) else target,
        "reached": end == "reached",
        "end": end,
        "stopped": _ENDS[end],
    }


_ENDS = {
    "reached": "It stopped because the requested error was reached.",
    "data": "It stopped at the end of the data, before the requested error was reached.",
    "inputs": "It stopped at `max_inputs`, before the requested error was reached.",
    "seconds": "It stopped at `max_seconds`, before the requested error was reached.",
    "repeats": "It stopped after more draws than inputs, before the requested error was reached.",
    "interrupted": "It was interrupted.",
    "error": "It stopped at an error.",
}


def _estimator(run: EstimateRun, draws: int | None) -> str:
    labels = "exact labels" if draws is None else f"size-biased labels, {draws} per input"
    inputs = (
        "" if run.sampler is None else ", inputs in proportion to the trace of their output Fisher"
    )
    return f"Î₁ with {labels}{inputs}"


def _notes(run: EstimateRun, sums: FisherSums, total: GroupFisher, end: str) -> list[str]:
    """What a reader of the numbers must know."""
    notes = [*run.measurer.notes, *run.reader.notes]
    seen, expected = sums.score_mass
    unseen = seen_mass_reason(seen / expected if expected > 0 else None, size_biased=True)
    if unseen:
        notes.append(f"The errors are too small: {unseen}.")
    complete = run.design.fraction(sums.inputs) == 1
    if not complete and 0 < total.effective_inputs < MIN_EFFECTIVE_INPUTS:
        notes.append(
            f"Few inputs carry the trace ({total.effective_inputs:.2g} effective ones): the errors "
            "are uncertain. Take more inputs."
        )
    drifts, ratio = drift(sums)
    if run.design.is_no_sample(sums):
        notes.append(
            "The data are sorted: the beginning is no sample of them, so that no error is known. "
            "Shuffle them, or pass a DataLoader over a Dataset, which is read in random order."
        )
    elif run.design.stream and not complete and not run.order.counts:
        notes.append("The errors suppose that the data come in random order, which is not known.")
    elif run.design.ordered and not complete and drifts:
        notes.append(
            "The batches are in no random order: they differ by more than their inputs explain "
            f"(variance × {ratio:.3g}), which the errors include. Shuffle the data."
        )
    if end == "data" and complete and not sums.knows_labels:
        notes.append(
            "One label for each input does not separate the error of labels, so that the error is an "
            "upper limit. Take draws=2."
        )
    elif end == "data":
        target, draws = run.rule.rel_error, run.position.labels
        count = ""
        if isinstance(target, (int, float)) and total.rel_error and draws and complete:
            count = f" (about {math.ceil(draws * (total.rel_error / target) ** 2)} labels per input)"
        notes.append(
            f"More labels reduce the error that remains: take a larger `draws`{count}, or 'exact'."
        )
    return notes
