"""The backends of the losses: what each computes forward and backward, and when it may be taken.

A backend is an entry in ``HIDDEN``, ``ATTENTION`` or ``INDEXER``; the operators of ``ops.py`` hand
it all layers of a call at once. ``auto`` is decided in ``resolve`` alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optima_fast.losses import blockwise
from optima_fast.losses.reference import accumulator
from optima_fast.losses.strips import Strip

NAMES = ("auto", "triton", "blockwise", "reference")


class HiddenInputs(NamedTuple):
    """What losses of hidden states are computed from; lists have an entry a layer."""

    student: list[Tensor]  # [B, N, d_s]
    teacher: list[Tensor]  # [B, N, d_t]
    weight: list[Tensor]  # [d_s, d_t]
    mask: list[Tensor | None]  # [B, N]
    measure: str  # of reference.hidden_loss
    beta: float
    need_student: list[bool]
    need_weight: list[bool]

    @property
    def trained(self) -> list[Tensor]:
        """The inputs that have gradients: the first of every layer, then the second."""
        return [*self.student, *self.weight]

    @property
    def needed(self) -> list[bool]:
        """Which of them are wanted."""
        return [*self.need_student, *self.need_weight]

    @property
    def tensors(self) -> list[Tensor]:
        """All that are multiplied."""
        return [*self.student, *self.teacher, *self.weight]


class AttentionInputs(NamedTuple):
    """What losses of attention maps are computed from; lists have an entry a layer."""

    student_q: list[Tensor]  # [B, H_s, Nq, d_s]
    student_k: list[Tensor]  # [B, G_s, Nk, d_s]
    teacher_q: list[Tensor]  # [B, H_t, Nq, d_t]
    teacher_k: list[Tensor]  # [B, G_t, Nk, d_t]
    query_mask: list[Tensor | None]  # [B, Nq]
    key_mask: list[Tensor | None]  # [B, Nk]
    student_lse: list[Tensor | None]  # [B, H_s, Nq]
    teacher_lse: list[Tensor | None]  # [B, H_t, Nq]
    student_scale: list[float]
    teacher_scale: list[float]
    target: str  # of reference.attention_loss; "kl-each": kl with a group for each head
    causal: list[bool]
    window: list[int]  # 0: none
    need_q: list[bool]
    need_k: list[bool]

    @property
    def trained(self) -> list[Tensor]:
        """The inputs that have gradients: the first of every layer, then the second."""
        return [*self.student_q, *self.student_k]

    @property
    def needed(self) -> list[bool]:
        """Which of them are wanted."""
        return [*self.need_q, *self.need_k]

    @property
    def tensors(self) -> list[Tensor]:
        """All that are multiplied."""
        return [*self.student_q, *self.student_k, *self.teacher_q, *self.teacher_k]


class IndexerInputs(NamedTuple):
    """What ``indexer_kl`` is computed from; lists have an entry a layer."""

    q: list[Tensor]  # [B, H, Nq, d]
    k: list[Tensor]  # [B, Nk, d]
    weight: list[Tensor]  # [B, H, Nq]
    teacher_q: list[Tensor]  # [B, H_t, Nq, d_t]
    teacher_k: list[Tensor]  # [B, G_t, Nk, d_t]
    query_mask: list[Tensor | None]  # [B, Nq]
    key_mask: list[Tensor | None]  # [B, Nk]
    teacher_lse: list[Tensor | None]  # [B, H_t, Nq]
    teacher_scale: list[float]
    causal: list[bool]
    need_q: list[bool]
    need_k: list[bool]
    need_weight: list[bool]

    @property
    def trained(self) -> list[Tensor]:
        """The inputs that have gradients: the first of every layer, then the second, the third."""
        return [*self.q, *self.k, *self.weight]

    @property
    def needed(self) -> list[bool]:
        """Which of them are wanted."""
        return [*self.need_q, *self.need_k, *self.need_weight]

    @property
    def tensors(self) -> list[Tensor]:
        """All that are multiplied."""
        return [*self.q, *self.k, *self.weight, *self.teacher_q, *self.teacher_k]


Inputs = Any  # HiddenInputs, AttentionInputs or IndexerInputs, whichever loss the backend is of
Gradients = list[Tensor | None]  # of ``trained``; None where none was wanted


class Backend(NamedTuple):
    """How one backend computes one loss, for all layers."""

    forward: Callable[..., tuple[Tensor, list[Tensor]]]
    """Losses [L], and what backward needs: nothing where no gradient is wanted."""
    saved_like: Callable[[Inputs], list[Tensor]]
    """Tensors of the shapes, strides and dtypes of what ``forward`` keeps."""
    backward: Callable[..., Gradients] | None
    """From upstream gradients [L] and what was kept. None: what ``forward`` keeps are the unit
    gradients of ``trained``, to be scaled."""
    refusals: Callable[[Inputs], list[str]]
    """Why it cannot serve these inputs; empty if it can."""
    wins: Callable[[Inputs], bool] = lambda inputs: True
    """Whether ``auto`` takes it where it can serve."""
    only_forward: Callable[[Inputs], set[str]] = lambda inputs: set()
    """Fields that backward does without, unless it computes again; they are not kept."""
    strips: bool = False
    """Whether ``forward`` and ``backward`` take a ``Strip`` of one layer too, as last argument."""


def resolve(backends: dict[str, Backend], backend: str, inputs: Inputs) -> Backend:
    """The backend that serves these inputs: the one asked for; with ``auto``, Triton where the
    tensors are on a CUDA device and it serves and wins, else blockwise.

    Raises:
        ValueError: ``triton`` was asked for and cannot serve; the message lists each reason.
    """
    if backend == "triton":
        reasons = _triton_refusals(backends, inputs)
        if reasons:
            raise ValueError(
                "backend='triton' cannot serve this call: " + "; ".join(reasons) + ". "
                "Use backend='auto', which takes the fastest that can, or 'blockwise'."
            )
    if backend != "auto":
        return backends[backend]
    takes_it = (
        inputs.tensors[0].is_cuda
        and not _triton_refusals(backends, inputs)
        and backends["triton"].wins(inputs)
    )
    return backends["triton" if takes_it else "blockwise"]


def _triton_refusals(backends: dict[str, Backend], inputs: Inputs) -> list[str]:
    if importlib.util.find_spec("triton") is not None:
        return backends["triton"].refusals(inputs)
    device = inputs.tensors[0].device
    reasons = [] if device.type == "cuda" else [f"it needs tensors on a CUDA device, got {device}"]
    return [*reasons, "triton is not installed"]


# ---------------------------------------------------------------------- blockwise


def _blockwise_hidden(x: HiddenInputs) -> tuple[Tensor, list[Tensor]]:
    dtype = accumulator(*x.tensors)
    layers = [
        blockwise.hidden_loss(
            *layer,
            measure=x.measure,
            beta=x.beta,
            need_student=x.need_student[i],
            need_weight=x.need_weight[i],
            dtype=dtype,
        )
        for i, layer in enumerate(zip(*x[:4], strict=True))
    ]
    return _unit_gradients(x, layers)


def _blockwise_attention(x: AttentionInputs) -> tuple[Tensor, list[Tensor]]:
    dtype = accumulator(*x.tensors)
    layers = [
        blockwise.attention_loss(
            *layer,
            target=x.target,
            student_scale=x.student_scale[i],
            teacher_scale=x.teacher_scale[i],
            causal=x.causal[i],
            window=x.window[i],
            need_q=x.need_q[i],
            need_k=x.need_k[i],
            dtype=dtype,
        )
        for i, layer in enumerate(zip(*x[:8], strict=True))
    ]
    return _unit_gradients(x, layers)


def _blockwise_indexer(x: IndexerInputs) -> tuple[Tensor, list[Tensor]]:
    dtype = accumulator(*x.tensors)
    layers = [
        blockwise.indexer_kl(
            *layer,
            teacher_scale=x.teacher_scale[i],
            causal=x.causal[i],
            need_q=x.need_q[i],
            need_k=x.need_k[i],
            need_weight=x.need_weight[i],
            dtype=dtype,
        )
        for i, layer in enumerate(zip(*x[:8], strict=True))
    ]
    return _unit_gradients(x, layers)


def _unit_gradients(x: Inputs, layers: list[blockwise.Gradients]) -> tuple[Tensor, list[Tensor]]:
    losses = torch.stack([layer.loss for layer in layers])
    unit = [gradient for kind in zip(*(x.of for x in layers), strict=True) for gradient in kind]
    return losses, filled(unit, x)


def _unit_like(x: Inputs) -> list[Tensor]:
    pairs = zip(x.trained, x.needed, strict=True)
    return filled([blockwise.empty_gradient(t, needed) for t, needed in pairs], x)


def filled(gradients: Gradients, x: Inputs) -> list[Tensor]:
    """An operator returns tensors only: a gradient that nobody wants has no elements."""
    pairs = zip(gradients, x.trained, strict=True)
    return [like.new_empty(0) if g is None else g for g, like in pairs]


# ---------------------------------------------------------------------- Triton


def _triton_hidden(x: HiddenInputs) -> tuple[Tensor, list[Tensor]]:
    from optima_fast.kernels import hidden_mse as kernel

    wanted = any(x.needed)
    losses, residuals, scales = kernel.hidden_mse_forward(
        _rows(x.student), _rows(x.teacher), x.weight, _flat(x.mask),
        beta=x.beta if x.measure == "smooth_l1" else None, need_residual=wanted,
    )  # fmt: skip
    return losses, [*residuals, scales] if wanted else []


def _triton_hidden_saved(x: HiddenInputs) -> list[Tensor]:
    residuals = [
        s.new_empty(s.shape[0] * s.shape[1], t.shape[2])
        for s, t in zip(x.student, x.teacher, strict=True)
    ]
    return [*residuals, _scales_like(x)]


def _triton_hidden_backward(grad: Tensor, saved: list[Tensor], x: HiddenInputs) -> Gradients:
    from optima_fast.kernels import hidden_mse as kernel

    *residuals, scales = saved
    first, second = kernel.hidden_mse_backward(
        grad,
        _rows(x.student),
        x.weight,
        _flat(x.mask),
        residuals,
        scales,
        need_student=x.need_student,
        need_weight=x.need_weight,
    )
    return [_laid_out(g, like) for g, like in zip([*first, *second], x.trained, strict=True)]


def _rows(layers: list[Tensor]) -> list[Tensor]:
    return [x.flatten(0, 1) for x in layers]


def _flat(masks: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.flatten() for x in masks]


def _laid_out(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """In the layout of ``torch.empty_like``, which is what the operator promises."""
    if gradient is None:
        return None
    out = torch.empty_like(like)
    gradient = gradient.view(like.shape)
    return gradient if gradient.stride() == out.stride() else out.copy_(gradient)


def _scales_like(x: Inputs) -> Tensor:
    scales: Tensor = x.tensors[0].new_empty(len(x[0]), dtype=accumulator(*x.tensors))
    return scales


def _hidden_refusals(x: HiddenInputs) -> list[str]:
    from optima_fast.kernels import hidden_mse as kernel

    reasons: list[str] = kernel.not_served(x.student, x.teacher, x.weight)
    if x.measure == "cosine":
        reasons.append("it computes squared and smooth L1 errors, got cosine")
    return reasons


def _triton_attention(
    x: AttentionInputs, strip: Strip | None = None
) -> tuple[Tensor, list[Tensor]]:
    settings: dict[str, Any] = {
        "causal": x.causal,
        "window": x.window,
        "student_scale": x.student_scale,
        "teacher_scale": x.teacher_scale,
        "need_residual": any(x.needed),
        "first": strip and strip.first,
    }
    if x.target == "scores":
        from optima_fast.kernels import attention_scores as scores

        losses, residuals, scales = scores.attention_scores_forward(*x[:6], **settings)
        return losses, [*residuals, scales] if residuals else []
    if x.target == "kl-each":
        from optima_fast.kernels import attention_kl as kl

        wanted = settings.pop("need_residual")
        del settings["first"]
        losses, *lses_of, scales = kl.attention_kl_forward(*x[:8], **settings)
        kept = _kept(x, *lses_of)
        return losses, [*kept, scales] if wanted else []
    from optima_fast.kernels import attention_probs as probs

    losses, residuals, lses, scales = probs.attention_probs_forward(
        *x[:8], **settings, divergence=x.target == "kl"
    )
    return losses, [*residuals, *_kept(x, lses), scales] if residuals else []


def _kept(x: AttentionInputs, *lses_of: list[Tensor]) -> list[Tensor]:
    """The students' log-sum-exps, then the teachers'; one that was given is an input, which an
    operator does not return."""
    return [
        like if given is not None else lse
        for lses, givens in zip(lses_of, (x.student_lse, x.teacher_lse), strict=False)
        for lse, given, like in zip(lses, givens, _lses_like(x, givens), strict=True)
    ]


def _restored(x: AttentionInputs, kept: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What ``_kept`` was made of."""
    from optima_fast.kernels.attention_tiles import in_powers_of_two

    givens = [*x.student_lse, *x.teacher_lse][: len(kept)]
    return [
        lse if given is None else in_powers_of_two(given, dtype)
        for lse, given in zip(kept, givens, strict=True)
    ]


