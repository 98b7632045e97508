import math

import pytest
import torch

from utils.evaluation.fairness import (
    demographic_parity_difference,
    equal_opportunity_difference,
    group_accuracies,
    max_skew_at_k,
    ndkl,
    retrieval_fairness,
    skew_at_k,
    worst_group_accuracy_and_gap,
)

GENERATOR = torch.Generator().manual_seed(0)
DESIRED = torch.tensor([0.5, 0.3, 0.2])
EVEN = torch.tensor([0.5, 0.5])


def random_groups(size: int, num_groups: int = 3) -> torch.Tensor:
    return torch.randint(num_groups, (size,), generator=GENERATOR)


def ndkl_by_hand(ranked: list[int], desired: list[float]) -> float:
    total = normaliser = 0.0
    for i in range(1, len(ranked) + 1):
        shares = [ranked[:i].count(group) / i for group in range(len(desired))]
        total += sum(s * math.log(s / d) for s, d in zip(shares, desired) if s > 0) / math.log2(i + 1)
        normaliser += 1 / math.log2(i + 1)
    return total / normaliser


def test_skew_is_the_log_ratio_of_the_shares():
    ranked = torch.tensor([0, 0, 0, 1, 2, 1, 2])
    skew = skew_at_k(ranked, DESIRED, k=4)
    assert skew.tolist() == pytest.approx([math.log(0.75 / 0.5), math.log(0.25 / 0.3), -math.inf])
    assert max_skew_at_k(ranked, DESIRED, k=4) == pytest.approx(math.log(1.5))


def test_a_proportional_top_has_no_skew_and_one_rare_group_alone_has_the_most():
    proportional = torch.tensor([0, 1, 2, 0, 1, 0, 2, 0, 1, 0]).repeat(2)
    assert skew_at_k(proportional, DESIRED, k=10).abs().max() < 1e-6
    assert max_skew_at_k(torch.full((9,), 2), DESIRED, k=5) == pytest.approx(-math.log(0.2))
    for k in range(1, 20):
        assert -1e-12 <= max_skew_at_k(random_groups(20), DESIRED, k) <= -math.log(0.2) + 1e-6


def test_ndkl_agrees_with_its_definition():
    ranked = random_groups(40)
    assert ndkl(ranked, DESIRED) == pytest.approx(ndkl_by_hand(ranked.tolist(), [0.5, 0.3, 0.2]), rel=1e-6)
    assert ndkl(torch.tensor([0, 1]), EVEN) == pytest.approx(math.log(2) / (1 + 1 / math.log2(3)))


def test_ndkl_is_zero_for_one_group_positive_otherwise_and_smaller_for_a_mixed_order():
    assert ndkl(torch.zeros(30, dtype=torch.int64), torch.ones(1)) == 0
    assert min(ndkl(random_groups(n), DESIRED) for n in range(1, 20)) > 0
    mixed = torch.tensor([0, 1]).repeat(20)
    assert ndkl(mixed, EVEN) < ndkl(mixed.sort().values, EVEN)


def test_names_of_the_groups_do_not_matter():
    ranked, renamed = random_groups(50), torch.tensor([2, 0, 1])
    desired = torch.empty(3).index_copy_(0, renamed, DESIRED)
    assert ndkl(renamed[ranked], desired) == pytest.approx(ndkl(ranked, DESIRED), rel=1e-12)
    assert max_skew_at_k(renamed[ranked], desired, 7) == pytest.approx(max_skew_at_k(ranked, DESIRED, 7), rel=1e-12)


@pytest.mark.parametrize("k", [0, 8, 9])
def test_k_must_be_smaller_than_the_pool(k):
    with pytest.raises(ValueError, match="K must be smaller than the pool"):
        max_skew_at_k(random_groups(8), DESIRED, k)


