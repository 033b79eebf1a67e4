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

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .core import (
    MAX_LAYERS,
    accumulator,
    add_product,
    device_refusals,
    dtype_refusals,
    find,
    first_tiles,
    pad,
    pad_raw,
    pick,
    pick_raw,
    total,
)
from .launch import LaunchConfig

MAX_STRIDE = 2**24  # a tile has at most 2**7 rows
ROW = 16  # elements that a row of R is padded to


@triton.jit
def _factor(bits, ACC: tl.constexpr):
    """A float64 from its bits: as an argument it would be rounded to float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)


@triton.jit
def _counts(ptr, at, length, masked):
    """Which rows count: inside, and the mask is True; masked: 1 if the layer has one, else 0."""
    return (at < length) & (tl.load(ptr + at, mask=at < length * masked, other=1) != 0)


@triton.jit
def _extent(ptr, length, masked, BLOCK: tl.constexpr):
    """The first row that counts and the one after the last; (length, 0) where none does."""
    low, high = length, length * 0
    if masked != 0:
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            counts = _counts(ptr, at, length, masked)
            low = tl.minimum(low, tl.min(tl.where(counts, at, length), axis=0))
            high = tl.maximum(high, tl.max(tl.where(counts, at + 1, 0), axis=0))
    else:
        low, high = length * 0, length
    return low, high


@triton.jit
def _valid(
    qm_ptrs,
    km_ptrs,
    q_masked,
    k_masked,
    causal,
    layer,
    item,
    row,
    col,
    n_q,
    n_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N]: which pairs of a tile are valid."""
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    row_counts = _counts(pick(qm_ptrs, layer) + item * n_q, rows, n_q, pick(q_masked, layer))
    col_counts = _counts(pick(km_ptrs, layer) + item * n_k, cols, n_k, pick(k_masked, layer))
    last = tl.where(pick(causal, layer) != 0, rows, n_k)  # the last key that a query may see
    return row_counts[:, None] & col_counts[None, :] & (cols[None, :] <= last[:, None])


