"""Kernels of head-averaged attention maps whose rows fit in registers: up to 256 keys.

A program holds whole rows, so that the softmax needs no second sweep: one launch forward, with the
log-sum-exp as a by-product. Keys are a tile of 64, 128 or 256 and queries blocks of 64; beside 64
there may be a tail of up to 16: 77 tokens take 64 + 16, not 128. The backward kernel holds all of
such a short map's queries too, and gives both gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .attention_tiles import (
    LOG2E,
    Counted,
    Model,
    counted,
    keys_seen,
    load_residual,
    load_rows,
    log_sums,
    next_key,
    place,
    positive,
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
from .launch import LaunchConfig
from .launcher import kernel
from .layers import cdiv, groups, of_layers, pick, pointers, power_of_2, total

TAIL_ROWS = tl.constexpr(16)
TAIL = 16
# heads that a program of the backward pass takes, if the device is full all the same
HEADS_AT_ONCE = 6
ENOUGH_PROGRAMS = 1024


@triton.jit
def _hide(x, fill, cols, row, col, PARTIAL: tl.constexpr, CAUSAL: tl.constexpr):
    """A tile where its query at ``row`` may see its key at ``col``; elsewhere fill."""
    if CAUSAL:
        i, j = tl.arange(0, x.shape[0]) + row, tl.arange(0, x.shape[1]) + col
        x = tl.where(i[:, None] >= j[None, :], x, fill)
    if PARTIAL:
        x = tl.where(cols[None, :], x, fill)
    return x


@triton.jit
def _add_map(
    acc,  # [M, N]
    acc_tail,  # [M, TAIL]; anything without TAIL
    sign: tl.constexpr,
    model, lse_ptr, heads, scale, layer, item, row, queries, rows, cols, cols_tail,
    seen, seen_tail,  # which keys count
    GIVEN: tl.constexpr,  # the log-sum-exp is read; else computed
    STORE: tl.constexpr,  # and written
    MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS_WHOLE: tl.constexpr, KEYS_WHOLE: tl.constexpr, TAIL: tl.constexpr,
    WIDTH: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """acc + sign times two tiles of the heads' mean map; with GIVEN, anything where none counts."""
    BLOCK_N: tl.constexpr = cols.shape[0]
    stride_q, stride_k = model.q_stride[2], model.k_stride[2]
    q_ptr = place(pick(model.q, layer), model.q_stride, item, 0, row)
    k_ptr = place(pick(model.k, layer), model.k_stride, item, 0, 0)
    m = tl.arange(0, rows.shape[0])
    lse_ptr += item.to(tl.int64) * heads * queries + row + m
    c = positive(scale, ACC)
    weight = sign / tl.cast(heads, ACC)
    for head in tl.range(0, heads):
        q = load_rows(q_ptr, stride_q, rows, 0, WIDTH, D, ROWS_WHOLE)
        k = load_rows(k_ptr, stride_k, cols, 0, WIDTH, D, KEYS_WHOLE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)
        if TAIL:
            k = load_rows(k_ptr + BLOCK_N * stride_k, stride_k, cols_tail, 0, WIDTH, D, False)
            s_tail = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)
        if GIVEN:
            lse = tl.load(lse_ptr, mask=rows, other=0.0)
            acc += weight * tl.exp2(s * c - lse[:, None])
            if TAIL:
                acc_tail += weight * tl.exp2(s_tail * c - lse[:, None])
        else:
            # before the exponential: a key that does not count may hold nan or inf
            s = _hide(s, -float("inf"), seen, row, 0, MASKED or not KEYS_WHOLE, CAUSAL)
            top = tl.max(s, axis=1)
            if TAIL:
                s_tail = _hide(s_tail, -float("inf"), seen_tail, row, BLOCK_N, True, CAUSAL)
                top = tl.maximum(top, tl.max(s_tail, axis=1))
            top = tl.where(top == -float("inf"), 0.0, top * c)  # inf - inf is nan
            p = tl.exp2(s * c - top[:, None])
            sums = tl.sum(p, axis=1)
            if TAIL:
                p_tail = tl.exp2(s_tail * c - top[:, None])
                sums += tl.sum(p_tail, axis=1)
            some = tl.where(sums == 0, 1.0, sums)
            share = weight / some
            acc += p * share[:, None]
            if TAIL:
                acc_tail += p_tail * share[:, None]
            if STORE:
                lse = tl.where(sums == 0, -float("inf"), top + tl.log2(some))
                tl.store(lse_ptr, lse, mask=rows)
        q_ptr += model.q_stride[1]
        k_ptr += next_key(head, model.share, model.k_stride[1])
        lse_ptr += queries
    return acc, acc_tail


