"""Do penalties on weight norms make Î₁ more precise? An MLP and a CNN on scikit-learn's digits.

Soen & Sun 2021 bound Î₁'s variance by weight norms (17), (20), (21), so penalising the norms should
lower it. This trains with no penalty, ``fimprobe.penalties.frobenius`` and ``spectral`` at several
strengths and measures on held-out digits, labels integrated over exactly. No penalty is also
measured early in training: a control with unconfident outputs that no penalty made so.

The summary it prints is computed from its runs. On 2 cores with torch 2.13, at equal accuracy:

- MLP: the variance falls as the deck says. Frobenius 1e-3 takes the label variance to 0.66 of what
  it was and the variance relative to ‖diag F‖² to 0.47. But not because (17) does: ‖J‖⁴ falls to
  0.70 and the outputs' moments rise to 2.4. And no penalty at all, stopped when the net is as
  confident (and less accurate), is as precise: over confidence the three curves are one.
- CNN: the absolute variance rises 13 to 16 times, the relative one falls. The weight before the
  BatchNorm shrinks and the function does not change, so its scores grow. With that layer left out
  ‖J‖ falls again, but neither variance clearly does.

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

STRENGTHS = {
    "frobenius": (3e-4, 1e-3, 3e-3, 1e-2),
    "spectral": (1e-3, 3e-3, 1e-2, 3e-2),
    "spectral, not before BatchNorm": (1e-3, 3e-3, 1e-2, 3e-2),
}
EARLY_SHARES = (1 / 12, 1 / 6, 1 / 3, 2 / 3)
NONE, EARLY = "no penalty", "no penalty, stopped early"


class Setting(NamedTuple):
    """A curve of the figure and a point on it: a penalty's strength, or a share of the epochs."""

    model: str
    penalty: str
    strength: float


class Data(NamedTuple):
    """Digits as [B, 1, 8, 8] in 0 to 1, and their labels."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_data() -> Data:
    """1,437 digits to train on, 360 held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(labels)
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = shuffled[:1437], shuffled[1437:]
    return Data(x[train], y[train], x[test], y[test])


def make_mlp() -> nn.Module:
    """Three Linear layers and tanh: what (19)–(21) are about."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    )


def make_cnn() -> nn.Module:
    """Two convolutions, the first before a BatchNorm, which (19)–(21) leave out."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"MLP": make_mlp, "CNN": make_cnn}


