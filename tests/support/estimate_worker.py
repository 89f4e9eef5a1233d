"""Processes that estimate over a data set: one that is killed, several that share the data."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

import fimprobe
from tests.models.digits import confident_mlp, digits


class SlowDigits(Dataset):
    """Images that take a while to read."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, seconds: float) -> None:
        self.images, self.labels, self.seconds = images, labels, seconds

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        time.sleep(self.seconds)
        return self.images[i], self.labels[i]


def results(fisher: fimprobe.Fisher) -> dict[str, Any]:
    """What two estimates must have in common, for ``torch.save``."""
    tensors = {f"diagonal {n}": x for n, x in fisher.diagonal.items()}
    tensors |= {f"error {n}": x for n, x in fisher.std_error.items()}
    kept = ("inputs", "labels", "end", "input_sampling", "batches")
    return {**tensors, "rel_error": fisher.rel_error, **{k: fisher.metadata[k] for k in kept}}


def write_problem(path: Path) -> None:
    """Save the trained network and the digits: its processes need not train it again."""
    torch.save((confident_mlp(), *digits()), path)


def estimate_slowly(
    problem: Path, out: Path, state: Path | None, options: dict[str, Any], seconds: float
) -> None:
    """Estimate from a state file, and write the results where it is not killed before."""
    torch.set_num_threads(1)
    model, images, labels = torch.load(problem, weights_only=False)
    loader = DataLoader(SlowDigits(images[:600], labels[:600], seconds), batch_size=32)
    fisher = fimprobe.estimate(model, loader, likelihood="categorical", state=state, **options)
    torch.save(results(fisher), out)


def estimate_together(rank: int, size: int, port: int, folder: str) -> None:
    """Estimate in several processes: data that they share, and shards."""
    torch.set_num_threads(1)
    model, images, _ = torch.load(Path(folder, "problem"), weights_only=False)
    model, images = model.double(), images.double()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=size)
    ranks = fimprobe.join_processes()
    for name, data, options in cases(images):
        shard = data[rank::size] if isinstance(data, list) else data
        fisher = fimprobe.estimate(model, shard, ranks=ranks, **options)
        torch.save(results(fisher), Path(folder, f"{name} {rank}"))
        state = Path(folder, f"state {name}")
        for limit in (1e-9, 1e-9, None):  # each of the first ones ends after a batch
            resumed = fimprobe.estimate(
                model,
                shard,
                ranks=ranks,
                state=state,
                max_seconds=limit,
                **options,
            )
        same = all(
            torch.equal(x, results(fisher)[key]) if isinstance(x, torch.Tensor) else True
            for key, x in results(resumed).items()
        )
        Path(folder, f"resumed {name} {rank}").write_text(str(same))
    try:
        bad = [torch.zeros(4, 3, dtype=torch.float64)] if rank else [images[:4]]
        fimprobe.estimate(model, bad, ranks=ranks, likelihood="categorical")
    except fimprobe.FimprobeError as error:
        Path(folder, f"error {rank}").write_text(str(error))
    dist.destroy_process_group()


def cases(images: torch.Tensor) -> list[tuple[str, Any, dict[str, Any]]]:
    """Name, data and options of estimates that must not depend on the number of processes."""
    x = images[:700]
    exact = {"likelihood": "categorical", "rel_error": 1e-9, "draws": "exact"}
    drawn = {"likelihood": "categorical", "rel_error": 0.02, "draws": 2}
    stopped = {"likelihood": "categorical", "rel_error": 0.3, "input_sampling": "uniform"}
    trace = {"likelihood": "categorical", "rel_error": 0.1, "input_sampling": "trace"}
    return [
        ("exact", x, exact),
        ("all", x, drawn | {"input_sampling": "uniform"}),
        ("stopped", x, stopped),
        ("trace", x, trace),
        ("at most", x, drawn | {"input_sampling": "uniform", "max_inputs": 301}),
        ("shards", [*x.split(64)], drawn),
    ]
