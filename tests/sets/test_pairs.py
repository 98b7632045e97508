"""Preference data: attacks follow the sample alone, malformed pairs are counted, batches say who prefers what."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest
import torch
import webdataset

from tests.conftest import ROOT
from tests.shard_maker import NUM_CLASSES, image_bytes, labelled_samples, make_shards, write_shard
from utils.data.images import OWN_FORMATS, ImageTransform, decode
from utils.data.shards import ShardDataset, eval_loader, index_shards, train_batches
from utils.data.skipped import BadSample, SkipCounter, count_skipped
from utils.data.sources import expand_shards
from utils.errors import UserError
from utils.sets.pairs import (
    PairDataset,
    Row,
    TypographicDataset,
    collate_rows,
    pack_pair_folder,
    pair_shards,
    parse_pair,
)
from utils.sets.typographic import WordStyle

SIZE = (40, 40)
TRANSFORM = ImageTransform(40, SIZE)
NAMES = ["cat", "sea lion", "great white shark", "dog", "drum"]
SCAM = ROOT.parent / "shared/data/scam"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """13 labelled samples in two shards."""
    return make_shards(tmp_path_factory.mktemp("labelled"), [7, 6])


def typographic(urls, tmp_path, order="shuffled", classnames=NAMES, **options):
    index = index_shards(urls, cache_dir=tmp_path / "cache")
    return TypographicDataset(index, TRANSFORM, order=order, classnames=classnames, style=WordStyle(), **options)


def samples_of(dataset, epoch=0):
    """Key -> rows, of a whole epoch."""
    items = [dataset[epoch, slot, slot] for slot in range(len(dataset))]
    assert not any(item["skipped"] for item in items)
    return {item["key"]: item["rows"] for item in items}


def comparable(rows):
    return [(row.image.numpy().tobytes(), row.chosen, row.rejected, row.reg) for row in rows]


def read_pairs(samples, tmp_path, max_bad_fraction=1.0):
    """Batches of a shard of pairs, and the counter of what was skipped."""
    url = write_shard(tmp_path / "pairs" / "0.tar", samples)
    index = index_shards([url], cache_dir=tmp_path / "cache")
    skips = SkipCounter(index, max_bad_fraction, report=None)
    dataset = PairDataset(index, TRANSFORM, order="sequential")
    loader = eval_loader(dataset, num_samples=10**6, batch_size=4, rank=0, world_size=1, num_workers=0)
    return list(count_skipped(loader, skips)), skips


def pair(number=0, **fields):
    return {"jpg": image_bytes(number), "json": json.dumps(fields).encode()}


# --------------------------------------------------------------------------------------------------------- typographic


def test_rows_of_a_labelled_sample(shards, tmp_path):
    dataset = typographic(shards, tmp_path, attacks_per_image=3)
    plain = ShardDataset(dataset.index, TRANSFORM, order="shuffled", with_labels=True, num_classes=NUM_CLASSES)
    for slot in range(len(dataset)):
        item, reference = dataset[2, slot, slot], plain[2, slot, slot]
        clean, *attacked = item["rows"]
        assert item["key"] == reference["key"]
        assert clean.reg
        assert torch.equal(clean.image, reference["image"])
        assert not any(row.reg for row in attacked)
        assert {row.chosen for row in item["rows"]} == {NAMES[reference["label"]]}
        written = [word for row in attacked for word in row.rejected]
        assert len(set(written)) == len(attacked) == 3
        assert set(written) <= set(NAMES) - {clean.chosen}
        assert len({row.image.numpy().tobytes() for row in item["rows"]}) == 4


def test_attacks_depend_on_seed_epoch_and_key_alone(shards, tmp_path):
    dataset = typographic(shards, tmp_path, attacks_per_image=2)
    expected = {key: comparable(rows) for key, rows in samples_of(dataset).items()}
    turned = write_shard(tmp_path / "turned.tar", [*labelled_samples(1, 6)[::-1], *labelled_samples(0, 7)[::-1]])
    elsewhere = typographic([turned], tmp_path, "sequential", attacks_per_image=2)  # other slots and places
    assert {key: comparable(rows) for key, rows in samples_of(elsewhere).items()} == expected
    for num_workers, batch_size, world_size in ((2, 12, 1), (0, 2, 2), (0, 12, 1)):
        found = {}
        for rank in range(world_size):
            loader = train_batches(
                dataset,
                samples_per_epoch=13,
                global_batch_size=12,
                per_device_batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                first_step=0,
                num_steps=1,
                num_workers=num_workers,
            )
            for batch in loader:
                clean, attacked = batch["images"].split([batch_size, 2 * batch_size])
                for number, key in enumerate(batch["keys"]):
                    images = [clean[number], attacked[2 * number], attacked[2 * number + 1]]
                    texts = batch["rejected"][2 * number : 2 * number + 2, 0].tolist()
                    found[key] = [image.numpy().tobytes() for image in images], [NAMES[text] for text in texts]
        assert len(found) == 12
        for key, (images, texts) in found.items():
            assert images == [row[0] for row in expected[key]]
            assert [[text] for text in texts] == [row[2] for row in expected[key][1:]]


def test_a_new_epoch_draws_anew_unless_it_is_fixed(shards, tmp_path):
    drawn = samples_of(typographic(shards, tmp_path))
    again = samples_of(typographic(shards, tmp_path), epoch=1)
    other_seed = samples_of(typographic(shards, tmp_path, seed=1))
    for key, (clean, attacked) in drawn.items():
        for others in (again, other_seed):
            assert torch.equal(others[key][0].image, clean.image)
            assert not torch.equal(others[key][1].image, attacked.image)
    fixed = typographic(shards, tmp_path, fixed_epoch=1)
    for epoch in (0, 5):
        for key, rows in samples_of(fixed, epoch).items():
            assert comparable(rows) == comparable(again[key])


def test_classes_of_one_name_are_one_text(shards, tmp_path):
    dataset = typographic(shards, tmp_path, classnames=["Crane", "cat", "crane ", "dog", "CAT"], attacks_per_image=2)
    assert dataset.texts == ["Crane", "cat", "dog"]
    for key, rows in samples_of(dataset).items():
        label = int(key[-5:]) % NUM_CLASSES
        assert rows[0].chosen == ["Crane", "cat", "Crane", "dog", "cat"][label]
        assert {row.rejected[0] for row in rows[1:]} == {"Crane", "cat", "dog"} - {rows[0].chosen}


def test_number_of_attacks(shards, tmp_path):
    for rows in samples_of(typographic(shards, tmp_path, attacks_per_image=0)).values():
        assert [row.reg for row in rows] == [True]
    for classnames, attacks, message in (
        (["cat", "Cat", " cat"], 1, r"--train_shards: one class only \(cat\); a wrong word takes at least two"),
        (NAMES, 5, "--attacks_per_image 5: 5 class names leave 4 wrong words"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            typographic(shards, tmp_path, classnames=classnames, attacks_per_image=attacks)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- parsing


@pytest.mark.parametrize(
    ("text", "kind", "detail"),
    [
        (None, "missing pair", "no .json member"),
        (b"", "bad pair", "cannot be read"),
        (b'{"chosen": "a", "rejected": ["b"]', "bad pair", "cannot be read"),
        (b"\xff\xfe{", "bad pair", "cannot be read"),
        (b"[" * 100_000, "bad pair", "cannot be read"),
        (b'["a", "b"]', "bad pair", "expected {"),
        (b"null", "bad pair", "expected {"),
        (b'{"rejected": ["b"]}', "bad pair", "needs a chosen"),
        (b'{"chosen": "a"}', "bad pair", "at least one rejected"),
        (b'{"chosen": "a", "rejected": []}', "bad pair", "at least one rejected"),
        (b'{"chosen": ["a"], "rejected": ["b"]}', "bad pair", "chosen: expected {"),
        (b'{"chosen": "a", "rejected": 1}', "bad pair", "rejected: expected {"),
        (b'{"chosen": "a", "rejected": ["b", null]}', "bad pair", "rejected: expected {"),
        (b'{"chosen": "a", "rejected": {"b": 1}}', "bad pair", "rejected: expected {"),
        (b'{"chosen": "a", "rejected": ["b"], "candidates": "ab"}', "bad pair", "candidates: expected {"),
        (b'{"chosen": "a", "rejected": ["b"], "candidates": [1]}', "bad pair", "candidates: expected {"),
        (b'{"chosen": "a", "rejected": ["b"], "candidates": []}', "bad pair", "candidates: the list is empty"),
        (b'{"chosen": "a", "rejected": ["b"], "candidates": ["b", "c"]}', "bad pair", "chosen 'a' is not among"),
        (b'{"chosen": "a", "rejected": ["b"], "candidates": ["a", "c"]}', "bad pair", "rejected 'b' is not among"),
        (b'{"chosen": "a", "rejected": ["b"], "reg": "yes"}', "bad pair", "reg: expected {"),
        (b'{"chosen": "a", "reg": true}', "bad pair", "reg without candidates"),
        (b'{"chosen": "a", "reg": true, "candidates": ["b"]}', "bad pair", "chosen 'a' is not among"),
        (b'{"chosen": "a \\ud800", "rejected": ["b"]}', "bad pair", "not valid Unicode"),
        (b'{"chosen": "A  cat", "rejected": ["a cat "]}', "chosen equals rejected", "'A  cat'"),
    ],
)
def test_what_cannot_be_a_preference(text, kind, detail):
    with pytest.raises(BadSample) as caught:
        parse_pair(text, "0001", "0.tar#0001")
    skipped = caught.value.skipped
    assert (skipped.kind, skipped.where, skipped.samples) == (kind, "0.tar#0001", 1)
    assert detail in skipped.detail


def test_bad_pairs_are_skipped_and_counted(tmp_path):
    good = [(f"{number}", pair(number, chosen="a", rejected=["b"])) for number in range(6)]
    bad = [
        ("x0", pair(chosen="a")),
        ("x1", {"jpg": image_bytes(0), "json": b"{"}),
        ("x2", {"jpg": image_bytes(0)}),
        ("x3", pair(chosen="a", rejected=["A"])),
        ("x4", {"json": pair(chosen="a", rejected=["b"])["json"]}),
        ("x5", {"jpg": b"no picture", "json": pair(chosen="a", rejected=["b"])["json"]}),
    ]
    batches, skips = read_pairs([*good[:3], *bad, *good[3:]], tmp_path, max_bad_fraction=0.4)
    assert [key for batch in batches for key in batch["keys"]] == list("012345")
    assert sum(len(batch["chosen"]) for batch in batches) == sum(batch["num_samples"] for batch in batches) == 6
    kinds = [line.split(":")[0] for line in skips.summary().splitlines()]
    assert kinds == ["bad pair", "missing pair", "chosen equals rejected", "missing image", "undecodable image"]
    assert skips.bad_fraction == 6 / 12
    with pytest.raises(UserError, match=r"--max_bad_fraction 0.4: 50.00 % .* 2 samples for bad pair: .*#x0 ") as caught:
        skips.check()
    assert "\n" not in str(caught.value)


def test_rejected_texts_that_equal_the_chosen_one_are_left_out_and_noted(tmp_path):
    samples = [
        ("0", pair(chosen="A cat", rejected=["a dog", "a  CAT", "a drum"], candidates=["A cat", "a dog", "a drum"])),
        ("1", pair(chosen="a", rejected="b")),
    ]
    (batch,), skips = read_pairs(samples, tmp_path, max_bad_fraction=0.0)
    skips.check()  # no sample is lost
    assert skips.bad_fraction == 0
    assert "chosen among rejected" in skips.summary()
    assert [[batch["texts"][text] for text in row if text >= 0] for row in batch["rejected"].tolist()] == [
        ["a dog", "a drum"],
        ["b"],
    ]


def test_candidates_are_the_texts_of_a_pair_where_none_are_named():
    row, dropped = parse_pair(json.dumps({"chosen": "a", "rejected": ["b", "A", "c"]}).encode(), "0", "0")
    assert (row.chosen, row.rejected, row.candidates, row.reg, dropped) == ("a", ["b", "c"], ["a", "b", "c"], False, 1)
    for chosen in (None, "x"):  # what a row of the regulariser rejects does not matter
        fields = {"reg": True, "chosen": chosen, "candidates": ["x", "y", "x"], "rejected": ["z", "X"]}
        row, dropped = parse_pair(json.dumps(fields).encode(), "0", "0")
        assert (row.chosen, row.rejected, row.candidates, row.reg, dropped) == (chosen, [], ["x", "y"], True, 0)


# --------------------------------------------------------------------------------------------------------- named pairs


def test_samples_named_label_and_text(tmp_path):
    picture = {"png": image_bytes(0, format="PNG")}
    samples = [
        ("label=sea_lion_text=coffee_mug", picture),
        ("photos.2024/label=cat_text=_text=dog", picture),
        ("label=cat_text=CAT", picture),
        ("label=_text=dog", picture),
    ]
    (batch,), skips = read_pairs(samples, tmp_path)
    pairs = [(batch["texts"][a], batch["texts"][b[0]]) for a, b in zip(batch["chosen"], batch["rejected"])]
    assert pairs == [
        ("a photo of a sea lion.", "a photo of a coffee mug."),
        ("a photo of a cat.", "a photo of a text=dog."),
    ]
    assert [line.split(":")[0] for line in skips.summary().splitlines()] == ["chosen equals rejected", "missing pair"]


def test_a_folder_of_named_pictures_becomes_a_shard(tmp_path, monkeypatch):
    folder, cache = tmp_path / "photos", tmp_path / "cache"
    folder.mkdir()
    names = [
        "label=cat_text=dog.png",
        "label=cat_text=dog.jpg",  # as neighbours of one key the two would be one sample
        "label=St. Bernard_text=sea_lion.PNG",
        "label=st._bernard_text=no. 5 drum.jpeg",
    ]
    for number, name in enumerate(names):
        (folder / name).write_bytes(image_bytes(number, format="PNG" if "png" in name.lower() else "JPEG"))
    (folder / "notes.txt").write_text("", encoding="utf-8")
    (shard,) = pair_shards([str(folder)], str(cache))
    made = os.stat(shard).st_mtime_ns

    index = index_shards(expand_shards([shard]), cache_dir=cache)
    items = [PairDataset(index, TRANSFORM, order="sequential")[0, slot, slot] for slot in range(len(names))]
    texts = sorted((item["rows"][0].chosen, *item["rows"][0].rejected) for item in items)
    assert texts == [
        ("a photo of a St Bernard.", "a photo of a sea lion."),
        ("a photo of a cat.", "a photo of a dog."),
        ("a photo of a cat.", "a photo of a dog."),
        ("a photo of a st bernard.", "a photo of a no 5 drum."),
    ]
    assert len({item["rows"][0].image.numpy().tobytes() for item in items}) == len(names)

    with monkeypatch.context() as patch:
        patch.setattr(webdataset, "TarWriter", None)  # it is not made again
        assert pack_pair_folder(folder, str(cache)) == shard
    assert os.stat(shard).st_mtime_ns == made
    (folder / names[0]).write_bytes(image_bytes(7, format="PNG"))
    renewed = pack_pair_folder(folder, str(cache))
    assert renewed != shard
    index = index_shards([renewed], cache_dir=cache)
    images = [PairDataset(index, TRANSFORM, order="sequential")[0, slot, slot]["rows"][0].image for slot in range(4)]
    assert sum(any(torch.equal(image, item["rows"][0].image) for item in items) for image in images) == 3


def test_pictures_of_other_formats_are_taken_and_what_is_not_is_said(tmp_path, caplog):
    """Extensions were lumped together, and what was not taken went unnamed (pytorch/vision#1580)."""
    folder, cache = tmp_path / "photos", tmp_path / "cache"
    (folder / "more").mkdir(parents=True)
    formats = {"label=a_text=b.jfif": "JPEG", "label=c_text=d.TIFF": "TIFF", "label=e_text=f.bmp": "BMP"}
    for number, (name, format) in enumerate(formats.items()):
        (folder / name).write_bytes(image_bytes(number, format=format))
    for name in ("label=g_text=h.HEIC", "other.png", ".DS_Store"):
        (folder / name).write_bytes(b"")
    (folder / "label=i_text=j.png").symlink_to("nowhere")
    os.mkfifo(folder / "label=k_text=l.png")
    (shard,) = pair_shards([str(folder)], str(cache))
    index = index_shards([shard], cache_dir=cache)
    items = [PairDataset(index, ImageTransform(None, None), order="sequential")[0, slot, slot] for slot in range(3)]
    assert [item["rows"][0].chosen for item in items] == [f"a photo of a {letter}." for letter in "ace"]
    for number, (item, format) in enumerate(zip(items, formats.values())):
        expected = decode(image_bytes(number, format=format), ImageTransform(None, None), OWN_FORMATS)
        assert torch.equal(item["rows"][0].image, expected)
    for expected in (
        "1 .heic files (label=g_text=h.HEIC)",
        "1 .png files (other.png)",
        "1 broken links (label=i",
        "1 folders (more/)",
    ):
        assert expected in caplog.text
    for name in formats:
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"none of a format that is read: .*label=g_text=h.HEIC"):
        pack_pair_folder(folder, str(cache))


