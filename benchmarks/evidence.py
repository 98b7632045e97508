"""The evidence: numbers on disk, and the intervals, tables, figures and verdicts made from them.

A script of the evidence writes ``<script>.json`` (``write_numbers``) and has three functions of these numbers:
``tables``, ``draw`` and ``claims``. benchmarks/results.py makes a page of them all.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.comparison import COMMANDS, print_table
from utils.errors import UserError
from utils.evaluation.figures import STYLE, line_style
from utils.evaluation.results import wilson_interval
from utils.model_card import versions
from utils.processes.launch import launched_command
from utils.text_files import text_lines

Numbers = dict[str, Any]
Table = tuple[str, list[list[str]]]  # caption, rows; the first row has the headings
CONFIRMED, NOT_CONFIRMED, NOT_TESTED = "confirmed", "not confirmed", "not tested"
FIGURES = (".svg", ".png")


class Difference(NamedTuple):
    """A mean difference with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        interval = f"[{self.low:+.1f}, {self.high:+.1f}]" if math.isfinite(self.low) else "(one seed)"
        return f"{self.mean:+.1f} {interval}"


class Claim(NamedTuple):
    """One row of the summary: a paper's claim, the finding, and whether they agree."""

    paper: str  # LORE or CLIP-PO
    claim: str
    found: str
    verdict: str


