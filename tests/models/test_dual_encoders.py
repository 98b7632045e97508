"""Dual encoders made from parts, DINOv2, ViT or SigLIP with a BERT: they compute what transformers computes."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    SiglipVisionConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)
from transformers.models.bert.modeling_bert import BertLayer

import evaluate
import train_lore
import train_po
from tests.conftest import ROOT, flags, run_script
from tests.small_models import (
    BERT_KINDS,
    bert_config,
    bert_tokenizer,
    draw_large,
    photos,
    roberta_tokenizer,
    save_small_model,
)
from utils.errors import UserError
from utils.evaluation.results import Results
from utils.models import tokens
from utils.models.encoders import TextEncoder, make_encoder
from utils.models.published import image_transform, load_model, model_name
from utils.models.tokens import BERTS, LATE_POSITIONS, fill_up, read_prompts
from utils.models.zeroshot import prompt_embeddings

TEXTS = ["cat", "a", "a photo of the number zero", "a photo of a dog, of the zero"]
PICTURES = [Image.fromarray((255 * one).byte().permute(1, 2, 0).numpy()) for one in photos(3, size=50)[:, :, :45]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory with one model of each kind."""
    folder = tmp_path_factory.mktemp("models")
    for kind in BERT_KINDS:
        save_small_model(folder / kind, kind)
    return folder


def by_transformers(directory, texts=TEXTS, masked=True):
    """image_embeds (B, D) and text_embeds (T, D) by transformers' own model and processor, texts padded together."""
    model = VisionTextDualEncoderModel.from_pretrained(directory).eval()
    processor = VisionTextDualEncoderProcessor.from_pretrained(directory)
    inputs = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    if not masked:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    with torch.no_grad():
        images = model.get_image_features(**processor.image_processor(PICTURES, return_tensors="pt"))
        return images.pooler_output, model.get_text_features(**inputs).pooler_output


def by_us(directory, texts=TEXTS):
    """The same as the scripts compute it."""
    model, processor = load_model(str(directory))
    pixel_values = torch.stack([image_transform(processor)(picture) for picture in PICTURES]).float() / 255
    with torch.no_grad():
        return make_encoder(model, processor)(pixel_values), prompt_embeddings(model, processor, texts, ["{c}"])[:, 0]


@pytest.mark.parametrize("kind", BERT_KINDS)
def test_features_are_those_of_transformers(models, kind):
    """Of texts of different lengths: without the mask transformers itself gives others."""
    expected = by_transformers(models / kind)
    torch.testing.assert_close(by_us(models / kind), expected, rtol=1e-4, atol=1e-4)
    moved = (by_transformers(models / kind, masked=False)[1] - expected[1]).abs().amax(dim=1)
    assert (moved[:-1] > 1e-2).all()
    assert moved[-1] < 1e-6  # the longest has no padding


def test_a_bert_reads_a_text_to_its_end(models, caplog, monkeypatch):
    """A note says of CLIP's texts where they end early. RoBERTa's end token has the number of CLIP's in old configs."""
    monkeypatch.setattr(tokens, "_said", set())
    by_us(models / "vit_roberta")
    assert "read up to there" not in caplog.text


@pytest.mark.parametrize("tower", BERTS)
def test_every_text_tower_reads_as_many_tokens_as_it_has_positions(tower, tmp_path):
    """No file says a length: a longer text is cut there and ended. One token more is too long for transformers."""
    tokenizer = roberta_tokenizer() if tower in LATE_POSITIONS else bert_tokenizer()
    text = bert_config(tokenizer).to_dict() | {"model_type": tower, "hidden_act": "gelu", "embedding_size": 16}
    if tower == "mpnet":
        text["pad_token_id"] = 0  # its positions begin behind 1, whatever the config says
    vision = SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, AutoConfig.for_model(**text))
    torch.manual_seed(0)
    made = VisionTextDualEncoderModel(config)
    draw_large(made)
    made.save_pretrained(tmp_path)
    save_small_model(tmp_path / "siglip", "siglip_vision_model")
    (tmp_path / "siglip/preprocessor_config.json").rename(tmp_path / "preprocessor_config.json")
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(tmp_path)

    model, processor = load_model(str(tmp_path))
    texts = ["cat", "a photo of the number zero " * 9]
    found = prompt_embeddings(model, processor, texts, ["{c}"])[:, 0]
    plain = VisionTextDualEncoderModel.from_pretrained(tmp_path).eval()
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
    assert inputs["input_ids"].shape == (2, 40)
    with torch.no_grad():
        expected = plain.get_text_features(**inputs).pooler_output
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found[0] - found[1]).abs().max() > 1e-1
        with pytest.raises((IndexError, RuntimeError)):
            plain.get_text_features(input_ids=torch.full((1, 41), 5))


