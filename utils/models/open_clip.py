"""open_clip's layout of a CLIP: the names of its tensors, and its model config, in both directions.

Tensors and configs in, tensors and configs out: the files are read and written by ``published``. A ViT tower becomes a
``CLIPModel``, a ConvNeXt tower a ``VisionTextDualEncoderModel``. No bit of a tensor changes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from utils.processes.distributed import unpartitioned

DUAL_ENCODER = "vision-text-dual-encoder"
OPENAI_MEAN, OPENAI_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
CLIP_VOCABULARY = 49408
HIGHEST_ID = 2  # because of old configs, transformers reads this eos_token_id as "the highest id of the text"
PREFIXES = ("module.", "model.", "visual.")  # of DDP, of RobustVLM's wrapper, of an image tower's attribute
# Entries that are no weights. OpenAI's archives have the last three.
BUFFERS = {"attn_mask", "position_ids", "input_resolution", "context_length", "vocab_size"}
# Beginnings of names that the towers of a CLIP have, in open_clip or in transformers, and a ResNet has not.
BLOCKS = (
    *("visual.transformer.resblocks.", "visual.trunk.stages.", "transformer.resblocks.", "text.transformer.resblocks."),
    *("vision_model.encoder.", "text_model.encoder."),
)
POSITIONS = "visual.positional_embedding"
IMAGE_TOWER = ("class_embedding", "conv1.weight", "trunk.stem.0.weight")  # names in an image tower alone
# timm's name -> (depths, hidden sizes).
CONVNEXTS = {
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnext_xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}
# Fields of open_clip's model config -> the values that leave a CLIPModel's arithmetic as it is. A field that is not
# named here has to be absent, None, False or empty.
READ = {
    "": ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"),
    "vision_cfg": ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"),
    "text_cfg": ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pool_type", "eos_id"),
}
HARMLESS: dict[str, dict[str, tuple[str, ...] | None]] = {
    "": {"cast_dtype": None, "output_dict": None, "init_logit_scale": None},
    "vision_cfg": {
        **{"pool_type": ("tok",), "pos_embed_type": ("learnable",), "timm_pool": ("", "avg"), "timm_proj": ("linear",)},
        **{"timm_model_name": tuple(CONVNEXTS), "timm_model_pretrained": None, "timm_drop": None},
        **{"timm_drop_path": None, "patch_dropout": None, "output_tokens": None},
        **{"attn_pooler_queries": None, "attn_pooler_heads": None, "n_queries": None},
    },
    "text_cfg": {
        **{"proj_type": ("linear",), "pad_id": None, "output_tokens": None, "hf_tokenizer_name": None},
        **{"tokenizer_kwargs": None, "tokenizer_mode": None},
    },
}

State = dict[str, Tensor]
Fields = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------- names


class Pair(NamedTuple):
    """The name of a tensor in open_clip, and its name or names in transformers."""

    open_clip: str
    transformers: tuple[str, ...]  # three names: query, key and value, the thirds of its first dimension
    transposed: bool = False


def name_pairs(config: PreTrainedConfig, prefix: str = "") -> list[Pair]:
    """The names of all tensors in both layouts. They match one to one, so the two conversions are inverses."""
    _refuse_other_towers(config)
    vision, text = config.vision_config, config.text_config
    image_tower = _convnext_pairs(vision.depths) if config.model_type == DUAL_ENCODER else _vit_pairs(vision)
    return [
        *image_tower,
        Pair(f"{prefix}token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
        Pair(f"{prefix}positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
        *_block_pairs(f"{prefix}transformer", "text_model", text.num_hidden_layers),
        *_both(f"{prefix}ln_final", "text_model.final_layer_norm"),
        Pair(f"{prefix}text_projection", ("text_projection.weight",), transposed=True),
        Pair("logit_scale", ("logit_scale",)),
    ]


def _refuse_other_towers(config: PreTrainedConfig) -> None:
    """Raises ``ValueError`` for a dual encoder that open_clip does not have."""
    towers = config.vision_config.model_type, config.text_config.model_type
    if config.model_type == DUAL_ENCODER and towers != ("convnext", "clip_text_model"):
        raise ValueError(f"a {towers[0]} with a {towers[1]}; open_clip has a CLIP or a ConvNeXt CLIP")


def _both(open_clip: str, transformers: str) -> Iterator[Pair]:
    for part in ("weight", "bias"):
        yield Pair(f"{open_clip}.{part}", (f"{transformers}.{part}",))


def _vit_pairs(vision: PreTrainedConfig) -> Iterator[Pair]:
    embeddings = "vision_model.embeddings"
    yield Pair("visual.conv1.weight", (f"{embeddings}.patch_embedding.weight",))
    yield Pair("visual.class_embedding", (f"{embeddings}.class_embedding",))
    yield Pair(POSITIONS, (f"{embeddings}.position_embedding.weight",))
    yield from _both("visual.ln_pre", "vision_model.pre_layrnorm")  # transformers' spelling
    yield from _block_pairs("visual.transformer", "vision_model", vision.num_hidden_layers)
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


def _convnext_pairs(depths: list[int]) -> Iterator[Pair]:
    trunk, tower = "visual.trunk", "vision_model"
    yield from _both(f"{trunk}.stem.0", f"{tower}.embeddings.patch_embeddings")
    yield from _both(f"{trunk}.stem.1", f"{tower}.embeddings.layernorm")
    for stage, depth in enumerate(depths):
        for part in (0, 1) if stage else ():
            there, here = f"{trunk}.stages.{stage}.downsample", f"{tower}.encoder.stages.{stage}.downsampling_layer"
            yield from _both(f"{there}.{part}", f"{here}.{part}")
        for block in range(depth):
            there, here = f"{trunk}.stages.{stage}.blocks.{block}", f"{tower}.encoder.stages.{stage}.layers.{block}"
            yield Pair(f"{there}.gamma", (f"{here}.layer_scale_parameter",))
            yield from _both(f"{there}.conv_dw", f"{here}.dwconv")
            yield from _both(f"{there}.norm", f"{here}.layernorm")
            yield from _both(f"{there}.mlp.fc1", f"{here}.pwconv1")
            yield from _both(f"{there}.mlp.fc2", f"{here}.pwconv2")
    yield from _both(f"{trunk}.head.norm", f"{tower}.layernorm")
    yield Pair("visual.head.proj.weight", ("visual_projection.weight",))


def tidy_names(state: State) -> State:
    """The state dict without buffers, and without prefixes that all names of weights share. Values are not looked at.

    An image tower alone gets the prefix ``visual.`` of its whole model.
    """
    state = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in BUFFERS}
    while state and (shared := [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)]):
        state = {name.removeprefix(shared[0]): tensor for name, tensor in state.items()}
    if any(name in state for name in IMAGE_TOWER):
        state = {f"visual.{name}": tensor for name, tensor in state.items()}
    return state


def in_open_clip_names(state: State) -> bool:
    """Whether a tidy state dict holds a tower under open_clip's or OpenAI's names, known architecture or not."""
    return any(name.startswith(("visual.", "transformer.resblocks.", "text.transformer.")) for name in state)


def text_prefix(state: State) -> str:
    """What the names of the text tower begin with: "text." in a CustomTextCLIP."""
    return "text." if "text.token_embedding.weight" in state else ""


def holds_text(state: State) -> bool:
    """Whether a tidy state dict, in either layout, holds more than the image tower and its projection."""
    return not all(name.startswith(("visual.", "vision_model.", "visual_projection.")) for name in state)


def to_transformers(state: State, config: PreTrainedConfig, where: str) -> State:
    """A tidy state dict in open_clip's names -> the same tensors in transformers' names.

    state: of a whole model or of an image tower; the dtypes stay. config: of the whole model. ``where`` says in errors
    what the config is. Raises ``ValueError`` for a key that is missing or unknown, and for a shape that differs.
    """
    pairs, whole = name_pairs(config, text_prefix(state)), holds_text(state)
    what = f"a CLIP with a {'ConvNeXt' if config.model_type == DUAL_ENCODER else 'ViT'} of {where}"
    wanted = [pair for pair in pairs if whole or pair.open_clip.startswith("visual.")]
    _same_names(state, {pair.open_clip for pair in wanted}, what)
    shapes = weight_shapes(config)
    converted: State = {}
    for pair in wanted:
        tensor = state[pair.open_clip]
        parts = [shapes[name] for name in pair.transformers]
        expected = (sum(part[0] for part in parts), *parts[0][1:]) if len(parts) > 1 else parts[0]
        expected = expected[::-1] if pair.transposed else expected
        if pair.open_clip == "logit_scale" and tensor.numel() == 1:  # some checkpoints have the shape (1,)
            tensor = tensor.reshape(())
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{pair.open_clip} is {tuple(tensor.shape)}, {expected} in {what}")
        tensor = tensor.T if pair.transposed else tensor
        thirds = tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,)
        copies = (part.clone(memory_format=torch.contiguous_format) for part in thirds)
        converted |= dict(zip(pair.transformers, copies))
    return converted


def check_transformers_names(state: State, config: PreTrainedConfig, where: str) -> None:
    """``to_transformers``' checks for a tidy state dict that has transformers' names already.

    An image tower may come without projection, as a CLIPVisionModel has none. Raises ``ValueError``.
    """
    found = {name: tuple(tensor.shape) for name, tensor in state.items() if not name.endswith("position_ids")}
    shapes, whole = weight_shapes(config), holds_text(state)
    projection = "visual_projection.weight"
    wanted = {
        name for name in shapes if whole or name.startswith("vision_model.") or name in found.keys() & {projection}
    }
    what = f"a {config.model_type} of {where}"
    _same_names(found, wanted, what)
    for name, shape in found.items():
        if shape != shapes[name]:
            raise ValueError(f"{name} is {shape}, {shapes[name]} in {what}")


def to_open_clip(state: State, config: PreTrainedConfig, form: State | None = None, prefix: str = "") -> State:
    """The inverse: the state dict of a ``CLIPModel`` or a ``VisionTextDualEncoderModel`` becomes open_clip's.

    form: tensors whose names, dtypes and shapes are taken over, such as the meta tensors of the file that a model came
    from. prefix: "text." for the names of CustomTextCLIP, whatever the form's are. Raises ``ValueError`` for keys that
    are missing or unknown.
    """
    form = form or {}
    state = {name: tensor for name, tensor in state.items() if not name.endswith("embeddings.position_ids")}
    pairs = name_pairs(config, prefix or text_prefix(form))
    _same_names(state, {name for pair in pairs for name in pair.transformers}, "a model of its config.json")
    converted: State = {}
    for pair in pairs:
        parts = [state[name] for name in pair.transformers]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        tensor = tensor.T if pair.transposed else tensor
        like = form.get(pair.open_clip, form.get(pair.open_clip.removeprefix(prefix)))
        if like is not None:
            tensor = tensor.to(like.dtype).reshape(like.shape)
        converted[pair.open_clip] = tensor.clone(memory_format=torch.contiguous_format)
    return converted


def _same_names(state: Collection[str], expected: set[str], what: str) -> None:
    """Raises ``ValueError`` unless a state dict has exactly the expected names."""
    for found, verb, owner in ((set(state) - expected, "holds", "is not in"), (expected - set(state), "lacks", "")):
        if found:
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            relation = f"which {owner} {what}" if owner else f"which {what} has"
            raise ValueError(f"{verb} {min(found)}{others}, {relation}")


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    return VisionTextDualEncoderModel if config.model_type == DUAL_ENCODER else CLIPModel


def weight_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of the model of a config, by transformers' names."""
    with torch.device("meta"), unpartitioned():  # one process alone may ask: ZeRO-3 would wait for the others
        return {name: tuple(tensor.shape) for name, tensor in model_class(config)(config).state_dict().items()}


