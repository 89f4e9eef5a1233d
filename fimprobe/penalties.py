"""Penalties on weight norms, the factors of the bounds on Î₁'s variance, to add to a loss.

The variance of Î₁ is bounded by ‖∂h_L/∂θ‖⁴ (17). A layer's share of this Jacobian is bounded by
products over the layers above it of ‖W⁻‖_F (20) or s_max(W⁻) (21), W⁻ being the weight without the
bias; equations are those of Soen & Sun (2021). A product of n norms is at most (Σ norm²/n)^(n/2), so
that the sums of these functions bound the products.

A penalty does not necessarily lower the variance, for two reasons. Less confident outputs have
larger moments, so that a smaller bound on the Jacobian need not give a smaller variance, absolute or
relative to the Fisher information. A normalisation layer, which (20) and (21) leave out, cancels the
norm of the weight before it: as the weight shrinks its scores grow, and the variance of Î₁ with them.
``include`` can leave such a weight out. ``examples/penalties.py`` measures both effects.
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

NUM_VECTORS = 8
"""Vectors of each weight. A penalty makes the largest singular values nearly equal, so that their
order changes. The value of one vector is then too small by 10 % and more of s_max², that of eight by
0.1 %."""

START_ITERATIONS = 40
"""Additional iterations in a weight's first call: random matrices are then within 1 % of s_max."""

_vectors: Any = WeakIdKeyDictionary()
"""Right singular vectors [groups, NUM_VECTORS, columns] by layer (or parametrisation)."""


def frobenius(model: nn.Module, *, include: str | Iterable[str] = "*") -> Tensor:
    """Return Σ_l ‖W_l⁻‖_F² over the weights of the layers without biases, the factors of (20).

    Add it to a loss: ``loss = criterion(...) + 1e-4 * fimprobe.penalties.frobenius(model)``. Its
    gradient is 2W, that of weight decay without biases, embeddings and normalisation layers.

    The layers are Linear, Conv1d–3d, ConvTranspose1d–3d, their subclasses and ``Conv1D`` of
    transformers. The kernel of a convolution counts once, not once per position. A tied weight counts
    once, a frozen one not at all. A parametrised or pruned weight counts in the form that the layer
    uses, and the gradient reaches the tensors that it is computed from. The weights of other modules
    (packed projections of attention, recurrent cells) are not part of (20) and are left out.

    See Soen & Sun (2021), eq. 20.

    Args:
        model: Any module, also compiled or wrapped for data parallelism.
        include: Shell patterns of layer names, as in the option ``layers``.

    Returns:
        A scalar, in float32 or a wider type, also under autocast.

    Raises:
        FimprobeError: If no layer has a weight to penalise, or none that matches a pattern.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    >>> for p in net.parameters():
    ...     _ = nn.init.ones_(p)
    >>> frobenius(net).item(), frobenius(net, include="2").item()
    (9.0, 3.0)
    """
    return _total(model, include, lambda key, matrices: matrices.abs().square().sum())


