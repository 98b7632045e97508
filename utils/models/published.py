"""Published models: directories written by transformers. Checks and loads them, and writes them after training.

Every field of the files is either obeyed or refused; every weight must be there and finite.
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
from transformers import CLIPImageProcessorPil, Dinov2ForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import logging as transformers_logging

from utils.data.images import ImageTransform, pixel_normalisation
from utils.data.sources import BRING_IT
from utils.errors import UserError
from utils.models.tokens import check_tokenizer
from utils.redaction import printable

logger = logging.getLogger(__name__)

# Classes in transformers: the model, the default image processor, the processor of a model with a text tower.
CLASSES: dict[str, tuple[str, str, str | None]] = {
    "clip": ("CLIPModel", "CLIPImageProcessor", "CLIPProcessor"),
    "siglip": ("SiglipModel", "SiglipImageProcessor", "SiglipProcessor"),
    "siglip2": ("Siglip2Model", "Siglip2ImageProcessor", "Siglip2Processor"),
    "vision-text-dual-encoder": ("VisionTextDualEncoderModel", "", "VisionTextDualEncoderProcessor"),
    "clip_vision_model": ("CLIPVisionModelWithProjection", "CLIPImageProcessor", None),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipImageProcessor", None),
    "dinov2": ("Dinov2Model", "BitImageProcessor", None),
}
MODEL_TYPES = tuple(CLASSES)
CONTRASTIVE_MODEL_TYPES = tuple(name for name, (_, _, with_text) in CLASSES.items() if with_text)
# Image processors do the same as CLIP's with other defaults; these two have steps of their own, in ``ImageTransform``.
OWN_STEPS = ("ConvNextImageProcessor", "Siglip2ImageProcessor")
STEPS = (
    *("preprocess", "process_image", "_preprocess", "_preprocess_image_like_inputs", "_prepare_image_like_inputs"),
    *("_standardize_kwargs", "convert_to_rgb", "resize", "center_crop", "rescale", "normalize", "pad"),
)
# Towers of a vision-text-dual-encoder; ``utils.models.tokens`` can end and pad texts for this text tower.
DUAL_ENCODER_PARTS = {"vision_config": ("convnext", "clip_vision_model"), "text_config": ("clip_text_model",)}
FIXED_POSITIONS = ("clip_vision_model", "siglip_vision_model")  # towers that take images of one size only
HUB_ID = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,95})?"
LFS_POINTER = b"version https://git-lfs"
PROCESSOR_FILES = ("*processor_config.json", "*token*.json", "vocab.*", "merges.txt", "*.model", "*.jinja")
OF_OTHER_PARTS = ("text_model", "text_projection", "visual_projection", "logit_scale", "logit_bias")


def refuse_mistyped_path(name: str, flag: str) -> None:
    """Raises ``UserError`` for a name that is neither a model's directory nor a possible hub id. Works offline."""
    inside = os.listdir(name) if os.path.isdir(name) else []
    if "adapter_config.json" in inside:
        raise UserError(f"{flag} {name}: holds an adapter (LoRA), not a whole model; merge it into its model first")
    if "config.json" in inside:
        return
    if os.path.isdir(name):
        models = sorted(Path(name).glob("*/config.json"))
        problem = "holds no config.json" + (f"; {models[-1].parent} holds one" if models else "")
    elif os.path.exists(name):
        problem = "a file"
    elif os.path.islink(name):
        problem = f"a link to {os.readlink(name)}, which is not there"
    elif "://" in name:
        problem = "a URL"
    elif name.startswith("~"):
        problem = "no such directory, ~ stands for none here; write the path in full"
    elif re.fullmatch(HUB_ID, name):
        return
    else:
        problem = f"no such directory{nearest(name)}" if name.strip() else "empty"
    expected = "expected a directory saved by save_pretrained, or an id of the hub such as openai/clip-vit-base-patch32"
    raise UserError(f"{flag} {name}".rstrip() + f": {problem}; {expected}")


