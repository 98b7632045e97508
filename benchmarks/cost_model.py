"""The cost of LORE on 1 to hundreds of GPUs: FLOPs, bytes sent, memory, hours, and when more GPUs stop helping.

  python benchmarks/cost_model.py --matmul_tflops 790 --output runs/cost.json --markdown docs/cost_model.md

benchmarks/cost.py has the formulas. Every number is an estimate; nothing is run. Hours need the rate of one device,
which has no default: --device_tflops (model TFLOP/s that it sustained in whole LORE steps), --measured (the output of
benchmarks/train_step.py), or --matmul_tflops (the rate of its matrix products alone), times the assumed --utilisations.
Bandwidths are assumptions; give those of the cluster. --markdown replaces the text between <!-- cost_model.py --> and
<!-- end -->.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from benchmarks.comparison import markdown, print_table
from benchmarks.cost import (
    PO,
    STAGES,
    Network,
    Tower,
    bytes_per_step,
    float32_flops_per_image,
    float32_share_of_time,
    forwards_per_image,
    furthest_move,
    hidden_batch_size,
    optimizer_traffic,
    sent_bytes,
    step_collectives,
    step_time,
    tower_cost,
)
from utils.cli import flag, parse_settings, run
from utils.errors import UserError
from utils.text_files import parse_json
from utils.training.memory import GB, TOWERS, Layout, count_step, peak_bytes, tower_config
from utils.training.optimization import count_steps

BEGIN, END = "<!-- cost_model.py -->", "<!-- end -->"
TERA = 1e12


rate_flag, network_flag = partial(flag, group="rate of one GPU"), partial(flag, group="network, assumed")


@dataclass
class Settings:
    """The estimates to make and their rates."""

    encoders: list[str] = flag(["ViT-L/14", "ViT-H/14"], "image towers", group="run", path=True, choices=tuple(TOWERS))
    gpus: list[int] = flag([8, 64, 512], "numbers of GPUs", group="run", minimum=1)
    samples: int = flag(1_281_167, "images of an epoch (ImageNet's)", group="run", minimum=1)
    epochs: int = flag(2, "passes over them", group="run", minimum=1)
    batch_size: int = flag(128, "images per GPU and micro-batch", group="run", minimum=1)
    accumulation: int = flag(1, "micro-batches per step", group="run", minimum=1)
    attack_steps: int = flag(10, "PGD steps", group="run", minimum=1)
    primal_steps: int = flag(5, "K", group="run", minimum=1)
    learning_rate: float = flag(1e-5, "of the encoder: how far a run can move a weight", group="run", minimum=0)
    dual_learning_rate: float = flag(5e-4, "of the multiplier, likewise", group="run", minimum=0)
    memory: bool = flag(True, "count a step's memory too, some seconds for each tower", group="run")

    device_tflops: float | None = rate_flag(None, "model TFLOP/s that one GPU sustained in whole LORE steps", above=0)
    matmul_tflops: float | None = rate_flag(None, "bf16 TFLOP/s of its matrix products alone, measured", above=0)
    utilisations: list[float] = rate_flag(
        [30.0, 50.0], "of --matmul_tflops to assume, in per cent", above=0, maximum=100
    )
    measured: str | None = rate_flag(
        None, "JSON of benchmarks/train_step.py: the fastest LORE row of each tower counts", path=True
    )
    float32_tflops: float = rate_flag(67.0, "float32 TFLOP/s without tensor cores (H100's, H200's data sheet)", above=0)
    memory_gb_s: float = rate_flag(4800.0, "GB/s of its memory (H200's data sheet)", above=0)

    per_node: int = network_flag(8, "GPUs of a machine", minimum=1)
    inside_gb_s: float = network_flag(300.0, "GB/s that a GPU sends within a machine (NVLink)", above=0)
    between_gb_s: float = network_flag(50.0, "GB/s of a GPU's adapter to other machines (400 Gb/s)", above=0)
    latency_us: float = network_flag(10.0, "microseconds per hop of a collective", minimum=0)

    output: str | None = flag(None, "all numbers as JSON", group="output", path=True)
    markdown: str | None = flag(None, "file whose block of tables is replaced", group="output", path=True)


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, description=__doc__)
    towers = {name: tower_cost(tower_config(name)) for name in settings.encoders}
    rates = {name: device_rates(settings, name, tower) for name, tower in towers.items()}
    network = Network(
        settings.per_node, settings.inside_gb_s * GB, settings.between_gb_s * GB, settings.latency_us * 1e-6
    )
    found: dict[str, Any] = {"assumptions": asdict(settings), "towers": {name: asdict(t) for name, t in towers.items()}}
    tables = [
        ("FLOPs of one image in one step, in forwards F (estimate)", multiples()),
        ("FLOPs of one image, and what float32 takes of them (estimate)", flops_rows(settings, towers)),
        ("What a LORE step sends and holds on each GPU (estimate)", stage_rows(settings, towers, network)),
        ("Global batch, steps, and how far AdamW can go (estimate)", batch_rows(settings)),
    ]
    found["stages"] = dictionaries(tables[2][1])
    if any(rates.values()):
        hours = hours_rows(settings, towers, rates, network)
        tables.append(("LORE, DDP: hours (estimate)", hours_table(hours)))
        tables.append(
            ("One update as a global batch is split (estimate)", split_rows(settings, towers, rates, network))
        )
        found |= {"hours": hours, "split": dictionaries(tables[-1][1])}
    for title, rows in tables:
        print_table(title, rows)
    print(
        f"All of it estimates, not measured. Assumed: {settings.inside_gb_s:g} GB/s within a machine of "
        f"{settings.per_node}, {settings.between_gb_s:g} GB/s per adapter, {settings.latency_us:g} us per hop. "
        "Before a slash all adapters of a machine carry a message, behind it one does (but for memory)."
    )
    if not any(rates.values()):
        print("No rate of a device was given, so no hours: --device_tflops, --matmul_tflops or --measured.")
    if settings.output:
        write(Path(settings.output), json.dumps(found, indent=1) + "\n")
    if settings.markdown:
        text = "\n".join(f"**{title}**\n\n{markdown(rows)}" for title, rows in tables)
        replace_block(Path(settings.markdown), text)


def device_rates(settings: Settings, name: str, tower: Tower) -> dict[str, float]:
    """Model FLOP/s of one device, by source of the number."""
    rates = {}
    if settings.measured:
        variant, rate = measured_rate(settings.measured, name, tower, settings)
        rates[f"measured, {variant}" if variant else "measured"] = rate
    if settings.device_tflops:
        rates["given"] = settings.device_tflops * TERA
    if settings.matmul_tflops:
        for percent in settings.utilisations:
            rates[f"assumed {percent:g} %"] = settings.matmul_tflops * TERA * percent / 100
    return rates


def measured_rate(path: str, name: str, tower: Tower, settings: Settings) -> tuple[str, float]:
    """(variant, model FLOP/s) of the fastest LORE row of this tower. Raises ``UserError`` if there is none."""
    try:
        rows = parse_json(Path(path).read_bytes())["rows"]
        rows = [row for row in rows if row["encoder"] == name and row["method"] == "LORE"] if rows else []
        multiple = forwards_per_image("LORE", settings.attack_steps, settings.primal_steps)
        found = [
            (
                float(row.get("model_flops_per_second") or row["images_per_second"] * multiple * tower.forward),
                str(row.get("variant", "")),
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--measured {path}: not what benchmarks/train_step.py writes ({error!r})") from None
    if not found:
        raise UserError(f"--measured {path}: no LORE row of {name}; measure it, or leave it out of --encoders")
    rate, variant = max(found)
    return variant, rate


def multiples() -> list[list[str]]:
    rows = [["method", "attack steps", "K = 1", "K = 5", "K = 10", "K = 5, checkpointing"]]
    for label, method in (("LORE, TeCoA + l2, TeCoA + KL", "LORE"), ("FARE, TeCoA", "FARE")):
        for n in (5, 10, 20):
            cells = [f"{forwards_per_image(method, n, k)}" for k in (1, 5, 10)]
            rows.append([label, str(n), *cells, f"{forwards_per_image(method, n, 5, recompute=True)}"])
    return [*rows, [PO, "none", f"{forwards_per_image(PO, 0, 1)}", "", "", ""]]


def flops_rows(settings: Settings, towers: dict[str, Tower]) -> list[list[str]]:
    rows = [["image tower", "parameters, M", "F, GFLOP", "LORE, GFLOP", "FARE K = 1", "FARE same K", PO, "float32"]]
    if settings.matmul_tflops:
        rows[0].append("of the time")
    n, k = settings.attack_steps, settings.primal_steps
    for name, tower in towers.items():
        giga = tower.forward / 1e9
        lore = forwards_per_image("LORE", n, k) * tower.forward
        slow = float32_flops_per_image(tower, "LORE", n, k)
        cells = [
            forwards_per_image(method, n, updates) * giga
            for method, updates in (("LORE", k), ("FARE", 1), ("FARE", k), (PO, 1))
        ]
        row = [name, f"{tower.parameters / 1e6:.1f}", f"{giga:.1f}", *(f"{cell:,.0f}" for cell in cells)]
        row.append(f"{100 * slow / lore:.2f} %")
        if settings.matmul_tflops:
            share = float32_share_of_time(
                tower, lore, slow, settings.matmul_tflops * TERA, settings.float32_tflops * TERA
            )
            row.append(f"{100 * share:.1f} %")
        rows.append(row)
    return rows


def stage_rows(settings: Settings, towers: dict[str, Tower], network: Network) -> list[list[str]]:
    """A step by ZeRO stage, on few and many GPUs: collectives, bytes, seconds; memory by utils/training/memory.py."""
    few, many = min(settings.gpus), max(settings.gpus)
    rows = [["image tower", "sharding", "collectives", "GB sent", "x parameters", f"s, {few} GPUs", f"s, {many} GPUs"]]
    rows[0] += [f"memory, {few} / {many}, GB"] if settings.memory else []
    variants = [(label, stage, True) for label, stage in STAGES.items()]
    variants.append(("ZeRO-3, no gathering once", 3, False))
    for name, tower in towers.items():
        count = None
        if settings.memory:
            count = count_step(tower_config(name), compute_dtype=torch.bfloat16, gradient_checkpointing=False)
        for label, stage, gather in variants:
            on_few, on_many = (
                step_collectives(
                    tower,
                    "LORE",
                    stage=stage,
                    processes=processes,
                    attack_steps=settings.attack_steps,
                    primal_steps=settings.primal_steps,
                    accumulation=settings.accumulation,
                    gather_for_attack=gather,
                )
                for processes in (few, many)
            )
            sent = bytes_per_step(on_many, many)
            row = [name, label, f"{sum(one.calls for one in on_many):,}", f"{sent / GB:.1f}"]
            row += [f"{sent / (4 * tower.parameters):.1f}", f"{sum(network.seconds(one, few) for one in on_few):.3f}"]
            row.append(pair(sum(network.seconds(one, many, spread) for one in on_many) for spread in (True, False)))
            if count is not None:
                layouts = [
                    Layout(stage, n, accumulation=settings.accumulation, gather_for_attack=gather) for n in (few, many)
                ]
                row.append(
                    pair((peak_bytes(count, layout, settings.batch_size)["total"] / GB for layout in layouts), ".1f")
                )
            rows.append(row)
    return rows


def pair(values: Iterable[float], form: str = ".3f") -> str:
    """Two numbers, such as "1.5 / 2.0"."""
    return " / ".join(format(value, form) for value in values)


def batch_rows(settings: Settings) -> list[list[str]]:
    rows = [["GPUs", "images per GPU", "global batch", "steps", "updates", "encoder, at most", "multiplier, at most"]]
    first = min(settings.gpus) * settings.batch_size * settings.accumulation
    for gpus in settings.gpus:
        own = settings.batch_size * settings.accumulation
        for images in dict.fromkeys((own, first // gpus)):
            if images == 0 or images * gpus > settings.samples:
                continue
            steps = steps_of(settings, images * gpus)
            moves = (
                furthest_move(steps, settings.learning_rate, settings.primal_steps),
                furthest_move(steps, settings.dual_learning_rate),
            )
            row = [str(gpus), str(images), f"{images * gpus:,}", f"{steps:,}", f"{steps * settings.primal_steps:,}"]
            rows.append([*row, *(f"{move:.2g}" for move in moves)])
    return rows


def steps_of(settings: Settings, global_batch_size: int) -> int:
    return count_steps(
        samples_per_epoch=settings.samples,
        num_samples=settings.samples,
        global_batch_size=global_batch_size,
        epochs=settings.epochs,
        max_steps=None,
    )


def hours_rows(
    settings: Settings, towers: dict[str, Tower], rates: dict[str, dict[str, float]], network: Network
) -> list[dict[str, Any]]:
    """A row for each tower, number of GPUs and rate."""
    rows = []
    for name, tower in towers.items():
        for gpus in settings.gpus:
            global_batch_size = gpus * settings.batch_size * settings.accumulation
            if global_batch_size > settings.samples:
                continue
            steps = steps_of(settings, global_batch_size)
            for label, rate in rates[name].items():
                best, worst = (
                    step_time(
                        tower, "LORE", rate=rate, batch_size=settings.batch_size, stage=0, processes=gpus,
                        attack_steps=settings.attack_steps, primal_steps=settings.primal_steps,
                        accumulation=settings.accumulation, network=network, spread=spread,
                    )
                    for spread in (True, False)
                )  # fmt: skip
                hours = {
                    "compute alone": best.compute,
                    "hidden, all adapters": best.with_overlap,
                    "not hidden, all adapters": best.without_overlap,
                    "hidden, one adapter": worst.with_overlap,
                    "not hidden, one adapter": worst.without_overlap,
                }
                rows.append(
                    {
                        "encoder": name,
                        "gpus": gpus,
                        "rate": label,
                        "device_tflops": rate / TERA,
                        "samples": steps * global_batch_size,
                        "steps": steps,
                        "step_seconds": best.compute,
                        "images_per_second": global_batch_size / best.with_overlap,
                        "hours": {column: steps * seconds / 3600 for column, seconds in hours.items()},
                        "gpu_hours": gpus * steps * best.with_overlap / 3600,
                    }
                )
    return rows


def hours_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Hours with ideal overlap and without overlap, with traffic over all adapters of a machine / over one."""
    table = [["image tower", "GPUs", "rate", "TFLOP/s", "steps", "s a step", "images/s", "compute, h", "hidden, h"]]
    table[0] += ["not hidden, h", "GPU hours"]
    for row in rows:
        hours = row["hours"]
        cells = [row["encoder"], str(row["gpus"]), row["rate"], f"{row['device_tflops']:.0f}", f"{row['steps']:,}"]
        cells += [f"{row['step_seconds']:.2f}", f"{row['images_per_second']:,.0f}", f"{hours['compute alone']:.3f}"]
        for overlap in ("hidden", "not hidden"):
            cells.append(pair(hours[f"{overlap}, {adapters}"] for adapters in ("all adapters", "one adapter")))
        table.append([*cells, f"{row['gpu_hours']:.0f}"])
    return table


