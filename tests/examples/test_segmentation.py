"""examples/segmentation.py: the head learns, the attack stays in the ball and costs mIoU, seeds repeat."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score
from transformers import CLIPImageProcessorPil, CLIPModel, Dinov2Config, Dinov2Model

from examples import segmentation
from examples.segmentation import (
    CLASSES,
    Settings,
    attack,
    fit_head,
    load_encoder,
    make_images,
    patch_tokens,
    predict,
    segmentation_scores,
)
from tests.conftest import run_script
from tests.published_layouts import FARE, save_layouts
from tests.small_models import save_small_clip
from utils.errors import UserError


def run_here(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["segmentation.py", *map(str, arguments)])
        segmentation.main()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Wider than the suite's small CLIP, so that random tokens tell textures apart."""
    directory = tmp_path_factory.mktemp("models") / "wide"
    save_small_clip(directory, hidden_size=64)
    return directory


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "dinov2"
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    Dinov2Model(config).save_pretrained(directory)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(directory)
    return directory


def test_images_depend_on_their_seed_alone_and_masks_tell_what_was_drawn():
    images, masks = make_images(60, 32, 0, "train")
    again, masks_again = make_images(20, 32, 0, "train")
    assert torch.equal(images[:20], again)
    assert torch.equal(masks[:20], masks_again)
    others = (make_images(20, 32, 1, "train"), make_images(20, 32, 0, "test"))
    assert not any((images[:20] == other[0]).flatten(1).all(dim=1).any() for other in others)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert set(masks.unique().tolist()) == set(range(len(CLASSES)))
    # Inside of a shape the texture has two colours only; a background has nearly as many as pixels.
    for image, mask in zip(images, masks):
        for kind in mask.unique().tolist():
            colours = len(image[:, mask == kind].T.unique(dim=0))
            assert colours > 20 if kind == 0 else colours <= 6  # three shapes of a kind at most


def test_scores_are_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 4, (3, 9, 7), generator=generator)  # class 4 is nowhere
    predicted = torch.where(
        torch.rand(3, 9, 7, generator=generator) < 0.6, masks, torch.randint(0, 4, (3, 9, 7), generator=generator)
    )
    scores = segmentation_scores(predicted, masks, 5)
    expected = jaccard_score(masks.flatten(), predicted.flatten(), average=None, labels=range(4))
    np.testing.assert_allclose(scores["iou"][:4], expected)
    assert scores["iou"][4] is None
    assert scores["miou"] == pytest.approx(expected.mean())
    assert scores["pixel_accuracy"] == pytest.approx(
        confusion_matrix(masks.flatten(), predicted.flatten()).trace() / masks.numel()
    )


def test_patch_tokens_are_what_the_model_gives_without_the_class_token(clip, dinov2):
    pixel_values = make_images(2, 32, 0, "test")[0]
    model = CLIPModel.from_pretrained(clip).eval()
    encoder = load_encoder(str(clip))
    normalised = (pixel_values - encoder.image_mean) / encoder.image_std
    with torch.no_grad():
        tokens = patch_tokens(encoder, pixel_values)
        seen = model.vision_model(normalised)
        assert tokens.shape == (2, 16, 64)
        torch.testing.assert_close(
            tokens, model.vision_model.post_layernorm(seen.last_hidden_state)[:, 1:], rtol=1e-5, atol=1e-5
        )
        # The class token goes the same way: it is what is pooled.
        torch.testing.assert_close(model.vision_model.post_layernorm(seen.last_hidden_state)[:, 0], seen.pooler_output)
        encoder, model = load_encoder(str(dinov2)), Dinov2Model.from_pretrained(dinov2).eval()
        normalised = (pixel_values - encoder.image_mean) / encoder.image_std
        expected = model(normalised).last_hidden_state[:, 1:]
        torch.testing.assert_close(patch_tokens(encoder, pixel_values), expected, rtol=1e-5, atol=1e-5)


