"""Measuring never changes the user's model, and the model that is measured is the user's own.

Each model does something that a careless copy misses. Three things hold for all of them: the model is as
it was after a measurement, training is bit-identical with the probe, and the trace is that of single
samples run through a fresh model by plain autograd, all labels enumerated, in float64.
"""

import functools
import threading
import weakref
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import fimprobe
from fimprobe.engines.tracing.plan import Plan
from tests.models.cases import Lambda


def layers():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def with_weight_norm():
    model = layers()
    parametrizations.weight_norm(model[0])
    return model


def with_spectral_norm():
    model = layers()
    parametrizations.spectral_norm(model[0])
    return model


def with_pruning():
    model = layers()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return model


def with_batch_norm():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, momentum=0.3), nn.Linear(5, 3))


def counting_calls():
    def forward(self, x):
        self.calls += 1
        self.history.append(self.calls)
        return self.net(x)

    return Lambda(forward, net=layers(), calls=0, history=[])


def averaging_inputs():
    def forward(self, x):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.net(x)

    model = Lambda(forward, net=layers())
    model.register_buffer("mean", torch.zeros(4))
    return model


def shrinking_a_scale():
    def forward(self, x):
        self.scale.data.mul_(0.9)
        return self.net(x) * self.scale

    return Lambda(forward, net=layers(), scale=nn.Parameter(torch.ones(3)))


def normalising_its_weight():
    def forward(self, x):
        weight = self.net[0].weight.data
        weight.div_(weight.norm(dim=1, keepdim=True))
        return self.net(x)

    return Lambda(forward, net=layers())


def overwriting_its_input():
    def forward(self, x):
        x.sub_(0.5).mul_(2.0)
        return self.net(x)

    return Lambda(forward, net=layers())


class WeightAsProperty(nn.Module):
    def __init__(self):
        super().__init__()
        self.raw, self.head = nn.Parameter(torch.randn(5, 4)), nn.Linear(5, 3)

    @property
    def weight(self):
        return self.raw / self.raw.norm()

    def forward(self, x):
        return self.head(F.linear(x, self.weight).tanh())


def with_baggage():
    parts = {
        "lock": threading.Lock(),
        "local": threading.local(),
        "stream": torch.Generator().manual_seed(3),
        "iterator": (i for i in range(3)),
        "buffer": deque((torch.zeros(2), i) for i in range(3000)),
        "module": functools,
        "thread": threading.Thread(target=print),
    }

    def forward(self, x):
        with self.lock:
            return self.net(x)

    return Lambda(forward, net=layers(), **parts)


class WithSlots(nn.Module):
    __slots__ = ("factor",)

    def __init__(self):
        super().__init__()
        self.net, self.factor = layers(), 3.0

    def forward(self, x):
        return self.net(x) * self.factor


def patched_by_a_partial():
    def scaled(forward, factor, x):
        return forward(x) * factor

    model = layers()
    model[2].forward = functools.partial(scaled, model[2].forward, 2.0)
    return model


def patched_through_a_global():
    model = layers()
    global patched_layer
    patched_layer = model[0]
    model[0].forward = lambda x: F.linear(x, patched_layer.weight, patched_layer.bias) * 2
    return model


def with_hooks_that_take_keywords():
    model = layers()
    model[0].register_forward_hook(lambda m, args, kwargs, out: out * 2, with_kwargs=True)
    model[2].register_forward_pre_hook(lambda m, a, k: ((a[0] / 3,), k), with_kwargs=True)
    return model


class Recorder:
    def __init__(self):
        self.outputs, self.factor = [], 2.0

    def __call__(self, module, args, out):
        self.outputs.append(out)
        return out * self.factor

    def method(self, module, args, out):
        return self(module, args, out)


def with_hooks_of_another_object():
    model, recorder = layers(), Recorder()
    model[0].register_forward_hook(recorder)
    model[1].register_forward_hook(recorder.method)
    model.recorder = recorder
    return model


