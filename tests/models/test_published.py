"""Models as others save them: each field of config and processor is obeyed or refused, each weight is there, finite."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor, CLIPVisionModelWithProjection

import train_lore
import train_po
from tests.small_models import KINDS, TEXT_KINDS, photos, save_small_model
from utils.errors import UserError
from utils.models.encoders import enable_gradient_checkpointing, make_encoder
from utils.models.hub import find_model
from utils.models.policy import TextTable
from utils.models.published import (
    check_model,
    has_text,
    image_transform,
    load_model,
    read_image_processor,
    save_model,
    switch_off_randomness,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One directory of every kind, to be copied."""
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        save_small_model(folder / kind, kind)
    return folder


@pytest.fixture
def changed(models, tmp_path):
    """A copy of a kind's directory with other fields in a JSON file; None takes a field away."""

    def make(kind, changes=None, file="config.json", parts=()):
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(models / kind, folder)
        path = folder / file
        fields = json.loads(path.read_text())
        for place in (fields, *(fields[part] for part in parts if part in fields)):
            place |= changes or {}
        path.write_text(json.dumps(fields))
        return folder

    return make


PICTURES = [Image.fromarray((255 * one).byte().permute(1, 2, 0).numpy()) for one in photos(2, size=50)[:, :, :45]]


def embed(folder, training=False):
    model, processor = load_model(str(folder))
    encoder, transform = make_encoder(model, processor).train(training), image_transform(processor)
    with torch.no_grad():
        return encoder(torch.stack([transform(picture) for picture in PICTURES]).float() / 255)


def embed_by_transformers(folder, pictures=PICTURES):
    """By transformers' own processor, by Pillow as here, and model."""
    inputs = AutoImageProcessor.from_pretrained(folder, backend="pil")(pictures, return_tensors="pt")
    model = AutoModel.from_pretrained(folder).eval()
    if model.config.model_type == "clip_vision_model":
        model = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    with torch.no_grad():
        if hasattr(model, "get_image_features"):
            return model.get_image_features(**inputs).pooler_output
        found = model(**inputs)
        return found.image_embeds if "image_embeds" in found else found.pooler_output


CROP = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
OBEYED = [
    {}, {"do_rescale": False}, {"do_normalize": False}, {"do_rescale": False, "do_normalize": False},
    {"do_rescale": None}, {"do_normalize": None, "image_mean": None}, {"rescale_factor": 1 / 127.5},
    {"rescale_factor": 1 / 127.5, "do_normalize": False}, {"rescale_factor": 1}, {"image_mean": 0.5, "image_std": 0.5},
    {"image_mean": 0, "image_std": 1}, {"do_rescale": False, "image_mean": [124, 116, 104], "image_std": [58, 57, 57]},
    {"do_resize": False}, {"do_resize": False, "resample": None, "size": None},
    {"do_center_crop": False, "size": {"height": 32, "width": 32}}, {"size": 36}, {"size": [40, 36]},
    {"size": {"height": 36, "width": 40}}, {"crop_size": 32}, {"crop_size": [32, 32]},
    {"size": 36, "default_to_square": True}, {"size": {"shortest_edge": 20}}, {"do_convert_rgb": False},
    *({"resample": number} for number in range(6)), {"something_else": 3}, {"processor_class": "CLIPProcessor"},
    *({"image_processor_type": name} for name in ("CLIPImageProcessorFast", "BitImageProcessor")),
    {"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor", "size": 36, "crop_size": 32},
    {"image_processor_type": "ViTImageProcessor"} | CROP, {"image_processor_type": "SiglipImageProcessor"} | CROP,
    {"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor", "size": 32, "do_center_crop": None},
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": False},
    {"image_processor_type": "ConvNextImageProcessor", "size": 32, "crop_pct": 0.7, "do_center_crop": False},
    {"image_processor_type": "ConvNextImageProcessor", "size": 384, **CROP},
    {"image_processor_type": None, "feature_extractor_type": "ConvNextFeatureExtractor", "do_resize": False, **CROP},
]  # fmt: skip


@pytest.fixture(scope="module")
def vision(models):
    """The model of the processors below, by transformers alone and as it is loaded here."""
    plain = CLIPVisionModelWithProjection.from_pretrained(models / "clip_vision_model").eval()
    return plain, load_model(str(models / "clip_vision_model"))[0]


