"""Published models, in the layouts in which people publish CLIPs: checks and loads them, and writes trained ones.

Layouts: a directory of transformers; a directory of open_clip; a file of weights alone, completed by a base model. All
become the model classes of transformers, in memory and in float32. Every field of the files is either obeyed or
refused; every weight must be there and finite; nothing is unpickled but tensors. Names of the hub are ``hub``'s: here
all paths are local.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import json
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, Dinov2ForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import logging as transformers_logging

from utils.data.images import CROP_ROUNDING, MAX_OUTPUT_SIDE, ImageTransform, pixel_normalisation, resized_processor
from utils.data.sources import BRING_IT
from utils.errors import UserError, os_errors
from utils.models import open_clip
from utils.models.open_clip import DUAL_ENCODER, State
from utils.models.tokens import BERTS, CLIP, check_tokenizer
from utils.processes.distributed import unpartitioned
from utils.redaction import printable
from utils.text_files import decode_text, parse_json

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
OPEN_CLIP_MODEL_TYPES = ("clip", DUAL_ENCODER)  # what open_clip's layouts become
# Image processors do the same as CLIP's with other defaults; these two have steps of their own, in ``ImageTransform``.
OWN_STEPS = ("ConvNextImageProcessor", "Siglip2ImageProcessor")
STEPS = (
    *("preprocess", "process_image", "_preprocess", "_preprocess_image_like_inputs", "_prepare_image_like_inputs"),
    *("_standardize_kwargs", "convert_to_rgb", "resize", "center_crop", "rescale", "normalize", "pad"),
)
# Towers of a vision-text-dual-encoder: all give a pooler_output; ``utils.models.tokens`` knows the texts of these.
DUAL_ENCODER_PARTS = {
    "vision_config": ("convnext", "clip_vision_model", "dinov2", "siglip_vision_model", "vit"),
    "text_config": (CLIP, *BERTS),
}
FIXED_POSITIONS = ("clip_vision_model", "siglip_vision_model", "vit")  # towers that take images of one size only
SIZED = (*FIXED_POSITIONS, "convnext")  # towers whose config says the size of images; DINOv2's says that of positions
HUB_ID = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,95})?"
HUB_PREFIX = "hf-hub:"  # as open_clip writes an id whose repository is in its layout
LFS_POINTER = b"version https://git-lfs"
CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
OPEN_CLIP_FILES = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    "open_clip_pytorch_model.pth",
)
WEIGHTS_OF_CONFIG = r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)"  # transformers' own
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
CLIP_TOKENIZER = "openai/clip-vit-base-patch32"  # every CLIP of OpenAI and nearly every one of open_clip has this one
PROCESSOR_FILES = ("*processor_config.json", "*token*.json", "vocab.*", "merges.txt", "*.model", "*.jinja")
OF_OTHER_PARTS = ("text_model", "text_projection", "visual_projection", "logit_scale", "logit_bias")
BASE_MODEL_HELP = "the CLIP, or open_clip model config JSON, that completes a file of weights (or NAME@BASE)"
PROCESSOR_HELP = "id or directory of tokenizer and image processor, for a model without"
IMAGE_SIZE_HELP = "side of the images in pixels, a multiple of the model's patch (default: the model's)"
# Keys under which checkpoints keep a state dict: of open_clip's and others' training; of TeCoA.
INSIDE = ("state_dict", "vision_encoder_state_dict", "model_state_dict")


# ---------------------------------------------------------------------------------------------------------------- names


@dataclass(frozen=True)
class ModelName:
    """A model as the user named it: a directory, a file or an id of the hub, and what completes it."""

    text: str  # as typed, for messages and results
    path: str
    base_model: str | None = None  # says what weights alone do not: sizes, text tower, processor
    processor: str | None = None  # tokenizer and image processor, for a model that has none
    image_size: int | None = None  # side in pixels of the images that the model is to take, in place of its own
    tokenizer: str | None = None  # CLIP's own, for one of its vocabulary for which nothing names another
    open_clip: bool = False  # typed as hf-hub:...: open_clip's files, if there are also those of transformers
    base_of_open_clip: bool = False  # the same for the base model

    def __str__(self) -> str:
        return self.text

    @property
    def base(self) -> ModelName:
        assert self.base_model is not None
        prefix = HUB_PREFIX if self.base_of_open_clip else ""
        return model_name(f"{prefix}{self.base_model}", processor=self.processor)


def model_name(
    text: str | ModelName, base_model: str | None = None, processor: str | None = None, image_size: int | None = None
) -> ModelName:
    """Reads NAME or NAME@BASE. ``base_model`` stands for a BASE that is not written. A name that exists has none."""
    if isinstance(text, ModelName):
        return text
    path, of_hub = text.removeprefix(HUB_PREFIX), text.startswith(HUB_PREFIX)
    if "@" in path and "://" not in path and not os.path.lexists(path):
        cuts = [place for place, letter in enumerate(path) if letter == "@"]
        there = [place for place in cuts if os.path.lexists(path[:place])]
        cut = (there or cuts)[-1]
        path, base_model = path[:cut], path[cut + 1 :]
    base, tools = (None if part is None else part.removeprefix(HUB_PREFIX) for part in (base_model, processor))
    return ModelName(text, path, base, tools, image_size, open_clip=of_hub, base_of_open_clip=base != base_model)


class Layout(NamedTuple):
    """The layout of a model's files, and the file that shows it."""

    kind: str  # transformers (config.json), open_clip (its weights), weights (a file of weights alone)
    file: str


