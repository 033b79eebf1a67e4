"""Kernels: what the card can do, where a loss spends its time, and launch configurations.

    python bench/bench_kernels.py                    # ceilings, then the time of each kernel
    python bench/bench_kernels.py --part ceilings    # copies, cuBLAS, flash attention, normalisers
    python bench/bench_kernels.py --part kernels     # each launch of a step, from the profiler
    python bench/bench_kernels.py --part sweep       # neighbours of the table's entries, timed
    python bench/bench_kernels.py --tune             # more of them; prints the best
    python bench/bench_kernels.py --tune --write kernels/launch.py      # and writes them there
    python bench/bench_kernels.py --quick --device cpu    # its code, tiny shapes

Every part but ``ceilings`` measures the Triton kernels and needs CUDA, or TRITON_INTERPRET=1 for
``--quick``. A configuration is timed as the step that uses it, forward and backward, next to the
table's own, and only if its result is right. bench/tuning.py has the logic.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from measuring import (
    DTYPES,
    Budget,
    Rows,
    Spread,
    Step,
    Timer,
    allowed_error,
    commit,
    conditions,
    interleave,
    lost,
    one_line,
    relative_error,
    tidy,
)

# isort: split
import contenders
import torch
import torch.nn.functional as F
import tuning
from cases import Case, Layer, exact, inputs, shrunk
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CASES = [
    Case("hidden32k-x2", "hidden", (Layer(32, 1024, 0),) * 2),
    Case("image1024-probs", "probs", (Layer(32, 1024, 1024),)),
    Case("image256-probs", "probs", (Layer(64, 256, 256),) * 2),
    Case("text77-probs", "probs", (Layer(256, 77, 77, causal=True),) * 4),
    Case("cross64x256-probs", "probs", (Layer(256, 64, 256),) * 4),
    Case("image1024-scores", "scores", (Layer(32, 1024, 1024),)),
    Case("text77-scores", "scores", (Layer(256, 77, 77, causal=True),) * 4),
    Case("text64-scores", "scores", (Layer(256, 64, 64),) * 4),
]
FINALISTS = 4
SAMPLES = 12  # of a candidate; finalists get four times as many
KINDS = ("kernels", "sweep", "tune")
Chosen = dict[tuning.Entry, tuple[Any, str]]  # the configuration and where it is from


def ceilings(
    device: str, dtype: torch.dtype, quick: bool
) -> Iterator[tuple[str, Step, float, str]]:
    """Name, what to time, and what it does: FLOP or bytes."""
    scale = 32 if quick else 1

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32).to(kind)

    big = normal(2**29 // (scale * scale * 64))
    into = torch.empty_like(big)
    yield "copy", lambda: into.copy_(big), 2 * big.nbytes, "bytes"
    n = 8192 // scale
    a, b = normal(n, n), normal(n, n)
    yield f"product {n}^3", lambda: a @ b, 2.0 * n**3, "flop"
    d_s, d_t = 768 // scale, 1024 // scale
    for tokens in (32768 // scale, 8192 // scale):
        s, e = normal(tokens, d_s), normal(tokens, d_t)
        w = normal(d_s, d_t)
        flop = 2.0 * tokens * d_s * d_t
        yield f"hidden E, {tokens} tokens", lambda s=s, w=w: s @ w, flop, "flop"
        yield f"hidden dHs, {tokens} tokens", lambda e=e, w=w: e @ w.t(), flop, "flop"
        yield f"hidden dW, {tokens} tokens", lambda s=s, e=e: s.t() @ e, flop, "flop"
        if device == "cuda" and hasattr(torch.ops.aten.mm, "dtype"):
            yield (
                f"hidden dW float32, {tokens} tokens",
                lambda s=s, e=e: torch.mm(s.t(), e, out_dtype=torch.float32),
                flop,
                "flop",
            )
    batch, n = (2, 32) if quick else (32, 1024)
    for width in (d_s, d_t):
        q, k = normal(batch, n, width), normal(batch, n, width)
        yield f"scores {width} wide", lambda q=q, k=k: q @ k.mT, 2.0 * batch * n * n * width, "flop"
    yield from _attention(device, dtype, normal, quick)


def _attention(
    device: str, dtype: torch.dtype, normal: Callable[..., Tensor], quick: bool
) -> Iterator[tuple[str, Step, float, str]]:
    """Flash attention, the yardstick for ``probs``, and the ways to get its log-sum-exp."""
    backends = {"math": SDPBackend.MATH}
    if device == "cuda":
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    shapes = [(2, 32, 32)] if quick else [(32, 1024, 1024), (64, 256, 256), (256, 64, 256)]
    for batch, n_q, n_k in shapes:
        for heads in (12, 16):
            q = normal(batch, n_q, heads, 64).transpose(1, 2).requires_grad_()
            k, v = (normal(batch, n_k, heads, 64).transpose(1, 2) for _ in range(2))
            k.requires_grad_()
            v.requires_grad_()
            flop = 4.0 * batch * heads * n_q * n_k * 64
            label = f"{batch}x{heads}x{n_q}x{n_k}"
            for name, backend in backends.items():

                def forward(q=q, k=k, v=v, backend=backend) -> Tensor:
                    with sdpa_kernel(backend):
                        return F.scaled_dot_product_attention(q, k, v)

                def both(forward=forward, leaves=(q, k, v)) -> object:
                    out = forward()
                    return torch.autograd.grad(out, leaves, out)

                yield f"{name} forward {label}", forward, flop, "flop"
                if heads == 12:
                    yield f"{name} both {label}", both, 3.5 * flop, "flop"
            if device == "cuda":
                yield from _normalisers(q, k, v, flop, label)


def _normalisers(
    q: Tensor, k: Tensor, v: Tensor, flop: float, label: str
) -> Iterator[tuple[str, Step, float, str]]:
    aten = torch.ops.aten
    q, k, v = (x.detach() for x in (q, k, v))
    yield (
        f"flash with lse {label}",
        lambda: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False),
        flop,
        "flop",
    )
    yield (
        f"cudnn with lse {label}",
        lambda: aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False),
        flop,
        "flop",
    )


def measure_ceilings(args: argparse.Namespace, rows: Rows, timer: Timer) -> None:
    samples = 2 if args.quick else 30
    for name, run, work, unit in ceilings(args.device, DTYPES[args.dtype], args.quick):
        if not rows.begin("ceilings", name):
            continue
        try:
            run()
            time_ = interleave({"x": run}, timer, seconds=0, least=samples)["x"]
        except Exception as mistake:  # a backend that this card or version lacks
            rows.add(case="ceilings", provider=name, failed=one_line(mistake))
            print(f"{name:36} {one_line(mistake)[:90]}", flush=True)
            continue
        rate = work / time_.ms * 1e3
        rows.add(case="ceilings", provider=name, **time_._asdict(), unit=unit, per_second=rate)
        shown = f"{rate / 1e12:9.1f} TFLOP/s" if unit == "flop" else f"{rate / 1e9:9.0f} GB/s"
        print(f"{name:36} {time_.ms:9.4f} ms {time_.iqr:8.4f} {shown}", flush=True)


class Bench:
    """A case, its Triton step, and whether a result is right."""

    def __init__(self, case: Case, args: argparse.Namespace) -> None:
        self.name = case.name
        case = shrunk(case) if args.quick else case
        self.bound = allowed_error(DTYPES[args.dtype])
        layers = inputs(case, DTYPES[args.dtype], args.device)
        self.exact = None if args.shard else exact(case, layers)
        self.run = contenders.step("triton", case, layers)

    def error(self) -> float:
        """Relative error of losses and gradients; RuntimeError if it is too large."""
        found = self.run()
        error = 0.0 if self.exact is None else relative_error(found, self.exact)
        if not error < self.bound:
            raise RuntimeError(f"WRONG (relative error {error:.1e})")
        return error


def measure_kernels(args: argparse.Namespace, rows: Rows, timer: Timer, budget: Budget) -> None:
    """Time of each kernel of a step, as the profiler sees it; the L2 cache is overwritten first."""
    steps = 1 if args.quick else 20
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if timer.cuda else [kinds.CPU]
    for case in CASES:
        if budget.spent or args.case not in case.name or not rows.begin("kernels", case.name):
            continue
        try:
            bench = Bench(case, args)
            error = bench.error()
            with torch.profiler.profile(activities=activities) as profiler:
                for _ in range(steps):
                    if timer.cuda:
                        timer.cache.zero_()
                    bench.run()
                if timer.cuda:
                    torch.cuda.synchronize()
        except Exception as mistake:
            rows.add(case="kernels", provider=case.name, failed=one_line(mistake))
            print(f"{case.name:22} {one_line(mistake)}", flush=True)
            continue
        times: dict[str, list[float]] = defaultdict(list)
        for event in profiler.events():
            # with a device, what ran there and not the operators that launched it
            if (event.device_type != torch.autograd.DeviceType.CPU) == timer.cuda:
                times[event.name].append(event.time_range.elapsed_us() / 1e3)
        found = {
            name: {"calls": len(x) / steps, "ms_each": sorted(x)[len(x) // 2]}
            for name, x in sorted(times.items(), key=lambda item: -sum(item[1]))
        }
        rows.add(
            case="kernels", provider=case.name, error=error, kernels=dict(list(found.items())[:16])
        )
        for name, x in list(found.items())[: 4 if args.quick else 10]:
            print(
                f"{case.name:22} {x['calls']:5.1f} x {x['ms_each']:9.4f} ms  {name[:60]}",
                flush=True,
            )


class Sweep:
    """The candidates for one entry of a table, in a step that uses it."""

    def __init__(self, bench: Bench, table: dict[tuning.Key, Any], key: tuning.Key) -> None:
        self.bench, self.table, self.key = bench, table, key
        self.times: dict[Any, Spread] = {}
        self.refused: dict[Any, str] = {}

    def _step(self, config: Any) -> Step:
        def run() -> object:
            self.table[self.key] = config
            return self.bench.run()

        return run

    def check(self, configs: Iterable[Any]) -> dict[Any, Step]:
        """Steps of those that work and are right."""
        steps = {}
        for config in configs:
            self.table[self.key] = config
            try:
                self.bench.error()
                steps[config] = self._step(config)
            except Exception as mistake:  # too much shared memory, or the compiler gives up
                if lost(mistake):
                    raise
                self.refused[config] = one_line(mistake)
        return steps

    def winner(self, current: Any, configs: Sequence[Any], timer: Timer, samples: int) -> Any:
        """The best of all, found in a short round and a longer one between the first few."""
        steps = self.check(configs)
        if not steps:
            raise RuntimeError(f"no configuration works: {next(iter(self.refused.values()))}")
        self.times = dict(interleave(steps, timer, seconds=0, least=samples))
        finalists = sorted(self.times, key=lambda x: self.times[x].ms)[:FINALISTS]
        last = {x: steps[x] for x in dict.fromkeys([*finalists, current]) if x in steps}
        again = interleave(last, timer, seconds=0, least=4 * samples)
        self.times |= again
        return tuning.best(current if current in again else finalists[0], again)


def precompile(args: argparse.Namespace) -> None:
    """Fill Triton's cache from several processes, since compiling takes longer than timing."""
    settings = {"part": args.part, "case": args.case, "reach": args.reach, "dtype": args.dtype}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    workers = [
        subprocess.Popen([sys.executable, __file__, f"--shard={i}/{args.jobs}", *flags], **quiet)
        for i in range(args.jobs)
    ]
    end = time.monotonic() + (120.0 if args.budget is None else args.budget / 2)
    for worker in workers:
        try:
            worker.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()


