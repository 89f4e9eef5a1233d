"""Which likelihood the user trains with, read off the gradient of the loss at the outputs.

A loss −c·log p(y | h) has gradient c(softmax h − onehot y), c(sigmoid h − y) or c(exp h − y) at the
outputs h. A match is claimed only where nothing else in reach gives the same gradient; where the
batch cannot tell, the answer is "undecided" and the next batch is asked.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fimprobe.likelihoods import Bernoulli, Categorical, Poisson
from fimprobe.likelihoods.base import Likelihood

REMEDY = (
    "Pass likelihood='categorical' for softmax logits or log-probabilities, 'bernoulli' for sigmoid "
    "logits, 'poisson' for log-rates, fimprobe.likelihoods.Gaussian(sigma=...) for regression; for "
    "outputs that are probabilities pass output=torch.log (softmax) or output=torch.logit (sigmoid) "
    "as well"
)


class Decision(NamedTuple):
    """``likelihood`` and why; None with ``final`` where nothing fits, without where it may yet.

    ``remedy``: what to pass where nothing fits. ``told``: the reason is worth a warning.
    """

    likelihood: Likelihood | None
    reason: str
    final: bool = True
    remedy: str = REMEDY
    told: bool = False


def infer_from_gradient(outputs: Tensor, gradient: Tensor) -> Decision:
    """Match the loss gradient at the outputs against each likelihood's score.

    >>> h = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    >>> loss = torch.nn.functional.cross_entropy(h, torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    >>> infer_from_gradient(h.detach(), torch.autograd.grad(loss, h)[0]).likelihood.name
    'categorical'
    """
    h, g = outputs.double(), gradient.double()
    coarse = {torch.float64: 1e-6, torch.float32: 2e-4}.get(outputs.dtype, 3e-2)
    if not bool(torch.isfinite(h).all() and torch.isfinite(g).all()):
        return Decision(None, "the outputs or their gradient are not finite", final=False)
    if bool((g == 0).all()):
        return Decision(None, "the gradient at the outputs is zero", final=False)
    undecided = ""
    if h.dim() >= 2:
        # [B, T, C] and [B, C, T] are told apart by where the gradient sums to zero
        for dim in [-1] + ([1] if h.dim() > 2 else []):
            if h.shape[dim] < 2:
                continue
            rows_h = h.movedim(dim, -1).reshape(-1, h.shape[dim])
            rows_g = g.movedim(dim, -1).reshape(-1, h.shape[dim])
            verdict = _categorical(rows_h, rows_g, coarse)
            if verdict == "undecided":
                undecided = "the batch is too uniform to tell cross-entropy from other losses"
            elif verdict:
                return Decision(Categorical(class_dim=dim), f"the loss gradient is {verdict}")
    if undecided:  # gradients that sum to zero over the classes are no other family's, but for chance
        return Decision(None, undecided, final=False)
    normalised = _normalised(h, min(coarse + 1e-4, 1e-2))
    if normalised:
        return Decision(None, normalised)
    for family, verdict in (
        (Bernoulli(), _bernoulli(h, g, coarse)),
        (Poisson(), _poisson(h, g, coarse)),
    ):
        if verdict == "undecided":
            undecided = undecided or f"too few outputs to tell {family.name} from other losses"
        elif verdict:
            return Decision(family, f"the loss gradient is {verdict}")
    if undecided:
        return Decision(None, undecided, final=False)
    if bool(((h >= 0) & (h <= 1)).all()):
        return Decision(
            None,
            "the outputs lie in [0, 1]: if they are sigmoid probabilities pass "
            "likelihood='bernoulli' and output=torch.logit",
        )
    return Decision(
        None, "the loss gradient matches no likelihood's score (regression and focal loss do not)"
    )


def _categorical(h: Tensor, g: Tensor, coarse: float) -> str:
    """Rows [n, C]: c(p − onehot), class weights making c a function of y, or smoothed labels."""
    p = torch.softmax(h, 1)
    live = g.abs().amax(1) > 0
    if not bool(live.any()):
        return ""
    p, g = p[live], g[live]
    size = g.abs().amax(1)
    if bool((g.sum(1).abs() > 4 * coarse * size + 4 * coarse * size.max()).any()):
        return ""
    label = g.argmin(1)
    others = torch.ones_like(g, dtype=torch.bool).scatter(1, label[:, None], False)
    # plain and weighted: g_k = c p_k for k ≠ y, with c from the whole row
    rest = (p * others).sum(1)
    c = (g * others).sum(1) / rest
    fit = ((g - c[:, None] * p) * others).abs().amax(1) <= coarse * size + coarse**2 * size.max()
    verdict = ""
    if bool(fit.all()) and bool((c > 0).all()):
        confident = rest < 1e-3  # too near one-hot for c to be read off precisely
        sure = ~confident if bool((~confident).any()) else torch.ones_like(confident)
        c, label, p_label = c[sure], label[sure], p[sure].gather(1, label[sure][:, None])[:, 0]
        verdict = _constant(c, p_label, torch.zeros_like(label), coarse)
        if verdict == "yes":
            return "c(softmax − onehot)"
        if not verdict:
            verdict = _constant(c, p_label, label, coarse)
        if verdict == "yes":
            return "c_y(softmax − onehot): cross-entropy with class weights"
    return _smoothed(p, g, coarse) or verdict


def _smoothed(p: Tensor, g: Tensor, coarse: float) -> str:
    """Rows [n, C]: c(p − q), q being s/C everywhere and 1 − s more at the label."""
    classes, precision = p.shape[1], min(coarse, 1e-2)
    label = g.argmin(1)
    # the label has the least g unless p_y > q_y, where the model is right: then p is largest there
    plain = (label == p.argmax(1)) | (g.amin(1) < -0.5 * g.abs().max())
    others = torch.ones_like(g, dtype=torch.bool).scatter(1, label[:, None], False)
    others &= plain[:, None] | ~plain.any()
    x, y = p[others], g[others]
    if len(p) < 3 or len(x) < 4:
        return "undecided"
    spread = float(x.max() - x.min())
    if spread < 10 * precision or (classes == 2 and spread < 10 * precision**0.5):
        return ""
    centred = x - x.mean()
    slope = float((centred * (y - y.mean())).sum() / centred.square().sum())
    if not slope > 0:
        return ""
    target = (p - g / slope).sort(1).values
    share = float((slope * x - y).mean()) / slope
    wrong = (target - share).abs()
    wrong[:, -1] = (target[:, -1] - 1 + (classes - 1) * share).abs()
    error = float(wrong.max())
    if error < precision and 5 * max(error, 1e-9) < share < 1 / classes:
        return f"c(softmax − smoothed onehot), smoothing {share * classes:.2g}"
    return "undecided" if error < 5 * precision else ""


def _constant(c: Tensor, p_label: Tensor, group: Tensor, coarse: float) -> str:
    """Whether c is constant within each group, and a loss f(p_label) would not look so.

    Focal loss has c = (1−p)^γ − γ p (1−p)^(γ−1) log p, others c = p^q or p(1−p), squared error
    against ±2 the tangent of the sigmoid at 0: where these would vary by no more than c does, the
    batch is too uniform to tell.
    """
    _, group = group.unique(return_inverse=True)
    count = torch.bincount(group).to(c.dtype)

    def centred(x: Tensor) -> Tensor:
        return x - (torch.zeros_like(count).index_add(0, group, x) / count)[group]

    freedom = len(c) - len(count)
    varied = centred(c.log())
    level = min(10 * coarse, 0.15)
    if bool((varied.abs() > level).any()):
        return ""
    p = p_label.clamp(1e-12, 1 - 1e-9)
    gamma = torch.arange(0.5, 5.1, 0.25, dtype=p.dtype, device=p.device)[:, None]
    focal = (1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * p.log()
    straight = (0.5 - p.logit() / 4).abs().clamp(min=1e-6) / (1 - p)
    rivals = [*focal.log(), p.log(), (p * (1 - p)).log(), straight.log()]
    least = min(float(centred(x).square().sum()) for x in rivals)
    floor = freedom * min(coarse / 10, 1e-3) ** 2
    enough = freedom >= max(2, math.log(1e-8, level)) and least > 9 * max(
        float(varied.square().sum()), floor
    )
    return "yes" if enough else "undecided"


def _bernoulli(h: Tensor, g: Tensor, coarse: float) -> str:
    """Entries c(sigmoid h − y), y = 0 where g > 0; c may depend on y and on the last dimension."""
    live = g != 0
    column = torch.arange(h.shape[-1], device=h.device).expand(h.shape)[live]
    h, g = h[live], g[live]
    up = g > 0
    wrong, p_label = torch.sigmoid(torch.where(up, h, -h)), torch.sigmoid(torch.where(up, -h, h))
    sure = wrong > 5 * min(coarse, 1e-2)  # elsewhere 1 − p has lost its digits
    if not (bool(up.any()) and bool((~up).any()) and bool(sure.any())):
        return "undecided"  # with one label only, a negative log-likelihood looks the same
    c = (g.abs() / wrong)[sure]
    if bool((g[~sure].abs() > 20 * min(coarse, 1e-2) * c.max()).any()):
        return ""
    up, column, p_label = up[sure], column[sure], p_label[sure]
    for group, what in ((up.long(), ""), (2 * column + up, ", weighted by component")):
        verdict = _constant(c, p_label, group, coarse)
        if verdict == "yes":
            return "c(sigmoid − y), y in {0, 1}" + what
        if verdict:
            return verdict
    return ""


def _poisson(h: Tensor, g: Tensor, coarse: float) -> str:
    """Entries c(exp h − y) with whole y ≥ 0, for a c that makes every entry whole."""
    live = g != 0  # zeros are masked entries, or hinge and likelihood losses that read one output
    h, g = h[live], g[live]
    if float(h.max()) > 15:
        return ""
    rate = h.exp()
    first = int(g.abs().argmax())
    counts = torch.arange(0, 200, dtype=h.dtype, device=h.device)
    # the true label of one entry gives c; try every count it may have had
    candidates = g[first] / (rate[first] - counts)
    candidates = candidates[(candidates > 0) & torch.isfinite(candidates)]
    precision = min(coarse * 5, 1e-2)
    # where exp h is a straight line in h, squared error with whole targets gives the same gradient
    centred = h - h.mean()
    slope = (centred * rate).sum() / centred.square().sum().clamp(min=1e-300)
    bend = (rate - rate.mean() - slope * centred).abs()
    verdict = ""
    for c in candidates:
        label = rate - g / c
        error = (label - label.round()).abs()
        allowed = precision * (1 + rate + (g / c).abs())
        if bool((error > allowed).any()) or bool((label < -0.5).any()):
            continue
        # chance that real-valued targets look whole at this precision, over all candidates; the
        # first is whole by construction
        tells = bend > 2 * allowed
        tells[first] = False
        chance = len(counts) * float((2 * allowed[tells]).clamp(max=1).log().sum().exp())
        if chance < 1e-4:
            return "c(exp h − y) with whole y"
        verdict = "undecided"
    return verdict


def _normalised(h: Tensor, near: float) -> str:
    """What to pass where the outputs are (log-)probabilities; empty where they are not."""
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


def ignored_positions(outputs: Tensor, gradient: Tensor, likelihood: Any) -> Tensor | None:
    """Positions that the loss read, for categorical outputs with positions; None elsewhere."""
    if not isinstance(likelihood, Categorical) or outputs.dim() < 3:
        return None
    return gradient.any(likelihood.class_dim)  # without a comparison as large as the gradient