def _triton_attention_saved(x: AttentionInputs) -> list[Tensor]:
    pairs = list(zip(x.student_q, x.student_k, strict=True))
    scales = _scales_like(x)
    if x.target == "scores":
        from optima_fast.kernels import attention_scores as scores

        return [*(scores.empty_residual(q, k) for q, k in pairs), scales]
    if x.target == "kl-each":
        return [*_lses_like(x, x.student_lse), *_lses_like(x, x.teacher_lse), scales]
    from optima_fast.kernels import attention_probs as probs

    residuals = [
        q.new_empty(
            q.shape[0],
            q.shape[2],
            probs.residual_width(k.shape[2]),
            dtype=probs.residual_dtype(q.dtype, x.target == "kl"),
        )
        for q, k in pairs
    ]
    return [*residuals, *_lses_like(x, x.student_lse), scales]


def _lses_like(x: AttentionInputs, givens: list[Tensor | None]) -> list[Tensor]:
    """Room for each layer's log-sum-exp; none where it was given."""
    dtype = accumulator(*x.tensors)
    shapes = [
        q.shape[:3] if given is None else (*q.shape[:2], 0)
        for q, given in zip(x.student_q, givens, strict=True)
    ]
    return [x.student_q[0].new_empty(shape, dtype=dtype) for shape in shapes]


