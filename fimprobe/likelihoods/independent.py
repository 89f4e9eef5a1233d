"""Base class of families with one independent label per output component, custom ones included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods.base import OutputNorms, Pass
from fimprobe.likelihoods.output_norms import combine_positions, position_mask

MAX_MISSING_SHARE = 1e-9
"""Share of E score² that the probabilities of a family may miss: a relative bias below 1e-9."""


class Independent:
    """One label per output component, independent given the outputs h.

    A custom family defines four elementwise methods, computed in at least float32: ``quantile``,
    ``score``, ``variance`` and ``fourth_moment``. The moments are those of the score, whose mean is
    0. For a natural parameter h the score is t(y) − η, and they are the central moments of t(y).
    ``in_support`` and its description ``support`` decide which data labels are possible. See
    ``examples/own_family.py``.

    For components of variance v and fourth moment m: ‖I‖_F² = Σv²,
    ‖M‖_F² = Σ(m−v²)² + 2[(Σv²)² − Σv⁴], tr M = Σ(m−v²) + (Σv)² − Σv². The sums extend over all
    components of an input (docs/theory.md, "Sequences").

    In all methods ``outputs`` and ``labels`` have the shape [B, ...], and ``mask`` is boolean, of
    that shape; False leaves a label out.
    """

    name = "independent"
    support = "finite numbers"

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Return the labels at the uniforms: the inverse CDF.

        Args:
            outputs: h [B, ...].
            uniforms: In (0, 1), float64, of the same shape.
        """
        raise NotImplementedError

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return ∂ log p(y | h)/∂h of each component.

        Args:
            outputs: h [B, ...].
            labels: y, of the same shape.
        """
        raise NotImplementedError

    def variance(self, outputs: Tensor) -> Tensor:
        """Return E score²."""
        raise NotImplementedError

    def fourth_moment(self, outputs: Tensor) -> Tensor:
        """Return E score⁴."""
        raise NotImplementedError

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        """Return p(y | h) of the labels 0, 1, ..., K − 1, float64 [..., K]; None if not defined.

        Optional, for families of whole-number labels: it makes size-biased labels possible. If the K
        labels miss more than ``MAX_MISSING_SHARE`` of E score², the labels of that input are drawn
        from the model.
        """
        return None

    def expected_squared_score(self, outputs: Tensor) -> Tensor:
        """Return E score² of each label, float64 [B, ...]: τ of size-biased draws."""
        return self.variance(outputs.double())

    def size_biased_quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor | None:
        """Return labels from q(y) ∝ p(y) score²; None if the family has no size-biased draws.

        Args:
            outputs: h [B, ...].
            uniforms: In (0, 1), float64, of the same shape.
        """
        mass = self._masses(outputs)
        if mass is None:
            return None
        cdf = mass.cumsum(-1)
        target = uniforms.unsqueeze(-1) * cdf[..., -1:]
        index = torch.searchsorted(cdf, target, right=True).squeeze(-1)
        return index.clamp_(max=cdf.shape[-1] - 1).to(cdf.dtype)

    def cut_off(self, outputs: Tensor) -> Tensor | None:
        """Return where ``probabilities`` miss too much of E score² [B, ...]; None for nowhere."""
        mass = self._masses(outputs)
        if mass is None:
            return None
        total = self.variance(outputs.double())
        return (total - mass.sum(-1)).abs() > MAX_MISSING_SHARE * total

    def _masses(self, outputs: Tensor) -> Tensor | None:
        """Return p(y) score² of the labels 0, 1, ..., float64 [..., K]."""
        h = outputs.double()
        p = self.probabilities(h)
        if p is None:
            return None
        labels = torch.arange(p.shape[-1], device=h.device, dtype=h.dtype)
        return p * self.score(h.unsqueeze(-1), labels.expand(p.shape)).square()

    def in_support(self, labels: Tensor) -> Tensor:
        """Return where a label is possible under the family, bool."""
        return torch.isfinite(labels)

    def check_outputs(self, outputs: Tensor) -> None:
        """Check that the outputs have a batch dimension.

        Raises:
            FimprobeError: If they do not.
        """
        if outputs.dim() < 1:
            raise FimprobeError(
                f"outputs must have a batch dimension, [B, ...], for likelihood={self.name!r}, got "
                "shape (). Pass output= a function from what the model returns to its outputs."
            )

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Check that there is one possible label per output component.

        Args:
            outputs: h [B, ...].
            labels: Data labels.

        Raises:
            FimprobeError: If the shape differs, or a label is not possible.
        """
        check_real_labels(self, outputs.shape, labels, self.in_support(labels))

    def data_score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the score at data labels of any type, converted to float64 as drawn labels are.

        Args:
            outputs: h [B, ...].
            labels: Data labels that ``check_labels`` accepts, of the same shape.

        Returns:
            The score [B, ...].
        """
        return self.score(outputs, labels.to(outputs.device, torch.float64))

    def label_shape(self, outputs: Tensor) -> torch.Size:
        """Return the outputs' shape: one label per component."""
        return outputs.shape

    def output_fisher(self, outputs: Tensor) -> Tensor:
        """Return I(h) = diag v [..., C, C] over the last dimension."""
        return torch.diag_embed(self.variance(outputs))

    def fisher_norm(self, outputs: Tensor) -> Tensor:
        """Return ‖I(h)‖_F of every input [B]."""
        return self.norms(outputs, None).fisher_norm.to(precise(outputs).dtype)

    def fourth_moment_trace(self, outputs: Tensor) -> Tensor:
        """Return tr M of every input [B]."""
        return self.norms(outputs, None).moment_trace.to(precise(outputs).dtype)

    def fourth_moment_norm(self, outputs: Tensor) -> Tensor:
        """Return ‖M‖_F of every input [B]."""
        return self.norms(outputs, None).moment_norm.to(precise(outputs).dtype)

    def norms(self, outputs: Tensor, mask: Tensor | None) -> OutputNorms:
        """Return the exact norms of every input [B], float64.

        Each component is a position with I = v and M = m − v².

        Args:
            outputs: h [B, ...].
            mask: Bool, of the same shape; False leaves a label out.
        """
        h = outputs.double()
        v, m = self._flat(self.variance(h)).double(), self._flat(self.fourth_moment(h)).double()
        moment = (m - v.square()).clamp(min=0)
        return combine_positions(
            OutputNorms(
                fisher_norm=v,
                fisher_trace=v,
                fisher_max=v,
                fisher_min=v,
                moment_norm=moment,
                moment_trace=moment,
                moment_max=moment,
            ),
            mask,
        )

    def fisher_factor(self, outputs: Tensor, xi: Tensor) -> Tensor:
        """Return √v ∘ ξ, where v is the variance of the score.

        Args:
            outputs: h [B, ...].
            xi: ξ, of the same shape.

        Returns:
            The Hutchinson cotangent [B, ...].
        """
        root = self.variance(outputs).sqrt()
        return root * xi.to(root.dtype)

    def fisher_quadratic(self, outputs: Tensor, vectors: Tensor, mask: Tensor | None) -> Tensor:
        """Return vᵀI(h)v = Σ_a Var(score_a) v_a² of every input [B], float64.

        Args:
            outputs: h [B, ...].
            vectors: v, of the outputs' shape.
            mask: Bool, of that shape; False leaves a label out.
        """
        weighted = self._flat(self.variance(outputs)).double() * self._flat(vectors).double().square()
        return weighted.where(position_mask(mask, weighted), 0).sum(1)

    def count_passes(self, outputs: Tensor) -> int:
        """Return the number of output components: one pass each, whatever the labels' support."""
        return outputs[0].numel() if outputs.dim() > 1 else 1

    def exact_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Yield unit cotangents weighted by the component's variance and fourth moment, each a block.

        Args:
            outputs: h [B, ...].
            mask: Bool, of the same shape; False leaves a label out.
        """
        v, m = self._flat(self.variance(outputs)), self._flat(self.fourth_moment(outputs))
        if mask is not None:
            keep = mask.reshape(mask.shape[0], -1)
            v, m = v * keep, m * keep
        for component in range(v.shape[1]):
            cotangent = torch.zeros_like(v)
            cotangent[:, component] = 1
            yield Pass(
                cotangent=cotangent.view(outputs.shape),
                square=v[:, component],
                quartic=m[:, component],
                block=component,
            )

    def hutchinson_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Yield cotangents √v e_c with square = quartic = 1 (0 where masked), each a block.

        Args:
            outputs: h [B, ...].
            mask: Bool, of the same shape; False leaves a label out.
        """
        root = self._flat(self.variance(outputs).sqrt())
        keep = position_mask(mask, root).to(root.dtype)
        for component in range(root.shape[1]):
            cotangent = torch.zeros_like(root)
            cotangent[:, component] = root[:, component]
            weight = keep[:, component]
            yield Pass(
                cotangent=cotangent.view(outputs.shape),
                square=weight,
                quartic=weight,
                block=component,
            )

    @staticmethod
    def _flat(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1)


