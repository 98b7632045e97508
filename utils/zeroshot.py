"""Zero-shot classification: class names and templates, class embeddings, clean and attacked predictions."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from utils.attacks import Logits, attack_seeds, frozen, pgd, uniform_start
from utils.class_names import composed, describe_twins, twins
from utils.classifiers import LinearClassifier, own_linear_head, read_linear_head
from utils.encoders import ImageEncoder, TextEncoder, has_text, logit_scale
from utils.errors import UserError
from utils.losses import cross_entropy
from utils.progress import RunProgress
from utils.redaction import display_url
from utils.shard_sources import default_cache_dir, expand_shards, is_remote, read_text, sibling
from utils.shards import ShardIndex, index_shards
from utils.text_files import holds_controls, text_lines
from utils.tokens import fill_up, read_prompts, refuse_equal_texts

logger = logging.getLogger(__name__)

DEFAULT_TEMPLATES = ["a photo of a {c}."]
IMAGENET = "imagenet"  # --classnames imagenet
LONGEST_NAME = 1000  # characters; CLIP reads the first 77 tokens
PROMPTS = Path(__file__).parent / "prompts"


def read_classnames(path: str | Path, cache_dir: str | None = None) -> list[str]:
    """One class name per line, the line number is the class. Raises ``UserError`` for an absent, empty or odd file.

    A name has at most ``LONGEST_NAME`` characters and no control characters, and is given in NFC. A line ends where
    ``text_lines`` says: U+2028 and the like are letters of a name. Spaces around a name and empty lines at the end are no part
    of it.
    """
    text = read_text(str(path), cache_dir or default_cache_dir())
    path = display_url(str(path))
    if text is None:
        raise UserError(f"{path}: no such file; expected class names, one per line, line number = class")
    names = [composed(line.strip()) for line in text_lines(text, str(path))]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise UserError(f"{path}: holds no class names; expected one per line")
    if "" in names:
        raise UserError(f"{path}: line {names.index('') + 1} is empty; expected a class name on every line")
    for number, name in enumerate(names, 1):
        if len(name) > LONGEST_NAME or holds_controls(name):
            raise UserError(
                f"{path}: line {number} is no class name: too long, or with control characters: {name[:40]!r}"
            )
    return names


def read_templates(path: str | Path | None, cache_dir: str | None = None) -> list[str]:
    """Prompt templates, one per line, ``{c}`` for the class name; CLIP's simplest one where the file is absent."""
    text = None if path is None else read_text(str(path), cache_dir or default_cache_dir())
    where = display_url(str(path))
    templates = [line.strip() for line in text_lines(text or "", where) if line.strip()]
    for template in templates:
        if "{c}" not in template or len(template) > LONGEST_NAME:
            raise UserError(
                f"{where}: template {template[:100]!r} is too long or has no {{c}}, the place of the class name"
            )
        if holds_controls(template.replace("\t", " ")):
            raise UserError(f"{where}: template {template[:100]!r} holds control characters; take them out")
    return templates or list(DEFAULT_TEMPLATES)


def imagenet_prompts() -> tuple[list[str], list[str]]:
    """CLIP's names of ImageNet's 1000 classes, in class order, and its 80 templates.

    "missile" and "sunglasses" each name two classes, as in the source, of which one can never be told from the other.
    Source: OpenAI's CLIP, MIT License, see utils/prompts/LICENCE.md.
    """
    prompts = json.loads((PROMPTS / "imagenet.json").read_text(encoding="utf-8"))
    return prompts["classnames"], prompts["templates"]


def imagenet_wordnet_ids() -> list[str]:
    """The WordNet ids of ImageNet's 1000 classes, such as n01440764, in class order: the folders of the official files."""
    return (PROMPTS / "imagenet_wordnet_ids.txt").read_text(encoding="utf-8").split()


def interpretability_templates() -> list[str]:
    """150 everyday captions with ``{c}`` for the class name: the texts of the measure of interpretability."""
    return text_lines((PROMPTS / "interpretability_templates.txt").read_text(encoding="utf-8"))


def find_classes(
    shards: Sequence[str], classnames: str | None, flag: str, cache_dir: str | None = None
) -> tuple[list[str], list[str]]:
    """Class names and templates of a set: ``classnames`` if given, else the file beside its shards or one folder up.

    ``classnames`` "imagenet" stands for ``imagenet_prompts()``, where there is no file of this name. UserError where shards of
    several folders have lists that differ: a label has one meaning.
    """
    if classnames == IMAGENET and not os.path.isfile(classnames):
        return imagenet_prompts()
    path = classnames or _list_of(shards[0], cache_dir)
    if path is None:
        raise UserError(
            f"{flag}: no classnames.txt beside {display_url(shards[0])} or one folder up; put one there (one name per "
            "line, line number = class) or name one with --classnames (--classnames imagenet: CLIP's names of ImageNet)"
        )
    names = read_classnames(path, cache_dir)
    if not classnames:
        one_of_folder = {sibling(shard, "classnames.txt"): shard for shard in reversed(shards)}
        for other in dict.fromkeys(_list_of(shard, cache_dir) for shard in one_of_folder.values()):
            if other not in (path, None) and read_classnames(other, cache_dir) != names:
                raise UserError(
                    f"{flag}: {display_url(path)} and {display_url(other)} are not the same, so that one label would name two "
                    "classes; give sets with equal lists, or one list for all with --classnames"
                )
    return names, read_templates(sibling(path, "zeroshot_classification_templates.txt"), cache_dir)


