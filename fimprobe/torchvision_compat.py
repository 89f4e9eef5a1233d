"""A torchvision that cannot be imported is treated as absent.

BackPACK requires torchvision. The version that pip installs may not match a CPU build of torch, and
importing it then raises "operator torchvision::nms does not exist". So does every model class of
transformers, and Lightning, because both import an installed torchvision.

:func:`hide_broken_torchvision` changes ``sys.modules`` for the whole process. ``import fimprobe``
does not call it. The callers are :mod:`fimprobe.engines.backpack`, which is why torchvision is
installed at all, and the integrations, which import transformers and Lightning.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from typing import Any

logger = logging.getLogger("fimprobe")


def hide_broken_torchvision() -> bool:
    """Import torchvision once; if that fails, make later imports find no torchvision.

    A torchvision that works, or was imported before, stays as it is. Further calls change nothing.

    Returns:
        Whether this call hid torchvision.
    """
    # after the first call ``sys.modules["torchvision"]`` is None, which find_spec rejects
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a half-imported package raises anything
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        _reset_transformers_cache()
        _hide_from_lightning()
        logger.info("torchvision cannot be imported (%s) and is treated as absent", error)
        return True
    return False


def _reset_transformers_cache() -> None:
    """Make an imported transformers check again whether torchvision is available."""
    import_utils = sys.modules.get("transformers.utils.import_utils")
    is_available: Any = getattr(import_utils, "is_torchvision_available", None)
    if hasattr(is_available, "cache_clear"):
        is_available.cache_clear()


def _hide_from_lightning() -> None:
    """Report torchvision as not installed to Lightning's torchmetrics.

    torchmetrics asks for the version of the installed package, not whether it can be imported.
    """
    try:
        imports: Any = importlib.import_module("lightning_utilities.core.imports")
        version = imports._version
    except (ImportError, AttributeError):  # no Lightning, or a version without this function
        return

    def without_torchvision(name: str) -> str:
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)  # type: ignore[no-any-return]

    imports._version = without_torchvision
