import json
from contextlib import nullcontext

import pytest
import torch
import transformers
from PIL import Image
from torch._subclasses import FakeTensorMode
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.small_models import BERT_KINDS, KINDS, TEXT_KINDS, photos, save_small_clip, save_small_model, small_encoder
from utils.data.images import ImageTransform
from utils.errors import UserError
from utils.methods.attacks import frozen
from utils.methods.losses import squared_distance
from utils.models import encoders
from utils.models.encoders import (
    ImageEncoder,
    check_reference_dtype,
    enable_gradient_checkpointing,
    frozen_copy,
    keep_weights_in,
    load_reference,
    make_encoder,
)
from utils.models.published import (
    CONTRASTIVE_MODEL_TYPES,
    FIXED_POSITIONS,
    check_model,
    image_tower,
    image_transform,
    load_model,
    save_model,
)
from utils.models.zeroshot import set_classifier
from utils.sets.labelled import LabelledSet


def test_embeddings_are_those_of_the_whole_model(small_clip):
    images = (photos(3) * 255).round().byte()
    clip, processor = CLIPModel.from_pretrained(small_clip), CLIPProcessor.from_pretrained(small_clip)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    inputs = processor.image_processor(pictures, return_tensors="pt")
    with torch.no_grad():
        expected = clip.get_image_features(**inputs).pooler_output
        found = small_encoder(small_clip)(images.float() / 255)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_saved_model_gives_the_trained_embeddings(small_clip, tmp_path):
    clip, processor = load_model(str(small_clip))
    encoder = make_encoder(clip, processor)
    text_before = clip.text_projection.weight.clone()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_model(tmp_path, clip, processor, encoder.state_dict())
    x = photos(3)
    with torch.no_grad():
        torch.testing.assert_close(small_encoder(tmp_path)(x), encoder(x), rtol=0, atol=0)
        assert (small_encoder(small_clip)(x) - encoder(x)).abs().max() > 1e-3
    torch.testing.assert_close(CLIPModel.from_pretrained(tmp_path).text_projection.weight, text_before, rtol=0, atol=0)


