"""How a run was launched, as model card, run.json, metrics.jsonl and checkpoints record it."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, flags, free_port, run_script
from utils.model_card import launch_lines
from utils.processes import launch
from utils.processes.launch import as_typed, launched_command
from utils.training.checkpoint import damage

PYTHON = "/opt/env/bin/python3.11"
SCRIPT = ["/code/train_lore.py", "--eps", "4"]


class Process:
    """A process of psutil with these words, under parents with theirs. None: the words are hidden."""

    def __init__(self, words, *parents):
        self.words, self.above = words, parents

    def cmdline(self):
        if self.words is None:
            raise psutil.AccessDenied
        return self.words

    def parents(self):
        return [Process(words) for words in self.above]


@pytest.fixture
def started(monkeypatch):
    """Makes this process SCRIPT, with these words, under these parents."""

    def start(*words, script=SCRIPT):
        monkeypatch.setattr(sys, "argv", script)
        monkeypatch.setattr(psutil, "Process", lambda: Process(*words))

    return start


ACCELERATE = [PYTHON, "/opt/env/bin/accelerate", "launch", "--config_file", "ddp.yaml", *SCRIPT]
RANK = [PYTHON, "-u", *SCRIPT]


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ([RANK], "python /code/train_lore.py --eps 4"),
        ([RANK, ["-bash"], []], "python /code/train_lore.py --eps 4"),
        ([RANK, ACCELERATE, ["bash"]], "accelerate launch --config_file ddp.yaml /code/train_lore.py --eps 4"),
        ([RANK, None, ACCELERATE], "accelerate launch --config_file ddp.yaml /code/train_lore.py --eps 4"),
        (
            [RANK, [PYTHON, "-X", "dev", "-m", "torch.distributed.run", "--nproc_per_node=2", *SCRIPT]],
            "python -m torch.distributed.run --nproc_per_node=2 /code/train_lore.py --eps 4",
        ),
        ([RANK, ["/opt/env/bin/torchrun", "-m", "train_lore", "--eps", "4"]], "torchrun -m train_lore --eps 4"),
        # The outermost is what the user typed.
        ([RANK, ["torchrun", *SCRIPT], ACCELERATE], "accelerate launch --config_file ddp.yaml " + shlex.join(SCRIPT)),
        ([[PYTHON, "slurm/rank.py", "--config_file", "a.yaml", *SCRIPT], ["slurmstepd: [7.0]"]],
         "python slurm/rank.py --config_file a.yaml /code/train_lore.py --eps 4"),
        # Of another script, which starts this one by itself; and of this one with other settings.
        ([RANK, [PYTHON, "sweep.py"], ["accelerate", "launch", "sweep.py"]], "python /code/train_lore.py --eps 4"),
        ([RANK, ["accelerate", "launch", "/code/train_lore.py"]], "python /code/train_lore.py --eps 4"),
        ([RANK, ["timeout", "60", "python", *SCRIPT]], "python /code/train_lore.py --eps 4"),
    ],
)  # fmt: skip
def test_the_command_is_the_one_that_a_user_typed(started, words, command):
    started(*words)
    assert launched_command() == command


def test_a_program_has_no_folder_and_python_no_options():
    assert as_typed([PYTHON, "-u", "-W", "ignore", "-Xdev", "train.py", "-u"]) == ["python", "train.py", "-u"]
    assert as_typed([PYTHON, "/opt/env/bin/accelerate-launch", "train.py"]) == ["accelerate-launch", "train.py"]
    assert as_typed(["/bin/sh", "-c", "python train.py"]) == ["sh", "-c", "python train.py"]
    assert as_typed([PYTHON, "-c", "print()"]) == ["python", "-c", "print()"]
    assert as_typed([PYTHON]) == ["python"]
    assert as_typed([]) == []


def test_a_command_holds_no_secret_and_is_quoted(started, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "SECRETinTheEnvironment")
    script = ["train_lore.py", "--train_shards=https://host/{0..9}.tar?key=SECRET", "--output_dir", "runs/a b"]
    words = ["accelerate", "launch", "--config_file", "https://me:SECRET@host/a.yaml"]
    started(RANK, [*words, "--main_process_ip", "SECRETinTheEnvironment", *script], script=script)
    shown = launched_command()
    assert "SECRET" not in shown
    assert shlex.split(shown)[:2] == ["accelerate", "launch"]
    assert shlex.split(shown)[-2:] == ["--output_dir", "runs/a b"]
    assert launch._config_file(launch._launcher()) == "https://me:SECRET@host/a.yaml"  # launch_settings shows it


@pytest.mark.parametrize(
    ("own", "there", "name"),
    [
        (["--config_file", "a.yaml"], True, "a.yaml"),
        (["--config_file=a.yaml", "--config-file", "b.yaml"], True, "b.yaml"),
        ([], True, "~/default_config.yaml"),
        ([], False, None),
        (["--cpu"], True, None),  # accelerate then leaves its default file out
    ],
)
def test_the_config_file_is_the_one_that_accelerate_reads(started, monkeypatch, tmp_path, own, there, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(launch, "default_config_file", str(tmp_path / "default_config.yaml"))
    if there:
        (tmp_path / "default_config.yaml").write_text("")
    script = [*SCRIPT, "--config_file", "of the script"]
    started(RANK, ["accelerate", "launch", *own, *script], script=script)
    assert launch._config_file(launch._launcher()) == name
    for other in ([RANK], [RANK, ["torchrun", *script]]):  # these read no config
        started(*other, script=script)
        assert launch._config_file(launch._launcher()) is None


def test_equal_launches_in_a_row_are_shown_once():
    one, two = ({"command": f"python {name}.py", "launch": {"num_processes": name}} for name in (1, 2))
    alone = launch_lines([{"first_step": step, **one} for step in (0, 5)])
    assert alone[:5] == ["## Command", "", "```", "python 1.py", "```"]
    assert "| num_processes | 1 |" in alone
    mixed = launch_lines([{"first_step": step, **of} for step, of in ((0, one), (5, one), (7, two), (9, one))])
    commands = ["# from step 0", "python 1.py", "# from step 7", "python 2.py", "# from step 9", "python 1.py"]
    assert mixed[3:9] == commands
    assert "| launch | from step 0 | from step 7 | from step 9 |" in mixed
    assert "| num_processes | 1 | 2 | 1 |" in mixed


# ------------------------------------------------------------------------------------------------ real launchers


@pytest.fixture(scope="module")
def words(small_clip, digits, tmp_path_factory):
    """The flags of a run of two steps on global batches of four."""
    cache = tmp_path_factory.mktemp("cache")

    def make(output_dir, processes=1, **changes):
        settings = {
            "model_name_or_path": small_clip, "train_shards": digits / "train", "output_dir": output_dir,
            "cache_dir": cache, "per_device_train_batch_size": 4 // processes, "max_steps": 2, "checkpoint_steps": 1,
            "logging_steps": 1, "attack_steps": 1, "primal_steps": 1, "num_workers": 0, "report_to": "none",
        }  # fmt: skip
        return flags(settings | changes)

    return make


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory):
    """A run by plain python, and its command."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    arguments = words(run_dir)
    run_script("train_lore.py", *arguments, launcher=(sys.executable,))
    return run_dir, shlex.join(["python", str(ROOT / "train_lore.py"), *arguments])


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def card_launch(run_dir):
    """The columns of the card's table of launches."""
    section = (run_dir / "README.md").read_text().partition("## Launch")[2].partition("## ")[0]
    names, *columns = zip(*(line.strip("| ").split(" | ") for line in section.strip().splitlines()))
    return [dict(zip(names[2:], column[2:])) for column in columns]


