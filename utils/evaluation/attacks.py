"""The table of attacks of an evaluation, and the accuracy of a labelled set under them."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError
from utils.evaluation.apgd import Point, make_points, run_apgd
from utils.evaluation.results import Cell, Finding, Picture, Row, cell_name
from utils.evaluation.square import square
from utils.evaluation.trial import Batches, Trial, share, title_of
from utils.methods.attacks import Logits, attack_seeds, frozen, gaussian_noise
from utils.models import classifiers
from utils.models.features import read_features, write_features
from utils.models.zeroshot import Classified, classified, ensemble, pgd_images, to_pixel_values
from utils.processes.distributed import from_main_process, gather_objects
from utils.processes.progress import RunProgress
from utils.sets.corruptions import require_package
from utils.sets.labelled import same_classes

PICTURES = 6  # kept for every attack


@dataclass(frozen=True)
class Attack:
    """One of --attack: its description in the report, the settings of its figures, and its function."""

    about: str
    # (settings, number of classes) -> for every figure, its strength and all other settings that it depends on.
    cells: Callable[[Any, int], Iterable[dict[str, Any]]] = lambda settings, num_classes: [{}]
    # (settings, cell, logits_fn, pixel_values, labels, positions) -> attacked pixel_values, all (B, 3, H, W) in [0,1].
    perturb: Callable[..., Tensor] | None = None
    follows_gradients: bool = False  # if so, logits_fn runs in --attack_dtype; answers are judged in float32
    any_answer: bool = False  # show the first images, the same at every strength, not those whose answer changed
    at_once: int = 1  # batches that are attacked together
    package: str | None = None


def pgd_cells(settings: Any, num_classes: int) -> list[dict[str, Any]]:
    steps, size = settings.attack_steps, settings.attack_step_size
    return [{"eps": eps, "attack_steps": steps, "attack_step_size": size or eps / 4} for eps in settings.eps]


def apgd_cells(settings: Any, num_classes: int) -> list[dict[str, Any]]:
    others = num_classes - 1
    if others < 1:
        raise UserError("--attack apgd: the set has one class only, no image of it can be classified wrongly")
    runs = {
        "apgd_steps": settings.apgd_steps,
        "apgd_targets": min(settings.apgd_targets, others),
        "targeted_loss": "difference of logits ratio" if others > 2 else "margin, for fewer than 4 classes",
        "restarts": 1,
    }
    return [{"eps": eps} | runs for eps in settings.eps]


def corruption_cells(settings: Any, num_classes: int) -> list[dict[str, Any]]:
    require_package()
    pairs = itertools.product(settings.corruptions, settings.severities)
    return [{"corruption": name, "severity": severity, "files": "made from clean images"} for name, severity in pairs]


# In the order of the report. Corruptions are applied when images are read. Two attacks are elsewhere: APGD works on a
# stream of images (``apgd_verdicts``), and written words are judged by texts (``measure_pairs``).
ATTACKS = {
    "clean": Attack("The images as they are; the most similar class is the answer."),
    "pgd": Attack(
        "Projected gradient descent: pixels may change by at most eps (the l_inf ball).",
        cells=pgd_cells,
        perturb=lambda settings, cell, logits_fn, *batch: pgd_images(
            logits_fn,
            *batch,
            eps=cell["eps"] / 255,
            step_size=cell["settings"]["attack_step_size"] / 255,
            num_steps=settings.attack_steps,
            seed=settings.seed,
        ),
        follows_gradients=True,
    ),
    "apgd": Attack(
        "APGD on the cross-entropy, then APGD-T against the other classes, each on the images still right, in the "
        "l_inf ball of radius eps.",
        cells=apgd_cells,
        follows_gradients=True,
    ),
    "square": Attack(
        "Square attack in the l_inf ball of radius eps: it sees scores, no gradients.",
        cells=lambda settings, _: [{"eps": eps, "square_queries": settings.square_queries} for eps in settings.eps],
        perturb=lambda settings, cell, logits_fn, *batch: square(
            logits_fn,
            *batch,
            eps=cell["eps"] / 255,
            num_queries=settings.square_queries,
            batch_size=settings.batch_size,
            seed=settings.seed,
        ),
        at_once=8,  # so that the images still under attack fill batches
        package="pyautoattack",
    ),
    "gaussian_noise": Attack(
        "Normal noise of standard deviation sigma on every value of every pixel.",
        cells=lambda settings, _: [{"sigma": sigma} for sigma in settings.sigma],
        perturb=lambda settings, cell, logits_fn, pixel_values, labels, positions: gaussian_noise(
            pixel_values, cell["sigma"] / 255, attack_seeds(settings.seed, f"noise {cell['sigma']:g}", positions)
        ),
        any_answer=True,
    ),
    "corruptions": Attack(
        "Common corruptions of ImageNet-C: noise, blur, weather and compression in five severities.",
        cells=corruption_cells,
        any_answer=True,
    ),
    "typographic": Attack(
        "A wrong class name is written on the image; photographs of preference pairs have words of their own."
    ),
}


@dataclass
class Verdicts:
    """The findings of one process in a pass: a record of every image, the first pictures, warnings."""

    trial: Trial
    cell: Cell
    batches: Batches
    logits_fn: Logits
    rows: list[Row] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    flat: int = 0  # images with a zero gradient at the start of a targeted attack

    def classified(self, perturb: Callable[..., Tensor] | None = None) -> Iterator[Classified]:
        """The batches of ``utils.models.zeroshot.classified``, without empty ones."""
        batches = classified(self.logits_fn, self.batches, device=self.trial.model.device, perturb=perturb)
        for number, found in enumerate(batch for batch in batches if len(batch.labels)):
            if number == 0:
                self.warnings += random_outputs(self.logits_fn, found.pixel_values)
            yield found

    def add(self, position: int, key: str, label: int, predicted: int, **more: Any) -> None:
        correct = predicted == label
        row = {"position": position, "key": key, "label": label, "predicted": predicted, "correct": correct}
        self.rows.append(row | more)
        self.batches.judged += 1
        self.batches.right += correct

    def show(self, position: int, clean: Tensor, attacked: Tensor, label: int, before: int, after: int) -> None:
        """Keeps a picture; ``before`` and ``after`` are the classes predicted for clean and attacked image."""
        names = self.trial.data.classnames
        caption = {"label": names[label], "predicted_clean": names[before], "predicted": names[after]}
        self.pictures.append(Picture(position, clean.cpu().numpy(), attacked.cpu().numpy(), caption))


def measure_accuracy(trial: Trial, cells: Sequence[Cell]) -> list[Finding]:
    """Whether each image of a labelled set is classified correctly under the cell's attack, judged in float32."""
    settings, model, (cell,) = trial.settings, trial.model, cells
    attack = ATTACKS[cell["attack"]]
    classifier = trial.classifier = trial.classifier or make_classifier(trial, cell)
    in_attack_dtype = copy.copy(model.encoder)  # shares the modules
    in_attack_dtype.compute_dtype = getattr(torch, settings.attack_dtype)

    def logits_fn(pixel_values: Tensor) -> Tensor:
        parts = pixel_values.split(settings.batch_size)  # the argument may hold several batches
        return torch.cat([classifier(model.encoder(part)) for part in parts])

    def attacked_fn(pixel_values: Tensor) -> Tensor:
        return classifier(in_attack_dtype(pixel_values))

    streams = cell["attack"] == "apgd"
    dataset = trial.labelled_images(cell["corruption"], cell["severity"])
    with frozen(model.encoder), trial.read(dataset, cell, at_once=attack.at_once, by_hand=streams) as batches:
        verdicts = Verdicts(trial, cell, batches, logits_fn)
        if streams:
            apgd_verdicts(verdicts, attacked_fn)
        else:
            batch_verdicts(verdicts, attack, attacked_fn if attack.follows_gradients else logits_fn)
    found = gather_objects(trial.accelerator, (verdicts.rows, verdicts.pictures, verdicts.flat))
    all_rows, all_pictures, flat = zip(*found)
    rows = sorted(itertools.chain(*all_rows), key=lambda row: row["position"])
    pictures = first_pictures(itertools.chain(*all_pictures))
    if cell["corruption"] is not None:
        pictures = beside_clean(trial, logits_fn, pictures)
    if sum(flat):
        verdicts.warnings.append(
            f"{sum(flat)} of {len(rows)} images have no gradient at all where the targeted attack starts: the model "
            "may hide its gradients (rounding, saturation), and gradient-based attacks then overstate its accuracy"
        )
    correct = [row["correct"] for row in rows]
    return [share(cell, correct, rows=rows, pictures=pictures, warnings=verdicts.warnings)]


