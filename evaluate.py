"""Measures vision encoders, CLIP above all, on labelled sets and on preference pairs, clean and under attack.

  python evaluate.py --model runs/lore4 runs/fare4 openai/clip-vit-base-patch32 --data clip-benchmark/wds_cifar10 data/caltech101 \\
    --attack clean apgd gaussian_noise typographic --eps 1 2 4 --num_samples 1000 --output_dir runs/eval

Prints tables and leaves report.html, results.json, benchmark.csv and a record of every sample. A data set is a directory or
a set of the hub with classnames.txt and <split>/*.tar; or preference pairs: attack/*.tar and clean/*.tar, <split>/*.tar, or
pictures named label=X_text=Y; or the published files of CIFAR-10-C or ImageNet-C. Cells that are finished are not measured
again. Start it with `accelerate launch` to share the images among processes: the figures stay the same.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table

from utils.cli import flag, launched_rank, parse_settings, required, run
from utils.data.digests import KIND, files_digest, shards_digest, side_by_side, text_digest
from utils.data.images import ImageTransform
from utils.data.shards import ShardDataset, ShardIndex, ShardReader
from utils.data.skipped import BadSample
from utils.data.sources import default_cache_dir, hub_set, known_path
from utils.errors import UserError
from utils.evaluation.measures import (
    EvalSet,
    Finding,
    Model,
    measure_accuracy,
    measure_fairness,
    measure_fidelity,
    measure_head,
    measure_interpretability,
    measure_pairs,
    measure_retention,
    retrieved,
    train_features,
)
from utils.evaluation.results import (
    ATTACKS,
    Cell,
    Results,
    attempt,
    cell_name,
    column_name,
    figure_name,
    file_name,
    model_revision,
    refuse_unwritable,
)
from utils.methods.head import HEAD_FILE, load_head
from utils.models.classifiers import (
    KnnClassifier,
    LinearClassifier,
    fit_linear_probe,
    own_linear_head,
    read_linear_head,
    save_linear_head,
)
from utils.models.encoders import (
    CONTRASTIVE_MODEL_TYPES,
    MODEL_TYPES,
    check_model,
    has_own_head,
    has_text,
    image_transform,
    load_model,
    make_encoder,
)
from utils.models.hub import fetch_model, folder_on_every_node, on_this_node
from utils.models.zeroshot import NonFiniteError
from utils.processes.distributed import everywhere, from_main_process, on_every_node, start_accelerator
from utils.processes.progress import wide_console
from utils.redaction import shown_setting
from utils.sets.corruptions import CORRUPTIONS, KNOWN, SEVERITIES, find_published, require_package
from utils.sets.labelled import (
    imagenet_prompts,
    interpretability_templates,
    open_set,
    read_classnames,
    read_templates,
    same_classes,
    warn_of_twins,
)
from utils.sets.pairs import pack_pair_folder
from utils.sets.typographic import KINDS, PLACES, font_files, word_style
from utils.training.checkpoint import take_output_dir
from utils.training.prefetch import prefetch_models, say_where

MEASURES = ("accuracy", "interpretability", "fidelity", "retention", "fairness", "head_t")
FAIRNESS = ("max_skew", "max_skew_worst_query", "ndkl", "parity_difference", "opportunity_difference", "worst_group_accuracy", "group_gap")  # fmt: skip
FIDELITY = ("fidelity", "fidelity_median", "fidelity_p95", "fidelity_max", "fidelity_cosine")
ACCURACIES = ("accuracy", "follows the word", "chosen text over rejected", "worst-group accuracy")
DEFAULT_TS = [round(-0.5 + 0.025 * step, 3) for step in range(71)]  # -0.5 ... 1.25
MANY_ATTACKS = 6  # more than that are lines of the table, not columns
DAYS_OF_PATIENCE = 7  # a process whose images are all robust may finish long after the others

logger = logging.getLogger(__name__)


@dataclass
class Settings:
    """Everything that an evaluation can be told."""

    # fmt: off
    model: list[str] = required("Hugging Face ids or local directories: CLIP, or with --classifier encoders without text (DINOv2, CLIP vision models)", group="what", path=True, many=True)
    data: list[str] = required("directories or sets of the hub with classnames.txt and <split>/*.tar, preference pairs, or published corruptions", group="what", path=True, many=True)
    split: str = flag("test", "folder of each data set that is read", group="what")
    num_samples: int | None = flag(None, "the first N samples of each set, shards in numeric order (default: all)", group="what", minimum=1)
    classnames: str | None = flag(None, "file with one class name per line, or imagenet for CLIP's own (default: the set's)", group="what", path=True)
    measure: list[str] = flag(["accuracy"], "accuracy; interpretability: cosine to 150 descriptions of the true class; fidelity: distance of embeddings to the reference; retention: KL to the reference; fairness: of retrieval and classes between attributes; head_t: everything over the strength of a head", group="what", choices=MEASURES)
    classifier: str = flag("zero_shot", "zero_shot: class names by the text tower; linear_head: a file; linear_probe, knn: learnt from --train_split", group="what", choices=("zero_shot", "linear_head", "linear_probe", "knn"))
    linear_head: str | None = flag(None, "safetensors with weight (C, D) and maybe bias (C,) for --classifier linear_head (default: the model's own, of DINOv2 saved for image classification)", group="what", path=True)
    train_split: str = flag("train", "folder from which a linear probe or k-NN learns", group="what")

    attack: list[str] = flag(["clean"], "what the images are measured under", group="attack", choices=tuple(ATTACKS))
    eps: list[float] = flag([4.0], "radii of the l_inf attacks, in 1/255", group="attack", above=0, maximum=255)
    attack_dtype: str = flag("float32", "precision of the model while gradients are followed; the judgement is always float32", group="attack", choices=("float32", "bfloat16"))
    apgd_steps: int = flag(100, "steps of each run of APGD", group="attack", minimum=1)
    apgd_targets: int = flag(9, "APGD-T: so many of the likeliest other classes", group="attack", minimum=1)
    square_queries: int = flag(5000, "Square: forwards for an image that holds out", group="attack", minimum=1)
    attack_steps: int = flag(10, "PGD steps", group="attack", minimum=1)
    attack_step_size: float | None = flag(None, "PGD step, in 1/255 (default: eps/4)", group="attack", above=0)
    sigma: list[float] = flag([8.0, 16.0, 32.0, 64.0], "standard deviations of the Gaussian noise, in 1/255", group="attack", above=0, maximum=255)
    corruptions: list[str] = flag(list(CORRUPTIONS), "ImageNet-C's", group="attack", choices=KNOWN)
    severities: list[int] = flag(list(SEVERITIES), "of the corruptions", group="attack", minimum=1, maximum=5)
    seed: int = flag(0, "of the random starts, the noise and the words", group="attack", minimum=0, maximum=2**32 - 1)

    fonts: list[str] = flag(["DejaVuSans", "DejaVuSerif", "DejaVuSansMono"], "fonts of written words: of matplotlib, Aileron, or .ttf files", group="words", path=True)
    word_size_min: float = flag(20.0, "smallest letters, in pixels at an image side of 224", group="words", above=0)
    word_size_max: float = flag(40.0, "largest letters, in the same unit", group="words", above=0)
    word_kind: str = flag("outlined", "coloured letters with an outline, or black on a white label", group="words", choices=KINDS)
    word_place: str = flag("anywhere", "which half of the image words are written in", group="words", choices=PLACES)

    reference_model_name_or_path: str | None = flag(None, "retention, fidelity: the model that the others are compared with", group="measure", path=True)
    top_k: int = flag(100, "fairness: K of MaxSkew@K, smaller than the set", group="measure", minimum=1)
    t: list[float] = flag(DEFAULT_TS, "head_t: strengths; 0 and 1 are always among them", group="measure", minimum=-10, maximum=10)
    val_split: str = flag("val", "head_t: folder of the pairs on which the neutral t* is chosen", group="measure")
    query: list[str] = flag([], "texts whose best images on labelled sets are shown in retrieval_<set>.png, model beside model", group="measure")
    task_tolerance: float = flag(0.02, "head_t: how much task accuracy t* may cost on validation data", group="measure", minimum=0, maximum=1)

    output_dir: str = required("report.html, results.json, benchmark.csv, records/ and pictures/ are written here", group="run", path=True)
    batch_size: int = flag(128, "images per process and batch", group="run", minimum=1)
    num_workers: int | None = flag(None, "data workers per process (default: by the CPU cores, at most 8)", group="run", minimum=0)
    cache_dir: str | None = flag(None, "where shard indexes are kept, and sets of the hub in its hub/ (default: the system's cache, the hub's own)", group="run", path=True)
    max_bad_fraction: float = flag(0.01, "share of unreadable samples past which the evaluation stops", group="run", minimum=0, maximum=1)
    prefetch: bool = flag(False, "bring everything that the evaluation needs into the caches, which nodes without internet have to share, and stop; see docs/offline.md", group="run")
    # fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, description=__doc__)
    check_settings(settings)
    if settings.prefetch:
        return prefetch(settings)
    accelerator = start_accelerator(seed=settings.seed, days_of_patience=DAYS_OF_PATIENCE)
    from_main_process(accelerator, lambda: refuse_unwritable(settings.output_dir))
    on_every_node(accelerator, lambda: check_models(settings))
    sets = {name: open_everywhere(settings, accelerator, name) for name in settings.data}
    content = {name: contents(settings, accelerator, data) for name, data in sets.items()}
    revisions = from_main_process(accelerator, lambda: find_revisions(settings))
    jobs = {
        (model, name): wanted_jobs(settings, revisions, content[name], model, name, data)
        for model in settings.model
        for name, data in sets.items()
    }
    for name in sets:
        if not jobs[settings.model[0], name]:
            raise nothing_to_measure(settings, name, sets[name])
    from_main_process(accelerator, lambda: take_output_dir(settings.output_dir))
    results = from_main_process(accelerator, lambda: Results(settings.output_dir))
    reference, undrawn = None, list[str]()
    for line in results.ask([cell for of_set in jobs.values() for job in of_set for cell in job]):
        if accelerator.is_main_process:
            logger.warning(line)

    for name in settings.model:
        missing = {
            set_name: [job for job in jobs[name, set_name] if any(results.find(cell) is None for cell in job)]
            for set_name in sets
        }
        if not any(missing.values()):
            continue
        model = load(name, accelerator, "--model")
        if reference is None and {"retention", "fidelity"} & set(settings.measure):
            reference = load(settings.reference_model_name_or_path, accelerator, "--reference_model_name_or_path")
        for set_name, set_jobs in missing.items():
            classifier = None
            for job in set_jobs:
                try:
                    if classifier is None and needs_classifier(sets[set_name], job):
                        classifier = make_classifier(settings, accelerator, model, sets[set_name], job[0])
                    findings = measure(settings, accelerator, model, reference, classifier, sets[set_name], job)
                except NonFiniteError as error:
                    raise NonFiniteError(f"--model {name}, --data {set_name}: {error}") from None
                for finding in findings:
                    if results.find(finding.cell) is None:  # a job may have been measured in part, at other t
                        results.add(finding.cell, finding.value, finding.interval, finding.n)
                    if accelerator.is_main_process:
                        keep(results, finding, undrawn)
                if accelerator.is_main_process:
                    results.write()

    if accelerator.is_main_process:
        results.compare()
        results.write()
        finish(settings, sets, jobs, results, undrawn)
    if settings.query:
        draw_retrieved(settings, accelerator, sets, results, undrawn)
        if accelerator.is_main_process:
            write_page(settings, undrawn)  # again, with these pictures in it
    if accelerator.is_main_process:
        print(f"{Path(settings.output_dir) / 'report.html'} written")
    accelerator.end_training()


def finish(
    settings: Settings,
    sets: dict[str, EvalSet],
    jobs: dict[tuple[str, str], list[list[Cell]]],
    results: Results,
    undrawn: list[str],
) -> None:
    """The report first, then the tables, whatever becomes of it, then pictures that nothing depends on."""
    before = len(undrawn)
    try:
        write_page(settings, undrawn)
    finally:
        print_tables(settings, sets, jobs, results)
    if "head_t" in settings.measure:
        print_strengths(settings, jobs, results, undrawn)
    if len(undrawn) > before:
        write_page(settings, undrawn)


def write_page(settings: Settings, undrawn: list[str]) -> None:
    """report.html, which names what of its own and of ``undrawn`` could not be drawn."""
    from utils.evaluation.report import write_report

    write_report(settings.output_dir, undrawn)


def check_settings(settings: Settings) -> None:
    """What can be said before anything is read."""
    settings.model, settings.data = ([tidy(name) for name in names] for names in (settings.model, settings.data))
    for name in ("model", "data", "measure", "attack", "eps", "sigma", "corruptions", "severities", "query"):
        setattr(settings, name, list(dict.fromkeys(getattr(settings, name))))  # what is named twice is measured once
    word_style(settings)
    settings.query = [valid_text(query, "--query", "which no tokenizer takes") for query in settings.query]
    for name in (*settings.model, settings.reference_model_name_or_path):
        valid_text(name or "", "--model", "which safetensors does not open")
    for measure in ("retention", "fidelity"):
        if measure in settings.measure and not settings.reference_model_name_or_path:
            raise UserError(
                f"--measure {measure}: compared with what? name the original model with --reference_model_name_or_path"
            )
    by_text = [measure for measure in settings.measure if measure not in ("accuracy", "fidelity")]
    by_text += [attack for attack in settings.attack if attack == "typographic"] + ["--query"] * bool(settings.query)
    if settings.classifier != "zero_shot" and by_text:
        raise UserError(
            f"--classifier {settings.classifier}: {by_text[0]} goes by texts; measure it in a call of its own, without "
            "--classifier"
        )
    if settings.classifier != "linear_head" and settings.linear_head is not None:
        raise UserError(
            f"--classifier {settings.classifier} and --linear_head {settings.linear_head} do not go together; a file needs "
            "--classifier linear_head"
        )
    if settings.linear_head is not None and not Path(settings.linear_head).is_file():
        raise UserError(f"--linear_head {settings.linear_head}: no such file; expected safetensors with weight (C, D)")
    followed = [attack for attack in settings.attack if attack in ("pgd", "apgd")]
    if settings.classifier == "knn" and followed:
        raise UserError(
            f"--attack {followed[0]}: nearest neighbours have no gradient worth following, the figure would be too high; use "
            "--classifier linear_probe, or square"
        )
    if "square" in settings.attack:
        try:
            import pyautoattack  # noqa: F401
        except ImportError:
            raise UserError("--attack square: needs the package pyautoattack; pip install pyautoattack") from None
    settings.t = sorted({*settings.t, 0.0, 1.0})


def named_models(settings: Settings) -> list[tuple[str, str, tuple[str, ...]]]:
    """(flag, name, types that will do) of every model."""
    models = [("--model", name, MODEL_TYPES) for name in settings.model]
    if settings.reference_model_name_or_path is not None:
        kinds = CONTRASTIVE_MODEL_TYPES if "retention" in settings.measure else MODEL_TYPES
        models.append(("--reference_model_name_or_path", settings.reference_model_name_or_path, kinds))
    return models


def check_models(settings: Settings) -> None:
    """What can be said of the models by their configs, before any weights are read or downloaded."""
    for its_flag, name, kinds in named_models(settings):
        config = check_model(name, its_flag, kinds)
        if its_flag != "--model":
            continue
        if not has_text(config) and settings.classifier == "zero_shot":
            raise UserError(
                f"--model {name}: a {config.model_type} has no text tower, which --classifier zero_shot needs; give it a "
                "--linear_head file with --classifier linear_head, or learn one with --classifier linear_probe or knn"
            )
        if settings.classifier == "linear_head" and settings.linear_head is None and not has_own_head(config):
            raise UserError(
                f"--classifier linear_head: --model {name}, a {config.model_type}, brings no head of its own; give it a file "
                "with --linear_head"
            )
        if "head_t" in settings.measure:
            load_head(name)


def prefetch(settings: Settings) -> None:
    """Brings models and sets, and says where they are. Under a launcher the first process works alone, the others leave."""
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


def valid_text(text: str, flag: str, why: str) -> str:
    """A text of the command line, taken for UTF-8 whatever the locale says. Raises ``UserError`` where it is not."""
    try:
        text.encode()
        return text
    except UnicodeError:  # bytes that the locale's encoding does not know
        pass
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise UserError(f"{flag} {text}: not UTF-8, {why}; rename it or write it in UTF-8") from None


def tidy(name: str) -> str:
    """One name for a directory, runs/a for ./runs/a/ too, so that it is known again."""
    return os.path.normpath(name) if os.path.exists(name) else name


def load(name: str, accelerator: Accelerator, flag: str) -> Model:
    """A model in float32, whatever precision the accelerate config asks for: figures are judged in float32."""
    folder = fetch_model(accelerator, name, flag)
    model, processor = everywhere(accelerator, lambda: load_model(folder, flag))
    device, encoder = accelerator.device, make_encoder(model, processor).to(accelerator.device).eval()
    with_text = (model, processor) if has_text(model.config) else (None, None)
    with_head = model if has_own_head(model.config) else None
    return Model(name, encoder, image_transform(processor), device, *with_text, with_head)


def data_folder(settings: Settings, name: str, local_files_only: bool = False) -> Path:
    """The directory of a set; one of the hub is brought first, unless ``local_files_only``."""
    folder = Path(known_path(name))
    if folder.is_dir():
        return folder
    if folder.exists() or name.count("/") < 1 or name.startswith(("/", ".")):
        raise UserError(
            f"--data {name}: no such directory; expected a data set with classnames.txt and {settings.split}/, or the "
            "name of one on the hub, such as clip-benchmark/wds_cifar10"
        )
    splits = [settings.split, *([settings.train_split] if settings.classifier in ("linear_probe", "knn") else [])]
    found = [hub_set(name, split, settings.cache_dir, local_files_only=local_files_only) for split in splits]
    return found[-1]  # one folder for all


def open_everywhere(settings: Settings, accelerator: Accelerator, name: str) -> EvalSet:
    """A set opened by the main process, its files brought to every node, with the paths that they have on this one."""
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
    options = {"flag": "--data", "cache_dir": settings.cache_dir}
    packed = pack_pair_folder(folder, settings.cache_dir)
    if packed:
        return EvalSet(False, {"attack": open_set([packed], with_classes=False, **options)})
    listed = any((place / "classnames.txt").exists() for place in (folder, folder / settings.split))
    labelled = settings.classnames is not None or listed
    learns = labelled and settings.classifier in ("linear_probe", "knn")
    splits = {settings.split: "--split"} | ({settings.train_split: "--train_split"} if learns else {})
    if not labelled and (folder / "attack").is_dir():
        splits = {split: "--split" for split in ("attack", "clean") if (folder / split).is_dir()}
    elif not labelled and "head_t" in settings.measure:
        splits[settings.val_split] = "--val_split"
    for split, its_flag in splits.items():
        if not (folder / split).is_dir():
            found = sorted(path.name for path in folder.iterdir() if path.is_dir())
            raise UserError(
                f"--data {name}: no split {split!r}; found {', '.join(found) or 'no folder'}; name one with {its_flag}"
            )
    if labelled:
        options["classnames"] = settings.classnames
    opened = {split: open_set([str(folder / split)], with_classes=labelled, **options) for split in splits}
    if not labelled:
        refuse_nameless_classes(name, opened[next(iter(splits))].index)
        return EvalSet(False, opened)
    classnames = opened[settings.split].classnames
    if learns:
        try:
            same_classes(opened[settings.train_split].classnames, classnames)
        except ValueError as error:
            raise UserError(
                f"--data {name}: the class names of {settings.train_split} and {settings.split} differ ({error}), so that "
                "what is learnt from the one says nothing about the other; expected the same names, in any order"
            ) from None
    return EvalSet(True, opened, classnames, opened[settings.split].templates)


def refuse_nameless_classes(name: str, index: ShardIndex) -> None:
    """A set without classnames.txt is taken for preference pairs: not one whose samples have labels and no pairs."""
    reader = ShardReader(index)
    try:
        _, members = reader.read(0, 0)
    except BadSample:
        return  # said when the set is read
    finally:
        reader.close()
    if "cls" in members and "json" not in members:
        raise UserError(
            f"--data {name}: labelled samples without class names; put classnames.txt there (one name per line, line number = "
            "class), or name a file, or imagenet, with --classnames"
        )


def open_published(settings: Settings, name: str, folder: Path, published: Any) -> EvalSet:
    """CIFAR-10-C or ImageNet-C files, whose class names have to come from somewhere."""
    if settings.classifier in ("linear_probe", "knn"):
        raise UserError(
            f"--data {name}: published corruptions hold no training images for --classifier {settings.classifier}; learn a "
            "linear_probe on the clean set and give it by --linear_head"
        )
    if settings.classnames == "imagenet" or (settings.classnames is None and published.num_classes == 1000):
        classnames, templates = imagenet_prompts()
    elif settings.classnames is None and not (folder / "classnames.txt").exists():
        raise UserError(
            f"--data {name}: published corruptions of {published.num_classes} classes without names; name a file with one "
            "class name per line with --classnames, or put classnames.txt there"
        )
    else:
        path = Path(settings.classnames or folder / "classnames.txt")
        classnames = read_classnames(path)
        templates = read_templates(path.parent / "zeroshot_classification_templates.txt")
    warn_of_twins(classnames, f"--data {name}")
    if len(classnames) != published.num_classes:
        raise UserError(
            f"--data {name}: {published.num_classes} classes in the files, {len(classnames)} names; give the names of these "
            "classes with --classnames, one per line in the order of the labels"
        )
    return EvalSet(True, {}, classnames, templates, published)


def nothing_to_measure(settings: Settings, name: str, data: EvalSet) -> UserError:
    if data.published is not None:
        return UserError(
            f"--data {name}: published corruptions (of {', '.join(data.published.corruptions)}), for which only --attack "
            "corruptions is defined, with --corruptions among these"
        )
    return UserError(
        f"--data {name}: preference pairs, for which nothing that was asked for is defined; expected --attack clean "
        f"or typographic, or, for pairs in {settings.split}/ and {settings.val_split}/, --measure head_t"
    )


def wanted_jobs(
    settings: Settings, revisions: dict[str, str], content: dict[str, str], model: str, dataset: str, data: EvalSet
) -> list[list[Cell]]:
    """The figures asked for, those that come from one pass together. Two equal cells are the same measurement."""
    common = {"model": model, "dataset": dataset, "seed": settings.seed}
    split = settings.split if data.labelled or "attack" not in data.splits else None
    reading = {"split": split, "num_samples": settings.num_samples, "model_revision": revisions[model]}
    reading |= {"digests": KIND, "shards": content}
    classes: dict[str, Any] = {}
    if data.labelled:
        classes = {"prompts": text_digest([*data.classnames, "", *data.templates]), "classifier": settings.classifier}
        learnt_from = data.splits.get(settings.train_split)
        if learnt_from is not None and learnt_from.classnames != data.classnames:  # their labels are read by them
            classes["train_prompts"] = text_digest(learnt_from.classnames)
        classes |= {name: shown_setting(getattr(settings, name)) for name in ("classnames", "linear_head")}
        if settings.linear_head is not None:
            classes["classifier_revision"] = revisions["--linear_head"]
    words: dict[str, Any] = {
        "words": json.loads(json.dumps(asdict(word_style(settings))))
    }  # lists, as results.json gives them back
    words["font_files"] = revisions.get("--fonts")
    gradients = {"loss": "cross-entropy", "attack_dtype": settings.attack_dtype}
    jobs: list[list[Cell]] = []

    def cell(measure: str, attack: str = "clean", **more: Any) -> Cell:
        where = {name: more.pop(name, None) for name in ("eps", "corruption", "severity", "sigma")}
        own = {} if measure in FIDELITY else classes
        return common | {"measure": measure, "attack": attack} | where | {"settings": reading | own | more}

    if data.published is not None:
        if "accuracy" in settings.measure and "corruptions" in settings.attack:
            jobs += [
                [
                    cell(
                        "accuracy",
                        "corruptions",
                        corruption=corruption,
                        severity=severity,
                        files="published",
                        shards={(files := f"{corruption} {severity}"): content[files]},
                    )
                ]
                for corruption in settings.corruptions
                if corruption in data.published.corruptions
                for severity in settings.severities
            ]
        return jobs
    if "accuracy" in settings.measure:
        if "clean" in settings.attack and (data.labelled or "attack" not in data.splits or "clean" in data.splits):
            jobs.append([cell("accuracy")])
        if data.labelled:
            jobs += [[attacked] for attacked in attacked_cells(settings, data, cell, gradients)]
        if "typographic" in settings.attack:
            style = words if data.labelled else {}
            jobs.append([cell(figure, "typographic", **style) for figure in ("accuracy", "follows_word")])
    compared = {"reference": settings.reference_model_name_or_path}
    compared["reference_revision"] = revisions.get(settings.reference_model_name_or_path)
    if "interpretability" in settings.measure and data.labelled:
        jobs.append([cell("interpretability", descriptions=text_digest(interpretability_templates()))])
    if "fidelity" in settings.measure and data.labelled:
        jobs.append([cell(figure, **compared) for figure in FIDELITY])
    if "retention" in settings.measure and data.labelled:
        jobs.append([cell("retention", **compared)])
    if "fairness" in settings.measure and data.labelled:
        jobs.append([cell(figure, top_k=settings.top_k) for figure in FAIRNESS])
    if "head_t" in settings.measure and "attack" not in data.splits:  # t* needs validation pairs of its own
        figures = ["accuracy", "follows_word"] if data.labelled else ["pair_accuracy"]
        style: dict[str, Any] = words if data.labelled else {"val_split": settings.val_split}
        job = [cell("accuracy", t=t) for t in settings.t]
        job += [cell(figure, "typographic", t=t, **style) for figure in figures for t in settings.t]
        if not data.labelled:
            tolerance = settings.task_tolerance
            job.append(cell("neutral_t", "typographic", task_tolerance=tolerance, candidates=settings.t, **style))
        jobs.append(job)
        if "fairness" in settings.measure and data.labelled:
            jobs.append([cell(figure, top_k=settings.top_k, t=t) for t in settings.t for figure in FAIRNESS])
    return jobs


def attacked_cells(
    settings: Settings, data: EvalSet, cell: Callable[..., Cell], gradients: dict[str, Any]
) -> list[Cell]:
    """The attacks on labelled images that were asked for, in the order of ``ATTACKS``."""
    cells = []
    if "pgd" in settings.attack:
        for eps in settings.eps:
            step_size = settings.attack_step_size or eps / 4
            steps = {"attack_steps": settings.attack_steps, "attack_step_size": step_size}
            cells.append(cell("accuracy", "pgd", eps=eps, **gradients, **steps))
    if "apgd" in settings.attack:
        others = len(data.classnames) - 1
        if others < 1:
            raise UserError("--attack apgd: the set has one class only, no image of it can be classified wrongly")
        runs = {
            "apgd_steps": settings.apgd_steps,
            "apgd_targets": min(settings.apgd_targets, others),
            "targeted_loss": "difference of logits ratio" if others > 2 else "margin, for fewer than 4 classes",
            "restarts": 1,
        }
        cells += [cell("accuracy", "apgd", eps=eps, **gradients, **runs) for eps in settings.eps]
    if "square" in settings.attack:
        cells += [cell("accuracy", "square", eps=eps, square_queries=settings.square_queries) for eps in settings.eps]
    if "gaussian_noise" in settings.attack:
        cells += [cell("accuracy", "gaussian_noise", sigma=sigma) for sigma in settings.sigma]
    if "corruptions" in settings.attack:
        require_package()
        cells += [
            cell("accuracy", "corruptions", corruption=corruption, severity=severity, files="made from clean images")
            for corruption in settings.corruptions
            for severity in settings.severities
        ]
    return cells


def find_revisions(settings: Settings) -> dict[str, str]:
    """Digests of the models and the reference by their names, of the linear head and the fonts by their flags."""
    names = dict.fromkeys([*settings.model, settings.reference_model_name_or_path])
    found = {name: model_revision(name, settings.cache_dir) for name in names if name is not None}
    if settings.linear_head is not None:
        found["--linear_head"] = files_digest([settings.linear_head], settings.cache_dir)[:16]
    if "typographic" in settings.attack or "head_t" in settings.measure:
        found["--fonts"] = files_digest(font_files(settings.fonts), settings.cache_dir)[:16]
    return found


def contents(settings: Settings, accelerator: Accelerator, data: EvalSet) -> dict[str, str]:
    """Digests of what is read of a set: by split, of published files by corruption and severity. Call on all processes."""
    published = data.published
    if published is None:
        learns = settings.classifier in ("linear_probe", "knn")
        return {
            split: shards_digest(
                accelerator, opened.index, None if learns and split == settings.train_split else settings.num_samples
            )
            for split, opened in data.splits.items()
        }
    if "corruptions" not in settings.attack:
        return {}

    def digests(corruption: str) -> dict[str, str]:
        return {
            f"{corruption} {severity}": published.digest(corruption, severity, settings.num_samples, settings.cache_dir)
            for severity in settings.severities
        }

    asked = [name for name in settings.corruptions if name in published.corruptions]
    found = from_main_process(accelerator, lambda: side_by_side(digests, asked))
    return {name: content for of_corruption in found for name, content in of_corruption.items()}


def needs_classifier(data: EvalSet, job: Sequence[Cell]) -> bool:
    """Accuracy of a labelled set by its classes, other than through texts of each image's own."""
    cell = job[0]
    return data.labelled and cell["measure"] == "accuracy" and cell["attack"] != "typographic" and "t" not in cell["settings"]  # fmt: skip


