"""What records hold, and that only the modules that are named run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models.forms import ALL, PAPER, assert_taps_equal, build, every_form, inputs
from torch import Tensor, nn

from optima_fast.models import MODULES, CoCaConfig, LayerTap


def attended(attention: nn.Module, tap: LayerTap, v: Tensor, sees: Tensor | None) -> Tensor:
    """The attention's output from the recorded q and k, and the values."""
    scores = tap.q @ tap.k.transpose(-2, -1) / math.sqrt(tap.q.shape[-1])
    if attention.cap is not None:
        scores = attention.cap * torch.tanh(scores / attention.cap)
    if sees is not None:
        scores = scores.masked_fill(~sees, -math.inf)
    if tap.lse is not None:
        torch.testing.assert_close(tap.lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    probs = scores.softmax(-1) if tap.lse is None else (scores - tap.lse[..., None]).exp()
    return attention.out((probs @ v).transpose(1, 2).flatten(2))


@every_form
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("features", [False, True])
def test_records_reproduce_the_attention_that_was_applied(
    config: CoCaConfig, lse: bool, features: bool
) -> None:
    features = features and config.contrastive != "none"
    model, (images, text) = build(config), inputs()
    outputs: dict[nn.Module, tuple[Any, ...]] = {}
    sources: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: tuple[Any, ...]) -> None:
        sources[module], outputs[module] = args[0], output

    for layers in (model.image.layers, model.text.layers, model.multimodal.layers):
        for layer in layers:
            layer.attention.register_forward_hook(keep)
    with torch.no_grad():
        out = model(images, text, taps=ALL, lse=lse, features=features)
        for module in MODULES:
            for layer, tap in zip(getattr(model, module).layers, out.taps[module], strict=True):
                attention = layer.attention
                assert (tap.lse is not None) == lse
                v = attention.qkv(sources[attention]).chunk(3, -1)[2]
                v = v.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
                count = v.shape[2]
                sees = None
                if module != "image":
                    sees = torch.ones(count, count, dtype=torch.bool).tril()[None, None]
                if module == "text" and features:
                    read = torch.ones(3, count, dtype=torch.bool)
                    shift = int(config.shifted_cls_mask)
                    read[:, shift : shift + 8] = text != 0
                    sees = sees.repeat(3, 1, 1, 1)
                    sees[:, 0, -1] = read
                torch.testing.assert_close(
                    attended(attention, tap, v, sees), outputs[attention][0], rtol=1e-4, atol=1e-5
                )


@every_form
def test_hidden_is_what_the_layer_hands_on(config: CoCaConfig) -> None:
    model, (images, text) = build(config), inputs()
    with torch.no_grad():
        out = model(images, text, taps=ALL)
        for module in ("image", "text"):
            taps = out.taps[module]
            for layer, before, after in zip(
                getattr(model, module).layers[1:], taps[:-1], taps[1:], strict=True
            ):
                again = layer(before.hidden, causal=module == "text")
                torch.testing.assert_close(again.hidden, after.hidden)
        tokens = model.encode_images(images)
        again = model.multimodal.layers[0](out.taps["text"][-1].hidden, tokens, None)
        torch.testing.assert_close(again.hidden, out.taps["multimodal"][0].hidden)
        last = model.multimodal.norm(out.taps["multimodal"][-1].hidden)
        torch.testing.assert_close(last, out.decoded)
    assert out.taps["image"][0].cross_q is None
    assert out.taps["multimodal"][0].cross_q.shape == (3, 3, 8, 8)
    assert out.taps["multimodal"][0].cross_k.shape == (3, 3, tokens.shape[1], 8)


@every_form
def test_hidden_states_lie_side_by_side(config: CoCaConfig) -> None:
    """Else every later sum, norm and loss would work on strided memory."""
    out = build(config)(*inputs(), taps=ALL)
    assert all(tap.hidden.is_contiguous() for module in MODULES for tap in out.taps[module])


@every_form
@pytest.mark.parametrize("lse", [False, True])
def test_records_change_no_number(config: CoCaConfig, lse: bool) -> None:
    model, (images, text) = build(config), inputs()
    with torch.no_grad():
        plain, asked = model(images, text), model(images, text, taps=ALL, lse=lse)
        some = model(images, text, taps={"multimodal": [1], "image": [0, 2]}, lse=lse)
    torch.testing.assert_close(asked.decoded, plain.decoded)
    assert plain.taps == {}
    assert list(some.taps) == ["multimodal", "image"]
    expected = {"multimodal": asked.taps["multimodal"][1:], "image": asked.taps["image"][::2]}
    assert_taps_equal(some.taps, expected)


@every_form
@pytest.mark.parametrize("run", [("image",), ("text",), ("image", "text"), MODULES], ids="+".join)
def test_modules_not_named_do_not_run(config: CoCaConfig, run: tuple[str, ...]) -> None:
    model, (images, text) = build(config), inputs()
    taps = {module: ALL[module] for module in run}
    with torch.no_grad():
        whole = model(images, text, taps=taps)
        parts = {
            "image": model.image,
            "text": model.text,
            "multimodal": nn.ModuleList([model.multimodal, model.to_vocabulary]),
        }
        if "multimodal" not in run and model.pooler is not None:
            parts["pooler"] = model.pooler
        for module, part in parts.items():
            if module not in run:
                part.register_forward_pre_hook(lambda *_: pytest.fail("an unnamed module ran"))
                for parameter in part.parameters():
                    parameter.fill_(math.nan)
        out = model(
            images if "image" in run else None,
            text if "text" in run else None,
            taps=taps,
            run=run,
        )
    assert_taps_equal(out.taps, whole.taps)
    assert set(out.masks) == set(run)
    assert (out.decoded is None) == ("multimodal" not in run)


def test_gradient_passes_through_records() -> None:
    model, (images, text) = build(PAPER), inputs()
    taps = model(images, text, taps=ALL, lse=True).taps
    for module in MODULES:
        tap = taps[module][-1]
        for x in (tap.hidden, tap.q, tap.k):
            first = getattr(model, module).layers[0].attention.qkv.weight
            assert torch.autograd.grad(x.square().sum(), first, retain_graph=True)[0].norm() > 0
