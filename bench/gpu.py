"""`make gpu`: everything that needs a CUDA device, in two calls of at most 330 s each.

    python bench/gpu.py --call 1                     # right? how fast is each kernel, each rival?
    python bench/gpu.py --call 2                     # the whole table, tests, a training run
    python bench/gpu.py --part main                  # one part alone
    python bench/gpu.py --part tune --seconds 550    # the launch table, timed on this card
    python bench/gpu.py --quick --device cpu --results FOLDER   # its code, without a GPU

It needs torch, triton, numpy and pytest, installs nothing and writes one file,
bench/results/<card>-<date>-<commit>.json, again after every few rows; a part that fails, hangs or
runs out of time costs no other part's results. Parts run apart land in the same file. Without git
the commit is OPTIMA_FAST_COMMIT's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from measuring import ROOT, Row, card_state, commit, installed_version

# isort: split
import torch
from cases import SUITES

BENCH = ROOT / "bench"
# what only a card can tell; the others pass anywhere
TESTS = ("tests/losses/test_cuda.py", "tests/kernels")
ON_A_CARD = "gpu or cuda or bfloat16"  # of their names
TRAINER = ("numpy", "PIL", "yaml", "rich", "safetensors", "sklearn")
RESTARTS = 6
LOG_TAIL = 12000
CLOCK_EVERY = 5.0  # seconds
DONE, CUT, DIED = "done", "cut short", "died"


class Job(NamedTuple):
    """A process of a part. With ``rows`` it appends rows to a file and can go on after a crash."""

    name: str
    command: list[str]
    rows: bool = True
    environment: dict[str, str] | None = None


class Part(NamedTuple):
    """What is run together, for at most so many seconds, and how its output becomes figures."""

    seconds: float
    jobs: Callable[[argparse.Namespace, Path], list[Job]]
    figures: Callable[[str], Row] | None = None  # of a job's output


def bench(name: str, script: str, *flags: str, budget: float | None = None) -> Job:
    """A bench; it begins nothing new when its budget is spent."""
    limit = [] if budget is None else ["--budget", str(budget)]
    return Job(name, [sys.executable, str(BENCH / script), *flags, *limit])


def common(args: argparse.Namespace) -> list[str]:
    return ["--device", args.device, *(["--quick"] if args.quick else [])]


def sanity(args: argparse.Namespace, folder: Path) -> list[Job]:
    """Every kernel against float64; beside it, what the next parts need is compiled."""
    dtypes = ("bfloat16", "float16", "float32") if args.device == "cuda" else ("float32",)
    flags = ["--device", args.device, *(["--small"] if args.quick else [])]
    jobs = [
        bench(f"{target}-{dtype}", "check_kernels.py", "--case", target, "--dtype", dtype, *flags)
        for target in (("hidden",) if args.quick else ("hidden", "scores", "probs"))
        for dtype in dtypes
    ]
    if args.device == "cuda":
        flags = ["--warm", "--providers", "triton", "triton-lse", "compile", *common(args)]
        jobs += [
            bench(f"warm-{case}", "bench_losses.py", "--suite", "main", "--case", case, *flags)
            for case in MAIN_CASES
        ]
    return jobs


def losses(
    suite: str, seconds: float, *flags: str, providers: str = ""
) -> Callable[[argparse.Namespace, Path], list[Job]]:
    def jobs(args: argparse.Namespace, folder: Path) -> list[Job]:
        chosen = ["--providers", *providers.split()] if providers else []
        if args.quick:
            chosen = ["--providers", "triton", "blockwise", "eager", "--case", "layers1"]
            chosen = chosen if suite == "growth" else [*chosen[:-1], "hidden"]
        flags_ = ["--suite", suite, *chosen, *flags, *common(args)]
        return [bench(suite, "bench_losses.py", *flags_, budget=max(5.0, seconds - 15))]

    return jobs


def kernels(part: str, seconds: float) -> Callable[[argparse.Namespace, Path], list[Job]]:
    def jobs(args: argparse.Namespace, folder: Path) -> list[Job]:
        flags = ["--part", part, *common(args)]
        if args.quick:
            flags += ["--case", "hidden"]
        if part == "tune":
            flags += ["--write", str(Path(args.results) / "launch-tuned.py")]
        budget = max(5.0, args.seconds - 20 if part == "tune" else seconds - 15)
        return [bench(part, "bench_kernels.py", *flags, budget=budget)]

    return jobs


def suite(args: argparse.Namespace, folder: Path) -> list[Job]:
    """The tests that need torch, triton, numpy and pytest; a file that needs more is named."""
    if importlib.util.find_spec("pytest") is None:
        return []
    command = [
        sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider",
        "--continue-on-collection-errors", "--durations=5",
        # other packages' warnings are theirs, and other versions have other ones
        "-W", "default", "--ignore", "tests/kernels/test_resources.py",
    ]  # fmt: skip
    if not args.quick:
        command += ["-k", ON_A_CARD]
    if importlib.util.find_spec("xdist") is not None:  # compiling takes most of the time
        command += ["-p", "xdist", "-n", str(min(8, os.cpu_count() or 1))]
    paths = ("tests/losses/test_reference.py",) if args.quick else TESTS
    # no plugin that happens to be installed may change what a test sees
    return [Job("pytest", [*command, *paths], False, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})]


def test_figures(output: str) -> Row:
    """Counts, and the tests that failed with the reason where pytest came to its summary."""
    words = ("PASSED", "FAILED", "SKIPPED", "ERROR", "XFAIL")
    found = {word.lower(): 0 for word in words}
    wrong: dict[str, str] = {}
    for line in output.splitlines():
        # name and word, or with workers [gw0] [ 10%] word and name; a summary begins with the word
        match = re.match(
            rf"(?:\[gw\d+\] )?(?:\[ *\d+%\] )?(\S+::.+? )?({'|'.join(words)})\b(.*)", line
        )
        if match is None or not (match[1] or match[3].strip()):
            continue
        name = (match[1] or match[3].partition(" - ")[0]).strip()
        if match[1] or line.startswith("["):
            found[match[2].lower()] += 1
        if match[2] in ("FAILED", "ERROR"):
            wrong[name] = line if line.startswith(match[2]) else f"{match[2]} {name}"
    return {**found, "wrong": list(wrong.values())[:60]}


def sanitizer(args: argparse.Namespace, folder: Path) -> list[Job]:
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
    )
    if tool is None or args.device != "cuda":
        return []
    check = [sys.executable, str(BENCH / "check_kernels.py"), "--small", "--dtype", "bfloat16"]
    # else an access past a tensor lands in PyTorch's pool and goes unseen
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Job(f"{kind}-{target}", [tool, "--tool", kind, *check, "--case", target], False, alone)
        for kind, target in (("racecheck", "probs"), ("memcheck", "probs"), ("memcheck", "hidden"))
    ]


def sanitizer_figures(output: str) -> Row:
    return {"summary": re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)", output)[-1:]}


def missing_for_training() -> list[str]:
    return [name for name in TRAINER if importlib.util.find_spec(name) is None]


def training(args: argparse.Namespace, folder: Path) -> list[Job]:
    """A short run of the built-in task, compiled."""
    if missing_for_training():
        return []
    sizes = (60, 8, 4, 4) if args.quick else (2000, 150, 100, 32)
    names = ("train-images", "steps", "teacher-steps", "batch-size")
    flags = [f"--{name}={value}" for name, value in zip(names, sizes, strict=True)]
    flags += ["--method=layerwise", f"--device={args.device}", f"--out={folder / 'run'}"]
    flags += ["--compile=off", "--warmup-steps=1"] if args.quick else ["--compile=on"]
    flags += [f"--cache={folder / 'cache'}", "--resume=never"]
    return [Job("vqa", [sys.executable, "-m", "optima_fast.train", *flags], False)]


WHY_EMPTY = {
    "tests": lambda: "pytest is not installed",
    "sanitizer": lambda: "there is no compute-sanitizer here (or no CUDA device)",
    "training": lambda: f"not installed: {', '.join(missing_for_training())}",
}
MAIN_CASES = tuple(case.name for case in SUITES["main"])
MAIN = "triton triton-lse eager autocast gemm"  # blockwise: thousands of launches a step
RIVALS = "triton textbrewer tinybert automodel triton-recompute"
# seconds are the most a part gets; those of a call fit in CALL_SECONDS
FIRST: dict[str, Part] = {
    "sanity": Part(80, sanity),
    "main": Part(105, losses("main", 105, "--seconds", "0.5", providers=f"{MAIN} compile")),
    "ceilings": Part(20, kernels("ceilings", 20)),
    "kernels": Part(25, kernels("kernels", 25)),
    "candidates": Part(60, kernels("sweep", 60)),
    "sanitizer": Part(40, sanitizer, sanitizer_figures),
}
SECOND: dict[str, Part] = {
    "headline": Part(110, losses("headline", 110, "--seconds", "0.5", providers=MAIN)),
    "tests": Part(90, suite, test_figures),
    "training": Part(40, training),
    "rivals": Part(30, losses("main", 30, "--seconds", "0.3", providers=RIVALS)),
    "loss-only": Part(15, losses("main", 15, "--loss-only", "--seconds", "0.3", providers=MAIN)),
    "growth": Part(40, losses("growth", 40, "--seconds", "0.1", providers=MAIN)),
}
PARTS = {**FIRST, **SECOND}
CALLS = {"1": tuple(FIRST), "2": tuple(SECOND)}
CALL_SECONDS = 330
# on demand: longer than a part of the default may be
MORE: dict[str, Part] = {
    "crossover": Part(
        60, losses("crossover", 60, "--seconds", "0.1", providers="triton blockwise eager")
    ),
    "sweep": Part(240, kernels("sweep", 240)),
    "tune": Part(550, kernels("tune", 550)),
    "max": Part(400, losses("headline", 400, providers="triton triton-lse compile compile-max")),
}


def machine(device: str) -> Row:
    """Card, driver, clocks and versions."""
    head, dirty = commit()
    facts: Row = {
        "date": time.strftime("%Y-%m-%d"),
        "time": time.strftime("%H:%M:%S%z"),
        "commit": head,
        "dirty": dirty,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        **{name: installed_version(name) for name in ("torch", "triton", "numpy")},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": card_state(),
    }
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        facts["card"] = p.name
        facts["multiprocessors"] = p.multi_processor_count
        facts["capability"] = f"{p.major}.{p.minor}"
        facts["memory"], facts["l2"] = p.total_memory, getattr(p, "L2_cache_size", None)
    else:
        facts["card"] = f"no-gpu-{platform.machine()}"
    return facts


class Results:
    """The file, written whole each time, so that it is never half a file."""

    def __init__(self, folder: Path, facts: Row) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", facts["card"].lower()).strip("-")
        self.path = folder / f"{slug}-{facts['date']}-{facts['commit']}.json"
        self.content: Row = {"machine": facts, "parts": {}}
        if self.path.exists():
            self.content["parts"] = json.loads(self.path.read_text(encoding="utf-8"))["parts"]
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, part: str, row: Row) -> None:
        self.content["parts"][part] = row
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


class Running:
    """A job's process, its log, and the rows it has written."""

    def __init__(self, job: Job, folder: Path, environment: dict[str, str]) -> None:
        self.job, self.environment = job, {**environment, **(job.environment or {})}
        self.rows_file = folder / f"{job.name}.jsonl"
        self.log = folder / f"{job.name}.log"
        self.restarts, self.status = 0, ""
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = list(self.job.command)
        if self.job.rows:
            command += ["--json", str(self.rows_file), "--resume"]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def poll(self) -> bool:
        """Whether it still runs; one that died in a cell goes on with the next."""
        if self.status:
            return False
        if self.process.poll() is None:
            return True
        died = self.job.rows and self.rows_file.with_suffix(".started").exists()
        if died and self.restarts < RESTARTS:
            self.restarts += 1
            self.process = self._start()
            return True
        self.status = DIED if died else DONE
        return False

    def stop(self) -> None:
        if not self.status:
            self.status = CUT
        # its own children too
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(3)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def rows(self) -> list[Row]:
        if not self.rows_file.exists():
            return []
        lines = self.rows_file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def result(self, figures: Callable[[str], Row] | None) -> Row:
        output = self.log.read_text(encoding="utf-8", errors="replace")
        row: Row = {"status": self.status or "running", "code": self.process.poll()}
        if self.restarts:
            row["restarts"] = self.restarts
        if self.job.rows:
            row["rows"] = self.rows()
        if figures is not None:
            row.update(figures(output))
        if row["code"] != 0 or not self.job.rows:
            row["log"] = output[-LOG_TAIL:]
        return row


