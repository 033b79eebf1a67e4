"""Headroom: the best so far of each layer, the teacher's lead, per cost."""

from __future__ import annotations

import json
import math

import pytest

from optima_fast.distill import Headroom, Measurement, arms

COUNTS = {"image": 2, "text": 1, "multimodal": 1}
ARMS = arms(list(COUNTS))
COSTS = [0.5, 0.25, 1.0, 0.75, 1.0, 1.0, 1.0]


def headroom(chosen=ARMS, costs=COSTS, counts=COUNTS) -> Headroom:
    return Headroom(chosen, costs, counts, output="multimodal")


def shares(image=(0.4, 0.2), text=0.1, multimodal=0.05) -> dict[str, list[float]]:
    return {"image": list(image), "text": [text], "multimodal": [multimodal]}


def test_before_any_measurement_everything_is_left():
    assert headroom().rewards() == [2.0, 4.0, 1.0, 2 / 0.75, 2.0, 2.0, 3.0]


def test_modules_weigh_the_same_and_costs_divide():
    h = headroom()
    h.update(shares(), prediction=2.0, teacher=1.0)
    image, text, both = 0.3, 0.1, 0.05
    assert h.rewards() == pytest.approx(
        [
            image / 0.5, text / 0.25, both, (image + text) / 0.75, image + both, text + both,
            image + text + both,
        ]
    )  # fmt: skip


def test_the_best_so_far_counts_and_never_more_than_all():
    h = headroom()
    h.update(shares(image=(1.7, 0.2), text=0.1), prediction=2.0, teacher=1.0)
    assert h.layers() == shares(image=(1.0, 0.2), text=0.1)
    h.update(shares(image=(0.6, 0.9), text=3.0), prediction=2.0, teacher=1.0)
    assert h.layers() == shares(image=(0.6, 0.2), text=0.1)


def test_what_predicts_is_worth_no_more_than_the_teacher_s_lead():
    h = headroom()
    lead = [(1.5, 0.05), (1.02, 0.02), (1.2, 0.02), (0.9, 0.0), (2.0, 0.0)]
    for prediction, left in lead:
        h.update(shares(), prediction=prediction, teacher=1.0)
        assert h.layers()["multimodal"] == [pytest.approx(left)]
        assert h.layers()["image"] == [0.4, 0.2]


def test_a_teacher_without_loss_leads_for_ever():
    h = headroom()
    h.update(shares(), prediction=1e-9, teacher=0.0)
    assert h.layers()["multimodal"] == [0.05]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_left_out(bad):
    h = headroom()
    h.update(shares(image=(bad, 0.2), multimodal=bad), prediction=bad, teacher=1.0)
    h.update(shares(text=bad), prediction=1.5, teacher=bad)
    assert h.layers() == shares(multimodal=0.05)
    assert all(map(math.isfinite, h.rewards()))


def test_arms_of_layers_count_their_share_of_the_module():
    chosen = [("image[1]",), ("image[2]", "text"), ("image",)]
    h = headroom(chosen, [1.0, 1.0, 0.5])
    h.update(shares(), prediction=2.0, teacher=1.0)
    assert h.rewards() == pytest.approx([0.2, 0.1 + 0.1, 0.6])


def test_a_measurement_is_taken_as_it_is():
    h, other = headroom(), headroom()
    nothing = {name: [0.0] * count for name, count in COUNTS.items()}
    h.measured(
        Measurement(
            kl=9.0, hidden=9.0, attention=9.0, prediction=1.01, hidden_layers=nothing,
            attention_layers=nothing, unexplained=shares(), teacher=1.0,
        )
    )  # fmt: skip
    other.update(shares(), prediction=1.01, teacher=1.0)
    assert h.rewards() == other.rewards()


def test_a_state_continues_through_json_and_shares_nothing():
    h, other = headroom(), headroom()
    h.update(shares(), prediction=1.03, teacher=1.0)
    saved = h.state_dict()
    h.update(shares(text=0.01), prediction=1.0, teacher=1.0)
    other.load_state_dict(json.loads(json.dumps(saved)))
    assert other.layers() == {**shares(), "multimodal": [pytest.approx(0.03)]}
    other.update(shares(text=0.01), prediction=1.0, teacher=1.0)
    assert other.state_dict() == h.state_dict()


def test_at_first_all_modules_then_the_one_with_most_left_for_its_cost():
    """The course of a run on the built-in tasks, in their costs."""
    h = headroom(costs=[0.6, 0.57, 0.97, 0.78, 0.98, 0.98, 1.0])
    course = [
        ((1.0, 0.9), 0.9, 0.9, 3.0, ("image", "text", "multimodal")),
        ((0.2, 0.2), 0.2, 0.2, 1.5, ("image", "text", "multimodal")),
        ((0.1, 0.1), 0.05, 0.05, 1.0, ("image", "text")),
        ((0.1, 0.1), 0.01, 0.05, 0.9, ("image",)),
    ]
    for image, text, multimodal, prediction, best in course:
        h.update(shares(image, text, multimodal), prediction=prediction, teacher=1.0)
        rewards = h.rewards()
        assert ARMS[rewards.index(max(rewards))] == best
