"""Layers of a transformer that compute what transformers' own do, in less memory and time. They share its parameters.

Each was measured before and after (docs/performance.md). None changes a result by more than the rounding of its precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.activations import QuickGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = (
    "lean"  # the name of ``attention`` in transformers' table; one with "flash" in it would mean another package
)


def use_lean_layers(tower: nn.Module) -> None:
    """Replaces the classes of a transformer's layers by those below, in place: same parameters, same names.

    The patch embedding, the activations, and of the layer norms those inside of blocks: what the others return is added to
    in float32, or is an embedding.
    """
    for module in tower.modules():
        if type(module) is nn.Conv2d:  # the only convolution of a ViT
            module.__class__ = Float32PatchEmbedding
        elif type(module) is QuickGELUActivation:
            module.__class__ = QuickGELU
        elif isinstance(module, nn.ModuleList):
            for layer in module.modules():
                if type(layer) is nn.LayerNorm:
                    layer.__class__ = RoundedLayerNorm


class Float32PatchEmbedding(nn.Conv2d):
    """The patch embedding, which autocast leaves in float32: conv(x), (B, 3, H, W) -> (B, D, H/P, W/P), float32.

    On a CPU as one product of the patches with the weights, which it is: oneDNN takes more than twice as long for the
    convolution's gradient to the pixels, 14 % of an attack on ViT-B/32. On a GPU TF32 must be off for convolutions: see
    utils/distributed.py, which may turn it on for products.
    """

    def forward(self, pixel_values: Tensor) -> Tensor:
        with torch.autocast(pixel_values.device.type, enabled=False):
            pixel_values = pixel_values.float()
            if (
                pixel_values.device.type != "cpu"
                or self.stride != self.kernel_size
                or self.padding not in ((0, 0), "valid")
            ):
                return super().forward(pixel_values)
            (height, width), rows, columns = self.stride, *(n // p for n, p in zip(pixel_values.shape[2:], self.stride))
            patches = pixel_values[:, :, : rows * height, : columns * width]
            patches = patches.unflatten(2, (rows, height)).unflatten(4, (columns, width))
            patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, patches, 3 * P * P)
            return F.linear(patches, self.weight.flatten(1), self.bias).transpose(1, 2).unflatten(2, (rows, columns))


class RoundedLayerNorm(nn.LayerNorm):
    """Layer norm in float32, rounded to autocast's precision once. (..., D) -> (..., D).

    Autocast would round the same output for the query, for the key and for the value, and keep all three copies.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        normalised = super().forward(hidden_states)
        device = hidden_states.device.type
        return normalised.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else normalised


class QuickGELU(QuickGELUActivation):
    """x * sigmoid(1.702 x) = silu(1.702 x) / 1.702, elementwise. Keeps one tensor for the backward pass and not two."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(1.702 * input) * (1 / 1.702)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling * Q K^T) V, (B, heads, T, d) each -> (B, T, heads, d). torch's flash attention but for bfloat16 on a CPU.

    There it takes about five times as long, backward included, as the two products and the softmax written out, which
    keep the weights (B, heads, T, T) for the backward pass.
    """
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or attention_mask is not None or dropout:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    weights = ((query * scaling) @ key.transpose(-1, -2)).softmax(dim=-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention)
