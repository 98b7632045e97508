r"""Puts a robust CLIP image tower into a LLaVA: copies its directory and replaces only the tower's weights.

    python examples/swap_vision_tower.py --llava models/llava-1.5-7b-hf --model runs/lore4-l14-336 \
      --output_dir models/llava-1.5-7b-lore4

--llava is a directory of a LlavaForConditionalGeneration or LlavaNextForConditionalGeneration with safetensors. --model
is the output_dir of train_lore.py, or another CLIP or image half of a CLIP, in any layout that the scripts load, of the
same architecture as LLaVA's tower; fare_eps_2.pt@CLIP is an image tower in a file, and the CLIP that LLaVA's tower is
of. The language model is not loaded: files are copied, and in the copies the bytes of the tower's tensors are
overwritten, rounded to the file's precision. So even a 13B model needs only the memory of one CLIP, and all other bytes
stay the same.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import flag, parse_settings, required, run
from utils.data.images import normalisation_of_file, pixel_normalisation
from utils.errors import UserError
from utils.models.hub import find_model
from utils.models.published import (
    BASE_MODEL_HELP,
    PROCESSOR_HELP,
    Described,
    describe,
    image_processor_file,
    image_tower,
    load_image_processor,
    load_without_processor,
    model_name,
    quiet_transformers,
)
from utils.text_files import parse_json
from utils.training.checkpoint import replace_directory

ARCHITECTURE = (
    "hidden_size", "num_hidden_layers", "patch_size", "image_size",
    "hidden_act", "num_attention_heads", "intermediate_size", "layer_norm_eps",
)  # fmt: skip
CLIP_TYPES = ("clip", "clip_vision_model")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
# transformers 5 writes vision_tower.embeddings..., 4 wrote vision_tower.vision_model.embeddings...; in a whole model
# the name may also begin with model.
TOWER = re.compile(r"(?:^|\.)vision_tower\.(?:vision_model\.)?(.+)$")


@dataclass
class Settings:
    llava: str = required("directory of a LLaVA or LLaVA-NeXT model, with safetensors", group="models", path=True)
    model: str = required(
        "the CLIP whose image tower goes in: id, directory or file of weights, or NAME@BASE", group="models", path=True
    )
    base_model: str | None = flag(None, BASE_MODEL_HELP, group="models", path=True)
    processor: str | None = flag(None, PROCESSOR_HELP, group="models", path=True)
    output_dir: str = required("where the new LLaVA goes", group="output", path=True)
    hard_links: bool = flag(
        False, "link the files without a part of the tower, in place of copying: no space, but shared", group="output"
    )


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    llava, output_dir = Path(settings.llava), Path(settings.output_dir)
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise UserError(f"--output_dir {output_dir}: exists and is not an empty directory; give another one")
    if not llava.is_dir():
        raise UserError(f"--llava {llava}: no such directory; bring it with `hf download <id> --local-dir <directory>`")
    vision_config = llava_vision_config(llava)
    name = model_name(settings.model, settings.base_model, settings.processor)
    model = describe(find_model(name, "--model", CLIP_TYPES), "--model", CLIP_TYPES)
    check_architecture(vision_config, model)
    check_normalisation(llava, model)
    slots = find_tower(llava)
    tower = image_tower(load_without_processor(model, "--model"))[0].state_dict()
    check_tensors(slots, tower, settings)

    aside = output_dir.with_name(f".{output_dir.name}.incomplete")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        copied = copy_files(llava, aside, {slot.file for slot in slots.values()}, settings.hard_links)
        moved, norm = 0.0, 0.0
        for name, slot in slots.items():
            difference, before = overwrite(aside / slot.file, slot, tower[name])
            moved, norm = moved + difference, norm + before
        if output_dir.exists():
            output_dir.rmdir()
        replace_directory(aside, output_dir)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"--output_dir {output_dir}: cannot be written ({error.strerror})") from None
    files = len({slot.file for slot in slots.values()})
    print(
        f"{output_dir}: {len(slots)} tensors of the image tower replaced in {files} of {copied} weight files; "
        f"the tower moved by {100 * (moved / norm) ** 0.5:.2f} % of its length"
    )


def llava_vision_config(llava: Path) -> PreTrainedConfig:
    """The config of LLaVA's image tower. Raises ``UserError``."""
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(llava, trust_remote_code=False)
    except Exception as error:  # from transformers, depending on the mistake
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"--llava {llava}: no model that transformers knows ({reason})") from None
    if config.model_type not in ("llava", "llava_next"):
        raise UserError(f"--llava {llava}: model type {config.model_type!r}; expected llava or llava_next")
    if config.vision_config.model_type != "clip_vision_model":
        raise UserError(f"--llava {llava}: its image tower is a {config.vision_config.model_type}; expected CLIP's")
    return config.vision_config


