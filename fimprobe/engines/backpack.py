"""The BackPACK engine: a second way to the same moments, and exact second-order diagonals.

Works on BackPACK's hooks and rules, inside a verified domain (:func:`offending_modules`): outside
of it BackPACK is silently wrong. Shares no contraction with the autograd engine, whose oracle it
is. Only this file and ``backpack_modules`` import BackPACK; import them where they are needed.

Source: Dangel, Kunstner, Hennig 2020, *BackPACK: Packing more into backprop* (ICLR).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fimprobe.batch import Batch
from fimprobe.engines.backpack_modules import (
    LAYERS,
    Seeded,
    derivatives_of,
    ggn_extension,
    hessian_extension,
    module_reason,
)
from fimprobe.engines.contract import GRAM_LIMIT
from fimprobe.engines.problem import Problem
from fimprobe.types import BatchError, FimprobeError, Moments, MomentsBatch

from backpack import backpack, disable, extend  # isort: skip
from backpack.context import CTX  # isort: skip
from backpack.extensions.firstorder.base import (  # isort: skip
    FirstOrderBackpropExtension,
    FirstOrderModuleExtension,
)


PASS_LIMIT = 4096
"""Most backward passes that ``draws="exact"`` takes."""


def measure_moments(problem: Problem, *, verified: bool = False) -> MomentsBatch:
    """Moments of every trainable parameter (theory §2), all draws of a chunk in one backward.

    The chunk's samples are repeated S times along the batch. ``verified=True`` skips
    :func:`offending_modules`, for problems that it has passed. Σ g of every parameter is compared
    with its gradient by plain autograd.

    Raises:
        FimprobeError: outside of the domain, or where the comparison fails.
    """
    if not verified:
        _check_domain(problem, second_order=False)
    size = problem.batch.size
    layers = _own_trainable(problem.twin)
    draws, chunk = _passes_and_chunk(problem)
    names = {id(p): name for name, p in problem.parameters.items()}
    sums: dict[str, _Sums] = {}
    exact: list[_Weights] = []
    for start in range(0, size, chunk):
        rows = slice(start, min(start + chunk, size))
        samples = rows.stop - rows.start
        copies = problem.batch[torch.arange(rows.start, rows.stop).repeat(draws)]
        job = _Job(samples, draws, problem.diagonals, problem.memory_mb * 2**17)
        with _extended([m for _, m in layers], _Collect(job)), torch.enable_grad():
            h = problem.forward(copies)
            seeds, job.weights = _seeds(problem, rows, h.detach())
            _check_copies(h.detach(), samples)
            parameters = list(problem.parameters.values())
            gradients: Sequence[Tensor | None] = [None] * len(parameters)
            if h.requires_grad:
                gradients = torch.autograd.grad(h, parameters, seeds, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            name = names[id(parameter)]
            _check_total(name, job.found.get(id(parameter)), gradient, samples * draws)
            sums.setdefault(name, _Sums()).add(job.found[id(parameter)], start)
        if job.weights is not None:
            exact.append(job.weights)
    return MomentsBatch(
        parameters={n: sums[n].finish(p, size) for n, p in problem.parameters.items() if n in sums},
        batch_size=size,
        draws=problem.draws.count,
        second=torch.cat([w.second for w in exact], 1).t().contiguous().cpu() if exact else None,
        fourth=torch.cat([w.fourth for w in exact], 1).t().contiguous().cpu() if exact else None,
        blocks=exact[0].blocks.cpu() if exact else None,
        coverage=_coverage(problem, set(sums)),
    )


def hessian_diagonals(
    problem: Problem, batch: Batch, seed: Tensor, *, verified: bool = False
) -> dict[str, Tensor]:
    """Per-sample diagonals [B, *shape] of R = Σ_a seed_a ∂²h_a/∂θ∂θᵀ, exact.

    ``seed`` [B, ...] has the shape of the outputs and is held fixed; with the score residual for a
    seed this is the R of Î₂ = F − R (theory §2). Zero for modules that enter linearly.
    ``BatchDiagHessian`` with a loss that is not curved itself: everything comes from the residuals
    of the layers. Memory grows with the widths of all curved layers.

    Raises:
        FimprobeError: outside of the domain, or a seed of another shape.
    """
    if not verified:
        _check_domain(problem, second_order=True)

    def start(rows: slice, h: Tensor) -> Seeded:
        if seed.shape != (batch.size, *h.shape[1:]):
            raise FimprobeError(
                f"seed has shape {tuple(seed.shape)}, but the outputs have shape "
                f"{(batch.size, *h.shape[1:])}; pass one number for each output"
            )
        return Seeded(seed[rows].to(h))

    return _diagonals(problem, batch, hessian_extension, start)


def ggn_diagonals(
    problem: Problem, batch: Batch, *, mask: Tensor | None = None, verified: bool = False
) -> dict[str, Tensor]:
    """Per-sample diagonals [B, *shape] of F(x) = Jᵀ I(h) J, exact, for any likelihood.

    ``BatchDiagGGNExact`` with a loss whose factor is a square root of I(h). ``mask`` [B, ...]
    (bool, shaped like the labels) leaves positions out.

    Raises:
        FimprobeError: outside of the domain, or a likelihood without ``output_fisher``.
    """
    if not verified:
        _check_domain(problem, second_order=True, curvature=False)

    def start(rows: slice, h: Tensor) -> Seeded:
        where = None if mask is None else mask[rows]
        return Seeded(torch.ones_like(h), _fisher_factors(problem.likelihood, h.detach(), where))

    return _diagonals(problem, batch, ggn_extension, start)


def offending_modules(problem: Problem, *, second_order: bool) -> dict[str, str]:
    """Path -> reason for every module outside of the domain that the tests verify; empty inside.

    First order: each trainable parameter belongs to one module of ``LAYERS`` (exactly that class,
    with options that BackPACK knows), which is called once, on one tensor, with the samples first,
    and uses it once; whatever happens between modules is free. The gradients of two samples are
    compared with those of the samples run alone. Second order: all modules of ``LAYERS`` or
    ``PLAIN`` and in a chain, each one's input being the output of the one before; of the Hessian's
    diagonal, one sample's largest entries are compared with double backward, and it must fit
    ``memory_mb``. The path "" stands for the model as a whole.
    """
    return _offending(problem, second_order=second_order, curvature=second_order)


def _offending(problem: Problem, *, second_order: bool, curvature: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    kinds = {p.dtype for p in problem.twin.parameters()}
    if second_order and not kinds <= {torch.float32, torch.float64}:
        found[""] = f"parameters of type {sorted(map(str, kinds))}"
    trainable = _own_trainable(problem.twin)
    concerned = dict(trainable)
    if second_order:
        concerned |= {p: m for p, m in problem.twin.named_modules() if not list(m.children())}
    owners: dict[int, list[str]] = {}
    for path, module in trainable:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                owners.setdefault(id(parameter), []).append(path)
    for path, module in problem.twin.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            found[path] = f"{type(module).__name__} with the batch's statistics"
    for path, module in trainable:
        reason = module_reason(module, second_order=second_order)
        shared = [
            paths
            for p in module._parameters.values()
            if len(paths := owners.get(id(p), [])) > 1  # tied between modules or within one
        ]
        if shared and reason is None:
            reason = f"shares a parameter: {sorted(set(shared[0]))}"
        if reason is not None:
            found.setdefault(path, reason)
    with torch.enable_grad():
        for size in (2, 3):  # sizes that a module's first dimension must follow
            rows = torch.arange(size) % problem.batch.size
            for path, reason in _watch(problem, rows, concerned, second_order).items():
                found.setdefault(path, reason)
        if not found:
            found = _compare_curvature(problem) if curvature else _compare(problem)
    return found


@dataclass
class _Call:
    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Any
    node: Any
    version: int


def _watch(
    problem: Problem, rows: Tensor, modules: dict[str, nn.Module], chain: bool
) -> dict[str, str]:
    """What one forward pass on the samples ``rows`` shows to be outside of the domain."""
    calls: list[tuple[str, _Call]] = []

    def note(path: str, module: Any, inputs: Any, keywords: Any, output: Any) -> None:
        tensor = isinstance(output, Tensor)
        node, version = (output.grad_fn, output._version) if tensor else (None, 0)
        calls.append((path, _Call(inputs, keywords, output, node, version)))

    handles = [
        m.register_forward_hook(partial(note, p), with_kwargs=True) for p, m in modules.items()
    ]
    try:
        h = problem.forward(problem.batch[rows])
    except BatchError:
        raise
    except Exception as error:  # the model's own code raises anything
        return {"": f"its forward fails on {len(rows)} samples: {error}"}
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, str] = {}
    uses, nodes = _uses(h)
    for path, module in modules.items():
        mine = [call for p, call in calls if p == path]
        parameters = [p for p in module._parameters.values() if p is not None and p.requires_grad]
        count = max((uses.get(id(p), 0) for p in parameters), default=0)
        if not count and not (chain and mine):
            continue  # the outputs do not depend on it
        reason = None
        if len(mine) != 1:
            reason = f"called {len(mine)} times in a forward pass, not once"
        elif count > 1 or (count and mine[0].node not in nodes):
            reason = "a parameter is used outside of its forward"
        else:
            reason = module_reason(module, second_order=chain)
            reason = reason or _call_reason(module, mine[0], len(rows))
        if reason is not None:
            found[path] = reason
    if chain:
        found = _chain_reasons(problem, rows, calls, h) | found
    return found


def _call_reason(module: nn.Module, call: _Call, size: int) -> str | None:
    if call.keywords or len(call.inputs) != 1 or not isinstance(call.inputs[0], Tensor):
        return "called on something else than one tensor"
    if not isinstance(call.output, Tensor):
        return "gives something else than one tensor"
    x, y = call.inputs[0], call.output
    if not x.dim() or not y.dim() or x.shape[0] != size or y.shape[0] != size:
        return f"{tuple(x.shape)} -> {tuple(y.shape)} does not have the {size} samples first"
    if y._version != call.version:
        return "its output is modified in place"
    spatial = next((n for n in (1, 2, 3) if type(module).__name__.endswith(f"{n}d")), None)
    if spatial is not None and x.dim() != spatial + 2 and type(module) is not nn.BatchNorm1d:
        return f"called on {x.dim()} dimensions"
    if type(module).__name__.startswith("AdaptiveAvgPool") and any(
        a % b for a, b in zip(x.shape[2:], y.shape[2:], strict=True)
    ):
        return f"pools {tuple(x.shape[2:])} to {tuple(y.shape[2:])}, no divisor"
    return None


def _chain_reasons(
    problem: Problem, rows: Tensor, calls: list[tuple[str, _Call]], h: Tensor
) -> dict[str, str]:
    """Second order: every module takes the very tensor that the one before gave."""
    batch = problem.batch[rows]
    inputs = [*batch.args, *batch.kwargs.values()]
    found = {}
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        found[""] = "the inputs are not one tensor"
    before = None
    for path, call in calls:
        x = call.inputs[0] if call.inputs else None
        if before is not None:
            same = x is before
        elif isinstance(x, Tensor) and not found:
            # the model got another slice, with the same numbers in it
            same = x.grad_fn is None and x.shape == inputs[0].shape and torch.equal(x, inputs[0])
        else:
            same = bool(found)
        if not same:
            found[path] = (
                "its input is not the output of the module before it (a functional operation, a "
                "residual connection or a branch lies between)"
            )
        before = call.output
    if h is not before:
        found.setdefault("", "the outputs are not the last module's output")
    return found


def _uses(h: Tensor) -> tuple[dict[int, int], set[Any]]:
    """How many edges of h's graph end in each leaf tensor, and all nodes."""
    counts: dict[int, int] = {}
    nodes: set[Any] = set()
    stack = [h.grad_fn] if h.grad_fn is not None else []
    nodes.update(stack)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            variable = getattr(node, "variable", None)
            if variable is not None:
                counts[id(variable)] = counts.get(id(variable), 0) + 1
            if node not in nodes:
                nodes.add(node)
                stack.append(node)
    return counts, nodes


