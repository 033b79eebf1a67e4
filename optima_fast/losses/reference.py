"""The losses in plain PyTorch: what the other backends must compute.

Everything is materialised and autograd differentiates it, twice if asked. Each function takes one
layer, unchecked, and returns a scalar; ``optima_fast.losses`` has the arguments' meaning.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

COSINE_EPS = 1e-8  # the least length of a state, PyTorch's
LEAST_PROBABILITY = 1e-30  # of a student's mean over heads


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype that products and sums are kept in: float32, or float64 if any input is."""
    wide = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def hidden_loss(
    student: Tensor,  # [..., N, d_s]
    teacher: Tensor,  # [..., N, d_t]
    weight: Tensor | None,  # [d_s, d_t]; None: the identity
    mask: Tensor | None,  # [..., N]
    *,
    measure: str,
    beta: float = 1.0,
    dtype: torch.dtype,
) -> Tensor:
    """Distance between ``student @ weight`` and ``teacher`` over the counted tokens.

    ``mse``: mean square over them and d_t. ``smooth_l1``: mean of PyTorch's function likewise.
    ``cosine``: mean of 1 - cos over the tokens.
    """
    with torch.autocast(student.device.type, enabled=False):
        counted = torch.ones_like(student[..., 0], dtype=torch.bool) if mask is None else mask
        # masked before the product: 0 * nan is nan, in its gradient too
        student = torch.where(counted[..., None], student, 0).to(dtype)
        teacher = torch.where(counted[..., None], teacher.detach(), 0).to(dtype)
        projected = student if weight is None else student @ weight.to(dtype)
        number = counted.sum().clamp(min=1)
        if measure == "cosine":
            # not F.cosine_similarity: its gradient is another one below the least length
            ours, theirs = (F.normalize(x, dim=-1, eps=COSINE_EPS) for x in (projected, teacher))
            cosine = (ours * theirs).sum(-1)
            return torch.where(counted, 1 - cosine, 0).sum() / number
        if measure == "mse":
            total = (projected - teacher).square().sum()
        else:
            total = F.smooth_l1_loss(projected, teacher, beta=beta, reduction="sum")
        return total / (number * teacher.shape[-1])


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


def attention_maps(
    q: Tensor, k: Tensor, valid: Tensor, *, target: str, scale: float, groups: int = 1
) -> Tensor:
    """[B, groups, Nq, Nk]: scores, probabilities or their logarithms, averaged over the heads of
    each group (of logarithms, the logarithm of the average)."""
    q = torch.where(valid.any(2)[:, None, :, None], q, 0)
    k = torch.where(valid.any(1)[:, None, :, None], k, 0)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.unflatten(q @ k.transpose(-1, -2) * scale, 1, (groups, -1))
    if target == "scores":
        return scores.mean(2)
    # finite, so that a query without a valid key has a softmax to be discarded, not nan
    hidden = scores.masked_fill(~valid[:, None, None], torch.finfo(scores.dtype).min)
    if target == "probs":
        return hidden.softmax(-1).mean(2)
    return hidden.log_softmax(-1).logsumexp(2) - math.log(scores.shape[2])


def attention_loss(
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
    groups: int = 1,
    dtype: torch.dtype,
) -> Tensor:
    """``scores`` and ``probs``: mean squared difference of the maps over groups and valid pairs.
    ``kl``: mean divergence of the maps' rows over groups and the queries that see a key.

    A log-sum-exp is not among the arguments: it would only save the softmax its normaliser.
    """
    with torch.autocast(student_q.device.type, enabled=False):
        valid = valid_pairs(query_mask, key_mask, causal, student_q, student_k.shape[2], window)
        student, teacher = (
            attention_maps(
                q.to(dtype), k.to(dtype), valid, target=target, scale=scale, groups=groups
            )
            for q, k, scale in (
                (student_q, student_k, student_scale),
                (teacher_q.detach(), teacher_k.detach(), teacher_scale),
            )
        )
        if target == "kl" and max(student_q.shape[1], teacher_q.shape[1]) > groups:
            student = student.clamp(min=math.log(LEAST_PROBABILITY))
        difference = torch.where(valid[:, None], student - teacher, 0)
        if target == "kl":
            total, number = -(teacher.exp() * difference).sum(), valid.any(2).sum()
        else:
            total, number = difference.square().sum(), valid.sum()
        return total / (number * groups).clamp(min=1)


def indexer_kl(
    q: Tensor,  # [B, H, Nq, d]
    k: Tensor,  # [B, Nk, d]
    weight: Tensor,  # [B, H, Nq]
    teacher_q: Tensor,  # [B, H_t, Nq, d_t]
    teacher_k: Tensor,  # [B, G_t, Nk, d_t]
    query_mask: Tensor | None,  # [B, Nq]
    key_mask: Tensor | None,  # [B, Nk]
    *,
    teacher_scale: float,
    causal: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Mean divergence of ``softmax(sum_h w_h relu(q_h k))`` from the teacher's mean map."""
    with torch.autocast(q.device.type, enabled=False):
        valid = valid_pairs(query_mask, key_mask, causal, q, k.shape[1])
        teacher = attention_maps(
            teacher_q.detach().to(dtype), teacher_k.detach().to(dtype), valid,
            target="kl", scale=teacher_scale,
        )[:, 0]  # fmt: skip
        seeing = valid.any(2)
        q = torch.where(seeing[:, None, :, None], q, 0).to(dtype)
        k = torch.where(valid.any(1)[..., None], k, 0).to(dtype)
        weight = torch.where(seeing[:, None], weight, 0).to(dtype)
        index = ((q @ k[:, None].mT).relu() * weight[..., None]).sum(1)
        student = index.masked_fill(~valid, torch.finfo(dtype).min).log_softmax(-1)
        difference = torch.where(valid, teacher - student, 0)
        return (teacher.exp() * difference).sum() / seeing.sum().clamp(min=1)
