"""The shape of a CoCa: one frozen, JSON-able set of options that spans the published variants."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optima_fast.errors import UserError, unknown

_CHOICES = {
    "image_stem": ("plain", "clip"),
    "pooler": ("none", "scaled", "normed"),
    "contrastive": ("none", "query", "cascade"),
    "decoder_layer": ("single", "double"),
    "positions": ("sinusoidal", "learned"),
    "text_activation": ("relu", "gelu"),
}


@dataclass(frozen=True)
class CoCaConfig:
    """Sizes and form of a :class:`optima_fast.models.CoCa`; the defaults are the paper's CoCa-Base.

    The form options lead to Google's CoCa (the first value of each) and to open_clip's (the last).
    Where both variants do the same there is no option: pre-norm layers, exact GELU in the image
    encoder, LayerNorm after the pooler, an untied softmax, tokens that enter the multimodal decoder
    without a norm. Google's also sends the [CLS] token through the multimodal decoder and
    drops its output; as [CLS] comes last and no token sees it, nothing depends on that and it
    is not done.

    Attributes:
        image_size: Side of the square image in pixels, a multiple of ``patch_size``.
        image_channels: Channels of the image.
        patch_size: Side of a patch in pixels.
        image_width: Width of the image encoder.
        image_layers: Layers of the image encoder.
        image_heads: Attention heads of the image encoder.
        text_width: Width of both text decoders.
        text_layers: Layers of the unimodal text decoder.
        multimodal_layers: Layers of the multimodal decoder.
        text_heads: Attention heads of both text decoders.
        text_length: Longest text in tokens, special tokens included, [CLS] not.
        vocab_size: Number of token ids.
        pad_id: The id that fills texts up on the right.
        mlp_ratio: Hidden width of every MLP over the layer's width.
        image_stem: ``"plain"``: patches with bias and positions; ``"clip"``: no bias, a class
            token first, LayerNorm after the positions.
        image_final_norm: LayerNorm after the last image layer.
        pooler: Attention that turns the image encoder's output into ``pooler_queries`` tokens for
            the decoder. ``"scaled"``: a learned scale per query dimension; ``"normed"``: LayerNorm
            on queries and keys; ``"none"``: the encoder's tokens go to the decoder.
        pooler_heads: Attention heads of the poolers.
        pooler_queries: Queries of the pooler.
        pooler_ratio: Inner width of the poolers' attention over ``text_width``.
        contrastive: How features for a contrastive loss are made. ``"cascade"``: a second pooler
            with one query on top of the first; ``"query"``: the first image token, which then
            does not go to the decoder, and one projection each for image and text;
            ``"none"``: not at all, and there is no [CLS].
        contrastive_width: Width of projected features (``contrastive="query"`` only).
        decoder_layer: ``"single"``: self-attention, cross-attention, MLP; ``"double"``:
            self-attention, MLP, cross-attention with normed keys, a second MLP.
        positions: ``"sinusoidal"``, on embeddings multiplied by sqrt(width), or ``"learned"``.
        text_activation: Activation of the text decoders' MLPs.
        softmax_bias: Whether the projection to the vocabulary has a bias.
        attention_cap: Bounds attention scores of all layers to ``cap * tanh(score / cap)``. Such a
            model cannot use fused attention. Google's code uses 50, the paper names none.
        shifted_cls_mask: Shift the padding mask of the [CLS] query one to the right, as
            open_clip's published weights were trained with.

    Raises:
        ValueError: A value is of the wrong type, out of range, or does not go with another.
    """

    image_size: int = 288
    image_channels: int = 3
    patch_size: int = 18
    image_width: int = 768
    image_layers: int = 12
    image_heads: int = 12
    text_width: int = 768
    text_layers: int = 12
    multimodal_layers: int = 12
    text_heads: int = 12
    text_length: int = 64
    vocab_size: int = 64000
    pad_id: int = 0
    mlp_ratio: float = 4.0
    image_stem: str = "plain"
    image_final_norm: bool = True
    pooler: str = "scaled"
    pooler_heads: int = 12
    pooler_queries: int = 256
    pooler_ratio: float = 4.0
    contrastive: str = "cascade"
    contrastive_width: int = 768
    decoder_layer: str = "single"
    positions: str = "sinusoidal"
    text_activation: str = "relu"
    softmax_bias: bool = True
    attention_cap: float | None = None
    shifted_cls_mask: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_value(field.name, field.default, getattr(self, field.name))
        _check_divides(self, "image_size", "patch_size")
        _check_divides(self, "image_width", "image_heads")
        _check_divides(self, "text_width", "text_heads")
        if self.pad_id >= self.vocab_size:
            raise ValueError(
                f"pad_id must be below vocab_size = {self.vocab_size}, got {self.pad_id}"
            )
        if self.positions == "sinusoidal" and self.text_width % 2:
            raise ValueError(
                f"text_width must be even for sinusoidal positions, got {self.text_width}"
            )
        if self.pooler == "none" and self.image_width != self.text_width:
            raise ValueError(
                "without a pooler image_width must equal text_width, got "
                f"{self.image_width} and {self.text_width}"
            )
        if self.contrastive == "query" and self.pooler == "none" and self.image_stem == "plain":
            raise ValueError(
                "contrastive 'query' must have a pooler or image_stem 'clip' to give the first "
                "token, got pooler 'none' and image_stem 'plain'"
            )
        if self.pooler != "none" or self.contrastive == "cascade":
            _check_divides(self, "pooler_inner", "pooler_heads")

    @property
    def pooler_inner(self) -> int:
        """Inner width of the poolers' attention."""
        return int(self.text_width * self.pooler_ratio)

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def layer_counts(self) -> dict[str, int]:
        """Layers of each module."""
        return {
            "image": self.image_layers,
            "text": self.text_layers,
            "multimodal": self.multimodal_layers,
        }

    @property
    def widths(self) -> dict[str, int]:
        """Width of each module's residual stream."""
        return {
            "image": self.image_width,
            "text": self.text_width,
            "multimodal": self.text_width,
        }

    @staticmethod
    def form_options() -> tuple[str, ...]:
        """The options that lead from Google's form to open_clip's; weights fit one form only."""
        return (*_CHOICES, "image_final_norm", "softmax_bias", "shifted_cls_mask")

    def to_dict(self) -> dict[str, Any]:
        """All options, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> CoCaConfig:
        """The inverse of :meth:`to_dict`; options left out keep their default.

        Raises:
            UserError: An option is unknown or has a value that does not fit.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise unknown("option of a CoCa", name, names)
        try:
            return cls(**options)
        except ValueError as error:
            raise UserError(f"CoCa configuration: {error}") from None


def _check_value(name: str, default: object, value: object) -> None:
    """Raise unless ``value`` is of the default's type and in the option's range."""
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(_CHOICES[name])}, got {value!r}")
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
    elif isinstance(default, int):
        least = 0 if name == "pad_id" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    elif not (name == "attention_cap" and value is None) and (
        isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9
    ):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _check_divides(config: CoCaConfig, whole: str, part: str) -> None:
    """Raise unless ``whole`` is a multiple of ``part``."""
    size, unit = getattr(config, whole), getattr(config, part)
    if size % unit:
        raise ValueError(f"{whole} must be a multiple of {part}, got {size} and {unit}")
