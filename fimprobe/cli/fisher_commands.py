"""``fimprobe estimate`` and ``fimprobe audit``: a model and its data named by module and function."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from torch import nn

from fimprobe.errors import FimprobeError, describe_error


def add_fisher_parsers(commands: Any) -> None:
    """Add the two commands to the parser.

    Args:
        commands: The sub-parsers.
    """
    estimate = commands.add_parser("estimate", help="the diagonal of F over a data set, to a file")
    _add_common(estimate, rel_error=0.1)
    estimate.add_argument("-o", "--output", required=True, help="the safetensors file to write")
    estimate.add_argument("--state", help="file from which an interrupted estimate continues")
    audit = commands.add_parser("audit", help="what a diagonal from elsewhere is, and how far off")
    audit.add_argument("theirs", help=".pt or .safetensors file with the diagonal")
    _add_common(audit, rel_error=0.02)
    audit.add_argument("--top", type=float, default=0.1, help="share of largest entries (0.1)")


def _add_common(parser: argparse.ArgumentParser, *, rel_error: float) -> None:
    where = "module:name of a function without arguments (or of the object itself) in the folder"
    parser.add_argument("--model", required=True, help=f"{where}: the model, with its weights")
    parser.add_argument("--data", required=True, help=f"{where}: batches, such as a DataLoader")
    parser.add_argument("--likelihood", default="auto", help="family of labels (default auto)")
    parser.add_argument(
        "--rel-error", type=float, default=rel_error, help=f"error of F to reach ({rel_error})"
    )
    parser.add_argument("--max-inputs", type=int, help="largest number of inputs")
    parser.add_argument("--seed", type=int, default=0, help="of labels and order (default 0)")


def run_estimate(options: Any) -> int:
    """Estimate F, print the table and write the file; partial results are written too.

    Args:
        options: The parsed arguments.

    Raises:
        FimprobeError: With the argument, its value and the remedy.
    """
    import fimprobe

    _check_output(options.output)
    model, data = _load_model(options.model), _load(options.data, "--data")
    try:
        fisher = fimprobe.estimate(
            model, data, max_inputs=options.max_inputs, state=options.state, **_common(options)
        )
    except FimprobeError as error:
        partial = getattr(error, "partial", None)
        if partial is None:
            raise
        partial.save(options.output)
        raise FimprobeError(
            f"{error} What was measured before it ({partial.metadata['inputs']:,} inputs) is in "
            f"{options.output}."
        ) from None
    fisher.save(options.output)
    print(f"{fisher}\n\n{options.output}: written")
    return 0


def run_audit(options: Any) -> int:
    """Audit a file, and print the result.

    Args:
        options: The parsed arguments.

    Raises:
        FimprobeError: With the argument, its value and the remedy.
    """
    import fimprobe

    model, data = _load_model(options.model), _load(options.data, "--data")
    result = fimprobe.audit(
        model,
        data,
        Path(options.theirs),
        top=options.top,
        max_inputs=options.max_inputs,
        **_common(options),
    )
    print(result)
    return 0


def _common(options: Any) -> dict[str, Any]:
    return {
        "likelihood": options.likelihood,
        "rel_error": options.rel_error,
        "seed": options.seed,
    }


def _check_output(path: str) -> None:
    """Check before the work that the result can be written."""
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise FimprobeError(
            f"`--output` must be in an existing folder, got {path!r}. Create {str(folder)!r} first."
        )


def _load_model(reference: str) -> nn.Module:
    model = _load(reference, "--model")
    if not isinstance(model, nn.Module):
        raise FimprobeError(
            f"`--model` must name a torch.nn.Module or a function that returns one, but {reference} "
            f"gives {type(model).__name__}. Return the model with its weights loaded."
        )
    return model


def _load(reference: str, argument: str) -> Any:
    """The object behind "module:name"; functions are called.

    Args:
        reference: The text of the argument.
        argument: Its name, for the messages.

    Raises:
        FimprobeError: If it cannot be imported, or the function fails.
    """
    module_name, separator, name = reference.partition(":")
    if not (module_name and separator and name):
        raise FimprobeError(
            f"`{argument}` must be module:name, got {reference!r}. Use train:make_model for "
            "make_model() of train.py."
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise FimprobeError(
            f"`{argument}` must name a module that can be imported, but {module_name!r} cannot "
            f"({_first_line(error)}). Run the command in its folder."
        ) from None
    try:
        value = getattr(module, name)
    except AttributeError:
        raise FimprobeError(
            f"`{argument}` must name a member of {module_name!r}, got {name!r}. Define it there."
        ) from None
    if isinstance(value, nn.Module) or not callable(value):
        return value
    try:
        return value()
    except Exception as error:
        raise FimprobeError(
            f"`{argument}` must name a function without arguments that succeeds, but {reference} "
            f"raises {_first_line(error)}. Call it in Python to see where."
        ) from None


def _first_line(error: Exception) -> str:
    return (describe_error(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
