"""Five decisions on the diagonal of F, from estimates of it and from its exact value.

A small network is trained on handwritten digits to confidence. Its F is computed exactly, estimated
by ``fimprobe.estimate``, and as most code computes it: Î₁ with one label from the model for each
input, and the square of the gradient of a batch. Each one then decides on the same questions.

    python examples/fisher_decisions.py [--epochs 60]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

import fimprobe

Diagonal = dict[str, Tensor]
FORGET = 3
"""The digit that is to be unlearned."""
PRIOR = 1.0
"""Prior precision of the Laplace approximation."""


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """Train by Adam, and return the model."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model


def batch_squared(model: nn.Module, x: Tensor, y: Tensor) -> Diagonal:
    """Return the mean of squared batch gradients with the labels of the data: not F."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    batches = list(zip(x.split(64), y.split(64), strict=True))
    for inputs, labels in batches:
        loss = functional.cross_entropy(model(inputs), labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for name, g in zip(total, gradients, strict=True):
            total[name] += g.square() / len(batches)
    return total


def one_label(model: nn.Module, x: Tensor, y: Tensor) -> Diagonal:
    """Return Î₁ with one label from the model for each input."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(named: Diagonal, image: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(model, named, (image[None],)), label[None])

    with torch.no_grad():
        labels = torch.multinomial(model(x).softmax(1), 1).squeeze(1)
        gradients = vmap(grad(loss), (None, 0, 0))(parameters, x, labels)
        return {name: g.square().mean(0) for name, g in gradients.items()}


def ten_percent(model: nn.Module, x: Tensor, y: Tensor) -> Diagonal:
    """Return the estimate of fimprobe."""
    return fimprobe.estimate(model, x, likelihood="categorical", progress=False).diagonal


def exact(model: nn.Module, x: Tensor, y: Tensor) -> Diagonal:
    """Return the exact diagonal: all inputs, all labels."""
    return fimprobe.estimate(
        model, x, likelihood="categorical", draws="exact", rel_error=1e-9, progress=False
    ).diagonal


METHODS: dict[str, Callable[[nn.Module, Tensor, Tensor], Diagonal]] = {
    "batch gradient squared": batch_squared,
    "Î₁, one label per input": one_label,
    "fimprobe.estimate, 10 %": ten_percent,
}


def vector(tensors: Diagonal) -> Tensor:
    """Return one vector in float64."""
    return torch.cat([x.detach().double().reshape(-1) for x in tensors.values()])


def run(*, epochs: int = 60) -> dict[str, dict[str, float]]:
    """Return the numbers of every method."""
    torch.manual_seed(0)
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(digits)
    start = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh())
    start.append(nn.Linear(32, 10))
    model = train(copy.deepcopy(start), x, y, epochs)
    other = train(copy.deepcopy(model), 1 - x, y, max(1, epochs // 10))
    theta, theta_other = (vector(dict(m.named_parameters())) for m in (model, other))
    forget = y == FORGET
    parts = {"all": (model, x, y), "other": (other, 1 - x, y)}
    parts |= {"forget": (model, x[forget], y[forget]), "keep": (model, x[~forget], y[~forget])}
    true = {name: vector(exact(*part)) for name, part in parts.items()}
    table = {}
    for name, method in METHODS.items():
        began = time.perf_counter()
        method(*parts["all"])
        seconds = time.perf_counter() - began
        found = {part: vector(method(*arguments)) for part, arguments in parts.items()}
        table[name] = {"seconds": seconds} | compare(found, true, theta, theta_other)
    return table


def compare(
    found: dict[str, Tensor], true: dict[str, Tensor], theta: Tensor, theta_other: Tensor
) -> dict[str, float]:
    """Return how far decisions are off.

    Args:
        found: Estimated diagonals by part of the data.
        true: Exact ones.
        theta: Parameters of the model.
        theta_other: Parameters of the other model.
    """
    f, t = found["all"], true["all"]
    move = (theta_other - theta).square()
    top = {id(d): set(d.topk(len(d) // 10).indices.tolist()) for d in (f, t)}
    chosen, right = (d["forget"] > d["keep"] for d in (found, true))

    def merged(d: dict[str, Tensor]) -> Tensor:
        weight = d["all"] / (d["all"] + d["other"]).clamp(min=1e-300)
        known = d["all"] + d["other"] > 0
        return torch.where(
            known, weight * theta + (1 - weight) * theta_other, (theta + theta_other) / 2
        )

    plain, best = (theta + theta_other) / 2, merged(true)
    size = 1797
    variance, best_variance = (1 / (size * d + PRIOR) for d in (f, t))
    return {
        "error of F": float((f - t).norm() / t.norm()),
        "EWC penalty": float((f * move).sum() / (t * move).sum()),
        "top 10 %": len(top[id(f)] & top[id(t)]) / len(top[id(t)]),
        "unlearning": float((chosen & right).sum() / max(1, int(chosen.sum()))),
        "merging": float((merged(found) - best).norm() / (best - plain).norm()),
        "Laplace": float((variance / best_variance).log().square().mean().sqrt()),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    options = parser.parse_args(arguments)
    table = run(epochs=options.epochs)
    columns = list(next(iter(table.values())))
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, numbers in table.items():
        print(f"| {name} | " + " | ".join(f"{numbers[c]:.3g}" for c in columns) + " |")


if __name__ == "__main__":
    main()
