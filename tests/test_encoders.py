import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from tests.small_models import photos, small_encoder
from utils.attacks import frozen
from utils.cli import UserError
from utils.encoders import (
    check_model,
    enable_gradient_checkpointing,
    frozen_copy,
    load_clip,
    load_reference,
    make_encoder,
    save_clip,
)


def test_embeddings_are_those_of_the_whole_model(small_clip):
    images = (photos(3) * 255).round().byte()
    clip, processor = CLIPModel.from_pretrained(small_clip), CLIPProcessor.from_pretrained(small_clip)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    inputs = processor.image_processor(pictures, return_tensors="pt")
    with torch.no_grad():
        expected = clip.get_image_features(**inputs).pooler_output
        found = small_encoder(small_clip)(images.float() / 255)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_pixels_and_patch_embedding_stay_float32_under_autocast(small_clip):
    encoder = small_encoder(small_clip, torch.bfloat16)
    seen = {}
    tower = encoder.vision_model
    tower.embeddings.patch_embedding.register_forward_hook(lambda m, i, o: seen.update(patches=(i[0].dtype, o.dtype)))
    tower.encoder.layers[0].mlp.fc1.register_forward_hook(lambda m, i, o: seen.update(block=o.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as a training engine would wrap it
        embeds = encoder(photos(2))
    assert seen == {"patches": (torch.float32, torch.float32), "block": torch.bfloat16}
    assert embeds.dtype == torch.float32


def test_gradient_checkpointing_recomputes_and_changes_nothing(small_clip):
    plain, recomputing = small_encoder(small_clip).train(), small_encoder(small_clip).train()
    enable_gradient_checkpointing(recomputing)
    x = photos(2)
    calls = []
    recomputing.vision_model.encoder.layers[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    for encoder in (plain, recomputing):
        encoder(x).square().sum().backward()
    assert len(calls) == 2
    for expected, found in zip(plain.parameters(), recomputing.parameters()):
        torch.testing.assert_close(found.grad, expected.grad)
    free = x.clone().requires_grad_(True)
    with frozen(recomputing):  # the attack asks for the input's gradient only
        (gradient,) = torch.autograd.grad(recomputing(free).square().sum(), free)
    assert gradient.abs().sum() > 0
    assert len(calls) == 4


def test_saved_model_gives_the_trained_embeddings(small_clip, tmp_path):
    clip, processor = load_clip(str(small_clip))
    encoder = make_encoder(clip, processor)
    text_before = clip.text_projection.weight.clone()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_clip(tmp_path, clip, processor, encoder.state_dict())
    x = photos(3)
    with torch.no_grad():
        torch.testing.assert_close(small_encoder(tmp_path)(x), encoder(x), rtol=0, atol=0)
        assert (small_encoder(small_clip)(x) - encoder(x)).abs().max() > 1e-3
    torch.testing.assert_close(CLIPModel.from_pretrained(tmp_path).text_projection.weight, text_before, rtol=0, atol=0)


def test_partitioned_weights_are_never_saved(small_clip, tmp_path):
    clip, processor = load_clip(str(small_clip))
    state = make_encoder(clip, processor).state_dict()
    state["visual_projection.weight"] = torch.empty(0)
    with pytest.raises(RuntimeError, match=r"visual_projection.weight .* refusing"):
        save_clip(tmp_path, clip, processor, state)
    assert not list(tmp_path.iterdir())


def test_reference_is_a_frozen_copy(small_clip):
    encoder = small_encoder(small_clip).train()
    reference = frozen_copy(encoder)
    before = reference(photos(1))
    with torch.no_grad():
        encoder.visual_projection.weight.zero_()
    torch.testing.assert_close(reference(photos(1)), before, rtol=0, atol=0)
    assert not before.requires_grad
    assert not reference.training
    assert encoder.visual_projection.weight.requires_grad


def test_wrong_models_are_named(small_clip, tmp_path):
    with pytest.raises(UserError, match=r"--model x/y: neither a local model directory nor"):
        check_model("x/y", "--model")
    with pytest.raises(UserError, match=r"holds no config.json"):
        check_model(str(tmp_path), "--model")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"model type 'bert'; supported: clip"):
        check_model(str(tmp_path), "--model")
    other = small_encoder(small_clip)
    other.embed_dim = 512
    with pytest.raises(UserError, match=r"--reference_model_name_or_path .* into 24 dimensions, the encoder .* 512"):
        load_reference(str(small_clip), other)