def check_real_labels(family: Any, shape: torch.Size, labels: Tensor, possible: Tensor) -> None:
    """Check the labels of a data set, one for each prediction.

    Args:
        family: Its name and its support are for the message.
        shape: The shape that the labels must have.
        labels: Data labels.
        possible: Where a label is possible under the family, bool.

    Raises:
        FimprobeError: If the shape differs, or a label is not possible.
    """
    if labels.shape != shape:
        remedy = "Pass one label per output component"
        if labels.numel() == shape.numel():
            remedy += ": labels.view_as(outputs) if the order is the same"
        raise FimprobeError(
            f"labels must have the outputs' shape {tuple(shape)} for likelihood="
            f"{family.name!r}, got {tuple(labels.shape)}. {remedy}."
        )
    if labels.is_complex():
        raise FimprobeError(
            f"labels must be real numbers, got type {labels.dtype}. Pass labels.real if the "
            "imaginary parts are zero."
        )
    invalid = ~possible
    if bool(invalid.any()):
        raise FimprobeError(
            f"labels must be {family.support} for likelihood={family.name!r}, got "
            f"{int(invalid.sum())} of {labels.numel()} other values, the first "
            f"{labels[invalid][0].item()}. Correct them (where mask is False, any possible label "
            "serves), or pass another likelihood."
        )


def precise(outputs: Tensor) -> Tensor:
    """Return the outputs in at least float32."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()
