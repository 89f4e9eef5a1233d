"""Opens the files of a run: charts and JSON lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fimprobe.config.config import Config
from fimprobe.config.sections import TensorboardConfig
from fimprobe.sinks.base import Sink
from fimprobe.sinks.sink_group import SinkGroup
from fimprobe.training.schedule import Schedule


def open_run_files(
    sinks: SinkGroup,
    config: Config,
    *,
    schedule: Schedule,
    overhead: Callable[[], float | None],
    describe_run: Callable[[], dict[str, Any]],
    first_step: int,
) -> Path | None:
    """Open the files that the options name.

    Args:
        sinks: Receives the sinks that write them.
        config: The options.
        schedule: Decides when there is time for figures.
        overhead: Returns the share of the wall time that the probe took so far, if it is known.
        describe_run: Returns what the run measures.
        first_step: Step at which a training resumes; 0 for a new one. Later records are dropped.

    Returns:
        The folder of the charts, or None if there are none.
    """
    purge_step = first_step or None

    def open_tensorboard(log_dir: Path, settings: TensorboardConfig) -> Sink:
        """Return a sink that writes charts.

        Args:
            log_dir: The folder of the charts.
            settings: The section ``tensorboard`` of the options.
        """
        # tensorboard is imported only if it is used
        from fimprobe.sinks.tensorboard.sink import TensorboardSink

        return TensorboardSink(
            log_dir,
            top=config.layers.top,
            include=config.layers.include,
            exclude=config.layers.exclude,
            run=describe_run,
            histograms=settings.histograms,
            figures=settings.figures,
            schedule=schedule,
            overhead=overhead,
            purge_step=purge_step,
        )

    return sinks.open_files(
        config,
        open_tensorboard=open_tensorboard,
        describe_run=describe_run,
        purge_step=purge_step,
    )
