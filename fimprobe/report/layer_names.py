"""Short names of layers: what distinguishes them, without what they have in common."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

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
    classes = {}
    for parameter, how in record.get("coverage", {}).items():
        match = _CLASS.match(how)
        if match:
            classes[parameter.rpartition(".")[0]] = match[1]
    names = list(record["layers"])
    labels = dict(zip(names, shorten_names(names), strict=True))
    return {
        name: f"{label} {classes[name]}" if label[-1:].isdigit() and name in classes else label
        for name, label in labels.items()
    }


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
    """Return the end of a name, which distinguishes it, in at most ``width`` characters.

    >>> cut("layer.0 … query", 9), cut("total", 9)
    ('… … query', 'total')
    """
    return name if len(name) <= width else f"…{name[len(name) - width + 1 :]}"


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
    return [*(text for text in texts if len(text) < len(whole)), whole]
