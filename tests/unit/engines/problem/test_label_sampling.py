"""Sampled draws, other likelihoods, precision, and a second engine to agree with."""

import copy

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.engines.tracing.plan import Plan
from fimprobe.likelihoods import Gaussian
from tests.models.cases import CASES
from tests.oracles import brute_force

pytestmark = pytest.mark.usefixtures("raw_numbers")

FIRST = {"estimators": ("i1",), "bounds": False}
"""Nothing beside Î₁ is measured."""


def measure_first(model, inputs, **options):
    return fimprobe.measure(model, inputs, **FIRST, **options)


def small(outputs=2):
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, outputs)), torch.randn(4, 3)


LABELS = {
    "bernoulli": ("bernoulli", brute_force.bernoulli_labels),
    "poisson": ("poisson", brute_force.poisson_labels),
    "gaussian": (Gaussian(sigma=0.7), lambda h: brute_force.gaussian_labels(h, 0.7)),
}


@pytest.mark.parametrize("name", LABELS)
def test_exact_draws_of_other_families(name, double):
    likelihood, labels = LABELS[name]
    net, x = small()
    oracle = brute_force.enumerate_fisher(net, (x,), labels)
    report = measure_first(net, x, likelihood=likelihood, draws="exact", diagonals=True)
    for n, group in [*report.parameters.items(), ("", report.total)]:
        want, have = brute_force.summarise(*oracle, n), group.i1
        assert have.trace == pytest.approx(float(want["diagonal"].sum()), rel=1e-9)
        assert have.label_variance == pytest.approx(float(want["label"].sum()), rel=1e-9)
        assert have.input_variance == pytest.approx(float(want["input"].sum()), rel=1e-9)
        assert have.total_label_variance == pytest.approx(want["l1"], rel=1e-9)
        if n:
            scale = want["label"].max()
            assert torch.allclose(
                have.diagonal_label_variance[n].flatten() / scale, want["label"] / scale, atol=1e-9
            )


@pytest.mark.parametrize("draws", [1, 2, 5])
@pytest.mark.parametrize(
    "name", ["mlp", "conv2d rectangular", "attention net", "lstm", "embedding padding_idx"]
)
def test_sampled_draws_are_unbiased(name, draws, double):
    """Over seeds and over copies of the inputs, whose labels are their own."""
    case = CASES[name]()
    model, plan = case.model.eval(), Plan()
    inputs = tuple(x.repeat(25, *[1] * (x.dim() - 1)) for x in case.inputs)
    exact = measure_first(model, inputs, likelihood="categorical", draws="exact")
    seen: dict[str, list[float]] = {}
    for seed in range(30):
        report = measure_first(
            model, inputs, likelihood="categorical", draws=draws, seed=seed, plan=plan
        )
        for n, group in [*report.parameters.items(), ("total", report.total)]:
            e = group.i1
            for kind in ("trace", "label_variance", "input_variance", "total_label_variance"):
                if getattr(e, kind) is not None:
                    seen.setdefault(f"{n}.{kind}", []).append(getattr(e, kind))
    groups = {**exact.parameters, "total": exact.total}
    assert len(seen) >= (len(groups)) * (1 if draws == 1 else 4)
    for key, values in seen.items():
        n, _, kind = key.rpartition(".")
        x = torch.tensor(values)
        error = x.std() / len(x) ** 0.5
        assert abs(float(x.mean()) - getattr(groups[n].i1, kind)) < 4 * error + 1e-12, key


@pytest.mark.parametrize("name", ["mlp", "conv2d", "attention net", "lstm", "class token", "experts"])
@pytest.mark.parametrize("draws", [1, 3])
def test_chunks_draw_the_same_labels(name, draws, double):
    case = CASES[name]()
    reports = [
        measure_first(
            case.model.eval(),
            case.inputs,
            likelihood="categorical",
            draws=draws,
            seed=3,
            memory_mb=mb,
        )
        for mb in (512, 0.03, 0.003)
    ]
    for other in reports[1:]:
        for n, group in reports[0].parameters.items():
            assert other.parameters[n].i1.trace == pytest.approx(group.i1.trace, rel=1e-11, abs=1e-20)
            assert other.parameters[n].i1.std_error == pytest.approx(
                group.i1.std_error, rel=1e-9, abs=1e-20
            )


@pytest.mark.parametrize("name", ["mlp", "conv2d", "attention net", "lstm", "layer norm", "bilinear"])
def test_float32_agrees_with_float64(name, double):
    case = CASES[name]()
    model = case.model.eval()
    want = measure_first(model, case.inputs, likelihood="categorical", draws="exact")
    single = copy.deepcopy(model).float()
    inputs = tuple(x.float() if x.is_floating_point() else x for x in case.inputs)
    have = measure_first(single, inputs, likelihood="categorical", draws="exact")
    for kind in ("trace", "label_variance", "input_variance", "total_label_variance", "rel_error"):
        for n in want.parameters:
            assert getattr(have.parameters[n].i1, kind) == pytest.approx(
                getattr(want.parameters[n].i1, kind), rel=2e-3, abs=1e-9
            ), (n, kind)