def processor_file(folder, models, fields):
    folder.mkdir()
    found = json.loads((models / "clip_vision_model" / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(found | fields))
    shutil.copy(models / "clip_vision_model" / "config.json", folder)
    return folder


@pytest.mark.parametrize("fields", OBEYED, ids=str)
def test_fields_of_a_processor_are_obeyed(models, vision, tmp_path, fields):
    """transformers#20867, #24857. Embeddings as by transformers, and again, by both, from the saved processor."""
    plain, model = vision
    folder = processor_file(tmp_path / "given", models, fields)
    processor = read_image_processor(str(folder), "clip_vision_model", "--model")
    processor.save_pretrained(tmp_path / "saved")
    shutil.copy(folder / "config.json", tmp_path / "saved")
    expected = None
    for place in (folder, tmp_path / "saved"):
        inputs = AutoImageProcessor.from_pretrained(place, backend="pil")(PICTURES, return_tensors="pt")
        processor = read_image_processor(str(place), "clip_vision_model", "--model")
        pixel_values = torch.stack([image_transform(processor)(picture) for picture in PICTURES]).float() / 255
        with torch.no_grad():
            by_transformers, found = plain(**inputs).image_embeds, make_encoder(model, processor)(pixel_values)
        torch.testing.assert_close(found, by_transformers, rtol=1e-4, atol=1e-4)
        assert expected is None or torch.equal(by_transformers, expected)
        expected = by_transformers


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dinov2_head"])
def test_every_kind_obeys_rescaling_and_saves_it(changed, tmp_path, kind):
    """Also if the image processor is nested in processor_config.json. In transformers the saved one gives the same."""
    file = "processor_config.json" if kind in TEXT_KINDS else "preprocessor_config.json"
    fields = {"do_rescale": False, "image_mean": [120, 110, 100], "image_std": [60, 61, 62]}
    folder = changed(kind, fields, file, parts=("image_processor",))
    pictures = [picture.crop((0, 0, 45, 45)) for picture in PICTURES]  # squares, see ``ImageTransform``
    model, processor = load_model(str(folder))
    transform = image_transform(processor)
    with torch.no_grad():
        pixel_values = torch.stack([transform(picture) for picture in pictures]).float() / 255
        found = make_encoder(model, processor)(pixel_values)
    expected = embed_by_transformers(folder, pictures)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    save_model(tmp_path / "saved", model, processor, {})
    assert torch.equal(embed_by_transformers(tmp_path / "saved", pictures), expected)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image_mean": None}, "image_mean is None"), ({"image_std": None}, "image_std is None"),
        ({"image_mean": [0.5]}, "image_mean"), ({"image_mean": "0.5"}, "image_mean"), ({"image_std": 0}, "image_std"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean"), ({"rescale_factor": None}, "rescale_factor"),
        ({"rescale_factor": "1/255"}, "rescale_factor"), ({"rescale_factor": 0}, "rescale_factor"),
        ({"do_rescale": "false"}, "do_rescale is 'false'"), ({"do_normalize": "no"}, "do_normalize"),
        ({"resample": 9}, "resample is 9"), ({"resample": None}, "resample"), ({"resample": "bicubic"}, "resample"),
        ({"resample": 3.0}, "resample is 3.0"), ({"size": {"longest_edge": 32}}, "size"), ({"size": None}, "size"),
        ({"size": {"shortest_edge": 32, "longest_edge": 40}}, "size"),
        ({"size": {"max_height": 9, "max_width": 9}}, "size"), ({"size": {"edge": 32}}, "size"),
        ({"size": {"height": 32}}, "size"), ({"size": {"height": 0, "width": 0}}, "size"),
        ({"crop_size": {"shortest_edge": 32}}, "crop_size"), ({"crop_size": None}, "crop_size"),
        ({"do_pad": True, "pad_size": 40}, "do_pad"), ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"do_thumbnail": True}, "do_thumbnail"), ({"do_offset": True}, "do_offset"),
        ({"do_resize": False, "do_center_crop": False}, "no square images"),
        ({"do_center_crop": False}, "no square images"),
        ({"image_processor_type": "EfficientNetImageProcessor"}, "image_processor_type 'EfficientNet"),
        ({"image_processor_type": "LevitImageProcessor"}, "image_processor_type"),
        ({"image_processor_type": "PerceiverImageProcessor"}, "image_processor_type"),
        ({"image_processor_type": "VivitImageProcessor"}, "image_processor_type"),
        ({"image_processor_type": "OurOwnProcessor"}, "image_processor_type 'OurOwn"),
        ({"image_processor_type": 3}, "image_processor_type 3"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": 48, **CROP}, "do_center_crop"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": 32, "crop_pct": 0}, "crop_pct"),
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_are_not_obeyed_are_refused_by_file_and_name(models, tmp_path, fields, named):
    folder = processor_file(tmp_path / "given", models, fields)
    with pytest.raises(UserError, match=rf"--model .*: preprocessor_config.json: .*{named}"):
        read_image_processor(str(folder), "clip_vision_model", "--model")


