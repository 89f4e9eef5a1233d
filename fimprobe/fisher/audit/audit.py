"""``audit``: a diagonal from elsewhere compared with F, and what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fimprobe.errors import FimprobeError
from fimprobe.fisher.audit.candidates import CandidateMeasurer, InputSquares
from fimprobe.fisher.audit.comparison import compare_groups
from fimprobe.fisher.audit.diagnosis import Diagnosis, diagnose
from fimprobe.fisher.audit.labelled_data import LabelledData
from fimprobe.fisher.audit.result import Audit
from fimprobe.fisher.audit.theirs import read_theirs
from fimprobe.fisher.decisions import flatten
from fimprobe.fisher.estimate import estimate, find_likelihood, make_reader
from fimprobe.fisher.fisher import Fisher
from fimprobe.fisher.options import check_run_options
from fimprobe.fisher.streaming.batches import make_source
from fimprobe.fisher.sums.measurer import Measurer
from fimprobe.likelihoods.base import Likelihood
from fimprobe.measurement.arguments import check_model
from fimprobe.measurement.isolation import isolated_state
from fimprobe.measurement.tensor_checks import check_readable

_REFERENCE_STREAM = 0x3C6EF372
"""The seed is combined with it by exclusive or: noise of F̂ must not be that of an audited Fisher."""


def audit(
    model: nn.Module,
    data: Iterable[Any],
    theirs: Any,
    *,
    likelihood: str | Likelihood = "auto",
    rel_error: float = 0.02,
    top: float = 0.1,
    max_inputs: int | None = None,
    inputs: Callable[[Any], Any] | None = None,
    labels: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Tensor | None] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    memory_mb: float = 512,
    progress: bool = True,
) -> Audit:
    """Compare a diagonal from elsewhere with the Fisher information, and find out what it is.

    F is estimated over the data. Then common computations are carried out on the same data, and
    compared with ``theirs``: squared gradients of each input or of batches, with labels of the model,
    of the data, the arg-max ones, or a sum without signs.

    Args:
        model: The model in the state in which ``theirs`` was computed; it is read, never changed.
        data: The inputs and labels of ``theirs``, as for :func:`fimprobe.estimate`. They are read
            several times. Labels are the second of a pair, or ``labels`` of a mapping.
        theirs: A mapping from parameters' names to tensors, one vector of all entries, the path of a
            ``.pt`` or ``.safetensors`` file of these, a :class:`fimprobe.Fisher`, nngeometry's
            ``PMatDiag``, laplace-torch's ``DiagLaplace`` or its ``H``, or an optimizer with
            ``exp_avg_sq``.
        likelihood: As for :func:`fimprobe.estimate`.
        rel_error: Error of the estimate of F at which it stops.
        top: Share of the entries that count as the largest.
        max_inputs: Largest number of inputs; candidates with random batches then are not tried.
        inputs: Function from a batch to the model's inputs.
        labels: Function from a batch to the labels of the data.
        mask: Function from a batch to a boolean tensor of the labels' shape; False leaves a position
            out.
        output: Function from what the model returns to the outputs [B, ...].
        seed: Determines labels and order.
        memory_mb: Ceiling of the working memory, besides some copies of the parameters.
        progress: Whether a line on the terminal shows the error of the estimate.

    Returns:
        Scale, cosine, error after the best rescaling and overlap of the largest entries, for each
        layer and in all, beside what the noise of the estimate explains; and the diagnosis.

    Raises:
        FimprobeError: With the argument, its value and the remedy.

    A single process reads the data: of several ones, each audits what is passed to it.

    >>> import torch
    >>> net, x = torch.nn.Linear(3, 2), torch.randn(64, 3)
    >>> fisher = estimate(net, x, likelihood="categorical", draws="exact", rel_error=1e-9)
    >>> summed = {name: 64 * f for name, f in fisher.diagonal.items()}
    >>> audit(net, x, summed, likelihood="categorical").diagnosis
    '`theirs` is F, summed over the 64 inputs, not averaged (N forgotten): divide it by 64.'
    """
    _check_options(model, top, labels)
    check_run_options(seed, None, None)
    with isolated_state(model, seed):
        diagonal, notes = read_theirs(theirs, model)
        source = make_source(data, seed)
        family, _ = find_likelihood(likelihood, model, source)
        reader = make_reader(model, family, inputs, mask)
        labelled = LabelledData(
            model=model,
            data=data,
            source=source,
            reader=reader,
            labels=labels,
            max_inputs=max_inputs,
        )
        reference = estimate(
            model,
            data,
            likelihood=likelihood,
            rel_error=rel_error,
            max_inputs=max_inputs,
            inputs=inputs,
            mask=mask,
            output=output,
            seed=seed ^ _REFERENCE_STREAM,
            memory_mb=memory_mb,
            progress=progress,
        )
        source.size = reference.metadata["data_size"] or source.size
        measurer = Measurer(
            model=model, likelihood=family, output=output, memory_mb=memory_mb, seed=seed
        )
        candidates = CandidateMeasurer(measurer=measurer, data=labelled, names=list(diagonal))
        diagnosis = _diagnose(diagonal, reference, candidates, seed)
    groups = compare_groups(diagonal, reference, top)
    return Audit(
        total=groups[""],
        layers={n.removeprefix("layer "): g for n, g in groups.items() if n},
        diagnosis=diagnosis.sentence,
        finding=diagnosis.describe(),
        candidates=diagnosis.candidates,
        reference=reference,
        top=top,
        notes=[*notes, *_process_notes(), *diagnosis.notes, *reference.metadata["notes"]],
    )


def _process_notes() -> list[str]:
    """What a reader must know where several processes run."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return []
    return [
        f"Only the data of process {dist.get_rank()} of {dist.get_world_size()} were read: a "
        "diagonal that several processes computed together needs the data of all."
    ]


def _check_options(model: nn.Module, top: float, labels: Callable[[Any], Any] | None) -> None:
    check_model(model)
    check_readable(model)
    if isinstance(top, bool) or not isinstance(top, (int, float)) or not 0 < top < 1:
        raise FimprobeError(f"`top` must be between 0 and 1, got {top!r}. Use 0.1 for a tenth.")
    if labels is not None and not callable(labels):
        raise FimprobeError(
            f"`labels` must be a function of the batch, got {type(labels).__name__}. Pass one that "
            "returns the labels of the data."
        )


def _diagnose(
    diagonal: dict[str, Tensor], reference: Fisher, candidates: CandidateMeasurer, seed: int
) -> Diagnosis:
    """The diagnosis; where candidates cannot be computed, the comparison is kept."""
    names = candidates.names
    expected = flatten({name: reference.diagonal[name] for name in names})
    variance = flatten({name: reference.std_error[name] for name in names}).square().sum()
    squares = InputSquares(
        second=expected,
        mean=torch.zeros_like(expected),
        rel_error=float(variance.sqrt() / expected.norm()) if float(variance) > 0 else 0.0,
    )
    theirs = flatten({name: diagonal[name] for name in names})
    try:
        return diagnose(theirs, squares, candidates, seed)
    except FimprobeError as error:
        return Diagnosis(sentence=None, notes=[f"Candidates were not computed: {error}"])