def make_classifier(trial: Trial, cell: Cell) -> Callable[[Tensor], Tensor]:
    """image_embeds (B, D) -> logits (B, C), by class texts, by a linear head's file, or learnt from training images."""
    settings, model, data = trial.settings, trial.model, trial.data
    num_classes, embed_dim = len(data.classnames), model.encoder.embed_dim
    if settings.classifier == "zero_shot":
        class_embeds = ensemble(model.texts(data.templates)(data.classnames))
        return classifiers.LinearClassifier(class_embeds, scale=model.logit_scale, normalise=True)
    if settings.classifier == "knn":
        return classifiers.KnnClassifier(*train_features(trial, cell), num_classes).to(model.device)
    path, flag = settings.linear_head, "--linear_head"
    if settings.classifier == "linear_head" and path is None:
        return classifiers.own_linear_head(model.with_head, num_classes).to(model.device)
    if settings.classifier == "linear_probe":
        path, flag = learnt_probe(trial, cell), "--output_dir: the probe"
    return classifiers.read_linear_head(path, embed_dim, num_classes, flag).to(model.device)


def learnt_probe(trial: Trial, cell: Cell) -> Path:
    """The file of a probe learnt from --train_split. It is learnt only once, and can be used as a --linear_head."""
    fixed = ("prompts", "train_prompts", "train_num_samples", "probe_tolerance")
    settings = {name: cell["settings"][name] for name in fixed if name in cell["settings"]}
    path = learnt_path(trial, "probes", learnt_cell(trial, cell, "probe", settings))
    if not from_main_process(trial.accelerator, path.exists):
        features, labels = train_features(trial, cell)

        def learn() -> None:
            classifiers.save_linear_head(path, fitted_probe(trial, cell, features, labels))

        from_main_process(trial.accelerator, learn)
    return path


