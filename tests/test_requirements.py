"""requirements.txt alone is enough: whatever is imported here is pinned there, and nothing else is."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import sys
from pathlib import Path

from tests.conftest import ROOT

SCRIPTS = [ROOT / f"{name}.py" for name in ("train_lore", "train_po", "evaluate")]
FOLDERS = {
    name: sorted((ROOT / name).glob("**/*.py")) for name in ("utils", "examples", "benchmarks", "slurm", "tests")
}
SOURCES = [*SCRIPTS, *(path for paths in FOLDERS.values() for path in paths)]

NOT_IMPORTED = {
    "ninja",
    "ruff",
    "mypy",
    "types-pyyaml",
    "pytest-cov",
    "pytest-xdist",
}  # DeepSpeed compiles with it; commands; plugins
# Used only where the pinned distribution that brings them is in use: their versions are its business.
BROUGHT = {
    "packaging": "transformers",
    "markupsafe": "jinja2",
    "tqdm": "huggingface-hub",
    "opencv-python": "imagecorruptions-imaug",
    "pyarrow": "datasets",
    "coverage": "pytest-cov",
}


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def pinned() -> set[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {normalized(line.split("==")[0]) for line in lines if "==" in line}


def imported(path: Path) -> set[str]:
    """The modules of others that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    names -= {
        "_typeshed",
        "wandb",
    }  # the type checker's own; a tracker that who wants it installs, imported where it is there
    own = {*FOLDERS, *(script.stem for script in SCRIPTS)}
    return {name.split(".")[0] for name in names} - own - set(sys.stdlib_module_names)


@functools.cache
def distributions() -> dict[str, set[str]]:
    """Module -> what installs it."""
    found = importlib.metadata.packages_distributions()
    return {module: {normalized(name) for name in names} for module, names in found.items()}


def required_by(distribution: str) -> set[str]:
    """What an installed distribution asks for, its extras left out."""
    asked = [text for text in importlib.metadata.requires(distribution) or [] if "extra ==" not in text]
    return {normalized(re.match(r"[\w.-]+", text)[0]) for text in asked}


def test_what_is_imported_is_pinned():
    installed = pinned() | BROUGHT.keys()
    lacking = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in SOURCES
        for module in imported(path)
        if not distributions().get(module, set()) & installed
    }
    assert not lacking


def test_what_is_brought_by_another_is_asked_for_by_it():
    assert {name for name, by in BROUGHT.items() if name not in required_by(by) or by not in pinned()} == set()


def test_what_is_pinned_is_used():
    used = {name for path in SOURCES for module in imported(path) for name in distributions().get(module, set())}
    assert pinned() - used == NOT_IMPORTED


def test_nothing_that_is_pinned_asks_for_torchvision():
    assert not [name for name in pinned() if "torchvision" in required_by(name)]
