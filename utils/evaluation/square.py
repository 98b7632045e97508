"""Square attack (Andriushchenko et al. 2020): by the logits alone, without gradients."""

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
    """Random search on squares by the logits alone. -> images (B, 3, H, W), those classified rightly attacked.

    The search is ``pyautoattack``'s. Its random numbers are drawn here, so that no attack depends on the images beside:
    stripes of the start from (seed, position), squares from ``seed``, the same for every image. pixel_values
    (B, 3, H, W) float32 in [0,1], labels (B,) int64, positions of the images in their set; eps as a share of the pixel
    range; num_queries: forwards for an image that holds out. Source: Andriushchenko et al. 2020 (arXiv 1912.00049).
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
            if len(shape) < 4:  # the colour of a square
                return uniform(shape, self.generator).sign().to(self.device)
            own = [torch.Generator().manual_seed(seed_from("square", seed, position)) for position in positions]
            return torch.stack([uniform(shape[1:], generator) for generator in own]).sign().to(self.device)

        def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            """z_y - max of the others, in (0, ...) as long as y is the answer: two equal classes are no success."""
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
