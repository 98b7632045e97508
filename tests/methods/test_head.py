"""utils/methods/head.py: the dial t, and that a folded head is the head."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import run_script
from tests.small_models import photos
from utils.errors import UserError
from utils.methods.head import (
    Head,
    fold_head,
    head_power,
    head_powers,
    load_head,
    neutral_t,
    orthogonality_penalty,
    save_head,
    set_head_t,
    unfolded,
    warn_of_condition,
)
from utils.models.encoders import make_encoder
from utils.models.published import load_model, save_model
from utils.models.zeroshot import class_embeddings

TEXTS, TEMPLATES = ["zero", "a dog", "airplane"], ["a photo of a {c}.", "{c}"]


def trained_head(size=24, seed=0):
    """Far from the identity and from symmetric."""
    return torch.eye(size) + 0.5 * torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


def similarities(weight, images, texts):
    return F.normalize(images @ weight.T, dim=-1) @ F.normalize(texts @ weight.T, dim=-1).T


def test_the_ends_of_the_dial():
    images, texts = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    weight = trained_head()
    torch.testing.assert_close(head_power(weight, 1.0), weight, rtol=1e-5, atol=1e-6)
    original = similarities(torch.eye(24), images, texts)
    torch.testing.assert_close(similarities(head_power(weight, 0.0), images, texts), original, rtol=1e-5, atol=1e-6)
    assert (similarities(weight, images, texts) - original).abs().max() > 0.1


@pytest.mark.parametrize("t", [-0.5, 0.0, 0.3, 1.0, 2.0])
def test_similarities_depend_on_the_symmetric_part_alone(t):
    """W_t^T W_t = V S^2t V^T: the matrix power t of W^T W, computed another way, through its eigenvectors."""
    weight = trained_head().double()
    values, vectors = torch.linalg.eigh(weight.T @ weight)
    power = head_power(weight, t)
    torch.testing.assert_close(power.T @ power, (vectors * values.pow(t)) @ vectors.T)
    assert torch.equal(head_powers(weight, [7.0, t])[1], power)


def test_tiny_singular_values_are_clamped_and_warned_of():
    left, values, right = torch.linalg.svd(trained_head())
    values[-1] = 0
    singular = (left * values) @ right
    assert head_power(singular, -1.0).isfinite().all()
    assert head_power(singular, -1.0).norm() < 1e5
    assert "condition number" in warn_of_condition(singular)
    assert warn_of_condition(torch.eye(24)) is None
    assert "number is 2e+03 " in warn_of_condition(torch.diag(torch.tensor([2000.0, 3.0, 1.0])))
    for broken in (torch.zeros(4, 4), torch.full((4, 4), math.nan)):
        with pytest.raises(ValueError, match="zero or not finite"):
            head_power(broken, 0.5)


def test_orthogonality_penalty():
    rotation = torch.linalg.qr(trained_head()).Q
    assert orthogonality_penalty(rotation) < 1e-8
    assert orthogonality_penalty(2 * torch.eye(3)) == pytest.approx(27)  # three times (4 - 1)^2


@pytest.mark.parametrize("t", [-0.5, 0.0, 0.5, 1.0])
def test_a_folded_model_gives_the_similarities_of_the_head(small_clip, tmp_path, t):
    """Through a directory and from_pretrained, against W_t applied to the original's embeddings."""
    clip, processor = load_model(str(small_clip))
    encoder, weight = make_encoder(clip, processor), trained_head()
    with torch.no_grad():
        images = encoder(photos(6))
        texts = torch.stack([class_embeddings(clip, processor, TEXTS, [template]) for template in TEMPLATES], dim=1)
        weight_t = head_power(weight, t)
        per_prompt = F.normalize(texts @ weight_t.T, dim=-1).mean(dim=1)
        expected = F.normalize(images @ weight_t.T, dim=-1) @ F.normalize(per_prompt, dim=-1).T
    fold_head(clip, weight_t)
    save_model(tmp_path, clip, processor, {})
    folded, processor = load_model(str(tmp_path))
    with torch.no_grad():
        found = F.normalize(make_encoder(folded, processor)(photos(6)), dim=-1)
        found = found @ class_embeddings(folded, processor, TEXTS, TEMPLATES).T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


def test_an_exported_model_can_be_given_another_t(small_clip, tmp_path):
    clip, processor = load_model(str(small_clip))
    weight = trained_head()
    original = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    save_head(tmp_path, weight, clip)
    fold_head(clip, weight)
    save_model(tmp_path, clip, processor, {})
    exported, _ = load_model(str(tmp_path))
    head = load_head(tmp_path)
    with unfolded(exported, head):
        for name, tensor in exported.state_dict().items():
            assert torch.equal(tensor, original[name]), name
    torch.testing.assert_close(exported.visual_projection.weight, weight @ original["visual_projection.weight"])
    set_head_t(exported, head, -0.5)
    expected = head_power(weight, -0.5) @ original["text_projection.weight"]
    torch.testing.assert_close(exported.text_projection.weight, expected)

    run_script(
        "examples/set_head_t.py", "--model", tmp_path, "--t", -0.5, "--output_dir", tmp_path / "inverted"
    )  # fmt: skip
    inverted, _ = load_model(str(tmp_path / "inverted"))
    torch.testing.assert_close(inverted.text_projection.weight, expected)
    assert torch.equal(load_head(tmp_path / "inverted")["weight"], weight)


def test_a_directory_without_a_head_is_named(small_clip):
    with pytest.raises(UserError, match=r"--model .*: no readable head.safetensors"):
        load_head(small_clip)


def test_a_head_of_another_model_is_named(small_clip, tmp_path):
    clip, _ = load_model(str(small_clip))
    save_head(tmp_path, trained_head(), clip)
    head = load_head(tmp_path)
    head["text_projection"] = head["text_projection"][:, :-1]
    with pytest.raises(UserError, match=r"head.safetensors: text_projection is \(24, 31\), the model's \(24, 32\)"):
        set_head_t(clip, head, 0.5)
    with pytest.raises(UserError, match="text_projection"), unfolded(clip, head):
        pass
    for content in (b"", b"\xff" * 100, b"\x02" + bytes(7) + b"{}"):
        (tmp_path / "head.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"--model .*head\.safetensors"):
            load_head(tmp_path)


def test_head_starts_as_the_identity():
    embeds = torch.randn(3, 2, 5)
    assert torch.equal(Head(5)(embeds), embeds)


def test_neutral_t_is_nearest_chance_where_the_task_is_kept():
    ts = [-0.5, 0.0, 0.5, 1.0]
    assert neutral_t(ts, [0.1, 0.2, 0.48, 0.9], [0.9, 0.9, 0.9, 0.9], 0.02) == 0.5
    assert neutral_t(ts, [0.1, 0.2, 0.48, 0.6], [0.9, 0.9, 0.5, 0.9], 0.02) == 1.0  # 0.5 would lose the task
    assert neutral_t(ts, [0.6, 0.4, 0.6, 0.6], [0.9, 0.9, 0.9, 0.9], 0.02) == 0.0  # of equals the least strength
    assert neutral_t(ts, [0.5, 0.1, 0.5, 0.5], [0.0, 0.9, 0.0, 0.0], 0.02) == 0.0  # t = 0 always keeps it
