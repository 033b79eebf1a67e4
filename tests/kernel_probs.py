"""Layers for the kernels of attention probabilities: what these and float64 make of them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import tolerance
import torch
from torch import Tensor

from optima_fast.losses import reference

pytest.importorskip("triton")
from optima_fast.kernels import attention_probs as kernel

ON_GPU = torch.cuda.is_available()
MARKS = [
    pytest.mark.usefixtures("poisoned_memory"),
    # what a mask hides enters products, whose result is then discarded
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]
BFLOAT16 = pytest.mark.skipif(
    not ON_GPU, reason="the interpreter multiplies the bit patterns of bfloat16"
)
# a row of a map in registers, up to 256 keys and not for float32, or several sweeps
CASES = [
    pytest.param("rows", torch.float16, id="rows-float16"),
    pytest.param("rows", torch.bfloat16, id="rows-bfloat16", marks=BFLOAT16),
    pytest.param("sweeps", torch.float16, id="sweeps-float16"),
    pytest.param("sweeps", torch.bfloat16, id="sweeps-bfloat16", marks=BFLOAT16),
    pytest.param("sweeps", torch.float32, id="sweeps-float32"),
]
no_float64 = pytest.mark.skipif(ON_GPU, reason="float64 is for gradcheck in the interpreter")
NAN, INF = float("nan"), float("inf")
MODELS = ("student", "teacher")


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
    student_lse: list[Tensor | None]
    teacher_lse: list[Tensor | None]
    causal: list[bool]
    student_scale: list[float]
    teacher_scale: list[float]

    def layer(self, i: int) -> Layers:
        return Layers(*([x[i]] for x in self))


class Kept(NamedTuple):
    residuals: list[Tensor]
    lses: list[Tensor]
    scales: Tensor


class Results(NamedTuple):
    losses: list[Tensor]
    d_q: list[Tensor | None]
    d_k: list[Tensor | None]


EDGES = [
    Shape(1, 1, 1, 1, 1, 1, 1),
    Shape(2, 2, 5, 3, 20, 3, 9),
    Shape(1, 2, 16, 1, 32, 16, 32, causal=True),
    Shape(1, 2, 20, 2, 72, 17, 33),
    Shape(2, 2, 24, 1, 16, 33, 33, causal=True),
    Shape(1, 1, 33, 2, 8, 18, 70, causal=True),
    Shape(1, 2, 8, 1, 64, 70, 18, causal=True),
]
# with nothing masked: tiles that are whole, and those at an edge
INTERIOR = [
    Shape(2, 2, 16, 3, 32, 64, 96),
    Shape(1, 2, 16, 1, 16, 96, 96, causal=True),
    Shape(1, 1, 20, 2, 16, 70, 50),
    Shape(1, 1, 16, 2, 16, 70, 70, causal=True),
    Shape(1, 2, 16, 1, 16, 16, 96),
    Shape(1, 1, 20, 1, 16, 9, 40),
    Shape(1, 3, 16, 1, 16, 40, 70),
    Shape(1, 1, 16, 2, 16, 40, 70, causal=True),
]
# keys that heads share: one block of queries and several, one model or both
GROUPED = [
    Shape(2, 4, 8, 6, 20, 20, 20, share=(2, 3)),
    Shape(1, 4, 16, 3, 16, 40, 70, causal=True, share=(4, 1)),
    Shape(1, 2, 16, 4, 16, 40, 50, share=(1, 2)),
]
MIXED = [
    Shape(2, 2, 8, 3, 6, 34, 17),
    Shape(0, 2, 4, 2, 4, 5, 5),
    Shape(1, 2, 3, 1, 20, 34, 40, causal=True),
    Shape(2, 1, 6, 2, 6, 4, 0),
    Shape(1, 2, 7, 2, 5, 1, 3),
    Shape(3, 1, 6, 2, 6, 0, 4, causal=True),
]
FEW = [
    Shape(1, 2, 3, 1, 20, 18, 17, causal=True),
    Shape(2, 1, 6, 2, 6, 4, 0),
    Shape(2, 1, 7, 2, 5, 1, 33),
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
            # maps far from uniform, so that a lost term or factor cannot hide
            x = torch.randn(B, n, H, D, generator=generator, dtype=torch.float64) * 1.5 + 0.3
            if mask is not None:
                x[~mask] = fill
            group.append(x.to(device, dtype).transpose(1, 2))
        layers.query_masks.append(None if masks[0] is None else masks[0].to(device))
        layers.key_masks.append(None if masks[1] is None else masks[1].to(device))
        layers.student_lse.append(None)
        layers.teacher_lse.append(None)
        layers.causal.append(causal)
        # kernels take a scale as float32: one that float32 holds, so that float64 is exact
        for scales, scale in (
            (layers.student_scale, D_S**-0.5),
            (layers.teacher_scale, 1.3 * D_T**-0.5),
        ):
            scales.append(torch.tensor(scale, dtype=torch.float32).item())
    return layers


def valid_pairs(layers: Layers, i: int) -> Tensor:
    return reference.valid_pairs(
        layers.query_masks[i],
        layers.key_masks[i],
        layers.causal[i],
        layers.student_q[i],
        layers.student_k[i].shape[2],
    )


def log_sums(layers: Layers, i: int, side: str) -> Tensor:
    """[B, H, Nq] in float64, nan where nothing counts."""
    q, k = (getattr(layers, f"{side}_{x}")[i].double().nan_to_num(0, 0, 0) for x in "qk")
    scores = q @ k.transpose(-1, -2) * getattr(layers, f"{side}_scale")[i]
    valid = valid_pairs(layers, i)[:, None]
    lse = scores.masked_fill(~valid, -INF).logsumexp(-1)
    return lse.masked_fill(~valid.any(-1), NAN)


def with_log_sums(layers: Layers, dtype: torch.dtype = torch.float32) -> Layers:
    every = range(len(layers.student_q))
    given = ([log_sums(layers, i, side).to(dtype) for i in every] for side in MODELS)
    return layers._replace(**dict(zip(("student_lse", "teacher_lse"), given, strict=True)))


def upstream(layers: Layers) -> Tensor:
    """Gradients that differ from layer to layer and are not 1."""
    student = layers.student_q[0]
    dtype = torch.promote_types(student.dtype, torch.float32)
    return torch.linspace(-2.5, 3.0, len(layers.student_q), dtype=dtype, device=student.device)


def forward(layers: Layers, need_residual: bool = True) -> tuple[Tensor, Kept]:
    losses, *kept = kernel.attention_probs_forward(
        *layers[:8],
        causal=layers.causal,
        student_scale=layers.student_scale,
        teacher_scale=layers.teacher_scale,
        need_residual=need_residual,
    )
    return losses, Kept(*kept)


def backward(
    layers: Layers,
    grad: Tensor,
    kept: Kept,
    need_q: list[bool] | None = None,
    need_k: list[bool] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    every = [True] * len(layers.student_q)
    return kernel.attention_probs_backward(
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
    losses, kept = forward(layers)
    return Results(
        list(losses), *backward(layers, upstream(layers) if grad is None else grad, kept)
    )


def autograd(layers: Layers, grad: Tensor, dtype: torch.dtype | None = None) -> Results:
    """Plain PyTorch in the inputs' dtype, its squares wider; or all in another dtype."""
    results = Results([], [], [])
    for i in range(len(layers.student_q)):
        sq, sk, tq, tk = (x[i] if dtype is None else x[i].to(dtype) for x in layers[:4])
        sq, sk = (x.detach().clone().requires_grad_() for x in (sq, sk))
        valid = valid_pairs(layers, i)
        maps = (
            reference.attention_maps(q, k, valid, target="probs", scale=scale[i])[:, 0]
            for q, k, scale in ((sq, sk, layers.student_scale), (tq, tk, layers.teacher_scale))
        )
        residual = torch.where(valid, next(maps) - next(maps), 0)
        square = residual.to(torch.promote_types(residual.dtype, torch.float32)).square()
        loss = square.sum() / valid.sum().clamp(min=1)
        loss.backward(grad[i].to(loss.dtype))
        results.losses.append(loss.detach())
        results.d_q.append(sq.grad)
        results.d_k.append(sk.grad)
    return results


