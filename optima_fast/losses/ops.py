"""The losses as PyTorch operators: one call for all layers, whatever their shapes.

``optima_fast::hidden_mse`` and ``optima_fast::attention_mse`` return the losses [L], a marker and
the unit gradients, which the forward pass computes while a block is in cache. Backward multiplies
them by the upstream gradient and leaves them as they are, so a second backward equals the first.

A backend is an entry in ``HIDDEN_MSE`` or ``ATTENTION_MSE``: the operator gets the resolved name
and hands all layers to it. Triton's is one more entry.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optima_fast.losses import blockwise
from optima_fast.losses.reference import accumulator

BACKENDS = ("auto", "triton", "blockwise", "reference")

# (losses [L], unit gradients: L of the first input, then L of the second, None if not needed)
Result = tuple[Tensor, list[Tensor | None]]


class Backend(NamedTuple):
    """How one backend computes one loss, for all layers."""

    run: Callable[..., Result]
    refusals: Callable[[Sequence[Tensor]], list[str]]
    """Why it cannot serve these inputs; empty if it can."""
    automatic: bool = True
    """Whether ``auto`` may take it."""


def resolve(backends: dict[str, Backend], backend: str, tensors: Sequence[Tensor]) -> str:
    """The backend that serves these inputs: the one asked for, or Triton before blockwise."""
    if backend == "triton":
        reasons = _triton_refusals(backends, tensors)
        if reasons:
            raise ValueError(
                "backend='triton' cannot serve this call: " + "; ".join(reasons) + ". "
                "Use backend='auto', which takes the fastest that can, or 'blockwise'."
            )
    if backend != "auto":
        return backend
    triton = backends.get("triton")
    serves = triton is not None and triton.automatic and not triton.refusals(tensors)
    return "triton" if serves else "blockwise"


def _triton_refusals(backends: dict[str, Backend], tensors: Sequence[Tensor]) -> list[str]:
    triton = backends.get("triton")
    installed = importlib.util.find_spec("triton") is not None
    if triton is not None and installed:
        return triton.refusals(tensors)
    reasons = []
    device = tensors[0].device
    if device.type != "cuda":
        reasons.append(f"it needs tensors on a CUDA device, got {device}")
    if not installed:
        reasons.append("triton is not installed")
    if triton is None:
        reasons.append("this version has no Triton implementation of this loss")
    return reasons


def _blockwise_hidden_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Sequence[Tensor],
    mask: Sequence[Tensor | None],
    need_student: Sequence[bool],
    need_weight: Sequence[bool],
    dtype: torch.dtype,
) -> Result:
    layers = [
        blockwise.hidden_mse(s, t, w, m, need_student=ns, need_weight=nw, dtype=dtype)
        for s, t, w, m, ns, nw in zip(
            student, teacher, weight, mask, need_student, need_weight, strict=True
        )
    ]
    return _collect(layers)


def _blockwise_attention_mse(
    *lists: Sequence[Any],
    target: str,
    causal: Sequence[bool],
    student_scale: Sequence[float],
    teacher_scale: Sequence[float],
    need_q: Sequence[bool],
    need_k: Sequence[bool],
    dtype: torch.dtype,
) -> Result:
    layers = [
        blockwise.attention_mse(
            *layer,
            target=target,
            causal=causal[i],
            student_scale=student_scale[i],
            teacher_scale=teacher_scale[i],
            need_q=need_q[i],
            need_k=need_k[i],
            dtype=dtype,
        )
        for i, layer in enumerate(zip(*lists, strict=True))
    ]
    return _collect(layers)


def _collect(layers: list[blockwise.Gradients]) -> Result:
    losses = torch.stack([layer.loss for layer in layers])
    return losses, [layer.first for layer in layers] + [layer.second for layer in layers]


def _triton_hidden_mse(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weight: Sequence[Tensor],
    mask: Sequence[Tensor | None],
    need_student: Sequence[bool],
    need_weight: Sequence[bool],
    dtype: torch.dtype,
) -> Result:
    from optima_fast.kernels import hidden_mse as kernel

    students = [x.flatten(0, 1) for x in student]
    masks = [None if x is None else x.flatten() for x in mask]
    needed = any((*need_student, *need_weight))
    losses, residuals, scales = kernel.hidden_mse_forward(
        students, [x.flatten(0, 1) for x in teacher], weight, masks, need_residual=needed
    )
    if not needed:
        return losses, [None] * (2 * len(student))
    first, second = kernel.hidden_mse_backward(
        torch.ones_like(losses),
        students,
        weight,
        masks,
        residuals,
        scales,
        need_student=need_student,
        need_weight=need_weight,
        dtype=blockwise.stored(student[0]),
    )
    unit = [None if g is None else g.view(x.shape) for g, x in zip(first, student, strict=True)]
    unit += [
        None if g is None else g.to(blockwise.stored(w))
        for g, w in zip(second, weight, strict=True)
    ]
    return losses, unit


def _hidden_mse_refusals(tensors: Sequence[Tensor]) -> list[str]:
    from optima_fast.kernels import hidden_mse as kernel

    L = len(tensors) // 3
    reasons: list[str] = kernel.not_served(tensors[:L], tensors[L : 2 * L], tensors[2 * L :])
    return reasons


HIDDEN_MSE = {
    "blockwise": Backend(_blockwise_hidden_mse, lambda tensors: []),
    # by name only, until it has been timed on a card
    "triton": Backend(_triton_hidden_mse, _hidden_mse_refusals, automatic=False),
}
ATTENTION_MSE = {"blockwise": Backend(_blockwise_attention_mse, lambda tensors: [])}


def _outputs(result: Result, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """An operator returns tensors only: a gradient that nobody needs has no elements."""
    losses, unit = result
    pairs = zip(unit, inputs, strict=True)
    return losses, losses.new_empty(0), [x.new_empty(0) if g is None else g for g, x in pairs]


def _fake_outputs(
    inputs: Sequence[Tensor], needed: Sequence[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    losses = inputs[0].new_empty(len(inputs) // 2, dtype=dtype)
    unit = [blockwise.empty_gradient(x, n) for x, n in zip(inputs, needed, strict=True)]
    return _outputs((losses, unit), inputs)


@torch.library.custom_op(
    "optima_fast::hidden_mse",
    mutates_args=(),
    schema="(Tensor[] student, Tensor[] teacher, Tensor[] weight, Tensor?[] mask,"
    " bool[] need_student, bool[] need_weight, str backend) -> (Tensor, Tensor, Tensor[])",
)
def hidden_mse(
    student: list[Tensor],  # L x [B, N, d_s]
    teacher: list[Tensor],  # L x [B, N, d_t]
    weight: list[Tensor],  # L x [d_s, d_t]
    mask: list[Tensor | None],  # L x [B, N]
    need_student: list[bool],
    need_weight: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses [L], a marker [0], unit gradients of every student, then of every weight."""
    dtype = accumulator(*student, *teacher, *weight)
    with torch.autocast(student[0].device.type, enabled=False):
        result = HIDDEN_MSE[backend].run(
            student, teacher, weight, mask, need_student, need_weight, dtype
        )
    return _outputs(result, (*student, *weight))


