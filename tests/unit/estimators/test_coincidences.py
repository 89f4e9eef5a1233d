"""Σ_i F_i(x)² from pairs of drawn class labels, against enumeration of all labels."""

import itertools

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.estimators import i1
from fimprobe.likelihoods.draws import Draws

pytestmark = pytest.mark.usefixtures("raw_numbers")

CLASSES, INPUTS = 3, 2
HIDDEN, LAST = ("0.weight", "0.bias"), ("2.weight", "2.bias")
SAMPLING = pytest.mark.parametrize("label_sampling", ["size_biased", "model"])


def classifier(classes, width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, classes))


def squared_gradients(model, x, names):
    """p [B, K] and the squares of ∂ log p(y | x)/∂θ [B, K, P], one backward pass for each."""
    parameters = [model.get_parameter(name) for name in names]
    rows = []
    for log_p in model(x).log_softmax(-1):
        passes = [torch.autograd.grad(label, parameters, retain_graph=True) for label in log_p]
        rows.append(torch.stack([torch.cat([g.flatten() for g in p]) for p in passes]).square())
    return model(x).softmax(-1).detach(), torch.stack(rows)


def drawing_probabilities(p, label_sampling):
    if label_sampling == "model":
        return p
    score = torch.eye(p.shape[1]) - p.unsqueeze(1)
    q = p * score.square().sum(-1)
    return q / q.sum(-1, keepdim=True)


@SAMPLING
@pytest.mark.parametrize("draws", [2, 3])
def test_it_is_unbiased_over_all_labels_of_a_batch(label_sampling, draws, double, monkeypatch):
    """Every combination of the draws of two inputs, weighted by its probability."""
    model, x = classifier(CLASSES), torch.randn(INPUTS, 3)
    p, _ = squared_gradients(model, x, LAST)
    q = drawing_probabilities(p, label_sampling)
    combinations = torch.tensor([*itertools.product(range(CLASSES), repeat=draws)])
    middle = q.cumsum(-1) - q / 2
    uniforms = torch.cat([row[combinations] for row in middle])
    batches = []

    def keep(moments, groups):
        batches.append(moments)
        return of(moments, groups)

    def choose(self, seed, size, shape):
        return uniforms if size == len(uniforms) else random_uniforms(self, seed, size, shape)

    of, random_uniforms = i1.InputSums.of, Draws._uniforms
    monkeypatch.setattr(Draws, "_uniforms", choose)
    monkeypatch.setattr(i1.InputSums, "of", keep)
    fimprobe.measure(
        model,
        x.repeat_interleave(len(combinations), 0),
        likelihood="categorical",
        estimators=("i1",),
        bounds=False,
        draws=draws,
        label_sampling=label_sampling,
    )
    chance = torch.stack([row[combinations].prod(-1) for row in q])
    both = torch.cartesian_prod(*[torch.arange(len(combinations))] * INPUTS)
    chance_of_both = chance[0, both[:, 0]] * chance[1, both[:, 1]]
    for names in (HIDDEN, LAST):
        powers = sum(batches[0].parameters[name].powers for name in names)
        by_input = powers.view(4, INPUTS, -1)
        _, squares, alone, coincidences = torch.stack(
            [by_input[:, b, both[:, b]] for b in range(INPUTS)], -1
        )
        estimates = i1.pair_squares(squares, alone, coincidences, draws)
        _, gradients = squared_gradients(model, x, names)
        fisher = torch.einsum("by,byi->bi", p, gradients)
        assert torch.allclose(chance_of_both @ estimates, fisher.square().sum(-1), rtol=1e-10)
        assert (estimates >= 0).all()
        # the sum that is left out has the mean 0, and is not 0
        mean = (chance * by_input[3]).sum(-1)
        assert (mean.abs() < 1e-12 * by_input[3].abs().amax(-1)).all()


@SAMPLING
def test_variances_over_inputs_are_known_with_many_classes(label_sampling, double):
    """A pair of equal labels in 50 carries F of the last layer, and 64 inputs have about one."""
    model, x = classifier(50, width=8), torch.randn(64, 3)
    options = {"likelihood": "categorical", "estimators": ("i1",), "bounds": False}
    exact = fimprobe.measure(model, x, draws="exact", **options)
    for seed in range(3):
        report = fimprobe.measure(
            model, x, draws=2, label_sampling=label_sampling, seed=seed, **options
        )
        for layer in ("0", "2"):
            truth = exact.layers[layer].i1.pair_variance.relative(None)[0]
            value, error = report.layers[layer].i1.pair_variance.relative(None)
            assert abs(value - truth) < 4 * error
        assert error < 0.3 * truth