def _triton_attention_backward(
    grad: Tensor, saved: list[Tensor], x: AttentionInputs, strip: Strip | None = None
) -> Gradients:
    settings: dict[str, Any] = {
        "causal": x.causal,
        "window": x.window,
        "student_scale": x.student_scale,
        "need_q": x.need_q,
        "need_k": x.need_k,
    }
    inputs = (grad, x.student_q, x.student_k, x.query_mask, x.key_mask)
    if x.target == "scores":
        from optima_fast.kernels import attention_scores as scores

        *residuals, scale = saved
        first, second = scores.attention_scores_backward(
            *inputs, residuals, scale, **settings, **_of_strip(strip, scale.dtype)
        )
        return [*first, *second]
    layers, scale = len(x.student_q), saved[-1]
    if x.target == "kl-each":
        from optima_fast.kernels import attention_kl as kl

        lses = _restored(x, saved[:-1], scale.dtype)
        first, second = kl.attention_kl_backward(
            grad, *x[:6], lses[:layers], lses[layers:], scale,
            teacher_scale=x.teacher_scale, **settings,
        )  # fmt: skip
        return [*first, *second]
    from optima_fast.kernels import attention_probs as probs

    lses = _restored(x, saved[layers:-1], scale.dtype)
    first, second = probs.attention_probs_backward(
        *inputs, saved[:layers], lses, scale, **settings, **_of_strip(strip, scale.dtype)
    )
    return [*first, *second]


