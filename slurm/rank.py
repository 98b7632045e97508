"""Runs a task of srun as one rank of a script, with an accelerate config but without a launcher in between.

  srun --ntasks-per-node=8 --gpus-per-node=8 --kill-on-bad-exit=1 \\
    python slurm/rank.py --config_file accelerate_configs/ddp.yaml train_lore.py --eps 4 --output_dir runs/lore4

Start one task per GPU (or per CPU process). `accelerate launch` would keep SLURM's signals from the ranks, and the
ranks' exit status from srun. Here the task is the rank, so both get through. The config means the same as for
`accelerate launch`, but SLURM sets the numbers of processes and machines. MASTER_ADDR and MASTER_PORT may be set.
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

REQUEUE = 85  # exit status of a trainer that asks to be started again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def main() -> None:
    # Until the script sets its own handlers there is nothing to save: a stopped rank just asks to be started again.
    for number in SIGNALS:
        signal.signal(number, leave)
    ranks = rank_environment(os.environ)
    os.environ["RANK"] = ranks["RANK"]  # so that only rank 0 prints errors of the command line
    # Set this before torch is imported, which reads it once.
    os.environ.setdefault("OMP_NUM_THREADS", str(task_cpus(os.environ, int(ranks["LOCAL_WORLD_SIZE"]))))
    args = parse_command(sys.argv[1:], world_size=int(ranks["WORLD_SIZE"]))
    if ranks["WORLD_SIZE"] == "1" and starts_one_process(args):
        del os.environ["RANK"]  # one process forms no group, as under accelerate launch
        ranks = {}
    else:
        ranks |= master(os.environ)
    os.environ.update(accelerate_environment(args) | ranks)
    # Run in this process: an exec would lose signals while Python starts and imports torch again.
    sys.argv = [args.training_script, *args.training_script_args]
    sys.path[0] = str(Path(args.training_script).resolve().parent)
    try:
        runpy.run_path(args.training_script, run_name="__main__")
    except SystemExit as end:
        if end.code == REQUEUE:
            # srun --kill-on-bad-exit signals the slower ranks when the first one has exited. Python removes its
            # handlers before the process ends, but ignored signals stay ignored.
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        raise


def leave(number: int, frame: object) -> None:
    """Exits with the status that asks to be started again."""
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
    """The number of CPUs of one task: that of --cpus-per-task, else an equal share of the node's CPUs."""
    return int(slurm.get("SLURM_CPUS_PER_TASK") or max(1, int(slurm["SLURM_CPUS_ON_NODE"]) // local_world_size))


def master(env: dict[str, str] | os._Environ) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT: the first host of the step, and a port computed from job and step.

    Raises ``UserError`` if SLURM does not name the host or the name has no address.
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
    # Below the ephemeral ports. With up to 32 steps each, jobs collide only if their ids differ by a multiple of 619.
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
    args.num_processes, args.num_machines = world_size, 1  # as if on one machine: SLURM has placed them
    args.main_process_port = 0  # only for accelerate's check; it is not the port
    try:
        args, config, precision_from_config = _validate_launch_command(args)
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"--config_file {args.config_file}: {error}; expected a config of accelerate") from None
    args.deepspeed_fields_from_accelerate_config = ",".join(
        [*config.deepspeed_config, *(["mixed_precision"] if precision_from_config else [])]
    )
    return args


def accelerate_environment(args: argparse.Namespace) -> dict[str, str]:
    """The environment variables that `accelerate launch` would give to its processes."""
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    if starts_one_process(args):
        return prepare_simple_launcher_cmd_env(args)[1]
    return prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)


def starts_one_process(args: argparse.Namespace) -> bool:
    """Whether `accelerate launch` would start the script directly, without torchrun."""
    return args.cpu or not (args.multi_gpu or args.use_deepspeed or args.use_fsdp)


if __name__ == "__main__":
    run(main)
