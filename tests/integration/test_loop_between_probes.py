"""Between probes: no tensor operation, no waiting for a device, nothing held, nothing forgotten."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fimprobe
from fimprobe.probe.optimizers import OptimizerFilter
from fimprobe.training.schedule import Budget
from tests.models.small import Tagger, mlp
from tests.support.loop import (
    EVERY,
    KNOWN,
    data,
    equal,
    expected,
    sgd,
    train,
)


class Dispatched(TorchDispatchMode):
    """Every operation that reaches the dispatcher, backward's included."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Every function of torch that Python calls on a tensor, attributes and ``.item()`` included."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def tagger_step(net, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (6, 7), generator=generator)
    optimizer.zero_grad()
    loss = F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten() % 5)
    loss.backward()
    optimizer.step()
    return loss


def calls_of(mode, net, optimizer):
    with mode() as seen:
        tagger_step(net, optimizer)
    return seen.calls


SCHEDULES = [{"every": 50}, {"at": [0, 60]}, {"budget": 1e-9}]


@pytest.mark.parametrize("estimators", [["i1"], ["i1", "empirical"]])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("mode", [Dispatched, Called])
def test_a_step_between_probes_adds_no_tensor_operation(mode, schedule, estimators):
    plain, net = Tagger(), Tagger()
    plain.load_state_dict(net.state_dict())
    ours, theirs = sgd(net, momentum=0.9), sgd(plain, momentum=0.9)
    options = {**EVERY, "estimators": estimators, "schedule": schedule}
    for _ in range(3):
        tagger_step(plain, theirs)
    want = calls_of(mode, plain, theirs)
    with fimprobe.attach(net, options) as probe:
        for _ in range(3):
            tagger_step(net, ours)
        reports = len(probe.history)
        assert calls_of(mode, net, ours) == want and len(probe.history) == reports > 0
        probe._cycle.schedule = fimprobe.training.schedule.Every(1)
        probed = calls_of(mode, net, ours)  # the comparison sees a probe
        assert len(probe.history) == reports + 1 and len(probed) > 2 * len(want)
    assert probe.steps == 5


@pytest.mark.parametrize("size", [1, 8])
def test_a_step_between_probes_walks_no_parameters(size, monkeypatch):
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(size)])
    optimizer, other = torch.optim.SGD(net.parameters(), lr=0.0), sgd(mlp())
    walks = []
    walk = nn.Module.named_parameters
    with fimprobe.attach(net, KNOWN, schedule={"at": [0, 200]}) as probe:

        def step():
            optimizer.zero_grad()
            net(data()[0]).sum().backward()
            optimizer.step()
            other.step()

        for _ in range(70):
            step()

        def counted(module, *args, **options):
            if module is net:  # probes that other tests left attached look at theirs
                walks.append(1)
            return walk(module, *args, **options)

        monkeypatch.setattr(nn.Module, "named_parameters", counted)
        for _ in range(50):  # the other optimizer is looked at again after 64, 128, ... steps
            step()
        assert not walks and probe.steps == 120
        for _ in range(81):
            step()
        assert walks and [r.step for r in probe.history] == [0, 200]


def test_an_optimizer_that_gains_the_parameters_later_is_noticed():
    net, stranger = mlp(), nn.Linear(4, 3)
    optimizer = sgd(stranger)
    with fimprobe.attach(net, KNOWN, schedule={"at": [1]}) as probe:

        def step():
            net(data()[0]).sum().backward()
            optimizer.step()

        for _ in range(5):
            step()
        assert probe.steps == 0
        optimizer.add_param_group({"params": list(net.parameters())})
        step()
        assert probe.steps == 1
        step()
        assert [r.step for r in probe.history] == [1]


def test_a_model_that_gains_the_optimizers_parameters_is_noticed():
    net, more = mlp(), nn.Linear(3, 3)
    optimizer, trains = sgd(more), OptimizerFilter()
    assert not any(trains.matches(optimizer, net, refresh=False) for _ in range(40))
    net.append(more)
    assert [trains.matches(optimizer, net, refresh=False) for _ in range(40)][-1]  # asked at the 64th
    del net[3]
    assert trains.matches(optimizer, net, refresh=False) and not trains.matches(
        optimizer, net, refresh=True
    )