@triton.jit
def _forward_block(
    student, teacher, masks, student_lse, teacher_lse, r_ptrs, sum_ptr, count_ptr,
    student_heads, student_scale, teacher_heads, teacher_scale, queries, keys, stride_r,
    layer, item, row, at,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, ROWS_WHOLE: tl.constexpr, KEYS_WHOLE: tl.constexpr,
    STUDENT_GIVEN: tl.constexpr, TEACHER_GIVEN: tl.constexpr,
    STORE: tl.constexpr, SHIFT: tl.constexpr,
    STUDENT_D: tl.constexpr, STUDENT_WIDTH: tl.constexpr,
    TEACHER_D: tl.constexpr, TEACHER_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
    UNSEEN: tl.constexpr,  # a tail that no query of the block sees
    ACC: tl.constexpr,
):  # fmt: skip
    """The rows of one block."""
    key_mask = pick(masks.key, layer)
    rows, cols = tl.arange(0, BLOCK_M) < queries - row, tl.arange(0, BLOCK_N) < keys
    seen = counted(key_mask, item, 0, keys, MASKED, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if TAIL:
        cols_tail = tl.arange(0, TAIL) < keys - BLOCK_N
        seen_tail = counted(key_mask, item, BLOCK_N, keys, MASKED, TAIL)
        acc_tail = tl.zeros((BLOCK_M, TAIL), ACC)
    else:
        cols_tail, seen_tail, acc_tail = cols, seen, acc
    acc, acc_tail = _add_map(
        acc, acc_tail, 1.0, student, pick(student_lse, layer), student_heads, student_scale, layer,
        item, row, queries, rows, cols, cols_tail, seen, seen_tail, STUDENT_GIVEN, STORE,
        MASKED, CAUSAL, ROWS_WHOLE, KEYS_WHOLE, TAIL, STUDENT_WIDTH, STUDENT_D, ACC,
    )  # fmt: skip
    acc, acc_tail = _add_map(
        acc, acc_tail, -1.0, teacher, pick(teacher_lse, layer), teacher_heads, teacher_scale, layer,
        item, row, queries, rows, cols, cols_tail, seen, seen_tail, TEACHER_GIVEN, False,
        MASKED, CAUSAL, ROWS_WHOLE, KEYS_WHOLE, TAIL, TEACHER_WIDTH, TEACHER_D, ACC,
    )  # fmt: skip
    rows = counted(pick(masks.query, layer), item, row, queries, MASKED, BLOCK_M)
    valid = valid_pairs(rows, seen, row, 0, CAUSAL)
    if MASKED or CAUSAL or not (KEYS_WHOLE and ROWS_WHOLE):
        acc = tl.where(valid, acc, 0.0)
    square = tl.sum(acc * acc)
    count = tl.sum(valid.to(tl.int32))
    if TAIL:
        valid = valid_pairs(rows, seen_tail, row, BLOCK_N, CAUSAL)
        acc_tail = tl.where(valid, acc_tail, 0.0)
        square += tl.sum(acc_tail * acc_tail)
        count += tl.sum(valid.to(tl.int32))
    tl.store(sum_ptr + at, square)
    if MASKED:
        tl.store(count_ptr + at, count)
    if STORE:
        r_ptr = pick(r_ptrs, layer) + item.to(tl.int64) * queries * stride_r
        store_residual(r_ptr, acc, stride_r, row, 0, queries, SHIFT)
        if TAIL:
            store_residual(r_ptr, acc_tail, stride_r, row, BLOCK_N, queries, SHIFT)
        if UNSEEN:
            zeros = tl.zeros((BLOCK_M, UNSEEN), ACC)
            store_residual(r_ptr, zeros, stride_r, row, BLOCK_N, queries, SHIFT)


@kernel([
    "student_heads", "student_scale", "teacher_heads", "teacher_scale", "queries", "keys",
])  # fmt: skip
def _rows_forward_kernel(
    student,  # Heads
    teacher,
    masks,  # Masks
    student_lse,  # [B, H_s, Nq]: read where GIVEN, else written where STORE
    teacher_lse,  # [B, H_t, Nq]: read where GIVEN
    r_ptrs,  # [B, Nq, stride_r] out; unused without STORE
    sum_ptr,  # [L, blocks] out: sum of R^2 over the block
    count_ptr,  # [L, blocks] int32 out: pairs that count; unused unless MASKED
    student_heads,
    student_scale,
    teacher_heads,
    teacher_scale,
    queries,
    keys,
    stride_r,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS_WHOLE: tl.constexpr,  # queries are whole blocks
    ROW_TAIL: tl.constexpr,  # the last block has at most 16
    FIRST_ONLY: tl.constexpr,  # blocks but that one are the first, and see no key of the tail
    KEYS_WHOLE: tl.constexpr,  # there are BLOCK_N keys or more
    STUDENT_GIVEN: tl.constexpr,
    TEACHER_GIVEN: tl.constexpr,
    STORE: tl.constexpr,
    SHIFT: tl.constexpr,
    STUDENT_D: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_D: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,  # keys after the first BLOCK_N, rounded up; or 0
    ACC: tl.constexpr,
):
    layer = tl.program_id(1)
    tile, down = tl.program_id(0), tl.cdiv(queries, BLOCK_M)
    row, item = tile % down * BLOCK_M, tile // down
    at = layer.to(tl.int64) * tl.num_programs(0) + tile
    if ROW_TAIL:
        if row + BLOCK_M > queries:
            _forward_block(
                student, teacher, masks, student_lse, teacher_lse, r_ptrs, sum_ptr, count_ptr,
                student_heads, student_scale, teacher_heads, teacher_scale, queries, keys, stride_r,
                layer, item, row, at, MASKED, CAUSAL, False, KEYS_WHOLE,
                STUDENT_GIVEN, TEACHER_GIVEN, STORE, SHIFT, STUDENT_D, STUDENT_WIDTH, TEACHER_D,
                TEACHER_WIDTH, TAIL_ROWS, BLOCK_N, TAIL, 0, ACC,
            )  # fmt: skip
        else:
            _forward_block(
                student, teacher, masks, student_lse, teacher_lse, r_ptrs, sum_ptr, count_ptr,
                student_heads, student_scale, teacher_heads, teacher_scale, queries, keys, stride_r,
                layer, item, row, at, MASKED, CAUSAL, True, KEYS_WHOLE,
                STUDENT_GIVEN, TEACHER_GIVEN, STORE, SHIFT, STUDENT_D, STUDENT_WIDTH, TEACHER_D,
                TEACHER_WIDTH, BLOCK_M, BLOCK_N, 0 if FIRST_ONLY else TAIL,
                TAIL if FIRST_ONLY else 0, ACC,
            )  # fmt: skip
    else:
        _forward_block(
            student, teacher, masks, student_lse, teacher_lse, r_ptrs, sum_ptr, count_ptr,
            student_heads, student_scale, teacher_heads, teacher_scale, queries, keys, stride_r,
            layer, item, row, at, MASKED, CAUSAL, ROWS_WHOLE, KEYS_WHOLE,
            STUDENT_GIVEN, TEACHER_GIVEN, STORE, SHIFT, STUDENT_D, STUDENT_WIDTH, TEACHER_D,
            TEACHER_WIDTH, BLOCK_M, BLOCK_N, TAIL, 0, ACC,
        )  # fmt: skip


@triton.jit
def _add_rows(
    dk, dk_tail, q, k, k_tail, r, r_tail, lse, c, alpha, dq_ptr, stride_dq, in_rows, row,
    cols, cols_tail,
    PARTIAL: tl.constexpr, CAUSAL: tl.constexpr, P_SHIFT: tl.constexpr, TAIL: tl.constexpr,
    D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dK and its tail after a block of queries, whose dQ is written."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)
    p = _hide(tl.exp2(s * c - lse[:, None]), 0.0, cols, row, 0, PARTIAL, CAUSAL)
    term = tl.sum(p * r, axis=1)
    if TAIL:
        s = tl.dot(q, tl.trans(k_tail), input_precision="ieee", out_dtype=ACC)
        p_tail = tl.exp2(s * c - lse[:, None])
        p_tail = _hide(p_tail, 0.0, cols_tail, row, k.shape[0], True, CAUSAL)
        term += tl.sum(p_tail * r_tail, axis=1)
    term *= 2.0**-P_SHIFT
    ds = (p * (r - term[:, None])).to(q.dtype)
    dq = tl.dot(ds, k, input_precision="ieee", out_dtype=ACC)
    dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee", out_dtype=ACC)
    if TAIL:
        ds = (p_tail * (r_tail - term[:, None])).to(q.dtype)
        dq = tl.dot(ds, k_tail, dq, input_precision="ieee", out_dtype=ACC)
        dk_tail = tl.dot(tl.trans(ds), q, dk_tail, input_precision="ieee", out_dtype=ACC)
    store_rows(dq_ptr, alpha * dq, stride_dq, in_rows, D)
    return dk, dk_tail


@kernel(["heads", "scale", "queries", "keys", "heads_at_once"])
def _rows_backward_kernel(
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
    heads_at_once,  # of a program
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS_WHOLE: tl.constexpr,
    ROW_TAIL: tl.constexpr,
    FIRST_ONLY: tl.constexpr,
    KEYS_WHOLE: tl.constexpr,
    P_SHIFT: tl.constexpr,
    R_SHIFT: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    ACC: tl.constexpr,
):
    PARTIAL: tl.constexpr = MASKED or not KEYS_WHOLE
    FIRST_TAIL: tl.constexpr = 0 if FIRST_ONLY else TAIL  # that the first block sees
    layer = tl.program_id(1)
    parts = tl.cdiv(heads, heads_at_once)
    head, item = tl.program_id(0) % parts * heads_at_once, tl.program_id(0) // parts
    query_mask, key_mask = pick(masks.query, layer), pick(masks.key, layer)
    r_ptr = pick(r_ptrs, layer) + item.to(tl.int64) * queries * stride_r
    m, n, t = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, TAIL_ROWS)
    in_rows, in_cols, in_tail = m < queries, n < stride_r, t < stride_r - BLOCK_N
    rows = counted(query_mask, item, 0, queries, MASKED, BLOCK_M)
    end = keys_seen(rows, 0, keys, CAUSAL)
    r = load_residual(r_ptr, stride_r, 0, 0, in_rows, in_cols)
    r_tail = r
    if FIRST_TAIL:
        r_tail = load_residual(r_ptr, stride_r, 0, BLOCK_N, in_rows, in_tail)
    if ROW_TAIL:
        in_last = t < queries - BLOCK_M
        last_rows = counted(query_mask, item, BLOCK_M, queries, MASKED, TAIL_ROWS)
        end = tl.maximum(end, keys_seen(last_rows, BLOCK_M, keys, CAUSAL))
        r_last = load_residual(r_ptr, stride_r, BLOCK_M, 0, in_last, in_cols)
        r_last_tail = r_last
        if TAIL:
            r_last_tail = load_residual(r_ptr, stride_r, BLOCK_M, BLOCK_N, in_last, in_tail)
    # a key that no query sees reads as 0: it may hold nan, and 0 * nan is nan
    cols = counted(key_mask, item, 0, keys, MASKED, BLOCK_N) & (n < end)
    cols_tail = counted(key_mask, item, BLOCK_N, keys, MASKED, TAIL_ROWS) & (t < end - BLOCK_N)
    stride_q, stride_k = student.q_stride[2], student.k_stride[2]
    q_ptr = place(pick(student.q, layer), student.q_stride, item, head, 0)
    k_ptr = place(pick(student.k, layer), student.k_stride, item, head, 0)
    dq_ptr = place(pick(dq_ptrs, layer), dq_stride, item, head, 0)
    dk_ptr = place(pick(dk_ptrs, layer), dk_stride, item, head, 0)
    lse_ptr = pick(lse_ptrs, layer) + (item.to(tl.int64) * heads + head) * queries
    scale = tl.cast(scale, ACC)
    c = scale * LOG2E
    alpha = tl.load(factor_ptr + layer) * scale / heads * 2.0 ** -(P_SHIFT + R_SHIFT)
    for _ in tl.range(0, tl.minimum(heads_at_once, heads - head)):
        k = load_rows(k_ptr, stride_k, cols, 0, WIDTH, D, not PARTIAL and not CAUSAL)
        dk = tl.zeros((BLOCK_N, WIDTH), ACC)
        k_tail, dk_tail = k, dk
        if TAIL:
            at = k_ptr + BLOCK_N * stride_k
            k_tail = load_rows(at, stride_k, cols_tail, 0, WIDTH, D, False)
            dk_tail = tl.zeros((TAIL, WIDTH), ACC)
        lse, read = log_sums(lse_ptr, rows, P_SHIFT, MASKED)
        q = load_rows(q_ptr, stride_q, read, 0, WIDTH, D, (ROWS_WHOLE or ROW_TAIL) and not MASKED)
        dk, dk_tail = _add_rows(
            dk, dk_tail, q, k, k_tail, r, r_tail, lse, c, alpha, dq_ptr, dq_stride[2], in_rows, 0,
            cols, cols_tail, PARTIAL, CAUSAL, P_SHIFT, FIRST_TAIL, D, ACC,
        )  # fmt: skip
        if ROW_TAIL:
            lse, read = log_sums(lse_ptr + BLOCK_M, last_rows, P_SHIFT, MASKED)
            q = load_rows(q_ptr + BLOCK_M * stride_q, stride_q, read, 0, WIDTH, D, False)
            dk, dk_tail = _add_rows(
                dk, dk_tail, q, k, k_tail, r_last, r_last_tail, lse, c, alpha,
                dq_ptr + BLOCK_M * dq_stride[2], dq_stride[2], in_last, BLOCK_M,
                cols, cols_tail, PARTIAL, CAUSAL, P_SHIFT, TAIL, D, ACC,
            )  # fmt: skip
        store_rows(dk_ptr, alpha * dk, dk_stride[2], n < keys, D)
        if TAIL:
            at = dk_ptr + BLOCK_N * dk_stride[2]
            store_rows(at, alpha * dk_tail, dk_stride[2], t < keys - BLOCK_N, D)
        q_ptr += student.q_stride[1]
        k_ptr += student.k_stride[1]
        dq_ptr += dq_stride[1]
        dk_ptr += dk_stride[1]
        lse_ptr += queries


class Tiles(NamedTuple):
    """How rows of so many keys lie in registers."""

    config: LaunchConfig
    tail: int


def tiles(
    table: Mapping[tuple[int, ...], LaunchConfig], keys: int, columns: int, x: Tensor
) -> Tiles | None:
    """The tile of keys and its tail, or None where a row does not fit.

    float32 has no tensor cores, without which products of whole rows take too many registers.
    """
    if x.dtype == torch.float32:
        return None
    major = launch.capability(x)[0]
    for block in (64, 128, 256):
        key = 2, block, 64 if columns <= 64 else 128
        tail = TAIL if block == 64 and columns <= 64 else 0  # beside wider tiles it would spill
        if keys <= block + tail and launch.has(table, major, *key):
            chosen = launch.lookup(table, (major, 0), *key)
            if keys > block:
                return Tiles(chosen, TAIL)
            return Tiles(chosen._replace(block_n=max(16, power_of_2(keys))), 0)
    return None


def backward_tiles(queries: int, keys: int, columns: int, x: Tensor) -> Tiles | None:
    """The same for the backward pass, which holds all queries at once."""
    chosen = tiles(launch.PROBS_ROWS_BACKWARD, keys, columns, x)
    if chosen is None or queries > chosen.config.block_m + TAIL:
        return None
    return chosen


def _blocks(queries: int, keys: int, causal: bool, chosen: Tiles) -> dict[str, object]:
    """The constants of a launch that follow from sizes."""
    block_m = chosen.config.block_m
    row_tail = 0 < queries % block_m <= TAIL < block_m
    return {
        "ROWS_WHOLE": queries > 0 and queries % block_m == 0,
        "ROW_TAIL": row_tail and queries > block_m,
        "FIRST_ONLY": bool(
            chosen.tail and row_tail and causal and block_m <= chosen.config.block_n
            and block_m < queries <= block_m + TAIL
        ),
        "KEYS_WHOLE": keys >= chosen.config.block_n,
        "TAIL": chosen.tail,
    }  # fmt: skip


def residual(
    student: Model,
    teacher: Model,
    pairs: Counted,
    layers: Sequence[int],
    student_lses: Sequence[Tensor],
    teacher_lses: Sequence[Tensor],
    given: tuple[bool, bool],
    residuals: Sequence[Tensor],
    store: bool,
    chosen: Tiles,
) -> tuple[Tensor, Tensor]:
    """Losses and scales of layers of one form; with ``store`` fills residuals and, unless given,
    the students' log-sum-exp."""
    first = layers[0]
    x, y = student.q[first], teacher.q[first]
    dtype, acc = accumulator(x)
    (B, H, queries, d), keys = x.shape, student.k[first].shape[2]
    masked, causal, window = pairs.form(first)
    blocks = B * cdiv(queries, chosen.config.block_m) if keys else 0
    sums = x.new_empty(len(layers), blocks, dtype=dtype)
    counts = x.new_empty(len(layers), blocks, dtype=torch.int32) if masked else None
    if blocks:
        _rows_forward_kernel[(blocks, len(layers))](
            student.arguments(layers),
            teacher.arguments(layers),
            pairs.arguments(x, queries, keys, layers),
            pointers(student_lses, layers),
            pointers(teacher_lses, layers),
            pointers(residuals, layers),
            sums, sums if counts is None else counts,
            H, student.scale[first], y.shape[1], teacher.scale[first],
            queries, keys, residual_width(keys),
            MASKED=masked, CAUSAL=causal, STUDENT_GIVEN=given[0], TEACHER_GIVEN=given[1],
            STORE=store, SHIFT=shifts(x)[1],
            STUDENT_D=d, STUDENT_WIDTH=width(x), TEACHER_D=y.shape[3], TEACHER_WIDTH=width(y),
            ACC=acc, **_blocks(queries, keys, causal, chosen), **_options(chosen),
        )  # fmt: skip
    return total(sums, counts, 1 if masked else valid_count(x.shape, keys, causal, window))


def gradients(
    student: Model,
    pairs: Counted,
    layers: Sequence[int],
    lses: Sequence[Tensor],
    residuals: Sequence[Tensor],
    factor: Tensor,
    d_q: Mapping[int, Tensor],
    d_k: Mapping[int, Tensor],
    chosen: Tiles,
) -> None:
    """Fills d_q and d_k of layers of one form, all of whose queries are one block and its tail."""
    x = student.q[layers[0]]
    (B, H, queries, d), keys = x.shape, student.k[layers[0]].shape[2]
    masked, causal, _ = pairs.form(layers[0])
    forms = {i: (strides(d_q[i]), strides(d_k[i])) for i in layers}
    for (dq_stride, dk_stride), part in groups(forms):
        at_once = max(1, min(HEADS_AT_ONCE, B * H * len(part) // ENOUGH_PROGRAMS))
        programs = B * cdiv(H, at_once)
        if programs:
            p_shift, r_shift = shifts(x)[0], shifts(residuals[part[0]])[1]
            _rows_backward_kernel[(programs, len(part))](
                student.arguments(part),
                pairs.arguments(x, queries, keys, part),
                pointers(lses, part),
                pointers(residuals, part),
                pointers(d_q, part),
                pointers(d_k, part),
                of_layers(factor, part),
                H, student.scale[part[0]], queries, keys, residual_width(keys),
                dq_stride, dk_stride, at_once,
                MASKED=masked, CAUSAL=causal,
                P_SHIFT=p_shift, R_SHIFT=r_shift, D=d, WIDTH=width(x), ACC=accumulator(x)[1],
                **_blocks(queries, keys, causal, chosen), **_options(chosen),
            )  # fmt: skip


def _options(chosen: Tiles) -> dict[str, object]:
    return {k: v for k, v in launch.options(chosen.config).items() if k != "BLOCK_K"}
