"""Turns a task of srun into one rank of a trainer, with an accelerate config and without a launcher in between.

  srun --ntasks-per-node=8 --gpus-per-node=8 --kill-on-bad-exit=1 \\
    python slurm/rank.py --config_file accelerate_configs/ddp.yaml train_lore.py --eps 4 --output_dir runs/lore4

One task per GPU (or per CPU process). `accelerate launch` would keep the signals of SLURM from the ranks and their exit
status from srun; here the task is the rank, so both pass. The config means what it means to `accelerate launch`, except
that SLURM says how many processes and machines there are. MASTER_ADDR and MASTER_PORT of the environment win.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import run
from utils.errors import UserError

REQUEUE = 85  # the exit status of the trainers that means: start me again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def main() -> None:
    # Until the script has its own handlers there is nothing to save: a rank that is stopped has to start again.
    for number in SIGNALS:
        signal.signal(number, leave)
    ranks = rank_environment(os.environ)
    os.environ["RANK"] = ranks["RANK"]  # rank 0 alone says what is wrong with the command line
    # Before torch is imported, which reads it once.
    os.environ.setdefault("OMP_NUM_THREADS", str(task_cpus(os.environ, int(ranks["LOCAL_WORLD_SIZE"]))))
    args = parse_command(sys.argv[1:], world_size=int(ranks["WORLD_SIZE"]))
    if ranks["WORLD_SIZE"] == "1" and starts_one_process(args):
        del os.environ["RANK"]  # as under accelerate launch: no group of one
        ranks = {}
    else:
        ranks |= master(os.environ)
    os.environ.update(accelerate_environment(args) | ranks)
    # In this process: an exec would lose the signals that come while Python starts and torch is imported once more.
    sys.argv = [args.training_script, *args.training_script_args]
    sys.path[0] = str(Path(args.training_script).resolve().parent)
    try:
        runpy.run_path(args.training_script, run_name="__main__")
    except SystemExit as end:
        if end.code == REQUEUE:
            # srun --kill-on-bad-exit signals the slower ranks when the first one has left. Python gives up its handlers
            # before it has ended, but leaves what is ignored.
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        raise


def leave(number: int, frame: object) -> None:
    """Ends the process with the status that asks for another start."""
    os.write(2, f"rank.py: {signal.Signals(number).name}, nothing to save; exit status {REQUEUE}\n".encode())
    os._exit(REQUEUE)


def rank_environment(slurm: dict[str, str] | os._Environ) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE of this task. Raises ``UserError`` outside a step of srun."""
    if "SLURM_STEP_ID" not in slurm:  # a batch script has the other variables too, but is not a task
        raise UserError(
            "SLURM_STEP_ID is not set; expected srun to start this, one task per process; "
            "without SLURM use accelerate launch"
        )
    return {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node(slurm["SLURM_STEP_TASKS_PER_NODE"])[int(slurm["SLURM_NODEID"])]),
    }


def tasks_per_node(compressed: str) -> list[int]:
    """ "4(x2),1" -> [4, 4, 1]."""
    counts = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", compressed):
        counts += [int(count)] * int(repeats or 1)
    return counts


def task_cpus(slurm: dict[str, str] | os._Environ, local_world_size: int) -> int:
    """CPUs of one task: what --cpus-per-task asked for, else an equal share of the node's."""
    return int(slurm.get("SLURM_CPUS_PER_TASK") or max(1, int(slurm["SLURM_CPUS_ON_NODE"]) // local_world_size))


def master(env: dict[str, str] | os._Environ) -> dict[str, str]:
    """Where the ranks meet: the first host of the step, a port that follows from job and step.

    Raises ``UserError`` where SLURM does not name the host or the name has no address.
    """
    address = env.get("MASTER_ADDR")
    if address is None:
        command = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
        try:
            address = subprocess.run(command, check=True, text=True, capture_output=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"{' '.join(command)}: {error}; set MASTER_ADDR to the host of rank 0") from None
    try:
        socket.getaddrinfo(address, None)
    except OSError:
        raise UserError(
            f"{address}, where rank 0 runs, has no address here; set MASTER_ADDR to a name or an "
            "address that all nodes can reach"
        ) from None
    # Below the ephemeral ports. Of 32 steps each, jobs meet where their numbers are a multiple of 619 apart.
    port = 10000 + (int(env["SLURM_JOB_ID"]) + 619 * int(env["SLURM_STEP_ID"])) % 20000
    return {"MASTER_ADDR": address, "MASTER_PORT": env.get("MASTER_PORT", str(port))}


def parse_command(argv: list[str], world_size: int) -> argparse.Namespace:
    """The flags of `accelerate launch` with the config's values filled in. Raises ``UserError``."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    def refuse(message: str) -> None:
        raise UserError(f"{message}; expected --config_file accelerate_configs/<name>.yaml script.py --flags")

    parser = launch_command_parser()
    parser.error = refuse
    args = parser.parse_args(argv)
    if args.config_file is None:
        refuse("--config_file: missing")
    if not Path(args.training_script).is_file():
        refuse(f"{args.training_script}: no such script")
    args.num_processes, args.num_machines = world_size, 1  # as if all were on one machine: SLURM has placed them
    args.main_process_port = 0  # accelerate's check of the port, not the port
    try:
        args, config, precision_from_config = _validate_launch_command(args)
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"--config_file {args.config_file}: {error}; expected a config of accelerate") from None
    args.deepspeed_fields_from_accelerate_config = ",".join(
        [*config.deepspeed_config, *(["mixed_precision"] if precision_from_config else [])]
    )
    return args


def accelerate_environment(args: argparse.Namespace) -> dict[str, str]:
    """The environment that `accelerate launch` would give to its processes."""
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    if starts_one_process(args):
        return prepare_simple_launcher_cmd_env(args)[1]
    return prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)


def starts_one_process(args: argparse.Namespace) -> bool:
    """Whether `accelerate launch` would start the script by itself, without torchrun."""
    return args.cpu or not (args.multi_gpu or args.use_deepspeed or args.use_fsdp)


if __name__ == "__main__":
    run(main)
