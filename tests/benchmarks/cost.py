"""What a measurement costs, beside peers, as ratios to one forward+backward.

python tests/benchmarks/cost.py [--rounds 15] [--ours-only] [--smooth] [--only MLP]
Interleaved medians in one process. Rows name what they yield. ``--smooth`` takes GELU for ReLU in the
MLP and the CNN: where layers are piecewise linear, second derivatives within them vanish.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fimprobe
from fimprobe.engines.problem import Plan

warnings.filterwarnings("ignore")


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), torch.randn(256, 784)


def cnn() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for channels_in, channels_out in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10)), torch.randn(64, 3, 32, 32)


def gpt2(tied: bool) -> tuple[nn.Module, Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=4,
        n_embd=128,
        n_head=4,
        vocab_size=1000,
        n_positions=64,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = GPT2LMHeadModel(config)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.lm(tokens).logits

    return Logits(), torch.randint(1000, (8, 64))


def labels_of(h: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=h.detach()).sample()


def loss_of(h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h.flatten(0, -2), y.flatten(), reduction="sum")


def plain(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        h = model(x)
        loss_of(h, labels_of(h)).backward()

    return run


def ours(**options: Any) -> Callable[[nn.Module, Tensor], Callable[[], None]]:
    def make(model: nn.Module, x: Tensor) -> Callable[[], None]:
        plan = Plan()
        settings = {"estimators": ["i1"], "bounds": False, "plan": plan} | options
        return lambda: fimprobe.measure(model, x, likelihood="categorical", **settings)

    return make


def smooth(model: nn.Module) -> nn.Module:
    for name, child in model.named_children():
        if isinstance(child, nn.ReLU):
            setattr(model, name, nn.GELU())
    return model


def vmap_grad(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def loss(params: dict[str, Tensor], one: Tensor, y: Tensor) -> Tensor:
        return loss_of(functional_call(model, params, (one[None],)), y[None])

    def run() -> None:
        params = {n: p.detach() for n, p in model.named_parameters()}
        with torch.no_grad():
            y = labels_of(model(x))
        grads = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
        for g in grads.values():
            g.square_().sum(0)

    return run


def backpack_square(model: nn.Module, x: Tensor) -> Callable[[], None]:
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    if any("Conv1D" in type(m).__name__ or isinstance(m, nn.LayerNorm) for m in model.modules()):
        raise NotImplementedError("skips LayerNorm and transformers' Conv1D")
    extend(model)
    loss_layer = extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> None:
        model.zero_grad(set_to_none=True)
        h = model(x)
        with backpack(SumGradSquared()):
            loss_layer(h, labels_of(h)).backward()

    return run


def backpack_hessian(model: nn.Module, x: Tensor) -> Callable[[], None]:
    from backpack import backpack, extend
    from backpack.extensions import BatchDiagHessian

    if not isinstance(model, nn.Sequential):
        raise NotImplementedError("no second order for these layers")
    if any(isinstance(m, nn.GELU) for m in model):
        raise NotImplementedError("no second order for GELU")
    extend(model)
    loss_layer = extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> None:
        model.zero_grad(set_to_none=True)
        h = model(x)
        with backpack(BatchDiagHessian()):
            loss_layer(h, labels_of(h)).backward()

    return run


def nngeometry_diagonal(model: nn.Module, x: Tensor) -> Callable[[], None]:
    from nngeometry.metrics import FIM_MonteCarlo
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader, TensorDataset

    if not isinstance(model, nn.Sequential):
        raise NotImplementedError("knows no transformers' Conv1D")
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), batch_size=len(x))

    def run() -> None:
        FIM_MonteCarlo(
            model=model,
            loader=loader,
            representation=PMatDiag,
            variant="classif_logits",
            trials=1,
            device="cpu",
            function=lambda *batch: model(batch[0]),
        )

    return run


SLOW = 10.0
"""Seconds above which a row is timed once."""


def interleaved(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 2):
        for name, run in runs.items():
            if times[name] and times[name][0] > SLOW:
                continue
            start = time.perf_counter()
            run()
            taken = time.perf_counter() - start
            if i >= 2 or taken > SLOW:
                times[name].append(taken)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--smooth", action="store_true")
    parser.add_argument("--only", default="", help="problems whose name holds this")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    problems = {
        "MLP 784-512-512-10, B=256": mlp,
        "CNN 3 conv, 32x32x3, B=64": cnn,
        "GPT-2 4 layers d=128 T=64 V=1000 B=8, untied": lambda: gpt2(False),
        "GPT-2 the same, tied": lambda: gpt2(True),
    }
    problems = {name: make for name, make in problems.items() if options.only in name}
    second = {"estimators": ["i1", "i2"], "draws": 1, "memory_mb": 4096}
    makers: dict[str, Callable[[nn.Module, Tensor], Callable[[], None]]] = {
        "forward+backward": plain,
        "fimprobe S=1, A2 A4 Q": ours(draws=1),
        "fimprobe S=2, A2 A4 Q": ours(draws=2),
        "fimprobe S=1, I1 and I2, K=2": ours(**second),
        "fimprobe S=1, I1 and I2, exact (BackPACK)": ours(**second, second_order="exact"),
        "fimprobe S=1, (17) and (18), K=2": ours(**second, bounds=True),
        "BackPACK SumGradSquared, A2": backpack_square,
        "BackPACK BatchDiagHessian": backpack_hessian,
        "torch.func vmap(grad), A2": vmap_grad,
        "nngeometry Monte Carlo diagonal, A2": nngeometry_diagonal,
    }
    if options.ours_only:
        makers = {n: m for n, m in makers.items() if n.startswith(("fimprobe", "forward"))}
    for title, make in problems.items():
        torch.manual_seed(0)
        _, x = make()
        runs, missing = {}, {}
        for name, maker in makers.items():
            model = make()[0].eval()
            model = smooth(model) if options.smooth else model
            try:
                run = maker(model, x)
                run()
                runs[name] = run
            except Exception as error:  # a peer that cannot is a row that says so
                missing[name] = f"{type(error).__name__}: {str(error)[:60]}"
        times = interleaved(runs, options.rounds)
        unit = statistics.median(times["forward+backward"])
        print(f"\n{title}: forward+backward {1e3 * unit:.1f} ms")
        for name, seconds in times.items():
            low, mid, high = min(seconds), statistics.median(seconds), max(seconds)
            print(f"  {name:42s} {mid / unit:6.2f}   ({low / unit:.2f} – {high / unit:.2f})")
        for name, why in missing.items():
            print(f"  {name:42s}   none  ({why})")


if __name__ == "__main__":
    main()