def test_a_head_learns_and_the_attack_takes_it_away(clip):
    settings = Settings(model=[str(clip)], output_dir="", num_train=300, head_epochs=10)
    encoder = load_encoder(str(clip))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    images, masks = make_images(60, 32, 0, "test")
    head = fit_head(encoder, *make_images(300, 32, 0, "train"), settings)

    def miou(pixel_values: torch.Tensor) -> float:
        return segmentation_scores(predict(encoder, head, pixel_values, 32), masks, len(CLASSES))["miou"]

    constant = segmentation_scores(torch.zeros_like(masks), masks, len(CLASSES))["miou"]
    clean = miou(images)
    assert clean > constant + 0.15
    for kind in ("patch_tokens", "embedding"):
        settings.attack = kind
        attacked = attack(encoder, images, 16, settings)
        assert (attacked - images).abs().max() <= 16 / 255 + 1e-6
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        assert torch.equal(attacked, attack(encoder, images, 16, settings))
        noise = images + (16 / 255) * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).sign()
        assert miou(attacked) < min(clean, miou(noise.clamp(0, 1))) - 0.03

        def moved(pixel_values: torch.Tensor, kind: str = kind) -> torch.Tensor:
            output = encoder if kind == "embedding" else lambda x: patch_tokens(encoder, x).flatten(1)
            with torch.no_grad():
                return (output(pixel_values) - output(images)).square().sum(dim=1)

        # More steps climb further, also in other batches; the start alone is hardly anything.
        settings.attack_steps, settings.batch_size = 1, 7
        assert (moved(attacked) > moved(attack(encoder, images, 16, settings))).float().mean() > 0.95
        settings.attack_steps, settings.batch_size = 10, 32
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_the_whole_script_repeats(clip, dinov2, tmp_path):
    call = [
        "--model",
        clip,
        dinov2,
        "--num_train",
        100,
        "--num_test",
        20,
        "--head_epochs",
        2,
        "--eps",
        8,
        "--attack_steps",
        3,
    ]
    output = run_script("examples/segmentation.py", *call, "--output_dir", tmp_path / "a")
    assert "mIoU" in output
    run_here(*call, "--output_dir", tmp_path / "b")
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in "ab")
    assert first["results"] == second["results"]
    assert [(row["model"], row["attack"], row["eps"]) for row in first["results"]] == [
        (str(clip), "clean", None),
        (str(clip), "patch_tokens", 8.0),
        (str(dinov2), "clean", None),
        (str(dinov2), "patch_tokens", 8.0),
        ("background everywhere", "clean", None),
    ]
    with Image.open(tmp_path / "a/predictions.png") as picture:
        assert picture.width > picture.height / 2 > 200
    with pytest.raises(UserError, match="not an empty directory"):
        run_here(*call, "--output_dir", tmp_path / "a")
    with pytest.raises(UserError, match=r"config\.json"):
        run_here("--model", tmp_path, "--output_dir", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_open_clips_folder_and_an_image_tower_with_its_base_are_models_too(tmp_path, monkeypatch):
    """By NAME@BASE and by --base_model; named in the picture without the base."""
    layouts = save_layouts(tmp_path / "published")
    tower, folder = layouts["robustvlm_visual"], layouts[FARE].path
    drawn = []
    monkeypatch.setattr(segmentation, "draw_grid", lambda path, rows: drawn.extend(rows))
    small = ["--num_train", 8, "--num_test", 4, "--head_epochs", 1, "--eps", 8, "--attack_steps", 1]
    named = f"{tower.path}@{tower.base_model}"
    run_here("--model", named, folder, *small, "--output_dir", tmp_path / "a")
    first = json.loads((tmp_path / "a/results.json").read_text())["results"]
    assert [row["model"] for row in first] == [named, named, folder, folder, "background everywhere"]
    labels = [text for _, pictures in drawn for _, text in pictures]
    assert {text.split("\n")[0] for text in labels} == {"image", "truth", "fare_eps_2.pt", FARE}
    run_here("--model", tower.path, "--base_model", folder, *small, "--output_dir", tmp_path / "b")
    second = json.loads((tmp_path / "b/results.json").read_text())["results"]
    assert [row["miou"] for row in second[:2]] == [row["miou"] for row in first[:2]]
    assert [row["model"] for row in second[:2]] == [tower.path] * 2

    # The tower is the file's, not the base's.
    images = tower.images[:2]
    with torch.no_grad():
        embeds = load_encoder(named)(images)
    expected = tower.expected["image_features"][:2]
    assert (embeds - expected).norm() < 1e-5 * expected.norm()
