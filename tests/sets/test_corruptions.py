"""Corruptions: the package's own, one seed an image whoever reads it; the published files, read as they are."""

import hashlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from tests.shard_maker import NUM_CLASSES, image_bytes, labelled_samples, write_shard
from utils.data.images import ImageTransform, decode
from utils.data.shards import ShardDataset, eval_loader, index_shards
from utils.data.skipped import SkipCounter, count_skipped
from utils.errors import UserError
from utils.sets.corruptions import (
    CORRUPTIONS,
    KNOWN,
    SEVERITIES,
    CorruptedDataset,
    corrupt,
    corruption_seed,
    find_published,
    require_package,
    warm_up,
)

TRANSFORM = ImageTransform(48, (48, 48))


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip("imagecorruptions", reason="needs the extra imagecorruptions-imaug")


def picture(seed, size=48):
    return decode(image_bytes(seed, (size, size), "PNG"), ImageTransform(None, None))


def read(data, *, num_samples=1000, batch_size=4, world_size=1, num_workers=0):
    """position -> (key, label, pixels), put together from the loaders of every rank, and the counters of the ranks."""
    found, counters, lengths = {}, [], set()
    for rank in range(world_size):
        skips = SkipCounter(data.index, 0.5, report=None)
        loader = eval_loader(
            data,
            num_samples=num_samples,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        )
        batches = list(count_skipped(loader, skips))
        counters.append(skips)
        lengths.add(len(batches))
        for batch in batches:
            assert batch["images"].dtype == torch.uint8
            assert batch["images"].shape[1:] == (3, *data.transform.output_size)  # also of an empty batch
            rows = zip(batch["positions"].tolist(), batch["keys"], batch["labels"].tolist(), batch["images"])
            for position, key, label, image in rows:
                assert position not in found
                found[position] = (key, label, image.numpy().tobytes())
    assert len(lengths) == 1  # unequal numbers would hang the collectives
    return found, counters


# ---------------------------------------------------------------------------------------------------- made on the fly


def test_names_are_those_of_the_package(package):
    assert list(CORRUPTIONS) == package.get_corruption_names("common")
    assert list(KNOWN) == package.get_corruption_names("all")


@pytest.mark.parametrize("name", KNOWN)
def test_pixels_are_those_of_the_package(package, name):
    image, seed = picture(1), 1234567
    before = image.clone()
    np.random.seed(seed)
    expected = package.corrupt(
        image.permute(1, 2, 0).numpy().copy(),
        3,
        name,
        **({"seed": seed} if name in ("impulse_noise", "glass_blur") else {}),
    )
    found = corrupt(image, name, 3, seed)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert torch.equal(found, torch.tensor(expected).permute(2, 0, 1))
    assert torch.equal(image, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_changes_the_image_and_more_so_at_severity_5(package, name):
    change = dict.fromkeys((1, 5), 0.0)
    for number in range(4):
        image = picture(number)
        for severity in change:
            found = corrupt(image, name, severity, number)
            assert found.shape == image.shape
            assert not torch.equal(found, image)
            change[severity] += (found.double() - image.double()).abs().mean().item()
    assert change[5] > change[1] > 0


# These draw nothing: the seed makes no difference.
FIXED = (
    "defocus_blur", "zoom_blur", "brightness", "contrast",
    "pixelate", "jpeg_compression", "gaussian_blur", "saturate",
)  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_only_the_seed_counts(package, name):
    image = picture(2)
    first = corrupt(image, name, 2, 7)
    np.random.seed(99)
    state = np.random.get_state()
    assert torch.equal(corrupt(image, name, 2, 7), first)
    after = np.random.get_state()
    assert np.array_equal(state[1], after[1])
    assert state[2:] == after[2:]
    assert torch.equal(corrupt(image, name, 2, 8), first) == (name in FIXED)


def digest():
    """Of one image under all corruptions, for the comparison of processes."""
    found = hashlib.sha256()
    for number, name in enumerate(KNOWN):
        found.update(corrupt(picture(number), name, 3, number).numpy().tobytes())
    return found.hexdigest()


def test_another_process_gives_the_same_pixels(package):
    """A fresh one, in which the import happens inside: that may not touch numpy's random state either."""
    code = (
        "import numpy as np; from tests.sets.test_corruptions import digest; np.random.seed(3); found = digest(); "
        "print(found, np.random.rand() == np.random.RandomState(3).rand())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": "5"}
    )
    assert result.stdout.split() == [digest(), "True"], result.stderr


