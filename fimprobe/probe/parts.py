"""The parts of a probe that its arguments and options determine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fimprobe.config.config import Config
from fimprobe.distributed.processes import ProcessGroup, SingleProcess, join_processes
from fimprobe.errors import ErrorHandler, describe_error
from fimprobe.probe.arguments import check_probe_arguments, criterion_of
from fimprobe.training.batch_reader import BatchReader, Mask
from fimprobe.training.report_costs import Extent
from fimprobe.training.schedule import Budget, Schedule
from fimprobe.training.shared_budget import SharedBudget


def make_reader(
    model: nn.Module,
    config: Config,
    errors: ErrorHandler,
    *,
    mask: Mask | None,
    labels: Mask | None,
    output: Callable[[Any], Tensor] | None,
    loss: nn.Module | None,
) -> BatchReader:
    """Check the arguments of a probe, and return the reader of its batches.

    Args:
        model: The object that the loop calls.
        config: The options.
        errors: Logs the warnings of the reader.
        mask: Function for the label mask, or None.
        labels: Function for the data labels, or None.
        output: From what the model returns to its outputs [B, ...], or None.
        loss: The criterion that implies the likelihood, or None.

    Raises:
        FimprobeError: For wrong arguments.
    """
    check_probe_arguments(model, config, {"mask": mask, "labels": labels, "output": output})
    return BatchReader(
        model,
        mask=mask,
        labels=labels,
        output=output,
        criterion=criterion_of(loss, config),
        warn=errors.warn_once,
    )


def join_training(errors: ErrorHandler) -> ProcessGroup:
    """Return the group of this training's processes.

    Args:
        errors: Ends probing if not all processes join, and knows afterwards whether several do.

    Raises:
        FimprobeError: If not all processes join and errors are to be raised.
    """
    processes: ProcessGroup = SingleProcess()
    try:
        processes = join_processes()
    except Exception as error:
        if errors.raises:
            raise
        errors.end(f"nothing is probed, training continues: {describe_error(error)}")
    errors.together = processes.size > 1
    return processes


def make_schedule(config: Config, model: nn.Module, *, shared: bool) -> Schedule:
    """Return the schedule of the options.

    Args:
        config: The options.
        model: The object that the loop calls: what a report costs depends on the number of layers.
        shared: Whether several processes measure together.
    """
    schedule = config.schedule.build()
    if not isinstance(schedule, Budget):
        return schedule
    has_i2 = "i2" in config.estimators
    schedule.costs.extents = [
        *([Extent.PREVIEW] if config.bounds or has_i2 else []),
        *([Extent.WITHOUT_BOUNDS] if config.bounds and has_i2 else []),
        Extent.WHOLE,
    ]
    schedule.costs.num_layers = sum(
        any(True for _ in module.parameters(recurse=False)) for module in model.modules()
    )
    return SharedBudget(schedule) if shared else schedule
