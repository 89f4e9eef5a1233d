"""``attach``: the adapter to a plain training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fimprobe.config.config import Config, load_config
from fimprobe.errors import FimprobeError
from fimprobe.likelihoods.base import Likelihood
from fimprobe.probe.optimizers import OptimizerFilter, _closure, _holds
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
    """Watch a model's training; the loop stays as it is.

    The batch is captured by a hook on ``model`` (attach to the object that the loop calls, after
    ``torch.compile`` and other wrappers); an optimizer that holds its parameters triggers, before
    it changes them. Steps are optimizer steps: accumulation counts once (its last batch is probed),
    a step that GradScaler skips not at all, an LBFGS step once (at its first closure call).

    Args:
        model: the module, ``torch.compile``d or DDP-wrapped ones included.
        config: YAML path, mapping or :class:`fimprobe.Config`; ``options`` (its fields as keywords:
            ``schedule``, ``draws``, ``batch``, ``memory_mb``, ``seed``, ...) win over it.
        optimizer: listen to this one only; by default to every torch optimizer of these parameters.
        likelihood: ``"auto"`` reads it off the model or the first loss gradients, and says so or
            says what to pass.
        log_dir: where TensorBoard files and ``fimprobe.jsonl`` go; default ``runs/fimprobe/...``.
        mask: from the forward's (args, kwargs) to a boolean tensor of the labels' shape.
        labels: the same for the data's labels, which the empirical Fisher needs; by default the
            keyword ``labels``, or what the loss's gradient at softmax or sigmoid outputs tells.
        output: from what the model returns to its outputs [B, ...].
        sinks: further objects with ``write(report)`` and ``close()``.
        first_step: the number of the step that a training resumes at.

    Raises:
        FimprobeError: for a configuration with mistakes, a model that already has a probe, or one
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
    if optimizer is not None and not _holds(optimizer, model):
        raise FimprobeError(
            f"optimizer={type(optimizer).__name__} holds none of the model's parameters; pass the "
            "one that trains this model"
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

    trains = OptimizerFilter(model)

    def before_step(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        if probe.detached or (optimizer is not None and opt is not optimizer):
            return None
        if optimizer is None and not trains.known(opt, afresh=probe.due):
            return None
        found_inf = getattr(opt, "found_inf", None)  # GradScaler with a fused optimizer
        closure, put = _closure(args, kwargs)
        if closure is None:
            probe.step(found_inf=found_inf)
            return None
        first = True

        def probed() -> Any:
            nonlocal first
            loss = closure()
            if first:  # the parameters are still those of the batch
                first = False
                probe.step(found_inf=found_inf)
            return loss

        return put(probed)

    probe.on_detach(register_optimizer_step_pre_hook(before_step).remove)
    if probe.log_dir is not None:
        print(f"fimprobe: tensorboard --logdir {probe.log_dir}")
    return probe
