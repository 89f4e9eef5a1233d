"""The batch that is measured is the one whose gradient the optimizer uses."""

import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fimprobe
from tests.models.small import mlp
from tests.support.bit_identity import same

OPTIONS = {
    "schedule": {"every": 1},
    "draws": "exact",
    "batch": 64,
    "tensorboard": False,
    "bounds": False,
    "second_order": "off",
    "estimators": ["i1"],
}
KNOWN = pytest.mark.parametrize("known", [{}, {"likelihood": "categorical"}], ids=["auto", "given"])


def net():
    torch.manual_seed(0)
    return mlp(6, 8, 4)


def batch(size, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(size, 6, generator=generator)
    return x, torch.randint(4, (size,), generator=generator)


def loss_of(model, data):
    x, y = data
    return F.cross_entropy(model(x), y)


def trace(model, x):
    options = {"draws": "exact", "bounds": False, "second_order": "off", "estimators": ["i1"]}
    return fimprobe.measure(model, x, likelihood="categorical", **options).total.i1.trace


TRAIN, OTHER = batch(48, 1), batch(7, 2, scale=5.0)


class Loop:
    """A training whose steps are given as functions of (model, optimizer)."""

    def __init__(self, step, lr=0.1, optimizer=torch.optim.SGD, model=net):
        self.step, self.model = step, model()
        self.optimizer = optimizer(self.model.parameters(), lr)

    def run(self, steps=3, **options):
        """Reports, each with the trace that the training batch has at that step."""
        probe = fimprobe.attach(self.model, **{**OPTIONS, **options})
        truth = []
        for _ in range(steps):
            truth.append(trace(self.model, TRAIN[0]))
            self.step(self.model, self.optimizer)
        probe.detach()
        return probe, truth

    def train(self, steps=3):
        for _ in range(steps):
            self.step(self.model, self.optimizer)


def check(step, steps=3, known=None, **loop):
    """The training batch is measured at every step, and training is bit-identical."""
    watched = Loop(step, **loop)
    probe, truth = watched.run(steps, on_error="raise", **(known or {"likelihood": "categorical"}))
    assert [r.batch_size for r in probe.history] == [len(TRAIN[0])] * steps
    assert [r.total.i1.trace for r in probe.history] == pytest.approx(truth, rel=1e-5)
    plain = Loop(step, **loop)
    plain.train(steps)
    assert same(plain.model.state_dict(), watched.model.state_dict())


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


def tagger():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Tanh(), nn.Linear(8, 5))


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


# -- closures ------------------------------------------------------------------------------


class Sam(torch.optim.Optimizer):
    """Sharpness-aware: by gradients of an earlier backward, or of a first call of its closure."""

    def __init__(self, params, lr, first=False):
        super().__init__(params, {"lr": lr})
        self.base, self.first = torch.optim.SGD(self.param_groups, lr=lr), first

    @torch.no_grad()
    def step(self, closure):
        if self.first:
            with torch.enable_grad():
                closure()
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        old = [p.detach().clone() for p in params]
        for p in params:
            p.add_(p.grad * (0.5 / norm))
        with torch.enable_grad():
            closure()
        for p, o in zip(params, old, strict=True):
            p.copy_(o)
        self.base.step()


class FirstSam(Sam):
    def __init__(self, params, lr):
        super().__init__(params, lr, first=True)


