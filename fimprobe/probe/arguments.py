"""Checks of the probe's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fimprobe.config.config import Config
from fimprobe.errors import ErrorHandler, FimprobeError
from fimprobe.measurement.arguments import check_model
from fimprobe.model.fsdp.placement import check_sharded, is_sharded
from fimprobe.training.likelihood_inference.criteria import Criterion, read_criterion


def warn_of_contradictions(config: Config, errors: ErrorHandler) -> None:
    """Warn of estimators that are named and switched off by another option.

    Args:
        config: The options.
        errors: Logs the warning.
    """
    named = "estimators" in config.model_fields_set and "i2" in config.estimators
    if named and config.second_order == "off":
        errors.warn_once(
            "`estimators` names 'i2', which second_order='off' leaves out. Pass second_order="
            "{'probes': 2}, or leave 'i2' out"
        )


def criterion_of(loss: Any, config: Config) -> Criterion | None:
    """Return what the argument ``loss`` implies; None without one.

    Args:
        loss: The criterion of the training loop, or None.
        config: The options.

    Raises:
        FimprobeError: If the criterion implies no family, or the options name one too.
    """
    if loss is None:
        return None
    if not (isinstance(config.likelihood, str) and config.likelihood == "auto"):
        raise FimprobeError(
            f"`loss` must be left out where the likelihood is given, got both, with likelihood="
            f"{config.likelihood!r}. Pass one of them."
        )
    return read_criterion(loss)


def check_probe_arguments(
    model: Any, config: Config, functions: Mapping[str, Callable[..., Any] | None]
) -> None:
    """Check the model, and that the arguments that must be functions are some.

    Args:
        model: The object that the loop calls.
        config: The options.
        functions: The arguments ``mask``, ``labels`` and ``output`` by name.

    Raises:
        FimprobeError: For a model that cannot be measured with these options, and for an argument
            that is no function.
    """
    check_model(model)
    for name, function in functions.items():
        if function is not None and not callable(function):
            source = "what the model returns" if name == "output" else "the forward's (args, kwargs)"
            raise FimprobeError(
                f"`{name}` must be a function, got {type(function).__name__}. Pass one from {source} "
                "to a tensor."
            )
    if is_sharded(model):
        check_sharded(
            model,
            estimators=config.estimators,
            bounds=config.bounds,
            draws=config.draws,
            engine=config.engine,
        )


def check_sinks(sinks: Any) -> None:
    """Check that the argument ``sinks`` is a list of objects that reports can be written to.

    Raises:
        FimprobeError: If it is not.
    """
    if sinks is None:
        return
    if not isinstance(sinks, (list, tuple)):
        raise FimprobeError(
            f"`sinks` must be a list, got {type(sinks).__name__}. Pass objects with write(report) "
            "and close(), as in sinks=[mine]."
        )
    for sink in sinks:
        if not all(callable(getattr(sink, name, None)) for name in ("write", "close")):
            raise FimprobeError(
                "`sinks` must hold objects with write(report) and close(), got "
                f"{type(sink).__name__}. Give its class both methods."
            )