def nearest(name: str) -> str:
    """A directory with a similar name, in parentheses."""
    parent, last = os.path.split(name.rstrip("/"))
    entries = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    folders = [entry for entry in entries if os.path.isdir(os.path.join(parent, entry))]
    close = difflib.get_close_matches(last, folders, n=1)
    return f" (did you mean {os.path.join(parent, close[0])}?)" if close else ""


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Turns any error of transformers, tokenizers, safetensors and torch about a damaged file into ``UserError``."""
    try:
        with quiet_transformers():
            yield
    except Exception as error:
        raise UserError(f"{where}: {_reason(error)}") from None


def check_model(name_or_path: str, flag: str, supported: Sequence[str] = MODEL_TYPES) -> PreTrainedConfig:
    """The model's config, read before any weights. Raises ``UserError`` if it is missing or not supported.

    Fields on how transformers computes or returns results (attn_implementation, return_dict) are reset, unread.
    """
    refuse_mistyped_path(name_or_path, flag)
    where = f"{flag} {name_or_path}"
    fault = "config.json is none that transformers reads, expected one saved by save_pretrained"
    if not os.path.isdir(name_or_path):
        fault = f"neither a local model directory{nearest(name_or_path)} nor a model that the hub gave"
        fault += f"; check the name, or without internet {BRING_IT}"
    with _refusing(f"{where}: {fault}"):
        config = transformers.AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    if config.model_type not in supported:
        raise UserError(f"{where}: model type {config.model_type!r}; supported: {', '.join(supported)}")
    towers = (getattr(config, name, None) for name in ("vision_config", "text_config"))
    parts = [config, *(tower for tower in towers if isinstance(tower, PreTrainedConfig))]
    with _refusing(where):
        _check_config(config, parts)
    for part in parts:
        part.return_dict, part.output_attentions, part.output_hidden_states = True, False, False
        part._attn_implementation = None
    return config


def _check_config(config: PreTrainedConfig, parts: Sequence[PreTrainedConfig]) -> None:
    """Raises ``ValueError`` for settings of a config that the encoders here do not support."""
    if config.model_type == "vision-text-dual-encoder":
        for name, kinds in DUAL_ENCODER_PARTS.items():
            if (kind := getattr(config, name).model_type) not in kinds:
                raise ValueError(f"its {name} is a {kind!r}; of {config.model_type} supported: {', '.join(kinds)}")
    for part in parts:
        quantization = getattr(part, "quantization_config", None)
        method = (isinstance(quantization, dict) and quantization.get("quant_method")) or "of no named method"
        activation, patches = getattr(part, "hidden_act", None), getattr(part, "num_patches", 1)
        without_head = part.model_type.startswith("siglip") and not getattr(part, "vision_use_head", True)
        channels = getattr(part, "num_channels", 3)
        faults = (
            (
                quantization is not None,
                f"quantization_config ({method}), which is not supported; give the model without",
            ),
            (activation and activation not in ACT2FN, f"hidden_act {activation!r} is unknown to transformers"),
            (without_head, "vision_use_head false leaves no embedding of an image"),
            (not _is_square(patches), f"num_patches is {patches}; expected a square number"),  # SigLIP 2's positions
            (channels != 3, f"num_channels is {channels}; expected 3, RGB"),
        )
        for is_wrong, fault in faults:
            if is_wrong:
                raise ValueError(f"config.json: {fault}")
    if config.model_type in ("siglip", "siglip2"):  # no projection makes the sizes equal
        image_dim, text_dim = config.vision_config.hidden_size, config.text_config.projection_size
        if image_dim != text_dim:
            equal = "expected hidden_size of vision_config to be projection_size of text_config"
            raise ValueError(f"config.json: images embed into {image_dim} dimensions, texts into {text_dim}; {equal}")


def _is_square(number: Any) -> bool:
    return isinstance(number, int) and number > 0 and math.isqrt(number) ** 2 == number


def has_text(config: PreTrainedConfig) -> bool:
    """Whether a model has a text tower."""
    return config.model_type in CONTRASTIVE_MODEL_TYPES


def has_own_head(config: PreTrainedConfig) -> bool:
    """Whether a model has its own linear classifier: a DINOv2 saved for image classification."""
    return config.model_type == "dinov2" and "Dinov2ForImageClassification" in (config.architectures or ())


def load_model(
    name_or_path: str, flag: str = "--model_name_or_path", supported: Sequence[str] = MODEL_TYPES
) -> tuple[PreTrainedModel, Any]:
    """The whole float32 model, without dropout, and its processor (without a text tower: its image processor)."""
    config = check_model(name_or_path, flag, supported)
    where = f"{flag} {name_or_path}"
    name, _, processor_name = CLASSES[config.model_type]
    if processor_name:  # first, because it is quick
        with _refusing(f"{where}: the model does not load"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
            check_tokenizer(tokenizer, config)
    model_class = Dinov2ForImageClassification if has_own_head(config) else getattr(transformers, name)
    model = load_weights(model_class, name_or_path, flag, config)
    image_processor: Any = load_image_processor(name_or_path, config.model_type, flag)
    tower, size = image_tower(model)[0].config, image_size(image_processor)
    patch = getattr(image_processor, "patch_size", None)  # SigLIP 2's processor has one
    if patch is not None and patch != tower.patch_size:
        sizes = f"patches of {patch} px, the model takes {tower.patch_size} px"
        raise UserError(f"{where}: its image processor makes {sizes}; correct its patch_size")
    # The other towers interpolate their position embeddings or have none.
    if tower.model_type in FIXED_POSITIONS and size != tower.image_size:
        sizes = f"{size} px, the model takes {tower.image_size} px"
        raise UserError(f"{where}: its image processor gives {sizes}; correct its crop_size")
    if processor_name and not 0 < (scale := logit_scale(model)) < math.inf:
        fault = f"exp(logit_scale) is {scale:g}, the logits of all classes would be alike or infinite"
        raise UserError(f"{where}: {_weights_file(name_or_path, 'logit_scale')}: {fault}; CLIP's is at most 100")
    silenced = switch_off_randomness(model)
    if silenced and int(os.environ.get("RANK", "0")) == 0:
        line = "%s: %s would make training random: switched off here, the saved config keeps them"
        logger.warning(line, name_or_path, ", ".join(silenced))
    if not processor_name:
        return model, image_processor
    return model, getattr(transformers, processor_name)(image_processor=image_processor, tokenizer=tokenizer)


def load_weights(
    model_class: type[PreTrainedModel], name_or_path: str | Path, flag: str, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """A float32 model, whole even under ZeRO-3. Raises ``UserError`` if it does not load or lacks weights."""
    where = f"{flag} {name_or_path}"
    for path in Path(name_or_path).glob("*.[sb]*"):  # .safetensors, .bin
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                fault = "is a pointer of Git LFS, not the file itself; run `git lfs pull`"
                raise UserError(f"{where}: {path.name} {fault}")
    with _refusing(f"{where}: the model does not load"), unpartitioned():
        loaded: Any = model_class.from_pretrained(
            name_or_path,
            config=copy.deepcopy(config),
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the name
        )
    model, info = loaded
    lacking = sorted(name for name in info["missing_keys"] if not name.endswith("mask_token"))
    with_projection = isinstance(model, transformers.CLIPVisionModelWithProjection)
    if with_projection and "visual_projection.weight" in lacking:  # saved without projection
        return load_weights(transformers.CLIPVisionModel, name_or_path, flag, config)
    for name, fault in _weight_faults(model, info):
        raise UserError(f"{where}: {_weights_file(name_or_path, name)}: {name} {fault}")
    if lacking:  # transformers would fill them with random values
        kind = f"{len(lacking)} weights of a {model.config.model_type}"
        expected = "expected a directory saved by save_pretrained"
        raise UserError(f"{where}: {kind} are missing, the first is {lacking[0]}; {expected}")
    return model


def _weight_faults(model: PreTrainedModel, info: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name of a weight, reason why the model cannot be used)."""
    for name, there, here in sorted(info["mismatched_keys"]):
        yield name, f"is {tuple(there)}, by config.json {tuple(here)}; give the config of these weights"
    for name in sorted(info["unexpected_keys"]):
        part = name.split(".")[0]
        # Old files also hold position ids, and pre-training leaves a mask token.
        if not name.endswith(("position_ids", "mask_token")) and (part not in OF_OTHER_PARTS or hasattr(model, part)):
            yield name, f"has no place in a {type(model).__name__} by config.json; give the config of these weights"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.isfinite().all():
            yield name, "holds what is not finite (NaN or infinity); give whole weights, as of an earlier checkpoint"


