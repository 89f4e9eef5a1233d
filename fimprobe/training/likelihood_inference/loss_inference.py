"""Inference of the likelihood from the loss gradient at the outputs.

A loss −c·log p(y | h) has the gradient c(softmax h − onehot y), c(sigmoid h − y) or c(exp h − y) at
the outputs h. A match is claimed only if no other common loss gives the same gradient. Where a batch
cannot decide, the result is "undecided", and the next batch is examined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fimprobe.likelihoods import Bernoulli, Categorical, Poisson
from fimprobe.likelihoods.base import Likelihood

LIKELIHOOD_REMEDY = (
    "Pass likelihood='categorical' for softmax logits or log-probabilities, 'bernoulli' for sigmoid "
    "logits, 'poisson' for log-rates, fimprobe.likelihoods.Gaussian(sigma=...) for regression, or "
    "loss= the criterion, such as torch.nn.MSELoss(); for "
    "outputs that are probabilities pass output=torch.log (softmax) or output=torch.logit (sigmoid) "
    "as well"
)

_UNDECIDED = "undecided"
"""Verdict of a matcher on a batch that does not separate its family from other losses."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The likelihood of a training, or why it is not known.

    Attributes:
        likelihood: The family; None if it is not known.
        reason: What implies the family, or why none is known.
        final: If the family is not known: whether further batches cannot change that.
        remedy: What to pass if no family fits.
        warn: Whether the reason deserves a warning although the family is known.
        unmatched: Whether the outputs are real numbers and the gradient matches no family's score.
        path: The output that is read among several, by the path of ``named_outputs``; else "".
        parts: The outputs that a family reads together, in its order, by their paths.
        notes: What every report should state.
        unmeasured: Other outputs that the loss reads, of unknown family; a note names them.
    """

    likelihood: Likelihood | None
    reason: str
    final: bool = True
    remedy: str = LIKELIHOOD_REMEDY
    warn: bool = False
    unmatched: bool = False
    path: str = ""
    parts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unmeasured: tuple[str, ...] = ()


def infer_from_gradient(outputs: Tensor, gradient: Tensor) -> Decision:
    """Match the loss gradient at the outputs against the score of each likelihood.

    Args:
        outputs: h [B, ...].
        gradient: Of the loss at the outputs, of the same shape.

    Returns:
        The decision; not final if the batch is too uniform, zero or not finite.

    >>> h = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    >>> loss = torch.nn.functional.cross_entropy(h, torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    >>> infer_from_gradient(h.detach(), torch.autograd.grad(loss, h)[0]).likelihood.name
    'categorical'
    """
    h, g = outputs.double(), gradient.double()
    tolerance = gradient_tolerance(outputs.dtype)
    if not bool(torch.isfinite(h).all() and torch.isfinite(g).all()):
        return _undecided("the outputs or their gradient are not finite")
    if bool((g == 0).all()):
        return _undecided("the gradient at the outputs is zero")
    decision = _match_categorical(h, g, tolerance)
    if decision is not None:
        return decision
    normalised = _normalised(h, min(tolerance + 1e-4, 1e-2))
    if normalised:
        return Decision(likelihood=None, reason=normalised)
    decision = _match_independent(h, g, tolerance)
    if decision is not None:
        return decision
    if bool(((h >= 0) & (h <= 1)).all()):
        return Decision(
            likelihood=None,
            reason="the outputs lie in [0, 1]: if they are sigmoid probabilities pass "
            "likelihood='bernoulli' and output=torch.logit",
        )
    return Decision(
        likelihood=None,
        reason="the loss gradient matches no likelihood's score (regression and focal loss do not)",
        unmatched=True,
    )


def gradient_tolerance(dtype: torch.dtype) -> float:
    """Return the relative error up to which gradients of outputs of a type are equal."""
    return {torch.float64: 1e-6, torch.float32: 2e-4}.get(dtype, 3e-2)


def positions_with_gradient(gradient: Tensor, likelihood: Any) -> Tensor | None:
    """Return the positions [B, T] that the loss reads: those with a gradient that is not zero.

    Args:
        gradient: Of the loss at the outputs, [B, T, C], or the classes along ``class_dim``.
        likelihood: The family of the labels.

    Returns:
        Bool; None for families without a class dimension and for outputs without positions.
    """
    if not isinstance(likelihood, Categorical) or gradient.dim() < 3:
        return None
    return gradient.any(likelihood.class_dim)  # without a comparison as large as the gradient


def _undecided(reason: str) -> Decision:
    return Decision(likelihood=None, reason=reason, final=False)


def _match_categorical(h: Tensor, g: Tensor, tolerance: float) -> Decision | None:
    """Match against softmax outputs with the classes in the last or the second dimension."""
    verdicts = []
    # [B, T, C] and [B, C, T] differ in the dimension over which the gradient sums to zero
    for dim in (-1, 1)[: max(0, h.dim() - 1)]:
        if h.shape[dim] < 2:
            continue
        h_rows = h.movedim(dim, -1).reshape(-1, h.shape[dim])
        g_rows = g.movedim(dim, -1).reshape(-1, h.shape[dim])
        verdict = _categorical(h_rows, g_rows, tolerance)
        if verdict and verdict != _UNDECIDED:
            # maps [B, C, H, W] are common, so class_dim=-1 is refused for four dimensions
            class_dim = dim if dim > 0 or h.dim() < 4 else h.dim() - 1
            return Decision(
                likelihood=Categorical(class_dim=class_dim),
                reason=f"the loss gradient is {verdict}",
            )
        verdicts.append(verdict)
    # a gradient that sums to zero over the classes belongs to no other family, except by chance
    if _UNDECIDED in verdicts:
        return _undecided("the batch is too uniform to separate cross-entropy from other losses")
    return None


def _match_independent(h: Tensor, g: Tensor, tolerance: float) -> Decision | None:
    """Match against families with one label per output component."""
    undecided = None
    for family, match in ((Bernoulli(), _bernoulli), (Poisson(), _poisson)):
        verdict = match(h, g, tolerance)
        if verdict == _UNDECIDED:
            reason = f"the outputs are too few to separate {family.name} from other losses"
            undecided = undecided or _undecided(reason)
        elif verdict:
            return Decision(likelihood=family, reason=f"the loss gradient is {verdict}")
    return undecided


def _categorical(h: Tensor, g: Tensor, tolerance: float) -> str:
    """Match rows [n, C] with c(p − onehot y), with c_y(p − onehot y) and with smoothed labels.

    Returns:
        A description of the gradient; empty if it does not match.
    """
    p = torch.softmax(h, 1)
    nonzero = g.abs().amax(1) > 0
    if not bool(nonzero.any()):
        return ""
    p, g = p[nonzero], g[nonzero]
    size = g.abs().amax(1)
    if bool((g.sum(1).abs() > 4 * tolerance * size + 4 * tolerance * size.max()).any()):
        return ""
    label = g.argmin(1)
    others = torch.ones_like(g, dtype=torch.bool).scatter(1, label[:, None], False)
    # plain and weighted: g_k = c p_k for k ≠ y, with c from the whole row
    rest = (p * others).sum(1)
    c = (g * others).sum(1) / rest
    residual = ((g - c[:, None] * p) * others).abs().amax(1)
    fits = residual <= tolerance * size + tolerance**2 * size.max()
    verdict = ""
    if bool(fits.all()) and bool((c > 0).all()):
        precise = rest >= 1e-3  # nearer to one-hot, c has lost its digits
        precise = precise if bool(precise.any()) else torch.ones_like(precise)
        c, label = c[precise], label[precise]
        p_label = p[precise].gather(1, label[:, None])[:, 0]
        verdict = _constant(c, p_label, torch.zeros_like(label), tolerance)
        if verdict == "yes":
            return "that of cross-entropy"
        if not verdict:
            verdict = _constant(c, p_label, label, tolerance)
        if verdict == "yes":
            return "that of cross-entropy with class weights"
    return _smoothed(p, g, tolerance) or verdict


def _smoothed(p: Tensor, g: Tensor, tolerance: float) -> str:
    """Match rows [n, C] with c(p − q), where q is s/C, plus 1 − s at the label."""
    classes, precision = p.shape[1], min(tolerance, 1e-2)
    label = g.argmin(1)
    # g is smallest at the label, unless p_y > q_y: the model is right there, and p_y is the largest p
    known = (label == p.argmax(1)) | (g.amin(1) < -0.5 * g.abs().max())
    others = torch.ones_like(g, dtype=torch.bool).scatter(1, label[:, None], False)
    others &= known[:, None] | ~known.any()
    x, y = p[others], g[others]
    if len(p) < 3 or len(x) < 4:
        return _UNDECIDED
    span = float(x.max() - x.min())
    if span < 10 * precision or (classes == 2 and span < 10 * precision**0.5):
        return ""
    centred = x - x.mean()
    slope = float((centred * (y - y.mean())).sum() / centred.square().sum())
    if not slope > 0:
        return ""
    target = (p - g / slope).sort(1).values
    share = float((slope * x - y).mean()) / slope
    deviation = (target - share).abs()
    deviation[:, -1] = (target[:, -1] - 1 + (classes - 1) * share).abs()
    error = float(deviation.max())
    if error < precision and 5 * max(error, 1e-9) < share < 1 / classes:
        return f"that of cross-entropy with label smoothing {share * classes:.2g}"
    return _UNDECIDED if error < 5 * precision else ""


def _constant(c: Tensor, p_label: Tensor, group: Tensor, tolerance: float) -> str:
    """Decide whether c [n] is constant within each group, and another loss f(p_label) is not.

    Focal loss has c = (1−p)^γ − γ p (1−p)^(γ−1) log p, others c = p^q or p(1−p). Squared error
    against ±2 has the tangent of the sigmoid at 0. Where these vary no more than c does, the batch is
    too uniform to decide.

    Returns:
        "yes", "undecided", or empty if c varies.
    """
    _, group = group.unique(return_inverse=True)
    count = torch.bincount(group).to(c.dtype)

    def centred(x: Tensor) -> Tensor:
        return x - (torch.zeros_like(count).index_add(0, group, x) / count)[group]

    freedom = len(c) - len(count)
    variation = centred(c.log())
    level = min(10 * tolerance, 0.15)
    if bool((variation.abs() > level).any()):
        return ""
    p = p_label.clamp(1e-12, 1 - 1e-9)
    gamma = torch.arange(0.5, 5.1, 0.25, dtype=p.dtype, device=p.device)[:, None]
    focal = (1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * p.log()
    tangent = (0.5 - p.logit() / 4).abs().clamp(min=1e-6) / (1 - p)
    rivals = [*focal.log(), p.log(), (p * (1 - p)).log(), tangent.log()]
    least = min(float(centred(x).square().sum()) for x in rivals)
    floor = freedom * min(tolerance / 10, 1e-3) ** 2
    enough = freedom >= max(2, math.log(1e-8, level)) and least > 9 * max(
        float(variation.square().sum()), floor
    )
    return "yes" if enough else _UNDECIDED


def _bernoulli(h: Tensor, g: Tensor, tolerance: float) -> str:
    """Match entries with c(sigmoid h − y), where y = 0 if g > 0.

    The factor c may depend on y and on the last dimension.

    Returns:
        A description of the gradient; empty if it does not match.
    """
    nonzero = g != 0
    components = h.shape[-1] if h.dim() > 1 else 1
    column = torch.arange(components, device=h.device).expand(h.shape)[nonzero]
    h, g = h[nonzero], g[nonzero]
    zeros = g > 0  # where the label is 0
    p_label = torch.sigmoid(torch.where(zeros, -h, h))
    p_other = torch.sigmoid(torch.where(zeros, h, -h))
    precise = p_other > 5 * min(tolerance, 1e-2)  # elsewhere 1 − p has lost its digits
    if not bool(precise.any()):
        return _UNDECIDED
    has_both_labels = bool(zeros.any()) and bool((~zeros).any())
    c = (g.abs() / p_other)[precise]
    if bool((g[~precise].abs() > 20 * min(tolerance, 1e-2) * c.max()).any()):
        return ""
    zeros, column, p_label = zeros[precise], column[precise], p_label[precise]
    for group, weights in ((zeros.long(), ""), (2 * column + zeros, ", weighted by output")):
        verdict = _constant(c, p_label, group, tolerance)
        if verdict == "yes" and has_both_labels:
            return "that of binary cross-entropy" + weights
        if verdict:
            return _UNDECIDED  # with one label only, a negative log-likelihood looks the same
    return ""


def _poisson(h: Tensor, g: Tensor, tolerance: float) -> str:
    """Match entries with c(exp h − y): one c must make every y a whole number ≥ 0.

    Returns:
        A description of the gradient; empty if it does not match.
    """
    nonzero = g != 0  # zeros: masked entries, or losses that read one output (hinge)
    h, g = h[nonzero], g[nonzero]
    if float(h.max()) > 15:
        return ""
    rate = h.exp()
    first = int(g.abs().argmax())
    counts = torch.arange(0, 200, dtype=h.dtype, device=h.device)
    # the true label of one entry gives c; try every count it may have had
    candidates = g[first] / (rate[first] - counts)
    candidates = candidates[(candidates > 0) & torch.isfinite(candidates)]
    precision = min(tolerance * 5, 1e-2)
    # where exp h is a straight line in h, squared error with whole targets gives the same gradient
    centred = h - h.mean()
    slope = (centred * rate).sum() / centred.square().sum().clamp(min=1e-300)
    nonlinearity = (rate - rate.mean() - slope * centred).abs()
    verdict = ""
    for c in candidates:
        label = rate - g / c
        error = (label - label.round()).abs()
        allowed = precision * (1 + rate + (g / c).abs())
        if bool((error > allowed).any()) or bool((label < -0.5).any()):
            continue
        # chance that real-valued targets look whole at this precision, over all candidates; the
        # first is whole by construction
        informative = nonlinearity > 2 * allowed
        informative[first] = False
        chance = len(counts) * float((2 * allowed[informative]).clamp(max=1).log().sum().exp())
        if chance < 1e-4:
            return "that of the Poisson loss, with counts as labels"
        verdict = _UNDECIDED
    return verdict


def _normalised(h: Tensor, near: float) -> str:
    """Return what to pass if the outputs are (log-)probabilities; empty if they are not."""
    for dim in (-1, 1):
        if h.dim() < 2 or h.shape[dim] < 2:
            continue
        if bool(((h.exp().sum(dim) - 1).abs() < near).all()):
            return (
                "the outputs are log-probabilities (each row's exp sums to 1); they are valid "
                "logits: pass likelihood='categorical'"
            )
        if bool((h >= 0).all()) and bool(((h.sum(dim) - 1).abs() < near).all()):
            return (
                "the outputs are probabilities (each row sums to 1): pass likelihood='categorical' "
                "and output=torch.log, or let the model return logits"
            )
    return ""
