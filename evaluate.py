"""Measures CLIP models on labelled sets and on preference pairs, clean and under attack, and prints tables.

  python evaluate.py --model runs/lore4 runs/fare4 openai/clip-vit-base-patch32 \\
    --data data/cifar10 data/caltech101 --attack clean pgd typographic --eps 1 2 4 --num_samples 1000 --output_dir runs/eval

A data set is a directory with classnames.txt and <split>/*.tar, or preference pairs: attack/*.tar and clean/*.tar,
<split>/*.tar, or pictures named label=X_text=Y. Cells that results.json already holds are not measured again. Start it
with `accelerate launch` to share the images among processes: the figures stay the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import CLIPModel, CLIPProcessor

from utils.attributes import AttributeDataset
from utils.cli import UserError, flag, parse_settings, required, run
from utils.distributed import compute_dtype, default_num_workers, from_main_process, gather_objects, start_accelerator
from utils.encoders import ImageEncoder, check_model, load_clip, make_encoder
from utils.fairness import (
    demographic_parity_difference,
    equal_opportunity_difference,
    retrieval_fairness,
    worst_group_accuracy_and_gap,
)
from utils.head import HEAD_FILE, head_power, head_powers, load_head, neutral_t, unfolded
from utils.images import ImageTransform
from utils.metrics import mean_interval, wilson_interval
from utils.model_card import versions
from utils.pairs import PairDataset, PreferenceDataset, TypographicDataset, pack_pair_folder
from utils.policy import TextTable, judge
from utils.progress import RunProgress, wide_console
from utils.shards import ShardDataset, eval_loader
from utils.skipped import SkipCounter, count_skipped
from utils.typographic import KINDS, PLACES, word_style
from utils.zeroshot import LabelledSet, class_prompts, ensemble, open_set, predictions, to_pixel_values

SCHEMA_VERSION = 1
NO_CORRUPTION = {"corruption": None, "severity": None, "sigma": None}
NEUTRAL = "neutral_t"
FAIRNESS = ("max_skew", "max_skew_worst_query", "ndkl", "parity_difference", "opportunity_difference", "worst_group_accuracy", "group_gap")  # fmt: skip
ACCURACIES = ("accuracy", "follows the word", "chosen text over rejected", "worst-group accuracy")
RETRIEVED = 10
DEFAULT_TS = [round(-0.5 + 0.025 * step, 3) for step in range(71)]  # -0.5 ... 1.25


@dataclass
class Settings:
    """Everything that an evaluation can be told."""

    # fmt: off
    model: list[str] = required("Hugging Face ids or local directories of CLIP models", group="what", many=True)
    data: list[str] = required("directories with classnames.txt and <split>/*.tar, or with preference pairs", group="what", many=True)
    split: str = flag("test", "folder of each data set that is read", group="what")
    num_samples: int | None = flag(None, "the first N samples of each set, shards in numeric order (default: all)", group="what", minimum=1)
    classnames: str | None = flag(None, "file with one class name per line (default: the set's own)", group="what")
    measure: list[str] = flag(["accuracy"], "accuracy; retention: KL to the reference; fairness: of retrieval and classes between attributes; head_t: everything over the strength of a head", group="what", choices=("accuracy", "retention", "fairness", "head_t"))

    attack: list[str] = flag(["clean"], "clean, pgd, typographic", group="attack", choices=("clean", "pgd", "typographic"))
    eps: list[float] = flag([4.0], "radii of the l_inf attacks, in 1/255", group="attack", above=0, maximum=255)
    attack_steps: int = flag(10, "PGD steps", group="attack", minimum=1)
    attack_step_size: float | None = flag(None, "PGD step, in 1/255 (default: eps/4)", group="attack", above=0)
    fonts: list[str] = flag(["DejaVuSans", "DejaVuSerif", "DejaVuSansMono"], "fonts of written words: of matplotlib, Aileron, or .ttf files", group="attack")
    word_size_min: float = flag(20.0, "smallest letters, in pixels at an image side of 224", group="attack", above=0)
    word_size_max: float = flag(40.0, "largest letters, in the same unit", group="attack", above=0)
    word_kind: str = flag("outlined", "coloured letters with an outline, or black on a white label", group="attack", choices=KINDS)
    word_place: str = flag("anywhere", "which half of the image words are written in", group="attack", choices=PLACES)
    seed: int = flag(0, "of the random starts and the words", group="attack", minimum=0)

    reference_model_name_or_path: str | None = flag(None, "retention: the model that the others are compared with", group="measure")
    top_k: int = flag(100, "fairness: K of MaxSkew@K, smaller than the set", group="measure", minimum=1)
    t: list[float] = flag(DEFAULT_TS, "head_t: strengths; 0 and 1 are always among them", group="measure", minimum=-10, maximum=10)
    val_split: str = flag("val", "head_t: folder of the pairs on which the neutral t* is chosen", group="measure")
    query: list[str] = flag([], "texts whose best images on labelled sets are shown in retrieval_<set>.png, model beside model", group="measure")
    task_tolerance: float = flag(0.02, "head_t: how much task accuracy t* may cost on validation data", group="measure", minimum=0, maximum=1)

    output_dir: str = required("results.json is written here", group="run")
    batch_size: int = flag(128, "images per process and batch", group="run", minimum=1)
    num_workers: int | None = flag(None, "data workers per process (default: by the CPU cores, at most 8)", group="run", minimum=0)
    cache_dir: str | None = flag(None, "where shard indexes are kept (default: the system's cache)", group="run")
    max_bad_fraction: float = flag(0.01, "share of unreadable samples past which the evaluation stops", group="run", minimum=0, maximum=1)
    # fmt: on


@dataclass
class EvalSet:
    """One of --data. A labelled set has class names and one split; pairs have ``attack`` and ``clean``, or one split."""

    labelled: bool
    splits: dict[str, LabelledSet]


@dataclass
class Model:
    """One of --model, on the device."""

    name: str
    clip: CLIPModel
    processor: CLIPProcessor
    encoder: ImageEncoder
    device: torch.device

    @property
    def logit_scale(self) -> float:
        return float(self.clip.logit_scale.detach().exp())

    @property
    def transform(self) -> ImageTransform:
        return ImageTransform.from_processor(self.processor.image_processor)

    def texts(self, templates: Sequence[str], *, per_prompt: bool = False) -> TextTable:
        return TextTable(self.clip, self.processor, templates or ["{c}"], self.device, per_prompt=per_prompt)

    def embed(self, table: TextTable, weight: Tensor | None = None) -> Callable:
        """(images, texts) -> unit embeddings, both through a head ``weight`` (D, D) where one is given."""

        def embeds(images: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
            image_embeds = images.to(self.device)
            if images.dtype == torch.uint8:
                image_embeds = self.encoder(to_pixel_values(images, self.device))
            prompt_embeds = table(texts)
            if weight is not None:
                image_embeds, prompt_embeds = image_embeds @ weight.T, prompt_embeds @ weight.T
            return F.normalize(image_embeds, dim=-1), ensemble(prompt_embeds)

        return embeds


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, description=__doc__)
    check_settings(settings)
    accelerator = start_accelerator(seed=settings.seed)
    results_path = Path(settings.output_dir) / "results.json"
    for model in settings.model:
        check_model(model, "--model")
    sets = {name: from_main_process(accelerator, lambda name=name: open_data(settings, name)) for name in settings.data}
    for name, data in sets.items():
        if not wanted_jobs(settings, accelerator, settings.model[0], name, data):
            raise UserError(
                f"--data {name}: preference pairs, for which nothing that was asked for is defined; expected --attack clean "
                f"or typographic, or, for pairs in {settings.split}/ and {settings.val_split}/, --measure head_t"
            )
    results = from_main_process(accelerator, lambda: read_results(results_path))
    reference = None
    if "retention" in settings.measure:
        reference = load(settings.reference_model_name_or_path, accelerator, "--reference_model_name_or_path")

    for name in settings.model:
        missing = [
            (set_name, job)
            for set_name, data in sets.items()
            for job in wanted_jobs(settings, accelerator, name, set_name, data)
            if any(find_result(results, cell) is None for cell in job)
        ]
        if not missing:
            continue
        model = load(name, accelerator, "--model")
        for set_name, job in missing:
            found = measure(settings, accelerator, model, reference, sets[set_name], job)
            results += [
                cell | NO_CORRUPTION | {"value": value, "ci95": interval, "n": n}
                for cell, value, interval, n in found
                if find_result(results, cell) is None  # a job may have been measured in part, at other t
            ]
            if accelerator.is_main_process:
                write_results(results_path, results)

    if accelerator.is_main_process:
        print_tables(settings, accelerator, sets, results)
    if settings.query:
        draw_retrieved(settings, accelerator, sets, results)
    accelerator.end_training()


def check_settings(settings: Settings) -> None:
    """What can be said before anything is read."""
    word_style(settings)
    if "retention" in settings.measure and not settings.reference_model_name_or_path:
        raise UserError(
            "--measure retention: compared with what? name the original model with --reference_model_name_or_path"
        )
    if "head_t" in settings.measure:
        for model in settings.model:
            load_head(model)
    settings.t = sorted({*settings.t, 0.0, 1.0})


def load(name: str, accelerator: Accelerator, flag: str) -> Model:
    clip, processor = load_clip(name, flag)
    encoder = make_encoder(clip, processor, compute_dtype(accelerator)).to(accelerator.device).eval()
    return Model(name, clip, processor, encoder, accelerator.device)


def open_data(settings: Settings, name: str) -> EvalSet:
    """Finds a set's shards, class names and templates, and counts its samples."""
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(
            f"--data {name}: no such directory; expected a data set with classnames.txt and {settings.split}/"
        )
    options = {"flag": "--data", "cache_dir": settings.cache_dir}
    packed = pack_pair_folder(folder, settings.cache_dir)
    if packed:
        return EvalSet(False, {"attack": open_set([packed], with_classes=False, **options)})
    labelled = settings.classnames is not None or (folder / "classnames.txt").exists()
    splits = [settings.split]
    if not labelled and (folder / "attack").is_dir():
        splits = [split for split in ("attack", "clean") if (folder / split).is_dir()]
    elif not labelled and "head_t" in settings.measure:
        splits.append(settings.val_split)
    for split in splits:
        if not (folder / split).is_dir():
            found = sorted(path.name for path in folder.iterdir() if path.is_dir())
            flag = "--split" if split == settings.split else "--val_split"
            raise UserError(
                f"--data {name}: no split {split!r}; found {', '.join(found) or 'no folder'}; name one with {flag}"
            )
    if labelled:
        options["classnames"] = settings.classnames
    return EvalSet(
        labelled, {split: open_set([str(folder / split)], with_classes=labelled, **options) for split in splits}
    )


