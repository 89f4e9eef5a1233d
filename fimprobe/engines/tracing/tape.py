"""One forward pass of the twin, recorded: which parameter met which input, and where δ arrives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from fimprobe.engines.layers.activations import closed_form_forward
from fimprobe.engines.layers.decompositions import UNROLLED, NotUnrolled
from fimprobe.engines.layers.rules import LINEAR, GradientRule, LayerCall, direction, rules_for
from fimprobe.engines.tracing.batch_layout import BatchLayouts, batch_first, fits
from fimprobe.errors import FimprobeError


@dataclass(frozen=True)
class ParameterUse:
    """One use of a parameter under a rule. ``rows``: the part of a packed parameter it fills.

    For second derivatives: ``sources`` are the places where the gradients of the call's inputs
    arrive (None where an input depends on no parameter; one per time step where ``steps``), and
    ``direction`` gives the output's derivative along a direction of the parameter.
    """

    rule: GradientRule
    call: LayerCall
    edge: int
    layout: int | str
    rows: slice | None = None
    sources: Sequence[int | None] = ()
    direction: Callable[[Tensor], Tensor] | None = None
    steps: bool = False


@dataclass(frozen=True)
class FallbackCall:
    """One call of a module whose parameters are differentiated by replaying it per sample.

    ``edges`` belong to the tensors among the outputs, ``sources`` to those among the inputs.
    """

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    edges: tuple[int | None, ...]
    sources: tuple[int | None, ...] = ()


class Tape:
    """What ``record`` fills: uses by parameter, replayed calls, and the edges that δ arrives at."""

    def __init__(self, batch_size: int, layouts: BatchLayouts) -> None:
        self.batch_size = batch_size
        self.layouts = layouts
        self.uses: dict[int, list[ParameterUse]] = {}
        self.replayed: list[FallbackCall] = []
        self.edges: list[Any] = []
        self.layout_of: list[int | str] = []
        self.sources: list[Any] = []
        self._source_of: dict[Any, int] = {}
        self.activations: dict[str, tuple[int, int | str]] = {}
        self.versions: list[tuple[Tensor, int, str]] = []
        self.cuts: dict[Any, list[Any]] = {}
        self.failed: dict[str, str] = {}

    def layout(self, path: str, *tensors: Tensor) -> int | str | None:
        """The batch's place in all of ``tensors``; None where there is none."""
        known = self.layouts.of.get(path)
        if known is None and self.layouts.settled:
            return None  # not seen when the layouts were verified
        candidates: list[int | str] = [0, 1, "folded"] if known is None else [known]
        for layout in candidates:
            if all(fits(x, layout, self.batch_size) for x in tensors):
                self.layouts.of.setdefault(path, layout)
                return layout
        return None

    def edge(self, output: Tensor, layout: int | str = 0) -> int:
        """Register a tensor or its gradient edge as a place where δ is wanted."""
        self.edges.append(output if output.is_leaf else get_gradient_edge(output))
        self.layout_of.append(layout)
        return len(self.edges) - 1

    def source(self, x: Tensor) -> int | None:
        """Register an input as a place where its gradient can be asked for; None for a constant."""
        if not x.requires_grad:
            return None
        place: Any = x if x.is_leaf else get_gradient_edge(x)
        key = id(x) if x.is_leaf else (place.node, place.output_nr)
        if key not in self._source_of:
            self._source_of[key] = len(self.sources)
            self.sources.append(place)
        return self._source_of[key]

    def cut(self, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        """Let a walk over the graph jump from a call's outputs to its inputs."""
        nodes = [x.grad_fn for x in inputs if x.grad_fn is not None]
        for output in outputs:
            self.cuts[output.grad_fn] = nodes

    def rule_call(
        self,
        path: str,
        module: nn.Module,
        names: dict[str, GradientRule],
        args: tuple[Any, ...],
        out: Any,
    ) -> None:
        """Record a call of a layer with rules."""
        inputs = [x for x in args if isinstance(x, Tensor)]
        if isinstance(module, nn.EmbeddingBag) and (
            (len(args) > 1 and args[1] is not None) or inputs[0].dim() != 2
        ):
            self.failed[path] = "bags given by offsets"
            return
        layout = self.layout(path, *inputs, out)
        if layout is None:
            self.failed[path] = f"no batch dimension in its input {tuple(inputs[0].shape)}"
            return
        batched = tuple(batch_first(x.detach(), layout, self.batch_size) for x in inputs)
        call = LayerCall(module, batched, layout == "folded")
        edge = self.edge(out, layout)
        sources = [self.source(x) for x in inputs]
        if sources[0] is not None:
            self.activations.setdefault(path, (sources[0], layout))
        self.versions += [(x, x._version, path) for x in inputs if not x.is_inference()]
        for name, rule in names.items():
            parameter = module._parameters.get(name)
            if parameter is not None and parameter.requires_grad:
                along = functools.partial(direction, rule, module, name, args, out.shape)
                use = ParameterUse(rule, call, edge, layout, None, sources, along)
                self.uses.setdefault(id(parameter), []).append(use)
        self.cut([out], inputs)

    def replayed_call(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """Record a call of a module that will be replayed."""
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        sources = {x.grad_fn for x in inputs if x.grad_fn is not None}
        leaves = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        wanted = [x.requires_grad and not x.is_leaf and x.grad_fn not in sources for x in leaves]
        outputs = [x for x, want in zip(leaves, wanted, strict=True) if want]
        if not outputs:
            return
        if not all(fits(x, 0, self.batch_size) for x in outputs) or not any(
            fits(x, 0, self.batch_size) for x in inputs
        ):
            self.failed[path] = "no batch dimension at its inputs and outputs"
            return
        edges = tuple(self.edge(x) if want else None for x, want in zip(leaves, wanted, strict=True))
        places = tuple(self.source(x) for x in inputs)
        self.replayed.append(FallbackCall(path, module, args, kwargs, edges, places))
        self.cut(outputs, inputs)


class _AffineRecorder:
    """Affine maps inside an unrolled layer, each a use of its weight and bias."""

    def __init__(self, tape: Tape, path: str, module: nn.Module) -> None:
        self.tape, self.path, self.module = tape, path, module
        self.pending: list[tuple[int, ParameterUse]] = []

    def __call__(
        self,
        x: Tensor,
        weight: str,
        bias: str | None,
        rows: slice | None = None,
        bias_rows: slice | None = None,
        layout: int | None = None,
    ) -> Tensor:
        if layout is None:
            layout = 0 if self.module.batch_first else 1
        if not fits(x, layout, self.tape.batch_size):
            raise NotUnrolled
        w, b = self._data(weight, rows), self._data(bias, bias_rows)
        out = F.linear(x, w, b)
        epsilon = torch.zeros_like(out).requires_grad_()
        sources = [self.tape.source(x)]
        self._use([x], sources, x.detach(), epsilon, layout, weight, bias, rows, bias_rows)
        return out + epsilon

    def steps(self, weight: str, bias: str | None, like: Tensor) -> Callable[[int, Tensor], Tensor]:
        """One affine map used at every time step of ``like`` [T, B, ...]."""
        w, b = self._data(weight, None), self._data(bias, None)
        assert w is not None
        epsilon = like.new_zeros(*like.shape[:2], w.shape[0]).requires_grad_()
        states = like.new_empty(*like.shape[:2], w.shape[1])
        live: list[Tensor] = []
        sources: list[int | None] = []
        self._use(live, sources, states, epsilon, 1, weight, bias, None, None, steps=True)
        parts = epsilon.unbind(0)

        def step(t: int, state: Tensor) -> Tensor:
            with torch.no_grad():
                states[t] = state
            live.append(state)
            sources.append(self.tape.source(state))
            return F.linear(state, w, b) + parts[t]

        return step

    def _data(self, name: str | None, rows: slice | None) -> Any:
        if name is None:
            return None
        data = self._parameter(name).detach()
        return data if rows is None else data[rows]

    def _parameter(self, name: str) -> Any:
        return functools.reduce(getattr, name.split("."), self.module)

    def _use(
        self, live, sources, x, epsilon, layout, weight, bias, rows, bias_rows, steps=False
    ) -> None:
        call = LayerCall(self.module, (batch_first(x, layout, self.tape.batch_size),))
        edge = self.tape.edge(epsilon, layout)
        for name, part, rule in ((weight, rows, "weight"), (bias, bias_rows, "bias")):
            if name is not None and self._parameter(name).requires_grad:

                def along(
                    u: Tensor, part: slice | None = part, weights: bool = rule == "weight"
                ) -> Tensor:
                    u = u if part is None else u[part]
                    if not weights:
                        return u.expand(epsilon.shape)
                    outs = [F.linear(state, u) for state in live]
                    return torch.stack(outs) if steps else outs[0]

                use = ParameterUse(LINEAR[rule], call, edge, layout, part, sources, along, steps)
                self.pending.append((id(self._parameter(name)), use))

    def commit(self) -> None:
        """Hand the uses over once the whole layer was written out."""
        for parameter, use in self.pending:
            self.tape.uses.setdefault(parameter, []).append(use)


@contextmanager
def record(
    twin: nn.Module,
    batch_size: int,
    layouts: BatchLayouts,
    replay: dict[str, str],
    *,
    twice: bool = False,
) -> Iterator[Tape]:
    """Hook the twin so that the forward passes inside fill the tape; unhook on leaving.

    ``replay`` maps parameters to the modules replayed for them; modules with other parameters are
    recorded by their rules, or replayed where no rule covers one. ``twice``: gradients will be
    differentiated again.
    """
    tape = Tape(batch_size, layouts)
    handles = []
    unrolled: list[nn.Module] = []
    sites = set(replay.values())
    canonical = {id(p): name for name, p in twin.named_parameters()}
    for path, module in twin.named_modules():
        names = {
            n
            for n, p in module._parameters.items()
            if p is not None and p.requires_grad and canonical[id(p)] not in replay
        }
        rules = rules_for(module)
        if path in sites or (names and type(module) not in UNROLLED and not names <= set(rules)):
            if path != "":  # the root's call is the batch itself
                hook = functools.partial(_on_replayed, tape, path)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        elif not names:
            written_out = closed_form_forward(module, twice)
            if written_out is not None:
                module.forward = written_out  # type: ignore[method-assign]
                unrolled.append(module)
        elif type(module) in UNROLLED:
            _unroll(tape, path, module)
            unrolled.append(module)
        else:
            if isinstance(module, nn.Embedding) and (not layouts.settled or path in layouts.expand):
                before = functools.partial(_expand, tape, path)
                handles.append(module.register_forward_pre_hook(before))
            after = functools.partial(_on_rule, tape, path, rules)
            handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()
        for module in unrolled:
            del module.__dict__["forward"]


def check_inputs_unchanged(tape: Tape) -> None:
    """Raise where a recorded input was overwritten after its layer had read it."""
    for x, version, path in tape.versions:
        if x._version != version:
            raise FimprobeError(
                f"the input of layer {path!r} was changed in place after the layer had read it; "
                "use the out-of-place operation there"
            )


def _on_rule(tape, path, rules, module, args, kwargs, out) -> None:
    if isinstance(out, Tensor) and out.requires_grad:
        inputs = args if args else tuple(kwargs.values())
        if isinstance(module, nn.EmbeddingBag):
            inputs = (*args, *(kwargs[k] for k in ("input",) if k in kwargs))
            if kwargs.get("offsets") is not None:
                inputs = (*inputs, kwargs["offsets"])
            elif kwargs.get("per_sample_weights") is not None:
                inputs = (inputs[0], None, kwargs["per_sample_weights"])
        elif isinstance(module, nn.Bilinear):
            inputs = (*args, *kwargs.values())[:2]
        else:
            inputs = inputs[:1]
        tape.rule_call(path, module, rules, inputs, out)


def _on_replayed(tape, path, module, args, kwargs, out) -> None:
    tape.replayed_call(path, module, args, kwargs, out)


def _expand(tape: Tape, path: str, module: nn.Module, args: tuple[Any, ...]) -> Any:
    if not args or not isinstance(args[0], Tensor):
        return None
    index, size = args[0], tape.batch_size
    how = tape.layouts.expand.get(path)
    if how is None and not tape.layouts.settled and path not in tape.layouts.refused and size > 1:
        if index.dim() > 1 and index.shape[0] == 1:
            how = "leading"
        elif index.dim() == 1 and index.shape[0] != size:
            how = "missing"
        if how is not None:
            tape.layouts.expand[path] = how
    if how == "leading" and index.shape[0] == 1:
        index = index.expand(size, *index.shape[1:])
    elif how == "missing":
        index = index.expand(size, *index.shape)
    return (index, *args[1:])


def _unroll(tape: Tape, path: str, module: nn.Module) -> None:
    original, written_out = module.forward, UNROLLED[type(module)]

    def forward(*args: Any, **kwargs: Any) -> Any:
        affine = _AffineRecorder(tape, path, module)
        try:
            out = written_out(module, affine, *args, **kwargs)
        except NotUnrolled:
            tape.failed[path] = "packed, unbatched or extended by learned keys"
            return original(*args, **kwargs)
        affine.commit()
        return out

    module.forward = forward  # type: ignore[method-assign]