def train(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    seed: int,
    penalty: Callable[[nn.Module], Tensor],
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Adam on the cross-entropy plus the penalty; the batches' order depends on the seed only."""
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
    """The term that a setting adds to the loss."""
    if setting.penalty == "frobenius":
        return lambda model: setting.strength * penalties.frobenius(model)
    if setting.penalty == "spectral":
        return lambda model: setting.strength * penalties.spectral(model)
    if setting.penalty in STRENGTHS:  # the CNN's layer 0 feeds the BatchNorm
        return lambda model: setting.strength * penalties.spectral(model, include=["[1-9]"])
    return lambda model: torch.zeros(())


def measure(model: nn.Module, data: Data) -> dict[str, float]:
    """Accuracy, confidence and Î₁'s exact label variance on the held-out digits."""
    model.eval()
    with torch.no_grad():
        p = torch.softmax(model(data.test_x).double(), 1)
    s2, s3, s4 = (p.pow(k).sum(1) for k in (2, 3, 4))
    only = {"draws": "exact", "estimators": ("i1",), "bounds": False}
    report = fimprobe.measure(model, data.test_x, likelihood="categorical", **only)
    # of a Gaussian with σ = 1, F = JᵀJ: its trace is E‖J‖_F², the Jacobian that (17) speaks of
    gaussian = fimprobe.likelihoods.Gaussian(sigma=1.0)
    jacobian = fimprobe.measure(model, data.test_x, likelihood=gaussian, **only)
    found = {
        "accuracy": float((p.argmax(1) == data.test_y).double().mean()),
        "confidence": float(p.amax(1).mean()),
        "jacobian": jacobian.total.i1.trace,
        "moment": float((1 - 3 * s2 + 6 * s3 - 4 * s2.square()).mean()),  # tr M
    }
    for name, group in {"": report.total, **report.layers}.items():
        assert group.i1.label_variance is not None
        found |= {
            f"variance{name}": group.i1.label_variance,
            f"relative{name}": group.i1.label_variance / group.i1.norm**2,
            f"trace{name}": group.i1.trace,
        }
    return found


def run(*, seeds: int, epochs: int) -> dict[Setting, list[dict[str, float]]]:
    """Every setting's measurements, one for each seed, in the seeds' order."""
    data = load_data()
    found: dict[Setting, list[dict[str, float]]] = {}
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
                        found.setdefault(key, []).append(measure(model, data))

                train(
                    model,
                    data,
                    epochs=epochs,
                    seed=seed,
                    penalty=penalty_of(setting),
                    after_epoch=stop_early,
                )
                found.setdefault(setting, []).append(measure(model, data))
    return found


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error; the error of a single value is not known (NaN)."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


class Change(NamedTuple):
    """A factor against no penalty, paired by seed, with its 95 % interval."""

    factor: float
    low: float
    high: float

    def __str__(self) -> str:
        """The factor, its interval and what that says."""
        if math.isnan(self.low):
            return f"×{self.factor:.2g} (one seed: no interval)"
        verdict = "rises" if self.low > 1 else "falls" if self.high < 1 else "no clear change"
        return f"×{self.factor:.3g} [{self.low:.3g}, {self.high:.3g}] {verdict}"


def change(
    these: list[dict[str, float]], those: list[dict[str, float]], field: str, power: float = 1
) -> Change:
    """Geometric mean over seeds of these/those, with Student's 95 % interval of the log."""
    from scipy.stats import t

    logs = [
        power * math.log(a[field] / b[field])
        for a, b in zip(these, those, strict=True)
        if a[field] > 0 and b[field] > 0
    ]
    mean, error = mean_and_error(logs)
    half = float(t.ppf(0.975, len(logs) - 1)) * error if len(logs) > 1 else math.nan
    return Change(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def at_equal_confidence(
    found: dict[Setting, list[dict[str, float]]], setting: Setting
) -> list[dict[str, float]] | None:
    """The unpenalised run of each seed when it was as confident as the penalised one ended up.

    Variances between two checkpoints: linear in their logarithm over log(1 − confidence). None where
    a penalised run is less confident than the first checkpoint.
    """
    curves = [found[s] for s in found if (s.model, s.penalty) == (setting.model, EARLY)]
    curves.append(found[Setting(setting.model, NONE, 0.0)])
    matched = []
    for seed, penalised in enumerate(found[setting]):
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


def format_table(found: dict[Setting, list[dict[str, float]]]) -> str:
    """Mean ± standard error over seeds of every setting."""
    heads = ["accuracy %", "confidence %", "E‖J‖²", "tr M", "label variance", "trace F", "relative"]
    fields = ["accuracy", "confidence", "jacobian", "moment", "variance", "trace", "relative"]
    lines = [f"{'':52}" + "".join(f"{h:>20}" for h in heads)]
    for setting, runs in found.items():
        at = (
            f"{setting.strength:.0%} of epochs"
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


def strongest_equal(
    found: dict[Setting, list[dict[str, float]]], model: str, penalty: str
) -> Setting:
    """The strongest setting no less accurate than no penalty by more than two standard errors."""
    base = found[Setting(model, NONE, 0.0)]
    best = None
    for strength in STRENGTHS[penalty]:
        setting = Setting(model, penalty, strength)
        mean, error = mean_and_error(
            [a["accuracy"] - b["accuracy"] for a, b in zip(found[setting], base, strict=True)]
        )
        if best is None or not mean < -2 * error:  # NaN: a single seed tells no difference
            best = setting
    assert best is not None
    return best


def summarise(found: dict[Setting, list[dict[str, float]]]) -> str:
    """At equal accuracy, what each penalty does to Î₁'s variance, absolute and relative."""
    lines = [
        "Against no penalty, paired by seed: factor [95 % interval]. Each penalty at its strongest",
        "setting that costs no accuracy beyond two standard errors. To stopping early: against the",
        "same seed without penalty, at the moment when it was as confident on average.",
    ]
    falls: dict[str, list[str]] = {"variance": [], "relative": []}
    others: dict[str, list[str]] = {"variance": [], "relative": []}
    for model in MODELS:
        base = found[Setting(model, NONE, 0.0)]
        for penalty in STRENGTHS:
            if Setting(model, penalty, STRENGTHS[penalty][0]) not in found:
                continue
            setting = strongest_equal(found, model, penalty)
            runs = found[setting]
            mean, error = mean_and_error(
                [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(runs, base, strict=True)]
            )
            accuracy = f"{mean:+.2f} ± {error:.2f}"
            lines.append(f"\n{model}, {penalty} {setting.strength:g} (accuracy {accuracy} points)")
            labels = {
                "variance": "label variance, absolute",
                "relative": "label variance / ‖diag F‖²",
                "trace": "trace of F",
                "jacobian": "(E‖J‖²)², the deck's factor",
                "moment": "tr M, the output's factor",
            }
            for field, label in labels.items():
                found_change = change(runs, base, field, power=2 if field == "jacobian" else 1)
                lines.append(f"  {label:30} {found_change}")
                if field in falls:
                    (falls if found_change.high < 1 else others)[field].append(
                        f"{model} with {penalty}"
                    )
            matched = at_equal_confidence(found, setting)
            for field, label in (("variance", "absolute"), ("relative", "relative")):
                against = "not to be told" if matched is None else change(runs, matched, field)
                lines.append(f"  {label + ', to stopping early':30} {against}")
            for name in (n.removeprefix("variance") for n in runs[0] if n.startswith("variance")):
                if name:
                    absolute = change(runs, base, f"variance{name}")
                    relative = change(runs, base, f"relative{name}")
                    lines.append(f"  layer {name}: absolute {absolute!s:36} relative {relative}")
    lines.append("")
    for field, label in (("variance", "absolute"), ("relative", "relative")):
        lines.append(
            f"The {label} label variance of Î₁ falls (95 %): {'; '.join(falls[field]) or 'nowhere'}. "
            f"It does not, or cannot be told: {'; '.join(others[field]) or 'nowhere'}."
        )
    return "\n".join(lines)


LOOKS = {  # Okabe and Ito's colours, told apart by every kind of sight, and by shape
    EARLY: ("#000000", "o", ":"),
    "frobenius": ("#E69F00", "s", "-"),
    "spectral": ("#0072B2", "^", "-"),
    "spectral, not before BatchNorm": ("#009E73", "D", "-"),
}


def draw(found: dict[Setting, list[dict[str, float]]], path: Path) -> None:
    """Variance over accuracy, absolute and relative, and relative over confidence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panels = [  # title, across, up, labels
        ("absolute", "accuracy", "variance", "label variance Σᵢ Vᵢ ((nats/unit²)²)"),
        ("relative", "accuracy", "relative", "label variance / ‖diag F‖²"),
        ("relative, over confidence", "confidence", "relative", "label variance / ‖diag F‖²"),
    ]
    figure, axes = pyplot.subplots(
        len(MODELS), len(panels), figsize=(13, 3.9 * len(MODELS)), squeeze=False
    )
    for row, model in zip(axes, MODELS, strict=True):
        for axis, (title, across, up, ylabel) in zip(row, panels, strict=True):
            for penalty, (color, marker, style) in LOOKS.items():
                settings = [s for s in found if (s.model, s.penalty) == (model, penalty)]
                if settings:  # all curves meet where there is no penalty
                    none = Setting(model, NONE, 0.0)
                    settings = [*settings, none] if penalty == EARLY else [none, *settings]
                points = []
                for setting in settings:
                    runs = found[setting]
                    if across == "accuracy":
                        xs = [100 * r["accuracy"] for r in runs]
                    else:
                        xs = [100 * (1 - r["confidence"]) for r in runs]
                    points.append((*mean_and_error(xs), *mean_and_error([r[up] for r in runs])))
                if not points:
                    continue
                x, dx, y, dy = (list(c) for c in zip(*points, strict=True))
                axis.errorbar(
                    x,
                    y,
                    xerr=None if math.isnan(dx[0]) else dx,
                    yerr=None if math.isnan(dy[0]) else dy,
                    color=color,
                    marker=marker,
                    linestyle=style,
                    markersize=5,
                    zorder=3 if penalty == EARLY else 2,
                    linewidth=1.2,
                    elinewidth=1,
                    capsize=2,
                    label=penalty,
                )
            mean, error = mean_and_error(
                [100 * r["accuracy"] for r in found[Setting(model, NONE, 0.0)]]
            )
            axis.set_yscale("log")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
            if across == "confidence":
                axis.set_xscale("log")
                axis.xaxis.set_minor_formatter(NullFormatter())
                axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            elif not math.isnan(error):
                axis.axvspan(mean - 2 * error, mean + 2 * error, color="0.9", zorder=0)
                axis.set_xlim(left=max(axis.get_xlim()[0], mean - 4))
            axis.set_xlabel(
                "test accuracy (%)" if across == "accuracy" else "1 − mean confidence (%)"
            )
            axis.set_ylabel(ylabel)
            axis.set_title(f"{model}: {title}")
            axis.grid(True, which="major", color="0.85", linewidth=0.6)
            axis.set_axisbelow(True)
    handles, labels = axes[-1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    seeds = len(found[Setting("MLP", NONE, 0.0)])
    figure.suptitle(
        "Weight-norm penalties and the variance of Î₁ on digits: lines run from no penalty to the "
        f"strongest,\ndotted from early in training to its end; means ± standard errors of {seeds} "
        "seeds; grey: accuracy without penalty ± 2 standard errors"
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of every setting (default 5)")
    parser.add_argument("--epochs", type=int, default=25, help="epochs of training (default 25)")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for penalties.png")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    torch.set_num_threads(1)  # nets this small only wait for other threads
    found = run(seeds=options.seeds, epochs=options.epochs)
    print(format_table(found))
    print(f"\n{summarise(found)}")
    print(f"\n{time.perf_counter() - started:.0f} s")
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        draw(found, options.out / "penalties.png")
        print(f"figure: {options.out / 'penalties.png'}")
    except ImportError as error:
        print(f"no figure: it needs {error.name} (pip install matplotlib)")


if __name__ == "__main__":
    main()
