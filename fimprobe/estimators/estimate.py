"""Records of estimates for one group of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from fimprobe.errors import FimprobeError

if TYPE_CHECKING:
    from fimprobe.estimators.pair_variance import PairVariance


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One estimator of the Fisher information of a group of parameters.

    F̂ is the estimate's diagonal and i runs over the group's entries. Two questions, two numbers:
    ``std_error`` and ``rel_error`` tell how far off this report's numbers are, with everything that
    they were made of; ``error_of`` and ``pairs_for`` how far off the estimator would be with labels
    drawn from the model, for any number of inputs and labels. Variances are per draw (N = 1). A
    number that cannot be known is None, with the reason in ``unknown``.
    """

    trace: float | None
    """Σ_i F̂_ii, in nats per squared unit of parameter."""
    norm: float | None
    """‖diag F‖₂, without what the noise of F̂ adds to it."""
    label_variance: float | None = None
    """Σ_i V_y: the mean over inputs of the variance over labels drawn from the model; None with a
    single draw."""
    label_variance_error: float | None = None
    """Its standard error over inputs, draws and probes; None for exact labels without probes."""
    input_variance: float | None = None
    """Σ_i V_x: the variance over inputs of F_ii(x); None with one input or a single draw."""
    total_variance: float | None = None
    """Σ_i (V_x + V_y): the variance of one (input, label) pair."""
    std_error: float | None = None
    """Standard error of ``trace`` over the inputs and all that was drawn for them."""
    rel_error: float | None = None
    """√(Σ_i Var F̂_ii) / ‖diag F‖₂ of this report's F̂."""
    skewness: float | None = None
    """Of the inputs' shares of the trace. ``std_error`` is widened for it: few inputs that carry much
    of F make intervals too short (see :mod:`fimprobe.estimators.reliability`)."""
    effective_inputs: float | None = None
    """(Σa)²/Σa² of the inputs' shares a of the trace: how many inputs the estimate comes from."""
    total_label_variance: float | None = None
    """L1, L2: Σ_ij Var over labels of the whole block's matrix entries, mean over inputs."""
    total_label_variance_error: float | None = None
    """Its standard error from draws and probes; of Î₂ with drawn labels without the part of the
    parameters' direction, which is a single one for all inputs."""
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
    """Σ_i ‖J_i‖⁴λ_max(M), Σ_i ‖∂²_ii h‖²λ_max(I): on ``label_variance``; Î₂: exact labels.
    Source: Soen & Sun (2024)."""
    diagonal_range_bound: float | None = None
    """Σ_i F_ii(max_y g_yi² − F_ii), one class label: on Î₁'s ``label_variance``.
    Source: Soen & Sun (2024)."""
    trace_range: tuple[float, float] | None = None
    """‖J‖_F²λ_min(I) ≤ tr F ≤ ‖J‖_F²λ_max(I), means over inputs."""
    cosine: float | None = None
    """Between the diagonals of the empirical Fisher and of F."""
    trace_ratio: float | None = None
    """Of the empirical Fisher to F."""
    pair_variance: PairVariance | None = field(default=None, repr=False)
    """What ``error_of`` and ``pairs_for`` are made of; None where they cannot be believed."""
    unknown: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Why a field is None, by its name; "pairs" for ``error_of`` and ``pairs_for``."""
    diagonal: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)
    diagonal_label_variance: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)
    diagonal_input_variance: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def tightness(self) -> float | None:
        """``bound`` / ``covariance_norm``, 1 at best; None where one is not known or is zero."""
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

    def error_of(self, *, inputs: int, labels: int | None = 1) -> float | None:
        """Relative error of the estimator with other numbers: √((V_x + V_y/S)/N) / ‖diag F‖₂.

        Args:
            inputs: N, drawn as this report's were.
            labels: S for each input, drawn from the model (for Î_H: vectors ξ); None: exact.

        Returns:
            None where it is not known; ``unknown["pairs"]`` says why.

        Raises:
            FimprobeError: numbers below 1.
        """
        _check_count("inputs", inputs)
        if labels is not None:
            _check_count("labels", labels)
        found = self._relative(labels)
        return None if found is None else (found[0] / inputs) ** 0.5

    def pairs_for(self, eps: float) -> float | None:
        """Pairs (input, label) for a relative error ``eps``: Σ(V_x + V_y) / (ε² ‖diag F‖²).

        >>> from fimprobe.estimators.pair_variance import PairVariance
        >>> sure = ((0.0,) * 3,) * 3
        >>> variance = PairVariance(fourth=3.0, square=2.0, norm_square=1.0, covariance=sure)
        >>> estimate = Estimate(trace=1.0, norm=1.0, pair_variance=variance)
        >>> estimate.pairs_for(0.5), estimate.error_of(inputs=4, labels=2)
        (8.0, 0.6123724356957945)
        """
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps > 0:
            raise FimprobeError(f"eps={eps!r} is no relative error; pass a number above 0")
        found = self._relative(1)
        return None if found is None else found[0] / eps**2

    @property
    def pairs_error(self) -> float | None:
        """Relative standard error of ``pairs_for``; that of ``error_of`` is half of it."""
        found = self._relative(1)
        if found is None or not found[1] >= 0:
            return None
        return found[1] / found[0] if found[0] > 0 else 0.0

    def _relative(self, labels: int | None) -> tuple[float, float] | None:
        """(V_x + V_y/S)/U and its standard error; None where it is lost in that."""
        if self.pair_variance is None:
            return None
        found = self.pair_variance.relative(labels)
        if found is None or found[0] < 0 or found[0] < 2 * found[1]:
            return None
        return found


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FimprobeError(f"{name}={value!r} is no number of {name}; pass 1, 2, ...")


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
class OutputSummary:
    """The output Fisher information I(h) and fourth moment M, means over the inputs.

    tr I → 0 is why Î₁ fails as a model grows confident. Source: Soen & Sun (2021), eq. 6 and 14.
    """

    fisher_trace: float
    """tr I(h) = E‖∂ log p/∂h‖²."""
    fisher_norm: float | None = None
    """‖I(h)‖_F; with ``bounds``."""
    moment_norm: float | None = None
    """‖M‖_F; with ``bounds``."""


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
