"""Per-sample gradients of any module, by re-evaluation on single samples.

``vmap(grad)`` over the samples where the module allows it, a loop where it does not. Symbols: B
samples, S draws, z the module's outputs, δ the cotangents at z, θ its parameters, x its inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from fimprobe.engines.layers.sample_call import (
    OptionalTensors,
    SampleCall,
    Select,
    scalar_gradients,
)
from fimprobe.model.batch import Batch
from fimprobe.model.sample_dimension import Layout
from fimprobe.model.storage_guard import RefusesDataSwaps


def per_sample_vjp(
    module: nn.Module,
    parameters: dict[str, Tensor],
    batch: Batch,
    cotangents: OptionalTensors,
    *,
    select: Select | None = None,
    output_layout: Layout = 0,
    vectorize: bool = True,
) -> dict[str, Tensor]:
    """Pull cotangents at a module's outputs back to its parameters, for each sample.

    Args:
        module: The module.
        parameters: The parameters θ, by their name inside the module.
        batch: Its arguments, and which of them hold the B samples.
        cotangents: δ [B, S, ...] at each tensor among the outputs; None where there is none.
        select: Selects the outputs; all tensors that the module returns by default.
        output_layout: The place of the batch in the module's outputs.
        vectorize: Whether to use ``vmap``.

    Returns:
        Per-sample gradients [B, S, *shape] by name.
    """
    call = SampleCall(module, batch, select, output_layout)
    present = [d for d in cotangents if d is not None]

    def scalar(params: dict[str, Tensor], samples: list[Tensor], delta: list[Tensor]) -> Tensor:
        """δᵀz of one sample and one draw, a scalar.

        Args:
            params: The parameters θ by name.
            samples: The sample's part of each argument with a batch, without that dimension.
            delta: δ [...] at each output that has a cotangent.
        """
        inputs = call.alone(dict(zip(call.batched, samples, strict=True)))
        outputs = call.outputs(params, inputs)
        used = [z for z, d in zip(outputs, cotangents, strict=True) if d is not None]
        total = sum((call.without_batch(z) * d).sum() for z, d in zip(used, delta, strict=True))
        assert isinstance(total, Tensor)
        return total

    batched = [call.samples_of(i) for i in call.batched]
    if vectorize:
        over_draws = vmap(grad(scalar), in_dims=(None, None, 0))
        with RefusesDataSwaps():
            vectorized = vmap(over_draws, in_dims=(None, 0, 0))(parameters, batched, present)
        for name, g in vectorized.items():
            # behind nn.PReLU there is another dimension of samples in place of the draws (torch 2.13)
            if g.shape != (batch.size, present[0].shape[1], *parameters[name].shape):
                raise RuntimeError(f"vmap gave gradients of the shape {tuple(g.shape)} for {name}")
        return vectorized
    draws = present[0].shape[1]
    # the module's own parameters: views of them, and backward passes that run the module again, see
    # no others
    copies: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if n in parameters}
    gradients: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for b in range(batch.size):
        for s in range(draws):
            with torch.enable_grad():
                value = scalar(copies, [x[b] for x in batched], [d[b, s] for d in present])
            for name, g in zip(copies, scalar_gradients(value, list(copies.values())), strict=True):
                gradients[name].append(g)
    return {name: torch.stack(gs).unflatten(0, (batch.size, draws)) for name, gs in gradients.items()}