def check_architecture(there: PreTrainedConfig, model: Described) -> None:
    """Raises ``UserError`` if the tower of ``model`` has another architecture than LLaVA's."""
    here = model.config.vision_config if model.config.model_type == "clip" else model.config
    for name in ARCHITECTURE:
        if getattr(here, name) != getattr(there, name):
            raise UserError(
                f"--model {model.name}: {name} is {getattr(here, name)}, LLaVA's image tower has "
                f"{getattr(there, name)}; give a model that was fine-tuned from LLaVA's own encoder"
            )


def check_normalisation(llava: Path, model: Described) -> None:
    """Raises ``UserError`` if both models have an image processor and these normalise differently."""
    there, here = normalisation_of_llava(llava), normalisation(model)
    if there and here and there != here:
        raise UserError(
            f"--model {model.name}: normalises with {here[0]} and {here[1]}, LLaVA with {there[0]} and {there[1]}; "
            "the tower would see other images than it was trained on"
        )


def normalisation(model: Described) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation for pixels in [0, 1], to six digits; None if the model has no image processor."""
    completed = model.name.base_model or model.name.processor
    if model.layout.kind == "transformers" and not completed and image_processor_file(model.name.path) is None:
        return None
    image_processor, _ = load_image_processor(model, "--model")
    return _to_six_digits(*pixel_normalisation(image_processor))


def normalisation_of_llava(llava: Path) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation for pixels in [0, 1], to six digits; None if no file has them."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        try:
            settings = parse_json((llava / name).read_text(encoding="utf-8"))
            settings = settings.get("image_processor", settings)
            return _to_six_digits(*normalisation_of_file(settings))
        except (OSError, ValueError, TypeError, AttributeError, UserError):
            continue
    return None


def _to_six_digits(mean: list[float], std: list[float]) -> tuple[list[float], list[float]]:
    return [round(value, 6) for value in mean], [round(value, 6) for value in std]


class Slot(NamedTuple):
    """The position of a tensor of the tower in a file."""

    file: str
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # its first byte in the file
    size: int  # bytes


def find_tower(llava: Path) -> dict[str, Slot]:
    """Finds the image tower's tensors in the headers: name in ``CLIPVisionModel`` -> slot. Raises ``UserError``."""
    slots: dict[str, Slot] = {}
    for file in weight_files(llava):
        for key, entry, start in read_header(llava / file, llava):
            match = TOWER.search(key)
            if match is None or match[1] == "embeddings.position_ids":  # a buffer in old files: 0, 1, 2, ...
                continue
            if match[1] in slots:
                raise UserError(f"--llava {llava}: {key} and {slots[match[1]].key} are the same tensor of the tower")
            if entry["dtype"] not in DTYPES:
                raise UserError(
                    f"--llava {llava}: {key} is stored as {entry['dtype']}; expected one of {', '.join(DTYPES)}, "
                    "a model that is not quantised"
                )
            first, last = entry["data_offsets"]
            dtype = DTYPES[entry["dtype"]]
            slots[match[1]] = Slot(file, key, dtype, tuple(entry["shape"]), start + first, last - first)
    if not slots:
        raise UserError(f"--llava {llava}: no tensor of a vision_tower in its safetensors files")
    return slots


