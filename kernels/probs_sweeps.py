"""Kernels of head-averaged attention maps of any size: log-sum-exp, residual, dQ and dK.

One sweep over the heads needs each head's normaliser first, hence two passes over Q K^T; the first
is skipped where a model's own attention gave the log-sum-exp. Each sweep over keys or queries runs
twice: where every pair counts nothing is tested, and only the blocks at an edge pay for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .attention_tiles import (
    LOG2E,
    Counted,
    Model,
    add_map,
    config,
    counted,
    first_seen,
    in_reach,
    keys_seen,
    load_residual,
    load_rows,
    log_sums,
    place,
    placed,
    positive,
    products,
    residual_width,
    shifts,
    store_residual,
    store_rows,
    strides,
    valid_count,
    valid_pairs,
    width,
)
from .core import accumulator
from .launcher import kernel
from .layers import cdiv, groups, of_layers, pick, pointers, settle, total

LN2 = tl.constexpr(0.6931471805599453)
LEAST_PROBABILITY = tl.constexpr(1e-30)  # of a student's mean over heads, as in the losses


@triton.jit
def _lse_sweep(
    top, total, q, c, q_ptr, k_base, stride_q, stride_k, mask, rows, item, row, start, stop, keys,
    EDGE: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The running maximum and sum of exponentials after the keys from start to stop."""
    for col in tl.range(start, stop, BLOCK_N):
        cols = counted(mask, item, col, keys, MASKED and EDGE, BLOCK_N)
        k_ptr = k_base + tl.cast(col, tl.int64) * stride_k
        k = load_rows(k_ptr, stride_k, cols, 0, WIDTH, D, not EDGE)
        s = products(q, k, q_ptr, k_ptr, stride_q, stride_k, rows, cols, WIDTH, CHUNK, D, ACC)
        if EDGE:
            # before the exponential: a key that does not count may hold nan or inf
            s = tl.where(valid_pairs(rows, cols, row, col, CAUSAL, WINDOW), s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, axis=1) * c)
        safe = higher
        if EDGE:  # inf - inf is nan
            safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(s * c - safe[:, None]), axis=1)
        top = higher
    return top, total


