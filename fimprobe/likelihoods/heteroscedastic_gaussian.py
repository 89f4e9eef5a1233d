"""Gaussian labels whose mean and variance the model predicts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fimprobe.errors import BatchError, FimprobeError
from fimprobe.likelihoods.base import OutputNorms, Pass
from fimprobe.likelihoods.independent import check_real_labels, precise
from fimprobe.likelihoods.mean_and_variance import find_mean_and_variance, natural_parameters
from fimprobe.likelihoods.output_norms import combine_positions, position_mask

MAX_CANCELLATION = 1e-2
"""Relative rounding error of scores in the variance above which a batch is refused."""

# Nodes z and weights of the Gauss-Hermite rule with five nodes: exact up to degree 9, and g⁴ has 8.
_NODES = (0.0, 1.355626179974266, 2.8569700138728056)
_WEIGHTS = (8 / 15, 0.22207592200561266, 0.011257411327720691)
_RULE = [
    (_WEIGHTS[0], 0.0),
    *(
        (weight, sign * z)
        for weight, z in zip(_WEIGHTS[1:], _NODES[1:], strict=True)
        for sign in (1, -1)
    ),
]

# Covariances of u₁², u₁u₂, u₂u₁ and u₂², where u₁ = z, u₂ = (z² − 1)/√2 and z is a standard normal.
_SQUARES_COVARIANCE = (
    (2.0, 0.0, 0.0, 4.0),
    (0.0, 5.0, 5.0, 0.0),
    (0.0, 5.0, 5.0, 0.0),
    (4.0, 0.0, 0.0, 14.0),
)


@dataclass(frozen=True)
class HeteroscedasticGaussian:
    """y ~ N(m, v) for each label, where the model predicts the mean m and the variance v.

    The model, or the function ``output``, returns a pair (mean, variance), or a mapping or record
    with the fields ``mean`` and ``var`` or ``variance``. The variance has the shape of the mean, one
    dimension fewer, or the length 1 in one dimension, as for ``torch.nn.GaussianNLLLoss``. Standard
    deviations and logarithms of variances are mapped to variances by ``output``.

    The methods work in the natural parameters h = (m/v, −1/(2v)), [B, ..., 2], with t(y) = (y, y²).
    The score is (y − m, y² − m² − v) and I(h) = [[v, 2mv], [2mv, 2v² + 4m²v]]. F and the variances of
    Î₁ are the same in every parametrisation. Î₂ is that of natural parameters. Labels and masks have
    the shape of the mean.

    Args:
        eps: Batches with a smaller variance are refused: there ``GaussianNLLLoss`` replaces the
            variance by its own ``eps`` without a gradient.
        name: The name in messages and reports.

    Raises:
        FimprobeError: If ``eps`` is not a variance, or 0.

    >>> mean, variance = torch.zeros(4, 3), torch.ones(4, 1)
    >>> HeteroscedasticGaussian().select_outputs((mean, variance)).shape
    torch.Size([4, 3, 2])
    """

    eps: float = 0.0
    name: str = "heteroscedastic_gaussian"
    support = "finite numbers"

    def __post_init__(self) -> None:
        """Check that ε is a finite number from 0."""
        is_number = isinstance(self.eps, Real) and not isinstance(self.eps, bool)
        if not is_number or not 0 <= self.eps < float("inf"):
            raise FimprobeError(
                f"eps must be a finite number from 0, got {self.eps!r}. Pass that of the criterion, "
                "or 0 for any positive variance."
            )

    def select_outputs(self, returned: Any) -> Tensor:
        """Return the natural parameters [B, ..., 2] of the mean and the variance.

        Args:
            returned: What the model or ``output`` returned.

        Raises:
            FimprobeError: If it is not a mean and a variance.
        """
        return natural_parameters(*find_mean_and_variance(returned))

    def check_outputs(self, outputs: Tensor) -> None:
        """Check that the outputs are natural parameters, and that rounding leaves scores correct.

        Args:
            outputs: h [B, ..., 2].

        Raises:
            FimprobeError: For another shape.
            BatchError: If a variance is not positive and finite or below ``eps``, or if a mean is so
                large beside its standard deviation that the outputs' type cannot separate the two.
        """
        if outputs.dim() < 2 or outputs.shape[-1] != 2:
            raise FimprobeError(
                f"outputs must be natural parameters [B, ..., 2] for likelihood={self.name!r}, got "
                f"shape {tuple(outputs.shape)}. Pass output= a function from what the model returns "
                "to the pair (mean, variance)."
            )
        mean, variance = _moments(outputs.detach())
        rounding = torch.finfo(precise(outputs).dtype).eps
        least = self.eps * (1 - 8 * rounding)
        invalid = (variance <= 0) | (variance < least) | variance.isinf()
        if bool(invalid.any()):
            wanted = f"at least eps={self.eps:g} and finite" if self.eps else "positive and finite"
            raise BatchError(
                f"the variance must be {wanted}, got {int(invalid.sum())} of {invalid.numel()} "
                f"others, such as {float(variance[invalid][0]):.3g}. Bound it in the model, as in "
                f"softplus(x) + {self.eps or 1e-6:g}"
                + (": GaussianNLLLoss clamps it at eps without a gradient." if self.eps else ".")
            )
        ratio = mean.abs() / variance.sqrt()
        if bool((2 * rounding * ratio > MAX_CANCELLATION).logical_and(ratio.isfinite()).any()):
            raise BatchError(
                f"the means must lie within {MAX_CANCELLATION / (2 * rounding):.0e} standard "
                f"deviations of 0 for {precise(outputs).dtype}, got {float(ratio.max()):.3g}. Use "
                "float64, or subtract a constant from labels and means, which leaves F as it is."
            )

    def label_shape(self, outputs: Tensor) -> torch.Size:
        """Return the shape of the mean."""
        return outputs.shape[:-1]

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Return m + √v Φ⁻¹(u), float64.

        Args:
            outputs: h [B, ..., 2].
            uniforms: In (0, 1), float64 [B, ...].
        """
        mean, variance = _moments(outputs)
        return mean + variance.sqrt() * torch.special.ndtri(uniforms)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return (y − m, y² − m² − v) [B, ..., 2], in at least float32.

        Args:
            outputs: h [B, ..., 2].
            labels: y [B, ...].
        """
        mean, variance = _moments(outputs)
        residual = labels - mean
        squares = residual.square() + 2 * mean * residual - variance
        return torch.stack([residual, squares], -1).to(precise(outputs).dtype)

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Check that there is one real label for each mean.

        Args:
            outputs: h [B, ..., 2].
            labels: Data labels.

        Raises:
            FimprobeError: If the shape differs, or a label is not possible.
        """
        check_real_labels(self, outputs.shape[:-1], labels, torch.isfinite(labels))

    def data_score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the score at data labels of any real type.

        Args:
            outputs: h [B, ..., 2].
            labels: Data labels [B, ...].
        """
        return self.score(outputs, labels.to(outputs.device, torch.float64))

    def output_fisher(self, outputs: Tensor) -> Tensor:
        """Return I(h) [B, ..., 2, 2]."""
        factor = self._factor(outputs)
        return (factor @ factor.mT).to(precise(outputs).dtype)

    def fisher_factor(self, outputs: Tensor, xi: Tensor) -> Tensor:
        """Return L ξ with the Cholesky factor L = [[√v, 0], [2m√v, √2 v]] of I(h).

        Args:
            outputs: h [B, ..., 2].
            xi: ξ, of the same shape.
        """
        product = self._factor(outputs) @ xi.double().unsqueeze(-1)
        return product.squeeze(-1).to(precise(outputs).dtype)

    def fisher_quadratic(self, outputs: Tensor, vectors: Tensor, mask: Tensor | None) -> Tensor:
        """Return wᵀI(h)w = Σ v(w₁ + 2m w₂)² + 2v²w₂² of every input [B], float64.

        Args:
            outputs: h [B, ..., 2].
            vectors: w, of the same shape.
            mask: Bool, of the labels' shape; False leaves a label out.
        """
        mean, variance = _moments(outputs)
        first, second = vectors.double().unbind(-1)
        at_labels = variance * (first + 2 * mean * second).square()
        at_labels = at_labels + 2 * (variance * second).square()
        at_labels = at_labels.reshape(len(outputs), -1)
        return at_labels.where(position_mask(mask, at_labels), 0).sum(1)

    def norms(self, outputs: Tensor, mask: Tensor | None) -> OutputNorms:
        """Return the exact norms of every input [B], float64.

        Args:
            outputs: h [B, ..., 2].
            mask: Bool, of the labels' shape; False leaves a label out.
        """
        factor = self._factor(outputs).reshape(len(outputs), -1, 2, 2)
        fisher = factor @ factor.mT
        trace = fisher.diagonal(dim1=-2, dim2=-1).sum(-1)
        norm = fisher.square().sum((-2, -1)).sqrt()
        determinant = (factor[..., 0, 0] * factor[..., 1, 1]).square()
        largest = trace / 2 + (trace.square() / 4 - determinant).clamp(min=0).sqrt()
        # vec(δδᵀ) = (L⊗L) vec(uuᵀ)
        pair = torch.einsum("...ac,...bd->...abcd", factor, factor).flatten(-4, -3).flatten(-2, -1)
        moment = pair @ pair.new_tensor(_SQUARES_COVARIANCE) @ pair.mT
        # LAPACK refuses values that are not finite, and small ones keep their digits with a scale
        size = moment.square().sum((-2, -1)).sqrt()
        unit = (moment / size.clamp(min=1e-300)[..., None, None]).nan_to_num(0, 0, 0)
        return combine_positions(
            OutputNorms(
                fisher_norm=norm,
                fisher_trace=trace,
                fisher_max=largest,
                fisher_min=determinant / largest,
                moment_norm=size,
                moment_trace=moment.diagonal(dim1=-2, dim2=-1).sum(-1),
                moment_max=size * torch.linalg.eigvalsh(unit)[..., -1],
            ),
            mask,
        )

    def count_passes(self, outputs: Tensor) -> int:
        """Return five for each label: as many values of a label have the same moments up to g⁴."""
        return len(_RULE) * outputs[0, ..., 0].numel()

    def exact_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Yield five labels for each mean, with the weights of exact moments; each mean is a block.

        Args:
            outputs: h [B, ..., 2].
            mask: Bool, of the labels' shape; False leaves a label out.
        """
        mean, variance = _moments(outputs)
        scores = [self.score(outputs, mean + variance.sqrt() * z) for _, z in _RULE]
        weights = [mean.new_full((len(outputs),), weight) for weight, _ in _RULE]
        yield from _passes(scores, weights, mask, joint=True)

    def hutchinson_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Yield the two columns of the factor of each label, each a block.

        Args:
            outputs: h [B, ..., 2].
            mask: Bool, of the labels' shape; False leaves a label out.
        """
        columns = list(self._factor(outputs).to(precise(outputs).dtype).unbind(-1))
        weights = [torch.ones(len(outputs), dtype=torch.float64, device=outputs.device)] * 2
        yield from _passes(columns, weights, mask, joint=False)

    def _factor(self, outputs: Tensor) -> Tensor:
        """Return the Cholesky factor of I(h), float64 [B, ..., 2, 2]."""
        mean, variance = _moments(outputs)
        root = variance.sqrt()
        entries = [root, torch.zeros_like(root), 2 * mean * root, 2**0.5 * variance]
        return torch.stack(entries, -1).unflatten(-1, (2, 2))


def _moments(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance [B, ...] of natural parameters, float64."""
    first, second = outputs.double().unbind(-1)
    variance = -1 / (2 * second)
    return first * variance, variance


def _passes(
    vectors: list[Tensor], weights: list[Tensor], mask: Tensor | None, *, joint: bool
) -> Iterator[Pass]:
    """Yield vectors of all labels one label after the other, zero elsewhere.

    Args:
        vectors: For each pass of a label, of the outputs' shape [B, ..., 2].
        weights: Of each of these passes [B].
        mask: Bool, of the labels' shape; False leaves a label out.
        joint: Whether the passes of a label form one block, not one each.
    """
    flat = [vector.reshape(len(vector), -1, 2) for vector in vectors]
    keep = position_mask(mask, flat[0][..., 0])
    for label in range(flat[0].shape[1]):
        for i, (vector, weight) in enumerate(zip(flat, weights, strict=True)):
            cotangent = torch.zeros_like(vector)
            cotangent[:, label] = vector[:, label]
            kept = (weight * keep[:, label]).to(vector.dtype)
            yield Pass(
                cotangent=cotangent.view(vectors[0].shape),
                square=kept,
                quartic=kept,
                block=label if joint else label * len(flat) + i,
            )
