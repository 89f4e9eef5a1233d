"""Checks of ``measure``'s arguments: options by the configuration's model, tensors and model here."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.config.config import Config
from fimprobe.config.sections import SecondOrderConfig
from fimprobe.engines.problem.problem import Problem, Request
from fimprobe.engines.tracing.plan import Plan
from fimprobe.errors import FimprobeError
from fimprobe.measurement.tensor_checks import check_dense
from fimprobe.model.twin import trainable

MAX_AUTO_PASSES = 10
"""Backward passes up to which ``draws="auto"`` uses exact labels: those of ten classes."""


def check_model(model: Any) -> None:
    """Check that there is something to measure.

    Raises:
        FimprobeError: If ``model`` is no module, or has no trainable parameters.
    """
    if not isinstance(model, nn.Module):
        raise FimprobeError(
            f"`model` must be a torch.nn.Module, got {type(model).__name__}. Pass the module that "
            "the training loop calls."
        )
    if not trainable(model):
        raise FimprobeError(
            "`model` must have trainable parameters, got none with requires_grad=True. Unfreeze "
            "the parameters that are to be measured."
        )


def make_request(options: Config, labels: Any) -> Request:
    """Return what is measured besides Î₁.

    Args:
        options: Checked options.
        labels: Labels of the data [B, ...] for the empirical Fisher, or None.

    Raises:
        FimprobeError: If labels are missing, or not used by any estimator.
    """
    estimators = options.estimators
    if labels is None and "empirical" in estimators:
        raise FimprobeError(
            f"`labels` must be given for the estimator 'empirical', got None with "
            f"estimators={estimators!r}. Pass labels= or leave 'empirical' out."
        )
    if labels is not None and "empirical" not in estimators:
        raise FimprobeError(
            f"`labels` must be None without the estimator 'empirical', got labels with "
            f"estimators={estimators!r}: the others draw labels from the model. Add 'empirical' to "
            "estimators, or leave labels out."
        )
    second_order = options.second_order
    probes = second_order.probes if isinstance(second_order, SecondOrderConfig) else 2
    return Request(
        i2="i2" in estimators and second_order != "off",
        ih="ih" in estimators,
        labels=labels,
        bounds=options.bounds,
        probes=probes,
        exact=second_order == "exact" and "i2" in estimators,
        spot_checks=second_order == "spot_checks" and "i2" in estimators,
        backpack=options.engine == "backpack",
        auto=second_order == "auto" and "i2" in estimators,
    )


def check_mask_and_output(mask: Any, output: Any) -> None:
    """Check the types of the options ``mask`` and ``output``.

    Args:
        mask: A boolean tensor of the labels' shape, or None.
        output: A function from what the model returns to the outputs [B, ...], or None.

    Raises:
        FimprobeError: If the mask is no boolean tensor, or ``output`` no function.
    """
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise FimprobeError(
            f"`mask` must be a boolean tensor with an entry for each label, got {kind}. Pass "
            "attention_mask.bool() or the like, with False where there is no label."
        )
    if mask is not None:
        check_dense(mask, "mask")
        if mask.dim() == 0:
            raise FimprobeError(
                "`mask` must have an entry for each label, got shape (). Pass a tensor of the "
                "labels' shape [B, ...]."
            )
    if output is not None and not callable(output):
        raise FimprobeError(
            f"`output` must be a function, got {output!r}. Pass one from what the model returns to "
            "the outputs [B, ...]."
        )


def choose_draws(problem: Problem) -> int | None:
    """Return the draws of ``draws="auto"``: None (exact) if exact labels are cheap, else 2."""
    outputs = problem.evaluate(problem.batch[:1])
    return None if problem.likelihood.count_passes(outputs) <= MAX_AUTO_PASSES else 2


def check_labels(problem: Problem) -> None:
    """Check that the labels of the data fit the outputs; None is accepted.

    Raises:
        FimprobeError: If they are no tensor, have another number of samples, or do not suit the
            likelihood.
    """
    labels = problem.request.labels
    if labels is None:
        return
    size = problem.batch.size
    if not isinstance(labels, Tensor):
        raise FimprobeError(
            f"`labels` must be a tensor with one entry for each label, got {type(labels).__name__}. "
            "Pass torch.as_tensor(labels)."
        )
    if labels.dim() == 0 or len(labels) != size:
        raise FimprobeError(
            f"`labels` must be [B, ...] with B = {size} samples as in the batch, got shape "
            f"{tuple(labels.shape)}. Pass the labels of these samples, in their order."
        )
    first = problem.evaluate(problem.batch[:1])
    likelihood: Any = problem.likelihood  # the method is optional in the protocol
    likelihood.check_labels(first.expand(size, *first.shape[1:]), labels)


def import_backpack() -> ModuleType:
    """Return the module of the engine.

    Raises:
        FimprobeError: If BackPACK cannot be imported.
    """
    try:
        from fimprobe.engines import backpack
    except ImportError as error:
        raise FimprobeError(
            "engine='backpack' and second_order='exact' need BackPACK, which cannot be imported "
            f"({error}). Run: pip install backpack-for-pytorch"
        ) from None
    return backpack


def check_backpack(problem: Problem, plan: Plan, *, second_order: bool) -> None:
    """Check that every module is in the domain where BackPACK was verified.

    Args:
        problem: The measurement.
        plan: Keeps the answer for later measurements of the model.
        second_order: Whether exact second derivatives are computed, or first-order moments.

    Raises:
        FimprobeError: With every module outside of the domain, or if BackPACK cannot be imported.
    """
    if plan.backpack is None or second_order not in plan.backpack:
        backpack = import_backpack()
        plan.backpack = (plan.backpack or {}) | {
            second_order: backpack.offending_modules(problem, second_order=second_order)
        }
    offending = plan.backpack[second_order]
    if offending:
        reasons = "; ".join(f"{path or 'the model'}: {why}" for path, why in offending.items())
        option = "second_order='exact'" if second_order else "engine='backpack'"
        remedy = "second_order='auto'" if second_order else "engine='auto'"
        raise FimprobeError(
            f"{option} is outside the domain where BackPACK is right, because of {reasons}. Use "
            f"{remedy}"
        )
