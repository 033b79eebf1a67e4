"""Mean squared error of projected hidden states, for many layers of any shapes in one launch.

    E = M (Hs W - Ht)               Hs: [T, d_s], W: [d_s, d_t], Ht: [T, d_t]; M: which tokens count
    loss = sum E^2 / n              n = (tokens that count) * d_t; no token counts: 0
    dHs = (2 g / n) E W^T           g: upstream gradient of the layer's loss
    dW  = (2 g / n) Hs^T E

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

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .core import (
    MAX_LAYERS,
    accumulator,
    add_product,
    allow_scratch,
    describable,
    device_refusals,
    dtype_refusals,
    find,
    first_tiles,
    own,
    pad,
    pad_raw,
    parts,
    pick,
    pick_raw,
    total,
)
from .launch import LaunchConfig

MAX_STRIDE = 2**24  # a tile has at most 2**7 rows


@triton.jit
def _hidden_mse_fwd_kernel(
    s_ptrs,  # L x [T, D_S] students
    t_ptrs,  # L x [T, D_T] teachers
    w_ptrs,  # L x [D_S, D_T] projections, in the students' dtype
    m_ptrs,  # L x [T] bool, True where a token counts; unused without HAS_MASK
    e_ptrs,  # L x [T, D_T] out, contiguous; unused without STORE
    sum_ptr,  # [tiles] out: sum of E^2 over the tile
    count_ptr,  # [tiles] out, int32: tokens that count, once per row of tiles
    stride_st,  # L ints, as all below
    stride_tt,
    stride_wd,
    T,
    D_S,
    D_T,
    first,  # the layer's first tile
    HAS_MASK: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,  # accumulator dtype: float32, or float64 for float64
):
    tile = tl.program_id(0)
    layer = find(first, tile)
    tokens, d_t = pick(T, layer), pick_raw(D_T, layer)
    # columns fastest: the tiles of one block of tokens share its rows in L2, where W stays anyway
    across = tl.cdiv(d_t, BLOCK_N)
    local = tile - pick(first, layer)
    column = local % across
    # int64: T * d passes 2**31; offsets within a tile do not, and cost half the registers
    row = (local // across).to(tl.int64) * BLOCK_M
    col = column * BLOCK_N
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_counts, col_counts = m < tokens - row, n < d_t - col
    if HAS_MASK:
        row_counts &= tl.load(pick(m_ptrs, layer) + row + m, mask=row_counts, other=0) != 0
    counts = row_counts[:, None] & col_counts[None, :]
    stride_s, stride_t = pick_raw(stride_st, layer), pick_raw(stride_tt, layer)
    t_tile = pick(t_ptrs, layer) + row * stride_t + col + m[:, None] * stride_t + n[None, :]
    t = tl.load(t_tile, mask=counts, other=0.0)
    # the sum starts at -t: read at the end, t would take a third more registers on sm_90, and
    # with them the second program of a multiprocessor
    e = add_product(
        -t.to(ACC),
        pick(s_ptrs, layer) + row * stride_s,
        pick(w_ptrs, layer) + col,
        0,
        stride_s,
        1,
        0,
        pick_raw(stride_wd, layer),
        1,
        row_counts,
        col_counts,
        1,
        pick_raw(D_S, layer),
        BLOCK_K,
    )
    # other=0 is not enough: 0 * nan in W is nan
    e = tl.where(counts, e, 0.0)
    # both axes at once: one after the other, Triton 3.6 fails to compile it for sm_100
    tl.store(sum_ptr + tile, tl.sum(e * e))
    counted = tl.sum(row_counts.to(tl.int32), axis=0)
    tl.store(count_ptr + tile, tl.where(column == 0, counted, 0))
    if STORE:
        e_ptr = pick(e_ptrs, layer)
        e_tile = e_ptr + row * d_t + col + m[:, None] * d_t + n[None, :]
        inside = (m < tokens - row)[:, None] & col_counts[None, :]
        tl.store(e_tile, e.to(e_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_mse_fwd_tma_kernel(
    s_ptrs,  # as above: 2 bytes an element, rows at multiples of 16 bytes
    t_ptrs,
    w_ptrs,
    m_ptrs,
    e_ptrs,
    sum_ptr,
    count_ptr,
    stride_st,
    stride_tt,
    stride_wd,
    T,
    D_S,
    D_T,
    first,
    end,  # the tile after the layer's last
    HAS_MASK: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,  # parts in which the columns of t are read and those of e are stored
    ACC: tl.constexpr,
):
    """As above by persistent programs: loads run by themselves, and need no registers."""
    WIDTH: tl.constexpr = BLOCK_N // SPLIT
    program, programs = tl.program_id(0), tl.num_programs(0)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    for layer in range(len(T)):
        start, stop = own(pick(first, layer), program, programs), pick(end, layer)
        if start < stop:  # a descriptor costs about a microsecond
            tokens, d_s, d_t = pick(T, layer), pick_raw(D_S, layer), pick_raw(D_T, layer)
            stride_s, stride_t = pick_raw(stride_st, layer), pick_raw(stride_tt, layer)
            stride_w = pick_raw(stride_wd, layer)
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
            across = tl.cdiv(d_t, BLOCK_N)
            for tile in range(start, stop, programs):
                local = tile - pick(first, layer)
                row, col = local // across * BLOCK_M, local % across * BLOCK_N
                row_counts = m < tokens - row
                if HAS_MASK:
                    m_ptr = pick(m_ptrs, layer) + row.to(tl.int64)
                    row_counts &= tl.load(m_ptr + m, mask=row_counts, other=0) != 0
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
                for k in range(0, d_s, BLOCK_K):
                    acc = tl.dot(s.load([row, k]), w.load([k, col]), acc, out_dtype=ACC)
                square = tl.zeros((), dtype=ACC)
                part = parts(acc, SPLIT)
                for i in tl.static_range(SPLIT):
                    at = col + i * WIDTH
                    counts = row_counts[:, None] & (n < d_t - at)[None, :]
                    error = tl.where(counts, part[i] - t.load([row, at]).to(ACC), 0.0)
                    square += tl.sum(error * error)
                    if STORE:
                        e.store([row, at], error.to(e.dtype))
                tl.store(sum_ptr + tile, square)
                counted = tl.sum(row_counts.to(tl.int32), axis=0)
                tl.store(count_ptr + tile, tl.where(col == 0, counted, 0))


@triton.jit
def _hidden_mse_bwd_kernel(
    e_ptrs,  # L x [T, D_T] residuals, contiguous
    w_ptrs,  # L x [D_S, D_T] projections, in the students' dtype
    ds_ptrs,  # L x [T, D_S] out, contiguous
    factor_ptr,  # [P] 2 g / n of every layer of the call
    place,  # L ints, as all below: the layer's place in factor_ptr
    stride_wd,
    T,
    D_S,
    D_T,
    first,  # the layer's first tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    tile = tl.program_id(0)
    layer = find(first, tile)
    tokens, d_s, d_t = pick(T, layer), pick_raw(D_S, layer), pick_raw(D_T, layer)
    across = tl.cdiv(d_s, BLOCK_N)
    local = tile - pick(first, layer)
    row = (local // across).to(tl.int64) * BLOCK_M
    col = (local % across).to(tl.int64) * BLOCK_N
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside_rows, inside_cols = m < tokens - row, n < d_s - col
    stride_w = pick_raw(stride_wd, layer)
    acc = add_product(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC),
        pick(e_ptrs, layer) + row * d_t,
        pick(w_ptrs, layer) + col * stride_w,
        0,
        d_t,
        1,
        0,
        1,
        stride_w,
        inside_rows,
        inside_cols,
        1,
        d_t,
        BLOCK_K,
    )
    ds_ptr = pick(ds_ptrs, layer)
    ds = (acc * tl.load(factor_ptr + pick(place, layer))).to(ds_ptr.dtype.element_ty)
    ds_tile = ds_ptr + row * d_s + col + m[:, None] * d_s + n[None, :]
    tl.store(ds_tile, ds, mask=inside_rows[:, None] & inside_cols[None, :])


@triton.jit
def _hidden_mse_bwd_tma_kernel(
    e_ptrs,  # as above: 2 bytes an element, rows at multiples of 16 bytes
    w_ptrs,
    ds_ptrs,
    factor_ptr,
    place,
    stride_wd,
    T,
    D_S,
    D_T,
    first,
    end,  # the tile after the layer's last
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,  # parts in which the columns of ds are stored
    ACC: tl.constexpr,
):
    """As above by persistent programs."""
    WIDTH: tl.constexpr = BLOCK_N // SPLIT
    program, programs = tl.program_id(0), tl.num_programs(0)
    for layer in range(len(T)):
        start, stop = own(pick(first, layer), program, programs), pick(end, layer)
        if start < stop:
            tokens, d_s, d_t = pick(T, layer), pick_raw(D_S, layer), pick_raw(D_T, layer)
            e = tl.make_tensor_descriptor(
                pick(e_ptrs, layer), [tokens, d_t], [d_t, 1], [BLOCK_M, BLOCK_K]
            )
            stride_w = pick_raw(stride_wd, layer)
            w = tl.make_tensor_descriptor(
                pick(w_ptrs, layer), [d_s, d_t], [stride_w, 1], [BLOCK_N, BLOCK_K]
            )
            ds = tl.make_tensor_descriptor(
                pick(ds_ptrs, layer), [tokens, d_s], [d_s, 1], [BLOCK_M, WIDTH]
            )
            factor = tl.load(factor_ptr + pick(place, layer))
            across = tl.cdiv(d_s, BLOCK_N)
            for tile in range(start, stop, programs):
                local = tile - pick(first, layer)
                row, col = local // across * BLOCK_M, local % across * BLOCK_N
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
                for k in range(0, d_t, BLOCK_K):
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


def _config(
    table: dict[tuple[int, ...], LaunchConfig], x: Tensor, operands: Sequence[Tensor]
) -> LaunchConfig:
    """The table's entry for ``x``, by TMA only where that can address each of the operands."""
    capability = launch.capability(x)
    return launch.lookup(table, capability, x.element_size(), tma=describable(operands))


