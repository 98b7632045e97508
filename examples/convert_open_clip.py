r"""Converts a CLIP from open_clip's layout to Hugging Face's or back; the model stays the same, bit by bit.

    python examples/convert_open_clip.py --to transformers --input open_clip_model.safetensors --activation gelu \
      --output_dir models/laion-b32
    python examples/convert_open_clip.py --to open_clip --input runs/lore4 --output_dir runs/lore4-open-clip

From open_clip the input is a state dict (.safetensors, or .pt or .bin, read for tensors only), or a folder with one.
open_clip_config.json is read if it is beside the state dict. The output is a directory with config.json,
model.safetensors, processor and tokenizer; or with open_clip_model.safetensors and open_clip_config.json, for
open_clip.create_model("local-dir:<directory>"). ViT towers become a CLIPModel, ConvNeXt towers a
VisionTextDualEncoderModel. Sizes are read from the weights. Flags give the rest: the activation, the image size of a
ConvNeXt, and the number of heads if open_clip has no tower of this width. Weights are written as float32.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import flag, parse_settings, required, run
from utils.data.images import normalisation_of_file
from utils.errors import UserError
from utils.models.hub import model_folder
from utils.models.published import check_model, load_weights, quiet_transformers
from utils.text_files import parse_json
from utils.training.checkpoint import replace_directory

OPENAI_MEAN, OPENAI_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
STATE_FILE, CONFIG_FILE = "open_clip_model.safetensors", "open_clip_config.json"
STATE_FILES = (STATE_FILE, "open_clip_pytorch_model.bin")  # the names on the hub
DUAL_ENCODER = "vision-text-dual-encoder"
CLIP_VOCABULARY = 49408
HIGHEST_ID = 2  # because of old configs, transformers reads this eos_token_id as "the highest id of the text"
# Entries that the model does not need and that are not converted; OpenAI's archives have the last three.
BUFFERS = {"attn_mask", "text.attn_mask", "input_resolution", "context_length", "vocab_size"}
# Widths of image towers whose heads are not 64 wide: open_clip's H, g, bigG and e. All of them have 16 heads.
SIXTEEN_HEADS = (1280, 1408, 1664, 1792)
# timm's name -> (depths, hidden sizes), for open_clip_config.json.
CONVNEXTS = {
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnext_xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}
XXLARGE = ((3, 4, 30, 3), (384, 768, 1536, 3072))

ONLY_FROM_OPEN_CLIP = ("activation", "vision_heads", "text_heads", "image_size", "image_mean", "image_std")

State = dict[str, Tensor]


conversion_required = partial(required, group="conversion")
from_open_clip_flag = partial(flag, group="open_clip to transformers")


@dataclass
class Settings:
    to: str = conversion_required("transformers or open_clip: the layout that is written")
    input: str = conversion_required(
        "to transformers: a state dict of open_clip, or a folder with one; to open_clip: a directory that "
        "from_pretrained loads",
        path=True,
    )
    output_dir: str = conversion_required("where the model goes", path=True)
    activation: str | None = from_open_clip_flag(
        None,
        "quick_gelu (OpenAI's weights, and names with -quickgelu) or gelu (LAION's and most others)",
        choices=("quick_gelu", "gelu"),
    )
    vision_heads: int | None = from_open_clip_flag(
        None,
        "attention heads of the image tower (default: width / 64; 16 for widths 1280, 1408, 1664, 1792)",
        minimum=1,
    )
    text_heads: int | None = from_open_clip_flag(
        None, "attention heads of the text tower (default: width / 64)", minimum=1
    )
    image_size: int | None = from_open_clip_flag(
        None, "side of the images in pixels, for a ConvNeXt; a ViT's follows from its weights", minimum=1
    )
    image_mean: list[float] = from_open_clip_flag([], "of the normalisation, three numbers (default: OpenAI's)")
    image_std: list[float] = from_open_clip_flag([], "of the normalisation, three numbers (default: OpenAI's)")
    tokenizer: str = from_open_clip_flag(
        "openai/clip-vit-base-patch32", "Hugging Face id or directory with the tokenizer", path=True
    )
    custom_text: bool = flag(
        False,
        "put the text tower under text., as open_clip's CustomTextCLIP has it",
        group="transformers to open_clip",
    )


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    output_dir = Path(settings.output_dir)
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise UserError(f"--output_dir {output_dir}: exists and is not an empty directory; give another one")
    if settings.to not in ("transformers", "open_clip"):
        raise UserError(f"--to {settings.to}: expected transformers or open_clip")
    other_way = ("custom_text",) if settings.to == "transformers" else ONLY_FROM_OPEN_CLIP
    for name in other_way:
        if getattr(settings, name):
            raise UserError(f"--{name}: has no meaning with --to {settings.to}; leave it out")
    for name in ("image_mean", "image_std"):
        if len(getattr(settings, name)) not in (0, 3):
            raise UserError(f"--{name}: {len(getattr(settings, name))} numbers; expected three: red, green, blue")
    if any(value <= 0 for value in settings.image_std):
        raise UserError("--image_std: expected three numbers above 0")
    write = prepare_transformers(settings) if settings.to == "transformers" else prepare_open_clip(settings)
    aside = output_dir.with_name(f".{output_dir.name}.incomplete")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # left by a killed run
        aside.mkdir(parents=True)
        write(aside)
        if output_dir.exists():
            output_dir.rmdir()
        replace_directory(aside, output_dir)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"--output_dir {output_dir}: cannot be written ({error.strerror})") from None


def prepare_transformers(settings: Settings) -> Callable[[Path], None]:
    """Converts in memory, so that errors come before anything is written; returns the function that writes."""
    source = state_file(Path(settings.input))
    known = read_open_clip_config(source.parent / CONFIG_FILE)
    activation = settings.activation or known.get("activation")
    if activation is None:
        raise UserError(
            "--activation: missing, and the weights do not show it; quick_gelu for OpenAI's weights and names with "
            "-quickgelu, gelu for others"
        )
    state = read_state(source)
    config, converted = to_transformers(
        state,
        activation=activation,
        vision_heads=settings.vision_heads or known.get("vision_heads"),
        text_heads=settings.text_heads or known.get("text_heads"),
        image_size=settings.image_size or known.get("image_size"),
        eos_token_id=known.get("eos_token_id"),
    )
    tokenizer = load_tokenizer(settings.tokenizer, config.text_config)
    side = config.vision_config.image_size
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=3,
        image_mean=settings.image_mean or known.get("image_mean", OPENAI_MEAN),
        image_std=settings.image_std or known.get("image_std", OPENAI_STD),
    )
    model = build(config, converted)
    dual = config.model_type == DUAL_ENCODER
    processor = (VisionTextDualEncoderProcessor if dual else CLIPProcessor)(image_processor, tokenizer)

    def write(directory: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(directory)
            processor.save_pretrained(directory)
        count = sum(tensor.numel() for tensor in converted.values())
        print(f"{settings.output_dir}: {type(model).__name__}, {count:,} parameters, {side} px, {activation}")

    return write


def prepare_open_clip(settings: Settings) -> Callable[[Path], None]:
    """Converts in memory, so that errors come before anything is written; returns the function that writes."""
    folder = model_folder(settings.input, "--input", ("clip", DUAL_ENCODER))
    config = check_model(str(folder), "--input", ("clip", DUAL_ENCODER))
    described = open_clip_config(config, settings.custom_text, processor_normalisation(folder))
    model = load_weights(_model_class(config), folder, "--input")
    state = to_open_clip(model.state_dict(), text_prefix="text." if settings.custom_text else "")

    def write(directory: Path) -> None:
        save_file(state, directory / STATE_FILE, metadata={"format": "pt"})
        if described is not None:
            (directory / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        print(f"{settings.output_dir}: {len(state)} tensors")
        if described is None:
            print(f"no {CONFIG_FILE}: this ConvNeXt is none of timm's by its sizes")
        if config.text_config.vocab_size != CLIP_VOCABULARY:
            print(f"the vocabulary is not CLIP's: tokenize with the tokenizer of {settings.input}")

    return write


# ------------------------------------------------------------------------------------------------------- names and bits


class Pair(NamedTuple):
    """The name of a tensor in open_clip, and its name or names in transformers."""

    open_clip: str
    transformers: tuple[str, ...]  # three names: query, key and value, the thirds of its first dimension
    transposed: bool = False


class Depths(NamedTuple):
    """Numbers of blocks of the towers. For the image tower a ViT has one number, a ConvNeXt one per stage."""

    vision: tuple[int, ...]
    text: int
    convnext: bool


def name_pairs(depths: Depths, text_prefix: str) -> list[Pair]:
    """The names of all tensors in both layouts. They match one to one, so the two conversions are inverses."""
    image_tower = _convnext_pairs(depths.vision) if depths.convnext else _vit_pairs(depths.vision[0])
    text = text_prefix
    return [
        *image_tower,
        Pair(f"{text}token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
        Pair(f"{text}positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
        *_block_pairs(f"{text}transformer", "text_model", depths.text),
        *_both(f"{text}ln_final", "text_model.final_layer_norm"),
        Pair(f"{text}text_projection", ("text_projection.weight",), transposed=True),
        Pair("logit_scale", ("logit_scale",)),
    ]


def _both(open_clip: str, transformers: str) -> Iterator[Pair]:
    for part in ("weight", "bias"):
        yield Pair(f"{open_clip}.{part}", (f"{transformers}.{part}",))


def _vit_pairs(depth: int) -> Iterator[Pair]:
    embeddings = "vision_model.embeddings"
    yield Pair("visual.conv1.weight", (f"{embeddings}.patch_embedding.weight",))
    yield Pair("visual.class_embedding", (f"{embeddings}.class_embedding",))
    yield Pair("visual.positional_embedding", (f"{embeddings}.position_embedding.weight",))
    yield from _both("visual.ln_pre", "vision_model.pre_layrnorm")  # transformers' spelling
    yield from _block_pairs("visual.transformer", "vision_model", depth)
    yield from _both("visual.ln_post", "vision_model.post_layernorm")
    yield Pair("visual.proj", ("visual_projection.weight",), transposed=True)


def _block_pairs(open_clip: str, transformers: str, depth: int) -> Iterator[Pair]:
    for number in range(depth):
        there, here = f"{open_clip}.resblocks.{number}", f"{transformers}.encoder.layers.{number}"
        for part in ("weight", "bias"):
            thirds = tuple(f"{here}.self_attn.{name}_proj.{part}" for name in "qkv")
            yield Pair(f"{there}.attn.in_proj_{part}", thirds)
        yield from _both(f"{there}.attn.out_proj", f"{here}.self_attn.out_proj")
        yield from _both(f"{there}.ln_1", f"{here}.layer_norm1")
        yield from _both(f"{there}.ln_2", f"{here}.layer_norm2")
        yield from _both(f"{there}.mlp.c_fc", f"{here}.mlp.fc1")
        yield from _both(f"{there}.mlp.c_proj", f"{here}.mlp.fc2")


def _convnext_pairs(depths: tuple[int, ...]) -> Iterator[Pair]:
    trunk, tower = "visual.trunk", "vision_model"
    yield from _both(f"{trunk}.stem.0", f"{tower}.embeddings.patch_embeddings")
    yield from _both(f"{trunk}.stem.1", f"{tower}.embeddings.layernorm")
    for stage, depth in enumerate(depths):
        for part in (0, 1) if stage else ():
            yield from _both(
                f"{trunk}.stages.{stage}.downsample.{part}", f"{tower}.encoder.stages.{stage}.downsampling_layer.{part}"
            )
        for block in range(depth):
            there, here = f"{trunk}.stages.{stage}.blocks.{block}", f"{tower}.encoder.stages.{stage}.layers.{block}"
            yield Pair(f"{there}.gamma", (f"{here}.layer_scale_parameter",))
            yield from _both(f"{there}.conv_dw", f"{here}.dwconv")
            yield from _both(f"{there}.norm", f"{here}.layernorm")
            yield from _both(f"{there}.mlp.fc1", f"{here}.pwconv1")
            yield from _both(f"{there}.mlp.fc2", f"{here}.pwconv2")
    yield from _both(f"{trunk}.head.norm", f"{tower}.layernorm")
    yield Pair("visual.head.proj.weight", ("visual_projection.weight",))


def to_transformers(
    state: State,
    *,
    activation: str,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    image_size: int | None = None,
    eos_token_id: int | None = None,
) -> tuple[PreTrainedConfig, State]:
    """open_clip's state dict -> the config and the state dict of a ``CLIPModel`` or a ``VisionTextDualEncoderModel``.

    Args:
        state: of a model with open_clip's ViT or timm's ConvNeXt as image tower. Its dtype is kept.
        activation: of the blocks, "gelu" or "quick_gelu"; a ConvNeXt's own is always gelu.
        vision_heads, text_heads: see the flags of the same names.
        image_size: in pixels, only for a ConvNeXt.
        eos_token_id: the token at which the text is pooled, if it is not the highest id of the vocabulary.

    Raises ``UserError`` for a missing or unknown key, a shape that does not match, and a value that a flag must give.
    """
    state = {name: tensor for name, tensor in state.items() if name not in BUFFERS}
    text_prefix = "text." if "text.token_embedding.weight" in state else ""
    depths = _open_clip_depths(state, text_prefix)
    converted: State = {}
    left = dict(state)
    for pair in name_pairs(depths, text_prefix):
        tensor = _take(left, pair.open_clip, "the state dict", f"an open_clip {_kind(depths)}")
        count = len(pair.transformers)
        if (pair.transposed and tensor.ndim != 2) or (count > 1 and (tensor.ndim == 0 or len(tensor) % count)):
            raise UserError(f"{pair.open_clip} is {tuple(tensor.shape)}; expected {_expected(pair)}")
        tensor = tensor.T if pair.transposed else tensor
        parts = tensor.chunk(count) if count > 1 else (tensor,)
        converted |= {
            name: part.clone(memory_format=torch.contiguous_format) for name, part in zip(pair.transformers, parts)
        }
    _refuse_unknown(left, "the state dict", f"an open_clip {_kind(depths)}")
    if converted["logit_scale"].numel() == 1:  # some checkpoints have the shape (1,)
        converted["logit_scale"] = converted["logit_scale"].reshape(())
    try:
        config = _config(converted, depths, activation, vision_heads, text_heads, image_size, eos_token_id)
    except (
        ValueError,
        IndexError,
        TypeError,
    ) as error:  # raised for shapes that cannot be unpacked, and by the configs' own checks
        raise UserError(
            f"the shapes of the state dict are no model's: {str(error)[:160]}; the file is damaged"
        ) from None
    _check_shapes(config, converted)
    return config, converted


def to_open_clip(state: State, *, text_prefix: str = "") -> State:
    """The inverse of ``to_transformers``: a state dict of transformers becomes open_clip's.

    state: of a ``CLIPModel`` or a ``VisionTextDualEncoderModel``.
    text_prefix: "text." for the layout of CustomTextCLIP. Raises ``UserError`` for keys that are missing or unknown.
    """
    left = {name: tensor for name, tensor in state.items() if not name.endswith("embeddings.position_ids")}
    depths = _transformers_depths(left)
    converted: State = {}
    for pair in name_pairs(depths, text_prefix):
        parts = [_take(left, name, "the model", f"a {_kind(depths)}") for name in pair.transformers]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        tensor = tensor.T if pair.transposed else tensor
        converted[pair.open_clip] = tensor.clone(memory_format=torch.contiguous_format)
    _refuse_unknown(left, "the model", f"a {_kind(depths)}")
    return converted


def _expected(pair: Pair) -> str:
    return "a matrix" if pair.transposed else "query, key and value one upon another"


def _kind(depths: Depths) -> str:
    return "CLIP with a ConvNeXt" if depths.convnext else "CLIP with a ViT"


def _take(left: State, name: str, where: str, what: str) -> Tensor:
    if name not in left:
        raise UserError(f"{where} lacks {name}; expected all tensors of {what}")
    return left.pop(name)


def _refuse_unknown(left: State, where: str, what: str) -> None:
    if left:
        names = sorted(left)
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{where} holds {names[0]}{others}, which {what} has not; this architecture is not converted")


def _count(state: State, pattern: str) -> int:
    """1 + the largest number that ``pattern`` finds in the names; 1 if none, so a later error names the first key."""
    return max((int(match[1]) + 1 for name in state if (match := re.match(pattern, name))), default=1)


def _open_clip_depths(state: State, text_prefix: str) -> Depths:
    text = _count(state, rf"{re.escape(text_prefix)}transformer\.resblocks\.(\d+)\.")
    if any(name.startswith("visual.trunk.stages.") for name in state):
        stages = _count(state, r"visual\.trunk\.stages\.(\d+)\.")
        return Depths(_stage_depths(state, r"visual\.trunk\.stages\.{}\.blocks\.(\d+)\.", stages), text, True)
    return Depths((_count(state, r"visual\.transformer\.resblocks\.(\d+)\."),), text, False)


def _transformers_depths(state: State) -> Depths:
    text = _count(state, r"text_model\.encoder\.layers\.(\d+)\.")
    if any(name.startswith("vision_model.encoder.stages.") for name in state):
        stages = _count(state, r"vision_model\.encoder\.stages\.(\d+)\.")
        return Depths(_stage_depths(state, r"vision_model\.encoder\.stages\.{}\.layers\.(\d+)\.", stages), text, True)
    return Depths((_count(state, r"vision_model\.encoder\.layers\.(\d+)\."),), text, False)


def _stage_depths(state: State, pattern: str, stages: int) -> tuple[int, ...]:
    return tuple(_count(state, pattern.format(stage)) for stage in range(stages))


# ---------------------------------------------------------------------------------------------------------------- sizes


def _config(
    state: State,
    depths: Depths,
    activation: str,
    vision_heads: int | None,
    text_heads: int | None,
    image_size: int | None,
    eos_token_id: int | None,
) -> PreTrainedConfig:
    """The config that follows from the shapes in ``state``, whose keys are transformers' names."""
    vocab_size, text_width = state["text_model.embeddings.token_embedding.weight"].shape
    projection_dim = len(state["text_projection.weight"])
    # open_clip pools the text at its highest id. That is the end of text, the last id of CLIP's vocabulary.
    eos_token_id = vocab_size - 1 if eos_token_id is None else eos_token_id
    if eos_token_id == HIGHEST_ID != vocab_size - 1:
        raise UserError(
            f"the text is pooled at id {HIGHEST_ID}, which transformers' CLIPTextModel reads as the highest id of a "
            "text; this model cannot be said in its config"
        )
    text_config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=text_width,
        intermediate_size=len(state["text_model.encoder.layers.0.mlp.fc1.weight"]),
        projection_dim=projection_dim,
        num_hidden_layers=depths.text,
        num_attention_heads=_heads(text_width, text_heads, "--text_heads"),
        max_position_embeddings=len(state["text_model.embeddings.position_embedding.weight"]),
        hidden_act=activation,
        bos_token_id=vocab_size - 2,
        eos_token_id=eos_token_id,
        # The forward does not use it. CLIP's tokenizer pads with the highest id.
        pad_token_id=vocab_size - 1,
    )
    if depths.convnext:
        vision_config = _convnext_config(state, depths, image_size)
        return VisionTextDualEncoderConfig.from_vision_text_configs(
            vision_config, text_config, projection_dim=projection_dim
        )
    vision_width, _, patch_size, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    positions = len(state["vision_model.embeddings.position_embedding.weight"]) - 1
    grid = math.isqrt(positions)
    if grid * grid != positions:
        raise UserError(f"visual.positional_embedding has {positions} patches; expected a square of patches")
    if image_size not in (None, grid * patch_size):
        raise UserError(
            f"--image_size {image_size}: the weights are for {grid * patch_size} px, {grid} x {grid} patches of "
            f"{patch_size}; leave it out"
        )
    vision_config = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=len(state["vision_model.encoder.layers.0.mlp.fc1.weight"]),
        projection_dim=projection_dim,
        num_hidden_layers=depths.vision[0],
        num_attention_heads=_heads(
            vision_width, vision_heads or (16 if vision_width in SIXTEEN_HEADS else None), "--vision_heads"
        ),
        image_size=grid * patch_size,
        patch_size=patch_size,
        hidden_act=activation,
    )
    return CLIPConfig(
        vision_config=vision_config.to_dict(), text_config=text_config.to_dict(), projection_dim=projection_dim
    )


