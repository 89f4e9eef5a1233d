"""Evaluations of modules that cost hundreds of passes are announced, or ruled out, before they run."""

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.measurement import second_order_cost
from fimprobe.training.schedule import FREE_SECONDS, Budget, Every
from fimprobe.training.shared_budget import SharedBudget
from tests.models.cases import Gate, Lambda


def measure(plan, **options):
    model = Lambda(lambda self, x: self.parts[1](self.parts[0](x)), Gate(), nn.Linear(4, 3))
    return fimprobe.measure(
        model,
        torch.randn(3, 4),
        likelihood="categorical",
        plan=plan,
        **{"bounds": False, **options},
    )


@pytest.mark.parametrize("passes", [1.0, 1000.0])
def test_the_cost_is_announced_once_if_it_is_high(passes, caplog, monkeypatch):
    monkeypatch.setattr(second_order_cost, "WORTH_MENTIONING", passes)
    plan = fimprobe.Plan()
    reports = [measure(plan) for _ in range(2)]
    told = [r.message for r in caplog.records if "Î₂ will cost about" in r.message]
    assert len(told) == (passes == 1)
    assert all("'parts.0'" in message and "spot_checks" in message for message in told)
    assert all(report.total.i2 is not None for report in reports)


def test_a_budget_that_it_exceeds_leaves_it_out():
    plan = fimprobe.Plan(second_order_limit=5.0)
    for _ in range(2):  # the second time by the plan
        report = measure(plan, second_order={"probes": 2})
        assert report.total.i1 is not None
        assert report.total.i2 is None
        assert any("more than the time budget allows" in note for note in report.notes)


def test_spot_checks_are_made_in_place_of_what_a_budget_rules_out():
    for second_order in ("auto", "spot_checks"):
        report = measure(
            fimprobe.Plan(second_order_limit=5.0), bounds=True, second_order=second_order
        )
        assert report.total.i2.label_variance is not None
        assert report.total.i2.total_label_variance is None
        assert any(note.startswith("Bounds and blocks of Î₂ were not") for note in report.notes)


def test_schedules_state_what_they_afford():
    budget = Budget(0.1)
    assert budget.affordable_steps() is None
    budget.observe(loop_seconds=0.5, probe_seconds=0)
    assert budget.affordable_steps() == FREE_SECONDS / 0.5
    assert Every(3).affordable_steps() is None
    assert SharedBudget(budget).affordable_steps() is None  # processes would have to agree
