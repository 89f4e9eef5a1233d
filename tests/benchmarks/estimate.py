"""Are the errors of ``fimprobe.estimate`` true, and what do they cost? The tables of docs/guides/estimate.md.

python tests/benchmarks/estimate.py [--runs 40]

An MLP and a CNN are trained on scikit-learn's digits, a small GPT-2 on characters of the standard
library, until the mean probability of their first choices is reached. F is enumerated in float64. The
first table compares estimates of different seeds with it; the second has the work for the same error:
of Î₁ with one label from the model, whose variance is enumerated, and of other packages. Times are
CPU seconds of this process on one thread, which other processes on the machine change little.
"""

from __future__ import annotations

import argparse
import math
import string
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from problems import Problem, gpt2
from rows import ours
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from truth import reason

import fimprobe

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.models.digits import confident_mlp, digits  # noqa: E402
from tests.oracles.fisher_diagonal import flat, input_moments, rms  # noqa: E402

BATCH, PAIRS = 64, 256
"""Inputs of a batch, and of a measurement by which Î₁ is timed."""


@dataclass(frozen=True)
class Task:
    """A trained network with its data, and the truth about F."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    diagonal: Tensor
    between: float
    """Σ_i of the variance of F_ii between inputs."""
    label: float
    """Σ_i of the variance of g_i² with labels from the model, mean over the inputs."""

    @classmethod
    def of(cls, name: str, model: nn.Module, x: Tensor, y: Tensor, part: int) -> Task:
        """Enumerate F and the variances of Î₁."""
        f, fourth = input_moments(model, x, part)
        confidence = float(model(x).softmax(-1).amax(-1).mean())
        return cls(
            f"{name}, {confidence:.5g}",
            model.eval(),
            x,
            y,
            f.mean(0),
            float(f.var(0, correction=0).sum()),
            float((fourth - f.square().sum(1)).mean()),
        )

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Batches of the inputs with labels."""
        return list(zip(self.x.split(BATCH), self.y.split(BATCH), strict=True))

    def loader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The same as a loader."""
        return DataLoader(TensorDataset(self.x, self.y), batch_size=BATCH)

    def pairs(self, error: float) -> float:
        """Pairs (input, label) of Î₁ for a relative error, the fewest over this finite data set."""
        allowed = (error * float(self.diagonal.norm())) ** 2
        pairs = (self.between + self.label) / (allowed + self.between / len(self.x))
        return pairs if pairs <= len(self.x) else self.label / allowed


def train(model: nn.Module, x: Tensor, y: Tensor, confidence: float) -> nn.Module:
    """Adam, until the mean probability of the first choices is reached."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    while True:
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]).flatten(0, -2), y[rows].flatten()).backward()
            optimizer.step()
        with torch.no_grad():
            if float(model(x).softmax(-1).amax(-1).mean()) >= confidence:
                return model


USUAL = [(0.1, False), (0.05, False), (0.1, True)]
"""Errors to reach, and whether the data are a list of batches."""

Tasks = Iterator[tuple[Task, list[tuple[float, bool]]]]


def mlps() -> Tasks:
    """MLPs on digits, with what is requested."""
    x, y = digits()
    yield Task.of("MLP", confident_mlp(0.997), x, y, 256), USUAL
    yield Task.of("MLP", confident_mlp(0.99999), x, y, 256), USUAL[:1]


def cnns() -> Tasks:
    """A CNN on digits."""
    torch.manual_seed(0)
    x, y = digits()
    cnn = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
    cnn += nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten())
    cnn.append(nn.Linear(256, 10))
    yield Task.of("CNN", train(cnn, x, y, 0.997), x, y, 64), USUAL


def language_models() -> Tasks:
    """GPT-2 on characters of the standard library; those outside the alphabet are one."""
    torch.manual_seed(0)
    characters = string.ascii_lowercase + " \n_.,"
    text = Path(string.__file__).read_text(encoding="utf-8").lower()
    codes = torch.tensor([characters.find(c) + 1 for c in text][: 400 * 17]).view(400, 17)
    tokens, following = codes[:, :-1], codes[:, 1:]
    lm, _ = gpt2(True, layers=2, width=16, heads=2, length=16, vocabulary=len(characters) + 1)
    for confidence in (0.7, 0.9):
        lm = train(lm.eval(), tokens, following, confidence)
        yield Task.of("GPT-2", lm, tokens, following, 1), USUAL[:1]


TASKS: dict[str, Callable[[], Tasks]] = {"MLP": mlps, "CNN": cnns, "GPT-2": language_models}


