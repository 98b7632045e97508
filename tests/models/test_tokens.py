"""A text is embedded as transformers embeds it alone, whatever the tokenizer's files say of padding and lengths."""

import json
import logging
import shutil

import pytest
import torch
import transformers
from transformers import AutoProcessor, AutoTokenizer

from tests.small_models import BERT_KINDS, TEXT_KINDS, save_small_model
from utils.errors import UserError
from utils.models import tokens, zeroshot
from utils.models.encoders import make_encoder
from utils.models.published import load_model, save_model
from utils.models.zeroshot import class_embeddings, prompt_embeddings

TEXTS = [
    "cat",
    "a photo of a fire truck.",
    "A Photo, of the number zero",
    "a photo of a b c d e f g h i j k l m n o p " * 6,
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory with a small model of every kind that has a text tower."""
    root = tmp_path_factory.mktemp("text")
    for kind in TEXT_KINDS:
        save_small_model(root / kind, kind)
    return root


@pytest.fixture
def changed(models, tmp_path):
    """A copy of a kind's model with changed JSON files: {file: fields}; a field of None is null, ... is left out."""

    def change(kind, files, remove=()):
        shutil.copytree(models / kind, tmp_path / kind)
        for name, fields in files.items():
            path = tmp_path / kind / name
            content = json.loads(path.read_text())
            for field, value in fields.items():
                *parents, last = field.split(".")
                inner = content
                for parent in parents:
                    inner = inner[parent]
                inner.pop(last, None)
                if value is not ...:
                    inner[last] = value
            path.write_text(json.dumps(content))
        for name in remove:
            (tmp_path / kind / name).unlink(missing_ok=True)
        return tmp_path / kind

    return change


def embed_by_transformers(directory, texts, length):
    """Each text alone by transformers' own tokenizer and model, padded and cut as the model's documentation says."""
    config = json.loads((directory / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="right", truncation_side="right")
    padding = {"padding": "max_length"} if config["model_type"].startswith("siglip") else {}
    asked = json.loads((directory / "tokenizer_config.json").read_text()).get("model_input_names", [])
    embeds = []
    for text in texts:
        inputs = tokenizer([text], truncation=True, max_length=length, return_tensors="pt", **padding)
        if "attention_mask" not in asked:
            inputs.pop("attention_mask", None)  # SigLIP sees its padding; CLIP's mask changes nothing
        with torch.no_grad():
            embeds.append(model.get_text_features(**inputs).pooler_output[0])
    return torch.stack(embeds)


FILES = {
    "as saved": {},
    "left": {"padding_side": "left", "truncation_side": "left"},
    "no longest": {"model_max_length": ...},
    "short": {"model_max_length": 9},
    "other pad": {"pad_token": "a"},
    "no pad": {"pad_token": None},
    "masks": {"model_input_names": ["input_ids", "attention_mask"]},
    "ids alone": {"model_input_names": ["input_ids"]},
    "lower case asked for": {"do_lower_case": True},
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name) for kind in TEXT_KINDS for name in FILES if kind not in ("convnext", "siglip_bert")),
        *(("convnext", "left"), ("siglip_bert", "left")),
    ],
)
def test_texts_embed_as_transformers_embeds_each_alone(kind, name, changed):
    """transformers#41771, tweeteval#17 (no length), BioMedLM#4 (no padding), sentence-transformers#3208 (left)."""
    directory = changed(kind, {"tokenizer_config.json": FILES[name]})
    siglip = kind in ("siglip", "siglip2")
    if name == "no pad" and siglip:
        with pytest.raises(UserError, match=r"has no pad_token among the \d+ tokens .* name the one of its training"):
            load_model(str(directory), "--model")
        return
    length = 40 if kind in BERT_KINDS else 24 if siglip else 77
    length = 9 if name == "short" and kind != "siglip2" else length
    model, processor = load_model(str(directory), "--model")
    found = prompt_embeddings(model, processor, TEXTS, ["{c}"])[:, 0]
    alone = torch.cat([prompt_embeddings(model, processor, [text], ["{c}"])[:, 0] for text in TEXTS])
    lower = name.startswith("lower") and kind == "vit_roberta"  # transformers' class does not obey it
    expected = embed_by_transformers(directory, [text.lower() for text in TEXTS] if lower else TEXTS, length)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-4)
    assert torch.cdist(expected, expected)[0, 1:].min() > 1e-2


PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}  # adds what tokenizer.json says; CLIP's own adds start and end