def make_classifier(settings: Settings, accelerator: Accelerator, model: Model, data: EvalSet, cell: Cell) -> Callable:
    """image_embeds (B, D) -> logits (B, C): the set's classes by text, by a file, or learnt from its training images."""
    num_classes = len(data.classnames)
    if settings.classifier == "zero_shot":
        class_embeds = model.class_embeds(data.classnames, data.templates)
        return LinearClassifier(class_embeds, scale=model.logit_scale, normalise=True)
    if settings.classifier == "linear_head" and settings.linear_head is None:
        return own_linear_head(model.with_head, num_classes).to(model.device)
    if settings.classifier == "linear_head":
        return read_linear_head(settings.linear_head, model.encoder.embed_dim, num_classes).to(model.device)
    if settings.classifier == "knn":
        features, labels = train_features(settings, accelerator, model, data, cell)
        return KnnClassifier(features, labels, num_classes).to(model.device)
    # A probe is kept, so that it need not be learnt again and can be given as a --linear_head.
    only = {"model": model.name, "dataset": cell["dataset"], "measure": "probe", "attack": settings.train_split}
    fixed = ("digests", "model_revision", "prompts", "train_prompts")
    learnt = {name: cell["settings"][name] for name in fixed if name in cell["settings"]}
    learnt["shards"] = cell["settings"]["shards"][settings.train_split]
    learnt = dict.fromkeys(cell) | only | {"settings": learnt}
    path = Path(settings.output_dir) / "probes" / f"{cell_name(learnt)}.safetensors"
    if not from_main_process(accelerator, path.exists):
        features, labels = train_features(settings, accelerator, model, data, cell)
        if accelerator.is_main_process:
            save_linear_head(path, fit_linear_probe(features, labels, num_classes))
        accelerator.wait_for_everyone()
    return read_linear_head(path, model.encoder.embed_dim, num_classes, "--output_dir: the probe").to(model.device)


