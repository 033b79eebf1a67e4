"""Losses of attention maps, from queries and keys: no map is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optima_fast.losses import backends, checks, ops, reference
from optima_fast.losses.checks import Layers, OptionalLayers


def attention_mse(
    student_q: Layers,
    student_k: Layers,
    teacher_q: Layers,
    teacher_k: Layers,
    *,
    target: str = "scores",
    heads: str | int = "mean",
    causal: bool | Sequence[bool] = False,
    window: int | Sequence[int | None] | None = None,
    query_mask: OptionalLayers = None,
    key_mask: OptionalLayers = None,
    student_lse: OptionalLayers = None,
    teacher_lse: OptionalLayers = None,
    student_scale: float | Sequence[float | None] | None = None,
    teacher_scale: float | Sequence[float | None] | None = None,
    backend: str = "auto",
    recompute: bool = False,
) -> Tensor:
    r"""Mean squared error between head-averaged attention maps, one value a layer.

    .. math:: L_l = \frac{1}{n} \sum_{(i, j) \text{ valid}} (A^s_{ij} - A^t_{ij})^2, \quad
        A = \frac{1}{H} \sum_h c\, Q_h K_h^\top \;\text{ or }\;
        \frac{1}{H} \sum_h \mathrm{softmax}(c\, Q_h K_h^\top)

    A pair is valid if its query counts, its key counts, with ``causal`` the key is not after the
    query, and with ``window`` they are less than so many places apart; :math:`n` is their number,
    and the loss is 0 with gradient 0 when there is none. The softmax is over the valid keys; a
    query without any contributes 0. Tokens in no valid pair may hold nan or inf. Gradients go to
    ``student_q`` and ``student_k``, never to the teacher. Products and sums are kept in float32
    (float64 if an input is float64); under autocast queries and keys are rounded to its dtype
    first, as ``torch.matmul`` does. A gradient comes in its input's dtype. No ``[B, H, Nq, Nk]``
    tensor is made, except with ``backend="reference"``, which alone is differentiable twice.

    OPTIMA, Eq. 4; ``"scores"`` is TinyBERT's attention loss on the head average, and TinyBERT's own
    with ``heads="each"``.

    Args:
        student_q: ``[B, H_s, Nq, d_s]``, or a sequence of L such; float16, bfloat16, float32 or
            float64, any strides (laid out as ``[B, N, H, d]`` nothing is copied).
        student_k: ``[B, G_s, Nk, d_s]``, as many. Grouped queries: G_s divides H_s, and query head
            h takes key head ``h // (H_s / G_s)``, as with ``enable_gqa`` of PyTorch's
            ``scaled_dot_product_attention``; keys are not repeated in memory.
        teacher_q: ``[B, H_t, Nq, d_t]``, as many; heads, d and dtype may differ from the student's.
        teacher_k: ``[B, G_t, Nk, d_t]``, as many; groups may differ from the student's.
        target: ``"scores"``, before the softmax, or ``"probs"``, after it.
        heads: which heads' maps are averaged before they are compared: ``"mean"``, all of them;
            ``"each"``, none, each head of the student is compared with its own of the teacher (with
            as many neighbouring ones where the teacher has several times as many); a number of
            groups, neighbouring heads in equal parts. Of groups the loss is the mean.
        causal: a query sees no later key; one for all layers or one per layer; needs Nq = Nk.
        window: a query sees only keys less than so many places from it (sliding window attention;
            transformers' ``sliding_window`` of causal models); None: no such limit. One for all
            layers or one per layer; needs Nq = Nk.
        query_mask: ``[B, Nq]`` bool, True where the query counts: one for all layers, or one (or
            None) per layer.
        key_mask: ``[B, Nk]`` bool, likewise for keys.
        student_lse: ``[B, H_s, Nq]`` natural log-sum-exp over the valid keys of the student's
            scaled scores, as flash attention returns it; a list may hold None. It saves computing
            the softmax's normaliser, and is taken as that of these q and k: gradients are the full
            ones. The reference backend does not use it. With ``target="probs"`` only.
        teacher_lse: ``[B, H_t, Nq]``, likewise.
        student_scale: c, a float or one per layer. Default: ``1 / sqrt(d_s)``.
        teacher_scale: likewise. Default: ``1 / sqrt(d_t)``.
        backend: ``"auto"``, ``"triton"``, ``"blockwise"`` or ``"reference"``.
        recompute: keep nothing between forward and backward but the inputs: backward computes each
            layer again, one at a time. Else each layer keeps its residual ``[B, Nq, Nk]`` in the
            student's dtype and, for ``"probs"``, a log-sum-exp ``[B, H_s, Nq]`` (``triton``), or
            the unit gradients, of the size of the student's q and k (``blockwise``). A layer whose
            residual would take more than 2 GiB keeps nothing either way; where it would take more
            than 256 MiB and nothing is kept, backward goes through strips of queries. Beside the
            gradients it then needs 256 MiB, and 4 bytes for each element of the student's k. The
            reference backend keeps what autograd keeps.

    Returns:
        ``[L]`` float32 (float64 if an input is float64).

    Raises:
        TypeError: a tensor that is not floating, a mask that is not bool, a scale or ``causal`` of
            another type.
        ValueError: an empty list, lists of different lengths, shapes or devices that do not fit,
            no head, keys' heads that do not divide the queries', ``causal`` or ``window`` with
            Nq != Nk, a window below 1, a log-sum-exp with ``target="scores"``, an unknown target or
            backend, or a backend that cannot serve the call (with each reason).

    Example:
        >>> import torch, optima_fast
        >>> q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4)  # each score is 4 / sqrt(4)
        >>> optima_fast.attention_mse([q, q], [k, k], [q, 0 * q], [k, k])
        tensor([0., 4.])
    """
    checks.option("target", target, ("scores", "probs"))
    return _attention(
        target, (student_q, student_k, teacher_q, teacher_k),
        heads=heads, causal=causal, window=window, query_mask=query_mask, key_mask=key_mask,
        student_lse=student_lse, teacher_lse=teacher_lse,
        student_scale=student_scale, teacher_scale=teacher_scale,
        backend=backend, recompute=recompute,
    )  # fmt: skip


def attention_kl(
    student_q: Layers,
    student_k: Layers,
    teacher_q: Layers,
    teacher_k: Layers,
    *,
    heads: str | int = "each",
    temperature: float = 1.0,
    causal: bool | Sequence[bool] = False,
    window: int | Sequence[int | None] | None = None,
    query_mask: OptionalLayers = None,
    key_mask: OptionalLayers = None,
    student_lse: OptionalLayers = None,
    teacher_lse: OptionalLayers = None,
    student_scale: float | Sequence[float | None] | None = None,
    teacher_scale: float | Sequence[float | None] | None = None,
    backend: str = "auto",
    recompute: bool = False,
) -> Tensor:
    r"""Divergence of the student's attention from the teacher's, one value a layer.

    .. math:: L_l = \frac{\tau^2}{G\, n} \sum_{g=1}^{G} \sum_{i}
        \mathrm{KL}(\bar P^t_{g,i} \,\|\, \bar P^s_{g,i}), \quad
        P_h = \mathrm{softmax}(c\, Q_h K_h^\top / \tau)

    in nats, over the :math:`n` queries that count and see a key that counts; 0 with gradient 0 when
    there is none. :math:`\bar P_g` is the mean over the heads of group :math:`g`: each head by
    itself (``heads="each"``: DIDE, attention transfer), or all of them (``"mean"``). Where a group
    has several heads, a probability of the student below 1e-30 counts as 1e-30, and no gradient
    flows to it.

    With ``heads="each"``, and as many heads in both models of every layer, nothing of size
    ``[Nq, Nk]`` is kept: backward computes the probabilities again.

    Args:
        student_q: and the other tensors, as for :func:`attention_mse`.
        heads: ``"each"``, ``"mean"`` or a number of groups, as for :func:`attention_mse`.
        temperature: :math:`\tau`, above 0; the factor :math:`\tau^2` keeps gradients of one size.
        student_lse: as for :func:`attention_mse`; a log-sum-exp is of temperature 1.

    The other arguments, what is returned and the errors are those of :func:`attention_mse`.

    Source: Wang et al., "MiniLM" (NeurIPS 2020), for the divergence of each head; Hinton et al.,
    "Distilling the knowledge in a neural network" (2015), for the factor of the temperature.

    Example:
        >>> import torch, optima_fast
        >>> q, k = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [2.0]]]])
        >>> optima_fast.attention_kl(q, k, 0 * q, k)  # of a row 1/2, 1/2 from softmax(0, 2)
        tensor([0.4338])
    """
    temperature = checks.positive("temperature", temperature)
    if temperature != 1.0:
        for name, lse in (("student_lse", student_lse), ("teacher_lse", teacher_lse)):
            if lse is not None:
                raise ValueError(
                    f"{name} is that of scores at temperature 1, got temperature={temperature}; "
                    "leave it out"
                )
    losses = _attention(
        "kl", (student_q, student_k, teacher_q, teacher_k),
        heads=heads, causal=causal, window=window, query_mask=query_mask, key_mask=key_mask,
        student_lse=student_lse, teacher_lse=teacher_lse,
        student_scale=student_scale, teacher_scale=teacher_scale,
        backend=backend, recompute=recompute, temperature=temperature,
    )  # fmt: skip
    return losses if temperature == 1.0 else losses * temperature**2


def _attention(
    target: str,
    tensors: tuple[Layers, Layers, Layers, Layers],
    *,
    heads: str | int,
    causal: bool | Sequence[bool],
    window: int | Sequence[int | None] | None,
    query_mask: OptionalLayers,
    key_mask: OptionalLayers,
    student_lse: OptionalLayers,
    teacher_lse: OptionalLayers,
    student_scale: float | Sequence[float | None] | None,
    teacher_scale: float | Sequence[float | None] | None,
    backend: str,
    recompute: bool,
    temperature: float | None = None,  # a float by default would be a symbol to a dynamic graph
) -> Tensor:
    """One value a layer of any of the targets that ``reference.attention_loss`` defines."""
    checks.option("backend", backend, backends.NAMES)
    checks.flags("recompute", recompute, 1)
    given = checks.floating_layers(
        student_q=tensors[0], student_k=tensors[1], teacher_q=tensors[2], teacher_k=tensors[3]
    )
    inputs = [checks.multiplied(x) for x in given]
    queries, keys, teacher_queries, teacher_keys = inputs
    causals = checks.flags("causal", causal, len(queries))
    windows = checks.windows(window, len(queries))
    for *layer, flag, limit in zip(*inputs, causals, windows, strict=True):
        checks.matching_maps(*layer, causal=flag, window=limit)
    groups = checks.groups(heads, *inputs)
    device = queries[0].device
    query_masks = checks.masks(
        "query_mask", query_mask, [(x.shape[0], x.shape[2]) for x in queries], device
    )
    key_masks = checks.masks("key_mask", key_mask, [(x.shape[0], x.shape[2]) for x in keys], device)
    student_lses = checks.normalisers("student_lse", student_lse, queries, target)
    teacher_lses = checks.normalisers("teacher_lse", teacher_lse, teacher_queries, target)
    student_scales = checks.scales("student_scale", student_scale, queries, temperature)
    teacher_scales = checks.scales("teacher_scale", teacher_scale, teacher_queries, temperature)
    if backend == "reference":
        dtype = reference.accumulator(*(x for layers in inputs for x in layers))
        return torch.stack(
            [
                reference.attention_loss(
                    *layer,
                    target=target,
                    causal=causals[i],
                    window=windows[i],
                    student_scale=student_scales[i],
                    teacher_scale=teacher_scales[i],
                    groups=groups[i],
                    dtype=dtype,
                )
                for i, layer in enumerate(zip(*inputs, query_masks, key_masks, strict=True))
            ]
        )
    heads_of = [(q.shape[1], t.shape[1]) for q, t in zip(queries, teacher_queries, strict=True)]
    if target == "kl" and all(n == (g, g) for n, g in zip(heads_of, groups, strict=True)):
        target, groups = "kl-each", [1] * len(groups)
    # other groups are layers of their own, of fewer heads

    def apart(layers: Sequence[Tensor | None]) -> list[Any]:
        return [y for x, n in zip(layers, groups, strict=True) for y in _split(x, n)]

    def repeated(values: Sequence[Any]) -> list[Any]:
        return [x for x, n in zip(values, groups, strict=True) for _ in range(n)]

    students, student_keys = apart(queries), apart(keys)
    losses: Tensor = ops.attention_loss(
        students,
        student_keys,
        apart([x.detach() for x in teacher_queries]),
        apart([x.detach() for x in teacher_keys]),
        repeated(query_masks),
        repeated(key_masks),
        apart([None if x is None else x.detach() for x in student_lses]),
        apart([None if x is None else x.detach() for x in teacher_lses]),
        repeated(student_scales),
        repeated(teacher_scales),
        target,
        repeated(causals),
        repeated(windows),
        ops.needed(students),
        ops.needed(student_keys),
        backend,
        recompute,
    )[0]
    if len(losses) == len(groups):
        return losses
    return torch.stack([part.mean() for part in torch.split(losses, groups)])


def _split(x: Tensor | None, parts: int) -> list[Tensor | None]:
    """The heads of ``[B, H, ...]`` in equal parts; fewer heads than parts serve several each."""
    if x is None or parts == 1:
        return [x] * parts
    pieces = torch.split(x, max(1, x.shape[1] // parts), 1)
    return [piece for piece in pieces for _ in range(parts // len(pieces))]
