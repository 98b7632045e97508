import math

import torch

from utils.methods.losses import class_logits, cross_entropy, entropy, kl_divergence, squared_distance

GENERATOR = torch.Generator().manual_seed(0)


def test_squared_distance_sums_over_the_embedding():
    a, b = torch.randn(3, 50, generator=GENERATOR), torch.randn(3, 50, generator=GENERATOR)
    torch.testing.assert_close(squared_distance(a, b), torch.cdist(a, b).diagonal() ** 2)
    assert squared_distance(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_divergence_and_entropy_agree_with_their_definitions():
    reference, logits = (100 * torch.randn(4, 6, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
    p0, p = reference.softmax(-1), logits.softmax(-1)
    tiny = 1e-300
    expected = (p0 * ((p0 + tiny).log() - (p + tiny).log())).sum(-1)
    torch.testing.assert_close(kl_divergence(reference, logits).double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(entropy(reference).double(), -(p0 * (p0 + tiny).log()).sum(-1), rtol=1e-4, atol=1e-6)
    assert (kl_divergence(logits, logits).abs() < 1e-5).all()
    torch.testing.assert_close(entropy(torch.zeros(2, 10)), torch.full((2,), math.log(10)))


def test_divergence_has_no_gradient_where_the_distributions_agree():
    logits = torch.randn(4, 6, generator=GENERATOR)
    free = logits.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(kl_divergence(logits, free).sum(), free)
    assert gradient.abs().max() < 1e-6


def test_logits_are_scaled_cosines():
    image_embeds, class_embeds = torch.randn(5, 8, generator=GENERATOR), torch.randn(3, 8, generator=GENERATOR)
    class_embeds = class_embeds / class_embeds.norm(dim=-1, keepdim=True)
    logits = class_logits(7 * image_embeds, class_embeds, 100.0)
    expected = 100 * torch.nn.functional.cosine_similarity(image_embeds[:, None], class_embeds[None], dim=-1)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
    labels = torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(
        cross_entropy(logits, labels), -logits.log_softmax(-1)[torch.arange(5), labels], rtol=1e-5, atol=1e-5
    )
