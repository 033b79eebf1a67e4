"""What is drawn: text that is text, colours of the page, medians, rounds, shares."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any
from xml.dom import minidom

import pytest

from optima_fast.pages import figures, plots, records
from optima_fast.pages.records import Group


def group(*runs: list[tuple[str, float | None]], arms: tuple[str, ...] = ("a", "b")) -> Group:
    """Runs of the arms and rewards of their rounds."""
    made = []
    for rounds in runs:
        lines: list[dict[str, Any]] = []
        for number, (arm, reward) in enumerate(rounds, 1):
            means = {} if reward is None else {"reward": reward, "means": [reward] * len(arms)}
            lines.append({"step": 2 * number, "round": number, "arm": arm, **means})
        pulls = {arm: sum(line["arm"] == arm for line in lines) for arm in arms}
        made.append(SimpleNamespace(lines=lines, summary={"arms": pulls}))
    return Group("optima", made)  # type: ignore[arg-type]


def drawn(svg: str) -> minidom.Element:
    return minidom.parseString(svg.replace("<svg", '<svg xmlns:xlink="x"', 1)).documentElement


def test_a_plot_is_text_in_the_colour_of_the_page_and_names_nothing_outside():
    evil = "<b>&$x_1$"
    svg = plots.lines(evil, {evil: ([1, 2], [1, 2]), "b": ([1, 2], [2, 1])}, x="steps", y=evil)
    said = ["".join(c.data for c in t.childNodes) for t in drawn(svg).getElementsByTagName("text")]
    assert said.count(evil) == 3  # title, y axis, legend
    assert {"steps", "b", "1.0"} <= set(said)
    assert not re.search(r"http|<style|<image|font-family|<metadata", svg)
    assert plots._INK not in svg
    assert "currentColor" in svg
    ids = re.findall(r' id="([^"]*)"', svg)
    assert len(ids) == len(set(ids)) > 0
    assert all(f"#{name}" in svg for name in ids)
    other = plots.lines("other", {evil: ([1, 2], [1, 2])}, x="steps", y=evil)
    assert not set(ids) & set(re.findall(r' id="([^"]*)"', other))
    again = plots.lines(evil, {evil: ([1, 2], [1, 2]), "b": ([1, 2], [2, 1])}, x="steps", y=evil)
    assert svg == again


@pytest.mark.parametrize(
    ("values", "logarithmic"), [([1, 10], True), ([1, 2], False), ([0, 10], False)]
)
def test_an_axis_is_logarithmic_where_that_shows_more(values, logarithmic):
    svg = plots.lines("t", {"a": ([1, 2], values)}, x="x", y="loss", log=True)
    assert ("loss (logarithmic)" in svg) == logarithmic


def test_long_lines_are_thinned_by_means():
    x, y = plots.thinned((list(range(1000)), [1.0, 3.0] * 500))
    assert len(x) == len(y) == 250
    assert (x[0], y[0]) == (1.5, 2.0)
    assert plots.thinned(([1, 2], [3, 4])) == ([1, 2], [3, 4])
    assert plots.running_mean((range(40), [0.0, 2.0] * 20))[1][:3] == [0.0, 1.0, 1.0]


def test_names_of_arms_are_in_two_lines_at_most():
    assert plots.short("image+text") == "image+text"
    assert plots.short("image+text+multimodal") == "image+text+\nmultimodal"
    assert plots.short("image[1-6]+image[7-12]+text[1-6]+text") == "image[1-6]+\nimage[7-12]+te.."
    assert plots.short("x" * 40) == "x" * 14 + ".."


def test_rounds_are_spans_and_shares_of_them():
    made = group([("a", 1), ("a", 1), ("b", 1), ("a", 1)], [("b", 1)] * 4)
    shown = {"a": "#000", "b": "#111"}
    assert figures._spans(made, "a", shown) == [[(0, 2), (3, 4)], []]
    assert figures._spans(made, "b", shown) == [[(2, 3)], [(0, 4)]]
    assert figures.frequencies(made) == {"a": 0.375, "b": 0.625}
    titles = re.findall(r'aria-label="optima: ([^"]*)"', "".join(figures.choices(made)))
    assert titles == ["arm of each round", "arm frequencies", "reward means", "reward"]


def test_without_rewards_the_arms_are_drawn_all_the_same():
    assert len(figures.choices(group([("a", None), ("b", None)]))) == 2
    assert figures.choices(group([])) == []


def test_many_arms_are_cut_to_those_pulled_most():
    arms = tuple(f"arm{i}" for i in range(30))
    rounds = [(arm, 0.5) for i, arm in enumerate(arms) for _ in range(i + 1)]
    raster, frequencies, *_ = figures.choices(group([*rounds], arms=arms))
    for svg in (raster, frequencies):
        assert figures.OTHERS in svg
        assert ">arm29<" in svg
        assert ">arm17<" not in svg
    total = len(rounds)
    rest = sum(range(1, 31 - figures.ROWS)) / total
    assert f">{rest:.0%}<" in frequencies


def test_a_median_is_over_the_seeds_that_recorded_the_point():
    made = group([("a", 1.0), ("a", 2.0)], [("a", 3.0)], [("a", 8.0)])
    assert records.medians(made, figures._earned) == ([1, 2], [3.0, 2.0])
