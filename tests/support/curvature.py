"""Problems for the curvature engine, and its probes replaced by orthogonal arrays of signs."""

import copy

import torch
from torch import nn

from fimprobe.engines.autograd.verification import make_verified_plan, measure_with_fallbacks
from fimprobe.engines.curvature import diagonal_accumulator, directions, propagation
from fimprobe.engines.primitives import random_signs
from fimprobe.engines.primitives.random_signs import rademacher
from fimprobe.engines.problem.cotangents import curvature_cotangents
from fimprobe.engines.problem.label_cotangents import label_cotangents
from fimprobe.engines.problem.problem import Problem, Request
from fimprobe.likelihoods import Gaussian, get_likelihood
from fimprobe.likelihoods.base import Pass
from fimprobe.likelihoods.draws import Draws
from fimprobe.model.batch import Batch
from fimprobe.model.outputs import select_outputs
from fimprobe.model.twin import make_twin
from tests.models.cases import lively
from tests.oracles import brute_force


class Seeded(Gaussian):
    """Two dense seeds in place of labels: R is linear in them, and fewer cost less."""

    def exact_passes(self, outputs, mask):
        generator = torch.Generator().manual_seed(7)
        for i in range(2):
            seed = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
            one = torch.full((len(outputs),), 0.5, dtype=torch.float64)
            yield Pass(seed.to(outputs.dtype), one, one, i)

    hutchinson_passes = exact_passes

    def count_passes(self, outputs):
        return 2


def problem_of(model, inputs, *, likelihood=None, draws=None, seed=0, memory_mb=512, **ask):
    diagonals = ask.pop("diagonals", False)
    return Problem(
        twin=make_twin(model),
        batch=Batch.of(inputs),
        likelihood=get_likelihood(likelihood or Seeded()),
        draws=Draws(count=draws, seed=seed),
        select_outputs=select_outputs,
        mask=None,
        memory_mb=memory_mb,
        diagonals=diagonals,
        request=Request(i2=True, **ask),
    )


def oracle_model(name, model, problem):
    """A model whose double backward torch gets right (see the tests of weight norm and bags)."""
    if name in ("parametrised", "old weight norm", "weight norm"):
        return problem.twin
    return brute_force.without_bags(copy.deepcopy(model)) if name.startswith("bag") else model


def behind(layer, *shape, width):
    """A layer between a layer and a head."""
    first = nn.Linear(shape[-1], shape[-1])
    model = lively(
        nn.Sequential(first, nn.Tanh(), layer, nn.Sigmoid(), nn.Flatten(), nn.Linear(width, 3))
    )
    return model, (torch.randn(2, *shape),)


def seeds_of(problem):
    rows = slice(0, problem.batch.size)
    h = problem.forward(problem.batch).detach()
    return curvature_cotangents(problem, rows, h, label_cotangents(problem, rows, h)).vectors


def hadamard(size):
    """Sylvester's: orthogonal rows and columns of signs, size a power of two."""
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


class TooFew(Exception):
    """The array has fewer probes than there are entries."""


class Orthogonal:
    """Signs from orthogonal arrays: the mean over all probes is the expectation, not an estimate.

    Row k of a Hadamard matrix spread over all of one kind's entries makes Σ_k v_k v_kᵀ = K I. With
    directions u and flips σ from a product of two arrays, every u meets every σ.
    """

    def __init__(self, diagonal=1, direction=0, flip=0):
        self.rows = {"diagonal": hadamard(diagonal), "own": hadamard(diagonal)}
        if direction:
            self.rows["direction"] = hadamard(direction).repeat_interleave(flip, 0)
            self.rows["flip"] = hadamard(flip).repeat(direction, 1)
        self.used = dict.fromkeys(self.rows, 0)
        self.place = {}

    def __call__(self, shape, key, seed, *, first=0, dtype, device):
        kind, rest = key.split(" ", 1)
        if kind in ("diagonal", "own"):  # those of every seed take the same rows
            rest = rest.split(" ", 1)[1]
        k, where = rest.split(" ", 1)
        if kind not in self.rows:
            return rademacher(shape, key, seed, first=first, dtype=dtype, device=device)
        width = torch.Size(shape[1:]).numel()
        if (kind, where) not in self.place:
            self.place[kind, where] = 0 if kind == "own" else self.used[kind]
            self.used[kind] += width
        start = self.place[kind, where]
        if start + width > self.rows[kind].shape[1]:
            raise TooFew
        row = self.rows[kind][int(k), start : start + width].to(dtype)
        return row.expand(shape[0], -1).reshape(shape)


def orthogonal_measurement(monkeypatch, problem, **sizes):
    """The curvature measured with the signs of ``Orthogonal(**sizes)``."""
    array = Orthogonal(**sizes)
    monkeypatch.setattr(directions, "rademacher", array)
    monkeypatch.setattr(diagonal_accumulator, "rademacher", array)
    monkeypatch.setattr(propagation, "rademacher", array)
    monkeypatch.setattr(random_signs, "rademacher", array)
    measured = measure_with_fallbacks(problem, make_verified_plan(problem))
    assert measured.notes == []
    return measured.curvature
