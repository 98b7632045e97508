"""Files damaged at random: each ends in a declared error or a skipped sample, soon and in bounded memory.

The message of a failing test gives the mutant's target and seed. To see it again, and to try others:

    python -m tests.test_fuzz shard 1234          # one mutant
    python -m tests.test_fuzz all 0 20000         # the seeds 0 ... 19999 of every target
"""

from __future__ import annotations

import errno
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import evaluate
import train_lore
import train_po
from tests.mutations import mutate_bytes, mutate_image, mutate_json, mutate_lines, mutate_tar
from tests.shard_maker import image_bytes, make_shards, write_shard
from utils.cli import parse_settings
from utils.data.images import ImageError, ImageTransform, decode
from utils.data.shards import ShardDataset, ShardReader, index_shards
from utils.data.skipped import BadSample, SkipCounter
from utils.errors import UserError
from utils.evaluation.report import Results, page_content, record_figures
from utils.methods.head import load_head
from utils.models.classifiers import read_linear_head
from utils.sets.corruptions import find_published
from utils.sets.labelled import AttributeDataset, find_classes
from utils.sets.pairs import PairDataset, TypographicDataset, collate_rows, parse_pair
from utils.sets.typographic import Draws, WordStyle, merge_names, write_word
from utils.training.metrics import MetricsFile

DEADLINE = 20  # seconds of CPU time for one mutant, and ten times as many on the clock
MEMORY = 1.5  # GiB by which one mutant may raise the peak: an image at the limit of pixels takes most of that
TRANSFORM = ImageTransform(16, (16, 16))
CLASSES = ["tench", "English springer", "garbage truck", "French horn", "golf ball"]


class Overdue(BaseException):
    """No Exception, and no OSError as Python's own TimeoutError: what is read must not take it for damage."""


def deadline(number: int, frame: object) -> None:
    raise Overdue(f"a mutant takes more than {DEADLINE} s of CPU time, or ten times as long on the clock")


def images(draw: random.Random) -> bytes:
    """An image of every kind of file, small."""
    kind = draw.choice(("JPEG", "PNG", "WEBP", "GIF", "BMP", "palette", "alpha", "text", "animated"))
    if kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        return image_bytes(draw.randrange(3), (24, 20), kind)
    picture = Image.open(io.BytesIO(image_bytes(1, (24, 20), "PNG")))
    stream = io.BytesIO()
    if kind == "palette":
        picture.convert("P").save(stream, "PNG", transparency=3)
    elif kind == "alpha":
        picture.convert("RGBA").save(stream, draw.choice(("PNG", "WEBP")))
    elif kind == "animated":
        picture.save(stream, draw.choice(("GIF", "WEBP", "PNG")), save_all=True, append_images=[picture.rotate(90)])
    else:
        exif = Image.Exif()
        exif[0x010E] = "description"
        picture.save(stream, draw.choice(("PNG", "JPEG")), exif=exif, icc_profile=bytes(100))
    return stream.getvalue()


PAIR = json.dumps(
    {"chosen": "a cat", "rejected": ["a dog", "a cow"], "candidates": ["a cat", "a dog", "a cow", "x"], "reg": False}
).encode()
ATTRIBUTE = json.dumps({"attribute": "woman", "chosen": "a b", "rejected": "c d"}).encode()


def samples(draw: random.Random) -> list[tuple[str, dict[str, bytes]]]:
    """Five samples with all members there are, one of them changed in one member half of the time."""
    names = ("s-0", "folder/s-1", "label=cat_text=dog", "l" * 120 + "/" + "l" * 90, "ümläut")
    found = [
        (name, {"jpg": image_bytes(number), "cls": b"%d" % number, "json": (PAIR, ATTRIBUTE)[number % 2]})
        for number, name in enumerate(names)
    ]
    if draw.random() < 0.5:
        members = draw.choice(found)[1]
        which = draw.choice(sorted(members))
        members[which] = {"jpg": mutate_image, "cls": mutate_bytes, "json": mutate_json}[which](members[which], draw)
    return found


