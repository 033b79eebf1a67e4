"""`make gpu`: what only a CUDA device can tell, in two calls of less than 330 seconds each.

    python bench/gpu.py --call 1    # ceilings, checks, each kernel, launch tables, the main rivals
    python bench/gpu.py --call 2    # every headline case, tests, a compiled training run
    python bench/gpu.py --part kernels candidates --seconds 200     # parts by name
    python bench/gpu.py --call 1 --quick --device cpu --results FOLDER   # its code, without a GPU

It needs torch, triton and numpy, for the tests pytest, and installs nothing; it does without
pytest-benchmark, since its own processes time what `pytest bench` times. It writes one file,
bench/results/<card>-<date>-<commit>.json, again every few seconds; a part that fails, hangs or runs
out of time costs no other part's results, and what a part leaves of its time goes to the next.
Calls and parts run apart land in the same file. Without git the commit is OPTIMA_FAST_COMMIT's.
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
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from measuring import ROOT, Row, card_state, commit, installed_version

# isort: split
import torch

BENCH = ROOT / "bench"
TRAINER = ("numpy", "PIL", "yaml", "rich", "safetensors", "sklearn")
CALL_SECONDS = 325
RESTARTS = 6
LOG_TAIL = 12000
CLOCK_EVERY = 5.0  # seconds
DONE, CUT, DIED = "done", "cut short", "died"
MAIN = ("triton", "eager", "autocast", "compile")
MORE_OF_MAIN = ("triton", "triton-lse", "eager", "autocast", "gemm", "compile")
LOOPS = ("triton", "triton-recompute", "automodel", "textbrewer", "tinybert")
ATTENTION = ("sdpa", "sdpa-lse", "xformers-lse")


class Job(NamedTuple):
    """A process of a part. With ``rows`` it appends rows to a file and can go on after a crash."""

    name: str
    command: list[str]
    rows: bool = True
    environment: dict[str, str] | None = None


class Part(NamedTuple):
    """What is run together, for at most so many seconds, and how its output becomes figures."""

    seconds: float
    jobs: Callable[[argparse.Namespace, Path, float], list[Job]]
    figures: Callable[[str], Row] | None = None  # of the output of a job without rows


def script(args: argparse.Namespace, name: str, *words: str) -> list[str]:
    return [sys.executable, str(BENCH / name), *words, "--device", args.device]


def card(*words: str) -> Callable[[argparse.Namespace, Path, float], list[Job]]:
    """A part of bench/card.py; it begins nothing new shortly before its time is over."""

    def jobs(args: argparse.Namespace, folder: Path, seconds: float) -> list[Job]:
        few = "kl-image1024" if "others-card" in words and "six" not in words else "hidden32k"
        quick = ["--quick", "--case", few] if args.quick else []
        command = script(args, "card.py", *words, "--budget", str(max(5, seconds - 12)), *quick)
        return [Job(words[0], command)]

    return jobs


def compilers(*words: str) -> Callable[[argparse.Namespace, Path, float], list[Job]]:
    """Everything that the call measures is compiled once, in a process a core."""

    def jobs(args: argparse.Namespace, folder: Path, seconds: float) -> list[Job]:
        count = 1 if args.quick else min(16, os.cpu_count() or 1)
        few = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        (job,) = card("compile", *words)(args, folder, seconds)
        return [
            Job(f"compile-{i}", [*job.command, "--shard", f"{i}/{count}"], environment=few)
            for i in range(count)
        ]

    return jobs


def check(args: argparse.Namespace, folder: Path, seconds: float) -> list[Job]:
    """bfloat16, which the interpreter cannot multiply, against float64; a cell a process."""
    kind = "bfloat16" if args.device == "cuda" else "float32"
    cells = [
        *(f"hidden-{x}" for x in ("tile", "odd", "large")),
        *(
            f"{t}-{x}"
            for t in ("scores", "probs", "kl", "kl-mean")
            for x in ("tile", "odd", "large", "narrow", "shared", "window")
        ),
    ]
    return [
        Job(cell, script(args, "check.py", "--case", cell, "--dtype", kind))
        for cell in (cells[1:2] if args.quick else cells)
    ]


def races(args: argparse.Namespace, folder: Path, seconds: float) -> list[Job]:
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
    )
    if tool is None or args.device != "cuda":
        return []
    return [
        Job(
            cell,
            [tool, "--tool", "racecheck",
             *script(args, "check.py", "--case", cell, "--dtype", "bfloat16", "--once")],
            rows=False,
            # else an access past a tensor lands in PyTorch's pool and goes unseen
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for cell in ("probs-odd", "probs-large")
    ]  # fmt: skip


def race_figures(output: str) -> Row:
    return {"summary": re.findall(r"=+ RACECHECK SUMMARY: (.*)", output)[-1:]}


def tests(args: argparse.Namespace, folder: Path, seconds: float) -> list[Job]:
    """Those that only a card can run; the interpreter runs the others everywhere."""
    if importlib.util.find_spec("pytest") is None:
        return []
    command = [
        sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider",
        # other packages' warnings are theirs, and other versions have other ones
        "--continue-on-collection-errors", "-W", "default",
    ]  # fmt: skip
    if importlib.util.find_spec("xdist") is not None and not args.quick:
        command += ["-p", "xdist", "-n", str(min(8, os.cpu_count() or 1))]  # compiling takes most
    if args.quick:
        command += ["tests/losses/test_cuda.py", "tests/distill/test_arms.py"]
    else:
        command += ["-m", "gpu", "tests/losses", "tests/kernels"]
    # no plugin that happens to be installed may change what a test sees
    return [Job("pytest", command, False, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})]


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


def missing_for_training() -> list[str]:
    return [name for name in TRAINER if importlib.util.find_spec(name) is None]


def training(args: argparse.Namespace, folder: Path, seconds: float) -> list[Job]:
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


STEP = ("--compiled", "288", "--ways", *("logits", "scores", "probs", "usual"))


def steps(args: argparse.Namespace, folder: Path, seconds: float) -> list[Job]:
    """Whole steps of CoCa, eager and compiled."""
    words = ["--quick"] if args.quick else STEP
    return [Job("step", script(args, "bench_step.py", *words))]


def by_triton(args: argparse.Namespace, folder: Path, seconds: float) -> list[Job]:
    """The six cases launched by Triton, whose ``wall_ms`` stands beside that of ``six``."""
    (job,) = card("losses", "--providers", "triton")(args, folder, seconds)
    return [job._replace(environment={"OPTIMA_FAST_LAUNCHER": "triton"})]


def without_a_clock(args: argparse.Namespace, folder: Path, seconds: float) -> list[Job]:
    """Side by side what times nothing: compilers, those of a step too, and the tests."""
    suites = ("--suite", "headline", "others-card")
    jobs = compilers(*suites, "--providers", "triton", "triton-lse", "compile")(
        args, folder, seconds
    )
    if not args.quick:
        words = ("--sides", *STEP, "--seconds", "0")
        jobs.append(Job("compile-step", script(args, "bench_step.py", *words)))
    return [*jobs, *tests(args, folder, seconds)]


WHY_EMPTY: dict[str, Callable[[], str]] = {
    "tests": lambda: "pytest is not installed",
    "races": lambda: "there is no compute-sanitizer here (or no CUDA device)",
    "training": lambda: f"not installed: {', '.join(missing_for_training())}",
}
# seconds are what a part may count on, those of a call together its limit
CALLS: dict[str, dict[str, Part]] = {
    "1": {
        "ceilings": Part(15, card("ceilings")),
        "compile": Part(
            80,
            compilers(
                "--suite", *("six", "others-card"), "--providers", *("triton", "compile"),
                "--candidates",
            ),
        ),
        "check": Part(45, check),
        "races": Part(20, races, race_figures),
        "kernels": Part(30, card("kernels", "--suite", "six", "others-card")),
        "candidates": Part(60, card("candidates", "--suite", "others-card", "six")),
        "six": Part(60, card("losses", "--providers", *MAIN)),
        "six-by-triton": Part(15, by_triton),
    },
    "2": {
        "compile-and-test": Part(100, without_a_clock, test_figures),
        "headline": Part(75, card("losses", "--suite", "headline", "--providers", *MORE_OF_MAIN)),
        "others": Part(50, card("losses", "--suite", "others-card", "--providers", *MAIN)),
        "step": Part(75, steps),
        "training": Part(20, training),
    },
}  # fmt: skip
# on demand
MORE: dict[str, Part] = {
    "tests": Part(60, tests, test_figures),
    "attention": Part(25, card("losses", "--case", "probs", "--providers", *ATTENTION)),
    "loops": Part(35, card("losses", "--providers", *LOOPS)),
    "loss-only": Part(60, card("losses", "--loss-only", "--providers", *MAIN[:3])),
    "growth": Part(120, card("losses", "--suite", "growth", "--providers", *MAIN[:3])),
    "crossover": Part(
        120,
        card("losses", "--suite", "crossover", "--providers", "triton", "blockwise", "eager"),
    ),
    "neighbours": Part(300, card("candidates", "--reach", "1")),
}
PARTS = {**CALLS["1"], **CALLS["2"], **MORE}


def built_launcher() -> str:
    """Who launches kernels; the extension is built first where a compiler is, in ten seconds."""
    if importlib.util.find_spec("triton") is None:
        return "nobody: Triton is not installed"
    code = "from optima_fast.kernels import launcher; print(launcher.who())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    compiler = shutil.which("c++")
    if importlib.util.find_spec("optima_fast._launch") is None and compiler is not None:
        torch_headers = Path(torch.__file__).parent / "include"  # pybind11's are among them
        target = ROOT / "optima_fast" / f"_launch{sysconfig.get_config_var('EXT_SUFFIX')}"
        command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden"]
        command += ["-I", sysconfig.get_path("include"), "-I", str(torch_headers)]
        command += [str(ROOT / "csrc" / "launch.cpp"), "-o", str(target), "-ldl"]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            print(built.stderr[-2000:])
    asked = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    return asked.stdout.strip() or asked.stderr.strip()[-300:]


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
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "nvidia_smi": card_state(),
    }
    if device == "cuda":
        facts["launcher"] = built_launcher()
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
        if figures is not None and not self.job.rows:
            row.update(figures(output))
        if row["code"] != 0:
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
    part = PARTS[name]
    folder = Path(tempfile.mkdtemp(prefix=f"optima-gpu-{name}-"))
    start, clocks, saved = time.monotonic(), [], 0.0
    jobs = part.jobs(args, folder, seconds)
    if not jobs:
        row: Row = {"status": "left out", "why": WHY_EMPTY[name]()}
        results.save(name, row)
        return row
    row = {"status": "running", "limit": round(seconds), "jobs": {}}
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
    """Of every part that timed losses: ours against each other contender, then the peaks."""
    for name, part in parts.items():
        by_case: dict[str, list[Row]] = {}
        for job in part.get("jobs", {}).values():
            for row in job.get("rows", ()):
                if "peak_mb" in row:
                    by_case.setdefault(row["case"], []).append(row)
        for case, rows in by_case.items():
            for mine in (row for row in rows if row["ours"]):
                floor = f", {mine['share']:.0%} of the floor" if mine["share"] else ""
                others = ", ".join(
                    f"{x['provider']} {x['ms'] / mine['ms']:.2f}x" for x in rows if x is not mine
                )
                print(f"{name:9} {case:22} {mine['provider']} {mine['ms']:.4f} ms{floor}; {others}")
        for case, rows in by_case.items():
            peaks = ", ".join(f"{x['provider']} {x['peak_mb']:.0f}" for x in rows)
            print(f"{name:9} {case:22} peak MB: {peaks}")


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--call", choices=CALLS, default="1")
    chosen.add_argument("--part", nargs="+", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=CALL_SECONDS, help="for everything")
    parser.add_argument("--results", default=str(BENCH / "results"), metavar="FOLDER")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a run or two")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"must have a CUDA device, got PyTorch {torch.__version__} that sees none; give the"
            " python that does (make gpu PYTHON=...), or --quick --device cpu to run the code alone"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    names: list[str] = args.part or list(CALLS[args.call])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is stopped, and saved
    results = Results(Path(args.results), machine(args.device))
    facts = results.content["machine"]
    print(", ".join(f"{k} {v}" for k, v in facts.items() if k != "nvidia_smi"), flush=True)
    end = time.monotonic() + args.seconds
    for i, name in enumerate(names):
        later = sum(PARTS[x].seconds for x in names[i + 1 :])
        left = end - time.monotonic()
        share = max(left - later, min(left, PARTS[name].seconds))
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