def measure(
    settings: Settings,
    accelerator: Accelerator,
    model: Model,
    reference: Model | None,
    classifier: Callable | None,
    data: EvalSet,
    job: list[Cell],
) -> list[Finding]:
    """The figures of one job, from all processes together."""
    first = job[0]
    if first["measure"] in FAIRNESS:
        return measure_fairness(settings, accelerator, model, data, job)
    if any("t" in cell["settings"] for cell in job):
        return measure_head(settings, accelerator, model, data, job)
    if first["measure"] in FIDELITY:
        return measure_fidelity(settings, accelerator, model, reference, data, job)
    if first["measure"] == "retention":
        return [measure_retention(settings, accelerator, model, reference, data, first)]
    if first["measure"] == "interpretability":
        return [measure_interpretability(settings, accelerator, model, data, first)]
    if needs_classifier(data, job):
        return [measure_accuracy(settings, accelerator, model, classifier, data, first)]
    return measure_pairs(settings, accelerator, model, data, job)


def keep(results: Results, finding: Finding, undrawn: list[str]) -> None:
    """What lies beside a figure: records first, so that a figure in results.json always has them."""
    for text in finding.warnings:
        results.warn(finding.cell, text)
    if finding.rows:
        results.write_records(finding.cell, finding.rows)
    if finding.pictures:
        clean, attacked = (
            torch.stack([torch.from_numpy(one) for one in images])
            for images in zip(*((one.clean, one.attacked) for one in finding.pictures))
        )
        captions = [one.caption for one in finding.pictures]
        attempt("pictures", lambda: results.write_pictures(finding.cell, clean, attacked, captions), undrawn)


