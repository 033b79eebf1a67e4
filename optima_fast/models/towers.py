"""The three modules of a CoCa: image encoder, unimodal text decoder, multimodal decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from optima_fast.models.attention import Past
from optima_fast.models.basic import parameter, sinusoids
from optima_fast.models.config import CoCaConfig
from optima_fast.models.layers import LayerTap, MultimodalLayer, SelfLayer


class ImageEncoder(nn.Module):
    """Vision transformer over square patches.

    Args:
        config: The model's options.
    """

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        width, depth = config.image_width, config.image_layers
        clip = config.image_stem == "clip"
        self.image_shape = (config.image_channels, config.image_size, config.image_size)
        self.patches = nn.Conv2d(
            config.image_channels, width, config.patch_size, config.patch_size, bias=not clip
        )
        fan_in = config.image_channels * config.patch_size**2
        nn.init.normal_(self.patches.weight, std=fan_in**-0.5)
        if self.patches.bias is not None:
            nn.init.zeros_(self.patches.bias)
        self.class_token = parameter(width, std=0.02) if clip else None
        self.positions = parameter(config.patches + clip, width, std=0.02)
        self.norm_pre = nn.LayerNorm(width) if clip else None
        self.layers = nn.ModuleList(
            SelfLayer(width, config.image_heads, depth, "gelu", config) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width) if config.image_final_norm else None

    def forward(
        self, images: Tensor, wanted: Sequence[bool] = (), lse: bool = False
    ) -> tuple[Tensor, list[LayerTap]]:
        """``[I, C, H, W]`` to ``[I, N, d]`` and the wanted layers' records."""
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must be [I, {expected}], got {list(images.shape)}")
        # features side by side: else every later sum, norm and loss works on strided memory
        x = self.patches(images).flatten(2).transpose(1, 2).contiguous()
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], dim=1)
        x = x + self.positions
        if self.norm_pre is not None:
            x = self.norm_pre(x)
        x, taps = _through(self.layers, x, wanted, lse, lambda layer, x, lse: layer(x, lse=lse))
        return (x if self.norm is None else self.norm(x)), taps


