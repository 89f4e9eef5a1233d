"""Label distributions p(y | h): draws, scores, and norms of moments of the score."""

from __future__ import annotations

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods.base import Likelihood
from fimprobe.likelihoods.bernoulli import Bernoulli
from fimprobe.likelihoods.categorical import Categorical
from fimprobe.likelihoods.gaussian import Gaussian
from fimprobe.likelihoods.independent import Independent
from fimprobe.likelihoods.poisson import Poisson

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "poisson": Poisson,
}

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Independent",
    "Poisson",
    "get_likelihood",
    "sample",
]


def get_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """Return the family of a name, or the given family.

    Args:
        likelihood: A key of ``LIKELIHOODS``, or an object with the methods of :class:`Likelihood`.

    Raises:
        FimprobeError: If it is neither.

    >>> get_likelihood("poisson").name
    'poisson'
    """
    if isinstance(likelihood, str):
        if likelihood not in LIKELIHOODS:
            raise FimprobeError(
                f"likelihood must be one of {sorted(LIKELIHOODS)}, got {likelihood!r}. An object "
                "such as fimprobe.likelihoods.Gaussian(sigma=0.5) is possible too."
            )
        return LIKELIHOODS[likelihood]()
    if isinstance(likelihood, type) or not isinstance(likelihood, Likelihood):
        raise FimprobeError(
            f"likelihood must be one of {sorted(LIKELIHOODS)} or an instance with the methods of "
            f"fimprobe.Likelihood, got {likelihood!r}. Call a class, as in Gaussian(sigma=0.5)."
        )
    return likelihood


def sample(likelihood: Likelihood, outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Draw labels y ~ p(y | h), one set per input.

    Args:
        likelihood: The family.
        outputs: h [B, ...].
        generator: Source of all random numbers, on the CPU; the global generator is not used.

    Returns:
        Labels, of the shape ``likelihood.label_shape(outputs)``.

    >>> sample(Bernoulli(), torch.full((2, 1), 50.0), torch.Generator()).tolist()
    [[1.0], [1.0]]
    """
    shape = likelihood.label_shape(outputs)
    uniforms = torch.rand(shape, generator=generator, dtype=torch.float64) + 2.0**-54
    return likelihood.quantile(outputs, uniforms.clamp_(max=1 - 2.0**-53).to(outputs.device))
