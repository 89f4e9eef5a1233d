"""Size-biased labels of softmax outputs; all draws for the same outputs share one softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fimprobe.likelihoods.size_biased import SizeBiasedSampler
from fimprobe.likelihoods.softmax import (
    Softmax,
    first_class_above,
    size_biased_weights,
    softmax_dtype,
)

MAX_FLOAT64_OUTPUTS = 2**12
"""Outputs of one input up to which probabilities are float64; the cost is then negligible."""


class SoftmaxSampler(SizeBiasedSampler):
    """Size-biased labels of a categorical family.

    Inputs with many outputs keep the precision of the outputs. There 1/w has the rounding error of
    float32 probabilities, 1e-7. Sums over classes are always float64.

    Args:
        family: A family with ``class_dim``.
        outputs: Logits [B, ...], the classes along ``class_dim``.
        mask: Bool, of the labels' shape; False leaves a position out.
    """

    def __init__(self, family: Any, outputs: Tensor, mask: Tensor | None) -> None:
        last = outputs.movedim(family.class_dim, -1)
        h = last.double() if last[:1].numel() <= MAX_FLOAT64_OUTPUTS else last
        self.p = torch.softmax(h, -1, dtype=softmax_dtype(h))
        p_max, self.top = self.p.max(-1)
        self.p_max = p_max.double()
        square = torch.linalg.vecdot(self.p, self.p).double()
        self.rest = rest = self.p.scatter(-1, self.top.unsqueeze(-1), 0.0)
        self.complement = rest.sum(-1, dtype=torch.float64)
        confident = p_max > 0.5  # there Σp² − p_max² would cancel
        self.rest_square = torch.where(
            confident, torch.linalg.vecdot(rest, rest).double(), square - self.p_max.square()
        )
        expected = self.p_max * self.complement + self.complement - self.rest_square
        super().__init__(family, outputs, expected, mask)
        self.cdf: Tensor | None = None
        self.biased_cdf: Tensor | None = None

    def plain_labels(self, uniforms: Tensor) -> Tensor:
        """Return labels from the model at the uniforms, which share one cumulative sum."""
        if self.cdf is None:
            self.cdf = self.p.double().cumsum(-1)
        return first_class_above(self.cdf, uniforms)

    def biased_labels(self, uniforms: Tensor) -> Tensor:
        """Return size-biased labels of inputs with one position, which share one cumulative sum."""
        if self.p.dtype != torch.float64:
            return super().biased_labels(uniforms)
        if self.biased_cdf is None:
            s = Softmax(
                p=self.p,
                top=self.top.unsqueeze(-1),
                p_max=self.p_max,
                rest=self.rest,
                complement=self.complement,
            )
            self.biased_cdf = size_biased_weights(s).cumsum(-1)
        return first_class_above(self.biased_cdf, uniforms)

    def unexpected_coincidences(
        self, labels: Sequence[Tensor], inverse_weights: Tensor | None = None
    ) -> Tensor:
        """Return Σ_{t≠s} [y_t = y_s] − (S − 1) q(y_s), of mean zero, for the draws of one position.

        Args:
            labels: The labels of each of the S draws, with one position [b, ...].
            inverse_weights: 1/w = q/p of the draws [b, S]; None for labels from the model.

        Returns:
            The difference for every draw, float64 [b, S].
        """
        y = torch.stack([draw.view(self.size) for draw in labels], 1)
        q = self.p.view(self.size, -1).gather(1, y).double()
        if inverse_weights is not None:
            q *= inverse_weights
        others = len(labels) - 1
        return (y.unsqueeze(1) == y.unsqueeze(2)).sum(2) - 1 - others * q

    def scores_of(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return onehot(y) − p, and ‖δ_y‖² [B] without a sum over the classes."""
        index = labels.unsqueeze(-1)
        p_label = self.p.gather(-1, index).squeeze(-1).double()
        is_top = labels == self.top
        label_score = torch.where(is_top, self.complement, 1 - p_label)
        others = torch.where(is_top, 0, self.p_max.square() - p_label.square()) + self.rest_square
        square = label_score.square() + others
        scores = (-self.p).scatter_(-1, index, label_score.to(self.p.dtype).unsqueeze(-1))
        if self.mask is not None:
            square = square * self.mask
            scores.masked_fill_(~self.mask.unsqueeze(-1), 0)
        scores = scores.movedim(-1, self.family.class_dim)
        return scores, square.reshape(self.size, -1).sum(1)
