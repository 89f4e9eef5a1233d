"""V2 of layers, parameters and the model from spot checks: unbiased, with an error that is true."""

import functools
from collections import Counter

import pytest
import torch
import transformers
from torch import nn

from fimprobe.engines.autograd.verification import make_verified_plan
from fimprobe.engines.spot_checks import measure, shifted_forward
from fimprobe.engines.spot_checks.proposals import (
    FlatProposal,
    LayerProposal,
    LookupProposal,
    OuterProposal,
)
from fimprobe.estimators.spot_checks import estimate_v2
from tests.models import cases
from tests.oracles.diagonal_curvature import label_variances
from tests.support.spot_checks import spot_checks, spot_problem


def logits(out):
    return getattr(out, "logits", out)


def net():
    layers = [nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 10), nn.GELU(), nn.LayerNorm(10)]
    model = nn.Sequential(*layers, nn.Linear(10, 6), nn.Softplus(), nn.Linear(6, 3))
    return model, (torch.randn(12, 8),)


def language_model():
    sizes = {"n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 8, "vocab_size": 7}
    config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(7, (8, 5))}


def convolution():
    body = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 6), nn.GELU()]
    return nn.Sequential(*body, nn.Linear(6, 3)), (torch.randn(8, 2, 6, 6),)


def recurrent():
    case = cases.lstm()
    return case.model, case.inputs


MODELS = {
    "layers": (net, 3),
    "GPT-2": (language_model, 7),
    "convolution": (convolution, 3),
    "LSTM": (recurrent, 3),
}


@functools.cache
def model_and_truth(name):
    """A model, its inputs and V2 of every entry; needs float64 as the default type."""
    make, classes = MODELS[name]
    model, inputs = make()
    return model.eval(), inputs, label_variances(model, inputs, logits, classes=classes)


def replicates(name, count, monkeypatch, slots=40):
    """(estimates of each layer over replicates, the truth) with more checks than by default."""
    model, inputs, truth = model_and_truth(name)
    monkeypatch.setattr(measure, "SLOTS_PER_INPUT", slots)
    plan = make_verified_plan(spot_problem(model, inputs))
    runs = [spot_checks(spot_problem(model, inputs, seed=seed), plan) for seed in range(count)]
    sums = {n: float(x.flatten(1).sum(1).mean()) for n, x in truth.items()}
    return runs, sums


def groups_of(sums):
    layers = {}
    for name in sums:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return {**layers, "total": list(sums), **{n: [n] for n in sums}}


@pytest.mark.parametrize("name", MODELS)
def test_sums_are_unbiased(double, monkeypatch, name):
    runs, sums = replicates(name, 4, monkeypatch)
    total = sum(sums.values())
    for group, names in groups_of(sums).items():
        expected = sum(sums[n] for n in names)
        if expected < 0.01 * total:  # too few checks for a test
            continue
        values = torch.tensor([estimate_v2(run, names).value for run in runs])
        errors = torch.tensor([estimate_v2(run, names).error for run in runs])
        joint = float(errors.square().mean() / len(runs)) ** 0.5
        assert abs(float(values.mean()) - expected) < 4 * joint, group


@pytest.mark.parametrize("name", ["layers", "GPT-2"])
def test_stated_errors_cover_the_truth(double, monkeypatch, name):
    runs, sums = replicates(name, 5, monkeypatch, slots=12)
    covered = []
    for names in groups_of(sums).values():
        expected = sum(sums[n] for n in names)
        for run in runs:
            estimate = estimate_v2(run, names)
            if expected > 0.01 * sum(sums.values()):
                covered.append(abs(estimate.value - expected) <= 2 * estimate.error)
    assert sum(covered) / len(covered) >= 0.9


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_stated_errors_cover_the_truth_in_many_replicates(double, monkeypatch, name):
    runs, sums = replicates(name, 100, monkeypatch, slots=8)
    total = sum(sums.values())
    for group, names in groups_of(sums).items():
        expected = sum(sums[n] for n in names)
        if expected <= 0.01 * total:
            continue
        estimates = [estimate_v2(run, names) for run in runs]
        covered = [abs(e.value - expected) <= 2 * e.error for e in estimates]
        assert sum(covered) >= 86, group  # 90 %, less two standard deviations of 100 replicates
        mean = torch.tensor([e.value for e in estimates])
        assert abs(mean.mean() - expected) < 4 * mean.std() / 10, group


