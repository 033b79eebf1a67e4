"""Named configurations, and the paper's way of counting parameters."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from optima_fast.errors import unknown
from optima_fast.models.config import CoCaConfig
from optima_fast.models.model import CoCa

_BASE = CoCaConfig()

_OPEN_CLIP_B32 = CoCaConfig(
    image_size=224,
    patch_size=32,
    text_width=512,
    text_heads=8,
    text_length=76,
    vocab_size=49408,
    image_stem="clip",
    image_final_norm=False,
    pooler="normed",
    pooler_heads=8,
    pooler_ratio=1.0,
    contrastive="query",
    contrastive_width=512,
    decoder_layer="double",
    positions="learned",
    text_activation="gelu",
    softmax_bias=False,
    shifted_cls_mask=True,
)

_OPEN_CLIP_L14 = replace(
    _OPEN_CLIP_B32,
    patch_size=14,
    image_width=1024,
    image_layers=24,
    image_heads=16,
    text_width=768,
    text_heads=12,
    contrastive_width=768,
)

_DIGITS_TEACHER = CoCaConfig(
    image_size=24,
    image_channels=1,
    patch_size=6,
    image_width=96,
    image_layers=4,
    image_heads=4,
    text_width=96,
    text_layers=2,
    multimodal_layers=2,
    text_heads=4,
    text_length=16,
    vocab_size=64,
    pooler="none",
    pooler_heads=4,
    pooler_ratio=1.0,
    contrastive="none",
    positions="learned",
    text_activation="gelu",
)

_DIGITS_BASE = replace(_DIGITS_TEACHER, image_width=64, text_width=64)

PRESETS: dict[str, CoCaConfig] = {
    "coca_large": replace(
        _BASE,
        image_width=1024,
        image_layers=24,
        image_heads=16,
        text_width=1024,
        text_heads=16,
        pooler_heads=16,
    ),
    "coca_base": _BASE,
    "coca_tiny12": replace(_BASE, image_layers=6, text_layers=3, multimodal_layers=3),
    "coca_tiny6": replace(_BASE, image_layers=3, text_layers=2, multimodal_layers=1),
    "open_clip_coca_ViT-B-32": _OPEN_CLIP_B32,
    "open_clip_coca_ViT-L-14": _OPEN_CLIP_L14,
    # open_clip's own names; its coca_base is not the paper's
    "coca_ViT-B-32": _OPEN_CLIP_B32,
    "coca_ViT-L-14": _OPEN_CLIP_L14,
    "open_clip_coca_base": replace(
        _OPEN_CLIP_B32,
        image_size=288,
        patch_size=18,
        image_final_norm=True,
        pooler="none",
        text_width=768,
        text_heads=12,
        vocab_size=64000,
    ),
    "digits_teacher": _DIGITS_TEACHER,
    "digits_base": _DIGITS_BASE,
    "digits_student": replace(_DIGITS_BASE, image_layers=2, text_layers=1, multimodal_layers=1),
}


def get(name: str) -> CoCaConfig:
    """The preset of this name.

    Raises:
        UserError: There is none; the message gives the nearest name.
    """
    if name not in PRESETS:
        raise unknown("model preset", name, PRESETS)
    return PRESETS[name]


def coca(preset: str | CoCaConfig) -> CoCa:
    """A freshly initialised model.

    Args:
        preset: A name in :data:`PRESETS` or a configuration.
    """
    return CoCa(get(preset) if isinstance(preset, str) else preset)


def paper_parameters(model: CoCa) -> int:
    """Parameters as the OPTIMA paper counts them: transformer layers and generative pooler.

    Embeddings, the patch projection, the final norms, the softmax, and whatever serves the
    contrastive loss or a task alone are not counted. Works on the meta device.
    """
    counted: list[nn.Module | None] = [
        model.image.layers,
        model.text.layers,
        model.multimodal.layers,
        model.pooler,
    ]
    return sum(p.numel() for part in counted if part is not None for p in part.parameters())
