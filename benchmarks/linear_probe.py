"""Compares the linear probe of evaluate.py with scikit-learn's LogisticRegression: time, iterations, loss, accuracy.

  OMP_NUM_THREADS=1 python benchmarks/linear_probe.py --tolerance 1e-2 3e-3 1e-3 --output_dir runs/bench-probe

Both fit the same standardised features in float64 with C = 1 / l2, in turn, --rounds times; the table has the medians.
scikit-learn stops by its own rule, an entry of the gradient of at most 1e-4 whatever its start. Without --features the
sets are scikit-learn's digits and clusters: a random centre for each class and noise whose directions differ in size,
as those of embeddings do. A fifth of the rows, drawn at random, is held out for the accuracy.

A third fit, untimed and with --exact_tolerance, stands for the optimum. "loss above" is the loss less the optimum's, as
a fraction of it. "answers off" is the fraction of held-out rows that the optimum classifies otherwise. CPU seconds are
those of all threads of the process, so other load on the machine does not count. Prints a table and writes table.md.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.comparison import markdown, print_table, what_flag
from utils.cli import flag, parse_settings, required, run
from utils.errors import UserError
from utils.evaluation.results import wilson_interval
from utils.models.classifiers import CLIP_PROBE_L2, PROBE_TOLERANCE, LinearClassifier, fit_linear_probe


@dataclass
class Settings:
    features: list[str] = what_flag([], "safetensors with features (N, D) and labels (N,), as in features/", path=True)
    clusters_images: int = what_flag(7000, "rows of the clusters; 0 leaves them out", minimum=0)
    clusters_dim: int = what_flag(384, "their dimensions", minimum=1)
    clusters_classes: int = what_flag(101, "their classes", minimum=2)
    l2: float = what_flag(CLIP_PROBE_L2, "penalty of both, 1 / C", above=0)
    tolerance: list[float] = what_flag([PROBE_TOLERANCE], "our rule: gradient, as a fraction of its start", above=0)
    exact_tolerance: float = what_flag(1e-5, "of the fit that stands for the optimum", above=0)
    rounds: int = what_flag(3, "fits of each kind; the table has the medians", minimum=1)
    seed: int = what_flag(0, "of the clusters and of the held-out rows", minimum=0)
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device of our fit", group="run")
    output_dir: str = required("table.md is written here", group="run", path=True)


class Fit(NamedTuple):
    head: LinearClassifier
    iterations: int


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    heading = ["features", "fit", "CPU s", "s", "iterations", "loss", "loss above", "accuracy, %", "answers off, %"]
    table = [heading]
    for name, features, labels in sets(settings):
        train, test = standardised_halves(features, labels, settings.seed)
        num_classes = int(labels.max()) + 1
        title = f"{name}: {len(train[0])} x {train[0].shape[1]}, {num_classes} classes"
        optimum = by_project(*train, num_classes, settings, settings.exact_tolerance).head
        least, exact = loss(optimum, *train, settings.l2), answers(optimum, test[0])
        fits: dict[str, Callable[[], Fit]] = {
            f"here, {rule:g}": partial(by_project, *train, num_classes, settings, rule) for rule in settings.tolerance
        }
        fits["scikit-learn"] = partial(by_scikit_learn, *train, num_classes, settings.l2)
        found: dict[str, Fit] = {}
        seconds = defaultdict[str, list[tuple[float, float]]](list)
        for _ in range(settings.rounds):
            for kind, fit in fits.items():
                cpu, wall = time.process_time(), time.perf_counter()
                found[kind] = fit()
                seconds[kind].append((time.process_time() - cpu, time.perf_counter() - wall))
        for kind, (head, iterations) in found.items():
            cpu, wall = map(statistics.median, zip(*seconds[kind]))
            reached, predicted = loss(head, *train, settings.l2), answers(head, test[0])
            right = int((predicted == test[1]).sum())
            low, high = wilson_interval(right, len(predicted))
            accuracy = f"{100 * right / len(predicted):.2f} [{100 * low:.1f}, {100 * high:.1f}]"
            off = 100 * (predicted != exact).double().mean()
            numbers = [f"{cpu:.2f}", f"{wall:.2f}", str(iterations), f"{reached:.5f}", f"{reached / least - 1:.1e}"]
            table.append([title, kind, *numbers, accuracy, f"{off:.2f}"])
            print("  ".join(table[-1]), flush=True)
    threads = torch.get_num_threads()
    print_table(f"Logistic regression, C = {1 / settings.l2:g}, {threads} thread(s), {settings.device}", table)
    Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    (Path(settings.output_dir) / "table.md").write_text(markdown(table), encoding="utf-8")


def sets(settings: Settings) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, features (N, D), labels (N,)) of the files, or of the digits and the clusters."""
    for path in settings.features:
        try:
            tensors = load_file(path)
            yield Path(path).stem, tensors["features"], tensors["labels"]
        except (OSError, SafetensorError, KeyError) as error:
            layout = "expected safetensors with features (N, D) and labels (N,)"
            raise UserError(f"--features {path}: cannot be used ({error}); {layout}") from None
    if settings.features:
        return
    images, labels = load_digits(return_X_y=True)
    yield "digits", torch.tensor(images), torch.tensor(labels)
    if settings.clusters_images:
        yield "clusters", *clusters(settings)


