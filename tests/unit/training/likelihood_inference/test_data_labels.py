"""Labels read off the loss's gradient at the outputs: the labels given, or an error; never others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fimprobe.errors import BatchError, FimprobeError
from fimprobe.likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from fimprobe.training.likelihood_inference.data_labels import labels_from_gradient


def gradient(h, loss):
    h = h.detach().requires_grad_()
    return torch.autograd.grad(loss(h), h)[0]


def read(h, loss, likelihood):
    return labels_from_gradient(h.detach(), gradient(h, loss), likelihood)


DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("shape", [(16, 2), (16, 7), (1, 3), (5, 6, 4), (3, 4, 5, 3)])
def test_classes(shape, scale, reduction, dtype):
    h = scale * torch.randn(shape, dtype=dtype)
    y = torch.randint(shape[-1], shape[:-1])
    first = h.movedim(-1, 1)  # torch wants the classes there
    for output, given, dim in ((h, None, -1), (first, first, 1)):
        found = read(
            output,
            lambda o: F.cross_entropy(
                o if given is not None else o.movedim(-1, 1), y, reduction=reduction
            ),
            Categorical(class_dim=dim),
        )
        assert found.dtype == torch.int64 and torch.equal(found, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ignored_positions(reduction, dtype):
    h = torch.randn(5, 6, 4, dtype=dtype)
    y = torch.randint(4, (5, 6))
    y[torch.rand(5, 6) < 0.4] = -100
    y[2] = -100  # a whole sequence
    assert (y == -100).any(1).sum() > 2

    def loss(o):
        return F.cross_entropy(o.transpose(1, 2), y, reduction=reduction)

    assert torch.equal(read(h, loss, Categorical()), y)
    log = torch.log_softmax(h, -1)  # valid logits
    assert torch.equal(
        read(log, lambda o: F.nll_loss(o.transpose(1, 2).log_softmax(1), y), Categorical()), y
    )


def test_sequences_averaged_each_by_itself():
    """Each sequence's mean, then the mean of those: c differs between sequences."""
    h, y = torch.randn(200, 12, 4), torch.randint(4, (200, 12))
    y[3, 8:] = -100
    count = (y != -100).sum(1)

    def loss(o):
        return (F.cross_entropy(o.transpose(1, 2), y, reduction="none").sum(1) / count).mean()

    assert torch.equal(read(h, loss, Categorical()), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [0.0, 15.0, 20.0, 50.0, 110.0, 500.0])
def test_a_model_that_is_sure(gap, dtype):
    """Where p_y rounds to 1 the label's entry of the gradient is 0, as may be those of others."""
    h = torch.randn(64, 5, dtype=dtype)
    y = torch.randint(5, (64,))
    sure = torch.arange(64) >= 8
    h[sure, y[sure]] += gap
    h[sure, (y[sure] + 1) % 5] -= 150  # one underflows before the others
    found = read(h, lambda o: F.cross_entropy(o, y), Categorical())
    # at no gradient at all there is no label, and none is needed: its score is zero
    silent = (gradient(h, lambda o: F.cross_entropy(o, y)) == 0).all(1)
    assert torch.equal(found[~silent], y[~silent]) and (found[silent] == -100).all()
    assert not silent[:8].any()
    assert bool(silent.any()) == (gap > 100 and dtype == torch.float32)
    wrong = (y + 1) % 5  # the model is sure, and not right
    mixed = torch.where(torch.arange(64) % 3 == 0, wrong, y)
    found = read(h, lambda o: F.cross_entropy(o, mixed), Categorical())
    assert torch.equal(found[found != -100], mixed[found != -100])
    assert (found != -100)[::3].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0, 60.0, 300.0])
