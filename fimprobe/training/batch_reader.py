"""The labels of a training batch: their family, which positions carry one, the labels themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fimprobe.errors import BatchError, FimprobeError
from fimprobe.likelihoods import Joint, get_likelihood
from fimprobe.likelihoods.base import Likelihood
from fimprobe.likelihoods.categorical import Categorical
from fimprobe.model.batch import Batch
from fimprobe.model.outputs import NamedOutput, NamedParts
from fimprobe.model.weak_model import WeakModel
from fimprobe.training.capture.capture import Watched
from fimprobe.training.capture.captured_batch import CapturedBatch
from fimprobe.training.capture.captured_output import CapturedOutput
from fimprobe.training.likelihood_inference.criteria import Criterion
from fimprobe.training.likelihood_inference.data_labels import LABELS_REMEDY, labels_from_gradient
from fimprobe.training.likelihood_inference.fused_heads import (
    FUSED_NOTE,
    TemperedOutputs,
    fused_temperature,
    is_fused,
    without_fused_head,
)
from fimprobe.training.likelihood_inference.heads import describe_unmeasured, infer_from_heads
from fimprobe.training.likelihood_inference.loss_inference import (
    LIKELIHOOD_REMEDY,
    Decision,
    positions_with_gradient,
)
from fimprobe.training.likelihood_inference.transformers_heads import (
    data_labels,
    infer_from_model,
    label_mask,
)
from fimprobe.training.watched_outputs import (
    CHANGED_OUTPUTS,
    joint_labels,
    joint_mask,
    unmeasured_outputs,
    watch_candidates,
    watch_measured,
)

logger = logging.getLogger("fimprobe")

MAX_INFERENCE_BATCHES = 20
"""Training batches that likelihood="auto" examines before it gives up."""

Mask = Callable[[tuple[Any, ...], dict[str, Any]], Tensor]
"""From the (args, kwargs) of the forward to a tensor of the labels' shape."""


