"""With a closure, the parameters before the optimizer's step are measured."""

import pytest
import torch

import fimprobe
from tests.support.bit_identity import same
from tests.support.measured_batch import KNOWN, OPTIONS, OTHER, TRAIN, Loop, check, loss_of


class Sam(torch.optim.Optimizer):
    """Sharpness-aware: by gradients of an earlier backward, or of a first call of its closure."""

    def __init__(self, params, lr, first=False):
        super().__init__(params, {"lr": lr})
        self.base, self.first = torch.optim.SGD(self.param_groups, lr=lr), first

    @torch.no_grad()
    def step(self, closure):
        if self.first:
            with torch.enable_grad():
                closure()
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        old = [p.detach().clone() for p in params]
        for p in params:
            p.add_(p.grad * (0.5 / norm))
        with torch.enable_grad():
            closure()
        for p, o in zip(params, old, strict=True):
            p.copy_(o)
        self.base.step()


class FirstSam(Sam):
    def __init__(self, params, lr):
        super().__init__(params, lr, first=True)


class Blind(torch.optim.Optimizer):
    """Moves the parameters by what it remembers before it calls its closure."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            p.mul_(1.5)
        with torch.enable_grad():
            closure()
        for p in params:
            p.sub_(p.grad, alpha=self.defaults["lr"])


def closure_of(model, optimizer, data=TRAIN):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        return loss

    return closure


def backward_then_closure(model, optimizer):
    closure = closure_of(model, optimizer)
    closure()
    optimizer.step(closure)


def closure_alone(model, optimizer):
    optimizer.step(closure_of(model, optimizer))


def closure_with_a_metric(model, optimizer):
    closure = closure_of(model, optimizer)

    def with_metric():
        loss = closure()
        model(OTHER[0])
        return loss

    optimizer.step(with_metric)


def closure_by_keyword(model, optimizer):
    optimizer.step(closure=closure_of(model, optimizer))


def metric_then_closure(model, optimizer):
    model(OTHER[0])
    optimizer.step(closure_of(model, optimizer))


@KNOWN
@pytest.mark.parametrize(
    ("step", "optimizer"),
    [
        (backward_then_closure, Sam),
        (closure_alone, FirstSam),
        (closure_by_keyword, FirstSam),
        (closure_alone, torch.optim.LBFGS),
        (closure_with_a_metric, torch.optim.LBFGS),
        (metric_then_closure, torch.optim.LBFGS),
        (backward_then_closure, torch.optim.LBFGS),
        (closure_alone, torch.optim.SGD),
    ],
)
def test_a_closure_is_measured_at_the_parameters_before_the_step(step, optimizer, known):
    check(step, optimizer=optimizer, known=known)


def test_each_step_of_a_closure_counts_once():
    for step, optimizer in ((backward_then_closure, Sam), (closure_alone, torch.optim.LBFGS)):
        loop = Loop(step, optimizer=optimizer)
        probe, _ = loop.run(4, likelihood="categorical", schedule={"at": [2]})
        assert probe.steps == 4 and [r.step for r in probe.history] == [2]


def test_parameters_that_move_before_the_closure_are_reported(caplog):
    loop = Loop(closure_alone, optimizer=Blind)
    probe, _ = loop.run(3, likelihood="categorical")
    assert not probe.history and probe.steps == 3
    (message,) = [r.getMessage() for r in caplog.records]
    assert "the optimizer changed the parameters before it called its closure" in message
    plain = Loop(closure_alone, optimizer=Blind)
    plain.train(3)
    assert same(plain.model.state_dict(), loop.model.state_dict())


class Custom(torch.optim.SGD):
    """Its own step, which calls the closure first as those of torch do."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, Custom, Sam])
def test_the_last_batch_is_measured_where_a_closure_accumulates(optimizer):
    """An optimizer that nobody knows is measured before its step once, until its order is seen."""
    loop = Loop(None, optimizer=optimizer, lr=1e-3)
    probe = fimprobe.attach(loop.model, **OPTIONS, likelihood="categorical", on_error="raise")
    for _ in range(3):
        loop.optimizer.zero_grad()
        loss_of(loop.model, OTHER).backward()

        def closure():
            loss = loss_of(loop.model, TRAIN)
            loss.backward()
            return loss

        loop.optimizer.step(closure)
    probe.detach()
    sizes = [r.batch_size for r in probe.history]
    assert sizes == {torch.optim.SGD: [48] * 3, Custom: [7, 48, 48], Sam: [7] * 3}[optimizer]
