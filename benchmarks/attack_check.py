"""Checks the attacks: PGD, Square, APGD here and by its authors' code, and attacks in bfloat16.

  python benchmarks/attack_check.py --model runs/small-clip --data data/cifar10 --seeds 0 1 2 --output_dir runs/results

Encoders: the start model, FARE, LORE, and LORE trained in bfloat16. Square uses no gradients: if it broke images that
APGD does not, gradients would be masked. The authors' code (pyautoattack) attacks the same images from the same starts.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import evaluate as side_by_side
from benchmarks import evidence
from benchmarks.comparison import FARE, START, Flags, StepSettings, evaluate, evaluation_flag, lore_runs, training_flag
from benchmarks.evidence import CONFIRMED, NOT_CONFIRMED, Claim, Numbers, Table, difference
from utils.cli import parse_settings, run
from utils.evaluation.figures import COLORS, HATCHES
from utils.evaluation.results import Results
from utils.methods.attacks import attack_seeds, frozen, pgd, uniform_start
from utils.methods.losses import squared_distance
from utils.models.encoders import make_encoder
from utils.models.hub import load

EXACT, HALF = "LORE", "LORE, trained in bfloat16"
COLUMNS = {"clean": "clean", "pgd": "PGD", "apgd": "APGD", "square": "Square"}


@dataclass
class Settings(StepSettings):
    eps: float = training_flag(4.0, "radius in training and evaluation, in 1/255", above=0, maximum=255)
    rho: float = training_flag(0.1, "LORE's tolerance", minimum=0)
    primal_steps: int = training_flag(5, "K, updates per batch", minimum=1)
    square_queries: int = evaluation_flag(5000, "forwards for an image that holds out", minimum=1)
    apgd_steps: int = evaluation_flag(100, "steps of each run of APGD", minimum=1)
    strength_eps: list[float] = evaluation_flag(
        [1.0, 2.0, 4.0], "radii at which training attacks in bfloat16 and float32 are compared", above=0
    )


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    runs = lore_runs(settings, make_variants(settings))
    models = [str(folder) for folders in runs.values() for folder in folders]
    asked = {
        "attack": list(COLUMNS), "eps": settings.eps,
        "square_queries": settings.square_queries, "apgd_steps": settings.apgd_steps,
    }  # fmt: skip
    cells = evaluate(settings, "attack-check", models, asked)
    asked = {"attack": "apgd", "eps": settings.eps, "apgd_steps": settings.apgd_steps, "attack_dtype": "bfloat16"}
    rounded = evaluate(settings, "attack-check-bfloat16", models, asked)
    folder = Path(settings.output_dir) / "eval-attack-check"
    report = Results(folder)
    by_label = {START: [settings.model]} | {label: list(map(str, folders)) for label, folders in runs.items()}
    started = time.monotonic()
    found = {}
    for label, names in by_label.items():
        of = {name: {cell["attack"]: cell for cell in cells if cell["model"] == name} for name in names}
        found[label] = {attack: [of[name][attack]["value"] for name in names] for attack in COLUMNS}
        found[label]["apgd_bfloat16"] = [next(c["value"] for c in rounded if c["model"] == name) for name in names]
        found[label]["broken_by_square_alone"] = sum(broken_by_square_alone(report, of[name]) for name in names)
        # The authors' code runs for one seed per kind of encoder: the seeds' models are alike, and it is slow.
        found[label]["reference"], found[label]["differ"] = by_authors_code(settings, names[0])
        found[label]["strength"] = {
            f"{eps:g}": attack_strength(settings, names[0], eps) for eps in settings.strength_eps
        }
    evaluations = [folder, Path(settings.output_dir) / "eval-attack-check-bfloat16"]
    numbers = evidence.write_numbers(settings, [*models, *evaluations], found)
    print(f"the authors' code and the strength of attacks: {(time.monotonic() - started) / 60:.1f} minutes more")
    evidence.show(tables(numbers))


def make_variants(settings: Settings) -> dict[str, Flags]:
    common = {"eps": settings.eps, "max_steps": settings.steps, "primal_steps": settings.primal_steps}
    lore = common | {"rho": settings.rho}
    return {"FARE": FARE | common, EXACT: lore, HALF: lore | {"mixed_precision": "bf16"}}


def broken_by_square_alone(report: Results, cells: dict[str, dict]) -> int:
    """The number of images that withstand APGD but not Square."""
    apgd, square = (
        {row["position"]: row["correct"] for row in report.records(cells[attack])} for attack in ("apgd", "square")
    )
    return sum(apgd[position] and not square[position] for position in apgd)


def by_authors_code(settings: Settings, name: str) -> tuple[float, int]:
    """Accuracy under APGD-CE and APGD-T of pyautoattack, and the number of images where this project's APGD differs."""
    device = torch.device("cpu")
    encoder, classifier, images, labels = side_by_side.load(name, settings.data, settings.num_samples, device)
    common = {"num_samples": settings.num_samples, "num_steps": settings.apgd_steps, "output_dir": settings.output_dir}
    asked = side_by_side.Settings(model=[name], data=settings.data, **common)
    with frozen(encoder):
        model = side_by_side.Counted(lambda x: classifier(encoder(x)))
        reference, _ = side_by_side.by_reference(model, images, labels, settings.eps / 255, asked)
        ours = side_by_side.by_project(model, images, labels, settings.eps / 255, asked)
    return float(reference.float().mean()), int((reference != ours).sum())


