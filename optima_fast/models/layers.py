"""Transformer layers that return what they did, and the attentional pooler."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from optima_fast.models.attention import CrossAttention, Past, SelfAttention
from optima_fast.models.basic import MLP, parameter
from optima_fast.models.config import CoCaConfig
from optima_fast.taps.records import Attention, Layer


class LayerTap(NamedTuple):
    """One layer's record.

    Attributes:
        hidden: ``[B, N, d]`` residual stream after the layer.
        q: ``[B, H, N, dh]`` self-attention queries, unscaled.
        k: ``[B, H, N, dh]`` self-attention keys.
        lse: ``[B, H, N]`` logsumexp of the scaled and masked scores, if asked for and available.
        cross_q: ``[B, H, N, dh]`` cross-attention queries of a multimodal layer.
        cross_k: ``[B, H, M, dh]`` cross-attention keys of a multimodal layer.
    """

    hidden: Tensor
    q: Tensor
    k: Tensor
    lse: Tensor | None = None
    cross_q: Tensor | None = None
    cross_k: Tensor | None = None

    def record(self, mask: Tensor | None, causal: bool) -> Layer:
        """As the losses take it, with which tokens count and whether they see later ones."""
        own = Attention(self.q, self.k, causal, query_mask=mask, key_mask=mask, lse=self.lse)
        if self.cross_q is None or self.cross_k is None:
            return Layer(self.hidden, mask, (own,))
        cross = Attention(self.cross_q, self.cross_k, query_mask=mask)
        return Layer(self.hidden, mask, (own, cross))


class SelfLayer(nn.Module):
    """Pre-norm self-attention and MLP: a layer of the image encoder and the text decoder.

    Args:
        width: Width of the residual stream.
        heads: Attention heads.
        depth: Layers of the module; the two branches start ``sqrt(2 depth)`` times smaller.
        activation: ``"gelu"`` or ``"relu"``.
        config: The model's other options.
    """

    def __init__(
        self, width: int, heads: int, depth: int, activation: str, config: CoCaConfig
    ) -> None:
        super().__init__()
        gain = (2 * depth) ** -0.5
        self.norm_attention = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, out_gain=gain, cap=config.attention_cap)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = MLP(width, config.mlp_ratio, activation, out_gain=gain)

    def forward(
        self, x: Tensor, *, causal: bool = False, mask: Tensor | None = None, lse: bool = False
    ) -> LayerTap:
        """``[B, N, d]`` to the layer's record, whose ``hidden`` is the output."""
        branch, q, k, sums = self.attention(
            self.norm_attention(x), causal=causal, mask=mask, lse=lse
        )
        x = x + branch
        return LayerTap(x + self.mlp(self.norm_mlp(x)), q, k, sums)

    def extend(self, x: Tensor, past: Past) -> Tensor:
        """The output of one more token ``[B, 1, d]`` of a causal layer."""
        x = x + self.attention.extend(self.norm_attention(x), past)
        extended: Tensor = x + self.mlp(self.norm_mlp(x))
        return extended


class MultimodalLayer(nn.Module):
    """Causal self-attention, cross-attention to image tokens, MLP; see ``decoder_layer``.

    Args:
        config: The model's options.
    """

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        width, heads = config.text_width, config.text_heads
        double = config.decoder_layer == "double"
        gain = ((4 if double else 3) * config.multimodal_layers) ** -0.5

        def mlp() -> MLP:
            return MLP(width, config.mlp_ratio, config.text_activation, out_gain=gain)

        self.norm_attention = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, out_gain=gain, cap=config.attention_cap)
        self.norm_self_mlp = nn.LayerNorm(width) if double else None
        self.self_mlp = mlp() if double else None
        self.norm_cross = nn.LayerNorm(width)
        self.norm_image = nn.LayerNorm(width) if double else None
        self.cross = CrossAttention(width, width, heads, out_gain=gain, cap=config.attention_cap)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = mlp()

    def forward(
        self, x: Tensor, image: Tensor, pair: Tensor | None, *, lse: bool = False
    ) -> LayerTap:
        """Text ``[P, L, d]`` and images ``[I, M, d]`` to the layer's record."""
        branch, q, k, sums = self.attention(self.norm_attention(x), causal=True, lse=lse)
        x = x + branch
        if self.norm_self_mlp is not None and self.self_mlp is not None:
            x = x + self.self_mlp(self.norm_self_mlp(x))
        source = image if self.norm_image is None else self.norm_image(image)
        branch, cross_q, cross_k = self.cross(self.norm_cross(x), source, pair=pair)
        x = x + branch
        return LayerTap(x + self.mlp(self.norm_mlp(x)), q, k, sums, cross_q, cross_k)

    def extend(self, x: Tensor, image: Tensor, past: Past) -> Tensor:
        """The output of one more token ``[I, 1, d]``, each text with its own image."""
        x = x + self.attention.extend(self.norm_attention(x), past)
        if self.norm_self_mlp is not None and self.self_mlp is not None:
            x = x + self.self_mlp(self.norm_self_mlp(x))
        source = image
        if self.norm_image is not None and past.source is None:
            source = self.norm_image(image)
        x = x + self.cross.extend(self.norm_cross(x), source, past)
        extended: Tensor = x + self.mlp(self.norm_mlp(x))
        return extended


class Pooler(nn.Module):
    """Learned queries attend to a sequence; no residual, LayerNorm on the result.

    Args:
        width: Width of queries and result.
        source_width: Width of the sequence.
        heads: Attention heads.
        inner: Inner width of the attention.
        queries: Number of queries.
        form: ``"scaled"`` or ``"normed"``, see ``CoCaConfig.pooler``.
    """

    def __init__(
        self, width: int, source_width: int, heads: int, inner: int, queries: int, form: str
    ) -> None:
        super().__init__()
        normed = form == "normed"
        self.query = parameter(queries, width, std=1.0)
        self.norm_query = nn.LayerNorm(width) if normed else None
        self.norm_source = nn.LayerNorm(source_width) if normed else None
        self.attention = CrossAttention(width, source_width, heads, inner=inner, scaled=not normed)
        self.norm = nn.LayerNorm(width)

    def forward(self, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B, N, ds]`` (mask ``[B, N]``, True where a token counts) to ``[B, queries, d]``."""
        query = self.query if self.norm_query is None else self.norm_query(self.query)
        if self.norm_source is not None:
            source = self.norm_source(source)
        keys = None if mask is None else mask[:, None, None]
        pooled: Tensor = self.norm(self.attention(query[None], source, mask=keys)[0])
        return pooled
