"""Softmax outputs: classes, tokens, segmentation maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods.base import OutputNorms, Pass
from fimprobe.likelihoods.output_norms import position_mask
from fimprobe.likelihoods.size_biased import SizeBiasedSampler
from fimprobe.likelihoods.softmax import (
    Softmax,
    complements,
    expected_squared_scores,
    first_class_above,
    size_biased_weights,
    softmax,
    softmax_dtype,
)
from fimprobe.likelihoods.softmax_norms import (
    fisher,
    fisher_square,
    moment_norm,
    moment_trace,
    softmax_norms,
)
from fimprobe.likelihoods.softmax_sampler import SoftmaxSampler

IGNORED = -100
"""The label of a position without a label, as in torch's cross-entropy."""


@dataclass(frozen=True)
class Categorical:
    """p(y | h) = softmax(h)_y, one label per position.

    h is the natural parameter and t(y) = onehot(y) the sufficient statistic. The score is onehot(y)
    − p. Per position I(h) = diag p − ppᵀ and M = K − I⊗I, where K is the fourth central moment of
    the one-hot label (Soen & Sun (2021), eq. 5; docs/theory.md, "Notation"). All numbers are
    accurate down to 1 − p_max = 1e-12.

    Log-probabilities are valid logits; probabilities are not. The boolean ``mask`` of the methods has
    the outputs' shape without the class dimension; False leaves a position out.

    Args:
        class_dim: Dimension of the classes. −1 fits [B, C] and [B, T, C]; maps [B, C, H, W] need 1,
        as
            for torch's cross-entropy.
        name: The name in messages and reports.

    >>> Categorical().fisher_norm(torch.zeros(1, 2)).item()
    0.5
    """

    class_dim: int = -1
    name: str = "categorical"

    def __post_init__(self) -> None:
        """Check that the dimension is an integer."""
        if isinstance(self.class_dim, bool) or not isinstance(self.class_dim, int):
            raise FimprobeError(
                f"class_dim must be an integer, got {self.class_dim!r}. Pass 1 for maps "
                "[B, C, H, W], or -1 for classes in the last dimension."
            )

    def check_outputs(self, outputs: Tensor) -> None:
        """Check that the outputs are logits of at least two classes.

        Raises:
            FimprobeError: If they are not, or if ``class_dim`` is ambiguous.
        """
        if outputs.dim() < 2 or not -outputs.dim() <= self.class_dim < outputs.dim():
            raise FimprobeError(
                f"outputs must be logits [B, ..., C] for likelihood='categorical', got shape "
                f"{tuple(outputs.shape)} with class_dim={self.class_dim}. Pass output= a function "
                "from what the model returns to its logits."
            )
        if outputs.dim() >= 4 and self.class_dim == -1:
            raise FimprobeError(
                f"class_dim must be given for outputs of shape {tuple(outputs.shape)}, got -1. Pass "
                "likelihood=fimprobe.likelihoods.Categorical(class_dim=1) for maps [B, C, H, W], or "
                f"class_dim={outputs.dim() - 1} for classes in the last dimension."
            )
        if outputs.shape[self.class_dim] < 2:
            raise FimprobeError(
                f"outputs must have at least 2 classes for likelihood='categorical', got "
                f"{outputs.shape[self.class_dim]} in shape {tuple(outputs.shape)}. Pass "
                "likelihood='bernoulli' for one logit per label."
            )

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Check that there is a class index at every position, or −100 for none.

        Args:
            outputs: Logits [B, ...].
            labels: Data labels.

        Raises:
            FimprobeError: If shape, type or range of the labels is wrong.
        """
        shape, classes = self.label_shape(outputs), outputs.shape[self.class_dim]
        if labels.shape != shape:
            remedy = "Pass one class index per position, -100 where there is none"
            if labels.shape == outputs.shape:
                remedy = f"Pass class indices: labels.argmax({self.class_dim}) of one-hot labels"
            elif labels.numel() == shape.numel():
                remedy += f": labels.reshape{tuple(shape)} if the order is the same"
            raise FimprobeError(
                f"labels must have the shape {tuple(shape)} for likelihood='categorical' with "
                f"outputs {tuple(outputs.shape)}, got {tuple(labels.shape)}. {remedy}."
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise FimprobeError(
                "labels must be class indices for likelihood='categorical', got type "
                f"{labels.dtype}. Pass whole numbers, such as labels.long()."
            )
        labels = labels.long()
        invalid = ((labels < 0) | (labels >= classes)) & (labels != IGNORED)
        if bool(invalid.any()):
            raise FimprobeError(
                f"labels must be class indices from 0 to {classes - 1}, got {int(invalid.sum())} of "
                f"{labels.numel()} outside, the first {labels[invalid][0].item()}. Number the "
                f"classes from 0, and set the label of ignored positions to {IGNORED}."
            )

    def data_score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the score at data labels, zero at the label −100.

        Args:
            outputs: Logits [B, ...].
            labels: Class indices, of the shape ``label_shape(outputs)``.

        >>> Categorical().data_score(torch.zeros(2, 2), torch.tensor([1, -100])).abs().tolist()
        [[0.5, 0.5], [0.0, 0.0]]
        """
        labels = labels.to(outputs.device, torch.int64)
        ignored = labels == IGNORED
        score = self.score(outputs, labels.masked_fill(ignored, 0))
        return score.masked_fill(ignored.unsqueeze(self.class_dim), 0)

    def label_shape(self, outputs: Tensor) -> torch.Size:
        """Return the outputs' shape without the class dimension."""
        return self._classes_last(outputs).shape[:-1]

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Return the first class whose cumulative probability exceeds the uniform.

        Args:
            outputs: Logits [B, ...].
            uniforms: In (0, 1), float64, of the labels' shape.
        """
        h = self._classes_last(outputs)
        p = torch.softmax(h, -1, dtype=softmax_dtype(h))
        return first_class_above(p.double().cumsum(-1), uniforms)

    def expected_squared_score(self, outputs: Tensor) -> Tensor:
        """Return τ = E‖onehot(y) − p‖² = 1 − Σp² of each position, float64."""
        return expected_squared_scores(self._softmax64(outputs))

    def size_biased_quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Return class indices from q(y) = p_y‖δ_y‖²/τ, where ‖δ_y‖² = 1 − 2p_y + Σp².

        Args:
            outputs: Logits [B, ...].
            uniforms: In (0, 1), float64, of the labels' shape.

        >>> logits = torch.tensor([[40.0, 0.0, 0.0]])  # draws from p always give class 0
        >>> [Categorical().size_biased_quantile(logits, torch.tensor([u])).item() for u in (0.3, 0.8)]
        [1, 2]
        """
        weights = size_biased_weights(self._softmax64(outputs))
        return first_class_above(weights.cumsum(-1), uniforms)

    def size_biased_sampler(self, outputs: Tensor, mask: Tensor | None) -> SizeBiasedSampler:
        """Return a sampler whose draws share one softmax.

        Args:
            outputs: Logits [B, ...].
            mask: Bool, of the labels' shape; False leaves a position out. None keeps all.
        """
        return SoftmaxSampler(self, outputs, mask)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return onehot(y) − p, shaped like the outputs; 1 − p_y is summed from the other classes.

        Args:
            outputs: Logits [B, ...].
            labels: Class indices, of the shape ``label_shape(outputs)``.
        """
        s = self._softmax(outputs)
        p_label = s.p.gather(-1, labels.unsqueeze(-1))
        is_top = labels.unsqueeze(-1) == s.top
        label_score = torch.where(is_top, s.complement.unsqueeze(-1), 1 - p_label)
        score = (-s.p).scatter(-1, labels.unsqueeze(-1), label_score)
        return score.movedim(-1, self.class_dim)

    def output_fisher(self, outputs: Tensor) -> Tensor:
        """Return I(h) = diag p − ppᵀ [..., C, C]."""
        return fisher(self._softmax(outputs))

    def fisher_norm(self, outputs: Tensor) -> Tensor:
        """Return ‖I(h)‖_F = √(Σ p²(1−p)² + Σ_{j≠k} p_j² p_k²) of each position."""
        return fisher_square(self._softmax64(outputs)).sqrt().to(softmax_dtype(outputs))

    def fourth_moment_trace(self, outputs: Tensor) -> Tensor:
        """Return tr M = E‖t − η‖⁴ − ‖I‖_F² of each position."""
        return moment_trace(self._softmax64(outputs)).to(softmax_dtype(outputs))

    def fourth_moment_norm(self, outputs: Tensor) -> Tensor:
        """Return ‖M‖_F = √(‖K‖_F² − 2⟨K, I⊗I⟩ + ‖I‖_F⁴) of each position, in O(C)."""
        return moment_norm(self._softmax64(outputs)).to(softmax_dtype(outputs))

    def norms(self, outputs: Tensor, mask: Tensor | None) -> OutputNorms:
        """Return all norms of every input [B], float64; see :func:`softmax_norms`.

        Args:
            outputs: Logits [B, ...].
            mask: Bool, of the labels' shape; False leaves a position out.
        """
        h = self._classes_last(outputs)
        return softmax_norms(h.reshape(h.shape[0], -1, h.shape[-1]), mask)

    def fisher_factor(self, outputs: Tensor, xi: Tensor) -> Tensor:
        """Return L ξ with L = diag √p − p √pᵀ: √p_y ξ_y − p_y Σ_z √p_z ξ_z at each position.

        At the largest class the two terms in ξ_y are combined as √p_y (1 − p_y) ξ_y.

        Args:
            outputs: Logits [B, ...].
            xi: ξ, of the outputs' shape.
        """
        s = self._softmax(outputs)
        weighted = s.p.sqrt() * self._classes_last(xi).to(s.p.dtype)
        top_term = weighted.gather(-1, s.top)
        others = weighted.scatter(-1, s.top, 0.0).sum(-1, keepdim=True)
        top = top_term * s.complement.unsqueeze(-1) - s.p_max.unsqueeze(-1) * others
        rest = weighted - s.p * (top_term + others)
        return rest.scatter(-1, s.top, top).movedim(-1, self.class_dim)

    def fisher_quadratic(self, outputs: Tensor, vectors: Tensor, mask: Tensor | None) -> Tensor:
        """Return vᵀI(h)v = Σ_t Σ_y p_ty (v_ty − Σ_z p_tz v_tz)² of every input [B], float64.

        Args:
            outputs: Logits [B, ...].
            vectors: v, of the outputs' shape.
            mask: Bool, of the labels' shape; False leaves a position out.
        """
        h = self._classes_last(outputs)
        p = torch.softmax(h, -1, dtype=softmax_dtype(h))
        v = self._classes_last(vectors).to(p.dtype)
        centred = v - torch.linalg.vecdot(p, v).unsqueeze(-1)
        at_positions = torch.linalg.vecdot(p.mul_(centred), centred).double().reshape(len(v), -1)
        return at_positions.where(position_mask(mask, at_positions), 0).sum(1)

    def count_passes(self, outputs: Tensor) -> int:
        """Return T·C: one pass per class and position."""
        return outputs[0].numel()

    def exact_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Yield one pass per class and position, weighted by its probability; positions are blocks.

        Args:
            outputs: Logits [B, ...].
            mask: Bool, of the labels' shape; False leaves a position out.
        """
        batch, classes = outputs.shape[0], outputs.shape[self.class_dim]
        p = self._softmax(outputs).p.reshape(batch, -1, classes)
        if mask is not None:
            p = p * mask.reshape(batch, -1, 1)
        for position in range(p.shape[1]):
            for label in range(classes):
                labels = torch.full(
                    self.label_shape(outputs), label, dtype=torch.long, device=outputs.device
                )
                score = self.score(outputs, labels).movedim(self.class_dim, -1)
                cotangent = torch.zeros_like(score).view(batch, -1, classes)
                cotangent[:, position] = score.reshape(batch, -1, classes)[:, position]
                cotangent = cotangent.view(score.shape).movedim(-1, self.class_dim)
                weight = p[:, position, label]
                yield Pass(cotangent=cotangent, square=weight, quartic=weight, block=position)

    def hutchinson_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Yield one pass per class c and position: the column L e_c = √p_c (e_c − p), each a block.

        Args:
            outputs: Logits [B, ...].
            mask: Bool, of the labels' shape; False leaves a position out.
        """
        s = self._softmax(outputs)
        shape, classes = s.p.shape, s.p.shape[-1]
        p = s.p.reshape(shape[0], -1, classes)
        complement = complements(s).reshape(p.shape)
        keep = position_mask(mask, p[..., 0]).to(p.dtype)
        for position in range(p.shape[1]):
            for c in range(classes):
                root = p[:, position, c].sqrt()
                column = torch.zeros_like(p)
                column[:, position] = -p[:, position] * root[:, None]
                column[:, position, c] = complement[:, position, c] * root
                column = column.view(shape).movedim(-1, self.class_dim)
                weight, block = keep[:, position], position * classes + c
                yield Pass(cotangent=column, square=weight, quartic=weight, block=block)

    def _classes_last(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(self.class_dim, -1)

    def _softmax(self, outputs: Tensor) -> Softmax:
        return softmax(self._classes_last(outputs))

    def _softmax64(self, outputs: Tensor) -> Softmax:
        # near one-hot the squares of I's entries are below the range of float32
        return softmax(self._classes_last(outputs).double())
