"""examples/pretrain_small_clip.py and examples/make_digit_shards.py, as a user runs them, at a size of seconds."""

from __future__ import annotations

import filecmp
import io
import json
import re
import sys
import tarfile
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, CLIPModel, CLIPProcessor

from examples import make_digit_shards, make_shards, pretrain_small_clip
from tests.conftest import later_wins, run_script
from tests.published_layouts import save_layouts
from utils.errors import UserError
from utils.sets.typographic import WordStyle

TINY = [
    *("--patch_size", 8, "--hidden_size", 64, "--num_layers", 2, "--num_heads", 2),
    *("--projection_dim", 32, "--text_hidden_size", 32),
]
STRANGE_TEXTS = [
    "",
    "a photo of the number seven.",
    "Zürich naïve coöperate",
    "🙂🎉 emoji 👩‍👩‍👧",
    "猫的照片 写真 고양이",
    "tab\tand\nnewline   and \x00 control",
    "word " * 100,
    "x" * 500,
    "<|endoftext|> inside",
]


def call(script: ModuleType, *arguments: str | Path) -> None:
    """The script's main() in this process, as if called with ``arguments``: the imports are paid for once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        script.main()


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small-clip"
    run_script(
        "examples/pretrain_small_clip.py",
        *("--train_data", digits, "--image_size", 32, *TINY, "--epochs", 4, "--batch_size", 32),
        *("--learning_rate", 2e-3, "--crop_padding", 1, "--flip", "false", "--eval_epochs", 2, "--output_dir", folder),
    )
    return folder


@pytest.fixture(scope="module")
def clip(trained: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(trained).eval()


@pytest.fixture(scope="module")
def processor(trained: Path) -> CLIPProcessor:
    return CLIPProcessor.from_pretrained(trained)


def test_digit_shards_have_the_layout(digits: Path) -> None:
    assert (digits / "classnames.txt").read_text().split()[:3] == ["zero", "one", "two"]
    for split, samples in (("train", 1437), ("test", 360)):
        sizes = json.loads((digits / split / "sizes.json").read_text())
        assert sorted(sizes) == sorted(path.name for path in (digits / split).glob("*.tar"))
        assert len(sizes) > 1
        assert sum(sizes.values()) == samples


def test_digit_shards_are_the_same_bytes_again(digits: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    call(make_digit_shards, "--output_dir", again)
    files = sorted(str(path.relative_to(digits)) for path in digits.rglob("*") if path.is_file())
    assert files == sorted(str(path.relative_to(again)) for path in again.rglob("*") if path.is_file())
    assert filecmp.cmpfiles(digits, again, files, shallow=False)[0] == files


def test_training_beats_chance_and_is_written_down(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    accuracies = [row["eval_accuracy_clean"] for row in rows if "eval_accuracy_clean" in row]
    assert len(accuracies) == 2
    assert accuracies[-1] > 0.5  # 0.75 when this was written; chance is 0.1
    assert "--train_data" in (trained / "README.md").read_text()


def test_the_same_seed_gives_the_same_model(digits: Path, tmp_path: Path) -> None:
    """In processes of their own: the trainer of the tokenizer hashes differently in each."""
    for name in ("one", "two"):
        run_script(
            "examples/pretrain_small_clip.py",
            *("--train_data", digits, "--image_size", 32, *TINY, "--epochs", 1, "--train_num_samples", 64),
            *("--batch_size", 32, "--output_dir", tmp_path / name),
        )
    for file in ("model.safetensors", "tokenizer.json"):
        assert filecmp.cmp(tmp_path / "one" / file, tmp_path / "two" / file, shallow=False), file


def test_several_sets_are_one_with_the_classes_of_all(digits: Path, tmp_path: Path) -> None:
    """Of five digits and of other five, by name: labels are the place in the names of all."""
    names = (digits / "classnames.txt").read_text().split()
    for name, classes in (("high", names[5:]), ("low", names[:6])):  # "five" is in both
        call(make_shards, "--data", digits, "--classes", *classes, "--output_dir", tmp_path / name)
    settings = pretrain_small_clip.Settings(
        train_data=[str(tmp_path / "high"), str(tmp_path / "low")], output_dir="", cache_dir=str(tmp_path / "cache")
    )
    sets = pretrain_small_clip.open_split(settings, "test")
    together = list(dict.fromkeys(name for one in sets for name in one.classnames))
    assert together == [*names[5:], *names[:5]]
    images, labels = pretrain_small_clip.decode(sets, together, settings, None, "decoding")
    whole = pretrain_small_clip.Settings(train_data=[str(digits)], output_dir="", cache_dir=str(tmp_path / "cache"))
    all_images, all_labels = pretrain_small_clip.decode(
        pretrain_small_clip.open_split(whole, "test"), names, whole, None, "decoding"
    )
    truth = {image.numpy().tobytes(): names[label] for image, label in zip(all_images, all_labels)}
    assert [together[label] for label in labels] == [truth[image.numpy().tobytes()] for image in images]
    assert len(images) == len(all_images) + (all_labels == 5).sum()
    with pytest.raises(UserError, match="--classnames: names the classes of one set"):
        call(
            pretrain_small_clip, "--train_data", tmp_path / "high", tmp_path / "low",
            "--classnames", tmp_path / "high/classnames.txt", "--output_dir", tmp_path / "out",
        )  # fmt: skip


def test_saved_model_gives_the_accuracy_it_was_saved_with(
    trained: Path, digits: Path, clip: CLIPModel, processor: CLIPProcessor
) -> None:
    """Through transformers alone: its own image processor, its own forward pass."""
    members: dict[str, bytes] = {}
    for shard in sorted((digits / "test").glob("*.tar")):
        with tarfile.open(shard) as tar:
            members.update({member.name: tar.extractfile(member).read() for member in tar})
    keys = sorted({name.rsplit(".", 1)[0] for name in members})
    images = [Image.open(io.BytesIO(members[key + ".png"])) for key in keys]
    labels = torch.tensor([int(members[key + ".cls"]) for key in keys])
    names = (digits / "classnames.txt").read_text().split()
    inputs = processor(
        text=[f"the digit {name}." for name in names], images=images, padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = clip(**inputs).logits_per_image
    accuracy = float((logits.argmax(dim=-1) == labels).float().mean())
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    # The run measured with the mean of five templates, this is one of them.
    assert accuracy == pytest.approx(rows[-1]["eval_accuracy_clean"], abs=0.1)


def test_ids_agree_between_config_and_tokenizer(clip: CLIPModel, processor: CLIPProcessor) -> None:
    config, tokenizer = clip.config.text_config, processor.tokenizer
    assert config.eos_token_id == tokenizer.eos_token_id == max(tokenizer.get_vocab().values())
    assert config.bos_token_id == tokenizer.bos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id
    assert config.vocab_size == len(tokenizer)
    assert tokenizer.model_max_length == config.max_position_embeddings


def test_any_text_is_encoded(clip: CLIPModel, processor: CLIPProcessor) -> None:
    tokenizer, config = processor.tokenizer, clip.config.text_config
    for text in STRANGE_TEXTS:
        ids = tokenizer(text, truncation=True)["input_ids"]
        assert ids[0] == config.bos_token_id
        assert ids[-1] == config.eos_token_id
        assert len(ids) <= config.max_position_embeddings
        assert max(ids) < config.vocab_size
    inputs = tokenizer(STRANGE_TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        assert clip.get_text_features(**inputs).pooler_output.isfinite().all()


@pytest.mark.parametrize("text", ["a photo of the number seven.", "naïve 🙂 猫 xyz"])
def test_decoding_gives_the_text_back(processor: CLIPProcessor, text: str) -> None:
    ids = processor.tokenizer(text)["input_ids"]
    decoded = processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.replace(" ", "")


def test_captions_are_few_tokens(processor: CLIPProcessor) -> None:
    """The merges were learnt from the captions: a word of theirs is one token."""
    assert len(processor.tokenizer("a photo of the number seven.")["input_ids"]) == 2 + 7


def test_loading_again_gives_the_same_ids(trained: Path, processor: CLIPProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    tokenizers = [
        AutoTokenizer.from_pretrained(trained),
        AutoProcessor.from_pretrained(trained).tokenizer,
        CLIPProcessor.from_pretrained(tmp_path).tokenizer,
    ]
    expected = processor.tokenizer(STRANGE_TEXTS, padding=True, truncation=True)["input_ids"]
    for tokenizer in tokenizers:
        assert tokenizer(STRANGE_TEXTS, padding=True, truncation=True)["input_ids"] == expected


@torch.no_grad()
def test_padding_does_not_change_text_embeddings(clip: CLIPModel, processor: CLIPProcessor) -> None:
    texts = ["the digit one.", "a photo of the number seven.", "猫 " * 20]
    together = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    embeds = clip.get_text_features(**together).pooler_output
    unmasked = clip.get_text_features(input_ids=together["input_ids"]).pooler_output
    torch.testing.assert_close(unmasked, embeds, atol=1e-5, rtol=1e-5)
    for text, embed in zip(texts, embeds):
        alone = clip.get_text_features(**processor.tokenizer(text, return_tensors="pt")).pooler_output
        torch.testing.assert_close(alone[0], embed, atol=1e-5, rtol=1e-5)
    assert F.cosine_similarity(embeds[0], embeds[1], dim=0) < 0.99


def test_a_mistake_ends_the_script_in_one_line(tmp_path: Path) -> None:
    missing, out = tmp_path / "nowhere", tmp_path / "out"
    output = run_script("examples/pretrain_small_clip.py", "--train_data", missing, "--output_dir", out, status=2)
    assert len(output.splitlines()) == 1
    assert f"--train_data {missing}: no such directory" in output
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--patch_size", 7], "--patch_size 7: does not divide --image_size 32"),
        (["--num_heads", 7], "--num_heads 7: does not divide --hidden_size 128"),
        (["--epoch", 1], "did you mean --epochs"),
        (["--classnames", "three.txt"], "there are 3 classes"),
        (["--classnames", "absent.txt"], "absent.txt"),
        (["--templates", "three.txt"], "{c}"),
        (["--train_data", "bare"], "no classnames.txt"),
        (["--train_data", "empty"], "no .tar files"),
        (["--output_dir", "used"], "--overwrite"),
        (["--words", "three.txt"], "4 lines for 10 classes"),
        (["--words", "blank.txt"], "holds no words"),
        (["--with_words", "--fonts", "Comic"], "--fonts Comic: neither"),
        (["--word_size_min", 99], "larger than --word_size_max"),
        (["--start_from", "nowhere"], "--start_from nowhere"),
    ],
)
def test_mistakes_are_named(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("three.txt").write_text("zero\none\ntwo\n")
    Path("blank.txt").write_text("\n" * 10)
    Path("bare").mkdir()
    Path("bare/train").symlink_to(digits / "train")
    Path("empty").mkdir()
    Path("used").mkdir()
    Path("used/notes.txt").write_text("mine")
    out = ["--output_dir", "out", "--cache_dir", "cache"]
    with pytest.raises(UserError, match=re.escape(expected)):
        call(pretrain_small_clip, *later_wins(["--train_data", digits, *out], arguments))
    assert not Path("out").exists()
    assert Path("used/notes.txt").read_text() == "mine"


def test_a_set_that_is_too_large_is_refused(digits: Path, tmp_path: Path) -> None:
    arguments = ["--train_data", digits, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"]
    with pytest.raises(UserError, match=r"GiB of memory.*lower --train_num_samples or --image_size"):
        call(pretrain_small_clip, *arguments, "--image_size", 4096)


def test_all_present_classes_get_a_caption() -> None:
    labels = torch.tensor([7, 3, 7, 90])
    generator = torch.Generator().manual_seed(0)
    for captions, expected in ((2, 3), (10, 10), (100, 100)):
        classes, targets = pretrain_small_clip.draw_classes(labels, 100, captions, generator)
        assert len(classes) == len(classes.unique()) == expected
        assert torch.equal(classes[targets], labels)


def test_augmented_images_are_crops_of_the_padded_ones() -> None:
    images = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)
    for flip in (False, True):
        settings = pretrain_small_clip.Settings(train_data=[], output_dir="", crop_padding=1, flip=flip)
        augmented = pretrain_small_clip.augment(images, settings, torch.Generator().manual_seed(0))
        padded = F.pad(images, (1, 1, 1, 1))
        mirrored = 0
        for image, frame in zip(augmented, padded):
            crops = [frame[:, top : top + 8, left : left + 8] for top in range(3) for left in range(3)]
            plain = any(torch.equal(image, crop) for crop in crops)
            mirrored += not plain
            assert plain or (flip and any(torch.equal(image, crop.flip(-1)) for crop in crops))
        assert (mirrored > 16) == flip


def test_printed_words_name_their_class() -> None:
    """Words on plain colours and on images; class 1 has no word."""
    images = torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8)
    style = WordStyle(("DejaVuSans",), (40, 60), "label")
    settings = pretrain_small_clip.Settings(
        train_data=[], output_dir="", image_size=64, words_per_step=60, words_on_images=0.5
    )
    words, image_labels = [(0, "zero"), (2, "two")], torch.full((5,), 7)
    draw = partial(pretrain_small_clip.print_words, words, images, image_labels, style, settings)
    pictures, labels = draw(3)
    assert torch.equal(pictures, draw(3)[0])
    assert not torch.equal(pictures, draw(4)[0])
    plain = torch.tensor([len(picture.flatten(1).unique(dim=1).T) < 600 for picture in pictures])  # of 4,096 pixels
    assert 15 < plain.sum() < 45
    assert set(labels[plain].tolist()) == {0, 2}
    assert set(labels[~plain].tolist()) == {0, 2, 7}
    assert 4 < (labels == 7).sum() < 26  # half of a half of 60


def test_reading_is_learnt_beside_the_images_and_training_goes_on(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("\n".join(["zero", "", "two", *[""] * 7]) + "\n")
    common = ["--train_data", digits, "--train_num_samples", 64, "--batch_size", 32, "--cache_dir", tmp_path / "cache"]
    common += ["--with_words", "--words", tmp_path / "words.txt", "--words_per_step", 16, "--logging_steps", 1]
    call(pretrain_small_clip, *common, *TINY, "--epochs", 1, "--output_dir", tmp_path / "first")
    call(
        pretrain_small_clip,
        *common, "--start_from", tmp_path / "first", "--learning_rate", 1e-9, "--epochs", 1,
        "--output_dir", tmp_path / "second",
    )  # fmt: skip
    for name in ("first", "second"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert all(0 <= row["words_read"] <= 1 for row in rows if "loss" in row)
    first, second = (CLIPModel.from_pretrained(tmp_path / name).state_dict() for name in ("first", "second"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6)
    assert filecmp.cmp(tmp_path / "first/tokenizer.json", tmp_path / "second/tokenizer.json", shallow=False)


def test_training_goes_on_from_an_image_tower_and_its_base(digits: Path, tmp_path: Path) -> None:
    one = save_layouts(tmp_path / "published")["robustvlm_visual"]
    call(
        pretrain_small_clip,
        *("--train_data", digits, "--train_num_samples", 16, "--batch_size", 8, "--cache_dir", tmp_path / "cache"),
        *("--epochs", 1, "--learning_rate", 1e-9, "--flip", "false", "--start_from", one.path),
        *("--base_model", one.base_model, "--output_dir", tmp_path / "out"),
    )
    clip = CLIPModel.from_pretrained(tmp_path / "out").eval()
    processor = CLIPProcessor.from_pretrained(tmp_path / "out")
    mean, std = (
        torch.tensor(value).view(3, 1, 1)
        for value in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    ids = processor.tokenizer(one.texts, padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        images = clip.get_image_features((one.images - mean) / std).pooler_output
        texts = clip.get_text_features(ids).pooler_output
    torch.testing.assert_close(images, one.expected["image_features"], rtol=0, atol=1e-4)
    torch.testing.assert_close(texts, one.expected["text_features"], rtol=0, atol=1e-4)
