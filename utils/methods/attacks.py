"""Adversarial attacks as functions: a per-sample loss, pixels in [0,1], ``eps`` and ``step_size`` in; ``delta`` out.

All radii here are fractions of the pixel range, eps = 4/255 and not 4: only the command line counts in 1/255.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PerSampleLoss = Callable[[Tensor], Tensor]  # perturbed pixel_values (B, 3, H, W) in [0,1] -> losses (B,), float32


def pgd(
    loss_fn: PerSampleLoss,
    pixel_values: Tensor,
    *,
    eps: float,
    step_size: float,
    num_steps: int,
    start: Tensor | None = None,
    momentum: float = 0.0,
    update: Callable[..., None] | None = None,
) -> Tensor:
    """Projected gradient ascent under an l_inf bound: delta <- P(delta + step_size * sign(v)), v the gradient's sign.

    With ``momentum`` m > 0, v <- sign(m * v + sign(gradient)). P clamps delta to the ball, then x + delta to [0,1].

    Args:
        loss_fn: is maximised. Losses are summed over samples, so that a sample's attack does not depend on its batch.
        pixel_values: x, (B, 3, H, W), float32, in [0,1].
        eps, step_size: radius and step, as fractions of the pixel range.
        num_steps: gradient steps; 0 returns the projected start.
        start: first delta, same shape as x (default: zeros). Must be random if the loss is the distance to the clean
            embedding of the same weights: at delta = 0 its gradient is exactly zero.
        update: ``ascend`` (default), or ``torch.compile`` of it, which is one kernel instead of three.

    Returns:
        delta, (B, 3, H, W), float32, detached. |delta| <= eps and x + delta in [0,1], up to one float32 rounding.

    Only the gradient with respect to the pixels is computed. Call it inside ``frozen(module)``: then autograd does not
    keep the activations that weight gradients need.
    Source: Madry et al. 2018 (arXiv 1706.06083), equation for PGD; sign momentum as in FARE (arXiv 2402.12336).
    """
    pixel_values = pixel_values.detach()
    update = update or ascend
    # Bounds of x + delta. Clamping delta to the ball and then x + delta to [0,1] equals one clamp to these bounds.
    lowest, highest = (pixel_values - eps).clamp_min_(0.0), (pixel_values + eps).clamp_max_(1.0)
    adversarial = pixel_values.clone() if start is None else torch.clamp(pixel_values + start, lowest, highest)
    velocity = torch.zeros_like(pixel_values) if momentum else None
    for _ in range(num_steps):
        adversarial.requires_grad_(True)
        with torch.enable_grad():
            loss = loss_fn(adversarial).sum()
        (gradient,) = torch.autograd.grad(loss, adversarial)
        adversarial = adversarial.detach()
        with torch.no_grad():
            if velocity is not None:
                gradient = velocity.mul_(momentum).add_(gradient.sign()).sign_()
            update(adversarial, gradient, lowest, highest, step_size)
    return adversarial.detach() - pixel_values


def ascend(adversarial: Tensor, gradient: Tensor, lowest: Tensor, highest: Tensor, step_size: float) -> None:
    """x' <- clamp(x' + step_size * sign(gradient), lowest, highest), in place. All (B, 3, H, W), float32."""
    adversarial.add_(gradient.sign(), alpha=step_size)
    torch.clamp(adversarial, lowest, highest, out=adversarial)


def project(delta: Tensor, pixel_values: Tensor, eps: float) -> Tensor:
    """The nearest allowed perturbation: clamps delta to [-eps, eps], then x + delta to [0,1]."""
    return (pixel_values + delta.clamp(-eps, eps)).clamp(0.0, 1.0) - pixel_values


def uniform_start(pixel_values: Tensor, eps: float, seeds: Sequence[int]) -> Tensor:
    """delta uniform in [-eps, eps] per pixel, projected; sample i is drawn from its own ``seeds[i]``.

    A start depends only on its seed, not on the batch or the process. It differs between types of device.
    """
    delta = torch.empty_like(pixel_values)
    generator = torch.Generator(device=pixel_values.device)
    for sample, seed in zip(delta, seeds, strict=True):
        generator.manual_seed(seed)
        sample.uniform_(-eps, eps, generator=generator)
    return project(delta, pixel_values, eps)


def attack_seeds(seed: int, step: int | str, positions: Sequence[int]) -> list[int]:
    """A 63-bit seed per sample, from (the run's seed, training step or purpose, position in the global batch)."""
    return [seed_from(seed, step, position) for position in positions]


def seed_from(*parts: int | float | str) -> int:
    """A 63-bit seed that depends on all the parts."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside the block no parameter requires a gradient; afterwards each one does if it did before."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


Logits = Callable[[Tensor], Tensor]  # pixel_values (B, 3, H, W) in [0,1] -> logits (B, C), differentiable


def gaussian_noise(pixel_values: Tensor, sigma: float, seeds: Sequence[int]) -> Tensor:
    """x + sigma * n with n standard normal, clamped to [0,1]; row i is drawn from its own ``seeds[i]``, on the CPU.

    (B, 3, H, W) float32 in [0,1] -> the same; sigma as a fraction of the pixel range.
    """
    noise = torch.empty(pixel_values.shape)
    generator = torch.Generator()
    for sample, seed in zip(noise, seeds, strict=True):
        sample.normal_(generator=generator.manual_seed(seed))
    return (pixel_values + sigma * noise.to(pixel_values)).clamp(0.0, 1.0)
