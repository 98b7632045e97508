"""The cost model beside torch's FLOP counter and counted collectives."""

import json
import shutil

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig

from benchmarks import cost_model
from benchmarks.cost import (
    METHODS,
    PO,
    PO_L2,
    Collective,
    Network,
    bytes_per_step,
    counted_flops_per_image,
    float32_flops_per_image,
    float32_share_of_time,
    forwards_per_image,
    furthest_move,
    hidden_batch_size,
    optimizer_traffic,
    sent_bytes,
    step_collectives,
    step_time,
    tower_cost,
)
from tests.conftest import ROOT, accelerate_launch, run_script
from tests.small_models import save_small_clip
from utils.errors import UserError
from utils.methods.attacks import frozen, pgd
from utils.methods.losses import squared_distance
from utils.training.memory import TOWERS, random_encoder, tower_config
from utils.training.metrics import forward_flops, preference_flops_per_sample

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 24,
}  # fmt: skip
CONFIGS = [
    SMALL,
    SMALL | {"num_hidden_layers": 5, "patch_size": 4},
    SMALL | {"intermediate_size": 200, "projection_dim": 7, "image_size": 40},
    SMALL | {"hidden_size": 48, "num_attention_heads": 4, "patch_size": 16},
]
LORE = {"attack_steps": 10, "primal_steps": 5}


@pytest.fixture(scope="module")
def large():
    return tower_cost(tower_config("ViT-L/14"))


@pytest.mark.parametrize("options", CONFIGS)
def test_the_formulas_are_what_torch_counts(options):
    config = CLIPVisionConfig(**options)
    encoder, tower = random_encoder(config, torch.float32), tower_cost(config)
    assert tower.forward == pytest.approx(forward_flops(encoder), rel=1e-3)
    assert tower.parameters == sum(parameter.numel() for parameter in encoder.parameters())
    assert tower.tensors == len(list(encoder.parameters()))
    holders = [module for module in encoder.modules() if list(module.parameters(recurse=False))]
    assert tower.modules == len(holders) - 1  # the class embedding comes with the patch embedding
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        patches = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
        patches(torch.zeros(1, 3, config.image_size, config.image_size))
    assert tower.patch_embedding == counter.get_total_flops()


@pytest.mark.parametrize("name", TOWERS)
def test_the_published_towers_are_counted_exactly(name):
    """On tensors without data: nothing is computed, no weights are made."""
    tower = tower_cost(tower_config(name))
    with FakeTensorMode():
        encoder = random_encoder(tower_config(name), torch.float32)
        assert tower.forward == forward_flops(encoder)
    assert tower.parameters == sum(parameter.numel() for parameter in encoder.parameters())


@pytest.mark.parametrize("clean_in_primal", [True, False])
def test_a_whole_step_counts_what_the_formula_says(clean_in_primal):
    config = CLIPVisionConfig(**SMALL)
    encoder, tower = random_encoder(config, torch.float32), tower_cost(config)
    encoder.vision_model.embeddings.patch_embedding.__class__ = torch.nn.Conv2d  # to be told from the other products
    x, num_steps, updates = torch.rand(1, 3, 32, 32), 3, 2
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            target = encoder(x)  # the reference
        with frozen(encoder):
            delta = pgd(
                lambda adversarial: squared_distance(encoder(1 * adversarial), target),  # the counter bears no leaf
                x,
                eps=0.1,
                step_size=0.1,
                num_steps=num_steps,
                start=torch.zeros_like(x),
            )
        for _ in range(updates):
            seen = torch.cat([x, x + delta]) if clean_in_primal else x + delta
            squared_distance(encoder(seen), target).sum().backward()
        if clean_in_primal:
            with torch.no_grad():
                encoder(x)
    method = "LORE" if clean_in_primal else "FARE"
    expected = counted_flops_per_image(tower, method, num_steps, updates)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)
    convolutions = sum(
        flops for name, flops in counter.get_flop_counts()["Global"].items() if "convolution" in str(name)
    )
    assert float32_flops_per_image(tower, method, num_steps, updates) == convolutions


