"""Sufficient statistics, which engines return and estimators turn into estimates.

Symbols: B inputs, S draws or passes of each, G groups of parameters; n output cotangents, K random
probes and J directions of the parameters for second derivatives.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.likelihoods.base import OutputNorms

MAX_ENTRIES = 1024
"""Entries in the subsample of a larger tensor."""

_GOLDEN_RATIO = 0.6180339887498949


def subsample_entries(x: Tensor) -> Tensor:
    """Return all entries of a small tensor, ``MAX_ENTRIES`` of a larger one.

    The step between two of these entries is coprime to the size, so that it divides no row or column
    length.

    >>> len(subsample_entries(torch.ones(3, 5))), len(subsample_entries(torch.ones(300, 50)))
    (15, 1024)
    """
    entries = x.reshape(-1) if x.dim() != 1 else x
    return entries if len(entries) <= MAX_ENTRIES else entries[_indices(len(entries), entries.device)]


@functools.lru_cache(maxsize=256)
def _indices(size: int, device: torch.device) -> Tensor:
    # steps of the golden ratio leave no large gap, however many entries there are
    step = round(_GOLDEN_RATIO * size)
    while math.gcd(step, size) > 1:
        step += 1
    return torch.arange(MAX_ENTRIES, device=device) * step % size


@dataclass(kw_only=True)
class Moments:
    """Sums over B inputs and their S draws for one parameter.

    docs/theory.md, "The sums of a measurement", has the formula, shape and use of each. g are
    per-sample gradients. Exact labels weight g² by w and g⁴ by w₄, and S is 1 in every formula. Drawn
    labels of weight w (1, or that of a size-biased draw) enter as ĝ = √w g, with w₄ = 1/w.
    """

    a2: Tensor
    """A2 = Σ_b Σ_s w g² of every entry, in the parameter's shape; empty where sums are enough."""
    a2_sum: float
    """A2 summed over the entries."""
    a2_square: float
    """A2² summed over the entries."""
    powers: Tensor
    """Four sums for each input, over the entries [4, B].

    Row 0: A4 = Σ_s w₄ ĝ⁴; for drawn labels Σ_s w g⁴.
    Row 1: Q = (Σ_s w g²)².
    Row 2: R = Σ_blocks (Σ_{s in block} w g²)². Each drawn label is a block, so that R = Σ_s w² g⁴.
    Row 3: for the exact passes of one label F_bi max_s g_bsi². For drawn labels, one per input,
    Σ_s c_s ĝ_s⁴, where c_s is the number of other draws equal to draw s minus its expectation.
    """
    squared_norms: Tensor
    """Per-sample squared norms ‖ĝ_s‖² [B, S]."""
    gram: Tensor | None = None
    """Inner products ĝ_s·ĝ_t [B, S, S]; None where S is large."""
    a4: Tensor | None = None
    """A4 of every entry, on request; so are ``q`` and ``r``."""
    q: Tensor | None = None
    r: Tensor | None = None
    entries: Tensor | None = None
    """A subsample of ``a2`` (:func:`fimprobe.statistics.subsample_entries`)."""

    @property
    def a4_sum(self) -> float:
        """A4 summed over all inputs and entries."""
        return float(self.powers[0].sum())

    @property
    def q_sum(self) -> float:
        """Q summed over all inputs and entries."""
        return float(self.powers[1].sum())

    @property
    def r_sum(self) -> float:
        """R summed over all inputs and entries."""
        return float(self.powers[2].sum())

    @property
    def top_sum(self) -> float:
        """Σ F_bi max_s g_bsi² of exact passes over all inputs and entries."""
        return float(self.powers[3].sum())


@dataclass(kw_only=True)
class MomentsBatch:
    """The moments of all parameters of one measurement, for one kind of cotangents."""

    parameters: dict[str, Moments]
    batch_size: int
    draws: int | None
    """S; None for exact labels."""
    square_weights: Tensor | None = None
    """Weights w of g² of exact passes [B, S]."""
    quartic_weights: Tensor | None = None
    """Weights w₄ of g⁴ of exact passes [B, S]."""
    blocks: Tensor | None = None
    """The independent label that each exact pass belongs to [S]."""
    inverse_weights: Tensor | None = None
    """1/w of size-biased labels, float64 [B, S]; None where labels were drawn from the model."""
    seen_mass: float | None = None
    """Σ‖δ‖² of labels drawn from the model over its expectation: far from 1 where labels that carry
    F were not drawn. None for size-biased and exact labels, which always see them."""
    fisher_trace: float | None = None
    """Σ_b tr I(h_b) = Σ_b E‖δ_b‖², the expectation in ``seen_mass``; None where it is not known."""
    coverage: dict[str, str] = field(default_factory=dict)
    """How each parameter was measured."""
    classes: int | None = None
    """Number of outputs that share one label (softmax), where bounds were requested."""


