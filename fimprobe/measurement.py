"""One measurement: a pure function of model, inputs and seed."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fimprobe.batch import Batch
from fimprobe.engines.chain import LayerBound, chain_bounds
from fimprobe.engines.plan import check_curvature, make_plan, measure_planned
from fimprobe.engines.problem import Ask, Plan, Problem
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
) -> Report:
    """Measure estimators of the Fisher information, their variances and the bounds on them.

    Args:
        model: any module; it is read, never changed. It is measured in eval mode.
        inputs: a tensor, a tuple (positional inputs) or a mapping (keyword inputs), batch first;
            all samples are probed.
        likelihood: ``"categorical"``, ``"bernoulli"``, ``"gaussian"``, ``"poisson"`` or an object,
            see :mod:`fimprobe.likelihoods`. The model's outputs are its parameters (logits,
            log-rates, means).
        draws: labels drawn for each input, or ``"exact"`` for the expectation over all labels.
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

    Raises:
        FimprobeError: naming the argument, its value and the remedy.
        BatchError: a FimprobeError about this batch only (empty, non-finite outputs).

    Source: Soen & Sun 2021, eq. (3)–(22); Soen & Sun 2024 (diagonals); Sun 2026 (Î_H).

    >>> net = nn.Linear(3, 2)
    >>> report = measure(net, torch.ones(4, 3), likelihood="categorical", draws="exact")
    >>> report.total.numel, report.total.i1.trace > 0, report.total.i2.label_variance
    (8, True, 0.0)
    """
    started = time.perf_counter()
    family = get_likelihood(likelihood)
    count = _check_draws(draws)
    ask = check_options(estimators, second_order, bounds, engine, labels)
    _check_numbers(memory_mb, seed)
    _check_mask_and_output(mask, output)
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
    chain: dict[str, LayerBound] = {}
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
            ask=ask,
        )
        if labels is not None:
            _check_labels(problem)
        plan = plan if plan is not None else Plan()
        if not plan.verified or (plan.verified == 1 and batch.size > 1):
            fresh = make_plan(problem)
            plan.__dict__.update(fresh.__dict__)
        if ask.i2 and (not plan.curved or (plan.curved == 1 and batch.size > 1)):
            check_curvature(problem, plan)
        if plan.uncurved and ask.i2:
            problem.ask = replace(ask, i2=False, exact=False)
        if engine == "backpack":
            _check_backpack(problem, plan, second_order=False)
        if ask.exact:
            _check_backpack(problem, plan, second_order=True)
        measured = measure_planned(problem, plan)
        if engine == "backpack":
            from fimprobe.engines import backpack

            known = measured.moments["i1"].parameters
            measured.moments["i1"] = backpack.measure_moments(problem, verified=True)
            for name, moments in measured.moments["i1"].parameters.items():
                moments.top_sum = known[name].top_sum  # max over labels: not among its moments
        if plan.uncurved and ask.i2:
            measured.notes.append(plan.uncurved)
        if bounds:
            chain = chain_bounds(problem, problem.batch)
    if not measured.moments["i1"].parameters:
        raise FimprobeError("the outputs depend on no trainable parameter; nothing to measure")
    report = make_report(
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


ESTIMATORS = ("i1", "i2", "ih", "empirical")


def check_options(
    estimators: Any, second_order: Any, bounds: Any, engine: Any, labels: Any = None
) -> Ask:
    """What to measure, checked; raises with argument, value and remedy."""
    wanted = [estimators] if isinstance(estimators, str) else estimators
    sequence = isinstance(wanted, Collection)
    if not sequence or not wanted or any(e not in ESTIMATORS for e in wanted):
        raise FimprobeError(f"estimators={estimators!r}: use some of {', '.join(ESTIMATORS)}")
    if labels is None and "empirical" in wanted:
        raise FimprobeError(
            "estimators holds 'empirical', which is made of the data's labels; pass labels="
        )
    if labels is not None and "empirical" not in wanted:
        raise FimprobeError(
            f"labels are given, but estimators={estimators!r} has no use for them: labels are drawn "
            "from the model. Add 'empirical' to estimators, or leave labels out"
        )
    if not isinstance(bounds, bool):
        raise FimprobeError(f"bounds={bounds!r} is no switch; use True or False")
    if engine not in ("auto", "autograd", "backpack"):
        raise FimprobeError(f"engine={engine!r} is unknown; use auto, autograd or backpack")
    probes = 2
    if isinstance(second_order, Mapping):
        probes = second_order.get("probes")  # type: ignore[assignment]
        if set(second_order) != {"probes"} or isinstance(probes, bool):
            raise FimprobeError(f"second_order={dict(second_order)!r}: use {{'probes': 2}}")
        if not isinstance(probes, int) or probes < 2:
            raise FimprobeError(
                f"second_order={dict(second_order)!r}: squares of a single probe are biased; use 2 "
                "probes or more"
            )
    elif second_order not in ("exact", "off"):
        raise FimprobeError(
            f"second_order={second_order!r} is unknown; use {{'probes': 2}}, 'exact' or 'off'"
        )
    return Ask(
        i2="i2" in wanted and second_order != "off",
        ih="ih" in wanted,
        labels=labels if "empirical" in wanted else None,
        bounds=bounds,
        probes=probes,
        exact=second_order == "exact" and "i2" in wanted,
    )


def _check_labels(problem: Problem) -> None:
    if problem.ask.labels is None:
        return
    family: Any = problem.likelihood
    with torch.no_grad():
        first = problem.forward(problem.batch[:1])
    labels = problem.ask.labels
    if not isinstance(labels, Tensor):
        raise FimprobeError(
            f"labels={type(labels).__name__} is no tensor; pass torch.as_tensor(labels), one entry "
            "for each label"
        )
    if labels.dim() == 0:
        raise FimprobeError(
            f"labels is a single number, but the batch holds {problem.batch.size} samples; pass "
            "labels [B, ...]"
        )
    if len(labels) != problem.batch.size:
        raise FimprobeError(
            f"labels has {len(labels)} entries, but the batch holds {problem.batch.size} samples; "
            "pass the labels of these samples, in their order"
        )
    family.check_labels(first.expand(problem.batch.size, *first.shape[1:]), labels)


def _check_backpack(problem: Problem, plan: Plan, *, second_order: bool) -> None:
    if plan.backpack is None or second_order not in plan.backpack:
        try:
            from fimprobe.engines import backpack
        except ImportError as error:
            raise FimprobeError(
                "engine='backpack' and second_order='exact' need BackPACK; run: pip install "
                f"'fimprobe[backpack]' ({error})"
            ) from None
        plan.backpack = (plan.backpack or {}) | {
            second_order: backpack.offending_modules(problem, second_order=second_order)
        }
    wrong = plan.backpack[second_order]
    if wrong:
        told = "; ".join(f"{path or 'the model'}: {why}" for path, why in wrong.items())
        what = "second_order='exact'" if second_order else "engine='backpack'"
        remedy = "second_order={'probes': 2}" if second_order else "engine='auto'"
        raise FimprobeError(
            f"{what} is outside the domain where BackPACK is right, because of {told}. Use {remedy}"
        )


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


def _check_numbers(memory_mb: Any, seed: Any) -> None:
    number = isinstance(memory_mb, (int, float)) and not isinstance(memory_mb, bool)
    if not number or not 0 < memory_mb < float("inf"):
        raise FimprobeError(f"memory_mb={memory_mb!r} is no ceiling; pass megabytes above 0")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise FimprobeError(f"seed={seed!r} is no seed; pass a whole number of 64 bits")


def _check_mask_and_output(mask: Any, output: Any) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise FimprobeError(
            f"mask={kind} is no boolean tensor; pass one with an entry for each label, False where "
            "there is none, such as attention_mask.bool()"
        )
    if output is not None and not callable(output):
        raise FimprobeError(
            f"output={output!r} is no function; pass one from what the model returns to the outputs "
            "[B, ...]"
        )


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