def check_items(data, folder: Path) -> None:
    """Every item is whole or skipped with texts that can be shown, stored and counted."""
    items = []
    counter = SkipCounter(data.index, 1.0, report=None)
    for slot in range(min(20, len(data))):
        item = data[0, slot, slot]
        counter.add(item["skipped"])
        for record in item["skipped"]:
            assert (record.where + record.detail).isprintable()
        item["key"].encode()
        if "rows" not in item and item.get("image") is not None:
            assert item["image"].shape == (3, 16, 16)
        items.append(item)
    data.collate_fn(items)
    counter.summary().encode()
    json.dumps(counter.state())


def fuzz_shard(draw: random.Random, folder: Path) -> None:
    path = Path(write_shard(folder / "0.tar", samples(draw), draw.choice((0, 1, 2))))
    if draw.random() < 0.8:
        path.write_bytes(mutate_tar(path.read_bytes(), draw))
    index = index_shards([str(path)], cache_dir=folder / "cache")
    again = index_shards([str(path)], cache_dir=folder / "cache")  # from the cache
    assert (index.sizes, index.skipped) == (again.sizes, again.skipped)
    reader = ShardReader(index)
    for sample in range(min(20, index.num_samples)):
        try:
            reader.read(0, sample)
        except BadSample:
            continue
    reader.close()
    labelled = {"order": "sequential", "with_labels": True, "num_classes": len(CLASSES)}
    check_items(ShardDataset(index, TRANSFORM, **labelled), folder)
    check_items(ShardDataset(index, TRANSFORM, order="sequential", with_labels=True), folder)
    check_items(PairDataset(index, TRANSFORM, order="sequential"), folder)
    check_items(AttributeDataset(index, TRANSFORM, num_classes=len(CLASSES)), folder)
    words = TypographicDataset(index, TRANSFORM, order="sequential", classnames=CLASSES, style=WordStyle())
    check_items(words, folder)
    shuffled = ShardDataset(index, TRANSFORM, order="shuffled", seed=draw.randrange(9))
    shuffled[0, 0, 0]


def fuzz_image(draw: random.Random, folder: Path) -> None:
    resize, crop = draw.choice(((16, (16, 16)), ((16, 16), None), (None, (16, 16))))
    transform = ImageTransform(resize, crop, draft=draw.random() < 0.3)
    assert decode(mutate_image(images(draw), draw), transform).shape == (3, 16, 16)


def fuzz_sizes(draw: random.Random, folder: Path) -> None:
    paths = make_shards(folder, [3, 2], sizes_json=True)
    sizes = folder / "sizes.json"
    sizes.write_bytes(mutate_json(sizes.read_bytes(), draw))
    index = index_shards(paths, cache_dir=folder / "cache")
    check_items(ShardDataset(index, TRANSFORM, order="sequential"), folder)
    ShardDataset(index, TRANSFORM, order="shuffled")[0, draw.randrange(index.num_samples), 0]


def fuzz_pair(draw: random.Random, folder: Path) -> None:
    row, _ = parse_pair(mutate_json(PAIR, draw), "key", "where")
    row.image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    collate_rows(
        [{"key": "key", "rows": [row], "position": 0, "skipped": []}], texts=None, no_images=row.image[None, :0]
    )


def fuzz_recipe(draw: random.Random, folder: Path) -> None:
    script = draw.choice((train_lore, train_po, evaluate))
    recipe = b"""# a recipe
model_name_or_path: openai/clip-vit-base-patch32
train_shards: [data/train, "data/{000..010}.tar", https://host/a.tar?token=b]
eps: 4.0
epochs: 2
compile: false
seed: 0
output_dir: runs/lore4
"""
    if script is evaluate:
        recipe = (
            b"model: [a, b]\ndata: data/set\nattack: [clean, apgd]\neps: [1, 2]\nt: [0, 0.5]\noutput_dir: runs/eval\n"
        )
    path = folder / "recipe.yaml"
    path.write_bytes(draw.choice((mutate_bytes(recipe, draw), mutate_lines(recipe, draw, mutate_bytes))))
    found = parse_settings(script.Settings, ["--config", str(path)])
    assert not getattr(found, "allow_pipe_urls", False)
    try:
        Path(found.output_dir).exists()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # that one becomes a line in ``utils.cli.run``
            raise


