"""Pictures for reports: the panels of report.html, and rows of images.

Each panel has a function that draws on given axes; ``figure_of`` makes the figure. All can be read in black and white:
a model's ``place`` sets its colour, line style and marker, or for bars its hatch.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from utils.redaction import escaped

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

LINES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "v"), ("-", "D"), ("--", "x")]
# Okabe and Ito's colours, which suit any colour vision, without the yellow, which is hard to see on white.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#AA4A84", "#444444", "#E69F00", "#56B4E9"]
HATCHES = ["", "////", "\\\\\\\\", "xxxx", "----", "||||"]  # lines only: dots add a quarter of a megabyte
PANEL_SIZE = (3.9, 2.75)  # inches: on a phone the letters are still 11 px

# Names of models and classes are plain text, never mathematics. Text stays text, drawn in the page's font.
STYLE: dict[RcKeyType, Any] = {
    "text.parse_math": False,
    "text.usetex": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": "#777777",
    "ytick.color": "#777777",
    "xtick.labelcolor": "#333333",
    "ytick.labelcolor": "#333333",
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.7,
}

MOST_LETTERS = 100  # per line of text in a picture; a longer line would leave no room for the picture
LABEL_LETTERS = 24  # per line of the label beside a row of pictures
Point = tuple[float, float, float | None, float | None]  # x, value, and the ends of its interval, if any


@matplotlib.rc_context(STYLE)
def figure_of(panels: Mapping[str, Callable[[Axes], None]], title: str = "") -> Figure:
    """Panels {title: draw function} in a row. With an overall ``title``, also draws the panels' titles and legends."""
    figure = Figure(figsize=(PANEL_SIZE[0] * len(panels), PANEL_SIZE[1] + 2 * bool(title)), layout="constrained")
    for axis, (name, draw) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        draw(axis)
        if title:
            axis.set_title(name)
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    figure.suptitle(title)
    return figure


