"""Preference losses for contrastive models: one decision per image among a list of texts.

The policy pi(y|x) is the softmax of s * cos(I(x), T(y)) over the candidate texts y. The reference pi_ref is the same of
the frozen model. All losses start from float32 logits: log pi(y_w) - log pi(y_l) is a difference of two logits, because
the normaliser cancels. None takes the log of a softmax, which underflows at s = 100.

Source: Afzali, Khodabandeh et al., ICLR 2025 (arXiv 2411.08923); DPO: arXiv 2305.18290, IPO: arXiv 2310.12036, KTO:
arXiv 2402.01306. If an image has several rejected texts, each makes a pair, and the mean over them is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.methods.lore import MicroBatch, Problem
from utils.methods.losses import kl_divergence

PREFERENCES = ("dpo", "ipo", "kto", "ce")
DEFAULT_BETA = {"dpo": 1.0, "ipo": 0.1, "kto": 1.5, "ce": 1.0}  # cross-entropy has no beta


def candidate_logits(logits: Tensor, candidates: Tensor | None) -> Tensor:
    """Logits (N, T) with -inf where ``candidates`` (N, T) bool is False; with None every text is a candidate."""
    logits = logits.float()
    return logits if candidates is None else logits.masked_fill(~candidates, float("-inf"))


def log_ratios(logits: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """log pi(chosen) - log pi(rejected) = logit difference. (N, T), (N,), (N, R) indices -> (N, R), nats.

    A rejected index of -1 means no text: its entry is 0, without a gradient.
    """
    logits = logits.float()
    # An absent text is replaced by the chosen one: a difference of 0.
    return logits.gather(1, chosen[:, None]) - logits.gather(1, torch.where(rejected < 0, chosen[:, None], rejected))


def _gather(values: Tensor, texts: Tensor) -> Tensor:
    """Values (N, T) at the indices ``texts`` (N, R), 0 for an index of -1 -> (N, R).

    Fills before any arithmetic: text 0 stands in for an absent one and may be -inf. -inf minus -inf is NaN, and a later
    mask does not remove its gradient, 0 * NaN (pytorch#64305).
    """
    return values.gather(1, texts.clamp_min(0)).masked_fill(texts < 0, 0.0)


def margin(logits: Tensor, ref_logits: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """h = [log pi(y_w|x') - log pi(y_l|x')] - [same for pi_ref]. (N, T) twice, (N,), (N, R) -> (N, R), nats."""
    return log_ratios(logits, chosen, rejected) - log_ratios(ref_logits, chosen, rejected)


def dpo_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1-e) log sigma(beta h) - e log sigma(-beta h), e in [0, 0.5). Any shape -> the same; ln 2 at h = 0."""
    return -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """(h - 1/(2 beta))^2. Any shape -> the same; 1/(4 beta^2) at h = 0: the smaller beta, the larger the loss."""
    return (margin - 1 / (2 * beta)).square()


def kto_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, baseline: Tensor, beta: float) -> Tensor:
    """1/2 {[1 - sigma(beta (r_w - z))] + [1 - sigma(beta (z - r_l))]}, (N, 1), (N, R), scalar -> (N, R).

    ``baseline`` is z >= 0 in nats, never differentiated. 0.5 at r = z = 0.
    """
    z = baseline.detach()
    # 1 - sigma(a) = sigma(-a)
    return 0.5 * (torch.sigmoid(beta * (z - chosen_rewards)) + torch.sigmoid(beta * (rejected_rewards - z)))


def rewards(logits: Tensor, ref_logits: Tensor, texts: Tensor) -> Tensor:
    """r = log pi(y|x') - log pi_ref(y|x'). Logits (N, T) twice, texts (N, R) -> (N, R), nats; 0 for an index of -1."""
    return _gather(F.log_softmax(logits.float(), dim=-1), texts) - _gather(
        F.log_softmax(ref_logits.float(), dim=-1), texts
    )


def mean_over_rejected(values: Tensor, rejected: Tensor) -> Tensor:
    """Mean over an image's rejected texts without those of index -1. (N, R), (N, R) -> (N,), 0 if all are -1.

    The values left out must be finite too, or the gradient is NaN.
    """
    present = rejected >= 0
    return values.masked_fill(~present, 0.0).sum(dim=-1) / present.sum(dim=-1).clamp_min(1)


def preference_loss(
    preference: str,
    logits: Tensor,
    ref_logits: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    baseline: Tensor | None = None,
) -> Tensor:
    """The loss of every image: ``dpo``, ``ipo``, ``kto`` or ``ce``, the baseline -log pi(chosen). -> (N,), float32.

    Args:
        logits, ref_logits: (N, T), of the policy and of the reference, -inf for a text that is no candidate.
        chosen, rejected: (N,) and (N, R) int64, indices into the T texts; in ``rejected`` some of a row may be -1.
        baseline: z of KTO, a scalar; the other losses do not use it.
    """
    if preference == "ce":
        return F.cross_entropy(logits.float(), chosen, reduction="none")
    if preference == "kto":
        if baseline is None:
            raise ValueError("kto needs a baseline")
        r_w, r_l = (rewards(logits, ref_logits, texts) for texts in (chosen[:, None], rejected))
        return mean_over_rejected(kto_loss(r_w, r_l, baseline, beta), rejected)
    h = margin(logits, ref_logits, chosen, rejected)
    losses = dpo_loss(h, beta, label_smoothing) if preference == "dpo" else ipo_loss(h, beta)
    return mean_over_rejected(losses, rejected)


