"""slurm/: tasks of srun become ranks, and the jobs requeue themselves exactly when they should."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluate
import train_lore
import train_po
from slurm import rank as slurm_rank
from slurm.rank import master, parse_command, task_cpus, tasks_per_node
from tests.conftest import ROOT, accelerate_launch, flags, free_port, run_script
from utils.cli import parse_settings
from utils.errors import UserError
from utils.processes import interruption
from utils.processes.distributed import default_num_workers

SBATCH = sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch"))
TRAINING = [name for name in SBATCH if name.startswith("train")]

# Ends with 85 on all ranks as soon as one of them has been signalled, as the trainers do, and takes its time for it.
RANK_SCRIPT = """
import atexit, os, signal, sys, time
sys.path.insert(0, {root!r})
import torch
from utils.processes.distributed import start_accelerator

told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
accelerator = start_accelerator()
ranks = accelerator.gather(torch.tensor([accelerator.process_index], device=accelerator.device)).tolist()
print("group", ranks, "local", os.environ["LOCAL_RANK"], "threads", torch.get_num_threads(), sys.argv[1:], flush=True)
while not accelerator.gather(torch.tensor([len(told)], device=accelerator.device)).any():
    time.sleep(0.05)


def slowly():
    print("leaving", flush=True)
    time.sleep(1)


atexit.register(slowly)
# Without this a thread of the group may meet the interpreter's end: abort in 2 of 40 runs, with it in 0 of 200.
accelerator.end_training()
sys.exit(85)
"""


def task(rank: int, tasks: int, folder: Path) -> dict[str, str]:
    """The environment of a task of srun, one task to a node, with a ``scontrol`` that knows the nodes."""
    nodes = f"n[1-{tasks}]"
    fake(folder / "bin", "scontrol", f'[ "$*" = "show hostnames {nodes}" ] && printf "127.0.0.1\\nother\\n"')
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "SLURM_", "OMP_", "MASTER_"))
    }
    return inherited | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{tasks})",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "MASTER_PORT": str(free_port()),
    }


def start_rank(env: dict[str, str], config: str, script: Path, *arguments: str) -> subprocess.Popen:
    config = str(ROOT / "accelerate_configs" / config)
    command = [sys.executable, str(ROOT / "slurm/rank.py"), "--config_file", config, str(script), *arguments]
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def line_of(process: subprocess.Popen, start: str) -> str:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(start):
            return line
    raise AssertionError(f"ended with status {process.wait()} before a line {start!r}:\n{''.join(lines)}")


def test_two_tasks_are_one_group_and_a_signal_to_one_of_them_reaches_both_exit_statuses(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RANK_SCRIPT.format(root=str(ROOT)))
    envs = [task(rank, 2, tmp_path) for rank in range(2)]
    envs[1]["MASTER_PORT"] = envs[0]["MASTER_PORT"]
    processes = [start_rank(env, "cpu_2proc.yaml", script, "--eps", "4") for env in envs]
    try:
        for process in processes:
            assert line_of(process, "group") == "group [0, 1] local 0 threads 1 ['--eps', '4']\n"
        processes[1].send_signal(signal.SIGUSR1)
        for process in processes:
            line_of(process, "leaving")
            process.send_signal(signal.SIGTERM)  # as srun does with the rest when the first rank has left
        assert [process.wait(timeout=120) for process in processes] == [85, 85]
    finally:
        for process in processes:
            process.kill()


def test_a_task_that_is_told_to_go_before_the_script_can_save_asks_for_another_start(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, time\nprint('single', 'RANK' in os.environ, flush=True)\ntime.sleep(60)\n")
    process = start_rank(task(0, 1, tmp_path), "cpu.yaml", script)
    try:
        assert line_of(process, "single") == "single False\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 85
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "accelerate_configs").glob("*.yaml")))
def test_a_config_means_the_same_to_a_task_as_to_accelerate_launch(config, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os\nif os.environ.get('RANK', '0') == '0':\n    print('environment', json.dumps(\n"
        "        {k: v for k, v in sorted(os.environ.items())\n"
        "         if k.startswith(('ACCELERATE_', 'FSDP_', 'OMP_', 'RANK'))}), flush=True)\n"
    )
    processes = re.search(r"num_processes: (\d+)", (ROOT / "accelerate_configs" / config).read_text()).group(1)
    env = task(0, int(processes), tmp_path) | {"OMP_NUM_THREADS": "1"}
    mine = line_of(start_rank(env, config, script), "environment")
    launched = run_script(str(script), launcher=accelerate_launch(ROOT / "accelerate_configs" / config))
    assert mine in launched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train_lore.py"], "--config_file: missing"),
        (["--config_file", "none.yaml", "train_lore.py"], "none.yaml"),
        (["--config_file", "accelerate_configs/cpu.yaml", "train_lora.py"], "train_lora.py: no such script"),
        (["--config_file", "accelerate_configs/cpu.yaml"], "required: training_script"),
        (["--config_file", "requirements.txt", "train_lore.py"], "requirements.txt"),
    ],
)
def test_mistakes_in_the_command_become_one_line(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=re.escape(message)):
        parse_command(arguments, 2)


def test_without_slurm_the_line_says_what_to_use(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    output = run_script("slurm/rank.py", "train_lore.py", status=2)
    assert output.count("\n") == 1
    assert "accelerate launch" in output


def test_a_master_without_an_address_and_a_node_without_scontrol_are_told(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.invalid"):
        master({"MASTER_ADDR": "nowhere.invalid"})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"scontrol show hostnames n1: .* set MASTER_ADDR"):
        master({"SLURM_STEP_NODELIST": "n1"})


def test_jobs_and_steps_meet_at_ports_of_their_own():
    def port(job: int, step: int) -> int:
        return int(
            master({"MASTER_ADDR": "127.0.0.1", "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
        )

    ports = {port(job, step) for job in range(4_000_000, 4_000_050) for step in range(32)}
    assert len(ports) == 50 * 32
    assert 1024 < min(ports) <= max(ports) < 32768


def test_tasks_of_a_node_and_their_cpus():
    assert tasks_per_node("4(x2),1") == [4, 4, 1]
    assert task_cpus({"SLURM_CPUS_ON_NODE": "10"}, 4) == 2
    assert task_cpus({"SLURM_CPUS_ON_NODE": "10", "SLURM_CPUS_PER_TASK": "7"}, 1) == 7


def test_a_task_bound_to_its_own_cpus_does_not_share_them_once_more(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert default_num_workers() == 5
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # one task that started all processes
    assert default_num_workers() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(256)))
    assert (default_num_workers(), default_num_workers(8)) == (32, 8)


# The jobs, with stand-ins for SLURM's commands that write down how they were called.


def fake(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def submit(tmp_path):
    """submit(script, *flags, status=, state=, **env) -> the job's Popen; its calls are lines in tmp_path/calls."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    record = 'printf "%s\\n" "$(basename "$0") $*" >> calls'
    fake(tmp_path / "bin", "srun", f"{record}; sleep ${{SRUN_SECONDS:-0}}; exit $STATUS")
    fake(tmp_path / "bin", "squeue", "echo $STATE")
    for name in ("scontrol", "python"):
        fake(tmp_path / "bin", name, record)

    def start(script: str, *flags: str, status: int = 0, state: str = "RUNNING", **env: str) -> subprocess.Popen:
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "3"}
        if "array" in script:
            job |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
        path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
        env = {"PATH": path, "STATUS": str(status), "STATE": state} | job | env
        command = ["bash", str(tmp_path / "slurm" / script), *flags]
        return subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stderr=subprocess.PIPE)

    (tmp_path / "calls").touch()
    return start


