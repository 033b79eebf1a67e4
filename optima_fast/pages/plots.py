"""Plots as SVG inside a page: text is text, and its colour is the page's, light or dark."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

# each is told from white and from a dark page, and from its neighbours by the colour-blind
COLOURS = (
    *("#3b82f6", "#e07b00", "#2a9d5a", "#b065d8", "#c2a000", "#12a0a8", "#e0569b", "#a0522d"),
    *("#7f8fa6", "#6b8e23", "#ff6f61", "#5c6bc0"),
)
WIDTH, HEIGHT = 4.3, 2.5  # inches of a plot without its legend
FAR = 5  # times the smallest value, from where on a logarithmic axis shows more
POINTS = 300  # of a line; more are put together
DOTS = 24  # a line of so few points has a dot at each
SMOOTH = 20  # a running mean is over the rounds divided by this

_INK = "#010203"  # stands for the colour of the page's text until the SVG is written
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold a dollar
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
    **dict.fromkeys(
        (
            *("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"),
            *("xtick.color", "ytick.color", "grid.color"),
        ),
        _INK,
    ),
}

Line = tuple[Sequence[float], Sequence[float]]  # x and y
Span = tuple[float, float]


def lines(
    title: str,
    curves: Mapping[str, Line],
    *,
    x: str,
    y: str,
    faint: Mapping[str, Sequence[Line]] | None = None,
    log: bool = False,
    colours: Mapping[str, str] | None = None,
) -> str:
    """Curves over one axis.

    Args:
        title: what is above the plot.
        curves: by name.
        x, y: what the axes are of, with the unit.
        faint: thin lines in the colour of the curve of the same name.
        log: a logarithmic y axis, where all values are above 0 and far apart.
        colours: of the curves; one after the other by default.
    """
    chosen = colours or colours_of(curves)
    shown = {name: thinned(curve) for name, curve in curves.items()}

    def paint(axes: Axes) -> None:
        for name, each in (faint or {}).items():
            for curve in each:
                axes.plot(*thinned(curve), color=chosen[name], linewidth=0.6, alpha=0.4)
        for name, curve in shown.items():
            dots = "o" if len(curve[0]) <= DOTS else None
            axes.plot(*curve, color=chosen[name], label=told(name), marker=dots, markersize=3)
        if logarithmic:
            _logarithmic(axes, max(values) / min(values))

    def told(name: str) -> str | None:
        return name if len(shown) > 1 else None

    values = [value for _, each in shown.values() for value in each]
    logarithmic = log and min(values) > 0 and max(values) > FAR * min(values)
    return picture(title, paint, x=x, y=f"{y} (logarithmic)" if logarithmic else y)


def bars(title: str, values: Mapping[str, float], *, x: str, colours: Mapping[str, str]) -> str:
    """A bar a name, from the top down, with its value at the end."""

    def paint(axes: Axes) -> None:
        drawn = axes.barh(
            range(len(values)), list(values.values()), color=[colours[name] for name in values]
        )
        axes.bar_label(drawn, [f"{value:.0%}" for value in values.values()], padding=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.margins(x=0.14)
        _names(axes, list(values))

    return picture(title, paint, x=x, y="", height=_tall(len(values)))


def rows(
    title: str,
    spans: Mapping[str, Sequence[Sequence[Span]]],
    *,
    x: str,
    colours: Mapping[str, str],
) -> str:
    """Spans of an axis, a row a name and in it a line a series, as one path a name."""

    def paint(axes: Axes) -> None:
        for i, (name, series) in enumerate(spans.items()):
            high = 0.84 / max(1, len(series))
            boxes = [
                (start, end, i - 0.42 + j * high, high)
                for j, spans_ in enumerate(series)
                for start, end in spans_
            ]
            if boxes:
                patch = PathPatch(_boxes(boxes), facecolor=colours[name], linewidth=0)
                axes.add_patch(patch)
        ends = [end for series in spans.values() for each in series for _, end in each]
        axes.set_xlim(0, max(ends, default=1.0))
        axes.grid(axis="y", visible=False)
        _names(axes, list(spans))

    return picture(title, paint, x=x, y="", height=_tall(len(spans)))


def dots(
    title: str,
    values: Mapping[str, Sequence[float]],
    *,
    x: str,
    level: tuple[str, float] | None,
    colours: Mapping[str, str],
) -> str:
    """A row a name with a dot a value and a line at their median, and a level across."""

    def paint(axes: Axes) -> None:
        for i, (name, each) in enumerate(values.items()):
            middle = statistics.median(each)
            axes.plot(list(each), [i] * len(each), "o", color=colours[name], markersize=5)
            axes.plot([middle] * 2, [i - 0.3, i + 0.3], color=colours[name], linewidth=2)
        if level is not None:
            axes.axvline(level[1], color=_INK, alpha=0.7, linewidth=1, ls="--", label=level[0])
        _names(axes, list(values))

    return picture(title, paint, x=x, y="", height=_tall(len(values)))


def picture(
    title: str,
    paint: Callable[[Axes], None],
    *,
    x: str,
    y: str,
    height: float = HEIGHT,
) -> str:
    """An SVG element of what ``paint`` draws, and a legend of its labels below it."""
    style: Any = {**_STYLE, "svg.hashsalt": title}
    with mpl.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        paint(axes)
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            columns = max(1, min(len(labels), 56 // (6 + max(map(len, labels)))))
            figure.set_figheight(height + 0.19 * math.ceil(len(labels) / columns))
            figure.legend(handles, labels, loc="outside lower left", ncols=columns)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _inline(file.getvalue(), title)


def colours_of(names: Mapping[str, Any] | Sequence[str]) -> dict[str, str]:
    """A colour a name; after the last colour they begin again."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def thinned(curve: Line) -> Line:
    """The curve in at most ``POINTS`` points, each the mean of as many neighbours."""
    size = -(-len(curve[0]) // POINTS)
    if size <= 1:
        return curve
    parts = [slice(i, i + size) for i in range(0, len(curve[0]), size)]
    x, y = ([math.fsum(v[part]) / len(v[part]) for part in parts] for v in curve)
    return x, y


def running_mean(curve: Line) -> Line:
    """The curve's mean over a part of it that ends at each point."""
    x, y = curve
    size = max(1, len(y) // SMOOTH)
    parts = [y[max(0, i + 1 - size) : i + 1] for i in range(len(y))]
    return x, [math.fsum(part) / len(part) for part in parts]


def _tall(count: int) -> float:
    return 0.75 + 0.29 * max(count, 3)


def _names(axes: Axes, names: Sequence[str]) -> None:
    """Rows from the top down, with their names."""
    axes.set_yticks(range(len(names)), [short(name) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def short(name: str) -> str:
    """A name in at most two lines of 16 letters, broken after a plus or a space."""
    lines_ = [""]
    for part in re.findall(r"[^+ ,]+[+ ,]*|[+ ,]+", name):
        if lines_[-1] and len(lines_[-1]) + len(part.rstrip()) > 16:
            lines_.append("")
        lines_[-1] += part
    cut = [line.rstrip() for line in lines_]
    cut = [*cut[:1], "".join(lines_[1:]).rstrip()] if len(cut) > 2 else cut
    return "\n".join(line if len(line) <= 16 else line[:14] + ".." for line in cut)


def _logarithmic(axes: Axes, ratio: float) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 30 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _boxes(boxes: Sequence[tuple[float, float, float, float]]) -> Path:
    """Boxes of (left, right, top, height) as one path."""
    points, codes = [], []
    for left, right, y, high in boxes:
        points += [(left, y), (right, y), (right, y + high), (left, y + high), (left, y)]
        codes += [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    return Path(points, codes)


def _inline(svg: str, title: str) -> str:
    """The element without what a page does not need: prologue, name spaces, ids nobody names."""
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;\"]*;| transform=\"rotate\(-0 [^\"]*\"", "", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    return f'<svg {box[0]} role="img" aria-label="{escape(title)}">' + svg[svg.index(">") + 1 :]
