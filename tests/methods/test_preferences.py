"""utils/methods/preferences.py against formulas written out here, in float64 and in plain Python."""

import math

import pytest
import torch

from utils.methods.losses import entropy, kl_divergence
from utils.methods.preferences import (
    DEFAULT_BETA,
    PREFERENCES,
    candidate_logits,
    dpo_loss,
    ipo_loss,
    kto_loss,
    margin,
    mean_over_rejected,
    preference_loss,
    retention_kl,
    rewards,
)
from utils.models.policy import batch_logits
from utils.sets.pairs import Row, collate_rows


def some_logits(count=6, texts=5, scale=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits, ref_logits = scale * torch.randn(2, count, texts, generator=generator)
    chosen = torch.randint(texts, (count,), generator=generator)
    rejected = (chosen[:, None] + torch.tensor([[1, 2]])) % texts
    rejected[::2, 1] = -1
    return logits, ref_logits, chosen, rejected


def log_policy(row):
    total = math.log(sum(math.exp(value) for value in row))
    return [value - total for value in row]


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize(
    ("preference", "expected"),
    [("dpo", math.log(2)), ("ipo", 1 / (4 * 0.1**2)), ("kto", 0.5)],
)
def test_losses_at_the_reference(preference, expected):
    logits, _, chosen, rejected = some_logits()
    policy = logits.clone().requires_grad_(True)
    losses = preference_loss(
        preference, policy, logits, chosen, rejected, beta=DEFAULT_BETA[preference], baseline=torch.tensor(0.0)
    )
    torch.testing.assert_close(losses, torch.full((6,), expected))
    assert torch.equal(margin(policy, logits, chosen, rejected), torch.zeros(6, 2))
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert gradient.abs().max() > 0.05  # the preference pulls at the reference already,
    kl = retention_kl(logits, policy)
    torch.testing.assert_close(kl, torch.zeros(6))
    (gradient,) = torch.autograd.grad(kl.sum(), policy)
    assert gradient.abs().max() < 1e-6  # the regulariser does not


@pytest.mark.parametrize("preference", PREFERENCES)
def test_losses_equal_the_formulas(preference):
    """Through log-probabilities, image by image and pair by pair: another way than differences of logits."""
    beta, smoothing, z = 0.7, 0.1, 0.3
    logits, ref_logits, chosen, rejected = (value.tolist() for value in some_logits())
    expected = []
    for row, ref_row, w, ls in zip(logits, ref_logits, chosen, rejected):
        logps, ref_logps = log_policy(row), log_policy(ref_row)
        pairs = []
        for loser in (index for index in ls if index >= 0):
            r_w, r_l = logps[w] - ref_logps[w], logps[loser] - ref_logps[loser]
            h = r_w - r_l
            pairs.append(
                {
                    "dpo": -(1 - smoothing) * math.log(sigmoid(beta * h)) - smoothing * math.log(sigmoid(-beta * h)),
                    "ipo": (h - 1 / (2 * beta)) ** 2,
                    "kto": 0.5 * ((1 - sigmoid(beta * (r_w - z))) + (1 - sigmoid(beta * (z - r_l)))),
                    "ce": -logps[w],
                }[preference]
            )
        expected.append(sum(pairs) / len(pairs))
    found = preference_loss(preference, *some_logits(), beta=beta, label_smoothing=smoothing, baseline=torch.tensor(z))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        lambda h: dpo_loss(h, 0.8, 0.2),
        lambda h: ipo_loss(h, 0.3),
        lambda h: kto_loss(h, -h, torch.tensor(0.2), 1.5),
    ],
)
def test_gradients_by_autograd_equal_differences(loss):
    h = torch.linspace(-5, 5, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, h)


def test_gradient_of_dpo_is_the_published_one():
    """d/dh = -beta sigma(-beta h), without smoothing (arXiv 2305.18290, below equation 7)."""
    h = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(dpo_loss(h, 1.3).sum(), h)
    torch.testing.assert_close(gradient, -1.3 * torch.sigmoid(-1.3 * h.detach()))


