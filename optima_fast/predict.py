"""``python -m optima_fast.predict MODEL --image F --text "..."``: ask a run's student about images.

MODEL is a run folder, or a folder that optima_fast.export wrote. Each answer or caption is printed
with its probability. Give as many texts as images, and they are paired in order; or give one text
for all images, or one image (for NLVR2 two: left, right) for all texts.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optima_fast.entry import Parser, guarded
from optima_fast.errors import UserError

if TYPE_CHECKING:
    from optima_fast.training.asking import Question

BATCH = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m optima_fast.predict", description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument("model", metavar="MODEL", help="a run folder, or an exported one")
    parser.add_argument(
        "--image", metavar="FILE", action="append", default=[], help="may be repeated"
    )
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        help="a question or statement; may be repeated; leave it out for captions",
    )
    parser.add_argument(
        "--list",
        metavar="FILE.jsonl",
        type=Path,
        help="instead of --image and --text, a file with one question a line: "
        '{"image": "a.png", "text": "..."}, or two images as ["left.png", "right.png"]; paths '
        "start at the file's folder; --json prints other keys back",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    arguments = parser.parse_args(argv)
    if bool(arguments.image) == (arguments.list is not None):
        parser.error("give either --image FILE, repeatable, or --list FILE.jsonl")
    if arguments.list is not None and arguments.text:
        parser.error("--text goes with --image: the texts of --list are in its lines")

    from optima_fast.models.pretrained import CONFIG_FILE
    from optima_fast.training import experiment
    from optima_fast.training.asking import Student
    from optima_fast.training.run import Run

    run = Run(arguments.model)
    if not run.exists() and (run.folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{run.folder} is a model of open_clip, without a task's head: give the run folder, "
            "or one that was exported --to safetensors, torch-export or onnx"
        )
    config = dataclasses.replace(run.config(), device=arguments.device)
    listed = {} if arguments.list is None else _lines(arguments.list)
    student = Student(run, experiment.prepare(config))
    entries = list(listed.values()) or _paired(arguments.image, arguments.text, student.images)
    folder = arguments.list.parent if listed else Path()
    questions = [_question(entry, folder) for entry in entries]
    for asked, place in zip(questions, listed or [""] * len(questions), strict=True):
        try:
            student.check(asked)
        except UserError as error:
            raise UserError(f"{place}: {error}" if place else str(error)) from None
    for remark in dict.fromkeys(r for asked in questions for r in student.remarks(asked.text)):
        print(f"note: {remark}", file=sys.stderr)
    for start in range(0, len(questions), BATCH):
        answers = student.answer(questions[start : start + BATCH])
        for entry, said in zip(entries[start : start + BATCH], answers, strict=True):
            if arguments.json:
                told = {**entry, "answer": said.text, "probability": said.probability}
                print(json.dumps(told, ensure_ascii=False), flush=True)
            else:
                shown = " ".join([*_images(entry), entry.get("text") or ""]).rstrip()
                print(f"{shown}: {said.text} ({said.probability:.3g})", flush=True)
    return 0


def _paired(images: Sequence[str], texts: Sequence[str], each: int) -> list[dict[str, Any]]:
    """What is asked, from flags: images and texts in order, or one text or image with all."""
    if len(images) % each:
        raise UserError(
            f"this student takes images in pairs, left and right, got {len(images)} --image"
        )
    shown = [list(images[i : i + each]) for i in range(0, len(images), each)]
    said = list(texts) or [""]
    count = max(len(shown), len(said))
    if {len(shown), len(said)} - {1, count}:
        what = "images" if each == 1 else "pairs of images"
        raise UserError(
            f"{len(shown)} {what} and {len(said)} texts do not go together: give as many of both, "
            "or one of either"
        )
    shown, said = shown * (count // len(shown)), said * (count // len(said))
    return [
        {"image": pair if each > 1 else pair[0]} | ({"text": text} if text else {})
        for pair, text in zip(shown, said, strict=True)
    ]


def _lines(path: Path) -> dict[str, dict[str, Any]]:
    """The objects of a list, each with images and at most one text, by where they stand."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --list {path}: {error}") from error
    entries = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place} is not JSON: {error}") from error
        parts = (entry.get("image"), entry.get("text", "")) if isinstance(entry, dict) else (None,)
        names = parts[0] if isinstance(parts[0], list) else [parts[0]]
        if not names or not all(isinstance(part, str) for part in (*names, *parts[1:])):
            raise UserError(
                f'{place} must be like {{"image": "a.png", "text": "..."}}, got {line.strip()[:80]}'
            )
        entries[place] = entry
    if not entries:
        raise UserError(f"--list {path} has no line")
    return entries


def _images(entry: Mapping[str, Any]) -> list[str]:
    given = entry["image"]
    return [given] if isinstance(given, str) else given


def _question(entry: Mapping[str, Any], folder: Path) -> Question:
    from optima_fast.training.asking import Question

    return Question(tuple(folder / name for name in _images(entry)), entry.get("text", ""))


if __name__ == "__main__":
    sys.exit(main())
