"""What a process does that left the others, and how long it waits for them to join."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from fimprobe import FimprobeError
from fimprobe.distributed import processes


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield processes.GlooProcessGroup(timeout_seconds=5)
    dist.destroy_process_group()


def test_a_process_that_left_sends_nothing(group):
    assert group.run_everywhere(lambda: 7) == [7]
    group.leave()
    group.leave()
    x = torch.ones(2)
    for act in (
        lambda: group.run_everywhere(list),
        lambda: group.add_tensors([x]),
        group.weights_group,
    ):
        with pytest.raises(FimprobeError, match="left the measurements.*Attach again"):
            act()
    with pytest.raises(ValueError, match="the cause"):
        group.run_everywhere(lambda: int("the cause"))
    assert dist.is_initialized() and torch.equal(x, torch.ones(2))


def test_leaving_after_the_end_of_torch_distributed_is_no_error():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = processes.GlooProcessGroup(timeout_seconds=5)
    dist.destroy_process_group()
    group.leave()


def test_a_store_that_does_not_answer_is_not_waited_for(group, monkeypatch):
    end = threading.Event()
    monkeypatch.setattr(processes, "_join_all", end.wait)
    monkeypatch.setattr(processes, "JOIN_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    started = time.perf_counter()
    with pytest.raises(FimprobeError, match="not formed within 0.1 s.*hosts the store"):
        processes.join_processes()
    assert time.perf_counter() - started < 5
    end.set()