class BatchReader:
    """Determines likelihood, label mask and data labels of training batches.

    Sources, in this order: the user's functions and criterion, the class of the model, the loss
    gradient.

    Args:
        model: The object that the loop calls.
        mask: Function for the label mask, or None.
        labels: Function for the data labels, or None.
        output: From what the model returns to its outputs [B, ...]; None for the default.
        criterion: What the user's loss implies, in place of an inference; None for nothing.
        warn: Reports a message to the user.

    Attributes:
        likelihood: The family, None until ``set_likelihood`` or an ``infer`` method decided it.
        decision: The reason for it.
        undecided: Why it is not decided yet, and what to pass; "" before the first batch.
        output: From what the model returns to the measured outputs; None for the default.
    """

    model = WeakModel()

    def __init__(
        self,
        model: nn.Module,
        *,
        mask: Mask | None,
        labels: Mask | None,
        output: Callable[[Any], Any] | None,
        criterion: Criterion | None = None,
        warn: Callable[[str], None],
    ) -> None:
        self.model, self.output = model, output
        self.likelihood: Likelihood | None = None
        self.decision = self.undecided = ""
        self._mask, self._labels, self._warn = mask, labels, warn
        self._criterion = criterion
        self._infers = False
        self._num_inferences = 0
        self._notes: tuple[str, ...] = ()
        self._noted: set[str] = set()
        self._user_output = output

    def set_likelihood(self, likelihood: str | Likelihood) -> None:
        """Use the given family; for ``"auto"`` the one that the model's class implies, if any."""
        if likelihood != "auto":
            self.likelihood, self.decision = get_likelihood(likelihood), "given"
            return
        self._infers = True
        decision = None if self._criterion else infer_from_model(self.model)
        if self._criterion is not None and self._user_output is not None:
            decision = self._criterion.decision_for_output()
        if decision is not None:
            self._decide(decision)

    def infer_from_batch(self, captured: CapturedBatch) -> None:
        """Infer the family from a training batch.

        Raises:
            FimprobeError: If no family fits, or after ``MAX_INFERENCE_BATCHES`` undecided batches.
        """
        self._num_inferences += 1
        decision = (
            infer_from_model(self.model, captured.args, captured.kwargs)
            if self._criterion is None
            else self._criterion.decide(captured.heads)
        )
        is_open = decision is None or not (decision.likelihood or decision.final)
        if decision is None or (is_open and self._criterion is None):
            final = self._num_inferences >= MAX_INFERENCE_BATCHES
            decision = infer_from_heads(captured.heads, final=final)
        self._decide(decision)
        if decision.parts:
            self.output = NamedParts(paths=decision.parts, output=self._user_output)
        self._choose_output(decision.path, captured)

    def infer_from_inputs(self, inputs: Any) -> None:
        """Infer the family from inputs without a loss: only the model's class is known.

        Raises:
            BatchError: If the model's class does not imply a family.
        """
        batch = Batch.of(inputs)
        decision = infer_from_model(self.model, batch.args, batch.kwargs)
        if self._criterion is not None:
            decision = None if self._criterion.needs_gradient else self._criterion.decision()
        if decision is None or not (decision.likelihood or decision.final):
            raise BatchError(
                "given inputs are not probed: likelihood='auto' needs a training batch or its "
                f"labels. {LIKELIHOOD_REMEDY}"
            )
        self._decide(decision)

    def watch(self, captured: CapturedBatch, returned: Any, *, labels: bool) -> Watched:
        """Return the outputs whose gradients show likelihood, labels or positions.

        Args:
            captured: The batch, which keeps what arrives.
            returned: What the model returned.
            labels: Whether the labels of the data are needed.
        """
        if self._user_output is not None and not (labels or self._infers):
            return {}  # the user chose
        try:
            if self.likelihood is None:
                return watch_candidates(captured, returned, self.output)
            return watch_measured(
                captured,
                returned,
                self.likelihood,
                self.output,
                labels=labels,
                positions=self._infers,
                others=self._user_output is None,
            )
        except Exception:  # the measurement reports it
            return {}

    def notes(self, captured: CapturedBatch | None) -> list[str]:
        """Return what a report of a batch should state about its labels.

        Args:
            captured: The training batch; None for given inputs.
        """
        unmeasured, measured = (set(), []) if captured is None else unmeasured_outputs(captured)
        others = sorted(unmeasured - self._noted)
        if not others:
            return list(self._notes)
        note = describe_unmeasured(others, measured)
        self._warn(note)
        return [*self._notes, note]

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
        if isinstance(self.likelihood, Joint):
            chosen = self._user_output is not None
            return None if captured is None else joint_mask(captured, self.likelihood, chosen)
        positions = None if captured is None else self._positions(captured)
        # the labels of a batch need not match the outputs that a custom function selects
        custom = self._user_output is not None or isinstance(self.output, (NamedOutput, NamedParts))
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
        if isinstance(self.likelihood, Joint):
            return joint_labels(captured, self.likelihood)
        head, positions = _only(captured), self._positions(captured)
        batch_labels = data_labels(self.model, captured.args, captured.kwargs, positions)
        if batch_labels is not None:
            return batch_labels
        if head.changed:
            raise BatchError(
                f"{CHANGED_OUTPUTS}, so labels cannot be read off them. {LABELS_REMEDY}."
            )
        if head.outputs is None or head.gradient is None:
            raise BatchError(
                f"no gradient arrived at the outputs to read labels off. {LABELS_REMEDY}."
            )
        return labels_from_gradient(head.outputs, head.gradient, self.likelihood)

    def _positions(self, captured: CapturedBatch) -> Tensor | None:
        """Return the positions with a loss gradient [B, T]; None if they are not known."""
        head = _only(captured)
        if head.label_positions is not None:
            return head.label_positions
        gradient = head.gradient
        return None if gradient is None else positions_with_gradient(gradient, self.likelihood)

    def _lost_positions(self, captured: CapturedBatch) -> bool:
        """Return whether the positions were to be read off a gradient that did not arrive."""
        head = _only(captured)
        needed = self._infers and head.has_positions and isinstance(self.likelihood, Categorical)
        return needed and not head.gradient_arrived

    def measured_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the keywords of a call that returns the outputs."""
        if not is_fused(kwargs):
            return kwargs
        if FUSED_NOTE not in self._notes:
            self._notes = (*self._notes, FUSED_NOTE)
            if self.output is None:
                temperature = fused_temperature(self.model)
                self.output = None if temperature == 1 else TemperedOutputs(temperature=temperature)
        return without_fused_head(kwargs)

    def _choose_output(self, path: str, captured: CapturedBatch) -> None:
        """Measure the output of a path, or the default one; an examined batch holds several.

        Args:
            path: The path, or "".
            captured: The batch.
        """
        heads = captured.heads
        if path and not heads[path].is_default:
            self.output = NamedOutput(path=path, output=self._user_output)
        default = next((head for head in heads.values() if head.is_default), None)
        chosen = heads[path] if path else default
        if chosen is not None:
            heads[""] = chosen

    def _decide(self, decision: Decision) -> None:
        if decision.likelihood is not None:
            self.likelihood, self.decision = decision.likelihood, decision.reason
            self._notes, self._noted = decision.notes, set(decision.unmeasured)
            for note in decision.notes:
                self._warn(note)
            if decision.warn:
                self._warn(decision.reason)
            else:
                logger.info("likelihood %s: %s", decision.likelihood, decision.reason)
        elif decision.final or self._num_inferences >= MAX_INFERENCE_BATCHES:
            source = "likelihood='auto'" if self._criterion is None else "the likelihood of `loss`"
            raise FimprobeError(
                f"{source} could not be decided: {decision.reason}. {decision.remedy}"
            )
        else:
            self.undecided = f"{decision.reason}. {decision.remedy}"


def _only(captured: CapturedBatch) -> CapturedOutput:
    """Return the measured output of a batch; an empty one if none is watched."""
    return captured.heads.get("", CapturedOutput())
