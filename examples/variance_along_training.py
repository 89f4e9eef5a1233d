"""Î₁ against Î₂ along training, layer by layer: variances and their bounds, on digits.

The MNIST experiment of Soen & Sun 2024 (Trade-Offs of Diagonal Fisher Information Matrix Estimators)
on scikit-learn's digits: four Linear layers with sigmoids between them, 20 epochs of Adam. At the
start, within the first epochs and after each, on held-out digits: tr F, the variances V1 of Î₁ and V2
of Î₂ from a single label (sums over the layer's diagonal; all labels and second derivatives exact),
the paper's bounds on them and lg = log₁₀(bound / variance). V2's bound has ‖∂²h‖² from one random
sign vector for each digit, which errs by 3 to 9 % here.

Medians of 5 seeds with torch 2.13, accuracy going from 11 to 95 %, mean confidence from 15 to 95 %:

- Last layer: V2 is exactly 0 in all 125 measurements, as the paper says. V1 is larger there than in
  any other layer in each of them: 1.7 at the start against 3e-11 in layer 1, 0.65 against 0.42 at
  the end.
- Hidden layers: that Î₂ varies less, as in the paper's toy experiment, is not so here. V2 is 56,000,
  980 and 37 times V1 in layers 1, 2, 3 at the start, two to ten times as much of it within two
  epochs, and 0.8, 2.2 and 5.0 times V1 at the end: V1 is of fourth order in what little signal the
  sigmoids pass back, V2 of second. Î₂ gets ahead in layer 1 only, first at epochs 16 to 19, in four
  seeds of five.
- Confidence: √V1/‖diag F‖, the relative error from one label, grows in every layer, from 1.0 to 2.6
  at the start to 5.7 to 7.7. In the last layer V1 itself falls, but F falls faster. Î₂'s relative
  error falls in layers 1 and 2 (340 to 6.7, 36 to 8.6) and rises in layer 3 (6 to 15).
- Bounds: all hold. They loosen while the net learns most and tighten a little afterwards. In hidden
  layers ‖J‖⁴λ_max(M) is 8 to 12 times V1 at the start, 30 to 41 times at epochs 8 to 10, 20 to 30
  times at the end; in the last layer it goes on growing, from 1.6 to 13 times. F(max g² − F) never
  exceeds 3.1 times V1, and is 1.1 to 1.2 times V1 in the last layer. ‖∂²h‖²λ_max(I) is 1.6 times V2
  at the start, less while the outputs are nearly uniform (I's eigenvalues are then equal but for
  one), 8 to 10 times at epochs 7 to 9, 5 to 7 times at the end.
- ``--activation relu``: V2 is exactly 0 in every layer and measurement, so that Î₂'s diagonal is F
  from a single label. V1 grows by four to six orders of magnitude within two epochs in the hidden
  layers, √V1/‖diag F‖ ends at 10 to 12 (confidence 98 %), ‖J‖⁴λ_max(M) gets up to 83 times V1.

Run: python examples/variance_along_training.py --seeds 5 --epochs 20 --out /tmp/along
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fimprobe

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}
LAYERS = 4
EARLY = (0.25, 0.5, 0.75, 1.5)
"""Epochs measured beside 0, 1, 2, …: most happens at the beginning."""
SHOWN = (0, 0.5, 1, 2, 3, 5, 10, 20)
"""Epochs in the table, beside the last."""


class Layer(NamedTuple):
    """One layer's diagonals, summed over its parameters and averaged over the inputs."""

    trace: float
    """tr F."""
    norm: float
    """‖diag F‖₂."""
    v1: float
    """Of one label: Î₁'s variance Σᵢ E g⁴ − F², exact."""
    v1_spectral: float
    """Its bound Σᵢ ‖Jᵢ‖⁴ λ_max(M)."""
    v1_range: float
    """Its bound Σᵢ Fᵢᵢ (max_y g² − Fᵢᵢ)."""
    v2: float
    """Of one label: Î₂'s variance Σᵢ E Rᵢᵢ², exact."""
    v2_spectral: float
    """Its bound Σᵢ ‖∂²ᵢᵢh‖² λ_max(I), estimated."""

    @property
    def errors(self) -> tuple[float, float]:
        """√V1 and √V2 over ‖diag F‖: relative errors of a single label, the inputs given."""
        return math.sqrt(self.v1) / self.norm, math.sqrt(self.v2) / self.norm

    @property
    def looseness(self) -> tuple[float, float, float]:
        """log₁₀(bound / variance) in the order above; NaN where the variance is zero."""
        pairs = ((self.v1_spectral, self.v1), (self.v1_range, self.v1), (self.v2_spectral, self.v2))
        first, second, third = (math.log10(b / v) if v else math.nan for b, v in pairs)
        return first, second, third


