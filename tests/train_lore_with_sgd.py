"""train_lore.py with SGD in place of AdamW, for comparing runs across numbers of processes."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_lore
from utils.cli import run

train_lore.make_optimizer = lambda name, module, rate, decay: torch.optim.SGD(module.parameters(), lr=rate)
run(train_lore.main)
