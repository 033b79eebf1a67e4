"""A demo from settings to its page, or what is there of it."""

from __future__ import annotations

import dataclasses
import os
import sys
import webbrowser
from pathlib import Path
from typing import Any

from optima_fast.demo import page, pair, result, words
from optima_fast.demo.pair import Settings
from optima_fast.errors import UserError
from optima_fast.training import Display, checkpoints
from optima_fast.training.config import flag

FORMAT = 1  # of demo.json


def default_folder(settings: Settings) -> Path:
    """``runs/demo-TASK-seedSEED``, and what else differs from the usual."""
    name = f"demo-{settings.task}-seed{settings.seed}"
    for label, number in (("steps", settings.steps), ("teacher", settings.teacher_steps)):
        name += "" if number is None else f"-{label}{number}"
    return Path("runs") / name


def run(settings: Settings, folder: Path, display: Display) -> Path:
    """Do, go on with, or show again the demo in ``folder``; its page.

    ``demo.json`` holds the settings from the start and the result in the end.

    Raises:
        UserError: a mistake in settings or files, or the folder holds something else.
        Interrupted: Ctrl-C; the demo can be gone on with.
    """
    path, written = folder / "demo.json", folder / "demo.html"
    known = _known(path, folder, settings)
    if known.get("result") and written.is_file():
        display.note(f"{folder} is finished already:")
        words.show(known["result"], written, display)
        return written
    pair.check(settings, folder)
    checkpoints.write_json(path, {"format": FORMAT, "settings": dataclasses.asdict(settings)})
    pair.train(settings, folder, display)
    measured, examples = result.measure(folder)
    measured["settings"] = dataclasses.asdict(settings)
    page.write(folder, measured, examples)
    words.show_examples(examples, display)
    words.show(measured, written, display)
    done = {"format": FORMAT, "settings": measured["settings"], "result": measured}
    checkpoints.write_json(path, done)
    return written


def _known(path: Path, folder: Path, settings: Settings) -> dict[str, Any]:
    """What ``demo.json`` says, nothing where there is none.

    Raises:
        UserError: the folder is of another demo, or of something else.
    """
    if not path.is_file():
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise UserError(f"{folder} is there and holds no demo: choose another --out")
        return {}
    known: dict[str, Any] = checkpoints.read_json(path)
    if not isinstance(known, dict) or known.get("format") != FORMAT:
        raise UserError(f"{path} is none of this version's: choose another --out")
    for name, value in dataclasses.asdict(settings).items():
        before = known["settings"].get(name)
        if before != value:
            raise UserError(
                f"{folder} holds a demo of other settings: {flag(name)} was {_told(before)} there "
                f"and is {_told(value)} now; take the same value, or another --out"
            )
    return known


def _told(value: object) -> object:
    return "the default" if value is None else value


def open_page(path: Path, display: Display) -> None:
    """Show the page in a browser, if a person sits in front of a screen."""
    screen = sys.platform in ("win32", "darwin") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    if screen and sys.stdout.isatty() and webbrowser.open(path.resolve().as_uri()):
        return
    display.note(f"--open: no browser to be had here; open {path} yourself")
