"""The rooms of the package, and which of them each may import: downwards only, in no circle."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

ROOMS = {
    "_version": "",
    "engines": "",
    "engines.layers": "",
    "engines.primitives": "",
    "errors": "",
    "torchvision_compat": "",
    "likelihoods": "errors",
    "model": "errors",
    "engines.problem": "engines.primitives errors likelihoods model",
    "penalties": "errors model",
    "statistics": "likelihoods",
    "training": "errors likelihoods model",
    "config": "errors likelihoods training",
    "engines.backpack": "engines.problem errors model statistics",
    "engines.tracing": "engines.layers engines.problem errors model",
    "estimators": "errors statistics",
    "jacobian_bounds": "engines.problem model",
    "distributed": "errors jacobian_bounds likelihoods model statistics",
    "engines.moments": "engines.layers engines.primitives engines.problem engines.tracing model "
    "statistics",
    "report": "_version config errors estimators likelihoods model statistics",
    "engines.curvature": "engines.backpack engines.layers engines.moments engines.primitives "
    "engines.problem engines.tracing model statistics",
    "plots": "estimators report",
    "sinks": "errors report",
    "engines.autograd": "engines.backpack engines.curvature engines.layers engines.moments "
    "engines.primitives engines.problem engines.tracing errors likelihoods model statistics",
    "runs": "errors plots report sinks",
    "sinks.tensorboard": "errors estimators plots report sinks training",
    "measurement": "distributed engines.autograd engines.backpack engines.problem engines.tracing "
    "errors jacobian_bounds likelihoods model report statistics",
    "probe": "config distributed engines.tracing errors likelihoods measurement model report sinks "
    "sinks.tensorboard training",
    "fimprobe": "_version config errors estimators likelihoods measurement penalties probe report "
    "runs sinks torchvision_compat",
    "cli": "config errors fimprobe report runs",
    "__main__": "cli",
}
"""Each room, and what it may import; a room stands below those that import it."""


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


def test_integrations_use_the_public_api_only():
    for path in (ROOT / "integrations").glob("*.py"):
        assert set(imports(path)) <= {"fimprobe"}, path


def test_it_is_imported_from_a_checkout_that_is_not_installed(tmp_path):
    """Isolated from the installation in use: a link to the package is all there is."""
    (tmp_path / "fimprobe").symlink_to(ROOT / "fimprobe")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fimprobe; print(fimprobe.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith(str(tmp_path)), done.stderr


def test_an_optional_package_is_imported_in_one_place():
    packages = ("tensorboard", "pydantic", "sklearn", "tqdm", "backpack", "pandas", "rich",
                "matplotlib", "triton")  # fmt: skip
    places = {package: set() for package in packages}
    for path in FILES.values():
        for package, users in places.items():
            if re.search(rf"^\s*(from|import) {package}\b", path.read_text(), re.MULTILINE):
                # a sub-package of that name is one place
                users.add(path.parent if path.parent.name == package else path)
    for package, users in places.items():
        assert len(users) == 1, (package, users)
    assert places["backpack"] == {ROOT / "fimprobe" / "engines" / "backpack"}
