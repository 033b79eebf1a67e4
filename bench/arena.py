"""The contenders of a case side by side: each checked against float64, then all timed in turn.

bench/measuring.py says how time and memory are taken, bench/cases.py what the floor is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from measuring import (
    DTYPES,
    Row,
    Rows,
    Step,
    Timer,
    allowed_error,
    interleave,
    lost,
    one_line,
    peak_bytes,
    ratio,
    relative_error,
    spread,
    tidy,
)

# isort: split
import torch
from cases import Case, card, exact, floor_ms, inputs, work
from contenders import CONTENDERS, step
from torch import Tensor

ANCHORS = ("eager", "sdpa")  # ratios are to the first one there


class ContextLostError(RuntimeError):
    """After this no CUDA call of the process succeeds."""


class Settings(NamedTuple):
    device: str
    dtype: str
    seconds: float  # least time of a case
    least: int  # least samples of a contender
    backward: bool = True


Samples = dict[str, list[float]]


def serving(case: Case, names: Sequence[str]) -> list[str]:
    return [name for name in names if case.target in CONTENDERS[name].targets]


def check(
    name: str, case: Case, layers: list[list[Tensor]], answer: list[Tensor], settings: Settings
) -> tuple[Step, Row]:
    """The step to be timed and its row; RuntimeError if it is wrong."""
    run = step(name, case, layers, backward=settings.backward)
    error = relative_error(run(), answer)
    rounding = torch.bfloat16 if CONTENDERS[name].autocast else DTYPES[settings.dtype]
    if not error < allowed_error(rounding):
        raise RuntimeError(f"WRONG (relative error {error:.1e})")
    return run, {"error": error, "peak_mb": peak_bytes(run, settings.device) / 2**20}


def least_work(name: str, case: Case, settings: Settings, device_name: str) -> Row:
    """FLOP, bytes and floor of a step; none of a step that has attention's own forward in it."""
    contender, itemsize = CONTENDERS[name], DTYPES[settings.dtype].itemsize
    if contender.attends:
        return {"flop": None, "bytes": None, "floor_ms": None}
    layers = work(case, lse=contender.lse, backward=settings.backward, itemsize=itemsize)
    if layers is None:
        return {"flop": None, "bytes": None, "floor_ms": None}
    rates = card(device_name) if itemsize == 2 and settings.device == "cuda" else None
    return {
        "flop": sum(x.flop for x in layers),
        "bytes": sum(x.bytes for x in layers),
        "floor_ms": None if rates is None else floor_ms(layers, rates),
    }


def compare(
    case: Case, names: Sequence[str], settings: Settings, timer: Timer, rows: Rows
) -> tuple[dict[str, Row], Samples]:
    """A row a contender, and samples in milliseconds of those that are right.

    Rows are added to ``rows`` too. A contender that cannot run has ``left_out``, one that is wrong
    or breaks has ``failed``: the reason, in a line.
    """
    found: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    names = serving(case, names)
    if (case.name, "timing") in rows.done or all((case.name, x) in rows.done for x in names):
        return found, {}  # of a run that goes on

    def failed(name: str, mistake: Exception) -> None:
        found[name] = rows.add(case=case.name, provider=name, failed=one_line(mistake))
        if lost(mistake):
            raise ContextLostError from mistake

    with tidy():
        layers = inputs(case, DTYPES[settings.dtype], settings.device)
        answer = exact(case, layers)[: None if settings.backward else 1]
        for name in names:
            if not rows.begin(case.name, name):
                continue
            why = CONTENDERS[name].lacks(settings.device)
            if why:
                found[name] = rows.add(case=case.name, provider=name, left_out=why)
                continue
            try:
                steps[name], found[name] = check(name, case, layers, answer, settings)
            except Exception as mistake:  # whatever one does wrong, the others are measured
                failed(name, mistake)
        del answer
        rows.begin(case.name, "timing")
        try:
            samples = interleave(steps, timer, seconds=settings.seconds, least=settings.least)
        except RuntimeError as mistake:
            failed("timing", mistake)
            return found, {}
        anchor = next((name for name in ANCHORS if name in steps), None)
        for name, run in steps.items():
            row: Row = {"case": case.name, "provider": name, "ours": CONTENDERS[name].ours}
            row |= found[name] | spread(samples[name])._asdict()
            row |= least_work(name, case, settings, rows.common["device"])
            row["share"] = row["floor_ms"] and row["floor_ms"] / row["ms"]
            row["anchor"] = anchor
            row["ratio"] = anchor and ratio(samples[name], samples[anchor])
            if timer.cuda:
                row["wall_ms"] = timer.wall(run)
            found[name] = rows.add(**row)
    return found, samples


def line(row: Row) -> str:
    """A row to be printed."""
    head = f"{row['case']:22} {row['provider']:16} "
    if "ms" not in row:
        return head + str(row.get("failed") or row["left_out"])
    text = f"{row['ms']:9.3f} ms {row['iqr']:8.3f} {row['peak_mb']:9.1f} MB {row['error']:8.1e}"
    if row["share"]:
        text += f" {row['share']:6.0%} of the floor"
    if row["ratio"]:
        text += f"  {row['ratio']:6.3f} of {row['anchor']}"
    return head + text