def test_a_preference_step_counts_what_the_formula_says():
    """A clean and an attacked picture: reference, policy forward and backward, dual step on the clean one."""
    config = CLIPVisionConfig(**SMALL)
    encoder, tower = random_encoder(config, torch.float32), tower_cost(config)
    encoder.vision_model.embeddings.patch_embedding.__class__ = torch.nn.Conv2d  # to be told from the other products
    pictures = torch.rand(2, 3, 32, 32)
    for method in (PO, PO_L2):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            with torch.no_grad():
                target = encoder(pictures)
            squared_distance(encoder(pictures), target + 1).sum().backward()
            if method == PO_L2:
                with torch.no_grad():
                    encoder(pictures[:1])
        assert counter.get_total_flops() == pytest.approx(2 * counted_flops_per_image(tower, method, 0, 1), rel=1e-3)
        convolutions = [n for name, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(name)]
        assert 2 * float32_flops_per_image(tower, method, 0, 1) == sum(convolutions)


def test_the_dual_step_of_preferences_sends_its_multiplier_and_gathers_once(large):
    for stage in range(4):
        sent = [
            {one.what for one in step_collectives(large, method, stage=stage, processes=8, **LORE)}
            for method in (PO, PO_L2)
        ]
        assert sent[1] - sent[0] == {"multiplier's gradients"} | ({"weights, dual"} if stage == 3 else set())


def test_the_multiples_of_the_methods():
    assert forwards_per_image("LORE", 10, 5) == 52
    assert forwards_per_image("FARE", 10, 1) == forwards_per_image("TeCoA", 10, 1) == 24
    assert forwards_per_image("TeCoA + l2", 10, 5) == forwards_per_image("TeCoA + KL", 10, 5) == 52
    assert forwards_per_image(PO, 10, 5) == 4
    assert forwards_per_image(PO_L2, 10, 5) == preference_flops_per_sample(1, 2, head=False, dual=True) / 2
    assert forwards_per_image("LORE", 10, 5, recompute=True) == 52 + 10 + 2 * 5


def test_the_multiples_of_f_are_near_what_is_counted():
    """The trainers' utilisation uses multiples of F: within 4 % of the counted FLOPs for the published towers."""
    for name in TOWERS:
        tower = tower_cost(tower_config(name))
        for method, k in (("LORE", 5), ("FARE", 1), ("FARE", 5)):
            charged = forwards_per_image(method, 10, k) * tower.forward
            assert counted_flops_per_image(tower, method, 10, k) == pytest.approx(charged, rel=0.04)


def test_every_cost_grows_with_k_and_attack_steps(large):
    for method in METHODS:
        by_k = [forwards_per_image(method, 10, k) for k in (1, 5, 10)]
        by_n = [forwards_per_image(method, n, 5) for n in (5, 10, 20)]
        assert by_k == sorted(set(by_k))
        assert by_n == sorted(set(by_n))
        for stage in range(4):
            settings = {"stage": stage, "processes": 8, "attack_steps": 10}
            sent = [bytes_per_step(step_collectives(large, method, primal_steps=k, **settings), 8) for k in (1, 5, 10)]
            assert sent == sorted(set(sent))


def test_float32_takes_more_of_the_time_than_of_the_flops(large):
    small = tower_cost(tower_config("ViT-B/32"))
    times = []
    for tower in (small, large):
        flops, slow = 52 * tower.forward, float32_flops_per_image(tower, "LORE", 10, 5)
        times.append(float32_share_of_time(tower, flops, slow, 790e12, 60e12))
        assert times[-1] > slow / flops
        assert float32_share_of_time(tower, flops, slow, 1e12, 1e12) == pytest.approx(slow / flops)
    assert times[0] > 5 * times[1]
    assert optimizer_traffic(1) == 28


@pytest.mark.parametrize(("kind", "expected"), [("all-reduce", 1.5), ("all-gather", 0.75), ("reduce-scatter", 0.75)])
def test_a_ring_of_four_by_hand(kind, expected):
    """Three rounds of quarters each way: 3 / 4 of the message leaves a process, twice that to all-reduce."""
    assert sent_bytes(kind, 1000, 4) == expected * 1000
    assert sent_bytes(kind, 1000, 1) == 0


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("method", [*METHODS, PO, PO_L2])
def test_one_process_sends_nothing(large, stage, method):
    assert step_collectives(large, method, stage=stage, processes=1, **LORE) == []
    times = step_time(large, method, rate=1e14, batch_size=8, stage=stage, processes=1, network=Network(), **LORE)
    assert times.exposed == times.communication == 0
    assert times.compute == pytest.approx(8 * large.forward * forwards_per_image(method, 10, 5) / 1e14)


