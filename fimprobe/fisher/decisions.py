"""What a diagonal of F decides, with the error of the decision.

Errors are those that the error of F causes, to first order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from fimprobe.errors import FimprobeError
from fimprobe.fisher.linear_error import linear_error
from fimprobe.fisher.records import FisherRecord
from fimprobe.model.twin import trainable


def check_shapes(argument: str, known: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Check that tensors have the names and shapes of the diagonal.

    Args:
        argument: Name of the argument, for the message.
        known: The tensors; others than the wanted ones are accepted.
        wanted: The diagonal.

    Raises:
        FimprobeError: If one is missing or has another shape.
    """
    missing = [name for name in wanted if name not in known]
    if missing:
        raise FimprobeError(
            f"`{argument}` must hold the parameters of this Fisher, but {len(missing)} are missing "
            f"({', '.join(map(repr, missing[:3]))}). Pass the model that was measured."
        )
    for name, x in wanted.items():
        if known[name].shape != x.shape:
            raise FimprobeError(
                f"`{argument}` must have the shapes of this Fisher, but {name!r} is "
                f"{tuple(known[name].shape)} and was measured as {tuple(x.shape)}. Pass the model "
                "that was measured."
            )


def check_values(
    argument: str, values: Mapping[str, Tensor], measured: Mapping[str, Tensor], remedy: str
) -> None:
    """Check that parameters are those at which F was measured.

    Args:
        argument: Name of the argument, for the message.
        values: The parameters; others than the measured ones are accepted.
        measured: Those at which F was measured.
        remedy: A sentence.

    Raises:
        FimprobeError: If one differs.
    """
    for name, x in measured.items():
        value = values[name].detach().cpu()
        if not torch.equal(value, x.to("cpu", value.dtype)):
            raise FimprobeError(
                f"`{argument}` must have the parameters at which F was measured, but {name!r} "
                f"differs. {remedy}"
            )


@dataclass(frozen=True, kw_only=True)
class EwcPenalty:
    """The penalty of elastic weight consolidation.

    Attributes:
        value: ½ Σ_i F_ii (θ_i − θ*_i)², a scalar with its graph.
        std_error: Its standard error for this move θ − θ*; None where that of F is not known.
        rel_error: ``std_error`` / ``value``; None where the value is zero too.
    """

    value: Tensor
    std_error: float | None
    rel_error: float | None


def ewc_penalty(fisher: FisherRecord, model: nn.Module, anchor: Mapping[str, Tensor]) -> EwcPenalty:
    """Return the penalty; see :meth:`Fisher.ewc_penalty`.

    Args:
        fisher: F.
        model: The model in training.
        anchor: θ* by name.
    """
    current = trainable(model)
    check_shapes("model", current, fisher.diagonal)
    check_shapes("anchor", anchor, fisher.diagonal)
    value: Any = 0.0
    squares = {}
    for name, f in fisher.diagonal.items():
        theta = current[name]
        move = theta.double() - anchor[name].to(theta.device, torch.float64)
        squares[name] = move.detach().square() / 2
        value = value + (f.to(theta.device) * move.square()).sum() / 2
    error = linear_error(fisher, squares)
    magnitude = float(value.detach())
    rel_error = error / magnitude if error is not None and magnitude > 0 else None
    return EwcPenalty(value=value, std_error=error, rel_error=rel_error)


LEAST_OVERLAP = 0.85
"""Ratio selections with a smaller expected overlap state none.

They select the noise of the ratio, and the normal approximation no longer holds. Ten estimates on
digits: above 1, 91 to 93 % expected and 92 to 96 % true; above 10, 55 to 64 % and 32 to 75 %."""


@dataclass(frozen=True, kw_only=True)
class Mask:
    """The entries with the largest F_ii.

    Attributes:
        masks: Boolean tensors by parameter: True for the chosen entries.
        overlap: Expected share of the chosen entries that are among the truly largest; None where
            it is not known, or nothing was chosen.
        kept: Number of chosen entries.
    """

    masks: dict[str, Tensor] = field(repr=False)
    overlap: float | None
    kept: int


