"""The losses block by block, on any device: a block's loss and gradients while it is in cache.

A block is some batch items and some query rows (tokens, for the hidden states) with all heads.
Each function takes one layer, unchecked, and returns the loss with the gradients it was asked for,
of the loss itself (an upstream gradient of 1). Nothing of size B * H * Nq * Nk is ever made.

Attention, with A = mean_h P_h, R = A_student - A_teacher on the n valid pairs, else 0:

    scores  P_h = c Q_h K_h^T = S_h          sum over heads = one product of width H d
            dQ = G K,  dK = G^T Q            G = 2 c R / (n H), heads side by side
            heads that share a key: the sum of their queries is one query
    probs   P_h = softmax(S_h)
            dS_h = P_h * (G - r_h)           r_h = rowsum(G * P_h)
            dQ_h = dS_h K_h,  dK_h = dS_h^T Q_h
    kl      the same with G = c R / (n H A_student), n the queries that see a key: the gradient of
            the divergence is -A_teacher / A_student, and 1 more changes no softmax
    kl-each dS_h = c (P_h - P_h of the teacher) / (n H)

Least traffic, forward and backward: the inputs once and the gradients once; the maps stay in cache.
Every sum has a fixed order, so results are bit-reproducible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from optima_fast.losses.reference import COSINE_EPS, LEAST_PROBABILITY

# elements of the largest array a block works on, all heads: 4 MB of float32. Of 2**17 .. 2**22 it
# was within 5 % of the fastest at 256 and 1024 tokens, 12 and 16 heads (AVX-512, 32 MB of L3)
BLOCK_ELEMENTS = 2**20

LOG2_E = math.log2(math.e)


class Gradients(NamedTuple):
    """What one layer returns: its loss, and the gradient of each tensor that is trained, None where
    it was not asked for."""

    loss: Tensor
    of: tuple[Tensor | None, ...]


def block_shape(batch: int, rows: int, row_elements: int, *, shared: int = 1) -> tuple[int, int]:
    """How many batch items and rows make a block: whole items, or rows of one item.

    Items share a block up to one ``shared``-th of what a single item may fill.
    """
    room = max(1, BLOCK_ELEMENTS // max(1, row_elements))
    if room >= rows:
        return max(1, min(batch, room // shared // max(1, rows))), rows
    # even blocks, in multiples of 16 rows: a short last one would waste its products
    blocks = math.ceil(rows / room)
    return 1, min(rows, math.ceil(rows / blocks / 16) * 16)


def starts(total: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each block, the last one first."""
    for start in reversed(range(0, total, max(1, step))):
        yield start, min(total, start + step)


def stored(x: Tensor) -> torch.dtype:
    """The dtype of an input's unit gradient, which for a large mean would underflow in float16."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def empty_gradient(x: Tensor, needed: bool) -> Tensor | None:
    """Room for a gradient, in the layout of its input where that is dense."""
    return torch.empty_like(x, dtype=stored(x)) if needed else None


def view(buffer: Tensor, *shape: int) -> Tensor:
    """The first elements of a flat buffer in this shape."""
    return buffer[: math.prod(shape)].view(shape)


def mean(partial: list[Tensor], count: Tensor | float) -> Tensor:
    """The blocks' sums over the count; the order is fixed."""
    return torch.stack(partial).sum() / count


def nothing(like: Tensor, *gradients: Tensor | None) -> Gradients:
    """The result where there is no element at all."""
    zeros = tuple(None if x is None else x.zero_() for x in gradients)
    return Gradients(like.new_zeros(()), zeros)


