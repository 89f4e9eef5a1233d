"""Tangents of any module: of its outputs, and of the gradient of each sample.

Symbols as in :mod:`fimprobe.engines.layers.per_sample`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

from fimprobe.engines.layers.sample_call import (
    OptionalTensors,
    SampleCall,
    Select,
    call_with_parameters,
    scalar_gradients,
    tensors_in,
)
from fimprobe.model.batch import Batch
from fimprobe.model.sample_dimension import Layout
from fimprobe.model.storage_guard import RefusesDataSwaps


@dataclass(kw_only=True)
class CallDirection:
    """A direction in which a module's parameters, its inputs and the cotangents δ move.

    Attributes:
        parameters: How parameters move, by their name inside the module.
        scales: Factors [B] of these, for each sample; 1 for a name that is missing.
        inputs: How each tensor among the arguments moves, batch first; None for one that does not. A
            tensor without a batch moves in the same way for all samples. Empty if none moves.
        cotangents: How δ moves at each output [B, ...]; None where it does not.
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    inputs: OptionalTensors = field(default_factory=list)
    cotangents: OptionalTensors


def per_sample_vjp_tangent(
    module: nn.Module,
    parameters: dict[str, Tensor],
    batch: Batch,
    cotangents: OptionalTensors,
    direction: CallDirection,
    *,
    select: Select | None = None,
    output_layout: Layout = 0,
    vectorize: bool = True,
) -> dict[str, Tensor]:
    """Differentiate each sample's gradient ∂(δᵀz)/∂θ along a direction.

    With φ = δᵀz(θ, x) and the direction (θ̇, ẋ, δ̇), the symmetry of second derivatives gives the
    tangent as ∂/∂θ of ⟨θ̇, ∂φ/∂θ⟩ + ⟨ẋ, ∂φ/∂x⟩ + ⟨δ̇, z⟩. This scalar needs reverse mode only, which
    every module supports.

    Args:
        module: The module.
        parameters: The parameters θ with respect to which φ is differentiated, by their name inside
            the module. Other parameters may move, too.
        batch: Its arguments, and which of them hold the B samples.
        cotangents: δ [B, ...] at each tensor among the outputs; None where there is none.
        direction: How everything moves.
        select: Selects the outputs; all tensors that the module returns by default.
        output_layout: The place of the batch in the module's outputs.
        vectorize: Whether to use ``vmap``.

    Returns:
        Tangents [B, *shape] by name.
    """
    call = SampleCall(module, batch, select, output_layout)
    names = [*direction.parameters, *parameters]
    values = {n: p.detach() for n, p in module.named_parameters() if n in names}
    scalar = _TangentScalar(call, direction, cotangents)
    data = scalar.data(values, batch.size)
    if not vectorize:
        return _loop_over_samples(scalar, list(parameters), values, data, batch.size)
    others = {n: p for n, p in values.items() if n not in parameters}

    def single(params: dict[str, Tensor], sample: _SampleData) -> Tensor:
        """The scalar of one sample, whose gradient at ``params`` is the tangent.

        Args:
            params: The parameters with respect to which φ is differentiated, by name.
            sample: The sample's tensors, without the batch dimension.
        """
        return scalar(params | others, sample, _differentiate_functionally)

    differentiated = {n: values[n] for n in parameters}
    with RefusesDataSwaps():
        result: dict[str, Tensor] = vmap(grad(single), in_dims=(None, 0))(differentiated, data)
    return result


class _SampleData(NamedTuple):
    """The tensors that differ between samples; every one has the batch as its first dimension."""

    moving_inputs: list[Tensor]
    fixed_inputs: list[Tensor]
    cotangents: list[Tensor]
    cotangent_tangents: list[Tensor]
    input_tangents: list[Tensor]
    scales: dict[str, Tensor]


Differentiate = Callable[[Any, dict[str, Tensor], list[Tensor]], tuple[dict[str, Tensor], Any]]
"""Maps φ, parameters and inputs to the derivatives of φ with respect to both."""