@pytest.mark.parametrize("script", SBATCH)
def test_a_job_is_requeued_exactly_when_its_ranks_ask_for_it_while_it_runs(script, submit, tmp_path):
    job = "7_1" if "array" in script else "7"
    for status, state in [(0, "RUNNING"), (1, "RUNNING"), (2, "RUNNING"), (137, "RUNNING"), (143, "RUNNING")]:
        assert submit(script, status=status, state=state).wait() == status
    submit(script, status=85, state="COMPLETING").wait()  # after scancel
    assert "scontrol" not in (tmp_path / "calls").read_text()
    assert submit(script, status=85, state="RUNNING").wait() == 0
    assert (tmp_path / "calls").read_text().splitlines()[-1] == f"scontrol requeue {job}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_batch_shell_outlives_a_signal_until_its_ranks_have_ended(number, submit, tmp_path):
    process = submit(TRAINING[0], status=85, SRUN_SECONDS="1")
    while "srun" not in (tmp_path / "calls").read_text():
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == 0
    assert "scontrol requeue 7" in (tmp_path / "calls").read_text()


def test_a_job_whose_starts_add_no_checkpoint_gives_up(submit, tmp_path):
    def starts(restarts: range) -> list[int]:
        return [
            submit(TRAINING[0], "--output_dir", "run", status=85, SLURM_RESTART_COUNT=str(number)).wait()
            for number in restarts
        ]

    assert starts(range(3)) == [0, 0, 0]
    (tmp_path / "run/checkpoints/step-1").mkdir(parents=True)
    assert starts(range(3, 7)) == [0, 0, 0, 1]
    assert (tmp_path / "calls").read_text().count("srun") == 6  # the last one started nothing


