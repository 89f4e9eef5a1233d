"""What a measurement on a GPU would wait for, counted without one (``FakeGpu``)."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.engines.moments import fused
from fimprobe.engines.moments import triton_kernel as kernel
from fimprobe.engines.primitives.device_transfer import to_device, to_host
from fimprobe.engines.tracing.plan import Plan
from fimprobe.errors import BatchError
from tests.support.fake_gpu import GPU, FakeGpu, on_host

ONE = {("fetch", "device_transfer.to_host < results.finish"): 1}
CHECKED = ONE | {("fetch", "sample_checks._agrees < sample_checks.find_wrong_sample"): 1}
"""One more after the measurement: a sample that ran alone."""


@pytest.fixture
def gpu(monkeypatch):
    """The fused kernel runs, outside of the mode: it computes on the CPU."""
    original = kernel.launch

    def launch(*arguments, **constants):
        with torch._C.DisableTorchFunction():
            return original(*arguments, **constants)

    monkeypatch.setattr(kernel, "launch", launch)
    monkeypatch.setattr(fused, "INTERPRET", True)
    monkeypatch.setattr(fused, "_runs_on", lambda device: device == GPU)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.norm(self.words(tokens)))))


def pictures():
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)]
    return nn.Sequential(*layers)


MODELS = {
    "tied language model": lambda: (Words(), torch.randint(20, (3, 5))),
    "convolution": lambda: (pictures(), torch.randn(3, 2, 5, 5)),
    "multilayer perceptron": lambda: (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        torch.randn(6, 4),
    ),
    "recurrent": lambda: (Last(), torch.randn(3, 6, 4)),
}


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def waited(model, inputs, **options):
    """Waits of a measurement whose plan was made before, and its report."""
    plan = Plan()
    options = {"likelihood": "categorical", "plan": plan, **options}
    want = fimprobe.measure(model, inputs, **options)
    with FakeGpu():  # the twin is compared with the model once more on another device
        fimprobe.measure(model, inputs, **options)
    with FakeGpu() as gpu_calls:
        have = fimprobe.measure(model, inputs, **options)
    assert gpu_calls.calls > 100
    for name in want.parameters:
        a, b = have.parameters[name].i1, want.parameters[name].i1
        assert abs(a.trace - b.trace) <= 1e-4 * abs(b.trace) + 1e-12
        assert abs(a.norm - b.norm) <= 1e-4 * abs(b.norm) + 1e-12
    return gpu_calls


def combinations():
    """Every combination; the third of them that holds all pairs is run by default."""
    more = [{"diagonals": True}, {"memory_mb": 0.01}, {}]
    for n, name in enumerate(MODELS):
        for d, draws in enumerate((1, 2, "exact")):
            for o, options in enumerate(more):
                marks = [] if (n + d + o) % 3 == 0 else [pytest.mark.long]
                yield pytest.param(name, draws, options, marks=marks, id=f"{name}-{draws}-{options}")


@pytest.mark.parametrize(("name", "draws", "options"), list(combinations()))
def test_moments_wait_once(name, draws, options, gpu):
    model, inputs = MODELS[name]()
    if draws == "exact" and name == "tied language model":
        draws = 3  # labels × positions: too many passes
    gpu_calls = waited(model, inputs, draws=draws, estimators=["i1"], bounds=False, **options)
    assert dict(gpu_calls.waits) == CHECKED
    parameters = len({id(p) for p in model.parameters()})
    most = 8 * (2 + 6 * parameters + 3 * 6 * 9 * (parameters + 2))  # sums and Gram matrices
    assert sum(gpu_calls.fetched) <= most


def test_the_rest_waits_for_known_reasons(gpu):
    """Bounds look at weights, and lookups' second derivatives at which tokens occur."""
    options = {"draws": 2, "estimators": ["i1", "i2", "ih"], "second_order": {"probes": 2}}
    gpu_calls = waited(*MODELS["tied language model"](), **options)
    places = {where.split(" < ")[0] for _, where in gpu_calls.waits}
    assert places == {
        "sample_checks._agrees",
        "device_transfer.to_host",
        "problem._is_finite",  # with bounds the outputs are looked at before LAPACK meets them
        "softmax_norms.softmax_norms",
        "softmax_norms._position_norms",
        "tensor_functions.normalised",
        "path.per_sample",
        "lookups.embedding_tokens",
        "operator_norms._scale_weight",
        "operator_norms.linear_norms",
        "input_norms.linear_input_norms",
        "spectral_norm.gram_bound",
        "spectral_norm.blocks_norm",
    }