def find_layout(folder: str | Path, names: Collection[str], open_clip_first: bool = False) -> Layout:
    """The layout of a directory with files of these names, whose weights may still be missing. Raises ``ValueError``.

    If both layouts are there, as in many repositories of LAION, transformers' is taken unless ``open_clip_first``.
    """
    of_open_clip = OPEN_CLIP_CONFIG in names
    if CONFIG in names and not (of_open_clip and (open_clip_first or not _is_of_transformers(Path(folder) / CONFIG))):
        return Layout("transformers", CONFIG)
    if of_open_clip:
        return Layout("open_clip", next((name for name in OPEN_CLIP_FILES if name in names), OPEN_CLIP_FILES[0]))
    weights = sorted(name for name in names if name.endswith(WEIGHT_SUFFIXES))
    if len(weights) > 1:
        raise ValueError(f"holds no config.json and several files of weights ({', '.join(weights[:5])}); name one")
    if not weights:
        raise ValueError("holds no config.json")
    return Layout("weights", weights[0])


def _is_of_transformers(path: Path) -> bool:
    """Whether a config.json is transformers'; timm writes one too. A file that cannot be read is judged later."""
    try:
        return "model_type" in parse_json(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return True


def layout(name: ModelName, flag: str, names: Collection[str] | None = None) -> Layout:
    """The layout of a local model. Raises ``UserError`` if there is none.

    ``names``: all files of the model's repository, of which some may not be in its directory yet.
    """
    path = Path(name.path)
    if names is None:
        refuse_mistyped_path(name, flag)
    if path.is_file():
        return Layout("open_clip" if _is_of_open_clip_folder(path) else "weights", path.name)
    if names is None and not path.is_dir():
        fault = f"neither a local model directory{nearest(name.path)} nor a model that the hub gave"
        raise UserError(f"{flag} {name}: {fault}; check the name, or without internet {BRING_IT}")
    try:
        return find_layout(path, os.listdir(path) if names is None else names, name.open_clip)
    except ValueError as error:
        raise UserError(
            f"{flag} {name}: {error}; expected a model in the layout of transformers or open_clip"
        ) from None


def _is_of_open_clip_folder(path: Path) -> bool:
    """Whether a file holds the weights of open_clip's layout, with the config beside it."""
    return path.name in OPEN_CLIP_FILES and (path.parent / OPEN_CLIP_CONFIG).is_file()


def folder_of(name: ModelName) -> Path:
    return Path(name.path).parent if os.path.isfile(name.path) else Path(name.path)


def completed_by(name: ModelName, found: Layout, with_text: bool = True) -> ModelName:
    """The name without base model and processor where other files, as their names say, leave no use for them."""
    if found.kind == "weights":
        return name
    wanted = [_has_tokenizer] if with_text else []
    wanted += [_has_image_processor] if found.kind == "transformers" else []
    lacking = [is_in for is_in in wanted if not is_in(folder_of(name))]
    if not lacking:
        return dataclasses.replace(name, base_model=None, processor=None)
    complete = name.processor is not None and all(is_in(name.processor) for is_in in lacking)
    return dataclasses.replace(name, base_model=None) if complete else name


def _has_tokenizer(folder: str | Path) -> bool:
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def _has_image_processor(folder: str | Path) -> bool:
    return image_processor_file(folder) is not None


def image_processor_file(folder: str | Path) -> Path | None:
    """The file of a directory that holds an image processor: the nested one of processor_config.json goes first."""
    nested, plain = Path(folder) / "processor_config.json", Path(folder) / "preprocessor_config.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        if "image_processor" in json.loads(nested.read_text(encoding="utf-8")):
            return nested
    return plain if plain.is_file() else None


def refuse_mistyped_path(text: str | ModelName, flag: str) -> None:
    """Raises ``UserError`` for a name that is neither a model's files nor a possible hub id. Works offline."""
    name = model_name(text)
    path, of_weights = name.path, name.path.endswith(WEIGHT_SUFFIXES)
    inside = os.listdir(path) if os.path.isdir(path) else []
    problem = None
    if "adapter_config.json" in inside:
        raise UserError(f"{flag} {name}: holds an adapter (LoRA), not a whole model; merge it into its model first")
    if os.path.isdir(path):
        try:
            find_layout(path, inside, name.open_clip)
        except ValueError as error:
            models = sorted(Path(path).glob("*/config.json"))
            problem = str(error) + (f"; {models[-1].parent} holds one" if models else "")
    elif os.path.isfile(path):
        if not of_weights:
            problem = "a file"
        elif re.fullmatch(WEIGHTS_OF_CONFIG, Path(path).name) and (Path(path).parent / CONFIG).is_file():
            problem = f"a file of the model in {Path(path).parent}, which is to be named"
    elif os.path.islink(path):
        problem = f"a link to {os.readlink(path)}, which is not there"
    elif "://" in path:
        problem = "a URL"
    elif path.startswith("~"):
        problem = "no such directory, ~ stands for none here; write the path in full"
    elif not re.fullmatch(HUB_ID, path) or of_weights:
        kind = "file" if of_weights else "directory"
        problem = f"no such {kind}{nearest(path)}" if path.strip() else "empty"
    if problem:
        expected = "expected a directory saved by save_pretrained or by open_clip, a file of weights"
        expected += f" ({', '.join(WEIGHT_SUFFIXES)}), or an id of the hub such as openai/clip-vit-base-patch32"
        raise UserError(f"{flag} {name}".rstrip() + f": {problem}; {expected}")
    for part, value in (("--base_model", name.base_model), ("--processor", name.processor)):
        if value is not None and not os.path.exists(value) and not re.fullmatch(HUB_ID, value):
            what = "no such directory or file" if value.strip() else "empty"
            raise UserError(f"{part} {value}".rstrip() + f": {what}{nearest(value)}; expected a directory or a hub id")
    if name.processor is not None and os.path.isfile(name.processor):
        raise UserError(f"--processor {name.processor}: a file; expected a directory of processor files, or a hub id")


def nearest(name: str) -> str:
    """A directory or file with a similar name, in parentheses."""
    parent, last = os.path.split(name.rstrip("/"))
    entries = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    known = [
        entry for entry in entries if entry.endswith(WEIGHT_SUFFIXES) or os.path.isdir(os.path.join(parent, entry))
    ]
    close = difflib.get_close_matches(last, known, n=1)
    return f" (did you mean {os.path.join(parent, close[0])}?)" if close else ""


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Turns any error of transformers, tokenizers, safetensors and torch about a damaged file into ``UserError``."""
    try:
        with quiet_transformers():
            yield
    except Exception as error:
        raise UserError(f"{where}: {_reason(error)}") from None


# --------------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class Described:
    """A local model before its weights are loaded."""

    name: ModelName
    layout: Layout
    config: PreTrainedConfig
    state: State | None = None  # of a file of weights: tidy, in the file's own names, mapped from disk
    preprocess: dict[str, Any] | None = None  # open_clip's preprocess_cfg; None in transformers' layout

    @property
    def rounds_even(self) -> bool:
        """Whether the model comes from open_clip's world, whose centre crops round half a pixel to even."""
        if self.layout.kind == "weights":
            return open_clip.in_open_clip_names(self.state or {})
        return self.layout.kind == "open_clip"


def check_model(name: str | ModelName, flag: str, supported: Sequence[str] = MODEL_TYPES) -> PreTrainedConfig:
    """The config of a local model, read before any weights. Raises ``UserError`` if it is missing or not supported.

    Fields on how transformers computes or returns results (attn_implementation, return_dict) are reset, unread. For a
    file of weights alone, its names and shapes are compared with the base model's.
    """
    return describe(name, flag, supported).config


def describe(text: str | ModelName, flag: str, supported: Sequence[str] = MODEL_TYPES) -> Described:
    """``check_model``, with what else was read."""
    name = model_name(text)
    where, found = f"{flag} {name}", layout(name, flag)
    if found.kind == "transformers":
        described = Described(name, found, _read_config(name.path, where))
    elif found.kind == "open_clip":
        described = Described(name, found, *_read_open_clip_config(folder_of(name) / OPEN_CLIP_CONFIG, where))
    else:
        described = _describe_weights(name, found, flag)
    config = described.config
    if config.model_type not in supported:
        raise UserError(f"{where}: model type {config.model_type!r}; supported: {', '.join(supported)}")
    towers = (getattr(config, part, None) for part in ("vision_config", "text_config"))
    parts = [config, *(tower for tower in towers if isinstance(tower, PreTrainedConfig))]
    with _refusing(where):
        _check_config(config, parts)
        if name.image_size is not None:
            _check_image_size(config, name.image_size)
    for part in parts:
        part.return_dict, part.output_attentions, part.output_hidden_states = True, False, False
        part._attn_implementation = None
    return described


def _read_config(folder: str, where: str) -> PreTrainedConfig:
    fault = "config.json is none that transformers reads, expected one saved by save_pretrained"
    with _refusing(f"{where}: {fault}"):
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _read_open_clip_config(path: Path, where: str) -> tuple[PreTrainedConfig, None, dict[str, Any]]:
    """The config in open_clip's file, and its preprocess_cfg. The model config may be the whole file, as in open_clip's
    own model_configs/. Raises ``UserError``."""
    try:
        fields = parse_json(decode_text(path.read_bytes(), f"{where}: {path.name}"))
        if not isinstance(fields, dict):
            raise ValueError(f"holds a {type(fields).__name__}, expected an object of fields")
        model = fields.get("model_cfg", fields)
        preprocess = dict(fields.get("preprocess_cfg") or model["vision_cfg"].get("preprocess_cfg") or {})
        for name, usual in (("resize_mode", "shortest"), ("interpolation", "bicubic")):
            if preprocess.get(name, usual) != usual:
                raise ValueError(f"preprocess_cfg.{name} is {preprocess[name]!r}, expected {usual!r}")
        config = open_clip.to_config(model)
        side = config.vision_config.image_size
        if preprocess.get("size", side) not in (side, [side, side]):
            raise ValueError(f"preprocess_cfg.size is {preprocess['size']}, vision_cfg.image_size {side}")
        text = model.get("quick_gelu")
        if isinstance(text, str) and not open_clip.is_true(text):
            say_once(f"{path}: quick_gelu is the text {text!r}: gelu is taken, open_clip takes any text for quick_gelu")
        return config, None, preprocess
    except OSError as error:
        raise UserError(f"{where}: {path.name} cannot be read ({error.strerror}); check the file") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{where}: {path.name}: {_reason(error)}; not a model that can be loaded here") from None


def _describe_weights(name: ModelName, found: Layout, flag: str) -> Described:
    """Reads the names and shapes of a file of weights. The config is the base model's, or OpenAI's by the shapes."""
    where = f"{flag} {name}"
    state, bare = weights_alone(name, found, flag)
    in_open_clip = open_clip.in_open_clip_names(state)
    if not any(key.startswith(open_clip.BLOCKS) for key in state):
        keys = ", ".join(list(state)[:3])
        kinds = "with a ViT or a ConvNeXt"
        raise UserError(
            f"{where}: its {len(state)} tensors are no CLIP's {kinds} by their names, such as {keys}; give one"
        )
    preprocess = None
    if name.base_model is not None:
        if os.path.isfile(name.base_model) and name.base_model.endswith(".json"):
            at = f"--base_model {name.base_model}"
            config, _, preprocess = _read_open_clip_config(Path(name.base_model), at)
        else:
            config = check_model(name.base, "--base_model", OPEN_CLIP_MODEL_TYPES)
        by = f"{name.base_model} (the base model)"
    elif bare and in_open_clip and open_clip.is_of_openai(state) and open_clip.holds_text(state):
        with _refusing(f"{where}: the shapes of its tensors are none of OpenAI's CLIPs"):
            config, preprocess, by = open_clip.to_config(open_clip.openai_model(state)), {}, "these sizes"
        say_once(
            f"{name}: half precision as OpenAI's own: taken with quick_gelu and heads of 64; else name --base_model"
        )
    else:
        what = "all weights" if open_clip.holds_text(state) else "an image tower alone"
        unsaid = "its activation and heads" if open_clip.holds_text(state) else "its text tower, activation and heads"
        example = f"as {name}@openai/clip-vit-large-patch14, or by --base_model"
        raise UserError(f"{where}: {what}, and nothing in it says {unsaid}; name the CLIP it was made from, {example}")
    if not open_clip.holds_text(state) and preprocess is not None:
        raise UserError(f"{where}: an image tower alone, and {by} has no weights; name a whole CLIP as base model")
    try:
        if in_open_clip:
            open_clip.to_transformers({key: tensor.to("meta") for key, tensor in state.items()}, config, by)
        else:
            open_clip.check_transformers_names(state, config, by)
    except ValueError as error:
        raise UserError(f"{where}: {error}; name the CLIP it was made from by --base_model") from None
    return Described(name, found, config, state, preprocess)


def weights_alone(name: ModelName, found: Layout, flag: str) -> tuple[State, bool]:
    """``read_state`` of a model's own file of weights."""
    return read_state(folder_of(name) / found.file, f"{flag} {name}")


def read_state(path: Path, where: str) -> tuple[State, bool]:
    """The tidy state dict of a file, and whether it was the whole file. Raises ``UserError``.

    Tensors stay on disk until they are used, if the file allows it: a checkpoint may hold an optimizer as well.
    """
    where = where if where.endswith(path.name) else f"{where}: {path.name}"
    _refuse_pointer(path, where)
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            with warnings.catch_warnings(action="ignore"):  # of a TorchScript archive, refused below
                loaded = _unpickled(path)
    except Exception as error:  # from safetensors, torch, zipfile or pickle, depending on the damage
        text = str(error)
        if "TorchScript" in text:
            advice = "give its state dict, saved by torch.save(model.state_dict(), ...)"
            raise UserError(f"{where}: a TorchScript archive, which holds code; {advice}") from None
        other = re.search(r"GLOBAL (\S+)", text)  # torch advises to unpickle it all the same
        reason = f"it holds {other[1]}" if other else (text.strip().splitlines() or [type(error).__name__])[0][:160]
        fault = f"cannot be read as tensors alone ({reason})"
        raise UserError(f"{where}: {fault}; give the whole file, of a state dict and nothing else") from None
    keys = [key for key in INSIDE if isinstance(loaded, dict) and isinstance(loaded.get(key), dict)]
    bare, loaded = not keys, loaded[keys[0]] if keys else loaded
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(key, str) for key in loaded):
        raise UserError(f"{where}: holds {type(loaded).__name__} values and no state dict; expected named tensors")
    for key, value in loaded.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{where}: {key} is a {type(value).__name__}; expected tensors alone")
    return open_clip.tidy_names(loaded), bare


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6


