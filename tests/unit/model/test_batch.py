"""Batches: the leaves of inputs, with and without a search of containers."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fimprobe.model.batch import Batch, flatten_arguments, unflatten_arguments

X, Y = torch.randn(4, 3), torch.randn(4)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {"x": X}),
        ((X,), {}),
        ((X, Y), {}),
        ((X, None, 2), {}),
        (([X, Y], {"y": Y}), {"mask": X, "flag": True}),
        ((torch.nn.Parameter(X),), {}),
    ],
)
def test_leaves_are_those_of_a_search_and_come_back_in_place(args, kwargs):
    leaves, structure = flatten_arguments(args, kwargs)
    searched = tree_leaves((args, kwargs))
    assert len(leaves) == len(searched) and all(a is b for a, b in zip(leaves, searched))
    back = unflatten_arguments(leaves, structure)
    assert type(back[0]) is tuple and type(back[1]) is dict and list(back[1]) == list(kwargs)
    assert all(a is b for a, b in zip(tree_leaves(back), searched))
    batch = Batch.of_call(args, kwargs)
    mapped = tree_leaves(batch[1:3].map_tensors(lambda x: 2 * x))
    for x, original in zip(mapped, searched):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, 2 * original[1:3])
        else:
            assert x is original
