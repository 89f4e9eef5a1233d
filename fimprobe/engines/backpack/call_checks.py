"""Module calls in one forward pass that are outside of the verified domain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.engines.backpack.module_graph import ModuleGraph, recorded
from fimprobe.engines.backpack.module_options import module_reason
from fimprobe.engines.problem.problem import Problem
from fimprobe.errors import BatchError


@dataclass
class _Call:
    """One call of a module, as its forward hook saw it."""

    path: str
    module: nn.Module
    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Any
    node: Any
    version: int


def check_calls(
    problem: Problem, rows: Tensor, modules: dict[str, nn.Module], chain: bool
) -> dict[str, str]:
    """The modules that one forward pass shows to be outside of the domain, with reasons.

    Args:
        problem: The model and a batch.
        rows: Indices of the samples to run.
        modules: The modules to check, by path.
        chain: Whether nothing but sums may lie between them, as the second order requires.

    Returns:
        Path -> reason; the path "" is the model as a whole.
    """
    calls: list[_Call] = []
    try:
        with recorded(list(modules.values()) if chain else []) as graph:
            h = _forward(problem, rows, modules, calls)
    except BatchError:
        raise
    except Exception as error:  # the model's own code raises anything
        return {"": f"its forward fails on {len(rows)} samples: {error}"}
    reasons: dict[str, str] = {}
    uses, nodes = _leaf_uses(h)
    for path, module in modules.items():
        own_calls = [call for call in calls if call.path == path]
        parameters = [p for p in module._parameters.values() if p is not None and p.requires_grad]
        count = max((uses.get(id(p), 0) for p in parameters), default=0)
        if not count and not (chain and own_calls):
            continue  # the outputs do not depend on it
        reason: str | None
        if len(own_calls) != 1:
            reason = f"called {len(own_calls)} times in a forward pass, not once"
        elif count > 1 or (count and own_calls[0].node not in nodes):
            reason = "a parameter is used outside of its forward"
        else:
            reason = module_reason(module, second_order=chain)
            reason = reason or _call_reason(module, own_calls[0], len(rows))
        if reason is not None:
            reasons[path] = reason
    if chain:
        reasons = _chain_reasons(problem, rows, calls, h, graph) | reasons
    return reasons


def _forward(
    problem: Problem, rows: Tensor, modules: dict[str, nn.Module], calls: list[_Call]
) -> Tensor:
    """Run the samples ``rows``; append the modules' calls to ``calls`` and return the outputs."""

    def record(path: str, module: Any, inputs: Any, keywords: Any, output: Any) -> None:
        """Append one call to ``calls``; a forward hook.

        Args:
            path: The module's path.
            module: The module that was called.
            inputs: Its positional arguments.
            keywords: Its keyword arguments.
            output: What it returned.
        """
        tensor = isinstance(output, Tensor)
        node, version = (output.grad_fn, output._version) if tensor else (None, 0)
        calls.append(_Call(path, module, inputs, keywords, output, node, version))

    handles = [
        m.register_forward_hook(partial(record, p), with_kwargs=True) for p, m in modules.items()
    ]
    try:
        return problem.forward(problem.batch[rows])
    finally:
        for handle in handles:
            handle.remove()


def _call_reason(module: nn.Module, call: _Call, size: int) -> str | None:
    """Why a call with ``size`` samples is outside of the domain; None inside."""
    if call.keywords or len(call.inputs) != 1 or not isinstance(call.inputs[0], Tensor):
        return "called on something else than one tensor"
    if not isinstance(call.output, Tensor):
        return "gives something else than one tensor"
    x, y = call.inputs[0], call.output
    if not x.dim() or not y.dim() or x.shape[0] != size or y.shape[0] != size:
        return f"{tuple(x.shape)} -> {tuple(y.shape)} does not have the {size} samples first"
    if y._version != call.version:
        return "its output is modified in place"
    spatial = next((n for n in (1, 2, 3) if type(module).__name__.endswith(f"{n}d")), None)
    if spatial is not None and x.dim() != spatial + 2 and type(module) is not nn.BatchNorm1d:
        return f"called on {x.dim()} dimensions"
    if type(module).__name__.startswith("AdaptiveAvgPool") and any(
        a % b for a, b in zip(x.shape[2:], y.shape[2:], strict=True)
    ):
        return f"pools {tuple(x.shape[2:])} to {tuple(y.shape[2:])}, no divisor"
    return None


def _chain_reasons(
    problem: Problem, rows: Tensor, calls: list[_Call], h: Tensor, graph: ModuleGraph
) -> dict[str, str]:
    """The modules whose input is neither that of the model nor a sum of modules' outputs.

    Args:
        problem: The model and a batch.
        rows: Indices of the samples that ran.
        calls: All calls of modules, in their order.
        h: The outputs.
        graph: The sources of the modules' inputs.

    Returns:
        Path -> reason; the path "" is the model as a whole.
    """
    batch = problem.batch[rows]
    inputs = [*batch.args, *batch.kwargs.values()]
    reasons = {}
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        reasons[""] = "the inputs are not one tensor"
    constants: set[int] = set()  # outputs without a gradient
    for call in calls:
        x = call.inputs[0] if call.inputs else None
        if not isinstance(x, Tensor):
            follows = bool(reasons)
        elif x.grad_fn is None:
            # the model received another slice of the batch, with the same numbers
            of_model = bool(reasons) or (x.shape == inputs[0].shape and torch.equal(x, inputs[0]))
            follows = of_model or id(x) in constants
        else:
            follows = graph.sources[call.module] is not None
        if not follows:
            reasons[call.path] = (
                "its input is not the output of another module, nor a sum of such outputs (a "
                "functional operation lies between)"
            )
        constants.add(id(call.output))
    if graph.sources_of(h) is None:
        reasons.setdefault("", "the outputs are not the output of a module, nor a sum of such")
    return reasons


def _leaf_uses(h: Tensor) -> tuple[dict[int, int], set[Any]]:
    """How many edges of the graph of ``h`` end in each leaf tensor, by id, and all its nodes."""
    counts: dict[int, int] = {}
    nodes: set[Any] = set()
    stack = [h.grad_fn] if h.grad_fn is not None else []
    nodes.update(stack)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            variable = getattr(node, "variable", None)
            if variable is not None:
                counts[id(variable)] = counts.get(id(variable), 0) + 1
            if node not in nodes:
                nodes.add(node)
                stack.append(node)
    return counts, nodes
