"""The plain-loop adapter: steps counted right, the right batch at the right parameters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fimprobe
from fimprobe import FimprobeError
from fimprobe.engines.problem import label_cotangents
from tests.models.small import mlp
from tests.support.loop import (
    EVERY,
    KNOWN,
    backward,
    data,
    equal,
    expected,
    sgd,
    train,
)
from tests.support.warnings import warnings_of


@pytest.mark.parametrize("more", [{}, {"estimators": ("i1", "i2"), "bounds": True}])
def test_a_plain_loop(more):
    net = mlp()
    probe = fimprobe.attach(net, EVERY, **{k: v if v is True else list(v) for k, v in more.items()})
    optimizer = sgd(net)
    for step in range(4):
        before = copy.deepcopy(net)
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()
        equal(probe.last, expected(before, data(step)[0], step, **more))
        assert probe.steps == len(probe.history) == step + 1
        assert (probe.last.total.i2 is not None) == bool(more)
        assert probe.last.error_of("i1") > 0 and probe.last.pairs_for("i1") > 100
        with pytest.raises(AssertionError):  # the comparison sees one optimizer step
            equal(probe.last, expected(net, data(step)[0], step, **more))
    assert probe.likelihood.name == "categorical" and "cross-entropy" in probe.decision
    probe.detach()


def test_schedule_counts_steps():
    net = mlp()
    with fimprobe.attach(net, KNOWN, schedule={"at": [1, 4]}) as probe:
        train(net, 6)
    assert probe.steps == 6 and [r.step for r in probe.history] == [1, 4]


def test_gradient_accumulation_counts_once():
    net = mlp()
    probe = fimprobe.attach(net, **KNOWN)
    optimizer = sgd(net)
    for step in range(3):
        before = copy.deepcopy(net)
        for micro in range(4):
            backward(net, 10 * step + micro)
        optimizer.step()
        optimizer.zero_grad()
        assert probe.steps == step + 1
        equal(probe.last, expected(before, data(10 * step + 3)[0], step))
    probe.detach()


def test_two_optimizers_count_once_and_a_stranger_never():
    net, stranger = mlp(), mlp()
    halves = [torch.optim.Adam(net[i].parameters()) for i in (0, 2)]
    other = sgd(stranger)
    with fimprobe.attach(net, **KNOWN) as probe:
        for step in range(3):
            backward(net, step)
            backward(stranger, step)
            other.step()
            assert probe.steps == step
            before = copy.deepcopy(net)
            for optimizer in halves:
                optimizer.step()
            assert probe.steps == len(probe.history) == step + 1
            equal(probe.last, expected(before, data(step)[0], step))
    with fimprobe.attach(net, optimizer=halves[1], **KNOWN) as probe:
        backward(net)
        halves[0].step()
        assert probe.steps == 0
        halves[1].step()
        assert probe.steps == 1
    with pytest.raises(FimprobeError, match="`optimizer` must hold parameters of the model, got SGD"):
        fimprobe.attach(net, optimizer=other, **KNOWN)


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("kind", ["lbfgs", "sgd"])
def test_closures(kind, how):
    net = mlp()
    plain = copy.deepcopy(net)
    ends = []
    for model in (net, plain):
        optimizer = sgd(model)
        if kind == "lbfgs":
            optimizer = torch.optim.LBFGS(
                model.parameters(), max_iter=5, line_search_fn="strong_wolfe"
            )
        probe = fimprobe.attach(model, **EVERY) if model is net else None
        losses, calls = [], []
        for step in range(3):

            def closure(step=step, model=model, optimizer=optimizer, calls=calls):
                calls.append(step)
                optimizer.zero_grad()
                return backward(model, step)

            before = copy.deepcopy(model)
            call = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
            losses.append(call.item())
            if probe is not None:
                assert probe.steps == len(probe.history) == step + 1
                equal(probe.last, expected(before, data(step)[0], step))
        assert (len(calls) > 6) == (kind == "lbfgs")
        ends.append((losses, len(calls)))
    assert ends[0] == ends[1]
    for mine, its in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skips_is_not_counted(fused):
    net = mlp()
    optimizer, scaler = sgd(net, fused=fused), torch.amp.GradScaler("cpu", init_scale=4.0)
    with fimprobe.attach(net, **KNOWN) as probe:
        for step, good in enumerate([True, False, True]):
            optimizer.zero_grad()
            x, y = data(step)
            loss = F.cross_entropy(net(x), y) * (1.0 if good else float("inf"))
            before = copy.deepcopy(net)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            changed = not torch.equal(net[0].weight, before[0].weight)
            assert changed == good and probe.steps == len(probe.history) == [1, 1, 2][step]
            if good:
                equal(probe.last, expected(before, x, probe.steps - 1))


@pytest.mark.parametrize("likelihood", ["auto", "categorical"])
def test_autocast(likelihood):
    net = mlp()
    optimizer = sgd(net)
    with fimprobe.attach(net, {**EVERY, "likelihood": likelihood}) as probe:
        for step in range(2):
            x, y = data(step, count=32)
            before = copy.deepcopy(net)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = net(x)
                assert out.dtype == torch.bfloat16
                F.cross_entropy(out, y).backward()
                optimizer.step()  # the measurement itself is made in float32
            equal(probe.last, expected(before, x, step))
    assert probe.likelihood.name == "categorical"


def test_evaluation_never_probes(caplog):
    net = mlp()
    optimizer = sgd(net)
    with fimprobe.attach(net, **KNOWN) as probe:
        train(net, 1, optimizer)
        for training in (False, True):
            net.train(training)
            with torch.no_grad():
                net(data(7)[0])
            optimizer.step()
        net.eval()
        backward(net, 7)
        optimizer.step()
        net.train()
        assert probe.steps == len(probe.history) == 1
        before = copy.deepcopy(net)
        backward(net, 1)
        with torch.no_grad():  # between the batch and its step
            net.eval()(data(7)[0])
            net.train()(data(7)[0])
        optimizer.step()
        equal(probe.last, expected(before, data(1)[0], 1))
    assert not warnings_of(caplog)


def test_training_in_eval_mode_is_told_once(caplog):
    net = mlp().eval()
    with fimprobe.attach(net, **KNOWN) as probe:
        train(net, 2)
        assert not warnings_of(caplog)
        train(net, 5)
        (line,) = warnings_of(caplog)
        assert "ran in eval mode; call model.train()" in line
        assert probe.steps == 0 and not probe.history
        report = probe.step(data()[0])
        equal(report, expected(net, data()[0], 0))
    assert probe.step(data()[0]) is None


def test_manual_steps():
    net = mlp()
    with fimprobe.attach(net, {**KNOWN, "schedule": {"at": [100]}}) as probe:
        for inputs in (data()[0], (data()[0],), {"input": data()[0]}):
            equal(probe.step(inputs), expected(net, data()[0], probe.steps - 1))
        assert probe.steps == 3 and probe.step() is None
        backward(net)
        assert probe.step() is None and probe.steps == 4


@pytest.mark.parametrize("sampling", ["size_biased", "model"])
@pytest.mark.parametrize("draws", [3, "exact"])
def test_labels_do_not_depend_on_memory(draws, sampling):
    reports = []
    for memory_mb in (512, 0.05):
        torch.manual_seed(0)
        net = mlp()
        options = {**KNOWN, "memory_mb": memory_mb, "draws": draws, "batch": 200}
        with fimprobe.attach(net, options, label_sampling=sampling) as probe:
            optimizer = sgd(net)
            for step in range(2):
                x, y = data(step, count=200)
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
        reports.append(probe.history)
    for one, other in zip(*reports, strict=True):
        equal(one, other)


class Sure(nn.Module):
    """Seven labels for each input, of which the model's own are always class 0."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 5)
        with torch.no_grad():
            self.head.bias.copy_(torch.tensor([16.0, 0, 0, 0, 0]))

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens)))