def wanted_jobs(
    settings: Settings, accelerator: Accelerator, model: str, dataset: str, data: EvalSet
) -> list[list[dict[str, Any]]]:
    """The figures asked for, those that come from one pass together. Two equal cells are the same measurement."""
    common = {"model": model, "dataset": dataset, "seed": settings.seed}
    split = settings.split if data.labelled or "attack" not in data.splits else None
    reading = {"split": split, "num_samples": settings.num_samples, "classnames": settings.classnames}
    reading["compute_dtype"] = str(compute_dtype(accelerator)).removeprefix("torch.")
    words = json.loads(json.dumps(asdict(word_style(settings))))  # lists, as results.json gives them back

    def cell(measure: str, attack: str = "clean", eps: float | None = None, **more: Any) -> dict[str, Any]:
        return common | {"measure": measure, "attack": attack, "eps": eps, "settings": reading | more}

    jobs = []
    if "accuracy" in settings.measure:
        if "clean" in settings.attack and (data.labelled or "attack" not in data.splits or "clean" in data.splits):
            jobs.append([cell("accuracy")])
        if "pgd" in settings.attack and data.labelled:
            for eps in settings.eps:
                step_size = settings.attack_step_size or eps / 4
                attack = {"attack_steps": settings.attack_steps, "attack_step_size": step_size, "loss": "cross-entropy"}
                jobs.append([cell("accuracy", "pgd", eps, **attack)])
        if "typographic" in settings.attack:
            style = {"words": words} if data.labelled else {}
            jobs.append([cell(figure, "typographic", **style) for figure in ("accuracy", "follows_word")])
    if "retention" in settings.measure and data.labelled:
        jobs.append([cell("retention", reference=settings.reference_model_name_or_path)])
    if "fairness" in settings.measure and data.labelled:
        jobs.append([cell(figure, top_k=settings.top_k) for figure in FAIRNESS])
    if "head_t" in settings.measure and "attack" not in data.splits:  # t* needs validation pairs of its own
        figures = ["accuracy", "follows_word"] if data.labelled else ["pair_accuracy"]
        style = {"words": words} if data.labelled else {"val_split": settings.val_split}
        job = [cell("accuracy", t=t) for t in settings.t]
        job += [cell(figure, "typographic", t=t, **style) for figure in figures for t in settings.t]
        if not data.labelled:
            tolerance = settings.task_tolerance
            job.append(cell(NEUTRAL, "typographic", task_tolerance=tolerance, candidates=settings.t, **style))
        jobs.append(job)
        if "fairness" in settings.measure and data.labelled:
            jobs.append([cell(figure, top_k=settings.top_k, t=t) for t in settings.t for figure in FAIRNESS])
    return jobs


