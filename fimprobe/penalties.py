"""Penalties on the factors of the bounds on Î₁'s variance: weight norms, to add to a loss.

The variance of Î₁ is bounded by ‖∂h_L/∂θ‖⁴ (17), and a layer's share of that Jacobian by products
over the layers above it of ‖W⁻‖_F (20) or s_max(W⁻) (21), W⁻ being the weight without the bias. A
product of n norms is at most (Σ norm²/n)^(n/2), so what these functions sum holds the products
down. Two things they do not do. Less confident outputs have larger moments, so a smaller bound on
the Jacobian need not be a smaller variance, absolute or relative to the Fisher information. And a
normalisation layer, which (20) and (21) leave out, undoes the norm of the weight before it: that
weight's scores grow as it shrinks, and Î₁'s variance with them. ``include`` leaves it out;
``examples/penalties.py`` measures all this.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.weak import WeakIdKeyDictionary

from fimprobe.errors import FimprobeError
from fimprobe.model.twin import unwrap

BLOCK = 8
"""Vectors for each weight. A penalty brings the largest singular values together and makes them
change places: one vector then lags by 10 % and more of s_max², eight by 0.1 %."""

START = 40
"""Iterations more in a weight's first call: random matrices are then within 1 % of s_max."""

_vectors: Any = WeakIdKeyDictionary()
"""By layer (or parametrisation): right singular vectors [groups, BLOCK, columns] of its weight."""


def frobenius(model: nn.Module, *, include: str | Iterable[str] = "*") -> Tensor:
    """Σ_l ‖W_l⁻‖_F² over the layers' weights, biases left out: the factors of (20).

    Add it to a loss: ``loss = criterion(...) + 1e-4 * fimprobe.penalties.frobenius(model)``. Its
    gradient is 2W: that of weight decay, without the biases, embeddings and normalisation layers.

    The layers are Linear, Conv1d–3d, ConvTranspose1d–3d, their subclasses and transformers'
    ``Conv1D``; of a convolution the kernel counts once, not once per position. A tied weight counts
    once, a frozen one not at all. A parametrised or pruned weight counts as the layer uses it, and
    the gradient reaches what it is computed from. Other modules' weights (attention's packed
    projections, recurrent cells) stand outside (20) and are left alone.

    Args:
        model: any module, also compiled or wrapped for data parallelism.
        include: shell patterns of layer names, as in the configuration's ``layers``.

    Returns:
        A scalar, in float32 or what is wider, also under autocast.

    Raises:
        FimprobeError: where no layer has a weight to penalise, or none that a pattern asks for.

    Source: Soen & Sun 2021, eq. (20).

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    >>> for p in net.parameters():
    ...     _ = nn.init.ones_(p)
    >>> frobenius(net).item(), frobenius(net, include="2").item()
    (9.0, 3.0)
    """
    return _total(model, include, lambda key, matrices: matrices.abs().square().sum())