def test_what_the_graph_proves_is_zero_without_a_check(double):
    model = cases.lively(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)))
    checks = spot_checks(spot_problem(model, (torch.randn(4, 3),)))
    assert [stratum.layer for stratum in checks.strata] == ["0"]
    last = estimate_v2(checks, ["2.weight", "2.bias", "3.weight", "3.bias"])
    assert (last.value, last.error) == (0.0, 0.0)


def test_a_piecewise_linear_network_needs_no_pass(double, monkeypatch):
    monkeypatch.setattr(shifted_forward.ShiftedForward, "run", None)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    checks = spot_checks(spot_problem(model, (torch.randn(4, 3),)))
    assert checks.strata == [] and not checks.failure


def test_half_precision_has_a_reason():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(torch.bfloat16)
    checks = spot_checks(spot_problem(model, (torch.randn(4, 3, dtype=torch.bfloat16),)))
    assert "half precision" in estimate_v2(checks, ["0.weight"]).reason


def test_an_operation_that_cannot_be_held_has_a_reason():
    model = cases.Lambda(
        lambda self, x: self.parts[1](self.parts[0](x).tanh().median(1)[0]),
        nn.Linear(3, 4),
        nn.Linear(4, 3),
    )
    checks = spot_checks(spot_problem(model, (torch.randn(4, 2, 3),)))
    estimate = estimate_v2(checks, ["parts.0.weight"])
    assert estimate.value is None and "median" in estimate.reason


def test_a_wrong_shift_is_seen(double, monkeypatch):
    before = shifted_forward.add_shift

    def wrong(out, x, *args, **kwargs):
        before(out, 2 * x if x.is_floating_point() else x, *args, **kwargs)

    monkeypatch.setattr(shifted_forward, "add_shift", wrong)
    model = cases.lively(nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)))
    checks = spot_checks(spot_problem(model, (torch.randn(4, 3),)))
    assert checks.failure.startswith("guard:")


def test_the_twin_is_as_before(double):
    model, inputs = language_model()
    problem = spot_problem(model, inputs)
    before = {n: x.clone() for n, x in problem.twin.state_dict().items()}
    spot_checks(problem)
    assert all(torch.equal(x, before[n]) for n, x in problem.twin.state_dict().items())
    modules = list(problem.twin.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert not any("forward" in m.__dict__ for m in modules)


@pytest.mark.parametrize(
    "proposal",
    [
        FlatProposal(squares=torch.tensor([[1.0, 2.0], [0.0, 5.0]])),
        OuterProposal(
            units=torch.tensor([0.3, 0.7]).double(),
            columns=torch.tensor([[0.2, 0.5, 0.3]]).double(),
            unit_first=False,
        ),
        LookupProposal(
            units=torch.tensor([0.4, 0.6]).double(),
            tokens=[torch.tensor([2, 5])],
            probabilities=[torch.tensor([0.1, 0.9]).double()],
        ),
    ],
    ids=["flat", "outer", "lookup"],
)
def test_entries_are_drawn_with_their_probability(proposal):
    generator = torch.Generator().manual_seed(0)
    layer = LayerProposal(
        inputs=torch.ones(1).double(), parameters={"w": 1.0}, entries={"w": proposal}, kind=""
    )
    drawn, stated = Counter(), {}
    count, repeats = 40, 100
    for _ in range(repeats):
        for draw in layer.draw(count, generator):
            drawn[draw.entry] += 1
            stated[draw.entry] = draw.probability
    assert sum(stated.values()) == pytest.approx(1)
    for entry, p in stated.items():
        # spread evenly, they vary less than independent draws
        expected = count * repeats * p
        assert abs(drawn[entry] - expected) < 4 * (expected * (1 - p)) ** 0.5


def test_with_enough_draws_every_input_has_some():
    inputs = torch.tensor([0.05, 0.15, 0.8]).double()
    squares = torch.ones(4)
    entries = {n: FlatProposal(squares=squares) for n in ("weight", "bias")}
    shares = {"weight": 0.7, "bias": 0.3}
    layer = LayerProposal(inputs=inputs, parameters=shares, entries=entries, kind="")
    for seed in range(20):
        drawn = layer.draw(20, torch.Generator().manual_seed(seed))
        counts = [sum(d.row == row for d in drawn) for row in range(3)]
        assert counts == [1, 3, 16]


def test_later_measurements_need_no_pilot(double):
    model, x = net()
    problem = spot_problem(model, x)
    plan = make_verified_plan(problem)
    first = spot_checks(problem, plan)
    second = spot_checks(spot_problem(model, x, seed=1), plan)
    assert all(s.pilot == measure.PILOT for s in first.strata)
    assert all(s.pilot == 0 for s in second.strata)