def _convnext_config(state: State, depths: Depths, image_size: int | None) -> ConvNextConfig:
    if image_size is None:
        raise UserError(
            "--image_size: missing, and a ConvNeXt's weights do not show it; 256 for convnext_base_w, "
            "320 for convnext_base_w_320"
        )
    sizes = [
        len(state[f"vision_model.encoder.stages.{stage}.layers.0.dwconv.weight"]) for stage in range(len(depths.vision))
    ]
    if (depths.vision, tuple(sizes)) == XXLARGE:
        raise UserError(
            "convnext_xxlarge: its layer norms have eps 1e-5, transformers' ConvNextModel has 1e-6; not converted"
        )
    return ConvNextConfig(
        hidden_sizes=sizes,
        depths=list(depths.vision),
        num_stages=len(sizes),
        patch_size=state["vision_model.embeddings.patch_embeddings.weight"].shape[-1],
        hidden_act="gelu",
        # This sets only the last norm; the others use 1e-6, as in timm, in any case.
        layer_norm_eps=1e-6,
        image_size=image_size,
        # VisionTextDualEncoderModel needs this, and ConvNextConfig does not set it itself.
        hidden_size=sizes[-1],
    )


def _heads(width: int, heads: int | None, its_flag: str) -> int:
    if heads is None:
        if width % 64:
            raise UserError(
                f"{its_flag}: missing; the tower is {width} wide, no multiple of 64 and no width of open_clip's own"
            )
        return width // 64
    if width % heads:
        raise UserError(f"{its_flag} {heads}: the tower is {width} wide, which {heads} heads do not share evenly")
    return heads


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    return VisionTextDualEncoderModel if config.model_type == DUAL_ENCODER else CLIPModel


