"""``attach``: the adapter to a plain training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.config.config import Config, load_config
from fimprobe.errors import FimprobeError
from fimprobe.likelihoods import LikelihoodOption
from fimprobe.probe.arguments import check_sinks
from fimprobe.probe.notices import print_command
from fimprobe.probe.optimizers import holds_parameters
from fimprobe.probe.probe import Probe
from fimprobe.probe.registry import find_probe
from fimprobe.probe.step_hook import trigger_by_optimizers
from fimprobe.sinks.base import Sink


def attach(
    model: nn.Module,
    config: str | Path | Mapping[str, Any] | Config | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    likelihood: LikelihoodOption = "auto",
    log_dir: str | Path | None = None,
    mask: Callable[[tuple[Any, ...], dict[str, Any]], Tensor] | None = None,
    labels: Callable[[tuple[Any, ...], dict[str, Any]], Tensor] | None = None,
    output: Callable[[Any], Any] | None = None,
    loss: nn.Module | None = None,
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
        log_dir: Folder of TensorBoard files and ``fimprobe.jsonl``, of the latter alone with
            ``tensorboard=False``; by default one below ``runs/fimprobe``.
        mask: From the forward's (args, kwargs) to a boolean tensor of the labels' shape.
        labels: From the forward's (args, kwargs) to the labels of the data [B, ...] for the empirical
            Fisher; by default the keyword ``labels``, or what the loss gradient at softmax or sigmoid
            outputs shows.
        output: From what the model returns to its outputs [B, ...], or to a mean and a variance.
        loss: In place of ``likelihood``, the criterion of the loop: ``torch.nn.CrossEntropyLoss``,
            ``BCEWithLogitsLoss``, ``MSELoss``, ``PoissonNLLLoss`` or ``GaussianNLLLoss``.
            ``probe.decision`` states what was taken from it, and a warning what its options change
            that the family does not have.
        sinks: Further objects with ``write(report)`` and ``close()``.
        first_step: Number of the step at which a training resumes.
        options: Fields of :class:`fimprobe.Config`, such as ``schedule``, ``draws`` or ``batch``.

    Returns:
        The probe, which measures until its ``detach`` is called, another one is attached to the
        model, or the model is freed.

    Raises:
        FimprobeError: For a configuration with mistakes, and for a model without trainable
            parameters.

    >>> net = nn.Linear(2, 2)
    >>> probe = attach(net, likelihood="categorical", tensorboard=False)
    >>> probe.detach()
    """
    if likelihood != "auto":
        options["likelihood"] = likelihood
    settings = load_config(config, **options)
    if log_dir is not None:
        settings = settings.with_log_dir(log_dir)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise FimprobeError(
            f"`optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}. Pass the "
            "one that trains this model, or leave it out."
        )
    check_sinks(sinks)
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
        loss=loss,
        sinks=sinks,
        first_step=first_step,
        replace=True,
    )
    try:
        trigger_by_optimizers(probe, optimizer)
        # what other optimizers than the given one change is no step
        probe.notice_unseen_steps(counts_changes=optimizer is None)
        if probe.log_dir is not None:
            print_command(probe.log_dir, probe.errors)
    except BaseException:
        probe.detach()
        raise
    return probe


def detach(model: nn.Module) -> Probe | None:
    """Detach the probe of a model, for a training that kept no handle or ended by an exception.

    A model that is dropped needs no call: its probe ends with it.

    Args:
        model: The model, wrapped or not.

    Returns:
        The probe, whose history stays readable; None if the model has none.

    Raises:
        FimprobeError: If ``model`` is not a module.

    >>> net = nn.Linear(2, 2)
    >>> probe = attach(net, likelihood="categorical", tensorboard=False)
    >>> detach(net) is probe, detach(net)
    (True, None)
    """
    if not isinstance(model, nn.Module):
        raise FimprobeError(
            f"`model` must be a torch.nn.Module, got {type(model).__name__}. Pass the model that has "
            "the probe."
        )
    probe: Probe | None = find_probe(model)
    if probe is not None:
        probe.detach()
    return probe
