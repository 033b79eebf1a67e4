"""The loss that trains the indexer of sparse attention, from its parts: no map is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optima_fast.losses import backends, checks, ops, reference
from optima_fast.losses.checks import Layers, OptionalLayers


def indexer_kl(
    indexer_q: Layers,
    indexer_k: Layers,
    indexer_weight: Layers,
    teacher_q: Layers,
    teacher_k: Layers,
    *,
    causal: bool | Sequence[bool] = True,
    query_mask: OptionalLayers = None,
    key_mask: OptionalLayers = None,
    teacher_lse: OptionalLayers = None,
    teacher_scale: float | Sequence[float | None] | None = None,
    backend: str = "auto",
    recompute: bool = False,
) -> Tensor:
    r"""Divergence of a lightning indexer's choice of keys from attention, one value a layer.

    .. math:: L_l = \frac{1}{n} \sum_i \mathrm{KL}(\bar P_i \,\|\, \mathrm{softmax}_j I_{ij}),
        \quad I_{ij} = \sum_h w_{ih} \, \mathrm{ReLU}(q_{ih} \cdot k_j)

    in nats, over the :math:`n` queries that count and see a key that counts; :math:`\bar P` is the
    mean over heads of the frozen attention's probabilities. Gradients go to the indexer's q, k and
    w. Backend ``blockwise`` works on a block of queries at a time and keeps no ``[Nq, Nk]`` tensor;
    ``triton`` keeps one, softmax - P, in the dtype of q and where a gradient is wanted, up to 2 GiB
    a layer; beyond, and with ``recompute``, see :func:`optima_fast.attention_mse`.

    Args:
        indexer_q: ``[B, H, Nq, d]``, or a sequence of L such: the indexer's queries.
        indexer_k: ``[B, Nk, d]``, as many: one head of keys for all queries.
        indexer_weight: ``[B, H, Nq]``, as many: w, with every factor that scores are scaled by;
            in float16 on a GPU below about 512.
        teacher_q: ``[B, H_t, Nq, d_t]``, as many: queries of the attention that is imitated.
        teacher_k: ``[B, G_t, Nk, d_t]``, as many; G_t divides H_t.
        causal: a query sees no later key; needs Nq = Nk.
        query_mask: and the other arguments, as for :func:`optima_fast.attention_kl`.

    Returns:
        ``[L]`` float32 (float64 if an input is float64).

    Raises:
        TypeError: a tensor that is not floating, a mask that is not bool.
        ValueError: shapes that do not fit, and what :func:`optima_fast.attention_kl` refuses.

    Source: DeepSeek-AI, "DeepSeek-V3.2-Exp" (2025), section 2.1, dense warm-up; equal to
    Megatron-LM's ``compute_dsa_indexer_loss`` without its 1e-10 within the logarithms.

    Example:
        >>> import torch, optima_fast
        >>> q, k, w = torch.ones(1, 1, 2, 4), torch.ones(1, 2, 4), torch.ones(1, 1, 2)
        >>> optima_fast.indexer_kl(q, k, w, q, k[:, None])  # all keys alike to both
        tensor([0.])
    """
    checks.option("backend", backend, backends.NAMES)
    checks.flags("recompute", recompute, 1)
    inputs = checks.floating_layers(
        indexer_q=indexer_q, indexer_k=indexer_k, indexer_weight=indexer_weight,
        teacher_q=teacher_q, teacher_k=teacher_k,
    )  # fmt: skip
    # weights are of heads, elementwise
    inputs = [x if i == 2 else checks.multiplied(x) for i, x in enumerate(inputs)]
    queries, keys, weights, teacher_queries, teacher_keys = inputs
    causals = checks.flags("causal", causal, len(queries))
    for q, k, w, t_q, t_k, flag in zip(*inputs, causals, strict=True):
        checks.indexer_shapes(q, k, w)
        checks.matching_maps(q, k[:, None], t_q, t_k, causal=flag, window=0)
    device = queries[0].device
    q_masks = checks.masks(
        "query_mask", query_mask, [(*x.shape[:1], x.shape[2]) for x in queries], device
    )
    k_masks = checks.masks("key_mask", key_mask, [tuple(x.shape[:2]) for x in keys], device)
    lses = checks.normalisers("teacher_lse", teacher_lse, teacher_queries, "kl")
    scales = checks.scales("teacher_scale", teacher_scale, teacher_queries)
    if backend == "reference":
        dtype = reference.accumulator(*(x for layers in inputs for x in layers))
        return torch.stack(
            [
                reference.indexer_kl(
                    *layer, teacher_scale=scales[i], causal=causals[i], dtype=dtype
                )
                for i, layer in enumerate(zip(*inputs, q_masks, k_masks, strict=True))
            ]
        )
    losses: Tensor = ops.indexer_kl(
        queries,
        keys,
        weights,
        [x.detach() for x in teacher_queries],
        [x.detach() for x in teacher_keys],
        q_masks,
        k_masks,
        [None if x is None else x.detach() for x in lses],
        scales,
        causals,
        ops.needed(queries),
        ops.needed(keys),
        ops.needed(weights),
        backend,
        recompute,
    )[0]
    return losses
