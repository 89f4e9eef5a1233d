"""The outputs of a model that its loss reads: which they are, and the family of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods import Joint
from fimprobe.model.outputs import named_outputs, select_outputs
from fimprobe.training.capture.captured_output import CapturedOutput
from fimprobe.training.likelihood_inference.data_labels import labels_from_gradient
from fimprobe.training.likelihood_inference.loss_inference import Decision, infer_from_gradient
from fimprobe.training.likelihood_inference.regression_inference import infer_regression

MAX_INFERENCE_OUTPUTS = 2**24
"""Outputs of a batch that are examined, at least those of one sample: 128 MiB per float64 copy."""

MAX_HEADS = 16
"""Outputs of a model that are examined, those first on which no other depends."""

_CHANGED_BEFORE_LOSS = Decision(
    likelihood=None,
    reason=(
        "the outputs of the model were changed in place before the loss, so the loss is not that of "
        "the values that the model returned"
    ),
    remedy=(
        "Change them out of place (logits = logits / 2) inside the model's forward, so that it "
        "returns what the loss reads; or pass likelihood= for the outputs as the model returns them"
    ),
)
_CHANGED_AFTER_BACKWARD = Decision(
    likelihood=None,
    reason="the outputs of the model were changed in place between the backward pass and the step",
    final=False,
)
NO_GRADIENT = Decision(
    likelihood=None,
    reason="no gradient arrived at the model's outputs (or they are not a single tensor)",
    final=False,
)


def find_heads(returned: Any, output: Callable[[Any], Any] | None) -> dict[str, Tensor]:
    """Return the outputs that a loss may read, by the path of ``named_outputs``.

    Args:
        returned: What the model returned.
        output: The user's function from it to its outputs; None for all that it returned.

    Returns:
        Outputs with a graph, at most ``MAX_HEADS``. The key of a single one is "".

    Raises:
        FimprobeError: If there is only one, and no tensor of outputs.
    """
    selected = returned if output is None else output(returned)
    if isinstance(selected, Tensor):
        return {"": selected}
    named: dict[str, Tensor] = {}
    edges = set()
    for path, x in named_outputs(selected).items():
        edge = (x.grad_fn, x.output_nr)
        if x.grad_fn is not None and edge not in edges:
            edges.add(edge)
            named[path] = x
    if len(named) < 2:
        return {"": select_outputs(selected)}
    if len(named) > MAX_HEADS:
        feeds = find_feeds(named)
        named = dict(sorted(named.items(), key=lambda item: bool(feeds[item[0]]))[:MAX_HEADS])
    return named


def find_feeds(outputs: Mapping[str, Tensor]) -> dict[str, frozenset[str]]:
    """Return for each output the others that are computed from it, as the autograd graph shows."""
    feeds: dict[str, set[str]] = {path: set() for path in outputs}
    for path, x in outputs.items():
        reached = _reached_edges(x)
        for other, y in outputs.items():
            if other != path and (y.grad_fn, y.output_nr) in reached:
                feeds[other].add(path)
    return {path: frozenset(others) for path, others in feeds.items()}


def find_other_heads(returned: Any, measured: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs beside the measured ones that a loss may read.

    Outputs that the measured ones are computed from, or that are computed from them, are none; nor
    are those that another one is computed from.

    Args:
        returned: What the model returned.
        measured: The measured outputs.
    """
    if isinstance(returned, Tensor):
        return {}
    edges = {(x.grad_fn, x.output_nr) for x in measured.values()}
    named = {
        path: x
        for path, x in named_outputs(returned).items()
        if x.grad_fn is not None and (x.grad_fn, x.output_nr) not in edges
    }
    if not named:
        return {}
    marked = {f"measured {path}": x for path, x in measured.items() if x.grad_fn is not None}
    feeds = find_feeds({**dict(list(named.items())[: 2 * MAX_HEADS]), **marked})
    related = {path for mark in marked for path in feeds[mark]}
    return {
        path: named[path]
        for path, others in feeds.items()
        if path in named and not others and path not in related
    }


def infer_from_loss(head: CapturedOutput) -> Decision:
    """Infer the family from the loss gradient at one output."""
    if head.changed_before_loss:
        return _CHANGED_BEFORE_LOSS
    if head.changed:
        return _CHANGED_AFTER_BACKWARD
    outputs, gradient = head.outputs, head.gradient
    if outputs is None or gradient is None:
        return NO_GRADIENT
    return infer_from_gradient(*_first_rows(outputs, gradient))


def _infer_from_only_head(head: CapturedOutput) -> Decision:
    """Infer the family of the only output that the loss reads, which may be that of a regression."""
    decision = infer_from_loss(head)
    if not decision.unmatched:
        return decision
    assert head.outputs is not None and head.gradient is not None
    return infer_regression(*_first_rows(head.outputs, head.gradient)) or decision


