"""Layers of a transformer that compute what transformers' own do, in less memory and time. They share its parameters.

Each was measured before and after (docs/performance.md). None changes a result by more than the rounding of its precision.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.activations import QuickGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.convnext.modeling_convnext import ConvNextLayer
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

ATTENTION = (
    "lean"  # the name of ``attention`` in transformers' table; one with "flash" in it would mean another package
)


def use_lean_layers(tower: nn.Module) -> None:
    """Replaces the classes of a tower's layers by those below, in place: same parameters, same names.

    The patch embedding (of a ConvNeXt its stem, not its other convolutions), the activations, and of the layer norms those
    inside of blocks: what the others return is added to in float32, or is an embedding.
    """
    for module in tower.modules():
        if type(module) is nn.Conv2d and module.in_channels == 3 and module.stride == module.kernel_size:
            module.__class__ = Float32PatchEmbedding
        elif type(module) is Siglip2VisionEmbeddings:
            module.__class__, module.patch_embedding.__class__ = SquareImageEmbeddings, Float32PatchProduct
        elif type(module) is nn.MultiheadAttention:
            module.__class__ = PoolingAttention
        elif type(module) is QuickGELUActivation:
            module.__class__ = QuickGELU
        elif isinstance(module, nn.ModuleList):
            for layer in module.modules():
                if type(layer) is nn.LayerNorm:
                    layer.__class__ = RoundedLayerNorm


def embed_patches(pixel_values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Non-overlapping patches times weights, float32 under autocast too: (B, 3, H, W), (D, 3, P, P) -> (B, D, H/P, W/P).

    On a CPU as one product of the patches with the weights, which it is: oneDNN takes more than twice as long for the
    convolution's gradient to the pixels, 14 % of an attack on ViT-B/32. On a GPU TF32 must be off for convolutions: see
    utils/processes/distributed.py, which may turn it on for products.
    """
    with torch.autocast(pixel_values.device.type, enabled=False):
        pixel_values = pixel_values.float()
        height, width = weight.shape[2:]
        if pixel_values.device.type != "cpu":
            return F.conv2d(pixel_values, weight, bias, stride=(height, width))
        rows, columns = pixel_values.shape[2] // height, pixel_values.shape[3] // width
        patches = pixel_values[:, :, : rows * height, : columns * width]
        patches = patches.unflatten(2, (rows, height)).unflatten(4, (columns, width))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, patches, 3 * P * P)
        return F.linear(patches, weight.flatten(1), bias).transpose(1, 2).unflatten(2, (rows, columns))


class Float32PatchEmbedding(nn.Conv2d):
    """The patch embedding, which autocast leaves in float32: conv(x), (B, 3, H, W) -> (B, D, H/P, W/P), float32."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        if self.stride == self.kernel_size and self.padding in ((0, 0), "valid"):
            return embed_patches(pixel_values, self.weight, self.bias)
        with torch.autocast(pixel_values.device.type, enabled=False):
            return super().forward(pixel_values.float())


class Float32PatchProduct(nn.Linear):
    """SigLIP 2's patch embedding, float32: (B, 3, H, W) -> (B, D, H/P, W/P). A patch is P x P x 3 in its weights (D, 3 P P)."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        patch = math.isqrt(self.in_features // 3)
        weight = self.weight.unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
        return embed_patches(pixel_values, weight, self.bias)


class SquareImageEmbeddings(Siglip2VisionEmbeddings):
    """SigLIP 2's embeddings ("NaFlex"), of images of one size: (B, 3, H, W), normalised -> (B, patches, D), float32.

    transformers takes lists of patches and resizes the position embeddings once for every image; here they are resized once
    for the batch.
    """

    def forward(self, pixel_values: Tensor, spatial_shapes: Tensor | None = None) -> Tensor:
        patches, size = self.patch_embedding(pixel_values), self.position_embedding_size
        # By a call of the module, not by its weight: ZeRO-3 gathers what is called.
        positions = self.position_embedding(torch.arange(size * size, device=pixel_values.device)).float()
        positions = positions.unflatten(0, (size, size)).permute(2, 0, 1)[None]
        if patches.shape[2:] != positions.shape[2:]:
            positions = F.interpolate(
                positions, size=patches.shape[2:], mode="bilinear", align_corners=False, antialias=True
            )
        return (patches + positions).flatten(2).transpose(1, 2)


class PoolingAttention(nn.MultiheadAttention):
    """The attention of SigLIP's pooling, batch first: (B, Q, D), (B, T, D) twice -> (B, Q, D), and no weights.

    torch's own reads the weights of its output projection without calling it, which ZeRO-3 does not gather in time. What
    else torch's takes, SigLIP does not give.
    """

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        parts = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        query, key, value = (F.linear(*part).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        pooled, _ = attention(self, query, key, value, attn_mask, scaling=self.head_dim**-0.5, is_causal=False)
        return self.out_proj(pooled.flatten(2)), None


class RecomputedConvNextLayer(ConvNextLayer):
    """A block of ConvNeXt that keeps its input alone for the backward pass, in train mode. (B, C, H, W) -> the same."""

    def forward(self, features: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            return checkpoint(super().forward, features, use_reentrant=False)
        return super().forward(features)


def recompute_convnext_layers(tower: nn.Module) -> None:
    """Gradient checkpointing for a ConvNeXt, in place."""
    for module in tower.modules():
        if type(module) is ConvNextLayer:
            module.__class__ = RecomputedConvNextLayer


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
    keep the weights (B, heads, T, T) for the backward pass. ``scaling`` None: 1 / sqrt(d).
    """
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or attention_mask is not None or dropout:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights = ((query * scaling) @ key.transpose(-1, -2)).softmax(dim=-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention)
