"""Schedules: when a probe is due, and that a budget is kept."""

import random
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import fimprobe
from fimprobe.training.schedule import FREE_SECONDS, At, Budget, Every, SharedBudget


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
    for step in range(20_000):
        loop = 0.01 * rng.uniform(0.7, 1.3)
        probe = 0.0
        if schedule.due(step):
            probes += 1
            probe = (1.5 if probes == 1 else 0.3) * rng.uniform(0.8, 1.2)
        schedule.observe(loop_seconds=loop, probe_seconds=probe)
        spent, total = spent + probe, total + loop + probe
    assert 4 < schedule.free <= FREE_SECONDS  # the allowance is used, and no more of it
    assert 0.5 * share * total <= spent - schedule.free <= share * total


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
    share = 0.2 * (schedule.spent + schedule.elapsed)
    assert schedule.spent - schedule.free <= share + surprise and schedule.free <= FREE_SECONDS


def test_half_of_a_budget_is_laid_aside_for_pictures():
    schedule = Budget(0.1, next_early=10**9)
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


def spend(schedule, steps, *, preview, whole, verification=0.0, step_seconds=0.1):
    """A simulated run: what was measured, at which step, and the seconds of all reports."""
    measured, seconds = [], 0.0
    for step in range(steps):
        cost = 0.0
        if schedule.due(step):
            previews = schedule.start(full=False)
            cost = (preview if previews else whole) + (0.0 if measured else verification)
            measured.append(("preview" if previews else "whole", step))
        schedule.observe(loop_seconds=step_seconds, probe_seconds=cost)
        seconds += cost
    return measured, seconds


def test_early_steps_have_whole_reports_within_the_allowance():
    schedule = Budget(0.02, staged=True)
    measured, _ = spend(schedule, 40, preview=0.1, whole=0.3, verification=0.4)
    assert measured == [("whole", step) for step in (1, 2, 5, 10, 20)]
    assert schedule.free == schedule.spent == pytest.approx(5 * 0.3 + 0.4)


def test_after_the_allowance_the_share_counts():
    schedule = Budget(0.02, staged=True)
    measured, seconds = spend(schedule, 20_000, preview=0.5, whole=2.0)
    # a third early report would exceed 5 s; 2 s are 2 % of 94 s of training with 6 s of reports
    assert [step for _, step in measured[:3]] == [1, 2, 941]
    assert seconds - schedule.free <= 0.02 * (20_000 * 0.1 + seconds)
    assert seconds > 0.9 * (schedule.free + 0.02 * (20_000 * 0.1 + seconds) - 2.0)


def test_previews_come_first_where_a_whole_report_exceeds_the_allowance():
    # fifteen steps of 2 s are more than 5 s: previews of 2 s, at two early steps; then 30 s are 2 %
    schedule = Budget(0.02, staged=True)
    measured, _ = spend(schedule, 2000, preview=2.0, whole=28.0, step_seconds=2.0)
    assert measured[:3] == [("preview", 1), ("preview", 2), ("whole", 733)]
    assert {kind for kind, _ in measured[2:]} == {"whole"}
    # the first report happens whatever it costs where there is nothing to preview
    measured, _ = spend(Budget(0.02), 100, preview=28.0, whole=28.0, step_seconds=2.0)
    assert measured == [("whole", 1)]


def test_a_whole_measurement_asked_for_ends_the_previews():
    schedule = Budget(0.02, staged=True)
    schedule.observe(loop_seconds=10.0, probe_seconds=0.0)
    assert schedule.start(full=False) and not schedule.start(full=True)
    schedule.observe(loop_seconds=10.0, probe_seconds=8.0)
    assert not schedule.start(full=False) and schedule.first == 8.0 and schedule.free == FREE_SECONDS


def test_a_forecast_is_the_next_step_that_is_due():
    for whole, step_seconds in ((0.3, 0.1), (2.0, 0.1), (28.0, 2.0)):
        schedule, forecast, measured = Budget(0.1, staged=True), 1, []
        for step in range(800):
            cost = 0.0
            if schedule.due(step):
                assert abs(step - forecast) <= 1, (whole, measured, forecast)
                measured.append(step)
                cost = 1.0 if schedule.start(full=False) else whole
                forecast = schedule.forecast(step, cost)
            schedule.observe(loop_seconds=step_seconds, probe_seconds=cost)
        assert len(measured) > 2


