"""What a diagonal of F decides, with the error of the decision.

Errors are those that the error of F causes, to first order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True, kw_only=True)
class EwcPenalty:
    """The penalty of elastic weight consolidation.

    Attributes:
        value: ½ Σ_i F_ii (θ_i − θ*_i)², a scalar with its graph.
        std_error: Its standard error for this move θ − θ*.
        rel_error: ``std_error`` / ``value``; None where the value is zero.
    """

    value: Tensor
    std_error: float
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
    return EwcPenalty(
        value=value, std_error=error, rel_error=error / magnitude if magnitude > 0 else None
    )


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


def expected_overlap(diagonal: Tensor, error: Tensor, kept: int) -> float:
    """Return the expected share of the ``kept`` largest estimates that are truly among the largest.

    Args:
        diagonal: Estimates of some entries, one vector.
        error: Their standard errors.
        kept: Number of chosen entries.
    """
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
        std_error: Standard error of each ratio.
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
        check_shapes("other", other.diagonal, one.diagonal)
        values, errors = {}, {}
        for name, f in one.diagonal.items():
            base = other.diagonal[name].to(f.device)
            ratio = torch.where(f > 0, f / base, 0.0)
            error_of_one = one.std_error[name] / f.clamp(min=1e-300)
            error_of_other = other.std_error[name].to(f.device) / base.clamp(min=1e-300)
            values[name] = ratio
            errors[name] = torch.where(
                ratio > 0, ratio * (error_of_one.square() + error_of_other.square()).sqrt(), 0.0
            )
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
        if overlap is not None and overlap < LEAST_OVERLAP:
            overlap = None
        return Mask(masks=masks, overlap=overlap, kept=kept)


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Merged parameters.

    Attributes:
        state: Σ_k F_k θ_k / Σ_k F_k by name, in the types of the first model.
        std_error: Standard error of each merged entry that has an F.
        rel_error: √(Σ error²) over the length of the move away from the plain average; None where
            there is no move.
    """

    state: dict[str, Tensor] = field(repr=False)
    std_error: dict[str, Tensor] = field(repr=False)
    rel_error: float | None


def merge(fishers: Sequence[FisherRecord], states: Sequence[Mapping[str, Tensor]]) -> Merged:
    """Return the merged parameters; see :meth:`Fisher.merge`.

    Args:
        fishers: F of each model.
        states: State dictionaries.
    """
    if len(fishers) < 2 or len(fishers) != len(states):
        raise FimprobeError(
            "`fishers` must hold at least two, with one state each, got "
            f"{len(fishers)} and {len(states)} states. Pass one Fisher for each model."
        )
    first = fishers[0]
    for fisher, state in zip(fishers, states, strict=True):
        check_shapes("fishers", fisher.diagonal, first.diagonal)
        check_shapes("states", state, first.diagonal)
    merged, errors = {}, {}
    error_square = move_square = 0.0
    for name, x in states[0].items():
        if name not in first.diagonal:
            merged[name] = _average([state[name] for state in states])
            continue
        device = x.device
        theta = torch.stack([s[name].to(device, torch.float64) for s in states])
        weight = torch.stack([f.diagonal[name].to(device) for f in fishers])
        spread = torch.stack([f.std_error[name].to(device) for f in fishers])
        total = weight.sum(0)
        known = total > 0
        safe = total.where(known, 1)
        plain = theta.mean(0)
        value = torch.where(known, (weight * theta).sum(0) / safe, plain)
        error = (((theta - value) / safe).square() * spread.square()).sum(0).sqrt()
        error = torch.where(known, error, torch.inf)
        # a weighted mean stays in the range of the models, however uncertain the weights: its
        # standard deviation is at most half of that (Popoviciu's inequality)
        errors[name] = torch.minimum(error, (theta.amax(0) - theta.amin(0)) / 2)
        error_square += float(errors[name].square().sum())
        move_square += float((value - plain).square().sum())
        merged[name] = value.to(x.dtype)
    rel_error = (error_square / move_square) ** 0.5 if move_square > 0 else None
    return Merged(state=merged, std_error=errors, rel_error=rel_error)


def _average(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of entries without an F; the first model's where they are integers."""
    if not tensors[0].is_floating_point():
        return tensors[0].clone()
    return torch.stack([x.to(tensors[0].device) for x in tensors]).mean(0)


@dataclass(frozen=True, kw_only=True)
class LaplaceErrors:
    """Posterior variances of a diagonal Laplace approximation.

    Attributes:
        variance: 1/(H + prior precision) of every parameter, as a vector in laplace-torch's order.
        std_error: Their standard errors.
        rel_error: The largest ``std_error`` / ``variance``.
    """

    variance: Tensor = field(repr=False)
    std_error: Tensor = field(repr=False)
    rel_error: float


def set_laplace(fisher: FisherRecord, la: Any) -> LaplaceErrors:
    """Set the Hessian; see :meth:`Fisher.to_laplace`.

    Args:
        fisher: F.
        la: A ``DiagLaplace``.
    """
    if not any(base.__name__ == "DiagLaplace" for base in type(la).__mro__):
        raise FimprobeError(
            f"`la` must be a DiagLaplace over all weights, got {type(la).__name__}. Use "
            "Laplace(model, likelihood, subset_of_weights='all', hessian_structure='diag')."
        )
    known = trainable(la.model)
    check_shapes("la.model", known, fisher.diagonal)
    size = fisher.metadata["data_size"] or fisher.metadata["inputs"]
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
    return LaplaceErrors(variance=variance, std_error=std_error, rel_error=ratio)
