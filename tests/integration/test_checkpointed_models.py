"""Models with activation checkpointing: the numbers of the same model without it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fimprobe
from tests.models.cases import Lambda
from tests.support.bit_identity import LEAN, data, same, train
from tests.support.single_samples import assert_first_order, assert_second_order

pytestmark = pytest.mark.usefixtures("double")


class Segment(nn.Module):
    """A part of a model that is checkpointed, unless ``plain``."""

    def __init__(self, body, reentrant, plain=False):
        super().__init__()
        self.body, self.reentrant, self.plain = body, reentrant, plain

    def forward(self, x):
        if self.plain:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


def plain(model):
    """The same parameters in a model without checkpoints, in eval mode."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, Segment):
            module.plain = True
    return model


def attend(self, x):
    query, key, value = self.parts[0](x).chunk(3, -1)
    return F.scaled_dot_product_attention(query, key, value).mean(1)


def last(self, x):
    return self.parts[0](x)[0][:, -1]


def mixed(self, x):
    return self.parts[0](x, x, x, need_weights=False)[0].mean(1)


BODIES = {
    "gelu": lambda r: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Dropout(), nn.Linear(4, 4)),
    "silu behind norms": lambda r: nn.Sequential(nn.LayerNorm(4), nn.SiLU(), nn.RMSNorm(4)),
    "raw parameter": lambda r: Lambda(lambda s, x: x @ s.w, w=nn.Parameter(torch.randn(4, 4))),
    "nested": lambda r: nn.Sequential(Segment(nn.Sequential(nn.Linear(4, 4), nn.GELU()), not r)),
}
SEQUENCES = {
    "attention function": lambda: Lambda(attend, nn.Linear(4, 12)),
    "lstm": lambda: Lambda(last, nn.LSTM(4, 4, batch_first=True)),
    "gru": lambda: Lambda(last, nn.GRU(4, 4, batch_first=True)),
    "multi-head attention": lambda: Lambda(mixed, nn.MultiheadAttention(4, 2, batch_first=True)),
}


def around(body, reentrant):
    return nn.Sequential(nn.Linear(4, 4), Segment(body, reentrant), nn.Linear(4, 3))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [*BODIES, *SEQUENCES])
def test_a_segment(name, reentrant):
    body = SEQUENCES[name]() if name in SEQUENCES else BODIES[name](reentrant)
    x = torch.randn(3, 2, 4) if name in SEQUENCES else torch.randn(3, 4)
    model = around(body, reentrant)
    assert_first_order(model, (x,), reference=plain(model))


@pytest.mark.parametrize("name", ["gelu", "lstm", "multi-head attention"])
def test_second_derivatives_through_a_segment(name):
    body = SEQUENCES[name]() if name in SEQUENCES else BODIES[name](False)
    x = torch.randn(2, 2, 4) if name in SEQUENCES else torch.randn(2, 4)
    model = around(body, False)
    assert_second_order(model, (x,), reference=plain(model))


def test_a_table_of_positions_inside():
    model = Lambda(
        lambda s, x: s.parts[2](checkpoint(s.add, s.parts[0](x), use_reentrant=False).mean(1)),
        nn.Linear(4, 4),
        nn.Embedding(2, 4),
        nn.Linear(4, 3),
    )
    model.add = lambda h: h + model.parts[1](torch.arange(2))
    assert_first_order(model, (torch.randn(3, 2, 4),))


def test_first_segment_without_gradient():
    """A reentrant segment on the inputs trains nothing: its parameters are left out."""
    model = nn.Sequential(Segment(nn.Linear(4, 4), True), nn.Tanh(), nn.Linear(4, 3))
    reference = plain(model)
    reference[0].requires_grad_(False)
    report = assert_first_order(model, (torch.randn(3, 4),), reference=reference)
    assert set(report.parameters) == {"2.weight", "2.bias"}


def test_sequential():
    layers = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 3))
    model = Lambda(lambda s, x: checkpoint_sequential(s.parts[0], 2, x, use_reentrant=False), layers)
    assert_first_order(model, (torch.randn(3, 4),))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_training_is_unchanged(reentrant, whole):
    torch.set_default_dtype(torch.float32)
    body = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Dropout(0.3))
    model = nn.Sequential(nn.Linear(4, 4), body, nn.Linear(4, 3))
    if not whole:
        model[1] = Segment(body, reentrant)
    x, y = data(6, 4)
    x.requires_grad_()

    def trained(model, probed):
        torch.manual_seed(1)
        called = Segment(model, reentrant) if whole else model
        probe = fimprobe.attach(model, **LEAN) if probed else None
        train(called, 2, x, y)
        if probe is not None:
            probe.detach()
            assert len(probe.history) == 2
        return model.state_dict()

    assert same(trained(copy.deepcopy(model), False), trained(model, True))


class AddsToGrad(torch.autograd.Function):
    """A checkpoint whose backward runs the segment again and its backward, as some packages do."""

    @staticmethod
    def forward(ctx, body, x, switch):
        ctx.body = body
        ctx.save_for_backward(x)
        with torch.no_grad():
            return body(x)

    @staticmethod
    def backward(ctx, delta):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.body(x), delta)
        return None, x.grad, None


def test_a_checkpoint_that_hides_its_parameters_is_refused():
    """The graph shows no dependence on them, which must not be reported as such."""
    hidden = Lambda(
        lambda s, x: AddsToGrad.apply(s.parts[0], x, torch.ones(1, requires_grad=True)),
        nn.Linear(4, 4),
    )
    model = nn.Sequential(nn.Linear(4, 4), hidden, nn.Linear(4, 3))
    words = "its backward adds those of '1.parts.0.weight', .* Use torch.utils.checkpoint"
    with pytest.raises(fimprobe.FimprobeError, match=words):
        fimprobe.measure(model, torch.randn(3, 4), likelihood="categorical")
