"""When an estimate has reached its error."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fimprobe.errors import FimprobeError
from fimprobe.fisher.sums.accumulation import FisherSums
from fimprobe.fisher.sums.errors_of_sums import (
    GroupErrors,
    SampleDesign,
    drift,
    entries_rel_error,
    group_errors,
)

MIN_INPUTS = 32
"""Number of inputs before which no estimate stops."""

MIN_EFFECTIVE_INPUTS = 20
"""Effective number of inputs before which no estimate stops: fewer do not show their spread."""

MIN_BATCHES = 4
"""Number of batches before which no estimate stops; also the step between two decisions."""

GROWTH = 1.1
"""Factor of the batches between two decisions: frequent ones would stop at lucky moments."""


@dataclass(kw_only=True)
class Progress:
    """What is known at a decision.

    Attributes:
        rel_error: The largest ratio of an error to its target, times the first target.
        at_target: Whether every error is at most its target.
        reached: Whether it is so with the uncertainty of the errors, and for enough inputs.
        inputs_needed: Expected number of inputs at the end; None where it is not known.
    """

    rel_error: float
    at_target: bool
    reached: bool
    inputs_needed: float | None


@dataclass(kw_only=True)
class StoppingRule:
    """The errors to reach: of the whole diagonal, of each layer, or of chosen groups or entries.

    Attributes:
        rel_error: The target, or targets by names (or patterns) of parameters and layers.
        each_layer: Whether every layer has the target.
        entries: Boolean tensors by parameter: the target is that of these entries together.
    """

    rel_error: float | Mapping[str, float]
    each_layer: bool = False
    entries: Mapping[str, Tensor] | None = None
    targets: dict[str, float] = field(init=False, default_factory=dict)

    def resolve(self, sums: FisherSums) -> None:
        """Find the groups that have a target.

        Raises:
            FimprobeError: If a name fits no parameter and no layer.
        """
        if not isinstance(self.rel_error, Mapping):
            names = [g for g in sums.groups if g.startswith("layer ")] if self.each_layer else [""]
            self.targets = dict.fromkeys(names, float(self.rel_error))
            return
        for pattern, target in self.rel_error.items():
            fitting = [
                group
                for kind in ("parameter", "layer")
                for group in sums.groups
                if group and fnmatch.fnmatchcase(group, f"{kind} {pattern}")
            ]
            if not fitting:
                raise FimprobeError(
                    "`rel_error` must name parameters or layers of the model, got "
                    f"{pattern!r}. Use one of {', '.join(list(sums.entries)[:5])}, ... or a pattern."
                )
            self.targets |= dict.fromkeys(fitting, float(target))

    def judge(self, sums: FisherSums, design: SampleDesign) -> Progress:
        """Decide whether the errors are reached.

        Args:
            sums: Sums over the inputs of all processes.
            design: How the inputs were chosen.
        """
        errors = group_errors(sums, design)
        first = next(iter(self.targets.values()))
        ratios, certain = [], True
        if self.entries is not None:
            subset_error = entries_rel_error(sums, design, self.entries) / first
            ratios.append(subset_error)
            certain = subset_error * (1 + _spread(errors, -1)) <= 1
        else:
            for row, group in enumerate(sums.groups):
                if group in self.targets and float(sums.column("trace")[row]) > 0:
                    ratio = float(errors.rel_error[row]) / self.targets[group]
                    ratios.append(ratio)
                    few = float(errors.effective[row]) < MIN_EFFECTIVE_INPUTS
                    complete = design.fraction(sums.inputs) == 1
                    certain &= ratio * (1 + _spread(errors, row)) <= 1 and (complete or not few)
        worst = max((math.inf if r != r else r for r in ratios), default=math.inf)
        enough = sums.inputs >= MIN_INPUTS and sums.batches >= MIN_BATCHES
        ordered = design.is_no_sample(sums) or (design.ordered and drift(sums)[0])
        needed = sums.inputs * worst**2 if math.isfinite(worst) else None
        return Progress(
            rel_error=worst * first,
            at_target=worst <= 1,
            reached=bool(worst <= 1 and certain and enough and not ordered),
            inputs_needed=needed,
        )


def next_decision(batches: int) -> int:
    """Return the number of batches at which is decided next: a multiple of ``MIN_BATCHES``.

    It does not depend on the number of processes, if that divides ``MIN_BATCHES``.

    >>> next_decision(0), next_decision(4), next_decision(100)
    (4, 8, 112)
    """
    target = max(batches + 1, math.ceil(batches * GROWTH))
    return math.ceil(target / MIN_BATCHES) * MIN_BATCHES


def _spread(errors: GroupErrors, row: int) -> float:
    spread = float(errors.rel_error_spread[row])
    return 0.0 if spread != spread else spread
