"""What tracking every n-th step costs a training loop: fimprobe beside Cockpit.

python tests/benchmarks/overhead.py [--rounds 3] [--only MLP]

The same network, data and optimizer, one loop for each of: nothing, Cockpit ("economy", its cheapest
configuration), fimprobe as it comes, and fimprobe with Î₁ alone on the whole batch. Blocks of steps
are interleaved; printed are medians of block time over the plain loop's block of the same round.
Where Cockpit does not run, its published figures stand in its place, named so.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import statistics
import tempfile
import warnings
from collections.abc import Callable

import torch
from clock import machine, seconds, versions
from problems import FULL, Problem, make_problem
from torch import Tensor, nn
from truth import reason

import fimprobe

INTERVALS = (1, 4, 16, 64, 256)

PUBLISHED = dict(
    zip(INTERVALS, ("1.5 – 4.2", "1.2 – 1.9", "1.04 – 1.3", "1.02 – 1.09", "1.00 – 1.04"))
)
"""Cockpit's own figures for its cheapest configuration (Schneider, Dangel & Hennig 2021)."""

LEAST_STEPS = 2
"""Steps of a block at least: one step of some milliseconds is not timed alone."""

SLOW = 3.0
"""Seconds of a block above which it is timed once."""

WARM = 3
"""Steps before: fimprobe's first probe is made at the second one in any case, with its checks."""

Step = Callable[[], object]


class Loop:
    """A network of its own that is trained on batches of its own, step by step."""

    def __init__(self, problem: Problem) -> None:
        self.model = copy.deepcopy(problem.model).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        classes = problem.model(problem.x[:1]).shape[-1]
        generator = torch.Generator().manual_seed(0)
        self.data = [
            (problem.x[torch.randperm(len(problem.x), generator=generator)], labels)
            for labels in torch.randint(classes, (8, len(problem.x)), generator=generator)
        ]
        self.count = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        self.count += 1
        return self.data[self.count % len(self.data)]

    def step(self) -> None:
        x, y = self.batch()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()


def plain(problem: Problem, interval: int, stack: contextlib.ExitStack) -> Step:
    return Loop(problem).step


def cockpit(problem: Problem, interval: int, stack: contextlib.ExitStack) -> Step:
    from backpack import extend
    from cockpit import Cockpit
    from cockpit.utils import schedules
    from cockpit.utils.configuration import configuration

    loop = Loop(problem)
    model, loss = extend(loop.model), extend(nn.CrossEntropyLoss())
    each = nn.CrossEntropyLoss(reduction="none")
    schedule = schedules.linear(interval=interval)
    tracked_steps = itertools.count()  # its update size asks for step 0 first
    tracker = Cockpit(model.parameters(), quantities=configuration("economy", schedule))

    def step() -> None:
        x, y = loop.batch()
        loop.optimizer.zero_grad()
        h = model(x)
        total = loss(h, y)
        told = {
            "batch_size": len(x),
            "individual_losses": each(h, y).detach(),
            "loss": total,
            "optimizer": loop.optimizer,
        }
        number = next(tracked_steps)
        with tracker(number, info=told):
            total.backward(create_graph=tracker.create_graph(number))
        loop.optimizer.step()

    return step


def ours(**options: object) -> Callable[[Problem, int, contextlib.ExitStack], Step]:
    def make(problem: Problem, interval: int, stack: contextlib.ExitStack) -> Step:
        loop = Loop(problem)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        probe = fimprobe.attach(
            loop.model,
            optimizer=loop.optimizer,
            likelihood="categorical",
            schedule={"every": interval},
            tensorboard={"log_dir": folder, "figures": False},  # drawn at reports 4, 8, 16, ...
            on_error="raise",
            **options,
        )
        stack.callback(probe.detach)
        return loop.step

    return make


MAKERS = {
    "Cockpit, economy": cockpit,
    "**fimprobe, all defaults but the schedule and pictures** (Î₁, Î₂, bounds; 32 inputs)": ours(),
    "**fimprobe, Î₁, S=1, the whole batch**": ours(
        estimators=["i1"], draws=1, bounds=False, batch=1 << 20
    ),
}


def block_ratio(make: Callable, problem: Problem, interval: int, rounds: int) -> str:
    """Median (least – most) of the tracked block's time over the plain block's before it."""
    steps = max(interval, LEAST_STEPS)
    with contextlib.ExitStack() as stack:
        bare, tracked = plain(problem, interval, stack), make(problem, interval, stack)

        def block(step: Step) -> Callable[[], None]:
            return lambda: [step() for _ in range(steps)] and None

        for _ in range(WARM):
            bare(), tracked()
        pairs: list[tuple[float, float]] = []
        while len(pairs) < rounds and not (pairs and pairs[0][1] > SLOW):
            pairs.append((seconds(block(bare)), seconds(block(tracked))))
    units, times = zip(*pairs)
    each = [t / u for u, t in zip(units, times)]
    middle = statistics.median(times) / statistics.median(units)
    return f"{middle:.2f} ({min(each):.2f} – {max(each):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="problems whose name holds this")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"{machine()}.\n{versions(['cockpit-for-pytorch', 'backpack-for-pytorch'])}.")
    print("Time of a step over one of the loop without tracking, by tracking interval.")
    print(f"\n| | {' | '.join(map(str, INTERVALS))} |\n|---|{'---|' * len(INTERVALS)}")
    for name in [n for n in FULL if options.only in n and not n.startswith("GPT")]:
        problem = make_problem(name)
        for title, make in MAKERS.items():
            try:
                cells = [block_ratio(make, problem, n, options.rounds) for n in INTERVALS]
            except Exception as error:  # its own requirements may not fit this torch
                print(f"| {name}: {title} | {reason(error)} |{' |' * (len(INTERVALS) - 1)}")
                continue
            print(f"| {name}: {title} | {' | '.join(cells)} |", flush=True)
    print(f"| Cockpit, published | {' | '.join(PUBLISHED.values())} |")


if __name__ == "__main__":
    main()
