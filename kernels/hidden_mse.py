"""Squared error, smooth L1 or cosine of projected hidden states: layers of one form in one launch.

    E = M (Hs W - Ht)               Hs: [T, d_s], W: [d_s, d_t], Ht: [T, d_t]; M: which tokens count
    loss = sum E^2 / n              n = (tokens that count) * d_t; no token counts: 0
    dHs = (2 g / n) E W^T           g: upstream gradient of the layer's loss
    dW  = (2 g / n) Hs^T E

Smooth L1 with beta: the mean of E^2 / (2 beta) where |E| < beta, of |E| - beta / 2 elsewhere; half
its derivative, clamp(E / beta, -1, 1) / 2, then takes the place of E, and all else is the same.

The cosine, of the rows P = M Hs W and Ht: loss = sum (1 - cos) / n, n = tokens that count; half its
derivative, (cos P / |P|^2 - Ht / (|P| |Ht|)) / 2, takes the place of E. A row's lengths are known
only when all its columns are: the product stores P alone, in the students' dtype, and a second
launch reads rows of P and Ht, once from memory, and puts the derivative in P's place: 2 T d_t
elements more.

A token that does not count may hold nan or inf: its row of E and of dHs is exactly 0, and its row
of Hs never enters dW. E is stored in the students' dtype, and only when a gradient is wanted.

Bytes moved per layer, in elements: forward T (d_s + 2 d_t), or T (d_s + d_t) for the loss alone;
dHs T (d_t + d_s), dW T (d_s + d_t); W is small. FLOPs: 2 T d_s d_t for each of the three products.

The loss and dHs are Triton, so that the residual's square and the upstream scalar cost no pass over
memory. dW is cuBLAS's product with a float32 result: its long inner dimension needs split-K, which
cuBLAS chooses well, and scaling [d_s, d_t] is nearly free. float32 uses IEEE products in Triton and
what torch.backends.cuda.matmul says in dW. Products and sums are kept in float32, for float64 in
float64. There are no atomics: every sum has a fixed order and results are bit-reproducible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .core import (
    accumulator,
    add_product,
    allow_scratch,
    describable,
    device_refusals,
    dtype_refusals,
    own,
    parts,
)
from .launch import LaunchConfig
from .launcher import kernel
from .layers import cdiv, groups, in_order, of_layers, pick, pointers, total

COSINE_EPS = tl.constexpr(1e-8)  # the least length of a row, as PyTorch's
COSINE_TILE = {"BLOCK_M": 8, "BLOCK_N": 256}
MAX_STRIDE = 2**24  # a tile has at most 2**7 rows


@triton.jit
def _measured(e, beta, SMOOTH: tl.constexpr):
    """What a residual adds to the loss, and half of its derivative."""
    terms = e * e
    if SMOOTH:
        size = tl.abs(e)
        terms = tl.where(size < beta, terms / (2 * beta), size - beta / 2)
        e = tl.minimum(tl.maximum(e / beta, -1.0), 1.0) / 2
    return terms, e


@kernel(["tokens", "beta"])
def _hidden_forward_kernel(
    s_ptrs,  # [T, D_S] students, as all pointers one a layer
    t_ptrs,  # [T, D_T] teachers
    w_ptrs,  # [D_S, D_T] projections, in the students' dtype
    m_ptrs,  # [T] bool, True where a token counts; unused unless MASKED
    e_ptrs,  # [T, D_T] out, contiguous; unused without STORE
    sum_ptr,  # [L, tiles] out: sum of the measure of E over the tile; not of COSINE
    count_ptr,  # [L, tiles] int32 out: tokens that count, once per row of tiles; only if MASKED,
    # not of COSINE
    stride_s,
    stride_t,
    stride_w,
    tokens,
    d_s,
    d_t,
    beta,  # of smooth L1
    SMOOTH: tl.constexpr,
    COSINE: tl.constexpr,
    MASKED: tl.constexpr,
    WHOLE: tl.constexpr,  # sizes are multiples of the tile's
    STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,  # accumulator dtype: float32, or float64 for float64
):
    layer = tl.program_id(1)
    # columns fastest: the tiles of one block of tokens share its rows in L2, where W stays anyway
    tile, across = tl.program_id(0), tl.cdiv(d_t, BLOCK_N)
    column = tile % across
    # int64: T * d passes 2**31; offsets within a tile do not, and cost half the registers
    row, col = (tile // across).to(tl.int64) * BLOCK_M, column * BLOCK_N
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_rows, cols = m < tokens - row, n < d_t - col
    rows = in_rows
    if MASKED:
        rows &= tl.load(pick(m_ptrs, layer) + row + m, mask=in_rows, other=0) != 0
    start = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if not COSINE:
        t_tile = pick(t_ptrs, layer) + row * stride_t + col + m[:, None] * stride_t + n[None, :]
        if WHOLE and not MASKED:
            t = tl.load(t_tile)
        else:
            t = tl.load(t_tile, mask=rows[:, None] & cols[None, :], other=0.0)
        # the sum starts at -t: read at the end, t would take a third more registers
        start = -t.to(ACC)
    e = add_product(
        start, pick(s_ptrs, layer) + row * stride_s, pick(w_ptrs, layer) + col,
        0, stride_s, 1, 0, stride_w, 1, rows, cols, 1, 1, d_s, BLOCK_K, WHOLE and not MASKED,
    )  # fmt: skip
    if MASKED:
        e = tl.where(rows[:, None], e, 0.0)  # 0 * nan in W is nan
    if not COSINE:
        at = layer.to(tl.int64) * tl.num_programs(0) + tile
        if MASKED:
            counted = tl.sum(rows.to(tl.int32), axis=0)
            tl.store(count_ptr + at, tl.where(column == 0, counted, 0))
        terms, e = _measured(e, beta, SMOOTH)
        tl.store(sum_ptr + at, tl.sum(terms))
    if STORE:
        e_ptr = pick(e_ptrs, layer)
        e_tile = e_ptr + row * d_t + col + m[:, None] * d_t + n[None, :]
        e = e.to(e_ptr.dtype.element_ty)
        if WHOLE:
            tl.store(e_tile, e)
        else:
            tl.store(e_tile, e, mask=in_rows[:, None] & cols[None, :])


@kernel(["layers", "tokens", "beta"])
def _hidden_forward_tma_kernel(
    s_ptrs,  # as above: 2 bytes an element, rows at multiples of 16 bytes
    t_ptrs,
    w_ptrs,
    m_ptrs,
    e_ptrs,
    sum_ptr,
    count_ptr,
    stride_s,
    stride_t,
    stride_w,
    layers,  # how many there are: pointers are padded
    tokens,
    d_s,
    d_t,
    beta,
    SMOOTH: tl.constexpr,
    COSINE: tl.constexpr,
    MASKED: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,  # parts in which the columns of t are read and those of e are stored
    ACC: tl.constexpr,
):
    """As above by persistent programs: loads run by themselves, and need no registers.

    What lies outside reads as 0 and is not stored.
    """
    WIDTH: tl.constexpr = BLOCK_N // SPLIT
    program, programs = tl.program_id(0), tl.num_programs(0)
    across = tl.cdiv(d_t, BLOCK_N)
    tiles = tl.cdiv(tokens, BLOCK_M) * across
    m = tl.arange(0, BLOCK_M)
    for layer in range(layers):
        start = own(layer * tiles, program, programs) - layer * tiles
        if start < tiles:  # a descriptor costs about a microsecond
            s = tl.make_tensor_descriptor(
                pick(s_ptrs, layer), [tokens, d_s], [stride_s, 1], [BLOCK_M, BLOCK_K]
            )
            t = tl.make_tensor_descriptor(
                pick(t_ptrs, layer), [tokens, d_t], [stride_t, 1], [BLOCK_M, WIDTH]
            )
            w = tl.make_tensor_descriptor(
                pick(w_ptrs, layer), [d_s, d_t], [stride_w, 1], [BLOCK_K, BLOCK_N]
            )
            e = tl.make_tensor_descriptor(
                pick(e_ptrs, layer), [tokens, d_t], [d_t, 1], [BLOCK_M, WIDTH]
            )
            for tile in tl.range(start, tiles, programs):
                row, col = tile // across * BLOCK_M, tile % across * BLOCK_N
                at = tl.cast(layer, tl.int64) * tiles + tile
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
                for k in tl.range(0, d_s, BLOCK_K):
                    acc = tl.dot(s.load([row, k]), w.load([k, col]), acc, out_dtype=ACC)
                if MASKED:
                    m_ptr = pick(m_ptrs, layer) + row.to(tl.int64) + m
                    rows = tl.load(m_ptr, mask=m < tokens - row, other=0) != 0
                    if not COSINE:
                        counted = tl.sum(rows.to(tl.int32), axis=0)
                        tl.store(count_ptr + at, tl.where(col == 0, counted, 0))
                measure = tl.zeros((), dtype=ACC)
                part = parts(acc, SPLIT)
                for i in tl.static_range(SPLIT):
                    error = part[i]
                    if not COSINE:
                        error -= t.load([row, col + i * WIDTH]).to(ACC)
                    if MASKED:
                        error = tl.where(rows[:, None], error, 0.0)
                    if not COSINE:
                        terms, error = _measured(error, beta, SMOOTH)
                        measure += tl.sum(terms)
                    if STORE:
                        e.store([row, col + i * WIDTH], error.to(e.dtype))
                if not COSINE:
                    tl.store(sum_ptr + at, measure)


@kernel(["tokens"])
def _cosine_kernel(
    t_ptrs,  # [T, D_T] teachers, as all pointers one a layer
    m_ptrs,  # [T] bool, True where a token counts; unused unless MASKED
    e_ptrs,  # [T, D_T] in: P; out: half the derivative by P; unused without STORE
    sum_ptr,  # [L, tiles] out: sum of 1 - cos over the tile
    count_ptr,  # [L, tiles] int32 out: tokens that count; only if MASKED
    stride_t,
    tokens,
    d_t,
    MASKED: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    layer, tile = tl.program_id(1), tl.program_id(0)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row = tile.to(tl.int64) * BLOCK_M
    rows = m < tokens - row
    at = layer.to(tl.int64) * tl.num_programs(0) + tile
    if MASKED:
        rows &= tl.load(pick(m_ptrs, layer) + row + m, mask=rows, other=0) != 0
        tl.store(count_ptr + at, tl.sum(rows.to(tl.int32), axis=0))
    t_ptr = pick(t_ptrs, layer) + row * stride_t + m[:, None] * stride_t
    e_ptr = pick(e_ptrs, layer) + row * d_t + m[:, None] * d_t
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    ours, theirs = product, product
    for start in range(0, d_t, BLOCK_N):
        col = start + n[None, :]
        inside = rows[:, None] & (col < d_t)
        p = tl.load(e_ptr + col, mask=inside, other=0.0).to(ACC)
        t = tl.load(t_ptr + col, mask=inside, other=0.0).to(ACC)
        product += p * t
        ours += p * p
        theirs += t * t
    length = tl.sqrt(tl.sum(ours, axis=1))
    inverse = 1 / tl.maximum(length, COSINE_EPS)
    both = inverse / tl.maximum(tl.sqrt(tl.sum(theirs, axis=1)), COSINE_EPS)
    cosine = tl.sum(product, axis=1) * both
    tl.store(sum_ptr + at, tl.sum(tl.where(rows, 1 - cosine, 0.0)))
    if STORE:
        # below the least length the length is a constant
        along = tl.where(length < COSINE_EPS, 0.0, cosine * inverse * inverse)
        for start in range(0, d_t, BLOCK_N):
            col = start + n[None, :]
            inside = rows[:, None] & (col < d_t)
            p = tl.load(e_ptr + col, mask=inside, other=0.0).to(ACC)
            t = tl.load(t_ptr + col, mask=inside, other=0.0).to(ACC)
            e = (along[:, None] * p - both[:, None] * t) / 2
            tl.store(e_ptr + col, e.to(e_ptr.dtype.element_ty), mask=inside)


@kernel(["tokens"])
def _hidden_backward_kernel(
    e_ptrs,  # [T, D_T] residuals, contiguous, as all pointers one a layer
    w_ptrs,  # [D_S, D_T] projections, in the students' dtype
    ds_ptrs,  # [T, D_S] out, contiguous
    factor_ptr,  # [L]: 2 g / n
    stride_w,
    tokens,
    d_s,
    d_t,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(1)
    tile, across = tl.program_id(0), tl.cdiv(d_s, BLOCK_N)
    row, col = (tile // across).to(tl.int64) * BLOCK_M, (tile % across).to(tl.int64) * BLOCK_N
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows, cols = m < tokens - row, n < d_s - col
    acc = add_product(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC),
        pick(e_ptrs, layer) + row * d_t, pick(w_ptrs, layer) + col * stride_w,
        0, d_t, 1, 0, 1, stride_w, rows, cols, 1, 1, d_t, BLOCK_K, WHOLE,
    )  # fmt: skip
    ds_ptr = pick(ds_ptrs, layer)
    ds = (acc * tl.load(factor_ptr + layer)).to(ds_ptr.dtype.element_ty)
    ds_tile = ds_ptr + row * d_s + col + m[:, None] * d_s + n[None, :]
    tl.store(ds_tile, ds, mask=rows[:, None] & cols[None, :])


@kernel(["layers", "tokens"])
def _hidden_backward_tma_kernel(
    e_ptrs,  # as above: 2 bytes an element, rows at multiples of 16 bytes
    w_ptrs,
    ds_ptrs,
    factor_ptr,
    stride_w,
    layers,
    tokens,
    d_s,
    d_t,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,  # parts in which the columns of ds are stored
    ACC: tl.constexpr,
):
    """As above by persistent programs."""
    WIDTH: tl.constexpr = BLOCK_N // SPLIT
    program, programs = tl.program_id(0), tl.num_programs(0)
    across = tl.cdiv(d_s, BLOCK_N)
    tiles = tl.cdiv(tokens, BLOCK_M) * across
    for layer in range(layers):
        start = own(layer * tiles, program, programs) - layer * tiles
        if start < tiles:
            e = tl.make_tensor_descriptor(
                pick(e_ptrs, layer), [tokens, d_t], [d_t, 1], [BLOCK_M, BLOCK_K]
            )
            w = tl.make_tensor_descriptor(
                pick(w_ptrs, layer), [d_s, d_t], [stride_w, 1], [BLOCK_N, BLOCK_K]
            )
            ds = tl.make_tensor_descriptor(
                pick(ds_ptrs, layer), [tokens, d_s], [d_s, 1], [BLOCK_M, WIDTH]
            )
            factor = tl.load(factor_ptr + layer)
            for tile in tl.range(start, tiles, programs):
                row, col = tile // across * BLOCK_M, tile % across * BLOCK_N
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
                for k in tl.range(0, d_t, BLOCK_K):
                    acc = tl.dot(e.load([row, k]), w.load([col, k]).T, acc, out_dtype=ACC)
                part = parts(acc, SPLIT)
                for i in tl.static_range(SPLIT):
                    ds.store([row, col + i * WIDTH], (part[i] * factor).to(ds.dtype))


def not_served(
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[str]:
    """Each reason why these kernels cannot take the inputs; empty if they can."""
    reasons = device_refusals((*students, *teachers, *weights))
    return reasons + dtype_refusals("students", students) + dtype_refusals("teachers", teachers)


def _config(x: Tensor, operands: Sequence[Tensor]) -> LaunchConfig:
    """The table's entry for ``x``, by TMA only where that can address each of the operands."""
    capability = launch.capability(x)
    itemsize = min(4, x.element_size())  # float64 takes float32's
    return launch.lookup(launch.PRODUCT, capability, itemsize, tma=describable(operands))


