"""The repository's small CLIP: written words fool it, train_po.py repairs it, a dial turns its concept."""

import json

import pytest

import evaluate
import train_po
from tests.conftest import ROOT, run_script

MODEL = ROOT / "examples" / "reading_clip"
WORDS = ["--word_kind", "label", "--word_size_min", "40", "--word_size_max", "60", "--word_place", "bottom"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The digits on red or blue ground at the model's 64 px."""
    directory = tmp_path_factory.mktemp("data") / "world"
    run_script("examples/make_attribute_shards.py", "--output_dir", directory)
    return directory


def call(script, **flags):
    words = []
    for name, value in ({"num_workers": 0} | flags).items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    script.main(words)


def test_words_fool_it_and_preferences_repair_it(world, tmp_path):
    common = {"train_shards": world / "train", "eval_shards": world / "test", "eval_num_samples": 150}
    words = dict(zip((word[2:] for word in WORDS[::2]), WORDS[1::2]))
    call(
        train_po, model_name_or_path=MODEL, preference="dpo", beta=0.2, learning_rate=3e-4, max_steps=40,
        per_device_train_batch_size=32, eval_steps=40, report_to="none", output_dir=tmp_path / "dpo", **common, **words,
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "dpo/metrics.jsonl").read_text().splitlines()]
    start, end = rows[0], rows[-1]
    assert start["eval_accuracy_clean"] > 0.8
    assert start["eval_accuracy_attacked"] < start["eval_accuracy_clean"] - 0.3
    assert start["eval_follows_rejected"] > 0.25
    assert end["eval_accuracy_attacked"] > start["eval_accuracy_attacked"] + 0.2
    assert end["eval_follows_rejected"] < 0.5 * start["eval_follows_rejected"]
    assert end["eval_accuracy_clean"] > start["eval_accuracy_clean"] - 0.04


def test_the_constraint_holds_clean_embeddings_while_words_lose_their_pull(world, tmp_path):
    """Equal runs but for the constraint, measured on test images."""
    common = {"train_shards": world / "train", "model_name_or_path": MODEL, "beta": 0.5, "learning_rate": 3e-4}
    common |= {"max_steps": 16, "per_device_train_batch_size": 16, "report_to": "none", "rho": 0.005}
    words = dict(zip((word[2:] for word in WORDS[::2]), WORDS[1::2]))
    for constraint in ("none", "embedding"):
        call(train_po, constraint=constraint, output_dir=tmp_path / constraint, **common, **words)
    call(
        evaluate, model=[MODEL, tmp_path / "none", tmp_path / "embedding"], data=world, num_samples=80,
        measure=["accuracy", "fidelity"], attack="typographic", reference_model_name_or_path=MODEL,
        output_dir=tmp_path / "eval", **words,
    )  # fmt: skip
    results = json.loads((tmp_path / "eval/results.json").read_text())["results"]
    moved, right = (
        [cell["value"] for cell in results if cell["measure"] == measure] for measure in ("fidelity", "accuracy")
    )
    print(f"moved {moved}, right with words {right}")
    assert moved[0] == 0
    assert moved[2] < 0.5 * moved[1]
    assert right[2] > right[0] + 0.05


def test_the_head_turns_a_concept_round_and_the_dial_neutralises_it(world, tmp_path):
    call(
        train_po, model_name_or_path=MODEL, task="pairs", trainable="head", train_shards=world / "pairs/train",
        beta=0.05, learning_rate=1e-2, epochs=10, logging_steps=160, report_to="none", cache_dir=tmp_path / "cache",
        output_dir=tmp_path / "head",
    )  # fmt: skip
    call(evaluate, model=tmp_path / "head", data=world / "pairs", measure="head_t", output_dir=tmp_path / "dial")
    results = json.loads((tmp_path / "dial/results.json").read_text())["results"]
    pairs, task = (
        {cell["settings"]["t"]: cell["value"] for cell in results if cell["measure"] == measure}
        for measure in ("pair_accuracy", "accuracy")
    )
    neutral = next(cell["value"] for cell in results if cell["measure"] == "neutral_t")
    assert pairs[0.0] < 0.02  # the original says what is seen
    assert pairs[1.0] > 0.98  # the trained head says the other
    assert 0 < neutral < 1
    assert 0.2 < pairs[neutral] < 0.8  # chosen on validation images, measured on test images
    assert all(task[t] > task[0.0] - 0.04 for t in (neutral, 1.0))
