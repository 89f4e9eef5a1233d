"""Mistakes in a configuration, in sentences: where, the value, what is allowed, what was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fimprobe.config.yaml_source import Place

BOOLEANS = {
    "yes": "true", "on": "true", "y": "true", "true": "true",
    "no": "false", "off": "false", "n": "false", "false": "false",
}  # fmt: skip
"""What people write for true and false: text, in YAML 1.2."""


def format_validation_errors(
    problems: Iterable[Mapping[str, Any]],
    *,
    allowed: Mapping[str, str],
    keys: Mapping[str, Iterable[str]],
    lines: Mapping[Place, str],
) -> list[str]:
    """A sentence for each value that ``problems`` (pydantic's ``errors()``) find fault with.

    A value that fits no branch of a union is one mistake, not one a branch. ``allowed``: by the
    option's name, what it takes; ``keys``: the keys of each mapping; ``lines``: ``file:line``.
    """
    problems = list(problems)
    inner = {_place(p) for p in problems if len(_place(p)) > 1}
    grouped: dict[Place, list[Mapping[str, Any]]] = {}
    for problem in problems:
        place = _place(problem)
        mapping = isinstance(problem.get("input"), dict)
        if mapping and any(p[: len(place)] == place and len(p) > len(place) for p in inner):
            continue  # a mapping was meant: what is wrong inside of it says more
        grouped.setdefault(place, []).append(problem)
    found = []
    for place, group in grouped.items():
        at = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), "")
        text = _sentence(place, group, allowed, keys)
        found.append(f"{at}: {text}" if at else text)
    return found


def _sentence(
    place: Place,
    group: list[Mapping[str, Any]],
    allowed: Mapping[str, str],
    keys: Mapping[str, Iterable[str]],
) -> str:
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[1:]
    option = ".".join(str(part) for part in place if not isinstance(part, int))
    kinds = {problem["type"] for problem in group}
    if kinds & {"extra_forbidden", "invalid_key"}:
        known = list(keys[".".join(map(str, place[:-1]))])
        return f"unknown key {name!r}; {_near(place[-1], known) or 'known keys: ' + ', '.join(known)}"
    value = group[0].get("input")
    shown = f"{name}={_short(value)}"
    if kinds == {"value_error"}:  # a sentence of our own
        told = str(group[0]["msg"]).removeprefix("Value error, ")
        if told.startswith(name):
            return told
        return f"{name}: {told}" if isinstance(value, dict) else f"{shown}: {told}"
    words = [  # of every branch that is a word
        word
        for problem in group
        if problem["type"] == "literal_error"
        for word in re.findall(r"'([^']*)'", problem["ctx"]["expected"])
    ]
    near = _near(value, words)
    meant = BOOLEANS.get(value.lower()) if isinstance(value, str) else None
    if meant is not None and meant in re.findall(r"\w+", allowed[option]):
        near = f"did you mean {meant}?"
    text = f"{shown}: use {allowed[option]}"
    return f"{text}; {near}" if near else text


def _place(problem: Mapping[str, Any]) -> Place:
    """Where a problem is, without the names that pydantic gives the branches of a union."""
    return tuple(part for part in problem["loc"] if not _is_branch(part))


def _is_branch(part: Any) -> bool:
    return isinstance(part, str) and (
        part in ("int", "float", "str", "bool", "none", "[key]")
        or part.startswith("literal[")
        or part[:1].isupper()
    )


def _near(value: Any, words: list[str]) -> str:
    """The word that was meant, where one is close."""
    by_lower = {word.lower(): word for word in words}
    near = difflib.get_close_matches(str(value).lower(), by_lower, 1)
    return f"did you mean {by_lower[near[0]]!r}?" if near else ""


def _short(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"
