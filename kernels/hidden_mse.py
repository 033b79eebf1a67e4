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
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

# a launch passes some 100 bytes a layer, and a kernel's arguments have 4 KB
MAX_LAYERS = 32
TOTAL_BLOCK = 1024
MAX_STRIDE = 2**24  # a tile has at most 2**7 rows


@triton.jit
def _pick(values, layer):
    """values[layer] of a tuple, for a layer known only on the device."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(layer >= i, values[i], chosen)
    return chosen


@triton.jit
def _find(first, tile):
    """The layer that a tile belongs to: the last that starts no later; layers may be empty."""
    layer = tile * 0
    for i in tl.static_range(1, len(first)):
        layer += (tile >= first[i]).to(tl.int32)
    return layer


@triton.jit
def _add_product(
    acc,  # [BLOCK_M, BLOCK_N]
    a_ptr,  # [M, K], inner stride 1
    b_ptr,  # [K, N]
    stride_am,
    stride_bk,
    stride_bn,
    row_counts,  # [BLOCK_M] bool: False reads as 0
    col_counts,  # [BLOCK_N] bool
    K,
    BLOCK_K: tl.constexpr,
):
    """acc + the first tile of A B, with zeros for the rows and columns that do not count."""
    k = tl.arange(0, BLOCK_K)
    m, n = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1])
    a_ptrs = a_ptr + m[:, None] * stride_am + k[None, :]
    b_ptrs = b_ptr + k[:, None] * stride_bk + n[None, :] * stride_bn
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        a = tl.load(a_ptrs, mask=row_counts[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=inside[:, None] & col_counts[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_bk
    return acc


@triton.jit(do_not_specialize=["T", "first"])
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
    layer = _find(first, tile)
    tokens, d_t = _pick(T, layer), _pick(D_T, layer)
    # columns fastest: the tiles of one block of tokens share its rows in L2, where W stays anyway
    across = tl.cdiv(d_t, BLOCK_N)
    local = tile - _pick(first, layer)
    column = local % across
    # int64: T * d passes 2**31; offsets within a tile do not, and cost half the registers
    row = (local // across).to(tl.int64) * BLOCK_M
    col = column * BLOCK_N
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_counts, col_counts = m < tokens - row, n < d_t - col
    if HAS_MASK:
        row_counts &= tl.load(_pick(m_ptrs, layer) + row + m, mask=row_counts, other=0) != 0
    counts = row_counts[:, None] & col_counts[None, :]
    stride_s, stride_t = _pick(stride_st, layer), _pick(stride_tt, layer)
    t_tile = _pick(t_ptrs, layer) + row * stride_t + col + m[:, None] * stride_t + n[None, :]
    t = tl.load(t_tile, mask=counts, other=0.0)
    # the sum starts at -t: read at the end, t would take a third more registers on sm_90, and
    # with them the second program of a multiprocessor
    e = _add_product(
        -t.to(ACC),
        _pick(s_ptrs, layer) + row * stride_s,
        _pick(w_ptrs, layer) + col,
        stride_s,
        _pick(stride_wd, layer),
        1,
        row_counts,
        col_counts,
        _pick(D_S, layer),
        BLOCK_K,
    )
    # other=0 is not enough: 0 * nan in W is nan
    e = tl.where(counts, e, 0.0)
    # both axes at once: one after the other, Triton 3.6 fails to compile it for sm_100
    tl.store(sum_ptr + tile, tl.sum(e * e))
    counted = tl.sum(row_counts.to(tl.int32), axis=0)
    tl.store(count_ptr + tile, tl.where(column == 0, counted, 0))
    if STORE:
        e_ptr = _pick(e_ptrs, layer)
        e_tile = e_ptr + row * d_t + col + m[:, None] * d_t + n[None, :]
        inside = (m < tokens - row)[:, None] & col_counts[None, :]
        tl.store(e_tile, e.to(e_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first"])
def _hidden_mse_total_kernel(
    sum_ptr,  # [tiles]
    count_ptr,  # [tiles] int32
    loss_ptr,  # [L] out
    scale_ptr,  # [L] out: 2 / n
    D_T,  # L ints
    first,  # L + 1 ints: the layer's first tile, and the number of tiles
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(0)
    end = _pick(first, layer + 1)
    total = tl.zeros((BLOCK,), dtype=ACC)
    counted = tl.zeros((BLOCK,), dtype=tl.int64)
    for start in range(_pick(first, layer), end, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        total += tl.load(sum_ptr + tiles, mask=tiles < end, other=0.0)
        counted += tl.load(count_ptr + tiles, mask=tiles < end, other=0)
    # where nothing counts the sum is 0 already
    n = tl.maximum(tl.sum(counted, axis=0) * _pick(D_T, layer), 1).to(ACC)
    tl.store(loss_ptr + layer, tl.sum(total, axis=0) / n)
    tl.store(scale_ptr + layer, 2.0 / n)


@triton.jit(do_not_specialize=["T", "first"])
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
    layer = _find(first, tile)
    tokens, d_s, d_t = _pick(T, layer), _pick(D_S, layer), _pick(D_T, layer)
    across = tl.cdiv(d_s, BLOCK_N)
    local = tile - _pick(first, layer)
    row = (local // across).to(tl.int64) * BLOCK_M
    col = (local % across).to(tl.int64) * BLOCK_N
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside_rows, inside_cols = m < tokens - row, n < d_s - col
    stride_w = _pick(stride_wd, layer)
    acc = _add_product(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC),
        _pick(e_ptrs, layer) + row * d_t,
        _pick(w_ptrs, layer) + col * stride_w,
        d_t,
        1,
        stride_w,
        inside_rows,
        inside_cols,
        d_t,
        BLOCK_K,
    )
    ds_ptr = _pick(ds_ptrs, layer)
    ds = (acc * tl.load(factor_ptr + _pick(place, layer))).to(ds_ptr.dtype.element_ty)
    ds_tile = ds_ptr + row * d_s + col + m[:, None] * d_s + n[None, :]
    tl.store(ds_tile, ds, mask=inside_rows[:, None] & inside_cols[None, :])


class LaunchConfig(NamedTuple):
    """Tile sizes and the compiler's options of a product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# (compute capability's major number, bytes an element). Chosen from registers, spills and shared
