"""Attention maps: a block's rows of them, all keys, all heads.

With A = mean_h P_h, R = A_student - A_teacher on the n valid pairs, else 0:

    scores  P_h = c Q_h K_h^T = S_h          sum over heads = one product of width H d
            dQ = G K,  dK = G^T Q            G = 2 c R / (n H), heads side by side
            heads that share a key: the sum of their queries is one query
    probs   P_h = softmax(S_h)
            dS_h = P_h * (G - r_h)           r_h = rowsum(G * P_h)
            dQ_h = dS_h K_h,  dK_h = dS_h^T Q_h
    kl      the same with G = c R / (n H A_student), n the queries that see a key: the gradient of
            the divergence is -A_teacher / A_student, and 1 more changes no softmax
    kl-each dS_h = c (P_h - P_h of the teacher) / (n H)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from optima_fast.losses.blockwise.blocks import (
    Gradients,
    block_shape,
    empty_gradient,
    mean,
    nothing,
    starts,
    view,
)
from optima_fast.losses.reference import LEAST_PROBABILITY

LOG2_E = math.log2(math.e)


class Pairs(NamedTuple):
    """Which (query, key) pairs are valid, without a [Nq, Nk] array."""

    queries: Tensor | None  # [B, Nq] bool: takes part in a valid pair. None: each does
    keys: Tensor | None  # [B, Nk] bool: takes part in a valid pair. None: each does
    number: Tensor | float  # of valid pairs, at least 1
    causal: bool
    window: int  # 0: none

    def rows(self, batch: int, queries: int, dtype: torch.dtype) -> Tensor | float:
        """The number of queries in a valid pair, at least 1."""
        if self.queries is None:
            return float(batch * queries)
        return self.queries.sum().clamp(min=1).to(dtype)

    def seen(self, i0: int, i1: int, keys: int) -> tuple[int, int]:
        """The keys that queries i0 to i1 may see, from the first to after the last."""
        first = max(0, i0 - self.window + 1) if self.window else 0
        if self.causal:
            return first, i1
        return first, min(keys, i1 + self.window - 1) if self.window else keys

    def unseen(self, i0: int, i1: int, j0: int, j1: int, like: Tensor) -> Tensor | None:
        """[i1 - i0, j1 - j0] bool: too far, or later; None where all is seen."""
        if not self.window:
            return None
        distance = torch.arange(i0, i1, device=like.device)[:, None]
        distance = distance - torch.arange(j0, j1, device=like.device)
        far = distance.abs() >= self.window
        return far | (distance < 0) if self.causal else far


def valid_pairs(
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    causal: bool,
    window: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> Pairs:
    """Valid pairs of a [B, Nq, Nk] problem. What is in none may hold anything, nan included."""
    B, Nq, Nk = shape
    given = query_mask if key_mask is None else key_mask
    if given is None:
        number = B * Nq * Nk
        if causal or window:
            width = min(window, Nq) if window else Nq
            lower = Nq * width - width * (width - 1) // 2
            number = B * (lower if causal else 2 * lower - Nq)
        return Pairs(None, None, float(number), causal, window)
    q = given.new_ones(B, Nq) if query_mask is None else query_mask
    k = given.new_ones(B, Nk) if key_mask is None else key_mask
    if causal or window:
        # keys that query i sees, and queries that see key j
        seen = _counted(k, window - 1 if window else Nk, 0 if causal else window - 1)
        seeing = _counted(q, 0 if causal else window - 1, window - 1 if window else Nq)
    else:
        seen, seeing = k.sum(1, keepdim=True), q.sum(1, keepdim=True)
    count = (q * seen).sum().clamp(min=1).to(dtype)
    return Pairs(q & (seen > 0), k & (seeing > 0), count, causal, window)


def _counted(mask: Tensor, before: int, after: int) -> Tensor:
    """[B, N]: how many count from so many places before each one to so many after it."""
    n = mask.shape[1]
    sums = torch.nn.functional.pad(mask.cumsum(1), (1, 0))
    place = torch.arange(n, device=mask.device)
    return sums[:, (place + after + 1).clamp(max=n)] - sums[:, (place - before).clamp(min=0)]


class Side(NamedTuple):
    """Student or teacher: one layer's queries and keys, and how their map is made."""

    q: Tensor  # [B, H, Nq, d]
    k: Tensor  # [B, G, Nk, d]: head h of q takes head h // share
    scale: float
    lse: Tensor | None  # [B, H, Nq]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def share(self) -> int:
        return self.q.shape[1] // self.k.shape[1]