def test_bfloat16_models_accumulate_in_float32():
    net, x = small(3)
    net = net.bfloat16()
    half = measure_first(net, x.bfloat16(), likelihood="categorical", draws="exact", diagonals=True)
    full = measure_first(
        copy.deepcopy(net).double(), x.bfloat16().double(), likelihood="categorical", draws="exact"
    )
    assert half.parameters["0.weight"].i1.diagonal["0.weight"].dtype == torch.float32
    assert half.total.i1.trace == pytest.approx(full.total.i1.trace, rel=0.05)
    assert half.total.i1.label_variance == pytest.approx(full.total.i1.label_variance, rel=0.1)


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e6])
def test_float32_range_of_fourth_powers(factor):
    """Gradients of 1e-12 have fourth powers that float32 cannot hold."""
    net, x = small(3)
    with torch.no_grad():
        net[2].weight *= factor  # gradients of the first layer scale with it
        net[0].bias.zero_()
    single = measure_first(net, x, likelihood="gaussian", draws="exact")
    double = measure_first(
        copy.deepcopy(net).double(), x.double(), likelihood="gaussian", draws="exact"
    )
    for n in ("0.weight", "0.bias"):
        have, want = single.parameters[n].i1, double.parameters[n].i1
        assert want.label_variance > 0
        assert have.label_variance == pytest.approx(want.label_variance, rel=1e-3)
        assert have.rel_error == pytest.approx(want.rel_error, rel=1e-3)


def test_masked_positions_carry_no_label(double):
    case = CASES["attention net"]()
    (tokens,) = case.inputs
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 1:] = False
    mask[2, 0] = False

    def labels_at(b):
        keep = mask[b]

        def labels(h):
            h = h.view(3, 3)[keep]
            for w, d in brute_force.categorical_labels(h, int(keep.sum()), 3):
                full = torch.zeros(3, 3)
                full[keep] = d.view(-1, 3)
                yield w, full.flatten()

        return labels

    parts = [
        brute_force.enumerate_fisher(case.model, (tokens[b : b + 1],), labels_at(b)) for b in range(4)
    ]
    report = measure_first(case.model, tokens, likelihood="categorical", draws="exact", mask=mask)
    for n in report.parameters:
        trace = sum(float(p[0][0][n].sum()) for p in parts) / 4
        variance = sum(float(p[1][0][n].sum()) for p in parts) / 4
        assert report.parameters[n].i1.trace == pytest.approx(trace, rel=1e-9)
        assert report.parameters[n].i1.label_variance == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("name", ["mlp", "conv2d", "conv1d"])
def test_agrees_with_backpack_on_the_same_scores(name, double):
    """BackPACK's SumGradSquared for a given seed is an engine of its own."""
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    case = CASES[name]()
    model = case.model.eval()
    sigma = 1.0
    report = measure_first(
        model, case.inputs, likelihood=Gaussian(sigma), draws=1, diagonals=True, seed=11
    )
    extended = extend(copy.deepcopy(model), use_converter=False)
    loss_of = extend(nn.MSELoss(reduction="sum"))
    h = extended(*case.inputs)
    generator = torch.Generator().manual_seed(11)
    uniforms = torch.rand(len(h), 1, *h.shape[1:], generator=generator)
    z = torch.special.ndtri(uniforms + 2.0**-54)[:, 0]
    with backpack(SumGradSquared()):
        loss_of(h, h.detach() + z / 2).backward()  # gradient 2(h − y) = −z
    for n, p in extended.named_parameters():
        have = report.parameters[n].i1.diagonal[n] * len(h)
        assert torch.allclose(have, p.sum_grad_squared, rtol=1e-9)


@pytest.mark.parametrize("draws", [1, 2, "exact"])
@pytest.mark.parametrize(
    "name", ["mlp", "conv2d", "attention net", "lstm", "class token", "bag mean", "shared deltas"]
)
def test_chunks_of_1_and_3_and_all_agree(name, draws, double):
    case = CASES[name]()
    plan, reports = Plan(), []
    for chunk in (None, 1, 3):  # the first measurement makes the plan
        plan.chunk_size = chunk
        reports.append(
            measure_first(
                case.model.eval(), case.inputs, likelihood="categorical", draws=draws, plan=plan
            )
        )
    whole, *in_chunks = reports
    for other in in_chunks:
        for n, group in whole.parameters.items():
            for kind in ("trace", "norm", "label_variance", "std_error", "total_label_variance"):
                want = getattr(group.i1, kind)
                have = getattr(other.parameters[n].i1, kind)
                assert have == (None if want is None else pytest.approx(want, rel=1e-9, abs=1e-14))


@pytest.mark.parametrize("factor", [1e-13, 1e-6, 1e6])
def test_float32_range_of_convolutions(factor):
    """The inputs' size, not only δ's, decides whether fourth powers fit."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    nn.init.zeros_(net[2].bias)
    x = torch.randn(4, 3, 6, 6) * factor
    with torch.no_grad():
        net[2].weight *= min(1.0, 1 / factor)  # moderate logits
    options = {"likelihood": "categorical", "draws": "exact"}
    have = measure_first(net, x, **options).parameters["0.weight"].i1
    want = measure_first(copy.deepcopy(net).double(), x.double(), **options)
    want = want.parameters["0.weight"].i1
    assert want.label_variance > 0
    assert have.label_variance / want.label_variance == pytest.approx(1, rel=1e-3)
    assert have.rel_error == pytest.approx(want.rel_error, rel=1e-3)


def test_labels_drawn_in_pieces_are_the_same(monkeypatch):
    """Outputs of language models do not fit several times in float64."""
    from fimprobe.engines.problem import label_cotangents

    model, x = torch.nn.Linear(3, 5), torch.randn(7, 2, 3)
    options = {"likelihood": "categorical", "draws": 3, "estimators": ["i1"], "bounds": False}
    whole = fimprobe.measure(model, x, **options)
    for most in (1, 25, 69):
        monkeypatch.setattr(label_cotangents, "MAX_LABELLED_OUTPUTS_ON_CPU", most)
        assert fimprobe.measure(model, x, **options).to_dict() == {
            **whole.to_dict(),
            "seconds": pytest.approx(0, abs=60),
        }
