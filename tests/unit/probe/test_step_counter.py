"""Optimizer steps are counted without those that the device skips, and the device is rarely read."""

import torch

from fimprobe.probe.step_counter import StepCounter
from fimprobe.training.schedule import At, Every


def counted(found_inf):
    """A counter after one step for each of the answers."""
    counter = StepCounter(0)
    for answer in found_inf:
        counter.record_skip(torch.tensor(answer), same=False)
        counter.upper_bound += 1
    return counter


def test_skipped_steps_are_not_counted():
    counter = counted([0.0, 1.0, 0.0])
    assert counter.has_unread_skips and counter.upper_bound == 3
    assert counter.read() == counter.read() == 2 and not counter.has_unread_skips


def test_the_device_is_read_only_if_the_step_could_be_due():
    counter = counted([1.0])
    assert not counter.is_due(Every(2)) and counter.has_unread_skips
    assert not counter.is_due(At([1])) and not counter.has_unread_skips
    assert counter.is_due(Every(2))


def test_the_count_of_the_loop_replaces_the_own_one():
    counter = counted([1.0, 1.0])
    counter.set(10)
    assert counter.read() == 10 and not counter.has_unread_skips
