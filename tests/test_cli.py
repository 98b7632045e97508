import dataclasses
import signal

import pytest

import train_lore
from tests.conftest import ROOT, run_script
from utils.cli import flag, parse_settings, required
from utils.errors import UserError


@dataclasses.dataclass
class Settings:
    model: str = required("a model", group="a")
    shards: list[str] = flag([], "shards", group="a")
    eps: float = flag(4.0, "radius", group="b", above=0, maximum=255)
    steps: int = flag(10, "steps", group="b", minimum=1)
    limit: int | None = flag(None, "limit", group="b", minimum=1)
    compile: bool = flag(False, "compile", group="b")
    objective: str = flag("embedding", "objective", group="b", choices=("embedding", "tecoa"))
    estimate: bool = flag(False, "estimate", group="b", waives_required=True)


def parse(*argv, recipe=None, tmp_path=None):
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
        argv = ("--config", str(tmp_path / "recipe.yaml"), *argv)
    return parse_settings(Settings, argv)


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    settings = parse(
        "--eps", "2", "--model", "m", recipe="eps: 8\nsteps: 3\nshards: [a, b]\ncompile: true", tmp_path=tmp_path
    )
    assert settings == Settings("m", ["a", "b"], 2.0, 3, None, True, "embedding")
    assert parse("--model", "m", "--compile", "--limit", "none", "--shards", "x", "y") == Settings(
        "m", ["x", "y"], compile=True
    )
    assert parse("--model", "m", "--compile", "false").compile is False
    assert parse("--model", "m", recipe="shards: one.tar", tmp_path=tmp_path).shards == ["one.tar"]


def test_a_flag_that_asks_for_something_else_than_a_run_waives_the_required_ones():
    assert parse("--estimate") == Settings(None, estimate=True)
    with pytest.raises(UserError, match=r"--model: missing"):
        parse("--estimate", "false")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "m", "--epz", "4"], r"--epz: no such flag, did you mean --eps\?"),
        (["--model", "m", "stray"], r"'stray': an argument without a flag"),
        (["--model", "m", "--eps", "-1"], r"--eps: -1.0 is too small; expected more than 0"),
        (["--model", "m", "--eps", "nan"], r"--eps: 'nan' is not finite"),
        (["--model", "m", "--eps", "four"], r"--eps: 'four' is not a number"),
        (["--model", "m", "--eps", "300"], r"--eps: 300.0 is too large"),
        (["--model", "m", "--steps", "1.5"], r"--steps: '1.5' is not a whole number"),
        (["--model", "m", "--limit", "0"], r"--limit: 0 is too small; expected at least 1"),
        (["--model", "m", "--compile", "maybe"], r"--compile: 'maybe' is not true or false"),
        (["--model", "m", "--objective", "embeding"], r"'embeding' is not one of embedding, tecoa, did you mean embedding\?"),
        (["--model", "m", "--eps"], r"--eps: expected"),
        (["--eps", "4"], r"--model: missing; a model"),
        (["--config", "/nowhere.yaml"], r"--config /nowhere.yaml: cannot be read \(No such file"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(UserError, match=message):
        parse(*argv)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("epss: 4", r"recipe.yaml: epss: no such setting, did you mean eps\?"),
        ("eps: [1, 2]", r"recipe.yaml: eps: expected a number, found a list"),
        ("steps: true", r"recipe.yaml: steps: True is not a whole number"),
        ("eps:", r"recipe.yaml: eps: empty; expected a number"),
        ("just text", r"expected 'flag: value' lines, found a str"),
        ("eps: [", r"not valid YAML"),
    ],
)
def test_mistakes_in_a_recipe(recipe, message, tmp_path):
    with pytest.raises(UserError, match=message):
        parse("--model", "m", recipe=recipe, tmp_path=tmp_path)


@pytest.fixture
def never_loads(monkeypatch):
    """Fails the test if a model is loaded."""
    monkeypatch.setattr(train_lore, "load_model", lambda *_: pytest.fail("the model was loaded"))