class Blind(torch.optim.Optimizer):
    """Moves the parameters by what it remembers before it calls its closure."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            p.mul_(1.5)
        with torch.enable_grad():
            closure()
        for p in params:
            p.sub_(p.grad, alpha=self.defaults["lr"])


def closure_of(model, optimizer, data=TRAIN):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        return loss

    return closure


def backward_then_closure(model, optimizer):
    closure = closure_of(model, optimizer)
    closure()
    optimizer.step(closure)


def closure_alone(model, optimizer):
    optimizer.step(closure_of(model, optimizer))


def closure_with_a_metric(model, optimizer):
    closure = closure_of(model, optimizer)

    def with_metric():
        loss = closure()
        model(OTHER[0])
        return loss

    optimizer.step(with_metric)


def closure_by_keyword(model, optimizer):
    optimizer.step(closure=closure_of(model, optimizer))


def metric_then_closure(model, optimizer):
    model(OTHER[0])
    optimizer.step(closure_of(model, optimizer))


@KNOWN
@pytest.mark.parametrize(
    ("step", "optimizer"),
    [
        (backward_then_closure, Sam),
        (closure_alone, FirstSam),
        (closure_by_keyword, FirstSam),
        (closure_alone, torch.optim.LBFGS),
        (closure_with_a_metric, torch.optim.LBFGS),
        (metric_then_closure, torch.optim.LBFGS),
        (backward_then_closure, torch.optim.LBFGS),
        (closure_alone, torch.optim.SGD),
    ],
)
def test_a_closure_is_measured_at_the_parameters_before_the_step(step, optimizer, known):
    check(step, optimizer=optimizer, known=known)


def test_each_step_of_a_closure_counts_once():
    for step, optimizer in ((backward_then_closure, Sam), (closure_alone, torch.optim.LBFGS)):
        loop = Loop(step, optimizer=optimizer)
        probe, _ = loop.run(4, likelihood="categorical", schedule={"at": [2]})
        assert probe.steps == 4 and [r.step for r in probe.history] == [2]


def test_parameters_that_move_before_the_closure_are_reported(caplog):
    loop = Loop(closure_alone, optimizer=Blind)
    probe, _ = loop.run(3, likelihood="categorical")
    assert not probe.history and probe.steps == 3 and probe.active
    (message,) = [r.getMessage() for r in caplog.records]
    assert "the optimizer changed the parameters before it called its closure" in message
    plain = Loop(closure_alone, optimizer=Blind)
    plain.train(3)
    assert same(plain.model.state_dict(), loop.model.state_dict())


# -- outputs that are changed in place -----------------------------------------------------


def divide(h):
    return h.div_(4.0)


def assign_column(h):
    h[:, 0] = 0.0
    return h


def assign_row(h):
    h[3] = 1.0
    return h


def fill_where(h):
    return h.masked_fill_(h > 1, 1.0)


CHANGES = pytest.mark.parametrize(
    "change", [divide, assign_column, assign_row, fill_where], ids=lambda f: f.__name__
)


class Transposed(nn.Module):
    """Returns a view: an in-place operation on it replaces its node in the graph."""

    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        return self.inner(x).t().contiguous().t()


@CHANGES
@pytest.mark.parametrize("model", [net, Transposed], ids=["tensor", "view"])
def test_a_family_is_not_inferred_from_changed_outputs(change, model, caplog):
    def step(model, optimizer):
        optimizer.zero_grad()
        F.cross_entropy(change(model(TRAIN[0])), TRAIN[1]).backward()
        optimizer.step()

    loop = Loop(step, model=model)
    probe, _ = loop.run(3)
    assert not probe.history and probe.likelihood is None
    (message,) = [r.getMessage() for r in caplog.records]
    assert "changed in place before the loss" in message and "logits = logits / 2" in message
    plain = Loop(step, model=model)
    plain.train(3)
    assert same(plain.model.state_dict(), loop.model.state_dict())


@CHANGES
@pytest.mark.parametrize("model", [net, Transposed], ids=["tensor", "view"])
def test_with_a_given_family_the_returned_outputs_count(change, model):
    def step(model, optimizer):
        optimizer.zero_grad()
        F.cross_entropy(change(model(TRAIN[0])), TRAIN[1]).backward()
        optimizer.step()

    check(step, model=model, known={"likelihood": "categorical"})


def test_outputs_changed_after_the_backward_wait_for_another_batch(caplog):
    """The gradient is right, the values are lost: the next batch may leave them."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(model, **OPTIONS)
    for i in range(3):
        optimizer.zero_grad()
        h = model(TRAIN[0])
        F.cross_entropy(h, TRAIN[1]).backward()
        if i < 2:
            h.detach().zero_()
        optimizer.step()
    probe.detach()
    assert [r.step for r in probe.history] == [2] and not caplog.records


def test_labels_are_not_read_off_changed_outputs(caplog):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(
        model, **{**OPTIONS, "estimators": ["i1", "empirical"]}, likelihood="categorical"
    )
    F.cross_entropy(model(TRAIN[0]).div_(4), TRAIN[1]).backward()
    optimizer.step()
    probe.detach()
    assert probe.last.total.empirical is None and probe.last.total.i1 is not None
    (message,) = [r.getMessage() for r in caplog.records]
    assert "no empirical Fisher" in message and "changed in place" in message


