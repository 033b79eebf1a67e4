"""Kernels of head-averaged attention maps of at most 128 x 128: rows of a map lie in registers.

The softmax needs no second sweep and no log-sum-exp, and the backward pass computes it again, so
that nothing but the residual is kept. Keys come as a tile of up to 64 and a tail of up to 64: 77
keys take 64 + 16 columns, and causal queries below 64 never touch the tail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .core import accumulator, find, of_bits, pad, pick, pick_raw, total
from .launch import LaunchConfig
from .probs_layers import (
    Counted,
    Model,
    config,
    options,
    residual_strides,
    select,
    shifts,
    strides,
    tiles,
)
from .probs_tiles import (
    LOG2E,
    count_keys,
    count_queries,
    keys_seen,
    load_residual,
    load_rows,
    place,
    products,
    seen_from,
    store_residual,
    store_rows,
    valid_pairs,
)

SMALL = tl.constexpr(128)  # queries and keys at most


@triton.jit
def _softmax(s, s_tail, TAIL: tl.constexpr):
    """exp2 of both tiles, and one over each row's sum; a row where nothing counts is 0."""
    top = tl.max(s, axis=1)
    if TAIL:
        top = tl.maximum(top, tl.max(s_tail, axis=1))
    safe = tl.where(top == -float("inf"), 0.0, top)  # inf - inf is nan
    p = tl.exp2(s - safe[:, None])
    total = tl.sum(p, axis=1)
    p_tail = s_tail
    if TAIL:
        p_tail = tl.exp2(s_tail - safe[:, None])
        total += tl.sum(p_tail, axis=1)
    return p, p_tail, 1 / tl.where(total == 0, 1.0, total)


@triton.jit
def _add_map(
    acc,  # [M, N]
    acc_tail,  # [M, TAIL]; anything without TAIL
    valid,
    valid_tail,
    model,
    layer,
    item,
    row,
    rows,
    cols,
    cols_tail,
    alive,  # 0 skips the heads
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    TAIL: tl.constexpr,
):
    """acc + two tiles of the map averaged over the heads."""
    heads, units = pick(model.heads, layer), pick(model.units, layer)
    stride_q, stride_k = pick(model.q_strides[2], layer), pick(model.k_strides[2], layer)
    q_base = place(model.q, model.q_strides, layer, item, 0, row, UNIT)
    k_base = place(model.k, model.k_strides, layer, item, 0, 0, UNIT)
    step_q = pick(model.q_strides[1], layer).to(tl.int64) * UNIT
    step_k = pick(model.k_strides[1], layer).to(tl.int64) * UNIT
    c = of_bits(pick_raw(model.scale, layer), ACC) * LOG2E
    BLOCK_N: tl.constexpr = cols.shape[0]
    for head in range(heads * alive):
        q_ptr, k_ptr = q_base + step_q * head, k_base + step_k * head
        q = load_rows(q_ptr, stride_q, rows, units, 0, WIDTH, UNIT)
        k = load_rows(k_ptr, stride_k, cols, units, 0, WIDTH, UNIT)
        s = products(
            q, k, q_ptr, k_ptr, stride_q, stride_k, rows, cols, units, WIDTH, CHUNK, UNIT, ACC
        )
        s = tl.where(valid, s * c, -float("inf"))
        s_tail = s
        if TAIL:
            t_ptr = k_ptr + BLOCK_N * stride_k * UNIT
            k = load_rows(t_ptr, stride_k, cols_tail, units, 0, WIDTH, UNIT)
            s_tail = products(
                q, k, q_ptr, t_ptr, stride_q, stride_k, rows, cols_tail, units, WIDTH, CHUNK, UNIT,
                ACC,
            )  # fmt: skip
            s_tail = tl.where(valid_tail, s_tail * c, -float("inf"))
        p, p_tail, weight = _softmax(s, s_tail, TAIL)
        weight = weight / heads
        acc += p * weight[:, None]
        if TAIL:
            acc_tail += p_tail * weight[:, None]
    return acc, acc_tail


