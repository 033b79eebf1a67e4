"""``python -m optima_fast.bandit replay RUN...``: compare policies on recorded rewards.

This trains nothing. It estimates what other policies would have earned, although rewards of
distillation depend on the round and on what was trained before. It makes two estimates, each
biased in its own way:
  rejection  uses the recorded rounds in which a policy would have pulled the recorded arm (Li et
             al., 2011); unbiased only if the arms were recorded uniformly at random (--policy
             random) and rewards do not change with the round or with earlier pulls
  world      uses every round, with rewards drawn from the nearest recorded ones of the arm pulled;
             it follows drift, but is biased: earlier pulls change nothing, and the luck of one
             recording counts as the truth
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from optima_fast.bandit import replay
from optima_fast.entry import guarded
from optima_fast.errors import UserError

ARMS_SHOWN = 12
NOTES = {
    "rejection": "rejection replay: unbiased only for arms recorded uniformly at random "
    "(--policy random) and rewards that depend on neither the round nor earlier pulls",
    "world": "world of nearby recorded rewards: uses every round, follows drift; biased, as "
    "earlier pulls change nothing and the luck of the recording counts as the truth",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m optima_fast.bandit",
        description=(__doc__ or "").partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command = parser.add_subparsers(dest="command", required=True, metavar="replay").add_parser(
        "replay",
        help="compare policies on the rewards that runs recorded",
        description=(__doc__ or "").partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("runs", metavar="RUN", nargs="+", help="run folders that have rewards")
    command.add_argument("--policies", default="all", help="all (default), or a list such as a,b")
    command.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    command.add_argument("--repeats", type=int, default=20, help="number of seeds (default 20)")
    command.add_argument(
        "--init-rounds",
        type=int,
        help="pulls of each arm before the policy chooses, for policies that have this",
    )
    command.add_argument(
        "--least",
        type=int,
        default=3,
        help="how many recorded rounds each arm must have (default 3)",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = parser.parse_args(argv)
    for name, least in (("seed", 0), ("repeats", 1), ("least", 1), ("init_rounds", 0)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
    chosen = replay.policies(given.policies)
    logs = [replay.read(run, given.least) for run in given.runs]
    rows = replay.compare(
        logs, chosen, seed=given.seed, repeats=given.repeats, init_rounds=given.init_rounds
    )
    if given.json:
        print(json.dumps(_document(logs, rows), indent=2, allow_nan=False))
        return 0
    for log in logs:
        _print_arms(log)
    for method, table in rows.items():
        print(f"\n{NOTES[method]}")
        _print_table(
            [
                "policy",
                "rounds used",
                "warm-up",
                "mean reward",
                "over seeds",
                "best arm",
                "vs random",
            ],
            [
                [
                    row["policy"],
                    f"{row['rounds']:.0f}",
                    f"{row['warm_up']:.0f}",
                    f"{row['mean']:+.5f}",
                    f"{row['deviation']:.5f}",
                    f"{row['best']:.0%}",
                    f"{row['vs_random']:+.5f}",
                ]
                for row in table
            ],
        )
    return 0


def _document(
    logs: Sequence[replay.Log], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    runs = [
        {
            "run": log.name,
            "rounds": len(log.choices),
            "arms": [
                {"arm": name, "rounds": pulls, "mean": mean}
                for name, pulls, mean in zip(log.arms, log.pulls(), log.means(), strict=True)
            ],
        }
        for log in logs
    ]
    tables = {
        method: [{k: None if v != v else v for k, v in row.items()} for row in table]
        for method, table in rows.items()
    }
    return {"notes": NOTES, "runs": runs, **tables}


def _print_arms(log: replay.Log) -> None:
    print(f"\n{log.name}: {len(log.choices)} rounds recorded")
    ranked = sorted(zip(log.means(), log.pulls(), log.arms, strict=True), reverse=True)
    rows = [[arm, str(pulls), f"{mean:+.5f}"] for mean, pulls, arm in ranked[:ARMS_SHOWN]]
    if len(ranked) > ARMS_SHOWN:
        rows.append([f"and {len(ranked) - ARMS_SHOWN} others", "", ""])
    _print_table(["arm", "rounds", "mean reward"], rows)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells))


if __name__ == "__main__":
    sys.exit(main())
