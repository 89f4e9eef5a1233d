"""BackPACK against plain autograd on one or two samples, before a whole batch is measured."""

from __future__ import annotations

import torch
from torch import Tensor

from fimprobe.engines.backpack.derivatives import trainable_modules
from fimprobe.engines.backpack.first_order_rules import ChunkContext, MomentsExtension
from fimprobe.engines.backpack.hooks import extended
from fimprobe.engines.backpack.second_order import hessian_in_domain
from fimprobe.engines.backpack.sum_checks import tolerance
from fimprobe.engines.problem.problem import Problem
from fimprobe.errors import BatchError, FimprobeError


def compare_gradients(problem: Problem) -> dict[str, str]:
    """Compare the gradients of two samples together with those of each one alone.

    Returns:
        Path -> reason for the modules whose squared gradients or norms differ.
    """
    pair = torch.arange(2) % problem.batch.size
    layers = trainable_modules(problem.twin)
    chunk = ChunkContext(
        rows=slice(0, 2), size=2, draws=1, diagonals=False, max_bytes=problem.memory_mb * 2**17
    )
    try:
        with extended([m for _, m in layers], MomentsExtension(chunk)):
            h = problem.forward(problem.batch[pair])
            if not h.requires_grad:
                return {}
            cotangents = _random_cotangents(h)
            parameters = list(problem.parameters.values())
            torch.autograd.grad(h, parameters, cotangents, allow_unused=True)
    except BatchError:
        raise
    except Exception as error:  # raised by autograd's hooks, as for views modified in place
        return {"": f"BackPACK's hooks fail: {error}"}
    alone = _squares_alone(problem, pair, h.detach(), cotangents)
    if alone is None:
        return {"": "a sample's outputs depend on the other samples of the batch"}
    allowed = tolerance(h.dtype)
    largest = max((float(norms.sum()) for _, norms in alone.values()), default=0.0)
    reasons = {}
    for path, module in layers:
        for p in module._parameters.values():
            if p is None or id(p) not in alone:
                continue
            sums, (square, norms) = chunk.sums.get(id(p)), alone[id(p)]
            slack = allowed * (float(norms.sum()) + allowed * largest)
            if (
                sums is None
                or not float((sums.a2 - square).abs().sum()) <= slack
                or not float((sums.gram[:, 0] - norms).abs().sum()) <= slack
            ):
                reasons[path] = "guard: its gradients differ from those of single samples"
    return reasons


def _squares_alone(
    problem: Problem, pair: Tensor, h: Tensor, cotangents: Tensor
) -> dict[int, tuple[Tensor, Tensor]] | None:
    """Squares of the gradients of two samples, each run alone.

    Args:
        problem: The model.
        pair: Indices of the samples.
        h: Their outputs when run together.
        cotangents: The cotangents to pull back, of the shape of ``h``.

    Returns:
        Σ_b g_b² and ‖g_b‖² [2] of each parameter by its id; None if the outputs differ from ``h``.
    """
    squares: dict[int, tuple[Tensor, Tensor]] = {}
    allowed, parameters = tolerance(h.dtype), list(problem.parameters.values())
    for b in range(2):
        outputs = problem.forward(problem.batch[pair[b : b + 1]])
        slack = allowed * float(h.abs().max())
        if not torch.allclose(outputs[0].detach(), h[b], rtol=allowed, atol=slack):
            return None
        cotangent = cotangents[b : b + 1]
        gradients = torch.autograd.grad(outputs, parameters, cotangent, allow_unused=True)
        for p, g in zip(parameters, gradients, strict=True):
            if g is not None:
                square = g.double().square()
                total, norms = squares.setdefault(
                    id(p), (torch.zeros_like(square), square.new_zeros(2))
                )
                total += square
                norms[b] = square.sum()
    return squares


def compare_curvature(problem: Problem) -> dict[str, str]:
    """Compare the largest entry of each Hessian diagonal with double backward, on one sample.

    Returns:
        Path -> reason for the modules whose entries differ.
    """
    sample, parameters = problem.batch[:1], problem.parameters
    h = problem.forward(sample)
    cotangents = _random_cotangents(h)
    try:
        found = hessian_in_domain(problem, sample, cotangents[None])
    except FimprobeError as error:
        return {"": str(error)}
    except Exception as error:  # raised by BackPACK's own checks
        return {"": f"BackPACK fails: {type(error).__name__}: {error}"}
    gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
    if h.requires_grad:
        gradients = torch.autograd.grad(
            h, list(parameters.values()), cotangents, create_graph=True, allow_unused=True
        )
    entries = []
    diagonals = {name: diagonal.entries() for name, diagonal in found.items()}
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        entry = int(diagonals[name].abs().argmax())
        value = float(diagonals[name].flatten()[entry])
        entries.append((name, value, _second_derivative(gradient, parameter, entry)))
    largest = max((abs(expected) for _, _, expected in entries), default=0.0)
    return {
        name.rpartition(".")[0]: "guard: its Hessian differs from that of double backward"
        for name, value, expected in entries
        if not abs(value - expected) <= tolerance(h.dtype) * (abs(expected) + 1e-2 * largest)
    }


def _second_derivative(gradient: Tensor | None, parameter: Tensor, entry: int) -> float:
    """The second derivative in one entry of a parameter, from its gradient with a graph."""
    if gradient is None or not gradient.requires_grad:
        return 0.0
    (second,) = torch.autograd.grad(
        gradient.flatten()[entry], parameter, retain_graph=True, allow_unused=True
    )
    return 0.0 if second is None else float(second.flatten()[entry])


def _random_cotangents(h: Tensor) -> Tensor:
    """Normal random numbers of the shape of ``h``, from a generator of their own."""
    generator = torch.Generator().manual_seed(20240526)
    return torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h)
