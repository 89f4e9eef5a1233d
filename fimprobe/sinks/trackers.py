"""Experiment trackers: Weights & Biases, and MLflow. Each is imported at the first report only."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import Any

from fimprobe.errors import FimprobeError
from fimprobe.report.report import Report

STEP = "fim_probe/step"
"""The name of the step in W&B, whose own step counts all calls of ``log``."""


class WandbSink:
    """Logs the numbers of the whole model to the active run of W&B, or to one that it starts.

    Its charts have the training step as their axis. W&B's own settings hold: its project, its mode
    ("offline", for example) and its folder come from ``wandb.init`` or from the environment.

    Args:
        run: Returns what is measured and how, as the configuration of a run that the sink starts.

    Raises:
        FimprobeError: If wandb is not installed.
    """

    def __init__(self, *, run: Callable[[], dict[str, Any]] = dict) -> None:
        _require("wandb")
        self._describe_run = run
        self._run: Any = None
        self._is_own = False

    def write(self, report: Report) -> None:
        """Log the numbers of one report."""
        import wandb

        if self._run is None:
            self._run, self._is_own = wandb.run, wandb.run is None
            if self._is_own:
                self._run = wandb.init(project="fimprobe", config=self._describe_run())
            self._run.define_metric(STEP, hidden=True)
            for group in ("fim/*", "fim_bounds/*", "fim_outputs/*", "fim_probe/*"):
                self._run.define_metric(group, step_metric=STEP)
        # without a step: the steps of W&B must rise, and the training's own calls count them
        self._run.log(report.scalars(layers=()) | {STEP: report.step})

    def close(self) -> None:
        """Finish the run if this sink started it."""
        if self._is_own:
            self._run.finish()
            self._is_own = False


class MlflowSink:
    """Logs the numbers of the whole model to the active run of MLflow, or to one that it starts.

    The address of the server and the experiment are those of MLflow or of its environment.

    Args:
        run: Returns what is measured and how, as tags of a run that the sink starts.

    Raises:
        FimprobeError: If mlflow is not installed.
    """

    def __init__(self, *, run: Callable[[], dict[str, Any]] = dict) -> None:
        _require("mlflow")
        self._describe_run = run
        self._run_id = ""
        self._is_own = False

    def write(self, report: Report) -> None:
        """Log the numbers of one report."""
        import mlflow

        if not self._run_id:
            active = mlflow.active_run()
            self._is_own = active is None
            if active is None:
                active = mlflow.start_run()
                info = self._describe_run()
                mlflow.set_tags({f"fimprobe.{name}": str(info[name])[:500] for name in info})
            self._run_id = active.info.run_id
        values = {re.sub(r"[^\w\-. /]", "_", k): v for k, v in report.scalars(layers=()).items()}
        mlflow.log_metrics(values, step=report.step, run_id=self._run_id)

    def close(self) -> None:
        """Finish the run if this sink started it."""
        if self._is_own:
            import mlflow

            active = mlflow.active_run()
            if active is not None and active.info.run_id == self._run_id:
                mlflow.end_run()
            self._is_own = False


TRACKERS: dict[str, Callable[..., WandbSink | MlflowSink]] = {
    "wandb": WandbSink,
    "mlflow": MlflowSink,
}
"""The sinks by the names of their options."""


def _require(package: str) -> None:
    """Raise if a package is not installed; its import waits for the first report."""
    if importlib.util.find_spec(package) is None:
        raise FimprobeError(
            f"`{package}: true` needs {package}, which is not installed. Run pip install {package}, "
            "or leave the option out."
        )