def spectral(model: nn.Module, *, include: str | Iterable[str] = "*", iterations: int = 1) -> Tensor:
    """Return Σ_l s_max(W_l⁻)² over the weights of the layers without biases, the factors of (21).

    Add it to a loss: ``loss = criterion(...) + 1e-3 * fimprobe.penalties.spectral(model)``. The
    layers are those of :func:`frobenius`.

    **Block power iteration.** An orthonormal basis of the leading right singular vectors of W (at
    most ``NUM_VECTORS``) is multiplied by W, orthonormalised, and multiplied by Wᵀ. u is the unit
    vector after the first product with the largest ‖Wᵀu‖. The term is ‖Wᵀu‖² with u constant: it
    never exceeds s_max², and its gradient 2 u (Wᵀu)ᵀ is that of s_max², 2 s_max u vᵀ, once u has
    converged. The basis is kept between calls. One iteration, two products with W, is therefore
    enough to follow a weight that an optimizer changes; the first call of a weight needs
    ``START_ITERATIONS`` more.

    **State.** The basis is kept in this module as long as the layer exists: nothing is set on the
    model, its state dict or copies of it. It starts from a private generator, the same on every rank
    and device, and no random stream is touched. Calls without gradients (``torch.no_grad()``) do not
    change it, so that logging the penalty does not change training. A run that resumes from a
    checkpoint starts a new basis, and follows the uninterrupted run up to the error of the iteration.

    **Convolutions.** W is the kernel [O, I·k₁·k₂…], the matrix that multiplies a patch. Groups act on
    separate channels: the largest s_max of the groups counts. With zero or circular padding the
    convolution from the whole input to the whole output has a norm between s_max(W) (where a window
    fits in the input) and √(Π⌈kᵢ/strideᵢ⌉) s_max(W), because no pixel is in more than Π⌈kᵢ/strideᵢ⌉
    patches. A transposed convolution is the adjoint of one and has its norm.

    Under ``torch.compile`` of the whole training step the graph breaks here, and the penalty runs
    uncompiled. See Soen & Sun (2021), eq. 21.

    Args:
        model: Any module, also compiled or wrapped for data parallelism.
        include: Shell patterns of layer names, as in the option ``layers``.
        iterations: Power iterations in each call.

    Returns:
        A scalar, in float32 or a wider type, also under autocast.

    Raises:
        FimprobeError: If no layer has a weight to penalise, or none that matches a pattern, or if
            ``iterations`` is not a positive integer.

    >>> net = nn.Linear(2, 2)
    >>> net.weight.data = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    >>> penalty = spectral(net)
    >>> penalty.backward()
    >>> penalty.item(), net.weight.grad.round(decimals=4).abs().tolist()
    (9.0, [[6.0, 0.0], [0.0, 0.0]])
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise FimprobeError(
            f"`iterations` must be a positive integer, got {iterations!r}. Use 1, 2, ..."
        )
    return _total(
        model, include, lambda key, matrices: _largest_singular_value(key, matrices, iterations)
    )


def _total(
    model: nn.Module, include: str | Iterable[str], term: Callable[[Any, Tensor], Tensor]
) -> Tensor:
    """Return the sum of the terms of all weights, in their precision also under autocast.

    Args:
        model: The model.
        include: Shell patterns of layer names.
        term: Function of a key and a weight [groups, rows, columns] that returns a scalar.
    """
    if torch.compiler.is_compiling():  # one break in the graph, not one for each layer
        return torch.compiler.disable(_total)(model, include, term)
    total = None
    for key, matrices in _matrices(model, include):
        with torch.autocast(matrices.device.type, enabled=False):
            matrices = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
            value = term(key, matrices) if matrices.numel() else matrices.real.sum()
        total = value if total is None else total + value.to(total.device)
    assert total is not None
    return total


def _largest_singular_value(key: Any, w: Tensor, iterations: int) -> Tensor:
    """Return the maximum over groups of ‖Wᵀu‖² by block power iteration.

    Args:
        key: Key of the vectors of the weight.
        w: The weight [groups, rows, columns].
        iterations: Power iterations.
    """
    groups, rows, columns = w.shape
    shape = (groups, min(NUM_VECTORS, rows, columns), columns)
    with torch.inference_mode(False), torch.no_grad():
        v = _vectors.get(key)
        if v is None or v.shape != shape:
            # a private generator on the CPU: the same start on every device and rank
            v = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            iterations += START_ITERATIONS
        v = v.to(w)
        # a rounding error of the other columns, else v could not leave an invariant subspace of W
        v = v + 1e-6 * v.roll(1, 2)
        for _ in range(iterations):
            u = _orthogonal(v @ w.mH)
            image = u @ w
            v = _unit(_orthogonal(image), v)
        u = _unit(_leading(image @ image.mH) @ u, torch.zeros_like(u[:, :1]))
    if torch.is_grad_enabled() and not torch._C._functorch.is_functorch_wrapped_tensor(v):
        _vectors[key] = v  # a wrapped tensor would outlive the transform that it belongs to
    return (u @ w).abs().square().sum((1, 2)).amax()


def _orthogonal(x: Tensor) -> Tensor:
    """Return orthonormal rows with the span of those of x [groups, k, n].

    Cholesky needs no synchronisation with a GPU, unlike QR. Rows that depend on the others become
    short, never infinite.
    """
    gram = x @ x.mH
    ridge = 1e-6 * _trace(gram) + torch.finfo(x.dtype).tiny
    factor, _ = torch.linalg.cholesky_ex(gram + ridge * torch.eye(gram.shape[1]).to(gram))
    return torch.linalg.solve_triangular(factor, x, upper=False)


def _leading(gram: Tensor) -> Tensor:
    """Return the leading eigenvectors [groups, 1, k] of positive matrices [groups, k, k]."""
    # the 256th power: only eigenvectors whose eigenvalues are within 1 % of s_max² remain
    for _ in range(8):
        gram = gram / (_trace(gram) + torch.finfo(gram.dtype).tiny)
        gram = gram @ gram
    index = gram.diagonal(dim1=1, dim2=2).abs().argmax(1)
    return gram.take_along_dim(index[:, None, None], 1)


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].abs()


def _unit(x: Tensor, otherwise: Tensor) -> Tensor:
    """Return rows x/‖x‖, and those of ``otherwise`` where ‖x‖ is zero, infinite or NaN."""
    norm = torch.linalg.vector_norm(x, dim=2, keepdim=True)
    return torch.where((norm > 0) & norm.isfinite(), x / norm, otherwise)


def _matrices(model: nn.Module, include: str | Iterable[str]) -> list[tuple[Any, Tensor]]:
    """Return the key of every weight's vectors, and the weight [groups, rows, columns]."""
    if not isinstance(model, nn.Module):
        raise FimprobeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    model = unwrap(model)
    layers = {n.replace("_orig_mod.", ""): m for n, m in model.named_modules() if _is_layer(m)}
    if not layers:
        raise FimprobeError(
            "`model` must have a layer to penalise (Linear, convolution or Conv1D of transformers), "
            f"got {type(model).__name__}, which has none."
        )
    patterns = [include] if isinstance(include, str) else list(include)
    selected = {n: m for n, m in layers.items() if any(fnmatchcase(n, p) for p in patterns)}
    if not selected:
        raise FimprobeError(
            f"`include` must match a layer with a weight to penalise, got {include!r}. The layers "
            f"are {_format_names(layers)}."
        )
    weights = {}
    with torch.enable_grad():  # the graph of a computed weight shows whether it is trainable
        for name, module in selected.items():
            key, weight = _weight(module)
            identity = id(module._parameters.get("weight", key))  # tied: one weight, two layers
            if weight.requires_grad and identity not in weights:
                weights[identity] = key, _as_matrices(name, module, weight)
    if not weights:
        raise FimprobeError(
            f"The weights of {_format_names(selected)} are frozen (requires_grad=False), so that a "
            "penalty on them has no effect. Leave the penalty out, or unfreeze a weight."
        )
    return list(weights.values())


