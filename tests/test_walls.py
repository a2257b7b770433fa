"""The walls between the rooms of `convert/`: who may import whom, read off the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import ROOT

PRODUCT = ROOT / "convert"
# From the bottom up: a room imports its own modules and those of earlier rows only.
ORDER = (
    {"errors", "report"},
    {"interrupts", "reading", "rules", "typed"},
    {"audio", "loading", "network", "planner", "workspace"},
    {"files"},
    {"checkpoint", "fetching"},
    {"pieces"},
    {"transfer"},
    {"families"},
    {"conversion", "mapping"},
    {"directory", "publishing"},
    {"draft", "sources"},
    {"request", "saved"},
    {"inspection", "package", "restoration"},
    {"verification"},
    {"evaluation"},
    {"cli"},
    {"commands"},
    {"__init__", "__main__"},
)
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
PLAIN = ("rules", "planner", "families", "mapping")  # rooms that need the standard library only
FILES = sorted(path for path in PRODUCT.rglob("*.py") if "fairseq_side" not in path.parts)


def room_of(path: Path) -> str:
    return path.relative_to(PRODUCT).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, wherever in it, but for type checkers alone."""
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for child in block.body
        for node in ast.walk(child)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "convert":
            yield from (f"convert.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def wrong(path: Path, text: str) -> list[str]:
    """Name the imports of a file that pass a wall."""
    room = room_of(path)
    found = []
    for name in imported(ast.parse(text)):
        first, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if first == "convert" and other != room:
            allowed = LEVELS[other] < LEVELS[room] or {room, other} == {"errors", "report"}
        else:
            allowed = first == "convert" or room not in PLAIN or first in sys.stdlib_module_names
        found += [] if allowed else [name]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PRODUCT)))
def test_nothing_imports_upwards(path: Path) -> None:
    assert wrong(path, path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("checkpoint/opening.py", "from convert.families import describe"),
        ("transfer.py", "def f():\n    from convert import package"),
        ("rules.py", "import numpy as np"),
        ("families/ctc.py", "def f():\n    import torch"),
        ("mapping.py", "from convert.verification.target import Target"),
    ],
)
def test_the_check_sees_it(file: str, line: str) -> None:
    assert len(wrong(PRODUCT / file, line)) == 1
