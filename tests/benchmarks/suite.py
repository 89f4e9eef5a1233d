"""Every table of the peers' and the growth parts of docs/performance.md, one after the other.

python tests/benchmarks/suite.py > tables.md    (about ten minutes on two quiet cores)
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

PARTS = {
    "Cost beside peers": ["cost.py"],
    "The same with GELU for ReLU": ["cost.py", "--ours-only", "--smooth", "--times-only"],
    "A loop beside Cockpit": ["overhead.py"],
    "Growth": ["growth.py"],
}


def main() -> None:
    here = Path(__file__).parent
    for title, (script, *arguments) in PARTS.items():
        print(f"\n## {title}\n", flush=True)
        started = time.time()
        done = subprocess.run([sys.executable, here / script, *arguments])
        if done.returncode:  # the other parts are still wanted
            print(f"\n{script} ended with status {done.returncode}", flush=True)
        print(f"{script}: {time.time() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