def find_result(results: list[dict[str, Any]], cell: dict[str, Any]) -> dict[str, Any] | None:
    """The finished measurement of this cell, or None."""
    return next((result for result in results if cell.items() <= result.items()), None)


Measured = tuple[dict[str, Any], float, list[float] | None, int]  # a cell, its value, its 95 % interval, n


def measure(
    settings: Settings,
    accelerator: Accelerator,
    model: Model,
    reference: Model | None,
    data: EvalSet,
    job: list[dict[str, Any]],
) -> list[Measured]:
    """The figures of one job, from all processes together."""
    first = job[0]
    strengths = [cell["settings"]["t"] for cell in job if "t" in cell["settings"]]
    if first["measure"] in FAIRNESS:
        return measure_fairness(settings, accelerator, model, data, job)
    if strengths:
        return measure_head(settings, accelerator, model, data, job)
    if first["measure"] == "retention":
        dataset = preference_dataset(settings, model, data, attacks=0)
        rows = judged(settings, accelerator, model, data, dataset, first, reference)
        kl = rows["kl"]
        return [(first, sum(kl) / len(kl), list(mean_interval(kl)), len(kl))]
    if data.labelled and first["attack"] != "typographic":
        correct = labelled_accuracy(settings, accelerator, model, data, first)
        return [share(first, correct)]
    if first["attack"] == "typographic":
        dataset = preference_dataset(settings, model, data, split="attack")
        rows = judged(settings, accelerator, model, data, dataset, first)
        return [share(job[0], rows.get("chosen", [])), share(job[1], rows.get("rejected", []))]
    # The clean half of a pair set is judged by the same texts; in a single split, the rows of the regulariser are.
    dataset = preference_dataset(settings, model, data, split="clean")
    rows = judged(settings, accelerator, model, data, dataset, first)
    return [share(first, rows.get("chosen" if "clean" in data.splits else "clean", []))]


