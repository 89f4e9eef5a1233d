"""Shared by all tests."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _fresh():
    """A fixed seed, and float32 as the default type whatever a test set."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def double():
    """float64 as the default type."""
    torch.set_default_dtype(torch.float64)
