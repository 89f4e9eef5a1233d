"""Bounds on a layer's Jacobian from the norms of the weights between it and the outputs."""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fimprobe.batch import Batch
from fimprobe.engines.operators import (
    Norms,
    convolution_norms,
    linear_norms,
)
from fimprobe.engines.patches import (
    InputNorms,
    bias_norms,
    convolution_input_norms,
    linear_input_norms,
)
from fimprobe.engines.problem import OverMemory, Problem
from fimprobe.engines.spectral import ROUNDING
from fimprobe.engines.windows import Window


@dataclass(frozen=True)
class LayerBound:
    """Weight-norm bounds on J_l = ∂h_L/∂W_l, W_l the layer's trained weight and bias, per input.

    Tensors are float64 [B] on the CPU. Where ``reason`` is given the bounds are None.
    """

    frobenius: Tensor | None = None
    """At least ‖J_l‖_F: (20) in the form that holds for every layer."""
    spectral: Tensor | None = None
    """At least s_max(J_l): (21)."""
    unsafe_frobenius: Tensor | None = None
    """(20) as printed, ‖X̃_l‖_F Π_{i>l} ‖W_i⁻‖_F: below ‖J_l‖_F at the last layer, and with GELU."""
    input_norm: Tensor | None = None
    """At least s_max(X̃_l): ‖h̄_l‖ for a layer used at one position."""
    activation_constant: Tensor | None = None
    """Product of the constants of activations, norms of poolings, ... between layer and outputs."""
    weight_spectral_norm: float | None = None
    """s_max of the layer's own linear operator without bias: exact if it is small, else a bound, at
    most 10 % above it, for convolutions on large images 22 % and what their border takes.
    None where it enters no bound and is dear."""
    weight_frobenius_norm: float | None = None
    """‖·‖_F of that operator on one input: √T ‖W⁻‖_F for a Linear used at T positions."""
    reason: str | None = None
    """Why there are no bounds."""


def chain_bounds(problem: Problem, batch: Batch) -> dict[str, LayerBound]:
    """Bounds of every module that owns a trained weight which the outputs depend on.

    From the outputs towards the input, ∂h_L/∂z_l = A_1 ⋯ A_k with z_l the layer's output before its
    activation. With s_i ≥ s_max(A_i), S = Π s_i, f_i = ‖A_i‖_F of the weights' operators, n the
    least dimension on the way (and of W_l), X̃_l the rows that meet W_l (h̄_lᵀ for a Linear):

    - ``spectral``: S s_max(X̃_l);
    - ``frobenius``: the least of √n S s_max(X̃_l), min_j (f_j/s_j) S s_max(X̃_l) and S ‖X̃_l ⊗ I‖_F.

    s_i is a Lipschitz constant for an activation; for LayerNorm, max pooling and a function written
    out in elementwise steps it is the norm of their derivative at this input. The chain is read off
    the autograd graph of one forward pass. A layer has bounds if one path leads from it to the
    outputs: layers inside one branch of a sum have, those before a fork have not. Source: Soen &
    Sun 2021, (19)–(21); (20) as printed fails at the last layer.

    Samples are taken in parts where the forward pass would keep more than half of ``memory_mb``.

    Returns:
        Module path -> bounds or reason, in the modules' order.

    Raises:
        BatchError: where the outputs are not finite.
    """
    norms: dict[tuple[Any, ...], Norms] = {}
    parts: list[dict[str, LayerBound]] = []
    start, step = 0, batch.size
    while start < batch.size:
        part = batch if step >= batch.size else batch[slice(start, start + step)]
        try:
            with torch.enable_grad(), _memory_ceiling(problem, part.size):
                outputs = problem.forward(part)
        except OverMemory as over:
            step = over.fit
            continue
        if outputs.grad_fn is None:
            return {}
        with torch.enable_grad():
            parts.append(_Walk(problem.twin, outputs, part.size, norms).result())
        start += part.size
    return {path: _joined([p[path] for p in parts if path in p]) for part in parts for path in part}


def _joined(parts: list[LayerBound]) -> LayerBound:
    """The bounds of a batch from those of its parts."""
    reason = next((p.reason for p in parts if p.reason is not None), None)
    if len(parts) == 1 or reason is not None:
        return next(p for p in parts if p.reason == reason)
    names = [f.name for f in fields(LayerBound) if isinstance(getattr(parts[0], f.name), Tensor)]
    whole: dict[str, Any] = {n: torch.cat([getattr(p, n) for p in parts]) for n in names}
    return replace(parts[0], **whole)


