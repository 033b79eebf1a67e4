"""Losses of relations among tokens: each feature of a layer takes both sides of a map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optima_fast.losses import checks, reference
from optima_fast.losses.attention import attention_kl, attention_mse
from optima_fast.losses.checks import Layers, OptionalLayers

WHOLE = 512  # tokens up to which a Gram matrix is computed whole


def relation_kl(
    student: Layers,
    teacher: Layers,
    *,
    relation_heads: int,
    temperature: float = 1.0,
    causal: bool | Sequence[bool] = False,
    mask: OptionalLayers = None,
    backend: str = "auto",
    recompute: bool = False,
) -> Tensor:
    r"""Divergence of the relations among a layer's queries, keys or values: one value each.

    .. math:: L = \frac{1}{A\, n} \sum_{a=1}^{A} \sum_{i \text{ counts}}
        \mathrm{KL}(R^t_{a,i} \,\|\, R^s_{a,i}), \quad
        R_a = \mathrm{softmax}(X_a X_a^\top / \sqrt{d_r})

    :math:`X_a` is the a-th of A equal parts of a token's features, :math:`d_r` features each; the
    heads of the two models need not agree, nor their widths. MiniLMv2's loss is the sum over
    queries, keys and values of one layer: pass the three in one list.

    Args:
        student: ``[B, N, D_s]``, or heads ``[B, H, N, d]`` with H d = D_s, which are joined; or a
            sequence of such, each a relation of its own.
        teacher: ``[B, N, D_t]`` or heads, as many.
        relation_heads: A, which divides D_s and D_t.
        temperature: as for :func:`attention_kl`.
        causal: a token relates to no later one.
        mask: ``[B, N]`` bool, True where the token counts: one for all, or one (or None) each.
        backend: as for :func:`attention_kl`.
        recompute: likewise.

    Returns:
        ``[L]`` float32 (float64 if an input is float64), in nats.

    Raises:
        TypeError: a tensor that is not floating, a mask that is not bool.
        ValueError: shapes that do not fit, a number of relation heads that does not divide both
            widths, and what :func:`attention_kl` refuses.

    Source: Wang et al., "MiniLMv2" (Findings of ACL 2021), Eq. 5 to 7, of which the factor
    :math:`\alpha` of each relation is left to the caller.

    Example:
        >>> import torch, optima_fast
        >>> x = torch.eye(4).reshape(1, 4, 4)
        >>> optima_fast.relation_kl([x, x], [x, 0 * x], relation_heads=2)
        tensor([0.0000, 0.0260])
    """
    students, teachers = checks.floating_layers(student=student, teacher=teacher)
    if not isinstance(relation_heads, int) or isinstance(relation_heads, bool):
        raise TypeError(f"relation_heads must be a number, got {relation_heads!r}")
    s, t = (
        [_parted(name, x, relation_heads) for x in layers]
        for name, layers in (("student", students), ("teacher", teachers))
    )
    return attention_kl(
        s, s, t, t, heads="each", temperature=temperature, causal=causal,
        query_mask=mask, key_mask=mask, backend=backend, recompute=recompute,
    )  # fmt: skip


def _parted(name: str, x: Tensor, parts: int) -> Tensor:
    """[B, parts, N, D / parts] of [B, N, D] or [B, H, N, d]; a view where heads lie in a row."""
    if x.ndim not in (3, 4):
        raise ValueError(f"{name} must be [B, N, D] or [B, H, N, d], got {tuple(x.shape)}")
    if x.ndim == 4:
        x = x.transpose(1, 2).flatten(2)
    if parts < 1 or x.shape[2] % parts:
        raise ValueError(
            f"relation_heads must divide the width of {name}, got {parts} and {x.shape[2]}"
        )
    return torch.unflatten(x, 2, (parts, -1)).transpose(1, 2)


def gram_mse(
    student: Layers,
    teacher: Layers,
    *,
    mask: OptionalLayers = None,
    normalize: bool = True,
    backend: str = "auto",
    recompute: bool = False,
) -> Tensor:
    r"""Mean squared error between the Gram matrices of a layer's tokens, one value a layer.

    .. math:: L_l = \frac{1}{n} \sum_{(i, j) \text{ count}}
        (x^s_i \cdot x^s_j - x^t_i \cdot x^t_j)^2

    with :math:`n` pairs of counted tokens of one item, and features x that are scaled to length 1
    first: the products are cosines. The matrices are symmetric: of up to 512 tokens one product
    gives the whole gradient, of more each pair is computed once. Masks, gradients and dtypes are
    those of :func:`attention_mse`.

    Args:
        student: ``[B, N, d_s]``, or a sequence of L such.
        teacher: ``[B, N, d_t]``, as many; another width if need be.
        mask: ``[B, N]`` bool, True where the token counts: one for all layers, or one (or None)
            per layer. A masked token may hold nan or inf.
        normalize: scale features to length 1; those of length 0 stay 0.
        backend: as for :func:`attention_mse`.
        recompute: likewise.

    Returns:
        ``[L]`` float32 (float64 if an input is float64).

    Raises:
        TypeError: a tensor that is not floating, a mask that is not bool.
        ValueError: shapes that do not fit, and what :func:`attention_mse` refuses.

    Source: Siméoni et al., "DINOv3" (2025), Gram anchoring; without ``normalize`` the
    similarity-preserving distillation of Tung and Mori (ICCV 2019) before its own normalisation.

    Example:
        >>> import torch, optima_fast
        >>> x = torch.eye(2)[None]
        >>> optima_fast.gram_mse(x, torch.ones(1, 2, 3))  # cosines 0 and 1 off the diagonal
        tensor([0.5000])
    """
    students, teachers = checks.floating_layers(student=student, teacher=teacher)
    checks.flags("normalize", normalize, 1)
    for s, t in zip(students, teachers, strict=True):
        if s.ndim != 3 or t.ndim != 3 or s.shape[:2] != t.shape[:2]:
            raise ValueError(
                "student and teacher must be [B, N, d_s] and [B, N, d_t] with the same tokens, got "
                f"{tuple(s.shape)} and {tuple(t.shape)}"
            )
    shapes = [tuple(x.shape[:2]) for x in students]
    masks = checks.masks("mask", mask, shapes, students[0].device)
    dtype = reference.accumulator(*students, *teachers)
    s, t = (
        checks.multiplied(
            [_features(x, m, normalize, dtype) for x, m in zip(layers, masks, strict=True)]
        )
        for layers in (students, [x.detach() for x in teachers])
    )
    options: dict[str, Any] = {
        "target": "scores", "query_mask": masks, "key_mask": masks,
        "student_scale": 1.0, "teacher_scale": 1.0, "backend": backend, "recompute": recompute,
    }  # fmt: skip
    x, y = [z[:, None] for z in s], [z[:, None] for z in t]
    if backend == "reference":
        return attention_mse(x, x, y, y, **options)
    if max(z.shape[1] for z in s) <= WHOLE:
        # the matrix is symmetric: half of its gradient comes by the rows, half by the columns
        value = attention_mse(x, [z.detach() for z in x], y, y, **options)
        return 2 * value - value.detach()
    # each pair once, by causality: a token and itself are added once too often where all are twice
    lower = attention_mse(x, x, y, y, causal=True, **options)
    losses = []
    for value, x_, y_, m in zip(lower.unbind(), s, t, masks, strict=True):
        lengths = x_.to(dtype).square().sum(2) - y_.to(dtype).square().sum(2)
        counted = torch.full_like(x_[:, 0, 0], x_.shape[1], dtype=dtype) if m is None else m.sum(1)
        pairs = (counted * (counted + 1) / 2).sum()
        total = 2 * pairs * value - lengths.square().sum()
        losses.append(total / counted.square().sum().clamp(min=1))
    return torch.stack(losses)


def _features(x: Tensor, mask: Tensor | None, normalize: bool, dtype: torch.dtype) -> Tensor:
    """0 where nothing counts, of length 1 if asked to, in the dtype of x."""
    if mask is not None:
        x = torch.where(mask[..., None], x, 0)
    if normalize:
        x = torch.nn.functional.normalize(x.to(dtype), dim=-1).to(x.dtype)
    return x
