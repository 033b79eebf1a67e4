"""Mean squared error of head-averaged attention scores, for many layers of any shapes.

    R = V (a_s sum_h Qs_h Ks_h^T - a_t sum_h Qt_h Kt_h^T)    a = scale / heads, V: the valid pairs
    loss = sum R^2 / n              n = valid pairs; none: 0
    dQs_h = (2 g a_s / n) R Ks_h    g: upstream gradient of the layer's loss
    dKs_h = (2 g a_s / n) R^T Qs_h

Q: [B, H, Nq, d], K: [B, H, Nk, d]; heads and head sizes may differ between the models. A pair is
valid where the query counts, the key counts and causality lets the one see the other. The sum over
heads is an inner dimension of the product, so that R is one product a model, whatever the number of
heads: where a token's heads lie side by side, H heads of d are one of H d. A query or key without a
valid pair may hold nan or inf. R is stored in the student's dtype, and only when a gradient is
wanted, its rows padded to 16 elements with zeros, so that they are read 16 bytes at a time.

Per layer, with D = H d: bytes moved, in elements: forward B (Nq + Nk) (D_s + D_t) + B Nq Nk, the
last for R; dQ B (Nq Nk + Nk D_s + Nq D_s), dK alike. FLOPs: 2 B Nq Nk (D_s + D_t) forward and
2 B Nq Nk D_s for either gradient; half if causal: tiles without a valid pair do no products.

The gradients are Triton: what cuBLAS returns would need another pass for the upstream scalar, and
float32 or an overflow for float16, and it cannot keep nan out of its products. float32 uses IEEE
products. Products and sums are kept in float32, for float64 in float64. There are no atomics: every
sum has a fixed order and results are bit-reproducible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .attention_tiles import (
    Counted,
    Model,
    counted,
    first_seen,
    in_reach,
    is_dense,
    place,
    placed,
    residual_width,
    strides,
    valid_count,
    valid_pairs,
)
from .core import accumulator, add_product, device_refusals, dtype_refusals
from .launch import LaunchConfig
from .launcher import kernel
from .layers import cdiv, groups, in_order, of_layers, pick, pointers, total


@triton.jit
def _add_scores(
    acc, model, layer, item, row, col, rows, cols, heads, width,
    BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """acc + a tile of the sum of Q K^T over one model's heads."""
    q_ptr = place(pick(model.q, layer), model.q_stride, item, 0, row)
    k_ptr = place(pick(model.k, layer), model.k_stride, item, 0, col)
    return add_product(
        acc, q_ptr, k_ptr, model.q_stride[1], model.q_stride[2], 1, model.k_stride[1], 1,
        model.k_stride[2], rows, cols, heads, model.share, width, BLOCK_K, WHOLE,
    )  # fmt: skip


