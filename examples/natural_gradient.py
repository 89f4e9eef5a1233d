"""Natural gradient with an estimated Fisher information: Î₁ against Î₂ on regression data.

The problems are linear regression on scikit-learn's diabetes data, and logistic regression (odd or
even digit) on twenty principal components of its digits. Each step is θ ← θ − η (Î + λI)⁻¹ ∇L, with
the gradient of all data and Î from N draws of labels from the model. One draw labels all B inputs
together: the data set is one observation with outputs h = Xθ in R^B, and a draw costs one backward
pass. The curves therefore differ by the noise of the labels in the preconditioner alone, each at its
best η.

The outputs are natural parameters and linear in θ, so that Î₂ has no such noise: one draw gives the
Fisher information (Soen & Sun, 2021, eq. 11 and 16 with ∂²h = 0). Î₁ has rank N and the variance of
eq. 13: relative to ‖F‖_F² it is ((tr F)²/‖F‖_F² + 1)/N for Gaussian labels. The damping λ makes the
matrix invertible for N < P. The experiment follows the toy experiment of Soen & Sun (2024), Figure 1,
on real data and as a function of N.

Run: python examples/natural_gradient.py --seeds 20 --steps 25 --out /tmp/natural_gradient
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, vmap

from natural_gradient_figure import (  # isort: skip
    EXACT,
    PLAIN,
    Curve,
    draw,
    mean_and_error,
    root_mean_square,
)

DRAWS = (1, 4, 16, 64, 256)
RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Problem(NamedTuple):
    """Data [B, P], [B] and a family of labels with the natural parameter h = xᵀθ."""

    name: str
    x: Tensor
    y: Tensor
    log_likelihood: Callable[[Tensor, Tensor], Tensor]
    """Function of h and y, up to a term without h."""
    sample: Callable[[Tensor, torch.Generator], Tensor]
    """Function of h and a generator that returns labels y ~ p(y | h)."""
    output_fisher: Callable[[Tensor], Tensor]
    """Function of h that returns I(h)."""


def linear_regression() -> Problem:
    """Return y ~ N(h, σ²) on the diabetes data, σ² the residual variance of least squares."""
    from sklearn.datasets import load_diabetes

    features, target = load_diabetes(return_X_y=True)
    x, y = _with_bias(torch.tensor(features)), _standard(torch.tensor(target))
    residual = y - x @ torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    s2 = float(residual.square().mean())
    return Problem(
        name="linear regression (diabetes)",
        x=x,
        y=y,
        log_likelihood=lambda h, y: -((y - h) ** 2) / (2 * s2),
        sample=lambda h, g: h + s2**0.5 * torch.randn(h.shape, generator=g, dtype=h.dtype),
        output_fisher=lambda h: torch.full_like(h, 1 / s2),
    )


def logistic_regression() -> Problem:
    """Return y ~ Bernoulli(sigmoid(h)): whether a digit is odd, which no plane separates."""
    from sklearn.datasets import load_digits

    pixels, digit = load_digits(return_X_y=True)
    centred = torch.tensor(pixels) - torch.tensor(pixels).mean(0)
    components = torch.linalg.svd(centred, full_matrices=False).Vh[:20]
    projected = centred @ components.T
    return Problem(
        name="logistic regression (digits)",
        # one scale for all components, whose different sizes are what the natural gradient corrects
        x=torch.cat([projected / projected.std(), torch.ones(len(projected), 1).double()], 1),
        y=torch.tensor(digit % 2, dtype=torch.float64),
        log_likelihood=lambda h, y: y * h - torch.nn.functional.softplus(h),
        sample=lambda h, g: (torch.rand(h.shape, generator=g, dtype=h.dtype) < h.sigmoid()).to(h),
        output_fisher=lambda h: h.sigmoid() * (-h).sigmoid(),
    )


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0)


def _with_bias(x: Tensor) -> Tensor:
    return torch.cat([_standard(x), torch.ones(len(x), 1, dtype=x.dtype)], 1)


def estimate_i1(problem: Problem, theta: Tensor, labels: Tensor) -> Tensor:
    """Return Î₁: the mean of g gᵀ/B over draws of labels [N, B] from the model, g = Σ_b g_b."""
    score = grad(lambda theta, y: problem.log_likelihood(problem.x @ theta, y).sum())
    scores = vmap(score, (None, 0))(theta, labels)
    return scores.T @ scores / labels.numel()


def estimate_i2(problem: Problem, theta: Tensor, labels: Tensor) -> Tensor:
    """Return Î₂: minus the mean Hessian of the log-likelihood with the same labels [N, B]."""
    second = hessian(lambda theta, y: problem.log_likelihood(problem.x @ theta, y).mean())
    return -vmap(second, (None, 0))(theta, labels).mean(0)


def fisher(problem: Problem, theta: Tensor) -> Tensor:
    """Return F: the mean over inputs of Jᵀ I(h) J."""
    jacobian = jacfwd(lambda theta: problem.x @ theta)(theta)
    information = problem.output_fisher(problem.x @ theta)
    return jacobian.T @ (information[:, None] * jacobian) / len(jacobian)


def loss(problem: Problem, theta: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the data, up to a constant."""
    return -problem.log_likelihood(problem.x @ theta, problem.y).mean()