def test_mistakes_are_found_before_a_model_is_loaded(never_loads, small_clip, digits, tmp_path):
    ten = tmp_path / "ten.txt"
    ten.write_text("\n".join("abcdefghij"))
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").touch()
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text('{"model_type": "bert"}')
    base = {
        "model_name_or_path": small_clip,
        "train_shards": digits / "train",
        "output_dir": tmp_path / "run",
        "report_to": "none",
    }
    wrong = [
        ({"train_shards": tmp_path / "nowhere"}, r"--train_shards .*nowhere: nothing is there"),
        ({"train_shards": digits}, r"--train_shards .*: a folder without .tar files; .* name its train/ or test/ folder"),
        ({"train_shards": "pipe:cat x.tar"}, r"--train_shards pipe:cat .*: runs a shell command"),
        ({"model_name_or_path": bert}, r"--model_name_or_path .*bert: model type 'bert'; supported: clip"),
        ({"model_name_or_path": "no/such"}, r"--model_name_or_path no/such: neither a local model directory"),
        ({"output_dir": used}, r"--output_dir .*used: not empty"),
        ({"output_dir": ten}, r"--output_dir .*ten.txt: is a file"),
        ({"resume_from_checkpoint": tmp_path / "x"}, r"--resume_from_checkpoint .*x: no such directory"),
        ({"classnames": tmp_path / "none.txt", "objective": "tecoa"}, r"none.txt: no such file"),
        ({"clean_weight": 1}, r"--clean_weight 1.0 with --constraint embedding"),
        ({"keep_best": "eval_accuracy_pgd"}, r"--keep_best eval_accuracy_pgd: nothing is evaluated"),
        ({"per_device_train_batch_size": 5000}, r"the global batch of 5000 .* larger than an epoch of 1437"),
        ({"train_num_samples": 5000}, r"--train_num_samples 5000: the shards hold 1437 samples"),
        ({"eps": -4}, r"--eps: -4.0 is too small"),
        ({"reference_dtype": "bfloat16"}, r"--reference_dtype bfloat16: the transformer blocks run in float32"),
    ]  # fmt: skip
    for changes, message in wrong:
        argv = [word for name, value in (base | changes).items() for word in (f"--{name}", str(value))]
        with pytest.raises(UserError, match=message):
            train_lore.main(argv)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    output = run_script("train_lore.py", "--learning_rat", "1", status=2)
    assert output.strip().splitlines()[-1] == (
        "train_lore.py: error: --learning_rat: no such flag, did you mean --learning_rate?; --help lists all flags"
    )
    assert "Traceback" not in output


@pytest.mark.parametrize("status", [0, 85])
def test_a_process_of_several_ends_without_the_interpreters_end(status, tmp_path):
    """There gloo's threads would abort it. What else happens at the end happens: threads, handlers, what is still in a buffer."""
    script = tmp_path / "ends.py"
    script.write_text(f"""
import atexit, os, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from utils.cli import run


class Last:
    def __del__(self, abort=os.abort):
        abort()


last = Last()


def main():
    atexit.register(print, "handlers")
    threading.Thread(target=lambda: (time.sleep(0.3), print("threads"))).start()
    print("main")
    sys.exit({status})


run(main)
""")
    run_script(str(script), status=-signal.SIGABRT)
    assert run_script(str(script), status=status, RANK="0").split() == ["main", "threads", "handlers"]


def test_a_file_name_that_is_too_long_is_one_line(small_clip):
    output = run_script(
        "train_lore.py", "--model_name_or_path", small_clip, "--train_shards", "x", "--output_dir", "o" * 3000, status=2
    )
    assert "oooo: a file name that is too long; correct the path" in output
    assert "Traceback" not in output


def test_help_groups_the_flags_with_units_and_defaults():
    text = run_script("train_lore.py", "--help")
    assert "--eps FLOAT" in text
    assert "in 1/255 (default: 4.0)" in " ".join(text.split())
    assert all(group in text for group in ("model:", "data:", "method:", "attack:", "optimisation:", "output:"))
