"""Launch configurations: what to try, which to take, and how kernels/launch.py writes it.

A table is a dict of kernels/launch.py from a key, whose first number is the compute capability's
major one, to a NamedTuple of tile sizes and compiler options. Entries are changed in place, which a
launch sees at once; those that a call uses are found by watching it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

from measuring import Spread

Key = tuple[Any, ...]
Tables = dict[str, dict[Key, Any]]
LEAST_GAIN = 0.02  # what a new entry must be faster by, beyond the spread of both
WARPS = (1, 2, 4, 8, 16)
STAGES = (1, 2, 3, 4, 5)
BLOCKS = (16, 32, 64, 128, 256)


class Entry(NamedTuple):
    """A place in a table."""

    table: str
    key: Key


def tables(launch: ModuleType) -> Tables:
    """The tables of a launch module: its public dicts of NamedTuples."""
    return {
        name: value
        for name, value in vars(launch).items()
        if isinstance(value, dict)
        and value
        and all(hasattr(entry, "_fields") for entry in value.values())
    }


def _watched(config: Any, seen: Callable[[], object]) -> Any:
    """The same configuration, which tells when a launch takes it; a lookup reads other fields."""
    kind = type(config)

    class Watched(kind):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            if name == "num_warps":
                seen()
            return super().__getattribute__(name)

        def __iter__(self) -> Iterator[Any]:
            seen()
            return iter(super().__iter__())

    return Watched(*config)


def used(found: Tables, run: Callable[[], object]) -> list[Entry]:
    """The entries that a call launches with."""
    before = {name: dict(table) for name, table in found.items()}
    entries: dict[Entry, None] = {}
    try:
        for name, table in found.items():
            for key, config in before[name].items():
                table[key] = _watched(config, partial(entries.setdefault, Entry(name, key)))
        run()
    finally:
        for name, table in found.items():
            table.update(before[name])
    return list(entries)


def own(entry: Entry, major: int) -> Entry:
    """The entry that a card of this capability gets, where it now shares an older one's.

    Cards of 12.x and later look up those of 8.x.
    """
    return Entry(entry.table, (major if major < 12 else 8, *entry.key[1:]))


def _neighbours(field: str, value: Any) -> tuple[Any, ...]:
    scale = WARPS if field == "num_warps" else STAGES if field == "num_stages" else ()
    if field.startswith("block"):
        scale = BLOCKS
    if value not in scale:
        return ()
    at = scale.index(value)
    return tuple(scale[i] for i in (at - 1, at + 1) if 0 <= i < len(scale))


def candidates(config: Any, reach: int, listed: Sequence[Any] = ()) -> list[Any]:
    """The entry, those listed for it, and what differs by one step in at most ``reach`` fields.

    Tile sizes, warps and stages are varied, of a listed one at most ``reach - 1`` of them.
    """
    found: dict[Any, None] = {config: None, **dict.fromkeys(listed)}
    for start, steps in ((config, reach), *((x, reach - 1) for x in listed)):
        options = {f: _neighbours(f, v) for f, v in start._asdict().items()}
        fields = [f for f, values in options.items() if values]
        for count in range(1, steps + 1):
            for chosen in itertools.combinations(fields, count):
                for values in itertools.product(*(options[f] for f in chosen)):
                    found.setdefault(start._replace(**dict(zip(chosen, values, strict=True))))
    return list(found)


def best(current: Any, measured: Mapping[Any, Spread]) -> Any:
    """The fastest, unless the current entry is as fast within noise; it must have been measured."""
    now = measured[current]
    config, time = min(measured.items(), key=lambda item: item[1].ms)
    noise = max(now.iqr, time.iqr) / 2
    faster = now.ms - time.ms > max(LEAST_GAIN * now.ms, noise)
    return config if faster else current


def literal(key: Key, config: Any) -> str:
    """An entry as source: fields by place, those with a default by name and only if they differ."""
    defaults = config._field_defaults
    values = [repr(x) for f, x in config._asdict().items() if f not in defaults]
    values += [
        f"{f}={getattr(config, f)!r}" for f, x in defaults.items() if getattr(config, f) != x
    ]
    return f"{key!r}: {type(config).__name__}({', '.join(values)}),"
