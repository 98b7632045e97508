"""Metrics of a run: statistics of a batch, FLOPs, and the file metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from utils.errors import os_errors
from utils.models.encoders import ImageEncoder
from utils.text_files import parse_json
from utils.whole_files import write_whole


def violation_statistics(distance: Tensor, margin: Tensor, rho: float) -> dict[str, float]:
    """Statistics of distance / margin, both (n,), feasible if <= rho, and the fraction above rho. Synchronises once."""
    ratio = distance.float() / margin.float().clamp_min(1e-12)
    quantiles = torch.quantile(ratio, torch.tensor([0.5, 0.95], device=ratio.device))
    violated = (distance > rho * margin).float().mean()
    values = torch.stack([ratio.mean(), quantiles[0], quantiles[1], ratio.max(), violated]).tolist()
    names = [f"violation_ratio_{name}" for name in ("mean", "median", "p95", "max")]
    return dict(zip([*names, "violated_fraction"], values))


def forward_flops(encoder: ImageEncoder) -> int:
    """FLOPs of one image's forward pass (a multiply-add counts 2), counted by torch on a batch of one."""
    pixel_values = torch.zeros(1, 3, encoder.image_size, encoder.image_size, device=encoder.image_mean.device)
    # Use the plain attention kernel: the counter does not know every fused one.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(pixel_values)
    return counter.get_total_flops()


def lore_flops_per_image(
    forward: int, attack_steps: int, primal_steps: int, clean_in_primal: bool, dual: bool, reference: bool = True
) -> int:
    """FLOPs of one image in one step, in terms of a forward pass F (a backward pass is F, with weight gradients 2F).

    Reference F, attack 2F per step, primal update 3F for x + delta and 3F more if it also encodes x, dual F.
    """
    return forward * (reference + 2 * attack_steps + primal_steps * (6 if clean_in_primal else 3) + dual)


def preference_flops_per_sample(forward: int, pictures: int, head: bool, dual: bool = False) -> int:
    """FLOPs of one sample's pictures in one step: F each for the reference, and 3F each unless a ``head`` is trained.

    ``dual``: F more for the clean picture. Texts are ignored: they need little in comparison.
    """
    return forward * (pictures if head else 4 * pictures + dual)


# Dense bf16 peaks in FLOP/s from the vendors' data sheets. For other devices no utilisation is logged.
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK_FLOPS.items() if key in name.replace("-", " ").split()), None)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, written to disk at once."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, row: dict[str, Any]) -> None:
        cannot = f"{self.path}: step {row['step']} cannot be logged"
        todo = "mend that, then go on with --resume_from_checkpoint latest"
        with os_errors(cannot, todo), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """The rows in order, without lines that are not the row of a step."""
        rows = []
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        for line in text.split("\n"):
            with contextlib.suppress(ValueError):  # the last line of a killed run
                row = parse_json(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
        return rows

    def cut_back(self, step: int) -> None:
        """Drops the rows after ``step``: a resumed run writes them again."""
        kept = [json.dumps(row) + "\n" for row in self.read() if row["step"] <= step]
        write_whole(self.path, "".join(kept))
