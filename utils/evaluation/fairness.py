"""Fairness of rankings and of classifications, computed in float64 on the device of the groups.

``groups``: the protected attribute, one int64 value in 0..G-1 per sample. ``desired``: the share that each group should
have, (G,), all > 0, sum 1. An index out of range or an empty input is a ValueError.
"""

from __future__ import annotations

from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor


def fairness_figures(similarities: Tensor, labels: Tensor, groups: Tensor, top_k: int) -> dict[str, float | None]:
    """All figures from similarities (C, N) of class prompts and images; desired are the pool's own shares."""
    num_classes, desired = len(similarities), torch.bincount(groups) / len(groups)
    predicted = similarities.argmax(dim=0)
    worst, gap = worst_group_accuracy_and_gap(predicted == labels, groups, len(desired))
    opportunity = equal_opportunity_difference(predicted, labels, groups, num_classes)
    return retrieval_fairness(similarities, groups, desired, top_k) | {
        "parity_difference": demographic_parity_difference(predicted, groups, num_classes).mean().item(),
        # Undefined where no class has images of two groups.
        "opportunity_difference": None if opportunity.isnan().all() else opportunity.nanmean().item(),
        "worst_group_accuracy": worst,
        "group_gap": gap,
    }


def skew_at_k(ranked_groups: Tensor, desired: Tensor, k: int) -> Tensor:
    """Skew_a@k = ln(share of group a in the top k / desired share of a): (N,) int64 best first, (G,) -> (G,), float64.

    In nats, 0 at the desired share and -inf where the top k lack the group. ValueError unless 1 <= k < N. Source: Geyik
    et al. (KDD 2019, arXiv 1905.01989).
    """
    desired = _as_distribution(desired, ranked_groups)
    if not 1 <= k < len(ranked_groups):
        reason = "K must be smaller than the pool, or MaxSkew no longer depends on the model"
        raise ValueError(f"k = {k} with {len(ranked_groups)} ranked samples: {reason}")
    shares = torch.bincount(ranked_groups[:k], minlength=len(desired)).double() / k
    return (shares / desired).log()


def max_skew_at_k(ranked_groups: Tensor, desired: Tensor, k: int) -> float:
    """MaxSkew@k = max_a Skew_a@k, in [0, -ln min desired]: the most over-represented group. See ``skew_at_k``.

    The -inf of an absent group never counts: some other group then has more than its share.
    """
    return skew_at_k(ranked_groups, desired, k).max().item()


def ndkl(ranked_groups: Tensor, desired: Tensor) -> float:
    """NDKL = 1/Z sum_i KL(shares in the top i || desired) / log2(i + 1) over i = 1..N, Z = sum_i 1 / log2(i + 1).

    (N,) int64 best first, (G,) -> nats, >= 0 up to rounding. Compare at equal N: a prefix of one sample has one group,
    so even the best order is above 0 where G > 1. O(N G) memory. Source: Geyik et al. (arXiv 1905.01989).
    """
    desired = _as_distribution(desired, ranked_groups)
    ranks = torch.arange(1, len(ranked_groups) + 1, device=ranked_groups.device, dtype=torch.float64)
    shares = F.one_hot(ranked_groups, len(desired)).cumsum(dim=0) / ranks[:, None]
    divergences = torch.xlogy(shares, shares / desired).sum(dim=-1)  # xlogy: 0 log 0 = 0
    discounts = 1 / torch.log2(ranks + 1)
    return ((discounts * divergences).sum() / discounts.sum()).item()