@triton.jit(do_not_specialize=["pairs", "stride_r", "first"])
def _forward_kernel(
    student,
    teacher,
    pairs,
    r_ptrs,  # L x [B, Nq, padded Nk] out; unused without STORE
    stride_r,  # of its rows, in units of 16
    sum_ptr,  # [tiles] out: sum of R^2 over the tile
    count_ptr,  # [tiles] out, int32: pairs that count
    first,
    HAS_MASK: tl.constexpr,
    STORE: tl.constexpr,
    SHIFT: tl.constexpr,
    UNIT: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,  # columns beyond BLOCK_N, or 0
    ACC: tl.constexpr,
):
    tile = tl.program_id(0)
    layer = find(first, tile)
    queries, keys = pick(pairs.queries, layer), pick(pairs.keys, layer)
    causal = pick(pairs.causal, layer)
    local = tile - pick(first, layer)
    down = tl.cdiv(queries, BLOCK_M)
    row = local % down * BLOCK_M
    item = local // down
    zero = item * 0
    rows = count_queries(pairs, layer, item, row, HAS_MASK, BLOCK_M)
    end = keys_seen(rows, row, causal, keys)
    cols = count_keys(pairs, layer, item, zero, end, HAS_MASK, BLOCK_N)
    valid = valid_pairs(rows, cols, row, zero, causal)
    counted = tl.sum(valid.to(tl.int32))
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if TAIL:
        cols_tail = count_keys(pairs, layer, item, zero + BLOCK_N, end, HAS_MASK, TAIL)
        valid_tail = valid_pairs(rows, cols_tail, row, zero + BLOCK_N, causal)
        counted += tl.sum(valid_tail.to(tl.int32))
        acc_tail = tl.zeros((BLOCK_M, TAIL), ACC)
    else:
        cols_tail, valid_tail, acc_tail = cols, valid, acc
    # one of the two runs over the heads: with the tail, or where none of its keys is seen without
    short = ((counted > 0) & (end <= BLOCK_N)).to(tl.int32)
    acc, acc_tail = _add_map(
        acc, acc_tail, valid, valid_tail, teacher, layer, item, row, rows, cols, cols_tail, short,
        TEACHER_WIDTH, BLOCK_K, UNIT, ACC, 0,
    )  # fmt: skip
    acc, acc_tail = _add_map(
        -acc, acc_tail, valid, valid_tail, student, layer, item, row, rows, cols, cols_tail, short,
        STUDENT_WIDTH, BLOCK_K, UNIT, ACC, 0,
    )  # fmt: skip
    if TAIL:
        long = ((counted > 0) & (end > BLOCK_N)).to(tl.int32)
        acc, acc_tail = _add_map(
            -acc, acc_tail, valid, valid_tail, teacher, layer, item, row, rows, cols, cols_tail,
            long, TEACHER_WIDTH, BLOCK_K, UNIT, ACC, TAIL,
        )  # fmt: skip
        acc, acc_tail = _add_map(
            -acc, -acc_tail, valid, valid_tail, student, layer, item, row, rows, cols, cols_tail,
            long, STUDENT_WIDTH, BLOCK_K, UNIT, ACC, TAIL,
        )  # fmt: skip
    total = tl.sum(acc * acc)
    if TAIL:
        total += tl.sum(acc_tail * acc_tail)
    tl.store(sum_ptr + tile, total)
    tl.store(count_ptr + tile, counted)
    if STORE:
        stride = pick(stride_r, layer)
        r_ptr = pick(r_ptrs, layer) + item.to(tl.int64) * queries * stride * 16
        store_residual(r_ptr, acc, stride, row, zero, queries, SHIFT)
        if TAIL:
            store_residual(r_ptr, acc_tail, stride, row, zero + BLOCK_N, queries, SHIFT)