def optimum(problem: Problem) -> Tensor:
    """Return the maximum-likelihood θ by Newton's method."""
    theta = torch.zeros(problem.x.shape[1], dtype=problem.x.dtype)
    for _ in range(50):
        gradient = grad(lambda t: loss(problem, t))(theta)
        theta = theta - torch.linalg.solve(fisher(problem, theta), gradient)
    return theta


Results = dict[str, tuple[Problem, dict[tuple[str, int], Curve]]]
"""Every problem by name, with its curves by estimator and number of draws."""


def descend(
    problem: Problem,
    estimator: str,
    draws: int,
    *,
    seeds: int,
    steps: int,
    rate: float,
    damping: float,
) -> Curve:
    """Descend along the natural gradient from θ = 0, all seeds together.

    Args:
        problem: The data and the likelihood.
        estimator: "Î₁", "Î₂", ``PLAIN`` or ``EXACT``.
        draws: N.
        seeds: Number of runs.
        steps: Steps of each run.
        rate: η.
        damping: λ in units of the mean of F's diagonal at the start.
    """
    width = problem.x.shape[1]
    theta = torch.zeros(seeds, width, dtype=problem.x.dtype)
    start, best = fisher(problem, theta[0]), loss(problem, optimum(problem))
    ridge = damping * start.trace() / width * torch.eye(width).to(start)
    generator = torch.Generator().manual_seed(draws)
    excess = [vmap(lambda t: loss(problem, t))(theta) - best]
    error = torch.zeros(seeds)
    for step in range(steps):
        gradient = vmap(grad(lambda t: loss(problem, t)))(theta)
        if estimator == PLAIN:
            estimate = torch.zeros_like(start)
        elif estimator == EXACT:
            estimate = vmap(lambda t: fisher(problem, t))(theta)
        else:
            outputs = (theta @ problem.x.T)[:, None].expand(-1, draws, -1)
            labels = problem.sample(outputs, generator)
            function = estimate_i1 if estimator == "Î₁" else estimate_i2
            estimate = vmap(lambda t, y, f=function: f(problem, t, y))(theta, labels)
        if step == 0:
            error = (estimate - start).norm(dim=(-2, -1)) / start.norm()
        step_direction = torch.linalg.solve_ex(estimate + ridge, gradient[..., None]).result
        theta = theta - rate * step_direction[..., 0]
        excess.append(vmap(lambda t: loss(problem, t))(theta) - best)
    return Curve(torch.stack(excess, 1).clamp_min(0), error, rate)