def environment(args: argparse.Namespace) -> dict[str, str]:
    found = {**os.environ, "PYTHONUNBUFFERED": "1"}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), found.get("PYTHONPATH")]))
    found.pop("TRITON_INTERPRET", None)
    if args.device != "cuda":
        found["TRITON_INTERPRET"] = "1"
    return found


def run_part(name: str, seconds: float, args: argparse.Namespace, results: Results) -> Row:
    part = {**PARTS, **MORE}[name]
    folder = Path(tempfile.mkdtemp(prefix=f"optima-gpu-{name}-"))
    start, clocks, saved = time.monotonic(), [], 0.0
    jobs = part.jobs(args, folder)
    if not jobs:
        row: Row = {"status": "left out", "why": WHY_EMPTY[name]()}
        results.save(name, row)
        return row
    row = {"status": "running", "limit": round(seconds), "jobs": {}}
    # sanitizers one after the other would need the time of all; nothing is timed while they run
    running = [Running(job, folder, environment(args)) for job in jobs]
    read_at = -CLOCK_EVERY
    try:
        while sum(r.poll() for r in running) and time.monotonic() - start < seconds:
            time.sleep(0.2)
            now = time.monotonic() - start
            if args.device == "cuda" and now - read_at > CLOCK_EVERY:
                clocks.append(card_state().get("clocks.sm", ""))
                read_at = now
            if now - saved > 3:
                row["jobs"] = {r.job.name: r.result(None) for r in running}
                results.save(name, row)
                saved = now
    finally:
        for r in running:
            r.stop()
        row["jobs"] = {r.job.name: r.result(part.figures) for r in running}
        states = {r.status for r in running}
        row["status"] = next(s for s in (CUT, DIED, DONE) if s in states)
        row["seconds"] = round(time.monotonic() - start, 1)
        megahertz = [int(x.split()[0]) for x in clocks if x[:1].isdigit()]
        if megahertz:
            row["sm_mhz"] = [min(megahertz), statistics.median(megahertz), max(megahertz)]
        if name == "training" and (folder / "run" / "summary.json").exists():
            row["run"] = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
        results.save(name, row)
        shutil.rmtree(folder, ignore_errors=True)
    return row


