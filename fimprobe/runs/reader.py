"""Reading back what a run wrote: the reports, and one tidy row for each estimate in them."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from fimprobe.errors import FimprobeError
from fimprobe.sinks.jsonl import FILE_NAME

logger = logging.getLogger("fimprobe")

DEPTH = 4
"""Folders below the one given that are searched: ``output_dir/runs/<time>/fimprobe`` is three."""

ESTIMATORS = ("i1", "i2", "ih", "empirical", "activation", "geometry")


class _Lines(NamedTuple):
    """What a file holds."""

    reports: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    notes: list[str]


class Records(list[dict[str, Any]]):
    """Rows ``step, group, name, estimator, numel`` and the values of that estimate.

    ``group`` is "total", "layer" or "parameter"; ``estimator`` "i1", "i2", "ih", "empirical", and of
    layers "activation" (Î₁ of the layer's input), and "geometry" (norms and the bounds (20), (21)).
    Values are named and defined as in :class:`fimprobe.Estimate` and :class:`fimprobe.Geometry`;
    None is unknown.
    """

    def __init__(self, path: Path, lines: _Lines) -> None:
        super().__init__(row for report in lines.reports for row in _rows(report))
        self.path = path
        """The file that was read."""
        self.reports = lines.reports
        """The reports as :meth:`fimprobe.Report.to_dict` gives them, in the order of the file."""
        self.runs = lines.runs
        """What was measured and how: model, settings (``config``), likelihood and how it was decided,
        versions, device; from ``first_step`` on. A training that resumed has one for each part."""
        self.notes = lines.notes
        """What is wrong with the file."""

    @property
    def run(self) -> dict[str, Any]:
        """The newest of ``runs``; empty for files of versions that did not write it."""
        return self.runs[-1] if self.runs else {}

    def frame(self) -> Any:
        """The rows as a pandas ``DataFrame``; what a row does not have is NaN.

        Raises :class:`FimprobeError` where pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise FimprobeError(
                "frame() needs pandas; run: pip install pandas (the rows themselves are plain dicts)"
            ) from None
        return pandas.DataFrame(list(self))


def read(run: str | Path) -> Records:
    """The reports of a run, read back from the ``fimprobe.jsonl`` that it wrote (or is writing).

    ``run`` is the folder that ``attach`` printed, a Trainer's run or a folder further out that holds
    a single one, or the file. A last line that a crash tore is left out, which is said (logger
    ``fimprobe``, ``.notes``).

    Raises:
        FimprobeError: where there is no such file, none with a report, one that fimprobe did not
            write, or several (named in the message).

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
    """The files of the runs in a folder and below, newest first; its own alone where it has one."""
    if (folder / FILE_NAME).is_file():
        return [folder / FILE_NAME]
    found = []
    for inside, inner, files in os.walk(folder):
        if len(Path(inside).relative_to(folder).parts) >= DEPTH:
            inner.clear()
        if FILE_NAME in files:
            found.append(Path(inside) / FILE_NAME)
    return sorted(found, key=lambda file: -file.stat().st_mtime)


def latest_training(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reports since the step last went back: of several trainings in one file, the newest."""
    backs = [i for i in range(1, len(reports)) if reports[i]["step"] <= reports[i - 1]["step"]]
    return reports[backs[-1] :] if backs else reports


def _find(path: Path) -> Path:
    """The file of a run."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FimprobeError(
            f"run={str(path)!r} does not exist; pass the directory that attach() printed"
        )
    found = find_runs(path)
    if not found:
        raise FimprobeError(
            f"run={str(path)!r} holds no {FILE_NAME}; pass the directory that attach() printed"
        )
    if len(found) > 1:
        names = "".join(f"\n  {file.parent}" for file in found[:10])
        more = f"\n  and {len(found) - 10} older" if len(found) > 10 else ""
        raise FimprobeError(
            f"run={str(path)!r} holds {len(found)} runs; pass one (newest first):{names}{more}"
        )
    return found[0]


def _load(path: Path) -> _Lines:
    """The lines of a file, and what is wrong with it."""
    reports: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    notes: list[str] = []
    torn = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                report = json.loads(line)
            except json.JSONDecodeError:
                if not any(
                    line.startswith(start[: len(line)]) for start in ('{"step": ', '{"run": ')
                ):
                    raise _foreign(path, number) from None
                torn = number
                what = "torn (a crash, or still being written)" if line[-1] != "\n" else "damaged"
                notes.append(f"{path}: line {number} is {what}; its report is left out")
                continue
            if isinstance(report, dict) and "first_step" in (report.get("run") or ()):
                runs.append(report["run"])
                continue
            if not isinstance(report, dict) or not {"step", "total", "layers"} <= set(report):
                raise _foreign(path, number)
            if reports and report["step"] <= reports[-1]["step"]:
                notes.append(
                    f"{path}: steps go back from {reports[-1]['step']} to {report['step']} at line "
                    f"{number}: more than one training wrote here"
                )
            reports.append(report)
    if not reports:
        why = f"line {torn} is torn" if torn else "the file is empty"
        raise FimprobeError(f"run={str(path)!r} holds no report yet ({why}); try again later")
    return _Lines(reports, runs, notes)


def _foreign(path: Path, line: int) -> FimprobeError:
    return FimprobeError(
        f"run={str(path)!r} was not written by fimprobe: line {line} is no report; pass the "
        f"directory that attach() printed, or its {FILE_NAME}"
    )


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each estimate of a report: the model's, the layers', the parameters'."""
    groups = [("total", "total", report["total"])]
    groups += [("layer", name, group) for name, group in report["layers"].items()]
    groups += [("parameter", name, group) for name, group in report.get("parameters", {}).items()]
    return [
        {"step": report["step"], "group": kind, "name": name, "estimator": estimator}
        | {"numel": group["numel"]}
        | group[estimator]
        for kind, name, group in groups
        for estimator in ESTIMATORS
        if estimator in group
    ]
