"""The file of a Fisher: complete, readable without fimprobe, checked when it is read."""

import builtins
import json
import os

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.fisher.streaming.state import StateFile
from fimprobe.report.format import with_error
from tests.models.small import mlp

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def fisher():
    torch.manual_seed(0)
    return fimprobe.estimate(mlp(), torch.randn(80, 4), likelihood="categorical")


def test_what_is_saved_is_read(fisher, tmp_path):
    fisher.save(tmp_path / "f.safetensors")
    read = fimprobe.load_fisher(tmp_path / "f.safetensors", mlp())
    for field in ("diagonal", "std_error", "values"):
        mine, its = getattr(fisher, field), getattr(read, field)
        assert list(mine) == list(its)
        assert all(
            torch.equal(x, its[name]) and x.dtype == its[name].dtype for name, x in mine.items()
        )
    assert read.total == fisher.total and read.layers == fisher.layers
    assert read.metadata == fisher.metadata
    assert str(read) == str(fisher) and read.report() == fisher.report()
    assert str(read).splitlines()[1].startswith("0 Linear ")  # as in reports


def test_the_file_is_plain(fisher, tmp_path):
    path = tmp_path / "f.safetensors"
    fisher.save(path)
    tensors = safetensors.load_file(path)
    assert torch.equal(tensors["0.weight"], fisher.diagonal["0.weight"])
    assert torch.equal(tensors["std_error/0.weight"], fisher.std_error["0.weight"])
    assert torch.equal(tensors["parameter/0.weight"], fisher.values["0.weight"])
    header = path.read_bytes()
    length = int.from_bytes(header[:8], "little")
    metadata = json.loads(json.loads(header[8 : 8 + length])["__metadata__"]["fimprobe"])
    assert metadata["format"] == 1 and metadata["total"]["trace"] == fisher.trace
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_files_have_the_mode_that_open_leaves(fisher, tmp_path):
    """That of the umask for a new file; that of the file before for one that is replaced."""

    state = StateFile(tmp_path / "state", rank=0, processes=1, identity="")
    writers = {"f.safetensors": fisher.save, "state": lambda _: state.write({"rounds": 1})}
    before = os.umask(0o027)
    try:
        for name, write in writers.items():
            path = tmp_path / name
            write(path)
            assert path.stat().st_mode & 0o777 == 0o640
            path.chmod(0o604)
            write(path)
            assert path.stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(before)


def test_files_that_do_not_fit_are_refused(fisher, tmp_path):
    path = tmp_path / "f.safetensors"
    fisher.save(path)
    with pytest.raises(fimprobe.FimprobeError, match="4 are missing"):
        fimprobe.load_fisher(path, nn.Linear(4, 3))
    with pytest.raises(fimprobe.FimprobeError, match=r"'0.weight' is \(5, 4\) and was measured"):
        fimprobe.load_fisher(path, mlp(hidden=5))
    with pytest.raises(fimprobe.FimprobeError, match="does not exist"):
        fimprobe.load_fisher(tmp_path / "none")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(fimprobe.FimprobeError, match="cannot be read"):
        fimprobe.load_fisher(tmp_path / "text")
    safetensors.save_file({"w": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(fimprobe.FimprobeError, match="has no metadata"):
        fimprobe.load_fisher(tmp_path / "other")
    text = json.dumps({"format": 99, "fimprobe": "9.0"})
    safetensors.save_file({"w": torch.ones(2)}, tmp_path / "new", metadata={"fimprobe": text})
    with pytest.raises(fimprobe.FimprobeError, match="must have format 1"):
        fimprobe.load_fisher(tmp_path / "new")


def test_without_safetensors_the_error_has_the_command(fisher, tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(fimprobe.FimprobeError, match=r"pip install 'fimprobe\[safetensors\]'"):
        fisher.save(tmp_path / "f")


def test_the_table_has_the_layers(fisher):
    lines = str(fisher).splitlines()
    assert lines[0].split()[:2] == ["layer", "parameters"]
    assert [line.split()[0] for line in lines[1:4]] == [*fisher.layers, "total"]
    assert f"{with_error(fisher.trace, fisher.total.std_error)}  " in lines[3]
    assert "F is off by" in str(fisher) and "likelihood: Categorical" in fisher.report()