class Point(NamedTuple):
    """One measurement along one training."""

    epoch: float
    accuracy: float
    confidence: float
    layers: list[Layer]


class Data(NamedTuple):
    """Digits as [B, 64] in 0 to 1, and their labels."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_data() -> Data:
    """1,437 digits to train on, 360 held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = shuffled[:1437], shuffled[1437:]
    return Data(x[train], y[train], x[test], y[test])


def make_mlp(activation: str, width: int) -> nn.Sequential:
    """Four Linear layers."""
    sizes, layers = [64, width, width, width, 10], []
    for i in range(LAYERS):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def train(model: nn.Module, data: Data, *, epochs: int, lr: float, seed: int) -> Iterator[float]:
    """Adam on the cross-entropy; stops at the start, in the first epochs and after each one."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    order = torch.Generator().manual_seed(seed)
    per_epoch = -(-len(data.x) // 64)
    times = {round(t * per_epoch): t for t in (*EARLY, *range(1, epochs + 1)) if t <= epochs}
    yield 0.0
    step = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(data.x), generator=order).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
            step += 1
            if step in times:
                yield float(times[step])


def measure(model: nn.Module, inputs: Tensor) -> list[Layer]:
    """Every layer's diagonals; labels integrated over, second derivatives exact (BackPACK)."""
    report = fimprobe.measure(
        model,
        inputs,
        likelihood="categorical",
        draws="exact",
        second_order="exact",
        bounds=True,
        diagonals=True,
        estimators=("i1", "i2"),
    )
    layers = []
    for group in report.layers.values():
        first, second = group.i1, group.i2
        # of these inputs: first.norm is that of all inputs like them
        norm = float(torch.cat([d.flatten() for d in first.diagonal.values()]).norm())
        values: list[Any] = [first.trace, norm, first.label_variance]
        values += [first.diagonal_bound, first.diagonal_range_bound]
        values += [second.label_variance, second.diagonal_bound]
        layers.append(Layer(*values))
    return layers


def run(
    *, seeds: int, epochs: int, lr: float, activation: str, width: int, inputs: int
) -> list[list[Point]]:
    """The measurements of every seed, in order of time."""
    data = load_data()
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = make_mlp(activation, width)
        points = []
        for epoch in train(model, data, epochs=epochs, lr=lr, seed=seed):
            with torch.no_grad():
                p = torch.softmax(model(data.test_x).double(), 1)
            accuracy = float((p.argmax(1) == data.test_y).double().mean())
            layers = measure(model, data.test_x[:inputs])
            points.append(Point(epoch, accuracy, float(p.amax(1).mean()), layers))
        found.append(points)
    return found


class Spread(NamedTuple):
    """A number at one time: median, lowest and highest over the seeds."""

    epoch: float
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Median and range."""
        if self.high == self.low:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


def over_seeds(found: list[list[Point]], of: Callable[[Point], float]) -> list[Spread]:
    """What ``of`` finds, at each time."""
    rows = []
    for points in zip(*found, strict=True):
        values = [of(p) for p in points]
        rows.append(Spread(points[0].epoch, statistics.median(values), min(values), max(values)))
    return rows


def has_no_variance(found: list[list[Point]], layer: int) -> bool:
    """Is Î₂'s variance exactly zero in every measurement of the layer?"""
    return all(p.layers[layer].v2 == 0 for points in found for p in points)