def fitted_probe(trial: Trial, cell: Cell, features: Tensor, labels: Tensor) -> classifiers.LinearClassifier:
    """A probe, fitted on the model's device. The bar shows how far the gradient has fallen, on a logarithmic scale."""
    learning = learnt_cell(trial, cell, "linear probe", {})
    with RunProgress(title_of(learning), 100) as progress:

        def show(step: classifiers.ProbeStep) -> None:
            fallen = math.log(max(step.gradient, 1e-30)) / math.log(classifiers.PROBE_TOLERANCE)
            done = max(progress.done, min(100, int(100 * fallen)))
            fields = {"iteration": step.iteration, "evaluations": step.evaluations, "loss": step.loss}
            progress.update(done, fields, report=done == 100)

        device, num_classes = trial.model.device, len(trial.data.classnames)
        return classifiers.fit_linear_probe(features.to(device), labels, num_classes, on_iteration=show)


def train_features(trial: Trial, cell: Cell) -> tuple[Tensor, Tensor]:
    """image_embeds (N, D) float32 and labels (N,) of --train_split, on the CPU; classes matched by name.

    N: all images or the first --train_num_samples, without unreadable ones. They are kept in features/ of the output
    directory, so that neither a kill during the fit nor another classifier embeds them again.
    """
    split, accelerator = trial.settings.train_split, trial.accelerator
    names = trial.data.splits[split].classnames
    dataset = trial.images(split, with_labels=True, num_classes=len(names))
    num_samples = min(trial.settings.train_num_samples or len(dataset), len(dataset))
    reading = {"num_samples": num_samples, "num_classes": len(names), "transform": asdict(trial.model.transform)}
    kept_as = learnt_cell(trial, cell, "features", reading)
    path, identity = learnt_path(trial, "features", kept_as), json.dumps(kept_as, sort_keys=True)
    kept = read_features(path, identity, trial.model.encoder.embed_dim)
    # Each node may have an output directory of its own: the file is used only if all processes have read it.
    read_by_all = all(gather_objects(accelerator, kept is not None))
    if kept is None or not read_by_all:
        _, features, columns = trial.embedded(dataset, kept_as, "labels", num_samples=num_samples)
        kept = features, torch.from_numpy(columns["labels"])
        from_main_process(accelerator, lambda: write_features(path, *kept, identity))
    elif accelerator.is_main_process:
        with RunProgress(title_of(kept_as), num_samples) as progress:
            progress.update(num_samples, {"kept from before, in": path}, report=True)
    (features, labels), places = kept, same_classes(names, trial.data.classnames)
    return features, labels if places is None else torch.tensor(places)[labels]


