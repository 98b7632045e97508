"""Attributes of images: which of them are one group."""

import json
import unicodedata

from tests.shard_maker import image_bytes, write_shard
from utils.data.images import ImageTransform
from utils.data.shards import index_shards
from utils.sets.attributes import AttributeDataset


def test_two_ways_to_write_a_word_are_one_group(tmp_path):
    forms = [unicodedata.normalize(form, "mère") for form in ("NFC", "NFD")]
    texts = [*forms, f" {forms[1]} ", "  "]
    samples = [
        (str(n), {"jpg": image_bytes(n), "cls": b"0", "json": json.dumps({"attribute": text}).encode()})
        for n, text in enumerate(texts)
    ]
    shard = write_shard(tmp_path / "0.tar", samples)
    data = AttributeDataset(index_shards([shard], cache_dir=tmp_path), ImageTransform(8, (8, 8)), num_classes=1)
    items = [data[0, slot, slot] for slot in range(4)]
    assert [item.get("attribute") for item in items] == [forms[0]] * 3 + [None]
    assert [record.detail for record in items[3]["skipped"]] == ["attribute is empty, not a text"]
