"""Preference optimisation: the typographic table, beta and the weight of the KL, and a concept controlled by a head.

  python examples/make_attribute_shards.py --output_dir runs/attributes
  python benchmarks/preferences.py --model examples/reading_clip --data runs/attributes --pairs runs/attributes/pairs \\
    --seeds 0 1 2 --output_dir runs/preferences

Has the runs, evaluation and settings of compare_preferences.py, and the same runs at multiples of each method's beta
and weight of the KL. With --pairs, also trains a head on pairs of texts for every seed and measures over t how often it
chooses the preferred text on test pairs, and its accuracy on the set.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import compare_preferences, evidence
from benchmarks.compare_preferences import FIGURES, HEADINGS, evaluation_command, read_figures, train_command
from benchmarks.comparison import (
    COMMANDS,
    START,
    NumbersSettings,
    as_in_results,
    claim_directory,
    in_parallel,
    launcher,
    what_flag,
    words,
)
from benchmarks.evidence import CONFIRMED, NOT_CONFIRMED, Claim, Numbers, Table, difference, verdict
from utils.cli import flag, parse_settings, run
from utils.evaluation.figures import line_style

KEYS = ["original", "typographic", "follows", "kl"]


@dataclass
class Settings(NumbersSettings, compare_preferences.Settings):
    pairs: str | None = what_flag(None, "train/, val/ and test/ of pairs, for the head (default: no head)", path=True)
    beta_factors: list[float] = flag([0.1, 0.3, 3.0], "multiples of beta", group="curves", above=0)
    reg_factors: list[float] = flag([0.0, 0.3, 3.0], "multiples of the weight of the KL", group="curves", minimum=0)
    head_beta: float = flag(0.05, "beta of the head", group="head", above=0)
    head_epochs: int = flag(10, "passes over the pairs", group="head", minimum=1)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    output_dir = Path(settings.output_dir)
    free = {
        "seeds",
        "preferences",
        "numbers_dir",
        "numbers_name",
        "pairs",
        "beta_factors",
        "reg_factors",
        "output_dir",
        "num_samples",
        "jobs",
    }
    kept = {name: value for name, value in vars(settings).items() if name not in free and not name.startswith("eval_")}
    settings.model, settings.data = as_in_results(settings.model), as_in_results(settings.data)
    claim_directory(output_dir, kept)
    variants = make_variants(settings)
    runs = {
        variant: [output_dir / f"{preference}_beta-{beta:g}_reg-{reg:g}_seed-{seed}" for seed in settings.seeds]
        for variant in variants
        for preference, beta, reg in [variant]
    }
    commands = [
        train_command(settings, preference, seed, folders[place], beta, reg)
        for place, seed in enumerate(settings.seeds)
        for (preference, beta, reg), folders in runs.items()
        if not (folders[place] / "model.safetensors").exists()
    ]
    in_parallel(settings.jobs, commands, log=output_dir / COMMANDS)
    models = [str(folder) for folders in runs.values() for folder in folders]
    in_parallel(settings.jobs, [evaluation_command(settings, [settings.model, *models])], log=output_dir / COMMANDS)
    values = read_figures(settings, output_dir)
    found: dict = {"methods": {}, "head": None}
    for name in settings.eval_data or [settings.data]:
        of = found["methods"][Path(name).name] = {}
        for variant, names in {(START, 1.0, 1.0): [settings.model], **runs}.items():
            of["{} {:g} {:g}".format(*variant)] = {
                key: [values[str(model), name, *figure] for model in names] for key, figure in zip(KEYS, FIGURES)
            }
    folders = [*models, output_dir / "eval"]
    if settings.pairs is not None:
        heads, found["head"] = measure_head(settings)
        folders += [*heads, output_dir / "eval-head"]
    evidence.show(tables(evidence.write_numbers(settings, folders, found)))


def make_variants(settings: Settings) -> list[tuple[str, float, float]]:
    """(preference, multiple of its beta, multiple of its KL weight); cross-entropy has no beta."""
    variants = []
    for preference in settings.preferences:
        betas = [] if preference == "ce" else settings.beta_factors
        variants += [(preference, 1.0, 1.0), *((preference, beta, 1.0) for beta in betas)]
        variants += [(preference, 1.0, reg) for reg in settings.reg_factors]
    return list(dict.fromkeys(variants))


def measure_head(settings: Settings) -> tuple[list[Path], dict]:
    """Trains a head for each seed and measures it over t."""
    output_dir = Path(settings.output_dir)
    heads = [output_dir / f"head_seed-{seed}" for seed in settings.seeds]
    common = {
        "model_name_or_path": settings.model, "task": "pairs", "trainable": "head",
        "train_shards": f"{settings.pairs}/train", "eval_shards": f"{settings.pairs}/val",
        "beta": settings.head_beta, "learning_rate": 1e-2, "epochs": settings.head_epochs, "logging_steps": 40,
        "checkpoint_steps": 0, "num_workers": 0, "report_to": "none", "resume_from_checkpoint": "latest",
    }  # fmt: skip
    commands = [
        [*launcher("train_po.py"), *words(common | {"seed": seed, "output_dir": folder})]
        for seed, folder in zip(settings.seeds, heads)
        if not (folder / "model.safetensors").exists()
    ]
    in_parallel(settings.jobs, commands, log=output_dir / COMMANDS)
    asked = {
        "model": list(map(str, heads)), "data": [settings.pairs, settings.data], "measure": "head_t",
        "fonts": settings.eval_fonts, "word_place": settings.eval_word_place, "word_kind": settings.word_kind,
        "word_size_min": settings.eval_word_size_min, "word_size_max": settings.eval_word_size_max,
        "num_workers": 0, "output_dir": output_dir / "eval-head",
    }  # fmt: skip
    samples = {} if settings.num_samples is None else {"num_samples": settings.num_samples}
    in_parallel(
        settings.jobs, [[*launcher("evaluate.py", settings.jobs), *words(asked | samples)]], log=output_dir / COMMANDS
    )
    cells = json.loads((output_dir / "eval-head/results.json").read_text(encoding="utf-8"))["results"]
    cells = [cell for cell in cells if cell["settings"]["num_samples"] == settings.num_samples]

    def curves(measure: str, attack: str, data: str) -> dict[float, list[float]]:
        """t -> a value for each head."""
        at: dict[float, list[float]] = {}
        for head in map(str, heads):
            asked = {"model": head, "measure": measure, "attack": attack, "dataset": data}
            for cell in cells:
                if asked.items() <= cell.items() and "t" in cell["settings"]:
                    at.setdefault(cell["settings"]["t"], []).append(cell["value"])
        return dict(sorted(at.items()))

    pairs = as_in_results(settings.pairs)
    flipped, right = curves("pair_accuracy", "typographic", pairs), curves("accuracy", "clean", settings.data)
    neutral = [
        next(c["value"] for c in cells if (c["model"], c["measure"]) == (str(head), "neutral_t")) for head in heads
    ]
    return heads, {
        "t": list(right),
        "flipped": [list(of) for of in zip(*flipped.values())],
        "right": [list(of) for of in zip(*right.values())],
        "neutral_t": neutral,
    }


def tables(numbers: Numbers) -> list[Table]:
    settings, found = numbers["settings"], numbers["results"]
    made = []
    for name, of in found["methods"].items():
        rows = [["", *HEADINGS]]
        for preference in [START, *settings["preferences"]]:
            rows.append(
                [preference.upper() if preference != START else START, *_cells(of[f"{preference} 1 1"], settings)]
            )
        made.append((f"{name}: accuracy in %, {settings['steps']} steps of {settings['batch_size']} images", rows))
    of = next(iter(found["methods"].values()))
    for what, place in (("beta", 1), ("weight of the KL", 2)):
        rows = [["", f"{what}, x its own", *HEADINGS]]
        for key in of:
            preference, factors = key.rsplit(" ", 2)[0], key.rsplit(" ", 2)
            if preference != START and factors[3 - place] == "1" and not (preference == "ce" and place == 1):
                rows.append([preference.upper(), factors[place], *_cells(of[key], settings)])
        rows[1:] = sorted(rows[1:], key=lambda row: (settings["preferences"].index(row[0].lower()), float(row[1])))
        made.append((what[0].upper() + what[1:], rows))
    if found["head"]:
        head = found["head"]
        stars = " / ".join(f"{t:g}" for t in head["neutral_t"])
        at = {"t = 0": 0.0, f"t* = {stars}": None, "t = 1": 1.0}
        rows = [["", *at]]
        for text, key in [("the other text over the right one", "flipped"), ("right on the set", "right")]:
            rows.append([text, *(evidence.number(_at(head, key, t), 1, 100) for t in at.values())])
        made.append(("A concept over t, in %", rows))
    return made


def _cells(of: dict[str, list[float]], settings: dict) -> list[str]:
    n = settings["num_samples"]
    shares = [evidence.share(of[key], n) if n else evidence.number(of[key], 1, 100) for key in KEYS[:3]]
    return [*shares, evidence.number(of["kl"], 3)]


def _at(head: dict, key: str, t: float | None) -> list[float]:
    """Values at t, one per seed; for None, at each seed's neutral t*."""
    places = [head["t"].index(star if t is None else t) for star in head["neutral_t"]]
    return [curve[place] for curve, place in zip(head[key], places)]


