"""Models and inputs that cannot be measured: the argument or module, what is wrong, the remedy."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fimprobe
from fimprobe import FimprobeError
from fimprobe.likelihoods import Categorical, Gaussian
from tests.models.small import mlp

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


class WithoutGrad(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class Graphs(nn.Module):
    """One output for each graph, or for each node; nodes of all graphs in the first dimension."""

    def __init__(self, pooled):
        super().__init__()
        self.pooled, self.layer = pooled, nn.Linear(4, 3)

    def forward(self, nodes, edges, graph):
        hidden = self.layer(nodes)
        hidden = hidden + torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]])
        if not self.pooled:
            return hidden
        return torch.zeros(int(graph.max()) + 1, 3).index_add(0, graph, hidden)


class Lengths(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.gru(packed)[1][0])


def linear(**options):
    return nn.Linear(4, 3, **options)


def scripted(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(model)


def traced(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, X)


def nested(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [torch.randn(2, 4), torch.randn(3, 4)]
        return torch.nested.nested_tensor(rows, layout=layout)


GRAPH = (X, torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]]), torch.tensor([0, 0, 1, 1]))
ONE_SAMPLE = "`model` must run on one sample alone, got"

REFUSED = {
    # the model
    "scripted": (lambda: scripted(mlp()), X, ["a scripted module", "before torch.jit.script"]),
    "traced": (lambda: traced(mlp()), X, ["a scripted module", "torch.jit.trace"]),
    "scripted part": (
        lambda: nn.Sequential(scripted(nn.Linear(4, 4)), linear()),
        X,
        ["the scripted module '0'"],
    ),
    "exported for one size": (
        lambda: torch.export.export(mlp(), (X,)).module(),
        X,
        [ONE_SAMPLE, "for the first of 4", "dynamic batch"],
    ),
    "model on meta": (lambda: linear(device="meta"), X, ["`model`", "'weight' on the meta", "Load"]),
    "lazy": (
        lambda: nn.LazyLinear(3),
        X,
        ["`model`", "the lazy parameter 'weight'", "Run the model"],
    ),
    "detached": (lambda: Detached(4, 3), X, ["`model` must have", "depend on none", "detaches"]),
    "no_grad": (lambda: WithoutGrad(4, 3), X, ["`model` must have", "torch.no_grad()"]),
    "detached after layers": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Detached(4, 3)),
        X,
        ["outputs without a graph", "`model`", "remove that"],
    ),
    # the inputs
    "float64": (mlp, X.double(), ["the model raises RuntimeError", "dtype"]),
    "whole numbers": (mlp, X.long(), ["the model raises RuntimeError", "dtype"]),
    "wrong width": (mlp, torch.randn(4, 7), ["the model raises RuntimeError", "shapes"]),
    "pair with labels": (mlp, (X, torch.zeros(4)), ["the model raises TypeError"]),
    "unknown keyword": (mlp, {"foo": X}, ["the model raises TypeError", "foo"]),
    "key that is no word": (mlp, {3: X}, ["the model raises TypeError"]),
    "inputs on meta": (mlp, X.to("meta"), ["`inputs` must be dense with values", "meta device"]),
    "sparse": (mlp, X.to_sparse(), ["`inputs`", "layout sparse_coo", "inputs.to_dense()"]),
    "sparse rows": (mlp, X.to_sparse_csr(), ["`inputs`", "layout sparse_csr", "inputs.to_dense()"]),
    "sparse in a mapping": (mlp, {"x": [X, X.to_sparse()]}, ["`inputs`", "layout sparse_coo"]),
    "jagged": (mlp, nested(torch.jagged), ["`inputs`", "a nested tensor", "to_padded_tensor"]),
    "nested": (mlp, nested(torch.strided), ["`inputs`", "a nested tensor", "to_padded_tensor"]),
    "packed": (mlp, pack_sequence([X, X[:2]]), ["`inputs`", "a PackedSequence", "Pass padded"]),
    "packed in a tuple": (mlp, (X, pack_sequence([X, X[:2]])), ["`inputs`", "a PackedSequence"]),
    "no batch": (linear, X[0], ["one row for each of the 4 samples, got shape (3,)"]),
    "no tensor": (linear, "x", ["inputs hold no tensor"]),
    # samples that cannot be cut out of the inputs
    "graphs": (lambda: Graphs(True), GRAPH, ["one row for each of the 4 samples, got shape (2, 3)"]),
    "nodes": (lambda: Graphs(False), GRAPH, [ONE_SAMPLE, "IndexError", "nodes of joined graphs"]),
    "list of lengths": (
        Lengths,
        (torch.randn(4, 5, 3), [5, 2, 4, 1]),
        [ONE_SAMPLE, "IndexError", "packed sequences or lists"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_explained(name):
    make, inputs, words = REFUSED[name]
    with pytest.raises(FimprobeError) as error:
        fimprobe.measure(make(), inputs, likelihood="categorical")
    for word in words:
        assert word in str(error.value), str(error.value)


def test_the_error_of_an_engine_is_not_hidden(monkeypatch):
    """Where model and outputs explain nothing, the fault is fimprobe's own and shown as it is."""

    def fail(*args, **kwargs):
        raise KeyError("own fault")

    monkeypatch.setattr("fimprobe.measurement.process_share.measure_and_check", fail)
    with pytest.raises(KeyError, match="own fault"):
        fimprobe.measure(mlp(), X, likelihood="categorical")


@pytest.mark.parametrize(
    "sigma", [None, "1", True, 0, -1.0, float("nan"), float("inf"), torch.ones(2)]
)
def test_sigma_that_is_no_deviation(sigma):
    with pytest.raises(FimprobeError, match="sigma must be a positive and finite standard deviation"):
        Gaussian(sigma=sigma)


@pytest.mark.parametrize("class_dim", [None, "1", True, 1.0, (1,)])
def test_class_dim_that_is_no_integer(class_dim):
    with pytest.raises(FimprobeError, match="class_dim must be an integer"):
        Categorical(class_dim=class_dim)


def test_draws_that_fill_the_memory_are_refused():
    model = nn.Conv1d(1, 2, 1)
    with pytest.raises(FimprobeError, match="`draws` must be smaller for this batch, got 1000000"):
        fimprobe.measure(
            model,
            torch.randn(4, 1, 1000),
            likelihood=Categorical(class_dim=1),
            draws=10**6,
            estimators=["i1"],
            bounds=False,
        )


@pytest.mark.parametrize("option", ["draws", "seed", "memory_mb"])
def test_numbers_too_long_to_be_shown(option):
    with pytest.raises(FimprobeError, match=f"`{option}` must be .* that cannot be shown"):
        fimprobe.measure(mlp(), X, likelihood="categorical", **{option: 10**5000})
