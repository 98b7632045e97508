"""Preference losses for contrastive models: one decision per image among a list of texts.

The policy is pi(y|x) = softmax over the candidate texts y of s * cos(I(x), T(y)), the reference pi_ref the same of the frozen
model. Everything starts from logits, in float32: log pi(y_w) - log pi(y_l) is a difference of two logits, the
normaliser cancels. Nothing is the log of a softmax, which underflows at s = 100.

Source: Afzali, Khodabandeh et al., ICLR 2025 (arXiv 2411.08923); DPO: arXiv 2305.18290, IPO: arXiv 2310.12036, KTO: arXiv
2402.01306. Several rejected texts of one image are pairs of their own, averaged within the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.methods.losses import kl_divergence

PREFERENCES = ("dpo", "ipo", "kto", "ce")
DEFAULT_BETA = {"dpo": 1.0, "ipo": 0.1, "kto": 1.5, "ce": 1.0}  # cross-entropy has none


def candidate_logits(logits: Tensor, candidates: Tensor | None) -> Tensor:
    """Logits (N, T) with -inf where ``candidates`` (N, T) bool is False; None lets every text stand."""
    logits = logits.float()
    return logits if candidates is None else logits.masked_fill(~candidates, float("-inf"))


def log_ratios(logits: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """log pi(chosen) - log pi(rejected) = logit difference. (N, T), (N,), (N, R) indices -> (N, R), nats.

    A rejected index of -1 stands for none: its entry is 0, without a gradient.
    """
    logits = logits.float()
    # An absent text stands for the chosen one: a difference of 0.
    return logits.gather(1, chosen[:, None]) - logits.gather(1, torch.where(rejected < 0, chosen[:, None], rejected))


def _gather(values: Tensor, texts: Tensor) -> Tensor:
    """The values (N, T) of some texts (N, R), 0 where the index is -1 -> (N, R).

    Filled before any arithmetic: the text in place of an absent one may be no candidate, and -inf minus -inf is NaN, whose
    gradient 0 * NaN no mask behind it takes out (pytorch#64305).
    """
    return values.gather(1, texts.clamp_min(0)).masked_fill(texts < 0, 0.0)


def margin(logits: Tensor, ref_logits: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """h = [log pi(y_w|x') - log pi(y_l|x')] - [the same of pi_ref]. (N, T) twice, (N,), (N, R) -> (N, R), nats."""
    return log_ratios(logits, chosen, rejected) - log_ratios(ref_logits, chosen, rejected)


def dpo_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1-e) log sigma(beta h) - e log sigma(-beta h), e in [0, 0.5). Any shape -> the same; ln 2 at h = 0."""
    return -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """(h - 1/(2 beta))^2. Any shape -> the same; 1/(4 beta^2) at h = 0, so that a small beta asks for a large scale."""
    return (margin - 1 / (2 * beta)).square()


def kto_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    baseline: Tensor,
    beta: float,
    chosen_weight: float = 1.0,
    rejected_weight: float = 1.0,
) -> Tensor:
    """1/2 {w_D [1 - sigma(beta (r_w - z))] + w_U [1 - sigma(beta (z - r_l))]}, (N, 1), (N, R), scalar -> (N, R).

    ``baseline`` is z >= 0 in nats, never differentiated. 0.5 at r = z = 0 and weights of 1.
    """
    z = baseline.detach()
    desirable = chosen_weight * torch.sigmoid(beta * (z - chosen_rewards))  # 1 - sigma(a) = sigma(-a)
    undesirable = rejected_weight * torch.sigmoid(beta * (rejected_rewards - z))
    return 0.5 * (desirable + undesirable)


def rewards(logits: Tensor, ref_logits: Tensor, texts: Tensor) -> Tensor:
    """r = log pi(y|x') - log pi_ref(y|x') of the texts (N, R) among logits (N, T) -> (N, R), nats; 0 for none, -1."""
    return _gather(F.log_softmax(logits.float(), dim=-1), texts) - _gather(
        F.log_softmax(ref_logits.float(), dim=-1), texts
    )


def mean_over_rejected(values: Tensor, rejected: Tensor) -> Tensor:
    """Mean over the rejected texts of an image, those of index -1 left out. (N, R), (N, R) -> (N,), 0 where all are.

    Their values have to be finite all the same, or the gradient is NaN.
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
    """The loss of every image: ``dpo``, ``ipo``, ``kto`` or ``ce`` (the baseline, -log pi(chosen)). -> (N,), float32.

    Args:
        logits, ref_logits: (N, T), of the policy and of the reference, -inf where a text is no candidate.
        chosen, rejected: (N,) and (N, R) int64, places among the T texts; rejected ones may be -1, not all of a row.
        baseline: z of KTO, a scalar; the other losses have none.
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
    """KL(pi_ref || pi), reference first, over the candidates (the others are -inf in both). (N, T) twice -> (N,), nats."""
    return kl_divergence(ref_logits, logits)
