"""recipes/: a trainer accepts every file, makes a step with exactly its settings, and they are the papers'."""

import dataclasses
import importlib
import json
import math
import re
import shlex

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState

from tests.conftest import ROOT, flags
from tests.small_models import save_small_model
from tests.train_several import train
from utils.cli import parse_settings
from utils.training.optimization import accumulation_steps

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
README = (ROOT / "recipes/README.md").read_text()

# What a card calls the method, by the first part of the recipe's name.
METHODS = {
    "lore": "LORE", "fare": "FARE", "tecoa": "TeCoA", "tecoa-l2": "TeCoA + l2", "tecoa-kl": "TeCoA + KL",
    "dpo": "DPO (image tower)", "ipo": "IPO (image tower)", "kto": "KTO (image tower)", "ce": "CE (image tower)",
    "dpo-l2": "DPO + l2 (image tower)", "gender-head": "DPO (head)",
}  # fmt: skip
# What differs from lore_vit-b-32_imagenet-100, and nothing else does.
ABLATIONS = {
    "margin-fixed": {"margin": "fixed"},
    "multiplier-linear": {"multiplier": "linear"},
    "multiplier-scalar": {"multiplier": "scalar"},
    "primal-steps": {},
    "rho": {},
    "fare-equal-updates": {"constraint": "none"},
    "clean-weight": {"constraint": "none", "clean_weight": 1.0},
}
# The LORE paper's settings: encoder, data, eps, epochs, batch per device, rho.
PAPER = [
    ("vit-b-32", "imagenet", (1, 2), 2, 448, 0.1),
    ("vit-b-32", "imagenet", (4,), 3, 448, 0.1),
    ("vit-b-32", "imagenet", (6, 8, 10), 3, 448, 0.2),
    ("vit-b-32", "imagenet-100", (4,), 5, 448, 0.1),
    ("vit-b-32", "cifar10", (1, 2, 4), 5, 448, 0.01),
    ("vit-b-16", "imagenet-100", (2,), 5, 128, 0.1),
    ("vit-b-16", "imagenet-100", (4, 8), 5, 128, 0.2),
    ("vit-b-32-laion", "imagenet-100", (2, 4, 8), 5, 448, 0.15),
    ("convnext-b", "imagenet-100", (2, 4, 8), 5, 64, 0.15),
    ("dinov2-s", "imagenet", (4, 8, 16), 2, 128, 0.05),
    ("dinov2-b", "imagenet", (4, 8, 16), 1, 64, 0.1),
]


def name_of(path):
    return path.stem


def trainer_of(text):
    """The script that a recipe's first line names, without its ending."""
    return re.match(r"# (train_\w+)\.py: ", text)[1]


def settings_of(name, *words):
    path = ROOT / "recipes" / f"{name}.yaml"
    script = importlib.import_module(trainer_of(path.read_text()))
    return parse_settings(script.Settings, ["--config", str(path), *words])


def commands_in(text):
    """[(trainer, recipe, [further flags]), ...] of the commands in a recipe's comment or in Markdown."""
    lines = text.replace("\\\n", " ")
    found = re.findall(r"(train_\w+)(?:\.py|\.sbatch)\s+--config recipes/([\w-]+)\.yaml([^\n`]*)", lines)
    return [(trainer, name, shlex.split(rest.split(" # ")[0].rstrip(" ."))) for trainer, name, rest in found]


def stand_in(recipe, folder):
    """The directory of a tiny model of the kind that a recipe starts from, made once in ``folder``."""
    name = recipe["model_name_or_path"]
    # The models that recipes name, by a part of their names; what is not among these is a CLIP.
    parts = {"siglip": "siglip", "dinov2": "dinov2_head", "convnext": "convnext"}
    kind = next((kind for part, kind in parts.items() if part in name), "clip")
    assert kind == "clip" or "clip-vit" not in name.lower()
    if not (folder / kind).exists():
        save_small_model(folder / kind, kind)
    return folder / kind


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("stand-ins")


def test_the_table_names_every_recipe_once_with_its_batch():
    names = re.findall(r"^\| `([\w-]+_[\w-]+)` \|", README, flags=re.MULTILINE)
    assert sorted(names) == sorted(path.stem for path in RECIPES)
    assert len(names) == len(set(names)) >= 35
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if cells[1:2] and cells[1].strip("`") in names:
            settings = settings_of(cells[1].strip("`"))
            assert int(cells[6]) == settings.global_batch_size, line
            if settings.max_steps is None:
                assert f"{settings.epochs} epoch" in cells[5], line


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_says_what_it_is(path):
    text = path.read_text()
    recipe, settings = yaml.safe_load(text), settings_of(path.stem)
    data = path.stem.rsplit("_", 1)[1]
    assert not {"eps", "rho", "gradient_accumulation_steps", "cache_dir", "report_to"} & recipe.keys()
    assert recipe["train_shards"] == f"data/{data}/train"
    assert recipe["output_dir"] == f"runs/{path.stem}"
    comment = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert re.search(r"^# Aim( \(|: )", comment, flags=re.MULTILINE)

    gpus, per_device, accumulation = map(
        int, re.search(r"^global_batch_size: \d+  # (\d+) GPUs x (\d+) x (\d+)$", text, flags=re.MULTILINE).groups()
    )
    assert per_device == settings.per_device_train_batch_size
    assert accumulation == accumulation_steps(settings.global_batch_size, per_device, gpus)
    for fewer in (1, 2, 4):
        accumulation_steps(settings.global_batch_size, per_device, fewer)

    commands = commands_in(comment)
    assert commands
    for trainer, name, words in commands:
        assert (trainer, name) == (trainer_of(text), path.stem)
        settings_of(name, *words)
    output_dirs = [settings_of(name, *words).output_dir for _, name, words in commands]
    assert len(set(output_dirs)) == len(output_dirs)


