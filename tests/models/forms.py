"""A small CoCa in each form, its inputs, and what compares two of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from optima_fast.models import CoCa, CoCaConfig, LayerTap

PAPER = CoCaConfig(
    image_size=12,
    image_channels=2,
    patch_size=4,
    image_width=32,
    image_layers=3,
    image_heads=4,
    text_width=24,
    text_layers=2,
    multimodal_layers=2,
    text_heads=3,
    text_length=10,
    vocab_size=30,
    pooler_heads=3,
    pooler_queries=5,
)
OPEN_CLIP = replace(
    PAPER,
    image_stem="clip",
    image_final_norm=False,
    pooler="normed",
    pooler_ratio=1.0,
    contrastive="query",
    contrastive_width=16,
    decoder_layer="double",
    positions="learned",
    text_activation="gelu",
    softmax_bias=False,
    shifted_cls_mask=True,
)
PLAIN = replace(PAPER, image_width=24, image_heads=3, pooler="none", contrastive="none")
CAPPED = replace(PAPER, attention_cap=1.0)
CONFIGS = {"paper": PAPER, "open_clip": OPEN_CLIP, "plain": PLAIN, "capped": CAPPED}
ALL = {"image": [0, 1, 2], "text": [0, 1], "multimodal": [0, 1]}

every_form = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def build(config: CoCaConfig, seed: int = 0) -> CoCa:
    """A model whose every parameter matters: norms and biases are not at 1 and 0."""
    torch.manual_seed(seed)
    model = CoCa(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def inputs(images: int = 3, texts: int = 3, length: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(images + 10 * texts)
    text = torch.randint(1, 30, (texts, length), generator=generator)
    text[1:, length - 3 :] = 0
    return torch.randn(images, 2, 12, 12, generator=generator), text


def assert_taps_equal(got: dict[str, list[LayerTap]], want: dict[str, list[LayerTap]]) -> None:
    assert list(got) == list(want)
    for module, taps in want.items():
        assert len(got[module]) == len(taps)
        for one, other in zip(got[module], taps, strict=True):
            for name, a, b in zip(LayerTap._fields, one, other, strict=True):
                if b is None:
                    assert a is None
                else:
                    torch.testing.assert_close(
                        a, b, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                    )
