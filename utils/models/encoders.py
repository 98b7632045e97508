"""Encoders: pixels in [0,1] to un-normalised image embeddings, and token ids to text embeddings, in lean layers.

The embedding is the image tower's pooled output, after the projection if there is one. For dinov2 it is the class
token, with the mean of the patches appended if the model has a linear head. ``published`` lists the supported types.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, Dinov2ForImageClassification, PreTrainedModel
from transformers.activations import QuickGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.convnext.modeling_convnext import ConvNextLayer
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings
from transformers.models.vit.modeling_vit import ViTModel

from utils.data.images import pixel_normalisation
from utils.errors import UserError
from utils.models.published import ModelName, image_size, image_tower, load_model
from utils.models.tokens import is_bert

ATTENTION = "lean"  # key of ``attention`` in transformers' table; "flash" in the name would select another package


class ImageEncoder(nn.Module):
    """phi: a model's image tower and its projection, if it has one, including the normalisation of pixels.

    The blocks run in ``compute_dtype``. Pixels and patch embedding stay in float32: bfloat16 would round an attack's
    steps away. Autocast is entered here, so that attack, reference and trained encoder compute alike, wrapped or not.
    mean_of_patches: the embedding is [class token; mean of the patch tokens], the input of DINOv2's linear heads.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        vision_model: PreTrainedModel,
        visual_projection: nn.Linear | None,
        image_size: int,
        image_mean: list[float],
        image_std: list[float],
        compute_dtype: torch.dtype = torch.float32,
        mean_of_patches: bool = False,
    ) -> None:
        super().__init__()
        config = vision_model.config
        self.vision_model, self.visual_projection = vision_model, visual_projection
        self.image_size, self.compute_dtype, self.mean_of_patches = image_size, compute_dtype, mean_of_patches
        tokens = 2 if mean_of_patches else 1
        self.embed_dim = tokens * config.hidden_size if visual_projection is None else visual_projection.out_features
        self.register_buffer("image_mean", torch.tensor(image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(1, 3, 1, 1), persistent=False)
        use_lean_layers(vision_model)
        if config.model_type != "convnext":  # ConvNeXt has no attention
            config._attn_implementation = ATTENTION
        # SigLIP 2's tower expects the positions of the patches; the embeddings used here do not need them.
        siglip2 = config.model_type == "siglip2_vision_model"
        self._arguments = {"pixel_attention_mask": None, "spatial_shapes": None} if siglip2 else {}

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) float32 in [0,1] -> image_embeds (B, D), float32, not normalised to unit length."""
        normalised = (pixel_values - self.image_mean) / self.image_std
        autocast = self.compute_dtype != torch.float32
        with torch.autocast(pixel_values.device.type, dtype=self.compute_dtype, enabled=autocast):
            output = self.vision_model(normalised, **self._arguments)
            if self.mean_of_patches:
                tokens = output.last_hidden_state
                return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1).float()
            pooled = output.pooler_output
            return (pooled if self.visual_projection is None else self.visual_projection(pooled)).float()


class TextEncoder(nn.Module):
    """A contrastive model's text tower and its projection, if it has one."""

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.text_model = model.get_submodule("text_model")
        self.text_projection: nn.Module | None = getattr(model, "text_projection", None)
        if not is_bert(model.config):  # its layer norms end the blocks: rounded, the sum over blocks would be, too
            use_lean_layers(self.text_model)
        self.compute_dtype = compute_dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(..., L) int64, and a mask of that shape, 0 for hidden tokens -> (..., D), float32, not of unit length."""
        autocast = self.compute_dtype != torch.float32
        mask = None if attention_mask is None else attention_mask.flatten(0, -2)
        with torch.autocast(input_ids.device.type, dtype=self.compute_dtype, enabled=autocast):
            pooled = self.text_model(input_ids=input_ids.flatten(0, -2), attention_mask=mask).pooler_output
            embeds = pooled if self.text_projection is None else self.text_projection(pooled)
            return embeds.float().unflatten(0, input_ids.shape[:-1])


def make_encoder(model: PreTrainedModel, processor: Any, compute_dtype: torch.dtype = torch.float32) -> ImageEncoder:
    """The image encoder inside ``model``, with the processor's mean and standard deviation."""
    tower, projection = image_tower(model)
    mask_token = getattr(getattr(tower, "embeddings", None), "mask_token", None)
    if mask_token is not None:
        mask_token.requires_grad_(False)  # no forward pass here uses it, and DDP would wait for its gradient
    mean, std = pixel_normalisation(getattr(processor, "image_processor", processor))
    with_patches = isinstance(model, Dinov2ForImageClassification)
    return ImageEncoder(tower, projection, image_size(processor), mean, std, compute_dtype, with_patches)