def learnt_cell(trial: Trial, cell: Cell, measure: str, settings: dict[str, Any]) -> Cell:
    """The identity of something learnt from --train_split: model, set and split with their contents, ``settings``."""
    split, of_cell = trial.settings.train_split, cell["settings"]
    content = {name: of_cell[name] for name in ("digests", "model_revision")} | {"shards": of_cell["shards"][split]}
    only = {"model": trial.model.name, "dataset": cell["dataset"], "measure": measure, "attack": split}
    return dict.fromkeys(cell) | only | {"settings": content | settings}


def learnt_path(trial: Trial, folder: str, learnt: Cell) -> Path:
    return Path(trial.settings.output_dir) / folder / f"{cell_name(learnt)}.safetensors"


def batch_verdicts(verdicts: Verdicts, attack: Attack, perturbed_fn: Logits) -> None:
    """Changes every image once, or not at all, and judges it once."""
    settings, cell = verdicts.trial.settings, verdicts.cell
    perturb = None if attack.perturb is None else partial(attack.perturb, settings, cell, perturbed_fn)
    strongest = cell["corruption"] is None or cell["severity"] == max(settings.severities)
    for found in verdicts.classified(perturb):
        top5 = found.logits.topk(min(5, found.logits.shape[1]), dim=1).indices
        predicted = found.logits.argmax(dim=1)
        answers = zip(found.positions, found.keys, *(x.tolist() for x in (found.labels, predicted, top5)))
        for *answer, likeliest in answers:
            verdicts.add(*answer, top5=likeliest)
        if cell["attack"] != "clean" and strongest and len(verdicts.pictures) < PICTURES:
            show_turned(verdicts, found, predicted, attack.any_answer)


@torch.no_grad()
def show_turned(verdicts: Verdicts, found: Classified, predicted: Tensor, any_answer: bool) -> None:
    """Keeps pictures of a batch's first images; without ``any_answer``, of those that the attack made wrong."""
    rows = torch.arange(len(predicted), device=predicted.device)
    rows = rows[:PICTURES] if any_answer else rows[predicted != found.labels]
    if not len(rows):
        return
    clean = verdicts.logits_fn(found.pixel_values[rows]).argmax(dim=1).tolist()
    labels, after = found.labels.tolist(), predicted.tolist()
    shown = [(row, before) for row, before in zip(rows.tolist(), clean) if any_answer or before == labels[row]]
    for row, before in shown[:PICTURES]:
        images = found.pixel_values[row], found.attacked[row]
        verdicts.show(found.positions[row], *images, labels[row], before, after[row])


