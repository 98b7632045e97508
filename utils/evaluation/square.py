"""Square attack (Andriushchenko et al. 2020): uses only the logits, no gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.methods.attacks import Logits, seed_from


@torch.no_grad()
def square(
    logits_fn: Logits,
    pixel_values: Tensor,
    labels: Tensor,
    positions: Sequence[int],
    *,
    eps: float,
    num_queries: int = 5000,
    batch_size: int,
    seed: int = 0,
) -> Tensor:
    """Random search over squares. -> images (B, 3, H, W); only correctly classified ones are attacked.

    The search is ``pyautoattack``'s. The random numbers are drawn here, so that an attack does not depend on its batch:
    the start's stripes from (seed, position), the squares from ``seed``, the same for every image. pixel_values
    (B, 3, H, W) float32 in [0,1], labels (B,) int64, positions of the images in their set; eps as a fraction of the
    pixel range; num_queries: most forward passes per image. Source: Andriushchenko et al. 2020 (arXiv 1912.00049).
    """
    from pyautoattack.square import SquareAttack

    def predict(images: Tensor) -> Tensor:
        parts = [logits_fn(part) for part in images.split(batch_size)]
        return torch.cat(parts) if len(images) else parts[0]

    def uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:  # in [-1, 1)
        return 2 * torch.rand(*shape, generator=generator) - 1

    attacked = pixel_values.clone()
    right = (predict(pixel_values).argmax(dim=1) == labels).nonzero()[:, 0]
    if not len(right):
        return attacked
    positions = [positions[row] for row in right.tolist()]

    class SeededSquareAttack(SquareAttack):
        generator = torch.Generator().manual_seed(seed_from("square", seed))

        def random_int(self, low: int = 0, high: int = 1, shape: Sequence[int] = (1,)) -> Tensor:
            return (low + (high - low) * torch.rand(*shape, generator=self.generator)).long().to(self.device)

        def random_choice(self, shape: Sequence[int]) -> Tensor:
            if len(shape) < 4:  # a square's colour
                return uniform(shape, self.generator).sign().to(self.device)
            own = [torch.Generator().manual_seed(seed_from("square", seed, position)) for position in positions]
            return torch.stack([uniform(shape[1:], generator) for generator in own]).sign().to(self.device)

        def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            """z_y - max of the others, kept above 0 while y is the answer: a tie is not a success."""
            logits = predict(x)
            others = logits.scatter(1, y[:, None], float("-inf")).amax(dim=1)
            margin = logits.gather(1, y[:, None])[:, 0] - others
            margin = torch.where(logits.argmax(dim=1) == y, margin.clamp_min(1e-12), margin)
            return margin, margin.clone()

    device = pixel_values.device
    attack = SeededSquareAttack(predict, eps=eps, n_queries=num_queries, seed=seed, resc_schedule=False, device=device)
    attack.init_hyperparam(pixel_values[right])
    attacked[right] = attack.attack_single_run(pixel_values[right], labels[right])[1]
    return attacked
