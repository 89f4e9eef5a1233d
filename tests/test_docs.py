"""The pages: links lead somewhere, tables agree with the code, examples run."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel
from test_layout import ROOMS

import fimprobe

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
RUN = [DOCS / "index.md", DOCS / "tutorial.md", DOCS / "guides" / "likelihoods.md"]
PAGES_BY_NAME = {page.relative_to(ROOT).as_posix(): page for page in PAGES}


def read(page):
    return page.read_text(encoding="utf-8")


def prose(text):
    """A page without its code blocks and inline code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)


def anchors(page):
    """The anchors of the headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
    names, counts = set(), {}
    for heading in re.findall(r"^#{1,6} (.*)$", text, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = counts.get(name, 0)
        counts[name] = number + 1
        names.add(f"{name}-{number}" if number else name)
    return names


def rows(page):
    """The cells of all table rows of a page."""
    for line in read(page).splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_the_readme_is_short():
    assert len(read(README).splitlines()) <= 130


@pytest.mark.parametrize("name", PAGES_BY_NAME)
def test_links_lead_somewhere(name):
    page = PAGES_BY_NAME[name]
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(read(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        known = file.exists() and file.is_relative_to(ROOT)
        if not known or (anchor and (file.suffix != ".md" or anchor not in anchors(file))):
            wrong.append(target)
    assert not wrong


def test_every_page_is_linked_from_the_index():
    linked = {
        (DOCS / target.partition("#")[0]).resolve()
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(read(DOCS / "index.md")))
    }
    assert set(DOCS.rglob("*.md")) - {DOCS / "index.md"} <= linked


def test_named_files_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:fimprobe|tests|examples)/[\w/.]*\w)/?`", read(page)):
            assert (ROOT / name).exists(), (page.name, name)


def options(model, prefix=""):
    """Dotted name -> default of every option."""
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            kind, default = type(default), default.model_dump(exclude_none=name == "schedule")
            yield prefix + name, default
            yield from options(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, default


def test_configuration_has_every_option_with_its_default():
    table = {}
    for cells in rows(DOCS / "configuration.md"):
        if len(cells) == 4 and cells[0].startswith("`"):
            table[cells[0].strip("`")] = yaml.safe_load(cells[2].strip("`"))
            assert all(cells)
    assert table == dict(options(fimprobe.Config))


def test_the_readme_shows_the_defaults():
    text = read(README).split("```yaml\n")[1].split("```")[0]
    assert fimprobe.load_config(yaml.safe_load(text)) == fimprobe.Config()


def test_the_api_page_has_every_public_name():
    words = set(re.findall(r"\w+", read(DOCS / "reference" / "api.md")))
    names = set(fimprobe.__all__) | set(fimprobe.likelihoods.__all__) | {"frobenius", "spectral"}
    for record in (fimprobe.Estimate, fimprobe.Geometry, fimprobe.GroupEstimates, fimprobe.Report):
        names |= {field.name for field in dataclasses.fields(record)}
    for kind in (fimprobe.Estimate, fimprobe.Likelihood, fimprobe.Probe, fimprobe.Records,
                 fimprobe.Report, fimprobe.Sink):  # fmt: skip
        names |= {name for name in vars(kind) if not name.startswith("_")}
    for function in (fimprobe.measure, fimprobe.attach, fimprobe.read, fimprobe.load_config):
        names |= set(inspect.signature(function).parameters)
    assert not names - words


@pytest.mark.parametrize("function", [fimprobe.measure, fimprobe.attach])
def test_the_api_page_shows_the_signatures(function):
    found = {}
    for block in blocks(DOCS / "reference" / "api.md"):
        exec(block, found)
    shown = inspect.signature(found[function.__name__]).parameters
    true = inspect.signature(function).parameters
    assert list(shown) == list(true)
    for name, parameter in true.items():
        assert (shown[name].kind, shown[name].default) == (parameter.kind, parameter.default), name


def test_how_it_works_has_every_room_in_order():
    table = [cells[1] for cells in rows(DOCS / "how_it_works.md") if cells[0].isdigit()]
    assert table == [f"`{room}`" for room in ROOMS]


@pytest.mark.parametrize("name", [n for n, p in PAGES_BY_NAME.items() if blocks(p)])
def test_python_blocks_compile(name):
    for block in blocks(PAGES_BY_NAME[name]):
        if not block.startswith(">>>"):  # theory.md: run by test_theory_page.py
            compile(block, name, "exec")


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)
