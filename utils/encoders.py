"""Encoders: pixels in [0,1] to un-normalised image embeddings, and back to what ``from_pretrained`` loads."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Model,
    PreTrainedConfig,
)
from transformers.utils import logging as transformers_logging

from utils.cli import UserError
from utils.images import ImageTransform
from utils.layers import ATTENTION, use_lean_layers
from utils.shard_sources import BRING_IT

SUPPORTED_MODEL_TYPES = ("clip",)
VISION_MODEL_TYPES = ("clip_vision_model", "dinov2")  # without a text tower: evaluated, not trained


class ImageEncoder(nn.Module):
    """phi: an image tower and its projection, if it has one, with the normalisation of pixels inside.

    Of a ``CLIPModel`` (``make_encoder``), of the image half of one, or of DINOv2, whose class token after the final layer
    norm is the embedding. The modules are the model's own, not copies: training this trains the model it was made from.
    Pixels, normalisation and the patch embedding stay in float32, the transformer blocks run under autocast in
    ``compute_dtype``: a normalised pixel near 2 would be rounded to steps of 1/64 by bfloat16, and an attack with
    steps of 1/1020 would vanish in that. Autocast is entered here, not by the training engine, so that the attack, the
    reference and the trained encoder all see the same arithmetic, wrapped or not.
    """

    def __init__(
        self,
        vision_model: nn.Module,
        visual_projection: nn.Linear | None,
        image_size: int,
        image_mean: list[float],
        image_std: list[float],
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.vision_model = vision_model
        self.visual_projection = visual_projection
        self.compute_dtype = compute_dtype
        self.embed_dim = (
            vision_model.config.hidden_size if visual_projection is None else visual_projection.out_features
        )
        self.image_size = image_size
        self.register_buffer("image_mean", torch.tensor(image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(1, 3, 1, 1), persistent=False)
        use_lean_layers(vision_model)
        vision_model.config._attn_implementation = ATTENTION

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) float32 in [0,1] -> image_embeds (B, D), float32, not normalised to unit length."""
        normalised = (pixel_values - self.image_mean) / self.image_std
        autocast = self.compute_dtype != torch.float32
        with torch.autocast(pixel_values.device.type, dtype=self.compute_dtype, enabled=autocast):
            pooled = self.vision_model(normalised).pooler_output
            return (pooled if self.visual_projection is None else self.visual_projection(pooled)).float()


