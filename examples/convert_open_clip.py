r"""Writes a CLIP in the layout of transformers or of open_clip; the weights stay the same, bit by bit.

    python examples/convert_open_clip.py --to transformers --input models/laion-b32-open-clip \
      --output_dir models/laion-b32
    python examples/convert_open_clip.py --to open_clip --input runs/lore4 --output_dir runs/lore4-open-clip

--input is in any layout that the scripts load, see docs/encoders.md: a directory of transformers or of open_clip, an id
of the hub, or a file of weights, which --base_model completes. The output is for CLIPModel.from_pretrained and
CLIPProcessor.from_pretrained, or for open_clip.create_model_and_transforms("local-dir:<directory>"). ViT towers become
a CLIPModel, ConvNeXt towers a VisionTextDualEncoderModel. In transformers' layout weights are float32. In open_clip's
they have the names, shapes and dtypes of --input if that was in open_clip's too, else float32.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import flag, parse_settings, required, run
from utils.errors import UserError, os_errors
from utils.models.hub import find_config, load
from utils.models.published import (
    BASE_MODEL_HELP,
    MODEL_TYPES,
    OPEN_CLIP_MODEL_TYPES,
    PROCESSOR_HELP,
    image_size,
    model_name,
    open_clip_fields,
    save_model,
    write_open_clip,
)
from utils.training.checkpoint import replace_directory

conversion_flag = partial(flag, group="conversion")
LAYOUTS = ("transformers", "open_clip")


@dataclass
class Settings:
    to: str = conversion_flag(None, "the layout that is written", choices=LAYOUTS, required=True)
    input: str = required("id, directory or file of weights, or NAME@BASE", group="conversion", path=True)
    base_model: str | None = conversion_flag(None, BASE_MODEL_HELP, path=True)
    processor: str | None = conversion_flag(None, PROCESSOR_HELP, path=True)
    output_dir: str = required("where the model goes", group="conversion", path=True)
    custom_text: bool = conversion_flag(
        False, "to open_clip: put the text tower under text., as open_clip's CustomTextCLIP has it"
    )


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    output_dir, to_open_clip = Path(settings.output_dir), settings.to == "open_clip"
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise UserError(f"--output_dir {output_dir}: exists and is not an empty directory; give another one")
    if settings.custom_text and not to_open_clip:
        raise UserError("--custom_text: has no meaning with --to transformers; leave it out")
    name = model_name(settings.input, settings.base_model, settings.processor)
    where, kinds = f"--input {name}", OPEN_CLIP_MODEL_TYPES if to_open_clip else MODEL_TYPES
    _, config = find_config(name, "--input", kinds)
    if to_open_clip and config is not None:
        open_clip_fields(config, where)  # what open_clip does not have is refused before weights are downloaded
    model, processor = load(name, "--input", kinds)
    image_processor = getattr(processor, "image_processor", processor)

    aside, notes = output_dir.with_name(f".{output_dir.name}.incomplete"), []
    try:
        with os_errors(f"--output_dir {output_dir}: cannot be written", "free space or give another one"):
            shutil.rmtree(aside, ignore_errors=True)  # left by a killed run
            aside.mkdir(parents=True)
            if to_open_clip:
                form = getattr(model, "open_clip_form", None)
                tokenizer = processor.tokenizer
                notes = write_open_clip(aside, model, image_processor, tokenizer, where, form, settings.custom_text)
            else:
                save_model(aside, model, processor, {})
            if output_dir.exists():
                output_dir.rmdir()
            replace_directory(aside, output_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    count = sum(tensor.numel() for tensor in model.parameters())
    print(f"{output_dir}: {type(model).__name__}, {count:,} parameters, {image_size(processor)} px")
    for note in notes:
        print(f"open_clip: {note}")


if __name__ == "__main__":
    run(main)
