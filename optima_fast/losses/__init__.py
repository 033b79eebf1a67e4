"""Layerwise distillation losses for students and teachers of different width, depth and heads.

Both functions take all matched layers in one call and return one value a layer. Backends:
``reference`` (plain PyTorch: the meaning), ``blockwise`` (cache-sized blocks, any device) and
``triton`` (one launch for layers of one form, CUDA). ``auto`` takes ``triton`` on a CUDA device
where it can serve, except for products of float32, else ``blockwise``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from optima_fast.losses import backends, checks, ops, reference

__all__ = ["attention_mse", "hidden_mse"]

Layers = Tensor | Sequence[Tensor]
OptionalLayers = Tensor | Sequence[Tensor] | Sequence[Tensor | None] | None


def hidden_mse(
    student: Layers,
    teacher: Layers,
    weight: OptionalLayers = None,
    *,
    mask: OptionalLayers = None,
    backend: str = "auto",
    recompute: bool = False,
) -> Tensor:
    r"""Mean squared error between projected student and teacher hidden states, one value a layer.

    .. math:: L_l = \frac{1}{n\, d_t} \sum_{i \text{ counts}} \lVert h^s_i W - h^t_i \rVert^2

    with :math:`n` counted tokens; 0 with gradient 0 when there is none. A masked token may hold nan
    or inf. Gradients go to ``student`` and ``weight``, never to ``teacher``. Products and sums are
    kept in float32 (float64 if an input is float64), under autocast too; a gradient comes in its
    input's dtype. Differentiable once, except with ``backend="reference"``.

    OPTIMA, Eq. 3.

    Args:
        student: ``[..., N, d_s]``, or a sequence of L such; float16, bfloat16, float32 or float64,
            any strides.
        teacher: ``[..., N, d_t]``, as many; the dtype may differ from the student's.
        weight: ``[d_s, d_t]``, as many; None, for all layers or for one, where the student's states
            are compared as they are and d_s = d_t. That is plain PyTorch on any backend: there is
            no product to fuse with.
        mask: ``[..., N]`` bool, True where the token counts: one for all layers, or one (or None)
            per layer. Default: every token.
        backend: ``"auto"``, ``"triton"``, ``"blockwise"`` or ``"reference"``.
        recompute: keep nothing between forward and backward but the inputs: backward computes each
            layer again, one at a time. Else each layer keeps its residual ``[B, N, d_t]`` in the
            student's dtype (``triton``), or the unit gradients, of the size of the student and the
            weight (``blockwise``). The reference backend keeps what autograd keeps.

    Returns:
        ``[L]`` float32 (float64 if an input is float64).

    Raises:
        TypeError: a tensor that is not floating, a mask that is not bool.
        ValueError: an empty list, lists of different lengths, shapes or devices that do not fit, an
            unknown backend, or one that cannot serve the call (with each reason).

    Example:
        >>> import torch, optima_fast
        >>> student, teacher = torch.ones(2, 5, 3), torch.zeros(2, 5, 4)
        >>> optima_fast.hidden_mse(student, teacher, torch.ones(3, 4))
        tensor([9.])
    """
    checks.option("backend", backend, backends.NAMES)
    checks.flags("recompute", recompute, 1)
    if weight is None:
        weight = [None] * len(checks.listed(student))
    students, teachers, weights = checks.floating_layers(
        optional="weight", student=student, teacher=teacher, weight=weight
    )
    for s, t, w in zip(students, teachers, weights, strict=True):
        checks.hidden_shapes(s, t, w)
    shapes = [tuple(s.shape[:-1]) for s in students]
    masks = checks.masks("mask", mask, shapes, students[0].device)
    every = range(len(students))
    fused = [] if backend == "reference" else [i for i in every if weights[i] is not None]
    dtype = reference.accumulator(*students, *teachers, *(w for w in weights if w is not None))
    losses = {
        i: reference.hidden_mse(students[i], teachers[i], weights[i], masks[i], dtype=dtype)
        for i in every
        if i not in fused
    }
    if fused:
        found: Tensor = ops.hidden_mse(
            [_batched(students[i], 2) for i in fused],
            [_batched(teachers[i].detach(), 2) for i in fused],
            [weights[i] for i in fused],
            [None if x is None else _batched(x, 1) for x in (masks[i] for i in fused)],
            _needed([students[i] for i in fused]),
            _needed([weights[i] for i in fused]),
            backend,
            recompute,
        )[0]
        if not losses:
            return found
        losses.update(zip(fused, found.to(dtype).unbind(), strict=True))
    return torch.stack([losses[i] for i in every])


def attention_mse(
    student_q: Layers,
    student_k: Layers,
    teacher_q: Layers,
    teacher_k: Layers,
    *,
    target: str = "scores",
    causal: bool | Sequence[bool] = False,
    window: int | Sequence[int | None] | None = None,
    query_mask: OptionalLayers = None,
    key_mask: OptionalLayers = None,
    student_lse: OptionalLayers = None,
    teacher_lse: OptionalLayers = None,
    student_scale: float | Sequence[float | None] | None = None,
    teacher_scale: float | Sequence[float | None] | None = None,
    backend: str = "auto",
    recompute: bool = False,
) -> Tensor:
    r"""Mean squared error between head-averaged attention maps, one value a layer.

    .. math:: L_l = \frac{1}{n} \sum_{(i, j) \text{ valid}} (A^s_{ij} - A^t_{ij})^2, \quad
        A = \frac{1}{H} \sum_h c\, Q_h K_h^\top \;\text{ or }\;
        \frac{1}{H} \sum_h \mathrm{softmax}(c\, Q_h K_h^\top)

    A pair is valid if its query counts, its key counts, with ``causal`` the key is not after the
    query, and with ``window`` they are less than so many places apart; :math:`n` is their number,
    and the loss is 0 with gradient 0 when there is none. The softmax is over the valid keys; a
    query without any contributes 0. Tokens in no valid pair may hold nan or inf. Gradients go to
    ``student_q`` and ``student_k``, never to the teacher. Products and sums are kept in float32
    (float64 if an input is float64), under autocast too; a gradient comes in its input's dtype. No
    ``[B, H, Nq, Nk]`` tensor is made, except with
    ``backend="reference"``, which alone is differentiable twice.

    OPTIMA, Eq. 4; ``"scores"`` is TinyBERT's attention loss on the head average.

    Args:
        student_q: ``[B, H_s, Nq, d_s]``, or a sequence of L such; float16, bfloat16, float32 or
            float64, any strides (laid out as ``[B, N, H, d]`` nothing is copied).
        student_k: ``[B, G_s, Nk, d_s]``, as many. Grouped queries: G_s divides H_s, and query head
            h takes key head ``h // (H_s / G_s)``, as with ``enable_gqa`` of PyTorch's
            ``scaled_dot_product_attention``; keys are not repeated in memory.
        teacher_q: ``[B, H_t, Nq, d_t]``, as many; heads, d and dtype may differ from the student's.
        teacher_k: ``[B, G_t, Nk, d_t]``, as many; groups may differ from the student's.
        target: ``"scores"``, before the softmax, or ``"probs"``, after it.
        causal: a query sees no later key; one for all layers or one per layer; needs Nq = Nk.
        window: a query sees only keys less than so many places from it (sliding window attention;
            transformers' ``sliding_window`` of causal models); None: no such limit. One for all
            layers or one per layer; needs Nq = Nk.
        query_mask: ``[B, Nq]`` bool, True where the query counts: one for all layers, or one (or
            None) per layer.
        key_mask: ``[B, Nk]`` bool, likewise for keys.
        student_lse: ``[B, H_s, Nq]`` natural log-sum-exp over the valid keys of the student's
            scaled scores, as flash attention returns it; a list may hold None. It saves computing
            the softmax's normaliser, and is taken as that of these q and k: gradients are the full
            ones. The reference backend does not use it. With ``target="probs"`` only.
        teacher_lse: ``[B, H_t, Nq]``, likewise.
        student_scale: c, a float or one per layer. Default: ``1 / sqrt(d_s)``.
        teacher_scale: likewise. Default: ``1 / sqrt(d_t)``.
        backend: ``"auto"``, ``"triton"``, ``"blockwise"`` or ``"reference"``.
        recompute: keep nothing between forward and backward but the inputs: backward computes each
            layer again, one at a time. Else each layer keeps its residual ``[B, Nq, Nk]`` in the
            student's dtype and, for ``"probs"``, a log-sum-exp ``[B, H_s, Nq]`` (``triton``), or
            the unit gradients, of the size of the student's q and k (``blockwise``). The reference
            backend keeps what autograd keeps.

    Returns:
        ``[L]`` float32 (float64 if an input is float64).

    Raises:
        TypeError: a tensor that is not floating, a mask that is not bool, a scale or ``causal`` of
            another type.
        ValueError: an empty list, lists of different lengths, shapes or devices that do not fit,
            no head, keys' heads that do not divide the queries', ``causal`` or ``window`` with
            Nq != Nk, a window below 1, a log-sum-exp with ``target="scores"``, an unknown target or
            backend, or a backend that cannot serve the call (with each reason).

    Example:
        >>> import torch, optima_fast
        >>> q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4)  # each score is 4 / sqrt(4)
        >>> optima_fast.attention_mse([q, q], [k, k], [q, 0 * q], [k, k])
        tensor([0., 4.])
    """
    checks.option("target", target, ("scores", "probs"))
    checks.option("backend", backend, backends.NAMES)
    checks.flags("recompute", recompute, 1)
    inputs = checks.floating_layers(
        student_q=student_q, student_k=student_k, teacher_q=teacher_q, teacher_k=teacher_k
    )
    queries, keys, teacher_queries, teacher_keys = inputs
    causals = checks.flags("causal", causal, len(queries))
    windows = checks.windows(window, len(queries))
    for *layer, flag, limit in zip(*inputs, causals, windows, strict=True):
        checks.matching_maps(*layer, causal=flag, window=limit)
    device = queries[0].device
    query_masks = checks.masks(
        "query_mask", query_mask, [(x.shape[0], x.shape[2]) for x in queries], device
    )
    key_masks = checks.masks("key_mask", key_mask, [(x.shape[0], x.shape[2]) for x in keys], device)
    student_lses = checks.normalisers("student_lse", student_lse, queries, target)
    teacher_lses = checks.normalisers("teacher_lse", teacher_lse, teacher_queries, target)
    student_scales = checks.scales("student_scale", student_scale, queries)
    teacher_scales = checks.scales("teacher_scale", teacher_scale, teacher_queries)
    if backend == "reference":
        dtype = reference.accumulator(*(x for layers in inputs for x in layers))
        return torch.stack(
            [
                reference.attention_mse(
                    *layer,
                    target=target,
                    causal=causals[i],
                    window=windows[i],
                    student_scale=student_scales[i],
                    teacher_scale=teacher_scales[i],
                    dtype=dtype,
                )
                for i, layer in enumerate(zip(*inputs, query_masks, key_masks, strict=True))
            ]
        )
    loss: Tensor = ops.attention_mse(
        queries,
        keys,
        [x.detach() for x in teacher_queries],
        [x.detach() for x in teacher_keys],
        query_masks,
        key_masks,
        [None if x is None else x.detach() for x in student_lses],
        [None if x is None else x.detach() for x in teacher_lses],
        student_scales,
        teacher_scales,
        target,
        causals,
        windows,
        _needed(queries),
        _needed(keys),
        backend,
        recompute,
    )[0]
    return loss


def _needed(tensors: list[Tensor]) -> list[bool]:
    return [torch.is_grad_enabled() and x.requires_grad for x in tensors]


def _batched(x: Tensor, inner: int) -> Tensor:
    """All leading dimensions as one: [B, N, d] of [..., N, d]; a view if it can be."""
    return x.reshape(math.prod(x.shape[:-inner]), *x.shape[x.ndim - inner :])
