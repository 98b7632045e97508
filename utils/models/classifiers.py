"""Classifiers of image embeddings: class texts or a linear head, a linear probe, nearest neighbours.

``classifier(image_embeds)``: (B, D), any float dtype -> (B, C) float32, differentiable, so that attacks can follow it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from utils.errors import UserError
from utils.methods.losses import class_logits, unit
from utils.models.published import has_own_head
from utils.whole_files import write_whole

# CLIP's linear probe (arXiv 2103.00020) multiplies the losses by C = 0.316; here l2 = 1 / C multiplies the weights.
CLIP_PROBE_L2 = 1 / 0.316

# The stopping rule of a linear probe, measured in docs/evaluation.md: at 1e-3 fewer than 1 % of the answers differ from
# the optimum's; 1e-2 takes half the time, and up to 5 % differ.
PROBE_TOLERANCE = 1e-3
PROBE_ITERATIONS = 1000  # ten times what any set needed there
PROBE_BLOCK = 1024  # images at once: they and their logits stay in the cache, which saves a tenth to a quarter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """logits = scale * f(z) W^T + b, with f(z) = z / ||z|| if ``normalise``, else z.

    With W = class_embeds, scale = exp(logit_scale) and ``normalise`` this is zero-shot CLIP, to the bit.
    """

    weight: Tensor  # W, (C, D), any float dtype, used in float32
    bias: Tensor | None = None  # b, (C,)
    scale: float = 1.0
    normalise: bool = False

    def to(self, device: torch.device | str) -> LinearClassifier:
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    def __call__(self, image_embeds: Tensor) -> Tensor:
        if self.normalise:
            logits = class_logits(image_embeds, self.weight, self.scale)
        else:
            logits = self.scale * image_embeds.float() @ self.weight.float().T
        return logits if self.bias is None else logits + self.bias.float()


def read_linear_head(
    path: str | Path, embed_dim: int, num_classes: int, flag: str = "--linear_head"
) -> LinearClassifier:
    """A linear head from a safetensors file; its metadata may hold normalise "true". Raises ``UserError``."""

    layout = f"weight ({num_classes}, {embed_dim}) and maybe bias ({num_classes},)"

    def wrong(what: str) -> UserError:
        return UserError(f"{flag} {path}: {what}; expected a safetensors file of a head for this model: {layout}")

    if not Path(path).is_file():
        raise wrong("no such file")
    try:
        # By the descriptor: safetensors opens only paths in UTF-8.
        with open(path, "rb") as opened, safe_open(f"/dev/fd/{opened.fileno()}", framework="pt") as file:
            normalise = (file.metadata() or {}).get("normalise", "false")
            names = sorted(file.keys())
            tensors = {name: file.get_tensor(name).float() for name in names if name in ("weight", "bias")}
    except (SafetensorError, OSError) as error:
        raise wrong(f"not a safetensors file ({str(error)[:160]})") from None
    if "weight" not in tensors:
        raise wrong(f"holds no weight, but {', '.join(names) or 'nothing'}")
    shapes = {"weight": (num_classes, embed_dim), "bias": (num_classes,)}
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise wrong(f"{name} is {tuple(tensor.shape)}")
        if not tensor.isfinite().all():
            raise wrong(f"{name} is not finite")
    if normalise not in ("true", "false"):
        raise wrong(f"normalise is {normalise!r} in the metadata, not 'true' or 'false'")
    return LinearClassifier(tensors["weight"], tensors.get("bias"), normalise=normalise == "true")


def own_linear_head(model: PreTrainedModel, num_classes: int) -> LinearClassifier:
    """The model's own classifier, for a DINOv2 saved for image classification. Raises ``UserError``."""
    head = model.get_submodule("classifier") if has_own_head(model.config) else None
    if not isinstance(head, nn.Linear):
        kind = model.config.model_type
        raise UserError(f"a {kind} has neither a text tower nor a head of its own; give it one with --linear_head")
    if (found := head.out_features) != num_classes:
        fault = f"the model's own head has {found} classes, the data set {num_classes}"
        raise UserError(f"{fault}; give one with --linear_head")
    return LinearClassifier(head.weight.detach(), head.bias.detach())