def attention_loss(
    student_q: Tensor,  # [B, H_s, Nq, d_s]
    student_k: Tensor,  # [B, G_s, Nk, d_s]
    teacher_q: Tensor,  # [B, H_t, Nq, d_t]
    teacher_k: Tensor,  # [B, G_t, Nk, d_t]
    query_mask: Tensor | None,  # [B, Nq]
    key_mask: Tensor | None,  # [B, Nk]
    student_lse: Tensor | None,  # [B, H_s, Nq]
    teacher_lse: Tensor | None,  # [B, H_t, Nq]
    *,
    target: str,
    causal: bool,
    window: int = 0,
    student_scale: float,
    teacher_scale: float,
    need_q: bool,
    need_k: bool,
    dtype: torch.dtype,
) -> Gradients:
    """Difference of the two models' maps; gradients of the student's q and k.

    A log-sum-exp that is given is believed, and taken as that of the same q and k: the gradients
    are those of the softmax.
    """
    B, _, Nq, _ = student_q.shape
    Nk = student_k.shape[2]
    d_q, d_k = empty_gradient(student_q, need_q), empty_gradient(student_k, need_k)
    if not B * Nq * Nk:
        return nothing(student_q.new_empty(0, dtype=dtype), d_q, d_k)
    student = Side(student_q, student_k, student_scale, student_lse)
    teacher = Side(teacher_q, teacher_k, teacher_scale, teacher_lse)
    pairs = valid_pairs(query_mask, key_mask, causal, window, (B, Nq, Nk), dtype)
    if target == "scores":
        return _scores(student, teacher, pairs, d_q, d_k, dtype)
    return _softmax(student, teacher, pairs, key_mask, target, d_q, d_k, dtype)


def _scores(
    student: Side,
    teacher: Side,
    pairs: Pairs,
    d_q: Tensor | None,
    d_k: Tensor | None,
    dtype: torch.dtype,
) -> Gradients:
    B, H, Nq, d = student.q.shape
    G, Nk = student.k.shape[1:3]
    scale = student.scale / H
    items, rows = block_shape(B, Nq, Nk, causal=pairs.causal, gpu=student.q.is_cuda)
    work = student.q.new_empty(items * rows * Nk, dtype=dtype)
    partial = []
    for b0, b1 in starts(B, items):
        qs, qt = (
            _heads_last(x.q, pairs.queries, b0, b1, dtype, x.share) for x in (student, teacher)
        )
        ks, kt = (_heads_last(x.k, pairs.keys, b0, b1, dtype) for x in (student, teacher))
        dk = torch.zeros_like(ks) if d_k is not None else None
        for i0, i1 in starts(Nq, rows):
            j0, j1 = pairs.seen(i0, i1, Nk)
            block = view(work, b1 - b0, i1 - i0, j1 - j0)
            q, k = qs[:, i0:i1], ks[:, j0:j1]
            residual = torch.baddbmm(block, q, k.mT, beta=0, alpha=scale, out=block)
            residual.baddbmm_(qt[:, i0:i1], kt[:, j0:j1].mT, alpha=-teacher.scale / teacher.heads)
            # 0 already where a query or key is masked: both its products are with zeros
            unseen = pairs.unseen(i0, i1, j0, j1, residual)
            if unseen is not None:
                residual.masked_fill_(unseen, 0)
            elif pairs.causal:
                residual.tril_(i0)
            partial.append(residual.square().sum())
            residual.mul_(2 * scale / pairs.number)
            if d_q is not None:
                product = (residual @ k).view(-1, i1 - i0, G, d).transpose(1, 2)
                torch.unflatten(d_q[b0:b1, :, i0:i1], 1, (G, -1)).copy_(product[:, :, None])
            if dk is not None:
                dk[:, j0:j1].baddbmm_(residual.mT, q)
        if d_k is not None and dk is not None:
            d_k[b0:b1] = dk.view(-1, Nk, G, d).transpose(1, 2)
    return Gradients(mean(partial, pairs.number), (d_q, d_k))