@pytest.mark.parametrize("kind", BERT_KINDS)
def test_every_weight_gets_a_gradient(models, kind):
    """DDP would wait for a weight without. Nothing is random in train mode."""
    model, processor = load_model(str(models / kind))
    encoder, text = make_encoder(model, processor).train(), TextEncoder(model).train()
    given = fill_up(read_prompts(processor, model.config, TEXTS), processor, model.config, "cpu")
    assert torch.equal(text(*given), text(*given))
    (encoder(photos(2)).square().sum() + text(*given).square().sum()).backward()
    weights = [*encoder.named_parameters(), *text.named_parameters()]
    assert [name for name, weight in weights if weight.requires_grad and weight.grad is None] == []


def test_bfloat16_rounds_no_sum_over_blocks(models):
    """BERT's layer norms end its blocks, unlike CLIP's: what they give stays in float32, as under autocast alone."""
    model, processor = load_model(str(models / "dinov2_bert"))
    text, dtypes = TextEncoder(model, torch.bfloat16), []
    for module in text.modules():
        if isinstance(module, BertLayer):
            module.register_forward_hook(lambda layer, given, output: dtypes.append(output[0].dtype))
    with torch.no_grad():
        found = text(*fill_up(read_prompts(processor, model.config, TEXTS), processor, model.config, "cpu"))
    assert dtypes == [torch.float32] * 2
    expected = by_transformers(models / "dinov2_bert")[1]
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.999


# ---------------------------------------------------------------------------------------------------------- in scripts


@pytest.fixture
def command(models, digits, tmp_path, tmp_path_factory):
    """The flags of a short run of a trainer."""

    def make(kind, **changes):
        settings = {
            "model_name_or_path": models / kind, "train_shards": digits / "train", "eval_shards": digits / "test",
            "eval_num_samples": 8, "output_dir": tmp_path / "run",
            "cache_dir": tmp_path_factory.getbasetemp() / "duals",
            "per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "learning_rate": 1e-3,
            "num_workers": 0, "report_to": "none",
        }  # fmt: skip
        return flags(settings | changes)

    return make


def moved_parts(before, after):
    """The first words of the names of the weights that differ, in the files of two directories."""
    first, second = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert first.keys() == second.keys()
    return {name.split(".")[0] for name in first if not first[name].equal(second[name])}


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


IMAGE_PARTS = {"vision_model", "visual_projection"}


@pytest.mark.parametrize("kind", ["dinov2_bert", "vit_roberta"])
def test_lore_trains_the_image_tower_and_the_result_is_evaluated(models, command, digits, tmp_path, kind):
    """Zero-shot, by prompts of the text tower, which stays; transformers loads the result and computes the same."""
    run_dir, changes = tmp_path / "run", {"gradient_checkpointing": "true"} if kind == "vit_roberta" else {}
    train_lore.main(command(kind, eps=8, attack_steps=2, primal_steps=2, **changes))
    assert moved_parts(models / kind, run_dir) == IMAGE_PARTS
    assert rows(run_dir)[-1].keys() >= {"loss", "violation_ratio_mean", "eval_accuracy_clean", "eval_accuracy_pgd"}
    torch.testing.assert_close(by_us(run_dir), by_transformers(run_dir), rtol=1e-4, atol=1e-4)
    evaluate.main(
        flags({
            "model": run_dir, "data": digits, "attack": ["clean", "pgd", "typographic"], "eps": 2, "attack_steps": 2,
            "num_samples": 8, "num_workers": 0, "output_dir": tmp_path / "eval", "cache_dir": tmp_path / "cache",
        })
    )  # fmt: skip
    cells = Results(tmp_path / "eval").current()
    assert {cell["attack"] for cell in cells} == {"clean", "pgd", "typographic"}
    assert all(0 <= cell["value"] <= 1 for cell in cells)


PO = {
    "image": ("dinov2_bert", {"trainable": "image"}, IMAGE_PARTS),
    "both": ("vit_roberta", {"trainable": "all", "preference": "kto"}, {*IMAGE_PARTS, "text_model", "text_projection"}),
    "both, pairs, constraint": (
        "dinov2_bert",
        {"trainable": "all", "task": "pairs", "constraint": "embedding", "rho": 0.001},
        {*IMAGE_PARTS, "text_model", "text_projection"},
    ),
    "head, pairs": ("siglip_bert", {"trainable": "head", "task": "pairs"}, {"visual_projection", "text_projection"}),
}


