"""The file of a Fisher: plain tensors under the parameters' names, and JSON metadata.

The format is safetensors, so that the file is readable without fimprobe.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fimprobe.errors import FimprobeError, describe_error

FORMAT = 1
"""Version of the file's layout."""

KEY = "fimprobe"
"""The key of the JSON text in the file's metadata."""


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, Any],
) -> None:
    """Write tensors and metadata; the file is replaced as a whole.

    Args:
        path: The file.
        tensors: By prefix, then by the parameter's name.
        metadata: Plain values.

    Raises:
        FimprobeError: If the file cannot be written.
    """
    package = _safetensors(path)
    flat = {
        f"{prefix}{name}": x.detach().cpu().contiguous().clone()
        for prefix, named in tensors.items()
        for name, x in named.items()
    }
    temporary = f"{os.fspath(path)}.tmp"
    text = json.dumps({"format": FORMAT, **metadata})
    if os.path.isdir(path) or not Path(path).absolute().parent.is_dir():
        raise FimprobeError(
            f"`path` must be a file in an existing folder, got {os.fspath(path)!r}. Pass another "
            "path, or create the folder first."
        )
    try:
        mode = _mode_of_open(path, temporary)
        package.save_file(flat, temporary, metadata={KEY: text})
        with contextlib.suppress(OSError):  # some file systems have no modes
            os.chmod(temporary, mode)
        os.replace(temporary, path)
    except Exception as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise FimprobeError(
            f"`path` must be writable, but {os.fspath(path)!r} is not ({describe_error(error)}). "
            "Pass another path."
        ) from error


def _mode_of_open(path: str | os.PathLike[str], temporary: str) -> int:
    """Return the mode that ``open`` leaves: that of an existing file, else one by the umask.

    safetensors writes files that only their user may read.

    Args:
        path: The file that is replaced.
        temporary: A path beside it, where an empty file is left.
    """
    with open(temporary, "wb"):
        pass
    return stat.S_IMODE(os.stat(path if os.path.exists(path) else temporary).st_mode)


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all tensors by their names in the file, and the metadata.

    Raises:
        FimprobeError: If the file is missing, or is not one that fimprobe wrote.
    """
    tensors, metadata = read_tensors(path, "path")
    if metadata is None:
        raise FimprobeError(
            f"`path` must be a file that Fisher.save wrote, but {os.fspath(path)!r} has no metadata "
            f"{KEY!r}. Read it by safetensors.torch.load_file."
        )
    if metadata.get("format") != FORMAT:
        raise FimprobeError(
            f"`path` must have format {FORMAT}, but {os.fspath(path)!r} has format "
            f"{metadata.get('format')} (fimprobe {metadata.get('fimprobe')}). Install that version."
        )
    return tensors, metadata


def read_tensors(
    path: str | os.PathLike[str], argument: str
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors of any safetensors file, and the metadata of fimprobe or None.

    Args:
        path: The file.
        argument: Name of the argument, for the messages.

    Raises:
        FimprobeError: If the file is missing, or cannot be read.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise FimprobeError(f"`{argument}` must be the path of a file, got {type(path).__name__}.")
    package = _safetensors(path)
    try:
        with package.safe_open(os.fspath(path), framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            metadata = None if text is None else json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise FimprobeError(
            f"`{argument}` must be a file, got {os.fspath(path)!r}, which does not exist."
        ) from None
    except Exception as error:
        raise FimprobeError(
            f"`{argument}` must be a safetensors file, but {os.fspath(path)!r} cannot be read "
            f"({type(error).__name__}: {error}). Pass a file of the safetensors format."
        ) from None
    return tensors, metadata


def _safetensors(path: str | os.PathLike[str]) -> Any:
    try:
        import safetensors.torch

        return _Package(safetensors.torch.save_file, safetensors.safe_open)
    except ImportError:
        raise FimprobeError(
            f"{os.fspath(path)!r} is a safetensors file, which needs the package safetensors. Run: "
            "pip install 'fimprobe[safetensors]'"
        ) from None


class _Package:
    """The two functions of safetensors that are used."""

    def __init__(self, save_file: Any, safe_open: Any) -> None:
        self.save_file, self.safe_open = save_file, safe_open