def spectral(model: nn.Module, *, include: str | Iterable[str] = "*", iterations: int = 1) -> Tensor:
    """Σ_l s_max(W_l⁻)² over the layers' weights, biases left out: the factors of (21).

    Add it to a loss: ``loss = criterion(...) + 1e-3 * fimprobe.penalties.spectral(model)``. The
    layers are those of :func:`frobenius`.

    Block power iteration: an orthonormal basis of W's leading right singular vectors (``BLOCK`` at
    most) is multiplied by W, orthonormalised, and by Wᵀ; u is the unit vector in the middle with the
    largest ‖Wᵀu‖. The term is ‖Wᵀu‖² with u held fixed: never more than s_max², and its gradient
    2 u (Wᵀu)ᵀ is that of s_max², 2 s_max u vᵀ, once u has converged. The basis is kept from call to
    call, so that one iteration, two products with W, follows a weight that an optimizer moves; a
    weight's first call takes ``START`` more.

    The basis lives in this module for as long as the layer does: nothing is set on the model, its
    state dict or copies of it. It starts from a generator of its own, the same on every rank and
    device, and no random stream is touched. Calls without gradients (``torch.no_grad()``) leave it
    as it is, so that watching the penalty does not change training. A run resumed from a checkpoint
    starts it anew, and follows the uninterrupted one up to the iteration's error only.

    Convolutions: W is the kernel [O, I·k₁·k₂…], the matrix that multiplies a patch; of several
    groups the largest s_max counts, as they act on channels of their own. With zero or circular
    padding the convolution itself, from whole input to whole output, has a norm between
    s_max(W) (where a window fits in the input) and √(Π⌈kᵢ/strideᵢ⌉) s_max(W), since no pixel is in
    more than Π⌈kᵢ/strideᵢ⌉ patches. A transposed convolution is the adjoint of one, with its norm.

    Under ``torch.compile`` of the whole training step the graph breaks here, and the penalty runs
    as it stands.

    Args:
        model: any module, also compiled or wrapped for data parallelism.
        include: shell patterns of layer names, as in the configuration's ``layers``.
        iterations: power iterations in each call.

    Returns:
        A scalar, in float32 or what is wider, also under autocast.

    Raises:
        FimprobeError: where no layer has a weight to penalise, or none that a pattern asks for, and
            where ``iterations`` is no positive number.

    Source: Soen & Sun 2021, eq. (21).

    >>> net = nn.Linear(2, 2)
    >>> net.weight.data = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    >>> penalty = spectral(net)
    >>> penalty.backward()
    >>> penalty.item(), net.weight.grad.round(decimals=4).abs().tolist()
    (9.0, [[6.0, 0.0], [0.0, 0.0]])
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise FimprobeError(f"iterations={iterations!r} is no number of iterations; pass 1, 2, ...")
    return _total(
        model, include, lambda key, matrices: _largest_singular_value(key, matrices, iterations)
    )


def _total(
    model: nn.Module, include: str | Iterable[str], term: Callable[[Any, Tensor], Tensor]
) -> Tensor:
    """The terms of all weights, in their own precision whatever autocast says."""
    if torch.compiler.is_compiling():  # one break in the graph, not one for each layer
        return torch.compiler.disable(_total)(model, include, term)
    total = None
    for key, matrices in _matrices(model, include):
        kind = matrices.device.type
        with torch.autocast(kind, enabled=False):
            matrices = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
            value = term(key, matrices) if matrices.numel() else matrices.real.sum()
        total = value if total is None else total + value.to(total.device)
    assert total is not None
    return total


def _largest_singular_value(key: Any, w: Tensor, iterations: int) -> Tensor:
    """max over groups of ‖Wᵀu‖², w [groups, rows, columns] to a scalar, by block power iteration."""
    groups, rows, columns = w.shape
    shape = (groups, min(BLOCK, rows, columns), columns)
    with torch.inference_mode(False), torch.no_grad():
        v = _vectors.get(key)
        if v is None or v.shape != shape:
            # a private generator on the CPU: the same start on every device and rank
            v = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            iterations += START
        v = v.to(w)
        # rounding's worth of the neighbours, or v could not leave a subspace that W keeps apart
        v = v + 1e-6 * v.roll(1, 2)
        for _ in range(iterations):
            u = _orthogonal(v @ w.mH)
            image = u @ w
            v = _unit(_orthogonal(image), v)
        u = _unit(_leading(image @ image.mH) @ u, torch.zeros_like(u[:, :1]))
    if torch.is_grad_enabled() and not torch._C._functorch.is_functorch_wrapped_tensor(v):
        _vectors[key] = v  # not what belongs to one transform of torch.func
    return (u @ w).abs().square().sum((1, 2)).amax()


def _orthogonal(x: Tensor) -> Tensor:
    """Orthonormal rows with the span of x's [groups, k, n], by Cholesky: on a GPU nothing waits.

    Rows that depend on the others come out short, never infinite.
    """
    gram = x @ x.mH
    ridge = 1e-6 * _trace(gram) + torch.finfo(x.dtype).tiny
    factor, _ = torch.linalg.cholesky_ex(gram + ridge * torch.eye(gram.shape[1]).to(gram))
    return torch.linalg.solve_triangular(factor, x, upper=False)


def _leading(gram: Tensor) -> Tensor:
    """Leading eigenvectors of small positive matrices [groups, k, k], by squaring: [groups, 1, k]."""
    for _ in range(8):  # the 256th power: what is left of the others is within 1 % of s_max²
        gram = gram / (_trace(gram) + torch.finfo(gram.dtype).tiny)
        gram = gram @ gram
    place = gram.diagonal(dim1=1, dim2=2).abs().argmax(1)
    return gram.take_along_dim(place[:, None, None], 1)


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].abs()


def _unit(x: Tensor, otherwise: Tensor) -> Tensor:
    """Rows x/‖x‖; where that is not to be had (zero, infinite, NaN), what was before."""
    norm = torch.linalg.vector_norm(x, dim=2, keepdim=True)
    return torch.where((norm > 0) & norm.isfinite(), x / norm, otherwise)


def _matrices(model: nn.Module, include: str | Iterable[str]) -> list[tuple[Any, Tensor]]:
    """What a weight's vectors are kept under, and the weight as matrices [groups, rows, columns]."""
    if not isinstance(model, nn.Module):
        raise FimprobeError(f"model={type(model).__name__} is no torch.nn.Module")
    model = unwrap(model)
    layers = {n.replace("_orig_mod.", ""): m for n, m in model.named_modules() if _is_layer(m)}
    if not layers:
        raise FimprobeError(
            f"model={type(model).__name__} has no layer to penalise: no Linear, convolution or "
            "transformers Conv1D is among its modules"
        )
    patterns = [include] if isinstance(include, str) else list(include)
    chosen = {n: m for n, m in layers.items() if any(fnmatchcase(n, p) for p in patterns)}
    if not chosen:
        raise FimprobeError(
            f"include={include!r} matches no layer with a weight to penalise; there are "
            + _listed(layers)
        )
    found = {}
    with torch.enable_grad():  # whether a computed weight is trainable, its graph tells
        for name, module in chosen.items():
            key, weight = _weight(module)
            identity = id(module._parameters.get("weight", key))  # tied: one weight, two layers
            if weight.requires_grad and identity not in found:
                found[identity] = key, _as_matrices(name, module, weight)
    if not found:
        raise FimprobeError(
            f"the weights of {_listed(chosen)} are frozen (requires_grad=False); a penalty on them "
            "would do nothing"
        )
    return list(found.values())


