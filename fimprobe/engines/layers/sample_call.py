"""A module's call, evaluated again with the arguments of one sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fimprobe.model.batch import Batch
from fimprobe.model.batch_of_one import correct_gradient_of_one
from fimprobe.model.leftovers import drop_leftovers
from fimprobe.model.sample_dimension import Layout, batch_first
from fimprobe.model.twin import is_transformed

Select = Callable[[Any], list[Tensor]]
OptionalTensors = list[Tensor | None]


class SampleCall:
    """A module's call with the arguments of one sample.

    Args:
        module: The module.
        batch: Its arguments, and which of them hold the samples.
        select: Selects the outputs; all tensors that the module returns by default.
        output_layout: The place of the batch in the module's outputs.

    Attributes:
        leaves: All arguments, detached.
        tensors: Indices of the tensors among them.
        batched: Indices of the tensors that hold the batch; the others belong to all samples.
    """

    def __init__(
        self,
        module: nn.Module,
        batch: Batch,
        select: Select | None,
        output_layout: Layout = 0,
    ) -> None:
        inputs = batch.args, batch.kwargs
        detached = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, inputs)
        self.module = module
        self.leaves, self._structure = tree_flatten(detached)
        self.tensors = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor)]
        self.batched = sorted(batch.batched)
        self._batch, self._output_layout = batch, output_layout
        self._select = select or tensors_in

    def samples_of(self, index: int) -> Tensor:
        """A leaf with a batch [B, ...], whose first dimension counts the samples."""
        return batch_first(self.leaves[index], self._batch.batched[index], self._batch.size)

    def alone(self, samples: dict[int, Tensor]) -> dict[int, Tensor]:
        """The parts of one sample as the module sees a batch of one.

        Args:
            samples: Rows of :meth:`samples_of` by the index of the leaf.
        """
        return {i: _with_batch(x, self._batch.batched[i]) for i, x in samples.items()}

    def without_batch(self, z: Tensor) -> Tensor:
        """An output for one sample without its batch dimension."""
        layout = self._output_layout
        return z.squeeze(layout) if isinstance(layout, int) else z

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
            drop_leftovers(self.module.modules())
            out = self._select(self.module(*args, **kwargs))
        else:
            out = self._select(call_with_parameters(self.module, parameters, args, kwargs))
        if not is_transformed():
            correct_gradient_of_one(out)
        return out


def call_with_parameters(
    module: nn.Module, parameters: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a module with other parameters, tied ones included.

    ``functional_call`` swaps a tied parameter under each of its names. Where two names are one place,
    since a module has two paths, it does not put the parameter back (torch 2.13).

    Args:
        module: The module.
        parameters: The parameters by their name inside the module.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        What the module returns.
    """
    named = dict(module.named_parameters())
    by_id = {id(named[name]): value for name, value in parameters.items()}
    everywhere = {
        f"{path}.{local}" if path else local: by_id[id(p)]
        for path, part in module.named_modules()  # each module once
        for local, p in part._parameters.items()
        if id(p) in by_id
    }
    drop_leftovers(module.modules())
    return functional_call(module, everywhere, args, kwargs, tie_weights=False)


def scalar_gradients(value: Any, points: list[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Return the gradients of a scalar; zeros where it does not depend on a point.

    Args:
        value: The scalar.
        points: Tensors to differentiate it at.
        create_graph: Whether the gradients have a graph.
    """
    gradients: Any = (None,) * len(points)
    if isinstance(value, Tensor) and value.requires_grad:
        gradients = torch.autograd.grad(value, points, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(points, gradients, strict=True)]


def _with_batch(x: Tensor, layout: Layout) -> Tensor:
    """One sample's part as a batch of one; a folded part has its k rows already."""
    return x.unsqueeze(layout) if isinstance(layout, int) else x


def tensors_in(tree: Any) -> list[Tensor]:
    """Return all tensors in nested containers."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
