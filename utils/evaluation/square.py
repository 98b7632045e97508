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
    """Square attack: random search on squares by the logits alone, no gradients. -> adversarial images (B, 3, H, W).

    The search is ``pyautoattack``'s. Its random numbers are drawn here: stripes of the start from (seed, position), squares
    from ``seed``, the same for every image, so that an image's attack does not depend on the images beside it.

    Args:
        pixel_values: correctly classified, (B, 3, H, W) float32 in [0,1]. labels: (B,) int64.
        positions: of the images in their set. eps: radius, as a share of the pixel range.
        num_queries: forwards for an image that holds out. batch_size: forwards at a time.

    Raises ``ImportError`` without the package. Source: Andriushchenko et al. 2020 (arXiv 1912.00049).
    """
    from pyautoattack.square import SquareAttack

    def predict(images: Tensor) -> Tensor:
        parts = [logits_fn(part) for part in images.split(batch_size)]
        return torch.cat(parts) if len(images) else parts[0]

    class SeededSquareAttack(SquareAttack):
        generator = torch.Generator().manual_seed(seed_from("square", seed))

        def random_int(self, low: int = 0, high: int = 1, shape: Sequence[int] = (1,)) -> Tensor:
            return (low + (high - low) * torch.rand(*shape, generator=self.generator)).long().to(self.device)

        def random_choice(self, shape: Sequence[int]) -> Tensor:
            if len(shape) < 4:  # the colour of a square
                return (2 * torch.rand(*shape, generator=self.generator) - 1).sign().to(self.device)
            own = [torch.Generator().manual_seed(seed_from("square", seed, position)) for position in positions]
            stripes = [2 * torch.rand(*shape[1:], generator=generator) - 1 for generator in own]
            return torch.stack(stripes).sign().to(self.device)

        def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            """z_y - max of the others, in (0, ...) as long as y is the answer: two equal classes are no success."""
            logits = predict(x)
            others = logits.scatter(1, y[:, None], float("-inf")).amax(dim=1)
            margin = logits.gather(1, y[:, None])[:, 0] - others
            margin = torch.where(logits.argmax(dim=1) == y, margin.clamp_min(1e-12), margin)
            return margin, margin.clone()

    attack = SeededSquareAttack(
        predict, eps=eps, n_queries=num_queries, seed=seed, resc_schedule=False, device=pixel_values.device
    )
    attack.init_hyperparam(pixel_values)
    return attack.attack_single_run(pixel_values, labels)[1]
