"""Small runs of both trainers whose weights and metrics have to stay the same to the bit while the code is moved about.

  python tests/golden_runs.py keep /tmp/golden       # before: with the code as it is, or --checkout another/checkout
  python tests/golden_runs.py compare /tmp/golden    # after: runs all again, and resumes the kept checkpoints

Bits are only the same on one machine with one version of torch. Every run is also resumed half way, from a checkpoint
of the version that was kept. It takes some four minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.pop(0)  # tests/: its folders have the names of others
sys.path.insert(0, str(ROOT))

from tests.conftest import flags, two_processes  # noqa: E402

OWN = {"images_per_second", "data_wait_fraction", "peak_memory_gib", "model_flops_utilisation", "launch"}
STEPS = 4
COMMON = {
    "max_steps": STEPS, "logging_steps": 1, "num_workers": 0, "learning_rate": 1e-3,
    "checkpoint_steps": 2, "eval_steps": 2, "checkpoints_total_limit": 0,
    "eval_num_samples": 20, "per_device_train_batch_size": 6, "report_to": "none",
}  # fmt: skip
LORE = {"train_shards": "digits/train", "eval_shards": "digits/test", "attack_steps": 2, "primal_steps": 2, "eps": 8}
WORDS = {"train_shards": "digits/train", "eval_shards": "digits/test", "fonts": "DejaVuSans"}
PAIRS = {"train_shards": "attributes/pairs/train", "eval_shards": "attributes/pairs/val", "task": "pairs"}
# name: trainer, settings, number of processes
RUNS: dict[str, tuple[str, dict[str, Any], int]] = {
    "lore": ("train_lore", LORE | {"keep_best": "eval_accuracy_pgd"}, 1),
    "lore-accumulated": (
        "train_lore",
        LORE | {"gradient_accumulation_steps": 2, "multiplier": "linear", "max_grad_norm": 0.5, "warmup_steps": 2},
        1,
    ),
    "lore-two-processes": ("train_lore", LORE | {"num_workers": 1, "logging_steps": 2}, 2),
    "fare": ("train_lore", LORE | {"constraint": "none", "primal_steps": 1, "attack_momentum": 0.9}, 1),
    "fare-clean": ("train_lore", LORE | {"constraint": "none", "clean_weight": 0.5, "logging_steps": 3}, 1),
    "tecoa": ("train_lore", LORE | {"objective": "tecoa", "constraint": "none", "logging_steps": 2}, 1),
    "tecoa-kl": (
        "train_lore",
        LORE | {"objective": "tecoa", "constraint": "kl", "multiplier": "scalar", "margin": "fixed"},
        1,
    ),
    "dpo-image": ("train_po", WORDS | {"keep_best": "eval_accuracy_attacked", "label_smoothing": 0.1}, 1),
    "kto-all": ("train_po", WORDS | {"preference": "kto", "trainable": "all", "attacks_per_image": 2}, 1),
    "ce-averaged": ("train_po", WORDS | {"preference": "ce", "weight_average": "beta", "max_grad_norm": 0.5}, 1),
    "ipo-head": (
        "train_po",
        PAIRS | {"preference": "ipo", "trainable": "head", "orthogonality_weight": 0.1, "export_t": 0.5},
        1,
    ),
    "dpo-constrained": (
        "train_po",
        WORDS | {"constraint": "embedding", "gradient_accumulation_steps": 2, "margin": "fixed", "rho": 0.01},
        2,
    ),
    "dpo-pairs": ("train_po", PAIRS | {"constraint": "embedding", "logging_steps": 2}, 1),
}


def start(checkout: Path, folder: Path, name: str, output_dir: Path, **changes: Any) -> None:
    trainer, settings, processes = RUNS[name]
    settings = {
        key: folder / "data" / value if key.endswith("_shards") else value
        for key, value in (COMMON | settings | changes).items()
    }
    settings |= {"model_name_or_path": folder / "model", "cache_dir": folder / "cache", "output_dir": output_dir}
    launcher = two_processes() if processes == 2 else (sys.executable,)
    command = [*launcher, f"{trainer}.py", *flags(settings)]
    finished = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{name}: exit status {finished.returncode}\n{finished.stderr[-3000:]}")


def digest(output_dir: Path) -> dict[str, str]:
    """Digests of a run's weights, of the models of its best and last checkpoints, of its metrics without OWN."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted(output_dir.rglob("*.safetensors")):
        where = path.relative_to(output_dir).as_posix()
        if where.startswith("checkpoints/") and not where.startswith(f"checkpoints/step-{STEPS}/model/"):
            continue
        tensors = hashlib.sha256()
        for name, tensor in sorted(load_file(path).items()):
            tensors.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            tensors.update(tensor.contiguous().view(-1).view(dtype_of_bytes()).numpy().tobytes())
        found[where] = tensors.hexdigest()
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{key: value for key, value in row.items() if key not in OWN} for row in rows]
    return found | {"metrics": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()}


def dtype_of_bytes() -> Any:
    import torch

    return torch.uint8


def prepare(folder: Path) -> None:
    from tests.small_models import save_small_clip

    save_small_clip(folder / "model")
    for script, name in (("make_digit_shards", "digits"), ("make_attribute_shards", "attributes")):
        more = ["--image_size", "32"] if name == "attributes" else []
        command = [sys.executable, f"examples/{script}.py", "--output_dir", str(folder / "data" / name), *more]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("keep", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkout", type=Path, default=ROOT, help="where the trainers stand that are run")
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    folder, different = options.folder.resolve(), []
    if options.action == "keep":
        prepare(folder)
    for name in options.only:
        kept = folder / "runs" / name
        if options.action == "keep":
            start(options.checkout, folder, name, kept)
        again, resumed = folder / "again" / name, folder / "resumed" / name
        for output_dir in (again, resumed):
            shutil.rmtree(output_dir, ignore_errors=True)
        shutil.copytree(kept, resumed)
        start(options.checkout, folder, name, resumed, resume_from_checkpoint=resumed / "checkpoints/step-2")
        digests = folder / f"{name}.json"
        if options.action == "keep":
            digests.write_text(json.dumps({"whole": digest(kept), "resumed": digest(resumed)}, indent=2))
            print(f"{name}: kept", flush=True)
            continue
        start(options.checkout, folder, name, again)
        for what, output_dir in (("whole", again), ("resumed", resumed)):
            expected, found = json.loads(digests.read_text())[what], digest(output_dir)
            wrong = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
            different += [f"{name}, {what}: {key}" for key in sorted(wrong)]
            print(f"{name}, {what}: {'equal' if not wrong else 'DIFFERENT in ' + ', '.join(sorted(wrong))}", flush=True)
    if different:
        sys.exit("different:\n" + "\n".join(different))


if __name__ == "__main__":
    main()