def with_backward_hooks():
    model = layers()
    model.counts = []
    counts = model.counts
    model[0].register_full_backward_hook(lambda *a: counts.append(1))
    model[2].register_full_backward_pre_hook(lambda *a: counts.append(2))
    return model


class Unwilling(nn.Module):
    """A module that gives itself as its copy."""

    def __init__(self):
        super().__init__()
        self.lin, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        return self.drop(self.norm(self.lin(x))).tanh()


class SwapsInEvaluation(nn.Module):
    """Keeps other weights for evaluation and swaps them in."""

    def __init__(self):
        super().__init__()
        self.net, self.other = layers(), [torch.ones(5, 4)]

    def train(self, mode=True):
        if mode != self.training:
            with torch.no_grad():
                kept = self.net[0].weight.clone()
                self.net[0].weight.copy_(self.other[0])
                self.other[0] = kept
        return super().train(mode)

    def forward(self, x):
        return self.net(x)


def with_an_option_called_inplace():
    def forward(self, x):
        h = self.net(x)
        return h * 2 if self.inplace else h

    return Lambda(forward, net=layers(), inplace=True)


def with_a_table_of_modules():
    def forward(self, x):
        return self.net(x) * self.factors[self.net]

    model = Lambda(forward, net=layers(), factors=weakref.WeakKeyDictionary())
    model.factors[model.net] = 2.0
    return model


def with_a_weak_reference():
    def forward(self, x):
        return self.net(x) * self.parent().scale

    child = Lambda(forward, net=layers())
    model = Lambda(lambda self, x: self.child(x), child=child, scale=nn.Parameter(torch.ones(3)))
    child.parent = weakref.ref(model)
    return model


def with_views_of_its_weight():
    def forward(self, x):
        return self.head(torch.cat([F.linear(x, w) for w in self.rows["rows"]], -1).tanh())

    model = Lambda(forward, weight=nn.Parameter(torch.randn(5, 4)), head=nn.Linear(5, 3))
    model.rows = {"rows": (model.weight[:2], model.weight[2:])}
    return model


def with_a_detached_view():
    def forward(self, x):
        return self.net(x) + self.net[0].bias.sum() * 0 + self.shared.sum()

    model = Lambda(forward, net=layers())
    model.shared = model.net[0].weight.detach()[0]
    return model


def keeping_its_features():
    def forward(self, x):
        self.features = self.net[0](x)
        self.last = [self.features.exp()]
        return self.net[2](self.features.tanh())

    return Lambda(forward, net=layers())


def returning_probabilities_in_evaluation():
    def forward(self, x):
        h = self.net(x)
        return h if self.training else h.softmax(-1)

    return Lambda(forward, net=layers())


def detached_in_evaluation():
    def forward(self, x):
        h = self.net[0](x)
        return self.net[2]((h if self.training else h.detach()).tanh())

    return Lambda(forward, net=layers())


def with_functional_dropout():
    return Lambda(lambda self, x: F.dropout(self.net(x), 0.5, self.training), net=layers())


def rescaled_in_evaluation():
    def forward(self, x):
        if not self.training and not self.rescaled:
            with torch.no_grad():
                self.net[2].weight.div_(2)
                self.net[2].bias.div_(2)
            self.rescaled = True
        return self.net(x) * (1 if self.training else 2)

    return Lambda(forward, net=layers(), rescaled=False)


def replacing_data():
    def forward(self, x):
        self.net[0].to(x.dtype)
        self.scale.data = self.scale.data.clone()
        return self.net(x) * self.scale

    return Lambda(forward, net=layers(), scale=nn.Parameter(torch.ones(3)))


TRAINED_MODE = {returning_probabilities_in_evaluation, detached_in_evaluation, rescaled_in_evaluation}
"""Models whose training mode is measured."""

