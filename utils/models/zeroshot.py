"""Zero-shot classification: class embeddings, and predictions for clean and attacked images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from utils.errors import UserError
from utils.methods.attacks import Logits, attack_seeds, frozen, pgd, uniform_start
from utils.methods.losses import cross_entropy
from utils.models.classifiers import LinearClassifier, own_linear_head, read_linear_head
from utils.models.encoders import ImageEncoder, TextEncoder
from utils.models.published import has_text, logit_scale
from utils.models.tokens import fill_in, fill_up, read_prompts, refuse_equal_texts
from utils.sets.labelled import LabelledSet

TEXTS_AT_ONCE = 256  # batch size of the text tower
Device = torch.device | str


def set_classifier(
    model: PreTrainedModel,
    processor: Any,
    encoder: ImageEncoder,
    labelled: LabelledSet,
    device: torch.device,
    linear_head: str | None = None,
) -> LinearClassifier:
    """The classifier of a set: a linear head's file if given, else the text tower, else the model's own head.

    The text tower gives s * cos(z, t_c), s = exp(logit_scale), without SigLIP's bias, which is equal for all classes.
    """
    names = labelled.classnames
    if linear_head is not None:
        return read_linear_head(linear_head, encoder.embed_dim, len(names)).to(device)
    if not has_text(model.config):
        return own_linear_head(model, len(names)).to(device)
    embeds = class_embeddings(model, processor, names, labelled.templates, device)
    return LinearClassifier(embeds, scale=logit_scale(model), normalise=True)


def class_embeddings(
    model: PreTrainedModel, processor: Any, classnames: Sequence[str], templates: Sequence[str], device: Device = "cpu"
) -> Tensor:
    """t_c: ``ensemble`` of each class's prompts, (C, D). Raises ``UserError`` for names that give equal tokens."""
    refuse_equal_texts(processor, model.config, classnames, templates[0])
    return ensemble(prompt_embeddings(model, processor, classnames, templates, device))


def ensemble(prompt_embeds: Tensor) -> Tensor:
    """Unit embedding of each text from its prompts' embeddings: normalise, mean, normalise. (T, P, D) -> (T, D)."""
    return F.normalize(F.normalize(prompt_embeds.float(), dim=-1).mean(dim=1), dim=-1)


@torch.no_grad()
def prompt_embeddings(
    model: PreTrainedModel, processor: Any, texts: Sequence[str], templates: Sequence[str], device: Device = "cpu"
) -> Tensor:
    """Un-normalised embeddings of T texts in P templates, (T, P, D) float32 on ``device``. The tower moves back."""
    encoder = TextEncoder(model)
    home = next(encoder.text_model.parameters()).device
    encoder.to(device)
    prompts = fill_in(templates, texts)
    rows = read_prompts(processor, model.config, prompts)
    parts = (rows[first : first + TEXTS_AT_ONCE] for first in range(0, len(rows), TEXTS_AT_ONCE))
    found = torch.cat([encoder(*fill_up(part, processor, model.config, device)) for part in parts])
    encoder.to(home)
    refuse_non_finite_rows(found.norm(dim=-1, keepdim=True), [f"text {prompt!r}" for prompt in prompts], "embeddings")
    return found.view(len(texts), len(templates), -1)


class NonFiniteError(UserError):
    """Raised for outputs that are not finite: no figure can be computed from them."""

    every_rank = False  # only the process that reads the image raises it


def refuse_non_finite_rows(values: Tensor, keys: Sequence[str], what: str) -> None:
    """Raises ``NonFiniteError`` with the key of the first row of (N, D) that is not finite. Synchronises."""
    finite = values.isfinite().all(dim=1)
    if not finite.all():
        fault = f"{keys[int((~finite).nonzero()[0])]}: its {what} are not finite; no figure is made of them"
        advice = "try mixed_precision no or bf16, else give another checkpoint"
        raise NonFiniteError(f"{fault}; the model's numbers overflow: {advice}")


class Classified(NamedTuple):
    """One batch of B images and its logits; B may be 0."""

    positions: list[int]  # in the set
    keys: list[str]
    labels: Tensor  # (B,) int64
    pixel_values: Tensor  # (B, 3, H, W) float32 in [0,1]
    attacked: Tensor  # pixel_values after ``perturb``, or unchanged
    logits: Tensor  # (B, C), of ``attacked``


def classified(
    logits_fn: Logits,
    batches: Iterable[dict[str, Any]],
    *,
    device: torch.device,
    perturb: Callable[[Tensor, Tensor, Sequence[int]], Tensor] | None = None,
) -> Iterator[Classified]:
    """The batches of an evaluation loader, changed by ``perturb`` and classified: pixel_values -> logits (B, C).

    batches: with ``images`` uint8 (B, 3, H, W), ``labels`` and ``positions`` (B,) int64, ``keys``.
    perturb: (pixel_values, labels, positions) -> pixel_values; may use gradients.
    """
    for batch in batches:
        images, labels, places = batch["images"], batch["labels"], batch["positions"]
        count = len(places)
        if not count:  # a process without images uses a black one: under ZeRO-3 all must encode equally often
            images, labels, places = (rows.new_zeros(1, *rows.shape[1:]) for rows in (images, labels, places))
        pixel_values, labels = to_pixel_values(images, device), labels.to(device)
        attacked = pixel_values if perturb is None else perturb(pixel_values, labels, places.tolist())
        with torch.no_grad():
            logits = logits_fn(attacked)
        refuse_non_finite_rows(logits[:count], batch["keys"], "logits")
        tensors = (tensor[:count] for tensor in (labels, pixel_values, attacked, logits))
        yield Classified(batch["positions"].tolist(), list(batch["keys"]), *tensors)


def pgd_images(
    logits_fn: Logits, pixel_values: Tensor, labels: Tensor, positions: Sequence[int], *, seed: int, **options: Any
) -> Tensor:
    """Images under PGD on the cross-entropy; ``options`` go to ``pgd``. Image i starts from (seed, position i)."""
    start = uniform_start(pixel_values, options["eps"], attack_seeds(seed, 0, positions))
    return pixel_values + pgd(lambda x: cross_entropy(logits_fn(x), labels), pixel_values, start=start, **options)


def predictions(
    encoder: ImageEncoder,
    batches: Iterable[dict[str, Any]],
    classifier: Logits,
    *,
    device: torch.device,
    eps: float | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Whether each image is classified correctly: clean (``eps`` None) or under PGD with 10 steps of eps / 4.

    batches as in ``classified``; classifier: image_embeds (B, D) -> logits (B, C).
    -> positions (n,) int64 and correct (n,) bool, on the CPU, of this process's images in the order read.
    """

    def logits_fn(pixel_values: Tensor) -> Tensor:
        return classifier(encoder(pixel_values))

    perturb = None
    if eps is not None:
        perturb = partial(pgd_images, logits_fn, eps=eps, step_size=eps / 4, num_steps=10, seed=seed)
    positions, correct = [], []
    with frozen(encoder):
        for batch in classified(logits_fn, batches, device=device, perturb=perturb):
            positions += batch.positions
            correct.append((batch.logits.argmax(dim=-1) == batch.labels).cpu())
    return torch.tensor(positions, dtype=torch.int64), torch.cat(correct)


def to_pixel_values(images: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 in [0,1] on ``device``; copies a quarter of float32's bytes."""
    return images.to(device, non_blocking=True).float().div_(255.0)
