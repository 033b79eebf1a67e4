"""The frame of a page: style, tables, pictures; no script and no outside file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LARGEST = 192  # pixels of an embedded image's longer side
PIXELS = 64  # up to so many, each pixel is drawn as a square

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--quiet:#5a636e;--page:#fff;--card:#f5f6f8;
--line:#d5d9de;--wrong:#b3261e;--right:#1a7f37}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--quiet:#9aa4af;--page:#14171a;--card:#1e2227;
--line:#3a4048;--wrong:#ff8a80;--right:#6cc784}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:1240px;
margin:0 auto;padding:1em 16px 3em;overflow-wrap:break-word}
h1{font-size:1.6em;line-height:1.25;margin:.4em 0}h2{font-size:1.25em;margin:2em 0 .4em}
h3{font-size:1.05em;margin:1.4em 0 .3em}p{max-width:75ch;margin:.5em 0}
.quiet,figcaption{color:var(--quiet)}
code{background:var(--card);padding:.1em .35em;border-radius:3px;overflow-wrap:anywhere}
pre{background:var(--card);padding:.6em .8em;border-radius:6px;white-space:pre-wrap;margin:.5em 0;
overflow-wrap:anywhere}pre code{padding:0}
pre span{display:inline-block;max-width:100%}
.scroll{overflow-x:auto;margin:.6em 0}table{border-collapse:collapse;font-size:.94em}
th,td{text-align:left;padding:.25em 1.1em .25em 0;vertical-align:top;
border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--quiet)}tr:first-child:has(th)~tr td{white-space:nowrap}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:10px;margin:1em 0}
.tile{background:var(--card);border-radius:8px;padding:.6em .9em}
.tile b{display:block;font-size:1.5em;line-height:1.3}.tile:first-child b{font-size:1.9em}
.plots{display:grid;gap:18px 24px;
grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr))}
figure{margin:0;min-width:0}figure svg{width:100%;height:auto;display:block}
svg text{font-family:system-ui,sans-serif}
figcaption{font-size:.87em;line-height:1.4;margin:.2em 0}
.examples{display:grid;gap:18px 16px;grid-template-columns:repeat(auto-fill,minmax(165px,1fr))}
.examples figure.two{grid-column:span 2}.examples .two img{width:48%}
.examples figcaption{color:var(--ink)}
.examples img{width:166px;max-width:100%;height:auto;border:1px solid var(--line);margin-right:2px}
.pixels{image-rendering:pixelated}.wrong{color:var(--wrong)}.right{color:var(--right)}
summary{cursor:pointer;margin:.8em 0}a{color:inherit}
"""


def document(title: str, parts: Sequence[str]) -> str:
    """A page of HTML parts, which browsers fetch nothing for."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    name = f' class="{kind}"' if kind else ""
    return f"<p{name}>{escape(text)}</p>"


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """A table of plain text, which scrolls by itself where it is wider than the page."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<div class="scroll"><table>{f"<tr>{head}</tr>" if head else ""}{body}</table></div>'


def commands(lines: Sequence[str]) -> str:
    """What to type; a line is broken between words, and not at the hyphens of a flag."""
    words = (" ".join(f"<span>{escape(w)}</span>" for w in line.split(" ")) for line in lines)
    return f"<pre><code>{chr(10).join(words)}</code></pre>"


def details(summary: str, parts: Sequence[str]) -> str:
    """Parts that are folded away behind a line of plain text."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>"


def plots(figures: Sequence[str]) -> str:
    """Figures side by side, as many as fit."""
    if not figures:
        return paragraph("Too few logged steps to draw.")
    return f'<div class="plots">{"".join(figures)}</div>'


def image(levels: NDArray[np.uint8], description: str) -> str:
    """An embedded PNG of levels ``[H, W]`` or ``[H, W, 3]``."""
    picture, file = Image.fromarray(levels), io.BytesIO()
    kind = ' class="pixels"' if max(picture.size) <= PIXELS else ""
    picture.thumbnail((LARGEST, LARGEST))
    picture.save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img{kind} alt="{escape(description)}" src="data:image/png;base64,{data}">'