MODELS = [
    with_weight_norm, with_spectral_norm, with_pruning, with_batch_norm, counting_calls,
    averaging_inputs, shrinking_a_scale, normalising_its_weight, overwriting_its_input,
    WeightAsProperty, with_baggage, WithSlots, patched_by_a_partial, patched_through_a_global,
    with_hooks_that_take_keywords, with_hooks_of_another_object, with_backward_hooks,
    lambda: nn.Sequential(Unwilling(), nn.Linear(4, 3)), SwapsInEvaluation,
    with_an_option_called_inplace, with_a_table_of_modules, with_a_weak_reference,
    with_views_of_its_weight, with_a_detached_view, keeping_its_features,
    returning_probabilities_in_evaluation, detached_in_evaluation, with_functional_dropout,
    rescaled_in_evaluation, replacing_data,
]  # fmt: skip


def build(make):
    torch.manual_seed(0)
    return make()


def contents(value, depth=3):
    """What an attribute holds, to be compared with ``==``."""
    if isinstance(value, torch.Tensor):
        return (value.data_ptr(), value.detach().clone().numpy().tobytes(), value.requires_grad)
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, (list, tuple, set, deque)) and len(value) < 100:
        return [contents(x, depth - 1) for x in value] if depth else len(value)
    if isinstance(value, dict):
        return [(str(k), contents(x, depth - 1)) for k, x in value.items()] if depth else len(value)
    if isinstance(value, Recorder):
        return contents(vars(value))
    return id(value)


def state_of(model):
    """Everything that the model's modules hold."""
    return {path: contents(module.__dict__) for path, module in model.named_modules()}


def oracle_trace(make, x):
    """The trace of F, by single samples and all labels of each, through fresh models."""
    total = 0.0
    for sample in x:
        model = build(make)
        for module in model.modules():
            noisy = isinstance(module, (nn.Dropout, nn.BatchNorm1d)) or type(
                module
            ).__module__.startswith("torch")
            module.__dict__["training"] = make in TRAINED_MODE and not noisy
        parameters = [p for p in model.parameters() if p.requires_grad]
        log_p = model(sample[None].clone()).log_softmax(-1)[0]
        for value in log_p:
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            norm = sum(float(g.square().sum()) for g in gradients if g is not None)
            total += float(value.exp()) * norm / len(x)
    return total


def train(make, *, probed):
    model = build(make)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    probe = None
    if probed:
        probe = fimprobe.attach(
            model, schedule={"every": 1}, likelihood="categorical", tensorboard=False,
            estimators=["i1"], bounds=False,
        )  # fmt: skip
    torch.manual_seed(1)
    for _ in range(3):
        x, y = torch.randn(6, 4), torch.randint(3, (6,))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward(retain_graph=True)
        optimizer.step()
    if probe is not None:
        # a batch that the forward overwrote is not the one that it began with
        assert len(probe.history) == (0 if make is overwriting_its_input else 3)
        probe.detach()
    streams = {n: v.get_state() for n, v in vars(model).items() if isinstance(v, torch.Generator)}
    numbers = {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float))
    }
    lengths = {n: len(v) for n, v in vars(model).items() if isinstance(v, (list, deque))}
    return model.state_dict(), streams, numbers, lengths


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("make", MODELS)
def test_the_trace_is_the_models_own_and_nothing_changes(make):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    expected = oracle_trace(make, x)
    model = build(make).train()
    before, inputs = state_of(model), x.clone()
    plan = Plan()
    for _ in range(2):
        report = fimprobe.measure(
            model,
            x,
            likelihood="categorical",
            draws="exact",
            estimators=["i1"],
            bounds=False,
            plan=plan,
        )
        assert report.total.i1.trace == pytest.approx(expected, rel=1e-9)
        assert state_of(model) == before and torch.equal(x, inputs)


@pytest.mark.parametrize("make", MODELS)
def test_training_is_bit_identical(make):
    if make is with_views_of_its_weight:
        pytest.skip("plain torch cannot train it: views kept from before a step have an old graph")
    plain, probed = train(make, probed=False), train(make, probed=True)
    for name, value in plain[0].items():
        assert torch.equal(value, probed[0][name]), name
    assert all(torch.equal(v, probed[1][n]) for n, v in plain[1].items())
    assert plain[2:] == probed[2:]
