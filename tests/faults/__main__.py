"""Makes all faults, or those whose names are given, and prints the table of what became of them."""

import contextlib
import io
import sys
import time

import torch

from tests.faults.campaign import FAULTS, run
from tests.faults.outcome import table

torch.set_num_threads(1)  # a fork has no other threads of OpenMP, and would wait for them
outcomes = []
for name in sys.argv[1:] or FAULTS:
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        outcomes += run(FAULTS[name])
    print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
print(table(outcomes))
sys.exit(any(outcome.problems for outcome in outcomes))
