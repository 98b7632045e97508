"""Classifiers of image embeddings: class texts or a linear head, a linear probe, nearest neighbours.

All are called alike, ``classifier(image_embeds)``: (B, D), any float dtype -> (B, C) float32, differentiable, so that
an attack sees through them. They sit on the device of their tensors until ``to(device)``.
"""

from __future__ import annotations

import copy
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
from utils.whole_files import whole_file

# scikit-learn's C = 0.316 of CLIP's linear probe weighs the losses, l2 = 1 / C the weights.
CLIP_PROBE_L2 = 1 / 0.316


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """logits = scale * f(z) W^T + b, f(z) = z / ||z|| where ``normalise``, else z.

    Zero-shot CLIP, to the bit: W = class_embeds, scale = exp(logit_scale), normalise.
    weight: W, (C, D), any float dtype, used in float32. bias: b, (C,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
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
    """A linear head from a safetensors file: ``weight`` (C, D), maybe ``bias`` (C,). Raises ``UserError``.

    The metadata may say normalise "true": the head was trained on embeddings of unit length.
    """

    def wrong(what: str) -> UserError:
        layout = f"weight ({num_classes}, {embed_dim}) and maybe bias ({num_classes},)"
        return UserError(f"{flag} {path}: {what}; expected a safetensors file of a head for this model: {layout}")

    if not Path(path).is_file():
        raise wrong("no such file")
    try:
        # By its descriptor: safetensors opens no path that is not UTF-8.
        with open(path, "rb") as opened, safe_open(f"/dev/fd/{opened.fileno()}", framework="pt") as file:
            normalise = (file.metadata() or {}).get("normalise", "false")
            names = sorted(file.keys())
            tensors = {name: file.get_tensor(name).float() for name in names if name in ("weight", "bias")}
    except (SafetensorError, OSError) as error:
        raise wrong(f"not a safetensors file ({str(error)[:160]})") from None
    if "weight" not in tensors:
        raise wrong(f"holds no weight, but {', '.join(names) or 'nothing'}")
    weight, bias = tensors["weight"], tensors.get("bias")
    if weight.ndim != 2 or weight.shape[1] != embed_dim:
        raise wrong(f"weight is {tuple(weight.shape)}, the model embeds into {embed_dim} dimensions")
    if len(weight) != num_classes:
        raise wrong(f"weight has {len(weight)} classes, the data set {num_classes}")
    if bias is not None and bias.shape != (num_classes,):
        raise wrong(f"bias is {tuple(bias.shape)}, expected ({num_classes},)")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise wrong(f"{name} is not finite")
    if normalise not in ("true", "false"):
        raise wrong(f"normalise is {normalise!r} in the metadata, not 'true' or 'false'")
    return LinearClassifier(weight, bias, normalise=normalise == "true")


def own_linear_head(model: PreTrainedModel, num_classes: int) -> LinearClassifier:
    """The classifier that a model brings, of DINOv2 saved for image classification. Raises ``UserError``."""
    head = model.get_submodule("classifier") if has_own_head(model.config) else None
    if not isinstance(head, nn.Linear):
        kind = model.config.model_type
        raise UserError(f"a {kind} has neither a text tower nor a head of its own; give it one with --linear_head")
    if head.out_features != num_classes:
        classes = f"{head.out_features} classes, the data set {num_classes}"
        raise UserError(f"the model's own head has {classes}; give one with --linear_head")
    return LinearClassifier(head.weight.detach(), head.bias.detach())


def save_linear_head(path: str | Path, classifier: LinearClassifier) -> None:
    """Writes what ``read_linear_head`` reads; ``scale`` goes into W, so that logits may change in their last bits."""
    tensors = {"weight": classifier.scale * classifier.weight.float()}
    if classifier.bias is not None:
        tensors["bias"] = classifier.bias.float()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with whole_file(Path(path)) as aside:
        save_file(tensors, aside, metadata={"normalise": str(classifier.normalise).lower()})


def fit_linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, *, l2: float = CLIP_PROBE_L2
) -> LinearClassifier:
    """Multinomial logistic regression: min over W, b of sum_i -log p(y_i | x_i) + l2 / 2 ||W||^2, by L-BFGS.

    x are the features standardised in each dimension, so that one l2 does for short and for long embeddings; that
    transform goes into the W and b returned, float32, on the device of ``features``. scikit-learn's
    LogisticRegression(C=1 / l2) on standardised features has the same optimum. Full batch in float64 from zero: the
    same features give the same head. The default l2 is that of CLIP's linear probe (Radford et al. 2021, arXiv
    2103.00020), which does not standardise.

    features: image embeddings (N, D), any float dtype. labels: (N,) int64 in [0, num_classes); a class without images
    gets a bias that keeps it unlikely.
    """
    features, labels = _training_set(features, labels, num_classes)
    x = features.double()
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0)
    # A dimension that does not vary gets the weight 0, not its rounding errors made large.
    deviation = torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.inf)
    x = (x - mean) / deviation

    with torch.enable_grad():
        weight = x.new_zeros(num_classes, x.shape[1]).requires_grad_(True)
        bias = x.new_zeros(num_classes).requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=10_000,
            max_eval=20_000,
            history_size=20,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-9,
            tolerance_change=1e-15,
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

    softmax(logits) are the shares of the votes; a class without a vote gets a finite logit, 69 below the nearest
    image's own vote. The gradient is that of the votes; the choice of neighbours has none. Source: Wu et al. 2018
    (arXiv 1805.01978), as in DINO (Caron et al. 2021, arXiv 2104.14294), k = 20 and T = 0.07.

    features: (N, D), any float dtype; kept at unit length in float32. labels: (N,) int64 in [0, num_classes).
    """

    BLOCK = 64  # images compared at once: (64, N) similarities in memory
    FLOOR = 1e-30  # of a vote where the nearest image's is 1

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
        # Filled up to a whole block: the last bits of a product depend on its shape, and they decide which of two
        # equally near images is among the k. The votes shall not depend on the batch size.
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
    for label in (int(labels.max()), int(labels.min())):
        if not 0 <= label < num_classes:
            what = f"label {label} among the training images, of {num_classes} classes"
            raise UserError(f"{what}; correct the .cls files or classnames.txt")
    damaged = int((~features.isfinite().all(dim=1)).sum())
    if damaged:
        raise UserError(f"{damaged} of {len(features)} training images have embeddings that are not finite")
    return features, labels
