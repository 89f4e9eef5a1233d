"""Audits of diagonals that were computed independently, each as common code does."""

import functools

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fimprobe
from tests.models.digits import confident_mlp, digits
from tests.models.small import Tagger
from tests.oracles.audited_diagonals import LabelGradients, batch_means_squared

SIZE, BATCH = 96, 16
OPTIONS = {"likelihood": "categorical", "progress": False}


@functools.cache
def gradients():
    x, y = digits()
    return LabelGradients(confident_mlp(0.9), x[:SIZE], y[:SIZE])


def batches():
    x, y = digits()
    return list(zip(x[:SIZE].split(BATCH), y[:SIZE].split(BATCH), strict=True))


def audited(vector, data=None, **options):
    theirs = gradients().named(vector)
    return fimprobe.audit(confident_mlp(0.9), data or batches(), theirs, **OPTIONS | options)


def of_inputs(labels):
    return gradients().at(labels).square()


def predicted():
    return gradients().p.argmax(1)


CANDIDATES = {
    "F, averaged over": lambda g: g.fisher,
    "F, summed over the 96 inputs, not averaged (N forgotten): divide it by 96": lambda g: (
        SIZE * g.fisher
    ),
    "F, divided by the 96 inputs twice": lambda g: g.fisher / SIZE,
    "each input with labels of the data, averaged": lambda g: of_inputs(g.y).mean(0),
    "each input with labels of the data, summed": lambda g: of_inputs(g.y).sum(0),
    "each input with labels of the data, divided by the number of batches of 16": lambda g: (
        of_inputs(g.y).sum(0) / (SIZE // BATCH)
    ),
    "each input with labels of the data weighted by their probability": lambda g: (
        g.p[g.rows, g.y, None] * of_inputs(g.y)
    ).mean(0),
    "each input with arg-max labels, averaged": lambda g: of_inputs(predicted()).mean(0),
    "each input with a sum over labels without random signs": lambda g: g.unsigned.square().mean(0),
    "labels of the data: batches of 16 as given, averaged over batches": lambda g: (
        batch_means_squared(g.at(g.y), BATCH).mean(0)
    ),
    "labels of the data: batches of 16 as given, summed over batches": lambda g: batch_means_squared(
        g.at(g.y), BATCH
    ).sum(0),
    "arg-max labels: batches of 16 as given, averaged": lambda g: batch_means_squared(
        g.at(predicted()), BATCH
    ).mean(0),
    "without random signs: batches of 16 as given, of gradients that are sums over the batch, "
    "divided by the number of inputs": lambda g: (
        BATCH**2 * batch_means_squared(g.unsigned, BATCH).sum(0) / SIZE
    ),
    "zero up to rounding": lambda g: 1e-20 * g.fisher,
    "times 0.37, which no usual convention explains": lambda g: 0.37 * g.fisher,
}


@pytest.mark.parametrize("expected", CANDIDATES)
def test_each_candidate_is_recognised(expected):
    result = audited(CANDIDATES[expected](gradients()))
    assert result.diagnosis is not None and expected in result.diagnosis, result.finding


def test_random_batches_are_recognised_with_their_size():
    g = gradients()
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(3))
    x, y = digits()
    loader = DataLoader(TensorDataset(x[:SIZE], y[:SIZE]), batch_size=10, shuffle=True)
    result = audited(batch_means_squared(g.at(g.y), 10, order).mean(0), loader)
    assert "batches with labels of the data" in result.finding
    # by functions of the entries that hardly vary
    assert not any(c.fits for c in result.candidates if c.labels == "arg-max labels"), result.finding
    (fit,) = [c for c in result.candidates if c.fits and c.scale_words == "averaged over batches"
              and c.labels == "labels of the data"]  # fmt: skip
    assert fit.batch_size == 10 and fit.batch_range[0] <= 10 <= fit.batch_range[1]
    assert 0.3 < fit.error / fit.noise_error < 3


def test_what_is_none_of_them_gets_no_diagnosis():
    result = audited(gradients().fisher.sqrt())
    assert result.diagnosis is None
    assert result.finding.startswith("No candidate fits within noise. The nearest: ")
    assert not any(c.fits for c in result.candidates)


