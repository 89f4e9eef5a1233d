"""``FimProbeCallback`` for the Trainer of PyTorch Lightning."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fimprobe import Config, FimprobeError, Probe, Report, attach, load_config
from fimprobe.errors import ErrorHandler, guarded
from fimprobe.torchvision_compat import hide_broken_torchvision

logger = logging.getLogger("fimprobe")

hide_broken_torchvision()  # before Lightning's torchmetrics imports torchvision

# both names of the package may be installed; the name that the user imported decides
_NAMES = sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules)
for _name in _NAMES:
    try:
        _lightning: Any = importlib.import_module(_name)
        break
    except ModuleNotFoundError as error:
        if error.name not in ("lightning", "lightning.pytorch", "pytorch_lightning"):
            raise
else:
    raise FimprobeError("PyTorch Lightning is not installed; pip install 'fimprobe[lightning]'")

_HEADLINES = ("trace", "rel_error", "one_label_error", "label_variance")
_ATTACH_ARGUMENTS = ("likelihood", "log_dir", "mask", "labels", "output", "loss", "sinks")


class FimProbeCallback(_lightning.Callback):  # type: ignore[misc]
    """Measure during the training of a LightningModule.

    Pass it as ``Trainer(callbacks=[FimProbeCallback(...)])``. The batch consists of the arguments
    with which ``training_step`` calls the forward of the module. Steps are ``trainer.global_step``,
    also after resuming. With several optimizers they are the steps of those that hold parameters of
    the module. Files go to ``fimprobe`` below ``trainer.log_dir``; ``fast_dev_run`` writes none.
    ``probe`` is the :class:`fimprobe.Probe` of the current or last training.

    Args:
        config: As for :func:`fimprobe.attach`.
        module: Name of the sub-module whose forward ``training_step`` calls (``"model"`` for
            ``self.model(x)``); by default the LightningModule itself, ``self(x)``.
        log: Whether headline values also go to the Trainer's loggers, as ``fim/...``: the trace,
            ``rel_error`` (of the report), ``one_label_error`` (of the estimator with one label per
            input) and ``label_variance`` of Î₁ and Î₂, where they are known.
        options: Further arguments of :func:`fimprobe.attach`.

    Raises:
        FimprobeError: For a configuration with mistakes, or a ``module`` that does not exist.

    >>> FimProbeCallback(schedule={"every": 100}, likelihood="categorical").probe is None
    True
    """

    def __init__(
        self,
        config: str | Path | Mapping[str, Any] | Config | None = None,
        *,
        module: str | None = None,
        log: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.probe: Probe | None = None
        self.module, self._to_loggers = module, log
        self._attach_arguments = {
            name: options.pop(name) for name in _ATTACH_ARGUMENTS if name in options
        }
        self._config = load_config(config, **options)
        self.errors = self._make_handler()  # the probe's, once there is one
        self._called_modules: list[str] = []
        self._num_batches = 0
        self._handles: list[Any] = []

    @guarded(defers=False, raises_mistakes=True)
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the module, and observe which modules ``training_step`` calls."""
        self._detach()
        self.probe, self.errors = None, self._make_handler()
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            self._disable(
                f"training_step of {type(pl_module).__name__} is compiled, which hides its calls; "
                "compile a sub-module instead (self.model = torch.compile(self.model)) and pass "
                "FimProbeCallback(module='model')"
            )
            return
        target = self._target(pl_module)
        arguments = dict(self._attach_arguments)
        if self._to_loggers:  # not named self.log: the Trainer assigns a function to that attribute
            arguments["sinks"] = [*(arguments.get("sinks") or []), _Loggers(trainer.loggers)]
        config = self._config
        log_dir = _log_dir(trainer)  # on every process, because they exchange it
        if trainer.fast_dev_run:
            config = load_config(config, tensorboard=False, jsonl=False)
            arguments.pop("log_dir", None)
        elif log_dir and config.tensorboard and config.tensorboard.log_dir is None:
            arguments.setdefault("log_dir", log_dir)
        first_step = trainer.global_step // max(1, len(trainer.optimizers))
        self.probe = attach(target, config, first_step=first_step, **arguments)
        self.errors = self.probe.errors
        if len(trainer.optimizers) > 1:
            logger.info(
                "fimprobe: %d optimizers; steps are counted for those that hold parameters of %s",
                len(trainer.optimizers),
                self._describe_target(),
            )
        observed = {self.module or "": target, **dict(_callable_modules(pl_module))}
        self._called_modules, self._num_batches = [], 0
        self._handles = [
            module.register_forward_pre_hook(
                lambda m, args, name=name: self._called_modules.append(name)
            )
            for name, module in observed.items()
        ]

    @guarded(defers=False)
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch, and set the number of the step before its forward."""
        self._num_batches += 1
        if self.probe is not None and len(trainer.optimizers) == 1:
            self.probe.steps = trainer.global_step

    @guarded(defers=False)
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Check at the first step that ``training_step`` called the probed module."""
        probe = self.probe
        if not self._handles or probe is None or probe.detached:
            return
        if _holds(optimizer, probe.model):
            self._unhook()
            self._check_called(trainer, pl_module, probe)

    @guarded(defers=False)
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach the probe; reports stay in ``probe.history``."""
        self._detach()

    @guarded(defers=False)
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach the probe when an error or the user stops the training."""
        self._detach()

    @guarded(defers=False)
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Detach the probe, however the training ended."""
        self._detach()

    def _target(self, pl_module: Any) -> Any:
        """Return the module to probe.

        Raises:
            FimprobeError: If the LightningModule has no sub-module of that name.
        """
        if self.module is None:
            return pl_module
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError:
            names = ", ".join(repr(name) for name, _ in _callable_modules(pl_module))
            raise FimprobeError(
                f"module must name a sub-module of {type(pl_module).__name__}, got {self.module!r}. "
                f"Pass one of: {names or 'none exist'}."
            ) from None

    def _check_called(self, trainer: Any, pl_module: Any, probe: Probe) -> None:
        """Stop probing with a remedy if ``training_step`` does not call the probed module."""
        num_calls = self._called_modules.count(self.module or "")
        if self.module is None and trainer.strategy.model is not pl_module:
            num_calls -= self._num_batches  # a wrapper (DDP) runs training_step inside forward
        if num_calls > 0:
            return
        others = [name for name in dict.fromkeys(self._called_modules) if name]
        message = (
            f"training_step of {type(pl_module).__name__} does not call {self._describe_target()}; "
            + (f"it calls {', '.join('self.' + name for name in others)}: " if others else "")
            + f"pass FimProbeCallback(module={(others or ['...'])[0]!r})"
        )
        self._detach()
        self._disable(message)

    def _make_handler(self) -> ErrorHandler:
        return ErrorHandler(raises=self._config.on_error == "raise")

    def _disable(self, message: str) -> None:
        if self.errors.raises:
            raise FimprobeError(message)
        self.errors.end(f"nothing is probed, training continues: {message}")

    def _describe_target(self) -> str:
        return "its own forward, self(...)" if self.module is None else f"self.{self.module}"

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _detach(self) -> None:
        self._unhook()
        if self.probe is not None:
            self.probe.detach()


class _Loggers:
    """A sink that sends headline values to all loggers of the Trainer, at the report's step."""

    def __init__(self, loggers: list[Any]) -> None:
        self.loggers = loggers

    def write(self, report: Report) -> None:
        """Send the known headline values of the whole model."""
        known = report.scalars(layers=())
        tags = [f"fim/{kind}/{name}" for kind in ("i1", "i2") for name in _HEADLINES]
        values = {tag: known[tag] for tag in tags if tag in known}
        for trainer_logger in self.loggers if values else ():
            trainer_logger.log_metrics(values, step=report.step)

    def close(self) -> None:
        """Do nothing: the Trainer closes its loggers."""


def _log_dir(trainer: Any) -> Path | None:
    """Return ``fimprobe`` below the first logger's directory, plus the time if runs share it."""
    directory = trainer.log_dir
    if directory is None:
        return None
    path = Path(directory) / "fimprobe"
    if getattr(trainer.logger, "log_dir", None) is None:
        path /= f"{datetime.now():%Y%m%d-%H%M%S-%f}"
    return path


def _callable_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the sub-modules that a step may call by name, including those inside containers."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _callable_modules(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield prefix + name, child


def _holds(optimizer: Optimizer, module: nn.Module) -> bool:
    ids = {id(p) for p in module.parameters()}
    return any(id(p) in ids for group in optimizer.param_groups for p in group["params"])