def retrieval_fairness(similarities: Tensor, groups: Tensor, desired: Tensor, k: int) -> dict[str, float]:
    """MaxSkew@k and NDKL of the pool ranked by each of Q neutral queries: (Q, N) float32, (N,) int64, (G,).

    Means over queries, and ``max_skew_worst_query``. Ties keep the pool's order, so it must not be sorted by group.
    ValueError for a pool of another size and for NaN, which would rank first. For CLIP: Berg et al. (arXiv 2203.11933).
    """
    if similarities.shape[1] != len(groups) or similarities.isnan().any():
        raise ValueError(f"similarities {tuple(similarities.shape)} of {len(groups)} samples: wrong shape, or NaN")
    rankings = groups[similarities.argsort(dim=-1, descending=True, stable=True)]
    max_skews = [max_skew_at_k(ranked_groups, desired, k) for ranked_groups in rankings]
    return {
        "max_skew": fmean(max_skews),
        "max_skew_worst_query": max(max_skews),
        "ndkl": fmean(ndkl(ranked_groups, desired) for ranked_groups in rankings),
    }


def demographic_parity_difference(predictions: Tensor, groups: Tensor, num_classes: int) -> Tensor:
    """max_g P(pred = c | g) - min_g P(pred = c | g), groups present: (N,), (N,) int64 -> (C,) in [0,1], float64.

    0 for a class that is never predicted (which dilutes the mean over many classes) and where one group is present.
    Labels play no part: groups of other classes differ here even with a perfect classifier.
    """
    counts = _class_counts(predictions, groups, num_classes, torch.ones_like(predictions))
    rates = counts / counts.sum(dim=1, keepdim=True)
    return rates.amax(dim=0) - rates.amin(dim=0)


def equal_opportunity_difference(predictions: Tensor, labels: Tensor, groups: Tensor, num_classes: int) -> Tensor:
    """max_g TPR - min_g TPR, TPR = P(pred = c | label = c, g): three (N,) int64 -> (C,), in [0,1] or NaN, float64.

    NaN, for nanmean, where a class lacks samples of a group that is present. One group alone gives 0. Source: Hardt
    et al. (NeurIPS 2016, arXiv 1610.02413), per class.
    """
    hits = _class_counts(labels, groups, num_classes, predictions == labels)
    rates = hits / _class_counts(labels, groups, num_classes, torch.ones_like(labels))
    return rates.amax(dim=0) - rates.amin(dim=0)  # both keep NaN


def group_accuracies(correct: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Share of correct samples per group: (N,) bool, (N,) int64 -> (G,), in [0,1], NaN for an empty group, float64."""
    _check_indices(groups, num_groups)
    hits = torch.bincount(groups, weights=correct.double(), minlength=num_groups)
    return hits / torch.bincount(groups, minlength=num_groups)


def worst_group_accuracy_and_gap(correct: Tensor, groups: Tensor, num_groups: int) -> tuple[float, float]:
    """min_g accuracy, and max_g - min_g, over non-empty groups, both in [0,1]: (N,) bool, (N,) int64.

    Source: Sagawa et al. (ICLR 2020, arXiv 1911.08731).
    """
    accuracies = group_accuracies(correct, groups, num_groups)
    worst, best = accuracies[~accuracies.isnan()].aminmax()
    return worst.item(), (best - worst).item()


def _as_distribution(desired: Tensor, ranked_groups: Tensor) -> Tensor:
    """``desired`` in float64, normalised again: float32 shares miss one by enough to make a KL negative."""
    _check_indices(ranked_groups, len(desired))
    desired = desired.to(ranked_groups.device, torch.float64)
    if not (desired > 0).all() or abs(desired.sum().item() - 1) > 1e-4:
        raise ValueError(f"desired shares {desired.tolist()} must be positive and sum to one")
    return desired / desired.sum()


def _class_counts(classes: Tensor, groups: Tensor, num_classes: int, weights: Tensor) -> Tensor:
    """Sum of the weights per group and class: three (N,) -> (groups present, C), float64."""
    _check_indices(classes, num_classes)
    present, rows = groups.unique(return_inverse=True)
    cells = torch.bincount(rows * num_classes + classes, weights.double(), minlength=len(present) * num_classes)
    return cells.view(len(present), num_classes)


def _check_indices(values: Tensor, size: int) -> None:
    if len(values) == 0 or values.min() < 0 or values.max() >= size:
        raise ValueError(f"expected at least one index, all in 0..{size - 1}, got {values}")
