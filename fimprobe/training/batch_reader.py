"""What a training batch says: the family of its labels, which positions have one, the data's own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fimprobe.errors import BatchError, FimprobeError
from fimprobe.likelihoods import get_likelihood
from fimprobe.likelihoods.base import Likelihood
from fimprobe.model.batch import Batch
from fimprobe.model.outputs import select_outputs
from fimprobe.training.capture import CapturedBatch
from fimprobe.training.data_labels import REMEDY as LABELS
from fimprobe.training.data_labels import labels_from_gradient
from fimprobe.training.loss_inference import REMEDY, Decision, ignored_positions, infer_from_gradient
from fimprobe.training.transformers_heads import infer_from_model, labels_of, mask_of

logger = logging.getLogger("fimprobe")

MAX_INFERENCE_BATCHES = 20
"""Training batches that likelihood="auto" may look at before it gives up."""

MAX_INFERENCE_OUTPUTS = 2**24
"""Outputs of a batch that it looks at, but for a sample that has more by itself."""

Mask = Callable[[tuple[Any, ...], dict[str, Any]], Tensor]


class BatchReader:
    """Reads a model's batches: by the user's functions, by the model's class, by the loss's gradient.

    ``likelihood`` is None until ``settle`` or one of the ``ask`` methods has decided it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mask: Mask | None,
        labels: Mask | None,
        output: Callable[[Any], Tensor],
        tell: Callable[[str], None],
    ) -> None:
        self.model, self.output = model, output
        self.likelihood: Likelihood | None = None
        self.decision = ""
        self._mask, self._labels, self._tell = mask, labels, tell
        self._asked = 0

    def settle(self, likelihood: str | Likelihood) -> None:
        """Take the given family; of ``"auto"`` what the model itself tells."""
        if likelihood != "auto":
            self.likelihood, self.decision = get_likelihood(likelihood), "given"
            return
        decision = infer_from_model(self.model)
        if decision is not None:
            self._decide(decision)

    def ask(self, captured: CapturedBatch) -> None:
        """Read the family off a training batch.

        Raises:
            FimprobeError: where nothing fits, or after ``MAX_INFERENCE_BATCHES`` batches.
        """
        self._asked += 1
        decision = infer_from_model(self.model, captured.args, captured.kwargs)
        if decision is None and captured.outputs is not None and captured.gradient is not None:
            outputs, gradient = captured.outputs, captured.gradient
            if outputs.numel() > MAX_INFERENCE_OUTPUTS:  # it computes in float64, with several copies
                rows = max(1, MAX_INFERENCE_OUTPUTS // outputs[0].numel())
                outputs, gradient = outputs[:rows], gradient[:rows]
            decision = infer_from_gradient(outputs, gradient)
        if decision is None:
            missing = "no gradient arrived at the model's outputs (or they are no single tensor)"
            decision = Decision(None, missing, final=False)
        self._decide(decision)

    def infer_from_inputs(self, inputs: Any) -> None:
        """The same of inputs given by hand, without a loss to look at."""
        batch = Batch.of(inputs)
        decision = infer_from_model(self.model, batch.args, batch.kwargs)
        if decision is None:
            told = (
                "given inputs are not probed: likelihood='auto' needs a training batch or its labels"
            )
            raise BatchError(f"{told}. {REMEDY}")
        self._decide(decision)

    def mask_of(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], captured: CapturedBatch | None = None
    ) -> Tensor | None:
        """True where there is a label; None for everywhere."""
        if self._mask is not None:
            return self._mask(args, kwargs)
        read = None if captured is None else self._read(captured)
        if self.output is not select_outputs:  # outputs of the user's own making
            return read
        return mask_of(self.model, args, kwargs, read)

    def labels_of(self, captured: CapturedBatch, size: int) -> Tensor:
        """The data's labels of a batch of ``size``.

        Raises:
            BatchError: where they cannot be had.
        """
        if self._labels is not None:
            labels = self._labels(captured.args, captured.kwargs)
            shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            if not isinstance(labels, Tensor) or shape[:1] != (size,):
                raise FimprobeError(
                    f"labels= returned {shape} for a batch of {size}; return a tensor with the "
                    f"labels of all {size} samples"
                )
            return labels
        given = labels_of(self.model, captured.args, captured.kwargs, self._read(captured))
        if given is not None:
            return given
        if captured.outputs is None or captured.gradient is None:
            raise BatchError(f"no gradient arrived at the outputs to read labels off; {LABELS}")
        return labels_from_gradient(captured.outputs, captured.gradient, self.likelihood)

    def see(self, captured: CapturedBatch, gradient: Tensor) -> None:
        """Note of the gradient at the outputs no more than where it arrived."""
        captured.read = ignored_positions(gradient, gradient, self.likelihood)

    def _read(self, captured: CapturedBatch) -> Tensor | None:
        """Positions where the loss's gradient arrived, where it was seen."""
        if captured.read is not None:
            return captured.read
        if captured.gradient is None or captured.outputs is None:
            return None
        return ignored_positions(captured.outputs, captured.gradient, self.likelihood)

    def _decide(self, decision: Decision) -> None:
        if decision.likelihood is not None:
            self.likelihood, self.decision = decision.likelihood, decision.reason
            if decision.told:
                self._tell(decision.reason)
            else:
                logger.info("likelihood %s: %s", decision.likelihood, decision.reason)
        elif decision.final or self._asked >= MAX_INFERENCE_BATCHES:
            raise FimprobeError(
                f"likelihood='auto' could not be decided: {decision.reason}. {decision.remedy}"
            )
