"""One sample has the gradient that it has in a batch, whatever torch computes for a batch of one."""

import torch
from torch import nn

import fimprobe
from fimprobe.model.batch_of_one import correct_gradient_of_one
from tests.models.cases import Lambda


def stem():
    """As in hybrids of convolutions and attention."""

    def f(self, x):
        y = self.parts[1](self.parts[0](x)).flatten(2).transpose(1, 2)
        y = y + torch.tanh(self.parts[2](y))
        return self.parts[3](y.square().mean(1))

    parts = nn.Conv2d(1, 3, 2, 2), nn.BatchNorm2d(3), nn.Linear(3, 3), nn.Linear(3, 3)
    return Lambda(f, *parts).eval()


def gradients(outputs, model, cotangent):
    return torch.autograd.grad((outputs * cotangent).sum(), list(model.parameters()))


def test_one_sample_alone_has_the_gradient_that_it_has_twice_in_a_batch(double):
    model, x, cotangent = stem(), torch.randn(1, 1, 8, 8), torch.randn(1, 3)
    expected = gradients(model(x.repeat(2, 1, 1, 1))[:1], model, cotangent)
    outputs = model(x)
    correct_gradient_of_one([outputs])
    for computed, known in zip(gradients(outputs, model, cotangent), expected, strict=True):
        torch.testing.assert_close(computed, known, rtol=1e-9, atol=1e-12)


def test_measured_by_rules_and_in_chunks_of_one(double):
    model, x = stem(), torch.randn(4, 1, 8, 8)
    total = 0.0
    for b in range(4):
        log_p = model(x[[b, b]])[0].log_softmax(-1)
        for y in range(3):
            squares = [
                g.square().sum()
                for g in torch.autograd.grad(log_p[y], list(model.parameters()), retain_graph=True)
            ]
            total += float(log_p[y].detach().exp() * sum(squares)) / 4
    for memory_mb in (512, 0.01):
        report = fimprobe.measure(
            model,
            x,
            likelihood="categorical",
            draws="exact",
            estimators=["i1"],
            bounds=False,
            memory_mb=memory_mb,
        )
        assert abs(report.total.i1.trace / total - 1) < 1e-9
        assert not any("replay" in how for how in report.coverage.values())