def draw(numbers: Numbers) -> Figure:
    settings, found = numbers["settings"], numbers["results"]
    of = next(iter(found["methods"].values()))
    figure, axes = evidence.new_figure(3 if found["head"] else 2, height=3.6)
    for axis, (what, place) in zip(axes, (("beta", 1), ("weight of the KL", 2))):
        for index, preference in enumerate(settings["preferences"]):
            keys = [key for key in of if key.startswith(f"{preference} ") and key.split()[3 - place] == "1"]
            keys.sort(key=lambda key: float(key.split()[place]))
            points = [[100 * statistics.mean(of[key][name]) for key in keys] for name in ("original", "typographic")]
            axis.plot(*points, **line_style(index), label=preference.upper())
            for key, x, y in zip(keys, *points):
                axis.annotate(key.split()[place], (x, y), xytext=(3, 3), textcoords="offset points", fontsize=6)
        axis.set(title=f"{what}, x its own", xlabel="original images, %", ylabel="with wrong words, %")
        axis.legend(fontsize=7, frameon=False)
    if found["head"]:
        head = found["head"]
        for place, (key, label) in enumerate(
            [("flipped", "the other text over the right one"), ("right", "right on the set")]
        ):
            evidence.draw_spread(
                axes[2], head["t"], [[100 * value for value in curve] for curve in head[key]], place, label
            )
        for star in head["neutral_t"]:
            axes[2].axvline(star, color="black", linewidth=0.7, linestyle=":")
        axes[2].set(title="a head, dotted: t*", xlabel="t", ylabel="%")
        axes[2].legend(fontsize=7, frameon=False)
    return figure