class _TangentScalar:
    """⟨θ̇, ∂φ/∂θ⟩ + ⟨ẋ, ∂φ/∂x⟩ + ⟨δ̇, z⟩ of one sample; its gradient at θ is the tangent."""

    def __init__(
        self, call: SampleCall, direction: CallDirection, cotangents: OptionalTensors
    ) -> None:
        self.call, self.direction, self.cotangents = call, direction, cotangents
        tangents = direction.inputs or [None] * len(call.tensors)
        self._input_tangents = dict(zip(call.tensors, tangents, strict=True))
        moving = {i for i, x in self._input_tangents.items() if x is not None}
        self._moving = [i for i in call.batched if i in moving]
        self._fixed = [i for i in call.batched if i not in moving]
        self.shared = [i for i in call.tensors if i in moving and i not in call.batched]
        self._used_outputs = [i for i, d in enumerate(cotangents) if d is not None]

    def data(self, values: dict[str, Tensor], batch_size: int) -> _SampleData:
        """Collect what differs between samples.

        Args:
            values: The parameters that move or are differentiated, by name.
            batch_size: B.

        Returns:
            Tensors [B, ...]; those that concern outputs are of the outputs with a cotangent.
        """
        deltas: list[Any] = [self.cotangents[i] for i in self._used_outputs]
        tangents = [self.direction.cotangents[i] for i in self._used_outputs]
        steps: list[Any] = [self._input_tangents[i] for i in self._moving]
        return _SampleData(
            moving_inputs=[self.call.samples_of(i) for i in self._moving],
            fixed_inputs=[self.call.samples_of(i) for i in self._fixed],
            cotangents=deltas,
            cotangent_tangents=[
                torch.zeros_like(d) if t is None else t for d, t in zip(deltas, tangents, strict=True)
            ],
            input_tangents=steps,
            scales={
                n: self.direction.scales.get(n, torch.ones(batch_size, dtype=values[n].dtype)).to(
                    values[n]
                )
                for n in self.direction.parameters
            },
        )

    def __call__(
        self, parameters: dict[str, Tensor], sample: _SampleData, differentiate: Differentiate
    ) -> Any:
        """The scalar for one sample, as a function of the parameters."""
        # an input without a batch is a leaf of the call; it moves like those of the sample
        inputs = [*sample.moving_inputs, *(self.call.leaves[i] for i in self.shared)]
        steps = [*sample.input_tangents, *(self._input_tangents[i] for i in self.shared)]

        def phi(moved: dict[str, Tensor], moved_inputs: list[Tensor]) -> Any:
            """φ = δᵀz of the sample, a scalar.

            Args:
                moved: The parameters that move, by name.
                moved_inputs: The inputs that move: first the sample's, then those without a batch.
            """
            outputs = self._outputs(parameters | moved, moved_inputs, sample)
            return sum((z * d).sum() for z, d in zip(outputs, sample.cotangents, strict=True))

        outputs = self._outputs(parameters, inputs, sample)
        total: Any = sum(
            (z * t).sum() for z, t in zip(outputs, sample.cotangent_tangents, strict=True)
        )
        directions = self.direction.parameters
        if directions or inputs:
            moved = {n: parameters[n] for n in directions}
            by_parameter, by_input = differentiate(phi, moved, inputs)
            total = total + sum(
                (sample.scales[n] * u * by_parameter[n]).sum() for n, u in directions.items()
            )
            total = total + sum((s * g).sum() for s, g in zip(steps, by_input, strict=True))
        return total

    def _outputs(
        self, parameters: dict[str, Tensor], inputs: list[Tensor], sample: _SampleData
    ) -> list[Tensor]:
        """The outputs with a cotangent, for one sample."""
        count = len(self._moving)
        own = dict(zip(self._moving, inputs[:count], strict=True))
        own |= dict(zip(self._fixed, sample.fixed_inputs, strict=True))
        shared = dict(zip(self.shared, inputs[count:], strict=True))
        outputs = self.call.outputs(parameters, self.call.alone(own) | shared)
        return [self.call.without_batch(outputs[i]) for i in self._used_outputs]


def _loop_over_samples(
    scalar: _TangentScalar,
    names: list[str],
    values: dict[str, Tensor],
    data: _SampleData,
    batch_size: int,
) -> dict[str, Tensor]:
    """Tangents [B, *shape] of the named parameters, one sample after the other.

    ``values`` are all parameters of ``scalar`` by name.
    """
    tangents: dict[str, list[Tensor]] = {name: [] for name in names}
    leaves = scalar.call.leaves
    for b in range(batch_size):
        parameters = {n: p.clone().requires_grad_() for n, p in values.items()}
        sample: _SampleData = tree_map(lambda x: x[b], data)  # noqa: B023
        sample = sample._replace(
            moving_inputs=[x.clone().requires_grad_() for x in sample.moving_inputs]
        )
        for i in scalar.shared:
            leaves[i] = leaves[i].detach().requires_grad_()
        with torch.enable_grad():
            total = scalar(parameters, sample, _differentiate_by_autograd)
        gradients = scalar_gradients(total, [parameters[n] for n in names])
        for name, g in zip(names, gradients, strict=True):
            tangents[name].append(g)
    return {name: torch.stack(gs) for name, gs in tangents.items()}


def _differentiate_functionally(phi: Any, parameters: dict[str, Tensor], inputs: list[Tensor]) -> Any:
    """Derivatives of ``phi`` under ``vmap``."""
    return grad(phi, argnums=(0, 1))(parameters, inputs)


def _differentiate_by_autograd(phi: Any, parameters: dict[str, Tensor], inputs: list[Tensor]) -> Any:
    """Derivatives of ``phi`` with a graph, for modules that ``vmap`` cannot run."""
    points = [*parameters.values(), *inputs]
    gradients = scalar_gradients(phi(parameters, inputs), points, create_graph=True)
    count = len(parameters)
    return dict(zip(parameters, gradients[:count], strict=True)), gradients[count:]


def module_jvp(module: nn.Module, direction: dict[str, Tensor], batch: Batch) -> OptionalTensors:
    """Differentiate a module's outputs along a direction of its parameters.

    Two backward passes on the whole batch; see :func:`fimprobe.engines.primitives.products.jvp`.

    Args:
        module: The module.
        direction: The direction, by the parameters' names inside the module.
        batch: Its arguments.

    Returns:
        The derivative of each tensor among the outputs; None for one that does not depend on the
        parameters.
    """
    inputs = batch.args, batch.kwargs
    args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, inputs)
    with torch.enable_grad():
        moved = {
            n: p.detach().requires_grad_() for n, p in module.named_parameters() if n in direction
        }
        outputs = tensors_in(call_with_parameters(module, moved, args, kwargs))
        dependent = [z for z in outputs if z.requires_grad]
        dummies = [torch.zeros_like(z).requires_grad_() for z in dependent]
        gradients = torch.autograd.grad(
            dependent, list(moved.values()), dummies, create_graph=True, allow_unused=True
        )
        products = [
            (g * direction[n]).sum() for n, g in zip(moved, gradients, strict=True) if g is not None
        ]
        tangents: Any = (None,) * len(dependent)
        if products and any(p.requires_grad for p in products):
            tangents = torch.autograd.grad(torch.stack(products).sum(), dummies, allow_unused=True)
    remaining = iter(tangents)
    return [next(remaining) if z.requires_grad else None for z in outputs]
