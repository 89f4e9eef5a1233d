"""The command line: ``fimprobe demo | check | show``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fimprobe.errors import FimprobeError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 1 with the mistake on standard error."""
    parser = argparse.ArgumentParser(
        prog="fimprobe", description="Know how wrong your Fisher information is."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train on scikit-learn's digits, probed")
    demo.add_argument("--epochs", type=int, default=60, help="epochs of each model (default 60)")
    demo.add_argument("--log-dir", default="runs/fimprobe/demo", help="where the runs are written")
    check = commands.add_parser("check", help="check a YAML configuration")
    check.add_argument("config", help="path of the YAML file")
    show = commands.add_parser("show", help="a run's last report, advice and trends, or two runs")
    show.add_argument(
        "run",
        nargs="+",
        help="directory that attach() printed, two to compare; of one with several runs a list",
    )
    show.add_argument("--top", type=int, default=20, help="layers shown (default 20)")
    show.add_argument("--html", metavar="FILE", help="write a page to open in a browser instead")
    options = parser.parse_args(argv)
    try:
        return int(_COMMANDS[options.command](options))
    except FimprobeError as error:
        told = str(error)  # several mistakes start on a line of their own, to stand in a column
        start = "\n" if "\n" in told and options.command == "check" else " "
        print(f"fimprobe {options.command}:{start}{told}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0


def _demo(options: Any) -> int:
    from fimprobe.cli.demo import run_demo

    if options.epochs < 1:
        raise FimprobeError(f"--epochs={options.epochs} trains nothing; pass a number from 1")
    run_demo(epochs=options.epochs, log_dir=options.log_dir)
    return 0


def _check(options: Any) -> int:
    from fimprobe.config.config import load_config

    load_config(options.config)
    print(f"{options.config}: good")
    return 0


def _show(options: Any) -> int:
    from fimprobe.runs.reader import find_runs, latest_training, read
    from fimprobe.runs.terminal import show_comparison, show_list, show_run

    if len(options.run) > 2:
        raise FimprobeError(f"{len(options.run)} runs are too many; pass one, or two to compare")
    if len(options.run) == 2 and options.html:
        raise FimprobeError(f"--html={options.html!r} takes one run; write a page for each")
    if options.top < 1:
        raise FimprobeError(f"--top={options.top} shows no layer; pass a number from 1")
    inside = find_runs(Path(options.run[0]).expanduser()) if len(options.run) == 1 else []
    if len(inside) > 1 and not options.html:
        show_list(options.run[0], inside)
        return 0
    runs = [read(run) for run in options.run]
    if options.html:
        from fimprobe.runs.html import write_page

        print(f"{write_page(runs[0], options.html)}: open it in a browser")
        return 0
    reports = [latest_training(run.reports) for run in runs]
    if len(runs) == 1:
        show_run(reports[0], top=options.top, run=runs[0].run)
        return 0
    for name, run in zip("AB", runs, strict=True):
        print(f"{name}: {run.path.parent}")
    show_comparison(reports[0], reports[1], top=options.top, runs=(runs[0].run, runs[1].run))
    return 0


_COMMANDS = {"demo": _demo, "check": _check, "show": _show}


if __name__ == "__main__":
    sys.exit(main())
