"""Kernels of head-averaged attention maps of any size: log-sum-exp, residual, dQ and dK.

One sweep over the heads needs each head's normaliser first, hence two passes over Q K^T; the first
is skipped where a model's own attention gave the log-sum-exp.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .core import accumulator, find, of_bits, pad, pick, pick_raw, total
from .probs_layers import (
    Counted,
    Model,
    config,
    groups,
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


@triton.jit(do_not_specialize=["pairs", "first"])
def _lse_kernel(
    model,
    pairs,
    lse_ptrs,  # L x [B, H, Nq] out
    first,  # the layer's first tile
    HAS_MASK: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    tile = tl.program_id(0)
    layer = find(first, tile)
    queries, keys = pick(pairs.queries, layer), pick(pairs.keys, layer)
    heads, causal = pick(model.heads, layer), pick(pairs.causal, layer)
    # query blocks fastest: those of one head share its keys in L2
    local = tile - pick(first, layer)
    blocks = tl.cdiv(queries, BLOCK_M)
    row = local % blocks * BLOCK_M
    head = local // blocks % heads
    item = local // blocks // heads
    rows = count_queries(pairs, layer, item, row, HAS_MASK, BLOCK_M)
    end = keys_seen(rows, row, causal, keys)
    units = pick(model.units, layer)
    stride_q, stride_k = pick(model.q_strides[2], layer), pick(model.k_strides[2], layer)
    q_ptr = place(model.q, model.q_strides, layer, item, head, row, UNIT)
    q = load_rows(q_ptr, stride_q, rows, units, 0, WIDTH, UNIT)
    k_base = place(model.k, model.k_strides, layer, item, head, 0, UNIT)
    c = of_bits(pick_raw(model.scale, layer), ACC) * LOG2E
    top = tl.full((BLOCK_M,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    for col in range(0, end, BLOCK_N):
        cols = count_keys(pairs, layer, item, col, end, HAS_MASK, BLOCK_N)
        k_ptr = k_base + stride_k.to(tl.int64) * UNIT * col
        k = load_rows(k_ptr, stride_k, cols, units, 0, WIDTH, UNIT)
        s = products(
            q, k, q_ptr, k_ptr, stride_q, stride_k, rows, cols, units, WIDTH, BLOCK_K, UNIT, ACC
        )
        # masked before the exponential: a key that does not count may hold nan or inf
        s = tl.where(valid_pairs(rows, cols, row, col, causal), s * c, -float("inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        # inf - inf is nan
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(s - safe[:, None]), axis=1)
        top = higher
    m = tl.arange(0, BLOCK_M)
    lse_ptr = pick(lse_ptrs, layer) + (item.to(tl.int64) * heads + head) * queries + row
    lse = tl.where(total == 0, -float("inf"), top + tl.log2(tl.where(total == 0, 1.0, total)))
    tl.store(lse_ptr + m, lse / LOG2E, mask=m < queries - row)


@triton.jit
def _add_map(
    acc,  # [M, N]
    model,
    lse_ptrs,
    layer,
    item,
    row,
    col,
    queries,
    rows,
    cols,
    alive,  # 0 skips the heads
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """acc + a tile of the map averaged over the heads; pairs that do not count get anything."""
    heads, units = pick(model.heads, layer), pick(model.units, layer)
    stride_q, stride_k = pick(model.q_strides[2], layer), pick(model.k_strides[2], layer)
    q_base = place(model.q, model.q_strides, layer, item, 0, row, UNIT)
    k_base = place(model.k, model.k_strides, layer, item, 0, col, UNIT)
    step_q = pick(model.q_strides[1], layer).to(tl.int64) * UNIT
    step_k = pick(model.k_strides[1], layer).to(tl.int64) * UNIT
    lse_ptr = pick(lse_ptrs, layer) + item.to(tl.int64) * heads * queries + row
    m = tl.arange(0, rows.shape[0])
    c = of_bits(pick_raw(model.scale, layer), ACC) * LOG2E
    log_heads = tl.log2(heads.to(ACC))  # 1 / H in the exponent costs nothing an element
    for head in range(heads * alive):
        q_ptr, k_ptr = q_base + step_q * head, k_base + step_k * head
        q = load_rows(q_ptr, stride_q, rows, units, 0, WIDTH, UNIT)
        k = load_rows(k_ptr, stride_k, cols, units, 0, WIDTH, UNIT)
        s = products(
            q, k, q_ptr, k_ptr, stride_q, stride_k, rows, cols, units, WIDTH, CHUNK, UNIT, ACC
        )
        lse = tl.load(lse_ptr + head * queries + m, mask=rows, other=0.0) * LOG2E + log_heads
        acc += tl.exp2(s * c - lse[:, None])
    return acc


@triton.jit(do_not_specialize=["pairs", "stride_r", "first"])
def _residual_kernel(
    student,
    teacher,
    pairs,
    student_lse,  # L x [B, H_s, Nq]
    teacher_lse,
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
    ACC: tl.constexpr,
):
    tile = tl.program_id(0)
    layer = find(first, tile)
    queries, keys = pick(pairs.queries, layer), pick(pairs.keys, layer)
    # an item's tiles side by side: they share its queries and keys in L2
    local = tile - pick(first, layer)
    across, down = tl.cdiv(keys, BLOCK_N), tl.cdiv(queries, BLOCK_M)
    col = local % across * BLOCK_N
    row = local // across % down * BLOCK_M
    item = local // across // down
    rows = count_queries(pairs, layer, item, row, HAS_MASK, BLOCK_M)
    cols = count_keys(pairs, layer, item, col, keys, HAS_MASK, BLOCK_N)
    valid = valid_pairs(rows, cols, row, col, pick(pairs.causal, layer))
    counted = tl.sum(valid.to(tl.int32))
    alive = (counted > 0).to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc = _add_map(
        acc, teacher, teacher_lse, layer, item, row, col, queries, rows, cols, alive,
        TEACHER_WIDTH, BLOCK_K, UNIT, ACC,
    )  # fmt: skip
    acc = _add_map(
        -acc, student, student_lse, layer, item, row, col, queries, rows, cols, alive,
        STUDENT_WIDTH, BLOCK_K, UNIT, ACC,
    )  # fmt: skip
    acc = tl.where(valid, acc, 0.0)
    tl.store(sum_ptr + tile, tl.sum(acc * acc))
    tl.store(count_ptr + tile, counted)
    if STORE:
        stride = pick(stride_r, layer)
        r_ptr = pick(r_ptrs, layer) + item.to(tl.int64) * queries * stride * 16
        store_residual(r_ptr, acc, stride, row, col, queries, SHIFT)


@triton.jit(do_not_specialize=["pairs", "stride_r", "places", "first"])
def _dq_kernel(
    student,
    pairs,
    lse_ptrs,  # L x [B, H, Nq]
    r_ptrs,  # L x [B, Nq, padded Nk]
    stride_r,
    term_ptrs,  # L x [B, H, Nq] out: sum_j P_ij R_ij, in the residual's units
    dq_ptrs,  # L x [B, H, Nq, d] out
    dq_strides,
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
    ACC: tl.constexpr,
):
    tile = tl.program_id(0)
    layer = find(first, tile)
    queries, keys = pick(pairs.queries, layer), pick(pairs.keys, layer)
    heads, causal = pick(student.heads, layer), pick(pairs.causal, layer)
    # heads fastest: they share a strip of the residual in L2
    local = tile - pick(first, layer)
    down = tl.cdiv(queries, BLOCK_M)
    head = local % heads
    row = local // heads % down * BLOCK_M
    item = local // heads // down
    rows = count_queries(pairs, layer, item, row, HAS_MASK, BLOCK_M)
    end = keys_seen(rows, row, causal, keys)
    units = pick(student.units, layer)
    stride_q, stride_k = pick(student.q_strides[2], layer), pick(student.k_strides[2], layer)
    q_ptr = place(student.q, student.q_strides, layer, item, head, row, UNIT)
    q = load_rows(q_ptr, stride_q, rows, units, 0, WIDTH, UNIT)
    k_base = place(student.k, student.k_strides, layer, item, head, 0, UNIT)
    stride = pick(stride_r, layer)
    r_ptr = pick(r_ptrs, layer) + item.to(tl.int64) * queries * stride * 16
    m = tl.arange(0, BLOCK_M)
    at = (item.to(tl.int64) * heads + head) * queries + row
    scale = of_bits(pick_raw(student.scale, layer), ACC)
    c = scale * LOG2E
    lse = tl.load(pick(lse_ptrs, layer) + at + m, mask=rows, other=0.0) * LOG2E - P_SHIFT
    u, v = tl.zeros((BLOCK_M, WIDTH), ACC), tl.zeros((BLOCK_M, WIDTH), ACC)
    u_sum, v_sum = tl.zeros((BLOCK_M,), ACC), tl.zeros((BLOCK_M,), ACC)
    for col in range(0, end, BLOCK_N):
        # a key that no query of the block sees reads as 0: it may hold nan, and 0 * nan is nan
        cols = count_keys(pairs, layer, item, col, end, HAS_MASK, BLOCK_N)
        k_ptr = k_base + stride_k.to(tl.int64) * UNIT * col
        k = load_rows(k_ptr, stride_k, cols, units, 0, WIDTH, UNIT)
        r = load_residual(r_ptr, stride, row, col, queries, BLOCK_M, BLOCK_N)
        s = products(
            q, k, q_ptr, k_ptr, stride_q, stride_k, rows, cols, units, WIDTH, BLOCK_K, UNIT, ACC
        )
        p = tl.exp2(s * c - lse[:, None])
        p = tl.where(valid_pairs(rows, cols, row, col, causal), p, 0.0)
        pr = (p * r).to(k.dtype)
        p = p.to(k.dtype)
        # of the rounded factors, so that their errors cancel in u - term v
        u_sum += tl.sum(pr.to(ACC), axis=1)
        v_sum += tl.sum(p.to(ACC), axis=1)
        u = tl.dot(pr, k, u, input_precision="ieee", out_dtype=ACC)
        v = tl.dot(p, k, v, input_precision="ieee", out_dtype=ACC)
    term = u_sum / tl.where(v_sum == 0, 1.0, v_sum)
    tl.store(pick(term_ptrs, layer) + at + m, term, mask=m < queries - row)
    alpha = tl.load(factor_ptr + pick(places, layer)) * scale / heads * 2.0 ** -(P_SHIFT + R_SHIFT)
    dq = alpha * (u - term[:, None] * v)
    dq_ptr = place(dq_ptrs, dq_strides, layer, item, head, row, UNIT)
    store_rows(dq_ptr, dq, pick(dq_strides[2], layer), m < queries - row, units, UNIT)


@triton.jit(do_not_specialize=["pairs", "stride_r", "places", "first"])
def _dk_kernel(
    student,
    pairs,
    lse_ptrs,  # L x [B, H, Nq]
    r_ptrs,  # L x [B, Nq, padded Nk]
    stride_r,
    term_ptrs,  # L x [B, H, Nq], as _dq_kernel wrote it
    dk_ptrs,  # L x [B, H, Nk, d] out
    dk_strides,
    factor_ptr,
    places,
    first,
    HAS_MASK: tl.constexpr,
    P_SHIFT: tl.constexpr,
    R_SHIFT: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    tile = tl.program_id(0)
    layer = find(first, tile)
    queries, keys = pick(pairs.queries, layer), pick(pairs.keys, layer)
    heads, causal = pick(student.heads, layer), pick(pairs.causal, layer)
    local = tile - pick(first, layer)
    across = tl.cdiv(keys, BLOCK_N)
    head = local % heads
    col = local // heads % across * BLOCK_N
    item = local // heads // across
    cols = count_keys(pairs, layer, item, col, keys, HAS_MASK, BLOCK_N)
    seen = seen_from(cols, col, causal, queries)
    units = pick(student.units, layer)
    stride_q, stride_k = pick(student.q_strides[2], layer), pick(student.k_strides[2], layer)
    k_ptr = place(student.k, student.k_strides, layer, item, head, col, UNIT)
    k = load_rows(k_ptr, stride_k, cols, units, 0, WIDTH, UNIT)
    q_base = place(student.q, student.q_strides, layer, item, head, 0, UNIT)
    stride = pick(stride_r, layer)
    r_ptr = pick(r_ptrs, layer) + item.to(tl.int64) * queries * stride * 16
    m = tl.arange(0, BLOCK_M)
    at = (item.to(tl.int64) * heads + head) * queries
    lse_ptr, term_ptr = pick(lse_ptrs, layer) + at + m, pick(term_ptrs, layer) + at + m
    scale = of_bits(pick_raw(student.scale, layer), ACC)
    c = scale * LOG2E
    dk = tl.zeros((BLOCK_N, WIDTH), ACC)
    for row in range(seen // BLOCK_M * BLOCK_M, queries, BLOCK_M):
        # a query that sees no key of the block reads as 0, as the keys in _dq_kernel
        rows = count_queries(pairs, layer, item, row, HAS_MASK, BLOCK_M) & (row + m >= seen)
        q_ptr = q_base + stride_q.to(tl.int64) * UNIT * row
        q = load_rows(q_ptr, stride_q, rows, units, 0, WIDTH, UNIT)
        r = load_residual(r_ptr, stride, row, col, queries, BLOCK_M, BLOCK_N)
        lse = tl.load(lse_ptr + row, mask=rows, other=0.0) * LOG2E - P_SHIFT
        term = tl.load(term_ptr + row, mask=rows, other=0.0)
        s = products(
            q, k, q_ptr, k_ptr, stride_q, stride_k, rows, cols, units, WIDTH, BLOCK_K, UNIT, ACC
        )
        p = tl.exp2(s * c - lse[:, None])
        p = tl.where(valid_pairs(rows, cols, row, col, causal), p, 0.0)
        ds = (p * (r - term[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee", out_dtype=ACC)
    alpha = tl.load(factor_ptr + pick(places, layer)) * scale / heads * 2.0 ** -(P_SHIFT + R_SHIFT)
    dk_ptr = place(dk_ptrs, dk_strides, layer, item, head, col, UNIT)
    inside = tl.arange(0, BLOCK_N) < keys - col
    store_rows(dk_ptr, alpha * dk, pick(dk_strides[2], layer), inside, units, UNIT)


def log_sums(model: Model, counted: Counted, layers: Sequence[int]) -> dict[int, Tensor]:
    """[B, H, Nq] of each layer: log-sum-exp of the scaled scores over the keys that count."""
    dtype, acc = accumulator(model.q[0])
    lses = {i: model.q[i].new_empty(model.q[i].shape[:3], dtype=dtype) for i in layers}
    for width, part in groups({i: model.width(i) for i in layers}):
        chosen = config(launch.PROBS_LSE, width, model.q[0])
        shapes = (lses[i].shape for i in part)
        first, starts = tiles(B * H * triton.cdiv(n, chosen.block_m) for B, H, n in shapes)
        pairs, has_mask = counted.arguments(model, part)
        unit = model.unit(part)
        if first[-1]:
            _lse_kernel[(first[-1],)](
                model.arguments(part, unit),
                pairs,
                select(lses, part),
                starts,
                HAS_MASK=has_mask,
                UNIT=unit,
                WIDTH=width,
                ACC=acc,
                **options(chosen),
            )
    return lses


def residual(
    student: Model,
    teacher: Model,
    counted: Counted,
    layers: Sequence[int],
    student_lses: Sequence[Tensor],
    teacher_lses: Sequence[Tensor],
    residuals: Sequence[Tensor],
    store: bool,
) -> tuple[Tensor, Tensor]:
    """Losses and scales of layers with the same widths; fills their residuals if asked to."""
    x, (dtype, acc) = student.q[0], accumulator(student.q[0])
    widths = student.width(layers[0]), teacher.width(layers[0])
    chosen = config(launch.PROBS_RESIDUAL, max(widths), x, teacher.q[0])
    first, starts = tiles(
        len(student.q[i]) * triton.cdiv(rows, chosen.block_m) * triton.cdiv(cols, chosen.block_n)
        for i in layers
        for rows, cols in [student.lengths(i)]
    )
    sums, found = (x.new_empty(first[-1], dtype=d) for d in (dtype, torch.int32))
    pairs, has_mask = counted.arguments(student, layers)
    unit = min(student.unit(layers), teacher.unit(layers))
    if first[-1]:
        _residual_kernel[(first[-1],)](
            student.arguments(layers, unit),
            teacher.arguments(layers, unit),
            pairs,
            select(student_lses, layers),
            select(teacher_lses, layers),
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
            **options(chosen),
        )
    return total(sums, found, [1] * len(layers), first)


def gradients(
    student: Model,
    counted: Counted,
    layers: Sequence[int],
    lses: Sequence[Tensor],
    residuals: Sequence[Tensor],
    factor: Tensor,
    d_q: Mapping[int, Tensor],
    d_k: Mapping[int, Tensor],
) -> None:
    """Fills d_q and d_k of layers with the same width; d_k may lack some."""
    x, (dtype, acc) = student.q[0], accumulator(student.q[0])
    width = student.width(layers[0])
    terms = {i: student.q[i].new_empty(student.q[i].shape[:3], dtype=dtype) for i in layers}
    for kernel, table, out, dim in (
        (_dq_kernel, launch.PROBS_DQ, d_q, 0),
        (_dk_kernel, launch.PROBS_DK, d_k, 1),
    ):
        part = [i for i in layers if i in out]
        chosen = config(table, width, x)
        heads = (student.q[i].shape[0] * student.q[i].shape[1] for i in part)
        blocks = (triton.cdiv(student.lengths(i)[dim], chosen[dim]) for i in part)
        first, starts = tiles(map(operator.mul, heads, blocks))
        if not first[-1]:
            continue
        pairs, has_mask = counted.arguments(student, part)
        unit = student.unit(part, out)
        kernel[(first[-1],)](
            student.arguments(part, unit),
            pairs,
            select(lses, part),
            select(residuals, part),
            residual_strides(residuals, part),
            select(terms, part),
            select(out, part),
            strides(out, part, unit),
            factor,
            pad(part),
            starts,
            HAS_MASK=has_mask,
            UNIT=unit,
            WIDTH=width,
            ACC=acc,
            **shifts(x),
            **options(chosen),
        )
