"""Do penalties on weight norms make Î₁ more precise? An MLP and a CNN on scikit-learn's digits.

Soen & Sun (2021) bound the variance of Î₁ by weight norms (eq. 17, 20, 21), so that penalties on the
norms could lower it. This example trains without a penalty, and with ``fimprobe.penalties.frobenius``
and ``spectral`` at several strengths. It measures on held-out digits with exact labels. Training
without a penalty is also measured early: a control with unconfident outputs of another cause.

The printed summary is computed from the runs. On 2 cores with torch 2.13, at equal accuracy:

- MLP: the variance falls. Frobenius 1e-3 multiplies the label variance by 0.66 and the variance
  relative to ‖diag F‖² by 0.47. The bound (17) is not the reason: ‖J‖⁴ is multiplied by 0.70 and the
  moments of the outputs by 2.4. Training without a penalty that stops at the same confidence (and at
  a lower accuracy) is as precise: as functions of the confidence the three curves agree.
- CNN: the absolute variance is multiplied by 13 to 16, the relative one falls. The weight before the
  BatchNorm shrinks without a change of the function, so that its scores grow. With this layer left
  out ‖J‖ falls again, but neither variance clearly does.

Run: python examples/penalties.py --seeds 5 --epochs 25 --out /tmp/penalties
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fimprobe
from fimprobe import penalties
from fimprobe.cli.digits import Digits, load_digits, make_cnn, make_mlp

from penalties_figure import EARLY, NONE, Runs, Setting, draw, mean_and_error  # isort: skip

STRENGTHS = {
    "frobenius": (3e-4, 1e-3, 3e-3, 1e-2),
    "spectral": (1e-3, 3e-3, 1e-2, 3e-2),
    "spectral, not before BatchNorm": (1e-3, 3e-3, 1e-2, 3e-2),
}
EARLY_SHARES = (1 / 12, 1 / 6, 1 / 3, 2 / 3)


MODELS: dict[str, Callable[[], nn.Module]] = {"MLP": make_mlp, "CNN": make_cnn}


def train(
    model: nn.Module,
    data: Digits,
    *,
    epochs: int,
    seed: int,
    penalty: Callable[[nn.Module], Tensor],
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train with Adam on the cross-entropy plus the penalty; the seed determines the batches."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in torch.randperm(len(data.x), generator=order).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data.x[rows]), data.y[rows])
            (loss + penalty(model)).backward()
            optimizer.step()
        after_epoch(epoch)


def penalty_of(setting: Setting) -> Callable[[nn.Module], Tensor]:
    """Return the term that a setting adds to the loss."""
    if setting.penalty == "frobenius":
        return lambda model: setting.strength * penalties.frobenius(model)
    if setting.penalty == "spectral":
        return lambda model: setting.strength * penalties.spectral(model)
    if setting.penalty in STRENGTHS:  # the CNN's layer 0 feeds the BatchNorm
        return lambda model: setting.strength * penalties.spectral(model, include=["[1-9]"])
    return lambda model: torch.zeros(())


def measure(model: nn.Module, data: Digits) -> dict[str, float]:
    """Return accuracy, confidence and the exact label variance of Î₁ on the held-out digits."""
    model.eval()
    with torch.no_grad():
        p = torch.softmax(model(data.test_x).double(), 1)
    s2, s3, s4 = (p.pow(k).sum(1) for k in (2, 3, 4))
    options = {"draws": "exact", "estimators": ("i1",), "bounds": False}
    report = fimprobe.measure(model, data.test_x, likelihood="categorical", **options)
    # for a Gaussian with σ = 1 F = JᵀJ: its trace is E‖J‖_F², the Jacobian in (17)
    gaussian = fimprobe.likelihoods.Gaussian(sigma=1.0)
    jacobian = fimprobe.measure(model, data.test_x, likelihood=gaussian, **options)
    values = {
        "accuracy": float((p.argmax(1) == data.test_y).double().mean()),
        "confidence": float(p.amax(1).mean()),
        "jacobian": jacobian.total.i1.trace,
        "moment": float((1 - 3 * s2 + 6 * s3 - 4 * s2.square()).mean()),  # tr M
    }
    for name, group in {"": report.total, **report.layers}.items():
        assert group.i1.label_variance is not None
        values |= {
            f"variance{name}": group.i1.label_variance,
            f"relative{name}": group.i1.label_variance / group.i1.norm**2,
            f"trace{name}": group.i1.trace,
        }
    return values


def run(*, seeds: int, epochs: int) -> Runs:
    """Return the measurements of every setting, one for each seed, in the order of the seeds."""
    data = load_digits()
    results: Runs = {}
    early = {max(1, round(epochs * share)): share for share in EARLY_SHARES}
    for name, make in MODELS.items():
        settings = [Setting(name, NONE, 0.0)] + [
            Setting(name, penalty, strength)
            for penalty, strengths in STRENGTHS.items()
            for strength in strengths
            if name == "CNN" or "BatchNorm" not in penalty
        ]
        for setting in settings:
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = make()

                def stop_early(
                    epoch: int, model: nn.Module = model, setting: Setting = setting
                ) -> None:
                    if setting.penalty == NONE and epoch in early:
                        key = Setting(setting.model, EARLY, early[epoch])
                        results.setdefault(key, []).append(measure(model, data))

                train(
                    model,
                    data,
                    epochs=epochs,
                    seed=seed,
                    penalty=penalty_of(setting),
                    after_epoch=stop_early,
                )
                results.setdefault(setting, []).append(measure(model, data))
    return results


class Change(NamedTuple):
    """A factor relative to no penalty, paired by seed, with its 95 % interval."""

    factor: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the factor, its interval and its direction."""
        if math.isnan(self.low):
            return f"×{self.factor:.2g} (one seed: no interval)"
        verdict = "rises" if self.low > 1 else "falls" if self.high < 1 else "no clear change"
        return f"×{self.factor:.3g} [{self.low:.3g}, {self.high:.3g}] {verdict}"


