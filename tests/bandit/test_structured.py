"""structured-ucb: its filter, written again with matrices, and what it learns across arms."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from optima_fast import bandit
from optima_fast.distill.arms import arm_space


def subsets(units):
    sets = [s for size in range(1, units + 1) for s in combinations(range(units), size)]
    return np.array([[int(u in s) for u in range(units)] for s in sets])


class Filter:
    """The recursion of the docstring, with theta itself, and all in units of the rewards."""

    def __init__(self, features, gamma, width, prior, trend):
        sign = 2.0 * np.asarray(features) - 1
        arms, c = sign.shape
        columns = [np.ones(arms), *(sign.T / np.sqrt(max(1, c)))]
        pairs = list(combinations(range(c), 2))
        columns += [sign[:, i] * sign[:, j] / np.sqrt(len(pairs)) for i, j in pairs]
        self.x = np.array(columns).T
        self.gamma, self.width, self.trend = gamma, width, trend
        self.own = prior if c else 3 * prior
        self.stationary = np.diag([0.0] + [prior] * (len(columns) - 1))
        self.p = self.stationary + np.diag([1.0] + [0.0] * (len(columns) - 1))
        self.theta, self.o = np.zeros(len(columns)), np.zeros(arms)
        self.o_variance = np.full(arms, self.own)
        self.squares, self.weight, self.base = 0.0, 0.0, None

    def learn(self, a, reward):
        keep = np.full(len(self.theta), self.gamma)
        keep[0] = 1.0
        first, self.base = self.base is None, reward if self.base is None else self.base
        self.theta = keep * self.theta
        self.p = self.p * np.outer(keep, keep) + (1 - self.gamma**2) * self.stationary
        self.p[0, 0] += self.trend
        self.o = self.gamma * self.o
        self.o_variance = self.gamma**2 * self.o_variance + (1 - self.gamma**2) * self.own
        g = self.p @ self.x[a]
        s = 1 + self.x[a] @ g + self.o_variance[a]
        e = reward - self.base - self.x[a] @ self.theta - self.o[a]
        self.theta = self.theta + g * e / s
        self.p = self.p - np.outer(g, g) / s
        self.o[a] += self.o_variance[a] * e / s
        self.o_variance[a] -= self.o_variance[a] ** 2 / s
        if not first:
            self.squares = 0.99 * self.squares + e**2 / s
            self.weight = 0.99 * self.weight + 1

    @property
    def mean(self):
        return self.base + self.x @ self.theta + self.o

    @property
    def spread(self):
        x = self.x[:, 1:]
        shared = np.einsum("ki,ij,kj->k", x, self.p[1:, 1:], x)
        return np.sqrt(self.squares / max(self.weight, 1e-300) * (shared + self.o_variance))

    @property
    def choice(self):
        return (self.mean + self.width * self.spread).argmax()


@pytest.mark.parametrize(
    ("features", "options"),
    [
        (subsets(3), {}),
        (subsets(6), {}),
        (subsets(2), {"gamma": 0.8, "width": 3.0, "prior": 20.0, "trend": 0.5}),
        (subsets(4), {"gamma": 1.0, "trend": 0.0}),
        (np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 1, 0]]), {}),
        (np.zeros((5, 0)), {"prior": 0.3}),
        (np.array([[1], [0]]), {"gamma": 0.9}),
    ],
)
def test_it_is_its_formula(features, options):
    arms, rng = len(features), np.random.default_rng(3)
    defaults = {"gamma": 0.995, "width": 1.4, "prior": 0.1, "trend": 0.0015}
    ours = Filter(features, **{**defaults, **options})
    given = None if features.shape[1] == 0 else features.tolist()
    policy = bandit.make("structured-ucb", arms, features=given, seed=4, **options)
    value = rng.standard_normal(arms)
    for t in range(150):
        arm = policy.select()
        if t >= policy.warm_up:
            assert arm == ours.choice
        reward = value[arm] + rng.standard_normal() + 0.01 * t
        policy.update(arm, reward)
        ours.learn(arm, reward)
        np.testing.assert_allclose(policy.mean, ours.mean, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(policy.spread, ours.spread, rtol=1e-7, atol=1e-9)


def test_sets_of_units_are_the_default_in_the_order_of_the_distillers_arms():
    assert [
        [int(x) for x in row] for row in bandit.make("structured-ucb", 63).state_dict()["features"]
    ] == (subsets(6).tolist())
    space = arm_space("modules", {"image": 3, "text": 2, "multimodal": 1})
    default, told = (
        bandit.make("structured-ucb", space.arms, features=features)
        for features in (None, space.features)
    )
    assert default.state_dict() == told.state_dict()
    assert bandit.make("structured-ucb", 6).state_dict()["features"] == [""] * 6
    assert bandit.make("structured-ucb", 2**13 - 1).state_dict()["features"][0] == ""


def test_features_may_be_strings():
    named, listed = (
        bandit.make("structured-ucb", 2, features=features)
        for features in (["011", "100"], [[0, 1, 1], [1, 0, 0]])
    )
    assert named.state_dict() == listed.state_dict()


@pytest.mark.parametrize("arms", [63, 255])
def test_it_finds_an_arm_by_its_units(arms):
    """With 4 in 255 arms pulled once, what units are worth tells which of all is best."""
    features = subsets(arms.bit_length())
    rng = np.random.default_rng(1)
    value = (2 * features - 1) @ rng.standard_normal(features.shape[1])
    policy, blind = (bandit.make("structured-ucb", arms, features=f) for f in (None, ["0"] * arms))
    found = []
    for learner in (policy, blind):
        for _ in range(80):
            arm = learner.select()
            learner.update(arm, value[arm] + 0.3 * rng.standard_normal())
        ranks = value.argsort().argsort()
        found.append(ranks[learner.select()] / (arms - 1))
    assert found[0] >= 0.99
    fit, blind_fit = (np.corrcoef(learner.mean, value)[0, 1] for learner in (policy, blind))
    assert fit > 0.8 > 0.6 > blind_fit


def test_a_pull_tells_of_arms_with_the_same_units_and_less_of_its_opposite():
    policy = bandit.make("structured-ucb", 7)
    for arm, reward in ((0, 0.0), (1, 0.0), (2, 0.1), (0, 1.0)):
        policy.update(arm, reward)
    image, text, both = (policy.mean[k] for k in (0, 1, 3))
    assert image > both > text
    assert policy.spread[0] < policy.spread[1] < min(policy.spread[3:])


def test_what_is_known_fades():
    """Other arms grow uncertain while one is pulled, up to what is known at the start."""
    policy = bandit.make("structured-ucb", 7, gamma=0.9, trend=0.0)
    for t in range(400):
        policy.update(t % 7 if t < 70 else 6, 0.1 * (-1) ** t)
    state = policy.state_dict()
    assert state["own"][:6] == pytest.approx([0.1] * 6, rel=1e-6)
    assert state["own"][6] < 0.08
    assert state["shared"][6] < 0.19


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([[1, 0], [0, 1]], "^features must have a row for each of 3 arms, got 2$"),
        ([[1, 0], [0, 1], [1]], "rows of 1 to 12 units, each 0 or 1, got '1' after '10'$"),
        ([[1, 0], [0, 2], [1, 1]], r"each 0 or 1, got '0\?' after '10'$"),
        (["", "", ""], "rows of 1 to 12 units, each 0 or 1, got '' after ''$"),
        (["0" * 13] * 3, "rows of 1 to 12 units"),
    ],
)
def test_bad_features_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        bandit.make("structured-ucb", 3, features=features)
