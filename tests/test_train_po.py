"""train_po.py as users start it, and its invariants: processes, accumulation, kept embeddings, heads, resume."""

import json
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

import train_po
import utils.training.run
from tests.conftest import ROOT, accelerate_launch, run_script
from tests.shard_maker import image_bytes, relabelled, rewrite, write_shard
from tests.small_models import photos, save_small_clip, small_encoder
from tests.training.test_train_step import Flops, ScalarsRead, flops_of
from utils.errors import UserError
from utils.methods.head import head_power, load_head
from utils.methods.lagrangian import Multiplier
from utils.models.published import load_model, quiet_transformers
from utils.models.zeroshot import class_embeddings
from utils.training.metrics import preference_flops_per_sample

KEYS = {
    "step", "samples", "loss", "preference_loss", "margin_mean", "reward_chosen", "reward_rejected", "reward_accuracy",
    "pair_accuracy", "kl", "kl_baseline", "grad_norm", "learning_rate", "images_per_second", "peak_memory_gib",
    "data_wait_fraction",
}  # fmt: skip
CONSTRAINT_KEYS = {
    "distance_clean", "violation_ratio_mean", "violation_ratio_median", "violation_ratio_p95", "violation_ratio_max",
    "violated_fraction", "multiplier_mean", "multiplier_min", "multiplier_max", "dual_learning_rate",
}  # fmt: skip
EVAL_KEYS = {"eval_accuracy_clean", "eval_accuracy_attacked", "eval_follows_rejected", "eval_pair_accuracy", "eval_kl"}
TIMINGS = {"images_per_second", "peak_memory_gib", "data_wait_fraction"}


@pytest.fixture
def arguments(small_clip, digits, tmp_path, tmp_path_factory):
    """The command line of a short run; keyword arguments change it. The cache is shared: indexes are made once."""

    def make(**changes):
        settings = {
            "model_name_or_path": small_clip,
            "train_shards": digits / "train",
            "output_dir": tmp_path / "run",
            "cache_dir": tmp_path_factory.getbasetemp() / "po-cache",
            "per_device_train_batch_size": 8,
            "train_num_samples": 64,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "word_size_min": 40,
            "word_size_max": 60,
            "num_workers": 0,
            "report_to": "none",
        } | changes
        return [str(word) for name, value in settings.items() for word in (f"--{name}", value) if value is not None]

    return make


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(directory):
    with quiet_transformers():
        return CLIPModel.from_pretrained(directory).state_dict()


def embeds(directory):
    with torch.no_grad():
        return small_encoder(directory)(photos(4))


def with_sgd(monkeypatch):
    monkeypatch.setattr(
        train_po, "make_optimizer", lambda name, module, rate, decay: torch.optim.SGD(module.parameters(), lr=rate)
    )


def assert_equal_runs(first, second):
    found_weights = weights(second)
    for name, expected in weights(first).items():
        error = (found_weights[name] - expected).abs().max().item()
        assert error <= 1e-6, f"{name}: {error}"
    for expected, found in zip(rows(first), rows(second), strict=True):
        at_reference = (
            {"reward_accuracy"} if abs(expected.get("margin_mean", 0)) < 1e-4 else set()
        )  # the sign of rounding
        assert found.keys() == expected.keys()
        for key in ((KEYS | CONSTRAINT_KEYS) - TIMINGS - at_reference) & expected.keys():
            assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key


def test_a_run_from_the_command_line_ends_in_a_model_that_loads(arguments, small_clip, digits, tmp_path):
    output = run_script(
        "train_po.py",
        *arguments(
            max_steps=4, eval_shards=digits / "test", eval_num_samples=40, eval_steps=2, logging_steps=2,
            checkpoint_steps=1, checkpoints_total_limit=2, keep_best="eval_accuracy_attacked", report_to="tensorboard",
            num_workers=1,
        ),
        launcher=accelerate_launch(ROOT / "accelerate_configs" / "cpu.yaml"),
    )  # fmt: skip
    run_dir = tmp_path / "run"
    assert "step 0: accuracy clean" in output
    assert "DPO (image tower) 4/4" in output
    metrics = rows(run_dir)
    assert [row["step"] for row in metrics] == [0, 2, 4]
    assert metrics[0].keys() >= EVAL_KEYS
    assert metrics[0]["eval_kl"] == pytest.approx(0, abs=1e-6)
    assert all(row.keys() >= KEYS | EVAL_KEYS for row in metrics[1:])
    assert [row.pop("launch", None) is None for row in metrics] == [False, True, True]
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-3", "step-4"]
    CLIPProcessor.from_pretrained(run_dir)
    for name in ("checkpoints/step-4/model", "."):
        assert (embeds(run_dir / name) - embeds(small_clip)).abs().max() > 1e-3
    assert (run_dir / "best/model.safetensors").exists()
    card = (run_dir / "README.md").read_text()
    assert "# DPO (image tower) from" in card
    assert "| beta | 1.0 |" in card


