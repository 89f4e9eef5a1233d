"""Records of the estimates for one group of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.estimators.bulk import record_of

if TYPE_CHECKING:
    from fimprobe.estimators.pair_variance import PairVariance


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One estimate of the Fisher information of a group of parameters.

    F̂ is the diagonal of the estimate and i runs over the entries of the group. Two questions have
    two answers. ``std_error`` and ``rel_error`` are the errors of this report's numbers, with all
    inputs, labels and probes of the measurement. ``error_of`` and ``pairs_for`` are the errors of the
    estimator with labels drawn from the model, for any number of inputs and labels. Variances are
    those of one draw (N = 1). An unknown number is None, with the reason in ``unknown``.
    """

    trace: float | None
    """Σ_i F̂_ii, in nats per squared unit of the parameter."""
    norm: float | None
    """‖diag F‖₂, corrected for the noise of F̂."""
    label_variance: float | None = None
    """Σ_i V_y: the variance over labels drawn from the model, mean over the inputs; None with a
    single draw."""
    label_variance_error: float | None = None
    """Standard error of ``label_variance`` over inputs, draws and probes; None for exact labels
    without probes."""
    input_variance: float | None = None
    """Σ_i V_x: the variance of F_ii(x) over the inputs; None with one input or a single draw."""
    total_variance: float | None = None
    """Σ_i (V_x + V_y): the variance of one (input, label) pair."""
    std_error: float | None = None
    """Standard error of ``trace`` over the inputs and all draws for them."""
    rel_error: float | None = None
    """√(Σ_i Var F̂_ii) / ‖diag F‖₂ of this report's F̂."""
    skewness: float | None = None
    """Skewness of the inputs' shares of the trace. ``std_error`` is widened for it: intervals are too
    short where few inputs carry much of F (see ``fimprobe.estimators.reliability``)."""
    effective_inputs: float | None = None
    """(Σa)²/Σa² of the inputs' shares a of the trace: how many inputs carry the estimate."""
    total_label_variance: float | None = None
    """L1, L2: Σ_ij of the variance over labels of the whole block's entries, mean over the inputs."""
    total_label_variance_error: float | None = None
    """Standard error of ``total_label_variance`` from draws and probes. For Î₂ with drawn labels it
    leaves out the noise of the parameters' direction where all inputs share a single one."""
    probe_error: float | None = None
    """Standard error that random probes add to ``label_variance``; None without probes."""
    covariance_norm: float | None = None
    """‖Cov Î‖_F over labels, mean over the inputs; exact labels only."""
    covariance_spectral_norm: float | None = None
    """‖Cov Î‖_op over labels, mean over the inputs; exact labels only."""
    bound: float | None = None
    """Bound on ``covariance_norm``, mean over the inputs: (17) ‖J‖_F⁴‖M‖_F for Î₁, (18) ‖H‖_F²‖I‖_F
    for Î₂."""
    bound_error: float | None = None
    """Standard error that random probes of ‖J‖ or ‖H‖ add to ``bound``. For ‖H‖ with drawn labels it
    leaves out the noise of the parameters' direction where all inputs share a single one."""
    sharp_bound: float | None = None
    """``bound`` with centred logits and, for exact labels, s_max in place of Frobenius norms."""
    trace_bound: float | None = None
    """Bound on ``total_label_variance``: s_max(J)⁴ tr M for Î₁, λ_max(I)‖H‖_F² for Î₂."""
    diagonal_bound: float | None = None
    """Bound on ``label_variance``, Soen & Sun (2024): Σ_i ‖J_i‖⁴λ_max(M) for Î₁,
    Σ_i ‖∂²_ii h‖²λ_max(I) for Î₂ (exact labels only)."""
    diagonal_range_bound: float | None = None
    """Bound on the ``label_variance`` of Î₁ for one class label, Soen & Sun (2024):
    Σ_i F_ii(max_y g_yi² − F_ii)."""
    trace_range: tuple[float, float] | None = None
    """‖J‖_F²λ_min(I) ≤ tr F ≤ ‖J‖_F²λ_max(I), means over the inputs."""
    cosine: float | None = None
    """Cosine between the diagonals of the empirical Fisher and of F."""
    trace_ratio: float | None = None
    """Trace of the empirical Fisher over the trace of F."""
    noise_scale: float | None = None
    """Gradient noise scale tr Σ/‖G‖² with the data's labels, in inputs; None where ‖G‖² is within two
    standard errors of zero."""
    noise_scale_error: float | None = None
    """Standard error of ``noise_scale`` over the inputs."""
    pair_variance: PairVariance | None = field(default=None, repr=False)
    """The moments behind ``error_of`` and ``pairs_for``; None where these are unknown."""
    unknown: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Why a field is None, by its name; "pairs" for ``error_of`` and ``pairs_for``."""
    diagonal: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)
    diagonal_label_variance: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)
    diagonal_input_variance: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def changed(self, **changes: Any) -> Estimate:
        """Return a copy with other values."""
        return record_of(Estimate, {**vars(self), **changes})

    @property
    def tightness(self) -> float | None:
        """``bound`` / ``covariance_norm``, at best 1; None where one of them is unknown or zero."""
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
        """Return the relative error for given numbers: √((V_x + V_y/S)/N) / ‖diag F‖₂.

        Args:
            inputs: N, drawn like the inputs of this report.
            labels: S for each input, drawn from the model (for Î_H: vectors ξ); None for exact ones.

        Returns:
            The error; None where it is unknown, for the reason in ``unknown["pairs"]``.

        Raises:
            FimprobeError: If a number is not a positive integer.
        """
        _check_count("inputs", inputs)
        if labels is not None:
            _check_count("labels", labels)
        variance = self.relative_variance(labels)
        return None if variance is None else (variance[0] / inputs) ** 0.5

    def pairs_for(self, eps: float) -> float | None:
        """Return the (input, label) pairs for a relative error: Σ(V_x + V_y) / (ε² ‖diag F‖²).

        Args:
            eps: The relative error ε.

        Returns:
            The number of pairs; None where it is unknown, for the reason in ``unknown["pairs"]``.

        Raises:
            FimprobeError: If ``eps`` is not a positive number.

        >>> from fimprobe.estimators.pair_variance import PairVariance
        >>> sure = ((0.0,) * 3,) * 3
        >>> variance = PairVariance(fourth=3.0, square=2.0, norm_square=1.0, covariance=sure)
        >>> estimate = Estimate(trace=1.0, norm=1.0, pair_variance=variance)
        >>> estimate.pairs_for(0.5), estimate.error_of(inputs=4, labels=2)
        (8.0, 0.6123724356957945)
        """
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps > 0:
            raise FimprobeError(f"`eps` must be a positive number, got {eps!r}. Use 0.1 for 10 %.")
        variance = self.relative_variance(1)
        return None if variance is None else variance[0] / eps**2

    @property
    def pairs_error(self) -> float | None:
        """Relative standard error of ``pairs_for``; that of ``error_of`` is half of it."""
        return one_label_numbers(self, 1)[2]

    def relative_variance(self, labels: int | None) -> tuple[float, float] | None:
        """Return (V_x + V_y/S)/‖diag F‖² and its standard error.

        Args:
            labels: S for each input; None for exact ones.

        Returns:
            Both; None where they are unknown, or where the value is below twice its standard error.
        """
        if self.pair_variance is None:
            return None
        variance = self.pair_variance.relative(labels)
        if variance is None or variance[0] < 0 or variance[0] < 2 * variance[1]:
            return None
        return variance


def one_label_numbers(
    estimate: Estimate, inputs: int
) -> tuple[float | None, float | None, float | None]:
    """Return ``error_of(inputs=inputs)``, ``pairs_for(0.1)`` and ``pairs_error``, all at once.

    Args:
        estimate: The estimate.
        inputs: N, drawn like the inputs of its report.
    """
    variance = estimate.relative_variance(1)
    if variance is None:
        return None, None, None
    value, error = variance
    share = (error / value if value > 0 else 0.0) if error >= 0 else None  # NaN for one input
    return (value / inputs) ** 0.5, value / 0.1**2, share


NUMBERS = tuple(field.name for field in fields(Estimate) if field.type == "float | None")
"""The fields of an estimate that are numbers."""

_numbers = itemgetter(*NUMBERS)


def are_finite(estimate: Estimate) -> bool:
    """Return whether the known numbers of an estimate are finite, and their sum too.

    >>> are_finite(Estimate(trace=1.0, norm=None)), are_finite(Estimate(trace=float("inf"), norm=1.0))
    (True, False)
    """
    return isfinite(sum(filter(None, _numbers(vars(estimate)))))


def make_estimates(
    groups: Iterable[str], columns: Mapping[str, Tensor | Sequence[Any] | None]
) -> dict[str, Estimate]:
    """Return the estimates of G groups from columns of their fields, all at once.

    Args:
        groups: The names of the groups.
        columns: A tensor [G] or G values for a field, by its name; None where it is unknown.

    Returns:
        The estimate of each group, by its name; None in place of NaN.
    """
    plain = vars(Estimate(trace=None, norm=None))
    names, rows = to_rows(columns)
    estimates = {}
    for group, row in zip(groups, rows, strict=True):
        values = plain.copy()
        values.update(zip(names, row, strict=False))
        values["unknown"] = {}
        estimates[group] = record_of(Estimate, values)
    return estimates


def to_rows(
    columns: Mapping[str, Tensor | Sequence[Any] | None],
) -> tuple[tuple[str, ...], Iterator[tuple[Any, ...]]]:
    """Return the names of the known columns, and the values of each group, None in place of NaN.

    Args:
        columns: A tensor [G] or G values for a field, by its name; None is left out.

    >>> import torch
    >>> names, rows = to_rows({"trace": torch.tensor([1.0, torch.nan]), "norm": None})
    >>> names, list(rows)
    (('trace',), [(1.0,), (None,)])
    """
    known = {name: _known(column) for name, column in columns.items() if column is not None}
    return tuple(known), zip(*known.values(), strict=True)


def _known(column: Tensor | Sequence[Any]) -> Sequence[Any]:
    """Return a tensor as numbers, with None in place of NaN."""
    if not isinstance(column, Tensor):
        return column
    return [None if x != x else x for x in column.tolist()]


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FimprobeError(f"`{name}` must be a positive integer, got {value!r}. Use 1, 2, ...")


def _ratio(bound: float | None, value: float | None) -> float | None:
    if bound is None or value is None or value <= 0 or bound <= 0:
        return None
    return bound / value


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Norms of the outputs' Jacobian by a group's parameters W: root mean squares over the inputs."""

    jacobian_norm: float
    """‖∂h_L/∂W‖_F (20); by random probes where labels are sampled."""
    jacobian_spectral_norm: float | None
    """s_max(∂h_L/∂W) (21); exact labels only."""
    frobenius_bound: float | None = None
    """Bound (20) on ``jacobian_norm``, in the form that holds for every layer."""
    spectral_bound: float | None = None
    """Bound (21) on ``jacobian_spectral_norm``."""
    weight_spectral_norm: float | None = None
    """s_max of the layer's linear map without the bias, or a value above it: exact for small layers,
    up to 10 % above for wide ones, more for convolutions. None where it is expensive and enters no
    bound."""
    weight_frobenius_norm: float | None = None
    """‖·‖_F of the layer's linear map without the bias."""
    reason: str = ""
    """Why (20) and (21) do not apply."""


