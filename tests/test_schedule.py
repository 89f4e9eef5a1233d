"""Schedules: when a probe is due, and that a budget is kept."""

import random
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import fimprobe
from fimprobe.schedule import At, Budget, Every


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


def test_a_budget_tells_what_it_has_room_for():
    schedule = Budget(0.1)
    assert not schedule.affords(1e-9) and Every(3).affords(1e9) and At([1]).affords(1e9)
    for _ in range(90):
        schedule.observe(loop_seconds=0.1, probe_seconds=0.0)
    assert schedule.affords(0.99) and not schedule.affords(1.01)  # of 9 s and itself
    schedule.observe(loop_seconds=0.0, probe_seconds=0.5)
    assert schedule.affords(0.49) and not schedule.affords(0.51)


def test_attach_is_on_the_account_and_pictures_too(tmp_path):
    """A run too short for pictures has none; attach's own time is paid with the first measurement."""
    net = nn.Linear(4, 3)

    def train(schedule, folder):
        with fimprobe.attach(
            net, likelihood="categorical", schedule=schedule, log_dir=tmp_path / folder
        ) as probe:
            attached = probe._attaching
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