# --------------------------------------------------------------------------------------------------------------- config


def is_true(value: Any) -> bool:
    """A switch of a config: true, "TRUE" and the like. Raises ``ValueError`` for another value than true and false."""
    known = {"true": True, "false": False, "": False, "none": False}
    text = "" if value is None else str(value).strip().lower()
    if isinstance(value, (bool, str, type(None))) and text in known:
        return known[text]
    raise ValueError(f"quick_gelu is {value!r}; expected true or false")


def to_config(model: Fields) -> PreTrainedConfig:
    """open_clip's model config (the fields beside ``embed_dim``) -> the config of the same model in transformers.

    Raises ``ValueError`` or ``KeyError`` for a field that is missing, or that the models of transformers do not obey.
    """
    vision, text = dict(model["vision_cfg"]), dict(model["text_cfg"])
    for place, fields in (("", model), ("vision_cfg", vision), ("text_cfg", text)):
        for name, value in fields.items():
            usual = HARMLESS[place].get(name, ())
            if name in READ[place] or value in (None, False, {}, []) or usual is None or value in usual:
                continue
            raise ValueError(f"{place}.{name}".lstrip(".") + f" is {value!r}, which no CLIPModel does")
    activation = "quick_gelu" if is_true(model.get("quick_gelu")) else "gelu"
    dim, vocabulary, width = int(model["embed_dim"]), int(text.get("vocab_size", CLIP_VOCABULARY)), int(text["width"])
    pool, end = text.get("pool_type", "argmax"), vocabulary - 1
    if pool not in ("argmax", "eos"):
        raise ValueError(f"text_cfg.pool_type is {pool!r}, which no CLIPModel does")
    if pool == "eos":
        end = int(text.get("eos_id", HIGHEST_ID))
    if end == HIGHEST_ID != vocabulary - 1:
        raise ValueError(f"the text is pooled at id {end}, which transformers reads as the highest id of a text")
    text_config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=int(width * text.get("mlp_ratio", 4.0)),
        projection_dim=dim,
        num_hidden_layers=int(text["layers"]),
        num_attention_heads=_divides(int(text.get("heads", 8)), width, "text_cfg.heads"),
        max_position_embeddings=int(text.get("context_length", 77)),
        hidden_act=activation,
        bos_token_id=vocabulary - 2,
        eos_token_id=end,
        pad_token_id=vocabulary - 1,  # the forward does not use it; CLIP's tokenizer pads with the highest id
    )
    side = _one_number(vision.get("image_size", 224), "vision_cfg.image_size")
    if "timm_model_name" in vision:
        convnext = _convnext_config(str(vision["timm_model_name"]), side)
        return VisionTextDualEncoderConfig.from_vision_text_configs(convnext, text_config, projection_dim=dim)
    if not isinstance(vision.get("layers"), int):
        raise ValueError(f"vision_cfg.layers is {vision.get('layers')}, of a ResNet; a CLIPModel has a ViT")
    width, head_width = int(vision["width"]), int(vision.get("head_width", 64))
    patch = _one_number(vision.get("patch_size", 16), "vision_cfg.patch_size")
    vision_config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=int(width * vision.get("mlp_ratio", 4.0)),
        projection_dim=dim,
        num_hidden_layers=vision["layers"],
        num_attention_heads=_divides(width // head_width, width, "vision_cfg.head_width"),
        image_size=side,
        patch_size=_divides(patch, side // patch * patch, "vision_cfg.patch_size"),
        hidden_act=activation,
    )
    return CLIPConfig(vision_config=vision_config.to_dict(), text_config=text_config.to_dict(), projection_dim=dim)


def _one_number(value: Any, name: str) -> int:
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int) or side < 1:
        raise ValueError(f"{name} is {value!r}; expected one whole number above 0")
    return side