def test_wide_and_high_images(package):
    for shape in [(3, 33, 70), (3, 70, 33)]:
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        for name in KNOWN:
            assert corrupt(image, name, 5, 0).shape == shape


def test_what_cannot_be_corrupted_is_an_error():
    image = torch.zeros(3, 48, 48, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"--attack corruptions: images of 28 px; .* at least 32 px"):
        corrupt(image[:, :28], "fog", 1, 0)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    for use in (require_package, lambda: warm_up("fog", 1), lambda: corrupt(picture(0), "fog", 1, 0)):
        with pytest.raises(UserError, match="pip install imagecorruptions-imaug") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_seeds_differ_in_every_part():
    parts = [
        *[(0, "fog", 1, 0, 0), (1, "fog", 1, 0, 0), (0, "snow", 1, 0, 0), (0, "fog", 2, 0, 0)],
        *[(0, "fog", 1, 1, 0), (0, "fog", 1, 0, 1), (0, "fog", 1, 1, 11), (0, "fog", 1, 11, 1)],
    ]
    seeds = [corruption_seed(*each) for each in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seeds == [corruption_seed(*each) for each in parts]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    paths = [
        write_shard(folder / f"{shard}.tar", labelled_samples(shard, size, (60, 50)))
        for shard, size in enumerate([4, 0, 7])
    ]
    return index_shards(paths, cache_dir=folder / "cache")


def corrupted(index, name="gaussian_noise", severity=3, seed=0, transform=TRANSFORM):
    return CorruptedDataset(index, transform, corruption=name, severity=severity, seed=seed, num_classes=NUM_CLASSES)


@pytest.mark.parametrize("name", ["gaussian_noise", "glass_blur", "motion_blur", "frost"])
def test_a_corrupted_set_is_the_same_for_any_batch_size_and_number_of_processes_and_workers(package, index, name):
    clean = ShardDataset(index, TRANSFORM, order="sequential", with_labels=True, num_classes=NUM_CLASSES)
    expected = {}
    for position, (key, label, pixels) in read(clean)[0].items():
        image = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(3, 48, 48)
        shard, sample = (0, position) if position < 4 else (2, position - 4)
        seed = corruption_seed(0, name, 3, shard, sample)
        expected[position] = (key, label, corrupt(image, name, 3, seed).numpy().tobytes())
    assert len(expected) == 11
    data = corrupted(index, name)
    for batch_size, world_size, num_workers in [(4, 1, 0), (1, 1, 0), (3, 2, 0), (5, 1, 2)]:
        np.random.seed(batch_size)
        found, _ = read(data, batch_size=batch_size, world_size=world_size, num_workers=num_workers)
        assert found == expected, (batch_size, world_size, num_workers)
    copy = pickle.loads(pickle.dumps(data))
    assert copy[0, 3, 3]["image"].numpy().tobytes() == expected[3][2]


def test_seed_and_severity_of_a_set_count(package, index):
    first, second, third = (
        corrupted(index, severity=severity, seed=seed)[0, 0, 0]["image"] for severity, seed in [(1, 0), (2, 0), (1, 1)]
    )
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)


def test_workers_find_the_compiled_code(package, index):
    from imagecorruptions import corruptions

    compiled = corruptions._shuffle_pixels_njit_glass_blur
    for severity in SEVERITIES:
        data = corrupted(index, "glass_blur", severity)
        before = list(compiled.signatures)
        data[0, 0, 0]
        assert compiled.signatures == before, severity


def test_a_broken_image_is_recorded_before_it_is_corrupted(package, tmp_path):
    samples = labelled_samples(0, 3, (60, 50))
    samples[1][1]["jpg"] = samples[1][1]["jpg"][:100]
    path = write_shard(tmp_path / "0.tar", samples)
    data = corrupted(index_shards([path], cache_dir=tmp_path / "cache"))
    found, (skips,) = read(data)
    assert sorted(found) == [0, 2]
    assert skips.summary().startswith("undecodable image: 1 samples")


