"""What a failed measurement means: wrong outputs, or a model that needs its whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fimprobe.engines.problem.problem import Problem
from fimprobe.errors import FimprobeError
from fimprobe.model.storage_guard import ReachesUserError, WritesSharedError


def explain_failure(problem: Problem) -> FimprobeError | None:
    """Return what is wrong with model or outputs after an engine raised an error of torch's.

    It costs at most two forwards, and nothing where no error occurred.

    Args:
        problem: The measurement that failed.

    Returns:
        The error to raise instead; None if the model works on the whole batch and on one sample.
    """
    try:
        outputs = problem.forward(problem.batch)
    except FimprobeError as error:
        return error
    except (MemoryError, torch.OutOfMemoryError):
        return None
    except Exception as error:  # inputs of another kind than those that the twin was checked with
        return FimprobeError(
            f"the model raises {type(error).__name__}: {_first_line(error)} (in eval mode, on the "
            "inputs of the measurement). Pass inputs with the width, type and device that the model "
            "takes."
        )
    if not outputs.requires_grad:
        return FimprobeError(
            "the outputs must depend on parameters of `model`, got outputs without a graph. The "
            "forward or `output` detaches them, or runs under torch.no_grad(): remove that."
        )
    if problem.batch.size == 1:
        return None
    try:
        problem.evaluate(problem.batch[:1])
    except FimprobeError as error:
        return error
    except torch.OutOfMemoryError:
        return None
    except Exception as error:
        return FimprobeError(
            f"`model` must run on one sample alone, got {type(error).__name__} for the first of "
            f"{problem.batch.size}: {_first_line(error)}. A sample is an entry of the first "
            "dimension of every tensor in `inputs`. Pass padded tensors, a row for each sample, in "
            "place of nodes of joined graphs, packed sequences or lists, and join them in the "
            "forward. Export models with a dynamic batch."
        )
    return None


def name_errors_of_output(output: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """Return ``output`` with its own errors named as such, and not as the model's.

    Args:
        output: From what the model returns to the outputs [B, ...].
    """

    def select(returned: Any) -> Tensor:
        try:
            return output(returned)
        except (FimprobeError, torch.OutOfMemoryError, ReachesUserError, WritesSharedError):
            raise
        except Exception as error:
            raise FimprobeError(
                f"`output` must be a function from what the model returns to the outputs [B, ...], "
                f"got {type(error).__name__} for {type(returned).__name__}: {_first_line(error)}. "
                "Check what the model returns in eval mode."
            ) from error

    return select


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
