"""Options are checked, travel through JSON, and add up to the published sizes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from optima_fast.errors import UserError
from optima_fast.models import CoCa, CoCaConfig, coca, paper_parameters, presets


@pytest.mark.parametrize("name", presets.PRESETS)
def test_survives_json(name: str) -> None:
    config = presets.get(name)
    assert CoCaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_options_left_out_keep_their_default() -> None:
    assert CoCaConfig.from_dict({"text_layers": 3}) == CoCaConfig(text_layers=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_stem": "vit"}, "image_stem must be one of plain, clip, got 'vit'"),
        ({"pooler": None}, "pooler must be one of none, scaled, normed, got None"),
        ({"contrastive": "yes"}, "contrastive must be one of none, query, cascade, got 'yes'"),
        ({"decoder_layer": 2}, "decoder_layer must be one of single, double, got 2"),
        ({"positions": "rope"}, "positions must be one of sinusoidal, learned, got 'rope'"),
        ({"text_activation": "silu"}, "text_activation must be one of relu, gelu, got 'silu'"),
        ({"softmax_bias": 1}, "softmax_bias must be true or false, got 1"),
        ({"image_layers": 0}, "image_layers must be an integer of at least 1, got 0"),
        ({"image_layers": True}, "image_layers must be an integer of at least 1, got True"),
        ({"image_layers": 2.0}, r"image_layers must be an integer of at least 1, got 2\.0"),
        ({"pad_id": -1}, "pad_id must be an integer of at least 0, got -1"),
        ({"pad_id": 64000}, "pad_id must be below vocab_size = 64000, got 64000"),
        ({"mlp_ratio": 0}, "mlp_ratio must be a positive number, got 0"),
        ({"mlp_ratio": "4"}, "mlp_ratio must be a positive number, got '4'"),
        ({"mlp_ratio": None}, "mlp_ratio must be a positive number, got None"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be a positive number, got nan"),
        ({"attention_cap": -1.0}, r"attention_cap must be a positive number, got -1\.0"),
        ({"image_size": 100}, "image_size must be a multiple of patch_size, got 100 and 18"),
        ({"image_heads": 7}, "image_width must be a multiple of image_heads, got 768 and 7"),
        ({"text_heads": 7}, "text_width must be a multiple of text_heads, got 768 and 7"),
        ({"pooler_heads": 7}, "pooler_inner must be a multiple of pooler_heads, got 3072 and 7"),
        (
            {"text_width": 33, "text_heads": 3, "pooler_ratio": 4 / 11},
            "text_width must be even for sinusoidal positions, got 33",
        ),
        (
            {"pooler": "none", "text_width": 384},
            "without a pooler image_width must equal text_width, got 768 and 384",
        ),
        (
            {"pooler": "none", "contrastive": "query"},
            "contrastive 'query' must have a pooler or image_stem 'clip'",
        ),
    ],
)
def test_rejects(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoCaConfig(**options)
    with pytest.raises(UserError, match=f"CoCa configuration: {message}"):
        CoCaConfig.from_dict(options)


def test_unknown_options_are_named() -> None:
    with pytest.raises(
        UserError, match="unknown option of a CoCa 'text_layer'; did you mean 'text_layers'"
    ):
        CoCaConfig.from_dict({"text_layer": 3})
    with pytest.raises(UserError, match="unknown option of a CoCa 'zzz'; choose from image_size, "):
        CoCaConfig.from_dict({"zzz": 3})


def test_unknown_presets_are_named() -> None:
    with pytest.raises(
        UserError, match="unknown model preset 'coca_tiny'; did you mean 'coca_tiny"
    ):
        presets.get("coca_tiny")
    with pytest.raises(UserError, match="unknown model preset 'zzz'; choose from coca_large, "):
        coca("zzz")


def on_meta(name: str) -> CoCa:
    with torch.device("meta"):
        return coca(name)


@pytest.mark.parametrize(
    ("name", "layers", "count"),
    [
        ("coca_large", (24, 12, 12), 672_079_104),
        ("coca_base", (12, 12, 12), 293_175_808),
        ("coca_tiny12", (6, 3, 3), 101_791_744),
        ("coca_tiny6", (3, 2, 1), 54_536_704),
    ],
)
def test_counts_parameters_as_the_paper(
    name: str, layers: tuple[int, int, int], count: int
) -> None:
    """Exact values of the published 672.1, 293.1 (0.03 off), 101.8 and 54.5 million.

    d = width, h = heads: 12 d^2 + 13 d a self-attention layer, 16 d^2 + 19 d a multimodal one,
    16 d^2 + (15 + 256) d + 4 d / h the pooler.
    """
    model = on_meta(name)
    d, h = model.widths["image"], model.config.image_heads
    i, t, m = layers
    assert tuple(model.layer_counts.values()) == layers
    formula = (i + t) * (12 * d * d + 13 * d) + m * (16 * d * d + 19 * d)
    formula += 16 * d * d + (15 + 256) * d + 4 * d // h
    assert paper_parameters(model) == formula == count


@pytest.mark.parametrize(
    ("name", "total", "image", "text", "multimodal"),
    [
        ("open_clip_coca_ViT-B-32", 253_560_065, 89.16, 63.43, 100.97),
        ("open_clip_coca_ViT-L-14", 638_450_177, 306.72, 123.65, 208.07),
        ("open_clip_coca_base", 440_337_409, 86.40, 134.66, 219.28),
    ],
)
def test_open_clip_totals(
    name: str, total: int, image: float, text: float, multimodal: float
) -> None:
    model = on_meta(name)

    def millions(*parts: torch.nn.Module | None) -> float:
        return sum(p.numel() for part in parts if part for p in part.parameters()) / 1e6

    assert sum(p.numel() for p in model.parameters()) == total
    got = (
        millions(model.image, model.pooler, model.image_projection),
        millions(model.text, model.text_projection),
        millions(model.multimodal, model.to_vocabulary),
    )
    assert got == pytest.approx((image, text, multimodal), abs=0.006)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("digits_teacher", 0.95, 1.05), ("digits_base", 0.4, 0.5), ("digits_student", 0.2, 0.26)],
)
def test_digits_presets_are_small(name: str, low: float, high: float) -> None:
    assert low < sum(p.numel() for p in on_meta(name).parameters()) / 1e6 < high


def test_digits_base_is_a_source_for_the_student() -> None:
    base, student = presets.get("digits_base"), presets.get("digits_student")
    counts = {f"{m}_layers": n for m, n in base.layer_counts.items()}
    assert dataclasses.replace(student, **counts) == base
