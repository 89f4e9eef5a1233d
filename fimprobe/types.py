"""The records and protocols that flow through fimprobe, and its errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fimprobe.report import Report


class FimprobeError(Exception):
    """What fimprobe raises: the message names the argument, its value and the remedy."""


class BatchError(FimprobeError):
    """This batch cannot be probed (empty, non-finite outputs, ...); another one may."""


class Pass(NamedTuple):
    """One backward pass of an exact expectation over labels.

    ``seed`` [B, ...] has the shape of the outputs. ``second`` and ``fourth`` [B] are the
    factors of (Jᵀ seed)² and (Jᵀ seed)⁴ in E g² and E g⁴. ``block`` numbers the independent
    random variable that the pass belongs to: fourth cumulants add over blocks.
    """

    seed: Tensor
    second: Tensor
    fourth: Tensor
    block: int


@dataclass(frozen=True)
class OutputNorms:
    """Sizes of an input's output Fisher information I(h) and fourth moment M, float64 [B].

    The output vector is all of an input's labelled positions together, independent given the
    input; M = K − I⊗I = Cov(vec δδᵀ) is a C²×C² matrix, δ being the score at the outputs and
    K_abcd = E δ_a δ_b δ_c δ_d. Norms and traces are exact. The largest eigenvalues are exact for
    independent components and for softmax outputs where ``Categorical.norms`` says so, otherwise
    upper bounds. ``fisher_min`` is exact. Without any labelled position all are 0.
    """

    fisher_norm: Tensor
    """‖I‖_F."""
    fisher_trace: Tensor
    """tr I."""
    fisher_max: Tensor
    """λ_max(I), or an upper bound."""
    fisher_min: Tensor
    """λ_min(I) over the labelled positions; 0 for softmax outputs."""
    moment_norm: Tensor
    """‖M‖_F."""
    moment_trace: Tensor
    """tr M."""
    moment_max: Tensor
    """λ_max(M), or an upper bound."""


@runtime_checkable
class Likelihood(Protocol):
    """A family p(y | h) of label distributions, h being the network's outputs [B, ...].

    Subclass :class:`fimprobe.likelihoods.Independent` for one label per output component:
    it needs ``quantile``, ``score``, ``variance`` and ``fourth_moment`` only.
    """

    @property
    def name(self) -> str:
        """How messages and reports call the family."""

    def check_outputs(self, outputs: Tensor) -> None:
        """Raise :class:`FimprobeError` where the outputs' shape does not fit."""

    def label_shape(self, outputs: Tensor) -> torch.Size:
        """Shape of one draw of the labels, batch first."""

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Labels at the float64 ``uniforms`` [B, ...] in (0, 1): the inverse CDF."""

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """∂ log p(y | h) / ∂h, in the shape of the outputs (t(y) − η for natural h)."""

    def count_passes(self, outputs: Tensor) -> int:
        """Backward passes that an exact expectation over the labels takes."""

    def exact_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Passes whose weighted squares and fourth powers sum to the exact moments."""

    def norms(self, outputs: Tensor, mask: Tensor | None) -> OutputNorms:
        """Norms, traces and extreme eigenvalues of I(h) and M, one value per input."""

    def fisher_factor(self, outputs: Tensor, xi: Tensor) -> Tensor:
        """L ξ with L Lᵀ = I(h) and ξ of the outputs' shape: the seed of one Hutchinson draw."""

    def hutchinson_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Passes of the exact expectation over Rademacher ξ: the columns of L, a block each."""

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Raise :class:`FimprobeError` where a data set's labels do not fit the outputs."""

    def data_score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """``score`` at labels that ``check_labels`` let pass, zero where they are ignored."""


@dataclass
class Draws:
    """How labels come about: ``count`` samples per input, or ``count=None`` for exact.

    ``uniforms`` [B, count, ...] are made once for the whole batch, so that chunking, the
    engine, the device and the number of processes change no label. Where processes share a batch,
    ``first`` is the place of this one's first sample among all ``total``.
    """

    count: int | None
    seed: int
    first: int = 0
    total: int | None = None
    uniforms: Tensor | None = None

    def uniforms_for(self, rows: slice, size: int, label_shape: torch.Size) -> Tensor:
        """The (0, 1) variates, float64 [rows, count, ...], of some rows of a batch of ``size``."""
        assert self.count is not None
        if self.uniforms is None:
            generator = torch.Generator().manual_seed(self.seed)
            shape = (self.total or size, self.count, *label_shape[1:])
            # rand is a multiple of 2^-53 in [0, 1): half a step more keeps it inside (0, 1)
            drawn = torch.rand(shape, generator=generator, dtype=torch.float64).add_(2.0**-54)
            self.uniforms = drawn.clamp_(max=1 - 2.0**-53)[self.first : self.first + size]
        return self.uniforms[rows]


