"""Forward passes of the twin in which every row has one shifted entry.

Symbols: n rows of a pass, each an input of the batch with one check; h the outputs [n, ...].
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fimprobe.engines.layers.activations import closed_form_forward
from fimprobe.engines.layers.decompositions import UNROLLED, NotUnrolled
from fimprobe.engines.layers.rules import rules_for
from fimprobe.engines.problem.problem import Problem
from fimprobe.engines.spot_checks.decomposed_layers import ShiftedAffine
from fimprobe.engines.spot_checks.held_kinks import CannotHold, HeldKinks
from fimprobe.engines.spot_checks.prefix import Prefix
from fimprobe.engines.spot_checks.shifted_calls import EntryGroup, Steps, add_shift, is_direct
from fimprobe.engines.spot_checks.slots import Slot
from fimprobe.engines.tracing.plan import Plan
from fimprobe.engines.tracing.recording import expand_index
from fimprobe.model.batch import Batch
from fimprobe.model.leftovers import drop_leftovers, without_leftovers
from fimprobe.model.process_wide import ProcessWide
from fimprobe.model.sample_dimension import batch_first, from_batch_first
from fimprobe.model.twin import has_altered_call


class ShiftedForward:
    """Runs the twin with shifts; built once for all passes of a measurement.

    Attributes:
        problem: The measurement.
        plan: How each parameter is reached.
        users: For each parameter, the paths of the modules that a shift changes.
        kinks: Set in passes that hold kinks.
    """

    def __init__(self, problem: Problem, plan: Plan) -> None:
        self.problem, self.plan = problem, plan
        self.modules = dict(problem.twin.named_modules())
        self.users: dict[str, list[str]] = {name: [] for name in problem.parameters}
        self.kinks: HeldKinks | None = None
        names = {id(p): n for n, p in problem.parameters.items()}
        for path, module in self.modules.items():
            for parameter in module._parameters.values():
                name = names.get(id(parameter))
                if name is not None:
                    self.users[name].append(self._shifting_module(name, path))
        self._alone = False

    def _shifting_module(self, name: str, owner: str) -> str:
        """The path of the module whose call a shift of the parameter changes."""
        if name in self.plan.fallbacks:
            return self.plan.fallbacks[name]
        parent = owner.rpartition(".")[0]
        if isinstance(self.modules.get(parent), nn.MultiheadAttention):
            return parent  # its decomposition applies the output layer itself
        return owner

    @contextlib.contextmanager
    def exact_kernels(self) -> Iterator[None]:
        """No reduced precision and no fused transformer layers, which call no modules."""
        gradients = torch.enable_grad() if self.plan.takes_derivatives else torch.no_grad()
        with _EXACT_KERNELS.changed(), gradients:
            yield

    def run(
        self,
        rows: Tensor,
        slots: Sequence[Slot] = (),
        steps: Steps | None = None,
        prefix: Prefix | None = None,
        keep_graph: bool = False,
    ) -> Tensor:
        """Run the twin on some inputs, with the shifts of the checks.

        Args:
            rows: Places of the inputs in the batch [n].
            slots: The checks, one for each row; empty for an unshifted pass without steps.
            steps: Their steps.
            prefix: Outputs of modules that finish before the first shift; they are not run again.
            keep_graph: Whether the outputs keep their graph.

        Returns:
            h [n, ...].

        Raises:
            CannotHold: If the model runs other operations than in the unshifted pass.
        """
        batch = self.problem.batch[rows]
        by_module: dict[str, dict[str, EntryGroup]] = {}
        for name in dict.fromkeys(slot.parameter for slot in slots):
            group = None if steps is None else steps.groups.get(name)
            if group is None:
                places = [(r, slot) for r, slot in enumerate(slots) if slot.parameter == name]
                group = EntryGroup.of(places, self.problem.parameters[name].shape)
            if steps is not None:
                steps.groups[name] = group
            for path in dict.fromkeys(self.users[name]):
                by_module.setdefault(path, {})[name] = group
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._hooks(by_module, batch.size, steps))
            if prefix is not None and slots:
                first = min(prefix.first_call(self.users[slot.parameter]) for slot in slots)
                stack.enter_context(prefix.skipped(first, rows))
            if self.kinks is not None:
                stack.enter_context(self.kinks)
            h = self._outputs(batch) if keep_graph else self.plain_outputs(batch)
            if "" in by_module and steps is not None:
                h = h.clone()
                for name, group in by_module[""].items():
                    self._evaluate_whole_model(h, rows, name, group, steps)
        return h

    def plain_outputs(self, batch: Batch) -> Tensor:
        """The outputs [n, ...], not checked: the checks would be recorded as kinks."""
        return self._outputs(batch).detach()

    def _outputs(self, batch: Batch) -> Tensor:
        problem = self.problem
        drop_leftovers(problem.twin.modules())  # a tensor of the unshifted pass would hide the shift
        return problem.select_outputs(problem.twin(*batch.args, **batch.kwargs))

    @contextlib.contextmanager
    def _hooks(
        self, by_module: dict[str, dict[str, EntryGroup]], size: int, steps: Steps | None
    ) -> Iterator[None]:
        """Hooks on the modules with shifts; all decomposed layers are written out in any case."""
        handles: list[Any] = []
        replaced: list[nn.Module] = []
        planned = set(self.plan.fallbacks.values())
        try:
            for path, module in self.modules.items():
                groups = by_module.get(path, {})
                if type(module) in UNROLLED and path not in planned and not has_altered_call(module):
                    inside = {id(self.problem.parameters[n]): g for n, g in groups.items()}
                    self._decompose(module, size, inside, steps)
                    replaced.append(module)
                elif not groups and not module._parameters and path not in planned:
                    faster = closed_form_forward(module, twice=False)
                    if faster is not None:
                        module.forward = faster  # type: ignore[method-assign]
                        replaced.append(module)
                elif groups and path and steps is not None:
                    kind = self.plan.layouts.expand.get(path)
                    if kind is not None:
                        before = functools.partial(self._expand, kind, size)
                        handles.append(module.register_forward_pre_hook(before))
                    hook = functools.partial(self._shift_call, path, (size, groups, steps))
                    handles.append(module.register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in replaced:
                del module.__dict__["forward"]

    def _expand(self, kind: str, size: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return None if self._alone else expand_index(kind, size, module, args)

    def _decompose(
        self, module: nn.Module, size: int, groups: dict[int, EntryGroup], steps: Steps | None
    ) -> None:
        """Replace a layer's forward by its decomposition, whose affine maps add the shifts."""
        original, decomposition = module.forward, UNROLLED[type(module)]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._alone:
                return original(*args, **kwargs)
            try:
                affine = ShiftedAffine(module, size, groups, steps)
                return decomposition(module, affine, *args, **kwargs)
            except NotUnrolled:
                if groups:
                    raise CannotHold("a call of a decomposed layer has another form") from None
                return original(*args, **kwargs)

        module.forward = forward  # type: ignore[method-assign]

    def _shift_call(
        self,
        path: str,
        shifts: tuple[int, dict[str, EntryGroup], Steps],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
    ) -> Any:
        """Forward hook: return the output with the shifts of its rows."""
        if self._alone:
            return out
        size, groups, steps = shifts
        rules = {} if path in self.plan.fallbacks.values() else rules_for(module)
        names = {id(p): local for local, p in module._parameters.items()}
        inputs = args if args else tuple(kwargs.values())
        layout = self.plan.layouts.of.get(path)
        for name, group in groups.items():
            local = names.get(id(self.problem.parameters[name]))
            rule = rules.get(local) if local is not None else None
            direct = rule is not None and is_direct(rule, group.shape)
            direct = direct and not isinstance(module, nn.EmbeddingBag)
            if direct and rule and layout is not None and name not in self.plan.fallbacks:
                out = out.clone()
                x = batch_first(inputs[0], layout, size)
                padding = getattr(module, "padding_idx", None)
                at_rows = batch_first(out, layout, size)
                add_shift(at_rows, x, rule, group, steps, padding=padding)
            else:
                out = self._evaluate_rows(path, module, (args, kwargs), out, (name, group, steps))
        return out

    def _evaluate_rows(
        self,
        path: str,
        module: nn.Module,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        out: Any,
        shifts: tuple[str, EntryGroup, Steps],
    ) -> Any:
        """Evaluate a module again for each row with a check, with the entry itself shifted.

        Args:
            path: The module's path.
            module: The module.
            arguments: Positional and keyword arguments of its call.
            out: What it returned.
            shifts: The parameter's name, the entries and the steps.

        Returns:
            ``out`` with these rows replaced.
        """
        name, group, steps = shifts
        steps.evaluated.update(group.rows)
        size = len(steps.values)
        layout = self.plan.layouts.of.get(path)
        leaves, structure = tree_flatten(arguments)
        if path in self.plan.fallbacks.values() or not rules_for(module) or layout is None:
            located = self.plan.layouts.batched_arguments(path, leaves, size)
            if located is None:
                raise CannotHold(f"the samples cannot be located in the arguments of {path!r}")
            batched, layout = located
        else:
            batched = {i: layout for i, x in enumerate(leaves) if isinstance(x, Tensor)}
        outputs, out_structure = tree_flatten(out)
        outputs = [x.clone() if isinstance(x, Tensor) else x for x in outputs]

        def evaluate(row: int) -> list[Any]:
            alone = [
                _row_of(x, batched[i], size, row) if i in batched else x for i, x in enumerate(leaves)
            ]
            args, kwargs = tree_unflatten(alone, structure)
            with without_leftovers(module):
                return tree_leaves(module(*args, **kwargs))

        for row, entry in zip(group.rows, group.entries, strict=True):
            before = [_row_of(x, layout, size, row) if isinstance(x, Tensor) else x for x in outputs]
            after = self._shifted(evaluate, before, (name, row, entry), steps)
            for whole, x in zip(outputs, after, strict=True):
                if isinstance(whole, Tensor) and whole.is_floating_point():
                    batch_first(whole, layout, size)[row] = batch_first(x, layout, 1)[0]
        return tree_unflatten(outputs, out_structure)

    def _evaluate_whole_model(
        self, h: Tensor, rows: Tensor, name: str, group: EntryGroup, steps: Steps
    ) -> None:
        """Replace the outputs of rows whose entry is reached by the whole model only, in place."""

        def evaluate(row: int) -> list[Any]:
            return [self.plain_outputs(self.problem.batch[rows[row : row + 1]])]

        steps.evaluated.update(group.rows)
        for row, entry in zip(group.rows, group.entries, strict=True):
            (h[row],) = self._shifted(evaluate, [h[row : row + 1]], (name, row, entry), steps)[0]

    def _shifted(
        self, evaluate: Any, before: list[Any], place: tuple[str, int, int], steps: Steps
    ) -> list[Any]:
        """Evaluate a module on one row with a shifted entry.

        Args:
            evaluate: Maps the row to the leaves of the module's outputs.
            before: The unshifted leaves for this row.
            place: Name of the parameter, the row, and the entry's index.
            steps: The steps; that of the row is decided if it is not known yet.
        """
        name, row, entry = place
        data = self.problem.parameters[name].data
        index = torch.unravel_index(torch.tensor(entry), data.shape)
        original = data[index].clone()
        self._alone = True
        try:
            if steps.undecided(row):
                with steps.paused():
                    trial = max(1e-2 * float(data.double().square().mean().sqrt()), 1e-3)
                    data[index] = original + trial
                    moved = evaluate(row)
                    data[index] = original
                steps.decide(*_sizes(before, moved, trial, row))
            data[index] = original + steps.shift(torch.tensor([row]), data)[0].detach()
            return evaluate(row)
        finally:
            data[index] = original
            self._alone = False


def _row_of(x: Tensor, layout: Any, size: int, row: int) -> Tensor:
    """One row of a tensor that holds the batch, in the form in which a module sees one sample."""
    one = batch_first(x, layout, size)[row : row + 1]
    return from_batch_first(one, layout)


def _sizes(
    before: list[Any], after: list[Any], step: float, row: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The row, the root mean square of outputs, and that of their derivative."""
    pairs = [
        (x.detach().double().flatten(), y.detach().double().flatten())
        for x, y in zip(before, after, strict=True)
        if isinstance(x, Tensor) and x.is_floating_point()
    ]
    old = torch.cat([x for x, _ in pairs])
    new = torch.cat([y for _, y in pairs])
    size, derivative = old.square().mean().sqrt(), (new - old).square().mean().sqrt() / step
    return torch.tensor([row], device=old.device), size.view(1), derivative.view(1)


@contextlib.contextmanager
def _exact_kernels() -> Iterator[None]:
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution
        torch.backends.mha.set_fastpath_enabled(fused)


_EXACT_KERNELS = ProcessWide(_exact_kernels)
