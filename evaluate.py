"""Measures vision encoders, mostly CLIP, on labelled sets and on preference pairs, clean and under attack.

  python evaluate.py --model runs/lore4 runs/fare4 openai/clip-vit-base-patch32 \\
    --data clip-benchmark/wds_cifar10 data/caltech101 --attack clean apgd gaussian_noise typographic --eps 1 2 4 \\
    --num_samples 1000 --output_dir runs/eval

A model is an id of the hub, a directory, or a file of weights and its CLIP, NAME@BASE: docs/encoders.md has them all.
Prints tables and writes report.html, results.json, benchmark.csv and a record of every sample. A data set is a
directory or a set of the hub with classnames.txt and <split>/*.tar; or preference pairs: attack/*.tar and clean/*.tar,
<split>/*.tar, or pictures named label=X_text=Y; or the published files of CIFAR-10-C or ImageNet-C. Finished figures
are not measured again. `accelerate launch` splits the images between processes; the figures do not change.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from utils.cli import flag, launched_rank, parse_settings, required, run
from utils.data.digests import shards_digest, side_by_side
from utils.data.images import MAX_OUTPUT_SIDE
from utils.data.shards import ShardReader
from utils.data.skipped import BadSample
from utils.data.sources import default_cache_dir, hub_set, known_path
from utils.errors import UserError
from utils.evaluation.attacks import ATTACKS
from utils.evaluation.measures import draw_retrieved, find_revisions, measure, wanted_jobs
from utils.evaluation.results import Cell, Results, file_name, refuse_unwritable, short_names
from utils.evaluation.trial import EvalSet, Model, Trial
from utils.methods.head import load_head
from utils.models.encoders import make_encoder
from utils.models.hub import fetch_model, find_config, folder_on_every_node, on_this_node
from utils.models.published import (
    BASE_MODEL_HELP,
    CONTRASTIVE_MODEL_TYPES,
    IMAGE_SIZE_HELP,
    MODEL_TYPES,
    PROCESSOR_HELP,
    ModelName,
    check_processor,
    has_own_head,
    has_text,
    image_transform,
    load_model,
    model_name,
)
from utils.processes.distributed import everywhere, from_main_process, on_every_node, start_accelerator
from utils.processes.launch import launch_settings
from utils.sets.corruptions import CORRUPTIONS, KNOWN, SEVERITIES, PublishedCorruptions, find_published
from utils.sets.labelled import (
    classes_without_samples,
    imagenet_prompts,
    open_set,
    read_classnames,
    read_templates,
    same_classes,
    warn_of_twins,
)
from utils.sets.pairs import pack_pair_folder
from utils.sets.typographic import KINDS, PLACES, word_style
from utils.training.checkpoint import take_output_dir
from utils.training.prefetch import prefetch_models, say_where

MEASURES = ("accuracy", "interpretability", "fidelity", "retention", "fairness", "head_t")
CLASSIFIERS = ("zero_shot", "linear_head", "linear_probe", "knn")
LEARNT = ("linear_probe", "knn")  # classifiers learnt from --train_split
FONTS = ["DejaVuSans", "DejaVuSerif", "DejaVuSansMono"]
DEFAULT_TS = [round(-0.5 + 0.025 * step, 3) for step in range(71)]  # -0.5 ... 1.25
RECORDED = ("device", "num_processes", "num_machines")  # of the launch, in results.json
DAYS_OF_PATIENCE = 7  # a process whose images are all robust may finish long after the others

logger = logging.getLogger(__name__)


@dataclass
class Settings:
    """All settings of an evaluation; docs/evaluation.md has the details."""

    # fmt: off
    model: list[str] = required("ids, directories or files, or NAME@BASE", group="what", path=True, many=True)
    base_model: str | None = flag(None, BASE_MODEL_HELP, group="what", path=True)
    processor: str | None = flag(None, PROCESSOR_HELP, group="what", path=True)
    image_size: int | None = flag(None, IMAGE_SIZE_HELP, group="what", minimum=1, maximum=MAX_OUTPUT_SIDE)
    data: list[str] = required("directories or sets of the hub, see above", group="what", path=True, many=True)
    split: str = flag("test", "folder of each data set that is read", group="what")
    num_samples: int | None = flag(None, "the first N samples of each set (default: all)", group="what", minimum=1)
    classnames: str | None = flag(None, "file of names, or imagenet (default: the set's)", group="what", path=True)
    measure: list[str] = flag(["accuracy"], "see docs/evaluation.md", group="what", choices=MEASURES)
    classifier: str = flag("zero_shot", "by texts, a file, or learnt", group="what", choices=CLASSIFIERS)
    linear_head: str | None = flag(None, "safetensors (default: the model's own head)", group="what", path=True)
    train_split: str = flag("train", "folder from which a linear probe or k-NN learns", group="what")
    train_num_samples: int | None = flag(None, "the first N samples of it (default: all)", group="what", minimum=1)

    attack: list[str] = flag(["clean"], "what is done to images", group="attack", choices=tuple(ATTACKS))
    eps: list[float] = flag([4.0], "radii of the l_inf attacks, in 1/255", group="attack", above=0, maximum=255)
    attack_dtype: str = flag("float32", "where gradients are followed", group="attack", choices=("float32", "bfloat16"))
    apgd_steps: int = flag(100, "steps of each run of APGD", group="attack", minimum=1)
    apgd_targets: int = flag(9, "APGD-T: so many of the likeliest other classes", group="attack", minimum=1)
    square_queries: int = flag(5000, "Square: forwards for an image that holds out", group="attack", minimum=1)
    attack_steps: int = flag(10, "PGD steps", group="attack", minimum=1)
    attack_step_size: float | None = flag(None, "PGD step, in 1/255 (default: eps/4)", group="attack", above=0)
    sigma: list[float] = flag([8.0, 16.0, 32.0, 64.0], "noise, in 1/255", group="attack", above=0, maximum=255)
    corruptions: list[str] = flag(list(CORRUPTIONS), "ImageNet-C's", group="attack", choices=KNOWN)
    severities: list[int] = flag(list(SEVERITIES), "of the corruptions", group="attack", minimum=1, maximum=5)
    seed: int = flag(0, "of the random starts, the noise and the words", group="attack", minimum=0, maximum=2**32 - 1)

    fonts: list[str] = flag(FONTS, "of matplotlib, Aileron, or .ttf files", group="words", path=True)
    word_size_min: float = flag(20.0, "smallest letters, in pixels at an image side of 224", group="words", above=0)
    word_size_max: float = flag(40.0, "largest letters, in the same unit", group="words", above=0)
    word_kind: str = flag("outlined", "coloured, or black on a white label", group="words", choices=KINDS)
    word_place: str = flag("anywhere", "half of the image that words are written in", group="words", choices=PLACES)

    reference_model_name_or_path: str | None = flag(None, "for retention and fidelity", group="measure", path=True)
    top_k: int = flag(100, "fairness: K of MaxSkew@K, smaller than the set", group="measure", minimum=1)
    t: list[float] = flag(DEFAULT_TS, "head_t: strengths, with 0 and 1", group="measure", minimum=-10, maximum=10)
    val_split: str = flag("val", "head_t: folder of the pairs on which the neutral t* is chosen", group="measure")
    query: list[str] = flag([], "texts whose best images are shown in retrieval_<set>.png", group="measure")
    task_tolerance: float = flag(0.02, "head_t: accuracy that t* may cost", group="measure", minimum=0, maximum=1)

    output_dir: str = required("for report.html, results.json, records/, pictures/", group="run", path=True)
    batch_size: int = flag(128, "images per process and batch", group="run", minimum=1)
    num_workers: int | None = flag(None, "data workers per process (default: by cores, to 8)", group="run", minimum=0)
    cache_dir: str | None = flag(None, "shard indexes, sets of the hub (default: the system's)", group="run", path=True)
    max_bad_fraction: float = flag(0.01, "share of bad samples that is accepted", group="run", minimum=0, maximum=1)
    prefetch: bool = flag(False, "bring models and sets into the caches and stop; see docs/offline.md", group="run")
    # fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, description=__doc__)
    check_settings(settings)
    if settings.prefetch:
        return prefetch(settings)
    accelerator = start_accelerator(seed=settings.seed, days_of_patience=DAYS_OF_PATIENCE)
    from_main_process(accelerator, lambda: refuse_unwritable(settings.output_dir))
    on_every_node(accelerator, lambda: check_models(settings))

    # 1. List the figures asked for. Digests of models and sets identify them, before any weights are read.
    sets = {name: open_everywhere(settings, accelerator, name) for name in settings.data}
    content = {name: contents(settings, accelerator, data) for name, data in sets.items()}
    revisions = from_main_process(accelerator, lambda: find_revisions(settings))
    from_main_process(accelerator, lambda: refuse_unlearnt_classes(settings, sets))
    jobs = {
        (model, name): wanted_jobs(settings, revisions, content[name], model, name, data)
        for model in settings.model
        for name, data in sets.items()
    }
    for name, data in sets.items():
        if not jobs[settings.model[0], name]:
            raise nothing_to_measure(settings, name, data)
    from_main_process(accelerator, lambda: take_output_dir(settings.output_dir))
    launch = {name: str(value) for name, value in launch_settings(accelerator).items() if name in RECORDED}
    launch["precision"] = "float32"  # of all figures, whatever the accelerate config says
    results = from_main_process(accelerator, lambda: Results(settings.output_dir, launch))
    asked = [cell for of_set in jobs.values() for job in of_set for cell in job.cells]
    for line in results.ask(asked):
        if accelerator.is_main_process:
            logger.warning(line)

    # 2. Measure the figures that are still missing, model by model and set by set. Write results.json after every job.
    reference = None
    for name in settings.model:
        missing = {
            set_name: [job for job in jobs[name, set_name] if any(results.find(cell) is None for cell in job.cells)]
            for set_name in sets
        }
        if not any(missing.values()):
            continue
        model = load(settings, name, accelerator, "--model")
        if reference is None and {"retention", "fidelity"} & set(settings.measure):
            compared_with = settings.reference_model_name_or_path
            reference = load(settings, compared_with, accelerator, "--reference_model_name_or_path")
        for set_name, set_jobs in missing.items():
            trial = Trial(settings, accelerator, model, sets[set_name], reference)
            for job in set_jobs:
                for finding in measure(trial, job):
                    if results.find(finding.cell) is None:  # part of a job may be known, at other values of t
                        results.add(finding.cell, finding.value, finding.interval, finding.n)
                    if accelerator.is_main_process:
                        results.keep(finding)
                if accelerator.is_main_process:
                    results.write()

    # 3. Compare the models; write pictures, report and tables.
    if accelerator.is_main_process:
        results.compare()
        results.write()
    try:
        for set_name, data in sets.items():
            if settings.query and data.labelled and data.published is None:
                models = (load(settings, name, accelerator, "--model") for name in settings.model)
                trials = (Trial(settings, accelerator, model, data) for model in models)
                path = results.output_dir / f"retrieval_{file_name(short_names(sets)[set_name])}.png"
                draw_retrieved(trials, set_name, path, results)
    finally:  # the figures are shown even if a picture fails
        if accelerator.is_main_process:
            show(settings, results, asked)
    accelerator.end_training()


def show(settings: Settings, results: Results, asked: Sequence[Cell]) -> None:
    """Writes the report, then prints the tables, even if the report fails."""
    from utils.evaluation.report import print_tables, write_report

    try:
        written = write_report(settings.output_dir, results.undrawn)
    finally:
        print_tables(results, asked)
    print(f"{written} written")


# Settings and models, checked before anything is read


def check_settings(settings: Settings) -> None:
    """Tidies the settings. Raises ``UserError`` for mistakes that show before anything is read."""
    settings.model, settings.data = ([tidy(name) for name in names] for names in (settings.model, settings.data))
    for name in ("model", "data", "measure", "attack", "eps", "sigma", "corruptions", "severities", "query"):
        setattr(settings, name, list(dict.fromkeys(getattr(settings, name))))  # a value named twice is measured once
    settings.t = sorted({*settings.t, 0.0, 1.0})
    word_style(settings)
    settings.query = [valid_text(query, "--query", "which no tokenizer takes") for query in settings.query]
    for name in (*settings.model, settings.reference_model_name_or_path):
        valid_text(name or "", "--model", "which safetensors does not open")
    compared = [name for name in ("retention", "fidelity") if name in settings.measure]
    if compared and not settings.reference_model_name_or_path:
        raise UserError(
            f"--measure {compared[0]}: compared with what? name the original model with --reference_model_name_or_path"
        )
    kind, linear_head = settings.classifier, settings.linear_head
    by_text = [name for name in settings.measure if name not in ("accuracy", "fidelity")]
    by_text += [name for name in settings.attack if name == "typographic"] + ["--query"] * bool(settings.query)
    if kind != "zero_shot" and by_text:
        raise UserError(
            f"--classifier {kind}: {by_text[0]} goes by texts; measure it in a call of its own by zero_shot"
        )
    if kind != "linear_head" and linear_head is not None:
        raise UserError(
            f"--classifier {kind} and --linear_head {linear_head} do not go together; give --classifier linear_head"
        )
    if kind not in LEARNT and settings.train_num_samples is not None:
        raise UserError(
            f"--train_num_samples {settings.train_num_samples}: --classifier {kind} learns from no images; give "
            "--classifier linear_probe or knn, or leave it out"
        )
    if linear_head is not None and not Path(linear_head).is_file():
        raise UserError(f"--linear_head {linear_head}: no such file; expected safetensors with weight (C, D)")
    for attack in settings.attack:
        if kind == "knn" and ATTACKS[attack].follows_gradients:
            raise UserError(
                f"--attack {attack}: nearest neighbours have no gradient worth following, the figure would be too "
                "high; use --classifier linear_probe, or square"
            )
        package = ATTACKS[attack].package
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"--attack {attack}: needs the package {package}; pip install {package}")


def valid_text(text: str, flag: str, why: str) -> str:
    """A text of the command line, read as UTF-8 whatever the locale. Raises ``UserError`` if it is not UTF-8."""
    try:
        text.encode()
        return text
    except UnicodeError:  # bytes that are not valid in the locale's encoding
        pass
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise UserError(f"{flag} {text}: not UTF-8, {why}; rename it or write it in UTF-8") from None


def tidy(name: str) -> str:
    """One name for a directory: ./runs/a/ becomes runs/a, so that its results are found again."""
    return os.path.normpath(name) if os.path.exists(name) else name


def named(settings: Settings, text: str) -> ModelName:
    """A model of the command line, with what completes it and the size of its images."""
    return model_name(text, settings.base_model, settings.processor, settings.image_size)


def named_models(settings: Settings) -> list[tuple[str, ModelName, tuple[str, ...]]]:
    """(flag, name, supported types) of every model."""
    models = [("--model", named(settings, text), MODEL_TYPES) for text in settings.model]
    if settings.reference_model_name_or_path is not None:
        kinds = CONTRASTIVE_MODEL_TYPES if "retention" in settings.measure else MODEL_TYPES
        models.append(("--reference_model_name_or_path", named(settings, settings.reference_model_name_or_path), kinds))
    return models


def check_models(settings: Settings) -> None:
    """Raises ``UserError`` for unsuitable configs, before any weights are downloaded."""
    for its_flag, name, kinds in named_models(settings):
        here, config = find_config(name, its_flag, kinds)
        if config is not None:
            check_processor(here, config, its_flag)
        if its_flag != "--model" or config is None:
            continue
        if not has_text(config) and settings.classifier == "zero_shot":
            raise UserError(
                f"--model {name}: a {config.model_type} has no text tower, which --classifier zero_shot needs; give "
                "--classifier linear_probe or knn, or --classifier linear_head with a --linear_head file"
            )
        if settings.classifier == "linear_head" and settings.linear_head is None and not has_own_head(config):
            raise UserError(
                f"--classifier linear_head: --model {name}, a {config.model_type}, brings no head of its own; give "
                "it a file with --linear_head"
            )
        if "head_t" in settings.measure:
            load_head(here.path)


def prefetch(settings: Settings) -> None:
    """Downloads models and sets, and prints where they are. Only the first process works; the others return."""
    if launched_rank() > 0:
        return
    check_models(settings)
    lines = []
    for name in settings.data:
        folder = data_folder(settings, name)
        opened = open_data(settings, name, folder)
        samples = ", ".join(f"{part.index.num_samples} samples in {split}" for split, part in opened.splits.items())
        lines.append(f"{name}: {samples or 'published corruptions'}, in {folder.resolve()}")
    say_where(prefetch_models(named_models(settings)) + lines, settings.cache_dir)


def load(settings: Settings, text: str, accelerator: Accelerator, flag: str) -> Model:
    """A model in float32, whatever precision the accelerate config sets: all figures are measured in float32."""
    name = fetch_model(accelerator, named(settings, text), flag)
    model, processor = everywhere(accelerator, lambda: load_model(name, flag))
    encoder = make_encoder(model, processor).to(accelerator.device).eval()
    loaded = Model(text, encoder, image_transform(processor), accelerator.device)
    if has_text(model.config):
        loaded.clip, loaded.processor = model, processor
    if has_own_head(model.config):
        loaded.with_head = model
    return loaded


# Data sets


def data_folder(settings: Settings, name: str, local_files_only: bool = False) -> Path:
    """The directory of a set. A set of the hub is downloaded first, unless ``local_files_only``."""
    folder = Path(known_path(name))
    if folder.is_dir():
        return folder
    if folder.exists() or name.count("/") < 1 or name.startswith(("/", ".")):
        raise UserError(
            f"--data {name}: no such directory; expected a data set with classnames.txt and {settings.split}/, or the "
            "name of one on the hub, such as clip-benchmark/wds_cifar10"
        )
    splits = [settings.split, *([settings.train_split] if settings.classifier in LEARNT else [])]
    found = [hub_set(name, split, settings.cache_dir, local_files_only=local_files_only) for split in splits]
    return found[-1]  # all splits are in one folder


def open_everywhere(settings: Settings, accelerator: Accelerator, name: str) -> EvalSet:
    """A set that the main process opened, with its files on every node and their paths on this one."""
    folder = folder_on_every_node(accelerator, partial(data_folder, settings, name), f"--data {name}")
    on_every_node(accelerator, lambda: pack_pair_folder(folder, settings.cache_dir))
    data = from_main_process(accelerator, lambda: open_data(settings, name, folder))
    for opened in data.splits.values():
        on_this_node(accelerator, opened.index, [folder, settings.cache_dir or default_cache_dir()], "--data")
    return data


def open_data(settings: Settings, name: str, folder: Path) -> EvalSet:
    """Finds a set's shards, class names and templates, and counts its samples."""
    published = find_published(folder)
    if published is not None:
        return open_published(settings, name, folder, published)
    open_split = partial(open_set, flag="--data", cache_dir=settings.cache_dir)
    packed = pack_pair_folder(folder, settings.cache_dir)
    if packed:
        return EvalSet(False, {"attack": open_split([packed], with_classes=False)})
    listed = any((place / "classnames.txt").exists() for place in (folder, folder / settings.split))
    labelled = settings.classnames is not None or listed
    splits = {settings.split: "--split"}
    if labelled and settings.classifier in LEARNT:
        splits[settings.train_split] = "--train_split"
    elif not labelled and (folder / "attack").is_dir():
        splits = {split: "--split" for split in ("attack", "clean") if (folder / split).is_dir()}
    elif not labelled and "head_t" in settings.measure:
        splits[settings.val_split] = "--val_split"
    for split, its_flag in splits.items():
        if not (folder / split).is_dir():
            found = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
            raise UserError(
                f"--data {name}: no split {split!r}; found {found or 'no folder'}; name one with {its_flag}"
            )
    classnames = {"classnames": settings.classnames} if labelled else {}
    opened = {split: open_split([str(folder / split)], with_classes=labelled, **classnames) for split in splits}
    if not labelled:
        # Without classnames.txt the samples are read as preference pairs: refuse samples that have only labels.
        index = next(iter(opened.values())).index
        with suppress(BadSample), closing(ShardReader(index)) as reader:  # a bad one is reported when the set is read
            _, members = reader.read(0, 0)
            if "cls" in members and "json" not in members:
                raise UserError(
                    f"--data {name}: labelled samples without class names; put classnames.txt there (one name per "
                    "line, line number = class), or name a file, or imagenet, with --classnames"
                )
        return EvalSet(False, opened)
    test = opened[settings.split]
    try:
        same_classes(opened.get(settings.train_split, test).classnames, test.classnames)
    except ValueError as error:
        raise UserError(
            f"--data {name}: the class names of {settings.train_split} and {settings.split} differ ({error}); what is "
            "learnt from one says nothing about the other; expected the same names, in any order"
        ) from None
    return EvalSet(True, opened, test.classnames, test.templates)


