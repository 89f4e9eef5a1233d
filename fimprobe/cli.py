"""The command line: ``fimprobe demo | check | show``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from fimprobe.types import FimprobeError


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
    show = commands.add_parser("show", help="print the last report of a run, and its trend")
    show.add_argument("run", help="directory that attach() printed")
    show.add_argument("--top", type=int, default=20, help="layers shown (default 20)")
    options = parser.parse_args(argv)
    try:
        return int(_COMMANDS[options.command](options))
    except FimprobeError as error:
        print(f"fimprobe {options.command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0


def _demo(options: Any) -> int:
    from fimprobe.demo import run_demo

    if options.epochs < 1:
        raise FimprobeError(f"--epochs={options.epochs} trains nothing; pass a number from 1")
    run_demo(epochs=options.epochs, log_dir=options.log_dir)
    return 0


def _check(options: Any) -> int:
    from fimprobe.config import load_config

    load_config(options.config)
    print(f"{options.config}: good")
    return 0


def _show(options: Any) -> int:
    from fimprobe.sinks.jsonl import read_jsonl
    from fimprobe.table import format_table, format_trend

    records = read_jsonl(options.run)
    if not records:
        raise FimprobeError(f"run={options.run!r} holds no report yet")
    print(format_table(records[-1], top=options.top))
    if len(records) > 1:
        print("\n" + format_trend(records))
    return 0


_COMMANDS = {"demo": _demo, "check": _check, "show": _show}


if __name__ == "__main__":
    sys.exit(main())