def sweep(args: argparse.Namespace, rows: Rows, timer: Timer, budget: Budget) -> Chosen:
    """Time the neighbours of every table entry that a case uses, and take the best of each.

    With ``--shard`` the candidates are compiled only.
    """
    from optima_fast.kernels import launch

    major = torch.cuda.get_device_capability()[0] if timer.cuda else 8
    found = tuning.tables(launch)
    chosen: Chosen = {}
    for case in CASES:
        if budget.spent or args.case not in case.name:
            continue
        with tidy():
            try:
                bench = Bench(case, args)
                bench.error()
                entries = tuning.used(found, bench.run)
            except Exception as mistake:
                rows.add(case=case.name, provider=args.part, failed=one_line(mistake))
                print(f"{case.name:22} {one_line(mistake)}", flush=True)
                continue
            for entry in entries:
                mine = tuning.own(entry, major)
                name = f"{mine.table}{list(mine.key)}"
                if not (budget.spent or mine in chosen) and rows.begin(case.name, name):
                    listed = launch.CANDIDATES.get(mine.table, {}).get(mine.key, ())
                    table = found[entry.table]
                    sweep_entry(bench, table, entry, mine, listed, args, rows, timer, chosen)
    return chosen


def sweep_entry(
    bench: Bench,
    table: dict[tuning.Key, Any],
    entry: tuning.Entry,
    mine: tuning.Entry,
    listed: Sequence[Any],
    args: argparse.Namespace,
    rows: Rows,
    timer: Timer,
    chosen: Chosen,
) -> None:
    """Put the best configuration into the table, ``chosen`` and a row."""
    current, name = table[entry.key], f"{mine.table}{list(mine.key)}"
    configs = tuning.candidates(current, args.reach, listed)
    swept = Sweep(bench, table, mine.key)
    if args.shard:
        swept.check(configs[args.shard[0] :: args.shard[1]])
        table[mine.key] = current
        return
    try:
        few = configs[:2] if args.quick else configs
        winner = swept.winner(current, few, timer, 2 if args.quick else SAMPLES)
    except RuntimeError as mistake:
        table[mine.key] = current
        rows.add(case=bench.name, provider=name, failed=one_line(mistake))
        print(f"{bench.name:22} {name:28} {one_line(mistake)}", flush=True)
        if lost(mistake):
            raise
        return
    table[mine.key] = winner
    times = swept.times
    was = f"was {times[current].ms:.3f}" if current in times else "what was there does not run"
    stays = "as before" if winner == current else was
    provenance = f"{bench.name} {times[winner].ms:.3f} ms ({stays}), {stamp(rows)}"
    chosen[mine] = (winner, provenance)
    rows.add(
        case=bench.name,
        provider=name,
        fields=list(current._fields),
        current=list(current),
        winner=list(winner),
        times=[[list(x), *t] for x, t in sorted(times.items(), key=lambda item: item[1].ms)],
        refused=[[list(x), why] for x, why in swept.refused.items()],
    )
    print(
        f"{bench.name:22} {name:28} {times[winner].ms:9.4f} ms {tuple(winner)} ({stays});"
        f" {len(times)} timed, {len(swept.refused)} refused",
        flush=True,
    )