def _check_shapes(config: PreTrainedConfig, state: State) -> None:
    with torch.device("meta"):
        expected = _model_class(config)(config).state_dict()
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise UserError(
                f"{name} (its name in transformers) is {tuple(state[name].shape)}; the other tensors ask for "
                f"{tuple(tensor.shape)}"
            )


def build(config: PreTrainedConfig, state: State) -> PreTrainedModel:
    """The model with these weights as float32. Raises ``UserError`` if a weight is not finite."""
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} (its name in transformers) is not finite; the file is damaged")
    model = _model_class(config)(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True, assign=True)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------- files


def state_file(path: Path) -> Path:
    """The path of the state dict: the file itself, or the one in a folder. Raises ``UserError``."""
    if path.is_file():
        return path
    for name in STATE_FILES if path.is_dir() else ():
        if (path / name).is_file():
            return path / name
    raise UserError(
        f"--input {path}: {'holds neither ' + ' nor '.join(STATE_FILES) if path.is_dir() else 'no such file'}; "
        "expected a state dict of open_clip (.safetensors, .pt, .bin)"
    )


def read_state(path: Path) -> State:
    """Reads a state dict of safetensors or torch.save, also from a training checkpoint. Raises ``UserError``."""
    try:
        if path.suffix == ".safetensors":
            loaded = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # from safetensors, torch, zipfile or pickle, depending on the damage
        if "TorchScript" in str(error):
            raise UserError(
                f"--input {path}: a TorchScript archive, which holds code; give the same weights as safetensors"
            ) from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"--input {path}: cannot be read as tensors alone ({reason}); give safetensors") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise UserError(f"--input {path}: holds a {type(loaded).__name__}; expected a state dict of open_clip")
    loaded = {name.removeprefix("module."): value for name, value in loaded.items()}  # a prefix written by DDP
    for name, value in loaded.items():
        if not isinstance(value, Tensor):
            raise UserError(f"--input {path}: {name} is a {type(value).__name__}; expected tensors alone")
    return loaded


