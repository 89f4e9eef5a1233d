"""One measurement: a pure function of model, inputs and seed."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fimprobe.batch import Batch
from fimprobe.engines.plan import make_plan, measure_planned
from fimprobe.engines.problem import Plan, Problem
from fimprobe.likelihoods import get_likelihood
from fimprobe.report import Report, make_report
from fimprobe.twin import make_twin, trainable, unwrap
from fimprobe.types import BatchError, Draws, FimprobeError, Likelihood


def measure(
    model: nn.Module,
    inputs: Any,
    *,
    likelihood: str | Likelihood,
    draws: int | Literal["exact"] = 2,
    mask: Tensor | None = None,
    output: Callable[[Any], Tensor] | None = None,
    diagonals: bool = False,
    memory_mb: float = 512,
    seed: int = 0,
    step: int = 0,
    plan: Plan | None = None,
) -> Report:
    """Measure Î₁, the mean of g gᵀ with labels drawn from the model, and its variance.

    Args:
        model: any module; it is read, never changed. It is measured in eval mode.
        inputs: a tensor, a tuple (positional inputs) or a mapping (keyword inputs), batch first;
            all samples are probed.
        likelihood: ``"categorical"``, ``"bernoulli"``, ``"gaussian"``, ``"poisson"`` or an object,
            see :mod:`fimprobe.likelihoods`. The model's outputs are its parameters (logits,
            log-rates, means).
        draws: labels drawn for each input, or ``"exact"`` for the expectation over all labels.
        mask: boolean, shaped like the labels; False leaves a position out (padding).
        output: from what the model returns to the outputs [B, ...]; by default a tensor itself, the
            ``logits`` of a mapping or record, the first batched tensor of a tuple.
        diagonals: keep F's diagonal and its variances, in the parameters' shapes.
        memory_mb: ceiling of the probe's own working memory; samples are taken in chunks below it.
        seed: the same seed draws the same labels at any chunking and on any device.
        step: number that the report carries.
        plan: what an earlier measurement of this model found out (it is verified, then reused).

    Raises:
        FimprobeError: naming the argument, its value and the remedy.
        BatchError: a FimprobeError about this batch only (empty, non-finite outputs).

    Source: Soen & Sun 2021, eq. (3), (10)–(13).

    >>> net = nn.Linear(3, 2)
    >>> report = measure(net, torch.ones(4, 3), likelihood="categorical", draws="exact")
    >>> report.total.numel, report.total.i1.trace > 0
    (8, True)
    """
    started = time.perf_counter()
    family = get_likelihood(likelihood)
    count = _check_draws(draws)
    if not memory_mb > 0:
        raise FimprobeError(f"memory_mb={memory_mb!r} is no ceiling; pass megabytes above 0")
    if not isinstance(model, nn.Module):
        raise FimprobeError(f"model={type(model).__name__} is no torch.nn.Module")
    if not trainable(model):
        raise FimprobeError(
            "the model has no trainable parameters (requires_grad is False everywhere); nothing "
            "to measure"
        )
    batch = Batch.of(inputs)
    if batch.size == 1 and count == 1:
        raise BatchError(
            "a batch of one with draws=1 has no variance to measure; pass draws=2 or more inputs"
        )
    with _undisturbed(model, seed):
        twin = make_twin(model)
        problem = Problem(
            twin=twin,
            batch=batch.to(next(p.dtype for p in twin.parameters())),
            likelihood=family,
            draws=Draws(count, seed),
            outputs=output or select_outputs,
            mask=mask,
            memory_mb=memory_mb,
            diagonals=diagonals,
        )
        plan = plan if plan is not None else Plan()
        if not plan.verified or (plan.verified == 1 and batch.size > 1):
            fresh = make_plan(problem)
            plan.__dict__.update(fresh.__dict__)
        measured = measure_planned(problem, plan)
        moments = measured.moments["i1"]
    if not moments.parameters:
        raise FimprobeError("the outputs depend on no trainable parameter; nothing to measure")
    report = make_report(moments, step=step, seconds=0.0, likelihood=family.name, diagonals=diagonals)
    object.__setattr__(report, "seconds", time.perf_counter() - started)
    return report


def select_outputs(out: Any) -> Tensor:
    """The network's outputs among what a forward returns."""
    if isinstance(out, Tensor):
        return out
    if isinstance(out, Mapping) and isinstance(out.get("logits"), Tensor):
        return out["logits"]  # type: ignore[no-any-return]
    if isinstance(getattr(out, "logits", None), Tensor):
        return out.logits  # type: ignore[no-any-return]
    if isinstance(out, (tuple, list)):
        for x in out:
            if isinstance(x, Tensor) and x.dim() > 0:
                return x
    keys = f" with keys {sorted(map(str, out))}" if isinstance(out, Mapping) else ""
    raise FimprobeError(
        f"the model returns {type(out).__name__}{keys}, which has no logits; pass output= a "
        "function from it to the outputs [B, ...]"
    )


def _check_draws(draws: Any) -> int | None:
    if draws == "exact":
        return None
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise FimprobeError(f"draws={draws!r} is no number of labels; pass 1, 2, ... or 'exact'")
    return draws


@contextmanager
def _undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Autograd on, autocast off, and every random stream put back as it was."""
    devices = {p.device for p in model.parameters() if p.is_cuda}
    generators = [torch.default_generator]
    generators += [torch.cuda.default_generators[d.index or 0] for d in devices]
    states = [g.get_state() for g in generators]
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    kind = next(iter(unwrap(model).parameters())).device.type
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(kind, enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            for generator in generators:
                generator.manual_seed(seed)
            yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