def test_the_baseline_of_kto_is_a_constant():
    z = torch.tensor(0.4, requires_grad=True)
    loss = kto_loss(torch.ones(3, 1, requires_grad=True), torch.ones(3, 2), z, 1.0).sum()
    assert torch.autograd.grad(loss, z, allow_unused=True)[0] is None


def test_margin_is_the_projection_on_the_difference_of_the_texts():
    """With the texts frozen, h = s (I - I_ref) . (T_w - T_l)."""
    generator = torch.Generator().manual_seed(0)
    image, ref_image, texts = (
        torch.nn.functional.normalize(torch.randn(count, 16, generator=generator), dim=-1) for count in (6, 6, 5)
    )
    _, _, chosen, rejected = some_logits()
    h = margin(100 * image @ texts.T, 100 * ref_image @ texts.T, chosen, rejected[:, :1])
    expected = 100 * ((image - ref_image) * (texts[chosen] - texts[rejected[:, 0]])).sum(dim=-1)
    torch.testing.assert_close(h[:, 0], expected, rtol=1e-4, atol=1e-3)


def test_nothing_underflows_at_the_largest_scale():
    """Logits of 100 cosines apart: the log of a softmax would be -inf, and its gradient NaN."""
    logits = torch.tensor([[100.0, -100.0, 0.0]], requires_grad=True)
    ref_logits = torch.tensor([[-100.0, 100.0, 0.0]])
    chosen, rejected = torch.tensor([1]), torch.tensor([[0]])
    for preference in PREFERENCES:
        loss = preference_loss(preference, logits, ref_logits, chosen, rejected, beta=1.0, baseline=torch.tensor(0.0))
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        if preference != "kto":  # whose gradient vanishes on both sides, by design
            assert gradient.abs().max() > 0.5


def test_texts_that_are_no_candidates_take_no_part():
    logits, ref_logits, chosen, rejected = some_logits(texts=5)
    candidates = torch.zeros(6, 5, dtype=torch.bool).scatter_(1, chosen[:, None], True)
    candidates.scatter_(1, rejected.clamp_min(0), True)
    candidates[:, :] |= rejected[:, :1] < 0
    masked, ref_masked = candidate_logits(logits, candidates), candidate_logits(ref_logits, candidates)
    noise = torch.where(candidates, 0.0, 50.0)
    other, ref_other = candidate_logits(logits + noise, candidates), candidate_logits(ref_logits - noise, candidates)
    torch.testing.assert_close(retention_kl(ref_masked, masked), retention_kl(ref_other, other))
    assert retention_kl(ref_masked, masked).isfinite().all()
    for preference in PREFERENCES:
        options = {"beta": 1.0, "baseline": torch.tensor(0.1)}
        torch.testing.assert_close(
            preference_loss(preference, masked, ref_masked, chosen, rejected[:, :1], **options),
            preference_loss(preference, other, ref_other, chosen, rejected[:, :1], **options),
        )


def test_rewards_and_means_leave_absent_texts_out():
    logits, ref_logits, _, rejected = some_logits()
    found = rewards(logits, ref_logits, rejected)
    assert found.isfinite().all()
    means = mean_over_rejected(found, rejected)
    torch.testing.assert_close(means[0], found[0, 0])
    torch.testing.assert_close(means[1], found[1].mean())


def test_bfloat16_logits_are_judged_in_float32():
    logits, ref_logits, chosen, rejected = some_logits()
    losses = preference_loss("dpo", logits.bfloat16(), ref_logits.bfloat16(), chosen, rejected, beta=1.0)
    assert losses.dtype == torch.float32


