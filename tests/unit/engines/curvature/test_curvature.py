"""Second derivatives against double backward and finite differences; what probes say of their error."""

import pytest
import torch
from torch import nn

from fimprobe.engines.autograd.verification import make_verified_plan, measure_with_fallbacks
from fimprobe.engines.primitives.random_signs import random_direction
from fimprobe.estimators.i2 import label_variance, probe_error
from fimprobe.model.twin import make_twin
from tests.models.cases import CASES, Lambda, lively
from tests.oracles import brute_force
from tests.support.curvature import behind, oracle_model, problem_of, seeds_of


def bent_norms(problem, found, bent):
    """The worst relative difference between ``whole`` [n, n] and ⟨(R_y u)_θ, (R_z u)_θ⟩, by name."""
    worst = {}
    largest = float(bent.square().sum(-1).max())
    for name, span in brute_force.spans(problem.twin).items():
        mine = bent[..., span]
        want = mine @ mine.transpose(1, 2)
        if name not in found.parameters:
            assert float(want.abs().max()) == 0, name
            continue
        have = found.parameters[name].whole[0]
        scale = max(float(want.abs().max()), 1e-9 * largest)
        worst[name] = float((have - want).abs().max()) / scale if scale else float(have.abs().max())
    return worst


@pytest.mark.parametrize("name", [n for n in CASES if n != "bag max"])
def test_whole_equals_double_backward_and_differences(name, double):
    case = CASES[name]()
    model = case.model.eval()
    problem = problem_of(model, case.inputs, likelihood="categorical", bounds=True)
    measured = measure_with_fallbacks(problem, make_verified_plan(problem))
    assert measured.notes == []
    seeds = seeds_of(problem)
    assert len(seeds) == case.positions * case.classes + 2  # the last two are for ‖H‖
    assert measured.curvature.draws == case.positions * case.classes
    u = torch.cat(
        [random_direction(p, f"direction 0 {n}", 0).flatten() for n, p in problem.parameters.items()]
    )
    bent = brute_force.bent(oracle_model(name, model, problem), case.inputs, seeds, u)
    worst = bent_norms(problem, measured.curvature, bent)
    assert worst and max(worst.values()) < 1e-9, worst
    # torch's double backward is itself checked: first-order gradients of the user's own model
    few = [0, len(seeds) - 1]
    slopes = brute_force.bent_by_differences(model, case.inputs, [seeds[y] for y in few], u)
    assert (slopes - bent[:, few]).abs().max() <= 1e-6 * bent.abs().max() + 1e-9


@pytest.mark.parametrize("name", ["bag max", "Hardsigmoid"])
def test_what_torch_cannot_differentiate_twice_is_told(name):
    model, inputs = CASES[name]()[:2] if name in CASES else activation(name)
    problem = problem_of(model.eval(), inputs)
    measured = measure_with_fallbacks(problem, make_verified_plan(problem))
    assert measured.curvature is None
    assert "Î₂ was not measured: the model has no second derivative" in measured.notes[0]


SHAPED = {"GLU": ((), 4), "Softmax": ((-1,), 5), "Threshold": ((0.1, 0.3), 5)}
SHAPED |= {"Softmin": ((-1,), 5), "LogSoftmax": ((-1,), 5)}
ACTIVATIONS = {
    name: (*SHAPED.get(name, ((), 5)),)
    for name in nn.modules.activation.__all__
    if name not in ("MultiheadAttention", "Softmax2d", "RReLU")
}


