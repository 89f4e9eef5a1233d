"""The examples run, at small size; what they compute against what is known."""

import importlib.util
import math
import re
import sys

import pytest
import torch

from fimprobe.cli.digits import Digits, load_digits
from tests.support.paths import EXAMPLES


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


def few_digits():
    """Every fourth of the digits to train on, and of those held out."""
    return Digits(*(x[::4] for x in load_digits()))


@pytest.fixture
def penalties(monkeypatch):
    """The example, with a single strength of each penalty and few digits."""
    module = load("penalties")
    monkeypatch.setattr(module, "load_digits", few_digits)
    monkeypatch.setattr(module, "STRENGTHS", {k: v[-1:] for k, v in module.STRENGTHS.items()})
    return module


@pytest.fixture
def natural_gradient(monkeypatch):
    """The example, with few draws and step sizes."""
    module = load("natural_gradient")
    monkeypatch.setattr(module, "DRAWS", (1, 64))
    monkeypatch.setattr(module, "RATES", (0.1, 1.0))
    return module


@pytest.fixture
def variance_along_training(monkeypatch):
    """The example, with few measurements and few digits."""
    module = load("variance_along_training")
    monkeypatch.setattr(module, "load_digits", few_digits)
    monkeypatch.setattr(module, "EARLY", (0.5,))
    return module


ARGUMENTS = {
    "penalties": ["--seeds", "2", "--epochs", "1"],
    "natural_gradient": ["--seeds", "2", "--steps", "3"],
    "variance_along_training": ["--seeds", "2", "--epochs", "1", "--width", "5", "--inputs", "12"],
}


@pytest.fixture(scope="module")
def results():
    """What each example computes with its ``ARGUMENTS``, so that it is computed once."""
    return {}


@pytest.fixture(params=ARGUMENTS)
def run_example(request, tmp_path, monkeypatch, results):
    """Runs an example's ``main``; its name."""
    module = request.getfixturevalue(request.param)
    compute = module.run

    def run_once(**options):
        if request.param not in results:
            results[request.param] = compute(**options)
        return results[request.param]

    monkeypatch.setattr(module, "run", run_once)

    def run():
        module.main([*ARGUMENTS[request.param], "--out", str(tmp_path)])
        return request.param

    return run


