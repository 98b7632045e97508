"""How users name a model: by its folder or the file in it, with hf-hub: before each part."""

import shutil

import pytest
import torch

from tests.published_layouts import FARE, LEAF, save_layouts
from utils.models.hub import load
from utils.models.published import model_name


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    return save_layouts(tmp_path_factory.mktemp("published"))


def test_weights_named_by_their_file_have_the_tokenizer_of_their_open_clip_folder(layouts):
    folder = layouts[FARE].path
    (_, by_folder), (_, by_file) = load(folder, "--model"), load(f"{folder}/open_clip_model.safetensors", "--model")
    assert by_file.tokenizer.get_vocab() == by_folder.tokenizer.get_vocab()
    other = model_name(f"{folder}/open_clip_model.safetensors", processor=layouts[LEAF].processor)
    assert load(other, "--model")[1].tokenizer.name_or_path == folder


def test_hf_hub_stands_before_a_base_model_and_a_processor_too(layouts, tmp_path):
    """Of a base model in both layouts, the prefix chooses that of open_clip. Here transformers' weights are others."""
    both = shutil.copytree(layouts[LEAF].path, tmp_path / "both")
    shutil.copytree(layouts[FARE].path, both, dirs_exist_ok=True)
    tower, processor = layouts["robustvlm_visual"].path, layouts[LEAF].processor

    def texts(name):
        return load(name, "--model")[0].get_parameter("text_projection.weight")

    expected = texts(f"{tower}@{layouts[FARE].path}")
    assert torch.equal(texts(f"{tower}@hf-hub:{both}"), expected)
    assert torch.equal(texts(model_name(tower, f"hf-hub:{both}", f"hf-hub:{processor}")), expected)
    assert not torch.equal(texts(model_name(tower, str(both), processor)), expected)
