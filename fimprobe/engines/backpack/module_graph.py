"""Which modules' outputs add up to the input of each module, read from the autograd graph.

BackPACK passes curvature from a module to the one whose output it received. Sums between modules,
such as residual connections, pass it on to every summand, since they are linear with slope one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fimprobe.errors import FimprobeError


@dataclass(kw_only=True)
class ModuleGraph:
    """The sources of the inputs of modules in one forward pass.

    Attributes:
        sources: For each module that was called, the modules whose outputs add up to its input, one
            of them several times if it counts several times. Empty for an input without gradient,
            None where another operation lies between.
        producers: The node at which each module's output begins.
        sizes: For each module, the first dimensions of its inputs and outputs.
    """

    sources: dict[nn.Module, list[nn.Module] | None] = field(default_factory=dict)
    producers: dict[Any, nn.Module] = field(default_factory=dict)
    sizes: dict[nn.Module, list[int]] = field(default_factory=dict)

    def sources_of(self, x: Tensor) -> list[nn.Module] | None:
        """Return the modules whose outputs add up to a tensor, as in ``sources``."""
        return [] if x.grad_fn is None else self._sources_at(x.grad_fn)

    def _sources_at(self, node: Any) -> list[nn.Module] | None:
        if node in self.producers:
            return [self.producers[node]]
        if node.name().endswith("BackwardHookFunctionBackward"):  # around a module with hooks
            return self._sources_at(node.next_functions[0][0])
        if node.name() != "AddBackward0" or node._saved_alpha != 1:
            return None
        found: list[nn.Module] = []
        for summand, number in node.next_functions:
            if summand is None:  # a constant
                continue
            broadcast = summand._input_metadata[number].shape != node._input_metadata[0].shape
            below = None if broadcast else self._sources_at(summand)
            if below is None:
                return None
            found += below
        return found

    def _note_call(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Note a call; return the output as a tensor of its own, a forward hook.

        Identity and dropout in eval mode return their input, whose node is that of another module.
        """
        if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            self.sources[module] = None
            return None
        self.sources[module] = self.sources_of(inputs[0])
        self.sizes.setdefault(module, []).extend(
            len(x) if x.dim() else 0 for x in (inputs[0], output)
        )
        if output.grad_fn is None:
            return None
        alias = output.view_as(output)
        self.producers[alias.grad_fn] = module
        return alias

    def check(self, outputs: Tensor) -> None:
        """Check that nothing differs from when the model was found to be inside of the domain.

        Args:
            outputs: The outputs of all samples that ran.

        Raises:
            FimprobeError: If a module was called twice, on something else than the samples, or behind
                an operation that is no sum.
        """
        size = len(outputs)
        outside = [
            type(module).__name__
            for module, sources in self.sources.items()
            if sources is None or self.sizes.get(module) != [size, size]
        ]
        if outside or self.sources_of(outputs) is None:
            raise FimprobeError(
                f"{', '.join(outside) or 'the last module'} was called more than once, on something "
                f"else than the {size} samples, or next to an operation that is no module, unlike "
                "when the model was checked. Pass second_order={'probes': 2}."
            )


@contextmanager
def recorded(modules: list[nn.Module]) -> Iterator[ModuleGraph]:
    """Record the calls of some modules inside the context."""
    graph = ModuleGraph()
    handles = [m.register_forward_hook(graph._note_call) for m in modules]
    try:
        yield graph
    finally:
        for handle in handles:
            handle.remove()
