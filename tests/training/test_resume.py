"""A run that was stopped or killed, and went on, ends as the run that was not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

import train_lore
import utils.training.run
from tests.conftest import ROOT, accelerate_launch, run_script
from tests.train_several import train
from tests.warm_python import script_environment, warm_python
from utils.errors import UserError
from utils.processes.interruption import REQUEUE

KILLS = 12


@pytest.fixture
def arguments(small_clip, digits, tmp_path):
    """The command line of a LORE run of six steps with data workers, accumulation and epochs of four steps."""

    def make(output_dir, processes=1, **changes):
        settings = {
            "model_name_or_path": small_clip, "train_shards": digits / "train", "output_dir": output_dir,
            "cache_dir": tmp_path / "cache", "resume_from_checkpoint": "latest", "train_num_samples": 36,
            "max_steps": 6, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4 // processes,
            "checkpoint_steps": 2, "checkpoints_total_limit": 2, "logging_steps": 1, "attack_steps": 2, "eps": 8,
            "learning_rate": 1e-3, "num_workers": 2, "report_to": "none",
        } | changes  # fmt: skip
        return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]

    return make


def weights(run_dir):
    return load_file(run_dir / "model.safetensors")


def rows(run_dir):
    own = {"images_per_second", "peak_memory_gib", "data_wait_fraction", "launch"}
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in own} for line in lines]


def difference(one, two):
    first, second = weights(one), weights(two)
    return max((second[name] - tensor).abs().max().item() for name, tensor in first.items())


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw_8bit"}])
def test_a_stopped_run_goes_on_to_the_same_end(arguments, tmp_path, changes):
    """Within an epoch, at its end, between two regular checkpoints; with 8-bit optimizer state too. Bitwise."""
    assert train("train_lore", arguments(tmp_path / "whole", **changes)) == 0
    for step in (3, 4, 5):
        assert train("train_lore", arguments(tmp_path / "cut", **changes), stop_in_step=step) == REQUEUE
        assert (tmp_path / f"cut/checkpoints/step-{step}").is_dir()
        assert not (tmp_path / "cut/model.safetensors").exists()
    assert train("train_lore", arguments(tmp_path / "cut", **changes)) == 0
    assert difference(tmp_path / "whole", tmp_path / "cut") == 0
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_signal_while_the_model_is_loaded_or_saved(arguments, tmp_path, monkeypatch):
    """Before the first step there is nothing to save; after the last one the run is finished."""

    def told(real):
        def and_then(*words):
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*words)

        return and_then

    monkeypatch.setattr(train_lore, "load_reference", told(train_lore.load_reference))
    assert train("train_lore", arguments(tmp_path / "run", checkpoint_steps=0)) == REQUEUE
    assert not (tmp_path / "run/checkpoints").exists()
    monkeypatch.undo()
    monkeypatch.setattr(utils.training.run, "publish_model", told(utils.training.run.publish_model))
    assert train("train_lore", arguments(tmp_path / "run", checkpoint_steps=0, max_steps=1)) == 0
    assert (tmp_path / "run/model.safetensors").exists()


def test_other_samples_are_refused_and_lost_ones_keep_their_place(arguments, digits, tmp_path):
    shards = shutil.copytree(digits / "train", tmp_path / "shards")
    (shards / "sizes.json").unlink()
    names = sorted(shards.glob("*.tar"))
    more = names[-1].rename(tmp_path / "more.tar")
    common = {"train_shards": f"{shards}/{{000000..{names[-2].stem}}}.tar", "max_bad_fraction": 1}
    assert train("train_lore", arguments(tmp_path / "run", **common), stop_in_step=2) == REQUEUE
    names[0].unlink()
    (tmp_path / "cache").rename(tmp_path / "old cache")
    assert train("train_lore", arguments(tmp_path / "run", **common), stop_in_step=4) == REQUEUE
    shutil.copy(more, names[0])
    with pytest.raises(UserError, match="the shards hold other samples than when the run was started"):
        train("train_lore", arguments(tmp_path / "run", **common))


def test_sigterm_ends_a_script_with_the_requeue_status(arguments, tmp_path):
    command = [sys.executable, str(ROOT / "train_lore.py"), *arguments(tmp_path / "run", max_steps=500)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("LORE 3/"):
            process.send_signal(signal.SIGTERM)
    assert process.wait() == REQUEUE, lines
    assert "SIGTERM after step" in lines[-1]
    assert f"(exit status {REQUEUE})" in lines[-1]


# Stands in for a trainer: two lines per rank, its process and, at the signal, what it would save.
STAND_IN = """
import os, signal, sys
def leave(*_):
    os.write(1, b"saved\\n")
    os._exit(85)
