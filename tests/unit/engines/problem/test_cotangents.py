"""What is pulled back from the outputs for the bounds, and that parts of a report do not change it."""

import math

import pytest
import torch
from torch import nn

import fimprobe
from fimprobe.engines.problem.cotangents import curvature_cotangents, output_cotangents
from fimprobe.engines.problem.label_cotangents import label_cotangents
from fimprobe.engines.problem.problem import Problem, Request
from fimprobe.estimators import groups
from fimprobe.likelihoods import get_likelihood
from fimprobe.likelihoods.draws import Draws
from fimprobe.model.batch import Batch
from fimprobe.model.outputs import select_outputs
from fimprobe.model.twin import make_twin


def seeds_of(net, x, *, mask=None, probes=3, family="categorical"):
    problem = Problem(
        twin=make_twin(net),
        batch=Batch.of(x),
        likelihood=get_likelihood(family),
        draws=Draws(count=1, seed=0),
        select_outputs=select_outputs,
        mask=mask,
        memory_mb=512,
        diagonals=False,
        request=Request(i2=True, bounds=True, probes=probes),
    )
    rows = slice(0, len(x))
    h = problem.forward(problem.batch).detach()
    norms = problem.likelihood.norms(h, mask)
    labels = label_cotangents(problem, rows, h)
    return (
        h,
        output_cotangents(problem, rows, h, norms),
        curvature_cotangents(problem, rows, h, labels),
    )


def test_means_over_classes_are_mixed_from_one_vector(double):
    mask = torch.tensor([True, True, False, True, True])
    h, seeds, _ = seeds_of(nn.Linear(4, 6), torch.randn(5, 4), mask=mask)
    assert len(seeds.vectors) == 3 + 1 and seeds.combinations.shape == (5, 6, 4)
    mixed = seeds.combinations @ torch.stack(seeds.vectors, 1)
    signs = torch.stack(seeds.vectors[:3], 1)
    assert torch.equal(mixed[:, :3], signs) and (signs[mask].abs() == 1).all()
    torch.testing.assert_close(mixed[:, 3:], signs.mean(-1, keepdim=True).expand_as(signs))
    assert not mixed[2].any()  # left out by the mask


def test_at_several_positions_each_mean_is_a_seed_of_its_own(double):
    h, seeds, _ = seeds_of(nn.Linear(4, 6), torch.randn(5, 2, 4))
    assert seeds.combinations is None and len(seeds.vectors) == 6
    for u, mean in zip(seeds.vectors[:3], seeds.vectors[3:], strict=True):
        assert torch.equal(mean, u.mean(-1, keepdim=True).expand_as(u))


@pytest.mark.parametrize("probes", [8, 9])
def test_means_come_only_where_their_inner_products_are_kept(probes, double):
    _, seeds, _ = seeds_of(nn.Linear(4, 6), torch.randn(5, 4), probes=probes)
    assert (seeds.combinations is not None) == (probes == 8) and len(seeds.vectors) == 9


def test_hessians_take_signs_of_the_jacobian(double):
    """So that they are pulled back once."""
    _, outputs, bent = seeds_of(nn.Linear(4, 6), torch.randn(5, 4), probes=4)
    assert len(bent.vectors) == 1 + 2
    for mine, other in zip(bent.vectors[1:], outputs.vectors, strict=False):
        assert torch.equal(mine, other)


def numbers(tree):
    if isinstance(tree, dict):
        for name, value in tree.items():
            if "seconds" not in name and name != "advice":
                yield from ((f"{name}/{path}", x) for path, x in numbers(value))
    elif isinstance(tree, float) and math.isfinite(tree):
        yield "", tree


@pytest.mark.parametrize("draws", [1, 3, "exact"])
def test_a_report_is_the_same_whatever_groups_are_taken_together(draws, monkeypatch, double):
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(6, 4)

    def report():
        found = fimprobe.measure(net, x, likelihood="categorical", draws=draws)
        return dict(numbers(found.to_dict()))

    whole = report()
    monkeypatch.setattr(groups, "MAX_ELEMENTS", 1)
    each = report()
    assert len(whole) > 100 and each.keys() == whole.keys()
    for name, value in whole.items():
        assert each[name] == pytest.approx(value, rel=1e-12, abs=1e-300), name


def test_what_is_infinite_in_one_group_stays_out_of_the_others():
    class Record:
        def __init__(self, value):
            self.norms, self.number = torch.tensor([value]), value

    known = {"w": Record(math.inf), "v": Record(2.0), "u": Record(3.0)}
    members = groups.GroupSums({"w": ["w"], "v": ["v"], "vu": ["v", "u"], "all": ["w", "v", "u"]})
    want = [math.inf, 2.0, 5.0, math.inf]
    assert members.sum(known, "norms").flatten().tolist() == want
    assert members.sum_numbers(known, "number")[0].tolist() == want
