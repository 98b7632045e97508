"""Jobs, and all measures but accuracy under attacks: texts, embeddings, the head, fairness."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.data.digests import KIND, files_digest, text_digest
from utils.data.shards import ShardDataset
from utils.errors import UserError
from utils.evaluation.attacks import ATTACKS, PICTURES, first_pictures, measure_accuracy
from utils.evaluation.fairness import fairness_figures
from utils.evaluation.results import (
    Cell,
    Finding,
    Picture,
    Results,
    attempt,
    mean_interval,
    model_revision,
    short_names,
)
from utils.evaluation.trial import EvalSet, Model, Rows, Trial, mean_of, nothing_read, share, values
from utils.methods.head import HEAD_FILE, head_powers, load_head, neutral_t, unfolded
from utils.models.classifiers import PROBE_TOLERANCE
from utils.models.policy import TextTable, judge
from utils.models.published import model_name
from utils.models.zeroshot import NonFiniteError, prompt_embeddings
from utils.processes.distributed import gather_objects
from utils.redaction import shown_setting
from utils.sets.labelled import AttributeDataset, interpretability_templates, twins
from utils.sets.pairs import PairDataset, PreferenceDataset, TypographicDataset
from utils.sets.typographic import font_files, word_style

# Figures that one pass measures together.
FAIRNESS = (
    *("max_skew", "max_skew_worst_query", "ndkl", "parity_difference", "opportunity_difference"),
    *("worst_group_accuracy", "group_gap"),
)
FIDELITY = ("fidelity", "fidelity_median", "fidelity_p95", "fidelity_max", "fidelity_cosine")
RETRIEVED = 10  # images per query

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """Cells that are measured together, in one pass over a set or its embeddings, and the function that does it."""

    find: Callable[[Trial, Sequence[Cell]], list[Finding]]
    cells: list[Cell]


def measure(trial: Trial, job: Job) -> list[Finding]:
    """Measures the cells of a job. A ``NonFiniteError`` gets the names of model and set."""
    try:
        return job.find(trial, job.cells)
    except NonFiniteError as error:
        raise NonFiniteError(f"--model {trial.model.name}, --data {job.cells[0]['dataset']}: {error}") from None


# The figures asked for


def find_revisions(settings: Any) -> dict[str, str]:
    """Digests of the models and the reference, by name, and of the linear head and the fonts, by flag."""
    names = dict.fromkeys([*settings.model, settings.reference_model_name_or_path])
    completion = settings.base_model, settings.processor
    found = {
        name: model_revision(model_name(name, *completion), settings.cache_dir) for name in names if name is not None
    }
    if settings.linear_head is not None:
        found["--linear_head"] = files_digest([settings.linear_head], settings.cache_dir)[:16]
    if "typographic" in settings.attack or "head_t" in settings.measure:
        found["--fonts"] = files_digest(font_files(settings.fonts), settings.cache_dir)[:16]
    return found


def wanted_jobs(
    settings: Any, revisions: dict[str, str], content: dict[str, str], model: str, dataset: str, data: EvalSet
) -> list[Job]:
    """The figures asked for. Two equal cells are the same measurement."""
    reading: dict[str, Any] = {
        "split": settings.split if data.labelled or "attack" not in data.splits else None,
        "num_samples": settings.num_samples,
        "model_revision": revisions[model],
        "digests": KIND,
        "shards": content,
    }
    if settings.image_size is not None:  # figures without the flag keep their identity
        reading["image_size"] = settings.image_size
    classes: dict[str, Any] = {}
    words: dict[str, Any] = {}
    if data.labelled:
        classes = {"prompts": text_digest([*data.classnames, "", *data.templates]), "classifier": settings.classifier}
        learnt_from = data.splits.get(settings.train_split)
        if learnt_from is not None and learnt_from.classnames != data.classnames:  # the labels depend on these names
            classes["train_prompts"] = text_digest(learnt_from.classnames)
        classes |= {name: shown_setting(getattr(settings, name)) for name in ("classnames", "linear_head")}
        if settings.train_num_samples is not None:
            classes["train_num_samples"] = settings.train_num_samples
        if settings.classifier == "linear_probe":
            classes["probe_tolerance"] = PROBE_TOLERANCE
        if settings.linear_head is not None:
            classes["classifier_revision"] = revisions["--linear_head"]
        style = json.loads(json.dumps(asdict(word_style(settings))))  # tuples become lists, as in results.json
        words = {"words": style, "font_files": revisions.get("--fonts")}

    def cell(measure: str, attack: str = "clean", **depends_on: Any) -> Cell:
        where = {name: depends_on.pop(name, None) for name in ("eps", "corruption", "severity", "sigma")}
        common = {"model": model, "dataset": dataset, "seed": settings.seed, "measure": measure, "attack": attack}
        own = {} if measure in FIDELITY else classes
        return common | where | {"settings": reading | own | depends_on}

    jobs: list[Job] = []
    attacks = [name for name in ATTACKS if name in settings.attack] if "accuracy" in settings.measure else []
    if data.published is not None:
        for name, digest in content.items() if attacks else ():
            corruption, severity = name.split()
            where = {"corruption": corruption, "severity": int(severity)}
            corrupted = cell("accuracy", "corruptions", files="published", shards={name: digest}, **where)
            jobs.append(Job(measure_accuracy, [corrupted]))
        return jobs
    for name in attacks:
        attack = ATTACKS[name]
        if name == "typographic":
            jobs.append(Job(measure_pairs, [cell(figure, name, **words) for figure in ("accuracy", "follows_word")]))
        elif data.labelled:
            gradients = {"loss": "cross-entropy", "attack_dtype": settings.attack_dtype}
            common = gradients if attack.follows_gradients else {}
            strengths = attack.cells(settings, len(data.classnames))
            jobs += [Job(measure_accuracy, [cell("accuracy", name, **common, **own)]) for own in strengths]
        elif name == "clean" and ("attack" not in data.splits or "clean" in data.splits):
            jobs.append(Job(measure_pairs, [cell("accuracy")]))
    if data.labelled:
        reference = settings.reference_model_name_or_path
        compared = {"reference": reference, "reference_revision": revisions.get(reference or "")}
        described = {"descriptions": text_digest(interpretability_templates())}
        for measure, find, figures, own in (
            ("interpretability", measure_interpretability, ("interpretability",), described),
            ("fidelity", measure_fidelity, FIDELITY, compared),
            ("retention", measure_retention, ("retention",), compared),
            ("fairness", measure_fairness, FAIRNESS, {"top_k": settings.top_k}),
        ):
            if measure in settings.measure:
                jobs.append(Job(find, [cell(figure, **own) for figure in figures]))
    if "head_t" in settings.measure and "attack" not in data.splits:  # t* needs separate validation pairs
        of_texts = ("accuracy", "follows_word") if data.labelled else ("pair_accuracy",)
        own = words if data.labelled else {"val_split": settings.val_split}
        swept = [cell("accuracy", t=t) for t in settings.t]
        swept += [cell(figure, "typographic", t=t, **own) for figure in of_texts for t in settings.t]
        if not data.labelled:
            chosen = {"task_tolerance": settings.task_tolerance, "candidates": settings.t}
            swept.append(cell("neutral_t", "typographic", **chosen, **own))
        jobs.append(Job(measure_head, swept))
        if "fairness" in settings.measure and data.labelled:
            swept = [cell(figure, top_k=settings.top_k, t=t) for t in settings.t for figure in FAIRNESS]
            jobs.append(Job(measure_fairness, swept))
    return jobs


# Texts: words on images, preference pairs, retention


def preference_dataset(trial: Trial, *, split: str | None = None, attacks: int = 1) -> PreferenceDataset:
    """A labelled set with words written on it, or a split of pairs, the one named ``split`` if it exists."""
    data, transform, settings = trial.data, trial.model.transform, trial.settings
    if not data.labelled:
        chosen = data.splits[split if split in data.splits else settings.split]
        return PairDataset(chosen.index, transform, order="sequential")
    labelled = data.splits[settings.split]
    return TypographicDataset(
        labelled.index,
        transform,
        order="sequential",
        classnames=labelled.classnames,
        style=word_style(settings),
        attacks_per_image=attacks,
        seed=settings.seed,
        fixed_epoch=-1,
        flag="--data",
    )


def judged(
    trial: Trial,
    dataset: PreferenceDataset,
    cell: Cell,
    *,
    reference: Model | None = None,
    watch: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch,
) -> dict[str, Rows]:
    """``choices`` of the model on every row, in the set's order. ``watch`` gets every batch and returns it."""
    model, templates = trial.model, trial.data.templates
    embed = partial(model.embed, model.texts(templates), None)
    ref_embed = partial(reference.embed, reference.texts(templates), None) if reference else None
    with trial.read(dataset, cell) as batches:
        return trial.merge(judge(map(watch, batches), embed, ref_embed, model.logit_scale))