@pytest.mark.parametrize("engine_draws", [2, 4])
def test_two_classes_show_no_noise_of_labels(engine_draws, double):
    """All their size-biased gradients have the same squares: equal labels say nothing more."""
    model, x = classifier(2), torch.randn(6, 3)
    options = {"likelihood": "categorical", "estimators": ("i1",), "bounds": False}
    exact = fimprobe.measure(model, x, draws="exact", **options).total.i1
    drawn = fimprobe.measure(model, x, draws=engine_draws, **options).total.i1
    assert drawn.input_variance == pytest.approx(exact.input_variance, rel=1e-9)


def test_one_label_and_several_positions_have_no_coincidences(double, monkeypatch):
    batches = []

    def keep(moments, groups):
        batches.append(moments)
        return of(moments, groups)

    of = i1.InputSums.of
    monkeypatch.setattr(i1.InputSums, "of", keep)
    model = classifier(3)
    for shape, draws in (((4, 3), 1), ((4, 2, 3), 2)):
        fimprobe.measure(
            model,
            torch.randn(shape),
            likelihood="categorical",
            estimators=("i1",),
            bounds=False,
            draws=draws,
        )
        assert not any(m.powers[3].any() for m in batches[-1].parameters.values())


class Mixed(nn.Module):
    """Parameters that are a module's own, which no layer rule covers."""

    def __init__(self):
        super().__init__()
        self.scale, self.matrix = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.sin(x * self.scale) @ self.matrix


class ManyPaths(nn.Module):
    """A lookup, norms, a layer that is used twice, a fallback, a convolution and a last layer."""

    def __init__(self):
        super().__init__()
        self.lookup, self.norm, self.shared = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.mixed, self.conv, self.last = Mixed(), nn.Conv1d(4, 4, 2), nn.Linear(4, 5)

    def forward(self, tokens):
        x = torch.tanh(self.shared(self.norm(self.lookup(tokens))))
        x = self.conv(self.shared(self.mixed(x)).transpose(1, 2))
        return self.last(x.mean(2))


@SAMPLING
@pytest.mark.parametrize("options", [{}, {"diagonals": True}, {"memory_mb": 1}])
def test_coincidences_by_every_path_are_those_of_single_gradients(
    label_sampling, options, double, monkeypatch
):
    torch.manual_seed(0)
    model, tokens, draws = ManyPaths(), torch.randint(0, 7, (5, 6)), 3
    uniforms = torch.rand(5, draws)
    uniforms[0], uniforms[1, :2] = 0.3, 0.7  # equal labels
    kept = []

    def keep(moments, groups):
        kept.append(moments)
        return of(moments, groups)

    def choose(self, seed, size, shape):
        same = (size, len(shape)) == (5, 0)
        return uniforms if same else random_uniforms(self, seed, size, shape)

    of, random_uniforms = i1.InputSums.of, Draws._uniforms
    monkeypatch.setattr(i1.InputSums, "of", keep)
    monkeypatch.setattr(Draws, "_uniforms", choose)
    fimprobe.measure(
        model, tokens, likelihood="categorical", estimators=["i1"], bounds=False, draws=draws,
        label_sampling=label_sampling, **options,
    )  # fmt: skip
    names = [name for name, _ in model.named_parameters()]
    p = model(tokens).softmax(-1).detach()
    q = drawing_probabilities(p, label_sampling)
    labels = torch.searchsorted(q.cumsum(-1), uniforms, right=True)
    assert "vmap" in kept[0].coverage["mixed.matrix"] and "rule" in kept[0].coverage["conv.bias"]
    for b, drawn in enumerate(labels.tolist()):
        sums = dict.fromkeys(names, 0.0)
        for y in drawn:
            unexpected = drawn.count(y) - 1 - (draws - 1) * float(q[b, y])
            weight = float(p[b, y] / q[b, y]) ** 2 * unexpected
            log_p = model(tokens[b : b + 1]).log_softmax(-1)[0, y]
            gradients = torch.autograd.grad(log_p, [*model.parameters()])
            for name, gradient in zip(names, gradients, strict=True):
                sums[name] += weight * float(gradient.pow(4).sum())
        for name, expected in sums.items():
            assert float(kept[0].parameters[name].powers[3, b]) == pytest.approx(expected, rel=1e-9)
