"""Losses: time and peak memory of forward and backward, against eager PyTorch and torch.compile.

    python bench/bench_losses.py                        # the table
    python bench/bench_losses.py --case image1024       # the cells whose name contains this
    python bench/bench_losses.py --smoke                # tiny shapes, no compiler; CI runs this

Providers: eager PyTorch as one writes it at first (per-head maps, autograd), torch.compile of it,
``gemm`` (scores only: eager, but one product over the heads side by side), and optima_fast. Each is
checked against float64 before it is timed; a wrong one prints WRONG and is not timed. Providers are
interleaved, so that a busy machine slows them alike.

Peak memory is what PyTorch's allocator held above the inputs at the worst moment of one step: on a
GPU torch.cuda.max_memory_allocated, on a CPU the running sum of the allocations that torch.profiler
records. Scratch memory inside MKL or cuBLAS is in neither.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from optima_fast.entry import calm_openmp

calm_openmp()  # as the trainer runs
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from torch import Tensor

import optima_fast

Step = Callable[[], list[Tensor]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Case(NamedTuple):
    """One shape of one loss; the sizes are (student, teacher)."""

    name: str
    target: str  # "hidden", "scores" or "probs"
    batch: int
    queries: int
    keys: int
    heads: tuple[int, int] = (12, 16)
    width: int = 64  # of a head
    causal: bool = False


CASES = [
    Case(f"{name}-{target}", target, *shape, causal=causal)
    for target in ("probs", "scores")
    for name, shape, causal in (
        ("image1024", (2, 1024, 1024), False),
        ("image256", (8, 256, 256), False),
        ("text77", (32, 77, 77), True),
        ("cross64x256", (16, 64, 256), False),
    )
] + [Case("hidden8192", "hidden", 8, 1024, 0), Case("hidden2048", "hidden", 8, 256, 0)]

SMOKE = [
    Case("smoke-probs", "probs", 2, 20, 20, (2, 3), 4, True),
    Case("smoke-scores", "scores", 2, 20, 24, (2, 3), 4),
    Case("smoke-hidden", "hidden", 2, 20, 0, (2, 3), 4),
]


def eager_hidden(student: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    return (student @ weight - teacher).square().mean()


def eager_map(q: Tensor, k: Tensor, target: str, causal: bool) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if target == "probs":
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        scores = scores.softmax(-1)
    return scores.mean(1)


def gemm_map(q: Tensor, k: Tensor, target: str, causal: bool) -> Tensor:
    scale = q.shape[-1] ** -0.5 / q.shape[1]
    return q.transpose(1, 2).flatten(2) @ k.transpose(1, 2).flatten(2).mT * scale


def attention(
    attention_map: Callable[..., Tensor],
    case: Case,
    q: Tensor,
    k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
) -> Tensor:
    residual = attention_map(q, k, case.target, case.causal) - attention_map(
        teacher_q, teacher_k, case.target, case.causal
    )
    if not case.causal:
        return residual.square().mean()
    N = case.queries
    return residual.tril().square().sum() / (case.batch * (N * (N + 1) // 2))


def providers(case: Case) -> dict[str, Callable[..., Tensor]]:
    """Name -> loss of (two trained tensors, the teacher's)."""
    if case.target == "hidden":
        return {
            "eager": eager_hidden,
            "compile": torch.compile(eager_hidden, dynamic=False),
            "optima_fast": lambda s, w, t: optima_fast.hidden_mse(s, t, w).sum(),
        }

    def eager(*tensors: Tensor) -> Tensor:
        return attention(eager_map, case, *tensors)

    found: dict[str, Callable[..., Tensor]] = {
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    if case.target == "scores":
        found["gemm"] = lambda *tensors: attention(gemm_map, case, *tensors)
    found["optima_fast"] = lambda *tensors: optima_fast.attention_mse(
        *tensors, target=case.target, causal=case.causal
    ).sum()
    return found


def inputs(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Laid out as a model makes them: [B, N, H, d] in memory. The first two are trained."""
    g = torch.Generator().manual_seed(0)
    d_s, d_t = (h * case.width for h in case.heads)
    shapes: list[tuple[int, ...]]
    if case.target == "hidden":
        tokens = (case.batch, case.queries)
        shapes = [(*tokens, d_s), (d_s, d_t), (*tokens, d_t)]
        drawn = [torch.randn(s, generator=g) for s in shapes]
        drawn[1] *= d_s**-0.5
    else:
        shapes = [
            (case.batch, n, h, case.width) for h in case.heads for n in (case.queries, case.keys)
        ]
        drawn = [torch.randn(s, generator=g).transpose(1, 2) for s in shapes]
    tensors = [x.to(device, dtype) for x in drawn]
    return [x.requires_grad_() if i < 2 else x for i, x in enumerate(tensors)]


def step(loss: Callable[..., Tensor], tensors: list[Tensor]) -> Step:
    def run() -> list[Tensor]:
        value = loss(*tensors)
        return [value.detach(), *torch.autograd.grad(value, tensors[:2])]

    return run


def relative_error(run: Step, exact: list[Tensor]) -> float:
    """Of the loss and both gradients, the worst, in the 2-norm."""
    return max(
        ((x.double() - y).norm() / y.norm()).item() for x, y in zip(run(), exact, strict=True)
    )


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


def milliseconds(run: Step, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def measure(case: Case, args: argparse.Namespace) -> list[dict[str, object]]:
    dtype, device = DTYPES[args.dtype], args.device
    tensors = inputs(case, dtype, device)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    torch.compiler.reset()
    found = {name: f for name, f in providers(case).items() if name in args.providers}
    exact = step(providers(case)["eager"], wide)()
    del wide
    # eager accumulates in its own dtype, so the bound is of that dtype's rounding
    bound = 200 * torch.finfo(dtype).eps if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    steps, rows = {}, []
    for name, loss in found.items():
        run = step(loss, tensors)
        error = relative_error(run, exact)
        if not error < bound:
            print(f"{case.name:18} {name:12} WRONG (relative error {error:.1e})", flush=True)
            continue
        steps[name] = run
        rows.append({"provider": name, "error": error, "peak_mb": peak_bytes(run, device) / 2**20})
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    while len(times[next(iter(times))]) < args.least or time.perf_counter() - begin < args.seconds:
        for name, run in steps.items():
            times[name].append(milliseconds(run, device))
    for row in rows:
        low, middle, high = statistics.quantiles(times[str(row["provider"])], n=4)
        row.update(case=case.name, ms=middle, iqr=high - low, runs=len(times[str(row["provider"])]))
    return rows


def show(rows: list[dict[str, object]]) -> None:
    ours = next((r for r in rows if r["provider"] == "optima_fast"), None)
    for r in rows:
        line = (
            f"{r['case']:18} {r['provider']:12} {r['ms']:9.2f} {r['iqr']:8.2f} {r['peak_mb']:9.1f}"
            f" {r['error']:9.1e}"
        )
        if ours is not None and r is not ours:
            faster, leaner = r["ms"] / ours["ms"], r["peak_mb"] / ours["peak_mb"]  # type: ignore[operator]
            line += f"   optima_fast: {faster:5.2f}x the speed, 1/{leaner:.1f} the memory"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--case", default="", help="cells whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--providers", nargs="+", help="default: all, in --smoke not compile")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="least time for a case")
    parser.add_argument("--least", type=int, default=7, help="least runs of a provider")
    parser.add_argument("--json", metavar="FILE", help="append one line a cell")
    args = parser.parse_args()
    if args.providers is None:
        args.providers = ["eager", "gemm", "optima_fast", *([] if args.smoke else ["compile"])]
    if args.smoke:
        args.seconds, args.least = 0.0, 2
    torch.set_num_threads(args.threads)
    conditions = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "threads": args.threads,
        "dtype": args.dtype,
        "torch": torch.__version__,
        "optima_fast": optima_fast.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    print(", ".join(f"{k} {v}" for k, v in conditions.items()))
    print(f"{'case':18} {'provider':12} {'ms':>9} {'IQR':>8} {'peak MB':>9} {'error':>9}")
    for case in SMOKE if args.smoke else CASES:
        if args.case not in case.name:
            continue
        rows = measure(case, args)
        show(rows)
        if args.json:
            with open(args.json, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({**conditions, **row}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
