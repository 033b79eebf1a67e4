"""open_clip's form against what open_clip itself computed and called its weights.

record_open_clip.py recorded that; where open_clip imports it is run again.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.record_open_clip import MODELS, draw, inputs
from torch import Tensor

from optima_fast.errors import UserError
from optima_fast.models import CoCa, initialise, open_clip, presets

RECORDED = np.load(Path(__file__).with_name("open_clip_3.3.0.npz"))
DESCRIBED: dict[str, Any] = json.loads(RECORDED["described"].tobytes())
PRESET = {name: f"open_clip_{name}" for name in DESCRIBED["published"]}


def weights(name: str) -> dict[str, Tensor]:
    described = DESCRIBED["models"][name]
    return draw(described["shapes"], described["seed"])


def build(name: str, dtype: torch.dtype) -> CoCa:
    state = weights(name)
    model = CoCa(open_clip.config_of(DESCRIBED["models"][name]["model_cfg"], state)).to(dtype)
    model.load_state_dict(open_clip.from_open_clip(state, model.config), strict=True)
    return model.eval()


def meta(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def computed(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What the recorder keeps of open_clip's outputs, of ours."""
    images, ids = inputs(DESCRIBED["models"][name]["seed"])
    model = build(name, dtype)
    with torch.no_grad():
        out = model(images.to(dtype), ids, features=True)
        logits = model.token_logits(out.decoded)[:, :-1]
    return {
        "image_features": out.image_features.double(),
        "text_features": out.text_features.double(),
        "logits": logits[ids[:, :-1] != 0].double(),
    }


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", MODELS)
def test_equals_what_open_clip_computed(name: str, dtype: torch.dtype, atol: float) -> None:
    for what, got in computed(name, dtype).items():
        want = torch.from_numpy(RECORDED[f"{name}/{what}"])
        torch.testing.assert_close(got, want, rtol=0, atol=atol, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_equals_open_clip(name: str) -> None:
    try:
        from open_clip.coca_model import CoCa as OpenClipCoCa
    except ImportError as error:
        pytest.skip(f"open_clip (open_clip_torch) does not import here: {error}")
    options = {k: v for k, v in MODELS[name].items() if k != "custom_text"}
    model = OpenClipCoCa(**options).double().eval()
    model.load_state_dict(weights(name), strict=True)
    images, ids = inputs(DESCRIBED["models"][name]["seed"])
    with torch.no_grad():
        out = model(images, ids)
    # some versions leave out the last token's logits
    out["logits"] = out["logits"][:, : ids.shape[1] - 1][ids[:, :-1] != 0]
    for what, got in computed(name).items():
        torch.testing.assert_close(got, out[what], rtol=0, atol=1e-10)


def test_cls_of_a_shorter_text_takes_the_position_after_it() -> None:
    whole = build("pooler", torch.float64)
    cut = CoCa(replace(whole.config, text_length=7)).double()
    state = whole.state_dict()
    cut.load_state_dict({**state, "text.positions": state["text.positions"][:8]})
    images, ids = inputs(1)
    with torch.no_grad():
        got, want = (model.eval()(images, ids[:, :7], features=True) for model in (whole, cut))
    torch.testing.assert_close(got.text_features, want.text_features, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.decoded, want.decoded, rtol=0, atol=1e-12)


def test_a_correct_cls_mask_differs_in_padded_texts_only() -> None:
    shifted = build("pooler", torch.float64)
    correct = CoCa(replace(shifted.config, shifted_cls_mask=False)).double()
    correct.load_state_dict(shifted.state_dict())
    with torch.no_grad():
        a, b = (model.eval()(*inputs(1), features=True) for model in (shifted, correct))
    gap = (a.text_features - b.text_features).abs().amax(-1)
    assert gap[0] < 1e-12
    assert (gap[1:] > 1e-5).all()
    torch.testing.assert_close(a.decoded, b.decoded, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_exact(name: str) -> None:
    state = weights(name)
    back = open_clip.to_open_clip(build(name, torch.float64))
    assert list(map(str, sorted(back))) == sorted(state)
    for key, value in state.items():
        assert back[key].is_contiguous()
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize("name", PRESET)
def test_published_names_and_shapes(name: str) -> None:
    recorded = DESCRIBED["published"][name]["shapes"]
    shapes = open_clip.shapes(presets.get(PRESET[name]))
    assert {k: list(v) for k, v in shapes.items()} == recorded


@pytest.mark.parametrize("name", PRESET)
def test_configuration_from_the_description_and_from_shapes(name: str) -> None:
    described = DESCRIBED["published"][name]
    state = meta(described["shapes"])
    assert open_clip.config_of(described["model_cfg"], state) == presets.get(PRESET[name])
    assert open_clip.config_of(None, state) == presets.get(PRESET[name])


@pytest.mark.parametrize("name", [*PRESET, *MODELS])
def test_description_there_and_back(name: str) -> None:
    described = {**DESCRIBED["published"], **DESCRIBED["models"]}[name]
    state = meta(described["shapes"])
    config = open_clip.config_of(described["model_cfg"], state)
    for form in (config, replace(config, pad_id=3)):
        cfg = json.loads(json.dumps(open_clip.model_cfg(form)))
        assert open_clip.config_of(cfg, state) == form


def test_open_clip_names_are_presets() -> None:
    for name in ("coca_ViT-B-32", "coca_ViT-L-14"):
        assert presets.get(name) == presets.get(f"open_clip_{name}")


def test_old_versions_masks_and_scale_are_taken() -> None:
    state = weights("pooler")
    config = build("pooler", torch.float64).config
    want = open_clip.from_open_clip(state, config)
    state["text.attn_mask"] = state["text_decoder.attn_mask"] = torch.zeros(13, 13)
    state["logit_scale"] = state["logit_scale"].reshape(1)
    got = open_clip.from_open_clip(state, config)
    assert want.keys() == got.keys()
    assert torch.equal(want["logit_scale"], got["logit_scale"])
    assert "text.attn_mask" in state
    assert state["logit_scale"].shape == (1,)


def test_one_report_of_all_that_does_not_fit() -> None:
    state = weights("pooler")
    config = build("pooler", torch.float64).config
    for key in [key for key in state if ".ln_2." in key]:
        del state[key]
    state |= {"visual.head": torch.zeros(1), "visual.proj": torch.zeros(64, 7)}
    with pytest.raises(UserError) as error:
        open_clip.from_open_clip(state, config)
    message = str(error.value)
    assert "\n" not in message
    assert "of 141 weights that this CoCa needs" in message, message
    assert "18 missing (visual.transformer.resblocks.0.ln_2.weight, " in message, message
    assert message.count("ln_2") == 3
    assert "1 unexpected (visual.head)" in message
    assert "1 of another shape (visual.proj [64, 7] instead of [64, 64])" in message
    assert "open_clip_config.json" in message


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["visual.proj", "transformer.resblocks.0.ln_1.weight"], "a plain CLIP"),
        (["visual.trunk.blocks.0.norm1.weight", "text.ln_final.bias"], "a timm image tower"),
        (["text_decoder.ln_final.bias", "text.transformer.embeddings.x"], "Hugging Face text"),
        (["vision_model.embeddings.class_embedding"], "the transformers library"),
        (["coca.image.positions", "head.classifier.weight"], "run's student"),
        (["layer1.0.conv1.weight", "fc.bias"], "a ResNet"),
        (["a", "b", "c", "d"], "something else, whose weights are called a, b, c"),
        ([], "called nothing"),
    ],
)
def test_another_architecture_is_named(names: list[str], what: str) -> None:
    with pytest.raises(UserError, match=f"^no CoCa of open_clip but .*{what}"):
        open_clip.config_of(None, {name: torch.zeros(1) for name in names})


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("vision_cfg", "attentional_pool", "parallel", "attentional_pool = 'parallel'"),
        ("vision_cfg", "qk_norm", True, "vision_cfg.qk_norm = True is not supported"),
        ("vision_cfg", "timm_model_name", "vit", "vision_cfg.timm_model_name = 'vit'"),
        ("vision_cfg", "pool_type", "avg", "vision_cfg.pool_type = 'avg'"),
        ("vision_cfg", "image_size", [32, 64], "image_size must be of a square, got .32, 64."),
        ("vision_cfg", "patch_size", 7, "image_size must be a multiple of patch_size"),
        ("vision_cfg", "layers", [1, 2], "image_layers must be an integer"),
        ("vision_cfg", "width", "wide", "does not fit"),
        ("text_cfg", "embed_cls", False, "text_cfg.embed_cls = False"),
        ("text_cfg", "mlp_ratio", 2, "text_cfg.mlp_ratio = 2"),
        ("text_cfg", "width", 32, "text_cfg.width and multimodal_cfg.width must be equal, got 32"),
        ("multimodal_cfg", "heads", 2, "multimodal_cfg.heads must be equal, got 4 and 2"),
        ("multimodal_cfg", "ls_init_value", 0.1, "multimodal_cfg.ls_init_value = 0.1"),
        (None, "quick_gelu", True, "quick_gelu = True is not supported"),
        (None, "embed_dim", 32, "embed_dim and multimodal_cfg.width must be equal, got 32"),
    ],
)
def test_an_unsupported_form_is_named(
    section: str | None, field: str, value: object, message: str
) -> None:
    cfg = deepcopy(MODELS["pooler"])
    (cfg[section] if section else cfg)[field] = value
    with pytest.raises(UserError, match=message):
        open_clip.config_of(cfg, weights("pooler"))


