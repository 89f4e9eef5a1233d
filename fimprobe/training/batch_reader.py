"""The labels of a training batch: their family, which positions carry one, the labels themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.errors import BatchError, FimprobeError
from fimprobe.likelihoods import get_likelihood
from fimprobe.likelihoods.base import Likelihood
from fimprobe.likelihoods.categorical import Categorical
from fimprobe.model.batch import Batch
from fimprobe.model.outputs import select_outputs
from fimprobe.training.backward_reach import Reach
from fimprobe.training.captured_batch import CapturedBatch
from fimprobe.training.data_labels import LABELS_REMEDY, labels_from_gradient
from fimprobe.training.loss_inference import (
    LIKELIHOOD_REMEDY,
    Decision,
    infer_from_gradient,
    positions_with_gradient,
)
from fimprobe.training.transformers_heads import data_labels, infer_from_model, label_mask

logger = logging.getLogger("fimprobe")

MAX_INFERENCE_BATCHES = 20
"""Training batches that likelihood="auto" examines before it gives up."""

MAX_INFERENCE_OUTPUTS = 2**24
"""Outputs of a batch that it examines, at least those of one sample: 128 MiB per float64 copy."""

_CHANGED_BEFORE_LOSS = Decision(
    likelihood=None,
    reason=(
        "the outputs of the model were changed in place before the loss, so the loss is not that of "
        "the values that the model returned"
    ),
    remedy=(
        "Change them out of place (logits = logits / 2) inside the model's forward, so that it "
        "returns what the loss reads; or pass likelihood= for the outputs as the model returns them"
    ),
)
_CHANGED_AFTER_BACKWARD = Decision(
    likelihood=None,
    reason="the outputs of the model were changed in place between the backward pass and the step",
    final=False,
)
_NO_GRADIENT = Decision(
    likelihood=None,
    reason="no gradient arrived at the model's outputs (or they are not a single tensor)",
    final=False,
)

Mask = Callable[[tuple[Any, ...], dict[str, Any]], Tensor]
"""From the (args, kwargs) of the forward to a tensor of the labels' shape."""


@dataclass(frozen=True, kw_only=True)
class ProbeBatch:
    """The samples that one process measures at one step.

    Attributes:
        batch: The model's inputs.
        mask: Boolean, of the labels' shape; False where there is no label. None for all.
        labels: Labels of the data [B, ...], for the empirical Fisher only.
        estimators: Those that can be measured with what is known of the batch.
        labels_error: Why the empirical Fisher was requested and is left out; None otherwise.
    """

    batch: Batch
    mask: Tensor | None
    labels: Tensor | None
    estimators: list[str]
    labels_error: BatchError | None = None


