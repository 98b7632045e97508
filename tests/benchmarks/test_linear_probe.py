"""benchmarks/linear_probe.py: both fits answer alike, on its own sets and on kept features."""

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import linear_probe
from utils.errors import UserError
from utils.models.features import write_features


def table(tmp_path, monkeypatch, *words):
    """The rows of the table, by heading."""
    output_dir = tmp_path / "bench"
    common = ["--rounds", "1", "--device", "cpu", "--output_dir", str(output_dir)]
    monkeypatch.setattr("sys.argv", ["linear_probe.py", *common, *map(str, words)])
    linear_probe.main()
    lines = (output_dir / "table.md").read_text().splitlines()
    heading, _, *rows = [line.strip("|").split("|") for line in lines]
    return [{name.strip(): value.strip() for name, value in zip(heading, row)} for row in rows]


def test_both_fits_answer_alike(tmp_path, monkeypatch):
    clusters = ["--clusters_images", 1500, "--clusters_dim", 30, "--clusters_classes", 5]
    rows = table(tmp_path, monkeypatch, *clusters, "--tolerance", 0.1, 1e-3)
    assert [row["fit"] for row in rows] == ["here, 0.1", "here, 0.001", "scikit-learn"] * 2
    assert [row["features"] for row in rows[::3]] == ["digits: 1438 x 64, 10 classes", "clusters: 1200 x 30, 5 classes"]
    for rough, here, sklearn in (rows[:3], rows[3:]):
        low, high = map(float, here["accuracy, %"].split("[")[1].rstrip("]").split(", "))
        assert low < float(sklearn["accuracy, %"].split(" ")[0]) < high
        assert float(here["answers off, %"]) < 1
        assert 0 <= float(here["loss above"]) < 0.002
        assert float(here["loss above"]) < float(rough["loss above"])
        assert 0 < int(rough["iterations"]) < int(here["iterations"]) < 60


def test_features_of_a_file_are_compared(tmp_path, monkeypatch):
    torch.manual_seed(0)
    labels = torch.arange(120) % 4
    labels[labels == 2] = 3  # no row of one class
    write_features(tmp_path / "kept.safetensors", torch.randn(120, 6) + labels[:, None], labels, "")
    rows = table(tmp_path, monkeypatch, "--features", tmp_path / "kept.safetensors")
    assert [row["features"] for row in rows] == ["kept: 96 x 6, 4 classes"] * 2
    assert {row["answers off, %"] for row in rows} == {"0.00"}
    save_file({"features": torch.zeros(2, 2)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"--features \S+odd.safetensors: cannot be used \(.labels.\); expected"):
        table(tmp_path, monkeypatch, "--features", tmp_path / "odd.safetensors")
