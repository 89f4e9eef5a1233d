"""All faults in turn."""

from __future__ import annotations

from collections.abc import Callable

from tests.faults import attaching, callbacks, files, inputs, internal_errors, kills, processes, soak
from tests.faults.outcome import Outcome
from tests.faults.training import cnn, mlp

Fault = Callable[[], "Outcome | list[Outcome]"]

FAULTS: dict[str, Fault] = {
    "attaching": attaching.errors_in_attach,
    "errors, MLP": lambda: internal_errors.errors_in_functions(mlp),
    "errors, CNN": lambda: internal_errors.errors_in_functions(cnn),
    "late errors, MLP": lambda: internal_errors.errors_in_functions(mlp, last=True),
    "late errors, CNN": lambda: internal_errors.errors_in_functions(cnn, last=True),
    "interruptions, MLP": lambda: internal_errors.interruptions(mlp),
    "interruptions, CNN": lambda: internal_errors.interruptions(cnn),
    "writes": files.failing_files,
    "folders": files.folders_that_fail,
    "kills": kills.kills,
    "processes": lambda: processes.two_processes(processes.cases()),
    "callback, transformers": callbacks.huggingface,
    "callback, Lightning": callbacks.lightning,
    "threads": soak.threads,
    "forks": soak.forks,
    "cycles": soak.cycles,
    "steps": soak.steps,
    "YAML": inputs.mutated_yaml,
    "records": inputs.mutated_records,
    "wrong calls": inputs.wrong_calls,
}

CHEAP: dict[str, Fault] = {
    "attaching": lambda: attaching.errors_in_attach([KeyboardInterrupt]),
    "errors": lambda: internal_errors.errors_in_functions(mlp, [MemoryError], share=0.02),
    "late errors": lambda: internal_errors.errors_in_functions(
        cnn, [RuntimeError], share=0.02, last=True
    ),
    "interruptions": lambda: internal_errors.interruptions(mlp, share=0.01),
    "writes": lambda: files.failing_files(3),
    "folders": files.folders_that_fail,
    "kills": lambda: kills.kills(2),
    "processes": lambda: processes.two_processes(
        [
            processes.Case(fault="exits", stage="ProcessShare.measure", victim=0),
            processes.Case(fault="is interrupted", stage="merge", victim=1),
        ]
    ),
    "threads": lambda: soak.threads(1),
    "forks": lambda: soak.forks(1),
    "cycles": lambda: soak.cycles(10),
    "steps": lambda: soak.steps(20),
    "YAML": lambda: inputs.mutated_yaml(50),
    "records": lambda: inputs.mutated_records(2),
    "wrong calls": inputs.wrong_calls,
}
"""A small part of each, for every run of the tests."""


def run(fault: Fault) -> list[Outcome]:
    """The outcomes of one kind of fault."""
    found = fault()
    return found if isinstance(found, list) else [found]
