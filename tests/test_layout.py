"""Where code may live: what imports what."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the ground up: a folder imports what stands before it and its own modules. "" are the modules in utils/ itself.
FOLDERS = ("", "methods", "processes", "data", "sets", "models", "training", "evaluation")
UTILS = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for path in sorted((ROOT / "utils").rglob("*.py"))
    if path.name != "__init__.py"
}
SCRIPTS = {"train_lore", "train_po", "evaluate", "benchmarks", "examples", "tests", "slurm"}
# Mathematics of tensors: no settings, no files, no processes, no models of others.
PURE = {f"utils.methods.{name}" for name in ("attacks", "lagrangian", "lore", "losses", "preferences")}
PURE |= {f"utils.evaluation.{name}" for name in ("apgd", "fairness", "square")}
OUTSIDE = {"torch", "pyautoattack"}  # Square is its authors' own code


def imports(path: Path) -> set[str]:
    """The modules that a file imports, inside functions too; ``from utils.data import shards`` is utils.data.shards."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in inside if name in UTILS} or {node.module}
    return names


def of_utils(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "utils"}


def folder_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") == 2 else ""


def test_mathematics_knows_tensors_alone():
    for module in PURE:
        names = imports(UTILS[module])
        assert of_utils(names) <= PURE, module
        others = {name.split(".")[0] for name in names} - {"utils"} - set(sys.stdlib_module_names)
        assert others <= OUTSIDE, module
        assert not names & {"os", "io", "pathlib", "subprocess", "torch.distributed"}, module


@pytest.mark.parametrize("module", UTILS)
def test_imports_go_down_only(module):
    names = imports(UTILS[module])
    assert not {name.split(".")[0] for name in names} & SCRIPTS
    place = FOLDERS.index(folder_of(module))
    above = {name for name in of_utils(names) if FOLDERS.index(folder_of(name)) > place}
    assert not above, f"{module} imports what stands above it"


def test_no_circles():
    graph = {module: of_utils(imports(path)) for module, path in UTILS.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)  # raises CycleError


def test_folders_hold_four_to_nine_modules():
    folders = [folder_of(module) for module in UTILS]
    assert {name: folders.count(name) for name in FOLDERS if not 4 <= folders.count(name) <= 9} == {}
    assert set(folders) == set(FOLDERS)


def test_the_scripts_do_not_import_each_other():
    scripts = {"train_lore", "train_po", "evaluate"}
    for script in scripts:
        assert not {name.split(".")[0] for name in imports(ROOT / f"{script}.py")} & (scripts | {"benchmarks", "tests"})


def test_a_run_knows_no_method():
    assert not {name for name in imports(UTILS["utils.training.run"]) if name.startswith("utils.methods")}


def test_no_merge_was_left_half_done():
    texts = [path for suffix in ("md", "py", "toml", "txt", "yaml") for path in ROOT.rglob(f"*.{suffix}")]
    texts = [path for path in texts if not {".venv", "runs", "data"} & set(path.relative_to(ROOT).parts[:1])]
    marked = [path for path in texts if "\n" + 7 * "<" + " " in path.read_text(encoding="utf-8", errors="replace")]
    assert len(texts) > 200
    assert marked == []