def draw_retrieved(
    settings: Settings, accelerator: Accelerator, sets: dict[str, EvalSet], results: Results, undrawn: list[str]
) -> None:
    """The best images of every --query by every model; a model with a head at t = 0, at its t* if known, and at t = 1."""
    from utils.evaluation.report import short_names

    short = short_names(sets)
    for set_name, data in sets.items():
        if not data.labelled or data.published is not None:
            continue
        rows: list[tuple[str, str, list[int]]] = []
        for name in settings.model:
            model = load(name, accelerator, "--model")
            head = load_head(name) if (Path(name) / HEAD_FILE).exists() else None
            known = [r["value"] for r in results.results if (r["model"], r["measure"]) == (name, "neutral_t")]
            strengths = [None] if head is None else sorted({0.0, 1.0, *known[-1:]})
            where = {"eps": None, "corruption": None, "severity": None, "sigma": None}
            cell = {"model": name, "dataset": set_name, "measure": "retrieval", "attack": "clean"} | where
            for t, lines in retrieved(settings, accelerator, model, data, cell, head, strengths).items():
                label = Path(name).name + ("" if t is None else f"\nt{'*' if t in known[-1:] else ''} = {t:g}")
                rows += [(query, label, line) for query, line in zip(settings.query, lines)]
        if accelerator.is_main_process:
            path = Path(settings.output_dir) / f"retrieval_{file_name(short[set_name])}.png"
            attempt(path.name, partial(draw_rows, settings, model.transform, data, rows, path), undrawn)


