"""Decisions on a diagonal of F, and whether their stated errors are true."""

import copy

import pytest
import torch
from torch import nn

import fimprobe
from tests.models.digits import confident_mlp, digits
from tests.models.small import mlp
from tests.oracles.fisher_diagonal import flat, rms

RUNS = 20
CATEGORICAL = {"likelihood": "categorical"}


@pytest.fixture(scope="module")
def estimates():
    """20 estimates, and the exact diagonal."""
    x, model = digits()[0], confident_mlp()
    runs = [fimprobe.estimate(model, x, seed=s, rel_error=0.2, **CATEGORICAL) for s in range(RUNS)]
    return runs, fimprobe.estimate(model, x, draws="exact", rel_error=1e-9, **CATEGORICAL)


def test_ewc_is_half_the_quadratic_form_and_differentiable(estimates):
    exact, model = estimates[1], confident_mlp()
    zero = exact.ewc_penalty(model)
    assert float(zero.value.detach()) == 0 and zero.rel_error is None
    moved = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in moved.parameters():
            p += 0.1 * torch.randn_like(p)
    penalty = exact.ewc_penalty(moved)
    penalty.value.backward()
    named = dict(moved.named_parameters())
    for name, start in model.named_parameters():
        move = (named[name] - start).detach().double()
        expected = exact.diagonal[name] * move
        torch.testing.assert_close(named[name].grad.double(), expected, rtol=1e-4, atol=1e-6)
    assert penalty.rel_error == 0  # exact labels of all inputs


@pytest.mark.parametrize("scope", ["all", "last layer", "one entry"])
def test_the_error_of_ewc_is_true(estimates, scope):
    runs, exact = estimates
    moved = confident_mlp()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            if scope == "all" or (scope == "last layer" and name.startswith("4.")):
                p += 0.1 * torch.randn_like(p)
            if scope == "one entry" and name == "2.weight":
                p.view(-1)[exact.diagonal[name].argmax()] += 0.1
    true = float(exact.ewc_penalty(moved).value.detach())
    penalties = [f.ewc_penalty(moved) for f in runs]
    off = rms([float(p.value.detach()) - true for p in penalties])
    assert 0.5 < rms([p.std_error for p in penalties]) / off < 2.5


def test_the_expected_overlap_of_masks_is_true(estimates):
    runs, exact = estimates
    true = flat(exact.mask(0.1).masks) > 0
    assert exact.mask(0.1).overlap == pytest.approx(1, abs=0.01)
    expected, actual = [], []
    for f in runs:
        mask = f.mask(0.1)
        chosen = flat(mask.masks) > 0
        assert int(chosen.sum()) == mask.kept == round(0.1 * len(chosen))
        actual.append(float((chosen & true).sum()) / mask.kept)
        expected.append(mask.overlap)
    assert abs(sum(expected) - sum(actual)) / RUNS < 0.06
    with pytest.raises(fimprobe.FimprobeError, match="`top` must be between"):
        exact.mask(2)


def test_ratios_select_with_a_stated_certainty():
    x, y = digits()
    model = confident_mlp()
    parts = [x[y == 3], x[y != 3]]
    exact = [fimprobe.estimate(model, p, draws="exact", rel_error=1e-9, **CATEGORICAL) for p in parts]
    true = exact[0].ratio(exact[1]).above(1.0)
    expected, actual = [], []
    for seed in range(10):
        one, other = (fimprobe.estimate(model, p, seed=seed, **CATEGORICAL) for p in parts)
        ratio = one.ratio(other)
        chosen = ratio.above(1.0)
        right = sum(float((chosen.masks[n] & m).sum()) for n, m in true.masks.items())
        expected.append(chosen.overlap)
        actual.append(right / chosen.kept)
        assert ratio.above(10.0).overlap is None  # 55 to 64 % would be stated, 32 to 75 % are right
    assert abs(sum(expected) - sum(actual)) / 10 < 0.1
    empty = exact[0].ratio(exact[0]).above(2.0)
    assert empty.kept == 0 and empty.overlap is None
    name = "4.bias"
    torch.testing.assert_close(ratio.values[name], one.diagonal[name] / other.diagonal[name])
    assert (ratio.std_error[name] > 0).all()