class BatchReader:
    """Determines likelihood, label mask and data labels of training batches.

    Sources, in this order: the user's functions, the class of the model, the loss gradient.

    Args:
        model: The object that the loop calls.
        mask: Function for the label mask, or None.
        labels: Function for the data labels, or None.
        output: From what the model returns to its outputs [B, ...].
        warn: Reports a message to the user.

    Attributes:
        likelihood: The family, None until ``set_likelihood`` or an ``infer`` method decided it.
        decision: The reason for it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mask: Mask | None,
        labels: Mask | None,
        output: Callable[[Any], Tensor],
        warn: Callable[[str], None],
    ) -> None:
        self.model, self.output = model, output
        self.likelihood: Likelihood | None = None
        self.decision = ""
        self._mask, self._labels, self._warn = mask, labels, warn
        self._infers = False
        self._num_inferences = 0

    def set_likelihood(self, likelihood: str | Likelihood) -> None:
        """Use the given family; for ``"auto"`` the one that the model's class implies, if any."""
        if likelihood != "auto":
            self.likelihood, self.decision = get_likelihood(likelihood), "given"
            return
        self._infers = True
        decision = infer_from_model(self.model)
        if decision is not None:
            self._decide(decision)

    def infer_from_batch(self, captured: CapturedBatch) -> None:
        """Infer the family from a training batch.

        Raises:
            FimprobeError: If no family fits, or after ``MAX_INFERENCE_BATCHES`` undecided batches.
        """
        self._num_inferences += 1
        decision = infer_from_model(self.model, captured.args, captured.kwargs)
        if decision is None:
            decision = _infer_from_loss(captured)
        self._decide(decision)

    def infer_from_inputs(self, inputs: Any) -> None:
        """Infer the family from inputs without a loss: only the model's class is known.

        Raises:
            BatchError: If the model's class does not imply a family.
        """
        batch = Batch.of(inputs)
        decision = infer_from_model(self.model, batch.args, batch.kwargs)
        if decision is None:
            raise BatchError(
                "given inputs are not probed: likelihood='auto' needs a training batch or its "
                f"labels. {LIKELIHOOD_REMEDY}"
            )
        self._decide(decision)

    def label_mask(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], captured: CapturedBatch | None = None
    ) -> Tensor | None:
        """Return which positions carry a label.

        Args:
            args: Positional arguments of the forward.
            kwargs: Keyword arguments of the forward.
            captured: The training batch, if the inputs are those of one.

        Returns:
            Bool, of the labels' shape; None if every position carries one.

        Raises:
            BatchError: If only the loss gradient could decide it and none arrived at the outputs.
        """
        if self._mask is not None:
            return self._mask(args, kwargs)
        positions = None if captured is None else self._positions(captured)
        # the labels of a batch need not match the outputs that a custom function selects
        custom = self.output is not select_outputs
        mask = positions if custom else label_mask(self.model, args, kwargs, positions)
        if mask is None and captured is not None and self._lost_positions(captured):
            raise BatchError(
                "no gradient arrived at the outputs of the model, so the positions that carry a "
                "label are not known. Pass mask= a function from the forward's (args, kwargs) to a "
                "boolean tensor of the labels' shape."
            )
        return mask

    def data_labels(self, captured: CapturedBatch, size: int) -> Tensor:
        """Return the data labels of a captured batch.

        Args:
            captured: The training batch.
            size: Its number of samples B.

        Returns:
            Labels [B, ...] as the likelihood expects them.

        Raises:
            BatchError: If the labels are not known.
            FimprobeError: If the user's function returns something else.
        """
        if self._labels is not None:
            labels = self._labels(captured.args, captured.kwargs)
            shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            if not isinstance(labels, Tensor) or shape[:1] != (size,):
                raise FimprobeError(
                    f"labels must return a tensor with the labels of all {size} samples, got "
                    f"{shape}. Return them in the order of the batch."
                )
            return labels
        positions = self._positions(captured)
        batch_labels = data_labels(self.model, captured.args, captured.kwargs, positions)
        if batch_labels is not None:
            return batch_labels
        if captured.outputs_changed:
            raise BatchError(
                "the outputs of the model were changed in place after the forward, so labels cannot "
                f"be read off them. {LABELS_REMEDY}."
            )
        if captured.outputs is None or captured.gradient is None:
            raise BatchError(
                f"no gradient arrived at the outputs to read labels off. {LABELS_REMEDY}."
            )
        return labels_from_gradient(captured.outputs, captured.gradient, self.likelihood)

    def select(
        self,
        captured: CapturedBatch | None,
        inputs: Any,
        *,
        estimators: Sequence[str],
        max_size: int,
        seed: int,
    ) -> ProbeBatch:
        """Return the samples to measure: at most ``max_size``, drawn at random from a larger batch.

        Args:
            captured: The training batch.
            inputs: Inputs to measure in its place; None for none. Without a loss they have no labels.
            estimators: The estimators that were requested.
            max_size: Largest number of samples.
            seed: Random seed of the draw.

        Raises:
            BatchError: If there is no batch, if it was changed in place after the forward pass, or if
                no backward pass reached its outputs.
        """
        labels, labels_error = None, None
        with_labels = "empirical" in estimators
        if inputs is not None:
            batch = Batch.of(inputs)
            mask = self.label_mask(batch.args, batch.kwargs)
            with_labels = False
        else:
            if captured is None:
                raise BatchError("no training batch was captured. Call probe.step(inputs) yourself.")
            if not captured.unchanged():
                raise BatchError(
                    "the batch was changed in place after the forward pass. Change a copy, or call "
                    "probe.step(inputs) yourself."
                )
            if captured.reach is Reach.UNREACHED:
                raise BatchError(
                    "no backward pass reached the outputs of the captured forward, so the gradients "
                    "belong to another batch. Attach to the object whose outputs the loss reads, or "
                    "call probe.step(inputs) yourself."
                )
            batch = Batch.of_call(captured.args, captured.kwargs)
            mask = self.label_mask(captured.args, captured.kwargs, captured)
            if with_labels:
                try:
                    labels = self.data_labels(captured, batch.size)
                except BatchError as error:  # the other estimators need no labels of the data
                    labels_error, with_labels = error, False
        if not with_labels:
            estimators = [e for e in estimators if e != "empirical"] or ["i1"]
        if batch.size > max_size:
            generator = torch.Generator().manual_seed(seed)
            rows = torch.randperm(batch.size, generator=generator)[:max_size].sort()[0]
            batch = batch[rows]
            mask = None if mask is None else mask[rows.to(mask.device)]
            labels = None if labels is None else labels[rows.to(labels.device)]
        return ProbeBatch(
            batch=batch,
            mask=mask,
            labels=labels,
            estimators=list(estimators),
            labels_error=labels_error,
        )

    def store_label_positions(self, captured: CapturedBatch, gradient: Tensor) -> None:
        """Add the positions at which the loss gradient of one backward pass is not zero.

        Args:
            captured: The captured batch, which keeps the positions [B, T].
            gradient: Gradient of the loss at the outputs [B, ...].
        """
        captured.gradient_arrived = True
        positions = positions_with_gradient(gradient, self.likelihood)
        if captured.label_positions is not None and positions is not None:
            positions = captured.label_positions | positions
        captured.label_positions = positions

    def _positions(self, captured: CapturedBatch) -> Tensor | None:
        """Return the positions with a loss gradient [B, T]; None if they are not known."""
        if captured.label_positions is not None:
            return captured.label_positions
        gradient = captured.gradient
        return None if gradient is None else positions_with_gradient(gradient, self.likelihood)

    def _lost_positions(self, captured: CapturedBatch) -> bool:
        """Return whether the positions were to be read off a gradient that did not arrive."""
        needed = self._infers and captured.has_positions and isinstance(self.likelihood, Categorical)
        return needed and not captured.gradient_arrived

    def _decide(self, decision: Decision) -> None:
        if decision.likelihood is not None:
            self.likelihood, self.decision = decision.likelihood, decision.reason
            if decision.warn:
                self._warn(decision.reason)
            else:
                logger.info("likelihood %s: %s", decision.likelihood, decision.reason)
        elif decision.final or self._num_inferences >= MAX_INFERENCE_BATCHES:
            raise FimprobeError(
                f"likelihood='auto' could not be decided: {decision.reason}. {decision.remedy}"
            )


def _infer_from_loss(captured: CapturedBatch) -> Decision:
    """Infer the family from the loss gradient at the outputs of a captured batch."""
    if captured.loss_used_changed_outputs:
        return _CHANGED_BEFORE_LOSS
    if captured.outputs_changed:
        return _CHANGED_AFTER_BACKWARD
    outputs, gradient = captured.outputs, captured.gradient
    if outputs is None or gradient is None:
        return _NO_GRADIENT
    if outputs.numel() > MAX_INFERENCE_OUTPUTS:  # it computes in float64, with several copies
        rows = max(1, MAX_INFERENCE_OUTPUTS // outputs[0].numel())
        outputs, gradient = outputs[:rows], gradient[:rows]
    return infer_from_gradient(outputs, gradient)
