"""The pages: links lead somewhere, tables agree with the code, examples run."""

import dataclasses
import inspect
import re
import socket
from collections.abc import Mapping
from typing import get_args

import pytest
import torch
import yaml
from pydantic import BaseModel

import fimprobe
from fimprobe.cli.commands import main
from tests.support.paths import ROOT
from tests.support.rooms import ROOMS

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
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


def links(page):
    return {
        (page.parent / target.partition("#")[0]).resolve()
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(read(page)))
    }


def test_every_page_is_linked_from_the_index():
    """The pages of the reference are linked from its list of names."""
    linked = links(DOCS / "index.md") | links(DOCS / "reference" / "api.md")
    assert set(DOCS.rglob("*.md")) - {DOCS / "index.md"} <= linked


def test_every_page_is_in_the_navigation():
    navigation = "".join(
        re.findall(r"^```{toctree}\n(.*?)^```", read(DOCS / "index.md"), re.S | re.M)
    )
    listed = [line for line in navigation.splitlines() if line and not line.startswith(":")]
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(pages - {"index"})


def test_named_files_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:fimprobe|tests|examples)/[\w/.]*\w)/?`", read(page)):
            assert (ROOT / name).exists(), (page.name, name)


def test_pages_and_help_name_the_same_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.search(r"\{([\w,]+)\}", capsys.readouterr().out)[1].split(",")
    for name in ("reference/command_line.md", "guides/outputs.md"):
        named = re.findall(r"^(?:\| `)?fimprobe (\w+) ", read(DOCS / name), re.MULTILINE)
        assert set(named) == set(commands), name
    (room,) = (cells for cells in rows(DOCS / "how_it_works.md") if cells[1] == "`cli`")
    assert set(re.findall(r"`(?:fimprobe )?(\w+)`", room[2])) == set(commands)


def test_percentages_have_one_style():
    """A space before the sign, as ``percent`` prints it; Python's own format has none."""
    for folder in ("fimprobe", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r":[,.\d]*%\}", read(path)), path
    for page in PAGES:
        assert not re.search(r":[,.\d]*%\}|\d%(?!\d)", read(page)), page


def test_the_names_of_the_glossary_exist():
    """Classes with their members, files, and options or arguments."""
    sources = "".join(read(path) for path in (ROOT / "fimprobe").rglob("*.py"))
    options_of = {*inspect.signature(fimprobe.measure).parameters, *fimprobe.Config.model_fields}
    options_of |= set(inspect.signature(fimprobe.attach).parameters)
    for term, _, _, code in rows(DOCS / "glossary.md"):
        for name in re.findall(r"`([^`]+)`", code):
            holder, _, member = name.partition(".")
            if "/" in name:
                assert (ROOT / name).exists(), (term, name)
            elif holder[0].isupper():
                body = re.search(rf"^class {holder}\b.*?(?=^\S|\Z)", sources, re.S | re.M)
                assert body, (term, name)
                assert re.search(rf"^    (def )?{member}\b", body[0], re.M), (term, name)
            else:
                assert name.partition("=")[0] in options_of, (term, name)


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
            for kind in get_args(field.annotation):  # a section that is not the default
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    yield from options(kind, f"{prefix}{name}.")


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


REFERENCE = DOCS / "reference"


def documented():
    """Dotted name -> page, of the names whose docstrings a page of the reference shows."""
    names = {}
    for page in REFERENCE.glob("*.md"):
        for name in re.findall(r"^\.\. auto(?:class|function|exception):: (\S+)$", read(page), re.M):
            assert name not in names, name
            names[name] = page
    return names


def test_the_api_page_lists_what_the_reference_documents():
    listed = {
        cells[0].strip("[").partition("]")[0].strip("`")
        for cells in rows(REFERENCE / "api.md")
        if cells[0].startswith("[`fimprobe.")
    }
    assert listed == set(documented()) | {"fimprobe.likelihoods.LIKELIHOODS"}


def test_the_reference_documents_every_public_name():
    names = {f"fimprobe.{name}" for name in fimprobe.__all__}
    names -= {"fimprobe.__version__", "fimprobe.likelihoods", "fimprobe.penalties"}
    names |= {f"fimprobe.likelihoods.{name}" for name in fimprobe.likelihoods.__all__}
    names -= {"fimprobe.likelihoods.LIKELIHOODS"}
    assert names <= set(documented())


