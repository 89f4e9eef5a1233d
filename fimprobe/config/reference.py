"""The table of options in ``docs/configuration.md`` and the JSON Schema, generated from the model.

``python -m fimprobe.config.reference`` rewrites both files of a checkout.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from fimprobe.config.config import Config, describe_options

PAGE = "docs/configuration.md"
SCHEMA = "fimprobe/config.schema.json"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the YAML file."""
    return Config.model_json_schema()


def option_table() -> str:
    """Return the Markdown table of all options: name, accepted values, default, effect."""
    rows = ["| option | accepted values | default | effect |", "|---|---|---|---|"]
    for option in describe_options().values():
        rows.append(
            f"| `{option.name}` | {option.must_be} | `{_as_yaml(option.default)}` | {option.effect} |"
        )
    return "\n".join(rows) + "\n"


def generate_reference(root: Path) -> dict[Path, str]:
    """Return the text of both generated files of the checkout ``root``, by path.

    Of the page only the table changes; the text around it is written by hand.
    """
    page = root / PAGE
    text = page.read_text(encoding="utf-8")
    table = re.compile(r"^\| option \|.*?\n(?!\|)", re.MULTILINE | re.DOTALL)
    return {
        page: table.sub(lambda _: option_table(), text),
        root / SCHEMA: json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n",
    }


def _as_yaml(value: Any) -> str:
    """A value on one line of YAML.

    >>> _as_yaml({"include": ["*"], "top": 12}), _as_yaml(None)
    ("{include: ['*'], top: 12}", 'null')
    """
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return text.removesuffix("...\n").strip()


if __name__ == "__main__":
    for path, generated in generate_reference(Path(__file__).parents[2]).items():
        path.write_text(generated, encoding="utf-8")
