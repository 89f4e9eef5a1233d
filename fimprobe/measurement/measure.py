"""One measurement: a pure function of model, inputs and seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn

from fimprobe.distributed.processes import ProcessGroup, SingleProcess
from fimprobe.engines.autograd.verification import (
    check_curvature,
    make_verified_plan,
    measure_with_fallbacks,
)
from fimprobe.engines.problem.problem import Problem, Request
from fimprobe.engines.tracing.plan import Plan
from fimprobe.errors import BatchError, FimprobeError
from fimprobe.jacobian_bounds.layer_bounds import LayerBound, bound_layer_jacobians
from fimprobe.likelihoods import get_likelihood
from fimprobe.likelihoods.base import Likelihood
from fimprobe.likelihoods.draws import Draws
from fimprobe.measurement.arguments import (
    check_backpack,
    check_draws,
    check_label_sampling,
    check_labels,
    check_mask_and_output,
    check_numbers,
    choose_draws,
    parse_request,
)
from fimprobe.measurement.isolation import _isolated_state
from fimprobe.measurement.shares import _buffers, _check_models_agree, _ProcessSummary
from fimprobe.model.batch import Batch
from fimprobe.model.fsdp import Shards, check_sharded, is_sharded, make_sharded_twin
from fimprobe.model.outputs import select_outputs
from fimprobe.model.twin import make_twin, unwrap
from fimprobe.report.build import build_report
from fimprobe.report.report import Report
from fimprobe.statistics import Measured


def measure(
    model: nn.Module,
    inputs: Any,
    *,
    likelihood: str | Likelihood,
    draws: int | Literal["auto", "exact"] = 2,
    label_sampling: Literal["size_biased", "model"] = "size_biased",
    estimators: Sequence[str] = ("i1", "i2"),
    second_order: Mapping[str, int] | Literal["exact", "off"] = MappingProxyType({"probes": 2}),
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
        model: any module; it is read, never changed. It is measured in eval mode.
        inputs: a tensor, a tuple (positional inputs) or a mapping (keyword inputs), batch first;
            all samples are probed.
        likelihood: ``"categorical"``, ``"bernoulli"``, ``"gaussian"``, ``"poisson"`` or an object,
            see :mod:`fimprobe.likelihoods`. The model's outputs are its parameters (logits,
            log-rates, means).
        draws: labels drawn for each input, or ``"exact"`` for the expectation over all labels;
            ``"auto"``: exact where that takes at most ``AUTO_PASSES`` backward passes, else 2.
        label_sampling: where drawn labels come from. ``"size_biased"``: where their score is large,
            weighted back to the model, so that rare labels that carry F are seen at any confidence;
            ``"model"``: from the model itself. What is studied is the same: Î₁ and Î₂ with labels
            from the model. Families without such draws take the model's.
        estimators: of ``"i1"`` (always measured) Î₁ the mean of g gᵀ, ``"i2"`` Î₂ minus the mean
            Hessian, ``"ih"`` Î_H Hutchinson's, ``"empirical"`` (needs ``labels``).
        second_order: how Î₂'s second derivatives are had: ``{"probes": K}`` random probes, K ≥ 2;
            ``"exact"`` diagonals by BackPACK, where the model is in its domain; ``"off"``.
        bounds: (17), (18) and their relatives, ‖Cov‖ (exact labels), (19)–(21), activations.
        engine: ``"backpack"`` has BackPACK give Î₁'s moments too; ``"auto"`` is ``"autograd"``,
            which was never slower.
        labels: the data's labels, for the empirical Fisher only.
        mask: boolean, shaped like the labels; False leaves a position out (padding).
        output: from what the model returns to the outputs [B, ...]; by default a tensor itself, the
            ``logits`` of a mapping or record, the first batched tensor of a tuple.
        diagonals: keep the diagonals and their variances, in the parameters' shapes.
        memory_mb: ceiling of the probe's own working memory; samples are taken in chunks below it.
        seed: the same seed draws the same labels at any chunking and on any device.
        step: number that the report carries.
        plan: what an earlier measurement of this model found out (it is verified, then reused).
        ranks: the processes that call this together, each with its share of the batch (see
            :func:`fimprobe.distributed.processes.join`); all of them get the report of the whole.

    Raises:
        FimprobeError: naming the argument, its value and the remedy.
        BatchError: a FimprobeError about this batch only (empty, non-finite outputs).

    Source: Soen & Sun 2021, eq. (3)–(22); Soen & Sun 2024 (diagonals); Sun 2026 (Î_H).

    >>> import torch
    >>> net = torch.nn.Linear(3, 2)
    >>> report = measure(net, torch.ones(4, 3), likelihood="categorical", draws="exact")
    >>> report.total.numel, report.total.i1.trace > 0, report.total.i2.label_variance
    (8, True, 0.0)
    """
    started = time.perf_counter()
    family = get_likelihood(likelihood)
    count = check_draws(draws)
    size_biased = check_label_sampling(label_sampling)
    check_numbers(memory_mb, seed)
    if not isinstance(model, nn.Module):
        raise FimprobeError(f"model={type(model).__name__} is no torch.nn.Module")
    if not any(p.requires_grad for p in unwrap(model).parameters()):
        raise FimprobeError(
            "the model has no trainable parameters (requires_grad is False everywhere); nothing "
            "to measure"
        )
    shared: ProcessGroup = ranks or SingleProcess()
    sharded = is_sharded(model)
    batch: Batch
    ask: Request

    def checked() -> _ProcessSummary:
        nonlocal batch, ask
        ask = parse_request(estimators, second_order, bounds, engine, labels)
        check_mask_and_output(mask, output)
        if sharded:
            check_sharded(
                model,
                estimators=estimators,
                bounds=bounds,
                draws=draws,
                engine=engine,
                diagonals=diagonals,
                processes=shared.size,
            )
        batch = Batch.of(inputs)
        return (
            _ProcessSummary.of(model, batch, shared)
            if shared.size > 1
            else _ProcessSummary(batch.size)
        )

    shares = shared.together(checked)
    _check_models_agree(shares)
    sizes = [share.size for share in shares]
    if sharded and len(set(sizes)) > 1:
        raise BatchError(
            f"the processes' batches hold {sizes} samples; a sharded model (FSDP) is measured in "
            "steps that all processes share, give each as many"
        )
    automatic = count == "auto"
    if automatic:
        count = 2
    assert not isinstance(count, str)
    place = Draws(count, seed, sum(sizes[: shared.rank]), sum(sizes), size_biased=size_biased)
    if any(share.widths != shares[0].widths for share in shares):
        # other lengths take other amounts of one stream of random numbers: a stream for each
        place = Draws(count, seed + 15_485_863 * shared.rank, size_biased=size_biased)
        automatic = False  # other lengths take other numbers of passes: all draw
    if sum(sizes) == 1 and count == 1:
        raise BatchError(
            "a batch of one with draws=1 has no variance to measure; pass draws=2 or more inputs"
        )

    def share() -> tuple[Measured, Mapping[str, LayerBound]]:
        with _isolated_state(model, seed):
            shards = Shards(shared.for_weights(), shared.rank, shared.size) if sharded else None
            twin = make_twin(model) if shards is None else make_sharded_twin(model, shards)
            if shares[0].buffers:
                for name, buffer in _buffers(twin).items():
                    if name in shares[0].buffers:
                        buffer.copy_(shares[0].buffers[name])
            problem = Problem(
                twin=twin,
                batch=batch.to(next(p.dtype for p in twin.parameters())),
                likelihood=family,
                draws=place,
                outputs=output or select_outputs,
                mask=mask,
                memory_mb=memory_mb,
                diagonals=diagonals,
                ask=ask,
                shards=shards,
            )
            if automatic and not sharded:
                problem.draws = replace(place, count=choose_draws(problem))
            return _measure_share(problem, plan if plan is not None else Plan(), engine)

    measured, chain = shared.combine(share)
    if not measured.moments["i1"].parameters:
        raise FimprobeError("the outputs depend on no trainable parameter; nothing to measure")
    report = build_report(
        measured,
        chain,
        step=step,
        seconds=0.0,
        likelihood=family.name,
        ask_ih=ask.ih,
        diagonals=diagonals,
    )
    object.__setattr__(report, "seconds", time.perf_counter() - started)
    return report


