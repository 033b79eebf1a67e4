"""Kernels compiled ahead of time for chips that are not there: registers, spills, instructions.

    PYTHONPATH=. python tests/kernels/test_resources.py  # a line a kernel, exit 1 on a failure

Compiling needs the kernels as compiled functions, which TRITON_INTERPRET=1 replaces for good when
they are imported; the tests therefore run this file in a process without it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]

# shared memory a program may have, registers and shared memory of a multiprocessor, in bytes
# (CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability")
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
SHARED_PER_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
RESERVED_SHARED = 1 << 10  # a program, by the system
REGISTERS_PER_SM = 64 << 10
TENSOR_CORE = {80: r"\bHMMA\b", 90: r"\bHGMMA\b", 100: r"\bUTC\w*MMA\b"}


class Case(NamedTuple):
    arch: int
    kernel: str  # fwd, loss (fwd with no mask and no residual to store), bwd or total
    dtype: str


CASES = [
    *(
        Case(arch, kernel, dtype)
        for arch in (80, 90, 100)
        for kernel, dtypes in (("fwd", ("fp16", "bf16", "fp32")), ("bwd", ("bf16", "fp32")))
        for dtype in dtypes
    ),
    Case(90, "loss", "bf16"),
    Case(90, "total", "fp32"),
]
LAYERS = 4


def compile_case(case: Case) -> tuple[Any, dict[str, int]]:
    """The compiled kernel, as four layers with aligned rows launch it, and its options."""
    import triton
    import triton.language as tl
    from optima_fast.kernels import core, launch
    from optima_fast.kernels import hidden_mse as k
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config = launch.lookup(
        launch.HIDDEN_MSE_FORWARD, divmod(case.arch, 10), int(case.dtype[2:]) // 8
    )
    name = f"_hidden_mse_{'fwd' if case.kernel == 'loss' else case.kernel}_kernel"
    fn = core._total_kernel if case.kernel == "total" else getattr(k, name)
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK": core.TOTAL_BLOCK,
        "ACC": tl.float32,
        "HAS_MASK": case.kernel == "fwd",
        "STORE": case.kernel == "fwd",
    }
    constants = {name: value for name, value in constants.items() if name in fn.arg_names}
    signature: dict[str, Any] = {}
    divisible = {}
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*i32" if name == "count_ptr" else "*fp32"
            divisible[(i,)] = [["tt.divisibility", 16]]
        else:
            pointer = "*i1" if name == "m_ptrs" else f"*{case.dtype}"
            signature[name] = (pointer if name.endswith("_ptrs") else "i32",) * LAYERS
            if name not in ("T", "first", "place", "width", "end"):
                divisible.update({(i, j): [["tt.divisibility", 16]] for j in range(LAYERS)})
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    if case.kernel != "total":
        options.update(num_warps=config.num_warps, num_stages=config.num_stages)
        if config.maxnreg:
            options["maxnreg"] = config.maxnreg
    source = ASTSource(fn, signature, constexprs=constants, attrs=divisible)
    target = GPUTarget("cuda", case.arch, 32)
    return triton.compile(source, target=target, options=options), options


def tool() -> Path:
    """The disassembler that comes with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def measure(case: Case) -> dict[str, Any]:
    """What the compiled kernel takes, read from its binary."""
    compiled, options = compile_case(case)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [tool(), flag, binary], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    shared = compiled.metadata.shared
    return {
        "registers": registers,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": shared,
        "resident": min(
            REGISTERS_PER_SM // (registers * 32 * options["num_warps"]),
            SHARED_PER_SM[case.arch] // (shared + RESERVED_SHARED),
        ),
        "tensor_core": len(re.findall(TENSOR_CORE[case.arch], sass)),
        "wide_copies": len(re.findall(r"\bLDGSTS\.E\S*\.128\b", sass)),
    }


def failures(case: Case, found: dict[str, Any]) -> list[str]:
    """What is wrong with a measured kernel; empty if nothing is."""
    half = case.dtype != "fp32"
    product = case.kernel != "total"
    checks = {
        "spills registers": found["spills"] == 0,
        "more shared memory than the chip has": found["shared"] <= SHARED_LIMIT[case.arch],
        "fewer than two programs on a multiprocessor": found["resident"] >= 2,
        "no tensor-core instruction": found["tensor_core"] > 0 or not (half and product),
        "float32 on tensor cores: no longer IEEE": found["tensor_core"] == 0 or half,
        "no 16-byte asynchronous copy": found["wide_copies"] > 0 or not product,
    }
    return [name for name, holds in checks.items() if not holds]


def main() -> int:
    """Print a line of JSON a case; 1 if a check fails."""
    status = 0
    for case in CASES:
        found = measure(case)
        wrong = failures(case, found)
        print(json.dumps({**case._asdict(), **found, "failures": wrong}), flush=True)
        status |= bool(wrong)
    return status


@pytest.fixture(scope="module")
def lines() -> dict[Case, dict[str, Any]]:
    pytest.importorskip("triton")
    binaries = tool().parent
    if not {"cuobjdump", "ptxas"} <= {path.name for path in binaries.glob("*")}:
        pytest.skip(f"this build of Triton has no cuobjdump and ptxas in {binaries}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, __file__],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode in (0, 1), run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    return {Case(x["arch"], x["kernel"], x["dtype"]): x for x in found}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_compiled_kernel(case: Case, lines: dict[Case, dict[str, Any]]) -> None:
    assert case in lines, f"the compiler stopped before this kernel, after {len(lines)} others"
    assert lines[case]["failures"] == [], lines[case]


def test_every_entry_of_the_launch_table_is_compiled() -> None:
    pytest.importorskip("triton")
    from optima_fast.kernels import launch

    sizes = {"fp16": 2, "bf16": 2, "fp32": 4}
    used = {
        launch.lookup(launch.HIDDEN_MSE_FORWARD, divmod(c.arch, 10), sizes[c.dtype]) for c in CASES
    }
    # float64 runs in the interpreter only
    assert used == {config for key, config in launch.HIDDEN_MSE_FORWARD.items() if key[1] != 8}


if __name__ == "__main__":
    sys.exit(main())