def enable_gradient_checkpointing(encoder: ImageEncoder) -> None:
    """Recomputes activations in the backward pass, in train mode only. Non-reentrant, because of autograd.grad."""
    tower = encoder.vision_model
    if tower.config.model_type == "convnext":  # transformers has no checkpointing for it
        for module in tower.modules():
            if type(module) is ConvNextLayer:
                module.__class__ = RecomputedConvNextLayer
    else:
        enable = getattr(tower, "activation_checkpointing_enable", tower.gradient_checkpointing_enable)  # the old name
        enable({"use_reentrant": False})


def frozen_copy(encoder: ImageEncoder) -> ImageEncoder:
    return copy.deepcopy(encoder).eval().requires_grad_(False)


def load_reference(
    name_or_path: str | ModelName | None, encoder: ImageEncoder
) -> tuple[ImageEncoder, PreTrainedModel | None]:
    """phi0, frozen, and its whole model: --reference_model_name_or_path's, or else a copy of ``encoder`` and None."""
    if name_or_path is None:
        return frozen_copy(encoder), None
    model, processor = load_model(name_or_path, "--reference_model_name_or_path")
    reference = make_encoder(model, processor, encoder.compute_dtype)
    if (reference.embed_dim, reference.image_size) != (encoder.embed_dim, encoder.image_size):
        raise UserError(
            f"--reference_model_name_or_path {name_or_path}: embeds {reference.image_size} px into "
            f"{reference.embed_dim} dimensions, the encoder {encoder.image_size} px into {encoder.embed_dim}; "
            "name a model of the encoder's kind, and give both the same size by --image_size"
        )
    return frozen_copy(reference), model


def check_reference_dtype(name: str, compute_dtype: torch.dtype) -> None:
    """Raises ``UserError`` if --reference_dtype bfloat16 would change the reference's embeddings."""
    if name == "bfloat16" and compute_dtype != torch.bfloat16:
        raise UserError(
            f"--reference_dtype bfloat16: the transformer blocks run in {str(compute_dtype).removeprefix('torch.')}, "
            "so the reference would embed unlike the encoder; set mixed_precision: bf16, or leave it at float32"
        )


def keep_weights_in(name: str, reference: ImageEncoder) -> ImageEncoder:
    """With ``bfloat16``, stores the blocks' linear layers so, in place. The embeddings stay: autocast rounds anyway."""
    if name == "bfloat16":
        blocks = [module for module in reference.vision_model.modules() if isinstance(module, nn.ModuleList)]
        for linear in {part for block in blocks for part in block.modules() if isinstance(part, nn.Linear)}:
            for name, parameter in list(linear.named_parameters()):
                setattr(linear, name, nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False))
    return reference


# Layers that do the same as transformers' own, with the same parameters, in less memory and time. Each was measured
# (docs/performance.md) and changes results only by the rounding of its precision.


def use_lean_layers(tower: nn.Module) -> None:
    """Replaces the classes of a tower's layers by those below, in place. Norms outside the blocks stay."""
    for module in tower.modules():
        of_pixels = type(module) is nn.Conv2d and module.in_channels == 3 and module.padding in ((0, 0), "valid")
        if of_pixels and module.stride == module.kernel_size:
            module.__class__ = Float32PatchEmbedding
        elif type(module) is Siglip2VisionEmbeddings:
            module.__class__, module.patch_embedding.__class__ = SquareImageEmbeddings, Float32PatchProduct
        elif type(module) is ViTModel:
            module.__class__ = LeanViT
        elif type(module) is nn.MultiheadAttention:
            module.__class__ = PoolingAttention
        elif type(module) is QuickGELUActivation:
            module.__class__ = QuickGELU
        elif isinstance(module, nn.ModuleList):
            for layer in module.modules():
                if type(layer) is nn.LayerNorm:
                    layer.__class__ = RoundedLayerNorm


