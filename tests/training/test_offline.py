"""Runs on nodes without internet: what --prefetch brings, what is used offline, who downloads, one tracker run."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import CLIPTokenizer

import evaluate
import train_lore
import train_po
from examples.pretrain_small_clip import make_tokenizer
from tests.conftest import ROOT, flags, free_port
from tests.published_layouts import CLIPS, FARE, LEAF, OPENAI, clip_state, hub_config, write_json
from tests.shard_maker import ShardServer, image_bytes, make_shards
from utils.data import sources as shard_sources
from utils.data.sources import expand_shards, read_text
from utils.errors import UserError
from utils.models.hub import find_config, find_model, small_files, weight_names
from utils.models.open_clip import CLIP_VOCABULARY
from utils.models.published import CLIP_TOKENIZER, Layout, load_model, model_name, save_model
from utils.processes.distributed import everywhere
from utils.processes.tracker import start_tracker

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # of whatever the server has
WEIGHTS = f"/org/clip/resolve/{COMMIT}/model.safetensors"


@pytest.fixture
def server(tmp_path, small_clip):
    """A web server that is also the hub, with the model org/clip and the data set org/name of 5 classes."""
    folder = tmp_path / "served"
    shutil.copytree(small_clip, folder / "org/clip")
    (folder / "org/clip/pytorch_model.bin").write_bytes(b"the same weights in another format")
    make_shards(folder / "train", [6, 6], sizes_json=True)
    make_shards(folder / "test", [5])
    (folder / "classnames.txt").write_text("\n".join("abcde"))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    with ShardServer(folder) as running:
        publish(running, "models", "org/clip", folder / "org/clip")
        publish(running, "datasets", "org/name", folder, leaving=folder / "org")
        yield running


def publish(server, kind, repo, folder, leaving=None):
    """The hub's answers about a repository whose files the server has."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and leaving not in path.parents]
    names = [str(path.relative_to(folder)) for path in paths]
    about = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
    server.replies[f"/api/{kind}/{repo}"] = server.replies[f"/api/{kind}/{repo}/revision/main"] = about
    tree = [{"type": "file", "path": name, "size": os.path.getsize(folder / name), "oid": "0"} for name in names]
    server.replies[f"/api/{kind}/{repo}/tree/{COMMIT}"] = tree
    for split in {name.split("/")[0] for name in names if "/" in name}:
        inside = [entry for entry in tree if entry["path"].startswith(f"{split}/")]
        server.replies[f"/api/{kind}/{repo}/tree/main/{split}"] = inside


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """``server`` stands for the hub in this process. ``hub(offline=True)`` sets HF_HUB_OFFLINE and stops it."""
    from huggingface_hub import constants

    monkeypatch.setattr(shard_sources, "RETRY_DELAY", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def switch(offline=False, stop=True, home="home"):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / home / "hub"))
        if offline and stop:
            server.__exit__()

    switch()
    return switch


def large_downloads(server):
    """Path -> downloads, of weights and shards."""
    return {path: n for path, n in server.requests.items() if path.endswith((".safetensors", ".bin", ".pt", ".tar"))}


def command(tmp_path, train, evaluated, **changes):
    settings = {
        "model_name_or_path": "org/clip",
        "train_shards": train,
        "eval_shards": evaluated,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_workers": 0,
        "report_to": "none",
        "cache_dir": tmp_path / "cache",
        "output_dir": tmp_path / "run",
    } | changes
    return flags({name: value for name, value in settings.items() if value != []})


