"""Know how wrong your Fisher information is: estimators, their variance, live in TensorBoard."""

from fimprobe import likelihoods, penalties
from fimprobe._version import __version__
from fimprobe.config.config import Config, load_config
from fimprobe.distributed.processes import ProcessGroup, join_processes
from fimprobe.engines.tracing.plan import Plan
from fimprobe.errors import BatchError, FimprobeError
from fimprobe.estimators.estimate import Estimate, Geometry, GroupEstimates
from fimprobe.fisher.audit.audit import audit
from fimprobe.fisher.audit.result import Audit
from fimprobe.fisher.estimate import estimate
from fimprobe.fisher.fisher import Fisher
from fimprobe.fisher.loading import load_fisher
from fimprobe.likelihoods.base import Likelihood
from fimprobe.measurement.measure import measure
from fimprobe.probe.attach import attach, detach
from fimprobe.probe.probe import Probe
from fimprobe.report.report import Report
from fimprobe.runs.reader import Records, read
from fimprobe.sinks.base import Sink

__all__ = [
    "Audit",
    "BatchError",
    "Config",
    "Estimate",
    "FimprobeError",
    "Fisher",
    "Geometry",
    "GroupEstimates",
    "Likelihood",
    "Plan",
    "Probe",
    "ProcessGroup",
    "Records",
    "Report",
    "Sink",
    "__version__",
    "attach",
    "detach",
    "audit",
    "estimate",
    "join_processes",
    "likelihoods",
    "load_config",
    "load_fisher",
    "measure",
    "penalties",
    "read",
]
