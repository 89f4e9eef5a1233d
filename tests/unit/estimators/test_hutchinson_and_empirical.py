"""Î_H and the empirical Fisher against dense Jacobians."""

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.engines.tracing.plan import Plan
from fimprobe.likelihoods import Gaussian
from tests.models.cases import CASES, lively
from tests.oracles import brute_force
from tests.support.repetitions import limit

pytestmark = pytest.mark.usefixtures("raw_numbers")

SIGMA = 0.7


def factors(name, h, positions):
    """L with L Lᵀ = I(h), block by block of independent positions."""
    h = h.flatten()
    if name == "categorical":
        blocks = []
        for p in torch.softmax(h.view(positions, -1), 1):
            blocks.append(torch.diag(p.sqrt()) - torch.outer(p, p.sqrt()))
        return torch.block_diag(*blocks)
    p = torch.sigmoid(h)
    v = {"bernoulli": p * (1 - p), "gaussian": torch.full_like(h, SIGMA**-2), "poisson": h.exp()}[
        name
    ]
    return torch.diag(v.sqrt())


class Truth:
    """Î_H's moments of one input: F, 2(F_ii² − Σ_c (LᵀJ_i)_c⁴), (tr F)² + ‖F‖² − 2Σ‖(LᵀJ)_c‖⁴."""

    def __init__(self, model, args, b, name, positions=1, keep=None):
        jac, h = brute_force.jacobian(model, args, b)
        self.jacobian = torch.cat(list(jac.values()), 1)
        factor = factors(name, h, positions)
        if keep is not None:
            factor = factor * keep.repeat_interleave(len(h) // len(keep)).to(factor.dtype)
        self.root = factor.T @ self.jacobian  # LᵀJ [C, P]
        self.fisher = self.root.T @ self.root
        self.variance = 2 * (self.fisher.diagonal().square() - self.root.pow(4).sum(0))

    def trace(self, index):
        return float(self.fisher.diagonal()[index].sum())

    def matrix(self, index):
        f = self.fisher[index][:, index]
        quartic = self.root[:, index].square().sum(1).square().sum()
        return float(f.trace().square() + f.square().sum() - 2 * quartic)


def net(outputs):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, outputs))
    return lively(model), (torch.randn(4, 3),), 1, None


def attention():
    case = CASES["attention net"]()
    return case.model.eval(), case.inputs, 3, None


def masked():
    case = CASES["attention net"]()
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[0, 1:] = mask[2, 0] = False
    return case.model.eval(), case.inputs, 3, mask


SETTINGS = {
    "categorical": ("categorical", lambda: net(3)),
    "bernoulli": ("bernoulli", lambda: net(2)),
    "gaussian": (Gaussian(SIGMA), lambda: net(2)),
    "poisson": ("poisson", lambda: net(2)),
    "categorical sequences": ("categorical", attention),
    "categorical masked": ("categorical", masked),
    "categorical lstm": (
        "categorical",
        lambda: (CASES["lstm"]().model.eval(), (torch.randn(4, 5, 3),), 1, None),
    ),
}


def setting(name):
    likelihood, make = SETTINGS[name]
    model, args, positions, mask = make()
    truth = [
        Truth(model, args, b, name.split()[0], positions, None if mask is None else mask[b])
        for b in range(len(args[0]))
    ]
    options = {"likelihood": likelihood, "mask": mask, "estimators": ("ih",), "bounds": False}
    return model, args, truth, options


def mean(values):
    values = list(values)
    return sum(float(v) for v in values) / len(values)


@pytest.mark.parametrize("name", SETTINGS)
def test_exact_equals_theory(name, double):
    model, args, truth, options = setting(name)
    report = fimprobe.measure(model, *args, draws="exact", diagonals=True, **options)
    spans = brute_force.spans(model)
    for key, index in brute_force.groups(model).items():
        have, i1 = brute_force.group_of(report, key).ih, brute_force.group_of(report, key).i1
        traces = torch.tensor([t.trace(index) for t in truth])
        variance = mean(t.variance[index].sum() for t in truth)
        assert have.trace == pytest.approx(float(traces.mean()), rel=1e-9)
        assert have.trace == pytest.approx(i1.trace, rel=1e-9)
        # each entry's variance is at most 2F², and 0 where one output alone has a gradient
        ceiling = 2 * mean(t.fisher.diagonal()[index].square().sum() for t in truth)
        assert variance < ceiling
        assert have.label_variance == pytest.approx(variance, rel=1e-9, abs=1e-12 * ceiling)
        matrix = mean(t.matrix(index) for t in truth)
        assert have.total_label_variance == pytest.approx(matrix, rel=1e-9)
        assert have.input_variance == pytest.approx(i1.input_variance, rel=1e-8)
        assert have.std_error == pytest.approx(float(traces.std()) / len(traces) ** 0.5, rel=1e-8)
        if key[0] == "parameters":
            n = key[1]
            want = torch.stack([t.variance[spans[n]] for t in truth]).mean(0)
            found = have.diagonal_label_variance[n].flatten()
            assert torch.allclose(found, want, rtol=1e-9, atol=1e-12 * ceiling)
            want = torch.stack([t.fisher.diagonal()[spans[n]] for t in truth]).mean(0)
            assert torch.allclose(have.diagonal[n].flatten(), want, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "poisson", "gaussian"])
