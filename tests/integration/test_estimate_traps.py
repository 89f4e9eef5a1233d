"""Data and files from which a plausible wrong number could come: measured rightly, noted or refused."""

import functools
import itertools
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import fimprobe
from fimprobe.fisher.streaming import rounds, sampling
from tests.models.small import Tagger, mlp
from tests.oracles.fisher_diagonal import flat

OPTIONS = {"likelihood": "categorical", "progress": False}
estimate_exactly = functools.partial(
    fimprobe.estimate, draws="exact", rel_error=1e-9, input_sampling="uniform", **OPTIONS
)


def inputs(size=64):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return mlp()


def refused(match):
    return pytest.raises(fimprobe.FimprobeError, match=match)


# -- what a batch means ----------------------------------------------------------------------


def test_positions_with_ignored_labels_are_left_out():
    torch.manual_seed(0)
    model, x, y = Tagger(), torch.randint(11, (8, 6)), torch.randint(5, (8, 6))
    y[:, 4:] = -100
    expected = estimate_exactly(model, [(x, y)], mask=lambda batch: batch[1] != -100)
    f = estimate_exactly(model, [(x, y)])
    torch.testing.assert_close(flat(f.diagonal), flat(expected.diagonal))
    assert f.trace < 0.9 * estimate_exactly(model, [x]).trace
    assert "label is -100 are left out" in str(f) and "count in its mean" not in str(f)
    y[4:] = -100
    assert "Inputs without a label add nothing to F" in str(estimate_exactly(model, [(x, y)]))
    # of other families -100 is a number
    regression = estimate_exactly(mlp(outputs=1), [(inputs(), -100 * torch.ones(64, 1))],
                                  likelihood="gaussian")  # fmt: skip
    assert regression.trace > 0 and not regression.metadata["notes"]


class Scaled(nn.Module):
    """Takes an optional second input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, scale=None):
        return self.linear(x if scale is None else x * scale)


def test_an_input_that_is_taken_as_labels_is_noted():
    data = [(inputs(), torch.zeros(64, 4))]
    f = estimate_exactly(Scaled(), data)
    assert "though the forward accepts 'scale'" in str(f)
    f = estimate_exactly(Scaled(), data, inputs=tuple)
    assert "forward accepts" not in str(f) and float(f.diagonal["linear.weight"].abs().sum()) == 0
    f = estimate_exactly(Scaled(), [(inputs(), torch.zeros(64, dtype=torch.int64))])
    assert not f.metadata["notes"]


def test_probabilities_in_place_of_logits_are_noted():
    model = net()
    right = estimate_exactly(model, inputs())
    for layer, function, family in (
        (nn.Softmax(-1), torch.log, "categorical"),
        (nn.Sigmoid(), torch.logit, "bernoulli"),
    ):
        f = estimate_exactly(nn.Sequential(model, layer), inputs(), likelihood=family)
        assert f"Pass output=torch.{function.__name__}" in str(f)
    f = estimate_exactly(nn.Sequential(model, nn.Softmax(-1)), inputs(), output=torch.log)
    assert "probabilities" not in str(f)
    torch.testing.assert_close(flat(f.diagonal), flat(right.diagonal), rtol=1e-4, atol=1e-9)


# -- how data are read -----------------------------------------------------------------------


class Doubling(DataLoader):
    """Changes its batches, as loaders with transforms on the GPU do."""

    def __iter__(self):
        return (2 * x for (x,) in super().__iter__())


def test_batches_are_those_that_the_loader_yields():
    data = TensorDataset(inputs())
    f = estimate_exactly(net(), Doubling(data, batch_size=16))
    torch.testing.assert_close(flat(f.diagonal), flat(estimate_exactly(net(), 2 * inputs()).diagonal))
    with refused("random access"):
        fimprobe.estimate(net(), Doubling(data), input_sampling="trace", **OPTIONS)


class Augmented(Dataset):
    """Images that are scaled at random each time."""

    def __len__(self):
        return 400

    def __getitem__(self, i):
        return 2 * inputs(400)[i] * torch.rand(())


def test_augmented_inputs_are_not_drawn_by_their_outputs(tmp_path, monkeypatch):
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(20)  # outputs that differ between inputs
    with refused("must yield the same inputs each time"):
        fimprobe.estimate(model, Augmented(), input_sampling="trace", **OPTIONS)
    monkeypatch.setattr(sampling.Pilot, "pays", lambda *_: True)
    f = fimprobe.estimate(model, Augmented(), draws=1, state=tmp_path / "s", **OPTIONS)
    assert f.metadata["input_sampling"] == "uniform" and "none were drawn by τ" in str(f)
    again = fimprobe.estimate(model, Augmented(), draws=1, state=tmp_path / "s", **OPTIONS)
    assert torch.equal(flat(f.diagonal), flat(again.diagonal))


# -- states ----------------------------------------------------------------------------------


class Shuffled:
    """Batches in a new order each time."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self):
        return iter(inputs()[torch.randperm(64, generator=self.generator)].split(16))


