"""Scalars and text for TensorBoard."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from fimprobe.report import Report
from fimprobe.types import GroupEstimates

_SCALARS = (
    "trace",
    "std_error",
    "rel_error",
    "label_variance",
    "input_variance",
    "total_label_variance",
    "bound",
    "sharp_bound",
    "trace_bound",
    "diagonal_bound",
    "covariance_norm",
    "covariance_spectral_norm",
    "tightness",
    "probe_error",
    "cosine",
    "trace_ratio",
)


class TensorboardSink:
    """Writes ``fim/i1/*`` for the model, ``fim_layers/<layer>/i1_*`` for the layers that need most.

    The layers are chosen at the first report and kept. All scalars of a report go in one record.
    ``purge_step``: where a training resumes; readers drop what the folder holds of this step and
    later ones, and the layers are those charted before.
    """

    def __init__(
        self,
        log_dir: str | Path,
        *,
        top: int = 12,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        about: str = "",
        purge_step: int | None = None,
    ) -> None:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        before = None if purge_step is None else _charted(Path(log_dir))
        self.writer = SummaryWriter(str(log_dir), purge_step=purge_step)
        self.top, self.include, self.exclude = top, include or ["*"], exclude or []
        self.about = about
        self.layers = before
        self._told = False

    def write(self, report: Report) -> None:
        """Write one report."""
        if self.layers is None:
            self.layers = self._choose(report)
        if not self._told:
            self._told = True
            coverage = "\n".join(f"| {n} | {how} |" for n, how in report.coverage.items())
            self.writer.add_text(
                "fimprobe/about",
                f"{self.about}\n\nlikelihood: {report.likelihood}\n\n"
                f"| parameter | measured by |\n|---|---|\n{coverage}",
                report.step,
            )
        values: dict[str, Any] = {}
        for kind in ("i1", "i2", "ih", "empirical"):
            total = getattr(report.total, kind)
            if total is not None:
                values |= {f"fim/{kind}/{name}": getattr(total, name) for name in _SCALARS}
                values[f"fim/{kind}/pairs_for_10_percent"] = total.draws_for(0.1)
        values["fim_probe/seconds"] = report.seconds
        for layer in self.layers:
            if layer in report.layers:
                values |= _layer(f"fim_layers/{layer}/", report.layers[layer])
        summary = Summary(
            value=[
                Summary.Value(tag=tag, simple_value=float(value))
                for tag, value in values.items()
                if value is not None
            ]
        )
        self.writer._get_file_writer().add_summary(summary, report.step)
        self.writer.add_text("fimprobe/advice", "\n\n".join(report.advice), report.step)
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()

    def _choose(self, report: Report) -> list[str]:
        def need(item: tuple[str, GroupEstimates]) -> float:
            return -(item[1].i1.draws_for(0.1) or 0.0)

        wanted = [
            (name, group)
            for name, group in report.layers.items()
            if any(fnmatchcase(name, p) for p in self.include)
            and not any(fnmatchcase(name, p) for p in self.exclude)
        ]
        chosen = {name for name, _ in sorted(wanted, key=need)[: self.top]}
        return [name for name, _ in wanted if name in chosen]


def _charted(log_dir: Path) -> list[str] | None:
    """The layers of the first report in a folder; None where it holds none."""
    for path in sorted(log_dir.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            tags = [value.tag for value in event.summary.value]
            if any(tag.startswith("fim/") for tag in tags):
                names = (t.split("/", 1)[1] for t in tags if t.startswith("fim_layers/"))
                return list(dict.fromkeys(name.rsplit("/", 1)[0] for name in names))
    return None


def _layer(prefix: str, group: GroupEstimates) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for kind in ("i1", "i2"):
        estimate = getattr(group, kind)
        if estimate is not None:
            for name in ("trace", "rel_error", "label_variance", "tightness", "trace_tightness"):
                values[f"{prefix}{kind}_{name}"] = getattr(estimate, name)
            values[f"{prefix}{kind}_pairs_for_10_percent"] = estimate.draws_for(0.1)
    if group.activation is not None:
        values[f"{prefix}input_i1_trace"] = group.activation.trace
        values[f"{prefix}input_i1_label_variance"] = group.activation.label_variance
    if group.geometry is not None:
        for name in ("jacobian_norm", "spectral_bound", "weight_spectral_norm"):
            values[f"{prefix}{name}"] = getattr(group.geometry, name)
    return values