@dataclass
class Moments:
    """Sums over B inputs and their draws for one parameter (theory: "From B inputs × S draws").

    With weights w in place of 1 for exact draws (S is then 1 in every formula):
    ``a2`` Σ_b Σ_s w g² per entry, empty where only sums are wanted (``a2_sum`` Σ_i, ``a2_square``
    Σ_i of its square) · ``a4_sum`` Σ_i Σ_b Σ_s w₄ g⁴ · ``q_sum`` Σ_i Σ_b (Σ_s w g²)² ·
    ``r_sum`` the same with the square taken inside each block (equal for one block) · ``gram``
    [B, S, S] the inner products g_s·g_t, its diagonal the per-sample squared norms
    (``squared_norms`` [B, S] alone where S is large) · ``a4``, ``q``, ``r`` per entry on request.
    """

    a2: Tensor
    a2_sum: float
    a2_square: float
    a4_sum: float
    q_sum: float
    r_sum: float
    squared_norms: Tensor
    top_sum: float = 0.0
    """Σ_i Σ_b F_bi max_s g_bsi², for one label's exact passes."""
    gram: Tensor | None = None
    a4: Tensor | None = None
    q: Tensor | None = None
    r: Tensor | None = None
    entries: Tensor | None = None
    """Some of ``a2``, spread over it (:func:`fimprobe.sampling.spread`)."""


@dataclass
class MomentsBatch:
    """All parameters' moments of one measurement, and what they were made of."""

    parameters: dict[str, Moments]
    batch_size: int
    draws: int | None
    second: Tensor | None = None
    fourth: Tensor | None = None
    blocks: Tensor | None = None
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


