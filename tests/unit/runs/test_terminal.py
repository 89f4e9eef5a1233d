"""A run in a terminal with rich: names of layers are text, and no markup."""

import io
import re

import pytest

from fimprobe.runs import terminal
from tests.support.reports import build_report

rich_console = pytest.importorskip("rich.console", reason="rich is not installed")

MARKUP = [
    "[red]markup",
    "[/]",
    "[bold]",
    "[link=http://a]x",
    "back\\slash",
    "\\[x]",
    ":smile:",
    "a[0]",
]


@pytest.fixture
def shown(monkeypatch):
    """What is printed of a report whose layers, advice and reasons hold the names."""
    record, lost = (build_report(len(MARKUP), 0, known=known).to_dict() for known in (True, False))
    groups = [*list(lost["layers"].values())[:3], *list(record["layers"].values())[3:]]
    record["layers"] = dict(zip(MARKUP, groups, strict=True))
    record["advice"] = [f"Take more inputs for {name}." for name in MARKUP]
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(terminal.sys.stdout, "isatty", lambda: True, raising=False)
    console = terminal._console()
    console.file = io.StringIO()
    monkeypatch.setattr(terminal, "_console", lambda: console)
    terminal.show_run([record], len(MARKUP), {})
    return console.file.getvalue()


def test_names_are_no_markup(shown):
    for name in MARKUP:
        assert f"Take more inputs for {name}." in shown
        assert any(line.startswith(name) for line in shown.splitlines())
    names = re.search("^– .* in (.*): too few inputs", shown, re.MULTILINE)[1]
    assert set(names.split(", ")) == set(MARKUP[:3])


@pytest.mark.parametrize("name", MARKUP)
def test_escaped_text_is_printed_as_it_is(name):
    file = io.StringIO()
    console = rich_console.Console(file=file, width=200, highlight=False, emoji=False)
    console.print(f"[bold]{terminal._plain(name)}[/bold]")
    assert file.getvalue() == f"{name}\n"