def _compare(problem: Problem) -> dict[str, str]:
    """Two samples together, by the engine's layers, against each one alone, by plain autograd."""
    rows = torch.arange(2) % problem.batch.size
    layers = _own_trainable(problem.twin)
    parameters = list(problem.parameters.values())
    job = _Job(2, 1, True, problem.memory_mb * 2**17)
    generator = torch.Generator().manual_seed(20240526)
    try:
        with _extended([m for _, m in layers], _Collect(job)):
            h = problem.forward(problem.batch[rows])
            if not h.requires_grad:
                return {}
            seed = torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h)
            torch.autograd.grad(h, parameters, seed, allow_unused=True)
    except BatchError:
        raise
    except Exception as error:  # of autograd's hooks: views modified in place and the like
        return {"": f"BackPACK's hooks fail: {error}"}
    tolerance = _tolerance(h.dtype)
    alone: dict[int, Tensor] = {}
    norms: dict[int, Tensor] = {}
    for b in range(2):
        one = problem.forward(problem.batch[rows[b : b + 1]])
        slack = tolerance * float(h.detach().abs().max())
        if not torch.allclose(one[0].detach(), h[b].detach(), rtol=tolerance, atol=slack):
            return {"": "a sample's outputs depend on the other samples of the batch"}
        gradients = torch.autograd.grad(one, parameters, seed[b : b + 1], allow_unused=True)
        for parameter, g in zip(parameters, gradients, strict=True):
            if g is not None:
                key, square = id(parameter), g.double().square()
                alone[key] = alone.get(key, torch.zeros_like(square)) + square
                norms.setdefault(key, square.new_zeros(2))[b] = square.sum()
    largest = max((float(x.sum()) for x in alone.values()), default=0.0)
    found = {}
    for path, module in layers:
        for p in module._parameters.values():
            if p is None or id(p) not in alone:
                continue
            have, want, norm = job.found.get(id(p)), alone[id(p)], norms[id(p)]
            slack = tolerance * (float(want.sum()) + tolerance * largest)
            if (
                have is None
                or not float((have.a2 - want).abs().sum()) <= slack
                or not float((have.gram[:, 0] - norm).abs().sum()) <= slack
            ):
                found[path] = "guard: its gradients differ from those of single samples"
    return found