def measure_pairs(trial: Trial, cells: Sequence[Cell]) -> list[Finding]:
    """Accuracy on attacked images and how often the rejected text wins; or accuracy on a pair set's clean images."""

    def found(cell: Cell, rows: Rows, **kept: Any) -> Finding:
        records = [{"position": position, "correct": value} for position, value in rows]
        return share(cell, values(rows), rows=records, **kept)

    if cells[0]["attack"] != "typographic":
        # A pair set's clean half has the same texts. In a single split, the regulariser's rows are the clean images.
        rows = judged(trial, preference_dataset(trial, split="clean"), cells[0])
        return [found(cells[0], rows["chosen" if "clean" in trial.data.splits else "clean"])]
    pictures: list[Picture] = []

    def watch(batch: dict[str, Any]) -> dict[str, Any]:
        images, clean = batch["images"].numpy(), {p: i for i, p in enumerate(batch["reg_positions"].tolist())}
        for i, position in enumerate(batch["positions"].tolist()):
            if trial.data.labelled and len(pictures) < PICTURES and position in clean:
                label, word = (batch["texts"][int(batch[name][i].flatten()[0])] for name in ("chosen", "rejected"))
                caption = {"label": label, "predicted_clean": "", "predicted": word}
                pictures.append(Picture(position, images[clean[position]] / 255, images[len(clean) + i] / 255, caption))
        return batch

    rows = judged(trial, preference_dataset(trial, split="attack"), cells[0], watch=watch)
    right, follows = dict(rows["chosen"]), dict(rows["rejected"])
    pictures = first_pictures(picture for part in gather_objects(trial.accelerator, pictures) for picture in part)
    for position, _, _, caption in pictures:
        if right[position]:
            caption["predicted"] = caption["label"]
        elif not follows[position]:
            caption["predicted"] = "another class"
    return [found(cells[0], rows["chosen"], pictures=pictures), found(cells[1], rows["rejected"])]


