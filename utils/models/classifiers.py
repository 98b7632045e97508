"""What turns image embeddings into logits: class texts, a linear head, a linear probe, nearest neighbours.

All are called alike, ``classifier(image_embeds)``: (B, D) -> (B, C) float32, differentiable, so that an attack sees
through them; all sit on the device of their own tensors until ``to(device)``.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from utils.errors import UserError
from utils.methods.losses import class_logits, unit
from utils.models.encoders import has_own_head

# scikit-learn's C = 0.316 of CLIP's linear probe weighs the losses, l2 = 1 / C the weights.
CLIP_PROBE_L2 = 1 / 0.316


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """logits = scale * f(z) W^T + b, f(z) = z / ||z|| where ``normalise``, else z.

    Zero-shot CLIP is weight = class_embeds, scale = exp(logit_scale), normalise: then the values are, bit by bit, those
    of ``class_logits``.

    weight: W, (C, D), any float dtype, used in float32. bias: b, (C,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    normalise: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.weight)

    def to(self, device: torch.device | str) -> LinearClassifier:
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    def __call__(self, image_embeds: Tensor) -> Tensor:
        """(B, D), any float dtype -> (B, C), float32."""
        if self.normalise:
            logits = class_logits(image_embeds, self.weight, self.scale)
        else:
            logits = self.scale * image_embeds.float() @ self.weight.float().T
        return logits if self.bias is None else logits + self.bias.float()


def read_linear_head(
    path: str | Path, embed_dim: int, num_classes: int, flag: str = "--linear_head"
) -> LinearClassifier:
    """A linear head from a safetensors file: ``weight`` (C, D), and ``bias`` (C,) where there is one.

    The metadata may say normalise "true": the head was trained on embeddings of unit length. Raises ``UserError``.
    """
    if not Path(path).is_file():
        raise UserError(
            f"{flag} {path}: no such file; expected a safetensors file with weight (C, D) and maybe bias (C,)"
        )
    try:
        # By its descriptor: safetensors opens no path that is not UTF-8.
        with open(path, "rb") as opened, safe_open(f"/dev/fd/{opened.fileno()}", framework="pt") as file:
            metadata = file.metadata() or {}
            names = sorted(file.keys())
            tensors = {name: file.get_tensor(name).float() for name in names if name in ("weight", "bias")}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{flag} {path}: not a safetensors file ({str(error)[:160]}); write one with safetensors.torch.save_file"
        ) from None
    if "weight" not in tensors:
        raise UserError(f"{flag} {path}: holds no weight, but {', '.join(names) or 'nothing'}; expected weight (C, D)")
    weight, bias = tensors["weight"], tensors.get("bias")
    if weight.ndim != 2 or weight.shape[1] != embed_dim:
        raise UserError(
            f"{flag} {path}: weight is {tuple(weight.shape)}, the model embeds into {embed_dim} dimensions; expected "
            f"({num_classes}, {embed_dim}), a head trained on this model"
        )
    if len(weight) != num_classes:
        raise UserError(
            f"{flag} {path}: weight has {len(weight)} classes, the data set {num_classes}; give a head for these"
        )
    if bias is not None and bias.shape != (num_classes,):
        raise UserError(f"{flag} {path}: bias is {tuple(bias.shape)}, expected ({num_classes},), one value a class")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{flag} {path}: {name} is not finite; train the head again")
    normalise = metadata.get("normalise", "false")
    if normalise not in ("true", "false"):
        raise UserError(f"{flag} {path}: normalise is {normalise!r} in the metadata; expected 'true' or 'false'")
    return LinearClassifier(weight, bias, normalise=normalise == "true")


def own_linear_head(model: PreTrainedModel, num_classes: int) -> LinearClassifier:
    """The classifier that a model brings, of DINOv2 saved for image classification. Raises ``UserError``."""
    head = model.get_submodule("classifier") if has_own_head(model.config) else None
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"a {model.config.model_type} has neither a text tower nor a head of its own to tell classes apart; give it one "
            "with --linear_head"
        )
    if head.out_features != num_classes:
        raise UserError(
            f"the model's own head has {head.out_features} classes, the data set {num_classes}; give a head for "
            "these with --linear_head"
        )
    return LinearClassifier(head.weight.detach(), head.bias.detach())


def save_linear_head(path: str | Path, classifier: LinearClassifier) -> None:
    """Writes what ``read_linear_head`` reads; ``scale`` goes into W, so that logits may change in their last bits."""
    tensors = {"weight": classifier.scale * classifier.weight.float()}
    if classifier.bias is not None:
        tensors["bias"] = classifier.bias.float()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    aside = Path(path).with_suffix(".tmp")
    save_file(tensors, aside, metadata={"normalise": str(classifier.normalise).lower()})
    os.replace(aside, path)  # whole or not at all