def test_positions_that_were_not_seen_are_not_taken_for_all(caplog):
    """A view changed in place hides the gradient: which positions have a label is not known."""

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tagger()

        def forward(self, x):
            return self.inner(x).transpose(0, 1).contiguous().transpose(0, 1)

    model, tokens = Maps(), torch.randint(11, (16, 6))
    labels = torch.randint(5, (16, 6))
    labels[:, 3:] = -100
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(model, **OPTIONS)
    for i in range(2):
        optimizer.zero_grad()
        out = model(tokens)
        if i:
            out[0, 0, 0] = 0.0
        F.cross_entropy(out.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
    probe.detach()
    assert [r.step for r in probe.history] == [0]
    (message,) = [r.getMessage() for r in caplog.records]
    assert "positions that carry a label are not known" in message and "mask=" in message


# -- what the capture holds ----------------------------------------------------------------


def test_a_batch_that_no_backward_reached_is_not_measured(caplog):
    """The loss is that of a sub-module: the forward of the whole model was for a metric."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(model, **OPTIONS, likelihood="categorical")
    for _ in range(3):
        optimizer.zero_grad()
        h = TRAIN[0]
        for layer in model:
            h = layer(h)
        F.cross_entropy(h, TRAIN[1]).backward()
        model(OTHER[0])
        optimizer.step()
    probe.detach()
    assert not probe.history and probe.active
    (message,) = [r.getMessage() for r in caplog.records]
    assert "no backward pass reached" in message and "probe.step(inputs)" in message


class Opaque:
    def __init__(self, loss):
        self.loss = loss


class ReturnsAnObject(nn.Module):
    """What it returns hides its tensors; only the loss is inside."""

    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        return Opaque(self.inner(x))


def test_outputs_that_cannot_be_observed_are_measured_as_before():
    model = ReturnsAnObject()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(
        model, **OPTIONS, likelihood="categorical", output=lambda out: out.loss, on_error="raise"
    )
    right = trace(model.inner, TRAIN[0])
    F.cross_entropy(model(TRAIN[0]).loss, TRAIN[1]).backward()
    optimizer.step()
    probe.detach()
    assert probe.last.total.i1.trace == pytest.approx(right, rel=1e-5)


def test_batches_that_cannot_be_chosen_are_released():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(model, **OPTIONS, likelihood="categorical")
    inputs = []

    def fresh(size):
        x, y = batch(size, size)
        inputs.append(weakref.ref(x))
        return x, y

    def alive():
        gc.collect()
        return sum(x() is not None for x in inputs)

    for size in range(3, 9):  # accumulation: the newest whose backward is done
        loss_of(model, fresh(size)).backward()
        assert alive() == 1
    for size in range(9, 15):  # metrics: the newest, until another forward shows that it is over
        model(fresh(size)[0])
        assert alive() <= 2
    optimizer.step()
    assert probe.last.batch_size == 8
    assert alive() == 0
    probe.detach()


def test_a_kept_loss_keeps_no_batch():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(model, **OPTIONS, likelihood="categorical")
    x, y = batch(5, 1)
    x = x.clone()
    kept = F.cross_entropy(model(x * 1), y)
    captured = weakref.ref(probe._capture.last)
    kept.backward(retain_graph=True)
    optimizer.step()
    gc.collect()
    assert captured() is None and kept.grad_fn is not None
    kept.backward()  # a later backward of an old graph changes nothing
    probe.detach()


def test_only_measured_steps_have_hooks_on_the_outputs():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(model, **{**OPTIONS, "schedule": {"at": [1]}}, likelihood="categorical")
    hooks = []
    for _ in range(3):
        h = model(TRAIN[0])
        hooks.append(len(h._backward_hooks or {}))
        F.cross_entropy(h, TRAIN[1]).backward()
        optimizer.step()
    probe.detach()
    assert hooks == [0, 1, 0]


class ReturnsAParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.log_sigma = net(), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.inner(x), self.log_sigma


def test_no_hook_is_left_on_a_parameter_that_is_an_output():
    model = ReturnsAParameter()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(model, **OPTIONS, likelihood="categorical", on_error="raise")
    h, log_sigma = model(TRAIN[0])
    (F.cross_entropy(h, TRAIN[1]) + log_sigma.square()).backward()
    optimizer.step()
    probe.detach()
    assert len(probe.history) == 1
    assert all(not p._backward_hooks for p in model.parameters())


def test_outputs_can_be_pickled_without_a_warning():
    model = net()
    probe = fimprobe.attach(model, **OPTIONS)
    h = model(TRAIN[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pickle.loads(pickle.dumps(h.detach().requires_grad_())), h)
        h.retain_grad()
    loss_of(model, TRAIN).backward()
    probe.detach()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_is_measured_once(reentrant):
    def step(model, optimizer):
        optimizer.zero_grad()
        x = TRAIN[0].clone().requires_grad_()
        h = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        F.cross_entropy(h, TRAIN[1]).backward()
        optimizer.step()

    check(step, known={"likelihood": "categorical"})


def test_a_compiled_model_is_tied_to_its_backward():
    def step(model, optimizer):
        a_metric_after(model, optimizer)

    def compiled():
        return torch.compile(net(), backend="aot_eager")

    watched = Loop(step, model=compiled)
    probe, truth = watched.run(2, likelihood="categorical", on_error="raise")
    assert [r.batch_size for r in probe.history] == [48, 48]
    assert [r.total.i1.trace for r in probe.history] == pytest.approx(truth, rel=1e-5)


def test_functional_gradients_are_tied_too():
    model = net()
    probe = fimprobe.attach(model, **OPTIONS, likelihood="categorical", on_error="raise")
    parameters = dict(model.named_parameters())

    def loss(values):
        return F.cross_entropy(torch.func.functional_call(model, values, (TRAIN[0],)), TRAIN[1])

    torch.func.grad(loss)(parameters)
    model(OTHER[0])
    probe.step()
    assert probe.last.batch_size == 48
    probe.detach()
