"""The head: one square matrix W for both image and text embeddings, and the strength t with which it acts.

The similarity of the trained model is cos(W I, W T), which depends on W^T W alone. With W = U S V^T,

    W_t = U S^t V^T

is the trained head at t = 1. At t = 0 it is a rotation and every similarity equals the original's. Values in between
interpolate, and t < 0 inverts what was learnt. Folding W_t into the two projections of a ``CLIPModel`` gives a plain
model with these similarities. Source: Afzali, Khodabandeh et al. (arXiv 2411.08923), section on controlling concepts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedModel

from utils.errors import UserError

HEAD_FILE = "head.safetensors"
PROJECTIONS = ("visual_projection", "text_projection")
SMALLEST_SINGULAR_VALUE = 1e-4  # relative to the largest; smaller ones would explode at t < 0
LARGEST_CONDITION_NUMBER = 1e3


class Head(nn.Module):
    """e -> W e for embeddings (..., D), float32. Starts as the identity."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.weight = nn.Parameter(torch.eye(embed_dim))

    def forward(self, embeds: Tensor) -> Tensor:
        return embeds @ self.weight.T


def orthogonality_penalty(weight: Tensor) -> Tensor:
    """||W^T W - I||_F^2, (D, D) -> scalar; 0 if the head changes no similarity."""
    return (weight.T @ weight - torch.eye(len(weight), dtype=weight.dtype, device=weight.device)).square().sum()


def head_powers(weight: Tensor, ts: Sequence[float]) -> list[Tensor]:
    """W_t = U S^t V^T for every t: (D, D) -> (D, D) each, computed in float64, returned in the dtype of ``weight``.

    Singular values below 1e-4 of the largest are raised to 1e-4 of it. Raises ValueError if W is zero or not finite.
    """
    if not (weight.isfinite().all() and weight.any()):
        raise ValueError("the head is zero or not finite")
    left, values, right = torch.linalg.svd(weight.double())
    values = values.clamp_min(SMALLEST_SINGULAR_VALUE * float(values[0]))
    return [((left * values.pow(t)) @ right).to(weight.dtype) for t in ts]


def head_power(weight: Tensor, t: float) -> Tensor:
    """W_t for one t; see ``head_powers``."""
    return head_powers(weight, [t])[0]


def neutral_t(
    ts: Sequence[float], pair_accuracies: Sequence[float], task_accuracies: Sequence[float], tolerance: float
) -> float:
    """t*: the t at which the accuracy on pairs is nearest to chance, 1/2, while the task accuracy is kept.

    Kept means at most ``tolerance`` below the task accuracy at t = 0, which must be among ``ts``. Ties go to the t
    nearest to 0. Choose t* on validation data and report it on other data.
    """
    least = task_accuracies[list(ts).index(0)] - tolerance
    found = zip(ts, pair_accuracies, task_accuracies)
    return min((abs(pair - 0.5), abs(t), t) for t, pair, task in found if task >= least)[2]


def warn_of_condition(weight: Tensor) -> str | None:
    """A warning if the condition number of a head (D, D), largest over smallest singular value, is high; else None."""
    number = float(torch.linalg.cond(weight.double()))
    if number <= LARGEST_CONDITION_NUMBER:
        return None
    above = f"{number:.3g} (more than {LARGEST_CONDITION_NUMBER:g})"
    advice = "t below 0 blows its weak directions up; add --orthogonality_weight, or train less"
    return f"the head's condition number is {above}: {advice}"


@torch.no_grad()
def fold_head(clip: CLIPModel, weight: Tensor) -> None:
    """Multiplies both projections P by ``weight`` (D, D) in place, in float64: W (P x) = (W P) x for every input x."""
    for name in PROJECTIONS:
        projection = clip.get_parameter(f"{name}.weight")
        projection.copy_(weight.double().to(projection.device) @ projection.double())


def save_head(directory: str | Path, weight: Tensor, clip: CLIPModel) -> None:
    """Writes W and the two projections as they were before folding, so that t can be changed later."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    tensors = {"weight": weight.detach().float()} | _projections(clip)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, Path(directory) / HEAD_FILE)


def load_head(directory: str | Path, flag: str = "--model") -> dict[str, Tensor]:
    """Reads what ``save_head`` wrote. Raises ``UserError`` if the directory holds no valid head."""
    where, expected = f"{flag} {directory}", "expected the output_dir of train_po.py --trainable head"
    try:
        head = load_file(Path(directory) / HEAD_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{where}: no readable {HEAD_FILE} ({str(error)[:160]}); {expected}") from None
    # All three map to the same space: (D, D), (D, hidden), (D, hidden).
    shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
    found = [shapes.get(name, ()) for name in ("weight", *PROJECTIONS)]
    if not all(len(shape) == 2 and shape[0] == found[0][1] for shape in found):
        raise UserError(f"{where}: {HEAD_FILE} holds {str(shapes)[:160]}; {expected}")
    if not all(head[name].is_floating_point() and head[name].isfinite().all() for name in ("weight", *PROJECTIONS)):
        raise UserError(f"{where}: {HEAD_FILE} holds what is not finite; {expected}")
    if not head["weight"].any():
        raise UserError(f"{where}: the head of {HEAD_FILE} is zero; {expected}")
    return head


def _projections(clip: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of the model's two projections."""
    return {name: clip.get_parameter(f"{name}.weight").detach().clone() for name in PROJECTIONS}


@torch.no_grad()
def _set_projections(clip: PreTrainedModel, projections: dict[str, Tensor]) -> None:
    """Sets both projections. Raises ``UserError`` for those of another model, before any is set."""
    weights = {name: clip.get_parameter(f"{name}.weight") for name in PROJECTIONS}
    for name, weight in weights.items():
        found, needed = tuple(projections[name].shape), tuple(weight.shape)
        if found != needed:
            raise UserError(f"{HEAD_FILE}: {name} is {found}, the model's {needed}; give the head of this model")
    for name, weight in weights.items():
        weight.copy_(projections[name])


@contextmanager
def unfolded(clip: PreTrainedModel, head: dict[str, Tensor]) -> Iterator[None]:
    """Inside the block the model has its projections without the head. Raises UserError for another model's head."""
    kept = _projections(clip)
    _set_projections(clip, head)
    try:
        yield
    finally:
        _set_projections(clip, kept)


def set_head_t(clip: CLIPModel, head: dict[str, Tensor], t: float) -> None:
    """Sets the strength ``t`` of a model that was exported with a head, whatever t it had before."""
    _set_projections(clip, head)
    fold_head(clip, head_power(head["weight"], t))
