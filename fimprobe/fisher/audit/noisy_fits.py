"""Whether a diagonal is a candidate that depends on random batches or labels.

Each candidate is simulated. Distances to the expectations of all labellings are compared, by two
metrics: one that large entries dominate, and one in which all entries count equally. The diagonal
fits if its distances, their differences and the slope of its logarithm are those of simulations
(Hotelling's T²).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fimprobe.fisher.audit.discriminants import (
    Discriminants,
    covariance_of_batches,
    deviation,
)
from fimprobe.fisher.audit.fits import (
    CONVENTIONS,
    TOLERANCE,
    CandidateFit,
    Convention,
    DataSize,
    describe_input_scale,
)
from fimprobe.fisher.audit.labellings import MODEL
from fimprobe.fisher.audit.simulation import StoredGradients

SIMULATIONS = 60
"""Simulations of each candidate."""

DEVIATIONS = 4.5
"""Standard deviations of simulations inside which a trace fits."""

MARGIN = 4.0
"""The quantile of F's distribution up to which distances fit; that of 99.9 % is about 3."""

DRAWN_MARGIN = 12.0
"""The same for labels drawn from the model: simulations choose among few, and rare labels count."""

LEAST_DEVIATION = 0.01
"""Least standard deviation of the logarithm of a distance."""

STEP = 2**0.25
"""Factor between the batch sizes that are tried."""

NEAR = 1.0
"""Logarithm of a trace over its expectation up to which a convention is simulated."""

LEAST_LIMIT, RATIO = 3.5, 2.0
"""A candidate is not likely if its deviation exceeds both the first number and the second times that
of the best one: unlikely batches deviate from all candidates, and rule none of them out."""

LARGEST_LIMIT = 5.0
"""The deviation above which none is likely."""