def claims(numbers: Numbers) -> list[Claim]:
    settings, found = numbers["settings"], numbers["results"]
    of = next(iter(found["methods"].values()))
    n = settings["num_samples"] or 400
    rows = []
    start = {key: values * len(settings["seeds"]) for key, values in of[f"{START} 1 1"].items()}
    methods = {preference: of[f"{preference} 1 1"] for preference in settings["preferences"]}
    ours = [preference for preference in methods if preference != "ce"]
    gains = {preference: difference(methods[preference]["typographic"], start["typographic"], n) for preference in ours}
    rows.append(
        Claim(
            "CLIP-PO", "preference optimisation resists written words",
            "typographic, less the start model: " + _list(gains),
            CONFIRMED if {verdict(gain) for gain in gains.values()} == {CONFIRMED} else NOT_CONFIRMED,
        )
    )  # fmt: skip
    if "ce" in methods:
        gaps = {p: difference(methods[p]["typographic"], methods["ce"]["typographic"], n) for p in ours}
        rows.append(
            Claim(
                "CLIP-PO", "it beats cross-entropy on attacked images (said of single sets)",
                "typographic, less CE: " + _list(gaps),
                CONFIRMED if {verdict(gap) for gap in gaps.values()} == {CONFIRMED} else NOT_CONFIRMED,
            )
        )  # fmt: skip
        kls = {p: difference(methods["ce"]["kl"], methods[p]["kl"], None, 1.0) for p in ours}
        said = "KL to the start, nats: " + ", ".join(
            f"{p.upper()} {evidence.number(m['kl'], 3)}" for p, m in methods.items()
        )
        kept = [p.upper() for p, gap in kls.items() if verdict(gap) == CONFIRMED]
        rows.append(
            Claim(
                "CLIP-PO",
                "it keeps more of the original model than cross-entropy",
                said,
                evidence.at_all(kept, ours, "by"),
            )
        )
    if found["head"]:
        head = found["head"]
        zero, star, one_t = (statistics.mean(_at(head, "flipped", t)) for t in (0.0, None, 1.0))
        task = difference(_at(head, "right", None), _at(head, "right", 0.0), n)
        rows.append(
            Claim(
                "CLIP-PO", "t turns a concept after training: original at 0, reversed at 1",
                f"the other text chosen: {100 * zero:.1f} % at 0, {100 * one_t:.1f} % at 1",
                CONFIRMED if zero < 0.1 and one_t > 0.9 else NOT_CONFIRMED,
            )
        )  # fmt: skip
        rows.append(
            Claim(
                "CLIP-PO", "between them is a neutral t* that keeps the task (coloured digits in place of gender)",
                f"the other text at t*: {100 * star:.1f} %; accuracy at t* less the original's: {task} points",
                CONFIRMED if abs(star - 0.5) < 0.1 and task.mean > -2 else NOT_CONFIRMED,
            )
        )  # fmt: skip
    return rows


def _list(gaps: dict) -> str:
    return ", ".join(f"{preference.upper()} {gap}" for preference, gap in gaps.items())


if __name__ == "__main__":
    run(main)
