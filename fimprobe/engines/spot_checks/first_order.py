"""What proposals read of Î₁'s passes: columns of inputs, tokens, and which parameters can bend.

Symbols: B samples, S draws, T positions, x a layer's input, δ the cotangents at its output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fimprobe.engines.spot_checks.patches import fourth_powers_of_patches, is_plain_convolution
from fimprobe.engines.spot_checks.probabilities import mixed_with_even, normalised
from fimprobe.engines.spot_checks.proposals import (
    EVEN_ENTRIES,
    EVEN_INPUTS,
    EVEN_PARAMETERS,
    EntryProposal,
    FlatProposal,
    LayerProposal,
    LookupProposal,
    OuterProposal,
)
from fimprobe.engines.tracing.chunk import Chunk
from fimprobe.engines.tracing.graph import gradient_types
from fimprobe.engines.tracing.parameter_uses import find_interacting_uses, find_uses
from fimprobe.engines.tracing.smoothness import straight_edges
from fimprobe.engines.tracing.tape import ParameterUse
from fimprobe.model.sample_dimension import batch_first


@dataclass(kw_only=True)
class _Columns:
    """Fourth powers along the inputs of a weight, for each chunk [b, I], and its positions T."""

    unit_first: bool
    sums: list[Tensor] = field(default_factory=list)
    positions: int = 1


@dataclass(kw_only=True)
class _Tokens:
    """Tokens of every sample, weights of its positions [T], and weights of the units [D]."""

    of_samples: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    units: Tensor | None = None


@dataclass(kw_only=True)
class FirstOrderNotes:
    """Notes on the chunks of a batch, one after another.

    Attributes:
        bent: Parameters whose second derivatives the graph does not prove to be zero.
        columns: Notes on weights of outer products, by parameter.
        tokens: Notes on lookups, by parameter.
        types: Floating-point types of the computation.
    """

    bent: set[str] = field(default_factory=set)
    columns: dict[str, _Columns] = field(default_factory=dict)
    tokens: dict[str, _Tokens] = field(default_factory=dict)
    types: set[torch.dtype] = field(default_factory=set)

    def add_chunk(self, chunk: Chunk, deltas: Sequence[list[Tensor] | None]) -> None:
        """Note one chunk.

        Args:
            chunk: The recorded forward pass.
            deltas: δ of the label scores at every output edge, S tensors; None where none arrives.
        """
        self.types |= gradient_types(chunk.outputs)
        self.types |= {p.dtype for p in chunk.problem.parameters.values()}
        uses = find_uses(chunk)
        straight = straight_edges(chunk.outputs, chunk.tape)
        interacting = find_interacting_uses(chunk.tape, uses)
        fourth_powers: dict[tuple[int, torch.Size], Tensor] = {}
        for name, of_parameter in uses.items():
            rule_uses = [use for use in of_parameter.rule_uses if use.edge not in straight]
            if not rule_uses and not of_parameter.fallback_calls and name not in interacting:
                continue
            self.bent.add(name)
            if of_parameter.fallback_calls:
                continue
            # products with a straight use need the entry in a bent one, too
            rule_uses = rule_uses or of_parameter.rule_uses
            if all(use.rule.lookup for use in rule_uses):
                self._add_tokens(name, rule_uses[0], chunk, deltas)
            elif all(_has_columns(use) for use in rule_uses):
                self._add_columns(name, rule_uses, fourth_powers)

    def _add_columns(
        self, name: str, uses: list[ParameterUse], known: dict[tuple[int, torch.Size], Tensor]
    ) -> None:
        """Add Σ_t x⁴ of every sample and column; layers that share an input share the sums."""
        total: Tensor | None = None
        positions = 0
        unit_first = True
        for use in uses:
            (x,) = use.call.inputs
            if use.rule.outer:
                key = (x.data_ptr(), x.shape)
                if key not in known:
                    square = x.reshape(len(x), -1, x.shape[-1]).square()
                    known[key] = square.square_().sum(1).double().cpu()
                sums, unit_first = known[key], use.rule.row_separable
                positions += x.shape[1:-1].numel()
            else:
                sums, count = fourth_powers_of_patches(use.call)
                positions += count
            total = sums if total is None else total + sums
        assert total is not None
        columns = self.columns.setdefault(name, _Columns(unit_first=unit_first))
        columns.sums.append(total)
        columns.positions = max(columns.positions, positions)

    def _add_tokens(
        self,
        name: str,
        use: ParameterUse,
        chunk: Chunk,
        deltas: Sequence[list[Tensor] | None],
    ) -> None:
        """Add the tokens of a lookup, and Σ δ² at each position."""
        index = use.call.inputs[0]
        index = index.reshape(len(index), -1)
        weights = torch.zeros(index.shape, dtype=torch.float64)
        notes = self.tokens.setdefault(name, _Tokens())
        for delta in deltas[use.edge] or []:
            at_position = batch_first(delta, use.layout, chunk.size).reshape(*index.shape, -1)
            square = at_position.square()
            weights += square.sum(-1).double().cpu()
            units = square.sum((0, 1)).double().cpu()
            notes.units = units if notes.units is None else notes.units + units
        notes.of_samples.extend(index.cpu())
        notes.weights.extend(weights)

    def layers(
        self,
        owners: Mapping[str, str],
        squares: Mapping[str, Tensor],
        norms: Mapping[str, Tensor],
    ) -> dict[str, LayerProposal]:
        """Return the proposal of every layer with a parameter that can bend.

        Args:
            owners: Class name of the module that holds each parameter.
            squares: Σ_b Σ_s g² of every entry, in the parameters' shapes.
            norms: ‖g_b‖² of every input [B], as the mean over draws.
        """
        members: dict[str, list[str]] = {}
        for name in squares:
            if name in self.bent:
                members.setdefault(name.rpartition(".")[0], []).append(name)
        if not members:
            return {}
        bent = [name for names in members.values() for name in names]
        of_bent = torch.stack([squares[name].sum(dtype=torch.float64) for name in bent]).tolist()
        sums = dict(zip(bent, of_bent, strict=True))
        totals = [
            torch.stack([norms[n] for n in names]).double().sum(0) for names in members.values()
        ]
        inputs = mixed_with_even(torch.stack(totals), EVEN_INPUTS).unbind()
        layers = {}
        for (layer, names), of_layer in zip(members.items(), inputs, strict=True):
            kinds = [part for part in layer.split(".") if not part.isdigit()]
            layers[layer] = LayerProposal(
                inputs=of_layer,
                parameters=self._parameter_shares(names, [sums[name] for name in names]),
                entries={name: self._entries(name, squares[name]) for name in names},
                kind=f"{owners[names[0]]} {'.'.join(kinds[-2:])}",
            )
        return layers

    def _parameter_shares(self, names: list[str], sums: list[float]) -> dict[str, float]:
        """Probability of each parameter of a layer, from its names and its Σ g²."""
        shares = _shares(sums)
        weights = [name for name in names if name in self.columns]
        if len(names) == 2 and len(weights) == 1:
            # a bias is a column whose input is 1 at every position
            columns = self.columns[weights[0]]
            fourth = float(torch.cat(columns.sums).mean(0).sum())
            by_inputs = [fourth if n in weights else float(columns.positions) for n in names]
            shares = [(a + b) / 2 for a, b in zip(shares, _shares(by_inputs), strict=True)]
        even = EVEN_PARAMETERS / len(names)
        return {n: (1 - EVEN_PARAMETERS) * s + even for n, s in zip(names, shares, strict=True)}

    def _entries(self, name: str, squares: Tensor) -> EntryProposal:
        """The proposal of a parameter's entries."""
        if name in self.columns:
            columns = self.columns[name]
            by_unit = squares.flatten(1) if columns.unit_first else squares.T
            units = by_unit.sum(1).double().cpu()
            fourth = normalised(torch.cat(columns.sums))
            # inputs of value layers are averaged over positions before they matter: g shows it
            gradients = normalised(by_unit.sum(0).double().cpu().square())
            guided = 1 - EVEN_ENTRIES / 2
            by_column = fourth.mul_(0.6 * guided).add_(gradients, alpha=0.4 * guided)
            return OuterProposal(
                units=mixed_with_even(units, EVEN_ENTRIES),
                columns=by_column.add_(EVEN_ENTRIES / 2 / by_column.shape[-1]),
                unit_first=columns.unit_first,
            )
        if name in self.tokens:
            notes = self.tokens[name]
            tokens, probabilities = [], []
            for index, weights in zip(notes.of_samples, notes.weights, strict=True):
                each, place, counts = index.unique(return_inverse=True, return_counts=True)
                mass = torch.zeros(len(each), dtype=torch.float64).index_add_(0, place, weights)
                tokens.append(each)
                probabilities.append((normalised(counts.double()) + normalised(mass.square())) / 2)
            # Σ g² of a tied weight contains that of the head, which has no curvature of its own
            units = torch.ones(squares.shape[1]) if notes.units is None else notes.units
            return LookupProposal(
                units=mixed_with_even(units.double(), EVEN_ENTRIES),
                tokens=tokens,
                probabilities=probabilities,
            )
        return FlatProposal(squares=squares.cpu())


def _shares(weights: list[float]) -> list[float]:
    """Weights divided by their sum; even ones where all are zero."""
    finite = [weight if math.isfinite(weight) else 0.0 for weight in weights]
    total = sum(finite)
    return [weight / total if total else 1 / len(weights) for weight in finite]


def _has_columns(use: ParameterUse) -> bool:
    """Whether a use is that of a weight whose entries are pairs of a unit and an input."""
    return use.rule.outer or (use.rule.linear and is_plain_convolution(use.call.module))