def test_batches_that_cannot_be_measured_are_charged():
    """A model that has become NaN costs its share, not an attempt at every step."""
    schedule, attempts = Budget(0.02, staged=True), []
    for step in range(2000):
        if schedule.due(step):
            attempts.append(step)
            schedule.fail(0.1)
        schedule.observe(loop_seconds=0.1, probe_seconds=0.0)
    assert attempts[:5] == [1, 2, 5, 10, 20] and schedule.first is None
    assert schedule.spent == pytest.approx(0.1 * len(attempts)) and len(attempts) < 0.03 * 2000


def test_processes_agree_on_a_preview():
    schedule = SharedBudget(Budget(0.1, staged=True))
    schedule.observe(loop_seconds=0.1, probe_seconds=0.0)
    assert schedule.due(1) and not schedule.start(full=False)
    assert schedule.agree(True) and schedule.account.previewing


def test_what_only_the_first_report_costs_is_not_expected_again():
    schedule = Budget(0.02)
    schedule.observe(loop_seconds=0.1, probe_seconds=0.0)
    schedule.expect(0.25)  # while it runs
    schedule.observe(loop_seconds=0.1, probe_seconds=4.0)
    assert schedule.expected == 1.0 and schedule.spent == 4.0
    schedule.observe(loop_seconds=0.1, probe_seconds=1.5)
    assert schedule.expected == 1.5


@pytest.mark.parametrize(
    ("options", "previewed"),
    [
        ({}, {"i1"}),
        ({"estimators": ["i1", "i2", "ih", "empirical"]}, {"i1", "ih", "empirical"}),
        ({"estimators": ["i2"], "bounds": False}, {"i1"}),
        ({"estimators": ["i1"], "bounds": False}, None),
        ({"second_order": "exact"}, {"i1"}),
    ],
)
@pytest.mark.parametrize("is_slow", [False, True])
def test_the_first_report_is_whole_unless_it_exceeds_the_allowance(options, previewed, is_slow):
    net = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3))
    y = torch.arange(8) % 3
    with fimprobe.attach(net, tensorboard=False, **options) as probe:
        for step in range(3):
            nn.functional.cross_entropy(net(torch.randn(8, 4)), y).backward()
            if is_slow and step > 0:
                probe.schedule.steps.clear()
                probe.schedule.steps.append(60.0 if step == 1 else 1e-3)
            probe.step()
    assert [report.step for report in probe.history] == [1, 2]
    requested = {"i1", *options.get("estimators", ["i1", "i2"])}
    for number, report in enumerate(probe.history):
        measured = {
            kind
            for kind in ("i1", "i2", "ih", "empirical")
            if getattr(report.total, kind) is not None
        }
        is_preview = is_slow and previewed is not None and number == 0
        assert measured == (previewed if is_preview else requested)
        has_bounds = report.total.i1.bound is not None or "bound" in report.total.i1.unknown
        assert has_bounds != (is_preview or not options.get("bounds", True))
        assert any(line.startswith("Preview") for line in report.advice) == is_preview


def test_inputs_given_by_hand_are_measured_whole():
    net = nn.Linear(4, 3)
    options = {"likelihood": "categorical", "tensorboard": False}
    with fimprobe.attach(net, **options) as probe:  # the default budget
        assert probe.step(torch.randn(8, 4)).total.i2 is not None


def test_attach_is_free_and_the_last_pictures_always_come(tmp_path):
    net = nn.Linear(4, 3)
    started = time.perf_counter()
    with fimprobe.attach(net, likelihood="categorical", log_dir=tmp_path) as probe:
        attached = time.perf_counter()
        for _ in range(4):
            nn.functional.cross_entropy(net(torch.randn(8, 4)), torch.arange(8) % 3).backward()
            probe.step()
        reported = sum(report.seconds for report in probe.history)
        elsewhere = time.perf_counter() - attached - reported
        assert [report.step for report in probe.history] == [1, 2]
        assert reported < probe.schedule.spent < reported + elsewhere and attached > started
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["images"]
