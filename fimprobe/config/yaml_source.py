"""A YAML file's values, the line of each, and keys that stand twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fimprobe.errors import FimprobeError

Place = tuple[Any, ...]
"""The keys (and positions in lists) that lead to a value."""


class YamlFile(NamedTuple):
    """What a file holds."""

    values: dict[str, Any]
    lines: dict[Place, str]
    """``file:line`` of every value."""
    duplicates: list[str]
    """A sentence for each key that is given twice."""


def read_yaml(path: Path) -> YamlFile:
    """Read a file of keys and values.

    Raises:
        FimprobeError: with file and line, where it cannot be read or holds something else.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FimprobeError(f"config={str(path)!r} cannot be read: {error}") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise FimprobeError(
                f"{path}:1: the file is empty; write at least one key, such as draws: 2"
            )
        found = YamlFile({}, {}, [])
        _mark(node, (), path, found)
        values = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or error
        raise FimprobeError(f"{path}:{line}: not YAML: {problem}") from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise FimprobeError(
            f"{path}:{node.start_mark.line + 1}: the file holds {values!r}; write keys and values, "
            "such as draws: 2"
        )
    return found._replace(values=values)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: 1e-3 is a number; only true and false are booleans."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def _mark(node: yaml.Node, at: Place, path: Path, found: YamlFile) -> None:
    """Remember the line of every value, and find keys given twice."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*at, key.value)
            line = f"{path}:{key.start_mark.line + 1}"
            if place in found.lines:
                found.duplicates.append(f"{line}: key {'.'.join(map(str, place))!r} is given twice")
            found.lines[place] = line
            _mark(value, place, path, found)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            place = (*at, i)
            found.lines[place] = f"{path}:{value.start_mark.line + 1}"
            _mark(value, place, path, found)
