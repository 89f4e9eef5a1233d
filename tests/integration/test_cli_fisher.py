"""``fimprobe estimate`` and ``fimprobe audit``: results, files, and mistakes in one sentence each."""

import sys

import pytest
import torch

import fimprobe
from fimprobe.cli.commands import main

pytest.importorskip("safetensors")

TASK = """
import torch

def model():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)

def data():
    torch.manual_seed(1)
    return [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(4)]

def broken_data():
    return [(torch.randn(16, 4), 0), (torch.randn(16, 5), 0)]

def empty():
    return []

def fails():
    raise ValueError("no such checkpoint\\nin the folder")

number = 3
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The name of a module with a model and data, in the working directory."""
    name = f"task_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def arguments(task, *extra, data="data", model="model"):
    return ["--model", f"{task}:{model}", "--data", f"{task}:{data}",
            "--likelihood", "categorical", *extra]  # fmt: skip


def test_a_file_is_estimated_and_audited(task, capsys):
    assert main(["estimate", *arguments(task, "-o", "f.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "trace F" in out and out.rstrip().endswith("f.safetensors: written")
    fisher = fimprobe.load_fisher("f.safetensors")
    assert main(["audit", "f.safetensors", *arguments(task)]) == 0
    assert "`theirs` is F, averaged over the 64 inputs." in capsys.readouterr().out
    torch.save({n: 64 * f for n, f in fisher.diagonal.items()}, "sum.pt")
    assert main(["audit", "sum.pt", *arguments(task, "--top", "0.2")]) == 0
    out = capsys.readouterr().out
    assert "summed over the 64 inputs" in out and "top 20 %" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nothing"}, "`--model` must name a member of"),
        ({"model": "number"}, "gives int. Return the model"),
        ({"model": "fails"}, "raises ValueError: no such checkpoint. Call it"),
        ({"data": "empty"}, "`data` must yield at least one input"),
        ({"data": "number"}, "`data` must be an iterable of batches, got int"),
    ],
)
@pytest.mark.parametrize("command", ["estimate", "audit"])
def test_mistakes_are_one_sentence(task, capsys, command, changes, message):
    torch.save({"weight": torch.ones(3, 4), "bias": torch.ones(3)}, "theirs.pt")
    first = ["audit", "theirs.pt"] if command == "audit" else ["estimate", "-o", "f.safetensors"]
    assert main([*first, *arguments(task, **changes)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fimprobe {command}: ") and message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_module_here:make", "must name a module that can be imported"),
        ("only_a_name", "`--model` must be module:name, got 'only_a_name'"),
    ],
)
def test_references_that_lead_nowhere(task, capsys, reference, message):
    argv = ["estimate", "-o", "f", "--model", reference, "--data", f"{task}:data"]
    assert main(argv) == 1
    assert message in capsys.readouterr().err


def test_other_files_and_folders_are_refused(task, capsys):
    assert main(["audit", "none.pt", *arguments(task)]) == 1
    assert "'none.pt', which does not exist" in capsys.readouterr().err
    torch.save({"other": torch.ones(2)}, "other.pt")
    assert main(["audit", "other.pt", *arguments(task)]) == 1
    assert "must be named as the model's parameters (weight, bias)" in capsys.readouterr().err
    assert main(["estimate", *arguments(task, "-o", "none/f.safetensors")]) == 1
    assert "`--output` must be in an existing folder" in capsys.readouterr().err


def test_what_was_measured_before_an_error_is_written(task, capsys):
    argv = arguments(task, "-o", "part.safetensors", data="broken_data")
    assert main(["estimate", *argv]) == 1
    error = capsys.readouterr().err
    assert "(16 inputs) is in part.safetensors" in error and len(error.splitlines()) == 1
    assert fimprobe.load_fisher("part.safetensors").metadata["inputs"] == 16