@pytest.mark.parametrize("shape", [(24,), (24, 1), (8, 5), (4, 3, 5)])
def test_bernoulli(shape, scale, reduction, dtype):
    h = scale * torch.randn(shape, dtype=dtype)
    y = torch.randint(2, shape).to(dtype)
    found = read(
        h, lambda o: F.binary_cross_entropy_with_logits(o, y, reduction=reduction), Bernoulli()
    )
    assert found.dtype == dtype and torch.equal(found, y)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, scale):
    h, y = (3 * torch.randn(32, 10)).to(dtype), torch.randint(10, (32,))
    for loss in (
        lambda o: F.cross_entropy(o.float(), y) * scale,  # as under autocast
        lambda o: (
            F.cross_entropy(o, y).float() * scale
            if dtype == torch.bfloat16
            else F.cross_entropy(o.float(), y) * scale
        ),
    ):
        assert torch.equal(read(h, loss, Categorical()), y)
    bits = torch.randint(2, (32, 10)).to(dtype)
    found = read(
        h, lambda o: F.binary_cross_entropy_with_logits(o.float(), bits.float()) * scale, Bernoulli()
    )
    assert torch.equal(found, bits)


@pytest.mark.parametrize(
    ("family", "loss"),
    [
        (Poisson(), lambda h, y: F.poisson_nll_loss(h, y)),
        (Gaussian(sigma=0.5), lambda h, y: F.mse_loss(h, y)),
    ],
)
def test_labels_of_other_families_cannot_be_read(family, loss):
    """c and the label cannot be told apart: an error with the remedy."""
    h, y = torch.randn(8, 3), torch.randint(4, (8, 3)).float()
    with pytest.raises(FimprobeError) as error:
        read(h, lambda o: loss(o, y), family)
    assert not isinstance(error.value, BatchError)  # no other batch will do
    message = str(error.value)
    assert f"likelihood='{family.name}'" in message and "Pass labels=" in message


def trained(size=256, classes=5):
    """Logits of a model that is right and sure about most samples, and their labels."""
    y = torch.randint(classes, (size,))
    h = torch.randn(size, classes)
    h[torch.arange(size), y] += 4 * torch.rand(size) + 3
    return h, y


def soft(y, classes, amount):
    return F.one_hot(y, classes) * (1 - amount) + amount / classes


def mixed_up(h, y):
    share = 0.7
    other = y.roll(1)
    return share * F.cross_entropy(h, y) + (1 - share) * F.cross_entropy(h, other)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize(
    "loss",
    [
        lambda h, y: F.cross_entropy(h, y, label_smoothing=0.1),
        lambda h, y: F.cross_entropy(h, y, label_smoothing=0.02),
        lambda h, y: F.cross_entropy(h, soft(y, h.shape[1], 0.2)),
        mixed_up,
        lambda h, y: F.cross_entropy(h, y, weight=torch.linspace(0.2, 3, h.shape[1])),
        lambda h, y: F.mse_loss(h.softmax(1), F.one_hot(y, h.shape[1]).float()),
        lambda h, y: F.kl_div(
            h.log_softmax(1), (h / 2 + torch.randn_like(h)).softmax(1), reduction="batchmean"
        ),
        lambda h, y: h.square().sum(),
        lambda h, y: (h * torch.randn_like(h)).sum(),
        lambda h, y: 0 * h.sum(),
        lambda h, y: F.cross_entropy(h, y) * float("nan"),
        lambda h, y: -F.cross_entropy(h, y),
    ],
)
def test_classes_that_are_not_hard_are_refused(loss, classes):
    h, y = trained(classes=classes)
    with pytest.raises(BatchError, match="Pass labels= a function"):
        read(h, lambda o: loss(o, y), Categorical())


