"""train_lore.py as users start it, and its invariants: processes, accumulation, the limits of the method, resume."""

import dataclasses
import functools
import http.server
import json
import math
import threading

import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

import train_lore
import utils.methods.lore
import utils.training.run
from tests.conftest import ROOT, accelerate_launch, run_script
from tests.shard_maker import image_bytes, write_shard
from tests.small_models import photos, save_small_clip, small_encoder
from utils.errors import UserError
from utils.methods.lagrangian import Multiplier
from utils.models.published import quiet_transformers

KEYS = {
    "step", "samples", "loss", "distance_adv", "distance_clean", "violation_ratio_mean", "violation_ratio_median",
    "violation_ratio_p95", "violation_ratio_max", "violated_fraction", "multiplier_mean", "multiplier_min",
    "multiplier_max", "grad_norm", "learning_rate", "dual_learning_rate", "images_per_second", "data_wait_fraction",
}  # fmt: skip


@pytest.fixture
def arguments(small_clip, digits, tmp_path):
    """The command line of a short run; keyword arguments change it."""

    def make(**changes):
        settings = {
            "model_name_or_path": small_clip,
            "train_shards": digits / "train",
            "output_dir": tmp_path / "run",
            "cache_dir": tmp_path / "cache",
            "per_device_train_batch_size": 8,
            "max_steps": 2,
            "logging_steps": 1,
            "attack_steps": 2,
            "primal_steps": 2,
            "learning_rate": 1e-3,
            "eps": 8,
            "num_workers": 0,
            "report_to": "none",
        } | changes
        return [str(word) for name, value in settings.items() for word in (f"--{name}", value) if value is not None]

    return make


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def embeds(directory):
    with torch.no_grad():
        return small_encoder(directory)(photos(4))


def weights(directory):
    with quiet_transformers():
        return CLIPModel.from_pretrained(directory).state_dict()


def test_a_run_from_the_command_line_ends_in_a_model_that_loads(arguments, small_clip, digits, tmp_path):
    output = run_script(
        "train_lore.py",
        *arguments(
            max_steps=4, eval_shards=digits / "test", eval_num_samples=40, eval_steps=2, logging_steps=2,
            checkpoint_steps=1, checkpoints_total_limit=2, keep_best="eval_accuracy_clean", report_to="tensorboard",
            num_workers=1,
        ),
        launcher=accelerate_launch(ROOT / "accelerate_configs" / "cpu.yaml"),
    )  # fmt: skip
    run_dir = tmp_path / "run"
    assert "step 0: accuracy" in output
    assert "LORE 4/4" in output

    metrics = rows(run_dir)
    assert [row["step"] for row in metrics] == [0, 2, 4]
    assert {"eval_accuracy_clean", "eval_accuracy_pgd"} <= metrics[0].keys()
    assert all(KEYS | {"eval_accuracy_clean", "eval_accuracy_pgd"} <= row.keys() for row in metrics[1:])
    assert metrics[-1]["samples"] == 32
    assert [row.pop("launch", None) is None for row in metrics] == [False, True, True]
    assert all(math.isfinite(value) for row in metrics for value in row.values())

    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-3", "step-4"]
    CLIPProcessor.from_pretrained(run_dir)
    for name in ("checkpoints/step-4/model", "best", "."):
        assert (embeds(run_dir / name) - embeds(small_clip)).abs().max() > 1e-3
    torch.testing.assert_close(embeds(run_dir), embeds(run_dir / "checkpoints/step-4/model"), rtol=0, atol=0)
    card = (run_dir / "README.md").read_text()
    assert "# LORE from" in card
    assert "| rho | 0.1 |" in card
    assert "train_lore.py --model_name_or_path" in card
    assert list((run_dir / "train_lore").glob("events*"))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "LORE"),
        ({"multiplier": "linear", "margin": "fixed"}, "LORE"),
        ({"multiplier": "scalar", "attack_momentum": 0.9, "warmup_steps": 1, "max_grad_norm": 0.1}, "LORE"),
        ({"constraint": "none"}, "FARE"),
        ({"constraint": "none", "clean_weight": 0.5}, "FARE + clean distance"),
        ({"objective": "tecoa", "constraint": "none"}, "TeCoA"),
        ({"objective": "tecoa"}, "TeCoA + l2"),
        ({"objective": "tecoa", "constraint": "kl", "margin": "relative"}, "TeCoA + KL"),
        ({"gradient_checkpointing": "true", "optimizer": "adamw_8bit"}, "LORE"),
    ],
)
def test_every_method_trains(arguments, small_clip, tmp_path, capfd, changes, name):
    train_lore.main(arguments(**changes))
    metrics = rows(tmp_path / "run")
    assert f"{name}:" in capfd.readouterr().err
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(row.keys() >= KEYS for row in metrics)
    assert (metrics[0]["multiplier_mean"] > 0) == (changes.get("constraint") != "none")
    assert metrics[0]["distance_clean"] < 1e-6  # measured at the encoder that was attacked: still the reference
    assert metrics[1]["distance_clean"] > 0
    assert metrics[1]["distance_adv"] > metrics[1]["distance_clean"]
    assert (embeds(tmp_path / "run") - embeds(small_clip)).abs().max() > 1e-3


