"""Reports sent to an experiment tracker: Weights & Biases, MLflow, or anything with a ``log``.

The options ``wandb: true`` and ``mlflow: true`` log the numbers of the model. This sink shows how to
choose others, or another tracker. A sink is any object with ``write(report)`` and ``close()``;
``report.scalars()`` is a flat dict of finite numbers by tag. A sink that raises is dropped with one
warning, and training continues. Runs in a second:

    python examples/own_sink.py
"""

import re

import torch
from torch import nn

import fimprobe


class TrackerSink:
    """A sink: ``TrackerSink(wandb.init().log)`` or ``TrackerSink(mlflow.log_metrics)``."""

    def __init__(self, log, *, layers=None):
        self.log, self.layers = log, layers

    def write(self, report):
        """Log the finite numbers; MLflow and W&B both refuse brackets in their names."""
        values = report.scalars(layers=self.layers)
        self.log({re.sub(r"[^\w\-. /]", "_", k): v for k, v in values.items()}, step=report.step)

    def close(self):
        """Do nothing: the tracker finishes its run."""


def main():
    """Train a small net, and print the values that a tracker's ``log`` would receive."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def log(values, step):
        shown = ("fim/i1/rel_error", "fim/i2/rel_error", "fim_layers/2/i1_trace")
        print(f"step {step}: {len(values)} values, of which", {k: values[k] for k in shown})

    options = {"schedule": {"every": 10}, "draws": "exact", "tensorboard": False}
    with fimprobe.attach(model, sinks=[TrackerSink(log)], **options):
        for _ in range(30):
            optimizer.zero_grad()
            x = torch.randn(16, 6)
            nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
            optimizer.step()


if __name__ == "__main__":
    main()
