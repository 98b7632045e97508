"""What a step needs: counted on fake tensors, beside what real steps of train_lore.py hold."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

import train_lore
import utils.methods.lore
from tests.conftest import accelerate_launch, run_script
from tests.small_models import photos, save_small_clip, small_encoder
from utils.errors import UserError
from utils.methods.attacks import frozen, pgd
from utils.methods.losses import squared_distance
from utils.models.encoders import enable_gradient_checkpointing
from utils.training import memory
from utils.training.memory import (
    TOWERS,
    Layout,
    LiveBytes,
    count_step,
    device_bytes,
    largest_batch,
    optimizer_bytes,
    peak_bytes,
    tower_config,
)
from utils.training.optimization import make_optimizer

SMALL = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=6,
    num_attention_heads=2, image_size=32, patch_size=8, projection_dim=24,
)  # fmt: skip


@pytest.fixture(scope="session")
def deep_clip(tmp_path_factory):
    """6 layers of width 128: weights, optimizer and activations all matter for the peak of a step of 16 images."""
    directory = tmp_path_factory.mktemp("models") / "deep"
    save_small_clip(directory, num_layers=6, hidden_size=128)
    return directory


def vision_config(directory):
    config = AutoConfig.from_pretrained(directory)
    config.vision_config.projection_dim = config.projection_dim
    return config.vision_config


def settings(model, digits, output_dir, **changes):
    values = {
        "model_name_or_path": model, "train_shards": digits / "train", "output_dir": output_dir,
        "cache_dir": output_dir.parent / "cache", "per_device_train_batch_size": 16, "max_steps": 2, "logging_steps": 1,
        "attack_steps": 2, "primal_steps": 2, "num_workers": 0, "report_to": "none", "checkpoint_steps": 0,
    } | changes  # fmt: skip
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def test_live_bytes_counts_a_storage_once_and_as_long_as_it_lives():
    with LiveBytes() as tensors:
        a = torch.zeros(1000)
        view = a.view(10, 100)[1:]
        torch.zeros(500).add_(1)
        assert tensors.live == 4000
        del a
        assert tensors.live == 4000
        del view
        assert tensors.live == 0
        torch.zeros(10, device="meta")
    assert tensors.peak == 6000


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_deep_tower_is_continued_exactly(checkpointing, monkeypatch):
    """From 3 and 4 blocks to 6 as if all 6 had been counted, at every batch size, also those not counted."""
    options = {"compute_dtype": torch.bfloat16, "reference_dtype": "bfloat16", "gradient_checkpointing": checkpointing}
    continued = count_step(SMALL, **options)
    monkeypatch.setattr(memory, "COUNTED", 6)
    whole = count_step(SMALL, **options)
    assert sorted(continued.parameters) == sorted(whole.parameters)
    assert continued.reference_bytes == whole.reference_bytes
    for name in whole.phases:
        for batch_size in (1, 2, 50, 1000):
            peaks = [(c.phases[name][:, :2] @ [1, batch_size]).max() for c in (continued, whole)]
            assert peaks[0] == peaks[1], (name, batch_size)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("processes", [1, 8])
def test_the_largest_batch_fits_and_one_more_does_not(stage, processes):
    count = count_step(SMALL, compute_dtype=torch.bfloat16, gradient_checkpointing=False)
    layout = Layout(stage, processes, accumulation=2, reduce_bucket_size=10_000)
    capacity = 3 * peak_bytes(count, layout, 1)["total"]
    batch_size = largest_batch(count, layout, capacity)
    assert batch_size > 1
    fits, too_much = (peak_bytes(count, layout, size) for size in (batch_size, batch_size + 1))
    assert fits["total"] <= capacity < too_much["total"]
    assert fits["total"] == sum(size for kind, size in fits.items() if kind not in ("phase", "total"))
    assert largest_batch(count, layout, peak_bytes(count, layout, 0)["total"] - 1) == 0


def test_what_more_processes_and_higher_stages_save():
    count = count_step(SMALL, compute_dtype=torch.bfloat16, gradient_checkpointing=True)

    def fixed(stage, processes, **options):
        buckets = {"reduce_bucket_size": 1, "prefetch_bucket_size": 0, "max_reuse_distance": 0}
        layout = Layout(stage, processes, param_persistence_threshold=0, **buckets, **options)
        return {name: sum(kinds.values()) for name, kinds, _ in device_bytes(count, layout)}

    weights = 4 * sum(count.parameters)
    assert fixed(0, 8)["attack"] == 5 * weights  # weights, reference, two states, DDP's gradients
    assert fixed(2, 8)["attack"] == pytest.approx(weights * (2 + 3 / 8), rel=0.01)  # two states and the master copy
    assert fixed(3, 8)["attack"] - fixed(3, 8, gather_for_attack=False)["attack"] == weights - count.layer_bytes
    sharded = fixed(3, 8, shard_reference=True)
    assert fixed(3, 8)["attack"] - sharded["attack"] == pytest.approx(weights * 7 / 8, rel=0.01)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.filterwarnings("ignore")
def test_optimizer_states_are_as_large_as_counted(name):
    module = torch.nn.Sequential(torch.nn.Linear(70, 70), torch.nn.Linear(70, 3))
    optimizer = make_optimizer(name, module, 1e-3, 0.0)
    module(torch.randn(2, 70)).sum().backward()
    optimizer.step()
    kept = [item for state in optimizer.state.values() for item in state.items()]
    states = [value for key, value in kept if "qmap" not in key and key != "step"]
    found = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    assert found == optimizer_bytes(name, [parameter.numel() for parameter in module.parameters()])


def test_the_towers_have_the_published_sizes():
    """Parameters of the image towers in millions, as open_clip's model profile gives them."""
    expected = {
        "ViT-B/32": 87.85, "ViT-B/16": 86.19, "ViT-L/14": 303.97,
        "ViT-L/14-336": 304.29, "ViT-H/14": 632.08, "ViT-bigG/14": 1844.91,
    }  # fmt: skip
    assert set(expected) == set(TOWERS)
    for name, millions in expected.items():
        with torch.device("meta"):
            tower = CLIPVisionModelWithProjection(tower_config(name))
        assert sum(parameter.numel() for parameter in tower.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_real_run_needs_what_is_estimated(deep_clip, digits, tmp_path, optimizer, checkpointing):
    with LiveBytes() as tensors:
        train_lore.main(
            settings(deep_clip, digits, tmp_path / "run", optimizer=optimizer, gradient_checkpointing=checkpointing)
        )
    count = count_step(vision_config(deep_clip), compute_dtype=torch.float32, gradient_checkpointing=checkpointing)
    expected = peak_bytes(count, Layout(optimizer=optimizer), 16)
    assert tensors.peak == pytest.approx(expected["total"], rel=0.15)
    # All that matters is in play: none of the large kinds is small change in this test.
    assert min(expected[kind] for kind in ("weights", "reference", "optimizer", "activations")) > 0.05 * tensors.peak


@pytest.mark.parametrize("phase", ["attack", "update"])
def test_checkpointing_saves_memory_and_changes_no_gradient(deep_clip, phase):
    """In the attack under frozen parameters too, as the trainer runs it: in train mode."""
    x, peaks, gradients = photos(32), [], []
    for checkpointing in (False, True):
        encoder = small_encoder(deep_clip).train()
        if checkpointing:
            enable_gradient_checkpointing(encoder)
        target = torch.zeros(32, encoder.embed_dim)
        with LiveBytes() as tensors:
            if phase == "attack":
                with frozen(encoder):
                    free = x.clone().requires_grad_(True)
                    gradients.append(torch.autograd.grad(squared_distance(encoder(free), target).sum(), free))
            else:
                squared_distance(encoder(x), target).mean().backward()
                gradients.append([parameter.grad for parameter in encoder.parameters()])
        peaks.append(tensors.peak)
    assert peaks[1] < 0.6 * peaks[0]
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_the_trainers_attack_recomputes(deep_clip, digits, tmp_path, monkeypatch):
    """Hugging Face's layers checkpoint in train mode only: the attack of a real run must be in it, and save memory."""
    modes, peaks = [], []

    def watched_frozen(module):
        modes.extend(part.training for part in module.modules())
        return frozen(module)

    def watched_pgd(*args, **kwargs):
        with LiveBytes() as tensors:
            delta = pgd(*args, **kwargs)
        peaks.append(tensors.peak)
        return delta

    monkeypatch.setattr(utils.methods.lore, "frozen", watched_frozen)
    monkeypatch.setattr(utils.methods.lore, "pgd", watched_pgd)
    for checkpointing in (False, True):
        output_dir = tmp_path / f"run-{checkpointing}"
        train_lore.main(settings(deep_clip, digits, output_dir, gradient_checkpointing=checkpointing, max_steps=1))
    assert len(modes) > 50
    assert all(modes)
    assert peaks[1] < 0.6 * peaks[0]


def test_the_command_needs_neither_data_nor_weights(deep_clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "TOWERS", {"ViT-B/32": TOWERS["ViT-B/32"]})  # one of them, for time
    config_alone = tmp_path / "config-alone"
    config_alone.mkdir()
    shutil.copy(deep_clip / "config.json", config_alone)
    common = ["--estimate_memory", "--estimate_processes", "4", "--model_name_or_path"]
    train_lore.main([*common, str(config_alone), "--gradient_checkpointing", "--global_batch_size", "1024"])
    output = capsys.readouterr().out
    for expected in (
        "4 processes",
        "128 images each per micro-batch (x 2)",
        "ViT-B/32",
        "config-alone",
        "ZeRO-3 + gc",
        "Largest",
        "activations",
    ):
        assert expected in output
    with pytest.raises(UserError, match=r"holds no config\.json"):
        train_lore.main([*common, str(tmp_path)])
    with pytest.raises(
        UserError, match=r"--global_batch_size 1000: .* 4 x 128 .* = 512; --per_device_train_batch_size 125"
    ):
        train_lore.main([*common, str(config_alone), "--global_batch_size", "1000"])
    with pytest.raises(UserError, match="--reference_dtype bfloat16"):
        train_lore.main([*common, str(config_alone), "--estimate_precision", "no", "--reference_dtype", "bfloat16"])


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "optimizer"), [(0, "adamw"), (2, "adamw_8bit"), (2, "adamw"), (3, "adamw")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_processes_need_what_is_estimated(deep_clip, digits, tmp_path, stage, optimizer, checkpointing):
    """DDP and DeepSpeed's stages on two CPU processes in float32, with buckets on the scale of the model."""
    buckets = {"reduce_bucket_size": 200_000, "prefetch_bucket_size": 50_000, "max_reuse_distance": 400_000}
    buckets["param_persistence_threshold"] = 1_000
    zero = {name if name == "reduce_bucket_size" else f"stage3_{name}": size for name, size in buckets.items()}
    batch_sizes = dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto"
    )
    (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": stage} | zero} | batch_sizes))
    config = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0, "num_processes": 2}
    if stage:
        deepspeed = {"deepspeed_config_file": str(tmp_path / "deepspeed.json"), "zero3_init_flag": False}
        config |= {"distributed_type": "DEEPSPEED", "deepspeed_config": deepspeed}
    else:
        config |= {"distributed_type": "MULTI_GPU", "use_cpu": True, "mixed_precision": "no"}
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    run_script(
        "tests/train_counting_memory.py",
        tmp_path,
        *settings(deep_clip, digits, tmp_path / "run", optimizer=optimizer, gradient_checkpointing=checkpointing),
        launcher=accelerate_launch(tmp_path / "config.yaml"),
    )
    count = count_step(vision_config(deep_clip), compute_dtype=torch.float32, gradient_checkpointing=checkpointing)
    layout = Layout(stage, 2, optimizer, gather_for_attack=False, **buckets)
    expected = peak_bytes(count, layout, 16)["total"]
    # Process 0 saves the model at the end, from a copy that is on the host where there is a GPU.
    counted = json.loads((tmp_path / "peak-1.json").read_text())
    assert counted == pytest.approx(expected, rel=0.15)