def draw_rows(
    settings: Settings, transform: ImageTransform, data: EvalSet, rows: list[tuple[str, str, list[int]]], path: Path
) -> None:
    """(query, label of the row, positions of its images) as a picture."""
    from utils.evaluation.figures import draw_grid

    dataset = ShardDataset(data.splits[settings.split].index, transform, order="sequential")
    grid = [
        (label, [(dataset[0, i, i]["image"], "" if n else query) for n, i in enumerate(line)])
        for query in settings.query
        for of_query, label, line in rows
        if of_query == query
    ]
    draw_grid(path, grid)
    print(f"{path} written")


def print_tables(
    settings: Settings, sets: dict[str, EvalSet], jobs: dict[tuple[str, str], list[list[Cell]]], results: Results
) -> None:
    """Accuracies, one row per model and set; then every other figure in a line."""
    cells = [cell for of_set in jobs.values() for job in of_set for cell in job]
    plain = [cell for cell in cells if "t" not in cell["settings"]]
    in_columns = [cell for cell in plain if cell["measure"] in ("accuracy", "follows_word")]
    if in_columns:
        print_accuracies(settings, sets, in_columns, results)
    others = [cell for cell in plain if cell not in in_columns]
    if others:
        table = Table(title="Other figures")
        for title in ("model", "data", "figure", "value"):
            table.add_column(title, overflow="fold", justify="right" if title == "value" else "left")
        for cell in others:
            result = results.find(cell)
            interval = "" if result["ci95"] is None else " [{:.4f}, {:.4f}]".format(*result["ci95"])
            value = "undefined" if result["value"] is None else f"{result['value']:.4f}{interval}"
            table.add_row(cell["model"], cell["dataset"], figure_name(cell), value)
        wide_console().print(table)