def apgd_verdicts(verdicts: Verdicts, attacked_fn: Logits) -> None:
    """APGD-CE and APGD-T: images enter when rows become free, and leave as soon as they are broken."""
    settings, batches = verdicts.trial.settings, verdicts.batches
    keys: dict[int, str] = {}
    under_attack: dict[int, Point] = {}

    def points() -> Iterator[Point]:
        for found in verdicts.classified():
            predicted = found.logits.argmax(dim=1)
            keys.update(zip(found.positions, found.keys))
            for position, label, guess in zip(found.positions, found.labels.tolist(), predicted.tolist()):
                if guess != label:
                    verdicts.add(position, keys.pop(position), label, guess, broken_by="clean", forwards=1)
            right = (predicted == found.labels).nonzero()[:, 0]
            positions = [found.positions[row] for row in right.tolist()]
            tensors = (found.pixel_values[right], found.labels[right], found.logits[right])
            for point in make_points(positions, *tensors, settings.apgd_targets):
                under_attack[point.position] = point
                yield point

    most = (settings.apgd_steps + 1) * (1 + min(settings.apgd_targets, len(verdicts.trial.data.classnames) - 1))

    def watched(pixel_values: Tensor) -> Tensor:
        # An image under attack counts by its forward passes so far: else the bar would stop while robust ones remain.
        batches.show(batches.judged + sum(sum(point.spent) for point in under_attack.values()) / most)
        return attacked_fn(pixel_values)

    for point in run_apgd(
        points(),
        watched,
        eps=verdicts.cell["eps"] / 255,
        num_steps=settings.apgd_steps,
        batch_size=settings.batch_size,
        seed=settings.seed,
        judge=None if settings.attack_dtype == "float32" else verdicts.logits_fn,
    ):
        del under_attack[point.position]
        broken_by = {None: None, 0: "cross-entropy"}.get(point.broken_by, f"target {point.broken_by}")
        shown = verdicts.pictures
        early = len(shown) < PICTURES or point.position < shown[-1].position  # avoids copies to the host
        if broken_by is not None and early and point.adversarial is not None:
            images = point.pixel_values, point.adversarial
            verdicts.show(point.position, *images, point.label, point.label, point.predicted)
            verdicts.pictures = first_pictures(shown)
        verdicts.flat += point.zero_gradient
        answer = point.position, keys.pop(point.position), point.label, point.predicted
        verdicts.add(*answer, broken_by=broken_by, forwards=point.forwards + 1)


@torch.no_grad()
def beside_clean(trial: Trial, logits_fn: Logits, pictures: Sequence[Picture]) -> list[Picture]:
    """One picture of a corruption next to the clean image. Published files have no clean images: no picture."""
    if trial.data.published is not None or not pictures:
        return []
    dataset, position = trial.labelled_images(), pictures[0].position
    pixel_values = to_pixel_values(dataset[0, position, position]["image"][None], trial.model.device)
    before = trial.data.classnames[int(logits_fn(pixel_values).argmax())]
    caption = pictures[0].caption | {"predicted_clean": before}
    return [pictures[0]._replace(clean=pixel_values[0].cpu().numpy(), caption=caption)]


def first_pictures(pictures: Iterable[Picture]) -> list[Picture]:
    """The first ones in the set's order, so that they are the same for any number of processes."""
    return sorted(pictures, key=lambda picture: picture.position)[:PICTURES]


@torch.no_grad()
def random_outputs(logits_fn: Logits, pixel_values: Tensor) -> list[str]:
    """A warning if two forward passes of the same images differ: attacks that follow gradients then follow noise."""
    first, second = (F.normalize(logits_fn(pixel_values[:16]).double(), dim=1) for _ in range(2))
    difference = float((first - second).norm(dim=1).max())
    if difference <= 1e-4:
        return []
    return [
        f"the model answers the same images differently (logits by {difference:.2g} of their length): attacks need "
        "gradients averaged over many forwards, which these are not, so the attacked accuracy is too high"
    ]
