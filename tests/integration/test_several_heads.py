"""Losses that read several outputs of a model: what is measured, and what is stated."""

import copy
import itertools
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fimprobe
from fimprobe.likelihoods import Categorical, Gaussian, Joint
from tests.support.bit_identity import same
from tests.support.warnings import warnings_of

EXACT = {
    "schedule": {"every": 1},
    "tensorboard": False,
    "draws": "exact",
    "on_error": "raise",
    "bounds": False,
    "estimators": ["i1"],
}
Pair = namedtuple("Pair", "logits aux")


class Heads(nn.Module):
    """A trunk with two classifiers of three classes and a regression."""

    def __init__(self, returned):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)
        self.value, self.returned = nn.Linear(4, 1), returned

    def forward(self, x):
        return self.returned(self, self.trunk(x).tanh())


def batch(size=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=generator)


def model_of(returned):
    torch.manual_seed(0)
    return Heads(returned).double()


def run(model, loss, *, probed=True, steps=1, lr=0.0, **options):
    x, y = batch()
    probe = fimprobe.attach(model, **{**EXACT, **options}) if probed else None
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    if probe is not None:
        probe.detach()
    return probe


def enumerated(model, heads, x):
    """diag F of every parameter: the labels of all heads enumerated together, sample by sample."""
    parameters = dict(model.named_parameters())
    fisher = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in x:
        log_p = [h.log_softmax(-1)[0] for h in heads(model(row[None]))]
        for labels in itertools.product(*[range(len(p)) for p in log_p]):
            total = sum(p[y] for p, y in zip(log_p, labels, strict=True))
            gradients = torch.autograd.grad(
                total, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for name, g in zip(parameters, gradients, strict=True):
                if g is not None:
                    fisher[name] += float(total.detach().exp()) * g.square() / len(x)
    return fisher


def both(o, y):
    return F.cross_entropy(o[0], y) + F.cross_entropy(o[1], (y + 1) % 3)


KINDS = {
    "tuple": (lambda s, h: (s.a(h), s.b(h)), both, lambda o: o),
    "list": (lambda s, h: [s.a(h), s.b(h)], both, lambda o: o),
    "named tuple": (lambda s, h: Pair(s.a(h), s.b(h)), both, lambda o: o),
    "mapping": (
        lambda s, h: {"task": s.a(h), "more": {"task": s.b(h)}},
        lambda o, y: F.cross_entropy(o["task"], y) + F.cross_entropy(o["more"]["task"], y),
        lambda o: (o["task"], o["more"]["task"]),
    ),
    "two losses, two backward passes": (
        lambda s, h: (s.a(h), s.b(h)),
        lambda o, y: (
            F.cross_entropy(o[0], y).backward(retain_graph=True),
            F.cross_entropy(o[1], y),
        )[1],
        lambda o: o,
    ),
    "other outputs that are not read": (
        lambda s, h: (h, s.a(h), s.value(h), s.b(h)),
        lambda o, y: F.cross_entropy(o[1], y) + F.cross_entropy(o[3], y),
        lambda o: (o[1], o[3]),
    ),
    "logits and what is computed from them": (
        lambda s, h: (lambda a, b: {"a": a, "loss": a.logsumexp(1), "b": b, "p": b.softmax(1)})(
            s.a(h), s.b(h)
        ),
        lambda o, y: (o["loss"] - o["a"][range(len(y)), y]).mean() + F.nll_loss(o["p"].log(), y),
        lambda o: (o["a"], o["b"]),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_joint_likelihood_is_measured(name, caplog):
    returned, loss, heads = KINDS[name]
    model = model_of(returned)
    probe = run(model, loss, steps=2)
    assert isinstance(probe.likelihood, Joint) and not warnings_of(caplog)
    want = enumerated(model, heads, batch()[0])
    for report in probe.history:
        assert report.likelihood.count("categorical") == 2 and not report.notes
        for parameter, fisher in want.items():
            if parameter.startswith("value"):
                words = "left out: the measured outputs do not depend on it"
                assert report.coverage[parameter] == words
            else:
                trace = report.parameters[parameter].i1.trace
                assert trace == pytest.approx(float(fisher.sum()), rel=1e-9)


@pytest.mark.parametrize("name", ["tuple", "mapping"])
def test_training_stays_bit_identical(name):
    returned, loss, _ = KINDS[name]
    model = model_of(returned)
    plain = copy.deepcopy(model)
    run(model, loss, steps=3, lr=0.1, draws=2, estimators=["i1", "i2", "empirical"], bounds=True)
    run(plain, loss, steps=3, lr=0.1, probed=False)
    assert same(model.state_dict(), plain.state_dict())


def test_only_one_of_several_outputs_is_read(caplog):
    model = model_of(lambda s, h: (h, s.a(h), s.b(h)))
    probe = run(model, lambda o, y: F.cross_entropy(o[2], y))
    assert probe.likelihood == Categorical() and not warnings_of(caplog)
    want = enumerated(model, lambda o: o[2:], batch()[0])
    assert probe.last.total.i1.trace == pytest.approx(
        float(sum(f.sum() for f in want.values())), rel=1e-9
    )
    # an auxiliary loss of weight zero is no loss
    probe = run(model, lambda o, y: F.cross_entropy(o[2], y) + 0 * F.cross_entropy(o[1], y))
    assert probe.likelihood == Categorical() and not probe.last.notes


def test_weights_of_the_loss_are_stated(caplog):
    model = model_of(lambda s, h: Pair(s.a(h), s.b(h)))
    probe = run(model, lambda o, y: F.cross_entropy(o[0], y) + 0.3 * F.cross_entropy(o[1], y))
    (line,) = warnings_of(caplog)
    assert "'logits' 1, 'aux' 0.3" in line and "counts every label once" in line
    assert any("'aux' 0.3" in note for note in probe.last.notes)
    assert any("'aux' 0.3" in sentence for sentence in probe.last.advice)
    caplog.clear()
    probe = run(model, lambda o, y: 5 * both(o, y))
    assert not warnings_of(caplog) and not probe.last.notes


def test_an_auxiliary_head_that_exists_in_training_only():
    def returned(s, h):
        return Pair(s.a(h), s.b(h)) if s.training else s.a(h)

    model = model_of(returned)
    probe = run(model, both)
    want = enumerated(model.train(), lambda o: o, batch()[0])
    assert probe.last.parameters["trunk.weight"].i1.trace == pytest.approx(
        float(want["trunk.weight"].sum()), rel=1e-9
    )
    assert any("in training mode" in note for note in probe.last.notes)


def test_an_auxiliary_head_behind_dropout(caplog):
    def returned(s, h):
        return Pair(s.a(h), s.b(F.dropout(h, 0.5, s.training))) if s.training else s.a(h)

    probe = run(model_of(returned), both, on_error="warn")
    assert probe.last is None  # training mode draws random numbers
    (line,) = warnings_of(caplog)
    assert "it returned a tensor" in line and "in eval mode, too" in line


def test_a_regression_beside_a_classifier_is_left_out_and_said(caplog):
    model = model_of(lambda s, h: {"logits": s.a(h), "value": 9 * s.value(h)})

    def loss(o, y):
        return F.cross_entropy(o["logits"], y) + F.mse_loss(o["value"][:, 0], y.double())

    probe = run(model, loss, steps=2)
    (line,) = warnings_of(caplog)
    assert "'value'" in line and "left out" in line and "{'logits': ..., 'value': ...}" in line
    assert probe.likelihood == Categorical()
    for report in probe.history:
        assert line.removeprefix("fimprobe: ") in [*report.notes, *report.advice]
        assert report.coverage["value.weight"].startswith("left out: the measured outputs")
    caplog.clear()
    families = {"logits": "categorical", "value": Gaussian(sigma=2.0)}
    probe = run(model, loss, likelihood=families)
    assert not warnings_of(caplog) and not probe.last.notes
    x, _ = batch()
    h = model.trunk(x).tanh()
    want = 81 * (h.detach().square().sum(1).mean() + 1) / 4  # (∂value/∂w)²/σ² with ∂value = 9 (h, 1)
    parts = [probe.last.parameters[f"value.{n}"].i1.trace for n in ("weight", "bias")]
    assert sum(parts) == pytest.approx(float(want), rel=1e-9)


def test_a_given_family_of_one_head_states_the_other(caplog):
    model = model_of(KINDS["tuple"][0])
    probe = run(model, both, steps=2, likelihood="categorical")
    (line,) = warnings_of(caplog)
    assert "'1'" in line and "{'0': ..., '1': ...}" in line
    assert all(any("left out" in note for note in r.notes) for r in probe.history)
    caplog.clear()
    probe = run(model, both, likelihood="categorical", output=lambda o: o[0])  # a choice
    assert not warnings_of(caplog) and not probe.last.notes


def test_a_loss_that_reads_another_output_later_is_noticed(caplog):
    model = model_of(KINDS["tuple"][0])
    x, y = batch()
    probe = fimprobe.attach(model, **EXACT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for weight in (0.0, 0.0, 1.0):
        optimizer.zero_grad()
        out = model(x)
        (F.cross_entropy(out[0], y) + weight * F.cross_entropy(out[1], y)).backward()
        optimizer.step()
    probe.detach()
    assert [bool(report.notes) for report in probe.history] == [False, False, True]
    (line,) = warnings_of(caplog)
    assert "reads other outputs of the model, '1'" in line


def test_samples_without_a_label_at_one_head_are_masked():
    model = model_of(KINDS["tuple"][0])
    x, y = batch()
    unlabelled = torch.where(torch.arange(len(y)) % 2 == 0, y, -100)
    options = {**EXACT, "estimators": ["i1", "empirical"]}
    probe = fimprobe.attach(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        out = model(x)
        loss = F.cross_entropy(out[0], y, reduction="sum")
        loss = loss + F.cross_entropy(out[1], unlabelled, reduction="sum")
        loss.backward()
        optimizer.step()
    probe.detach()
    first = enumerated(model, lambda o: o[:1], x)["trunk.weight"].sum()
    second = enumerated(model, lambda o: o[1:], x[::2])["trunk.weight"].sum() / 2
    gradients = []
    for row, a, b in zip(x, y, unlabelled, strict=True):
        out = model(row[None])
        loss = F.cross_entropy(out[0], a[None], reduction="sum")
        loss = loss + F.cross_entropy(out[1], b[None], reduction="sum")
        (g,) = torch.autograd.grad(loss, model.trunk.weight)
        gradients.append(g.square().sum())
    for report in probe.history:
        group = report.parameters["trunk.weight"]
        assert group.i1.trace == pytest.approx(float(first + second), rel=1e-9)
        assert group.empirical.trace == pytest.approx(float(torch.stack(gradients).mean()), rel=1e-9)


def test_a_batch_of_one_task_measures_its_head():
    model = model_of(KINDS["tuple"][0])
    x, y = batch()
    probe = fimprobe.attach(model, likelihood=["categorical", "categorical"], **EXACT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for task in (0, 1):
        optimizer.zero_grad()
        F.cross_entropy(model(x)[task], y).backward()
        optimizer.step()
    probe.detach()
    for task, report in enumerate(probe.history):
        want = enumerated(model, lambda o, task=task: o[task : task + 1], x)["trunk.weight"].sum()
        assert report.parameters["trunk.weight"].i1.trace == pytest.approx(float(want), rel=1e-9)


def test_losses_of_unknown_family_at_all_outputs_name_them(caplog):
    model = model_of(lambda s, h: {"a": 9 * s.a(h), "b": 9 * s.b(h)})

    def loss(o, y):
        return sum(F.smooth_l1_loss(v, v.detach().sin()) for v in o.values())

    with pytest.raises(fimprobe.FimprobeError, match="reads several outputs.*'a'.*'b'.*mapping"):
        run(model, loss, steps=25)