def _compare_curvature(problem: Problem) -> dict[str, str]:
    """The largest entry of each parameter's Hessian diagonal against double backward, one sample."""
    one = problem.batch[:1]
    generator = torch.Generator().manual_seed(20240526)
    h = problem.forward(one)
    seed = torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h)
    try:
        diagonals = hessian_diagonals(problem, one, seed, verified=True)
    except FimprobeError as error:
        return {"": str(error)}
    except Exception as error:  # of BackPACK's own checks
        return {"": f"BackPACK fails: {type(error).__name__}: {error}"}
    parameters = problem.parameters
    gradients: Sequence[Tensor | None] = [None] * len(parameters)
    if h.requires_grad:
        gradients = torch.autograd.grad(
            h, list(parameters.values()), seed, create_graph=True, allow_unused=True
        )
    pairs = []
    for name, gradient in zip(parameters, gradients, strict=True):
        entry = int(diagonals[name].abs().argmax())
        want = 0.0
        if gradient is not None and gradient.requires_grad:
            (second,) = torch.autograd.grad(
                gradient.flatten()[entry], parameters[name], retain_graph=True, allow_unused=True
            )
            want = 0.0 if second is None else float(second.flatten()[entry])
        pairs.append((name, float(diagonals[name].flatten()[entry]), want))
    largest = max((abs(want) for _, _, want in pairs), default=0.0)
    return {
        name.rpartition(".")[0]: "guard: its Hessian differs from that of double backward"
        for name, have, want in pairs
        if not abs(have - want) <= _tolerance(h.dtype) * (abs(want) + 1e-2 * largest)
    }


