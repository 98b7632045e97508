"""Several trainings one after another in one group of processes: starting the processes takes longer than a small run.

torchrun ... tests/train_several.py plan.json    # [{"trainer": "train_lore", "sgd": true, "arguments": [...]}, ...]
"""

import contextlib
import importlib
import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import run


def train(trainer, arguments, sgd=False):
    """``sgd``: AdamW turns the rounding of gradients that are zero into whole updates; SGD shows whether runs are equal."""
    module = importlib.import_module(trainer)
    make_optimizer = module.make_optimizer
    if sgd:
        module.make_optimizer = lambda name, part, rate, decay: torch.optim.SGD(part.parameters(), lr=rate)
    try:
        module.main(arguments)
    finally:
        module.make_optimizer = make_optimizer


def main():
    PartialState.destroy_process_group = lambda self, group=None: None  # it serves the next training too
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        with contextlib.suppress(SystemExit):
            train(**entry)
        AcceleratorState._reset_state()
        GradientState._reset_state()


if __name__ == "__main__":
    run(main)
