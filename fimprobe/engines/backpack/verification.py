"""BackPACK on one or two samples against plain autograd, before it is believed on all."""

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
    """Two samples together, by the engine's layers, against each one alone, by plain autograd."""
    pair = torch.arange(2) % problem.batch.size
    layers = trainable_modules(problem.twin)
    job = ChunkContext(slice(0, 2), 2, 1, False, problem.memory_mb * 2**17)
    try:
        with extended([m for _, m in layers], MomentsExtension(job)):
            h = problem.forward(problem.batch[pair])
            if not h.requires_grad:
                return {}
            seed = _random_seed(h)
            torch.autograd.grad(h, list(problem.parameters.values()), seed, allow_unused=True)
    except BatchError:
        raise
    except Exception as error:  # of autograd's hooks: views modified in place and the like
        return {"": f"BackPACK's hooks fail: {error}"}
    alone = _squares_alone(problem, pair, h.detach(), seed)
    if alone is None:
        return {"": "a sample's outputs depend on the other samples of the batch"}
    allowed = tolerance(h.dtype)
    largest = max((float(norms.sum()) for _, norms in alone.values()), default=0.0)
    found = {}
    for path, module in layers:
        for p in module._parameters.values():
            if p is None or id(p) not in alone:
                continue
            have, (square, norms) = job.found.get(id(p)), alone[id(p)]
            slack = allowed * (float(norms.sum()) + allowed * largest)
            if (
                have is None
                or not float((have.a2 - square).abs().sum()) <= slack
                or not float((have.gram[:, 0] - norms).abs().sum()) <= slack
            ):
                found[path] = "guard: its gradients differ from those of single samples"
    return found


def _squares_alone(
    problem: Problem, pair: Tensor, h: Tensor, seed: Tensor
) -> dict[int, tuple[Tensor, Tensor]] | None:
    """id(parameter) -> Σ_b g_b² and ‖g_b‖² [2], each sample by itself; None where outputs differ."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    allowed, parameters = tolerance(h.dtype), list(problem.parameters.values())
    for b in range(2):
        one = problem.forward(problem.batch[pair[b : b + 1]])
        slack = allowed * float(h.abs().max())
        if not torch.allclose(one[0].detach(), h[b], rtol=allowed, atol=slack):
            return None
        gradients = torch.autograd.grad(one, parameters, seed[b : b + 1], allow_unused=True)
        for p, g in zip(parameters, gradients, strict=True):
            if g is not None:
                square = g.double().square()
                total, norms = found.setdefault(
                    id(p), (torch.zeros_like(square), square.new_zeros(2))
                )
                total += square
                norms[b] = square.sum()
    return found


def compare_curvature(problem: Problem) -> dict[str, str]:
    """The largest entry of each parameter's Hessian diagonal against double backward, one sample."""
    one, parameters = problem.batch[:1], problem.parameters
    h = problem.forward(one)
    seed = _random_seed(h)
    try:
        diagonals = hessian_in_domain(problem, one, seed)
    except FimprobeError as error:
        return {"": str(error)}
    except Exception as error:  # of BackPACK's own checks
        return {"": f"BackPACK fails: {type(error).__name__}: {error}"}
    gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
    if h.requires_grad:
        gradients = torch.autograd.grad(
            h, list(parameters.values()), seed, create_graph=True, allow_unused=True
        )
    pairs = []
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        entry = int(diagonals[name].abs().argmax())
        have = float(diagonals[name].flatten()[entry])
        pairs.append((name, have, _second_derivative(gradient, parameter, entry)))
    largest = max((abs(want) for _, _, want in pairs), default=0.0)
    return {
        name.rpartition(".")[0]: "guard: its Hessian differs from that of double backward"
        for name, have, want in pairs
        if not abs(have - want) <= tolerance(h.dtype) * (abs(want) + 1e-2 * largest)
    }


def _second_derivative(gradient: Tensor | None, parameter: Tensor, entry: int) -> float:
    if gradient is None or not gradient.requires_grad:
        return 0.0
    (second,) = torch.autograd.grad(
        gradient.flatten()[entry], parameter, retain_graph=True, allow_unused=True
    )
    return 0.0 if second is None else float(second.flatten()[entry])


def _random_seed(h: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(20240526)
    return torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h)
