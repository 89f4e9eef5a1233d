"""What popular libraries call Fisher information, beside the exact one: the table of docs/fisher_peers.md.

python tests/benchmarks/fisher_peers.py [--seeds 5] [--confidence 0.99]

A small MLP and a small CNN are trained on scikit-learn's digits. The exact diagonal of F is enumerated
in float64, over all labels and inputs. Continual-learning and merging libraries are too large to
install for their few lines: these are written again here, each beside the file and the lines that it
follows, with the batch size that the library has or recommends where that is known. Packages that are
installed run themselves. Numbers of random ones are medians over seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peers_by_layer import asdl
from problems import Problem
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import fimprobe
from fimprobe.fisher.audit.comparison import cosine_of, overlap_of, sine

BATCH = 64
"""Inputs per batch of training, and of libraries that take the batches of training."""


@dataclass
class Task:
    """A trained network, its data, and the optimizer that trained it."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    optimizer: torch.optim.Optimizer

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches in random order."""
        for rows in torch.randperm(len(self.x)).split(size):
            yield self.x[rows], self.y[rows]

    def loader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches in the order of the data."""
        return DataLoader(TensorDataset(self.x, self.y), batch_size=BATCH)

    def square(self, loss: Tensor) -> Tensor:
        """The squared gradient of a loss as a vector, float64."""
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        return torch.cat([g.reshape(-1) for g in gradients]).double().square()


Method = Callable[[Task], Tensor]


def avalanche(task: Task) -> Tensor:
    """avalanche-lib 0.6.0, avalanche/training/plugins/ewc.py:157-182, batches of training."""
    squares = [
        task.square(functional.cross_entropy(task.model(x), y)) for x, y in task.batches(BATCH)
    ]
    return torch.stack(squares).mean(0)


def pycil(task: Task) -> Tensor:
    """G-U-N/PyCIL 87cc411, models/ewc.py:234-254: batches of 128 (line 27), cut at 1e-4 (line 32)."""
    squares = [task.square(functional.cross_entropy(task.model(x), y)) for x, y in task.batches(128)]
    return torch.stack(squares).mean(0).clamp(max=1e-4)


def mammoth(task: Task) -> Tensor:
    """aimagelab/mammoth 20ff873, models/ewc_on.py:44-57: each input, times its p(y|x)."""
    total, batches = torch.zeros(()), 0
    for x, y in task.batches(BATCH):
        batches += 1
        for image, label in zip(x, y, strict=True):
            loss = functional.cross_entropy(task.model(image[None]), label[None])
            total = total + task.square(loss) * (-loss.detach()).exp()
    return total / (batches * BATCH)


def mergelm(task: Task) -> Tensor:
    """yule-BUAA/MergeLM 6d49ad9, model_merging_methods/merging_methods.py:223-249, and after it
    tanganke/fusion_bench 54c9e8c, fusion_bench/method/fisher_merging/fisher_merging.py:278-307;
    batches of 16."""
    total, inputs = torch.zeros(()), 0
    for x, _ in task.batches(16):
        log_p = task.model(x).log_softmax(-1)
        total = total + task.square((log_p.exp().detach().sqrt() * log_p).sum())
        inputs += 16
    return total / inputs


def mergebench_hard(task: Task) -> Tensor:
    """uiuctml/MergeBench b245648, merging/merging_methods/fisher_utils.py:29-32 and fisher.py:83-100:
    the arg-max label, batches of one (merging/taskloader.py:70)."""
    total = torch.zeros(())
    for x, _ in task.batches(1):
        h = task.model(x)
        total = total + task.square(functional.cross_entropy(h, h.argmax(-1)))
    return total / len(task.x)


def mergebench_soft(task: Task) -> Tensor:
    """The same, fisher_utils.py:34-50: the expected score, which is zero, is squared."""
    total = torch.zeros(())
    for x, _ in task.batches(1):
        log_p = task.model(x).log_softmax(-1)
        total = total + task.square(-(log_p.exp().detach() * log_p).sum(-1).mean())
    return total / len(task.x)