def save_linear_head(path: str | Path, classifier: LinearClassifier) -> None:
    """Writes a file for ``read_linear_head``, whole or not at all. Raises ``UserError``.

    ``scale`` goes into W, which may change the last bits of the logits.
    """
    tensors = {"weight": classifier.scale * classifier.weight.float()}
    if classifier.bias is not None:
        tensors["bias"] = classifier.bias.float()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_whole(Path(path), save(tensors, {"normalise": str(classifier.normalise).lower()}))


class ProbeStep(NamedTuple):
    """How far the fit of a linear probe is."""

    iteration: int
    evaluations: int  # of the loss and its gradient
    loss: float  # the mean over images, penalty included
    gradient: float  # its largest entry, as a fraction of its value at zero


def fit_linear_probe(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    l2: float = CLIP_PROBE_L2,
    tolerance: float = PROBE_TOLERANCE,
    max_iterations: int = PROBE_ITERATIONS,
    on_iteration: Callable[[ProbeStep], object] = lambda step: None,
) -> LinearClassifier:
    """Multinomial logistic regression: min over W, b of sum_i -log p(y_i | x_i) + l2 / 2 ||W||^2, by L-BFGS-B.

    x are the features (N, D), any float dtype, standardised in each dimension, so that one l2 suits short and long
    embeddings; the returned W and b, float32, include that. labels (N,) int64; l2 > 0. It stops when no entry of the
    gradient is larger than ``tolerance`` times the largest one at W = 0, b = 0, where it starts; after
    ``max_iterations`` with a warning. At a small tolerance it finds what scikit-learn's LogisticRegression(C=1 / l2)
    finds. Computed in float64 on the device of the features; the same features give the same head.

    L-BFGS works on U, W = U T^T, with T = Q (S + l2 C / N)^-1/2 for x^T x / N = Q S Q^T. In these coordinates the
    Hessian at zero is the same in all directions, but for the mean over classes, which saves half to four fifths of
    the iterations. Source: Byrd, Lu, Nocedal and Zhu 1995, as in scipy, with a history of 10.
    """
    from scipy.optimize import minimize  # takes a second to import

    features, labels = _training_set(features, labels, num_classes)
    x = features.double()
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0)
    # A dimension that does not vary gets the weight 0: dividing would blow up its rounding errors.
    deviation = torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.inf)
    x = (x - mean) / deviation
    count, dim = x.shape
    variances, axes = torch.linalg.eigh(x.T @ x / count)
    curvature = variances.clamp_min(0) + l2 * num_classes / count
    axes = axes / curvature.sqrt()  # T
    x = x @ axes
    penalty = l2 / curvature  # l2 ||W||^2 = sum of penalty * U^2
    evaluations, last = 0, (0.0, 0.0)  # the latest loss and largest entry of the gradient

    def weight_and_bias(flat: Tensor) -> tuple[Tensor, Tensor]:
        return flat[: num_classes * dim].view(num_classes, dim), flat[num_classes * dim :]

    @torch.no_grad()
    def evaluate(point: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal evaluations, last
        weight, bias = weight_and_bias(torch.from_numpy(point).to(x.device))
        gradient = torch.cat([(penalty * weight).flatten(), torch.zeros_like(bias)])
        of_weight, of_bias = weight_and_bias(gradient)
        loss = (weight * of_weight).sum() / 2
        for rows, classes in zip(x.split(PROBE_BLOCK), labels[:, None].split(PROBE_BLOCK)):
            logps = torch.addmm(bias, rows, weight.T).log_softmax(dim=1)
            loss -= logps.gather(1, classes).sum()
            residual = logps.exp_().scatter_add_(1, classes, -torch.ones_like(logps[:, :1]))  # p - onehot(y)
            of_weight.addmm_(residual.T, rows)
            of_bias += residual.sum(dim=0)
        # The mean over images, so that its size does not depend on N. Here the device is waited for.
        found = gradient.div_(count).cpu().numpy()
        evaluations, last = evaluations + 1, (loss.item() / count, float(np.abs(found).max()))
        return last[0], found

    start = np.zeros(num_classes * dim + num_classes)
    evaluate(start)
    steepest, evaluations, iterations = last[1], 0, 0

    def report(point: np.ndarray) -> None:
        nonlocal iterations
        iterations += 1
        on_iteration(ProbeStep(iterations, evaluations, last[0], last[1] / steepest))

    limits = {"maxiter": max_iterations, "maxfun": 20 * max_iterations}
    rule = max(tolerance * steepest, 1e-12)  # less is rounding, for example if no dimension varies
    options = limits | {"gtol": rule, "ftol": 0.0, "maxcor": 10}
    found = minimize(evaluate, start, jac=True, method="L-BFGS-B", callback=report, options=options)
    if not found.success:
        logger.warning(
            f"linear probe: stopped after {iterations} iterations, the gradient's largest entry is "
            f"{np.abs(found.jac).max() / steepest:.2g} of its value at zero, expected at most {tolerance:g} "
            f"({found.message}); the head is not the optimum, its accuracy may be too low"
        )
    weight, bias = weight_and_bias(torch.from_numpy(found.x).to(x.device))
    weight = weight @ axes.T / deviation
    return LinearClassifier(weight.float(), (bias - weight @ mean).float())


class KnnClassifier:
    """Weighted nearest neighbours: logit_c = log sum over the k nearest training images of class c of exp(cos / T).

    features (N, D), labels (N,) int64 in [0, num_classes). softmax(logits) are the fractions of the votes; a class
    without a vote gets a finite logit. Gradients flow through the votes, not through the choice of neighbours. Source:
    arXiv 1805.01978, as in DINO (arXiv 2104.14294), k = 20 and T = 0.07.
    """

    BLOCK = 64  # images compared at once: (64, N) similarities in memory
    FLOOR = 1e-30  # the smallest vote; the nearest image's is 1

    def __init__(
        self, features: Tensor, labels: Tensor, num_classes: int, k: int = 20, temperature: float = 0.07
    ) -> None:
        features, labels = _training_set(features, labels, num_classes)
        if not 1 <= k <= len(features):
            count = len(features)
            raise UserError(f"k = {k} nearest neighbours of {count} training images; k may be 1 to {count}")
        self.features = F.normalize(features.float(), dim=-1)
        self.labels, self.num_classes, self.k, self.temperature = labels, num_classes, k, temperature

    def to(self, device: torch.device | str) -> KnnClassifier:
        moved = copy.copy(self)
        moved.features, moved.labels = self.features.to(device), self.labels.to(device)
        return moved

    def __call__(self, image_embeds: Tensor) -> Tensor:
        return torch.cat([self._logits(block) for block in image_embeds.float().split(self.BLOCK)])

    def _logits(self, image_embeds: Tensor) -> Tensor:
        count = len(image_embeds)
        # Pad to a whole block: the last bits of a product depend on its shape, and they decide between equally near
        # images. The votes must not depend on the batch size.
        queries = unit(F.pad(image_embeds, (0, 0, 0, self.BLOCK - count)))
        nearest, places = (queries @ self.features.T).topk(self.k, dim=1)
        log_votes = nearest / self.temperature
        largest = log_votes[:, :1].detach()
        votes = log_votes.new_zeros(self.BLOCK, self.num_classes)
        votes = votes.scatter_add(1, self.labels[places], (log_votes - largest).exp())
        return (votes.clamp_min(self.FLOOR).log() + largest)[:count]


def _training_set(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Checked features and their labels, int64, on the same device. Raises ``UserError``."""
    features, labels = features.detach(), labels.to(features.device, torch.int64)
    if len(features) == 0:
        raise UserError("no training image to classify by; give a training split with readable images")
    for label in (int(labels.max()), int(labels.min())):
        if not 0 <= label < num_classes:
            what = f"label {label} among the training images, of {num_classes} classes"
            raise UserError(f"{what}; correct the .cls files or classnames.txt")
    damaged = int((~features.isfinite().all(dim=1)).sum())
    if damaged:
        raise UserError(f"{damaged} of {len(features)} training images have embeddings that are not finite")
    return features, labels
