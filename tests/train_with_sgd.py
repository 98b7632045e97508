"""A trainer, named by the first argument, with SGD in place of its optimizer: for comparing runs across processes."""

import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import run

trainer = importlib.import_module(sys.argv.pop(1))
trainer.make_optimizer = lambda name, module, rate, decay: torch.optim.SGD(module.parameters(), lr=rate)
run(trainer.main)
