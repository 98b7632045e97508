"""Several trainings one after another in one group of processes: starting the processes takes longer than a small run.

torchrun ... tests/train_several.py plan.json    # [{"trainer": "train_lore", "sgd": true, "arguments": [...]}, ...]
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

sys.path.pop(0)  # tests/: its folders have the names of others
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import utils.training.checkpoint
import utils.training.run
from utils.cli import run
from utils.processes.interruption import REQUEUE, SIGNALS


def train(trainer, arguments, sgd=False, stop_in_step=None):
    """Runs a trainer's main; returns its exit status.

    ``sgd``: AdamW turns the rounding of gradients that are zero into whole updates; SGD shows whether runs are equal.
    ``stop_in_step``: in it the last process gets a SIGUSR1, and no other.
    """
    module = importlib.import_module(trainer)
    make_optimizer, learning_rate = module.make_optimizer, utils.training.run.cosine_learning_rate

    def rate_and_signal(step, *rest):
        if step + 1 == stop_in_step and os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
            os.kill(os.getpid(), signal.SIGUSR1)
        return learning_rate(step, *rest)

    if sgd:
        module.make_optimizer = lambda name, part, rate, decay: torch.optim.SGD(part.parameters(), lr=rate)
    utils.training.run.cosine_learning_rate = rate_and_signal
    try:
        module.main(arguments)
    except SystemExit as stopped:
        return stopped.code
    finally:
        module.make_optimizer, utils.training.run.cosine_learning_rate = make_optimizer, learning_rate
        utils.training.checkpoint._LOCKS.clear()  # they would last as long as this process
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    return 0


def main():
    PartialState.destroy_process_group = lambda self, group=None: None  # it serves the next training too
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        expected = REQUEUE if "stop_in_step" in entry else 0
        status = train(**entry)
        assert status == expected, f"exit status {status}, expected {expected}: {entry}"
        AcceleratorState._reset_state()
        GradientState._reset_state()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


if __name__ == "__main__":
    run(main)
