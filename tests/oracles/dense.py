"""Whole covariance tensors [P², P²] of Î₁ and Î₂ and dense bounds, by enumerated labels in float64."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from fimprobe.likelihoods import Gaussian
from tests.models.cases import Lambda, lively
from tests.oracles import brute_force

SIGMA = 0.7


class Setting(NamedTuple):
    model: nn.Module
    args: tuple[torch.Tensor, ...]
    likelihood: Any
    labels: Callable
    classes: int | None = None
    positions: int = 1

    def truth(self) -> list["Input"]:
        return [
            Input(self.model, self.args, b, self.labels, classes=self.classes)
            for b in range(len(self.args[0]))
        ]


def bent(outputs, width=2, size=3):
    """A small net whose Hessians are dense."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, width), nn.Sigmoid())
    net.append(nn.Linear(width, outputs))
    return lively(net), (torch.randn(size, 2),)


def sequence():
    """Two positions of two classes; the positions see each other."""
    net = Lambda(
        lambda self, x: self.parts[1](torch.tanh(self.parts[0](x).cumsum(1))),
        nn.Linear(2, 2),
        nn.Linear(2, 2),
    )
    return lively(net), (torch.randn(3, 2, 2),)


def categorical(positions, classes):
    return lambda h: brute_force.categorical_labels(h, positions, classes)


MAKERS = {
    "categorical": lambda: Setting(*bent(3), "categorical", categorical(1, 3), 3),
    "two positions": lambda: Setting(*sequence(), "categorical", categorical(2, 2), 2, 2),
    "bernoulli 1": lambda: Setting(*bent(1), "bernoulli", brute_force.bernoulli_labels),
    "bernoulli 2": lambda: Setting(*bent(2), "bernoulli", brute_force.bernoulli_labels),
    "bernoulli 3": lambda: Setting(*bent(3), "bernoulli", brute_force.bernoulli_labels),
    "poisson": lambda: Setting(*bent(2), "poisson", lambda h: brute_force.poisson_labels(h, 40)),
    "gaussian": lambda: Setting(
        *bent(2), Gaussian(SIGMA), lambda h: brute_force.gaussian_labels(h, SIGMA)
    ),
}


@functools.cache
def setting(name: str) -> tuple[Setting, list["Input"]]:
    """A setting and the truth for each of its inputs; needs float64 as the default type."""
    torch.manual_seed(3)
    made = MAKERS[name]()
    return made, made.truth()


class Input(brute_force.Dense):
    """One input's dense tensors; every method takes the entries of a group of parameters."""

    def __init__(self, model, args, b, labels, pick=lambda o: o, *, classes=None) -> None:
        super().__init__(model, args, b, labels, pick)
        self.classes = classes
        outputs = len(self.jacobian)
        outer = self.scores.unsqueeze(2) * self.scores.unsqueeze(1)
        self.moment = _covariance(outer.flatten(1), self.weights)  # M [C², C²]
        self.centre = torch.eye(outputs)
        if classes is not None:
            block = torch.eye(classes) - 1 / classes
            self.centre = torch.block_diag(*[block] * (outputs // classes))

    def g(self, index):
        """Every label's score [Y, P]."""
        return self.scores @ self.jacobian[:, index]

    def cov1(self, index):
        """Cov(vec g gᵀ) [P², P²]."""
        g = self.g(index)
        return _covariance((g.unsqueeze(2) * g.unsqueeze(1)).flatten(1), self.weights)

    def cov2(self, index):
        """Cov(vec R) [P², P²]."""
        return _covariance(self.scores @ self.block(index), self.weights)

    def block(self, index):
        """∂²h_a of the group's block [C, P²]."""
        return self.hessian[:, index][:, :, index].flatten(1)

    def v1(self, index):
        return _diagonal(self.cov1(index), len(index))

    def l1(self, index):
        return float(self.cov1(index).trace())

    def frobenius(self, index):
        return float(self.jacobian[:, index].norm())

    def s_max(self, index, centred=False):
        j = self.jacobian[:, index]
        return float(torch.linalg.matrix_norm(self.centre @ j if centred else j, 2))

    @property
    def m_max(self):
        return float(torch.linalg.eigvalsh(self.moment)[-1])

    @property
    def i_range(self):
        values = torch.linalg.eigvalsh(self.output_fisher)
        return float(values[0]), float(values[-1])

    def first(self, index) -> dict[str, float]:
        """What the report says of Î₁ for this input alone."""
        cov, f, j = self.cov1(index), self.fisher.diagonal()[index], self.jacobian[:, index]
        g, low = self.g(index), self.s_max(index, centred=True)
        lengths = j.square().sum(0)
        fro = self.frobenius(index)
        found = {
            "covariance_norm": float(cov.norm()),
            "covariance_spectral_norm": float(torch.linalg.eigvalsh(cov)[-1]),
            "label_variance": float(_diagonal(cov, len(index)).sum()),
            "total_label_variance": float(cov.trace()),
            "bound": fro**4 * float(self.moment.norm()),
            "sharp_bound": low**4 * float(self.moment.norm()),
            "trace_bound": low**4 * float(self.moment.trace()),
            "diagonal_bound": float(lengths.square().sum()) * self.m_max,
            "low": fro**2 * self.i_range[0],
            "high": fro**2 * self.i_range[1],
        }
        if self.classes is not None and len(j) == self.classes:
            found["diagonal_range_bound"] = float((f * (g.square().amax(0) - f)).sum())
        return found

    def second(self, index) -> dict[str, float]:
        """The same of Î₂."""
        cov, h = self.cov2(index), self.block(index)
        low, size = self.centre @ h, float(self.output_fisher.norm())
        own = self.hessian.diagonal(dim1=1, dim2=2)[:, index]
        return {
            "covariance_norm": float(cov.norm()),
            "covariance_spectral_norm": float(torch.linalg.eigvalsh(cov)[-1]),
            "label_variance": float(_diagonal(cov, len(index)).sum()),
            "total_label_variance": float(cov.trace()),
            "bound": float(h.square().sum()) * size,
            "sharp_bound": float(torch.linalg.matrix_norm(low, 2)) ** 2 * size,
            "trace_bound": float(low.square().sum()) * self.i_range[1],
            "whole_trace_bound": float(h.square().sum()) * self.i_range[1],
            "diagonal_bound": float(own.square().sum()) * self.i_range[1],
        }


def mean(values):
    values = [float(v) for v in values]
    return math.fsum(values) / len(values)


def averaged(truth, index, kind):
    """{name: mean over inputs} of ``first`` or ``second``."""
    each = [getattr(t, kind)(index) for t in truth]
    return {k: mean(e[k] for e in each) for k in each[0]}


def _covariance(values, weights):
    centred = values - weights @ values
    return (centred * weights[:, None]).T @ centred


def _diagonal(cov, size):
    """Cov_iiii."""
    own = torch.arange(size) * (size + 1)
    return cov.diagonal()[own]