@pytest.mark.parametrize(
    ("changes", "first_loss", "trained"),
    [
        ({"preference": "dpo", "label_smoothing": 0.1}, math.log(2), "image"),
        ({"preference": "ipo"}, 25, "image"),
        ({"preference": "kto", "attacks_per_image": 3}, 0.5, "image"),
        ({"preference": "ce", "gradient_checkpointing": "true", "optimizer": "adamw"}, None, "image"),
        ({"preference": "dpo", "max_grad_norm": 0.1, "weight_average": "beta", "word_kind": "label"}, math.log(2),
         "all"),
        ({"preference": "kto", "orthogonality_weight": 0.1}, 0.5, "head"),
        ({"preference": "ipo", "task": "pairs"}, 25, "head"),
        ({"preference": "dpo", "task": "pairs"}, math.log(2), "all"),
        # With rho 0 nothing is violated at the reference.
        ({"preference": "kto", "constraint": "embedding", "rho": 0, "multiplier": "linear", "margin": "fixed"}, 0.5,
         "image"),
        ({"preference": "dpo", "constraint": "embedding", "rho": 0, "multiplier": "scalar"}, math.log(2), "head"),
    ],
)  # fmt: skip
def test_every_method_trains_what_it_says(
    arguments, attribute_digits, small_clip, tmp_path, changes, first_loss, trained
):
    shards = attribute_digits / "pairs" / "train" if "task" in changes else attribute_digits / "train"
    train_po.main(arguments(train_shards=shards, trainable=trained, **changes))
    metrics = rows(tmp_path / "run")
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(row.keys() >= KEYS for row in metrics)
    logged = CONSTRAINT_KEYS if "constraint" in changes else set()
    assert all(row.keys() & CONSTRAINT_KEYS == logged for row in metrics)
    if first_loss is not None:  # at the reference, where the KL is zero too
        assert metrics[0]["loss"] == pytest.approx(first_loss, rel=1e-4)
        assert metrics[0]["margin_mean"] == pytest.approx(0, abs=1e-4)
        assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics[1]["kl"] > 0
    before, after = weights(small_clip), weights(tmp_path / "run")
    changed = {name for name, tensor in after.items() if (tensor - before[name]).abs().max() > 1e-5}
    towers = {name.split(".")[0] for name in changed}
    expected = {
        "head": {"visual_projection", "text_projection"},
        "image": {"vision_model", "visual_projection"},
        "all": {"vision_model", "visual_projection", "text_model", "text_projection"},
    }
    assert towers == expected[trained]


def test_the_margin_grows_and_the_regulariser_holds_the_model(arguments, attribute_digits, tmp_path):
    """Red or blue: a random encoder sees that too."""
    shards = attribute_digits / "pairs" / "val"
    common = {"train_shards": shards, "task": "pairs", "trainable": "head", "learning_rate": 0.02}
    common |= {"max_steps": 30, "per_device_train_batch_size": 64, "logging_steps": 30}
    train_po.main(arguments(output_dir=tmp_path / "free", reg_weight=0, **common))
    train_po.main(arguments(output_dir=tmp_path / "held", reg_weight=100, **common))
    free, held = rows(tmp_path / "free")[-1], rows(tmp_path / "held")[-1]
    assert free["margin_mean"] > 0.1
    assert free["preference_loss"] < math.log(2)
    assert free["reward_chosen"] > free["reward_rejected"]
    assert free["reward_accuracy"] > 0.8
    assert held["kl"] < 0.5 * free["kl"]


