"""The output of an evaluation: results.json, a record per sample, pictures, and the comparisons made from them.

A cell identifies one figure: a dict with the keys of ``CELL``, whose ``settings`` hold everything else that it depends
on. Equal cells are the same measurement. A result is a cell with ``value``, ``ci95`` and ``n``.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import re
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from utils.data.digests import files_digest, text_digest
from utils.data.sources import one_line
from utils.errors import UserError
from utils.model_card import versions
from utils.models.hub import find_config
from utils.models.published import HUB_PREFIX, ModelName, layout, model_name
from utils.text_files import parse_json
from utils.whole_files import write_whole

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
CELL = ("model", "dataset", "measure", "attack", "eps", "seed", "corruption", "severity", "sigma", "settings")

SHARES = ("accuracy", "follows_word", "pair_accuracy")  # shares of images: numbers if there were any images
STRENGTH_OF = {"pgd": "eps", "apgd": "eps", "square": "eps", "gaussian_noise": "sigma", "corruptions": "severity"}

FIGURE_NAMES = {  # for every measure but accuracy; k is the cell's top_k
    "retention": "KL to the reference, nats",
    "max_skew": "MaxSkew@k, mean over classes",
    "max_skew_worst_query": "MaxSkew@k, worst class",
    "ndkl": "NDKL",
    "parity_difference": "demographic parity difference",
    "opportunity_difference": "equal opportunity difference",
    "worst_group_accuracy": "worst-group accuracy",
    "group_gap": "accuracy gap between groups",
    "follows_word": "follows the word",
    "pair_accuracy": "chosen text over rejected",
    "neutral_t": "neutral t*",
    "interpretability": "cosine to descriptions of the true class",
    "fidelity": "relative squared distance to the reference, mean",
    "fidelity_median": "relative squared distance to the reference, median",
    "fidelity_p95": "relative squared distance to the reference, 95th percentile",
    "fidelity_max": "relative squared distance to the reference, largest",
    "fidelity_cosine": "cosine to the reference, mean",
}

# Types of the values in files that are read back: results, warnings, comparisons. The keys of a record are optional.
NUMBER, NOTHING = int | float, types.NoneType
NAMES = {"model": str, "dataset": str, "attack": str}
STRENGTHS = dict.fromkeys(("eps", "sigma", "severity"), NUMBER | NOTHING) | {"corruption": str | NOTHING}
RESULT = NAMES | STRENGTHS | {"measure": str, "seed": int, "settings": dict, "value": NUMBER | NOTHING, "n": int}
WARNING = NAMES | STRENGTHS | {"text": str, "model_revision": str | NOTHING}
COMPARISON = {
    **{"models": list, "dataset": str, "attack": str, "eps": NUMBER | NOTHING, "sigma": NUMBER | NOTHING, "n": int},
    **{"only_first": int, "only_second": int, "p_value": NUMBER, "records": list},
}
RECORD = {
    **{"position": int, "key": str, "correct": bool, "label": int | NOTHING, "predicted": int | NOTHING, "top5": list},
    **{"broken_by": str | NOTHING, "forwards": NUMBER | NOTHING, "value": NUMBER, "cosine": NUMBER},
}
CAPTION = {"label": str, "predicted_clean": str, "predicted": str}

# The digests in a cell's settings, and the flag that named their source; and what this program alone decides.
CONTENT = {
    "model_revision": "--model {model}",
    "shards": "--data {dataset}",
    "prompts": "the class names or templates of --data {dataset}",
    "classifier_revision": "--linear_head",
    "reference_revision": "--reference_model_name_or_path",
    "font_files": "--fonts",
    "probe_tolerance": "the stopping rule of linear probes",
}
# The settings of a cell that identify images and classifier; those of the attack may differ.
READING = (
    *("split", "num_samples", "shards", "model_revision", "image_size", "prompts"),
    *("classifier", "classifier_revision", "train_num_samples", "probe_tolerance"),
)
BLACK_BOX_TOLERANCE = 0.002  # AutoAttack's: Square may be better than APGD by so much
LONGEST_FILE_NAME = 150  # in an output directory: ``cell_name`` and an ending
NAMED_LATER = ("digests", "classnames", "linear_head")  # missing in cells of earlier versions
MODEL_FILES = (".json", ".safetensors", ".bin", ".txt", ".model", ".jinja", ".spm", ".vocab", ".bpe", ".tiktoken")
OWN_FILES = ("results.json", "run.json")  # written beside a model, not part of it

T = TypeVar("T")
Cell = dict[str, Any]
Row = dict[str, Any]  # a sample's position and values; for accuracies label, predicted, correct


class Picture(NamedTuple):
    """A sample whose prediction an attack changed; pixels (3, H, W) in [0,1], as NumPy arrays for pickling."""

    position: int
    clean: np.ndarray
    attacked: np.ndarray
    caption: dict[str, str]


class Finding(NamedTuple):
    """A measured cell: its value, records, pictures and warnings."""

    cell: Cell
    value: float | None
    interval: Sequence[float] | None
    n: int
    rows: Sequence[Row] = ()
    pictures: Sequence[Picture] = ()
    warnings: Sequence[str] = ()


class Results:
    """A directory's results.json, records and pictures, read at the start and written after every job."""

    def __init__(self, output_dir: str | Path, launch: dict[str, str] | None = None) -> None:
        """``launch``: device, number of processes and precision of the call that goes on with these results."""
        self.output_dir, self.launch = Path(output_dir), launch or {"device": "unknown"}
        self.path = self.output_dir / "results.json"
        self.results: list[dict[str, Any]] = []
        self.warnings: list[dict[str, Any]] = []  # {"model", "dataset", "attack", "eps", ..., "text"}
        self.compared: list[dict[str, Any]] = []  # by ``compare``
        self.environment: dict[str, str] = {}
        self.written = ""
        self.undrawn: list[str] = []  # by ``attempt``
        if not self.path.exists():
            return
        try:
            report = parse_json(self.path.read_text(encoding="utf-8"))
            if report["schema_version"] != SCHEMA_VERSION:
                raise UserError(
                    f"--output_dir {output_dir}: results.json has schema version {report['schema_version']}, this "
                    f"program writes {SCHEMA_VERSION}; give another directory"
                )
            self.results, self.environment = report["results"], report["environment"]
            self.warnings, self.compared = report.get("warnings", []), report.get("comparisons", [])
            self.written = report.get("written", "")
            self._check()
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UserError(
                f"--output_dir {output_dir}: results.json is not a report ({error}); give another directory"
            ) from None

    def _check(self) -> None:
        """Raises ValueError, KeyError or TypeError if no tables and figures can be made from the file."""
        _check_types("environment", self.environment, dict.fromkeys(self.environment, str))
        _check_types("written", {"written": self.written}, {"written": str})
        for what, found, kinds in (
            ("a result", self.results, RESULT),
            ("a warning", self.warnings, WARNING),
            ("a comparison", self.compared, COMPARISON),
        ):
            for entry in found:
                _check_types(what, entry, kinds)
        for result in self.results:
            if result["measure"] != "accuracy":
                figure_name(result)  # KeyError for an unknown one
            if result["ci95"] is not None:
                low, high = result["ci95"]
                _check_types("ci95", {"low": low, "high": high}, {"low": NUMBER, "high": NUMBER})
            share = result["measure"] in SHARES
            if result["n"] < share or (share and result["value"] is None):
                raise ValueError(f"a result of {result['measure']} without images or value")
            for name in (STRENGTH_OF.get(result["attack"]), None if result["corruption"] is None else "severity"):
                if name is not None and result[name] is None:
                    raise ValueError(f"a result of {result['attack'][:100]} without {name}")
            if "t" in result["settings"]:
                _check_types("settings", result["settings"], {"t": NUMBER})
        known = {result["model"] for result in self.results}
        for test in self.compared:
            if len(test["models"]) != 2 or not known.issuperset(test["models"]):
                raise ValueError(f"a comparison of {str(test['models'])[:100]}, which have no results")

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """The finished measurement of this cell, or None."""
        return next((result for result in self.results if cell.items() <= result.items()), None)

    def add(self, cell: Cell, value: float | None, interval: Sequence[float] | None, n: int) -> None:
        self.results.append(cell | {"value": value, "ci95": None if interval is None else list(interval), "n": n})

    def current(self) -> list[dict[str, Any]]:
        """The results for the latest contents of models, data, class names and heads, without those of earlier ones."""
        sources = [_sources(result) for result in self.results]
        last = {name: content for of_result in sources for name, content in of_result.items()}
        return [
            result
            for result, of_result in zip(self.results, sources)
            if all(last[name] == content for name, content in of_result.items())
        ]

    def ask(self, cells: Sequence[Cell]) -> list[str]:
        """Makes known results of these cells current. Returns a line for each reason to measure others again."""
        found = [result for cell in cells if (result := self.find(cell)) is not None]
        current = {id(result) for result in self.current()}
        if not all(id(result) in current for result in found):  # for example if labels were changed back
            kept = {id(result) for result in found}
            self.results = [result for result in self.results if id(result) not in kept] + found
        known = {_question(result, "digests" not in result["settings"]): result for result in self.results}
        reasons: Counter[str] = Counter()
        for cell in cells:
            if self.find(cell) is not None:
                continue
            if old := known.get(_question(cell, False)):
                changed = [name for name in CONTENT if old["settings"].get(name) != cell["settings"].get(name)]
                reasons.update(f"{CONTENT[name].format(**cell)}: has changed" for name in changed)
            elif _question(cell, True) in known:
                where = f"--output_dir {self.output_dir}"
                reasons[f"{where}: of an earlier version, which did not look into the files"] += 1
        return [
            f"{reason}; {count} figure{'s' if count > 1 else ''} measured again, the old ones stay in results.json"
            for reason, count in reasons.items()
        ]

    def keep(self, finding: Finding) -> None:
        """Writes warnings, records and pictures. Call before the figure is written, so that it always has records."""
        for text in finding.warnings:
            self.warn(finding.cell, text)
        if finding.rows:
            self.write_records(finding.cell, finding.rows)
        if finding.pictures:
            _, clean, attacked, captions = zip(*finding.pictures)
            before, after = (torch.from_numpy(np.stack(images)) for images in (clean, attacked))
            attempt("pictures", lambda: self.write_pictures(finding.cell, before, after, captions), self.undrawn)

    def warn(self, cell: Cell, text: str) -> None:
        """Keeps and logs a warning about a figure, once."""
        where = ("model", "dataset", "attack", "eps", "sigma", "corruption", "severity")
        warning = {name: cell[name] for name in where} | {"text": text}
        warning |= {name: cell["settings"].get(name) for name in ("model_revision", "shards")}
        if warning not in self.warnings:
            self.warnings.append(warning)
            logger.warning(f"{cell['model']}  {cell['dataset']}  {column_name(cell)}: {text}")

    def write(self) -> None:
        """Replaces results.json, whole or not at all, including comparisons and warnings between results."""
        for result, text in sanity_warnings(self.current()):
            self.warn(result, text)
        self.environment = versions() | self.launch
        self.written = datetime.now(UTC).isoformat(timespec="seconds")
        report: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "written": self.written}
        report |= {"environment": self.environment, "results": self.results}
        report |= {"comparisons": self.compared, "warnings": self.warnings}
        replace_file(self.path, json.dumps(report, indent=1, allow_nan=False).encode())

    def write_records(self, cell: Cell, rows: Sequence[Row]) -> None:
        """Writes records/<cell>.jsonl, one sample per line, in the set's order."""
        replace_file(self.records_path(cell), "".join(json.dumps(row) + "\n" for row in rows).encode())

    def records(self, cell: Cell) -> list[Row]:
        """The records of a cell; empty for figures of a whole set and for files of earlier versions."""
        path = self.records_path(cell)
        if not path.exists():
            return []
        rows = []
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
            try:
                rows.append(parse_json(line))
                _check_types("a record", rows[-1], {"position": int})
                _check_types("a record", rows[-1], {name: RECORD[name] for name in RECORD.keys() & rows[-1].keys()})
            except ValueError as error:
                what = f"line {number} is not a record ({error})"
                raise UserError(f"{path}: {what}; measure again in another directory") from None
        return rows

    def records_path(self, cell: Cell) -> Path:
        return self.output_dir / "records" / f"{cell_name(cell)}.jsonl"

    def write_pictures(self, cell: Cell, clean: Tensor, attacked: Tensor, captions: Sequence[dict[str, str]]) -> None:
        """Writes pictures/<cell>.safetensors: clean and attacked pixel_values (k, 3, H, W) float32 in [0,1].

        ``captions``, k of them: {"label", "predicted_clean", "predicted"}, names of classes.
        """
        tensors = {"clean": clean.float().contiguous(), "attacked": attacked.float().contiguous()}
        replace_file(self.pictures_path(cell), save(tensors, {"captions": json.dumps(list(captions))}))

    def pictures(self, cell: Cell) -> tuple[Tensor, Tensor, list[dict[str, str]]] | None:
        """Reads what ``write_pictures`` wrote, or None."""
        path = self.pictures_path(cell)
        if not path.exists():
            return None
        try:
            # By the descriptor: safetensors opens only paths in UTF-8, but an output directory may have any name.
            with path.open("rb") as opened, safe_open(f"/dev/fd/{opened.fileno()}", framework="pt") as file:
                clean, attacked = file.get_tensor("clean").float(), file.get_tensor("attacked").float()
                captions = parse_json((file.metadata() or {})["captions"])
            if clean.ndim != 4 or clean.shape[1] != 3 or not clean.numel() or clean.shape != attacked.shape:
                raise ValueError(f"images of {tuple(clean.shape)} and {tuple(attacked.shape)}")
            if not isinstance(captions, list) or len(captions) != len(clean):
                raise ValueError("captions of other images")
            for caption in captions:
                _check_types("a caption", caption, CAPTION)
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            raise UserError(f"{path}: holds no pictures ({str(error)[:160]}); delete it, they are not needed") from None
        return clean, attacked, captions

    def pictures_path(self, cell: Cell) -> Path:
        return self.output_dir / "pictures" / f"{cell_name(cell)}.safetensors"

    def compare(self) -> None:
        """Compares every two models on the same images by McNemar's exact test, on cells that differ only in the model.

        ``compared`` becomes a list of dicts with the keys of ``COMPARISON``; ``only_first`` counts the images that only
        the first model classifies correctly. Corruptions are left out: 75 tests of one question would prove nothing.
        """
        groups: dict[str, list[Cell]] = defaultdict(list)
        for result in self.current():
            if result["measure"] == "accuracy" and result["corruption"] is None and "t" not in result["settings"]:
                groups[_without(result, "model", "model_revision", "classifier_revision")].append(result)
        self.compared = []
        for group in groups.values():
            if len(group) < 2:
                continue  # read records only if needed
            records = [self.records(result) for result in group]
            correct = [{row["position"]: row["correct"] for row in rows if "correct" in row} for rows in records]
            for (first, a), (second, b) in itertools.combinations(zip(group, correct), 2):
                if common := sorted(a.keys() & b.keys()):
                    only_first, only_second, p_value = mcnemar([a[i] for i in common], [b[i] for i in common])
                    test: dict[str, Any] = {"models": [first["model"], second["model"]]}
                    test |= {name: first[name] for name in ("dataset", "attack", "eps", "sigma")} | {"n": len(common)}
                    test |= {"only_first": only_first, "only_second": only_second, "p_value": p_value}
                    self.compared.append(test | {"records": [cell_name(first), cell_name(second)]})


