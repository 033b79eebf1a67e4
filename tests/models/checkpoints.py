"""Files of one small CoCa as open_clip writes them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import safetensors.torch
import torch
from models.record_open_clip import MODELS, draw
from torch import Tensor

from optima_fast.models import open_clip, pretrained
from optima_fast.models.config import CoCaConfig

CFG = MODELS["pooler"]
SAFE, BIN = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"


@functools.cache
def config() -> CoCaConfig:
    names = {"text_decoder.": torch.empty(0)}
    return open_clip.config_of(CFG, names)


@functools.cache
def weights() -> dict[str, Tensor]:
    drawn = draw(open_clip.shapes(config()), 5)
    return {name: value.float() for name, value in drawn.items()}


def save(path: Path, value: object = None) -> Path:
    value = weights() if value is None else value
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(value, path)
    else:
        torch.save(value, path)
    return path


def describe(folder: Path, cfg: object = CFG, **preprocess: object) -> None:
    described = {"model_cfg": cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described))


def found(name: str | Path) -> pretrained.Checkpoint:
    checkpoint = pretrained.find(str(name))
    assert checkpoint is not None
    return checkpoint
