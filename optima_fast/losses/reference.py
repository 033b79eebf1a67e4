"""Both losses in plain PyTorch: what the other backends must compute.

Everything is materialised and autograd differentiates it, twice if asked. Each function takes one
layer, unchecked, and returns a scalar; ``optima_fast.losses`` has the arguments' meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype that products and sums are kept in: float32, or float64 if any input is."""
    wide = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def hidden_mse(
    student: Tensor,  # [..., N, d_s]
    teacher: Tensor,  # [..., N, d_t]
    weight: Tensor | None,  # [d_s, d_t]; None: the identity
    mask: Tensor | None,  # [..., N]
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Mean of ``(student @ weight - teacher) ** 2`` over the counted tokens and d_t."""
    with torch.autocast(student.device.type, enabled=False):
        counted = torch.ones_like(student[..., 0], dtype=torch.bool) if mask is None else mask
        # masked before the product: 0 * nan is nan, in its gradient too
        student = torch.where(counted[..., None], student, 0).to(dtype)
        teacher = torch.where(counted[..., None], teacher.detach(), 0).to(dtype)
        projected = student if weight is None else student @ weight.to(dtype)
        residual = projected - teacher
        return residual.square().sum() / (counted.sum() * teacher.shape[-1]).clamp(min=1)


def valid_pairs(
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    causal: bool,
    like: Tensor,
    keys: int,
    window: int = 0,
) -> Tensor:
    """[B, Nq, Nk] bool: query and key count, and causality and window let one see the other."""
    batch, _, queries, _ = like.shape
    valid = torch.ones(batch, queries, keys, dtype=torch.bool, device=like.device)
    if causal:
        valid = valid.tril()
    if window:
        valid = valid.tril(window - 1).triu(1 - window)
    if query_mask is not None:
        valid = valid & query_mask[:, :, None]
    if key_mask is not None:
        valid = valid & key_mask[:, None, :]
    return valid


def attention_map(q: Tensor, k: Tensor, valid: Tensor, target: str, scale: float) -> Tensor:
    """[B, Nq, Nk] scores or probabilities, averaged over the heads of q."""
    q = torch.where(valid.any(2)[:, None, :, None], q, 0)
    k = torch.where(valid.any(1)[:, None, :, None], k, 0)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2) * scale
    if target == "probs":
        # finite, so that a query without a valid key has a softmax to be discarded, not nan
        hidden = scores.masked_fill(~valid[:, None], torch.finfo(scores.dtype).min)
        return hidden.softmax(-1).mean(1)
    return scores.mean(1)


def attention_mse(
    student_q: Tensor,  # [B, H_s, Nq, d_s]
    student_k: Tensor,  # [B, G_s, Nk, d_s]
    teacher_q: Tensor,  # [B, H_t, Nq, d_t]
    teacher_k: Tensor,  # [B, G_t, Nk, d_t]
    query_mask: Tensor | None,  # [B, Nq]
    key_mask: Tensor | None,  # [B, Nk]
    *,
    target: str,
    causal: bool,
    window: int = 0,
    student_scale: float,
    teacher_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Mean squared difference of the two head-averaged maps over the valid pairs.

    A log-sum-exp is not among the arguments: it would only save the softmax its normaliser.
    """
    with torch.autocast(student_q.device.type, enabled=False):
        valid = valid_pairs(query_mask, key_mask, causal, student_q, student_k.shape[2], window)
        student = attention_map(
            student_q.to(dtype), student_k.to(dtype), valid, target, student_scale
        )
        teacher = attention_map(
            teacher_q.detach().to(dtype), teacher_k.detach().to(dtype), valid, target, teacher_scale
        )
        residual = torch.where(valid, student - teacher, 0)
        return residual.square().sum() / valid.sum().clamp(min=1)