@pytest.mark.parametrize(
    ("stage", "accumulation", "passes"),  # bytes sent, in 4 P (N - 1) / N
    [(0, 1, 10), (0, 3, 10), (1, 1, 15), (1, 3, 15), (2, 1, 15), (2, 3, 35), (3, 1, 12), (3, 3, 36)],
)
def test_bytes_of_lore_by_hand(large, stage, accumulation, passes):
    """K = 5. ViT-L/14 is shorter than the reuse distance: ZeRO-3 gathers 1 + 5 + 1 times and reduces 5 times."""
    collectives = step_collectives(large, "LORE", stage=stage, processes=8, accumulation=accumulation, **LORE)
    assert bytes_per_step(collectives, 8) / (4 * large.parameters * 7 / 8) == pytest.approx(passes, rel=0.002)


def test_the_attack_sends_something_under_zero_3_alone(large):
    for stage in range(4):
        settings = {"stage": stage, "processes": 8, "primal_steps": 5, "gather_for_attack": False}
        sent = [bytes_per_step(step_collectives(large, "LORE", attack_steps=n, **settings), 8) for n in (5, 20)]
        assert (sent[0] < sent[1]) == (stage == 3)


def test_the_small_collectives_are_small(large):
    small = [
        one
        for one in step_collectives(large, "LORE", stage=2, processes=8, **LORE)
        if one.what in ("multiplier's gradients", "stop flag", "overflow flag or norm")
    ]
    assert [one.calls for one in small] == [5, 4, 1]
    assert 4 * small[1].message == 4 * (768 * 512 + 512 + 512 + 1)
    assert bytes_per_step(small, 8) < 3e6


@pytest.mark.parametrize(("gather", "calls", "passes"), [(False, 1137, 31.0), (True, 478, 11.9)])
def test_zero_3_gathers_what_was_measured(gather, calls, passes):
    """docs/log.md, "Gathering once per attack": a tower of 4 blocks, no reuse distance, two processes."""
    tower = tower_cost(CLIPVisionConfig(**SMALL | {"num_hidden_layers": 4}))
    collectives = step_collectives(
        tower, "LORE", stage=3, processes=2, gather_for_attack=gather, reuse_distance=0, **LORE
    )
    gathers = [one for one in collectives if one.what.startswith("weights")]
    assert sum(one.calls for one in gathers) == pytest.approx(calls, rel=0.01)
    assert sum(one.calls * one.message for one in gathers) / (4 * tower.parameters) == pytest.approx(passes, rel=0.01)


def test_seconds_by_hand():
    network = Network(per_node=8, inside=100.0, between=20.0, latency=0.5)
    assert [network.bandwidth(8), network.bandwidth(16), network.bandwidth(16, spread=False)] == [100, 100, 20]
    assert Network(inside=100.0, between=5.0).bandwidth(16) == 40
    message = Collective("gradients", "all-reduce", 3, 800.0)
    assert network.seconds(message, 8) == pytest.approx(3 * (1400 / 100 + 2 * 3 * 0.5))
    gather = Collective("updated weights", "all-gather", 1, 800.0)
    assert network.seconds(gather, 8) == pytest.approx(700 / 100 + 3 * 0.5)


@pytest.mark.parametrize("stage", range(4))
def test_overlap_lies_between_all_hidden_and_nothing_hidden(large, stage):
    for batch_size in (1, 16, 256):
        settings = {"rate": 4e14, "batch_size": batch_size, "stage": stage, "network": Network(), **LORE}
        times = [
            step_time(large, "LORE", processes=n, spread=spread, **settings)
            for n, spread in ((8, True), (64, True), (64, False))
        ]
        for one in times:
            assert one.compute < one.with_overlap < one.without_overlap
        assert times[0].communication < times[1].communication < times[2].communication


def test_from_the_hidden_batch_size_on_the_bytes_hide(large):
    network = Network(latency=0.0)
    needed = hidden_batch_size(large, rate=4e14, processes=64, network=network)
    for factor, hides in ((0.9, False), (1.1, True)):
        times = step_time(
            large, "LORE", rate=4e14, batch_size=factor * needed, stage=0, processes=64, network=network, **LORE
        )
        gradients = next(one for one in step_collectives(large, "LORE", stage=0, processes=64, **LORE))
        last = network.seconds(gradients, 64) * 5 / gradients.calls
        assert (times.exposed < 1.2 * last + 1e-4) == hides
    ordinary = hidden_batch_size(large, rate=4e14, processes=64, network=network, images=1)
    assert ordinary == pytest.approx(2 * needed)
    assert furthest_move(100, 1e-5, 5) == pytest.approx(2.5e-3)


def measured_rates(path, rows):
    path.write_text(json.dumps({"rows": rows, "hardware": {"device": "a device"}}))
    return str(path)


