"""A torchvision that cannot be imported is hidden where it does harm, and nowhere else."""

import pytest

from tests.support.fresh_process import run_fresh

HEAD = """
import sys
sys.path.insert(0, {folder!r})
"""

BUILD_TRANSFORMERS = """
from transformers import GPT2Config, GPT2LMHeadModel, BertConfig, BertModel
GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=5, bos_token_id=0, eos_token_id=0))
print("built")
"""

MEASURE_WITH_BACKPACK = """
import torch, fimprobe
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sigmoid(), torch.nn.Linear(4, 2))
fimprobe.measure(model, torch.randn(5, 3), likelihood="categorical", engine="backpack",
                 second_order="exact", bounds=False)
assert "backpack" in sys.modules
"""


@pytest.fixture
def broken(tmp_path):
    """A folder with a torchvision that is installed and cannot be imported."""
    fake = tmp_path / "torchvision"
    fake.mkdir()
    (fake / "__init__.py").write_text(
        "from torchvision import ops\nraise RuntimeError('operator torchvision::nms does not exist')"
    )
    (fake / "ops.py").write_text("")
    meta = tmp_path / "torchvision-0.28.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    return str(tmp_path)


def run(folder, *code):
    """The output of the pieces of ``code``, run in a fresh process that finds ``folder`` first."""
    source = HEAD.format(folder=folder) + "\n".join(code)
    done = run_fresh(source)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_import_fimprobe_leaves_the_process_as_it_is(broken):
    out = run(
        broken,
        "import fimprobe",
        "print(sorted(n for n in sys.modules",
        "             if n.partition('.')[0] in ('torchvision', 'transformers', 'lightning')))",
    )
    assert out == "[]\n"


def test_import_fimprobe_changes_nothing_of_transformers_or_lightning(broken):
    run(
        broken,
        "from transformers.utils import import_utils",
        "import lightning_utilities.core.imports as lightning",
        "import_utils.is_torchvision_available()",
        "before = import_utils.is_torchvision_available.cache_info(), lightning._version",
        "names = set(sys.modules)",
        "import fimprobe",
        "assert before == (import_utils.is_torchvision_available.cache_info(), lightning._version)",
        "assert not any(n.partition('.')[0] in ('torchvision', 'transformers')",
        "               for n in set(sys.modules) - names)",
    )


@pytest.mark.parametrize(
    "order",
    [
        "import fimprobe.integrations.huggingface, transformers",
        "import transformers, fimprobe.integrations.huggingface",
        "import fimprobe.engines.backpack, transformers",
        "import transformers, fimprobe.engines.backpack",
        "from fimprobe.torchvision_compat import hide_broken_torchvision as hide; assert hide()",
    ],
)
def test_transformers_models_are_built(broken, order):
    assert "built" in run(broken, order, BUILD_TRANSFORMERS)


def test_transformers_models_are_built_after_backpack_measured(broken):
    assert "built" in run(broken, MEASURE_WITH_BACKPACK, BUILD_TRANSFORMERS)


def test_lightning_is_imported_by_its_integration(broken):
    pytest.importorskip("lightning")
    code = "from fimprobe.integrations.lightning import FimProbeCallback", "import lightning"
    assert "built" in run(broken, *code, "lightning.Trainer", "print('built')")


def test_a_torchvision_that_works_stays(tmp_path):
    (tmp_path / "torchvision.py").write_text("works = True")
    run(
        str(tmp_path),
        "from fimprobe.torchvision_compat import hide_broken_torchvision",
        "assert not hide_broken_torchvision()",
        "import torchvision",
        "assert torchvision.works",
    )


def test_hiding_again_changes_nothing(broken):
    run(
        broken,
        "from fimprobe.torchvision_compat import hide_broken_torchvision as hide",
        "assert hide() and not hide()",
        "import lightning_utilities.core.imports as lightning",
        "version = lightning._version",
        "assert not hide() and lightning._version is version",
    )
