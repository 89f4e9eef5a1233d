"""F over a data set: what is stated is true, whatever the data's form, interruptions and processes."""

import copy
import importlib.util
import multiprocessing
import random
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fimprobe
from fimprobe.fisher.streaming import progress
from tests.models.digits import confident_mlp, digits
from tests.oracles.fisher_diagonal import flat, input_diagonals
from tests.support import estimate_worker
from tests.support.paths import EXAMPLES
from tests.support.processes import PRELOADED, free_port, start_processes
from tests.support.repetitions import few_or_many

RUNS = few_or_many(16, 40)
"""Estimates whose claims are checked."""
KILLS = 3
"""Of each kind of estimate."""

CATEGORICAL = {"likelihood": "categorical"}


@pytest.fixture(scope="module")
def truth():
    """F of every input of the digits [N, P]."""
    return input_diagonals(confident_mlp(), digits()[0])


def check_claims(truth, inputs, runs, **options):
    """The stated error is right within a factor of 1.5, and 90 % of the claims are true."""
    true, stated, actual = truth.mean(0), [], []
    covered = entries = 0.0
    for seed in range(runs):
        f = fimprobe.estimate(confident_mlp(), inputs, seed=seed, **CATEGORICAL, **options)
        diagonal, error = flat(f.diagonal), flat(f.std_error)
        stated.append(f.rel_error)
        actual.append(float((diagonal - true).norm() / true.norm()))
        covered += abs(f.trace - float(true.sum())) <= 2 * f.trace_error
        inside = (diagonal - true).abs() <= 2 * error + 1e-6 * true
        entries += float((inside.double() * true).sum() / true.sum())
    stated, actual = torch.tensor(stated), torch.tensor(actual)
    ratio = float(stated.square().mean().sqrt() / actual.square().mean().sqrt())
    assert 1 / 1.5 < ratio < 1.5, ratio
    assert float((actual <= 1.5 * stated).double().mean()) >= 0.9
    # two standard errors of a count of runs below 90 %
    assert covered >= 0.9 * runs - 2 * (0.09 * runs) ** 0.5, covered
    assert entries >= 0.85 * runs, entries


@pytest.mark.parametrize("runs", RUNS)
def test_the_stated_error_is_true_for_drawn_inputs(truth, runs):
    check_claims(truth, digits()[0], runs, rel_error=0.1)


@pytest.mark.parametrize("runs", RUNS)
def test_the_stated_error_is_true_for_a_part_of_the_data(truth, runs):
    options = {"rel_error": 0.01, "max_inputs": 800, "input_sampling": "uniform", "draws": 2}
    check_claims(truth, digits()[0], runs, **options)


def test_all_inputs_and_exact_labels_have_no_error(truth):
    x = digits()[0]
    model = confident_mlp().double()
    f = fimprobe.estimate(model, x.double(), rel_error=1e-9, draws="exact", **CATEGORICAL)
    assert f.rel_error == 0 and f.reached and f.trace_error == 0
    torch.testing.assert_close(flat(f.diagonal), truth.mean(0), rtol=1e-8, atol=1e-14)
    assert f.trace == pytest.approx(float(truth.mean(0).sum()), rel=1e-9)
    variance = float(truth.var(0).sum()) / len(x)
    population = (variance / (f.total.norm**2 - variance)) ** 0.5
    assert f.metadata["population_rel_error"] == pytest.approx(population, rel=1e-6)