RANDOM = (
    "attention_dropout", "dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "layerdrop", "drop_path_rate", "classifier_dropout", "stochastic_depth_prob",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_random_in_train_mode(changed, caplog, tmp_path, kind):
    """trl#744, #2042. All that a config may ask for, in both towers, with and without recomputing; said in a line."""
    folder = changed(kind, dict.fromkeys(RANDOM, 0.5), parts=("vision_config", "text_config"))
    with caplog.at_level(logging.WARNING):
        model, processor = load_model(str(folder))
    (line,) = [record.getMessage() for record in caplog.records if "random" in record.getMessage()]
    assert "0.5" in line
    encoder = make_encoder(model, processor).train()
    x = photos(3)
    expected = make_encoder(*load_model(str(folder))).eval()(x)
    for recompute in (False, True):
        if recompute:
            enable_gradient_checkpointing(encoder)
        assert torch.equal(encoder(x), expected)
        assert torch.equal(encoder(x), encoder(x))
    if has_text(model.config):
        model.train()
        texts = [
            TextTable(model, processor, ["a {c}"], torch.device("cpu"), per_prompt=False)(["cat"]) for _ in range(2)
        ]
        assert torch.equal(*texts)
    save_model(tmp_path / "saved", model, processor, {})
    kept = json.dumps(json.loads((tmp_path / "saved" / "config.json").read_text()))
    assert '": 0.5' in kept  # a fine-tuning elsewhere may want it


def test_every_kind_of_random_layer_is_switched_off():
    layers = torch.nn.Sequential(
        torch.nn.Dropout(0.1), torch.nn.Dropout2d(0.2), torch.nn.AlphaDropout(0.3),
        torch.nn.MultiheadAttention(8, 2, dropout=0.4), torch.nn.LSTM(8, 8, num_layers=2, dropout=0.5), torch.nn.ReLU(),
    )  # fmt: skip
    found = switch_off_randomness(layers)
    assert found == ["dropout 0.1", "dropout 0.2", "dropout 0.3", "dropout 0.4", "dropout 0.5"]
    assert switch_off_randomness(layers) == []


def rewrite_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "name", "number"),
    [
        ("clip", "vision_model.encoder.layers.1.mlp.fc1.weight", "nan"),
        ("clip", "text_model.final_layer_norm.bias", "inf"), ("clip", "logit_scale", "nan"),
        ("siglip", "logit_bias", "inf"), ("dinov2_head", "classifier.bias", "-inf"),
        ("convnext", "visual_projection.weight", "nan"), ("dinov2", "embeddings.cls_token", "-inf"),
    ],
)  # fmt: skip
def test_weights_that_are_not_finite_are_refused_by_name(changed, kind, name, number):
    """ace#1040: such a checkpoint evaluated to 10.0 %, chance."""
    folder = changed(kind)
    rewrite_weights(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(float(number)))
    with pytest.raises(UserError, match=rf"model.safetensors: {name} holds what is not finite"):
        load_model(str(folder))


@pytest.mark.parametrize(("value", "exp"), [(1000.0, "inf"), (89.0, "inf"), (-200.0, "0")])
def test_a_logit_scale_that_overflows_is_refused(changed, value, exp):
    folder = changed("siglip")
    rewrite_weights(folder, lambda tensors: tensors["logit_scale"].fill_(value))
    with pytest.raises(UserError, match=rf"model.safetensors: exp\(logit_scale\) is {exp},"):
        load_model(str(folder))


