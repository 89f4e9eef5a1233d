"""Efficiency of a diagonal of F along training: the last table of docs/performance.md.

python tests/benchmarks/confidence.py [--rounds 15] [--repeats 40]

An MLP is trained on scikit-learn's digits; at three stages the same 256 inputs are measured by each
row, timed interleaved. Efficiency is 1/(variance of the diagonal over labels × time), over that of Î₁
with one label from the model. Draws from the model hold rare labels too seldom for a spread over
repetitions to be believed: their variance is the enumerated one, that of Î₁, which peers estimate
too. That of the other rows is their spread over repetitions.
"""

from __future__ import annotations

import argparse
import copy
import warnings

import torch
from clock import interleaved, machine
from peers import PEERS
from problems import Problem, forward_backward
from rows import Row, ours
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from truth import reason

import fimprobe

STAGES = (0.1, 0.9, 0.997)
"""Mean probabilities of the likeliest label at which is measured."""

PLAIN = "Î₁, 1 label from the model"
OWN = [
    ours(PLAIN, draws=1, label_sampling="model"),
    ours("**size-biased, 1 label**", draws=1),
    ours("**size-biased, 2 labels**", draws=2),
    ours("exact labels", draws="exact"),
    ours("Î_H beside Î₁, 1 vector", estimators=["i1", "ih"], draws=1, estimator="ih"),
]
SAMPLED = ("ASDL `fisher_mc`, 1 draw", "nngeometry `FIM_MonteCarlo`, 1 draw",
           "BackPACK `DiagGGNMC`, 1 draw", "Laplace `BackPackGGN`, stochastic")  # fmt: skip
HUTCHINSON = (
    "curvlinops `hutchinson_diag` of the GGN, 1 probe",
    "one batch-summed backward (Hutchinson)",
)


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, confidence: float) -> float:
    """Adam, until the mean confidence is reached."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    while True:
        with torch.no_grad():
            now = float(model(x).softmax(1).amax(1).mean())
        if now >= confidence:
            return now
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            with torch.no_grad():
                if float(model(x[:256]).softmax(1).amax(1).mean()) >= confidence:
                    break


def spread(
    row: Row, run: object, repeats: int, exact: dict[str, torch.Tensor], scale: float
) -> float:
    """Σ over entries of the mean squared distance from the exact diagonal."""
    total = 0.0
    for _ in range(repeats):
        found = run.draw()  # type: ignore[attr-defined]
        total += sum(
            float((found[n].detach().double() * scale - d).square().sum()) for n, d in exact.items()
        )
    return total / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    print(machine(), flush=True)
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(digits)
    sizes = (64, 256, 256, 10)
    model = nn.Sequential(
        nn.Linear(*sizes[:2]), nn.ReLU(), nn.Linear(*sizes[1:3]), nn.ReLU(), nn.Linear(*sizes[2:])
    )
    rows = [*OWN, *(r for r in PEERS if r.name in SAMPLED + HUTCHINSON)]
    cells: dict[str, list[str]] = {r.name: [] for r in rows}
    heads = []
    for stage in STAGES:
        confidence = train(model, x, y, stage)
        problem = Problem("digits", copy.deepcopy(model).eval(), x[:256])
        exact = fimprobe.measure(
            problem.model, problem.x, likelihood="categorical", draws="exact", estimators="i1",
            bounds=False, diagonals=True,
        )  # fmt: skip
        size = len(problem.x)
        diagonals = {n: g.i1.diagonal[n].double() * size for n, g in exact.parameters.items()}
        plain = exact.total.i1.label_variance * size  # of the sum over inputs, one label each
        found = {}
        for row in rows:
            try:
                found[row.name] = row.make(Problem("digits", copy.deepcopy(problem.model), problem.x))
                found[row.name].run()
            except Exception as error:  # a peer that cannot is a row that says so
                found.pop(row.name, None)
                print(f"{row.name}: {reason(error)}")
        unit, times = interleaved(
            forward_backward(problem), {n: c.run for n, c in found.items()}, options.rounds
        )
        heads.append(f"confidence {confidence:.3g}")
        cost = {n: t.middle for n, t in times.items()}
        norm = sum(float(d.square().sum()) for d in diagonals.values())
        for row in rows:
            if row.name not in found:
                cells[row.name].append("–")
                continue
            if row.name == PLAIN or row.name in SAMPLED:
                variance = plain
            elif row.exact:
                variance = 0.0
            else:
                scale = float(size) if row.mean else 1.0
                variance = spread(row, found[row.name], options.repeats, diagonals, scale)
            gain = "no error"
            if variance > 0:
                gain = f"{plain * cost[PLAIN] / (variance * cost[row.name]):.2g}"
            error = (variance / norm) ** 0.5
            cells[row.name].append(f"{gain} · {100 * error:.3g} % · {cost[row.name]:.2f}")
        print(f"{heads[-1]}: forward+backward {1e3 * unit:.2f} ms", flush=True)
    print(f"\n| | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for name, line in cells.items():
        print(f"| {name} | {' | '.join(line)} |")


if __name__ == "__main__":
    main()