def _divides(number: int, width: int, name: str) -> int:
    if number < 1 or width < 1 or width % number:
        raise ValueError(f"{name} does not divide the tower's {width} evenly")
    return number


def _convnext_config(name: str, side: int) -> ConvNextConfig:
    depths, sizes = CONVNEXTS[name]
    config: Any = ConvNextConfig(
        hidden_sizes=list(sizes),
        depths=list(depths),
        num_stages=len(sizes),
        patch_size=4,
        hidden_act="gelu",
        # This sets only the last norm; the others use 1e-6, as in timm, in any case.
        layer_norm_eps=1e-6,
        image_size=side,
    )
    config.hidden_size = sizes[-1]  # VisionTextDualEncoderModel needs it, and ConvNextConfig does not set it itself
    return config


def is_of_openai(state: State) -> bool:
    """Whether a tidy state dict is in the precisions of OpenAI's own: half, with layer norms in float32."""
    halves = [name for name, tensor in state.items() if tensor.dtype == torch.float16]
    norms = [tensor for name, tensor in state.items() if re.search(r"\.ln_\w+\.weight$", name)]
    products = [name for name in state if name.endswith(("in_proj_weight", "c_fc.weight", "visual.proj"))]
    return bool(products and norms) and set(products) <= set(halves) and all(n.dtype == torch.float32 for n in norms)


