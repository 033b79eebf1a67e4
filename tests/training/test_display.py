"""The view of a run on a terminal, at several widths, and the plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from small_run import trainer

from optima_fast.training.display import WIDEST, Display, Stage

VALUES = {
    "loss": "3.142",
    "arms": {"image": 0.5, "text": 0.25, "image[1-3]+text": 0.15, "text[2]": 0.1, "multimodal": 0},
    "samples/s": "512",
}
MORE = {"hidden": "image 1.203  text 0.311  multimodal 0.882"}


def drawn(width: int, *given) -> list[str]:
    """The lines of a view."""
    console = Console(force_terminal=True, width=width, file=io.StringIO(), record=True)
    stage = Stage(console, "distilling", 1000, 0)
    console.print(stage.view(*given))
    return [line.rstrip() for line in console.export_text().splitlines()]


def length(lines: list[str], label: str) -> int:
    """Of the bar in the line with that label, both its parts."""
    (line,) = [line for line in lines if line.strip().startswith(f"{label} ")]
    return sum(line.count(letter) for letter in "\u2501\u2578\u257a")


@pytest.mark.parametrize("width", [60, 120])
def test_a_view_fits_and_says_all(width):
    lines = drawn(width, 340, VALUES, MORE)
    assert max(map(len, lines)) <= min(width, WIDEST)
    head, *rest = lines
    assert head.startswith("distilling \u2501")
    assert "340/1000  " in head
    assert head.endswith(" left")
    words = [" ".join(line.split()) for line in rest]
    assert "loss 3.142" in words
    assert "samples/s 512" in words
    assert "hidden image 1.203 text 0.311 multimodal 0.882" in words
    assert rest.index("arms") == 3
    assert [word.split()[::len(word.split()) - 1] for word in words[4:]] == [
        ["image", "50%"], ["text", "25%"], ["image[1-3]+text", "15%"], ["text[2]", "10%"],
    ]  # fmt: skip
    assert length(lines, "image") == length(lines, "text") > 20


def test_a_bar_is_as_long_as_its_share():
    console = Console(force_terminal=True, width=60, file=io.StringIO(), color_system="truecolor")
    console.print(Stage(console, "distilling", 10, 0).view(5, {"arms": {"a": 0.75, "b": 0.25}}, {}))
    bars = [x for x in console.file.getvalue().splitlines() if "%" in x]
    # a bar is drawn in two colours, the first as far as it goes
    a, b = (len(x.split("\x1b[")[1].partition("m")[2].strip()) for x in bars)
    assert a == pytest.approx(3 * b, abs=2)


def test_a_view_without_a_step_tells_no_time():
    (line,) = drawn(60, 0, {}, {})
    assert line.endswith("\u2501 0/1000")


def test_long_names_leave_room_for_bars():
    name = "+".join(f"image[{i}]" for i in range(1, 9))
    lines = drawn(60, 1, {"arms": {name: 1.0}}, {})
    assert "\u2026" in lines[-1]
    assert lines[-1].count("\u2501") > 20


def test_a_run_on_a_terminal_is_drawn_and_then_gone(tmp_path, monkeypatch, capsys):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    t = trainer(tmp_path, steps=8, round_steps=1, log_every=1, eval_every=2, kl_weight=0.5)
    t.display = Display()
    shown = []
    draw = Stage.view
    monkeypatch.setattr(Stage, "view", lambda self, *x: shown.append(x) or draw(self, *x))
    t.fit()
    out = capsys.readouterr().out
    assert "distilling" in out
    assert "\x1b[1A" in out  # it goes up, to draw over what it drew
    assert [step for step, *_ in shown] == list(range(9))
    step, values, more = shown[-1]
    line = next(x for x in t.run.metrics() if x["step"] == step and "loss" in x)
    assert values["loss"] == f"{line['loss']:.3f}"
    assert values["accuracy"] == f"{t.last_metric:.3f}"
    assert sum(values["arms"].values()) == pytest.approx(1.0)
    assert more["kl"] == f"{line['kl']:.3f}"
    assert more["hidden"] == "  ".join(f"{m} {v:.3f}" for m, v in line["hidden"].items())
    assert more.keys() == {"kl", "hidden", "attention", "prediction"}


def test_elsewhere_ten_lines_have_the_largest_shares(capsys):
    with Display().stage("distilling", 20) as stage:
        for step in range(1, 21):
            stage.update(step, VALUES, MORE)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    start = "distilling: step 2/20  loss 3.142  arms image 50%, text 25%  samples/s 512  "
    assert lines[0].startswith(start)
    assert lines[0].endswith(" s left")