@pytest.mark.parametrize(
    "transform", [ImageTransform(28, (28, 28)), ImageTransform((28, 40), None), ImageTransform(28, None)]
)
def test_small_images_are_refused_before_anything_is_read(index, transform):
    with pytest.raises(UserError, match=r"^--attack corruptions: images of 28 px; .* at least 32 px$"):
        corrupted(index, transform=transform)


# ----------------------------------------------------------------------------------------------------- published files


def cifar_c(folder, each=7, names=("gaussian_noise", "fog")):
    """A CIFAR-C folder in which all pixels of an image tell corruption, severity and position."""
    folder.mkdir(exist_ok=True)
    labels = np.arange(each) % 3
    np.save(folder / "labels.npy", np.tile(labels, 5))
    for number, name in enumerate(names):
        values = np.array([100 * number + 20 * severity + slot for severity in range(5) for slot in range(each)])
        pixels = values.astype(np.uint8)[:, None, None, None]
        np.save(folder / f"{name}.npy", np.broadcast_to(pixels, (5 * each, 32, 32, 3)))
    return folder


def imagenet_c(folder, places=("noise/gaussian_noise", "fog"), severities=SEVERITIES):
    """ImageNet-C with three classes; pixels tell corruption, severity and the image's number."""
    for number, place in enumerate(places):
        for severity in severities:
            for image in range(7):
                name = ("n03", "n01", "n02")[image % 3]
                path = folder / place / str(severity) / name / f"ILSVRC2012_val_{image:08d}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                value = 100 * number + 20 * (severity - 1) + image
                Image.new("RGB", (40, 40), (value, value, value)).save(path, "PNG")  # exact pixels
    return folder


@pytest.fixture(params=["arrays", "folders"])
def published_folder(request, tmp_path):
    return cifar_c(tmp_path / "c") if request.param == "arrays" else imagenet_c(tmp_path / "c")


def test_published_images_come_with_their_labels_severity_by_severity(published_folder):
    published = find_published(published_folder)
    assert published.corruptions == ["gaussian_noise", "fog"]
    assert published.num_classes == 3
    arrays = published.labels is not None
    for number, name in enumerate(published.corruptions):
        for severity in SEVERITIES:
            data = published.dataset(TRANSFORM, name, severity)
            assert len(data) == data.index.num_samples == 7
            found, (skips,) = read(data)
            # Of the class folders n03, n01, n02, in turn, the ranks are 2, 0, 1.
            assert [found[slot][1] for slot in range(7)] == [(slot + (0 if arrays else 2)) % 3 for slot in range(7)]
            assert skips.summary() == ""
            for slot in range(7):
                value = 100 * number + 20 * (severity - 1) + slot
                assert found[slot][2] == bytes([value]) * (3 * 48 * 48)
            keys = [found[slot][0] for slot in range(7)]
            assert keys[1] == ("00001" if arrays else "n01/ILSVRC2012_val_00000001.JPEG")
            assert len(set(keys)) == 7


@pytest.mark.parametrize("num_workers", [0, 2])
def test_published_images_are_read_once_over_all_ranks(published_folder, num_workers):
    data = find_published(published_folder).dataset(TRANSFORM, "fog", 4)
    expected, _ = read(data)
    for num_samples, batch_size, world_size in [(1000, 2, 2), (5, 2, 2), (3, 8, 2)]:
        found, counters = read(
            data, num_samples=num_samples, batch_size=batch_size, world_size=world_size, num_workers=num_workers
        )
        assert found == {slot: row for slot, row in expected.items() if slot < num_samples}
        merged = counters[0].merge([counter.state() for counter in counters])
        assert merged.seen == min(num_samples, 7)
        assert merged.bad_fraction == 0
    assert pickle.loads(pickle.dumps(data))[0, 2, 2]["label"] == expected[2][1]
    assert len(pickle.dumps(data)) < 5000  # the pixels stay where they are


@pytest.mark.parametrize("size", [(40, 30), (28, 28)])
def test_published_images_take_the_model_s_transform(tmp_path, size):
    """No package is needed for them, nor its smallest size."""
    noise = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    cifar_c(tmp_path, each=2, names=["frost"])
    np.save(tmp_path / "frost.npy", noise)
    transform = ImageTransform(min(size), size)
    item = find_published(tmp_path).dataset(transform, "frost", 2)[0, 1, 1]
    assert torch.equal(item["image"], transform(Image.fromarray(noise[3])))