COLUMNS: dict[str, Callable[[Layer], float]] = {
    "tr F": lambda x: x.trace,
    "V1": lambda x: x.v1,
    "V2": lambda x: x.v2,
    "√V1/‖F‖": lambda x: x.errors[0],
    "√V2/‖F‖": lambda x: x.errors[1],
    "lg bound/V1": lambda x: x.looseness[0],
    "lg range/V1": lambda x: x.looseness[1],
    "lg bound/V2": lambda x: x.looseness[2],
}


def format_table(found: list[list[Point]]) -> str:
    """Medians over the seeds, at the times in ``SHOWN`` and at the end."""
    head = f"{'epoch':>5}{'accuracy':>10}{'confidence':>12}{'layer':>7}"
    lines = [head + "".join(f"{name:>13}" for name in COLUMNS)]
    for at, point in enumerate(found[0]):
        if point.epoch not in SHOWN and point is not found[0][-1]:
            continue
        now = [[points[at]] for points in found]
        right, sure = (over_seeds(now, of)[0].median for of in (accuracy, confidence))
        start = f"{point.epoch:5g}{right:8.1f} %{sure:10.1f} %"
        for i in range(LAYERS):
            cells = []
            for name, of in COLUMNS.items():
                value = over_seeds(now, lambda p, of=of, i=i: of(p.layers[i]))[0].median
                digits = ".2f" if name.startswith("lg") else ".3g"
                cells.append("–" if math.isnan(value) else f"{value:{digits}}")
            lines.append(f"{start:27}{i + 1:>7}" + "".join(f"{c:>13}" for c in cells))
            start = ""
    return "\n".join(lines)


def accuracy(point: Point) -> float:
    """In %."""
    return 100 * point.accuracy


def confidence(point: Point) -> float:
    """In %."""
    return 100 * point.confidence


def summarise(found: list[list[Point]]) -> str:
    """Each layer at the start, at its highest and at the end: medians [lowest, highest]."""
    every = [x for points in found for p in points for x in p.layers]
    shares = [x.v1 / x.v1_spectral for x in every] + [x.v1 / x.v1_range for x in every]
    shares += [x.v2 / x.v2_spectral for x in every if x.v2]
    names = ("√V1/‖F‖", "lg bound/V1", "lg range/V1", "√V2/‖F‖", "lg bound/V2")
    columns = {name: COLUMNS[name] for name in names} | {"V2/V1": lambda x: x.v2 / x.v1}
    lines = [f"{'':22}{'at the start':32}{'at its highest':44}at the end"]
    for i in range(LAYERS):
        for name, of in columns.items():
            if "V2" in name and has_no_variance(found, i):
                continue
            rows = over_seeds(found, lambda p, of=of, i=i: of(p.layers[i]))
            top = max(rows, key=lambda r: r.median)
            peak = f"{top}, epoch {top.epoch:g}"
            lines.append(f"{f'layer {i + 1}: {name}':22}{rows[0]!s:32}{peak:44}{rows[-1]}")
        if has_no_variance(found, i):
            lines.append(
                f"layer {i + 1}: V2 is exactly 0 in each of {len(every) // LAYERS} measurements"
            )
    lines.append(f"\nHighest share of a bound that a variance took: {max(shares):.1%}")
    return "\n".join(lines)


