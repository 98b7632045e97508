"""Compares the same APGD evaluation by this project and by the reference code: forwards, seconds, robust accuracy.

  python benchmarks/evaluate.py --model runs/small-clip runs/lore4 --data data/cifar10 --eps 2 4 \\
    --output_dir runs/bench-evaluate

Both attack the same images from the same starts with APGD-CE and then APGD-T, in one process and in float32: first the
authors' code (pyautoattack, one restart), then utils/evaluation/apgd.py. The floor is the number of forward passes that
the reference's trajectories need: one per clean image, then those until an image is first classified wrongly, or whole
runs for images that withstand. Prints a table and writes table.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

from benchmarks.comparison import markdown, print_table, what_flag
from utils.cli import flag, parse_settings, required, run
from utils.data.images import ImageTransform
from utils.data.shards import ShardDataset, eval_loader
from utils.evaluation.apgd import make_points, run_apgd, sphere_start
from utils.methods.attacks import frozen, seed_from
from utils.models import hub
from utils.models.classifiers import LinearClassifier
from utils.models.encoders import ImageEncoder, make_encoder
from utils.models.zeroshot import set_classifier, to_pixel_values
from utils.sets.labelled import open_set


@dataclass
class Settings:
    model: list[str] = required(
        "CLIP models, say one that is robust and one that is not", group="what", path=True, many=True
    )
    data: str = required("labelled set with test/", group="what", path=True)
    eps: list[float] = what_flag([2.0, 4.0], "radii, in 1/255", above=0, maximum=255)
    num_samples: int = what_flag(500, "the first N test images", minimum=1)
    num_steps: int = what_flag(100, "steps of each run", minimum=1)
    batch_size: int = what_flag(128, "images per forward, of both", minimum=1)
    seed: int = what_flag(0, "of the starts", minimum=0)
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device", group="run")
    output_dir: str = required("table.md is written here", group="run", path=True)


Logits = Callable[[Tensor], Tensor]


class Counted:
    """A model that counts the images it is called with."""

    def __init__(self, logits_fn: Logits) -> None:
        self.logits_fn, self.rows = logits_fn, 0
        self.watch: list[Tensor] | None = None

    def __call__(self, pixel_values: Tensor) -> Tensor:
        self.rows += len(pixel_values)
        logits = self.logits_fn(pixel_values)
        if self.watch is not None:
            self.watch.append(logits.detach().argmax(dim=1))
        return logits


class SeededReference(APGDAttack_targeted):
    """The reference with this project's starts. For the floor, records when each image of a run was first wrong."""

    def place(self, images: Tensor, seed: int) -> None:
        self.positions = {image.cpu().numpy().tobytes(): position for position, image in enumerate(images)}
        self.start_seed, self.needed, self.run = seed, 0, 0

    def attack_single_run(self, x: Tensor, y: Tensor, x_init: Tensor | None = None) -> tuple:
        positions = [self.positions[image.cpu().numpy().tobytes()] for image in x]
        run = 0 if self.loss == "ce" else self.run
        seeds = [seed_from("apgd", self.start_seed, position, run) for position in positions]
        self.run += 1
        self.model.watch = []
        found = super().attack_single_run(x, y, x_init=sphere_start(x, self.eps, seeds))
        wrong = torch.stack(self.model.watch) != y  # (n_iter + 1, points)
        self.model.watch = None
        self.needed += int(torch.where(wrong.any(dim=0), wrong.int().argmax(dim=0) + 1, len(wrong)).sum())
        return found

    def perturb_ce(self, x: Tensor, y: Tensor) -> Tensor:
        self.loss, self.run = "ce", 0
        return APGDAttack.perturb(self, x, y)

    def perturb_targeted(self, x: Tensor, y: Tensor) -> Tensor:
        self.loss, self.run = "dlr-targeted", 1
        return APGDAttack_targeted.perturb(self, x, y)