@pytest.mark.parametrize("script", SBATCH)
def test_the_flags_of_a_job_are_flags_of_its_script_and_those_of_the_command_line_win(script, submit, tmp_path):
    flags = ["--output_dir", "elsewhere"]
    flags += ["--model", "m", "--data", "d"] if script == "evaluate.sbatch" else ["--eps", "2"]
    assert submit(script, *flags).wait() == 0
    words = (tmp_path / "calls").read_text().split()
    assert "--cpus-per-task=3" in words
    argv = words[next(i for i, word in enumerate(words) if word in ("train_lore.py", "evaluate.py")) + 1 :]
    if script == "evaluate.sbatch":
        assert parse_settings(evaluate.Settings, argv).output_dir == "elsewhere"
        return
    settings = parse_settings(train_lore.Settings, argv)
    array = "array" in script
    assert settings.output_dir == ("elsewhere/rho-0.05" if array else "elsewhere")
    assert (settings.rho, settings.eps, settings.resume_from_checkpoint) == (0.05 if array else 0.1, 2, "latest")


RECIPE_JOBS = [
    *((script, train_lore, "lore_vit-b-32_cifar10", {"seed": 3, "rho": 0.01}) for script in [*TRAINING, "prefetch.sh"]),
    *(
        (script, train_po, "dpo_typographic_vit-b-32_imagenet-100", {"seed": 3})
        for script in ("train_single_node.sbatch", "prefetch.sh")
    ),
]


@pytest.mark.parametrize(("script", "trainer", "name", "own"), RECIPE_JOBS)
def test_a_recipe_is_run_by_its_trainer_and_nothing_of_the_settings_wins_over_it(
    script, trainer, name, own, submit, tmp_path
):
    recipe = ROOT / f"recipes/{name}.yaml"
    assert submit(script, "--config", str(recipe), *flags(own)).wait() == 0
    words = (tmp_path / "calls").read_text().split()
    found = parse_settings(trainer.Settings, words[words.index(f"{trainer.__name__}.py") + 1 :])
    array = "array" in script
    expected = parse_settings(
        trainer.Settings, ["--config", str(recipe), *flags(own | ({"rho": 0.05} if array else {}))]
    )
    if script == "prefetch.sh":
        assert found.prefetch
    else:
        assert found.output_dir == f"runs/{name}" + ("/rho-0.05" if array else "")
    free = {"output_dir", "cache_dir", "resume_from_checkpoint", "prefetch"}
    assert {key for key, value in vars(found).items() if value != vars(expected)[key]} <= free


def test_a_recipe_that_is_missing_ends_the_job_and_one_with_urls_needs_a_shared_cache(submit, tmp_path):
    missing = submit(TRAINING[0], "--config", "none.yaml")
    assert missing.wait() == 2
    assert missing.stderr.read() == "error: --config none.yaml: cannot be read; expected a recipe as in recipes/\n"
    recipe = tmp_path / "own.yaml"
    recipe.write_text('# see https://example.org/\noutput_dir: "runs/mine"  # quoted\n')
    assert submit("prefetch.sh", f"--config={recipe}").wait() == 0  # a comment is no shard
    assert submit(TRAINING[0], f"--config={recipe}").wait() == 0
    assert "--output_dir runs/mine --resume" in (tmp_path / "calls").read_text()
    recipe.write_text("train_shards: https://example.org/a.tar\n")
    assert submit("prefetch.sh", f"--config={recipe}").wait() == 2
    assert submit(TRAINING[0], f"--config={recipe}").wait() == 0
    assert "--output_dir runs/own --resume" in (tmp_path / "calls").read_text()


def test_prefetch_refuses_to_fill_a_cache_that_no_compute_node_sees(submit, tmp_path):
    flags = ["--train_shards", "https://example.org/a.tar"]
    refused = submit("prefetch.sh", *flags)
    assert refused.wait() == 2
    assert refused.stderr.read().count("\n") == 1
    assert submit("prefetch.sh", *flags, CACHE_DIR="shared").wait() == 0
    call = (tmp_path / "calls").read_text()
    assert "--cache_dir shared --train_shards https://example.org/a.tar" in call
    assert call.rstrip().endswith("--prefetch true")


def test_trainers_ranks_and_jobs_mean_the_same_status_and_signals():
    # rank.py cannot import them: it catches the signals before it imports torch.
    assert (slurm_rank.REQUEUE, slurm_rank.SIGNALS) == (interruption.REQUEUE, interruption.SIGNALS)
    assert f"\nrequeue_status={interruption.REQUEUE}\n" in (ROOT / "slurm/requeue.sh").read_text()


def test_scripts_are_whole_bash():
    for path in sorted((ROOT / "slurm").glob("*.s*")):
        subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.slow
def test_a_requeued_run_on_two_nodes_is_the_undisturbed_run():
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True, timeout=60).returncode:
        pytest.skip("no SLURM here: sinfo is missing or finds no controller")
    result = subprocess.run(
        [str(ROOT / "slurm/try_requeue.sh")], cwd=ROOT, text=True, capture_output=True, timeout=3600
    )
    assert result.returncode == 0, result.stdout + result.stderr