# memory as compiled ahead of time, which tests/kernels/test_resources.py repeats; not timed yet.
# Two programs fit on a multiprocessor, so that one's epilogue hides under the other's products.
LAUNCH_TABLE = {
    (8, 2): LaunchConfig(128, 128, 32, 4, 4),
    (9, 2): LaunchConfig(128, 128, 64, 8, 3),
    (10, 2): LaunchConfig(128, 128, 64, 8, 3),
    (8, 4): LaunchConfig(64, 64, 16, 4, 3),
    # from 64 rows on, Triton 3.6 takes float32 to tensor cores although IEEE products are asked for
    (10, 4): LaunchConfig(32, 128, 16, 4, 3),
    (8, 8): LaunchConfig(32, 32, 16, 4, 2),
}


def launch_config(capability: tuple[int, int], itemsize: int) -> LaunchConfig:
    """The entry of the newest architecture in the table that is no newer than this one.

    Consumer chips of 12.x have the shared memory of 8.x rather than of 10.x.
    """
    major = 8 if capability[0] >= 12 else capability[0]
    return LAUNCH_TABLE[max(key for key in LAUNCH_TABLE if key[1] == itemsize and key[0] <= major)]


INTERPRETED = not isinstance(_hidden_mse_fwd_kernel, JITFunction)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def not_served(
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[str]:
    """Each reason why these kernels cannot take the inputs; empty if they can."""
    reasons = []
    devices = sorted({str(x.device) for x in (*students, *teachers, *weights)})
    device = students[0].device
    if len(devices) > 1:
        reasons.append(f"all tensors must be on one device, got {', '.join(devices)}")
    elif device.type != "cuda" and not INTERPRETED:
        reasons.append(f"the device must be CUDA, got {device}, and TRITON_INTERPRET is not set")
    elif device.type == "cuda" and torch.version.hip is not None:
        reasons.append("the device must be NVIDIA's, got a ROCm build of PyTorch")
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        reasons.append(f"compute capability must be at least 8.0, got {major}.{minor}")
    for name, tensors in (("students", students), ("teachers", teachers)):
        dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in tensors})
        if len(dtypes) > 1:
            reasons.append(f"{name} must have one dtype, got {', '.join(dtypes)}")
    found = {x.dtype for x in (*students, *teachers, *weights)}
    for dtype in found - set(DTYPES):
        reasons.append(f"dtypes must be float16, bfloat16, float32 or float64, got {dtype}")
    if torch.float64 in found and len(found) > 1:
        reasons.append("float64 cannot be mixed with other dtypes")
    if torch.float64 in found and not INTERPRETED:
        reasons.append(
            "float64 runs in the interpreter only: Triton 3.6 cannot compile its products"
        )
    if torch.bfloat16 in found and INTERPRETED:
        reasons.append("the interpreter computes bfloat16 products wrongly; use float16 or float32")
    return reasons


