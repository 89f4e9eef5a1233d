"""Second derivatives R = Σ_a c_a ∂²h_a of every parameter, by Hessian-vector products.

The vectors c at the outputs h are label scores, and some more for bounds; see
:func:`fimprobe.engines.problem.cotangents.curvature_cotangents`. Three kinds of sums are formed:

* The diagonal of R, by random probes at the outputs z of calls, or exactly by BackPACK. With random
  signs v over all z, one double backward gives Hv at z. See docs/theory.md, "Second derivatives by
  probes".
* The blocks of R, by random directions u of the parameters. Within one call z is affine in the
  layer's parameters, so that only cotangents differ along a direction ż(x; u) with x held fixed. Such
  a direction gives a block of exactly zero where it is zero: piecewise linear networks, last layers.
* The whole of R, by the same directions with all parameters moving at once. The calls' inputs then
  move as well, and ż depends on them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fimprobe.engines.curvature.accumulator import CurvatureAccumulator
from fimprobe.engines.curvature.diagonal_accumulator import DiagonalProbes, ProbeTerm
from fimprobe.engines.curvature.directions import (
    EdgeDirections,
    ParameterDirection,
    draw_direction,
    hold_fixed,
    random_edge_direction,
)
from fimprobe.engines.curvature.double_backward import (
    DoubleBackward,
    EdgeTangents,
    PulledBackVector,
)
from fimprobe.engines.curvature.norm_accumulator import DirectionTangents
from fimprobe.engines.curvature.parameter_derivatives import ParameterDerivatives
from fimprobe.engines.curvature.propagation import CurvaturePropagation, ReusedCalls
from fimprobe.engines.curvature.shared_evaluations import SharedEvaluations
from fimprobe.engines.problem.cotangents import Cotangents
from fimprobe.engines.tracing.chunk import Chunk
from fimprobe.engines.tracing.parameter_uses import (
    ParameterUses,
    find_interacting_uses,
    find_uses,
)
from fimprobe.engines.tracing.smoothness import is_piecewise_linear

OptionalTensors = list[Tensor | None]


def measure_curvature(
    chunk: Chunk,
    double_backward: DoubleBackward,
    cotangents: Cotangents,
    accumulators: dict[str, CurvatureAccumulator],
    seconds: dict[str, float],
) -> dict[str, set[str]]:
    """Add one chunk's second derivatives.

    Args:
        chunk: The recorded forward pass.
        double_backward: Has pulled the vectors back.
        cotangents: The vectors c, those of the labels first, and the labels' weights of R².
        accumulators: The parameters' accumulators by name.
        seconds: Receives the time of the diagonals, the labels' share of it.

    Returns:
        For each parameter with interacting uses, the parameters of its layer that it interacts with.
    """
    started = time.perf_counter()
    assert cotangents.weights is not None and cotangents.weights.square is not None
    weights, count = cotangents.weights.square, len(cotangents.vectors)
    exact_labels = chunk.problem.draws.count is None
    uses = find_uses(chunk)
    interacting = find_interacting_uses(chunk.tape, uses)
    for name, accumulator in accumulators.items():
        accumulator.start_chunk(
            chunk.size,
            count,
            weights,
            exact=exact_labels,
            self_interacting=name in interacting.get(name, ()),
        )
    # a layer's own block of R is then zero, unless its uses interact
    piecewise_linear = (
        not double_backward.fallback_parameters
        and not interacting
        and is_piecewise_linear(chunk.outputs, chunk.tape)
    )
    curvature = _ChunkCurvature(
        chunk=chunk,
        double_backward=double_backward,
        vectors=[double_backward.pulled_back(y) for y in range(count)],
        accumulators=accumulators,
        uses=uses,
        interacting=interacting,
        piecewise_linear=piecewise_linear,
        shared=SharedEvaluations(chunk, max(8 * chunk.problem.request.probes, 2 * count)),
    )
    num_labels = weights.shape[1]
    # with exact labels the bounds use the diagonals of the other vectors, too
    num_diagonals = count if exact_labels else num_labels
    curvature.add_diagonals(num_diagonals)
    if not chunk.problem.request.spot_checks:
        elapsed = time.perf_counter() - started
        share = elapsed * num_labels / num_diagonals
        seconds["i2 diagonal"] = seconds.get("i2 diagonal", 0.0) + share
    for number in range(chunk.problem.request.probes if exact_labels else 1):
        curvature.add_direction(number)
    return interacting


@dataclass(frozen=True, kw_only=True)
class _ChunkCurvature:
    """The second-order pass over one chunk.

    Attributes:
        chunk: The recorded forward pass.
        double_backward: Cotangents with their graph.
        vectors: The vectors, with their cotangents detached.
        accumulators: The parameters' accumulators by name.
        uses: Uses of each parameter.
        interacting: Parameters with interacting uses, and what they interact with.
        piecewise_linear: Whether no second derivative exists between calls.
        shared: Evaluations of fallback calls that their parameters share.
    """

    chunk: Chunk
    double_backward: DoubleBackward
    vectors: list[PulledBackVector]
    accumulators: dict[str, CurvatureAccumulator]
    uses: dict[str, ParameterUses]
    interacting: dict[str, set[str]]
    piecewise_linear: bool
    shared: SharedEvaluations

    def add_diagonals(self, count: int) -> None:
        """Add the diagonals of R for the first ``count`` vectors."""
        request = self.chunk.problem.request
        if self.piecewise_linear or request.spot_checks:  # these have no diagonal of their own
            exact = request.exact or request.spot_checks
            for accumulator in self.accumulators.values():
                accumulator.diagonal.add_zero(None if exact else request.probes)
        elif request.exact:
            self._add_exact_diagonals(count)
        else:
            propagation = CurvaturePropagation.of(
                self.chunk, [v.output for v in self.vectors], self._reused_calls()
            )
            for y in range(count):
                self._add_probed_diagonal(y, propagation)

    def _add_probed_diagonal(self, y: int, propagation: CurvaturePropagation | None) -> None:
        """Add the diagonal of one vector's R by K probes.

        Every vector has its own probes, whose noise then averages out over labels, too.
        """
        if propagation is None:
            terms = self._probe_all_calls(y)
        else:
            probes = self.chunk.problem.request.probes
            terms = propagation.terms(y, self.vectors[y].output, probes)
        diagonal_probes = DiagonalProbes(
            number=y, vector=self.vectors[y], terms=terms, seed=self.chunk.problem.draws.seed
        )
        for name, accumulator in self.accumulators.items():
            derivatives = ParameterDerivatives(
                chunk=self.chunk, uses=self.uses[name], name=name, shared=self.shared
            )
            accumulator.diagonal.add_probes(derivatives, diagonal_probes)
        self.shared.clear()

    def _probe_all_calls(self, y: int) -> list[list[ProbeTerm]]:
        """Random signs at all calls' outputs, and the tangents along them, K times."""
        like = self._some_cotangents()
        terms = []
        for k in range(self.chunk.problem.request.probes):
            signs: OptionalTensors = [
                None
                if d is None
                else random_edge_direction(self.chunk, e, d, f"diagonal {y} {k} {e}")
                for e, d in enumerate(like)
            ]
            tangents = self.double_backward.edge_tangents(y, signs, inputs=bool(self.interacting))
            terms.append([ProbeTerm(left=signs, right=tangents)])
        return terms

    def _reused_calls(self) -> ReusedCalls:
        """Calls of parameters that move the inputs of their own uses."""
        uses = [self.uses[name] for name, others in self.interacting.items() if name in others]
        rules = [use for parameter in uses for use in parameter.rule_uses]
        calls = [call for parameter in uses for call, _ in parameter.fallback_calls]
        inputs = {i for use in rules for i in use.input_edges}
        inputs |= {i for call in calls for i in call.input_edges}
        outputs = {use.edge for use in rules} | {e for call in calls for e in call.output_edges}
        return ReusedCalls(
            inputs=sorted(i for i in inputs if i is not None),
            outputs={e for e in outputs if e is not None},
        )

    def _some_cotangents(self) -> OptionalTensors:
        """The cotangents at all output edges, each of the first vector that reaches the edge."""
        num_edges = len(self.chunk.tape.output_edges)
        return [
            next((v.edges[e] for v in self.vectors if v.edges[e] is not None), None)
            for e in range(num_edges)
        ]

    def _add_exact_diagonals(self, count: int) -> None:
        """Add exact diagonals for the first ``count`` vectors, by BackPACK on chunks of samples."""
        from fimprobe.engines import backpack  # its import has side effects

        chunk, problem = self.chunk, self.chunk.problem
        cotangents = torch.stack([vector.output for vector in self.vectors[:count]])
        for accumulator in self.accumulators.values():
            accumulator.diagonal.add_zero(None)
        if not problem.diagonals:
            every = slice(0, chunk.size)
            for name, sums in backpack.hessian_sums(problem, chunk.batch, cotangents).items():
                self.accumulators[name].diagonal.set_exact_sums(every, *sums)
            return
        entries = count * sum(p.numel() for p in problem.parameters.values())
        bytes_per_sample = max(entries * chunk.outputs.element_size(), 1)
        step = max(1, int(problem.memory_mb * 2**18 / bytes_per_sample))
        for start in range(0, chunk.size, step):
            samples = slice(start, min(start + step, chunk.size))
            diagonals = backpack.hessian_diagonals(
                problem, chunk.batch[samples], cotangents[:, samples], verified=True
            )
            for name, diagonal in diagonals.items():
                self.accumulators[name].diagonal.add_exact_entries(samples, diagonal)

    def add_direction(self, number: int) -> None:
        """Add blocks and the whole of R along one random direction."""
        direction = draw_direction(self.chunk, self.uses, number, interacting=bool(self.interacting))
        edges = EdgeDirections(self.chunk, self.uses, direction)
        live = edges.live()
        live_flipped = edges.live(flipped=True) if self.interacting else None
        tangents = self._add_blocks(direction, edges, live, live_flipped)
        self._add_whole(direction, tangents, live, live_flipped)

    def _add_blocks(
        self,
        direction: ParameterDirection,
        edges: EdgeDirections,
        live: OptionalTensors,
        live_flipped: OptionalTensors | None,
    ) -> DirectionTangents:
        """Add ⟨(R_y u)_θ, (R_z σu)_θ⟩ within the calls: ż(x; u) is held fixed.

        Args:
            direction: u and σ.
            edges: How the direction moves the calls' outputs.
            live: ż along u, with its graph.
            live_flipped: ż along σu, with its graph; None if no uses interact.

        Returns:
            The tangents along u and σu.
        """
        fixed = edges.fixed(live)
        plain = self.double_backward.all_edge_tangents(fixed, piecewise_linear=self.piecewise_linear)
        flipped = plain
        if not self.piecewise_linear:
            fixed = edges.fixed(live_flipped, flipped=True)
            flipped = self.double_backward.all_edge_tangents(fixed, inputs=bool(self.interacting))
        tangents = DirectionTangents(vectors=self.vectors, plain=plain, flipped=flipped)
        for name, accumulator in self.accumulators.items():
            derivatives = self._derivatives(name, direction)
            accumulator.norms.add_block(derivatives, tangents, direction.flips[name])
        self.shared.clear()
        return tangents

    def _add_whole(
        self,
        direction: ParameterDirection,
        tangents: DirectionTangents,
        live: OptionalTensors,
        live_flipped: OptionalTensors | None,
    ) -> None:
        """Add ⟨(R_y u)_θ, (R_z u)_θ⟩ with all parameters moving; flipped where uses interact.

        Args:
            direction: u and σ.
            tangents: Those of the blocks, which hold ż fixed.
            live: ż along u, with its graph.
            live_flipped: ż along σu, with its graph; None if no uses interact.
        """
        plain = self._complete(tangents.plain, live, direction.values)
        flipped: list[EdgeTangents] | None = None
        if live_flipped is not None:
            assert tangents.flipped is not None
            fallbacks = [n for n, uses in self.uses.items() if uses.fallback_calls]
            # a flip of a fallback parameter is the same for all samples
            values = {n: direction.values[n] * direction.flips[n][0] for n in fallbacks}
            flipped = self._complete(tangents.flipped, live_flipped, values)
        interacting = set(self.interacting)
        interacting |= {other for others in self.interacting.values() for other in others}
        for name, accumulator in self.accumulators.items():
            completed = DirectionTangents(
                vectors=self.vectors,
                plain=plain,
                flipped=flipped if name in interacting else None,
            )
            accumulator.norms.add_whole(self._derivatives(name, direction), completed)
        self.shared.clear()

    def _complete(
        self, tangents: list[EdgeTangents], live: OptionalTensors, values: dict[str, Tensor]
    ) -> list[EdgeTangents]:
        """Tangents for all parameters moving, from those with ż held fixed.

        The output of a fallback call is not affine in its parameters, so that its part of ż does not
        describe its second derivatives. The parameters themselves then move in the double backward.

        Args:
            tangents: For each vector, the tangents of the block.
            live: ż with its graph, without fallback parameters.
            values: How the fallback parameters move, by name.
        """
        if self.double_backward.fallback_parameters:
            fixed = hold_fixed(live)
            moves: OptionalTensors = [
                values[n] for n, uses in self.uses.items() if uses.fallback_calls
            ]
            tangents = self.double_backward.all_edge_tangents(fixed, moves)
        return [
            self.double_backward.with_input_dependence(y, t, live) for y, t in enumerate(tangents)
        ]

    def _derivatives(self, name: str, direction: ParameterDirection) -> ParameterDerivatives:
        return ParameterDerivatives(
            chunk=self.chunk,
            uses=self.uses[name],
            name=name,
            direction=direction,
            shared=self.shared,
        )