def test_the_form_of_the_data_does_not_matter(double):
    """Ragged batches, empty ones, a last one of one, pairs, mappings, generators."""
    x, y = digits()[0][:257].double(), digits()[1][:257]
    model = confident_mlp(0.9).double()
    options = {"rel_error": 1e-9, "draws": "exact", **CATEGORICAL}
    expected = fimprobe.estimate(model, x, **options)
    forms = {
        "loader": DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True),
        "dataset": TensorDataset(x),
        "pairs": list(zip(x.split(64), y.split(64), strict=True)),
        "ragged": [x[:0], x[:100], x[100:100], x[100:256], x[256:]],
        "mappings": [{"input": rows, "id": rows[:, 0]} for rows in x.split(50)],
        "generator": iter(x.split(80)),
        "function": [{"image": rows} for rows in x.split(64)],
    }
    for name, data in forms.items():
        inputs = (lambda batch: batch["image"]) if name == "function" else None
        f = fimprobe.estimate(model, data, inputs=inputs, **options)
        assert f.metadata["inputs"] == 257, name
        torch.testing.assert_close(flat(f.diagonal), flat(expected.diagonal), rtol=1e-10, atol=0)
        for other, group in f.layers.items():
            assert group.trace == pytest.approx(expected.layers[other].trace, rel=1e-10), name


def test_labels_do_not_depend_on_the_batches(double):
    x, model = digits()[0][:300].double(), confident_mlp(0.9).double()
    options = {"rel_error": 1e-9, "draws": 2, "input_sampling": "uniform", **CATEGORICAL}
    one, other = (
        fimprobe.estimate(model, DataLoader(TensorDataset(x), batch_size=size), **options)
        for size in (300, 7)
    )
    torch.testing.assert_close(flat(one.diagonal), flat(other.diagonal), rtol=1e-10, atol=0)
    torch.testing.assert_close(flat(one.std_error), flat(other.std_error), rtol=1e-6, atol=1e-15)


def test_it_leaves_no_trace_and_is_determined_by_its_seed():
    x, y = digits()
    model = confident_mlp().train()
    before = copy.deepcopy(model.state_dict())
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    diagonals = []
    for seed in (0, 0, 1):
        torch.rand(3)
        state = torch.random.get_rng_state()
        diagonals.append(flat(fimprobe.estimate(model, loader, seed=seed, **CATEGORICAL).diagonal))
        assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(diagonals[0], diagonals[1]) and not torch.equal(diagonals[0], diagonals[2])
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], x) for n, x in model.state_dict().items())


def test_errors_of_layers_names_and_entries_are_reached():
    x, model = digits()[0], confident_mlp()
    f = fimprobe.estimate(model, x, each_layer=True, rel_error=0.15, **CATEGORICAL)
    assert f.reached and all(group.rel_error <= 0.15 for group in f.layers.values())
    f = fimprobe.estimate(model, x, rel_error={"4": 0.1, "0.*": 0.3}, **CATEGORICAL)
    assert f.reached and f.layers["4"].rel_error <= 0.1 and f.parameters["0.bias"].rel_error <= 0.3
    rows = torch.zeros(16, 64, dtype=torch.bool)
    rows[f.diagonal["0.bias"].argmax()] = True
    f = fimprobe.estimate(model, x, entries={"0.weight": rows}, rel_error=0.2, **CATEGORICAL)
    exact = fimprobe.estimate(model, x, draws="exact", rel_error=1e-9, **CATEGORICAL)
    estimated, true = (g.diagonal["0.weight"][rows] for g in (f, exact))
    assert f.reached and float((estimated - true).norm() / true.norm()) < 0.4


def test_the_beginning_of_sorted_data_has_no_known_error():
    """By their labels the first class alone is found, by F the classes after it."""
    x, y = digits()
    order = y.argsort(stable=True)
    images = x[order].split(32)
    labelled = zip(images, y[order].split(32), strict=True)
    for data, confidence, limit in ((labelled, 0.3, 160), (iter(images), 0.9, 512)):
        model = confident_mlp(confidence)
        f = fimprobe.estimate(model, data, rel_error=0.15, max_inputs=limit, **CATEGORICAL)
        assert f.metadata["inputs"] == limit and not f.reached
        assert f.rel_error is None and f.trace_error is None
        assert all(bool(x.isinf().all()) for x in f.std_error.values())
        assert any("no error is known" in note for note in f.metadata["notes"])
        assert f.ewc_penalty(model).std_error is None and f.mask().overlap is None
    mixed = zip(x.split(32), y.split(32), strict=True)
    f = fimprobe.estimate(confident_mlp(0.3), mixed, rel_error=0.15, **CATEGORICAL)
    assert f.reached and f.metadata["inputs"] < 500 and not f.metadata["notes"]
    f = fimprobe.estimate(confident_mlp(0.3), iter(x.split(32)), rel_error=0.15, **CATEGORICAL)
    assert "suppose that the data come in random order" in str(f)


