"""APGD and Square against the reference code of their authors, and the packing of points into full batches."""

import copy
from typing import NamedTuple

import pytest
import torch

from tests.small_models import photos, small_encoder
from utils.evaluation.apgd import (
    NUM_TARGETS,
    Runs,
    check_periods,
    loss_and_gradient,
    make_points,
    per_image,
    run_apgd,
    sphere_start,
    targeted_loss,
)
from utils.evaluation.square import square
from utils.methods.attacks import frozen, gaussian_noise, seed_from

reference = pytest.importorskip("pyautoattack.autopgd_base", reason="the oracle, pip install pyautoattack")


def classifier(encoder, num_classes=10, scale=20.0, seed=0):
    """Logits of random class embeddings: (B, 3, 32, 32) -> (B, C), in the dtype of the pixels."""
    embeds = torch.randn(num_classes, encoder.embed_dim, generator=torch.Generator().manual_seed(seed))
    embeds = torch.nn.functional.normalize(embeds, dim=-1)

    def logits(pixel_values):
        dtype = pixel_values.dtype
        normalised = (pixel_values - encoder.image_mean.to(dtype)) / encoder.image_std.to(dtype)
        embedded = encoder.visual_projection(encoder.vision_model(normalised).pooler_output)
        return scale * torch.nn.functional.normalize(embedded, dim=-1) @ embeds.to(dtype).T

    return logits


@pytest.fixture(scope="module")
def model(small_clip):
    return small_encoder(small_clip).eval().requires_grad_(False)


@torch.no_grad()
def labelled(logits, count, dtype=torch.float32):
    """Photos with the model's own predictions as labels: every point is correct, as attacks want it."""
    x = photos(count).to(dtype)
    return x, logits(x).argmax(dim=1)


class Attacked(NamedTuple):
    """What ``apgd`` found, all (B, ...)."""

    delta: torch.Tensor  # of the highest loss
    loss: torch.Tensor  # there
    broken: torch.Tensor  # bool: some iterate was classified wrongly
    broken_delta: torch.Tensor  # the last such iterate; of the start where there is none


@torch.no_grad()
def apgd(logits_fn, x, labels, *, eps, start, num_steps, targets=None):
    """One run, every image until the last step: the attack as published, by the steps of ``run_apgd``."""
    targets = torch.full_like(labels, -1) if targets is None else targets
    runs, periods = Runs.begin(x, labels, targets, start, eps), check_periods(num_steps)
    broken, broken_at = torch.zeros_like(labels, dtype=torch.bool), start
    for step in range(num_steps + 1):
        logits, loss, gradient = loss_and_gradient(logits_fn, runs)
        runs.observe(loss, gradient)
        wrong = logits.argmax(dim=1) != labels
        broken, broken_at = broken | wrong, torch.where(per_image(wrong), runs.adversarial, broken_at)
        if step < num_steps:
            runs.advance(eps, periods)
    return Attacked(runs.best - x, runs.best_loss, broken, broken_at - x)


