"""The likelihood of several heads, with the shapes of their outputs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from fimprobe.likelihoods import Joint
from fimprobe.likelihoods.base import Likelihood
from fimprobe.model.batch import Batch
from fimprobe.model.fsdp.shards import Shards
from fimprobe.model.leftovers import dropping_leftovers


def bind_heads(
    likelihood: Likelihood, twin: nn.Module, batch: Batch, select: Any, shards: Shards | None
) -> Likelihood:
    """Return the likelihood; that of several heads with the shapes of their outputs.

    Args:
        likelihood: The family.
        twin: The model, which runs on one sample if there are several heads.
        batch: The inputs.
        select: Selects the heads.
        shards: Set if FSDP shards the model.
    """
    if not isinstance(likelihood, Joint):
        return likelihood
    first = batch[:1]
    saving = nullcontext() if shards is None else shards.saving()
    with torch.no_grad(), saving, dropping_leftovers(twin):
        heads = select.heads(twin(*first.args, **first.kwargs))
    return likelihood.bind([head.shape[1:] for head in heads.values()])
