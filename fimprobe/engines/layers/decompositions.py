"""Attention and recurrent layers written as affine maps, whose cotangents the tape records.

torch computes these layers in one call, which shows no pre-activations. On the twin their forward is
replaced by an equivalent one. The weights enter detached, so that the backward pass computes the
cotangents δ at each affine map and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fimprobe.engines.layers.affine_maps import AffineMaps


class NotUnrolled(Exception):
    """A call that cannot be decomposed: packed or unbatched inputs, or extra parameters."""


def attention(
    module: Any, affine: AffineMaps, query: Tensor, key: Tensor, value: Tensor, *args, **kw
):
    """Decompose ``nn.MultiheadAttention``: recorded projections around torch's attention function.

    Args:
        module: The layer.
        affine: Computes and records the affine maps.
        query: Queries [T, B, E], or [B, T, E] with ``batch_first``; keys and values likewise.
        key: Keys.
        value: Values.
        *args: Further arguments of the layer.
        **kw: Further arguments of the layer.

    Returns:
        What the layer returns: outputs and attention weights.
    """
    if module.bias_k is not None or query.dim() != 3:
        raise NotUnrolled
    names = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
    options: dict[str, Any] = dict(zip(names, args, strict=False)) | kw
    width = module.embed_dim
    projected: Any = []
    for index, (x, name) in enumerate(zip((query, key, value), "qkv", strict=True)):
        rows = slice(index * width, (index + 1) * width)  # the packed weight holds q, k and v
        bias = "in_proj_bias" if module.in_proj_bias is not None else None
        if module._qkv_same_embed_dim:
            projected.append(affine(x, "in_proj_weight", bias, rows, rows))
        else:
            projected.append(affine(x, f"{name}_proj_weight", bias, None, rows))
    if module.batch_first:
        projected = [x.transpose(0, 1) for x in projected]
    # identity projections: torch's function then computes nothing but the attention itself
    eye = torch.eye(width, dtype=query.dtype, device=query.device)
    attend: Any = F.multi_head_attention_forward
    out, weights = attend(
        *projected,
        width,
        module.num_heads,
        None,
        None,
        None,
        None,
        module.add_zero_attn,
        0.0,
        eye,
        None,  # type: ignore[arg-type]
        training=False,
        use_separate_proj_weight=True,
        q_proj_weight=eye,
        k_proj_weight=eye,
        v_proj_weight=eye,
        **options,
    )
    if module.batch_first:
        out = out.transpose(0, 1)
    bias = "out_proj.bias" if module.out_proj.bias is not None else None
    return affine(out, "out_proj.weight", bias), weights


def recurrent(module: Any, affine: AffineMaps, x: Tensor, hx: Any = None):
    """Decompose ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``, in all their options.

    Args:
        module: The layer.
        affine: Computes and records the affine maps.
        x: Inputs [T, B, I], or [B, T, I] with ``batch_first``.
        hx: Initial state, as the layer expects it.

    Returns:
        What the layer returns: outputs and final state.
    """
    if not isinstance(x, Tensor) or x.dim() != 3:
        raise NotUnrolled
    if module.batch_first:
        x = x.transpose(0, 1)
    lstm = isinstance(module, nn.LSTM)
    directions = 2 if module.bidirectional else 1
    count = module.num_layers * directions
    width = getattr(module, "proj_size", 0) or module.hidden_size
    first = last = None
    if hx is None:
        first = x.new_zeros(count, x.shape[1], width)
        last = x.new_zeros(count, x.shape[1], module.hidden_size)
    elif lstm:
        first, last = hx
    else:
        first = hx
    finals: list[Tensor] = []
    cells: list[Tensor] = []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            index = layer * directions + direction
            sequence = x.flip(0) if direction else x
            cell = last[index] if lstm and last is not None else None
            out, h, c = _run_direction(module, affine, sequence, first[index], cell, suffix)
            outputs.append(out.flip(0) if direction else out)
            finals.append(h)
            if c is not None:
                cells.append(c)
        x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
    out = x.transpose(0, 1) if module.batch_first else x
    if lstm:
        return out, (torch.stack(finals), torch.stack(cells))
    return out, torch.stack(finals)


def _run_direction(module: Any, affine: AffineMaps, x: Tensor, h: Tensor, c: Any, suffix: str):
    """Run one layer in one direction over x [T, B, I] from the state (h, c).

    ``suffix`` ends the names of its parameters. Returns the outputs [T, B, H] and the final state.
    """
    biases = ("bias_ih" + suffix, "bias_hh" + suffix) if module.bias else (None, None)
    # unbind: indexing would cost T² in the backward pass
    ih = affine(x, "weight_ih" + suffix, biases[0], layout=1).unbind(0)
    step = affine.steps("weight_hh" + suffix, biases[1], x)
    project = None
    if getattr(module, "proj_size", 0):
        project = affine.steps("weight_hr" + suffix, None, x)
    outputs = []
    for t in range(x.shape[0]):
        hh = step(t, h)
        if isinstance(module, nn.LSTM):
            i, f, g, o = (ih[t] + hh).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            if project is not None:
                h = project(t, h)
        elif isinstance(module, nn.GRU):
            (ir, iz, inn), (hr, hz, hn) = ih[t].chunk(3, -1), hh.chunk(3, -1)
            z = torch.sigmoid(iz + hz)
            new = torch.tanh(inn + torch.sigmoid(ir + hr) * hn)
            h = (1 - z) * new + z * h
        else:
            act = torch.tanh if module.nonlinearity == "tanh" else torch.relu
            h = act(ih[t] + hh)
        outputs.append(h)
    return torch.stack(outputs), h, c


UNROLLED: dict[type[nn.Module], Callable[..., Any]] = {
    nn.MultiheadAttention: attention,
    nn.RNN: recurrent,
    nn.LSTM: recurrent,
    nn.GRU: recurrent,
}
"""Decomposition of each layer class."""
