"""Images per second from shards to pixels: Hugging Face's image processor, this project, this project with drafts.

    python benchmarks/input_pipeline.py --output_dir runs/input-pipeline

Measures three things: CPU time to read, decode and resize to 224 pixels, on one core, in turns, with the same samples
and loader; images per second through ``train_batches`` by the number of data workers; and the fraction of time that
``train_lore.py`` waits for data. The images are made from a seed: 1/f noise with shapes in it, JPEG of quality 90. The
processor is used as users do, ``Image.open`` and a call, which gives normalised float32.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import statistics
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features
from transformers import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.comparison import in_parallel, launcher, markdown, print_table
from utils.cli import flag, parse_settings, required, run
from utils.data.images import ImageTransform
from utils.data.shards import Members, ShardDataset, ShardIndex, index_shards, train_batches
from utils.data.sources import expand_shards
from utils.errors import UserError
from utils.model_card import versions
from utils.processes.distributed import default_num_workers
from utils.training.metrics import MetricsFile

PROCESSOR, EXACT, DRAFT = "Hugging Face", "here", "here, --jpeg_draft"
WARM_UP = 2  # rounds that are not counted


data_flag, measure_flag = partial(flag, group="data"), partial(flag, group="measure")


@dataclass
class Settings:
    image_sizes: list[str] = data_flag(
        ["32x32", "64x64", "500x375", "2048x1536"], "width x height of the images that are made"
    )
    data: str | None = data_flag(None, "a directory of .tar shards to read in place of made images", path=True)
    seed: int = data_flag(0, "of the images", minimum=0)
    num_images: int = measure_flag(32, "images of each size", minimum=1)
    batch_size: int = measure_flag(16, "images per batch", minimum=1)
    rounds: int = measure_flag(7, "rounds; the table shows medians", minimum=1)
    seconds: float = measure_flag(
        4.0,
        "of reading with each number of workers, after their start; the fastest of three such readings counts",
        above=0,
    )
    workers: list[int] = measure_flag([0, 1, 2], "numbers of data workers", minimum=0)
    model: str = flag("examples/reading_clip", "CLIP that train_lore.py trains here", group="training", path=True)
    train_steps: int = flag(
        20, "steps of each training run, 0 for none; the first half is not counted", group="training", minimum=0
    )
    output_dir: str = required(
        "made images, runs, results.json and table.md; must not exist yet", group="output", path=True
    )


class ProcessorDataset(ShardDataset):
    """The same samples through a Hugging Face image processor: float32 (3, 224, 224)."""

    processor = CLIPImageProcessorPil()

    def _image(self, members: Members) -> torch.Tensor:
        (data,) = members.values()
        return self.processor(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"][0]


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, description=__doc__)
    output_dir = Path(settings.output_dir)
    if output_dir.exists():
        raise UserError(f"--output_dir {output_dir}: exists; give another directory")
    if settings.num_images < settings.batch_size:
        raise UserError(f"--num_images {settings.num_images}: less than --batch_size {settings.batch_size}; raise it")
    folders = {Path(settings.data).resolve().name: settings.data} if settings.data else make_sets(settings, output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "command": sys.argv[1:],
        "hardware": hardware(),
        "versions": library_versions(),
        "sets": {},
    }
    times = [f"{name}, ms" for name in (PROCESSOR, EXACT, DRAFT)]
    decoding = [["images", "KiB", *times, "images/s here", "faster", "with draft", "draft, dB"]]
    reading = [["images", *(f"workers: {count}, images/s" for count in settings.workers)]]
    for name, folder in folders.items():
        index = index_shards(expand_shards([str(folder)]), cache_dir=output_dir / "cache", flag="--data")
        if index.num_samples < settings.num_images:
            raise UserError(f"--num_images {settings.num_images}: {name} holds {index.num_samples}; lower it")
        found = results["sets"][name] = measure(index, settings)
        seconds = [found["seconds_per_image"][variant]["median"] for variant in (PROCESSOR, EXACT, DRAFT)]
        decoding.append(
            [
                name, f"{found['bytes_per_file'] / 1024:.0f}", *(f"{1000 * value:.2f}" for value in seconds),
                f"{1 / seconds[1]:,.0f}", *(f"{seconds[0] / value:.2f} x" for value in seconds[1:]),
                f"{found['draft_psnr_db']:.1f}" if found["draft_psnr_db"] else "equal",
            ]
        )  # fmt: skip
        reading.append([name, *(f"{found['images_per_second'][str(count)]:,.0f}" for count in settings.workers)])
    results["load_average"] = os.getloadavg()  # other load on the machine slows everything but CPU time
    results["bytes_per_image"] = {"uint8": 3 * 224 * 224, "float32": 4 * 3 * 224 * 224}
    results["copy_milliseconds"] = copy_milliseconds(settings.batch_size) if torch.cuda.is_available() else None
    print_table("One core: reading, decoding, 224 pixels", decoding)
    print_table("train_batches, by data workers", reading)
    tables = [decoding, reading]
    if settings.train_steps:
        name = "500x375" if "500x375" in folders else next(iter(folders))
        results["training"] = {"images": name, "runs": train(settings, str(folders[name]), output_dir)}
        rows = [["data workers", "waiting for data", "images/s in training"]]
        rows += [
            [workers, f"{row['data_wait_fraction']:.1%}", f"{row['images_per_second']:.1f}"]
            for workers, row in results["training"]["runs"].items()
        ]
        print_table(f"train_lore.py, {Path(settings.model).name}, images of {name}", rows)
        tables.append(rows)
    for dtype, number in results["bytes_per_image"].items():
        copied = results["copy_milliseconds"]
        print(
            f"{dtype}: {number:,} bytes an image" + (f", {copied[dtype]:.3f} ms to the GPU a batch" if copied else "")
        )
    (output_dir / "table.md").write_text("\n".join(map(markdown, tables)), encoding="utf-8")
    (output_dir / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def measure(index: ShardIndex, settings: Settings) -> dict[str, Any]:
    """CPU seconds per image of each way, the error of a draft, and images per second by number of workers."""
    datasets = {
        PROCESSOR: ProcessorDataset(index, ImageTransform(), order="shuffled"),
        EXACT: ShardDataset(index, ImageTransform(), order="shuffled"),
        DRAFT: ShardDataset(index, ImageTransform(draft=True), order="shuffled"),
    }
    steps = settings.num_images // settings.batch_size
    spent: dict[str, list[float]] = {name: [] for name in datasets}
    for number in range(WARM_UP + settings.rounds):
        names = list(datasets)[number % 3 :] + list(datasets)[: number % 3]  # each way comes first in turn
        for name in names:
            batches, clock = loader(datasets[name], settings, steps, 0), time.process_time()
            for _ in batches:
                pass
            if number >= WARM_UP:
                spent[name].append((time.process_time() - clock) / (steps * settings.batch_size))
    exact, drafted = (
        torch.cat([batch["images"] for batch in loader(datasets[name], settings, steps, 0)]).double()
        for name in (EXACT, DRAFT)
    )
    error = (exact - drafted).square().mean().item()
    # By the wall clock: take the best of three, because other load on the machine can only slow it.
    rates = [{str(count): rate(datasets[EXACT], settings, count) for count in settings.workers} for _ in range(3)]
    return {
        "bytes_per_file": sum(map(os.path.getsize, index.urls)) / index.num_samples,
        "seconds_per_image": {
            name: {"median": statistics.median(values), "least": min(values), "most": max(values)}
            for name, values in spent.items()
        },
        "draft_psnr_db": 10 * float(np.log10(255**2 / error)) if error else None,
        "images_per_second": {count: max(found[count] for found in rates) for count in rates[0]},
    }


def loader(dataset: ShardDataset, settings: Settings, steps: int, workers: int) -> Any:
    """Training batches over the first ``num_images`` of every epoch."""
    return train_batches(
        dataset,
        samples_per_epoch=settings.num_images,
        global_batch_size=settings.batch_size,
        per_device_batch_size=settings.batch_size,
        rank=0,
        world_size=1,
        first_step=0,
        num_steps=steps,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


def rate(dataset: ShardDataset, settings: Settings, workers: int) -> float:
    """Images per second by the wall clock, after the batches that workers prepared at their start are used up."""
    batches = loader(dataset, settings, 10**6, workers)
    for _ in range(2 * workers + 1):
        next(batches)
    count, clock = 0, time.perf_counter()
    while time.perf_counter() - clock < settings.seconds or count < 2:
        next(batches)
        count += 1
    seconds = time.perf_counter() - clock
    batches.close()
    return count * settings.batch_size / seconds


def train(settings: Settings, folder: str, output_dir: Path) -> dict[str, dict[str, Any]]:
    """Last rows of metrics.jsonl of LORE runs: without data workers, with the measured number, and also with drafts."""
    rows = {}
    for name, words in (
        ("none", ["--num_workers", "0"]),
        ("none, --jpeg_draft true", ["--num_workers", "0", "--jpeg_draft", "true"]),
        ("measured", []),
    ):
        run_dir = output_dir / f"run-{len(rows)}"
        in_parallel(1, [[
            *launcher("train_lore.py"), "--model_name_or_path", settings.model, "--train_shards", folder,
            "--output_dir", str(run_dir), "--per_device_train_batch_size", str(settings.batch_size),
            "--max_steps", str(settings.train_steps), "--logging_steps", str(max(1, settings.train_steps // 2)),
            "--checkpoint_steps", "0", "--report_to", "none", "--cache_dir", str(output_dir / "cache"), *words,
        ]])  # fmt: skip
        rows[name] = MetricsFile(run_dir / "metrics.jsonl").read()[-1]
    return rows


def copy_milliseconds(batch_size: int) -> dict[str, float]:
    """Time to copy a pinned batch to the GPU: as float32, and as uint8 with conversion to float32 in [0,1] there."""
    found = {}
    for dtype in (torch.uint8, torch.float32):
        images = torch.zeros(batch_size, 3, 224, 224, dtype=dtype).pin_memory()
        times = []
        for _ in range(20):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            copied = images.to("cuda", non_blocking=True)
            if dtype == torch.uint8:
                copied = copied.float().div_(255.0)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        found[str(dtype).removeprefix("torch.")] = statistics.median(times[5:])
    return found


def make_sets(settings: Settings, output_dir: Path) -> dict[str, str]:
    """Size -> directory with one shard of ``num_images`` JPEGs."""
    folders = {}
    for size in settings.image_sizes:
        sides = re.fullmatch(r"(\d+)x(\d+)", size)
        if not sides or min(int(side) for side in sides.groups()) < 8:
            raise UserError(f"--image_sizes {size}: expected width x height of at least 8 pixels, like 500x375")
        folder = output_dir / "images" / size
        folder.mkdir(parents=True)
        with tarfile.open(folder / "0.tar", "w") as tar:
            for number in range(settings.num_images):
                stream = io.BytesIO()
                photograph(*map(int, sides.groups()), seed=(settings.seed, number)).save(stream, "JPEG", quality=90)
                member = tarfile.TarInfo(f"{number:06d}.jpg")
                member.size = len(stream.getvalue())
                tar.addfile(member, io.BytesIO(stream.getvalue()))
        folders[size] = str(folder)
    return folders


def photograph(width: int, height: int, seed: Sequence[int]) -> Image.Image:
    """1/f noise, mostly equal in all three colours, with flat discs and boxes: as costly to decode as a photograph."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width).clip(1)
    planes = []
    for _ in range(4):
        phases = rng.standard_normal((2, *frequency.shape))
        plane = np.fft.irfft2((phases[0] + 1j * phases[1]) / frequency, s=(height, width))
        planes.append(plane / plane.std())
    pixels = 128 + 45 * np.stack([planes[0] + 0.4 * plane for plane in planes[1:]], axis=-1)
    rows, columns = np.ogrid[:height, :width]
    for disc in range(12):
        y, x, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.03, 0.2) * min(height, width)
        if disc % 2:
            inside = np.hypot(rows - y, columns - x) < radius
        else:
            inside = (abs(rows - y) < radius) & (abs(columns - x) < 2 * radius)
        pixels[inside] = 0.4 * pixels[inside] + 0.6 * rng.uniform(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def hardware() -> dict[str, Any]:
    """The machine and the library versions."""
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu.read_text(encoding="utf-8")) if cpu.exists() else None
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "most_workers": default_num_workers(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def library_versions() -> dict[str, Any]:
    return versions() | {"pillow": Image.__version__, "libjpeg_turbo": features.version("libjpeg_turbo")}


if __name__ == "__main__":
    run(main)
