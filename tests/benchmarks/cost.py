"""What a measurement costs, beside peers: the tables of docs/performance.md.

python tests/benchmarks/cost.py [--rounds 7] [--ours-only] [--smooth] [--only MLP] [--times-only]

In this order: is each number the Fisher information (float64 oracle, tiny problems)? Time over one
forward+backward of the same batch, interleaved in one process. The variance of the diagonal over
repetitions, and with it the error at equal compute. Peak memory, in a child process. ``--smooth``
takes GELU for ReLU in the MLP and the CNN: where layers are piecewise linear, second derivatives
within them vanish. Peers come with the extra ``bench``; what is missing is a row that says so.
``suite.py`` prints the same tables and compares them with the committed ones.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from clock import Progress, Ratio, interleaved, machine, versions
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


def fill(
    column: Column, name: str, rows: list[Row], options: argparse.Namespace, progress: Progress
) -> None:
    """Everything about one problem."""
    short = name.split()[0]
    if not options.times_only:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
        for row in rows:
            progress.step(f"{short}, correctness: {row.name}")
            tiny = make_problem(name, tiny=True, gelu=options.smooth)
            own = row.package == "fimprobe"  # the tests hold these to tighter oracles
            verdict = judge(row, tiny if own else for_peers(tiny), 25 if own else 250)
            column.verdicts[row.name] = verdict
        torch.set_num_threads(threads)
    progress.step(f"{short}, first runs")
    problem = make_problem(name, gelu=options.smooth)
    tiny = make_problem(name, tiny=True, gelu=options.smooth)
    found, column.errors = contenders(problem, tiny, rows)
    runs = {n: c.run for n, c in found.items()}
    column.unit, column.times = interleaved(
        forward_backward(problem),
        runs,
        options.rounds,
        lambda i: progress.step(f"{short}, time: round {i + 1}"),
    )
    if options.times_only:
        return
    for row in rows:
        progress.step(f"{short}, variance: {row.name}")
        if row.name in found and not row.exact:
            column.spreads[row.name] = measure_spread(row, found[row.name], problem)
    progress.step(f"{short}, memory")
    flags = ["--smooth"] * options.smooth + ["--ours-only"] * options.ours_only
    column.memory = in_child(str(Path(__file__).with_name("cost.py")), "--memory-of", name, *flags)


def count_steps(rows: list[Row], options: argparse.Namespace) -> int:
    """The steps of the progress bar for one problem."""
    return options.rounds + 1 + (0 if options.times_only else 2 * len(rows) + 1)


def memory_of(name: str, rows: list[Row], smooth: bool) -> dict[str, float]:
    """The child's part: MB of each row."""
    problem = make_problem(name, gelu=smooth)
    found, _ = contenders(problem, make_problem(name, tiny=True, gelu=smooth), rows)
    memory = {UNIT: peak_mb(forward_backward(problem), problem.forget)}
    return memory | {n: peak_mb(c.run, c.forget) for n, c in found.items()}


def time_cell(row: Row, column: Column) -> str:
    verdict = column.verdicts.get(row.name, Verdict())
    if row.name in column.errors:
        return absent(column.errors[row.name])
    mark = "✗ " if verdict.ratios else "◐ " if verdict.missing else ""
    return f"{mark}{column.times[row.name]}"


def absent(error: str) -> str:
    """The cell of a row that does not run."""
    return "not installed" if error.startswith("ModuleNotFoundError") else "–"


def error_cell(row: Row, column: Column, reference: str) -> str:
    """(variance × time) of the reference over the row's, on the entries that the row covers."""
    if row.name in column.errors:
        return absent(column.errors[row.name])
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


def table(columns: dict[str, Column], lines: list[tuple[str, list[str]]]) -> str:
    head = f"\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"
    return "\n".join([head, *(f"| {title} | {' | '.join(cells)} |" for title, cells in lines)])


def report(columns: dict[str, Column], rows: list[Row], options: argparse.Namespace) -> str:
    """The Markdown."""
    each = list(columns.values())
    text = [f"\nTime over one forward+backward: medians of {options.rounds} rounds (quartiles)."]
    first = [(UNIT, [f"{1e3 * c.unit:.1f} ms" for c in each])]
    text.append(table(columns, first + [(r.name, [time_cell(r, c) for c in each]) for r in rows]))
    if not options.times_only:
        reference = rows[0].name
        text.append(
            f"\nDiagonal's 1 / (variance × time) over that of {reference} (more is better), and peak "
            "memory beyond what is resident before the run."
        )
        first = [(UNIT, [f"{c.memory.get(UNIT, float('nan')):.0f} MB" for c in each])]
        lines = [(r.name, [error_cell(r, c, reference) for c in each]) for r in rows]
        text.append(table(columns, first + lines))
    text.append("\nWhat is not the Fisher information of every parameter:\n")
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
                text.append(f"- {row.name}, {name.split(',')[0].split()[0]}{tie(name)}: {told}")
    return "\n".join(text)


def tie(name: str) -> str:
    return " tied" if name.endswith(", tied") else ""


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line, or of ``arguments``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="1 where other programs run: processor time")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--smooth", action="store_true")
    parser.add_argument("--only", default="", help="problems whose name holds this")
    parser.add_argument("--tied", action="store_true", help="also GPT-2 with tied weights")
    parser.add_argument("--times-only", action="store_true", help="no correctness, variance, memory")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def measure_columns(options: argparse.Namespace) -> tuple[dict[str, Column], list[Row]]:
    """All columns of the tables, with a progress bar on standard error, and their rows."""
    rows = OURS if options.ours_only else OURS + PEERS
    names = [n for n in FULL if options.only in n and not (options.smooth and "GPT" in n)]
    names = [n for n in names if options.tied or not tie(n)]
    columns = {n: Column() for n in names}
    progress = Progress(len(names) * count_steps(rows, options))
    for name, column in columns.items():
        torch.manual_seed(0)
        fill(column, name, rows, options, progress)
    progress.finish()
    return columns, rows


def main() -> None:
    options = parse_options()
    warnings.filterwarnings("ignore")
    if options.memory_of:
        rows = OURS if options.ours_only else OURS + PEERS
        print(json.dumps(memory_of(options.memory_of, rows, options.smooth)))
        return
    print_machine()
    columns, rows = measure_columns(options)
    print(report(columns, rows, options))


def print_machine() -> None:
    """The machine, and the versions of the packages."""
    packages = sorted({r.package for r in PEERS} - {"torch"}) + ["transformers"]
    print(f"{machine()}.\n{versions(packages)}.", flush=True)


if __name__ == "__main__":
    main()
