"""Language models whose trainer asks them for log-probabilities of the labels in place of logits.

TRL adds a fused head to the forward: with the keyword ``fused_lm_head`` it returns log-probabilities,
without it the logits, as before. The same inputs are therefore measured without the keyword.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fimprobe.errors import FimprobeError
from fimprobe.model.outputs import select_outputs
from fimprobe.model.twin import unwrap

_KEYWORD = "fused_lm_head"
_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch")

FUSED_NOTE = (
    "The trainer asked the model for log-probabilities of its labels (a fused head); the same inputs "
    "were measured at the model's logits. The Fisher information is that of the distribution of "
    "tokens, whatever the trainer's loss."
)


@dataclass(frozen=True, kw_only=True)
class TemperedOutputs:
    """Selects logits and divides them by a temperature.

    Args:
        temperature: The divisor.
        output: From what the model returns to the logits.
    """

    temperature: float
    output: Callable[[Any], Tensor] = select_outputs

    def __call__(self, returned: Any) -> Tensor:
        """Return the logits of the distribution that the trainer's loss reads."""
        return self.output(returned) / self.temperature


def is_fused(kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call asks for log-probabilities in place of logits."""
    return bool(kwargs.get(_KEYWORD))


def without_fused_head(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of the call that returns logits; labels are not needed for them."""
    return {k: v for k, v in kwargs.items() if k not in (_KEYWORD, *_OF_THE_LOSS)}


def fused_temperature(model: nn.Module) -> float:
    """Return the temperature that the fused head of a model divides its logits by.

    Raises:
        FimprobeError: If it is not known.
    """
    for module in unwrap(model).modules():
        forward: Any = getattr(vars(module).get("forward"), "__func__", None)
        code = getattr(forward, "__code__", None)
        if code is not None and _KEYWORD in code.co_varnames:
            cells = dict(zip(code.co_freevars, forward.__closure__ or (), strict=True))
            temperature = cells["temperature"].cell_contents if "temperature" in cells else None
            if isinstance(temperature, (int, float)) and temperature > 0:
                return float(temperature)
    raise FimprobeError(
        f"the model was called with {_KEYWORD}=True, and the temperature of its fused head is not "
        "known. Pass output= a function from what the model returns without that keyword to the "
        "logits that the loss reads."
    )
