"""Weights by module and by layer: what the total is, what is computed, what is refused."""

from __future__ import annotations

import pytest
import torch
from teaching import BATCH, DATA, model

from optima_fast import Distiller
from optima_fast.distill.weights import by_layer
from optima_fast.losses import ATTENTION_LOSSES, HIDDEN_LOSSES
from optima_fast.models import MODULES

HIDDEN = {"image": [0.3, 0.0], "text": 2.0, "multimodal": 0.5}
ATTENTION = {"image": {"last": 4.0}, "text": 0.0, "multimodal": 5.0, "cross": 0.25}


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return model("digits_student"), model("digits_teacher")


def same(distiller: Distiller, **options: object) -> Distiller:
    """Another distiller of the same models and projections."""
    other = Distiller(distiller.student, distiller.teacher, **options)
    other.load_state_dict(distiller.state_dict())
    return other


def run(distiller: Distiller, arm=None):
    return distiller(BATCH, arm, predict=DATA.loss, divergence=DATA.divergence)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_each_layer_counts_by_its_weight_and_cross_attention_by_its_own(pair, reduction):
    plain = Distiller(*pair, reduction=reduction)
    crossed = same(plain, cross_attention=True)
    weighed = same(
        plain, hidden_weight=HIDDEN, attention_weight=ATTENTION, prediction_weight=0.6,
        kl_weight=0.4, cross_attention=True, reduction=reduction,
    )  # fmt: skip
    step, bare, full = run(weighed), run(plain), run(crossed)
    cross = full.attention[3] - bare.attention[3]
    hidden = 0.3 * bare.hidden[0] + 2.0 * bare.hidden[2] + 0.5 * bare.hidden[3]
    attention = 4.0 * bare.attention[1] + 5.0 * bare.attention[3] + 0.25 * cross
    divided = 4 if reduction == "mean" else 1
    expected = 0.6 * step.prediction + 0.4 * step.kl + (hidden + attention) / divided
    torch.testing.assert_close(step.total, expected, rtol=1e-5, atol=1e-6)
    keep = torch.tensor([1, 0, 1, 1])
    torch.testing.assert_close(step.hidden, bare.hidden * keep)
    torch.testing.assert_close(step.attention, full.attention * torch.tensor([0, 1, 0, 1]))


def test_what_is_measured_knows_no_weights(pair):
    plain = Distiller(*pair, cross_attention=True)
    weighed = same(
        plain, hidden_weight=HIDDEN, attention_weight=ATTENTION, prediction_weight=0.0,
        kl_weight=1.0, cross_attention=True,
    )  # fmt: skip
    one, other = (d.measure(BATCH, predict=DATA.loss, divergence=DATA.divergence)
                  for d in (plain, weighed))  # fmt: skip
    assert one == other


def test_equal_weights_by_module_are_one_weight(pair):
    one = Distiller(*pair, hidden_weight=0.7, attention_weight=0.2, cross_attention=True)
    by_module = same(
        one, hidden_weight=dict.fromkeys(MODULES, 0.7), cross_attention=True,
        attention_weight=dict.fromkeys(MODULES, 0.2),
    )  # fmt: skip
    torch.testing.assert_close(run(one).total, run(by_module).total)
    for arm in (("text",), ("multimodal", "image[2]"), ()):
        torch.testing.assert_close(run(one, arm).total, run(by_module, arm).total)


def test_a_layer_of_weight_0_is_not_computed(pair, monkeypatch):
    seen = []

    def counted(losses, name):
        loss = losses[name]
        monkeypatch.setitem(
            losses, name, lambda s, *a, **k: seen.append(len(s)) or loss(s, *a, **k)
        )

    counted(HIDDEN_LOSSES, "mse")
    counted(ATTENTION_LOSSES, "scores")
    weights = {"hidden_weight": HIDDEN, "attention_weight": {**ATTENTION, "cross": 0}}
    step = run(Distiller(*pair, cross_attention=True, **weights))
    assert seen == [3, 2]
    step.total.backward()
    none = dict.fromkeys(MODULES, 0.0)
    bare = run(Distiller(*pair, hidden_weight=none, attention_weight=none))
    assert seen == [3, 2]
    assert torch.equal(bare.total, bare.prediction)
    assert not bare.hidden.any()
    assert not bare.attention.any()


class Refusing:
    """A student whose image layers cannot be represented."""

    def __init__(self, model):
        self.model, self.layer_counts, self.widths = model, model.layer_counts, model.widths

    def __call__(self, batch, taps, lse):
        self.said = self.model(batch, taps=taps, lse=lse)
        self.logits = self.said.logits
        return self

    def layers(self, name):
        found = self.said.layers(name)
        if name == "image":
            found = [x._replace(refusals=("a bias",), attentions=()) for x in found]
        return found


def test_a_weight_of_0_lets_a_layer_be_that_cannot_be_compared(pair):
    weights = {"image": 0.0, "text": 1.0, "multimodal": 1.0}
    whole = Distiller(*pair, attention_weight=weights)
    refused = Distiller(Refusing(pair[0]), pair[1], attention_weight=weights)
    refused.load_state_dict(whole.state_dict())
    torch.testing.assert_close(run(refused).total, run(whole).total)
    with pytest.raises(ValueError, match="image layer 2 .* cannot represent a bias"):
        run(Distiller(Refusing(pair[0]), pair[1], attention_weight={**weights, "image": [0, 1]}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_weight": {"image": 1.0}}, "must name every module that is matched, got none for"),
        (
            {"hidden_weight": {**HIDDEN, "audio": 1.0}},
            "hidden_weight must name image, text, multimodal, got 'audio'",
        ),
        ({"hidden_weight": {**HIDDEN, "cross": 1.0}}, "got 'cross'; set cross_attention=True"),
        ({"attention_weight": ATTENTION}, "got 'cross'; set cross_attention=True"),
        (
            {"hidden_weight": {**HIDDEN, "image": [1.0]}},
            r"hidden_weight\['image'\] must be .* one for each of 2 layers, got 1: \[1.0\]",
        ),
        (
            {"attention_weight": {**ATTENTION, "cross": [1.0, 2.0]}, "cross_attention": True},
            r"attention_weight\['cross'\] must be a number or one for each of 1 layers, got 2",
        ),
        ({"hidden_weight": {**HIDDEN, "text": -1}}, "must be finite and not negative, got -1"),
        ({"hidden_weight": {**HIDDEN, "text": [float("inf")]}}, "and not negative, got inf"),
        ({"hidden_weight": {**HIDDEN, "text": "1"}}, "and not negative, got '1'"),
        ({"hidden_weight": {**HIDDEN, "text": True}}, "and not negative, got True"),
        ({"hidden_weight": {**HIDDEN, "text": {"first": 1.0}}}, "or {'last': a number}, got"),
        ({"prediction_weight": -0.5}, "prediction_weight must be finite and not negative"),
    ],
)
def test_weights_are_checked(pair, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        Distiller(*pair, **options)
    assert "\n" not in str(caught.value)


def test_layers_that_are_not_known_yet_are_not_counted():
    unknown = dict.fromkeys(MODULES)
    assert by_layer("w", {**HIDDEN, "text": [1, 2, 3]}, unknown)["text"] == (1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="must be finite"):
        by_layer("w", {**HIDDEN, "text": [1, -2, 3]}, unknown)