@dataclass(frozen=True)
class Estimate:
    """One estimator of the Fisher information of a group of parameters.

    F̂ is the estimate's diagonal and i runs over the group's entries. Variances are per draw
    (N = 1); ``std_error`` and ``rel_error`` are at this report's inputs and draws.
    """

    trace: float
    """Σ_i F̂_ii, in nats per squared unit of parameter."""
    norm: float
    """‖diag F̂‖₂."""
    label_variance: float | None
    """Σ_i V_y: the mean over inputs of the variance over labels; None with a single draw."""
    input_variance: float | None
    """Σ_i V_x: the variance over inputs of F_ii(x); None with one input or a single draw."""
    total_variance: float | None
    """Σ_i (V_x + V_y): the variance of one (input, label) pair; None where neither is known, and for
    Î₂ where the probes' noise made V_y negative."""
    std_error: float | None
    """Standard error of ``trace`` over inputs and draws."""
    rel_error: float | None
    """√(Σ_i Var F̂_ii) / ‖diag F̂‖₂ over inputs and draws; None where ``total_variance`` is."""
    total_label_variance: float | None
    """L1, L2: Σ_ij Var over labels of the whole block's matrix entries, mean over inputs."""
    probe_error: float | None = None
    """Standard error that random probes add to ``label_variance``; None where there are none."""
    covariance_norm: float | None = None
    """‖Cov Î‖_F over labels, mean over inputs; exact labels only."""
    covariance_spectral_norm: float | None = None
    """‖Cov Î‖_op, mean over inputs; exact labels only."""
    bound: float | None = None
    """(17) ‖J‖_F⁴‖M‖_F for Î₁, (18) ‖H‖_F²‖I‖_F for Î₂: on ``covariance_norm``, mean over inputs."""
    bound_error: float | None = None
    """Standard error that random probes of ‖J‖ or ‖H‖ add to ``bound``; for ‖H‖ with drawn labels
    without the part of the parameters' direction, which is a single one for all inputs."""
    sharp_bound: float | None = None
    """The same with logits centred and, for exact labels, s_max in place of Frobenius norms."""
    trace_bound: float | None = None
    """s_max(J)⁴ tr M, λ_max(I)‖H‖_F²: on ``total_label_variance``."""
    diagonal_bound: float | None = None
    """Σ_i ‖J_i‖⁴λ_max(M), Σ_i ‖∂²_ii h‖²λ_max(I) [P2]: on ``label_variance``; Î₂: exact labels."""
    diagonal_range_bound: float | None = None
    """Σ_i F_ii(max_y g_yi² − F_ii) [P2], one class label: on Î₁'s ``label_variance``."""
    trace_range: tuple[float, float] | None = None
    """‖J‖_F²λ_min(I) ≤ tr F ≤ ‖J‖_F²λ_max(I), means over inputs."""
    cosine: float | None = None
    """Between the diagonals of the empirical Fisher and of F."""
    trace_ratio: float | None = None
    """Of the empirical Fisher to F."""
    diagonal: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)
    diagonal_label_variance: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)
    diagonal_input_variance: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def tightness(self) -> float | None:
        """``bound`` / ``covariance_norm``, 1 at best; None where ‖Cov‖ is not known or is zero, and
        where the bound is lost in the noise of its probes.
        """
        if self.bound is not None and self.bound_error is not None and self.bound <= self.bound_error:
            return None
        return _ratio(self.bound, self.covariance_norm)

    @property
    def sharp_tightness(self) -> float | None:
        """``sharp_bound`` / ``covariance_norm``."""
        return _ratio(self.sharp_bound, self.covariance_norm)

    @property
    def trace_tightness(self) -> float | None:
        """``trace_bound`` / ``total_label_variance``: for sampled labels too."""
        return _ratio(self.trace_bound, self.total_label_variance)

    @property
    def diagonal_tightness(self) -> float | None:
        """``diagonal_bound`` / ``label_variance``."""
        return _ratio(self.diagonal_bound, self.label_variance)

    def draws_for(self, eps: float) -> float | None:
        """Pairs (input, label) for a relative error ``eps``: Σ(V_x + V_y) / (ε² ‖diag F̂‖²).

        >>> Estimate(1.0, 2.0, 3.0, 1.0, 4.0, None, None, None).draws_for(0.5)
        4.0
        """
        if not eps > 0:
            raise FimprobeError(f"eps={eps!r} is no relative error; pass a number above 0")
        if self.total_variance is None or self.norm == 0:
            return None
        return self.total_variance / (eps * self.norm) ** 2


def _ratio(bound: float | None, value: float | None) -> float | None:
    if bound is None or value is None or value <= 0 or bound <= 0:
        return None
    return bound / value


@dataclass(frozen=True)
class Geometry:
    """How a group's parameters W move the outputs h_L: root mean squares over the inputs."""

    jacobian_norm: float
    """‖∂h_L/∂W‖_F (20); by random probes where labels are sampled."""
    jacobian_spectral_norm: float | None
    """s_max(∂h_L/∂W) (21); exact labels only."""
    frobenius_bound: float | None = None
    """(20), the form that holds for every layer, on ``jacobian_norm``."""
    spectral_bound: float | None = None
    """(21) on ``jacobian_spectral_norm``."""
    weight_spectral_norm: float | None = None
    """At least s_max of the layer's own linear map, without the bias: exact for small layers, up to
    10 % above for wide ones, more for convolutions; None where it is dear and enters no bound."""
    weight_frobenius_norm: float | None = None
    """‖·‖_F of the layer's own linear map, without the bias."""
    reason: str = ""
    """Why (20) and (21) do not apply."""


@dataclass(frozen=True)
class GroupEstimates:
    """What was measured for one parameter, one layer or the whole model."""

    numel: int
    i1: Estimate
    i2: Estimate | None = None
    ih: Estimate | None = None
    empirical: Estimate | None = None
    activation: Estimate | None = None
    """Î₁ of the layer's input h (19): the trace and variance of (∂ℓ/∂h)(∂ℓ/∂h)ᵀ."""
    geometry: Geometry | None = None


class Engine(Protocol):
    """Turns a model, a batch and draws into moments."""

    def measure(self, *args: Any, **kwargs: Any) -> MomentsBatch:
        """Moments of every trainable parameter."""


class Sink(Protocol):
    """Takes reports: TensorBoard, a file, memory, or a user's own."""

    def write(self, report: Report) -> None:
        """Store one report."""

    def close(self) -> None:
        """Flush and let go."""