def test_forgotten_optimizers_are_let_go():
    net = mlp()
    trains, optimizer = OptimizerFilter(), sgd(net)
    trains.matches(optimizer, net, refresh=False)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


class Recorded(torch.autograd.Function):
    """Passes its input on; keeps no gradient, but a weak reference to the one that came."""

    arrived: list = []

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        given = gradient.clone()
        Recorded.arrived.append(weakref.ref(given))
        return given


class Watcher:
    """A sink: called while the probe is at its measurement."""

    watched: list = []

    def write(self, report):
        assert all(there() is None for there in Watcher.watched)

    def close(self): ...


@pytest.mark.parametrize("estimators", [["i1"], ["i1", "empirical"]])
@pytest.mark.parametrize("when", ["undecided", "first", "due", "between"])
def test_nothing_of_a_step_outlives_it(when, estimators):
    """Inputs, outputs and gradients die as they would without a probe, though the loss lives on."""
    net = Tagger()
    optimizer = sgd(net)
    options = {**EVERY, "estimators": estimators, "schedule": {"every": 1}}
    with fimprobe.attach(net, options, sinks=[Watcher()]) as probe:
        if when in ("due", "between"):
            tagger_step(net, optimizer)
        if when in ("undecided", "between"):
            probe._cycle.schedule = fimprobe.training.schedule.At([])
        Recorded.arrived = []
        tokens = torch.randint(11, (6, 7))
        out = net(tokens)
        loss = F.cross_entropy(Recorded.apply(out).flatten(0, 1), (tokens % 5).flatten())
        loss.backward()
        held = [weakref.ref(tokens), weakref.ref(out), *Recorded.arrived]
        kept = when in ("undecided", "first") or (when == "due" and "empirical" in estimators)
        assert (held[2]() is not None) == kept  # the gradient at the outputs
        Watcher.watched = held[2:]  # what is the probe's alone is gone before it measures
        optimizer.step()
        Watcher.watched = []
        del tokens, out
        gc.collect()
        assert [there() for there in held] == [None] * 3 and loss is not None
        assert len(probe.history) == {"undecided": 0, "first": 1, "due": 2, "between": 1}[when]
        assert probe.likelihood is not None


def test_no_large_copy_is_made_of_outputs_with_positions():
    """At a probed step of a known family: the gradient's positions, neither outputs nor gradient."""
    net = Tagger()
    with fimprobe.attach(net, EVERY) as probe:
        tagger_step(net, sgd(net))
        tokens = torch.randint(11, (6, 7))
        out = net(tokens)
        targets = tokens % 5
        targets[:, 4:] = -100
        F.cross_entropy(out.transpose(1, 2), targets).backward()
        captured = probe._cycle.capture.last.heads[""]
        assert captured.outputs is None and captured.gradient is None
        assert torch.equal(captured.label_positions, targets != -100)


def test_a_gradient_written_to_after_it_was_seen_is_not_read():
    """The tensor itself is kept: what is no longer the loss's gradient must not decide anything."""
    net = mlp()
    with fimprobe.attach(net, EVERY) as probe:
        for step, spoiled in enumerate([True, False]):
            x, y = data(step, count=32)
            out = net(x)
            F.cross_entropy(out, y).backward()
            captured = probe._cycle.capture.last.heads[""]
            assert captured.gradient is not None
            if spoiled:
                captured._gradient[0].mul_(3).add_(1)
                assert captured.gradient is None
            sgd(net).step()
            assert (probe.likelihood is None) == spoiled


def scaled(net, optimizer, scaler, step, good):
    optimizer.zero_grad()
    x, y = data(step)
    scaler.scale(F.cross_entropy(net(x), y) * (1.0 if good else float("inf"))).backward()
    scaler.step(optimizer)
    scaler.update()


