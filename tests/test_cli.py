import dataclasses
import json
import shlex
import signal

import pytest

import evaluate
import train_lore
import train_po
from tests.conftest import ROOT, run_script
from utils.cli import flag, parse_settings, required
from utils.errors import UserError
from utils.processes.launch import launched_command
from utils.training.checkpoint import refuse_changed_settings


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
    names: list[str] | None = flag(None, "names", group="b")
    t: list[float] = flag([0.5], "strengths", group="b", minimum=-10, maximum=10)
    folder: str | None = flag(None, "a folder", group="b", path=True)


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
        (["--model", "m", "--objective", "embeding"],
         r"'embeding' is not one of embedding, tecoa, did you mean embedding\?"),
        (["--model", "m", "--eps"], r"--eps: expected"),
        (["--eps", "4"], r"--model: missing; a model"),
        (["--model", "m", "--eps"], r"--eps: expected a number after it"),
        (["--model", "m", "-eps", "4"], r"^-eps: no such flag, did you mean --eps\?"),
        (["--shards", "a", "-eps", "4"], r"^-eps: no such flag"),
        (["--model", "-x"], r"--model: expected a text after it \(one that begins with a dash: --model=-value\)"),
        (["--model", "m", "--"], r"'--': an argument without a flag"),
        (["--model", "m", "--ep", "4"], r"--ep: no such flag"),
        (["--model", "m", "--shards=a", "b"], r"'b': an argument without a flag"),
        (["--model", ""], r"--model: empty; expected a text"),
        (["--model="], r"--model: empty"),
        (["--model", "m", "--shards", "a", ""], r"--shards: empty"),
        (["--model", "m", "--eps", ""], r"--eps: empty; expected a number"),
        (["--model", "m", "--eps", "-inf"], r"--eps: '-inf' is not finite"),
        (["--model", "m", "--eps", "-1_0"], r"--eps: '-1_0' is not a number"),
        (["--config", "/nowhere.yaml"], r"--config /nowhere.yaml: cannot be read \(No such file"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(UserError, match=message):
        parse(*argv)


def test_a_flag_that_comes_again_adds_to_a_list_and_takes_the_place_of_one_value(caplog):
    """cpython#96994. Scripts put their own flags behind those of others: the last one counts, which is said."""
    assert parse("--model", "m", "--shards", "a", "--eps", "4", "--shards", "b", "--eps=4").shards == ["a", "b"]
    assert not caplog.records
    assert parse("--model", "m", "--eps", "4", "--eps=8", "--compile", "--compile", "false") == Settings("m", eps=8.0)
    assert caplog.messages == [
        "--eps: given twice, '4' and '8'; the last one counts",
        "--compile: given twice, 'true' and 'false'; the last one counts",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("epss: 4", r"recipe.yaml: epss: no such setting, did you mean eps\?"),
        ("eps: [1, 2]", r"recipe.yaml: eps: expected a number, found a list"),
        ("steps: true", r"recipe.yaml: steps: 'true' is not a whole number"),
        ("eps:", r"recipe.yaml: eps: empty; expected a number"),
        ("just text", r"expected 'flag: value' lines"),
        ("eps: [", r"not valid YAML"),
        (
            "eps: 4\nsteps: 3\n'eps': 8",
            r"recipe.yaml: eps: again in line 3; keep one of them",
        ),  # pyyaml#165
        ("{eps: 4, eps: 4}", r"recipe.yaml: eps: again in line 1"),
        ("eps: 4\n<<: {eps: 8}", r"<<: no such setting"),
        ("shards: [a, ]\nshards:\n- b", r"shards: again in line 2"),
        ("eps: 4 # a\u2028steps: 3", r"line 1: holds U\+2028, which looks like a space"),
        ("? [eps]\n: 4", r"a key that is no text: no such setting"),
        ("output: a\n---\noutput: b", r"not valid YAML"),
        ("shards: [a, ~]", r"shards: empty"),
        ('folder: ""', r"folder: empty; expected a text"),
    ],
)
def test_mistakes_in_a_recipe(recipe, message, tmp_path):
    with pytest.raises(UserError, match=message):
        parse("--model", "m", recipe=recipe, tmp_path=tmp_path)


# Texts that YAML 1.1 or Python's own int(), float() and argparse read in another way than they look: pyyaml#395,
# cpython#96994.
TEXTS = [
    *(
        "1.10",
        "2024_05_01",
        "2024-05-01",
        "no",
        "NO",
        "on",
        "off",
        "yes",
        "y",
        "true",
        "True",
        "1",
        "0",
        "010",
        "0o10",
        "0x10",
    ),
    *(
        "1:30",
        "1e-5",
        "1E5",
        "1.0e3",
        "-5e-1",
        "-.5",
        ".5",
        "5.",
        "+4",
        "1_000",
        "-1_0",
        ".inf",
        "-.inf",
        "inf",
        "nan",
        ".NaN",
    ),
    *("1,5", "\u0661", "\uff11", "4.0", "-0", "none", "None", "=", "a b", "C:\\x", "a#b", "embedding", "300", "9" * 30),
]