def shown(settings):
    return {name: str(value) for name, value in settings.items()}


def test_a_run_by_plain_python(alone):
    run_dir, command = alone
    (first, second), recorded = rows(run_dir), json.loads((run_dir / "run.json").read_text())
    expected = {
        "num_processes": 1, "num_machines": 1, "distributed_type": "NO", "mixed_precision": "no",
        "device": "CPU, 1 thread",
    }  # fmt: skip
    assert first["launch"] == expected
    assert "launch" not in second
    assert recorded == {"command": command, "launch": expected}
    assert card_launch(run_dir) == [shown(expected)]
    assert f"## Command\n\n```\n{command}\n```\n" in (run_dir / "README.md").read_text()
    state = json.loads((run_dir / "checkpoints/step-2/trainer_state.json").read_text())
    assert state["launches"] == [{"first_step": 0, **recorded}]
    assert not state["settings"].keys() & {*expected, "launch", "command"}  # these are compared on resume


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_a_run_that_goes_on_under_another_launcher_records_both(alone, words, tmp_path, launcher):
    (first, command), run_dir = alone, tmp_path / "run"
    shutil.copytree(first, run_dir)
    program, config = str(Path(sys.executable).with_name(launcher)), ROOT / "accelerate_configs/cpu_2proc.yaml"
    options = ["--nproc_per_node=2", f"--master_port={free_port()}"]
    if launcher == "accelerate":
        options = ["launch", "--config_file", str(config), "--main_process_port", str(free_port())]
        options += ["--num_processes", "2", "--mixed_precision", "bf16"]
    arguments = words(run_dir, 2, resume_from_checkpoint=run_dir / "checkpoints/step-1")
    run_script("train_lore.py", *arguments, launcher=(program, *options))

    before, recorded = json.loads((first / "run.json").read_text()), json.loads((run_dir / "run.json").read_text())
    typed = shlex.join([launcher, *options, str(ROOT / "train_lore.py"), *arguments])
    assert recorded["command"] == typed
    expected = {"num_processes": 2, "num_machines": 1, "mixed_precision": "bf16" if options[0] == "launch" else "no"}
    expected |= {"config_file": str(config)} if options[0] == "launch" else {}
    assert {name: recorded["launch"].get(name) for name in expected} == expected
    assert ("config_file" in recorded["launch"]) == ("config_file" in expected)
    assert [row["launch"] for row in rows(run_dir)] == [before["launch"], recorded["launch"]]
    assert card_launch(run_dir) == [
        shown(before["launch"]) | {name: "" for name in expected if name == "config_file"}, shown(recorded["launch"])
    ]  # fmt: skip
    card = (run_dir / "README.md").read_text()
    assert f"```\n# from step 0\n{command}\n# from step 1\n{typed}\n```" in card


def test_a_checkpoint_without_launches_goes_on(alone, words, tmp_path):
    """Those of earlier versions have none. What is no list of them is damage."""
    import train_lore

    run_dir = tmp_path / "run"
    shutil.copytree(alone[0], run_dir)
    path = run_dir / "checkpoints/step-1/trainer_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"launches": {"first_step": 0}}))
    assert damage(path.parent) == "trainer_state.json lacks entries"
    del state["launches"]
    path.write_text(json.dumps(state))
    train_lore.main(words(run_dir, resume_from_checkpoint=path.parent))
    assert len(card_launch(run_dir)) == 1
    (launched,) = json.loads((run_dir / "checkpoints/step-2/trainer_state.json").read_text())["launches"]
    assert (launched["first_step"], launched["launch"]["num_processes"]) == (1, 1)