def activation(name):
    """Two layers around it, so that the second moves with the first."""
    options, width = ACTIVATIONS[name]
    layer = getattr(nn, name)(*options)
    model = nn.Sequential(
        nn.Linear(4, width), layer, nn.Linear(width // 2 if name == "GLU" else width, 3)
    )
    return lively(model), (torch.randn(2, 4),)


class Attending(nn.Module):
    """Softmax attention written by hand."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v).sum(1)


def running(layer, *shape, width):
    """The same with statistics of a few batches."""
    model, args = behind(layer, *shape, width=width)
    for _ in range(3):
        model.train()(torch.randn(8, *shape))
    return model, args


def recurring(kind):
    layer = kind(3, 2, batch_first=True, num_layers=2)
    return lively(
        Lambda(lambda self, x: self.parts[1](self.parts[0](x)[0][:, -1]), layer, nn.Linear(2, 3))
    ), (torch.randn(2, 3, 3),)


MODULES = {
    **{
        f"activation {name}": lambda name=name: activation(name)
        for name in ACTIVATIONS
        if name != "Hardsigmoid"
    },
    "Softmax2d": lambda: behind(nn.Softmax2d(), 2, 3, 3, width=18),
    "LayerNorm": lambda: behind(nn.LayerNorm(4), 3, 4, width=12),
    "RMSNorm": lambda: behind(nn.RMSNorm(4), 3, 4, width=12),
    "GroupNorm": lambda: behind(nn.GroupNorm(2, 4), 4, 3, width=12),
    "InstanceNorm": lambda: behind(nn.InstanceNorm1d(2, affine=True), 2, 5, width=10),
    "BatchNorm": lambda: running(nn.BatchNorm1d(2), 2, 3, width=6),
    "LocalResponseNorm": lambda: behind(nn.LocalResponseNorm(2), 3, 4, width=12),
    "Conv1d": lambda: behind(nn.Conv1d(2, 3, 3, padding=1), 2, 4, width=12),
    "Conv2d": lambda: behind(nn.Conv2d(2, 2, 2, stride=2), 2, 4, 4, width=8),
    "ConvTranspose1d": lambda: behind(nn.ConvTranspose1d(2, 2, 2, stride=2), 2, 3, width=12),
    "Conv3d": lambda: behind(nn.Conv3d(1, 2, 2), 1, 2, 3, 3, width=8),
    "AvgPool": lambda: behind(nn.AvgPool1d(2), 2, 4, width=4),
    "MaxPool": lambda: behind(nn.MaxPool2d(2), 1, 4, 4, width=4),
    "LPPool": lambda: behind(nn.LPPool1d(2.0, 2), 2, 4, width=4),
    "AdaptiveAvgPool": lambda: behind(nn.AdaptiveAvgPool1d(3), 2, 4, width=6),
    "Bilinear": lambda: (
        lively(
            Lambda(
                lambda self, x: self.parts[1](self.parts[0](x, x.tanh())),
                nn.Bilinear(3, 3, 2),
                nn.Linear(2, 3),
            )
        ),
        (torch.randn(2, 3),),
    ),
    "attention": lambda: (lively(Attending()), (torch.randn(2, 3, 4),)),
    "LSTM": lambda: recurring(nn.LSTM),
    "GRU": lambda: recurring(nn.GRU),
    "RNN": lambda: recurring(nn.RNN),
    "CosineSimilarity": lambda: (
        lively(
            Lambda(
                lambda self, x: torch.stack(
                    [torch.cosine_similarity(self.parts[i](x), x, -1) for i in range(3)], 1
                ),
                *(nn.Linear(4, 4) for _ in range(3)),
            )
        ),
        (torch.randn(2, 4),),
    ),
    "softmax cross attention": lambda: (
        lively(
            Lambda(
                lambda self, x: self.parts[1](self.parts[0](x, x, x, need_weights=False)[0]).mean(1),
                nn.MultiheadAttention(4, 2, batch_first=True),
                nn.Linear(4, 3),
            )
        ),
        (torch.randn(2, 3, 4),),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_equals_finite_differences(name, double):
    model, args = MODULES[name]()
    model.eval()
    problem = problem_of(model, args)
    measured = measure_with_fallbacks(problem, make_verified_plan(problem))
    assert measured.notes == []
    u = torch.cat(
        [random_direction(p, f"direction 0 {n}", 0).flatten() for n, p in problem.parameters.items()]
    )
    slopes = brute_force.bent_by_differences(model, args, seeds_of(problem), u)
    assert slopes.abs().max() > 1e-3  # the net bends: nothing is compared with zero alone
    worst = bent_norms(problem, measured.curvature, slopes)
    assert len(worst) == len(problem.parameters) and max(worst.values()) < 1e-6, worst


@pytest.mark.parametrize("name", ["parametrised", "old weight norm"])
def test_weight_norm_needs_to_be_written_out(name, double):
    """torch's fused weight norm has another second derivative in v than finite differences."""
    case = CASES[name]()
    model, twin = case.model.eval(), make_twin(case.model)
    seeds = [torch.randn(len(case.inputs[0]), 3)]
    u = torch.randn(sum(p.numel() for p in model.parameters()))
    slopes = brute_force.bent_by_differences(model, case.inputs, seeds, u)
    right = brute_force.bent(twin, case.inputs, seeds, u)
    wrong = brute_force.bent(model, case.inputs, seeds, u)
    scale = slopes.abs().max()
    assert (right - slopes).abs().max() < 1e-7 * scale
    assert (wrong - slopes).abs().max() > 1e-3 * scale, "torch has mended it: twin.py need not mind"


def many_copies(net, copies=3000, probes=2):
    """Each copy of one input has probes of its own: one measurement is many replicates."""
    problem = problem_of(
        net, torch.randn(1, 3).expand(copies, -1).clone(), probes=probes, likelihood="categorical"
    )
    measured = measure_with_fallbacks(problem, make_verified_plan(problem))
    return problem, measured.curvature


@pytest.mark.parametrize("probes", [2, 4])
def test_probe_error_is_the_spread_of_replicates(probes, double):
    net = lively(
        nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    )
    problem, found = many_copies(net, probes=probes)
    weights = found.weights
    dense = brute_force.hessians(
        net, (problem.batch.args[0][:1],), [s[:1] for s in seeds_of(problem)]
    )
    compared = 0
    for n, span in brute_force.spans(net).items():
        part = found.parameters[n]
        want = dense[0].diagonal(dim1=1, dim2=2)[:, span].square().sum(-1) @ weights[0]
        each = (part.square * weights).sum(-1)
        assert float(each.mean()) == pytest.approx(
            float(label_variance(part.square, weights)), rel=1e-12
        )
        error = float(each.std()) / len(each) ** 0.5
        assert abs(float(each.mean() - want)) <= 4 * error + 1e-14, n
        told = float(probe_error(part.probe_squares, weights))  # of the mean over the copies
        if n in ("4.weight", "4.bias"):
            assert told == 0 and error == 0
            continue
        compared += 1
        if probes == 2:
            assert 0.75 < told / error < 1.35, (n, told / error)
        else:
            assert told > 0.9 * error, (n, told / error)
    assert compared == 4
