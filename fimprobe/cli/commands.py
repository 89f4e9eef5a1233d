"""The parser of the command line, and its commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fimprobe.cli.fisher_commands import add_fisher_parsers, run_audit, run_estimate
from fimprobe.errors import FimprobeError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit status: 0, or 1 with a message on standard error.
    """
    parser = argparse.ArgumentParser(
        prog="fimprobe", description="Know how wrong your Fisher information is."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train two small networks with a probe, and show it")
    demo.add_argument("--epochs", type=int, default=12, help="epochs of each model (default 12)")
    demo.add_argument("--log-dir", default="runs/fimprobe/demo", help="where the runs are written")
    demo.add_argument("--open", action="store_true", help="open the charts in the browser at the end")
    check = commands.add_parser("check", help="check a YAML configuration")
    check.add_argument("config", help="path of the YAML file")
    show = commands.add_parser("show", help="a run: its last report, advice and trends; or two runs")
    show.add_argument(
        "run",
        nargs="+",
        help="directory that attach() printed; two to compare; one with several runs to list them",
    )
    show.add_argument("--top", type=int, default=20, help="layers shown (default 20)")
    show.add_argument("--html", metavar="FILE", help="write a page to open in a browser instead")
    add_fisher_parsers(commands)
    options = parser.parse_args(argv)
    try:
        return int(_COMMANDS[options.command](options))
    except FimprobeError as error:
        message = str(error)
        # several mistakes begin on a new line, so that they form a column
        separator = "\n" if "\n" in message and options.command == "check" else " "
        print(f"fimprobe {options.command}:{separator}{message}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0


def _demo(options: Any) -> int:
    from fimprobe.cli.demo import run_demo

    if options.epochs < 1:
        raise FimprobeError(f"`--epochs` must be a positive integer, got {options.epochs}.")
    run_demo(epochs=options.epochs, log_dir=options.log_dir, open_page=options.open)
    return 0


def _check(options: Any) -> int:
    from fimprobe.config.config import load_config
    from fimprobe.measurement.arguments import import_backpack

    config = load_config(options.config)
    config.schedule.build()
    if config.engine == "backpack" or config.second_order == "exact":
        import_backpack()  # a training would raise it at its first measurement
    print(f"{options.config}: good")
    return 0


def _show(options: Any) -> int:
    from fimprobe.report.format import terminal_width
    from fimprobe.report.table import wrap
    from fimprobe.runs.reader import find_runs, latest_training, read
    from fimprobe.runs.terminal import show_comparison, show_list, show_run

    if len(options.run) > 2:
        raise FimprobeError(
            f"`run` must be one directory, or two to compare, got {len(options.run)}."
        )
    if len(options.run) == 2 and options.html:
        raise FimprobeError(
            "`--html` must be used with a single run, got two. Write a page for each of them."
        )
    if options.top < 1:
        raise FimprobeError(f"`--top` must be a positive integer, got {options.top}.")
    files = find_runs(Path(options.run[0]).expanduser()) if len(options.run) == 1 else []
    if len(files) > 1 and not options.html:
        show_list(options.run[0], files)
        return 0
    runs = [read(run) for run in options.run]
    if options.html:
        from fimprobe.runs.html import write_page

        print(f"{write_page(runs[0], options.html)}: open it in a browser")
        return 0
    reports = [latest_training(run.reports) for run in runs]
    if len(runs) == 1:
        show_run(reports[0], top=options.top, run=runs[0].run)
        if runs[0].end:
            print()
            print("\n".join(wrap([f"The probe ended early: {runs[0].end}"], terminal_width())))
        return 0
    for name, run in zip("AB", runs, strict=True):
        print(f"{name}: {run.path.parent}")
    show_comparison(reports[0], reports[1], top=options.top, runs=(runs[0].run, runs[1].run))
    return 0


_COMMANDS = {
    "demo": _demo,
    "check": _check,
    "show": _show,
    "estimate": run_estimate,
    "audit": run_audit,
}


if __name__ == "__main__":
    sys.exit(main())
