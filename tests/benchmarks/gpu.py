"""The goals on one GPU, in one table: cost, memory, the kernel's rate, synchronisations, precision.

python tests/benchmarks/gpu.py            on an NVIDIA GPU of compute capability 8.0 or more
python tests/benchmarks/gpu.py --cpu      a dry run of every line at tiny sizes; its figures mean nothing

Times are medians of interleaved rounds in one process. Models have random weights: GPT-2's 124M
configuration and a decoder of 1.3B parameters, in bfloat16 where no other type is named.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """What is run: a small and a large decoder on ``batch`` × ``length`` tokens.

    ``rounds`` times, after ``warm_up`` rounds that are not counted.
    """

    batch: int
    length: int
    vocabulary: int
    small: tuple[int, int, int]
    large: tuple[int, int, int]
    rounds: int
    warm_up: int


FULL = Sizes(8, 1024, 50257, (12, 768, 12), (24, 2048, 16), rounds=15, warm_up=2)
TINY = Sizes(2, 9, 60, (1, 16, 2), (2, 24, 2), rounds=1, warm_up=0)
CEILING = 65536
"""``memory_mb``: the samples of a batch are taken together."""

Row = tuple[str, str, str]


class Device:
    """A GPU, or the CPU in a dry run."""

    def __init__(self, name: str) -> None:
        self.name = name

    def wait(self) -> None:
        """Until all is done."""
        if self.name == "cuda":
            torch.cuda.synchronize()

    def peak(self, act: Callable[[], Any]) -> float | None:
        """The most GiB that were allocated while ``act`` ran."""
        if self.name != "cuda":
            act()
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        act()
        self.wait()
        return torch.cuda.max_memory_allocated() / 2**30

    def medians(
        self, acts: dict[str, Callable[[], Any]], rounds: int, warm_up: int
    ) -> dict[str, float]:
        """Seconds of each, interleaved."""
        times: dict[str, list[float]] = {name: [] for name in acts}
        for i in range(rounds + warm_up):
            for name, act in acts.items():
                self.wait()
                start = time.perf_counter()
                act()
                self.wait()
                if i >= warm_up:
                    times[name].append(time.perf_counter() - start)
        return {name: statistics.median(taken) for name, taken in times.items()}


class Logits(nn.Module):
    """A decoder [B, T] -> [B, T, V]."""

    def __init__(self, sizes: Sizes, shape: tuple[int, int, int]) -> None:
        from fimprobe.torchvision_compat import hide_broken_torchvision

        hide_broken_torchvision()
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        layers, width, heads = shape
        ends = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
        more = {"n_positions": sizes.length, "vocab_size": sizes.vocabulary}
        self.lm = GPT2LMHeadModel(
            GPT2Config(n_layer=layers, n_embd=width, n_head=heads, **more, **ends)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        return self.lm(tokens).logits  # type: ignore[no-any-return]


def main() -> int:
    """Print the table; 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cpu", action="store_true", help="dry run at tiny sizes")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured; pass --cpu for a dry run", file=sys.stderr)
        return 1
    sizes, device = (TINY, Device("cpu")) if options.cpu else (FULL, Device("cuda"))
    if options.cpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        from fimprobe.engines.moments import fused

        fused.INTERPRET = True
    torch.manual_seed(0)
    rows = [*cost(sizes, device), *memory(sizes, device), *rates(sizes, device)]
    rows += [*large(sizes, device), *waits(sizes, device), *precision(sizes, device)]
    print(heading(options.cpu) + "\n")
    print("| what | goal | measured |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    return 0


def heading(dry: bool) -> str:
    """Device and versions."""
    import triton

    kind = platform.machine() if dry else torch.cuda.get_device_name()
    told = (
        f"{kind}, torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}"
    )
    return f"Dry run, no figure here says anything about a GPU. {told}" if dry else told


def batch(sizes: Sizes, device: Device) -> Tensor:
    """Random tokens."""
    return torch.randint(sizes.vocabulary, (sizes.batch, sizes.length), device=device.name)


def plain(model: nn.Module, tokens: Tensor, autocast: bool = False) -> Callable[[], None]:
    """One forward and backward: the unit."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
            h = model(tokens)
            loss = F.cross_entropy(h.flatten(0, 1), tokens.flatten(), reduction="sum")
        loss.backward()

    return run


def probe(model: nn.Module, tokens: Tensor, **options: Any) -> Callable[[], Any]:
    """Î₁ of all parameters: A2, A4, Q and Gram matrices; the plan is made in the first call."""
    import fimprobe
    from fimprobe.engines.tracing.plan import Plan

    settings = {"estimators": ["i1"], "bounds": False, "memory_mb": CEILING, "plan": Plan()}
    settings |= {"likelihood": "categorical", "draws": 1} | options
    return lambda: fimprobe.measure(model, tokens, **settings)


def cost(sizes: Sizes, device: Device) -> list[Row]:
    """Seconds as ratios to a forward+backward."""
    tokens = batch(sizes, device)
    half = Logits(sizes, sizes.small).to(device.name, torch.bfloat16).eval()
    full = Logits(sizes, sizes.small).to(device.name).eval()
    acts = {
        "half": plain(half, tokens),
        "half 1": probe(half, tokens),
        "half 2": probe(half, tokens, draws=2),
        "half default": probe(half, tokens, memory_mb=512),
        "full": plain(full, tokens),
        "mixed": plain(full, tokens, autocast=True),
        "full 1": probe(full, tokens),
    }
    took = device.medians(acts, sizes.rounds, sizes.warm_up)
    unit = took["half"]
    shape = f"B={sizes.batch}, T={sizes.length}"
    return [
        (f"small decoder, {shape}: forward+backward, bf16", "", f"{1e3 * unit:.1f} ms"),
        ("S=1, all parameters, ratio", "≤ 1.8", f"{took['half 1'] / unit:.2f}"),
        ("S=2, ratio", "", f"{took['half 2'] / unit:.2f}"),
        ("S=1 within the default memory_mb=512, ratio", "", f"{took['half default'] / unit:.2f}"),
        ("float32: S=1, ratio", "", f"{took['full 1'] / took['full']:.2f}"),
        (
            "float32 weights trained under bf16 autocast (probed in float32): S=1, ratio",
            "",
            f"{took['full 1'] / took['mixed']:.2f}",
        ),
    ]


def memory(sizes: Sizes, device: Device) -> list[Row]:
    """Peak memory of training with AdamW, and of a probe between backward and step."""
    tokens = batch(sizes, device)
    model = Logits(sizes, sizes.small).to(device.name, torch.bfloat16)
    optimizer, unit = torch.optim.AdamW(model.parameters()), plain(model, tokens)

    def train() -> None:
        unit()
        optimizer.step()

    train()
    training = device.peak(train)
    unit()
    rows = []
    for ceiling in (CEILING, 512):
        run = probe(model, tokens, memory_mb=ceiling)
        run()
        probing = device.peak(run)
        if training is None or probing is None:
            told = "not on a CPU"
        else:
            more = 100 * (probing / training - 1)
            told = f"{more:+.1f} % ({probing:.2f} against {training:.2f} GiB)"
        rows.append((f"peak memory against training, memory_mb={ceiling}", "≤ +10 %", told))
    return rows


def rates(sizes: Sizes, device: Device) -> list[Row]:
    """The kernel against torch.bmm on the same product Δᵀ X, for the small decoder's layers."""
    from fimprobe.engines.moments.accumulators import MomentAccumulators
    from fimprobe.engines.moments.fused import Operands, add_fused

    width = sizes.small[1]
    rows = []
    for name, ins, outs in (
        ("attention's projection", width, width),
        ("attention's input", width, 3 * width),
        ("wide layer", width, 4 * width),
        ("narrow layer", 4 * width, width),
        ("head", width, sizes.vocabulary),
    ):
        options = {"device": device.name, "dtype": torch.bfloat16}
        x = torch.randn(sizes.batch, sizes.length, ins, **options)
        delta = torch.randn(sizes.batch, sizes.length, outs, **options)

        def fused(x: Tensor = x, delta: Tensor = delta) -> None:
            shape = (delta.shape[2], x.shape[2])
            ledger = MomentAccumulators.of({"weight": torch.empty(shape, device=x.device)})
            ledger.start_chunk(len(x), 1)
            with torch.no_grad():
                add_fused(ledger.accumulators["weight"], Operands(x=x, deltas=(delta,)), None)

        def product(x: Tensor = x, delta: Tensor = delta) -> None:
            torch.bmm(delta.mT, x)

        took = device.medians({"bmm": product, "fused": fused}, sizes.rounds, sizes.warm_up)
        flops = 2e-12 * sizes.batch * sizes.length * ins * outs
        told = f"{100 * took['bmm'] / took['fused']:.0f} % ({flops / took['fused']:.0f} TFLOP/s)"
        rows.append((f"kernel's rate against bmm's, {name} {ins}→{outs}", "≥ 50 %", told))
    return rows


def large(sizes: Sizes, device: Device) -> list[Row]:
    """A large decoder, probed on one card."""
    model = Logits(sizes, sizes.large).to(device.name, torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    run = probe(model, batch(sizes, device)[:1], draws=2, memory_mb=16384)
    run()
    peak = device.peak(run)
    took = device.medians({"": run}, 1, sizes.warm_up)[""]
    told = f"{took:.2f} s" + ("" if peak is None else f", {peak:.1f} GiB at most")
    return [(f"decoder of {count / 1e9:.2f}B parameters, one sequence, S=2", "fits", told)]


def waits(sizes: Sizes, device: Device) -> list[Row]:
    """Synchronisations of a measurement, by torch's own debug mode, the model's own forward's aside."""
    model = Logits(sizes, sizes.small).to(device.name, torch.bfloat16).eval()
    tokens = batch(sizes, device)
    run = probe(model, tokens)
    run()

    def forward() -> None:
        with torch.no_grad():
            model(tokens)

    found = {}
    for name, act in (("own", forward), ("probe", run)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if device.name == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                act()
            finally:
                if device.name == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        told = [w for w in caught if "synchroniz" in str(w.message)]
        found[name] = [f"{os.path.basename(w.filename)}:{w.lineno}" for w in told]
    count = len(found["probe"]) - len(found["own"])
    places = ", ".join(sorted(set(found["probe"]) - set(found["own"])))
    told_all = f"{count} ({places})" if device.name == "cuda" else "not on a CPU"
    return [("synchronisations of one measurement", "1", told_all)]


def precision(sizes: Sizes, device: Device) -> list[Row]:
    """Σ_i A2 of bf16 and float32 against float64 gradients of single samples, for the same labels.

    The data's labels are taken (the empirical Fisher's moments): draws from rounded logits differ.
    """
    import fimprobe

    tokens = batch(sizes, device)[: min(2, sizes.batch)]
    model = Logits(sizes, sizes.small).to(device.name, torch.bfloat16).eval()
    labels = tokens.roll(-1, 1)
    exact = Logits(sizes, sizes.small).to(device.name, torch.float64).eval()
    exact.load_state_dict(model.state_dict())
    want = dict.fromkeys(dict(exact.named_parameters()), 0.0)
    for b in range(len(tokens)):
        h = exact(tokens[b : b + 1])
        loss = F.cross_entropy(h.flatten(0, 1), labels[b], reduction="sum")
        gradients = torch.autograd.grad(loss, list(exact.parameters()))
        for name, g in zip(want, gradients, strict=True):
            want[name] += float(g.square().sum()) / len(tokens)
    rows = []
    for kind in (torch.bfloat16, torch.float32):
        report = fimprobe.measure(
            model.to(kind),
            tokens,
            likelihood="categorical",
            estimators=["i1", "empirical"],
            labels=labels,
            bounds=False,
            draws=1,
            memory_mb=CEILING,
        )
        total, errors = 0.0, []
        for name, value in want.items():
            found: Any = report.parameters[name].empirical
            total += found.trace
            errors.append(abs(found.trace / value - 1))
        whole = abs(total / sum(want.values()) - 1)
        told = f"{whole:.1e}; parameters: median {statistics.median(errors):.1e}, worst {max(errors):.1e}"
        rows.append((f"error of the trace against float64, {str(kind)[6:]}", "stated", told))
    return rows


if __name__ == "__main__":
    sys.exit(main())