def troubles(row: Row) -> list[str]:
    """What went wrong in a part, in a line each."""
    found = []
    for name, job in row.get("jobs", {}).items():
        found += [
            f"{name}: {x.get('case')} {x.get('provider')}: {x['failed']}"
            for x in job.get("rows", ())
            if "failed" in x
        ]
        found += [f"{name}: {line}" for line in job.get("wrong", ())]
        found += [f"{name}: {x}" for x in job.get("summary", ()) if not re.match(r"0 ", x)]
        if job["code"] not in (0, None) and not found:
            last = [line for line in job.get("log", "").splitlines() if line.strip()]
            found.append(f"{name}: exit code {job['code']}: {' '.join(last[-1:])}")
    return found


def show_part(name: str, row: Row) -> None:
    seconds = f"{row['seconds']:6.0f} s" if "seconds" in row else ""
    print(f"{name:10} {row['status']:10} {seconds} {row.get('why', '')}", flush=True)
    for job, x in row.get("jobs", {}).items():
        if "passed" in x:
            counts = ", ".join(f"{x[k]} {k}" for k in ("passed", "failed", "error", "skipped"))
            print(f"    {job}: {counts}")
        for line in x.get("summary", ()):
            print(f"    {job}: {line}")
    for line in troubles(row)[:12]:
        print(f"    {line[:160]}")


