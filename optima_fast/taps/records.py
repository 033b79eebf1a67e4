"""What a layer did: what the losses are computed from, whoever recorded it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Attention(NamedTuple):
    """The queries and keys of one attention, and which pairs of them count.

    Attributes:
        q: ``[B, H, Nq, d]``, after rotary embedding and any norm, before the scale.
        k: ``[B, G, Nk, d]``, with G dividing H (grouped queries), likewise.
        causal: a query sees no later key.
        window: a query sees only keys less than so many places away; None: no such limit.
        query_mask: ``[B, Nq]`` bool, True where a query counts; None: each does.
        key_mask: ``[B, Nk]`` bool, likewise.
        scale: of the scores; None: ``1 / sqrt(d)``.
        lse: ``[B, H, Nq]`` natural log-sum-exp of the scaled scores over the keys that count.
    """

    q: Tensor
    k: Tensor
    causal: bool = False
    window: int | None = None
    query_mask: Tensor | None = None
    key_mask: Tensor | None = None
    scale: float | None = None
    lse: Tensor | None = None


class Layer(NamedTuple):
    """One layer's record.

    Attributes:
        hidden: ``[B, N, d]`` states after the layer.
        mask: ``[B, N]`` bool, True where a token counts; None: each does.
        attentions: its self-attention, then its cross-attention if it has one.
        refusals: for each attention that the losses cannot represent, the reason.
    """

    hidden: Tensor
    mask: Tensor | None
    attentions: tuple[Attention, ...]
    refusals: tuple[str, ...] = ()
