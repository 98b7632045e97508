"""Robust CLIPs in the layouts in which people publish them, with random weights, and what open_clip computes of them.

The forward pass of open_clip is written out here from its state dict and torch alone. It runs in float64, so that a
test sees the rounding of what it tests, and no other.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from examples.pretrain_small_clip import MAX_TEXT_LENGTH, make_tokenizer
from tests.small_models import photos

State = dict[str, Tensor]

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALVES = (0.5, 0.5, 0.5)
TEXTS = ["a photo of a cat", "a drawing of a big dog.", "This is the number 7", "A red, red car!", "Der Wal; été"]
WIDTH, PATCH_SIZE, LAYERS, EMBED_DIM = 64, 16, 2, 32  # of every image tower; the text towers have as many layers


@dataclass(frozen=True)
class Published:
    """One layout on disk, inputs for it, and what open_clip computes of them.

    Attributes:
        name: of the folder.
        path: what a user names: the folder, or the .pt file.
        base_model: what has to be named beside it: the model an image tower belongs to, or a checkpoint's config.
        processor: a directory with tokenizer and image processor (32 px), for a layout that has no tokenizer.
        images: (8, 3, S, S) float32 in [0, 1], not normalised.
        texts: five.
        token_ids: (5, 77) int64 of ``texts``, in open_clip's manner: start, words, end of text, then zeros.
        expected: image_features (8, 32) and text_features (5, 32), not normalised; logit_scale (1,), the exp of the
            parameter; probabilities (8, 5), over the texts.
        state: the tensors of the file, in their dtypes, under its names; those of a checkpoint without ``module.``.
    """

    name: str
    path: str
    base_model: str | None
    processor: str | None
    images: Tensor
    texts: list[str]
    token_ids: Tensor
    expected: dict[str, Tensor]
    state: State


@dataclass(frozen=True)
class Sizes:
    """In what the CLIPs differ. ``half``: as OpenAI keeps its weights, see ``is_half``."""

    text_heads: int
    quick_gelu: bool = False
    image_size: int = 32
    text_width: int = 16
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    half: bool = False

    @property
    def activation(self) -> str:
        return "quick_gelu" if self.quick_gelu else "gelu"


FARE, GELU = "hub_fare_quickgelu_safetensors", "hub_gelu_bin_no_tokenizer"
LEAF, SHARDED = "leaf_clip_model", "leaf_open_clip_sharded"
CHECKPOINT, OPENAI = "open_clip_training_checkpoint", "openai_state_dict_fp16"
CLIPS = {
    FARE: Sizes(text_heads=2, quick_gelu=True),
    GELU: Sizes(text_heads=1, image_size=64, mean=HALVES, std=HALVES),
    LEAF: Sizes(text_heads=2, quick_gelu=True),
    SHARDED: Sizes(text_heads=2),
    CHECKPOINT: Sizes(text_heads=1, image_size=64),
    OPENAI: Sizes(text_heads=1, quick_gelu=True, text_width=64, half=True),
}
IMAGE_TOWERS = {
    "robustvlm_visual": "fare_eps_2.pt",
    "simclip_visual": "simclip4.pt",
    "tecoa_vision_encoder": "tecoa_eps_4.pt",
}


def save_layouts(directory: Path) -> dict[str, Published]:
    """Writes all nine layouts, and ``clip_processor``, into ``directory``. Every call gives the same."""
    tokenizer = make_tokenizer(TEXTS[:3], vocab_size=600)  # the other texts are spelt in pieces
    token_ids = open_clip_ids(tokenizer, TEXTS)
    processor = save_clip_processor(directory / "clip_processor", tokenizer)
    published = {}

    def publish(seed: int, name: str, files: Files, clip: State, sizes: Sizes) -> None:
        images = photos(8, sizes.image_size, seed)
        own_tokenizer = name == FARE or name in IMAGE_TOWERS
        published[name] = Published(
            name=name,
            path=str(files.path),
            base_model=None if files.base_model is None else str(files.base_model),
            processor=None if own_tokenizer else str(processor),
            images=images,
            texts=list(TEXTS),
            token_ids=token_ids.clone(),
            expected=open_clip_outputs(clip, images, token_ids, sizes),
            state=files.state,
        )

    clips = {name: clip_state(sizes, len(tokenizer), seed) for seed, (name, sizes) in enumerate(CLIPS.items())}
    for seed, (name, sizes) in enumerate(CLIPS.items()):
        folder = directory / name
        folder.mkdir()
        files = WRITERS[name](folder, clips[name], sizes, tokenizer)
        publish(seed, name, files, clips[name], sizes)
    for seed, name in enumerate(IMAGE_TOWERS, start=len(CLIPS)):
        folder = directory / name
        folder.mkdir()
        tower = robust_tower(clips[FARE], seed)
        files = save_image_tower(folder, tower, directory / FARE)
        publish(seed, name, files, clips[FARE] | {f"visual.{key}": value for key, value in tower.items()}, CLIPS[FARE])
    return published


def open_clip_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """int64 (texts, 77): start, words, end of text, then zeros."""
    assert tokenizer.eos_token_id == len(tokenizer) - 1  # open_clip pools at the highest id
    ids = torch.zeros(len(texts), MAX_TEXT_LENGTH, dtype=torch.int64)
    for row, text in zip(ids, texts):
        words = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = torch.tensor([tokenizer.bos_token_id, *words, tokenizer.eos_token_id])
        row[: len(whole)] = whole
    return ids


# -------------------------------------------------------------------------------------------------------------- weights


class RandomWeights:
    """Random weights under open_clip's names, in ``state``. All are drawn, so none can be dropped or swapped unseen."""

    def __init__(self, seed: int) -> None:
        self.state: State = {}
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, name: str, *shape: int, scale: float | None = None, mean: float = 0.0) -> None:
        scale = shape[-1] ** -0.5 if scale is None else scale
        self.state[name] = mean + scale * torch.randn(shape, generator=self.generator)

    def norm(self, name: str, width: int) -> None:
        self.draw(f"{name}.weight", width, scale=0.3, mean=1.0)
        self.draw(f"{name}.bias", width, scale=0.3)

    def linear(self, name: str, *shape: int) -> None:
        self.draw(f"{name}.weight", *shape, scale=(shape[0] / torch.tensor(shape).prod().item()) ** 0.5)
        self.draw(f"{name}.bias", shape[0], scale=0.3)

    def blocks(self, prefix: str, width: int, depth: int, hidden: int) -> None:
        for number in range(depth):
            block = f"{prefix}.resblocks.{number}"
            self.norm(f"{block}.ln_1", width)
            self.norm(f"{block}.ln_2", width)
            self.draw(f"{block}.attn.in_proj_weight", 3 * width, width, scale=width**-0.5)
            self.draw(f"{block}.attn.in_proj_bias", 3 * width, scale=0.3)
            self.linear(f"{block}.attn.out_proj", width, width)
            self.linear(f"{block}.mlp.c_fc", hidden, width)
            self.linear(f"{block}.mlp.c_proj", width, hidden)

    def vit(self, *, width: int, depth: int, hidden: int, image_size: int, patch_size: int, embed_dim: int) -> None:
        """The image tower."""
        self.draw("visual.conv1.weight", width, 3, patch_size, patch_size, scale=(3 * patch_size**2) ** -0.5)
        self.draw("visual.class_embedding", width, scale=0.3)
        self.draw("visual.positional_embedding", 1 + (image_size // patch_size) ** 2, width, scale=0.5)
        self.norm("visual.ln_pre", width)
        self.blocks("visual.transformer", width, depth, hidden)
        self.norm("visual.ln_post", width)
        self.draw("visual.proj", width, embed_dim)

    def text(self, prefix: str, *, vocab_size: int, width: int, depth: int, hidden: int, embed_dim: int) -> None:
        """The text tower."""
        self.draw(f"{prefix}token_embedding.weight", vocab_size, width, scale=0.5)
        self.draw(f"{prefix}positional_embedding", MAX_TEXT_LENGTH, width, scale=0.5)
        self.blocks(f"{prefix}transformer", width, depth, hidden)
        self.norm(f"{prefix}ln_final", width)
        self.draw(f"{prefix}text_projection", width, embed_dim)


def clip_state(sizes: Sizes, vocab_size: int, seed: int) -> State:
    """A CLIP of these sizes under open_clip's names."""
    weights = RandomWeights(seed)
    weights.draw("logit_scale", scale=0.2, mean=2.0)
    weights.vit(
        width=WIDTH, depth=LAYERS, hidden=4 * WIDTH, image_size=sizes.image_size, patch_size=PATCH_SIZE,
        embed_dim=EMBED_DIM,
    )  # fmt: skip
    weights.text(
        "", vocab_size=vocab_size, width=sizes.text_width, depth=LAYERS, hidden=4 * sizes.text_width,
        embed_dim=EMBED_DIM,
    )  # fmt: skip
    return {name: value.half() if sizes.half and is_half(name) else value for name, value in weights.state.items()}


def is_half(name: str) -> bool:
    """Whether OpenAI keeps this tensor in half precision: convolutions, linear layers, projections; here tokens too."""
    parts = (".conv1.", ".attn.", ".mlp.", "token_embedding.")
    return any(part in name for part in parts) or name in ("visual.proj", "text_projection")


def robust_tower(clip: State, seed: int) -> State:
    """The image tower of ``clip``, under its own names, as another training would leave it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name.removeprefix("visual."): tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in clip.items()
        if name.startswith("visual.")
    }


# ------------------------------------------------------------- open_clip's forward, from its state dict and torch alone


@torch.no_grad()
def open_clip_outputs(state: State, images: Tensor, ids: Tensor, sizes: Sizes) -> dict[str, Tensor]:
    """What open_clip computes of images in [0, 1] and of texts, rounded to float32: see ``Published.expected``."""
    state = {name: tensor.double() for name, tensor in state.items()}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (sizes.mean, sizes.std))
    image_features = vit_forward(state, ((images - mean) / std).double(), WIDTH // 64, sizes.activation)
    text_features = text_forward(state, ids, sizes.text_heads, sizes.activation, "")
    scale = state["logit_scale"].exp().reshape(1)
    logits = scale * F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).T
    found = {"image_features": image_features, "text_features": text_features, "logit_scale": scale}
    found["probabilities"] = logits.softmax(dim=-1)
    return {name: tensor.float() for name, tensor in found.items()}


def run_blocks(x: Tensor, state: State, prefix: str, heads: int, activation: str, mask: Tensor | None) -> Tensor:
    """Pre-norm residual blocks. x: (length, batch, width)."""
    width, number = x.shape[-1], 0
    act = F.gelu if activation == "gelu" else lambda values: values * torch.sigmoid(1.702 * values)
    while f"{prefix}.resblocks.{number}.ln_1.weight" in state:
        part = {
            name.removeprefix(f"{prefix}.resblocks.{number}."): tensor
            for name, tensor in state.items()
            if name.startswith(f"{prefix}.resblocks.{number}.")
        }
        y = F.layer_norm(x, (width,), part["ln_1.weight"], part["ln_1.bias"], 1e-5)
        attended, _ = F.multi_head_attention_forward(
            y, y, y, width, heads, part["attn.in_proj_weight"], part["attn.in_proj_bias"], None, None, False, 0.0,
            part["attn.out_proj.weight"], part["attn.out_proj.bias"], training=False, need_weights=False,
            attn_mask=mask,
        )  # fmt: skip
        x = x + attended
        y = F.layer_norm(x, (width,), part["ln_2.weight"], part["ln_2.bias"], 1e-5)
        y = act(F.linear(y, part["mlp.c_fc.weight"], part["mlp.c_fc.bias"]))
        x = x + F.linear(y, part["mlp.c_proj.weight"], part["mlp.c_proj.bias"])
        number += 1
    assert number > 0
    return x


def vit_forward(state: State, images: Tensor, heads: int, activation: str) -> Tensor:
    """Normalised images (n, 3, S, S) -> features (n, D)."""
    patch = state["visual.conv1.weight"].shape[-1]
    x = F.conv2d(images, state["visual.conv1.weight"], stride=patch).flatten(2).transpose(1, 2)
    x = (
        torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
        + state["visual.positional_embedding"]
    )
    width = (x.shape[-1],)
    x = F.layer_norm(x, width, state["visual.ln_pre.weight"], state["visual.ln_pre.bias"], 1e-5)
    x = run_blocks(x.transpose(0, 1), state, "visual.transformer", heads, activation, None)[0]
    return (
        F.layer_norm(x, width, state["visual.ln_post.weight"], state["visual.ln_post.bias"], 1e-5)
        @ state["visual.proj"]
    )


def text_forward(state: State, ids: Tensor, heads: int, activation: str, prefix: str) -> Tensor:
    """Token ids (n, length) -> features (n, D), pooled at the highest id."""
    length = ids.shape[1]
    x = state[f"{prefix}token_embedding.weight"][ids] + state[f"{prefix}positional_embedding"][:length]
    mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
    x = run_blocks(x.transpose(0, 1), state, f"{prefix}transformer", heads, activation, mask).transpose(0, 1)
    x = F.layer_norm(x, x.shape[-1:], state[f"{prefix}ln_final.weight"], state[f"{prefix}ln_final.bias"], 1e-5)
    return x[torch.arange(len(x)), ids.argmax(dim=-1)] @ state[f"{prefix}text_projection"]


# ---------------------------------------------------------------------------------------------------------------- files


class Files(NamedTuple):
    """What was written: what a user names, and the tensors in it."""

    path: Path
    state: State
    base_model: Path | None = None


def save_clip_processor(directory: Path, tokenizer: CLIPTokenizer) -> Path:
    """What stands for openai/clip-vit-large-patch14, without weights: plain numbers as sizes, as OpenAI has them."""
    directory.mkdir(parents=True)
    tokenizer.backend_tokenizer.model.save(str(directory))  # vocab.json and merges.txt
    end = tokenizer.eos_token
    special = {"bos_token": tokenizer.bos_token, "eos_token": end, "unk_token": end, "pad_token": end}
    tokens = {"add_prefix_space": False, "errors": "replace", "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    image_processor = {
        "crop_size": 32,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": OPENAI_MEAN,
        "image_std": OPENAI_STD,
        "resample": 3,
        "size": 32,
    }
    write_json(directory / "special_tokens_map.json", special)
    write_json(directory / "tokenizer_config.json", special | tokens | {"model_max_length": MAX_TEXT_LENGTH})
    write_json(directory / "preprocessor_config.json", image_processor)
    write_json(directory / "config.json", {"model_type": "clip"})
    return directory


def save_fare(folder: Path, clip: State, sizes: Sizes, tokenizer: CLIPTokenizer) -> Files:
    """An open_clip model on the hub: safetensors and a tokenizer."""
    save_file(clip, folder / "open_clip_model.safetensors")
    write_json(folder / "open_clip_config.json", hub_config(sizes, len(tokenizer)))
    tokenizer.save_pretrained(folder)
    return Files(folder, clip)


def save_gelu(folder: Path, clip: State, sizes: Sizes, tokenizer: CLIPTokenizer) -> Files:
    """An open_clip model on the hub: a pickle of tensors, and no tokenizer."""
    torch.save(of_module(clip), folder / "open_clip_pytorch_model.bin")
    write_json(folder / "open_clip_config.json", hub_config(sizes, len(tokenizer)))
    return Files(folder, clip)


def save_leaf(folder: Path, clip: State, sizes: Sizes, tokenizer: CLIPTokenizer) -> Files:
    """A CLIPModel whose config.json, written by an old transformers, has only what differs from the defaults."""
    state = transformers_state(clip)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    # The published one's vocabulary is a default too. The small tokenizer's has to be said.
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text_config, vision_config = tower_configs(sizes)
    config = {
        "_name_or_path": "RCLIP/CLIP-ViT-L-rho50-k1-FARE2",
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": EMBED_DIM,
        "text_config": text_config | {"torch_dtype": "float32", "vocab_size": len(tokenizer)} | ids,
        "torch_dtype": "float32",
        "transformers_version": "4.49.0",
        "vision_config": vision_config | {"torch_dtype": "float32"},
    }
    write_json(folder / "config.json", config)
    return Files(folder, state)


def save_sharded(folder: Path, clip: State, sizes: Sizes, tokenizer: CLIPTokenizer) -> Files:
    """A CLIPModel in two shards. Its eos_token_id is 2, which every old config has whatever the vocabulary."""
    state = transformers_state(clip)
    names = sorted(state)
    weight_map = {}
    for number, shard in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: state[name] for name in shard}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    count = sum(tensor.numel() for tensor in state.values())
    index = {"metadata": {"total_parameters": count, "total_size": 4 * count}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    text_config, vision_config = tower_configs(sizes)
    both = {
        "attention_dropout": 0.0,
        "hidden_act": sizes.activation,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-05,
        "projection_dim": EMBED_DIM,
    }
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": len(tokenizer)}
    config = {
        "architectures": ["CLIPModel"],
        "dtype": "float32",
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": EMBED_DIM,
        "text_config": text_config | both | ids | {"max_position_embeddings": MAX_TEXT_LENGTH},
        "transformers_version": "5.24.0",
        "vision_config": vision_config | both | {"num_channels": 3},
    }
    write_json(folder / "config.json", config)
    return Files(folder, state)


def save_checkpoint(folder: Path, clip: State, sizes: Sizes, tokenizer: CLIPTokenizer) -> Files:
    """A checkpoint of open_clip's training with ``--lock-text``. The training's step changes ``clip``."""
    optimizer = train_one_step(clip, sizes)
    checkpoint = {
        "epoch": 5,
        "name": "2024_01_01-00_00_00-model_tiny-lr_0.001-b_4-j_1-p_amp",
        "state_dict": {f"module.{name}": tensor for name, tensor in clip.items()},
        "optimizer": optimizer,
        "scaler": {
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 1,
        },
    }
    (folder / "checkpoints").mkdir()
    torch.save(checkpoint, folder / "checkpoints/epoch_5.pt")
    write_json(folder / "model_config.json", model_config(sizes, len(tokenizer)))
    return Files(folder / "checkpoints/epoch_5.pt", clip, base_model=folder / "model_config.json")


def save_openai(folder: Path, clip: State, sizes: Sizes, tokenizer: CLIPTokenizer) -> Files:
    """What OpenAI's clip.load gives on a GPU, saved as a state dict with nothing beside it."""
    torch.save(clip, folder / "ViT-tiny.pt")
    return Files(folder / "ViT-tiny.pt", clip)


def save_image_tower(folder: Path, tower: State, base_model: Path) -> Files:
    """The image tower alone, as RobustVLM's and Sim-CLIP's training saves it, or under a key as TeCoA's did."""
    path = folder / IMAGE_TOWERS[folder.name]
    held = of_module(tower)
    torch.save({"vision_encoder_state_dict": held} if path.name.startswith("tecoa") else held, path)
    return Files(path, tower, base_model=base_model)


WRITERS: dict[str, Callable[[Path, State, Sizes, CLIPTokenizer], Files]] = {
    FARE: save_fare,
    GELU: save_gelu,
    LEAF: save_leaf,
    SHARDED: save_sharded,
    CHECKPOINT: save_checkpoint,
    OPENAI: save_openai,
}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def of_module(state: State) -> OrderedDict[str, Tensor]:
    """As ``nn.Module.state_dict`` gives it: with the versions of the modules."""
    ordered = OrderedDict(state)
    ordered._metadata = OrderedDict({"": {"version": 1}})
    return ordered


def model_config(sizes: Sizes, vocab_size: int) -> dict[str, Any]:
    """open_clip's sizes. Where heads of the image tower are not said, they are 64 wide."""
    return {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {"image_size": sizes.image_size, "layers": LAYERS, "width": WIDTH, "patch_size": PATCH_SIZE},
        "text_cfg": {
            "context_length": MAX_TEXT_LENGTH,
            "vocab_size": vocab_size,
            "width": sizes.text_width,
            "heads": sizes.text_heads,
            "layers": LAYERS,
        },
    }


def hub_config(sizes: Sizes, vocab_size: int) -> dict[str, Any]:
    """open_clip_config.json. quick_gelu is a text, as published: open_clip takes any text as true."""
    activation = {"quick_gelu": "TRUE"} if sizes.quick_gelu else {}
    return {
        "model_cfg": model_config(sizes, vocab_size) | activation,
        "preprocess_cfg": {
            "mean": sizes.mean,
            "std": sizes.std,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def tower_configs(sizes: Sizes) -> tuple[dict[str, Any], dict[str, Any]]:
    """What differs from transformers' defaults: text_config and vision_config."""
    text_config = {
        "hidden_size": sizes.text_width,
        "intermediate_size": 4 * sizes.text_width,
        "model_type": "clip_text_model",
        "num_attention_heads": sizes.text_heads,
        "num_hidden_layers": LAYERS,
    }
    vision_config = {
        "hidden_size": WIDTH,
        "image_size": sizes.image_size,
        "intermediate_size": 4 * WIDTH,
        "model_type": "clip_vision_model",
        "num_attention_heads": WIDTH // 64,
        "num_hidden_layers": LAYERS,
        "patch_size": PATCH_SIZE,
    }
    return text_config, vision_config


STARTS = {
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
PARTS = {".ln_": ".layer_norm", ".attn.": ".self_attn.", ".mlp.c_fc.": ".mlp.fc1.", ".mlp.c_proj.": ".mlp.fc2."}


def transformers_state(clip: State) -> State:
    """open_clip's weights under the names of a CLIPModel."""
    renamed: State = {}
    for name, tensor in clip.items():
        start = next(start for start in STARTS if name.startswith(start))
        name = STARTS[start] + name.removeprefix(start)
        if start.endswith("resblocks."):
            for old, new in PARTS.items():
                name = name.replace(old, new)
        if ".in_proj_" in name:
            thirds = [f"{letter}_proj." for letter in "qkv"]
            renamed |= {name.replace("in_proj_", third): part.clone() for third, part in zip(thirds, tensor.chunk(3))}
        else:
            renamed[name] = tensor.T.contiguous() if start in ("visual.proj", "text_projection") else tensor
    return renamed


def train_one_step(clip: State, sizes: Sizes) -> dict[str, Any]:
    """A step of open_clip's AdamW for the image tower, which changes ``clip``. The state dict of the optimizer."""
    trained = {name: tensor for name, tensor in clip.items() if name.startswith("visual.") or name == "logit_scale"}
    for tensor in trained.values():
        tensor.requires_grad_()
    plain = [tensor for tensor in trained.values() if tensor.ndim < 2]
    decayed = [tensor for tensor in trained.values() if tensor.ndim >= 2]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    vit_forward(clip, photos(2, sizes.image_size), WIDTH // 64, sizes.activation).square().mean().backward()
    optimizer.step()
    for tensor in trained.values():
        tensor.requires_grad_(False).grad = None
    return optimizer.state_dict()
