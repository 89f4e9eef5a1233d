"""Values that an option accepts, in words: the source of error messages and the documentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Option:
    """The words that a field of the model carries beside its type; a field is annotated with it.

    Attributes:
        must_be: What the option accepts. Completes the sentence "`draws` must be ...".
        remedy: One sentence: what to write instead of a value that was rejected.
    """

    must_be: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class OptionDescription:
    """Everything that is known about one option; :func:`fimprobe.config.config.describe_options`.

    Attributes:
        name: Dotted, such as ``"schedule.budget"``.
        must_be: What the option accepts, see :class:`Option`.
        remedy: One sentence: what to write instead of a rejected value.
        effect: What the option does.
        default: In plain Python values, as a YAML file would hold it.
    """

    name: str
    must_be: str
    remedy: str
    effect: str
    default: Any
