import errno
import json
import os

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from utils.errors import UserError
from utils.training.checkpoint import (
    best_so_far,
    damage,
    find_checkpoint,
    last_checkpoint,
    load_checkpoint,
    read_state,
    refuse_changed_settings,
    refuse_non_finite,
    replace_directory,
    save_checkpoint,
    set_aside_later,
    take_output_dir,
)
from utils.training.optimization import make_optimizer
from utils.training.state import flatten, load_parameters, unflatten


def trained(optimizer="adamw", steps=3):
    """A model on its way, and its optimizer; the larger layer has 8-bit state where the optimizer has that at all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 3))
    found = make_optimizer(optimizer, model, 0.01, 0.1)
    for _ in range(steps):
        step(model, found)
    return model, found


def step(model, optimizer):
    model(torch.linspace(-1, 1, 64)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(output_dir, step, *, fail=False, total_limit=2, value=0.0, optimizer="adamw"):
    def write_model(directory):
        directory.mkdir()
        (directory / "weights").write_text(str(step))
        if fail:
            raise OSError(errno.ENOSPC, "No space left on device")

    accelerator = Accelerator(cpu=True)
    model, prepared = accelerator.prepare(*trained(optimizer))
    return save_checkpoint(
        accelerator,
        output_dir,
        step,
        model=model,
        optimizer=prepared,
        state={"step": step, "settings": {}, "skips": {}, "best": {}, "sizes": []},
        extra_state={"multiplier": {"value": torch.tensor(value)}, "seen": 7, "average": [torch.ones(2)] * 11},
        write_model=write_model,
        total_limit=total_limit,
    )


def names(output_dir):
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


def test_checkpoints_are_whole_or_absent_and_pruned(tmp_path):
    for number in (2, 10, 4):
        save(tmp_path, number, total_limit=0)
    assert last_checkpoint(tmp_path).name == "step-10"
    message = (
        r"the checkpoint of step 12 cannot be written \(No space left on device\); the last one is .*step-10; make room"
    )
    with pytest.raises(UserError, match=message):
        save(tmp_path, 12, fail=True)
    assert names(tmp_path) == ["step-10", "step-2", "step-4"]
    save(tmp_path, 12)
    assert names(tmp_path) == ["step-10", "step-12"]
    assert read_state(last_checkpoint(tmp_path))["step"] == 12
    save(tmp_path, 12, value=7.0)  # again, in place of the one there
    assert names(tmp_path) == ["step-10", "step-12"]
    assert load_file(last_checkpoint(tmp_path) / "extra.safetensors")["multiplier/value"] == 7.0
    save(tmp_path, 14, total_limit=0)
    assert names(tmp_path) == ["step-10", "step-12", "step-14"]


@pytest.mark.parametrize("optimizer", ["adamw", "adamax", "adamw_8bit", "paged_adamw_8bit"])
def test_what_is_loaded_steps_on_like_what_was_saved(tmp_path, optimizer):
    checkpoint = save(tmp_path, 3, optimizer=optimizer)
    model, ahead = trained(optimizer)
    accelerator = Accelerator(cpu=True)
    restored, _ = trained(optimizer, steps=0)
    load_parameters(restored, checkpoint)
    restored, fresh = accelerator.prepare(restored, make_optimizer(optimizer, restored, 0.01, 0.1))
    extra = load_checkpoint(accelerator, restored, fresh, checkpoint, read_state(checkpoint))
    assert extra["seen"] == 7
    assert len(extra["average"]) == 11
    for _ in range(3):
        step(model, ahead)
        step(restored, fresh)
    for expected, found in zip(model.parameters(), restored.parameters()):
        assert found.equal(expected)


def test_another_models_parameters_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds other parameters than the model, the first is 2.bias"):
        load_parameters(nn.Sequential(*[nn.Linear(3, 3)] * 3), save(tmp_path, 1))


def test_nested_states_survive_as_names():
    nested = {"a": {0: torch.ones(1), 10: {"b": torch.zeros(2), "count": 3, "rate": 0.1}}, "none": None}
    tensors, numbers = flatten(nested)
    assert set(tensors) == {"a/0", "a/10/b"}
    found = unflatten(tensors | json.loads(json.dumps(numbers)))
    assert found["a"][10]["count"] == 3
    assert found["a"][10]["rate"] == 0.1
    assert found["a"][0].equal(torch.ones(1))
    assert "none" not in found
    with pytest.raises(TypeError, match="a/x is a str"):
        flatten({"a": {"x": "text"}})


def test_where_a_run_starts(tmp_path):
    run = tmp_path / "run"
    take_output_dir(run)
    assert find_checkpoint(run, None) is None  # its own lock does not count
    assert find_checkpoint(run, "latest") is None
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


def test_a_run_never_meets_or_deletes_the_wrong_checkpoints(tmp_path):
    for number in (4, 6, 8):
        save(tmp_path, number, total_limit=0)
    set_aside_later(tmp_path, 4)  # the run goes on from there
    assert names(tmp_path) == ["step-4", "step-6.aside-1", "step-8.aside-1"]
    assert save(tmp_path, 5, total_limit=1).is_dir()
    assert last_checkpoint(tmp_path).name == "step-5"
    (tmp_path / "checkpoints/step-5/extra.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"latest: none of the 1 checkpoints .* is whole \(of the newest: extra.safetensors"
    ):
        last_checkpoint(tmp_path)
    save(tmp_path, 3, total_limit=0)
    (tmp_path / "checkpoints/step-3/parameters.safetensors").unlink()
    with pytest.raises(UserError, match=r"none of the 2 checkpoints .*\(of the newest: extra.safetensors"):
        last_checkpoint(tmp_path)


def test_the_best_value_goes_on_only_where_it_compares(tmp_path):
    """Of a digest of the evaluated images and texts: labels that were corrected make a value of another kind."""
    settings, fresh = {"keep_best": "clean"}, {"value": -1, "of": "these images"}
    resumed = {"best": {"value": 0.5, "metric": "clean", "of": "these images"}}
    assert best_so_far(resumed, settings, tmp_path, fresh) == fresh  # its model is not there
    (tmp_path / "best").mkdir()
    assert best_so_far(resumed, settings, tmp_path, fresh)["value"] == 0.5
    assert best_so_far(resumed, {"keep_best": "pgd"}, tmp_path, fresh) == fresh
    for other in ({"of": "other labels"}, {"of": None}):
        assert best_so_far(resumed, settings, tmp_path, fresh | other) == fresh | other


def test_every_kind_of_damage_is_named(tmp_path):
    checkpoint = save(tmp_path, 1)
    assert damage(checkpoint) is None
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    wrong = (
        {"format": 1},
        {"files": {}},
        {"files": None},
        {"files": {"x": [1]}},
        {"step": "1"},
        {"files": {"../x": [1, "a"]}},
    )
    for changes in wrong:
        (checkpoint / "trainer_state.json").write_text(json.dumps(state | changes))
        assert damage(checkpoint)
    for text in ("", "[]", "[" * 100_000, '{"step": 1', "null"):
        (checkpoint / "trainer_state.json").write_text(text)
        assert damage(checkpoint) == "trainer_state.json is not what was written"
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    os.truncate(checkpoint / "model/weights", 0)
    assert damage(checkpoint) == "model/weights has 0 bytes, was written with 1"


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
    signed = [f"https://x/{{0..9}}.tar ({mark})" for mark in ("6969c569", "f5396577")]
    refuse_changed_settings({"train_shards": signed[:1]}, {"train_shards": signed[1:]}, set())
    with pytest.raises(UserError, match="train_shards was"):
        refuse_changed_settings(
            {"train_shards": ["pipe:cat ... (6969c569)"]}, {"train_shards": ["pipe:cat ... (f5396577)"]}, set()
        )
    with pytest.raises(UserError, match=r"eps was 4.0, is 2.0; rho was 0.1, is 0.2"):
        refuse_changed_settings(before, before | {"eps": 2.0, "rho": 0.2}, {"logging_steps"})


def test_the_first_step_with_a_non_finite_loss_is_named(tmp_path):
    losses = [torch.tensor(1.0)] * 9
    refuse_non_finite(Accelerator(cpu=True), losses, 3, 6, None)
    for place, number in ((0, 4), (2, 4), (3, 5), (8, 6)):
        poisoned = list(losses)
        poisoned[place] = torch.tensor(float("inf"))
        with pytest.raises(UserError, match=rf"step {number}: the loss is inf; there is no checkpoint yet"):
            refuse_non_finite(Accelerator(cpu=True), poisoned, 3, 6, None)


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [  # trl#1831: the learning rate is blamed where no update came before, or where the gradient was lost first
        (
            [[1, 1, 1], ["nan", "nan", 1]],
            {"done": 2, "terms": ("a", "b")},
            r"step 2: the loss is nan; .*in it: a; where it",
        ),
        (
            [["nan", 1, "inf"]],
            {"done": 1, "terms": ("a", "b")},
            r"in it: b; no update came before it, .* not the cause",
        ),
        ([["nan"]], {"done": 5, "first_step": 4}, r"step 5: the loss is nan; .*no update came before it"),
        ([[1], ["nan"]], {"done": 1, "updates": 2}, r"step 1: the loss is nan; .*; where it rose before"),
        (
            [[1], ["nan"]],
            {"done": 1, "updates": 2, "grad_norm": "nan"},
            r"step 1: the gradient is nan, .*no update came",
        ),
        (
            [[1], [1]],
            {"done": 2, "grad_norm": "inf"},
            r"step 2: the gradient is inf, of a finite loss; .*where it rose",
        ),
    ],
)
def test_a_non_finite_loss_names_the_quantity_and_what_may_have_caused_it(losses, options, message):
    losses = [torch.tensor([float(value) for value in row]) for row in losses]
    options = dict(options)
    if "grad_norm" in options:
        options["grad_norm"] = torch.tensor(float(options["grad_norm"]))
    with pytest.raises(UserError, match=message):
        refuse_non_finite(
            Accelerator(cpu=True), losses, options.pop("updates", 1), options.pop("done"), None, **options
        )
