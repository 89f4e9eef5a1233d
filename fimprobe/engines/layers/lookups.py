"""Per-sample gradients of lookups: Embedding and EmbeddingBag."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.engines.layers.layer_call import LayerCall


def embedding_tokens(call: LayerCall, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The non-zero rows of a lookup's gradient, one for each (sample, token) pair that occurs.

    Args:
        call: A call of an Embedding or EmbeddingBag.
        delta: Cotangents [B, S, ..., D].

    Returns:
        Sample [U], token [U] and gradient of the token's row [U, S, D] of each pair.
    """
    module: Any = call.module
    tokens = call.inputs[0].reshape(call.inputs[0].shape[0], -1)
    samples, length = tokens.shape
    if isinstance(module, nn.EmbeddingBag):  # δ [B, S, D] goes to every token of the bag
        share = call.inputs[1] if len(call.inputs) > 1 else torch.ones_like(tokens, dtype=delta.dtype)
        if module.padding_idx is not None:
            share = share * (tokens != module.padding_idx)
        if module.mode == "mean":
            share = share / share.sum(1, keepdim=True).clamp(min=1)
        delta = delta.unsqueeze(2) * share.to(delta.dtype)[:, None, :, None]
    delta = delta.reshape(samples, delta.shape[1], length, -1)
    if module.padding_idx is not None:
        delta = delta * (tokens != module.padding_idx)[:, None, :, None]
    # one integer for each pair, so that one sort finds those that occur
    key = tokens + torch.arange(samples, device=tokens.device)[:, None] * module.num_embeddings
    pairs, inverse = key.flatten().unique(return_inverse=True)
    rows = delta.new_zeros(len(pairs), delta.shape[1], delta.shape[3])
    rows.index_add_(0, inverse, delta.transpose(1, 2).flatten(0, 1))
    return pairs // module.num_embeddings, pairs % module.num_embeddings, rows


def embedding_weight(call: LayerCall, delta: Tensor) -> Tensor:
    """The gradient of a lookup as a dense tensor, for weights that are also used elsewhere.

    Args:
        call: A call of an Embedding or EmbeddingBag with V rows of width D.
        delta: Cotangents [B, S, ..., D].

    Returns:
        g [B, S, V, D].
    """
    module: Any = call.module
    sample, token, rows = embedding_tokens(call, delta)
    shape = (delta.shape[0], delta.shape[1], *module.weight.shape)
    dense = delta.new_zeros(shape)
    dense[sample, :, token] = rows
    return dense