def _format_names(names: Iterable[str]) -> str:
    shown = [repr(n) for n in names]
    return ", ".join(shown[:8] + ["..."] * (len(shown) > 8))


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd)) or (
        # of transformers: a Linear whose weight is [in, out]
        type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    )


def _weight(layer: Any) -> tuple[Any, Tensor]:
    """Return the key of the weight's vectors, and the weight that the layer's forward uses.

    The key is never the parameter: torch refuses to swap a tensor that has a weak reference. A
    computed weight is evaluated on a copy in eval mode that shares the parameters: in training mode
    the computation would change its buffers (spectral norm) or random streams.
    """
    if "weight" in layer._parameters:
        return layer, layer.weight
    if "weight" in getattr(layer, "parametrizations", {}):
        parametrization = layer.parametrizations["weight"]
        memo: dict[int, Any] = {id(p): p for p in parametrization.parameters()}
        return parametrization, copy.deepcopy(parametrization, memo).eval()()
    for hook in layer._forward_pre_hooks.values():  # older parametrisations of torch.nn.utils
        if "weight" in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            if hasattr(hook, "apply_mask"):
                return layer, hook.apply_mask(layer)
            if hasattr(hook, "n_power_iterations"):
                return layer, hook.compute_weight(layer, do_power_iteration=False)
            return layer, hook.compute_weight(layer)
    return layer, layer.weight


def _as_matrices(name: str, layer: Any, weight: Tensor) -> Tensor:
    """Return a weight [groups, rows, columns]: one matrix for a Linear, one for each group else."""
    problem = ""
    if isinstance(weight, nn.parameter.UninitializedParameter):
        problem = "is not initialised. Run one forward pass first."
    elif weight.is_meta:
        problem = "is on the meta device. Load or initialise it first."
    elif hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    if not problem and weight.dim() < 2:
        problem = f"has the shape {tuple(weight.shape)}. Gather the sharded weight first."
    if problem:
        raise FimprobeError(f"The weight of layer {name!r} ({type(layer).__name__}) {problem}")
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    return weight.reshape(groups, weight.shape[0] // groups, math.prod(weight.shape[1:]))
