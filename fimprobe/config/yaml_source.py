"""A YAML file with the line of every value, and with keys that are given twice."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fimprobe.errors import FimprobeError

Place = tuple[Any, ...]
"""The keys (and positions in lists) that lead to a value."""


@dataclass(frozen=True, kw_only=True)
class YamlFile:
    """The content of a file.

    Attributes:
        values: Its keys and values.
        lines: ``file:line`` of every value.
        duplicates: One sentence for each key that is given twice.
    """

    values: dict[str, Any]
    lines: dict[Place, str]
    duplicates: list[str]


def read_yaml(path: Path) -> YamlFile:
    """Read a file of keys and values.

    Raises:
        FimprobeError: With file and line, if it cannot be read or is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FimprobeError(
            f"`config` must be a readable text file, got {str(path)!r}: {error}. Check the path."
        ) from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise FimprobeError(
                f"{path}:1: the file is empty. Write at least one key, such as draws: 2."
            )
        file = YamlFile(values={}, lines={}, duplicates=[])
        _record_lines(node, (), path, file)
        values = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or error
        raise FimprobeError(f"{path}:{line}: the file must be YAML: {problem}.") from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise FimprobeError(
            f"{path}:{node.start_mark.line + 1}: the file must be a mapping, got {values!r}. Write "
            "keys and values, such as draws: 2."
        )
    return replace(file, values=values)


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


def _record_lines(node: yaml.Node, at: Place, path: Path, file: YamlFile) -> None:
    """Store the line of every value below ``node``, and report keys that are given twice."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*at, key.value)
            line = f"{path}:{key.start_mark.line + 1}"
            if place in file.lines:
                key_name = ".".join(map(str, place))
                file.duplicates.append(f"{line}: `{key_name}` is given twice. Remove one.")
            file.lines[place] = line
            _record_lines(value, place, path, file)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            place = (*at, i)
            file.lines[place] = f"{path}:{value.start_mark.line + 1}"
            _record_lines(value, place, path, file)