def stamp(rows: Rows) -> str:
    return f"{rows.common['device']}, {rows.common['date']}, commit {commit()[0]}"


def show(chosen: Chosen, target: str | None) -> None:
    """Print the entries, and write them if asked to."""
    from optima_fast.kernels import launch

    print("\nkernels/launch.py:")
    for entry, (config, provenance) in chosen.items():
        print(f"{entry.table}\n    # {provenance}\n    {tuning.literal(entry.key, config)}")
    if target is not None and chosen:
        tuning.write(Path(launch.__file__), chosen, Path(target))
        print(f"written to {target}; make resources and the tests say whether it holds")


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--part", choices=("ceilings", *KINDS), help="default: ceilings and kernels"
    )
    parser.add_argument("--tune", action="store_const", const="tune", dest="part")
    parser.add_argument("--write", metavar="FILE", help="with --tune: write the table there")
    parser.add_argument("--reach", type=int, choices=(1, 2), help="fields that may differ at once")
    parser.add_argument("--case", default="", help="cells whose name contains this")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a run or two")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, help="seconds after which nothing is begun")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile for a sweep")
    parser.add_argument("--json", metavar="FILE", help="append one line a cell")
    parser.add_argument("--resume", action="store_true", help="leave out cells that FILE has")
    parser.add_argument(
        "--shard",
        metavar="I/N",
        type=lambda text: tuple(map(int, text.split("/"))),
        help="compile every N-th candidate and time nothing",
    )
    args = parser.parse_args(argv)
    cuda = args.device == "cuda" and torch.cuda.is_available()
    if args.part in KINDS and not cuda and not args.quick:
        parser.error(
            f"--part {args.part} must have a CUDA device, got {args.device}, PyTorch"
            f" {torch.__version__}; TRITON_INTERPRET=1 with --quick --device cpu runs its code"
        )
    if args.device == "cuda" and not cuda:
        parser.error("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.reach = args.reach or (2 if args.part == "tune" else 1)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    torch.set_num_threads(args.threads)
    facts = conditions(args.device, args.dtype, args.threads)
    print(", ".join(f"{k} {v}" for k, v in facts.items()), flush=True)
    rows, timer = Rows(args.json, facts, resume=args.resume), Timer(args.device)
    budget = Budget(args.budget)
    if args.part in (None, "ceilings"):
        measure_ceilings(args, rows, timer)
    if args.part == "kernels" or (args.part is None and (timer.cuda or args.quick)):
        measure_kernels(args, rows, timer, budget)
    if args.part in ("sweep", "tune"):
        if timer.cuda and not args.shard:
            precompile(args)
        chosen = sweep(args, rows, timer, budget)
        if args.part == "tune" and not args.shard:
            show(chosen, args.write)
    rows.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
