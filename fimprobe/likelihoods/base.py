"""The protocol of a likelihood and the records it returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Pass(NamedTuple):
    """One backward pass of an exact expectation over labels.

    ``seed`` [B, ...] has the shape of the outputs. ``second`` and ``fourth`` [B] are the
    factors of (Jᵀ seed)² and (Jᵀ seed)⁴ in E g² and E g⁴. ``block`` numbers the independent
    random variable that the pass belongs to: fourth cumulants add over blocks.
    """

    seed: Tensor
    second: Tensor
    fourth: Tensor
    block: int


@dataclass(frozen=True)
class OutputNorms:
    """Sizes of an input's output Fisher information I(h) and fourth moment M, float64 [B].

    The output vector is all of an input's labelled positions together, independent given the
    input; M = K − I⊗I = Cov(vec δδᵀ) is a C²×C² matrix, δ being the score at the outputs and
    K_abcd = E δ_a δ_b δ_c δ_d. Norms and traces are exact. The largest eigenvalues are exact for
    independent components and for softmax outputs where ``Categorical.norms`` says so, otherwise
    upper bounds. ``fisher_min`` is exact. Without any labelled position all are 0.
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
    """A family p(y | h) of label distributions, h being the network's outputs [B, ...].

    Subclass :class:`fimprobe.likelihoods.Independent` for one label per output component:
    it needs ``quantile``, ``score``, ``variance`` and ``fourth_moment`` only.
    """

    @property
    def name(self) -> str:
        """How messages and reports call the family."""

    def check_outputs(self, outputs: Tensor) -> None:
        """Raise :class:`FimprobeError` where the outputs' shape does not fit."""

    def label_shape(self, outputs: Tensor) -> torch.Size:
        """Shape of one draw of the labels, batch first."""

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Labels at the float64 ``uniforms`` [B, ...] in (0, 1): the inverse CDF."""

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """∂ log p(y | h) / ∂h, in the shape of the outputs (t(y) − η for natural h)."""

    def count_passes(self, outputs: Tensor) -> int:
        """Backward passes that an exact expectation over the labels takes."""

    def exact_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Passes whose weighted squares and fourth powers sum to the exact moments."""

    def norms(self, outputs: Tensor, mask: Tensor | None) -> OutputNorms:
        """Norms, traces and extreme eigenvalues of I(h) and M, one value per input."""

    def fisher_factor(self, outputs: Tensor, xi: Tensor) -> Tensor:
        """L ξ with L Lᵀ = I(h) and ξ of the outputs' shape: the seed of one Hutchinson draw."""

    def hutchinson_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Passes of the exact expectation over Rademacher ξ: the columns of L, a block each."""

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Raise :class:`FimprobeError` where a data set's labels do not fit the outputs."""

    def data_score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """``score`` at labels that ``check_labels`` let pass, zero where they are ignored."""
