"""Per-sample gradients of any module, and their tangents, by re-evaluation on single samples.

``vmap(grad)`` over the samples where the module allows it, a loop where it does not. Symbols: B
samples, S draws, z the module's outputs, δ the cotangents at z, θ its parameters, x its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fimprobe.model.batch import Batch
from fimprobe.model.storage_guard import RefusesDataSwaps

Select = Callable[[Any], list[Tensor]]
OptionalTensors = list[Tensor | None]


class _SampleCall:
    """A module's call with the arguments of one sample.

    Attributes:
        leaves: All arguments, detached.
        tensors: Indices of the tensors among them.
        batched: Indices of the tensors with a batch dimension; the others belong to all samples.
    """

    def __init__(
        self,
        module: nn.Module,
        batch: Batch,
        select: Select | None,
    ) -> None:
        inputs = batch.args, batch.kwargs
        detached = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, inputs)
        self.module = module
        self.leaves, self._structure = tree_flatten(detached)
        self.tensors = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor)]
        self.batched = sorted(batch.batched)
        self._select = select or _tensors_in

    def outputs(self, parameters: dict[str, Tensor], inputs: dict[int, Tensor]) -> list[Tensor]:
        """Evaluate the module with other parameters and other arguments.

        Args:
            parameters: The parameters, by their name inside the module.
            inputs: Replacements of arguments, by their index among ``leaves``.

        Returns:
            The selected tensors among the outputs.
        """
        leaves = list(self.leaves)
        for i, x in inputs.items():
            leaves[i] = x
        args, kwargs = tree_unflatten(leaves, self._structure)
        if all(parameters[n] is p for n, p in self.module.named_parameters() if n in parameters):
            return self._select(self.module(*args, **kwargs))
        return self._select(functional_call(self.module, parameters, args, kwargs))


def per_sample_vjp(
    module: nn.Module,
    parameters: dict[str, Tensor],
    batch: Batch,
    cotangents: OptionalTensors,
    *,
    select: Select | None = None,
    vectorize: bool = True,
) -> dict[str, Tensor]:
    """Pull cotangents at a module's outputs back to its parameters, for each sample.

    Args:
        module: The module.
        parameters: The parameters θ, by their name inside the module.
        batch: Its arguments, and which of them hold the B samples.
        cotangents: δ [B, S, ...] at each tensor among the outputs; None where there is none.
        select: Selects the outputs; all tensors that the module returns by default.
        vectorize: Whether to use ``vmap``.

    Returns:
        Per-sample gradients [B, S, *shape] by name.
    """
    call = _SampleCall(module, batch, select)
    present = [d for d in cotangents if d is not None]

    def scalar(params: dict[str, Tensor], samples: list[Tensor], delta: list[Tensor]) -> Tensor:
        """δᵀz of one sample and one draw, a scalar.

        Args:
            params: The parameters θ by name.
            samples: The sample's part of each argument with a batch, without that dimension.
            delta: δ [...] at each output that has a cotangent.
        """
        inputs = {i: x.unsqueeze(0) for i, x in zip(call.batched, samples, strict=True)}
        outputs = call.outputs(params, inputs)
        used = [z for z, d in zip(outputs, cotangents, strict=True) if d is not None]
        total = sum((z.squeeze(0) * d).sum() for z, d in zip(used, delta, strict=True))
        assert isinstance(total, Tensor)
        return total

    batched = [call.leaves[i] for i in call.batched]
    if vectorize:
        over_draws = vmap(grad(scalar), in_dims=(None, None, 0))
        with RefusesDataSwaps():
            return vmap(over_draws, in_dims=(None, 0, 0))(parameters, batched, present)
    draws = present[0].shape[1]
    # the module's own parameters: views of them, and backward passes that run the module again, see
    # no others
    copies: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if n in parameters}
    gradients: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for b in range(batch.size):
        for s in range(draws):
            with torch.enable_grad():
                value = scalar(copies, [x[b] for x in batched], [d[b, s] for d in present])
            for name, g in zip(copies, _gradients(value, list(copies.values())), strict=True):
                gradients[name].append(g)
    return {name: torch.stack(gs).unflatten(0, (batch.size, draws)) for name, gs in gradients.items()}


@dataclass(kw_only=True)
class CallDirection:
    """A direction in which a module's parameters, its inputs and the cotangents δ move.

    Attributes:
        parameters: How parameters move, by their name inside the module.
        scales: Factors [B] of these, for each sample; 1 for a name that is missing.
        inputs: How each tensor among the arguments moves; None for one that does not. A tensor
            without a batch moves in the same way for all samples. Empty if none moves.
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
        vectorize: Whether to use ``vmap``.

    Returns:
        Tangents [B, *shape] by name.
    """
    call = _SampleCall(module, batch, select)
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
        self, call: _SampleCall, direction: CallDirection, cotangents: OptionalTensors
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
            moving_inputs=[self.call.leaves[i] for i in self._moving],
            fixed_inputs=[self.call.leaves[i] for i in self._fixed],
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
        replaced = {
            i: x if i in self.shared else x.unsqueeze(0)
            for i, x in zip([*self._moving, *self.shared], inputs, strict=True)
        }
        replaced |= {i: x.unsqueeze(0) for i, x in zip(self._fixed, sample.fixed_inputs, strict=True)}
        outputs = self.call.outputs(parameters, replaced)
        return [outputs[i].squeeze(0) for i in self._used_outputs]


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
        gradients = _gradients(total, [parameters[n] for n in names])
        for name, g in zip(names, gradients, strict=True):
            tangents[name].append(g)
    return {name: torch.stack(gs) for name, gs in tangents.items()}


def _differentiate_functionally(phi: Any, parameters: dict[str, Tensor], inputs: list[Tensor]) -> Any:
    """Derivatives of ``phi`` under ``vmap``."""
    return grad(phi, argnums=(0, 1))(parameters, inputs)


def _differentiate_by_autograd(phi: Any, parameters: dict[str, Tensor], inputs: list[Tensor]) -> Any:
    """Derivatives of ``phi`` with a graph, for modules that ``vmap`` cannot run."""
    points = [*parameters.values(), *inputs]
    gradients = _gradients(phi(parameters, inputs), points, create_graph=True)
    count = len(parameters)
    return dict(zip(parameters, gradients[:count], strict=True)), gradients[count:]


def _gradients(value: Any, points: list[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Gradients of a scalar; zeros where it does not depend on a point."""
    gradients: Any = (None,) * len(points)
    if isinstance(value, Tensor) and value.requires_grad:
        gradients = torch.autograd.grad(value, points, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(points, gradients, strict=True)]


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
        outputs = _tensors_in(functional_call(module, moved, args, kwargs))
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


def _tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
