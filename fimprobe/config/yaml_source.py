"""A YAML file with the line of every value, and with keys that are given twice."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fimprobe.errors import FimprobeError

MAX_VALUE_CHARACTERS = 60
"""Longer values are cut in messages."""

MAX_FILE_BYTES = 2**18
"""Larger files are refused: PyYAML reads about 100 kB per second, and options need a few hundred."""

MAX_DEPTH = 20
"""Deeper files are refused before PyYAML's recursion fails; options need a depth of three."""

MAX_VALUES = 2**16
"""Values of a file with all aliases written out; nested aliases multiply and would fill memory."""

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
    text = _read_text(path)
    try:
        _check_size(text, path)
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
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise FimprobeError(
            f"{path}:{line}: the file must be YAML: the character {chr(error.character)!r} is not "
            "allowed. Remove it."
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or error
        raise FimprobeError(f"{path}:{line}: the file must be YAML: {problem}.") from None
    if not isinstance(values, dict):
        raise FimprobeError(
            f"{path}:{node.start_mark.line + 1}: the file must be a mapping, got {shorten(values)}. "
            "Write keys and values, such as draws: 2."
        )
    return replace(file, values=values)


def _read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        FimprobeError: If it cannot be read, is too large, or is not UTF-8.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError("it is a device or a pipe")
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise FimprobeError(
            f"`config` must be a readable text file, got {str(path)!r}: {error}. Check the path."
        ) from None
    if len(content) > MAX_FILE_BYTES:
        raise FimprobeError(
            f"{path}:1: the file must have at most {MAX_FILE_BYTES} bytes, got more. Check that it "
            "is a file of options."
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FimprobeError(
            f"{path}:{line}: `config` must be a readable text file, got the byte "
            f"0x{content[error.start]:02x}, which is not UTF-8. Save the file as UTF-8."
        ) from None


def _check_size(text: str, path: Path) -> None:
    """Check depth and size of a file from its events, before anything is built.

    The size of a value that is named by an anchor counts again at each alias.

    Raises:
        FimprobeError: With the line where a limit is passed, or where a value contains itself.
    """
    sizes: dict[str, int] = {}  # of complete values with an anchor
    open_values: list[tuple[str | None, int]] = [(None, 0)]  # anchor and size so far
    for event in yaml.parse(text, Loader=_Loader):
        size = 0
        anchor: str | None = getattr(event, "anchor", None)
        mark: Any = event.start_mark
        place = f"{path}:{mark.line + 1}"
        if isinstance(event, yaml.CollectionStartEvent):
            open_values.append((anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_values.pop()
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == name for name, _ in open_values):
                raise FimprobeError(
                    f"{place}: a value must not contain itself, got the alias *{anchor} inside of "
                    f"&{anchor}. Write the value out."
                )
            size, anchor = sizes.get(anchor or "", 1), None
        if size:
            if anchor is not None:
                sizes[anchor] = size
            open_values[-1] = open_values[-1][0], open_values[-1][1] + size
        if open_values[-1][1] > MAX_VALUES:
            raise FimprobeError(
                f"{place}: the file must have at most {MAX_VALUES} values with its aliases written "
                "out, got more. Check that it is a file of options."
            )
        if len(open_values) > MAX_DEPTH:
            raise FimprobeError(
                f"{place}: values must be nested at most {MAX_DEPTH} deep, got more. Check that it "
                "is a file of options."
            )


def shorten(value: Any) -> str:
    """Return a value as it would be typed, on one line and cut to ``MAX_VALUE_CHARACTERS``.

    >>> shorten([1, 2]), len(shorten("x" * 100))
    ('[1, 2]', 60)
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer of more than 4300 digits, or an object's own fault
        return f"a value of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[: MAX_VALUE_CHARACTERS - 1] + "…"


def shorten_key(key: Any) -> str:
    """Return a key for a message: line breaks and control characters as escapes, cut if long.

    >>> shorten_key("draws"), shorten_key("a\\nb"), shorten_key(3)
    ('draws', 'a\\\\nb', '3')
    """
    text = key if isinstance(key, str) else shorten(key)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[: MAX_VALUE_CHARACTERS - 1] + "…"


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: 1e-3 is a number; only true and false are booleans."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node; whatever its constructor raises becomes a YAML error.

        Args:
            node: The node.
            deep: Whether the values below are built at once.

        Raises:
            yaml.YAMLError: With the node's place, such as for ``!!int 2.5`` or a thirteenth month.
        """
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception:  # ValueError, KeyError, TypeError, AttributeError, OverflowError
            kind = node.tag.rpartition(":")[2]
            shown = shorten(node.value) if isinstance(node, yaml.ScalarNode) else "its content"
            problem = f"{shown} is not a value of the type {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


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


def _is_word(key: yaml.Node) -> bool:
    """Return whether a key is text, or a whole number that is written as Python writes it."""
    if not isinstance(key, yaml.ScalarNode):
        return False
    kind = key.tag.rpartition(":")[2]
    is_plain = key.value == "0" or (key.value.isdecimal() and key.value[0] != "0")
    return kind in ("str", "merge") or (kind == "int" and is_plain)


def _record_lines(node: yaml.Node, at: Place, path: Path, file: YamlFile) -> None:
    """Store the line of every value below ``node``, and report keys that are given twice."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = f"{path}:{key.start_mark.line + 1}"
            if not _is_word(key):
                kind = shorten(key.value) if isinstance(key, yaml.ScalarNode) else "a collection"
                raise FimprobeError(
                    f"{line}: a key must be a word, got {kind}. Write the name of an option."
                )
            place = (*at, key.value)
            if place in file.lines:
                key_name = ".".join(map(shorten_key, place))
                file.duplicates.append(f"{line}: `{key_name}` is given twice. Remove one.")
            file.lines[place] = line
            _record_lines(value, place, path, file)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            place = (*at, i)
            file.lines[place] = f"{path}:{value.start_mark.line + 1}"
            _record_lines(value, place, path, file)
