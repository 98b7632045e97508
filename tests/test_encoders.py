import json

import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
)

from tests.small_models import photos, save_small_clip, small_encoder
from utils.attacks import frozen
from utils.cli import UserError
from utils.encoders import (
    SUPPORTED_MODEL_TYPES,
    VISION_MODEL_TYPES,
    check_model,
    check_reference_dtype,
    enable_gradient_checkpointing,
    frozen_copy,
    keep_weights_in,
    load_clip,
    load_reference,
    load_vision_model,
    make_encoder,
    save_clip,
)
from utils.images import ImageTransform


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


def test_a_reference_in_bfloat16_is_smaller_and_embeds_the_same(tmp_path):
    """To the bit, because autocast rounds these weights to bfloat16 anyway; only where it does is it allowed."""
    save_small_clip(tmp_path, hidden_size=128)
    reference = frozen_copy(small_encoder(tmp_path, torch.bfloat16))
    smaller = keep_weights_in("bfloat16", frozen_copy(reference))
    x = photos(64)
    with torch.no_grad():
        assert torch.equal(smaller(x), reference(x))
        assert smaller(x).dtype == torch.float32
    sizes = [sum(parameter.nbytes for parameter in encoder.parameters()) for encoder in (smaller, reference)]
    assert sizes[0] < 0.65 * sizes[1]  # without the embeddings and the projection it would be a half
    patches = smaller.vision_model.embeddings.patch_embedding.weight
    assert patches.dtype == smaller.vision_model.encoder.layers[0].layer_norm1.weight.dtype == torch.float32
    check_reference_dtype("bfloat16", torch.bfloat16)
    for precision, name in ((torch.float32, "float32"), (torch.float16, "float16")):
        check_reference_dtype("float32", precision)
        with pytest.raises(
            UserError, match=rf"--reference_dtype bfloat16: the transformer blocks run in {name}, .* bf16"
        ):
            check_reference_dtype("bfloat16", precision)


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


def save_vision_model(directory, model_class):
    """A vision model with random weights for 32 px (DINOv2: made for 64 px) and its image processor."""
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    if issubclass(model_class, (CLIPVisionModel, CLIPVisionModelWithProjection)):
        config = CLIPVisionConfig(**tower, intermediate_size=64, image_size=32, projection_dim=24)
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        config = Dinov2Config(**tower, mlp_ratio=2, image_size=64)
        image_processor = BitImageProcessorPil(
            size={"shortest_edge": 40},
            crop_size={"height": 32, "width": 32},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        )
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 / parameter[0].numel() ** 0.5)
    model.eval().save_pretrained(directory)
    image_processor.save_pretrained(directory)
    return model, image_processor


VISION_MODELS = (CLIPVisionModelWithProjection, CLIPVisionModel, Dinov2Model)


@pytest.mark.parametrize("model_class", VISION_MODELS)
def test_vision_models_embed_as_transformers_does(model_class, tmp_path):
    model, image_processor = save_vision_model(tmp_path, model_class)
    photo = photos(3, size=50)[:, :, :45]
    pictures = [Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy()) for image in photo]
    with torch.no_grad():
        output = model(**image_processor(pictures, return_tensors="pt"))
    expected = output.image_embeds if model_class is CLIPVisionModelWithProjection else output.pooler_output

    encoder, loaded_processor = load_vision_model(str(tmp_path))
    transform = ImageTransform.from_processor(loaded_processor)
    pixel_values = torch.stack([transform(picture) for picture in pictures]).float() / 255
    with torch.no_grad():
        found = encoder(pixel_values)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (encoder.embed_dim, encoder.image_size) == (expected.shape[1], 32)
    assert not encoder.training
    assert found.std() > 0.1

    free = pixel_values.requires_grad_(True)
    with frozen(encoder):
        (gradient,) = torch.autograd.grad(encoder(free).square().sum(), free)
    assert gradient.isfinite().all()
    assert (gradient != 0).float().mean() > 0.9