@kernel(["heads", "scale", "queries", "keys"])
def _lse_kernel(
    model,  # Heads
    masks,  # Masks
    lse_ptrs,  # [B, H, Nq] out
    heads,
    scale,
    queries,
    keys,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(1)
    # query blocks fastest: those of one head share its keys in L2
    tile, blocks = tl.program_id(0), tl.cdiv(queries, BLOCK_M)
    row, head, item = tile % blocks * BLOCK_M, tile // blocks % heads, tile // blocks // heads
    rows = counted(pick(masks.query, layer), item, row, queries, MASKED, BLOCK_M)
    at = placed(masks, row)
    end = keys_seen(rows, at, keys, CAUSAL, WINDOW)
    stride_q, stride_k = model.q_stride[2], model.k_stride[2]
    q_ptr = place(pick(model.q, layer), model.q_stride, item, head, row)
    k_base = place(pick(model.k, layer), model.k_stride, item, head // model.share, 0)
    q = load_rows(q_ptr, stride_q, rows, 0, WIDTH, D, False)
    key_mask = pick(masks.key, layer)
    c = positive(scale, ACC)
    top = tl.full((BLOCK_M,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    # the keys that all of the block see, none of them masked
    inner = first_seen(at, WINDOW, BLOCK_N)
    if not (MASKED or WINDOW):
        inner = (tl.minimum(at + 1, end) if CAUSAL else end) // BLOCK_N * BLOCK_N
        top, total = _lse_sweep(
            top, total, q, c, q_ptr, k_base, stride_q, stride_k, key_mask, rows, item, at,
            0, inner, end, False, MASKED, CAUSAL, WINDOW, BLOCK_N, WIDTH, BLOCK_K, D, ACC,
        )  # fmt: skip
    top, total = _lse_sweep(
        top, total, q, c, q_ptr, k_base, stride_q, stride_k, key_mask, rows, item, at,
        inner, end, keys, True, MASKED, CAUSAL, WINDOW, BLOCK_N, WIDTH, BLOCK_K, D, ACC,
    )  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    lse_ptr = pick(lse_ptrs, layer) + (item.to(tl.int64) * heads + head) * queries + row
    lse = tl.where(total == 0, -float("inf"), top + tl.log2(tl.where(total == 0, 1.0, total)))
    tl.store(lse_ptr + m, lse, mask=m < queries - row)


@kernel([
    "student_heads", "student_scale", "teacher_heads", "teacher_scale", "queries", "keys",
])  # fmt: skip
def _residual_kernel(
    student,  # Heads
    teacher,
    masks,  # Masks
    student_lse,  # [B, H_s, Nq]
    teacher_lse,
    r_ptrs,  # [B, Nq, stride_r] out; unused without STORE
    sum_ptr,  # [L, tiles] out: sum of R^2 over the tile, or of the divergence
    count_ptr,  # [L, tiles] int32 out: pairs that count; unused unless MASKED
    student_heads,
    student_scale,
    teacher_heads,
    teacher_scale,
    queries,
    keys,
    stride_r,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    WHOLE: tl.constexpr,  # sizes are multiples of the tile's
    KL: tl.constexpr,
    STORE: tl.constexpr,
    SHIFT: tl.constexpr,
    STUDENT_D: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_D: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(1)
    # an item's tiles side by side: they share its queries and keys in L2
    tile, across, down = tl.program_id(0), tl.cdiv(keys, BLOCK_N), tl.cdiv(queries, BLOCK_M)
    col, row = tile % across * BLOCK_N, tile // across % down * BLOCK_M
    item = tile // across // down
    rows, cols = tl.arange(0, BLOCK_M) < queries - row, tl.arange(0, BLOCK_N) < keys - col
    if CAUSAL or WINDOW:  # a tile without a pair that sees one another has no heads to sum over
        live = in_reach(placed(masks, row), col, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
        student_heads, teacher_heads = student_heads * live, teacher_heads * live
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc = add_map(
        acc, 1.0, student, pick(student_lse, layer), student_heads, student_scale, layer, item,
        row, col, queries, rows, cols, WHOLE, STUDENT_WIDTH, BLOCK_K, STUDENT_D, ACC,
    )  # fmt: skip
    other = acc
    if KL:
        other = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    other = add_map(
        other, 1.0 if KL else -1.0, teacher, pick(teacher_lse, layer), teacher_heads,
        teacher_scale, layer, item, row, col, queries, rows, cols, WHOLE,
        TEACHER_WIDTH, BLOCK_K, TEACHER_D, ACC,
    )  # fmt: skip
    at = layer.to(tl.int64) * tl.num_programs(0) + tile
    if MASKED or CAUSAL or WINDOW or not WHOLE:
        if MASKED:
            rows = counted(pick(masks.query, layer), item, row, queries, True, BLOCK_M)
            cols = counted(pick(masks.key, layer), item, col, keys, True, BLOCK_N)
        valid = valid_pairs(rows, cols, placed(masks, row), col, CAUSAL, WINDOW)
        # both 0 where nothing counts: no divergence, and after it no residual
        acc, other = tl.where(valid, acc, 0.0), tl.where(valid, other, 0.0)
        if MASKED:
            tl.store(count_ptr + at, tl.sum(valid.to(tl.int32)))
    if KL:
        ratio = other / tl.maximum(acc, LEAST_PROBABILITY)
        terms = other * (tl.log2(tl.maximum(ratio, LEAST_PROBABILITY)) * LN2)
        tl.store(sum_ptr + at, tl.sum(tl.where(other > 0, terms, 0.0)))
        other = tl.where(acc < LEAST_PROBABILITY, 1.0, 1.0 - ratio)
        if MASKED or CAUSAL or WINDOW or not WHOLE:
            other = tl.where(valid, other, 0.0)
    else:
        tl.store(sum_ptr + at, tl.sum(other * other))
    if STORE:
        r_ptr = pick(r_ptrs, layer) + item.to(tl.int64) * queries * stride_r
        store_residual(r_ptr, other, stride_r, row, col, queries, SHIFT)


@triton.jit
def _row_sum(total, x, one, ACC: tl.constexpr):
    """total + the sum of each row of a tile as rounded; by tensor cores where it is of 16 bits."""
    if x.dtype.primitive_bitwidth == 16:
        total = tl.dot(x, one, total, out_dtype=ACC)
    else:
        total += tl.sum(x, axis=1)[:, None]
    return total


@triton.jit
def _dq_sweep(
    u, v, u_sum, v_sum, q, c, lse, q_ptr, k_base, r_ptr, stride_q, stride_k, stride_r,
    mask, rows, in_rows, item, row, place_of_row, start, stop, keys,
    EDGE: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SETTLE: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """u, v and their sums after the keys from start to stop."""
    one = tl.full((BLOCK_N, 16), 1.0, q.dtype)
    for col in tl.range(start, stop, BLOCK_N):
        cols = counted(mask, item, col, keys, MASKED and EDGE, BLOCK_N)
        in_cols = tl.arange(0, BLOCK_N) < BLOCK_N
        if EDGE:
            # a key that no query of the block sees reads as 0: it may hold nan, and 0 * nan is nan
            cols &= tl.arange(0, BLOCK_N) < stop - col
            in_cols = tl.arange(0, BLOCK_N) < stride_r - col
        k_ptr = k_base + tl.cast(col, tl.int64) * stride_k
        k = load_rows(k_ptr, stride_k, cols, 0, WIDTH, D, not EDGE)
        r = load_residual(r_ptr, stride_r, row, col, in_rows, in_cols)
        s = products(q, k, q_ptr, k_ptr, stride_q, stride_k, rows, cols, WIDTH, CHUNK, D, ACC)
        p = tl.exp2(s * c - lse[:, None])
        if EDGE:
            p = tl.where(valid_pairs(rows, cols, place_of_row, col, CAUSAL, WINDOW), p, 0.0)
        pr = (p * r).to(k.dtype)
        p = p.to(k.dtype)
        # of the rounded factors, so that their errors cancel in u - term v
        u_sum = _row_sum(u_sum, pr, one, ACC)
        v_sum = _row_sum(v_sum, p, one, ACC)
        u = settle(tl.dot(pr, k, u, input_precision="ieee", out_dtype=ACC), SETTLE)
        v = settle(tl.dot(p, k, v, input_precision="ieee", out_dtype=ACC), SETTLE)
        u_sum, v_sum = settle(u_sum, SETTLE), settle(v_sum, SETTLE)
    return u, v, u_sum, v_sum


@kernel(["heads", "scale", "queries", "keys"])
def _dq_kernel(
    student,  # Heads
    masks,  # Masks
    lse_ptrs,  # [B, H, Nq]
    r_ptrs,  # [B, Nq, stride_r]
    term_ptrs,  # [B, H, Nq] out: sum_j P_ij R_ij, in the residual's units
    dq_ptrs,  # [B, H, Nq, D] out
    factor_ptr,  # [L]: 2 g / n
    heads,
    scale,
    queries,
    keys,
    stride_r,
    dq_stride,  # of B, H and Nq
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SETTLE: tl.constexpr,
    P_SHIFT: tl.constexpr,
    R_SHIFT: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(1)
    # heads fastest: they share a strip of the residual in L2
    tile, down = tl.program_id(0), tl.cdiv(queries, BLOCK_M)
    head, row, item = tile % heads, tile // heads % down * BLOCK_M, tile // heads // down
    inside = tl.arange(0, BLOCK_M) < queries - row
    rows = counted(pick(masks.query, layer), item, row, queries, MASKED, BLOCK_M)
    place_of_row = placed(masks, row)
    end = keys_seen(rows, place_of_row, keys, CAUSAL, WINDOW)
    at = (item.to(tl.int64) * heads + head) * queries + row
    lse, rows = log_sums(pick(lse_ptrs, layer) + at, rows, P_SHIFT, MASKED)
    stride_q, stride_k = student.q_stride[2], student.k_stride[2]
    q_ptr = place(pick(student.q, layer), student.q_stride, item, head, row)
    k_base = place(pick(student.k, layer), student.k_stride, item, head // student.share, 0)
    r_ptr = pick(r_ptrs, layer) + item.to(tl.int64) * queries * stride_r
    key_mask = pick(masks.key, layer)
    q = load_rows(q_ptr, stride_q, rows, 0, WIDTH, D, False)
    scale = tl.cast(scale, ACC)
    c = scale * LOG2E
    u, v = tl.zeros((BLOCK_M, WIDTH), ACC), tl.zeros((BLOCK_M, WIDTH), ACC)
    u_sum, v_sum = tl.zeros((BLOCK_M, 16), ACC), tl.zeros((BLOCK_M, 16), ACC)
    inner = first_seen(place_of_row, WINDOW, BLOCK_N)
    if not (MASKED or WINDOW):
        inner = (tl.minimum(place_of_row + 1, end) if CAUSAL else end) // BLOCK_N * BLOCK_N
        u, v, u_sum, v_sum = _dq_sweep(
            u, v, u_sum, v_sum, q, c, lse, q_ptr, k_base, r_ptr, stride_q, stride_k, stride_r,
            key_mask, rows, inside, item, row, place_of_row, 0, inner, keys,
            False, MASKED, CAUSAL, WINDOW, SETTLE, BLOCK_N, WIDTH, BLOCK_K, D, ACC,
        )  # fmt: skip
    u, v, u_sum, v_sum = _dq_sweep(
        u, v, u_sum, v_sum, q, c, lse, q_ptr, k_base, r_ptr, stride_q, stride_k, stride_r,
        key_mask, rows, inside, item, row, place_of_row, inner, end, keys,
        True, MASKED, CAUSAL, WINDOW, SETTLE, BLOCK_N, WIDTH, BLOCK_K, D, ACC,
    )  # fmt: skip
    # 16 columns that are alike
    u_row, v_row = tl.max(u_sum, axis=1), tl.max(v_sum, axis=1)
    term = u_row / tl.where(v_row == 0, 1.0, v_row)
    tl.store(pick(term_ptrs, layer) + at + tl.arange(0, BLOCK_M), term, mask=inside)
    alpha = tl.load(factor_ptr + layer) * scale / heads * 2.0 ** -(P_SHIFT + R_SHIFT)
    dq_ptr = place(pick(dq_ptrs, layer), dq_stride, item, head, row)
    store_rows(dq_ptr, alpha * (u - term[:, None] * v), dq_stride[2], inside, D)


@triton.jit
def _dk_sweep(
    dk, k, c, k_ptr, q_base, r_ptr, lse_ptr, term_ptr, stride_q, stride_k, stride_r,
    mask, cols, item, col, place_of_col, start, stop, queries,
    EDGE: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SETTLE: tl.constexpr, P_SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk after the queries from start to stop."""
    m = tl.arange(0, BLOCK_M)
    in_cols = tl.arange(0, BLOCK_N) < stride_r - col
    for row in tl.range(start, stop, BLOCK_M):
        rows = counted(mask, item, row, queries, MASKED and EDGE, BLOCK_M)
        in_rows = m < BLOCK_M
        if EDGE:
            in_rows = m < queries - row
            lse, rows = log_sums(lse_ptr + row, rows, P_SHIFT, MASKED)
            term = tl.load(term_ptr + row + m, mask=rows, other=0.0)
        else:
            lse = tl.load(lse_ptr + row + m) - P_SHIFT
            term = tl.load(term_ptr + row + m)
        q_ptr = q_base + tl.cast(row, tl.int64) * stride_q
        q = load_rows(q_ptr, stride_q, rows, 0, WIDTH, D, not EDGE)
        r = load_residual(r_ptr, stride_r, row, col, in_rows, in_cols)
        s = products(q, k, q_ptr, k_ptr, stride_q, stride_k, rows, cols, WIDTH, CHUNK, D, ACC)
        p = tl.exp2(s * c - lse[:, None])
        if EDGE:
            p = tl.where(valid_pairs(rows, cols, row, place_of_col, CAUSAL, WINDOW), p, 0.0)
        ds = (p * (r - term[:, None])).to(q.dtype)
        dk = settle(tl.dot(tl.trans(ds), q, dk, input_precision="ieee", out_dtype=ACC), SETTLE)
    return dk


@kernel(["heads", "scale", "queries", "keys"])
def _dk_kernel(
    student,  # Heads
    masks,  # Masks
    lse_ptrs,  # [B, H, Nq]
    r_ptrs,  # [B, Nq, stride_r]
    term_ptrs,  # [B, H, Nq], as _dq_kernel wrote it
    dk_ptrs,  # [B, H / share, Nk, D] out
    factor_ptr,  # [L]
    heads,
    scale,
    queries,
    keys,
    stride_r,
    dk_stride,  # of B, H and Nk
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SETTLE: tl.constexpr,
    P_SHIFT: tl.constexpr,
    R_SHIFT: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(1)
    tile, across, shared = tl.program_id(0), tl.cdiv(keys, BLOCK_N), heads // student.share
    key_head, col = tile % shared, tile // shared % across * BLOCK_N
    item = tile // shared // across
    inside = tl.arange(0, BLOCK_N) < keys - col
    cols = counted(pick(masks.key, layer), item, col, keys, MASKED, BLOCK_N)
    stride_q, stride_k = student.q_stride[2], student.k_stride[2]
    k_ptr = place(pick(student.k, layer), student.k_stride, item, key_head, col)
    k = load_rows(k_ptr, stride_k, cols, 0, WIDTH, D, False)
    r_ptr = pick(r_ptrs, layer) + item.to(tl.int64) * queries * stride_r
    query_mask = pick(masks.query, layer)
    scale = tl.cast(scale, ACC)
    c = scale * LOG2E
    dk = tl.zeros((BLOCK_N, WIDTH), ACC)
    # queries that see some of the keys, those that see all of them, and what is left of a block
    low, end = col * 0, queries
    place_of_col = col  # among the queries
    if masks.first is not None:
        place_of_col -= masks.first
    if CAUSAL:
        low = tl.maximum(place_of_col, 0) // BLOCK_M * BLOCK_M
    elif WINDOW:
        low = first_seen(place_of_col, WINDOW, BLOCK_M)
    if WINDOW:
        end = tl.minimum(queries, place_of_col + BLOCK_N - 1 + WINDOW)
    if MASKED or WINDOW:
        whole, rest = low, low
    elif CAUSAL:
        whole = tl.cdiv(tl.maximum(place_of_col + BLOCK_N - 1, 0), BLOCK_M) * BLOCK_M
        whole = tl.cdiv(tl.minimum(whole, queries), BLOCK_M) * BLOCK_M
        rest = tl.maximum(queries // BLOCK_M * BLOCK_M, whole)
    else:
        whole, rest = low, queries // BLOCK_M * BLOCK_M
    for head in tl.range(key_head * student.share, (key_head + 1) * student.share):
        q_base = place(pick(student.q, layer), student.q_stride, item, head, 0)
        at = (item.to(tl.int64) * heads + head) * queries
        lse_ptr, term_ptr = pick(lse_ptrs, layer) + at, pick(term_ptrs, layer) + at
        if not (MASKED or WINDOW):
            if CAUSAL:
                dk = _dk_sweep(
                    dk, k, c, k_ptr, q_base, r_ptr, lse_ptr, term_ptr, stride_q, stride_k, stride_r,
                    query_mask, cols, item, col, place_of_col, low, tl.minimum(whole, queries),
                    queries, True, MASKED, CAUSAL, WINDOW, SETTLE, P_SHIFT, BLOCK_M, BLOCK_N,
                    WIDTH, BLOCK_K, D, ACC,
                )  # fmt: skip
            dk = _dk_sweep(
                dk, k, c, k_ptr, q_base, r_ptr, lse_ptr, term_ptr, stride_q, stride_k, stride_r,
                query_mask, cols, item, col, place_of_col, whole, rest, queries,
                False, MASKED, CAUSAL, WINDOW, SETTLE, P_SHIFT, BLOCK_M, BLOCK_N,
                WIDTH, BLOCK_K, D, ACC,
            )  # fmt: skip
        dk = _dk_sweep(
            dk, k, c, k_ptr, q_base, r_ptr, lse_ptr, term_ptr, stride_q, stride_k, stride_r,
            query_mask, cols, item, col, place_of_col, rest, end, queries,
            True, MASKED, CAUSAL, WINDOW, SETTLE, P_SHIFT, BLOCK_M, BLOCK_N,
            WIDTH, BLOCK_K, D, ACC,
        )  # fmt: skip
    alpha = tl.load(factor_ptr + layer) * scale / heads * 2.0 ** -(P_SHIFT + R_SHIFT)
    dk *= alpha
    dk_ptr = place(pick(dk_ptrs, layer), dk_stride, item, key_head, col)
    if masks.first is not None:  # what the strips before this one found is there
        dk += load_rows(dk_ptr, dk_stride[2], inside, 0, WIDTH, D, False)
    store_rows(dk_ptr, dk, dk_stride[2], inside, D)


@kernel(["heads", "scale", "queries", "keys"])
def _one_block_kernel(
    student,  # Heads
    masks,  # Masks
    lse_ptrs,  # [B, H, Nq]
    r_ptrs,  # [B, Nq, stride_r]
    dq_ptrs,  # [B, H, Nq, D] out
    dk_ptrs,  # [B, H, Nk, D] out
    factor_ptr,  # [L]: 2 g / n
    heads,
    scale,
    queries,
    keys,
    stride_r,
    dq_stride,  # of B, H and Nq
    dk_stride,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    EDGE: tl.constexpr,  # masked, causal, or a last block of keys that is not whole
    SETTLE: tl.constexpr,
    P_SHIFT: tl.constexpr,
    R_SHIFT: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """dQ and dK where one block holds all queries: dK needs no sum over blocks."""
    layer = tl.program_id(1)
    head, item = tl.program_id(0) % heads, tl.program_id(0) // heads
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = m < queries
    rows = counted(pick(masks.query, layer), item, 0, queries, MASKED, BLOCK_M)
    end = keys_seen(rows, 0, keys, CAUSAL)
    lse_ptr = pick(lse_ptrs, layer) + (item.to(tl.int64) * heads + head) * queries
    lse, rows = log_sums(lse_ptr, rows, P_SHIFT, MASKED)
    stride_q, stride_k = student.q_stride[2], student.k_stride[2]
    q_ptr = place(pick(student.q, layer), student.q_stride, item, head, 0)
    k_base = place(pick(student.k, layer), student.k_stride, item, head, 0)
    r_ptr = pick(r_ptrs, layer) + item.to(tl.int64) * queries * stride_r
    dk_base = place(pick(dk_ptrs, layer), dk_stride, item, head, 0)
    key_mask = pick(masks.key, layer)
    q = load_rows(q_ptr, stride_q, rows, 0, WIDTH, D, False)
    scale = tl.cast(scale, ACC)
    c = scale * LOG2E
    alpha = tl.load(factor_ptr + layer) * scale / heads * 2.0 ** -(P_SHIFT + R_SHIFT)
    term = tl.zeros((BLOCK_M,), ACC)
    for col in tl.range(0, end, BLOCK_N):
        cols = counted(key_mask, item, col, keys, MASKED, BLOCK_N) & (n < end - col)
        k_ptr = k_base + tl.cast(col, tl.int64) * stride_k
        k = load_rows(k_ptr, stride_k, cols, 0, WIDTH, D, not EDGE)
        in_cols = (n < stride_r - col) if EDGE else (n < BLOCK_N)
        r = load_residual(r_ptr, stride_r, 0, col, inside, in_cols)
        s = products(q, k, q_ptr, k_ptr, stride_q, stride_k, rows, cols, WIDTH, BLOCK_K, D, ACC)
        p = tl.exp2(s * c - lse[:, None])
        if EDGE:
            p = tl.where(valid_pairs(rows, cols, 0, col, CAUSAL), p, 0.0)
        term += tl.sum(p * r, axis=1)
    term *= 2.0**-P_SHIFT
    dq = tl.zeros((BLOCK_M, WIDTH), ACC)
    for col in tl.range(0, end, BLOCK_N):
        cols = counted(key_mask, item, col, keys, MASKED, BLOCK_N) & (n < end - col)
        k_ptr = k_base + tl.cast(col, tl.int64) * stride_k
        k = load_rows(k_ptr, stride_k, cols, 0, WIDTH, D, not EDGE)
        in_cols = (n < stride_r - col) if EDGE else (n < BLOCK_N)
        r = load_residual(r_ptr, stride_r, 0, col, inside, in_cols)
        s = products(q, k, q_ptr, k_ptr, stride_q, stride_k, rows, cols, WIDTH, BLOCK_K, D, ACC)
        p = tl.exp2(s * c - lse[:, None])
        if EDGE:
            p = tl.where(valid_pairs(rows, cols, 0, col, CAUSAL), p, 0.0)
        ds = (p * (r - term[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, input_precision="ieee", out_dtype=ACC)
        dq = settle(tl.dot(ds, k, dq, input_precision="ieee", out_dtype=ACC), SETTLE)
        dk_ptr = dk_base + tl.cast(col, tl.int64) * dk_stride[2]
        store_rows(dk_ptr, alpha * dk, dk_stride[2], n < keys - col, D)
    # keys after the last that a query sees
    for col in tl.range(tl.cdiv(end, BLOCK_N) * BLOCK_N, keys, BLOCK_N):
        dk_ptr = dk_base + tl.cast(col, tl.int64) * dk_stride[2]
        store_rows(dk_ptr, tl.zeros((BLOCK_N, WIDTH), ACC), dk_stride[2], n < keys - col, D)
    dq_ptr = place(pick(dq_ptrs, layer), dq_stride, item, head, 0)
    store_rows(dq_ptr, alpha * dq, dq_stride[2], inside, D)


def log_sums_of(model: Model, pairs: Counted, layers: Sequence[int]) -> dict[int, Tensor]:
    """[B, H, Nq] of each layer: log-sum-exp of the scaled scores over the keys that count."""
    dtype, acc = accumulator(model.q[0])
    lses = {i: model.q[i].new_empty(model.q[i].shape[:3], dtype=dtype) for i in layers}
    forms = {i: (*model.form(i), pairs.form(i)) for i in layers if lses[i].numel()}
    for ((B, H, queries, d), (_, keys), scale, *_, form), part in groups(forms):
        x, (masked, causal, window) = model.q[part[0]], form
        chosen = config(launch.PROBS_LSE, width(x), x).fitted(queries)
        _lse_kernel[(cdiv(queries, chosen.block_m) * H * B, len(part))](
            model.arguments(part),
            pairs.arguments(x, queries, keys, part),
            pointers(lses, part),
            H, scale, queries, keys,
            MASKED=masked, CAUSAL=causal, WINDOW=window, D=d, WIDTH=width(x), ACC=acc,
            **launch.options(chosen),
        )  # fmt: skip
    return lses


def residual(
    student: Model,
    teacher: Model,
    pairs: Counted,
    layers: Sequence[int],
    student_lses: Sequence[Tensor],
    teacher_lses: Sequence[Tensor],
    residuals: Sequence[Tensor],
    store: bool,
    divergence: bool,
) -> tuple[Tensor, Tensor]:
    """Losses and scales of layers of one form; fills their residuals if asked to."""
    first = layers[0]
    x, y = student.q[first], teacher.q[first]
    dtype, acc = accumulator(x)
    (B, H, queries, d), keys = x.shape, student.k[first].shape[2]
    masked, causal, window = pairs.form(first)
    table = launch.DIVERGENCE if divergence else launch.PROBS_RESIDUAL
    chosen = config(table, max(width(x), width(y)), x, y).fitted(queries)
    tiles = B * cdiv(queries, chosen.block_m) * cdiv(keys, chosen.block_n)
    sums = x.new_empty(len(layers), tiles, dtype=dtype)
    counts = x.new_empty(len(layers), tiles, dtype=torch.int32) if masked else None
    if tiles:
        _residual_kernel[(tiles, len(layers))](
            student.arguments(layers),
            teacher.arguments(layers),
            pairs.arguments(x, queries, keys, layers),
            pointers(student_lses, layers),
            pointers(teacher_lses, layers),
            pointers(residuals, layers),
            sums, sums if counts is None else counts,
            H, student.scale[first], y.shape[1], teacher.scale[first],
            queries, keys, residual_width(keys),
            MASKED=masked, CAUSAL=causal, WINDOW=window,
            WHOLE=not (queries % chosen.block_m or keys % chosen.block_n),
            KL=divergence, STORE=store, SHIFT=shifts(residuals[first])[1],
            STUDENT_D=d, STUDENT_WIDTH=width(x), TEACHER_D=y.shape[3], TEACHER_WIDTH=width(y),
            ACC=acc, **launch.options(chosen),
        )  # fmt: skip
    if divergence:
        scales = torch.stack([pairs.queries_that_see(i, x, keys) for i in layers])
        scales = scales.to(dtype).reciprocal()
        return sums.sum(1) * scales, scales
    return total(sums, counts, 1 if masked else valid_count(x.shape, keys, causal, window))


def gradients(
    student: Model,
    pairs: Counted,
    layers: Sequence[int],
    lses: Sequence[Tensor],
    residuals: Sequence[Tensor],
    factor: Tensor,
    d_q: Mapping[int, Tensor],
    all_k: Mapping[int, Tensor],
    need_k: Sequence[bool],
) -> None:
    """Fills d_q and d_k of layers of one form; of d_k those that are needed at least."""
    d_k = {i: x for i, x in all_k.items() if need_k[i]}
    x, (dtype, acc) = student.q[layers[0]], accumulator(student.q[0])
    (B, H, queries, d), keys = x.shape, student.k[layers[0]].shape[2]
    masked, causal, window = pairs.form(layers[0])
    p_shift, r_shift = shifts(x)[0], shifts(residuals[layers[0]])[1]
    shared: dict[str, object] = {
        "MASKED": masked, "CAUSAL": causal, "SETTLE": launch.settles(x),
        "P_SHIFT": p_shift, "R_SHIFT": r_shift, "D": d, "WIDTH": width(x), "ACC": acc,
    }  # fmt: skip
    one = config(launch.PROBS_ONE_BLOCK, width(x), x)
    share = student.share(layers[0])
    # keys that heads share are summed over programs there
    if queries <= one.block_m and share == 1 and not window and pairs.first is None:
        for (dq_stride, dk_stride), part in groups(
            {i: (strides(d_q[i]), strides(all_k[i])) for i in layers}
        ):
            if B * H:
                _one_block_kernel[(B * H, len(part))](
                    student.arguments(part),
                    pairs.arguments(x, queries, keys, part),
                    pointers(lses, part),
                    pointers(residuals, part),
                    pointers(d_q, part),
                    pointers(all_k, part),
                    of_layers(factor, part),
                    H, student.scale[part[0]], queries, keys, residual_width(keys),
                    dq_stride, dk_stride,
                    EDGE=masked or causal or keys % one.block_n > 0, **shared,
                    **launch.options(one),
                )  # fmt: skip
        return
    terms = {i: x.new_empty(x.shape[:3], dtype=dtype) for i in layers}
    for product, table, out, length, heads in (
        (_dq_kernel, launch.PROBS_DQ, d_q, queries, H),
        (_dk_kernel, launch.PROBS_DK, d_k, keys, H // share),
    ):
        chosen = config(table, width(x), x).fitted(queries)
        block = chosen.block_m if product is _dq_kernel else chosen.block_n
        tiles = B * heads * cdiv(length, block)
        for dx_stride, part in groups({i: strides(out[i]) for i in layers if i in out}):
            if tiles:
                product[(tiles, len(part))](
                    student.arguments(part),
                    pairs.arguments(x, queries, keys, part),
                    pointers(lses, part),
                    pointers(residuals, part),
                    pointers(terms, part),
                    pointers(out, part),
                    of_layers(factor, part),
                    H, student.scale[part[0]], queries, keys, residual_width(keys), dx_stride,
                    WINDOW=window,
                    **shared,
                    **launch.options(chosen),
                )  # fmt: skip
