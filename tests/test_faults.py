"""What goes wrong in long runs, done to real ones: each ends in one clear line or goes on to the same end.

Nothing is lost. docs/reliability.md has the table of what is done here and how it ends.
"""

import errno
import logging
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

import train_lore
import train_po
import utils.data.shards
import utils.data.workers
import utils.models.policy
import utils.processes.interruption
import utils.training.checkpoint
import utils.training.run
from tests.conftest import ROOT, free_port, run_script, two_processes
from tests.shard_maker import ShardServer
from tests.small_models import save_scaled, save_small_clip
from utils.data.shards import eval_loader
from utils.errors import UserError
from utils.models.published import load_model
from utils.processes.interruption import REQUEUE, SIGNALS
from utils.training.checkpoint import damage, last_checkpoint
from utils.training.state import load_parameters, read_tensors


@pytest.fixture
def arguments(small_clip, digits, tmp_path):
    """The command line of a LORE run of six steps; keyword arguments change it."""

    def make(**changes):
        settings = {
            "model_name_or_path": small_clip, "train_shards": digits / "train", "output_dir": tmp_path / "run",
            "cache_dir": tmp_path / "cache", "max_steps": 6, "per_device_train_batch_size": 8, "checkpoint_steps": 2,
            "logging_steps": 1, "attack_steps": 2, "primal_steps": 2, "eps": 8, "learning_rate": 1e-3, "num_workers": 0,
            "report_to": "none",
        } | changes  # fmt: skip
        return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]

    return make


@pytest.fixture
def in_step(monkeypatch):
    """``in_step(trainer, {3: action})`` calls ``action()`` when step 3 begins."""

    def arrange(trainer, actions):
        learning_rate, left = utils.training.run.cosine_learning_rate, dict(actions)

        def hook(step, *rest):
            if step + 1 in left:
                left.pop(step + 1)()
            return learning_rate(step, *rest)

        monkeypatch.setattr(utils.training.run, "cosine_learning_rate", hook)

    return arrange


def weights(run_dir):
    return load_file(run_dir / "model.safetensors")


def assert_equal(one, two):
    found = weights(two)
    assert all(found[name].equal(tensor) for name, tensor in weights(one).items())


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------------------ data


def test_a_killed_data_worker_is_replaced_and_nothing_changes(arguments, tmp_path, in_step, caplog):
    train_lore.main(arguments(output_dir=tmp_path / "whole", max_steps=12))

    def kill_one():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    in_step(train_lore, {2: kill_one, 5: kill_one})
    train_lore.main(arguments(num_workers=2, max_steps=12))
    assert_equal(tmp_path / "whole", tmp_path / "run")
    assert "a data worker has died" in caplog.text


def test_data_workers_that_always_die_end_the_run(arguments, monkeypatch):
    def dies(self, reference):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(utils.data.shards.ShardDataset, "__getitem__", dies)
    monkeypatch.setattr(utils.data.shards, "WORKER_DEATHS", 1)
    with pytest.raises(UserError, match=r"--num_workers 1: data workers die again and again .*use fewer"):
        train_lore.main(arguments(num_workers=1))


def test_a_killed_data_worker_of_an_evaluation_is_one_line(small_clip, digits, tmp_path):
    program = """
import os, signal, evaluate, utils.data.shards
from utils.cli import run
utils.data.shards.ShardDataset.__getitem__ = lambda self, reference: os.kill(os.getpid(), signal.SIGKILL)
run(evaluate.main)
"""
    words = ["--model", small_clip, "--data", digits, "--num_workers", "1", "--output_dir", tmp_path / "run"]
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], cwd=ROOT, text=True, capture_output=True, timeout=120
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert "a data worker has died" in line