def open_published(settings: Settings, name: str, folder: Path, published: PublishedCorruptions) -> EvalSet:
    """CIFAR-10-C or ImageNet-C files, with class names from a file or of ImageNet."""
    if settings.classifier in LEARNT:
        raise UserError(
            f"--data {name}: published corruptions hold no training images for --classifier {settings.classifier}; "
            "learn a linear_probe on the clean set and give it by --linear_head"
        )
    path = Path(settings.classnames or folder / "classnames.txt")
    if settings.classnames == "imagenet" or (settings.classnames is None and published.num_classes == 1000):
        classnames, templates = imagenet_prompts()
    elif settings.classnames is None and not path.exists():
        raise UserError(
            f"--data {name}: published corruptions of {published.num_classes} classes without names; put "
            "classnames.txt there (one name per line) or name a file with --classnames"
        )
    else:
        classnames = read_classnames(path)
        templates = read_templates(path.parent / "zeroshot_classification_templates.txt")
    warn_of_twins(classnames, f"--data {name}")
    if len(classnames) != published.num_classes:
        raise UserError(
            f"--data {name}: {published.num_classes} classes in the files, {len(classnames)} names; name these classes "
            "with --classnames, one per line in the order of the labels"
        )
    return EvalSet(True, {}, classnames, templates, published)