def test_merging_weights_by_f(estimates):
    runs, exact = estimates
    states = [confident_mlp(0.9).state_dict(), confident_mlp(0.99).state_dict()]
    merged = fimprobe.Fisher.merge([exact, runs[0]], states)
    name = "0.weight"
    weights = torch.stack([exact.diagonal[name], runs[0].diagonal[name]])
    theta = torch.stack([s[name].double() for s in states])
    known = weights.sum(0) > 0
    expected = ((weights * theta).sum(0) / weights.sum(0))[known]
    torch.testing.assert_close(merged.state[name].double()[known], expected, rtol=1e-5, atol=1e-6)
    confident_mlp().load_state_dict(merged.state)
    # the stated error against the true one, over the runs
    true = fimprobe.Fisher.merge([exact, exact], states).state
    off, stated = [], []
    for f in runs:
        result = fimprobe.Fisher.merge([exact, f], states)
        off.append(float((flat(result.state) - flat(true)).norm()))
        stated.append(float(flat(result.std_error).norm()))
    # an upper limit: the weights of entries with little F are known least
    assert 0.5 < rms(stated) / rms(off) < 4
    with pytest.raises(fimprobe.FimprobeError, match="at least two"):
        fimprobe.Fisher.merge([exact])


def test_buffers_are_averaged_and_integers_kept(double):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    f = fimprobe.estimate(model, torch.randn(40, 3), rel_error=1e-9, draws=2, **CATEGORICAL)
    other = copy.deepcopy(model)
    other[1].running_mean += 1
    other[1].num_batches_tracked += 7
    merged = fimprobe.Fisher.merge([f, f], [model.state_dict(), other.state_dict()]).state
    torch.testing.assert_close(merged["1.running_mean"], model[1].running_mean + 0.5)
    assert int(merged["1.num_batches_tracked"]) == 0


def test_other_models_are_refused(estimates):
    exact = estimates[1]
    small = fimprobe.estimate(mlp(), torch.randn(40, 4), **CATEGORICAL)
    for action in (
        lambda: exact.ewc_penalty(mlp()),
        lambda: exact.ratio(small),
        lambda: fimprobe.Fisher.merge([exact, small]),
        lambda: exact.to_laplace(object()),
    ):
        with pytest.raises(fimprobe.FimprobeError, match="`"):
            action()


def test_laplace_gets_the_hessian_of_its_own_fit():
    laplace = pytest.importorskip("laplace")
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    x, y, model = torch.randn(60, 4), torch.randint(3, (60,)), mlp()
    options = {"subset_of_weights": "all", "hessian_structure": "diag"}
    fitted = laplace.Laplace(model, "classification", **options)
    fitted.fit(DataLoader(TensorDataset(x, y), batch_size=20))
    exact = fimprobe.estimate(model, x, draws="exact", rel_error=1e-9, **CATEGORICAL)
    la = laplace.Laplace(model, "classification", **options)
    assert exact.to_laplace(la).rel_error == 0
    torch.testing.assert_close(la.posterior_variance, fitted.posterior_variance, rtol=1e-4, atol=0)
    torch.testing.assert_close(la(x[:3]), fitted(x[:3]), rtol=1e-4, atol=1e-5)
    drawn = fimprobe.estimate(model, x, draws=1, rel_error=0.05, **CATEGORICAL)
    errors = drawn.to_laplace(la)
    off = (la.posterior_variance - fitted.posterior_variance).abs()
    assert float((off <= 2.5 * errors.std_error).float().mean()) > 0.9
    last = laplace.Laplace(
        model, "classification", subset_of_weights="last_layer", hessian_structure="diag"
    )
    with pytest.raises(
        fimprobe.FimprobeError, match="must hold the parameters|must be a DiagLaplace"
    ):
        exact.to_laplace(last)


