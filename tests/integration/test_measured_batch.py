"""The batch that is measured is the one whose gradient the optimizer uses."""

import pytest
import torch
import torch.nn.functional as F

import fimprobe
from tests.support.measured_batch import (
    KNOWN,
    OPTIONS,
    OTHER,
    TRAIN,
    batch,
    check,
    loss_of,
    net,
    tagger,
    trace,
)


def backward(model, optimizer):
    optimizer.zero_grad()
    loss_of(model, TRAIN).backward()


def a_metric_after(model, optimizer):
    backward(model, optimizer)
    model(OTHER[0]).argmax(1)
    optimizer.step()


def a_metric_before(model, optimizer):
    model(OTHER[0]).argmax(1)
    backward(model, optimizer)
    optimizer.step()


def a_metric_between(model, optimizer):
    optimizer.zero_grad()
    loss = loss_of(model, TRAIN)
    model(OTHER[0]).argmax(1)
    loss.backward()
    optimizer.step()


def a_metric_whose_graph_lives_on(model, optimizer):
    backward(model, optimizer)
    model.kept = loss_of(model, OTHER)
    optimizer.step()
    del model.kept


def validation_without_gradients(model, optimizer):
    backward(model, optimizer)
    with torch.no_grad():
        model(OTHER[0])
    optimizer.step()


def validation_in_eval_mode(model, optimizer):
    backward(model, optimizer)
    model.eval()
    loss_of(model, OTHER)
    model.train()
    optimizer.step()


def gradients_of_other_inputs_after(model, optimizer):
    backward(model, optimizer)
    x = OTHER[0].clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(x), OTHER[1]), x)
    optimizer.step()


def gradients_of_other_inputs_by_backward(model, optimizer):
    backward(model, optimizer)
    x = OTHER[0].clone().requires_grad_()
    F.cross_entropy(model(x), OTHER[1]).backward(inputs=[x])
    optimizer.step()


def an_adversarial_search_before(model, optimizer):
    x = OTHER[0].clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(x), OTHER[1]), x)
    backward(model, optimizer)
    optimizer.step()


def gradients_set_by_hand(model, optimizer):
    parameters = list(model.parameters())
    for p, g in zip(parameters, torch.autograd.grad(loss_of(model, TRAIN), parameters), strict=True):
        p.grad = g
    model(OTHER[0])
    optimizer.step()


def accumulated_batches(model, optimizer):
    optimizer.zero_grad()
    for data in (OTHER, batch(5, 9), TRAIN):
        (loss_of(model, data) / 3).backward()
    optimizer.step()


def losses_that_are_added(model, optimizer):
    optimizer.zero_grad()
    (loss_of(model, OTHER) + loss_of(model, TRAIN)).backward()
    optimizer.step()


def a_forward_that_failed(model, optimizer):
    backward(model, optimizer)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5))
    optimizer.step()


STEPS = [
    a_metric_after,
    a_metric_before,
    a_metric_between,
    a_metric_whose_graph_lives_on,
    validation_without_gradients,
    validation_in_eval_mode,
    gradients_of_other_inputs_after,
    gradients_of_other_inputs_by_backward,
    an_adversarial_search_before,
    gradients_set_by_hand,
    accumulated_batches,
    losses_that_are_added,
    a_forward_that_failed,
]


@KNOWN
@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
def test_other_forwards_in_a_step_are_not_measured(step, known):
    check(step, known=known)


def test_a_gradient_penalty_leaves_the_family_and_the_batch():
    def step(model, optimizer):
        optimizer.zero_grad()
        x = TRAIN[0].clone().requires_grad_()
        h = model(x)
        (slope,) = torch.autograd.grad(h.sum(), x, create_graph=True)
        # a weight of zero: the loss gradient at the outputs is that of cross-entropy
        (F.cross_entropy(h, TRAIN[1]) + 0 * slope.square().sum()).backward()
        optimizer.step()

    check(step, known={"likelihood": "auto"})


def test_two_losses_of_one_forward_are_added():
    """The family is that of the sum: each half alone has a gradient at half of the outputs."""

    def step(model, optimizer):
        optimizer.zero_grad()
        h = model(TRAIN[0])
        F.cross_entropy(h[:24], TRAIN[1][:24], reduction="sum").backward(retain_graph=True)
        F.cross_entropy(h[24:], TRAIN[1][24:], reduction="sum").backward()
        optimizer.step()

    check(step, known={"likelihood": "auto"})


@pytest.mark.parametrize("estimators", [["i1"], ["i1", "empirical"]])
def test_the_same_loss_twice_through_a_kept_graph(estimators):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {**OPTIONS, "estimators": estimators, "on_error": "raise"}
    probe = fimprobe.attach(model, **options)
    right = trace(model, TRAIN[0])
    loss = loss_of(model, TRAIN)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    probe.detach()
    assert probe.last.total.i1.trace == pytest.approx(right, rel=1e-5)
    assert ("empirical" in estimators) == (probe.last.total.empirical is not None)


@pytest.mark.parametrize("pieces", [1, 2, 3, 6])
@pytest.mark.parametrize("estimators", [["i1"], ["i1", "empirical"]])
@pytest.mark.parametrize("known", [{}, {"likelihood": "categorical"}], ids=["auto", "given"])
def test_label_positions_of_all_backward_passes_are_united(pieces, estimators, known):
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(11, (16, 6), generator=generator)
    labels = torch.randint(5, (16, 6), generator=generator)
    labels[:, 5] = -100
    labels[3, :2] = -100
    model = tagger()
    mask = labels != -100
    right = fimprobe.measure(
        model, tokens, likelihood="categorical", draws="exact", mask=mask, bounds=False
    )
    if known and estimators == ["i1"]:  # nothing is read off the gradient
        right = fimprobe.measure(model, tokens, likelihood="categorical", draws="exact", bounds=False)
    probe = fimprobe.attach(model, **{**OPTIONS, "estimators": estimators}, **known, on_error="raise")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for _ in range(2):  # the family is inferred at the first step, positions only at the second
        optimizer.zero_grad()
        out, size = model(tokens), 6 // pieces
        for i in range(pieces):
            part = slice(i * size, (i + 1) * size)
            loss = F.cross_entropy(
                out[:, part].flatten(0, 1), labels[:, part].flatten(), reduction="sum"
            )
            loss.backward(retain_graph=i + 1 < pieces)
        optimizer.step()
        report = probe.last
        assert report.total.i1.trace == pytest.approx(right.total.i1.trace, rel=1e-5)
        if "empirical" in estimators:
            data = fimprobe.measure(
                model,
                tokens,
                likelihood="categorical",
                estimators=["empirical"],
                labels=labels,
                mask=mask,
                bounds=False,
            )
            assert report.total.empirical.trace == pytest.approx(data.total.empirical.trace, rel=1e-4)
    probe.detach()