def test_evaluations_without_pgd_change_nothing_else(arguments, digits, tmp_path, capfd):
    common = {"eval_shards": digits / "test", "eval_num_samples": 12, "eval_steps": 1}
    runs = {pgd: tmp_path / pgd for pgd in ("true", "false")}
    for pgd, run_dir in runs.items():
        train_lore.main(arguments(eval_pgd=pgd, output_dir=run_dir, **common))
    with_pgd, without = (rows(run_dir) for run_dir in runs.values())
    for row, clean_only in zip(with_pgd, without, strict=True):
        assert row.keys() - clean_only.keys() == {"eval_accuracy_pgd"}
        assert row["eval_accuracy_clean"] == clean_only["eval_accuracy_clean"]
    assert torch.equal(embeds(runs["true"]), embeds(runs["false"]))
    assert f"accuracy {without[-1]['eval_accuracy_clean']:.3f} clean\n" in capfd.readouterr().err


OBJECTIVES = next(field for field in dataclasses.fields(train_lore.Settings) if field.name == "objective")


@pytest.mark.parametrize("objective", OBJECTIVES.metadata["choices"])
def test_every_objective_trains_alone_in_steps_that_are_not_logged(arguments, tmp_path, objective):
    """Such steps embed by the reference only where something needs it; every objective goes its own way."""
    common = {"constraint": "none", "primal_steps": 1, "logging_steps": 2}
    train_lore.main(arguments(objective=objective, **common))
    (row,) = rows(tmp_path / "run")
    assert row["step"] == 2
    if objective != "embedding":
        train_lore.main(arguments(output_dir=tmp_path / "fare", **common))
        assert rows(tmp_path / "fare")[0]["loss"] != row["loss"]


def test_a_multiplier_of_zero_is_fare(arguments, tmp_path, monkeypatch):
    train_lore.main(arguments(constraint="none", output_dir=tmp_path / "fare"))
    monkeypatch.setattr(Multiplier, "forward", lambda self, z0: 0 * self.raw(z0.float()).squeeze(-1))
    train_lore.main(arguments(output_dir=tmp_path / "lore"))
    torch.testing.assert_close(embeds(tmp_path / "lore"), embeds(tmp_path / "fare"), rtol=1e-4, atol=1e-4)
    fare, lore = rows(tmp_path / "fare"), rows(tmp_path / "lore")
    assert [row["loss"] for row in lore] == pytest.approx([row["loss"] for row in fare], rel=1e-4)


def test_multiplier_relaxes_under_a_large_tolerance_and_never_falls_without_one(arguments, tmp_path):
    common = {"max_steps": 5, "dual_learning_rate": 0.05, "multiplier": "scalar"}
    train_lore.main(arguments(rho=100, output_dir=tmp_path / "loose", **common))
    train_lore.main(arguments(rho=0, output_dir=tmp_path / "tight", **common))
    loose = [row["multiplier_mean"] for row in rows(tmp_path / "loose")]
    tight = [row["multiplier_mean"] for row in rows(tmp_path / "tight")]
    assert all(later < earlier for earlier, later in zip(loose, loose[1:]))
    assert all(later > earlier for earlier, later in zip(tight, tight[1:]))
    assert rows(tmp_path / "loose")[-1]["violated_fraction"] == 0
    assert rows(tmp_path / "tight")[-1]["violated_fraction"] == 1


