"""Runs on disk, as a probed training writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fimprobe
from fimprobe.probe.probe import Probe


def deep_net(layers: int = 2, bias: float = 0.0) -> nn.Sequential:
    """Linear layers of width four; ``bias`` makes the net sure of its first class."""
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    with torch.no_grad():
        net[-1].bias[0] += bias
    return net


def write_run(
    folder: Path,
    make_net: Callable[[], nn.Sequential] = deep_net,
    *,
    reports: int = 3,
    size: int = 8,
    scale: float = 1.1,
    **options: Any,
) -> Probe:
    """A probed training into ``folder``: each step multiplies the first weight by ``scale``."""
    torch.manual_seed(0)
    net = make_net()
    defaults = {
        "draws": 2, "tensorboard": False, "jsonl": str(folder / "fimprobe.jsonl"),
        "likelihood": "categorical",
    }  # fmt: skip
    with fimprobe.attach(net, **(defaults | options)) as probe:
        for _ in range(reports):
            probe.step(torch.randn(size, 4))
            with torch.no_grad():
                net[0].weight *= scale
    return probe
