r"""Classifies a picture with a trained model in transformers' own pipeline: a picture and labels in, scores out.

    python examples/zero_shot_pipeline.py --model runs/lore4 --image cat.jpg --labels cat dog "a red car"

The model may have any layout that evaluate.py loads, and is loaded in the same way. The pipeline is transformers' own
and gets the loaded model, tokenizer and image processor. A trained directory works without this project's code too:
pipeline("zero-shot-image-classification", model="runs/lore4") gives the same scores. They equal those of evaluate.py
with one template: softmax over the labels of exp(logit_scale) * cosine. For a model from open_clip's layouts they can
differ a little if half a pixel is cropped: evaluate.py rounds to even, as open_clip does, the pipeline rounds down.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from transformers import pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import flag, parse_settings, required, run
from utils.data.images import ImageError, ImageTransform, decode
from utils.errors import UserError
from utils.models.hub import find_config, load
from utils.models.published import (
    BASE_MODEL_HELP,
    PROCESSOR_HELP,
    ModelName,
    model_name,
    quiet_transformers,
)


@dataclass
class Settings:
    model: str = required("a CLIP: id, directory or file of weights, or NAME@BASE", group="what", path=True)
    base_model: str | None = flag(None, BASE_MODEL_HELP, group="what", path=True)
    processor: str | None = flag(None, PROCESSOR_HELP, group="what", path=True)
    image: str = required("a picture", group="what", path=True)
    labels: list[str] = required("what may be on it", group="what", many=True)
    template: str = flag("a photo of a {c}.", "text of a label, {c} its place", group="what")


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    if "{c}" not in settings.template:
        raise UserError(f"--template {settings.template!r}: has no {{c}}, the place of the label")
    name = model_name(settings.model, settings.base_model, settings.processor)
    for label, score in scores(name, settings.image, settings.labels, settings.template):
        print(f"{score:8.4f}  {label}")


def scores(name: str | ModelName, image: str, labels: list[str], template: str) -> list[tuple[str, float]]:
    """(label, score) from the highest score down; the scores sum to 1. Raises ``UserError``."""
    find_config(name, "--model", ("clip",))
    try:
        pixels = decode(Path(image).read_bytes(), ImageTransform(resize=None, crop=None))  # the project's decoder
    except (OSError, ImageError) as error:
        raise UserError(f"--image {image}: no picture ({error}); give a JPEG, PNG or WebP") from None
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    model, processor = load(name, "--model", ("clip",))
    with quiet_transformers():
        parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
        classify = pipeline("zero-shot-image-classification", model=model, **parts)
        # The pipeline uses str.format, so escape all braces but {c}.
        text = template.replace("{", "{{").replace("}", "}}").replace("{{c}}", "{}")
        answers = classify(picture, candidate_labels=labels, hypothesis_template=text)
    return [(answer["label"], answer["score"]) for answer in answers]


if __name__ == "__main__":
    run(main)
