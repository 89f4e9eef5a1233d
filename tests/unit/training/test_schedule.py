"""Schedules: when a probe is due, and that a budget is kept."""

import random
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import fimprobe
from fimprobe.training.report_costs import Extent, ReportCosts
from fimprobe.training.schedule import FREE_SECONDS, At, Budget, Every
from fimprobe.training.shared_budget import SharedBudget

EXTENTS = {Extent.PREVIEW: "preview", Extent.WITHOUT_BOUNDS: "without", Extent.WHOLE: "whole"}


def staged(share, *extents, **state):
    """A budget whose reports may leave parts out: by default Î₂ only, as without bounds."""
    costs = ReportCosts(extents=extents or (Extent.PREVIEW, Extent.WHOLE))
    return Budget(share, costs=costs, **state)


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
    *known, last = schedule.costs.of[Extent.WHOLE].later
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
    known, spent = schedule.costs.of[Extent.WHOLE].later, schedule.spent
    schedule.charge(1.0)
    schedule.observe(loop_seconds=0.0, probe_seconds=1.15)  # 0.15 of them the measurement's
    assert known[-1] == pytest.approx(0.15) and len(known) <= 5
    assert schedule.spent == pytest.approx(spent + 1.15)


def spend(schedule, steps, *, step_seconds=0.1, verification=0.0, **costs):
    """A simulated run: what was measured, at which step, and the seconds of all reports."""
    measured, seconds = [], 0.0
    for step in range(steps):
        cost = 0.0
        if schedule.due(step):
            extent = EXTENTS[schedule.start(full=False, loop_seconds=10.0)]
            cost = costs[extent]
            schedule.expect(cost / (cost + verification))
            cost += 0.0 if measured else verification
            measured.append((extent, step))
        schedule.observe(loop_seconds=step_seconds, probe_seconds=cost)
        seconds += cost
    return measured, seconds


def test_early_steps_have_whole_reports_within_the_allowance():
    schedule = staged(0.02)
    measured, _ = spend(schedule, 40, preview=0.1, whole=0.3, verification=0.4)
    assert measured == [("whole", step) for step in (1, 2, 5, 10, 20)]
    assert schedule.free == schedule.spent == pytest.approx(5 * 0.3 + 0.4)


def test_after_the_allowance_the_share_counts():
    schedule = staged(0.02)
    measured, seconds = spend(schedule, 20_000, preview=0.5, whole=2.0)
    # of the 3 s that the first whole report leaves, previews show more than another one
    assert measured[:5] == [("whole", 1)] + [("preview", step) for step in (2, 5, 10, 20)]
    assert sum(kind == "whole" for kind, step in measured) > 15
    assert seconds - schedule.free <= 0.02 * (20_000 * 0.1 + seconds)
    assert seconds > 0.9 * (schedule.free + 0.02 * (20_000 * 0.1 + seconds) - 2.0)


def test_previews_come_first_where_a_whole_report_exceeds_the_allowance():
    # 20 steps of 2 s are more than 5 s: previews of 2 s, at two early steps. The first whole report is
    # expected to take 2 s and 14 steps, 30 s, which are 2 % of 1,500 s; it takes 28 s, as the next one
    measured, _ = spend(staged(0.02), 2000, preview=2.0, whole=28.0, step_seconds=2.0)
    assert measured[:2] == [("preview", 1), ("preview", 2)]
    wholes = [step for kind, step in measured if kind == "whole"]
    assert wholes == [953, 1639]
    # the share pays for no previews of more than a fifth of a whole report
    measured, _ = spend(staged(0.02), 2000, preview=8.0, whole=28.0, step_seconds=2.0)
    assert measured[0] == ("preview", 1) and measured[1][0] == "whole"
    # the first report happens whatever it costs where there is nothing to preview
    measured, _ = spend(Budget(0.02), 100, preview=28.0, whole=28.0, step_seconds=2.0)
    assert measured == [("whole", 1)]


def test_a_minute_of_a_transformer_shows_a_report_with_i2_and_several_previews():
    """Costs in steps as measured for GPT-2 with four layers; bounds follow within the share."""
    for step_seconds in (0.1, 0.14, 0.18, 0.24):
        schedule = staged(0.02, *Extent)
        costs = {"preview": 2.5, "without": 9.0, "whole": 25.0}
        run = {name: steps * step_seconds for name, steps in costs.items()}
        verification = 6 * step_seconds
        for seconds, wanted in ((60, {"preview", "without"}), (3000, set(costs))):
            schedule = staged(0.02, *Extent)
            measured, spent = spend(
                schedule,
                int(seconds / step_seconds),
                step_seconds=step_seconds,
                verification=verification,
                **run,
            )
            assert {kind for kind, _ in measured} >= wanted and len(measured) >= 4
            assert spent - schedule.free <= 0.02 * (seconds + spent) and schedule.free <= FREE_SECONDS
        assert min(step for kind, step in measured if kind != "preview") <= 5
        kinds = [kind for kind, step in measured if kind != "preview"][-6:]
        assert kinds in (["without", "whole"] * 3, ["whole", "without"] * 3)  # in turns


