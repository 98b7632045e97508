"""benchmarks/real_encoder.py on a tiny DINOv2: a head is learnt, every part runs, and the page shows its claims."""

import json
from dataclasses import asdict, dataclass

import pytest

from benchmarks import evidence, results
from benchmarks.evidence import NOT_TESTED
from tests.conftest import run_script
from tests.small_models import save_small_model
from utils.errors import UserError


@pytest.mark.slow
def test_every_part_runs_on_an_encoder_without_text(digits, tmp_path):
    model = tmp_path / "dinov2"
    save_small_model(model, "dinov2")
    numbers = tmp_path / "numbers"
    words = [
        "benchmarks/real_encoder.py", "--model", model, "--data", digits, "--image_size", 24,
        "--seeds", 0, 1, "--batch_size", 8, "--eps", 8, "--updates", 10, "--warmup", 5,
        "--steps", 1, "--rhos", 0.1, "--clean_weights", 3, "--head_num_samples", 200,
        "--curve_num_samples", 12, "--num_samples", 12, "--jobs", 2,
        "--numbers_dir", numbers, "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    run_script(*words, timeout=900)
    found = results.read_numbers(numbers)
    assert list(found) == list(results.REAL)
    methods = found["real_early_stability"]["results"]["8"]
    assert list(methods) == ["FARE, K = 1", "FARE, K = 5", "FARE, warm-up 5", "FARE + weight 10", "LORE"]
    starts = {name: [curve[0] for curve in of["clean"]] for name, of in methods.items()}
    assert len({tuple(values) for values in starts.values()}) == 1, "one start model and one head for all"
    rows = results.summary(found)
    assert rows[0][4:] == ["dinov2", "verdict"]
    assert any(row[5] not in (NOT_TESTED, "verdict") for row in rows)
    processors = list((tmp_path / "out/early_stability").glob("*/preprocessor_config.json"))
    sizes = [json.loads(path.read_text())["crop_size"] for path in processors]
    assert len(sizes) >= 2 * len(methods)
    assert all(size == {"height": 24, "width": 24} for size in sizes)
    run_script("benchmarks/results.py", "--numbers_dir", numbers, "--page", tmp_path / "page.md")
    assert "A pretrained encoder: a longer run" in (tmp_path / "page.md").read_text()


def test_seeds_of_two_calls_are_joined():
    """As if one call had measured them: values for every seed, the axes once."""

    def numbers(seeds, curve):
        results = {"8": {"LORE": {"updates": [0, 5], "clean": [curve for _ in seeds], "robust": [0.0 for _ in seeds]}}}
        return {
            "command": f"python a.py --seeds {' '.join(map(str, seeds))} --eps 8", "machine": "2 cores", "minutes": 1.5,
            "settings": {"seeds": seeds, "eps": [8.0]}, "results": results,
        }  # fmt: skip

    both = evidence.with_more_seeds(numbers([0], [0.5, 0.1]), numbers([1, 2], [0.4, 0.2]))
    assert both["results"]["8"]["LORE"] == {
        "updates": [0, 5], "clean": [[0.5, 0.1], [0.4, 0.2], [0.4, 0.2]], "robust": [0.0, 0.0, 0.0],
    }  # fmt: skip
    assert both["command"] == "python a.py --seeds 0 1 2 --eps 8"
    assert (both["machine"], both["minutes"], both["settings"]["seeds"]) == ("2 cores", 3.0, [0, 1, 2])


def test_only_other_seeds_of_the_same_settings_are_joined(tmp_path):
    @dataclass
    class Settings:
        seeds: list[int]
        eps: float = 8.0
        add_seeds: bool = True
        numbers_name: str = "some"
        numbers_dir: str = str(tmp_path)
        output_dir: str = "anywhere"

    assert evidence.numbers_of_other_seeds(Settings([0])) is None, "nothing there yet"
    (tmp_path / "some.json").write_text(json.dumps({"settings": asdict(Settings([0, 1]))}))
    assert evidence.numbers_of_other_seeds(Settings([2]))["settings"]["seeds"] == [0, 1]
    assert evidence.numbers_of_other_seeds(Settings([2], add_seeds=False)) is None
    with pytest.raises(UserError, match=r"--seeds 1: already in .*some\.json"):
        evidence.numbers_of_other_seeds(Settings([1, 2]))
    with pytest.raises(UserError, match=r"other settings \(eps\)"):
        evidence.numbers_of_other_seeds(Settings([2], eps=4.0))
