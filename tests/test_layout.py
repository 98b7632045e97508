"""Where code may live: what imports what."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from tests.conftest import ROOT

UTILS = {path.stem: path for path in (ROOT / "utils").glob("*.py")}
SCRIPTS = {"train_lore", "train_po", "evaluate", "benchmarks", "examples", "tests", "slurm"}
# Mathematics of tensors: no settings, no files, no processes, no models of others.
PURE = {"attacks", "fairness", "lagrangian", "losses", "preferences"}
OUTSIDE = {"torch", "pyautoattack"}  # Square is its authors' own code


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "utils" else {node.module}
            )
    return names


def of_utils(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("utils.")}


def test_mathematics_knows_tensors_alone():
    for module in PURE:
        names = imports(UTILS[module])
        assert of_utils(names) <= PURE, module
        others = {name.split(".")[0] for name in names} - {"utils"} - set(sys.stdlib_module_names)
        assert others <= OUTSIDE, module
        assert not names & {"os", "io", "pathlib", "subprocess", "torch.distributed"}, module


def test_utils_is_below_the_scripts_and_has_no_circles():
    graph = {module: of_utils(imports(path)) for module, path in UTILS.items()}
    for module, path in UTILS.items():
        assert not {name.split(".")[0] for name in imports(path)} & SCRIPTS, module
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)  # raises CycleError


def test_the_scripts_do_not_import_each_other():
    scripts = {"train_lore", "train_po", "evaluate"}
    for script in scripts:
        assert not {name.split(".")[0] for name in imports(ROOT / f"{script}.py")} & (scripts | {"benchmarks", "tests"})