def weight_files(folder: str | Path) -> tuple[str, dict[str, str]]:
    """The file of a model's weights and {}; for weights in several files their index, and the file of each tensor."""
    for file in ("model.safetensors", "pytorch_model.bin"):
        if (Path(folder) / file).is_file():
            return file, {}
        index = Path(folder) / f"{file}.index.json"
        if index.is_file():
            return index.name, json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return "its weights", {}


def _weights_file(folder: str | Path, name: str) -> str:
    """The file of a model's directory that holds a tensor, as far as known."""
    file, parts = weight_files(folder)
    return parts.get(name, file)


def switch_off_randomness(model: nn.Module) -> list[str]:
    """Sets dropout and drop_prob of all modules to 0, in place; returns the old ones, such as "dropout 0.1"."""
    found: dict[str, None] = {}
    for module in model.modules():
        names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else []
        names += [name for name, value in vars(module).items() if "drop" in name and isinstance(value, (int, float))]
        for name in names:
            if probability := getattr(module, name):
                found[f"{'dropout' if name == 'p' else name} {probability:g}"] = None
                setattr(module, name, type(probability)(0))
    return list(found)


def load_image_processor(name_or_path: str, model_type: str, flag: str) -> Any:
    """A directory's image processor, on Pillow. Raises ``UserError`` for one that ``ImageTransform`` does not cover."""
    nested = Path(name_or_path) / "processor_config.json"  # takes precedence if it holds an image processor
    where = f"{flag} {name_or_path}: preprocessor_config.json"
    with _refusing(f"{where}: no image processor, expected one saved by save_pretrained"):
        if nested.is_file() and "image_processor" in json.loads(nested.read_text(encoding="utf-8")):
            where = f"{flag} {name_or_path}: {nested.name}"
        found, _ = CLIPImageProcessorPil.get_image_processor_dict(name_or_path)
        kind = found.get("image_processor_type") or found.get("feature_extractor_type") or CLASSES[model_type][1]
    base = re.sub("FeatureExtractor$", "ImageProcessor", str(kind).removesuffix("Pil").removesuffix("Fast"))
    processor_class = getattr(transformers, f"{base}Pil", None)

    def differs(step: str) -> bool:
        return getattr(processor_class, step, None) is not getattr(CLIPImageProcessorPil, step, None)

    if processor_class is None or (base not in OWN_STEPS and any(map(differs, STEPS))):
        raise UserError(f"{where}: image_processor_type {kind!r} is not supported; CLIP's, SigLIP's, ViT's kinds are")
    with _refusing(where):
        image_processor = processor_class.from_dict(found)
        image_size(image_processor)
        pixel_normalisation(image_processor)
    return image_processor