@pytest.mark.parametrize("model_class", VISION_MODELS)
def test_vision_models_keep_pixels_and_patch_embedding_in_float32(model_class, tmp_path):
    save_vision_model(tmp_path, model_class)
    encoder, _ = load_vision_model(str(tmp_path), compute_dtype=torch.bfloat16)
    seen = {}
    (patches,) = (module for module in encoder.modules() if isinstance(module, torch.nn.Conv2d))
    patches.register_forward_hook(lambda m, i, o: seen.update(patches=(i[0].dtype, o.dtype)))
    next(module for name, module in encoder.named_modules() if name.endswith("mlp.fc1")).register_forward_hook(
        lambda m, i, o: seen.update(block=o.dtype)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeds = encoder(photos(2))
    assert seen == {"patches": (torch.float32, torch.float32), "block": torch.bfloat16}
    assert embeds.dtype == torch.float32


def test_processor_files_of_the_hub_load_without_torchvision(tmp_path):
    save_vision_model(tmp_path / "dinov2", Dinov2Model)
    save_vision_model(tmp_path / "clip", CLIPVisionModelWithProjection)
    common = {"do_normalize": True, "do_resize": True, "do_center_crop": True, "resample": 3}
    common |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    sizes = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    files = {
        "dinov2": [{"image_processor_type": name} | sizes for name in ("BitImageProcessor", "BitImageProcessorFast")],
        "clip": [
            {"feature_extractor_type": "CLIPFeatureExtractor", "size": 36, "crop_size": 32},  # openai's of 2021
            {"image_processor_type": "CLIPImageProcessor"} | sizes,
        ],
    }
    for folder, configs in files.items():
        for config in configs:
            (tmp_path / folder / "preprocessor_config.json").write_text(json.dumps(common | config))
            encoder, image_processor = load_vision_model(str(tmp_path / folder))
            assert ImageTransform.from_processor(image_processor) == ImageTransform(36, (32, 32), 3)
            torch.testing.assert_close(encoder.image_mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))
            torch.testing.assert_close(encoder.image_std.flatten(), torch.tensor([0.2, 0.3, 0.4]))


def test_the_backbone_of_a_classifier_loads(tmp_path):
    model, _ = save_vision_model(tmp_path, Dinov2ForImageClassification)
    x = photos(2)
    encoder, _ = load_vision_model(str(tmp_path))
    with torch.no_grad():
        expected = model.dinov2((x - encoder.image_mean) / encoder.image_std).pooler_output
        torch.testing.assert_close(encoder(x), expected, rtol=1e-5, atol=1e-5)


def test_wrong_vision_models_are_named(small_clip, tmp_path):
    save_vision_model(tmp_path / "dinov2", Dinov2Model)
    with pytest.raises(UserError, match=r"model type 'dinov2'; supported: clip$"):
        check_model(str(tmp_path / "dinov2"), "--model_name_or_path")
    supported = SUPPORTED_MODEL_TYPES + VISION_MODEL_TYPES
    assert check_model(str(tmp_path / "dinov2"), "--model", supported).model_type == "dinov2"
    with pytest.raises(UserError, match=r"^--model .* model type 'clip'; supported: clip_vision_model, dinov2$"):
        load_vision_model(str(small_clip))

    save_vision_model(tmp_path / "clip", CLIPVisionModel)
    processor_file = tmp_path / "clip" / "preprocessor_config.json"
    processor = json.loads(processor_file.read_text())
    processor_file.write_text(json.dumps(processor | {"crop_size": {"height": 24, "width": 24}}))
    with pytest.raises(UserError, match=r"its image processor gives 24 px, the model takes 32 px"):
        load_vision_model(str(tmp_path / "clip"))
    processor_file.write_text(json.dumps(processor | {"do_center_crop": False}))
    with pytest.raises(UserError, match=r"its image processor gives no square images"):
        load_vision_model(str(tmp_path / "clip"))
    processor_file.unlink()
    with pytest.raises(UserError, match=r"the model does not load: .*image processor"):
        load_vision_model(str(tmp_path / "clip"))


def test_a_vision_model_that_lacks_weights_is_refused(tmp_path):
    model, _ = save_vision_model(tmp_path, Dinov2Model)
    state = model.state_dict()
    del state["encoder.layer.1.mlp.fc1.weight"], state["layernorm.bias"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        UserError, match=r"2 weights of a dinov2 are missing, the first is encoder.layer.1.mlp.fc1.weight"
    ):
        load_vision_model(str(tmp_path))