# -- interruptions ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"input_sampling": "uniform", "rel_error": 0.01, "draws": 2},
                                     {"input_sampling": "trace", "rel_error": 0.15}])  # fmt: skip
def test_a_killed_estimate_continues_with_the_same_result(tmp_path, options):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    generator = random.Random(0)
    out, state, problem = tmp_path / "out", tmp_path / "state", tmp_path / "problem"
    estimate_worker.write_problem(problem)
    kills = 0
    for _ in range(20):
        args = (problem, out, state, options, 0.004)
        process = context.Process(target=estimate_worker.estimate_slowly, args=args)
        written = state.stat().st_mtime_ns if state.exists() else 0
        process.start()
        while process.is_alive() and kills < KILLS:
            process.join(0.01)
            if state.exists() and state.stat().st_mtime_ns != written:
                process.join(generator.uniform(0, 0.2))
                process.kill()
                kills += 1
                break
        process.join()
        if out.exists():
            break
    resumed = torch.load(out)
    estimate_worker.estimate_slowly(problem, tmp_path / "plain", None, options, 0.0)
    plain = torch.load(tmp_path / "plain")
    assert kills == KILLS
    assert resumed.keys() == plain.keys()
    for name, x in plain.items():
        assert torch.equal(x, resumed[name]) if isinstance(x, torch.Tensor) else x == resumed[name], (
            name
        )


def test_interruptions_at_any_batch_change_no_bit(tmp_path):
    x = digits()[0][:500]
    options = {"rel_error": 1e-4, "draws": 2, **CATEGORICAL}
    plain = fimprobe.estimate(confident_mlp(), list(x.split(40)), **options)

    class Interrupted(Exception):
        pass

    class Batches(list):
        """A list that fails at a chosen reading."""

        readings = 0

        def __getitem__(self, number):
            self.readings += 1
            if self.readings == self.fails_at:
                raise Interrupted
            return super().__getitem__(number)

    for fails_at in range(1, 13):
        batches = Batches(x.split(40))
        batches.fails_at = fails_at
        with pytest.raises(fimprobe.FimprobeError) as caught:
            fimprobe.estimate(confident_mlp(), batches, state=tmp_path / "s", **options)
        if fails_at > 1:
            assert caught.value.partial.metadata["inputs"] > 0
        batches.fails_at = None
        resumed = fimprobe.estimate(confident_mlp(), batches, state=tmp_path / "s", **options)
        assert torch.equal(flat(plain.diagonal), flat(resumed.diagonal)), fails_at
        assert torch.equal(flat(plain.std_error), flat(resumed.std_error))
        again = fimprobe.estimate(confident_mlp(), batches, state=tmp_path / "s", **options)
        assert torch.equal(flat(plain.diagonal), flat(again.diagonal))
        (tmp_path / "s").unlink()


def test_a_state_of_another_estimate_is_refused(tmp_path):
    x, path = digits()[0][:200], tmp_path / "s"
    fimprobe.estimate(confident_mlp(), x, state=path, **CATEGORICAL)
    with pytest.raises(fimprobe.FimprobeError, match="holds another one"):
        fimprobe.estimate(confident_mlp(), x, state=path, seed=1, **CATEGORICAL)
    with pytest.raises(fimprobe.FimprobeError, match="holds another one"):
        fimprobe.estimate(confident_mlp(0.9), x, state=path, **CATEGORICAL)
    path.write_bytes(b"damaged")
    with pytest.raises(fimprobe.FimprobeError, match="cannot be read"):
        fimprobe.estimate(confident_mlp(), x, state=path, **CATEGORICAL)


# -- several processes -----------------------------------------------------------------------


