"""The forward passes that are compared: those of twins, and that of the user's own modules."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from fimprobe.model.batch import Batch
from fimprobe.model.copies.model_copies import ModelCopier
from fimprobe.model.runs import Run, Selector, run_forward, run_model
from fimprobe.model.storage_guard import (
    ReachesUserError,
    StorageGuard,
    WritesSharedError,
    addresses,
)
from fimprobe.model.twin import TwinSettings, copy_twin
from fimprobe.model.user_run import run_user_model

NUM_SAMPLES = 2
"""Samples that are compared: the fewest that show whether samples are coupled."""


class ComparedRuns:
    """Runs twins and the user's own modules on the same samples.

    Args:
        model: The user's model, unwrapped.
        batch: The inputs of the measurement.
        select_outputs: From what the model returns to the outputs [B, ...].

    Attributes:
        model: The user's model, unwrapped.
        batch: The samples: a few of the measurement, or all of them.
        select_outputs: From what the model returns to the outputs [B, ...].
        trained: The trainable parameters by their names.
    """

    def __init__(self, model: nn.Module, batch: Batch, select_outputs: Selector) -> None:
        self.model, self.select_outputs = model, select_outputs
        is_larger = batch.size > NUM_SAMPLES
        self.batch = batch[:NUM_SAMPLES] if is_larger else batch
        self._whole_batch = batch if is_larger else None
        self._tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def use_whole_batch(self) -> bool:
        """Run all samples of the measurement from now on; return whether these are more."""
        if self._whole_batch is None:
            return False
        self.batch, self._whole_batch = self._whole_batch, None
        return True

    def make_guard(self, copier: ModelCopier) -> StorageGuard:
        """Return what watches a run of the twin that ``copier`` made."""
        copies = {name: copier.memo[id(x)] for name, x in self._tensors.items()}
        user, own = addresses(self._tensors), addresses(copies)
        return StorageGuard(user, shared=set(user) & set(own), own=own)

    def copies_of_trained(self, copier: ModelCopier) -> dict[str, Tensor]:
        """Return the trainable parameters of the twin that ``copier`` made, by their names."""
        return {name: copier.memo[id(p)] for name, p in self.trained.items()}

    def run_twin(
        self, twin: nn.Module, copier: ModelCopier, guard: StorageGuard, *, host: bool
    ) -> Run:
        """Run the twin; gradients of tensors that earlier forwards computed are asked for as well.

        Args:
            twin: The twin.
            copier: Made it.
            guard: Watches the run.
            host: Whether it draws from the streams of Python or numpy.
        """
        tensors = self.copies_of_trained(copier)
        derived = [x.constant for x in copier.derived if x.constant.is_floating_point()]
        tensors |= {derived_name(x): x.requires_grad_() for x in derived}
        try:
            return run_model(twin, self.batch, self.select_outputs, tensors, guard, host=host)
        finally:
            for constant in derived:
                constant.requires_grad_(False)

    def run_again(self, twin: nn.Module, *, host: bool = False) -> Tensor:
        """Return the outputs of a second pass."""
        return run_forward(twin, self.batch, self.select_outputs, host=host)

    def run_user(self, settings: TwinSettings, copier: ModelCopier | None = None) -> Run | None:
        """Run the user's own modules; None where they cannot run without being written.

        ``copier`` made a twin whose tensors were not written; by default another one is made.
        """
        if copier is None:
            _, copier = copy_twin(self.model, replace(settings, resets_state=False))
        guard = self.make_guard(copier)
        guard.allow_reading()
        try:
            return run_user_model(
                self.model,
                self.batch,
                self.select_outputs,
                copier=copier,
                guard=guard,
                settings=settings,
            )
        except (ReachesUserError, WritesSharedError):
            return None


def derived_name(constant: Tensor) -> str:
    """Return the name of the gradient at a tensor that an earlier forward computed."""
    return f"derived {id(constant)}"
