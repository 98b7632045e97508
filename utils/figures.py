"""Pictures for reports: curves over t, rows of retrieved images, sheets of attacked ones. Readable in black and white."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

LINES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "v"), ("-", "D"), ("--", "x")]


def draw_t_sweep(
    path: Path, title: str, panels: Mapping[str, Mapping[str, Mapping[float, float]]], neutral: float | None
) -> None:
    """A panel for each {title: {name: {t: value}}}; t = 0 (the original), 1 (the trained head) and t* are marked."""
    figure = Figure(figsize=(6.2 * len(panels), 5), layout="constrained")
    marks = {0.0: "original", 1.0: "trained"} | ({} if neutral is None else {neutral: f"t* = {neutral:g}"})
    for axis, (panel, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for (name, points), (line, marker) in zip(curves.items(), itertools.cycle(LINES)):
            ts = sorted(points)
            values = [points[t] for t in ts]
            axis.plot(
                ts,
                values,
                line,
                color="black",
                marker=marker,
                markersize=4,
                markevery=max(1, len(ts) // 18),
                label=name,
            )
        for t in marks:
            axis.axvline(t, color="grey", linewidth=0.8, linestyle=":" if t in (0, 1) else "-")
        above = axis.secondary_xaxis("top")
        above.set_xticks(list(marks), list(marks.values()), fontsize=8)
        axis.set(xlabel="t, strength of the head", ylabel=panel)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
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
            axis.set_title(caption, fontsize=8, pad=3, loc="left")
        line[0].text(-0.08, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=8, wrap=True)
    if title:
        figure.suptitle(title, fontsize=10)
    # A picture is about 1.25 inches wide; fewer dots than its pixels would break thin letters.
    widest = max(image.shape[-1] for _, pictures in rows for image, _ in pictures)
    figure.savefig(path, dpi=max(120, round(widest / 1.2)))