def measure_retention(trial: Trial, cells: Sequence[Cell]) -> list[Finding]:
    """Mean KL(pi_ref || pi) over the classes, on clean images."""
    reference = comparable_reference(trial, cells[0])
    rows = judged(trial, preference_dataset(trial, attacks=0), cells[0], reference=reference)["kl"]
    return [mean_of(cells[0], rows)]


def comparable_reference(trial: Trial, cell: Cell) -> Model:
    """The reference. Raises ``UserError`` if its input size or, for fidelity, its embedding size differs."""
    model, reference = trial.model, trial.reference
    assert reference is not None
    own_dim, other_dim = model.encoder.embed_dim, reference.encoder.embed_dim
    # Both see the pictures of ``model``, so it does not matter how the reference would round a crop's place.
    if model.transform != replace(reference.transform, even=model.transform.even):
        own, other = model.transform.output_size, reference.transform.output_size
        differ = f"sees images of {own} px, {reference.name} of {other} px, or resized in another way"
    elif cell["measure"] == "fidelity" and own_dim != other_dim:
        differ = f"embeds into {own_dim} dimensions, {reference.name} into {other_dim}"
    else:
        return reference
    raise UserError(f"--measure {cell['measure']}: {model.name} {differ}; name the model that it was fine-tuned from")


# Embeddings: interpretability, fidelity, features


def embedded_rows(trial: Trial, cell: Cell, values: Callable[[dict[str, Any], Tensor], Iterable[Any]]) -> Rows:
    """Calls ``values`` with every batch of a labelled set and its image_embeds; one value per image, in set order."""
    rows: Rows = []
    with trial.read(trial.labelled_images(), cell) as batches:
        for batch in batches:
            rows += zip(batch["positions"].tolist(), values(batch, trial.model.embed_images(batch)))
    return trial.merge({"rows": rows})["rows"]


