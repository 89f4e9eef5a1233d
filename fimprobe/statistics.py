"""Sufficient statistics: what engines return and estimators take."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fimprobe.likelihoods.base import OutputNorms

MAX_ENTRIES = 1024
"""Entries that are taken of a larger tensor."""


_GOLDEN = 0.6180339887498949


def subsample_entries(x: Tensor) -> Tensor:
    """All entries of a small tensor, ``MAX_ENTRIES`` of a larger one.

    The steps between the entries taken divide no row or column length.

    >>> len(subsample_entries(torch.ones(3, 5))), len(subsample_entries(torch.ones(300, 50)))
    (15, 1024)
    """
    entries = x.detach().reshape(-1)
    return entries if len(entries) <= MAX_ENTRIES else entries[_places(len(entries), entries.device)]


@functools.lru_cache(maxsize=256)
def _places(size: int, device: torch.device) -> Tensor:
    step = round(_GOLDEN * size)
    while math.gcd(step, size) > 1:
        step += 1
    return torch.arange(MAX_ENTRIES, device=device) * step % size


@dataclass
class Moments:
    """Sums over B inputs and their draws for one parameter (theory: "From B inputs × S draws").

    Exact labels have weights w of g² and w₄ of g⁴ (S is then 1 in every formula); drawn labels of
    weight w (1, or that of a size-biased draw) enter as ĝ = √w g, with 1/w for w₄:
    ``a2`` Σ_b Σ_s w g² per entry, empty where only sums are wanted (``a2_sum`` Σ_i, ``a2_square``
    Σ_i of its square) · ``powers`` [4, B] for each input, summed over entries: A4 = Σ_s w₄ ĝ⁴
    (Σ_s w g⁴ of drawn labels), Q = (Σ_s w g²)², R the same with the square taken inside each block
    (equal for one block; Σ_s w² g⁴ of drawn labels, each its own block), and
    F_bi max_s g_bsi² for one label's exact passes · ``gram`` [B, S, S] the inner products ĝ_s·ĝ_t,
    its diagonal the per-sample squared norms (``squared_norms`` [B, S] alone where S is large) ·
    ``a4``, ``q``, ``r`` per entry on request.
    """

    a2: Tensor
    a2_sum: float
    a2_square: float
    powers: Tensor
    squared_norms: Tensor
    gram: Tensor | None = None
    a4: Tensor | None = None
    q: Tensor | None = None
    r: Tensor | None = None
    entries: Tensor | None = None
    """Some of ``a2``, spread over it (:func:`fimprobe.statistics.subsample_entries`)."""

    @property
    def a4_sum(self) -> float:
        """A4 over all inputs and entries."""
        return float(self.powers[0].sum())

    @property
    def q_sum(self) -> float:
        """Q over all inputs and entries."""
        return float(self.powers[1].sum())

    @property
    def r_sum(self) -> float:
        """R over all inputs and entries."""
        return float(self.powers[2].sum())

    @property
    def top_sum(self) -> float:
        """Σ F_bi max_s g_bsi² over all inputs and entries."""
        return float(self.powers[3].sum())


@dataclass
class MomentsBatch:
    """All parameters' moments of one measurement, and what they were made of."""

    parameters: dict[str, Moments]
    batch_size: int
    draws: int | None
    second: Tensor | None = None
    fourth: Tensor | None = None
    blocks: Tensor | None = None
    inverse_weights: Tensor | None = None
    """1/w of size-biased labels, float64 [B, S]; None where labels were drawn from the model."""
    seen_mass: float | None = None
    """Σ‖δ‖² of labels drawn from the model over its expectation: far from 1 where labels that carry
    F were not drawn. None for size-biased and exact labels, which always see them."""
    fisher_trace: float | None = None
    """Σ_b tr I(h_b) = Σ_b E‖δ_b‖², the expectation in ``seen_mass``; None where it is not known."""
    coverage: dict[str, str] = field(default_factory=dict)
    classes: int | None = None
    """Outputs that share one label (softmax), where bounds were asked for."""


@dataclass
class Curvature:
    """Second derivatives of one parameter θ: R = Σ_a seed_a ∂²h_a/∂θ∂θᵀ of B inputs and n seeds.

    ``trace`` [B, n] Σ_i R_ii and ``square`` [B, n] Σ_i R_ii², unbiased over the probes ·
    ``probe_squares`` [B, n, K] Σ_i r_i² of each probe's r, whose mean is R_ii ·
    ``block`` [J, B, n, n] or its diagonal [J, B, n]: ⟨(R_y u)_θ, (R_z σu)_θ⟩ for directions u of
    the parameters, R within one call, and σ = ``signs`` [J, B] the flips that take other
    parameters out · ``joint`` the same, R across calls (where a parameter meets itself again) ·
    ``whole`` ⟨(R_y u)_θ, (R_z u)_θ⟩ for u over all parameters.
    ``diagonal``, ``diagonal_square`` per entry: Σ_b Σ_n w R_ii and Σ_b Σ_n w R_ii².
    """

    trace: Tensor
    square: Tensor
    probe_squares: Tensor | None
    block: Tensor
    whole: Tensor
    signs: Tensor
    joint: Tensor | None = None
    diagonal: Tensor | None = None
    diagonal_square: Tensor | None = None


@dataclass
class CurvatureBatch:
    """All parameters' second derivatives. The first ``draws`` seeds are those of the labels.

    ``weights`` [B, draws]: of R² in its expectation over labels. ``partners``: parameters of the
    same layer that a parameter meets again (itself, where it is reused). ``probes``: K.
    """

    parameters: dict[str, Curvature]
    draws: int
    weights: Tensor
    exact: bool
    partners: dict[str, set[str]]
    probes: int


@dataclass
class Measured:
    """What an engine returns: moments of each kind of seeds, curvature, and constants per input.

    ``moments``: "i1" the labels' scores, "ih" Hutchinson's seeds, "empirical" the data's labels,
    "jacobian" the outputs themselves. ``activations``: moments of ∂ℓ/∂h of each layer's input, for
    the labels' scores.
    """

    moments: dict[str, MomentsBatch]
    curvature: CurvatureBatch | None = None
    norms: OutputNorms | None = None
    activations: MomentsBatch | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kinks: list[str] = field(default_factory=list)


class Engine(Protocol):
    """Turns a model, a batch and draws into moments."""

    def measure(self, *args: Any, **kwargs: Any) -> MomentsBatch:
        """Moments of every trainable parameter."""
