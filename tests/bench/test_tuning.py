"""What the tuner tries, what it takes, and that it rewrites the launch table and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import tuning
from measuring import Spread
from tuning import Entry

LAUNCH = Path(__file__).resolve().parents[2] / "kernels" / "launch.py"


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


SOURCE = '''"""Tables."""
from typing import NamedTuple

class Config(NamedTuple):
    block_m: int
    num_warps: int
    programs: int = 0
    split: int = 1

LIMIT = 3
# said of the table
FIRST = {
    (8, 2): Config(128, 4),
    # said of (9, 2)
    # in two lines
    (9, 2): Config(
        64, 8
    ),
}
SECOND: dict[tuple[int, ...], Config] = {(9, 2, 64): Config(32, 2)}
THIRD = {
    (9, 2): Config(16, 1),
}
'''


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "launch_copy.py"
    path.write_text(SOURCE)
    return path


def test_an_entry_is_replaced_with_its_comment(module):
    config = tuning.load(module).Config
    tuning.write(module, {Entry("FIRST", (9, 2)): (config(256, 16), "0.1 ms, card, date")})
    text = module.read_text()
    assert "    # 0.1 ms, card, date\n    (9, 2): Config(256, 16),\n}\n" in text
    assert "said of (9, 2)" not in text
    assert "# said of the table\nFIRST = {\n    (8, 2): Config(128, 4),\n" in text
    assert text.partition("SECOND")[2] == SOURCE.partition("SECOND")[2]
    again = tuning.tables(tuning.load(module))
    assert set(again) == {"FIRST", "SECOND", "THIRD"}
    assert again["FIRST"] == {(8, 2): (128, 4, 0, 1), (9, 2): (256, 16, 0, 1)}


def test_an_entry_is_added(module, tmp_path):
    target = tmp_path / "other.py"
    config = tuning.load(module).Config
    chosen = {
        Entry("FIRST", (10, 2)): (config(64, 2), "new"),
        Entry("THIRD", (8, 4)): (config(32, 2, split=2), "new too"),
    }
    tuning.write(module, chosen, target)
    assert module.read_text() == SOURCE
    again = tuning.tables(tuning.load(target))
    assert again["FIRST"][10, 2] == (64, 2, 0, 1)
    assert again["THIRD"] == {(9, 2): (16, 1, 0, 1), (8, 4): (32, 2, 0, 2)}
    assert "    (8, 4): Config(32, 2, split=2),\n" in target.read_text()


def test_a_table_that_is_not_there(module):
    with pytest.raises(ValueError, match="no table NONE written as a plain dict"):
        tuning.rewritten(SOURCE, Entry("NONE", (9, 2)), A, "x")


def test_the_real_tables_can_be_rewritten_entry_by_entry(tmp_path):
    """Every table is found, and each entry can be changed in the text without touching another."""
    found = tuning.tables(tuning.load(LAUNCH))
    assert any(name.startswith("PRODUCT") for name in found)
    target = tmp_path / "launch.py"
    for name, table in found.items():
        for key, config in table.items():
            changed = next(x for x in tuning.candidates(config, 1) if x != config)
            tuning.write(LAUNCH, {Entry(name, key): (changed, "a test")}, target)
            again = tuning.tables(tuning.load(target))
            assert again.pop(name) == {**table, key: changed}
            assert again == {k: v for k, v in found.items() if k != name}