def test_the_comparison_is_that_of_dense_vectors():
    g = gradients()
    t, f = of_inputs(g.y).mean(0), g.fisher
    result = audited(t)
    cosine = float(t @ f / t.norm() / f.norm())
    assert result.total.scale == pytest.approx(float(t.sum() / f.sum()), rel=1e-4)
    assert result.total.cosine == pytest.approx(cosine, rel=1e-4)
    assert result.total.error == pytest.approx((1 - cosine**2) ** 0.5, rel=1e-3)
    assert result.total.factor == pytest.approx(float(t @ f / (t @ t)), rel=1e-4)
    assert result.total.noise_error == 0 and result.total.noise_cosine == 1
    kept = round(0.1 * len(t))
    common = len({*t.topk(kept).indices.tolist()} & {*f.topk(kept).indices.tolist()})
    assert result.total.overlap == pytest.approx(common / kept, abs=0.02)
    layer = g.named(t)["4.weight"].flatten(), g.named(t)["4.bias"].flatten()
    truth = g.named(f)["4.weight"].flatten(), g.named(f)["4.bias"].flatten()
    ratio = float(torch.cat(layer).sum() / torch.cat(truth).sum())
    assert result.layers["4"].scale == pytest.approx(ratio, rel=1e-4)
    assert "top 10 %: how many of the largest 10 % of F's entries" in str(result)
    (row,) = (line for line in str(result).splitlines() if line.startswith("total "))
    assert row.split()[1:3] == [f"{result.total.scale:.3g}", f"{result.total.cosine:.3g}"]
    assert "labels of the data" in str(result)


def small(y=None):
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3), torch.randn(48, 4)
    theirs = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    return model, x if y is None else [(x, y)], theirs


def test_data_without_labels_or_with_others_keep_the_rest():
    for y, reason in (
        (None, "no pairs of inputs"),
        (torch.rand(48, 7), "labels must have the shape"),
    ):
        model, data, theirs = small(y)
        result = fimprobe.audit(model, data, theirs, **OPTIONS)
        assert result.total.error > 0 and result.candidates
        assert any(reason in note for note in result.notes)
        assert not any("labels of the data" in c.labels for c in result.candidates)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m, x, t: (m, [], t), "`data` must yield at least one input, got none"),
        (lambda m, x, t: (m, (b for b in [x]), t), "readable more than once for an audit"),
        (lambda m, x, t: (torch.nn.Linear(5, 3), x, t), r"'weight' is \(3, 4\) and the parameter"),
        (lambda m, x, t: (torch.nn.Sequential(m), x, t), "must be named as the model's"),
        (lambda m, x, t: (m, x[:, :3], t), "must yield inputs of the model"),
        (lambda m, x, t: (3, x, t), "`model` must be a torch.nn.Module"),
    ],
)
def test_bad_input_is_one_sentence_with_the_remedy(change, match):
    model, x, theirs = small()
    with pytest.raises(fimprobe.FimprobeError, match=match) as caught:
        fimprobe.audit(*change(model, x, theirs), **OPTIONS)
    assert "\n" not in str(caught.value)


def test_options_are_checked():
    model, x, theirs = small()
    for option, match in (
        ({"top": 0}, "`top` must be between"),
        ({"labels": 3}, "must be a function"),
    ):
        with pytest.raises(fimprobe.FimprobeError, match=match):
            fimprobe.audit(model, x, theirs, **OPTIONS, **option)


def test_it_changes_nothing():
    model, x, theirs = small()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state, model.training = torch.get_rng_state(), True
    fimprobe.audit(model, x, theirs, **OPTIONS)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    again = [fimprobe.audit(model, x, theirs, **OPTIONS).total for _ in range(2)]
    assert again[0] == again[1]


def test_a_mean_over_the_labels_of_a_sequence_is_recognised():
    torch.manual_seed(0)
    model = Tagger()
    data = [(torch.randint(11, (8, 6)), torch.randint(5, (8, 6))) for _ in range(5)]
    for _, y in data:
        y[:, 4:] = -100
    theirs = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in data:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        for name, p in model.named_parameters():
            theirs[name] += p.grad.square() / len(data)
    result = fimprobe.audit(model, data, theirs, mask=lambda batch: batch[1] != -100, **OPTIONS)
    assert (
        "batches of 8 as given, averaged over batches, of gradients averaged over the 4 labels"
        in (result.diagnosis)
    )


def test_regression_and_part_of_the_data():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 2), torch.randn(40, 4)
    y = torch.randn(40, 2)
    g = torch.einsum("bo,bi->boi", y - model(x).detach(), x)
    theirs = {"weight": g.square().mean(0), "bias": (y - model(x).detach()).square().mean(0)}
    result = fimprobe.audit(model, [(x, y)], theirs, likelihood="gaussian", progress=False)
    assert "each input with labels of the data, averaged over" in result.diagnosis
    fisher = fimprobe.estimate(model, x, likelihood="gaussian", draws="exact", rel_error=1e-9)
    part = fimprobe.audit(
        model, [(x, y)], fisher, likelihood="gaussian", max_inputs=30, progress=False
    )
    assert part.reference.metadata["inputs"] == 30
    assert part.total.noise_error > 0 and part.total.error < 3 * part.total.noise_error
