"""``FimProbeCallback``: the adapter to PyTorch Lightning's Trainer."""

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

logger = logging.getLogger("fimprobe")

# both names of the package may be installed; the one that the user imported first is meant
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
_ATTACH_ARGUMENTS = ("likelihood", "log_dir", "mask", "labels", "output", "sinks")


class FimProbeCallback(_lightning.Callback):  # type: ignore[misc]
    """Watch a LightningModule's training: ``Trainer(callbacks=[FimProbeCallback(...)])``.

    The batch is what the hooked module's forward is called with inside ``training_step``, the step
    is ``trainer.global_step``, kept when training is resumed. Files go to ``fimprobe`` below
    ``trainer.log_dir`` (none with ``fast_dev_run``). With several optimizers a step is one of an
    optimizer that holds the module's parameters. ``probe`` is the :class:`fimprobe.Probe` of the
    current or last training.

    Args:
        config: as for :func:`fimprobe.attach`, and so are the ``options``.
        module: name of the sub-module whose forward ``training_step`` calls (``"model"`` for
            ``self.model(x)``); by default the LightningModule itself, ``self(x)``.
        log: also send the model's headline values to the Trainer's loggers, as ``fim/...``: of Î₁ and
            Î₂ the trace, ``rel_error`` (of the report), ``one_label_error`` (of the estimator with
            one label for each input) and ``label_variance``, where they are known.

    Raises:
        FimprobeError: for a configuration with mistakes, or a ``module`` that does not exist.

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
        self._own = {name: options.pop(name) for name in _ATTACH_ARGUMENTS if name in options}
        self._settings = load_config(config, **options)
        self._called: list[str] = []
        self._batches = 0
        self._handles: list[Any] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach."""
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            self._disable(
                f"training_step of {type(pl_module).__name__} is compiled, which hides its calls; "
                "compile a sub-module instead (self.model = torch.compile(self.model)) and pass "
                "FimProbeCallback(module='model')"
            )
            return
        target = pl_module
        if self.module is not None:
            try:
                target = pl_module.get_submodule(self.module)
            except AttributeError:
                known = ", ".join(repr(name) for name, _ in _callable(pl_module))
                raise FimprobeError(
                    f"module={self.module!r} is no sub-module of {type(pl_module).__name__}; it has "
                    f"{known or 'none'}"
                ) from None
        own = dict(self._own)
        if self._to_loggers:  # the Trainer puts a function of its own at self.log
            own["sinks"] = [*(own.get("sinks") or []), _Loggers(trainer.loggers)]
        settings = self._settings
        log_dir = _log_dir(trainer)  # asked on every process: they exchange it
        if trainer.fast_dev_run:
            settings = load_config(settings, tensorboard=False, jsonl=False)
            own.pop("log_dir", None)
        elif log_dir and settings.tensorboard and settings.tensorboard.log_dir is None:
            own.setdefault("log_dir", log_dir)
        self._detach()
        first_step = trainer.global_step // max(1, len(trainer.optimizers))
        self.probe = attach(target, settings, first_step=first_step, **own)
        if len(trainer.optimizers) > 1:
            logger.info(
                "fimprobe: %d optimizers; steps are counted for those that hold parameters of %s",
                len(trainer.optimizers),
                self._call(),
            )
        watched = {self.module or "": target, **dict(_callable(pl_module))}
        self._called, self._batches = [], 0
        self._handles = [
            module.register_forward_pre_hook(lambda m, args, name=name: self._called.append(name))
            for name, module in watched.items()
        ]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count until the first optimizer step; give the step before its forward."""
        self._batches += 1
        if self.probe is not None and len(trainer.optimizers) == 1:
            self.probe.steps = trainer.global_step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """At the first step, look whether what is probed was called."""
        probe = self.probe
        if not self._handles or probe is None or probe.detached:
            return
        if _holds(optimizer, probe.model):
            self._unhook()
            self._check_called(trainer, pl_module, probe)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach; reports stay in ``probe.history``."""
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach when training stops by an error or by hand."""
        self._detach()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Detach however training ended."""
        self._detach()

    def _check_called(self, trainer: Any, pl_module: Any, probe: Probe) -> None:
        """Say what to pass where ``training_step`` does not call what is probed."""
        called = self._called.count(self.module or "")
        if self.module is None and trainer.strategy.model is not pl_module:
            called -= self._batches  # a wrapper (DDP) passes training_step through forward
        if called > 0:
            return
        others = [name for name in dict.fromkeys(self._called) if name]
        message = (
            f"training_step of {type(pl_module).__name__} does not call {self._call()}; "
            + (f"it calls {', '.join('self.' + name for name in others)}: " if others else "")
            + f"pass FimProbeCallback(module={(others or ['...'])[0]!r})"
        )
        self._detach()
        self._disable(message)

    def _disable(self, message: str) -> None:
        if self._settings.on_error == "raise":
            raise FimprobeError(message)
        logger.warning("fimprobe: nothing is probed: %s", message)

    def _call(self) -> str:
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
    """Headline values for whatever loggers the Trainer has, at the report's step."""

    def __init__(self, loggers: list[Any]) -> None:
        self.loggers = loggers

    def write(self, report: Report) -> None:
        """The model's, where they are known."""
        known = report.scalars(layers=())
        tags = [f"fim/{kind}/{name}" for kind in ("i1", "i2") for name in _HEADLINES]
        values = {tag: known[tag] for tag in tags if tag in known}
        for each in self.loggers if values else ():
            each.log_metrics(values, step=report.step)

    def close(self) -> None:
        """The loggers are the Trainer's."""


def _log_dir(trainer: Any) -> Path | None:
    """Below the first logger's directory; a run of its own where that is not one run's."""
    directory = trainer.log_dir
    if directory is None:
        return None
    path = Path(directory) / "fimprobe"
    if getattr(trainer.logger, "log_dir", None) is None:
        path /= f"{datetime.now():%Y%m%d-%H%M%S-%f}"
    return path


def _callable(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The sub-modules that a step may call by name, those inside of containers included."""
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _callable(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield prefix + name, child


def _holds(optimizer: Optimizer, module: nn.Module) -> bool:
    mine = {id(p) for p in module.parameters()}
    return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])