@pytest.mark.parametrize(
    ("trainable", "task", "preference", "constraint"),
    [
        ("image", "typographic", "dpo", "none"),
        ("head", "pairs", "dpo", "none"),
        ("all", "pairs", "ipo", "none"),
        ("image", "pairs", "dpo", "embedding"),
        ("head", "pairs", "dpo", "embedding"),
        ("all", "pairs", "dpo", "embedding"),
    ],
)
def test_accumulated_micro_batches_equal_one_batch(
    arguments, attribute_digits, tmp_path, monkeypatch, trainable, task, preference, constraint
):
    """Pairs are the hard case: micro-batches hold unequally many preferences, and some no clean image."""
    with_sgd(monkeypatch)
    shards = attribute_digits / ("pairs/train" if task == "pairs" else "train")
    common = {"train_shards": shards, "trainable": trainable, "task": task, "preference": preference}
    if constraint != "none":
        common |= {"constraint": constraint, "rho": 0.001, "dual_learning_rate": 0.01, "max_steps": 4}
    train_po.main(arguments(output_dir=tmp_path / "one", **common))
    train_po.main(
        arguments(output_dir=tmp_path / "four", per_device_train_batch_size=2, gradient_accumulation_steps=4, **common)
    )
    assert_equal_runs(tmp_path / "one", tmp_path / "four")


def test_kept_embeddings_train_the_same_head(arguments, attribute_digits, tmp_path, capfd):
    """Within the first epoch: later ones draw new words unless the embeddings are kept."""
    common = {"train_shards": attribute_digits / "val", "trainable": "head", "max_steps": 3, "seed": 11}
    train_po.main(arguments(output_dir=tmp_path / "made", **common))
    assert "embeddings done" in capfd.readouterr().err
    train_po.main(arguments(output_dir=tmp_path / "kept", **common))
    assert "embeddings kept from before" in capfd.readouterr().err
    train_po.main(arguments(output_dir=tmp_path / "recomputed", cache_features="false", **common))
    assert_equal_runs(tmp_path / "made", tmp_path / "kept")
    made, recomputed = (load_head(tmp_path / name)["weight"] for name in ("made", "recomputed"))
    torch.testing.assert_close(made, recomputed, rtol=0, atol=1e-4)
    train_po.main(arguments(output_dir=tmp_path / "other", **common | {"seed": 12}))  # other words: embedded anew
    assert "embeddings done" in capfd.readouterr().err


def test_kept_embeddings_follow_what_they_were_made_from(arguments, attribute_digits, small_clip, tmp_path, capfd):
    """img2dataset#174, datasets#2956: labels of a shard of the same size and date, a config beside the same weights."""
    shard = shutil.copytree(attribute_digits / "val", tmp_path / "set/val") / "000000.tar"
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        shutil.copy(attribute_digits / name, tmp_path / "set")
    shutil.copytree(small_clip, tmp_path / "model")
    config = tmp_path / "model/config.json"
    samples = json.loads((shard.parent / "sizes.json").read_text())[shard.name]
    steps = [
        (lambda: None, "done"),
        (lambda: rewrite(shard, relabelled(shard, [i % 10 for i in range(samples)])), "done"),
        (lambda: config.write_text(config.read_text().replace('"quick_gelu"', '"gelu"')), "done"),
        (lambda: None, "kept from before"),
    ]
    for number, (change, expected) in enumerate(steps):
        change()
        train_po.main(
            arguments(
                model_name_or_path=tmp_path / "model", train_shards=shard.parent, trainable="head", max_steps=1,
                checkpoint_steps=0, cache_dir=tmp_path / "cache", output_dir=tmp_path / str(number),
            )
        )  # fmt: skip
        assert f"embeddings {expected}" in capfd.readouterr().err, number


