"""What is measured of a model on a set, beside accuracy under attacks: texts, embeddings, the head, fairness."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.data.shards import ShardDataset
from utils.errors import UserError
from utils.evaluation.attacks import PICTURES, first_pictures, measure_accuracy
from utils.evaluation.fairness import fairness_figures
from utils.evaluation.results import Cell
from utils.evaluation.trial import Finding, Model, Picture, Rows, Trial, mean_of, nothing_read, share, values
from utils.methods.head import head_powers, load_head, neutral_t, unfolded
from utils.models.policy import TextTable, judge
from utils.models.zeroshot import prompt_embeddings
from utils.processes.distributed import gather_objects
from utils.sets.labelled import AttributeDataset, interpretability_templates, same_classes, twins
from utils.sets.pairs import PairDataset, PreferenceDataset, TypographicDataset
from utils.sets.typographic import word_style
from utils.training.metrics import mean_interval

# Figures that one pass gives together.
FAIRNESS = (
    *("max_skew", "max_skew_worst_query", "ndkl", "parity_difference", "opportunity_difference"),
    *("worst_group_accuracy", "group_gap"),
)
FIDELITY = ("fidelity", "fidelity_median", "fidelity_p95", "fidelity_max", "fidelity_cosine")
RETRIEVED = 10  # images of every query

logger = logging.getLogger(__name__)


def by_classifier(trial: Trial, job: Sequence[Cell]) -> bool:
    """Accuracy of a labelled set by its classes, not by texts of each image's own."""
    cell = job[0]
    by_texts = cell["attack"] == "typographic" or "t" in cell["settings"]
    return trial.data.labelled and cell["measure"] == "accuracy" and not by_texts


def measure(trial: Trial, job: Sequence[Cell]) -> list[Finding]:
    """The figures of one job: cells that one pass, or one look at the embeddings, gives together."""
    first = job[0]
    if first["measure"] in FAIRNESS:
        return measure_fairness(trial, job)
    if any("t" in cell["settings"] for cell in job):
        return measure_head(trial, job)
    if first["measure"] in FIDELITY:
        return measure_fidelity(trial, job)
    if first["measure"] == "retention":
        return [measure_retention(trial, first)]
    if first["measure"] == "interpretability":
        return [measure_interpretability(trial, first)]
    if by_classifier(trial, job):
        return [measure_accuracy(trial, first)]
    return measure_pairs(trial, job)


# Texts: words on images, preference pairs, retention


def preference_dataset(trial: Trial, *, split: str | None = None, attacks: int = 1) -> PreferenceDataset:
    """A labelled set with words written on it, or a split of pairs: ``split`` if there is one of this name."""
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
    """``choices`` of the model on every row, in the set's order. ``watch`` sees every batch and passes it on."""
    model, templates = trial.model, trial.data.templates
    embed = partial(model.embed, model.texts(templates), None)
    ref_embed = partial(reference.embed, reference.texts(templates), None) if reference else None
    with trial.read(dataset, cell) as batches:
        return trial.merge(judge(map(watch, batches), embed, ref_embed, model.logit_scale))


