"""How each parameter is reached, and the signal that a batch contradicts this plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from fimprobe.engines.layers.decompositions import UNROLLED
from fimprobe.engines.layers.rules import rules_for
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.tracing.batch_layout import BatchLayouts
from fimprobe.engines.tracing.spot_history import SpotHistory
from fimprobe.model.input_roles import InputRoles
from fimprobe.model.twin import TwinSettings


@dataclass(kw_only=True)
class Plan:
    """How each parameter is reached; made and verified on the first samples, then reused.

    Attributes:
        layouts: The place of the batch at each module.
        fallbacks: For each parameter that no rule reaches, the module that is re-evaluated for single
            samples. "" is the whole model.
        unvectorized: Modules that ``vmap`` cannot run; samples are looped over.
        unused: Parameters on which the outputs do not depend.
        chunk_size: Samples processed at once; None for the whole batch.
        output_bytes: Size of the largest output of a layer for one sample, on a CPU; 0 if not known.
        saved_bytes: What a forward of a chunk keeps for its backward, by the shapes of its inputs.
        rescaled: Parameters whose gradients' fourth powers left the range of float32. They are
            scaled from the start next time.
        verified_samples: Samples that were compared with single evaluations; 0 before verification.
        curvature_verified_samples: The same for second derivatives.
        curvature_failure: Why there are no second derivatives; empty if there are.
        propagates: Whether curvature propagation agrees with a double backward; None before it was
            compared.
        second_order_limit: Forward and backward passes that evaluations of modules may cost for
            second derivatives; None for any number.
        takes_derivatives: Whether the forward itself takes derivatives. Memory is then counted after
            it, and activations keep torch's backward.
        kinks: Modules that are not twice differentiable; None before they were searched for.
        chosen_for: Fingerprint of the model for which ``second_order`` and ``backpack`` hold.
        second_order: What computes second derivatives for ``second_order="auto"``; empty before it
            was decided.
        backpack: What BackPACK does not support, by module, for first (False) and second order
            (True); None before it was checked.
        twin: How the model is copied; None before it was checked.
        input_roles: Which inputs hold the samples.
        spot_history: What spot checks of earlier measurements have shown.
        measurements: Number of measurements with this plan since it was verified.
        checked_states: Fingerprints of the model, with shapes of inputs, for which a sample was
            compared.
    """

    layouts: BatchLayouts = field(default_factory=BatchLayouts)
    fallbacks: dict[str, str] = field(default_factory=dict)
    unvectorized: set[str] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)
    chunk_size: int | None = None
    output_bytes: float = 0.0
    saved_bytes: dict[str, int] = field(default_factory=dict)
    rescaled: set[str] = field(default_factory=set)
    verified_samples: int = 0
    curvature_verified_samples: int = 0
    curvature_failure: str = ""
    propagates: bool | None = None
    second_order_limit: float | None = None
    takes_derivatives: bool = False
    kinks: list[str] | None = None
    chosen_for: int | None = None
    second_order: str = ""
    backpack: dict[bool, dict[str, str]] | None = None
    twin: TwinSettings | None = None
    input_roles: InputRoles = field(default_factory=InputRoles)
    spot_history: SpotHistory = field(default_factory=SpotHistory)
    measurements: int = 0
    checked_states: set[str] = field(default_factory=set)

    def follow_model(self) -> None:
        """Forget what depends on the model's operations, if the model is another than before."""
        fingerprint = None if self.twin is None else self.twin.fingerprint
        if fingerprint != self.chosen_for:
            self.second_order, self.backpack, self.spot_history = "", None, SpotHistory()
        self.chosen_for = fingerprint

    def keep_settings(self, earlier: Plan) -> None:
        """Take over what does not depend on how parameters are reached."""
        self.twin, self.input_roles = earlier.twin, earlier.input_roles
        self.second_order_limit = earlier.second_order_limit
        self.chosen_for = earlier.chosen_for


class PlanMismatch(Exception):
    """The plan does not fit this batch; maps a parameter or a module to the reason."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(str(reasons))
        self.reasons = reasons


def coverage(problem: Problem, plan: Plan) -> dict[str, str]:
    """Describe for each parameter how it is measured, or why it is not.

    Args:
        problem: The model and its parameters, frozen ones included.
        plan: How each parameter is reached.

    Returns:
        The description by the parameter's name.
    """
    descriptions = {}
    for name, owner in problem.owners.items():
        if name in problem.frozen:
            descriptions[name] = "left out: frozen"
        elif name in plan.unused:
            descriptions[name] = "left out: the measured outputs do not depend on it"
        elif name not in plan.fallbacks and rules_for(owner):
            descriptions[name] = f"autograd: {type(owner).__name__} rule"
        elif name not in plan.fallbacks and type(owner) in UNROLLED:
            descriptions[name] = f"autograd: {type(owner).__name__} written out"
        else:
            path = plan.fallbacks.get(name, name.rpartition(".")[0])
            how = "loop over samples" if path in plan.unvectorized else "vmap"
            descriptions[name] = f"autograd: replay of {path or 'the whole model'} ({how})"
    return descriptions
