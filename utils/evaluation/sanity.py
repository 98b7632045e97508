"""Signs that an attacked accuracy cannot be trusted, found by comparing results with one another.

What shows in a single pass (random outputs, zero gradients) is noticed in utils/evaluation/measures.py. The list is that of
AutoAttack's own checks (Croce and Hein 2020, arXiv 2003.01690; Carlini et al. 2019, arXiv 1902.06705).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

BLACK_BOX_TOLERANCE = 0.002  # AutoAttack's: so much may Square win over APGD

# Of a result's settings: which images and which classifier; the attack's own may differ.
READING = ("split", "num_samples", "shards", "model_revision", "prompts", "classifier", "classifier_revision")

Result = dict[str, Any]


def sanity_warnings(results: Sequence[Result]) -> Iterator[tuple[Result, str]]:
    """(the doubtful result, what is wrong with it) for all accuracies of labelled sets under l_inf attacks."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        l_inf = result["attack"] == "clean" or result["eps"] is not None
        if result["measure"] == "accuracy" and l_inf and "t" not in result["settings"]:
            groups.setdefault(_images(result), []).append(result)
    for group in groups.values():
        by_attack: dict[str, list[Result]] = {}
        for result in group:
            by_attack.setdefault(result["attack"], []).append(result)
        yield from _rising(by_attack)
        yield from _beaten(by_attack)


def _images(result: Result) -> str:
    """What two results must share to be compared."""
    reading = {name: result["settings"].get(name) for name in READING}
    return json.dumps([result["model"], result["dataset"], result["seed"], reading])


def _rising(by_attack: dict[str, list[Result]]) -> Iterator[tuple[Result, str]]:
    """A larger ball holds the smaller one, so a good attack can only do better in it."""
    clean = by_attack.get("clean", [])
    for attacked in (results for attack, results in by_attack.items() if attack != "clean"):
        attacked = sorted(attacked, key=_strength)
        for weaker, stronger in itertools.combinations([*clean, *attacked], 2):
            if _strength(weaker) < _strength(stronger) and weaker["value"] < stronger["value"]:
                yield (
                    stronger,
                    f"accuracy rises from {_percent(weaker)} at eps {_strength(weaker):g}/255 to {_percent(stronger)} at "
                    f"eps {_strength(stronger):g}/255: the attack fails at the larger radius; more steps may help",
                )


def _beaten(by_attack: dict[str, list[Result]]) -> Iterator[tuple[Result, str]]:
    """A weaker attack that does better than APGD shows that APGD was misled."""
    for apgd in by_attack.get("apgd", []):
        for pgd in by_attack.get("pgd", []):
            if pgd["eps"] == apgd["eps"] and pgd["value"] < apgd["value"]:
                steps = pgd["settings"].get("attack_steps", "unknown")
                yield (
                    apgd,
                    f"APGD leaves {_percent(apgd)}, PGD with {steps} steps only {_percent(pgd)}: APGD was too weak here",
                )
        for square in by_attack.get("square", []):
            if square["eps"] == apgd["eps"] and square["value"] < apgd["value"] - BLACK_BOX_TOLERANCE:
                yield (
                    apgd,
                    f"the black-box Square attack leaves {_percent(square)}, APGD {_percent(apgd)}: gradients mislead, the "
                    "true robust accuracy is lower than either",
                )


def _strength(result: Result) -> float:
    return result["eps"] or 0.0


def _percent(result: Result) -> str:
    return f"{100 * result['value']:.1f} %"
