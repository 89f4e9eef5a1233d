"""Î₁ in bare torch: the same sums for three known networks, without any check, beside fimprobe's.

python tests/benchmarks/bare.py [--rounds 15]

A forward with the layers' inputs kept, one backward to their outputs for each draw, per-sample
gradients in blocks that fit the cache (outer products where there is one position), their squares,
and the sums over inputs and entries that the variances need. No copy of the model, no size-biased
labels, no report. What a measurement takes beyond this is fimprobe's own. An aim below it asks for
other arithmetic, not for less overhead.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from clock import interleaved
from cost import print_machine
from problems import FULL, Problem, forward_backward, make_problem, sample_labels
from rows import ours
from torch import Tensor, nn

BLOCK_BYTES = 4 * 2**20
"""Size of the per-sample gradients that are formed at once."""


def record(model: nn.Module, x: Tensor) -> tuple[Tensor, list[tuple[Any, Tensor, Tensor]]]:
    """The outputs, and module, input and output of each layer with parameters."""
    calls: list[tuple[Any, Tensor, Tensor]] = []
    layers = [m for m in model.modules() if m._parameters and not m._modules]
    hooks = [m.register_forward_hook(lambda m, i, o: calls.append((m, i[0], o))) for m in layers]
    outputs = model(x)
    for hook in hooks:
        hook.remove()
    return outputs, calls


def add_powers(g: Tensor) -> Tensor:
    """Σ g² [P] over inputs and draws; also fourth powers and inner products of g [b, S, P]."""
    if g.shape[1] > 1:
        torch.bmm(g, g.transpose(1, 2))
    square = g.square_()
    f = square[:, 0] if g.shape[1] == 1 else square[:, 0] + square[:, 1:].sum(1)
    torch.linalg.vector_norm(f, dim=-1)
    if g.shape[1] > 1:
        torch.linalg.vector_norm(square, dim=-1)
    return f.sum(0)


def add_outer_products(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The same sums for δ xᵀ and δ with δ [b, S, o], which factor."""
    if delta.shape[1] > 1:
        torch.bmm(delta, delta.transpose(1, 2))
    square, x2 = delta.square(), x.square()
    torch.linalg.vector_norm(x2, dim=-1), torch.linalg.vector_norm(square, dim=-1)
    f = square.sum(1)
    return (f.t() @ x2).flatten(), f.sum(0)


def gradients(module: Any, x: Tensor, delta: list[Tensor]) -> Tensor:
    """Per-sample gradients of the weight [b, S, P]."""
    kind = type(module).__name__
    if kind == "Conv2d":
        rows = torch.cat(delta, 1).flatten(2)
        if len(delta) == 1:
            groups, channels = x.reshape(1, -1, *x.shape[2:]), delta[0].reshape(1, -1, *x.shape[2:])
            shape = (len(x) * module.out_channels, *module.weight.shape[1:])
            options = (module.stride, module.padding, module.dilation, False, [0, 0], len(x))
            backward = torch.ops.aten.convolution_backward
            mask = [False, True, False]
            return backward(channels, groups, x.new_empty(shape), None, *options, mask)[1].view(
                len(x), 1, -1
            )
        height, width = module.kernel_size
        padded = F.pad(x, [module.padding[1]] * 2 + [module.padding[0]] * 2)
        patches = padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 1, 4, 5, 2, 3)
        patches = patches.reshape(len(x), -1, rows.shape[2])
        return torch.bmm(rows, patches.transpose(1, 2)).view(len(x), len(delta), -1)
    if kind == "LayerNorm":
        normal = F.layer_norm(x, x.shape[-1:])
        return torch.stack([(d * normal).sum(1) for d in delta], 1)
    inputs, cotangents = x.unsqueeze(1), torch.stack(delta, 1)
    left, right = (inputs, cotangents) if kind == "Conv1D" else (cotangents, inputs)
    return torch.matmul(left.transpose(2, 3), right).flatten(2)


def contract(module: Any, x: Tensor, delta: list[Tensor]) -> tuple[Any, Any]:
    """Σ g² of one layer's weight and bias; for a lookup positions stay apart, which is less work."""
    if isinstance(module, nn.Embedding):
        return add_powers(torch.stack(delta, 1).flatten(0, 1).unsqueeze(1)), None
    if isinstance(module, nn.Linear) and x.dim() == 2:
        return add_outer_products(x, torch.stack(delta, 1))
    step = max(1, BLOCK_BYTES // (4 * len(delta) * module.weight.numel()))
    weight, bias = 0, 0
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        block = [d[rows] for d in delta]
        weight += add_powers(gradients(module, x[rows], block))
        if module.bias is not None:
            positions = tuple(range(2, block[0].dim())) if x.dim() == 4 else (1,)
            bias += add_powers(torch.stack([d.sum(positions) for d in block], 1))
    return weight, bias


def bare(problem: Problem, draws: int) -> tuple[list[tuple[Any, Any, Any]], list[Tensor]]:
    """Each layer with Σ g² of its weight and bias, and the scores of ``draws`` labels."""
    outputs, calls = record(problem.model, problem.x)
    edges, p = [o for _, _, o in calls], torch.softmax(outputs.detach(), -1)
    pulled, scores = [], []
    for i in range(draws):
        scores.append(p - F.one_hot(sample_labels(outputs), p.shape[-1]))
        pulled.append(torch.autograd.grad(outputs, edges, scores[-1], retain_graph=i < draws - 1))
    with torch.no_grad():
        return [
            (module, *contract(module, x.detach(), delta))
            for (module, x, _), *delta in zip(calls, *pulled, strict=True)
        ], scores


def check(problem: Problem, draws: int) -> None:
    """Compare the sums with autograd on single inputs, except for lookups."""
    sums, scores = bare(problem, draws)
    expected: dict[nn.Parameter, Tensor] = {
        p: torch.zeros_like(p) for p in problem.model.parameters()
    }
    for i in range(len(problem.x)):
        for score in scores:
            outputs = problem.model(problem.x[i : i + 1])
            found = torch.autograd.grad(outputs, list(expected), score[i : i + 1], allow_unused=True)
            for parameter, g in zip(expected, found, strict=True):
                expected[parameter] += 0 if g is None else g.square()
    for module, weight, bias in sums:
        if isinstance(module, nn.Embedding):
            continue
        torch.testing.assert_close(weight, expected[module.weight].flatten(), rtol=1e-4, atol=1e-6)
        if module.bias is not None:
            torch.testing.assert_close(bias, expected[module.bias], rtol=1e-4, atol=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print_machine()
    print("\n| | S=1, bare | S=1, fimprobe | S=2, bare | S=2, fimprobe |\n|---|---|---|---|---|")
    for name in list(FULL)[:3]:
        problem = make_problem(name)
        for draws in (1, 2):
            check(make_problem(name, tiny=True), draws)
        runs: dict[str, Callable[[], Any]] = {}
        for draws in (1, 2):
            runs[f"bare {draws}"] = functools.partial(bare, problem, draws)
            runs[f"fimprobe {draws}"] = ours("", draws=draws).make(problem).run
        _, times = interleaved(forward_backward(problem), runs, rounds)
        print(f"| {name} | {' | '.join(str(ratio) for ratio in times.values())} |", flush=True)


if __name__ == "__main__":
    main()