def measure_interpretability(trial: Trial, cells: Sequence[Cell]) -> list[Finding]:
    """Cosine of an image to 150 descriptions of its true class, averaged over descriptions, then over images."""
    model, templates = trial.model, interpretability_templates()
    prompts = prompt_embeddings(model.clip, model.processor, trial.data.classnames, templates, model.device)
    described = F.normalize(prompts, dim=-1).mean(dim=1)  # not normalised again: z . mean(t) is the mean of the cosines

    def cosines(batch: dict[str, Any], embeds: Tensor) -> list[float]:
        of_class = described[batch["labels"].to(model.device)]
        return (F.normalize(embeds, dim=-1) * of_class).sum(dim=-1).tolist()

    return [mean_of(cells[0], embedded_rows(trial, cells[0], cosines))]


def measure_fidelity(trial: Trial, cells: Sequence[Cell]) -> list[Finding]:
    """Mean and quantiles of ||phi(x) - phi0(x)||^2 / ||phi0(x)||^2, and the mean cosine of the two embeddings."""
    reference = comparable_reference(trial, cells[0])

    def distance_and_cosine(batch: dict[str, Any], embeds: Tensor) -> Iterable[tuple[float, float]]:
        ref = reference.embed_images(batch)
        distance = (embeds - ref).square().sum(dim=-1) / ref.square().sum(dim=-1).clamp_min(1e-12)
        return zip(distance.tolist(), F.cosine_similarity(embeds, ref, dim=-1).tolist())

    rows = embedded_rows(trial, cells[0], distance_and_cosine)
    if not rows:
        raise nothing_read(cells[0])
    distances, cosines = torch.tensor(values(rows), dtype=torch.float64).T
    kept = [{"position": position, "value": value, "cosine": cosine} for position, (value, cosine) in rows]
    figures = {
        "fidelity": (float(distances.mean()), mean_interval(distances.tolist())),
        "fidelity_median": (float(distances.median()), None),
        "fidelity_p95": (float(distances.quantile(0.95)), None),
        "fidelity_max": (float(distances.max()), None),
        "fidelity_cosine": (float(cosines.mean()), mean_interval(cosines.tolist())),
    }
    return [
        Finding(cell, *figures[cell["measure"]], len(rows), kept if cell["measure"] == "fidelity" else ())
        for cell in cells
    ]


# The head, fairness, retrieval


def measure_head(trial: Trial, cells: Sequence[Cell]) -> list[Finding]:
    """Accuracies over the strength t of the model's head, with images embedded once; t* is from validation pairs."""
    settings, model, data = trial.settings, trial.model, trial.data
    head = load_head(model.name)
    weights = dict(zip(settings.t, head_powers(head["weight"].to(model.device), settings.t)))

    def sweep(dataset: PreferenceDataset) -> dict[float, dict[str, Rows]]:
        with trial.read(dataset, cells[0]) as batches:
            embedded = [batch | {"images": model.embed_images(batch)} for batch in batches]
        return {
            t: trial.merge(judge(embedded, partial(model.embed, table, weight), None, model.logit_scale))
            for t, weight in weights.items()
        }

    with unfolded(model.clip, head):
        table = model.texts(data.templates, per_prompt=True)
        found, neutral = sweep(preference_dataset(trial)), None
        if not data.labelled:
            val = sweep(preference_dataset(trial, split=settings.val_split))
            pair, task = (
                [sum(values(val[t][name])) / max(1, len(val[t][name])) for t in settings.t]
                for name in ("pair", "clean")
            )
            neutral = neutral_t(settings.t, pair, task, settings.task_tolerance)
    names = {"accuracy": "chosen", "follows_word": "rejected", "pair_accuracy": "pair"}
    findings = []
    for cell in cells:
        if cell["measure"] == "neutral_t":
            findings.append(Finding(cell, neutral, None, len(val[0.0]["pair"])))
        else:
            name = "clean" if cell["attack"] == "clean" else names[cell["measure"]]
            findings.append(share(cell, values(found[cell["settings"]["t"]][name])))
    return findings


def without_head(model: Model, head: dict[str, Tensor] | None) -> AbstractContextManager[None]:
    """Inside the block, a model with a head is as before the head was folded in."""
    return nullcontext() if head is None else unfolded(model.clip, head)


@torch.no_grad()
def cosines_by_strength(
    model: Model,
    table: TextTable,
    head: dict[str, Tensor] | None,
    strengths: Sequence[Any],
    images: Tensor,
    texts: Sequence[str],
) -> Iterator[tuple[float | None, Tensor]]:
    """(t, cosines (T, N) of texts and image_embeds (N, D)) for every strength t of the head; t is None without one."""
    powers: Sequence[Any] = [None] if head is None else head_powers(head["weight"].to(model.device), strengths)
    for t, weight in zip(strengths, powers):
        unit, text_embeds = model.embed(table, weight, images, texts)
        yield t, text_embeds @ unit.T


