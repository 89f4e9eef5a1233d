"""Families whose output components carry one independent label each; the base for a user's own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fimprobe.types import FimprobeError, Pass


class Independent:
    """One label per output component, independent given the outputs h.

    A family of one's own gives four elementwise methods, computed in at least float32:
    ``quantile(h, u)`` the inverse CDF, ``score(h, y)`` = ∂ log p/∂h, and the score's
    ``variance(h)`` and ``fourth_moment(h)`` (about its mean, which is 0). For a natural parameter
    h the score is t(y) − η, so that these are the central moments of t(y). See
    ``examples/own_family.py``.

    With components of variance v and fourth moment m (theory §5): ‖I‖_F² = Σv²,
    ‖M‖_F² = Σ(m−v²)² + 2[(Σv²)² − Σv⁴], tr M = Σ(m−v²) + (Σv)² − Σv²; per input, over all
    its components.
    """

    name = "independent"

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Labels at the uniforms."""
        raise NotImplementedError

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """∂ log p(y | h)/∂h."""
        raise NotImplementedError

    def variance(self, outputs: Tensor) -> Tensor:
        """E score²."""
        raise NotImplementedError

    def fourth_moment(self, outputs: Tensor) -> Tensor:
        """E score⁴."""
        raise NotImplementedError

    def check_outputs(self, outputs: Tensor) -> None:
        """Raise unless there is a batch dimension."""
        if outputs.dim() < 1:
            raise FimprobeError(
                f"likelihood={self.name!r} needs outputs [B, ...], but they have shape ()"
            )

    def label_shape(self, outputs: Tensor) -> torch.Size:
        """One label per component: the outputs' shape."""
        return outputs.shape

    def output_fisher(self, outputs: Tensor) -> Tensor:
        """I(h) = diag v [..., C, C] over the last dimension."""
        return torch.diag_embed(self.variance(outputs))

    def fisher_norm(self, outputs: Tensor) -> Tensor:
        """‖I(h)‖_F per input [B]."""
        return self._flat(self.variance(outputs)).square().sum(-1).sqrt()

    def fourth_moment_trace(self, outputs: Tensor) -> Tensor:
        """Tr M per input [B]."""
        v, m = self._flat(self.variance(outputs)), self._flat(self.fourth_moment(outputs))
        return (m - v.square()).sum(-1) + v.sum(-1).square() - v.square().sum(-1)

    def fourth_moment_norm(self, outputs: Tensor) -> Tensor:
        """‖M‖_F per input [B]."""
        v, m = self._flat(self.variance(outputs)), self._flat(self.fourth_moment(outputs))
        square = v.square()
        own = (m - square).square().sum(-1)
        return (own + 2 * (square.sum(-1).square() - square.square().sum(-1))).sqrt()

    def count_passes(self, outputs: Tensor) -> int:
        """One pass per output component, however large the labels' support."""
        return outputs[0].numel() if outputs.dim() > 1 else 1

    def exact_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Unit seeds weighted with the component's variance and fourth moment; each is a block."""
        v, m = self._flat(self.variance(outputs)), self._flat(self.fourth_moment(outputs))
        if mask is not None:
            keep = mask.reshape(mask.shape[0], -1)
            v, m = v * keep, m * keep
        for component in range(v.shape[1]):
            seed = torch.zeros_like(v)
            seed[:, component] = 1
            yield Pass(seed.view(outputs.shape), v[:, component], m[:, component], component)

    @staticmethod
    def _flat(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1)


def precise(outputs: Tensor) -> Tensor:
    """Outputs in at least float32."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()
