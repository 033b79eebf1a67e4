"""The open_clip form equals an independent implementation, and open_clip itself where it imports.

The state is given under open_clip's key names.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from optima_fast.models import CoCa, CoCaConfig, open_clip

VISION_LAYERS, TEXT_LAYERS, VISION_HEADS, POOLER_HEADS, TEXT_HEADS = 2, 2, 4, 4, 4
EMBED, VISION, TEXT, VOCAB, CONTEXT, PATCH, IMAGE, QUERIES = 64, 128, 64, 100, 12, 8, 32, 16


def tiny(pooler: bool) -> CoCaConfig:
    return CoCaConfig(
        image_size=IMAGE,
        patch_size=PATCH,
        image_width=VISION if pooler else TEXT,
        image_layers=VISION_LAYERS,
        image_heads=VISION_HEADS,
        text_width=TEXT,
        text_layers=TEXT_LAYERS,
        multimodal_layers=TEXT_LAYERS,
        text_heads=TEXT_HEADS,
        text_length=CONTEXT,
        vocab_size=VOCAB,
        image_stem="clip",
        image_final_norm=not pooler,
        pooler="normed" if pooler else "none",
        pooler_heads=POOLER_HEADS,
        pooler_queries=QUERIES,
        pooler_ratio=1.0,
        contrastive="query",
        contrastive_width=EMBED,
        decoder_layer="double",
        positions="learned",
        text_activation="gelu",
        softmax_bias=False,
        shifted_cls_mask=True,
    )


def attention_shapes(prefix: str, d: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.in_proj_weight": (3 * d, d),
        f"{prefix}.in_proj_bias": (3 * d,),
        f"{prefix}.out_proj.weight": (d, d),
        f"{prefix}.out_proj.bias": (d,),
    }


def norm_shapes(prefix: str, d: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.weight": (d,), f"{prefix}.bias": (d,)}


def block_shapes(prefix: str, d: int, cross: bool = False) -> dict[str, tuple[int, ...]]:
    return {
        **norm_shapes(f"{prefix}.ln_1", d),
        **(norm_shapes(f"{prefix}.ln_1_kv", d) if cross else {}),
        **attention_shapes(f"{prefix}.attn", d),
        **norm_shapes(f"{prefix}.ln_2", d),
        f"{prefix}.mlp.c_fc.weight": (4 * d, d),
        f"{prefix}.mlp.c_fc.bias": (4 * d,),
        f"{prefix}.mlp.c_proj.weight": (d, 4 * d),
        f"{prefix}.mlp.c_proj.bias": (d,),
    }


def open_clip_state(pooler: bool, seed: int) -> dict[str, Tensor]:
    """Every parameter of a tiny open_clip CoCa, N(0, 0.05^2)."""
    vision = VISION if pooler else TEXT
    out = EMBED if pooler else vision
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": ((IMAGE // PATCH) ** 2 + 1, vision),
        "visual.conv1.weight": (vision, 3, PATCH, PATCH),
        **norm_shapes("visual.ln_pre", vision),
        **norm_shapes("visual.ln_post", out),
        "visual.proj": (out, EMBED),
        "text.token_embedding.weight": (VOCAB, TEXT),
        "text.positional_embedding": (CONTEXT + 1, TEXT),
        "text.cls_emb": (TEXT,),
        **norm_shapes("text.ln_final", TEXT),
        "text.text_projection": (TEXT, EMBED),
        **norm_shapes("text_decoder.ln_final", TEXT),
        "text_decoder.text_projection": (TEXT, VOCAB),
    }
    if pooler:
        shapes |= {
            "visual.attn_pool.query": (QUERIES, EMBED),
            "visual.attn_pool.attn.q_proj_weight": (EMBED, EMBED),
            "visual.attn_pool.attn.k_proj_weight": (EMBED, vision),
            "visual.attn_pool.attn.v_proj_weight": (EMBED, vision),
            "visual.attn_pool.attn.in_proj_bias": (3 * EMBED,),
            "visual.attn_pool.attn.out_proj.weight": (EMBED, EMBED),
            "visual.attn_pool.attn.out_proj.bias": (EMBED,),
            **norm_shapes("visual.attn_pool.ln_q", EMBED),
            **norm_shapes("visual.attn_pool.ln_k", vision),
        }
    for i in range(VISION_LAYERS):
        shapes |= block_shapes(f"visual.transformer.resblocks.{i}", vision)
    for i in range(TEXT_LAYERS):
        shapes |= block_shapes(f"text.transformer.resblocks.{i}", TEXT)
        shapes |= block_shapes(f"text_decoder.resblocks.{i}", TEXT)
        shapes |= block_shapes(f"text_decoder.cross_attn.{i}", TEXT, cross=True)
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) * 0.05 for n, s in shapes.items()}


class Reference:
    """open_clip's forward pass in plain matrix algebra, one head at a time."""

    def __init__(self, state: dict[str, Tensor], pooler: bool) -> None:
        self.s, self.pooler = state, pooler

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.s[f"{name}.weight"] + self.s[f"{name}.bias"]

    def attention(
        self, q: Tensor, kv: Tensor, name: str, heads: int, sees: Tensor | None = None
    ) -> Tensor:
        s = self.s
        if f"{name}.in_proj_weight" in s:
            weights = s[f"{name}.in_proj_weight"].chunk(3)
        else:
            weights = [s[f"{name}.{part}_proj_weight"] for part in "qkv"]
        biases = s[f"{name}.in_proj_bias"].chunk(3)
        q, k, v = (x @ w.T + b for x, w, b in zip((q, kv, kv), weights, biases, strict=True))
        outs = []
        for qh, kh, vh in zip(*(x.chunk(heads, dim=-1) for x in (q, k, v)), strict=True):
            scores = qh @ kh.transpose(-2, -1) / math.sqrt(qh.shape[-1])
            if sees is not None:
                scores = scores.masked_fill(~sees, -math.inf)
            outs.append(scores.softmax(-1) @ vh)
        return torch.cat(outs, -1) @ s[f"{name}.out_proj.weight"].T + s[f"{name}.out_proj.bias"]

    def mlp(self, x: Tensor, name: str) -> Tensor:
        s = self.s
        h = x @ s[f"{name}.c_fc.weight"].T + s[f"{name}.c_fc.bias"]
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        return h @ s[f"{name}.c_proj.weight"].T + s[f"{name}.c_proj.bias"]

    def block(self, x: Tensor, name: str, heads: int, sees: Tensor | None = None) -> Tensor:
        h = self.norm(x, f"{name}.ln_1")
        x = x + self.attention(h, h, f"{name}.attn", heads, sees)
        return x + self.mlp(self.norm(x, f"{name}.ln_2"), f"{name}.mlp")

    def image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        s = self.s
        x = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        x = x @ s["visual.conv1.weight"].flatten(1).T
        cls = s["visual.class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([cls, x], 1) + s["visual.positional_embedding"]
        x = self.norm(x, "visual.ln_pre")
        for i in range(VISION_LAYERS):
            x = self.block(x, f"visual.transformer.resblocks.{i}", VISION_HEADS)
        if self.pooler:
            query = self.norm(s["visual.attn_pool.query"], "visual.attn_pool.ln_q")
            kv = self.norm(x, "visual.attn_pool.ln_k")
            x = self.attention(
                query.expand(len(x), -1, -1), kv, "visual.attn_pool.attn", POOLER_HEADS
            )
        x = self.norm(x, "visual.ln_post")
        return F.normalize(x[:, 0] @ s["visual.proj"], dim=-1), x[:, 1:]

    def text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        s, (batch, length) = self.s, ids.shape
        cls = s["text.cls_emb"].expand(batch, 1, -1)
        x = torch.cat([s["text.token_embedding.weight"][ids], cls], 1)
        x = x + s["text.positional_embedding"][: length + 1]
        valid = torch.cat([torch.ones(batch, 1, dtype=torch.bool), ids != 0], 1)
        causal = torch.ones(length + 1, length + 1, dtype=torch.bool).tril()
        sees = causal & valid[:, None, :]
        for i in range(TEXT_LAYERS):
            x = self.block(x, f"text.transformer.resblocks.{i}", TEXT_HEADS, sees)
        feature = self.norm(x[:, -1], "text.ln_final") @ s["text.text_projection"]
        return F.normalize(feature, dim=-1), x[:, :-1]

    def __call__(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image_features, tokens = self.image(images)
        text_features, x = self.text(ids)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        for i in range(TEXT_LAYERS):
            x = self.block(x, f"text_decoder.resblocks.{i}", TEXT_HEADS, causal)
            name = f"text_decoder.cross_attn.{i}"
            q, kv = self.norm(x, f"{name}.ln_1"), self.norm(tokens, f"{name}.ln_1_kv")
            x = x + self.attention(q, kv, f"{name}.attn", TEXT_HEADS)
            x = x + self.mlp(self.norm(x, f"{name}.ln_2"), f"{name}.mlp")
        x = self.norm(x, "text_decoder.ln_final")
        return image_features, text_features, x @ self.s["text_decoder.text_projection"]


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, IMAGE, IMAGE, generator=generator)
    ids = torch.randint(1, VOCAB, (4, CONTEXT), generator=generator)
    for row, length in enumerate((12, 11, 5, 2)):
        ids[row, length:] = 0
    return images, ids


def ours(state: dict[str, Tensor], pooler: bool) -> CoCa:
    model = CoCa(tiny(pooler))
    model.load_state_dict(open_clip.from_open_clip(state, model.config), strict=True)
    return model.eval()


def compare(
    model: CoCa, images: Tensor, ids: Tensor, expected: tuple[Tensor, Tensor, Tensor]
) -> None:
    with torch.no_grad():
        out = model(images, ids, features=True)
        logits = model.token_logits(out.decoded)
        plain = model(images, ids)
    # some versions of open_clip leave out the last token's logits
    length = expected[2].shape[1]
    real = ids[:, :length] != 0
    for name, got, want in (
        ("image features", out.image_features, expected[0]),
        ("text features", out.text_features, expected[1]),
        ("logits", logits[:, :length][real], expected[2][real]),
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(plain.decoded, out.decoded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooler", [True, False], ids=["pooler", "no pooler"])
@pytest.mark.parametrize("length", [CONTEXT, 7])
def test_equals_an_independent_implementation(pooler: bool, length: int) -> None:
    state = open_clip_state(pooler, seed=3)
    images, ids = inputs(seed=4)
    ids = ids[:, :length]
    expected = Reference(state, pooler)(images, ids)
    compare(ours(state, pooler), images, ids, expected)


def test_correct_cls_mask_differs_in_padded_texts_only() -> None:
    state = open_clip_state(True, seed=5)
    images, ids = inputs(seed=6)
    correct = CoCa(replace(tiny(True), shifted_cls_mask=False))
    correct.load_state_dict(open_clip.from_open_clip(state, tiny(True)))
    with torch.no_grad():
        shifted = ours(state, True)(images, ids, features=True)
        correct_out = correct.eval()(images, ids, features=True)
    gap = (shifted.text_features - correct_out.text_features).abs().amax(-1)
    assert gap[0] < 1e-6
    assert (gap[1:] > 1e-5).all()
    torch.testing.assert_close(shifted.decoded, correct_out.decoded, rtol=0, atol=1e-6)


def test_equals_open_clip() -> None:
    try:
        from open_clip.coca_model import CoCa as OpenClipCoCa
    except ImportError as error:
        pytest.skip(f"open_clip (open_clip_torch) does not import here: {error}")
    text = {"context_length": CONTEXT, "vocab_size": VOCAB, "width": TEXT, "heads": TEXT_HEADS}
    model = OpenClipCoCa(
        embed_dim=EMBED,
        multimodal_cfg={**text, "layers": TEXT_LAYERS},
        text_cfg={**text, "layers": TEXT_LAYERS, "embed_cls": True, "output_tokens": True},
        vision_cfg={
            "image_size": IMAGE,
            "patch_size": PATCH,
            "layers": VISION_LAYERS,
            "width": VISION,
            "head_width": VISION // VISION_HEADS,
            "attentional_pool": True,
            "attn_pooler_heads": POOLER_HEADS,
            "attn_pooler_queries": QUERIES,
            "output_tokens": True,
        },
    ).eval()
    state = open_clip_state(True, seed=7)
    model.load_state_dict(state, strict=True)
    images, ids = inputs(seed=8)
    with torch.no_grad():
        out = model(images, ids)
    compare(
        ours(state, True), images, ids, (out["image_features"], out["text_features"], out["logits"])
    )
