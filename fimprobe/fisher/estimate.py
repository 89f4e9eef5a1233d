"""``estimate``: the diagonal of F over a data set, until its error is reached."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fimprobe.distributed.processes import ProcessGroup, SingleProcess
from fimprobe.errors import FimprobeError
from fimprobe.fisher.fisher import Fisher
from fimprobe.fisher.options import check_options
from fimprobe.fisher.result import assemble
from fimprobe.fisher.streaming.batches import IndexedSource, Source, make_source
from fimprobe.fisher.streaming.progress import ProgressLine
from fimprobe.fisher.streaming.reading import InputReader
from fimprobe.fisher.streaming.run import EstimateRun, Limits
from fimprobe.fisher.streaming.state import StateFile, fingerprint
from fimprobe.fisher.streaming.stopping import StoppingRule
from fimprobe.fisher.sums.measurer import Measurer
from fimprobe.likelihoods import Categorical, Joint, get_likelihood
from fimprobe.likelihoods.base import Likelihood
from fimprobe.likelihoods.categorical import IGNORED
from fimprobe.measurement.isolation import isolated_state
from fimprobe.measurement.process_summary import check_models_agree, summarize
from fimprobe.model.batch import Batch
from fimprobe.training.likelihood_inference.model_family import infer_family


def estimate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    likelihood: str | Likelihood = "auto",
    rel_error: float | Mapping[str, float] = 0.1,
    each_layer: bool = False,
    entries: Mapping[str, Tensor] | None = None,
    max_inputs: int | None = None,
    max_seconds: float | None = None,
    inputs: Callable[[Any], Any] | None = None,
    mask: Callable[[Any], Tensor | None] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    draws: int | Literal["auto", "exact"] = "auto",
    input_sampling: Literal["auto", "uniform", "trace"] = "auto",
    seed: int = 0,
    memory_mb: float = 512,
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
    ranks: ProcessGroup | None = None,
) -> Fisher:
    """Estimate the diagonal of the Fisher information over a data set, to a stated error.

    F is the mean over the given data: once all inputs are seen, only the labels leave an error, and
    exact labels leave none. Labels are drawn size-biased, so that rare labels that carry F are seen.

    Args:
        model: Any module; it is read, never changed. It is measured in eval mode.
        data: Batches: a ``DataLoader``, a list or any iterable of tensors, pairs (inputs, labels) or
            mappings; or a tensor of inputs, or a ``Dataset``. Labels of the data are not used. A
            ``DataLoader`` over a ``Dataset`` is read in an order that ``seed`` determines; other
            iterables in theirs, which should be random if not all is to be read.
        likelihood: As for :func:`fimprobe.measure`; ``"auto"`` for heads of transformers.
        rel_error: The error to reach, √(Σ_i Var F̂_ii)/‖diag F‖; or errors by names or patterns of
            parameters and layers.
        each_layer: Whether every layer must reach the error, not the whole diagonal.
        entries: Boolean tensors by parameter: the error is that of these entries together.
        max_inputs: Largest number of inputs.
        max_seconds: Longest time in seconds.
        inputs: Function from a batch to the model's inputs.
        mask: Function from a batch to a boolean tensor of the labels' shape; False leaves a position
            out. Heads of transformers need none.
        output: Function from what the model returns to the outputs [B, ...].
        draws: Labels per input, ``"exact"``, or ``"auto"``: exact where that takes at most
            ``MAX_AUTO_PASSES`` backward passes, else 2; and 1 for inputs drawn by τ.
        input_sampling: ``"trace"`` draws inputs in proportion to τ = tr I(h), after a pass of
            forwards over the data; ``"uniform"`` measures them as they come; ``"auto"`` decides
            after a few batches which costs less. Drawing needs data with random access.
        seed: Determines labels and order.
        memory_mb: Ceiling of the working memory, besides some copies of the parameters.
        state: A file that is written on the way; a call with the same arguments continues from it.
        progress: Whether a line on the terminal shows the error and the expected end.
        ranks: Processes that estimate together (:func:`fimprobe.join_processes`). With a
            ``DataLoader`` over a ``Dataset`` they share its items, else each has its own shard.

    Returns:
        The diagonal with its errors, equal on all processes. An interruption from the keyboard
        returns what was measured.

    Raises:
        FimprobeError: With the argument, its value and the remedy. If some inputs were measured
            before, the error has them as its attribute ``partial``, a :class:`fimprobe.Fisher`.

    >>> import torch
    >>> net = torch.nn.Linear(3, 2)
    >>> fisher = estimate(net, torch.randn(64, 3), likelihood="categorical", draws="exact")
    >>> fisher.rel_error, fisher.diagonal["weight"].shape
    (0.0, torch.Size([2, 3]))
    """
    check_options(
        model,
        rel_error=rel_error,
        entries=entries,
        max_inputs=max_inputs,
        max_seconds=max_seconds,
        functions={"inputs": inputs, "mask": mask, "output": output},
        draws=draws,
        input_sampling=input_sampling,
        memory_mb=memory_mb,
        seed=seed,
        state=state,
        ranks=ranks,
    )
    processes = ranks or SingleProcess()
    rule = StoppingRule(rel_error=rel_error, each_layer=each_layer, entries=entries)
    limits = Limits(inputs=max_inputs, seconds=max_seconds)
    with isolated_state(model, seed):
        source = make_source(data, seed)
        family, reason = find_likelihood(likelihood, model, source)
        reader = make_reader(model, family, inputs, mask)
        measurer = Measurer(
            model=model, likelihood=family, output=output, memory_mb=memory_mb, seed=seed
        )
        _check_access(source, data, input_sampling)
        _agree_on_model(measurer, processes)
        source.count_inputs(reader, processes)
        line = ProgressLine(
            shown=progress and processes.rank == 0,
            target=rel_error if isinstance(rel_error, (int, float)) else min(rel_error.values()),
        )
        options = {
            "likelihood": str(family),
            "draws": draws,
            "input_sampling": input_sampling,
            "seed": seed,
            "max_inputs": max_inputs,  # it may cut a batch, whose rest would be left out later
            "size": source.size,
            "batch_size": getattr(source, "batch_size", None),
        }
        identity = fingerprint(measurer.parameters(), options) if state is not None else ""
        run = EstimateRun(
            measurer=measurer,
            source=source,
            reader=reader,
            rule=rule,
            limits=limits,
            draws=draws,
            input_sampling=input_sampling,
            processes=processes,
            file=StateFile(state, rank=processes.rank, processes=processes.size, identity=identity),
            line=line,
        )
        run.resume()
        description = {"likelihood_from": reason, "data": _describe(data), "draws_option": draws}
        return _finish(run, description)


def _check_access(source: Source, data: Any, input_sampling: str) -> None:
    """Check that inputs can be drawn if that is requested."""
    if input_sampling == "trace" and not isinstance(source, IndexedSource):
        raise FimprobeError(
            "`input_sampling='trace'` must have data with random access, got "
            f"{type(data).__name__}. Pass a tensor, a Dataset or a DataLoader over one."
        )


def _agree_on_model(measurer: Measurer, processes: ProcessGroup) -> None:
    """Check that all processes hold one model, and give its buffers to all."""
    if processes.size == 1:
        return
    model, rank = measurer.model, processes.rank
    summaries = processes.run_everywhere(lambda: summarize(model, Batch((), {}, 0), rank=rank))
    check_models_agree(summaries)
    measurer.buffers = summaries[0].buffers


def _finish(run: EstimateRun, description: dict[str, Any]) -> Fisher:
    """Run to an end; keep what was measured where there is an error."""
    alone = run.processes.size == 1
    try:
        end = run.run()
    except KeyboardInterrupt:
        run.line.close()
        if not alone or run.sums.inputs == 0:
            raise
        run.save()
        end = "interrupted"
    except (FimprobeError, torch.OutOfMemoryError) as error:
        run.line.close()
        if alone and run.sums.inputs > 0:
            run.save()
            error.partial = assemble(run, "error", description)  # type: ignore[union-attr]
        raise
    return assemble(run, end, description)


def find_likelihood(
    likelihood: str | Likelihood, model: nn.Module, source: Source
) -> tuple[Likelihood, str]:
    """Return the family of labels, and how it was found.

    Args:
        likelihood: The option.
        model: The model.
        source: The data, whose first batch may decide.
    """
    if likelihood != "auto":
        family = get_likelihood(likelihood)
        if isinstance(family, Joint):
            raise FimprobeError(
                f"`likelihood` must be the family of one output, got {likelihood!r}. Pass output= a "
                "function that selects it, and its family."
            )
        return family, "given"
    first = None
    if source.repeatable:
        first = next((item.raw for item in source.batches(0, 1, 0)), None)
    return infer_family(model, (), dict(first) if isinstance(first, Mapping) else {})


def make_reader(
    model: nn.Module,
    family: Likelihood,
    inputs: Callable[[Any], Any] | None,
    mask: Callable[[Any], Tensor | None] | None,
) -> InputReader:
    """Return what reads batches: of classes, positions whose label is ignored are left out.

    Args:
        model: The model.
        family: The family of labels.
        inputs: From a batch to the model's inputs; None for the usual places.
        mask: From a batch to a boolean tensor of the labels' shape; None for all labels.
    """
    ignored = IGNORED if isinstance(family, Categorical) else None
    return InputReader(model=model, inputs=inputs, mask=mask, ignored=ignored)


def _describe(data: Any) -> str:
    """The data in words."""
    dataset = getattr(data, "dataset", None)
    kind = type(data).__name__
    return kind if dataset is None else f"{kind} over {type(dataset).__name__}"
