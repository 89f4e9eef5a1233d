"""Random directions of the parameters, and how they move the outputs of recorded calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fimprobe.engines.layers.module_tangents import module_jvp
from fimprobe.engines.primitives.random_signs import rademacher, random_direction
from fimprobe.engines.tracing.batch_layout import broadcast_over_batch
from fimprobe.engines.tracing.chunk import Chunk
from fimprobe.engines.tracing.parameter_uses import ParameterUses
from fimprobe.model.sample_dimension import batch_first, from_batch_first

OptionalTensors = list[Tensor | None]


@dataclass(frozen=True, kw_only=True)
class ParameterDirection:
    """A random direction u of all parameters, and sign flips σ that isolate one of them.

    E ⟨(R u)_θ, (R σu)_θ⟩ over u is Σ_θ' σ_θ' ‖R_θθ'‖². Multiplied by σ_θ, its mean over σ is the
    block ‖R_θθ‖²: the flips of the other parameters are independent with mean zero.

    Attributes:
        values: u of each parameter, ±1, of the parameter's shape.
        flips: σ of each parameter for each sample [B].
    """

    values: dict[str, Tensor]
    flips: dict[str, Tensor]


def draw_direction(
    chunk: Chunk, uses: dict[str, ParameterUses], number: int, *, interacting: bool
) -> ParameterDirection:
    """Draw a direction; it is the same for all chunks and processes, the flips differ by sample.

    Args:
        chunk: The recorded forward pass.
        uses: Uses of each parameter.
        number: Number of the direction.
        interacting: Whether any parameter has interacting uses. Then a direction also moves the
            fallback parameters in the pass over the whole batch, so that they have one flip for all
            samples.
    """
    problem, h = chunk.problem, chunk.outputs
    seed, first = problem.draws.seed, problem.draws.first + chunk.rows.start
    values = {
        n: random_direction(p, f"direction {number} {n}", seed) for n, p in problem.parameters.items()
    }
    flips = {}
    for n in values:
        key = f"flip {number} {n}"
        if uses[n].fallback_calls and interacting:
            flip = rademacher((1,), key, seed, dtype=h.dtype, device=h.device)
            flips[n] = flip.expand(chunk.size)
        else:
            flips[n] = rademacher(
                (chunk.size,), key, seed, first=first, dtype=h.dtype, device=h.device
            )
    return ParameterDirection(values=values, flips=flips)


def random_edge_direction(chunk: Chunk, edge: int, like: Tensor, key: str) -> Tensor:
    """Draw independent signs of the shape of the cotangent at an output edge.

    Args:
        chunk: The recorded forward pass.
        edge: Index of the edge.
        like: A cotangent there.
        key: Name of the random stream.
    """
    draws, layout = chunk.problem.draws, chunk.tape.edge_layouts[edge]
    first = draws.first + chunk.rows.start
    shape = batch_first(like, layout, chunk.size).shape
    signs = rademacher(shape, key, draws.seed, first=first, dtype=like.dtype, device=like.device)
    return from_batch_first(signs, layout)


class EdgeDirections:
    """How one direction of the parameters moves the output of each call, with its input fixed.

    ż at an output edge is the sum over the parameters that are used there. Two forms are needed:

    * :meth:`live`: with its graph, which shows how ż depends on the calls' inputs. Fallback
      parameters are left out, because a re-evaluated module handles them itself.
    * :meth:`fixed`: without a graph, of all parameters.
    """

    def __init__(
        self, chunk: Chunk, uses: dict[str, ParameterUses], direction: ParameterDirection
    ) -> None:
        self.chunk, self.uses, self.direction = chunk, uses, direction
        self._unflipped: dict[tuple[str, int], Tensor] = {}
        """ż of each use without flips, from :meth:`live`: :meth:`fixed` multiplies it by flips."""

    def live(self, *, flipped: bool = False) -> OptionalTensors:
        """ż at each output edge with its graph, without fallback parameters.

        Args:
            flipped: Whether the direction is σu instead of u.
        """
        edges: OptionalTensors = [None] * len(self.chunk.tape.output_edges)
        with torch.enable_grad():
            for name, uses in self.uses.items():
                if uses.fallback_calls:
                    continue
                for i, use in enumerate(uses.rule_uses):
                    assert use.output_tangent is not None
                    tangent = use.output_tangent(self.direction.values[name])
                    if not flipped:
                        self._unflipped[name, i] = tangent.detach()
                    self._add(edges, use.edge, tangent, use.layout, name if flipped else None)
        return edges

    def fixed(self, live: OptionalTensors | None, *, flipped: bool = False) -> OptionalTensors:
        """ż at each output edge without a graph, with fallback parameters.

        Args:
            live: The result of :meth:`live` for the same flips, which is then completed; None to
                compute everything.
            flipped: Whether the direction is σu instead of u.
        """
        edges: OptionalTensors = [None] * len(self.chunk.tape.output_edges)
        if live is not None:
            edges = hold_fixed(live)
        with torch.no_grad():
            for name, uses in self.uses.items():
                if live is not None and not uses.fallback_calls:
                    continue
                for i, use in enumerate(uses.rule_uses):
                    tangent = self._unflipped.get((name, i))
                    if tangent is None:
                        assert use.output_tangent is not None
                        tangent = use.output_tangent(self.direction.values[name])
                    self._add(edges, use.edge, tangent, use.layout, name if flipped else None)
        self._add_fallbacks(edges, flipped)
        return edges

    def _add_fallbacks(self, edges: OptionalTensors, flipped: bool) -> None:
        for assigned in self.chunk.fallbacks:
            call = assigned.call
            if call.path == "":  # the whole model has no edges
                continue
            for local_name, parameter in assigned.parameters.items():
                name = self.chunk.parameter_names[id(parameter)]
                u = {local_name: self.direction.values[name]}
                tangents = module_jvp(call.module, u, call.inputs)
                for edge, tangent in zip(call.output_edges, tangents, strict=True):
                    if edge is not None and tangent is not None:
                        self._add(edges, edge, tangent, call.output_layout, name if flipped else None)

    def _add(
        self,
        edges: OptionalTensors,
        edge: int,
        tangent: Tensor,
        layout: int | str,
        flipped_name: str | None,
    ) -> None:
        """Add to ż at an edge, multiplied by the flips of the named parameter, if any."""
        if flipped_name is not None:
            flips = self.direction.flips[flipped_name]
            tangent = tangent * broadcast_over_batch(flips, tangent, layout)
        present = edges[edge]
        edges[edge] = tangent if present is None else present + tangent


def hold_fixed(live: OptionalTensors) -> OptionalTensors:
    """Detach directions from the calls' inputs."""
    return [None if v is None else v.detach() for v in live]
