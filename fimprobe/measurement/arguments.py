"""What can be asked of a measurement: every option checked, with argument, value and remedy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fimprobe.engines.problem.problem import Problem, Request
from fimprobe.engines.tracing.plan import Plan
from fimprobe.errors import FimprobeError

ESTIMATORS = ("i1", "i2", "ih", "empirical")


def parse_request(
    estimators: Any, second_order: Any, bounds: Any, engine: Any, labels: Any = None
) -> Request:
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
    return Request(
        i2="i2" in wanted and second_order != "off",
        ih="ih" in wanted,
        labels=labels if "empirical" in wanted else None,
        bounds=bounds,
        probes=probes,
        exact=second_order == "exact" and "i2" in wanted,
        backpack=engine == "backpack",
    )


AUTO_PASSES = 10
"""Most backward passes that ``draws="auto"`` takes for exact labels: those of ten classes."""


def check_draws(draws: Any) -> int | Literal["auto"] | None:
    """The number of labels drawn for each input; None for exact."""
    if isinstance(draws, str) and draws in ("exact", "auto"):
        return None if draws == "exact" else "auto"
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise FimprobeError(
            f"draws={draws!r} is no number of labels; pass 1, 2, ..., 'exact' or 'auto'"
        )
    return draws


def choose_draws(problem: Problem) -> int | None:
    """What ``draws="auto"`` stands for: exact labels where they are cheap, else two drawn ones."""
    with torch.no_grad():
        h = problem.forward(problem.batch[:1])
    return None if problem.likelihood.count_passes(h) <= AUTO_PASSES else 2


def check_label_sampling(label_sampling: Any) -> bool:
    """Whether drawn labels are size-biased."""
    if label_sampling not in ("size_biased", "model"):
        raise FimprobeError(
            f"label_sampling={label_sampling!r} is unknown; use 'size_biased' or 'model'"
        )
    return bool(label_sampling == "size_biased")


def check_numbers(memory_mb: Any, seed: Any) -> None:
    """Raise where the ceiling or the seed is none."""
    number = isinstance(memory_mb, (int, float)) and not isinstance(memory_mb, bool)
    if not number or not 0 < memory_mb < float("inf"):
        raise FimprobeError(f"memory_mb={memory_mb!r} is no ceiling; pass megabytes above 0")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise FimprobeError(f"seed={seed!r} is no seed; pass a whole number of 64 bits")


def check_mask_and_output(mask: Any, output: Any) -> None:
    """Raise where the mask is no boolean tensor or ``output`` no function."""
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


def check_labels(problem: Problem) -> None:
    """Raise where the data's labels do not fit the outputs."""
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


def check_backpack(problem: Problem, plan: Plan, *, second_order: bool) -> None:
    """Raise outside the domain where BackPACK is right, naming every offending module."""
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
