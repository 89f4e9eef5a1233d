"""Training loops whose steps are functions, and the batch that a probe in them must measure."""

import pytest
import torch
import torch.nn.functional as F

import fimprobe
from tests.models.small import mlp
from tests.support.bit_identity import same

OPTIONS = {
    "schedule": {"every": 1},
    "draws": "exact",
    "batch": 64,
    "tensorboard": False,
    "bounds": False,
    "second_order": "off",
    "estimators": ["i1"],
}
KNOWN = pytest.mark.parametrize("known", [{}, {"likelihood": "categorical"}], ids=["auto", "given"])


def net():
    torch.manual_seed(0)
    return mlp(6, 8, 4)


def batch(size, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(size, 6, generator=generator)
    return x, torch.randint(4, (size,), generator=generator)


def loss_of(model, data):
    x, y = data
    return F.cross_entropy(model(x), y)


def trace(model, x):
    options = {"draws": "exact", "bounds": False, "second_order": "off", "estimators": ["i1"]}
    return fimprobe.measure(model, x, likelihood="categorical", **options).total.i1.trace


TRAIN, OTHER = batch(48, 1), batch(7, 2, scale=5.0)


class Loop:
    """A training whose steps are given as functions of (model, optimizer)."""

    def __init__(self, step, lr=0.1, optimizer=torch.optim.SGD, model=net):
        self.step, self.model = step, model()
        self.optimizer = optimizer(self.model.parameters(), lr)

    def run(self, steps=3, **options):
        """Reports, each with the trace that the training batch has at that step."""
        probe = fimprobe.attach(self.model, **{**OPTIONS, **options})
        truth = []
        for _ in range(steps):
            truth.append(trace(self.model, TRAIN[0]))
            self.step(self.model, self.optimizer)
        probe.detach()
        return probe, truth

    def train(self, steps=3):
        for _ in range(steps):
            self.step(self.model, self.optimizer)


def check(step, steps=3, known=None, **loop):
    """The training batch is measured at every step, and training is bit-identical."""
    watched = Loop(step, **loop)
    probe, truth = watched.run(steps, on_error="raise", **(known or {"likelihood": "categorical"}))
    assert [r.batch_size for r in probe.history] == [len(TRAIN[0])] * steps
    assert [r.total.i1.trace for r in probe.history] == pytest.approx(truth, rel=1e-5)
    plain = Loop(step, **loop)
    plain.train(steps)
    assert same(plain.model.state_dict(), watched.model.state_dict())


def tagger():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
