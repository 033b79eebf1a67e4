"""Distance of head-averaged attention maps, for many layers of any shapes.

    P_h = softmax_j(s Q_h K_h^T)          over the keys that count; s: the model's scale
    R   = mean_h P_h^s - mean_h P_h^t     0 at pairs that do not count
    loss = sum R^2 / n                    n: pairs that count; none: 0
    dS_h = (2 g / (n H)) P_h o (R - r_h)  r_h = sum_j P_h o R; g: upstream gradient of the loss
    dQ_h = s dS_h K_h,  dK_h = s dS_h^T Q_h

The divergence of the mean maps A = mean_h P_h, ``divergence``, takes the same path, with the sum of
A^t (log A^t - log A^s) over n queries that see a key, and R = 1 - A^t / A^s, which is 1 more than
its derivative by A^s: that changes no dS, and leaves nothing to cancel where the two agree.

A pair counts where query and key do and causality and a window let the one see the other. What does
not count may hold nan or inf: it changes no value and no gradient. R is kept, in the students'
dtype and only when a gradient is wanted: one map, whatever the number of heads.

Up to 256 keys of 16 bits rows of a map lie in registers (``probs_rows.py``), and up to 80 tokens
those of the backward pass: one launch each for all layers of a form; but not with a window, nor the
backward pass where heads share keys. Else, with H heads in all, H_s
of them the students' (``probs_sweeps.py``):
  log-sum-exp  H Q K^T and H exponentials a pair; skipped for a model whose attention gave it
  residual     the same once more: a tile's loop over all heads, the sum in float32
  dQ           one sweep: dQ_h = s (U - r V), U = (P o R) K, V = P K, r = sum P o R / sum P of the
               products as rounded. 3 products and 1 exponential a pair and head of the students
  dK           2 products and 1 exponential
Bytes: Q and K of both models each time a tile needs them, from L2; R is 1 element a pair.

Products and sums are kept in float32, for float64 in float64; float32 inputs have IEEE products.
There are no atomics: every sum has a fixed order and results are bit-reproducible.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch, probs_rows, probs_sweeps
from .attention_tiles import (
    Counted,
    Model,
    in_powers_of_two,
    is_dense,
    residual_width,
    width,
)
from .core import accumulator, device_refusals, dtype_refusals
from .layers import groups, in_order
from .probs_rows import Tiles

MAX_WIDTH = 128


def not_served(
    student_q: Sequence[Tensor],
    student_k: Sequence[Tensor],
    teacher_q: Sequence[Tensor],
    teacher_k: Sequence[Tensor],
) -> list[str]:
    """Each reason why these kernels cannot take the inputs; empty if they can."""
    students, teachers = (*student_q, *student_k), (*teacher_q, *teacher_k)
    reasons = device_refusals((*students, *teachers))
    reasons += dtype_refusals("students", students) + dtype_refusals("teachers", teachers)
    widest = max(x.shape[-1] for x in (*student_q, *teacher_q))
    if widest > MAX_WIDTH:
        reasons.append(f"head sizes must be at most {MAX_WIDTH}, got {widest}")
    return reasons


def attention_probs_forward(
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
    need_residual: bool,
    divergence: bool = False,
    first: int | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Losses of L layers, and what their backward needs.

    Args:
        student_q, student_k: L x ``[B, H_s, Nq, d_s]`` and ``[B, G_s, Nk, d_s]`` of one dtype; head
            h of q takes head ``h // (H_s / G_s)`` of k. All sizes may differ from layer to layer;
            any strides, read in place where rows are dense.
        teacher_q, teacher_k: L x ``[B, H_t, Nq, d_t]`` and ``[B, G_t, Nk, d_t]`` of one dtype.
        query_masks, key_masks: L x ``[B, Nq]`` and ``[B, Nk]`` bool, True what counts, or None.
        student_lse, teacher_lse: L x ``[B, H, Nq]``, natural log-sum-exp of the scaled scores over
            the keys that count, or None where it is to be computed.
        causal: L flags: query i sees the keys up to i.
        window: L numbers: query i sees keys less than so many places from i; 0: each.
        student_scale, teacher_scale: L factors of the scores.
        need_residual: whether a gradient will be wanted.
        divergence: of the mean maps, in place of their mean squared error.
        first: the queries are a strip of a layer's, whose first one has this place among the keys,
            and the masks say what is in a valid pair; losses and scales are the strip's.

    Returns:
        losses ``[L]``; residuals, L x ``[B, Nq, residual_width(Nk)]`` in ``residual_dtype``, zero
        where nothing counts, times ``2**SHIFTS[dtype][1]`` for float16; the students' log-sum-exp
        in powers of two, L x ``[B, H_s, Nq]``; scales ``[L]`` (2 / n, of a divergence 1 / n; n at
        least 1). Losses, log-sum-exp and scales are float32 or float64. The two lists are empty if
        no gradient is wanted.
    """
    student = Model.of(student_q, student_k, student_scale).positive()
    teacher = Model.of(teacher_q, teacher_k, teacher_scale).positive()
    pairs = Counted.of(query_masks, key_masks, causal, window, first)
    L = len(student_q)
    residuals = [
        q.new_empty(
            q.shape[0], q.shape[2], residual_width(k.shape[2]),
            dtype=residual_dtype(q.dtype, divergence),
        ) if need_residual else q
        for q, k in zip(student_q, student_k, strict=True)
    ]  # fmt: skip
    with torch.cuda.device_of(student_q[0]):
        tiles = [
            None
            if pairs.window[i] or divergence or first is not None
            else _forward_tiles(student, teacher, i)
            for i in range(L)
        ]
        lses, teacher_lses = (
            log_sums_in_powers_of_two(model, pairs, given, tiles)
            for model, given in ((student, student_lse), (teacher, teacher_lse))
        )
        given = [
            (s is not None, t is not None) for s, t in zip(student_lse, teacher_lse, strict=True)
        ]
        forms = {
            i: (tiles[i], student.form(i), teacher.form(i), pairs.form(i), tiles[i] and given[i])
            for i in range(L)
        }
        losses: dict[int, Tensor] = {}
        scales: dict[int, Tensor] = {}
        launches = groups(forms)
        for (tile, *_), layers in launches:
            models = (student, teacher, pairs, layers, lses, teacher_lses)
            if tile is None:
                found = probs_sweeps.residual(*models, residuals, need_residual, divergence)
            else:
                found = probs_rows.residual(
                    *models, given[layers[0]], residuals, need_residual, tile
                )
            if len(launches) == 1:
                break
            losses.update(zip(layers, found[0], strict=True))
            scales.update(zip(layers, found[1], strict=True))
        else:
            found = in_order(losses), in_order(scales)
    kept = (residuals, lses) if need_residual else ([], [])
    return found[0], *kept, found[1]


