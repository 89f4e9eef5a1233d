"""Families whose output components carry one independent label each; the base for a user's own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods.base import OutputNorms, Pass
from fimprobe.likelihoods.output_norms import combine, position_mask

REMAINDER = 1e-9
"""The share of E score² that the probabilities of a family may leave out."""


class Independent:
    """One label per output component, independent given the outputs h.

    A family of one's own gives four elementwise methods, computed in at least float32:
    ``quantile(h, u)`` the inverse CDF, ``score(h, y)`` = ∂ log p/∂h, and the score's
    ``variance(h)`` and ``fourth_moment(h)`` (about its mean, which is 0). For a natural parameter
    h the score is t(y) − η, so that these are the central moments of t(y). ``in_support(y)`` and
    ``support`` (its description) tell which data labels are possible. See
    ``examples/own_family.py``.

    With components of variance v and fourth moment m: ‖I‖_F² = Σv²,
    ‖M‖_F² = Σ(m−v²)² + 2[(Σv²)² − Σv⁴], tr M = Σ(m−v²) + (Σv)² − Σv²; per input, over all
    its components.
    """

    name = "independent"
    support = "finite numbers"

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

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        """p(y | h) of the labels 0, 1, ..., K − 1 [..., K] in float64; None where there are none.

        Optional: a family whose labels are whole numbers gives it to be measured with size-biased
        labels. Where K leaves more than ``REMAINDER`` of E score² out, that input's labels are drawn
        from the model.
        """
        return None

    def expected_squared_score(self, outputs: Tensor) -> Tensor:
        """E score² of each label, in float64 and the labels' shape: τ of size-biased draws."""
        return self.variance(outputs.double())

    def size_biased_quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor | None:
        """Labels at the uniforms, of q(y) ∝ p(y) score²; None where the family has no such draws."""
        mass = self._masses(outputs)
        if mass is None:
            return None
        cdf = mass.cumsum(-1)
        target = uniforms.unsqueeze(-1) * cdf[..., -1:]
        index = torch.searchsorted(cdf, target, right=True).squeeze(-1)
        return index.clamp_(max=cdf.shape[-1] - 1).to(cdf.dtype)

    def cut_off(self, outputs: Tensor) -> Tensor | None:
        """Labels of which ``probabilities`` leave out too much of E score²; None: none of them."""
        mass = self._masses(outputs)
        if mass is None:
            return None
        total = self.variance(outputs.double())
        return (total - mass.sum(-1)).abs() > REMAINDER * total

    def _masses(self, outputs: Tensor) -> Tensor | None:
        """p(y) score² of the labels 0, 1, ... [..., K]."""
        h = outputs.double()
        p = self.probabilities(h)
        if p is None:
            return None
        labels = torch.arange(p.shape[-1], device=h.device, dtype=h.dtype)
        return p * self.score(h.unsqueeze(-1), labels.expand(p.shape)).square()

    def in_support(self, labels: Tensor) -> Tensor:
        """Where a label is possible under the family (elementwise, bool)."""
        return torch.isfinite(labels)

    def check_outputs(self, outputs: Tensor) -> None:
        """Raise unless there is a batch dimension."""
        if outputs.dim() < 1:
            raise FimprobeError(
                f"likelihood={self.name!r} needs outputs [B, ...], but they have shape ()"
            )

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Raise unless there is one possible label per output component."""
        if labels.shape != outputs.shape:
            remedy = "pass one label per output component"
            if labels.numel() == outputs.numel():
                remedy += ": labels.view_as(outputs) if the order is the same"
            raise FimprobeError(
                f"labels have shape {tuple(labels.shape)}, but likelihood={self.name!r} with outputs "
                f"{tuple(outputs.shape)} needs the outputs' shape; {remedy}"
            )
        if labels.is_complex():
            raise FimprobeError(f"labels have type {labels.dtype}; pass real numbers")
        wrong = ~self.in_support(labels)
        if bool(wrong.any()):
            raise FimprobeError(
                f"labels hold {int(wrong.sum())} of {labels.numel()} values that likelihood="
                f"{self.name!r} cannot draw, the first {labels[wrong][0].item()}; pass "
                f"{self.support} (where mask is False too, any will do there), or another likelihood"
            )

    def data_score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The score at a data set's labels of any type, taken in float64 as drawn labels are."""
        return self.score(outputs, labels.to(outputs.device, torch.float64))

    def label_shape(self, outputs: Tensor) -> torch.Size:
        """One label per component: the outputs' shape."""
        return outputs.shape

    def output_fisher(self, outputs: Tensor) -> Tensor:
        """I(h) = diag v [..., C, C] over the last dimension."""
        return torch.diag_embed(self.variance(outputs))

    def fisher_norm(self, outputs: Tensor) -> Tensor:
        """‖I(h)‖_F per input [B]."""
        return self.norms(outputs, None).fisher_norm.to(precise(outputs).dtype)

    def fourth_moment_trace(self, outputs: Tensor) -> Tensor:
        """Tr M per input [B]."""
        return self.norms(outputs, None).moment_trace.to(precise(outputs).dtype)

    def fourth_moment_norm(self, outputs: Tensor) -> Tensor:
        """‖M‖_F per input [B]."""
        return self.norms(outputs, None).moment_norm.to(precise(outputs).dtype)

    def norms(self, outputs: Tensor, mask: Tensor | None) -> OutputNorms:
        """All norms per input [B], exact: each component is a position with I = v, M = m − v²."""
        h = outputs.double()
        v, m = self._flat(self.variance(h)).double(), self._flat(self.fourth_moment(h)).double()
        own = (m - v.square()).clamp(min=0)
        return combine(
            OutputNorms(
                fisher_norm=v,
                fisher_trace=v,
                fisher_max=v,
                fisher_min=v,
                moment_norm=own,
                moment_trace=own,
                moment_max=own,
            ),
            mask,
        )

    def fisher_factor(self, outputs: Tensor, xi: Tensor) -> Tensor:
        """√v ∘ ξ."""
        root = self.variance(outputs).sqrt()
        return root * xi.to(root.dtype)

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

    def hutchinson_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Seeds √v e_c with second = fourth = 1 (0 where masked); each is a block."""
        root = self._flat(self.variance(outputs).sqrt())
        keep = position_mask(mask, root).to(root.dtype)
        for component in range(root.shape[1]):
            seed = torch.zeros_like(root)
            seed[:, component] = root[:, component]
            weight = keep[:, component]
            yield Pass(seed.view(outputs.shape), weight, weight, component)

    @staticmethod
    def _flat(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1)


def precise(outputs: Tensor) -> Tensor:
    """Outputs in at least float32."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()