def test_the_command(tmp_path, capsys):
    row = {"encoder": "ViT-B/32", "method": "LORE", "variant": "bf16", "images_per_second": 500.0, "batch_size": 64}
    slower = row | {"variant": "float32", "images_per_second": 50.0}
    doc = tmp_path / "doc.md"
    doc.write_text("before\n<!-- cost_model.py -->\nan earlier table\n<!-- end -->\nafter\n")
    cost_model.main(
        [
            "--encoders", "ViT-B/32", "--gpus", "8", "64", "--matmul_tflops", "700", "--memory", "false",
            "--output", str(tmp_path / "cost.json"),
            "--measured", measured_rates(tmp_path / "rates.json", [slower, row]), "--markdown", str(doc),
        ]
    )  # fmt: skip
    output = capsys.readouterr().out
    for expected in ("estimate", "ViT-B/32", "ZeRO-3", "52", "assumed 30 %", "measured"):
        assert expected in output
    found = json.loads((tmp_path / "cost.json").read_text())
    rates = {row["rate"]: row["device_tflops"] for row in found["hours"]}
    tower = tower_cost(tower_config("ViT-B/32"))
    assert rates["measured, bf16"] == pytest.approx(500 * 52 * tower.forward / 1e12)
    assert rates["assumed 30 %"] == pytest.approx(210)
    assert found["assumptions"]["inside_gb_s"] == 300
    text = doc.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "an earlier table" not in text
    assert "| ViT-B/32 |" in text


def test_the_command_invents_no_rate(tmp_path, capsys):
    cost_model.main(["--encoders", "ViT-B/32", "--memory", "false"])
    output = capsys.readouterr().out
    assert "no hours" in output
    assert "assumed 30 %" not in output
    with pytest.raises(UserError, match="--measured"):
        cost_model.main(["--measured", measured_rates(tmp_path / "rates.json", [{"encoder": 3}])])
    with pytest.raises(UserError, match="no LORE row"):
        cost_model.main(["--encoders", "ViT-B/32", "--measured", measured_rates(tmp_path / "rates.json", [])])
    (tmp_path / "doc.md").write_text("nothing to replace\n")
    with pytest.raises(UserError, match="no line"):
        cost_model.main(["--encoders", "ViT-B/32", "--memory", "false", "--markdown", str(tmp_path / "doc.md")])


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("config", ["cpu_2proc", "zero1_cpu_2proc", "zero2_cpu_2proc", "zero3_cpu_2proc"])
def test_two_processes_send_what_is_estimated(digits, tmp_path, config, accumulation):
    """A step of train_lore.py on two gloo processes with its collectives counted, by kind."""
    save_small_clip(tmp_path / "clip", num_layers=4, hidden_size=64)
    words = {
        "model_name_or_path": tmp_path / "clip", "train_shards": digits / "train", "output_dir": tmp_path / "run",
        "report_to": "none", "max_steps": 4, "logging_steps": 1000, "num_workers": 0, "checkpoint_steps": 0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": accumulation, "cache_dir": tmp_path / "cache",
    }  # fmt: skip
    run_script(
        "tests/train_counting_collectives.py",
        tmp_path / "found.json",
        *(str(word) for name, value in words.items() for word in (f"--{name}", value)),
        launcher=accelerate_launch(ROOT / f"accelerate_configs/{config}.yaml"),
    )
    shutil.rmtree(tmp_path / "run")
    found = json.loads((tmp_path / "found.json").read_text())
    small = SMALL | {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128}
    tower = tower_cost(CLIPVisionConfig(**small))
    stage = next((int(word[4]) for word in [config] if word.startswith("zero")), 0)
    expected: dict[str, float] = {}
    for one in step_collectives(
        tower, "LORE", stage=stage, processes=2, accumulation=accumulation, reuse_distance=0, **LORE
    ):
        expected[one.kind] = expected.get(one.kind, 0) + one.calls * one.message
    counted: dict[str, float] = {}
    for name, size, number in found["collectives"]:
        kind = next((kind for kind in expected if kind.replace("-", "_") in name), None)
        if kind:  # DeepSpeed logs one process's share of what is gathered, the trainer's own are counted whole
            share = 2 if kind == "all-gather" and not name.startswith("own") else 1
            counted[kind] = counted.get(kind, 0) + share * size * number
    if stage == 0:
        counted["all-reduce"] += 5 * sum(found["ddp_buckets"])
    assert counted.keys() == expected.keys()
    for kind, size in expected.items():
        assert counted[kind] == pytest.approx(size, rel=0.05 if stage == 3 else 0.001), kind
