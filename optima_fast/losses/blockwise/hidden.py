"""Hidden states: a block's residual, and both products of its gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from optima_fast.losses.blockwise.blocks import (
    Gradients,
    block_shape,
    empty_gradient,
    mean,
    nothing,
    starts,
    view,
)
from optima_fast.losses.reference import COSINE_EPS


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
    narrow = torch.bfloat16 if student.dtype == weight.dtype == torch.bfloat16 else dtype
    # tensor cores multiply 16-bit numbers exactly and can return float32
    exactly = narrow != dtype and student.is_cuda and hasattr(torch.ops.aten.mm, "dtype")
    w = weight.to(dtype)
    d_student, d_weight = empty_gradient(student, need_student), empty_gradient(weight, need_weight)
    if not teacher.numel():
        return nothing(w, d_student, d_weight)
    each = 1 if measure == "cosine" else d_t
    count: Tensor | float = float(B * N * each)
    if mask is not None:
        count = (mask.sum() * each).clamp(min=1).to(dtype)
    factor = 2 if measure == "mse" else 1  # of the derivative, in the end
    back = (w * (factor / count)).to(narrow).t()
    dw = w.new_zeros(d_s, d_t) if need_weight else None
    items, rows = block_shape(B, N, max(d_s, d_t), gpu=student.is_cuda)
    work = w.new_empty(items * rows * d_t)
    partial = []
    for b0, b1 in starts(B, items):
        for i0, i1 in starts(N, rows):
            x = student[b0:b1, i0:i1].reshape(-1, d_s)
            y = teacher[b0:b1, i0:i1].reshape(-1, d_t).to(dtype)
            out = view(work, len(x), d_t)
            masked = None if mask is None else ~mask[b0:b1, i0:i1].reshape(-1, 1)
            if measure == "cosine":
                product = (
                    torch.mm(x, weight, out_dtype=dtype)
                    if exactly
                    else torch.mm(x.to(dtype), w, out=out)
                )
                total, slope = _cosine(product, y, masked)
            else:
                residual = torch.addmm(y, x.to(dtype), w, beta=-1, out=out)
                if masked is not None:
                    residual.masked_fill_(masked, 0)
                if measure == "mse":
                    total, slope = residual.square().sum(), residual
                else:
                    total, slope = _smooth(residual, beta)
            partial.append(total)
            if masked is not None:
                x = x.masked_fill(masked, 0)
            x, slope = x.to(narrow), slope.to(narrow)
            if d_student is not None:
                d_student[b0:b1, i0:i1] = (slope @ back).view(b1 - b0, i1 - i0, d_s)
            if dw is not None and narrow == dtype:
                dw.addmm_(x.t(), slope)
            elif dw is not None:
                dw += torch.mm(x.t(), slope, out_dtype=dtype) if exactly else x.t() @ slope
    if d_weight is not None and dw is not None:
        d_weight.copy_(dw.mul_(factor / count))
    return Gradients(mean(partial, count), (d_student, d_weight))


def _smooth(residual: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The sum over a block, and its derivative, which takes the residual's place."""
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