def fuzz_classnames(draw: random.Random, folder: Path) -> None:
    (folder / "0.tar").touch()
    names = "\n".join(CLASSES).encode()
    (folder / "classnames.txt").write_bytes(mutate_bytes(names, draw))
    templates = b"a photo of a {c}.\nart of {c}\n"
    (folder / "zeroshot_classification_templates.txt").write_bytes(mutate_bytes(templates, draw))
    names, templates = find_classes([str(folder / "0.tar")], None, "--data", str(folder / "cache"))
    assert all("{c}" in template for template in templates)
    words, _ = merge_names(names)
    for word in words[:6]:
        write_word(torch.zeros(3, 32, 48, dtype=torch.uint8), word, WordStyle(), Draws(0, word))


@cache
def results_folder() -> Path:
    """A directory as evaluate.py leaves it, small."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-results-"))
    results = Results(folder)
    for model, right in (("runs/a", [True, True, False]), ("runs/b", [True, False, False])):
        for attack, more in (
            ("clean", {}),
            ("apgd", {"eps": 4.0}),
            ("pgd", {"eps": 4.0}),
            ("gaussian_noise", {"sigma": 8.0}),
            ("corruptions", {"corruption": "fog", "severity": 3}),
        ):
            cell = {"model": model, "dataset": "data/set", "measure": "accuracy", "attack": attack, "seed": 0}
            cell |= dict.fromkeys(("eps", "sigma", "corruption", "severity")) | more
            cell["settings"] = {"split": "test", "model_revision": "1", "words": {"fonts": ["A"]}, "attack_steps": 10}
            rows = [
                {"position": n, "key": f"k{n}", "label": n, "predicted": 0, "correct": yes, "top5": [0, 1, 2, 3, 4]}
                | ({"broken_by": None, "forwards": 9} if attack == "apgd" else {})
                for n, yes in enumerate(right)
            ]
            results.add(cell, sum(right) / 3, (0.1, 0.9), 3)
            results.write_records(cell, rows)
            pictures = torch.full((1, 3, 8, 8), 0.5)
            caption = {"label": "a", "predicted_clean": "b", "predicted": "c"}
            results.write_pictures(cell, pictures, pictures + 0.01, [caption])
            results.warn(cell, "doubtful")
        fidelity = cell | {"measure": "fidelity", "attack": "clean", "corruption": None, "severity": None}
        results.add(fidelity, 0.2, None, 3)
        results.write_records(fidelity, [{"position": n, "value": 0.1 * n, "cosine": 0.9} for n in range(3)])
        head = fidelity | {"measure": "pair_accuracy", "settings": {"t": 0.5, "model_revision": "1"}}
        results.add(head, 0.5, (0.1, 0.9), 3)
    results.compare()
    results.write()
    return folder


def fuzz_results(draw: random.Random, folder: Path) -> None:
    shutil.copytree(results_folder(), folder / "eval")
    part = draw.choice(("results.json", "results.json", "records", "pictures"))
    if part == "results.json":
        path = folder / "eval" / part
        path.write_bytes(mutate_json(path.read_bytes(), draw))
    else:
        path = draw.choice(sorted((folder / "eval" / part).iterdir()))
        data = path.read_bytes()
        path.write_bytes(mutate_lines(data, draw, mutate_json) if part == "records" else mutate_bytes(data, draw))
    results = Results(folder / "eval")
    found = [result | record_figures(results.records(result)) for result in results.current()]
    results.compare()
    if results.results:
        undrawn: list[str] = []
        page_content(results, found, undrawn)
        assert all("(UserError " in line for line in undrawn), undrawn
    results.write()
    Results(folder / "eval")


def fuzz_metrics(draw: random.Random, folder: Path) -> None:
    rows = [{"step": step, "loss": 0.5, "eval_accuracy_clean": 0.1} for step in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = MetricsFile(folder / "metrics.jsonl")
    file.path.write_bytes(draw.choice((mutate_lines(text, draw, mutate_json), mutate_bytes(text, draw))))
    file.cut_back(2)
    assert all(row["step"] <= 2 for row in file.read())


def fuzz_tensors(draw: random.Random, folder: Path) -> None:
    """Heads, linear heads, and published corruptions."""
    eye = torch.eye(4)
    save_file(
        {"weight": eye, "visual_projection": torch.ones(4, 6), "text_projection": torch.ones(4, 5)},
        folder / "head.safetensors",
    )
    save_file({"weight": torch.ones(5, 4), "bias": torch.ones(5)}, folder / "linear", metadata={"normalise": "true"})
    published = folder / "CIFAR-10-C"
    published.mkdir()
    np.save(published / "labels.npy", np.tile(np.arange(2), 5))
    np.save(published / "fog.npy", np.zeros((10, 32, 32, 3), dtype=np.uint8))
    path = draw.choice(
        (folder / "head.safetensors", folder / "linear", published / "labels.npy", published / "fog.npy")
    )
    data = path.read_bytes()
    start = 8 if path.suffix != ".npy" and draw.random() < 0.5 else 0  # a JSON header, behind its length
    path.write_bytes(data[:start] + mutate_bytes(data[start : start + 400], draw) + data[start + 400 :])
    if path.name == "head.safetensors":
        assert load_head(folder)["weight"].ndim == 2
    elif path.name == "linear":
        read_linear_head(path, 4, 5)
    else:
        data = find_published(published).dataset(TRANSFORM, "fog", 3)
        assert all(data[0, slot, slot]["label"] < 1_000_000 for slot in range(min(2, len(data))))


TARGETS = {
    "shard": fuzz_shard,
    "image": fuzz_image,
    "sizes": fuzz_sizes,
    "pair": fuzz_pair,
    "recipe": fuzz_recipe,
    "classnames": fuzz_classnames,
    "results": fuzz_results,
    "metrics": fuzz_metrics,
    "tensors": fuzz_tensors,
}


def peak_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def check_mutant(target: str, seed: int) -> str:
    """Reads one mutant; what is not declared comes out. Returns the kind of end, "read" or an error's name."""
    before, outcome, line = peak_gib(), "read", ""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{target}-"))
    # CPU time, because a busy machine makes everything slow; the clock, because waiting takes none of it.
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, DEADLINE), (signal.ITIMER_REAL, signal.SIGALRM, 10 * DEADLINE))
    former = [signal.signal(kind, deadline) for _, kind, _ in timers]
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow says of many mutants that they are odd
            TARGETS[target](random.Random(f"{target} {seed}"), folder)
    except (UserError, BadSample, ImageError) as error:
        outcome, line = type(error).__name__, str(error) if isinstance(error, UserError) else ""
    except Overdue as error:
        raise AssertionError(str(error)) from error
    finally:
        for (timer, kind, _), handler in zip(timers, former):
            signal.setitimer(timer, 0)
            signal.signal(kind, handler)
        shutil.rmtree(folder)
    assert line.isprintable()
    assert len(line) < 4000
    assert peak_gib() - before < MEMORY, f"{peak_gib() - before:.2f} GiB more"
    return outcome


