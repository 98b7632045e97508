"""The same run under any number of processes and any way to share the work: DDP, ZeRO-1, 2 and 3 equal one process."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, accelerate_launch, run_script
from tests.small_models import KINDS, TEXT_KINDS, photos, save_small_model, small_encoder
from tests.train_several import train
from utils.errors import UserError
from utils.models.published import quiet_transformers

SHARDINGS = [
    "cpu_2proc",
    *(pytest.param(f"zero{stage}_cpu_2proc", marks=pytest.mark.slow) for stage in (1, 2, 3)),
    *(pytest.param(f"zero{stage}_offload_cpu_2proc", marks=pytest.mark.slow) for stage in (2, 3)),
]

METHODS = {
    "LORE": ("train_lore", {"max_grad_norm": 0.5}),
    "FARE": ("train_lore", {"constraint": "none", "primal_steps": 1}),
    "PO head": ("train_po", {"trainable": "head", "task": "pairs", "preference": "kto", "orthogonality_weight": 1}),
    "PO image": ("train_po", {"trainable": "image", "preference": "kto", "max_grad_norm": 0.5}),
    "PO both": ("train_po", {"trainable": "all", "task": "pairs"}),
    # Some micro-batches of these pairs hold no clean image.
    "PO image + l2": ("train_po", {"trainable": "image", "task": "pairs", "constraint": "embedding", "rho": 0.001}),
    "PO head + l2": ("train_po", {"trainable": "head", "task": "pairs", "constraint": "embedding", "rho": 0.001}),
}
OWN = {"images_per_second", "peak_memory_gib", "data_wait_fraction", "launch"}  # keys that runs need not share
OFFLOADED = {2: "optimizer", 3: "optimizer, parameters"}  # by the stage of a config with offload


@pytest.fixture(scope="module")
def arguments(small_clip, digits, attribute_digits, tmp_path_factory):
    """The command line of a method's run of three steps on global batches of eight."""
    cache = tmp_path_factory.mktemp("sharding") / "cache"

    def make(method, output_dir, processes=1, **changes):
        trainer, own = METHODS[method]
        labelled = digits if trainer == "train_lore" else attribute_digits
        data = attribute_digits / "pairs" if own.get("task") == "pairs" else labelled
        settings = {
            "model_name_or_path": small_clip, "train_shards": data / "train",
            "output_dir": output_dir, "cache_dir": cache,
            "eval_shards": data / ("val" if own.get("task") == "pairs" else "test"),
            "eval_num_samples": 17,  # leaves a process an empty last batch
            "eval_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4 // processes,
            "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "num_workers": 0, "report_to": "none",
        }  # fmt: skip
        settings |= {"attack_steps": 2, "eps": 8} if trainer == "train_lore" else {"train_num_samples": 64}
        words = {**settings, **own, **changes}.items()
        return [str(word) for name, value in words if value is not None for word in (f"--{name}", value)]

    return make


def plan(folder, runs):
    path = folder / "plan.json"
    path.write_text(json.dumps(runs))
    return path


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def compared(row):
    """The keys of a row that two runs have to agree in. At the reference reward_accuracy is the sign of rounding."""
    at_reference = abs(row.get("margin_mean", 1)) < 1e-4
    return row.keys() - OWN - ({"reward_accuracy"} if at_reference else set())


def image_embeds(directory):
    with torch.no_grad():
        return small_encoder(directory)(photos(8))


