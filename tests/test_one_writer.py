"""Nobody but `convert.files` and `convert.workspace` writes, renames or hashes files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from convert import files

WRITERS = {"files.py", "workspace.py", "fairseq_side/tensorfile.py"}  # the last runs by itself in old Pythons
MODULES = {"tempfile", "shutil", "fcntl"}
OF_OS = {"open", "rename", "renames", "replace", "link", "symlink", "unlink", "remove", "rmdir", "mkdir", "makedirs"}
OF_PATHS_ALONE = {"write_bytes", "write_text", "rename", "unlink", "rmdir", "symlink_to", "hardlink_to", "touch"}


def writing(text: str) -> set[str]:
    """Name what a module does itself that `convert.files` is there for: writing, renaming, and hashing files in pieces."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            found |= {f"import {name}" for name in named if name.partition(".")[0] in MODULES}
        if isinstance(node, ast.While) and any(
            isinstance(part, ast.Attribute) and part.attr in ("update", "write") for part in ast.walk(node)
        ):
            found |= {"read in pieces"} if "read(" in ast.unparse(node) and "update(" in ast.unparse(node) else set()
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        modes = [
            part.value
            for part in (*node.args, *(word.value for word in node.keywords))
            if isinstance(part, ast.Constant)
        ]
        if name == "open" and any(
            isinstance(mode, str) and re.fullmatch(r"[rwxabt+]*[wxa+][rwxabt+]*", mode) for mode in modes
        ):
            found.add("open for writing")
        if (owner == "os" and name in OF_OS) or (owner != "os" and name in OF_PATHS_ALONE):
            found.add(f"{name}()")
        if name == "replace" and owner not in ("", "dataclasses") and len(node.args) == 1 and not node.keywords:
            found.add("replace()")
    return found


# each with its reason
ALLOWED = {
    "reading.py": {"open()"},  # to read
    "rules.py": {"rename()"},  # of tensors
    "verification/fairseq_side/weights.py": {"open()"},  # to read
    # files without names: unlinked as soon as they are mapped
    "verification/fairseq_side/shelf.py": {"import tempfile", "unlink()"},
    "verification/report.py": {"import tempfile"},  # asks where temporary files lie, to name none of them
    "evaluation/transcripts.py": {"unlink()"},  # a log that is not needed any more
}


def test_nobody_else_writes_renames_or_hashes() -> None:
    root = Path(files.__file__).parent
    paths = {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in root.rglob("*.py")}
    found = {name: writing(text) for name, text in paths.items() if name.removeprefix("verification/") not in WRITERS}
    assert {name: what for name, what in found.items() if what} == ALLOWED
    assert writing(paths["workspace.py"]) >= {"import shutil", "open()", "unlink()", "rmdir()"}  # the control


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("open('x', 'wb')", "open for writing"),
        ("path.open(mode='a')", "open for writing"),
        ("path.write_text('x')", "write_text()"),
        ("part.replace(target)", "replace()"),
        ("os.replace(a, b)", "replace()"),
        ("import tempfile", "import tempfile"),
        ("from shutil import copyfile", "import shutil"),
        ("while piece := file.read(1):\n    digest.update(piece)", "read in pieces"),
    ],
)
def test_control_who_does_is_found(line: str, what: str) -> None:
    assert writing(line) == {what}
    assert writing("text.replace('a', 'b'); path.open('rb'); replace(self, x=1)") == set()
