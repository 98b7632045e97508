"""Effect of robust fine-tuning on one set on other sets: FARE and LORE under APGD, noise and corruptions.

  python benchmarks/transfer.py --model runs/two-sets-clip --data data/tinyimagenet150 \\
    --zero_shot_data data/tinyimagenet150 data/cifar10 data/tinyimagenet50_novel \\
    --probe_data data/tinyimagenet50_novel data/sign_digits --seeds 0 1 2 --output_dir runs/transfer

The encoders are trained on the first --zero_shot_data; the others measure transfer. --probe_data are sets whose class
names the text tower never learnt. For these a linear probe of the frozen encoder is trained on one half of the clean
test images and measured on the other half.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import webdataset as wds
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import evidence
from benchmarks.comparison import (
    FARE,
    START,
    StepSettings,
    as_in_results,
    evaluate,
    evaluation_flag,
    lore_runs,
    training_flag,
    what_flag,
)
from benchmarks.evidence import CONFIRMED, NOT_CONFIRMED, Claim, Numbers, Table, difference, verdict
from utils.cli import parse_settings, run
from utils.evaluation.figures import COLORS, HATCHES

COLUMNS = ["clean", "APGD", "noise", "corruptions"]
PROBE = "{} (probe)"


@dataclass
class Settings(StepSettings):
    zero_shot_data: list[str] = what_flag(
        [], "labelled sets whose test/ is classified by class names (default: --data)", path=True
    )
    probe_data: list[str] = what_flag([], "labelled sets whose test/ is halved for a linear probe", path=True)
    rhos: list[float] = training_flag([0.05, 0.02], "LORE's tolerances", minimum=0)
    steps: int = training_flag(100, "training steps", minimum=1)
    primal_steps: int = training_flag(5, "K, updates per batch, of every method", minimum=1)
    eval_eps: float = evaluation_flag(2.0, "radius of APGD, in 1/255", above=0, maximum=255)
    sigma: float = evaluation_flag(32.0, "standard deviation of the Gaussian noise, in 1/255", above=0)
    severities: list[int] = evaluation_flag([3], "of the corruptions", minimum=1, maximum=5)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    common = {"eps": settings.eps, "max_steps": settings.steps, "primal_steps": settings.primal_steps}
    variants = {f"FARE, K = {settings.primal_steps}": FARE | common}
    variants |= {f"LORE, rho {rho:g}": common | {"rho": rho} for rho in settings.rhos}
    runs = lore_runs(settings, variants)
    models = [str(folder) for folders in runs.values() for folder in folders]
    asked = {
        "attack": ["clean", "apgd", "gaussian_noise", "corruptions"], "eps": settings.eval_eps, "sigma": settings.sigma,
        "severities": settings.severities,
    }  # fmt: skip
    zero_shot = [as_in_results(name) for name in settings.zero_shot_data or [settings.data]]
    cells = evaluate(settings, "zero-shot", models, asked, zero_shot)
    names = {name: Path(name).name for name in zero_shot}
    if settings.probe_data:
        halves = {str(halved(Path(name), Path(settings.output_dir) / "halves")): name for name in settings.probe_data}
        cells += evaluate(settings, "probe", models, asked | {"classifier": "linear_probe"}, list(halves))
        names |= {half: PROBE.format(Path(name).name) for half, name in halves.items()}
    by_label = {START: [settings.model]} | {label: list(map(str, folders)) for label, folders in runs.items()}
    found = {}
    for label, of in by_label.items():
        found[label] = {}
        for path, name in names.items():
            own = [[cell for cell in cells if (cell["model"], cell["dataset"]) == (model, path)] for model in of]
            found[label][name] = {column: [figure(each, column) for each in own] for column in COLUMNS}
    evaluations = [Path(settings.output_dir) / f"eval-{name}" for name in ("zero-shot", "probe")]
    evidence.show(tables(evidence.write_numbers(settings, [*models, *evaluations], found)))


def figure(cells: Iterable[dict], column: str) -> float:
    """Accuracy of one model on one set; for corruptions, the mean over corruptions and severities."""
    attack = {"clean": "clean", "APGD": "apgd", "noise": "gaussian_noise", "corruptions": "corruptions"}[column]
    return statistics.mean(c["value"] for c in cells if (c["measure"], c["attack"]) == ("accuracy", attack))


def halved(data: Path, folder: Path) -> Path:
    """A new set, made once, whose train/ and test/ get the set's test images in turn."""
    target = folder / data.name
    if (target / "test").is_dir():
        return target
    data = data.resolve()  # a relative path may look like a URL, which the library would open
    aside = folder.resolve() / f"{data.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    for split in ("train", "aside"):
        (aside / split).mkdir(parents=True)
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        if (data / name).exists():
            shutil.copyfile(data / name, aside / name)
    with wds.TarWriter(str(aside / "train/0.tar")) as train, wds.TarWriter(str(aside / "aside/0.tar")) as test:
        shards = sorted((data / "test").glob("*.tar"), key=lambda path: (len(path.name), path.name))
        for place, sample in enumerate(wds.WebDataset(list(map(str, shards)), shardshuffle=False, empty_check=False)):
            kept = {key: value for key, value in sample.items() if key == "__key__" or not key.startswith("__")}
            (train if place % 2 else test).write(kept)
    (aside / "aside").rename(aside / "test")
    aside.rename(target)
    return target