def infer_from_heads(heads: Mapping[str, CapturedOutput], *, final: bool) -> Decision:
    """Infer the family of each output that the loss reads.

    Args:
        heads: The outputs of one forward.
        final: Whether no further batch will be examined.

    Returns:
        The decision. If the loss reads several outputs, its family is their joint one; if it reads
        one of several, ``path`` names it.
    """
    if not heads:
        return NO_GRADIENT
    if len(heads) == 1:
        return _infer_from_only_head(next(iter(heads.values())))
    decisions = {path: infer_from_loss(head) for path, head in heads.items() if is_read(head)}
    if not decisions:
        return NO_GRADIENT
    if len(decisions) == 1:
        decisions = {path: _infer_from_only_head(heads[path]) for path in decisions}
    matched = {path: d for path, d in decisions.items() if d.likelihood is not None}
    explained = {other for path in matched for other in heads[path].feeds}
    # the gradient at an output that another one is computed from is explained by that one
    unknown = {
        path: decision
        for path, decision in decisions.items()
        if path not in matched and path not in explained and not heads[path].feeds & set(decisions)
    }
    matched = {path: decision for path, decision in matched.items() if path not in explained}
    undecided = [d for d in unknown.values() if not d.final]
    if undecided and not final:
        return undecided[0]
    if not matched:
        return _without_family(unknown or decisions)
    return _join(matched, unknown, heads)


def describe_unmeasured(paths: Iterable[str], measured: Iterable[str], reason: str = "") -> str:
    """Return the note about outputs that the loss reads and no measurement includes.

    Args:
        paths: Names of the outputs.
        measured: Names of the measured outputs.
        reason: Why, with a space before it.
    """
    paths = list(paths)
    names = ", ".join(map(repr, paths))
    example = ", ".join(f"{path!r}: ..." for path in [*measured, *paths])
    return (
        f"The loss also reads other outputs of the model, {names}, which are not measured{reason}: "
        "their part of the Fisher information is left out. Pass likelihood= a mapping from every "
        f"output that the loss reads to its family: {{{example}}}."
    )


def _join(
    matched: Mapping[str, Decision],
    unknown: Mapping[str, Decision],
    heads: Mapping[str, CapturedOutput],
) -> Decision:
    """Return the decision for the outputs whose family is known, with notes on the rest."""
    notes = []
    if unknown:
        reasons = "; ".join(dict.fromkeys(d.reason for d in unknown.values()))
        notes.append(describe_unmeasured(unknown, matched, f" ({reasons})"))
    if len(matched) == 1:
        ((path, decision),) = matched.items()
        return replace(decision, path=path, notes=tuple(notes), unmeasured=tuple(unknown))
    families = {path: d.likelihood for path, d in matched.items() if d.likelihood is not None}
    joint = Joint(families=families)
    weights = _weights({path: heads[path] for path in matched}, families)
    if weights:
        notes.append(weights)
    reasons = "; ".join(f"{path!r}: {d.reason}" for path, d in matched.items())
    return Decision(
        likelihood=joint,
        reason=f"the loss reads {len(matched)} outputs, whose labels are independent ({reasons})",
        notes=tuple(notes),
        unmeasured=tuple(unknown),
    )


def _weights(heads: Mapping[str, CapturedOutput], families: Mapping[str, Any]) -> str:
    """Return a note if the loss weighs the labels of the heads differently; else empty."""
    scales = {}
    for path, head in heads.items():
        assert head.outputs is not None and head.gradient is not None
        outputs, gradient = _first_rows(head.outputs, head.gradient)
        try:
            labels = labels_from_gradient(outputs, gradient, families[path])
        except FimprobeError:  # soft or weighted labels, or counts
            return ""
        score = families[path].data_score(outputs, labels).double()
        square = float(score.square().sum())
        if square == 0:
            return ""
        scales[path] = -float((score * gradient.double()).sum()) / square
    largest = max(scales.values())
    if min(scales.values()) > 0.98 * largest:
        return ""
    ratios = ", ".join(f"{path!r} {scale / largest:.2g}" for path, scale in scales.items())
    return (
        f"The loss weighs one label of each output differently ({ratios}). The joint likelihood "
        "counts every label once, so its Fisher information is not that of the weighted loss."
    )


def _without_family(decisions: Mapping[str, Decision]) -> Decision:
    """Return the decision if the gradient at no output matches a family."""
    if len(decisions) == 1:
        ((path, decision),) = decisions.items()
        return Decision(
            likelihood=None,
            reason=f"at output {path!r} {decision.reason}",
            final=decision.final,
            remedy=decision.remedy,
        )
    reasons = "; ".join(f"{path!r}: {d.reason}" for path, d in decisions.items())
    example = ", ".join(f"{path!r}: 'categorical'" for path in decisions)
    return Decision(
        likelihood=None,
        reason=f"the loss reads several outputs, and the family of none is known ({reasons})",
        final=all(d.final for d in decisions.values()),
        remedy=f"Pass likelihood= a mapping from outputs to families, such as {{{example}}}",
    )


def is_read(head: CapturedOutput) -> bool:
    """Return whether a gradient that is not zero arrived at an output."""
    gradient = head.gradient
    return head.gradient_arrived and (gradient is None or bool(gradient.any()))


def _first_rows(outputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that are examined: computations in float64 make several copies."""
    if outputs.numel() <= MAX_INFERENCE_OUTPUTS:
        return outputs, gradient
    rows = max(1, MAX_INFERENCE_OUTPUTS // outputs[0].numel())
    return outputs[:rows], gradient[:rows]


def _reached_edges(x: Tensor) -> set[tuple[Any, int]]:
    """Return the edges of the autograd graph from which a tensor is computed."""
    edges: set[tuple[Any, int]] = set()
    nodes: list[torch.autograd.graph.Node] = [] if x.grad_fn is None else [x.grad_fn]
    seen = set(nodes)
    while nodes:
        for node, number in nodes.pop().next_functions:
            if node is None:
                continue
            edges.add((node, number))
            if node not in seen:
                seen.add(node)
                nodes.append(node)
    return edges
