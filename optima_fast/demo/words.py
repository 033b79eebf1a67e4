"""The demo in words: the same sentences and tables on the terminal and on the page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optima_fast.demo.pair import METHODS
from optima_fast.demo.result import Example
from optima_fast.training import Display
from optima_fast.training.overview import number, shares

HALVES = " \u2584\u2580\u2588"  # nothing, the lower half, the upper half, both
DARK = 40  # levels of noise


def introduction(result: Mapping[str, Any]) -> list[str]:
    """What was done."""
    students = result["students"]
    one = students[METHODS[0]]
    return [
        f"Two students of {one['parameters']:,} parameters learnt {result['settings']['task']} on "
        f"canvases of handwritten digits from one teacher of {result['teacher_parameters']:,}: "
        f"{one['steps']:,} steps each, the same start, the same batches. {METHODS[1]} distils all "
        f"three modules (image, text, multimodal) in every step; {METHODS[0]} chooses, every few "
        "steps, those with most left to teach for their cost."
    ]


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """A header and rows: both students side by side."""
    students = [result["students"][method] for method in METHODS]

    def row(label: str, key: str, form: str) -> list[str]:
        return [label, *(form.format(student[key]) for student in students)]

    return [
        ["", *METHODS],
        row(f"{result['metric']}, test split", "metric", "{:.4f}"),
        row("arithmetic of the steps, all modules 1", "arithmetic", "{:.2f}"),
        row("seconds of the steps", "seconds", "{:.0f}"),
        row("seconds to measure what to choose", "choosing", "{:.0f}"),
        ["modules distilled", *(shares(student["arms"]) for student in students)],
    ]


def reading(result: Mapping[str, Any]) -> list[str]:
    """What may be concluded, and what not."""
    pair, settings = result["paired"], result["settings"]
    first, second = METHODS
    size, error = 100 * pair["difference"], 100 * pair["error"]
    ahead, behind = (first, second) if size > 0 else (second, first)
    counted = (
        f"{first} minus {second}: {size:+.1f} points, standard error {error:.1f} (of "
        f"{result['test_examples']:,} test examples on {pair['images']:,} "
        f"{'pairs of images' if settings['task'] == 'nlvr2' else 'images'}; {first} alone is right "
        f"in {pair['only_first']}, {second} alone in {pair['only_second']})."
    )
    if pair["difference"] == 0 and pair["only_first"] == pair["only_second"] == 0:
        verdict = f"Both give the same answers: {first} chose all modules, or nothing was learnt."
    elif pair["beyond_noise"]:
        verdict = (
            f"{ahead} is ahead of {behind} by {abs(size) / error:.1f} standard errors, more than "
            "the noise of this test set."
        )
    else:
        verdict = (
            f"That is {abs(size) / error:.1f} standard errors, within the noise of this test set: "
            "no winner."
        )
    return [
        f"Without an image: {number(result['text_only'])}. Untrained student: "
        f"{number(result['before'])}. Teacher: {number(result['teacher'])}.",
        counted + " " + verdict,
        "This is one seed of one task on small data. Five seeds of four tasks are in the README, "
        "\"Which modules to distil\".",
        "Seconds are of both at once, on a thread each, and count what else the machine did.",
    ]


def further(result: Mapping[str, Any], folder: Path) -> list[str]:
    """What to type next."""
    settings = result["settings"]
    teacher = shlex.quote(str(folder / "teacher"))
    return [
        f"python -m optima_fast.demo --task {settings['task']} --seed {settings['seed'] + 1}",
        f"python -m optima_fast.train --task {settings['task']} --teacher {teacher} "
        f"--method optima --seed {settings['seed']}",
        f"python -m optima_fast.report {shlex.quote(str(folder))}/*/",
    ]


def show_examples(examples: Sequence[Example], display: Display) -> None:
    """The canvases side by side, as many as fit, and a table of what was said of them."""
    tiles = [_tile(i, example) for i, example in enumerate(examples, 1)]
    line: list[list[str]] = []
    for tile in [*tiles, None]:
        if line and (tile is None or sum(len(t[0]) + 2 for t in (*line, tile)) > display.width):
            for parts in zip(*line, strict=True):
                display.note("  ".join(parts).rstrip())
            line = []
        if tile is not None:
            line.append(tile)
    rows = [
        [str(i), e.text, e.answer, *(_marked(said, e.answer) for said in e.said.values())]
        for i, e in enumerate(examples, 1)
    ]
    names = list(examples[0].said) if examples else []
    if rows:
        display.table("", rows, ["", "text", "right answer", *names])


def _marked(said: str, answer: str) -> str:
    return said if said == answer else f"{said} (wrong)"


def _tile(number: int, example: Example) -> list[str]:
    """A number, and below it the example's images in half blocks."""
    drawn = ["|".join(parts) for parts in zip(*map(drawing, example.images), strict=True)]
    return [f"{number}".ljust(len(drawn[0])), *drawn]


def drawing(levels: NDArray[np.uint8]) -> list[str]:
    """Half a character a pixel, where it is brighter than half of the brightest nearby."""
    cells = levels.reshape(2, len(levels) // 2, 2, -1)
    peak = np.maximum(cells.max((1, 3), keepdims=True), 2 * DARK)
    ink = (2 * cells.astype(int) > peak).reshape(levels.shape)
    return ["".join(HALVES[2 * a + b] for a, b in zip(*rows)) for rows in zip(ink[::2], ink[1::2])]


def show(result: Mapping[str, Any], page: Path, display: Display) -> None:
    """The table, its reading, and where the rest is."""
    header, *rows = table(result)
    for text in introduction(result):
        display.note(text)
    display.table("", rows, header)
    for text in reading(result):
        display.note(text)
    display.note(f"page: {page}")
    display.note("next:")
    for line in further(result, page.parent):
        display.note(f"  {line}")