@pytest.mark.parametrize("desired", [[1.0, 0.0], [0.5, 0.6], [1.5, -0.5], [math.nan, 1.0]])
def test_desired_shares_are_positive_and_sum_to_one(desired):
    ranked = random_groups(8, num_groups=2)
    with pytest.raises(ValueError, match="must be positive and sum to one"):
        skew_at_k(ranked, torch.tensor(desired), k=2)
    with pytest.raises(ValueError, match="must be positive and sum to one"):
        ndkl(ranked, torch.tensor(desired))


def test_indices_out_of_range_and_empty_inputs_are_refused():
    too_large, negative = torch.tensor([0, 1, 2]), torch.tensor([0, -1, 1])
    for call in (
        lambda values: ndkl(values, EVEN),
        lambda values: skew_at_k(values, EVEN, k=1),
        lambda values: demographic_parity_difference(values, torch.zeros_like(values), num_classes=2),
        lambda values: equal_opportunity_difference(values, values, torch.zeros_like(values), num_classes=2),
        lambda values: group_accuracies(values == 0, values, num_groups=2),
    ):
        for values in (too_large, negative, torch.empty(0, dtype=torch.int64)):
            with pytest.raises(ValueError, match=r"all in 0\.\.1"):
                call(values)


def test_retrieval_ranks_by_falling_similarity_and_summarises_the_queries():
    groups = torch.tensor([0, 1, 0, 1])
    similarities = torch.tensor([[0.9, 0.1, 0.8, 0.2], [0.9, 0.8, 0.1, 0.2]])
    first, second = [0, 0, 1, 1], [0, 1, 1, 0]
    assert retrieval_fairness(similarities, groups, EVEN, k=2) == pytest.approx(
        {
            "max_skew": (math.log(2) + 0) / 2,
            "max_skew_worst_query": math.log(2),
            "ndkl": (ndkl_by_hand(first, [0.5, 0.5]) + ndkl_by_hand(second, [0.5, 0.5])) / 2,
        }
    )


def test_retrieval_breaks_ties_by_position_and_refuses_nan_and_another_pool():
    groups = random_groups(60)
    tied = retrieval_fairness(torch.zeros(1, 60), groups, DESIRED, k=10)
    assert tied["max_skew"] == max_skew_at_k(groups, DESIRED, 10)
    assert tied["ndkl"] == ndkl(groups, DESIRED)
    with pytest.raises(ValueError, match="NaN"):
        retrieval_fairness(torch.full((1, 60), math.nan), groups, DESIRED, k=10)
    with pytest.raises(ValueError, match="wrong shape"):
        retrieval_fairness(torch.zeros(1, 59), groups, DESIRED, k=10)


def test_parity_difference_is_zero_for_independent_predictions_and_one_for_the_group_itself():
    groups = torch.arange(3).repeat_interleave(8)
    assert demographic_parity_difference(torch.arange(4).repeat(6), groups, num_classes=5).tolist() == [0] * 5
    assert demographic_parity_difference(groups, groups, num_classes=4).tolist() == [1, 1, 1, 0]


def test_parity_difference_ignores_a_group_without_samples():
    predictions, groups = torch.tensor([0, 0, 0, 1, 0, 1, 1]), torch.tensor([0, 0, 0, 0, 5, 5, 5])
    expected = [3 / 4 - 1 / 3, 2 / 3 - 1 / 4]
    assert demographic_parity_difference(predictions, groups, num_classes=2).tolist() == pytest.approx(expected)


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


def test_worst_group_and_gap_leave_out_empty_groups():
    correct = torch.tensor([True, False, True, True, False, False, False, True])
    groups = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2])
    accuracies = group_accuracies(correct, groups, num_groups=4)
    assert accuracies[[0, 2]].tolist() == [0.75, 0.25]
    assert accuracies[[1, 3]].isnan().all()
    assert worst_group_accuracy_and_gap(correct, groups, num_groups=4) == (0.25, 0.5)


def test_group_accuracies_weighted_by_size_are_the_accuracy():
    correct, groups = torch.rand(100, generator=GENERATOR) < 0.6, random_groups(100)
    weighted = group_accuracies(correct, groups, num_groups=3) * groups.bincount(minlength=3)
    assert weighted.sum().item() == pytest.approx(correct.sum().item())