def top_mask(fisher: FisherRecord, top: float) -> Mask:
    """Return the mask; see :meth:`Fisher.mask`.

    Args:
        fisher: F.
        top: Share of the entries.
    """
    if isinstance(top, bool) or not isinstance(top, (int, float)) or not 0 < top < 1:
        raise FimprobeError(f"`top` must be between 0 and 1, got {top!r}. Use 0.1 for a tenth.")
    diagonal, error = flatten(fisher.diagonal), flatten(fisher.std_error)
    kept = max(1, round(top * len(diagonal)))
    chosen = torch.zeros(len(diagonal), dtype=torch.bool)
    chosen[diagonal.topk(kept).indices] = True
    pieces = chosen.split([x.numel() for x in fisher.diagonal.values()])
    masks = {
        name: piece.view(x.shape).to(x.device)
        for (name, x), piece in zip(fisher.diagonal.items(), pieces, strict=True)
    }
    return Mask(masks=masks, overlap=expected_overlap(diagonal, error, kept), kept=kept)


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return all entries as one vector on the CPU."""
    return torch.cat([x.reshape(-1).cpu() for x in tensors.values()])


def expected_overlap(diagonal: Tensor, error: Tensor, kept: int) -> float | None:
    """Return the expected share of the ``kept`` largest estimates that are truly among the largest.

    It is None where an error is not known.

    Args:
        diagonal: Estimates of some entries, one vector.
        error: Their standard errors.
        kept: Number of chosen entries.
    """
    if not bool(torch.isfinite(error).all()):
        return None
    threshold = _true_threshold(diagonal, error, kept)
    right = _exceeds(diagonal, error, threshold)[diagonal.topk(kept).indices]
    return min(1.0, float(right.mean()))


def _exceeds(value: Tensor, error: Tensor, threshold: Tensor | float) -> Tensor:
    """Probability that the truth exceeds a threshold, for normal errors."""
    z = (value - threshold) / error.clamp(min=1e-300)
    return torch.special.ndtr(z)


def _true_threshold(diagonal: Tensor, error: Tensor, kept: int) -> float:
    """The threshold that ``kept`` true entries are expected to exceed, by bisection."""
    low, high = float((diagonal - 4 * error).min()), float((diagonal + 4 * error).max())
    for _ in range(60):
        middle = (low + high) / 2
        if float(_exceeds(diagonal, error, middle).sum()) > kept:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The ratio of two diagonals.

    Attributes:
        values: F_ii / F'_ii by parameter; infinite where only F' is zero, 0 where both are.
        std_error: Standard error of each ratio; infinite where F' is zero, 0 where both are known to
            be zero.
        numerator: F.
        denominator: F'.
    """

    values: dict[str, Tensor] = field(repr=False)
    std_error: dict[str, Tensor] = field(repr=False)
    numerator: FisherRecord = field(repr=False)
    denominator: FisherRecord = field(repr=False)

    @classmethod
    def of(cls, one: FisherRecord, other: FisherRecord) -> Ratio:
        """Return the ratio; see :meth:`Fisher.ratio`.

        Args:
            one: F.
            other: F'.
        """
        if not isinstance(other, FisherRecord):
            raise FimprobeError(
                f"`other` must be a Fisher, got {type(other).__name__}. Estimate it on other data."
            )
        check_shapes("other", other.diagonal, one.diagonal)
        remedy = "Measure both on one state of the model."
        check_values("other", other.values, one.values, remedy)
        values, errors = {}, {}
        for name, f in one.diagonal.items():
            base = other.diagonal[name].to(f.device)
            spread, base_spread = one.std_error[name], other.std_error[name].to(f.device)
            ratio = torch.where(f > 0, f / base, 0.0)
            error = (spread.square() + (ratio * base_spread).square()).sqrt() / base
            zeros = (f == 0) & (base == 0) & (spread == 0) & (base_spread == 0)
            values[name] = ratio
            errors[name] = torch.where(base > 0, error, torch.inf).where(~zeros, 0.0)
        return cls(values=values, std_error=errors, numerator=one, denominator=other)

    def above(self, factor: float) -> Mask:
        """Return the entries with F_ii > factor · F'_ii, as selective synaptic dampening selects.

        Args:
            factor: The threshold of the ratio.

        Returns:
            The entries; ``overlap`` is the expected share of them that truly exceed the factor. It
            is None below ``LEAST_OVERLAP``, where it would be overstated.
        """
        one, other = self.numerator, self.denominator
        masks, sure, kept = {}, 0.0, 0
        for name, f in one.diagonal.items():
            excess = f - factor * other.diagonal[name].to(f.device)
            error_of_other = factor * other.std_error[name].to(f.device)
            error = (one.std_error[name].square() + error_of_other.square()).sqrt()
            masks[name] = excess > 0
            sure += float(_exceeds(excess, error, 0.0)[masks[name]].sum())
            kept += int(masks[name].sum())
        overlap = sure / kept if kept else None
        if overlap is not None and not overlap >= LEAST_OVERLAP:
            overlap = None
        return Mask(masks=masks, overlap=overlap, kept=kept)


