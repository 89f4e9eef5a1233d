"""A second measurement of a model uses the plan of the first, and gives the same numbers."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.measurement import kept_plans, process_share


@pytest.fixture
def verifications(monkeypatch):
    """Counts the plans that are verified."""
    counted = []
    verify = process_share.make_verified_plan

    def count(problem):
        counted.append(problem)
        return verify(problem)

    monkeypatch.setattr(process_share, "make_verified_plan", count)
    return counted


class Scaled(nn.Module):
    """A model whose way depends on an option of its own and on one of an object."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(4, 5), nn.Linear(5, 3), nn.Parameter(torch.ones(3))
        self.twice, self.config = False, type("Config", (), {})()
        self.config.thrice = False

    def forward(self, x):
        y = self.b(self.a(x).tanh()) * self.scale
        y = y + self.b(self.a(x).sin()) if self.twice else y
        return y + self.b(torch.ones(len(x), 5)) if self.config.thrice else y


def measure(model, x, **options):
    return fimprobe.measure(model, x, **({"likelihood": "categorical", "diagonals": True} | options))


def numbers(report):
    return {n: (p.i1.diagonal[n], p.i2.diagonal[n]) for n, p in report.parameters.items()}


@pytest.mark.parametrize("memory_mb", [512, 0.02])
def test_the_second_measurement_verifies_nothing_and_is_the_same(verifications, memory_mb):
    model, x = Scaled(), torch.randn(64, 4)
    first = measure(model, x, memory_mb=memory_mb)
    second = measure(model, x, memory_mb=memory_mb)
    assert len(verifications) == 1
    measure(model, x[:7], memory_mb=memory_mb)
    third = measure(model, x, memory_mb=memory_mb)
    assert len(verifications) == 1
    fresh = measure(model, x, memory_mb=memory_mb, plan=fimprobe.Plan())
    for report in (second, third, fresh):
        for a, b in zip(numbers(first).values(), numbers(report).values(), strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


CHANGES = {
    "an option": lambda m: setattr(m, "twice", True),
    "an option of its options": lambda m: setattr(m.config, "thrice", True),
    "the trainable parameters": lambda m: m.a.bias.requires_grad_(False),
    "the type": lambda m: m.double(),
    "a hook": lambda m: m.a.register_forward_hook(lambda mod, args, out: 2 * out),
    "a patched forward": lambda m: setattr(m.b, "forward", lambda x: x @ m.b.weight.T),
    "another layer": lambda m: setattr(m, "a", nn.Sequential(nn.Linear(4, 5), nn.Tanh())),
    "a parameter under a parametrization": lambda m: nn.utils.parametrizations.weight_norm(m.a),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_verified_again(verifications, change):
    model, x = Scaled(), torch.randn(6, 4)
    measure(model, x)
    CHANGES[change](model)
    x = x.to(model.b.weight.dtype)
    report = measure(model, x)
    assert len(verifications) == 2
    expected = measure(copy.deepcopy(model), x) if change != "a patched forward" else report
    assert report.total.i1.trace == expected.total.i1.trace


def test_other_kinds_of_inputs_have_a_plan_of_their_own(verifications):
    model = Scaled()
    measure(model, torch.randn(6, 4))
    measure(model, {"x": torch.randn(6, 4)})
    measure(model, torch.randn(6, 2, 4))
    measure(model, torch.randn(6, 4))
    assert len(verifications) == 3


def test_a_function_with_a_state_keeps_no_plan(verifications):
    model, x, places = Scaled(), torch.randn(6, 4), [0, 1]
    for _ in range(2):
        measure(model, x, output=lambda out: out[:, places])
    assert len(verifications) == 2
    for _ in range(2):
        measure(model, x, output=lambda out: out[:, :2])
    assert len(verifications) == 3


def test_a_plan_keeps_no_model_alive_and_a_failure_keeps_no_plan(verifications):
    model = Scaled()
    measure(model, torch.randn(6, 4))
    with pytest.raises(fimprobe.FimprobeError):
        measure(model, torch.full((6, 4), float("nan")))
    reference, identity = weakref.ref(model), id(model)
    assert identity in kept_plans._plans
    del model
    verifications.clear()
    gc.collect()
    assert reference() is None and identity not in kept_plans._plans


def test_probes_and_explicit_plans_are_not_kept(verifications):
    model, plan = Scaled(), fimprobe.Plan()
    measure(model, torch.randn(6, 4), plan=plan)
    measure(model, torch.randn(6, 4))
    assert len(verifications) == 2


def test_reading_options_runs_no_code_of_the_user_and_no_data(verifications):
    """A lazy table and a long buffer among the attributes."""
    from collections.abc import Mapping

    class Lazy(Mapping):
        def __getitem__(self, key):
            raise AssertionError("loaded")

        def __iter__(self):
            raise AssertionError("loaded")

        __len__ = __iter__

        def __getattr__(self, name):
            raise AssertionError("asked")

    model, x = Scaled(), torch.randn(6, 4)
    model.lazy, model.buffer = Lazy(), [torch.zeros(1)] * 100_000
    assert isinstance(kept_plans._fingerprint(model), int)
    before = kept_plans._fingerprint(model)
    model.buffer.append(torch.zeros(1))
    assert kept_plans._fingerprint(model) != before
    del model.lazy
    measure(model, x)
    measure(model, x)
    assert len(verifications) == 1