def test_the_tables_of_the_reference_have_every_member():
    words = {name: set(re.findall(r"\w+", read(page))) for name, page in documented().items()}
    for record in (fimprobe.Audit, fimprobe.Estimate, fimprobe.Fisher, fimprobe.Geometry, fimprobe.GroupEstimates,
                   fimprobe.Report):  # fmt: skip
        names = {field.name for field in dataclasses.fields(record)}
        assert not names - words[f"fimprobe.{record.__name__}"], record
    for kind in (fimprobe.Estimate, fimprobe.Fisher, fimprobe.GroupEstimates, fimprobe.Likelihood, fimprobe.Probe,
                 fimprobe.Records, fimprobe.Report, fimprobe.Sink):  # fmt: skip
        names = {name for name in vars(kind) if not name.startswith("_")}
        assert not names - words[f"fimprobe.{kind.__name__}"], kind


@pytest.mark.parametrize(
    "function", [fimprobe.measure, fimprobe.attach, fimprobe.estimate, fimprobe.audit]
)
def test_the_reference_shows_arguments_and_defaults(function):
    text = read(documented()[f"fimprobe.{function.__name__}"])
    table = {}
    for row in re.findall(r"^\| `.*", text.split("\n## ")[1], re.M):
        names, default = row.split(" |")[:2]
        for name in re.findall(r"`\**(\w+)`", names):
            table[name] = default.strip().strip("`")
    parameters = inspect.signature(function).parameters
    assert list(table) == list(parameters)
    for name, parameter in parameters.items():
        default = parameter.default
        if isinstance(default, Mapping):
            default = dict(default)
        shown = "" if default is inspect.Parameter.empty else repr(default).replace("'", '"')
        assert table[name] == shown, name


def test_how_it_works_has_every_room_in_order():
    table = [cells[1] for cells in rows(DOCS / "how_it_works.md") if cells[0].isdigit()]
    assert table == [f"`{room}`" for room in ROOMS]


class Tracker:
    """Stands in for the client of an experiment tracker."""

    def init(self):
        return self

    def log(self, values, step): ...


def small_model():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    model.blocks = [model[0]]
    return model


def finished_run(folder):
    """The folder of a run with one report."""
    model = small_model()
    with fimprobe.attach(model, log_dir=folder, likelihood="categorical") as probe:
        probe.step(torch.rand(8, 4))
    return folder


FRAGMENTS = [
    "configuration.md", "distributed.md", "huggingface.md", "lightning.md", "outputs.md",
    "training_loop.md",
]  # fmt: skip
"""Pages whose blocks stand inside of a reader's own program; the others import what they use."""


def names_of_page(page, folder):
    """The names that the blocks of a page suppose."""
    names = {"__name__": "page"}
    if page.name in FRAGMENTS:
        names |= {"fimprobe": fimprobe, "torch": torch}
    if page.name in ("configuration.md", "distributed.md", "outputs.md", "training_loop.md"):
        names["model"] = model = small_model()
        names["loader"] = [(torch.rand(8, 4), torch.randint(2, (8,))) for _ in range(3)]
        names["loss_function"] = torch.nn.CrossEntropyLoss()
        names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    if page.name in ("README.md", "huggingface.md"):
        transformers = pytest.importorskip("transformers")
        names["Trainer"] = transformers.Trainer
        names["args"] = transformers.TrainingArguments(str(folder), report_to=[])
        names |= {"model": small_model(), "data": [{}]}
    if page.name == "lightning.md":
        names["Trainer"] = pytest.importorskip("lightning").Trainer
    if page.name == "distributed.md":
        names["sharded_model"] = small_model()
    if page.name == "outputs.md":
        pytest.importorskip("pandas")
        names |= {"RUN": finished_run(folder / "run"), "wandb": Tracker()}
    return names


@pytest.fixture
def processes(monkeypatch):
    """What torch.distributed reads to set up a group of one process; the group ends with the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "RANK": 0,
        "WORLD_SIZE": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


SHOWN_WITH_RESULTS = ["docs/theory.md"]
"""Pages of interactive examples, which test_theory_page.py runs."""


@pytest.mark.parametrize(
    "name", [n for n, p in PAGES_BY_NAME.items() if blocks(p) and n not in SHOWN_WITH_RESULTS]
)
def test_python_blocks_run(name, tmp_path, monkeypatch, request):
    """One block after the other, in one namespace for each page."""
    page = PAGES_BY_NAME[name]
    if page.name == "distributed.md":
        request.getfixturevalue("processes")
    monkeypatch.chdir(tmp_path)
    names = names_of_page(page, tmp_path)
    (tmp_path / "fimprobe.yaml").write_text("schedule: {every: 1}\n")
    try:
        for block in blocks(page):
            exec(compile(block, page.name, "exec"), names)
    finally:
        for value in names.values():
            if isinstance(value, fimprobe.Probe):
                value.detach()