def _softmax(
    student: Side,
    teacher: Side,
    pairs: Pairs,
    key_mask: Tensor | None,
    target: str,
    d_q: Tensor | None,
    d_k: Tensor | None,
    dtype: torch.dtype,
) -> Gradients:
    B, H, Nq, d = student.q.shape
    G, Nk = student.k.shape[1:3]
    most = max(H, teacher.heads)
    each = target == "kl-each"
    number = pairs.number if target == "probs" else pairs.rows(B, Nq, dtype)
    factor = 2 if target == "probs" else 1  # of the derivative, in the end
    # of one item queries and keys are views, of several copies, which only small maps repay
    items, rows = block_shape(
        B, Nq, most * Nk, shared=4, causal=pairs.causal, gpu=student.q.is_cuda
    )
    per_map = (most, most, most, most) if each else (most, most, 1, 1)
    work = [student.q.new_empty(items * rows * Nk * h, dtype=dtype) for h in per_map]
    partial = []
    for b0, b1 in starts(B, items):
        C = b1 - b0
        # heads that share a key are apart from one another, so that each product is of views
        qs, qt = (
            heads_first(x.q, pairs.queries, b0, b1, dtype, x.share) for x in (student, teacher)
        )
        (ks,), (kt,) = (heads_first(x.k, pairs.keys, b0, b1, dtype, 1) for x in (student, teacher))
        ls, lt = (log2_normaliser(x, pairs.queries, b0, b1, dtype) for x in (student, teacher))
        hidden = None if key_mask is None else ~key_mask[b0:b1, None, :]
        # [d, Nk], not [Nk, d]: the product that adds to it is a third faster
        dk = ks.new_zeros(G * C, d, Nk) if d_k is not None else None
        for i0, i1 in starts(Nq, rows):
            j0, j1 = pairs.seen(i0, i1, Nk)
            m, n = i1 - i0, j1 - j0
            unseen = pairs.unseen(i0, i1, j0, j1, ks)
            later = i0 if pairs.causal and unseen is None else None
            uncounted = None if pairs.queries is None else ~pairs.queries[b0:b1, i0:i1, None]
            maps = []
            # the student last: its probabilities are still needed
            for side, q, k, lse, kept in (
                (teacher, qt, kt, lt, work[2]),
                (student, qs, ks, ls, work[3]),
            ):
                scores, probs = (view(x, side.heads, C, m, n) for x in work[:2])
                if each:
                    probs = view(kept, H, C, m, n)
                probabilities(
                    side.scale, q[:, :, i0:i1], k[:, j0:j1],
                    None if lse is None else lse[:, :, i0:i1, None],
                    None if hidden is None else hidden[..., j0:j1], unseen, later,
                    scores, probs, logs=each,
                )  # fmt: skip
                maps.append(probs if each else torch.sum(probs, 0, out=view(kept, C, m, n)))
            if each and teacher.share != student.share:
                maps[0] = _reordered(maps[0], teacher.share, student.share)
            if each:
                total, slope = _divergence_of_each(maps[0], maps[1], scores, uncounted)
            else:
                compare = _square_of_means if target == "probs" else _divergence_of_means
                total, slope = compare(maps[0], maps[1], teacher.heads, H, uncounted)
            partial.append(total)
            if d_q is None and dk is None:
                continue
            d_scores = slope.mul_(factor * student.scale / H / number)
            if not each:
                d_scores = torch.mul(probs, slope, out=scores)
                d_scores.addcmul_(probs, d_scores.sum(-1, keepdim=True), value=-1)
            for j, flat in enumerate(d_scores.view(student.share, -1, m, n)):
                if d_q is not None:
                    product = (flat @ ks[:, j0:j1]).view(G, C, m, d)
                    d_q[b0:b1, j :: student.share, i0:i1] = product.transpose(0, 1)
                if dk is not None:
                    dk[:, :, j0:j1].baddbmm_(qs[j][:, i0:i1].mT, flat)
        if d_k is not None and dk is not None:
            d_k[b0:b1] = dk.view(G, C, d, Nk).transpose(0, 1).mT
    return Gradients(mean(partial, number * H if each else number), (d_q, d_k))


# What a block adds to the sum, and its derivative, of a square half of it. Both maps may be
# overwritten.


def _square_of_means(
    teacher: Tensor, student: Tensor, heads_t: int, heads_s: int, uncounted: Tensor | None
) -> tuple[Tensor, Tensor]:
    residual = student.div_(heads_s).sub_(teacher, alpha=1 / heads_t)
    if uncounted is not None:
        residual.masked_fill_(uncounted, 0)
    return residual.square().sum(), residual


