"""Hooks that record a forward pass of the twin on a tape, and leave no trace on the twin."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fimprobe.engines.layers.activations import closed_form_forward
from fimprobe.engines.layers.decompositions import UNROLLED, NotUnrolled
from fimprobe.engines.layers.rules import rules_for
from fimprobe.engines.tracing.affine_recorder import AffineRecorder
from fimprobe.engines.tracing.batch_layout import BatchLayouts
from fimprobe.engines.tracing.graph import keeps_output
from fimprobe.engines.tracing.tape import Tape
from fimprobe.model.twin import has_altered_call, is_transformed


@contextmanager
def record_forward(
    twin: nn.Module,
    batch_size: int,
    layouts: BatchLayouts,
    fallbacks: dict[str, str],
    *,
    twice_differentiable: bool = False,
) -> Iterator[Tape]:
    """Record the forward passes of the twin inside the context.

    A module is recorded by its rules if they cover all its trainable parameters without a planned
    fallback. A multi-head attention or recurrent layer is decomposed into affine maps. Any other
    module with such parameters, or with a planned fallback, becomes a fallback call.

    Args:
        twin: The copy of the model that is measured.
        batch_size: Number of samples.
        layouts: The place of the batch at each module; new ones are added unless they are settled.
        fallbacks: For parameters with a planned fallback, the module that is re-evaluated.
        twice_differentiable: Whether gradients will be differentiated again. Activations are then
            replaced by equivalent ones with closed second derivatives.

    Yields:
        The tape.
    """
    tape = Tape(batch_size, layouts)
    handles = []
    replaced: list[nn.Module] = []
    fallback_paths = set(fallbacks.values())
    canonical = {id(p): name for name, p in twin.named_parameters()}
    for path, module in twin.named_modules():
        names = {
            n
            for n, p in module._parameters.items()
            if p is not None and p.requires_grad and canonical[id(p)] not in fallbacks
        }
        altered = has_altered_call(module)
        rules = rules_for(module)
        decomposed = type(module) in UNROLLED and not altered
        uncovered = not decomposed and not names <= set(rules)
        if path in fallback_paths or uncovered:
            if path != "":  # a call of the whole model has the batch as its input
                hook = functools.partial(
                    _record_fallback_call, tape, path, twice_differentiable=twice_differentiable
                )
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        elif not names and altered:
            continue
        elif not names:
            closed_form = closed_form_forward(module, twice_differentiable)
            if closed_form is not None:
                module.forward = closed_form  # type: ignore[method-assign]
                replaced.append(module)
        elif decomposed:
            _decompose(tape, path, module)
            replaced.append(module)
        else:
            if path in layouts.expand:
                before = functools.partial(expand_index, layouts.expand[path], batch_size)
                handles.append(module.register_forward_pre_hook(before))
            after = functools.partial(_record_rule_call, tape, path)
            handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            del module.__dict__["forward"]


_TRANSFORMED = "it runs under a transformation of torch.func"
"""Why a call has no edges: its tensors belong to the transformation."""


def _record_rule_call(
    tape: Tape,
    path: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
) -> None:
    """Forward hook: record a call with the inputs that the layer's rules read."""
    if is_transformed():
        tape.failures[path] = _TRANSFORMED
        return
    if not (isinstance(out, Tensor) and out.requires_grad):
        return
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
    tape.add_rule_call(path, module, rules_for(module), inputs, out)


def _record_fallback_call(
    tape: Tape,
    path: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
    *,
    twice_differentiable: bool,
) -> Any:
    """Forward hook: record a call that is re-evaluated for single samples.

    Args:
        tape: Receives the call.
        path: The module's path.
        module: The module.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: What it returned.
        twice_differentiable: Whether gradients will be differentiated again.

    Returns:
        What takes the place of ``out``: the same values, with an edge that no backward reads.
    """
    if is_transformed():
        tape.failures[path] = _TRANSFORMED
        return out
    if twice_differentiable:
        out = tree_map(functools.partial(_separate_edge, tape, path), out)
    tape.add_fallback_call(path, module, args, kwargs, out)
    return out


def _separate_edge(tape: Tape, path: str, x: Any) -> Any:
    """Copy an output that the backward of its own operation reads; return others as they are.

    The derivative of tanh is written in terms of its output z. A second derivative with respect to z
    would contain that dependence as well, although it lies inside the module. The re-evaluation of
    the module accounts for it already. At a copy's edge, only later operations are differentiated.
    """
    if not isinstance(x, Tensor) or x.grad_fn is None or not keeps_output(x.grad_fn):
        return x
    tape.separated[x.grad_fn] = path
    return x.clone()


def expand_index(kind: str, size: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
    """Forward pre-hook: give a lookup's index a batch dimension, so that each sample has a δ.

    Position embeddings are looked up once for the whole batch, with an index [T] or [1, T]. The
    expansion does not change the outputs of a model that adds them to each sample. The outputs are
    compared before a plan contains an expansion.

    Args:
        kind: "leading" or "missing", see :class:`BatchLayouts`.
        size: Number of samples B.
        module: The lookup.
        args: Its arguments.

    Returns:
        The arguments with an index [B, ...]; None to leave them as they are.
    """
    if not args or not isinstance(args[0], Tensor) or is_transformed():
        return None
    index = args[0]
    if kind == "missing":
        return (index.expand(size, *index.shape), *args[1:])
    if index.shape[:1] == (1,):
        return (index.expand(size, *index.shape[1:]), *args[1:])
    return None


def _decompose(tape: Tape, path: str, module: nn.Module) -> None:
    """Replace the layer's forward by its decomposition into recorded affine maps."""
    original, decomposition = module.forward, UNROLLED[type(module)]

    def forward(*args: Any, **kwargs: Any) -> Any:
        if is_transformed():
            tape.failures[path] = _TRANSFORMED
            return original(*args, **kwargs)
        affine = AffineRecorder(tape, module)
        try:
            out = decomposition(module, affine, *args, **kwargs)
        except NotUnrolled:
            tape.failures[path] = "packed, unbatched or extended by learned keys"
            return original(*args, **kwargs)
        affine.commit()
        return out

    module.forward = forward  # type: ignore[method-assign]