def test_the_constraint_holds_clean_embeddings_near(arguments, tmp_path):
    common = {"max_steps": 12, "logging_steps": 12, "per_device_train_batch_size": 32}
    train_lore.main(arguments(constraint="none", output_dir=tmp_path / "fare", **common))
    train_lore.main(arguments(rho=0.003, dual_learning_rate=0.05, output_dir=tmp_path / "lore", **common))
    fare, lore = (rows(tmp_path / name)[-1]["violation_ratio_mean"] for name in ("fare", "lore"))
    assert lore < 0.5 * fare


def test_a_penalty_holds_them_before_the_multiplier_has_learnt(arguments, tmp_path):
    common = {"max_steps": 6, "logging_steps": 1, "rho": 0.003, "dual_learning_rate": 0}
    ratios, multipliers = {}, {}
    for penalty in (0, 1000):
        train_lore.main(arguments(penalty=penalty, output_dir=tmp_path / str(penalty), **common))
        ratios[penalty] = rows(tmp_path / str(penalty))[-1]["violation_ratio_mean"]
        multipliers[penalty] = rows(tmp_path / str(penalty))[0]["multiplier_mean"]
    assert multipliers[0] == multipliers[1000]  # it never moved
    assert ratios[1000] < 0.7 * ratios[0]


@pytest.mark.parametrize("changes", [{}, {"constraint": "none"}, {"objective": "tecoa", "constraint": "kl"}])
def test_accumulated_micro_batches_equal_one_batch(arguments, tmp_path, monkeypatch, changes):
    with_sgd(monkeypatch)
    train_lore.main(arguments(output_dir=tmp_path / "one", **changes))
    train_lore.main(
        arguments(output_dir=tmp_path / "four", per_device_train_batch_size=2, gradient_accumulation_steps=4, **changes)
    )
    assert_equal_runs(tmp_path / "one", tmp_path / "four")


def test_accumulated_micro_batches_ascend_as_one_batch(arguments, tmp_path, monkeypatch):
    """AdamW sees no factor in a gradient; gradient ascent shows whether the dual loss is a mean over micro-batches."""
    with_sgd(monkeypatch)
    monkeypatch.setattr(
        train_lore,
        "make_dual_optimizer",
        lambda multiplier, rate: torch.optim.SGD(multiplier.parameters(), lr=rate, maximize=True),
    )
    common = {"rho": 0, "dual_learning_rate": 0.1, "max_steps": 3}
    train_lore.main(arguments(output_dir=tmp_path / "one", **common))
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    train_lore.main(arguments(output_dir=tmp_path / "four", **common, **parts))
    one, four = ([row["multiplier_mean"] for row in rows(tmp_path / name)] for name in ("one", "four"))
    assert one[0] != one[2]
    assert four == pytest.approx(one, abs=1e-6)


def test_settings_of_the_method_reach_the_problem(arguments, tmp_path):
    """The clean weight in the loss, and the fixed margin in what is logged of the constraint."""
    train_lore.main(arguments(output_dir=tmp_path / "clean", constraint="none", clean_weight=0.5, primal_steps=1))
    row = rows(tmp_path / "clean")[1]
    assert row["distance_clean"] > 0
    assert row["loss"] == pytest.approx(row["distance_adv"] + 0.5 * row["distance_clean"], rel=1e-5)
    for margin in ("fixed", "relative"):
        train_lore.main(arguments(output_dir=tmp_path / margin, margin=margin))
        row = rows(tmp_path / margin)[1]
        as_fixed = row["violation_ratio_mean"] == pytest.approx(row["distance_clean"], rel=1e-5)
        assert as_fixed == (margin == "fixed")


def with_sgd(monkeypatch):
    """AdamW turns the rounding of gradients that are zero into whole updates; SGD shows whether runs are equal."""
    monkeypatch.setattr(
        train_lore, "make_optimizer", lambda name, module, rate, decay: torch.optim.SGD(module.parameters(), lr=rate)
    )


def assert_equal_runs(first, second):
    found_weights = weights(second)
    for name, expected in weights(first).items():
        error = (found_weights[name] - expected).abs().max().item()
        assert error <= 1e-6, f"{name}: {error}"
    for expected, found in zip(rows(first), rows(second), strict=True):
        for key in (KEYS - {"images_per_second", "data_wait_fraction"}) & expected.keys():
            assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key