def parameters(directory):
    from transformers import CLIPModel

    with quiet_transformers():
        return CLIPModel.from_pretrained(directory).state_dict()


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_processes_equal_one(arguments, tmp_path, sharding):
    """SGD: parameters within 1e-6. AdamW, which blows up rounding: embeddings within 1e-6 of the largest entry."""
    methods = ["LORE"] if "offload" in sharding else METHODS
    runs = [(method, sgd) for method in methods for sgd in (True, False)]
    changes = {True: {}, False: {"learning_rate": 1e-5}}
    if "zero3" in sharding:
        changes[True]["shard_reference"] = "true"

    def entry(method, sgd, where, processes):
        own = {name: value for name, value in changes[sgd].items() if processes == 2 or name != "shard_reference"}
        output_dir = tmp_path / where / f"{method} {'sgd' if sgd else 'adamw'}"
        return {"trainer": METHODS[method][0], "arguments": arguments(method, output_dir, processes, **own), "sgd": sgd}

    run_script(
        "tests/train_several.py",
        plan(tmp_path, [entry(method, sgd, "two", 2) for method, sgd in runs]),
        launcher=accelerate_launch(ROOT / "accelerate_configs" / f"{sharding}.yaml"),
    )
    of_deepspeed = {}
    if sharding.startswith("zero"):
        stage = int(sharding[4])
        of_deepspeed = {"zero_stage": stage, "offload": OFFLOADED[stage] if "offload" in sharding else "none"}
    for method, sgd in runs:
        single = entry(method, sgd, "one", 1)
        train(**single)
        one, two = (tmp_path / where / f"{method} {'sgd' if sgd else 'adamw'}" for where in ("one", "two"))
        if sgd:
            found = parameters(two)
            error = max((found[name] - expected).abs().max().item() for name, expected in parameters(one).items())
        else:
            expected = image_embeds(one)
            error = ((expected - image_embeds(two)).abs().max() / expected.abs().max()).item()
        print(f"{sharding} {method} {'sgd' if sgd else 'adamw'}: {error:.2e}")
        alone, together = rows(one)[0]["launch"], rows(two)[0]["launch"]
        assert (alone["num_processes"], together["num_processes"], together["num_machines"]) == (1, 2, 1)
        assert {key: together[key] for key in ("zero_stage", "offload") if key in together} == of_deepspeed
        assert (together["distributed_type"] == "DEEPSPEED") == bool(of_deepspeed)
        assert error <= 1e-6, f"{method}: {error}"
        for expected, found in zip(rows(one), rows(two), strict=True):
            for key in compared(expected):
                assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize(
    "sharding", ["cpu_2proc", *(pytest.param(f"zero{stage}_cpu_2proc", marks=pytest.mark.slow) for stage in (2, 3))]
)
def test_two_processes_equal_one_for_every_kind_of_encoder(arguments, tmp_path, sharding):
    """LORE by SGD, and both towers of a BERT's: every weight within 1e-6 of its tensor's largest. DINOv2 has one that
    is never used, SigLIP's towers have weights that another module multiplies by."""
    # As above, or as another kind.
    same_towers = ("clip", "clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_bert", "siglip_bert")
    methods = {kind: "LORE" for kind in KINDS if kind not in same_towers} | {"dinov2_bert": "PO both"}
    kinds = list(methods)
    for kind in kinds:
        save_small_model(tmp_path / kind, kind)

    def entry(kind, where, processes):
        changes = {"model_name_or_path": tmp_path / kind, "learning_rate": 1e-4}
        if kind not in (*TEXT_KINDS, "dinov2_head"):  # nothing that tells classes apart
            changes["eval_shards"] = None
        return {
            "trainer": METHODS[methods[kind]][0],
            "arguments": arguments(methods[kind], tmp_path / where / kind, processes, **changes),
            "sgd": True,
        }

    run_script(
        "tests/train_several.py",
        plan(tmp_path, [entry(kind, "two", 2) for kind in kinds]),
        launcher=accelerate_launch(ROOT / "accelerate_configs" / f"{sharding}.yaml"),
    )
    for kind in kinds:
        train(**entry(kind, "one", 1))
        start, one, two = (load_file(tmp_path / where / kind / "model.safetensors") for where in (".", "one", "two"))
        assert set(one) == set(two) == set(start)
        errors = {
            name: ((one[name] - two[name]).abs().max() / one[name].abs().max().clamp_min(1e-3)).item() for name in one
        }
        worst = max(errors, key=errors.get)
        print(f"{sharding} {kind}: {worst} {errors[worst]:.2e}")
        assert errors[worst] <= 1e-6, f"{kind}: {worst} {errors[worst]}"
        moved = {name for name in one if not torch.equal(one[name], start[name])}
        assert len(moved) > 10, kind
        text = [name for name in moved if name.startswith(("text_", "logit_", "classifier"))]
        assert bool(text) == (methods[kind] == "PO both"), text
        for expected, found in zip(rows(tmp_path / "one" / kind), rows(tmp_path / "two" / kind), strict=True):
            for key in compared(expected):
                assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["cpu_2proc", "zero3_cpu_2proc"])
