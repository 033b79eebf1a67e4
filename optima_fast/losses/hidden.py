"""Losses of hidden states, projected where student and teacher differ in width."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optima_fast.losses import backends, checks, ops, reference
from optima_fast.losses.checks import Layers, OptionalLayers


def hidden_mse(
    student: Layers,
    teacher: Layers,
    weight: OptionalLayers = None,
    *,
    mask: OptionalLayers = None,
    normalize: bool = False,
    backend: str = "auto",
    recompute: bool = False,
) -> Tensor:
    r"""Mean squared error between projected student and teacher hidden states, one value a layer.

    .. math:: L_l = \frac{1}{n\, d_t} \sum_{i \text{ counts}} \lVert h^s_i W - h^t_i \rVert^2

    with :math:`n` counted tokens; 0 with gradient 0 when there is none. A masked token may hold nan
    or inf. Gradients go to ``student`` and ``weight``, never to ``teacher``. Products and sums are
    kept in float32 (float64 if an input is float64); under autocast what is projected is rounded to
    its dtype first, as ``torch.matmul`` does. A gradient comes in its input's dtype. Differentiable
    once, except with ``backend="reference"``.

    With ``normalize`` divided by the mean square of the teacher's counted states, so that layers
    of different size weigh alike.

    OPTIMA, Eq. 3; normalised as in NVIDIA's Model Optimizer.

    Args:
        student: ``[..., N, d_s]``, or a sequence of L such; float16, bfloat16, float32 or float64,
            any strides.
        teacher: ``[..., N, d_t]``, as many; the dtype may differ from the student's.
        weight: ``[d_s, d_t]``, as many; None, for all layers or for one, where the student's states
            are compared as they are and d_s = d_t. That is plain PyTorch on any backend: there is
            no product to fuse with.
        mask: ``[..., N]`` bool, True where the token counts: one for all layers, or one (or None)
            per layer. Default: every token.
        normalize: divide by the mean square of what is matched.
        backend: ``"auto"``, ``"triton"``, ``"blockwise"`` or ``"reference"``.
        recompute: keep nothing between forward and backward but the inputs: backward computes each
            layer again, one at a time. Else each layer keeps its residual ``[B, N, d_t]`` in the
            student's dtype (``triton``), or the unit gradients, of the size of the student and the
            weight (``blockwise``). The reference backend keeps what autograd keeps.

    Returns:
        ``[L]`` float32 (float64 if an input is float64).

    Raises:
        TypeError: a tensor that is not floating, a mask that is not bool.
        ValueError: an empty list, lists of different lengths, shapes or devices that do not fit, an
            unknown backend, or one that cannot serve the call (with each reason).

    Example:
        >>> import torch, optima_fast
        >>> student, teacher = torch.ones(2, 5, 3), torch.zeros(2, 5, 4)
        >>> optima_fast.hidden_mse(student, teacher, torch.ones(3, 4))
        tensor([9.])
    """
    checks.flags("normalize", normalize, 1)
    losses = _hidden("mse", student, teacher, weight, mask, backend, recompute)
    if not normalize:
        return losses
    teachers = checks.listed(teacher)
    shapes = [tuple(t.shape[:-1]) for t in teachers]
    masks = checks.masks("mask", mask, shapes, teachers[0].device)
    sizes = [_mean_square(t, m, losses.dtype) for t, m in zip(teachers, masks, strict=True)]
    return losses / torch.stack(sizes)


def hidden_cosine(
    student: Layers,
    teacher: Layers,
    weight: OptionalLayers = None,
    *,
    mask: OptionalLayers = None,
    backend: str = "auto",
    recompute: bool = False,
) -> Tensor:
    r"""Cosine distance between projected student and teacher hidden states, one value a layer.

    .. math:: L_l = \frac{1}{n} \sum_{i \text{ counts}} 1 - \cos(h^s_i W, h^t_i)

    The cosine of a state that is 0 is 0. Arguments, gradients, dtypes and errors are those of
    :func:`hidden_mse`. ``triton`` rounds projected states to the student's dtype, as a product
    under autocast does.

    DistilBERT's cosine loss, and that of hidden states in NVIDIA's Model Optimizer.

    Example:
        >>> import torch, optima_fast
        >>> optima_fast.hidden_cosine(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([0.])
    """
    return _hidden("cosine", student, teacher, weight, mask, backend, recompute)


def hidden_smooth_l1(
    student: Layers,
    teacher: Layers,
    weight: OptionalLayers = None,
    *,
    beta: float = 1.0,
    mask: OptionalLayers = None,
    backend: str = "auto",
    recompute: bool = False,
) -> Tensor:
    r"""Smooth L1 distance between projected student and teacher hidden states, one value a layer.

    The mean over counted tokens and :math:`d_t` of :math:`x^2 / (2 \beta)` where
    :math:`|x| < \beta` and :math:`|x| - \beta / 2` elsewhere, :math:`x = h^s W - h^t`: less drawn
    by a few large features than the squared error. Arguments, gradients, dtypes, backends and
    errors are those of :func:`hidden_mse`.

    Args:
        beta: where the square ends, above 0.

    Source: ``torch.nn.functional.smooth_l1_loss``.

    Example:
        >>> import torch, optima_fast
        >>> optima_fast.hidden_smooth_l1(torch.zeros(4, 2), torch.full((4, 2), 3.0))
        tensor([2.5000])
    """
    beta = checks.positive("beta", beta)
    return _hidden("smooth_l1", student, teacher, weight, mask, backend, recompute, beta)


def _hidden(
    measure: str,
    student: Layers,
    teacher: Layers,
    weight: OptionalLayers,
    mask: OptionalLayers,
    backend: str,
    recompute: bool,
    beta: float | None = None,  # a float by default would be a symbol to a dynamic graph
) -> Tensor:
    """One value a layer of any of the measures that ``reference.hidden_loss`` defines."""
    checks.option("backend", backend, backends.NAMES)
    checks.flags("recompute", recompute, 1)
    if weight is None:
        weight = [None] * len(checks.listed(student))
    students, teachers, weights = checks.floating_layers(
        optional="weight", student=student, teacher=teacher, weight=weight
    )
    for s, t, w in zip(students, teachers, weights, strict=True):
        checks.hidden_shapes(s, t, w)
    shapes = [tuple(s.shape[:-1]) for s in students]
    masks = checks.masks("mask", mask, shapes, students[0].device)
    every = range(len(students))
    projected = [i for i in every if weights[i] is not None]
    for x in (students, weights):
        for i, low in zip(projected, checks.multiplied([x[i] for i in projected]), strict=True):
            x[i] = low
    fused = [] if backend == "reference" else projected
    dtype = reference.accumulator(*students, *teachers, *(w for w in weights if w is not None))
    losses = {
        i: reference.hidden_loss(
            students[i], teachers[i], weights[i], masks[i],
            measure=measure, beta=beta or 1.0, dtype=dtype,
        )
        for i in every
        if i not in fused
    }  # fmt: skip
    if fused:
        found: Tensor = ops.hidden_loss(
            [_batched(students[i], 2) for i in fused],
            [_batched(teachers[i].detach(), 2) for i in fused],
            [weights[i] for i in fused],
            [None if x is None else _batched(x, 1) for x in (masks[i] for i in fused)],
            measure,
            beta or 1.0,
            ops.needed([students[i] for i in fused]),
            ops.needed([weights[i] for i in fused]),
            backend,
            recompute,
        )[0]
        if not losses:
            return found
        losses.update(zip(fused, found.to(dtype).unbind(), strict=True))
    return torch.stack([losses[i] for i in every])


def _mean_square(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Of the states that count; 1 where there is none."""
    if mask is None:
        mask = torch.ones_like(x[..., 0], dtype=torch.bool)
    total = torch.where(mask[..., None], x.detach(), 0).to(dtype).square().sum()
    size = total / (mask.sum() * x.shape[-1]).clamp(min=1)
    return torch.where(mask.any(), size, 1)


def _batched(x: Tensor, inner: int) -> Tensor:
    """All leading dimensions as one: [B, N, d] of [..., N, d]; a view if it can be."""
    return x.reshape(math.prod(x.shape[:-inner]), *x.shape[x.ndim - inner :])