def _of_strip(strip: Strip | None, dtype: torch.dtype) -> dict[str, Any]:
    """What a backward is told: dK is added up, so in the dtype of sums."""
    if strip is None:
        return {}
    sums = [] if strip.sums is None else [strip.sums]
    return {"first": strip.first, "sums": sums, "dtype": dtype}


def _attention_refusals(x: AttentionInputs) -> list[str]:
    if x.target == "scores":
        from optima_fast.kernels import attention_scores as kernel
    else:
        from optima_fast.kernels import attention_probs as kernel
    reasons: list[str] = kernel.not_served(*x[:4])
    return reasons


def _triton_indexer(x: IndexerInputs, strip: Strip | None = None) -> tuple[Tensor, list[Tensor]]:
    from optima_fast.kernels import indexer as kernel

    losses, residuals, lses, scales = kernel.indexer_forward(
        *x[:8], causal=x.causal, teacher_scale=x.teacher_scale, need_residual=any(x.needed),
        first=strip and strip.first,
    )  # fmt: skip
    return losses, [*residuals, *lses, scales] if residuals else []


def _triton_indexer_saved(x: IndexerInputs) -> list[Tensor]:
    from optima_fast.kernels import indexer as kernel

    scales = _scales_like(x)
    residuals = [kernel.empty_residual(q, k) for q, k in zip(x.q, x.k, strict=True)]
    return [*residuals, *(kernel.empty_log_sums(q, scales.dtype) for q in x.q), scales]