def descend_best(problem: Problem, estimator: str, draws: int, **options: float) -> Curve:
    """Return the curve with the step size of ``RATES`` that has the lowest mean final loss."""
    curves = [descend(problem, estimator, draws, rate=rate, **options) for rate in RATES]
    return min(curves, key=lambda c: float(c.excess[:, -1].mean().nan_to_num(math.inf)))


def run(*, seeds: int, steps: int, damping: float) -> Results:
    """Return the curves of every problem by estimator and number of draws."""
    results = {}
    options = {"seeds": seeds, "steps": steps, "damping": damping}
    for problem in (linear_regression(), logistic_regression()):
        # a single run where nothing is random; one draw of Î₂, because all are equal
        single = options | {"seeds": 1}
        curves = {
            (PLAIN, 0): descend_best(problem, PLAIN, 0, **single),
            (EXACT, 0): descend_best(problem, EXACT, 0, **single),
            ("Î₂", 1): descend_best(problem, "Î₂", 1, **options),
        }
        for draws in DRAWS:
            curves["Î₁", draws] = descend_best(problem, "Î₁", draws, **options)
        results[problem.name] = problem, curves
    return results


def predicted_error(problem: Problem, draws: int) -> float:
    """Return the relative error of Î₁ at θ = 0 for Gaussian scores: √(((tr F)²/‖F‖_F² + 1)/N)."""
    start = fisher(problem, torch.zeros(problem.x.shape[1], dtype=problem.x.dtype))
    return math.sqrt((float(start.trace() / start.norm()) ** 2 + 1) / draws)


def steps_to(excess: Tensor, share: float) -> str:
    """Return the mean steps until the excess loss is a share of its start, where that is reached."""
    below = excess <= share * excess[:, :1]
    reached = below.any(1)
    if not bool(reached.any()):
        return "–"
    first = below[reached].double().argmax(1).double()
    some = "" if bool(reached.all()) else f" ({int(reached.sum())} of {len(reached)} seeds)"
    return f"{float(first.mean()):.1f}{some}"


def format_table(results: Results) -> str:
    """Return step size, noise at the start, and the share of the excess loss at the end."""
    lines = []
    for name, (problem, curves) in results.items():
        lines.append(
            f"{name + ': preconditioner':46}{'η':>5}{'‖Î − F‖/‖F‖ at start':>24}{'theory':>10}"
            f"{'excess loss left':>26}{'steps to 1 %':>24}"
        )
        for (estimator, draws), curve in curves.items():
            cells = []
            final = mean_and_error(curve.excess[:, -1] / curve.excess[:, 0])
            for mean, error in (root_mean_square(curve.error.view(-1)), map(float, final)):
                cells.append(f"{mean:.2g}" + ("" if math.isnan(error) else f" ± {error:.1g}"))
            noise = cells[0] if estimator != PLAIN else ""
            theory = f"{predicted_error(problem, draws):.2g}" if estimator == "Î₁" else ""
            label = f"{estimator}, N = {draws}" if draws else estimator
            lines.append(
                f"  {label:44}{curve.rate:>5g}{noise:>24}{theory:>10}{cells[1]:>26}"
                f"{steps_to(curve.excess, 0.01):>24}"
            )
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Descend, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="runs of every setting (default 20)")
    parser.add_argument("--steps", type=int, default=25, help="steps of descent (default 25)")
    parser.add_argument("--damping", type=float, default=0.1, help="λ / mean diag F (default 0.1)")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the figure")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = run(seeds=options.seeds, steps=options.steps, damping=options.damping)
    print(format_table(results))
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        theory = {
            name: [predicted_error(problem, n) for n in DRAWS]
            for name, (problem, _) in results.items()
        }
        curves = {name: curves for name, (_, curves) in results.items()}
        draw(curves, theory, options.out / "natural_gradient.png", options.damping)
        print(f"figure: {options.out / 'natural_gradient.png'}")
    except ImportError as error:
        print(f"no figure: it needs {error.name} (pip install matplotlib)")


if __name__ == "__main__":
    main()
