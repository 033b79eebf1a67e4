"""Heads, batches, records and greedy decoding."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from optima_fast.models import TaskModel, generate, presets, task_model

STUDENT = presets.get("digits_student")
POOLED = replace(STUDENT, pooler="scaled", pooler_queries=5, pooler_ratio=2.0)
TAPS = {"image": [0, 1], "text": [0], "multimodal": [0]}


def build(kind: str, config: Any = STUDENT, classes: int = 5, **options: Any) -> TaskModel:
    torch.manual_seed(1)
    return task_model.build(config, kind, classes, **options)


def batch(kind: str, texts: int = 4) -> dict[str, Tensor]:
    """Texts 2t and 2t + 1 share image t; a pair batch gives text t images t and t + 1."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(3, 60, (texts, 8), generator=generator)
    text[:, 0] = 1
    text[1::2, 5:] = 0
    t = torch.arange(texts)
    pair_image, pair_text = t // 2, t
    if kind == "pair":
        pair_image, pair_text = (
            torch.stack([t // 2, t // 2 + 1], 1).flatten(),
            t.repeat_interleave(2),
        )
    elif kind == "caption":
        pair_image = t
    count = int(pair_image.max()) + 1
    images = torch.rand(count, 1, 24, 24, generator=generator)
    return {"images": images, "text": text, "pair_image": pair_image, "pair_text": pair_text}


@pytest.mark.parametrize("config", [STUDENT, POOLED], ids=["no pooler", "pooler"])
@pytest.mark.parametrize(
    ("kind", "shape"), [("classification", (4, 5)), ("pair", (4, 5)), ("caption", (4, 7, 64))]
)
def test_trains_every_parameter_it_uses(kind: str, shape: tuple[int, ...], config: Any) -> None:
    model, data = build(kind, config).train(), batch(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    target = torch.arange(4) if kind != "caption" else data["text"][:, 1:]
    losses = []
    for _ in range(12):
        out = model(data, taps=TAPS)
        assert out.logits.shape == shape
        loss = torch.nn.functional.cross_entropy(
            out.logits.flatten(0, -2), target.flatten(), ignore_index=-1 if kind != "caption" else 0
        )
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    unused = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # the vocabulary serves captions alone
    aside = set() if kind == "caption" else {"coca.to_vocabulary.weight", "coca.to_vocabulary.bias"}
    assert unused == aside


@pytest.mark.parametrize("kind", task_model.HEADS)
@pytest.mark.parametrize(
    "modules", [("image",), ("text",), ("image", "text"), ("multimodal",), ("image", "multimodal")]
)
def test_records_equal_the_whole_run_and_run_no_more(kind: str, modules: tuple[str, ...]) -> None:
    model, data = build(kind).eval(), batch(kind)
    taps = {m: TAPS[m] for m in modules}
    with torch.no_grad():
        whole = model(data, taps=taps, lse=True)
        for parameter in model.head.parameters():
            parameter.fill_(math.nan)
        model.head.register_forward_pre_hook(lambda *_: pytest.fail("the head ran"))
        for name in ("image", "text", "multimodal"):
            if "multimodal" not in modules and name not in modules:
                part = getattr(model.coca, name)
                part.register_forward_pre_hook(lambda *_: pytest.fail("an unneeded module ran"))
        some = model.record(data, taps, lse=True)
    assert some.logits is None
    assert list(some.taps) == list(modules)
    for module in modules:
        assert some.taps[module][0].lse is not None
        for a, b in zip(some.taps[module], whole.taps[module], strict=True):
            for x, y in zip(a, b, strict=True):
                assert (x is None) == (y is None)
                if x is not None:
                    torch.testing.assert_close(x, y)
        if module != "image":
            assert torch.equal(some.masks[module], whole.masks[module])
            assert some.masks[module].shape == some.taps[module][0].hidden.shape[:2]


def test_padding_and_its_amount_do_not_reach_a_class() -> None:
    model, data = build("classification").eval(), batch("classification")
    longer = data | {"text": torch.cat([data["text"], torch.zeros(4, 3).long()], 1)}
    with torch.no_grad():
        expected = model(data).logits
        torch.testing.assert_close(model(longer).logits, expected)
        model.coca.text.embedding.weight[0] += 1
        torch.testing.assert_close(model(data).logits, expected)


def test_several_texts_share_one_image() -> None:
    model, data = build("classification").eval(), batch("classification")
    repeated = {"images": data["images"][data["pair_image"]], "text": data["text"]}
    with torch.no_grad():
        torch.testing.assert_close(model(data).logits, model(repeated).logits)


def test_pairs_two_images_with_their_text_in_order() -> None:
    model, data = build("pair").eval(), batch("pair")
    with torch.no_grad():
        logits = model(data).logits
        pooled = []
        for t in range(4):
            left, right = data["images"][t // 2 : t // 2 + 2].split(1)
            vectors = []
            for image in (left, right):
                out = model.coca(image, data["text"][t : t + 1])
                vectors.append(model.head.pooler(out.decoded, out.masks["multimodal"])[0, 0])
            pooled.append(torch.cat(vectors))
        torch.testing.assert_close(logits, model.head.classify(torch.stack(pooled)))
        swapped = data | {"pair_image": data["pair_image"].view(-1, 2).flip(1).flatten()}
        assert (model(swapped).logits - logits).abs().amax(-1).min() > 1e-5


def test_a_pair_head_needs_two_images_a_text() -> None:
    data = batch("pair")
    odd = data | {"pair_image": data["pair_image"][:3], "pair_text": data["pair_text"][:3]}
    with pytest.raises(ValueError, match="needs two pairs for each text, got 3 pairs"):
        build("pair")(odd)


def test_dropout_acts_in_training_only() -> None:
    model, data = build("classification", dropout=0.5), batch("classification")
    with torch.no_grad():
        model.train()
        assert not torch.equal(model(data).logits, model(data).logits)
        model.eval()
        assert torch.equal(model(data).logits, model(data).logits)


def test_captions_are_read_without_their_last_token() -> None:
    model, data = build("caption").eval(), batch("caption")
    with torch.no_grad():
        out = model(data, taps=TAPS)
        coca = model.coca(data["images"], data["text"][:, :-1])
        torch.testing.assert_close(out.logits, model.coca.token_logits(coca.decoded))
    assert out.masks["text"].shape == (4, 7)


def test_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    model = build("classification", replace(STUDENT, image_layers=1))
    data = batch("classification")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    taps = {name: [0] for name in TAPS}
    got, want = (f(data, taps=taps, lse=True) for f in (compiled, model))
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.taps["text"][0].lse, want.taps["text"][0].lse)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("regression", 5), "one of classification, pair, caption, got 'regression'"),
        (("classification", 1), "a classification head needs at least 2 classes, got 1"),
        (("pair", 0), "a pair head needs at least 2 classes, got 0"),
        (("caption", 0, 1.0), "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_build_rejects(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_model.build(STUDENT, *arguments)


def teach(model: TaskModel, images: Tensor, captions: Tensor) -> None:
    """Overfit, so that captions have different lengths and end."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        logits = model({"images": images, "text": captions}).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), captions[:, 1:].flatten(), ignore_index=0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_greedy_equals_the_argmax_given_what_was_said() -> None:
    bos, eos = 1, 2
    model = build("caption", POOLED)
    images = torch.rand(3, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    captions = torch.tensor(
        [[bos, 7, eos, 0, 0, 0], [bos, 8, 9, 10, eos, 0], [bos, 11, 12, 13, 14, 15]]
    )
    teach(model, images, captions)
    model.eval()
    said = generate.greedy(model, images, bos_id=bos, eos_id=eos, max_length=6)
    assert torch.equal(said, captions)
    with torch.no_grad():
        logits = model({"images": images, "text": said}).logits
    logits[..., 0] = -math.inf
    real = said[:, 1:] != 0
    assert torch.equal(logits.argmax(-1)[real], said[:, 1:][real])
    # all captions of the first two images have ended after five tokens
    short = generate.greedy(model, images[:2], bos_id=bos, eos_id=eos, max_length=12)
    assert torch.equal(short, captions[:2, :5])
    assert (
        generate.greedy(model, images, bos_id=bos, eos_id=eos, max_length=1).tolist() == [[1]] * 3
    )


def test_greedy_encodes_images_once_and_never_says_padding() -> None:
    model = build("caption").eval()
    with torch.no_grad():
        model.coca.to_vocabulary.bias[0] = 100.0
    runs: list[int] = []
    model.coca.image.register_forward_hook(lambda *_: runs.append(1))
    projected: list[int] = []
    model.coca.multimodal.layers[0].cross.kv.register_forward_hook(lambda *_: projected.append(1))
    said = generate.greedy(model, torch.rand(2, 1, 24, 24), bos_id=1, eos_id=2, max_length=17)
    assert len(runs) == len(projected) == 1
    assert said.shape == (2, 17)
    assert (said != 0).all()


@pytest.mark.parametrize("length", [0, 18])
def test_greedy_rejects_a_length_without_positions(length: int) -> None:
    with pytest.raises(ValueError, match=rf"from 1 to text_length \+ 1 = 17, got {length}"):
        generate.greedy(
            build("caption"), torch.rand(1, 1, 24, 24), bos_id=1, eos_id=2, max_length=length
        )


def test_the_papers_smallest_student_runs_at_its_real_size() -> None:
    """Shapes alone, of the model and of all that it computes."""
    with torch.device("meta"):
        model = task_model.build(presets.get("coca_tiny6"), "caption", 0)
        images, text = torch.empty(1, 3, 288, 288), torch.empty(1, 64, dtype=torch.int64)
    logits = model({"images": images, "text": text}).logits
    assert logits.shape == (1, 63, 64_000)
    assert logits.device.type == "meta"


@pytest.mark.slow
def test_the_papers_smallest_student_takes_a_step_at_its_real_size() -> None:
    torch.manual_seed(0)
    model = task_model.build(presets.get("coca_tiny6"), "caption", 0)
    text = torch.randint(1, 64_000, (1, 64))
    logits = model({"images": torch.randn(1, 3, 288, 288), "text": text}).logits
    assert logits.shape == (1, 63, 64_000)
    loss = torch.nn.functional.cross_entropy(logits[0], text[0, 1:])
    loss.backward()
    assert abs(loss.item() - math.log(64_000)) < 1
    # all but what only contrastive features need
    idle = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert {name.partition(".")[2].partition(".")[0] for name in idle} <= {
        "contrastive_pooler", "logit_scale", "text",
    }, idle  # fmt: skip
    assert not any("layers" in name for name in idle)
