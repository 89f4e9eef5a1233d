"""The family of labels that a loss of torch implies, for ``attach(model, loss=criterion)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fimprobe.errors import FimprobeError
from fimprobe.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Poisson,
)
from fimprobe.likelihoods.base import Likelihood
from fimprobe.likelihoods.categorical import IGNORED
from fimprobe.likelihoods.mean_and_variance import PAIR_REMEDY
from fimprobe.training.capture.captured_output import CapturedOutput
from fimprobe.training.likelihood_inference.heads import NO_GRADIENT, infer_from_loss, is_read
from fimprobe.training.likelihood_inference.loss_inference import Decision
from fimprobe.training.likelihood_inference.predicted_variance import find_pair
from fimprobe.training.likelihood_inference.regression_inference import SIGMA_NOTICE, zero_sum_dims

_FAMILIES: dict[type[nn.Module], tuple[Likelihood, str]] = {
    nn.CrossEntropyLoss: (Categorical(), "labels are classes, softmax over the logits"),
    nn.BCEWithLogitsLoss: (Bernoulli(), "labels are 0 or 1, sigmoid of each logit"),
    nn.MSELoss: (Gaussian(), "labels are Gaussian around the outputs"),
    nn.PoissonNLLLoss: (Poisson(), "labels are counts, outputs their log-rates"),
    nn.GaussianNLLLoss: (
        HeteroscedasticGaussian(),
        "labels are Gaussian with the mean and the variance that the model predicts",
    ),
}

_REFUSED: dict[type[nn.Module], str] = {
    nn.BCELoss: (
        "reads probabilities. Pass likelihood='bernoulli' and output=torch.logit, or train with "
        "BCEWithLogitsLoss"
    ),
    nn.NLLLoss: (
        "reads log-probabilities, which are valid logits. Pass likelihood='categorical', or "
        "fimprobe.likelihoods.Categorical(class_dim=1) for [B, C, ...]"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """What a loss implies of its labels.

    Attributes:
        name: The class of the loss.
        likelihood: The family; for classes with the default dimension.
        statement: What was taken from the loss.
        left_out: What its options change in the loss and not in the family; "" for nothing.
    """

    name: str
    likelihood: Likelihood
    statement: str
    left_out: str

    @property
    def needs_gradient(self) -> bool:
        """Whether a gradient must show the dimension of the classes, or which outputs are read."""
        return isinstance(self.likelihood, (Categorical, HeteroscedasticGaussian))

    def decision(self, likelihood: Likelihood | None = None) -> Decision:
        """Return the decision for a family, by default the one of the criterion."""
        rest = f"; {self.left_out}" if self.left_out else ""
        return Decision(
            likelihood=likelihood or self.likelihood,
            reason=f"loss={self.name}: {self.statement}{rest}",
            warn=bool(self.left_out),
        )

    def decision_for_output(self) -> Decision | None:
        """Return the decision where ``output`` selects a mean and a variance; else None."""
        is_pair = isinstance(self.likelihood, HeteroscedasticGaussian)
        return self.decision() if is_pair else None

    def decide(self, heads: Mapping[str, CapturedOutput]) -> Decision:
        """Return the family of the output that the loss reads.

        Args:
            heads: The outputs of one forward, with the loss gradients at them.

        Returns:
            The decision; without a family if the gradient contradicts the criterion.
        """
        read = {path: head for path, head in heads.items() if is_read(head)}
        if not read:
            return NO_GRADIENT
        if isinstance(self.likelihood, HeteroscedasticGaussian):
            return self._decide_pair(read, self.likelihood.eps)
        if len(read) > 1:
            names = ", ".join(map(repr, read))
            return self._refusal(
                f"the loss reads several outputs of the model, {names}",
                "Pass likelihood= a mapping from every output that the loss reads to its family",
            )
        ((path, head),) = read.items()
        inferred = infer_from_loss(head)
        outputs, gradient = head.outputs, head.gradient
        if outputs is None or gradient is None or not bool(gradient.isfinite().all()):
            return inferred
        family = inferred.likelihood
        if family is not None and family.name != self.likelihood.name:
            return self._refusal(
                f"{inferred.reason}, that of likelihood={family.name!r}",
                "Pass the criterion that the training minimises, or likelihood=",
            )
        likelihood = self.likelihood
        if isinstance(likelihood, Categorical):
            dims = zero_sum_dims(outputs, gradient)
            if not dims:
                return self._refusal(
                    "it does not sum to zero over the classes, so something other than the "
                    "criterion reads the outputs",
                    "Let the model return what the criterion reads, or pass output= a function to it",
                )
            if len(dims) > 1:
                return Decision(
                    likelihood=None,
                    reason="the loss gradient sums to zero over two dimensions of the outputs",
                    final=False,
                )
            is_map = dims[0] < 0 and outputs.dim() > 3  # class_dim=-1 is refused for maps
            likelihood = Categorical(class_dim=outputs.dim() - 1 if is_map else dims[0])
        decided = self.decision(likelihood)
        return decided if len(heads) == 1 else replace(decided, path=path)

    def _decide_pair(self, read: Mapping[str, CapturedOutput], eps: float) -> Decision:
        """Return which outputs are the mean and the variance.

        Args:
            read: The outputs that the loss reads.
            eps: That of the criterion.
        """
        for head in read.values():
            outputs, gradient = head.outputs, head.gradient
            if outputs is None or gradient is None or not bool(gradient.isfinite().all()):
                return infer_from_loss(head)
        pair = find_pair(read, eps)
        if pair.paths:
            decided = self.decision()
            mean, variance = pair.paths
            reason = f"{decided.reason}: outputs {mean!r} and {variance!r}"
            return replace(decided, reason=reason, parts=pair.paths)
        if pair.final:
            return self._refusal(pair.reason, PAIR_REMEDY)
        return Decision(likelihood=None, reason=pair.reason, remedy=PAIR_REMEDY, final=False)

    def _refusal(self, reason: str, remedy: str) -> Decision:
        reason = f"`loss` is {self.name}, but the gradient at the model's outputs differs: {reason}"
        return Decision(likelihood=None, reason=reason, remedy=remedy)


def read_criterion(loss: Any) -> Criterion:
    """Return what a loss of torch implies of its labels.

    Args:
        loss: The module that the training loop calls with outputs and labels.

    Raises:
        FimprobeError: If its family is not known, or cannot be expressed.

    >>> read_criterion(nn.CrossEntropyLoss(label_smoothing=0.1)).likelihood.name
    'categorical'
    """
    kind = type(loss)
    known = ", ".join(f"torch.nn.{known.__name__}()" for known in _FAMILIES)
    if kind in _REFUSED:
        raise FimprobeError(
            f"`loss` must be one of {known}, got {kind.__name__}, which {_REFUSED[kind]}."
        )
    if kind not in _FAMILIES:
        given = getattr(loss, "__name__", kind.__name__)
        raise FimprobeError(
            f"`loss` must be one of {known}, got {given}. Pass an object of one of these classes if "
            "it is the same loss, or likelihood= the family of the labels."
        )
    if kind is nn.PoissonNLLLoss and not loss.log_input:
        raise FimprobeError(
            "`loss` must be PoissonNLLLoss with log_input=True, got log_input=False, whose outputs "
            "are rates. Pass likelihood='poisson' and output=torch.log."
        )
    likelihood, statement = _FAMILIES[kind]
    if isinstance(likelihood, HeteroscedasticGaussian):
        likelihood = replace(likelihood, eps=float(loss.eps))
        statement += f"; batches with a variance below eps={loss.eps:g} are skipped"
    return Criterion(
        name=kind.__name__,
        likelihood=likelihood,
        statement=statement,
        left_out="; ".join(_left_out(loss)),
    )


def _left_out(loss: Any) -> list[str]:
    """Return what options of a loss change that its family does not have."""
    sentences = []
    for name in ("weight", "pos_weight"):
        if getattr(loss, name, None) is not None:
            sentences.append(
                f"{name} is left out: the Fisher information counts every label once, with the "
                "model's probability of it"
            )
    smoothing = getattr(loss, "label_smoothing", 0.0)
    if smoothing:
        sentences.append(
            f"label_smoothing={smoothing:g} is left out: it changes labels of the data, and the "
            "Fisher information takes the model's"
        )
    if getattr(loss, "ignore_index", IGNORED) != IGNORED:
        sentences.append(
            f"ignore_index={loss.ignore_index} is left out for outputs [B, C]; in larger ones "
            "positions without a loss gradient are not measured"
        )
    if isinstance(loss, nn.MSELoss):
        sentences.append(SIGMA_NOTICE)
    return sentences
