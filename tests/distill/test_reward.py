"""Eq. 6 and its relatives: relative drops, clipped or signed, averaged, guarded."""

from __future__ import annotations

import math

import pytest

from optima_fast.distill import REWARDS, Measurement, parse_reward, relative_drop
from optima_fast.distill.measurement import average
from optima_fast.distill.reward import Context, relative
from optima_fast.errors import UserError

BEFORE = {"kl": 2.0, "hidden": 10.0, "attention": 0.5}
CLIPPED, SIGNED = Context(), Context(clip=False)


def measured(
    kl: float = 2.0,
    hidden: tuple[tuple[float, ...], tuple[float, ...]] = ((8.0, 1.0), (1.0,)),
    attention: tuple[tuple[float, ...], tuple[float, ...]] = ((0.25, 0.125), (0.125,)),
    prediction: float = 3.0,
) -> Measurement:
    sums = [sum(map(sum, layers)) for layers in (hidden, attention)]
    by_module = [
        dict(zip(("image", "text"), map(list, layers), strict=True))
        for layers in (hidden, attention)
    ]
    return Measurement(kl, *sums, prediction, *by_module, by_module[0], prediction / 2)


def test_the_mean_of_the_relative_drops():
    after = {"kl": 1.5, "hidden": 9.0, "attention": 0.25}
    reward, drops = relative_drop(BEFORE, after)
    assert drops == {"kl": 0.25, "hidden": pytest.approx(0.1), "attention": 0.5}
    assert reward == pytest.approx((0.25 + 0.1 + 0.5) / 3)


@pytest.mark.parametrize(
    ("old", "new", "terms", "expected"),
    [
        (
            (0.37, 36.1251, 0.0123),
            (0.361, 35.987, 0.0124),
            "drop",
            (
                "0x1.3371239577341p-7",
                ["0x1.8e879c5e18e8ep-6", "0x1.f510c810cf29cp-9", "0x0.0p+0"],
            ),
        ),
        (
            (1e-3, 2.7182818, 3.3),
            (0.9e-3, 2.7, 3.1),
            "hidden,kl",
            ("0x1.b525cbd70cb09p-5", ["0x1.b8c323d7316bdp-8", "0x1.999999999999dp-4"]),
        ),
    ],
)
def test_eq_6_to_the_bit_of_its_first_version(old, new, terms, expected):
    """Values that `max(0, (old - new) / old)`, summed in the order of the terms, gave."""
    before, after = (measured(kl=kl)._replace(hidden=h, attention=a) for kl, h, a in (old, new))
    reward, drops = parse_reward(terms)(before, after, CLIPPED)
    assert (reward.hex(), [d.hex() for d in drops.values()]) == expected


def test_a_loss_that_rose_counts_as_no_drop_unless_signed():
    after = measured(kl=3.0, attention=((0.125, 0.0625), (0.0625,)))
    assert parse_reward("drop")(measured(), after, CLIPPED) == (
        pytest.approx(0.5 / 3),
        {"kl": 0.0, "hidden": 0.0, "attention": 0.5},
    )
    assert parse_reward("drop")(measured(), after, SIGNED) == (
        0.0,
        {"kl": -0.5, "hidden": 0.0, "attention": 0.5},
    )


def test_only_the_terms_asked_for_count():
    after = measured(kl=1.0, hidden=((0.0, 0.0), (0.0,)), prediction=3.75)
    assert parse_reward("kl")(measured(), after, CLIPPED) == (0.5, {"kl": 0.5})
    assert parse_reward("attention,hidden")(measured(), after, CLIPPED)[0] == 0.5
    for name in ("prediction", " prediction ,"):
        assert parse_reward(name)(measured(), after, SIGNED) == (-0.25, {"prediction": -0.25})
    assert parse_reward("kl, prediction")(measured(), after, SIGNED)[0] == 0.125