def test_two_processes_give_the_result_of_one(tmp_path, double):
    estimate_worker.write_problem(tmp_path / "problem")
    context = start_processes(estimate_worker.estimate_together, (2, free_port(), str(tmp_path)), 2)
    while not context.join(timeout=300):
        pass
    for name, data, options in estimate_worker.cases(digits()[0].double()):
        alone = fimprobe.estimate(confident_mlp().double(), data, **options)
        alone = estimate_worker.results(alone)
        for rank in range(2):
            assert (tmp_path / f"resumed {name} {rank}").read_text() == "True", name
            shared = torch.load(tmp_path / f"{name} {rank}")
            for key, x in alone.items():
                if isinstance(x, torch.Tensor):
                    scale = float(x.norm())
                    tolerance = 1e-10 if key.startswith("diagonal") else 1e-6
                    assert float((shared[key] - x).norm()) <= tolerance * scale, (name, key)
                else:
                    assert shared[key] == (pytest.approx(x, rel=1e-6) if key == "rel_error" else x), (
                        name,
                        key,
                    )
    assert "the model fails on batch 0" in (tmp_path / "error 0").read_text()
    assert "the model fails on batch 0" in (tmp_path / "error 1").read_text()


# -- bad input -------------------------------------------------------------------------------


def failing_loader():
    yield from digits()[0].split(256)[:4]
    raise OSError("the disk is gone")


BAD = {
    "nothing": (lambda x, y: [], {}, "at least one input, got none"),
    "empty batches": (lambda x, y: [x[:0]], {}, "at least one input, got none"),
    "labels": (lambda x, y: [y], {}, "the model fails on batch 0"),
    "a batch of three": (lambda x, y: [(x, x, y)], {}, "got a tuple of 3"),
    "unknown keys": (lambda x, y: [{"image": x}], {}, "got keys"),
    "a number": (lambda x, y: 3, {}, "an iterable of batches, got int"),
    "not finite": (lambda x, y: [x / 0], {}, "not finite"),
    "likelihood": (lambda x, y: x, {"likelihood": "auto"}, "`likelihood` must be named"),
    "draws": (lambda x, y: x, {"draws": 0}, "`draws` must be"),
    "rel_error": (lambda x, y: x, {"rel_error": -1}, "`rel_error` must be"),
    "name": (lambda x, y: x, {"rel_error": {"nope": 0.1}}, "must name parameters or layers"),
    "entries": (lambda x, y: x, {"entries": {"0.bias": torch.ones(3)}}, "`entries` must map"),
    "max_inputs": (lambda x, y: x, {"max_inputs": 1}, "`max_inputs` must be"),
    "max_seconds": (lambda x, y: x, {"max_seconds": 0}, "`max_seconds` must be"),
    "memory_mb": (lambda x, y: x, {"memory_mb": 0}, "`memory_mb` must be"),
    "input_sampling": (lambda x, y: x, {"input_sampling": "x"}, "`input_sampling` must be"),
    "drawing from a list": (lambda x, y: [x], {"input_sampling": "trace"}, "random access"),
    "drawing for a Gaussian": (
        lambda x, y: x,
        {"input_sampling": "trace", "likelihood": "gaussian"},
        "rare labels",
    ),
    "a function": (lambda x, y: x, {"inputs": 3}, "`inputs` must be a function"),
    "a mask": (lambda x, y: x, {"mask": lambda batch: batch}, "`mask` must return a boolean"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_one_sentence(name):
    data, options, message = BAD[name]
    x, y = digits()
    with pytest.raises(fimprobe.FimprobeError, match=message):
        fimprobe.estimate(confident_mlp(), data(x, y), **(CATEGORICAL | options))


def test_what_was_measured_before_an_error_is_kept():
    with pytest.raises(fimprobe.FimprobeError, match="the disk is gone") as caught:
        fimprobe.estimate(confident_mlp(), failing_loader(), rel_error=1e-3, **CATEGORICAL)
    partial = caught.value.partial
    assert partial.metadata["inputs"] == 1024 and not partial.reached and partial.trace > 0


def test_data_that_end_too_early_and_limits_are_reported():
    x = digits()[0]
    f = fimprobe.estimate(
        confident_mlp(), list(x[:300].split(30)), rel_error=1e-3, draws=1, **CATEGORICAL
    )
    assert f.metadata["end"] == "data" and not f.reached and "upper limit" in str(f)
    f = fimprobe.estimate(confident_mlp(), x, rel_error=1e-3, max_inputs=150, **CATEGORICAL)
    assert f.metadata["inputs"] == 150 and "`max_inputs`" in f.stopped
    f = fimprobe.estimate(
        confident_mlp(), x, rel_error=1e-5, draws=2, max_seconds=1e-6, **CATEGORICAL
    )
    assert f.metadata["inputs"] == 64 and "`max_seconds`" in f.stopped


def test_an_interruption_from_the_keyboard_returns_what_was_measured():
    def batches():
        yield from digits()[0].split(100)[:3]
        raise KeyboardInterrupt

    f = fimprobe.estimate(confident_mlp(), batches(), rel_error=1e-3, **CATEGORICAL)
    assert f.metadata["end"] == "interrupted" and f.metadata["inputs"] == 300


# -- families and models ---------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bernoulli", "gaussian", "poisson"])
def test_every_family_is_measured(family):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 2))
    x = digits()[0]
    exact = fimprobe.estimate(model, x, likelihood=family, draws="exact", rel_error=1e-9)
    f = fimprobe.estimate(model, x, likelihood=family, draws=2, rel_error=0.1)
    off = float((flat(f.diagonal) - flat(exact.diagonal)).norm() / flat(exact.diagonal).norm())
    assert f.reached and off < 2.5 * f.rel_error


