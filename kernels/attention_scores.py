"""Mean squared error of head-averaged attention scores, for many layers in one launch.

    R = V (a_s sum_h Qs_h Ks_h^T - a_t sum_h Qt_h Kt_h^T)    a = scale / heads, V: the valid pairs
    loss = sum R^2 / n              n = valid pairs; none: 0
    dQs_h = (2 g a_s / n) R Ks_h    g: upstream gradient of the layer's loss
    dKs_h = (2 g a_s / n) R^T Qs_h

Q: [B, H, Nq, d], K: [B, H, Nk, d]; heads and head sizes may differ between the models. A pair is
valid where the query counts, the key counts and causality lets the one see the other. The sum over
heads is an inner dimension of the product, so that R is one product a model, whatever the number of
heads: where a token's heads lie side by side, H heads of d are one of H d. A query or key without a
valid pair may hold nan or inf. R is stored in the student's dtype, and only when a gradient is
wanted, its rows padded to 16 elements with zeros, so that they are read 16 bytes at a time.

Per layer, with D = H d: bytes moved, in elements: forward B (Nq + Nk) (D_s + D_t) + B Nq Nk, the
last for R; dQ B (Nq Nk + Nk D_s + Nq D_s), dK alike. FLOPs: 2 B Nq Nk (D_s + D_t) forward and
2 B Nq Nk D_s for either gradient; half if causal: tiles without a valid pair do no products.

The gradients are Triton: what cuBLAS returns would need another pass for the upstream scalar, and
float32 or an overflow for float16, and it cannot keep nan out of its products. float32 uses IEEE
products. Products and sums are kept in float32, for float64 in float64. There are no atomics: every
sum has a fixed order and results are bit-reproducible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import launch
from .core import (
    MAX_LAYERS,
    accumulator,
    bits,
    device_refusals,
    dtype_refusals,
    first_tiles,
    pad,
    pad_raw,
    total,
)
from .launch import LaunchConfig
from .scores_kernels import attention_scores_bwd_kernel, attention_scores_fwd_kernel

MAX_STRIDE = 2**24  # a tile has at most 2**7 rows
ROW = 16  # elements that a row of R is padded to


class _Operand(NamedTuple):
    """Queries, keys or a gradient of theirs as a launch takes them."""

    x: Tensor
    heads: int
    width: int
    stride_b: int
    stride_h: int
    stride_n: int


def _operands(*tensors: Tensor) -> list[_Operand]:
    """Tensors ``[B, H, N, d]`` of one H and d; as one head of H d if all their heads lie so."""
    _, heads, _, d = tensors[0].shape
    joined = heads == 1 or all(x.stride(1) == d for x in tensors)
    heads, width = (1, heads * d) if joined else (heads, d)
    operands = []
    for x in tensors:
        sizes = (len(x), heads, x.shape[2])
        # a stride without a step is 0, like any multiple of 16
        steps = (s if n > 1 else 0 for s, n in zip(x.stride(), sizes, strict=False))
        operands.append(_Operand(x, heads, width, *steps))
    return operands


def _unit_stride(x: Tensor) -> Tensor:
    """Rows that lie so that offsets within a tile fit 32 bits; a copy if they do not."""
    near = x.stride(2) < MAX_STRIDE or x.shape[2] == 1
    return x if x.stride(3) == 1 and near else x.contiguous()


def _masks(masks: Sequence[Tensor | None], other: Tensor) -> tuple[list[Tensor], list[int]]:
    """What a launch takes for masks, and which layers have one."""
    flags = [int(m is not None) for m in masks]
    return [other if m is None else m.contiguous() for m in masks], flags


def not_served(
    student_q: Sequence[Tensor],
    student_k: Sequence[Tensor],
    teacher_q: Sequence[Tensor],
    teacher_k: Sequence[Tensor],
) -> list[str]:
    """Each reason why these kernels cannot take the inputs; empty if they can."""
    student, teacher = (*student_q, *student_k), (*teacher_q, *teacher_k)
    reasons = device_refusals((*student, *teacher))
    return reasons + dtype_refusals("students", student) + dtype_refusals("teachers", teacher)


def attention_scores_forward(
    student_q: Sequence[Tensor],
    student_k: Sequence[Tensor],
    teacher_q: Sequence[Tensor],
    teacher_k: Sequence[Tensor],
    query_masks: Sequence[Tensor | None],
    key_masks: Sequence[Tensor | None],
    *,
    causal: Sequence[bool],
    student_scale: Sequence[float],
    teacher_scale: Sequence[float],
    need_residual: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Losses of L layers, and what their backward needs.

    Args:
        student_q, student_k: L x ``[B, H, Nq, d]`` and ``[B, H, Nk, d]`` of one dtype. All sizes
            may differ from layer to layer.
        teacher_q, teacher_k: likewise of one dtype, with heads and head sizes of their own.
        query_masks: L x ``[B, Nq]`` bool, True where a query counts, or None where each does.
        key_masks: L x ``[B, Nk]``, likewise.
        causal: L flags: whether a query sees no key after its own place.
        student_scale, teacher_scale: L factors of the scores.
        need_residual: whether a gradient will be wanted.

    Returns:
        losses ``[L]`` and scales ``[L]`` (2 / n, n at least 1), float32 or float64; and between
        them the residuals as ``empty_residual`` makes them, or an empty list.
    """
    layers = len(student_q)
    if layers > MAX_LAYERS:
        lists = (student_q, student_k, teacher_q, teacher_k, query_masks, key_masks)
        head, tail = (
            attention_scores_forward(
                *(x[part] for x in lists),  # type: ignore[arg-type]
                causal=causal[part],
                student_scale=student_scale[part],
                teacher_scale=teacher_scale[part],
                need_residual=need_residual,
            )
            for part in (slice(MAX_LAYERS), slice(MAX_LAYERS, None))
        )
        return torch.cat([head[0], tail[0]]), head[1] + tail[1], torch.cat([head[2], tail[2]])
    sides = []
    for queries, keys in ((student_q, student_k), (teacher_q, teacher_k)):
        pairs = [
            _operands(_unit_stride(q), _unit_stride(k)) for q, k in zip(queries, keys, strict=True)
        ]
        sides.append(tuple(zip(*pairs, strict=True)))
    (sq, sk), (tq, tk) = sides
    like = sq[0].x
    N_Q, N_K = [x.shape[2] for x in student_q], [x.shape[2] for x in student_k]
    r = [empty_residual(q, k) for q, k in zip(student_q, student_k, strict=True) if need_residual]
    torch_acc, acc = accumulator(like)
    config = _forward_config(like, max(*N_Q, *N_K))
    first = first_tiles(
        len(q) * triton.cdiv(n_q, config.block_m) * triton.cdiv(n_k, config.block_n)
        for q, n_q, n_k in zip(student_q, N_Q, N_K, strict=True)
    )
    tiles = first[-1]
    sums = like.new_empty(tiles, dtype=torch_acc)
    counts = like.new_empty(tiles, dtype=torch.int32)
    unused = like.new_empty(1, dtype=torch.bool)
    qm, q_masked = _masks(query_masks, unused)
    km, k_masked = _masks(key_masks, unused)
    a_s = [s / q.shape[1] for s, q in zip(student_scale, student_q, strict=True)]
    a_t = [s / q.shape[1] for s, q in zip(teacher_scale, teacher_q, strict=True)]
    # R = (T ratio + S) scale; without the student's heads where its scale is 0
    ratio = [-t / s if s else -t for s, t in zip(a_s, a_t, strict=True)]
    with torch.cuda.device_of(like):
        if tiles:
            attention_scores_fwd_kernel[(tiles,)](
                *(pad([o.x for o in side]) for side in (sq, sk, tq, tk)),
                pad(qm),
                pad(km),
                pad(r or [like]),
                sums,
                counts,
                *(pad_raw([o[i] for o in side]) for side in (sq, sk, tq, tk) for i in (3, 4, 5)),
                pad(N_Q),
                pad(N_K),
                pad_raw([_padded(n) for n in N_K]),
                pad([o.heads if s else 0 for o, s in zip(sq, a_s, strict=True)]),
                pad_raw([o.width for o in sq]),
                pad([o.heads for o in tq]),
                pad_raw([o.width for o in tq]),
                pad(q_masked),
                pad(k_masked),
                pad([int(c) for c in causal]),
                pad_raw([bits(x) for x in ratio]),
                pad_raw([bits(x or 1.0) for x in a_s]),
                pad(first[:-1], tiles),
                STORE=need_residual,
                ACC=acc,
                **launch.options(config),
            )
        losses, scales = total(sums, counts, [1] * layers, first)
    return losses, r, scales