def share(cell: dict[str, Any], outcomes: Sequence[bool]) -> Measured:
    """A share of successes with its Wilson interval."""
    if not len(outcomes):
        raise UserError(f"--data {cell['dataset']}: no readable sample for {cell['measure']}, {cell['attack']}")
    successes = int(sum(outcomes))
    return cell, successes / len(outcomes), list(wilson_interval(successes, len(outcomes))), len(outcomes)


def preference_dataset(
    settings: Settings, model: Model, data: EvalSet, *, split: str | None = None, attacks: int = 1
) -> PreferenceDataset:
    """A labelled set with words written on it, or a split of pairs: ``split`` if there is one of this name."""
    if not data.labelled:
        chosen = data.splits.get(split) or data.splits[settings.split]
        return PairDataset(chosen.index, model.transform, order="sequential")
    labelled = data.splits[settings.split]
    return TypographicDataset(
        labelled.index,
        model.transform,
        order="sequential",
        classnames=labelled.classnames,
        style=word_style(settings),
        attacks_per_image=attacks,
        seed=settings.seed,
        fixed_epoch=-1,
        flag="--data",
    )


def judged(
    settings: Settings,
    accelerator: Accelerator,
    model: Model,
    data: EvalSet,
    dataset: PreferenceDataset,
    cell: dict[str, Any],
    reference: Model | None = None,
) -> dict[str, list]:
    """``choices`` of the model on every row, in the set's order, from all processes together."""
    templates = next(iter(data.splits.values())).templates
    with reading(settings, accelerator, dataset, cell) as batches:
        own = judge(
            batches,
            model.embed(model.texts(templates)),
            reference.embed(reference.texts(templates)) if reference else None,
            model.logit_scale,
        )
    return merge_rows(accelerator, own)