def _check_domain(problem: Problem, *, second_order: bool, curvature: bool = True) -> None:
    found = _offending(problem, second_order=second_order, curvature=second_order and curvature)
    if found:
        listed = "; ".join(f"{path or 'the model'}: {reason}" for path, reason in found.items())
        remedy = "second_order={'probes': 2}" if second_order else "engine='autograd'"
        raise FimprobeError(f"engine='backpack' is not verified for {listed}. Pass {remedy} instead")


def _own_trainable(twin: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that hold trainable parameters themselves."""
    return [
        (path, module)
        for path, module in twin.named_modules()
        if any(p is not None and p.requires_grad for p in module._parameters.values())
    ]


@contextmanager
def _extended(modules: list[nn.Module], extension: Any) -> Iterator[None]:
    """BackPACK active on ``modules`` only; afterwards they, and its globals, are as before."""
    parameters = [p for m in modules for p in m._parameters.values() if p is not None]
    before = [(x, dict(x.__dict__)) for x in (*modules, *parameters)]
    mark, stored = len(CTX.hook_handles), disable.store_io
    default = torch.get_default_dtype()
    try:
        for module in modules:
            module.__dict__.pop("_backpack_extend", None)  # a copy of a user's extended model
            extend(module)
        disable.store_io = True
        with warnings.catch_warnings(), backpack(extension):
            # of the first layer, whose inputs need no gradient; BackPACK does not ask for it
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            yield
    finally:
        disable.store_io = stored
        torch.set_default_dtype(default)
        for handle in CTX.hook_handles[mark:]:
            handle.remove()
        del CTX.hook_handles[mark:]
        for thing, attributes in before:
            for name in set(thing.__dict__) - set(attributes):
                del thing.__dict__[name]
            for name, value in attributes.items():
                if name not in thing.__dict__ or thing.__dict__[name] is not value:
                    thing.__dict__[name] = value


# first order


@dataclass
class _Weights:
    """Factors of g² and g⁴ [S, n] of exact passes, and the block of each pass [S]."""

    second: Tensor
    fourth: Tensor
    blocks: Tensor


@dataclass
class _Piece:
    """One chunk's sums for one parameter, in float64; per-entry fourth powers where asked for."""

    a2: Tensor
    a4_sum: Tensor
    q_sum: Tensor
    r_sum: Tensor
    gram: Tensor
    total: Tensor
    a4: Tensor | None = None
    q: Tensor | None = None
    r: Tensor | None = None

    def plus(self, other: _Piece, *, samples: bool) -> _Piece:
        """The sums over both; of the same chunk's samples or, with the Gram matrices too, others."""
        both: dict[str, Any] = {}
        for name, mine in self.__dict__.items():
            theirs = getattr(other, name)
            if name == "gram" and samples:
                both[name] = torch.cat([mine, theirs])
            else:
                both[name] = None if mine is None else mine + theirs
        return _Piece(**both)


@dataclass
class _Job:
    """What the extension needs to know about a chunk, and what it found: id(parameter) -> sums."""

    samples: int
    draws: int
    diagonals: bool
    limit: float
    weights: _Weights | None = None
    found: dict[int, _Piece] = field(default_factory=dict)


class _Collect(FirstOrderBackpropExtension):  # type: ignore[misc]
    """A2, A4, Q, R and Gram matrices of all draws in one backward."""

    def __init__(self, job: _Job) -> None:
        rules = {kind: _LayerMoments(*entry) for kind, entry in LAYERS.items()}
        super().__init__("fimprobe_moments", rules, fail_mode="ERROR")
        self.job = job
        self.done: set[int] = set()

    def __call__(self, module: Any, g_inp: Any, g_out: Any) -> None:
        """Take one module, once: BackPACK has the inputs and outputs of its last call only."""
        copies = self.job.samples * self.job.draws
        first = {t.shape[0] for t in (g_out[0], getattr(module, "input0", g_out[0]))}
        if id(module) in self.done or first != {copies}:
            raise FimprobeError(
                f"{type(module).__name__} was called more than once, or on something else than the "
                f"{copies} samples, unlike in the first look at the model; pass engine='autograd'"
            )
        self.done.add(id(module))
        super().__call__(module, g_inp, g_out)


class _LayerMoments(FirstOrderModuleExtension):  # type: ignore[misc]
    """A layer's moments, from BackPACK's per-sample products with its parameters' Jacobians."""

    def __init__(self, derivatives: Any, params: tuple[str, ...]) -> None:
        self.derivatives = derivatives
        for name in params:
            setattr(self, name, partial(self._moments, name))
        super().__init__(params=list(params))

    def _moments(self, name, ext, module, g_inp, g_out, backproped):  # type: ignore[no-untyped-def]
        job: _Job = ext.job
        parameter, delta, x = getattr(module, name), g_out[0].detach(), module.input0.detach()
        if type(module) is nn.Linear and name == "weight" and x.dim() == 2:
            piece = _outer_moments(job, delta, x)
        else:
            each = job.draws * parameter.numel() * 8 * 8
            step = max(1, int(job.limit / each))
            parts = []
            for start in range(0, job.samples, step):
                rows = torch.arange(start, min(start + step, job.samples), device=delta.device)
                every = (torch.arange(job.draws, device=delta.device)[:, None] * job.samples) + rows
                index = every.flatten()
                g = self.derivatives.param_mjp(
                    name, module, g_inp, g_out, delta[index], sum_batch=False, subsampling=index
                )
                g = g.reshape(job.draws, len(rows), *parameter.shape)
                parts.append(_dense_moments(job, g, rows))
            piece = parts[0]
            for part in parts[1:]:
                piece = piece.plus(part, samples=True)
        job.found[id(parameter)] = piece


def _weigh(job: _Job, square: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_s w₂g², Σ_s w₄g⁴ and Σ_blocks(Σ_{s in block} w₂g²)² [n, P] of squares g² [S, n, P]."""
    if job.weights is None:
        f = square.sum(0)
        return f, square.square().sum(0), f.square()
    second, fourth = job.weights.second[:, rows], job.weights.fourth[:, rows]
    member = nn.functional.one_hot(job.weights.blocks).to(square)
    by_block = torch.einsum("sk,sn,snp->knp", member, second.to(square), square)
    quartic = torch.einsum("sn,snp->np", fourth.to(square), square.square())
    return by_block.sum(0), quartic, by_block.square().sum(0)


def _inner(job: _Job, g: Tensor) -> Tensor:
    """Gram matrices [n, S, S] of g [S, n, P], or squared norms [n, S]."""
    if 1 < job.draws <= GRAM_LIMIT:
        return torch.einsum("snp,tnp->nst", g, g)
    return g.square().sum(-1).t()


def _dense_moments(job: _Job, g: Tensor, rows: Tensor) -> _Piece:
    """From per-sample gradients [S, n, *shape]."""
    shape = g.shape[2:]
    g = g.double().reshape(*g.shape[:2], -1)
    f, quartic, blocks = _weigh(job, g.square(), rows)
    piece = _Piece(
        a2=f.sum(0).view(shape),
        a4_sum=quartic.sum(),
        q_sum=f.square().sum(),
        r_sum=blocks.sum(),
        gram=_inner(job, g),
        total=g.sum((0, 1)).view(shape),
    )
    if job.diagonals:
        piece.a4 = quartic.sum(0).view(shape)
        piece.q = f.square().sum(0).view(shape)
        piece.r = blocks.sum(0).view(shape)
    return piece


def _outer_moments(job: _Job, delta: Tensor, x: Tensor) -> _Piece:
    """Linear on 2-D input: g_oi = δ_o x_i, so every moment is one in δ times a power of x."""
    delta = delta.double().reshape(job.draws, job.samples, -1)
    x = x[: job.samples].double()  # the draws' copies of x are equal
    rows = torch.arange(job.samples, device=x.device)
    f, quartic, blocks = _weigh(job, delta.square(), rows)
    x2 = x.square()
    x4 = x2.square()
    each = x4.sum(1)
    gram = _inner(job, delta)
    length = x2.sum(1).view(-1, *[1] * (gram.dim() - 1))
    piece = _Piece(
        a2=f.t() @ x2,
        a4_sum=quartic.sum(1) @ each,
        q_sum=f.square().sum(1) @ each,
        r_sum=blocks.sum(1) @ each,
        gram=gram * length,
        total=delta.sum(0).t() @ x,
    )
    if job.diagonals:
        piece.a4, piece.q, piece.r = quartic.t() @ x4, f.square().t() @ x4, blocks.t() @ x4
    return piece


@dataclass
class _Sums:
    """A parameter's sums over the chunks; zero for chunks whose outputs do not depend on it."""

    piece: _Piece | None = None

    def add(self, piece: _Piece, start: int) -> None:
        """Take the chunk that begins with sample ``start``."""
        if self.piece is not None:
            self._pad(start)
            self.piece = self.piece.plus(piece, samples=True)
        else:
            self.piece = piece
            gram = piece.gram
            piece.gram = torch.cat([gram.new_zeros(start, *gram.shape[1:]), gram])

    def _pad(self, size: int) -> None:
        assert self.piece is not None
        gram = self.piece.gram
        missing = gram.new_zeros(size - len(gram), *gram.shape[1:])
        self.piece.gram = torch.cat([gram, missing])

    def finish(self, parameter: Tensor, size: int) -> Moments:
        """The moments; a2 in the parameter's precision."""
        self._pad(size)
        s = self.piece
        assert s is not None
        norms = s.gram.diagonal(dim1=1, dim2=2) if s.gram.dim() == 3 else s.gram
        return Moments(
            a2=s.a2.to(torch.promote_types(parameter.dtype, torch.float32)),
            a2_sum=float(s.a2.sum()),
            a2_square=float(s.a2.square().sum()),
            a4_sum=float(s.a4_sum),
            q_sum=float(s.q_sum),
            r_sum=float(s.r_sum),
            squared_norms=norms,
            gram=s.gram if s.gram.dim() == 3 else None,
            a4=s.a4,
            q=s.q,
            r=s.r,
        )


def _seeds(problem: Problem, rows: slice, h: Tensor) -> tuple[Tensor, _Weights | None]:
    """δ at the outputs [S·n, ...] of all draws, of outputs that are S copies of n rows."""
    samples = rows.stop - rows.start
    h = h[:samples]
    mask = None if problem.mask is None else problem.mask[rows]
    shape = problem.likelihood.label_shape(h)
    if mask is not None and mask.shape != shape:
        raise FimprobeError(
            f"mask has shape {tuple(mask.shape)}, but the labels have shape {tuple(shape)}; pass a "
            "boolean tensor with one entry for each label"
        )
    if problem.draws.count is None:
        passes = list(problem.likelihood.exact_passes(h, mask))
        weights = _Weights(
            second=torch.stack([p.second for p in passes]),
            fourth=torch.stack([p.fourth for p in passes]),
            blocks=torch.tensor([p.block for p in passes], device=h.device),
        )
        return torch.cat([p.seed for p in passes]).to(h), weights
    uniforms = problem.draws.uniforms_for(rows, problem.batch.size, shape).to(h.device)
    scores = []
    for u in uniforms.unbind(1):
        score = problem.likelihood.score(h, problem.likelihood.quantile(h, u))
        if mask is not None:
            keep = mask
            if keep.dim() < score.dim():  # one label for several outputs: along the classes
                keep = keep.unsqueeze(getattr(problem.likelihood, "class_dim", -1))
            score = torch.where(keep, score, torch.zeros_like(score))
        scores.append(score)
    return torch.cat(scores).to(h), None


def _passes_and_chunk(problem: Problem) -> tuple[int, int]:
    """Backward passes per sample, and how many samples fit under the memory ceiling at once."""
    seen: set[int] = {p.untyped_storage().data_ptr() for p in problem.twin.parameters()}
    total = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal total
        with suppress(RuntimeError, NotImplementedError):  # tensors without storage
            if x.untyped_storage().data_ptr() not in seen:
                seen.add(x.untyped_storage().data_ptr())
                total += x.untyped_storage().nbytes()
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        h = problem.forward(problem.batch[:1])
    draws = problem.draws.count
    if draws is None:
        draws = problem.likelihood.count_passes(h)
        if draws > PASS_LIMIT:
            raise FimprobeError(
                f"draws='exact' would take {draws} backward passes for each sample, more than the "
                f"limit of {PASS_LIMIT}; pass draws=2 instead"
            )
    each = 3 * draws * max(total, 1)  # saved tensors, their gradients, BackPACK's references
    chunk = int(problem.memory_mb * 2**20 / each)
    if chunk < 1:
        raise FimprobeError(
            f"{draws} draws of one sample take about {each / 2**20:.2g} MB in engine='backpack', "
            f"more than memory_mb={problem.memory_mb:.4g}; pass engine='autograd', fewer draws or a "
            "larger memory_mb"
        )
    return draws, min(chunk, problem.batch.size)


def _check_copies(h: Tensor, samples: int) -> None:
    first, tolerance = h[:samples], _tolerance(h.dtype)
    copies = h.reshape(-1, *first.shape)
    slack = tolerance * float(first.abs().max())
    if not bool(((copies - first).abs() <= tolerance * first.abs() + slack).all()):
        raise FimprobeError(
            "copies of a sample have different outputs: the model draws random numbers in eval mode "
            "or couples its samples; pass engine='autograd', which names the cause"
        )


def _check_total(name: str, piece: _Piece | None, gradient: Tensor, count: int) -> None:
    """Guard: Σ_b Σ_s g_bs by the layer's rule is the gradient by plain autograd."""
    if piece is None:
        raise FimprobeError(
            f"guard: BackPACK did not see {name!r}, although the outputs depend on it; pass "
            "engine='autograd'"
        )
    norms = piece.gram.diagonal(dim1=1, dim2=2) if piece.gram.dim() == 3 else piece.gram
    scale = math.sqrt(count * float(norms.sum()))  # ≥ Σ‖g‖
    difference = float((piece.total - gradient.double()).norm())
    if not difference <= _tolerance(gradient.dtype) * max(scale, float(gradient.double().norm())):
        raise FimprobeError(
            f"guard: the per-sample gradients of {name!r} do not add up to its gradient (off by "
            f"{difference:.2g} of {scale:.2g}); pass engine='autograd'"
        )


def _tolerance(dtype: torch.dtype) -> float:
    if dtype in (torch.bfloat16, torch.float16):
        return 0.1
    return 1e-3 if dtype == torch.float32 else 1e-8


def _coverage(problem: Problem, measured: set[str]) -> dict[str, str]:
    told = {}
    for name, parameter in problem.twin.named_parameters():
        owner = problem.twin.get_submodule(name.rpartition(".")[0])
        if not parameter.requires_grad:
            told[name] = "left out: frozen"
        elif name not in measured:
            told[name] = "left out: the outputs do not depend on it"
        else:
            told[name] = f"backpack: {type(owner).__name__}"
    return told


# second order


def _diagonals(problem: Problem, batch: Batch, make: Any, start: Any) -> dict[str, Tensor]:
    """Run a second-order extension from the loss module ``start(rows, h)``, chunk by chunk."""
    modules = [m for m in problem.twin.modules() if not list(m.children())]
    names = {id(p): n for n, p in problem.parameters.items()}
    parameters = list(problem.parameters.values())
    found: dict[str, list[Tensor]] = {}
    chunk = _second_order_chunk(problem, batch, modules, curved=make is hessian_extension)
    for first in range(0, batch.size, chunk):
        rows = slice(first, min(first + chunk, batch.size))
        extension = make()
        loss = Seeded(torch.zeros(()))
        with _extended([*modules, loss], extension), torch.enable_grad():
            h = problem.forward(batch[rows])
            # BackPACK's pooling builds its kernels in the default dtype
            torch.set_default_dtype(h.dtype)
            begun = start(rows, h)
            loss.seed, loss.factors = begun.seed, begun.factors
            if h.requires_grad:
                torch.autograd.grad(loss(h), parameters, allow_unused=True)
            for p in parameters:
                value = getattr(p, extension.savefield, None)
                if value is not None:
                    found.setdefault(names[id(p)], []).append(value.detach())
    return {
        n: torch.cat(found[n]) if n in found else p.new_zeros(batch.size, *p.shape)
        for n, p in problem.parameters.items()
    }


def _second_order_chunk(
    problem: Problem, batch: Batch, modules: list[nn.Module], *, curved: bool
) -> int:
    """Samples whose factors [V, n, width] fit the ceiling.

    V is the number of outputs, or for the Hessian twice the widths of the curved modules.
    """
    widths: list[tuple[nn.Module, int]] = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        widths.append((module, max(inputs[0].numel(), output.numel())))

    handles = [m.register_forward_hook(note) for m in modules]
    try:
        with torch.no_grad():
            h = problem.forward(batch[:1])
    finally:
        for handle in handles:
            handle.remove()
    factors = h.numel()
    if curved:
        factors = 2 * sum(w for m, w in widths if not derivatives_of(m).hessian_is_zero(m))
    each = 3 * factors * max((w for _, w in widths), default=1) * h.element_size()
    ceiling = problem.memory_mb * 2**20
    if each > ceiling:
        raise FimprobeError(
            f"exact second derivatives take about {each / 2**20:.2g} MB for one sample, more than "
            f"memory_mb={problem.memory_mb:.4g}; pass second_order={{'probes': 2}}, or a larger "
            "memory_mb"
        )
    return max(1, min(batch.size, int(ceiling / max(1, each))))


def _fisher_factors(likelihood: Any, h: Tensor, mask: Tensor | None) -> Tensor:
    """Rows s_v [V, B, ...] with Σ_v s_v s_vᵀ = I(h), labels of several positions independent."""
    if not hasattr(likelihood, "output_fisher") or h.dim() < 2:
        raise FimprobeError(
            f"likelihood={likelihood.name!r} on outputs of shape {tuple(h.shape)} has no "
            "output_fisher(h) [B, ..., C, C]; pass a likelihood that has, and outputs [B, ..., C]"
        )
    axis = getattr(likelihood, "class_dim", -1)
    fisher = likelihood.output_fisher(h).double()
    last = h.movedim(axis, -1)
    samples, classes = h.shape[0], last.shape[-1]
    fisher = fisher.reshape(samples, -1, classes, classes)
    if mask is not None:
        keep = mask if mask.dim() < h.dim() else mask.movedim(axis, -1)
        if keep.dim() < h.dim():
            fisher = fisher * keep.reshape(samples, -1, 1, 1)
        else:  # one label per component
            keep = keep.reshape(samples, -1, classes)
            fisher = fisher * keep.unsqueeze(-1) * keep.unsqueeze(-2)
    values, vectors = torch.linalg.eigh(fisher)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)  # [B, K, C, C]
    positions = root.shape[1]
    rows = root.new_zeros(positions, classes, samples, positions, classes)
    place = torch.arange(positions, device=h.device)
    rows[place, :, :, place] = root.permute(1, 3, 0, 2)
    rows = rows.reshape(positions * classes, *last.shape).to(h.dtype)
    return rows.movedim(-1, axis if axis < 0 else axis + 1)