def read_open_clip_config(path: Path) -> dict[str, Any]:
    """The settings in open_clip_config.json that weights do not show; {} without the file. Raises ``UserError``."""
    if not path.is_file():
        return {}
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
        model, preprocess = config["model_cfg"], config.get("preprocess_cfg", {})
        vision, text = model["vision_cfg"], model["text_cfg"]
        known = {"activation": "quick_gelu" if model.get("quick_gelu", False) else "gelu"}
        if "timm_model_name" in vision:
            known["image_size"] = int(vision["image_size"])
        else:
            known["vision_heads"] = int(vision["width"]) // int(vision.get("head_width", 64))
        if "heads" in text:
            known["text_heads"] = int(text["heads"])
        if text.get("pool_type", "argmax") == "eos":
            known["eos_token_id"] = int(text["eos_id"])
        known |= {
            f"image_{name}": [float(v) for v in preprocess[name]] for name in ("mean", "std") if name in preprocess
        }
        odd = [
            (name, value)
            for name, value, usual in (
                ("text_cfg.pool_type", text.get("pool_type", "argmax"), ("argmax", "eos")),
                ("text_cfg.no_causal_mask", text.get("no_causal_mask", False), (False,)),
                ("text_cfg.embed_cls", text.get("embed_cls", False), (False,)),
                ("vision_cfg.pool_type", vision.get("pool_type", "tok"), ("tok",)),
                ("vision_cfg.final_ln_after_pool", vision.get("final_ln_after_pool", False), (False,)),
                ("preprocess_cfg.resize_mode", preprocess.get("resize_mode", "shortest"), ("shortest",)),
                ("preprocess_cfg.interpolation", preprocess.get("interpolation", "bicubic"), ("bicubic",)),
            )
            if value not in usual
        ]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}: not a config of open_clip ({type(error).__name__}: {str(error)[:100]}); "
            "correct it or move it away"
        ) from None
    if odd:
        raise UserError(f"{path}: {odd[0][0]} is {odd[0][1]!r}, which a CLIPModel does not do; not converted")
    return known