@pytest.mark.parametrize(("script", "more"), [(train_lore, {"attack_steps": 1}), (train_po, {"trainable": "head"})])
def test_a_prefetched_run_works_without_any_network(script, more, hub, server, tmp_path, capsys):
    """Model, listing, sizes.json, class names, templates and shards, from the hub and from a web server."""
    words = command(tmp_path, "hf://datasets/org/name/train", f"{server.url}/test/{{0..0}}.tar", **more)
    script.main([*words, "--prefetch", "true"])
    said = capsys.readouterr().out
    assert re.search(
        r"^prefetched: org/clip, .* GB, in .*/home/hub/.*; --train_shards: 12 samples in 2 shards; ", said, re.M
    )
    assert f"--cache_dir {tmp_path / 'cache'}, and with HF_HUB_OFFLINE=1 HF_HUB_CACHE={tmp_path / 'home/hub'}" in said
    assert not (tmp_path / "run").exists()
    hub_shards = [f"/datasets/org/name/resolve/main/train/{shard}.tar" for shard in (0, 1)]
    once = dict.fromkeys([WEIGHTS, *hub_shards, "/test/0.tar"], 1)
    assert large_downloads(server) == once
    script.main([*words, "--prefetch", "true"])
    assert large_downloads(server) == once  # what is there is not brought again

    server.requests.clear()
    hub(offline=True)
    script.main(words)
    last = (tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 2
    assert server.requests == {}


def test_a_prefetched_evaluation_works_without_any_network(hub, server, tmp_path, capsys):
    words = flags({"model": "org/clip", "data": "org/name", "num_workers": 0, "output_dir": tmp_path / "eval"})
    evaluate.main([*words, "--prefetch", "true"])
    assert "org/name: 5 samples in test, in " in capsys.readouterr().out
    assert large_downloads(server) == dict.fromkeys([WEIGHTS, f"/datasets/org/name/resolve/{COMMIT}/test/0.tar"], 1)
    hub(offline=True)
    evaluate.main(words)
    assert json.loads((tmp_path / "eval/results.json").read_text())["results"][0]["n"] == 5


def test_what_is_missing_offline_is_one_line_that_names_the_prefetch(hub, server, tmp_path):
    local = make_shards(tmp_path / "local", [8])
    in_hub = "hf://datasets/org/name/train"
    hub(offline=True)
    wrong = [
        (train_lore, command(tmp_path, local, []), r"--model_name_or_path org/clip: .*"),
        (train_lore, command(tmp_path, in_hub, []), r"--train_shards hf://.*/train: HF_HUB_OFFLINE is set; .*"),
        (
            train_lore,
            command(tmp_path, f"{in_hub}/0.tar", []),
            r"--train_shards: .*lacks 1 of 1 shards, the first is hf.*",
        ),
        (train_lore, command(tmp_path, f"{server.url}/train/0.tar", []), r"http.*sizes.json: cannot be reached .*"),
        (
            evaluate,
            flags({"model": "org/clip", "data": "org/name", "output_dir": tmp_path / "run"}),
            r"--model org/clip: .*",
        ),
    ]
    for script, words, message in wrong:
        with pytest.raises(UserError, match=f"^{message}--prefetch true where there is internet") as caught:
            script.main(words)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run/metrics.jsonl").exists()


def test_an_unreachable_hub_is_as_good_as_offline(hub, server, tmp_path, caplog, monkeypatch):
    """Without HF_HUB_OFFLINE too: kept listings and files are used, with a word in the log."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's client waits 23 s in all before it gives up
    pattern = "hf://datasets/org/name/train/*.tar"
    found = expand_shards([pattern], cache_dir=tmp_path / "cache")
    folder = find_model("org/clip", "--model")
    server.__exit__()
    assert expand_shards([pattern], cache_dir=tmp_path / "cache") == found
    assert "its 2 shards are those listed 20" in caplog.text
    assert find_model("org/clip", "--model") == folder
    assert "org/clip: nothing comes from the hub" in caplog.text
    with pytest.raises(UserError, match=r"the hub does not list it .*--prefetch true where there is internet"):
        expand_shards(["hf://datasets/org/name/test"], cache_dir=tmp_path / "other")


def test_a_listing_follows_the_hub_while_it_answers(hub, server, tmp_path):
    listing = server.replies["/api/datasets/org/name/tree/main/train"]
    pattern, cache = ["hf://datasets/org/name/train"], tmp_path / "cache"
    assert len(expand_shards(pattern, cache_dir=cache)) == 2
    listing.append(listing[0] | {"path": "train/2.tar"})
    longer = expand_shards(pattern, cache_dir=cache)
    assert len(longer) == 3
    del server.replies["/api/datasets/org/name/tree/main/train"]  # deleted: not to be hidden by what was kept
    with pytest.raises(UserError, match="the hub does not list it"):
        expand_shards(pattern, cache_dir=cache)
    hub(offline=True)
    assert expand_shards(pattern, cache_dir=cache) == longer


def test_texts_are_fresh_while_their_server_answers(hub, server, tmp_path, caplog):
    names, nothing = f"{server.url}/names.txt", f"{server.url}/nothing.txt"
    file = server.folder / "names.txt"
    for text in ("one", "two"):
        file.write_text(text)
        assert read_text(names, tmp_path) == text
        assert read_text(nothing, tmp_path) is None
    server.statuses["/names.txt"] = [403]  # a proxy's answer to everything is no news of the file
    assert read_text(names, tmp_path) == "two"
    assert "names.txt: cannot be reached (HTTP status 403); taken the copy of 20" in caplog.text
    hub(offline=True)
    assert read_text(names, tmp_path) == "two"
    assert read_text(nothing, tmp_path) is None  # known to be absent
    with pytest.raises(UserError, match="cannot be reached"):
        read_text(f"{server.url}/other.txt", tmp_path)


def test_a_text_that_is_gone_is_gone(hub, server, tmp_path):
    file = server.folder / "names.txt"
    file.write_text("one")
    assert read_text(f"{server.url}/names.txt", tmp_path) == "one"
    file.unlink()
    assert read_text(f"{server.url}/names.txt", tmp_path) is None
    hub(offline=True)
    assert read_text(f"{server.url}/names.txt", tmp_path) is None


def test_shards_that_do_not_fit_or_are_not_there_end_the_prefetch_before_it_downloads(hub, server, tmp_path):
    size = (server.folder / "train/0.tar").stat().st_size
    wanted = [f"{server.url}/train/{number}.tar" for number in (0, 1)]
    words = command(tmp_path, wanted, [], prefetch="true")
    with pytest.raises(
        UserError, match=r"--cache_limit_gb 3.*e-05: the 2 shards of this run take 4.* GB; .*: raise it"
    ):
        train_lore.main([*words, "--cache_limit_gb", str(1.5 * size / 1e9)])
    with pytest.raises(
        UserError, match=r"--prefetch: 1 of 3 shards cannot be had, the first is .*/9.tar \(HTTP status 404"
    ):
        train_lore.main(command(tmp_path, [*wanted, f"{server.url}/train/9.tar"], [], prefetch="true"))
    assert large_downloads(server) == {}
    train_lore.main([*words, "--cache_limit_gb", str(2.5 * size / 1e9)])
    assert len(large_downloads(server)) == 3


def test_an_interrupted_prefetch_goes_on(hub, server, tmp_path):
    server.statuses["/train/1.tar"] = [200] + [503] * 8  # its size, then no answer
    words = command(tmp_path, f"{server.url}/train/{{0..1}}.tar", [], prefetch="true")
    with pytest.raises(
        UserError, match=r"1 of 2 shards cannot be had, .*/1.tar \(.*503.*; start it again: what is there"
    ):
        train_lore.main(words)
    server.statuses.clear()
    before = dict(server.requests)
    train_lore.main(words)
    assert server.requests["/train/0.tar"] == before["/train/0.tar"] == 1
    assert server.requests[WEIGHTS] == 1


def test_the_copies_of_a_full_cache_are_kept_for_the_run(hub, server, tmp_path):
    """Older copies of other runs make room, not those of this run that were there before."""
    size = (server.folder / "train/0.tar").stat().st_size
    other = make_shards(server.folder / "other", [6, 6])
    limit = ["--cache_limit_gb", str(2.5 * size / 1e9)]
    train_lore.main([*command(tmp_path, f"{server.url}/train/0.tar", [], prefetch="true"), *limit])
    assert Path(other[0]).stat().st_size == size
    train_lore.main([*command(tmp_path, f"{server.url}/other/0.tar", [], prefetch="true"), *limit])
    for copy in (tmp_path / "cache/shards").iterdir():  # both long unused, the run's own longer
        unused = 1000 if copy.name.endswith("-0.tar") else 2000
        os.utime(copy, (unused, copy.stat().st_mtime))
    train_lore.main([*command(tmp_path, f"{server.url}/train/{{0..1}}.tar", [], prefetch="true"), *limit])
    assert server.requests["/train/0.tar"] == server.requests["/train/1.tar"] == 1


def test_one_format_of_the_weights_is_brought():
    rest = [
        "config.json",
        "merges.txt",
        "preprocessor_config.json",
        "README.md",
        "onnx/model.safetensors",
        "tf_model.h5",
    ]
    kept = ["config.json", "merges.txt", "preprocessor_config.json"]
    found = Layout("transformers", "config.json")
    assert small_files(["pytorch_model.bin", "model.safetensors", *rest]) == kept
    assert weight_names(found, ["pytorch_model.bin", "model.safetensors", *rest]) == ["model.safetensors"]
    assert weight_names(found, ["pytorch_model.bin", *rest]) == ["pytorch_model.bin"]
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    assert weight_names(found, [*parts, index, "pytorch_model.bin"]) == parts
    assert small_files([*parts, index]) == [index]
    of_open_clip = Layout("open_clip", "open_clip_model.safetensors")
    both = [of_open_clip.file, "open_clip_pytorch_model.bin", "model.safetensors", *rest]
    assert weight_names(of_open_clip, both) == [of_open_clip.file]


def test_half_a_model_is_not_taken_for_one(hub, server):
    folder = Path(find_model("org/clip", "--model").path)
    (folder / "model.safetensors").unlink()
    hub(offline=True)
    with pytest.raises(
        UserError, match=r"^--model org/clip: .*lacks its weights of it, and HF_HUB_OFFLINE is set; .* bring"
    ):
        find_model("org/clip", "--model")


def test_a_model_that_is_no_clip_is_refused_before_its_weights_come(hub, server):
    (server.folder / "org/clip/config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="--model org/clip: model type 'bert'; supported: clip"):
        find_model("org/clip", "--model")
    assert large_downloads(server) == {}


# ----------------------------------------------------------------------------------- models in the layouts of open_clip


@pytest.fixture
def published(server, layouts):
    """The hub has org/fare, an open_clip model in two formats, and org/tower, an image tower that belongs to it."""
    fare, tower = server.folder / "org/fare", server.folder / "org/tower"
    shutil.copytree(layouts[FARE].path, fare)
    (fare / "open_clip_pytorch_model.bin").write_bytes(b"the same weights in another format")
    tower.mkdir()
    shutil.copy(layouts["robustvlm_visual"].path, tower)
    for folder in (fare, tower):
        publish(server, "models", f"org/{folder.name}", folder)
    return server


def weights_of(name, file):
    return f"/org/{name}/resolve/{COMMIT}/{file}"


FARE_WEIGHTS, TOWER_WEIGHTS = weights_of("fare", "open_clip_model.safetensors"), weights_of("tower", "fare_eps_2.pt")


def equal_models(one, two):
    tensors = two.state_dict()
    return all(torch.equal(tensor, tensors[name]) for name, tensor in one.state_dict().items())


def test_prefetched_open_clip_models_evaluate_without_any_network(hub, published, layouts, tmp_path, capsys):
    """An id in open_clip's layout; the same, to be taken so; an image tower that an id of the hub completes."""
    ids = ["org/fare", "hf-hub:org/fare", "org/tower@org/fare"]
    words = flags({"model": ids, "data": "org/name", "num_workers": 0, "output_dir": tmp_path / "eval"})
    evaluate.main([*words, "--prefetch", "true"])
    said = capsys.readouterr().out
    for name in ("org/fare", "org/tower"):
        assert re.search(rf"{name}, \S+ GB, in \S+/home/hub/", said)
    shard = f"/datasets/org/name/resolve/{COMMIT}/test/0.tar"
    assert large_downloads(published) == dict.fromkeys([FARE_WEIGHTS, TOWER_WEIGHTS, shard], 1)
    published.requests.clear()
    hub(offline=True)
    evaluate.main(words)
    assert published.requests == {}
    cells = json.loads((tmp_path / "eval/results.json").read_text())["results"]
    assert [(cell["model"], cell["n"]) for cell in cells] == [(name, 5) for name in ids]
    revisions = [cell["settings"]["model_revision"] for cell in cells]
    assert revisions[0] == revisions[1] == COMMIT != revisions[2]
    for name, local in zip(ids[1:], (FARE, "robustvlm_visual")):
        at = layouts[local]
        expected, _ = load_model(model_name(at.path, at.base_model))
        found, _ = load_model(find_model(name, "--model"))
        assert equal_models(found, expected)


def test_a_prefetched_image_tower_trains_without_any_network(hub, published, tmp_path):
    shards = make_shards(tmp_path / "local", [8])
    names = {"model_name_or_path": "org/tower", "base_model": "org/fare", "max_steps": 1, "export": "open_clip"}
    words = command(tmp_path, shards, [], attack_steps=1, constraint="none", **names)
    train_lore.main([*words, "--prefetch", "true"])
    assert large_downloads(published) == dict.fromkeys([FARE_WEIGHTS, TOWER_WEIGHTS], 1)
    hub(offline=True)
    train_lore.main(words)
    assert {"model.safetensors", "open_clip_model.safetensors"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert "base_model: org/tower\n" in (tmp_path / "run/README.md").read_text()


def test_a_base_model_gives_its_weights_only_to_an_image_tower(hub, published, layouts):
    """A checkpoint of all weights needs the base's config and processor alone."""
    whole = published.folder / "org/whole"
    whole.mkdir()
    torch.save({"state_dict": layouts[FARE].state}, whole / "epoch_5.pt")
    publish(published, "models", "org/whole", whole)
    _, config = find_config("org/whole@org/fare", "--model")
    assert config.model_type == "clip"
    local = str(whole / "epoch_5.pt")
    for name in ("org/whole@org/fare", f"{local}@org/fare"):
        find_config(name, "--model")
        assert FARE_WEIGHTS not in large_downloads(published)
        model, _ = load_model(find_model(name, "--model"))
        assert model.config.text_config.hidden_act == "quick_gelu"
    assert large_downloads(published) == {weights_of("whole", "epoch_5.pt"): 1}
    tower = f"{layouts['robustvlm_visual'].path}@org/fare"
    find_config(tower, "--model")
    assert FARE_WEIGHTS not in large_downloads(published)
    find_model(tower, "--model")
    assert large_downloads(published)[FARE_WEIGHTS] == 1


def test_a_repository_of_nothing_but_all_weights(hub, published, layouts):
    """OpenAI's say by their shapes what they are, which shows only when they are there."""
    (published.folder / "org/openai").mkdir()
    shutil.copy(layouts[OPENAI].path, published.folder / "org/openai")
    publish(published, "models", "org/openai", published.folder / "org/openai")
    name = model_name("org/openai", processor=layouts[LEAF].processor)
    assert find_config(name, "--model")[1] is None
    assert large_downloads(published) == {}
    expected, _ = load_model(model_name(layouts[OPENAI].path, processor=layouts[LEAF].processor))
    assert equal_models(load_model(find_model(name, "--model"))[0], expected)
    tower = f"{layouts['robustvlm_visual'].path}@org/openai"  # as a base they are brought for what they say
    assert find_config(tower, "--model")[1] is None
    with pytest.raises(UserError, match=r"fare_eps_2.pt@org/openai: holds no tokenizer"):
        load_model(find_model(tower, "--model"))


def test_of_a_repository_in_both_layouts_the_weights_of_one_are_brought(hub, published, layouts):
    both = published.folder / "org/both"
    shutil.copytree(published.folder / "org/fare", both)
    model, processor = load_model(layouts[FARE].path)
    model.logit_scale.data.fill_(1.0)
    save_model(both, model, processor, {})
    publish(published, "models", "org/both", both)
    found = find_model("org/both", "--model")
    assert large_downloads(published) == {weights_of("both", "model.safetensors"): 1}
    assert load_model(found)[0].logit_scale == 1.0
    found = find_model("hf-hub:org/both", "--model")
    assert large_downloads(published) == dict.fromkeys(
        [weights_of("both", "model.safetensors"), weights_of("both", "open_clip_model.safetensors")], 1
    )
    assert load_model(found)[0].logit_scale == layouts[FARE].state["logit_scale"]


def test_no_weights_come_for_models_that_are_refused_by_their_configs(hub, published):
    config = published.folder / "org/fare/open_clip_config.json"
    fields = json.loads(config.read_text())
    fields["model_cfg"]["text_cfg"]["pool_type"] = "last"
    config.write_text(json.dumps(fields))
    for name, flag in (("org/fare", "--model org/fare"), ("org/tower@org/fare", "--base_model org/fare")):
        with pytest.raises(UserError, match=f"^{flag}: open_clip_config.json: text_cfg.pool_type is 'last'"):
            find_model(name, "--model")
    (published.folder / "org/clip/config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(UserError, match=r"^--base_model org/clip: model type 'siglip'; supported: clip, vision"):
        find_model("org/tower@org/clip", "--model")
    for name, flag in (("org/none", "--model"), ("hf-hub:org/none", "--model"), ("org/tower@org/none", "--base_model")):
        with pytest.raises(UserError, match=rf"^{flag} org/none: neither .* nor a model that the hub gives out"):
            find_model(name, "--model")
    assert large_downloads(published) == {}


def test_what_completes_a_model_is_missing_offline_in_one_line(hub, published, layouts):
    find_model("org/tower@org/fare", "--model")
    hub(offline=True)
    wrong = {
        ("org/tower@org/clip", None): "--base_model org/clip: .*lacks config.json of it",
        ("org/other@org/fare", None): "--model org/other: .*lacks config.json of it",
        (layouts[LEAF].path, "org/processor"): "--processor org/processor: .*lacks config.json of it",
    }
    for (name, processor), message in wrong.items():
        with pytest.raises(UserError, match=rf"^{message}, and HF_HUB_OFFLINE is set; .*--prefetch true") as caught:
            find_model(model_name(name, processor=processor), "--model")
        assert "\n" not in str(caught.value)
    found = find_model("org/tower@org/fare", "--model")
    assert Path(found.base_model).parts[-1] == COMMIT
    load_model(found)


def tokenizer_of_clips_size():
    """A small vocabulary with names between its merges and its start of text, up to 49,408."""
    small = make_tokenizer(["a photo of a cat"], vocab_size=600)
    known = sorted(small.get_vocab(), key=small.get_vocab().get)
    more = [f"<{number}>" for number in range(CLIP_VOCABULARY - len(known))]
    vocabulary = {token: place for place, token in enumerate([*known[:-2], *more, *known[-2:]])}
    merges = [tuple(pair) for pair in json.loads(small.backend_tokenizer.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


@pytest.fixture
def without_tokenizer(tmp_path):
    """An open_clip model with OpenAI's vocabulary of 49,408, and no tokenizer beside it."""
    folder = tmp_path / "without_tokenizer"
    folder.mkdir()
    sizes = CLIPS[FARE]
    save_file(clip_state(sizes, CLIP_VOCABULARY, seed=0), folder / "open_clip_model.safetensors")
    write_json(folder / "open_clip_config.json", hub_config(sizes, CLIP_VOCABULARY))
    return str(folder)


def test_clips_own_tokenizer_comes_from_the_hub(hub, server, without_tokenizer, tmp_path, capsys):
    """And no weights with it. Where nothing brings it, a line says what to do; --processor and own files go first."""
    missing = (
        rf"^--model {without_tokenizer}: holds no tokenizer, and CLIP's own cannot be had \(.*{CLIP_TOKENIZER}: .*"
    )
    advice = r"\); name a directory that holds it by --processor$"
    with pytest.raises(UserError, match=missing + "the hub gives out.*" + advice):
        find_model(without_tokenizer, "--model")
    openai = server.folder / CLIP_TOKENIZER
    shutil.copytree(server.folder / "org/clip", openai)
    (openai / "tokenizer.json").unlink()
    tokenizer_of_clips_size().save_pretrained(openai)
    publish(server, "models", CLIP_TOKENIZER, openai)
    hub(offline=True, stop=False)
    with pytest.raises(UserError, match=missing + "HF_HUB_OFFLINE is set.*" + advice):
        find_model(without_tokenizer, "--model")
    hub()
    words = [
        "--model",
        without_tokenizer,
        "--data",
        "org/name",
        "--num_workers",
        "0",
        "--output_dir",
        tmp_path / "eval",
    ]
    evaluate.main([*map(str, words), "--prefetch", "true"])
    assert re.search(rf"{CLIP_TOKENIZER}, \S+ GB, in \S+/home/hub/", capsys.readouterr().out)
    assert not [path for path in large_downloads(server) if not path.endswith(".tar")]
    hub(offline=True)
    evaluate.main([str(word) for word in words])
    found = find_model(without_tokenizer, "--model")
    assert load_model(found)[1].tokenizer.eos_token_id == CLIP_VOCABULARY - 1
    assert find_model(model_name(without_tokenizer, processor=str(openai)), "--model").tokenizer is None
    shutil.copy(openai / "tokenizer.json", without_tokenizer)
    assert find_model(without_tokenizer, "--model").tokenizer is None


# ------------------------------------------------------------------------------------------------------- several nodes

NODE_SCRIPT = """
import json, os, sys
import evaluate
from pathlib import Path
from utils.cli import parse_settings
from utils.errors import UserError
from utils.processes.distributed import everywhere, start_accelerator
from utils.models.published import load_model
from utils.models.hub import fetch_model, folder_on_every_node, on_this_node
from utils.data.shards import ShardIndex, ShardReader

accelerator = start_accelerator()
rank = accelerator.process_index
names = [fetch_model(accelerator, name, "--model") for name in ("org/clip", "org/tower@org/fare")]
everywhere(accelerator, lambda: [load_model(name) for name in names])
folders = [names[0].path, names[1].path, names[1].base_model]
cache = os.environ["NODE_CACHE"]
words = ["--model", "org/clip", "--data", "org/name", "--cache_dir", cache, "--output_dir", "x"]
settings = parse_settings(evaluate.Settings, words)
index = evaluate.open_everywhere(settings, accelerator, "org/name").splits["test"].index
pictures = evaluate.open_everywhere(settings, accelerator, sys.argv[1]).splits["attack"].index
read = [ShardReader(of_set).read(0, 0)[0] for of_set in (index, pictures)]
urls = index.urls + pictures.urls

def only_on_rank_1():
    if rank == 1:
        raise UserError("this node's disk is full")

errors = []
for wrong in (
    lambda: fetch_model(accelerator, "org/none", "--model"),
    lambda: everywhere(accelerator, only_on_rank_1),
    lambda: folder_on_every_node(accelerator, lambda local: Path(f"/versions/{rank}"), "--data org/name"),
    lambda: on_this_node(
        accelerator, ShardIndex(["hf://datasets/a/b/0.tar"], [1], [], cache), [cache], "--eval_shards"
    ),
):
    try:
        wrong()
    except UserError as error:
        errors.append(str(error))
print(json.dumps({"folders": folders, "urls": urls, "cache_dir": index.cache_dir, "read": read, "errors": errors}))
accelerator.end_training()
"""


def two_ranks(server, tmp_path, homes, local_ranks, offline=False):
    """NODE_SCRIPT on two processes of one group, with a cache each or the same; what each of them found."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "HF_"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "no_proxy": "127.0.0.1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "HF_ENDPOINT": server.url}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": str(int(offline))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", NODE_SCRIPT, str(tmp_path / "pictures")],
            env=environment
            | {"RANK": str(rank), "LOCAL_RANK": str(local_ranks[rank])}
            | {"HF_HOME": str(tmp_path / homes[rank]), "NODE_CACHE": str(tmp_path / homes[rank] / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, complaints) in zip(processes, outputs):
        assert process.returncode == 0, complaints
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.mark.slow
def test_the_first_process_of_every_node_downloads(published, tmp_path):
    server, weights = published, [WEIGHTS, FARE_WEIGHTS, TOWER_WEIGHTS]
    shard = f"/datasets/org/name/resolve/{COMMIT}/test/0.tar"
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/label=cat_text=dog.jpg").write_bytes(image_bytes(0))
    nodes = two_ranks(server, tmp_path, ["node0", "node1"], [0, 0])
    assert large_downloads(server) == dict.fromkeys([*weights, shard], 2)
    for rank, found in enumerate(nodes):  # each has its own copies
        home = str(tmp_path / f"node{rank}")
        assert all(folder.startswith(home) for folder in found["folders"])
        assert found["urls"][0].startswith(f"{home}/cache/hub/")
        assert found["urls"][1].startswith(f"{home}/cache/pair_folders/")
        assert found["cache_dir"] == f"{home}/cache"
        assert found["read"] == ["s000-00000", "label=cat_text=dog"]
    assert nodes[0]["errors"] == nodes[1]["errors"]
    unknown, full, different = nodes[0]["errors"]
    assert unknown.startswith("--model org/none: neither a local model directory nor a model that the hub gives out")
    assert full == "this node's disk is full"
    assert different.startswith("--data org/name: the nodes have different versions in their caches (0, 1)")

    server.requests.clear()
    offline = two_ranks(server, tmp_path, ["node0", "node1"], [0, 0], offline=True)
    assert server.requests == {}
    assert [found["folders"] for found in offline] == [found["folders"] for found in nodes]
    assert offline[0]["errors"] == offline[1]["errors"]
    assert re.match(
        "--eval_shards: HF_HUB_OFFLINE is set and --cache_dir .* lacks 1 of 1 shards", offline[0]["errors"][3]
    )
    two_ranks(server, tmp_path, ["shared", "shared"], [0, 1])
    assert large_downloads(server) == dict.fromkeys([*weights, shard], 1)


def test_an_error_of_one_process_is_raised_on_all(monkeypatch):
    """The collective is played: this process made something, another one has failed."""
    monkeypatch.setattr(
        "utils.processes.distributed.gather_objects", lambda accelerator, line: [line, "--model x: broken"]
    )
    with pytest.raises(UserError, match=r"^--model x: broken$"):
        everywhere(Accelerator(cpu=True), lambda: "made")


# -------------------------------------------------------------------------------------------------------- tracker runs


class FakeAccelerator:
    def __init__(self, is_main_process=True):
        self.is_main_process, self.opened = is_main_process, []

    def init_trackers(self, project, config, init_kwargs):
        self.opened.append((project, config, init_kwargs))


def test_wandb_goes_on_with_the_run_it_started(tmp_path):
    ids = []
    for run in ("first", "first", "second"):
        (tmp_path / run).mkdir(exist_ok=True)
        main, other = FakeAccelerator(), FakeAccelerator(is_main_process=False)
        for accelerator in (main, other):
            start_tracker(accelerator, "wandb", "train_lore", {"eps": 4}, tmp_path / run, 7)
        ((project, config, options),) = main.opened
        assert (project, config["eps"]) == ("train_lore", "4")
        assert options["wandb"]["resume"] == "allow"
        assert options["wandb"]["id"] == json.loads((tmp_path / run / "run.json").read_text())["id"]
        ids.append(options["wandb"]["id"])
        assert other.opened[0][2] == {"wandb": {}}
        assert [path.name for path in (tmp_path / run).iterdir()] == ["run.json"]
    assert ids[0] == ids[1] != ids[2]


def test_tensorboard_shows_repeated_steps_once(tmp_path):
    for first_step, steps, value in ((0, range(1, 6), 1.0), (3, range(4, 8), 2.0)):
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
        start_tracker(accelerator, "tensorboard", "train_lore", {"eps": 4}, tmp_path, first_step)
        for step in steps:
            accelerator.log({"loss": value}, step=step)
        accelerator.end_training()
        time.sleep(1.1)  # the event files are named by the second
    files = sorted((tmp_path / "train_lore").glob("events.*"))
    assert len(files) == 2
    shown = shown_by_tensorboard(files)
    assert shown == {1: [1.0], 2: [1.0], 3: [1.0], 4: [2.0], 5: [2.0], 6: [2.0], 7: [2.0]}
    assert len(list((tmp_path / "train_lore").rglob("hparams.yml"))) == 1  # and not one more run per start


def shown_by_tensorboard(files):
    """Step -> losses: a START record takes back what its run had written from that step on, as TensorBoard does."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = {}
    for file in files:
        data, place = file.read_bytes(), 0
        while place < len(data):  # length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += length + 16
            if event.session_log.status == SessionLog.START:
                shown = {step: values for step, values in shown.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == "loss":
                    shown.setdefault(event.step, []).append(value.simple_value)
    return shown