def read_alike(result: Cell) -> str:
    """A key that two comparable accuracies share: the model, the images and the classifier."""
    reading = {name: result["settings"].get(name) for name in READING}
    return json.dumps([result["model"], result["dataset"], result["seed"], reading])


def sanity_warnings(results: Sequence[Cell]) -> Iterator[tuple[Cell, str]]:
    """Checks accuracies under l_inf attacks against one another, as AutoAttack does: (doubtful result, its fault).

    Croce and Hein 2020, arXiv 2003.01690; Carlini et al. 2019, arXiv 1902.06705. Faults that show in a single pass,
    random outputs and zero gradients, are found in attacks.py.
    """
    groups: dict[str, dict[str, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        l_inf = result["attack"] == "clean" or result["eps"] is not None
        if result["measure"] == "accuracy" and l_inf and "t" not in result["settings"]:
            groups[read_alike(result)][result["attack"]].append(result)

    def eps(result: Cell) -> float:
        return result["eps"] or 0.0

    def share(result: Cell) -> str:
        return f"{100 * result['value']:.1f} %"

    for group in groups.values():
        clean = group.pop("clean", [])
        for attacked in group.values():
            for weaker, stronger in itertools.combinations([*clean, *sorted(attacked, key=eps)], 2):
                # A larger ball contains the smaller one, so a good attack must be at least as strong in it.
                if eps(weaker) < eps(stronger) and weaker["value"] < stronger["value"]:
                    before, after = (f"{share(r)} at eps {eps(r):g}/255" for r in (weaker, stronger))
                    fails = "the attack fails at the larger radius; more steps may help"
                    yield stronger, f"accuracy rises from {before} to {after}: {fails}"
        for apgd, other in itertools.product(group["apgd"], group["pgd"] + group["square"]):
            if apgd["eps"] != other["eps"]:
                continue
            if other["attack"] == "pgd" and other["value"] < apgd["value"]:
                steps = other["settings"].get("attack_steps", "unknown")
                weak = f"PGD with {steps} steps only {share(other)}: APGD was too weak here"
                yield apgd, f"APGD leaves {share(apgd)}, {weak}"
            if other["attack"] == "square" and other["value"] < apgd["value"] - BLACK_BOX_TOLERANCE:
                doubt = "gradients mislead, the true robust accuracy is lower than either"
                yield apgd, f"the black-box Square attack leaves {share(other)}, APGD {share(apgd)}: {doubt}"


def model_revision(text: str | ModelName, cache_dir: str | None = None, flag: str = "--model") -> str:
    """Identifies a model's contents: digests of all files that are loaded, or commits of the hub.

    A base model, a processor or a tokenizer that completes the model counts too. Raises ``UserError``.
    """
    name = model_name(text)
    here, _ = find_config(name, flag)
    typed = name.path, name.base_model, name.processor, None
    local = here.path, here.base_model, here.processor, here.tokenizer
    parts = [(there, path) for there, path in zip(typed, local) if path is not None]
    revisions = [_files_revision(here, path, cache_dir) if path == there else Path(path).name for there, path in parts]
    return revisions[0] if len(revisions) == 1 else text_digest(revisions)


def _files_revision(name: ModelName, path: str, cache_dir: str | None) -> str:
    """A digest of a file, or of the files of a directory that are loaded."""
    of_model = path in (name.path, name.base_model) and not path.endswith(".json")
    own = layout(name if path == name.path else name.base, "--model") if of_model else None
    folder = Path(path)
    if folder.is_file():
        if own is None or own.kind == "weights":
            return files_digest([folder], cache_dir)[:16]
        folder = folder.parent
    names = {path.name for path in folder.iterdir() if path.suffix in MODEL_FILES and path.is_file()}
    names |= {own.file} if own else set()
    for parts in folder.glob("*.index.json"):  # may list weights in subfolders
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            names |= set(map(str, parse_json(parts.read_bytes())["weight_map"].values()))
    loaded = [name for name in sorted(names.difference(OWN_FILES)) if (folder / name).is_file()]
    try:
        return text_digest([f"{name!r} {files_digest([folder / name], cache_dir)}" for name in loaded])
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); check the files of the model {path}"
        raise UserError(f"{error.filename}: {problem}") from None


def cell_name(cell: Cell) -> str:
    """A file name for a cell: readable, and unique by a hash of its identity.

    It follows from the cell alone, so that records are found again when the model's files are gone.
    """
    identity = {name: cell[name] for name in CELL}
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=6).hexdigest()
    own, _, base = cell["model"].removeprefix(HUB_PREFIX).rpartition("@")
    model = f"{Path(own).name}@{Path(base).name}" if own else Path(base).name
    parts = [model, Path(cell["dataset"]).name, cell["measure"], cell["attack"]]
    for name in ("eps", "corruption", "severity", "sigma"):
        if cell[name] is not None:
            parts.append(cell[name] if name == "corruption" else f"{name}{cell[name]:g}")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts))[:120] + f"_{digest}"


