"""Squared error is assumed only where the loss gradient fits no classifier."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fimprobe.training.capture.captured_output import CapturedOutput
from fimprobe.training.likelihood_inference.heads import infer_from_heads
from fimprobe.training.likelihood_inference.regression_inference import zero_sum_dims

MARGIN = nn.MultiMarginLoss()


def decide(outputs, loss, *, final=False):
    """The decision of one batch, as a probe makes it from the loss gradient."""
    h = outputs.detach().clone().requires_grad_()
    head = CapturedOutput(h.detach())
    head.store_gradient(torch.autograd.grad(loss(h), h)[0])
    return infer_from_heads({"": head}, final=final)


def draws(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(32, 1), (32,), (16, 3), (8, 5, 2)])
@pytest.mark.parametrize("offset", [0.0, 7.5])
def test_squared_and_huber_errors_of_real_labels(seed, shape, offset):
    h, y = draws(seed, *shape), 2 * draws(seed + 100, *shape) + offset
    for loss in (F.mse_loss, F.huber_loss, lambda h, y: (h - y).square().sum()):
        if loss is F.huber_loss and offset:
            continue  # all gradients are -1, as those of a hinge
        decision = decide(h, lambda h, loss=loss: loss(h, y))
        assert decision.likelihood is not None, decision.reason
        assert decision.likelihood.name == "gaussian" and decision.likelihood.sigma == 1.0
        assert decision.warn and "Gaussian(sigma=...)" in decision.reason


def test_a_line_without_noise_is_a_regression():
    x = torch.linspace(-1, 1, 32)[:, None]
    for slope in (0.1, 1.5, 4.0):
        decision = decide(slope * x, lambda h: F.mse_loss(h, 2 * x + 0.3))
        assert decision.likelihood is not None and decision.likelihood.name == "gaussian"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_classifiers_of_other_losses_are_no_regressions(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    h, one = scale * draws(seed, 48, 4), scale * draws(seed, 48, 1)
    y = torch.randint(4, (48,), generator=generator)
    bits = torch.randint(2, (48, 1), generator=generator).double()
    advantage = draws(seed + 7, 48)

    def focal(h):
        log_p = F.log_softmax(h, 1).gather(1, y[:, None])[:, 0]
        return -((1 - log_p.exp()) ** 2 * log_p).mean()

    def binary_focal(h):
        p_label = torch.sigmoid(h * (2 * bits - 1))
        return -((1 - p_label) ** 2 * p_label.log()).mean()

    losses = {
        "focal": (h, focal),
        "policy gradient": (h, lambda h: (advantage * F.cross_entropy(h, y, reduction="none")).sum()),
        "squared error of softmax": (h, lambda h: F.mse_loss(h.softmax(1), F.one_hot(y, 4).float())),
        "margin": (h, lambda h: MARGIN(h, y)),
        "binary focal": (one, binary_focal),
        "hinge": (one, lambda h: (1 - h * (2 * bits - 1)).relu().mean()),
        "squared error of sigmoid": (one, lambda h: F.mse_loss(torch.sigmoid(h), bits.float())),
        "soft margin": (one, lambda h: torch.exp(-h * (2 * bits - 1)).mean()),
    }
    for name, (outputs, loss) in losses.items():
        assert decide(outputs, loss).likelihood is None, name


def test_few_outputs_are_undecided_until_the_last_batch():
    decision = decide(draws(0, 3, 1), lambda h: F.mse_loss(h, draws(1, 3, 1)))
    assert decision.likelihood is None and not decision.final


def test_one_read_output_of_several_may_be_a_regression():
    h, y = draws(0, 32, 2), draws(1, 32, 2)
    read, other = CapturedOutput(h, is_default=False), CapturedOutput(draws(2, 32, 3))
    read.store_gradient(h - y)
    decision = infer_from_heads({"other": other, "value": read}, final=False)
    assert decision.likelihood.name == "gaussian" and decision.path == "value" and decision.warn


def test_dimensions_over_which_a_gradient_sums_to_zero():
    g = draws(0, 6, 4, 5)
    assert zero_sum_dims(g, g) == []
    assert zero_sum_dims(g, g - g.mean(1, keepdim=True)) == [1]
    assert zero_sum_dims(g, g - g.mean(-1, keepdim=True)) == [-1]
