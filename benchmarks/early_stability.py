"""The first updates of FARE and LORE, by radius: clean accuracy, the multiplier, how far clean embeddings move.

  python benchmarks/early_stability.py --model runs/small-clip --data data/cifar10 --seeds 0 1 2 --eps 2 4 8 16 \\
    --output_dir runs/early-stability

For each radius and seed there are runs of train_lore.py with the same number of encoder updates: FARE with one update
per batch, FARE with as many as LORE, and LORE. --warmups and --clean_weights add what else could keep FARE stable,
--penalties and --dual_learning_rates other ways for LORE to meet its constraint.
Measures clean accuracy on held-out images as they train, and PGD accuracy at the end.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import evidence
from benchmarks.comparison import (
    FARE,
    Flags,
    LoreSettings,
    evaluate,
    evaluation_flag,
    lore_runs,
    training_flag,
    what_flag,
)
from benchmarks.evidence import Claim, Numbers, Table, difference, verdict
from utils.cli import parse_settings, run
from utils.training.metrics import MetricsFile

LORE, WARMUP, WEIGHT = "LORE", "FARE, warm-up {}", "FARE + weight {:g}"
PENALTY, RATE = "penalty {:g}", "dual rate {:g}"
QUANTILES = ("median", "p95", "max")
NEAR = 1.2  # the constraint counts as met if the mean distance is within so many times rho


@dataclass
class Settings(LoreSettings):
    eps: list[float] = training_flag([2.0, 4.0, 8.0, 16.0], "training radii, in 1/255", above=0, maximum=255)
    rho: float = training_flag(0.1, "LORE's tolerance", minimum=0)
    updates: int = training_flag(200, "updates of the encoder", minimum=1)
    primal_steps: int = training_flag(5, "K, LORE's updates per batch", minimum=1)
    fare_primal_steps: list[int] = training_flag([1, 5], "K of FARE; several are several methods", minimum=1)
    warmups: list[int] = training_flag([], "FARE with K of LORE and so many updates of warm-up", minimum=1)
    clean_weights: list[float] = training_flag([], "the same with a fixed weight on the clean distance", above=0)
    penalties: list[float] = training_flag([], "LORE with the augmented Lagrangian, by c", above=0)
    dual_learning_rates: list[float] = training_flag([], "LORE by other ones, also with every c", above=0)
    add_seeds: bool = what_flag(False, "join --seeds with those that the numbers already have")
    curve_updates: int = evaluation_flag(10, "updates between evaluations; a multiple of K", minimum=1)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    earlier = evidence.numbers_of_other_seeds(settings)
    methods = make_methods(settings)
    variants = {(eps, name): flags | {"eps": eps} for eps in settings.eps for name, flags in methods.items()}
    runs = lore_runs(settings, variants)
    found: dict[str, dict] = {f"{eps:g}": {} for eps in settings.eps}
    for (eps, name), folders in runs.items():
        histories = [MetricsFile(folder / "metrics.jsonl").read() for folder in folders]
        found[f"{eps:g}"][name] = read_curves(histories, methods[name]["primal_steps"], settings.primal_steps)
    folders = [folder for per_seed in runs.values() for folder in per_seed]
    for eps in settings.eps:
        trained = {name: list(map(str, runs[eps, name])) for name in methods}
        cells = evaluate(
            settings,
            f"pgd-{eps:g}",
            [each for names in trained.values() for each in names],
            {"attack": "pgd", "eps": eps},
        )
        accuracy = {cell["model"]: cell["value"] for cell in cells}
        for name, names in trained.items():
            found[f"{eps:g}"][name]["robust"] = [accuracy[each] for each in names]
        folders.append(Path(settings.output_dir) / f"eval-pgd-{eps:g}")
    numbers = evidence.write_numbers(settings, folders, found, earlier)
    evidence.show(tables(numbers))


def make_methods(settings: Settings) -> dict[str, Flags]:
    def of(k: int) -> Flags:
        common = {"primal_steps": k, "max_steps": settings.updates // k}
        return common | settings.evaluated_every(settings.curve_updates // k)

    k = settings.primal_steps
    methods = {f"FARE, K = {each}": FARE | of(each) for each in settings.fare_primal_steps}
    methods |= {WARMUP.format(n): FARE | {"warmup_steps": max(1, n // k)} | of(k) for n in settings.warmups}
    methods |= {WEIGHT.format(w): FARE | {"clean_weight": w} | of(k) for w in settings.clean_weights}
    lore = {"rho": settings.rho} | of(k)
    others = {RATE.format(rate): {"dual_learning_rate": rate} for rate in settings.dual_learning_rates}
    for name, flags in ({"": {}} | others).items():
        base = f"{LORE}, {name}" if name else LORE
        methods[base] = lore | flags
        methods |= {f"{base}, {PENALTY.format(c)}": lore | flags | {"penalty": c} for c in settings.penalties}
    return methods


def read_curves(histories: list[list[dict]], primal_steps: int, every: int) -> dict:
    """Curves over the updates: clean accuracy; every ``every`` updates, the multiplier and distance / margin.

    A step's distances are measured before its first update.
    """
    evaluated = [[row for row in history if "eval_accuracy_clean" in row] for history in histories]
    logged = [[row for row in history if "violation_ratio_mean" in row] for history in histories]
    logged = [rows[:: -max(1, every // primal_steps)][::-1] for rows in logged]
    return {
        "updates": [row["step"] * primal_steps for row in evaluated[0]],
        "clean": [[row["eval_accuracy_clean"] for row in rows] for rows in evaluated],
        "logged_updates": [(row["step"] - 1) * primal_steps for row in logged[0]],
        "multiplier": [[row.get("multiplier_mean", 0.0) for row in rows] for rows in logged],
        "violated": [[row["violated_fraction"] for row in rows] for rows in logged],
        **{
            f"ratio_{name}": [[row[f"violation_ratio_{name}"] for row in rows] for rows in logged]
            for name in ("mean", *QUANTILES)
        },
    }


def tables(numbers: Numbers) -> list[Table]:
    n, rho = numbers["settings"]["num_samples"], numbers["settings"]["rho"]
    stability = [["eps", "method", "clean, lowest", "at update", "clean, at the end", "PGD at eps, at the end"]]
    distances = [["eps", "method", "median", "95th percentile", "largest", f"share above rho = {rho:g}", "multiplier"]]
    met = [["eps", "method", "mean at its highest", "mean at the end", f"within {NEAR:g} rho from update"]]
    for eps, methods in numbers["results"].items():
        for name, curves in methods.items():
            lowest = [min(curve) for curve in curves["clean"]]
            where = [curves["updates"][curve.index(low)] for curve, low in zip(curves["clean"], lowest)]
            last = [
                evidence.share(values, n) for values in ([curve[-1] for curve in curves["clean"]], curves["robust"])
            ]
            stability.append([f"{eps}/255", name, evidence.share(lowest, n), " / ".join(map(str, where)), *last])
            ends = [[evidence.number([curve[-1] for curve in curves[f"ratio_{q}"]], 3)] for q in QUANTILES]
            violated = evidence.number([curve[-1] for curve in curves["violated"]], 0, 100) + " %"
            path = "-"
            if name.startswith(LORE):
                means = [statistics.mean(values) for values in zip(*curves["multiplier"])]
                path = f"{means[0]:.2f}, at most {max(means):.2f}, last {means[-1]:.2g}"
            distances.append([f"{eps}/255", name, *(text for [text] in ends), violated, path])
            if "ratio_mean" in curves:  # numbers of an earlier version lack it
                means = [[measure(curve) for curve in curves["ratio_mean"]] for measure in (max, late_mean)]
                since = [_at_last(value, curves) for value in met_since(curves, rho)]
                met.append([f"{eps}/255", name, *(evidence.number(of, 3) for of in means), " / ".join(since)])
    return [
        (f"Clean accuracy in % on {n} test images over the first {numbers['settings']['updates']} updates", stability),
        ("Clean distance ||z - z0||^2 / ||z0||^2 on the images of the last step, and the mean multiplier", distances),
        *[("Mean clean distance, as a share of ||z0||^2, on the images of a step before it trains on them", met)]
        * (len(met) > 1),
    ]


def draw(numbers: Numbers) -> Figure:
    found, rho = numbers["results"], numbers["settings"]["rho"]
    figure, axes = evidence.new_figure(len(found), 3, height=2.6)
    clean, multiplier, distance = (axes[i * len(found) : (i + 1) * len(found)] for i in range(3))
    draw_clean(clean, numbers)
    for column, methods in enumerate(found.values()):
        for name, curves in methods.items():
            at = place(name, methods)
            if name.startswith(LORE):
                evidence.draw_spread(multiplier[column], curves["logged_updates"], curves["multiplier"], at, name)
            moved = [curve[1:] for curve in curves["ratio_p95"]]  # nothing has moved before the first update
            evidence.draw_spread(distance[column], curves["logged_updates"][1:], moved, at, name)
        multiplier[column].set(ylabel="LORE's mean multiplier" if column == 0 else None)
        distance[column].set(
            xlabel="updates", ylabel="clean distance / margin, 95th percentile" if column == 0 else None
        )
        evidence.plain_log(distance[column], "y")
        distance[column].axhline(rho, color="black", linewidth=0.8, linestyle=(0, (1, 1)))
        distance[column].annotate("rho", (0, rho), xytext=(2, 3), textcoords="offset points", fontsize=7)
    evidence.legend_below(figure, clean[0], 3 if len(found) > 1 else 2)  # one panel is narrow
    return figure


def draw_clean_accuracy(numbers: Numbers) -> Figure:
    """Only the top row, for the README."""
    figure, axes = evidence.new_figure(len(numbers["results"]), height=2.6)
    draw_clean(axes, numbers)
    for axis in axes:
        axis.set(xlabel="updates")
    evidence.legend_below(figure, axes[0], 3)
    return figure


def draw_clean(axes: Sequence[Axes], numbers: Numbers) -> None:
    """Clean accuracy over the updates, one axis per radius, all with the same limits."""
    for column, (axis, (eps, methods)) in enumerate(zip(axes, numbers["results"].items())):
        for name, curves in methods.items():
            percent = [[100 * value for value in curve] for curve in curves["clean"]]
            evidence.draw_spread(axis, curves["updates"], percent, place(name, methods), name)
        axis.set(title=f"eps {eps}/255", ylabel="clean accuracy, %" if column == 0 else None)
    limits = [axis.get_ylim() for axis in axes]
    for axis in axes:
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def place(method: str, methods: Iterable[str]) -> int:
    """A method's color, line and marker: FARE with K = 1, FARE with more, LORE, then the others in their order."""
    if method == LORE:
        return 2
    if method.startswith("FARE, K"):
        return int(not method.endswith("= 1"))
    return 3 + [name for name in methods if name != LORE and not name.startswith("FARE, K")].index(method)


