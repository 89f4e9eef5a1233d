"""Is a row's number the Fisher information? Against dense Jacobians in float64, on tiny problems."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from problems import Problem
from rows import Diagonal, Row
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.oracles.brute_force import jacobian  # noqa: E402

EXACT_TOLERANCE = 1e-3
"""Of a parameter's norm: peers compute in float32."""

Z_LIMIT = 5.5
"""Standard errors that an unbiased estimate may be off by, over all parameters and sums."""


def fisher_diagonal(problem: Problem) -> Diagonal:
    """Σ_b diag J_bᵀ I(h_b) J_b in float64; I(h) = diag p − ppᵀ for each position."""
    model, found = copy.deepcopy(problem.model).double(), {}
    x = problem.x.double() if problem.x.is_floating_point() else problem.x
    for b in range(len(x)):
        jac, h = jacobian(model, (x,), b)
        classes = model(x[:1]).shape[-1]
        blocks = [torch.diag(p) - torch.outer(p, p) for p in h.view(-1, classes).softmax(1)]
        middle = torch.block_diag(*blocks)
        for name, j in jac.items():
            diagonal = (j * (middle @ j)).sum(0)
            found[name] = found.get(name, 0) + diagonal.detach()
    shapes = {n: p.shape for n, p in model.named_parameters()}
    return {n: d.view(shapes[n]) for n, d in found.items()}


@dataclass
class Verdict:
    """``ratios``: trace over the true one, by parameter whose number is not the Fisher's."""

    coverage: float = 0.0
    """Share of the parameters (counted as numbers) that have an estimate."""
    missing: list[str] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)
    judged: int = 0
    error: str = ""

    @property
    def right(self) -> bool:
        return not self.error and not self.ratios

    @property
    def complete(self) -> bool:
        return self.right and not self.missing

    def __str__(self) -> str:
        """What the table's cell says; nothing where all is well."""
        if self.error:
            return self.error
        told = []
        if self.missing:
            told.append(f"{100 * self.coverage:.0f} % of parameters")
        if self.ratios:
            low, high = min(self.ratios.values()), max(self.ratios.values())
            span = f"×{low:.2f}" if high - low < 0.03 * high else f"×{low:.2f} – {high:.2f}"
            told.append(f"wrong in {len(self.ratios)} of {self.judged} tensors, {span}")
        return ", ".join(told)


def judge(row: Row, problem: Problem, repetitions: int = 400) -> Verdict:
    """Exact rows must be equal, drawn ones unbiased within standard errors."""
    truth = fisher_diagonal(problem)  # first: some peers rewrite the model
    torch.manual_seed(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            contender = row.make(problem)
            count = 1 if row.exact else repetitions
            draws = [contender.draw() for _ in range(count)]
    except Exception as error:  # a peer that cannot is a row that says so
        return Verdict(error=reason(error))
    scale = len(problem.x) if row.mean else 1
    verdict = Verdict(judged=len(draws[0]))
    covered = 0
    for name, true in truth.items():
        if name not in draws[0]:
            verdict.missing.append(name)
            continue
        covered += true.numel()
        found = torch.stack([d[name].detach().double().view(true.shape) * scale for d in draws])
        if not _agrees(found, true, row.exact):
            verdict.ratios[name] = float(found.mean(0).sum() / true.sum())
    verdict.coverage = covered / sum(d.numel() for d in truth.values())
    return verdict


def _agrees(found: Tensor, true: Tensor, exact: bool) -> bool:
    if exact:
        return bool((found[0] - true).norm() <= EXACT_TOLERANCE * true.norm() + 1e-12)
    # the trace and sums over random halves of the entries: those obey the central limit theorem
    generator = torch.Generator().manual_seed(0)
    halves = torch.randint(2, (8, true.numel()), generator=generator).double()
    masks = torch.cat([torch.ones(1, true.numel(), dtype=torch.float64), halves])
    sums, targets = found.flatten(1) @ masks.T, masks @ true.flatten()
    error = sums.std(0) / math.sqrt(len(sums))
    slack = 1e-4 * targets.abs() + 1e-9 * float(true.abs().sum())  # where nothing is random
    return bool(((sums.mean(0) - targets).abs() <= Z_LIMIT * error + slack).all())


def reason(error: Exception) -> str:
    """One line that fits into a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {(lines or [''])[0][:70].strip()}".replace("|", "/")