def test_laplace_of_a_regression_has_its_own_noise():
    laplace = pytest.importorskip("laplace")
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    x, model = torch.randn(40, 4), mlp(outputs=1)
    options = {"subset_of_weights": "all", "hessian_structure": "diag", "sigma_noise": 0.3}
    fitted = laplace.Laplace(model, "regression", **options)
    fitted.fit(DataLoader(TensorDataset(x, torch.randn(40, 1)), batch_size=40))
    family = fimprobe.likelihoods.Gaussian(sigma=0.3)
    exact = fimprobe.estimate(model, x, likelihood=family, draws="exact", rel_error=1e-9)
    la = laplace.Laplace(model, "regression", **options)
    exact.to_laplace(la)
    torch.testing.assert_close(la.posterior_variance, fitted.posterior_variance, rtol=1e-4, atol=0)


# -- what would be wrong without a word ------------------------------------------------------


class Tied(nn.Module):
    """Two names of one weight, as those of the embedding and the head of a language model."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def exactly(model, x):
    return fimprobe.estimate(model, x, draws="exact", rel_error=1e-9, **CATEGORICAL)


def test_both_names_of_a_tied_weight_are_merged():
    torch.manual_seed(0)
    models, tokens = [Tied(), Tied()], torch.randint(6, (40, 3))
    fishers = [exactly(model, tokens) for model in models]
    copies = [{n: x.clone() for n, x in model.state_dict().items()} for model in models]
    for states in ([model.state_dict() for model in models], copies):
        merged = fimprobe.Fisher.merge(fishers, states).state
        plain = (states[0]["head.weight"] + states[1]["head.weight"]) / 2
        assert list(merged) == list(states[0])
        assert torch.equal(merged["head.weight"], merged["embedding.weight"])
        assert not torch.allclose(merged["head.weight"], plain, rtol=1e-2)


def test_states_in_another_order_are_refused():
    torch.manual_seed(0)
    models, x = [mlp(), mlp()], torch.randn(40, 4)
    fishers = [exactly(model, x) for model in models]
    states = [model.state_dict() for model in models]
    fimprobe.Fisher.merge(fishers, states)
    with pytest.raises(fimprobe.FimprobeError, match="Fisher 0 was measured at state 1"):
        fimprobe.Fisher.merge(fishers, states[::-1])


def test_ratios_are_those_of_one_model_and_zeros_are_not_sure():
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    x[:20, 0] = 0
    model = nn.Linear(4, 3)
    drawn = [fimprobe.estimate(model, part, draws=2, rel_error=1e-9, **CATEGORICAL)
             for part in (x[:20], x[20:])]  # fmt: skip
    ratio = drawn[0].ratio(drawn[1])
    assert bool((ratio.values["weight"][:, 0] == 0).all())
    inverse = drawn[1].ratio(drawn[0])
    assert bool(inverse.values["weight"][:, 0].isinf().all())
    assert bool(inverse.std_error["weight"][:, 0].isinf().all())
    none = drawn[0].ratio(drawn[0])
    assert bool((none.std_error["weight"][:, 0] == 0).all())  # certain: these inputs are zero
    drawn[0].std_error["weight"][:, 0] = 0.1
    expected = 0.1 / drawn[1].diagonal["weight"][:, 0]
    torch.testing.assert_close(drawn[0].ratio(drawn[1]).std_error["weight"][:, 0], expected)
    with pytest.raises(fimprobe.FimprobeError, match="one state of the model"):
        drawn[0].ratio(fimprobe.estimate(nn.Linear(4, 3), x, **CATEGORICAL))


class DiagLaplace:
    """What is read of laplace-torch's class before its Hessian is set."""

    def __init__(self, model):
        self.model = model


def test_laplace_needs_the_size_of_the_data_and_the_measured_parameters():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(640, 4)
    part = fimprobe.estimate(model, iter(x.split(16)), **CATEGORICAL)
    assert part.metadata["data_size"] is None
    with pytest.raises(fimprobe.FimprobeError, match="`num_inputs` must be"):
        part.to_laplace(DiagLaplace(model))
    with pytest.raises(fimprobe.FimprobeError, match="at which F was measured"):
        part.to_laplace(DiagLaplace(mlp()), num_inputs=640)