class Killed(Exception):
    pass


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_run_equals_an_uninterrupted_one(arguments, tmp_path, monkeypatch, num_workers):
    common = {"max_steps": 5, "checkpoint_steps": 2, "num_workers": num_workers}
    train_lore.main(arguments(output_dir=tmp_path / "whole", **common))

    real_rate, steps = utils.training.run.cosine_learning_rate, []

    def killed_in_step_4(step, *rest):
        steps.append(step)
        if step == 3:
            raise Killed
        return real_rate(step, *rest)

    monkeypatch.setattr(utils.training.run, "cosine_learning_rate", killed_in_step_4)
    with pytest.raises(Killed):
        train_lore.main(arguments(output_dir=tmp_path / "cut", **common))
    monkeypatch.setattr(utils.training.run, "cosine_learning_rate", real_rate)
    assert [row["step"] for row in rows(tmp_path / "cut")] == [1, 2, 3]
    train_lore.main(arguments(output_dir=tmp_path / "cut", resume_from_checkpoint="latest", **common))
    for name, expected in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "cut")[name], expected, rtol=0, atol=0)
    whole, cut = rows(tmp_path / "whole"), rows(tmp_path / "cut")
    own = {"images_per_second", "peak_memory_gib", "data_wait_fraction", "launch"}
    assert [{k: v for k, v in row.items() if k not in own} for row in cut] == [
        {k: v for k, v in row.items() if k not in own} for row in whole
    ]