class TextEncoder(nn.Module):
    """The text tower and projection of a ``CLIPModel``: token ids to un-normalised text embeddings.

    The modules are the ``CLIPModel``'s own. No attention mask: attention is causal and padding comes after the end of
    text, which is what is pooled.
    """

    def __init__(self, clip: CLIPModel, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        use_lean_layers(clip.text_model)
        self.text_model = clip.text_model
        self.text_projection = clip.text_projection
        self.compute_dtype = compute_dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        """(..., L) int64 -> (..., D), float32."""
        autocast = self.compute_dtype != torch.float32
        with torch.autocast(input_ids.device.type, dtype=self.compute_dtype, enabled=autocast):
            pooled = self.text_model(input_ids=input_ids.flatten(0, -2)).pooler_output
            return self.text_projection(pooled).float().unflatten(0, input_ids.shape[:-1])


def check_model(name_or_path: str, flag: str, supported: Sequence[str] = SUPPORTED_MODEL_TYPES) -> PreTrainedConfig:
    """The model's config, read before any weights are: raises ``UserError`` where there is none, or of another type."""
    path = Path(name_or_path)
    if path.exists() and not (path / "config.json").exists():
        raise UserError(f"{flag} {name_or_path}: holds no config.json; expected a directory saved by save_pretrained")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:
        # OSError and ValueError; TypeError, AttributeError, RecursionError and others where config.json is not as it should.
        raise UserError(
            f"{flag} {name_or_path}: neither a local model directory nor a model that the Hugging Face hub gave "
            f"({_first_line(error)[:160]}); check the name; without internet {BRING_IT}"
        ) from None
    if config.model_type not in supported:
        raise UserError(f"{flag} {name_or_path}: model type {config.model_type!r}; supported: {', '.join(supported)}")
    return config


def load_clip(name_or_path: str, flag: str = "--model_name_or_path") -> tuple[CLIPModel, CLIPProcessor]:
    """The whole float32 ``CLIPModel`` and its processor. Never partitioned, also where DeepSpeed's ZeRO-3 is on."""
    check_model(name_or_path, flag)
    try:
        with unpartitioned(), quiet_transformers():
            clip = CLIPModel.from_pretrained(name_or_path, dtype=torch.float32, trust_remote_code=False)
            processor = CLIPProcessor.from_pretrained(name_or_path, trust_remote_code=False)
    except (
        Exception
    ) as error:  # of transformers, tokenizers, safetensors and torch, depending on the file that is wrong
        raise UserError(f"{flag} {name_or_path}: the model does not load: {_first_line(error)}") from None
    return clip, processor


def load_vision_model(
    name_or_path: str, flag: str = "--model", compute_dtype: torch.dtype = torch.float32
) -> tuple[ImageEncoder, Any]:
    """The encoder of a model of ``VISION_MODEL_TYPES`` in eval mode, its weights float32, and its image processor.

    A CLIP vision model saved without projection embeds into its hidden size. Raises ``UserError`` for another type of
    model, for weights that are missing and for images of another size than the model takes.
    """
    config = check_model(name_or_path, flag, VISION_MODEL_TYPES)
    try:
        with unpartitioned(), quiet_transformers():
            image_processor = _load_image_processor(name_or_path)
            if config.model_type == "dinov2":
                vision_model, missing = _load_pretrained(Dinov2Model, name_or_path)
                projection = None
            else:
                model, missing = _load_pretrained(CLIPVisionModelWithProjection, name_or_path)
                vision_model, projection = model.vision_model, model.visual_projection
                if "visual_projection.weight" in missing:
                    vision_model, missing = _load_pretrained(CLIPVisionModel, name_or_path)
                    projection = None
    except Exception as error:  # see ``load_clip``
        raise UserError(f"{flag} {name_or_path}: the model does not load: {_first_line(error)}") from None
    missing = sorted(missing - {"embeddings.mask_token"})  # that one is for pre-training
    if missing:
        raise UserError(
            f"{flag} {name_or_path}: {len(missing)} weights of a {config.model_type} are missing, the first is "
            f"{missing[0]}; expected a directory saved by save_pretrained"
        )
    size = ImageTransform.from_processor(image_processor).output_size
    if size is None or size[0] != size[1]:
        raise UserError(f"{flag} {name_or_path}: its image processor gives no square images; set its crop_size")
    # DINOv2 interpolates its position embeddings, CLIP does not.
    if config.model_type == "clip_vision_model" and size[0] != config.image_size:
        raise UserError(
            f"{flag} {name_or_path}: its image processor gives {size[0]} px, the model takes {config.image_size} px; "
            "correct crop_size in preprocessor_config.json"
        )
    mean, std = image_processor.image_mean, image_processor.image_std
    return ImageEncoder(vision_model, projection, size[0], mean, std, compute_dtype).eval(), image_processor


def _first_line(error: Exception) -> str:
    """The beginning of an error's text, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _load_pretrained(model_class: type, name_or_path: str) -> tuple[Any, set[str]]:
    """A float32 model and the names of its weights that the file lacks: they are drawn at random."""
    model, found = model_class.from_pretrained(
        name_or_path, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    return model, set(found["missing_keys"])


def _load_image_processor(name_or_path: str) -> Any:
    """The processor that preprocessor_config.json describes, by Pillow: nothing here needs torchvision."""
    try:
        return AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False, backend="pil")
    except ImportError:
        # Older transformers choose a class only beside torchvision. DINOv2's processor is CLIP's by another name.
        return CLIPImageProcessorPil.from_pretrained(name_or_path, trust_remote_code=False)


def make_encoder(clip: CLIPModel, processor: CLIPProcessor, compute_dtype: torch.dtype = torch.float32) -> ImageEncoder:
    """The image encoder inside ``clip``, normalising as its processor says."""
    image_processor = processor.image_processor
    return ImageEncoder(
        clip.vision_model,
        clip.visual_projection,
        clip.config.vision_config.image_size,
        image_processor.image_mean,
        image_processor.image_std,
        compute_dtype,
    )


def frozen_copy(encoder: ImageEncoder) -> ImageEncoder:
    """phi0: a copy in eval mode whose parameters require no gradient."""
    return copy.deepcopy(encoder).eval().requires_grad_(False)


def load_reference(name_or_path: str | None, encoder: ImageEncoder) -> ImageEncoder:
    """phi0: a frozen copy of ``encoder``, or of the model that --reference_model_name_or_path names."""
    if name_or_path is None:
        return frozen_copy(encoder)
    flag = "--reference_model_name_or_path"
    reference = make_encoder(*load_clip(name_or_path, flag), encoder.compute_dtype)
    refuse_other_shape(reference, encoder, name_or_path)
    return frozen_copy(reference)


def check_reference_dtype(name: str, compute_dtype: torch.dtype) -> None:
    """Raises ``UserError`` where --reference_dtype bfloat16 would change what the reference computes."""
    if name == "bfloat16" and compute_dtype != torch.bfloat16:
        raise UserError(
            f"--reference_dtype bfloat16: the transformer blocks run in {str(compute_dtype).removeprefix('torch.')}, and a "
            "reference in bfloat16 would embed otherwise than the encoder; set mixed_precision: bf16 in the accelerate "
            "config, or leave --reference_dtype at float32"
        )


def keep_weights_in(name: str, reference: ImageEncoder) -> ImageEncoder:
    """``bfloat16``: the blocks' linear layers, nearly all of the weights, are stored in bfloat16, in place.

    They are what autocast rounds to bfloat16 before every product, so that the embeddings stay the same to the bit.
    Everything else stays float32: patch embedding, positions, layer norms, projection.
    """
    if name == "bfloat16":
        for module in reference.vision_model.encoder.layers.modules():
            if isinstance(module, nn.Linear):
                for part, parameter in list(module.named_parameters()):
                    setattr(module, part, nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False))
    return reference


def refuse_other_shape(reference: ImageEncoder, encoder: ImageEncoder, name_or_path: str) -> None:
    """Raises ``UserError`` where a reference sees other pixels or gives other embeddings than the encoder."""
    if (reference.embed_dim, reference.image_size) != (encoder.embed_dim, encoder.image_size):
        raise UserError(
            f"--reference_model_name_or_path {name_or_path}: embeds {reference.image_size} px into {reference.embed_dim} "
            f"dimensions, the encoder {encoder.image_size} px into {encoder.embed_dim}; name a model of the encoder's kind"
        )


def enable_gradient_checkpointing(encoder: ImageEncoder) -> None:
    """Recomputes activations in the backward pass, in train mode only. Non-reentrant, or autograd.grad refuses it."""
    settings = {"use_reentrant": False}
    if hasattr(encoder.vision_model, "activation_checkpointing_enable"):  # transformers >= 5.20 or so
        encoder.vision_model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        encoder.vision_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def save_clip(
    directory: str | Path, clip: CLIPModel, processor: CLIPProcessor, encoder_state: dict[str, Tensor]
) -> None:
    """Writes config, model.safetensors and processor files: the text tower of ``clip`` with the encoder's new weights.

    ``encoder_state`` is a full state dict of ``ImageEncoder`` (under ZeRO-3: the gathered one). Call on one process.
    """
    state = {name: tensor for name, tensor in clip.state_dict().items() if name not in encoder_state}
    state.update({name: tensor.detach().to("cpu", torch.float32) for name, tensor in encoder_state.items()})
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    if empty:
        raise RuntimeError(f"{empty[0]} is partitioned (shape {tuple(state[empty[0]].shape)}): refusing to save it")
    damaged = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if damaged:
        raise UserError(f"{directory}: {damaged[0]} is not finite, the model is not saved; lower --learning_rate")
    with quiet_transformers():
        clip.save_pretrained(directory, state_dict=state)
        processor.save_pretrained(directory)


@contextmanager
def unpartitioned() -> Iterator[None]:
    """Hugging Face models built inside are whole, also after an Accelerator with a ZeRO-3 config was made."""
    from transformers.integrations import deepspeed as integration

    kept, integration._hf_deepspeed_config_weak_ref = integration._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = kept


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the bars of loading and saving, and without the note that images go through Pillow: they are meant to."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