def _measure_share(
    problem: Problem, plan: Plan, engine: str
) -> tuple[Measured, Mapping[str, LayerBound]]:
    """What this process's samples say."""
    ask, size = problem.ask, problem.batch.size
    if ask.labels is not None:
        check_labels(problem)
    if not plan.verified or (plan.verified == 1 and size > 1):
        plan.__dict__.update(make_verified_plan(problem).__dict__)
    if ask.i2 and (not plan.curved or (plan.curved == 1 and size > 1)):
        check_curvature(problem, plan)
    if plan.uncurved and ask.i2:
        problem.ask = replace(ask, i2=False, exact=False)
    if engine == "backpack":
        check_backpack(problem, plan, second_order=False)
    if ask.exact:
        check_backpack(problem, plan, second_order=True)
    measured = measure_with_fallbacks(problem, plan)
    if engine == "backpack":
        from fimprobe.engines import backpack

        known = measured.moments["i1"].parameters
        measured.moments["i1"] = backpack.measure_moments(problem, verified=True)
        for name, moments in measured.moments["i1"].parameters.items():
            moments.powers[3] = known[name].powers[3]  # max over labels: not among its moments
    if plan.uncurved and ask.i2:
        measured.notes.append(plan.uncurved)
    return measured, bound_layer_jacobians(problem, problem.batch) if ask.bounds else {}
