"""Shared by all tests."""

import gc
import os

import pytest
import torch

from fimprobe.estimators import reliability
from fimprobe.torchvision_compat import hide_broken_torchvision

# BackPACK, which the tests need, installs a torchvision that breaks transformers on a CPU
hide_broken_torchvision()

# the tensors are tiny: threads would wait for each other, far longer where other programs run
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads it when it is first imported: its kernels then run on the CPU
os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
# lines that are printed are not broken; readline, which pytest imports, sets it past os.environ
os.environ.pop("COLUMNS", None)
os.unsetenv("COLUMNS")


def pytest_collection_finish():
    """Freeze what the imports left: it stays, and garbage collections would visit it every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh():
    """A fixed seed; float32 as the default type and the environment as before, whatever a test set.

    Lightning leaves LOCAL_RANK behind, by which Accelerate takes a process for one of several.
    """
    torch.manual_seed(0)
    before = dict(os.environ)
    yield
    torch.set_default_dtype(torch.float32)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def double():
    """float64 as the default type."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def raw_numbers(monkeypatch):
    """Every number as it was computed: batches of tests are too small for errors to be claimed."""
    monkeypatch.setattr(reliability, "withhold", lambda estimate, **_: estimate)
