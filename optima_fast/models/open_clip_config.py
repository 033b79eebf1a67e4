"""open_clip's ``model_cfg`` to a :class:`CoCaConfig` and back, and the form it can hold.

Source: https://github.com/mlfoundations/open_clip, ``coca_model.py`` and ``model.py`` of 3.3.0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.models.config import CoCaConfig

# the form options of a CoCa that open_clip can hold; a pooler decides three more
_FORM: dict[str, Any] = {
    "image_channels": 3,
    "mlp_ratio": 4.0,
    "image_stem": "clip",
    "contrastive": "query",
    "decoder_layer": "double",
    "positions": "learned",
    "text_activation": "gelu",
    "softmax_bias": False,
    "attention_cap": None,
    "shifted_cls_mask": True,
}

# fields of a model_cfg that leave the computed numbers as they are
_IDLE = {
    "custom_text", "eos_id", "hf_model_pretrained", "hf_pooler_type", "hf_proj_type",
    "hf_tokenizer_name", "init_logit_scale", "nonscalar_logit_scale", "output_tokens", "pad_id",
    "patch_dropout", "timm_drop", "timm_drop_path", "timm_model_pretrained", "timm_pool",
    "timm_proj", "timm_proj_bias", "tokenizer_kwargs", "tokenizer_mode",
}  # fmt: skip
# the one value that is supported of others that are not read; of all else: unset, false, 0
_STANDARD = {
    "attentional_pool": True, "embed_cls": True, "mlp_ratio": 4, "pool_type": "tok",
    "pos_embed_type": "learnable", "proj_type": "linear",
}  # fmt: skip

# what a state dict is whose keys start so, the first that fits
_OTHERS = (
    ("text.transformer.embeddings.", "an open_clip model with a Hugging Face text tower"),
    ("text.transformer.encoder.", "an open_clip model with a Hugging Face text tower"),
    ("visual.trunk.", "an open_clip model with a timm image tower"),
    ("coca.", "a run's student: give its run folder"),
    ("image.patches.", "weights of this library's CoCa"),
    ("vision_model.", "a CLIP of the transformers library"),
    ("visual.", "a plain CLIP without a text_decoder"),
    ("patch_embed.", "a timm vision transformer"),
    ("layer1.", "a ResNet"),
)


def config_of(model_cfg: Mapping[str, Any] | None, state: Mapping[str, Tensor]) -> CoCaConfig:
    """The configuration of an open_clip CoCa.

    Args:
        model_cfg: open_clip's own description. ``None``: told from the shapes, assuming heads of
            width 64 and a pooler of 8 heads, as all published models have.
        state: Its state dict; tensors on the meta device will do.

    Raises:
        UserError: ``state`` is no CoCa of open_clip, or of a form that open_clip has and this
            library does not.
    """
    foreign = tuple(prefix for prefix, _ in _OTHERS[:3])
    decoder = any(name.startswith("text_decoder.") for name in state)
    if not decoder or any(name.startswith(foreign) for name in state):
        raise UserError(f"no CoCa of open_clip but {_what_it_is(state)}")
    try:
        return _read_cfg(_infer_cfg(state) if model_cfg is None else model_cfg)
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"does not fit: {error}"
        source = "the state dict" if model_cfg is None else "model_cfg"
        raise UserError(f"no CoCa of open_clip: {source} {what}") from error


def _what_it_is(state: Mapping[str, Tensor]) -> str:
    for prefix, what in _OTHERS:
        if any(name.startswith(prefix) for name in state):
            return what
    return f"something else, whose weights are called {', '.join(list(state)[:3]) or 'nothing'}"


def _infer_cfg(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """A model_cfg that gives these shapes."""

    def layers(prefix: str) -> int:
        found = (re.match(re.escape(prefix) + r"\.(\d+)\.", name) for name in state)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def heads(width: int) -> int:
        if width % 64:
            raise UserError(
                f"the number of heads cannot be told from a width of {width}, which is no "
                "multiple of 64: put the open_clip_config.json that belongs to the weights beside"
            )
        return width // 64

    width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
    vocabulary, text_width = state["text.token_embedding.weight"].shape
    length = state["text.positional_embedding"].shape[0] - 1
    text = {"width": text_width, "heads": heads(text_width), "vocab_size": vocabulary}
    vision = {"width": width, "head_width": width // heads(width), "patch_size": patch}
    if "visual.attn_pool.query" in state:
        queries = state["visual.attn_pool.query"].shape[0]
        vision |= {"attentional_pool": True, "attn_pooler_queries": queries}
    return {
        "embed_dim": state["visual.proj"].shape[1],
        "vision_cfg": {
            **vision,
            "image_size": grid * patch,
            "layers": layers("visual.transformer.resblocks"),
        },
        "text_cfg": {
            **text,
            "context_length": length,
            "layers": layers("text.transformer.resblocks"),
            "embed_cls": True,
        },
        "multimodal_cfg": {**text, "layers": layers("text_decoder.resblocks")},
    }


def _read_cfg(model_cfg: Mapping[str, Any]) -> CoCaConfig:
    """The configuration that open_clip would build, its defaults included."""
    cfg = dict(model_cfg)
    vision, text, decoder = (
        dict(cfg.pop(name)) for name in ("vision_cfg", "text_cfg", "multimodal_cfg")
    )
    embed = cfg.pop("embed_dim")
    image_width, text_width = vision.pop("width", 768), text.pop("width", 512)
    heads = text.pop("heads", 8)
    pooled = vision.pop("attentional_pool", False)
    queries = vision.pop("n_queries", 256)
    for what, first, second in (
        ("text_cfg.width and multimodal_cfg.width", text_width, decoder.pop("width", 512)),
        ("text_cfg.heads and multimodal_cfg.heads", heads, decoder.pop("heads", 8)),
        ("embed_dim and multimodal_cfg.width", embed if pooled else text_width, text_width),
    ):
        if first != second:
            raise UserError(f"{what} must be equal, got {first} and {second}")
    config = CoCaConfig(
        **_FORM,
        image_size=_side("image_size", vision.pop("image_size", 224)),
        patch_size=_side("patch_size", vision.pop("patch_size", 16)),
        image_width=image_width,
        image_layers=vision.pop("layers", 12),
        image_heads=image_width // vision.pop("head_width", 64),
        text_width=text_width,
        text_layers=text.pop("layers", 12),
        multimodal_layers=decoder.pop("layers", 12),
        text_heads=heads,
        text_length=text.pop("context_length", 77),
        vocab_size=text.pop("vocab_size", 49408),
        pad_id=text.pop("pad_id", 0),
        pooler="normed" if pooled else "none",
        image_final_norm=not pooled,
        pooler_heads=vision.pop("attn_pooler_heads", 8),
        pooler_queries=vision.pop("attn_pooler_queries", queries),
        pooler_ratio=1.0,
        contrastive_width=embed,
    )
    unread = {"text_cfg.embed_cls": text.pop("embed_cls", False)}
    unread |= {"vision_cfg.attentional_pool": pooled} if pooled else {}  # true, or a name
    unread |= {"multimodal_cfg.ls_init_value": decoder.get("ls_init_value")}
    unread |= cfg | {f"vision_cfg.{name}": value for name, value in vision.items()}
    # [CLS] is the text's feature, whatever the way to pool says
    unread |= {f"text_cfg.{name}": text[name] for name in text if name != "pool_type"}
    for name, value in unread.items():
        field = name.rpartition(".")[2]
        if field in _STANDARD:
            taken = value == _STANDARD[field]
        else:
            taken = not value or field in _IDLE
        if not taken:
            raise UserError(
                f"{name} = {value!r} is not supported: only what coca_ViT-B-32, coca_ViT-L-14 and "
                "coca_base are made of is"
            )
    return config


def _side(name: str, size: object) -> int:
    """One side of a square that is given as its side or as two sides."""
    sides = list(size) if isinstance(size, list | tuple) else [size]
    if len(set(sides)) != 1 or not isinstance(sides[0], int):
        raise UserError(f"vision_cfg.{name} must be of a square, got {size!r}")
    return sides[0]


def check_form(config: CoCaConfig) -> None:
    """Raise unless open_clip can hold a model of this configuration.

    Raises:
        UserError: Naming the options that differ.
    """
    pooled = config.pooler == "normed"
    wanted = _FORM | {"image_final_norm": not pooled}
    wanted |= {"pooler_ratio": 1.0, "contrastive_width": config.text_width} if pooled else {}
    given = config.to_dict()
    different = [
        f"{name} is {given[name]!r}, not {value!r}"
        for name, value in wanted.items()
        if given[name] != value
    ]
    if config.pooler == "scaled":
        different.insert(0, "pooler is 'scaled', not 'normed' or 'none'")
    if different:
        raise UserError(
            f"not a model of open_clip's form ({'; '.join(different)}): only those can be written "
            "for open_clip, such as students of an open_clip checkpoint"
        )


def model_cfg(config: CoCaConfig) -> dict[str, Any]:
    """What ``open_clip_config.json`` holds under ``"model_cfg"``, for :func:`config_of` and them.

    Raises:
        UserError: open_clip cannot hold such a model.
    """
    check_form(config)
    vision: dict[str, Any] = {
        "image_size": config.image_size,
        "layers": config.image_layers,
        "width": config.image_width,
        "head_width": config.image_width // config.image_heads,
        "patch_size": config.patch_size,
        "output_tokens": True,
    }
    if config.pooler != "none":
        vision |= {
            "attentional_pool": True,
            "attn_pooler_heads": config.pooler_heads,
            "attn_pooler_queries": config.pooler_queries,
        }
    text = {
        "context_length": config.text_length,
        "vocab_size": config.vocab_size,
        "width": config.text_width,
        "heads": config.text_heads,
    }
    return {
        "embed_dim": config.contrastive_width,
        "vision_cfg": vision,
        "text_cfg": {
            **text,
            "layers": config.text_layers,
            "pad_id": config.pad_id,
            "embed_cls": True,
            "output_tokens": True,
        },
        "multimodal_cfg": {**text, "layers": config.multimodal_layers},
        "custom_text": True,
    }