def test_a_state_of_other_data_or_another_order_is_refused(tmp_path):
    forms = {
        "tensor": lambda x: x,
        "loader": lambda x: DataLoader(TensorDataset(x), batch_size=16),
        "list": lambda x: list(x.split(16)),
        "generator": lambda x: iter(x.split(16)),
    }
    for name, form in forms.items():
        part = functools.partial(fimprobe.estimate, net(), rel_error=1e-9, draws=2,
                                 state=tmp_path / name, **OPTIONS)  # fmt: skip
        first = part(form(inputs()), max_seconds=1e-9)
        assert first.metadata["end"] == "seconds"
        with refused("holds one of other data"):
            part(form(inputs() + 1))
        whole = part(form(inputs()))
        plain = fimprobe.estimate(net(), form(inputs()), rel_error=1e-9, draws=2, **OPTIONS)
        assert torch.equal(flat(whole.diagonal), flat(plain.diagonal)), name
    part = functools.partial(fimprobe.estimate, net(), state=tmp_path / "s", **OPTIONS)
    data = Shuffled()
    part(data, max_seconds=1e-9)
    with refused("same batches in the same order"):
        part(data)


def test_the_time_is_that_of_each_call(tmp_path, monkeypatch):
    path, calls = tmp_path / "s", []
    start = time.monotonic()
    for _ in range(3):
        clock = itertools.count()
        monkeypatch.setattr(rounds.time, "monotonic", lambda n=clock: start + 1000.0 * next(n))
        f = fimprobe.estimate(net(), list(inputs().split(4)), draws=2, rel_error=1e-9,
                              state=path, max_seconds=15_000, **OPTIONS)  # fmt: skip
        calls.append(f.metadata["inputs"])
    assert 4 < calls[0] < calls[1] - 4


# -- bad input -------------------------------------------------------------------------------


class Failing(Dataset):
    """Fails in a process that loads."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        raise OSError("Caught OSError in DataLoader worker process 0.\nTraceback ...\nOSError: disk")


BAD = {
    "two tensors": (lambda x: (x, x), {}, r"\[\(x, y\)\] for one batch"),
    "arrays": (lambda x: [x.numpy()], {}, "got ndarray without a tensor of a batch"),
    "text": (lambda x: "x", {}, "an iterable of batches, got str"),
    "a seed": (lambda x: x, {"seed": "a"}, "`seed` must be an integer, got 'a'"),
    "a state": (lambda x: x, {"state": 3}, "`state` must be the path of a file, got 3"),
    "ranks": (lambda x: x, {"ranks": 3}, "`ranks` must be a group of processes, got int"),
    "a list": (lambda x: x, {"entries": {"0.bias": [True]}}, "got '0.bias' with list"),
    "no entry": (lambda x: x, {"entries": {}}, "`entries` must choose some entries"),
    "no folder": (lambda x: x, {"state": "none/s"}, "`state` must be a file in an existing folder"),
    "a worker": (lambda x: Failing(), {}, r"batch 0 is not \(OSError: disk\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, tmp_path):
    data, options, match = BAD[name]
    for more in ({}, {"state": tmp_path / "s"} | options):
        with refused(match) as caught:
            fimprobe.estimate(net(), data(inputs()), **OPTIONS, **options | more)
        assert "\n" not in str(caught.value)


def test_models_and_files_without_a_place_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    with refused("on the meta device"):
        fimprobe.estimate(net().to("meta"), inputs(), **OPTIONS)
    f = estimate_exactly(net(), inputs())
    for path in (tmp_path / "none" / "f", tmp_path):
        with refused("must be a file in an existing folder"):
            f.save(path)


def test_an_audit_of_a_share_of_the_data_is_refused():
    data = TensorDataset(inputs(), torch.zeros(64, dtype=torch.int64))
    sampler = DistributedSampler(data, num_replicas=2, rank=0)
    theirs = {n: torch.ones_like(p) for n, p in net().named_parameters()}
    with refused("each of 2 processes a share"):
        fimprobe.audit(net(), DataLoader(data, sampler=sampler), theirs, **OPTIONS)