def test_every_row_of_the_papers_settings_has_its_command():
    for encoder, data, radii, epochs, per_device, rho in PAPER:
        for method in ("lore", "fare"):
            name = f"{method}_{encoder}_{data}"
            commands = commands_in((ROOT / "recipes" / f"{name}.yaml").read_text())
            by_eps = {settings.eps: settings for settings in (settings_of(name, *words) for *_, words in commands)}
            for eps in radii:
                settings = by_eps[eps]
                assert (settings.epochs, settings.per_device_train_batch_size) == (epochs, per_device), (name, eps)
                assert settings.global_batch_size == 8 * per_device
                assert method == "fare" or settings.rho == rho, (name, eps)
                assert (settings.learning_rate, settings.weight_decay, settings.warmup_steps) == (1e-5, 1e-4, 0)
                assert (settings.attack_steps, settings.attack_step_size, settings.attack_momentum) == (10, None, 0)
                assert (settings.optimizer, settings.dual_learning_rate) == ("adamw", 5e-4)
                assert settings.primal_steps == (5 if method == "lore" else 1)
                assert settings.constraint == ("embedding" if method == "lore" else "none")


def test_siblings_differ_in_what_is_compared_and_in_nothing_else():
    """FARE and ablations from LORE, preferences from DPO: another batch or rate would decide the comparison."""
    rhythm = {"output_dir", "eval_steps", "checkpoint_steps", "logging_steps"}

    def differences(name, other):
        one, two = (dataclasses.asdict(settings_of(each)) for each in (name, other))
        return {key: one[key] for key in one if one[key] != two[key] and key not in rhythm}

    lore = "lore_vit-b-32_imagenet-100"
    for encoder, data in {row[:2] for row in PAPER}:
        expected = {"constraint": "none", "primal_steps": 1}
        assert differences(f"fare_{encoder}_{data}", f"lore_{encoder}_{data}") == expected
    for what, expected in ABLATIONS.items():
        assert differences(f"ablation_{what}_vit-b-32_imagenet-100", lore) == expected
    assert {path.stem.split("_")[1] for path in RECIPES if path.stem.startswith("ablation_")} == ABLATIONS.keys()
    supervised = {"objective": "tecoa", "epochs": 15}
    for method, own in {
        "tecoa": {"constraint": "none", "primal_steps": 1},
        "tecoa-l2": {},
        "tecoa-kl": {"constraint": "kl"},
    }.items():
        assert differences(f"{method}_vit-b-32_imagenet-100", lore) == supervised | own
    for preference, own in {"ipo": {"beta": 0.01}, "kto": {"beta": 1.5}, "ce": {}}.items():
        found = differences(f"{preference}_typographic_vit-b-32_imagenet-100", "dpo_typographic_vit-b-32_imagenet-100")
        assert found == {"preference": preference} | own
    constrained = differences("dpo-l2_typographic_vit-b-32_imagenet-100", "dpo_typographic_vit-b-32_imagenet-100")
    assert constrained == {"constraint": "embedding"}


def test_the_commands_of_the_documents_are_accepted():
    found = 0
    documents = [ROOT / "recipes/README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "slurm").glob("*.sbatch")]
    for path in documents:
        for trainer, name, words in commands_in(path.read_text()):
            found += 1
            settings_of(name, *words)
            if not trainer.startswith(("train_single", "train_multi", "train_rho")):
                assert trainer == trainer_of((ROOT / "recipes" / f"{name}.yaml").read_text()), path
    assert found >= 8


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_makes_a_step_with_its_settings(path, models, digits, attribute_digits, tmp_path_factory, tmp_path):
    text = path.read_text()
    recipe, trainer = yaml.safe_load(text), trainer_of(text)
    pairs = attribute_digits / "pairs"
    train_shards, eval_shards = (
        (pairs / "train", pairs / "val") if "pairs" in recipe.values() else (digits / "train", digits / "test")
    )
    changed = {
        "model_name_or_path": stand_in(recipe, models), "train_shards": train_shards, "eval_shards": eval_shards,
        "output_dir": tmp_path / "run", "cache_dir": tmp_path_factory.getbasetemp() / "recipes-cache",
        "global_batch_size": 4, "per_device_train_batch_size": 2, "max_steps": 1, "eval_num_samples": 4,
        "num_workers": 0, "report_to": "none",
    }  # fmt: skip
    if trainer == "train_lore":
        changed["attack_steps"] = 2
    else:
        changed["train_num_samples"] = 16
    try:
        assert train(trainer, ["--config", str(path), *flags(changed)]) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["samples"]) for row in rows] == [(0, 0), (1, 4)]
    assert rows[0].pop("launch")["num_processes"] == 1
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[1].keys() >= {"loss", "grad_norm"}
    assert any(name.startswith("eval_accuracy") or name == "eval_pair_accuracy" for name in rows[1])

    # The card shows the settings that the run had: the recipe's own, as the file has them.
    card = (tmp_path / "run/README.md").read_text()
    shown = dict(re.findall(r"^\| (\w+) \| (.*) \|$", card, flags=re.MULTILINE))
    for key in recipe.keys() - changed.keys():
        assert same(shown[key], recipe[key]), key
    assert (shown["global_batch_size"], shown["gradient_accumulation_steps"]) == ("4", "2")
    method = path.stem.split("_")[0]
    if method != "ablation":
        assert f"# {METHODS[method]} from " in card


def same(cell, value):
    """Whether a cell of a card is a recipe's value."""
    try:
        return float(cell) == float(value)
    except (TypeError, ValueError):
        return cell == str(value)