def _list_of(shard: str, cache_dir: str | None) -> str | None:
    """The classnames.txt beside a shard, else one folder up, else None."""
    place = shard if is_remote(shard) else os.path.abspath(shard)
    for path in (sibling(place, "classnames.txt"), sibling(place.rpartition("/")[0], "classnames.txt")):
        if path and read_text(path, cache_dir or default_cache_dir()) is not None:
            return path
    return None


def warn_of_twins(names: Sequence[str], where: str) -> None:
    """Says where classes have one name, or names that differ in case, spaces or underscores alone: ImageNet has four such."""
    if groups := twins(names):
        logger.warning(
            "%s: %s have one name for a text tower, which can never tell them apart; rename one, unless figures of others "
            "with these names are compared",
            where,
            describe_twins(names, groups),
        )


@dataclass
class LabelledSet:
    """Shards and, where they are labelled, their class names and prompt templates."""

    index: ShardIndex
    classnames: list[str]
    templates: list[str]


def open_set(
    patterns: Sequence[str],
    *,
    flag: str,
    with_classes: bool,
    classnames: str | None = None,
    cache_dir: str | None = None,
    cache_limit_gb: float | None = None,
    allow_pipe_urls: bool = False,
) -> LabelledSet:
    """Finds and counts the shards that a flag names, and reads their class names. Raises ``UserError``."""
    urls = expand_shards(patterns, flag=flag, allow_pipe_urls=allow_pipe_urls, cache_dir=cache_dir)
    names, templates = find_classes(urls, classnames, flag, cache_dir) if with_classes else ([], [])
    warn_of_twins(names, f"{flag} {display_url(patterns[0])}")
    with RunProgress(f"counting {flag}", len(urls), transient=True) as progress:
        index = index_shards(
            urls,
            cache_dir=cache_dir,
            progress=lambda done, _: progress.update(done),
            cache_limit_gb=cache_limit_gb,
            flag=flag,
        )
    return LabelledSet(index, names, templates)


def set_classifier(
    model: PreTrainedModel,
    processor: Any,
    encoder: ImageEncoder,
    labelled: LabelledSet,
    device: torch.device,
    linear_head: str | None = None,
) -> LinearClassifier:
    """What tells the classes of a set apart: a linear head's file; else class texts by the text tower; else the model's head.

    The class texts' logits are s * cos(z, t_c), s = exp(logit_scale); SigLIP's bias, the same for all classes, is left out.
    Raises ``UserError`` where there is none of them, or another number of classes.
    """
    if linear_head is not None:
        return read_linear_head(linear_head, encoder.embed_dim, len(labelled.classnames)).to(device)
    if not has_text(model.config):
        return own_linear_head(model, len(labelled.classnames)).to(device)
    embeds = class_embeddings(model, processor, labelled.classnames, labelled.templates, device)
    return LinearClassifier(embeds, scale=logit_scale(model), normalise=True)