def test_an_example_prints_its_table_without_matplotlib(run_example, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run_example()
    out = capsys.readouterr().out
    assert "no figure: it needs matplotlib" in out
    assert "nan" not in out


def test_an_example_draws_its_figure(run_example, tmp_path):
    pytest.importorskip("matplotlib")
    name = run_example()
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
    found = natural_gradient.run(seeds=2, steps=10, damping=0.1)
    for _, curves in found.values():
        left = {k: float(c.excess[:, -1].mean()) for k, c in curves.items()}
        exact = left[natural_gradient.EXACT, 0]
        assert left["Î₂", 1] == pytest.approx(exact, rel=1e-6)
        assert max(exact, left["Î₁", 64]) < 0.9 * left["Î₁", 1]


# variance along training


def enumerated(model, inputs, names):
    """Sums over the diagonals of some parameters by enumerated labels, dense J, H, I and M.

    Then the variance of the last of them from one sign vector u: Var uᵀSu = 2(‖S‖² − ‖diag S‖²).
    """
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    shapes = [parameters[n].shape for n in names]
    theta = torch.cat([parameters[n].flatten() for n in names])
    mean, diagonal = torch.zeros(8, dtype=torch.float64), 0
    for x in inputs:

        def outputs(theta, x=x):
            parts = theta.split([s.numel() for s in shapes])
            own = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
            return torch.func.functional_call(model, parameters | own, (x,))

        jacobian = torch.func.jacrev(outputs)(theta)
        bends = torch.func.hessian(outputs)(theta).diagonal(dim1=1, dim2=2)
        p = torch.softmax(outputs(theta), 0)
        delta = torch.eye(10).double() - p  # a row for each label
        squares = (delta @ jacobian).square()
        f = p @ squares
        information = torch.diag(p) - torch.outer(p, p)
        pairs = (delta[:, :, None] * delta[:, None, :]).flatten(1) - information.flatten()
        moment = pairs.T @ (p[:, None] * pairs)
        gram, largest = bends @ bends.T, torch.linalg.eigvalsh(information)[-1]
        spread = gram.square().sum() - gram.diagonal().square().sum()
        found = [
            f.sum(),
            0,
            (p @ squares.square() - f.square()).sum(),
            jacobian.square().sum(0).square().sum() * torch.linalg.eigvalsh(moment)[-1],
            (f * (squares.amax(0) - f)).sum(),
            (p @ (delta @ bends).square()).sum(),
            gram.trace() * largest,
            2 * spread * largest.square(),
        ]
        mean += torch.tensor([float(v) for v in found], dtype=torch.float64) / len(inputs)
        diagonal = diagonal + f / len(inputs)
    mean[1] = diagonal.norm()
    return mean.tolist()


def test_variances_and_bounds_are_those_of_enumerated_labels(variance_along_training):
    torch.manual_seed(0)
    model = variance_along_training.make_mlp("sigmoid", 2).double()
    inputs = torch.rand(3, 64).double()
    layers = variance_along_training.measure(model, inputs.repeat(300, 1))
    for index, layer in zip((0, 2, 4, 6), layers, strict=True):
        *wanted, bound, variance = enumerated(model, inputs, [f"{index}.weight", f"{index}.bias"])
        assert list(layer[:-1]) == pytest.approx(wanted, rel=1e-6, abs=0)
        assert abs(layer.v2_spectral - bound) <= 4 * (variance / 900) ** 0.5 < 0.3 * bound + 1e-300


def test_times_medians_and_what_has_no_variance(variance_along_training):
    module = variance_along_training
    for activation, silent in (("sigmoid", [3]), ("relu", [0, 1, 2, 3])):
        found = module.run(seeds=3, epochs=1, lr=1e-2, activation=activation, width=4, inputs=6)
        assert [p.epoch for p in found[0]] == [0, 0.5, 1]
        assert [i for i in range(4) if module.has_no_variance(found, i)] == silent
        for i in range(4):
            zeros = {p.layers[i].v2 for points in found for p in points} == {0.0}
            assert zeros == (i in silent)
        for layer in (x for points in found for p in points for x in p.layers):
            assert min(layer.looseness[:2]) > 0 and math.isnan(layer.looseness[2]) == (layer.v2 == 0)
        text = module.summarise(found)
        assert text.count("V2 is exactly 0 in each of 9 measurements") == len(silent)
        last = sorted(points[-1].accuracy for points in found)
        assert module.over_seeds(found, lambda p: p.accuracy)[-1] == (1, last[1], last[0], last[2])


# GPT-2 with Hugging Face's Trainer


def test_a_plain_loop_is_probed(tmp_path, capsys):
    load("plain_loop").main(["--epochs", "2", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "2 reports" in out and "F of the whole model is off by" in out
    assert "With one label from the model for each of 32 inputs, Î₁ would be off by" in out
    assert (tmp_path / "fimprobe.jsonl").is_file()


def test_a_vision_transformer_is_trained_probed_and_shown(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = ["--layers", "1", "--width", "8"]
    load("vit_on_digits").main(["--steps", "3", *sizes, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "3 reports" in out and "16 inputs, exact labels" in out and "classifier" in out
    assert 0 < float(re.search(r"accuracy (\S+) %", out)[1]) < 100


def test_gpt2_is_trained_probed_and_shown(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = ["--layers", "1", "--width", "8", "--length", "12", "--files", "2"]
    load("gpt2_on_source").main(["--steps", "30", *sizes, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "2 reports" in out and "h.0.attn.c_attn" in out
    losses = re.search(r"loss (\S+) -> (\S+) nats", out)
    assert float(losses[2]) < float(losses[1]) < 5.7  # log 256 = 5.55
    assert f"tensorboard --logdir {tmp_path} " in out
    events = [path.parent for path in tmp_path.glob("runs/*/fimprobe/*tfevents*")]
    assert len(events) == 1 and (events[0] / "fimprobe.jsonl").is_file()
