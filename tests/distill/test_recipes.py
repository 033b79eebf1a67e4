"""Recipes of other systems, against their papers' formulas in plain PyTorch."""

from __future__ import annotations

import plain_maps
import pytest
import torch
import torch.nn.functional as F
from teaching import BATCH, DATA, model

from optima_fast import Distiller
from optima_fast.distill import recipes
from optima_fast.errors import UserError
from optima_fast.models import MODULES
from optima_fast.taps.records import Attention
from optima_fast.tasks.base import soft_bce


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return model("digits_student"), model("digits_teacher")


@pytest.fixture(scope="module")
def said(pair):
    """Logits of student and teacher, and their layers by module, in pairs."""
    student, teacher = pair
    s = student(BATCH, taps={"image": [0, 1], "text": [0], "multimodal": [0]})
    t = teacher(BATCH, taps={"image": [1, 3], "text": [1], "multimodal": [1]})
    layers = {m: list(zip(s.layers(m), t.layers(m), strict=True)) for m in MODULES}
    return s.logits, t.logits, layers


def step(pair, name, divergence=DATA.divergence):
    distiller = Distiller(*pair, **recipes.options(name))
    return distiller, distiller(BATCH, predict=DATA.loss, divergence=divergence)


def softened_kl(student, teacher):
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def hidden_error(distiller, module, i, s, t):
    error = (s.hidden @ distiller.projections[f"{module}_{i}"] - t.hidden).square()
    return (error if s.mask is None else error[s.mask]).mean()


def test_efficientvlm_is_the_sum_that_its_code_makes(pair, said):
    """loss = .6 small + .4 (logits + text + image + cross), Eff_VQA.py."""
    distiller, found = step(pair, "efficientvlm")
    student, teacher, layers = said
    of = dict.fromkeys(MODULES, 0.0)
    for module, matched in layers.items():
        for i, (s, t) in enumerate(matched):
            factor = 0.2 if module == "image" else 1.0
            of[module] += factor * hidden_error(distiller, module, i, s, t)
            for a, b in zip(s.attentions, t.attentions, strict=True):
                of[module] += plain_maps.mse(a, b) * a.k.shape[2]
    taught = softened_kl(student, teacher) + of["image"] + of["text"] + 0.5 * of["multimodal"]
    expected = 0.6 * DATA.loss(student, BATCH) + 0.4 * taught
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-6)
    assert [p.teacher for p in found.pairs] == [1, 3, 1, 1]  # each second layer


def test_dide_is_soft_labels_and_attention_of_the_last_layer_both_ways(pair, said):
    _, found = step(pair, "dide", lambda s, t, batch: soft_bce(s, t))
    student, teacher, layers = said
    p = teacher.sigmoid()
    labels = -(p * student.sigmoid().log() + (1 - p) * (1 - student.sigmoid()).log()).sum(-1).mean()
    s, t = (x.attentions[1] for x in layers["multimodal"][-1])
    back = [Attention(a.k, a.q, query_mask=a.key_mask, key_mask=a.query_mask) for a in (s, t)]
    expected = labels + plain_maps.kl(s, t) + plain_maps.kl(*back)
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-6)
    assert not found.hidden.any()
    assert found.attention.nonzero().flatten().tolist() == [3]


def test_distilvlm_is_attention_and_contrast_of_the_last_layers(pair, said):
    distiller, first = step(pair, "distilvlm")
    assert not first.hidden.any()  # nothing to tell a token from yet
    found = distiller(BATCH, predict=DATA.loss)
    student, _, layers = said
    expected = DATA.loss(student, BATCH)
    for module, matched in layers.items():
        i, (s, t) = len(matched) - 1, matched[-1]
        expected = expected + plain_maps.mse(s.attentions[0], t.attentions[0])
        h = F.normalize(s.hidden @ distiller.projections[f"{module}_{i}"], dim=-1)
        own = F.normalize(t.hidden, dim=-1)
        keep = torch.ones_like(own[..., 0]).bool() if s.mask is None else s.mask
        h, own = h[keep], own[keep]
        logits = torch.cat([(h * own).sum(-1, keepdim=True), h @ own.T], 1) / 0.07
        expected = expected + F.cross_entropy(logits, torch.zeros(len(h), dtype=torch.long))
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-5)
    assert found.hidden.nonzero().flatten().tolist() == [1, 2, 3]


def test_soft_labels_are_least_where_the_student_says_what_its_teacher_does():
    torch.manual_seed(0)
    teacher = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    student = teacher.detach().clone().requires_grad_()
    soft_bce(student, teacher).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-12, rtol=0)
    assert teacher.grad is None
    half = soft_bce(torch.zeros(2, 3, dtype=torch.float16), torch.zeros(2, 3))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, 3 * F.softplus(torch.zeros(())))


def test_the_options_are_a_copy_and_unknown_names_are_told():
    recipes.options("dide").clear()
    assert recipes.options("dide")
    for name in recipes.RECIPES:
        assert set(recipes.settings(name, "nlvr2")) <= recipes.names()
    assert recipes.settings("dide", "vqa")["soft_labels"] == "bce"
    assert recipes.settings("dide", "nlvr2")["soft_labels"] == "kl"
    with pytest.raises(
        UserError, match="unknown recipe 'efficient-vlm'; did you mean 'efficientvlm'"
    ):
        recipes.get("efficient-vlm")
