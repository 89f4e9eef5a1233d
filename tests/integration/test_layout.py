"""The rooms of the package, and which of them each may import: downwards only, in no circle."""

import ast
import re

from tests.support.fresh_process import run_fresh
from tests.support.paths import ROOT
from tests.support.rooms import ROOMS


def modules():
    """Dotted name -> path, of the package without the integrations."""
    found = {}
    for path in (ROOT / "fimprobe").rglob("*.py"):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if "integrations" not in parts:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = modules()


def imports(path):
    """What a file imports of the package, inside functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fimprobe"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in FILES else node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("fimprobe"))


def room(name):
    """The room of a module: its folder, or itself where it stands alone."""
    if FILES[name].name != "__init__.py" and name.count(".") > 1:
        name = name.rpartition(".")[0]
    return name.removeprefix("fimprobe.")


def test_every_room_imports_what_the_table_says():
    found = {room(name): set() for name in FILES}
    for name, path in FILES.items():
        found[room(name)] |= {room(used) for used in imports(path)} - {room(name)}
    assert found == {name: set(used.split()) for name, used in ROOMS.items()}


def test_rooms_stand_in_the_order_of_their_imports():
    order = list(ROOMS)
    for name, used in ROOMS.items():
        assert all(order.index(other) < order.index(name) for other in used.split()), name


def test_no_circle_of_files():
    uses = {n: set(imports(p)) & set(FILES) - {n} for n, p in FILES.items()}
    while uses:  # whoever imports nothing that is left stands on firm ground
        free = {name for name, used in uses.items() if not used & set(uses)}
        assert free, f"in a circle: {sorted(uses)}"
        uses = {name: used for name, used in uses.items() if name not in free}


def test_integrations_use_the_public_api_and_the_guards_of_entry_points():
    for path in (ROOT / "integrations").glob("*.py"):
        # fimprobe.torchvision_compat: called before the other package is imported
        guards = {"fimprobe.errors", "fimprobe.probe.notices"}
        own = {"fimprobe.integrations.trainer_folders"}
        assert set(imports(path)) <= {"fimprobe", "fimprobe.torchvision_compat"} | guards | own, path


def test_it_is_imported_from_a_checkout_that_is_not_installed(tmp_path):
    """Isolated from the installation in use: a link to the package is all there is."""
    (tmp_path / "fimprobe").symlink_to(ROOT / "fimprobe")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fimprobe; print(fimprobe.__file__)"
    done = run_fresh(code)
    assert done.stdout.startswith(str(tmp_path)), done.stderr


def test_an_optional_package_is_imported_in_one_place():
    """A file, or a room: that of the package's name, and of the options for pydantic."""
    packages = ("tensorboard", "pydantic", "sklearn", "tqdm", "backpack", "pandas", "rich",
                "matplotlib", "triton")  # fmt: skip
    places = {package: set() for package in packages}
    for path in FILES.values():
        for package, users in places.items():
            if re.search(rf"^\s*(from|import) {package}\b", path.read_text(), re.MULTILINE):
                room_of_package = {"pydantic": "config"}.get(package, package)
                users.add(path.parent if path.parent.name == room_of_package else path)
    for package, users in places.items():
        assert len(users) == 1, (package, users)
    assert places["backpack"] == {ROOT / "fimprobe" / "engines" / "backpack"}


MOST_LINES = 80
LONG_DOCSTRINGS = {"measure", "attach", "estimate", "audit"}
"""Public functions whose docstring documents every option: their code is counted without it."""


def lines_of(node):
    """Lines of a function, its docstring included where it is not the documentation of an API."""
    lines = node.end_lineno - node.lineno + 1
    documented = node.name in LONG_DOCSTRINGS and ast.get_docstring(node) is not None
    return lines - (node.body[0].end_lineno - node.body[0].lineno + 1 if documented else 0)


def test_no_function_is_longer_than_a_page():
    long = {}
    for folder in ("fimprobe", "integrations"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef) and lines_of(node) > MOST_LINES:
                    long[f"{path.relative_to(ROOT)}: {node.name}"] = lines_of(node)
    assert not long


TEST_FILES = [p for p in (ROOT / "tests").rglob("*.py") if "benchmarks" not in p.parts]


def test_no_test_module_imports_another():
    """What two of them need is in tests/support, tests/models or tests/oracles."""
    for path in TEST_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
            for name in names:
                assert not name.startswith(("tests.unit", "tests.integration")), path
                assert not name.rpartition(".")[2].startswith("test_"), path


def test_no_helper_is_defined_twice():
    """No two test modules have a function or class of one name and one body."""
    places = {}
    for path in TEST_FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                documented = ast.get_docstring(node) is not None
                body = ast.Module(node.body[1:] if documented else node.body, [])
                key = node.name, ast.dump(node.args) if hasattr(node, "args") else "", ast.dump(body)
                places.setdefault(key, []).append(path.relative_to(ROOT))
    twice = {key[0]: paths for key, paths in places.items() if len(paths) > 1}
    assert not twice
