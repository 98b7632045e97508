"""Pictures for reports: curves over t, rows of retrieved images, sheets of attacked ones. Readable in black and white."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

LINES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "v"), ("-", "D"), ("--", "x")]


def draw_t_sweep(path: Path, title: str, curves: Mapping[str, Mapping[float, float]], neutral: float | None) -> None:
    """Curves of {name: {t: value in [0,1] or beyond}}; t = 0 (the original), 1 (the trained head) and t* are marked."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for (name, points), (line, marker) in zip(curves.items(), itertools.cycle(LINES)):
        ts = sorted(points)
        axis.plot(
            ts, [points[t] for t in ts], line, color="black", marker=marker, markersize=4, markevery=2, label=name
        )
    axis.axhline(0.5, color="grey", linewidth=0.8)
    marks = {0.0: "t = 0\noriginal", 1.0: "t = 1\ntrained"}
    if neutral is not None:
        marks[neutral] = f"t* = {neutral:g}"
    for t, label in marks.items():
        axis.axvline(t, color="grey", linewidth=0.8, linestyle=":" if t in (0, 1) else "-")
        axis.annotate(label, (t, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -3), textcoords="offset points",
                      va="top", fontsize=8, color="dimgrey")  # fmt: skip
    axis.set(xlabel="t, strength of the head", ylabel="value", title=title)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


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
            axis.set_title(caption, fontsize=7, pad=2)
        line[0].text(-0.08, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=8, wrap=True)
    if title:
        figure.suptitle(title, fontsize=10)
    # A picture is about 1.25 inches wide; fewer dots than its pixels would break thin letters.
    widest = max(image.shape[-1] for _, pictures in rows for image, _ in pictures)
    figure.savefig(path, dpi=max(120, round(widest / 1.2)))
