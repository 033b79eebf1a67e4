"""What `--benchmark-json` wrote as a table, and what of ours became slower since another one.

    python bench/report.py NEW.json
    python bench/report.py NEW.json --against OLD.json    # exit code 1 if something did

Ratios are compared, of a contender to the anchor that took turns with it: times of two days or
machines differ for other reasons. A change within ``--limit`` counts as noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = ("case", "contender", "ms", "IQR", "ratio", "to", "peak MB", "of the floor")


def load(path: str) -> dict[str, Row]:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return {b["fullname"]: {**b["extra_info"], "group": b["group"]} for b in content["benchmarks"]}


def cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def table(rows: dict[str, Row], before: dict[str, Row] | None) -> list[str]:
    heads = [*COLUMNS, *(() if before is None else ("ratio before", "change"))]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in rows.items():
        keys = ("group", "provider", "ms", "iqr", "ratio", "anchor", "peak_mb", "share")
        cells = [cell(row.get(key)) for key in keys]
        if before is not None:
            old = before.get(name, {})
            times = change(row, old)
            cells += [cell(old.get("ratio")), "" if times is None else f"{times - 1:+.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def change(row: Row, old: Row) -> float | None:
    """New ratio over old; nothing where either has none or another anchor."""
    if not row["ratio"] or not old.get("ratio") or row["anchor"] != old["anchor"]:
        return None
    return float(row["ratio"] / old["ratio"])


def slower(rows: dict[str, Row], before: dict[str, Row], limit: float) -> list[str]:
    found = []
    for name, row in rows.items():
        times = change(row, before.get(name, {})) if row["ours"] else None
        if times is not None and times > 1 + limit:
            old = before[name]["ratio"]
            found.append(
                f"{row['group']}, {row['provider']}: {row['ratio']:.3g} of {row['anchor']},"
                f" was {old:.3g}: {times:.2f} times as slow"
            )
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", metavar="NEW.json")
    parser.add_argument("--against", metavar="OLD.json")
    parser.add_argument("--limit", type=float, default=0.2, help="as a fraction; default 0.2")
    args = parser.parse_args(argv)
    rows = load(args.file)
    before = None if args.against is None else load(args.against)
    print("\n".join(table(rows, before)))
    if before is None:
        return 0
    if not any(change(row, before.get(name, {})) for name, row in rows.items()):
        parser.error(f"must have a benchmark in common, got {args.file} and {args.against}")
    found = slower(rows, before, args.limit)
    print(f"\nslower than in {args.against}, beyond {args.limit:.0%}: {len(found) or 'nothing'}")
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
