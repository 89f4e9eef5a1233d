"""The joint distribution of the labels of several heads, which are independent given the outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods.base import Likelihood, OutputNorms, Pass
from fimprobe.likelihoods.independent import Independent
from fimprobe.likelihoods.joint_sampler import JointSampler
from fimprobe.likelihoods.output_norms import combine_positions
from fimprobe.likelihoods.size_biased import has_size_biased_draws


@dataclass(frozen=True, kw_only=True)
class Joint:
    """p(y | h) = Π_k p_k(y_k | h_k) of K heads, each with a family of its own.

    Outputs h are those of all heads, each flattened, one after the other: [B, Σ outputs]. Labels and
    masks are joined alike: [B, Σ labels], labels in float64. Every label counts once. A loss that
    weighs the heads belongs to another distribution only if its weights differ from one another.

    Args:
        families: The family of each head. A key is the name of a field or the position of a tensor in
            what the model returns.
        shapes: The shape of each head's outputs without the batch; known once the model was run.

    >>> from fimprobe.likelihoods import Bernoulli, Categorical
    >>> joint = Joint(families={"a": Categorical(), "b": Bernoulli()}).bind([(3,), (2,)])
    >>> joint.name, joint.label_shape(torch.zeros(4, 5))
    ('a: categorical, b: bernoulli', torch.Size([4, 3]))
    """

    families: Mapping[str, Likelihood]
    shapes: tuple[torch.Size, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """The name of each head with that of its family."""
        return ", ".join(f"{head}: {family.name}" for head, family in self.families.items())

    def bind(self, shapes: Sequence[Sequence[int]]) -> Joint:
        """Return the distribution for outputs of known shapes.

        Args:
            shapes: The shape of each head's outputs without the batch.
        """
        return dataclasses.replace(self, shapes=tuple(torch.Size(shape) for shape in shapes))

    def split(self, outputs: Tensor) -> list[tuple[Any, Tensor]]:
        """Return the family of each head with its outputs [B, ...]."""
        sizes = [shape.numel() for shape in self.shapes]
        pieces = outputs.split(sizes, 1)
        return [
            (family, piece.reshape(len(outputs), *shape))
            for family, piece, shape in zip(self.families.values(), pieces, self.shapes, strict=True)
        ]

    def split_labels(self, outputs: Tensor, labels: Tensor) -> list[tuple[Any, Tensor, Tensor]]:
        """Return the family of each head with its outputs and its labels.

        Args:
            outputs: h [B, Σ outputs].
            labels: Labels, uniforms or a mask [B, Σ labels].
        """
        heads = self.split(outputs)
        shapes = [family.label_shape(h) for family, h in heads]
        pieces = labels.split([shape[1:].numel() for shape in shapes], 1)
        return [
            (family, h, piece.reshape(shape))
            for (family, h), shape, piece in zip(heads, shapes, pieces, strict=True)
        ]

    def check_outputs(self, outputs: Tensor) -> None:
        """Check the outputs of every head.

        Raises:
            FimprobeError: With the head whose outputs do not fit its family.
        """
        for head, (family, h) in zip(self.families, self.split(outputs), strict=True):
            try:
                family.check_outputs(h)
            except FimprobeError as error:
                raise FimprobeError(f"head {head!r}: {error}") from None

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Check the joined labels.

        Args:
            outputs: h [B, Σ outputs].
            labels: Data labels.

        Raises:
            FimprobeError: If the shape differs, or with the head whose labels are not possible.
        """
        if labels.shape != self.label_shape(outputs):
            raise FimprobeError(
                f"labels must have the shape {tuple(self.label_shape(outputs))} for the heads "
                f"{self.name}, got {tuple(labels.shape)}. Pass torch.cat of each head's "
                "labels.reshape(B, -1), in the order of the heads."
            )
        for head, (family, h, y) in zip(
            self.families, self.split_labels(outputs, labels), strict=True
        ):
            whole = _in_type_of(family, y)
            if not torch.equal(whole.to(y.dtype), y):
                raise FimprobeError(
                    f"labels of head {head!r} must be whole numbers for likelihood="
                    f"{family.name!r}, got others. Pass class indices."
                )
            try:
                family.check_labels(h, whole)
            except FimprobeError as error:
                raise FimprobeError(f"head {head!r}: {error}") from None

    def label_shape(self, outputs: Tensor) -> torch.Size:
        """Return [B, Σ labels]."""
        sizes = [family.label_shape(h)[1:].numel() for family, h in self.split(outputs)]
        return torch.Size([len(outputs), sum(sizes)])

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Return the labels of every head at the uniforms, float64.

        Args:
            outputs: h [B, Σ outputs].
            uniforms: In (0, 1), float64 [B, Σ labels].
        """
        split = self.split_labels(outputs, uniforms)
        return _join([family.quantile(h, u).double() for family, h, u in split])

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the scores of every head [B, Σ outputs].

        Args:
            outputs: h [B, Σ outputs].
            labels: Labels [B, Σ labels].
        """
        split = self.split_labels(outputs, labels)
        return _join([family.score(h, _in_type_of(family, y)) for family, h, y in split])

    def data_score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the scores at labels of a data set, zero at ignored ones.

        Args:
            outputs: h [B, Σ outputs].
            labels: Data labels [B, Σ labels].
        """
        split = self.split_labels(outputs, labels)
        return _join([family.data_score(h, _in_type_of(family, y)) for family, h, y in split])

    def spread_mask(self, mask: Tensor, outputs: Tensor) -> Tensor:
        """Return a mask of labels as one of outputs.

        Args:
            mask: Bool [B, Σ labels].
            outputs: A tensor [B, Σ outputs].
        """
        split = self.split_labels(outputs, mask)
        return _join(
            [
                (keep if keep.dim() == h.dim() else keep.unsqueeze(family.class_dim)).expand(h.shape)
                for family, h, keep in split
            ]
        )

    def norms(self, outputs: Tensor, mask: Tensor | None) -> OutputNorms:
        """Return the norms of every input [B]: heads are independent, as positions are.

        Args:
            outputs: h [B, Σ outputs].
            mask: Bool [B, Σ labels]; False leaves a label out.
        """
        heads = [family.norms(h, keep) for family, h, keep in self._with_masks(outputs, mask)]
        columns = {
            f.name: torch.stack([getattr(head, f.name) for head in heads], 1)
            for f in dataclasses.fields(OutputNorms)
        }
        labelled = torch.stack(
            [
                torch.ones_like(columns["fisher_norm"][:, 0], dtype=torch.bool)
                if keep is None
                else keep.reshape(len(keep), -1).any(1)
                for _, _, keep in self._with_masks(outputs, mask)
            ],
            1,
        )
        return combine_positions(OutputNorms(**columns), labelled)

    def fisher_factor(self, outputs: Tensor, xi: Tensor) -> Tensor:
        """Return L ξ of every head.

        Args:
            outputs: h [B, Σ outputs].
            xi: ξ, of the same shape.
        """
        pieces = zip(self.split(outputs), self.split(xi), strict=True)
        return _join([family.fisher_factor(h, x) for (family, h), (_, x) in pieces])

    def count_passes(self, outputs: Tensor) -> int:
        """Return the number of passes of all heads."""
        mixed = self._is_mixed
        return sum(
            family.count_passes(h) * (2 if mixed and isinstance(family, Independent) else 1)
            for family, h in self.split(outputs)
        )

    def exact_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Yield the passes of one head after the other; their blocks are different labels.

        A component of variance v and fourth moment m is one pass with weights v and m. Beside heads
        with a pass for each label it becomes a label, too: scores ±√(m/v) with probability v²/m in
        all, else 0, have the same moments.

        Args:
            outputs: h [B, Σ outputs].
            mask: Bool [B, Σ labels]; False leaves a label out.
        """
        mixed = self._is_mixed
        start = block = 0
        for family, h, keep in self._with_masks(outputs, mask):
            passes = family.exact_passes(h, keep)
            if mixed and isinstance(family, Independent):
                passes = _as_labels(passes)
            last = -1
            for p in passes:
                last = p.block
                cotangent = _embed(p.cotangent, outputs, start)
                yield p._replace(cotangent=cotangent, block=block + p.block)
            start, block = start + h[0].numel(), block + last + 1

    def hutchinson_passes(self, outputs: Tensor, mask: Tensor | None) -> Iterator[Pass]:
        """Yield the columns of the factor L of one head after the other, each a block.

        Args:
            outputs: h [B, Σ outputs].
            mask: Bool [B, Σ labels]; False leaves a label out.
        """
        start = block = 0
        for family, h, keep in self._with_masks(outputs, mask):
            for p in family.hutchinson_passes(h, keep):
                yield p._replace(cotangent=_embed(p.cotangent, outputs, start), block=block)
                block += 1
            start += h[0].numel()

    def expected_squared_score(self, outputs: Tensor) -> Tensor | None:
        """Return E‖score‖² of each label, float64 [B, Σ labels]; None where a family has none."""
        expected = []
        for family, h in self.split(outputs):
            of_head = getattr(family, "expected_squared_score", None)
            if of_head is None:
                return None
            expected.append(of_head(h.double()))
        return _join(expected)

    def size_biased_quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Return labels that are each drawn in proportion to their squared score.

        Args:
            outputs: h [B, Σ outputs].
            uniforms: In (0, 1), float64 [B, Σ labels].
        """
        split = self.split_labels(outputs, uniforms)
        return _join([family.size_biased_quantile(h, u).double() for family, h, u in split])

    def has_size_biased_draws(self, outputs: Tensor) -> bool:
        """Return whether all heads have size-biased draws."""
        return all(has_size_biased_draws(family, h) for family, h in self.split(outputs))

    def size_biased_sampler(self, outputs: Tensor, mask: Tensor | None) -> JointSampler:
        """Return the sampler of some outputs.

        Args:
            outputs: h [B, Σ outputs].
            mask: Bool [B, Σ labels]; False leaves a label out.
        """
        return JointSampler(self, outputs, mask)

    def cut_off(self, outputs: Tensor) -> Tensor | None:
        """Return which labels have no size-biased draws [B, Σ labels]; None for none of them."""
        marks = []
        for family, h in self.split(outputs):
            cut_off = getattr(family, "cut_off", None)
            mark = None if cut_off is None else cut_off(h)
            shape, device = family.label_shape(h), h.device
            marks.append(
                torch.zeros(shape, dtype=torch.bool, device=device) if mark is None else mark
            )
        joined = _join(marks)
        return joined if bool(joined.any()) else None

    @property
    def _is_mixed(self) -> bool:
        """Whether families with one pass per component stand beside others."""
        return len({isinstance(family, Independent) for family in self.families.values()}) > 1

    def _with_masks(
        self, outputs: Tensor, mask: Tensor | None
    ) -> list[tuple[Any, Tensor, Tensor | None]]:
        """Return the family of each head with its outputs and its mask."""
        if mask is None:
            return [(family, h, None) for family, h in self.split(outputs)]
        return list(self.split_labels(outputs, mask))


def _join(pieces: Sequence[Tensor]) -> Tensor:
    """Return tensors [B, ...] flattened and side by side."""
    return torch.cat([piece.reshape(len(piece), -1) for piece in pieces], 1)


def _in_type_of(family: Any, labels: Tensor) -> Tensor:
    """Return labels as the family reads them: class indices are whole numbers."""
    return labels.long() if hasattr(family, "class_dim") else labels


def _embed(cotangent: Tensor, outputs: Tensor, start: int) -> Tensor:
    """Return a vector at one head's outputs as one at all outputs, zero elsewhere."""
    flat = cotangent.reshape(len(cotangent), -1)
    embedded = flat.new_zeros(outputs.shape)
    embedded[:, start : start + flat.shape[1]] = flat
    return embedded


def _as_labels(passes: Iterator[Pass]) -> Iterator[Pass]:
    """Turn each pass of variance v and fourth moment m into the two labels of a block."""
    for p in passes:
        occurs = p.square > 0
        quartic = p.quartic.where(occurs, 1)
        share = torch.where(occurs, p.square.square() / quartic, 0)
        size = torch.where(occurs, (quartic / p.square.where(occurs, 1)).sqrt(), 1)
        scaled = p.cotangent * size.to(p.cotangent.dtype).view(-1, *[1] * (p.cotangent.dim() - 1))
        yield p._replace(cotangent=scaled, square=share, quartic=share)
        rest = 1 - share
        yield p._replace(cotangent=torch.zeros_like(p.cotangent), square=rest, quartic=rest)
