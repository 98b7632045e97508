"""Objectives and distances: one value per sample, always in float32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def squared_distance(image_embeds: Tensor, ref_image_embeds: Tensor) -> Tensor:
    """||z - z0||^2, a sum (not a mean) over D: (B, D), (B, D) -> (B,), float32. FARE's and LORE's distance."""
    return (image_embeds.float() - ref_image_embeds.float()).square().sum(dim=-1)


def class_logits(image_embeds: Tensor, class_embeds: Tensor, logit_scale: float | Tensor) -> Tensor:
    """s * cos(z, t_c) for every class: (B, D), (C, D) with unit rows, s the exponentiated scale -> (B, C), float32."""
    return logit_scale * unit(image_embeds) @ class_embeds.float().T


def unit(embeds: Tensor) -> Tensor:
    """z / ||z||, (..., D) -> (..., D), float32. NaN if the length overflows float32: zeros would look like a result."""
    z = embeds.float()
    return F.normalize(z, dim=-1) + 0 * z.detach().norm(dim=-1, keepdim=True)  # 0 times infinity is NaN


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label): (B, C), (B,) int64 -> (B,), in nats. TeCoA's objective (Mao et al. 2023, arXiv 2212.07016)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def kl_divergence(ref_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(p0 || p) = sum_c p0 (log p0 - log p), reference first: (B, C), (B, C) -> (B,), in nats, >= 0.

    A class with a reference logit of -inf adds nothing (0 log 0 = 0) and gets no gradient.
    """
    ref_logps = F.log_softmax(ref_logits.float(), dim=-1)
    logps = F.log_softmax(logits.float(), dim=-1)
    # Fill before the arithmetic: -inf - -inf is NaN, and its gradient would stay NaN even if masked later.
    absent = ref_logps == float("-inf")
    return (ref_logps.exp() * (ref_logps.masked_fill(absent, 0.0) - logps.masked_fill(absent, 0.0))).sum(dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """H(p) = -sum_c p log p: (B, C) -> (B,), nats, in [0, ln C]. A logit of -inf adds nothing: 0 log 0 = 0."""
    logps = F.log_softmax(logits.float(), dim=-1)
    return -(logps.exp() * logps.masked_fill(logps == float("-inf"), 0.0)).sum(dim=-1)
