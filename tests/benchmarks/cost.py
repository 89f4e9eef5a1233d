"""What a measurement costs, beside peers: the tables of docs/performance.md.

python tests/benchmarks/cost.py [--rounds 11] [--ours-only] [--smooth] [--only MLP] [--times-only]

In this order: is each number the Fisher information (float64 oracle, tiny problems)? Time over one
forward+backward of the same batch, interleaved in one process. The variance of the diagonal over
repetitions, and with it the error at equal compute. Peak memory, in a child process. ``--smooth``
takes GELU for ReLU in the MLP and the CNN: where layers are piecewise linear, second derivatives
within them vanish. Peers come with the extra ``bench``; what is missing is a row that says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import dataclass, field

import torch
from clock import Ratio, interleaved, machine, versions
from footprint import in_child, peak_mb
from peers import PEERS
from problems import FULL, Problem, for_peers, forward_backward, make_problem
from rows import OURS, Contender, Row
from truth import Verdict, judge, reason
from variance import Spread, measure_spread

import fimprobe  # noqa: F401

UNIT = "forward+backward"


@dataclass
class Column:
    """What was found on one problem, by row name."""

    unit: float = 0.0
    times: dict[str, Ratio] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    spreads: dict[str, Spread] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


def contenders(
    problem: Problem, tiny: Problem, rows: list[Row]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Rows that ran once, each on a model of its own, and why the others did not."""
    found, errors = {}, {}
    for row in rows:
        try:
            if row.package != "fimprobe":  # what cannot run may ask for 100 GB before it says so
                row.make(for_peers(tiny)).run()
            made = row.make(problem if row.package == "fimprobe" else for_peers(problem))
            made.run()
            found[row.name] = made
        except Exception as error:  # a peer that cannot is a row that says so
            errors[row.name] = reason(error)
    return found, errors


def say(text: str) -> None:
    """Progress, beside the tables."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def fill(column: Column, name: str, rows: list[Row], options: argparse.Namespace) -> None:
    """Everything about one problem."""
    if not options.times_only:
        say(f"{name}: correctness")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
        for row in rows:
            tiny = make_problem(name, tiny=True, gelu=options.smooth)
            own = row.package == "fimprobe"  # the tests hold these to tighter oracles
            verdict = judge(row, tiny if own else for_peers(tiny), 25 if own else 250)
            column.verdicts[row.name] = verdict
        torch.set_num_threads(threads)
    say(f"{name}: time")
    problem = make_problem(name, gelu=options.smooth)
    tiny = make_problem(name, tiny=True, gelu=options.smooth)
    found, column.errors = contenders(problem, tiny, rows)
    runs = {n: c.run for n, c in found.items()}
    column.unit, column.times = interleaved(forward_backward(problem), runs, options.rounds)
    if options.times_only:
        return
    say(f"{name}: variance")
    for row in rows:
        if row.name in found and not row.exact:
            column.spreads[row.name] = measure_spread(row, found[row.name], problem)
    say(f"{name}: memory")
    flags = ["--smooth"] * options.smooth + ["--ours-only"] * options.ours_only
    column.memory = in_child(__file__, "--memory-of", name, *flags)


def memory_of(name: str, rows: list[Row], smooth: bool) -> dict[str, float]:
    """The child's part: MB of each row."""
    problem = make_problem(name, gelu=smooth)
    found, _ = contenders(problem, make_problem(name, tiny=True, gelu=smooth), rows)
    memory = {UNIT: peak_mb(forward_backward(problem), problem.forget)}
    return memory | {n: peak_mb(c.run, c.forget) for n, c in found.items()}


def time_cell(row: Row, column: Column) -> str:
    verdict = column.verdicts.get(row.name, Verdict())
    if row.name in column.errors:
        return "none"
    mark = "✗ " if verdict.ratios else "◐ " if verdict.missing else ""
    return f"{mark}{column.times[row.name]}"


def error_cell(row: Row, column: Column, reference: str) -> str:
    """(variance × time) of the reference over the row's, on the entries that the row covers."""
    if row.name in column.errors:
        return "none"
    if column.verdicts[row.name].ratios:
        gain = "✗"
    elif row.exact:
        gain = "no error"
    else:
        mine, other = column.spreads[row.name], column.spreads[reference]
        variance, base = mine.total(), other.total(set(mine.by_parameter))
        cost, unit = column.times[row.name].middle, column.times[reference].middle
        gain = "no error" if variance < 1e-9 * base else f"{base * unit / (variance * cost):.2g}"
        gain = ("◐ " if mine.covered < 1 else "") + gain
    memory = column.memory.get(row.name)
    return f"{gain} · {'?' if memory is None else f'{memory:.0f} MB'}"


def table(columns: dict[str, Column], lines: list[tuple[str, list[str]]]) -> None:
    print(f"\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for title, cells in lines:
        print(f"| {title} | {' | '.join(cells)} |")


def report(columns: dict[str, Column], rows: list[Row], options: argparse.Namespace) -> None:
    """The Markdown."""
    each = list(columns.values())
    print(f"\nTime over one forward+backward: medians of {options.rounds} rounds (quartiles).")
    first = [(UNIT, [f"{1e3 * c.unit:.1f} ms" for c in each])]
    table(columns, first + [(r.name, [time_cell(r, c) for c in each]) for r in rows])
    if not options.times_only:
        reference = rows[0].name
        print(
            f"\nDiagonal's 1 / (variance × time) over that of {reference} (more is better), and peak "
            "memory beyond what is resident before the run."
        )
        first = [(UNIT, [f"{c.memory.get(UNIT, float('nan')):.0f} MB" for c in each])]
        table(columns, first + [(r.name, [error_cell(r, c, reference) for c in each]) for r in rows])
    print("\nWhat is not the Fisher information of every parameter:\n")
    for row in rows:
        for name, column in columns.items():
            verdict = column.verdicts.get(row.name, Verdict())
            told = column.errors.get(row.name) or str(verdict)
            spread = column.spreads.get(row.name)
            if verdict.missing and spread is not None:  # the share counts on the problem itself
                told = told.replace(
                    f"{100 * verdict.coverage:.0f} %", f"{100 * spread.covered:.0f} %"
                )
            if told:
                print(f"- {row.name}, {name.split(',')[0].split()[0]}{tie(name)}: {told}")


def tie(name: str) -> str:
    return " tied" if name.endswith(", tied") else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--smooth", action="store_true")
    parser.add_argument("--only", default="", help="problems whose name holds this")
    parser.add_argument("--times-only", action="store_true", help="no correctness, variance, memory")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = OURS if options.ours_only else OURS + PEERS
    if options.memory_of:
        print(json.dumps(memory_of(options.memory_of, rows, options.smooth)))
        return
    packages = sorted({r.package for r in PEERS} - {"torch"}) + ["transformers"]
    print(f"{machine()}.\n{versions(packages)}.", flush=True)
    names = [n for n in FULL if options.only in n and not (options.smooth and "GPT" in n)]
    columns = {n: Column() for n in names}
    for name, column in columns.items():
        torch.manual_seed(0)
        fill(column, name, rows, options)
    report(columns, rows, options)


if __name__ == "__main__":
    main()
