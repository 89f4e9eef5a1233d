"""What a forward keeps on its modules is not used by the next evaluation."""

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.model.leftovers import dropping_leftovers


class KeepsBias(nn.Module):
    """Keeps a bias that it computes from a parameter, in eval mode only."""

    def __init__(self, place):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.table = nn.Parameter(torch.randn(5))
        self.place = place
        self.kept = {"dictionary": {}, "list": []}.get(place)

    def bias(self):
        computed = self.table[[0, 3, 3]] * 2
        if self.training or self.place == "nowhere":
            return computed
        if self.place == "dictionary":
            return self.kept.setdefault("cpu", computed)
        if self.place == "list":
            self.kept.append(computed)
            return self.kept[0]
        if self.kept is None:
            self.kept = computed
        return self.kept

    def forward(self, x):
        return torch.tanh(self.linear(x) + self.bias())


class Inside(nn.Module):
    def __init__(self, place):
        super().__init__()
        self.part, self.last = KeepsBias(place), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.part(x))


def squares(net, x, y):
    """Mean squared gradient of log N(y; h, 1) at a net in training mode, which keeps nothing."""
    net.train()
    result = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for sample, label in zip(x, y, strict=True):
        loss = 0.5 * (net(sample[None]) - label).square().sum()
        for name, g in zip(result, torch.autograd.grad(loss, list(net.parameters())), strict=True):
            result[name] += g.square() / len(x)
    return result


@pytest.mark.parametrize("make", [KeepsBias, Inside])
@pytest.mark.parametrize("place", ["dictionary", "list", "attribute"])
def test_kept_tensors_belong_to_one_evaluation(place, make):
    torch.manual_seed(0)
    net = make(place).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    y = torch.randn(6, 3 if make is KeepsBias else 2, dtype=torch.float64)
    net.train()
    options = {"likelihood": "gaussian", "labels": y, "diagonals": True}
    report = fimprobe.measure(net, x, estimators=["i1", "i2", "empirical"], **options)
    assert report.total.i2 is not None
    for name, expected in squares(net, x, y).items():
        diagonal = report.parameters[name].empirical.diagonal[name]
        torch.testing.assert_close(diagonal, expected, rtol=1e-9, atol=1e-12)
    kept = (net if make is KeepsBias else net.part).kept
    assert not kept  # nothing stays on the user's modules either


@pytest.mark.parametrize("second_order", [{"probes": 8}, "spot_checks"])
@pytest.mark.parametrize("make", [KeepsBias, Inside])
@pytest.mark.parametrize("place", ["dictionary", "list", "attribute"])
def test_second_derivatives_are_those_of_a_model_that_keeps_nothing(place, make, second_order):
    x = torch.randn(6, 4, dtype=torch.float64)
    reports = []
    for where in (place, "nowhere"):
        torch.manual_seed(0)
        net = make(where).double()
        reports.append(
            fimprobe.measure(
                net, x, likelihood="gaussian", estimators=["i1", "i2"], second_order=second_order
            )
        )
    kept, plain = reports
    variances = []
    for name, group in plain.parameters.items():
        other = kept.parameters[name].i2
        assert other.trace == pytest.approx(group.i2.trace, rel=1e-9)
        if group.i2.label_variance is None:  # lost in the noise of the probes
            assert other.label_variance is None
            continue
        variances.append(group.i2.label_variance)
        assert other.label_variance == pytest.approx(variances[-1], rel=1e-6), name
    assert max(variances) > 0


class ReadsInBackward(nn.Module):
    """A hook in its graph reads what the forward kept."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        self.kept = h = self.linear(x)
        if h.requires_grad:
            h.register_hook(lambda g: g + 0 * self.kept.detach().sum())
        return torch.tanh(h)


def test_what_a_forward_keeps_is_there_in_its_backward_pass():
    torch.manual_seed(0)
    net, x = ReadsInBackward().double(), torch.randn(6, 4, dtype=torch.float64)
    y = torch.randn(6, 3, dtype=torch.float64)
    options = {"likelihood": "gaussian", "labels": y, "diagonals": True}
    report = fimprobe.measure(net, x, estimators=["i1", "i2", "empirical"], **options)
    for name, expected in squares(net, x, y).items():
        diagonal = report.parameters[name].empirical.diagonal[name]
        torch.testing.assert_close(diagonal, expected, rtol=1e-9, atol=1e-12)


def test_what_was_there_before_stays():
    net = KeepsBias("attribute").eval()
    net.kept = kept = torch.randn(3)
    with dropping_leftovers(net):
        net(torch.randn(2, 4))
        net.linear.note = "text"
    assert net.kept is kept
    assert net.linear.note == "text"
