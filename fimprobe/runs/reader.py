"""Read the reports of a run from its file, and one tidy row for each estimate in them."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from fimprobe.errors import FimprobeError
from fimprobe.estimators.names import RECORD_KEYS
from fimprobe.runs.validation import is_report, is_run, parse_line
from fimprobe.sinks.jsonl import FILE_NAME

logger = logging.getLogger("fimprobe")

MAX_DEPTH = 4
"""Depth of the search below a folder: ``output_dir/runs/<time>/fimprobe`` is at depth three."""

_STARTS = ('{"step": ', '{"run": ', '{"end": ')
"""Starts of the lines that fimprobe writes."""


class _Lines(NamedTuple):
    """The parsed lines of a file, and its defects."""

    reports: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    notes: list[str]
    ends: list[str]


class Records(list[dict[str, Any]]):
    """Rows with ``step``, ``group``, ``name``, ``estimator``, ``numel`` and an estimate's values.

    ``group`` is "total", "layer" or "parameter". ``estimator`` is "i1", "i2", "ih" or "empirical";
    for layers also "activation" (Î₁ of the layer's input) and "geometry" (norms and the bounds (20),
    (21)). Values have the names of :class:`fimprobe.Estimate` and :class:`fimprobe.Geometry`; None
    is unknown.
    """

    def __init__(self, path: Path, lines: _Lines) -> None:
        super().__init__(row for report in lines.reports for row in _rows(report))
        self.path = path
        """The path of the file."""
        self.reports = lines.reports
        """The reports as :meth:`fimprobe.Report.to_dict` returns them, in the order of the file."""
        self.runs = lines.runs
        """Model, settings (``config``), likelihood and its origin, versions and device, from
        ``first_step`` on. A training that resumed has one for each part."""
        self.notes = lines.notes
        """The defects of the file."""
        self.end = lines.ends[-1] if lines.ends else ""
        """Why probing ended before the training; "" if it did not, or if a report follows."""

    @property
    def run(self) -> dict[str, Any]:
        """The newest of ``runs``; empty for the file of an older version, which did not write it."""
        return self.runs[-1] if self.runs else {}

    def frame(self) -> Any:
        """Return the rows as a pandas ``DataFrame``, with NaN for values that a row does not have.

        Raises:
            FimprobeError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise FimprobeError(
                "frame() needs pandas, which is not installed. Run pip install pandas, or use the "
                "rows, which are plain dicts."
            ) from None
        return pandas.DataFrame(list(self))


def read(run: str | Path) -> Records:
    """Read the reports of a run from its ``fimprobe.jsonl``, also while the run still writes.

    A torn last line (after a crash) and damaged ones are left out, with a warning (logger
    ``fimprobe``) and a note in ``.notes``.

    Args:
        run: The folder that ``attach`` printed, a folder above it that has a single run, such as that
            of a Trainer, or the file itself.

    Returns:
        The rows, with the reports in ``.reports``.

    Raises:
        FimprobeError: If there is no such file, several of them, none with a report, or one that
            fimprobe did not write.

    >>> import tempfile, torch, fimprobe
    >>> folder, net = tempfile.mkdtemp(), torch.nn.Linear(2, 2)
    >>> options = {"likelihood": "categorical", "tensorboard": False}
    >>> with fimprobe.attach(net, jsonl=f"{folder}/fimprobe.jsonl", **options) as probe:
    ...     report = probe.step(torch.ones(4, 2))
    >>> rows = fimprobe.read(folder)
    >>> {name: rows[0][name] for name in ("step", "group", "name", "estimator", "numel")}
    {'step': 0, 'group': 'total', 'name': 'total', 'estimator': 'i1', 'numel': 6}
    >>> [r["trace"] for r in rows if r["name"] == "bias" and r["estimator"] == "i1"] == [
    ...     report.parameters["bias"].i1.trace
    ... ]
    True
    >>> rows.reports == [report.to_dict()], rows.run["model"], rows.run["config"]["draws"]
    (True, 'Linear', 2)
    """
    path = _find(Path(run).expanduser())
    lines = _load(path)
    for note in lines.notes:
        logger.warning("fimprobe: %s", note)
    return Records(path, lines)


def find_runs(folder: Path) -> list[Path]:
    """Return the file of a folder, or else the files of the runs below it, newest first."""
    if (folder / FILE_NAME).is_file():
        return [folder / FILE_NAME]
    paths = []
    for inside, subfolders, files in os.walk(folder):
        if len(Path(inside).relative_to(folder).parts) >= MAX_DEPTH:
            subfolders.clear()
        if FILE_NAME in files:
            paths.append(Path(inside) / FILE_NAME)
    return sorted(paths, key=lambda path: -path.stat().st_mtime)


