"""``fimprobe demo``: train an MLP and a CNN on handwritten digits with a probe attached."""

from __future__ import annotations

import contextlib
import time
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import fimprobe
from fimprobe.cli.digits import Digits, load_digits, make_cnn, make_mlp
from fimprobe.errors import FimprobeError
from fimprobe.report.format import listed, percent
from fimprobe.report.report import Report
from fimprobe.report.trends import format_trend
from fimprobe.runs.html import write_page

BATCH_SIZE = 64

REPORTS = 12
"""Reports of each training: enough for its trend."""


class Outcome(NamedTuple):
    """What a training and its reports show."""

    reports: list[Report]
    accuracy: float
    """The share of the held-out digits that the model has right."""
    confidence: float
    """The mean probability of its answers to them."""


def run_demo(*, epochs: int, log_dir: str, open_page: bool = False) -> dict[str, list[Report]]:
    """Train both models, and print the reports of their probes.

    Args:
        epochs: Epochs of each model.
        log_dir: The folder of the runs.
        open_page: Whether to open a page with all charts in the browser.

    Returns:
        The reports by the name of the model.

    Raises:
        FimprobeError: If scikit-learn or tqdm is not installed.
    """
    try:
        from tqdm import tqdm

        digits = load_digits()
    except ImportError as error:
        raise FimprobeError(
            f"The demo needs {error.name}, which is not installed. Run pip install 'fimprobe[demo]'."
        ) from None
    run = Path(log_dir) / f"{time.strftime('%Y%m%d-%H%M%S')}"
    with _one_thread():
        outcomes = _train_and_print(digits, tqdm, epochs=epochs, run=run)
    print(f"\nAll charts:                  tensorboard --logdir {run}")
    print(f"The numbers in the terminal: fimprobe show {run / 'mlp'}")
    print(f"The same as one page:        fimprobe show {run / 'mlp'} --html page.html")
    if open_page:
        _open_pages(run, list(outcomes))
    print("\n" + "\n".join(describe_outcomes(outcomes)))
    return {name: outcome.reports for name, outcome in outcomes.items()}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: several only wait for one another where networks are so small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train_and_print(
    digits: Digits, show_progress: Callable[..., Any], *, epochs: int, run: Path
) -> dict[str, Outcome]:
    """Train both models, and print their last reports; return the outcomes by name.

    Args:
        digits: The data.
        show_progress: Wraps the numbers of the epochs.
        epochs: Epochs of each model.
        run: The folder of the runs.
    """
    outcomes = {}
    batches = -(-len(digits.x) // BATCH_SIZE)
    for name, make in {"mlp": make_mlp, "cnn": make_cnn}.items():
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        order = torch.Generator().manual_seed(1)
        schedule = {"every": max(epochs * batches // REPORTS, 1)}
        options: dict[str, Any] = {"draws": "exact", "batch": BATCH_SIZE, "schedule": schedule}
        with fimprobe.attach(model, log_dir=run / name, **options) as probe:
            for _ in show_progress(range(epochs), desc=name, unit="epoch"):
                model.train()
                for rows in torch.randperm(len(digits.x), generator=order).split(BATCH_SIZE):
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(digits.x[rows]), digits.y[rows])
                    loss.backward()
                    optimizer.step()
        outcomes[name] = _evaluate(model, probe, digits)
        _print_results(name, probe)
    return outcomes


def describe_outcomes(outcomes: dict[str, Outcome]) -> list[str]:
    """Return in three sentences what the demo shows.

    Args:
        outcomes: The trainings by the names of their models.
    """
    right = [f"the {name} has {percent(o.accuracy)}" for name, o in outcomes.items()]
    sure = [percent(o.confidence) for o in outcomes.values()]
    drawn, exact = [], []
    for name, outcome in outcomes.items():
        reports = [report.error_of("i1", inputs=BATCH_SIZE) for report in outcome.reports]
        errors = [error for error in reports if error is not None]
        if errors:
            drawn.append(f"from {percent(errors[0])} to {percent(errors[-1])} ({name})")
        known = [e for r in outcome.reports if (e := r.total.i1.rel_error) is not None]
        if known:
            exact.append(f"{percent(known[-1])} ({name})")
    sample = f"with one drawn label for each of {BATCH_SIZE} inputs"
    return [
        f"Both networks learned: {listed(right)} of held-out digits right, and their mean confidence "
        f"is {listed(sure)}.",
        f"Meanwhile the error of F by Î₁ {sample} went {listed(drawn) or 'where it cannot be known'}"
        ", and from 100 % on an estimate of F is noise.",
        f"With all labels of the inputs in place of drawn ones F is off by "
        f"{listed(exact) or 'an unknown amount'} in the last report that knows it: see how far off "
        "yours is before you use it.",
    ]


def _evaluate(model: nn.Module, probe: fimprobe.Probe, digits: Digits) -> Outcome:
    model.eval()
    with torch.no_grad():
        p = torch.softmax(model(digits.test_x), 1)
    return Outcome(
        reports=probe.history,
        accuracy=float((p.argmax(1) == digits.test_y).double().mean()),
        confidence=float(p.amax(1).mean()),
    )


def _print_results(name: str, probe: fimprobe.Probe) -> None:
    """Print the last report, and how the numbers of the whole model changed."""
    reports = probe.history
    print(f"\n=== {name} ===")
    print(f"likelihood: {probe.likelihood.name if probe.likelihood else '?'} ({probe.decision})\n")
    print(reports[-1])
    print("\n" + format_trend([r.to_dict() for r in reports]) + "\n")


def _open_pages(run: Path, names: list[str]) -> None:
    """Write a page for each run and open it in the browser."""
    for name in names:
        page = write_page(fimprobe.read(run / name), run / f"{name}.html").resolve()
        if not webbrowser.open(page.as_uri()):
            print(f"No browser could be opened; the page is {page}")
