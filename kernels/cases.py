"""Calls of every operator that reach each kernel and launch table entry, on data of no content.

Where nothing is launched they run on a CPU: ahead.py compiles what they reach, as the tests do. To
add an operator: a function in ``CASES``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """Which variant of the kernels a call takes.

    Attributes:
        dtype: of the inputs.
        masked: whether padding is masked.
        causal: whether attention is.
        gradient: whether the backward follows.
        layers: of one form.
        widths: of a head, in both models; each in turn.
        few: the sizes that every kernel needs once, not each that has a table entry.
    """

    dtype: torch.dtype
    masked: bool = False
    causal: bool = False
    gradient: bool = True
    layers: int = 3  # padded to four
    widths: tuple[int, ...] = (64, 128)
    few: bool = False

    def tensors(self, *shape: int, heads: bool = False) -> Any:
        """One a layer; ``heads``: of ``[B, H, N, d]`` as attention has them, ``[B, N, H, d]``."""
        if heads:
            items, count, length, width = shape
            found = (torch.zeros(items, length, count, width, dtype=self.dtype).transpose(1, 2)
                     for _ in range(self.layers))  # fmt: skip
        else:
            found = (torch.zeros(shape, dtype=self.dtype) for _ in range(self.layers))
        return list(found)

    def masks(self, *shape: int) -> Any:
        """One a layer."""
        every = torch.ones(shape, dtype=torch.bool)
        return [every.clone() if self.masked else None for _ in range(self.layers)]

    def each(self, value: Any) -> Any:
        """One a layer."""
        return [value] * self.layers

    def flags(self) -> dict[str, Any]:
        """What most operators take by keyword."""
        return {"causal": self.each(self.causal), "student_scale": self.each(0.125)}


def hidden_mse(case: Case) -> None:
    from . import hidden_mse as k

    tokens, student, teacher = 32, 64, 128
    s, t, w = (
        case.tensors(*shape) for shape in ((tokens, student), (tokens, teacher), (student, teacher))
    )
    masks = case.masks(tokens)
    _, e, scales = k.hidden_mse_forward(s, t, w, masks, need_residual=case.gradient)
    if case.gradient:
        flags: dict[str, Any] = {"need_student": case.each(True), "need_weight": case.each(False)}
        wider = torch.float32 if case.dtype == torch.float16 else None
        k.hidden_mse_backward(scales, s, w, masks, e, scales, **flags, dtype=wider)


def attention_scores(case: Case) -> None:
    from . import attention_scores as k

    for n, apart in ((128, True), (64, False))[: 1 if case.few else 2]:
        # heads of a token side by side, or queries of a head
        q, keys, teacher_q, teacher_k = (
            case.tensors(2, heads, n, 64, heads=apart) for heads in (12, 12, 16, 16)
        )
        mask = case.masks(2, n)
        flags = case.flags()
        _, r, scales = k.attention_scores_forward(
            q, keys, teacher_q, teacher_k, mask, mask, **flags, teacher_scale=case.each(0.125),
            need_residual=case.gradient,
        )  # fmt: skip
        if case.gradient:
            need = case.each(True)
            k.attention_scores_backward(
                scales, q, keys, mask, mask, r, scales, **flags, need_q=need, need_k=need
            )


def attention_probs(case: Case) -> None:
    from . import attention_probs as k

    # sweeps, rows with a tail, one block of queries, rows of 256, 128 and 64 keys
    sizes = [(320, 320), (77, 77), (64, 320), (256, 256), (128, 128), (64, 64)]
    for width, (n_q, n_k) in product(case.widths, sizes[:3] if case.few else sizes):
        q, keys, teacher_q, teacher_k = (
            case.tensors(2, heads, n, width, heads=True) for heads in (12, 16) for n in (n_q, n_k)
        )
        none = case.each(None)
        q_mask, k_mask = case.masks(2, n_q), case.masks(2, n_k)
        flags = case.flags()
        _, r, lses, scales = k.attention_probs_forward(
            q, keys, teacher_q, teacher_k, q_mask, k_mask, none, none, **flags,
            teacher_scale=case.each(0.125), need_residual=case.gradient,
        )  # fmt: skip
        if case.gradient:
            need = case.each(True)
            k.attention_probs_backward(
                scales, q, keys, q_mask, k_mask, r, lses, scales, **flags, need_q=need, need_k=need
            )


def attention_kl(case: Case) -> None:
    from . import attention_kl as k
    from . import attention_probs as probs

    n = 320
    for width in case.widths:
        q, keys, teacher_q, teacher_k = (
            case.tensors(2, 12, n, width, heads=True) for _ in range(4)
        )
        mask = case.masks(2, n)
        flags = case.flags() | {"teacher_scale": case.each(0.125)}
        none = case.each(None)
        _, s_lse, t_lse, scales = k.attention_kl_forward(
            q, keys, teacher_q, teacher_k, mask, mask, none, none, **flags
        )
        if case.gradient:
            need = case.each(True)
            k.attention_kl_backward(
                scales, q, keys, teacher_q, teacher_k, mask, mask, s_lse, t_lse, scales,
                **flags, need_q=need, need_k=need,
            )  # fmt: skip
        probs.attention_probs_forward(
            q, keys, teacher_q, teacher_k, mask, mask, none, none, **flags,
            need_residual=case.gradient, divergence=True,
        )  # fmt: skip


def indexer(case: Case) -> None:
    from . import indexer as k

    n = 320
    for width in case.widths:
        q, t_q, t_k = (case.tensors(2, heads, n, width, heads=True) for heads in (16, 12, 4))
        keys = case.tensors(2, n, width)
        w = [x[..., 0] for x in case.tensors(2, 16, n, 1, heads=True)]
        mask = case.masks(2, n)
        flags = {"causal": case.each(case.causal)}
        _, r, lses, scales = k.indexer_forward(
            q, keys, w, t_q, t_k, mask, mask, case.each(None), **flags,
            teacher_scale=case.each(0.125), need_residual=case.gradient,
        )  # fmt: skip
        if case.gradient:
            need = case.each(True)
            k.indexer_backward(
                scales, q, keys, w, mask, mask, r, lses, scales, **flags,
                need_q=need, need_k=need, need_weight=need,
            )  # fmt: skip


def strips(case: Case) -> None:
    """Backward of one layer, of a strip of its queries."""
    from . import attention_probs as probs
    from . import attention_scores as scores
    from . import indexer as index

    if not case.gradient or case.layers > 4:
        return
    case = case._replace(layers=1)
    n, m = 320, 640  # queries, keys: half of them before the strip
    need, sums = case.each(True), case._replace(dtype=torch.float32)
    strip: dict[str, Any] = {"first": m - n, "dtype": torch.float32}
    q_mask, k_mask = case.masks(2, n), case.masks(2, m)
    for width in case.widths:
        q, keys, t_q, t_k = (
            case.tensors(2, heads, size, width, heads=True) for heads in (12, 16) for size in (n, m)
        )
        flags = case.flags()
        forward: dict[str, Any] = {"teacher_scale": case.each(0.125), "need_residual": True}
        forward["first"] = strip["first"]
        backward = strip | {"need_q": need, "need_k": need}
        onto = sums.tensors(2, 12, m, width)
        _, r, scale = scores.attention_scores_forward(
            q, keys, t_q, t_k, q_mask, k_mask, **flags, **forward
        )
        scores.attention_scores_backward(
            scale, q, keys, q_mask, k_mask, r, scale, **flags, **backward, sums=onto
        )
        none = case.each(None)
        for divergence in (False, True):
            _, r, lses, scale = probs.attention_probs_forward(
                q, keys, t_q, t_k, q_mask, k_mask, none, none, **flags, **forward,
                divergence=divergence,
            )  # fmt: skip
            probs.attention_probs_backward(
                scale, q, keys, q_mask, k_mask, r, lses, scale, **flags, **backward, sums=onto
            )
        one_head = case.tensors(2, m, width)
        w = [x[..., 0] for x in case.tensors(2, 12, n, 1, heads=True)]
        causal = {"causal": case.each(case.causal)}
        _, r, lses, scale = index.indexer_forward(
            q, one_head, w, t_q, t_k, q_mask, k_mask, none, **causal, **forward
        )
        index.indexer_backward(
            scale, q, one_head, w, q_mask, k_mask, r, lses, scale, **causal, **backward,
            need_weight=need, sums=sums.tensors(2, m, width),
        )  # fmt: skip


CASES: dict[str, Callable[[Case], None]] = {
    "hidden_mse": hidden_mse,
    "attention_scores": attention_scores,
    "attention_probs": attention_probs,
    "attention_kl": attention_kl,
    "indexer": indexer,
    "strips": strips,
}
