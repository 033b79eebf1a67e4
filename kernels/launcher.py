"""How a kernel is launched: past Triton's launcher, whose work on the host outlasts the kernel.

``@kernel`` stands for ``@triton.jit`` where the host launches what it decorates, by the same
``name[grid](*args, **options)``. A C++ extension writes the arguments down in one pass, with a key
of all that Triton compiles a variant for: dtypes, multiples of 16, ones, constants, options. What
the key has been seen for is enqueued by one call of the driver. Anything else is looked up among
what was compiled ahead of time (ahead.py), or compiled by Triton now.

``OPTIMA_FAST_LAUNCHER``: ``auto`` (default) takes the extension where it was built and there is a
CUDA device; ``triton`` leaves launching to Triton, whose profiler sees only its own launches;
``direct`` makes it an error if the extension cannot be taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from .ahead import archive

VARIABLE = "OPTIMA_FAST_LAUNCHER"
ABI = 1  # of the extension, as csrc/launch.cpp has it

# what a key calls the dtypes of tensors and of a kernel's constants
TYPES = {
    torch.float16: "e", torch.bfloat16: "b", torch.float32: "f", torch.float64: "d",
    torch.bool: "?", torch.int8: "i1", torch.int32: "i4", torch.int64: "i8",
    tl.float16: "fp16", tl.bfloat16: "bf16", tl.float32: "fp32", tl.float64: "fp64",
}  # fmt: skip


class Binary(NamedTuple):
    """A compiled variant of a kernel.

    Attributes:
        code: the cubin.
        entry: its function's name.
        threads: of a program.
        shared: bytes of a program's shared memory.
        scratch: bytes of global memory that each program needs.
    """

    code: bytes
    entry: str
    threads: int
    shared: int
    scratch: int

    @classmethod
    def of(cls, compiled: Any) -> Binary | None:
        """What Triton's CompiledKernel holds; None if a plain launch does not give what it needs.

        That may be clusters, a cooperative grid, a profiler's memory.
        """
        found = compiled.metadata
        for name, plain in (
            ("num_ctas", 1),
            ("launch_cooperative_grid", False),
            ("launch_pdl", False),
            ("profile_scratch_size", 0),
        ):
            if getattr(found, name, plain) != plain:
                return None
        scratch = getattr(found, "global_scratch_size", 0)
        return cls(
            compiled.asm["cubin"], found.name, 32 * found.num_warps, found.shared, int(scratch or 0)
        )


def extension() -> Any:
    """The C++ extension, or a line that says why there is none."""
    try:
        from optima_fast import _launch
    except ImportError as error:
        return f"the extension optima_fast._launch is not there ({error})"
    if _launch.ABI != ABI:
        return f"the extension optima_fast._launch is of another version ({_launch.ABI}, not {ABI})"
    return _launch


_chosen: Any = None  # the extension, why it is not taken, or None before the first launch


def chosen() -> Any:
    """The extension, or a line that says why Triton launches; decided at the first launch.

    Raises:
        ValueError: ``OPTIMA_FAST_LAUNCHER`` is none of its values, or ``direct`` in vain.
    """
    global _chosen
    if _chosen is None:
        how = os.environ.get(VARIABLE) or "auto"
        if how not in ("auto", "triton", "direct"):
            raise ValueError(f"{VARIABLE} must be auto, triton or direct, got {how!r}")
        found: Any = f"{VARIABLE}=triton"
        if how != "triton":
            found = extension()
            if isinstance(found, str):
                found += ": install with a C++ compiler and OPTIMA_FAST_EXT=1"
            elif not found.has_driver():
                found = "there is no CUDA driver"
            elif not torch.cuda.is_available():
                found = "PyTorch sees no CUDA device"
            else:
                # what Triton asks too: the public functions take microseconds
                device, stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream
                found.configure(device, stream, _scratch, TYPES)
        if isinstance(found, str) and how == "direct":
            raise ValueError(f"{VARIABLE}=direct: {found}")
        _chosen = found
    return _chosen


def leave_to_triton(why: str) -> None:
    """Launch nothing from now on but through Triton."""
    global _chosen
    _chosen = why


def who() -> str:
    """Who launches kernels, and why."""
    found = chosen()
    return f"Triton ({found})" if isinstance(found, str) else "the extension optima_fast._launch"


def _scratch(size: int) -> torch.Tensor:
    """From PyTorch's allocator, in the order of the stream; in a CUDA graph from its pool."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


SERVED = {"ahead": 0, "compiled": 0}  # variants that this process loaded


def architecture() -> int:
    """Of the current device, such as 90."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


class Kernel:
    """A Triton function that the host launches.

    Attributes:
        jit: what ``triton.jit`` made of it.
    """

    def __init__(self, jit: JITFunction[Any]) -> None:
        self.jit = jit
        self.__name__ = jit.__name__
        self._launcher: Any = None
        self._plain = True  # whether a plain launch is enough

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **named: self.launch(grid, args, named)

    def launch(self, grid: tuple[int, ...], args: Sequence[Any], named: dict[str, Any]) -> None:
        """Enqueue it on the current stream of the current device."""
        module = chosen()
        if isinstance(module, str) or not self._plain:
            self.jit[grid](*args, **named)
            return
        if self._launcher is None:
            self._launcher = module.Launcher(self.__name__, parameters(self.jit))
        key = self._launcher(grid, args, named)
        if key is None:
            return
        self._plain = self.load(key, grid, args, named)
        if self._plain:
            self._launcher(grid, args, named)
        else:
            self.jit[grid](*args, **named)

    def load(
        self, key: bytes, grid: tuple[int, ...], args: Sequence[Any], named: dict[str, Any]
    ) -> bool:
        """Find a variant that was compiled ahead, or compile it, and load it on the device.

        Returns:
            False where Triton compiled what only it can launch: nothing was loaded.
        """
        ready = archive(architecture())
        found = ready.find(self.__name__, key)
        if found is not None:
            try:
                self._launcher.add(key, found[0], *found[1])
                SERVED["ahead"] += 1
                return True
            except RuntimeError as error:  # a driver older than the compiler, say
                ready.refuse(f"{ready.path} does not load: {error}")
        compiled = self.jit.run(*args, grid=grid, warmup=True, **named)
        binary = Binary.of(compiled)
        if binary is None:
            return False
        self._launcher.add(key, *binary)
        SERVED["compiled"] += 1
        return True


def parameters(jit: JITFunction[Any]) -> list[tuple[str, bool, bool, bool, Any]]:
    """As the extension takes them: name, constant, specialised, has a default, default."""
    return [
        (p.name, p.is_constexpr, not p.do_not_specialize, p.has_default, p.default)
        for p in jit.params
    ]


def kernel(
    do_not_specialize: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit`` for what the host launches.

    Args:
        do_not_specialize: parameters that are not compiled for: counts, and what floats scale.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        jit = triton.jit(do_not_specialize=list(do_not_specialize))(function)
        return Kernel(jit) if isinstance(jit, JITFunction) else jit  # not in the interpreter

    return decorate
