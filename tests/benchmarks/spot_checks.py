"""Noise and cost of Î₂'s label variance: spot checks beside two random probes, layer by layer.

python tests/benchmarks/spot_checks.py [--replicates 8] [--only GPT-2] [--steps 150]

A GPT-2 (4 layers, width 128, 64 tokens of the source text of Python's library) and a ViT (4 layers, width
128, 65 positions), 32 inputs each, as built and after some steps of AdamW. Costs are CPU time on one
thread over that of one forward+backward. ``spread`` is the standard deviation over replicates, ``stated``
the mean standard error that a measurement states, both over V2. ``probes`` is the stated error of two
random probes, over V2 from the spot checks.
"""

from __future__ import annotations

import argparse
import collections
import re
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimprobe.torchvision_compat import hide_broken_torchvision

hide_broken_torchvision()

import transformers  # noqa: E402

import fimprobe  # noqa: E402
from fimprobe.engines.tracing.plan import Plan  # noqa: E402

BATCH, VOCABULARY, LENGTH, WIDTH, LAYERS, CLASSES = 32, 1000, 64, 128, 4, 10


class Subject(NamedTuple):
    """A model, its inputs, and a step of its training."""

    model: nn.Module
    inputs: dict[str, Tensor]
    loss: Callable[[int], Tensor]


def tokens(count: int, seed: int) -> Tensor:
    """Sequences of the most frequent words of Python's library [count, LENGTH]."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    text = "".join(file.read_text(encoding="utf8", errors="replace") for file in files)
    words = re.findall(r"\w+|\s+|[^\w\s]", text)
    frequent = collections.Counter(words).most_common(VOCABULARY - 1)
    index = {word: i + 1 for i, (word, _) in enumerate(frequent)}
    ids = torch.tensor([index.get(word, 0) for word in words])
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - LENGTH, (count,), generator=generator)
    return torch.stack([ids[start : start + LENGTH] for start in starts])


def gpt2() -> Subject:
    """A GPT-2 on text."""
    config = transformers.GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=4, vocab_size=VOCABULARY, n_positions=LENGTH,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    corpus = tokens(512, 0)

    def loss(step: int) -> Tensor:
        batch = corpus[torch.randint(len(corpus), (16,))]
        return model(input_ids=batch, labels=batch).loss

    return Subject(model, {"input_ids": tokens(BATCH, 1)}, loss)


def vit() -> Subject:
    """A ViT on noisy pictures of ten patterns."""
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=4 * WIDTH,
        image_size=32, patch_size=4, num_labels=CLASSES, hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    patterns = F.interpolate(torch.randn(CLASSES, 3, 8, 8), size=32, mode="bilinear")

    def pictures(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(CLASSES, (count,))
        return 0.4 * patterns[labels] + torch.randn(count, 3, 32, 32), labels

    def loss(step: int) -> Tensor:
        x, labels = pictures(16)
        return F.cross_entropy(model(pixel_values=x).logits, labels)

    return Subject(model, {"pixel_values": pictures(BATCH)[0]}, loss)


SUBJECTS = {"GPT-2": gpt2, "ViT": vit}


def train(subject: Subject, steps: int) -> None:
    """Some steps of AdamW."""
    optimizer = torch.optim.AdamW(subject.model.parameters(), 1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        subject.loss(step).backward()
        optimizer.step()


def seconds(run: Callable[[], Any], count: int = 5) -> float:
    """Median CPU time."""
    run()
    times = []
    for _ in range(count):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def measure(subject: Subject, plan: Plan, seed: int, **options: Any) -> Any:
    """One measurement without bounds."""
    return fimprobe.measure(
        subject.model.eval(),
        subject.inputs,
        likelihood="categorical",
        bounds=False,
        seed=seed,
        plan=plan,
        **options,
    )


def show(name: str, state: str, subject: Subject, replicates: int) -> None:
    """Print the table of one model."""

    def forward_backward() -> None:
        subject.model.zero_grad()
        subject.model(**subject.inputs).logits.logsumexp(-1).sum().backward()

    plan = Plan()
    unit = seconds(forward_backward)
    first = seconds(lambda: measure(subject, plan, 0, estimators=("i1",)), 3)
    probes = measure(subject, plan, 0, second_order={"probes": 2})
    with_probes = seconds(lambda: measure(subject, plan, 0, second_order={"probes": 2}), 2)
    times, reports = [], []
    for seed in range(replicates + 1):
        start = time.process_time()
        reports.append(measure(subject, plan, seed, second_order="spot_checks"))
        times.append(time.process_time() - start)
    reports, with_checks = reports[1:], statistics.median(times[1:])
    print(f"\n### {name}, {state}\n")
    costs = ", ".join(
        f"{what} {value / unit:.1f}"
        for what, value in (("Î₁", first), ("with probes", with_probes), ("checks", with_checks))
    )
    print(f"Forward+backwards ({1000 * unit:.0f} ms): {costs}. {replicates} replicates.\n")
    print("| layer | share of V2 | spread | stated | probes |\n|---|---|---|---|---|")
    total = statistics.mean(r.total.i2.label_variance for r in reports)
    for layer in [*probes.layers, "total"]:
        groups = [r.total if layer == "total" else r.layers[layer] for r in reports]
        known = [g.i2 for g in groups if g.i2.label_variance is not None]
        values = [estimate.label_variance for estimate in known]
        mean = statistics.mean(values) if len(values) > 1 else 0.0
        if mean == 0:
            continue
        spread = statistics.stdev(values) / mean
        stated = statistics.mean(estimate.label_variance_error for estimate in known) / mean
        of_probes = (probes.total if layer == "total" else probes.layers[layer]).i2
        error = of_probes.label_variance_error
        probe = "unknown" if error is None else f"{error / mean:.2g}"
        print(f"| {layer} | {mean / total:.2g} | {spread:.2f} | {stated:.2f} | {probe} |", flush=True)


def main() -> None:
    """Print one table for each model and state."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--replicates", type=int, default=8)
    parser.add_argument("--only", choices=list(SUBJECTS))
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, make in SUBJECTS.items():
        if options.only in (None, name):
            torch.manual_seed(0)
            subject = make()
            show(name, "as built", subject, options.replicates)
            subject.model.train()
            train(subject, options.steps)
            show(name, f"after {options.steps} steps", subject, options.replicates)


if __name__ == "__main__":
    main()