def cpu_seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and what it returns."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def estimates(task: Task, error: float, as_list: bool, runs: int) -> str:
    """The cells of the first table."""
    data: Any = task.batches() if as_list else task.x
    stated, true, counts, seconds, drawn = [], [], [], [], 0
    trace = entries = inside = 0.0
    for seed in range(runs):
        spent, fisher = cpu_seconds(
            lambda seed=seed: fimprobe.estimate(
                task.model, data, likelihood="categorical", rel_error=error, seed=seed, progress=False
            )
        )
        diagonal, std_error = flat(fisher.diagonal), flat(fisher.std_error)
        off = float((diagonal - task.diagonal).norm() / task.diagonal.norm())
        stated.append(fisher.rel_error)
        true.append(off)
        counts.append(fisher.metadata["inputs"])
        drawn += fisher.metadata["input_sampling"] == "trace"
        seconds.append(spent)
        inside += off <= 1.5 * fisher.rel_error
        trace += abs(fisher.trace - float(task.diagonal.sum())) <= 2 * fisher.trace_error
        covered = (diagonal - task.diagonal).abs() <= 2 * std_error + 1e-6 * task.diagonal
        entries += float(covered.double() @ task.diagonal / task.diagonal.sum())
    shares = " | ".join(f"{100 * x / runs:.0f} %" for x in (inside, trace, entries))
    counted = f"{sum(counts) / runs:,.0f} {'draws' if drawn == runs else 'inputs'}"
    if 0 < drawn < runs:
        counted += f" ({drawn} of {runs} runs: draws)"
    name = f"{task.name}{', list of batches' if as_list else ''}"
    return (
        f"| {name} | {100 * error:g} % | {100 * rms(stated):.1f} % | {100 * rms(true):.1f} % | "
        f"{shares} | {counted} | {sum(seconds) / runs:.2f} |"
    )


def plain_seconds(task: Task) -> float:
    """CPU seconds of Î₁ with one label from the model for a pair, in a batch that repeats."""
    contender = ours("", draws=1, label_sampling="model").make(
        Problem(task.name, task.model, task.x[:PAIRS])
    )
    contender.run()
    return min(cpu_seconds(contender.run)[0] for _ in range(5)) / PAIRS


def exact(task: Task) -> Any:
    """fimprobe with exact labels of all inputs."""
    return fimprobe.estimate(
        task.model, task.x, likelihood="categorical", draws="exact", rel_error=1e-9, progress=False
    )


def laplace(task: Task) -> Tensor:
    """laplace-torch's diagonal Hessian, exact: a sum over the inputs."""
    from laplace import Laplace

    la = Laplace(task.model, "classification", "all", "diag")
    la.fit(task.loader())
    return la.H


def nngeometry(task: Task) -> Tensor:
    """nngeometry's diagonal with one label from the model for each input."""
    from nngeometry.metrics import FIM_MonteCarlo
    from nngeometry.object import PMatDiag

    return FIM_MonteCarlo(task.model, task.loader(), PMatDiag, trials=1).get_diag()


def attempted(run: Callable[[Task], Any], task: Task, times: float = 1.0) -> str:
    """CPU seconds of ``times`` calls in words, or why there are none; two inputs come first."""
    try:
        run(replace(task, x=task.x[:2], y=task.y[:2]))  # imports, and what fails at once
        return f"{times * cpu_seconds(lambda: run(task))[0]:.3g}"
    except Exception as error:  # a peer that cannot is a cell that says so
        return reason(error)


def cost(task: Task, error: float) -> str:
    """The cells of the second table."""
    pairs = task.pairs(error)
    passes = math.ceil(pairs / len(task.x))
    cells = [
        task.name,
        f"{pairs:,.0f}",
        f"{pairs * plain_seconds(task):.3g}",
        attempted(exact, task),
        attempted(laplace, task),
        f"{passes:,}",
        attempted(nngeometry, task, passes),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--only", choices=list(TASKS), nargs="*", default=list(TASKS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print("| model, confidence | requested | stated | true | true ≤ 1.5 stated | trace | entries | "
          "measured | CPU s |\n|---|---|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
    costs = []
    for name in options.only:
        for task, requests in TASKS[name]():
            for error, as_list in requests:
                print(estimates(task, error, as_list, options.runs), flush=True)
            costs.append(cost(task, requests[0][0]))
    print("\n| model, confidence | Î₁: pairs for 10 % | CPU s | exact labels: CPU s | laplace-torch: "
          "CPU s | nngeometry: passes for 10 % | CPU s |\n|---|---|---|---|---|---|---|")  # fmt: skip
    print("\n".join(costs))


if __name__ == "__main__":
    main()