def test_two_processes_equal_one_for_an_image_tower_and_its_base(arguments, layouts, tmp_path, sharding):
    """LORE by SGD from NAME@BASE: every weight within 1e-6 of its tensor's largest, in both layouts."""
    tower = layouts["robustvlm_visual"]
    changes = {"model_name_or_path": f"{tower.path}@{tower.base_model}", "learning_rate": 1e-4, "export": "open_clip"}

    def entry(where, processes):
        words = arguments("LORE", tmp_path / where, processes, **changes)
        return {"trainer": "train_lore", "arguments": words, "sgd": True}

    launcher = accelerate_launch(ROOT / "accelerate_configs" / f"{sharding}.yaml")
    run_script("tests/train_several.py", plan(tmp_path, [entry("two", 2)]), launcher=launcher)
    train(**entry("one", 1))
    start = load_file(f"{tower.base_model}/open_clip_model.safetensors")
    start |= {f"visual.{name}": tensor for name, tensor in tower.state.items()}
    for file in ("model.safetensors", "open_clip_model.safetensors"):
        one, two = (load_file(tmp_path / where / file) for where in ("one", "two"))
        assert set(one) == set(two)
        errors = {
            name: ((one[name] - two[name]).abs().max() / one[name].abs().max().clamp_min(1e-3)).item() for name in one
        }
        worst = max(errors, key=errors.get)
        print(f"{sharding} {file}: {worst} {errors[worst]:.2e}")
        assert errors[worst] <= 1e-6, f"{worst} {errors[worst]}"
    moved = {name for name in start if not torch.equal(two[name], start[name])}
    assert moved == {name for name in start if name.startswith("visual.")}
    for expected, found in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for key in expected.keys() - OWN:
            assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key


def card_settings(run_dir):
    """The settings of a model card, as it shows them."""
    section = (run_dir / "README.md").read_text().partition("## Settings")[2].partition("## ")[0]
    return dict(re.findall(r"^\| (\w+) \| (.*) \|$", section, flags=re.MULTILINE))


def test_a_global_batch_is_the_same_on_one_and_on_two_processes(arguments, tmp_path):
    """--global_batch_size 32: 2 processes x 8 x 2 and 1 x 8 x 4, which both trainers find out themselves."""
    methods = ["LORE", "PO head"]
    common = {"per_device_train_batch_size": 8, "global_batch_size": 32, "checkpoint_steps": 2, "eval_steps": 100}

    def entry(method, where, **changes):
        words = arguments(method, tmp_path / where / method, **common, **changes)
        at = words.index("--gradient_accumulation_steps")
        return {"trainer": METHODS[method][0], "arguments": words[:at] + words[at + 2 :], "sgd": True}

    run_script(
        "tests/train_several.py",
        plan(tmp_path, [entry(method, "two") for method in methods]),
        launcher=accelerate_launch(ROOT / "accelerate_configs/cpu_2proc.yaml"),
    )
    for method in methods:
        train(**entry(method, "one"))
        one, two = tmp_path / "one" / method, tmp_path / "two" / method
        settings = card_settings(one), card_settings(two)
        assert [shown["gradient_accumulation_steps"] for shown in settings] == ["4", "2"]
        assert [shown["global_batch_size"] for shown in settings] == ["32", "32"]
        differing = {name for name in settings[0] if settings[0][name] != settings[1][name]}
        assert differing == {"output_dir", "gradient_accumulation_steps"}
        assert [row["samples"] for row in rows(two)] == [row["samples"] for row in rows(one)] == [0, 32, 64, 96]
        found = parameters(two)
        error = max((found[name] - expected).abs().max().item() for name, expected in parameters(one).items())
        assert error <= 1e-6, f"{method}: {error}"

    # What two processes began, one goes on with: the flag is the same, what follows from it may change.
    whole = parameters(tmp_path / "two/LORE")
    train(**entry("LORE", "two", resume_from_checkpoint=tmp_path / "two/LORE/checkpoints/step-2"))
    resumed = parameters(tmp_path / "two/LORE")
    assert max((resumed[name] - expected).abs().max().item() for name, expected in whole.items()) <= 1e-6
    refused = entry("LORE", "two", resume_from_checkpoint="latest")
    refused["arguments"][refused["arguments"].index("--global_batch_size") + 1] = "16"
    with pytest.raises(UserError, match=r"global_batch_size was 32, is 16.*--global_batch_size 32 keeps it"):
        train(**refused)