def outcome(*argv, **recipe):
    """The settings, or what the error says without where it was said."""
    try:
        return dataclasses.asdict(parse(*argv, **recipe))
    except UserError as error:
        return str(error).split(": ", 2 if recipe else 1)[-1]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Settings)])
def test_a_recipe_and_the_command_line_have_one_grammar(name, tmp_path):
    given = () if name == "model" else ("--model", "m")
    for text in TEXTS:
        typed = outcome(*given, f"--{name}", text)
        quoted = "'" + text + "'"
        for written in (text, quoted):
            assert outcome(*given, recipe=f"{name}: {written}", tmp_path=tmp_path) == typed, text
        assert outcome(*given, f"--{name}={text}") == typed, text


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("model", "1.10", "1.10"), ("model", "2024_05_01", "2024_05_01"), ("model", "no", "no"),
        ("model", "1:30", "1:30"), ("model", "2024-05-01", "2024-05-01"), ("model", "0x10", "0x10"),
        ("model", "1e3", "1e3"), ("folder", "on", "on"),
        ("steps", "010", 10), ("steps", "+4", 4), ("eps", "1e-5", 1e-5), ("eps", ".5", 0.5), ("eps", "5.", 5.0),
        ("compile", "no", False), ("compile", "ON", True), ("compile", "1", True), ("limit", "none", None),
        ("t", "-5e-1", [-0.5]), ("t", "-.5", [-0.5]), ("names", "none", None), ("names", "1.10", ["1.10"]),
    ],
)  # fmt: skip
def test_values_are_read_as_written(name, text, value, tmp_path):
    given = () if name == "model" else ("--model", "m")
    assert getattr(parse(*given, f"--{name}", text), name) == value
    assert getattr(parse(*given, recipe=f"{name}: {text}", tmp_path=tmp_path), name) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("steps", text) for text in ("0x10", "0o10", "1_000", "\u0661", "1e3", "4.0", "1:30", " 4 ", "4\r", "true")),
        *(("eps", text) for text in ("1_0", "\u0661", "\u0131nf", " 4 ", "0x10", "1:30", "1,5", "4 # four", "true")),
        *(("compile", text) for text in ("y", "t", "2", "", " true", "truee")),
    ],
)
def test_what_only_looks_like_a_value_is_refused(name, text, tmp_path):
    with pytest.raises(UserError, match=rf"--{name}: .*(is not|empty)"):
        parse("--model", "m", f"--{name}", text)
    with pytest.raises(UserError, match=rf"recipe.yaml: {name}: .*(is not|empty)"):
        parse("--model", "m", recipe=f"{name}: {json.dumps(text)}", tmp_path=tmp_path)


def test_lists_are_joined_and_negative_numbers_are_values():
    settings = parse(
        *["--model", "m", "--shards", "a", "b", "--t", "-1", "-5e-1", "-.5", "1e-1", "--shards", "c", "--shards=-d"]
    )
    assert (settings.shards, settings.t) == (["a", "b", "c", "-d"], [-1, -0.5, -0.5, 0.1])
    assert parse("--model=--x=1 y").model == "--x=1 y"


@pytest.mark.parametrize("written", ["shards: [1.10, no]", "shards:\n- 1.10\n- no", "shards: [\"1.10\", 'no']"])
def test_lists_of_a_recipe_are_read_as_written(written, tmp_path):
    assert parse("--model", "m", recipe=written, tmp_path=tmp_path).shards == ["1.10", "no"]
    assert parse("--model", "m", "--shards", "x", recipe=written, tmp_path=tmp_path).shards == ["x"]


@pytest.mark.parametrize("empty", ["", "~", "null", "Null", "# nothing"])
def test_null_of_yaml_is_none(empty, tmp_path):
    assert parse("--model", "m", recipe=f"limit: {empty}\nfolder: {empty}", tmp_path=tmp_path).limit is None
    assert parse("--model", "m", recipe=empty, tmp_path=tmp_path) == parse("--model", "m")
    assert parse(recipe="model: 'null'", tmp_path=tmp_path).model == "null"


def test_a_byte_order_mark_is_not_part_of_the_first_key(tmp_path):
    assert parse("--model", "m", recipe="\ufeffeps: 8\r\nsteps: 3\r\n", tmp_path=tmp_path).eps == 8
    (tmp_path / "recipe.yaml").write_bytes("eps: 8".encode("utf-16"))
    with pytest.raises(UserError, match=r"recipe.yaml: UTF-16, expected UTF-8"):
        parse("--config", str(tmp_path / "recipe.yaml"))


