"""Whether training mode computes what eval mode computes, dropout and the like apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from fimprobe.errors import FimprobeError
from fimprobe.model.batch import Batch
from fimprobe.model.leftovers import dropping_leftovers
from fimprobe.model.runs import (
    Run,
    Selector,
    almost_equal,
    are_probabilities,
    clone_inputs,
    describe_tensor,
    list_names,
    same_randomness,
)
from fimprobe.model.storage_guard import StorageGuard, WithoutDropout

_NOISY = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


@dataclass(kw_only=True)
class ModeComparison:
    """A run in eval mode, and one with the modules of other packages than torch in training mode.

    Attributes:
        evaluated: The run in eval mode; None where it failed.
        trained: The run in training mode.
        is_repeatable: Whether training mode draws no random numbers and couples no samples.
        writes_trained: Whether eval mode writes trainable parameters, which training mode does not.
    """

    evaluated: Run | None
    trained: Run
    is_repeatable: bool
    writes_trained: bool

    @property
    def lost(self) -> list[str]:
        """Parameters that training mode reaches and eval mode does not."""
        if self.evaluated is None:
            return []
        return sorted(self.trained.reached - self.evaluated.reached)

    def find_reason(self) -> str:
        """Return why eval mode does not compute what is trained, in words; empty where it does.

        Raises:
            FimprobeError: If it does not, and training mode cannot be measured.
        """
        if self.evaluated is None:
            return "in eval mode its forward fails or lacks outputs" if self.is_repeatable else ""
        evaluated, trained = self.evaluated.outputs, self.trained.outputs
        if self.lost:
            reason = f"in eval mode its outputs do not depend on {list_names(self.lost)}"
        elif not almost_equal(trained, evaluated):
            pair = f"{describe_tensor(evaluated)} in eval mode and {describe_tensor(trained)}"
            reason = f"it returns {pair} in training mode"
        elif self.writes_trained:
            reason = "its forward rewrites parameters in eval mode"
        else:
            return ""
        if self.is_repeatable:
            return reason
        if self._loses_most() or self._returns_another_kind():
            raise FimprobeError(
                f"the model computes something else in eval mode, where it is measured: {reason}. "
                "Training mode cannot be measured, since it draws random numbers or couples "
                "samples. Let the model compute the same in both modes, apart from dropout and "
                "batch norm."
            )
        return ""

    def describe_lost(self) -> str:
        """Return what eval mode leaves out where training mode cannot be measured; else "".

        Speech models replace random spans of their input by a trained vector in training mode. As
        with dropout, the model without these replacements is measured.
        """
        if not self.lost or self.is_repeatable or self._loses_most():
            return ""
        return (
            f"The model was measured in eval mode, where its outputs do not depend on "
            f"{list_names(self.lost)}. Training mode also uses them, but draws random numbers or "
            "couples samples."
        )

    def _loses_most(self) -> bool:
        """Whether eval mode reaches fewer parameters than it leaves out: it is another model."""
        assert self.evaluated is not None
        return bool(self.lost) and len(self.lost) >= len(self.evaluated.reached)

    def _returns_another_kind(self) -> bool:
        assert self.evaluated is not None
        evaluated, trained = self.evaluated.outputs, self.trained.outputs
        if evaluated.shape != trained.shape or evaluated.dtype != trained.dtype:
            return True
        if not are_probabilities(evaluated) or are_probabilities(trained):
            return False
        # small logits may all be in [0, 1]; probabilities are nearer to those of the trained logits
        distance = (evaluated - trained).norm()
        return any((evaluated - p).norm() < distance for p in _probabilities_of(trained))


def _probabilities_of(logits: Tensor) -> Iterator[Tensor]:
    """The probabilities that logits may mean: independent ones, and classes in any dimension."""
    yield logits.sigmoid()
    for dim in range(1, logits.dim()):
        yield logits.softmax(dim)


def find_mode_paths(model: nn.Module) -> frozenset[str]:
    """Modules whose flag may select what they compute: not torch's own, nor dropout or norms."""
    return frozenset(
        path
        for path, module in model.named_modules()
        if not isinstance(module, _NOISY) and not type(module).__module__.startswith("torch.")
    )


def is_repeatable(
    twin: nn.Module,
    batch: Batch,
    select_outputs: Selector,
    *,
    run: Run,
    guard: StorageGuard,
    dropout: WithoutDropout,
) -> bool:
    """Return whether a run in training mode gave what every other run on these samples gives.

    Args:
        twin: The model in training mode.
        batch: The samples of the run.
        select_outputs: From what the model returns to the outputs.
        run: The run.
        guard: Watched it.
        dropout: Was active in it.
    """
    if run.drew_random or guard.random or guard.batch_statistics or dropout.suppressed:
        return False
    if batch.size < 2:
        return False
    args, kwargs = clone_inputs(batch[:1])
    with same_randomness(), dropping_leftovers(twin):
        alone = select_outputs(twin(*args, **kwargs)).detach()
    return almost_equal(alone, run.outputs[:1])
