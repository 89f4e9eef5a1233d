"""The examples of docs/theory.md print what the page shows."""

import doctest
import re

import pytest

from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "theory.md"
TEXT = PAGE.read_text(encoding="utf-8")


def section_doctests():
    """One doctest for each section of the page that has Python blocks; its blocks share their names."""
    examples = {}
    for block in re.finditer(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE):
        heading = re.findall(r"^## (.*)", TEXT[: block.start()], re.MULTILINE)[-1]
        first_line = TEXT.count("\n", 0, block.start(1))
        in_block = doctest.DocTestParser().get_examples(block[1], PAGE.name)
        assert in_block, f"the Python block at line {first_line} of {PAGE.name} has no example"
        for example in in_block:
            example.lineno += first_line
        examples.setdefault(heading, []).extend(in_block)
    return {
        heading: doctest.DocTest(in_section, {}, heading, str(PAGE), 0, None)
        for heading, in_section in examples.items()
    }


def test_all_examples_are_in_python_blocks():
    prompts = re.findall(r"^ *>>> ", TEXT, re.MULTILINE)
    assert prompts
    assert sum(len(test.examples) for test in section_doctests().values()) == len(prompts)


@pytest.mark.parametrize("heading", section_doctests())
def test_the_examples_of_a_section_pass(heading):
    output = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    result = runner.run(section_doctests()[heading], out=output.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(output)


def test_every_section_that_the_code_cites_is_there():
    """``docs/theory.md, "Heading"`` in docstrings, across line breaks too."""
    titles = set(re.findall(r"^#+ (?:\d+ )?(.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    cited = set()
    for path in (PAGE.parents[1] / "fimprobe").rglob("*.py"):
        text = re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))
        assert not re.search(r"theory(\.md)? §|\[P2\]|\bslide \d", text), path
        cited |= set(re.findall(r'docs/theory\.md, "([^"]+)"', text))
    assert cited and cited <= titles, cited - titles