def print_accuracies(settings: Settings, sets: dict[str, EvalSet], cells: Sequence[Cell], results: Results) -> None:
    """A row per model and set; with many attacks a row per set and attack, so that no figure is broken.

    Corruptions are one figure, their mean over kinds and severities: 75 are for report.html.
    """

    def attack(cell: Cell) -> str:
        return column_name(cell) if cell["corruption"] is None else "corruptions, mean"

    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        found.setdefault((cell["model"], cell["dataset"], attack(cell)), []).append(results.find(cell))
    attacks = list(dict.fromkeys(name for _, _, name in found))
    by_model = len(attacks) <= max(MANY_ATTACKS, len(settings.model))
    table = Table(title="Accuracy in %, with Wilson 95 % intervals")
    for title in ("model", "data") if by_model else ("data", "attack"):
        table.add_column(title, overflow="fold")
    table.add_column("n", justify="right")
    for title in attacks if by_model else settings.model:
        table.add_column(title, justify="right", overflow="fold")
    rows = [(name, title, [(model, name, title) for model in settings.model]) for name in sets for title in attacks]
    if by_model:
        rows = [(model, name, [(model, name, title) for title in attacks]) for model in settings.model for name in sets]
    for first, second, keys in rows:
        shown = [found.get(key, []) for key in keys]
        if any(shown):
            n = next(of_key[0]["n"] for of_key in shown if of_key)
            table.add_row(first, second, str(n), *map(percent, shown))
    wide_console().print(table)