def hidden_loss(
    student: Tensor,  # [B, N, d_s]
    teacher: Tensor,  # [B, N, d_t]
    weight: Tensor,  # [d_s, d_t]
    mask: Tensor | None,  # [B, N]
    *,
    measure: str,
    beta: float = 1.0,
    need_student: bool,
    need_weight: bool,
    dtype: torch.dtype,
) -> Gradients:
    """Distance of ``student @ weight`` from ``teacher``; gradients of student and weight.

    Where student and weight are bfloat16, the residual is float32's and rounded for the products of
    the gradients, as in the Triton kernels; every sum is float32's.
    """
    (B, N, d_s), d_t = student.shape, weight.shape[1]
    w = weight.to(dtype)
    narrow = torch.bfloat16 if student.dtype == weight.dtype == torch.bfloat16 else dtype
    d_student, d_weight = empty_gradient(student, need_student), empty_gradient(weight, need_weight)
    if not teacher.numel():
        return nothing(w, d_student, d_weight)
    each = 1 if measure == "cosine" else d_t
    count: Tensor | float = float(B * N * each)
    if mask is not None:
        count = (mask.sum() * each).clamp(min=1).to(dtype)
    back = (w / count).to(narrow).t()
    dw = w.new_zeros(d_s, d_t) if need_weight else None
    items, rows = block_shape(B, N, max(d_s, d_t))
    work = w.new_empty(items * rows * d_t)
    partial = []
    for b0, b1 in starts(B, items):
        for i0, i1 in starts(N, rows):
            x = student[b0:b1, i0:i1].reshape(-1, d_s)
            y = teacher[b0:b1, i0:i1].reshape(-1, d_t).to(dtype)
            out = view(work, len(x), d_t)
            masked = None if mask is None else ~mask[b0:b1, i0:i1].reshape(-1, 1)
            if measure == "cosine":
                total, slope = _cosine(torch.mm(x.to(dtype), w, out=out), y, masked)
            else:
                residual = torch.addmm(y, x.to(dtype), w, beta=-1, out=out)
                if masked is not None:
                    residual.masked_fill_(masked, 0)
                total, slope = _square(residual) if measure == "mse" else _smooth(residual, beta)
            partial.append(total)
            if masked is not None:
                x = x.masked_fill(masked, 0)
            x, slope = x.to(narrow), slope.to(narrow)
            if d_student is not None:
                d_student[b0:b1, i0:i1] = (slope @ back).view(b1 - b0, i1 - i0, d_s)
            if dw is not None and narrow == dtype:
                dw.addmm_(x.t(), slope)
            elif dw is not None:
                dw += x.t() @ slope
    if d_weight is not None and dw is not None:
        d_weight.copy_(dw.div_(count))
    return Gradients(mean(partial, count), (d_student, d_weight))


