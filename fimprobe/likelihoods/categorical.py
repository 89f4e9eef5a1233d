"""Softmax outputs: classes, tokens, segmentation maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods.base import OutputNorms, Pass
from fimprobe.likelihoods.output_norms import combine, position_mask
from fimprobe.likelihoods.size_biased import SizeBiasedSampler

IGNORED = -100
"""The label of a position that has none, as in torch's cross-entropy."""

_EXACT_WORK = 2**18  # positions × classes³ per input: at most about 2 ms on one core
_DOUBLE_OUTPUTS = 2**12  # of one input: size-biased draws of so many are taken in float64
_CHUNK = 2**20  # numbers in each of the some twenty arrays alive at once


class _Split(NamedTuple):
    """Probabilities [..., C] with the largest class set apart: e = 1 − p_max without cancellation."""

    p: Tensor
    top: Tensor
    p_max: Tensor
    rest: Tensor
    e: Tensor


@dataclass(frozen=True)
class Categorical:
    """p(y | h) = softmax(h)_y, one label per position, classes along ``class_dim``.

    ``class_dim=-1`` reads [B, C] and [B, T, C]; maps [B, C, H, W] take ``class_dim=1``, as
    torch's cross-entropy does. Log-probabilities are valid logits; probabilities are not.
    ``mask`` (bool, the outputs' shape without ``class_dim``) leaves positions without a label out.

    Norms per position, correct down to 1 − p_max = 1e-12:
    I(h) = diag p − ppᵀ and M = K − I⊗I, K the fourth central moment of the one-hot label.

    >>> Categorical().fisher_norm(torch.zeros(1, 2)).item()
    0.5
    """

    class_dim: int = -1
    name: str = "categorical"

    def check_outputs(self, outputs: Tensor) -> None:
        """Raise unless ``outputs`` holds logits of two classes or more."""
        if outputs.dim() < 2 or not -outputs.dim() <= self.class_dim < outputs.dim():
            raise FimprobeError(
                f"likelihood='categorical' needs logits [B, ..., C], but the outputs have shape "
                f"{tuple(outputs.shape)} (class_dim={self.class_dim})"
            )
        if outputs.dim() >= 4 and self.class_dim == -1:
            raise FimprobeError(
                f"likelihood='categorical' cannot tell which dimension of {tuple(outputs.shape)} "
                "holds the classes; pass likelihood=fimprobe.likelihoods.Categorical(class_dim=1) "
                "for maps [B, C, H, W], or class_dim=" + str(outputs.dim() - 1) + " for the last"
            )
        if outputs.shape[self.class_dim] < 2:
            raise FimprobeError(
                f"likelihood='categorical' needs at least 2 classes, but outputs of shape "
                f"{tuple(outputs.shape)} have {outputs.shape[self.class_dim]}; for one logit per "
                "label pass likelihood='bernoulli'"
            )

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Raise unless there is a class index, or −100 for none, at every position."""
        shape, classes = self.label_shape(outputs), outputs.shape[self.class_dim]
        if labels.shape != shape:
            remedy = "pass one class index per position, -100 where there is none"
            if labels.shape == outputs.shape:
                remedy = f"pass class indices: labels.argmax({self.class_dim}) of one-hot labels"
            elif labels.numel() == shape.numel():
                remedy += f": labels.reshape{tuple(shape)} if the order is the same"
            raise FimprobeError(
                f"labels have shape {tuple(labels.shape)}, but likelihood='categorical' with outputs "
                f"{tuple(outputs.shape)} needs {tuple(shape)}; {remedy}"
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise FimprobeError(
                f"labels have type {labels.dtype}, but likelihood='categorical' needs class indices; "
                "pass whole numbers such as labels.long()"
            )
        labels = labels.long()
        wrong = ((labels < 0) | (labels >= classes)) & (labels != IGNORED)
        if bool(wrong.any()):
            raise FimprobeError(
                f"labels hold {int(wrong.sum())} of {labels.numel()} class indices outside 0 to "
                f"{classes - 1}, the first {labels[wrong][0].item()}; number the classes from 0, and "
                f"set the label of ignored positions to {IGNORED}"
            )

    def data_score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The score at a data set's class indices; zero where they are −100.

        >>> Categorical().data_score(torch.zeros(2, 2), torch.tensor([1, -100])).abs().tolist()
        [[0.5, 0.5], [0.0, 0.0]]
        """
        labels = labels.to(outputs.device, torch.int64)
        ignored = labels == IGNORED
        score = self.score(outputs, labels.masked_fill(ignored, 0))
        return score.masked_fill(ignored.unsqueeze(self.class_dim), 0)

    def label_shape(self, outputs: Tensor) -> torch.Size:
        """The outputs' shape without the class dimension."""
        return self._last(outputs).shape[:-1]

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Class indices: the first y whose cumulated probability exceeds the uniform."""
        h = self._last(outputs)
        cdf = torch.softmax(h, -1, dtype=_precise(h)).double().cumsum(-1)
        target = uniforms.unsqueeze(-1) * cdf[..., -1:]
        return torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp_(max=h.shape[-1] - 1)

    def expected_squared_score(self, outputs: Tensor) -> Tensor:
        """τ = E‖onehot(y) − p‖² = 1 − Σp² of each position, in float64: τ of size-biased draws."""
        return _expected_square(self._split64(outputs))

    def size_biased_quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Class indices at the uniforms, of q(y) = p_y‖δ_y‖²/τ with ‖δ_y‖² = 1 − 2p_y + Σp².

        >>> sure = torch.tensor([[40.0, 0.0, 0.0]])  # plain draws give class 0, always
        >>> [Categorical().size_biased_quantile(sure, torch.tensor([u])).item() for u in (0.3, 0.8)]
        [1, 2]
        """
        split = self._split64(outputs)
        cdf = (split.p * _squared_scores(split)).cumsum(-1)
        target = uniforms.unsqueeze(-1) * cdf[..., -1:]
        index = torch.searchsorted(cdf, target, right=True).squeeze(-1)
        return index.clamp_(max=cdf.shape[-1] - 1)

    def size_biased_sampler(self, outputs: Tensor, mask: Tensor | None) -> SizeBiasedSampler:
        """Size-biased draws that share one softmax."""
        return _Sampler(self, outputs, mask)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """onehot(y) − softmax(h), with 1 − p_y summed from the other classes."""
        split = self._split(outputs)
        p_label = split.p.gather(-1, labels.unsqueeze(-1))
        is_top = labels.unsqueeze(-1) == split.top
        own = torch.where(is_top, split.e.unsqueeze(-1), 1 - p_label)
        return (-split.p).scatter(-1, labels.unsqueeze(-1), own).movedim(-1, self.class_dim)

    def output_fisher(self, outputs: Tensor) -> Tensor:
        """I(h) = diag p − ppᵀ [..., C, C]."""
        return _fisher(self._split(outputs))

    def fisher_norm(self, outputs: Tensor) -> Tensor:
        """‖I(h)‖_F per position: √(Σ p²(1−p)² + Σ_{j≠k} p_j² p_k²)."""
        return _fisher_square(self._split64(outputs)).sqrt().to(_precise(outputs))

    def fourth_moment_trace(self, outputs: Tensor) -> Tensor:
        """Tr M = E‖t − η‖⁴ − ‖I‖_F² per position."""
        return _moment_trace(self._split64(outputs)).to(_precise(outputs))

    def fourth_moment_norm(self, outputs: Tensor) -> Tensor:
        """‖M‖_F per position, in O(C): ‖K‖_F² − 2⟨K, I⊗I⟩ + ‖I‖_F⁴ with the top class set apart."""
        return _moment_norm(self._split64(outputs)).to(_precise(outputs))

    def norms(self, outputs: Tensor, mask: Tensor | None) -> OutputNorms:
        """All norms per input [B], in float64 and in O(C) memory per position.

        The largest eigenvalues are exact where T·C³ ≤ 64³ (T positions per input, masked or not).
        Elsewhere λ_max(I) ≤ min{p_max, 1−s₂, 2 max p(1−p), ‖I‖_F} and
        λ_max(M) ≤ min{(1+s₂) λ_max(I), ‖M‖_F}: for ‖B‖_F = 1, E(δᵀBδ)² ≤ max‖δ‖² tr(B I B) and
        ‖δ_y‖² = 1 − 2p_y + s₂. λ_min(I) = 0, as I(h)1 = 0.
        """
        h = self._last(outputs)
        h = h.reshape(h.shape[0], -1, h.shape[-1])
        positions, classes = h.shape[1:]
        exact = positions * classes**3 <= _EXACT_WORK
        keep = position_mask(mask, h[..., 0])
        values = torch.zeros((6, *keep.shape), dtype=torch.float64, device=h.device)
        for part in keep.nonzero().split(max(1, _CHUNK // (classes**2 if exact else classes))):
            b, t = part.unbind(1)
            values[:, b, t] = _position_norms(_split(h[b, t].double()), exact)
        norm, trace, largest, m_norm, m_trace, m_largest = values
        return combine(
            OutputNorms(
                fisher_norm=norm,
                fisher_trace=trace,
                fisher_max=largest,
                fisher_min=torch.zeros_like(norm),
                moment_norm=m_norm,
                moment_trace=m_trace,
                moment_max=m_largest,
            ),
            mask,
        )

    def fisher_factor(self, outputs: Tensor, xi: Tensor) -> Tensor:
        """L ξ per position, L = diag √p − p √pᵀ: √p_y ξ_y − p_y Σ_z √p_z ξ_z.

        For the top class the two terms in ξ_y are put together as √p_y (1 − p_y) ξ_y.
        """
        s = self._split(outputs)
        weighted = s.p.sqrt() * self._last(xi).to(s.p.dtype)
        own = weighted.gather(-1, s.top)
        others = weighted.scatter(-1, s.top, 0.0).sum(-1, keepdim=True)
        top = own * s.e.unsqueeze(-1) - s.p_max.unsqueeze(-1) * others
        rest = weighted - s.p * (own + others)
        return rest.scatter(-1, s.top, top).movedim(-1, self.class_dim)

    def count_passes(self, outputs: Tensor) -> int:
        """T·C: every class at every position."""
        return outputs[0].numel()

    def exact_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """One pass per class and position, weighted with its probability; positions are blocks."""
        batch, classes = outputs.shape[0], outputs.shape[self.class_dim]
        p = self._split(outputs).p.reshape(batch, -1, classes)
        if mask is not None:
            p = p * mask.reshape(batch, -1, 1)
        for position in range(p.shape[1]):
            for label in range(classes):
                labels = torch.full(
                    self.label_shape(outputs), label, dtype=torch.long, device=outputs.device
                )
                score = self.score(outputs, labels).movedim(self.class_dim, -1)
                seed = torch.zeros_like(score).view(batch, -1, classes)
                seed[:, position] = score.reshape(batch, -1, classes)[:, position]
                weight = p[:, position, label]
                yield Pass(
                    seed.view(score.shape).movedim(-1, self.class_dim), weight, weight, position
                )

    def hutchinson_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """One pass per class c and position: the column L e_c = √p_c (e_c − p), a block each."""
        s = self._split(outputs)
        shape, classes = s.p.shape, s.p.shape[-1]
        p, own = (x.reshape(shape[0], -1, classes) for x in (s.p, _complement(s)))
        keep = position_mask(mask, p[..., 0]).to(p.dtype)
        for position in range(p.shape[1]):
            for c in range(classes):
                root = p[:, position, c].sqrt()
                seed = torch.zeros_like(p)
                seed[:, position] = -p[:, position] * root[:, None]
                seed[:, position, c] = own[:, position, c] * root
                weight = keep[:, position]
                block = position * classes + c
                yield Pass(seed.view(shape).movedim(-1, self.class_dim), weight, weight, block)

    def _last(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(self.class_dim, -1)

    def _split(self, outputs: Tensor) -> _Split:
        return _split(self._last(outputs))

    def _split64(self, outputs: Tensor) -> _Split:
        # near one-hot the squares of I's entries are below float32's range
        return _split(self._last(outputs).double())


def _split(h: Tensor) -> _Split:
    p = torch.softmax(h, -1, dtype=_precise(h))
    p_max, top = p.max(-1, keepdim=True)
    rest = p.scatter(-1, top, 0.0)
    return _Split(p, top, p_max.squeeze(-1), rest, rest.sum(-1))


def _complement(s: _Split) -> Tensor:
    """1 − p."""
    return (1 - s.p).scatter(-1, s.top, s.e.unsqueeze(-1))


def _expected_square(s: _Split) -> Tensor:
    """Σ p(1 − p) with 1 − p_max as the sum of the rest."""
    return (s.p * _complement(s)).sum(-1)


def _squared_scores(s: _Split) -> Tensor:
    """‖δ_y‖² of every class y: (1 − p_y)² + Σ_{z≠y} p_z²."""
    others = s.rest.square()
    rest = others.sum(-1, keepdim=True)
    square = (1 - s.p).square() + s.p_max.square().unsqueeze(-1) + (rest - others)
    return square.scatter(-1, s.top, s.e.square().unsqueeze(-1) + rest)


class _Sampler(SizeBiasedSampler):
    """One softmax for all draws: in float64, but of inputs with many outputs in their precision.

    There 1/w has the rounding of float32's probabilities, 1e-7; sums over classes are float64's.
    """

    def __init__(self, family: Categorical, outputs: Tensor, mask: Tensor | None) -> None:
        last = outputs.movedim(family.class_dim, -1)
        h = last.double() if last[:1].numel() <= _DOUBLE_OUTPUTS else last
        self.p = torch.softmax(h, -1, dtype=_precise(h))
        p_max, self.top = self.p.max(-1)
        self.p_max = p_max.double()
        square = torch.linalg.vecdot(self.p, self.p).double()
        rest = self.p.scatter(-1, self.top.unsqueeze(-1), 0.0)
        self.e = rest.sum(-1, dtype=torch.float64)
        sure = p_max > 0.5  # there Σp² − p_max² would cancel
        self.rest_square = torch.where(
            sure, torch.linalg.vecdot(rest, rest).double(), square - self.p_max.square()
        )
        expected = self.p_max * self.e + self.e - self.rest_square
        super().__init__(family, outputs, expected, mask)
        self.cdf: Tensor | None = None

    def plain_labels(self, uniforms: Tensor) -> Tensor:
        """Labels from the model, of one cumulated sum."""
        if self.cdf is None:
            self.cdf = self.p.double().cumsum(-1)
        target = uniforms.unsqueeze(-1) * self.cdf[..., -1:]
        labels = torch.searchsorted(self.cdf, target, right=True).squeeze(-1)
        return labels.clamp_(max=self.p.shape[-1] - 1)

    def scores_of(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """onehot(y) − p, and ‖δ_y‖² without a sum over the classes."""
        index = labels.unsqueeze(-1)
        mine = self.p.gather(-1, index).squeeze(-1).double()
        is_top = labels == self.top
        own = torch.where(is_top, self.e, 1 - mine)
        others = torch.where(is_top, 0, self.p_max.square() - mine.square()) + self.rest_square
        square = own.square() + others
        scores = (-self.p).scatter_(-1, index, own.to(self.p.dtype).unsqueeze(-1))
        if self.mask is not None:
            square = square * self.mask
            scores.masked_fill_(~self.mask.unsqueeze(-1), 0)
        scores = scores.movedim(-1, self.family.class_dim)
        return scores, square.reshape(self.size, -1).sum(1)


def _fisher(s: _Split) -> Tensor:
    """I [..., C, C]."""
    fisher = -s.p.unsqueeze(-1) * s.p.unsqueeze(-2)
    fisher.diagonal(dim1=-2, dim2=-1).copy_(s.p * _complement(s))
    return fisher


def _fisher_square(s: _Split) -> Tensor:
    own = (s.p * _complement(s)).square().sum(-1)
    t2 = s.rest.square().sum(-1)
    cross = 2 * s.p_max.square() * t2 + t2.square() - s.rest.square().square().sum(-1)
    return own + cross


def _moment_trace(s: _Split) -> Tensor:
    t2 = s.rest.square().sum(-1)
    square = (1 - s.p).square() + s.p_max.square().unsqueeze(-1)  # rows of the rest
    square = square + t2.unsqueeze(-1) - s.p.square()
    fourth = s.p_max * (s.e.square() + t2).square() + (s.rest * square.square()).sum(-1)
    return fourth - _fisher_square(s)


def _moment_norm(s: _Split) -> Tensor:
    e, m = s.e, s.p_max
    squares, fourths = s.rest.square(), s.rest.square().square()
    powers = (s.rest, squares, squares * s.rest, fourths, fourths * s.rest, fourths * squares)
    t1, t2, t3, t4, t5, t6 = (x.sum(-1) for x in powers)
    a = m.square() + t2  # s₂; δ_y·δ_z = [y=z] − p_y − p_z + s₂
    b = t2 - m * e  # s₂ − p_max
    kurtosis = m.square() * (e.square() + t2).pow(4)
    kurtosis = kurtosis + 2 * m * (
        b.pow(4) * t1 - 4 * b.pow(3) * t2 + 6 * b.square() * t3 - 4 * b * t4 + t5
    )
    a_ = a.unsqueeze(-1)
    kurtosis = kurtosis + (squares * (1 - 2 * s.rest + a_).square().square()).sum(-1)
    t = [t1, t2, t3, t4, t5]
    pairs = torch.zeros_like(e)  # Σ_{y≠z in the rest} p_y p_z (a − p_y − p_z)⁴
    for i in range(5):
        for j in range(5 - i):
            k = 4 - i - j
            c = (-1) ** (i + j) * _MULTINOMIAL[(i, j, k)]
            same = [t2, t3, t4, t5, t6][i + j]
            pairs = pairs + c * a.pow(k) * (t[i] * t[j] - same)
    kurtosis = kurtosis + pairs
    # q_y = (t−η)ᵀ I (t−η) given label y
    s3_minus = (1 - e).pow(3) * e - 2 * (1 - e).square() * t2 - t2.square() + t3  # s₃ − s₂²
    q = s.rest - 3 * squares + 2 * s.rest * a_ + s3_minus.unsqueeze(-1)
    mean = (m * e - t2).unsqueeze(-1)
    q_top = m * (e.square() + t2).square() + (s.rest * (s.rest + mean).square()).sum(-1)
    cross = m * q_top.square() + (s.rest * q.square()).sum(-1)
    return (kurtosis - 2 * cross + _fisher_square(s).square()).clamp(min=0).sqrt()


def _position_norms(s: _Split, exact: bool) -> Tensor:
    """‖I‖, tr I, λ_max(I), ‖M‖, tr M, λ_max(M) of positions [n, C], stacked [6, n]."""
    norm, own = _fisher_square(s).sqrt(), s.p * _complement(s)
    trace, m_norm, m_trace = own.sum(-1), _moment_norm(s), _moment_trace(s)
    if exact:
        largest = torch.linalg.eigvalsh(_fisher(s))[..., -1]
        m_largest = torch.linalg.eigvalsh(_moment_gram(s))[..., -1].clamp(min=0)
    else:
        largest = torch.stack([s.p_max, trace, 2 * own.amax(-1), norm]).amin(0)
        s2 = s.p.square().sum(-1)
        # where E‖δ‖⁴ is far above ‖M‖_F, the latter's rounding error may not take it below λ_max
        rounding = 1e-14 * (m_trace + norm.square()).square()
        m_largest = torch.minimum((1 + s2) * largest, (m_norm.square() + rounding).sqrt())
    return torch.stack([norm, trace, largest, m_norm, m_trace.clamp(min=0), m_largest])


def _moment_gram(s: _Split) -> Tensor:
    """D^½ G̃ D^½ [n, C, C], whose nonzero eigenvalues are M's.

    See docs/theory.md, "Norms from Gram matrices", with J the identity.

    Γ_yz = δ_y·δ_z, G = Γ∘Γ, G̃_yz = ⟨δ_yδ_yᵀ − I, δ_zδ_zᵀ − I⟩ = G_yz − (Gp)_y − (Gp)_z + pᵀGp.
    """
    scores = (-s.p.unsqueeze(-2)).repeat(1, s.p.shape[-1], 1)
    scores.diagonal(dim1=-2, dim2=-1).copy_(_complement(s))
    square = (scores @ scores.mT).square()
    mean = square @ s.p.unsqueeze(-1)
    centred = square - mean - mean.mT + s.p.unsqueeze(-2) @ mean
    root = s.p.sqrt()
    return root.unsqueeze(-1) * centred * root.unsqueeze(-2)


_FACTORIAL = (1, 1, 2, 6, 24)
_MULTINOMIAL = {
    (i, j, 4 - i - j): 24 // (_FACTORIAL[i] * _FACTORIAL[j] * _FACTORIAL[4 - i - j])
    for i in range(5)
    for j in range(5 - i)
}


def _precise(h: Tensor) -> torch.dtype:
    return torch.float64 if h.dtype == torch.float64 else torch.float32