@pytest.mark.parametrize(
    ("kind", "files", "remove", "message"),
    [
        ("clip", {}, ["tokenizer.json"], r"holds no tokenizer; name .* by --processor; most CLIPs take that of openai"),
        ("convnext", {}, ["tokenizer.json"], r"holds no tokenizer; name .* by --processor; most CLIPs take that of"),
        ("siglip2", {}, ["tokenizer.json"], r"holds no tokenizer; name the id or directory of one by --processor$"),
        ("siglip", {}, ["spiece.model"], r"holds no tokenizer; name the id or directory of one by --processor$"),
        ("clip", {"tokenizer.json": {"model.vocab": {"<|endoftext|>": 528}, "model.merges": []}}, [],
         r"the same tokens .*, it knows 2 tokens; files are missing"),
        ("clip", {"tokenizer_config.json": {"model_max_length": 2}}, [],
         r"cuts texts at 2 tokens \(model_max_length\)"),
        ("clip", {"config.json": {"text_config.vocab_size": 300}}, [], r"knows 529 tokens, .* its text tower 300"),
        ("clip", {"config.json": {"text_config.vocab_size": 49408}}, [], r"knows 529 tokens, .* its text tower 49408"),
        ("clip", {"config.json": {"text_config.eos_token_id": 5}}, [],
         r"id 5 \(eos_token_id 5 .* ends texts with id 528"),
        ("clip", {"tokenizer.json": {"post_processor": None}, "tokenizer_config.json": PLAIN}, [],
         r"id 528 .* ends texts with id 339"),
        ("clip", {"tokenizer.json": {"post_processor": None}, "tokenizer_config.json": PLAIN,
                  "config.json": {"text_config.eos_token_id": 2}}, [],
         r"eos_token_id 2 in config.json\), and its tokenizer ends texts with id 339"),
        ("clip", {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}, [],
         r"a GPT2Tokenizer, spells words that"),
        ("clip", {"tokenizer.json": {"model.merges": []}}, [],
         r"a CLIPTokenizer, spells words that its vocabulary has"),
        ("siglip2", {"tokenizer_config.json": {"pad_token": "<fill>"}}, [], r"no pad_token among the 33 tokens"),
        ("dinov2_bert", {}, ["tokenizer.json"], r"holds no tokenizer; name the id or directory of one by --processor$"),
        ("dinov2_bert", {"tokenizer.json": {"post_processor": None}, "tokenizer_config.json": PLAIN}, [],
         r"pools the first token, and its tokenizer begins 'cat' with ids \[14\], its cls_token is 2; put the model's"),
        ("vit_roberta", {"config.json": {"text_config.vocab_size": 50265}}, [], r"knows 261 tokens, .* tower 50265"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_is_not_the_text_towers_is_refused(kind, files, remove, message, changed):
    """Before the weights, which are not there."""
    directory = changed(kind, files, [*remove, "model.safetensors"])
    with pytest.raises(UserError, match=rf"^--model .*{message}"):
        load_model(str(directory), "--model")


def test_another_start_is_said(changed, caplog):
    tokens._said.clear()
    load_model(str(changed("clip", {"tokenizer_config.json": {"bos_token": "a"}})))
    assert [record.message for record in caplog.records if "the model's start is 527" in record.message]


def test_small_letters_are_made_where_the_file_asks_for_them(changed):
    """SigLIP 2 of fixed resolution is a "siglip"; transformers 5 loads its Gemma tokenizer without the normalizer."""
    files = {"tokenizer_config.json": {"tokenizer_class": "GemmaTokenizer", "do_lower_case": True}}
    tokenizer = AutoTokenizer.from_pretrained(changed("siglip2", files | {"config.json": {"model_type": "siglip"}}))
    assert tokens.token_ids(tokenizer, ["A Cat"]) == tokens.token_ids(tokenizer, ["a cat"])
    tokenizer.init_kwargs["do_lower_case"] = False
    if type(tokenizer).__name__ == "GemmaTokenizer":
        assert tokens.token_ids(tokenizer, ["A Cat"]) != tokens.token_ids(tokenizer, ["a cat"])


def test_old_configs_with_eos_2_pool_the_highest_id(changed):
    directory = changed("clip", {"config.json": {"text_config.eos_token_id": 2}})
    model, processor = load_model(str(directory))
    expected = embed_by_transformers(directory, TEXTS, 77)
    torch.testing.assert_close(
        prompt_embeddings(model, processor, TEXTS, ["{c}"])[:, 0], expected, rtol=1e-4, atol=1e-4
    )


def test_classes_that_the_model_cannot_tell_apart_are_named(models, caplog):
    tokens._said.clear()
    model, processor = load_model(str(models / "siglip2"))
    with pytest.raises(
        UserError, match=r"the classes '猫' and '犬' are the same tokens .* does not know their letters"
    ):
        class_embeddings(model, processor, ["cat", "猫", "犬"], ["a photo of a {c}."])
    with pytest.raises(
        UserError, match=r"the classes '.* red' and '.* blue' are the same text to the model, .* 24 tokens"
    ):
        class_embeddings(model, processor, ["a" * 40 + " red", "a" * 40 + " blue"], ["{c}"])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            class_embeddings(model, processor, ["crane", "Crane", "turkey", "crane"], ["a photo of a {c}."])
    assert [record.message for record in caplog.records] == [
        "the classes 'crane' and 'Crane' are the same tokens to the model: it cannot tell them apart"
    ]


def test_cut_texts_and_texts_that_end_early_are_said_once(models, caplog, monkeypatch):
    tokens._said.clear()
    monkeypatch.setattr(zeroshot, "TEXTS_AT_ONCE", 2)
    model, processor = load_model(str(models / "clip"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            prompt_embeddings(model, processor, [*TEXTS, "cat <|endoftext|> dog"], ["{c}", "a photo of a {c}."])
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith(
        "2 of 10 texts are longer than the 77 tokens that the text tower takes, the longest has "
    )
    assert lines[1].startswith("'cat <|endoftext|> dog': holds the token that ends a text")


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_the_tokenizer_is_saved_as_it_was(kind, changed, tmp_path):
    """Texts cut and padded for this model leave no trace in tokenizer.json; no side or length is corrected there."""
    directory = changed(kind, {"tokenizer_config.json": {"padding_side": "left", "model_max_length": 9}})
    model, processor = load_model(str(directory))
    class_embeddings(model, processor, ["cat", "dog", "a photo of the number zero"], ["{c}"])
    save_model(tmp_path / "saved", model, processor, make_encoder(model, processor).state_dict())
    for path in directory.glob("tokenizer*.json"):
        saved = json.loads((tmp_path / "saved" / path.name).read_text())
        for field, value in json.loads(path.read_text()).items():
            assert saved[field] == value, field
    assert AutoProcessor.from_pretrained(tmp_path / "saved").tokenizer.padding_side == "left"