@functools.cache  # each line once
def say_once(line: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        logger.warning("%s", printable(line))


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
        channels, width = getattr(part, "num_channels", 3), getattr(part, "hidden_size", None)
        pooled, causal = getattr(part, "pooler_output_size", width), getattr(part, "is_decoder", False)
        faults = (
            (
                quantization is not None,
                f"quantization_config ({method}), which is not supported; give the model without",
            ),
            (activation and activation not in ACT2FN, f"hidden_act {activation!r} is unknown to transformers"),
            (without_head, "vision_use_head false leaves no embedding of an image"),
            (not _is_square(patches), f"num_patches is {patches}; expected a square number"),  # SigLIP 2's positions
            (channels != 3, f"num_channels is {channels}; expected 3, RGB"),
            (pooled != width, f"pooler_output_size is {pooled}; expected hidden_size, {width}"),
            (causal, "is_decoder true lets the first token, which is pooled, see no other; expected false"),
        )
        for is_wrong, fault in faults:
            if is_wrong:
                raise ValueError(f"config.json: {fault}")
    if config.model_type in ("siglip", "siglip2"):  # no projection makes the sizes equal
        image_dim, text_dim = config.vision_config.hidden_size, config.text_config.projection_size
        if image_dim != text_dim:
            equal = "expected hidden_size of vision_config to be projection_size of text_config"
            raise ValueError(f"config.json: images embed into {image_dim} dimensions, texts into {text_dim}; {equal}")


def _check_image_size(config: PreTrainedConfig, side: int) -> None:
    """Raises ``ValueError`` for a side that the image tower does not divide into whole patches."""
    tower: Any = getattr(config, "vision_config", config)
    if side == getattr(tower, "image_size", None):  # SigLIP so400m: 384 px, patches of 14 px
        return
    stages = len(tower.depths) if tower.model_type == "convnext" else 1
    patch = tower.patch_size * 2 ** (stages - 1)
    if side % patch:
        near = [each for each in (side // patch * patch, (side // patch + 1) * patch) if 0 < each <= MAX_OUTPUT_SIDE]
        what = f"{patch} px, the {'patch' if stages == 1 else 'stride'} of its {tower.model_type}"
        raise ValueError(f"--image_size {side}: expected a multiple of {what}, such as {' or '.join(map(str, near))}")


def _is_square(number: Any) -> bool:
    return isinstance(number, int) and number > 0 and math.isqrt(number) ** 2 == number


def has_text(config: PreTrainedConfig) -> bool:
    """Whether a model has a text tower."""
    return config.model_type in CONTRASTIVE_MODEL_TYPES


def has_own_head(config: PreTrainedConfig) -> bool:
    """Whether a model has its own linear classifier: a DINOv2 saved for image classification."""
    return config.model_type == "dinov2" and "Dinov2ForImageClassification" in (config.architectures or ())


# -------------------------------------------------------------------------------------------------------------- loading


def load_model(
    name: str | ModelName, flag: str = "--model_name_or_path", supported: Sequence[str] = MODEL_TYPES
) -> tuple[PreTrainedModel, Any]:
    """The whole float32 model, without dropout, and its processor (without a text tower: its image processor).

    The model of an open_clip layout has ``open_clip_form``: an empty tensor for each of its own, for the way back.
    """
    described = describe(name, flag, supported)
    name, config, where = described.name, described.config, f"{flag} {described.name}"
    _, _, processor_name = CLASSES[config.model_type]
    if processor_name:  # first, because it is quick
        tokenizer = load_tokenizer(described, where)
    model = load_without_processor(described, flag)
    image_processor, of_processor = load_image_processor(described, flag)
    tower = image_tower(model)[0].config
    patch = getattr(image_processor, "patch_size", None)  # SigLIP 2's processor has one
    if patch is not None and patch != tower.patch_size:
        sizes = f"patches of {patch} px, the model takes {tower.patch_size} px"
        raise UserError(f"{where}: {of_processor} makes {sizes}; correct its patch_size")
    if name.image_size is not None:
        with _refusing(f"{where}: --image_size {name.image_size}"):
            image_processor = resized_processor(image_processor, name.image_size)
        if grids := resize_tower(model, name.image_size):
            before, after = (f"{side} x {side}" for side in grids)
            say_once(f"{name}: positions interpolated from {before} to {after} patches, by --image_size")
    # The other towers interpolate their position embeddings or have none.
    size = image_size(image_processor)
    if tower.model_type in FIXED_POSITIONS and size != tower.image_size:
        sizes = f"{size} px, the model takes {tower.image_size} px"
        raise UserError(f"{where}: {of_processor} gives {sizes}; correct its crop_size, or give --image_size")
    if processor_name and not 0 < (scale := logit_scale(model)) < math.inf:
        fault = f"exp(logit_scale) is {scale:g}, the logits of all classes would be alike or infinite"
        raise UserError(f"{where}: {_weights_file(name.path, 'logit_scale')}: {fault}; CLIP's is at most 100")
    if silenced := switch_off_randomness(model):
        say_once(
            f"{name}: {', '.join(silenced)} would make training random: switched off here, the saved config keeps them"
        )
    if not processor_name:
        return model, image_processor
    return model, getattr(transformers, processor_name)(image_processor=image_processor, tokenizer=tokenizer)


def load_without_processor(described: Described, flag: str) -> PreTrainedModel:
    """The model with its weights, which are those of the file and, beside an image tower alone, of the base model."""
    name, config, where = described.name, described.config, f"{flag} {described.name}"
    if described.layout.kind == "transformers":
        model_class = getattr(transformers, CLASSES[config.model_type][0])
        model_class = Dinov2ForImageClassification if has_own_head(config) else model_class
        return load_weights(model_class, name.path, flag, config)
    file, state = folder_of(name) / described.layout.file, described.state
    if state is None:
        state, _ = read_state(file, where)
    converted, form = state, dict[str, Tensor]()
    if open_clip.in_open_clip_names(state):
        try:
            converted = open_clip.to_transformers(state, config, OPEN_CLIP_CONFIG)
        except ValueError as error:
            raise UserError(f"{where}: {file.name}: {error}; give the config of these weights") from None
        form = {key: tensor.to("meta") for key, tensor in state.items()}
    if not open_clip.holds_text(state):
        if described.layout.kind == "open_clip":
            raise UserError(f"{where}: {file.name}: an image tower alone, by {OPEN_CLIP_CONFIG} a whole CLIP; give all")
        base: Any = load_without_processor(describe(name.base, "--base_model"), "--base_model")
        converted, form = base.state_dict() | converted, getattr(base, "open_clip_form", {}) | form
    model: Any = load_weights(open_clip.model_class(config), file, flag, config, converted)
    model.open_clip_form = form
    return model


def load_weights(
    model_class: type[PreTrainedModel],
    name_or_path: str | Path,
    flag: str,
    config: PreTrainedConfig | None = None,
    state: State | None = None,
) -> PreTrainedModel:
    """A float32 model, whole even under ZeRO-3. Raises ``UserError`` if it does not load or lacks weights.

    ``state``: the weights in the model's own names, in place of those in the directory.
    """
    where = f"{flag} {name_or_path}"
    for path in Path(name_or_path).glob("*.[sb]*") if state is None else ():  # .safetensors, .bin
        _refuse_pointer(path, f"{where}: {path.name}")
    with _refusing(f"{where}: the model does not load"), unpartitioned():
        loaded: Any = model_class.from_pretrained(
            None if state is not None else name_or_path,
            config=copy.deepcopy(config),
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the name
            state_dict=state,
        )
    model, info = loaded
    lacking = sorted(name for name in info["missing_keys"] if not name.endswith("mask_token"))
    with_projection = isinstance(model, transformers.CLIPVisionModelWithProjection)
    if with_projection and "visual_projection.weight" in lacking:  # saved without projection
        return load_weights(transformers.CLIPVisionModel, name_or_path, flag, config, state)
    for name, fault in _weight_faults(model, info):
        raise UserError(f"{where}: {_weights_file(name_or_path, name)}: {name} {fault}")
    if lacking:  # transformers would fill them with random values
        kind = f"{len(lacking)} weights of a {model.config.model_type}"
        expected = "expected a directory saved by save_pretrained"
        raise UserError(f"{where}: {kind} are missing, the first is {lacking[0]}; {expected}")
    return model


def _refuse_pointer(path: Path, where: str) -> None:
    with os_errors(f"{where}: cannot be read", "check the file"), path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{where} is a pointer of Git LFS, not the file itself; run `git lfs pull`")


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


# ----------------------------------------------------------------------------------------------------------- input size


def set_image_size(config: PreTrainedConfig, side: int) -> None:
    """Changes the side of the images in a model's config, where it says it."""
    tower = getattr(config, "vision_config", config)
    if tower.model_type in SIZED:
        tower.image_size = side


def resize_tower(model: PreTrainedModel, side: int) -> tuple[int, int] | None:
    """Makes the image tower take images of ``side`` pixels, in place, and its config say so.

    Fixed positions are interpolated. Returns the sides of their grid before and after, or None if they stay.
    """
    tower, _ = image_tower(model)
    patch, before = tower.config.patch_size, getattr(tower.config, "image_size", side)
    for config in (model.config, tower.config):
        set_image_size(config, side)
    if tower.config.model_type not in FIXED_POSITIONS or side == before:
        return None
    embeddings = tower.get_submodule("embeddings")
    state = embeddings.state_dict()
    name = "position_embedding.weight" if "position_embedding.weight" in state else "position_embeddings"  # a ViT's
    table = interpolate_positions(state[name].flatten(0, -2), side // patch)
    state[name] = table.expand(*state[name].shape[:-2], -1, -1)  # a ViT's is (1, T, D)
    with torch.random.fork_rng(devices=[]), unpartitioned():  # it draws weights, which are replaced
        resized = type(embeddings)(tower.config)
    resized.load_state_dict(state)
    tower.embeddings = resized.train(embeddings.training)
    form = getattr(model, "open_clip_form", {})
    if (of_form := form.get(open_clip.POSITIONS)) is not None:
        form[open_clip.POSITIONS] = of_form.new_empty(state[name].shape)
    return None if before // patch == side // patch else (before // patch, side // patch)


def interpolate_positions(positions: Tensor, grid: int) -> Tensor:
    """Embeddings of P x P positions, maybe after a class token's -> those of grid x grid, float32.

    (P * P, D) or (1 + P * P, D) -> (grid * grid, D) or (1 + grid * grid, D). Bicubic with antialiasing; the class
    token's stays. Source: open_clip's resize_pos_embed.
    """
    before = math.isqrt(len(positions))
    others, patches = positions.split([len(positions) - before * before, before * before])
    if grid == before:
        return positions
    patches = patches.unflatten(0, (before, before)).permute(2, 0, 1)[None]
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([others, patches[0].flatten(1).T])


# ------------------------------------------------------------------------------------------------------------ processor


def check_processor(name: ModelName, config: PreTrainedConfig, flag: str) -> None:
    """Raises ``UserError`` if neither a local model nor what completes it has a processor. Opens none."""
    if has_text(config) and tokenizer_folder(name) is None:
        raise _lacks_tokenizer(name, config, f"{flag} {name}")
    folders = [folder for folder in (name.path, name.processor) if folder is not None]
    alone = name.base_model is None and layout(name, flag).kind == "transformers"
    if alone and not any(map(image_processor_file, folders)):
        raise _lacks_image_processor(name, flag)


def _lacks_tokenizer(name: ModelName, config: PreTrainedConfig, where: str) -> UserError:
    advice = "name the id or directory of one by --processor"
    advice += f"; most CLIPs take that of {CLIP_TOKENIZER}" if config.text_config.model_type == CLIP else ""
    return UserError(f"{where}: holds no tokenizer{_nor_processor(name)}; {advice}")


def _lacks_image_processor(name: ModelName, flag: str) -> UserError:
    advice = "name the id or directory of one by --processor, such as openai/clip-vit-large-patch14"
    where = f"{flag} {name}: preprocessor_config.json"
    return UserError(f"{where}: no image processor{_nor_processor(name)}; {advice}")


def _nor_processor(name: ModelName) -> str:
    return "" if name.processor is None else f", nor does --processor {name.processor}"


def load_tokenizer(described: Described, where: str) -> Any:
    """The tokenizer among the model's files, or else of --processor, or else of the base model. ``UserError``."""
    folder = tokenizer_folder(described.name)
    if folder is None:
        raise _lacks_tokenizer(described.name, described.config, where)
    own = folder == str(folder_of(described.name))
    with _refusing(f"{where}: " + ("the model does not load" if own else f"the tokenizer of {folder}")):
        # Beside open_clip's files config.json may be timm's, which transformers would try to read.
        config = None if _is_of_transformers(Path(folder) / CONFIG) else transformers.CLIPConfig()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
        check_tokenizer(tokenizer, described.config)
    return tokenizer


def tokenizer_folder(name: ModelName) -> str | None:
    """The directory of a local model's tokenizer, which may be another model's."""
    own, path = str(folder_of(name)), Path(name.path)
    if (path.is_dir() or _is_of_open_clip_folder(path)) and _has_tokenizer(own):
        return own
    if name.processor is not None and _has_tokenizer(name.processor):
        return name.processor
    of_base = name.base_model is not None and os.path.isdir(name.base_model)
    return (tokenizer_folder(dataclasses.replace(name.base, processor=None)) if of_base else None) or name.tokenizer


def load_image_processor(described: Described, flag: str) -> tuple[Any, str]:
    """The image processor, on Pillow, and what to call it: the model's own, or --processor's, or the base model's.

    In open_clip's layouts it is CLIP's with the mean and std of the config, by default OpenAI's.
    """
    name, config = described.name, described.config
    own = "its image processor"
    if described.preprocess is not None:
        fields = {"image_mean": open_clip.OPENAI_MEAN, "image_std": open_clip.OPENAI_STD}
        fields |= {f"image_{key}": described.preprocess[key] for key in ("mean", "std") if key in described.preprocess}
        with _refusing(f"{flag} {name}: preprocess_cfg"):
            image_processor: Any = clip_image_processor(config.vision_config.image_size, **fields)
            pixel_normalisation(image_processor)
    elif described.layout.kind == "transformers" and image_processor_file(name.path) is not None:
        return read_image_processor(name.path, config.model_type, flag), own
    elif name.processor is not None and image_processor_file(name.processor) is not None:
        own = f"the image processor of {name.processor}"
        image_processor = read_image_processor(name.processor, config.model_type, "--processor")
    elif name.base_model is not None:
        base = describe(dataclasses.replace(name.base, processor=None), "--base_model")
        image_processor, _ = load_image_processor(base, "--base_model")
        own = f"the image processor of {name.base_model}"
    else:
        raise _lacks_image_processor(name, flag)
    if described.rounds_even or hasattr(image_processor, CROP_ROUNDING):
        setattr(image_processor, CROP_ROUNDING, "even" if described.rounds_even else "floor")
    return image_processor, own


def clip_image_processor(side: int, image_mean: Any, image_std: Any) -> CLIPImageProcessorPil:
    crop = {"height": side, "width": side}
    size = {"shortest_edge": side}
    return CLIPImageProcessorPil(size=size, crop_size=crop, resample=3, image_mean=image_mean, image_std=image_std)


def read_image_processor(folder: str, model_type: str, flag: str) -> Any:
    """A directory's image processor, on Pillow. Raises ``UserError`` for one that ``ImageTransform`` does not cover."""
    file = image_processor_file(folder) or Path("preprocessor_config.json")
    where = f"{flag} {folder}: {file.name}"
    with _refusing(f"{where}: no image processor, expected one saved by save_pretrained"):
        found, _ = CLIPImageProcessorPil.get_image_processor_dict(folder)
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
    """Writes the processor's files. If it cannot be saved, copies those it was loaded from, with a warning.

    The image processor is never copied: it may be another than the source's, by its layout or by --image_size.
    """
    try:
        processor.save_pretrained(directory)
    except Exception as error:
        source = Path(str(model.name_or_path or getattr(processor, "tokenizer", processor).name_or_path or os.devnull))
        files = [path for pattern in PROCESSOR_FILES for path in source.glob(pattern) if path.is_file()]
        files = [path for path in files if path.name not in IMAGE_PROCESSOR_FILES]
        if not files and isinstance(error, OSError):  # the disk cannot be written
            raise
        for path in files:
            shutil.copyfile(path, directory / path.name)
        getattr(processor, "image_processor", processor).to_json_file(directory / "preprocessor_config.json")
        rest = f"{len(files)} files of {source} stand in" if files else "take those of the model before training"
        line = "%s: the processor's files cannot be written (%s); %s"
        logger.warning(line, directory, _reason(error)[:160], printable(rest))


def export_open_clip(
    directory: Path, source: Path, flag: str, form: State | None = None, custom_text: bool = False
) -> list[str]:
    """Writes the model of ``source``, in transformers' layout, in open_clip's; the two directories may be the same.

    The rest is as for ``write_open_clip``.
    """
    described = describe(ModelName(str(source), str(source)), flag, OPEN_CLIP_MODEL_TYPES)
    config, where = described.config, f"{flag} {source}"
    image_processor, _ = load_image_processor(described, flag)
    not_there = directory != source and config.text_config.vocab_size != open_clip.CLIP_VOCABULARY
    tokenizer = load_tokenizer(described, where) if not_there else None
    model = load_weights(open_clip.model_class(config), source, flag, config)
    return write_open_clip(directory, model, image_processor, tokenizer, where, form, custom_text)


def write_open_clip(
    directory: Path,
    model: PreTrainedModel,
    image_processor: Any,
    tokenizer: Any,
    where: str,
    form: State | None = None,
    custom_text: bool = False,
) -> list[str]:
    """Writes a model in open_clip's layout. Returns what a user of open_clip has to know. Raises ``UserError``.

    ``tokenizer``: written too if open_clip does not have it; None if it is in ``directory`` already. ``form``: names,
    dtypes and shapes that the tensors get, of the file that the model came from. ``custom_text``: put the text tower
    under text. all the same.
    """
    fields = open_clip_fields(model.config, where)
    mean, std = pixel_normalisation(image_processor)
    with _refusing(where):
        prefix = "text." if custom_text else ""
        state = open_clip.to_open_clip(model.state_dict(), model.config, form, prefix)
    notes = []
    if open_clip.text_prefix(state):
        fields["custom_text"] = True
    if model.config.text_config.vocab_size != open_clip.CLIP_VOCABULARY:
        # Any text makes open_clip take the tokenizer of a "local-dir:". The directory's name is not final yet.
        fields["text_cfg"]["hf_tokenizer_name"] = "<id of the repository>"
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        note = "its tokenizer is not open_clip's own: it is among the files, and open_clip takes it from there; for the"
        notes.append(f"{note} hub set hf_tokenizer_name in {OPEN_CLIP_CONFIG} to the repository's id")
    if any(tensor.dtype != torch.float32 for tensor in state.values()):
        notes.append("some tensors are in half precision, as they came")
    save_file(state, directory / OPEN_CLIP_FILES[0], metadata={"format": "pt"})
    about = {"model_cfg": fields, "preprocess_cfg": {"mean": mean, "std": std}}
    (directory / OPEN_CLIP_CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return notes


def open_clip_fields(config: PreTrainedConfig, where: str) -> dict[str, Any]:
    """The model config in open_clip's file. Raises ``UserError`` for a model that open_clip does not have."""
    if config.model_type not in OPEN_CLIP_MODEL_TYPES:
        raise UserError(f"{where}: a {config.model_type}; in open_clip's layout are {', '.join(OPEN_CLIP_MODEL_TYPES)}")
    try:
        return open_clip.to_model(config)
    except ValueError as error:
        raise UserError(f"{where}: {error}; it has no place in open_clip's layout") from None


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