class TextDecoder(nn.Module):
    """Causal transformer over token ids, with an optional [CLS] that reads the whole text.

    Texts are padded on the right, where no token looks. Only [CLS], which comes last, needs a
    padding mask, and no other token sees [CLS]; so it is run only for its own feature.

    Args:
        config: The model's options.
    """

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        width, depth = config.text_width, config.text_layers
        self.pad_id, self.length = config.pad_id, config.text_length
        self.shifted_cls_mask = config.shifted_cls_mask
        has_cls = config.contrastive != "none"
        self.learned = config.positions == "learned"
        self.scale = 1.0 if self.learned else math.sqrt(width)
        std = 0.02 if self.learned else width**-0.5
        self.embedding = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=std)
        self.positions: Tensor
        if self.learned:
            self.positions = parameter(self.length + has_cls, width, std=0.01)
        else:
            self.register_buffer("positions", sinusoids(self.length, width), persistent=False)
        self.cls_token = parameter(width, std=std) if has_cls else None
        self.layers = nn.ModuleList(
            SelfLayer(width, config.text_heads, depth, config.text_activation, config)
            for _ in range(depth)
        )
        self.norm_cls = nn.LayerNorm(width) if has_cls else None

    def forward(
        self, text: Tensor, wanted: Sequence[bool] = (), lse: bool = False, cls: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor, list[LayerTap]]:
        """Run the decoder.

        Args:
            text: ``[T, L]`` int64 ids.
            wanted: Whether to record it, for each layer; empty for none.
            lse: Whether records hold the logsumexp.
            cls: Whether to run [CLS]; then N = L + 1, else N = L.

        Returns:
            States of the ids ``[T, L, d]`` (no final norm), normed state of [CLS] ``[T, d]`` or
            ``None``, mask ``[T, N]`` (True where not padding), the wanted layers' records.
        """
        if text.ndim != 2 or not 1 <= text.shape[1] <= self.length:
            raise ValueError(
                f"text must be [T, L] with L from 1 to text_length = {self.length}, "
                f"got {list(text.shape)}"
            )
        length = text.shape[1]
        x = self.embedding(text) * self.scale + self.positions[:length]
        mask, sees = text != self.pad_id, None
        if cls:
            x, mask, sees = self._append_cls(x, mask)
        x, taps = _through(
            self.layers,
            x,
            wanted,
            lse,
            lambda layer, x, lse: layer(x, causal=sees is None, mask=sees, lse=lse),
        )
        if not cls or self.norm_cls is None:
            return x, None, mask, taps
        return x[:, :-1], self.norm_cls(x[:, -1]), mask, taps

    def extend(self, ids: Tensor, past: Sequence[Past]) -> Tensor:
        """States ``[T, 1, d]`` of one more id a text, ``[T, 1]``; ``past`` is one a layer.

        Raises:
            ValueError: There are ``text_length`` ids already.
        """
        if len(past[0]) >= self.length:
            raise ValueError(
                f"a text must have at most text_length = {self.length} tokens, got one more"
            )
        x: Tensor = self.embedding(ids) * self.scale + self.positions[len(past[0])]
        for layer, kept in zip(self.layers, past, strict=True):
            x = cast(SelfLayer, layer).extend(x, kept)
        return x

    def _append_cls(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and mask with [CLS], and what each query sees, ``[T, 1, L + 1, L + 1]``."""
        assert self.cls_token is not None
        length = x.shape[1]
        token = self.cls_token * self.scale
        if self.learned:
            token = token + self.positions[length]
        x = torch.cat([x, token.expand(x.shape[0], 1, -1)], dim=1)
        true = torch.ones_like(mask[:, :1])
        read = torch.cat([true, mask] if self.shifted_cls_mask else [mask, true], dim=1)
        order = torch.arange(length + 1, device=x.device)
        sees = torch.where(order[:, None] == length, read[:, None, None], order[:, None] >= order)
        return x, torch.cat([mask, true], dim=1), sees


class MultimodalDecoder(nn.Module):
    """Causal transformer over the text decoder's states that reads image tokens.

    Args:
        config: The model's options.
    """

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            MultimodalLayer(config) for _ in range(config.multimodal_layers)
        )
        self.norm = nn.LayerNorm(config.text_width)

    def forward(
        self,
        x: Tensor,
        image: Tensor,
        pair_image: Tensor | None = None,
        wanted: Sequence[bool] = (),
        lse: bool = False,
    ) -> tuple[Tensor, list[LayerTap]]:
        """Text states ``[P, L, d]`` and image tokens ``[I, M, d]`` to ``[P, L, d]``, records."""
        x, taps = _through(
            self.layers,
            x,
            wanted,
            lse,
            lambda layer, x, lse: layer(x, image, pair_image, lse=lse),
        )
        return self.norm(x), taps

    def extend(self, x: Tensor, image: Tensor, past: Sequence[Past]) -> Tensor:
        """Output ``[I, 1, d]`` of one more token a text; ``past`` is one a layer."""
        for layer, kept in zip(self.layers, past, strict=True):
            x = cast(MultimodalLayer, layer).extend(x, image, kept)
        extended: Tensor = self.norm(x)
        return extended


def _through(
    layers: nn.ModuleList,
    x: Tensor,
    wanted: Sequence[bool],
    lse: bool,
    call: Callable[[nn.Module, Tensor, bool], LayerTap],
) -> tuple[Tensor, list[LayerTap]]:
    """Run ``layers`` one after the other and keep the wanted ones' records."""
    taps = []
    for index, layer in enumerate(layers):
        record = bool(wanted) and wanted[index]
        tap = call(layer, x, lse and record)
        x = tap.hidden
        if record:
            taps.append(tap)
    return x, taps