def clusters(settings: Settings) -> tuple[Tensor, Tensor]:
    """Normal noise around a normal centre for each class, both along random axes with deviations 1, 1/2, 1/3, ..."""
    random = torch.Generator().manual_seed(settings.seed)
    dim = settings.clusters_dim
    centres = 0.2 * torch.randn(settings.clusters_classes, dim, generator=random)
    labels = torch.randint(settings.clusters_classes, (settings.clusters_images,), generator=random)
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=random)).Q / torch.arange(1, dim + 1)[:, None]
    return (centres[labels] + torch.randn(len(labels), dim, generator=random)) @ axes, labels


def standardised_halves(
    features: Tensor, labels: Tensor, seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, y) to learn from and (x, y) held out, x float64, standardised by the mean and deviation of the former."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, learnt = order.tensor_split([len(order) // 5])
    x, y = features.double(), labels.long()
    mean, deviation = x[learnt].mean(dim=0), x[learnt].std(dim=0, correction=0)
    x = (x - mean) / torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.inf)
    return (x[learnt], y[learnt]), (x[held_out], y[held_out])


def by_project(x: Tensor, y: Tensor, num_classes: int, settings: Settings, tolerance: float) -> Fit:
    steps = []
    device = torch.device(settings.device)
    options = {"l2": settings.l2, "tolerance": tolerance, "on_iteration": steps.append}
    head = fit_linear_probe(x.to(device), y.to(device), num_classes, **options)
    return Fit(head.to("cpu"), len(steps))


def by_scikit_learn(x: Tensor, y: Tensor, num_classes: int, l2: float) -> Fit:
    fitted = LogisticRegression(C=1 / l2, max_iter=5000).fit(x.numpy(), y.numpy())
    weight, bias = torch.zeros(num_classes, x.shape[1]), torch.full((num_classes,), -torch.inf)
    weight[fitted.classes_] = torch.tensor(fitted.coef_).float()  # it knows the classes with rows alone
    bias[fitted.classes_] = torch.tensor(fitted.intercept_).float()
    return Fit(LinearClassifier(weight, bias), int(fitted.n_iter_[0]))


def loss(head: LinearClassifier, x: Tensor, y: Tensor, l2: float) -> float:
    """What both minimise, as a mean over the rows."""
    logits = x @ head.weight.double().T + head.bias.double()
    return float(F.cross_entropy(logits, y) + l2 / 2 * head.weight.double().square().sum() / len(y))


def answers(head: LinearClassifier, x: Tensor) -> Tensor:
    return head(x).argmax(dim=1)


if __name__ == "__main__":
    run(main)
