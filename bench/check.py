"""Quick sanity of the Triton kernels on this machine: against float64, twice, with masks.

    python bench/check.py                                  # every loss and dtype, small odd shapes
    python bench/check.py --case probs-odd --dtype bfloat16 --once   # for compute-sanitizer

A cell holds if losses and gradients are within a bound of the dtype's rounding, a second run
returns the same bits, what is masked holds nan, and, on a GPU, nothing waits for the host.
Exit code 1 if one does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from measuring import DTYPES, Rows, conditions, lost, one_line, relative_error

# isort: split
import torch
from cases import LOSSES
from torch import Tensor

import optima_fast


class Maps(NamedTuple):
    """A layer of attention; heads and widths are (student, teacher)."""

    batch: int
    queries: int
    keys: int
    heads: tuple[int, int]
    widths: tuple[int, int]
    causal: bool = False
    share: int = 1  # heads of queries that take one of keys
    window: int | None = None


ATTENTION = {
    "tile": (Maps(2, 64, 64, (4, 4), (64, 64)),),
    "odd": (Maps(2, 77, 77, (3, 4), (64, 64), True), Maps(3, 50, 33, (2, 1), (32, 64))),
    "large": (Maps(2, 300, 261, (2, 3), (64, 64)), Maps(1, 257, 257, (3, 2), (64, 128), True)),
    "narrow": (Maps(2, 19, 40, (2, 5), (16, 20)),),
    "shared": (
        Maps(2, 300, 261, (4, 6), (64, 64), share=2),
        Maps(2, 77, 77, (4, 2), (64, 64), True, share=2),
    ),
    "window": (
        Maps(2, 300, 300, (2, 3), (64, 64), True, window=70),
        Maps(1, 257, 257, (4, 2), (64, 64), share=2, window=33),
    ),
}
HIDDEN = {  # (batch, tokens, d_s, d_t)
    "tile": ((2, 64, 128, 128),),
    "odd": ((2, 77, 65, 130), (1, 5, 300, 40), (3, 129, 48, 96)),
    "large": ((4, 300, 768, 1024),),
}
SCALE = 4096.0


def bound(dtype: torch.dtype) -> float:
    """Tighter than for the benches: products and sums here are float32 throughout."""
    return (200 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps


def cells() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    for name in HIDDEN:
        yield "hidden", name, HIDDEN[name]
    for target in ("scores", "probs", "kl-mean"):
        for name in ATTENTION:
            yield target, name, ATTENTION[name]
    for name, layers in ATTENTION.items():  # a divergence of each head has as many in both models
        yield "kl", name, tuple(x._replace(heads=x.heads[:1] * 2) for x in layers)


class Problem:
    """Tensors of one call; every second layer has masks, and nan and inf where they are False."""

    def __init__(self, target: str, shapes: tuple[Any, ...], dtype: torch.dtype, device: str):
        self.target = target
        self.g = torch.Generator().manual_seed(0)
        make = self._hidden if target == "hidden" else self._attention
        layers = [make(shape, bool(i % 2)) for i, shape in enumerate(shapes)]
        columns = zip(*(tensors for tensors, _ in layers), strict=True)
        first, second, *fixed = ([x.to(device, dtype) for x in column] for column in columns)
        self.trained, self.fixed = [first, second], fixed
        self.options: dict[str, Any] = {
            name: [None if m[name] is None else m[name].to(device) for _, m in layers]  # type: ignore[union-attr]
            for name in layers[0][1]
        }
        if target != "hidden":
            self.options["causal"] = [shape.causal for shape in shapes]
            self.options["window"] = [shape.window for shape in shapes]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.g)

    def _hidden(self, shape: Any, masked: bool) -> tuple[list[Tensor], dict[str, Tensor | None]]:
        batch, tokens, d_s, d_t = shape
        student, teacher = self._normal(batch, tokens, d_s), self._normal(batch, tokens, d_t)
        mask = torch.rand(batch, tokens, generator=self.g) < 0.7 if masked else None
        if mask is not None:
            student[~mask], teacher[~mask] = float("nan"), float("inf")
        return [student, self._normal(d_s, d_t) * d_s**-0.5, teacher], {"mask": mask}

    def _attention(self, shape: Any, masked: bool) -> tuple[list[Tensor], dict[str, Tensor | None]]:
        batch, n_q, n_k = shape[:3]
        tensors = [
            self._normal(batch, n, h, d)
            for heads, d in zip(shape.heads, shape.widths, strict=True)
            for n, h in ((n_q, heads), (n_k, heads // shape.share))
        ]
        masks: dict[str, Tensor | None] = {"query_mask": None, "key_mask": None}
        if masked:
            for offset, (name, n) in enumerate((("query_mask", n_q), ("key_mask", n_k))):
                masks[name] = mask = torch.rand(batch, n, generator=self.g) < 0.7
                tensors[offset][~mask], tensors[offset + 2][~mask] = float("nan"), float("inf")
        return [x.transpose(1, 2) for x in tensors], masks

    def __call__(self, backend: str, *, double: bool = False, grad: bool = True) -> list[Tensor]:
        """The losses, then every gradient of their sum, weighted as by a loss scaler.

        Unscaled, gradients of a mean are below what float16 can hold.
        """
        kind = torch.float64 if double else self.trained[0][0].dtype
        leaves = [
            [x.detach().to(kind).requires_grad_(grad) for x in column] for column in self.trained
        ]
        fixed = [[x.to(kind) for x in column] for column in self.fixed]
        options = {**self.options, "backend": backend}
        if self.target == "hidden":
            losses = optima_fast.hidden_mse(leaves[0], fixed[0], leaves[1], **options)
        else:
            losses = LOSSES[self.target].call(*leaves, *fixed, **options)
        if not grad:
            return [losses]
        upstream = torch.arange(1, len(losses) + 1, device=losses.device, dtype=losses.dtype)
        flat = [x for column in leaves for x in column]
        return [losses.detach(), *torch.autograd.grad((losses * upstream * SCALE).sum(), flat)]


@contextlib.contextmanager
def no_wait(device: str) -> Iterator[None]:
    """On a GPU, an operation that waits for the device is an error."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def check(problem: Problem, most: float, device: str, *, again: bool) -> float:
    """The relative error; RuntimeError with what does not hold."""
    exact = problem("reference", double=True)
    first = problem("triton")
    error = relative_error(first, exact)
    if not error < most:
        raise RuntimeError(f"WRONG (relative error {error:.1e}, allowed {most:.1e})")
    if again:
        with no_wait(device):
            second = problem("triton")
            alone = problem("triton", grad=False)[0]
        if not all(torch.equal(x, y) for x, y in zip(first, second, strict=True)):
            raise RuntimeError("WRONG: a second run returns other bits")
        if not relative_error([alone], exact[:1]) < most:
            raise RuntimeError("WRONG: the loss without a gradient")
    return error