def sophia(task: Task) -> Tensor:
    """Liuhong99/Sophia a7e1572, train_sophiag.py:408-421 and sophia.py:56,194: sampled labels, the
    squared gradient of a batch times its size; here averaged over an epoch."""
    total, batches = torch.zeros(()), 0
    for x, _ in task.batches(BATCH):
        h = task.model(x)
        y = torch.distributions.Categorical(logits=h.detach()).sample()
        total = total + len(x) * task.square(functional.cross_entropy(h, y))
        batches += 1
    return total / batches


def adam(task: Task) -> Tensor:
    """torch.optim.Adam's exp_avg_sq at the end of training, batches of 64."""
    state = task.optimizer.state
    parts = [state[p]["exp_avg_sq"].reshape(-1) for p in task.model.parameters()]
    return torch.cat(parts).double()


def laplace(task: Task) -> Tensor:
    """laplace-torch's DiagLaplace over all weights: ``la.H``."""
    from laplace import Laplace

    la = Laplace(task.model, "classification", "all", "diag")
    la.fit(task.loader())
    return la.H.detach().double()


def nngeometry(trials: int | None) -> Method:
    """nngeometry's diagonal with exact or with sampled labels."""

    def method(task: Task) -> Tensor:
        from nngeometry.metrics import FIM, FIM_MonteCarlo
        from nngeometry.object import PMatDiag

        if trials is None:
            return FIM(task.model, task.loader(), PMatDiag).get_diag().detach().double()
        matrix = FIM_MonteCarlo(task.model, task.loader(), PMatDiag, trials=trials)
        return matrix.get_diag().detach().double()

    return method


def curvlinops_diag(vectors: int) -> Method:
    """curvlinops' Hutchinson estimate of the diagonal of the GGN over all inputs."""

    def method(task: Task) -> Tensor:
        import curvlinops

        loss = nn.CrossEntropyLoss(reduction="sum")
        parameters = list(task.model.parameters())
        matrix = curvlinops.GGNLinearOperator(
            task.model, loss, parameters, [(task.x, task.y)], check_deterministic=False
        )
        return curvlinops.hutchinson_diag(matrix, vectors).detach().double()

    return method


def installed(make: Callable[[Problem], object]) -> Method:
    """A peer of the other benchmarks, on all inputs as one batch."""

    def method(task: Task) -> Tensor:
        diagonal = make(Problem(task.name, task.model, task.x)).draw()  # type: ignore[attr-defined]
        names = [name for name, _ in task.model.named_parameters()]
        return torch.cat([diagonal[name].detach().reshape(-1) for name in names]).double()

    return method


def ours(task: Task) -> Tensor:
    """fimprobe.estimate at its defaults."""
    seed = int(torch.randint(2**31, ()))
    fisher = fimprobe.estimate(
        task.model, task.x, likelihood="categorical", seed=seed, progress=False
    )
    return torch.cat([f.reshape(-1) for f in fisher.diagonal.values()])


METHODS: list[tuple[str, str, Method, bool]] = [
    ("avalanche", "squared batch gradient, labels of the data", avalanche, True),
    ("PyCIL", "the same, batches of 128, cut at 1e-4", pycil, True),
    ("mammoth", "each input, label of the data, times p(y)", mammoth, False),
    ("MergeLM, FusionBench", "sum over labels and batch without signs", mergelm, True),
    ("MergeBench, hard", "each input, arg-max label", mergebench_hard, False),
    ("MergeBench, soft", "square of the expected score", mergebench_soft, False),
    ("Sophia's GNB, one epoch", "squared batch gradient times B, sampled labels", sophia, True),
    ("Adam's `exp_avg_sq`", "squared batch gradients along the training", adam, False),
    ("laplace-torch", "GGN, summed over the inputs", laplace, False),
    ("nngeometry `FIM`", "exact labels", nngeometry(None), False),
    ("nngeometry `FIM_MonteCarlo`", "one sampled label", nngeometry(1), True),
    ("ASDL `fisher_exact`", "exact labels, summed", installed(asdl("fisher_exact")), False),
    ("ASDL `fisher_mc`", "one sampled label, summed", installed(asdl("fisher_mc")), True),
    ("curvlinops `hutchinson_diag`", "GGN, 1 random vector, summed", curvlinops_diag(1), True),
    ("curvlinops `hutchinson_diag`", "GGN, 100 random vectors, summed", curvlinops_diag(100), True),
    ("**fimprobe.estimate**", "to 10 %", ours, True),
]