def change(
    these: list[dict[str, float]], those: list[dict[str, float]], field: str, power: float = 1
) -> Change:
    """Return the geometric mean over seeds of a ratio, with Student's 95 % interval of its log.

    Args:
        these: Measurements in the numerator, one for each seed.
        those: Measurements in the denominator.
        field: The measured value.
        power: Exponent of the ratio.
    """
    from scipy.stats import t

    logs = [
        power * math.log(a[field] / b[field])
        for a, b in zip(these, those, strict=True)
        if a[field] > 0 and b[field] > 0
    ]
    mean, error = mean_and_error(logs)
    half = float(t.ppf(0.975, len(logs) - 1)) * error if len(logs) > 1 else math.nan
    return Change(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def at_equal_confidence(results: Runs, setting: Setting) -> list[dict[str, float]] | None:
    """Return the unpenalised run of each seed at the final confidence of the penalised one.

    Variances between two checkpoints are interpolated: linear in their logarithm over
    log(1 − confidence).

    Args:
        results: The measurements of all settings.
        setting: The penalised setting.

    Returns:
        The interpolated values of each seed; None if a penalised run is less confident than the first
        checkpoint.
    """
    curves = [results[s] for s in results if (s.model, s.penalty) == (setting.model, EARLY)]
    curves.append(results[Setting(setting.model, NONE, 0.0)])
    matched = []
    for seed, penalised in enumerate(results[setting]):
        doubt = math.log(1 - penalised["confidence"])
        curve = [runs[seed] for runs in curves]
        for earlier, later in zip(curve, curve[1:], strict=False):
            a, b = (math.log(1 - r["confidence"]) for r in (earlier, later))
            if min(a, b) <= doubt <= max(a, b) and a != b:
                share = (doubt - a) / (b - a)
                matched.append(
                    {
                        field: earlier[field] ** (1 - share) * later[field] ** share
                        for field in ("variance", "relative")
                    }
                )
                break
        else:
            return None
    return matched


def format_table(results: Runs) -> str:
    """Return mean ± standard error over the seeds of every setting."""
    heads = ["accuracy %", "confidence %", "E‖J‖²", "tr M", "label variance", "trace F", "relative"]
    fields = ["accuracy", "confidence", "jacobian", "moment", "variance", "trace", "relative"]
    lines = [f"{'':52}" + "".join(f"{h:>20}" for h in heads)]
    for setting, runs in results.items():
        at = (
            f"{100 * setting.strength:.0f} % of epochs"
            if setting.penalty == EARLY
            else f"{setting.strength:g}"
        )
        cells = []
        for field in fields:
            scale = 100 if field in ("accuracy", "confidence") else 1
            mean, error = mean_and_error([scale * r[field] for r in runs])
            digits = ".2f" if scale == 100 else ".3g"
            cells.append(f"{mean:{digits}}" + ("" if math.isnan(error) else f" ± {error:.2g}"))
        lines.append(
            f"{setting.model:5}{setting.penalty:32}{at:15}" + "".join(f"{c:>20}" for c in cells)
        )
    return "\n".join(lines)


def strongest_equal(results: Runs, model: str, penalty: str) -> Setting:
    """Return the strongest setting that loses no more accuracy than two standard errors."""
    base = results[Setting(model, NONE, 0.0)]
    best = None
    for strength in STRENGTHS[penalty]:
        setting = Setting(model, penalty, strength)
        mean, error = mean_and_error(
            [a["accuracy"] - b["accuracy"] for a, b in zip(results[setting], base, strict=True)]
        )
        if best is None or not mean < -2 * error:  # NaN: a single seed shows no difference
            best = setting
    assert best is not None
    return best


def summarise(results: Runs) -> str:
    """Return the effect of each penalty on the variance of Î₁, at equal accuracy."""
    lines = [
        "Relative to no penalty, paired by seed: factor [95 % interval]. Each penalty at its",
        "strongest setting that loses no more accuracy than two standard errors. To stopping early:",
        "relative to the same seed without penalty, when it was as confident on average.",
    ]
    falls: dict[str, list[str]] = {"variance": [], "relative": []}
    others: dict[str, list[str]] = {"variance": [], "relative": []}
    for model in MODELS:
        for penalty in STRENGTHS:
            if Setting(model, penalty, STRENGTHS[penalty][0]) not in results:
                continue
            setting = strongest_equal(results, model, penalty)
            lines += describe_setting(results, setting)
            for field in falls:
                falling = change_of(results, setting, field).high < 1
                (falls if falling else others)[field].append(f"{model} with {penalty}")
    lines.append("")
    for field, label in (("variance", "absolute"), ("relative", "relative")):
        lines.append(
            f"The {label} label variance of Î₁ falls (95 %): {'; '.join(falls[field]) or 'nowhere'}. "
            f"It does not, or that is unknown: {'; '.join(others[field]) or 'nowhere'}."
        )
    return "\n".join(lines)


def change_of(results: Runs, setting: Setting, field: str) -> Change:
    """Return the change of a measured value by a penalty; that of E‖J‖² is squared, as in (17)."""
    base = results[Setting(setting.model, NONE, 0.0)]
    return change(results[setting], base, field, power=2 if field == "jacobian" else 1)


def describe_setting(results: Runs, setting: Setting) -> list[str]:
    """Return the changes by one penalty: of the model, at equal confidence, and of its layers."""
    runs, base = results[setting], results[Setting(setting.model, NONE, 0.0)]
    mean, error = mean_and_error(
        [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(runs, base, strict=True)]
    )
    name = f"{setting.model}, {setting.penalty} {setting.strength:g}"
    lines = [f"\n{name} (accuracy {mean:+.2f} ± {error:.2f} points)"]
    for field, label in (
        ("variance", "label variance, absolute"),
        ("relative", "label variance / ‖diag F‖²"),
        ("trace", "trace of F"),
        ("jacobian", "(E‖J‖²)², factor of (17)"),
        ("moment", "tr M, factor of the outputs"),
    ):
        lines.append(f"  {label:30} {change_of(results, setting, field)}")
    matched = at_equal_confidence(results, setting)
    for field, label in (("variance", "absolute"), ("relative", "relative")):
        against = "unknown" if matched is None else change(runs, matched, field)
        lines.append(f"  {label + ', to stopping early':30} {against}")
    for layer in (n.removeprefix("variance") for n in runs[0] if n.startswith("variance")):
        if layer:
            absolute = change_of(results, setting, f"variance{layer}")
            relative = change_of(results, setting, f"relative{layer}")
            lines.append(f"  layer {layer}: absolute {absolute!s:36} relative {relative}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of every setting (default 5)")
    parser.add_argument("--epochs", type=int, default=25, help="epochs of training (default 25)")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for penalties.png")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    torch.set_num_threads(1)  # more threads slow such small nets down
    results = run(seeds=options.seeds, epochs=options.epochs)
    print(format_table(results))
    print(f"\n{summarise(results)}")
    print(f"\n{time.perf_counter() - started:.0f} s")
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        draw(results, list(MODELS), options.out / "penalties.png")
        print(f"figure: {options.out / 'penalties.png'}")
    except ImportError as error:
        print(f"no figure: it needs {error.name} (pip install matplotlib)")


if __name__ == "__main__":
    main()
