"""The C++ core and its Python twin: the same arms, means, spreads and states, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = [
    ("structured-ucb", 7, {}),
    ("structured-ucb", 1, {"init_rounds": 0}),
    ("structured-ucb", 5, {}),
    ("structured-ucb", 2, {"gamma": 1.0, "trend": 0.0, "prior": 1e6}),
    ("structured-ucb", 63, {"width": 0.3, "gamma": 0.9, "seed": 2**64 - 1}),
    ("structured-ucb", 3, {"features": ["00000", "10101", "11111"], "trend": 3.0}),
    ("scale-free-ucb", 7, {"prior": 1e-6}),
    ("scale-free-ucb", 7, {"gamma": 0.5, "trend": 1.0, "width": 2.0}),
    ("scale-free-ucb", 63, {"gamma": 1.0, "init_rounds": 2, "warmup_limit": 126}),
    ("thompson", 7, {}),
    ("thompson", 7, {"gamma": 0.5, "init_rounds": 1, "variance_scale": 0.01, "seed": 1}),
    ("thompson", 63, {"gamma": 0.9, "init_rounds": 0, "variance_scale": 1e-4, "seed": 2**64 - 1}),
    ("thompson", 5, {"gamma": 1.0, "init_rounds": 3, "variance_scale": 0.0, "seed": 2**32}),
    ("thompson", 1, {"variance_scale": 1e300}),
]


@pytest.mark.parametrize(("name", "arms", "options"), CASES)
def test_the_same_steps(twins, name, arms, options):
    """On rewards of both signs whose size changes by powers of ten on the way."""
    python, cpp = twins(name, arms, **options)
    noise = np.random.default_rng(arms)
    value = noise.standard_normal(arms)
    for t in range(1200 // (1 + arms.bit_length())):
        arm = python.select()
        assert cpp.select() == arm
        reward = float((value[arm] + noise.standard_normal()) * 10.0 ** noise.integers(-2, 3))
        for policy in (python, cpp):
            policy.update(arm, reward)
        if t % 7 == 0:
            assert cpp.mean == python.mean
            assert cpp.spread == python.spread
    assert cpp.state_dict() == python.state_dict()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    case=st.sampled_from(CASES),
    updates=st.lists(
        st.tuples(st.none() | st.integers(-2, 10), st.floats() | st.integers()), max_size=40
    ),
)
def test_the_same_on_any_updates(twins, case, updates):
    """Also on arms nobody proposed, on rewards of any size, and on what they refuse."""
    name, arms, options = case
    python, cpp = twins(name, arms, **options)
    for arm, reward in updates:
        outcomes = []
        for policy in (python, cpp):
            try:
                outcomes.append(policy.update(policy.select() if arm is None else arm, reward))
            except (ValueError, IndexError) as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]
        assert cpp.state_dict() == python.state_dict()
        assert cpp.select() == python.select()
        assert repr(cpp.mean) == repr(python.mean)  # equal also where it overflows
        assert repr(cpp.spread) == repr(python.spread)
    state = python.state_dict()
    cpp.load_state_dict(state)
    assert cpp.state_dict() == state