signal.signal(signal.SIGTERM, leave)
os.write(1, f"rank {os.environ.get('RANK', 0)} is {os.getpid()}\\n".encode())
while True:
    signal.pause()
"""
ACCELERATE = ("-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "accelerate_configs/cpu.yaml")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
# The launcher, whether SIGTERM goes to it and not to a rank, its exit status, and what it prints. docs/reliability.md
STOPPED = {
    "accelerate": (ACCELERATE, False, 1, "CalledProcessError"),
    "accelerate --quiet": ((*ACCELERATE, "--quiet"), False, 1, None),
    "torchrun": (TORCHRUN, False, 1, "ChildFailedError"),
    "torchrun itself": (TORCHRUN, True, 1, "SignalException"),
    "accelerate itself": (ACCELERATE, True, -signal.SIGTERM, None),
}


@pytest.mark.parametrize("name", STOPPED)
def test_no_launcher_passes_the_requeue_status_on(tmp_path, name):
    """And accelerate launch of one process does not pass SIGTERM on."""
    launcher, itself, status, printed = STOPPED[name]
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    # The fork of a warm Python takes what it started along when it ends.
    python = sys.executable if name == "accelerate itself" else warm_python()
    process = subprocess.Popen(
        [python, *launcher, str(tmp_path / "stand_in.py")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=script_environment(),
    )  # fmt: skip
    ranks, lines = [], []
    for line in process.stdout:
        lines.append(line)
        if " is " in line and line.startswith("rank "):
            ranks.append(int(line.split()[-1]))
            if len(ranks) == (2 if launcher == TORCHRUN else 1):
                os.kill(process.pid if itself else ranks[0], signal.SIGTERM)
                if name == "accelerate itself":
                    assert process.wait() == status
                    os.kill(ranks[0], signal.SIGTERM)  # it went on; now the output ends
    output = "".join(lines)
    assert process.wait() == status, output
    assert output.count("saved") == len(ranks)
    assert ("Traceback" in output) == (printed is not None)
    assert printed is None or printed in output


def killed_run(command, moment):
    """Starts a run in a group of its own and kills all of it ``moment`` seconds after its first step began."""
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=script_environment()
    )
    for line in process.stderr:
        if "steps 0 to" in line:
            break
    time.sleep(moment)
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    return running


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_equal(arguments, tmp_path):
    """SIGKILL to trainer and data workers together, also while a checkpoint is written; a checkpoint at every step."""
    common = {"checkpoint_steps": 1, "max_steps": 12}

    def command(name):
        return [warm_python(), str(ROOT / "train_lore.py"), *arguments(tmp_path / name, **common)]

    started = time.monotonic()
    assert not killed_run(command("whole"), 60)
    begun = (tmp_path / "whole/.lock").stat().st_mtime  # training takes most of what follows
    duration = min(time.monotonic() - started, (tmp_path / "whole/model.safetensors").stat().st_mtime - begun)
    moments = random.Random(0)
    plan = [(f"killed-{number}", moments.uniform(0, duration)) for number in range(KILLS)]

    def kill_and_resume(entry):
        name, moment = entry
        killed = killed_run(command(name), moment)
        left = sorted(path.name for path in (tmp_path / name).glob("checkpoints/*"))
        run_script("train_lore.py", *arguments(tmp_path / name, **common))
        equal = difference(tmp_path / "whole", tmp_path / name) == 0 and rows(tmp_path / name) == rows(
            tmp_path / "whole"
        )
        hidden = [path.name for path in (tmp_path / name).rglob(".*") if path.name != ".lock"]
        return name, moment, killed, left, equal, hidden

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(kill_and_resume, plan))
    for name, moment, killed, left, _, _ in outcomes:
        print(f"{name}: {moment:.2f} s after the start of training, killed {killed}, found {left}")
    assert all(equal and not hidden for *_, equal, hidden in outcomes), outcomes
    assert sum(killed for _, _, killed, *_ in outcomes) > KILLS / 2


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["cpu_2proc", "zero2_cpu_2proc", "zero3_cpu_2proc"])
def test_any_sharding_resumes_and_so_does_any_other_number_of_processes(arguments, tmp_path, sharding):
    """AdamW, whose state would be missed: without it the embeddings end 1e-3 apart."""
    common = {"num_workers": 0, "learning_rate": 1e-4, "max_steps": 4}

    def entry(name, processes=2, **changes):
        return {"trainer": "train_lore", "arguments": arguments(tmp_path / name, processes, **common, **changes)}

    def run_on_two(*entries):
        (tmp_path / "plan.json").write_text(json.dumps(entries))
        run_script(
            "tests/train_several.py",
            tmp_path / "plan.json",
            launcher=accelerate_launch(ROOT / "accelerate_configs" / f"{sharding}.yaml"),
        )

    assert train(**entry("one", 1)) == 0
    assert train(**entry("one to two", 1), stop_in_step=2) == REQUEUE
    eight_bit = {"optimizer": "adamw_8bit"}
    runs = [
        entry("two"),
        entry("two to one") | {"stop_in_step": 2},
        entry("two again") | {"stop_in_step": 2},
        entry("two again"),
        entry("one to two"),
        entry("8-bit", **eight_bit),
        entry("8-bit again", **eight_bit) | {"stop_in_step": 2},
    ]
    run_on_two(*runs)
    shutil.copytree(tmp_path / "8-bit again", tmp_path / "8-bit to one")
    run_on_two(entry("8-bit again", **eight_bit))
    assert train(**entry("two to one", 1)) == 0

    assert difference(tmp_path / "two", tmp_path / "two again") == 0
    assert difference(tmp_path / "8-bit", tmp_path / "8-bit again") == 0
    for name in ("two", "two to one", "one to two"):
        print(f"{sharding} {name}: embeddings {embeds_error(tmp_path / 'one', tmp_path / name):.1e}")
        # Weights differ by whole updates of 1e-4, which AdamW makes of the rounding of gradients that are zero.
        assert embeds_error(tmp_path / "one", tmp_path / name) < 1e-5
    command = ["train_lore.py", *entry("8-bit to one", 1, **eight_bit)["arguments"]]
    if sharding == "cpu_2proc":
        run_script(*command)
    else:
        output = run_script(*command, status=2)
        assert "8-bit optimizer state fits the sharding that it was saved under alone" in output
        whole = entry("8-bit whole", 1, **eight_bit)
        assert train(**whole, stop_in_step=2) == REQUEUE
        words = entry("8-bit whole", **eight_bit)["arguments"]
        config = accelerate_launch(ROOT / "accelerate_configs" / f"{sharding}.yaml")
        output = run_script("train_lore.py", *words, launcher=config, status=1)  # the launcher's; the trainer's is 2
        assert "8-bit optimizer state fits the sharding that it was saved under alone" in output


def embeds_error(one, two):
    from tests.small_models import photos, small_encoder

    with torch.no_grad():
        return (small_encoder(one)(photos(8)) - small_encoder(two)(photos(8))).abs().max().item()
