"""Losses of maps by name, against plain PyTorch on what the layers say."""

from __future__ import annotations

import plain_maps
import pytest
import torch
import torch.nn.functional as F
from teaching import BATCH, model

from optima_fast import Distiller
from optima_fast.distill.maps import Maps, swapped
from optima_fast.errors import UserError
from optima_fast.models import MODULES
from optima_fast.taps.records import Attention


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    # other heads in the text's modules, so that "auto" has both cases in one step
    return model("digits_student", text_heads=2), model("digits_teacher")


def step(pair, **options):
    distiller = Distiller(*pair, **options)
    return distiller(BATCH, predict=lambda logits, batch: logits.sum() * 0)


def records(pair):
    """Layers of student and teacher, as the distiller pairs them."""
    student, teacher = pair
    s = student(BATCH, taps={"image": [0, 1], "text": [0], "multimodal": [0]})
    t = teacher(BATCH, taps={"image": [1, 3], "text": [1], "multimodal": [1]})
    return [x for m in MODULES for x in zip(s.layers(m), t.layers(m), strict=True)]


@pytest.mark.parametrize(("name", "plain"), [("probs", plain_maps.mse), ("kl", plain_maps.kl)])
def test_auto_is_each_head_where_both_have_as_many_and_else_their_mean(pair, name, plain):
    found = step(pair, attention_loss=f"{name}-auto").attention
    expected = [
        plain(s.attentions[0], t.attentions[0], mean=m)
        for (s, t), m in zip(records(pair), (False, False, True, True), strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-7)


def test_length_is_the_number_of_keys(pair):
    plain, scaled = (step(pair, attention_loss="probs", attention_scale=x) for x in SCALES)
    lengths = [s.attentions[0].k.shape[2] for s, _ in records(pair)]
    assert len(set(lengths)) > 1
    torch.testing.assert_close(scaled.attention, plain.attention * torch.tensor(lengths))


SCALES = ("none", "length")


def test_cross_attention_both_ways_is_a_softmax_over_each_side(pair):
    options = {"attention_loss": "kl-auto", "cross_attention": True}
    one, both = (step(pair, cross_both_ways=x, **options).attention for x in (False, True))
    s, t = records(pair)[-1]
    back = []
    for layer in (s, t):
        a = layer.attentions[1]
        scores = a.k @ a.q.transpose(2, 3) / a.q.shape[3] ** 0.5
        back.append(scores.masked_fill(~a.query_mask[:, None, None], float("-inf")).softmax(-1))
    p, q = back[1].mean(1), back[0].mean(1)  # two heads against four
    expected = torch.where(p > 0, p * (p.clamp_min(1e-30) / q.clamp_min(1e-30)).log(), 0)
    torch.testing.assert_close(both[-1] - one[-1], expected.sum(-1).mean(), rtol=1e-4, atol=1e-6)
    assert torch.equal(both[:-1], one[:-1])


def test_swapped_keys_of_groups_are_repeated():
    a = Attention(torch.randn(1, 4, 3, 2), torch.randn(1, 2, 5, 2), scale=0.3)
    b = swapped(a)
    for h in range(4):
        torch.testing.assert_close(b.q[:, h] @ b.k[:, h].mT, (a.q[:, h] @ a.k[:, h // 2].mT).mT)
    assert b.scale == 0.3


def test_relations_are_among_queries_and_among_keys(pair):
    found = step(pair, attention_loss="relations", relation_heads=8).attention
    expected = []
    for s, t in records(pair):
        total = torch.zeros(())
        for which in ("q", "k"):
            maps = []
            for a in (s.attentions[0], t.attentions[0]):
                x = getattr(a, which).transpose(1, 2).flatten(2).unflatten(2, (8, -1))
                x = x.transpose(1, 2)
                maps.append(Attention(x, x, a.causal, None, a.query_mask, a.key_mask))
            total = total + plain_maps.kl(*maps)
        expected.append(total)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_gram_needs_no_projections_and_has_none(pair):
    distiller = Distiller(*pair, hidden_loss="gram")
    assert not list(distiller.parameters())
    found = step(pair, hidden_loss="gram").hidden
    expected = []
    for s, t in records(pair):
        cosines = [F.normalize(x.hidden, dim=-1) @ F.normalize(x.hidden, dim=-1).mT for x in (s, t)]
        error = (cosines[0] - cosines[1]).square()
        mask = torch.ones_like(error[..., 0]).bool() if s.mask is None else s.mask
        expected.append(error[mask[:, :, None] & mask[:, None]].mean())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="leave one of them out"):
        Distiller(*pair, hidden_loss="gram", hidden_scale="variance")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_loss": "relations"}, "go together, got .*'relations' and relation_heads=None"),
        ({"relation_heads": 4}, "go together, got attention_loss='scores' and relation_heads=4"),
        ({"attention_scale": "width"}, "attention_scale must be one of"),
        ({"cross_both_ways": True}, "cross_both_ways needs cross_attention=True"),
    ],
)
def test_options_are_checked(pair, options, message):
    with pytest.raises(ValueError, match=message):
        Distiller(*pair, **options)


def test_relations_refuse_what_they_do_not_know(pair):
    with pytest.raises(ValueError, match="relation_heads must divide the width of student"):
        step(pair, attention_loss="relations", relation_heads=7)
    x = torch.randn(1, 1, 3, 2)
    windowed = [Attention(x, x, window=2)]
    with pytest.raises(UserError, match="relations know no window of attention, got one of 2"):
        Maps("relations", relation_heads=1)(windowed, windowed)
