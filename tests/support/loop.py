"""A plain training loop of a small network, and the report that a probe in it must give."""

import re

import pytest
import torch
import torch.nn.functional as F

import fimprobe

EVERY = {
    "schedule": {"every": 1},
    "tensorboard": False,
    "on_error": "raise",
    "estimators": ["i1"],
    "bounds": False,
}


KNOWN = {**EVERY, "likelihood": "categorical"}


def data(step=0, count=12, classes=3):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(count, 4, generator=generator)
    return x, torch.randint(classes, (count,), generator=generator)


def backward(model, step=0):
    x, y = data(step)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def train(model, steps, optimizer=None, first=0):
    optimizer = optimizer or sgd(model)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


FIELDS = ("trace", "norm", "label_variance", "label_variance_error", "input_variance",
          "total_variance", "std_error", "rel_error", "effective_inputs", "total_label_variance",
          "total_label_variance_error")  # fmt: skip


def equal(report, want, *, known=True):
    """Same step, same parameters, same numbers (up to rounding), the same left out for one reason.

    ``known``: an error is claimed for the whole model, so that it was compared.
    """
    assert (report.step, report.batch_size, report.draws) == (want.step, want.batch_size, want.draws)
    assert (report.label_sampling, report.seen_mass) == (want.label_sampling, want.seen_mass)
    assert list(report.parameters) == list(want.parameters)
    groups = [(n, g, want.parameters[n]) for n, g in report.parameters.items()]
    for name, group, its_group in [*groups, ("total", report.total, want.total)]:
        for kind in ("i1", "i2"):
            one, other = getattr(group, kind), getattr(its_group, kind)
            assert (one is None) == (other is None)
            if one is not None:
                equal_estimates(one, other, (name, kind))
    errors = (report.total.i1.std_error, report.total.i1.rel_error)
    assert (None not in errors) == known


def equal_estimates(one, other, where):
    assert words(one) == words(other), where
    assert (one.pair_variance is None) == (other.pair_variance is None), where
    pairs = [] if one.pair_variance is None else ["fourth", "square", "norm_square"]
    for field in (*FIELDS, *pairs):
        mine, its = (getattr(e.pair_variance if field in pairs else e, field) for e in (one, other))
        assert (mine is None) == (its is None), (where, field)
        rel = 1e-3 if field == "input_variance" else 1e-4  # a difference of float32 sums
        assert mine is None or mine == pytest.approx(its, rel=rel, abs=1e-9), (where, field)
    for labels in (1, 3, None):
        mine, its = (e.error_of(inputs=9, labels=labels) for e in (one, other))
        assert (mine is None) == (its is None), (where, labels)
        assert mine is None or mine == pytest.approx(its, rel=1e-3, abs=1e-9), (where, labels)


def words(estimate):
    """Why numbers are not known, but for the numbers in it."""
    return {name: re.sub(r"[-+.\d]+(e[-+]?\d+)?", "#", why) for name, why in estimate.unknown.items()}


def expected(model, inputs, step, **options):
    """What the probe must report: one measurement of this model with the step's seed."""
    options = {"likelihood": "categorical", "estimators": ("i1",), "bounds": False, **options}
    options |= {"seed": 1_000_003 * step, "step": step}
    return fimprobe.measure(model, inputs, **options)