@dataclass(frozen=True, kw_only=True)
class OutputSummary:
    """The output Fisher information I(h) and fourth moment M, means over the inputs.

    Î₁ fails as a model grows confident because tr I → 0. See Soen & Sun (2021), eq. 6 and 14.
    """

    fisher_trace: float
    """tr I(h) = E‖∂ log p/∂h‖²."""
    fisher_norm: float | None = None
    """‖I(h)‖_F; with ``bounds``."""
    moment_norm: float | None = None
    """‖M‖_F; with ``bounds``."""


@dataclass(frozen=True, kw_only=True)
class GroupEstimates:
    """The estimates for one parameter, one layer or the whole model."""

    numel: int
    """Number of parameters."""
    i1: Estimate
    i2: Estimate | None = None
    ih: Estimate | None = None
    empirical: Estimate | None = None
    activation: Estimate | None = None
    """Î₁ of the layer's input h (19): the trace and variance of (∂ℓ/∂h)(∂ℓ/∂h)ᵀ."""
    geometry: Geometry | None = None

    def get(self, estimator: str) -> Estimate | None:
        """Return the estimate of an estimator's key, None where it was not measured.

        >>> group = GroupEstimates(numel=1, i1=Estimate(trace=2.0, norm=2.0))
        >>> group.get("i1").trace, group.get("i2")
        (2.0, None)
        """
        estimate: Estimate | None = getattr(self, estimator)
        return estimate