def attack_strength(settings: Settings, name: str, eps: float) -> float:
    """Embedding distance reached by training attacks in bfloat16, relative to float32's; both measured in float32."""
    exact, _, images, _ = side_by_side.load(name, settings.data, min(128, settings.num_samples), torch.device("cpu"))
    rounded = make_encoder(*load(name, "--model"), torch.bfloat16).eval()
    start = uniform_start(images, eps / 255, attack_seeds(0, 0, range(len(images))))
    reached = []
    for encoder in (exact, rounded):
        with frozen(encoder):
            with torch.no_grad():
                clean = encoder(images)

            def distance(adversarial: Tensor, encoder=encoder, clean=clean) -> Tensor:
                return squared_distance(encoder(adversarial), clean)

            delta = pgd(distance, images, eps=eps / 255, step_size=eps / 255 / 4, num_steps=10, start=start)
            with torch.no_grad():
                reached.append(float(squared_distance(exact(images + delta), exact(images)).sum()))
    return reached[1] / reached[0]


def tables(numbers: Numbers) -> list[Table]:
    settings, found = numbers["settings"], numbers["results"]
    n, seeds = settings["num_samples"], settings["seeds"]
    rows = [["", *COLUMNS.values(), "broken by Square alone", "APGD followed in bfloat16"]]
    theirs = [["", "APGD here", "its authors' code", "verdicts that differ"]]
    strengths = [["", *(f"eps {eps:g}/255" for eps in settings["strength_eps"])]]
    for label, of in found.items():
        count = n * len(of["apgd"])
        rows.append([
            label, *(evidence.share(of[attack], n) for attack in COLUMNS), f"{of['broken_by_square_alone']} of {count}",
            evidence.share(of["apgd_bfloat16"], n),
        ])  # fmt: skip
        theirs.append(
            [label, evidence.share(of["apgd"][:1], n), evidence.share([of["reference"]], n), f"{of['differ']} of {n}"]
        )
        strengths.append([label, *(f"{100 * value:.1f} %" for value in of["strength"].values())])
    return [
        (f"Accuracy in % on {n} test images, eps {settings['eps']:g}/255", rows),
        (f"APGD-CE, then APGD-T, by pyautoattack: the same images and starts, seed {seeds[0]}", theirs),
        ("Distance reached by PGD in bfloat16, as a share of float32's; both judged in float32", strengths),
    ]


def draw(numbers: Numbers) -> Figure:
    found, n = numbers["results"], numbers["settings"]["num_samples"]
    figure, (bars,) = evidence.new_figure(1, height=3.2)
    figure.set_size_inches(6.4, 3.4)
    columns = [*COLUMNS, "apgd_bfloat16"]
    width = 0.8 / len(columns)
    for place, column in enumerate(columns):
        means = [100 * statistics.mean(of[column]) for of in found.values()]
        errors = [100 * 1.96 * (m / 100 * (1 - m / 100) / n) ** 0.5 for m in means]
        xs = [index + (place - (len(columns) - 1) / 2) * width for index in range(len(found))]
        label = COLUMNS.get(column, "APGD in bfloat16")
        bars.bar(
            xs, means, width, yerr=errors, capsize=1.5, error_kw={"elinewidth": 0.7}, color="white",
            edgecolor=COLORS[place], hatch=HATCHES[place], label=label,
        )  # fmt: skip
    bars.set(ylabel="accuracy, %")
    bars.set_xticks(range(len(found)), list(found), fontsize=7)
    evidence.legend_below(figure, bars, len(columns))
    return figure


def claims(numbers: Numbers) -> list[Claim]:
    settings, found = numbers["settings"], numbers["results"]
    n = settings["num_samples"]
    differ = sum(of["differ"] for of in found.values())
    alone = {label: of["broken_by_square_alone"] for label, of in found.items()}
    total = sum(n * len(of["apgd"]) for of in found.values())
    gap = difference(found[HALF]["apgd"], found[EXACT]["apgd"], n)
    weakest = min(value for of in found.values() for value in of["strength"].values())
    return [
        Claim(
            "this project", "its APGD is the authors'", f"verdicts that differ: {differ} of {n * len(found)} images",
            NOT_CONFIRMED if differ else CONFIRMED,
        ),
        Claim(
            "this project", "robustness here is not masked gradients",
            f"broken by Square alone: {sum(alone.values())} of {total}",
            CONFIRMED if sum(alone.values()) <= 0.005 * total else NOT_CONFIRMED,
        ),
        Claim(
            "this project", "training attacks in bfloat16 are as strong as in float32",
            f"at least {100 * weakest:.1f} % of the distance; "
            f"APGD accuracy, trained in bfloat16 less in float32: {gap} points",
            CONFIRMED if weakest >= 0.98 and gap.low <= 0 <= gap.high else NOT_CONFIRMED,
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    run(main)