def split_rows(
    settings: Settings, towers: dict[str, Tower], rates: dict[str, dict[str, float]], network: Network
) -> list[list[str]]:
    """The global batches of ``batch_rows`` split over more GPUs: computation, communication and AdamW of an update.

    Uses each tower's highest rate, at which communication matters most. AdamW's seconds follow from its bytes and lower
    the efficiency.
    """
    rows = [["image tower", "TFLOP/s", "global batch", "GPUs", "images", "update, ms", "all-reduce, ms", "AdamW, ms"]]
    rows[0] += ["efficiency, %", "hides from", "FARE: from"]
    step = {"attack_steps": settings.attack_steps, "primal_steps": settings.primal_steps, "stage": 0}
    splits = [(few * settings.batch_size, gpus) for few in settings.gpus for gpus in settings.gpus if gpus >= few]
    for name, tower in towers.items():
        rate = max(rates[name].values())
        adamw = optimizer_traffic(tower.parameters) / (settings.memory_gb_s * GB)
        for global_batch_size, gpus in splits:
            images = global_batch_size // gpus
            if images == 0:
                continue
            reductions, efficiencies, needed = [], [], []
            for spread in (True, False):
                sent = sent_bytes("all-reduce", 4 * tower.parameters, gpus)
                reductions.append(1e3 * sent / network.bandwidth(gpus, spread))
                times = step_time(
                    tower, "LORE", rate=rate, batch_size=images, processes=gpus, network=network, spread=spread, **step
                )
                efficiencies.append(100 * times.compute / (times.with_overlap + settings.primal_steps * adamw))
                needed.append(hidden_batch_size(tower, rate=rate, processes=gpus, network=network, spread=spread))
            row = [name, f"{rate / TERA:.0f}", f"{global_batch_size:,}", str(gpus), str(images)]
            row += [f"{1e3 * 6 * images * tower.forward / rate:.1f}", pair(reductions, ".1f"), f"{1e3 * adamw:.1f}"]
            row += [pair(efficiencies, ".0f"), pair(needed, ".1f"), pair((2 * value for value in needed), ".1f")]
            rows.append(row)
    return rows


def dictionaries(rows: list[list[str]]) -> list[dict[str, str]]:
    """Rows as {heading: text}."""
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def replace_block(path: Path, tables: str) -> None:
    """Puts the tables between the lines BEGIN and END of a file. Raises ``UserError`` if the file lacks them."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--markdown {path}: cannot be read ({error.strerror})") from None
    before, begin, rest = text.partition(BEGIN + "\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(
            f"--markdown {path}: no line {BEGIN} with a later {END}; add both where the tables should stand"
        )
    write(path, f"{before}{begin}\n{tables}\n{end}{after}")


def write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    run(main)
