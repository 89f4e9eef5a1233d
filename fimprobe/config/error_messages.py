"""Mistakes in a configuration as sentences: the option, what it must be, the value, the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fimprobe.config.option import OptionDescription
from fimprobe.config.yaml_source import Place, shorten, shorten_key

BOOLEANS = {
    "yes": "true", "on": "true", "y": "true", "true": "true",
    "no": "false", "off": "false", "n": "false", "false": "false",
}  # fmt: skip
"""Words that people write for true and false, and that YAML 1.2 reads as text."""


def format_validation_errors(
    problems: Iterable[Mapping[str, Any]],
    *,
    options: Mapping[str, OptionDescription],
    lines: Mapping[Place, str],
) -> list[str]:
    """Return one sentence for each wrong value.

    A value that fits no branch of a union is one mistake, although pydantic lists each branch.

    Args:
        problems: What ``errors()`` of pydantic's exception lists.
        options: Description of every option by dotted name.
        lines: ``file:line`` of the values that are in a file.
    """
    problems = list(problems)
    nested_places = {_place(p) for p in problems if len(_place(p)) > 1}
    grouped: dict[Place, list[Mapping[str, Any]]] = {}
    for problem in problems:
        place = _place(problem)
        if isinstance(problem.get("input"), dict) and any(
            p[: len(place)] == place and len(p) > len(place) for p in nested_places
        ):
            continue  # a mapping was meant: the mistake inside of it is more precise
        grouped.setdefault(place, []).append(problem)
    sentences = []
    for place, group in grouped.items():
        # a missing line is that of the mapping around it
        known = (lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines)
        line = next(known, "")
        sentence = _sentence(place, group, options)
        sentences.append(f"{line}: {sentence}" if line else sentence)
    return sentences


def _sentence(
    place: Place, group: list[Mapping[str, Any]], options: Mapping[str, OptionDescription]
) -> str:
    kinds = {problem["type"] for problem in group}
    if kinds & {"extra_forbidden", "invalid_key"}:
        return _unknown_option(place, options)
    if kinds == {"value_error"}:  # the validator wrote the whole message
        return str(group[0]["msg"]).removeprefix("Value error, ")
    option = options[".".join(part for part in place if not isinstance(part, int))]
    value = group[0].get("input")
    positions = "".join(f" at position {part}" for part in place if isinstance(part, int))
    for problem in group:
        if problem["type"] == "less_than_equal":
            limit = f"at most {problem['ctx']['le']:.0f}"
            return (
                f"`{option.name}` must be {limit}, got {shorten(value)}{positions}. {option.remedy}"
            )
    literals = [  # of every branch that is a literal
        word
        for problem in group
        if problem["type"] == "literal_error"
        for word in re.findall(r"'([^']*)'", problem["ctx"]["expected"])
    ]
    boolean = BOOLEANS.get(value.lower()) if isinstance(value, str) else None
    if boolean is not None and boolean in re.findall(r"\w+", option.must_be):
        hint = f"Did you mean {boolean}?"
    else:
        hint = _similar(value, literals) or option.remedy
    return f"`{option.name}` must be {option.must_be}, got {shorten(value)}{positions}. {hint}"


def _unknown_option(place: Place, options: Mapping[str, OptionDescription]) -> str:
    section = "".join(f"{part}." for part in place[:-1])
    names = [name.removeprefix(section) for name in options if name.startswith(section)]
    keys = [name for name in names if "." not in name]
    hint = _similar(place[-1], keys) or f"Known keys: {', '.join(keys)}."
    return f"`{section}{shorten_key(place[-1])}` is not an option. {hint}"


def _place(problem: Mapping[str, Any]) -> Place:
    """The keys that lead to a problem, without pydantic's names for the branches of a union."""
    *path, last = problem["loc"]
    if problem["type"] == "invalid_key" and last == "[key]":
        *path, last = path
    keys = tuple(part for part in path if not _is_branch(part))
    # an unknown key may look like the name of a branch, such as `Draws` or `int`
    is_key = problem["type"] in ("extra_forbidden", "invalid_key")
    return (*keys, last) if is_key or not _is_branch(last) else keys


def _is_branch(part: Any) -> bool:
    return isinstance(part, str) and (
        part in ("int", "constrained-int", "float", "str", "constrained-str", "bool", "none", "[key]")
        or part.startswith("literal[")
        or part[:1].isupper()
    )


def _similar(value: Any, words: list[str]) -> str:
    """The question after the word that was meant, or an empty string if none is similar."""
    by_lower = {word.lower(): word for word in words}
    similar = difflib.get_close_matches(shorten_key(value).lower(), by_lower, 1)
    return f"Did you mean {by_lower[similar[0]]!r}?" if similar else ""