def save_figure(figure: Figure, file: Any, **options: Any) -> None:
    """``figure.savefig`` for any text: escapes control characters and cuts long lines."""
    for text in figure.findobj(Text):
        text.set_text(drawable(text.get_text()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # it draws a box; the browser has its own fonts
        figure.savefig(file, **options)


def drawable(text: str) -> str:
    """``text`` without control characters, each line cut to ``MOST_LETTERS``."""
    lines = (escaped(line) for line in text.split("\n"))
    return "\n".join(line if len(line) <= MOST_LETTERS else f"{line[: MOST_LETTERS - 1]}…" for line in lines)


@matplotlib.rc_context({"text.parse_math": False, "text.usetex": False})
def draw_grid(path: Path, rows: Sequence[tuple[str, Sequence[tuple[Tensor, str]]]], title: str = "") -> None:
    """Rows of pictures: [(label of the row, [(uint8 (3, H, W), caption), ...]), ...]. Pixels are shown as they are."""
    columns = max(len(pictures) for _, pictures in rows)
    figure = Figure(figsize=(1.35 * columns + 1.6, 1.6 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (label, pictures), line in zip(rows, axes):
        for axis in line:
            axis.set_axis_off()
        for axis, (image, caption) in zip(line, pictures):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            if len(caption) <= LABEL_LETTERS:
                axis.set_title(caption, fontsize=8, pad=3, loc="left")
            else:  # long, such as a query: may overlap its neighbours; a title would push them away
                above = axis.text(0, 1.025, caption, transform=axis.transAxes, fontsize=8)
                above.set_in_layout(False)
        # Wrapped here: matplotlib's wrapping reads dollars as mathematics even if told not to.
        label = "\n".join(part for of_label in label.split("\n") for part in textwrap.wrap(of_label, LABEL_LETTERS))
        line[0].text(-0.08, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    # A picture is about 1.25 inches wide. With fewer dots than pixels, thin letters would break up.
    widest = max(image.shape[-1] for _, pictures in rows for image, _ in pictures)
    save_figure(figure, path, dpi=max(120, round(widest / 1.2)))


def line_style(place: int) -> dict[str, Any]:
    """Colour, line and marker of the model in this place: 42 different combinations."""
    line, marker = LINES[place % len(LINES)]
    return {"color": COLORS[place % len(COLORS)], "linestyle": line, "marker": marker}


def bar_style(place: int) -> dict[str, Any]:
    """Colour and hatch of the model in this place."""
    color, hatch = COLORS[place % len(COLORS)], HATCHES[place % len(HATCHES)]
    return {"facecolor": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}


@matplotlib.rc_context(STYLE)
def key_figure(place: int, bar: bool = False) -> Figure:
    """The sample of a model's line (or bar) in a legend."""
    figure = Figure(figsize=(0.5, 0.17))
    if bar:
        figure.add_artist(Rectangle((0.2, 0), 0.6, 1, transform=figure.transFigure, **bar_style(place)))
    else:
        figure.add_artist(Line2D([0.03, 0.5, 0.97], [0.5] * 3, markevery=[1], **line_style(place)))
    return figure


def accuracy_curves(axis: Axes, curves: Mapping[int, Sequence[Point]], xlabel: str) -> None:
    """Accuracies (fractions) over a strength, with bands for the intervals: {place of the model: its points}."""
    axis.set(xlabel=xlabel, ylabel="accuracy, %")
    for place, points in curves.items():
        xs, values, lows, highs = zip(*sorted(points))
        style = line_style(place)
        axis.plot(xs, _percent(values), **style, clip_on=False, zorder=3)
        if None not in lows:
            axis.fill_between(xs, _percent(lows), _percent(highs), color=style["color"], alpha=0.14, linewidth=0)
    strengths = sorted({point[0] for points in curves.values() for point in points})
    # Ticks at the measured strengths, unless they would overlap.
    apart = (strengths[-1] - strengths[0]) / 14
    ticks = [x for x, before in zip(strengths, [-np.inf, *strengths]) if x - before >= apart]
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.yaxis.set_major_locator(_ticks())
    axis.set_ylim(0, _top(value for points in curves.values() for point in points for value in point[1:]))


def _ticks() -> MaxNLocator:
    return MaxNLocator(6, steps=[1, 2, 5, 10])


def _top(fractions: Iterable[float | None]) -> float:
    """The upper end of an axis in %, lower for low accuracies, so that curves do not lie at the bottom."""
    highest = 100 * max(value for value in fractions if value is not None)
    return next(top for top in (10, 20, 40, 60, 80, 100, highest) if highest <= top)


def clean_robust_front(axis: Axes, points: Mapping[int, tuple[str, Point, Point]], ylabel: str) -> None:
    """Models as points, {place: (label, clean, robust)}, and a step line along the models that no other beats in both.

    Uses only value and interval of the two ``Point``.
    """
    axis.set(xlabel="clean accuracy, %", ylabel=ylabel)
    for place, (_, clean, robust) in points.items():
        (x, *across), (y, *along), style = _percent(clean[1:]), _percent(robust[1:]), line_style(place)
        cross = {"color": style["color"], "linewidth": 0.8, "alpha": 0.55}
        axis.plot(across, [y, y], **cross)
        axis.plot([x, x], along, **cross)
        axis.plot(x, y, **style | {"linestyle": "none", "markersize": 6, "zorder": 3})
    axis.margins(0.18)
    axis.autoscale_view()
    for which, (low, high) in (("x", axis.get_xlim()), ("y", axis.get_ylim())):
        low = max(low, -0.06 * (high - low))
        ticks = [tick for tick in _ticks().tick_values(low, high) if max(low, 0) <= tick <= min(high, 100)]
        axis.set(**{f"{which}ticks": ticks, f"{which}lim": (low, high)})
    front = pareto_front([(clean[1], robust[1]) for _, clean, robust in points.values()])
    xs, ys = _percent([x for x, _ in front]), _percent([y for _, y in front])
    left, low = axis.get_xlim()[0], axis.get_ylim()[0]
    steps = [left, *xs, xs[-1]], [ys[0], *ys, low]
    axis.plot(*steps, drawstyle="steps-pre", color="#777777", linewidth=1.1, zorder=1)
    _label_points(axis, [(label, 100 * clean[1], 100 * robust[1]) for label, clean, robust in points.values()])


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point equals or exceeds in both coordinates, sorted by the first."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def severity_bars(axis: Axes, bars: Mapping[int, Mapping[float, float]]) -> None:
    """Bars of mean accuracy (a fraction) by severity and model: {place: {severity: value}}; severity 0 is clean."""
    axis.set(xlabel="severity", ylabel="accuracy, %")
    severities = sorted({severity for values in bars.values() for severity in values})
    width = 0.8 / len(bars)
    for n, (place, values) in enumerate(bars.items()):
        xs = [severities.index(severity) + (n - (len(bars) - 1) / 2) * width for severity in values]
        axis.bar(xs, _percent(values.values()), width, **bar_style(place))
    axis.set_xticks(range(len(severities)), [f"{severity}" if severity else "clean" for severity in severities])
    axis.yaxis.set_major_locator(_ticks())
    axis.set_ylim(0, _top(value for values in bars.values() for value in values.values()))
    axis.grid(False, axis="x")


def distributions(axis: Axes, values: Mapping[int, Sequence[float]], xlabel: str) -> None:
    """The distribution of a figure over the images, by model: outlines of histograms with common bins."""
    axis.set(xlabel=xlabel, ylabel="share of images, %")
    every = np.concatenate([np.asarray(of_model, dtype=float) for of_model in values.values()])
    low, high = float(every.min()), float(every.max())
    edges = np.linspace(low, high if high > low else low + 1, 31)
    for place, of_model in values.items():
        counts, _ = np.histogram(of_model, edges)
        shares, style = 100 * counts / len(of_model), line_style(place)
        style.pop("marker")
        axis.stairs(shares, edges, fill=True, color=style["color"], alpha=0.12)
        axis.stairs(shares, edges, linewidth=1.4, **style)
        top = int(shares.argmax())
        axis.plot((edges[top] + edges[top + 1]) / 2, shares[top], **line_style(place) | {"linestyle": "none"})
    axis.set_ylim(bottom=0)


def training_curves(axis: Axes, curves: Mapping[int, Sequence[tuple[float, float]]], ylabel: str, share: bool) -> None:
    """Logged values over the steps of runs: {place: [(step, value), ...]}; a ``share`` is drawn in % from 0 to 100."""
    axis.set(xlabel="step", ylabel=ylabel + (", %" if share else ""))
    for place, points in curves.items():
        steps, values = zip(*points)
        marks = max(1, len(points) // 8)
        axis.plot(steps, _percent(values) if share else values, **line_style(place), markevery=marks, clip_on=not share)
    if share:
        axis.set_ylim(0, 100)
    else:
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def t_sweep(
    axis: Axes,
    curves: Mapping[int, Mapping[float, float]],
    names: Mapping[int, str],
    ylabel: str,
    neutral: float | None,
) -> None:
    """Curves over the strength of a head, {place of the curve: {t: value}}, with marks at 0, 1 and t* if known."""
    axis.set(xlabel="t, strength of the head", ylabel=ylabel)
    for place, points in curves.items():
        ts, values = zip(*sorted(points.items()))
        marks: dict[str, Any] = {"markevery": max(1, len(ts) // 12), "markersize": 3.5}
        axis.plot(ts, values, label=names[place], **line_style(place), **marks)
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom, top + 0.15 * (top - bottom))
    axis.set_yticks([tick for tick in MaxNLocator(6).tick_values(bottom, top) if bottom <= tick <= top])
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
    star = {} if neutral is None else {neutral: f"t* = {neutral:g}"}
    for t, mark in ({0.0: "original", 1.0: "trained"} | star).items():
        own = t not in (0, 1)
        axis.axvline(t, color="#888888", linewidth=0.8, linestyle="-" if own else ":", zorder=1)
        # t* is often close to 0: write its name lower.
        below: dict[str, Any] = {"xytext": (2, -11 if own else -1), "textcoords": "offset points", "va": "top"}
        below |= {"fontsize": 7, "color": "#555555", "bbox": box}
        axis.annotate(mark, (t, 1), xycoords=("data", "axes fraction"), **below)


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """A figure as an <svg> element, for a page with many; ``title`` describes it (without one it is decoration).

    Its ids begin with ``name``; equal figures give equal text. Styles, metadata and namespaces are left out, because
    they would act on the whole page or refer to outside, and so are unused ids.
    """
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        save_figure(figure, file, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    root = ElementTree.fromstring(file.getvalue())
    reference = re.compile(r"(^#|url\(#)([^)]+)")
    names: dict[str, str] = {}

    def renamed(match: re.Match) -> str:
        return match[1] + names.setdefault(match[2], f"{name}-{len(names)}")

    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        element.tail = None
        element.text = element.text if (element.text or "").strip() else None
        element.attrib = {key.split("}")[-1]: " ".join(value.split()) for key, value in element.attrib.items()}
        for key in ("href", "clip-path", "style"):
            if key in element.attrib:
                value = re.sub(r"font-family: [^;]*(; |$)", "", element.attrib[key])
                element.attrib[key] = reference.sub(renamed, value)
        if element.tag == "text" and element.get("transform", "").startswith("rotate(-0 "):
            element.attrib.pop("transform")
        for child in [child for child in element if child.tag.split("}")[-1] in ("style", "metadata")]:
            element.remove(child)
    for element in root.iter():
        if (old := element.attrib.pop("id", None)) in names:
            element.set("id", names[old])
    root.attrib = {"class": "plot", "viewBox": root.attrib["viewBox"]}
    if title:
        root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title"}
        heading = ElementTree.Element("title", {"id": f"{name}-title"})
        heading.text = escaped(title)
        root.insert(0, heading)
    return ElementTree.tostring(root, encoding="unicode")


def _percent(values: Iterable[float | None]) -> list[float]:
    return [np.nan if value is None else 100 * value for value in values]


def _label_points(axis: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Writes a name beside every point, inside the axes, where it overlaps other names and points the least."""
    figure = axis.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # fixes the positions: names are not part of the layout
    renderer = FigureCanvasAgg(figure).get_renderer()
    frame = axis.get_window_extent(renderer)
    drawn = [axis.transData.transform((x, y)) for _, x, y in points]
    taken: list[Sequence[float]] = [(x - 4, y - 4, x + 4, y + 4) for x, y in drawn]
    places = [(x, y, "left" if x > 0 else "right", "bottom" if y > 0 else "top") for y in (5, -5) for x in (5, -5)]
    places += [(x, 0, "left" if x > 0 else "right", "center") for x in (8, -8)]
    places += [(0, y, "center", "bottom" if y > 0 else "top") for y in (7, -7, 18, -18)]
    for label, x, y in points:
        text = axis.annotate(
            drawable(label), (x, y), (0, 0), textcoords="offset points", fontsize=7.5, color="#222222", zorder=4
        )
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4})
        text.set_in_layout(False)

        def cost(place: tuple[float, float, str, str], text: Any = text) -> float:
            text.set(position=place[:2], ha=place[2], va=place[3])
            box = text.get_window_extent(renderer)
            inside = _overlap(box.extents, frame.extents)
            return sum(_overlap(box.extents, other) for other in taken) + 3 * (box.width * box.height - inside)

        best = min(places, key=cost)
        cost(best)
        taken.append(tuple(text.get_window_extent(renderer).padded(3).extents))  # the browser's font differs a little


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """The area that two boxes (left, bottom, right, top) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