def merge_rows(accelerator: Accelerator, own: dict[str, list[tuple[int, Any]]]) -> dict[str, list]:
    """The rows of all processes in the set's order: name -> values."""
    parts = gather_objects(accelerator, own)
    names = sorted({name for part in parts for name in part})
    return {
        name: [
            value for _, value in sorted((row for part in parts for row in part.get(name, ())), key=lambda row: row[0])
        ]
        for name in names
    }


class reading:
    """The batches of one pass over a set, with a progress bar; on leaving, what was skipped is weighed.

    ``show(done, fields)`` may be told intermediate figures.
    """

    def __init__(
        self, settings: Settings, accelerator: Accelerator, dataset: ShardDataset, cell: dict[str, Any]
    ) -> None:
        self.accelerator, self.dataset = accelerator, dataset
        self.num_samples = min(settings.num_samples or len(dataset), len(dataset))
        self.skips = SkipCounter(dataset.index, settings.max_bad_fraction)
        self.loader: DataLoader = eval_loader(
            dataset,
            num_samples=self.num_samples,
            batch_size=settings.batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=default_num_workers() if settings.num_workers is None else settings.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        attack = cell["attack"] if cell["eps"] is None else f"{cell['attack']} eps {cell['eps']:g}"
        title = f"{cell['model']}  {cell['dataset']}  {cell['measure']}  {attack}"
        self.progress = RunProgress(title, self.num_samples, enabled=accelerator.is_main_process)

    def __enter__(self) -> reading:
        self.progress.__enter__()
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        seen = 0
        for batch in count_skipped(self.loader, self.skips):
            yield batch
            seen += len(batch["keys"]) * self.accelerator.num_processes
            self.progress.update(min(self.num_samples, seen))

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            self.skips.merge(gather_objects(self.accelerator, self.skips.state())).check()
            self.progress.update(self.num_samples, report=True)
        self.progress.__exit__(kind, *error)


def labelled_accuracy(
    settings: Settings, accelerator: Accelerator, model: Model, data: EvalSet, cell: dict[str, Any]
) -> list[bool]:
    """Whether each image is classified rightly, clean or under PGD."""
    labelled = data.splits[settings.split]
    dataset = ShardDataset(
        labelled.index,
        model.transform,
        order="sequential",
        with_labels=True,
        num_classes=len(labelled.classnames),
    )
    prompts = class_prompts(model.clip, model.processor, labelled, model.device)
    with reading(settings, accelerator, dataset, cell) as batches:
        positions, correct = predictions(
            model.encoder,
            batches,
            *prompts,
            device=model.device,
            eps=None if cell["eps"] is None else cell["eps"] / 255,
            step_size=None if cell["eps"] is None else cell["settings"]["attack_step_size"] / 255,
            num_steps=settings.attack_steps,
            seed=settings.seed,
        )
    return merge_rows(accelerator, {"correct": list(zip(positions.tolist(), correct.tolist()))})["correct"]


def measure_head(
    settings: Settings, accelerator: Accelerator, model: Model, data: EvalSet, job: list[dict[str, Any]]
) -> list[Measured]:
    """Accuracies over the strength of the model's head; the images are embedded once. t* comes from validation pairs."""
    head = load_head(model.name)
    weights = dict(zip(settings.t, head_powers(head["weight"].to(model.device), settings.t)))
    templates = next(iter(data.splits.values())).templates

    def sweep(dataset: PreferenceDataset) -> dict[float, dict[str, list]]:
        with reading(settings, accelerator, dataset, job[0]) as batches:
            embedded = [batch | {"images": embed_images(model, batch["images"])} for batch in batches]
        return {
            t: merge_rows(accelerator, judge(embedded, model.embed(table, weight), None, model.logit_scale))
            for t, weight in weights.items()
        }

    with unfolded(model.clip, head):
        table = model.texts(templates, per_prompt=True)
        rows = sweep(preference_dataset(settings, model, data))
        neutral = None
        if not data.labelled:
            val_set = PairDataset(data.splits[settings.val_split].index, model.transform, order="sequential")
            val_rows = sweep(val_set)
            val = {
                name: [sum(val_rows[t][name]) / max(1, len(val_rows[t][name])) for t in settings.t]
                for name in ("pair", "clean")
            }
            neutral = neutral_t(settings.t, val["pair"], val["clean"], settings.task_tolerance)
    names = {"accuracy": "chosen", "follows_word": "rejected", "pair_accuracy": "pair"}
    found: list[Measured] = []
    for cell in job:
        if cell["measure"] == NEUTRAL:
            found.append((cell, neutral, None, len(val_rows[0.0]["pair"])))
        else:
            name = "clean" if cell["attack"] == "clean" else names[cell["measure"]]
            found.append(share(cell, rows[cell["settings"]["t"]].get(name, [])))
    return found


@torch.no_grad()
def embed_images(model: Model, images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> image_embeds (N, D); no image gives no embedding."""
    if not len(images):
        return torch.empty(0, model.encoder.embed_dim, device=model.device)
    return model.encoder(to_pixel_values(images, model.device))


def measure_fairness(
    settings: Settings, accelerator: Accelerator, model: Model, data: EvalSet, job: list[dict[str, Any]]
) -> list[Measured]:
    """Retrieval by the class prompts, and classification, between the images' attributes; over t where the job asks."""
    labelled = data.splits[settings.split]
    dataset = AttributeDataset(labelled.index, model.transform, num_classes=len(labelled.classnames))
    strengths = list(dict.fromkeys(cell["settings"].get("t") for cell in job))
    head = load_head(model.name) if strengths != [None] else None
    own: list[tuple[int, tuple]] = []
    with unfolded(model.clip, head) if head else torch.no_grad():
        with reading(settings, accelerator, dataset, job[0]) as batches:
            for batch in batches:
                embeds = embed_images(model, batch["images"]).cpu().numpy()
                own += zip(batch["positions"].tolist(), zip(embeds, batch["labels"].tolist(), batch["attributes"]))
        images, labels, attributes = zip(*merge_rows(accelerator, {"images": own})["images"])
        images, labels = torch.stack([torch.from_numpy(image) for image in images]), torch.tensor(labels)
        names = sorted(set(attributes))
        groups = torch.tensor([names.index(attribute) for attribute in attributes])
        if settings.top_k >= len(images):
            raise UserError(
                f"--top_k {settings.top_k}: {job[0]['dataset']} holds {len(images)} images; K must be smaller than the pool, "
                "or MaxSkew no longer depends on the model"
            )
        if len(names) < 2:
            raise UserError(
                f"--measure fairness: {job[0]['dataset']} knows one attribute only ({names[0]}); expected at least two"
            )
        figures, table = {}, model.texts(labelled.templates, per_prompt=head is not None)
        weights = head_powers(head["weight"].to(model.device), strengths) if head else [None]
        for t, weight in zip(strengths, weights):
            with torch.no_grad():
                unit, texts = model.embed(table, weight)(images, labelled.classnames)
            figures[t] = fairness_figures((texts @ unit.T).cpu(), labels, groups, settings.top_k)
    return [(cell, figures[cell["settings"].get("t")][cell["measure"]], None, len(images)) for cell in job]


def fairness_figures(similarities: Tensor, labels: Tensor, groups: Tensor, top_k: int) -> dict[str, float]:
    """All of ``FAIRNESS`` from similarities (C, N) of class prompts and images; desired are the pool's own shares."""
    num_classes, desired = len(similarities), torch.bincount(groups) / len(groups)
    predicted = similarities.argmax(dim=0)
    worst, gap = worst_group_accuracy_and_gap(predicted == labels, groups, len(desired))
    opportunity = equal_opportunity_difference(predicted, labels, groups, num_classes)
    return retrieval_fairness(similarities, groups, desired, top_k) | {
        "parity_difference": demographic_parity_difference(predicted, groups, num_classes).mean().item(),
        "opportunity_difference": opportunity.nanmean().item(),
        "worst_group_accuracy": worst,
        "group_gap": gap,
    }


def draw_retrieved(
    settings: Settings, accelerator: Accelerator, sets: dict[str, EvalSet], results: list[dict[str, Any]]
) -> None:
    """The best images of every --query by every model; a model with a head at t = 0, at its t* if known, and at t = 1."""
    from utils.figures import draw_grid

    for set_name, data in sets.items():
        if not data.labelled:
            continue
        rows = []
        for name in settings.model:
            model = load(name, accelerator, "--model")
            labelled = data.splits[settings.split]
            dataset = ShardDataset(labelled.index, model.transform, order="sequential")
            head = load_head(name) if (Path(name) / HEAD_FILE).exists() else None
            cell = {"model": name, "dataset": set_name, "measure": "retrieval", "attack": "clean", "eps": None}
            own: list[tuple[int, Any]] = []
            with unfolded(model.clip, head) if head else torch.no_grad():
                with reading(settings, accelerator, dataset, cell) as batches:
                    for batch in batches:
                        own += zip(batch["positions"].tolist(), embed_images(model, batch["images"]).cpu().numpy())
                positions = sorted(position for part in gather_objects(accelerator, own) for position, _ in part)
                images = torch.stack(
                    [torch.from_numpy(row) for row in merge_rows(accelerator, {"images": own})["images"]]
                )
                known = [r["value"] for r in results if (r["model"], r["measure"]) == (name, NEUTRAL)]
                neutral = known[-1] if known else None
                for t in [None] if head is None else sorted({0.0, 1.0} | ({neutral} if neutral is not None else set())):
                    weight = None if t is None else head_power(head["weight"], t).to(model.device)
                    with torch.no_grad():
                        unit, texts = model.embed(model.texts(["{c}"], per_prompt=True), weight)(images, settings.query)
                    label = Path(name).name + ("" if t is None else f"\nt{'*' if t == neutral else ''} = {t:g}")
                    rows += [(query, label, order) for query, order in zip(settings.query, best_first(texts @ unit.T))]
        if accelerator.is_main_process:
            path = Path(settings.output_dir) / f"retrieval_{Path(set_name).name}.png"
            grid = [
                (
                    label,
                    [
                        (dataset[0, positions[i], positions[i]]["image"], query if n == 0 else "")
                        for n, i in enumerate(order)
                    ],
                )
                for query in settings.query
                for of_query, label, order in rows
                if of_query == query
            ]
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_grid(path, grid)
            print(f"{path} written")


def best_first(similarities: Tensor) -> list[list[int]]:
    """The places of the most similar images of every query, at most ``RETRIEVED``. (Q, N)."""
    return similarities.argsort(dim=1, descending=True, stable=True)[:, :RETRIEVED].tolist()


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results of an earlier call with this output_dir, to go on with."""
    if not path.exists():
        return []
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"--output_dir {path.parent}: results.json has schema version {report['schema_version']}, this program "
                f"writes {SCHEMA_VERSION}; give another directory"
            )
        return report["results"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"--output_dir {path.parent}: results.json is not a report ({error}); give another directory"
        ) from None


def write_results(path: Path, results: list[dict[str, Any]]) -> None:
    """Replaces results.json, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    environment = versions() | {"device": device}
    report = {"schema_version": SCHEMA_VERSION, "environment": environment, "results": results}
    aside = path.with_suffix(".json.tmp")
    aside.write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(aside, path)


def print_tables(
    settings: Settings, accelerator: Accelerator, sets: dict[str, EvalSet], results: list[dict[str, Any]]
) -> None:
    """Accuracies, one row per model and set; then every other figure in a line; then what the heads' strength does."""
    asked = [
        (model, name, job)
        for model in settings.model
        for name, data in sets.items()
        for job in wanted_jobs(settings, accelerator, model, name, data)
    ]
    cells = [(model, name, cell) for model, name, job in asked for cell in job]
    plain = [(model, name, cell) for model, name, cell in cells if "t" not in cell["settings"]]
    in_columns = [(model, name, cell) for model, name, cell in plain if cell["measure"] in ("accuracy", "follows_word")]
    if in_columns:
        columns = list(dict.fromkeys(column_name(cell) for _, _, cell in in_columns))
        table = Table(title="Zero-shot accuracy in %, with Wilson 95 % intervals")
        for title in ("model", "data"):
            table.add_column(title, overflow="fold")
        for title in ("n", *columns):
            table.add_column(title, justify="right")
        for model in settings.model:
            for name in sets:
                found = {
                    column_name(cell): find_result(results, cell)
                    for of_model, of_set, cell in in_columns
                    if (of_model, of_set) == (model, name)
                }
                if found:
                    n = next(iter(found.values()))["n"]
                    table.add_row(model, name, str(n), *(percent(found.get(column)) for column in columns))
        wide_console().print(table)
    others = [entry for entry in plain if entry not in in_columns]
    if others:
        table = Table(title="Other figures")
        for title in ("model", "data", "figure", "value"):
            table.add_column(title, overflow="fold", justify="right" if title == "value" else "left")
        for model, name, cell in others:
            result = find_result(results, cell)
            interval = "" if result["ci95"] is None else " [{:.4f}, {:.4f}]".format(*result["ci95"])
            table.add_row(model, name, figure_name(cell), f"{result['value']:.4f}{interval}")
        wide_console().print(table)
    if "head_t" in settings.measure:
        print_strengths(settings, cells, results)


def print_strengths(
    settings: Settings, cells: list[tuple[str, str, dict[str, Any]]], results: list[dict[str, Any]]
) -> None:
    """What every head does at t = 0, t* (where pairs gave one) and t = 1; the curve over all t goes into a picture."""
    from utils.figures import draw_t_sweep

    for model in settings.model:
        found = [find_result(results, cell) for of_model, _, cell in cells if of_model == model]
        neutral = next((result["value"] for result in found if result["measure"] == NEUTRAL), None)
        swept = [result for result in found if "t" in result["settings"]]
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
            table.add_row(title, *(f"{points[t]:.3f}" for t in marks))
        wide_console().print(table)
        name = Path(model).name or Path(model).resolve().name
        path = Path(settings.output_dir) / f"head_t_{name}.png"
        accuracies = {title: points for title, points in curves.items() if title.split(",")[0] in ACCURACIES}
        panels = {
            "share": accuracies,
            "fairness": {title: curves[title] for title in curves if title not in accuracies},
        }
        panels = {panel: shown for panel, shown in panels.items() if shown}
        draw_t_sweep(path, f"What the strength of the head changes: {name}", panels, neutral)
        print(f"{path} written")


def column_name(cell: dict[str, Any]) -> str:
    if cell["measure"] == "follows_word":
        return "follows the word"
    return "clean" if cell["attack"] == "clean" else cell["attack"] + (f" {cell['eps']:g}/255" if cell["eps"] else "")


def figure_name(cell: dict[str, Any]) -> str:
    names = {
        "retention": "KL to the reference, nats",
        "max_skew": f"MaxSkew@{cell['settings'].get('top_k')}, mean over classes",
        "max_skew_worst_query": f"MaxSkew@{cell['settings'].get('top_k')}, worst class",
        "ndkl": "NDKL",
        "parity_difference": "demographic parity difference",
        "opportunity_difference": "equal opportunity difference",
        "worst_group_accuracy": "worst-group accuracy",
        "group_gap": "accuracy gap between groups",
        "follows_word": "follows the word",
        "pair_accuracy": "chosen text over rejected",
        NEUTRAL: "neutral t*",
    }
    if cell["measure"] == "accuracy":
        return "accuracy, clean" if cell["attack"] == "clean" else f"accuracy, {cell['attack']}"
    return names[cell["measure"]]


def percent(result: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in (result["value"], *result["ci95"])))


if __name__ == "__main__":
    run(main)