def _divergence_of_means(
    teacher: Tensor, student: Tensor, heads_t: int, heads_s: int, uncounted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The derivative and 1, which changes no softmax: 0 where the two agree."""
    teacher, student = teacher.div_(heads_t), student.div_(heads_s)
    tiny = student < LEAST_PROBABILITY
    ratio = teacher / student.clamp_(min=LEAST_PROBABILITY)
    terms = torch.xlogy(teacher, ratio)
    slope = (1 - ratio).masked_fill_(tiny, 1)
    if uncounted is not None:
        terms, slope = terms.masked_fill_(uncounted, 0), slope.masked_fill_(uncounted, 0)
    return terms.sum(), slope


def _divergence_of_each(
    teacher: Tensor, student: Tensor, room: Tensor, uncounted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same of logarithms of each head's map, by its scores."""
    difference = torch.sub(teacher, student, out=room)
    teacher, student = teacher.exp_(), student.exp_()
    if uncounted is not None:
        teacher, student = teacher.masked_fill_(uncounted, 0), student.masked_fill_(uncounted, 0)
    total = difference.mul_(teacher).sum()
    return total, torch.sub(student, teacher, out=room)


def probabilities(
    scale: float,
    q: Tensor,  # [share, G * C, m, d]
    k: Tensor,  # [G * C, n, d]
    lse: Tensor | None,  # [H, C, m, 1], base 2
    hidden: Tensor | None,
    unseen: Tensor | None,
    later: int | None,
    scores: Tensor,  # [H, C, m, n] room
    out: Tensor,  # [H, C, m, n]
    *,
    logs: bool = False,
) -> None:
    """Fill ``out`` with a block of each head's map, or its logarithms; for what is hidden see
    ``hide``."""
    factor = scale if lse is None else scale * LOG2_E
    for x, room in zip(q, scores.view(len(q), -1, *scores.shape[2:]), strict=True):
        torch.baddbmm(room, x, k.mT, beta=0, alpha=factor, out=room)
    hide(scores, hidden, unseen, later)
    if lse is None:
        (torch.log_softmax if logs else torch.softmax)(scores, -1, out=out)
    elif logs:
        torch.sub(scores, lse, out=out).mul_(1 / LOG2_E)
    else:
        torch.sub(scores, lse, out=out).exp2_()


def hide(scores: Tensor, hidden: Tensor | None, unseen: Tensor | None, start: int | None) -> None:
    """Masked keys, those unseen, and keys after their query, to the lowest finite score.

    Finite, so that a query without any key has a softmax to be discarded, not nan.
    """
    low = torch.finfo(scores.dtype).min
    if hidden is not None:
        scores.masked_fill_(hidden, low)
    if unseen is not None:
        scores.masked_fill_(unseen, low)
    if start is not None:
        m = scores.shape[2]
        later = torch.ones(m, m, dtype=torch.bool, device=scores.device).triu_(1)
        scores[..., start:].masked_fill_(later, low)


def heads_first(
    x: Tensor, keep: Tensor | None, b0: int, b1: int, dtype: torch.dtype, share: int
) -> Tensor:
    """[share, G * C, N, d] of C batch items, zero where nothing counts; of one float32 item a view.

    Heads that share a key are side by side in x, and ``G * C`` apart here.
    """
    x = _share_first(x[b0:b1], share).to(dtype)
    if keep is not None:
        x = torch.where(keep[b0:b1, :, None], x, 0)
    return x.flatten(1, 2)


def _reordered(x: Tensor, share: int, other: int) -> Tensor:
    """[H, ...], heads as of keys that so many share, in the order where others do."""
    natural = torch.unflatten(x, 0, (share, -1)).transpose(0, 1).flatten(0, 1)
    return torch.unflatten(natural, 0, (-1, other)).transpose(0, 1).flatten(0, 1)


def _share_first(x: Tensor, share: int) -> Tensor:
    """[share, G, C, ...] of [C, G * share, ...]."""
    return torch.unflatten(x, 1, (-1, share)).transpose(0, 2)


def _heads_last(
    x: Tensor, keep: Tensor | None, b0: int, b1: int, dtype: torch.dtype, share: int = 1
) -> Tensor:
    """[C, N, G * d] of C batch items; a view of a tensor laid out as [B, N, G, d].

    Of heads that share a key, the sum.
    """
    x = x[b0:b1].to(dtype)
    if share > 1:
        x = torch.unflatten(x, 1, (-1, share)).sum(2)
    x = x.transpose(1, 2).flatten(2)
    return x if keep is None else torch.where(keep[b0:b1, :, None], x, 0)


def log2_normaliser(
    side: Side, keep: Tensor | None, b0: int, b1: int, dtype: torch.dtype
) -> Tensor | None:
    """[H, C, Nq] base-2 log-sum-exp, heads as in ``heads_first``, 0 for queries that do not count
    (theirs may be infinite)."""
    if side.lse is None:
        return None
    x = _share_first(side.lse[b0:b1], side.share).flatten(0, 1).to(dtype) * LOG2_E
    return x if keep is None else torch.where(keep[b0:b1], x, 0)
