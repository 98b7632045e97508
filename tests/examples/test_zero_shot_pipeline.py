"""examples/zero_shot_pipeline.py: transformers' pipeline scores pictures as the project's own zero-shot path does."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from examples import zero_shot_pipeline
from tests.published_layouts import FARE, save_layouts
from tests.small_models import photos
from utils.data.images import ImageTransform, decode
from utils.errors import UserError
from utils.methods.losses import class_logits
from utils.models.encoders import make_encoder
from utils.models.published import load_model, model_name
from utils.models.zeroshot import class_embeddings, to_pixel_values

LABELS = ["zero", "one", "the number seven", "a {curly} brace"]


def save_picture(path, width, height, seed=0):
    pixels = photos(1, max(width, height), seed)[0, :, :height, :width]
    Image.fromarray((pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(path)


@pytest.mark.parametrize("size", [(32, 32), (50, 37), (20, 64)], ids=str)
def test_scores_are_those_of_the_projects_own_path(small_clip, tmp_path, size):
    picture = tmp_path / "picture.png"
    save_picture(picture, *size)
    template = "a photo of the number {c}."
    answers = dict(zero_shot_pipeline.scores(str(small_clip), str(picture), LABELS, template))
    assert list(answers.values()) == sorted(answers.values(), reverse=True)

    expected = own_scores(str(small_clip), picture, LABELS, template)
    assert max(expected) - min(expected) > 1e-2
    assert [answers[label] for label in LABELS] == pytest.approx(expected, abs=1e-5)


def own_scores(name, picture, labels, template):
    """By the path that evaluations take."""
    clip, processor = load_model(name)
    encoder = make_encoder(clip, processor).eval()
    image = decode(picture.read_bytes(), ImageTransform.from_processor(processor.image_processor))[None]
    with torch.no_grad():
        texts = class_embeddings(clip, processor, labels, [template])
        logits = class_logits(encoder(to_pixel_values(image, "cpu")), texts, clip.logit_scale.exp())
    return logits.softmax(dim=-1)[0].tolist()


@pytest.mark.parametrize("size", [(32, 32), (50, 37)], ids=str)
def test_a_directory_works_by_its_name_alone(small_clip, tmp_path, size):
    """What the docstring says: transformers' pipeline, without this project's code."""
    if importlib.util.find_spec("torchvision") and size != (32, 32):
        pytest.skip("with torchvision this pipeline resizes by it, and its pixels differ")
    picture = tmp_path / "picture.png"
    save_picture(picture, *size)
    classify = pipeline("zero-shot-image-classification", model=str(small_clip))
    found = classify(str(picture), candidate_labels=["zero", "one"], hypothesis_template="a photo of a {}.")
    answers = zero_shot_pipeline.scores(str(small_clip), str(picture), ["zero", "one"], "a photo of a {c}.")
    assert dict(answers) == pytest.approx({answer["label"]: answer["score"] for answer in found}, abs=1e-5)


@pytest.mark.parametrize("name", [FARE, "robustvlm_visual", "leaf_clip_model"])
def test_published_layouts_are_scored_as_by_the_projects_own_path(tmp_path, monkeypatch, capsys, name):
    one = save_layouts(tmp_path / "published")[name]
    picture = tmp_path / "picture.png"
    save_picture(picture, 48, 32)
    words = ["--model", one.path, "--image", picture, "--labels", *LABELS[:3], "--template", "a photo of {c}"]
    words += ["--base_model", one.base_model] * (one.base_model is not None)
    words += ["--processor", one.processor] * (one.processor is not None)
    monkeypatch.setattr(sys, "argv", ["zero_shot_pipeline.py", *map(str, words)])
    zero_shot_pipeline.main()
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.strip().splitlines()]
    found = {label: float(score) for score, label in lines}
    expected = own_scores(model_name(one.path, one.base_model, one.processor), picture, LABELS[:3], "a photo of {c}")
    assert [found[label] for label in LABELS[:3]] == pytest.approx(expected, abs=1e-4)


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