def test_the_home_directory_is_meant_unless_something_is_called_so(tmp_path, monkeypatch):
    """A shell leaves it to the program in quotes, after ``--flag=`` and in a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert parse("--model", "~/m", "--folder=~/x") == Settings("~/m", folder="/home/me/x")
    assert parse("--model", "m", recipe="folder: ~/x", tmp_path=tmp_path).folder == "/home/me/x"
    assert parse("--model", "m", "--folder", "a/~/x").folder == "a/~/x"
    with pytest.raises(UserError, match=r"--config /home/me/r.yaml: cannot be read"):
        parse("--config=~/r.yaml")
    for text in ("~no-such-user/x", "$HOME/x", "${HOME}"):
        with pytest.raises(UserError, match=r"no such user|variables are not filled in"):
            parse("--model", "m", "--folder", text)
    (tmp_path / "~").mkdir()
    (tmp_path / "~/x").touch()
    (tmp_path / "$HOME").touch()
    assert parse("--model", "m", "--folder", "~/x").folder == "~/x"
    assert parse("--model", "m", "--folder", "$HOME").folder == "$HOME"
    assert parse("--model", "m", "--folder", "~/{0..3}.tar").folder == "~/{0..3}.tar"
    assert parse("--model", "m", "--folder", "~/a/*.tar").folder == "/home/me/a/*.tar"


def test_a_rule_that_does_not_exist_is_a_mistake_of_the_script():
    with pytest.raises(TypeError, match="minimun"):
        flag(1, "steps", group="a", minimun=0)


PATHS = (
    "output_dir", "cache_dir", "classnames", "linear_head", "model_name_or_path",
    "train_shards", "eval_shards", "resume_from_checkpoint", "data", "model",
)  # fmt: skip


@pytest.mark.parametrize("script", [train_lore, train_po, evaluate])
def test_what_names_a_path_is_marked_so(script):
    fields = {field.name: field.metadata["path"] for field in dataclasses.fields(script.Settings)}
    assert [name for name in PATHS if fields.get(name) is False] == []


def test_the_command_of_a_card_gives_the_same_settings(monkeypatch):
    words = [
        "--model",
        "it's $HOME",
        "--shards",
        "a b",
        "c;d",
        "--t=-5e-1",
        "--folder",
        "*?",
        "--names",
        "\u2028",
        "--eps",
        "1e-1",
    ]
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    assert parse(*shlex.split(launched_command())[2:]) == parse(*words)


def test_a_setting_in_its_old_form_goes_on(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    refuse_changed_settings(
        {"model": "~/m", "shards": ["~/a"]}, {"model": "/home/me/m", "shards": ["/home/me/a"]}, set()
    )
    with pytest.raises(UserError, match=r"model was ~/m, is /home/me/n"):
        refuse_changed_settings({"model": "~/m"}, {"model": "/home/me/n"}, set())


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
        ({"train_shards": digits},
         r"--train_shards .*: a folder without .tar files; .* name its train/ or test/ folder"),
        ({"train_shards": "pipe:cat x.tar"}, r"--train_shards pipe:cat .*: runs a shell command"),
        ({"model_name_or_path": bert}, r"--model_name_or_path .*bert: model type 'bert'; supported: clip"),
        ({"model_name_or_path": "no/such"}, r"--model_name_or_path no/such: neither a local model directory"),
        ({"output_dir": used}, r"--output_dir .*used: not empty"),
        ({"output_dir": ten}, r"--output_dir .*ten.txt: is a file"),
        ({"resume_from_checkpoint": tmp_path / "x"}, r"--resume_from_checkpoint .*x: no such directory"),
        ({"classnames": tmp_path / "none.txt", "objective": "tecoa"}, r"none.txt: no such file"),
        ({"clean_weight": 1}, r"--clean_weight 1.0 with --constraint embedding"),
        ({"penalty": 30, "constraint": "none"}, r"--penalty 30 with --constraint none: it augments the constraint"),
        ({"penalty": 30, "constraint": "kl"}, r"--penalty 30 with --constraint kl: it augments the constraint"),
        ({"keep_best": "eval_accuracy_pgd"}, r"--keep_best eval_accuracy_pgd: nothing is evaluated"),
        ({"keep_best": "eval_accuracy_pgd", "eval_shards": digits / "test", "eval_pgd": "false"},
         r"--keep_best eval_accuracy_pgd with --eval_pgd false: PGD accuracy is not measured"),
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
    """There gloo's threads would abort it. All else at the end still happens: threads, handlers, buffers."""
    script = tmp_path / "ends.py"
    script.write_text(f"""
import atexit, os, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from utils.training.checkpoint import refuse_changed_settings
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