@hidden_mse.register_fake
def _(
    student: list[Tensor],
    teacher: list[Tensor],
    weight: list[Tensor],
    mask: list[Tensor | None],
    need_student: list[bool],
    need_weight: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype = accumulator(*student, *teacher, *weight)
    return _fake_outputs((*student, *weight), (*need_student, *need_weight), dtype)


@torch.library.custom_op(
    "optima_fast::attention_mse",
    mutates_args=(),
    schema="(Tensor[] student_q, Tensor[] student_k, Tensor[] teacher_q, Tensor[] teacher_k,"
    " Tensor?[] query_mask, Tensor?[] key_mask, Tensor?[] student_lse, Tensor?[] teacher_lse,"
    " float[] student_scale, float[] teacher_scale, str target, bool[] causal,"
    " bool[] need_q, bool[] need_k, str backend) -> (Tensor, Tensor, Tensor[])",
)
def attention_mse(
    student_q: list[Tensor],  # L x [B, H_s, Nq, d_s]
    student_k: list[Tensor],  # L x [B, H_s, Nk, d_s]
    teacher_q: list[Tensor],  # L x [B, H_t, Nq, d_t]
    teacher_k: list[Tensor],  # L x [B, H_t, Nk, d_t]
    query_mask: list[Tensor | None],  # L x [B, Nq]
    key_mask: list[Tensor | None],  # L x [B, Nk]
    student_lse: list[Tensor | None],  # L x [B, H_s, Nq]
    teacher_lse: list[Tensor | None],  # L x [B, H_t, Nq]
    student_scale: list[float],
    teacher_scale: list[float],
    target: str,
    causal: list[bool],
    need_q: list[bool],
    need_k: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses [L], a marker [0], unit gradients of every student_q, then of every student_k."""
    with torch.autocast(student_q[0].device.type, enabled=False):
        result = ATTENTION_MSE[backend].run(
            student_q,
            student_k,
            teacher_q,
            teacher_k,
            query_mask,
            key_mask,
            student_lse,
            teacher_lse,
            target=target,
            causal=causal,
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            need_q=need_q,
            need_k=need_k,
            dtype=accumulator(*student_q, *student_k, *teacher_q, *teacher_k),
        )
    return _outputs(result, (*student_q, *student_k))


@attention_mse.register_fake
def _(
    student_q: list[Tensor],
    student_k: list[Tensor],
    teacher_q: list[Tensor],
    teacher_k: list[Tensor],
    query_mask: list[Tensor | None],
    key_mask: list[Tensor | None],
    student_lse: list[Tensor | None],
    teacher_lse: list[Tensor | None],
    student_scale: list[float],
    teacher_scale: list[float],
    target: str,
    causal: list[bool],
    need_q: list[bool],
    need_k: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype = accumulator(*student_q, *student_k, *teacher_q, *teacher_k)
    return _fake_outputs((*student_q, *student_k), (*need_q, *need_k), dtype)


class _Scaled(torch.autograd.Function):
    """Unit gradients times the upstream gradient of their layer, in the dtype of their input."""

    @staticmethod
    def forward(
        ctx: Any, marker: Tensor, upstream: Tensor, dtypes: list[torch.dtype], *unit: Tensor
    ) -> tuple[Tensor, ...]:
        L = len(upstream)
        return tuple(
            (g * upstream[i % L]).to(dtype)
            for i, (g, dtype) in enumerate(zip(unit, dtypes, strict=True))
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "optima_fast losses can be differentiated once: their gradients are computed with the "
            "loss. For a second derivative use backend='reference'."
        )


def _differentiate(op: Any, first: int, second: int) -> None:
    """Register autograd for an operator: gradients of the inputs at two positions, no others."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, marker, unit = output
        ctx.mark_non_differentiable(*unit)
        ctx.set_materialize_grads(False)  # else each unit gradient gets zeros of its size
        # the marker requires grad, so a backward that is itself recorded leads to _Scaled.backward
        ctx.save_for_backward(marker, *unit)
        ctx.dtypes = [x.dtype for x in (*inputs[first], *inputs[second])]
        ctx.lists = [
            len(x) if isinstance(x, list) and all(isinstance(y, Tensor) for y in x) else None
            for x in inputs
        ]

    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
        grads: list[Any] = [None if n is None else [None] * n for n in ctx.lists]
        if upstream is not None:
            marker, *unit = ctx.saved_tensors
            L = len(upstream)
            scaled: Any = _Scaled.apply(marker, upstream, ctx.dtypes, *unit)  # type: ignore[no-untyped-call]
            for place, values in ((first, scaled[:L]), (second, scaled[L:])):
                needed = ctx.needs_input_grad[place]
                grads[place] = [g if n else None for g, n in zip(values, needed, strict=True)]
        return tuple(grads)

    op.register_autograd(backward, setup_context=setup_context)


_differentiate(hidden_mse, 0, 2)
_differentiate(attention_mse, 0, 1)
