"""Softmax outputs: classes, tokens, segmentation maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fimprobe.types import FimprobeError, Pass


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

    Norms per position (theory §5), correct down to 1 − p_max = 1e-12:
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

    def label_shape(self, outputs: Tensor) -> torch.Size:
        """The outputs' shape without the class dimension."""
        return self._last(outputs).shape[:-1]

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Class indices: the first y whose cumulated probability exceeds the uniform."""
        h = self._last(outputs)
        cdf = torch.softmax(h, -1, dtype=_precise(h)).double().cumsum(-1)
        target = uniforms.unsqueeze(-1) * cdf[..., -1:]
        return torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp_(max=h.shape[-1] - 1)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """onehot(y) − softmax(h), with 1 − p_y summed from the other classes."""
        split = self._split(outputs)
        p_label = split.p.gather(-1, labels.unsqueeze(-1))
        is_top = labels.unsqueeze(-1) == split.top
        own = torch.where(is_top, split.e.unsqueeze(-1), 1 - p_label)
        return (-split.p).scatter(-1, labels.unsqueeze(-1), own).movedim(-1, self.class_dim)

    def output_fisher(self, outputs: Tensor) -> Tensor:
        """I(h) = diag p − ppᵀ [..., C, C]."""
        split = self._split(outputs)
        diagonal = split.p * self._complement(split)
        fisher = -split.p.unsqueeze(-1) * split.p.unsqueeze(-2)
        fisher.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
        return fisher

    def fisher_norm(self, outputs: Tensor) -> Tensor:
        """‖I(h)‖_F per position: √(Σ p²(1−p)² + Σ_{j≠k} p_j² p_k²)."""
        split = self._split(outputs)
        return self._fisher_square(split).sqrt()

    def fourth_moment_trace(self, outputs: Tensor) -> Tensor:
        """Tr M = E‖t − η‖⁴ − ‖I‖_F² per position."""
        s = self._split(outputs)
        t2 = s.rest.square().sum(-1)
        square = (1 - s.p).square() + s.p_max.square().unsqueeze(-1)  # rows of the rest
        square = square + t2.unsqueeze(-1) - s.p.square()
        fourth = s.p_max * (s.e.square() + t2).square() + (s.rest * square.square()).sum(-1)
        return fourth - self._fisher_square(s)

    def fourth_moment_norm(self, outputs: Tensor) -> Tensor:
        """‖M‖_F per position, in O(C): ‖K‖_F² − 2⟨K, I⊗I⟩ + ‖I‖_F⁴ with the top class set apart."""
        s = self._split(outputs)
        e, m = s.e, s.p_max
        t1, t2, t3, t4, t5, t6 = (s.rest.pow(k).sum(-1) for k in range(1, 7))
        a = m.square() + t2  # s₂; δ_y·δ_z = [y=z] − p_y − p_z + s₂
        b = t2 - m * e  # s₂ − p_max
        kurtosis = m.square() * (e.square() + t2).pow(4)
        kurtosis = kurtosis + 2 * m * (
            b.pow(4) * t1 - 4 * b.pow(3) * t2 + 6 * b.square() * t3 - 4 * b * t4 + t5
        )
        a_ = a.unsqueeze(-1)
        kurtosis = kurtosis + (s.rest.square() * (1 - 2 * s.rest + a_).pow(4)).sum(-1)
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
        q = s.rest - 3 * s.rest.square() + 2 * s.rest * a_ + s3_minus.unsqueeze(-1)
        mean = (m * e - t2).unsqueeze(-1)
        q_top = m * (e.square() + t2).square() + (s.rest * (s.rest + mean).square()).sum(-1)
        cross = m * q_top.square() + (s.rest * q.square()).sum(-1)
        return (kurtosis - 2 * cross + self._fisher_square(s).square()).clamp(min=0).sqrt()

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

    def _last(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(self.class_dim, -1)

    def _split(self, outputs: Tensor) -> _Split:
        h = self._last(outputs)
        p = torch.softmax(h, -1, dtype=_precise(h))
        p_max, top = p.max(-1, keepdim=True)
        rest = p.scatter(-1, top, 0.0)
        return _Split(p, top, p_max.squeeze(-1), rest, rest.sum(-1))

    def _complement(self, split: _Split) -> Tensor:
        return (1 - split.p).scatter(-1, split.top, split.e.unsqueeze(-1))

    def _fisher_square(self, s: _Split) -> Tensor:
        own = (s.p * self._complement(s)).square().sum(-1)
        t2 = s.rest.square().sum(-1)
        cross = 2 * s.p_max.square() * t2 + t2.square() - s.rest.pow(4).sum(-1)
        return own + cross


_FACTORIAL = (1, 1, 2, 6, 24)
_MULTINOMIAL = {
    (i, j, 4 - i - j): 24 // (_FACTORIAL[i] * _FACTORIAL[j] * _FACTORIAL[4 - i - j])
    for i in range(5)
    for j in range(5 - i)
}


def _precise(h: Tensor) -> torch.dtype:
    return torch.float64 if h.dtype == torch.float64 else torch.float32
