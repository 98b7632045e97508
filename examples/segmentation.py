r"""Segmentation on frozen patch tokens, clean and with the encoder under attack: LORE's check on ADE20k, small.

    python examples/segmentation.py --model runs/small-clip runs/fare4 runs/lore4 --output_dir runs/segmentation

For each encoder, a linear head learns the class of every pixel from the patch tokens of clean training images. The
encoder is frozen. Then PGD attacks the test images without any knowledge of the head: it moves the encoder's output
away from that of the clean image:

    --attack patch_tokens    sum over patches of ||t_p(x + delta) - t_p(x)||^2
    --attack embedding       ||phi(x + delta) - phi(x)||^2, the image embedding that FARE and LORE are trained on

Every model is attacked with its own gradients. mIoU and pixel accuracy are printed and saved in results.json;
predictions.png shows examples.

The images are generated from the seed: discs, squares, triangles and crosses of random colours and places, each with a
texture of its class, on smooth backgrounds. They are not photographs. Their textures have a contrast of about 140/255
and so need larger radii than photographs; use the results only to compare models. CLIP's patch tokens are its last
hidden state after the post layer norm; those of DINOv2 are its last hidden state.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import flag, parse_settings, required, run
from utils.errors import UserError
from utils.evaluation.figures import draw_grid
from utils.evaluation.results import attempt, short_names
from utils.methods.attacks import attack_seeds, frozen, pgd, seed_from, uniform_start
from utils.methods.losses import squared_distance
from utils.model_card import versions
from utils.models.encoders import ImageEncoder, make_encoder
from utils.models.hub import find_config, load
from utils.models.published import BASE_MODEL_HELP, PROCESSOR_HELP, ModelName, model_name
from utils.processes.progress import wide_console

CLASSES = ("background", "disc", "square", "triangle", "cross")
PALETTE = [(40, 40, 40), (0, 114, 178), (213, 94, 0), (0, 158, 115), (240, 228, 66)]  # of Okabe and Ito
SUPPORTED = ("clip", "clip_vision_model", "dinov2")  # towers with a class token before the patch tokens
PICTURES = 6  # rows in predictions.png

attack_flag = partial(flag, group="attack")


@dataclass
class Settings:
    model: list[str] = required(
        "CLIP, CLIP vision or DINOv2: ids, directories or files, or NAME@BASE", group="what", path=True, many=True
    )
    base_model: str | None = flag(None, BASE_MODEL_HELP, group="what", path=True)
    processor: str | None = flag(None, PROCESSOR_HELP, group="what", path=True)
    output_dir: str = required("results.json and predictions.png go there", group="what", path=True)
    num_train: int = flag(1000, "images that the head learns from", group="data", minimum=1)
    num_test: int = flag(200, "images that are measured", group="data", minimum=1)
    seed: int = flag(0, "of the images, the head's batches and the attack's starts", group="data", minimum=0)
    head_epochs: int = flag(20, "passes of the head over the training images", group="head", minimum=1)
    head_learning_rate: float = flag(1e-2, "AdamW's, cosine to 0", group="head", above=0)
    attack: str = attack_flag(
        "patch_tokens",
        "what is moved away: all patch tokens, or the image embedding",
        choices=("patch_tokens", "embedding"),
    )
    eps: list[float] = attack_flag([4.0, 8.0, 16.0], "radii of l_inf PGD, in 1/255", above=0, maximum=255)
    attack_steps: int = attack_flag(10, "PGD steps", minimum=1)
    attack_step_size: float | None = attack_flag(None, "PGD step, in 1/255 (default: eps/4)", above=0)
    batch_size: int = flag(32, "images at a time", group="what", minimum=1)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    settings.model, settings.eps = list(dict.fromkeys(settings.model)), sorted(set(settings.eps))
    models = {name: model_name(name, settings.base_model, settings.processor) for name in settings.model}
    for model in models.values():
        find_config(model, "--model", SUPPORTED)
    output_dir = Path(settings.output_dir)
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise UserError(f"--output_dir {output_dir}: exists and is not an empty directory; give another one")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be made ({error.strerror})") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    results, shown = [], []
    for name, model in models.items():
        encoder = load_encoder(model).to(device)
        train = make_images(settings.num_train, encoder.image_size, settings.seed, "train")
        test = make_images(settings.num_test, encoder.image_size, settings.seed, "test")
        head = fit_head(encoder, *train, settings)
        clean = predict(encoder, head, test[0], settings.batch_size)
        results.append(result(name, None, clean, test[1], settings))
        shown.append((name, "clean", test, test[0], clean))
        for eps in settings.eps:
            attacked = attack(encoder, test[0], eps, settings)
            predicted = predict(encoder, head, attacked, settings.batch_size)
            results.append(result(name, eps, predicted, test[1], settings))
        shown.append((name, f"eps {eps:g}", test, attacked, predicted))
    constant = torch.zeros_like(test[1])
    results.append(result("background everywhere", None, constant, test[1], settings))
    written = {
        "settings": asdict(settings),
        "classes": CLASSES,
        "device": str(device),
        "versions": versions(),
        "results": results,
    }
    (output_dir / "results.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print_table(results, settings)
    attempt("predictions.png", lambda: draw_predictions(output_dir / "predictions.png", shown, settings), [])


def load_encoder(name: str | ModelName) -> ImageEncoder:
    """The frozen image encoder of a model, in eval mode."""
    return make_encoder(*load(name, "--model", SUPPORTED)).eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------- data


def make_images(count: int, size: int, seed: int, split: str) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, size, size) float32 in [0,1] and masks (count, size, size) int64 of ``CLASSES``.

    An image depends only on (seed, split, its number, size).
    """
    pairs = [make_image(size, seed_from("segmentation", seed, split, number)) for number in range(count)]
    images, masks = zip(*pairs)
    return torch.stack(images), torch.stack(masks)


