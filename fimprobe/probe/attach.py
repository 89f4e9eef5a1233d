"""``attach``: the adapter to a plain training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fimprobe.config.config import Config, load_config
from fimprobe.errors import BatchError, FimprobeError
from fimprobe.likelihoods.base import Likelihood
from fimprobe.probe.optimizers import (
    Arguments,
    ClosureOrder,
    OptimizerFilter,
    find_closure,
    holds_parameters,
    parameter_versions,
    replace_closure,
)
from fimprobe.probe.probe import Probe
from fimprobe.sinks.base import Sink


def attach(
    model: nn.Module,
    config: str | Path | Mapping[str, Any] | Config | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    likelihood: str | Likelihood = "auto",
    log_dir: str | Path | None = None,
    mask: Callable[[tuple[Any, ...], dict[str, Any]], Tensor] | None = None,
    labels: Callable[[tuple[Any, ...], dict[str, Any]], Tensor] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    sinks: list[Sink] | None = None,
    first_step: int = 0,
    **options: Any,
) -> Probe:
    """Watch the training of a model; the loop stays as it is.

    A hook on ``model`` captures the batch, so attach to the object that the loop calls, after
    ``torch.compile`` and other wrappers. An optimizer that holds parameters of the model triggers the
    probe before it changes them. Steps are optimizer steps. Accumulated batches count as one step,
    whose last batch is measured; steps that GradScaler skips are not counted; a step of LBFGS counts
    once, at the first call of its closure.

    Args:
        model: The module, compiled or DDP-wrapped ones included.
        config: YAML path, mapping or :class:`fimprobe.Config`; ``options`` win over it.
        optimizer: The only optimizer to listen to; by default all torch optimizers of the parameters.
        likelihood: ``"auto"`` infers it from the model or the first loss gradients, and reports the
            result or what to pass.
        log_dir: Folder of TensorBoard files and ``fimprobe.jsonl``; by default one below
            ``runs/fimprobe``.
        mask: From the forward's (args, kwargs) to a boolean tensor of the labels' shape.
        labels: From the forward's (args, kwargs) to the labels of the data [B, ...] for the empirical
            Fisher; by default the keyword ``labels``, or what the loss gradient at softmax or sigmoid
            outputs shows.
        output: From what the model returns to its outputs [B, ...].
        sinks: Further objects with ``write(report)`` and ``close()``.
        first_step: Number of the step at which a training resumes.
        options: Fields of :class:`fimprobe.Config`, such as ``schedule``, ``draws`` or ``batch``.

    Returns:
        The probe, which measures until its ``detach`` is called.

    Raises:
        FimprobeError: For a configuration with mistakes, a model that already has a probe, or one
            without trainable parameters.

    >>> net = nn.Linear(2, 2)
    >>> probe = attach(net, likelihood="categorical", tensorboard=False)
    >>> probe.detach()
    """
    if log_dir is not None:
        options["tensorboard"] = {"log_dir": str(log_dir)}
    if likelihood != "auto":
        options["likelihood"] = likelihood
    settings = load_config(config, **options)
    if optimizer is not None and not holds_parameters(optimizer, model):
        raise FimprobeError(
            f"`optimizer` must hold parameters of the model, got {type(optimizer).__name__} without "
            "any. Pass the one that trains this model."
        )
    probe = Probe(
        model,
        settings,
        mask=mask,
        labels=labels,
        output=output,
        sinks=sinks,
        first_step=first_step,
    )
    _trigger_by_optimizers(probe, optimizer)
    if probe.log_dir is not None:
        print(f"fimprobe: tensorboard --logdir {probe.log_dir}")
    return probe


def _trigger_by_optimizers(probe: Probe, only: torch.optim.Optimizer | None) -> None:
    """Call ``probe.step`` before each step of the model's optimizers, or of ``only`` that one."""
    of_model, order = OptimizerFilter(probe.model), ClosureOrder()

    def before_step(
        optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        """Measure before the step of an optimizer of the model, or in its closure.

        Args:
            optimizer: Any optimizer of the process.
            args: Positional arguments of its ``step``, the optimizer first.
            kwargs: Keyword arguments of its ``step``.

        Returns:
            Arguments with an observed closure; None to leave them as they are.
        """
        if probe.detached or (only is not None and optimizer is not only):
            return None
        if only is None and not of_model.matches(optimizer, refresh=probe.due):
            return None
        # GradScaler sets it on a fused optimizer, which skips the step itself
        step = partial(probe.step, found_inf=getattr(optimizer, "found_inf", None))
        closure = find_closure(args, kwargs)
        if closure is not None:
            closure = _observe_closure(probe, optimizer, step, closure, order)
            return replace_closure(args, kwargs, closure)
        step()
        return None

    probe.on_detach(register_optimizer_step_pre_hook(before_step).remove)


def _observe_closure(
    probe: Probe,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], Any],
    closure: Callable[[], Any],
    order: ClosureOrder,
) -> Callable[[], Any]:
    """Return a closure that calls ``step`` once, at the parameters before the optimizer's step.

    Args:
        probe: The probe.
        optimizer: The optimizer that calls the closure.
        step: Measures the captured batch if it is due.
        closure: The closure that the loop passed.
        order: Which optimizers move the parameters before they call their closure.
    """
    versions = parameter_versions(probe.model) if probe.due else []
    pending = True
    if probe.backward_done and not order.closure_comes_first(optimizer):
        # sharpness-aware optimizers: the gradients exist, and the parameters move before the closure
        step()
        pending = False

    def observed_closure() -> Any:
        nonlocal pending, versions
        moved = bool(versions) and versions != parameter_versions(probe.model)
        if versions and not moved:
            order.record_closure_first(optimizer)
        versions = []
        loss = closure()
        if not pending:
            probe.discard_batch()  # later evaluations are at other parameters
            return loss
        pending = False
        if moved:
            probe.discard_batch(
                BatchError(
                    "the optimizer changed the parameters before it called its closure. Call "
                    "backward before optimizer.step(closure), or probe.step(inputs) yourself."
                )
            )
        step()
        return loss

    return observed_closure
