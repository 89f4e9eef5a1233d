"""The place of a convolution's kernel on its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvGeometry:
    """Sizes and options of a convolution, one number for each spatial dimension.

    At tap τ output m reads input s m + d τ − p, with stride s, dilation d and padding p.
    """

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(
        cls,
        size: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> ConvGeometry:
        """The geometry, with options of one number repeated for every dimension.

        torch keeps (0,) for the padding "valid".

        Args:
            size: Spatial size of the input.
            kernel: Size of the kernel.
            stride: The convolution's option, like the following two.
            padding: See ``stride``.
            dilation: See ``stride``.
        """
        options = (stride, padding, dilation)
        full = (tuple(o) * len(size) if len(o) == 1 else tuple(o) for o in options)
        return cls(tuple(size), tuple(kernel), *full)

    @property
    def reach(self) -> list[int]:
        """Inputs from the first tap to the last."""
        return [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]

    @property
    def out_size(self) -> list[int]:
        """Spatial size of the output."""
        return [
            (n + 2 * p - r) // s + 1
            for n, p, r, s in zip(self.size, self.padding, self.reach, self.stride, strict=True)
        ]

    @property
    def output_padding(self) -> list[int]:
        """Inputs at the end that no output reads: ``output_padding`` of the adjoint."""
        return [
            n - ((m - 1) * s - 2 * p + r)
            for n, m, p, r, s in zip(
                self.size, self.out_size, self.padding, self.reach, self.stride, strict=True
            )
        ]

    def counts(self) -> tuple[list[Tensor], list[Tensor]]:
        """How often taps and inputs are used, in each dimension.

        Returns:
            For each dimension, the outputs at which each tap [k] reads an input and not the padding;
            and the outputs that read each input [n].
        """
        taps, inputs = [], []
        for n, m, k, s, p, d in zip(
            self.size,
            self.out_size,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        ):
            read = s * torch.arange(m) + d * torch.arange(k)[:, None] - p
            inside = (read >= 0) & (read < n)
            taps.append(inside.sum(1).double())
            inputs.append(torch.bincount(read[inside], minlength=n).double())
        return taps, inputs


def weighted(x: Tensor, counts: list[Tensor]) -> Tensor:
    """Multiply a tensor by a count for each index of its last dimensions.

    Args:
        x: A tensor [..., n₁, n₂, ...].
        counts: A count [n] for each index of each of the last dimensions, in their order.

    Returns:
        The product, of the shape of ``x``.
    """
    for dim, count in enumerate(reversed(counts)):
        x = x * count.to(x.device).view(-1, *[1] * dim)
    return x
