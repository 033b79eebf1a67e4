"""The kernels of attention_scores.py, which says what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

from .core import add_product, find, of_bits, pick, pick_raw


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
def attention_scores_fwd_kernel(
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
    acc *= of_bits(pick_raw(ratio, layer), ACC)
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
    r = tl.where(valid, acc * of_bits(pick_raw(scale, layer), ACC), 0.0)
    tl.store(sum_ptr + tile, tl.sum(r * r))
    if STORE:
        r_ptr = pick(r_ptrs, layer)
        r_tile = r_ptr + (item * n_q + row) * n_p + col + m[:, None] * n_p + n[None, :]
        inside = in_rows[:, None] & (n < n_p - col)[None, :]
        tl.store(r_tile, r.to(r_ptr.dtype.element_ty), mask=inside)


@triton.jit
def attention_scores_bwd_kernel(
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
    factor = tl.load(factor_ptr + pick(place, layer)) * of_bits(pick_raw(scale, layer), ACC)
    dx_ptr = pick(dx_ptrs, layer)
    stride_dx = pick_raw(stride_dxn, layer)
    dx_ptr += item * pick_raw(stride_dxb, layer) + head * pick_raw(stride_dxh, layer)
    dx_tile = dx_ptr + row.to(tl.int64) * stride_dx + col + m[:, None] * stride_dx + n[None, :]
    inside = (m < n_out - row)[:, None] & in_cols[None, :]
    tl.store(dx_tile, (acc * factor).to(dx_ptr.dtype.element_ty), mask=inside)
