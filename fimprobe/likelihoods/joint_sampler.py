"""Size-biased labels of several heads: one label of all heads is drawn from q."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fimprobe.likelihoods.size_biased import SizeBiasedSampler, select_position


class JointSampler(SizeBiasedSampler):
    """Size-biased labels of a joint distribution; the labels of its heads are its positions.

    Args:
        family: The joint distribution.
        outputs: h [B, Σ outputs].
        mask: Bool [B, Σ labels]; False leaves a label out.
    """

    def __init__(self, family: Any, outputs: Tensor, mask: Tensor | None) -> None:
        h = outputs.double()
        super().__init__(family, h, family.expected_squared_score(h), mask)

    def draw_chosen(self, chosen: Tensor, uniforms: Tensor) -> Tensor:
        """Return the size-biased label at one position of every input [B].

        Args:
            chosen: Index of the label among all heads [B].
            uniforms: In (0, 1), float64 [B].
        """
        labels, start = torch.zeros_like(uniforms), 0
        for family, h in self.family.split(self.outputs):
            count = family.label_shape(h)[1:].numel()
            index = (chosen - start).clamp(0, count - 1)
            of_position = select_position(family, h, index)
            u = uniforms.view(family.label_shape(of_position))
            of_head = family.size_biased_quantile(of_position, u).reshape(-1)
            is_here = (chosen >= start) & (chosen < start + count)
            labels = torch.where(is_here, of_head.to(labels.dtype), labels)
            start += count
        return labels