def test_partitioned_weights_are_never_saved(small_clip, tmp_path):
    clip, processor = load_model(str(small_clip))
    state = make_encoder(clip, processor).state_dict()
    state["visual_projection.weight"] = torch.empty(0)
    with pytest.raises(RuntimeError, match=r"visual_projection.weight .* refusing"):
        save_model(tmp_path, clip, processor, state)
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


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(kind, directory) of every supported kind of model."""
    directory = tmp_path_factory.mktemp("kinds") / request.param
    save_small_model(directory, request.param)
    return request.param, directory


def load_plainly(directory):
    """The model by transformers alone, with its own layers: of the class that its config names."""
    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(directory).eval()


def embed_plainly(kind, model, inputs):
    """image_embeds (B, D) as transformers gives them; of DINOv2 with a head what the head is given."""
    with torch.no_grad():
        if kind in TEXT_KINDS:
            return model.get_image_features(**inputs).pooler_output
        if kind == "dinov2_head":
            seen = []
            with model.classifier.register_forward_pre_hook(lambda module, given: seen.append(given[0])):
                model(**inputs)
            return seen[0]
        output = model(**inputs)
        return output.image_embeds if kind == "clip_vision_model" else output.pooler_output


def test_every_kind_embeds_as_transformers_does(kind):
    kind, directory = kind
    model, processor = load_model(str(directory))
    encoder = make_encoder(model, processor)
    image_processor = getattr(processor, "image_processor", processor)
    # SigLIP 2's processor keeps proportions; the square that is cut here is its own result for square images alone.
    photo = photos(3, size=50) if kind == "siglip2" else photos(3, size=50)[:, :, :45]
    pictures = [Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy()) for image in photo]
    expected = embed_plainly(kind, load_plainly(directory), image_processor(pictures, return_tensors="pt"))
    transform = image_transform(processor)
    pixel_values = torch.stack([transform(picture) for picture in pictures]).float() / 255
    with torch.no_grad():
        found = encoder(pixel_values)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (encoder.embed_dim, encoder.image_size) == (expected.shape[1], 32)
    assert found.std() > 0.1


def test_every_kind_embeds_in_training_as_it_does_elsewhere(kind):
    """It trains in train mode, is evaluated and copied for reference in eval mode: nothing in it may be random."""
    encoder, x = make_encoder(*load_model(str(kind[1]))), photos(3)
    with torch.no_grad():
        expected = encoder.eval()(x)
        assert torch.equal(encoder.train()(x), expected)


def test_every_kind_takes_images_of_another_size_or_is_known_to_take_one_alone(kind):
    encoder = make_encoder(*load_model(str(kind[1])))
    fixed = encoder.vision_model.config.model_type in FIXED_POSITIONS
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match="size") if fixed else nullcontext():
        assert encoder(photos(1, size=48)).shape == (1, encoder.embed_dim)


def linear_of_a_block(encoder):
    """The first linear layer of the first block, which runs in the precision of the blocks."""
    blocks = next(module for module in encoder.modules() if isinstance(module, torch.nn.ModuleList))
    return next(module for module in blocks.modules() if isinstance(module, torch.nn.Linear))


def test_every_kind_gives_gradients_with_and_without_recomputing(kind):
    """Of all trained parameters, and of the pixels alone, as an attack asks for them; recomputing changes nothing."""
    _, directory = kind
    gradients, counts = [], []
    for recompute in (False, True):
        encoder = make_encoder(*load_model(str(directory))).train()
        if recompute:
            enable_gradient_checkpointing(encoder)
        calls = []
        linear_of_a_block(encoder).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        target = torch.randn(2, encoder.embed_dim, generator=torch.Generator().manual_seed(0))
        squared_distance(encoder(photos(2)), target).sum().backward()
        counts.append(len(calls))
        trained = {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
        assert [name for name, parameter in trained.items() if parameter.grad is None] == []
        left_out = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
        assert all(name.endswith("mask_token") for name in left_out)
        free = photos(2).requires_grad_(True)
        with frozen(encoder):
            (of_pixels,) = torch.autograd.grad(squared_distance(encoder(free), target).sum(), free)
        assert (of_pixels != 0).float().mean() > 0.9
        assert all(parameter.requires_grad for parameter in trained.values())
        gradients.append([of_pixels, *(parameter.grad for parameter in trained.values())])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain)
    assert counts == [1, 2]


def test_every_kind_keeps_pixels_and_patch_embedding_in_float32(kind, monkeypatch):
    """bfloat16 in the blocks; a reference with bfloat16 weights embeds the same to the bit."""
    _, directory = kind
    encoder = make_encoder(*load_model(str(directory)), torch.bfloat16)
    patches, blocks = [], []
    plain = encoders.embed_patches

    def watched(pixel_values, weight, bias):
        embedded = plain(pixel_values, weight, bias)
        patches.append((pixel_values.dtype, weight.dtype, embedded.dtype))
        return embedded

    monkeypatch.setattr(encoders, "embed_patches", watched)
    linear_of_a_block(encoder).register_forward_hook(lambda module, given, output: blocks.append(output.dtype))
    x = photos(4)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():  # as a training engine would wrap it
        embeds = encoder(x)
    assert patches == [(torch.float32,) * 3]
    assert blocks == [torch.bfloat16]
    assert embeds.dtype == torch.float32
    with torch.no_grad():
        exact = make_encoder(*load_model(str(directory)))(x)
        assert torch.nn.functional.cosine_similarity(embeds, exact).min() > 0.99
        smaller = keep_weights_in("bfloat16", frozen_copy(encoder))
        assert torch.equal(smaller(x), embeds)
    assert any(parameter.dtype == torch.bfloat16 for parameter in smaller.parameters())


def test_every_kind_is_saved_whole_and_loads_with_transformers(kind, tmp_path):
    """The trained weights are where transformers looks for them, everything else is as it was."""
    kind, directory = kind
    model, processor = load_model(str(directory))
    encoder = make_encoder(model, processor)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trained = {id(parameter) for parameter in encoder.parameters()}
    kept = {name: value.clone() for name, value in model.named_parameters() if id(value) not in trained}
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    model, processor = load_model(str(directory))  # the weights come by the state alone
    save_model(tmp_path, model, processor, state)

    saved = load_plainly(tmp_path)
    found = dict(saved.named_parameters())
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, value in kept.items():
        assert torch.equal(found[name], value), name
    x = photos(3)
    with torch.no_grad():
        again = make_encoder(*load_model(str(tmp_path)))(x)
        torch.testing.assert_close(again, encoder(x), rtol=0, atol=0)
        assert (make_encoder(*load_model(str(directory)))(x) - again).abs().max() > 1e-2
    if kind in TEXT_KINDS:
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_class_logits_are_those_of_transformers(kind, tmp_path):
    """One template: softmax(logits) is the model's own; SigLIP's bias, the same for all texts, cancels."""
    save_small_model(tmp_path, kind)
    model, processor = load_model(str(tmp_path))
    classnames = ["cat", "dog", "fire truck"]
    labelled = LabelledSet(None, classnames, ["a photo of a {c}."])
    encoder = make_encoder(model, processor)
    classifier = set_classifier(model, processor, encoder, labelled, torch.device("cpu"))
    plain = load_plainly(tmp_path)
    pictures = [Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy()) for image in photos(4)]
    texts = [f"a photo of a {name}." for name in classnames]
    full = {"padding": "max_length", "max_length": 24, "truncation": True}
    padding = full if kind in ("siglip", "siglip2") else {"padding": True}
    tokens = processor.tokenizer(texts, return_tensors="pt", **padding)
    # SigLIP sees its padding; CLIP's mask changes nothing.
    texts = dict(tokens) if kind in BERT_KINDS else {"input_ids": tokens["input_ids"]}
    with torch.no_grad():
        expected = plain(**texts, **processor.image_processor(pictures, return_tensors="pt")).logits_per_image
        found = classifier(encoder(torch.stack([image_transform(processor)(one) for one in pictures]).float() / 255))
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1), rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.02


def test_the_own_head_of_a_model_classifies(tmp_path):
    save_small_model(tmp_path, "dinov2_head", num_classes=5)
    model, processor = load_model(str(tmp_path))
    encoder, x = make_encoder(model, processor), photos(3)
    classifier = set_classifier(model, processor, encoder, LabelledSet(None, list("abcde"), []), torch.device("cpu"))
    with torch.no_grad():
        inside = (x - encoder.image_mean) / encoder.image_std
        expected = load_plainly(tmp_path)(pixel_values=inside).logits
        torch.testing.assert_close(classifier(encoder(x)), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"own head has 5 classes, the data set 3; give one with --linear_head"):
        set_classifier(model, processor, encoder, LabelledSet(None, list("abc"), []), torch.device("cpu"))


def test_a_clip_vision_model_without_projection_embeds_its_pooled_output(tmp_path):
    save_small_model(tmp_path / "with", "clip_vision_model")
    model = CLIPVisionModel.from_pretrained(tmp_path / "with")
    model.save_pretrained(tmp_path / "without")
    CLIPImageProcessorPil.from_pretrained(tmp_path / "with").save_pretrained(tmp_path / "without")
    encoder, x = make_encoder(*load_model(str(tmp_path / "without"))), photos(2)
    with torch.no_grad():
        expected = model((x - encoder.image_mean) / encoder.image_std).pooler_output
        torch.testing.assert_close(encoder(x), expected, rtol=1e-4, atol=1e-4)


def test_processor_files_of_the_hub_load_without_torchvision(tmp_path):
    for name in ("dinov2", "clip_vision_model"):
        save_small_model(tmp_path / name, name)
    common = {"do_normalize": True, "do_resize": True, "do_center_crop": True, "resample": 3}
    common |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    sizes = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    files = {
        "dinov2": [{"image_processor_type": name} | sizes for name in ("BitImageProcessor", "BitImageProcessorFast")],
        "clip_vision_model": [
            {"feature_extractor_type": "CLIPFeatureExtractor", "size": 36, "crop_size": 32},  # openai's of 2021
            {"image_processor_type": "CLIPImageProcessor"} | sizes,
        ],
    }
    for folder, configs in files.items():
        for config in configs:
            (tmp_path / folder / "preprocessor_config.json").write_text(json.dumps(common | config))
            model, image_processor = load_model(str(tmp_path / folder))
            encoder = make_encoder(model, image_processor)
            assert image_transform(image_processor) == ImageTransform(36, (32, 32), 3)
            torch.testing.assert_close(encoder.image_mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))
            torch.testing.assert_close(encoder.image_std.flatten(), torch.tensor([0.2, 0.3, 0.4]))
    other = common | {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 32, "width": 32}}
    (tmp_path / "dinov2" / "preprocessor_config.json").write_text(json.dumps(other))
    with pytest.raises(
        UserError, match=r"preprocessor_config.json: image_processor_type 'DINOv3ViT.*' is not supported"
    ):
        load_model(str(tmp_path / "dinov2"))


def test_wrong_vision_models_are_named(tmp_path):
    save_small_model(tmp_path / "dinov2", "dinov2")
    with pytest.raises(UserError, match=rf"model type 'dinov2'; supported: {', '.join(CONTRASTIVE_MODEL_TYPES)}$"):
        check_model(str(tmp_path / "dinov2"), "--model_name_or_path", CONTRASTIVE_MODEL_TYPES)
    assert check_model(str(tmp_path / "dinov2"), "--model").model_type == "dinov2"
    save_small_model(tmp_path / "dual", "convnext")
    config = json.loads((tmp_path / "dual" / "config.json").read_text())
    config["text_config"] = {"model_type": "electra"}
    (tmp_path / "dual" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError,
        match=r"its text_config is a 'electra'; of vision-text-dual-encoder supported: clip_text_model, .* bert, ",
    ):
        load_model(str(tmp_path / "dual"), "--model")

    save_small_model(tmp_path / "clip", "clip_vision_model")
    processor_file = tmp_path / "clip" / "preprocessor_config.json"
    processor = json.loads(processor_file.read_text())
    processor_file.write_text(json.dumps(processor | {"crop_size": {"height": 24, "width": 24}}))
    with pytest.raises(UserError, match=r"its image processor gives 24 px, the model takes 32 px"):
        load_model(str(tmp_path / "clip"))
    processor_file.write_text(json.dumps(processor | {"do_center_crop": False}))
    with pytest.raises(UserError, match=r"its image processor gives no square images"):
        load_model(str(tmp_path / "clip"))
    processor_file.unlink()
    with pytest.raises(UserError, match=r"preprocessor_config.json: no image processor"):
        load_model(str(tmp_path / "clip"))


@pytest.mark.parametrize(("name", "lost"), [("dinov2", "encoder.layer.1.mlp.fc1.weight"), ("clip", "logit_scale")])
def test_a_model_that_lacks_weights_is_refused(name, lost, tmp_path):
    save_small_model(tmp_path, name)
    model = load_plainly(tmp_path)
    model.save_pretrained(tmp_path, state_dict={key: value for key, value in model.state_dict().items() if key != lost})
    with pytest.raises(UserError, match=rf"1 weights of a {name} are missing, the first is {lost}"):
        load_model(str(tmp_path))


def vit(width, layers, heads, patch, size, embed_dim, activation, mlp=None):
    return CLIPVisionModelWithProjection, CLIPVisionConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=mlp or 4 * width,
        patch_size=patch, image_size=size, projection_dim=embed_dim, hidden_act=activation,
    )  # fmt: skip


def dinov2(width, layers, heads):
    config = Dinov2Config(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, patch_size=14)
    config.image_size = 518
    return Dinov2Model, config


# The image towers of published models: model and config, image size, embedding, and the published millions of weights
# (CLIP's from open_clip's model profile, DINOv2's rounded). ConvNeXt's constructor reads values, so it is not here.
PUBLISHED = {
    "CLIP ViT-B/32": (*vit(768, 12, 12, 32, 224, 512, "quick_gelu"), 224, 512, 87.85),
    "CLIP ViT-B/16": (*vit(768, 12, 12, 16, 224, 512, "quick_gelu"), 224, 512, 86.19),
    "CLIP ViT-L/14": (*vit(1024, 24, 16, 14, 224, 768, "quick_gelu"), 224, 768, 303.97),
    "CLIP ViT-L/14-336": (*vit(1024, 24, 16, 14, 336, 768, "quick_gelu"), 336, 768, 304.29),
    "CLIP ViT-H/14": (*vit(1280, 32, 16, 14, 224, 1024, "gelu"), 224, 1024, 632.08),
    "CLIP ViT-bigG/14": (*vit(1664, 48, 16, 14, 224, 1280, "gelu", mlp=8192), 224, 1280, 1844.91),
    "SigLIP ViT-B/16": (SiglipVisionModel, SiglipVisionConfig(), 224, 768, None),
    "DINOv2 ViT-S/14": (*dinov2(384, 12, 6), 224, 384, 22.06),
    "DINOv2 ViT-B/14": (*dinov2(768, 12, 12), 224, 768, 86.58),
    "DINOv2 ViT-L/14": (*dinov2(1024, 24, 16), 224, 1024, 304.37),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_encoders_of_published_sizes_embed_and_give_gradients(name, monkeypatch):
    """Shapes and dtypes alone, no weights and no memory: what would run is not computed."""
    model_class, config, size, embed_dim, millions = PUBLISHED[name]
    monkeypatch.setattr(PreTrainedModel, "init_weights", lambda self: None)
    with FakeTensorMode():
        model = model_class(config)
        encoder = ImageEncoder(*image_tower(model), size, [0.5] * 3, [0.5] * 3, torch.bfloat16)
        pixel_values = torch.rand(2, 3, size, size).requires_grad_(True)
        embeds = encoder(pixel_values)
        with frozen(encoder):
            (gradient,) = torch.autograd.grad(encoder(pixel_values).square().sum(), pixel_values)
    assert (embeds.shape, embeds.dtype, encoder.embed_dim) == ((2, embed_dim), torch.float32, embed_dim)
    assert (gradient.shape, gradient.dtype) == (pixel_values.shape, torch.float32)
    if millions is not None:
        assert sum(parameter.numel() for parameter in encoder.parameters()) == pytest.approx(millions * 1e6, rel=1e-3)
