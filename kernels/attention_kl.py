"""Divergence of each head's attention from the teacher's, for many layers of any shapes.

    P_h = softmax_j(s Q_h K_h^T)        over the keys that count; s: the model's scale
    loss = sum_h,i KL(P_h^t || P_h^s) / (n H)      n: queries that count and see a key; none: 0
    dS_h = (g / (n H)) (P_h^s - P_h^t)             g: upstream gradient of the loss
    dQ_h = s dS_h K_h,  dK_h = s dS_h^T Q_h

Both models have H heads; keys may be shared by heads of queries, in each model by its own number.
What does not count may hold nan or inf: it changes no value and no gradient.

  log-sum-exp  as in ``probs_sweeps.py``, of each model; skipped where its attention gave it
  loss         2 products and 1 exponential a pair and head
  dQ, dK       3 products and 2 exponentials each
Nothing of a map's size is kept: backward sees both models again, a tile at a time. Bytes: Q and K
of both models each time a tile needs them, from L2; two log-sum-exps a query and head are kept.

Products and sums are kept in float32, for float64 in float64; float32 inputs have IEEE products.
There are no atomics: every sum has a fixed order and results are bit-reproducible.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .attention_probs import log_sums_in_powers_of_two, not_served
from .attention_tiles import (
    LOG2E,
    Counted,
    Model,
    config,
    counted,
    first_seen,
    is_dense,
    keys_seen,
    load_rows,
    log_sums,
    place,
    products,
    shifts,
    store_rows,
    strides,
    valid_pairs,
    width,
)
from .core import accumulator
from .launcher import kernel
from .layers import cdiv, groups, in_order, of_layers, pick, pointers, settle

__all__ = ["attention_kl_backward", "attention_kl_forward", "not_served"]

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _keys(model, layer, item, head, col, cols, WIDTH: tl.constexpr, D: tl.constexpr):
    """A tile of the keys that a head of queries takes, and where it is."""
    ptr = place(pick(model.k, layer), model.k_stride, item, head // model.share, col)
    return load_rows(ptr, model.k_stride[2], cols, 0, WIDTH, D, False), ptr


@triton.jit
def _queries(model, layer, item, head, row, rows, WIDTH: tl.constexpr, D: tl.constexpr):
    ptr = place(pick(model.q, layer), model.q_stride, item, head, row)
    return load_rows(ptr, model.q_stride[2], rows, 0, WIDTH, D, False), ptr


@triton.jit
def _logs(
    model, q, k, q_ptr, k_ptr, rows, cols, scale, lse,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[M, N], the logarithms of a map in powers of two; pairs that do not count get anything."""
    s = products(
        q, k, q_ptr, k_ptr, model.q_stride[2], model.k_stride[2], rows, cols, WIDTH, CHUNK, D, ACC
    )
    return s * (tl.cast(scale, ACC) * LOG2E) - lse[:, None]


