"""``fimprobe demo``: train an MLP and a CNN on handwritten digits with a probe attached."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

import fimprobe
from fimprobe.cli.digits import Digits, load_digits, make_cnn, make_mlp
from fimprobe.errors import FimprobeError
from fimprobe.report.format import percent
from fimprobe.report.report import Report
from fimprobe.report.trends import format_trend


def run_demo(*, epochs: int, log_dir: str) -> dict[str, list[Report]]:
    """Train both models, and print the reports of their probes.

    Args:
        epochs: Epochs of each model.
        log_dir: The folder of the runs.

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
    reports = {}
    for name, make in {"mlp": make_mlp, "cnn": make_cnn}.items():
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        order = torch.Generator().manual_seed(1)
        probe = fimprobe.attach(
            model, log_dir=run / name, draws="exact", batch=64, schedule={"every": 20}
        )
        with probe:
            for _ in tqdm(range(epochs), desc=name, unit="epoch"):
                model.train()
                for rows in torch.randperm(len(digits.x), generator=order).split(64):
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(digits.x[rows]), digits.y[rows])
                    loss.backward()
                    optimizer.step()
        reports[name] = probe.history
        _print_results(name, model, probe, digits)
    print(f"\nSee every layer over time:   tensorboard --logdir {run}")
    print("                             (its tabs Custom scalars, Images and Text)")
    print(f"The numbers in the terminal: fimprobe show {run / 'mlp'}")
    print(f"The same as one page:        fimprobe show {run / 'mlp'} --html page.html")
    return reports


def _print_results(name: str, model: nn.Module, probe: fimprobe.Probe, digits: Digits) -> None:
    """Print the accuracy, the last report and how the error of Î₁ changed."""
    model.eval()
    with torch.no_grad():
        p = torch.softmax(model(digits.test_x), 1)
    accuracy = float((p.argmax(1) == digits.test_y).double().mean())
    reports = probe.history
    print(
        f"\n=== {name}: {accuracy:.1%} of held-out digits right, mean confidence "
        f"{float(p.amax(1).mean()):.1%} ==="
    )
    print(f"likelihood: {probe.likelihood.name if probe.likelihood else '?'} ({probe.decision})\n")
    print(reports[-1])
    print("\n" + format_trend([r.to_dict() for r in reports]))
    errors = [(r.step, r.error_of("i1")) for r in reports if r.error_of("i1") is not None]
    (_, first), (step, last) = errors[0], errors[-1]
    print(
        f"\nWhat it found: as the {name} became confident, the relative error of Î₁ with one drawn "
        f"label for each of {reports[0].batch_size} inputs went from {percent(first)} to "
        f"{percent(last)}. Near 100 % an estimate is noise."
    )
    if step != reports[-1].step:
        print(
            f"From step {step:,} on it is unknown: fewer and fewer of the inputs carry the Fisher "
            "information."
        )
