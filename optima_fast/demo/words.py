"""The demo in words: the same sentences and tables on the terminal and on the page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optima_fast.demo.pair import METHODS, python_name
from optima_fast.demo.result import NOISE
from optima_fast.pages.examples import Example, Said
from optima_fast.training import Display
from optima_fast.training.overview import number, shares

HALVES = " \u2584\u2580\u2588"  # nothing, the lower half, the upper half, both
DARK = 40  # levels of noise


def introduction(result: Mapping[str, Any]) -> str:
    """What was done."""
    one = result["students"][METHODS[0]]
    return (
        f"Two students learnt {result['settings']['task']} on canvases of handwritten digits from "
        f"one teacher: {one['steps']:,} steps each, the same start, the same batches. {METHODS[1]} "
        f"distils all three modules (image, text, multimodal) in every step. {METHODS[0]} chooses "
        "the modules with most left to teach for their cost, anew every few steps."
    )


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """A header and rows: both students side by side, and their teacher."""
    students = [result["students"][method] for method in METHODS]

    def row(label: str, form: str, key: str, teacher: float | None = None) -> list[str]:
        return [
            label,
            *(form.format(student[key]) for student in students),
            "" if teacher is None else form.format(teacher),
        ]

    return [
        ["", *METHODS, "teacher"],
        row(f"{result['metric']}, test split", "{:.4f}", "metric", result["teacher"]),
        row("parameters", "{:,}", "parameters", result["teacher_parameters"]),
        row("arithmetic of the steps", "{:.2f}", "arithmetic"),
        row("seconds of the steps", "{:.0f}", "seconds"),
        row("seconds of choosing", "{:.0f}", "choosing"),
        ["modules distilled", *(_modules(student["arms"]) for student in students), ""],
    ]


def _modules(arms: Mapping[str, int]) -> str:
    """In what share of the rounds which modules were distilled; the largest arm is all of them."""
    largest = max(arms, key=lambda name: name.count("+"))
    return shares({"all" if name == largest else name: count for name, count in arms.items()})


def reading(result: Mapping[str, Any]) -> list[str]:
    """What may be concluded, and what not."""
    pair, settings = result["paired"], result["settings"]
    first, second = METHODS
    size, error = 100 * pair["difference"], 100 * pair["error"]
    ahead, behind = (first, second) if size > 0 else (second, first)
    shown = "pairs of images" if settings["task"] == "nlvr2" else "images"
    counted = (
        f"{first} minus {second}: {size:+.1f} points, standard error {error:.1f} "
        f"({result['test_examples']:,} test examples on {pair['images']:,} {shown}; {first} alone "
        f"is right in {pair['only_first']}, {second} alone in {pair['only_second']})."
    )
    times = f"{abs(size) / error:.1f}" if error else "many"
    if pair["only_first"] == pair["only_second"] == 0:
        verdict = "Both give the same answers."
    elif pair["beyond_noise"]:
        verdict = (
            f"{ahead} is ahead of {behind} by more than the noise of the test set: {times} "
            f"standard errors, where {NOISE:g} would do."
        )
    else:
        verdict = (
            f"No winner: {times} standard errors, less than {NOISE:g}, are within the noise of the "
            "test set."
        )
    lines = [
        f"{counted} {verdict}",
        'This is one seed of one task on small data; README\'s "Which modules to distil" has five '
        "seeds of four tasks. Seconds are of both at once, a thread each, on a machine that may "
        "have had other work.",
        f"For comparison: answers from the text alone {number(result['text_only'])}, a student "
        f"before training {number(result['before'])}.",
    ]
    outdone = min(student["metric"] for student in result["students"].values()) > result["teacher"]
    if outdone and pair["beyond_noise"] and ahead == first:
        lines.insert(
            1,
            f"Both students outdo this teacher: {first} then stops copying how it answers, and "
            "gains by that. A better teacher leaves less to gain: --teacher-steps 3000 trains one.",
        )
    return lines


def further(result: Mapping[str, Any], folder: Path) -> list[str]:
    """What to type next."""
    settings = result["settings"]
    python = shlex.quote(python_name())
    task, seed, teacher = settings["task"], settings["seed"], shlex.quote(str(folder / "teacher"))
    runs = " ".join(shlex.quote(str(folder / method)) for method in METHODS)
    return [
        f"{python} -m optima_fast.demo --task {task} --seed {seed + 1}",
        f"{python} -m optima_fast.train --task {task} --teacher {teacher} --method optima",
        f"{python} -m optima_fast.report {runs}",
    ]


def show_examples(examples: Sequence[Example], display: Display) -> None:
    """The canvases side by side, as many as fit, and a table of what was said of them."""
    tiles = [_tile(i, example) for i, example in enumerate(examples, 1)]
    line: list[list[str]] = []
    for tile in [*tiles, None]:
        if line and (tile is None or sum(len(t[0]) + 1 for t in (*line, tile)) > display.width + 1):
            for parts in zip(*line, strict=True):
                display.note(" ".join(parts).rstrip())
            line = []
        if tile is not None:
            line.append(tile)
    rows = [
        [str(i), e.text, e.answer, *map(_marked, e.said.values())]
        for i, e in enumerate(examples, 1)
    ]
    names = list(examples[0].said) if examples else []
    if rows:
        display.table("", rows, ["", "text", "right answer", *names])


def _marked(said: Said) -> str:
    return said.text if said.right else f"{said.text} (wrong)"


def _tile(number: int, example: Example) -> list[str]:
    """A number, and below it the example's images in half blocks."""
    drawn = ["|".join(parts) for parts in zip(*map(drawing, example.images), strict=True)]
    return [f"{number}".ljust(len(drawn[0])), *drawn]


def drawing(levels: NDArray[np.uint8]) -> list[str]:
    """Half a character a pixel, where it is brighter than half of the brightest nearby."""
    cells = levels.reshape(2, len(levels) // 2, 2, -1)
    peak = np.maximum(cells.max((1, 3), keepdims=True), 2 * DARK)
    ink = (2 * cells.astype(int) > peak).reshape(levels.shape)
    halves = 2 * ink[::2] + ink[1::2]
    return ["".join(HALVES[i] for i in row) for row in halves.tolist()]


def show(result: Mapping[str, Any], page: Path, display: Display) -> None:
    """The table, its reading, and where the rest is."""
    header, *rows = table(result)
    display.note(introduction(result))
    display.table("", rows, header)
    for text in reading(result):
        display.note(text)
    display.note(f"page: {page}")
    display.note("next:")
    for line in further(result, page.parent):
        display.note(f"  {line}")