@contextmanager
def _memory_ceiling(problem: Problem, size: int) -> Iterator[None]:
    """Stop a forward pass that saves more than half of ``memory_mb`` and can be halved."""
    seen = {p.untyped_storage().data_ptr() for p in problem.twin.parameters()}
    total = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal total
        if x.layout == torch.strided and x.untyped_storage().data_ptr() not in seen:
            seen.add(x.untyped_storage().data_ptr())
            total += x.untyped_storage().nbytes()
        if total > problem.memory_mb * 2**19 and size > 1:
            raise OverMemory(size // 2)
        return x.detach()  # x itself would be kept alive by its own graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield


LIPSCHITZ: dict[str, Callable[[Any], float]] = {
    **dict.fromkeys(
        [
            "Relu",
            "Tanh",
            "LogSigmoid",
            "Softplus",
            "Hardtanh",
            "Softshrink",
            "Hardshrink",
            "Threshold",
        ],
        lambda node: 1.0,
    ),
    **dict.fromkeys(
        ["Clamp", "ClampMin", "ClampMax", "Abs", "Neg", "Sin", "Cos", "Atan"], lambda n: 1.0
    ),
    "Sigmoid": lambda node: 0.25,
    "Hardsigmoid": lambda node: 0.16666668,  # torch rounds 1/6 to float32, up
    "Hardswish": lambda node: 1.5,
    "Gelu": lambda node: 1.12890415 if node._saved_approximate == "none" else 1.12899307,
    "Silu": lambda node: 1.09983933,
    "Mish": lambda node: 1.08849817,
    "Erf": lambda node: 1.12837917,
    "Elu": lambda node: (
        abs(node._saved_scale) * max(1.0, abs(node._saved_alpha * node._saved_input_scale))
    ),
    "Celu": lambda node: 1.0 if node._saved_alpha > 0 else math.inf,
    "LeakyRelu": lambda node: max(1.0, abs(node._saved_negative_slope)),
    "RreluWithNoise": lambda node: max(1.0, abs(node._saved_lower + node._saved_upper) / 2),
    "PreluKernel": lambda node: max(1.0, float(node._saved_weight.detach().abs().max())),
}
"""Lipschitz constants of the activations, rounded up, by the name of their backward node."""

_MEASURED = {"Add", "Sub", "Rsub", "Mul", "Div", "Pow", "Exp", "Log", "Log1P", "Sqrt", "Rsqrt",
             "Reciprocal", "Where", "MaskedFill", "Expm1", "Sign"}  # fmt: skip
_BATCH_NORMS = {"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"}
_VIEWS = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias", "Clone", "ToCopy"}
_MOVES = {"T", "Transpose", "Permute"}


def _last(count: int) -> Callable[[Any, int], set[int]]:
    return lambda node, dims: set(range(max(0, dims - count), dims))


def _saved_dims(node: Any, dims: int) -> set[int]:
    for name in ("_saved_dim", "_saved_dims"):
        if hasattr(node, name):
            saved = getattr(node, name)
            return {_signed(d) % dims for d in (saved if isinstance(saved, tuple) else (saved,))}
    return set(range(dims))


# what each of these touches: dimensions of its input; every output is a copy of one input or 0
_COPIES: dict[str, Callable[[Any, int], set[int]]] = {
    **{f"MaxPool{d}DWithIndices": _last(d) for d in (2, 3)},
    **{f"AdaptiveMaxPool{d}D": _last(d) for d in (2, 3)},
    **{f"{kind}Pad{d}D": _last(d) for kind in ("Reflection", "Replication") for d in (1, 2, 3)},
    **{f"UpsampleNearest{exact}{d}D": _last(d) for exact in ("", "Exact") for d in (1, 2, 3)},
    "ConstantPadNd": lambda node, dims: _last(len(node._saved_pad) // 2)(node, dims),
    "PixelShuffle": _last(3),
    "PixelUnshuffle": _last(3),
    "ChannelShuffle": lambda node, dims: {1},
    **dict.fromkeys(["Slice", "Select", "Flip", "IndexSelect"], _saved_dims),
    **dict.fromkeys(["Expand", "Repeat"], lambda node, dims: set()),
}
# ... and every output is a sum of inputs with coefficients of one sign
_SUMS: dict[str, Callable[[Any, int], set[int]]] = {
    **{f"AvgPool{d}D": _last(d) for d in (2, 3)},
    **{f"AdaptiveAvgPool{d}D": _last(d) for d in (2, 3)},
    "UpsampleLinear1D": _last(1),
    "UpsampleBilinear2D": _last(2),
    "UpsampleTrilinear3D": _last(3),
    **dict.fromkeys(["Mean", "Sum", "Amax", "Amin", "Max"], _saved_dims),
}
# slots of the input, the weight and the bias
_AFFINE = {
    "Addmm": (1, 2, 0),
    "Mm": (0, 1, None),
    "Bmm": (0, 1, None),
    "Convolution": (0, 1, 2),
    "Linear": (0, 1, 2),
}
_ELSEWHERE = "its outputs are parameters of another function"
_CALLED = {
    "Softmax": "softmax between layers",
    "LogSoftmax": "log-softmax between layers",
}


class _Edge(NamedTuple):
    node: Any
    nr: int

    @property
    def name(self) -> str:
        name: str = self.node.name()
        return name.rpartition("::")[2]

    @property
    def kind(self) -> str:
        return re.sub(r"Backward\d*$", "", self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.node._input_metadata[self.nr].shape)

    @property
    def saved(self) -> Any:
        """The node, to read what it saved."""
        return self.node

    def parent(self, slot: int) -> _Edge | None:
        node, nr = self.node.next_functions[slot]
        return None if node is None else _Edge(node, nr)

    def parents(self) -> list[_Edge]:
        return [_Edge(node, nr) for node, nr in self.node.next_functions if node is not None]


@dataclass(frozen=True)
class _Path:
    """What is known of ∂h_L/∂(a tensor); ``outer`` elements come before the batch in its layout."""

    spectral: Tensor
    constant: Tensor
    frobenius_ratio: float = math.inf
    """min_j ‖A_j‖_F / s_j over the weights' operators."""
    unsafe: float = 1.0
    dims: int | float = math.inf
    outer: int = 1
    above: str = "the outputs"
    bias: Tensor | None = None
    """A bias added after the product with its weight, which comes next."""
    edges: int = 1
    """Uses of the next node that are accounted for."""


class _Stop(Exception):
    """The chain ends here: the reason."""


class _Walk:
    """From the outputs down every path, until a fork or a function that is not known."""

    def __init__(
        self, twin: nn.Module, outputs: Tensor, size: int, norms: dict[tuple[Any, ...], Norms]
    ) -> None:
        self.twin, self.size, self.norms = twin, size, norms
        self.stored = {p.data_ptr() for p in twin.parameters()}
        self.parameters = {
            id(p): name for name, p in twin.named_parameters(remove_duplicate=True) if p.requires_grad
        }
        root = _Edge(outputs.grad_fn, outputs.output_nr)
        self.uses: Counter[Any] = Counter({root.node: 1})
        self.affine: dict[str, list[_Edge]] = {}
        stack, seen = [root.node], {root.node}
        while stack:
            edge = _Edge(stack.pop(), 0)
            for parent in edge.parents():
                self.uses[parent.node] += 1
                if parent.node not in seen:
                    seen.add(parent.node)
                    stack.append(parent.node)
        self.times: Counter[int] = Counter()
        for node in seen:
            edge = _Edge(node, 0)
            parameter = self.parameter(edge)
            if parameter is not None:  # itself, or a transpose of it
                self.times[id(parameter)] = max(self.times[id(parameter)], self.uses[node])
            if edge.kind in _AFFINE:
                weight = self.parameter(edge.parent(_AFFINE[edge.kind][1]))
                if weight is not None:
                    self.affine.setdefault(self.owner(weight), []).append(edge)
        self.found: dict[str, tuple[LayerBound, set[int]]] = {}
        self.reasons: dict[int, str] = {}
        self.flooded: set[Any] = set()
        one = torch.ones(size, dtype=torch.float64)
        self.walk(root, _Path(one, one))

    # -- the walk ----------------------------------------------------------------------------

    def walk(self, root: _Edge, path: _Path) -> None:
        """Give every layer on the way its bounds; everything beyond a stop the stop's reason."""
        stack = [(root, path)]
        while stack:
            edge, path = stack.pop()
            if hasattr(edge.node, "variable"):
                continue
            try:
                if self.uses[edge.node] > path.edges:
                    raise _Stop(
                        f"the output of {self.below(edge)} is used {self.uses[edge.node]} times"
                    )
                numel = math.prod(edge.shape)
                if numel % (path.outer * self.size):
                    raise _Stop(self.mixes(edge, path))
                if not edge.node._input_metadata[edge.nr].dtype.is_floating_point:
                    raise _Stop(self.unknown(edge, path))
                path = replace(path, dims=min(path.dims, numel // self.size), edges=1)
                onward = self.step(edge, path)
            except _Stop as stop:
                self.flood([edge], str(stop))
                continue
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # checkpointed, or changed in place since
                self.flood([edge], f"what {edge.name} saved cannot be read")
                continue
            stack += onward
            walked = {following.node for following, _ in onward}
            self.flood([p for p in edge.parents() if p.node not in walked], _ELSEWHERE)

    def flood(self, edges: list[_Edge], reason: str) -> None:
        """Note why everything from here to the input has no bounds."""
        stack = [edge.node for edge in edges]
        while stack:
            node = stack.pop()
            if node is None or node in self.flooded:
                continue
            self.flooded.add(node)
            if hasattr(node, "variable"):
                self.reasons.setdefault(id(node.variable), reason)
            stack += [following for following, _ in node.next_functions]

    def step(self, edge: _Edge, path: _Path) -> list[tuple[_Edge, _Path]]:
        """One node: the edges behind it with what is known of the outputs' derivative there."""
        kind, parent = edge.kind, edge.parent(0) if edge.node.next_functions else None
        if kind in _AFFINE:
            return self.affine_step(edge, path)
        if kind in _VIEWS:
            return [] if parent is None else [(parent, path)]
        path_after = replace(path, bias=None)
        if kind in _MOVES:
            assert parent is not None
            return [(parent, replace(path_after, outer=self.moved(edge, path)))]
        if kind in LIPSCHITZ:
            if parent is None:
                return []
            return [(parent, self.scaled(path_after, LIPSCHITZ[kind](edge.saved), edge))]
        if kind in _COPIES or kind in _SUMS:
            return [] if parent is None else [(parent, self.linear(edge, parent, path_after))]
        if kind in ("NativeLayerNorm", "NativeGroupNorm"):
            return [] if parent is None else [(parent, self.normalised(edge, path_after))]
        if kind in _MEASURED or (kind in _BATCH_NORMS and not edge.saved._saved_training):
            return self.elementwise(edge, path)
        if kind == "Cat":
            return self.branches(edge, path_after)
        if kind in _CALLED:
            raise _Stop(_CALLED[kind])
        if "Attention" in kind:
            raise _Stop("attention")
        raise _Stop(self.unknown(edge, path))

    # -- layers ------------------------------------------------------------------------------

    def affine_step(self, edge: _Edge, path: _Path) -> list[tuple[_Edge, _Path]]:
        """A layer z = X̃ Wᵀ: its own bounds, and its operator for what comes before it."""
        data, weight_slot, bias_slot = _AFFINE[edge.kind]
        node, parent = edge.node, edge.parent(data)
        weight = self.parameter(edge.parent(weight_slot))
        bias = None if bias_slot is None else self.parameter(edge.parent(bias_slot))
        if edge.kind == "Bmm" and (parent is None or edge.parent(weight_slot) is not None):
            raise _Stop(f"two activations are multiplied {self.between(edge, path)}")
        plain = edge.kind != "Addmm" or node._saved_alpha == node._saved_beta == 1
        turned = parent is not None and self.parameter(parent) is not None
        turned = turned or (parent is None and weight is None and bias is None)
        if not plain or turned or (edge.kind == "Convolution" and node._saved_transposed):
            raise _Stop(self.unknown(edge, path))
        width = edge.shape[1 if edge.kind == "Convolution" else -1]
        if bias is None and weight is not None and path.bias is not None:
            bias = path.bias if self.owner(path.bias) == self.owner(weight) else None
        if bias is not None and bias.shape != (width,):
            bias = None
        rows = edge.shape[:1] if edge.kind == "Convolution" else edge.shape[:-1]
        if math.prod(rows) % (path.outer * self.size):
            raise _Stop(self.mixes(edge, path))
        named = weight if weight is not None else bias
        if named is not None:
            self.layer(edge, replace(path, bias=None), weight, bias)
        if parent is None:
            return []
        norms = self.operator_norms(edge)
        if norms is None:
            raise _Stop(self.unknown(edge, path))
        ratio = norms.frobenius / norms.spectral if norms.spectral else 1.0
        onward = replace(
            path,
            spectral=path.spectral * norms.spectral,
            frobenius_ratio=min(path.frobenius_ratio, ratio),
            unsafe=path.unsafe * norms.frobenius,
            above=path.above if named is None else repr(self.owner(named)),
            bias=None,
        )
        return [(parent, onward)]

    def layer(self, edge: _Edge, path: _Path, weight: Tensor | None, bias: Tensor | None) -> None:
        """Bounds of one layer from the path to its output."""
        inputs, blocks = self.input_norms(edge, path, weight is not None, bias is not None)
        trained = [p for p in (weight, bias) if p is not None]
        rank = min(path.dims, sum(p.numel() for p in trained))
        spectral = path.spectral * inputs.spectral * ROUNDING
        frobenius = torch.minimum(
            spectral * min(math.sqrt(rank), path.frobenius_ratio),
            path.spectral * inputs.frobenius * (math.sqrt(blocks) * ROUNDING),
        )
        bound = LayerBound(
            frobenius=frobenius,
            spectral=spectral,
            unsafe_frobenius=path.unsafe * inputs.frobenius,
            input_norm=inputs.spectral,
            activation_constant=path.constant,
        )
        self.found[self.owner(trained[0])] = bound, {id(p) for p in trained}

    def input_norms(
        self, edge: _Edge, path: _Path, weight: bool, bias: bool
    ) -> tuple[InputNorms, int]:
        """Norms of X̃, and how often each of its blocks occurs in ∂z/∂W."""
        node, shape = edge.node, edge.shape
        layout = (path.outer, self.size, -1)
        if edge.kind == "Convolution":
            out, groups = shape[1], node._saved_groups
            if not weight:
                positions = math.prod(shape) // (out * self.size)
                return bias_norms(self.size, positions, groups), out // groups
            x = node._saved_input.detach().unflatten(0, layout).transpose(0, 1).flatten(1, 2)
            norms = convolution_input_norms(x, self.window(node, x), groups=groups, bias=bias)
            return norms, out // groups
        if not weight:
            return bias_norms(self.size, math.prod(shape[:-1]) // self.size), shape[-1]
        name = {"Addmm": "_saved_mat1", "Mm": "_saved_self"}.get(edge.kind, "_saved_input")
        x = getattr(node, name).detach().flatten(0, -2)
        x = x.unflatten(0, layout).transpose(0, 1).flatten(1, 2)
        return linear_input_norms(x, weight=weight, bias=bias), shape[-1]

    def weight(self, edge: _Edge) -> Tensor | None:
        """A layer's weight (transposed or not); None where autograd kept none."""
        node, slot = edge.node, edge.parent(_AFFINE[edge.kind][1])
        if edge.kind == "Convolution":
            return (
                slot.node.variable if slot and hasattr(slot.node, "variable") else node._saved_weight
            )
        while slot is not None and slot.kind in _MOVES:
            slot = slot.parent(0)
        if slot is not None and hasattr(slot.node, "variable"):
            matrix: Tensor | None = slot.node.variable
            return matrix
        saved: Tensor | None = node._saved_weight if edge.kind == "Linear" else node._saved_mat2
        if edge.kind == "Bmm" and saved is not None:  # one frozen matrix, expanded over the batch
            return saved[0] if saved.stride(0) == 0 or saved.shape[0] == 1 else None
        return saved

    def window(self, node: Any, images: Tensor | _Edge) -> Window:
        """Where a convolution's kernel lies on images [..., n₁, n₂, ...]."""
        kernel = node._saved_weight.shape[2:]
        size = images.shape[len(images.shape) - len(kernel) :]
        return Window.of(size, kernel, node._saved_stride, node._saved_padding, node._saved_dilation)

    def operator_norms(self, edge: _Edge, *, sought: bool = True) -> Norms | None:
        """Norms of a layer's operator on one input; not ``sought``: s_max only if known or cheap."""
        node, weight, parent = edge.node, self.weight(edge), edge.parent(0)
        if weight is None or not weight.is_floating_point():
            return None
        convolution = edge.kind == "Convolution"
        positions = max(1, math.prod(edge.shape[: 1 if convolution else -1]) // self.size)
        key: tuple[Any, ...] = (weight.data_ptr(), weight.shape, positions)
        if convolution:
            if node._saved_transposed or (parent is None and node._saved_input is None):
                return None
            window = self.window(node, node._saved_input if parent is None else parent)
            key = (*key, window, node._saved_groups)
        elif weight.dim() != 2:
            return None
        kept = weight.data_ptr() in self.stored  # the twin's parameters stay what they are
        if kept and (key in self.norms):
            return self.norms[key]
        if convolution:
            options = {"groups": node._saved_groups, "positions": positions, "sought": sought}
            norms = convolution_norms(weight.detach(), window, **options)
        else:
            norms = linear_norms(weight.detach(), positions, sought=sought)
        if kept and sought:
            self.norms[key] = norms
        return norms

    # -- between layers ----------------------------------------------------------------------

    def scaled(self, path: _Path, factor: Tensor | float, edge: _Edge, *, outer: int = 0) -> _Path:
        """The path behind an operator of norm ``factor``."""
        factor = torch.as_tensor(factor, dtype=torch.float64)
        if not bool(torch.isfinite(factor).all()):
            raise _Stop(f"the derivative is not bounded {self.between(edge, path)}")
        return replace(
            path,
            spectral=path.spectral * factor,
            constant=path.constant * factor,
            outer=outer or path.outer,
        )

    def linear(self, edge: _Edge, parent: _Edge, path: _Path) -> _Path:
        """Copies: s_max² is the largest number of copies. Sums: s_max² ≤ ‖A‖₁ ‖A‖_∞."""
        touched = (_COPIES if edge.kind in _COPIES else _SUMS)[edge.kind](
            edge.saved, len(parent.shape)
        )
        shape = list(edge.shape)
        if len(shape) > len(parent.shape):
            raise _Stop(self.unknown(edge, path))
        if len(shape) < len(parent.shape):  # the touched dimensions are gone
            for dim in sorted(touched):
                shape.insert(dim, 1)
        outer = self.outer_behind(edge, tuple(shape), parent.shape, touched, path)
        if _apart(edge):
            return self.scaled(path, 1.0, edge, outer=outer)
        ones = self.ones(edge)
        if edge.kind in _COPIES:
            columns = self.pulled(edge, parent, ones)
            squared = self.per_sample(columns, outer)
        else:
            ones.requires_grad_()
            columns = self.pulled(edge, parent, ones, create_graph=True)
            (rows,) = torch.autograd.grad(columns, ones, torch.ones_like(columns))
            columns = columns.detach().abs()
            squared = self.per_sample(columns, outer) * self.per_sample(rows.abs(), path.outer)
        return self.scaled(path, squared.sqrt() * _margin(ones.dtype), edge, outer=outer)

    def normalised(self, edge: _Edge, path: _Path) -> _Path:
        """LayerNorm, GroupNorm: the derivative γ/σ (I − 11ᵀ/n − x̂x̂ᵀ/n) has norm ≤ max|γ|/σ."""
        node, shape = edge.saved, edge.shape
        group = edge.kind == "NativeGroupNorm"
        touched = set(range(1, len(shape)))
        if not group:
            touched = _last(len(node._saved_normalized_shape))(node, len(shape))
        self.outer_behind(edge, shape, shape, touched, path)
        scale = self.per_sample(node._saved_result2.detach(), path.outer)
        if node._saved_weight is not None:
            scale = scale * float(node._saved_weight.detach().abs().max())
        return self.scaled(path, scale * _margin(node._saved_result2.dtype), edge)

    def elementwise(self, edge: _Edge, path: _Path) -> list[tuple[_Edge, _Path]]:
        """A function of one tensor in elementwise steps: its slope at this input; or a sum.

        Going back step by step, ``slope`` sums the derivatives over the paths and ``size`` their
        absolute values, which is what rounding errors are relative to.
        """
        counts: Counter[Any] = Counter()
        frontier: dict[Any, _Edge] = {}
        biases: list[Tensor] = []
        ones = self.ones(edge)
        slope, size = {edge.node: ones}, {edge.node: ones}
        latest = edge
        while True:
            for parent, partial in zip(self.slots(latest), self.partials(latest), strict=True):
                leaf = self.parameter(parent)
                if leaf is not None:
                    biases.append(leaf)
                if parent is None or leaf is not None:
                    continue
                counts[parent.node] += 1
                known = frontier.setdefault(parent.node, parent)
                if parent.shape != edge.shape or known.nr != parent.nr:
                    return self.several(edge, path)
                for sums, term in (
                    (slope, partial * slope[latest.node]),
                    (size, partial.abs() * size[latest.node]),
                ):
                    sums[parent.node] = sums.get(parent.node, 0) + term
            if len(frontier) <= 1:
                break
            latest = max(frontier.values(), key=lambda e: e.node._sequence_nr())
            inner = latest.kind in _MEASURED or latest.kind in LIPSCHITZ
            if not inner or self.uses[latest.node] != counts[latest.node]:
                return self.several(edge, path)
            del frontier[latest.node]
        bias = None
        if edge.kind == "Add" and len(biases) == 1 and edge.saved._saved_alpha == 1:
            bias = biases[0] if biases[0].shape == edge.shape[-1:] else None
            module = self.twin.get_submodule(self.owner(biases[0]))
            frozen = isinstance(module, nn.Linear) and not module.weight.requires_grad
            if bias is not None and frozen:
                self.layer(edge, replace(path, bias=None), None, bias)
        if not frontier:
            return []
        (parent,) = frontier.values()
        steepest, largest = slope[parent.node].abs(), size[parent.node]
        if bool((largest != 1).any()):
            steepest = steepest + largest * (_margin(ones.dtype) - 1)
        factor = self.per_sample(steepest, path.outer)
        onward = replace(path, bias=bias, edges=counts[parent.node])
        return [(parent, self.scaled(onward, factor, edge))]

    def slots(self, edge: _Edge) -> list[_Edge | None]:
        return [edge.parent(slot) for slot in range(len(edge.node.next_functions))]

    def partials(self, edge: _Edge) -> tuple[Tensor, ...]:
        """An elementwise step's derivative in each of its arguments, by its own backward."""
        count = len(edge.node._input_metadata)
        seeds = [self.ones(edge) if nr == edge.nr else None for nr in range(count)]
        with torch.no_grad():
            found = edge.node(*seeds)
        return found if isinstance(found, tuple) else (found,)

    def several(self, edge: _Edge, path: _Path) -> list[tuple[_Edge, _Path]]:
        """An elementwise step that several functions meet at."""
        if edge.kind in ("Add", "Sub"):
            return self.branches(edge, replace(path, bias=None))
        if edge.kind in ("Mul", "Div"):
            raise _Stop(f"two activations are multiplied {self.between(edge, path)}")
        raise _Stop(self.unknown(edge, path))

    def branches(self, edge: _Edge, path: _Path) -> list[tuple[_Edge, _Path]]:
        """A sum or concatenation: each branch by itself (what they share is met as a fork)."""
        onward = []
        for slot in range(len(edge.node.next_functions)):
            parent = edge.parent(slot)
            if parent is None or self.parameter(parent) is not None:
                continue
            if len(parent.shape) != len(edge.shape):
                raise _Stop(self.unknown(edge, path))
            concatenated = edge.kind == "Cat"
            touched = _saved_dims(edge.saved, len(edge.shape)) if concatenated else set()
            outer = self.outer_behind(edge, edge.shape, parent.shape, touched, path)
            factor = 1.0
            if not concatenated:  # s_max of a broadcast is the root of the number of copies
                factor = math.sqrt(math.prod(edge.shape) // math.prod(parent.shape)) * ROUNDING
                factor *= abs(edge.saved._saved_alpha) if slot == 1 else 1.0
            onward.append((parent, self.scaled(path, factor, edge, outer=outer)))
        return onward

    def ones(self, edge: _Edge) -> Tensor:
        metadata = edge.node._input_metadata[edge.nr]
        return torch.ones(tuple(metadata.shape), dtype=metadata.dtype, device=metadata.device)

    def pulled(
        self, edge: _Edge, parent: _Edge, seed: Tensor, *, create_graph: bool = False
    ) -> Tensor:
        """Aᵀ seed for the operator A between two edges, all samples at once."""
        (gradient,) = torch.autograd.grad(
            [GradientEdge(edge.node, edge.nr)],
            [GradientEdge(parent.node, parent.nr)],
            [seed],
            retain_graph=True,
            create_graph=create_graph,
        )
        return gradient

    # -- where the batch is ------------------------------------------------------------------

    def per_sample(self, x: Tensor, outer: int) -> Tensor:
        """The largest element of each sample [B]."""
        return x.reshape(outer, self.size, -1).amax((0, 2)).cpu().double()

    def outer_behind(
        self,
        edge: _Edge,
        shape: tuple[int, ...],
        shape_behind: tuple[int, ...],
        touched: set[int],
        path: _Path,
    ) -> int:
        """Elements before the batch behind an operator that acts on the dimensions ``touched``."""
        if self.size == 1:
            return 1
        dim, inside = self.batch_dim(edge, shape, path)
        if dim in touched or shape[dim] != shape_behind[dim]:
            raise _Stop(self.mixes(edge, path))
        return math.prod(shape_behind[:dim]) * inside

    def moved(self, edge: _Edge, path: _Path) -> int:
        """Elements before the batch behind a transpose or permutation."""
        if self.size == 1:
            return 1
        shape, node = edge.shape, edge.node
        order = list(range(len(shape)))  # dimension of the output -> dimension of the input
        if edge.kind == "Permute":
            order = [_signed(d) % len(shape) for d in node._saved_dims]
        elif len(shape) > 1:
            a, b = (
                (0, 1) if edge.kind == "T" else (_signed(node._saved_dim0), _signed(node._saved_dim1))
            )
            order[a], order[b] = order[b], order[a]
        dim, inside = self.batch_dim(edge, shape, path)
        before = [shape[order.index(d)] for d in range(order[dim])]
        return math.prod(before) * inside

    def batch_dim(self, edge: _Edge, shape: tuple[int, ...], path: _Path) -> tuple[int, int]:
        """The dimension that holds the batch, and the elements before the batch inside of it."""
        before = 1
        for dim, n in enumerate(shape):
            if path.outer < before * n:
                inside = path.outer // before
                if path.outer % before or n % (inside * self.size):
                    break
                return dim, inside
            before *= n
        raise _Stop(self.mixes(edge, path))

    # -- names and reasons -------------------------------------------------------------------

    def parameter(self, edge: _Edge | None) -> Tensor | None:
        """The trained parameter behind an edge with nothing but transposes and casts between."""
        while edge is not None:
            if hasattr(edge.node, "variable"):
                variable: Tensor = edge.node.variable
                return variable if id(variable) in self.parameters else None
            if edge.kind not in _MOVES | {"ToCopy", "View"}:
                return None
            edge = edge.parent(0)
        return None

    def owner(self, parameter: Tensor) -> str:
        return self.parameters[id(parameter)].rpartition(".")[0]

    def below(self, edge: _Edge) -> str:
        """The nearest module behind an edge, for messages."""
        queue, seen = deque([edge.node]), {edge.node}
        while queue:
            node = queue.popleft()
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self.parameters:
                return repr(self.owner(variable) or self.parameters[id(variable)])
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    queue.append(following)
        return "the inputs"

    def between(self, edge: _Edge, path: _Path) -> str:
        return f"between {self.below(edge)} and {path.above} ({edge.name})"

    def unknown(self, edge: _Edge, path: _Path) -> str:
        return f"the function between {self.below(edge)} and {path.above} is not known ({edge.name})"

    def mixes(self, edge: _Edge, path: _Path) -> str:
        return f"samples of the batch cannot be told apart {self.between(edge, path)}"

    def result(self) -> dict[str, LayerBound]:
        """Bounds or reasons of every module with trained parameters that were reached."""
        owned: dict[str, list[Tensor]] = {}
        for name, parameter in self.twin.named_parameters():
            if self.times[id(parameter)]:
                owned.setdefault(name.rpartition(".")[0], []).append(parameter)
        return {path: self.conclude(path, parameters) for path, parameters in owned.items()}

    def conclude(self, path: str, parameters: list[Tensor]) -> LayerBound:
        """A module's bounds, or the reason why there are none."""
        bound, covers = self.found.get(path, (LayerBound(), set()))
        uses = self.affine.get(path, [])
        kind = type(self.twin.get_submodule(path)).__name__
        again = [p for p in parameters if self.times[id(p)] > 1]
        told = next((self.reasons[id(p)] for p in parameters if id(p) in self.reasons), _ELSEWHERE)
        reason = None
        if not uses and not covers:
            if kind not in ("Linear", "Conv1d", "Conv2d", "Conv3d", "ParametrizationList"):
                reason = f"the bounds are for Linear and Conv1d to Conv3d layers; this is {kind}"
            else:
                reason = "its weight is computed" if told == _ELSEWHERE else told
        elif again:
            local = self.parameters[id(again[0])].rpartition(".")[2]
            reason = f"its {local} is used {self.times[id(again[0])]} times (tied or called again)"
        elif not covers:
            reason = told
        elif covers != {id(p) for p in parameters}:
            reason = f"this {kind} has parameters besides one weight and its bias"
        try:
            norms = self.operator_norms(uses[0], sought=False) if len(uses) == 1 else None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # what its node saved cannot be read
            norms = None
        bound = bound if reason is None else LayerBound(reason=reason)
        if norms is not None:
            bound = replace(bound, weight_frobenius_norm=norms.frobenius)
        if norms is not None and norms.spectral < math.inf:
            bound = replace(bound, weight_spectral_norm=norms.spectral)
        return bound


def _apart(edge: _Edge) -> bool:
    """Whether it is a max pooling whose windows have no input in common."""
    node = edge.saved
    if not re.fullmatch(r"MaxPool[23]DWithIndices", edge.kind):
        return False
    stride = node._saved_stride or node._saved_kernel_size
    options = zip(node._saved_kernel_size, stride, node._saved_dilation, strict=True)
    return all(d * (k - 1) < s for k, s, d in options)


def _signed(dim: int) -> int:
    """Dimensions are saved as unsigned numbers."""
    return dim - 2**64 if dim >= 2**63 else dim


def _margin(dtype: torch.dtype) -> float:
    """What a few operations in ``dtype`` may take from a measured slope."""
    return 1 + 16 * torch.finfo(dtype).eps
