"""The demo as one HTML page without scripts or outside files."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from optima_fast.demo import words
from optima_fast.demo.pair import METHODS
from optima_fast.demo.result import Example
from optima_fast.training import Run, checkpoints, page

SCALE = 6  # of a canvas's pixels

_STYLE = (
    page.STYLE
    + """th{text-align:left;padding:.15em 1em .15em 0}figure{margin:0 10px 1.5em 0}
.row{display:flex;flex-wrap:wrap}.wrong{color:#b00}img{margin-right:6px;border:1px solid #ddd}
code{background:#f3f3f3;padding:.1em .3em}"""
)


def write(folder: Path, result: Mapping[str, Any], examples: Sequence[Example]) -> Path:
    """Write ``demo.html`` into the demo's folder, and each student's own page; its path."""
    task = result["settings"]["task"]
    runs = {method: Run(folder / method) for method in METHODS}
    header, *rows = words.table(result)
    parts = [
        f"<h1>{escape(task)}: which modules to distil</h1>",
        f"<p>{escape(words.introduction(result))}</p>",
        _table(header, rows),
        *(f"<p>{escape(text)}</p>" for text in words.reading(result)),
        "<h2>Four test examples</h2>",
        f'<div class="row">{"".join(map(_figure, examples))}</div>',
        f"<h2>What {METHODS[0]} chose</h2>",
        page.choices(runs[METHODS[0]].metrics(), result["students"][METHODS[0]]["arms"]),
        "<h2>Go on</h2>",
        *(f"<p><code>{escape(line)}</code></p>" for line in words.further(result, folder)),
        "<p>"
        + ", ".join(f'<a href="{m}/{page.write(run).name}">{m}</a>' for m, run in runs.items())
        + ": all settings, losses and rounds of each run.</p>",
    ]
    path = folder / "demo.html"
    checkpoints.write_text(path, page.document(f"optima_fast: {task}", _STYLE, parts))
    return path


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table>"


def _figure(example: Example) -> str:
    images = "".join(map(_image, example.images))
    lines = [f"&ldquo;{escape(example.text)}&rdquo;", f"answer: <b>{escape(example.answer)}</b>"]
    for name, said in example.said.items():
        shown = escape(said)
        if said != example.answer:
            shown = f'<span class="wrong">{shown} (wrong)</span>'
        lines.append(f"{escape(name)}: {shown}")
    width = (24 * SCALE + 8) * len(example.images) + 50
    return (
        f'<figure style="width:{width}px">{images}'
        f"<figcaption>{'<br>'.join(lines)}</figcaption></figure>"
    )


def _image(levels: NDArray[np.uint8]) -> str:
    image, file = Image.fromarray(levels), io.BytesIO()
    height, width = levels.shape
    image.resize((SCALE * width, SCALE * height), Image.Resampling.NEAREST).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="canvas of digits" src="data:image/png;base64,{data}">'
