"""One measurement: a function of model, inputs, seed and the plan that is kept for the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from fimprobe.distributed.processes import ProcessGroup, SingleProcess
from fimprobe.engines.tracing.plan import Plan
from fimprobe.errors import FimprobeError
from fimprobe.likelihoods import LikelihoodOption
from fimprobe.measurement.process_share import ProcessShare
from fimprobe.measurement.second_order_engine import (
    PROBES,
    must_agree,
    must_measure_again,
    spot_checks_failed,
)
from fimprobe.measurement.tensor_checks import check_plan_and_ranks, check_step_and_diagonals
from fimprobe.report.build import build_report
from fimprobe.report.report import Report


def measure(
    model: nn.Module,
    inputs: Any,
    *,
    likelihood: LikelihoodOption,
    draws: int | Literal["auto", "exact"] = 2,
    label_sampling: Literal["size_biased", "model"] = "size_biased",
    estimators: Sequence[str] = ("i1", "i2"),
    second_order: Mapping[str, int] | Literal["auto", "spot_checks", "exact", "off"] = "auto",
    bounds: bool = True,
    engine: Literal["auto", "autograd", "backpack"] = "auto",
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    output: Callable[[Any], Tensor] | None = None,
    diagonals: bool = False,
    memory_mb: float = 512,
    seed: int = 0,
    step: int = 0,
    plan: Plan | None = None,
    ranks: ProcessGroup | None = None,
) -> Report:
    """Measure estimators of the Fisher information, their variances and the bounds on them.

    Args:
        model: Any module; it is read, never changed. It is measured in eval mode.
        inputs: A tensor, a tuple (positional inputs) or a mapping (keyword inputs), batch first;
            all samples are measured.
        likelihood: ``"categorical"``, ``"bernoulli"``, ``"gaussian"``, ``"poisson"``,
            ``"heteroscedastic_gaussian"`` or an object, see :mod:`fimprobe.likelihoods`. The outputs
            of the model are its parameters (logits, log-rates, means, variances). For several heads
            a list with the family of each output, or a mapping from names or positions of outputs to
            families; labels and mask are then joined, ``torch.cat`` of each head's
            ``labels.reshape(B, -1)``. ``"auto"`` takes family and mask from the head of a
            transformers model, and states the family in a note.
        draws: Labels drawn for each input, ``"exact"`` for the expectation over all labels, or
            ``"auto"``: exact if that takes at most ``MAX_AUTO_PASSES`` backward passes, else 2.
        label_sampling: Distribution that labels are drawn from. ``"size_biased"``: in proportion to
            the size of their score and weighted back, so that rare labels that carry F are seen at
            any confidence; ``"model"``: the model itself. Expectations are equal. Families without
            size-biased draws use the model's.
        estimators: Any of ``"i1"`` (always measured) Î₁ the mean of g gᵀ, ``"i2"`` Î₂ minus the mean
            Hessian, ``"ih"`` Î_H Hutchinson's, ``"empirical"`` (needs ``labels``).
        second_order: How the second derivatives of Î₂ are computed. ``{"probes": K}`` uses K ≥ 2
            random probes and works for every model; ``"spot_checks"`` measures the label variance by
            differences of forward passes at a few entries of each layer, with far less noise on
            transformers; ``"exact"`` uses BackPACK and is limited to the modules that it supports.
            ``"auto"`` is exact where that is cheap, else by probes, and by spot checks where probes
            leave too much noise; with ``diagonals`` never by these. ``"off"`` skips Î₂.
        bounds: Whether to measure the bounds (17), (18) and their relatives, ‖Cov‖ (exact labels),
            (19) to (21), and activations.
        engine: ``"backpack"`` computes the moments of Î₁ by BackPACK too; ``"auto"`` is
            ``"autograd"``, which was never slower.
        labels: Labels of the data [B, ...], for the empirical Fisher only.
        mask: Boolean, of the labels' shape; False leaves a position out (padding).
        output: From what the model returns to the outputs [B, ...]; by default a tensor itself, the
            ``logits`` of a mapping or record, the first batched tensor of a tuple.
        diagonals: Whether to keep diagonals and their variances, in the parameters' shapes.
        memory_mb: Ceiling of the working memory; larger batches are measured in chunks.
        seed: The same seed draws the same labels at any chunking and on any device.
        step: Number that the report carries.
        plan: How the parameters of this model are reached, filled by an earlier measurement. It is
            verified once and then reused. By default the plan of the last measurement of this model,
            if neither the model nor the kind of inputs has changed.
        ranks: The processes that call this together, each with its share of the batch (see
            ``join_processes`` of ``fimprobe.distributed.processes``). All of them return the report
            of the whole batch.

    Returns:
        The report of the batch.

    Raises:
        FimprobeError: With the argument, its value and the remedy.
        BatchError: A FimprobeError about this batch only (empty, outputs not finite).

    Source: Soen & Sun (2021), eq. 3 to 22; Soen & Sun (2024), diagonals; Sun (2026), Î_H.

    >>> import torch
    >>> net = torch.nn.Linear(3, 2)
    >>> report = measure(net, torch.ones(4, 3), likelihood="categorical", draws="exact")
    >>> report.total.numel, report.total.i1.trace > 0, report.total.i2.label_variance
    (8, True, 0.0)
    """
    started = time.perf_counter()
    check_step_and_diagonals(step, diagonals)
    check_plan_and_ranks(plan, ranks)
    processes = ranks or SingleProcess()
    share = ProcessShare(
        model=model,
        inputs=inputs,
        options={
            "likelihood": likelihood,
            "draws": draws,
            "label_sampling": label_sampling,
            "estimators": estimators,
            "second_order": second_order,
            "bounds": bounds,
            "engine": engine,
            "memory_mb": memory_mb,
            "seed": seed,
        },
        labels=labels,
        mask=mask,
        output=output,
        diagonals=diagonals,
        processes=processes,
    )
    share.compare(processes.run_everywhere(share.check))
    with share.with_plan(plan):
        measured, layer_bounds = processes.measure_together(share.measure)
        if must_agree(share.plan, share.request, processes):
            measured, layer_bounds = processes.measure_together(share.measure)
        if spot_checks_failed(measured, share.plan, share.request):
            share.plan.second_order = PROBES
            measured, layer_bounds = processes.measure_together(share.measure)
        if must_measure_again(measured, share.plan, share.request, diagonals=diagonals):
            checked, layer_bounds = processes.measure_together(share.measure)
            if spot_checks_failed(checked, share.plan, share.request):
                share.plan.second_order = PROBES
            else:
                measured = checked
    if not measured.moments["i1"].parameters:
        raise FimprobeError(
            "`model` must have trainable parameters that its outputs depend on, got outputs that "
            "depend on none. Check requires_grad, and that neither the forward nor `output` detaches "
            "them or runs under torch.no_grad()."
        )
    return build_report(
        measured,
        layer_bounds,
        step=step,
        started=started,
        likelihood=share.likelihood.name,
        ask_ih=share.request.ih,
        diagonals=diagonals,
    )
