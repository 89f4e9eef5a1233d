"""Loops whose parameters no torch optimizer changes, and what is stated where nothing is measured."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fimprobe
from fimprobe.training.unseen_steps import LATE_NOTE, UNSEEN_STEPS
from tests.models.small import mlp
from tests.support.bit_identity import same
from tests.support.warnings import warnings_of

OPTIONS = {"schedule": {"every": 1}, "tensorboard": False, "estimators": ["i1"], "bounds": False}


def batch(step, size=12):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)


def in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
            p.grad = None


def through_data(model):
    """As fastai's optimizer: the version counters of the parameters do not change."""
    for p in model.parameters():
        p.data.add_(p.grad.data, alpha=-0.1)
        p.grad.detach_()
        p.grad.zero_()


def replaced_storage(model):
    for p in model.parameters():
        p.data = p.data - 0.1 * p.grad
        p.grad = None


UPDATES = {f.__name__: f for f in (in_place, through_data, replaced_storage)}


def loss_of(model, step):
    x, y = batch(step)
    return F.cross_entropy(model(x), y)


def by_hand(model, steps, update, accumulate=1):
    states = []
    for step in range(steps):
        for piece in range(accumulate):
            (loss_of(model, accumulate * step + piece) / accumulate).backward()
        update(model)
        states.append(copy.deepcopy(model.state_dict()))
    return states


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", UPDATES)
def test_updates_written_by_hand_count_as_steps(name, accumulate, caplog):
    torch.manual_seed(0)
    model = mlp()
    plain = copy.deepcopy(model)
    probe = fimprobe.attach(model, likelihood="categorical", draws="exact", **OPTIONS)
    states = by_hand(model, 7, UPDATES[name], accumulate)
    probe.detach()
    by_hand(plain, 7, UPDATES[name], accumulate)
    assert same(model.state_dict(), plain.state_dict())
    (line,) = warnings_of(caplog)
    assert "no step of a torch optimizer was seen" in line and "probe.step()" in line
    # the last step has no forward after it
    assert [report.step for report in probe.history] == list(range(UNSEEN_STEPS - 1, 6))
    assert probe.steps == 6
    for report in probe.history:
        assert LATE_NOTE in report.notes
        plain.load_state_dict(states[report.step])
        x, _ = batch(accumulate * report.step + accumulate - 1)
        want = fimprobe.measure(
            plain, x, likelihood="categorical", draws="exact", bounds=False, estimators=["i1"]
        )
        assert report.total.i1.trace == pytest.approx(want.total.i1.trace, rel=1e-5)


def test_gradients_that_are_returned(caplog):
    model = mlp()
    probe = fimprobe.attach(model, likelihood="categorical", **OPTIONS)
    for step in range(6):
        gradients = torch.autograd.grad(loss_of(model, step), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.sub_(g, alpha=0.1)
    probe.detach()
    assert len(probe.history) == 3 and len(warnings_of(caplog)) == 1


def test_the_likelihood_is_inferred_too():
    model = mlp()
    with fimprobe.attach(model, **OPTIONS) as probe:
        by_hand(model, 6, in_place)
    assert probe.likelihood is not None and len(probe.history) == 3


def test_steps_that_the_loop_calls_are_measured_before(caplog):
    model = mlp()
    probe = fimprobe.attach(model, likelihood="categorical", **OPTIONS)

    def update(model):
        probe.step()
        in_place(model)

    by_hand(model, 5, update)
    probe.detach()
    assert [report.step for report in probe.history] == list(range(5))
    assert not warnings_of(caplog) and not any(report.notes for report in probe.history)


def test_accumulation_before_a_torch_optimizer_is_no_such_loop(caplog):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = fimprobe.attach(model, likelihood="categorical", **OPTIONS)
    for step in range(2):
        for piece in range(8):
            loss_of(model, 8 * step + piece).backward()
        optimizer.step()
        optimizer.zero_grad()
    probe.detach()
    assert [report.step for report in probe.history] == [0, 1] and not warnings_of(caplog)


def test_a_forward_that_writes_parameters_makes_no_steps(caplog):
    class Rescaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            if self.training:
                self.net[2].bias.data.mul_(0.5)
            return self.net(x)

    model = Rescaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = fimprobe.attach(model, likelihood="categorical", **OPTIONS)
    for piece in range(8):
        loss_of(model, piece).backward()
    optimizer.step()
    probe.detach()
    assert len(probe.history) == 1 and not any("torch optimizer" in w for w in warnings_of(caplog))


def test_parameters_that_are_frozen_in_turn_make_no_steps(caplog):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = fimprobe.attach(model, likelihood="categorical", **OPTIONS)
    for piece in range(8):
        model[piece % 2 * 2].requires_grad_(piece % 3 == 0)
        model[2].requires_grad_(True)
        if not model[0].weight.requires_grad:
            model[0].weight.data.mul_(0.9)  # as the average of another model
        loss_of(model, piece).backward()
    optimizer.step()
    probe.detach()
    assert len(probe.history) == 1 and not warnings_of(caplog)


def test_the_steps_of_other_optimizers_than_the_given_one_do_not_count(caplog):
    model = mlp()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[2].parameters(), lr=0.1)
    probe = fimprobe.attach(model, likelihood="categorical", optimizer=second, **OPTIONS)
    for step in range(6):
        loss_of(model, step).backward()
        first.step()
    second.step()
    probe.detach()
    assert len(probe.history) == 1 and not warnings_of(caplog)


def test_functional_optimizers_are_told_what_to_call(caplog):
    model = mlp()
    probe = fimprobe.attach(model, likelihood="categorical", **OPTIONS)
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}

    def loss(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    for step in range(5):
        gradients = torch.func.grad(loss)(parameters, *batch(step))
        parameters = {n: p - 0.1 * gradients[n] for n, p in parameters.items()}
    probe.detach()
    (line,) = warnings_of(caplog)
    assert not probe.history and "5 training batches went forward, but no step was seen" in line
    assert "torch.func" in line and "probe.step()" in line


def test_an_undecided_likelihood_is_explained_at_the_end(caplog):
    model = torch.nn.Linear(4, 3)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = fimprobe.attach(model, **OPTIONS)
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
    probe.detach()
    (line,) = warnings_of(caplog)
    assert "not decided after 2 training batches" in line and "likelihood=" in line


def test_a_probe_that_was_never_due_or_saw_nothing_warns_of_nothing(caplog):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fimprobe.attach(model, likelihood="categorical", **{**OPTIONS, "schedule": {"at": [99]}}):
        for step in range(5):
            loss_of(model, step).backward()
            optimizer.step()
    with fimprobe.attach(model, likelihood="categorical", **OPTIONS):
        pass
    assert not warnings_of(caplog)
