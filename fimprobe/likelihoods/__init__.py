"""Label distributions p(y | h): draws, scores, and norms of moments of the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods.base import Likelihood
from fimprobe.likelihoods.bernoulli import Bernoulli
from fimprobe.likelihoods.categorical import Categorical
from fimprobe.likelihoods.gaussian import Gaussian
from fimprobe.likelihoods.heteroscedastic_gaussian import HeteroscedasticGaussian
from fimprobe.likelihoods.independent import Independent
from fimprobe.likelihoods.joint import Joint
from fimprobe.likelihoods.poisson import Poisson

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "heteroscedastic_gaussian": HeteroscedasticGaussian,
    "poisson": Poisson,
}

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Independent",
    "Joint",
    "Poisson",
    "get_likelihood",
    "sample",
]


Family = str | Likelihood
"""The name of a family, or an object with the methods of :class:`Likelihood`."""


LikelihoodOption = Family | Sequence[Family] | Mapping[Any, Family]
"""One family, or those of several heads."""


def get_likelihood(likelihood: LikelihoodOption) -> Likelihood:
    """Return the family of a name, or the given family.

    Args:
        likelihood: A key of ``LIKELIHOODS``, or an object with the methods of :class:`Likelihood`.
            For several heads a list with the family of each output, or a mapping from names or
            positions of outputs to families.

    Raises:
        FimprobeError: If it is neither.

    >>> get_likelihood("poisson").name
    'poisson'
    >>> get_likelihood({"logits": "categorical", "value": "gaussian"}).name
    'logits: categorical, value: gaussian'
    """
    if isinstance(likelihood, (list, tuple)):
        likelihood = dict(enumerate(likelihood))
    if isinstance(likelihood, Mapping):
        return _join_families(likelihood)
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


def _join_families(families: Mapping[Any, Family]) -> Joint:
    """Return the joint distribution of several heads.

    Raises:
        FimprobeError: If there is no head, or if one has no family.
    """
    if not families:
        raise FimprobeError(
            "likelihood must have a family for each head, got none. Name one, as in "
            "{'logits': 'categorical'}."
        )
    joined = {}
    for head, family in families.items():
        if isinstance(family, (list, tuple, Mapping, Joint)):
            raise FimprobeError(
                f"likelihood must have one family for each head, got {family!r} for head {head!r}. "
                "Name nested outputs by a dotted path, as in {'aux.0': 'categorical'}."
            )
        joined[str(head)] = member = get_likelihood(family)
        if hasattr(member, "select_outputs"):
            raise FimprobeError(
                f"likelihood must have a family of one tensor for each head, got {member.name!r} for "
                f"head {head!r}, which reads a mean and a variance. Measure it by itself, with "
                "output= a function to the pair."
            )
    return Joint(families=joined)


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
