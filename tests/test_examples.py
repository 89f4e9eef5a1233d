"""The examples run, at small size; what they compute against what is known."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def penalties(monkeypatch):
    """The example, with a single strength of each penalty."""
    module = load("penalties")
    monkeypatch.setattr(module, "STRENGTHS", {k: v[-1:] for k, v in module.STRENGTHS.items()})
    return module


@pytest.fixture
def natural_gradient(monkeypatch):
    """The example, with few draws and step sizes."""
    module = load("natural_gradient")
    monkeypatch.setattr(module, "DRAWS", (1, 64))
    monkeypatch.setattr(module, "RATES", (0.1, 1.0))
    return module


ARGUMENTS = {
    "penalties": ["--seeds", "2", "--epochs", "1"],
    "natural_gradient": ["--seeds", "2", "--steps", "3"],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_prints_its_table_without_matplotlib(name, request, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    request.getfixturevalue(name).main([*ARGUMENTS[name], "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "no figure: it needs matplotlib" in out
    assert "nan" not in out


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_draws_its_figure(name, request, tmp_path):
    pytest.importorskip("matplotlib")
    request.getfixturevalue(name).main([*ARGUMENTS[name], "--out", str(tmp_path)])
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


# penalties


def test_a_single_seed_claims_nothing(penalties, capsys):
    found = penalties.run(seeds=1, epochs=1)
    assert "one seed: no interval" in penalties.summarise(found)
    assert "falls (95 %): nowhere" in penalties.summarise(found)
    assert "nan" not in penalties.format_table(found)


def test_changes_are_paired_and_have_students_interval(penalties):
    base = [{"v": x} for x in (1.0, 10.0, 100.0)]
    runs = [{"v": x} for x in (2.0, 21.0, 190.0)]
    found = penalties.change(runs, base, "v")
    logs = [math.log(x) for x in (2.0, 2.1, 1.9)]
    mean = sum(logs) / 3
    half = 4.302652729749464 * (sum((x - mean) ** 2 for x in logs) / 2 / 3) ** 0.5  # t, 2 degrees
    assert found.factor == pytest.approx(math.exp(mean))
    assert (found.low, found.high) == pytest.approx((math.exp(mean - half), math.exp(mean + half)))
    assert "rises" in str(found) and "falls" in str(penalties.change(base, runs, "v"))
    assert "no clear change" in str(penalties.change([{"v": 1.0}, {"v": 3.0}], [{"v": 2.0}] * 2, "v"))


def test_early_stopping_is_matched_at_equal_confidence(penalties):
    def runs(*pairs):
        return [{"confidence": 1 - d, "variance": v, "relative": v**2} for d, v in pairs]

    setting = penalties.Setting("MLP", "spectral", 1.0)
    found = {
        penalties.Setting("MLP", penalties.EARLY, 0.5): runs((0.4, 4.0), (0.4, 4.0)),
        penalties.Setting("MLP", penalties.NONE, 0.0): runs((0.1, 16.0), (0.1, 16.0)),
        setting: runs((0.2, 1.0), (0.1, 1.0)),
    }
    matched = penalties.at_equal_confidence(found, setting)
    assert [m["variance"] for m in matched] == pytest.approx([8.0, 16.0])  # half way in logarithms
    assert [m["relative"] for m in matched] == pytest.approx([64.0, 256.0])
    assert (
        penalties.at_equal_confidence(found | {setting: runs((0.5, 1.0), (0.1, 1.0))}, setting)
        is None
    )


def test_the_layer_before_the_batchnorm_is_left_out(penalties):
    net = penalties.make_cnn()
    all_of_it = penalties.penalty_of(penalties.Setting("CNN", "spectral", 1.0))
    rest = penalties.penalty_of(penalties.Setting("CNN", "spectral, not before BatchNorm", 1.0))
    first = torch.linalg.svdvals(net[0].weight.detach().flatten(1))[0] ** 2
    assert float(all_of_it(net) - rest(net)) == pytest.approx(float(first), rel=1e-3)


# natural gradient


@pytest.fixture(params=["linear_regression", "logistic_regression"])
def problem(natural_gradient, request):
    whole = getattr(natural_gradient, request.param)()
    return whole._replace(x=whole.x[:60], y=whole.y[:60])


def labels_at(natural_gradient, problem, draws):
    generator = torch.Generator().manual_seed(0)
    theta = 0.3 * torch.randn(problem.x.shape[1], generator=generator, dtype=torch.float64)
    return theta, problem.sample((problem.x @ theta).expand(draws, -1), generator)


def test_i2_is_the_fisher_information_from_a_single_draw(natural_gradient, problem):
    theta, labels = labels_at(natural_gradient, problem, 1)
    h = problem.x @ theta
    if "logistic" in problem.name:
        information = torch.softmax(torch.stack([h, 0 * h], 1), 1).prod(1)
    else:
        information = -torch.func.hessian(lambda h: problem.log_likelihood(h, problem.y).sum())(
            h
        ).diag()
    dense = problem.x.T @ torch.diag(information) @ problem.x / 60
    for matrix in (
        natural_gradient.fisher(problem, theta),
        natural_gradient.estimate_i2(problem, theta, labels),
    ):
        assert torch.allclose(matrix, dense, rtol=1e-10, atol=1e-10 * float(dense.abs().max()))


def test_the_mean_of_i1_tends_to_the_fisher_information(natural_gradient, problem):
    theta, labels = labels_at(natural_gradient, problem, 20_000)
    exact = natural_gradient.fisher(problem, theta)
    each = torch.stack([natural_gradient.estimate_i1(problem, theta, y) for y in labels.split(50)])
    assert torch.allclose(each.mean(0), natural_gradient.estimate_i1(problem, theta, labels))
    error = each.std(0) / len(each) ** 0.5
    assert ((each.mean(0) - exact).abs() < 4.5 * error).all()
    assert float((each.mean(0) - exact).norm() / exact.norm()) < 0.05


def test_the_predicted_error_is_that_of_gaussian_labels(natural_gradient):
    problem = natural_gradient.linear_regression()
    theta = torch.zeros(problem.x.shape[1], dtype=torch.float64)
    labels = problem.sample((problem.x @ theta).expand(4000, -1), torch.Generator().manual_seed(0))
    exact = natural_gradient.fisher(problem, theta)
    squares = torch.stack(
        [
            (natural_gradient.estimate_i1(problem, theta, y) - exact).square().sum()
            for y in labels.split(4)
        ]
    )
    want = (natural_gradient.predicted_error(problem, 4) * float(exact.norm())) ** 2
    assert abs(float(squares.mean()) - want) < 4 * float(squares.std()) / len(squares) ** 0.5


def test_less_noise_descends_further(natural_gradient):
    found = natural_gradient.run(seeds=4, steps=15, damping=0.1)
    for _, curves in found.values():
        left = {k: float(c.excess[:, -1].mean()) for k, c in curves.items()}
        exact = left[natural_gradient.EXACT, 0]
        assert left["Î₂", 1] == pytest.approx(exact, rel=1e-6)
        assert max(exact, left["Î₁", 64]) < 0.9 * left["Î₁", 1]
