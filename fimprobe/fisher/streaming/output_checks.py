"""Whether outputs are probabilities, where a family expects logits."""

from __future__ import annotations

from torch import Tensor

from fimprobe.model.runs import are_probabilities

MIN_ROWS = 4
"""Least number of inputs: the logits of fewer may happen to look like probabilities."""


def probabilities_note(family: str, outputs: Tensor) -> str:
    """Return a note about outputs that look like probabilities; empty if they do not.

    Args:
        family: The name of the family.
        outputs: h [B, ...].

    >>> from torch import arange
    >>> h = arange(12.0).view(4, 3)
    >>> probabilities_note("categorical", h)
    ''
    >>> probabilities_note("categorical", h.softmax(1))[:48]
    'The outputs look like probabilities, since rows '
    """
    function = {"categorical": "log", "bernoulli": "logit"}.get(family)
    if function is None or len(outputs) < MIN_ROWS or not are_probabilities(outputs):
        return ""
    reason = "all lie in [0, 1]"
    if family == "categorical":
        dims = {d for d in (1, outputs.dim() - 1) if outputs.shape[d] > 1}
        near = 0.01 if outputs.dtype.itemsize < 4 else 1e-4
        if not any(bool(((outputs.sum(d) - 1).abs() < near).all()) for d in dims):
            return ""
        reason = "rows sum to 1"
    return (
        f"The outputs look like probabilities, since {reason}, and were taken as logits. Pass "
        f"output=torch.{function} if they are probabilities."
    )