def test_a_cache_that_cannot_take_embeddings_is_refused_before_they_are_made(
    arguments, attribute_digits, tmp_path, monkeypatch
):
    monkeypatch.setattr("utils.models.features.compute_features", lambda *arguments, **more: pytest.fail("computed"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/features").write_text("a file")
    with pytest.raises(UserError, match=r"--cache_dir: the embeddings cannot be kept in .*features"):
        train_po.main(arguments(train_shards=attribute_digits / "val", trainable="head", cache_dir=tmp_path / "cache"))


@pytest.mark.parametrize("t", [-0.5, 0.0, 0.5, 1.0])
def test_export_t_gives_the_similarities_of_the_head(arguments, attribute_digits, small_clip, tmp_path, t):
    train_po.main(
        arguments(
            train_shards=attribute_digits / "pairs/val", task="pairs", trainable="head", learning_rate=0.05, export_t=t
        )
    )
    weight = head_power(load_head(tmp_path / "run")["weight"], t)
    texts = ["zero", "a red digit"]
    similarities = []
    for directory, head in ((small_clip, weight), (tmp_path / "run", torch.eye(len(weight)))):
        clip, processor = load_model(str(directory))
        with torch.no_grad():
            image_embeds = torch.nn.functional.normalize(embeds(directory) @ head.T, dim=-1)
            text_embeds = class_embeddings(clip, processor, texts, ["{c}"]) @ head.T
            similarities.append(image_embeds @ torch.nn.functional.normalize(text_embeds, dim=-1).T)
    torch.testing.assert_close(similarities[1], similarities[0], rtol=1e-4, atol=2e-6)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_average": "beta"},
        {"trainable": "head", "optimizer": "adamw"},
        {"constraint": "embedding", "rho": 0.001, "dual_learning_rate": 0.01, "weight_average": "beta"},
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(arguments, digits, tmp_path, monkeypatch, changes):
    common = {"max_steps": 10, "checkpoint_steps": 4, "train_shards": digits / "test"} | changes
    train_po.main(arguments(output_dir=tmp_path / "whole", **common))
    real_rate = utils.training.run.cosine_learning_rate

    def killed_in_step_7(step, *rest):
        if step == 6:
            raise Killed
        return real_rate(step, *rest)

    monkeypatch.setattr(utils.training.run, "cosine_learning_rate", killed_in_step_7)
    with pytest.raises(Killed):
        train_po.main(arguments(output_dir=tmp_path / "cut", **common))
    monkeypatch.setattr(utils.training.run, "cosine_learning_rate", real_rate)
    train_po.main(arguments(output_dir=tmp_path / "cut", resume_from_checkpoint="latest", **common))
    for name, expected in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "cut")[name], expected, rtol=0, atol=0)
    whole, cut = (
        [{key: value for key, value in row.items() if key not in {*TIMINGS, "launch"}} for row in rows(tmp_path / name)]
        for name in ("whole", "cut")
    )
    assert cut == whole