def openai_model(state: State) -> Fields:
    """The model config of a tidy state dict of OpenAI's: sizes by the shapes, quick_gelu, heads 64 wide.

    Raises ``ValueError`` or ``KeyError`` if the shapes are no ViT's.
    """
    width, _, patch, _ = state["visual.conv1.weight"].shape
    context, text_width = state["positional_embedding"].shape
    positions = len(state[POSITIONS]) - 1
    grid = math.isqrt(positions)
    if grid * grid != positions:
        raise ValueError(f"{POSITIONS} has {positions} patches; expected a square of patches")
    for name, wide in (("image", width), ("text", text_width)):
        if wide % 64:
            raise ValueError(f"the {name} tower is {wide} wide, which heads of 64 do not share evenly")
    return {
        "embed_dim": state["text_projection"].shape[1],
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": grid * patch,
            "layers": _count(state, r"visual\.transformer\.resblocks\.(\d+)\."),
            "width": width,
            "patch_size": patch,
        },
        "text_cfg": {
            "context_length": context,
            "vocab_size": len(state["token_embedding.weight"]),
            "width": text_width,
            "heads": text_width // 64,
            "layers": _count(state, r"transformer\.resblocks\.(\d+)\."),
        },
    }


def _count(state: State, pattern: str) -> int:
    """1 + the largest number that ``pattern`` finds in the names; 1 if none, so a later error names the first key."""
    return max((int(match[1]) + 1 for name in state if (match := re.match(pattern, name))), default=1)