def _accumulator(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    wide = x.dtype == torch.float64
    return (torch.float64, tl.float64) if wide else (torch.float32, tl.float32)


def _config(x: Tensor) -> LaunchConfig:
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    return launch_config(capability, x.element_size())


def _unit_stride(x: Tensor) -> Tensor:
    """Rows that lie so that offsets within a tile fit 32 bits; a copy if they do not."""
    return x if x.stride(-1) == 1 and x.stride(0) < MAX_STRIDE else x.contiguous()


def _sizes(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """T, d_s and d_t, each with an entry a layer."""
    layers = ((len(x), *w.shape) for x, w in zip(rows, weights, strict=True))
    return tuple(zip(*layers, strict=True))


def _strides(rows: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(x.stride(0) for x in rows)


def _first_tiles(rows: Sequence[int], cols: Sequence[int], config: LaunchConfig) -> tuple[int, ...]:
    """Where each layer's tiles start, and at the end their number."""
    tiles = (
        triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
        for m, n in zip(rows, cols, strict=True)
    )
    return (0, *accumulate(tiles))


def _projections(weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(_unit_stride(w.to(dtype)) for w in weights)


def _options(config: LaunchConfig) -> dict[str, object]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


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
    torch_acc, acc = _accumulator(s[0])
    config = _config(s[0])
    first = _first_tiles(T, D_T, config)
    tiles = first[-1]
    sums = s[0].new_empty(tiles, dtype=torch_acc)
    counts = s[0].new_empty(tiles, dtype=torch.int32)
    losses, scales = (s[0].new_empty(layers, dtype=torch_acc) for _ in range(2))
    with torch.cuda.device_of(s[0]):
        if tiles:
            _hidden_mse_fwd_kernel[(tiles,)](
                s,
                t,
                w,
                counted,
                e,
                sums,
                counts,
                _strides(s),
                _strides(t),
                _strides(w),
                T,
                D_S,
                D_T,
                first[:-1],
                HAS_MASK=has_mask,
                STORE=need_residual,
                ACC=acc,
                **_options(config),
            )
        _hidden_mse_total_kernel[(layers,)](
            sums, counts, losses, scales, D_T, first, BLOCK=TOTAL_BLOCK, ACC=acc
        )
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
    config = _config(e[0])
    first = _first_tiles(T, D_S, config)
    if first[-1]:
        with torch.cuda.device_of(e[0]):
            _hidden_mse_bwd_kernel[(first[-1],)](
                e,
                w,
                out,
                factor,
                tuple(part),
                _strides(w),
                T,
                D_S,
                D_T,
                first[:-1],
                ACC=_accumulator(e[0])[1],
                **_options(config),
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