def test_steps_that_a_fused_optimizer_skips_are_counted_without_reading(monkeypatch):
    """found_inf is on the device: it is read at steps that are due, and the count is exact there."""
    net = mlp()
    optimizer, scaler = sgd(net, fused=True), torch.amp.GradScaler("cpu", init_scale=4.0)
    with fimprobe.attach(net, KNOWN, schedule={"every": 4}) as probe:
        befores = []
        for step in range(14):
            befores.append(copy.deepcopy(net))
            if step == 1:
                with Dispatched() as seen:
                    scaled(net, optimizer, scaler, step, good=False)
                assert not any("_local_scalar_dense" in c or "is_nonzero" in c for c in seen.calls)
            else:
                scaled(net, optimizer, scaler, step, good=step not in (1, 2, 5))
        # made were 0, 3, 4, 6, 7, ...: the fourth after the first is the loop's 7
        assert [r.step for r in probe.history] == [0, 4, 8]
        for report, step in zip(probe.history, (0, 7, 11), strict=True):
            equal(report, expected(befores[step], data(step)[0], report.step))
        assert probe.steps == 11


def test_two_fused_optimizers_of_one_batch_count_once():
    net = mlp()
    first, second = (torch.optim.SGD(net[i].parameters(), 0.1, fused=True) for i in (0, 2))
    with fimprobe.attach(net, KNOWN, schedule={"at": [50]}) as probe:
        for skips in [(0, 0), (1, 0), (0, 1), (1, 1), (1, None), (None, 1)]:
            net(data()[0]).sum().backward()
            for optimizer, skip in zip((first, second), skips, strict=True):
                if skip is not None:
                    optimizer.found_inf = torch.tensor(float(skip))
                    optimizer.grad_scale = torch.tensor(1.0)
                optimizer.step()
                optimizer.found_inf = optimizer.grad_scale = None
        assert probe.steps == 5  # only the fourth was made by neither


def test_a_loop_that_numbers_its_steps_finds_its_batch_whatever_the_number():
    net = mlp()
    with fimprobe.attach(net, KNOWN, schedule={"every": 20}) as probe:
        for number in (0, 10, 20, 30, 40, 1000):
            net(data()[0]).sum().backward()
            probe.step(number=number)
        assert [r.step for r in probe.history] == [0, 20, 40, 1000]


def test_a_budget_caps_pauses_as_before():
    """The median is only looked up where a step is long; the account is the same."""
    generator = torch.Generator().manual_seed(0)
    loops = (torch.rand(500, generator=generator) ** 8 * 5 + 0.01).tolist()
    budget, elapsed, seen = Budget(0.1), 0.0, []
    for seconds in loops:
        window = sorted(seen[-50:]) or [seconds]
        middle = (window[(len(window) - 1) // 2] + window[len(window) // 2]) / 2
        elapsed += min(seconds, 10 * middle)
        seen.append(seconds)
        budget.observe(loop_seconds=seconds, probe_seconds=0.0)
    assert budget.elapsed == pytest.approx(elapsed, rel=1e-12) and elapsed < sum(loops)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fused", [False, True])
def test_no_step_between_probes_waits_for_the_gpu(fused):
    net = Tagger().cuda()
    optimizer = torch.optim.AdamW(net.parameters(), fused=fused)
    tokens = torch.randint(11, (6, 7), device="cuda")
    with fimprobe.attach(net, EVERY, schedule={"at": [2, 10]}) as probe:
        for step in range(11):
            waits = "error" if step not in (0, 1, 2, 10) else "default"
            torch.cuda.set_sync_debug_mode(waits)
            try:
                F.cross_entropy(net(tokens).flatten(0, 1), (tokens % 5).flatten()).backward()
                if fused and step not in (0, 1, 2, 10):
                    optimizer.found_inf = torch.zeros((), device="cuda")
                    optimizer.grad_scale = torch.ones((), device="cuda")
                optimizer.step()
                optimizer.found_inf = optimizer.grad_scale = None
                optimizer.zero_grad()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert [r.step for r in probe.history] == [2, 10]


def test_training_is_the_same_whatever_is_looked_at():
    """Known and unknown families, due and not: keeping a gradient changes nothing."""
    ends = []
    for options in (
        None,
        {**EVERY, "schedule": {"every": 3}},
        {**EVERY, "estimators": ["empirical"]},
    ):
        torch.manual_seed(0)
        net = mlp()
        probe = None if options is None else fimprobe.attach(net, options)
        train(net, 12)
        if probe is not None:
            assert len(probe.history) == (4 if "empirical" not in options["estimators"] else 12)
            probe.detach()
        ends.append([p.detach().clone() for p in net.parameters()])
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))
