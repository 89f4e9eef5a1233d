"""A torchvision that cannot be imported counts as absent.

BackPACK requires torchvision, and the one that pip finds may not match a CPU build of torch; every
``import transformers`` model, and ``import lightning``, then fails with "operator torchvision::nms
does not exist". Imported first by the package, before those are.
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
    """Try torchvision once; where it fails, make later imports see no torchvision. True if hidden."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a half-imported package raises anything
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        import_utils = sys.modules.get("transformers.utils.import_utils")
        if import_utils is not None and hasattr(import_utils, "is_torchvision_available"):
            cached = import_utils.is_torchvision_available
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()
        _hide_from_lightning()
        logger.info("torchvision cannot be imported (%s) and is treated as absent", error)
        return True
    return False


def _hide_from_lightning() -> None:
    """Lightning's torchmetrics believes what is installed, not what can be imported."""
    try:
        seen: Any = importlib.import_module("lightning_utilities.core.imports")
        version = seen._version
    except (ImportError, AttributeError):  # no Lightning, or another one
        return

    def without_torchvision(name: str) -> str:
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)  # type: ignore[no-any-return]

    seen._version = without_torchvision


hide_broken_torchvision()
