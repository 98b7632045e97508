"""Encoders: pixels in [0,1] to un-normalised image embeddings, and back to what ``from_pretrained`` loads.

A model is what transformers makes of a directory, with its processor. What an encoder takes from it depends on its type:

    clip, siglip, siglip2, vision-text-dual-encoder   image tower (and projection) of a model with a text tower
    clip_vision_model, siglip_vision_model            the image half alone
    dinov2                                            Dinov2Model: the class token;
                                                      Dinov2ForImageClassification: class token and mean of the patches,
                                                      which its own linear head reads
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2ForImageClassification,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2Model,
    Siglip2Processor,
    SiglipModel,
    SiglipProcessor,
    SiglipVisionModel,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)
from transformers.activations import ACT2FN
from transformers.utils import logging as transformers_logging

from utils.data.images import ImageTransform, pixel_normalisation
from utils.data.sources import BRING_IT
from utils.errors import UserError
from utils.models.layers import ATTENTION, recompute_convnext_layers, use_lean_layers
from utils.models.tokens import check_tokenizer
from utils.redaction import printable

logger = logging.getLogger(__name__)

MODEL_CLASSES = {
    "clip": CLIPModel,
    "siglip": SiglipModel,
    "siglip2": Siglip2Model,
    "vision-text-dual-encoder": VisionTextDualEncoderModel,
    "clip_vision_model": CLIPVisionModelWithProjection,
    "siglip_vision_model": SiglipVisionModel,
    "dinov2": Dinov2Model,
}
PROCESSOR_CLASSES = {  # of those with a text tower
    "clip": CLIPProcessor,
    "siglip": SiglipProcessor,
    "siglip2": Siglip2Processor,
    "vision-text-dual-encoder": VisionTextDualEncoderProcessor,
}
MODEL_TYPES, CONTRASTIVE_MODEL_TYPES = tuple(MODEL_CLASSES), tuple(PROCESSOR_CLASSES)
IMAGE_PROCESSORS = {  # where the file does not say which
    "clip": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
    "siglip2": "Siglip2ImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
    "dinov2": "BitImageProcessor",
}

# Of a vision-text-dual-encoder: a text tower that ``utils.models.tokens`` knows how to end and pad for.
DUAL_ENCODER_PARTS = {"vision_config": ("convnext", "clip_vision_model"), "text_config": ("clip_text_model",)}
FIXED_POSITIONS = ("clip_vision_model", "siglip_vision_model")  # towers that take images of one size only
HUB_ID = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,95})?"
LFS_POINTER = b"version https://git-lfs"


class ImageEncoder(nn.Module):
    """phi: an image tower and its projection, if it has one, with the normalisation of pixels inside.

    The modules are those of the model that it was made from (``make_encoder``), not copies: training this trains that.
    Pixels, normalisation and the patch embedding stay in float32, the transformer blocks run under autocast in
    ``compute_dtype``: a normalised pixel near 2 would be rounded to steps of 1/64 by bfloat16, and an attack with
    steps of 1/1020 would vanish in that. Autocast is entered here, not by the training engine, so that the attack, the
    reference and the trained encoder all see the same arithmetic, wrapped or not.

    mean_of_patches: the embedding is [class token; mean of the patch tokens], as DINOv2's linear heads take it, and not the
    tower's own pooled output.
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
        self.vision_model = vision_model
        self.visual_projection = visual_projection
        self.compute_dtype = compute_dtype
        self.mean_of_patches = mean_of_patches
        if visual_projection is not None:
            self.embed_dim = visual_projection.out_features
        else:
            self.embed_dim = vision_model.config.hidden_size * (2 if mean_of_patches else 1)
        self.image_size = image_size
        self.register_buffer("image_mean", torch.tensor(image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(1, 3, 1, 1), persistent=False)
        use_lean_layers(vision_model)
        if vision_model.config.model_type != "convnext":  # which has no attention
            vision_model.config._attn_implementation = ATTENTION
        # SigLIP 2's tower wants to be told where patches are; its embeddings here see that by themselves.
        siglip2 = vision_model.config.model_type == "siglip2_vision_model"
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
    """The text tower of a contrastive model and its projection, if it has one: token ids to un-normalised text embeddings.

    The modules are the model's own. What it is given, and whether with an attention mask, is decided in ``utils.models.tokens``.
    """

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.text_model = model.get_submodule("text_model")
        self.text_projection: nn.Module | None = getattr(model, "text_projection", None)
        use_lean_layers(self.text_model)
        self.compute_dtype = compute_dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(..., L) int64, and of the same shape 0 for what is not to be seen -> (..., D), float32."""
        autocast = self.compute_dtype != torch.float32
        mask = None if attention_mask is None else attention_mask.flatten(0, -2)
        with torch.autocast(input_ids.device.type, dtype=self.compute_dtype, enabled=autocast):
            pooled = self.text_model(input_ids=input_ids.flatten(0, -2), attention_mask=mask).pooler_output
            embeds = pooled if self.text_projection is None else self.text_projection(pooled)
            return embeds.float().unflatten(0, input_ids.shape[:-1])


def check_model(name_or_path: str, flag: str, supported: Sequence[str] = MODEL_TYPES) -> PreTrainedConfig:
    """The model's config, read before any weights are. Raises ``UserError`` where there is none, or one of another model.

    Fields that say how transformers computes or answers (attn_implementation, output_attentions, return_dict) are left
    aside: nothing here depends on them.
    """
    refuse_mistyped_path(name_or_path, flag)
    local = os.path.isdir(name_or_path)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:
        # OSError and ValueError; TypeError, AttributeError, RecursionError and others where config.json is not as it should.
        if local:
            raise UserError(
                f"{flag} {name_or_path}: config.json is none that transformers reads ({_reason(error)[:240]}); expected "
                "that of a model saved by save_pretrained"
            ) from None
        raise UserError(
            f"{flag} {name_or_path}: neither a local model directory{nearest(name_or_path)} nor a model that the Hugging Face "
            f"hub gave ({_reason(error)[:160]}); check the name; without internet {BRING_IT}"
        ) from None
    if config.model_type not in supported:
        raise UserError(f"{flag} {name_or_path}: model type {config.model_type!r}; supported: {', '.join(supported)}")
    if config.model_type == "vision-text-dual-encoder":
        for name, kinds in DUAL_ENCODER_PARTS.items():
            kind = getattr(config, name).model_type
            if kind not in kinds:
                raise UserError(
                    f"{flag} {name_or_path}: its {name} is a {kind!r}; of vision-text-dual-encoder supported: "
                    f"{', '.join(kinds)}"
                )
    for part in _parts(config):
        if getattr(part, "quantization_config", None) is not None:
            found = part.quantization_config
            method = found.get("quant_method") if isinstance(found, dict) else None
            raise UserError(
                f"{flag} {name_or_path}: config.json has a quantization_config ({method or 'of no named method'}), which is not supported; give the "
                "model with its weights as they were before"
            )
        activation = getattr(part, "hidden_act", None)
        if activation is not None and activation not in ACT2FN:
            raise UserError(f"{flag} {name_or_path}: config.json: hidden_act {activation!r} is unknown to transformers")
        if part.model_type.startswith("siglip") and getattr(part, "vision_use_head", True) is False:
            raise UserError(
                f"{flag} {name_or_path}: config.json: vision_use_head false leaves no embedding of an image"
            )
        patches = getattr(part, "num_patches", 1)  # SigLIP 2's table of positions is a square
        if not isinstance(patches, int) or math.isqrt(patches) ** 2 != patches:
            raise UserError(f"{flag} {name_or_path}: config.json: num_patches is {patches}; expected a square number")
        if getattr(part, "num_channels", 3) != 3:
            raise UserError(f"{flag} {name_or_path}: config.json: num_channels is {part.num_channels}; expected 3, RGB")
        # How transformers computes and answers: nothing here depends on it.
        part.return_dict, part.output_attentions, part.output_hidden_states = True, False, False
        part._attn_implementation = None
    if config.model_type in ("siglip", "siglip2"):  # no projection makes them the same
        image_dim, text_dim = config.vision_config.hidden_size, config.text_config.projection_size
        if image_dim != text_dim:
            raise UserError(
                f"{flag} {name_or_path}: config.json: images embed into {image_dim} dimensions, texts into {text_dim}; "
                "expected hidden_size of vision_config to be projection_size of text_config"
            )
    return config


def refuse_mistyped_path(name: str, flag: str) -> None:
    """``UserError`` for what is neither a model's directory nor can be an id of the hub, before anything is asked there."""
    expected = "expected a directory saved by save_pretrained, or an id of the hub such as openai/clip-vit-base-patch32"
    if not name.strip():
        raise UserError(f"{flag}: empty; {expected}")
    if os.path.isdir(name):
        if os.path.exists(os.path.join(name, "adapter_config.json")):
            raise UserError(
                f"{flag} {name}: holds an adapter (LoRA), not a whole model; merge it into its model before"
            )
        if os.path.exists(os.path.join(name, "config.json")):
            return
        found = sorted(os.listdir(name))
        inside = [entry for entry in found if os.path.exists(os.path.join(name, entry, "config.json"))]
        hint = f"; {os.path.join(name, inside[-1])} holds one" if inside else "" if found else ", nor anything else"
        raise UserError(f"{flag} {name}: holds no config.json{hint}; {expected}")
    if os.path.exists(name):
        raise UserError(f"{flag} {name}: a file; {expected}")
    if os.path.islink(name):
        raise UserError(f"{flag} {name}: a link to {os.readlink(name)}, which is not there; {expected}")
    if "://" in name:
        raise UserError(f"{flag} {name}: a URL; {expected}")
    if name.startswith("~"):
        raise UserError(f"{flag} {name}: no such directory, ~ stands for none here; write the path in full; {expected}")
    if not re.fullmatch(HUB_ID, name):
        raise UserError(f"{flag} {name}: no such directory{nearest(name)}; {expected}")


def nearest(name: str) -> str:
    """A directory of nearly this name, in parentheses."""
    parent, last = os.path.split(name.rstrip("/"))
    entries = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    folders = [entry for entry in entries if os.path.isdir(os.path.join(parent, entry))]
    close = difflib.get_close_matches(last, folders, n=1)
    return f" (did you mean {os.path.join(parent, close[0])}?)" if close else ""


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A config and those of its towers."""
    towers = (getattr(config, name, None) for name in ("vision_config", "text_config"))
    return [config, *(tower for tower in towers if isinstance(tower, PreTrainedConfig))]


def load_model(
    name_or_path: str, flag: str = "--model_name_or_path", supported: Sequence[str] = MODEL_TYPES
) -> tuple[PreTrainedModel, Any]:
    """The whole float32 model and its processor (without a text tower: its image processor).

    Never partitioned, also where DeepSpeed's ZeRO-3 is on. A CLIP vision model saved without projection embeds into its
    hidden size. Nothing in it is random in train mode. Raises ``UserError`` for another type of model, for weights that are
    missing, of other sizes or not finite, and for a processor that computes what is not computed here.
    """
    config = check_model(name_or_path, flag, supported)
    tokenizer = _load_tokenizer(name_or_path, config, flag) if has_text(config) else None  # first: it takes no time
    model_class = Dinov2ForImageClassification if has_own_head(config) else MODEL_CLASSES[config.model_type]
    model, missing = _load_pretrained(model_class, name_or_path, flag, config)
    if config.model_type == "clip_vision_model" and "visual_projection.weight" in missing:
        model, missing = _load_pretrained(CLIPVisionModel, name_or_path, flag, config)
    _refuse_missing(missing, model, name_or_path, flag)
    processor = load_image_processor(name_or_path, config.model_type, flag)
    if tokenizer is not None:
        processor = PROCESSOR_CLASSES[config.model_type](image_processor=processor, tokenizer=tokenizer)
    tower, _ = image_tower(model)
    size = image_size(processor)
    # The others interpolate their position embeddings, or have none.
    patch = getattr(
        getattr(processor, "image_processor", processor), "patch_size", None
    )  # SigLIP 2's processor has one
    if patch is not None and patch != tower.config.patch_size:
        raise UserError(
            f"{flag} {name_or_path}: its image processor makes patches of {patch} px, the model takes {tower.config.patch_size} "
            "px; correct patch_size in preprocessor_config.json"
        )
    if tower.config.model_type in FIXED_POSITIONS and size != tower.config.image_size:
        raise UserError(
            f"{flag} {name_or_path}: its image processor gives {size} px, the model takes {tower.config.image_size} px; "
            "correct crop_size in preprocessor_config.json"
        )
    _refuse_overflow(model, name_or_path, flag)
    silenced = switch_off_randomness(model)
    if silenced and int(os.environ.get("RANK", "0")) == 0:
        logger.warning(
            "%s: %s would make it random in training, and these methods compare the model with itself: switched off "
            "here, the saved config keeps them", name_or_path, ", ".join(silenced),
        )  # fmt: skip
    return model, processor


def load_weights(model_class: type[PreTrainedModel], name_or_path: str | Path, flag: str) -> PreTrainedModel:
    """A float32 model alone, without any processor. Raises ``UserError`` where it does not load, or lacks weights."""
    model, missing = _load_pretrained(model_class, name_or_path, flag)
    _refuse_missing(missing, model, name_or_path, flag)
    return model


def switch_off_randomness(model: nn.Module) -> list[str]:
    """Sets every probability of dropout and stochastic depth to 0, in place; returns their names, "dropout 0.1".

    They are layers of torch, and numbers of a module that its forward hands on (attention's dropout, drop_prob).
    """
    found: dict[str, None] = {}
    for module in model.modules():
        names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else []
        names += [name for name, value in vars(module).items() if "drop" in name and isinstance(value, (int, float))]
        for name in names:
            if probability := getattr(module, name):
                found[f"{'dropout' if name == 'p' else name} {probability:g}"] = None
                setattr(module, name, type(probability)(0))
    return list(found)


def has_text(config: PreTrainedConfig) -> bool:
    """Whether a model has a text tower, for class names and prompts."""
    return config.model_type in CONTRASTIVE_MODEL_TYPES


def has_own_head(config: PreTrainedConfig) -> bool:
    """Whether a model brings a linear classifier of its embeddings: DINOv2 saved for image classification."""
    return config.model_type == "dinov2" and "Dinov2ForImageClassification" in (config.architectures or ())


def image_tower(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.Linear | None]:
    """A model's own image tower, whose output has what the encoder takes, and its projection, where it has one."""
    if isinstance(model, Dinov2ForImageClassification):
        return model.dinov2, None
    return getattr(model, "vision_model", model), getattr(model, "visual_projection", None)


def image_transform(processor: Any) -> ImageTransform:
    """From encoded images to what the model of this processor takes."""
    return ImageTransform.from_processor(getattr(processor, "image_processor", processor))


def image_size(processor: Any) -> int:
    """Of the square images that the model of this processor takes, in pixels. Raises ``ValueError`` for any others."""
    size = image_transform(processor).output_size
    if size is None or size[0] != size[1]:
        raise ValueError("its image processor gives no square images; set its crop_size")
    return size[0]


def square_side(size: int | list[int] | tuple[int, int] | None) -> int:
    """An image's or a patch's side in a config, in pixels. Raises ``UserError`` where it is not one number."""
    if not isinstance(size, int):
        raise UserError(f"config.json: a size of {size}; expected one number, the side of a square")
    return size


def text_embed_dim(model: PreTrainedModel) -> int:
    """Of a contrastive model's text embeddings. Not by projection_dim of the config, which SigLIP does not use."""
    projection = getattr(model, "text_projection", None)
    return model.config.text_config.projection_size if projection is None else projection.out_features


def logit_scale(model: PreTrainedModel) -> float:
    """s = exp(logit_scale), by which a contrastive model multiplies cosines."""
    return float(model.get_parameter("logit_scale").detach().exp())


def _reason(error: Exception) -> str:
    """An error's text in one line, or its kind where it has none."""
    text = " ".join(str(error).split())
    return (f"{type(error).__name__} {text}" if isinstance(error, KeyError) or not text else text)[:300]


def _refuse_missing(missing: set[str], model: PreTrainedModel, name_or_path: str | Path, flag: str) -> None:
    """Raises ``UserError`` for weights that a file lacks: they would be drawn at random."""
    lacking = sorted(name for name in missing if not name.endswith("mask_token"))  # that one is for pre-training
    if lacking:
        raise UserError(
            f"{flag} {name_or_path}: {len(lacking)} weights of a {model.config.model_type} are missing, the first is "
            f"{lacking[0]}; expected a directory saved by save_pretrained"
        )


def _load_tokenizer(name_or_path: str | Path, config: PreTrainedConfig, flag: str) -> Any:
    """The tokenizer of a model with text, as its files have it. ``UserError`` where it cannot be the text tower's own."""
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # of transformers and tokenizers, depending on the file that is wrong
        raise UserError(f"{flag} {name_or_path}: the model does not load: {_reason(error)}") from None
    try:
        check_tokenizer(tokenizer, config)
    except ValueError as error:
        raise UserError(f"{flag} {name_or_path}: {error}") from None
    return tokenizer


def _load_pretrained(
    model_class: type[PreTrainedModel], name_or_path: str | Path, flag: str, config: PreTrainedConfig | None = None
) -> tuple[PreTrainedModel, set[str]]:
    """A float32 model and the names of its weights that the file lacks: they are drawn at random.

    Raises ``UserError`` where it does not load, for weights that the config has no place for, and for what is not finite.
    """
    for path in Path(name_or_path).glob("*.[sb]*"):  # .safetensors, .bin
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(
                    f"{flag} {name_or_path}: {path.name} is a pointer of Git LFS, not the file itself; bring it with `git lfs pull`"
                )
    try:
        with unpartitioned(), quiet_transformers():
            loaded: Any = model_class.from_pretrained(
                name_or_path,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # said below, with the name
                config=copy.deepcopy(config),
            )
    except Exception as error:  # of transformers, safetensors and torch, depending on the file that is wrong
        raise UserError(f"{flag} {name_or_path}: the model does not load: {_reason(error)}") from None
    model, found = loaded
    for name, there, here in sorted(found["mismatched_keys"]):
        raise UserError(
            f"{flag} {name_or_path}: {_weights_file(name_or_path, name)}: {name} is {tuple(there)}, by config.json "
            f"{tuple(here)}; give the config of these weights"
        )
    # Parts that the class does not have are another model's; the numbers of positions are a buffer in old files, the mask's
    # token is for pre-training.
    of_others = ("text_model", "text_projection", "visual_projection", "logit_scale", "logit_bias")
    for name in sorted(found["unexpected_keys"]):
        part = name.split(".")[0]
        if not name.endswith(("position_ids", "mask_token")) and (part not in of_others or hasattr(model, part)):
            raise UserError(
                f"{flag} {name_or_path}: {_weights_file(name_or_path, name)} holds {name}, for which config.json leaves no "
                f"place in a {model_class.__name__}; give the config of these weights"
            )
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.isfinite().all():
                raise UserError(
                    f"{flag} {name_or_path}: {_weights_file(name_or_path, name)}: {name} holds what is not finite (NaN or "
                    "infinity); give weights that are whole, such as those of an earlier checkpoint"
                )
    return model, set(found["missing_keys"])


def _weights_file(folder: str | Path, name: str) -> str:
    """The file of a model's directory that holds a tensor, as far as is known."""
    for file in ("model.safetensors", "pytorch_model.bin"):
        if (Path(folder) / file).is_file():
            return file
        index = Path(folder) / f"{file}.index.json"
        if index.is_file():
            return json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(name, index.name)
    return "its weights"


def _refuse_overflow(model: PreTrainedModel, name_or_path: str, flag: str) -> None:
    """Raises ``UserError`` for a logit_scale of which exp is 0 or infinite in float32: all classes would be alike."""
    if "logit_scale" in dict(model.named_parameters()):
        scale = logit_scale(model)
        if not 0 < scale < math.inf:
            raise UserError(
                f"{flag} {name_or_path}: {_weights_file(name_or_path, 'logit_scale')}: exp(logit_scale) is {scale:g}, the "
                f"logits would not be finite or all be 0; CLIP's is at most 100"
            )


def load_image_processor(name_or_path: str, model_type: str, flag: str) -> Any:
    """The processor that the directory's file describes, by Pillow: nothing here needs torchvision.

    Raises ``UserError`` for one that computes what ``ImageTransform`` and ``pixel_normalisation`` do not.
    """
    nested = Path(name_or_path) / "processor_config.json"  # where it holds an image processor it goes first
    where = f"{flag} {name_or_path}: preprocessor_config.json"
    try:
        if nested.is_file() and "image_processor" in json.loads(nested.read_text(encoding="utf-8")):
            where = f"{flag} {name_or_path}: {nested.name}"
        with quiet_transformers():
            found, _ = CLIPImageProcessorPil.get_image_processor_dict(name_or_path)
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__} in place of its fields")
    except Exception as error:  # OSError, ValueError and others, depending on what is wrong
        raise UserError(
            f"{where}: no image processor ({_reason(error)}); expected one saved by save_pretrained"
        ) from None
    kind = found.get("image_processor_type") or found.get("feature_extractor_type") or IMAGE_PROCESSORS.get(model_type)
    base = re.sub("FeatureExtractor$", "ImageProcessor", str(kind).removesuffix("Pil").removesuffix("Fast"))
    processor_class = getattr(transformers, f"{base}Pil", None)
    if processor_class is None or not (_is_plain(processor_class) or base in OWN_STEPS):
        raise UserError(
            f"{where}: image_processor_type {kind!r} is not supported; CLIP's, SigLIP's and ViT's kinds are"
        )
    try:
        with quiet_transformers():
            image_processor = processor_class.from_dict(found)
        image_size(image_processor)
        pixel_normalisation(image_processor)
    except Exception as error:  # UserError, and what transformers says of a field
        raise UserError(f"{where}: {_reason(error)}") from None
    return image_processor


OWN_STEPS = ("ConvNextImageProcessor", "Siglip2ImageProcessor")  # known to ``ImageTransform``


def _is_plain(processor_class: Any) -> bool:
    """Whether a processor does what CLIP's does, by other defaults: no step of it is its own."""
    steps = (
        "preprocess", "process_image", "_preprocess", "_preprocess_image_like_inputs", "_prepare_image_like_inputs",
        "_standardize_kwargs", "convert_to_rgb", "resize", "center_crop", "rescale", "normalize", "pad",
    )  # fmt: skip
    return all(getattr(processor_class, step, None) is getattr(CLIPImageProcessorPil, step, None) for step in steps)


def make_encoder(model: PreTrainedModel, processor: Any, compute_dtype: torch.dtype = torch.float32) -> ImageEncoder:
    """The image encoder inside ``model``, normalising as its processor says."""
    image_processor = getattr(processor, "image_processor", processor)
    tower, projection = image_tower(model)
    mask_token = getattr(getattr(tower, "embeddings", None), "mask_token", None)
    if mask_token is not None:
        mask_token.requires_grad_(False)  # no forward here uses it: DDP would wait for its gradient
    return ImageEncoder(
        tower,
        projection,
        image_size(processor),
        *pixel_normalisation(image_processor),
        compute_dtype,
        mean_of_patches=isinstance(model, Dinov2ForImageClassification),
    )


def frozen_copy(encoder: ImageEncoder) -> ImageEncoder:
    """phi0: a copy in eval mode whose parameters require no gradient."""
    return copy.deepcopy(encoder).eval().requires_grad_(False)


def load_reference(name_or_path: str | None, encoder: ImageEncoder) -> ImageEncoder:
    """phi0: a frozen copy of ``encoder``, or of the model that --reference_model_name_or_path names."""
    if name_or_path is None:
        return frozen_copy(encoder)
    flag = "--reference_model_name_or_path"
    reference = make_encoder(*load_model(name_or_path, flag), encoder.compute_dtype)
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
        blocks = [module for module in reference.vision_model.modules() if isinstance(module, nn.ModuleList)]
        for module in {part for block in blocks for part in block.modules()}:
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
    tower, settings = encoder.vision_model, {"use_reentrant": False}
    if tower.config.model_type == "convnext":  # transformers offers none for it
        recompute_convnext_layers(tower)
    elif hasattr(tower, "activation_checkpointing_enable"):  # transformers >= 5.20 or so
        tower.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja")  # fmt: skip


def save_model(directory: str | Path, model: PreTrainedModel, processor: Any, encoder_state: dict[str, Tensor]) -> None:
    """Writes config, model.safetensors and processor files: ``model`` with the encoder's new weights, the rest as it was.

    ``encoder_state`` is a full state dict of ``ImageEncoder`` (under ZeRO-3: the gathered one), maybe with that of
    ``TextEncoder``. Call on one process.
    """
    tower, _ = image_tower(model)
    inside = next(name for name, module in model.named_modules() if module is tower)  # "" for a tower alone
    trained = {
        name.replace("vision_model.", f"{inside}." if inside else "", 1)
        if name.startswith("vision_model.")
        else name: tensor
        for name, tensor in encoder_state.items()
    }
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in trained}
    state.update({name: tensor.detach().to("cpu", torch.float32) for name, tensor in trained.items()})
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    if empty:
        raise RuntimeError(f"{empty[0]} is partitioned (shape {tuple(state[empty[0]].shape)}): refusing to save it")
    damaged = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if damaged:
        raise UserError(
            f"{directory}: {damaged[0]} is not finite, the model is not saved; its loss and gradient before are in metrics.jsonl"
        )
    with quiet_transformers():
        model.save_pretrained(directory, state_dict=state)
        _save_processor(Path(directory), model, processor)


def _save_processor(directory: Path, model: PreTrainedModel, processor: Any) -> None:
    """The processor's files; where it cannot be saved, with a warning, copies of those that it was loaded from.

    OSError where the disk does not take them.
    """
    try:
        processor.save_pretrained(directory)
    except Exception as error:
        source = Path(str(model.name_or_path))
        copied = [name for name in PROCESSOR_FILES if (source / name).is_file()]
        if not copied and isinstance(error, OSError):
            raise
        for name in copied:
            shutil.copyfile(source / name, directory / name)
        reason = _reason(error)[:160]
        rest = (
            f"{len(copied)} files of {source} stand in"
            if copied
            else "take those of the model that it was trained from"
        )
        logger.warning("%s: the processor's files cannot be written (%s); %s", directory, reason, printable(rest))


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
    transformers_logging.set_verbosity(logging.CRITICAL)  # what it logs as an error it also raises, or is said here
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