# The figures asked for


def contents(settings: Settings, accelerator: Accelerator, data: EvalSet) -> dict[str, str]:
    """Digests of the samples that are read of a set: by split, or by corruption and severity. Call on all processes."""
    published, found = data.published, dict[str, str]()
    for split, opened in data.splits.items():
        learnt_from = settings.classifier in LEARNT and split == settings.train_split
        number = settings.train_num_samples if learnt_from else settings.num_samples
        if learnt_from and split == settings.split:  # read twice, by different numbers
            number = None
        found[split] = shards_digest(accelerator, opened.index, number)
    if published is not None and "corruptions" in settings.attack:

        def digests(corruption: str) -> dict[str, str]:  # not in parallel: all severities are in one array
            options = settings.num_samples, settings.cache_dir
            return {
                f"{corruption} {level}": published.digest(corruption, level, *options) for level in settings.severities
            }

        asked = [name for name in settings.corruptions if name in published.corruptions]
        parts = from_main_process(accelerator, lambda: side_by_side(digests, asked))
        found = {name: digest for part in parts for name, digest in part.items()}
    return found


def refuse_unlearnt_classes(settings: Settings, sets: dict[str, EvalSet]) -> None:
    """Raises ``UserError`` if --train_num_samples leaves a class without images: sets may be sorted by class."""
    number = settings.train_num_samples
    if number is None:
        return
    for name, data in sets.items():
        train = data.splits.get(settings.train_split)
        if train is None or number >= train.index.num_samples:  # a larger number would not help
            continue
        if lacking := classes_without_samples(train, number):
            classes = f"{len(lacking)} of {len(train.classnames)} classes, the first is {lacking[0]!r}"
            raise UserError(
                f"--train_num_samples {number}: of {train.index.num_samples} samples in {settings.train_split} of "
                f"--data {name} the first {number} have none of {classes}; give a larger number, or leave it out"
            )


def nothing_to_measure(settings: Settings, name: str, data: EvalSet) -> UserError:
    if data.published is not None:
        return UserError(
            f"--data {name}: published corruptions (of {', '.join(data.published.corruptions)}), for which only "
            "--attack corruptions is defined, with --corruptions among these"
        )
    return UserError(
        f"--data {name}: preference pairs, for which nothing that was asked for is defined; expected --attack clean "
        f"or typographic, or, for pairs in {settings.split}/ and {settings.val_split}/, --measure head_t"
    )


if __name__ == "__main__":
    run(main)
