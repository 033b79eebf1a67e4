"""The indexer of sparse attention: a block of its queries, with the teacher's map of it."""

from __future__ import annotations

import torch
from torch import Tensor

from optima_fast.losses.blockwise.attention import (
    Side,
    heads_first,
    hide,
    log2_normaliser,
    probabilities,
    valid_pairs,
)
from optima_fast.losses.blockwise.blocks import (
    Gradients,
    block_shape,
    empty_gradient,
    mean,
    nothing,
    starts,
    view,
)


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
    _, rows = block_shape(B, Nq, most * Nk, causal=causal, gpu=q.is_cuda)
    work = [q.new_empty(rows * Nk * h, dtype=dtype) for h in (most, most, 1, 1)]
    partial = []
    for b in reversed(range(B)):
        (qs,) = heads_first(q, pairs.queries, b, b + 1, dtype, 1)
        (ks,) = heads_first(k[:, None], pairs.keys, b, b + 1, dtype, 1)
        qt = heads_first(teacher.q, pairs.queries, b, b + 1, dtype, teacher.share)
        (kt,) = heads_first(teacher.k, pairs.keys, b, b + 1, dtype, 1)
        lt = log2_normaliser(teacher, pairs.queries, b, b + 1, dtype)
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
            probabilities(
                teacher.scale, qt[:, :, i0:i1], kt[:, :j1],
                None if lt is None else lt[:, :, i0:i1, None], seen, None, later, scores, probs,
            )  # fmt: skip
            target = torch.sum(probs, 0, out=view(work[2], 1, m, n))[0].div_(teacher.heads)
            products, slopes = (view(x, H, m, n) for x in work[:2])
            torch.matmul(qs[:, i0:i1], ks[0, :j1].mT, out=products)
            products.relu_()
            index = torch.einsum("hmn,hm->mn", products, w[:, i0:i1])
            hide(index[None, None], seen, None, later)
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
