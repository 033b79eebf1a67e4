"""Divergence of a lightning indexer's choice of keys from attention, for many layers of any shapes.

    I_ij = sum_h w_ih relu(q_ih . k_j)         over the keys that count; one head of keys
    loss = sum_i KL(P_i || softmax_j I_ij) / n      P: the teacher's map, the mean over its heads;
                                                    n: queries that count and see a key; none: 0
    R    = softmax_j I_ij - P_ij                    0 at pairs that do not count
    dS_h = (g / n) w_h R where q_h . k > 0, else 0  g: upstream gradient of the loss
    dq_h = dS_h k,  dk = sum_h dS_h^T q_h
    dw_h = (g / n) sum_j R relu(S_h) = q_h . sum_j dS_h k / w_h, which comes with dq

What does not count may hold nan or inf: it changes no value and no gradient. R is kept, in the
indexer's dtype and only when a gradient is wanted: one map, whatever the number of heads.

  log-sum-exp  of the teacher as in ``probs_sweeps.py``; of the index H products a pair, by tiles,
               whose sums a second kernel merges: a block of queries has too few programs
  residual     H products and the teacher's, with 1 exponential a head of the teacher
  dq, dw       2 H products
  dk           2 H products, by chunks of queries, whose sums PyTorch adds up
Bytes: q each time a tile of the index needs it, from L2; R once a head for dq, once for dk.

Products and sums are kept in float32, for float64 in float64; float32 inputs have IEEE products.
There are no atomics: every sum has a fixed order and results are bit-reproducible.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .attention_probs import MAX_WIDTH, log_sums_in_powers_of_two
from .attention_tiles import (
    LOG2E,
    Counted,
    Model,
    add_map,
    config,
    counted,
    in_reach,
    is_dense,
    keys_seen,
    load_residual,
    load_rows,
    log_sums,
    place,
    placed,
    products,
    residual_width,
    shifts,
    store_residual,
    store_rows,
    strides,
    valid_pairs,
    width,
)
from .core import accumulator, device_refusals, dtype_refusals
from .launch import LaunchConfig
from .launcher import kernel
from .layers import cdiv, groups, in_order, of_layers, pick, pointers, settle

LN2 = tl.constexpr(0.6931471805599453)
PROGRAMS = 512  # of dk, an item's at least: several for each multiprocessor
MERGED = (32, 32)  # queries and tiles that are merged at a time


class Weights(NamedTuple):
    """Of the heads of layers, as a kernel takes them."""

    w: Any  # pointers, one a layer, to [B, H, Nq]
    stride: Any  # of B, H and Nq


@triton.jit
def _load_turned(ptr, stride, inside, WIDTH: tl.constexpr, D: tl.constexpr):
    """[WIDTH, N] of a head: what is transposed within a loop is copied in each of its rounds."""
    e, n = tl.arange(0, WIDTH), tl.arange(0, inside.shape[0])
    mask = (e < D)[:, None] & inside[None, :]
    return tl.load(ptr + e[:, None] + n[None, :] * stride, mask=mask, other=0.0)


@triton.jit
def _index(
    model, weights, layer, item, row, col, heads, rows, cols,
    WHOLE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """A tile of the index; pairs that do not count get anything."""
    stride_q, stride_k = model.q_stride[2], model.k_stride[2]
    q_ptr = place(pick(model.q, layer), model.q_stride, item, 0, row)
    k_ptr = place(pick(model.k, layer), model.k_stride, item, 0, col)
    w_ptr = place(pick(weights.w, layer), weights.stride, item, 0, row)
    w_ptr += tl.arange(0, rows.shape[0]) * tl.cast(weights.stride[2], tl.int64)
    k = _load_turned(k_ptr, stride_k, cols, WIDTH, D)
    acc = tl.zeros((rows.shape[0], cols.shape[0]), ACC)
    for _ in tl.range(0, heads):
        q = load_rows(q_ptr, stride_q, rows, 0, WIDTH, D, WHOLE)
        w = tl.load(w_ptr, mask=rows, other=0.0).to(ACC)
        if CHUNK >= WIDTH:
            s = tl.dot(q, k, input_precision="ieee", out_dtype=ACC)
        else:
            s = products(q, q, q_ptr, k_ptr, stride_q, stride_k, rows, cols, WIDTH, CHUNK, D, ACC)
        acc += w[:, None] * tl.maximum(s, 0.0, propagate_nan=tl.PropagateNan.ALL)
        q_ptr += model.q_stride[1]
        w_ptr += weights.stride[1]
    return acc


@kernel(["heads", "queries", "keys"])
def _index_lse_kernel(
    model,  # Heads
    masks,  # Masks
    weights,  # Weights
    part_ptr,  # [L, B, across, 2, Nq] out: of each tile's keys
    heads,
    queries,
    keys,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WHOLE: tl.constexpr,  # sizes are multiples of the tile's
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(1)
    tile, across, down = tl.program_id(0), tl.cdiv(keys, BLOCK_N), tl.cdiv(queries, BLOCK_M)
    # an item's tiles side by side: they share its queries and keys in L2
    col, row = tile % across * BLOCK_N, tile // across % down * BLOCK_M
    item = tile // across // down
    m = tl.arange(0, BLOCK_M)
    rows, cols = m < queries - row, tl.arange(0, BLOCK_N) < keys - col
    if CAUSAL:  # a tile without a pair that sees one another has no heads to sum over
        heads *= in_reach(placed(masks, row), col, CAUSAL, 0, BLOCK_M, BLOCK_N)
    index = _index(
        model, weights, layer, item, row, col, heads, rows, cols, WHOLE, WIDTH, BLOCK_K, D, ACC
    )
    if MASKED or CAUSAL or not WHOLE:
        if MASKED:
            rows = counted(pick(masks.query, layer), item, row, queries, True, BLOCK_M)
            cols = counted(pick(masks.key, layer), item, col, keys, True, BLOCK_N)
        valid = valid_pairs(rows, cols, placed(masks, row), col, CAUSAL)
        index = tl.where(valid, index, -float("inf"))
    top = tl.max(index, axis=1)
    safe = tl.where(top == -float("inf"), 0.0, top)  # inf - inf is nan
    total = tl.sum(tl.exp2((index - safe[:, None]) * LOG2E), axis=1)
    at = layer.to(tl.int64) * (tl.num_programs(0) // down) + item * across + tile % across
    part_ptr += at * 2 * queries + row
    tl.store(part_ptr + m, top, mask=m < queries - row)
    tl.store(part_ptr + queries + m, total, mask=m < queries - row)


@kernel(["across", "queries"])
def _index_merge_kernel(
    part_ptr,  # [L, B, across, 2, Nq]
    lse_ptrs,  # [B, 2, Nq] out: the greatest, and the logarithm of the sum relative to it
    across,
    queries,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(1)
    tile, blocks = tl.program_id(0), tl.cdiv(queries, BLOCK_M)
    row, item = tile % blocks * BLOCK_M, (tile // blocks).to(tl.int64)
    items = (tl.num_programs(0) // blocks).to(tl.int64)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows = m < queries - row
    part_ptr += (layer * items + item) * across * 2 * queries + row
    top = tl.full((BLOCK_M,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    for first in tl.range(0, across, BLOCK_N):
        at = (first + n).to(tl.int64)[None, :] * 2 * queries + m[:, None]
        mask = rows[:, None] & (n < across - first)[None, :]
        tops = tl.load(part_ptr + at, mask=mask, other=-float("inf"))
        totals = tl.load(part_ptr + queries + at, mask=mask, other=0.0)
        higher = tl.maximum(top, tl.max(tops, axis=1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        totals *= tl.exp2((tops - safe[:, None]) * LOG2E)
        total = total * tl.exp2((top - safe) * LOG2E) + tl.sum(totals, axis=1)
        top = higher
    lse_ptr = pick(lse_ptrs, layer) + item * 2 * queries + row + m
    tl.store(lse_ptr, top, mask=rows)
    tl.store(lse_ptr + queries, tl.log2(tl.where(total == 0, 1.0, total)) * LN2, mask=rows)


@kernel(["heads", "teacher_heads", "teacher_scale", "queries", "keys"])
def _index_residual_kernel(
    model,  # Heads
    teacher,
    masks,  # Masks
    weights,  # Weights
    lse_ptrs,  # [B, 2, Nq]
    teacher_lse,  # [B, H_t, Nq]
    r_ptrs,  # [B, Nq, stride_r] out; unused without STORE
    sum_ptr,  # [L, tiles] out: the tile's part of the divergence
    heads,
    teacher_heads,
    teacher_scale,
    queries,
    keys,
    stride_r,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WHOLE: tl.constexpr,
    STORE: tl.constexpr,
    SHIFT: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TEACHER_D: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(1)
    tile, across, down = tl.program_id(0), tl.cdiv(keys, BLOCK_N), tl.cdiv(queries, BLOCK_M)
    col, row = tile % across * BLOCK_N, tile // across % down * BLOCK_M
    item = tile // across // down
    rows, cols = tl.arange(0, BLOCK_M) < queries - row, tl.arange(0, BLOCK_N) < keys - col
    if CAUSAL:
        live = in_reach(placed(masks, row), col, CAUSAL, 0, BLOCK_M, BLOCK_N)
        heads, teacher_heads = heads * live, teacher_heads * live
    p = add_map(
        tl.zeros((BLOCK_M, BLOCK_N), ACC), 1.0, teacher, pick(teacher_lse, layer), teacher_heads,
        teacher_scale, layer, item, row, col, queries, rows, cols, WHOLE,
        TEACHER_WIDTH, BLOCK_K, TEACHER_D, ACC,
    )  # fmt: skip
    index = _index(
        model, weights, layer, item, row, col, heads, rows, cols, WHOLE, WIDTH, BLOCK_K, D, ACC
    )
    lse_ptr = pick(lse_ptrs, layer) + item.to(tl.int64) * 2 * queries + row
    lse_ptr += tl.arange(0, BLOCK_M)
    # one after the other: an index may be large, and its log-sum-exp would be rounded as that is
    logs = index - tl.load(lse_ptr, mask=rows, other=0.0)[:, None]
    logs -= tl.load(lse_ptr + queries, mask=rows, other=0.0)[:, None]
    chosen = tl.exp2(logs * LOG2E)
    if MASKED or CAUSAL or not WHOLE:
        if MASKED:
            rows = counted(pick(masks.query, layer), item, row, queries, True, BLOCK_M)
            cols = counted(pick(masks.key, layer), item, col, keys, True, BLOCK_N)
        valid = valid_pairs(rows, cols, placed(masks, row), col, CAUSAL)
        # before the arithmetic: what does not count may be nan or inf
        p, logs = tl.where(valid, p, 0.0), tl.where(valid, logs, 0.0)
        chosen = tl.where(valid, chosen, 0.0)
    # where a probability is lost its logarithm is none; that of nan is
    terms = p * (tl.log2(tl.where(p == 0, 1.0, p)) * LN2 - logs)
    at = layer.to(tl.int64) * tl.num_programs(0) + tile
    tl.store(sum_ptr + at, tl.sum(terms))
    if STORE:
        r_ptr = pick(r_ptrs, layer) + item.to(tl.int64) * queries * stride_r
        store_residual(r_ptr, chosen - p, stride_r, row, col, queries, SHIFT)


@kernel(["heads", "queries", "keys"])
def _index_dq_kernel(
    model,  # Heads
    masks,  # Masks
    weights,  # Weights
    lse_ptrs,  # [B, 2, Nq]
    r_ptrs,  # [B, Nq, stride_r]
    dq_ptrs,  # [B, H, Nq, D] out
    dw,  # Weights out
    factor_ptr,  # [L]: g / n
    heads,
    queries,
    keys,
    stride_r,
    dq_stride,  # of B, H and Nq
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WHOLE: tl.constexpr,  # every tile is read whole
    SETTLE: tl.constexpr,
    SHIFT: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(1)
    # heads fastest: they share a strip of the residual in L2; rows that see most keys first
    tile, down = tl.program_id(0), tl.cdiv(queries, BLOCK_M)
    head, row, item = tile % heads, tile // heads % down, tile // heads // down
    row = (down - 1 - row) * BLOCK_M
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = m < (BLOCK_M if WHOLE else queries - row)
    rows = counted(pick(masks.query, layer), item, row, queries, MASKED, BLOCK_M)
    end = keys_seen(rows, placed(masks, row), keys, CAUSAL)
    lse_ptr = pick(lse_ptrs, layer) + item.to(tl.int64) * 2 * queries
    _, rows = log_sums(lse_ptr + row, rows, 0, MASKED)
    stride_q, stride_k = model.q_stride[2], model.k_stride[2]
    q_ptr = place(pick(model.q, layer), model.q_stride, item, head, row)
    k_base = place(pick(model.k, layer), model.k_stride, item, 0, 0)
    r_ptr = pick(r_ptrs, layer) + item.to(tl.int64) * queries * stride_r
    key_mask = pick(masks.key, layer)
    q = load_rows(q_ptr, stride_q, rows, 0, WIDTH, D, WHOLE)
    u = tl.zeros((BLOCK_M, WIDTH), ACC)
    for col in tl.range(0, end, BLOCK_N):
        # a key that no query of the block sees reads as 0: it may hold nan, and 0 * nan is nan
        cols = counted(key_mask, item, col, keys, MASKED, BLOCK_N) & (n < end - col)
        k_ptr = k_base + tl.cast(col, tl.int64) * stride_k
        k = load_rows(k_ptr, stride_k, cols, 0, WIDTH, D, WHOLE)
        in_cols = n < (BLOCK_N if WHOLE else stride_r - col)
        r = load_residual(r_ptr, stride_r, row, col, inside, in_cols)
        s = products(q, k, q_ptr, k_ptr, stride_q, stride_k, rows, cols, WIDTH, BLOCK_K, D, ACC)
        # the residual is 0 where a pair does not count
        ds = tl.where(s > 0, r, 0.0).to(k.dtype)
        u = settle(tl.dot(ds, k, u, input_precision="ieee", out_dtype=ACC), SETTLE)
    u *= tl.load(factor_ptr + layer) * 2.0**-SHIFT
    w_ptr = place(pick(weights.w, layer), weights.stride, item, head, row)
    dw_ptr = place(pick(dw.w, layer), dw.stride, item, head, row)
    w = tl.load(w_ptr + m * tl.cast(weights.stride[2], tl.int64), mask=rows, other=0.0).to(ACC)
    # sum_j R relu(q k_j) is q times the sum of R k_j where q k_j > 0. Read again, q takes no
    # registers meanwhile
    q = load_rows(q_ptr, stride_q, rows, 0, WIDTH, D, False)
    sums = tl.sum(u * q.to(ACC), axis=1).to(dw_ptr.dtype.element_ty)
    tl.store(dw_ptr + m * tl.cast(dw.stride[2], tl.int64), sums, mask=inside)
    dq_ptr = place(pick(dq_ptrs, layer), dq_stride, item, head, row)
    store_rows(dq_ptr, w[:, None] * u, dq_stride[2], inside, D)


@kernel(["heads", "queries", "keys", "chunk"])
def _index_dk_kernel(
    model,  # Heads
    masks,  # Masks
    weights,  # Weights
    lse_ptrs,  # [B, 2, Nq]
    r_ptrs,  # [B, Nq, stride_r]
    part_ptr,  # [L, B, chunks, Nk, D] out: of each chunk of queries
    factor_ptr,  # [L]: g / n
    heads,
    queries,
    keys,
    stride_r,
    chunk,  # queries, a multiple of BLOCK_M
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WHOLE: tl.constexpr,  # every tile is read whole
    SETTLE: tl.constexpr,
    SHIFT: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(1)
    tile, across, chunks = tl.program_id(0), tl.cdiv(keys, BLOCK_N), tl.cdiv(queries, chunk)
    col, start = tile % across * BLOCK_N, tile // across % chunks * chunk
    item = tile // across // chunks
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside, in_cols = n < keys - col, n < (BLOCK_N if WHOLE else stride_r - col)
    cols = counted(pick(masks.key, layer), item, col, keys, MASKED, BLOCK_N)
    stride_q, stride_k = model.q_stride[2], model.k_stride[2]
    k_ptr = place(pick(model.k, layer), model.k_stride, item, 0, col)
    k = load_rows(k_ptr, stride_k, cols, 0, WIDTH, D, False)
    r_ptr = pick(r_ptrs, layer) + item.to(tl.int64) * queries * stride_r
    lse_ptr = pick(lse_ptrs, layer) + item.to(tl.int64) * 2 * queries
    query_mask = pick(masks.query, layer)
    stride_w = tl.cast(weights.stride[2], tl.int64)
    low = start
    if CAUSAL:  # queries before the first of these keys see none of them
        place_of_col = col  # among the queries
        if masks.first is not None:
            place_of_col = tl.maximum(col - masks.first, 0)
        low = tl.maximum(start, place_of_col // BLOCK_M * BLOCK_M)
    dk = tl.zeros((BLOCK_N, WIDTH), ACC)
    for row in tl.range(low, tl.minimum(start + chunk, queries), BLOCK_M):
        rows = counted(query_mask, item, row, queries, MASKED, BLOCK_M)
        _, rows = log_sums(lse_ptr + row, rows, 0, MASKED)
        # the other way round, as its product takes it: once for all heads
        in_rows = m < (BLOCK_M if WHOLE else queries - row)
        r = tl.trans(load_residual(r_ptr, stride_r, row, col, in_rows, in_cols))
        q_ptr = place(pick(model.q, layer), model.q_stride, item, 0, row)
        w_ptr = place(pick(weights.w, layer), weights.stride, item, 0, row) + m * stride_w
        for _ in tl.range(0, heads):
            q = load_rows(q_ptr, stride_q, rows, 0, WIDTH, D, WHOLE)
            w = tl.load(w_ptr, mask=rows, other=0.0).to(ACC)
            s = products(k, q, k_ptr, q_ptr, stride_k, stride_q, cols, rows, WIDTH, BLOCK_K, D, ACC)
            ds = tl.where(s > 0, r * w[None, :], 0.0).to(q.dtype)
            dk = settle(tl.dot(ds, q, dk, input_precision="ieee", out_dtype=ACC), SETTLE)
            q_ptr += model.q_stride[1]
            w_ptr += weights.stride[1]
    dk *= tl.load(factor_ptr + layer) * 2.0**-SHIFT
    at = layer.to(tl.int64) * (tl.num_programs(0) // across) + tile // across
    store_rows(part_ptr + (at * keys + col) * D, dk, D, inside, D)


def not_served(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    weight: Sequence[Tensor],
    teacher_q: Sequence[Tensor],
    teacher_k: Sequence[Tensor],
) -> list[str]:
    """Each reason why these kernels cannot take the inputs; empty if they can."""
    indexers, teachers = (*q, *k), (*teacher_q, *teacher_k)
    reasons = device_refusals((*indexers, *weight, *teachers))
    reasons += dtype_refusals("the indexers' queries and keys", indexers)
    reasons += dtype_refusals("weights", weight) + dtype_refusals("teachers", teachers)
    widest = max(x.shape[-1] for x in (*q, *teacher_q))
    if widest > MAX_WIDTH:
        reasons.append(f"head sizes must be at most {MAX_WIDTH}, got {widest}")
    return reasons


def indexer_forward(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    weight: Sequence[Tensor],
    teacher_q: Sequence[Tensor],
    teacher_k: Sequence[Tensor],
    query_masks: Sequence[Tensor | None],
    key_masks: Sequence[Tensor | None],
    teacher_lse: Sequence[Tensor | None],
    *,
    causal: Sequence[bool],
    teacher_scale: Sequence[float],
    need_residual: bool,
    first: int | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Losses of L layers, and what their backward needs.

    Args:
        q, k, weight: L x ``[B, H, Nq, d]``, ``[B, Nk, d]`` and ``[B, H, Nq]``; any strides.
        need_residual: whether a gradient will be wanted.
        the others: as for ``attention_probs_forward``.

    Returns:
        losses ``[L]``; residuals, L x ``[B, Nq, residual_width(Nk)]`` in the dtype of q, zero where
        nothing counts, times ``2**SHIFTS[dtype][1]`` for float16; each index's greatest and the
        logarithm of its exponentials' sum relative to it, L x ``[B, 2, Nq]``; scales ``[L]``, 1 / n
        with n at least 1. All but residuals are float32 or float64. The two lists are empty if no
        gradient is wanted.
    """
    model = _model(q, k)
    teacher = Model.of(teacher_q, teacher_k, teacher_scale).positive()
    pairs = Counted.of(query_masks, key_masks, causal, None, first)
    L, (dtype, acc) = len(q), accumulator(q[0])
    lses = [empty_log_sums(x, dtype) for x in q]
    residuals = [empty_residual(*x) for x in zip(q, k, strict=True)] if need_residual else [*q]
    losses: dict[int, Tensor] = {}
    scales: dict[int, Tensor] = {}
    with torch.cuda.device_of(q[0]):
        teacher_lses = log_sums_in_powers_of_two(teacher, pairs, teacher_lse, [None] * L)
        forms = {
            i: (model.form(i), strides(weight[i]), teacher.form(i), pairs.form(i)) for i in range(L)
        }
        for _, layers in groups(forms):
            x, y = model.q[layers[0]], teacher.q[layers[0]]
            (B, H, queries, d), keys = x.shape, k[layers[0]].shape[1]
            masked, causality, _ = pairs.form(layers[0])
            taken = (
                pairs.arguments(x, queries, keys, layers),
                Weights(pointers(weight, layers), strides(weight[layers[0]])),
            )
            shared: dict[str, object] = {
                "MASKED": masked, "CAUSAL": causality, "D": d, "WIDTH": width(x), "ACC": acc,
            }  # fmt: skip
            chosen = config(launch.INDEX_LSE, width(x), x).fitted(queries)
            across = cdiv(keys, chosen.block_n)
            parts = x.new_empty(len(layers), B, across, 2, queries, dtype=dtype)
            if parts.numel():
                _index_lse_kernel[(B * cdiv(queries, chosen.block_m) * across, len(layers))](
                    model.arguments(layers), *taken, parts, H, queries, keys,
                    WHOLE=not (queries % chosen.block_m or keys % chosen.block_n),
                    **shared, **launch.options(chosen),
                )  # fmt: skip
                _index_merge_kernel[(B * cdiv(queries, MERGED[0]), len(layers))](
                    parts, pointers(lses, layers), across, queries,
                    BLOCK_M=MERGED[0], BLOCK_N=MERGED[1], ACC=acc, enable_fp_fusion=True,
                )  # fmt: skip
            chosen = config(launch.INDEX_RESIDUAL, max(width(x), width(y)), x, y).fitted(queries)
            tiles = B * cdiv(queries, chosen.block_m) * cdiv(keys, chosen.block_n)
            sums = x.new_empty(len(layers), tiles, dtype=dtype)
            if tiles:
                _index_residual_kernel[(tiles, len(layers))](
                    model.arguments(layers), teacher.arguments(layers), *taken,
                    pointers(lses, layers), pointers(teacher_lses, layers),
                    pointers(residuals, layers), sums,
                    H, y.shape[1], teacher.scale[layers[0]], queries, keys, residual_width(keys),
                    WHOLE=not (queries % chosen.block_m or keys % chosen.block_n),
                    STORE=need_residual, SHIFT=shifts(x)[1],
                    TEACHER_D=y.shape[3], TEACHER_WIDTH=width(y),
                    **shared, **launch.options(chosen),
                )  # fmt: skip
            for i, total in zip(layers, sums.sum(1), strict=True):
                scales[i] = pairs.queries_that_see(i, x, keys).to(dtype).reciprocal()
                losses[i] = total * scales[i]
    kept = (residuals, lses) if need_residual else ([], [])
    return in_order(losses), *kept, in_order(scales)


