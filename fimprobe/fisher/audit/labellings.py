"""Which labels a diagonal may have been computed with: vectors at the outputs, to be pulled back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fimprobe.fisher.sums.measurer import ScoreOfLabels
from fimprobe.likelihoods import Bernoulli, Categorical
from fimprobe.likelihoods.base import Likelihood
from fimprobe.likelihoods.categorical import IGNORED

MODEL, DATA = "model", "data"


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """One choice of labels.

    Attributes:
        key: Its name.
        words: The same in a sentence.
        score: From the outputs and the labels of the data to the vectors.
        needs_labels: Whether it uses the labels of the data.
    """

    key: str
    words: str
    score: ScoreOfLabels
    needs_labels: bool = False


def make_labellings(family: Likelihood) -> list[Labelling]:
    """Return the choices whose vectors are not random.

    Args:
        family: The family of labels.
    """
    typed: Any = family
    choices = [
        Labelling(
            key=DATA,
            words="labels of the data",
            score=lambda h, labels: _data_score(typed, h, labels),
            needs_labels=True,
        ),
        Labelling(
            key="unsigned",
            words="a sum over labels without random signs",
            score=lambda h, _: typed.fisher_factor(h, torch.ones_like(h)),
        ),
    ]
    predicted = _prediction(family)
    if predicted is not None:
        choices.append(
            Labelling(
                key="arg-max",
                words="arg-max labels",
                score=lambda h, _: typed.score(h, predicted(h)),
            )
        )
    if isinstance(family, Categorical):
        choices.append(
            Labelling(
                key="weighted",
                words="labels of the data weighted by their probability",
                score=lambda h, labels: _weighted_score(family, h, labels),
                needs_labels=True,
            )
        )
    return choices


def drawn_labels(family: Likelihood, generator: torch.Generator) -> Labelling:
    """Return labels drawn from the model, new ones at each call.

    Args:
        family: The family of labels.
        generator: On the CPU.
    """

    def score(h: Tensor, _: Tensor) -> Tensor:
        shape = family.label_shape(h)
        uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)
        # the quantile is defined inside (0, 1) only
        uniforms = uniforms.clamp(2.0**-54, 1 - 2.0**-53).to(h.device)
        return family.score(h, family.quantile(h, uniforms))

    return Labelling(key=MODEL, words="labels drawn from the model", score=score)


def _data_score(family: Any, h: Tensor, labels: Tensor) -> Tensor:
    family.check_labels(h, labels)
    scores: Tensor = family.data_score(h, labels)
    return scores


def _weighted_score(family: Categorical, h: Tensor, labels: Tensor) -> Tensor:
    """√p_y times the score of y, whose square is p_y times that of the score."""
    labels = labels.to(h.device, torch.int64)
    axis = family.class_dim
    known = labels.masked_fill(labels == IGNORED, 0).unsqueeze(axis)
    probability = torch.softmax(h, axis).gather(axis, known)
    return _data_score(family, h, labels) * probability.sqrt()


def _prediction(family: Likelihood) -> Callable[[Tensor], Tensor] | None:
    """From outputs to the most probable label; None for families without classes."""
    if isinstance(family, Categorical):
        return lambda h: h.argmax(family.class_dim)
    if isinstance(family, Bernoulli):
        return lambda h: (h > 0).to(h.dtype)
    return None
