"""Outputs that the loop changes in place: nothing is inferred from other values than the model's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fimprobe
from tests.support.bit_identity import same
from tests.support.measured_batch import OPTIONS, TRAIN, Loop, check, net, tagger


def divide(h):
    return h.div_(4.0)


def assign_column(h):
    h[:, 0] = 0.0
    return h


def assign_row(h):
    h[3] = 1.0
    return h


def fill_where(h):
    return h.masked_fill_(h > 1, 1.0)


CHANGES = pytest.mark.parametrize(
    "change", [divide, assign_column, assign_row, fill_where], ids=lambda f: f.__name__
)


class Transposed(nn.Module):
    """Returns a view: an in-place operation on it replaces its node in the graph."""

    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        return self.inner(x).t().contiguous().t()


@CHANGES
@pytest.mark.parametrize("model", [net, Transposed], ids=["tensor", "view"])
def test_a_family_is_not_inferred_from_changed_outputs(change, model, caplog):
    def step(model, optimizer):
        optimizer.zero_grad()
        F.cross_entropy(change(model(TRAIN[0])), TRAIN[1]).backward()
        optimizer.step()

    loop = Loop(step, model=model)
    probe, _ = loop.run(3)
    assert not probe.history and probe.likelihood is None
    (message,) = [r.getMessage() for r in caplog.records]
    assert "changed in place before the loss" in message and "logits = logits / 2" in message
    plain = Loop(step, model=model)
    plain.train(3)
    assert same(plain.model.state_dict(), loop.model.state_dict())


@CHANGES
@pytest.mark.parametrize("model", [net, Transposed], ids=["tensor", "view"])
def test_with_a_given_family_the_returned_outputs_count(change, model):
    def step(model, optimizer):
        optimizer.zero_grad()
        F.cross_entropy(change(model(TRAIN[0])), TRAIN[1]).backward()
        optimizer.step()

    check(step, model=model, known={"likelihood": "categorical"})


def test_outputs_changed_after_the_backward_wait_for_another_batch(caplog):
    """The gradient is right, the values are lost: the next batch may leave them."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(model, **OPTIONS)
    for i in range(3):
        optimizer.zero_grad()
        h = model(TRAIN[0])
        F.cross_entropy(h, TRAIN[1]).backward()
        if i < 2:
            h.detach().zero_()
        optimizer.step()
    probe.detach()
    assert [r.step for r in probe.history] == [2] and not caplog.records


def test_labels_are_not_read_off_changed_outputs(caplog):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(
        model, **{**OPTIONS, "estimators": ["i1", "empirical"]}, likelihood="categorical"
    )
    F.cross_entropy(model(TRAIN[0]).div_(4), TRAIN[1]).backward()
    optimizer.step()
    probe.detach()
    assert probe.last.total.empirical is None and probe.last.total.i1 is not None
    (message,) = [r.getMessage() for r in caplog.records]
    assert "no empirical Fisher" in message and "changed in place" in message


def test_positions_that_were_not_seen_are_not_taken_for_all(caplog):
    """A view changed in place hides the gradient: which positions have a label is not known."""

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tagger()

        def forward(self, x):
            return self.inner(x).transpose(0, 1).contiguous().transpose(0, 1)

    model, tokens = Maps(), torch.randint(11, (16, 6))
    labels = torch.randint(5, (16, 6))
    labels[:, 3:] = -100
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(model, **OPTIONS)
    for i in range(2):
        optimizer.zero_grad()
        out = model(tokens)
        if i:
            out[0, 0, 0] = 0.0
        F.cross_entropy(out.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
    probe.detach()
    assert [r.step for r in probe.history] == [0]
    (message,) = [r.getMessage() for r in caplog.records]
    assert "positions that carry a label are not known" in message and "mask=" in message