@triton.jit
def _add_rows(
    dk,  # [N, WIDTH]
    dk_tail,  # [TAIL, WIDTH]; anything without TAIL
    k,
    k_tail,
    student,
    pairs,
    r_ptr,
    stride_r,
    dq_ptrs,
    dq_strides,
    layer,
    item,
    head,
    start,
    stop,
    cols,
    cols_tail,
    seen,  # queries before it see no key
    alpha,
    HAS_MASK: tl.constexpr,
    P_SHIFT: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
    TAIL: tl.constexpr,
):
    """dK + what the blocks of queries from start to stop give; writes their dQ."""
    BLOCK_N: tl.constexpr = cols.shape[0]
    queries, causal = pick(pairs.queries, layer), pick(pairs.causal, layer)
    units = pick(student.units, layer)
    stride_q, stride_k = pick(student.q_strides[2], layer), pick(student.k_strides[2], layer)
    k_ptr = place(student.k, student.k_strides, layer, item, head, 0, UNIT)
    t_ptr = k_ptr + BLOCK_N * stride_k * UNIT
    c = of_bits(pick_raw(student.scale, layer), ACC) * LOG2E
    m = tl.arange(0, BLOCK_M)
    for row in range(start, stop, BLOCK_M):
        # what is not seen reads as 0: it may hold nan, and 0 * nan is nan
        rows = count_queries(pairs, layer, item, row, HAS_MASK, BLOCK_M) & (row + m >= seen)
        q_ptr = place(student.q, student.q_strides, layer, item, head, row, UNIT)
        q = load_rows(q_ptr, stride_q, rows, units, 0, WIDTH, UNIT)
        s = products(
            q, k, q_ptr, k_ptr, stride_q, stride_k, rows, cols, units, WIDTH, CHUNK, UNIT, ACC
        )
        s = tl.where(valid_pairs(rows, cols, row, item * 0, causal), s * c, -float("inf"))
        s_tail = s
        if TAIL:
            s_tail = products(
                q, k_tail, q_ptr, t_ptr, stride_q, stride_k, rows, cols_tail, units, WIDTH, CHUNK,
                UNIT, ACC,
            )  # fmt: skip
            valid = valid_pairs(rows, cols_tail, row, item * 0 + BLOCK_N, causal)
            s_tail = tl.where(valid, s_tail * c, -float("inf"))
        p, p_tail, weight = _softmax(s, s_tail, TAIL)
        r = load_residual(r_ptr, stride_r, row, item * 0, queries, BLOCK_M, BLOCK_N)
        pr = p * r
        term = tl.sum(pr, axis=1)
        if TAIL:
            r_tail = load_residual(r_ptr, stride_r, row, item * 0 + BLOCK_N, queries, BLOCK_M, TAIL)
            term += tl.sum(p_tail * r_tail, axis=1)
        term *= weight
        weight *= 2.0**P_SHIFT
        ds = (p * weight[:, None] * (r - term[:, None])).to(q.dtype)
        dq = tl.dot(ds, k, input_precision="ieee", out_dtype=ACC)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee", out_dtype=ACC)
        if TAIL:
            ds = (p_tail * weight[:, None] * (r_tail - term[:, None])).to(q.dtype)
            dq = tl.dot(ds, k_tail, dq, input_precision="ieee", out_dtype=ACC)
            dk_tail = tl.dot(tl.trans(ds), q, dk_tail, input_precision="ieee", out_dtype=ACC)
        dq_ptr = place(dq_ptrs, dq_strides, layer, item, head, row, UNIT)
        inside = m < queries - row
        store_rows(dq_ptr, alpha * dq, pick(dq_strides[2], layer), inside, units, UNIT)
    return dk, dk_tail