def test_fields_that_change_nothing_are_taken() -> None:
    cfg = deepcopy(MODELS["pooler"])
    want = open_clip.config_of(cfg, weights("pooler"))
    cfg["vision_cfg"] |= {"patch_dropout": 0.5, "mlp_ratio": 4.0, "qk_norm": False}
    cfg["vision_cfg"] |= {"image_size": [32, 32], "pool_type": "tok", "timm_pool": "avg"}
    cfg["text_cfg"] |= {"pool_type": "argmax", "eos_id": 2, "hf_tokenizer_name": "x"}
    cfg["multimodal_cfg"] |= {"mlp_ratio": 4, "dim_head": 64, "n_queries": 256}
    cfg |= {"quick_gelu": False, "init_logit_bias": None}
    assert open_clip.config_of(cfg, weights("pooler")) == want
    del cfg["multimodal_cfg"]
    with pytest.raises(UserError, match="model_cfg lacks 'multimodal_cfg'"):
        open_clip.config_of(cfg, weights("pooler"))


def test_each_number_of_layers_is_told_from_shapes() -> None:
    student = initialise.like(presets.get("coca_ViT-B-32"), presets.get("coca_tiny6"))
    state = {n: torch.empty(s, device="meta") for n, s in open_clip.shapes(student).items()}
    found = open_clip.config_of(None, state)
    assert found.layer_counts == {"image": 3, "text": 2, "multimodal": 1}
    assert found == student