def measure_pairs(trial: Trial, job: Sequence[Cell]) -> list[Finding]:
    """Accuracy on attacked images and how often the rejected text wins, or accuracy on a pair set's clean images."""

    def found(cell: Cell, rows: Rows, **kept: Any) -> Finding:
        records = [{"position": position, "correct": value} for position, value in rows]
        return share(cell, values(rows), rows=records, **kept)

    if job[0]["attack"] != "typographic":
        # The clean half of a pair set is judged by the same texts; in a single split, the rows of the regulariser are.
        rows = judged(trial, preference_dataset(trial, split="clean"), job[0])
        return [found(job[0], rows["chosen" if "clean" in trial.data.splits else "clean"])]
    pictures: list[Picture] = []

    def watch(batch: dict[str, Any]) -> dict[str, Any]:
        images, clean = batch["images"].numpy(), {p: i for i, p in enumerate(batch["reg_positions"].tolist())}
        for i, position in enumerate(batch["positions"].tolist()):
            if trial.data.labelled and len(pictures) < PICTURES and position in clean:
                label, word = (batch["texts"][int(batch[name][i].flatten()[0])] for name in ("chosen", "rejected"))
                caption = {"label": label, "predicted_clean": "", "predicted": word}
                pictures.append(Picture(position, images[clean[position]] / 255, images[len(clean) + i] / 255, caption))
        return batch

    rows = judged(trial, preference_dataset(trial, split="attack"), job[0], watch=watch)
    right, follows = dict(rows["chosen"]), dict(rows["rejected"])
    pictures = first_pictures(picture for part in gather_objects(trial.accelerator, pictures) for picture in part)
    for position, _, _, caption in pictures:
        if right[position]:
            caption["predicted"] = caption["label"]
        elif not follows[position]:
            caption["predicted"] = "another class"
    return [found(job[0], rows["chosen"], pictures=pictures), found(job[1], rows["rejected"])]


def measure_retention(trial: Trial, cell: Cell) -> Finding:
    """Mean KL(pi_ref || pi) over the classes, on clean images."""
    reference = comparable_reference(trial, cell)
    return mean_of(cell, judged(trial, preference_dataset(trial, attacks=0), cell, reference=reference)["kl"])


def comparable_reference(trial: Trial, cell: Cell) -> Model:
    """The reference. ``UserError`` where it sees other pixels or, for fidelity, embeds into other dimensions."""
    model, reference, fidelity = trial.model, trial.reference, cell["measure"] == "fidelity"
    assert reference is not None
    if model.transform != reference.transform:
        own, other = model.transform.output_size, reference.transform.output_size
        differ = f"sees images of {own} px, {reference.name} of {other} px, or resized in another way"
    elif fidelity and model.encoder.embed_dim != reference.encoder.embed_dim:
        differ = (
            f"embeds into {model.encoder.embed_dim} dimensions, {reference.name} into {reference.encoder.embed_dim}"
        )
    else:
        return reference
    raise UserError(f"--measure {cell['measure']}: {model.name} {differ}; name the model that it was fine-tuned from")


# Embeddings: interpretability, fidelity, features


def embedded_rows(trial: Trial, cell: Cell, values: Callable[[dict[str, Any], Tensor], Iterable[Any]]) -> Rows:
    """``values`` of every batch of a labelled set and its image_embeds, one an image, in the set's order."""
    rows: Rows = []
    with trial.read(trial.labelled_images(), cell) as batches:
        for batch in batches:
            rows += zip(batch["positions"].tolist(), values(batch, trial.model.embed_images(batch)))
    return trial.merge({"rows": rows})["rows"]


def measure_interpretability(trial: Trial, cell: Cell) -> Finding:
    """Cosine of an image to 150 descriptions of its true class, mean over them and then over images."""
    model, templates = trial.model, interpretability_templates()
    prompts = prompt_embeddings(model.clip, model.processor, trial.data.classnames, templates, model.device)
    described = F.normalize(prompts, dim=-1).mean(dim=1)  # a mean of cosines is the cosine to nothing: not made unit

    def cosines(batch: dict[str, Any], embeds: Tensor) -> list[float]:
        of_class = described[batch["labels"].to(model.device)]
        return (F.normalize(embeds, dim=-1) * of_class).sum(dim=-1).tolist()

    return mean_of(cell, embedded_rows(trial, cell, cosines))


def measure_fidelity(trial: Trial, job: Sequence[Cell]) -> list[Finding]:
    """||phi(x) - phi0(x)||^2 / ||phi0(x)||^2, its mean and quantiles, and the cosine between the two."""
    reference = comparable_reference(trial, job[0])

    def distance_and_cosine(batch: dict[str, Any], embeds: Tensor) -> Iterable[tuple[float, float]]:
        ref = reference.embed_images(batch)
        distance = (embeds - ref).square().sum(dim=-1) / ref.square().sum(dim=-1).clamp_min(1e-12)
        return zip(distance.tolist(), F.cosine_similarity(embeds, ref, dim=-1).tolist())

    rows = embedded_rows(trial, job[0], distance_and_cosine)
    if not rows:
        raise nothing_read(job[0])
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
        for cell in job
    ]


