"""The constrained problem of LORE: margin, violation, multiplier, and the two Lagrangians.

    minimise over the encoder   E[objective]     subject to   violation = distance - rho * margin <= 0 for every image

A violation <= 0 is feasible, here and everywhere. The primal step treats the multiplier as a constant, the dual step
the violation. Source: Khodabandeh, Afzali et al. (arXiv 2505.18884).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.methods.losses import entropy


def embedding_margin(ref_image_embeds: Tensor, kind: str) -> Tensor:
    """m(x): ||z0||^2 for ``relative``, 1 for ``fixed``. (B, D) -> (B,), float32."""
    if kind == "fixed":
        return ref_image_embeds.new_ones(len(ref_image_embeds), dtype=torch.float32)
    return ref_image_embeds.float().square().sum(dim=-1)


def entropy_margin(ref_logits: Tensor, kind: str) -> Tensor:
    """m(x) of the KL constraint: H(p0(.|x)) for ``relative`` (confident images are held tighter), 1 for ``fixed``.

    (B, C) -> (B,), float32, in nats.
    """
    if kind == "fixed":
        return ref_logits.new_ones(len(ref_logits), dtype=torch.float32)
    return entropy(ref_logits)


def violation(distance: Tensor, margin: Tensor, rho: float) -> Tensor:
    """v = distance - rho * margin, (B,), (B,) -> (B,); <= 0 is feasible."""
    return distance - rho * margin


def primal_lagrangian(
    objective: Tensor, violation: Tensor, multiplier: Tensor, count: Tensor | None = None, *, augmentation: Any = None
) -> Tensor:
    """mean[objective + stopgrad(multiplier) * violation], minimised over the encoder. Three (B,) -> scalar.

    ``count`` replaces B as the divisor, for when these are only some of the rows of the mean.
    ``augmentation``: (c, margin) of the augmented Lagrangian, with margin (B,); the term is ``augmented`` then.
    """
    multiplier = multiplier.detach()
    values = objective + (augmented(violation, multiplier, *augmentation) if augmentation else multiplier * violation)
    return values.mean() if count is None else values.sum() / count


def augmented(violation: Tensor, multiplier: Tensor, c: float, margin: Tensor) -> Tensor:
    """margin / (2 c) * (max(0, multiplier + c violation / margin)^2 - multiplier^2). Two (B,), c > 0, (B,) -> (B,).

    Its slope in the violation is max(0, multiplier + c violation / margin): a violated constraint weighs more at once,
    before the multiplier has learnt it. For c -> 0 it is multiplier * violation. Where the constraint holds with
    equality, or with room and a multiplier of 0, value and slope are the same as that, so the solutions stay.
    Source: Rockafellar, Mathematical Programming 5 (1973), with the violation relative to the margin.
    """
    return margin * ((multiplier + c * violation / margin).clamp(min=0).square() - multiplier.square()) / (2 * c)


def dual_lagrangian(violation: Tensor, multiplier: Tensor, count: Tensor | None = None) -> Tensor:
    """mean[multiplier * stopgrad(violation)], maximised over the multiplier's parameters. Two (B,) -> scalar.

    ``count``: as in ``primal_lagrangian``.
    """
    values = multiplier * violation.detach()
    return values.mean() if count is None else values.sum() / count


class Multiplier(nn.Module):
    """lambda_w(z0) = softplus(g_w(z0)) >= 0, one value per image: (B, D) -> (B,), float32.

    ``network``: g is two linear layers with a ReLU between them; ``linear``: one linear layer; ``scalar``: one number
    for all images, 0 at the start (lambda = ln 2).
    """

    def __init__(self, kind: str, embed_dim: int) -> None:
        super().__init__()
        self.raw: nn.Module
        if kind == "network":
            self.raw = nn.Sequential(nn.Linear(embed_dim, 512), nn.ReLU(), nn.Linear(512, 1))
        elif kind == "linear":
            self.raw = nn.Linear(embed_dim, 1)
        elif kind == "scalar":
            self.raw = _Scalar()
        else:
            raise ValueError(f"multiplier {kind!r} is not network, linear or scalar")

    def forward(self, ref_image_embeds: Tensor) -> Tensor:
        return F.softplus(self.raw(ref_image_embeds.float())).squeeze(-1)


class _Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))

    def forward(self, ref_image_embeds: Tensor) -> Tensor:
        return self.value.expand(len(ref_image_embeds), 1)


def make_dual_optimizer(multiplier: Multiplier, learning_rate: float) -> torch.optim.AdamW:
    """AdamW that ascends, without weight decay."""
    return torch.optim.AdamW(multiplier.parameters(), lr=learning_rate, weight_decay=0.0, maximize=True, fused=True)


def multiplier_statistics(multipliers: Tensor) -> dict[str, float]:
    """Mean, smallest and largest of a batch's multipliers, (n,). Synchronises."""
    values = torch.stack([multipliers.mean(), multipliers.min(), multipliers.max()]).tolist()
    return dict(zip(("multiplier_mean", "multiplier_min", "multiplier_max"), values))
