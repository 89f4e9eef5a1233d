"""A twin that was compared with the user's model: same outputs, same gradients, nothing touched.

The comparison runs on a few samples before the first measurement, and again whenever the model
changed in its classes, hooks, patched forwards, modes, types, devices or trainable parameters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fimprobe.errors import FimprobeError
from fimprobe.model.batch import Batch
from fimprobe.model.compared_runs import ComparedRuns, derived_name
from fimprobe.model.copies.model_copies import FORWARD_HOOKS, ModelCopier
from fimprobe.model.copies.user_state import UserState, describe
from fimprobe.model.mode_checks import ModeComparison, find_mode_paths, is_repeatable
from fimprobe.model.outputs import MissingOutputError
from fimprobe.model.randomness import undo_own_draws
from fimprobe.model.runs import (
    Run,
    Selector,
    almost_equal,
    describe_difference,
    find_leaves,
    run_model,
)
from fimprobe.model.storage_guard import (
    ReachesUserError,
    StorageGuard,
    WithoutDropout,
    WritesSharedError,
)
from fimprobe.model.twin import TwinSettings, copy_twin, unwrap

_MOST_ATTEMPTS = 8
"""Each attempt changes one of the settings."""


def make_checked_twin(
    model: nn.Module,
    batch: Batch,
    select_outputs: Selector,
    settings: TwinSettings | None,
) -> tuple[nn.Module, TwinSettings | None]:
    """Return a twin of the model, and the settings to make the next one with.

    Outputs that are not finite cannot be compared: the settings are None then, and the measurement
    reports the outputs.

    Args:
        model: The user's model.
        batch: The inputs of the measurement.
        select_outputs: From what the model returns to the outputs [B, ...].
        settings: Those of the last measurement, or None.

    Raises:
        FimprobeError: If no copy can be the model; it names what differs.
    """
    model = unwrap(model)
    fingerprint = compute_fingerprint(model)
    if settings is None or settings.fingerprint != fingerprint:
        checks = TwinChecks(model, batch, select_outputs)
        try:
            settings = replace(checks.find_settings(), fingerprint=fingerprint)
        except _NotFiniteError:
            return copy_twin(model, TwinSettings())[0], None
        if checks.twin is not None:
            return checks.twin, settings
    return copy_twin(model, settings)[0], settings


def compute_fingerprint(model: nn.Module) -> int:
    """A number that changes with structure, hooks, modes, types and trainable parameters."""
    entries: list[Any] = []
    places: dict[int, int] = {}  # tied parameters have one place
    for path, module in model.named_modules():
        attributes = module.__dict__
        hooks = [key for name in FORWARD_HOOKS for key in attributes.get(name, ())]
        entries.append((path, type(module), attributes.get("training"), *hooks))
        entries.append(id(attributes.get("forward")))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                kind = parameter.dtype, parameter.device, parameter.shape, parameter.requires_grad
                entries.append((name, places.setdefault(id(parameter), len(places)), *kind))
    return hash(tuple(entries))


class _NotFiniteError(Exception):
    """The outputs are not finite."""


class TwinChecks:
    """Compares twins with the model until one is right.

    Args:
        model: The user's model, unwrapped.
        batch: The inputs of the measurement.
        select_outputs: From what the model returns to the outputs [B, ...].

    Attributes:
        model: The user's model, unwrapped.
        twin: The twin that was right, if its runs left it as it was; else None.
    """

    def __init__(self, model: nn.Module, batch: Batch, select_outputs: Selector) -> None:
        self.model = model
        self.twin: nn.Module | None = None
        self._runs = ComparedRuns(model, batch, select_outputs)
        self._draws_random = False

    def find_settings(self) -> TwinSettings:
        """Return settings with which the twin is the model.

        Raises:
            FimprobeError: If there are none.
        """
        settings = TwinSettings()
        for _ in range(_MOST_ATTEMPTS):
            changed = self._examine(settings)
            if changed is None:
                return replace(settings, draws_random=self._draws_random)
            settings = changed
        raise FimprobeError(
            "no copy of the model computes what the model does; please report it with the model"
        )

    def _examine(self, settings: TwinSettings) -> TwinSettings | None:
        """Compare one twin; return None if it is right, else the settings to try next."""
        twin, copier = copy_twin(self.model, settings)
        guard = self._runs.make_guard(copier)
        of_user = UserState(copier.originals)
        of_twin = UserState([copier.memo[id(x)] for x in copier.originals])
        try:
            run = self._runs.run_twin(twin, copier, guard, host=settings.draws_from_host)
        except WritesSharedError:
            return replace(settings, shares_frozen=False)
        except ReachesUserError as error:
            raise FimprobeError(_explain_reach(error, copier)) from None
        except MissingOutputError as error:
            return self._after_failure(settings, error)
        except (FimprobeError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            return self._after_failure(settings, error)
        finally:
            touched = of_user.restore()
        self._check_untouched(touched)
        if not bool(torch.isfinite(run.outputs).all()):
            raise _NotFiniteError
        self._check_derived(copier, run)
        self._draws_random |= run.drew_from_torch
        if not settings.draws_from_host and undo_own_draws(
            run.moved_streams, lambda: self._runs.run_again(twin)
        ):
            return replace(settings, draws_from_host=True)
        if "inputs" in guard.written and not settings.copies_inputs:
            return replace(settings, copies_inputs=True)
        is_touched = bool(guard.written or of_twin.changes())
        if is_touched and self._drifts(settings, twin, run):
            return _with_resets(settings)
        self.twin = None if is_touched or settings.resets_state else twin
        reusable = copier if not guard.written and not settings.resets_state else None
        difference = self._compare_with_user(settings, run, reusable)
        if difference and settings.adjusts_foreign_classes:
            return replace(settings, adjusts_foreign_classes=False)
        if difference:
            raise FimprobeError(f"a copy of the model is not the model: {difference}")
        return self._compare_modes(settings, run, guard)

    def _drifts(self, settings: TwinSettings, twin: nn.Module, run: Run) -> bool:
        """Return whether a second pass gives other outputs."""
        again = self._runs.run_again(twin, host=settings.draws_from_host)
        return not almost_equal(again, run.outputs)

    def _check_untouched(self, touched: list[Any]) -> None:
        if touched:
            places = ", ".join(sorted({describe(x, self.model) for x in touched}))
            raise FimprobeError(
                f"the forward of a copy of the model changed {places} of the model itself; this was "
                "undone. The forward reaches the model through a global variable or an object that "
                "cannot be copied. Let it read modules from the attributes of its own module."
            )

    def _check_derived(self, copier: ModelCopier, run: Run) -> None:
        """Raise where the outputs depend on a tensor that an earlier forward computed."""
        for tensor in copier.derived:
            gradient = run.gradients.pop(derived_name(tensor.constant), None)
            if (
                gradient is not None
                and bool(gradient.any())
                and self._leads_to_trained(tensor.original)
            ):
                raise FimprobeError(
                    f"the forward uses {self._place_of(tensor.original)}, a tensor that was "
                    "computed from parameters before this forward. A copy of the model cannot "
                    "compute it again. Compute it in each forward, or clear it after the "
                    "optimizer's step."
                )

    def _leads_to_trained(self, tensor: Tensor) -> bool:
        """Return whether a tensor's graph leads to a trainable parameter."""
        leaves = find_leaves(tensor.grad_fn)
        return any(id(p) in leaves for p in self._runs.trained.values())

    def _place_of(self, tensor: Tensor) -> str:
        for path, module in self.model.named_modules():
            for name, value in module.__dict__.items():
                if any(leaf is tensor for leaf in tree_leaves(value)):
                    return f"`{path + '.' if path else ''}{name}`"
        return "a tensor kept outside of the modules"

    def _compare_with_user(self, settings: TwinSettings, run: Run, copier: ModelCopier | None) -> str:
        """Return what differs from the user's own modules, in words; empty if nothing does."""
        try:
            reference = self._runs.run_user(settings, copier)
        except (FimprobeError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            return f"the model itself raises {type(error).__name__}: {error}"
        return "" if reference is None else describe_difference(run, reference)

    def _compare_modes(
        self, settings: TwinSettings, run: Run | None, guard: StorageGuard | None
    ) -> TwinSettings | None:
        """Return settings for training mode where eval mode computes something else."""
        trial = replace(settings, training_modules=find_mode_paths(self.model))
        if settings.training_modules or not trial.training_modules:
            return None
        twin, copier = copy_twin(self.model, trial)
        watch, dropout = self._runs.make_guard(copier), WithoutDropout()
        tensors = self._runs.copies_of_trained(copier)
        try:
            with dropout:
                trained = run_model(
                    twin, self._runs.batch, self._runs.select_outputs, tensors, watch, backward=False
                )
            undo_own_draws(trained.moved_streams, lambda: self._runs.run_again(twin))
            repeatable = is_repeatable(
                twin,
                self._runs.batch,
                self._runs.select_outputs,
                run=trained,
                guard=watch,
                dropout=dropout,
            )
        except Exception:  # training mode may need labels, or reach what it must not
            return None
        written = set() if guard is None else guard.written - watch.written
        comparison = ModeComparison(
            evaluated=run,
            trained=trained,
            is_repeatable=repeatable,
            writes_trained=bool(written & set(self._runs.trained)),
        )
        reason = comparison.find_reason()
        if not reason:
            note = comparison.describe_lost()
            is_new = note and note not in settings.notes
            return replace(settings, notes=(*settings.notes, note)) if is_new else None
        note = (
            "The model was measured in training mode, with torch's own dropout and batch norm in "
            f"eval mode: {reason}."
        )
        return replace(trial, notes=(*settings.notes, note))

    def _after_failure(self, settings: TwinSettings, error: Exception) -> TwinSettings:
        """Return other settings after a forward of the twin raised; or raise, with what the model
        does.

        Raises:
            FimprobeError: If the model itself fails, or only its copy.
        """
        if self._runs.use_whole_batch():  # a few may be fewer than the model works with
            return settings
        if settings.adjusts_foreign_classes:
            return replace(settings, adjusts_foreign_classes=False)
        in_training = self._compare_modes(settings, None, None)
        if in_training is not None:
            return in_training
        if isinstance(error, FimprobeError):
            raise error
        described = f"{type(error).__name__}: {error}"
        try:
            self._runs.run_user(settings)
        except Exception:
            raise FimprobeError(self._explain_failing_model(settings, described)) from error
        raise FimprobeError(
            f"the model runs, but a copy of it raises {described}. Its forward relies on objects "
            "that a copy does not have, such as a table of its modules' identities."
        ) from error

    def _explain_failing_model(self, settings: TwinSettings, described: str) -> str:
        """Return why the user's own modules fail: the inputs, or that some samples were selected.

        Args:
            settings: Those of the last attempt.
            described: The error.
        """
        size, origin = self._runs.batch.size, self._runs.batch.origin
        if origin is not None:
            self._runs.batch = origin
            try:
                self._runs.run_user(settings)
            except Exception:  # the inputs do not fit
                pass
            else:
                return (
                    f"the model runs on its whole batch, but raises {described} on {size} of "
                    f"{origin.size} samples. A sample is an entry of the first dimension of every "
                    "tensor with the batch. Pass padded tensors with a row for each sample, and join "
                    "nodes of graphs or tokens of sequences in the forward."
                )
        return (
            f"the model raises {described} (in eval mode, on the inputs of the measurement). "
            "Pass inputs with the width, type and device that the model takes."
        )


def _with_resets(settings: TwinSettings) -> TwinSettings:
    """Settings for a model whose outputs change from one pass to the next.

    Raises:
        FimprobeError: If they have been tried.
    """
    if settings.resets_state:
        raise FimprobeError(
            "the model's outputs for the same inputs change from one forward to the next, although "
            "its tensors and numbers were reset: the forward changes other state, or draws random "
            "numbers from a stream of its own. Make the forward repeatable in eval mode."
        )
    note = (
        "The model's forward changes its own parameters or state. Each pass of the measurement began "
        "from the state before it."
    )
    return replace(settings, resets_state=True, notes=(*settings.notes, note))


def _explain_reach(error: ReachesUserError, copier: ModelCopier) -> str:
    kinds = ", ".join(sorted({type(x).__name__ for x in copier.shared}))
    through = f"an object that cannot be copied ({kinds}) or " if kinds else ""
    return (
        f"{error}. It reaches it through {through}a global variable. Let the forward read modules "
        "and parameters from the attributes of its own module."
    )