def claims(numbers: Numbers) -> list[Claim]:
    return penalty_claims(numbers) if numbers["settings"].get("penalties") else fare_claims(numbers)


def fare_claims(numbers: Numbers) -> list[Claim]:
    n, rho, updates = (numbers["settings"][name] for name in ("num_samples", "rho", "updates"))
    found = []
    for eps, methods in numbers["results"].items():
        lowest = {name: [min(curve) for curve in curves["clean"]] for name, curves in methods.items()}
        gaps = {name: difference(lowest[LORE], lowest[name], n) for name in lowest if not name.startswith(LORE)}
        published, *_ = gaps
        said = ", ".join(f"LORE - {name}: {gap}" for name, gap in gaps.items())
        found.append(
            Claim(
                "LORE",
                "Fig. 1a, 9: FARE loses more clean accuracy in its first updates than LORE "
                f"(eps {eps}/255, {updates} updates)",
                f"lowest clean accuracy, {said} points", verdict(gaps[published]),
            )
        )  # fmt: skip
    fare = published
    relaxes, settles = [], []
    shares: dict[str, dict[str, float]] = {}
    for eps, methods in numbers["results"].items():
        means = [statistics.mean(values) for values in zip(*methods[LORE]["multiplier"])]
        relaxes += [eps] if max(means) > 1.1 * means[-1] else []
        shares[eps] = {name: late_share(curves) for name, curves in methods.items()}
        settles += [eps] if shares[eps][LORE] < 0.05 < shares[eps][fare] else []
    found.append(
        Claim(
            "LORE", f"the multiplier is high at first and relaxes within {updates} updates",
            "; ".join(_multiplier_path(eps, methods[LORE]) for eps, methods in numbers["results"].items()),
            evidence.at_all(relaxes, shares, "at eps"),
        )
    )  # fmt: skip
    said = "; ".join(
        f"eps {eps}: LORE {100 * of[LORE]:.0f} %, {fare} {100 * of[fare]:.0f} %" for eps, of in shares.items()
    )
    text = f"Fig. 6, 7: within {updates} updates LORE's clean distances settle below rho, FARE's do not"
    found.append(
        Claim(
            "LORE",
            text,
            f"images above rho = {rho:g} in the last tenth of the steps, {said}",
            evidence.at_all(settles, shares, "at eps"),
        )
    )
    return found