def test_dropout_in_the_config_changes_neither_start_nor_resume(arguments, small_clip, digits, tmp_path):
    """trl#744, #2042: the loss began at 0.831 in place of ln 2, the KL at 0.145, and a resumed run went elsewhere."""
    shutil.copytree(small_clip, tmp_path / "dropout")
    path = tmp_path / "dropout/config.json"
    config = json.loads(path.read_text())
    for part in ("vision_config", "text_config"):
        config[part]["attention_dropout"] = 0.5
    path.write_text(json.dumps(config))
    common = {"model_name_or_path": tmp_path / "dropout", "trainable": "all", "train_shards": digits / "test"}
    train_po.main(arguments(output_dir=tmp_path / "whole", checkpoint_steps=1, max_steps=3, **common))
    first = rows(tmp_path / "whole")[0]
    assert first["preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    resume = tmp_path / "whole/checkpoints/step-1"
    train_po.main(arguments(output_dir=tmp_path / "cut", max_steps=3, resume_from_checkpoint=resume, **common))
    assert all(torch.equal(weights(tmp_path / "cut")[name], one) for name, one in weights(tmp_path / "whole").items())


@pytest.mark.parametrize("trainable", ["image", "head"])
def test_what_is_saved_is_the_average(arguments, tmp_path, monkeypatch, trainable):
    averages = []
    real = train_po.BetaAverage
    monkeypatch.setattr(train_po, "BetaAverage", lambda *words: averages.append(real(*words)) or averages[-1])
    train_po.main(arguments(weight_average="beta", trainable=trainable, max_steps=4, checkpoint_steps=4))
    if trainable == "head":
        assert load_head(tmp_path / "run")["weight"].equal(averages[0].weights[0])
    found, last = weights(tmp_path / "run"), load_file(tmp_path / "run/checkpoints/step-4/parameters.safetensors")
    if trainable == "image":
        names = [name.removeprefix("image_encoder.") for name in last]
        assert sorted(map(str, (found[name].shape for name in names))) == sorted(
            str(w.shape) for w in averages[0].weights
        )
        by_name = {name: found[name] for name in names}
        assert any((by_name[name] - last[f"image_encoder.{name}"]).abs().max() > 1e-5 for name in names)
        total = sum(tensor.double().sum() for tensor in by_name.values())
        torch.testing.assert_close(total, sum(w.double().sum() for w in averages[0].weights), rtol=1e-12, atol=1e-9)


def test_going_on_from_a_tuned_model_keeps_the_first_reference(arguments, small_clip, tmp_path):
    save_small_clip(tmp_path / "tuned", seed=1)
    for trainable in ("image", "all"):
        train_po.main(
            arguments(
                model_name_or_path=tmp_path / "tuned", reference_model_name_or_path=small_clip, max_steps=1,
                trainable=trainable, output_dir=tmp_path / trainable,
            )
        )  # fmt: skip
        assert rows(tmp_path / trainable)[0]["kl"] > 0.1


@pytest.mark.parametrize("trainable", ["image", "head"])
def test_unusable_pairs_are_counted_and_stop_the_run(arguments, tmp_path, trainable):
    """With the pictures read in every step, and with embeddings kept from one pass."""

    def pair(number, **fields):
        return (f"p{number}", {"png": image_bytes(number, (32, 32), "PNG"), "json": json.dumps(fields).encode()})

    good = {"chosen": "a cat", "rejected": ["a dog", "a CAT "]}
    samples = [pair(number, **good) for number in range(40)]
    samples += [pair(40, chosen="a cat", rejected=["A  Cat"]), pair(41, chosen="a cat", rejected=["x"], candidates=[])]
    samples += [pair(42, chosen="a cat", rejected=["x"], candidates=["x", "y"])]
    shard = write_shard(tmp_path / "pairs.tar", samples)
    common = {
        "train_shards": shard,
        "task": "pairs",
        "train_num_samples": None,
        "max_steps": 10,
        "trainable": trainable,
    }
    train_po.main(arguments(max_bad_fraction=0.2, **common))
    card = (tmp_path / "run/README.md").read_text()
    assert "chosen equals rejected: 1 samples" in card
    assert "bad pair: 2 samples" in card
    assert re.search(r"chosen among rejected: noted \d\d x", card)
    with pytest.raises(UserError, match=r"--max_bad_fraction 0.01: .*(bad pair|chosen equals rejected)"):
        train_po.main(arguments(output_dir=tmp_path / "stopped", **common))


def test_jpeg_draft_changes_large_jpegs_of_the_training_alone(arguments, tmp_path):
    """Kept embeddings know of it: those of the training are made again, those of the evaluation are not."""
    pair = json.dumps({"chosen": "a cat", "rejected": ["a dog"]}).encode()
    large = [(f"p{number}", {"jpg": image_bytes(number, (160, 140)), "json": pair}) for number in range(8)]
    shard = write_shard(tmp_path / "pairs.tar", large)
    common = {"train_shards": shard, "task": "pairs", "train_num_samples": None, "max_steps": 1}
    common |= {"eval_shards": shard, "cache_dir": tmp_path / "cache"}
    kept = []
    for trainable in ("head", "image"):
        for draft in ("false", "true"):
            run_dir = tmp_path / f"{trainable}-{draft}"
            train_po.main(arguments(**common, trainable=trainable, jpeg_draft=draft, output_dir=run_dir))
            kept.append(len(list((tmp_path / "cache/features").glob("*.safetensors"))))
        exact, drafted = rows(tmp_path / f"{trainable}-false"), rows(tmp_path / f"{trainable}-true")
        assert drafted[0] == exact[0]
        assert drafted[1]["grad_norm"] != exact[1]["grad_norm"]
        assert drafted[1]["grad_norm"] == pytest.approx(exact[1]["grad_norm"], rel=0.1)
    assert kept == [1, 2, 2, 2]  # of the same pictures: exact ones for both, then drafted ones for the training


def test_mistakes_are_one_line(arguments, digits, tmp_path):
    (tmp_path / "one.txt").write_text("zero\nZero\n ZERO\n")
    (tmp_path / "none").mkdir()
    wrong = [
        ({"label_smoothing": 0.5}, r"--label_smoothing 0.5: expected less than 0.5"),
        (
            {"label_smoothing": 0.1, "preference": "ipo"},
            r"--label_smoothing 0.1 with --preference ipo: only dpo has it",
        ),
        (
            {"label_smoothing": 0.1, "preference": "kto"},
            r"--label_smoothing 0.1 with --preference kto: only dpo has it",
        ),
        ({"fonts": "TimesNewRoman"}, r"--fonts TimesNewRoman: neither a font file that opens nor"),
        ({"fonts": "DejaVuSan"}, r"did you mean DejaVuSans\?"),
        ({"classnames": tmp_path / "one.txt"}, r"--train_shards: one class only \(zero\)"),
        ({"attacks_per_image": 10}, r"--attacks_per_image 10: 10 class names leave 9 wrong words"),
        ({"export_t": 0.5}, r"--export_t 0.5 with --trainable image: it belongs to a head"),
        ({"trainable": "head", "reference_model_name_or_path": "x"}, r"with --trainable head: the reference of a head"),
        ({"preference": "dop"}, r"--preference: 'dop' is not one of dpo, ipo, kto, ce, did you mean dpo\?"),
        ({"word_size_min": 70}, r"--word_size_min 70: larger than --word_size_max 60"),
        ({"train_shards": tmp_path / "none", "task": "pairs"}, r"--train_shards .*none"),
        ({"keep_best": "eval_accuracy_clean"}, r"--keep_best eval_accuracy_clean: nothing is evaluated"),
    ]
    for changes, message in wrong:
        with pytest.raises(UserError, match=message):
            train_po.main(arguments(**changes))


def test_a_mistake_ends_the_script_with_status_2(arguments):
    output = run_script("train_po.py", *arguments(label_smoothing=0.7), status=2)
    assert output.strip().count("\n") == 0
    assert output.startswith("train_po.py: error: --label_smoothing 0.7: expected less than 0.5")


@pytest.fixture
def seen(monkeypatch):
    """The micro-batches that a run reads, in their order."""
    batches = []

    class Recorded(utils.training.run.TimedBatches):
        def __next__(self):
            batches.append(super().__next__())
            return batches[-1]

    monkeypatch.setattr(utils.training.run, "TimedBatches", Recorded)
    return batches


def plain_run(directory, trainable, steps, rate, dual_rate, rho):
    """DPO + KL + lambda v and the dual ascent as an algorithm box, in float32.

    transformers' own layers, SGD, AdamW operation by operation. ``steps``: the micro-batches of every step.
    -> what was trained by name, the multiplier, a row per step.
    """
    with quiet_transformers():
        clip = CLIPModel.from_pretrained(directory, dtype=torch.float32)
        processor = CLIPProcessor.from_pretrained(directory)
    images = processor.image_processor
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (images.image_mean, images.image_std))
    scale, weight = clip.logit_scale.exp().item(), torch.eye(clip.config.projection_dim, requires_grad=True)
    trained = {"head": [weight], "image": [*clip.vision_model.parameters(), *clip.visual_projection.parameters()]}
    names = {parameter: name for name, parameter in clip.named_parameters()}

    def embed(pixels):
        return clip.get_image_features(pixel_values=(pixels.float() / 255 - mean) / std).pooler_output

    with torch.no_grad():  # phi0: before anything moves
        references = [[embed(batch["images"]) for batch in step] for step in steps]
        texts = [[class_embeddings(clip, processor, batch["texts"], ["{c}"]) for batch in step] for step in steps]

    def phi(batch, reference):
        return reference @ weight.T if trainable == "head" else embed(batch["images"])

    def logits_of(z, t, batch):
        logits = scale * F.normalize(z, dim=1) @ F.normalize(t, dim=1).T
        return logits.masked_fill(~torch.cat([batch["reg_candidates"], batch["candidates"]]), -1e4)

    torch.manual_seed(0)
    multiplier = Multiplier("network", clip.config.projection_dim)
    optimizer = torch.optim.SGD(trained[trainable], lr=rate)
    dual = torch.optim.AdamW(multiplier.parameters(), lr=dual_rate, weight_decay=0.0, maximize=True, foreach=False)
    logged = []
    for number, (step, refs, embeds) in enumerate(zip(steps, references, texts)):
        for part, peak in ((optimizer, rate), (dual, dual_rate)):
            part.param_groups[0]["lr"] = utils.training.run.cosine_learning_rate(number, peak, len(steps))
        preferences, kls, held, distances, multipliers = [], [], [], [], []
        for batch, z0, t in zip(step, refs, embeds):
            z, clean = phi(batch, z0), slice(len(batch["reg_chosen"]))
            logits = logits_of(z, t @ weight.T if trainable == "head" else t, batch)
            ref_logits = logits_of(z0, t, batch)
            ref_logps, logps = ref_logits[clean].log_softmax(1), logits[clean].log_softmax(1)
            kls.append((ref_logps.exp() * (ref_logps - logps)).sum(1))
            gained = (logits - ref_logits)[clean.stop :]
            for row, chosen, rejected in zip(gained, batch["chosen"], batch["rejected"]):
                preferences.append(-F.logsigmoid(row[chosen] - row[rejected[0]]))
            distances.append((z - z0)[clean].square().sum(1))
            v = distances[-1] - rho * z0[clean].square().sum(1)
            multipliers.append(multiplier(z0[clean]).detach())
            held.append(multipliers[-1] * v)
        parts = [torch.stack(preferences), *map(torch.cat, (kls, held))]
        loss = sum(part.mean() for part in parts)
        means = {"distance_clean": torch.cat(distances), "multiplier_mean": torch.cat(multipliers)}
        logged.append({name: values.mean().item() for name, values in means.items()} | {"loss": loss.item()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ascended = []
        for batch, z0 in zip(step, refs):
            clean = slice(len(batch["reg_chosen"]))
            with torch.no_grad():
                v = ((phi(batch, z0) - z0).square().sum(1) - rho * z0.square().sum(1))[clean]
            ascended.append(multiplier(z0[clean]) * v)
        dual.zero_grad()
        torch.cat(ascended).mean().backward()
        dual.step()
    return {names.get(part, "weight"): part.detach() for part in trained[trainable]}, multiplier.state_dict(), logged


@pytest.mark.parametrize(("trainable", "rate"), [("image", 3e-3), ("head", 0.02)])
def test_the_constraint_is_the_plain_algorithm(
    arguments, attribute_digits, small_clip, tmp_path, monkeypatch, seen, trainable, rate
):
    """In two micro-batches a step that hold unequally many clean images and preferences."""
    with_sgd(monkeypatch)
    dual_rate, rho, steps = 1e-2, 1e-4, 4
    train_po.main(
        arguments(
            train_shards=attribute_digits / "pairs/train", task="pairs", trainable=trainable, learning_rate=rate,
            constraint="embedding", rho=rho, dual_learning_rate=dual_rate, gradient_accumulation_steps=2,
            per_device_train_batch_size=6, max_steps=steps, checkpoint_steps=steps, cache_features="false",
        )
    )  # fmt: skip
    assert len({len(batch["reg_chosen"]) for batch in seen}) > 1
    by_step = [seen[2 * step : 2 * step + 2] for step in range(steps)]
    expected, multiplier, logged = plain_run(small_clip, trainable, by_step, rate, dual_rate, rho)
    found = load_head(tmp_path / "run") if trainable == "head" else weights(tmp_path / "run")
    before = {"weight": torch.eye(24)} if trainable == "head" else weights(small_clip)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert max((tensor - before[name]).abs().max() for name, tensor in expected.items()) > 1e-3
    state = load_file(tmp_path / "run/checkpoints" / f"step-{steps}" / "extra.safetensors")
    for name, tensor in multiplier.items():
        # Updates are 1e-2; AdamW makes more of the rounding of gradients near zero than SGD does.
        torch.testing.assert_close(state[f"multiplier/{name}"], tensor, rtol=0, atol=1e-4, msg=name)
    for row, plain in zip(rows(tmp_path / "run"), logged, strict=True):
        assert {key: row[key] for key in plain} == pytest.approx(plain, rel=1e-4, abs=1e-6)
    assert rows(tmp_path / "run")[-1]["violated_fraction"] > 0.5  # the constraint acts


@pytest.mark.parametrize("trainable", ["image", "head", "all"])
def test_a_multiplier_of_zero_is_no_constraint(arguments, tmp_path, monkeypatch, trainable):
    monkeypatch.setattr(Multiplier, "forward", lambda self, z0: 0 * self.raw(z0).squeeze(-1))
    common = {"trainable": trainable, "max_steps": 3}
    train_po.main(arguments(output_dir=tmp_path / "free", **common))
    train_po.main(arguments(output_dir=tmp_path / "zero", constraint="embedding", **common))
    found = weights(tmp_path / "zero")
    assert all(found[name].equal(tensor) for name, tensor in weights(tmp_path / "free").items())


def test_a_penalty_acts_before_the_multiplier_has_learnt(arguments, tmp_path):
    common = {"constraint": "embedding", "rho": 1e-4, "dual_learning_rate": 0, "max_steps": 3}
    for penalty in (0, 1000):
        train_po.main(arguments(penalty=penalty, output_dir=tmp_path / str(penalty), logging_steps=1, **common))
    free, held = (rows(tmp_path / name) for name in ("0", "1000"))
    assert held[0]["multiplier_mean"] == free[0]["multiplier_mean"]
    assert held[0]["violation_ratio_mean"] == free[0]["violation_ratio_mean"]  # at the reference nothing is violated
    assert held[-1]["violation_ratio_mean"] != free[-1]["violation_ratio_mean"]
    with pytest.raises(UserError, match="--penalty 30 with --constraint none: it augments a constraint"):
        train_po.main(arguments(penalty=30, output_dir=tmp_path / "none"))


def test_checkpoints_from_before_the_constraint_do_not_take_one_on(arguments, tmp_path):
    train_po.main(arguments(max_steps=4, checkpoint_steps=2))
    state = tmp_path / "run/checkpoints/step-2/trainer_state.json"
    known = json.loads(state.read_text())
    for name in ("constraint", "multiplier", "margin", "rho", "dual_learning_rate"):
        del known["settings"][name]
    state.write_text(json.dumps(known))
    again = arguments(max_steps=4, checkpoint_steps=2, resume_from_checkpoint=state.parent)
    with pytest.raises(UserError, match=r"constraint was none, is embedding\)"):
        train_po.main([*again, "--constraint", "embedding"])
    before = rows(tmp_path / "run")[-1]["loss"]
    train_po.main(again)
    assert rows(tmp_path / "run")[-1]["loss"] == before


def test_steps_without_clean_images_say_so_and_go_on(arguments, tmp_path, capfd):
    pair = json.dumps({"chosen": "a cat", "rejected": ["a dog"]}).encode()
    shard = write_shard(
        tmp_path / "pairs.tar",
        [(f"p{number}", {"png": image_bytes(number, (32, 32), "PNG"), "json": pair}) for number in range(8)],
    )
    train_po.main(
        arguments(
            train_shards=shard, task="pairs", train_num_samples=None, reg_weight=0, constraint="embedding", max_steps=3
        )
    )
    assert "no sample with reg: true; nothing holds the model where it was" in (said := capfd.readouterr().err)
    assert "--constraint embedding constrains such samples alone" in said
    assert all(not row.keys() & (CONSTRAINT_KEYS - {"dual_learning_rate"}) for row in rows(tmp_path / "run"))


def test_the_dual_step_costs_a_forward_of_the_clean_images(arguments, small_clip, tmp_path):
    """Counted: the FLOPs that runs are charged, less the first layer's gradient to the pixels."""
    forward, patches = flops_of(small_clip)
    found = {}
    for constraint in ("none", "embedding"):
        counts = []
        for steps in (1, 2):
            run_dir = tmp_path / f"{constraint}-{steps}"
            common = {"attacks_per_image": 2, "logging_steps": 100, "output_dir": run_dir, "max_steps": steps}
            with Flops() as counter:
                train_po.main(arguments(constraint=constraint, multiplier="scalar", **common))
            counts.append(counter.total)
        found[constraint] = (counts[1] - counts[0]) / 8
        charged = preference_flops_per_sample(forward, 3, head=False, dual=constraint == "embedding")
        assert found[constraint] == pytest.approx(charged - 3 * patches, rel=0.01)
    assert found["embedding"] - found["none"] == forward


@pytest.mark.parametrize("constraint", ["none", "embedding"])
def test_a_step_reads_no_value_from_the_device(arguments, tmp_path, constraint):
    counts = []
    for steps in (1, 3):
        with ScalarsRead() as read:
            train_po.main(
                arguments(
                    constraint=constraint, optimizer="adamw", max_steps=steps,
                    logging_steps=100, output_dir=tmp_path / str(steps),
                )
            )  # fmt: skip
        counts.append(read.count)
    assert counts[1] == counts[0] > 0