def test_broken_published_files_are_skipped_and_counted(tmp_path):
    folder = imagenet_c(tmp_path) / "fog" / "2"
    broken = folder / "n01" / "ILSVRC2012_val_00000001.JPEG"
    gone = folder / "n02" / "ILSVRC2012_val_00000002.JPEG"
    broken.write_bytes(image_bytes(0)[:100])
    (folder / "n01" / "._ILSVRC2012_val_00000001.JPEG").write_bytes(b"left by another system")
    (folder / "n01" / "notes.txt").write_text("no image")
    data = find_published(tmp_path).dataset(TRANSFORM, "fog", 2)
    gone.unlink()  # after the listing
    item = data[0, 1, 1]
    assert (item["image"], item["position"], item["key"]) == (None, 1, str(broken))
    found, (skips,) = read(data)
    assert sorted(found) == [0, 3, 4, 5, 6]
    records = {kind: where for kind, where, *_ in skips.state()["records"]}
    assert records == {"undecodable image": str(broken), "missing image": str(gone)}
    assert skips.bad_fraction == 2 / 7
    found, _ = read(data, batch_size=1, num_samples=2)  # with an empty batch
    assert sorted(found) == [0]


def test_a_systems_own_folders_are_no_classes(tmp_path, caplog):
    """Of the kind of @eaDir: labels of all classes behind it were one too high."""
    folder = imagenet_c(tmp_path)
    expected = [find_published(folder).dataset(TRANSFORM, "fog", 1)[0, slot, slot]["label"] for slot in range(7)]
    for place in ("noise/gaussian_noise", "fog"):
        for severity in SEVERITIES:
            (folder / place / str(severity) / "@eaDir").mkdir()
    (folder / "fog/1/n01/x.HEIC").write_bytes(b"")
    published = find_published(folder)
    assert published.num_classes == 3
    assert [published.dataset(TRANSFORM, "fog", 1)[0, slot, slot]["label"] for slot in range(7)] == expected
    assert "not taken: 1 .heic files (n01/x.HEIC)" in caplog.text


def test_an_array_that_has_gone_is_counted_too(tmp_path):
    data = find_published(cifar_c(tmp_path)).dataset(TRANSFORM, "fog", 2)
    (tmp_path / "fog.npy").unlink()
    item = data[0, 1, 1]
    assert item["image"] is None
    assert item["skipped"][0].kind == "missing image"
    assert item["skipped"][0].where == f"{tmp_path / 'fog.npy'}#8"


def test_other_folders_are_none_of_it(tmp_path):
    assert find_published(tmp_path) is None
    assert find_published(tmp_path / "nothing") is None
    write_shard(tmp_path / "test" / "0.tar", labelled_samples(0, 1))
    (tmp_path / "fog").mkdir()
    np.save(tmp_path / "labels.npy", np.zeros(5, dtype=np.int64))
    assert find_published(tmp_path) is None


def wrong_array(name, make):
    def spoil(folder):
        array = make(np.load(folder / name))
        np.save(folder / name, array, allow_pickle=True)

    return spoil