def test_texts_in_two_unicode_forms_are_one():
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    row, _ = parse_pair(None, f"label={apart}_text=dog", "where")
    assert row.chosen == f"a photo of a {composed}."
    row, dropped = parse_pair(json.dumps({"chosen": composed, "rejected": [apart, "dog"]}).encode(), "x", "where")
    assert (row.chosen, row.rejected, dropped) == (composed, ["dog"], 1)


def test_other_folders_and_patterns_stay_as_they_are(tmp_path, shards):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0001.png").write_bytes(image_bytes(0, format="PNG"))
    for folder in (tmp_path / "pictures", Path(shards[0]).parent):
        assert pack_pair_folder(folder, str(tmp_path)) is None
    patterns = [str(tmp_path / "pictures"), "data/{0..3}.tar", "hf://datasets/org/name/0.tar"]
    assert pair_shards(patterns, str(tmp_path)) == patterns


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "label=a_text=b.png").write_bytes(image_bytes(0, format="PNG"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file.*: .*--cache_dir") as caught:
        pack_pair_folder(tmp_path, str(tmp_path / "file"))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- batches


def sample(position, *rows):
    return {"position": position, "key": f"k{position}", "rows": list(rows), "skipped": []}


def row(value, chosen, rejected=(), candidates=None, reg=False):
    return Row(torch.full((3, 2, 2), value, dtype=torch.uint8), chosen, list(rejected), candidates, reg)


def test_a_batch_of_both_kinds():
    lost = {"position": 3, "key": "k3", "image": None, "skipped": ["record"]}
    pairs = (row(1, "a", ["b", "c"], ["a", "b", "c"]), row(2, "d", ["a"], ["a", "d"]))
    regs = (row(3, "b", candidates=["b", "e"], reg=True), row(4, None, candidates=["a", "e"], reg=True))
    samples = [sample(5, pairs[0]), sample(2, regs[0]), lost, sample(0, pairs[1]), sample(7, regs[1])]
    batch = collate_rows(samples, texts=None, no_images=torch.empty(0, 3, 2, 2, dtype=torch.uint8))
    texts = batch["texts"]
    assert batch["images"][:, 0, 0, 0].tolist() == [3, 4, 1, 2]  # those of the regulariser come first
    assert sorted(texts) == ["a", "b", "c", "d", "e"]
    assert batch["reg_positions"].tolist() == [2, 7]
    assert batch["positions"].tolist() == [5, 0]
    assert batch["reg_chosen"].tolist() == [texts.index("b"), -1]
    assert batch["chosen"].tolist() == [texts.index("a"), texts.index("d")]
    assert batch["rejected"].tolist() == [[texts.index("b"), texts.index("c")], [texts.index("a"), -1]]
    named = [{texts[place] for place in line.nonzero().flatten()} for line in batch["reg_candidates"]]
    assert named == [{"b", "e"}, {"a", "e"}]
    named = [{texts[place] for place in line.nonzero().flatten()} for line in batch["candidates"]]
    assert named == [{"a", "b", "c"}, {"a", "d"}]
    assert (batch["num_samples"], batch["keys"], batch["skipped"]) == (4, ["k5", "k2", "k0", "k7"], ["record"])


@pytest.mark.parametrize("texts", [None, ["a", "b", "c"]])
@pytest.mark.parametrize(("regs", "pairs"), [(2, 0), (0, 2), (0, 0)])
def test_batches_without_one_kind_or_without_any(regs, pairs, texts):
    named = None if texts else ["a", "b"]
    samples = [sample(number, row(0, "a", candidates=named, reg=True)) for number in range(regs)]
    samples += [sample(number, row(0, "b", ["a"], candidates=named)) for number in range(pairs)]
    batch = collate_rows(samples, texts=texts, no_images=torch.empty(0, 3, 2, 2, dtype=torch.uint8))
    count = len(batch["texts"])
    assert count == (3 if texts else 2 if samples else 0)
    assert (batch["images"].shape, batch["images"].dtype) == ((regs + pairs, 3, 2, 2), torch.uint8)
    shapes = {"reg_chosen": (regs,), "reg_positions": (regs,), "chosen": (pairs,), "positions": (pairs,)}
    for name, shape in (shapes | {"rejected": (pairs, 1)}).items():
        assert (batch[name].shape, batch[name].dtype) == (shape, torch.int64), name
    for name, length in (("reg_candidates", regs), ("candidates", pairs)):
        if texts:
            assert batch[name] is None
        else:
            assert (batch[name].shape, batch[name].dtype) == ((length, count), torch.bool)


# ----------------------------------------------------------------------------------------------------- real photographs


@pytest.mark.skipif(not SCAM.is_dir(), reason="the photographs of shared/data/scam are not there")
def test_real_handwritten_attacks(tmp_path):
    keys, texts = {}, {}
    for split in ("attack", "clean"):
        index = index_shards(expand_shards([str(SCAM / split)]), cache_dir=tmp_path)
        dataset = PairDataset(index, TRANSFORM, order="sequential")
        loader = eval_loader(dataset, num_samples=1000, batch_size=50, rank=0, world_size=1, num_workers=0)
        batches = list(loader)
        assert not any(batch["skipped"] for batch in batches)
        for batch in batches:
            assert len(batch["images"]) == len(batch["positions"]) == 50
            assert torch.equal(batch["candidates"].sum(dim=1), torch.full((50,), 2))
            for column in (batch["chosen"], batch["rejected"][:, 0]):
                assert batch["candidates"].gather(1, column[:, None]).all()
        keys[split] = [key.removeprefix(f"scam-{split}-") for batch in batches for key in batch["keys"]]
        texts[split] = [batch["texts"][chosen] for batch in batches for chosen in batch["chosen"]]
        assert len(set(keys[split])) == 150
    assert keys["attack"] == keys["clean"]
    assert texts["attack"] == texts["clean"]
