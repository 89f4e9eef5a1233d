"""Checkpointed segments run as plain functions in one thread, for a time."""

import threading

import pytest
import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import nn
from torch.utils.checkpoint import checkpoint

from fimprobe.measurement.checkpointing import without_checkpoints

X = torch.randn(2, 3, requires_grad=True)


def is_plain(reentrant):
    """Whether a segment runs once only: forward and backward."""
    runs = []

    def segment(x):
        runs.append(x)
        return x.square().tanh()

    checkpoint(segment, X, use_reentrant=reentrant).sum().backward()
    return len(runs) == 1


def in_another_thread(function, *args):
    values = []
    thread = threading.Thread(target=lambda: values.append(function(*args)))
    thread.start()
    thread.join()
    return values[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_only_this_thread_runs_without(reentrant):
    assert not is_plain(reentrant)
    with without_checkpoints():
        assert is_plain(reentrant)
        with without_checkpoints():
            assert is_plain(reentrant)
        assert is_plain(reentrant)
        assert not in_another_thread(is_plain, reentrant)
    assert not is_plain(reentrant)


def test_torch_is_as_before_afterwards():
    generator = torch_checkpoint._checkpoint_without_reentrant_generator
    with pytest.raises(KeyError), without_checkpoints():
        raise KeyError
    assert torch_checkpoint._checkpoint_without_reentrant_generator is generator
    assert "apply" not in torch_checkpoint.CheckpointFunction.__dict__


def test_a_thread_that_stays_longer():
    entered, leave = threading.Event(), threading.Event()

    def stay():
        with without_checkpoints():
            entered.set()
            leave.wait()
            return is_plain(False), is_plain(True)

    values = []
    thread = threading.Thread(target=lambda: values.append(stay()))
    with without_checkpoints():
        thread.start()
        entered.wait()
    assert not is_plain(False) and not is_plain(True)
    leave.set()
    thread.join()
    assert values == [(True, True)]
    assert "apply" not in torch_checkpoint.CheckpointFunction.__dict__


def test_a_reentrant_segment_without_gradient_at_its_inputs_has_none():
    """As in training, where it leaves the parameters without a gradient."""
    layer = nn.Linear(3, 3)
    with without_checkpoints():
        assert not checkpoint(layer, X.detach(), use_reentrant=True).requires_grad
        assert checkpoint(layer, X.detach(), use_reentrant=False).requires_grad
        with torch.no_grad():
            assert not checkpoint(layer, X, use_reentrant=True).requires_grad


def test_the_forward_context_is_kept():
    seen = []

    class Noted:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            seen.append(self.name)

        def __exit__(self, *error):
            seen.append("left " + self.name)

    def contexts():
        return Noted("forward"), Noted("again")

    with without_checkpoints():
        checkpoint(torch.tanh, X, use_reentrant=False, context_fn=contexts).sum().backward()
    assert seen == ["forward", "left forward"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_interrupt_on_the_way_out_leaves_no_context_behind(reentrant, monkeypatch):
    generator = torch_checkpoint._checkpoint_without_reentrant_generator

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fimprobe.measurement.checkpointing._Switch.leave", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught, without_checkpoints():
            pass
    del caught  # its traceback holds the frame of the context
    assert not is_plain(reentrant)
    with without_checkpoints():
        assert is_plain(reentrant)
    assert not is_plain(reentrant)
    assert torch_checkpoint._checkpoint_without_reentrant_generator is generator
    assert "apply" not in torch_checkpoint.CheckpointFunction.__dict__