@pytest.mark.parametrize("targeted", [False, True])
def test_trajectories_equal_the_reference(model, targeted):
    """Same start, float64, no removal: the same best point and loss after every number of steps, checks included."""
    exact = copy.deepcopy(model).double()
    exact.vision_model.embeddings.patch_embedding.__class__ = torch.nn.Conv2d  # else it rounds to float32
    logits = classifier(exact)
    x, labels = labelled(logits, 12, torch.float64)
    eps = 6 / 255
    start = sphere_start(x, eps, range(len(x)))
    targets = logits(x).sort(dim=1)[1][:, -2] if targeted else None
    for num_steps in (1, 7, 30, 100):
        found = apgd(logits, x, labels, eps=eps, start=start, num_steps=num_steps, targets=targets)
        kind = reference.APGDAttack_targeted if targeted else reference.APGDAttack
        oracle = kind(logits, n_iter=num_steps, eps=eps, device=x.device)
        oracle.init_hyperparam(x)
        oracle.y_target = targets
        best, correct, loss, broken_at = oracle.attack_single_run(x, labels, x_init=start)
        torch.testing.assert_close(found.loss, loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(x + found.delta, best, rtol=0, atol=1e-9)
        assert torch.equal(found.broken, ~correct)
        if not targeted:
            broken = found.broken
            torch.testing.assert_close((x + found.broken_delta)[broken], broken_at[broken], rtol=0, atol=1e-9)
    assert found.broken.sum() > 0


def test_checkpoints_are_the_published_ones():
    periods = check_periods(100)
    assert periods.nonzero()[:, 0].tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
    assert periods[periods > 0].tolist() == [22, 19, 16, 13, 10, 7, 6, 6]


class SameStarts(reference.APGDAttack_targeted):
    """The reference's APGD-T (and CE) with the starts that ``run_apgd`` draws for a point and a run."""

    def attack_single_run(self, x, y, x_init=None):
        positions = [int((self.all_images - image).abs().sum(dim=(1, 2, 3)).argmin()) for image in x]
        run = 0 if self.loss == "ce" else self.run
        self.run += 1
        seeds = [seed_from("apgd", 0, position, run) for position in positions]
        return super().attack_single_run(x, y, x_init=sphere_start(x, self.eps, seeds))


def reference_mask(logits, x, labels, eps, num_steps):
    """Who holds out against the reference's APGD-CE and then APGD-T, batch by batch as AutoAttack does it."""
    oracle = SameStarts(logits, n_iter=num_steps, eps=eps, device=x.device)
    oracle.all_images, oracle.run = x, 1
    robust = torch.ones(len(x), dtype=torch.bool)
    for loss in ("ce", "dlr-targeted"):
        rows = robust.nonzero()[:, 0]
        oracle.loss = loss
        oracle.run = 1
        perturb = reference.APGDAttack.perturb if loss == "ce" else reference.APGDAttack_targeted.perturb
        adversarial = perturb(oracle, x[rows], labels[rows])
        robust[rows] &= logits(adversarial).argmax(dim=1) == labels[rows]
    return robust


def attacked_points(logits, x, labels, eps, num_steps, batch_size, backwards=False, **more):
    points = make_points(range(len(x)), x, labels, logits(x))
    for point in points if backwards else ():
        point.targets = [-1, *reversed(point.targets[1:])]
    ended = list(run_apgd(points, logits, eps=eps, num_steps=num_steps, batch_size=batch_size, **more))
    assert sorted(point.position for point in ended) == list(range(len(x)))
    return sorted(ended, key=lambda point: point.position)


@pytest.mark.parametrize(("eps", "num_classes"), [(2, 10), (3, 10), (4, 3), (4, 2)])
def test_robust_masks_equal_the_reference_and_every_batch_size(model, eps, num_classes):
    logits = classifier(model, num_classes)
    x, labels = labelled(logits, 24)
    eps, num_steps = eps / 255, 20
    masks = {
        size: torch.tensor(
            [point.broken_by is None for point in attacked_points(logits, x, labels, eps, num_steps, size)]
        )
        for size in (1, 7, 64)
    }
    assert torch.equal(masks[1], masks[7])
    assert torch.equal(masks[7], masks[64])
    assert 0 < masks[64].sum() < len(x)  # else the comparison says nothing
    if num_classes >= 4:  # the reference has no targeted attack on fewer
        assert torch.equal(masks[64], reference_mask(logits, x, labels, eps, num_steps))


def test_no_forward_is_made_for_a_broken_point(model):
    """Forwards of a point: those until it is broken and whole runs before that; of a survivor: all runs."""
    logits, eps, num_steps = classifier(model), 3 / 255, 15
    x, labels = labelled(logits, 40)
    rows = []

    def counted(pixel_values):
        rows.append(len(pixel_values))
        return logits(pixel_values)

    points = make_points(range(len(x)), x, labels, logits(x))
    ended = list(run_apgd(points, counted, eps=eps, num_steps=num_steps, batch_size=4))
    needed = sum(point.forwards for point in ended)
    assert needed <= sum(rows) <= 1.02 * needed  # runs ahead of time were needed, too, but for a few
    assert sum(rows) == sum(sum(point.spent) for point in ended)
    assert all(count == 4 for count in rows[: -num_steps - 1])  # full batches until the very end
    broken = [point for point in ended if point.broken_by is not None]
    assert 0 < len(broken) < len(x)
    for point in ended:
        if point.broken_by is not None:
            assert logits(point.adversarial[None]).argmax() == point.predicted != point.label
            assert point.broken_by * (num_steps + 1) < point.forwards <= (point.broken_by + 1) * (num_steps + 1)
        else:
            assert point.forwards == (NUM_TARGETS + 1) * (num_steps + 1)
            assert point.predicted == point.label
        delta = point.adversarial - point.pixel_values
        assert delta.abs().max() <= eps + 1e-6
        assert point.adversarial.min() >= 0
        assert point.adversarial.max() <= 1


def test_runs_side_by_side_tell_what_runs_in_turn_tell(model):
    """With places for all runs at once, a point is decided by the same run, at the same step, with the same image."""
    # Logits so large that the cross-entropy has no gradient in float32, and the likeliest class last: later runs
    # decide, and some of them are faster than the one before them.
    logits, eps, num_steps = classifier(model, scale=10_000), 3 / 255, 15
    x, labels = labelled(logits, 24)
    in_turn, together = (attacked_points(logits, x, labels, eps, num_steps, size, backwards=True) for size in (1, 400))
    assert len({point.broken_by for point in in_turn}) >= 4
    overtaken = [p for p in together if p.broken_by is not None and p.spent[-1] < p.spent[p.broken_by]]
    assert any(p.broken_by + 1 < len(p.spent) for p in overtaken)  # a later run was the first to break it
    for one, other in zip(in_turn, together):
        assert (one.broken_by, one.forwards, one.predicted) == (other.broken_by, other.forwards, other.predicted)
        # A step's sign may flip where a gradient is nearly zero.
        assert ((one.adversarial - other.adversarial).abs() > 1e-6).float().mean() < 0.01


def test_a_point_leaves_at_its_first_wrong_answer(model):
    """The plain attack, watched step by step, is first wrong where the packed one stopped."""
    logits, eps, num_steps = classifier(model), 3 / 255, 15
    x, labels = labelled(logits, 24)
    answers = []

    def watched(pixel_values):
        found = logits(pixel_values)
        answers.append(found.argmax(dim=1))
        return found

    start = sphere_start(x, eps, [seed_from("apgd", 0, position, 0) for position in range(len(x))])
    apgd(watched, x, labels, eps=eps, start=start, num_steps=num_steps)
    wrong = torch.stack(answers) != labels  # (num_steps + 1, B)
    in_first_run = [point for point in attacked_points(logits, x, labels, eps, num_steps, 7) if point.broken_by == 0]
    assert len(in_first_run) == wrong.any(dim=0).sum() > 3
    for point in in_first_run:
        assert point.forwards == int(wrong[:, point.position].int().argmax()) + 1


def test_targets_are_the_likeliest_other_classes(model):
    logits = classifier(model)
    x, labels = labelled(logits, 6)
    order = logits(x).argsort(dim=1, descending=True)
    for point, classes in zip(make_points(range(6), x, labels, logits(x)), order.tolist()):
        assert point.targets == [-1, *classes[1:]]
    few = classifier(model, 3)
    x, labels = labelled(few, 2)
    assert all(len(point.targets) == 3 for point in make_points(range(2), x, labels, few(x)))


def test_targeted_loss_equals_the_reference_and_does_not_see_the_scale():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    labels, targets = logits.argmax(dim=1), (logits.argmax(dim=1) + 2) % 7
    oracle = reference.APGDAttack_targeted(None, eps=0.1)
    oracle.y_target = targets
    found = targeted_loss(logits, labels, targets)
    torch.testing.assert_close(found, oracle.dlr_loss_targeted(logits, labels), rtol=1e-12, atol=0)
    torch.testing.assert_close(found, targeted_loss(100 * logits, labels, targets), rtol=1e-9, atol=0)
    margin = targeted_loss(logits[:, :3], labels % 3, (labels + 1) % 3)
    rows = torch.arange(50)
    torch.testing.assert_close(margin, logits[rows, (labels + 1) % 3] - logits[rows, labels % 3])


def test_a_bfloat16_attack_is_judged_in_float32(small_clip, model):
    """Whoever leaves as broken is broken in float32 too, and the attack is about as strong."""
    exact, half = classifier(model), small_encoder(small_clip, torch.bfloat16).requires_grad_(False)
    x, labels = labelled(exact, 48)
    eps, num_steps = 3 / 255, 20
    embeds = torch.nn.functional.normalize(
        torch.randn(10, model.embed_dim, generator=torch.Generator().manual_seed(0)), dim=-1
    )

    def rounded(pixel_values):
        return 20 * torch.nn.functional.normalize(half(pixel_values), dim=-1) @ embeds.T

    with frozen(half):
        points = attacked_points(rounded, x, labels, eps, num_steps, 16, judge=exact)
    for point in points:
        assert exact(point.adversarial[None]).argmax() == point.predicted
        assert (point.broken_by is not None) == (point.predicted != point.label)
    full = attacked_points(exact, x, labels, eps, num_steps, 16)
    assert abs(sum(point.broken_by is None for point in points) - sum(point.broken_by is None for point in full)) <= 2


def test_flat_models_are_noticed(model):
    """Pixels rounded on their way in have no gradient: every point says so."""
    logits = classifier(model)

    def masked(pixel_values):
        return logits((pixel_values * 8).round() / 8)

    x, labels = labelled(masked, 8)
    points = attacked_points(lambda x: masked(x) + 0 * x.sum(), x, labels, 2 / 255, 5, 8)
    assert all(point.zero_gradient for point in points if point.broken_by != 0)
    assert any(point.broken_by != 0 for point in points)
    points = attacked_points(logits, x, logits(x).argmax(dim=1), 2 / 255, 5, 8)
    assert not any(point.zero_gradient for point in points)


def test_square_does_not_depend_on_the_company(model):
    logits = classifier(model)
    x, labels = labelled(logits, 10)
    settings = {"eps": 12 / 255, "num_queries": 60, "seed": 3}
    together = square(logits, x, labels, range(10), batch_size=4, **settings)
    alone = torch.cat(
        [square(logits, x[i : i + 1], labels[i : i + 1], [i], batch_size=4, **settings) for i in range(10)]
    )
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert (together - x).abs().max() <= 12 / 255 + 1e-6
    assert (logits(together).argmax(dim=1) != labels).any()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    other = square(logits, x, labels, range(10), batch_size=4, **settings | {"seed": 4})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(other, together)


def test_two_classes_that_are_one_do_not_end_the_search(model):
    """With a class named twice a tie is no success for Square: as many images break as without the twin."""
    logits = classifier(model)
    x, labels = labelled(logits, 24)
    settings = {"eps": 12 / 255, "num_queries": 40, "batch_size": 24}

    def twins(pixel_values):
        return logits(pixel_values)[:, [*range(10), *range(10)]]

    broken = [
        (found(square(found, x, labels, range(24), **settings)).argmax(dim=1) % 10 != labels).sum()
        for found in (logits, twins)
    ]
    assert broken[0] == broken[1] > 0


def test_noise_has_its_sigma_and_its_own_seed():
    x = torch.full((4, 3, 32, 32), 0.5)
    noisy = gaussian_noise(x, 16 / 255, [0, 1, 2, 3])
    assert float((noisy - x).std()) == pytest.approx(16 / 255, rel=0.03)
    assert torch.equal(gaussian_noise(x[2:3], 16 / 255, [2]), noisy[2:3])
    assert gaussian_noise(x, 2.0, [0, 1, 2, 3]).amax() == 1