def test_resume_starts_anew_without_a_checkpoint_and_refuses_other_settings(arguments, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text(
        '{"step": 1, "loss": 0}\n{"st'
    )  # a run that was killed before its first
    train_lore.main(arguments(resume_from_checkpoint="latest", checkpoint_steps=1))
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    with pytest.raises(UserError, match=r"other settings \(rho was 0.1, is 0.2\)"):
        train_lore.main(arguments(resume_from_checkpoint="latest", rho=0.2))
    with pytest.raises(UserError, match=r"global_batch_size was 8, is 16"):
        train_lore.main(arguments(resume_from_checkpoint="latest", per_device_train_batch_size=16))
    with pytest.raises(UserError, match="not empty"):
        train_lore.main(arguments())
    train_lore.main(arguments(resume_from_checkpoint="latest", logging_steps=2))  # free to change; nothing left to do


def test_jpeg_draft_changes_large_jpegs_of_the_training_alone(arguments, tmp_path):
    large = [
        (f"s{number}", {"jpg": image_bytes(number, (160, 140)), "cls": str(number % 2).encode()}) for number in range(8)
    ]
    shard = write_shard(tmp_path / "large/0.tar", large)
    (tmp_path / "large/classnames.txt").write_text("zero\none\n")
    common = {"max_steps": 1, "checkpoint_steps": 1, "constraint": "none", "primal_steps": 1}
    found = {}
    for draft in ("false", "true"):
        named = {"output_dir": tmp_path / draft, "jpeg_draft": draft, "train_shards": shard, "eval_shards": shard}
        train_lore.main(arguments(**common, **named))
        found[draft] = rows(tmp_path / draft)
        train_lore.main(arguments(**common, jpeg_draft=draft, output_dir=tmp_path / f"small-{draft}"))
    assert found["true"][0] == found["false"][0]  # the evaluation before the first step
    assert found["true"][1]["loss"] != found["false"][1]["loss"]
    assert found["true"][1]["loss"] == pytest.approx(found["false"][1]["loss"], rel=0.05)
    assert embeds(tmp_path / "small-true").equal(embeds(tmp_path / "small-false"))  # digits of 32 pixels
    with pytest.raises(UserError, match=r"other settings \(jpeg_draft was True, is False\)"):
        train_lore.main(
            arguments(
                **common,
                output_dir=tmp_path / "true",
                train_shards=shard,
                eval_shards=shard,
                resume_from_checkpoint="latest",
            )
        )


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_checkpoint(arguments, tmp_path, monkeypatch):
    real_margin, calls = utils.methods.lore.embedding_margin, []

    def poisoned(ref_image_embeds, kind):
        calls.append(1)
        return real_margin(ref_image_embeds, kind) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(utils.methods.lore, "embedding_margin", poisoned)
    message = r"step 4: the loss is nan; the last good checkpoint is .*step-2; "
    with pytest.raises(UserError, match=message):
        train_lore.main(arguments(max_steps=6, checkpoint_steps=2, logging_steps=6))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-2"]
    assert not (tmp_path / "run/model.safetensors").exists()


def test_continuing_from_a_tuned_model_keeps_the_first_reference(arguments, small_clip, tmp_path):
    save_small_clip(tmp_path / "tuned", seed=1)
    train_lore.main(
        arguments(model_name_or_path=tmp_path / "tuned", reference_model_name_or_path=small_clip, max_steps=1)
    )
    assert rows(tmp_path / "run")[0]["distance_clean"] > 1


def test_shards_and_class_names_behind_a_url_give_the_same_run(arguments, digits, tmp_path):
    handler = functools.partial(QuietHandler, directory=str(digits))
    names = sorted(path.name for path in (digits / "train").glob("*.tar"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        braces = f"train/{{{names[0][:-4]}..{names[-1][:-4]}}}.tar"
        common = {"eval_num_samples": 20, "objective": "tecoa", "num_workers": 1}
        train_lore.main(
            arguments(
                output_dir=tmp_path / "remote", train_shards=f"{address}/{braces}",
                eval_shards=f"{address}/test/000000.tar", cache_dir=tmp_path / "near", **common,
            )
        )  # fmt: skip
        server.shutdown()
    train_lore.main(arguments(output_dir=tmp_path / "local", eval_shards=digits / "test" / "000000.tar", **common))
    assert embeds(tmp_path / "remote").equal(embeds(tmp_path / "local"))
    assert rows(tmp_path / "remote")[0] == rows(tmp_path / "local")[0]
    assert len(list((tmp_path / "near" / "shards").glob("*.tar"))) == len(names) + 1


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_pipe_is_read_where_allowed_and_its_arguments_are_not_kept(arguments, digits, tmp_path):
    shard = sorted((digits / "train").glob("*.tar"))[0]
    url = f"pipe:cat {shard} /dev/null"
    train_lore.main(arguments(train_shards=url, allow_pipe_urls="true", max_steps=1, checkpoint_steps=1))
    state = (tmp_path / "run/checkpoints/step-1/trainer_state.json").read_text()
    card = (tmp_path / "run/README.md").read_text()
    assert "pipe:cat ..." in state
    assert "pipe:cat ..." in card
    assert "/dev/null" not in state + card


def test_labels_outside_the_class_list_are_counted_and_stop_the_run(arguments, digits, tmp_path):
    three = tmp_path / "three.txt"
    three.write_text("zero\none\ntwo\n")
    with pytest.raises(UserError, match=r"--max_bad_fraction 0.01: .*bad label"):
        train_lore.main(arguments(objective="tecoa", constraint="none", classnames=three, max_steps=8))
    with pytest.raises(UserError, match=r"--max_bad_fraction 0.01: .*bad label"):
        train_lore.main(
            arguments(
                eval_shards=digits / "test", eval_num_samples=40, classnames=three, output_dir=tmp_path / "evaluated"
            )
        )


@pytest.mark.slow
def test_a_reference_in_bfloat16_changes_nothing(arguments, tmp_path):
    for name in ("float32", "bfloat16"):
        run_script(
            "train_lore.py",
            *arguments(output_dir=tmp_path / name, reference_dtype=name),
            ACCELERATE_MIXED_PRECISION="bf16",
        )
    assert embeds(tmp_path / "float32").equal(embeds(tmp_path / "bfloat16"))
    assert not embeds(tmp_path / "float32").equal(embeds(arguments()[1]))


@pytest.mark.slow
def test_compiled_encoder_gives_the_same_run(arguments, tmp_path, monkeypatch):
    with_sgd(monkeypatch)
    train_lore.main(arguments(output_dir=tmp_path / "plain"))
    train_lore.main(arguments(output_dir=tmp_path / "compiled", compile="true"))
    torch.testing.assert_close(embeds(tmp_path / "compiled"), embeds(tmp_path / "plain"), rtol=1e-3, atol=1e-3)
