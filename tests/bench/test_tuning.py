"""What is tried beside an entry of a launch table, what is taken, and how it is written."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import tuning
from measuring import Spread
from tuning import Entry


class Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


START = Config(128, 64, 8, 3)


def test_candidates_differ_by_a_step_in_at_most_reach_fields():
    one, two = ({*tuning.candidates(START, reach)} for reach in (1, 2))
    assert tuning.candidates(START, 2)[0] == START
    assert one == {
        START,
        *(START._replace(block_m=x) for x in (64, 256)),
        *(START._replace(block_n=x) for x in (32, 128)),
        *(START._replace(num_warps=x) for x in (4, 16)),
        *(START._replace(num_stages=x) for x in (2, 4)),
    }
    assert one < two
    assert len(two) == 9 + 6 * 4
    assert all(sum(a != b for a, b in zip(x, START, strict=True)) <= 2 for x in two)


def test_candidates_stay_in_range_and_leave_other_fields():
    class Other(NamedTuple):
        block_m: int
        flag: bool

    assert tuning.candidates(Other(16, True), 2) == [Other(16, True), Other(32, True)]


def test_candidates_that_are_listed_are_tried_with_fewer_steps():
    far = Config(16, 256, 1, 1)
    assert tuning.candidates(START, 0, (far,)) == [START, far]
    assert tuning.candidates(START, 1, (far,)) == [START, far, *tuning.candidates(START, 1)[1:]]
    found = tuning.candidates(START, 2, (far, START))
    assert set(found) == {*tuning.candidates(START, 2), *tuning.candidates(far, 1)}
    assert len(found) == len(set(found))


A, B, C = START, START._replace(num_warps=4), START._replace(num_stages=2)


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({A: (1.00, 0.001), B: (0.90, 0.001), C: (0.95, 0.001)}, B),
        ({A: (1.00, 0.001), B: (1.10, 0.001)}, A),
        ({A: (1.00, 0.001), B: (0.99, 0.001)}, A),  # too little to change for
        ({A: (1.00, 0.300), B: (0.90, 0.001)}, A),  # within the spread
        ({A: (1.00, 0.001), B: (0.90, 0.300)}, A),
    ],
)
def test_the_fastest_is_taken_if_it_is_clearly_faster(times, winner):
    assert tuning.best(A, {x: Spread(ms, iqr, 40) for x, (ms, iqr) in times.items()}) == winner


def test_a_card_gets_entries_of_its_own():
    assert tuning.own(Entry("T", (8, 2, 64)), 9) == Entry("T", (9, 2, 64))
    assert tuning.own(Entry("T", (8, 2)), 12) == Entry("T", (8, 2))  # looks up those of 8.x


def test_the_entries_that_a_call_uses_are_found():
    """Not those whose other fields a lookup compares."""
    tables = {"T": {(8, 2): A, (9, 2): B}, "U": {(8, 2): C}}
    before = {name: dict(table) for name, table in tables.items()}

    def run() -> None:
        config = tables["T"][max(key for key, x in tables["T"].items() if x.block_m > 1)]
        assert config == B
        assert config.num_warps == B.num_warps

    assert tuning.used(tables, run) == [Entry("T", (9, 2))]
    assert tables == before
    assert type(tables["T"][9, 2]) is Config

    def broken() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        tuning.used(tables, broken)
    assert type(tables["U"][8, 2]) is Config


class Full(NamedTuple):
    block_m: int
    num_warps: int
    programs: int = 0
    split: int = 1


@pytest.mark.parametrize(
    ("config", "source"),
    [
        (Full(256, 16), "(9, 2): Full(256, 16),"),
        (Full(256, 16, split=2), "(9, 2): Full(256, 16, split=2),"),
        (Full(256, 16, 1, 2), "(9, 2): Full(256, 16, programs=1, split=2),"),
    ],
)
def test_an_entry_as_source(config, source):
    assert tuning.literal((9, 2), config) == source
    assert eval(f"{{{source}}}") == {(9, 2): config}


def test_the_real_tables_and_their_candidates():
    """A candidate is of a table, for a key that it may have, and of the kind of its entries."""
    launch = pytest.importorskip("optima_fast.kernels.launch")
    found = tuning.tables(launch)
    assert any(name.startswith("PRODUCT") for name in found)
    assert launch.CANDIDATES
    for name, listed in launch.CANDIDATES.items():
        assert name in found
        entry = next(iter(found[name].values()))
        lengths = {len(key) for key in found[name]}
        for key, configs in listed.items():
            assert len(key) in lengths
            assert all(type(config) is type(entry) for config in configs)
