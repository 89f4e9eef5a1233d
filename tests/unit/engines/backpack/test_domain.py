"""Outside of the domain, where BackPACK is silently wrong, every module is named with its reason."""

import copy
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from backpack import backpack, extend, extensions
from backpack.context import CTX
from torch import nn

from fimprobe.engines.backpack import hessian_diagonals, measure_moments, offending_modules
from fimprobe.engines.backpack.second_order import hessian_in_domain
from fimprobe.errors import FimprobeError
from tests.models.cases import CASES, Lambda, gpt2
from tests.support.agreement import by_autograd, make_problem, same

pytestmark = pytest.mark.filterwarnings("error", "ignore:Using padding", "ignore:.*weight_norm")


class Glue(nn.Module):
    """Functional attention, residual connections, a constant: between modules anything goes."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(6, 4)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)
        self.norm, self.spare = nn.LayerNorm(4), nn.Linear(4, 4)
        self.output = nn.Linear(4, 4)  # a name that BackPACK itself sets on modules

    def forward(self, tokens, padding=None):
        x = self.token(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        x = x + F.gelu(self.output(x)) * 0.5
        return self.out(x.mean(1) if padding is None else (x * padding[..., None]).sum(1))


@pytest.mark.parametrize("draws", [None, 2])
def test_glue_between_modules_is_free_in_first_order(draws, double):
    model = Glue()
    model.norm.weight.requires_grad_(False)
    inputs = {"tokens": torch.randint(6, (4, 5)), "padding": torch.rand(4, 5)}
    problem = make_problem(model, inputs, draws=draws)
    assert offending_modules(problem, second_order=False) == {}
    have = measure_moments(problem)
    same(have, by_autograd(problem))
    assert have.coverage["norm.weight"] == "left out: frozen"
    assert have.coverage["spare.weight"] == "left out: the measured outputs do not depend on it"
    assert have.coverage["qkv.weight"] == "backpack: Linear"
    found = offending_modules(problem, second_order=True)
    assert {p for p, why in found.items() if "not the output of" in why} == {"out", "output"}
    assert found[""] == "the inputs are not one tensor"
    with pytest.raises(FimprobeError, match="not verified for .*second_order={'probes': 2}"):
        hessian_diagonals(problem, problem.batch, torch.zeros(1, 4, 3))


OUTSIDE = {
    "tied and reused": ({"0", "2"}, "shares a parameter"),
    "functional tie": ({"parts.0"}, "used outside of its forward"),
    "attention net": ({"", "token", "decode", "place", "twice"}, ""),
    "conv2d same": ({"0.0"}, "padding='same'"),
    "conv1d same dilated": ({"0.0"}, "padding='same'"),
    "conv2d reflect": ({"0.0"}, "padding_mode='reflect'"),
    "conv2d circular": ({"0.0"}, "padding_mode='circular'"),
    "conv2d circular same": ({"0.0"}, "padding="),
    "convtranspose1d": ({"0.0"}, "output_padding"),
    "convtranspose2d output size": ({"parts.0"}, "something else than one tensor"),
    "folded frames": ({f"parts.{i}" for i in range(4)}, "does not have the"),
    "time-major fold": ({"parts.0"}, "does not have the"),
    "embedding [1, T] index, T = B": ({"parts.1"}, "does not have the"),
    "BERT": ({"parts.0.bert.embeddings.position_embeddings"}, "does not have the"),
    "encoder, sequence first, T = B": (None, ""),
    "subclass": ({"0.0"}, "SubLinear has no verified rule"),
    "parametrised": ({"0.0", "0.0.parametrizations.weight"}, "no verified rule"),
    "old weight norm": ({"0.0"}, "replaced or hooked"),
    "rms norm of one's own": ({"0.0"}, "no verified rule"),
    "lora": ({"0.0"}, "no verified rule"),
    "scalar parameter": ({""}, "no verified rule"),
    "lstm": ({"parts.0"}, "LSTM has no verified rule"),
    "gru": ({"parts.0"}, "GRU has no verified rule"),
    "multihead batch first": ({"parts.0", "parts.0.out_proj"}, "no verified rule"),
    "bag mean": ({"0"}, "no verified rule"),
    "bilinear": ({"parts.0"}, "no verified rule"),
    "transformers Conv1D": ({"0", "2"}, "no verified rule"),
    "instance norm running": ({"0.0"}, "track_running_stats=True"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_of_the_domain_every_module_is_named(name):
    case = CASES[name]()
    problem = make_problem(case.model, case.inputs, draws=2)
    paths, reason = OUTSIDE[name]
    found = offending_modules(problem, second_order=False)
    assert found and (paths is None or set(found) == paths)
    assert all(reason in why for why in found.values())
    with pytest.raises(FimprobeError, match="not verified for .*engine='autograd'"):
        measure_moments(problem)


def test_gpt2_is_outside_for_every_reason_at_once():
    case = gpt2()
    found = offending_modules(make_problem(case.model, case.inputs), second_order=False)
    reasons = " | ".join(found.values())
    for reason in ("shares a parameter", "Conv1D has no verified rule", "does not have the"):
        assert reason in reasons


def test_options_outside_of_the_domain():
    x, image = torch.randn(4, 4), torch.randn(3, 2, 4, 4)
    inplace = Lambda(lambda s, x: s.parts[1](s.parts[0](x).relu_()), nn.Linear(4, 4), nn.Linear(4, 3))
    moody = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)
    )
    noisy = Lambda(lambda s, x: s.parts[0](F.dropout(x, 0.5)), nn.Linear(4, 3))
    coupled = Lambda(lambda s, x: s.parts[0](x - x.mean(0)), nn.Linear(4, 3))
    for model, path, reason in [
        (inplace, "parts.0", "modified in place"),
        (moody, "1", "batch's statistics"),
        (noisy, "", "depend on the other samples"),
        (coupled, "", "depend on the other samples"),
        (Lambda(lambda s, x: s.parts[0](input=x), nn.Linear(4, 3)), "parts.0", "one tensor"),
        (Lambda(lambda s, x: s.parts[0](x.view(4, 4)), nn.Linear(4, 3)), "", "forward fails on 2"),
    ]:
        found = offending_modules(make_problem(model, x), second_order=False)
        assert set(found) == {path} and reason in found[path], found
    trained = make_problem(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), x)
    trained.twin.train()
    assert "statistics" in offending_modules(trained, second_order=False)["1"]
    for layer, reason in [
        (nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), "count_include_pad"),
        (nn.AvgPool2d(3, 2, ceil_mode=True), "ceil_mode"),
        (nn.AvgPool2d(2, divisor_override=3), "divisor_override"),
        (nn.AdaptiveAvgPool2d(3), "no divisor"),
        (nn.ZeroPad2d(-1), "negative padding"),
        (nn.BatchNorm2d(2, affine=False), "affine=False"),
        (nn.ReLU6(), "no verified rule"),
        (nn.Softmax(1), "no verified rule"),
        (nn.Conv2d(2, 2, 2, padding="same"), "padding='same'"),
        (nn.ConvTranspose2d(2, 2, 2, stride=2, output_padding=1), "output_padding"),
    ]:
        model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3)).eval()
        model(image)
        found = offending_modules(make_problem(model, image), second_order=True)
        assert set(found) == {"0"} and reason in found["0"], found
    tail = Lambda(lambda s, x: s.parts[0](x) * 2, nn.Linear(4, 3))
    found = offending_modules(make_problem(tail, x), second_order=True)
    assert found == {"": "the outputs are not the output of a module, nor a sum of such"}
    for between in (
        lambda x, y: x + torch.tanh(y),
        lambda x, y: y.sub(x.detach() * y),
        lambda x, y: torch.add(y, y, alpha=2),
        lambda x, y: y + y[:, :1],
    ):
        skip = Lambda(
            lambda s, x, f=between: s.parts[1](f(x, s.parts[0](x))), nn.Linear(4, 4), nn.Linear(4, 3)
        )
        assert set(offending_modules(make_problem(skip, x), second_order=True)) == {"parts.1"}
    one = make_problem(nn.Linear(4, 3), torch.randn(1, 4))  # a batch of one is no obstacle
    assert offending_modules(one, second_order=True) == {}


def stock(model, x, extension=None, field="grad_batch"):
    """What plain BackPACK gives for Σ outputs: name -> per-sample values."""
    model = extend(copy.deepcopy(model).eval())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with backpack(extension or extensions.BatchGrad(), retain_graph=True):
                (model(x) * torch.arange(1.0, 4)).sum().backward()
        return {n: getattr(p, field) for n, p in model.named_parameters()}
    finally:
        CTX.remove_hooks()


def per_sample(model, x):
    model = copy.deepcopy(model).eval()
    rows = []
    for b in range(len(x)):
        out = (model(x[b : b + 1]) * torch.arange(1.0, 4)).sum()
        rows.append(torch.autograd.grad(out, list(model.parameters())))
    return {
        n: torch.stack(g)
        for (n, _), g in zip(model.named_parameters(), zip(*rows, strict=True), strict=True)
    }


def used_twice():
    layer = nn.Linear(4, 4)
    return (
        nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3)),
        torch.randn(3, 4),
        "0.weight",
    )


def in_two_modules():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model, torch.randn(3, 4), "0.weight"


def padded(**options):
    conv = nn.Conv2d(2, 2, 3, **options)
    return (
        nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(50, 3)),
        torch.randn(3, 2, 5, 5),
        "0.weight",
    )


def flattened_tokens():
    def f(self, x):
        return self.parts[1](torch.tanh(self.parts[0](x.flatten(0, 1))).view(*x.shape).sum(1))

    return Lambda(f, nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(3, 2, 4), "parts.0.weight"


def one_row_of_positions():
    def f(self, x):
        return self.parts[1](torch.tanh(x + self.parts[0](torch.arange(2)[None])).sum(1))

    return Lambda(f, nn.Embedding(2, 4), nn.Linear(4, 3)), torch.randn(3, 2, 4), "parts.0.weight"


@pytest.mark.parametrize(
    "make",
    [used_twice, in_two_modules, flattened_tokens, one_row_of_positions]
    + [lambda: padded(padding=1, padding_mode="circular"), lambda: padded(padding="same")],
    ids=["used twice", "in two modules", "flattened tokens", "positions", "circular", "same"],
)
def test_stock_backpack_is_silently_wrong_where_the_domain_ends(make):
    model, x, name = make()
    want = per_sample(model, x)[name]
    have = stock(model, x)[name]
    assert have.shape != want.shape or not torch.allclose(have, want, rtol=1e-3)
    problem = make_problem(model, x, draws=2)
    assert name.rpartition(".")[0] in offending_modules(problem, second_order=False)
    same_shapes = by_autograd(problem).parameters  # the other engine has it
    assert name in same_shapes


def test_stock_batch_l2_is_wrong_with_groups_and_this_engine_is_not(double):
    conv = nn.Conv2d(4, 4, 3, groups=2)
    model, x = nn.Sequential(conv, nn.Flatten(), nn.Linear(16, 3)), torch.randn(3, 4, 4, 4)
    want = per_sample(model, x)["0.weight"].square().flatten(1).sum(1)
    have = stock(model, x, extensions.BatchL2Grad(), "batch_l2")["0.weight"]
    assert not torch.allclose(have, want, rtol=1e-3)
    problem = make_problem(model, x, draws=2)
    same(measure_moments(problem), by_autograd(problem))


def test_the_guards_see_what_the_domain_was_not_asked_about(double):
    for name in ("functional tie", "conv2d circular", "time-major fold", "tied and reused"):
        case = CASES[name]()
        problem = make_problem(case.model, case.inputs, draws=2)
        with pytest.raises(FimprobeError, match="guard|more than once"):
            measure_moments(problem, verified=True)

    def f(self, x):  # switches to another use of the layer on the whole batch
        y = self.parts[0](x)
        return self.parts[1](torch.tanh(y)) if len(x) < 9 else self.parts[1](self.parts[0](y))

    problem = make_problem(Lambda(f, nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(6, 4), draws=2)
    with pytest.raises(FimprobeError, match="more than once"):
        measure_moments(problem)
    noisy = Lambda(lambda s, x: s.parts[0](F.dropout(x, 0.5)), nn.Linear(4, 3))
    with pytest.raises(FimprobeError, match="copies of a sample have different outputs"):
        measure_moments(make_problem(noisy, torch.randn(6, 4), draws=2), verified=True)


def test_a_wrong_hessian_is_seen_and_its_module_named(double, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    problem = make_problem(model, torch.randn(3, 4))

    def wrong(problem, batch, seed):
        found = hessian_in_domain(problem, batch, seed)
        values = found["2.weight"].values * 1.001
        return found | {"2.weight": dataclasses.replace(found["2.weight"], values=values)}

    assert offending_modules(problem, second_order=True) == {}
    monkeypatch.setattr("fimprobe.engines.backpack.verification.hessian_in_domain", wrong)
    found = offending_modules(problem, second_order=True)
    assert found == {"2": "guard: its Hessian differs from that of double backward"}


def test_a_layer_on_permuted_samples_is_outside(double):
    def f(self, x):
        return self.parts[1](torch.tanh(self.parts[0](x.flip(0)).flip(0)))

    model = Lambda(f, nn.Linear(4, 4), nn.Linear(4, 3))
    found = offending_modules(make_problem(model, torch.randn(4, 4)), second_order=False)
    assert set(found) == {"parts.0"} and "guard" in found["parts.0"]