def print_strengths(
    settings: Settings, jobs: dict[tuple[str, str], list[list[Cell]]], results: Results, undrawn: list[str]
) -> None:
    """What every head does at t = 0, t* (where pairs gave one) and t = 1; the curve over all t goes into a picture."""
    from utils.evaluation.report import short_names

    short = short_names(settings.model)
    cells = [cell for of_set in jobs.values() for job in of_set for cell in job]
    for model in settings.model:
        found = [results.find(cell) for cell in cells if cell["model"] == model]
        neutral = next((result["value"] for result in found if result["measure"] == "neutral_t"), None)
        swept = [result for result in found if "t" in result["settings"] and result["value"] is not None]
        curves: dict[str, dict[float, float]] = {}
        for result in swept:
            title = f"{figure_name(result)}, {Path(result['dataset']).name}"
            curves.setdefault(title, {})[result["settings"]["t"]] = result["value"]
        if not curves:
            continue
        marks = {0.0: "t = 0"} | ({} if neutral is None else {neutral: f"t* = {neutral:g}"}) | {1.0: "t = 1"}
        table = Table(title=f"The head of {model}")
        table.add_column("figure")
        for label in marks.values():
            table.add_column(label, justify="right")
        for title, points in curves.items():
            table.add_row(title, *(f"{points[t]:.3f}" if t in points else "undefined" for t in marks))
        wide_console().print(table)
        name = short[model] if Path(model).name else Path(model).resolve().name
        path = Path(settings.output_dir) / f"head_t_{file_name(name)}.png"
        attempt(path.name, partial(draw_strengths, path, name, curves, neutral), undrawn)


def draw_strengths(path: Path, name: str, curves: dict[str, dict[float, float]], neutral: float | None) -> None:
    """Accuracies in one panel, what else was measured over t in another."""
    from utils.evaluation.figures import draw_t_sweep

    accuracies = {title: points for title, points in curves.items() if title.split(",")[0] in ACCURACIES}
    panels = {
        "share": accuracies,
        "fairness": {title: curves[title] for title in curves if title not in accuracies},
    }
    panels = {panel: shown for panel, shown in panels.items() if shown}
    draw_t_sweep(path, f"What the strength of the head changes: {name}", panels, neutral)
    print(f"{path} written")


def percent(found: Sequence[dict[str, Any]]) -> str:
    """One figure with its interval, or the mean of several, which has none."""
    if not found:
        return ""
    if len(found) > 1:
        return f"{100 * sum(result['value'] for result in found) / len(found):.1f}"
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in (found[0]["value"], *found[0]["ci95"])))


if __name__ == "__main__":
    run(main)
