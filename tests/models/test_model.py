"""What a token may see, features, gradients, one graph, one seed, and wrong arguments."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from models.forms import (
    ALL,
    CAPPED,
    OPEN_CLIP,
    PAPER,
    assert_taps_equal,
    build,
    every_form,
    inputs,
)
from torch import nn

from optima_fast.models import MODULES, CoCaConfig, coca, presets


@every_form
def test_one_token_after_the_other_equals_all_at_once(config: CoCaConfig) -> None:
    model = build(config).double().eval()
    images, text = inputs()
    with torch.no_grad():
        tokens = model.encode_images(images.double())
        whole = model(images.double(), text).decoded
        past = model.new_past()
        parts = [model.extend(tokens, text[:, i : i + 1], past) for i in range(text.shape[1])]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-10)
        for _ in range(text.shape[1], config.text_length):
            model.extend(tokens, text[:, :1], past)
        with pytest.raises(ValueError, match=rf"at most text_length = {config.text_length} tokens"):
            model.extend(tokens, text[:, :1], past)


@every_form
def test_one_token_after_the_other_under_autocast(config: CoCaConfig) -> None:
    model, (images, text) = build(config).eval(), inputs()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = model.encode_images(images)
        past = model.new_past()
        parts = [model.extend(tokens, text[:, i : i + 1], past) for i in range(text.shape[1])]
        whole = model(images, text).decoded
    assert past["text"][0].k is not None
    assert past["text"][0].k.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=0.1)


@every_form
def test_a_later_token_changes_nothing_before_it(config: CoCaConfig) -> None:
    model, (images, text) = build(config), inputs()
    changed = text.clone()
    changed[:, 4] = (changed[:, 4] + 1).clamp_min(1)
    with torch.no_grad():
        before, after = (model(images, t, taps=ALL) for t in (text, changed))
    gap = (before.decoded - after.decoded).abs().amax(-1)
    assert gap[:, :4].max() == 0
    assert (gap[:, 4] > 1e-4).all()
    for module in ("text", "multimodal"):
        for a, b in zip(before.taps[module], after.taps[module], strict=True):
            assert torch.equal(a.hidden[:, :4], b.hidden[:, :4])


@every_form
def test_more_padding_changes_nothing(config: CoCaConfig) -> None:
    config = replace(config, shifted_cls_mask=False)
    model, (images, text) = build(config), inputs()
    longer = torch.cat([text, text.new_zeros(3, 2)], 1)
    features = config.contrastive != "none"
    if features and config.positions == "learned":
        # [CLS] takes the position after the last token, so padding moves it
        with torch.no_grad():
            model.text.positions[8:] = model.text.positions[8]
    with torch.no_grad():
        short, long = (model(images, t, features=features) for t in (text, longer))
    real = text != 0
    torch.testing.assert_close(long.decoded[:, :8][real], short.decoded[real])
    torch.testing.assert_close(long.text_features, short.text_features)
    assert torch.equal(long.masks["multimodal"], longer != 0)


@every_form
def test_features(config: CoCaConfig) -> None:
    model, (images, text) = build(config), inputs()
    if config.contrastive == "none":
        with pytest.raises(ValueError, match="features need contrastive 'query' or 'cascade'"):
            model(images, text, features=True)
        return
    with torch.no_grad():
        out = model(images, text, features=True, taps=ALL)
        plain = model(images, text, taps={"text": [0]})
    for x in (out.image_features, out.text_features):
        assert x.shape == (3, 16 if config is OPEN_CLIP else 24)
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(out.decoded, plain.decoded)
    assert plain.image_features is None
    assert plain.text_features is None
    assert out.masks["text"].shape == out.taps["text"][0].hidden.shape[:2] == (3, 9)
    assert out.masks["text"][:, -1].all()
    assert plain.masks["text"].shape == plain.taps["text"][0].hidden.shape[:2] == (3, 8)


@every_form
def test_pairs_equal_the_repeated_batch(config: CoCaConfig) -> None:
    model, (images, text) = build(config), inputs(images=2, texts=3)
    pair_image, pair_text = torch.tensor([1, 0, 1, 1]), torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        paired = model(images, text, pair_image=pair_image, pair_text=pair_text, taps=ALL)
        repeated = model(images[pair_image], text[pair_text], taps=ALL)
    torch.testing.assert_close(paired.decoded, repeated.decoded)
    assert_taps_equal(
        {"multimodal": paired.taps["multimodal"]}, {"multimodal": repeated.taps["multimodal"]}
    )
    assert torch.equal(paired.masks["multimodal"], repeated.masks["multimodal"])
    assert paired.masks["image"] is None
    assert torch.equal(paired.masks["text"], text != 0)
    assert paired.taps["image"][0].hidden.shape[0] == 2
    assert paired.taps["text"][0].hidden.shape[0] == 3


@every_form
@pytest.mark.parametrize("features", [False, True])
def test_gradient_reaches_every_parameter_that_is_used(config: CoCaConfig, features: bool) -> None:
    features = features and config.contrastive != "none"
    model, (images, text) = build(config), inputs()
    out = model(images, text, taps=ALL, lse=True, features=features)
    total = model.token_logits(out.decoded).logsumexp(-1).sum()
    if features:
        similarity = out.image_features @ out.text_features.T
        total = total + (similarity * model.logit_scale.exp()).logsumexp(-1).sum()
    total.backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    expected: set[str] = set()
    if config.contrastive != "none" and not features:
        aside = ("contrastive_pooler.", "image_projection.", "text_projection.", "text.norm_cls.")
        names = [name for name, _ in model.named_parameters()]
        expected = {n for n in names if n.startswith(aside)} | {"text.cls_token", "logit_scale"}
    assert unused == expected
    for name, parameter in model.named_parameters():
        if name not in unused:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("config", "backend"),
    [(OPEN_CLIP, "aot_eager"), (CAPPED, "eager")],  # capped attention is plain operations
    ids=["open_clip", "capped"],
)
def test_compiles_into_one_graph(config: CoCaConfig, backend: str) -> None:
    torch._dynamo.reset()
    model = build(replace(config, image_layers=1, text_layers=1, multimodal_layers=1))
    images, text = inputs(images=2, texts=3)
    pair_image, pair_text = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 2])
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def run(f: nn.Module) -> Any:
        return f(
            images,
            text,
            pair_image=pair_image,
            pair_text=pair_text,
            taps={"image": [0], "multimodal": [0]},
            lse=True,
            features=True,
        )

    got, want = run(compiled), run(model)
    torch.testing.assert_close(got.decoded, want.decoded)
    torch.testing.assert_close(got.text_features, want.text_features)
    assert_taps_equal(got.taps, want.taps)
    for out in (got, want):
        (out.decoded.square().sum() + out.taps["image"][0].q.square().sum()).backward()
        out_grad = [p.grad.clone() for p in model.image.parameters()]
        model.zero_grad()
        if out is got:
            first = out_grad
    for a, b in zip(first, out_grad, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@every_form
def test_runs_under_autocast(config: CoCaConfig) -> None:
    model, (images, text) = build(config), inputs()
    features = config.contrastive != "none"
    expected = model(images, text, features=features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images, text, taps=ALL, lse=True, features=features)
    tap = out.taps["multimodal"][1]
    dtypes = [x.dtype for x in (tap.hidden, tap.q, tap.cross_k, tap.lse)]
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    torch.testing.assert_close(out.decoded, expected.decoded, rtol=0, atol=0.1)
    out.decoded.square().sum().backward()
    assert model.image.positions.grad.isfinite().all()


def test_same_seed_same_model() -> None:
    first, second = (build(PAPER, seed) for seed in (3, 3))
    other = build(PAPER, 4)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.image.positions, other.image.positions)


@pytest.mark.parametrize("name", ["digits_teacher", "digits_student"])
def test_starts_at_a_sensible_scale(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter is set, states stay of order one, and first guesses are near uniform."""
    empty = torch.Tensor.uniform_
    # nn.Linear and nn.Conv2d fill themselves with uniform_: what we do not set ourselves is NaN
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda x, *_, **__: empty(x).fill_(math.nan))
    torch.manual_seed(0)
    model = coca(name)
    config = presets.get(name)
    images = torch.rand(4, 1, 24, 24)
    text = torch.randint(1, 64, (4, 9))
    counts = {module: [n - 1] for module, n in config.layer_counts.items()}
    with torch.no_grad():
        out = model(images, text, taps=counts)
        logits = model.token_logits(out.decoded)
    assert all(p.isfinite().all() for p in model.parameters())
    for module in MODULES:
        assert 0.05 < out.taps[module][0].hidden.std() < 3, module
    assert logits.std() < 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.zeros(3, 2, 12, 8)},
            r"images must be \[I, 2, 12, 12\], got \[3, 2, 12, 8",
        ),
        ({"images": torch.zeros(2, 12, 12)}, r"images must be \[I, 2, 12, 12\], got \[2, 12, 12"),
        ({"images": None}, "images must be given when their module runs, got None"),
        ({"text": None}, "text must be given when their module runs, got None"),
        ({"text": torch.ones(3, 11).long()}, r"L from 1 to text_length = 10, got \[3, 11\]"),
        ({"text": torch.ones(3, 0).long()}, r"L from 1 to text_length = 10, got \[3, 0\]"),
        ({"text": torch.ones(8).long()}, r"text must be \[T, L\].* got \[8\]"),
        ({"pair_image": torch.zeros(4).long()}, "got 4 images and 3 texts"),
        ({"pair_text": torch.zeros(4).long()}, "got 3 images and 4 texts"),
        ({"run": ("multimodal",)}, r"needs all three modules, got run=\['multimodal'\]"),
        ({"run": ("video",)}, "must be one of image, text, multimodal, got 'video'"),
        ({"taps": {"audio": [0]}}, "must be one of image, text, multimodal, got 'audio'"),
        (
            {"taps": {"image": [0]}, "run": ("text",)},
            r"taps must be of modules that run, got 'image' and run=\['text'\]",
        ),
        ({"taps": {"image": [3]}}, r"taps\['image'\] must be ascending .* 0 to 2, got \[3\]"),
        ({"taps": {"image": [-1]}}, r"taps\['image'\] must be ascending .* 0 to 2, got \[-1\]"),
        ({"taps": {"text": [1, 0]}}, r"taps\['text'\] must be ascending .* 0 to 1, got \[1, 0\]"),
        ({"taps": {"text": [0, 0]}}, r"taps\['text'\] must be ascending .* 0 to 1, got \[0, 0\]"),
    ],
)
def test_rejects(change: dict[str, Any], message: str) -> None:
    images, text = inputs()
    arguments: dict[str, Any] = {"images": images, "text": text} | change
    with pytest.raises(ValueError, match=message):
        build(PAPER)(**arguments)
