"""The outputs that a loss may read, as what the model returns and its graph show them."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fimprobe.errors import FimprobeError
from fimprobe.training.likelihood_inference.heads import (
    MAX_HEADS,
    find_feeds,
    find_heads,
    find_other_heads,
)

Pair = namedtuple("Pair", "logits aux")


@dataclass
class Record:
    scores: torch.Tensor
    rest: list


def outputs():
    x = torch.randn(4, 3)
    hidden = nn.Linear(3, 5)(x)
    return hidden, nn.Linear(5, 2)(hidden), nn.Linear(5, 2)(hidden)


def test_names_of_outputs():
    hidden, a, b = outputs()
    loss = a.sum()
    for returned, names in [
        ((loss, a, b), ["1", "2"]),
        (Pair(a, b), ["logits", "aux"]),
        ({"x": a, "more": {"y": b}, "seen": torch.ones(4)}, ["x", "more.y"]),
        (Record(scores=a, rest=[b, 0.5, None]), ["scores", "rest.0"]),
        ([a, b, a], ["0", "1"]),
    ]:
        assert list(find_heads(returned, None)) == names
    assert find_heads(a, None) == {"": a} and find_heads((loss, a), None) == {"": a}
    assert list(find_heads((hidden, a, b), lambda out: out[1:])) == ["0", "1"]
    assert find_heads((hidden, a, b), lambda out: out[2]) == {"": b}
    with pytest.raises(FimprobeError, match="no logits"):
        find_heads({"loss": loss}, None)


def test_the_graph_shows_what_feeds_what():
    hidden, a, b = outputs()
    p = a.softmax(1)
    halves = dict(zip("lr", hidden.chunk(2, 1), strict=True))
    feeds = find_feeds({"h": hidden, "a": a, "b": b, "p": p, **halves})
    assert feeds["h"] == {"a", "b", "p", "l", "r"} and feeds["a"] == {"p"}
    assert not feeds["b"] and not feeds["p"] and not feeds["l"] and not feeds["r"]


def test_outputs_beside_the_measured_ones():
    hidden, a, b = outputs()
    p, detached = a.softmax(1), b.detach()
    returned = {"h": hidden, "a": a, "p": p, "b": b, "q": b.exp(), "d": detached}
    assert list(find_other_heads(returned, {"": a})) == ["q"]
    assert find_other_heads(a, {"": a}) == {} and find_other_heads((a,), {"": a}) == {}


def test_of_many_outputs_the_last_of_the_graph_are_examined():
    hidden = [torch.randn(2, 3, requires_grad=True) * 1]
    for _ in range(2 * MAX_HEADS):
        hidden.append(hidden[-1] * 2)
    heads = find_heads((*hidden, hidden[-1].exp(), hidden[-1].sin()), None)
    assert len(heads) == MAX_HEADS
    assert {str(len(hidden)), str(len(hidden) + 1)} <= set(heads)
