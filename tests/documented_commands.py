"""The commands that README, docs and docstrings tell users to type, taken out of the text."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

# A line is a command if it starts with one of these, after variables of its environment.
HEADS = ("python", "accelerate", "make", "sbatch", "pip", "hf")
SHELL = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(HEADS)}) ")
IN_TABLE = re.compile(r"`((?:python|accelerate) [^`]+)`")


@dataclass(frozen=True)
class Command:
    where: str  # the file
    words: tuple[str, ...]  # without variables, comments and the "..." of what is left to the reader
    whole: bool  # had no "..."

    @property
    def script(self) -> str | None:
        """The script of the project that it starts."""
        return next(
            (word for word in self.words if (ROOT / word).is_file() and word.endswith((".py", ".sbatch"))), None
        )

    @property
    def arguments(self) -> list[str]:
        return list(self.words[self.words.index(self.script) + 1 :])

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def pages() -> list[Path]:
    """What is written for readers: README first."""
    found = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
    found += sorted((ROOT / "docs").glob("*.md"))
    return [*found, ROOT / "recipes/README.md", *sorted((ROOT / "examples").glob("*/README.md"))]


def documented() -> list[Command]:
    """Every command, once, in the order of the documents."""
    scripts = [path for folder in ("", "examples", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
    found = [command for page in pages() for command in _in_markdown(page)]
    found += _in_lines(ROOT / "Makefile", demo())
    found += [command for script in scripts for command in _in_lines(script, ast.get_docstring(_parsed(script)) or "")]
    return list({command.words: command for command in reversed(found)}.values())[::-1]


def demo() -> str:
    """What `make demo` starts."""
    lines = subprocess.run(
        ["make", "--dry-run", "--old-file=.venv/.installed", "demo"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return lines.replace(".venv/bin/", "")


def _parsed(script: Path) -> ast.Module:
    return ast.parse(script.read_text(encoding="utf-8"))


def _in_markdown(page: Path) -> Iterator[Command]:
    text = page.read_text(encoding="utf-8")
    code = re.findall(r"^```(\w*)\n(.*?)^```$|^( {4}[^\n]*)$", text, flags=re.DOTALL | re.MULTILINE)
    shell = [fenced or indented for language, fenced, indented in code if language in ("", "bash", "sh")]
    rows = "".join(re.findall(r"^\|.*\n", text, flags=re.MULTILINE))
    yield from _in_lines(page, "\n".join([*shell, *IN_TABLE.findall(rows)]))


def _in_lines(path: Path, text: str) -> Iterator[Command]:
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if SHELL.match(line.strip()):
            words = shlex.split(line, comments=True)
            while "=" in words[0]:
                words.pop(0)
            kept = [word for word in words if word != "..."]
            yield Command(str(path.relative_to(ROOT)), tuple(kept), len(kept) == len(words))
