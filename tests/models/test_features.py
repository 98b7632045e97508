"""Embeddings of labelled images in a file: read back as written, or not at all."""

import pytest
import torch
from safetensors.torch import save_file

from utils.errors import UserError
from utils.models.features import read_features, write_features


def test_features_are_read_as_written_and_only_for_what_they_are(tmp_path, caplog):
    embeds, labels, path = torch.randn(5, 3), torch.tensor([0, 2, 1, 2, 0]), tmp_path / "\udcff" / "kept.safetensors"
    assert read_features(path, "model a", 3) is None
    write_features(path, embeds, labels, "model a")
    found = read_features(path, "model a", 3)
    assert found is not None
    assert found[0].equal(embeds)
    assert found[1].equal(labels)
    assert not caplog.records
    assert read_features(path, "model b", 3) is None
    assert read_features(path, "model a", 4) is None
    assert [record.message.split("(")[-1] for record in caplog.records] == [
        "of another model, set or transform); the images are embedded again",
        "5, 3) and 5 labels, expected dimension 4); the images are embedded again",
    ]


@pytest.mark.parametrize(
    "tensors",
    [
        {"features": torch.zeros(5, 3)},
        {"features": torch.zeros(5, 3), "labels": torch.zeros(4, dtype=torch.int64)},
        {"features": torch.zeros(5, 3).half(), "labels": torch.zeros(5, dtype=torch.int64)},
        {"features": torch.zeros(5, 3), "labels": torch.zeros(5)},
        {"features": torch.zeros(5), "labels": torch.zeros(5, dtype=torch.int64)},
        None,
    ],
)
def test_odd_files_are_not_read(tmp_path, caplog, tensors):
    path = tmp_path / "kept.safetensors"
    if tensors is None:
        path.write_bytes(b"not tensors at all")
    else:
        save_file(tensors, path, metadata={"identity": "model a"})
    assert read_features(path, "model a", 3) is None
    assert "kept features that cannot be used" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "features").write_text("a file")
    with pytest.raises(UserError, match=r"features/kept.safetensors: cannot be written \(.*\); mend that, then give"):
        write_features(tmp_path / "features/kept.safetensors", torch.zeros(2, 3), torch.zeros(2), "model a")
    assert [path.name for path in tmp_path.iterdir()] == ["features"]