def _padded(keys: int) -> int:
    return triton.cdiv(keys, ROW) * ROW


def empty_residual(query: Tensor, key: Tensor) -> Tensor:
    """Room for a residual, ``[B, Nq, Nk]``: a view of rows padded to a multiple of 16 elements."""
    (B, _, Nq, _), Nk = query.shape, key.shape[2]
    return query.new_empty(B, Nq, _padded(Nk))[..., :Nk]


def _rows(residual: Tensor) -> tuple[Tensor, int]:
    """A residual and the length of its rows: not padded if something has copied it since."""
    (_, Nq, Nk), row = residual.shape, _padded(residual.shape[2])
    if residual.stride() == (Nq * row, row, 1):
        return residual, row
    return residual.contiguous(), Nk


def _forward_config(x: Tensor, longest: int) -> LaunchConfig:
    bucket = 64 if longest <= 64 else 128
    return launch.lookup(
        launch.ATTENTION_SCORES_FORWARD, launch.capability(x), x.element_size(), bucket
    )


def _backward_config(x: Tensor, widest: int) -> LaunchConfig:
    bucket = 64 if widest <= 64 else 128
    return launch.lookup(
        launch.ATTENTION_SCORES_BACKWARD, launch.capability(x), x.element_size(), bucket
    )