def _reason(error: Exception) -> str:
    """An error's text in one line, or its type if it has none."""
    text = " ".join(str(error).split())
    return (f"{type(error).__name__} {text}" if isinstance(error, KeyError) or not text else text)[:300]


def image_tower(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.Linear | None]:
    """A model's image tower, whose output the encoder uses, and its projection, if it has one."""
    if isinstance(model, Dinov2ForImageClassification):
        return model.dinov2, None
    return getattr(model, "vision_model", model), getattr(model, "visual_projection", None)


def image_transform(processor: Any) -> ImageTransform:
    """The transform from encoded images to the input of this processor's model."""
    return ImageTransform.from_processor(getattr(processor, "image_processor", processor))


def image_size(processor: Any) -> int:
    """The side of a processor's square images, in pixels. Raises ``ValueError`` if they are not square."""
    size = image_transform(processor).output_size
    if size is None or size[0] != size[1]:
        raise ValueError("its image processor gives no square images; set its crop_size")
    return size[0]


def text_embed_dim(model: PreTrainedModel) -> int:
    """The size of a contrastive model's text embeddings. SigLIP ignores projection_dim of the config."""
    projection = getattr(model, "text_projection", None)
    return model.config.text_config.projection_size if projection is None else projection.out_features


def logit_scale(model: PreTrainedModel) -> float:
    """s = exp(logit_scale), the factor of a contrastive model's cosines."""
    return float(model.get_parameter("logit_scale").detach().exp())


def save_model(directory: str | Path, model: PreTrainedModel, processor: Any, encoder_state: dict[str, Tensor]) -> None:
    """Writes config, model.safetensors and processor files of ``model`` with the encoder's new weights. On one process.

    ``encoder_state``: the full state dict of ``ImageEncoder``, gathered under ZeRO-3, and maybe of ``TextEncoder``.
    """
    inside = next(name for name, module in model.named_modules() if module is image_tower(model)[0])
    prefix = f"{inside}." if inside else ""  # "" for a tower alone
    state = model.state_dict()
    for name, tensor in encoder_state.items():
        state[re.sub(r"^vision_model\.", prefix, name)] = tensor.detach().to("cpu", torch.float32)
    for name, tensor in state.items():
        if tensor.numel() == 0:
            raise RuntimeError(f"{name} is partitioned (shape {tuple(tensor.shape)}): refusing to save it")
        if not tensor.isfinite().all():
            fault = f"{name} is not finite, the model is not saved; metrics.jsonl has the loss before"
            raise UserError(f"{directory}: {fault}")
    with quiet_transformers():
        model.save_pretrained(directory, state_dict=state)
        _save_processor(Path(directory), model, processor)


def _save_processor(directory: Path, model: PreTrainedModel, processor: Any) -> None:
    """Writes the processor's files. If it cannot be saved, copies those it was loaded from, with a warning."""
    try:
        processor.save_pretrained(directory)
    except Exception as error:
        source = Path(str(model.name_or_path))
        files = [path for pattern in PROCESSOR_FILES for path in source.glob(pattern) if path.is_file()]
        if not files and isinstance(error, OSError):  # the disk cannot be written
            raise
        for path in files:
            shutil.copyfile(path, directory / path.name)
        rest = f"{len(files)} files of {source} stand in" if files else "take those of the model before training"
        line = "%s: the processor's files cannot be written (%s); %s"
        logger.warning(line, directory, _reason(error)[:160], printable(rest))


@contextmanager
def unpartitioned() -> Iterator[None]:
    """Hugging Face models built inside the block are whole, even if an Accelerator has a ZeRO-3 config."""
    from transformers.integrations import deepspeed as integration

    kept, integration._hf_deepspeed_config_weak_ref = integration._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = kept


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides the progress bars of loading and saving, and the note that images go through Pillow, which is intended."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)  # its logged errors are also raised, or reported here
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