def _check_types(what: str, found: Any, kinds: dict[str, Any]) -> None:
    """Raises ValueError if a dict lacks a key of ``kinds`` or the value has another type. True is not a number here."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} is a {type(found).__name__}")
    for name, kind in kinds.items():
        if name not in found:
            raise ValueError(f"{what} has no {name}")
        value = found[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{what} has {str(value)[:60]!r} as {name}")


def _sources(result: dict[str, Any]) -> dict[str, str]:
    """{source that a result was read from: digest of its contents}."""
    settings = result["settings"]
    shards = settings.get("shards")
    reading = [settings.get(name) for name in ("split", "num_samples", "classifier")]  # these select the shards
    reading += [settings["train_num_samples"]] if "train_num_samples" in settings else []
    words = settings.get("words")
    found: dict[tuple[Any, ...], Any] = {("model", result["model"]): settings.get("model_revision")}
    if settings.get("classifier") == "linear_probe":
        found["probe_tolerance", result["model"], result["dataset"]] = settings.get("probe_tolerance")
    for split, content in shards.items() if isinstance(shards, dict) else ():
        found["shards", result["dataset"], split, json.dumps(reading)] = content
    for name, source in (
        ("prompts", [result["dataset"], settings.get("classnames")]),
        ("classifier_revision", settings.get("linear_head")),
        ("reference_revision", settings.get("reference")),
        ("font_files", words.get("fonts") if isinstance(words, dict) else None),
    ):
        if name in settings:
            found[name, json.dumps(source)] = settings[name]
    return {json.dumps(source): json.dumps(content) for source, content in found.items()}


def _question(cell: Cell, earlier: bool) -> tuple[bool, str]:
    """A cell without the digests of its sources. ``earlier``: in the form that cells of earlier versions have."""
    return earlier, _without(cell, *CONTENT, *(NAMED_LATER if earlier else ()))


def _without(cell: Cell, *names: str) -> str:
    """A cell as a text, without these keys and settings."""
    settings = {name: value for name, value in cell["settings"].items() if name not in names}
    left = {name: cell[name] for name in CELL if name not in names}
    return json.dumps(left | {"settings": settings}, sort_keys=True)


def file_name(text: str) -> str:
    """``text`` as part of a file name; a digest is added if it was cut or lost characters other than a slash."""
    slashless = text.replace("/", "-")
    plain = re.sub("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "-", slashless)
    short = plain.encode()[:100].decode(errors="ignore")
    return plain if slashless == short else f"{short}_{text_digest([text])}"


def short_names(names: Iterable[str], of_models: bool = False) -> dict[str, str]:
    """{name: the last parts of its path that make it unique}, in the order of first appearance.

    A model NAME@BASE goes without @BASE, and without hf-hub:, unless that alone tells it from another.
    """
    parts, bases = {}, {}
    for name in dict.fromkeys(names):
        model = model_name(name) if of_models else ModelName(name, name)
        parts[name] = [part for part in model.path.split("/") if part] or [name]
        bases[name] = model.base_model
    return {name: _shortest(name, parts, bases) for name in parts}


def _shortest(name: str, parts: dict[str, list[str]], bases: dict[str, str | None]) -> str:
    """The shortest end of a name's path that no other name has; if none, with the name's @BASE; if none, the name."""
    own, base = parts[name], bases[name]
    for with_base in (False, True):
        others = [parts[other] for other in parts if other != name and not (with_base and bases[other] != base)]
        for length in range(1, len(own) + 1):
            if all(other[-length:] != own[-length:] for other in others):
                return "/".join(own[-length:]) + (f"@{base}" if with_base and base is not None else "")
    return name


def refuse_unwritable(output_dir: str) -> None:
    """Raises UserError if an evaluation's output could not be written at its end. Creates nothing."""
    folder = Path(output_dir)
    try:
        (folder / "pictures" / ("x" * LONGEST_FILE_NAME)).absolute().lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        problem = f"files in it cannot be named ({error.strerror}); give a shorter path"
        raise UserError(f"--output_dir {output_dir[:100]}: {problem}") from None
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    for path in (there, *(folder / name for name in ("records", "pictures", "probes", "features"))):
        if path.exists() and not path.is_dir():
            where = "" if path == folder else f"{path} "
            raise UserError(f"--output_dir {output_dir}: {where}is a file; give a directory")
        if path.exists() and not os.access(path, os.W_OK | os.X_OK):
            raise UserError(f"--output_dir {output_dir}: {path} cannot be written; name a directory that can")
    for name in ("results.json", "report.html", "benchmark.csv"):
        if (folder / name).is_dir():
            raise UserError(f"--output_dir {output_dir}: {name} there is a directory; give another directory")


