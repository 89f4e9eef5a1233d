"""Imports run one way, in the order of the data; the README's example runs; torchvision may break."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = [
    "torchvision_guard", "types", "sampling", "schedule", "skips", "batch", "capture", "twin", "sharded", "penalties", "yaml_file", "mistakes",
    "likelihoods.norms", "likelihoods.independent", "likelihoods.gaussian",
    "likelihoods.size_biased", "likelihoods.categorical", "likelihoods.bernoulli",
    "likelihoods.poisson", "likelihoods",
    "likelihoods.infer", "likelihoods.labels", "likelihoods.heads", "engines", "engines.backward", "engines.signs", "engines.rules",
    "engines.unrolled", "engines.layouts", "engines.pointwise", "engines.tape", "engines.graph", "engines.kinks", "engines.replay",
    "engines.powers", "engines.contract", "engines.fetch", "engines.kernel", "engines.fused", "engines.ledger", "engines.gather", "engines.problem", "engines.memory", "engines.spectral", "engines.windows",
    "engines.operators", "engines.patches", "engines.edges", "engines.network", "engines.affine",
    "engines.lipschitz", "engines.paths", "engines.between", "engines.elementwise", "engines.walk",
    "engines.chain",
    "engines.seeds", "engines.sites", "engines.pull", "engines.curves", "engines.straight",
    "engines.curvature", "engines.replayed", "engines.sums", "engines.backpack.activations", "engines.backpack.embedding",
    "engines.backpack.normalisation", "engines.backpack.modules", "engines.backpack.hooks",
    "engines.backpack.moments", "engines.backpack.guards", "engines.backpack.first_order",
    "engines.backpack.curved_rules", "engines.backpack.second_order", "engines.backpack.comparison",
    "engines.backpack.options", "engines.backpack.calls", "engines.backpack.domain",
    "engines.backpack", "engines.chunk", "engines.autograd", "engines.plan", "estimators",
    "estimators.groups", "estimators.pair_variance", "estimators.reliability", "estimators.i1", "estimators.i2", "estimators.empirical", "estimators.sizes", "estimators.bounds",
    "estimators.tightness", "table", "album", "drawing", "pictures", "gallery", "advice", "report", "options", "merge", "ranks", "measurement", "config", "origin", "sinks", "sinks.memory",
    "sinks.jsonl", "sinks.lock", "sinks.tags", "sinks.dashboard", "sinks.events", "sinks.pages",
    "sinks.tensorboard", "records", "terminal", "page", "reading", "probe", "cli", "demo", "__main__",
]  # fmt: skip


def imports(path):
    """Modules of the package that a file imports, those for type checking only left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        module = node.module if isinstance(node, ast.ImportFrom) else None
        if module and module.startswith("fimprobe.") and id(node) not in skipped:
            yield module.removeprefix("fimprobe.")


def test_a_file_imports_only_what_stands_above_it():
    files = {
        ".".join(p.relative_to(ROOT / "fimprobe").with_suffix("").parts).removesuffix(".__init__"): p
        for p in (ROOT / "fimprobe").rglob("*.py")
    }
    files.pop("__init__")
    assert set(files) == set(ORDER)
    for name, path in files.items():
        if name == "cli":  # a command imports what it runs
            continue
        for used in imports(path):
            assert ORDER.index(used) < ORDER.index(name), f"{name} imports {used}"


def test_integrations_use_the_public_api_only():
    for path in (ROOT / "integrations").glob("*.py"):
        assert not list(imports(path)), path


def test_an_optional_package_is_imported_in_one_place():
    places = {
        package: set()
        for package in (
            "tensorboard",
            "pydantic",
            "sklearn",
            "tqdm",
            "backpack",
            "pandas",
            "rich",
            "matplotlib",
            "triton",
        )  # fmt: skip
    }
    for path in (ROOT / "fimprobe").rglob("*.py"):
        for package, users in places.items():
            if re.search(rf"^\s*(from|import) {package}\b", path.read_text(), re.MULTILINE):
                # a sub-package of that name is one place
                users.add(path.parent if path.parent.name == package else path)
    for package, users in places.items():
        assert len(users) == 1, (package, users)
    assert places["backpack"] == {ROOT / "fimprobe" / "engines" / "backpack"}


def test_the_readme_example_runs(tmp_path):
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "pairs for 10 %" in done.stdout


def test_a_torchvision_that_cannot_be_imported_counts_as_absent(tmp_path):
    fake = tmp_path / "torchvision"
    fake.mkdir()
    (fake / "__init__.py").write_text(
        "from torchvision import ops\nraise RuntimeError('operator torchvision::nms does not exist')"
    )
    (fake / "ops.py").write_text("")
    meta = tmp_path / "torchvision-0.28.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    for order in ("import fimprobe, transformers", "import transformers, fimprobe"):
        code = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {order}\n"
            "from transformers import GPT2Config, GPT2LMHeadModel, BertConfig, BertModel\n"
            "GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=5,"
            " bos_token_id=0, eos_token_id=0))\n"
            "print('built')"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "built" in done.stdout, (order, done.stderr[-2000:])


def test_the_demo_shows_its_point(tmp_path, capsys):
    from fimprobe.cli import main

    assert main(["demo", "--epochs", "12", "--log-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for name in ("mlp", "cnn"):
        line = next(x for x in out.splitlines() if x.startswith(f"What it found: as the {name}"))
        told = re.search(r"went from ([\d.,]+) % to ([\d.,]+) %\.", line)
        first, last = (float(share.replace(",", "")) for share in told.groups())
        assert last > 1.5 * first
    assert "tensorboard --logdir" in out