@kernel(["heads", "student_scale", "teacher_scale", "queries", "keys"])
def _kl_forward_kernel(
    student,  # Heads
    teacher,
    masks,  # Masks
    student_lse,  # [B, H, Nq]
    teacher_lse,
    sum_ptr,  # [L, tiles] out: the divergence of the tile's rows
    heads,
    student_scale,
    teacher_scale,
    queries,
    keys,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    STUDENT_D: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_D: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(1)
    # query blocks fastest: those of one head share its keys in L2
    tile, blocks = tl.program_id(0), tl.cdiv(queries, BLOCK_M)
    row, head, item = tile % blocks * BLOCK_M, tile // blocks % heads, tile // blocks // heads
    rows = counted(pick(masks.query, layer), item, row, queries, MASKED, BLOCK_M)
    end = keys_seen(rows, row, keys, CAUSAL, WINDOW)
    at = (item.to(tl.int64) * heads + head) * queries + row
    t_lse, _ = log_sums(pick(teacher_lse, layer) + at, rows, 0, MASKED)
    s_lse, rows = log_sums(pick(student_lse, layer) + at, rows, 0, MASKED)
    s_q, s_q_ptr = _queries(student, layer, item, head, row, rows, STUDENT_WIDTH, STUDENT_D)
    t_q, t_q_ptr = _queries(teacher, layer, item, head, row, rows, TEACHER_WIDTH, TEACHER_D)
    key_mask = pick(masks.key, layer)
    total = tl.zeros((BLOCK_M,), ACC)
    for col in tl.range(first_seen(row, WINDOW, BLOCK_N), end, BLOCK_N):
        cols = counted(key_mask, item, col, keys, MASKED, BLOCK_N)
        s_k, s_k_ptr = _keys(student, layer, item, head, col, cols, STUDENT_WIDTH, STUDENT_D)
        t_k, t_k_ptr = _keys(teacher, layer, item, head, col, cols, TEACHER_WIDTH, TEACHER_D)
        s = _logs(
            student, s_q, s_k, s_q_ptr, s_k_ptr, rows, cols, student_scale, s_lse,
            STUDENT_WIDTH, BLOCK_K, STUDENT_D, ACC,
        )  # fmt: skip
        t = _logs(
            teacher, t_q, t_k, t_q_ptr, t_k_ptr, rows, cols, teacher_scale, t_lse,
            TEACHER_WIDTH, BLOCK_K, TEACHER_D, ACC,
        )  # fmt: skip
        valid = valid_pairs(rows, cols, row, col, CAUSAL, WINDOW)
        # before the arithmetic: a key that does not count may hold nan or inf
        difference = tl.where(valid, t - s, 0.0)
        total += tl.sum(tl.where(valid, tl.exp2(t), 0.0) * difference, axis=1)
    at = layer.to(tl.int64) * tl.num_programs(0) + tile
    tl.store(sum_ptr + at, tl.sum(total) * LN2)


@kernel(["heads", "student_scale", "teacher_scale", "queries", "keys"])
def _kl_dq_kernel(
    student,  # Heads
    teacher,
    masks,  # Masks
    student_lse,  # [B, H, Nq]
    teacher_lse,
    dq_ptrs,  # [B, H, Nq, D] out
    factor_ptr,  # [L]: g / n
    heads,
    student_scale,
    teacher_scale,
    queries,
    keys,
    dq_stride,  # of B, H and Nq
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SETTLE: tl.constexpr,
    SHIFT: tl.constexpr,
    STUDENT_D: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_D: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(1)
    tile, blocks = tl.program_id(0), tl.cdiv(queries, BLOCK_M)
    row, head, item = tile % blocks * BLOCK_M, tile // blocks % heads, tile // blocks // heads
    inside = tl.arange(0, BLOCK_M) < queries - row
    rows = counted(pick(masks.query, layer), item, row, queries, MASKED, BLOCK_M)
    end = keys_seen(rows, row, keys, CAUSAL, WINDOW)
    at = (item.to(tl.int64) * heads + head) * queries + row
    t_lse, _ = log_sums(pick(teacher_lse, layer) + at, rows, SHIFT, MASKED)
    s_lse, rows = log_sums(pick(student_lse, layer) + at, rows, SHIFT, MASKED)
    s_q, s_q_ptr = _queries(student, layer, item, head, row, rows, STUDENT_WIDTH, STUDENT_D)
    t_q, t_q_ptr = _queries(teacher, layer, item, head, row, rows, TEACHER_WIDTH, TEACHER_D)
    key_mask = pick(masks.key, layer)
    dq = tl.zeros((BLOCK_M, STUDENT_WIDTH), ACC)
    for col in tl.range(first_seen(row, WINDOW, BLOCK_N), end, BLOCK_N):
        # a key that no query of the block sees reads as 0: it may hold nan, and 0 * nan is nan
        cols = counted(key_mask, item, col, keys, MASKED, BLOCK_N)
        cols &= tl.arange(0, BLOCK_N) < end - col
        s_k, s_k_ptr = _keys(student, layer, item, head, col, cols, STUDENT_WIDTH, STUDENT_D)
        t_k, t_k_ptr = _keys(teacher, layer, item, head, col, cols, TEACHER_WIDTH, TEACHER_D)
        s = _logs(
            student, s_q, s_k, s_q_ptr, s_k_ptr, rows, cols, student_scale, s_lse,
            STUDENT_WIDTH, BLOCK_K, STUDENT_D, ACC,
        )  # fmt: skip
        t = _logs(
            teacher, t_q, t_k, t_q_ptr, t_k_ptr, rows, cols, teacher_scale, t_lse,
            TEACHER_WIDTH, BLOCK_K, TEACHER_D, ACC,
        )  # fmt: skip
        valid = valid_pairs(rows, cols, row, col, CAUSAL, WINDOW)
        ds = tl.where(valid, tl.exp2(s) - tl.exp2(t), 0.0).to(s_k.dtype)
        dq = settle(tl.dot(ds, s_k, dq, input_precision="ieee", out_dtype=ACC), SETTLE)
    alpha = tl.load(factor_ptr + layer) * tl.cast(student_scale, ACC) / heads * 2.0**-SHIFT
    dq_ptr = place(pick(dq_ptrs, layer), dq_stride, item, head, row)
    store_rows(dq_ptr, alpha * dq, dq_stride[2], inside, STUDENT_D)


@kernel(["heads", "student_scale", "teacher_scale", "queries", "keys"])
def _kl_dk_kernel(
    student,  # Heads
    teacher,
    masks,  # Masks
    student_lse,  # [B, H, Nq]
    teacher_lse,
    dk_ptrs,  # [B, H / share, Nk, D] out
    factor_ptr,  # [L]: g / n
    heads,
    student_scale,
    teacher_scale,
    queries,
    keys,
    dk_stride,  # of B, H and Nk
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SETTLE: tl.constexpr,
    SHIFT: tl.constexpr,
    STUDENT_D: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_D: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    layer = tl.program_id(1)
    tile, across, shared = tl.program_id(0), tl.cdiv(keys, BLOCK_N), heads // student.share
    key_head, col = tile % shared, tile // shared % across * BLOCK_N
    item = tile // shared // across
    inside = tl.arange(0, BLOCK_N) < keys - col
    cols = counted(pick(masks.key, layer), item, col, keys, MASKED, BLOCK_N)
    query_mask = pick(masks.query, layer)
    first = key_head * student.share
    s_k, s_k_ptr = _keys(student, layer, item, first, col, cols, STUDENT_WIDTH, STUDENT_D)
    low, end = col * 0, queries
    if CAUSAL:
        low = col // BLOCK_M * BLOCK_M
    elif WINDOW:
        low = first_seen(col, WINDOW, BLOCK_M)
    if WINDOW:
        end = tl.minimum(queries, col + BLOCK_N - 1 + WINDOW)
    dk = tl.zeros((BLOCK_N, STUDENT_WIDTH), ACC)
    for head in tl.range(first, first + student.share):
        t_k, t_k_ptr = _keys(teacher, layer, item, head, col, cols, TEACHER_WIDTH, TEACHER_D)
        at = (item.to(tl.int64) * heads + head) * queries
        s_lse_ptr, t_lse_ptr = pick(student_lse, layer) + at, pick(teacher_lse, layer) + at
        for row in tl.range(low, end, BLOCK_M):
            rows = counted(query_mask, item, row, queries, MASKED, BLOCK_M)
            t_lse, _ = log_sums(t_lse_ptr + row, rows, SHIFT, MASKED)
            s_lse, rows = log_sums(s_lse_ptr + row, rows, SHIFT, MASKED)
            s_q, s_q_ptr = _queries(student, layer, item, head, row, rows, STUDENT_WIDTH, STUDENT_D)
            t_q, t_q_ptr = _queries(teacher, layer, item, head, row, rows, TEACHER_WIDTH, TEACHER_D)
            s = _logs(
                student, s_q, s_k, s_q_ptr, s_k_ptr, rows, cols, student_scale, s_lse,
                STUDENT_WIDTH, BLOCK_K, STUDENT_D, ACC,
            )  # fmt: skip
            t = _logs(
                teacher, t_q, t_k, t_q_ptr, t_k_ptr, rows, cols, teacher_scale, t_lse,
                TEACHER_WIDTH, BLOCK_K, TEACHER_D, ACC,
            )  # fmt: skip
            valid = valid_pairs(rows, cols, row, col, CAUSAL, WINDOW)
            ds = tl.where(valid, tl.exp2(s) - tl.exp2(t), 0.0).to(s_q.dtype)
            dk = settle(
                tl.dot(tl.trans(ds), s_q, dk, input_precision="ieee", out_dtype=ACC), SETTLE
            )
    alpha = tl.load(factor_ptr + layer) * tl.cast(student_scale, ACC) / heads * 2.0**-SHIFT
    dk_ptr = place(pick(dk_ptrs, layer), dk_stride, item, key_head, col)
    store_rows(dk_ptr, alpha * dk, dk_stride[2], inside, STUDENT_D)


def attention_kl_forward(
    student_q: Sequence[Tensor],
    student_k: Sequence[Tensor],
    teacher_q: Sequence[Tensor],
    teacher_k: Sequence[Tensor],
    query_masks: Sequence[Tensor | None],
    key_masks: Sequence[Tensor | None],
    student_lse: Sequence[Tensor | None],
    teacher_lse: Sequence[Tensor | None],
    *,
    causal: Sequence[bool],
    window: Sequence[int] | None = None,
    student_scale: Sequence[float],
    teacher_scale: Sequence[float],
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Losses of L layers, and what their backward needs.

    Args: as for ``attention_probs_forward``; both models have as many heads of queries.

    Returns:
        losses ``[L]``; log-sum-exps in powers of two of students and of teachers, L x
        ``[B, H, Nq]``; scales ``[L]`` (1 / n, n at least 1). All are float32 or float64.
    """
    student = Model.of(student_q, student_k, student_scale)
    teacher = Model.of(teacher_q, teacher_k, teacher_scale)
    pairs = Counted.of(query_masks, key_masks, causal, window)
    L = len(student_q)
    dtype, _ = accumulator(student_q[0])
    losses: dict[int, Tensor] = {}
    scales: dict[int, Tensor] = {}
    with torch.cuda.device_of(student_q[0]):
        lses, teacher_lses = (
            log_sums_in_powers_of_two(model.positive(), pairs, given, [None] * L)
            for model, given in ((student, student_lse), (teacher, teacher_lse))
        )
        forms = {i: (student.form(i), teacher.form(i), pairs.form(i)) for i in range(L)}
        for _, layers in groups(forms):
            x, y = student.q[layers[0]], teacher.q[layers[0]]
            chosen = config(launch.DIVERGENCE, max(width(x), width(y)), x, y)
            chosen = chosen.fitted(x.shape[2])
            tiles = x.shape[0] * x.shape[1] * cdiv(x.shape[2], chosen.block_m)
            sums = x.new_zeros(len(layers), tiles, dtype=dtype)
            if tiles:
                _kl_forward_kernel[(tiles, len(layers))](
                    *_arguments(student, teacher, pairs, layers, lses, teacher_lses), sums,
                    *_sizes(student, teacher, layers[0]), **_constants(x, y, pairs, layers[0]),
                    **launch.options(chosen),
                )  # fmt: skip
            keys = student.k[layers[0]].shape[2]
            for i, total in zip(layers, sums.sum(1) / x.shape[1], strict=True):
                scales[i] = pairs.queries_that_see(i, x, keys).to(dtype).reciprocal()
                losses[i] = total * scales[i]
    return in_order(losses), lses, teacher_lses, in_order(scales)


def attention_kl_backward(
    grad: Tensor,
    student_q: Sequence[Tensor],
    student_k: Sequence[Tensor],
    teacher_q: Sequence[Tensor],
    teacher_k: Sequence[Tensor],
    query_masks: Sequence[Tensor | None],
    key_masks: Sequence[Tensor | None],
    student_lses: Sequence[Tensor],
    teacher_lses: Sequence[Tensor],
    scales: Tensor,
    *,
    causal: Sequence[bool],
    window: Sequence[int] | None = None,
    student_scale: Sequence[float],
    teacher_scale: Sequence[float],
    need_q: Sequence[bool],
    need_k: Sequence[bool],
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of L layers from what the forward kept, which is only read.

    Args: as for ``attention_probs_backward``, with the teachers as given to the forward.

    Returns:
        dQ, L x ``[B, H_s, Nq, d_s]``, and dK, L x ``[B, G_s, Nk, d_s]``, in the layout that
        ``torch.empty_like`` gives; None where none was asked for.
    """
    student = Model.of(student_q, student_k, student_scale)
    teacher = Model.of(teacher_q, teacher_k, teacher_scale)
    pairs = Counted.of(query_masks, key_masks, causal, window)
    factor = (grad * scales).to(scales.dtype).contiguous()
    gradients: list[list[Tensor | None]] = []
    with torch.cuda.device_of(student_q[0]):
        for product, table, inputs, needs in (
            (_kl_dq_kernel, launch.DIVERGENCE_DQ, student_q, need_q),
            (_kl_dk_kernel, launch.DIVERGENCE_DK, student_k, need_k),
        ):
            out = {i: torch.empty_like(inputs[i], dtype=dtype) for i, n in enumerate(needs) if n}
            # where rows are not dense, the kernel writes elsewhere
            to = {i: x if is_dense(x) else x.new_empty(x.shape) for i, x in out.items()}
            forms = {
                i: (student.form(i), teacher.form(i), pairs.form(i), strides(to[i])) for i in to
            }
            for form, layers in groups(forms):
                x, y, dx = student.q[layers[0]], teacher.q[layers[0]], to[layers[0]]
                chosen = config(table, max(width(x), width(y)), x, y).fitted(x.shape[2])
                block = chosen.block_m if product is _kl_dq_kernel else chosen.block_n
                tiles = dx.shape[0] * dx.shape[1] * cdiv(dx.shape[2], block)
                if tiles:
                    product[(tiles, len(layers))](
                        *_arguments(student, teacher, pairs, layers, student_lses, teacher_lses),
                        pointers(to, layers), of_layers(factor, layers),
                        *_sizes(student, teacher, layers[0]), form[3],
                        SETTLE=launch.settles(x), SHIFT=shifts(x)[0],
                        **_constants(x, y, pairs, layers[0]), **launch.options(chosen),
                    )  # fmt: skip
            for i, x in out.items():
                if to[i] is not x:
                    x.copy_(to[i])
            gradients.append([out.get(i) for i in range(len(inputs))])
    return gradients[0], gradients[1]


def _arguments(
    student: Model,
    teacher: Model,
    pairs: Counted,
    layers: Sequence[int],
    student_lses: Sequence[Tensor],
    teacher_lses: Sequence[Tensor],
) -> tuple[object, ...]:
    """What every kernel takes first."""
    x, keys = student.q[layers[0]], student.k[layers[0]].shape[2]
    return (
        student.arguments(layers),
        teacher.arguments(layers),
        pairs.arguments(x, x.shape[2], keys, layers),
        pointers(student_lses, layers),
        pointers(teacher_lses, layers),
    )


def _sizes(student: Model, teacher: Model, layer: int) -> tuple[object, ...]:
    _, heads, queries, _ = student.q[layer].shape
    scales = student.scale[layer], teacher.scale[layer]
    return heads, *scales, queries, student.k[layer].shape[2]


def _constants(x: Tensor, y: Tensor, pairs: Counted, layer: int) -> dict[str, object]:
    masked, causal, window = pairs.form(layer)
    return {
        "MASKED": masked, "CAUSAL": causal, "WINDOW": window, "ACC": accumulator(x)[1],
        "STUDENT_D": x.shape[3], "STUDENT_WIDTH": width(x),
        "TEACHER_D": y.shape[3], "TEACHER_WIDTH": width(y),
    }  # fmt: skip