def test_theory_equals_all_signs(name, double):
    """The formulas themselves, by every ξ in {−1, 1}^C."""
    model, args, truth, _ = setting(name)
    t = truth[0]
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * len(t.root))
    g = signs @ t.root
    outer = torch.einsum("si,sj->sij", g, g)
    assert torch.allclose(outer.mean(0), t.fisher, atol=1e-12)
    variance = outer.var(0, correction=0)
    assert torch.allclose(variance.diagonal(), t.variance, atol=1e-12)
    assert float(variance.sum()) == pytest.approx(t.matrix(torch.arange(len(t.fisher))), rel=1e-9)


@pytest.mark.parametrize("draws", [1, 2, 3])
@pytest.mark.parametrize(
    "name", ["categorical", "bernoulli", "poisson", "categorical sequences", "categorical masked"]
)
def test_sampled_is_unbiased(name, draws, double):
    model, args, truth, options = setting(name)
    copies = tuple(torch.cat([a] * 48) for a in args)
    if options["mask"] is not None:
        options["mask"] = torch.cat([options["mask"]] * 48)
    groups, plan, seen = brute_force.groups(model), Plan(), {}
    kinds = ("trace", "label_variance", "total_label_variance") if draws > 1 else ("trace",)
    for seed in range(16):
        report = fimprobe.measure(model, *copies, draws=draws, seed=seed, plan=plan, **options)
        for key in groups:
            e = brute_force.group_of(report, key).ih
            for kind in kinds:
                seen.setdefault((key, kind), []).append(getattr(e, kind))
            if draws == 1:
                assert e.label_variance is None
    want = {}
    for key, index in groups.items():
        want[key, "trace"] = mean(t.trace(index) for t in truth)
        want[key, "label_variance"] = mean(t.variance[index].sum() for t in truth)
        want[key, "total_label_variance"] = mean(t.matrix(index) for t in truth)
    told = 0
    for key, values in seen.items():
        x = torch.tensor(values, dtype=torch.float64)
        error = float(x.std()) / len(x) ** 0.5
        slack = 1e-12 * want[key[0], "trace"] ** 2  # rounding of an exact zero
        assert abs(float(x.mean()) - want[key]) <= limit(16) * error + 1e-10 * want[key] + slack, key
        told += error < 0.2 * want[key]
    assert told >= 0.8 * len(seen)


def data_labels(name, model, args):
    h = model(*args)
    if name.startswith("categorical"):
        return torch.randint(3, h.shape[:-1])
    return {"bernoulli": torch.rand(h.shape).round(), "gaussian": torch.randn(h.shape)}.get(
        name, torch.randint(5, h.shape).to(h.dtype)
    )


@pytest.mark.parametrize("draws", ["exact", 2])
@pytest.mark.parametrize(
    ("name", "ignore"), [*((name, False) for name in SETTINGS), ("categorical sequences", True)]
)
def test_empirical_equals_dense(name, ignore, draws, double):
    """mean g gᵀ with the data's labels; its angle to diag F and the ratio of their traces."""
    model, args, truth, options = setting(name)
    labels = data_labels(name, model, args)
    if ignore:
        labels[1, 0] = labels[3, 1:] = -100
    report = fimprobe.measure(
        model,
        *args,
        draws=draws,
        diagonals=True,
        labels=labels,
        **options | {"estimators": ("ih", "empirical")},
    )
    squares = []
    for b, t in enumerate(truth):
        h = model(*(a[b : b + 1] for a in args)).detach()[0]
        if name.startswith("categorical"):
            index = labels[b].clamp(min=0)
            score = nn.functional.one_hot(index, 3) - torch.softmax(h, -1)
            score = score * (labels[b] >= 0).unsqueeze(-1)
            if options["mask"] is not None:
                score = score * options["mask"][b].unsqueeze(-1)
        elif name == "gaussian":
            score = (labels[b] - h) / SIGMA**2
        else:
            score = labels[b] - (torch.sigmoid(h) if name == "bernoulli" else h.exp())
        squares.append((score.flatten() @ t.jacobian).square())
    data = torch.stack(squares)
    exact = torch.stack([t.fisher.diagonal() for t in truth]).mean(0)
    spans = brute_force.spans(model)
    for key, index in brute_force.groups(model).items():
        group = brute_force.group_of(report, key)
        have, f = group.empirical, exact[index]
        e = data[:, index].mean(0)
        assert have.trace == pytest.approx(float(e.sum()), rel=1e-9)
        assert have.norm == pytest.approx(brute_force.debiased_norm(data[:, index]), rel=1e-9)
        assert have.label_variance is None
        assert have.total_variance == pytest.approx(float(data[:, index].var(0).sum()), rel=1e-8)
        per_input = data[:, index].sum(1)
        assert have.std_error == pytest.approx(float(per_input.std()) / len(data) ** 0.5, rel=1e-8)
        if draws != "exact":  # compared with Hutchinson's estimate, which has the least noise
            f = torch.cat([group.ih.diagonal[n].flatten() for n in group.ih.diagonal])
            e = torch.cat([have.diagonal[n].flatten() for n in have.diagonal])
        assert have.cosine == pytest.approx(float(e @ f / (e.norm() * f.norm())), rel=1e-8)
        assert have.trace_ratio == pytest.approx(float(e.sum() / f.sum()), rel=1e-9)
        if key[0] == "parameters":
            n = key[1]
            assert torch.allclose(
                have.diagonal[n].flatten(), data[:, spans[n]].mean(0), rtol=1e-9, atol=1e-13
            )