def check_mutants(target: str, seeds: range) -> None:
    """Explicit examples alone: what hypothesis draws, derandomised or not, changes with the project's sources."""

    @settings(phases=[Phase.explicit], deadline=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers())
    def read(seed):
        check_mutant(target, seed)

    for seed in seeds:
        read = example(seed=seed)(read)
    read()


@pytest.mark.parametrize("target", TARGETS)
def test_mutants_end_in_declared_errors(target):
    # A report takes half a second to make, everything else a hundredth: 204 mutants in all.
    check_mutants(target, range(12 if target == "results" else 24))


def test_the_mutant_that_ended_otherwise():
    """A corruption without a severity, found by chance."""
    check_mutants("results", range(1_173_556_680, 1_173_556_681))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_many_mutants_end_in_declared_errors(target):
    check_mutants(target, range(1000, 1112))


def main() -> None:
    target, *numbers = sys.argv[1:]
    seeds = range(int(numbers[0]), int(numbers[1])) if len(numbers) > 1 else [int(numbers[0])]
    for name in TARGETS if target == "all" else [target]:
        ends: dict[str, int] = {}
        clock, slowest = time.perf_counter(), 0.0
        for seed in seeds:
            started = time.perf_counter()
            try:
                end = check_mutant(name, seed)
            except Exception as error:
                if len(seeds) == 1:
                    raise
                end = f"UNDECLARED {type(error).__name__}"
                print(f"{name} {seed}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            ends[end] = ends.get(end, 0) + 1
            slowest = max(slowest, time.perf_counter() - started)
        seconds = time.perf_counter() - clock
        print(
            f"{name}: {len(seeds)} mutants, {seconds:.0f} s, the slowest {slowest:.1f} s, "
            f"peak {peak_gib():.2f} GiB, {ends}"
        )


if __name__ == "__main__":
    main()
