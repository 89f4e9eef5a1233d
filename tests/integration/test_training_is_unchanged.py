"""Training with the probe is bit-identical to training without."""

import copy
import gc
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fimprobe
from tests.models.small import mlp
from tests.support.bit_identity import EVERY, LEAN, data, same, streams, train

ALL = ("i1", "i2", "ih", "empirical")
STEPS = 10
"""Beyond the eighth, where a sample is compared with its own run again."""


def convnet():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Linear(16, 5),
    )  # fmt: skip


def structure(model):
    """Everything on the modules but tensors' values: keys, modes, flags, hooks, identities."""
    seen = []
    for path, module in model.named_modules():
        for key, value in module.__dict__.items():
            if isinstance(value, dict):
                value = (id(value), [(k, id(v)) for k, v in value.items()])
            elif not isinstance(value, (bool, int, float, str, type(None))):
                value = id(value)
            seen.append((path, key, value))
    return seen


def run(options, steps=STEPS):
    """A training of a net with BatchNorm, Dropout and in-place layers; all that it left behind."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(3)
    net = convnet()
    before = structure(net)
    probe = None if options is None else fimprobe.attach(net, on_error="raise", **options)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    trace = []
    for _ in range(steps):
        pick = np.random.permutation(12) + random.randrange(1)
        x, y = torch.randn(12, 1, 6, 6)[pick], torch.randint(5, (12,))
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        trace.append((loss.item(), [p.grad.clone() for p in net.parameters()]))
        optimizer.step()
        trace[-1] += ([p.grad.clone() for p in net.parameters()], streams())
        if probe is not None:
            for m in net.modules():
                assert m.training and getattr(m, "inplace", False) is isinstance(m, nn.ReLU)
    if probe is not None:
        assert len(probe.history) == steps == probe.steps
        probe.detach()
    assert structure(net) == before
    return trace, dict(net.state_dict()), optimizer.state_dict(), streams()


@pytest.fixture(scope="module")
def without():
    return run(None)


@pytest.mark.parametrize(
    "options",
    [
        EVERY,
        {**EVERY, "estimators": ALL, "draws": "exact", "likelihood": "categorical"},
        {**EVERY, "estimators": ALL, "second_order": "exact", "engine": "backpack"},
        {**LEAN, "likelihood": "categorical"},
        {**LEAN, "draws": "exact"},
        {**EVERY, "label_sampling": "model"},
        {**LEAN, "draws": "auto"},
    ],
    ids=[
        "defaults",
        "everything",
        "everything, BackPACK",
        "known likelihood",
        "exact labels",
        "labels from the model",
        "exact labels where cheap",
    ],
)
def test_training_is_bit_identical(options, without):
    assert same(run(options), without)


def test_training_is_bit_identical_with_tensorboard(tmp_path, without):
    options = {"schedule": {"every": 1}, "log_dir": tmp_path, "likelihood": "categorical"}
    assert same(run(options), without)
    assert list(tmp_path.glob("events*"))
    run_and_reports = (tmp_path / "fimprobe.jsonl").read_text().splitlines()
    assert len(run_and_reports) == 1 + STEPS


def test_the_comparison_sees_a_difference(without):
    assert same(run(None), without)
    torch.rand(1)
    assert not same(streams(), without[3])


def test_nothing_is_left_on_the_model():
    net = convnet()
    x, y = data(6, 1, 6, 6)
    train(net, 1, x, y)
    net[0].register_forward_hook(lambda *a: None)
    before = structure(net)
    probe = fimprobe.attach(net, likelihood="categorical", **EVERY)
    assert structure(net) != before
    train(net, 2, x, y, each=lambda step: None)
    assert len(probe.history) == 2
    probe.detach()
    assert structure(net) == before
    copy.deepcopy(net)


def test_memory_does_not_grow():
    def resident():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 1e6

    net = mlp(64)
    x, y = data(64, 64)
    probe = fimprobe.attach(net, **EVERY)
    train(net, 40, x, y)
    before = resident()
    train(net, 75, x, y)
    assert resident() - before < 3 and len(probe.history) == 115
    probe.detach()
