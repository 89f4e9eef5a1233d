"""Fourth powers of the patches that a convolution reads, for proposals."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fimprobe.engines.layers.layer_call import LayerCall


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution of one group, not transposed, with zeros as padding."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return False
    plain = module.groups == 1 and not isinstance(module.padding, str)
    return plain and module.padding_mode == "zeros"


def fourth_powers_of_patches(call: LayerCall) -> tuple[Tensor, int]:
    """Return Σ_t x⁴ of what each weight of a unit is multiplied with, and the number of positions t.

    Args:
        call: A call of a plain convolution, with the input [B, C, ...], folded [B, k, C, ...].

    Returns:
        The sums [B, C · kernel size], float64 on the CPU, and the positions.
    """
    module: Any = call.module
    x = call.inputs[0]
    folds = x.shape[1] if call.folded else 1
    x = x.flatten(0, 1) if call.folded else x
    padding = [side for p in reversed(module.padding) for side in (p, p)]
    patches = F.pad(x.square().square_(), padding)
    count = len(module.kernel_size)
    for d in range(count):
        reach = (module.kernel_size[d] - 1) * module.dilation[d] + 1
        patches = patches.unfold(2 + d, reach, module.stride[d])[..., :: module.dilation[d]]
    positions = patches.shape[2 : 2 + count].numel()
    sums = patches.sum(tuple(range(2, 2 + count))).flatten(1)
    return sums.view(-1, folds, sums.shape[1]).sum(1).double().cpu(), positions * folds