def test_size_biased_labels_are_the_same_in_any_chunks(monkeypatch):
    """Every label and its weight, of a model so sure that labels from it would all be one class."""
    make, calls = label_cotangents.make_sampler, []

    def made(family, outputs, mask=None):
        sampler = make(family, outputs, mask)
        draw = sampler.draw

        def drawn(uniforms, positions):
            found = draw(uniforms, positions)
            calls.append((uniforms, positions, mask, found))
            return found

        sampler.draw = drawn
        return sampler

    monkeypatch.setattr(label_cotangents, "make_sampler", made)
    net, tokens = Sure(), torch.randint(11, (48, 7), generator=torch.Generator().manual_seed(1))
    keep = (torch.arange(7) < 7 - torch.arange(48)[:, None] % 5)[torch.randperm(48)]
    labels, reports = [], []
    for memory_mb in (512, 0.03):
        calls.clear()
        options = {**KNOWN, "memory_mb": memory_mb, "draws": 3, "batch": 48}
        with fimprobe.attach(net, options, mask=lambda args, kwargs: keep) as probe:
            reports.append(probe.step(tokens))
        found, sizes = {}, set()
        for uniforms, positions, mask, drawn_ones in calls:
            sizes.add(len(uniforms))
            given = torch.cat([uniforms.flatten(1), positions.unsqueeze(1)], 1)
            label = drawn_ones.scores.argmax(-1).masked_fill(~mask, -1)
            rows = (given.tolist(), label.tolist(), drawn_ones.inverse_weights.tolist())
            for key, row, inverse in zip(*rows, strict=True):
                assert found.setdefault(tuple(key), (row, inverse))[0] == row
        labels.append((found, sizes))
    (whole, one_size), (parts, many) = labels
    assert max(one_size) == 48 > max(many)  # they were taken in chunks, and in one
    assert whole.keys() == parts.keys() and len(whole) == 3 * 48
    for key, (row, inverse) in whole.items():
        assert parts[key][0] == row and parts[key][1] == pytest.approx(inverse, rel=1e-5)
        assert sum(label > 0 for label in row) == 1  # the one that is drawn where its score is large
    equal(*reports)


def test_detach_is_idempotent_and_with_detaches_on_an_error():
    net = mlp()
    with pytest.raises(KeyError), fimprobe.attach(net, **KNOWN) as probe:
        train(net, 1)
        raise KeyError
    assert probe.detached and not net._forward_pre_hooks and not net._forward_hooks
    probe.detach()
    with fimprobe.attach(net, **KNOWN) as second:
        probe.detach()  # not the second one
        train(net, 2)
    assert probe.steps == 1 and second.steps == 2


def test_a_batch_changed_in_place_is_told(caplog):
    net = mlp()
    x, y = data()
    with fimprobe.attach(net, {**KNOWN, "on_error": "warn"}) as probe:
        optimizer = sgd(net)
        F.cross_entropy(net(x), y).backward()
        x.zero_()
        optimizer.step()
        train(net, 1, optimizer)
    assert [r.step for r in probe.history] == [1]
    assert len(warnings_of(caplog)) == 1 and "changed in place" in warnings_of(caplog)[0]