def class_embeddings(
    model: PreTrainedModel,
    processor: Any,
    classnames: Sequence[str],
    templates: Sequence[str],
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> Tensor:
    """t_c: the mean over templates of unit text embeddings, made unit again. -> (C, D), float32, on ``device``.

    Raises ``UserError`` for different names that are one to the model.
    """
    refuse_equal_texts(processor, model.config, classnames, templates[0])
    return ensemble(prompt_embeddings(model, processor, classnames, templates, device, batch_size))


def ensemble(prompt_embeds: Tensor) -> Tensor:
    """Unit embedding of each text from those of its prompts: normalise, mean, normalise. (T, P, D) -> (T, D)."""
    return F.normalize(F.normalize(prompt_embeds.float(), dim=-1).mean(dim=1), dim=-1)


@torch.no_grad()
def prompt_embeddings(
    model: PreTrainedModel,
    processor: Any,
    texts: Sequence[str],
    templates: Sequence[str],
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> Tensor:
    """Un-normalised embeddings of every text in every template, (T, P, D) float32 on ``device``.

    The text tower visits ``device`` for this and returns to where it was.
    """
    encoder = TextEncoder(model)
    home = next(encoder.text_model.parameters()).device
    encoder.to(device)
    prompts = [template.replace("{c}", text) for text in texts for template in templates]
    rows = read_prompts(processor, model.config, prompts)
    embeds = [
        encoder(*fill_up(rows[first : first + batch_size], processor, model.config).to(device))
        for first in range(0, len(prompts), batch_size)
    ]
    encoder.to(home)
    found = torch.cat(embeds)
    refuse_non_finite_rows(found.norm(dim=-1, keepdim=True), [f"text {prompt!r}" for prompt in prompts], "embeddings")
    return found.view(len(texts), len(templates), -1)


class NonFiniteError(UserError):
    """A model whose numbers are not finite: no figure can be made of them."""

    every_rank = False  # it is met by the process that reads the image


def refuse_non_finite_rows(values: Tensor, keys: Sequence[str], what: str) -> None:
    """``NonFiniteError`` that names the first of the rows (N, D) of ``keys`` that is not finite. Synchronises."""
    finite = values.isfinite().all(dim=1)
    if not finite.all():
        key = keys[int((~finite).nonzero()[0])]
        raise NonFiniteError(
            f"{key}: its {what} are not finite; no figure is made of them; the model's numbers overflow: try mixed_precision "
            "no or bf16, else give another checkpoint"
        )


class Classified(NamedTuple):
    """One batch on its way through a classifier. B images; B may be 0."""

    positions: list[int]  # in the set
    keys: list[str]
    labels: Tensor  # (B,) int64
    pixel_values: Tensor  # (B, 3, H, W) float32 in [0,1]
    attacked: Tensor  # the same, or what was made of it
    logits: Tensor  # (B, C), of ``attacked``


def classified(
    logits_fn: Callable[[Tensor], Tensor],
    batches: Iterable[dict[str, Any]],
    *,
    device: torch.device,
    perturb: Callable[[Tensor, Tensor, Sequence[int]], Tensor] | None = None,
) -> Iterator[Classified]:
    """The batches of an evaluation loader, moved to the device, changed by ``perturb`` and classified.

    Args:
        logits_fn: pixel_values (B, 3, H, W) -> logits (B, C).
        batches: with ``images`` uint8 (B, 3, H, W), ``labels`` and ``positions`` (B,) int64, ``keys``.
        perturb: (pixel_values, labels, positions) -> pixel_values; it takes gradients by itself.
    """
    for batch in batches:
        count = len(batch["positions"])
        images, labels, places = batch["images"], batch["labels"], batch["positions"]
        if count == 0:  # a rank that has run out goes on with a black image: under ZeRO-3 all must make equal forwards
            images, labels, places = images.new_zeros(1, *images.shape[1:]), labels.new_zeros(1), places.new_zeros(1)
        pixel_values, labels = to_pixel_values(images, device), labels.to(device)
        attacked = pixel_values if perturb is None else perturb(pixel_values, labels, places.tolist())
        with torch.no_grad():
            logits = logits_fn(attacked)
        refuse_non_finite_rows(logits[:count], batch["keys"], "logits")
        tensors = (tensor[:count] for tensor in (labels, pixel_values, attacked, logits))
        yield Classified(batch["positions"].tolist(), list(batch["keys"]), *tensors)


def pgd_images(
    logits_fn: Callable[[Tensor], Tensor],
    pixel_values: Tensor,
    labels: Tensor,
    positions: Sequence[int],
    *,
    eps: float,
    step_size: float,
    num_steps: int,
    seed: int,
) -> Tensor:
    """Images under PGD on the cross-entropy; the random start of the image at position i depends on (seed, i) alone.

    pixel_values (B, 3, H, W) float32 in [0,1] -> the same; eps, step_size as shares of the pixel range.
    """
    delta = pgd(
        lambda adversarial: cross_entropy(logits_fn(adversarial), labels),
        pixel_values,
        eps=eps,
        step_size=step_size,
        num_steps=num_steps,
        start=uniform_start(pixel_values, eps, attack_seeds(seed, 0, positions)),
    )
    return pixel_values + delta


def predictions(
    encoder: ImageEncoder,
    batches: Iterable[dict[str, Any]],
    classifier: Logits,
    *,
    device: torch.device,
    eps: float | None = None,
    num_steps: int = 10,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Whether each image is classified rightly: clean (``eps`` None) or under PGD with steps of eps / 4.

    ``batches`` as in ``classified``; ``classifier`` maps image_embeds (B, D) to logits (B, C); eps is a share of the pixel
    range.

    Returns:
        positions (n,) int64 and correct (n,) bool, on the CPU, of this process's images in the order read.
    """

    def logits_fn(pixel_values: Tensor) -> Tensor:
        return classifier(encoder(pixel_values))

    perturb = None
    if eps is not None:
        perturb = partial(pgd_images, logits_fn, eps=eps, step_size=eps / 4, num_steps=num_steps, seed=seed)
    positions, correct = [], []
    with frozen(encoder):
        for batch in classified(logits_fn, batches, device=device, perturb=perturb):
            positions += batch.positions
            correct.append((batch.logits.argmax(dim=-1) == batch.labels).cpu())
    return torch.tensor(positions, dtype=torch.int64), torch.cat(correct)


def to_pixel_values(images: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 in [0,1] on ``device``; a quarter of the bytes travel."""
    return images.to(device, non_blocking=True).float().div_(255.0)
