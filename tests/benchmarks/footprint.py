"""Peak memory of a run: what the process had resident at most, over what it had before.

The kernel's high-water mark sees everything: torch's allocator, oneDNN's and BLAS's scratch, Python.
A child process takes it, in which freed blocks go back to the system at once (glibc would keep them
for the next run, which then seemed to need nothing); that slows allocation, so no child is timed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_mb(run: Callable[[], Any], forget: Callable[[], Any] = lambda: None) -> float:
    """MB that a run needs beyond what is resident before it; the first run is not the one measured.

    ``forget`` frees what the first run left behind (gradients, attributes).
    """
    run()
    forget()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the high-water mark
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    del result
    return (peak - before) / 1024


def in_child(script: str, *arguments: str) -> dict[str, Any]:
    """The JSON object that the script, run with these arguments, prints as its last line."""
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=os.environ | RETURNED,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        print(f"memory was not measured: {done.stderr.strip()[-500:]}", file=sys.stderr)
        return {}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _status(key: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key))
