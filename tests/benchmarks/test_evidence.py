"""What is made of the numbers of the evidence: intervals, areas, and a page that says what the numbers say."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from scipy import stats

from benchmarks import attack_check, results, train_step
from benchmarks import evaluate as side_by_side
from benchmarks.comparison import run_name, was_asked, words
from benchmarks.evidence import (
    CONFIRMED,
    NOT_CONFIRMED,
    Claim,
    Difference,
    difference,
    dominated_area,
    front,
    share,
    verdict,
)
from benchmarks.transfer import halved
from tests.published_layouts import save_layouts
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NUMBERS, PAGE = ROOT / "docs/results", ROOT / "docs/results.md"


def test_a_difference_over_seeds_has_students_interval():
    first, second = [0.50, 0.54, 0.51], [0.45, 0.50, 0.48]
    found = difference(first, second, n=100)
    exact = stats.ttest_rel(first, second).confidence_interval()
    assert found == pytest.approx((4.0, 100 * exact.low, 100 * exact.high))


def test_a_difference_of_one_seed_has_newcombes_interval():
    """Newcombe 1998, example (a): 56/70 less 48/80, 0.2000 [0.0524, 0.3339]; here with one n, his method 10 by hand."""
    found = difference([0.8], [0.6], n=70, scale=1.0)
    (a_low, a_high), (b_low, b_high) = (
        stats.binomtest(round(p * 70), 70).proportion_ci(method="wilson") for p in (0.8, 0.6)
    )
    assert found.low == pytest.approx(0.2 - math.sqrt((0.8 - a_low) ** 2 + (b_high - 0.6) ** 2))
    assert found.high == pytest.approx(0.2 + math.sqrt((a_high - 0.8) ** 2 + (0.6 - b_low) ** 2))
    nothing = difference([0.0], [0.0], n=20)
    assert nothing.low < -5 < 5 < nothing.high  # none of 20 images is no proof of none at all


def test_verdicts_need_the_whole_interval():
    assert verdict(Difference(1, 0.1, 2)) == CONFIRMED
    assert verdict(Difference(1, -0.1, 2)) == NOT_CONFIRMED
    assert verdict(Difference(-1, -2, -0.1)) == NOT_CONFIRMED + ": the opposite"
    assert share([0.5, 0.6], n=10) == "55.0 ± 7.1"
    assert share([0.5], n=10) == "50.0 [23.7, 76.3]"


def test_the_area_under_a_front_is_what_its_points_dominate():
    generator = np.random.default_rng(0)
    for _ in range(20):
        points = [tuple(map(float, point)) for point in generator.integers(0, 11, size=(6, 2))]
        corner = (2.0, 3.0)
        # Unit squares, each dominated if its upper right corner is.
        squares = sum(any(x + 1 <= a and y + 1 <= b for a, b in points) for x in range(2, 10) for y in range(3, 10))
        assert dominated_area(points, corner) == squares
        assert dominated_area(front(points), corner) == squares
    assert front([(1.0, 3.0), (2.0, 2.0), (1.0, 1.0), (3.0, 1.0)]) == [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]


def test_a_run_is_named_by_all_that_makes_its_weights():
    base = {"eps": 4.0, "rho": 0.02, "primal_steps": 5}
    same = {"primal_steps": 5, "rho": 0.02, "eps": 4, "eval_shards": "a/b", "eval_steps": 3}
    assert run_name(base) == run_name(same)
    assert len({run_name(base | {key: 1}) for key in (*base, "margin")} | {run_name(base)}) == 5
    assert words(same)[-4:] == ["--eval_shards", "a/b", "--eval_steps", "3"]


def test_cells_of_other_settings_are_left_out():
    cell = {
        "dataset": "d",
        "eps": 4.0,
        "sigma": None,
        "severity": None,
        "settings": {"num_samples": 9, "apgd_steps": 100},
    }
    asked = {"data": ["d"], "eps": 4, "num_samples": 9, "sigma": 32.0, "severities": [3], "batch_size": 5}
    assert was_asked(cell, asked)
    for other in ({"eps": [2, 8]}, {"data": ["e"]}, {"num_samples": 8}, {"apgd_steps": 10}):
        assert not was_asked(cell, asked | other)
    assert not was_asked(cell | {"eps": None, "severity": 5}, asked)


def test_attacks_in_bfloat16_are_compared_with_others(small_clip, digits):
    settings = attack_check.Settings(model=str(small_clip), data=str(digits), output_dir="", num_samples=16)
    ratio = attack_check.attack_strength(settings, str(small_clip), 4.0)
    assert 0.9 < ratio < 1.1
    assert ratio != 1.0


def test_benchmarks_take_an_image_tower_and_its_base(digits, tmp_path):
    one = save_layouts(tmp_path / "published")["robustvlm_visual"]
    name, expected = f"{one.path}@{one.base_model}", one.expected["image_features"]
    encoder, classifier, images, labels = side_by_side.load(name, str(digits), 8, torch.device("cpu"))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (train_step.MEAN, train_step.STD))
    tower = train_step.load_tower(name, seed=0).eval()
    with torch.no_grad():
        for found in (encoder(one.images), tower((one.images - mean) / std).image_embeds):
            assert (found - expected).norm() < 1e-5 * expected.norm()
        assert classifier(encoder(images)).shape == (len(labels), 10)
    settings = attack_check.Settings(model=name, data=str(digits), output_dir="", num_samples=8)
    assert 0.9 < attack_check.attack_strength(settings, name, 4.0) < 1.1


def test_halves_share_no_image_and_leave_none_out(digits, tmp_path):
    made = halved(digits, tmp_path)

    def keys(split):
        return [sample["__key__"] for sample in wds.WebDataset(str(made / split / "0.tar"), shardshuffle=False)]

    train, test = keys("train"), keys("test")
    assert len(train) == len(test) == 180
    whole = [str(path) for path in sorted((digits / "test").glob("*.tar"))]
    assert sorted(train + test) == sorted(s["__key__"] for s in wds.WebDataset(whole, shardshuffle=False))
    assert (made / "classnames.txt").read_text() == (digits / "classnames.txt").read_text()
    assert halved(digits, tmp_path) == made  # and not again


def test_a_page_keeps_what_is_written_by_hand(tmp_path):
    page = "# Mine\n\n<!-- a -->\n\nold\n\n<!-- end a -->\n\nafter\n"
    assert results.filled(page, "a", "new", tmp_path) == page.replace("old", "new")
    with pytest.raises(UserError, match=r"expected one <!-- b --> and one <!-- end b -->"):
        results.filled(page, "b", "new", tmp_path)
    with pytest.raises(UserError, match="run the scripts first"):
        results.read_numbers(tmp_path)


def test_the_page_in_docs_says_what_its_numbers_say():
    """Tables and verdicts are made again of the numbers; neither can change without the other."""
    found = results.read_numbers(NUMBERS)
    assert found.keys() >= results.SCRIPTS.keys()
    text = PAGE.read_text()
    for name, block in results.make_blocks(found).items():
        assert results.filled(text, name, block, PAGE) == text, name
    for name in found:
        assert found[name]["settings"]["seeds"] == ([0] if name == "real_trade_off" else [0, 1, 2])
        assert not any(word.startswith("/") for word in found[name]["command"].split()), "a path of some machine"
        assert all((ROOT / f"docs/figures/{name}{suffix}").exists() for suffix in (".png", ".svg"))


@pytest.mark.slow
def test_everything_is_measured_and_shown_from_nothing(tmp_path):
    """make results-quick at its smallest: every script, every table, every figure."""
    from tests.conftest import run_script

    run_script("benchmarks/results_quick.py", "--output_dir", tmp_path / "out", "--tiny", "true", timeout=1500)
    page = (tmp_path / "out/results.md").read_text()
    found = results.read_numbers(tmp_path / "out/numbers")
    assert list(found) == list(results.SCRIPTS)
    claims: list[Claim] = [claim for name in found for claim in results.SCRIPTS[name][0].claims(found[name])]
    assert len(claims) > 20
    for claim in claims:
        assert claim.verdict.startswith((CONFIRMED, NOT_CONFIRMED))
        assert f"| {claim.claim} | {claim.found} | {claim.verdict} |" in page
    for name, numbers in found.items():
        script, _ = results.SCRIPTS[name]
        assert numbers["minutes"] > 0
        for _, rows in script.tables(numbers):
            assert len(rows) > 1
            assert len({len(row) for row in rows}) == 1, rows[0]
        assert (tmp_path / f"out/figures/{name}.png").stat().st_size > 10_000
        assert "mathdefault" not in (tmp_path / f"out/figures/{name}.svg").read_text()
    assert json.loads((tmp_path / "out/numbers/attack_check.json").read_text())["results"]["LORE"]["differ"] == 0