def run(cell: Callable[[], float], target: str, name: str, dtype: str, rows: Rows) -> bool:
    label = f"{name}-{dtype}"
    if not rows.begin(target, label):
        return True
    try:
        error = cell()
    except Exception as mistake:  # the next kernel may be sound
        rows.add(case=target, provider=label, failed=one_line(mistake))
        print(f"{target:8} {label:18} {one_line(mistake)}", flush=True)
        if lost(mistake):
            sys.exit(3)
        return False
    rows.add(case=target, provider=label, error=error)
    print(f"{target:8} {label:18} {error:9.1e}", flush=True)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", default="", help="cells whose name contains this, as probs-odd")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: what the device has")
    parser.add_argument("--once", action="store_true", help="run each once, for a sanitizer")
    parser.add_argument("--json", metavar="FILE", help="append one line a cell")
    parser.add_argument("--resume", action="store_true", help="leave out cells that FILE has")
    args = parser.parse_args(argv)
    # the interpreter multiplies the bit patterns of bfloat16
    kinds = args.dtype or [d for d in DTYPES if args.device == "cuda" or d != "bfloat16"]
    facts = conditions(args.device, ",".join(kinds), torch.get_num_threads())
    print(", ".join(f"{k} {v}" for k, v in facts.items()), flush=True)
    rows, good = Rows(args.json, facts, resume=args.resume), True
    for dtype in kinds:
        for target, name, shapes in cells():
            if args.case not in f"{target}-{name}":
                continue

            def cell(target=target, shapes=shapes, dtype=dtype) -> float:  # type: ignore[no-untyped-def]
                problem = Problem(target, shapes, DTYPES[dtype], args.device)
                return check(problem, bound(DTYPES[dtype]), args.device, again=not args.once)

            good &= run(cell, target, name, dtype, rows)
    rows.close()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