def test_what_a_report_leaves_out_is_no_choice_where_it_costs_nothing():
    costs = ReportCosts(extents=tuple(Extent))
    costs.include_bounds()
    assert list(costs.extents) == [Extent.PREVIEW, Extent.WHOLE]
    costs.leave_out_i2(has_bounds=True)
    assert list(costs.extents) == [Extent.PREVIEW, Extent.WHOLE]
    costs.leave_out_i2(has_bounds=False)
    assert list(costs.extents) == [Extent.WHOLE] and costs.expected(Extent.WHOLE, 1.0) == 0.0


def test_many_small_layers_are_expected_to_cost_more_than_their_steps():
    """As measured for 300 layers of width 32, where a step takes 15 ms: Î₁ 1 s, Î₂ another 10 s."""
    few, many = (ReportCosts(extents=tuple(Extent), num_layers=n) for n in (3, 300))
    assert few.expected(Extent.WITHOUT_BOUNDS, 0.015) == pytest.approx(0.015 * 20)
    assert many.expected(Extent.WITHOUT_BOUNDS, 0.015) == pytest.approx(11.4, rel=0.2)
    schedule = Budget(0.02, costs=many)
    schedule.observe(loop_seconds=0.015, probe_seconds=0.0)
    assert schedule.start(full=False, loop_seconds=0.015) is Extent.PREVIEW
    schedule.observe(loop_seconds=0.015, probe_seconds=1.0)
    for _ in range(30_000):  # 450 s, in which 2 % are enough for Î₂
        schedule.observe(loop_seconds=0.015, probe_seconds=0.0)
    assert schedule.start(full=False, loop_seconds=0.015) is Extent.WITHOUT_BOUNDS


def test_inputs_given_by_hand_have_everything():
    schedule = staged(0.02, *Extent)
    schedule.observe(loop_seconds=10.0, probe_seconds=0.0)
    assert (
        schedule.start(full=False, loop_seconds=10.0) is Extent.PREVIEW
        and schedule.start(full=True, loop_seconds=10.0) is Extent.WHOLE
    )
    schedule.observe(loop_seconds=10.0, probe_seconds=8.0)
    assert schedule.costs.of[Extent.WHOLE].first == 8.0 and schedule.free == FREE_SECONDS


def test_a_forecast_is_the_next_step_that_is_due():
    for whole, step_seconds in ((0.3, 0.1), (2.0, 0.1), (28.0, 2.0)):
        schedule, forecast, measured = staged(0.1), 1, []
        for step in range(800):
            cost = 0.0
            if schedule.due(step):
                assert abs(step - forecast) <= 1, (whole, measured, forecast)
                measured.append(step)
                cost = (
                    1.0 if schedule.start(full=False, loop_seconds=10.0) is Extent.PREVIEW else whole
                )
                forecast = schedule.forecast(step, cost)
            schedule.observe(loop_seconds=step_seconds, probe_seconds=cost)
        assert len(measured) > 2


def test_batches_that_cannot_be_measured_are_charged():
    """A model that has become NaN costs its share, not an attempt at every step."""
    schedule, attempts = staged(0.02), []
    for step in range(2000):
        if schedule.due(step):
            attempts.append(step)
            schedule.fail(0.1)
        schedule.observe(loop_seconds=0.1, probe_seconds=0.0)
    assert attempts[:5] == [1, 2, 5, 10, 20] and not schedule.costs.has_whole
    assert schedule.spent == pytest.approx(0.1 * len(attempts)) and len(attempts) < 0.03 * 2000


def test_processes_agree_on_a_preview():
    schedule = SharedBudget(staged(0.1))
    schedule.observe(loop_seconds=0.1, probe_seconds=0.0)
    assert schedule.due(1) and schedule.start(full=False, loop_seconds=10.0) is Extent.WHOLE
    assert schedule.agree(Extent.PREVIEW) is schedule.account.extent is Extent.PREVIEW


def test_what_only_the_first_report_costs_is_not_expected_again():
    schedule = Budget(0.02)
    schedule.observe(loop_seconds=0.1, probe_seconds=0.0)
    schedule.expect(0.25)  # while it runs
    schedule.observe(loop_seconds=0.1, probe_seconds=4.0)
    assert schedule.expected(Extent.WHOLE) == 1.0 and schedule.spent == 4.0
    schedule.observe(loop_seconds=0.1, probe_seconds=1.5)
    assert schedule.expected(Extent.WHOLE) == 1.5


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
            if is_slow:  # as if early reports had used the allowance, until the last step
                probe.schedule.free, probe.schedule.spent = (
                    (FREE_SECONDS, 50.0) if step < 2 else (0, 0)
                )
            nn.functional.cross_entropy(net(torch.randn(8, 4)), y).backward()
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
