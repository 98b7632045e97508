"""Every command in README, docs and docstrings: its flags are known, its files are there, and it runs at tiny size."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from examples.make_shards import imagenet_wordnet_ids
from tests.conftest import ROOT, flags, later_wins
from tests.documented_commands import Command, documented, pages
from tests.examples.test_swap_vision_tower import save_llava
from tests.published_layouts import (
    CHECKPOINT,
    CLIPS,
    FARE,
    GELU,
    IMAGE_TOWERS,
    LEAF,
    OPENAI,
    SHARDED,
    save_layouts,
)
from tests.shard_maker import image_bytes
from tests.small_models import save_small_model
from tests.warm_python import script_environment, warm_python
from utils.cli import parse_settings
from utils.models.published import model_name
from utils.sets.labelled import imagenet_prompts

COMMANDS = documented()
SCRIPTS = [command for command in COMMANDS if command.script and command.words[:2] != ("python", "-m")]
HUB = re.compile(r"hf://|https://|^ILSVRC/")  # needs the network

CLIP = "openai/clip-vit-base-patch32"

# What makes a command small, put behind its own flags, which it overrides.
TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "eval_num_samples": 8,
    "num_workers": 0,
    "report_to": "none",
}
SMALLER = {
    "train_lore.py": TRAINING | {"attack_steps": 1},
    "train_po.py": TRAINING | {"train_num_samples": 16},
    "evaluate.py": {
        "num_samples": 12, "apgd_steps": 3, "apgd_targets": 1, "square_queries": 5, "attack_steps": 2, "severities": 1,
        "sigma": 8, "num_workers": 0, "t": [0, 1], "top_k": 5,
    },
    "examples/pretrain_small_clip.py": {
        "epochs": 1, "train_num_samples": 64, "batch_size": 8, "captions_per_step": 16, "words_per_step": 8,
    },
    "examples/segmentation.py": {"num_train": 4, "num_test": 4, "head_epochs": 1, "attack_steps": 1, "eps": 4},
    "benchmarks/memory.py": {
        "models": "ViT-B/32", "batch_size": 1, "attack_steps": 1, "primal_steps": 2, "gradient_checkpointing": "false",
    },
    "benchmarks/train_step.py": {
        "encoders": "small", "batch_size": 4, "rounds": 1, "attack_steps": 1, "primal_steps": 1, "methods": "LORE",
        "variants": ["plain", "+ lean"], "trainer": "false",
    },
    "benchmarks/word_drawing.py": {"num_images": 2, "rounds": 1},
    "benchmarks/zero3_gathers.py": {"steps": 4, "attack_steps": 1, "primal_steps": 1},
}  # fmt: skip
# Scripts that other tests start in small: test_evidence.py (all of results_quick's), and a test for each of the rest.
ELSEWHERE = [
    f"benchmarks/{name}.py"
    for name in (
        "results_quick", "results", "early_stability", "trade_off", "ablations", "transfer", "preferences",
        "attack_check", "compare_methods", "compare_preferences", "evaluate", "head_features", "input_pipeline",
        "linear_probe", "real_encoder", "robust_and_aligned", "time_to_robust",
    )
]  # fmt: skip
# Where a command says "...": what a reader has to add.
ADDED = {
    "model_name_or_path": "openai/clip-vit-base-patch32",
    "train_shards": "data/imagenet/train",
    "output_dir": "runs/added",
}
# Which flags name what has to exist beforehand.
MODELS = {"model", "model_name_or_path", "reference_model_name_or_path", "llava", "start_from", "input"}
MODELS |= {"base_model", "processor"}
# Published models -> the tiny one in the same layout (tests/published_layouts.py) that stands for them.
PUBLISHED = {
    "chs20/fare2-clip": FARE,
    "chs20/tecoa4-clip": FARE,
    "chs20/FARE4-ViT-B-32-laion2B-s34B-b79K": GELU,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": GELU,
    "LEAF-CLIP/CLIP-ViT-L-FARE2": LEAF,
    "LEAF-CLIP/OpenCLIP-ViT-g-FARE2": SHARDED,
    "fare_eps_2.pt": "robustvlm_visual",
    "simclip4.pt": "simclip_visual",
    "tecoa_eps_4.pt": "tecoa_vision_encoder",
    "epoch_5.pt": CHECKPOINT,
    "ViT-L-14.pt": OPENAI,
    "-open-clip": FARE,
}
WITH_PROCESSOR = "openai/clip-vit-large-patch14"  # a LEAF with a processor: the base model of the image towers
KINDS = {
    "siglip": "siglip",
    "dinov2": "dinov2_head",
    "convnext": "convnext",
}  # what a model's name holds -> what stands for it
DATA = {"data", "eval_data", "train_data", "train_shards", "eval_shards", "zero_shot_data", "probe_data", "pairs"}


def settings_class(script: str) -> type:
    name = f"documented_{Path(script).stem}_{Path(script).parent.name}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].Settings


def values(arguments: list[str]) -> dict[str, list[str]]:
    """{"eps": ["1", "4"], ...}"""
    found: dict[str, list[str]] = {}
    for word in arguments:
        if word.startswith("--"):
            of = found.setdefault(word[2:], [])
        else:
            of.append(word)
    return found


def layouts(arguments: list[str]) -> set[str]:
    """The layouts of the published models that a command names."""
    named = [model_name(name).path for flag, given in values(arguments).items() if flag in MODELS for name in given]
    return {layout for end, layout in PUBLISHED.items() if any(path.endswith(end) for path in named)}


def completed(command: Command) -> list[str]:
    return command.arguments if command.whole else later_wins(flags(ADDED), command.arguments)


def shrunk(command: Command) -> list[str]:
    """Its flags, with those behind them that make it small."""
    script, arguments = command.script, completed(command)
    arguments = [word.replace("/scratch/", "scratch/").replace("/shared/", "shared/") for word in arguments]
    if "estimate_memory" in values(arguments):  # trains nothing, and is about the batch that is asked for
        return arguments
    known = {field.name for field in dataclasses.fields(settings_class(script))}
    smaller = {name: value for name, value in SMALLER.get(script, {}).items() if name in known}
    if "config" in values(arguments) and script != "evaluate.py":
        smaller["global_batch_size"] = 4
    if layouts(arguments) & {GELU, CHECKPOINT, OPENAI} and "processor" not in values(arguments):
        smaller["processor"] = "clip_processor"  # their vocabulary is not CLIP's, whose tokenizer would be brought
    if "classnames" in values(arguments) and script == "train_lore.py":  # 80 texts for each of ImageNet's 1000 classes
        smaller["classnames"] = "ten.txt"
    return later_wins(arguments, flags(smaller))


def test_the_documents_have_commands():
    assert len(SCRIPTS) > 80
    assert {command.where for command in COMMANDS} >= {
        "README.md",
        "docs/results.md",
        "train_po.py",
        "recipes/README.md",
    }


@pytest.mark.parametrize("command", SCRIPTS, ids=str)
def test_the_flags_of_a_documented_command_are_accepted(command, monkeypatch):
    script, arguments = command.script, completed(command)
    if script.endswith(".sbatch"):  # as slurm/settings.sh does: a recipe replaces what is trained on what
        recipe = values(arguments).get("config", [None])[0]
        arguments = later_wins(flags({"output_dir": "runs/job"} if recipe else ADDED), arguments)
        script = "train_lore.py" if recipe is None else re.match(r"# (train_\w+\.py): ", (ROOT / recipe).read_text())[1]
        if command.script == "slurm/evaluate.sbatch":
            script, arguments = "evaluate.py", later_wins(["--output_dir", "runs/job"], command.arguments)
    monkeypatch.chdir(ROOT)
    parse_settings(settings_class(script), arguments)
    for config in re.findall(r"accelerate_configs/\w+\.yaml", " ".join(command.words)):
        assert (ROOT / config).is_file()


@pytest.mark.parametrize("script", SMALLER)
def test_what_makes_a_command_small_is_accepted(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in SCRIPTS:
        if command.script == script and tried(command):
            parse_settings(settings_class(script), shrunk(command))


def test_what_else_is_documented_is_there():
    """make, pip, pytest: what they name exists. What comes from the hub cannot be tried without a network."""
    requirements = (ROOT / "requirements.txt").read_text().lower()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in COMMANDS:
        if command.words[0] == "make":
            assert set(command.words[1:]) <= set(targets), command
        elif command.words[:2] == ("pip", "install"):
            for package in command.words[2:]:
                if package != "-r" and not package.endswith(".txt"):
                    assert re.search(
                        rf"^{re.split('[<>=]', package)[0].lower()}==", requirements, flags=re.MULTILINE
                    ), command
        elif command.words[:3] == ("python", "-m", "pytest"):
            assert all((ROOT / word).exists() for word in command.words[3:] if "/" in word), command
        elif command.words[:2] == ("python", "-m"):
            assert command.words[2] == "venv" or (ROOT / f"{command.words[2].replace('.', '/')}.py").exists(), command
        else:
            assert command.script or command.words[0] == "hf", command


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?:", link):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_leads_to_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{path.name})" in readme, path


# --------------------------------------------------------------------------------------------------- run at tiny size


class Sandbox:
    """A directory like a user's clone, in which whatever a command reads stands ready, small."""

    def __init__(self, root: Path, digits: Path, attributes: Path) -> None:
        self.root, self.attributes = root, attributes
        (root.parent / "published").mkdir()
        self.published = save_layouts(root.parent / "published")
        for path in ROOT.iterdir():
            if path.name in ("docs", "Makefile"):  # written to
                shutil.copytree(path, root / path.name) if path.is_dir() else shutil.copy(path, root)
            elif path.name not in ("data", "runs", ".git") and not (path.is_dir() and path.name.startswith(".")):
                (root / path.name).symlink_to(path)
        # CIFAR-10's names, which some commands give, on digits.
        self.photographs = root.parent / "photographs"
        shutil.copytree(digits, self.photographs)
        names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        (self.photographs / "classnames.txt").write_text("\n".join(names) + "\n")
        shutil.copy(self.photographs / "classnames.txt", root / "ten.txt")
        self.shard = self.few_of(digits / "train")
        self.pair_shard = self.few_of(attributes / "pairs/train")
        for folder in (
            "pictures/cat",
            "pictures/dog",
            *(f"imagenet/{split}/{name}" for split in ("train", "val") for name in imagenet_wordnet_ids()[:2]),
        ):
            (root / folder).mkdir(parents=True)
            for number in range(10):
                (root / folder / f"{number}.jpg").write_bytes(image_bytes(number))
        (root / "pairs").mkdir()
        (root / "pairs/0.jpg").write_bytes(image_bytes(0))
        (root / "pairs/0.json").write_text('{"chosen": "a photo of a woman.", "rejected": ["a photo of a man."]}')
        (root / "imagenet100.txt").write_text("\n".join(imagenet_wordnet_ids()[:2]) + "\n")
        (root / "cat.jpg").write_bytes(image_bytes(0))

    def few_of(self, folder: Path) -> Path:
        """A shard with some samples of the first one there."""
        shard = self.root.parent / f"{folder.parent.name}.tar"
        with tarfile.open(sorted(folder.glob("*.tar"))[0]) as whole, tarfile.open(shard, "w") as few:
            for member in whole.getmembers()[:24]:
                few.addfile(member, whole.extractfile(member))
        return shard

    def model(self, flag: str, name: str) -> None:
        named = model_name(name)
        if named.base_model is not None:
            self.model("base_model", named.base_model)
        path = self.root / named.path
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        layout = next((layout for end, layout in PUBLISHED.items() if named.path.endswith(end)), None)
        if layout is not None:
            copy(Path(self.published[layout].path), path)
        elif path.suffix == ".json":
            copy(Path(self.published[CHECKPOINT].base_model), path)
        elif flag == "processor" or name == WITH_PROCESSOR:
            copy(Path(self.published[LEAF].processor), path)
            if name == WITH_PROCESSOR:
                shutil.copytree(self.published[LEAF].path, path, dirs_exist_ok=True)
        elif flag == "start_from":
            shutil.copytree(ROOT / "examples/reading_clip", path)
        elif flag == "llava":
            save_llava(path, image_size=32)
        elif path.name == "head":
            words = {"model_name_or_path": CLIP, "train_shards": "runs/attributes/pairs/train", "output_dir": name}
            self.start("train_po.py", words | {"task": "pairs", "trainable": "head"} | SMALLER["train_po.py"])
        else:
            save_small_model(path, next((kind for part, kind in KINDS.items() if part in name), "clip"))

    def data(self, flag: str, name: str) -> None:
        path = self.root / name
        if path.exists():
            return
        if braces := re.search(r"\{(\d+)\.\.(\d+)\}", name):
            for number in range(int(braces[1]), int(braces[2]) + 1):
                self.data(flag, name.replace(braces[0], f"{number:0{len(braces[1])}d}"))
        elif path.suffix == ".tar":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name.replace("*", "0")).symlink_to(self.pair_shard if "vl-bias" in name else self.shard)
        elif "attributes" in name:
            shutil.copytree(self.attributes, self.root / name[: name.index("attributes")] / "attributes")
        elif flag.endswith("_shards") and path.name not in ("train", "test", "val"):
            path.mkdir(parents=True)
            (path / "0.tar").symlink_to(self.shard)
        else:
            path = path.parent if path.name in ("train", "test", "val") else path
            pairs = path.name in ("gender-pairs", "vl-bias")
            shutil.copytree(self.attributes / "pairs" if pairs else self.photographs, path)

    def start(self, script: str, settings: dict[str, object]) -> None:
        self.prepare(flags(settings))
        result = self.run(script, flags(settings))
        assert result.returncode == 0, result.stdout

    def run(self, script: str, arguments: list[str]) -> subprocess.CompletedProcess:
        return subprocess.run(
            [warm_python(), script, *arguments],
            cwd=self.root,
            env=script_environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
        )

    def clear(self) -> None:
        for name in ("data", "runs", "models", "scratch", "shared"):
            shutil.rmtree(self.root / name, ignore_errors=True)

    def prepare(self, arguments: list[str]) -> None:
        named_by = values(arguments)
        for recipe in named_by.get("config", []):
            read = yaml.safe_load((ROOT / recipe).read_text())
            named_by = {flag: [str(value)] for flag, value in read.items()} | named_by
        for flag, named in named_by.items():
            for name in named:
                if flag in MODELS:
                    self.model(flag, name)
                elif flag in DATA:
                    self.data(flag, name)


