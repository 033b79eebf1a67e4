"""Every family: the loss from taps is that of the maps which the eager model returns."""

from __future__ import annotations

import copy
from functools import reduce

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
from families import EQUAL, INPUTS, REFUSED, Family

import optima_fast


def models(family: Family):
    """Student and teacher, told apart by their weights."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = family.make().eval()
        with torch.no_grad():
            for x in model.parameters():  # maps far from uniform
                if x.ndim > 1:
                    x.mul_(6)
        found.append(model)
    return found


def eager_maps(model, batch, family):
    """[B, Nq, Nk] of each module and layer, the mean over the heads."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**batch, output_attentions=True)
    fields = [reduce(getattr, field.split("."), output) for field in family.attentions]
    return [[layer.mean(1) for layer in field] for field in fields]


def token_mask(batch, module, shape):
    """[B, N] bool, of the batch alone."""
    coders = any(key.startswith("decoder_") for key in batch)
    decodes = coders and module == "decoder"
    mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
    if mask is None or mask.shape[1] != shape[1]:
        return torch.ones(shape[:2], dtype=torch.bool)
    return mask.bool()


@pytest.mark.parametrize("name", EQUAL)
def test_the_loss_is_that_of_the_maps_it_would_return(name):
    family = EQUAL[name]
    batch = INPUTS[family.inputs]()
    student, teacher = models(family)
    maps = [eager_maps(model, batch, family) for model in (student, teacher)]
    with optima_fast.tap(student) as a, optima_fast.tap(teacher) as b, torch.no_grad():
        before = student(**batch)[0]
        teacher(**batch)
        records = a.layers(), b.layers()
    assert torch.equal(student(**batch)[0], before)  # tapped or not
    assert len(records[0]) == len(family.causal)
    for i, (module, layers) in enumerate(records[0].items()):
        assert len(layers) == 2
        for j, (s, t) in enumerate(zip(layers, records[1][module], strict=True)):
            assert not s.refusals
            assert not t.refusals
            x, y = s.attentions[0], t.attentions[0]
            assert x.causal == family.causal[i]
            assert x.window == family.windows[j]
            assert x.q.shape[1] == 4
            assert s.hidden.shape[-1] == 32
            loss = optima_fast.attention_mse(
                x.q, x.k, y.q, y.k, target="probs", causal=x.causal, window=x.window,
                query_mask=x.query_mask, key_mask=x.key_mask,
                student_scale=x.scale, teacher_scale=y.scale,
            )  # fmt: skip
            difference = maps[0][i][j] - maps[1][i][j]
            tokens = token_mask(batch, module, difference.shape)
            mask = torch.ones_like(tokens) if s.mask is None else s.mask
            assert torch.equal(mask, tokens)
            valid = tokens[:, :, None] & tokens[:, None]
            if x.causal:
                valid = valid.tril()
            if x.window:
                valid = valid.tril(x.window - 1).triu(1 - x.window)
            expected = (difference * valid).square().sum() / valid.sum()
            assert expected > 1e-5
            torch.testing.assert_close(loss[0], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_cross_attention(name):
    family = EQUAL[name]
    batch = INPUTS[family.inputs]()
    student, _ = models(family)
    eager = copy.deepcopy(student)
    eager.set_attn_implementation("eager")
    with torch.no_grad(), optima_fast.tap(student) as tap:
        student(**batch)
        layers = tap.layers()["decoder"]
        maps = eager(**batch, output_attentions=True).cross_attentions
    for layer, expected in zip(layers, maps, strict=True):
        _, cross = layer.attentions
        scores = cross.q @ cross.k.mT * (cross.scale or cross.q.shape[-1] ** -0.5)
        if cross.key_mask is not None:
            assert torch.equal(cross.key_mask, batch["attention_mask"].bool())
            assert torch.equal(cross.query_mask, batch["decoder_attention_mask"].bool())
            scores = scores.masked_fill(~cross.key_mask[:, None, None], -torch.inf)
        counted = torch.ones(scores.shape[0], scores.shape[2], dtype=torch.bool)
        if cross.query_mask is not None:
            counted = cross.query_mask
        ours, theirs = (x.transpose(1, 2)[counted] for x in (scores.softmax(-1), expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_tap_that_closes_leaves_the_others_open():
    student, teacher = models(EQUAL["bert"])
    with optima_fast.tap(student) as tap:
        optima_fast.tap(teacher).close()
        student(**INPUTS["text"]())
        (layers,) = tap.layers().values()
    assert [len(layer.attentions) for layer in layers] == [1, 1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_represented_is_refused_by_layer_and_reason(name):
    make, inputs, reason = REFUSED[name]
    torch.manual_seed(0)
    student, teacher = make(), make()
    with torch.no_grad():
        for x in (*student.parameters(), *teacher.parameters()):
            x.add_(0.1)  # a bias of zeros is none
    batch = INPUTS[inputs]()
    with pytest.raises(ValueError, match=rf"layer 1 from .*cannot represent .*: .*{reason}"):
        optima_fast.Distiller.from_models(student, teacher, batch)
    # the states alone can be compared, padding left out
    distiller = optima_fast.Distiller.from_models(student, teacher, batch, attention_weight=0.0)
    assert "NOT COMPARED" in distiller.summary
    student(**batch)
    step = distiller.compare(batch=batch)
    assert step.attention is None
    assert (step.hidden > 0).all()
