import json

import pytest
import torch
from accelerate import Accelerator

from utils.checkpoint import (
    find_checkpoint,
    last_checkpoint,
    load_checkpoint,
    read_state,
    refuse_changed_settings,
    refuse_non_finite,
    replace_directory,
    save_checkpoint,
)
from utils.cli import UserError


def save(output_dir, step, *, fail=False, total_limit=2, value=0.0):
    def write_model(directory):
        directory.mkdir()
        (directory / "weights").write_text(str(step))
        if fail:
            raise OSError(28, "No space left on device")

    return save_checkpoint(
        Accelerator(cpu=True),
        output_dir,
        step,
        state={"step": step},
        extra_state={"multiplier": {"value": torch.tensor(value)}},
        write_model=write_model,
        total_limit=total_limit,
    )


def names(output_dir):
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


def test_checkpoints_are_whole_or_absent_and_pruned(tmp_path):
    for step in (2, 10, 4):
        save(tmp_path, step, total_limit=0)
    assert last_checkpoint(tmp_path).name == "step-10"
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 12, fail=True)
    assert last_checkpoint(tmp_path).name == "step-10"
    save(tmp_path, 12)
    assert names(tmp_path) == ["step-10", "step-12"]
    assert read_state(last_checkpoint(tmp_path)) == {"step": 12}
    save(tmp_path, 12, value=7.0)  # again, in place of the one there
    assert names(tmp_path) == ["step-10", "step-12"]
    extra = load_checkpoint(Accelerator(cpu=True), last_checkpoint(tmp_path))
    assert extra["multiplier"]["value"] == 7.0
    save(tmp_path, 14, total_limit=0)
    assert names(tmp_path) == ["step-10", "step-12", "step-14"]


def test_nothing_is_unpickled(tmp_path):
    checkpoint = save(tmp_path, 1)
    torch.save({"multiplier": Bomb()}, checkpoint / "extra_state.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        load_checkpoint(Accelerator(cpu=True), checkpoint)
    assert not (tmp_path / "exploded").exists()


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_where_a_run_starts(tmp_path):
    run = tmp_path / "run"
    assert find_checkpoint(run, None) is None
    assert find_checkpoint(run, "latest") is None
    run.mkdir()
    assert find_checkpoint(run, None) is None
    saved = save(run, 3)
    (run / "checkpoints" / "step-9").mkdir()  # without a state: not a checkpoint
    assert find_checkpoint(run, "latest") == saved
    assert find_checkpoint(run, str(saved)) == saved
    with pytest.raises(UserError, match="not empty"):
        find_checkpoint(run, None)
    with pytest.raises(UserError, match="no such directory"):
        find_checkpoint(run, str(run / "nowhere"))
    with pytest.raises(UserError, match="not a whole checkpoint"):
        read_state(run / "checkpoints" / "step-9")


def test_replacing_a_directory_leaves_one(tmp_path):
    for text in ("first", "second"):
        aside = tmp_path / ".best.incomplete"
        aside.mkdir()
        (aside / "file").write_text(text)
        replace_directory(aside, tmp_path / "best")
        assert (tmp_path / "best/file").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_changed_settings_are_named_and_free_ones_are_not():
    before = json.loads(json.dumps({"eps": 4.0, "rho": 0.1, "logging_steps": 10, "train_shards": ["a"]}))
    refuse_changed_settings(before, before | {"logging_steps": 5}, {"logging_steps"})
    with pytest.raises(UserError, match=r"eps was 4.0, is 2.0; rho was 0.1, is 0.2"):
        refuse_changed_settings(before, before | {"eps": 2.0, "rho": 0.2}, {"logging_steps"})


def test_the_first_step_with_a_non_finite_loss_is_named(tmp_path):
    losses = [torch.tensor(1.0)] * 9
    refuse_non_finite(Accelerator(cpu=True), losses, 3, 6, None)
    for place, step in ((0, 4), (2, 4), (3, 5), (8, 6)):
        poisoned = list(losses)
        poisoned[place] = torch.tensor(float("inf"))
        with pytest.raises(UserError, match=rf"step {step}: the loss is inf; there is no checkpoint yet"):
            refuse_non_finite(Accelerator(cpu=True), poisoned, 3, 6, None)