@pytest.mark.parametrize("fault", ["vanishes", "is cut"])
def test_a_shard_lost_in_the_middle_of_an_epoch(arguments, digits, tmp_path, in_step, capfd, fault):
    """Counted, and replaced by other samples; past --max_bad_fraction the run ends with the list."""
    shards = shutil.copytree(digits / "train", tmp_path / "shards")
    lost = sorted(shards.glob("*.tar"))[0]
    before = shutil.copy(lost, tmp_path / "before.tar")

    def break_it():
        lost.unlink() if fault == "vanishes" else os.truncate(lost, lost.stat().st_size // 2)

    in_step(train_lore, {2: break_it})
    # Files stay open: only a limit on them makes a vanished one be asked for again.
    utils.data.shards.OPEN_SHARDS, limit = 1, utils.data.shards.OPEN_SHARDS
    try:
        common = {"train_shards": shards, "max_steps": 20, "checkpoint_steps": 5}
        train_lore.main(arguments(max_bad_fraction=1, **common))
        assert "skipped in all: " in capfd.readouterr().err
        shutil.copy(before, lost)
        in_step(train_lore, {2: break_it})
        with pytest.raises(UserError, match=r"--max_bad_fraction 0.01: .*(missing|damaged) shard.*000000.tar"):
            train_lore.main(arguments(output_dir=tmp_path / "stopped", **common))
    finally:
        utils.data.shards.OPEN_SHARDS = limit


def test_a_slow_shard_is_waited_for_with_a_word(arguments, digits, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    train_lore.main(arguments(output_dir=tmp_path / "near", train_shards=digits / "train" / "000000.tar"))
    assert "waiting for data" not in caplog.text
    with ShardServer(digits / "train") as server:
        server.delay = 1.5
        monkeypatch.setattr(utils.data.workers, "SLOW_BATCH", 0.5)
        (tmp_path / "far").mkdir()
        train_lore.main(
            arguments(output_dir=tmp_path / "slow", train_shards=f"{server.url}/000000.tar", cache_dir=tmp_path / "far")
        )
        index_then_read = caplog.text
        shutil.rmtree(tmp_path / "far/shards")  # known, but not here any more: fetched while the run waits
        train_lore.main(
            arguments(
                output_dir=tmp_path / "again", train_shards=f"{server.url}/000000.tar", cache_dir=tmp_path / "far"
            )
        )
    assert "waiting for data since" in caplog.text.removeprefix(index_then_read)
    assert_equal(tmp_path / "near", tmp_path / "slow")
    assert_equal(tmp_path / "near", tmp_path / "again")


@pytest.fixture
def signals_as_before():
    """A run that was told to stop leaves its handlers to the end of the process."""
    numbers = (*SIGNALS, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.fixture
def stuck_after(monkeypatch):
    """``stuck_after(32)``: whoever reads a later sample than so many of the run sleeps for ever, as on a dead disk."""
    real = utils.data.shards.ShardDataset.__getitem__

    def arrange(samples):
        def read(self, reference):
            if self.order == "shuffled" and reference[1] >= samples:
                time.sleep(60)
            return real(self, reference)

        monkeypatch.setattr(utils.data.shards.ShardDataset, "__getitem__", read)
        return lambda: monkeypatch.setattr(utils.data.shards.ShardDataset, "__getitem__", real)

    yield arrange
    for worker in multiprocessing.active_children():
        worker.kill()
    utils.data.workers._ABANDONED.clear()


def test_data_that_never_comes_ends_the_run_and_keeps_the_last_checkpoint(
    arguments, tmp_path, monkeypatch, stuck_after
):
    """riga/law#184: a worker that delivers nothing is named, with the shards that it reads."""
    stuck_after(16)
    monkeypatch.setattr(utils.data.workers, "LONGEST_WAIT", 2.0)
    expected = r"data worker 0 \(process \d+\) has delivered nothing for 2 s; its batch is read from .*\d\.tar"
    with pytest.raises(UserError, match=expected):
        train_lore.main(arguments(num_workers=1))
    assert checkpoints(tmp_path / "run") == ["step-2"]


@pytest.mark.parametrize("trainer", [train_lore, train_po])
def test_a_signal_is_heard_while_the_run_waits_for_data(
    arguments, tmp_path, monkeypatch, stuck_after, signals_as_before, trainer
):
    """riga/law#184. It goes back to the last whole step, saves it, and the run that goes on ends like any other."""
    unknown = {"--attack_steps", "--primal_steps", "--eps"} if trainer is train_po else ()

    def words(**changes):
        given = arguments(checkpoint_steps=0, max_steps=4, **changes)
        return [word for pair in zip(given[::2], given[1::2]) if pair[0] not in unknown for word in pair]

    trainer.main(words(output_dir=tmp_path / "whole"))
    monkeypatch.setattr(utils.processes.interruption, "GRACE", 0.2)
    mend = stuck_after(24)
    timed = threading.Timer(0, lambda: None)

    def tell(step, *rest):
        nonlocal timed
        if step == 3:  # whose batch does not come
            timed = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
            timed.start()
        return real(step, *rest)

    real = utils.training.run.cosine_learning_rate
    monkeypatch.setattr(utils.training.run, "cosine_learning_rate", tell)
    with pytest.raises(SystemExit) as stopped:
        trainer.main(words(num_workers=1))
    timed.join()
    assert stopped.value.code == REQUEUE
    assert checkpoints(tmp_path / "run") == ["step-3"]
    mend()
    monkeypatch.setattr(utils.training.run, "cosine_learning_rate", real)
    utils.training.checkpoint._LOCKS.clear()
    trainer.main(words(resume_from_checkpoint="latest"))
    assert_equal(tmp_path / "whole", tmp_path / "run")


def test_a_signal_to_a_data_worker_is_not_for_it(arguments, tmp_path, monkeypatch, signals_as_before):
    """A scheduler may signal every process; a worker that gave up would end the run in place of the step that saves."""
    real, trainer = utils.data.shards.ShardDataset.__getitem__, os.getpid()

    def read(self, reference):
        if os.getpid() != trainer:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        return real(self, reference)

    monkeypatch.setattr(utils.processes.interruption, "GRACE", 0.1)
    monkeypatch.setattr(utils.data.shards.ShardDataset, "__getitem__", read)
    train_lore.main(arguments(num_workers=1, max_steps=3, checkpoint_steps=0))
    assert (tmp_path / "run/model.safetensors").exists()


def test_a_signal_ends_a_run_that_does_not_come_to_its_first_step(arguments, monkeypatch, capfd, signals_as_before):
    def load(*words):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(60)

    monkeypatch.setattr(utils.processes.interruption, "GRACE", 0.2)
    monkeypatch.setattr(train_lore, "load_model", load)
    with pytest.raises(SystemExit) as stopped:
        train_lore.main(arguments())
    assert stopped.value.code == REQUEUE
    assert "SIGHUP before the first step: nothing new to save (exit status 85)" in capfd.readouterr().err


def test_a_signal_ends_an_evaluation_whose_data_does_not_come(
    arguments, digits, tmp_path, monkeypatch, signals_as_before
):
    real = utils.data.shards.ShardDataset.__getitem__

    def read(self, reference):
        if self.order == "sequential" and passes.count(1) > 2:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(60)
        return real(self, reference)

    passes = []
    monkeypatch.setattr(
        utils.training.run, "eval_loader", lambda *data, **more: (passes.append(1), eval_loader(*data, **more))[1]
    )
    monkeypatch.setattr(utils.data.shards.ShardDataset, "__getitem__", read)
    monkeypatch.setattr(utils.processes.interruption, "GRACE", 0.2)
    with pytest.raises(SystemExit) as stopped:
        train_lore.main(arguments(eval_shards=digits / "test", eval_steps=1, eval_num_samples=8, checkpoint_steps=0))
    assert stopped.value.code == REQUEUE
    assert checkpoints(tmp_path / "run") == ["step-1"]


@pytest.mark.slow
def test_a_signal_to_a_process_without_data_leads_all_out(arguments, tmp_path):
    """On one of two its data does not come; the other waits for it in a collective, where it hears nothing."""
    program = """
import os, signal, sys, threading, time
import utils.data.shards, train_lore
from utils.cli import run
if os.environ["RANK"] == "1":
    real = utils.data.shards.ShardDataset.__getitem__
    def read(self, reference):
        if reference[1] >= 24:
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(60)
        return real(self, reference)
    utils.data.shards.ShardDataset.__getitem__ = read
run(train_lore.main)
"""
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments(per_device_train_batch_size=4, checkpoint_steps=0)],
            cwd=ROOT, env=os.environ | group | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [process.wait(timeout=120) for process in processes] == [REQUEUE, REQUEUE]
    assert checkpoints(tmp_path / "run") == ["step-3"]


def test_a_long_temporary_folder_does_no_harm(arguments, tmp_path, monkeypatch):
    """riga/law#184: data workers hand tensors over by sockets in it, whose paths have at most 107 bytes."""
    folder = tmp_path / ("t" * 120)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", None)
    monkeypatch.setattr(utils.data.workers, "LONGEST_WAIT", 30.0)
    train_lore.main(arguments(num_workers=1, max_steps=1))
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", None)
    monkeypatch.setattr(utils.data.workers, "LONGEST_SOCKET", 32)
    with pytest.raises(UserError, match=r"TMPDIR .*: data workers need a folder for sockets.*--num_workers 0"):
        utils.data.workers._short_socket_folder()


def test_a_pipe_is_no_shard(arguments, digits, tmp_path):
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(UserError, match=r"no readable sample in 1 shard, first: .*0\.tar \(not a regular file\)"):
        train_lore.main(arguments(train_shards=tmp_path / "0.tar", model_name_or_path="x"))


def test_more_processes_than_shards(arguments, digits, tmp_path):
    one = digits / "train" / "000000.tar"
    train_lore.main(arguments(output_dir=tmp_path / "one", train_shards=one, max_steps=2))
    run_script(
        "train_lore.py",
        *arguments(train_shards=one, max_steps=2, per_device_train_batch_size=4, num_workers=2),
        launcher=two_processes(),
    )
    first, second = weights(tmp_path / "one"), weights(tmp_path / "run")
    assert max((second[name] - tensor).abs().max() for name, tensor in first.items()) < 5e-3  # AdamW on rounding


# ------------------------------------------------------------------------------------------------- processes


def test_a_killed_process_ends_the_others_with_a_line(arguments, tmp_path):
    """Started as srun does, without a launcher that would clean up."""
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(ROOT / "train_lore.py"), *arguments(max_steps=500, per_device_train_batch_size=4)]
    processes = [
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | group | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for line in processes[0].stderr:
        if line.startswith("LORE 3/"):
            break
    processes[1].kill()
    killed = time.monotonic()
    rest = processes[0].stderr.read()
    assert processes[0].wait(timeout=60) == 1
    assert time.monotonic() - killed < 30
    (said,) = [
        line for line in rest.splitlines() if "error" in line or "another process" in line or "Traceback" in line
    ]
    assert "rank 0: another process of the run has ended or does not answer" in said
    assert "--resume_from_checkpoint latest" in said
    assert damage(last_checkpoint(tmp_path / "run")) is None


def test_one_directory_is_for_one_run_and_a_killed_run_leaves_it(arguments, digits, tmp_path):
    command = [sys.executable, str(ROOT / "train_lore.py"), *arguments(max_steps=500, num_workers=1)]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in first.stderr:
        if line.startswith("LORE 3/"):
            break
    again = arguments(resume_from_checkpoint="latest", max_steps=500)
    output = run_script("train_lore.py", *again, status=2)
    assert f"another run is writing there (process {first.pid} on " in output
    assert output.strip().count("\n") == 0
    output = run_script(
        "evaluate.py", "--model", again[1], "--data", digits, "--output_dir", tmp_path / "run", status=2
    )
    assert "another run is writing there" in output
    first.kill()
    first.wait()  # its data worker may live on for seconds
    with pytest.raises(UserError, match="other settings"):
        train_lore.main([*again, "--rho", "0.2"])


# ------------------------------------------------------------------------------------------------------ disk


def test_a_full_disk_keeps_the_last_checkpoint(arguments, tmp_path, monkeypatch):
    """Injected at every place where a checkpoint is written; the run that goes on ends like one that met no fault."""
    train_lore.main(arguments(output_dir=tmp_path / "whole"))
    real, calls = utils.training.checkpoint.save_file, []
    train_lore.main(arguments(output_dir=tmp_path / "counted", max_steps=2))
    monkeypatch.setattr(utils.training.checkpoint, "save_file", lambda *words: (calls.append(1), real(*words)))
    train_lore.main(arguments(output_dir=tmp_path / "counted again", max_steps=2))
    files = len(calls)
    assert files >= 4
    for full_at in range(files + 1, 2 * files + 1):
        written = []

        def save(tensors, path, written=written, full_at=full_at):
            written.append(1)
            if len(written) == full_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(tensors, path)

        monkeypatch.setattr(utils.training.checkpoint, "save_file", save)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        message = (
            r"the checkpoint of step 4 cannot be written \(No space left on device\); "
            r"the last one is .*step-2; make room"
        )
        with pytest.raises(UserError, match=message):
            train_lore.main(arguments())
        assert checkpoints(tmp_path / "run") == ["step-2"]
    monkeypatch.setattr(utils.training.checkpoint, "save_file", real)
    train_lore.main(arguments(resume_from_checkpoint="latest"))
    assert_equal(tmp_path / "whole", tmp_path / "run")


def test_a_disk_that_is_really_full(arguments, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        words = arguments(output_dir=disk / "run", checkpoints_total_limit=0, report_to="tensorboard", max_steps=20)
        output = run_script("train_lore.py", *words, status=2)
        assert "cannot be written" in output
        assert "No space left on device" in output
        assert "Traceback" not in output
        assert damage(last_checkpoint(disk / "run")) is None
        assert not list((disk / "run/checkpoints").glob(".*"))
        room = os.statvfs(disk)
        (disk / "filled").write_bytes(bytes(room.f_bavail * room.f_frsize))
        output = run_script("train_lore.py", *words, "--resume_from_checkpoint", "latest", status=2)
        assert "No space left on device" in output
        assert "Traceback" not in output
        assert damage(last_checkpoint(disk / "run")) is None
    finally:
        subprocess.run(["umount", disk], check=True)


def test_damaged_checkpoints_are_passed_over_with_a_word(arguments, tmp_path, caplog):
    train_lore.main(arguments(checkpoint_steps=1, checkpoints_total_limit=0))
    whole = shutil.copytree(tmp_path / "run", tmp_path / "whole")
    kept = tmp_path / "run/checkpoints"

    def flip(path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    flip(kept / "step-6/optimizer.exp_avg.safetensors")
    os.truncate(kept / "step-5/model/model.safetensors", 100)
    (kept / "step-4/extra.safetensors").unlink()
    (kept / "step-3/trainer_state.json").write_text('{"step": 3, "files')
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(UserError, match=r"step-6: not a whole checkpoint \(optimizer"),
    ):
        train_lore.main(arguments(resume_from_checkpoint=kept / "step-6"))
    (tmp_path / "run/model.safetensors").unlink()
    train_lore.main(arguments(resume_from_checkpoint="latest", checkpoint_steps=0))
    for step, word in ((6, "is not what was written"), (5, "has 100 bytes"), (4, "No such file"), (3, "not what was")):
        assert any(f"step-{step} is damaged and passed over" in line and word in line for line in caplog.messages)
    assert_equal(whole, tmp_path / "run")


def test_leftovers_of_a_killed_run_go_and_what_was_being_replaced_comes_back(arguments, tmp_path):
    train_lore.main(arguments(max_steps=2))
    run = tmp_path / "run"
    os.rename(run / "checkpoints/step-2", run / "checkpoints/.step-2.replaced")  # killed between two renames
    for name in (".step-4.incomplete", ".step-1.outdated"):
        shutil.copytree(run / "checkpoints/.step-2.replaced", run / "checkpoints" / name)
    with pytest.raises(UserError, match="max_steps was 2, is 6"):
        train_lore.main(arguments(resume_from_checkpoint="latest"))
    assert checkpoints(run) == ["step-2"]
    assert damage(run / "checkpoints/step-2") is None


def test_an_output_dir_that_cannot_be_written_is_one_line_before_a_model_is_loaded(arguments, tmp_path):
    (tmp_path / "file").write_text("")
    output = run_script("train_lore.py", *arguments(output_dir=tmp_path / "file/run", model_name_or_path="x"), status=2)
    assert output.count("\n") == 1
    assert "file/run: cannot be written (Not a directory); name a directory that can" in output


# ------------------------------------------------------------------------------------- what presents the model


def unsaveable(self, *words, **more):
    raise NotImplementedError("this tokenizer $\\frac$ cannot be saved")


def broken_tracker(self, values, step=None, **more):
    raise ValueError("the tracker has gone")


@pytest.mark.parametrize("trainer", [train_lore, train_po])
def test_what_presents_a_model_cannot_take_it_along(
    arguments, small_clip, digits, tmp_path, monkeypatch, caplog, trainer
):
    """nine-or-null#14, ownphotos#112, fertilizer#47: all is saved; what could not be is said in a line each.

    Names with markup, bytes that are no text; a tokenizer, a card and a tracker that fail.
    """
    model = shutil.copytree(small_clip, tmp_path / "m $x$ [/b] ünï")
    shards = os.fsdecode(os.fsencode(tmp_path) + b"/tr\xff$x$")
    os.mkdir(shards)
    shutil.copy(digits / "train/000000.tar", shards)
    shutil.copy(digits / "classnames.txt", tmp_path)
    unknown = {"--attack_steps", "--primal_steps", "--eps"} if trainer is train_po else ()

    def words(**changes):
        common = {"model_name_or_path": model, "train_shards": shards, "max_steps": 1, "checkpoint_steps": 1}
        given = arguments(**common | changes)
        return [word for pair in zip(given[::2], given[1::2]) if pair[0] not in unknown for word in pair]

    run = tmp_path / "run $x$ [b]"
    trainer.main(words(output_dir=run, report_to="tensorboard"))
    assert "tr\\udcff$x$" in (run / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(type(load_model(str(model))[1]), "save_pretrained", unsaveable)
    monkeypatch.setattr(utils.training.run, "model_card", lambda **settings: "\udcff")
    monkeypatch.setattr(TensorBoardTracker, "log", broken_tracker)
    head = {"trainable": "head"} if trainer is train_po else {}
    trainer.main(words(output_dir=tmp_path / "again", report_to="tensorboard", **head))
    for folder in (tmp_path / "again", tmp_path / "again/checkpoints/step-1/model"):
        load_model(str(folder))  # the tokenizer's files were copied
        assert not (folder / "README.md").exists()
    assert len((tmp_path / "again/metrics.jsonl").read_text().splitlines()) == 1
    for said in (
        "README.md cannot be written",
        "the processor's files cannot be written",
        "the run goes on without it",
    ):
        assert said in caplog.text


def test_a_trial_that_was_killed_is_in_nobodys_way(tmp_path):
    """A start that is killed while it tries its output_dir out leaves the trial's folders there."""
    for name in (".trial.incomplete", ".trial.outdated"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    utils.training.checkpoint.refuse_unwritable(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


IN_THE_WAY = [
    "checkpoints",
    "best",
    "train_lore",
    "metrics.jsonl/",
    "model.safetensors/",
    "README.md/",
    "checkpoints/step-2",
]


@pytest.mark.parametrize("name", [*IN_THE_WAY, b"run\xff", "n" * 200 + "/", "pipe metrics.jsonl"])
def test_an_output_that_cannot_be_written_is_refused_before_data_is_opened(arguments, tmp_path, name):
    """scarches#25: what stands in the way of checkpoints or of the final model; a path that is no UTF-8 or too long."""
    run = tmp_path / "run"
    expected = r"is in the way, the run writes a f\w+ of that name; move it away"
    if isinstance(name, bytes):
        run, expected = os.fsdecode(os.fsencode(tmp_path) + b"/" + name), r"run\\udcff: not UTF-8"
    elif name.startswith("n"):
        run, expected = tmp_path / "/".join([name.strip("/")] * 21), "its files would get names that are too long"
        run = str(run)[: os.pathconf(tmp_path, "PC_PATH_MAX") - 100]
    elif name.startswith("pipe"):
        run.mkdir()
        os.mkfifo(run / name.split()[1])
    elif name.endswith("/"):
        (run / name).mkdir(parents=True)
    else:
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text("")
    with pytest.raises(UserError, match=expected):
        train_lore.main(arguments(output_dir=run, train_shards="nowhere", resume_from_checkpoint="latest"))
    assert not list(Path(run).glob("checkpoints/.*"))


# --------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("trainer", [train_lore, train_po])
def test_not_a_number_in_a_batch_stops_the_run_and_keeps_the_last_checkpoint(arguments, tmp_path, monkeypatch, trainer):
    home = {train_lore: train_lore, train_po: utils.models.policy}[trainer]
    real, calls = home.to_pixel_values, []

    def poisoned(images, device):
        calls.append(1)
        pixel_values = real(images, device)
        return pixel_values * math.nan if len(calls) == 4 else pixel_values

    monkeypatch.setattr(home, "to_pixel_values", poisoned)
    words = arguments(logging_steps=6)
    if trainer is train_po:
        unknown = {"--attack_steps", "--primal_steps", "--eps"}
        pairs = zip(words[::2], words[1::2])
        words = [word for name, value in pairs if name not in unknown for word in (name, value)]
    with pytest.raises(UserError, match=r"step 4: the loss is nan; the last good checkpoint is .*step-2; "):
        trainer.main(words)
    assert checkpoints(tmp_path / "run") == ["step-2"]
    assert not (tmp_path / "run/model.safetensors").exists()
    found = load_file(tmp_path / "run/checkpoints/step-2/parameters.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


@pytest.mark.parametrize("more", [{}, {"trainable": "image"}, {"trainable": "head"}])
def test_embeddings_that_overflow_end_the_run_with_the_image(arguments, small_clip, digits, tmp_path, more):
    """In the periodic evaluation at step 0, and where embeddings are kept."""
    save_scaled(small_clip, tmp_path / "scaled", "visual_projection", 1e25)
    words = arguments(model_name_or_path=tmp_path / "scaled", eval_shards=digits / "test", eval_num_samples=8, **more)
    if more:
        unknown = {"--attack_steps", "--primal_steps", "--eps"}
        pairs = zip(words[::2], words[1::2])
        words = [word for name, value in pairs if name not in unknown for word in (name, value)]
    with pytest.raises(UserError, match=r"^[\w-]*\d+: its (embeddings|logits) are not finite"):
        (train_po if more else train_lore).main(words)


@pytest.mark.parametrize("name", ["parameters", "optimizer.exp_avg", "extra"])
def test_a_checkpoint_with_what_is_not_finite_is_named(tmp_path, name):
    save_file({"weight": torch.tensor([[1.0, math.nan]])}, tmp_path / f"{name}.safetensors")
    message = rf"--resume_from_checkpoint {tmp_path}: {name}.safetensors: weight holds what is not finite"
    with pytest.raises(UserError, match=message):
        read_tensors(tmp_path / f"{name}.safetensors")
    if name == "parameters":
        with pytest.raises(UserError, match=message):
            load_parameters(torch.nn.Linear(2, 1, bias=False), tmp_path)


def test_a_reference_that_does_not_match(arguments, tmp_path):
    save_small_clip(tmp_path / "other")
    config = CLIPConfig.from_pretrained(tmp_path / "other")
    config.projection_dim = 16
    CLIPModel(config).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"other: embeds 32 px into 16 dimensions, the encoder 32 px into 24"):
        train_lore.main(arguments(reference_model_name_or_path=tmp_path / "other", max_steps=1))