@dataclass(kw_only=True)
class NoisyCandidates:
    """Compares a diagonal with simulated candidates.

    Attributes:
        theirs: The diagonal at the stored entries.
        expected: Means over inputs of g² at these entries, by labelling.
        stored: Gradients of single inputs.
        words: Labels in words, by labelling.
        size: Numbers of inputs, batches and labels of the data.
    """

    theirs: Tensor
    expected: Mapping[str, Tensor]
    stored: StoredGradients
    words: Mapping[str, str]
    size: DataSize

    def fits(self) -> Iterator[CandidateFit]:
        """Yield the best fit of every labelling and convention that has one."""
        largest = max(2, self.stored.inputs // 4)
        by_convention: dict[tuple[str, bool, Convention], list[CandidateFit]] = {}
        sizes = _sizes(largest, self.size.batch_size)
        for key in self.expected:
            for size in [1, *sizes] if key == MODEL else sizes:
                for convention, fit in self._fits_at(key, size):
                    by_convention.setdefault((key, size == 1, convention), []).append(fit)
        for key, fits, limit in self._limits(by_convention):
            yield _joined(fits, limit, None if key == MODEL else self.size.batch_size)

    def _limits(
        self, by_convention: Mapping[tuple[str, bool, Convention], list[CandidateFit]]
    ) -> Iterator[tuple[str, list[CandidateFit], float]]:
        """Yield labelling, fits of each convention, and the deviation up to which one is likely."""
        ranked: dict[str, list[float]] = {}
        for (key, _, _), fits in by_convention.items():
            ranked.setdefault(key, []).extend(f.deviation for f in fits if _is_usual(f))
        least = min((x for values in ranked.values() for x in values), default=math.inf)
        limit = min(LARGEST_LIMIT, max(LEAST_LIMIT, RATIO * least))
        for (key, single, _), fits in by_convention.items():
            if single and least <= limit:  # batches explain an unusual scale too
                fits = [f if f.scale_words else replace(f, fits=False) for f in fits]
            # simulations do not know rare labels well enough to separate conventions
            wide = key == MODEL and min(ranked[key], default=math.inf) <= limit
            yield key, fits, LARGEST_LIMIT if wide else limit

    def _fits_at(self, key: str, size: int) -> Iterator[tuple[Convention, CandidateFit]]:
        conventions = CONVENTIONS[:1] if size == 1 else self._near_conventions(key, size)
        if not conventions:
            return
        sums = self.stored.simulate(key, size, SIMULATIONS)
        discriminants = self._discriminants(key, size)
        for convention in conventions:
            batches = -(-self.stored.inputs // size)
            simulated = sums[convention.weighted] / convention.divide(batches, self.stored.inputs)
            scales = (simulated.sum(1) / simulated.sum()).log()
            offset = math.log(float(self.theirs.sum() / simulated.sum(1).mean()))
            spread = float(scales.std()) + TOLERANCE
            if size > 1 and abs(offset) > DEVIATIONS * spread:
                continue
            fit = self._fit(key, size, convention, simulated)
            if fit.fits and discriminants is not None:
                off = deviation(discriminants, self.theirs, simulated)
                fit = replace(fit, deviation=max(abs(offset) / spread, off))
            yield convention, fit

    def _near_conventions(self, key: str, size: int) -> list[Convention]:
        """The conventions whose trace is near, by its expectation over random batches."""
        rows = self.stored.rows[key].flatten(0, 1)
        mean = rows.mean(0).square().sum()
        of_batch = float((rows.square().mean(0).sum() - mean) / size + mean)
        inputs, trace = self.stored.inputs, float(self.theirs.sum())
        batches = -(-inputs // size)
        near = []
        for convention in CONVENTIONS:
            total = of_batch * batches * (size**2 if convention.weighted else 1)
            ratio = trace / max(total, 1e-300) * convention.divide(batches, inputs)
            if abs(math.log(max(ratio, 1e-300))) <= NEAR:
                near.append(convention)
        return near

    def _discriminants(self, key: str, size: int) -> Discriminants | None:
        """Those of a candidate; None where expectations or labels are those of a sample."""
        rows = self.stored.rows[key]
        if size == 1 or rows.shape[1] != self.stored.inputs:
            return None
        return Discriminants(self.expected, key, covariance_of_batches(rows, size))

    def _fit(self, key: str, size: int, convention: Convention, simulated: Tensor) -> CandidateFit:
        centre = simulated.mean(0)
        shapes = {**self.expected, key: centre}
        ours, theirs = _features(simulated, shapes, key), _features(self.theirs[None], shapes, key)
        scale = float(self.theirs.sum() / centre.sum())
        spread = float((simulated.sum(1) / centre.sum()).log().std())
        words = convention.words
        if size == 1:
            tolerance = 2 * spread + TOLERANCE
            words = describe_input_scale(scale, self.size, tolerance)
        return CandidateFit(
            labels="one label drawn from the model for each input" if size == 1 else self.words[key],
            batch_size=size,
            batch_range=(size, size),
            scale=scale,
            scale_words=words,
            error=float(theirs[0, 0].exp()),
            noise_error=float(ours[:, 0].exp().square().mean().sqrt()),
            fits=_is_one_of(theirs[0], ours, DRAWN_MARGIN if key == MODEL else MARGIN),
        )


def _is_one_of(x: Tensor, sample: Tensor, margin: float) -> bool:
    """Whether a vector fits a sample [n, p], by Hotelling's T².

    Args:
        x: The vector.
        sample: Simulations.
        margin: Quantile of F's distribution up to which it fits.
    """
    count, size = sample.shape
    centre = sample.mean(0)
    covariance = (sample - centre).T @ (sample - centre) / (count - 1)
    covariance += LEAST_DEVIATION**2 * torch.eye(size, dtype=covariance.dtype)
    square = float((x - centre) @ torch.linalg.solve(covariance, x - centre))
    return square <= margin * size * (count - 1) * (count + 1) / (count * (count - size))


def _features(x: Tensor, shapes: Mapping[str, Tensor], key: str) -> Tensor:
    """Distances to one shape by two metrics, their differences to the others', and a slope.

    Args:
        x: Diagonals [n, entries].
        shapes: Expectations by labelling.
        key: The labelling whose distances come first.
    """
    alive = shapes[key] > 0
    others = [shape for name, shape in shapes.items() if name != key]
    features = []
    for metric in (_sines, _log_ratios):
        first = metric(x[:, alive], shapes[key][alive])
        features += [first, *(metric(x[:, alive], shape[alive]) - first for shape in others)]
    return torch.stack([*features, _slopes(x[:, alive], shapes[key][alive])], 1)


def _sines(x: Tensor, shape: Tensor) -> Tensor:
    """log √(1 − cos²), to which large entries contribute most."""
    cosines = x @ shape / (x.norm(dim=1) * shape.norm()).clamp(min=1e-300)
    return (1 - cosines.square()).clamp(min=1e-24).log() / 2


def _log_ratios(x: Tensor, shape: Tensor) -> Tensor:
    """The logarithm of the spread of log(x/shape) over entries."""
    positive = (x > 0).all(0) & (shape > 0)
    if int(positive.sum()) < 2:
        return torch.zeros(len(x), dtype=x.dtype)
    ratios = (x[:, positive] / shape[positive]).log()
    return ratios.std(1).clamp(min=1e-12).log()


def _slopes(x: Tensor, shape: Tensor) -> Tensor:
    """The slope of log x over log shape, 1 for noise that multiplies: roots and powers differ."""
    positive = (x > 0).all(0) & (shape > 0)
    if int(positive.sum()) < 2:
        return torch.ones(len(x), dtype=x.dtype)
    logs, centre = x[:, positive].log(), shape[positive].log()
    centre = centre - centre.mean()
    return (logs @ centre) / centre.square().sum().clamp(min=1e-300)


def _is_usual(fit: CandidateFit) -> bool:
    """Whether batches with a usual scale fit."""
    return fit.fits and fit.batch_size > 1 and bool(fit.scale_words)


def _joined(fits: list[CandidateFit], limit: float, given: int | None) -> CandidateFit:
    """One fit of a convention, with the range of batch sizes that are likely; or the nearest.

    Args:
        fits: One for each batch size.
        limit: The deviation up to which a fit is likely.
        given: The batch size of the data, which is preferred.
    """
    fitting = [fit for fit in fits if fit.fits and fit.deviation <= limit]
    if not fitting:
        nearest = min(fits, key=lambda fit: abs(math.log(fit.error / fit.noise_error)))
        return replace(nearest, fits=False)
    sizes = [fit.batch_size for fit in fitting]
    of_data = [fit for fit in fitting if fit.batch_size == given]
    chosen = min(of_data or fitting, key=lambda fit: (fit.deviation, abs(math.log(fit.scale))))
    return replace(chosen, batch_range=(min(sizes), max(sizes)))


def _sizes(largest: int, given: int | None) -> list[int]:
    """Batch sizes that are tried."""
    sizes, x = {given} if given and 1 < given <= largest else set(), 2.0
    while x <= largest:
        sizes.add(round(x))
        x *= STEP
    return sorted(sizes)
