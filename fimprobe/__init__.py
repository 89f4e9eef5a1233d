"""Know how wrong your Fisher information is: estimators, their variance, live in TensorBoard."""

from fimprobe import torchvision_guard as _torchvision_guard  # noqa: I001 - before transformers

from fimprobe import likelihoods, penalties
from fimprobe.config import Config, load_config
from fimprobe.measurement import measure
from fimprobe.probe import Probe
from fimprobe.records import Records, read
from fimprobe.report import Report
from fimprobe.types import (
    BatchError,
    Estimate,
    FimprobeError,
    Geometry,
    GroupEstimates,
    Likelihood,
    Sink,
)

from fimprobe.integrations.loop import attach  # noqa: I001 - uses all of the above

__version__ = "0.1.0"
__all__ = [
    "BatchError",
    "Config",
    "Estimate",
    "FimprobeError",
    "Geometry",
    "GroupEstimates",
    "Likelihood",
    "Probe",
    "Records",
    "Report",
    "Sink",
    "attach",
    "likelihoods",
    "load_config",
    "measure",
    "penalties",
    "read",
]
del _torchvision_guard