def _unit_stride(x: Tensor) -> Tensor:
    """Rows that lie so that offsets within a tile fit 32 bits; a copy if they do not."""
    return x if x.stride(-1) == 1 and x.stride(0) < MAX_STRIDE else x.contiguous()


def _projections(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [_unit_stride(w.to(dtype)) for w in weights]


def hidden_mse_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    *,
    measure: str = "mse",
    beta: float = 1.0,
    need_residual: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Losses of L layers, and what their backward needs.

    Args:
        students: L x ``[T, d_s]`` of one dtype. T, d_s and d_t may differ from layer to layer.
        teachers: L x ``[T, d_t]`` of one dtype.
        weights: L x ``[d_s, d_t]``, rounded to the students' dtype.
        masks: L x ``[T]`` bool, True where a token counts, or None where each does.
        measure: ``"mse"``, ``"smooth_l1"`` or ``"cosine"``.
        beta: of smooth L1, above 0.
        need_residual: whether a gradient will be wanted.

    Returns:
        losses ``[L]`` and scales ``[L]`` (2 / n, n at least 1), float32 or float64; and
        between them the residuals, L x ``[T, d_t]`` in the students' dtype, or an empty list.
    """
    s, t = [_unit_stride(x) for x in students], [_unit_stride(x) for x in teachers]
    w = _projections(weights, s[0].dtype)
    store = need_residual or measure == "cosine"
    e = [x.new_empty(len(x), y.shape[1]) if store else y for x, y in zip(s, w, strict=True)]
    forms = {
        i: (len(s[i]), w[i].shape, *(x[i].stride(0) for x in (s, t, w)), masks[i] is not None)
        for i in range(len(s))
    }
    losses: dict[int, Tensor] = {}
    scales: dict[int, Tensor] = {}
    with torch.cuda.device_of(s[0]):
        launches = groups(forms)
        for _, part in launches:
            found = _residuals(part, s, t, w, masks, e, measure, beta, need_residual)
            losses.update(zip(part, found[0], strict=True))
            scales.update(zip(part, found[1], strict=True))
    if len(launches) > 1:
        found = in_order(losses), in_order(scales)
    return found[0], e if need_residual else [], found[1]


def _residuals(
    part: Sequence[int],
    s: Sequence[Tensor],
    t: Sequence[Tensor],
    w: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    e: Sequence[Tensor],
    measure: str,
    beta: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Losses and scales of layers of one form; fills their residuals where one has room."""
    first = part[0]
    cosine = measure == "cosine"
    store = gradient or cosine
    x, (tokens, (d_s, d_t)) = s[first], (len(s[first]), w[first].shape)
    dtype, acc = accumulator(x)
    config = _config(x, [y[i] for y in ((s, t, w, e) if store else (s, t, w)) for i in part])
    m, n = config.block_m, config.block_n
    tiles = cdiv(tokens, m) * cdiv(d_t, n)
    masked = masks[first] is not None
    sums = x.new_empty(len(part), tiles, dtype=dtype)
    counts = x.new_empty(len(part), tiles, dtype=torch.int32) if masked else None
    if tiles:
        given = [mask.contiguous() for i in part if (mask := masks[i]) is not None] or [x]
        every = (
            pointers(s, part), pointers(t, part), pointers(w, part),
            pointers(given, range(len(given))), pointers(e, part),
            sums, sums if counts is None else counts,
            x.stride(0), t[first].stride(0), w[first].stride(0),
        )  # fmt: skip
        flags = {"MASKED": masked, "STORE": store, "ACC": acc, "COSINE": cosine}
        flags |= {"SMOOTH": measure == "smooth_l1", **launch.options(config)}
        sizes = (tokens, d_s, d_t, beta)
        if config.programs:
            allow_scratch()
            grid = launch.persistent(config, tiles * len(part), x)
            _hidden_forward_tma_kernel[grid](*every, len(part), *sizes, **flags)
        else:
            whole = not (tokens % m or d_t % n or d_s % config.block_k)
            _hidden_forward_kernel[(tiles, len(part))](*every, *sizes, WHOLE=whole, **flags)
    if cosine:
        return _cosines(part, t, masks, e, gradient)
    return total(sums, counts, d_t if masked else tokens * d_t)


def _cosines(
    part: Sequence[int],
    t: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    e: Sequence[Tensor],
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Losses and scales of projected states; makes of these half the derivative by them."""
    first = part[0]
    x, (tokens, d_t) = e[first], t[first].shape
    dtype, acc = accumulator(x)
    tiles = cdiv(tokens, COSINE_TILE["BLOCK_M"])
    sums = x.new_empty(len(part), tiles, dtype=dtype)
    masked = masks[first] is not None
    counts = x.new_empty(len(part), tiles, dtype=torch.int32) if masked else None
    if tiles:
        given = [mask.contiguous() for i in part if (mask := masks[i]) is not None] or [x]
        _cosine_kernel[(tiles, len(part))](
            pointers(t, part), pointers(given, range(len(given))), pointers(e, part),
            sums, sums if counts is None else counts, t[first].stride(0), tokens, d_t,
            MASKED=masked, STORE=gradient, ACC=acc, **COSINE_TILE, num_warps=4, num_stages=2,
            enable_fp_fusion=True,
        )  # fmt: skip
    return total(sums, counts, 1 if masked else tokens)


def hidden_mse_backward(
    grad: Tensor,
    students: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    residuals: Sequence[Tensor],
    scales: Tensor,
    *,
    need_student: Sequence[bool],
    need_weight: Sequence[bool],
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of L layers from what the forward kept, which is only read.

    Args:
        grad: ``[L]``, the upstream gradient; read on the device.
        students, weights, masks: as given to ``hidden_mse_forward``.
        residuals, scales: as it returned them.
        need_student, need_weight: L flags: which gradients to compute.
        dtype: of the gradients, each input's own by default. A unit gradient (``grad`` of ones, to
            be scaled later) of float16 inputs underflows in float16.

    Returns:
        dHs, L x ``[T, d_s]``, and dW, L x ``[d_s, d_t]``; None where none was asked for.
    """
    factor = (grad * scales).to(scales.dtype).contiguous()
    w = _projections(weights, residuals[0].dtype)
    d_students: dict[int, Tensor] = {
        i: e.new_empty(len(e), w[i].shape[0], dtype=e.dtype if dtype is None else dtype)
        for i, e in enumerate(residuals)
        if need_student[i]
    }
    forms = {i: (len(residuals[i]), w[i].shape, w[i].stride(0)) for i in d_students}
    with torch.cuda.device_of(residuals[0]):
        for _, part in groups(forms):
            _student_gradients(part, w, residuals, of_layers(factor, part), d_students)
    d_weights: list[Tensor | None] = [None] * len(students)
    for i, need in enumerate(need_weight):
        if need:
            gradient = _weight_gradient(students[i], masks[i], residuals[i], factor[i])
            d_weights[i] = gradient.to(weights[i].dtype if dtype is None else dtype)
    return [d_students.get(i) for i in range(len(students))], d_weights


def _student_gradients(
    part: Sequence[int],
    w: Sequence[Tensor],
    e: Sequence[Tensor],
    factor: Tensor,
    out: Mapping[int, Tensor],
) -> None:
    """dHs of layers of one form, in one launch."""
    first = part[0]
    x, (tokens, (d_s, d_t)) = e[first], (len(e[first]), w[first].shape)
    config = _config(x, [y[i] for y in (e, w, out) for i in part])
    tiles = cdiv(tokens, config.block_m) * cdiv(d_s, config.block_n)
    if not tiles:
        return
    every = (pointers(e, part), pointers(w, part), pointers(out, part), factor, w[first].stride(0))
    flags = {"ACC": accumulator(x)[1], **launch.options(config)}
    if config.programs:
        allow_scratch()
        grid = launch.persistent(config, tiles * len(part), x)
        _hidden_backward_tma_kernel[grid](*every, len(part), tokens, d_s, d_t, **flags)
    else:
        whole = not (tokens % config.block_m or d_s % config.block_n or d_t % config.block_k)
        _hidden_backward_kernel[(tiles, len(part))](*every, tokens, d_s, d_t, WHOLE=whole, **flags)


def _weight_gradient(
    student: Tensor, mask: Tensor | None, residual: Tensor, factor: Tensor
) -> Tensor:
    """dW, [d_s, d_t] in the accumulator's dtype."""
    if mask is not None:
        # the residual's rows are 0 there, but 0 * nan is nan
        student = torch.where(mask[:, None], student, 0)
    acc = factor.dtype
    with torch.autocast(student.device.type, enabled=False):
        if student.dtype == acc:
            product = torch.mm(student.t(), residual)
        elif student.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
            product = torch.mm(student.t(), residual, out_dtype=acc)
        else:
            product = torch.mm(student.t().to(acc), residual.to(acc))
    return product * factor