def attempt(what: str, draw: Callable[[], T], undrawn: list[str]) -> T | None:
    """``draw()``, or None if it fails; logs and notes the failure, since a picture must not cost the figures."""
    try:
        return draw()
    except Exception as error:
        undrawn.append(f"{what} ({one_line(error)})")
        logger.warning(f"not drawn: {undrawn[-1]}")
        return None


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all. Raises ``UserError``."""
    again = "mend that, then give the same command again: what results.json holds is not measured again"
    write_whole(path, data, again)


def column_name(cell: Cell) -> str:
    """The heading of a cell in the table of accuracies: clean, apgd 4/255, gaussian_noise 16/255, follows the word."""
    if cell["measure"] == "follows_word":
        return "follows the word"
    strength = cell["eps"] if cell["sigma"] is None else cell["sigma"]
    if cell["corruption"] is not None:
        return f"{cell['corruption']} {cell['severity']}"
    return cell["attack"] + (f" {strength:g}/255" if strength else "")


def figure_name(cell: Cell) -> str:
    """The name of a figure in words."""
    if cell["measure"] == "accuracy":
        return f"accuracy, {cell['attack']}"
    return FIGURE_NAMES[cell["measure"]].replace("@k", f"@{cell['settings'].get('top_k')}")


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson 95 % interval of a share, both ends in [0,1]."""
    from scipy.stats import binomtest  # takes a second to import

    interval = binomtest(successes, trials).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean by the normal approximation, mean -+ 1.96 standard errors."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    half = 1.96 * math.sqrt(variance / len(values))
    return mean - half, mean + half


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """McNemar's exact test of two models on the same images: (b, c, p), b right for the first only, c for the second.

    p is two-sided under b ~ Binomial(b + c, 1/2), and 1 if the two never differ. Source: McNemar 1947.
    """
    from scipy.stats import binomtest

    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    differing = only_first + only_second
    return only_first, only_second, float(binomtest(only_first, differing, 0.5).pvalue) if differing else 1.0
