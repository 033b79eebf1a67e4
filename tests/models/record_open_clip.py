"""Records what open_clip computes, for the tests of machines where it does not import.

    python tests/models/record_open_clip.py        # writes open_clip_VERSION.npz beside this file

Small CoCa models of open_clip's layouts, every weight drawn here, run in float64; and the names and
shapes of its published architectures. The weights are not stored: :func:`draw` gives the same
ones everywhere, from raw numbers of PCG64, whose stream NumPy guarantees.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PUBLISHED = ("coca_ViT-B-32", "coca_ViT-L-14", "coca_base")
_TEXT = {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 4}
_VISION = {"image_size": 32, "patch_size": 8, "layers": 2, "head_width": 32, "output_tokens": True}
_POOL = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 16}


def small(vision_width: int, embed_dim: int, **vision: Any) -> dict[str, Any]:
    """A ``model_cfg`` of few weights."""
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {**_VISION, "width": vision_width, **vision},
        "text_cfg": {**_TEXT, "layers": 3, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**_TEXT, "layers": 2},
        "custom_text": True,
    }


MODELS = {
    "pooler": small(128, 64, **_POOL),
    "pooler of one width": small(64, 64, **_POOL),
    "no pooler": small(64, 48),
}


def draw(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """float64 weights of these names and shapes, uniform, of a size at which no part is idle."""
    source = np.random.PCG64(seed)
    state = {}
    for name, shape in sorted(shapes.items()):
        value = _uniform(source, shape)
        if len(shape) > 1:
            value = value * 1.5 * shape[-1] ** -0.5
        elif ".ln_" in name and name.endswith(".weight"):
            value = 1 + value / 2
        state[name] = value
    return state


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    """Images in float64 and texts of several lengths, the longest without padding."""
    source = np.random.PCG64(seed)
    images = _uniform(source, (4, 3, 32, 32)) * 2
    ids = 1 + (source.random_raw(4 * 12) % 99).reshape(4, 12).astype(np.int64)
    for row, length in enumerate((12, 11, 5, 2)):
        ids[row, length:] = 0
    return images, torch.from_numpy(ids)


def _uniform(source: np.random.PCG64, shape: Sequence[int]) -> Tensor:
    """Between -1 and 1, of 24 random bits each."""
    bits = np.asarray(source.random_raw(int(np.prod(shape, dtype=int)))) >> np.uint64(40)
    return torch.from_numpy(bits.astype(np.float64) * 2.0**-23 - 1).reshape(tuple(shape))


def main() -> None:
    """Run open_clip and write the file."""
    import open_clip
    from open_clip.coca_model import CoCa

    def build(cfg: Mapping[str, Any]) -> CoCa:
        return CoCa(**{k: v for k, v in cfg.items() if k != "custom_text"})

    def shapes(model: CoCa) -> dict[str, list[int]]:
        return {name: list(value.shape) for name, value in model.state_dict().items()}

    described: dict[str, Any] = {"models": {}, "published": {}}
    arrays: dict[str, np.ndarray] = {}
    for seed, (name, cfg) in enumerate(MODELS.items()):
        model = build(cfg).double().eval()
        described["models"][name] = {"model_cfg": cfg, "seed": seed, "shapes": shapes(model)}
        model.load_state_dict(draw(shapes(model), seed), strict=True)
        images, ids = inputs(seed)
        with torch.no_grad():
            out = model(images, ids)
        real = ids[:, : out["logits"].shape[1]] != 0
        arrays[f"{name}/image_features"] = out["image_features"].numpy()
        arrays[f"{name}/text_features"] = out["text_features"].numpy()
        arrays[f"{name}/logits"] = out["logits"][real].numpy()
    for name in PUBLISHED:
        cfg = open_clip.get_model_config(name)
        with torch.device("meta"):
            described["published"][name] = {"model_cfg": cfg, "shapes": shapes(build(cfg))}
    arrays["described"] = np.frombuffer(json.dumps(described).encode(), dtype=np.uint8)
    path = Path(__file__).with_name(f"open_clip_{open_clip.__version__}.npz")
    np.savez_compressed(path, **arrays)
    print(f"wrote {path}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
