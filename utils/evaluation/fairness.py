"""Fairness of rankings and of classifications between groups, in float64.

``groups``: the protected attribute, one int64 value in 0..G-1 per image, and each value occurs. ``desired``: the share
that each group should have, (G,), all > 0, sum 1.
"""

from __future__ import annotations

from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor


def fairness_figures(similarities: Tensor, labels: Tensor, groups: Tensor, top_k: int) -> dict[str, float | None]:
    """All figures from similarities (C, N) of class prompts and images, 1 <= top_k < N; (N,) int64 labels and groups.

    Every prompt ranks all images; the desired shares are those of the groups in the set. Ties keep the images' order,
    which must not be sorted by group. For CLIP: Berg et al. (arXiv 2203.11933).
    """
    desired = (torch.bincount(groups) / len(groups)).double()
    desired = desired / desired.sum()  # with float32 shares the sum is not exactly 1, and a KL can be negative
    rankings = groups[similarities.argsort(dim=-1, descending=True, stable=True)]
    max_skews = [max_skew_at_k(ranked_groups, desired, top_k) for ranked_groups in rankings]
    predicted = similarities.argmax(dim=0)
    opportunity = equal_opportunity_difference(predicted, labels, groups, len(similarities))
    worst, gap = worst_group_accuracy_and_gap(predicted == labels, groups)
    return {
        "max_skew": fmean(max_skews),
        "max_skew_worst_query": max(max_skews),
        "ndkl": fmean(ndkl(ranked_groups, desired) for ranked_groups in rankings),
        "parity_difference": demographic_parity_difference(predicted, groups, len(similarities)).mean().item(),
        # Undefined if no class has images of two groups.
        "opportunity_difference": None if opportunity.isnan().all() else opportunity.nanmean().item(),
        "worst_group_accuracy": worst,
        "group_gap": gap,
    }


def max_skew_at_k(ranked_groups: Tensor, desired: Tensor, k: int) -> float:
    """MaxSkew@k = max_a ln(share of group a in the top k / desired share of a): (N,) best first, (G,) -> nats.

    In [0, -ln min desired]; a group absent from the top k does not count. Source: Geyik et al. (arXiv 1905.01989).
    """
    shares = torch.bincount(ranked_groups[:k], minlength=len(desired)).double() / k
    return (shares / desired).log().max().item()


def ndkl(ranked_groups: Tensor, desired: Tensor) -> float:
    """NDKL = 1/Z sum_i KL(shares in the top i || desired) / log2(i + 1) over i = 1..N, Z = sum_i 1 / log2(i + 1).

    (N,) best first, (G,) -> nats, >= 0 up to rounding. Compare only at equal N: the first image has just one group, so
    even the best order is above 0 if G > 1. Source: Geyik et al. (arXiv 1905.01989).
    """
    ranks = torch.arange(1, len(ranked_groups) + 1, device=ranked_groups.device, dtype=torch.float64)
    shares = F.one_hot(ranked_groups, len(desired)).cumsum(dim=0) / ranks[:, None]
    divergences = torch.xlogy(shares, shares / desired).sum(dim=-1)  # xlogy: 0 log 0 = 0
    discounts = 1 / torch.log2(ranks + 1)
    return ((discounts * divergences).sum() / discounts.sum()).item()


def demographic_parity_difference(predictions: Tensor, groups: Tensor, num_classes: int) -> Tensor:
    """max_g P(pred = c | g) - min_g P(pred = c | g): (N,), (N,) int64 -> (C,) in [0,1].

    0 for a class that is never predicted. Ignores labels: if the groups' classes differ, so do their predictions, even
    with a perfect classifier.
    """
    counts = _class_counts(predictions, groups, num_classes, torch.ones_like(predictions))
    rates = counts / counts.sum(dim=1, keepdim=True)
    return rates.amax(dim=0) - rates.amin(dim=0)


def equal_opportunity_difference(predictions: Tensor, labels: Tensor, groups: Tensor, num_classes: int) -> Tensor:
    """max_g TPR - min_g TPR, TPR = P(pred = c | label = c, g): three (N,) int64 -> (C,), in [0,1] or NaN.

    NaN where a class lacks images of a group. Source: Hardt et al. (NeurIPS 2016, arXiv 1610.02413), per class.
    """
    hits = _class_counts(labels, groups, num_classes, predictions == labels)
    rates = hits / _class_counts(labels, groups, num_classes, torch.ones_like(labels))
    return rates.amax(dim=0) - rates.amin(dim=0)  # both propagate NaN


def worst_group_accuracy_and_gap(correct: Tensor, groups: Tensor) -> tuple[float, float]:
    """min_g accuracy, and max_g - min_g: (N,) bool, (N,) int64. Source: Sagawa et al. (ICLR 2020, arXiv 1911.08731)."""
    worst, best = (torch.bincount(groups, correct.double()) / torch.bincount(groups)).aminmax()
    return worst.item(), (best - worst).item()


def _class_counts(classes: Tensor, groups: Tensor, num_classes: int, weights: Tensor) -> Tensor:
    """Sum of the weights per group and class: three (N,) -> (G, C)."""
    num_groups = int(groups.max()) + 1
    cells = torch.bincount(groups * num_classes + classes, weights.double(), minlength=num_groups * num_classes)
    return cells.view(num_groups, num_classes)
