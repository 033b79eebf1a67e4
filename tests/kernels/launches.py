"""Every launch by Triton's launcher and by ours, against a driver that writes them down.

    LD_LIBRARY_PATH=FOLDER python tests/kernels/launches.py FOLDER   # of the stub's libcuda.so.1

Prints a line a kernel: how many launches were the same, with how many layers, and the microseconds
of either launcher. Exits with 1 if any was not. As resources.py it needs kernels that are compiled,
and compiles them for a chip that is not there; as there, one process serves one architecture.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import statistics
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from optima_fast.kernels.ahead import DTYPES
from optima_fast.kernels.cases import CASES, Case

ARCH = 90
STREAM = 0x5EED
DEVICE = 0
SIZES = {"64": 8, "32": 4, "16": 2, "8": 1}


class Stub:
    """What the stub wrote down."""

    def __init__(self, folder: str) -> None:
        self.library = ctypes.CDLL(str(Path(folder) / "libcuda.so.1"))

    def expect(self, ptx: str) -> None:
        """The next launch is of this kernel: its parameters' sizes are in its PTX."""
        head = ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))]
        found = [SIZES[bits] for bits in re.findall(r"\.param \.[a-z](\d+)", head)]
        self.library.stub_expect((ctypes.c_int * len(found))(*found), len(found))

    def launched(self) -> tuple[list[int], int | None, bytes]:
        """Grid, threads and shared memory; the stream; the bytes of the parameters."""
        shape, stream = (ctypes.c_uint * 7)(), ctypes.c_void_p()
        parameters = ctypes.create_string_buffer(1 << 16)
        used = self.library.stub_launched(shape, ctypes.byref(stream), parameters)
        return list(shape), stream.value, parameters.raw[:used]


def driver_of_triton() -> Any:
    """Triton's own, its C code compiled and linked with the stub."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
    from triton.runtime.driver import driver

    own = SimpleNamespace(
        utils=CudaUtils(),
        launcher_cls=CudaLauncher,
        get_current_target=lambda: GPUTarget("cuda", ARCH, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: STREAM,
    )
    driver.set_active(own)
    return own


class Both:
    """In the place of ``Kernel.launch``: launch twice, and compare."""

    def __init__(self, stub: Stub, direct: Any, rounds: int) -> None:
        self.stub = stub
        self.direct = direct
        self.rounds = rounds
        self.found: dict[str, list[Any]] = {}
        self.wrong: list[str] = []

    def __call__(self, kernel: Any, grid: Any, args: Any, named: Any) -> None:
        compiled = kernel.jit.run(*args, grid=grid, warmup=True, **named)
        self.stub.expect(compiled.asm["ptx"])
        launches, times = [], []
        for launch in (
            lambda: kernel.jit[grid](*args, **named),
            lambda: self.direct(kernel, grid, args, named),
        ):
            before = self.stub.library.stub_launches()
            launch()
            if self.stub.library.stub_launches() != before + 1:
                self.wrong.append(f"{kernel.__name__}: no launch")
            launches.append(self.stub.launched())
            if self.rounds:
                times.append(time_of(launch, self.rounds))
        if launches[0] != launches[1]:
            self.wrong.append(f"{kernel.__name__} {grid}: {launches[0]} {launches[1]}")
        self.found.setdefault(kernel.__name__, []).append(times)
        self.on_another_device(kernel, grid, args, named)

    def on_another_device(self, kernel: Any, grid: Any, args: Any, named: Any) -> None:
        """What one device has loaded is of no use to another."""
        global DEVICE
        DEVICE = 1
        if kernel._launcher(grid, args, named) is None:
            self.wrong.append(f"{kernel.__name__}: launched on a device that has not loaded it")
        DEVICE = 0


def time_of(call: Any, rounds: int) -> float:
    """Its median, in microseconds."""
    for _ in range(3):
        call()
    spent = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        call()
        spent.append(time.perf_counter_ns() - start)
    return statistics.median(spent) / 1000


def prepare(args: argparse.Namespace) -> Any:
    """Make both launchers take the stub; returns ours."""
    from optima_fast.kernels import ahead, core, launch, launcher

    os.environ["TRITON_LIBCUDA_PATH"] = args.folder
    scratch = torch.zeros(1 << 20, dtype=torch.int8)
    driver_of_triton()
    core.triton.set_allocator(lambda size, alignment, stream: scratch)
    launch.capability = lambda x: divmod(ARCH, 10)
    module = launcher.extension()
    if isinstance(module, str):
        raise SystemExit(module)
    module.configure(lambda: DEVICE, lambda device: STREAM, lambda size: scratch, launcher.TYPES)
    launcher._chosen = "asked to" if args.first == "triton" else module
    launcher.architecture = lambda: ARCH
    if args.cubins:
        ahead.FOLDER = args.cubins
    return launcher


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", help="of libcuda.so.1, built from stub_driver.c")
    parser.add_argument("--op", action="append", choices=CASES)
    parser.add_argument("--layers", type=int, action="append", help="default: 3")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: bf16")
    parser.add_argument("--cubins", type=Path, help="a folder of archives to take kernels from")
    parser.add_argument("--masked", action="store_true", help="with masks and causality too")
    parser.add_argument("--rounds", type=int, default=0, help="timed calls of either launcher")
    parser.add_argument(
        "--first", choices=["triton", "direct"], help="launch all once by this one alone, timed"
    )
    args = parser.parse_args()
    launcher = prepare(args)
    both = Both(Stub(args.folder), launcher.Kernel.launch, args.rounds)
    if not args.first:
        launcher.Kernel.launch = lambda self, grid, a, named: both(self, grid, a, named)
    start = time.perf_counter()
    for layers, dtype in product(args.layers or [3], args.dtype or ["bf16"]):
        case = Case(DTYPES[dtype], layers=layers, few=True, widths=(64,))
        for op in args.op or CASES:
            CASES[op](case)
            if args.masked:
                CASES[op](case._replace(masked=True, causal=True))
    if args.first:
        print(f"{time.perf_counter() - start:.2f} s")
    for name, found in both.found.items():
        line = f"{name.strip('_').removesuffix('_kernel'):22} {len(found):3} launches"
        if args.rounds:
            line += "".join(
                f"  {who} {statistics.median(times[i] for times in found):6.1f} us"
                for i, who in enumerate(("Triton", "direct"))
            )
        print(line)
    print(f"{launcher.SERVED['ahead']} compiled ahead, {launcher.SERVED['compiled']} now")
    print("\n".join(both.wrong))
    return bool(both.wrong)


if __name__ == "__main__":
    sys.exit(main())
