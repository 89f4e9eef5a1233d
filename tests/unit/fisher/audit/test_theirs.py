"""Whatever holds a diagonal is read; what does not fit gets one sentence."""

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.fisher.audit.theirs import read_theirs
from tests.models.small import mlp


def tensors(model):
    torch.manual_seed(1)
    return {n: torch.rand_like(p) for n, p in model.named_parameters()}


def flat(named):
    return torch.cat([x.reshape(-1) for x in named.values()])


def agrees(read, named):
    diagonal, notes = read
    assert list(diagonal) == list(named) and not notes
    for name, x in named.items():
        torch.testing.assert_close(diagonal[name], x.double())


class Holder:
    """A parameter's importance, as continual-learning libraries wrap it."""

    def __init__(self, data):
        self.data = data


class PMatDiag:
    """The interface of nngeometry's matrix that is used."""

    def __init__(self, layers, diagonal):
        self.layer_collection = type("Collection", (), {"layers": dict.fromkeys(layers)})()
        self.diagonal = diagonal

    def get_diag(self):
        return self.diagonal


class DiagLaplace:
    def __init__(self, H):
        self.H = H


def test_every_form_is_read(tmp_path):
    model = mlp()
    named = tensors(model)
    safetensors = pytest.importorskip("safetensors.torch")
    torch.save(named, tmp_path / "theirs.pt")
    torch.save(flat(named), tmp_path / "vector.pt")
    safetensors.save_file(named, tmp_path / "theirs.safetensors")
    forms = [
        named,
        {f"module.{n}": Holder(x) for n, x in named.items()},
        {n: x.numpy() for n, x in named.items()},
        flat(named),
        DiagLaplace(flat(named)),
        PMatDiag(["0", "2"], flat(named)),
        tmp_path / "theirs.pt",
        str(tmp_path / "vector.pt"),
        tmp_path / "theirs.safetensors",
    ]
    for form in forms:
        agrees(read_theirs(form, model), named)


def test_a_fisher_and_its_file_are_read(tmp_path):
    model = mlp()
    fisher = fimprobe.estimate(model, torch.randn(40, 4), likelihood="categorical")
    agrees(read_theirs(fisher, model), fisher.diagonal)
    fisher.save(tmp_path / "f.safetensors")
    agrees(read_theirs(tmp_path / "f.safetensors", model), fisher.diagonal)


def test_an_optimizer_and_its_state_are_read(tmp_path):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(fimprobe.FimprobeError, match="'exp_avg_sq' of this model's parameters"):
        read_theirs(optimizer, model)
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    named = {n: optimizer.state[p]["exp_avg_sq"] for n, p in model.named_parameters()}
    agrees(read_theirs(optimizer, model), named)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    agrees(read_theirs(tmp_path / "o.pt", model), named)
    with pytest.raises(fimprobe.FimprobeError, match="of 1"):
        read_theirs(torch.optim.Adam([model[0].weight]).state_dict(), model)
    with pytest.raises(fimprobe.FimprobeError, match="got one without"):
        read_theirs(torch.optim.SGD(model.parameters()).state_dict(), model)


def test_frozen_parameters_may_be_in_a_vector():
    model = mlp()
    named = tensors(model)
    model[0].weight.requires_grad_(False)
    diagonal, _ = read_theirs(flat(named), model)
    assert "0.weight" not in diagonal
    torch.testing.assert_close(diagonal["2.weight"], named["2.weight"].double())


def test_what_is_missing_or_unknown_is_noted_and_the_rest_compared():
    model = mlp()
    named = tensors(model)
    del named["0.bias"]
    diagonal, notes = read_theirs({**named, "running_mean": torch.ones(3)}, model)
    assert set(diagonal) == set(named)
    assert "1 of 4 parameters are not in `theirs` (0.bias)" in notes[0]
    assert "1 names in `theirs` are not trainable parameters" in notes[1]
    _, notes = read_theirs({n: x - 10 for n, x in tensors(model).items()}, model)
    assert "negative" in notes[0]


@pytest.mark.parametrize(
    ("theirs", "match"),
    [
        ({"weight": torch.ones(2)}, "must be named as the model's parameters"),
        ({}, "got nothing"),
        ({"0.weight": torch.ones(8, 5)}, r"'0.weight' is \(8, 5\) and the parameter \(8, 4\)"),
        ({"0.bias": torch.full((8,), float("nan"))}, "must hold finite real numbers"),
        ({0: {"0.bias": torch.ones(8)}}, "Pass the inner mapping"),
        (torch.ones(7), "67 trainable ones, got a tensor of 7"),
        (3, "`theirs` must be a mapping"),
        ("none.pt", "'none.pt', which does not exist"),
        (PMatDiag(["0"], torch.ones(67)), "has 67 entries and its layers have 40"),
    ],
)
def test_what_does_not_fit_gets_one_sentence_with_the_remedy(theirs, match):
    with pytest.raises(fimprobe.FimprobeError, match=match) as caught:
        read_theirs(theirs, mlp())
    assert "\n" not in str(caught.value)


def test_files_that_are_no_tensors_are_refused(tmp_path):
    (tmp_path / "f.pt").write_text("text")
    with pytest.raises(fimprobe.FimprobeError, match="cannot be read"):
        read_theirs(tmp_path / "f.pt", mlp())
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(fimprobe.FimprobeError, match="cannot be read") as caught:
        read_theirs(tmp_path / "module.pt", mlp())
    assert "\n" not in str(caught.value)