def difference(first: Sequence[float], second: Sequence[float], n: int | None, scale: float = 100.0) -> Difference:
    """(first - second) * ``scale``, with one value per seed: shares of ``n`` images, or if n is None, other figures.

    Several seeds: mean and t-interval of the differences paired by seed. One seed: Newcombe's interval of two shares of
    n images, as if independent, which is too wide because the images are the same. One seed and other figures: an
    infinite interval.
    """
    from scipy.stats import t

    pairs = [scale * (a - b) for a, b in zip(first, second, strict=True)]
    mean = statistics.mean(pairs)
    if len(pairs) > 1:
        half = float(t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / math.sqrt(len(pairs))
        return Difference(mean, mean - half, mean + half)
    if n is None:
        return Difference(mean, -math.inf, math.inf)
    (a,), (b,) = first, second
    (a_low, a_high), (b_low, b_high) = (wilson_interval(round(share * n), n) for share in (a, b))
    return Difference(
        mean, mean - scale * math.hypot(a - a_low, b_high - b), mean + scale * math.hypot(a_high - a, b - b_low)
    )


def verdict(found: Difference) -> str:
    """CONFIRMED if the whole interval is above 0; says so if it is below 0, the opposite."""
    if found.low > 0:
        return CONFIRMED
    return NOT_CONFIRMED + (": the opposite" if found.high < 0 else "")


def at_all(where: Sequence[str], everywhere: Iterable[str], name: str) -> str:
    """CONFIRMED if the claim holds at every value of a setting; else lists the values at which it holds."""
    if len(where) == len(list(everywhere)):
        return CONFIRMED
    return NOT_CONFIRMED + (f": {name} {', '.join(where)} only" if where else "")


def share(values: Sequence[float], n: int) -> str:
    """In %: mean ± standard deviation over seeds; for one seed, the Wilson 95 % interval of a share of n images."""
    mean = f"{100 * statistics.mean(values):.1f}"
    if len(values) > 1:
        return f"{mean} ± {100 * statistics.stdev(values):.1f}"
    low, high = wilson_interval(round(values[0] * n), n)
    return f"{mean} [{100 * low:.1f}, {100 * high:.1f}]"


def number(values: Sequence[float], digits: int = 1, scale: float = 1.0) -> str:
    """Mean ± standard deviation over seeds."""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def dominated_area(points: Sequence[tuple[float, float]], corner: tuple[float, float]) -> float:
    """Area between ``corner`` and the points: their hypervolume in two dimensions; in both, higher is better."""
    area, reached = 0.0, corner[1]
    for x, y in sorted(points, reverse=True):
        if x > corner[0] and y > reached:
            area += (x - corner[0]) * (y - reached)
            reached = y
    return area


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, sorted by the first."""
    return sorted(p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points))


def write_numbers(
    settings: Any, folders: Sequence[str | Path], results: dict[str, Any], earlier: Numbers | None = None
) -> Numbers:
    """Writes <numbers_dir>/<numbers_name>.json: ``results`` with command, settings, machine and minutes.

    ``folders``: the runs and evaluations behind the results. Minutes are the sum over their commands, including earlier
    calls and other scripts with the same --output_dir; a command that ran in parallel counts for its share.
    ``earlier``: numbers of other seeds, from ``numbers_of_other_seeds``; their results are joined with these.
    """
    minutes = 0.0
    wanted = set(map(str, folders))
    log = Path(settings.output_dir) / COMMANDS
    for line in text_lines(log.read_text(encoding="utf-8")) if log.exists() else []:
        row = json.loads(line)
        if row["output_dir"] in wanted:
            minutes += row["seconds"] / row["at_a_time"] / 60
    script = Path(sys.argv[0])
    numbers = {
        "command": launched_command().replace(str(script), f"benchmarks/{script.name}", 1),
        "machine": f"{os.cpu_count()} cores ({processor_name()}), torch {versions()['torch']}",
        "minutes": round(minutes, 1),
        "settings": asdict(settings),
        "results": results,
    }
    if earlier is not None:
        numbers = with_more_seeds(earlier, numbers)
    path = numbers_file(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(compact_json(numbers) + "\n", encoding="utf-8")
    print(f"{path} written; {minutes:.1f} minutes of runs and evaluations")
    return json.loads(path.read_text(encoding="utf-8"))


def numbers_file(settings: Any) -> Path:
    name = settings.numbers_name or Path(sys.argv[0]).stem
    return Path(settings.numbers_dir or settings.output_dir) / f"{name}.json"


def numbers_of_other_seeds(settings: Any) -> Numbers | None:
    """The numbers that --add_seeds joins: those in the file, if it is there. Settings must differ in seeds alone."""
    path = numbers_file(settings)
    if not settings.add_seeds or not path.exists():
        return None
    earlier = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(asdict(settings)))
    free = ("seeds", "add_seeds", "jobs", "output_dir", "numbers_dir")
    differ = [name for name in now if name not in free and now[name] != earlier["settings"].get(name)]
    if differ:
        raise UserError(f"--add_seeds: {path} was measured with other settings ({', '.join(differ)})")
    if both := sorted(set(settings.seeds) & set(earlier["settings"]["seeds"])):
        raise UserError(f"--seeds {' '.join(map(str, both))}: already in {path}; give --add_seeds other ones")
    return earlier


def with_more_seeds(earlier: Numbers, now: Numbers) -> Numbers:
    """Both as if measured in one call. A list in results is an axis, of integers, or has an entry per seed."""

    def joined(first: Any, second: Any) -> Any:
        if isinstance(first, dict):
            return {name: joined(first[name], second[name]) for name in first}
        return first if all(isinstance(value, int) for value in first) else [*first, *second]

    all_seeds = [*earlier["settings"]["seeds"], *now["settings"]["seeds"]]
    typed = " ".join(map(str, all_seeds))
    command = re.sub(r"--seeds( \d+)+", f"--seeds {typed}", earlier["command"])
    machines = dict.fromkeys([*earlier["machine"].split("; "), now["machine"]])
    return earlier | {
        "command": command if "--seeds" in command else f"{command} --seeds {typed}",
        "machine": "; ".join(machines),
        "minutes": round(earlier["minutes"] + now["minutes"], 1),
        "settings": earlier["settings"] | {"seeds": all_seeds},
        "results": joined(earlier["results"], now["results"]),
    }


def compact_json(value: Any) -> str:
    """JSON with floats of five digits and each list of numbers on one line, because these files are committed."""

    def rounded(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: rounded(of) for name, of in part.items()}
        if isinstance(part, list):
            return [rounded(of) for of in part]
        return float(f"{part:.5g}") if isinstance(part, float) else part

    text = json.dumps(rounded(value), indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)


def processor_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def show(tables: Sequence[Table]) -> None:
    for caption, rows in tables:
        print_table(caption, rows)


def new_figure(columns: int, rows: int = 1, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure with panels in one or several rows."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.4, 3.6 * columns), height * rows), layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def draw_spread(axis: Axes, xs: Sequence[float], per_seed: Sequence[Sequence[float]], place: int, label: str) -> None:
    """The mean over seeds as a line, the range over seeds as a band. ``per_seed``: a curve for each seed."""
    columns = list(zip(*per_seed, strict=True))
    means = [statistics.mean(column) for column in columns]
    style = line_style(place)
    axis.plot(xs, means, **style, label=label, markevery=max(1, len(means) // 8))
    if len(per_seed) > 1:
        axis.fill_between(
            xs, [min(c) for c in columns], [max(c) for c in columns], color=style["color"], alpha=0.2, lw=0
        )


def error_bars(per_label: Sequence[Sequence[float]]) -> list[float] | None:
    """Standard deviations over seeds, in %; None for one seed."""
    if any(len(values) < 2 for values in per_label):
        return None
    return [100 * statistics.stdev(values) for values in per_label]


def plain_log(axis: Axes, which: str) -> None:
    """A logarithmic axis with labels such as 0.1: labels such as 10^-1 need mathematics, which STYLE switches off."""
    axis.set(**{f"{which}scale": "log"})
    ticks = getattr(axis, f"{which}axis")
    ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter(NullFormatter())


def legend_below(figure: Figure, axis: Axes, columns: int) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Saves a figure as SVG and as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for suffix in FIGURES:
            metadata = {"Date": None} if suffix == ".svg" else None  # so that equal numbers give equal bytes
            figure.savefig(folder / f"{name}{suffix}", dpi=100, metadata=metadata)
