"""From directions and their Hessian-vector products to one parameter's second-derivative sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fimprobe.batch import Batch
from fimprobe.engines.contract import GRAM_LIMIT, power_of_two
from fimprobe.engines.gather import precise, sum_uses
from fimprobe.engines.problem import Plan, Problem
from fimprobe.engines.replay import replay_directions, replay_gradients
from fimprobe.engines.rules import Call, Rule, embedding_tokens
from fimprobe.engines.signs import signs
from fimprobe.engines.tape import Replayed, Use, batch_first
from fimprobe.types import Curvature

Maybe = Sequence[Tensor | None]


class Curve(NamedTuple):
    """What a direction does: δ's derivatives at the edges, and the inputs' at the sources."""

    edges: list[Tensor | None]
    inputs: list[Tensor | None]


@dataclass(frozen=True)
class Site:
    """Where a parameter is used: under rules, and inside replayed calls by its name there."""

    uses: list[Use]
    calls: list[tuple[Replayed, str]]


@dataclass
class Pull:
    """Pulls what arrives at the edges back to one parameter, per sample, summed over its uses."""

    problem: Problem
    plan: Plan
    site: Site
    name: str
    size: int
    along: dict[str, Tensor] = field(default_factory=dict)
    flips: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Note the parameter's shape, and its names inside replayed modules."""
        self.shape = self.problem.parameters[self.name].shape
        self.names = {id(p): n for n, p in self.problem.parameters.items()}

    def single(self) -> Use | None:
        """The one use of a whole parameter under a rule, where that is all there is."""
        uses = self.site.uses
        if len(uses) == 1 and not self.site.calls and uses[0].rows is None and not uses[0].steps:
            return uses[0]
        return None

    def outer(self) -> Use | None:
        """The use, where the gradient is an outer product δ xᵀ for each sample."""
        use = self.single()
        if use is None or not use.rule.outer or use.call.inputs[0].dim() != 2:
            return None
        return use if self.shape[1] == use.call.inputs[0].shape[1] else None

    def tokens(self) -> Use | None:
        """The use, where only the rows of the sample's tokens differ from zero."""
        use = self.single()
        return use if use is not None and use.rule.tokens else None

    def at(self, use: Use, arriving: Sequence[Maybe]) -> list[Tensor] | None:
        """What arrives at a use, batch first, for each in ``arriving``; None where nothing does."""
        parts = [a[use.edge] for a in arriving]
        present = next((p for p in parts if p is not None), None)
        if present is None:
            return None
        filled = [torch.zeros_like(present) if p is None else p for p in parts]
        return [precise(batch_first(p, use.layout, self.size)) for p in filled]

    def first(self, arriving: Sequence[Maybe], samples: slice) -> Tensor | None:
        """Jᵀ of what arrives: [b, len(arriving), *shape]."""
        total = self._uses(arriving, samples)
        for call, local in self.site.calls:
            if call.path == "":
                continue
            seeds: list[Tensor | None] = []
            for edge in call.edges:
                parts = [None if edge is None else a[edge] for a in arriving]
                present = next((p for p in parts if p is not None), None)
                if present is None:
                    seeds.append(None)
                    continue
                filled = [torch.zeros_like(present) if p is None else p for p in parts]
                seeds.append(torch.stack([p[samples] for p in filled], 1))
            if all(s is None for s in seeds):
                continue
            inside = {local: _inside(call, local)}
            found = self._replayed(
                call,
                lambda v, args, kwargs, size, inside=inside, seeds=seeds, call=call: replay_gradients(
                    call.module, inside, args, kwargs, seeds, batch_size=size, vectorise=v
                ),
                samples,
            )
            g = precise(found[local])
            total = g if total is None else total + g
        return total

    def _uses(self, arriving: Sequence[Maybe], samples: slice) -> Tensor | None:
        live = []
        for use in self.site.uses:
            parts = self.at(use, arriving)
            if parts is not None:
                call = Call(
                    use.call.module, tuple(precise(x) for x in use.call.inputs), use.call.folded
                )
                live.append((use, call, parts))
        if not live:
            return None
        one = torch.ones((), dtype=torch.float64, device=live[0][2][0].device)
        return sum_uses(live, samples, None, self.shape, one)

    def moved(self, curve: Curve, delta: Maybe, samples: slice) -> Tensor | None:
        """The part of the gradient's derivative that comes from the inputs: Σ δ ẋᵀ [b, 1, *shape]."""
        total: Tensor | None = None
        for use in self.site.uses:
            parts = self.at(use, [delta])
            x = self._input_direction(use, curve)
            if parts is None or x is None:
                continue
            inputs = tuple(precise(i) for i in use.call.inputs)
            call = Call(use.call.module, inputs, use.call.folded)
            g = _turned(use, call, x, parts[0], samples, self.shape)
            total = g if total is None else total + g
        return total

    def _input_direction(self, use: Use, curve: Curve) -> tuple[Tensor | None, ...] | None:
        parts = [None if i is None else curve.inputs[i] for i in use.sources]
        if all(p is None for p in parts):
            return None
        if use.steps:
            like = next(p for p in parts if p is not None)
            stacked = torch.stack([torch.zeros_like(like) if p is None else p for p in parts])
            return (precise(batch_first(stacked, use.layout, self.size)),)
        return tuple(
            None if p is None else precise(batch_first(p, use.layout, self.size)) for p in parts
        )

    def second(
        self,
        curve: Curve,
        delta: Maybe,
        samples: slice,
        *,
        inputs: float = 0.0,
        within: bool = False,
        everything: bool = False,
        flipped: bool = False,
    ) -> Tensor | None:
        """The gradient's derivative along a direction: [b, 1, *shape].

        ``inputs``: the factor of the part that comes from the calls' inputs. ``within``: the
        parameters that a replayed call stands for move as well; ``everything``: all inside it do.
        """
        total = self._uses([curve.edges], samples)
        if inputs and self.site.uses:
            g = self.moved(curve, delta, samples)
            if g is not None:
                total = inputs * g if total is None else total + inputs * g
        for call, local in self.site.calls:
            g = self.call_second(
                call,
                local,
                curve,
                delta,
                samples,
                inputs=inputs,
                within=within,
                everything=everything,
                flipped=flipped,
            )
            if g is not None:
                total = g if total is None else total + g
        return total

    def call_second(
        self,
        call: Replayed,
        local: str,
        curve: Curve,
        delta: Maybe,
        samples: slice,
        *,
        inputs: float = 0.0,
        within: bool = False,
        everything: bool = False,
        flipped: bool = False,
    ) -> Tensor | None:
        """One replayed call's part of :meth:`second`."""
        along: dict[str, Tensor] = {}
        scales: dict[str, Tensor] = {}
        if within or everything:
            for n, p in call.module.named_parameters():
                name = self.names.get(id(p))
                if name not in self.along or not (everything or self._stands_for(call, name)):
                    continue
                along[n] = self.along[name]
                if flipped:
                    scales[n] = self.flips[name][samples]
        if call.path == "":
            seeds: list[Tensor | None] = [self.output_seed[samples]]
            bend: list[Tensor | None] = [None]
            moves: list[Tensor | None] = []
        else:
            seeds = [_rows(delta, e, samples) for e in call.edges]
            bend = [_rows(curve.edges, e, samples) for e in call.edges]
            steps = [_rows(curve.inputs, i, samples) if inputs else None for i in call.sources]
            moves = [None if x is None else inputs * x for x in steps]
            seeds = [
                torch.zeros_like(b) if s is None and b is not None else s
                for s, b in zip(seeds, bend, strict=True)
            ]
            if all(s is None for s in seeds):
                return None
        if not along and all(b is None for b in bend) and all(m is None for m in moves):
            return None
        select: Any = (lambda out: [self.problem.outputs(out)]) if call.path == "" else None
        found = self._replayed(
            call,
            lambda v, args, kwargs, size: replay_directions(
                call.module,
                {local: _inside(call, local)},
                along,
                scales,
                args,
                kwargs,
                moves,
                seeds,
                bend,
                batch_size=size,
                select=select,
                vectorise=v,
            ),
            samples,
        )
        return precise(found[local]).unsqueeze(1)

    output_seed: Tensor = field(init=False, repr=False)
    """The seed at the outputs, for calls of the whole model."""

    def _stands_for(self, call: Replayed, name: str) -> bool:
        planned = self.plan.replay.get(name)
        return planned == call.path if planned is not None else True

    def _replayed(
        self, call: Replayed, run: Callable[..., dict[str, Tensor]], samples: slice
    ) -> dict[str, Tensor]:
        cut = Batch(call.args, call.kwargs, self.size)[samples]
        for vectorise in (True, False) if call.path not in self.plan.loop else (False,):
            try:
                return run(vectorise, cut.args, cut.kwargs, cut.size)
            except torch.OutOfMemoryError:
                raise
            except Exception:
                if not vectorise:
                    raise
                self.plan.loop.add(call.path)
        raise AssertionError


