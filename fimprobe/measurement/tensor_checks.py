"""Checks for models and tensors that cannot be read: scripted, meta, sparse, nested, packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from fimprobe.engines.tracing.plan import Plan
from fimprobe.errors import FimprobeError
from fimprobe.model.batch import Batch


def check_readable(model: nn.Module) -> None:
    """Check that the model consists of Python modules whose parameters have values.

    Raises:
        FimprobeError: With the first module or parameter that cannot be measured.
    """
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            place = f"the scripted module {path!r}" if path else "a scripted module"
            raise FimprobeError(
                f"`model` must consist of Python modules, got {place}: TorchScript cannot be copied "
                "or differentiated for single samples. Pass the model before torch.jit.script or "
                "torch.jit.trace."
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise FimprobeError(
                f"`model` must have initialized parameters, got the lazy parameter {name!r}. Run the "
                "model once before the measurement."
            )
        if parameter.is_meta:
            raise FimprobeError(
                f"`model` must have parameters with values, got {name!r} on the meta device. Load "
                "the weights first: model.to_empty(device=...) and load_state_dict."
            )
        if parameter.is_complex() and parameter.requires_grad:
            raise FimprobeError(
                f"`model` must have real trainable parameters, got {name!r}, which is complex. Keep "
                "it as a real parameter [..., 2] and pass torch.view_as_complex of it on in the "
                "forward, or freeze it."
            )


def check_inputs(inputs: Any) -> None:
    """Check that the inputs hold dense tensors with values, which can be cut into samples.

    Args:
        inputs: Those of ``measure``, or a batch.

    Raises:
        FimprobeError: For the first input that is packed, nested, sparse or on the meta device.
    """
    if isinstance(inputs, Batch):
        inputs = (inputs.args, inputs.kwargs)
    elif isinstance(inputs, Mapping):
        inputs = dict(inputs)
    for x in tree_leaves(inputs, is_leaf=lambda x: isinstance(x, PackedSequence)):
        if isinstance(x, PackedSequence):
            raise FimprobeError(
                "`inputs` must be tensors with the batch first, got a PackedSequence. Pass padded "
                "sequences and their lengths as a tensor, and pack them in the model's forward."
            )
        if isinstance(x, Tensor):
            check_dense(x, "inputs")


def check_dense(tensor: Tensor, argument: str) -> None:
    """Check that a tensor is dense and has values.

    Args:
        tensor: The value of the argument, or a part of it.
        argument: The argument's name in messages.

    Raises:
        FimprobeError: If it is nested, sparse, quantized or on the meta device.
    """
    layout = str(tensor.layout).removeprefix("torch.")
    if tensor.is_nested:
        kind, remedy = "a nested tensor", "torch.nested.to_padded_tensor(x, 0.0) and a mask"
    elif tensor.layout != torch.strided:
        kind, remedy = f"a tensor of layout {layout}", f"{argument}.to_dense()"
    elif tensor.is_quantized:
        kind, remedy = "a quantized tensor", f"{argument}.dequantize()"
    elif tensor.is_meta:
        kind, remedy = "a tensor on the meta device", "tensors that hold values"
    else:
        return
    raise FimprobeError(f"`{argument}` must be dense with values, got {kind}. Pass {remedy}.")


def check_plan_and_ranks(plan: Any, ranks: Any) -> None:
    """Check the types of two arguments of ``measure`` that link measurements.

    Args:
        plan: How the parameters are reached, or None.
        ranks: The processes that measure together, or None.

    Raises:
        FimprobeError: If ``plan`` is no plan, or ``ranks`` no group of processes.
    """
    if plan is not None and not isinstance(plan, Plan):
        raise FimprobeError(
            f"`plan` must be a Plan or None, got {type(plan).__name__}. Pass the plan of an earlier "
            "measurement of this model."
        )
    if ranks is not None and not hasattr(ranks, "run_everywhere"):
        raise FimprobeError(
            f"`ranks` must be a group of processes or None, got {type(ranks).__name__}. Pass what "
            "join_processes() returns."
        )


def check_step_and_diagonals(step: Any, diagonals: Any) -> None:
    """Check the types of two arguments of ``measure`` that are no options of ``attach``.

    Args:
        step: The number that the report carries.
        diagonals: Whether diagonals are kept.

    Raises:
        FimprobeError: If ``step`` is no integer, or ``diagonals`` no boolean.
    """
    if isinstance(step, bool) or not isinstance(step, int):
        raise FimprobeError(f"`step` must be an integer, got {step!r}. Use 0.")
    if not isinstance(diagonals, bool):
        raise FimprobeError(
            f"`diagonals` must be True or False, got {diagonals!r}. Use True to keep the diagonals."
        )
