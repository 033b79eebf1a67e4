"""A measurement with what the teacher said before is the one with what it says now."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from teaching import BATCH, DATA, model

from optima_fast import Distiller
from optima_fast.distill.measurement import TERMS, Measurement, average
from optima_fast.distill.reward import terms_of
from optima_fast.distill.terms import variances


def made(**options: Any) -> Distiller:
    torch.manual_seed(0)
    return Distiller(model("digits_student"), model("digits_teacher"), **options)


def measured(distiller: Distiller, **options: Any) -> Measurement:
    return distiller.measure(BATCH, predict=DATA.loss, divergence=DATA.divergence, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "mean", "hidden_scale": "variance"},
        {"attention_loss": "probs", "cross_attention": True, "cross_both_ways": True},
        {"attention_loss": "kl-each", "hidden_loss": "cosine"},
        {"hidden_loss": "contrastive", "hidden_weight": {"image": 1, "text": 0, "multimodal": 1}},
    ],
)
def test_a_kept_teacher_gives_the_same_numbers_to_the_last_bit(options):
    distiller = made(**options)
    kept = distiller.teach(BATCH, predict=DATA.loss).own()
    rate = torch.optim.SGD(distiller.student.parameters(), 0.1)
    seen = []
    for _ in range(3):
        seen.append(measured(distiller))
        assert measured(distiller, taught=kept) == seen[-1]
        distiller(BATCH, predict=DATA.loss).total.backward()
        rate.step()
    assert len(set(map(str, seen))) == 3


def test_a_kept_teacher_does_not_run_and_its_variances_are_computed_once(monkeypatch):
    distiller = made()
    kept = distiller.teach(BATCH, predict=DATA.loss)
    calls = []
    distiller.teacher.register_forward_pre_hook(lambda *_: calls.append("teacher"))
    monkeypatch.setattr(
        "optima_fast.distill.taught.variances",
        lambda layers: calls.append("variances") or variances(layers),
    )
    assert len({str(measured(distiller, taught=kept)) for _ in range(3)}) == 1
    assert calls == ["variances"]
    measured(distiller)
    assert calls == ["variances", "teacher", "variances"]


@pytest.mark.parametrize("terms", [(), ("kl",), ("attention",), ("hidden", "prediction"), TERMS])
def test_what_is_not_asked_for_is_none_and_the_rest_is_as_ever(terms):
    distiller = made()
    whole, some = measured(distiller), measured(distiller, terms=terms)
    expected = whole._asdict()
    if "kl" not in terms:
        expected["kl"] = None
    if "attention" not in terms:
        expected |= {"attention": None, "attention_layers": {}}
    assert some._asdict() == expected
    assert average([(some, 3), (some, 1)]) == some
    kept = distiller.teach(BATCH, predict=DATA.loss, terms=terms)
    assert (kept.logits is None) == ("kl" not in terms)
    attentions = [bool(x.attentions) for x in chain(*kept.found.values())]
    assert attentions == ["attention" in terms] * 4
    assert measured(distiller, terms=terms, taught=kept) == some


def test_parts_of_a_measurement_are_weighed_by_their_examples():
    distiller = made()
    one = measured(distiller)
    torch.nn.init.zeros_(distiller.projections["text_0"])
    other = measured(distiller)
    both = average([(one, 3), (other, 1)])
    assert both.hidden == one.hidden * 3 / 4 + other.hidden / 4
    text = [m.hidden_layers["text"][0] for m in (one, other, both)]
    assert text[2] == text[0] * 3 / 4 + text[1] / 4 != text[0]


def test_what_is_kept_holds_no_memory_but_its_own():
    taught = made().teach(BATCH, predict=DATA.loss)
    own = taught.own()
    assert own.nbytes == taught.nbytes
    tensors = [own.logits, own.loss]
    for layer in chain(*own.found.values()):
        tensors += [x for x in (layer.hidden, layer.mask) if x is not None]
        for attention in layer.attentions:
            tensors += [x for x in attention if isinstance(x, torch.Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(storages.values()) == own.nbytes
    # queries and keys are views of a larger tensor, whose values are part of it
    packed = taught.found["image"][0].attentions[0].q
    assert packed.untyped_storage().nbytes() == 3 * packed.nbytes


def test_bytes_of_states_by_the_formula():
    """4 bytes times layers, width and tokens of each module."""
    own = made().teach(BATCH, predict=DATA.loss, terms=terms_of("headroom")).own()
    images, texts, pairs = (len(BATCH[k]) for k in ("images", "text", "pair_image"))
    config = made().teacher.coca.config
    length = BATCH["text"].shape[1]
    states = 2 * config.image_width * config.patches * images
    states += config.text_width * length * (texts + pairs)
    # and a byte a token of both masks of texts, and the loss
    assert own.nbytes == 4 * states + length * (texts + pairs) + 4


@pytest.mark.parametrize(
    ("reward", "terms"),
    [
        ("headroom", ("hidden", "prediction")),
        ("drop", ("kl", "hidden", "attention")),
        ("normalised", ("kl", "hidden", "attention")),
        ("prediction", ("prediction",)),
        (" attention, kl", ("attention", "kl")),
    ],
)
def test_terms_that_a_reward_reads(reward, terms):
    assert terms_of(reward) == terms