def copy(source: Path, path: Path) -> None:
    shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory, digits, attribute_digits) -> Sandbox:
    root = tmp_path_factory.mktemp("user") / "clone"
    root.mkdir()
    return Sandbox(root, digits, attribute_digits)


@functools.cache
def said(command: Command) -> frozenset[str]:
    """Its flags, and of their values those that choose what runs: a word, a recipe, a subject, a kind of model."""
    found = set()
    fields = {field.name: field.metadata for field in dataclasses.fields(settings_class(command.script))}
    for flag, given in values(shrunk(command)).items():
        choices = fields[flag]["choices"] or () if flag != "config" else given
        kinds = [kind for kind in KINDS if flag in MODELS and any(kind in value for value in given)]
        found |= {flag, *(f"{flag} {word}" for word in (*kinds, *given) if word in choices or word in kinds)}
    return frozenset(found | layouts(completed(command)))


def says_more(one: Command, other: Command) -> bool:
    """Whether ``one`` runs all that ``other`` does; of two that say the same, whether it comes first."""
    if one == other or one.script != other.script or one.script.startswith("examples/make_"):
        return False
    return said(one) > said(other) or (said(one) == said(other) and COMMANDS.index(one) < COMMANDS.index(other))


def test_every_published_layout_is_run():
    """By a command each, or by one that names several."""
    assert set.union(*(layouts(completed(command)) for command in commands_to_run())) == {*CLIPS, *IMAGE_TOWERS}


def commands_to_run() -> list[Command]:
    can_run = [command for command in SCRIPTS if tried(command)]
    return [command for command in can_run if not any(says_more(other, command) for other in can_run)]


def tried(command: Command) -> bool:
    """Whether it can be run here: no hub, no SLURM, and not what other tests start in small."""
    elsewhere = command.script.endswith(".sbatch") or command.script in ELSEWHERE
    return not elsewhere and not any(HUB.search(word) for word in command.words)


@pytest.mark.slow
@pytest.mark.parametrize("command", commands_to_run(), ids=str)
def test_a_documented_command_runs(command, sandbox):
    script, arguments = command.script, shrunk(command)
    sandbox.clear()
    sandbox.prepare(arguments)
    if script == "examples/make_shards.py" and "data/imagenet" in values(arguments)["data"]:
        (sandbox.root / "data/imagenet/classnames.txt").write_text("\n".join(imagenet_prompts()[0]) + "\n")
    result = sandbox.run(script, arguments)
    assert result.returncode == 0, result.stdout[-4000:]
    if "output_dir" in values(arguments) and "prefetch" not in values(arguments):
        assert any((sandbox.root / values(arguments)["output_dir"][0]).iterdir())
