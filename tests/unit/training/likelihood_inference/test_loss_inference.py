"""Which loss is being trained: right, or undecided, never wrong."""

import logging
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fimprobe
from fimprobe.training.likelihood_inference.loss_inference import (
    infer_from_gradient,
    positions_with_gradient,
)


def infer(h, loss, scale=1.0):
    """The decision from one backward of ``loss(h)``."""
    h = h.detach().requires_grad_()
    (g,) = torch.autograd.grad(scale * loss(h), h)
    return infer_from_gradient(h.detach(), g)


def focal(h, y, gamma=2.0):
    logp = F.log_softmax(h, -1).gather(-1, y[:, None])[:, 0]
    return ((1 - logp.exp()) ** gamma * -logp).mean()


def batch(seed, rows=64, classes=5, dtype=torch.float32, scale=1.0):
    """Logits, classes, 0/1 targets, counts and real targets."""
    g = torch.Generator().manual_seed(seed)
    h = scale * torch.randn(rows, classes, generator=g)
    y = torch.randint(classes, (rows,), generator=g)
    bits = torch.randint(2, (rows, classes), generator=g)
    counts = torch.poisson(h.exp(), generator=g)
    real = torch.randn(rows, classes, generator=g)
    return h.to(dtype), y, bits.to(dtype), counts.to(dtype), real.to(dtype)


CROSS_ENTROPY = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "weights": {"weight": torch.tensor([0.5, 1.0, 2.0, 0.7, 1.3])},
    "smoothing": {"label_smoothing": 0.1},
    "ignore": {"ignore_index": 2},
}


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", CROSS_ENTROPY)
def test_cross_entropy(kind, dtype, scale):
    options = dict(CROSS_ENTROPY[kind])
    if "weight" in options:
        options["weight"] = options["weight"].to(dtype)
    for seed in range(10):
        for spread in (0.5, 1.0, 3.0):
            h, y, *_ = batch(seed, dtype=dtype, scale=spread)
            found = infer(h, lambda h: F.cross_entropy(h, y, **options), scale)
            assert getattr(found.likelihood, "name", found) == "categorical", (seed, spread)
            assert found.likelihood.class_dim == -1
            assert ("smoothing 0.1" in found.reason) == (kind == "smoothing")
            assert ("class weights" in found.reason) == (kind == "weights")


@pytest.mark.parametrize("kind", ["mean", "sum", "ignore"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_cross_entropy(kind, autocast):
    for seed in range(10):
        h, y, *_ = batch(seed, rows=256, dtype=torch.bfloat16)
        found = infer(
            h,
            lambda h: F.cross_entropy(h.float() if autocast else h, y, **CROSS_ENTROPY[kind]),
            65536.0,
        )
        assert getattr(found.likelihood, "name", found) == "categorical", seed


def test_many_classes_before_training():
    g = torch.Generator().manual_seed(0)
    h, y = 0.3 * torch.randn(32, 1000, generator=g), torch.randint(1000, (32,), generator=g)
    assert infer(h, lambda h: F.cross_entropy(h, y)).likelihood.name == "categorical"
    assert infer(h, lambda h: focal(h, y)).likelihood is None


@pytest.mark.parametrize("maps", [False, True])
def test_sequences_and_their_ignored_positions(maps):
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        h = torch.randn(4, 6, 7, generator=g)
        y = torch.randint(7, (4, 6), generator=g)
        y[0, 3:] = y[2, :2] = -100
        leaf = (h.transpose(1, 2).contiguous() if maps else h).requires_grad_()
        flat = leaf if maps else leaf.reshape(-1, 7)
        loss = F.cross_entropy(flat, y if maps else y.reshape(-1))
        (gradient,) = torch.autograd.grad(loss, leaf)
        found = infer_from_gradient(leaf.detach(), gradient)
        assert found.likelihood == fimprobe.likelihoods.Categorical(class_dim=1 if maps else -1)
        read = positions_with_gradient(gradient, found.likelihood)
        assert torch.equal(read, y != -100)
    assert positions_with_gradient(gradient[0], found.likelihood) is None
    assert positions_with_gradient(gradient, fimprobe.likelihoods.Bernoulli()) is None


BERNOULLI = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "pos_weight": {"pos_weight": torch.tensor(3.0)},
    "pos_weight vector": {"pos_weight": torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])},
}


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", BERNOULLI)
def test_binary_cross_entropy(kind, dtype, scale):
    options = {k: v.to(dtype) if "w" in k else v for k, v in BERNOULLI[kind].items()}
    for seed in range(10):
        for spread in (0.5, 1.0, 5.0):
            h, _, bits, *_ = batch(seed, dtype=dtype, scale=spread)
            found = infer(h, lambda h: F.binary_cross_entropy_with_logits(h, bits, **options), scale)
            assert getattr(found.likelihood, "name", found) == "bernoulli", (seed, spread)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_poisson(reduction, dtype, scale):
    for seed in range(10):
        h, _, _, counts, _ = batch(seed, dtype=dtype)
        found = infer(h, lambda h: F.poisson_nll_loss(h, counts, reduction=reduction), scale)
        assert getattr(found.likelihood, "name", found) == "poisson", seed