def make_image(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """One to three shapes on a smooth background: (3, size, size) float32 in [0,1], (size, size) int64.

    The width of a shape is 0.5 to 0.8 of the side. Its two colours and its contrast are random, so that only form and
    texture show the class.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def integer(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    coarse = torch.rand(1, 3, 3, 3, generator=generator)
    image = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)[0]
    image = image + 0.03 * torch.randn(3, size, size, generator=generator)
    mask = torch.zeros(size, size, dtype=torch.int64)
    axis = torch.arange(size) + 0.5
    for _ in range(1 + integer(3)):
        kind = 1 + integer(len(CLASSES) - 1)
        radius = float(uniform(0.25, 0.4)) * size
        y, x = (float(uniform(radius, size - radius)) for _ in range(2))
        inside = _shape(kind, (axis[:, None] - y) / radius, (axis[None, :] - x) / radius)
        light, dark = uniform(0.55, 1.0, 3), uniform(0.0, 0.45, 3)
        texture = _texture(kind, axis, size, integer(8))
        filled = dark.view(3, 1, 1) + texture * (light - dark).view(3, 1, 1)
        image = torch.where(inside, filled, image)
        mask = torch.where(inside, kind, mask)
    return image.clamp(0.0, 1.0), mask


def _shape(kind: int, y: Tensor, x: Tensor) -> Tensor:
    """The mask of a shape: y (H, 1) and x (1, W), measured from its centre in units of its radius -> bool (H, W)."""
    if kind == 1:
        return y.square() + x.square() < 1
    if kind == 2:
        return torch.maximum(y.abs(), x.abs()) < 0.9
    if kind == 3:
        return (y < 0.9) & (x.abs() < (y + 1) / 1.9)
    return (torch.minimum(y.abs(), x.abs()) < 0.35) & (torch.maximum(y.abs(), x.abs()) < 1)


def _texture(kind: int, axis: Tensor, size: int, phase: int) -> Tensor:
    """The weight of the light colour, (H, W) in [0,1]: horizontal, vertical, diagonal or checked, period size / 8."""
    y, x = (axis[:, None] + phase) * 16 / size, (axis[None, :] + phase) * 16 / size
    stripes = {1: y + 0 * x, 2: x + 0 * y, 3: x + y}
    if kind in stripes:
        return (stripes[kind].floor() % 2).float()
    return ((y.floor() + x.floor()) % 2).float()


# ------------------------------------------------------------------------------------------------------ tokens and head


def patch_tokens(encoder: ImageEncoder, pixel_values: Tensor) -> Tensor:
    """(B, 3, H, W) in [0,1] -> patch tokens (B, P, D), float32, without the class token, after the last layer norm."""
    normalised = (pixel_values - encoder.image_mean) / encoder.image_std
    tokens = encoder.vision_model(normalised).last_hidden_state[:, 1:]
    # CLIP applies its post layer norm only to the class token. DINOv2's last hidden state is normed already.
    return encoder.vision_model.post_layernorm(tokens) if hasattr(encoder.vision_model, "post_layernorm") else tokens


class SegmentationHead(nn.Module):
    """Logits of every pixel = bilinear upsampling of W (t - mean) / deviation + b, with the patch tokens t.

    mean, deviation: (D,), of the training images' tokens. Source: the linear head of DINOv2 (Oquab et al. 2023, arXiv
    2304.07193). Its batch norm is fixed here.
    """

    def __init__(self, mean: Tensor, deviation: Tensor, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.linear = nn.Linear(len(mean), num_classes, device=mean.device)
        self.image_size = image_size
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, P, D), P a square number -> (B, C, image_size, image_size)."""
        logits = self.linear((tokens - self.mean) / self.deviation)
        side = math.isqrt(logits.shape[1])
        logits = logits.transpose(1, 2).unflatten(2, (side, side))
        return F.interpolate(logits, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False)