def test_spot_checks_wait_for_known_reasons(gpu):
    """Each pass uploads its steps, rows and entries, and fetches its results once."""
    options = {"draws": 2, "second_order": "spot_checks", "bounds": False}
    gpu_calls = waited(*MODELS["tied language model"](), **options)
    waits = {}
    for (_, where), count in gpu_calls.waits.items():
        place = where.split(" < ")[0]
        waits[place] = waits.get(place, 0) + count
    passes = waits["passes._values"]
    assert waits["passes._run_pass"] == waits["shifted_calls.of"] == passes
    assert sum(waits.values()) <= 9 * passes
    assert waits.keys() <= {
        "passes._run_pass", "passes._values",
        "batch.__getitem__", "shifted_calls.of", "shifted_calls.places",  # rows, steps, entries
        "passes._sizes_of", "passes._note_for_guard", "guard._agrees",
        "shifted_calls.shift", "shifted_calls.undecided",  # modules that are evaluated again
        "shifted_forward._shifted", "shifted_forward._sizes",
        "first_order.layers", "first_order._entries", "first_order._add_columns",  # proposals
        "first_order._add_tokens", "spot_checking._mean_norms",
        "device_transfer.to_host", "sample_checks._agrees", "problem._is_finite",
    }  # fmt: skip


@pytest.mark.parametrize("family", ["categorical", "bernoulli", "gaussian", "poisson"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_told_at_the_end(family, bad, gpu):
    model = nn.Linear(4, 3)
    plan, inputs = Plan(), torch.randn(6, 4)
    options = {"likelihood": family, "plan": plan, "estimators": ["i1"], "bounds": False}
    fimprobe.measure(model, inputs, **options)
    on_gpu = {**options, "plan": copy.deepcopy(plan)}
    with FakeGpu():  # the twin is compared with the model once more on another device
        fimprobe.measure(model, inputs, **on_gpu)
    inputs[2, 1] = bad
    with pytest.raises(BatchError) as near:
        fimprobe.measure(model, inputs, **options)
    with FakeGpu() as gpu_calls, pytest.raises(BatchError) as late:
        fimprobe.measure(model, inputs, **on_gpu)
    assert str(late.value) == str(near.value)
    assert "3 of 18 outputs are not finite" in str(late.value)
    if family != "poisson":  # its bisection looks whether it is done
        assert dict(gpu_calls.waits) == ONE


def test_fetching_keeps_types_shapes_and_what_is_none():
    tree = {"a": [torch.arange(3), torch.ones(2, 2)], "b": (None, torch.tensor(1e-300).double(), 7)}
    tree["c"] = torch.zeros(0, 4)
    with FakeGpu() as gpu_calls:
        found = to_host(tree)
        assert torch.equal(to_host(found)["a"][0], found["a"][0])
        assert on_host(found["a"][1])
    assert dict(gpu_calls.waits) == {("fetch", "device_transfer.to_host"): 1}
    assert found["b"][0] is None
    assert found["b"][2] == 7
    for have, want in ((found["a"], tree["a"]), (found["b"][1:2], tree["b"][1:2])):
        for x, y in zip(have, want, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
    assert found["c"].shape == (0, 4)


def test_the_counter_counts():
    """Each kind of wait is counted under its name."""
    x, table = torch.arange(4.0), torch.randn(4, 2)
    looks = {
        "item": lambda: x.sum().item(),
        "__float__": lambda: float(x[0]),
        "__bool__": lambda: bool((x > 0).all()),
        "tolist": lambda: x.tolist(),
        "fetch": lambda: x.cpu(),
        "nonzero": lambda: x.nonzero(),
        "unique": lambda: x.unique(return_inverse=True),
        "boolean index": lambda: x[x > 1],
        "equal": lambda: torch.equal(x, x),
        "allclose": lambda: torch.allclose(x, x),
        "linalg_eigvalsh": lambda: torch.linalg.eigvalsh(table.T @ table),
        "upload": lambda: torch.tensor([1.0], device=x.device),
    }
    for name, look in looks.items():
        with FakeGpu() as gpu_calls:
            look()
        assert [what for what, _ in gpu_calls.waits] == [name]
    with FakeGpu() as gpu_calls:
        assert x.device == GPU
        assert (x * 2).sum().device == GPU
        assert x.new_zeros(2).device == GPU
        assert torch.zeros(2, device=x.device).device == GPU
        assert torch.zeros(2).device.type == "cpu"
        assert to_device(torch.zeros(2), x.device).device == GPU
        assert not gpu_calls.waits
        torch.zeros(2).to(x.device)
        assert dict(gpu_calls.waits) == {("upload", ""): 1}
        with pytest.raises(AssertionError, match="mixes"):
            x[:2] + torch.zeros(2)