def fit_linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, *, l2: float = CLIP_PROBE_L2, max_iter: int = 10_000
) -> LinearClassifier:
    """Multinomial logistic regression: min over W, b of sum_i -log p(y_i | x_i) + l2 / 2 ||W||^2, by L-BFGS.

    x are the features with mean 0 and standard deviation 1 in each dimension, so that one l2 does for encoders with
    short and with long embeddings; the result acts on the features as they are, the transform is inside W and b. The
    bias is not penalised. scikit-learn's LogisticRegression(C=1 / l2) on standardised features has the same optimum.

    Full batch in float64 from zero: the same features give the same head. The default l2 is that of CLIP's linear
    probe, C = 0.316 (Radford et al. 2021, arXiv 2103.00020, and the example in its README, which does not standardise).

    Args:
        features: image embeddings of training images, (N, D), any float dtype. Held in float64 on their device.
        labels: (N,) int64 in [0, num_classes). A class without images gets a bias that keeps it unlikely.
        l2: strength, > 0. max_iter: L-BFGS steps; it stops sooner where the gradient vanishes.

    Returns:
        a LinearClassifier on the device of ``features``, float32, with bias.
    """
    features, labels = _training_set(features, labels, num_classes)
    x = features.double()
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0)
    # A dimension that does not vary says nothing: divided by its rounding errors, it would.
    deviation = torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.inf)
    x = (x - mean) / deviation

    with torch.enable_grad():
        weight = x.new_zeros(num_classes, x.shape[1]).requires_grad_(True)
        bias = x.new_zeros(num_classes).requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=max_iter,
            max_eval=2 * max_iter,
            history_size=20,
            tolerance_grad=1e-9,
            tolerance_change=1e-15,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            penalty = l2 / 2 * weight.square().sum() / len(x)  # of the mean loss: tolerances do not depend on N
            loss = F.cross_entropy(x @ weight.T + bias, labels) + penalty
            loss.backward()
            return loss

        optimizer.step(closure)
    weight = weight.detach() / deviation
    return LinearClassifier(weight.float(), (bias.detach() - weight @ mean).float())


class KnnClassifier:
    """Weighted nearest neighbours: logit_c = log sum over the k nearest training images of class c of exp(cos / T).

    softmax(logits) are the shares of the votes. A class without a vote gets a logit that is finite, 69 below the
    nearest image's own vote. Source: Wu et al. 2018 (arXiv 1805.01978), as in DINO (Caron et al. 2021, arXiv
    2104.14294), k = 20 and T = 0.07. The gradient is that of the votes; which images are nearest has none.

    Args:
        features: embeddings of training images, (N, D), any float dtype; kept at unit length in float32.
        labels: (N,) int64 in [0, num_classes).
    """

    BLOCK = 64  # images compared at once: (64, N) similarities in memory
    FLOOR = 1e-30  # of a vote where the nearest image's is 1

    def __init__(
        self, features: Tensor, labels: Tensor, num_classes: int, k: int = 20, temperature: float = 0.07
    ) -> None:
        features, labels = _training_set(features, labels, num_classes)
        if not 1 <= k <= len(features):
            raise UserError(
                f"k = {k} nearest neighbours of {len(features)} training images; k may be 1 to {len(features)}"
            )
        self.features = F.normalize(features.float(), dim=-1)
        self.labels, self.num_classes, self.k, self.temperature = labels, num_classes, k, temperature

    def to(self, device: torch.device | str) -> KnnClassifier:
        moved = copy.copy(self)
        moved.features, moved.labels = self.features.to(device), self.labels.to(device)
        return moved

    def __call__(self, image_embeds: Tensor) -> Tensor:
        """(B, D), any float dtype -> (B, C), float32."""
        return torch.cat([self._logits(block) for block in image_embeds.float().split(self.BLOCK)])

    def _logits(self, image_embeds: Tensor) -> Tensor:
        count = len(image_embeds)
        # Filled up to a whole block: the last bit of a product depends on its shape, and with it which of two equally
        # near images is among the k. So the votes do not depend on the batch size.
        queries = unit(F.pad(image_embeds, (0, 0, 0, self.BLOCK - count)))
        nearest, places = (queries @ self.features.T).topk(self.k, dim=1)
        log_votes = nearest / self.temperature
        largest = log_votes[:, :1].detach()
        votes = log_votes.new_zeros(self.BLOCK, self.num_classes)
        votes = votes.scatter_add(1, self.labels[places], (log_votes - largest).exp())
        return (votes.clamp_min(self.FLOOR).log() + largest)[:count]


def _training_set(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Checked features and their labels, int64 on the same device. Raises ``UserError``."""
    features, labels = features.detach(), labels.to(features.device, torch.int64)
    if len(features) == 0:
        raise UserError("no training image to classify by; give a training split with readable images")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        odd = int(labels.max()) if int(labels.max()) >= num_classes else int(labels.min())
        raise UserError(
            f"label {odd} among the training images, of {num_classes} classes; correct the .cls files or classnames.txt"
        )
    damaged = int((~features.isfinite().all(dim=1)).sum())
    if damaged:
        raise UserError(f"{damaged} of {len(features)} training images have embeddings that are not finite")
    return features, labels
