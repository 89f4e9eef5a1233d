"""Code in a fresh interpreter that has imported torch, and nothing of the package.

One server for each test run imports torch and forks for every piece of code: the import takes some
3 s of CPU time, and most of what is tested here comes after it.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

SERVER = """
import json, os, sys, traceback
import torch

for line in sys.stdin:
    code, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        for name, descriptor in (("out", 1), ("err", 2)):
            os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
        status = 0
        try:
            exec(compile(code, "<fresh process>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def server() -> subprocess.Popen:
    """The server; it ends with this process, whose end closes its input."""
    command = [sys.executable, "-c", SERVER]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_fresh(code: str) -> SimpleNamespace:
    """Run the code: ``returncode``, ``stdout`` and ``stderr`` as of ``subprocess.run``."""
    process = server()
    with tempfile.TemporaryDirectory() as folder:
        process.stdin.write(json.dumps([code, folder]) + "\n")
        process.stdin.flush()
        status = int(process.stdout.readline())
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
    return SimpleNamespace(returncode=status, stdout=out, stderr=err)
