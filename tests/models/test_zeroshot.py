import os
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from PIL import Image

from tests.conftest import ROOT
from tests.shard_maker import write_shard
from tests.small_models import photos, small_encoder
from utils.data.sources import hub_set
from utils.errors import UserError
from utils.methods.losses import class_logits
from utils.models import zeroshot
from utils.models.classifiers import LinearClassifier
from utils.models.published import load_model
from utils.models.zeroshot import class_embeddings, predictions
from utils.sets.labelled import (
    find_classes,
    imagenet_prompts,
    interpretability_templates,
    open_set,
    read_classnames,
    read_templates,
)

NAMES = ["cat", "dog", "fire truck"]


def test_one_template_gives_clips_own_logits(small_clip):
    clip, processor = load_model(str(small_clip))
    images = (photos(4) * 255).round().byte()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    prompts = [f"a photo of a {name}." for name in NAMES]
    inputs = processor(text=prompts, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = clip(**inputs).logits_per_image
        embeds = class_embeddings(clip, processor, NAMES, ["a photo of a {c}."])
        found = class_logits(small_encoder(small_clip)(images.float() / 255), embeds, float(clip.logit_scale.exp()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_class_embedding_is_the_unit_mean_over_templates(small_clip, monkeypatch):
    clip, processor = load_model(str(small_clip))
    templates = ["a photo of a {c}.", "a drawing of the {c}", "{c}"]
    single = [class_embeddings(clip, processor, NAMES, [template]) for template in templates]
    mean = torch.stack(single).mean(0)
    monkeypatch.setattr(zeroshot, "TEXTS_AT_ONCE", 2)
    found = class_embeddings(clip, processor, NAMES, templates)
    torch.testing.assert_close(found, mean / mean.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))


def test_predictions_do_not_depend_on_the_batch_size_and_attacks_lower_them(small_clip):
    clip, processor = load_model(str(small_clip))
    encoder, embeds = small_encoder(small_clip), class_embeddings(clip, processor, NAMES, ["{c}"])
    images = (photos(24) * 255).round().byte()
    with torch.no_grad():
        labels = class_logits(encoder(images.float() / 255), embeds, 1.0).argmax(-1)
    labels[0] = (labels[0] + 1) % 3  # one that is wrong from the start

    def batches(size):
        for first in range(0, 24, size):
            positions = torch.arange(first, min(24, first + size))
            keys = list(map(str, positions.tolist()))
            yield {"images": images[positions], "labels": labels[positions], "positions": positions, "keys": keys}

    device, classifier = torch.device("cpu"), LinearClassifier(embeds, scale=10.0, normalise=True)
    positions, correct = predictions(encoder, batches(24), classifier, device=device)
    assert positions.tolist() == list(range(24))
    assert correct.tolist() == [False] + [True] * 23
    attacked = [predictions(encoder, batches(size), classifier, device=device, eps=8 / 255) for size in (24, 7, 1)]
    empty = {"images": images[:0], "labels": labels[:0], "positions": torch.arange(0), "keys": []}
    positions, correct = predictions(encoder, [empty, *batches(24), empty], classifier, device=device, eps=8 / 255)
    assert positions.tolist() == list(range(24))
    assert correct.equal(attacked[0][1])
    assert attacked[0][1].sum() < 23
    assert all(attacked[0][1].equal(other) for _, other in attacked[1:])


def test_class_files_are_found_beside_the_shards_or_above(tmp_path):
    shard = str(tmp_path / "set" / "test" / "0.tar")
    (tmp_path / "set" / "test").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--eval_shards: no classnames.txt beside .*0.tar or one folder up"):
        find_classes([shard], None, "--eval_shards")
    (tmp_path / "set" / "classnames.txt").write_text("cat\ndog\n\n")
    assert find_classes([shard], None, "--eval_shards") == (["cat", "dog"], ["a photo of a {c}."])
    (tmp_path / "set" / "zeroshot_classification_templates.txt").write_text("one {c}\n\ntwo {c}\n")
    assert find_classes([shard], None, "--eval_shards") == (["cat", "dog"], ["one {c}", "two {c}"])
    (tmp_path / "set" / "test" / "classnames.txt").write_text("bird\n")
    assert find_classes([shard], None, "--eval_shards") == (["bird"], ["a photo of a {c}."])
    other = tmp_path / "other.txt"
    other.write_text("fish\n")
    assert find_classes([shard], str(other), "--eval_shards")[0] == ["fish"]


def test_odd_class_files_are_refused(tmp_path):
    file = tmp_path / "names.txt"
    with pytest.raises(UserError, match="no such file"):
        read_classnames(file)
    file.write_text("\n\n")
    with pytest.raises(UserError, match="holds no class names"):
        read_classnames(file)
    file.write_text("cat\n\ndog\n")
    with pytest.raises(UserError, match="line 2 is empty"):
        read_classnames(file)
    file.write_text("a photo of a cat\n")
    with pytest.raises(UserError, match=r"has no \{c\}"):
        read_templates(file)


def test_imagenet_prompts_are_clips():
    names, templates = imagenet_prompts()
    assert (len(names), names[0], names[999]) == (1000, "tench", "toilet paper")
    assert (names[134], names[517]) == ("crane bird", "construction crane")  # as the CLIP paper tells cranes apart
    assert [name for name, count in Counter(names).items() if count > 1] == [
        "missile",
        "sunglasses",
    ]  # as in the source
    assert len(set(templates)) == len(templates) == 80
    assert (templates[0], templates[79]) == ("a bad photo of a {c}.", "a tattoo of the {c}.")
    assert all(template.count("{c}") == 1 for template in templates)
    licence = (ROOT / "utils" / "prompts" / "LICENCE.md").read_text()
    assert "Copyright (c) 2021 OpenAI" in licence
    assert "The above copyright notice and this permission notice shall be included" in licence


def test_interpretability_templates_are_150_captions_of_our_own():
    templates = interpretability_templates()
    plain = {template.lower().strip(" .!?") for template in templates}
    assert len(plain) == len(templates) == 150
    assert not plain & {template.lower().strip(" .!?") for template in imagenet_prompts()[1]}
    assert all(template.count("{c}") == 1 and template.count("{") == 1 for template in templates)
    assert all(template.isascii() and template == template.strip() for template in templates)


def test_the_word_imagenet_stands_for_its_names_unless_a_file_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    assert find_classes(["set/0.tar"], "imagenet", "--data") == imagenet_prompts()
    with pytest.raises(UserError, match="ImageNet: no such file"):
        find_classes(["set/0.tar"], "ImageNet", "--data")
    with pytest.raises(UserError, match=r"name one with --classnames \(--classnames imagenet: CLIP's names"):
        find_classes(["set/0.tar"], None, "--data")
    (tmp_path / "imagenet").write_text("cat\n")
    assert find_classes(["set/0.tar"], "imagenet", "--data")[0] == ["cat"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one set of a test split; ``hub.error`` is raised instead where it is set."""
    folder = tmp_path / "snapshot"
    for name in ("train/nshards.txt", "test/nshards.txt", "test/0.tar", "classnames.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1")

    class Hub:
        error: BaseException | None = None
        asked: dict = {}  # noqa: RUF012

    def snapshot_download(repo_id, **options):
        Hub.asked = {"repo_id": repo_id} | options
        if Hub.error is not None:
            raise Hub.error
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return Hub


def test_a_set_on_the_hub_is_brought_here_split_by_split(hub, tmp_path):
    assert hub_set("clip-benchmark/wds_cifar10", "test") == tmp_path / "snapshot"
    assert hub.asked == {
        "repo_id": "clip-benchmark/wds_cifar10",
        "repo_type": "dataset",
        "allow_patterns": ["*.txt", "test/*"],
        "cache_dir": None,
        "local_files_only": False,
    }
    hub_set("clip-benchmark/wds_vtab/dtd/", "test", str(tmp_path))
    assert hub.asked["repo_id"] == "clip-benchmark/wds_vtab-dtd"
    assert hub.asked["cache_dir"] == tmp_path / "hub"
    with pytest.raises(
        UserError, match=r"^--data a/b: no split 'val' with .tar files in a/b on the hub; found test, train;"
    ):
        hub_set("a/b", "val")
    with pytest.raises(UserError, match=r"no split 'train' with .tar files in .*; found test; name one with --split"):
        hub_set("a/b", "train")


def http_error(kind, status):
    httpx = sys.modules[errors.HTTPError.__module__.partition(".")[0]]  # httpx, or what the hub's client uses by now
    request = httpx.Request("GET", "https://huggingface.co/api/datasets/a/b?token=secret")
    return kind(f"{status} Client Error for url: {request.url}", response=httpx.Response(status, request=request))


def unreachable():
    error = errors.LocalEntryNotFoundError(
        "An error happened while trying to locate the files on the Hub\nPlease check"
    )
    error.__cause__ = errors.HTTPError("[Errno 111] Connection refused")
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            lambda: http_error(errors.RepositoryNotFoundError, 404),
            "RepositoryNotFoundError .*; correct the path or the",
        ),
        (lambda: http_error(errors.GatedRepoError, 403), "GatedRepoError .*; accept its terms"),
        (lambda: http_error(errors.HfHubHTTPError, 503), "HfHubHTTPError .*; download it once with `hf download a/b "),
        (
            lambda: errors.OfflineModeIsEnabled("offline"),
            "HF_HUB_OFFLINE is set.; download it once with `hf download a/b ",
        ),
        (unreachable, "HTTPError .*Connection refused.*; download it once with"),
        (lambda: errors.HTTPError("proxy gone"), "proxy gone.; download it once"),
        (lambda: OSError(28, "No space left on device"), "No space left.*; download it once"),
        (lambda: ConnectionError("reset by peer"), "reset by peer.; download it once"),
    ],
)
def test_what_keeps_a_set_on_the_hub_is_said_in_one_line(hub, error, expected):
    hub.error = error()
    with pytest.raises(
        UserError, match=f"^--data a/b: no such directory, and neither the cache nor the hub .* of a/b .*{expected}"
    ) as caught:
        hub_set("a/b", "test")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_names_that_cannot_be_on_the_hub_are_not_asked_for(hub):
    for name in ("cifar10", "./data/cifar10", "/data/cifar10", "~/cifar10", "a//b", "a/b c", "../b", "a/"):
        with pytest.raises(UserError, match=r"no such directory, and no name on the hub; expected a local data set or"):
            hub_set(name, "test")
    assert hub.asked == {}


def test_offline_a_cached_set_is_read_and_an_absent_one_named(tmp_path):
    cached = tmp_path / "hub" / "datasets--clip-benchmark--wds_cifar10"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40) / "test").mkdir(parents=True)
    (cached / "snapshots" / ("0" * 40) / "test" / "0.tar").write_text("")
    program = """
from utils.errors import UserError
from utils.data.sources import hub_set
for name in ("clip-benchmark/wds_cifar10", "clip-benchmark/wds_cars"):
    try:
        print(hub_set(name, "test"))
    except UserError as error:
        print(error)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment = {
        name: value for name, value in environment.items() if name not in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    }
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, env=environment)
    found, refused = result.stdout.splitlines()
    assert Path(found) == cached / "snapshots" / ("0" * 40)
    assert refused == (
        "--data clip-benchmark/wds_cars: no such directory, and neither the cache nor the hub gives out the test/ of "
        "clip-benchmark/wds_cars (HF_HUB_OFFLINE is set); download it once with `hf download clip-benchmark/wds_cars "
        "--repo-type dataset --local-dir data/wds_cars` where there is internet and give that folder, or "
        "bring everything before, by the same command with --prefetch true where there is internet"
    )


def test_sets_whose_lists_differ_are_not_read_by_the_first(tmp_path):
    """Labels of a second set were read by the names of the first (dmvr#6)."""
    shards = [write_shard(tmp_path / name / "train/0.tar", [("0", {"png": b""})]) for name in ("a", "b", "c")]
    for name, names in (("a", "cat\ndog\n"), ("b", "cat\ndog"), ("c/train", "dog\ncat\n")):
        (tmp_path / name / "classnames.txt").write_text(names)
    assert find_classes(shards[:2], None, "--train_shards")[0] == ["cat", "dog"]
    with pytest.raises(UserError, match=r"a/classnames.txt and .*c/train/classnames.txt are not the same"):
        find_classes(shards, None, "--train_shards")
    assert find_classes(shards, str(tmp_path / "b/classnames.txt"), "--train_shards")[0] == ["cat", "dog"]


def test_names_are_composed_and_two_of_one_name_are_said(tmp_path, caplog):
    """A list in NFD is that in NFC; ImageNet's own has two pairs, so that it is a warning (CuPL#2)."""
    composed = unicodedata.normalize("NFC", "café")
    (tmp_path / "classnames.txt").write_text(f"{unicodedata.normalize('NFD', 'café')}\nhot_dog\nowl\nHot  dog\n")
    assert read_classnames(tmp_path / "classnames.txt")[0] == composed
    write_shard(tmp_path / "test/0.tar", [("0", {"png": b"", "cls": b"0"})])
    options = {"flag": "--data", "with_classes": True, "cache_dir": str(tmp_path / "cache")}
    open_set([str(tmp_path / "test")], **options)
    assert "classes 1 'hot_dog' and 3 'Hot  dog' have one name" in caplog.text
    open_set([str(tmp_path / "test")], classnames="imagenet", **options)
    assert "836 'sunglasses' and 837 'sunglasses'" in caplog.text