@triton.jit(do_not_specialize=["pairs", "stride_r", "places", "first"])
def _backward_kernel(
    student,
    pairs,
    r_ptrs,  # L x [B, Nq, padded Nk]
    stride_r,
    dq_ptrs,  # L x [B, H, Nq, d] out
    dq_strides,
    dk_ptrs,  # L x [B, H, Nk, d] out
    dk_strides,
    factor_ptr,  # [P] 2 g / n of every layer of the call
    places,  # L ints: the layer's place in factor_ptr
    first,
    HAS_MASK: tl.constexpr,
    P_SHIFT: tl.constexpr,
    R_SHIFT: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    ACC: tl.constexpr,
):
    tile = tl.program_id(0)
    layer = find(first, tile)
    queries, keys = pick(pairs.queries, layer), pick(pairs.keys, layer)
    heads, causal = pick(student.heads, layer), pick(pairs.causal, layer)
    # heads fastest: they share the item's residual in L2
    local = tile - pick(first, layer)
    head, item = local % heads, local // heads
    zero = item * 0
    every = count_queries(pairs, layer, item, zero, HAS_MASK, SMALL)
    end = keys_seen(every, zero, causal, keys)
    cols = count_keys(pairs, layer, item, zero, end, HAS_MASK, BLOCK_N)
    seen = seen_from(cols, zero, causal, queries)
    units, stride_k = pick(student.units, layer), pick(student.k_strides[2], layer)
    k_ptr = place(student.k, student.k_strides, layer, item, head, zero, UNIT)
    k = load_rows(k_ptr, stride_k, cols, units, 0, WIDTH, UNIT)
    dk = tl.zeros((BLOCK_N, WIDTH), ACC)
    if TAIL:
        cols_tail = count_keys(pairs, layer, item, zero + BLOCK_N, end, HAS_MASK, TAIL)
        seen = tl.minimum(seen, seen_from(cols_tail, zero + BLOCK_N, causal, queries))
        t_ptr = k_ptr + BLOCK_N * stride_k * UNIT
        k_tail = load_rows(t_ptr, stride_k, cols_tail, units, 0, WIDTH, UNIT)
        dk_tail = tl.zeros((TAIL, WIDTH), ACC)
    else:
        cols_tail, k_tail, dk_tail = cols, k, dk
    stride = pick(stride_r, layer)
    r_ptr = pick(r_ptrs, layer) + item.to(tl.int64) * queries * stride * 16
    scale = of_bits(pick_raw(student.scale, layer), ACC)
    alpha = tl.load(factor_ptr + pick(places, layer)) * scale / heads * 2.0 ** -(P_SHIFT + R_SHIFT)
    # causal blocks of queries that end before the tail do without it
    split = queries
    if TAIL:
        within = tl.minimum(BLOCK_N // BLOCK_M * BLOCK_M, queries)
        split = tl.where(end <= BLOCK_N, queries, tl.where(causal != 0, within, 0))
    dk, dk_tail = _add_rows(
        dk, dk_tail, k, k_tail, student, pairs, r_ptr, stride, dq_ptrs, dq_strides, layer, item,
        head, zero, split, cols, cols_tail, seen, alpha, HAS_MASK, P_SHIFT, UNIT, WIDTH, BLOCK_M,
        BLOCK_K, ACC, 0,
    )  # fmt: skip
    if TAIL:
        dk, dk_tail = _add_rows(
            dk, dk_tail, k, k_tail, student, pairs, r_ptr, stride, dq_ptrs, dq_strides, layer,
            item, head, split, queries, cols, cols_tail, seen, alpha, HAS_MASK, P_SHIFT, UNIT,
            WIDTH, BLOCK_M, BLOCK_K, ACC, TAIL,
        )  # fmt: skip
    dk_ptr = place(dk_ptrs, dk_strides, layer, item, head, zero, UNIT)
    stride_dk = pick(dk_strides[2], layer)
    n = tl.arange(0, BLOCK_N)
    store_rows(dk_ptr, alpha * dk, stride_dk, n < keys, units, UNIT)
    if TAIL:
        t_ptr = dk_ptr + BLOCK_N * stride_dk * UNIT
        n_tail = BLOCK_N + tl.arange(0, TAIL)
        store_rows(t_ptr, alpha * dk_tail, stride_dk, n_tail < keys, units, UNIT)


def _key_tiles(chosen: LaunchConfig, keys: int) -> dict[str, int]:
    """The columns of a tile and of its tail for so many keys at most."""
    block = min(chosen.block_n, max(16, triton.next_power_of_2(keys)))
    tail = max(16, triton.next_power_of_2(keys - block)) if keys > block else 0
    return {"BLOCK_N": block, "TAIL": tail}


def residual(
    student: Model,
    teacher: Model,
    counted: Counted,
    layers: Sequence[int],
    residuals: Sequence[Tensor],
    store: bool,
) -> tuple[Tensor, Tensor]:
    """Losses and scales of layers with the same widths; fills their residuals if asked to."""
    x, (dtype, acc) = student.q[0], accumulator(student.q[0])
    widths = student.width(layers[0]), teacher.width(layers[0])
    chosen = config(launch.PROBS_SMALL_FORWARD, max(widths), x, teacher.q[0])
    first, starts = tiles(
        len(student.q[i]) * triton.cdiv(student.lengths(i)[0], chosen.block_m)
        if student.lengths(i)[1]
        else 0
        for i in layers
    )
    sums, found = (x.new_empty(first[-1], dtype=d) for d in (dtype, torch.int32))
    pairs, has_mask = counted.arguments(student, layers)
    unit = min(student.unit(layers), teacher.unit(layers))
    if first[-1]:
        chosen_options = options(chosen) | _key_tiles(
            chosen, max(student.lengths(i)[1] for i in layers)
        )
        _forward_kernel[(first[-1],)](
            student.arguments(layers, unit),
            teacher.arguments(layers, unit),
            pairs,
            select(residuals, layers),
            residual_strides(residuals, layers),
            sums,
            found,
            starts,
            HAS_MASK=has_mask,
            STORE=store,
            SHIFT=shifts(x)["R_SHIFT"],
            UNIT=unit,
            STUDENT_WIDTH=widths[0],
            TEACHER_WIDTH=widths[1],
            ACC=acc,
            **chosen_options,
        )
    return total(sums, found, [1] * len(layers), first)


def gradients(
    student: Model,
    counted: Counted,
    layers: Sequence[int],
    residuals: Sequence[Tensor],
    factor: Tensor,
    d_q: Mapping[int, Tensor],
    d_k: Mapping[int, Tensor],
) -> None:
    """Fills d_q and d_k of layers with the same width."""
    x = student.q[0]
    width = student.width(layers[0])
    chosen = config(launch.PROBS_SMALL_BACKWARD, width, x)
    first, starts = tiles(student.q[i].shape[0] * student.q[i].shape[1] for i in layers)
    if not first[-1]:
        return
    pairs, has_mask = counted.arguments(student, layers)
    unit = student.unit(layers, d_q, d_k)
    chosen_options = options(chosen) | _key_tiles(
        chosen, max(student.lengths(i)[1] for i in layers)
    )
    _backward_kernel[(first[-1],)](
        student.arguments(layers, unit),
        pairs,
        select(residuals, layers),
        residual_strides(residuals, layers),
        select(d_q, layers),
        strides(d_q, layers, unit),
        select(d_k, layers),
        strides(d_k, layers, unit),
        factor,
        pad(layers),
        starts,
        HAS_MASK=has_mask,
        UNIT=unit,
        WIDTH=width,
        ACC=accumulator(x)[1],
        **shifts(x),
        **chosen_options,
    )
