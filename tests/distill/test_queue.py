"""The queue of a contrastive loss: what it holds, when it grows, that it is state."""

from __future__ import annotations

import pytest
import torch
from teaching import BATCH, DATA, model

from optima_fast import Distiller, hidden_contrastive
from optima_fast.distill.queue import TokenQueue
from optima_fast.models import MODULES


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return model("digits_student"), model("digits_teacher")


def tokens(*values: float) -> torch.Tensor:
    return torch.tensor(values)[None, :, None]


def test_the_newest_that_count_come_first_and_the_oldest_go():
    queue = TokenQueue(5, 1)
    queue.push(tokens(1, 2, 3), torch.tensor([[True, False, True]]))
    assert queue.tokens[queue.counts].flatten().tolist() == [1, 3]
    assert not queue.tokens[~queue.counts].any()
    queue.push(tokens(4, float("nan")), torch.tensor([[True, False]]))
    assert queue.tokens[queue.counts].flatten().tolist() == [4, 1, 3]
    queue.push(tokens(5, 6, 7).bfloat16(), None)
    assert queue.tokens.flatten().tolist() == [5, 6, 7, 4, 1]
    assert queue.counts.all()
    queue.push(torch.arange(20.0)[None, :, None], None)
    assert queue.tokens.flatten().tolist() == [0, 4, 8, 12, 16]  # from all over the batch
    assert queue.tokens.dtype == torch.float32


def step(distiller, arm=None):
    return distiller(BATCH, arm, predict=DATA.loss)


def test_a_step_meets_the_tokens_of_those_before_it_and_not_its_own(pair):
    distiller = Distiller(*pair, hidden_loss="contrastive", negatives=1000, hidden_temperature=0.5)
    assert not step(distiller).hidden.any()
    second = step(distiller).hidden
    student, teacher = pair
    s, t = student(BATCH, taps={"text": [0]}), teacher(BATCH, taps={"text": [1]})
    mask, (own,), (taught,) = s.masks["text"], s.taps["text"], t.taps["text"]
    expected = hidden_contrastive(
        own.hidden, taught.hidden, distiller.projections["text_0"], taught.hidden[mask],
        temperature=0.5, mask=mask,
    )  # fmt: skip
    torch.testing.assert_close(second[2:3], expected)
    assert int(distiller.queues["text_0"].counts.sum()) == 2 * int(mask.sum())


def test_only_a_step_with_gradient_of_the_arm_s_layers_is_remembered(pair):
    distiller = Distiller(*pair, hidden_loss="contrastive", negatives=20)
    with torch.no_grad():
        step(distiller)
    distiller.measure(BATCH, predict=DATA.loss, divergence=DATA.divergence)
    held = lambda: {name: int(q.counts.sum()) for name, q in distiller.queues.items()}  # noqa: E731
    assert set(held().values()) == {0}
    step(distiller, ("image[2]",)).total.backward()
    assert held() == {"image_0": 0, "image_1": 20, "text_0": 0, "multimodal_0": 0}
    step(distiller, ("image[2]",)).total.backward()  # a gradient through a queue that moved on


def test_the_queue_is_state_and_a_layer_of_weight_0_has_none(pair):
    options = {"hidden_loss": "contrastive", "negatives": 30}
    options["hidden_weight"] = {**dict.fromkeys(MODULES, 1.0), "text": 0.0}
    one = Distiller(*pair, **options)
    step(one)
    assert one.state_dict()["queues.text_0.tokens"].shape == (0, 96)
    assert one.state_dict()["queues.image_0.tokens"].any()
    other = Distiller(*pair, **options)
    other.load_state_dict(one.state_dict())
    assert torch.equal(step(one).hidden, step(other).hidden)
    measured = one.measure(BATCH, predict=DATA.loss, divergence=DATA.divergence)
    assert measured.hidden_layers["text"] == [0.0]
    assert not Distiller(*pair).queues


@pytest.mark.parametrize("options", [{"negatives": 0}, {"hidden_temperature": float("nan")}])
def test_options_are_checked(pair, options):
    with pytest.raises(ValueError, match="must be finite and above 0, got"):
        Distiller(*pair, hidden_loss="contrastive", **options)