def attention_scores_backward(
    grad: Tensor,
    student_q: Sequence[Tensor],
    student_k: Sequence[Tensor],
    query_masks: Sequence[Tensor | None],
    key_masks: Sequence[Tensor | None],
    residuals: Sequence[Tensor],
    scales: Tensor,
    *,
    causal: Sequence[bool],
    student_scale: Sequence[float],
    need_q: Sequence[bool],
    need_k: Sequence[bool],
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of L layers from what the forward kept, which is only read.

    Args:
        grad: ``[L]``, the upstream gradient; read on the device.
        student_q, student_k, query_masks, key_masks, causal, student_scale: as given to
            ``attention_scores_forward``.
        residuals, scales: as it returned them.
        need_q, need_k: L flags: which gradients to compute.
        dtype: of the gradients, each input's own by default.

    Returns:
        dQ, L x ``[B, H, Nq, d]``, and dK, L x ``[B, H, Nk, d]``, laid out as ``torch.empty_like``
        of their input; None where none was asked for.
    """
    factor = (grad * scales).to(scales.dtype).contiguous()
    results: list[list[Tensor | None]] = []
    for transposed, need in ((False, need_q), (True, need_k)):
        gradients: list[Tensor | None] = [None] * len(student_q)
        wanted = [i for i, flag in enumerate(need) if flag]
        for start in range(0, len(wanted), MAX_LAYERS):
            part = wanted[start : start + MAX_LAYERS]
            outer, inner = (student_k, student_q) if transposed else (student_q, student_k)
            out = [torch.empty_like(outer[i], dtype=dtype) for i in part]
            written = [_unit_stride(x) for x in out]  # other memory where kernels cannot write it
            _gradients(
                part, written, inner, query_masks, key_masks, residuals, factor, causal,
                student_scale, transposed,
            )  # fmt: skip
            for i, gradient, result in zip(part, out, written, strict=True):
                gradients[i] = gradient if gradient is result else gradient.copy_(result)
        results.append(gradients)
    return results[0], results[1]


def _gradients(
    part: Sequence[int],
    out: Sequence[Tensor],
    inner: Sequence[Tensor],
    query_masks: Sequence[Tensor | None],
    key_masks: Sequence[Tensor | None],
    residuals: Sequence[Tensor],
    factor: Tensor,
    causal: Sequence[bool],
    student_scale: Sequence[float],
    transposed: bool,
) -> None:
    """Fill ``out``, the gradients of the layers of ``part``, in one launch."""
    r, row = zip(*(_rows(residuals[i]) for i in part), strict=True)
    pairs = [_operands(_unit_stride(inner[i]), y) for i, y in zip(part, out, strict=True)]
    x, dx = zip(*pairs, strict=True)
    config = _backward_config(r[0], max(o.width for o in x))
    first = first_tiles(
        len(y) * o.heads * triton.cdiv(y.shape[2], config.block_m)
        * triton.cdiv(o.width, config.block_n)
        for y, o in zip(out, x, strict=True)
    )  # fmt: skip
    tiles = first[-1]
    if not tiles:
        return
    unused = r[0].new_empty(1, dtype=torch.bool)
    qm, q_masked = _masks([query_masks[i] for i in part], unused)
    km, k_masked = _masks([key_masks[i] for i in part], unused)
    with torch.cuda.device_of(r[0]):
        attention_scores_bwd_kernel[(tiles,)](
            pad(r),
            pad([o.x for o in x]),
            pad(qm),
            pad(km),
            pad([o.x for o in dx]),
            factor,
            pad(part),
            *(pad_raw([o[i] for o in side]) for side in (x, dx) for i in (3, 4, 5)),
            pad([y.shape[1] for y in r]),
            pad([y.shape[2] for y in r]),
            pad_raw(row),
            pad([o.heads for o in x]),
            pad_raw([o.width for o in x]),
            pad(q_masked),
            pad(k_masked),
            pad([int(causal[i]) for i in part]),
            pad_raw([bits(student_scale[i] / inner[i].shape[1]) for i in part]),
            pad(first[:-1], tiles),
            TRANSPOSED=transposed,
            MASKED=any((*q_masked, *k_masked)),
            ACC=accumulator(r[0])[1],
            **launch.options(config),
        )