def _unit_stride(x: Tensor) -> Tensor:
    """Rows that lie so that offsets within a tile fit 32 bits; a copy if they do not."""
    return x if x.stride(-1) == 1 and x.stride(0) < MAX_STRIDE else x.contiguous()


def _sizes(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """T, d_s and d_t, each with an entry a layer."""
    layers = ((len(x), *w.shape) for x, w in zip(rows, weights, strict=True))
    return tuple(zip(*layers, strict=True))


def _strides(rows: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(x.stride(0) for x in rows)


def _tiles(rows: Sequence[int], cols: Sequence[int], config: LaunchConfig) -> tuple[int, ...]:
    """Where each layer's tiles start, and at the end their number."""
    return first_tiles(
        triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
        for m, n in zip(rows, cols, strict=True)
    )


def _projections(weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(_unit_stride(w.to(dtype)) for w in weights)


def hidden_mse_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    *,
    need_residual: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Losses of L layers, and what their backward needs.

    Args:
        students: L x ``[T, d_s]`` of one dtype. T, d_s and d_t may differ from layer to layer.
        teachers: L x ``[T, d_t]`` of one dtype.
        weights: L x ``[d_s, d_t]``, rounded to the students' dtype.
        masks: L x ``[T]`` bool, True where a token counts, or None where each does.
        need_residual: whether a gradient will be wanted.

    Returns:
        losses ``[L]`` and scales ``[L]`` (2 / n, n at least 1), float32 or float64; and
        between them the residuals, L x ``[T, d_t]`` in the students' dtype, or an empty list.
    """
    layers = len(students)
    if layers > MAX_LAYERS:
        lists = (students, teachers, weights, masks)
        head, tail = (
            hidden_mse_forward(*(x[part] for x in lists), need_residual=need_residual)  # type: ignore[arg-type]
            for part in (slice(MAX_LAYERS), slice(MAX_LAYERS, None))
        )
        return torch.cat([head[0], tail[0]]), head[1] + tail[1], torch.cat([head[2], tail[2]])
    s = tuple(_unit_stride(x) for x in students)
    t = tuple(_unit_stride(x) for x in teachers)
    w = _projections(weights, s[0].dtype)
    T, D_S, D_T = _sizes(s, w)
    has_mask = any(m is not None for m in masks)
    counted = s
    if has_mask:
        counted = tuple(
            x.new_ones(len(x), dtype=torch.bool) if m is None else m.contiguous()
            for x, m in zip(s, masks, strict=True)
        )
    e = tuple(s[0].new_empty(m, n) for m, n in zip(T, D_T, strict=True)) if need_residual else t
    torch_acc, acc = accumulator(s[0])
    config = _config(launch.HIDDEN_MSE_FORWARD, s[0], (*s, *t, *w, *e))
    first = _tiles(T, D_T, config)
    tiles = first[-1]
    sums = s[0].new_empty(tiles, dtype=torch_acc)
    counts = s[0].new_empty(tiles, dtype=torch.int32)
    with torch.cuda.device_of(s[0]):
        if tiles:
            kernel, ends = _hidden_mse_fwd_kernel, {}
            if config.programs:
                allow_scratch()
                kernel, ends = _hidden_mse_fwd_tma_kernel, {"end": pad(first[1:], tiles)}
            kernel[launch.grid(config, tiles, s[0])](
                pad(s),
                pad(t),
                pad(w),
                pad(counted),
                pad(e),
                sums,
                counts,
                pad_raw(_strides(s)),
                pad_raw(_strides(t)),
                pad_raw(_strides(w)),
                pad(T),
                pad_raw(D_S),
                pad_raw(D_T),
                pad(first[:-1], tiles),
                **ends,
                HAS_MASK=has_mask,
                STORE=need_residual,
                ACC=acc,
                **launch.options(config),
            )
        losses, scales = total(sums, counts, D_T, first)
    return losses, list(e) if need_residual else [], scales


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
    d_students: list[Tensor | None] = [None] * len(students)
    wanted = [i for i, need in enumerate(need_student) if need]
    for start in range(0, len(wanted), MAX_LAYERS):
        part = wanted[start : start + MAX_LAYERS]
        gradients = _student_gradients(part, weights, residuals, factor, dtype)
        for i, gradient in zip(part, gradients, strict=True):
            d_students[i] = gradient
    d_weights: list[Tensor | None] = [None] * len(students)
    for i, need in enumerate(need_weight):
        if need:
            gradient = _weight_gradient(students[i], masks[i], residuals[i], factor[i])
            d_weights[i] = gradient.to(weights[i].dtype if dtype is None else dtype)
    return d_students, d_weights


def _student_gradients(
    part: Sequence[int],
    weights: Sequence[Tensor],
    residuals: Sequence[Tensor],
    factor: Tensor,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """dHs of the layers of ``part``, in one launch."""
    e = tuple(residuals[i] for i in part)
    w = _projections([weights[i] for i in part], e[0].dtype)
    T, D_S, D_T = _sizes(e, w)
    dtype = e[0].dtype if dtype is None else dtype
    out = tuple(e[0].new_empty(m, n, dtype=dtype) for m, n in zip(T, D_S, strict=True))
    config = _config(launch.HIDDEN_MSE_BACKWARD, e[0], (*e, *w, *out))
    first = _tiles(T, D_S, config)
    tiles = first[-1]
    if tiles:
        with torch.cuda.device_of(e[0]):
            kernel, ends = _hidden_mse_bwd_kernel, {}
            if config.programs:
                allow_scratch()
                kernel, ends = _hidden_mse_bwd_tma_kernel, {"end": pad(first[1:], tiles)}
            kernel[launch.grid(config, tiles, e[0])](
                pad(e),
                pad(w),
                pad(out),
                factor,
                pad(part),
                pad_raw(_strides(w)),
                pad(T),
                pad_raw(D_S),
                pad_raw(D_T),
                pad(first[:-1], tiles),
                **ends,
                ACC=accumulator(e[0])[1],
                **launch.options(config),
            )
    return list(out)


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