def open_clip_config(
    config: PreTrainedConfig, custom_text: bool, normalisation: dict[str, list[float]]
) -> dict[str, Any] | None:
    """The open_clip_config.json of a model; None for a ConvNeXt that timm does not name. Raises ``UserError``."""
    vision, text = config.vision_config, config.text_config
    dual = config.model_type == DUAL_ENCODER
    if dual and (vision.model_type, text.model_type) != ("convnext", "clip_text_model"):
        raise UserError(
            f"--input: a {vision.model_type} with a {text.model_type}; expected a convnext with a clip_text_model, "
            "or a CLIPModel"
        )
    odd = [
        f"{tower}'s {name} is {value}, open_clip's is {usual}"
        for tower, name, value, usual in (
            ("the image tower", "layer_norm_eps", vision.layer_norm_eps, 1e-6 if dual else 1e-5),
            ("the text tower", "layer_norm_eps", text.layer_norm_eps, 1e-5),
            ("the image tower", "hidden_act", vision.hidden_act, "gelu" if dual else text.hidden_act),
        )
        if value != usual
    ]
    if text.hidden_act not in ("gelu", "quick_gelu"):
        odd.append(f"the text tower's hidden_act is {text.hidden_act}, open_clip's is gelu or quick_gelu")
    if odd:
        raise UserError(f"--input: {odd[0]}; open_clip has no such model")
    text_cfg = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": _ratio(text.intermediate_size, text.hidden_size),
    }
    if text.eos_token_id not in (HIGHEST_ID, text.vocab_size - 1):
        text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    if dual:
        sizes = (tuple(vision.depths), tuple(vision.hidden_sizes))
        names = [name for name, known in CONVNEXTS.items() if known == sizes]
        if not names:
            return None
        vision_cfg = {
            "timm_model_name": names[0],
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": vision.image_size,
        }
    else:
        vision_cfg = {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "patch_size": vision.patch_size,
            "mlp_ratio": _ratio(vision.intermediate_size, vision.hidden_size),
        }
    model_cfg = {"embed_dim": config.projection_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    model_cfg |= {"quick_gelu": True} if text.hidden_act == "quick_gelu" else {}
    model_cfg |= {"custom_text": True} if custom_text else {}
    return {"model_cfg": model_cfg, "preprocess_cfg": normalisation}


def _ratio(intermediate: int, width: int) -> float:
    """r with int(width * r) == intermediate, as open_clip computes it. With 8192 / 1664 the result would be 8191."""
    ratio = intermediate / width
    return ratio if int(width * ratio) == intermediate else (intermediate + 0.5) / width


def processor_normalisation(directory: Path) -> dict[str, list[float]]:
    """{"mean": [...], "std": [...]} from the image processor in ``directory``. Raises ``UserError``."""
    for file in ("processor_config.json", "preprocessor_config.json"):
        if (directory / file).is_file():
            try:
                settings = parse_json((directory / file).read_text(encoding="utf-8"))
                settings = settings.get("image_processor", settings)
                return dict(zip(("mean", "std"), normalisation_of_file(settings)))
            except (ValueError, TypeError, AttributeError, UserError):
                continue
    raise UserError(
        f"--input {directory}: no image processor with image_mean and image_std; open_clip needs them, "
        "save the processor too"
    )


def load_tokenizer(name_or_path: str, text_config: CLIPTextConfig) -> Any:
    """Loads the tokenizer. Raises ``UserError``, also if its ids are not those of the text tower."""
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # from the hub, transformers or tokenizers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"--tokenizer {name_or_path}: cannot be had ({reason}); give a directory that holds the tokenizer's files, "
            "or bring it into the cache where there is internet"
        ) from None
    if len(tokenizer) != text_config.vocab_size or tokenizer.eos_token_id != text_config.eos_token_id:
        raise UserError(
            f"--tokenizer {name_or_path}: {len(tokenizer)} tokens, the end of text is {tokenizer.eos_token_id}; "
            f"the weights have {text_config.vocab_size} tokens and pool at {text_config.eos_token_id}; "
            "name the model's own tokenizer"
        )
    return tokenizer


if __name__ == "__main__":
    run(main)