def _square(residual: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over a block, and its derivative, which may take the residual's place."""
    total = residual.square().sum()
    return total, residual.mul_(2)


def _smooth(residual: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    total = F.smooth_l1_loss(residual, torch.zeros_like(residual), beta=beta, reduction="sum")
    return total, residual.div_(beta).clamp_(-1, 1)


def _cosine(x: Tensor, y: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same of 1 - cos of the rows of x and y; rows that are masked count nothing."""
    if masked is not None:
        x, y = x.masked_fill_(masked, 0), y.masked_fill(masked, 0)
    length = x.norm(dim=1, keepdim=True)
    inverse = length.clamp(min=COSINE_EPS).reciprocal()
    y = y / y.norm(dim=1, keepdim=True).clamp(min=COSINE_EPS)
    cosine = (x * y).sum(1, keepdim=True) * inverse
    distance = 1 - cosine if masked is None else (1 - cosine).masked_fill(masked, 0)
    # below the least length the length is a constant
    along = (cosine * inverse).masked_fill_(length < COSINE_EPS, 0)
    return distance.sum(), x.mul_(along * inverse).addcmul_(y, inverse, value=-1)


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
    items, rows = block_shape(B, Nq, Nk)
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
    # of one item queries and keys are views, of several copies, which only small maps repay
    items, rows = block_shape(B, Nq, most * Nk, shared=8)
    per_map = (most, most, most, most) if each else (most, most, 1, 1)
    work = [student.q.new_empty(items * rows * Nk * h, dtype=dtype) for h in per_map]
    partial = []
    for b0, b1 in starts(B, items):
        C = b1 - b0
        # heads that share a key are apart from one another, so that each product is of views
        qs, qt = (
            _heads_first(x.q, pairs.queries, b0, b1, dtype, x.share) for x in (student, teacher)
        )
        (ks,), (kt,) = (_heads_first(x.k, pairs.keys, b0, b1, dtype, 1) for x in (student, teacher))
        ls, lt = (_log2_normaliser(x, pairs.queries, b0, b1, dtype) for x in (student, teacher))
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
                factor = side.scale if lse is None else side.scale * LOG2_E
                flat = scores.view(side.share, -1, m, n)
                for x, out in zip(q, flat, strict=True):
                    torch.baddbmm(out, x[:, i0:i1], k[:, j0:j1].mT, beta=0, alpha=factor, out=out)
                _hide(scores, None if hidden is None else hidden[..., j0:j1], unseen, later)
                if each:
                    logs = view(kept, H, C, m, n)
                    if lse is None:
                        torch.log_softmax(scores, -1, out=logs)
                    else:
                        torch.sub(scores, lse[:, :, i0:i1, None], out=logs).mul_(1 / LOG2_E)
                    maps.append(logs)
                    continue
                if lse is None:
                    torch.softmax(scores, -1, out=probs)
                else:
                    torch.sub(scores, lse[:, :, i0:i1, None], out=probs).exp2_()
                maps.append(torch.sum(probs, 0, out=view(kept, C, m, n)))
            if each:
                if teacher.share != student.share:
                    maps[0] = _reordered(maps[0], teacher.share, student.share)
                total, d_scores = _divergence_of_each(maps[0], maps[1], scores, uncounted)
                d_scores.mul_(student.scale / H / number)
            else:
                compare = _square_of_means if target == "probs" else _divergence_of_means
                total, slope = compare(maps[0], maps[1], teacher.heads, H, uncounted)
                slope.mul_(student.scale / H / number)
                d_scores = torch.mul(probs, slope, out=scores)
                d_scores.addcmul_(probs, d_scores.sum(-1, keepdim=True), value=-1)
            partial.append(total)
            for j, flat in enumerate(d_scores.view(student.share, -1, m, n)):
                if d_q is not None:
                    product = (flat @ ks[:, j0:j1]).view(G, C, m, d)
                    d_q[b0:b1, j :: student.share, i0:i1] = product.transpose(0, 1)
                if dk is not None:
                    dk[:, :, j0:j1].baddbmm_(qs[j][:, i0:i1].mT, flat)
        if d_k is not None and dk is not None:
            d_k[b0:b1] = dk.view(G, C, d, Nk).transpose(0, 1).mT
    return Gradients(mean(partial, number * H if each else number), (d_q, d_k))


# What a block adds to the sum, and its derivative by the mean map or the scores: teacher first, of
# maps summed over their heads, whose memory may be used.


def _square_of_means(
    teacher: Tensor, student: Tensor, heads_t: int, heads_s: int, uncounted: Tensor | None
) -> tuple[Tensor, Tensor]:
    residual = student.div_(heads_s).sub_(teacher, alpha=1 / heads_t)
    if uncounted is not None:
        residual.masked_fill_(uncounted, 0)
    return residual.square().sum(), residual.mul_(2)


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


def indexer_kl(
    q: Tensor,  # [B, H, Nq, d]
    k: Tensor,  # [B, Nk, d]
    weight: Tensor,  # [B, H, Nq]
    teacher_q: Tensor,  # [B, H_t, Nq, d_t]
    teacher_k: Tensor,  # [B, G_t, Nk, d_t]
    query_mask: Tensor | None,  # [B, Nq]
    key_mask: Tensor | None,  # [B, Nk]
    teacher_lse: Tensor | None,  # [B, H_t, Nq]
    *,
    teacher_scale: float,
    causal: bool,
    need_q: bool,
    need_k: bool,
    need_weight: bool,
    dtype: torch.dtype,
) -> Gradients:
    """Divergence of softmax(sum_h w_h relu(q_h k)) from the teacher's mean map, P.

    With I the sum and n the queries that see a key: dI = (softmax(I) - P) / n,
    dw_h = rowsum(dI * relu(S_h)), dS_h = w_h dI where S_h > 0, dq_h = dS_h k, dk = the sum over h
    of dS_h^T q_h.
    """
    (B, H, Nq, d), Nk = q.shape, k.shape[1]
    needs = ((q, need_q), (k, need_k), (weight, need_weight))
    d_q, d_k, d_w = (empty_gradient(x, needed) for x, needed in needs)
    if not B * Nq * Nk:
        return nothing(q.new_empty(0, dtype=dtype), d_q, d_k, d_w)
    teacher = Side(teacher_q, teacher_k, teacher_scale, teacher_lse)
    pairs = valid_pairs(query_mask, key_mask, causal, 0, (B, Nq, Nk), dtype)
    number = pairs.rows(B, Nq, dtype)
    most = max(H, teacher.heads)
    _, rows = block_shape(B, Nq, most * Nk)
    work = [q.new_empty(rows * Nk * h, dtype=dtype) for h in (most, most, 1, 1)]
    partial = []
    for b in reversed(range(B)):
        (qs,) = _heads_first(q, pairs.queries, b, b + 1, dtype, 1)
        (ks,) = _heads_first(k[:, None], pairs.keys, b, b + 1, dtype, 1)
        qt = _heads_first(teacher.q, pairs.queries, b, b + 1, dtype, teacher.share)
        (kt,) = _heads_first(teacher.k, pairs.keys, b, b + 1, dtype, 1)
        lt = _log2_normaliser(teacher, pairs.queries, b, b + 1, dtype)
        w = weight[b].to(dtype)
        if pairs.queries is not None:
            w = torch.where(pairs.queries[b], w, 0)
        hidden = None if key_mask is None else ~key_mask[b : b + 1, None, :]
        dk = ks.new_zeros(Nk, d) if d_k is not None else None
        for i0, i1 in starts(Nq, rows):
            j1 = i1 if causal else Nk
            m, n = i1 - i0, j1
            later = i0 if causal else None
            seen = None if hidden is None else hidden[..., :j1]
            scores, probs = (view(x, teacher.heads, 1, m, n) for x in work[:2])
            factor = teacher.scale if lt is None else teacher.scale * LOG2_E
            for x, out in zip(qt, scores.view(teacher.share, -1, m, n), strict=True):
                torch.baddbmm(out, x[:, i0:i1], kt[:, :j1].mT, beta=0, alpha=factor, out=out)
            _hide(scores, seen, None, later)
            if lt is None:
                torch.softmax(scores, -1, out=probs)
            else:
                torch.sub(scores, lt[:, :, i0:i1, None], out=probs).exp2_()
            target = torch.sum(probs, 0, out=view(work[2], 1, m, n))[0].div_(teacher.heads)
            products, slopes = (view(x, H, m, n) for x in work[:2])
            torch.matmul(qs[:, i0:i1], ks[0, :j1].mT, out=products)
            products.relu_()
            index = torch.einsum("hmn,hm->mn", products, w[:, i0:i1])
            _hide(index[None, None], seen, None, later)
            logs = torch.log_softmax(index, -1, out=view(work[3], m, n))
            terms = torch.xlogy(target, target).sub_(target * logs)
            d_index = logs.exp_().sub_(target)
            if pairs.queries is not None:
                uncounted = ~pairs.queries[b, i0:i1, None]
                terms.masked_fill_(uncounted, 0)
                d_index.masked_fill_(uncounted, 0)
            partial.append(terms.sum())
            d_index.div_(number)
            if d_w is not None:
                d_w[b, :, i0:i1] = torch.einsum("hmn,mn->hm", products, d_index)
            if d_q is None and dk is None:
                continue
            torch.mul(products.sign_(), d_index, out=slopes)
            if d_q is not None:
                d_q[b, :, i0:i1] = (slopes @ ks[0, :j1]) * w[:, i0:i1, None]
            if dk is not None:
                weighted = qs[:, i0:i1] * w[:, i0:i1, None]
                dk[:j1].addmm_(slopes.flatten(0, 1).t(), weighted.flatten(0, 1))
        if d_k is not None and dk is not None:
            d_k[b] = dk
    return Gradients(mean(partial, number), (d_q, d_k, d_w))


def _hide(scores: Tensor, hidden: Tensor | None, unseen: Tensor | None, start: int | None) -> None:
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


def _heads_first(
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


def _log2_normaliser(
    side: Side, keep: Tensor | None, b0: int, b1: int, dtype: torch.dtype
) -> Tensor | None:
    """[H, C, Nq] base-2 log-sum-exp, heads as in ``_heads_first``, 0 for queries that do not count
    (theirs may be infinite)."""
    if side.lse is None:
        return None
    x = _share_first(side.lse[b0:b1], side.share).flatten(0, 1).to(dtype) * LOG2_E
    return x if keep is None else torch.where(keep[b0:b1], x, 0)
