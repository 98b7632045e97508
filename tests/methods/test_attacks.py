import pytest
import torch

from tests.small_models import photos, small_encoder
from utils.methods.attacks import attack_seeds, frozen, pgd, project, uniform_start
from utils.methods.losses import squared_distance
from utils.models.encoders import frozen_copy


def attack(encoder, reference, x, eps, *, start=None, num_steps=10, momentum=0.0):
    with torch.no_grad():
        ref_image_embeds = reference(x)
    with frozen(encoder):
        return pgd(
            lambda adversarial: squared_distance(encoder(adversarial), ref_image_embeds),
            x,
            eps=eps,
            step_size=eps / 4,
            num_steps=num_steps,
            start=uniform_start(x, eps, range(len(x))) if start is None else start,
            momentum=momentum,
        )


@pytest.mark.parametrize("eps", [1, 4, 16, 255])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_perturbation_stays_in_the_ball_and_the_pixel_range(small_clip, eps, momentum):
    encoder, x = small_encoder(small_clip), photos(4)
    delta = attack(encoder, encoder, x, eps / 255, momentum=momentum)
    assert delta.dtype == torch.float32
    assert not delta.requires_grad
    assert delta.abs().max() <= eps / 255 + 1e-7
    assert (x + delta).min() >= 0
    assert (x + delta).max() <= 1
    assert delta.abs().mean() > 0.2 * min(eps / 255, 0.5)


def test_ascent_reaches_the_maximum_of_a_linear_loss():
    x, weights = photos(3), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    delta = pgd(lambda adversarial: (weights * adversarial).sum((1, 2, 3)), x, eps=0.1, step_size=0.03, num_steps=8)
    best = (x + 0.1 * weights.sign()).clamp(0, 1) - x
    torch.testing.assert_close(delta, best, rtol=0, atol=1e-6)


def test_ball_is_clamped_before_the_pixel_range():
    x, delta = torch.tensor([0.05, 0.5, 0.98]), torch.tensor([-0.3, 0.3, 0.3])
    torch.testing.assert_close(project(delta, x, 0.1), torch.tensor([-0.05, 0.1, 0.02]))


@pytest.mark.parametrize("frozen_before", [False, True])
def test_no_parameter_gradient_is_left_or_computed(small_clip, frozen_before):
    encoder = small_encoder(small_clip).requires_grad_(not frozen_before)
    reference = frozen_copy(encoder)
    seen = []
    encoder.visual_projection.register_forward_hook(
        lambda module, inputs, output: seen.append(module.weight.requires_grad)
    )
    attack(encoder, reference, photos(2), 4 / 255)
    assert seen == [False] * 10
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(parameter.requires_grad != frozen_before for parameter in encoder.parameters())
    with pytest.raises(RuntimeError, match="inside"), frozen(encoder):
        raise RuntimeError("inside")
    assert all(parameter.requires_grad != frozen_before for parameter in encoder.parameters())


def test_a_batch_of_eight_equals_eight_of_one(small_clip):
    encoder = small_encoder(small_clip)
    reference, x, eps = frozen_copy(encoder), photos(8), 4 / 255
    together = attack(encoder, reference, x, eps)
    alone = torch.cat(
        [
            attack(encoder, reference, x[i : i + 1], eps, start=uniform_start(x[i : i + 1], eps, [i]))
            for i in range(len(x))
        ]
    )
    # Sums of other lengths round differently, which can flip the sign of a gradient entry that is nearly zero.
    assert (together != alone).float().mean() < 1e-3
    with torch.no_grad():
        distances = [squared_distance(encoder(x + delta), reference(x)) for delta in (together, alone)]
    torch.testing.assert_close(*distances, rtol=1e-3, atol=0)


@pytest.mark.parametrize("eps", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_attack_is_as_strong_as_float32(small_clip, eps, dtype):
    ratio = attack_strength(small_clip, small_encoder(small_clip, dtype), eps / 255)
    assert ratio >= 0.98


def attack_strength(small_clip, encoder, eps):
    """Distance that ``encoder``'s attacks reach, as a share of the float32 ones', both judged in float32."""
    exact, x = small_encoder(small_clip), photos(128)
    losses = []
    for attacked in (exact, encoder):
        delta = attack(attacked, frozen_copy(attacked), x, eps)
        with torch.no_grad():
            losses.append(squared_distance(exact(x + delta), exact(x)).sum())
    return float(losses[1] / losses[0])


def test_first_attack_of_an_unchanged_encoder_needs_its_random_start(small_clip):
    encoder, x, eps = small_encoder(small_clip), photos(4), 2 / 255
    reference = frozen_copy(encoder)
    stuck = attack(encoder, reference, x, eps, start=torch.zeros_like(x))
    moved = attack(encoder, reference, x, eps)
    with torch.no_grad():
        from_start = squared_distance(encoder(x + uniform_start(x, eps, range(4))), reference(x))
        from_attack = squared_distance(encoder(x + moved), reference(x))
    assert stuck.abs().max() == 0
    assert (from_attack > 2 * from_start).all()


def test_a_start_depends_on_its_own_seed_only():
    x = photos(4)
    seeds = attack_seeds(7, 3, [0, 1, 2, 3])
    starts = uniform_start(x, 0.1, seeds)
    torch.testing.assert_close(uniform_start(x[2:3], 0.1, seeds[2:3]), starts[2:3], rtol=0, atol=0)
    assert len({*seeds, *attack_seeds(7, 4, [0, 1, 2, 3]), *attack_seeds(8, 3, [0, 1, 2, 3])}) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    inside = (x > 0.1) & (x < 0.9)
    assert abs(starts[inside].mean()) < 0.005
    assert starts[inside].std() == pytest.approx(0.1 / 3**0.5, rel=0.05)
