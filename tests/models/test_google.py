"""The paper's (Google's) form equals an implementation written from its description.

It runs [CLS] and the padding mask through both decoders, as Google's code does, and so also shows
that the model may leave [CLS] out.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from optima_fast.models import CoCa, CoCaConfig

HEADS, WIDTH, LENGTH, VOCAB, IMAGE, PATCH = 4, 32, 9, 50, 24, 6


def tiny(cap: float | None) -> CoCaConfig:
    return CoCaConfig(
        image_size=IMAGE,
        patch_size=PATCH,
        image_width=WIDTH,
        image_layers=2,
        image_heads=HEADS,
        text_width=WIDTH,
        text_layers=2,
        multimodal_layers=2,
        text_heads=HEADS,
        text_length=LENGTH,
        vocab_size=VOCAB,
        pooler_heads=HEADS,
        pooler_queries=16,
        attention_cap=cap,
    )


class Reference:
    def __init__(self, state: dict[str, Tensor], cap: float | None) -> None:
        self.s, self.cap = state, cap

    def dense(self, x: Tensor, name: str) -> Tensor:
        return x @ self.s[f"{name}.weight"].T + self.s[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.s[f"{name}.weight"] + self.s[f"{name}.bias"]

    def heads(
        self, q: Tensor, k: Tensor, v: Tensor, sees: Tensor | None, cap: float | None
    ) -> Tensor:
        outs = []
        for qh, kh, vh in zip(*(x.chunk(HEADS, dim=-1) for x in (q, k, v)), strict=True):
            scores = qh @ kh.transpose(-2, -1) / math.sqrt(qh.shape[-1])
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            if sees is not None:
                scores = scores.masked_fill(~sees, -1e30)
            outs.append(scores.softmax(-1) @ vh)
        return torch.cat(outs, -1)

    def self_attention(self, x: Tensor, name: str, sees: Tensor | None) -> Tensor:
        q, k, v = self.dense(x, f"{name}.qkv").chunk(3, dim=-1)
        return self.dense(self.heads(q, k, v, sees, self.cap), f"{name}.out")

    def cross_attention(self, x: Tensor, source: Tensor, name: str, cap: float | None) -> Tensor:
        q = self.dense(x, f"{name}.q")
        if f"{name}.scale" in self.s:
            # 1.442695041 is 1 / softplus(0)
            scale = torch.log1p(torch.exp(self.s[f"{name}.scale"])) * 1.442695041
            q = q * scale.repeat(HEADS)
        k, v = self.dense(source, f"{name}.kv").chunk(2, dim=-1)
        return self.dense(self.heads(q, k, v, None, cap), f"{name}.out")

    def mlp(self, x: Tensor, name: str, gelu: bool) -> Tensor:
        h = self.dense(x, f"{name}.up")
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2))) if gelu else h.clamp_min(0)
        return self.dense(h, f"{name}.down")

    def pool(self, x: Tensor, name: str) -> Tensor:
        query = self.s[f"{name}.query"].expand(len(x), -1, -1)
        pooled = self.cross_attention(query, x, f"{name}.attention", None)
        return self.norm(pooled, f"{name}.norm")

    def layer(self, x: Tensor, name: str, sees: Tensor | None, gelu: bool) -> Tensor:
        h = self.norm(x, f"{name}.norm_attention")
        x = x + self.self_attention(h, f"{name}.attention", sees)
        return x + self.mlp(self.norm(x, f"{name}.norm_mlp"), f"{name}.mlp", gelu)

    def __call__(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, (batch, length) = self.s, ids.shape
        x = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        x = x @ s["image.patches.weight"].flatten(1).T + s["image.patches.bias"]
        x = x + s["image.positions"]
        for i in range(2):
            x = self.layer(x, f"image.layers.{i}", None, gelu=True)
        tokens = self.pool(self.norm(x, "image.norm"), "pooler")
        image_features = F.normalize(self.pool(tokens, "contrastive_pooler")[:, 0], dim=-1)

        half = WIDTH // 2
        position = torch.empty(length, WIDTH)
        for p in range(length):
            for i in range(half):
                angle = p / 10_000 ** (i / (half - 1))
                position[p, i], position[p, half + i] = math.sin(angle), math.cos(angle)
        x = s["text.embedding.weight"][ids] * math.sqrt(WIDTH) + position
        cls = s["text.cls_token"].expand(batch, 1, -1) * math.sqrt(WIDTH)
        x = torch.cat([x, cls], 1)
        valid = torch.cat([ids != 0, torch.ones(batch, 1, dtype=torch.bool)], 1)
        sees = torch.ones(length + 1, length + 1, dtype=torch.bool).tril() & valid[:, None]
        for i in range(2):
            x = self.layer(x, f"text.layers.{i}", sees, gelu=False)
        text_features = F.normalize(self.norm(x[:, -1], "text.norm_cls"), dim=-1)

        for i in range(2):
            name = f"multimodal.layers.{i}"
            h = self.norm(x, f"{name}.norm_attention")
            x = x + self.self_attention(h, f"{name}.attention", sees)
            h = self.norm(x, f"{name}.norm_cross")
            x = x + self.cross_attention(h, tokens, f"{name}.cross", self.cap)
            x = x + self.mlp(self.norm(x, f"{name}.norm_mlp"), f"{name}.mlp", gelu=False)
        x = self.norm(x, "multimodal.norm")[:, :-1]
        return image_features, text_features, self.dense(x, "to_vocabulary")


@pytest.mark.parametrize("cap", [None, 0.5], ids=["no cap", "cap"])
@pytest.mark.parametrize("length", [LENGTH, 4])
def test_equals_an_independent_implementation(cap: float | None, length: int) -> None:
    generator = torch.Generator().manual_seed(1)
    model = CoCa(tiny(cap)).eval().double()
    # large enough that caps and the exact form of GELU show
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).double() * 0.5
    images = torch.randn(3, 3, IMAGE, IMAGE, generator=generator).double()
    ids = torch.randint(1, VOCAB, (3, length), generator=generator)
    ids[1, 3:] = 0
    ids[2, 1:] = 0
    real = ids != 0
    expected = Reference(model.state_dict(), cap)(images, ids)
    with torch.no_grad():
        out = model(images, ids, features=True)
        logits = model.token_logits(out.decoded)
        plain = model(images, ids)
    for got, want in (
        (out.image_features, expected[0]),
        (out.text_features, expected[1]),
        (logits[real], expected[2][real]),
        (model.token_logits(plain.decoded)[real], expected[2][real]),
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_cap_matters_in_this_test() -> None:
    torch.manual_seed(0)
    images, ids = torch.randn(1, 3, IMAGE, IMAGE), torch.randint(1, VOCAB, (1, LENGTH))
    free = CoCa(tiny(None))
    capped = CoCa(tiny(0.5))
    capped.load_state_dict(free.state_dict())
    with torch.no_grad():
        gap = free(images, ids).decoded - capped(images, ids).decoded
    assert gap.abs().max() > 1e-3
