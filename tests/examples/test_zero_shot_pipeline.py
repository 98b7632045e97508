"""examples/zero_shot_pipeline.py: transformers' pipeline scores pictures as the project's own zero-shot path does."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from examples import zero_shot_pipeline
from tests.small_models import photos
from utils.data.images import ImageTransform, decode
from utils.errors import UserError
from utils.methods.losses import class_logits
from utils.models.encoders import make_encoder
from utils.models.published import load_model
from utils.models.zeroshot import class_embeddings, to_pixel_values

LABELS = ["zero", "one", "the number seven", "a {curly} brace"]


def save_picture(path, width, height, seed=0):
    pixels = photos(1, max(width, height), seed)[0, :, :height, :width]
    Image.fromarray((pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(path)


@pytest.mark.parametrize("size", [(32, 32), (50, 37), (20, 64)], ids=str)
def test_scores_are_those_of_the_projects_own_path(small_clip, tmp_path, size):
    if importlib.util.find_spec("torchvision") and size != (32, 32):
        pytest.skip("with torchvision the pipeline resizes by it, and its pixels differ")
    picture = tmp_path / "picture.png"
    save_picture(picture, *size)
    template = "a photo of the number {c}."
    answers = dict(zero_shot_pipeline.scores(str(small_clip), str(picture), LABELS, template))
    assert list(answers.values()) == sorted(answers.values(), reverse=True)

    clip, processor = load_model(str(small_clip))
    encoder = make_encoder(clip, processor).eval()
    image = decode(picture.read_bytes(), ImageTransform.from_processor(processor.image_processor))[None]
    with torch.no_grad():
        texts = class_embeddings(clip, processor, LABELS, [template])
        logits = class_logits(encoder(to_pixel_values(image, "cpu")), texts, clip.logit_scale.exp())
    expected = logits.softmax(dim=-1)[0].tolist()
    assert max(expected) - min(expected) > 1e-2
    assert [answers[label] for label in LABELS] == pytest.approx(expected, abs=1e-5)


def test_mistakes_end_in_one_line(small_clip, tmp_path, capsys, monkeypatch):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["zero_shot_pipeline.py", *map(str, words)])
        zero_shot_pipeline.main()

    save_picture(tmp_path / "a.png", 32, 32)
    (tmp_path / "b.png").write_bytes(b"no picture")
    for words, expected in [
        (["--model", small_clip, "--image", tmp_path / "b.png", "--labels", "x"], "b.png: no picture"),
        (["--model", small_clip, "--image", tmp_path / "c.png", "--labels", "x"], "c.png: no picture"),
        (["--model", tmp_path, "--image", tmp_path / "a.png", "--labels", "x"], "config.json"),
        (["--model", small_clip, "--image", tmp_path / "a.png", "--labels", "x", "--template", "a"], "--template 'a'"),
    ]:
        with pytest.raises(UserError, match=expected):
            call(*words)
    call("--model", small_clip, "--image", tmp_path / "a.png", "--labels", "one", "two")
    lines = capsys.readouterr().out.strip().splitlines()
    assert {line.split()[1] for line in lines} == {"one", "two"}
    assert sum(float(line.split()[0]) for line in lines) == pytest.approx(1, abs=2e-4)
