"""The page in a browser: no error, nothing fetched, no scrolling sideways on a telephone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from optima_fast import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
# the page in a frame as wide as a screen, and what can be seen of it from outside
FRAME = """<!doctype html><body><iframe srcdoc="{page}" style="width:{width}px;height:900px">
</iframe><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement
  const outside = [...page.querySelectorAll("svg text")].filter(text => {{
    const box = text.getBoundingClientRect(), all = text.closest("svg").getBoundingClientRect()
    return box.left < all.left - 1 || box.right > all.right + 1
  }})
  document.title = JSON.stringify({{
    wide: root.scrollWidth - root.clientWidth,
    images: [...page.images].filter(image => image.naturalWidth > 0).length,
    plots: page.querySelectorAll("figure > svg").length,
    outside: outside.map(text => text.textContent),
    colours: ["color", "backgroundColor"].map(name => getComputedStyle(page.body)[name]),
  }})
}}
</script>"""


@pytest.fixture(scope="module")
def page(digits_run, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert report.main([str(digits_run.folder), f"--out={path}", "--examples=1"]) == 0
    return path


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium to look at the page with")
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False)])
def test_a_browser_shows_the_page(page, tmp_path, width, dark):
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=html.escape(page.read_text()), width=width))
    seen, log = looked_at(frame, width, tmp_path, dark)
    assert "CONSOLE" not in log
    assert seen["wide"] == 0
    assert seen["images"] == page.read_text().count("data:image/png") > 0
    assert seen["plots"] == 11
    assert seen["outside"] == []
    ink, ground = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in seen["colours"])
    assert (ink > ground) == dark


def looked_at(frame: Path, width: int, folder: Path, dark: bool) -> tuple[dict[str, object], str]:
    """What the frame's script says, and the browser's log."""
    assert BROWSER is not None
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"),
        f"--window-size={max(width, 500)},900",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    done = subprocess.run(
        [BROWSER, *flags, frame.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr
    return json.loads(html.unescape(title[1])), done.stderr
