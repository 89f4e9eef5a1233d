"""Random numbers of an input: uniform, independent, and those of its number only."""

import torch

from fimprobe.fisher.sums.indexed_draws import IndexedDraws, indexed_uniforms


def test_they_are_uniform_and_independent():
    u = indexed_uniforms(7, torch.arange(20_000), (2, 2)).view(-1, 4)
    assert u.min() > 0 and u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 0.01 and (u.var(0) - 1 / 12).abs().max() < 0.002
    assert (torch.corrcoef(u.T) - torch.eye(4, dtype=torch.float64)).abs().max() < 0.03
    lagged = torch.corrcoef(torch.stack([u[1:, 0], u[:-1, 0]]))[0, 1]
    assert abs(lagged) < 0.03
    counts = torch.histc(u, 50, 0, 1)
    assert ((counts - counts.mean()).square().sum() / counts.mean()) < 90  # chi² of 49


def test_they_depend_on_seed_number_draw_and_position_only():
    indices = torch.tensor([5, 900, 2**41])
    u = indexed_uniforms(1, indices, (3, 4))
    assert torch.equal(indexed_uniforms(1, indices[1:2], (2, 2))[0], u[1, :2, :2])
    assert not torch.equal(indexed_uniforms(2, indices, (3, 4)), u)
    assert len(u.unique()) == u.numel()


def test_positions_have_a_stream_of_their_own():
    draws = IndexedDraws(count=2, seed=1, size_biased=True, indices=torch.arange(4))
    labels = draws.uniforms_for(slice(1, 3), 4, torch.Size([2, 5]))
    positions = draws.positions_for(slice(1, 3), 4)
    assert labels.shape == (2, 2, 5) and positions.shape == (2, 2)
    assert not torch.isin(positions, labels).any()
