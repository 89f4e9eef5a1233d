"""Schedules: when a probe is due, and that a budget is kept."""

import random
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import fimprobe
from fimprobe.training.schedule import At, Budget, Every


def test_every_and_at():
    assert [s for s in range(10) if Every(4).due(s)] == [0, 4, 8]
    assert [s for s in range(10) if At([1, 7]).due(s)] == [1, 7]


@pytest.mark.parametrize("make", [lambda: Every(0), lambda: Budget(0), lambda: Budget(1.0)])
def test_bad_values(make):
    with pytest.raises(fimprobe.FimprobeError):
        make()


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
def test_budget_is_kept_and_used_on_a_simulated_clock(share):
    rng = random.Random(0)
    schedule, spent, total, probes = Budget(share), 0.0, 0.0, 0
    for step in range(5000):
        loop = 0.01 * rng.uniform(0.7, 1.3)
        probe = 0.0
        if schedule.due(step):
            probes += 1
            probe = (0.5 if probes == 1 else 0.03) * rng.uniform(0.8, 1.2)
        schedule.observe(loop_seconds=loop, probe_seconds=probe)
        spent, total = spent + probe, total + loop + probe
    assert spent <= share * total
    assert spent >= 0.5 * min(share, 1) * total or probes == 1


def test_a_pause_earns_no_burst():
    schedule = Budget(0.1)
    for _ in range(20):
        schedule.observe(loop_seconds=0.01, probe_seconds=0.0)
    schedule.observe(loop_seconds=3600.0, probe_seconds=0.0)
    assert schedule.elapsed < 1


def test_a_real_loop_keeps_its_share():
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x, y = torch.randn(512, 64), torch.randint(10, (512,))
    with fimprobe.attach(
        net, likelihood="categorical", schedule={"budget": 0.2}, tensorboard=False
    ) as probe:
        started = time.perf_counter()
        while time.perf_counter() - started < 3 or len(probe.history) < 4:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        schedule = probe.schedule
    # what was known at the last probe fitted; only its own surprise may lie above the share
    *known, last = schedule.costs
    surprise = max(last - max(known), 0.0)
    assert schedule.spent <= 0.2 * (schedule.spent + schedule.elapsed) + surprise


def test_half_of_a_budget_is_laid_aside_for_pictures():
    schedule = Budget(0.1)
    assert Every(3).can_afford(1e9) and At([1]).can_afford(1e9)
    for _ in range(90):
        schedule.observe(loop_seconds=0.1, probe_seconds=0.0)
    assert schedule.can_afford(0.99) and schedule.reserved == 0
    assert not schedule.can_afford(1.01)  # of 9 s and itself
    schedule.observe(loop_seconds=0.0, probe_seconds=0.1)
    assert schedule.due(90)  # nothing was laid aside yet: 0.1 more fit
    schedule.spent += 0.79  # the share is used up
    measured = 0
    while not schedule.can_afford(1.01):
        cost = 0.1 if schedule.due(91) else 0.0
        measured += cost > 0
        schedule.observe(loop_seconds=0.1, probe_seconds=cost)
    assert 17 < schedule.elapsed - 9 < 20  # half of 0.1 · 18 s for the pictures, half for measuring
    assert 8 <= measured <= 12 and schedule.reserved == 0
    known, spent = list(schedule.costs), schedule.spent
    schedule.charge(1.0)
    schedule.observe(loop_seconds=0.0, probe_seconds=1.15)  # 0.15 of them the measurement's
    assert list(schedule.costs)[-1] == pytest.approx(0.15) and len(known) <= 5
    assert schedule.spent == pytest.approx(spent + 1.15)


def spend(schedule, steps, look, whole, imports=0.0, step_seconds=0.1):
    """A simulated run: what was measured, at which second, and the share spent at the end."""
    found, seconds = [], 0.0
    for step in range(steps):
        seconds += step_seconds
        cost = 0.0
        if schedule.due(step):
            looking = schedule.start(full=False)
            cost = (look if looking else whole) + (0.0 if found else imports)
            found.append(("look" if looking else "whole", round(seconds)))
        schedule.observe(loop_seconds=step_seconds, probe_seconds=cost)
        seconds += cost
    return found, schedule.spent / seconds


