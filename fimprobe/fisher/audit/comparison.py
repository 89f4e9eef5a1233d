"""How far a diagonal is off F, beside what the error of the estimate of F explains.

The estimate F̂ has an error with Σ_i Var F̂_ii = v, so that E‖F̂‖² = ‖F‖² + v. A diagonal t that does
not depend on it has E⟨t, F̂⟩ = ⟨t, F⟩. The cosine between t and F̂ is therefore the one between t and
F times 1/√(1 + ρ²), ρ² = v/‖F‖²: division by this factor removes the noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fimprobe.fisher.decisions import expected_overlap, flatten
from fimprobe.fisher.linear_error import linear_error
from fimprobe.fisher.records import FisherRecord, GroupFisher
from fimprobe.fisher.sums.accumulation import make_groups


@dataclass(frozen=True, kw_only=True)
class GroupAudit:
    """A diagonal t compared with the estimate F̂ over a group of parameters.

    The fields with ``noise`` are what t = F would show, because F̂ has an error. None where t or F is
    zero; those that need the error of F̂ are None where it hides the norm of F.

    Attributes:
        numel: Number of entries.
        scale: tr t / tr F̂.
        scale_error: Its standard error, from that of tr F̂.
        factor: The factor by which t comes nearest to F̂.
        cosine: Cosine between t and F̂.
        noise_cosine: The cosine that t = F would show.
        error: ‖factor · t − F̂‖ / ‖F̂‖.
        noise_error: The error that t = F would show.
        excess_error: The error after the best rescaling without the noise of F̂; 0 where that explains
            all of it.
        overlap: Share of the largest entries of F̂ that are among the largest of t.
        noise_overlap: The overlap that t = F would show.
    """

    numel: int
    scale: float | None
    scale_error: float | None
    factor: float | None
    cosine: float | None
    noise_cosine: float | None
    error: float | None
    noise_error: float | None
    excess_error: float | None
    overlap: float | None
    noise_overlap: float | None


def compare_groups(
    theirs: Mapping[str, Tensor], reference: FisherRecord, top: float
) -> dict[str, GroupAudit]:
    """Return the comparison of each layer ("layer <name>") and of all parameters ("").

    Args:
        theirs: Tensors by parameter; groups consist of these parameters.
        reference: The estimate of F.
        top: Share of the entries that count as the largest.
    """
    present = {name: x for name, x in reference.diagonal.items() if name in theirs}
    groups = make_groups(present)
    return {
        group: _compare(theirs, reference, group, names, top)
        for group, names in groups.items()
        if not group.startswith("parameter ")
    }


def _compare(
    theirs: Mapping[str, Tensor], reference: FisherRecord, group: str, names: list[str], top: float
) -> GroupAudit:
    t = flatten({name: theirs[name] for name in names})
    f = flatten({name: reference.diagonal[name] for name in names})
    std_error = flatten({name: reference.std_error[name] for name in names})
    trace, trace_error, ratio = _noise(reference, group, names)
    scale = float(t.sum()) / trace if trace > 0 else None
    cosine = cosine_of(t, f)
    noise_cosine = None if ratio is None else 1 / math.sqrt(1 + ratio**2)
    kept = max(1, round(top * len(t)))
    informative = cosine is not None and kept < len(t)
    known = scale is not None and trace_error is not None
    return GroupAudit(
        numel=len(t),
        scale=scale,
        scale_error=abs(scale) * trace_error / trace if known else None,  # type: ignore[arg-type,operator]
        factor=None if cosine is None else float(t @ f / (t @ t)),
        cosine=cosine,
        noise_cosine=noise_cosine,
        error=None if cosine is None else sine(cosine),
        noise_error=None if noise_cosine is None else sine(noise_cosine),
        excess_error=_excess(cosine, noise_cosine),
        overlap=overlap_of(t, f, kept) if informative else None,
        noise_overlap=expected_overlap(f, std_error, kept) if informative else None,
    )


def _noise(
    reference: FisherRecord, group: str, names: list[str]
) -> tuple[float, float | None, float | None]:
    """Trace of F̂ over a group, its standard error, and ρ; None where they are not known."""
    whole = reference.total if group == "" else reference.layers.get(group.removeprefix("layer "))
    numel = sum(reference.diagonal[name].numel() for name in names)
    if whole is not None and whole.numel == numel:
        return whole.trace, whole.std_error, whole.rel_error
    parts = [reference.parameters[name] for name in names]
    weights = {
        name: torch.full_like(x, float(name in names)) for name, x in reference.diagonal.items()
    }
    trace = math.fsum(part.trace for part in parts)
    return trace, linear_error(reference, weights), _joint_ratio(parts)


def _joint_ratio(parts: list[GroupFisher]) -> float | None:
    """ρ of several parameters: squares of norms and of errors add up."""
    if any(part.rel_error is None and part.trace > 0 for part in parts):
        return None
    norm_square = math.fsum(part.norm**2 for part in parts)
    variance = math.fsum((part.norm * (part.rel_error or 0.0)) ** 2 for part in parts)
    return math.sqrt(variance / norm_square) if norm_square > 0 else None


def cosine_of(one: Tensor, other: Tensor) -> float | None:
    """Return the cosine between two vectors; None where one is zero."""
    norms = float(one.norm()) * float(other.norm())
    return min(1.0, float(one @ other) / norms) if norms > 0 else None


def sine(cosine: float) -> float:
    """Return √(1 − cos²): the relative error after the best rescaling."""
    return math.sqrt(max(0.0, 1 - cosine**2))


def _excess(cosine: float | None, noise_cosine: float | None) -> float | None:
    if cosine is None or noise_cosine is None:
        return None
    return sine(max(-1.0, min(1.0, cosine / noise_cosine)))


def overlap_of(one: Tensor, other: Tensor, kept: int) -> float:
    """Return the share of the ``kept`` largest entries of two vectors that they have in common.

    Entries that are equal at the threshold count as chosen at random.

    Args:
        one: A vector.
        other: Another one.
        kept: Number of entries.

    >>> overlap_of(torch.tensor([3.0, 2, 1, 0]), torch.tensor([5.0, 0, 6, 1]), 2)
    0.5
    >>> overlap_of(torch.zeros(10), torch.arange(10.0), 1)
    0.1
    """
    return float(_chosen(one.double(), kept) @ _chosen(other.double(), kept)) / kept


def _chosen(x: Tensor, kept: int) -> Tensor:
    """The probability that each entry is among the ``kept`` largest."""
    threshold = x.topk(kept).values[-1]
    above, tied = x > threshold, x == threshold
    share = (kept - int(above.sum())) / int(tied.sum())
    return above.double() + share * tied.double()
