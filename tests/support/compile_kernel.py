"""Compile the fused kernel for an H200 (sm_90) with no GPU at hand; print what the code needs.

``python tests/support/compile_kernel.py [--all]``: one line of JSON for each case, of every tile with
``--all``. Triton brings the assembler.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fimprobe.engines.moments.triton_kernel import CONFIGURATIONS, moments

POINTERS = {
    "TOKENS": "*i64",
    "SECOND": "*fp32",
    "FOURTH": "*fp64",
    "A2": "*fp32",
    "A4": "*fp64",
    "Q": "*fp64",
    "R": "*fp64",
    "SUMS": "*fp32",
}
ONES = ("x_i", "d_o", "r_i", "a_i", "k_t")
"""Strides that are 1 for contiguous operands."""

SIXTEENTHS = {"X", "A2", "SUMS", "TOKENS", "x_b", "x_t", "d_b", "d_t", "r_b", "r_t", "a_o", "a_p"}
"""Arguments that are multiples of 16 (bytes or numbers), as they are for usual widths."""


def compiled(configuration, kind, **constants):
    """The assembly and the shared memory of one configuration."""
    constants |= {"PRECISION": "ieee", "RAISE": False} | configuration.kwargs
    constants |= dict.fromkeys(ONES, 1)
    signature, attributes = {}, {}
    for place, name in enumerate(moments.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("DELTA", "ROWS"):
            signature[name] = (f"*{kind}",) * constants["S"]
            for draw in range(constants["S"]):
                attributes[place, draw] = [["tt.divisibility", 16]]
        else:
            signature[name] = POINTERS.get(name, f"*{kind}" if name == "X" else "i32")
        if name in SIXTEENTHS | {"outs", "ins"}:
            attributes[(place,)] = [["tt.divisibility", 16]]
    fixed = {(moments.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(moments, signature, fixed, attributes)
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return kernel.asm["ptx"], kernel.metadata.shared


def assembled(ptx):
    """Registers of a thread and bytes spilled, by NVIDIA's assembler."""
    assembler = next(p for p in Path(triton.__file__).parent.rglob("ptxas") if p.is_file())
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(x) for x in re.findall(r"(\d+) bytes spill", output))
    return int(re.findall(r"Used (\d+) registers", output)[-1]), spilled


PLAIN = {"DENSE": True, "LOOKUP": False, "WEIGHTED": False, "DIAGONALS": False, "S": 1}
PLAIN["QUARTIC_WEIGHTED"] = False
CASES = [
    ("bf16", {}),
    ("bf16", {"S": 2}),
    ("bf16", {"LOOKUP": True}),
    ("fp32", {}),
    ("fp16", {"S": 4, "WEIGHTED": True, "QUARTIC_WEIGHTED": True, "DIAGONALS": True}),
]
"""The type of the operands, and what differs from ``PLAIN``."""

SHARED_BYTES = 227 * 1024
"""Shared memory of a block on an H200 (CUDA C Programming Guide, compute capability 9.0)."""


def needs_of(configuration, kind, change):
    """What the compiled kernel needs, and whether that fits without a spilled register."""
    ptx, shared = compiled(configuration, kind, **PLAIN | change)
    registers, spilled = assembled(ptx)
    needs = {"kind": kind, "tile": [*configuration.kwargs.values()], "shared": shared}
    needs |= {"registers": registers, "spilled": spilled, "tensor": "wgmma" in ptx}
    return needs | {"fits": shared <= SHARED_BYTES and spilled == 0} | change


def main():
    """The tiles up to the first that fits, of each case.

    Four draws with everything spill in any tile: one is enough to know that they compile.
    """
    every = "--all" in sys.argv[1:]
    for kind, change in CASES:
        for configuration in reversed(CONFIGURATIONS):
            needs = needs_of(configuration, kind, change)
            print(json.dumps(needs), flush=True)
            if not every and (needs["fits"] or kind == "fp16"):
                break


if __name__ == "__main__":
    main()
