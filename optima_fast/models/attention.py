"""Attention by PyTorch's fused kernels, with the logsumexp they compute when it can be had.

s = q k^T / sqrt(dh)          q: [B, H, N, dh], k, v: [B, H, M, dh]
out = softmax(s) v,  lse = log sum_keys exp(s)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optima_fast.models.basic import linear


class Past:
    """What an attention layer keeps of the tokens of a text that is written one by one.

    Attributes:
        k: ``[B, H, n, dh]`` keys of the n tokens so far, ``None`` before the first.
        v: ``[B, H, n, dh]`` their values.
        source: ``[2, B, H, M, dh]`` keys and values of the other sequence, for cross-attention.
    """

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.source: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.k is None else self.k.shape[2]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``[B, H, 1, dh]`` keys and values; all of them so far."""
        self.k = k if self.k is None else torch.cat([self.k, k], dim=2)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=2)
        return self.k, self.v


class SelfAttention(nn.Module):
    """Multi-head self-attention with one packed projection, in the order q, k, v.

    Args:
        width: Width of the input and output.
        heads: Number of heads.
        out_gain: Factor on the initial output projection.
        cap: Bound on the scores, ``None`` for none.
    """

    def __init__(
        self, width: int, heads: int, *, out_gain: float = 1.0, cap: float | None = None
    ) -> None:
        super().__init__()
        self.heads, self.cap = heads, cap
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width, gain=out_gain)

    def forward(
        self, x: Tensor, *, causal: bool = False, mask: Tensor | None = None, lse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Returns output ``[B, N, d]``, q and k ``[B, H, N, dh]``, and lse (see :func:`attend`)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out, sums = attend(q, k, v, causal=causal, mask=mask, cap=self.cap, lse=lse)
        return self.out(out.transpose(1, 2).flatten(2)), q, k, sums

    def extend(self, x: Tensor, past: Past) -> Tensor:
        """The output ``[B, 1, d]`` of one more token ``[B, 1, d]``, which sees itself and the past.

        Equal to the last token's output of :meth:`forward` with ``causal``.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out, _ = attend(q, *past.append(k, v), cap=self.cap)
        extended: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return extended


class CrossAttention(nn.Module):
    """Multi-head attention to another sequence; key and value projections are packed.

    Args:
        width: Width of the queries' input and of the output.
        source_width: Width of the other sequence.
        heads: Number of heads.
        inner: Width of all heads together, ``width`` when ``None``.
        scaled: Learn a factor ``softplus(w) / softplus(0)`` for each dimension of a head's query.
        out_gain: Factor on the initial output projection.
        cap: Bound on the scores, ``None`` for none.
    """

    def __init__(
        self,
        width: int,
        source_width: int,
        heads: int,
        *,
        inner: int | None = None,
        scaled: bool = False,
        out_gain: float = 1.0,
        cap: float | None = None,
    ) -> None:
        super().__init__()
        inner = inner or width
        self.heads, self.cap = heads, cap
        self.q = linear(width, inner)
        self.kv = linear(source_width, 2 * inner)
        self.out = linear(inner, width, gain=out_gain)
        self.scale = nn.Parameter(torch.zeros(inner // heads)) if scaled else None

    def forward(
        self, x: Tensor, source: Tensor, *, pair: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from ``x`` to ``source``.

        Args:
            x: ``[P, N, d]``, or ``[1, N, d]`` for the same queries everywhere.
            source: ``[I, M, ds]``.
            pair: ``[P]`` int64, the source of each row of ``x``. Default: its own.
            mask: bool, broadcast to ``[P, H, N, M]``, True where a query sees a key.

        Returns:
            Output ``[P, N, d]``, q ``[P, H, N, dh]`` and k ``[P, H, M, dh]``.
        """
        q = self._queries(x)
        k, v = self._keys_values(source, pair).unbind(0)
        q = q.expand(k.shape[0], -1, -1, -1)
        out, _ = attend(q, k, v, mask=mask, cap=self.cap)
        return self.out(out.transpose(1, 2).flatten(2)), q, k

    def extend(self, x: Tensor, source: Tensor, past: Past) -> Tensor:
        """As :meth:`forward` for one more token; ``source`` is projected for the first one only."""
        if past.source is None:
            past.source = self._keys_values(source, None)
        out, _ = attend(self._queries(x), past.source[0], past.source[1], cap=self.cap)
        extended: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return extended

    def _queries(self, x: Tensor) -> Tensor:
        q: Tensor = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return q if self.scale is None else q * (F.softplus(self.scale) / math.log(2.0))

    def _keys_values(self, source: Tensor, pair: Tensor | None) -> Tensor:
        """``[2, P, H, M, dh]``."""
        kv: Tensor = self.kv(source).unflatten(-1, (2, self.heads, -1))
        if pair is not None:
            kv = kv.index_select(0, pair)
        return kv.permute(2, 0, 3, 1, 4)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    cap: float | None = None,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention, and the logsumexp of its scores.

    Args:
        q: ``[B, H, N, dh]``.
        k: ``[B, H, M, dh]``.
        v: ``[B, H, M, dh]``.
        causal: Query i sees keys up to i. Not together with ``mask``.
        mask: bool, broadcast to ``[B, H, N, M]``, True where a query sees a key.
        cap: Replace a score s by ``cap * tanh(s / cap)``, which no fused kernel does.
        lse: Whether to return the logsumexp; the output is the same up to rounding.

    Returns:
        Output ``[B, H, N, dh]``, and the logsumexp ``[B, H, N]`` (natural logarithm, float32 or
        float64, no gradient) or ``None`` where not asked for or not given by a kernel: on CUDA
        that is with a mask, in float64, or when dh is not a multiple of 8.
    """
    if cap is not None:
        return _attend_capped(q, k, v, causal=causal, mask=mask, cap=cap, lse=lse)
    if lse and q.device.type == "cpu":
        # the kernel that F.scaled_dot_product_attention runs on a CPU; it takes no bool mask
        bias = None if mask is None else _bias(mask, q)
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias
        )
        return out, sums
    if lse and q.device.type == "cuda" and mask is None and _kernel_takes(q):
        if q.dtype == torch.float32 or torch.cuda.get_device_capability(q.device) < (8, 0):
            out, sums = torch.ops.aten._scaled_dot_product_efficient_attention(
                q, k, v, None, True, 0.0, causal
            )[:2]
            # padded to a multiple of 32 queries
            return out, sums[..., : q.shape[2]]
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
        return out, sums
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal), None


def _kernel_takes(q: Tensor) -> bool:
    """Whether the CUDA kernels take this dtype and head size without the padding SDPA adds."""
    return q.dtype != torch.float64 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _bias(mask: Tensor, like: Tensor) -> Tensor:
    """0 where ``mask`` is True, else -inf."""
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(
        mask.logical_not(), -math.inf
    )


def _attend_capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    cap: float,
    lse: bool,
) -> tuple[Tensor, Tensor | None]:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    scores = (cap * torch.tanh(scores / cap)).to(torch.promote_types(q.dtype, torch.float32))
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), -math.inf)
    out = scores.softmax(-1).to(v.dtype) @ v
    return out, scores.detach().logsumexp(-1) if lse else None
