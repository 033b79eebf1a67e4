"""Layers for the kernels of attention scores: what these and float64 make of them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import tolerance
import torch
from torch import Tensor

from optima_fast.losses import reference

pytest.importorskip("triton")
from optima_fast.kernels import attention_scores as kernel
from optima_fast.kernels import launch

ON_GPU = torch.cuda.is_available()
MARKS = [
    pytest.mark.usefixtures("poisoned_memory"),
    # what a mask hides enters products, whose result is then discarded
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning"),
]
DTYPES = [
    torch.float16,
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not ON_GPU, reason="the interpreter multiplies the bit patterns of bfloat16"
        ),
    ),
]
no_float64 = pytest.mark.skipif(ON_GPU, reason="float64 is for gradcheck in the interpreter")
NAN, INF = float("nan"), float("inf")


class Shape(NamedTuple):
    """Of one layer: batch, student's heads and their size, teacher's, queries, keys."""

    B: int
    H_S: int
    D_S: int
    H_T: int
    D_T: int
    N_Q: int
    N_K: int
    causal: bool = False
    share: tuple[int, int] = (1, 1)  # heads of a model's queries for each of its keys'


class Layers(NamedTuple):
    student_q: list[Tensor]
    student_k: list[Tensor]
    teacher_q: list[Tensor]
    teacher_k: list[Tensor]
    query_masks: list[Tensor | None]
    key_masks: list[Tensor | None]
    causal: list[bool]
    student_scale: list[float]
    teacher_scale: list[float]

    def layer(self, i: int) -> Layers:
        return Layers(*([x[i]] for x in self))


class Results(NamedTuple):
    losses: list[Tensor]
    d_q: list[Tensor | None]
    d_k: list[Tensor | None]


BLOCK_M, BLOCK_N, BLOCK_K = launch.lookup(launch.SCORES_FORWARD, (8, 0), 2, 128)[:3]
EDGES = [
    Shape(1, 1, 1, 1, 1, 1, 1),
    Shape(2, 2, 5, 3, 7, 3, 9),
    Shape(1, 1, BLOCK_K, 2, BLOCK_K // 2, 64, 64, causal=True),
    Shape(1, 2, BLOCK_K + 1, 1, 2 * BLOCK_K, BLOCK_M + 1, BLOCK_N + 1),
    Shape(2, 1, 16, 3, 16, 65, 65, causal=True),
    Shape(1, 3, 4, 2, 6, 7, BLOCK_N + 16, causal=True),
    Shape(1, 2, 65, 1, 3, 2 * BLOCK_N + 3, 5, causal=True),
]
# keys that heads share: in one model or in both
GROUPED = [
    Shape(2, 4, 8, 6, 20, 20, 20, share=(2, 3)),
    Shape(1, 4, 2 * BLOCK_K, 3, 16, BLOCK_M, BLOCK_N, share=(4, 1)),
    Shape(1, 2, 16, 4, 16, 40, 70, causal=True, share=(1, 2)),
]
MIXED = [
    Shape(2, 2, 8, 3, 6, 66, 17),
    Shape(0, 2, 4, 2, 4, 5, 5),
    Shape(1, 4, 3, 1, 20, 9, 70, causal=True),
    Shape(2, 1, 6, 2, 6, 4, 0),
    Shape(1, 2, 7, 2, 5, 1, 3),
    Shape(3, 1, 6, 2, 6, 0, 4, causal=True),
]


def make(
    shapes: list[Shape], dtype: torch.dtype, device: str, masked: bool = False, seed: int = 0
) -> Layers:
    """Layers of tokens' heads side by side; if masked, masks of queries, of keys or of both.

    What a mask hides is nan and inf.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = Layers(*([] for _ in Layers._fields))
    for i, (B, H_S, D_S, H_T, D_T, N_Q, N_K, causal, share) in enumerate(shapes):
        student, teacher = ((H_S, H_S // share[0], D_S), (H_T, H_T // share[1], D_T))
        sides = [
            (h, d, n)
            for *heads, d in (student, teacher)
            for h, n in zip(heads, (N_Q, N_K), strict=True)
        ]
        masks: list[Tensor | None] = []
        for n, wanted in ((N_Q, i % 3 != 1), (N_K, i % 3 != 2)):
            mask = torch.rand(B, n, generator=generator) < 0.7
            if mask.shape[0]:
                mask[0, :1] = True
            masks.append(mask if masked and wanted else None)
        for group, mask, fill, (H, D, n) in zip(
            layers, masks * 2, (NAN, INF, -INF, NAN), sides, strict=False
        ):
            # a mean that is not 0, so that a lost term or factor cannot hide in the noise
            x = torch.randn(B, n, H, D, generator=generator, dtype=torch.float64) + 0.3
            if mask is not None:
                x[~mask] = fill
            group.append(x.to(device, dtype).transpose(1, 2))
        layers.query_masks.append(None if masks[0] is None else masks[0].to(device))
        layers.key_masks.append(None if masks[1] is None else masks[1].to(device))
        layers.causal.append(causal)
        # kernels take a scale as float32: one that float32 holds, so that float64 is exact
        for scales, scale in (
            (layers.student_scale, D_S**-0.5),
            (layers.teacher_scale, 1.7 * D_T**-0.5),
        ):
            scales.append(torch.tensor(scale, dtype=torch.float32).item())
    return layers


def upstream(layers: Layers) -> Tensor:
    """Gradients that differ from layer to layer and are not 1."""
    student = layers.student_q[0]
    dtype = torch.promote_types(student.dtype, torch.float32)
    return torch.linspace(-2.5, 3.0, len(layers.student_q), dtype=dtype, device=student.device)


def forward(layers: Layers, need_residual: bool = True) -> tuple[Tensor, list[Tensor], Tensor]:
    return kernel.attention_scores_forward(
        *layers[:6],
        causal=layers.causal,
        student_scale=layers.student_scale,
        teacher_scale=layers.teacher_scale,
        need_residual=need_residual,
    )


def backward(
    layers: Layers,
    grad: Tensor,
    kept: tuple[list[Tensor], Tensor],
    need_q: list[bool] | None = None,
    need_k: list[bool] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    every = [True] * len(layers.student_q)
    return kernel.attention_scores_backward(
        grad,
        layers.student_q,
        layers.student_k,
        layers.query_masks,
        layers.key_masks,
        *kept,
        causal=layers.causal,
        student_scale=layers.student_scale,
        need_q=every if need_q is None else need_q,
        need_k=every if need_k is None else need_k,
        dtype=dtype,
    )


def fused(layers: Layers, grad: Tensor | None = None) -> Results:
    losses, *kept = forward(layers)
    grad = upstream(layers) if grad is None else grad
    return Results(list(losses), *backward(layers, grad, (kept[0], kept[1])))


def autograd(layers: Layers, grad: Tensor, dtype: torch.dtype | None = None) -> Results:
    """Plain PyTorch in the inputs' dtype, its squares wider; or all in another dtype."""
    results = Results([], [], [])
    for i in range(len(layers.student_q)):
        sq, sk, tq, tk, qm, km, causal, s_scale, t_scale = (x[0] for x in layers.layer(i))
        if dtype is not None:
            sq, sk, tq, tk = (x.to(dtype) for x in (sq, sk, tq, tk))
        sq, sk = (x.detach().clone().requires_grad_() for x in (sq, sk))
        valid = reference.valid_pairs(qm, km, causal, sq, sk.shape[2])
        student = reference.attention_maps(sq, sk, valid, target="scores", scale=s_scale)[:, 0]
        teacher = reference.attention_maps(tq, tk, valid, target="scores", scale=t_scale)[:, 0]
        residual = torch.where(valid, student - teacher, 0)
        square = residual.to(torch.promote_types(residual.dtype, torch.float32)).square()
        loss = square.sum() / valid.sum().clamp(min=1)
        loss.backward(grad[i].to(loss.dtype))
        results.losses.append(loss.detach())
        results.d_q.append(sq.grad)
        results.d_k.append(sk.grad)
    return results


def check(layers: Layers, grad: Tensor | None = None) -> Results:
    """Every loss and gradient by the rule of tests/tolerance.py."""
    grad = upstream(layers) if grad is None else grad
    ours, eager = fused(layers, grad), autograd(layers, grad)
    exact = autograd(layers, grad, torch.float64)
    for name in Results._fields:
        rows = zip(getattr(ours, name), getattr(eager, name), getattr(exact, name), strict=True)
        for i, (actual, plain, truth) in enumerate(rows):
            assert actual.isfinite().all(), f"{name}[{i}]"
            tolerance.assert_as_good_as_eager(f"{name}[{i}]", actual, plain, truth)
    return ours


def assert_same(a: Results, b: Results) -> None:
    for name in Results._fields:
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            assert torch.equal(x, y), name
