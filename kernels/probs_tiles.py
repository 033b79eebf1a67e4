"""What the kernels of head-averaged attention maps share: their arguments, their loads, Q K^T."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .core import pick

LOG2E = tl.constexpr(1.4426950408889634)


class Heads(NamedTuple):
    """The queries and keys of one model. Each field has an entry a layer, the strides one a dim."""

    q: Any  # pointers, [B, H, Nq, d]
    k: Any  # pointers, [B, H, Nk, d]
    q_strides: Any  # of B, H and Nq in units: see load_rows
    k_strides: Any
    heads: Any
    units: Any  # d in units
    scale: Any


class Pairs(NamedTuple):
    """Which pairs there are and which of them count, an entry a layer."""

    queries: Any
    keys: Any
    causal: Any  # 0 or 1, as all flags
    query_mask: Any  # pointers, [B, Nq] bool; unused without the flag
    key_mask: Any
    has_query_mask: Any
    has_key_mask: Any


@triton.jit
def counts(
    masks, flags, layer, item, start, length, end, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr
):
    """[BLOCK] bool: which positions from ``start`` on lie before ``end`` and are not masked."""
    n = tl.arange(0, BLOCK)
    inside = n < end - start
    if HAS_MASK:
        mask = pick(masks, layer) + item.to(tl.int64) * length + start
        given = n < (end - start) * pick(flags, layer)
        inside &= tl.load(mask + n, mask=given, other=1) != 0
    return inside


@triton.jit
def count_queries(pairs, layer, item, start, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    queries = pick(pairs.queries, layer)
    return counts(
        pairs.query_mask,
        pairs.has_query_mask,
        layer,
        item,
        start,
        queries,
        queries,
        HAS_MASK,
        BLOCK,
    )


@triton.jit
def count_keys(pairs, layer, item, start, end, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    keys = pick(pairs.keys, layer)
    return counts(
        pairs.key_mask, pairs.has_key_mask, layer, item, start, keys, end, HAS_MASK, BLOCK
    )


@triton.jit
def valid_pairs(rows, cols, row, col, causal):
    """[M, N] bool, from which of the queries at ``row`` and the keys at ``col`` on count."""
    i, j = row + tl.arange(0, rows.shape[0]), col + tl.arange(0, cols.shape[0])
    return rows[:, None] & cols[None, :] & (i[:, None] >= j[None, :] * causal)


@triton.jit
def keys_seen(rows, row, causal, keys):
    """Up to where a block of queries sees keys: nowhere if none of them counts."""
    last = tl.max(tl.where(rows, row + tl.arange(0, rows.shape[0]), -1), axis=0)
    return tl.where(causal != 0, tl.minimum(last + 1, keys), tl.where(last >= 0, keys, 0))


@triton.jit
def seen_from(cols, col, causal, queries):
    """From where on queries see a block of keys: nowhere if none of them counts."""
    never = 2147483647
    first = tl.min(tl.where(cols, col + tl.arange(0, cols.shape[0]), never), axis=0)
    return tl.where(causal != 0, first, tl.where(first < never, 0, queries))


@triton.jit
def place(pointers, strides, layer, item, head, row, UNIT: tl.constexpr):
    """Where a head's row is; int64: B * H * N * d passes 2**31, offsets within a tile do not."""
    offset = pick(strides[0], layer).to(tl.int64) * item
    offset += pick(strides[1], layer).to(tl.int64) * head
    offset += pick(strides[2], layer).to(tl.int64) * row
    return pick(pointers, layer) + offset * UNIT


@triton.jit
def load_rows(
    ptr, stride, inside, units, START: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr
):
    """[BLOCK, WIDTH] of a head: zeros outside.

    Strides and d come in units of 8 elements where all are multiples of it, so that the compiler
    knows that 16 bytes at a time are aligned.
    """
    n, e = tl.arange(0, inside.shape[0]), START + tl.arange(0, WIDTH)
    mask = inside[:, None] & (e < units * UNIT)[None, :]
    return tl.load(ptr + n[:, None] * (stride * UNIT) + e[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, values, stride, inside, units, UNIT: tl.constexpr):
    n, e = tl.arange(0, values.shape[0]), tl.arange(0, values.shape[1])
    mask = inside[:, None] & (e < units * UNIT)[None, :]
    values = values.to(ptr.dtype.element_ty)
    tl.store(ptr + n[:, None] * (stride * UNIT) + e[None, :], values, mask=mask)


@triton.jit
def products(
    q,  # [M, WIDTH], the tile at q_ptr
    k,  # [N, WIDTH], the tile at k_ptr
    q_ptr,
    k_ptr,
    stride_q,
    stride_k,
    rows,  # [M] bool: which to load
    cols,  # [N] bool
    units,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
):
    """q k^T, in chunks where whole rows take too many registers: float32, without tensor cores."""
    if CHUNK >= WIDTH:
        s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC)
    else:
        s = tl.zeros((rows.shape[0], cols.shape[0]), ACC)
        for start in tl.static_range(0, WIDTH, CHUNK):
            a = load_rows(q_ptr, stride_q, rows, units, start, CHUNK, UNIT)
            b = load_rows(k_ptr, stride_k, cols, units, start, CHUNK, UNIT)
            s = tl.dot(a, tl.trans(b), s, input_precision="ieee", out_dtype=ACC)
    return s


@triton.jit
def load_residual(ptr, stride, row, col, queries, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N] of one item's residual, whose rows are padded with zeros."""
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    tile = ptr + (stride.to(tl.int64) * row * 16 + col) + m[:, None] * (stride * 16) + n[None, :]
    mask = (m < queries - row)[:, None] & (n < stride * 16 - col)[None, :]
    return tl.load(tile, mask=mask, other=0.0)


@triton.jit
def store_residual(ptr, values, stride, row, col, queries, SHIFT: tl.constexpr):
    m, n = tl.arange(0, values.shape[0]), tl.arange(0, values.shape[1])
    tile = ptr + (stride.to(tl.int64) * row * 16 + col) + m[:, None] * (stride * 16) + n[None, :]
    mask = (m < queries - row)[:, None] & (n < stride * 16 - col)[None, :]
    tl.store(tile, (values * 2.0**SHIFT).to(ptr.dtype.element_ty), mask=mask)
