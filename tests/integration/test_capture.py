"""The capture: which forwards it holds, for how long, and what it leaves on the outputs."""

import gc
import pickle
import warnings
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fimprobe
from tests.support.measured_batch import (
    OPTIONS,
    OTHER,
    TRAIN,
    Loop,
    batch,
    check,
    loss_of,
    net,
    trace,
)


def test_a_batch_that_no_backward_reached_is_not_measured(caplog):
    """The loss is that of a sub-module: the forward of the whole model was for a metric."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(model, **OPTIONS, likelihood="categorical")
    for _ in range(3):
        optimizer.zero_grad()
        h = TRAIN[0]
        for layer in model:
            h = layer(h)
        F.cross_entropy(h, TRAIN[1]).backward()
        model(OTHER[0])
        optimizer.step()
    probe.detach()
    assert not probe.history and probe.steps == 3
    (message,) = [r.getMessage() for r in caplog.records]
    assert "no backward pass reached" in message and "probe.step(inputs)" in message


class Opaque:
    def __init__(self, loss):
        self.loss = loss


class ReturnsAnObject(nn.Module):
    """What it returns hides its tensors; only the loss is inside."""

    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        return Opaque(self.inner(x))


def test_outputs_that_cannot_be_observed_are_measured_as_before():
    model = ReturnsAnObject()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(
        model, **OPTIONS, likelihood="categorical", output=lambda out: out.loss, on_error="raise"
    )
    right = trace(model.inner, TRAIN[0])
    F.cross_entropy(model(TRAIN[0]).loss, TRAIN[1]).backward()
    optimizer.step()
    probe.detach()
    assert probe.last.total.i1.trace == pytest.approx(right, rel=1e-5)


def test_batches_that_cannot_be_chosen_are_released():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(model, **OPTIONS, likelihood="categorical")
    inputs = []

    def fresh(size):
        x, y = batch(size, size)
        inputs.append(weakref.ref(x))
        return x, y

    def alive():
        gc.collect()
        return sum(x() is not None for x in inputs)

    for size in range(3, 9):  # accumulation: the newest whose backward is done
        loss_of(model, fresh(size)).backward()
        assert alive() == 1
    for size in range(9, 15):  # metrics: the newest, until another forward shows that it is over
        model(fresh(size)[0])
        assert alive() <= 2
    optimizer.step()
    assert probe.last.batch_size == 8
    assert alive() == 0
    probe.detach()


def test_a_kept_loss_keeps_no_batch():
    model = net()
    probe = fimprobe.attach(model, **OPTIONS, likelihood="categorical")
    x, y = batch(5, 1)
    kept = F.cross_entropy(model(x), y)
    captured = weakref.ref(probe._cycle.capture.last)
    kept.backward(retain_graph=True)
    probe.step()
    gc.collect()
    assert captured() is None and kept.grad_fn is not None
    kept.backward()  # a later backward of an old graph changes nothing
    probe.detach()


def test_only_measured_steps_have_hooks_on_the_outputs():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(model, **{**OPTIONS, "schedule": {"at": [2]}}, likelihood="categorical")
    hooks = []
    for _ in range(4):
        h = model(TRAIN[0])
        hooks.append(len(h._backward_hooks or {}))
        F.cross_entropy(h, TRAIN[1]).backward()
        optimizer.step()
    probe.detach()
    assert hooks == [1, 0, 1, 0]  # the first forward: until then the loop might number its steps


class ReturnsAParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.log_sigma = net(), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.inner(x), self.log_sigma


def test_no_hook_is_left_on_a_parameter_that_is_an_output():
    model = ReturnsAParameter()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(model, **OPTIONS, likelihood="categorical", on_error="raise")
    h, log_sigma = model(TRAIN[0])
    (F.cross_entropy(h, TRAIN[1]) + log_sigma.square()).backward()
    optimizer.step()
    probe.detach()
    assert len(probe.history) == 1
    assert all(not p._backward_hooks for p in model.parameters())


def test_outputs_can_be_pickled_without_a_warning():
    model = net()
    probe = fimprobe.attach(model, **OPTIONS)
    h = model(TRAIN[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pickle.loads(pickle.dumps(h.detach().requires_grad_())), h)
        h.retain_grad()
    loss_of(model, TRAIN).backward()
    probe.detach()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_is_measured_once(reentrant):
    def step(model, optimizer):
        optimizer.zero_grad()
        x = TRAIN[0].clone().requires_grad_()
        h = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        F.cross_entropy(h, TRAIN[1]).backward()
        optimizer.step()

    check(step, known={"likelihood": "categorical"})


def test_a_compiled_model_is_tied_to_its_backward():
    def step(model, optimizer):
        optimizer.zero_grad()
        loss_of(model, TRAIN).backward()
        model(OTHER[0])
        optimizer.step()

    def compiled():
        return torch.compile(net(), backend="aot_eager")

    watched = Loop(step, model=compiled)
    probe, truth = watched.run(2, likelihood="categorical", on_error="raise")
    assert [r.batch_size for r in probe.history] == [48, 48]
    assert [r.total.i1.trace for r in probe.history] == pytest.approx(truth, rel=1e-5)


def test_functional_gradients_are_tied_too():
    model = net()
    probe = fimprobe.attach(model, **OPTIONS, likelihood="categorical", on_error="raise")
    parameters = dict(model.named_parameters())

    def loss(values):
        return F.cross_entropy(torch.func.functional_call(model, values, (TRAIN[0],)), TRAIN[1])

    torch.func.grad(loss)(parameters)
    model(OTHER[0])
    probe.step()
    assert probe.last.batch_size == 48
    probe.detach()


@dataclass
class Record:
    head: object
    name: str = "record"


class Unregistered(dict):
    """A mapping that torch does not know."""


STRUCTURES = {
    "tuple": (lambda h: (h, h.detach()), lambda out: out[0]),
    "mapping": (lambda h: {"a": {"b": [h]}}, lambda out: out["a"]["b"][0]),
    "own mapping": (lambda h: Unregistered(a=Unregistered(b=h)), lambda out: out["a"]["b"]),
    "record": (lambda h: Record([Record(h)]), lambda out: out.head[0].head),
}


class Wrapping(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = net(), wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


@pytest.mark.parametrize("name", STRUCTURES)
def test_gradients_are_observed_at_tensors_in_any_structure(name):
    wrap, select = STRUCTURES[name]
    model = Wrapping(wrap)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(model, **OPTIONS, output=select, on_error="raise")
    F.cross_entropy(select(model(TRAIN[0])), TRAIN[1]).backward()
    model(OTHER[0])
    optimizer.step()
    probe.detach()
    assert probe.last.batch_size == 48


def test_a_record_that_holds_itself_is_no_trap():
    def wrap(h):
        record = Record(h)
        record.name = [record]
        return record

    model = Wrapping(wrap)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(model, **OPTIONS, output=lambda out: out.head, on_error="raise")
    F.cross_entropy(model(TRAIN[0]).head, TRAIN[1]).backward()
    model(OTHER[0])
    optimizer.step()
    probe.detach()
    assert probe.last.batch_size == 48