def fit_head(encoder: ImageEncoder, images: Tensor, masks: Tensor, settings: Settings) -> SegmentationHead:
    """Trains only the head, by the mean cross-entropy over pixels. The same seed gives the same head."""
    device = encoder.image_mean.device
    with torch.no_grad():
        tokens = torch.cat([patch_tokens(encoder, part.to(device)) for part in images.split(settings.batch_size)])
    flat = tokens.flatten(0, 1)
    head = SegmentationHead(flat.mean(dim=0), flat.std(dim=0).clamp_min(1e-6), len(CLASSES), encoder.image_size)
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.head_learning_rate, weight_decay=1e-4)
    steps = settings.head_epochs * math.ceil(len(images) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed_from("head", settings.seed))
    for _ in range(settings.head_epochs):
        for batch in torch.randperm(len(images), generator=generator).split(settings.batch_size):
            loss = F.cross_entropy(head(tokens[batch.to(device)]), masks[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.requires_grad_(False)


@torch.no_grad()
def predict(encoder: ImageEncoder, head: SegmentationHead, images: Tensor, batch_size: int) -> Tensor:
    """(N, 3, H, W) -> the most likely class of every pixel, (N, H, W) int64, on the CPU."""
    parts = images.split(batch_size)
    return torch.cat([head(patch_tokens(encoder, part.to(head.mean.device))).argmax(dim=1).cpu() for part in parts])


def attack(encoder: ImageEncoder, images: Tensor, eps: float, settings: Settings) -> Tensor:
    """Adversarial images (N, 3, H, W) in [0,1] with |x' - x| <= eps/255, on the CPU.

    PGD maximises the squared distance of the tokens or of the embedding from those of the clean image. The start is
    random and depends only on (seed, number of the image): at the clean image itself the gradient is zero.
    """

    def output(pixel_values: Tensor) -> Tensor:
        if settings.attack == "embedding":
            return encoder(pixel_values)
        return patch_tokens(encoder, pixel_values).flatten(1)

    device = encoder.image_mean.device
    radius = eps / 255
    step_size = radius / 4 if settings.attack_step_size is None else settings.attack_step_size / 255
    attacked = []
    with frozen(encoder):
        for positions in torch.arange(len(images)).split(settings.batch_size):
            pixel_values = images[positions].to(device)
            with torch.no_grad():
                clean = output(pixel_values)
            delta = pgd(
                lambda adversarial, clean=clean: squared_distance(output(adversarial), clean),
                pixel_values,
                eps=radius,
                step_size=step_size,
                num_steps=settings.attack_steps,
                start=uniform_start(pixel_values, radius, attack_seeds(settings.seed, 0, positions.tolist())),
            )
            attacked.append((pixel_values + delta).cpu())
    return torch.cat(attacked)


# -------------------------------------------------------------------------------------------------------------- results


def segmentation_scores(predicted: Tensor, masks: Tensor, num_classes: int) -> dict[str, Any]:
    """mIoU, pixel accuracy and the IoU of each class over all pixels. Both arguments are (N, H, W) int64.

    IoU_c = true positives / (true positives + false positives + false negatives); None if a class does not occur.
    """
    confusion = torch.bincount((masks * num_classes + predicted).flatten(), minlength=num_classes**2)
    confusion = confusion.view(num_classes, num_classes).double()
    hits = confusion.diagonal()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - hits
    present = union > 0
    iou = hits / union
    return {
        "miou": float(iou[present].mean()),
        "pixel_accuracy": float(hits.sum() / confusion.sum()),
        "iou": [float(value) if there else None for value, there in zip(iou, present)],
    }


def result(model: str, eps: float | None, predicted: Tensor, masks: Tensor, settings: Settings) -> dict[str, Any]:
    attack = "clean" if eps is None else settings.attack
    return {"model": model, "attack": attack, "eps": eps, "n": len(masks)} | segmentation_scores(
        predicted, masks, len(CLASSES)
    )


def print_table(results: Sequence[dict[str, Any]], settings: Settings) -> None:
    table = Table(title=f"mIoU (pixel accuracy), %; attack on {settings.attack}")
    table.add_column("model")
    columns = [None, *settings.eps]
    for eps in columns:
        table.add_column("clean" if eps is None else f"eps {eps:g}", justify="right")
    for model in dict.fromkeys(row["model"] for row in results):
        cells = {row["eps"]: row for row in results if row["model"] == model}
        values = [
            f"{100 * cells[eps]['miou']:.1f} ({100 * cells[eps]['pixel_accuracy']:.1f})" if eps in cells else ""
            for eps in columns
        ]
        table.add_row(model, *values)
    wide_console().print(table)


def draw_predictions(path: Path, shown: Sequence[tuple[str, str, Any, Tensor, Tensor]], settings: Settings) -> None:
    """Draws image, truth, and for each model the predictions for the clean image and under the largest eps."""
    palette = torch.tensor(PALETTE, dtype=torch.uint8)

    def coloured(mask: Tensor) -> Tensor:
        return palette[mask].permute(2, 0, 1)

    rows, short = [], short_names(settings.model, of_models=True)
    for number in range(min(PICTURES, settings.num_test)):
        images, masks = shown[0][2]
        pictures = [(_uint8(images[number]), "image"), (coloured(masks[number]), "truth")]
        for name, condition, _, _, predicted in shown:
            pictures.append((coloured(predicted[number]), f"{short[name]}\n{condition}"))
        rows.append(("", pictures))
    draw_grid(path, rows)


def _uint8(image: Tensor) -> Tensor:
    return (image * 255).round().to(torch.uint8)


if __name__ == "__main__":
    run(main)