def _rows(tensors: Maybe, index: int | None, samples: slice) -> Tensor | None:
    x = None if index is None else tensors[index]
    return None if x is None else x[samples]


def _inside(call: Replayed, local: str) -> Tensor:
    return dict(call.module.named_parameters())[local].detach()


def _turned(
    use: Use,
    call: Call,
    x: tuple[Tensor | None, ...],
    delta: Tensor,
    samples: slice,
    shape: torch.Size,
) -> Tensor:
    """Σ δ ẋᵀ of one use: the rule's derivative in its input."""
    rule: Rule = use.rule
    seed = delta[samples].unsqueeze(1)
    at = call.rows(samples)
    if rule.linear:
        assert x[0] is not None
        g = rule.gradient(Call(at.module, (x[0][samples],), at.folded), seed)
    else:
        moving = [i for i, v in enumerate(x) if v is not None]

        def f(*parts: Tensor) -> Tensor:
            inputs = list(at.inputs)
            for i, part in zip(moving, parts, strict=True):
                inputs[i] = part
            return rule.gradient(Call(at.module, tuple(inputs), at.folded), seed)

        primals = tuple(at.inputs[i] for i in moving)
        tangents = tuple(v[samples] for v in x if v is not None)
        g = torch.func.jvp(f, primals, tangents)[1]
    if use.rows is not None:
        whole = g.new_zeros(*g.shape[:2], *shape)
        whole[:, :, use.rows] = g
        return whole
    return g