@dataclass(kw_only=True)
class Curvature:
    """Second derivatives R = Σ_a c_a ∂²h_a/∂θ∂θᵀ of a parameter θ, for B inputs and n cotangents."""

    trace: Tensor
    """Σ_i R_ii [B, n], unbiased over the probes."""
    square: Tensor
    """Σ_i R_ii² [B, n], unbiased over the probes."""
    probe_squares: Tensor | None
    """Σ_i r_i² of each probe's r, whose mean is R_ii [B, n, K]; None without probes."""
    block: Tensor
    """⟨(R_y u)_θ, (R_z σu)_θ⟩ for directions u, R within one call [J, B, n, n], or its diagonal
    [J, B, n]. The sign flips σ (``signs``) cancel the other parameters."""
    whole: Tensor
    """⟨(R_y u)_θ, (R_z u)_θ⟩ for directions u of all parameters, in the shape of ``block``."""
    signs: Tensor
    """σ of this parameter [J, B]."""
    joint: Tensor | None = None
    """As ``block``, R across the calls: for a parameter with interacting uses."""
    diagonal: Tensor | None = None
    """Σ_b Σ_n w R_ii of every entry, on request."""
    diagonal_square: Tensor | None = None
    """Σ_b Σ_n w R_ii² of every entry, on request."""


@dataclass(kw_only=True)
class CurvatureBatch:
    """The second derivatives of all parameters of one measurement."""

    parameters: dict[str, Curvature]
    draws: int
    """Number of cotangents that are label scores: the first of the n."""
    weights: Tensor
    """Weights of R² in its expectation over labels [B, draws]."""
    exact: bool
    """Whether labels were integrated over exactly."""
    partners: dict[str, set[str]]
    """Parameters of the same layer with interacting uses (a parameter itself, where it is reused)."""
    probes: int
    """K, the number of random probes."""


@dataclass(kw_only=True)
class SpotStratum:
    """Spot checks of one layer: n independent estimates of its V2 = Σ_i E R_ii², never negative.

    A check belongs to the parameter whose entry it drew. Its value with 0 for the checks of other
    parameters estimates V2 of that parameter alone.
    """

    layer: str
    kind: str
    """Name that layers of the same kind share."""
    parameters: list[str]
    owners: Tensor
    """Index of each check's parameter [n]."""
    values: Tensor
    """The estimates [n], float64."""
    rounding: Tensor
    """Share of each value that may be rounding [n], from 0 to 1."""
    pilot: int
    """Number of checks in the pilot, the first ones. The others were allotted by their values."""


@dataclass(kw_only=True)
class SpotChecks:
    """V2 by spot checks. Parameters without a stratum have V2 = 0, by the autograd graph."""

    strata: list[SpotStratum]
    failure: str = ""
    """Why there is none; empty if there is."""


@dataclass(kw_only=True)
class GradientGroups:
    """Gradients with the data's labels, summed over groups of successive inputs."""

    inner: dict[str, Tensor]
    """Inner products of these sums by parameter, float64 on the CPU [groups, groups]."""
    sizes: list[int]
    """Number of inputs of each group; empty if there are none."""
    reason: str = ""
    """Why there are none."""


@dataclass(kw_only=True)
class Measured:
    """The statistics that an engine returns for one batch."""

    moments: dict[str, MomentsBatch]
    """Moments by the kind of cotangents: "i1" label scores, "ih" Hutchinson's vectors, "empirical"
    scores of the data's labels, "jacobian" unit vectors or random signs, "ggn" factors of I(h)."""
    curvature: CurvatureBatch | None = None
    spot_checks: SpotChecks | None = None
    """V2 by spot checks, where they were requested."""
    norms: OutputNorms | None = None
    """Norms of I(h) and M of each input, where bounds were requested."""
    activations: MomentsBatch | None = None
    """Moments of ∂ℓ/∂h of each layer's input, for the label scores."""
    gradients: GradientGroups | None = None
    """For the gradient noise scale; None without data labels, or for several processes."""
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kinks: list[str] = field(default_factory=list)
    """Modules or autograd nodes that are not twice differentiable."""