def weight_files(llava: Path) -> list[str]:
    """The names of the safetensors files: those in the index, or the only one. Raises ``UserError``."""
    index = llava / "model.safetensors.index.json"
    if not index.is_file():
        if (llava / "model.safetensors").is_file():
            return ["model.safetensors"]
        raise UserError(
            f"--llava {llava}: neither model.safetensors nor model.safetensors.index.json; "
            "save it by transformers' save_pretrained"
        )
    try:
        files = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
        plain = all(Path(file).name == file for file in files)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--llava {index}: not an index of safetensors files") from None
    missing = [file for file in files if not (plain and (llava / file).is_file())]
    if missing:
        raise UserError(f"--llava {llava}: {missing[0]} of its index is not there; download the whole model")
    return files


def read_header(path: Path, llava: Path) -> list[tuple[str, dict, int]]:
    """(key, entry, first byte of the data) for every tensor in a safetensors file. Raises ``UserError``.

    The format: 8 bytes with the header's length, the header as JSON, then the tensors' bytes, little-endian.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError("a header that is too long")
            header = parse_json(file.read(length))
        size = path.stat().st_size - 8 - length
        entries = [(key, entry, 8 + length) for key, entry in header.items() if key != "__metadata__"]
        for key, entry, _ in entries:
            first, last = entry["data_offsets"]
            itemsize = DTYPES[entry["dtype"]].itemsize if entry["dtype"] in DTYPES else None
            count = torch.Size(entry["shape"]).numel()
            if not 0 <= first <= last <= size or (itemsize and last - first != itemsize * count):
                raise ValueError(f"{key} lies outside of the file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(
            f"--llava {llava}: {path.name} is no whole safetensors file ({str(error)[:120]}); download it again"
        ) from None
    return entries


def check_tensors(slots: dict[str, Slot], tower: dict[str, Tensor], settings: Settings) -> None:
    """Raises ``UserError`` unless both towers have the same tensors and shapes, and the file's dtype can hold them."""
    for name in sorted(set(slots) | set(tower)):
        if name not in slots:
            raise UserError(
                f"--llava {settings.llava}: its image tower lacks {name}, which --model {settings.model} has"
            )
        if name not in tower:
            raise UserError(f"--model {settings.model}: lacks {name}, LLaVA's {slots[name].key}")
        if slots[name].shape != tuple(tower[name].shape):
            raise UserError(
                f"--model {settings.model}: {name} is {tuple(tower[name].shape)}, LLaVA's {slots[name].key} "
                f"{slots[name].shape}"
            )
        if tower[name].abs().max() > torch.finfo(slots[name].dtype).max:
            raise UserError(
                f"--model {settings.model}: {name} reaches {tower[name].abs().max():.3g}, "
                f"more than the {slots[name].dtype} of LLaVA's file can hold; save LLaVA in bfloat16 or float32 first"
            )


def copy_files(llava: Path, aside: Path, changed: set[str], hard_links: bool) -> int:
    """Copies the directory, with ``hard_links`` linking unchanged weight files. -> number of safetensors files.

    .bin files with a second copy of the weights are left out, because they would keep the old tower.
    """
    weights = 0
    for path in sorted(llava.rglob("*")):
        name = path.relative_to(llava)
        hidden = any(part.startswith(".") for part in name.parts)  # such as .cache/ of a download
        if path.is_dir() or hidden or path.name.startswith("pytorch_model"):
            continue
        target = aside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        weights += path.suffix == ".safetensors"
        if hard_links and path.suffix == ".safetensors" and str(name) not in changed:
            os.link(path.resolve(), target)  # in the hub's cache, link the blob, not the symbolic link to it
        else:
            shutil.copyfile(path, target)
    return weights


def overwrite(path: Path, slot: Slot, tensor: Tensor) -> tuple[float, float]:
    """Overwrites the bytes of ``slot`` with ``tensor``. -> ||new - old||^2 and ||old||^2."""
    new = tensor.to(slot.dtype).contiguous()
    with path.open("r+b") as file:
        file.seek(slot.start)
        old = torch.frombuffer(bytearray(file.read(slot.size)), dtype=slot.dtype).view(slot.shape)
        file.seek(slot.start)
        file.write(new.flatten().view(torch.uint8).numpy().tobytes())
    return float((new.double() - old.double()).square().sum()), float(old.double().square().sum())


if __name__ == "__main__":
    run(main)
