"""A torchvision that cannot be imported counts as absent.

BackPACK requires torchvision, and the one that pip finds may not match a CPU build of torch; every
``import transformers`` model then fails with "operator torchvision::nms does not exist". Imported
first by the package, before transformers is.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys

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
        logger.info("torchvision cannot be imported (%s) and is treated as absent", error)
        return True
    return False


hide_broken_torchvision()