def load(
    name: str, data: str, num_samples: int, device: torch.device
) -> tuple[ImageEncoder, LinearClassifier, Tensor, Tensor]:
    """Encoder and classifier of a model, and the first pixel_values (N, 3, H, W) and labels (N,) of a set's test/."""
    clip, processor = hub.load(name, "--model")
    encoder = make_encoder(clip, processor).to(device).eval()
    labelled = open_set([f"{data}/test"], flag="--data", with_classes=True)
    classifier = set_classifier(clip, processor, encoder, labelled, device)
    transform = ImageTransform.from_processor(processor.image_processor)
    dataset = ShardDataset(labelled.index, transform, order="sequential", with_labels=True)
    reading = {"num_samples": num_samples, "batch_size": 500, "rank": 0, "world_size": 1, "num_workers": 0}
    batches = list(eval_loader(dataset, **reading))
    images = torch.cat([to_pixel_values(batch["images"], device) for batch in batches])
    return encoder, classifier, images, torch.cat([batch["labels"] for batch in batches]).to(device)


def by_reference(model: Counted, images: Tensor, labels: Tensor, eps: float, settings: Settings) -> tuple[Tensor, int]:
    """Robust mask (N,) and the floor, by AutoAttack's loop: CE over all batches, then T over the images left."""
    attack = SeededReference(model, n_iter=settings.num_steps, eps=eps, seed=settings.seed, device=images.device)
    attack.place(images, settings.seed)
    with torch.no_grad():
        robust = torch.cat([model(part) for part in images.split(settings.batch_size)]).argmax(dim=1) == labels
    floor = len(images)
    for perturb in (attack.perturb_ce, attack.perturb_targeted):
        for rows in robust.nonzero()[:, 0].split(settings.batch_size):
            if len(rows):
                adversarial = perturb(images[rows], labels[rows])
                with torch.no_grad():
                    robust[rows] = model(adversarial).argmax(dim=1) == labels[rows]
    return robust, floor + attack.needed


def by_project(model: Counted, images: Tensor, labels: Tensor, eps: float, settings: Settings) -> Tensor:
    """The robust mask (N,)."""
    robust = torch.zeros(len(images), dtype=torch.bool)

    def points():
        for rows in torch.arange(len(images)).split(settings.batch_size):
            with torch.no_grad():
                logits = model(images[rows])
            right = rows[(logits.argmax(dim=1) == labels[rows]).cpu()]
            yield from make_points(right.tolist(), images[right], labels[right], logits[right - rows[0]])

    for point in run_apgd(
        points(), model, eps=eps, num_steps=settings.num_steps, batch_size=settings.batch_size, seed=settings.seed
    ):
        robust[point.position] = point.broken_by is None
    return robust


def warm_up(model: Counted, images: Tensor) -> None:
    """One forward and backward pass, so that kernels are chosen and memory is allocated before the clock starts."""
    pixel_values = images.clone().requires_grad_()
    torch.autograd.grad(model(pixel_values).sum(), pixel_values)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    device = torch.device(settings.device)
    rows = [
        [
            "model", "eps", "robust: ref", "here", "differ", "forwards per image: ref", "here", "floor", "here / floor",
            "fewer", "seconds: ref", "here", "faster",
        ]
    ]  # fmt: skip
    for name in settings.model:
        encoder, classifier, images, labels = load(name, settings.data, settings.num_samples, device)
        with frozen(encoder):
            for eps in settings.eps:
                results, seconds, counts = [], [], []
                for attack in (by_reference, by_project):
                    model = Counted(lambda x, encoder=encoder, classifier=classifier: classifier(encoder(x)))
                    warm_up(model, images[: settings.batch_size])
                    model.rows = 0
                    started = time.perf_counter()
                    results.append(attack(model, images, labels, eps / 255, settings))
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    seconds.append(time.perf_counter() - started)
                    counts.append(model.rows)
                (reference, floor), mine = results[0], results[1]
                n = len(images)
                rows.append(
                    [
                        Path(name).name, f"{eps:g}/255", f"{100 * reference.float().mean():.1f} %",
                        f"{100 * mine.float().mean():.1f} %", str(int((reference.cpu() != mine).sum())),
                        f"{counts[0] / n:.1f}", f"{counts[1] / n:.1f}", f"{floor / n:.1f}",
                        f"{counts[1] / floor:.3f}", f"{counts[0] / counts[1]:.2f} x",
                        f"{seconds[0]:.1f}", f"{seconds[1]:.1f}", f"{seconds[0] / seconds[1]:.2f} x",
                    ]
                )  # fmt: skip
                print("  ".join(rows[-1]), flush=True)
    print_table(f"APGD-CE and APGD-T, {settings.num_steps} steps, {settings.num_samples} images", rows)
    Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    (Path(settings.output_dir) / "table.md").write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    run(main)
