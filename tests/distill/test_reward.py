"""Eq. 6: relative drops, clipped, averaged, guarded."""

from __future__ import annotations

import math

import pytest

from optima_fast.distill import parse_reward, relative_drop
from optima_fast.errors import UserError

BEFORE = {"kl": 2.0, "hidden": 10.0, "attention": 0.5}


def test_the_mean_of_the_relative_drops():
    after = {"kl": 1.5, "hidden": 9.0, "attention": 0.25}
    reward, drops = relative_drop(BEFORE, after)
    assert drops == {"kl": 0.25, "hidden": pytest.approx(0.1), "attention": 0.5}
    assert reward == pytest.approx((0.25 + 0.1 + 0.5) / 3)


def test_a_loss_that_rose_counts_as_no_drop():
    after = {"kl": 3.0, "hidden": 10.0, "attention": 0.25}
    assert relative_drop(BEFORE, after)[0] == pytest.approx(0.5 / 3)


def test_only_the_terms_asked_for_count():
    after = {"kl": 1.0, "hidden": 0.0, "attention": 0.5}
    assert relative_drop(BEFORE, after, ("kl",))[0] == 0.5
    assert relative_drop(BEFORE, after, ("hidden", "attention"))[0] == 0.5


@pytest.mark.parametrize(
    ("old", "new"),
    [(0.0, 0.0), (0.0, 1.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf)],
)
def test_zero_and_non_finite_losses_give_no_reward(old, new):
    reward, drops = relative_drop({"kl": old}, {"kl": new}, ("kl",))
    assert (reward, drops) == (0.0, {"kl": 0.0})


def test_terms_are_read():
    assert parse_reward("paper") == ("kl", "hidden", "attention")
    assert parse_reward("hidden, attention") == ("hidden", "attention")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no term"),
        ("kl,hiden", "no term 'hiden'; did you mean 'hidden'"),
        ("papr", "did you mean 'paper'"),
        ("kl,kl", "repeats a term"),
        ("zzz", "choose paper or kl, hidden, attention"),
    ],
)
def test_wrong_terms_are_named(text, message):
    with pytest.raises(UserError, match=message):
        parse_reward(text)
