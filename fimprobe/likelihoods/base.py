"""The protocol of a likelihood and the records it returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Pass(NamedTuple):
    """One backward pass of an exact expectation over labels.

    Attributes:
        cotangent: A vector at the outputs, of their shape [B, ...].
        square: Factor [B] of (Jᵀ cotangent)² in E g².
        quartic: Factor [B] of (Jᵀ cotangent)⁴ in E g⁴.
        block: Number of the independent random variable that the pass belongs to. Fourth cumulants
            add over blocks.
    """

    cotangent: Tensor
    square: Tensor
    quartic: Tensor
    block: int


@dataclass(frozen=True, kw_only=True)
class OutputNorms:
    """Norms of the output Fisher information I(h) and the fourth moment M of inputs, float64 [B].

    The output vector joins all labelled positions of an input, which are independent given the input.
    M = K − I⊗I = Cov(vec δδᵀ) is a C²×C² matrix, where δ is the score at the outputs and
    K_abcd = E δ_a δ_b δ_c δ_d (docs/theory.md, "Constants of the output distributions").

    Norms, traces and ``fisher_min`` are exact. The largest eigenvalues are exact for independent
    components and for softmax outputs of moderate size (``Categorical.norms``); otherwise they are
    upper bounds. All values are 0 for an input without a labelled position. Units: those of the score
    squared for I, to the fourth power for M.
    """

    fisher_norm: Tensor
    """‖I‖_F."""
    fisher_trace: Tensor
    """tr I."""
    fisher_max: Tensor
    """λ_max(I), or an upper bound."""
    fisher_min: Tensor
    """λ_min(I) over the labelled positions; 0 for softmax outputs."""
    moment_norm: Tensor
    """‖M‖_F."""
    moment_trace: Tensor
    """tr M."""
    moment_max: Tensor
    """λ_max(M), or an upper bound."""


@runtime_checkable
class Likelihood(Protocol):
    """A family p(y | h) of label distributions, where h are the outputs [B, ...] of the network.

    For one label per output component subclass :class:`fimprobe.likelihoods.Independent`, which needs
    ``quantile``, ``score``, ``variance`` and ``fourth_moment`` only. A family of several tensors has
    a method ``select_outputs`` from what the model, or ``output``, returns to h.

    In all methods ``outputs`` are h [B, ...], and ``mask`` is boolean, of the labels' shape; False
    leaves a label out.
    """

    @property
    def name(self) -> str:
        """The name of the family in messages and reports."""

    def check_outputs(self, outputs: Tensor) -> None:
        """Raise :class:`FimprobeError` if the shape of the outputs does not fit."""

    def label_shape(self, outputs: Tensor) -> torch.Size:
        """Return the shape of one draw of the labels, batch first."""

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Return the labels at the uniforms: the inverse CDF.

        Args:
            outputs: h [B, ...].
            uniforms: In (0, 1), float64, of the labels' shape [B, ...].

        Returns:
            Labels, in the shape of ``uniforms``.
        """

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return ∂ log p(y | h) / ∂h, which is t(y) − η if h is the natural parameter.

        Args:
            outputs: h [B, ...].
            labels: y, of the shape ``label_shape(outputs)``.

        Returns:
            The score [B, ...], of the outputs' shape.
        """

    def count_passes(self, outputs: Tensor) -> int:
        """Return the number of backward passes of an exact expectation over the labels."""

    def exact_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Yield the passes whose weighted squares and fourth powers sum to the exact moments.

        Args:
            outputs: h [B, ...].
            mask: Bool, of the labels' shape; False leaves a label out. None keeps all.
        """

    def norms(self, outputs: Tensor, mask: Tensor | None) -> OutputNorms:
        """Return norms, traces and extreme eigenvalues of I(h) and M, one value per input.

        Args:
            outputs: h [B, ...].
            mask: Bool, of the labels' shape; False leaves a label out. None keeps all.

        Returns:
            The values of every input [B], float64.
        """

    def fisher_factor(self, outputs: Tensor, xi: Tensor) -> Tensor:
        """Return L ξ, where L Lᵀ = I(h): a Hutchinson cotangent.

        Args:
            outputs: h [B, ...].
            xi: ξ, of the outputs' shape.

        Returns:
            L ξ, of the outputs' shape.
        """

    def hutchinson_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Yield the passes of the exact expectation over Rademacher ξ: each column of L, a block.

        Args:
            outputs: h [B, ...].
            mask: Bool, of the labels' shape; False leaves a label out. None keeps all.
        """

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Check that the labels of a data set fit the outputs.

        Args:
            outputs: h [B, ...].
            labels: Data labels.

        Raises:
            FimprobeError: If they do not.
        """

    def data_score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return ``score`` at labels of a data set, zero at ignored labels.

        Args:
            outputs: h [B, ...].
            labels: Data labels that ``check_labels`` accepts.

        Returns:
            The score [B, ...], of the outputs' shape.
        """