@dataclass
class CurvatureSums:
    """The running sums of one parameter; see :class:`fimprobe.types.Curvature`."""

    parameter: Tensor
    diagonals: bool
    room: float
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    diagonal: Tensor | None = None
    diagonal_square: Tensor | None = None

    def begin(self, size: int, count: int, second: Tensor, exact: bool, self_meeting: bool) -> None:
        """Start a chunk of ``size`` inputs and ``count`` seeds."""
        self.size, self.count, self.second, self.meets = size, count, second, self_meeting
        self.full = exact and second.shape[1] <= GRAM_LIMIT
        self.chunk: dict[str, Tensor] = {}
        if self.diagonals and self.diagonal is None:
            wide = torch.zeros_like(self.parameter, dtype=torch.float64)
            self.diagonal, self.diagonal_square = wide.clone(), wide.clone()

    def end(self) -> None:
        """Keep the chunk's results."""
        for key, value in self.chunk.items():
            self.parts.setdefault(key, []).append(value)

    def zeros(self, *shape: int) -> Tensor:
        """Float64 zeros on the parameter's device."""
        return torch.zeros(shape, dtype=torch.float64, device=self.parameter.device)

    def add_diagonal(
        self,
        pull: Pull,
        first: list[list[Tensor | None]],
        bent: list[list[Curve]],
        deltas: list[list[Tensor | None]],
        seed: int,
    ) -> None:
        """R's diagonal from K probes at the layers' outputs."""
        probes = len(first)
        self.chunk["trace"] = self.zeros(self.size, self.count)
        self.chunk["square"] = self.zeros(self.size, self.count)
        self.chunk["probe_squares"] = self.zeros(self.size, self.count, probes)
        own = bool(pull.site.calls)
        use, tokens = pull.outer(), pull.tokens()
        if use is not None and not self.meets:
            self._outer_diagonal(pull, use, first, bent)
            return
        if tokens is not None:
            self._token_diagonal(pull, tokens, first, bent)
            return
        step = max(1, int(self.room / (4 * probes * self.parameter.numel() * 8)))
        for start in range(0, self.size, step):
            samples = slice(start, min(start + step, self.size))
            left = pull.first(first, samples)
            for y in range(len(bent)):
                products = []
                for k in range(probes):
                    r: Tensor | None = None
                    if left is not None:
                        right = pull.second(
                            bent[y][k], deltas[y], samples, inputs=2.0 if self.meets else 0.0
                        )
                        if right is not None:
                            r = left[:, k] * right[:, 0]
                    if own:
                        r = self._own_diagonal(pull, deltas[y], y, k, samples, seed, r)
                    if r is not None:
                        products.append(r.reshape(len(r), -1))
                if products:
                    self._products(torch.stack(products, 1), samples, y)

    def add_exact(self, y: int, diagonal: Tensor | None, samples: slice) -> None:
        """R's diagonal of one seed as it is: [b, *shape]."""
        if "trace" not in self.chunk:
            self.chunk["trace"] = self.zeros(self.size, self.count)
            self.chunk["square"] = self.zeros(self.size, self.count)
        if diagonal is None:
            return
        r = diagonal.double().reshape(len(diagonal), -1)
        self.chunk["trace"][samples, y] = r.sum(1)
        self.chunk["square"][samples, y] = r.square().sum(1)
        if self.diagonal is not None and self.diagonal_square is not None and self._weigh(y):
            w = self.second[samples, y].double().unsqueeze(1)
            shape = self.parameter.shape
            self.diagonal += (w * r).sum(0).view(shape)
            self.diagonal_square += (w * r.square()).sum(0).view(shape)

    def _own_diagonal(self, pull, delta, y, k, samples, seed, r):
        """What a replayed module bends by itself: u∘(∂²(δᵀz)u)."""
        u = signs(
            (1, *self.parameter.shape),
            f"own {k} {pull.name}",
            seed,
            dtype=self.parameter.dtype,
            device=self.parameter.device,
        )[0]
        pull.output_seed = self.seeds[y]
        pull.along, before = {pull.name: u}, pull.along
        still = Curve([None] * len(delta), [])
        for call, local in pull.site.calls:
            g = pull.call_second(call, local, still, delta, samples, within=True)
            if g is not None:
                g = u * g[:, 0]
                r = g if r is None else r + g
        pull.along = before
        return r

    def _outer_diagonal(self, pull: Pull, use: Use, first: Any, bent: Any) -> None:
        x2 = precise(use.call.inputs[0]).square()
        length, x4 = x2.sum(-1).double(), x2.double().square().sum(-1)
        v = pull.at(use, first)
        if v is None:
            return
        left = torch.stack(v, 1)
        for y in range(len(bent)):
            parts = pull.at(use, [c.edges for c in bent[y]])
            if parts is None:
                continue
            d = (left * torch.stack(parts, 1)).double()
            self._store(y, slice(0, self.size), d, length, x4)
            if self.diagonal is not None and self.diagonal_square is not None and self._weigh(y):
                w = self.second[:, y].double().unsqueeze(1)
                self.diagonal += (w * d.mean(1)).T @ x2.double()
                self.diagonal_square += (w * _pairs(d)).T @ x2.double().square()

    def _token_diagonal(self, pull: Pull, use: Use, first: Any, bent: Any) -> None:
        v = pull.at(use, first)
        if v is None:
            return
        sample, token, left = embedding_tokens(use.call, torch.stack(v, 1))
        for y in range(len(bent)):
            parts = pull.at(use, [c.edges for c in bent[y]])
            if parts is None:
                continue
            r = (left * embedding_tokens(use.call, torch.stack(parts, 1))[2]).double()
            self.chunk["trace"][:, y].index_add_(0, sample, r.mean(1).sum(-1))
            self.chunk["square"][:, y].index_add_(0, sample, _pairs(r).sum(-1))
            self.chunk["probe_squares"][:, y].index_add_(0, sample, r.square().sum(-1))
            if self.diagonal is not None and self.diagonal_square is not None and self._weigh(y):
                w = self.second[:, y].double()[sample].unsqueeze(1)
                self.diagonal.index_add_(0, token, w * r.mean(1))
                self.diagonal_square.index_add_(0, token, w * _pairs(r))

    def _products(self, r: Tensor, samples: slice, y: int) -> None:
        """r [b, K, P] of one seed."""
        scale = 1.0
        if r.dtype != torch.float64:
            own = power_of_two(r)
            r, scale = r * (1 / own).to(r.dtype), own  # type: ignore[assignment]
        ones = torch.ones(r.shape[0], dtype=torch.float64, device=r.device)
        self._store(y, samples, r, ones * scale, ones * scale**2)
        if self.diagonal is not None and self.diagonal_square is not None and self._weigh(y):
            w = self.second[samples, y].double().unsqueeze(1)
            wide = r.double()
            shape = self.parameter.shape
            self.diagonal += (w * wide.mean(1)).sum(0).view(shape) * scale
            self.diagonal_square += (w * _pairs(wide)).sum(0).view(shape) * scale**2

    def _weigh(self, y: int) -> bool:
        return y < self.second.shape[1]

    def _store(self, y: int, samples: slice, r: Tensor, one: Tensor, two: Tensor) -> None:
        """Sums of products r [b, K, P]; ``one`` and ``two`` [b] multiply Σ r and Σ r²."""
        total, squares = r.sum(1), r.square().sum(-1).double()
        probes = r.shape[1]
        self.chunk["trace"][samples, y] = total.sum(-1).double() * one / probes
        both = total.square().sum(-1).double() - squares.sum(1)
        self.chunk["square"][samples, y] = both * two / (probes * (probes - 1))
        self.chunk["probe_squares"][samples, y] = squares * two.unsqueeze(1)

    def add_block(self, pull: Pull, local: Any, deltas: Any, flips: Tensor) -> None:
        """⟨(R_y u)_θ, (R_z σu)_θ⟩ within the calls."""

        def plain(y: int, s: slice) -> Tensor | None:
            pull.output_seed = self.seeds[y]
            return pull.second(local[0][y], deltas[y], s, within=True)

        def flipped(y: int, s: slice) -> Tensor | None:
            pull.output_seed = self.seeds[y]
            return pull.second(local[1][y], deltas[y], s, within=True, flipped=True)

        sides = [[c.edges for c in half] for half in local]
        self._pairs_of("block", pull, plain, flipped, *sides)
        self._append("signs", flips.double())

    def add_whole(self, pull: Pull, whole: Any, turned: Any, deltas: Any) -> None:
        """The same for all parameters moving at once, plain and (for ``joint``) flipped."""

        def plain(y: int, s: slice) -> Tensor | None:
            pull.output_seed = self.seeds[y]
            return pull.second(whole[y], deltas[y], s, inputs=1.0, everything=True)

        use = pull.outer()
        if use is not None:
            self._outer_whole(pull, use, whole, deltas)
        else:
            self._pairs_of("whole", pull, plain, None, None, None)
        if turned is not None:

            def flipped(y: int, s: slice) -> Tensor | None:
                pull.output_seed = self.seeds[y]
                return pull.second(turned[y], deltas[y], s, inputs=1.0, everything=True, flipped=True)

            self._pairs_of("joint", pull, plain, flipped, None, None)

    def _outer_whole(self, pull: Pull, use: Use, whole: Any, deltas: Any) -> None:
        """(a xᵀ + δ ẋᵀ) of each seed: inner products of rank-two matrices."""
        x = precise(use.call.inputs[0]).double()
        bent = pull.at(use, [c.edges for c in whole])
        turned = [pull._input_direction(use, c) for c in whole]
        like = bent or pull.at(use, deltas)
        if like is None:
            self._append("whole", self._empty())
            return
        a = torch.stack(bent if bent is not None else [torch.zeros_like(t) for t in like], 1)
        d = pull.at(use, deltas)
        delta = torch.stack(d if d is not None else [torch.zeros_like(t) for t in like], 1)
        moves = [torch.zeros_like(x) if t is None or t[0] is None else t[0].double() for t in turned]
        left = torch.stack([a.double(), delta.double()], 2)  # [b, n, 2, o]
        right = torch.stack([x.unsqueeze(1).expand(-1, self.count, -1), torch.stack(moves, 1)], 2)
        if self.full:
            gram = torch.einsum("bypo,bzqo,bypi,bzqi->byz", left, left, right, right)
        else:
            inner = left @ left.transpose(2, 3) * (right @ right.transpose(2, 3))
            gram = inner.sum((2, 3))
        self._append("whole", gram)

    def _empty(self) -> Tensor:
        return self.zeros(self.size, *([self.count] * (2 if self.full else 1)))

    def _append(self, key: str, value: Tensor) -> None:
        """Stack the directions: [J, b, ...]."""
        value = value.unsqueeze(0)
        old = self.chunk.get(key)
        self.chunk[key] = value if old is None else torch.cat([old, value])

    def _pairs_of(self, key, pull, plain, flipped, edges, turned) -> None:
        use = pull.outer() if edges is not None else None
        tokens = pull.tokens()
        gram = self._empty()
        if use is not None:  # (a xᵀ): ⟨a, a'⟩‖x‖²
            a, b = pull.at(use, edges), pull.at(use, turned)
            if a is not None and b is not None:
                length = precise(use.call.inputs[0]).double().square().sum(-1)
                gram = self._inner(torch.stack(a, 1).double(), torch.stack(b, 1).double())
                gram = gram * length.view(-1, *[1] * (gram.dim() - 1))
        elif tokens is not None and edges is not None:
            a, b = pull.at(tokens, edges), pull.at(tokens, turned)
            if a is not None and b is not None:
                sample, _, rows = embedding_tokens(tokens.call, torch.stack(a, 1))
                other = embedding_tokens(tokens.call, torch.stack(b, 1))[2]
                gram.index_add_(0, sample, self._inner(rows.double(), other.double()))
        else:
            count = self.count if self.full else 1
            step = max(1, int(self.room / (2 * count * self.parameter.numel() * 8)))
            for start in range(0, self.size, step):
                samples = slice(start, min(start + step, self.size))
                if self.full:
                    a = self._stacked(plain, samples)
                    b = a if flipped is None else self._stacked(flipped, samples)
                    if a is not None and b is not None:
                        gram[samples] = self._inner(a, b)
                    continue
                for y in range(self.count):
                    a = plain(y, samples)
                    b = a if flipped is None else flipped(y, samples)
                    if a is not None and b is not None:
                        gram[samples, y] = _product(a.flatten(1), b.flatten(1))
        self._append(key, gram)

    def _stacked(self, make: Callable[[int, slice], Tensor | None], samples: slice) -> Tensor | None:
        parts = [make(y, samples) for y in range(self.count)]
        like = next((p for p in parts if p is not None), None)
        if like is None:
            return None
        filled = [torch.zeros_like(like) if p is None else p for p in parts]
        whole = torch.cat(filled, 1).double()
        return whole.reshape(*whole.shape[:2], -1)

    def _inner(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.full:
            return (a * b).sum(-1)
        gram = a @ b.transpose(1, 2)
        return (gram + gram.transpose(1, 2)) / 2

    seeds: list[Tensor] = field(default_factory=list)
    """The seeds at the outputs, for calls of the whole model."""

    def finish(self) -> Curvature:
        """The results of all chunks."""
        first = {k: torch.cat(v).cpu() for k, v in self.parts.items() if k not in _PER_DIRECTION}
        later = {k: torch.cat(v, 1).cpu() for k, v in self.parts.items() if k in _PER_DIRECTION}
        return Curvature(
            first["trace"],
            first["square"],
            first.get("probe_squares"),
            later["block"],
            later["whole"],
            later["signs"],
            later.get("joint"),
            self.diagonal,
            self.diagonal_square,
        )


_PER_DIRECTION = ("block", "whole", "signs", "joint")


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a·b [b] in float64's range, without float64 copies of the vectors."""
    if a.dtype == torch.float64:
        return torch.linalg.vecdot(a, b)
    one, two = power_of_two(a), power_of_two(b) if b is not a else None
    if two is None:
        two = one
    scaled = torch.linalg.vecdot(a * (1 / one).to(a.dtype), b * (1 / two).to(b.dtype))
    return scaled.double() * one * two


def _pairs(r: Tensor) -> Tensor:
    """The unbiased square of a mean over probes: r [b, K, P] -> [b, P]."""
    probes = r.shape[1]
    return (r.sum(1).square() - r.square().sum(1)) / (probes * (probes - 1))