@dataclass(frozen=True, kw_only=True)
class LaplaceErrors:
    """Posterior variances of a diagonal Laplace approximation.

    Attributes:
        variance: 1/(H + prior precision) of every parameter, as a vector in laplace-torch's order.
        std_error: Their standard errors.
        rel_error: The largest ``std_error`` / ``variance``; None where an error of F is not known.
    """

    variance: Tensor = field(repr=False)
    std_error: Tensor = field(repr=False)
    rel_error: float | None


def set_laplace(fisher: FisherRecord, la: Any, num_inputs: int | None) -> LaplaceErrors:
    """Set the Hessian; see :meth:`Fisher.to_laplace`.

    Args:
        fisher: F.
        la: A ``DiagLaplace``.
        num_inputs: N; None for the one that was counted.
    """
    if not any(base.__name__ == "DiagLaplace" for base in type(la).__mro__):
        raise FimprobeError(
            f"`la` must be a DiagLaplace over all weights, got {type(la).__name__}. Use "
            "Laplace(model, likelihood, subset_of_weights='all', hessian_structure='diag')."
        )
    known = trainable(la.model)
    check_shapes("la.model", known, fisher.diagonal)
    check_values("la.model", known, fisher.values, "Estimate F at the parameters of `la`.")
    size = num_inputs or fisher.metadata["data_size"]
    if not size:
        raise FimprobeError(
            "`num_inputs` must be the number of inputs of the data set, of which a part was read, "
            f"got {num_inputs!r}. The Hessian is a sum over all of them."
        )
    # laplace-torch leaves the noise of a regression out of H and divides by it itself
    sigma = fisher.metadata.get("sigma") or 1.0
    scale = size * (sigma**2 if getattr(la, "likelihood", "") == "regression" else 1.0)
    zero = {n: torch.zeros_like(p) for n, p in known.items()}

    def vector(tensors: Mapping[str, Tensor]) -> Tensor:
        parts = [tensors.get(n, zero[n]).to(p.device).reshape(-1) for n, p in known.items()]
        return torch.cat([part.to(torch.float64) for part in parts])

    mean = parameters_to_vector(known.values()).detach()
    h, error = scale * vector(fisher.diagonal), scale * vector(fisher.std_error)
    la.H = h.to(mean.dtype)
    la.mean, la.n_data = mean, size
    if getattr(la, "loss", None) is None:
        la.loss = 0.0
    variance = la.posterior_variance.detach().double()
    std_error = variance.square() * float(la._H_factor) * error
    ratio = float((std_error / variance).max())
    rel_error = ratio if math.isfinite(ratio) else None
    return LaplaceErrors(variance=variance, std_error=std_error, rel_error=rel_error)