def show_losses(parts: dict[str, Row]) -> None:
    """Ours against each other contender, from every part that timed the headline cases."""
    for name in ("main", "headline", "rivals", "loss-only", "max"):
        by_case: dict[str, dict[str, Row]] = {}
        for job in parts.get(name, {}).get("jobs", {}).values():
            for row in job.get("rows", ()):
                if "ms" in row:
                    by_case.setdefault(row["case"], {})[row["provider"]] = row
        for case, found in by_case.items():
            for ours in ("triton", "triton-lse", "triton-recompute"):
                if ours not in found:
                    continue
                mine = found[ours]
                floor = (
                    f", {mine['floor_ms'] / mine['ms']:.0%} of the floor"
                    if "floor_ms" in mine
                    else ""
                )
                others = ", ".join(
                    f"{k} {x['ms'] / mine['ms']:.2f}x"
                    for k, x in found.items()
                    if not k.startswith(ours)
                )
                print(f"{name:9} {case:22} {ours} {mine['ms']:.4f} ms{floor}; {others}")


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--call", choices=CALLS, help="one half of it; default: both")
    parser.add_argument("--part", nargs="+", choices=[*PARTS, *MORE], help="these parts alone")
    parser.add_argument(
        "--seconds", type=float, default=None,
        help=f"for everything; also GPU_SECONDS (default {CALL_SECONDS} a call)",
    )  # fmt: skip
    parser.add_argument("--results", default=str(BENCH / "results"), metavar="FOLDER")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a run or two")
    args = parser.parse_args(argv)
    if args.seconds is None:
        calls = 1 if args.call or args.part else len(CALLS)
        args.seconds = float(os.environ.get("GPU_SECONDS", CALL_SECONDS * calls))
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"must have a CUDA device, got PyTorch {torch.__version__} that sees none; give the"
            " python that does (make gpu PYTHON=...), or --quick --device cpu to run the code alone"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    names = list(dict.fromkeys(args.part or CALLS.get(args.call, tuple(PARTS))))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is stopped, and saved
    results = Results(Path(args.results), machine(args.device))
    facts = results.content["machine"]
    print(", ".join(f"{k} {v}" for k, v in facts.items() if k != "nvidia_smi"), flush=True)
    start = time.monotonic()
    known = {**PARTS, **MORE}
    spare = args.seconds - sum(known[name].seconds for name in names)
    for name in names:
        left = args.seconds - (time.monotonic() - start)
        share = min(
            left, known[name].seconds + max(0.0, spare) if args.part else known[name].seconds
        )
        if share < 5:
            row: Row = {"status": "left out", "why": "no time left"}
        else:
            row = run_part(name, share, args, results)
        results.save(name, row)
        show_part(name, row)
    print()
    show_losses({name: results.content["parts"][name] for name in names})
    print(f"\nwritten to {results.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