BLUE, RED = "#0072B2", "#D55E00"  # Okabe and Ito's colours, told apart by every kind of sight
LOOKS = (("#000000", "o"), ("#E69F00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
CURVES: tuple[tuple[int, str, str, str, Callable[[Layer], float]], ...] = (
    (0, "variance V1 of Î₁", BLUE, "-", lambda x: x.v1),
    (0, "bound ‖J‖⁴ λmax(M) on V1", BLUE, "--", lambda x: x.v1_spectral),
    (0, "bound F (max g² − F) on V1", BLUE, ":", lambda x: x.v1_range),
    (0, "variance V2 of Î₂", RED, "-", lambda x: x.v2),
    (0, "bound ‖∂²h‖² λmax(I) on V2", RED, "--", lambda x: x.v2_spectral),
    (1, "", BLUE, "-", lambda x: x.errors[0]),
    (1, "", RED, "-", lambda x: x.errors[1]),
    (2, "", BLUE, "--", lambda x: x.looseness[0]),
    (2, "", BLUE, ":", lambda x: x.looseness[1]),
    (2, "", RED, "--", lambda x: x.looseness[2]),
)


def draw(found: list[list[Point]], path: Path, activation: str) -> None:
    """For each layer variances and bounds, relative errors, looseness; for all, F and V2/V1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = pyplot.subplots(3, LAYERS + 1, figsize=(17, 9.6), sharex=True)
    last = axes[:, -1]
    for row in axes[1:, :-1]:
        for axis in row[1:]:
            axis.sharey(row[0])

    def line(axis: Any, of: Callable[[Point], float], color: str, **look: Any) -> None:
        rows = over_seeds(found, of)
        epochs, medians = [r.epoch for r in rows], [r.median for r in rows]
        axis.plot(epochs, medians, color=color, linewidth=1.6, markersize=4, markevery=2, **look)
        low, high = [r.low for r in rows], [r.high for r in rows]
        axis.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)

    for i, (color, marker) in enumerate(LOOKS):
        silent = has_no_variance(found, i)
        for row, label, shade, style, of in CURVES:
            if not (silent and shade == RED):
                where = {"linestyle": style, "label": label}
                line(axes[row][i], lambda p, of=of, i=i: of(p.layers[i]), shade, **where)
        axes[0][i].set_title(f"layer {i + 1}")
        if silent:
            place = {"ha": "right", "transform": axes[1][i].transAxes}
            axes[1][i].text(0.96, 0.06, "V2 = 0 exactly", color=RED, **place)
        own = {"marker": marker, "label": f"layer {i + 1}"}
        line(last[0], lambda p, i=i: p.layers[i].trace, color, **own)
        if not silent:
            line(last[1], lambda p, i=i: p.layers[i].v2 / p.layers[i].v1, color, **own)
    line(last[2], accuracy, "#000000", label="accuracy")
    line(last[2], confidence, "#56B4E9", linestyle="--", label="mean confidence")
    for axis in (*axes[0], *axes[1]):
        axis.set_yscale("log")
    axes[0][0].set_ylabel("variance of one label, Σᵢ Vᵢ")
    axes[1][0].set_ylabel("relative error √V / ‖diag F‖")
    axes[2][0].set_ylabel("log₁₀(bound / variance)")
    axes[2][0].set_ylim(bottom=0)
    axes[1][0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1][0].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes[1][0].yaxis.set_minor_formatter(NullFormatter())
    for axis, title in zip(last, ("tr F", "V2 / V1", "held-out digits (%)"), strict=True):
        axis.set_title(title)
        axis.set_visible(axis.has_data())
        if axis.has_data():
            axis.legend(frameon=False, fontsize=9)
    last[1].axhline(1, color="0.4", linewidth=0.8)
    last[1].text(0.2, 0.85, "Î₂ errs less", color="0.3", fontsize=9, va="top")
    for axis in axes.flat:
        axis.grid(True, color="0.9", linewidth=0.6)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        "Diagonal of the Fisher information: variance of its estimators along the training of a "
        f"{activation} MLP on digits\nmedians of {len(found)} seeds, shaded from lowest to highest"
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="trainings (default 5)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of training (default 20)")
    parser.add_argument("--lr", type=float, default=1e-2, help="Adam's step size (default 0.01)")
    parser.add_argument("--width", type=int, default=32, help="units of a hidden layer (default 32)")
    parser.add_argument("--inputs", type=int, default=180, help="held-out digits measured (180)")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="sigmoid")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the figure")
    options = vars(parser.parse_args(arguments))
    folder = options.pop("out")
    started = time.perf_counter()
    torch.set_num_threads(1)  # nets this small only wait for other threads
    found = run(**options)
    print(f"{format_table(found)}\n\n{summarise(found)}")
    print(f"\n{time.perf_counter() - started:.0f} s")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        draw(found, folder / "variance_along_training.png", options["activation"])
        print(f"figure: {folder / 'variance_along_training.png'}")
    except ImportError as error:
        print(f"no figure: it needs {error.name} (pip install matplotlib)")


if __name__ == "__main__":
    main()
