import math

import pytest
import torch

from utils.evaluation.fairness import (
    demographic_parity_difference,
    equal_opportunity_difference,
    fairness_figures,
    max_skew_at_k,
    ndkl,
    worst_group_accuracy_and_gap,
)

GENERATOR = torch.Generator().manual_seed(0)
DESIRED = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
EVEN = torch.tensor([0.5, 0.5], dtype=torch.float64)


def random_groups(size: int, num_groups: int = 3) -> torch.Tensor:
    return torch.randint(num_groups, (size,), generator=GENERATOR)


def ndkl_by_hand(ranked: list[int], desired: list[float]) -> float:
    total = normaliser = 0.0
    for i in range(1, len(ranked) + 1):
        shares = [ranked[:i].count(group) / i for group in range(len(desired))]
        total += sum(s * math.log(s / d) for s, d in zip(shares, desired) if s > 0) / math.log2(i + 1)
        normaliser += 1 / math.log2(i + 1)
    return total / normaliser


def test_max_skew_is_the_largest_log_ratio_of_the_shares():
    ranked = torch.tensor([0, 0, 0, 1, 2, 1, 2])
    assert max_skew_at_k(ranked, DESIRED, k=4) == pytest.approx(math.log(0.75 / 0.5))


def test_a_proportional_top_has_no_skew_and_one_rare_group_alone_has_the_most():
    proportional = torch.tensor([0, 1, 2, 0, 1, 0, 2, 0, 1, 0]).repeat(2)
    assert abs(max_skew_at_k(proportional, DESIRED, k=10)) < 1e-6
    assert max_skew_at_k(torch.full((9,), 2), DESIRED, k=5) == pytest.approx(-math.log(0.2))
    for k in range(1, 20):
        assert -1e-12 <= max_skew_at_k(random_groups(20), DESIRED, k) <= -math.log(0.2) + 1e-6


def test_ndkl_agrees_with_its_definition():
    ranked = random_groups(40)
    assert ndkl(ranked, DESIRED) == pytest.approx(ndkl_by_hand(ranked.tolist(), [0.5, 0.3, 0.2]), rel=1e-6)
    assert ndkl(torch.tensor([0, 1]), EVEN) == pytest.approx(math.log(2) / (1 + 1 / math.log2(3)))


def test_ndkl_is_zero_for_one_group_positive_otherwise_and_smaller_for_a_mixed_order():
    assert ndkl(torch.zeros(30, dtype=torch.int64), torch.ones(1, dtype=torch.float64)) == 0
    assert min(ndkl(random_groups(n), DESIRED) for n in range(1, 20)) > 0
    mixed = torch.tensor([0, 1]).repeat(20)
    assert ndkl(mixed, EVEN) < ndkl(mixed.sort().values, EVEN)


def test_names_of_the_groups_do_not_matter():
    ranked, renamed = random_groups(50), torch.tensor([2, 0, 1])
    desired = torch.empty(3, dtype=torch.float64).index_copy_(0, renamed, DESIRED)
    assert ndkl(renamed[ranked], desired) == pytest.approx(ndkl(ranked, DESIRED), rel=1e-12)
    assert max_skew_at_k(renamed[ranked], desired, 7) == pytest.approx(max_skew_at_k(ranked, DESIRED, 7), rel=1e-12)


def test_images_are_ranked_by_falling_similarity_and_the_queries_summarised():
    groups = torch.tensor([0, 1, 0, 1])
    similarities = torch.tensor([[0.9, 0.1, 0.8, 0.2], [0.9, 0.8, 0.1, 0.2]])
    first, second = [0, 0, 1, 1], [0, 1, 1, 0]
    figures = fairness_figures(similarities, torch.zeros_like(groups), groups, top_k=2)
    expected = {
        "max_skew": (math.log(2) + 0) / 2,
        "max_skew_worst_query": math.log(2),
        "ndkl": (ndkl_by_hand(first, [0.5, 0.5]) + ndkl_by_hand(second, [0.5, 0.5])) / 2,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_ties_keep_the_order_of_the_images():
    groups = random_groups(60)
    shares = groups.bincount().double() / 60
    tied = fairness_figures(torch.zeros(1, 60), torch.zeros_like(groups), groups, top_k=10)
    assert tied["max_skew"] == pytest.approx(max_skew_at_k(groups, shares, 10), rel=1e-6)
    assert tied["ndkl"] == pytest.approx(ndkl(groups, shares), rel=1e-6)


def test_parity_difference_is_zero_for_independent_predictions_and_one_for_the_group_itself():
    groups = torch.arange(3).repeat_interleave(8)
    assert demographic_parity_difference(torch.arange(4).repeat(6), groups, num_classes=5).tolist() == [0] * 5
    assert demographic_parity_difference(groups, groups, num_classes=4).tolist() == [1, 1, 1, 0]


def test_opportunity_difference_compares_true_positive_rates():
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    labels = torch.tensor([0, 0, 1, 2, 0, 0, 0, 1, 1])
    predictions = torch.tensor([0, 1, 1, 2, 0, 0, 0, 1, 0])
    difference = equal_opportunity_difference(predictions, labels, groups, num_classes=4)
    assert difference[:2].tolist() == [1 - 1 / 2, 1 - 1 / 2]
    assert difference[2:].isnan().all()  # group 1 has no sample of class 2, nobody one of class 3
    assert difference.nanmean() == 0.5


def test_a_perfect_classifier_gives_equal_opportunity_whatever_the_groups():
    labels, groups = random_groups(200, num_groups=4), random_groups(200)
    assert equal_opportunity_difference(labels, labels, groups, num_classes=4).tolist() == [0] * 4
    assert demographic_parity_difference(labels, groups, num_classes=4).max() > 0


def test_worst_group_and_gap_by_hand():
    correct = torch.tensor([True, False, True, True, False, False, False, True])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert worst_group_accuracy_and_gap(correct, groups) == (0.25, 0.5)
