"""Short names of layers: what distinguishes them, without what they have in common."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

from fimprobe.report.record import Record

WHOLE_NAME = 20
"""Characters up to which a name without the common modules is shown whole."""

_CLASS = re.compile(r"\w+: (\w+) (?:rule|written out)")
"""The class of the layer in the coverage of its parameter."""


def label_layers(record: Record) -> dict[str, str]:
    """Return a short name of each layer by its name in the model.

    A name that ends in a number gets the class of the layer, where the record has it.

    >>> coverage = {"0.weight": "autograd: Conv2d rule", "10.weight": "autograd: Linear rule"}
    >>> label_layers({"layers": {"0": {}, "10": {}}, "coverage": coverage})
    {'0': '0 Conv2d', '10': '10 Linear'}
    """
    return dict(_labels(tuple(record["layers"]), tuple(record.get("coverage", {}).items())))


@lru_cache(maxsize=8)
def _labels(names: tuple[str, ...], coverage: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Return the labels of layers; all reports of a run have the same ones."""
    return name_layers(names, layer_classes({"coverage": dict(coverage)}))


def name_layers(names: Sequence[str], classes: Mapping[str, str]) -> dict[str, str]:
    """Return a short name of each layer by its name in the model.

    Args:
        names: The names in the model.
        classes: The class of each layer by its name, where it is known.
    """
    labels = dict(zip(names, shorten_names(names), strict=True))
    return {
        name: f"{label} {classes[name]}" if label[-1:].isdigit() and name in classes else label
        for name, label in labels.items()
    }


def layer_classes(record: Record) -> dict[str, str]:
    """Return the class of each layer by its name, where the record has it."""
    classes = {}
    for parameter, how in record.get("coverage", {}).items():
        match = _CLASS.match(how)
        if match:
            classes[parameter.rpartition(".")[0]] = match[1]
    return classes


def shorten_names(names: Sequence[str]) -> list[str]:
    """Return names without their common modules; long ones without their middle. All stay distinct.

    >>> shorten_names([f"encoder.layer.{i}.attention.self.query" for i in (0, 1)])
    ['layer.0 … query', 'layer.1 … query']
    >>> shorten_names(["features.0", "features.10", "classifier"])
    ['features.0', 'features.10', 'classifier']
    """
    paths = _without_common_modules([name.split(".") for name in names])
    candidates = [_candidates(path) for path in paths]
    uses = Counter(text for texts in candidates for text in set(texts))
    return [next((text for text in texts if uses[text] == 1), texts[-1]) for texts in candidates]


def cut(name: str, width: int) -> str:
    """Return the end of a name in at most ``width`` characters; names may become equal.

    >>> cut("layer.0 … query", 9), cut("total", 9)
    ('… … query', 'total')
    """
    return name if len(name) <= width else f"…{name[len(name) - width + 1 :]}"


def fit_labels(labels: Sequence[str], width: int) -> list[str]:
    """Return labels in at most ``width`` characters; those that differ still differ.

    In names that are too long, modules behind the number become initials, then those before it.

    Args:
        labels: The labels.
        width: Number of characters.

    >>> fit_labels(["layer.0 … output.LayerNorm", "layer.0.output.LayerNorm", "head"], 20)
    ['layer.0…o.LayerNorm', 'layer.0.o.LayerNorm', 'head']
    """
    candidates = [_shorter(label, width) for label in labels]
    uses = Counter(text for texts in candidates for text in set(texts))
    return [
        next((text for text in texts if uses[text] == 1), cut(f"{label} {i}", width))
        if len(label) > width
        else label
        for i, (label, texts) in enumerate(zip(labels, candidates, strict=True))
    ]


def _shorter(label: str, width: int) -> list[str]:
    """Return the texts for a label in at most ``width`` characters, the clearest first."""
    if len(label) <= width:
        return [label]
    texts = [f"…{label.rpartition(' … ')[2]}", f"…{label[len(label) - width + 1 :].lstrip(' .…')}"]
    if any(map(str.isdigit, label)):
        texts = [_abbreviate(label, front=False), _abbreviate(label, front=True), *texts]
    return [text for text in texts if len(text) <= width]


def _abbreviate(label: str, *, front: bool) -> str:
    """Return a label with initials for the modules behind its first number, but for the last one.

    Args:
        label: The label.
        front: Whether those before the number become initials as well.
    """
    *parts, last = re.split(r"( … |\.)", label)
    is_behind, shown = front, ""
    for part in parts:
        has_number = any(map(str.isdigit, part))
        is_whole = has_number or not is_behind or part == " … "
        shown += part.strip() if is_whole else part[:1]
        is_behind = is_behind or has_number
    return shown + last


def _without_common_modules(paths: list[list[str]]) -> list[list[str]]:
    shared = 0
    while len(paths) > 1 and all(
        len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths
    ):
        shared += 1
    if shared and any(path[shared].isdigit() for path in paths):
        shared -= 1  # a number alone names nothing
    return [path[shared:] for path in paths]


def _candidates(path: list[str]) -> list[str]:
    """Return the texts for a path of modules, the shortest first and the whole one last."""
    whole = ".".join(path)
    if len(whole) <= WHOLE_NAME:
        return [whole]
    number = next((i for i, module in enumerate(path) if module.isdigit()), 0)
    texts = []
    for start in dict.fromkeys((max(number - 1, 0), 0)):
        head = ".".join(path[start : number + 1])
        for tail in range(len(path) - 1, number + 1, -1):
            texts.append(f"{head} … {'.'.join(path[tail:])}")
        texts.append(".".join(path[start:]))  # nothing is hidden behind the number
    return [*(text for text in texts if len(text) < len(whole)), whole]
