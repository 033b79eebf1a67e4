"""What the benches share: the machine's facts, interleaved timing, peak memory, rows of results.

On a GPU a sample is the time between two CUDA events. The L2 cache is overwritten before it, and
the stream is kept busy until the host has launched the whole step, so that it is time on the device
even where the host is the slower of the two; ``wall_ms`` is what the host sees of steps back to
back. Peak memory is what PyTorch's allocator held above the inputs at the worst moment of one step:
on a GPU torch.cuda.max_memory_allocated, on a CPU the running sum of the allocations that
torch.profiler records. Scratch memory inside MKL or cuBLAS is in neither.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from optima_fast.entry import calm_openmp

calm_openmp()  # as the trainer runs
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from torch import Tensor

import optima_fast

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
Step = Callable[[], Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SLEEP_CYCLES = 2_000_000_000  # a second on the fastest of today's cards


def installed_version(package: str) -> str | None:
    try:
        module = __import__(package)
    except ImportError:
        return None
    return str(getattr(module, "__version__", "unknown"))


def commit() -> tuple[str, bool | None]:
    """The commit and whether files differ from it; without git, OPTIMA_FAST_COMMIT and unknown."""
    given = os.environ.get("OPTIMA_FAST_COMMIT")
    try:
        head, status = (
            subprocess.run(
                ["git", "-C", ROOT, *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return given or "unknown", None
    return given or head, bool(status)


CARD_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu",
    "power.draw", "power.limit", "clocks_event_reasons.active",
)  # fmt: skip


def card_state() -> Row:
    """What nvidia-smi says of the first card; empty without it."""
    for fields in (CARD_FIELDS, CARD_FIELDS[:-1]):  # the last has another name in old drivers
        command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}"]
        try:
            answer = subprocess.run(
                [*command, "--format=csv,noheader"],
                capture_output=True,
                text=True,
                check=True,
                timeout=20,
            ).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        return dict(zip(fields, answer.strip().splitlines()[0].split(", "), strict=False))
    return {}


def conditions(device: str, dtype: str, threads: int) -> Row:
    """What every row carries."""
    facts: Row = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": threads,
        "dtype": dtype,
        "torch": torch.__version__,
        "optima_fast": optima_fast.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        facts.update(triton=installed_version("triton"), commit=commit()[0])
    return facts


class Rows:
    """Rows of a bench, appended to a file as they come, so that a crash loses one at most.

    The cell being measured is named in a file beside it. Opened again with ``resume``, a cell that
    the last process died in counts as failed, and cells that have a row are not measured again.
    """

    def __init__(self, path: str | None, common: Row, *, resume: bool = False) -> None:
        self.path = Path(path) if path else None
        self.common = common
        self.rows: list[Row] = []
        self.done: set[tuple[str, str]] = set()
        self.mark = self.path.with_suffix(".started") if self.path else None
        if resume and self.path is not None and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.done.add((row.get("case", ""), row.get("provider", "")))
        if resume and self.mark is not None and self.mark.exists():
            case, provider = json.loads(self.mark.read_text(encoding="utf-8"))
            if (case, provider) not in self.done:
                self.add(case=case, provider=provider, failed="the process died here")

    def begin(self, case: str, provider: str) -> bool:
        """Name the cell that comes now; False if it has a row from the last time."""
        if (case, provider) in self.done:
            return False
        if self.mark is not None:
            self.mark.write_text(json.dumps([case, provider]), encoding="utf-8")
        return True

    def add(self, **row: Any) -> Row:
        self.rows.append(row)
        self.done.add((row.get("case", ""), row.get("provider", "")))
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**self.common, **row}) + "\n")
        return row

    def close(self) -> None:
        if self.mark is not None:
            self.mark.unlink(missing_ok=True)


class Budget:
    """Seconds that a bench may take; None is no limit."""

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    @property
    def spent(self) -> bool:
        return self.end is not None and time.monotonic() > self.end


def relative_error(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """The worst over the tensors, each in the 2-norm; nan if anything is."""
    pairs = zip(found, exact, strict=True)
    errors = [((x.double() - y).norm() / y.norm()).item() for x, y in pairs]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def allowed_error(dtype: torch.dtype) -> float:
    """Eager accumulates in its own dtype, so the bound is of that dtype's rounding."""
    return (200 if dtype == torch.float32 else 16) * torch.finfo(dtype).eps


def peak_bytes(run: Step, device: str) -> int:
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        run()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


class Spread(NamedTuple):
    ms: float
    iqr: float
    runs: int


def spread(samples: list[float]) -> Spread:
    low, middle, high = statistics.quantiles(samples, n=4)
    return Spread(middle, high - low, len(samples))


class Timer:
    """One sample of a step's time, in milliseconds."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            properties = torch.cuda.get_device_properties()
            size = max(2 * getattr(properties, "L2_cache_size", 0), 128 << 20)
            self.cache = torch.empty(size, dtype=torch.int8, device=device)
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        self.known: dict[Step, int] = {}  # cycles of backlog on a GPU, else calls a sample

    def sample(self, run: Step) -> float:
        if run not in self.known:
            self.known[run] = self._backlog(run) if self.cuda else self._calls(run)
        if not self.cuda:
            calls = self.known[run]
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) * 1e3 / calls
        self.cache.zero_()
        torch.cuda._sleep(self.known[run])  # type: ignore[no-untyped-call]
        self.events[0].record()
        run()
        self.events[1].record()
        torch.cuda.synchronize()
        return float(self.events[0].elapsed_time(self.events[1]))

    def _calls(self, run: Step) -> int:
        """Enough for the clock, well below a time slice, so that few samples are interrupted."""
        run()
        calls = 1
        while True:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            if time.perf_counter() - start > 2e-4:
                return calls
            calls *= 2

    def _backlog(self, run: Step) -> int:
        """Cycles that outlast the host's part of a step by half."""
        seconds = []
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return int((1.5 * min(seconds) + 5e-5) * SLEEP_CYCLES)

    def wall(self, run: Step, seconds: float = 0.05) -> float:
        """Milliseconds a step of many back to back, as the host sees it."""
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds or steps < 3:
            run()
            steps += 1
            if self.cuda and steps % 20 == 0:
                torch.cuda.synchronize()
        if self.cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3 / steps


def interleave(
    steps: Mapping[Any, Step], timer: Timer, *, seconds: float, least: int
) -> dict[Any, list[float]]:
    """Samples of all steps in turn, so that a busy machine slows them alike."""
    samples: dict[Any, list[float]] = {name: [] for name in steps}
    begin, rounds = time.perf_counter(), 0
    while steps and (rounds < least or time.perf_counter() - begin < seconds):
        for name, run in steps.items():
            samples[name].append(timer.sample(run))
        rounds += 1
    return samples


def ratio(samples: list[float], anchor: list[float]) -> float:
    """Median over the rounds of a step's time over the anchor's beside it."""
    return statistics.median(x / y for x, y in zip(samples, anchor, strict=True))


def lost(error: BaseException) -> bool:
    """Whether the CUDA context is gone, so that only a new process can go on."""
    text = str(error)
    gone = ("illegal memory", "misaligned address", "device-side assert", "CUDA error")
    return any(x in text for x in gone) and "out of memory" not in text


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text if type(error) is RuntimeError else f"{type(error).__name__}: {text}")[:300]


@contextlib.contextmanager
def tidy() -> Iterator[None]:
    """Free what a case left behind."""
    try:
        yield
    finally:
        if "torch._dynamo" in sys.modules:  # importing it takes a second
            torch.compiler.reset()
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
