"""train_lore.py with every tensor counted: each process writes its peak to a file named by the first argument."""

import json
import os
import sys
from pathlib import Path

sys.path.pop(0)  # tests/: its folders have the names of others
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_lore
from utils.cli import run
from utils.training.memory import LiveBytes

directory = Path(sys.argv.pop(1))


def main() -> None:
    with LiveBytes() as tensors:
        train_lore.main()
    (directory / f"peak-{os.environ['RANK']}.json").write_text(json.dumps(tensors.peak))


run(main)