def _triton_indexer_backward(
    grad: Tensor, saved: list[Tensor], x: IndexerInputs, strip: Strip | None = None
) -> Gradients:
    from optima_fast.kernels import indexer as kernel

    layers = len(x.q)
    gradients = kernel.indexer_backward(
        grad, x.q, x.k, x.weight, x.query_mask, x.key_mask,
        saved[:layers], saved[layers:-1], saved[-1],
        causal=x.causal, need_q=x.need_q, need_k=x.need_k, need_weight=x.need_weight,
        **_of_strip(strip, saved[-1].dtype),
    )  # fmt: skip
    return [g for kind in gradients for g in kind]


def _indexer_refusals(x: IndexerInputs) -> list[str]:
    from optima_fast.kernels import indexer as kernel

    reasons: list[str] = kernel.not_served(*x[:5])
    return reasons


def _on_tensor_cores(tensors: list[Tensor]) -> bool:
    """Products of 16-bit numbers. Those of float32, IEEE's, are cuBLAS's alone to win."""
    return all(t.dtype in (torch.float16, torch.bfloat16) for t in tensors)


def _attention_wins(x: AttentionInputs) -> bool:
    """A softmax is bound by exponentials and by the maps that others write, in any dtype."""
    return x.target != "scores" or _on_tensor_cores(x.tensors)


def _indexer_wins(x: IndexerInputs) -> bool:
    """A weight of float32 leaves the products as they are."""
    return _on_tensor_cores(x._replace(weight=[]).tensors)


def _teacher(x: AttentionInputs) -> set[str]:
    """What the residual stands for."""
    return set() if x.target == "kl-each" else {"teacher_q", "teacher_k", "teacher_lse"}


HIDDEN = {
    "blockwise": Backend(_blockwise_hidden, _unit_like, None, lambda x: []),
    "triton": Backend(
        _triton_hidden,
        _triton_hidden_saved,
        _triton_hidden_backward,
        _hidden_refusals,
        lambda x: _on_tensor_cores(x.trained),
        lambda x: {"teacher"},
    ),
}
ATTENTION = {
    "blockwise": Backend(_blockwise_attention, _unit_like, None, lambda x: []),
    "triton": Backend(
        _triton_attention,
        _triton_attention_saved,
        _triton_attention_backward,
        _attention_refusals,
        _attention_wins,
        _teacher,
        strips=True,
    ),
}
INDEXER = {
    "blockwise": Backend(_blockwise_indexer, _unit_like, None, lambda x: []),
    "triton": Backend(
        _triton_indexer,
        _triton_indexer_saved,
        _triton_indexer_backward,
        _indexer_refusals,
        _indexer_wins,
        lambda x: {"teacher_q", "teacher_k", "teacher_lse"},
        strips=True,
    ),
}