NO_MATTER = {
    "torch_dtype": "float16", "output_attentions": True, "output_hidden_states": True, "return_dict": False,
    "torchscript": True, "foo": 3, "transformers_version": "99.0", "auto_map": {"AutoModel": "modeling_x.M"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_fields_that_change_no_embedding_change_nothing(models, changed, kind):
    attention = "attn_implementation" if kind.startswith("clip") else "_attn_implementation"
    for fields in (NO_MATTER, {attention: "flash_attention_2"}):
        folder = changed(kind, fields, parts=("vision_config", "text_config"))
        assert torch.equal(embed(folder, training=True), embed(models / kind))


@pytest.mark.parametrize(
    ("kinds", "fields", "parts", "message"),
    [
        (KINDS, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, (),
         r"quantization_config \(bitsandbytes\), which is not supported"),  # bitsandbytes#173
        (("clip", "siglip"), {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("vision_config",),
         r"\(gptq\)"),
        (("clip", "dinov2"), {"quantization_config": {"bits": 4}}, (), r"quantization_config \(of no named method\)"),
        (KINDS, {"hidden_act": "foo"}, ("vision_config", "text_config"), "hidden_act 'foo' is unknown"),
        (KINDS, {"model_type": None}, (), "config.json is none that transformers reads"),
        (KINDS, {"patch_size": 16}, ("vision_config",),
         r"model.safetensors: \S*patch_embedding\S* is \(.*, by config.json \("),
        (("clip", "siglip"), {"image_size": 64}, ("vision_config",), r"position_embedding.weight is \(1[67], 32\), by"),
        (("clip", "clip_vision_model", "convnext"), {"projection_dim": 512}, (), r"projection.weight is \(24, "),
        (("clip", "siglip"), {"num_hidden_layers": 1}, ("vision_config",),
         "layers.1.* has no place in a .* by config.json"),
        (("clip", "siglip"), {"num_hidden_layers": 3}, ("vision_config",), "weights of a .* are missing"),
        (("clip", "siglip"), {"num_hidden_layers": "2"}, ("vision_config",),
         "'num_hidden_layers' expected int, got str"),
        (("dinov2",), {"qkv_bias": False}, (), "k_proj.bias has no place in a Dinov2Model by"),
        (("dinov2_head",), {"architectures": None}, (), "classifier.bias has no place in a Dinov2Model by config.json"),
        (("siglip", "siglip_vision_model"), {"vision_use_head": False}, ("vision_config",),
         "vision_use_head false leaves no"),
        (("clip", "convnext"), {"num_channels": 1}, ("vision_config",), "num_channels is 1; expected 3"),
        (("siglip",), {"projection_size": 7}, ("text_config",), "images embed into 32 dimensions, texts into 7"),
        (("siglip2",), {"num_patches": 80}, ("vision_config",), "num_patches is 80; expected a square number"),
        (("clip",), {"model_type": "siglip"}, (), "by config.json|images embed into"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit_are_one_line(changed, kinds, fields, parts, message):
    for kind in kinds:
        folder = changed(kind, fields, parts=parts)
        with pytest.raises(UserError, match=message) as error:
            load_model(str(folder), "--model")
        assert str(error.value).startswith("--model ")


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_a_stray_projection_dim_of_siglip_means_nothing(models, changed, kind):
    def text(folder):
        return TextTable(*load_model(str(folder)), ["a {c}"], torch.device("cpu"), per_prompt=False)(["cat"])

    folder = changed(kind, {"projection_dim": 512}, parts=("vision_config", "text_config"))
    assert torch.equal(text(folder), text(models / kind))


def test_patches_of_siglip_2_are_those_of_its_processor(changed):
    folder = changed("siglip2", {"patch_size": 16}, "processor_config.json", parts=("image_processor",))
    with pytest.raises(UserError, match="its image processor makes patches of 16 px, the model takes 8 px"):
        load_model(str(folder))


def test_old_and_other_layouts_of_weights_load_alike(models, changed, tmp_path):
    """Half precision, shards, position numbers as buffers, and a CLIP whose config says 2 for the end of text."""
    expected = embed(models / "clip")
    half = changed("clip")
    CLIPModel.from_pretrained(half).half().save_pretrained(half)
    rounded = CLIPModel.from_pretrained(half, dtype=torch.float32).state_dict()
    model, _ = load_model(str(half))
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}

    parts = changed("clip")
    CLIPModel.from_pretrained(parts).save_pretrained(parts, max_shard_size="40KB")
    (parts / "model.safetensors").unlink(missing_ok=True)
    assert len(list(parts.glob("model-*.safetensors"))) > 2
    assert torch.equal(embed(parts), expected)
    name = "visual_projection.weight"
    file = parts / json.loads((parts / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{file.name}: {name} holds what is not finite"):
        load_model(str(parts))

    old = changed("clip", {"eos_token_id": 2}, parts=("text_config",))
    positions = {
        f"{part}_model.embeddings.position_ids": torch.arange(count)[None]
        for part, count in (("text", 77), ("vision", 17))
    }
    rewrite_weights(old, lambda tensors: tensors.update(positions))
    assert torch.equal(embed(old), expected)
    plain, processor = CLIPModel.from_pretrained(old).eval(), CLIPProcessor.from_pretrained(old)
    with torch.no_grad():
        tokens = processor.tokenizer(["a cat"], return_tensors="pt")
        text = torch.nn.functional.normalize(plain.get_text_features(**tokens).pooler_output)
    found = TextTable(*load_model(str(old)), ["a {c}"], torch.device("cpu"), per_prompt=False)(["cat"])
    torch.testing.assert_close(found[0], text)

    pointer = changed("clip")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"model.safetensors is a pointer of Git LFS, not the file .*git lfs pull"):
        load_model(str(pointer))


@pytest.fixture
def names(tmp_path, monkeypatch):
    """A folder to work in with what mistyped names may meet."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("dangling").symlink_to("nowhere")
    Path("file.safetensors").write_bytes(b"x")
    Path("file.txt").write_bytes(b"x")
    for folder in ("runs/lore", "run/best", "broken", "lora"):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.json").write_text("{")
    Path("lora/adapter_config.json").write_text("{}")


MISTYPED = {  # dolly#118
    "./nope": "no such directory", "/abs/x": "no such directory", "a/b/c": "no such directory",
    "x/": "no such directory", "../x": "no such directory", "~/x": "~ stands for none here",
    "https://huggingface.co/openai/clip": "a URL", "hf://openai/clip": "a URL", "C:\\models\\clip": "no such directory",
    "": ": empty;", "  ": ": empty;", "my model": "no such directory", "a//b": "no such directory",
    "file.safetensors": "file.safetensors: cannot be read as tensors", "file.txt": ": a file; expected",
    "empty": "holds no config.json", "./empty/": "holds no config.json",
    "dangling": "a link to nowhere", "run": "holds no config.json; run/best holds one",
    "runs/lora": r"did you mean runs/lore\?", "./runs/lor": r"did you mean ./runs/lore\?",
    "broken": "config.json is none", "lora": "holds an adapter", "-x": "no such directory",
    "a/b@main": "neither a local", "a/b/c@main": "no such directory", "a/b@": "--base_model: empty;",
    "a/b@./x": "--base_model ./x: no such directory or file; expected a directory or a hub id", "x.pt": "no such file",
    "openai/clip@~/x": "--base_model ~/x: no such", "hf-hub:./x": "--model hf-hub:./x: no such directory",
    "x" * 300: "no such directory", "openai/clip": "neither a local",
}  # fmt: skip


@pytest.mark.parametrize("name", MISTYPED)
def test_mistyped_names_are_one_line(names, name):
    for look in (check_model, find_model):
        with pytest.raises(UserError, match=MISTYPED[name]):
            look(name, "--model")


@pytest.mark.parametrize("trainer", [train_lore, train_po])
def test_trainers_name_a_mistyped_model_before_they_read_anything(names, trainer):
    words = ["--train_shards", "nowhere", "--output_dir", "out", "--report_to", "none", "--model_name_or_path"]
    with pytest.raises(UserError, match=r"^--model_name_or_path ./nope: no such directory"):
        trainer.main([*words, "./nope"])
    with pytest.raises(UserError, match=r"^--reference_model_name_or_path: empty;"):
        trainer.main([*words, "openai/clip", "--reference_model_name_or_path", ""])
    assert not Path("out").exists()


def test_names_that_no_file_can_have_are_no_traceback(names):
    for name in ("a\0b", os.fsdecode(b"\xff\xfe")):
        with pytest.raises(UserError, match="no such directory"):
            check_model(name, "--model")