def retention_kl(ref_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(pi_ref || pi) over the candidates (other texts are -inf in both). (N, T), (N, T) -> (N,), nats."""
    return kl_divergence(ref_logits, logits)


def kto_baseline(batch: PreferenceBatch, logits: BatchLogits, total: Callable[[Tensor], Tensor]) -> Tensor:
    """z: the mean KL over this micro-batch's clean images, a constant. ``total`` sums a tensor over all processes."""
    kl = retention_kl(batch.ref_logits.reg, logits.reg).detach()
    summed, count = total(torch.stack([kl.sum(), kl.new_full((), len(kl))])).unbind()
    return (summed / count.clamp_min(1)).clamp_min(0)


class BatchLogits(NamedTuple):
    """Logits over the T texts of a batch, -inf for a text that is no candidate, float32."""

    reg: Tensor  # (R, T), of the clean rows, for the regulariser
    pairs: Tensor  # (P, T), of the preferences


@dataclass
class PreferenceBatch:
    """N images: the first R are for the regulariser, the other P have a chosen text and rejected ones."""

    inputs: Tensor  # (N, 3, H, W), float32 in [0,1]; for a head (N, D)
    chosen: Tensor  # (P,), int64, indices into the batch's texts
    rejected: Tensor  # (P, ...), int64, -1 for none
    ref_image_embeds: Tensor  # (N, D), float32, un-normalised
    ref_logits: BatchLogits


class PreferencePrimal(NamedTuple):
    """The loss of a batch and its parts; every sum is divided by the number of rows of the global batch."""

    loss: Tensor  # scalar
    terms: list[Tensor]  # scalars, in the order of ``PreferenceProblem.terms``
    preference: Tensor  # (P,)
    kl: Tensor  # (R,)
    clean: MicroBatch | None  # the R clean rows, for the dual step
    measured: Tensor | None  # (R, 3): distance, margin, multiplier


@dataclass(frozen=True)
class PreferenceProblem:
    """minimise E[preference loss on P images] + reg_weight * E[KL(reference || policy) on R clean images].

    Subject to the constraint of ``held``, if it has one: ||z - z0||^2 <= rho * margin for every clean image.
    """

    preference: str = "dpo"
    beta: float = 1.0
    label_smoothing: float = 0.0
    reg_weight: float = 1.0
    held: Problem = Problem(constraint="none")  # has the constraint on the clean images

    @property
    def constrained(self) -> bool:
        return self.held.constrained

    @property
    def terms(self) -> list[str]:
        """Names of the parts of the loss."""
        return ["preference loss", "kl to the reference"] + ["distance to the reference"] * self.constrained

    def primal(
        self,
        batch: PreferenceBatch,
        image_embeds: Tensor,
        logits: BatchLogits,
        totals: Tensor,
        *,
        baseline: Tensor | None,
        multiplier: Any = None,
    ) -> PreferencePrimal:
        """This batch's part of the mean over a global batch of ``totals`` = (P, R) rows; the multiplier is a constant.

        image_embeds (N, D) and logits are the policy's; ``baseline`` is z of KTO.
        """
        num_pairs, num_reg = totals.clamp_min(1).unbind()
        kl = retention_kl(batch.ref_logits.reg, logits.reg)
        preference = preference_loss(
            self.preference,
            logits.pairs,
            batch.ref_logits.pairs,
            batch.chosen,
            batch.rejected,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            baseline=baseline,
        )
        terms = [preference.sum() / num_pairs, kl.sum() / num_reg]
        if not self.constrained:
            loss = preference.sum() / num_pairs + self.reg_weight * kl.sum() / num_reg
            return PreferencePrimal(loss, terms, preference, kl, None, None)
        inputs, z0, z = (rows[: len(kl)] for rows in (batch.inputs, batch.ref_image_embeds, image_embeds))
        clean = MicroBatch(inputs, ref_image_embeds=z0, margin=self.held.margin(z0))
        distance = self.held.distance(z, clean)
        with torch.no_grad():
            multipliers = multiplier(z0)
        held = self.held.lagrangian(self.reg_weight * kl, distance, clean.margin, multipliers, num_reg)
        measured = torch.stack([distance.detach(), clean.margin, multipliers], dim=1)
        terms.append(distance.sum() / num_reg)
        return PreferencePrimal(preference.sum() / num_pairs + held, terms, preference, kl, clean, measured)

    @torch.no_grad()
    def measure(self, primal: PreferencePrimal, batch: PreferenceBatch, logits: BatchLogits) -> Tensor:
        """The values named in ``MEASURED``, (7,): sums over the batch's preferences, the last over its clean rows."""
        pairs, ref_pairs, chosen, rejected = logits.pairs, batch.ref_logits.pairs, batch.chosen, batch.rejected
        h = margin(pairs, ref_pairs, chosen, rejected)
        ordered = pairs.gather(1, chosen[:, None]) > pairs.gather(1, rejected.clamp_min(0))
        per_image = [
            primal.preference,
            mean_over_rejected(h, rejected),
            self.beta * rewards(pairs, ref_pairs, chosen[:, None])[:, 0],
            self.beta * mean_over_rejected(rewards(pairs, ref_pairs, rejected), rejected),
            mean_over_rejected((h > 0).float(), rejected),
            mean_over_rejected(ordered.float(), rejected),
        ]
        return torch.stack([values.sum() for values in per_image] + [primal.kl.sum()])


MEASURED = (
    "preference_loss",
    "margin_mean",
    "reward_chosen",
    "reward_rejected",
    "reward_accuracy",
    "pair_accuracy",
    "kl",
)
