"""The table of the estimators: their keys, symbols and descriptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

EstimatorKey = Literal["i1", "i2", "ih", "empirical"]
"""A value of the option ``estimators``, a field of ``GroupEstimates`` and a key of its record."""


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """The names of one estimator, and where it is shown."""

    key: EstimatorKey
    """Its name in options, fields, records and TensorBoard tags."""
    symbol: str
    """Its name in tables, charts and sentences."""
    formula: str
    """Its definition, as a mean over inputs and draws."""
    description: str
    """One sentence for a reader of the charts."""
    unbiased: bool = True
    """Whether its expectation is F, so that its error and its number of pairs are defined."""
    by_layer: bool = False
    """Whether charts and figures show it for every layer."""


ESTIMATORS = {
    estimator.key: estimator
    for estimator in (
        Estimator(
            key="i1",
            symbol="Î₁",
            formula="mean of (∂ log p(y|x) / ∂θ) (∂ log p(y|x) / ∂θ)ᵀ, y drawn from the model",
            description="Î₁ = the mean outer product of gradients of log p, labels drawn from the "
            "model.",
            by_layer=True,
        ),
        Estimator(
            key="i2",
            symbol="Î₂",
            formula="− mean of ∂² log p(y|x) / ∂θ∂θᵀ, y drawn from the model",
            description="Î₂ = minus the mean Hessian of log p, labels drawn from the model.",
            by_layer=True,
        ),
        Estimator(
            key="ih",
            symbol="Î_H",
            formula="mean of (Jᵀ L ξ)(Jᵀ L ξ)ᵀ, LLᵀ = I(h), ξ random signs",
            description="Î_H = Hutchinson's estimator: F seen through random directions of the "
            "outputs.",
        ),
        Estimator(
            key="empirical",
            symbol="Empirical Fisher",
            formula="as Î₁, with the labels of the data (biased: not F)",
            description="With the labels of the data: not the Fisher information.",
            unbiased=False,
        ),
    )
}
"""Every estimator by its key, in the order of tables and charts."""

KEYS: tuple[EstimatorKey, ...] = get_args(EstimatorKey)
"""The allowed values of the option ``estimators``."""

UNBIASED_KEYS = tuple(key for key in KEYS if ESTIMATORS[key].unbiased)
"""The estimators of F itself."""

LAYER_KEYS = tuple(key for key in KEYS if ESTIMATORS[key].by_layer)
"""The estimators that charts and figures show for every layer."""

SYMBOLS: dict[str, str] = {key: ESTIMATORS[key].symbol for key in KEYS}
"""The symbol of every estimator by its key."""

ESTIMATOR_DESCRIPTIONS: dict[str, str] = {key: ESTIMATORS[key].description for key in KEYS}
"""The description of every estimator by its key."""

RECORD_KEYS = (*KEYS, "activation", "geometry")
"""The keys of a group's record (``Report.to_dict``): the estimators, and the records of layers."""
