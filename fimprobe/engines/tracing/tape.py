"""The record of one forward pass: which parameter was used on which input, and the edges between.

An edge is a tensor's place in the autograd graph, as :func:`torch.autograd.grad` accepts it. Output
edges are where the cotangents δ of recorded calls are computed; input edges are where the gradients
with respect to their inputs are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from fimprobe.engines.layers.layer_call import LayerCall
from fimprobe.engines.layers.rules import GradientRule, parameter_jvp
from fimprobe.engines.tracing.batch_layout import BatchLayouts
from fimprobe.errors import FimprobeError
from fimprobe.model.batch import Batch
from fimprobe.model.sample_dimension import Layout, batch_first, has_batch


@dataclass(frozen=True, kw_only=True)
class ParameterUse:
    """One use of a parameter under a rule.

    Attributes:
        rule: How its per-sample gradient is computed.
        call: The recorded call, batch first.
        edge: Index of the output edge.
        layout: The place of the batch in the output.
        rows: The rows that the use has of a packed parameter; None for all.
        input_edges: Index of the input edge of each input (of each time step with ``per_step``);
            None where an input depends on no parameter. For second derivatives.
        output_tangent: Maps a direction of the parameter to the derivative of the output along it.
            For second derivatives.
        per_step: Whether the use belongs to a recurrent layer and occurs in every time step.
    """

    rule: GradientRule
    call: LayerCall
    edge: int
    layout: int | str
    rows: slice | None = None
    input_edges: Sequence[int | None] = ()
    output_tangent: Callable[[Tensor], Tensor] | None = None
    per_step: bool = False


@dataclass(frozen=True, kw_only=True)
class FallbackCall:
    """One call of a module that is re-evaluated for single samples, because no rule covers it.

    Attributes:
        path: The module's path; "" for the whole model.
        module: The module.
        inputs: Its arguments, and which of them hold the batch.
        output_layout: The place of the batch in the outputs with an edge.
        output_edges: Index of the output edge of each tensor among the outputs; None where no
            cotangent arrives.
        input_edges: Index of the input edge of each tensor among the inputs.
    """

    path: str
    module: nn.Module
    inputs: Batch
    output_layout: Layout = 0
    output_edges: tuple[int | None, ...] = ()
    input_edges: tuple[int | None, ...] = ()

    @property
    def input_layouts(self) -> list[Layout | None]:
        """For each tensor among the inputs, the place of the batch; None where there is none."""
        leaves = tree_leaves((self.inputs.args, self.inputs.kwargs))
        return [self.inputs.batched.get(i) for i, x in enumerate(leaves) if isinstance(x, Tensor)]


class Tape:
    """The record of a forward pass, filled by :func:`record_forward`.

    Attributes:
        batch_size: Number of samples.
        layouts: The place of the batch at each module.
        uses: Uses under a rule, by the parameter's id.
        fallback_calls: Calls of modules without rules.
        output_edges: Edges at which cotangents of recorded calls are computed.
        edge_layouts: The place of the batch at each output edge.
        input_edges: Edges of the calls' inputs.
        activations: For each layer, the index of its input's edge, and the layout.
        versions: Recorded inputs, with their version counter and the layer's path.
        stops: Nodes of the calls' outputs, with the nodes of the calls' inputs: a walk over the
            graph jumps over recorded calls.
        separated: Nodes of outputs that were replaced by copies, with the path of their module.
        failures: Why calls could not be recorded, by module path.
    """

    def __init__(self, batch_size: int, layouts: BatchLayouts) -> None:
        self.batch_size = batch_size
        self.layouts = layouts
        self.uses: dict[int, list[ParameterUse]] = {}
        self.fallback_calls: list[FallbackCall] = []
        self.output_edges: list[Any] = []
        self.edge_layouts: list[int | str] = []
        self.input_edges: list[Any] = []
        self._input_index: dict[Any, int] = {}
        self.activations: dict[str, tuple[int, int | str]] = {}
        self.versions: list[tuple[Tensor, int, str]] = []
        self.stops: dict[Any, list[Any]] = {}
        self.separated: dict[Any, str] = {}
        self.failures: dict[str, str] = {}

    def add_output_edge(self, output: Tensor, layout: int | str = 0) -> int:
        """Register a call's output, whose cotangent will be computed.

        Args:
            output: The output.
            layout: The place of the batch in it.

        Returns:
            The index in ``output_edges``.
        """
        self.output_edges.append(output if output.is_leaf else get_gradient_edge(output))
        self.edge_layouts.append(layout)
        return len(self.output_edges) - 1

    def add_input_edge(self, x: Tensor) -> int | None:
        """Register a call's input, once; returns its index, None for a constant."""
        if not x.requires_grad:
            return None
        edge: Any = x if x.is_leaf else get_gradient_edge(x)
        key = id(x) if x.is_leaf else (edge.node, edge.output_nr)
        if key not in self._input_index:
            self._input_index[key] = len(self.input_edges)
            self.input_edges.append(edge)
        return self._input_index[key]

    def stop_at(self, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        """Let a walk over the graph jump from a call's outputs to its inputs.

        Args:
            outputs: The outputs of the call.
            inputs: The tensors among its inputs; those without a graph are left out.
        """
        nodes = [x.grad_fn for x in inputs if x.grad_fn is not None]
        for output in outputs:
            self.stops[output.grad_fn] = nodes

    def add_rule_call(
        self,
        path: str,
        module: nn.Module,
        rules: dict[str, GradientRule],
        args: tuple[Any, ...],
        out: Tensor,
    ) -> None:
        """Record a call of a layer with rules.

        Args:
            path: The layer's path.
            module: The layer.
            rules: Its rules by parameter name.
            args: The inputs that its rules read; None for one that was not passed.
            out: Its output.
        """
        inputs = [x for x in args if isinstance(x, Tensor)]
        if isinstance(module, nn.EmbeddingBag) and (
            (len(args) > 1 and args[1] is not None) or inputs[0].dim() != 2
        ):
            self.failures[path] = "bags given by offsets"
            return
        layout = self.layouts.layout(path, [*inputs, out], self.batch_size)
        if layout is None:
            self.failures[path] = f"no batch dimension in its input {tuple(inputs[0].shape)}"
            return
        batched = tuple(batch_first(x.detach(), layout, self.batch_size) for x in inputs)
        call = LayerCall(module, batched, layout == "folded")
        edge = self.add_output_edge(out, layout)
        input_edges = [self.add_input_edge(x) for x in inputs]
        if input_edges[0] is not None:
            self.activations.setdefault(path, (input_edges[0], layout))
        self.versions += [(x, x._version, path) for x in inputs if not x.is_inference()]
        for name, rule in rules.items():
            parameter = module._parameters.get(name)
            if parameter is not None and parameter.requires_grad:
                use = ParameterUse(
                    rule=rule,
                    call=call,
                    edge=edge,
                    layout=layout,
                    input_edges=input_edges,
                    output_tangent=functools.partial(
                        parameter_jvp, rule, module, name, args, out.shape
                    ),
                )
                self.uses.setdefault(id(parameter), []).append(use)
        self.stop_at([out], inputs)

    def add_fallback_call(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """Record a call of a module that is re-evaluated for single samples.

        Args:
            path: The module's path.
            module: The module.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            out: What it returned; outputs that are also inputs have no edge.
        """
        arguments = tree_leaves((args, kwargs))
        inputs = [x for x in arguments if isinstance(x, Tensor)]
        input_nodes = {x.grad_fn for x in inputs if x.grad_fn is not None}
        leaves = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        computed = [
            x.requires_grad and not x.is_leaf and x.grad_fn not in input_nodes for x in leaves
        ]
        outputs = [x for x, is_computed in zip(leaves, computed, strict=True) if is_computed]
        if not outputs:
            return
        located = self.layouts.batched_arguments(path, arguments, self.batch_size)
        if located is None or not all(has_batch(x, located[1], self.batch_size) for x in outputs):
            self.failures[path] = "no batch dimension at its inputs and outputs"
            return
        batched, layout = located
        output_edges = tuple(
            self.add_output_edge(x, layout) if is_computed else None
            for x, is_computed in zip(leaves, computed, strict=True)
        )
        call = FallbackCall(
            path=path,
            module=module,
            inputs=Batch(args, kwargs, self.batch_size, batched),
            output_layout=layout,
            output_edges=output_edges,
            input_edges=tuple(self.add_input_edge(x) for x in inputs),
        )
        self.fallback_calls.append(call)
        self.stop_at(outputs, inputs)


def check_inputs_unchanged(tape: Tape) -> None:
    """Raise if a recorded input was overwritten after its layer read it.

    The gradient of the layer's weight would be computed from the wrong input.
    """
    for x, version, path in tape.versions:
        if x._version != version:
            raise FimprobeError(
                f"the input of layer {path!r} must not change after the layer reads it, but an "
                "in-place operation changed it. Use the out-of-place operation there."
            )