@triton.jit
def _attention_scores_fwd_kernel(
    sq_ptrs,  # L x [B, H_S, N_Q, D_S] student's queries
    sk_ptrs,  # L x [B, H_S, N_K, D_S] and keys
    tq_ptrs,  # L x [B, H_T, N_Q, D_T] teacher's queries
    tk_ptrs,  # L x [B, H_T, N_K, D_T] and keys
    qm_ptrs,  # L x [B, N_Q] bool, True where a query counts; unused where not q_masked
    km_ptrs,  # L x [B, N_K] bool, True where a key counts; unused where not k_masked
    r_ptrs,  # L x [B, N_Q, N_P] out, contiguous; unused without STORE
    sum_ptr,  # [tiles] out: sum of R^2 over the tile
    count_ptr,  # [tiles] out, int32: valid pairs
    stride_sqb,  # L ints, as all below
    stride_sqh,
    stride_sqn,
    stride_skb,
    stride_skh,
    stride_skn,
    stride_tqb,
    stride_tqh,
    stride_tqn,
    stride_tkb,
    stride_tkh,
    stride_tkn,
    N_Q,
    N_K,
    N_P,  # N_K, padded
    H_S,
    D_S,
    H_T,
    D_T,
    q_masked,
    k_masked,
    causal,
    ratio,  # bits of a float64: -a_t / a_s
    scale,  # bits of a float64: a_s
    first,  # the layer's first tile
    STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,  # accumulator dtype: float32, or float64 for float64
):
    tile = tl.program_id(0)
    layer = find(first, tile)
    n_q, n_k, n_p = pick(N_Q, layer), pick(N_K, layer), pick_raw(N_P, layer)
    across, down = tl.cdiv(n_k, BLOCK_N), tl.cdiv(n_q, BLOCK_M)
    # keys fastest: the tiles of one block of queries share its rows in L2
    local = tile - pick(first, layer)
    row, col = local // across % down * BLOCK_M, local % across * BLOCK_N
    item = (local // (across * down)).to(tl.int64)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    valid = _valid(
        qm_ptrs, km_ptrs, q_masked, k_masked, causal, layer, item, row, col, n_q, n_k,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    # before the products, which have no registers to spare for it
    tl.store(count_ptr + tile, tl.sum(valid.to(tl.int32)))
    # a tile above the diagonal has no valid pair: no heads to sum over
    is_causal = pick(causal, layer) != 0
    live = tl.where(is_causal & (col >= row + BLOCK_M), 0, 1)
    # what does not count is set to 0 at the end: a row that holds nan spoils no other
    in_rows, in_cols = m < n_q - row, n < n_k - col
    stride_q, stride_k = pick_raw(stride_tqn, layer), pick_raw(stride_tkn, layer)
    acc = add_product(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC),
        pick(tq_ptrs, layer) + item * pick_raw(stride_tqb, layer) + row.to(tl.int64) * stride_q,
        pick(tk_ptrs, layer) + item * pick_raw(stride_tkb, layer) + col.to(tl.int64) * stride_k,
        pick_raw(stride_tqh, layer),
        stride_q,
        1,
        pick_raw(stride_tkh, layer),
        1,
        stride_k,
        in_rows,
        in_cols,
        pick(H_T, layer) * live,
        pick_raw(D_T, layer),
        BLOCK_K,
    )
    acc *= _factor(pick_raw(ratio, layer), ACC)
    stride_q, stride_k = pick_raw(stride_sqn, layer), pick_raw(stride_skn, layer)
    acc = add_product(
        acc,
        pick(sq_ptrs, layer) + item * pick_raw(stride_sqb, layer) + row.to(tl.int64) * stride_q,
        pick(sk_ptrs, layer) + item * pick_raw(stride_skb, layer) + col.to(tl.int64) * stride_k,
        pick_raw(stride_sqh, layer),
        stride_q,
        1,
        pick_raw(stride_skh, layer),
        1,
        stride_k,
        in_rows,
        in_cols,
        pick(H_S, layer) * live,
        pick_raw(D_S, layer),
        BLOCK_K,
    )
    # read again rather than kept: masks take 32 registers
    valid = _valid(
        qm_ptrs, km_ptrs, q_masked, k_masked, causal, layer, item, row, col, n_q, n_k,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    r = tl.where(valid, acc * _factor(pick_raw(scale, layer), ACC), 0.0)
    tl.store(sum_ptr + tile, tl.sum(r * r))
    if STORE:
        r_ptr = pick(r_ptrs, layer)
        r_tile = r_ptr + (item * n_q + row) * n_p + col + m[:, None] * n_p + n[None, :]
        inside = in_rows[:, None] & (n < n_p - col)[None, :]
        tl.store(r_tile, r.to(r_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _attention_scores_bwd_kernel(
    r_ptrs,  # L x [B, N_Q, N_P] residuals, contiguous
    x_ptrs,  # L x [B, H, N_K, D] keys; TRANSPOSED: [B, H, N_Q, D] queries
    qm_ptrs,  # L x [B, N_Q] bool; unused where not q_masked
    km_ptrs,  # L x [B, N_K] bool; unused where not k_masked
    dx_ptrs,  # L x [B, H, N_Q, D] out: of the queries; TRANSPOSED: [B, H, N_K, D] of the keys
    factor_ptr,  # [P] 2 g / n of every layer of the call
    place,  # L ints, as all below: the layer's place in factor_ptr
    stride_xb,
    stride_xh,
    stride_xn,
    stride_dxb,
    stride_dxh,
    stride_dxn,
    N_Q,
    N_K,
    N_P,
    H,
    D,
    q_masked,
    k_masked,
    causal,
    scale,  # bits of a float64: a_s
    first,
    TRANSPOSED: tl.constexpr,  # R^T Q rather than R K
    MASKED: tl.constexpr,  # whether any layer has a mask
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    tile = tl.program_id(0)
    layer = find(first, tile)
    n_q, n_k, n_p = pick(N_Q, layer), pick(N_K, layer), pick_raw(N_P, layer)
    q_mask, k_mask = pick(q_masked, layer), pick(k_masked, layer)
    heads, d = pick(H, layer), pick_raw(D, layer)
    n_out = n_k if TRANSPOSED else n_q
    # columns, then heads fastest: they share the rows of R in L2
    across, down = tl.cdiv(d, BLOCK_N), tl.cdiv(n_out, BLOCK_M)
    local = tile - pick(first, layer)
    col = local % across * BLOCK_N
    head = (local // across % heads).to(tl.int64)
    row = local // (across * heads) % down * BLOCK_M
    item = (local // (across * heads * down)).to(tl.int64)
    qm_ptr, km_ptr = pick(qm_ptrs, layer) + item * n_q, pick(km_ptrs, layer) + item * n_k
    # the inner rows that can have a valid pair; what else they hold must not enter the product
    is_causal = pick(causal, layer) != 0
    if TRANSPOSED:
        low, high = row * 0, n_q
        if is_causal:
            low = row
        if MASKED:
            first_key, end_key = _extent(km_ptr, n_k, k_mask, BLOCK_K * 8)
            if is_causal:
                low = tl.maximum(low, first_key)
            high = tl.where(end_key == 0, 0, high)
    else:
        low, high = row * 0, n_k
        if is_causal:
            high = tl.minimum(tl.minimum(high, n_q), row + BLOCK_M)
        if MASKED:
            _, end_query = _extent(qm_ptr, n_q, q_mask, BLOCK_K * 8)
            if is_causal:
                high = tl.minimum(high, end_query)
            high = tl.where(end_query == 0, 0, high)
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_cols = n < d - col
    r_ptr = pick(r_ptrs, layer) + item * n_q * n_p
    stride_x = pick_raw(stride_xn, layer)
    x_ptr = pick(x_ptrs, layer)
    x_ptr += item * pick_raw(stride_xb, layer) + head * pick_raw(stride_xh, layer)
    x_tile = x_ptr + col + k[:, None] * stride_x + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in range(low, high, BLOCK_K):
        inner = start + k
        if TRANSPOSED:
            r_tile = r_ptr + tl.cast(start, tl.int64) * n_p + row + k[:, None] * n_p + m[None, :]
            inside = (inner < high)[:, None] & (m < n_p - row)[None, :]
            r = tl.trans(tl.load(r_tile, mask=inside, other=0.0))
        else:
            r_tile = r_ptr + row.to(tl.int64) * n_p + start + m[:, None] * n_p + k[None, :]
            inside = (m < n_q - row)[:, None] & (k < n_p - start)[None, :]
            r = tl.load(r_tile, mask=inside, other=0.0)
        counts = inner < high
        if MASKED:
            if TRANSPOSED:
                counts = _counts(qm_ptr, inner, high, q_mask)
            else:
                counts = _counts(km_ptr, inner, high, k_mask)
        x_mask = counts[:, None] & in_cols[None, :]
        x = tl.load(x_tile + tl.cast(start, tl.int64) * stride_x, mask=x_mask, other=0.0)
        acc = tl.dot(r, x, acc, input_precision="ieee", out_dtype=ACC)
    factor = tl.load(factor_ptr + pick(place, layer)) * _factor(pick_raw(scale, layer), ACC)
    dx_ptr = pick(dx_ptrs, layer)
    stride_dx = pick_raw(stride_dxn, layer)
    dx_ptr += item * pick_raw(stride_dxb, layer) + head * pick_raw(stride_dxh, layer)
    dx_tile = dx_ptr + row.to(tl.int64) * stride_dx + col + m[:, None] * stride_dx + n[None, :]
    inside = (m < n_out - row)[:, None] & in_cols[None, :]
    tl.store(dx_tile, (acc * factor).to(dx_ptr.dtype.element_ty), mask=inside)


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


def _bits(x: float) -> int:
    """Odd, and far from 1: no other factor needs another compilation."""
    return int(struct.unpack("q", struct.pack("d", x or -0.0))[0]) | 1


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
            _attention_scores_fwd_kernel[(tiles,)](
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
                pad_raw([_bits(x) for x in ratio]),
                pad_raw([_bits(x or 1.0) for x in a_s]),
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
        _attention_scores_bwd_kernel[(tiles,)](
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
            pad_raw([_bits(student_scale[i] / inner[i].shape[1]) for i in part]),
            pad(first[:-1], tiles),
            TRANSPOSED=transposed,
            MASKED=any((*q_masked, *k_masked)),
            ACC=accumulator(r[0])[1],
            **launch.options(config),
        )
