"""Losses: time and peak memory of forward and backward, against eager PyTorch and torch.compile.

    python bench/bench_losses.py                        # the table
    python bench/bench_losses.py --case image1024       # the cells whose name contains this
    python bench/bench_losses.py --smoke                # tiny shapes, no compiler; CI runs this
    python bench/bench_losses.py --suite growth         # cpu, headline, growth or crossover
    python bench/bench_losses.py --suite headline --quick --device cpu   # its code, tiny shapes

Contenders: eager PyTorch as one writes it at first (per-head maps, autograd), torch.compile of it,
``gemm`` (scores only: eager, but one product over the heads side by side), and optima_fast; on a
GPU also those of bench/contenders.py. Each is checked against float64 before it is timed; a wrong
one prints WRONG and is not timed. They are interleaved, so that a busy machine slows them alike.
bench/measuring.py says how time and memory are taken, bench/cases.py what the floor is.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys

from measuring import (
    DTYPES,
    Budget,
    Row,
    Rows,
    Step,
    Timer,
    allowed_error,
    conditions,
    interleave,
    lost,
    one_line,
    peak_bytes,
    relative_error,
    tidy,
)

# isort: split
import torch
from cases import SUITES, Case, card, exact, floor_ms, inputs, shrunk
from contenders import CONTENDERS, step
from torch import Tensor

CPU = ("eager", "compile", "gemm", "optima_fast")
GPU = ("triton", "triton-lse", "eager", "autocast", "gemm", "blockwise", "compile")
ANCHORS = ("triton", "optima_fast", "blockwise")  # the first one there is compared with the others
CONTEXT_LOST = 3  # exit code: a new process can go on with --resume
CELL_SECONDS = 180  # a cell that takes longer hangs, and ends the process


class ContextLostError(RuntimeError):
    """After this no CUDA call of the process succeeds."""


def check(
    name: str,
    case: Case,
    layers: list[list[Tensor]],
    answer: list[Tensor],
    args: argparse.Namespace,
) -> tuple[Step, Row]:
    """The step to be timed and its row; RuntimeError if it is wrong."""
    run = step(name, case, layers, backward=not args.loss_only)
    error = relative_error(run(), answer)
    rounding = torch.bfloat16 if CONTENDERS[name].autocast else DTYPES[args.dtype]
    if not error < allowed_error(rounding):
        raise RuntimeError(f"WRONG (relative error {error:.1e})")
    peak = peak_bytes(run, args.device) / 2**20
    return run, {"provider": name, "error": error, "peak_mb": peak}


def failed(rows: Rows, case: str, name: str, mistake: Exception) -> None:
    row = rows.add(case=case, provider=name, failed=one_line(mistake))
    print(f"{case:20} {name:16} {row['failed']}", flush=True)
    if lost(mistake):
        raise ContextLostError from mistake


def measure(case: Case, args: argparse.Namespace, rows: Rows, timer: Timer) -> list[Row]:
    """Check the contenders of a case, then time those that are right."""
    names = [n for n in args.providers if case.target in CONTENDERS[n].targets]
    if (case.name, "timing") in rows.done:
        return []
    layers = inputs(case, DTYPES[args.dtype], args.device)
    if args.warm:
        for name in names:
            if rows.begin(case.name, name):
                try:
                    step(name, case, layers, backward=not args.loss_only)()
                except Exception as mistake:
                    failed(rows, case.name, name, mistake)
        return []
    answer = exact(case, layers)
    answer = answer[:1] if args.loss_only else answer
    steps, found = {}, []
    for name in names:
        if not rows.begin(case.name, name):
            continue
        try:
            steps[name], row = check(name, case, layers, answer, args)
            found.append(row)
        except Exception as mistake:  # whatever a contender does wrong, the others are measured
            failed(rows, case.name, name, mistake)
    del answer
    rows.begin(case.name, "timing")
    try:
        times = interleave(steps, timer, seconds=args.seconds, least=args.least)
    except RuntimeError as mistake:
        failed(rows, case.name, "timing", mistake)
        return []
    rates = card(rows.common["device"]) if DTYPES[args.dtype].itemsize == 2 else None
    for row in found:
        name = row["provider"]
        ms, iqr, runs = times[name]
        row.update(case=case.name, ms=ms, iqr=iqr, runs=runs)
        if timer.cuda:
            row["wall_ms"] = timer.wall(steps[name])
        if rates is not None:
            lse = CONTENDERS[name].lse
            row["floor_ms"] = floor_ms(case, rates, lse=lse, backward=not args.loss_only)
        rows.add(**row)
    return found


def show(rows: list[Row]) -> None:
    """A line a contender, and what the first of ours is to it."""
    by_name = {r["provider"]: r for r in rows}
    ours = next((by_name[name] for name in ANCHORS if name in by_name), None)
    for r in rows:
        line = (
            f"{r['case']:20} {r['provider']:16} {r['ms']:9.3f} {r['iqr']:8.3f}"
            f" {r['peak_mb']:9.1f} {r['error']:9.1e}"
        )
        if "wall_ms" in r:
            line += f" {r['wall_ms']:9.3f}"
        if "floor_ms" in r:
            line += f" {r['floor_ms'] / r['ms']:6.0%}"
        if ours is not None and r is not ours:
            faster, leaner = r["ms"] / ours["ms"], r["peak_mb"] / max(ours["peak_mb"], 1e-3)
            line += f"   {ours['provider']}: {faster:5.2f}x the speed, 1/{leaner:.1f} the memory"
        print(line, flush=True)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="--suite smoke --quick, no compiler")
    parser.add_argument("--suite", choices=SUITES, help="default: headline on a GPU, else cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two runs")
    parser.add_argument("--case", default="", help="cells whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--providers", nargs="+", choices=CONTENDERS, help="default: by device")
    parser.add_argument("--warm", action="store_true", help="run each contender once: compile it")
    parser.add_argument("--loss-only", action="store_true", help="no gradient, as for the reward")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, help="least time for a case; default 10, GPU 1")
    parser.add_argument("--least", type=int, default=7, help="least runs of a provider")
    parser.add_argument("--budget", type=float, help="seconds after which no case is begun")
    parser.add_argument("--json", metavar="FILE", help="append one line a cell")
    parser.add_argument("--resume", action="store_true", help="leave out cells that FILE has")
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    if args.smoke:
        args.suite = "smoke"
    args.suite = args.suite or ("headline" if cuda else "cpu")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    if args.seconds is None:
        args.seconds = 1.0 if cuda else 10.0
    if args.smoke or args.quick:
        args.seconds, args.least = 0.0, 2
    if args.providers is None:
        names = GPU if cuda else CPU
        args.providers = [n for n in names if not (args.smoke and CONTENDERS[n].compiler)]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    torch.set_num_threads(args.threads)
    facts = conditions(args.device, args.dtype, args.threads)
    print(", ".join(f"{k} {v}" for k, v in facts.items()))
    heading = f"{'case':20} {'provider':16} {'ms':>9} {'IQR':>8} {'peak MB':>9} {'error':>9}"
    print(heading + (f" {'wall ms':>9} {'floor':>6}" if args.device == "cuda" else ""), flush=True)
    rows, timer = Rows(args.json, facts, resume=args.resume), Timer(args.device)
    budget = Budget(args.budget)
    for case in SUITES[args.suite]:
        if args.case not in case.name:
            continue
        if budget.spent:
            rows.add(case=case.name, provider="all", failed="left out: no time")
            print(f"{case.name:20} left out: no time", flush=True)
            continue
        if args.quick:
            case = shrunk(case)
        if args.loss_only:
            case = case._replace(name=f"{case.name}-loss-only")
        if timer.cuda:
            faulthandler.dump_traceback_later(CELL_SECONDS, exit=True)
        try:
            with tidy():
                show(measure(case, args, rows, timer))
        except ContextLostError:
            return CONTEXT_LOST
        finally:
            faulthandler.cancel_dump_traceback_later()
    rows.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