@pytest.mark.parametrize(
    "loss",
    [
        lambda h, y: F.binary_cross_entropy_with_logits(h, 0.9 * y + 0.05),
        lambda h, y: F.binary_cross_entropy_with_logits(h, torch.rand_like(h)),
        lambda h, y: F.binary_cross_entropy_with_logits(h, y, pos_weight=torch.tensor(5.0)),
        lambda h, y: F.binary_cross_entropy_with_logits(
            h, y, weight=(torch.rand_like(h) > 0.3).float()
        ),
        lambda h, y: F.mse_loss(torch.sigmoid(h), y),
        lambda h, y: F.mse_loss(h, y),
    ],
)
def test_bits_that_are_not_hard_are_refused(loss):
    h = 4 * torch.randn(64, 3)
    y = (torch.rand(64, 3) < torch.sigmoid(h)).float()
    with pytest.raises(BatchError, match="smoothed, mixed or weighted"):
        read(h, lambda o: loss(o, y), Bernoulli())


def test_one_soft_label_among_thousands_is_refused():
    """Its misread label hardly turns the whole gradient."""
    h, y = torch.randn(5000, 2), torch.randint(2, (5000,))
    h[7], y[7] = torch.tensor([0.0, 3.5]), 1  # p = 0.97
    target = F.one_hot(y, 2).float()
    target[7] = torch.tensor([0.05, 0.95])  # p above it: the entry of class 1 is positive
    assert torch.equal(read(h, lambda o: F.cross_entropy(o, y), Categorical()), y)
    with pytest.raises(BatchError):
        read(h, lambda o: F.cross_entropy(o, target), Categorical())
    bits = y.float().unsqueeze(1)
    one = h[:, 1:].clone()
    assert torch.equal(
        read(one, lambda o: F.binary_cross_entropy_with_logits(o, bits), Bernoulli()), bits
    )
    soft_bits = bits.clone()
    soft_bits[7] = 0.95
    with pytest.raises(BatchError):
        read(one, lambda o: F.binary_cross_entropy_with_logits(o, soft_bits), Bernoulli())
    keep = torch.ones_like(bits)
    keep[11] = 0  # masked: there is no label
    one[11] = -1.0
    with pytest.raises(BatchError):
        read(
            one,
            lambda o: F.binary_cross_entropy_with_logits(
                o, torch.where(keep > 0, bits, 1.0), weight=keep
            ),
            Bernoulli(),
        )


def test_a_label_between_two_classes_is_refused():
    """One among thousands, whose gradient is about as long as that of a hard label."""
    h, y = torch.randn(5000, 3), torch.randint(3, (5000,))
    target = F.one_hot(y, 3).float()
    h[7], target[7] = torch.zeros(3), torch.tensor([0.7, 0.3, 0.0])
    with pytest.raises(BatchError):
        read(h, lambda o: F.cross_entropy(o, target), Categorical())


def test_labels_of_varied_softness_are_refused():
    """Each by itself is a hard label with a smaller weight."""
    h, y = torch.zeros(500, 2), torch.randint(2, (500,))
    share = 0.8 + 0.2 * torch.rand(500, 1)
    target = F.one_hot(y, 2) * share + F.one_hot(1 - y, 2) * (1 - share)
    with pytest.raises(BatchError):
        read(h, lambda o: F.cross_entropy(o, target), Categorical())


@pytest.mark.parametrize("smoothing", [0.0, 0.005, 0.01, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("confidence", [0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
def test_smoothed_labels_are_read_right_or_refused(confidence, smoothing):
    """Near uniform outputs smoothing only scales the gradient: then the labels are right."""
    for classes in (2, 3, 10):
        h, y = torch.randn(128, classes), torch.randint(classes, (128,))
        h = confidence * (h / 4 + F.one_hot(y, classes))
        try:
            found = read(h, lambda o: F.cross_entropy(o, y, label_smoothing=smoothing), Categorical())
        except BatchError:
            assert smoothing > 0
            continue
        assert torch.equal(found, y)


def test_the_gradient_of_a_trained_layer(double):
    """Through a model, with the loss scaled as gradient accumulation does."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        h = net(x)
        h.retain_grad()
        (F.cross_entropy(h, y) / 7).backward()
        optimizer.step()
        assert torch.equal(labels_from_gradient(h.detach(), h.grad, Categorical()), y)
