"""One process of a Trainer's training by two; started with the environment that torchrun sets."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fimprobe.integrations.huggingface import FimProbeCallback
from tests.support.huggingface import trainer_of
from tests.support.processes import torchrun_environment


def main(rank: int, port: int, out: Path) -> None:
    """Train with a probe; write the reports, the steps logged and whether this process has a folder."""
    os.environ.update(torchrun_environment(rank, 2, port))
    torch.set_num_threads(1)
    probing = FimProbeCallback(schedule={"every": 3}, estimators="i1", bounds=False)
    trainer = trainer_of(out / "out", probing, ddp_backend="gloo")
    trainer.train()
    logged = [x["step"] for x in trainer.state.log_history if "fim/i1/trace" in x]
    reports = [(r.step, r.batch_size, r.total.i1.trace) for r in probing.probe.history]
    with open(out / f"rank{rank}", "w") as file:
        print(reports, logged, probing.probe.log_dir is not None, file=file)
    torch.distributed.destroy_process_group()  # left alive, gloo may abort at exit
