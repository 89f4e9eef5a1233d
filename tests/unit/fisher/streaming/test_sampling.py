"""Inputs drawn in proportion to τ: unbiased, and used where it pays."""

import pytest
import torch

from fimprobe.errors import FimprobeError
from fimprobe.fisher.streaming.batches import IndexedSource
from fimprobe.fisher.streaming.sampling import Pilot, TraceSampler
from fimprobe.fisher.sums.measurer import Measurer
from fimprobe.likelihoods import Categorical
from fimprobe.model.batch import Batch
from tests.models.small import mlp
from tests.oracles.fisher_diagonal import flat, input_diagonals


def test_inputs_are_drawn_in_proportion():
    sampler = TraceSampler(expected=torch.tensor([0.0, 1.0, 3.0, 0.0]).double(), seed=0)
    drawn = sampler.draw(torch.arange(8000))
    counts = drawn.bincount(minlength=4)
    assert counts[0] == counts[3] == 0 and abs(int(counts[1]) - 2000) < 150
    assert torch.equal(sampler.draw(torch.arange(17, 20)), drawn[17:20])
    assert sampler.mean == 1


@pytest.mark.parametrize("draws", [None, 1, 2])
def test_weighted_inputs_are_unbiased(double, draws):
    """Each input as often as it is drawn on average: the sum is that of the data set."""
    x, model = torch.randn(12, 4), mlp()
    measurer = Measurer(model=model, likelihood=Categorical(), output=None, memory_mb=64, seed=0)
    expected = measurer.expected(Batch.of(x), None)
    mean = float(expected.mean())
    truth = input_diagonals(model, x)
    repeats = 1 if draws is None else 4000
    total = 0
    for b in range(len(x)):
        rows = x[b].expand(repeats, 4)
        moments = measurer.moments(Batch.of(rows), None, torch.arange(repeats), draws, mean)
        a = flat({n: m.a2 for n, m in moments.parameters.items()}) / (repeats * (draws or 1))
        weight = mean / float(expected[b])
        torch.testing.assert_close(
            a.sum(), truth[b].sum() * weight, rtol=1e-9 if draws is None else 0.05, atol=0
        )
        total = total + a / weight / len(x)
    assert float((total - truth.mean(0)).norm() / truth.mean(0).norm()) < (0.03 if draws else 1e-9)


def test_batches_are_shared_and_skipped():
    x = torch.arange(50.0).unsqueeze(1)
    source = IndexedSource(x, 4, collate=None, seed=0)
    sampler = TraceSampler(expected=torch.ones(50, dtype=torch.float64), seed=0)
    alone = [b for b, _ in zip(sampler.batches(source, 0, 1, 0), range(48), strict=False)]
    shared = [list(zip(sampler.batches(source, r, 2, 0), range(24), strict=False)) for r in (0, 1)]
    for number, batch in enumerate(alone):
        other = shared[number % 2][number // 2][0]
        assert torch.equal(batch.raw, other.raw) and torch.equal(batch.indices, other.indices)
    for skip in (1, 15, 16, 33):
        first = next(sampler.batches(source, 0, 1, skip))
        assert torch.equal(first.raw, alone[skip].raw)
        assert torch.equal(first.indices, alone[skip].indices)


def test_a_certain_model_is_refused():
    with pytest.raises(FimprobeError, match="certain for every input"):
        TraceSampler(expected=torch.zeros(3, dtype=torch.float64), seed=0)


def test_drawing_pays_where_few_inputs_carry_f():
    heavy = Pilot(inputs=100, expected=1.0, square=100.0, single=120.0, label=0.0)
    assert heavy.pays(0.01, 0.1, 10_000, 2)
    assert not heavy.pays(0.01, 0.1, 10**9, 2)  # the pass over the data costs more
    even = Pilot(inputs=100, expected=100.0, square=2.0, single=2.0, label=0.0)
    assert not even.pays(0.01, 0.1, 10_000, 2)
    assert not heavy.pays(0.0, 0.1, 10_000, 2)