@pytest.mark.parametrize("name", PO)
def test_preference_optimisation_trains_what_it_says(models, command, attribute_digits, tmp_path, name):
    """Before the first step policy and reference agree, though one reads texts by the step and one has them kept."""
    kind, changes, parts = PO[name]
    if "task" in changes:
        pairs = attribute_digits / "pairs"
        changes = changes | {"train_shards": pairs / "train", "eval_shards": pairs / "val"}
    train_po.main(command(kind, train_num_samples=16, **changes))
    run_dir = tmp_path / "run"
    assert moved_parts(models / kind, run_dir) == parts
    first = rows(run_dir)[0]
    assert first["eval_kl"] == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(by_us(run_dir), by_transformers(run_dir), rtol=1e-4, atol=1e-4)


def test_the_documented_way_from_parts_gives_a_model_that_loads(models, tmp_path, monkeypatch):
    """The lines of docs/encoders.md, run on small parts."""
    plain = VisionTextDualEncoderModel.from_pretrained(models / "dinov2_bert")
    processor = VisionTextDualEncoderProcessor.from_pretrained(models / "dinov2_bert")
    image, text = tmp_path / "facebook/dinov2-base", tmp_path / "google-bert/bert-base-uncased"
    plain.vision_model.save_pretrained(image)
    processor.image_processor.save_pretrained(image)
    plain.text_model.save_pretrained(text)
    processor.tokenizer.save_pretrained(text)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/encoders.md").read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "from_vision_text_pretrained" in block]
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    (made,) = {path.parent for path in tmp_path.glob("**/model.safetensors")} - {image, text}
    torch.testing.assert_close(by_us(made), by_transformers(made), rtol=1e-4, atol=1e-4)
    assert moved_parts(models / "dinov2_bert", made) == {"visual_projection", "text_projection"}


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("kind", "part", "fields", "message"),
    [
        ("dinov2_bert", "text_config", {"model_type": "distilbert"},
         "its text_config is a 'distilbert'; of vision-text-dual-encoder supported: clip_text_model, albert, bert, "),
        ("dinov2_bert", "text_config", {"model_type": "electra"}, "its text_config is a 'electra'; of "),
        ("dinov2_bert", "vision_config", {"model_type": "resnet"},
         "its vision_config is a 'resnet'; of .* supported: convnext, clip_vision_model, dinov2, .*, vit"),
        ("vit_roberta", "vision_config", {"pooler_output_size": 16}, "pooler_output_size is 16; expected hidden_s"),
        ("vit_roberta", "text_config", {"is_decoder": True}, "is_decoder true lets the first token, .* expected false"),
        ("siglip_bert", "vision_config", {"vision_use_head": False}, "vision_use_head false leaves no embedding"),
    ],
)  # fmt: skip
def test_towers_that_give_no_embedding_are_refused_by_the_config(models, tmp_path, kind, part, fields, message):
    config = json.loads((models / kind / "config.json").read_text())
    config[part] |= fields
    (tmp_path / "config.json").write_text(json.dumps(config))  # no weights are there
    with pytest.raises(UserError, match=rf"^--model {tmp_path}: (config.json: )?{message}"):
        load_model(str(tmp_path), "--model")


def test_a_mistake_ends_a_script_with_status_2(models, digits, tmp_path):
    config = json.loads((models / "dinov2_bert/config.json").read_text())
    config["text_config"] = {"model_type": "distilbert"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    output = run_script(
        "evaluate.py", "--model", tmp_path, "--data", digits, "--output_dir", tmp_path / "eval", status=2
    )
    assert "its text_config is a 'distilbert'" in output
    assert "Traceback" not in output


def test_open_clip_has_no_such_model(command, models, layouts):
    with pytest.raises(UserError, match=r"^--export open_clip: a dinov2 with a bert; open_clip has a CLIP or a ConvNe"):
        train_lore.main(command("dinov2_bert", export="open_clip"))
    tower = model_name(layouts["robustvlm_visual"].path, str(models / "vit_roberta"))
    with pytest.raises(
        UserError, match=r"a vit with a roberta; open_clip has .*; name the CLIP it was made from by --"
    ):
        load_model(tower)
