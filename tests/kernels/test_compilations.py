"""Other layers, sizes, masks and factors compile no kernel again.

As with tests/kernels/resources.py, a process without TRITON_INTERPRET runs the launchers on a CPU,
and tells what each call would compile that those before it have not.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


def hidden_mse(tokens: list[int], d_s: int, d_t: int, wanted: list[int], masked: int) -> None:
    """Layers of so many tokens; gradients of those wanted; one layer is masked."""
    from optima_fast.kernels import hidden_mse as k

    s = [torch.zeros(n, d_s, dtype=torch.bfloat16) for n in tokens]
    t = [torch.zeros(n, d_t, dtype=torch.bfloat16) for n in tokens]
    w = [torch.zeros(d_s, d_t, dtype=torch.bfloat16) for _ in tokens]
    m = [torch.ones(n, dtype=torch.bool) if i == masked else None for i, n in enumerate(tokens)]
    _, e, scales = k.hidden_mse_forward(s, t, w, m, need_residual=True)
    need = [i in wanted for i in range(len(tokens))]
    none = [False] * len(tokens)
    k.hidden_mse_backward(scales, s, w, m, e, scales, need_student=need, need_weight=none)


def attention(
    op: str,
    shapes: list[tuple[int, int, int]],
    heads: tuple[int, int],
    causal: list[bool],
    scale: list[float],
    wanted: list[int],
    masked: int,
) -> None:
    """Layers of so many items, queries and keys, of two models' heads of 64."""
    k = importlib.import_module(f"optima_fast.kernels.{op}")

    def rows(count: int, which: int) -> list[Tensor]:
        return [
            torch.zeros(shape[0], shape[which], count, 64, dtype=torch.bfloat16).transpose(1, 2)
            for shape in shapes
        ]

    def masks(which: int) -> list[Tensor | None]:
        return [
            torch.ones(shape[0], shape[which], dtype=torch.bool) if i == masked else None
            for i, shape in enumerate(shapes)
        ]

    q, keys = rows(heads[0], 1), rows(heads[0], 2)
    mask = (masks(1), masks(2))
    log_sums = [[None] * len(shapes)] * 2 if op == "attention_probs" else []
    shared = {"causal": causal, "student_scale": scale}
    _, *kept = getattr(k, f"{op}_forward")(
        q, keys, rows(heads[1], 1), rows(heads[1], 2), *mask, *log_sums, **shared,
        teacher_scale=scale[::-1], need_residual=True,
    )  # fmt: skip
    need = [i in wanted for i in range(len(shapes))]
    getattr(k, f"{op}_backward")(
        kept[-1], q, keys, *mask, *kept, **shared, need_q=need, need_k=need
    )


attention_scores = partial(attention, "attention_scores")
attention_probs = partial(attention, "attention_probs")

# the first call of each compiles, the others must not; three layers are padded to four. What does
# compile again is another form (masks, causality, sizes that are whole tiles or not, a head's size)
# and another power of two of layers in it
CALLS: dict[str, list[Callable[[], None]]] = {
    "hidden_mse": [
        lambda: hidden_mse([32, 48, 64], 64, 128, [0, 1, 2], 0),
        lambda: hidden_mse([1, 33, 1000, 128], 64, 128, [1, 2, 3], 2),
        lambda: hidden_mse([7, 0, 16], 96, 160, [2, 0, 1], 1),
    ],
    "attention_scores": [
        lambda: attention_scores(
            [(2, 70, 70)] * 4, (12, 16), [False] * 4, [0.125] * 4, [0, 1, 2], 0
        ),
        lambda: attention_scores(
            [(5, 77, 77)] * 4,
            (6, 8),
            [False] * 4,
            [-2.0] * 4,
            [1, 2, 3],
            3,
        ),
        lambda: attention_scores([(4, 100, 90)] * 4, (3, 2), [False] * 4, [1e-9] * 4, [0, 2, 1], 1),
    ],
    "attention_probs": [
        lambda: [
            attention_probs([(2, n, n)] * 4, (12, 16), [False] * 4, [0.125] * 4, [0, 1, 2], 0)
            for n in (300, 77)
        ],
        lambda: attention_probs(
            [(3, 299, 310)] * 4,
            (6, 8),
            [False] * 4,
            [1 / 3] * 4,
            [1, 2, 3],
            3,
        ),
        lambda: attention_probs([(16, 77, 77)] * 4, (3, 2), [False] * 4, [1e-9] * 4, [0, 2, 1], 1),
    ],
}


def main() -> None:
    """Print, as JSON, the names of the kernels that each call of an operator would compile."""
    import resources
    from triton import knobs

    found: dict[tuple[str, str], str] = {}

    def note(key: str, fn: Any, **_: Any) -> bool:
        found[fn.name, key] = fn.name
        return True  # neither compiled nor launched

    resources.pretend(90)
    knobs.runtime.jit_cache_hook = note
    added = {}
    for op, calls in CALLS.items():
        added[op] = []
        for call in calls:
            before = set(found)
            call()
            added[op].append(sorted(found[x] for x in found.keys() - before))
    print(json.dumps(added))


def test_nothing_is_compiled_again() -> None:
    pytest.importorskip("triton.knobs")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, __file__],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    added = json.loads(run.stdout)
    assert added.keys() == CALLS.keys()
    for first, *others in added.values():
        assert len(first) >= 2
        assert others == [[]] * len(others)


if __name__ == "__main__":
    main()