def to_model(config: PreTrainedConfig) -> Fields:
    """The inverse of ``to_config``. Raises ``ValueError`` for a model that open_clip does not have."""
    _refuse_other_towers(config)
    vision, text = config.vision_config, config.text_config
    dual = config.model_type == DUAL_ENCODER
    for tower, name, value, usual in (
        ("the image tower", "layer_norm_eps", vision.layer_norm_eps, 1e-6 if dual else 1e-5),
        ("the text tower", "layer_norm_eps", text.layer_norm_eps, 1e-5),
        ("the image tower", "hidden_act", vision.hidden_act, "gelu" if dual else text.hidden_act),
    ):
        if value != usual:
            raise ValueError(f"{tower}'s {name} is {value}, open_clip's is {usual}")
    if text.hidden_act not in ("gelu", "quick_gelu"):
        raise ValueError(f"the text tower's hidden_act is {text.hidden_act}, open_clip's is gelu or quick_gelu")
    text_cfg = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
    } | _ratio(text.intermediate_size, text.hidden_size)
    if text.eos_token_id not in (HIGHEST_ID, text.vocab_size - 1):
        text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    if dual:
        sizes = tuple(vision.depths), tuple(vision.hidden_sizes)
        names = [name for name, known in CONVNEXTS.items() if known == sizes]
        if not names:
            raise ValueError(f"a ConvNeXt of depths {sizes[0]} and widths {sizes[1]}, of which timm has none")
        vision_cfg = {"timm_model_name": names[0], "timm_model_pretrained": False, "timm_pool": ""}
        vision_cfg |= {"timm_proj": "linear", "image_size": vision.image_size}
    else:
        vision_cfg = {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "patch_size": vision.patch_size,
        } | _ratio(vision.intermediate_size, vision.hidden_size)
    model = {"embed_dim": config.projection_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    return model | ({"quick_gelu": True} if text.hidden_act == "quick_gelu" else {})


def _ratio(intermediate: int, width: int) -> dict[str, float]:
    """r with int(width * r) == intermediate, as open_clip computes it. With 480 / 352 the result would be 479."""
    ratio = intermediate / width
    return {"mlp_ratio": ratio if int(width * ratio) == intermediate else (intermediate + 0.5) / width}