def train_features(trial: Trial, cell: Cell) -> tuple[Tensor, Tensor]:
    """image_embeds (N, D) float32 and labels (N,) of the whole --train_split, on the CPU; its classes found by name."""
    split = trial.settings.train_split
    labelled = trial.data.splits[split]
    num_classes = len(labelled.classnames)
    dataset = ShardDataset(
        labelled.index, trial.model.transform, order="sequential", with_labels=True, num_classes=num_classes
    )
    cell = cell | {"measure": "features", "attack": split}
    _, features, columns = trial.embedded(dataset, cell, "labels", num_samples=len(dataset))
    labels, places = torch.from_numpy(columns["labels"]), same_classes(labelled.classnames, trial.data.classnames)
    return features, labels if places is None else torch.tensor(places)[labels]


# The head, fairness, retrieval


def measure_head(trial: Trial, job: Sequence[Cell]) -> list[Finding]:
    """Accuracies over the strength of the model's head, images embedded once; t* comes from validation pairs."""
    settings, model, data = trial.settings, trial.model, trial.data
    head = load_head(model.name)
    weights = dict(zip(settings.t, head_powers(head["weight"].to(model.device), settings.t)))

    def sweep(dataset: PreferenceDataset) -> dict[float, dict[str, Rows]]:
        with trial.read(dataset, job[0]) as batches:
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
    for cell in job:
        if cell["measure"] == "neutral_t":
            findings.append(Finding(cell, neutral, None, len(val[0.0]["pair"])))
        else:
            name = "clean" if cell["attack"] == "clean" else names[cell["measure"]]
            findings.append(share(cell, values(found[cell["settings"]["t"]][name])))
    return findings


def without_head(model: Model, head: dict[str, Tensor] | None) -> AbstractContextManager[None]:
    """Inside, a model with a head is as it was before the head was folded in."""
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
    """(t, cosines (T, N) of texts and image_embeds (N, D)) for every strength of the head; t is None without a head."""
    powers: Sequence[Any] = [None] if head is None else head_powers(head["weight"].to(model.device), strengths)
    for t, weight in zip(strengths, powers):
        unit, text_embeds = model.embed(table, weight, images, texts)
        yield t, text_embeds @ unit.T


def measure_fairness(trial: Trial, job: Sequence[Cell]) -> list[Finding]:
    """Of retrieval by the class prompts and of classification, between attributes; over t where the job asks."""
    settings, model, name = trial.settings, trial.model, job[0]["dataset"]
    labelled = trial.data.splits[settings.split]
    dataset = AttributeDataset(labelled.index, model.transform, num_classes=len(labelled.classnames))
    strengths = list(dict.fromkeys(cell["settings"].get("t") for cell in job))
    head = load_head(model.name) if strengths != [None] else None
    with without_head(model, head):
        _, images, columns = trial.embedded(dataset, job[0], "labels", "attributes")
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
    return [Finding(cell, figures[cell["settings"].get("t")][cell["measure"]], None, len(images)) for cell in job]


def retrieved(
    trial: Trial, cell: Cell, head: dict[str, Tensor] | None, strengths: Sequence[float | None]
) -> dict[float | None, list[list[int]]]:
    """t -> positions of the best ``RETRIEVED`` images of every --query; t is None for a model without a head."""
    settings, model = trial.settings, trial.model
    dataset = ShardDataset(trial.data.splits[settings.split].index, model.transform, order="sequential")
    with without_head(model, head):
        positions, images, _ = trial.embedded(dataset, cell)
        table = model.texts(["{c}"], per_prompt=True)
        found = {}
        for t, cosines in cosines_by_strength(model, table, head, strengths, images, settings.query):
            best = cosines.argsort(dim=1, descending=True, stable=True)[:, :RETRIEVED]
            found[t] = [[positions[i] for i in line] for line in best.tolist()]
        return found