def _listed(names: Iterable[str]) -> str:
    shown = [repr(n) for n in names]
    return ", ".join(shown[:8] + ["..."] * (len(shown) > 8))


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd)) or (
        # transformers' own: a Linear with its weight as [in, out]
        type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    )


def _weight(layer: Any) -> tuple[Any, Tensor]:
    """What the weight's vectors are kept under, and the weight as the layer's forward uses it.

    Never the parameter itself: torch refuses to swap a tensor that someone holds a weak reference to.
    What computes a weight is run as in evaluation, on a copy that shares the parameters: running it
    as in training would move its buffers (spectral norm) or random streams.
    """
    if "weight" in layer._parameters:
        return layer, layer.weight
    if "weight" in getattr(layer, "parametrizations", {}):
        recipe = layer.parametrizations["weight"]
        memo: dict[int, Any] = {id(p): p for p in recipe.parameters()}
        return recipe, copy.deepcopy(recipe, memo).eval()()
    for hook in layer._forward_pre_hooks.values():  # the older ones of torch.nn.utils
        if "weight" in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            if hasattr(hook, "apply_mask"):
                return layer, hook.apply_mask(layer)
            if hasattr(hook, "n_power_iterations"):
                return layer, hook.compute_weight(layer, do_power_iteration=False)
            return layer, hook.compute_weight(layer)
    return layer, layer.weight


def _as_matrices(name: str, layer: Any, weight: Tensor) -> Tensor:
    """[groups, rows, columns]: one matrix for a Linear, for a convolution one for each group."""
    remedy = ""
    if isinstance(weight, nn.parameter.UninitializedParameter):
        remedy = "has seen no input; run one forward pass first"
    elif weight.is_meta:
        remedy = "has its weight on the meta device; load or initialise it first"
    elif hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    if not remedy and weight.dim() < 2:
        remedy = f"has a weight of shape {tuple(weight.shape)}; gather what is sharded first"
    if remedy:
        raise FimprobeError(f"layer {name!r} ({type(layer).__name__}) {remedy}")
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    return weight.reshape(groups, weight.shape[0] // groups, math.prod(weight.shape[1:]))