def headings(numbers: Numbers) -> dict[str, str]:
    settings = numbers["settings"]
    return {
        "clean": "clean", "APGD": f"APGD {settings['eval_eps']:g}/255", "noise": f"noise {settings['sigma']:g}/255",
        "corruptions": "corruptions",
    }  # fmt: skip


def tables(numbers: Numbers) -> list[Table]:
    settings, found = numbers["settings"], numbers["results"]
    trained = Path(settings["data"]).name
    rows = [["set", "", *headings(numbers).values()]]
    sets = list(found[START])
    for name in sets:
        for label, of in found.items():
            cells = [evidence.share(of[name][column], settings["num_samples"]) for column in COLUMNS[:3]]
            cells.append(f"{100 * statistics.mean(of[name]['corruptions']):.1f}")
            rows.append([name + (" (trained on)" if name == trained else ""), label, *cells])
    return [(f"Accuracy in % after {settings['steps']} steps on {trained}, eps {settings['eps']:g}/255", rows)]


def draw(numbers: Numbers) -> Figure:
    found = numbers["results"]
    sets = list(found[START])
    drawn, axes = evidence.new_figure(2, 2, height=2.6)
    width = 0.8 / len(found)
    for axis, (column, heading) in zip(axes, headings(numbers).items()):
        for place, (label, of) in enumerate(found.items()):
            means = [100 * statistics.mean(of[name][column]) for name in sets]
            bars = evidence.error_bars([of[name][column] for name in sets])
            xs = [index + (place - (len(found) - 1) / 2) * width for index in range(len(sets))]
            axis.bar(xs, means, width, yerr=bars, capsize=1.5, error_kw={"elinewidth": 0.7}, label=label,
                     color="white", edgecolor=COLORS[place], hatch=HATCHES[place])  # fmt: skip
        axis.set(title=heading, ylabel="accuracy, %")
        axis.set_xticks(range(len(sets)), sets, fontsize=7, rotation=20, ha="right", rotation_mode="anchor")
    evidence.legend_below(drawn, axes[0], len(found))
    return drawn


def claims(numbers: Numbers) -> list[Claim]:
    settings, found = numbers["settings"], numbers["results"]
    n, trained = settings["num_samples"], Path(settings["data"]).name
    fare, lore = f"FARE, K = {settings['primal_steps']}", f"LORE, rho {settings['rhos'][0]:g}"
    away = [name for name in found[START] if name != trained] or list(found[START])

    probed = sum(name.endswith(PROBE.format("")) for name in away)
    mean = f"mean of {len(away)} sets" + (f", {probed} of them by probe" if probed else "")

    def gap(first: str, second: str, column: str):
        sets = [[found[label][name][column] for name in away] for label in (first, second)]
        means = [[statistics.mean(of_seed) for of_seed in zip(*values)] for values in sets]
        # There is only one start model for all seeds.
        means = [values * (len(settings["seeds"]) if len(values) == 1 else 1) for values in means]
        return difference(*means, n * len(away))

    rows = []
    robust = gap(fare, START, "APGD"), gap(lore, START, "APGD")
    rows.append(
        Claim(
            "LORE", "robustness carries over to sets that robust training never saw",
            f"APGD, {mean}, less the start model: FARE {robust[0]}, LORE {robust[1]} points",
            CONFIRMED if [verdict(each) for each in robust] == [CONFIRMED] * 2 else NOT_CONFIRMED,
        )
    )  # fmt: skip
    for column, text in [
        ("clean", "Table 1: on other sets, clean: LORE is ahead of FARE"),
        ("APGD", "Table 1: on other sets, attacked: LORE is ahead of FARE"),
        ("corruptions", "out of distribution: LORE is ahead of FARE under corruptions"),
        ("noise", "out of distribution: LORE is ahead of FARE under Gaussian noise"),
    ]:
        found_gap = gap(lore, fare, column)
        rows.append(Claim("LORE", text, f"{mean}, {lore} - {fare}: {found_gap} points", verdict(found_gap)))
    return rows


if __name__ == "__main__":
    run(main)
