"""The page of results: every table, figure and verdict, made from the numbers that the scripts of the evidence wrote.

  python benchmarks/results.py --numbers_dir docs/results --page docs/results.md

In an existing page, the text between `<!-- NAME -->` and `<!-- end NAME -->` is replaced, where NAME is that of numbers
NAME.json, or `summary`. The rest is written by hand and stays. A new page has only these blocks. Figures go into
figures/ beside the page.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import ablations, attack_check, early_stability, preferences, trade_off, transfer
from benchmarks.comparison import markdown
from benchmarks.evidence import NOT_TESTED, Claim, Numbers, save_figure
from utils.cli import flag, parse_settings, required, run
from utils.errors import UserError
from utils.evaluation.results import replace_file

# Name of the numbers, in the order of the page: the script that makes them, and a title.
SCRIPTS: dict[str, tuple[ModuleType, str]] = {
    "early_stability": (early_stability, "The first updates, the multiplier and the constraint"),
    "constraint": (early_stability, "A longer run: does the constraint hold in the end?"),
    "penalty": (early_stability, "Meeting the constraint sooner"),
    "trade_off": (trade_off, "Clean against robust accuracy, equal updates, fidelity"),
    "ablations": (ablations, "Ablations, and the supervised objective"),
    "transfer": (transfer, "Sets that robust training never saw"),
    "preferences": (preferences, "Preference optimisation"),
    "attack_check": (attack_check, "Can the attacks be trusted?"),
}
# The same on a pretrained encoder, by real_encoder.py: first on the page, with columns of their own in the summary.
REAL: dict[str, tuple[ModuleType, str]] = {
    "real_early_stability": (early_stability, "A pretrained encoder: the first updates"),
    "real_constraint": (early_stability, "A pretrained encoder: how the constraint is met"),
    "real_trade_off": (trade_off, "A pretrained encoder: a longer run"),
}
ALL = REAL | SCRIPTS
ELSEWHERE = [
    Claim(
        "LORE",
        "ViT-B/32 on ImageNet, mean of 13 sets: 50.2 clean, 22.5 at eps 4 (FARE 44.7, 18.2), and the other radii",
        "recipes/lore_vit-b-32_imagenet.yaml", NOT_TESTED,
    ),
    Claim("LORE", "the same for ViT-B/16, LAION's CLIP, ConvNeXt-B, DINOv2 S and B", "recipes/", NOT_TESTED),
    Claim("LORE", "the multiplier network costs 3 % of the time (551 to 533 s on H100s)", "", NOT_TESTED),
    Claim(
        "CLIP-PO", "eight sets with ViT-B/32: DPO, IPO, KTO near CE with words, ahead of it without",
        "recipes/dpo_typographic_vit-b-32_imagenet-100.yaml", NOT_TESTED,
    ),
    Claim(
        "CLIP-PO", "photographs with real writing (Disentangling, PAINT, RTA-100)",
        "SCAM at chance for a small CLIP: docs/preference_optimisation.md", NOT_TESTED,
    ),
    Claim(
        "CLIP-PO", "gender of people in photographs, retrieval",
        "recipes/gender-head_vit-b-32_vl-bias.yaml", NOT_TESTED,
    ),
]  # fmt: skip


@dataclass
class Settings:
    numbers_dir: str = required("directory of what the scripts left", group="what", path=True)
    page: str = required("Markdown file to fill or to make", group="what", path=True)
    title: str = flag("Results", "heading of a page that is made", group="what")


def main() -> None:
    settings = parse_settings(Settings, description=__doc__)
    folder, page = Path(settings.numbers_dir), Path(settings.page)
    found = read_numbers(folder)
    for name in found:
        save_figure(ALL[name][0].draw(found[name]), page.parent / "figures", name)
    told = next((found[name] for name in ("real_early_stability", "early_stability") if name in found), None)
    if told is not None:  # the README's picture
        save_figure(early_stability.draw_clean_accuracy(told), page.parent / "figures", "clean_accuracy")
    blocks = make_blocks(found)
    if page.exists():
        text = page.read_text(encoding="utf-8")
        for name, block in blocks.items():
            text = filled(text, name, block, page)
    else:
        headings = {"summary": "The claims of both papers"} | {name: ALL[name][1] for name in found}
        parts = [f"# {settings.title}"]
        parts += [f"## {headings[name]}\n\n{marked(name, block)}" for name, block in blocks.items()]
        text = "\n\n".join(parts) + "\n"
    replace_file(page, text.encode())
    print(f"{page} written, and {len(found)} figures in {page.parent / 'figures'}")


def read_numbers(folder: Path) -> dict[str, Numbers]:
    """Name -> a script's numbers, in the page's order, without scripts that have not run."""
    found = {}
    for name in ALL:
        path = folder / f"{name}.json"
        if path.exists():
            try:
                found[name] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path}: is not JSON ({error}); run its script again") from None
    if not found:
        raise UserError(
            f"--numbers_dir {folder}: holds none of {', '.join(f'{name}.json' for name in SCRIPTS)}; "
            "run the scripts first"
        )
    return found


def make_blocks(found: dict[str, Numbers]) -> dict[str, str]:
    """Name of a block -> Markdown."""
    blocks = {"summary": markdown(summary(found)).rstrip("\n")}
    for name, numbers in found.items():
        script, title = ALL[name]
        parts = [f"**{caption}.**\n\n{markdown(table)}".rstrip("\n") for caption, table in script.tables(numbers)]
        parts.append(f"![{title}](figures/{name}.png)")
        seeds = numbers["settings"]["seeds"]
        several = "mean ± standard deviation over seeds" if len(seeds) > 1 else "brackets: Wilson 95 % interval"
        parts.append(
            f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))} ({several}). {numbers['machine']}, "
            f"{numbers['minutes']:.0f} minutes.\n\n    {wrapped(numbers['command'])}"
        )
        blocks[name] = "\n\n".join(parts)
    return blocks


def summary(found: dict[str, Numbers]) -> list[list[str]]:
    """A row for each claim: what was found, and the verdict; beside it, if there is one, on the pretrained encoder."""

    def claims(scripts: Iterable[str]) -> list[Claim]:
        return [claim for name in found if name in scripts for claim in ALL[name][0].claims(found[name])]

    lacking = [
        Claim("", f"everything under {title!r}", f"benchmarks/{name}.py", NOT_TESTED)
        for name, (_, title) in SCRIPTS.items()
        if name not in found
    ]
    here = [*claims(SCRIPTS), *lacking, *ELSEWHERE]
    real = {claim[:2]: list(claim[2:]) for claim in reversed(claims(REAL))}  # of equal claims the first counts
    if not real:
        return [["paper", "claim", "found here", "verdict"], *map(list, here)]
    encoder = Path(next(found[name] for name in REAL if name in found)["settings"]["model"]).name
    untested = ["", NOT_TESTED]
    told = {claim[:2] for claim in here}
    return [
        ["paper", "claim", "small CLIPs", "verdict", encoder, "verdict"],
        *([*claim, *real.get(claim[:2], untested)] for claim in here),
        *([*claim, *untested, *of] for claim, of in reversed(real.items()) if claim not in told),
    ]


def wrapped(command: str, width: int = 116) -> str:
    """A command split over several lines, as a user would type it."""
    lines, line = [], ""
    for word in re.split(r" (?=--)", command):
        if line and len(line) + len(word) > width:
            lines.append(line + " \\")
            line = "  " + word
        else:
            line = f"{line} {word}" if line else word
    return "\n    ".join([*lines, line])


def marked(name: str, block: str) -> str:
    return f"<!-- {name} -->\n\n{block}\n\n<!-- end {name} -->"


def filled(text: str, name: str, block: str, page: Path) -> str:
    start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise UserError(f"{page}: expected one {start} and one {end} after it; write them where the block belongs")
    return text[: text.index(start)] + marked(name, block) + text[text.index(end) + len(end) :]


if __name__ == "__main__":
    run(main)