def test_heads_that_shapes_do_not_tell() -> None:
    state = meta(DESCRIBED["models"]["no pooler"]["shapes"])
    assert open_clip.config_of(None, state).image_heads == 1
    state["text.token_embedding.weight"] = torch.empty(100, 48, device="meta")
    with pytest.raises(UserError, match="width of 48, which is no multiple of 64"):
        open_clip.config_of(None, state)


def test_shapes_of_no_model() -> None:
    state = meta(DESCRIBED["published"]["coca_ViT-B-32"]["shapes"])
    for name, value, message in (
        ("visual.conv1.weight", torch.zeros(3), "the state dict does not fit: not enough values"),
        ("visual.proj", torch.zeros(3), "the state dict does not fit: tuple index out of range"),
        ("text.positional_embedding", torch.zeros(0, 2), "text_length must be an integer of at"),
    ):
        with pytest.raises(UserError, match=f"^no CoCa of open_clip: .*{message}"):
            open_clip.config_of(None, {**state, name: value})
    del state["text.token_embedding.weight"]
    with pytest.raises(UserError, match=r"the state dict lacks 'text\.token_embedding\.weight'"):
        open_clip.config_of(None, state)


def test_only_open_clips_form_is_written() -> None:
    with pytest.raises(UserError, match="pooler is 'scaled'.*decoder_layer is 'single', not 'dou"):
        open_clip.model_cfg(presets.get("coca_tiny6"))
    config = open_clip.config_of(MODELS["pooler"], weights("pooler"))
    for option in ({"shifted_cls_mask": False}, {"image_channels": 1}, {"contrastive_width": 32}):
        (name,) = option
        with torch.device("meta"):
            model = CoCa(replace(config, **option))
        with pytest.raises(UserError, match=rf"not a model of open_clip's form \({name} is"):
            open_clip.to_open_clip(model)