def test_language_models_need_no_options():
    """Collated batches of a transformers model: family, positions and labels are known."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=12, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(1, 11, (64, 12))
    lengths = torch.randint(4, 13, (64,))
    batches = []
    for rows in torch.arange(64).split(8):
        longest = int(lengths[rows].max())
        attention = torch.arange(longest) < lengths[rows, None]
        ids = tokens[rows, :longest].where(attention, 0)
        labels = ids.where(attention, -100)
        data = {"input_ids": ids, "attention_mask": attention.long(), "labels": labels}
        batches.append(transformers.BatchEncoding(data))
    f = fimprobe.estimate(model, batches, rel_error=1e-9, draws=2)
    assert f.metadata["likelihood"].startswith("Categorical") and f.metadata["inputs"] == 64
    one = [{k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(8)]
    alone = fimprobe.estimate(model, one, rel_error=1e-9, draws=2)
    # the same labels whatever the batches: the padding changes only the rounding
    torch.testing.assert_close(flat(f.diagonal), flat(alone.diagonal), rtol=1e-3, atol=1e-6)


# -- what it is for --------------------------------------------------------------------------


def test_the_example_decides_better_than_what_is_usual(capsys):
    spec = importlib.util.spec_from_file_location("decisions", EXAMPLES / "fisher_decisions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--epochs", "30"])
    lines = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()]
    columns = [cell.strip() for cell in lines[0]]
    usual, plain, estimated = (
        dict(zip(columns, map(str.strip, line), strict=True)) for line in lines[2:]
    )
    assert float(usual["EWC penalty"]) < 0.1 and 0.7 < float(estimated["EWC penalty"]) < 1.3
    for name in ("error of F", "Laplace"):
        assert float(estimated[name]) < 0.5 * float(usual[name])
        assert float(estimated[name]) < float(plain[name])
    assert float(estimated["top 10 %"]) > max(float(usual["top 10 %"]), float(plain["top 10 %"]))


def test_the_progress_is_shown_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 0.0)
    fimprobe.estimate(confident_mlp(), digits()[0], input_sampling="uniform", **CATEGORICAL)
    shown = capsys.readouterr().err
    assert "inputs, error not known yet" in shown and "(target 10 %)" in shown
    fimprobe.estimate(confident_mlp(), digits()[0], progress=False, **CATEGORICAL)
    assert capsys.readouterr().err == ""
