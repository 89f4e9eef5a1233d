"""Over 100 models that nobody here wrote: are the numbers right, what does it cost, what is refused?

``python tests/benchmarks/breadth.py`` prints a table. For each model, in float64: the diagonal of the
empirical Fisher against the squared gradients of single samples by plain autograd; then, in float32, training with the probe and without, compared bit by bit. ``--only`` takes a regular expression,
``--shard 0/3`` every third family.

The empirical Fisher is compared, and not Î₁, because its labels are given: the oracle then needs no code
of fimprobe. Both are made of the same per-sample gradients.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import re
import time
import warnings
from typing import Any

import numpy as np
import torch
from breadth_models import FAMILIES, Family, import_torchvision
from torch import Tensor, nn

import fimprobe
from fimprobe.model.outputs import select_outputs

SEED = 0
NEGLIGIBLE = 1e-22
"""A parameter whose largest entry is smaller, relative to that of the model, is zero but for rounding."""


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    def convert(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    if isinstance(inputs, dict):
        return {k: convert(x) for k, x in inputs.items()}
    return tuple(convert(x) for x in inputs)


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def twice(inputs: Any, b: int) -> Any:
    """One sample, two times: torch 2.13 computes wrong gradients of BatchNorm for a batch of one."""
    if isinstance(inputs, dict):
        return {k: x[[b, b]] for k, x in inputs.items()}
    return tuple(x[[b, b]] for x in inputs)


def class_dim(h: Tensor, family: Family) -> int:
    """Pictures hold their classes in the second dimension."""
    return 1 if h.dim() == 4 or h.dim() == 5 else h.dim() - 1


def draw_labels(h: Tensor, family: Family) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    if not family.classes:
        return h + torch.randn(h.shape, generator=generator, dtype=h.dtype)
    axis = class_dim(h, family)
    shape = [n for i, n in enumerate(h.shape) if i != axis]
    return torch.randint(h.shape[axis], shape, generator=generator)


def log_likelihood(h: Tensor, y: Tensor, family: Family) -> Tensor:
    if not family.classes:
        return -0.5 * (y - h).square().sum()
    axis = class_dim(h, family)
    return h.log_softmax(axis).gather(axis, y.unsqueeze(axis)).sum()


def oracle(model: nn.Module, inputs: Any, labels: Tensor, family: Family) -> dict[str, Tensor]:
    """Mean over single samples of the squared gradient, by parameter.

    Each sample has a model of its own: some keep what they computed for the one before.
    """
    output = family.output or select_outputs
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad}
    for b in range(len(labels)):
        fresh = copy.deepcopy(model)
        parameters = {n: p for n, p in fresh.named_parameters() if p.requires_grad}
        h = output(call(fresh, twice(inputs, b)))[:1]
        value = log_likelihood(h, labels[b : b + 1], family)
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for name, g in zip(parameters, gradients, strict=True):
            if g is not None:
                total[name] += g.square() / len(labels)
    return total


def likelihood(h: Tensor, family: Family) -> Any:
    if not family.classes:
        return "gaussian"
    axis = class_dim(h, family)
    return fimprobe.likelihoods.Categorical(class_dim=axis)


def compare(
    model: nn.Module, inputs: Any, family: Family, estimators: tuple[str, ...] = ("i1", "i2")
) -> dict[str, Any]:
    """Measure, compare, and time."""
    output = family.output or select_outputs
    torch.manual_seed(SEED)
    model = model.double().eval()
    pristine = copy.deepcopy(model)
    inputs = cast(inputs, torch.float64)
    timed = copy.deepcopy(model)
    with torch.no_grad():  # what it keeps has no graph, so that it can run again and again
        h = output(call(timed, inputs))
    labels = draw_labels(h, family)
    options = {
        "likelihood": likelihood(h, family),
        "labels": labels,
        "output": family.output,
        "diagonals": True,
        "second_order": {"probes": 2} if "i2" in estimators else "off",
    }

    def measure() -> fimprobe.Report:
        return fimprobe.measure(
            model, inputs, estimators=[*estimators, "empirical"], bounds=False, plan=plan, **options
        )

    def unit() -> None:
        timed.zero_grad(set_to_none=True)
        log_likelihood(output(call(timed, inputs)), labels, family).backward()

    plan = fimprobe.Plan()
    started = time.process_time()  # other programs do not count
    report = measure()
    first = time.process_time() - started
    times = []
    for run in (unit, unit, unit, measure):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    once = min(times[1:3])
    expected = oracle(pristine, inputs, labels, family)
    largest = max(float(x.max()) for x in expected.values())
    worst, missing = 0.0, []
    for name, truth in expected.items():
        scale = float(truth.max())
        estimate = report.parameters.get(name)
        if estimate is None:
            if scale > NEGLIGIBLE * largest:
                missing.append(name)
            continue
        error = float((estimate.empirical.diagonal[name] - truth).abs().max())
        if scale > NEGLIGIBLE * largest:
            worst = max(worst, error / scale)
        else:
            worst = max(worst, error / largest)
    covered = [how for how in report.coverage.values() if how.startswith("autograd")]
    fallbacks = [how for how in covered if "replay" in how or "loop" in how]
    return {
        "worst": worst,
        "missing": missing,
        "covered": f"{len(covered)} of {len(expected)}",
        "fallbacks": len(fallbacks),
        "cost": times[3] / once,
        "first": first / once,
        "i2": report.total.i2 is not None,
        "why": next((n for n in report.notes if n.startswith("Î₂ was")), "not measured"),
    }


def trains_alike(model: nn.Module, inputs: Any, family: Family) -> bool:
    """Whether two steps with the probe leave the same bits as two without."""
    output = family.output or select_outputs
    model = model.float().train()
    inputs = cast(inputs, torch.float32)
    states = []
    for probed in (False, True):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
        probe = None
        if probed:
            with torch.no_grad():
                h = output(call(copy.deepcopy(trained), inputs))
            probe = fimprobe.attach(
                trained,
                schedule={"every": 1},
                tensorboard=False,
                likelihood=likelihood(h, family),
                output=family.output,
                estimators=["i1"],
                second_order="off",
                bounds=False,
            )
        torch.manual_seed(SEED)
        np.random.seed(SEED)  # speech models draw their masks from it
        random.seed(SEED)
        for _ in range(2):
            optimizer.zero_grad()
            h = output(call(trained, inputs))
            (-log_likelihood(h, draw_labels(h.detach(), family), family)).backward()
            optimizer.step()
        if probe is not None:
            probe.detach()
        states.append([*trained.parameters(), *trained.buffers()])
    return all(
        a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a[~a.isnan()], b[~b.isnan()])
        if a.is_floating_point()
        else torch.equal(a, b)
        for a, b in zip(*states, strict=True)
    )


def examine(family: Family) -> list[str]:
    """A row of the table."""
    torch.manual_seed(SEED)
    try:
        model, inputs = family.build()
    except Exception as error:
        return [family.name, "–", f"not built: {type(error).__name__}: {str(error)[:90]}"]
    size = sum(p.numel() for p in model.parameters())
    label = f"{size / 1e6:.2f} M" if size > 1e5 else f"{size:,}"
    trained = copy.deepcopy(model)
    try:
        result = compare(model, inputs, family)
    except fimprobe.FimprobeError as error:
        return [family.name, label, f"refused: {str(error)[:400]}"]
    except Exception as error:
        return [family.name, label, f"FAILED: {type(error).__name__}: {str(error)[:400]}"]
    del model
    try:
        alike = "yes" if trains_alike(trained, inputs, family) else "**NO**"
    except Exception as error:
        alike = f"{type(error).__name__}: {str(error)[:60]}"
    wrong = " **WRONG**" if result["worst"] > family.rounding or result["missing"] else ""
    i2 = "yes" if result["i2"] else f"no: {result['why']}"
    return [
        family.name,
        label,
        f"{result['covered']} ({result['fallbacks']} by fallback)",
        f"{result['worst']:.0e}{wrong}",
        i2,
        f"{result['cost']:.1f} ({result['first']:.1f})",
        alike,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="families whose name matches")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th family, from the i-th")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    import_torchvision()
    i, n = map(int, options.shard.split("/"))
    families = [f for f in FAMILIES if re.search(options.only, f.name)][i::n]
    print(
        "| model | parameters | covered | worst relative error | Î₂ | cost (first) | trains alike |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for family in families:
        print("| " + " | ".join(examine(family)) + " |", flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