def latest_training(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the reports since the step last decreased: the newest training of a file."""
    starts = [i for i in range(1, len(reports)) if reports[i]["step"] <= reports[i - 1]["step"]]
    return reports[starts[-1] :] if starts else reports


def _find(path: Path) -> Path:
    """Return the file of a run."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FimprobeError(
            f"`run` must be a directory with a {FILE_NAME}, got {str(path)!r}, which does not exist. "
            "Pass the directory that attach() printed."
        )
    paths = find_runs(path)
    if not paths:
        raise FimprobeError(
            f"`run` must be a directory with a {FILE_NAME}, got {str(path)!r}, which has none. Pass "
            "the directory that attach() printed."
        )
    if len(paths) > 1:
        names = "".join(f"\n  {file.parent}" for file in paths[:10])
        more = f"\n  and {len(paths) - 10} older" if len(paths) > 10 else ""
        raise FimprobeError(
            f"`run` must be a directory with a single run, got {str(path)!r}, which has {len(paths)} "
            f"runs. Pass one of them (newest first):{names}{more}"
        )
    return paths[0]


def _load(path: Path) -> _Lines:
    """Return the lines of a file, and its defects."""
    lines = _Lines(reports=[], runs=[], notes=[], ends=[])
    foreign_line = damaged_line = 0
    defect = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                if not _add_record(lines, parse_line(line), path, number):
                    foreign_line = foreign_line or number
                    continue
                defect = ""
            except ValueError as error:
                if not any(line.startswith(start[: len(line)]) for start in _STARTS):
                    foreign_line = foreign_line or number
                    continue
                is_torn = isinstance(error, json.JSONDecodeError) and line[-1] != "\n"
                defect = "torn (a crash, or still being written)" if is_torn else "damaged"
                damaged_line = number
                lines.notes.append(f"{path}: line {number} is {defect}; its report is left out")
    # one line of something else among reports, as a crash of the machine leaves it, hides no report
    if foreign_line:
        if not lines.reports and not damaged_line and not lines.ends:
            raise _foreign_file(path, foreign_line)
        lines.notes.append(f"{path}: line {foreign_line} is not a report; it is left out")
    if not lines.reports and lines.ends:
        raise FimprobeError(
            f"`run` must have a report, got {str(path)!r} without one: {lines.ends[-1].rstrip('.')}."
        )
    if not lines.reports:
        kind = "torn" if defect.startswith("torn") else "damaged"
        reason = f"line {damaged_line} is {kind}" if damaged_line else "the file is empty"
        remedy = "Pass another run." if kind == "damaged" and damaged_line else "Try again later."
        raise FimprobeError(
            f"`run` must have a report, got {str(path)!r} without one ({reason}). {remedy}"
        )
    return lines


def _add_record(lines: _Lines, record: Any, path: Path, number: int) -> bool:
    """Add the record of line ``number`` to the reports or to the runs.

    Args:
        lines: Where it is added.
        record: The contents of the line.
        path: The file.
        number: The number of the line.

    Returns:
        Whether fimprobe wrote it.

    Raises:
        ValueError: If fimprobe wrote it, and it is damaged.
    """
    if not isinstance(record, dict):
        return False
    if "run" in record and "step" not in record:
        if not is_run(record["run"]):
            raise ValueError("not a run")
        lines.runs.append(record["run"])
        return True
    if isinstance(record.get("end"), dict) and "step" not in record:
        if not isinstance(record["end"].get("reason"), str):
            raise ValueError("not an end")
        lines.ends.append(record["end"]["reason"])
        return True
    if not {"step", "total", "layers"} <= set(record):
        return False
    if not is_report(record):
        raise ValueError("not a report")
    if lines.reports and record["step"] <= lines.reports[-1]["step"]:
        lines.notes.append(
            f"{path}: steps go back from {lines.reports[-1]['step']} to {record['step']} at line "
            f"{number}: more than one training wrote here"
        )
    lines.reports.append(record)
    lines.ends.clear()  # a training that resumed measures again
    return True


def _foreign_file(path: Path, line: int) -> FimprobeError:
    return FimprobeError(
        f"`run` must be a file that fimprobe wrote, got {str(path)!r}, whose line {line} is not a "
        f"report. Pass the directory that attach() printed, or its {FILE_NAME}."
    )


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each estimate of a report: of the model, the layers, the parameters."""
    groups = [("total", "total", report["total"])]
    groups += [("layer", name, group) for name, group in report["layers"].items()]
    groups += [("parameter", name, group) for name, group in report.get("parameters", {}).items()]
    return [
        {"step": report["step"], "group": level, "name": name, "estimator": key}
        | {"numel": group["numel"]}
        | group[key]
        for level, name, group in groups
        for key in RECORD_KEYS
        if key in group
    ]
