"""A small measurement, of which one option is tried at a time."""

import torch

import fimprobe
from tests.models.small import mlp

SIZE = 5


LABELS = torch.tensor([0, 1, 2, 0, 1])


def inputs():
    return torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(1))


def measure(model=None, **options):
    return fimprobe.measure(
        model or mlp(hidden=5), inputs(), **{"likelihood": "categorical", **options}
    )


def numbers(report):
    shown = report.to_dict()
    return {k: shown[k] for k in ("total", "layers", "parameters")}