class LeanViT(ViTModel):
    """Does not look at the patch embedding's dtype, as ViTModel does at the start of a forward pass.

    Under ZeRO-3 no weight is there outside its own layer. DeepSpeed would gather it for the question, take it for one
    of this module's weights, and then miss it in the order of layers that it recorded: "tracing error".
    """

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        hidden = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden = layer(hidden, None)
        tokens = self.layernorm(hidden)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=None if self.pooler is None else self.pooler(tokens)
        )


def embed_patches(pixel_values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The patch embedding, always in float32: (B, 3, H, W), (D, 3, P, P) -> (B, D, H/P, W/P).

    On a CPU it is one matrix product: oneDNN takes twice as long for the convolution's gradient to the pixels. On a GPU
    TF32 must be off for convolutions: see utils/processes/distributed.py.
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
    """The patch embedding in float32 even under autocast: conv(x), (B, 3, H, W) -> (B, D, H/P, W/P), float32."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return embed_patches(pixel_values, self.weight, self.bias)


class Float32PatchProduct(nn.Linear):
    """SigLIP 2's patch embedding, float32: (B, 3, H, W) -> (B, D, H/P, W/P). Rows of the weight are P x P x 3."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        patch = math.isqrt(self.in_features // 3)
        weight = self.weight.unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
        return embed_patches(pixel_values, weight, self.bias)


class SquareImageEmbeddings(Siglip2VisionEmbeddings):
    """SigLIP 2's embeddings of images of one size: (B, 3, H, W) -> (B, patches, D), float32. Resizes positions once."""

    def forward(self, pixel_values: Tensor, spatial_shapes: Tensor | None = None) -> Tensor:
        patches, size = self.patch_embedding(pixel_values), self.position_embedding_size
        # Call the module, do not read its weight: ZeRO-3 gathers parameters when a module is called.
        positions = self.position_embedding(torch.arange(size * size, device=pixel_values.device)).float()
        positions = positions.unflatten(0, (size, size)).permute(2, 0, 1)[None]
        shape = patches.shape[2:]
        if shape != positions.shape[2:]:
            positions = F.interpolate(positions, size=shape, mode="bilinear", align_corners=False, antialias=True)
        return (patches + positions).flatten(2).transpose(1, 2)


class PoolingAttention(nn.MultiheadAttention):
    """SigLIP's pooling: (B, Q, D), (B, T, D) twice -> (B, Q, D). Calls out_proj, unlike torch's: ZeRO-3 needs it."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        parts = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        query, key, value = (F.linear(*part).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        pooled, _ = attention(self, query, key, value, attn_mask, scaling=self.head_dim**-0.5, is_causal=False)
        return self.out_proj(pooled.flatten(2)), None


class RecomputedConvNextLayer(ConvNextLayer):
    """A ConvNeXt block that in train mode keeps only its input for the backward pass. (B, C, H, W) -> the same."""

    def forward(self, features: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            return checkpoint(super().forward, features, use_reentrant=False)
        return super().forward(features)


class RoundedLayerNorm(nn.LayerNorm):
    """Layer norm in float32, rounded once: autocast would keep copies for query, key and value. (..., D) -> same."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        normalised = super().forward(hidden_states)
        device = hidden_states.device.type
        return normalised.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else normalised


class QuickGELU(QuickGELUActivation):
    """x * sigmoid(1.702 x) = silu(1.702 x) / 1.702, elementwise. Keeps one tensor for the backward pass, not two."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(1.702 * input) * (1 / 1.702)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """softmax(scaling * Q K^T) V, (B, heads, T, d) each -> (B, T, heads, d); ``scaling`` is 1 / sqrt(d) by default.

    Uses torch's flash attention, except for bfloat16 on a CPU: there two explicit products are five times as fast.
    """
    plain = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if not plain or attention_mask is not None or options.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    weights = ((query * scaling) @ key.transpose(-1, -2)).softmax(dim=-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention)
