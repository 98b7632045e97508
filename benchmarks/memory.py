"""Compares train_lore.py --estimate_memory with the memory of a real LORE step, for models with random weights.

  python benchmarks/memory.py --models ViT-B/32 ViT-L/14 --batch_size 4 --output_dir runs/memory

Every step is a run of train_lore.py in its own process: a whole CLIP of the published size (the text tower stays on the
host), noise as images, blocks in bfloat16. On a GPU the measure is torch.cuda.max_memory_allocated. On a CPU it is the
peak bytes of all live tensors; the resident memory is also shown, which includes libraries, the text tower and memory
allocated inside kernels. GB is 10^9 bytes. The models take up to 10 GB each and are deleted afterwards.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPVisionConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_lore
import utils.models.encoders
from benchmarks.comparison import markdown, print_table
from examples.pretrain_small_clip import make_tokenizer
from utils.cli import flag, parse_settings, required, run
from utils.errors import UserError
from utils.training.memory import GB, TOWERS, Layout, LiveBytes, count_step, peak_bytes, tower_config
from utils.training.metrics import MetricsFile, peak_memory_gib

# Width, layers and heads of the text tower for each image tower; the MLP is four times as wide.
TEXT_TOWERS = {"B": (512, 12, 8), "L": (768, 12, 12), "H": (1024, 24, 16), "b": (1280, 32, 20)}

step_flag = partial(flag, group="step")


@dataclass
class Settings:
    models: list[str] = flag(["ViT-B/32", "ViT-L/14"], "image towers", group="what", choices=tuple(TOWERS))
    output_dir: str = required("models and runs go here, table.md stays; must not exist yet", group="what", path=True)
    batch_size: int = step_flag(4, "images per step", minimum=1)
    gradient_checkpointing: list[str] = step_flag(
        ["false", "true"], "without, with, or both", choices=("false", "true")
    )
    optimizer: str = step_flag("adamw", "of the encoder", choices=("adamw", "adamw_8bit"))
    reference_dtype: str = step_flag("float32", "weights of the reference's blocks", choices=("float32", "bfloat16"))
    attack_steps: int = step_flag(2, "PGD steps; more take time, not memory", minimum=1)
    primal_steps: int = step_flag(2, "K; likewise", minimum=2)


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    output_dir = Path(settings.output_dir)
    if output_dir.exists():
        raise UserError(f"--output_dir {output_dir}: exists; give another directory")
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    rows = [["image tower", "checkpointing", "estimate, GB", "measured, GB", "of the estimate"]]
    rows[0] += ["seconds of the step"] if on_gpu else ["resident, GB", "seconds of the step"]
    # One process per run: freed memory returns to the system, and peaks do not carry over.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in settings.models:
            model = output_dir / "model"
            text_tower = TEXT_TOWERS[name.removeprefix("ViT-")[0]]
            pool.submit(make_model_and_images, tower_config(name), text_tower, model, settings.batch_size).result()
            for checkpointing in settings.gradient_checkpointing:
                count = count_step(
                    tower_config(name),
                    compute_dtype=torch.bfloat16,
                    gradient_checkpointing=checkpointing == "true",
                    reference_dtype=settings.reference_dtype,
                )
                layout = Layout(optimizer=settings.optimizer)
                estimate = peak_bytes(count, layout, settings.batch_size)["total"]
                step = pool.submit(measure, settings, model, checkpointing).result()
                row = [name, checkpointing, f"{estimate / GB:.2f}", f"{step['peak'] / GB:.2f}"]
                row += [f"{step['peak'] / estimate:.3f}"] + ([] if on_gpu else [f"{step['resident'] / GB:.2f}"])
                rows.append([*row, f"{step['seconds']:.1f}"])
                (output_dir / "table.md").write_text(markdown(rows), encoding="utf-8")
            shutil.rmtree(model)
    print_table(
        f"One LORE step, {settings.batch_size} images, {settings.optimizer}, reference {settings.reference_dtype}, "
        f"{device}",
        rows,
    )


def make_model_and_images(
    vision: CLIPVisionConfig, text_tower: tuple[int, int, int], directory: Path, num_images: int
) -> None:
    """Saves a CLIP of this size with random weights, and this many images of noise."""
    width, layers, heads = text_tower
    tokenizer = make_tokenizer(["noise"], vocab_size=600)
    text = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        vision_config=vision.to_dict(),
        text_config=text | ids | {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)},
        projection_dim=vision.projection_dim,
    )
    size = vision.image_size
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    CLIPModel(config).save_pretrained(directory)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(directory)
    (directory / "images").mkdir()
    with tarfile.open(directory / "images/0.tar", "w") as tar:
        for index in range(num_images):
            noise = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8).numpy()
            Image.fromarray(noise).save(png := io.BytesIO(), "png")
            member = tarfile.TarInfo(f"{index:06d}.png")
            member.size = len(png.getvalue())
            tar.addfile(member, io.BytesIO(png.getvalue()))


def measure(settings: Settings, model: Path, checkpointing: str) -> dict[str, Any]:
    """Peak bytes, resident bytes and seconds of one step of train_lore.py. Call in a separate process."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    run_dir = model / f"run-{checkpointing}"
    utils.models.encoders.ATTENTION = "sdpa"  # flash attention as on a GPU, although another is faster on a CPU
    # Do not save: that copies weights on the host and writes gigabytes, and is not part of a step.
    train_lore.save_model = lambda *_: None
    with LiveBytes() as tensors:
        train_lore.main(
            [
                "--model_name_or_path", str(model), "--train_shards", str(model / "images"),
                "--output_dir", str(run_dir), "--per_device_train_batch_size", str(settings.batch_size),
                "--max_steps", "1", "--checkpoint_steps", "0", "--gradient_checkpointing", checkpointing,
                "--optimizer", settings.optimizer, "--reference_dtype", settings.reference_dtype,
                "--attack_steps", str(settings.attack_steps), "--primal_steps", str(settings.primal_steps),
                "--num_workers", "0", "--report_to", "none", "--cache_dir", str(model / "cache"),
            ]
        )  # fmt: skip
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else tensors.peak
    row = MetricsFile(run_dir / "metrics.jsonl").read()[-1]
    shutil.rmtree(run_dir)
    seconds = settings.batch_size / row["images_per_second"]
    return {"peak": peak, "resident": peak_memory_gib(torch.device("cpu")) * 2**30, "seconds": seconds}


if __name__ == "__main__":
    run(main)