def ragged_rows(form):
    """Pairs with one, two and three rejected texts and two rows of the regulariser, as shards of pairs give them."""
    texts = list("abcdefg")
    more = {"own": [], "given": ["f", "g"], "unequal": ["g"]}[form]
    pairs = [("b", ["a"]), ("c", ["d", "e"]), ("e", ["c"]), ("d", ["a", "b", "c"])]
    rows = [
        Row(torch.empty(4), chosen, rejected, list(dict.fromkeys([chosen, *rejected, *(more if place % 2 else [])])))
        for place, (chosen, rejected) in enumerate(pairs)
    ]
    rows += [Row(torch.empty(4), "b", [], ["b", "c"], True), Row(torch.empty(4), None, [], texts[2:], True)]
    return [{"position": place, "key": str(place), "rows": [row], "skipped": []} for place, row in enumerate(rows)]


@pytest.mark.parametrize("form", ["own", "given", "unequal"])
@pytest.mark.parametrize("preference", PREFERENCES)
def test_a_ragged_batch_has_the_gradients_of_its_samples_alone(preference, form):
    """pytorch#64305, trl#1831: a padded slot read as -inf gave NaN. One batch, micro-batches of two, single samples."""
    generator = torch.Generator().manual_seed(0)
    samples = ragged_rows(form)
    of_text = {name: torch.randn(2, 4, generator=generator) for name in "abcdefg"}
    start, ref_start = torch.randn(2, len(samples), 4, generator=generator)

    def gradients(size):
        images = start.clone().requires_grad_(True)
        for first in range(0, len(samples), size):
            batch = collate_rows(samples[first : first + size], texts=None, no_images=torch.empty(0, 4))
            places = torch.cat([batch["reg_positions"], batch["positions"]])
            texts, ref_texts = torch.stack([of_text[name] for name in batch["texts"]], dim=1)
            logits = batch_logits(images[places], texts, 2.0, batch)
            ref_logits = batch_logits(ref_start[places], ref_texts, 2.0, batch)
            options = {"beta": 0.7, "label_smoothing": 0.1, "baseline": torch.tensor(0.2)}
            loss = preference_loss(
                preference, logits.pairs, ref_logits.pairs, batch["chosen"], batch["rejected"], **options
            )
            (loss.sum() + retention_kl(ref_logits.reg, logits.reg).sum()).backward()
        return images.grad

    alone = gradients(1)
    assert alone.isfinite().all()
    assert (alone[:-2].abs().amax(dim=1) > 1e-6).all()
    for size in (2, 3, len(samples)):
        torch.testing.assert_close(gradients(size), alone, rtol=1e-4, atol=1e-5)


def test_absent_texts_and_classes_have_no_gradient():
    """0 log 0 = 0, in values and in gradients, wherever a column is -inf."""
    infinite = float("-inf")
    logits = torch.tensor([[infinite, 1.0, 2.0], [0.5, infinite, 0.5]], requires_grad=True)
    ref_logits = torch.tensor([[infinite, 2.0, 1.0], [1.0, infinite, 0.5]])
    chosen, rejected = torch.tensor([1, 0]), torch.tensor([[2, -1], [2, -1]])
    whole = torch.tensor([[1.0, 2.0], [0.5, 0.5]])
    ref_whole = torch.tensor([[2.0, 1.0], [1.0, 0.5]])
    torch.testing.assert_close(entropy(logits), entropy(whole))
    torch.testing.assert_close(kl_divergence(ref_logits, logits), kl_divergence(ref_whole, whole))
    torch.testing.assert_close(rewards(logits, ref_logits, rejected)[:, 1], torch.zeros(2))
    for value in (
        entropy(logits),
        kl_divergence(ref_logits, logits),
        rewards(logits, ref_logits, rejected),
        margin(logits, ref_logits, chosen, rejected),
        mean_over_rejected(margin(logits, ref_logits, chosen, rejected), torch.full_like(rejected, -1)),
    ):
        assert value.isfinite().all()
        (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        assert gradient.isfinite().all()
        assert not gradient[logits == infinite].any()