def penalty_claims(numbers: Numbers) -> list[Claim]:
    settings, rows = numbers["settings"], []
    for eps, methods in numbers["results"].items():
        plain = methods[LORE]
        for c in settings["penalties"]:
            name = f"{LORE}, {PENALTY.format(c)}"
            curves = methods[name]
            since = [met_since(of, settings["rho"]) for of in (curves, plain)]
            sooner = difference(*reversed(since), None, 1.0)
            robust = difference(curves["robust"], plain["robust"], settings["num_samples"])
            said = [" / ".join(_at_last(value, of) for value in met) for met, of in zip(since, (curves, plain))]
            lowest = [[min(curve) for curve in of["clean"]] for of in (curves, plain)]
            higher = difference(*lowest, settings["num_samples"])
            text = "an augmented Lagrangian makes LORE's dip of clean accuracy smaller"
            rows.append(
                Claim(
                    "this project", f"{text} (eps {eps}/255, {settings['updates']} updates)",
                    f"lowest clean accuracy, {name} - LORE: {higher}; PGD at the end {robust} points", verdict(higher),
                )
            )  # fmt: skip
            text = "an augmented Lagrangian meets the constraint sooner"
            rows.append(
                Claim(
                    "this project", f"{text} (eps {eps}/255, {settings['updates']} updates)",
                    f"mean distance within {NEAR:g} rho from update {said[0]} by {name}, {said[1]} by LORE",
                    verdict(sooner),
                )
            )  # fmt: skip
    return rows


def met_since(curves: dict, rho: float) -> list[int]:
    """For each seed, the update from which the mean distance stays within NEAR * rho; if never, the last one."""
    found = []
    for curve in curves["ratio_mean"]:
        beyond = [at for at, value in enumerate(curve) if value > NEAR * rho]
        after = beyond[-1] + 1 if beyond else 0
        found.append(curves["logged_updates"][min(after, len(curve) - 1)])
    return found


def _at_last(update: int, curves: dict) -> str:
    """An update of ``met_since``; the last one that was measured says little."""
    return f"> {update}" if update >= curves["logged_updates"][-1] else str(update)


def late_mean(curve: Sequence[float]) -> float:
    """The mean over the last tenth of the steps."""
    return statistics.mean(curve[-max(1, len(curve) // 10) :])


def late_share(curves: dict) -> float:
    """Share of images above rho, averaged over the last tenth of the steps and all seeds."""
    return statistics.mean(map(late_mean, curves["violated"]))


def _multiplier_path(eps: str, curves: dict) -> str:
    means = [statistics.mean(values) for values in zip(*curves["multiplier"])]
    return f"eps {eps}: {means[0]:.2f} -> {max(means):.2f} -> {means[-1]:.2g}"


if __name__ == "__main__":
    run(main)