def test_normalised_weighs_every_module_and_every_layer_of_it_the_same():
    after = measured(
        kl=1.0, hidden=((8.0, 0.5), (0.75,)), attention=((0.5, 0.125), (0.0625,)), prediction=0.0
    )
    reward, drops = parse_reward("normalised")(measured(), after, SIGNED)
    # image: layers 0 and .5, text .25; image: layers -1 and 0, text .5
    assert drops == {"kl": 0.5, "hidden": 0.25, "attention": 0.0}
    assert reward == 0.25
    # the sum that Eq. 6 takes is mostly that of the largest layer
    assert parse_reward("hidden")(measured(), after, SIGNED)[0] == 0.075
    worse = measured(kl=3.0, hidden=((8.0, 0.5), (2.0,)))
    assert parse_reward("normalised")(measured(), worse, CLIPPED) == (
        0.0,
        {"kl": 0.0, "hidden": 0.0, "attention": 0.0},
    )
    assert parse_reward("normalised")(measured(), worse, SIGNED)[1] == {
        "kl": -0.5,
        "hidden": -0.375,
        "attention": 0.0,
    }


@pytest.mark.parametrize("name", REWARDS)
def test_the_reward_is_per_cost(name):
    after = measured(1.0, ((4.0, 0.5), (0.5,)), ((0.1, 0.1), (0.1,)), 1.0)
    whole, drops = REWARDS[name](measured(), after, CLIPPED)
    half, same = REWARDS[name](measured(), after, Context(cost=0.5))
    assert (half, same) == (2 * whole, drops)
    assert whole > 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *((0.0, 0.0), (0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, math.nan)),
        *((math.inf, 1.0), (1.0, math.inf), (math.inf, math.inf), (1.0, -math.inf)),
    ],
)
def test_zero_and_non_finite_losses_give_no_reward(old, new):
    assert relative(old, new) == 0.0
    reward, drops = relative_drop({"kl": old}, {"kl": new}, ("kl",))
    assert (reward, drops) == (0.0, {"kl": 0.0})
    before, after = (measured(x, ((x, x), (x,)), ((x,), (x,)), x) for x in (old, new))
    for rule in REWARDS.values():
        assert rule(before, after, SIGNED)[0] == 0.0


def test_no_accident_outweighs_the_rest():
    assert relative(1.0, 1e300) == -1.0
    assert relative(5e-324, 1e308) == -1.0
    assert relative(1.0, 0.0) == 1.0


def test_measurements_of_parts_are_averaged_by_size():
    one, two = measured(kl=1.0), measured(kl=4.0, hidden=((2.0, 4.0), (7.0,)), prediction=0.0)
    mean = average([(one, 1), (two, 3)])
    assert (mean.kl, mean.hidden, mean.prediction) == (3.25, 12.25, 0.75)
    assert mean.hidden_layers == {"image": [3.5, 3.25], "text": [5.5]}
    assert mean.attention_layers == one.attention_layers
    assert mean.unexplained == mean.hidden_layers
    assert mean.teacher == 0.375
    assert average([(two, 5)]) == two


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no term"),
        (",", "names no term"),
        ("kl,hiden", "unknown term of a reward 'hiden'; did you mean 'hidden'"),
        ("dorp", "did you mean 'drop'"),
        ("normalized", "did you mean 'normalised'"),
        (
            "kl,drop",
            "unknown term of a reward 'drop'; choose headroom, gradient-cosine, drop, normalised",
        ),
        ("headrom", "did you mean 'headroom'"),
        ("kl,kl", "repeats a term"),
        (
            "zzz",
            "choose headroom, gradient-cosine, drop, normalised, prediction or terms of kl,hid",
        ),
    ],
)
def test_wrong_terms_are_named(text, message):
    with pytest.raises(UserError, match=message):
        parse_reward(text)


def test_the_old_name_is_taken_with_a_warning_that_users_see():
    with pytest.warns(FutureWarning, match="reward 'paper' is called 'drop' now; the next release"):
        assert parse_reward("paper") is parse_reward("drop")