def attention_probs_backward(
    grad: Tensor,
    student_q: Sequence[Tensor],
    student_k: Sequence[Tensor],
    query_masks: Sequence[Tensor | None],
    key_masks: Sequence[Tensor | None],
    residuals: Sequence[Tensor],
    student_lses: Sequence[Tensor],
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
            ``attention_probs_forward``.
        residuals, student_lses, scales: as it returned them.
        need_q, need_k: L flags: which gradients to compute.
        dtype: of the gradients, the inputs' own by default. A unit gradient (``grad`` of ones, to
            be scaled later) of float16 inputs underflows in float16.
        first: of a strip, as for the forward.
        sums: of a strip, L x ``[B, G_s, Nk, d_s]``, dense: dK of the strips before it, to which its
            own is added.

    Returns:
        dQ, L x ``[B, H_s, Nq, d_s]``, and dK, L x ``[B, G_s, Nk, d_s]``, in the layout that
        ``torch.empty_like`` gives; None where none was asked for.
    """
    student = Model.of(student_q, student_k, student_scale)
    pairs = Counted.of(query_masks, key_masks, causal, window, first)
    factor = (grad * scales).to(scales.dtype).contiguous()
    wanted = [i for i, needs in enumerate(zip(need_q, need_k, strict=True)) if any(needs)]
    # dQ is needed on the way to dK
    d_q = {i: torch.empty_like(student_q[i], dtype=dtype) for i in wanted}
    d_k = {i: sums[i] if sums else torch.empty_like(student_k[i], dtype=dtype) for i in wanted}
    # where rows are not dense, kernels write elsewhere
    to_q, to_k = (
        {i: x if is_dense(x) else x.new_empty(x.shape) for i, x in y.items()} for y in (d_q, d_k)
    )
    with torch.cuda.device_of(student_q[0]):
        tiles = {
            i: None if pairs.window[i] or first is not None else _backward_tiles(student, i)
            for i in wanted
        }
        forms = {i: (tiles[i], student.form(i), pairs.form(i)) for i in wanted}
        for (tile, *_), layers in groups(forms):
            inputs = (student, pairs, layers, student_lses, residuals, factor)
            if tile is None:
                probs_sweeps.gradients(*inputs, to_q, to_k, need_k)
            else:
                probs_rows.gradients(*inputs, to_q, to_k, tile)
    for out, written in ((d_q, to_q), (d_k, to_k)):
        for i in wanted:
            if out[i] is not written[i]:
                out[i].copy_(written[i])
    return (
        [d_q[i] if need else None for i, need in enumerate(need_q)],
        [d_k[i] if need else None for i, need in enumerate(need_k)],
    )


def _forward_tiles(student: Model, teacher: Model, layer: int) -> Tiles | None:
    """How rows of the layer's maps lie in registers; None where they do not."""
    x, y = student.q[layer], teacher.q[layer]
    if y.dtype == torch.float32:
        return None
    keys, columns = student.k[layer].shape[2], max(width(x), width(y))
    return probs_rows.tiles(launch.PROBS_ROWS_FORWARD, keys, columns, x)


def _backward_tiles(student: Model, layer: int) -> Tiles | None:
    x = student.q[layer]
    if student.share(layer) > 1:
        return None
    return probs_rows.backward_tiles(x.shape[2], student.k[layer].shape[2], width(x), x)


def residual_dtype(dtype: torch.dtype, divergence: bool) -> torch.dtype:
    """A ratio of probabilities may pass what float16 holds."""
    return torch.float32 if divergence and dtype == torch.float16 else dtype


def log_sums_in_powers_of_two(
    model: Model, pairs: Counted, given: Sequence[Tensor | None], tiles: Sequence[Tiles | None]
) -> list[Tensor]:
    """[B, H, Nq] of each layer, in powers of two: given, computed, or room for what is found."""
    dtype, _ = accumulator(model.q[0])
    missing = [
        i for i, (lse, tile) in enumerate(zip(given, tiles, strict=True))
        if lse is None and tile is None
    ]  # fmt: skip
    computed = probs_sweeps.log_sums_of(model, pairs, missing)
    return [
        computed[i] if i in computed
        else q.new_empty(q.shape[:3], dtype=dtype) if lse is None
        else in_powers_of_two(lse, dtype)
        for i, (q, lse) in enumerate(zip(model.q, given, strict=True))
    ]  # fmt: skip
