"""What `make gpu` measures, a part at a time, each in a process of its own.

    python bench/card.py ceilings               # what the card can do: copies, cuBLAS, attention
    python bench/card.py compile --shard 0/16   # fill the compilers' caches; times nothing
    python bench/card.py kernels                # each launch of a step, from the profiler
    python bench/card.py candidates             # entries of the launch tables, side by side
    python bench/card.py candidates --reach 1   # their neighbours too, which takes minutes
    python bench/card.py losses --suite headline --providers triton eager compile
    python bench/card.py kernels --quick --device cpu    # its code, tiny shapes

Triton's kernels need CUDA, or TRITON_INTERPRET=1 with ``--quick``. A configuration is timed as the
step that uses it, forward and backward, next to the table's own, and only if its result is right;
bench/tuning.py has the logic. ``losses`` is what `pytest bench/bench_losses.py` measures too.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from measuring import (
    DTYPES,
    Budget,
    Row,
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
    spread,
    tidy,
)

# isort: split
import arena
import contenders
import torch
import torch.nn.functional as F
import tuning
from cases import SUITES, Case, exact, inputs, shrunk
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

PROVIDERS = ("triton", "triton-lse", "eager", "autocast", "gemm", "compile")
FINALISTS = 4
SAMPLES = 12  # of a candidate; finalists get four times as many
SHARDS = 4  # of the candidates of a case, to be compiled apart
CONTEXT_LOST = 3  # exit code: a new process can go on with --resume
CELL_SECONDS = 120  # a case that takes longer hangs, and ends the process


def ceilings(
    device: str, dtype: torch.dtype, quick: bool
) -> Iterator[tuple[str, Step, float, str]]:
    """Name, what to time, and what it does: FLOP or bytes."""
    scale = 32 if quick else 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)

    big = normal(2**29 // (scale * scale * 64))
    into = torch.empty_like(big)
    yield "copy", lambda: into.copy_(big), 2 * big.nbytes, "bytes"
    n = 8192 // scale
    a, b = normal(n, n), normal(n, n)
    yield f"product {n}^3", lambda: a @ b, 2.0 * n**3, "flop"
    d_s, d_t, tokens = 768 // scale, 1024 // scale, 32768 // scale
    s, e, w = normal(tokens, d_s), normal(tokens, d_t), normal(d_s, d_t)
    flop = 2.0 * tokens * d_s * d_t
    yield f"hidden E, {tokens} tokens", lambda: s @ w, flop, "flop"
    yield f"hidden dHs, {tokens} tokens", lambda: e @ w.t(), flop, "flop"
    yield f"hidden dW, {tokens} tokens", lambda: s.t() @ e, flop, "flop"
    batch, n = (2, 32) if quick else (32, 1024)
    for width in (d_s, d_t):
        q, k = normal(batch, n, width), normal(batch, n, width)
        flop = 2.0 * batch * n * n * width
        yield f"scores {width} wide", lambda q=q, k=k: q @ k.mT, flop, "flop"  # type: ignore[misc]
    # flash attention, the yardstick for probs
    backends = {"math": SDPBackend.MATH}
    if device == "cuda":
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for batch, n_q, n_k in [(2, 32, 32)] if quick else [(32, 1024, 1024), (256, 64, 256)]:
        leaves = [
            normal(batch, n, 12, 64).transpose(1, 2).requires_grad_() for n in (n_q, n_k, n_k)
        ]
        flop = 4.0 * batch * 12 * n_q * n_k * 64
        for name, backend in backends.items():

            def forward(leaves: list[Tensor] = leaves, backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(*leaves)  # type: ignore[arg-type]

            def both(
                leaves: list[Tensor] = leaves, forward: Callable[[], Tensor] = forward
            ) -> object:
                out = forward()
                return torch.autograd.grad(out, leaves, out)

            yield f"{name} forward {batch}x12x{n_q}x{n_k}", forward, flop, "flop"
            yield f"{name} both {batch}x12x{n_q}x{n_k}", both, 3.5 * flop, "flop"


def measure_ceilings(args: argparse.Namespace, rows: Rows, timer: Timer) -> None:
    samples = 2 if args.quick else 20
    for name, run, work, unit in ceilings(args.device, DTYPES[args.dtype], args.quick):
        if args.budget.spent or not rows.begin("ceilings", name):
            continue
        try:
            run()
            time_ = spread(interleave({"x": run}, timer, seconds=0, least=samples)["x"])
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
        self.bound = allowed_error(DTYPES[args.dtype])
        layers = inputs(case, DTYPES[args.dtype], args.device)
        self.exact = None if args.part == "compile" else exact(case, layers)
        self.run = contenders.step("triton", case, layers)

    def error(self) -> float:
        """Relative error of losses and gradients; RuntimeError if it is too large."""
        found = self.run()
        error = 0.0 if self.exact is None else relative_error(found, self.exact)
        if not error < self.bound:
            raise RuntimeError(f"WRONG (relative error {error:.1e})")
        return error


def measure_kernels(case: Case, args: argparse.Namespace, rows: Rows, timer: Timer) -> None:
    """Time of each kernel of a step, as the profiler sees it; the L2 cache is overwritten first."""
    steps = 1 if args.quick else 20
    kinds = torch.profiler.ProfilerActivity
    bench = Bench(case, args)
    error = bench.error()
    with torch.profiler.profile(
        activities=[kinds.CPU, kinds.CUDA] if timer.cuda else [kinds.CPU]
    ) as profiler:
        for _ in range(steps):
            if timer.cuda:
                timer.cache.zero_()
            bench.run()
        if timer.cuda:
            torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        # with a device, what ran there and not the operators that launched it
        if (event.device_type != torch.autograd.DeviceType.CPU) == timer.cuda:  # type: ignore[attr-defined]
            times[event.name].append(event.time_range.elapsed_us() / 1e3)
    ordered = sorted(times.items(), key=lambda item: -sum(item[1]))[:16]
    found = {
        name: {"calls": len(x) / steps, "ms_each": sorted(x)[len(x) // 2]} for name, x in ordered
    }
    rows.add(case=case.name, provider="kernels", error=error, kernels=found)
    for name, x in list(found.items())[: 4 if args.quick else 10]:
        print(f"{case.name:22} {x['calls']:5.1f} x {x['ms_each']:9.4f} ms  {name[:60]}", flush=True)


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

    def _time(self, steps: dict[Any, Step], timer: Timer, least: int) -> dict[Any, Spread]:
        found = interleave(steps, timer, seconds=0, least=least)
        return {config: spread(samples) for config, samples in found.items()}

    def winner(self, current: Any, configs: Sequence[Any], timer: Timer, samples: int) -> Any:
        """The best of all, found in a short round and a longer one between the first few."""
        steps = self.check(configs)
        if not steps:
            raise RuntimeError(f"no configuration works: {next(iter(self.refused.values()))}")
        self.times = self._time(steps, timer, samples)
        finalists = sorted(self.times, key=lambda x: self.times[x].ms)[:FINALISTS]
        last = {x: steps[x] for x in dict.fromkeys([*finalists, current]) if x in steps}
        again = self._time(last, timer, 4 * samples)
        self.times |= again
        return tuning.best(current if current in again else finalists[0], again)


def swept(
    bench: Bench, args: argparse.Namespace
) -> Iterator[tuple[tuning.Entry, Sweep, Any, list[Any]]]:
    """Of each entry that a case uses: its place on this card, sweep, configuration, candidates."""
    from optima_fast.kernels import launch

    major = torch.cuda.get_device_capability()[0] if args.device == "cuda" else 8
    bench.error()
    found = tuning.tables(launch)
    for entry in tuning.used(found, bench.run):
        mine = tuning.own(entry, major)
        table, listed = found[entry.table], launch.CANDIDATES.get(mine.table, {})
        current = table[entry.key]
        configs = tuning.candidates(current, args.reach, listed.get(mine.key, ()))
        yield mine, Sweep(bench, table, mine.key), current, configs[: 2 if args.quick else None]


def measure_candidates(case: Case, args: argparse.Namespace, rows: Rows, timer: Timer) -> None:
    """Add a row an entry, and leave the best in its table for the cases after this one."""
    for entry, sweep, current, configs in swept(Bench(case, args), args):
        name = f"{entry.table}{list(entry.key)}"
        if len(configs) == 1 or name in args.seen or args.budget.spent:
            continue
        if not rows.begin(case.name, name):
            continue
        args.seen.add(name)
        winner = current
        try:
            winner = sweep.winner(current, configs, timer, 2 if args.quick else SAMPLES)
        except RuntimeError as mistake:
            failed(rows, case.name, name, mistake)
            continue
        finally:
            sweep.table[entry.key] = winner
        times = sweep.times
        was = f"was {times[current].ms:.3f}" if current in times else "what was there does not run"
        stays = "as before" if winner == current else was
        facts = f"{rows.common['device']}, {rows.common['date']}, commit {commit()[0]}"
        source = tuning.literal(entry.key, winner)
        rows.add(
            case=case.name, provider=name, fields=list(current._fields),
            current=list(current), winner=list(winner),
            times=[[list(x), *t] for x, t in sorted(times.items(), key=lambda item: item[1].ms)],
            refused=[[list(x), why] for x, why in sweep.refused.items()],
            source=[f"# {case.name} {times[winner].ms:.3f} ms ({stays}), {facts}", source],
        )  # fmt: skip
        print(
            f"{case.name:22} {times[winner].ms:9.4f} ms ({stays}), {len(times)} timed,"
            f" {len(sweep.refused)} refused; {entry.table}: {source}",
            flush=True,
        )


def compile_all(args: argparse.Namespace, rows: Rows) -> None:
    """Run every cell of this shard once; candidates are apart, since each compiles its kernels."""
    cells: list[tuple[Case, str, int]] = []
    shards = 1 if args.quick else SHARDS
    if args.candidates:
        cells += [(case, "candidates", i) for case in chosen(args) for i in range(shards)]
    cells += [(case, x, 0) for x in args.providers for case in chosen(args)]
    first, step = args.shard
    for case, what, i in itertools.islice(cells, first, None, step):
        name = f"{what}-{i}" if what == "candidates" else what
        if what != "candidates" and case.target not in contenders.CONTENDERS[what].targets:
            continue
        if args.budget.spent or not rows.begin(case.name, name):
            continue
        try:
            with tidy():
                if what == "candidates":
                    for entry, sweep, current, configs in swept(Bench(case, args), args):
                        sweep.check(configs[i::shards])
                        sweep.table[entry.key] = current
                else:
                    layers = inputs(case, DTYPES[args.dtype], args.device)
                    contenders.step(what, case, layers)()
            rows.add(case=case.name, provider=name)
        except Exception as mistake:
            failed(rows, case.name, name, mistake)


def failed(rows: Rows, case: str, name: str, mistake: Exception) -> None:
    row = rows.add(case=case, provider=name, failed=one_line(mistake))
    print(f"{case:22} {name:16} {row['failed']}", flush=True)
    if lost(mistake):
        raise arena.ContextLostError from mistake


def measure_losses(case: Case, args: argparse.Namespace, rows: Rows, timer: Timer) -> None:
    settings = arena.Settings(args.device, args.dtype, args.seconds, args.least, args.backward)
    found, _ = arena.compare(case, args.providers, settings, timer, rows)
    for row in found.values():
        print(arena.line(row), flush=True)


CASE_BY_CASE: dict[str, Callable[[Case, argparse.Namespace, Rows, Timer], None]] = {
    "kernels": measure_kernels,
    "candidates": measure_candidates,
    "losses": measure_losses,
}


def chosen(args: argparse.Namespace) -> list[Case]:
    cases = [case for suite in args.suite for case in SUITES[suite] if args.case in case.name]
    return [shrunk(case) for case in cases] if args.quick else cases


def pair(text: str) -> tuple[int, int]:
    first, _, step = text.partition("/")
    return int(first), int(step)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=("ceilings", "compile", *CASE_BY_CASE))
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=("six",))
    parser.add_argument("--case", default="", help="cases whose name contains this")
    parser.add_argument("--providers", nargs="+", choices=contenders.CONTENDERS, default=PROVIDERS)
    parser.add_argument("--reach", type=int, choices=(0, 1, 2), default=0,
                        help="fields in which a neighbour of an entry may differ")  # fmt: skip
    parser.add_argument("--candidates", action="store_true", help="compile those too")
    parser.add_argument("--shard", type=pair, metavar="I/N", default=(0, 1))
    parser.add_argument("--loss-only", action="store_false", dest="backward", help="no gradient")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a run or two")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--seconds", type=float, default=0.5, help="least time for a case")
    parser.add_argument("--least", type=int, default=7, help="least samples of a provider")
    parser.add_argument("--budget", type=float, help="seconds after which nothing is begun")
    parser.add_argument("--json", metavar="FILE", help="append one line a cell")
    parser.add_argument("--resume", action="store_true", help="leave out cells that FILE has")
    args = parser.parse_args(argv)
    cuda = args.device == "cuda" and torch.cuda.is_available()
    if not cuda and not (args.quick and args.device == "cpu"):
        parser.error(
            f"must have a CUDA device, got --device {args.device}, PyTorch {torch.__version__};"
            " TRITON_INTERPRET=1 with --quick --device cpu runs its code"
        )
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.budget, args.seen = Budget(args.budget), set()
    if args.quick:
        args.seconds, args.least, args.reach = 0.0, 2, 1
        args.providers = [x for x in args.providers if not contenders.CONTENDERS[x].compiler]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    facts: Row = conditions(args.device, args.dtype, torch.get_num_threads())
    print(", ".join(f"{k} {v}" for k, v in facts.items()), flush=True)
    rows = Rows(args.json, facts, resume=args.resume)
    try:
        if args.part == "compile":
            compile_all(args, rows)
            rows.close()
            return 0
        timer = Timer(args.device)
        if args.part == "ceilings":
            measure_ceilings(args, rows, timer)
        for case in chosen(args) if args.part in CASE_BY_CASE else ():
            if args.budget.spent:
                rows.add(case=case.name, provider=args.part, left_out="no time")
                print(f"{case.name:22} left out: no time", flush=True)
                continue
            if args.part == "kernels" and not rows.begin(case.name, "kernels"):
                continue
            if timer.cuda:
                faulthandler.dump_traceback_later(CELL_SECONDS, exit=True)
            try:
                with tidy():
                    CASE_BY_CASE[args.part](case, args, rows, timer)
            except arena.ContextLostError:
                raise
            except Exception as mistake:  # the next case may be sound
                failed(rows, case.name, args.part, mistake)
            finally:
                faulthandler.cancel_dump_traceback_later()
    except arena.ContextLostError:
        return CONTEXT_LOST
    rows.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