def exact(task: Task) -> Tensor:
    """The diagonal of F by enumeration, float64."""
    model, x = task.model.double(), task.x.double()
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(named: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(model, named, (image[None],)), label[None])

    with torch.no_grad():
        p = model(x).softmax(1)
    total = torch.zeros(sum(q.numel() for q in parameters.values()), dtype=torch.float64)
    for c in range(p.shape[1]):
        labels = torch.full((len(x),), c)
        for rows in torch.arange(len(x)).split(256):
            g = vmap(grad(loss), (None, 0, 0))(parameters, x[rows], labels[rows])
            flat = torch.cat([one.reshape(len(rows), -1) for one in g.values()], 1)
            total += p[rows, c] @ flat.square()
    task.model.float()
    return total / len(x)


def train(name: str, confidence: float) -> Task:
    """Train a network by Adam until the mean probability of its first choices is reached."""
    torch.manual_seed(0)
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(digits)
    if name == "MLP":
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh())
        model.append(nn.Linear(32, 10))
    else:
        x = x.view(-1, 1, 8, 8)
        model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        model += nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten())
        model.append(nn.Linear(256, 10))
    task = Task(name, model, x, y, torch.optim.Adam(model.parameters(), 2e-3))
    while True:
        with torch.no_grad():
            if float(model(x).softmax(1).amax(1).mean()) >= confidence:
                return task
        for images_of_batch, labels in task.batches(BATCH):
            task.optimizer.zero_grad()
            functional.cross_entropy(model(images_of_batch), labels).backward()
            task.optimizer.step()


def measure(task: Task, method: Method, true: Tensor, seeds: int) -> list[float]:
    """Medians of trace ratio, error after the best rescaling and overlap of the largest 10 %."""
    rows = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        d = method(task)
        if not bool(torch.isfinite(d).all()):
            return [float("nan")] * 3
        cosine = cosine_of(d, true)
        kept = round(0.1 * len(true))
        zero = float(d.sum()) < 1e-9 * float(true.sum())
        error = float("nan") if zero or cosine is None else sine(cosine)
        overlap = float("nan") if zero else overlap_of(d, true, kept)
        rows.append((float(d.sum() / true.sum()), error, overlap))
        task.model.zero_grad(set_to_none=True)
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def cells(numbers: list[float]) -> str:
    """Three cells of the table."""
    ratio, error, overlap = numbers
    if ratio != ratio:
        return "not a number | – | –"
    if error != error:
        return f"{ratio:.0e} | – | –"
    shown = f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2g}"
    return f"{shown} | {100 * error:.0f} % | {100 * overlap:.0f} %"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--confidence", type=float, default=0.99)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tasks = [train(name, options.confidence) for name in ("MLP", "CNN")]
    truths = [exact(task) for task in tasks]
    print(
        "| | what it computes | MLP: tr / tr F | error | top 10 % | CNN: tr / tr F | error | top 10 % |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, words, method, random in METHODS:
        row = []
        for task, true in zip(tasks, truths, strict=True):
            try:
                row.append(cells(measure(task, method, true, options.seeds if random else 1)))
            except Exception as error:
                row.append(f"{type(error).__name__}: {str(error).splitlines()[0][:60]} | – | –")
        print(f"| {name} | {words} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
