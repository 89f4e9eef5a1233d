"""The outputs among what a forward returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fimprobe.errors import FimprobeError


def select_outputs(out: Any) -> Tensor:
    """The network's outputs among what a forward returns."""
    if isinstance(out, Tensor):
        return out
    if isinstance(out, Mapping) and isinstance(out.get("logits"), Tensor):
        return out["logits"]  # type: ignore[no-any-return]
    if isinstance(getattr(out, "logits", None), Tensor):
        return out.logits  # type: ignore[no-any-return]
    if isinstance(out, (tuple, list)):
        for x in out:
            if isinstance(x, Tensor) and x.dim() > 0:
                return x
    keys = f" with keys {sorted(map(str, out))}" if isinstance(out, Mapping) else ""
    raise FimprobeError(
        f"the model returns {type(out).__name__}{keys}, which has no logits; pass output= a "
        "function from it to the outputs [B, ...]"
    )