def cancelling(layers: Layers, i: int, grad: Tensor, loss: Tensor) -> tuple[float, float, float]:
    """Bounds of what cancels in a loss, in dQ and in dK: maps reach 1 where R may be 0."""
    q, k = (x[i].double().nan_to_num(0, 0, 0) for x in layers[:2])
    if not q.numel() or not k.numel():
        return 0, 0, 0
    eps = torch.finfo(torch.promote_types(layers.student_q[i].dtype, torch.float32)).eps
    n = valid_pairs(layers, i).sum().clamp(min=1)
    factor = 2 * grad[i].abs() * abs(layers.student_scale[i]) / (n * q.shape[1])
    return (
        loss.sqrt().item() + eps,
        (factor * k.abs().max()).item(),
        (factor * q.abs().max()).item(),
    )


def check(layers: Layers, grad: Tensor | None = None) -> Results:
    """Every loss and gradient by the rule of tests/tolerance.py.

    Its floor: 2 eps of the stored dtype of the result, and 2 eps of sums of what cancels in it.
    """
    grad = upstream(layers) if grad is None else grad
    ours, eager = fused(layers, grad), autograd(layers, grad)
    exact = autograd(layers, grad, torch.float64)
    for i, rows in enumerate(zip(*ours, *eager, *exact, strict=True)):
        sizes = cancelling(layers, i, grad, rows[6])
        for j, name in enumerate(Results._fields):
            actual, plain, truth = rows[j::3]
            assert actual.isfinite().all(), f"{name}[{i}]"
            wide = torch.promote_types(actual.dtype, torch.float32)
            ratio = torch.finfo(wide).eps / torch.finfo(actual.dtype).eps
            size = truth.abs().max().item() if truth.numel() else 0.0
            tolerance.assert_as_good_as_eager(
                f"{name}[{i}]", actual, plain, truth, scale=size + ratio * sizes[j]
            )
    return ours


def assert_same(a: Results, b: Results) -> None:
    for name in Results._fields:
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            assert torch.equal(x, y), name


on_each_path = pytest.mark.parametrize(("path", "dtype"), CASES, indirect=["path"])
# float16 in sweeps differs from float32 there by shifts alone, which test_one_layer sees
on_two_paths = pytest.mark.parametrize(
    ("path", "dtype"),
    [
        pytest.param(*c.values, id=c.id, marks=[*c.marks, pytest.mark.slow])
        if c.id == "sweeps-float16"
        else c
        for c in CASES
    ],
    indirect=["path"],
)