def test_two_looks_come_before_the_whole_where_it_is_dearer():
    found, share = spend(Budget(0.02, staged=True), 3000, look=0.2, whole=2.5, imports=0.5)
    # 0.7 s at once; another 0.7 fit into 70 s, itself included; 15 · 0.2 s beside 0.9 into 195
    assert found[:3] == [("look", 0), ("look", 69), ("whole", 192)]
    assert {kind for kind, _ in found[2:]} == {"whole"} and len(found) == 4 and share <= 0.02


def test_what_costs_the_same_at_once_is_measured_whole_at_once():
    found, _ = spend(Budget(0.02), 3000, look=0.2, whole=0.2)
    assert {kind for kind, _ in found} == {"whole"} and len(found) > 10


def test_a_whole_measurement_asked_for_ends_the_looks():
    schedule = Budget(0.02, staged=True)
    assert not schedule.start(full=True)
    schedule.observe(loop_seconds=0.1, probe_seconds=1.0)
    assert not schedule.start(full=False) and schedule.first == 1.0 and not schedule.preview_costs


def test_forecasts_of_several_processes_know_looks():
    schedule = Budget(0.5, staged=True)
    for _ in range(4):
        schedule.observe(loop_seconds=1.0, probe_seconds=0.0)
    assert schedule.start(full=False) and schedule.forecast(4, 2.0) == 5  # 2 + 2 of 4 + 4 s
    schedule.observe(loop_seconds=1.0, probe_seconds=2.0)
    assert schedule.start(full=False) and schedule.forecast(5, 1.0) == 6 + (2 + 1 + 15 - 5)


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({}, {"i1"}),
        ({"estimators": ["i1", "i2", "ih", "empirical"]}, {"i1", "ih", "empirical"}),
        ({"estimators": ["i2"], "bounds": False}, {"i1"}),
        ({"estimators": ["i1"], "bounds": False}, {"i1"}),
        ({"second_order": "exact"}, {"i1"}),
    ],
)
def test_a_budget_begins_with_previews_of_i1(options, first):
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    if "second_order" in options:
        net = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3))
    y = torch.arange(8) % 3
    with fimprobe.attach(net, schedule={"budget": 0.9}, tensorboard=False, **options) as probe:
        started = time.perf_counter()
        while time.perf_counter() - started < 60 and len(probe.history) < 3:
            nn.functional.cross_entropy(net(torch.randn(8, 4)), y).backward()
            probe.step()
            time.sleep(0.002)
    staged = options.get("bounds", True) or "i2" in options.get("estimators", ["i1", "i2"])
    kinds = ("i1", "i2", "ih", "empirical")
    wanted = {"i1", *options.get("estimators", ["i1", "i2"])}
    for number, report in enumerate(probe.history):
        found = {kind for kind in kinds if getattr(report.total, kind) is not None}
        look = staged and number < 2
        assert found == (first if look else wanted)
        bounded = report.total.i1.bound is not None or "bound" in report.total.i1.unknown
        assert bounded != (look or not options.get("bounds", True))
        assert any(line.startswith("Preview") for line in report.advice) == look
    assert len(probe.history) == 3


def test_inputs_given_by_hand_are_measured_whole():
    net = nn.Linear(4, 3)
    options = {"likelihood": "categorical", "tensorboard": False}
    with fimprobe.attach(net, **options) as probe:  # the default budget
        assert probe.step(torch.randn(8, 4)).total.i2 is not None


def test_attach_is_on_the_account_and_pictures_too(tmp_path):
    """A run too short for pictures has none; attach's own time is paid with the first measurement."""
    net = nn.Linear(4, 3)

    def train(schedule, folder):
        with fimprobe.attach(
            net, likelihood="categorical", schedule=schedule, log_dir=tmp_path / folder
        ) as probe:
            attached = probe._attach_seconds
            for _ in range(30):
                nn.functional.cross_entropy(net(torch.randn(8, 4)), torch.arange(8) % 3).backward()
                probe.step()
        return probe, attached

    def images(folder):
        return EventAccumulator(str(folder)).Reload().Tags()["images"]

    probe, attached = train({"budget": 0.02}, "short")
    assert len(probe.history) == 1 and probe.schedule.first > attached > 0
    assert probe.schedule.first > probe.last.seconds + attached
    assert not images(tmp_path / "short")
    probe, _ = train({"every": 10}, "rich")
    assert images(tmp_path / "rich")
