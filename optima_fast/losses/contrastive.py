"""A contrastive loss of hidden states: each token finds its teacher's among others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from optima_fast.losses import checks, reference
from optima_fast.losses.checks import Layers, OptionalLayers


def hidden_contrastive(
    student: Layers,
    teacher: Layers,
    weight: OptionalLayers,
    negatives: Layers,
    *,
    temperature: float = 0.07,
    mask: OptionalLayers = None,
    negatives_mask: OptionalLayers = None,
) -> Tensor:
    r"""InfoNCE of each student token with its teacher's, against K other ones, one value a layer.

    .. math:: L_l = -\frac{1}{n} \sum_{i \text{ counts}} \log
        \frac{e^{\cos(h^s_i W, h^t_i) / \tau}}
        {e^{\cos(h^s_i W, h^t_i) / \tau} + \sum_{k \text{ counts}} e^{\cos(h^s_i W, n_k) / \tau}}

    with :math:`n` counted tokens; 0 with gradient 0 when there is none, and where no negative
    counts. The cosine of a state that is 0 is 0. Gradients go to ``student`` and ``weight``, never
    to ``teacher`` or ``negatives``. Sums are kept in float32 (float64 if an input is float64);
    under autocast products are rounded as ``torch.matmul`` rounds them.

    Plain PyTorch on every device: a product ``[n, d_t] [d_t, K]`` and a cross entropy, of which a
    layer keeps ``[n, K + 1]`` for the backward pass.

    Args:
        student: ``[..., N, d_s]``, or a sequence of L such.
        teacher: ``[..., N, d_t]``, as many: the positives.
        weight: ``[d_s, d_t]``, as many; None, for all layers or for one, where d_s = d_t.
        negatives: ``[K, d_t]``, as many: teacher tokens of earlier batches.
        temperature: :math:`\tau`, above 0.
        mask: ``[..., N]`` bool, True where the token counts: one for all layers, or one (or None)
            per layer. A masked token may hold nan or inf.
        negatives_mask: ``[K]`` bool, likewise.

    Returns:
        ``[L]`` float32 (float64 if an input is float64), in nats.

    Raises:
        TypeError: a tensor that is not floating, a mask that is not bool.
        ValueError: an empty list, lists of different lengths, shapes or devices that do not fit, a
            temperature that is not above 0.

    Source: Fang et al., "Compressing Visual-linguistic Model via Knowledge Distillation" (ICCV
    2021), the token-wise loss with a queue; the cosine and the temperature are those of MoCo (He
    et al., CVPR 2020).

    Example:
        >>> import torch, optima_fast
        >>> x = torch.eye(2)
        >>> optima_fast.hidden_contrastive(x, x, None, x.flip(0)[:1], temperature=1.0)
        tensor([0.5032])
    """
    temperature = checks.positive("temperature", temperature)
    if weight is None:
        weight = [None] * len(checks.listed(student))
    layers = checks.floating_layers(
        optional="weight", student=student, teacher=teacher, weight=weight, negatives=negatives
    )
    students, teachers, weights, others = layers
    for s, t, w, n in zip(*layers, strict=True):
        checks.hidden_shapes(s, t, w)
        if n.ndim != 2 or n.shape[1] != t.shape[-1]:
            raise ValueError(
                f"negatives must be [K, d_t] with d_t = {t.shape[-1]}, got {tuple(n.shape)}"
            )
    device = students[0].device
    masks = checks.masks("mask", mask, [tuple(x.shape[:-1]) for x in students], device)
    counted = checks.masks(
        "negatives_mask", negatives_mask, [tuple(x.shape[:1]) for x in others], device
    )
    dtype = reference.accumulator(*(x for each in layers for x in each if x is not None))
    parts = zip(students, teachers, weights, others, masks, counted, strict=True)
    losses = [_one(s, t, w, n, temperature, m, c, dtype) for s, t, w, n, m, c in parts]
    return torch.stack(losses)


def _one(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    negatives: Tensor,
    temperature: float,
    mask: Tensor | None,
    counted: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    s, t = student.flatten(0, -2), teacher.detach().flatten(0, -2)
    n, keep = negatives.detach(), None if mask is None else mask.flatten()
    if keep is not None:
        s, t = (torch.where(keep[:, None], x, 0) for x in (s, t))
    if counted is not None:
        n = torch.where(counted[:, None], n, 0)
    s, t, n = s.to(dtype), t.to(dtype), n.to(dtype)
    if weight is not None:
        s = (s @ weight.to(dtype)).to(dtype)
    s, t, n = (F.normalize(x, dim=-1) for x in (s, t, n))
    positive = (s * t).sum(-1, keepdim=True)
    other = (s @ n.T).to(dtype)
    if counted is not None:
        other = other.masked_fill(~counted, float("-inf"))
    logits = torch.cat([positive, other], 1) / temperature
    each = logits.logsumexp(1) - logits[:, 0]
    if keep is None:
        return each.sum() / max(len(each), 1)
    return torch.where(keep, each, 0).sum() / keep.sum().clamp_min(1)