@kernel([
    "student_heads", "student_of", "student_scale", "teacher_heads", "teacher_of", "teacher_scale",
    "queries", "keys",
])  # fmt: skip
def _scores_forward_kernel(
    student,  # Heads
    teacher,
    masks,  # Masks
    r_ptrs,  # [B, Nq, stride_r] out; unused without STORE
    sum_ptr,  # [L, tiles] out: sum of R^2 over the tile
    count_ptr,  # [L, tiles] int32 out: valid pairs; unused unless MASKED
    student_heads,  # as they lie in memory: all side by side are one
    student_of,  # how many the mean is over
    student_width,
    student_scale,
    teacher_heads,
    teacher_of,
    teacher_width,
    teacher_scale,
    queries,
    keys,
    stride_r,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    WHOLE: tl.constexpr,  # sizes are multiples of the tile's
    STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,  # accumulator dtype: float32, or float64 for float64
):
    layer = tl.program_id(1)
    # keys fastest: the tiles of one block of queries share its rows in L2
    tile, across, down = tl.program_id(0), tl.cdiv(keys, BLOCK_N), tl.cdiv(queries, BLOCK_M)
    row, col = tile // across % down * BLOCK_M, tile % across * BLOCK_N
    item = tile // (across * down)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_rows, in_cols = m < queries - row, n < keys - col
    if CAUSAL or WINDOW:  # a tile without a valid pair has no heads to sum over
        live = in_reach(placed(masks, row), col, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
        student_heads, teacher_heads = student_heads * live, teacher_heads * live
    # R = (T ratio + S) scale, so that one accumulator serves both; where the student's scale is 0,
    # (T ratio) 1
    scale = tl.cast(student_scale, ACC) / student_of
    off = scale == 0
    scale = tl.where(off, 1.0, scale)
    ratio = -tl.cast(teacher_scale, ACC) / teacher_of / scale
    student_heads = tl.where(off, 0, student_heads)
    # what does not count is set to 0 at the end: a row that holds nan spoils no other
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    acc = _add_scores(
        acc, teacher, layer, item, row, col, in_rows, in_cols, teacher_heads, teacher_width,
        BLOCK_K, WHOLE,
    )  # fmt: skip
    acc = _add_scores(
        acc * ratio, student, layer, item, row, col, in_rows, in_cols, student_heads,
        student_width, BLOCK_K, WHOLE,
    )  # fmt: skip
    r = acc * scale
    at = layer.to(tl.int64) * tl.num_programs(0) + tile
    if MASKED or CAUSAL or WINDOW:
        rows = counted(pick(masks.query, layer), item, row, queries, MASKED, BLOCK_M)
        cols = counted(pick(masks.key, layer), item, col, keys, MASKED, BLOCK_N)
        valid = valid_pairs(rows, cols, placed(masks, row), col, CAUSAL, WINDOW)
        r = tl.where(valid, r, 0.0)
        if MASKED:
            tl.store(count_ptr + at, tl.sum(valid.to(tl.int32)))
    tl.store(sum_ptr + at, tl.sum(r * r))
    if STORE:
        r_ptr = pick(r_ptrs, layer) + (item.to(tl.int64) * queries + row) * stride_r + col
        r_tile = r_ptr + m[:, None] * stride_r + n[None, :]
        inside = in_rows[:, None] & (n < stride_r - col)[None, :]
        tl.store(r_tile, r.to(r_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _counts(ptr, at, length, MASKED: tl.constexpr):
    """Which places count: inside, and the mask is True."""
    inside = at < length
    if MASKED:
        inside &= tl.load(ptr + at, mask=inside, other=0) != 0
    return inside


@triton.jit
def _extent(ptr, length, BLOCK: tl.constexpr):
    """The first place that counts and the one after the last; (length, 0) where none does."""
    low, high = length, length * 0
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counts = _counts(ptr, at, length, True)
        low = tl.minimum(low, tl.min(tl.where(counts, at, length), axis=0))
        high = tl.maximum(high, tl.max(tl.where(counts, at + 1, 0), axis=0))
    return low, high


@kernel(["heads", "of", "scale", "queries", "keys"])
def _scores_backward_kernel(
    r_ptrs,  # [B, Nq, stride_r]
    x_ptrs,  # [B, H, Nk, D] keys; TRANSPOSED: [B, H share, Nq, D] queries
    masks,  # Masks
    dx_ptrs,  # [B, H, Nq, D] out: of the queries; TRANSPOSED: [B, H, Nk, D] of the keys
    factor_ptr,  # [L]: 2 g / n
    x_stride,  # of B, H and N
    dx_stride,
    heads,
    share,  # heads of x for each of dx, which are summed
    of,
    width,
    scale,
    queries,
    keys,
    stride_r,
    TRANSPOSED: tl.constexpr,  # R^T Q rather than R K
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(1)
    length = keys if TRANSPOSED else queries
    # columns, then heads fastest: they share the rows of R in L2
    tile, across, down = tl.program_id(0), tl.cdiv(width, BLOCK_N), tl.cdiv(length, BLOCK_M)
    col, head = tile % across * BLOCK_N, tile // across % heads
    row, item = tile // (across * heads) % down * BLOCK_M, tile // (across * heads * down)
    q_mask = pick(masks.query, layer) + item.to(tl.int64) * queries
    k_mask = pick(masks.key, layer) + item.to(tl.int64) * keys
    # the inner rows that can have a valid pair; what else they hold must not enter the product
    at = row  # its place among them
    if TRANSPOSED:
        if masks.first is not None:
            at -= masks.first
        low, high = row * 0, queries
        if CAUSAL:
            low = tl.maximum(at, 0)
        if MASKED:
            first_key, end_key = _extent(k_mask, keys, BLOCK_K * 8)
            if CAUSAL:
                low = tl.maximum(low, at - row + first_key)
            high = tl.where(end_key == 0, 0, high)
    else:
        at = placed(masks, row)
        low, high = row * 0, keys
        if CAUSAL:
            high = tl.minimum(tl.minimum(high, placed(masks, queries)), at + BLOCK_M)
        if MASKED:
            _, end_query = _extent(q_mask, queries, BLOCK_K * 8)
            if CAUSAL:
                high = tl.minimum(high, placed(masks, end_query))
            high = tl.where(end_query == 0, 0, high)
    if WINDOW:
        low = tl.maximum(low, first_seen(at, WINDOW, BLOCK_K))
        high = tl.minimum(high, at + BLOCK_M + (WINDOW - 1))
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_rows, in_cols = m < length - row, n < width - col
    r_ptr = pick(r_ptrs, layer) + item.to(tl.int64) * queries * stride_r
    stride_x = x_stride[2]
    x_tile = k[:, None] * stride_x + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for of_head in tl.range(head * share, (head + 1) * share):
        x_ptr = place(pick(x_ptrs, layer), x_stride, item, of_head, 0) + col
        for start in tl.range(low, high, BLOCK_K):
            inner = start + k
            if TRANSPOSED:
                r_tile = r_ptr + tl.cast(start, tl.int64) * stride_r + row
                r_tile += k[:, None] * stride_r + m[None, :]
                r_mask = (inner < high)[:, None] & (m < stride_r - row)[None, :]
            else:
                r_tile = r_ptr + tl.cast(row, tl.int64) * stride_r + start
                r_tile += m[:, None] * stride_r + k[None, :]
                r_mask = in_rows[:, None] & (k < stride_r - start)[None, :]
            x_at = x_ptr + tl.cast(start, tl.int64) * stride_x + x_tile
            if WHOLE:
                r, x = tl.load(r_tile), tl.load(x_at)
            else:
                r = tl.load(r_tile, mask=r_mask, other=0.0)
                counts = _counts(q_mask if TRANSPOSED else k_mask, inner, high, MASKED)
                x = tl.load(x_at, mask=counts[:, None] & in_cols[None, :], other=0.0)
            if TRANSPOSED:
                r = tl.trans(r)
            acc = tl.dot(r, x, acc, input_precision="ieee", out_dtype=ACC)
    factor = tl.load(factor_ptr + layer) * tl.cast(scale, ACC) / of
    dx_ptr = place(pick(dx_ptrs, layer), dx_stride, item, head, row) + col
    dx_tile = dx_ptr + m[:, None] * dx_stride[2] + n[None, :]
    inside = in_rows[:, None] & in_cols[None, :]
    acc *= factor
    if TRANSPOSED and masks.first is not None:  # what the strips before this one found is there
        acc += tl.load(dx_tile, mask=inside, other=0.0)
    tl.store(dx_tile, acc.to(dx_ptr.dtype.element_ty), mask=inside)


def not_served(
    student_q: Sequence[Tensor],
    student_k: Sequence[Tensor],
    teacher_q: Sequence[Tensor],
    teacher_k: Sequence[Tensor],
) -> list[str]:
    """Each reason why these kernels cannot take the inputs; empty if they can."""
    student, teacher = (*student_q, *student_k), (*teacher_q, *teacher_k)
    reasons = device_refusals((*student, *teacher))
    return reasons + dtype_refusals("students", student) + dtype_refusals("teachers", teacher)


def attention_scores_forward(
    student_q: Sequence[Tensor],
    student_k: Sequence[Tensor],
    teacher_q: Sequence[Tensor],
    teacher_k: Sequence[Tensor],
    query_masks: Sequence[Tensor | None],
    key_masks: Sequence[Tensor | None],
    *,
    causal: Sequence[bool],
    window: Sequence[int] | None = None,
    student_scale: Sequence[float],
    teacher_scale: Sequence[float],
    need_residual: bool,
    first: int | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Losses of L layers, and what their backward needs.

    Args:
        student_q, student_k: L x ``[B, H, Nq, d]`` and ``[B, G, Nk, d]`` of one dtype; head h of q
            takes head ``h // (H / G)`` of k. All sizes may differ from layer to layer.
        teacher_q, teacher_k: likewise of one dtype, with heads and head sizes of their own.
        query_masks: L x ``[B, Nq]`` bool, True where a query counts, or None where each does.
        key_masks: L x ``[B, Nk]``, likewise.
        causal: L flags: whether a query sees no key after its own place.
        window: L numbers: a query sees keys less than so many places from it; 0: each.
        student_scale, teacher_scale: L factors of the scores.
        need_residual: whether a gradient will be wanted.
        first: of a strip, as for ``attention_probs_forward``.

    Returns:
        losses ``[L]`` and scales ``[L]`` (2 / n, n at least 1), float32 or float64; and between
        them the residuals as ``empty_residual`` makes them, or an empty list.
    """
    L = len(student_q)
    student = _joined(Model.of(student_q, student_k, student_scale))
    teacher = _joined(Model.of(teacher_q, teacher_k, teacher_scale))
    pairs = Counted.of(query_masks, key_masks, causal, window, first)
    r = [empty_residual(q, k) for q, k in zip(student_q, student_k, strict=True) if need_residual]
    of = [(q.shape[1], t.shape[1]) for q, t in zip(student_q, teacher_q, strict=True)]
    forms = {i: (student.form(i), teacher.form(i), pairs.form(i), of[i]) for i in range(L)}
    losses: dict[int, Tensor] = {}
    scales: dict[int, Tensor] = {}
    with torch.cuda.device_of(student_q[0]):
        launches = groups(forms)
        for _, part in launches:
            found = _residuals(part, student, teacher, pairs, of[part[0]], r or student.q)
            losses.update(zip(part, found[0], strict=True))
            scales.update(zip(part, found[1], strict=True))
    if len(launches) > 1:
        found = in_order(losses), in_order(scales)
    return found[0], r, found[1]


def _residuals(
    part: Sequence[int],
    student: Model,
    teacher: Model,
    pairs: Counted,
    of: tuple[int, int],
    r: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Losses and scales of layers of one form; fills their residuals if there are any."""
    x, y, store = student.q[part[0]], teacher.q[part[0]], r is not student.q
    dtype, acc = accumulator(x)
    (B, heads, queries, d), keys = x.shape, student.k[part[0]].shape[2]
    masked, causal, window = pairs.form(part[0])
    config = _config(launch.SCORES_FORWARD, x, max(queries, keys))
    m, n, step = config.block_m, config.block_n, config.block_k
    tiles = B * cdiv(queries, m) * cdiv(keys, n)
    sums = x.new_empty(len(part), tiles, dtype=dtype)
    counts = x.new_empty(len(part), tiles, dtype=torch.int32) if masked else None
    if tiles:
        _scores_forward_kernel[(tiles, len(part))](
            student.arguments(part), teacher.arguments(part),
            pairs.arguments(x, queries, keys, part), pointers(r, part),
            sums, sums if counts is None else counts,
            heads, of[0], d, student.scale[part[0]],
            y.shape[1], of[1], y.shape[3], teacher.scale[part[0]],
            queries, keys, residual_width(keys),
            MASKED=masked, CAUSAL=causal, WINDOW=window, STORE=store,
            WHOLE=not (queries % m or keys % n or d % step or y.shape[3] % step),
            ACC=acc, **launch.options(config),
        )  # fmt: skip
    return total(sums, counts, 1 if masked else valid_count(x.shape, keys, causal, window))


def _join(x: Tensor) -> Tensor:
    """Heads of a token that lie side by side, as one head: no copy."""
    return x.transpose(1, 2).flatten(2)[:, None]


def _side_by_side(x: Tensor, y: Tensor) -> bool:
    """Whether both have the same heads, each token's side by side."""
    same = x.shape[1] == y.shape[1] > 1
    return same and all(z.stride(1) == z.shape[3] for z in (x, y))


def _joined(model: Model) -> Model:
    """The sum over heads is an inner dimension: where they lie side by side there is but one."""
    q, k = list(model.q), list(model.k)
    for i, both in enumerate(zip(model.q, model.k, strict=True)):
        if _side_by_side(*both):
            q[i], k[i] = map(_join, both)
    return Model(q, k, model.scale)


def _config(table: Mapping[tuple[int, ...], LaunchConfig], x: Tensor, size: int) -> LaunchConfig:
    itemsize = min(4, x.element_size())  # float64 takes float32's
    return launch.lookup(table, launch.capability(x), itemsize, 64 if size <= 64 else 128)


def empty_residual(query: Tensor, key: Tensor) -> Tensor:
    """Room for a residual, ``[B, Nq, Nk]``: a view of rows padded to a multiple of 16 elements."""
    (B, _, Nq, _), Nk = query.shape, key.shape[2]
    return query.new_empty(B, Nq, residual_width(Nk))[..., :Nk]


def _padded(residual: Tensor) -> Tensor:
    """A residual whose rows are padded: a copy if something has copied it since."""
    (_, Nq, Nk), row = residual.shape, residual_width(residual.shape[2])
    if residual.stride() == (Nq * row, row, 1):
        return residual
    return torch.nn.functional.pad(residual, (0, row - Nk))


def attention_scores_backward(
    grad: Tensor,
    student_q: Sequence[Tensor],
    student_k: Sequence[Tensor],
    query_masks: Sequence[Tensor | None],
    key_masks: Sequence[Tensor | None],
    residuals: Sequence[Tensor],
    scales: Tensor,
    *,
    causal: Sequence[bool],
    window: Sequence[int] | None = None,
    student_scale: Sequence[float],
    need_q: Sequence[bool],
    need_k: Sequence[bool],
    dtype: torch.dtype | None = None,
    first: int | None = None,
    sums: Sequence[Tensor] = (),
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of L layers from what the forward kept, which is only read.

    Args:
        grad: ``[L]``, the upstream gradient; read on the device.
        student_q, student_k, query_masks, key_masks, causal, window, student_scale: as given to
            ``attention_scores_forward``.
        residuals, scales: as it returned them.
        need_q, need_k: L flags: which gradients to compute.
        dtype: of the gradients, each input's own by default.
        first, sums: of a strip, as for ``attention_probs_backward``.

    Returns:
        dQ, L x ``[B, H, Nq, d]``, and dK, L x ``[B, H, Nk, d]``, laid out as ``torch.empty_like``
        of their input; None where none was asked for.
    """
    factor = (grad * scales).to(scales.dtype).contiguous()
    pairs = Counted.of(query_masks, key_masks, causal, window, first)
    r = [_padded(x) for x in residuals]
    results: list[list[Tensor | None]] = []
    # the mean is over the queries' heads
    of = [q.shape[1] for q in student_q]
    with torch.cuda.device_of(student_q[0]):
        for outer, inner, need in (
            (student_q, student_k, need_q),
            (student_k, student_q, need_k),
        ):
            if sums and outer is student_k:
                out = dict(enumerate(sums))
            else:
                out = {i: torch.empty_like(x, dtype=dtype) for i, x in enumerate(outer) if need[i]}
            _gradients(out, inner, pairs, r, factor, student_scale, of, outer is student_k)
            results.append([out.get(i) for i in range(len(outer))])
    return results[0], results[1]


def _gradients(
    out: Mapping[int, Tensor],
    inner: Sequence[Tensor],
    pairs: Counted,
    r: Sequence[Tensor],
    factor: Tensor,
    scale: Sequence[float],
    of: Sequence[int],
    transposed: bool,
) -> None:
    """Fills ``out``: R times ``inner``, or R^T times it.

    Heads of ``out`` that share a head of ``inner`` have one gradient, which is copied; those of
    ``inner`` that share a head of ``out`` are summed.
    """
    x: dict[int, Tensor] = {}
    dx: dict[int, Tensor] = {}
    # kernels read and write rows that are dense, in a copy where they are not
    written = {
        i: y
        if is_dense(y) and y.shape[1] <= inner[i].shape[1]
        else y.new_empty(y.shape[0], min(y.shape[1], inner[i].shape[1]), *y.shape[2:])
        for i, y in out.items()
    }
    for i, y in written.items():
        x[i] = inner[i] if is_dense(inner[i]) else inner[i].contiguous()
        joined = _side_by_side(x[i], y)
        x[i], dx[i] = (_join(x[i]), _join(y)) if joined else (x[i], y)
    forms = {
        i: (y.shape, strides(y), x[i].shape[1:3], strides(x[i]), of[i], scale[i], pairs.form(i))
        for i, y in dx.items()
    }
    for (shape, dx_stride, (of_heads, others), x_stride, mean_of, c, form), part in groups(forms):
        B, heads, length, d = shape
        masked, causal, window = form
        like = r[part[0]]
        config = _config(launch.SCORES_BACKWARD, like, d)
        m, n, step = config.block_m, config.block_n, config.block_k
        tiles = B * heads * cdiv(length, m) * cdiv(d, n)
        queries, keys = (others, length) if transposed else (length, others)
        if tiles:
            _scores_backward_kernel[(tiles, len(part))](
                pointers(r, part), pointers(x, part), pairs.arguments(like, queries, keys, part),
                pointers(dx, part), of_layers(factor, part), x_stride, dx_stride,
                heads, of_heads // heads, mean_of, d, c, queries, keys, residual_width(keys),
                TRANSPOSED=transposed, MASKED=masked, CAUSAL=causal, WINDOW=window,
                WHOLE=not (masked or causal or window or length % m or d % n or others % step),
                ACC=accumulator(like)[1], **launch.options(config),
            )  # fmt: skip
    for i, y in written.items():
        if y is not out[i]:
            out[i].unflatten(1, (y.shape[1], -1)).copy_(y[:, :, None])