def packed(name):
    def spoil(folder):
        stream = io.BytesIO()
        np.savez(stream, np.zeros(3))
        (folder / name).write_bytes(stream.getvalue())

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_array("fog.npy", lambda a: a[:-1]),
         r"fog.npy: uint8 \(34, 32, 32, 3\); expected uint8 \(5 \* n, 32, 32, 3\)"),
        (wrong_array("fog.npy", lambda a: a.transpose(0, 3, 1, 2)), r"fog.npy: uint8 \(35, 3, 32, 32\); expected"),
        (wrong_array("fog.npy", lambda a: a[..., 0]), r"fog.npy: uint8 \(35, 32, 32\); expected"),
        (wrong_array("fog.npy", lambda a: a / 255),
         r"fog.npy: float64 \(35, 32, 32, 3\); expected .* take it out of the"),
        (wrong_array("fog.npy", lambda a: a.astype(object)),
         r"fog.npy: cannot be read as an array \(ValueError.*[oO]bject"),
        (lambda folder: (folder / "fog.npy").write_bytes(b""),
         r"fog.npy: cannot be read as an array .* download it again"),
        (lambda folder: (folder / "fog.npy").write_bytes(pickle.dumps([1])), "fog.npy: cannot be read as an array"),
        (lambda folder: (folder / "fog.npy").write_bytes(b"PK\x03\x04"), "fog.npy: cannot be read as an array"),
        (packed("fog.npy"), "fog.npy: an archive of arrays; expected uint8"),
        (lambda folder: os.truncate(folder / "fog.npy", 5000),
         "fog.npy: cannot be read as an array .* download it again"),
        (wrong_array("labels.npy", lambda a: a[:7]), r"labels.npy: int64 \(7,\); expected whole numbers \(5 \* n,\)"),
        (wrong_array("labels.npy", lambda a: a[:10]), "labels.npy: 10 labels, gaussian_noise.npy holds 35 images"),
        (wrong_array("labels.npy", lambda a: a.astype(float)), r"labels.npy: float64 \(35,\); expected whole numbers"),
        (wrong_array("labels.npy", lambda a: a[:, None]), r"labels.npy: int64 \(35, 1\); expected whole numbers"),
        (wrong_array("labels.npy", lambda a: a - 1), "labels.npy: label -1; expected whole numbers"),
        (wrong_array("labels.npy", lambda a: a.astype(object)), r"labels.npy: cannot be read as an array \(ValueError"),
        (lambda folder: (folder / "labels.npy").unlink(), "labels.npy: missing; expected whole numbers"),
    ],
)  # fmt: skip
def test_wrong_arrays_are_one_line_that_names_the_file(tmp_path, spoil, message):
    spoil(cifar_c(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        find_published(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_pickled_objects_are_never_loaded(tmp_path):
    """A pickle runs what it says when it is loaded."""

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    for name in ("fog.npy", "labels.npy"):
        np.save(cifar_c(tmp_path) / name, np.array([Trap()] * 35), allow_pickle=True)
        with pytest.raises(UserError, match=f"{name}: cannot be read as an array"):
            find_published(tmp_path)
    assert not (tmp_path / "sprung").exists()


def remove_class(folder):
    for file in (folder / "fog" / "3" / "n02").iterdir():
        file.unlink()
    (folder / "fog" / "3" / "n02").rmdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_class, "fog/3: no class folder n02, which .*/noise/gaussian_noise/1 holds; expected the same classes"),
        (lambda f: (f / "fog" / "3" / "n09").mkdir(),
         "noise/gaussian_noise/1: no class folder n09, which .*/fog/3 holds"),
        (lambda f: (f / "weather" / "fog" / "1").mkdir(parents=True),
         "/fog and .*/weather/fog: both hold fog; .* remove"),
        (lambda f: (f / "weather" / "snow" / "1").mkdir(parents=True), "weather/snow/1: no class folders; expected"),
    ],
)  # fmt: skip
def test_wrong_folders_are_one_line_that_names_the_folder(tmp_path, spoil, message):
    spoil(imagenet_c(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        find_published(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(published_folder):
    published = find_published(published_folder)
    for use in (
        lambda *cell: published.digest(*cell, None, None),
        lambda *cell: published.dataset(TRANSFORM, *cell),
    ):
        with pytest.raises(UserError, match="c: no snow; found gaussian_noise, fog; add its files or leave it out"):
            use("snow", 1)
        with pytest.raises(UserError, match="no severity 0; found 1, 2, 3, 4, 5; unpack"):
            use("fog", 0)


def test_a_missing_severity_and_an_empty_one_are_named(tmp_path):
    published = find_published(imagenet_c(tmp_path, severities=(1, 3)))
    with pytest.raises(UserError, match="fog: no severity 2; found 1, 3; unpack its archive again or leave it out"):
        published.dataset(TRANSFORM, "fog", 2)
    for file in (tmp_path / "fog" / "3").glob("*/*"):
        file.unlink()
    with pytest.raises(UserError, match=r"fog/3: no images; expected <class folder>/\*.JPEG; unpack"):
        published.dataset(TRANSFORM, "fog", 3)