def indexer_backward(
    grad: Tensor,
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    weight: Sequence[Tensor],
    query_masks: Sequence[Tensor | None],
    key_masks: Sequence[Tensor | None],
    residuals: Sequence[Tensor],
    lses: Sequence[Tensor],
    scales: Tensor,
    *,
    causal: Sequence[bool],
    need_q: Sequence[bool],
    need_k: Sequence[bool],
    need_weight: Sequence[bool],
    dtype: torch.dtype | None = None,
    first: int | None = None,
    sums: Sequence[Tensor] = (),
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Gradients of L layers from what the forward kept, which is only read.

    Args:
        grad: ``[L]``, the upstream gradient; read on the device.
        residuals, lses, scales: as ``indexer_forward`` returned them.
        need_q, need_k, need_weight: L flags: which gradients to compute.
        dtype, first, sums: of a strip, as for ``attention_probs_backward``.
        the others: as given to it.

    Returns:
        dq, dk and dw in ``dtype``, by default the inputs', and the layout that ``torch.empty_like``
        gives; None where none was asked for.
    """
    model = _model(q, k)
    pairs = Counted.of(query_masks, key_masks, causal, None, first)
    factor = (grad * scales).to(scales.dtype).contiguous()
    # one comes with the other
    wanted = [i for i, needs in enumerate(zip(need_q, need_weight, strict=True)) if any(needs)]
    d_q, d_w = ({i: torch.empty_like(x[i], dtype=dtype) for i in wanted} for x in (q, weight))
    d_k = {i: sums[i] if sums else torch.empty_like(k[i]) for i, x in enumerate(need_k) if x}
    # where rows are not dense, the kernel writes elsewhere
    to_q = {i: x if is_dense(x) else x.new_empty(x.shape) for i, x in d_q.items()}
    with torch.cuda.device_of(q[0]):
        _queries_gradients(model, pairs, weight, lses, residuals, factor, to_q, d_w)
        _keys_gradients(model, pairs, weight, lses, residuals, factor, d_k)
    for i, x in d_q.items():
        if to_q[i] is not x:
            x.copy_(to_q[i])
    return (
        [d_q[i] if need else None for i, need in enumerate(need_q)],
        [d_k.get(i) for i in range(len(k))],
        [d_w[i] if need else None for i, need in enumerate(need_weight)],
    )


def _queries_gradients(
    model: Model,
    pairs: Counted,
    weight: Sequence[Tensor],
    lses: Sequence[Tensor],
    residuals: Sequence[Tensor],
    factor: Tensor,
    d_q: dict[int, Tensor],
    d_w: dict[int, Tensor],
) -> None:
    """Fills dq and dw."""
    forms = {
        i: (model.form(i), strides(weight[i]), pairs.form(i), strides(d_q[i]), strides(d_w[i]))
        for i in d_q
    }
    for form, layers in groups(forms):
        x, keys = model.q[layers[0]], model.k[layers[0]].shape[2]
        (B, H, queries, _), chosen = x.shape, config(launch.INDEX_DQ, width(x), x)
        chosen = chosen.fitted(queries)
        if not keys:
            for i in layers:
                d_q[i].zero_()
                d_w[i].zero_()
        elif x.numel():
            _index_dq_kernel[(B * H * cdiv(queries, chosen.block_m), len(layers))](
                *_arguments(model, pairs, weight, lses, residuals, layers),
                pointers(d_q, layers), Weights(pointers(d_w, layers), form[4]),
                of_layers(factor, layers), H, queries, keys, residual_width(keys), form[3],
                **_constants(x, keys, pairs, layers[0], chosen), **launch.options(chosen),
            )  # fmt: skip


def _keys_gradients(
    model: Model,
    pairs: Counted,
    weight: Sequence[Tensor],
    lses: Sequence[Tensor],
    residuals: Sequence[Tensor],
    factor: Tensor,
    d_k: dict[int, Tensor],
) -> None:
    """Fills dk, from sums of chunks of queries."""
    forms = {i: (model.form(i), strides(weight[i]), pairs.form(i)) for i in d_k}
    for _, layers in groups(forms):
        x, keys = model.q[layers[0]], model.k[layers[0]].shape[2]
        (B, H, queries, d), chosen = x.shape, config(launch.INDEX_DK, width(x), x)
        # of an item's sizes alone: layers that are computed one by one have the same sums
        across, blocks = B * cdiv(keys, chosen.block_n), cdiv(queries, chosen.block_m)
        chunk = chosen.block_m * max(1, blocks * across // PROGRAMS)
        chunks = cdiv(queries, chunk)
        parts = x.new_empty(len(layers), B, chunks, keys, d, dtype=factor.dtype)
        if parts.numel():
            _index_dk_kernel[(across * chunks, len(layers))](
                *_arguments(model, pairs, weight, lses, residuals, layers),
                parts, of_layers(factor, layers), H, queries, keys, residual_width(keys), chunk,
                **_constants(x, keys, pairs, layers[0], chosen), **launch.options(chosen),
            )  # fmt: skip
        for i, total in zip(layers, parts.sum(2), strict=True):
            d_k[i].copy_(total if pairs.first is None else total + d_k[i])


def _model(q: Sequence[Tensor], k: Sequence[Tensor]) -> Model:
    return Model.of(q, [x[:, None] for x in k], [1.0] * len(q))


def _arguments(
    model: Model,
    pairs: Counted,
    weight: Sequence[Tensor],
    lses: Sequence[Tensor],
    residuals: Sequence[Tensor],
    layers: Sequence[int],
) -> tuple[object, ...]:
    """What both kernels of the backward pass take first."""
    x, keys = model.q[layers[0]], model.k[layers[0]].shape[2]
    return (
        model.arguments(layers),
        pairs.arguments(x, x.shape[2], keys, layers),
        Weights(pointers(weight, layers), strides(weight[layers[0]])),
        pointers(lses, layers),
        pointers(residuals, layers),
    )


def _constants(
    x: Tensor, keys: int, pairs: Counted, layer: int, chosen: LaunchConfig
) -> dict[str, object]:
    masked, causal, _ = pairs.form(layer)
    queries = x.shape[2]
    # keys after the last query are seen by none
    unseen = causal and keys > queries + (pairs.first or 0)
    whole = not (masked or unseen or queries % chosen.block_m or keys % chosen.block_n)
    return {
        "MASKED": masked, "CAUSAL": causal, "WHOLE": whole,
        "SETTLE": launch.settles(x), "SHIFT": shifts(x)[1],
        "D": x.shape[3], "WIDTH": width(x), "ACC": accumulator(x)[1],
    }  # fmt: skip


def empty_residual(q: Tensor, k: Tensor) -> Tensor:
    """Room for a layer's residual."""
    return q.new_empty(q.shape[0], q.shape[2], residual_width(k.shape[1]))


def empty_log_sums(q: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the log-sum-exp of a layer's index, in two parts."""
    return q.new_empty(q.shape[0], 2, q.shape[2], dtype=dtype)