def measure_fairness(trial: Trial, cells: Sequence[Cell]) -> list[Finding]:
    """Fairness between groups, of retrieval by class prompts and of classification; over t if the job asks for it."""
    settings, model, name = trial.settings, trial.model, cells[0]["dataset"]
    labelled = trial.data.splits[settings.split]
    dataset = AttributeDataset(labelled.index, model.transform, num_classes=len(labelled.classnames))
    strengths = list(dict.fromkeys(cell["settings"].get("t") for cell in cells))
    head = load_head(model.name) if strengths != [None] else None
    with without_head(model, head):
        _, images, columns = trial.embedded(dataset, cells[0], "labels", "attributes")
        labels, attributes = torch.from_numpy(columns["labels"]), columns["attributes"].tolist()
        names = sorted(set(attributes))
        if trial.accelerator.is_main_process and (groups_of_one := twins(names)):
            alike = " and ".join(repr(names[place]) for place in groups_of_one[0])
            logger.warning("%s: attributes %s are taken for different groups", name, alike)
        if settings.top_k >= len(images):
            reason = "K must be smaller, or MaxSkew no longer depends on the model"
            raise UserError(f"--top_k {settings.top_k}: {name} holds {len(images)} images; {reason}")
        if len(names) < 2:
            raise UserError(f"--measure fairness: {name} knows one attribute only ({names[0]}); expected at least two")
        groups = torch.tensor([names.index(attribute) for attribute in attributes])
        table = model.texts(trial.data.templates, per_prompt=head is not None)
        figures = {
            t: fairness_figures(cosines.cpu(), labels, groups, settings.top_k)
            for t, cosines in cosines_by_strength(model, table, head, strengths, images, labelled.classnames)
        }
    return [Finding(cell, figures[cell["settings"].get("t")][cell["measure"]], None, len(images)) for cell in cells]


def draw_retrieved(trials: Iterable[Trial], set_name: str, path: Path, results: Results) -> None:
    """Draws the best images for every --query by every model on one set; for a head, at t = 0, t* and t = 1.

    Call on all processes. All trials are of one set; t* is left out if unknown.
    """
    rows: list[tuple[str, str, list[int]]] = []  # query, label, positions
    for trial in trials:
        settings, model = trial.settings, trial.model
        short = short_names(settings.model, of_models=True)
        head = load_head(model.name) if (Path(model.name) / HEAD_FILE).exists() else None
        known = [r["value"] for r in results.results if (r["model"], r["measure"]) == (model.name, "neutral_t")][-1:]
        strengths = [None] if head is None else sorted({0.0, 1.0, *known})
        dataset = trial.images(settings.split)
        cell: Cell = dict.fromkeys(("eps", "corruption", "severity", "sigma"))
        cell |= {"model": model.name, "dataset": set_name, "measure": "retrieval", "attack": "clean"}
        with without_head(model, head):
            positions, images, _ = trial.embedded(dataset, cell)
            table = model.texts(["{c}"], per_prompt=True)
            for t, cosines in cosines_by_strength(model, table, head, strengths, images, settings.query):
                label = short[model.name] + ("" if t is None else f"\nt{'*' if t in known else ''} = {t:g}")
                best = cosines.argsort(dim=1, descending=True, stable=True)[:, :RETRIEVED].tolist()
                rows += [(query, label, [positions[i] for i in line]) for query, line in zip(settings.query, best)]
    if trial.accelerator.is_main_process:
        rows.sort(key=lambda row: settings.query.index(row[0]))  # by query, then by model in the given order
        attempt(path.name, partial(draw_rows, path, dataset, rows), results.undrawn)


def draw_rows(path: Path, dataset: ShardDataset, rows: Sequence[tuple[str, str, list[int]]]) -> None:
    """Draws rows of (query, label of the row, positions of its images)."""
    from utils.evaluation.figures import draw_grid  # imports matplotlib, only if something is drawn

    shown = []
    for query, label, line in rows:
        images = [dataset[0, position, position]["image"] for position in line]
        shown.append((label, list(zip(images, [query, *[""] * len(images)]))))
    draw_grid(path, shown)
