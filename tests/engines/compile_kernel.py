"""Compile the fused kernel for an H200 (sm_90) with no GPU at hand; print what the code needs.

python tests/engines/compile_kernel.py: one line of JSON for each case. Triton brings the assembler.
"""

import json
import re
import subprocess
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
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return found.asm["ptx"], found.metadata.shared


def assembled(ptx):
    """Registers of a thread and bytes spilled, by NVIDIA's assembler."""
    assembler = next(p for p in Path(triton.__file__).parent.rglob("ptxas") if p.is_file())
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.findall(r"Used (\d+) registers", told)[-1]), sum(
        int(x) for x in re.findall(r"(\d+) bytes spill", told)
    )


def main():
    """Every configuration for one and two bf16 draws, the tied head, float32."""
    plain = {"DENSE": True, "LOOKUP": False, "WEIGHTED": False, "DIAGONALS": False, "S": 1}
    plain["QUARTIC_WEIGHTED"] = False
    cases = [("bf16", {}), ("bf16", {"S": 2}), ("bf16", {"LOOKUP": True}), ("fp32", {})]
    cases += [("fp16", {"S": 4, "WEIGHTED": True, "QUARTIC_WEIGHTED": True, "DIAGONALS": True})]
    for kind, change in cases:
        for configuration in CONFIGURATIONS if change.get("S") != 4 else CONFIGURATIONS[-1:]:
            ptx, shared = compiled(configuration, kind, **plain | change)
            registers, spilled = assembled(ptx)
            told = {"kind": kind, "tile": [*configuration.kwargs.values()], "shared": shared}
            told |= {"registers": registers, "spilled": spilled, "tensor": "wgmma" in ptx}
            print(json.dumps(told | change), flush=True)


if __name__ == "__main__":
    main()
