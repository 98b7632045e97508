"""A step of LORE and related methods: the attack, the primal loss of the encoder and the dual loss of the multiplier.

    minimise over phi   E[objective(phi(x + delta))]
    subject to          distance(phi(x)) <= rho * margin(x)   for every image x

An encoder is any function from pixel_values (B, 3, H, W) in [0,1] to image_embeds (B, D). A classifier maps these to
logits (B, C). Settings, files and processes play no part here. Source: Khodabandeh, Afzali et al. (arXiv 2505.18884).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.methods.attacks import ascend, frozen, pgd, uniform_start
from utils.methods.lagrangian import (
    Multiplier,
    dual_lagrangian,
    embedding_margin,
    entropy_margin,
    primal_lagrangian,
    violation,
)
from utils.methods.losses import cross_entropy, kl_divergence, squared_distance

Encoder = Callable[[Tensor], Tensor]


@dataclass
class MicroBatch:
    """Pixels, perturbation and reference embeddings, the same in all K updates of a step. None until computed."""

    pixel_values: Tensor  # (B, 3, H, W), float32 in [0,1]
    labels: Any = None  # (B,), int64
    ref_image_embeds: Any = None  # (B, D), float32
    margin: Any = None  # (B,), float32
    delta: Any = None  # (B, 3, H, W), float32
    image_embeds: Any = None  # (B, D), before the updates; only on logged steps if the updates do not see clean images


class Objective(NamedTuple):
    """Attacks maximise it and updates minimise it: a loss of (image_embeds, batch, classifier), (B,) float32."""

    loss: Callable[[Tensor, MicroBatch, Any], Tensor]
    name: str  # of the method without a constraint, in tables
    needs_labels: bool = False
    needs_reference: bool = True


OBJECTIVES = {
    "embedding": Objective(lambda z, batch, classifier: squared_distance(z, batch.ref_image_embeds), "FARE"),
    "tecoa": Objective(
        lambda z, batch, classifier: cross_entropy(classifier(z), batch.labels), "TeCoA", True, needs_reference=False
    ),
}
CONSTRAINTS = ("embedding", "kl", "none")


class Primal(NamedTuple):
    """A primal loss and its parts."""

    loss: Tensor  # scalar
    terms: Tensor  # (3,), detached: the loss, the mean objective, the mean distance of the clean images (or 0)
    image_embeds: Any  # (B, D), of the clean images; None if neither the loss nor the log needs them
    adversarial_embeds: Tensor  # (B, D)


@dataclass(frozen=True)
class Problem:
    """The constrained problem. ``constraint``: embedding, kl or none; ``margin_kind``: relative or fixed.

    ``clean_weight``: without a constraint, a fixed weight on the clean distance instead of the multiplier.
    ``penalty``: c of the augmented Lagrangian; 0 is the plain one.
    ``classifier``: needed for labels and for the KL constraint.
    """

    objective: str = "embedding"
    constraint: str = "embedding"
    margin_kind: str = "relative"
    rho: float = 0.1
    clean_weight: float = 0.0
    penalty: float = 0.0
    classifier: Any = None

    @property
    def constrained(self) -> bool:
        return self.constraint != "none"

    @property
    def clean_in_primal(self) -> bool:
        """Whether an update also encodes the clean images."""
        return self.constrained or self.clean_weight > 0

    @property
    def needs_labels(self) -> bool:
        """Whether a classifier of the training classes is needed."""
        return OBJECTIVES[self.objective].needs_labels or self.constraint == "kl"

    @property
    def needs_reference(self) -> bool:
        return OBJECTIVES[self.objective].needs_reference or self.clean_in_primal

    @property
    def name(self) -> str:
        """The usual name of this combination."""
        name = OBJECTIVES[self.objective].name
        if self.clean_weight > 0:
            return f"{name} + clean distance"
        if (self.objective, self.constraint) == ("embedding", "embedding"):
            return "LORE"
        name = "embedding" if self.objective == "embedding" and self.constrained else name
        return name + {"none": "", "embedding": " + l2", "kl": " + KL"}[self.constraint]

    def loss(self, image_embeds: Tensor, batch: MicroBatch) -> Tensor:
        """The objective for every image, (B, D) -> (B,)."""
        return OBJECTIVES[self.objective].loss(image_embeds, batch, self.classifier)

    def distance(self, image_embeds: Tensor, batch: MicroBatch) -> Tensor:
        """Distance of each clean embedding (kl: of each prediction) from the reference's, (B, D) -> (B,), >= 0."""
        if self.constraint == "kl":
            return kl_divergence(self.classifier(batch.ref_image_embeds), self.classifier(image_embeds))
        return squared_distance(image_embeds, batch.ref_image_embeds)

    def margin(self, ref_image_embeds: Tensor) -> Tensor:
        """m(x), (B, D) -> (B,): a clean image may move by rho * m(x)."""
        if self.constraint == "kl":
            return entropy_margin(self.classifier(ref_image_embeds), self.margin_kind)
        return embedding_margin(ref_image_embeds, self.margin_kind)

    @torch.no_grad()
    def refer(self, reference: Encoder, batch: MicroBatch) -> None:
        """Fills in the reference's embeddings of the clean images and the margin."""
        batch.ref_image_embeds = reference(batch.pixel_values)
        batch.margin = self.margin(batch.ref_image_embeds)

    def primal(self, encoder: Encoder, batch: MicroBatch, multiplier: Any = None) -> Primal:
        """The loss of one update of the encoder: mean[objective + lambda * violation], with lambda as a constant."""
        adversarial = batch.pixel_values + batch.delta
        if not self.clean_in_primal:
            adversarial_embeds = encoder(adversarial)
            loss = self.loss(adversarial_embeds, batch).mean()
            terms = torch.stack([loss, loss, torch.zeros_like(loss)]).detach()
            return Primal(loss, terms, batch.image_embeds, adversarial_embeds)
        image_embeds, adversarial_embeds = encoder(torch.cat([batch.pixel_values, adversarial])).chunk(2)
        losses, distance = self.loss(adversarial_embeds, batch), self.distance(image_embeds, batch)
        if self.constrained:
            with torch.no_grad():
                multipliers = multiplier(batch.ref_image_embeds)
            loss = self.lagrangian(losses, distance, batch.margin, multipliers)
        else:
            loss = (losses + self.clean_weight * distance).mean()
        terms = torch.stack([loss, losses.mean(), distance.mean()]).detach()
        return Primal(loss, terms, image_embeds, adversarial_embeds)

    def lagrangian(
        self, objective: Tensor, distance: Tensor, margin: Tensor, multipliers: Tensor, count: Any = None
    ) -> Tensor:
        """What the encoder minimises, with the multipliers as constants. Four (B,) -> scalar; ``count`` replaces B."""
        augmentation = (self.penalty, margin) if self.penalty else None
        v = violation(distance, margin, self.rho)
        return primal_lagrangian(objective, v, multipliers, count, augmentation=augmentation)

    def dual(self, encoder: Encoder, batch: MicroBatch, multiplier: Multiplier, count: Any = None) -> Tensor:
        """What the multiplier maximises: mean[lambda * violation], with the updated encoder's violation as a constant.

        ``count`` replaces B as the divisor. An empty batch still encodes one black image: under ZeRO-3 all processes
        must make the same number of forward passes.
        """
        pixel_values, size = batch.pixel_values, len(batch.pixel_values)
        if not size:
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        with torch.no_grad():
            distance = self.distance(encoder(pixel_values)[:size], batch)
        v = violation(distance, batch.margin, self.rho)
        return dual_lagrangian(v, multiplier(batch.ref_image_embeds), count)

    @torch.no_grad()
    def measure(self, primal: Primal, batch: MicroBatch, multiplier: Any) -> Tensor:
        """For a log row, (B, 5): distances of perturbed and clean images, the constrained distance, margin, lambda."""
        columns = [
            squared_distance(primal.adversarial_embeds, batch.ref_image_embeds),
            squared_distance(primal.image_embeds, batch.ref_image_embeds),
            self.distance(primal.image_embeds, batch),
            batch.margin,
            multiplier(batch.ref_image_embeds) if self.constrained else torch.zeros_like(batch.margin),
        ]
        return torch.stack(columns, dim=1)


def attack(
    encoder: nn.Module,
    problem: Problem,
    batch: MicroBatch,
    seeds: Sequence[int],
    *,
    eps: float,
    step_size: float,
    num_steps: int,
    momentum: float = 0.0,
    update: Callable[..., None] = ascend,
) -> Tensor:
    """delta within eps that maximises the problem's objective, by PGD from a random start with a seed per image.

    (B, 3, H, W) float32; eps and step_size as fractions of the pixel range. The encoder's parameters get no gradient.
    """
    with frozen(encoder):
        return pgd(
            lambda adversarial: problem.loss(encoder(adversarial), batch),
            batch.pixel_values,
            eps=eps,
            step_size=step_size,
            num_steps=num_steps,
            start=uniform_start(batch.pixel_values, eps, seeds),
            momentum=momentum,
            update=update,
        )