def rivals(seed, rows, classes=5, dtype=torch.float32, scale=1.0):
    """Losses that are no likelihood's at these outputs: name -> (outputs, loss)."""
    h, y, bits, counts, real = batch(seed, rows, classes, dtype, scale)
    onehot = F.one_hot(y, classes).to(dtype)
    return {
        "mse": (h, lambda h: F.mse_loss(h, real)),
        "mse whole": (h, lambda h: F.mse_loss(h, counts)),
        "mse one-hot": (h, lambda h: F.mse_loss(h, onehot)),
        "mse softmax": (h, lambda h: F.mse_loss(h.softmax(1), onehot)),
        "l1": (h, lambda h: F.l1_loss(h, real)),
        "huber": (h, lambda h: F.huber_loss(h, real)),
        "focal": (h, lambda h: focal(h, y)),
        "nll": (F.log_softmax(h, 1), lambda h: F.nll_loss(h, y)),
        "nll of log": (F.softmax(h, 1), lambda h: F.nll_loss(h.log(), y)),
        "bce": (h.sigmoid(), lambda h: F.binary_cross_entropy(h, bits)),
    }


@pytest.mark.parametrize("kind", rivals(0, 4))
def test_other_losses_are_told_what_to_pass(kind):
    says = {
        "nll": "log-probabilities.*pass likelihood='categorical'",
        "nll of log": "probabilities.*pass likelihood='categorical' and output=torch.log,",
        "bce": "likelihood='bernoulli' and output=torch.logit",
    }.get(kind, "matches no likelihood's score")
    for seed in range(20):
        for dtype in (torch.float32, torch.float64):
            found = infer(*rivals(seed, 64, dtype=dtype)[kind], 65536.0 if seed % 2 else 1.0)
            assert found.likelihood is None and found.final
            assert re.search(says, found.reason), found


@pytest.mark.parametrize("shape", [(1, 5), (2, 2), (2, 10), (4, 3), (32, 4)])
def test_no_wrong_decision_on_any_seed(shape):
    rows, classes = shape
    for seed in range(60):
        scale = (0.02, 0.3, 1.0, 3.0)[seed % 4]
        dtype = (torch.float32, torch.float64, torch.bfloat16)[seed % 3]
        for kind, (h, loss) in rivals(seed, rows, classes, dtype, scale).items():
            if kind not in ("mse", "mse whole", "huber", "focal") and seed % 5:
                continue
            found = infer(h, loss)
            assert found.likelihood is None, (seed, kind, found)


def test_small_batches_are_right_or_undecided():
    decided = 0
    for seed in range(60):
        h, y, bits, counts, _ = batch(seed, rows=(1, 2, 4)[seed % 3], classes=3)
        for name, loss in (
            ("categorical", lambda h: F.cross_entropy(h, y)),
            ("bernoulli", lambda h: F.binary_cross_entropy_with_logits(h, bits)),
            ("poisson", lambda h: F.poisson_nll_loss(h, counts)),
        ):
            found = infer(h, loss)
            assert found.likelihood is not None or not found.final, (seed, name, found)
            assert found.likelihood is None or found.likelihood.name == name, (seed, name, found)
            decided += found.likelihood is not None
    assert decided > 45


@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("classes", [2, 5])
def test_equal_outputs_tell_nothing(rows, classes):
    _, y, bits, counts, _ = batch(0, rows, classes)
    h = torch.zeros(rows, classes)
    for loss in (
        lambda h: F.cross_entropy(h, y),
        lambda h: F.binary_cross_entropy_with_logits(h, bits),
        lambda h: F.poisson_nll_loss(h, counts),
        lambda h: F.mse_loss(h, counts + 1),
        lambda h: F.mse_loss(h, F.one_hot(y, classes).float()),
        lambda h: focal(h, y),
    ):
        found = infer(h, loss)
        assert found.likelihood is None and not found.final, found


def test_squared_error_along_the_tangent_of_the_sigmoid():
    """(h ∓ 2)/4 is sigmoid(h) − y to third order."""
    h, _, bits, *_ = batch(0, scale=0.02, dtype=torch.float64)
    assert infer(h, lambda h: F.mse_loss(h, 4 * bits - 2)).likelihood is None


def test_without_a_usable_gradient():
    h = torch.randn(4, 3)
    assert not infer_from_gradient(h, torch.zeros(4, 3)).final
    assert not infer_from_gradient(h, torch.full((4, 3), float("nan"))).final


def test_one_label_in_squeezed_outputs_is_undecided_and_squared_error_is_not():
    h = torch.randn(32, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(32)
    assert not infer(h, lambda h: F.binary_cross_entropy_with_logits(h, ones)).final
    assert infer(h, lambda h: F.mse_loss(h, ones * 9.3 + h.detach().roll(1))).unmatched


@pytest.mark.parametrize("squares", [False, True])
def test_an_undecidable_loss_warns_once_and_trains_on(caplog, squares):
    """Squared error is measured as a regression; a loss that may be a classifier's is not."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    before = [p.clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING, logger="fimprobe"):
        probe = fimprobe.attach(
            net, tensorboard=False, schedule={"every": 10}, estimators=["i1"], bounds=False
        )
        losses = []
        for _ in range(30):
            x = torch.randn(16, 3)
            loss = F.mse_loss(net(x), x[:, :2]) if squares else focal(net(x), (x[:, 0] > 0).long())
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            losses.append(float(loss.detach().mean()))
        probe.detach()
    warnings = [r.getMessage() for r in caplog.records if r.name == "fimprobe"]
    assert len(warnings) == 1, warnings
    assert "Gaussian(sigma=...)" in warnings[0] and ("likelihood='auto'" in warnings[0]) != squares
    assert [r.likelihood for r in probe.history] == ["gaussian"] * 3 * squares
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
