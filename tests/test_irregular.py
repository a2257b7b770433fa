"""Pipes, devices and directories in place of files: no command waits, reads on, or ends in a traceback; and who opens files."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT
from irregular import KINDS

from convert.errors import ConvertError
from convert.reading import check_folder, read_file

PRODUCT = ROOT / "convert"
OPENING = {"open", "read_text", "read_bytes", "fdopen", "open_code"}
# each with its reason
ALLOWED = {
    "reading.py": {"open()", "os.open()"},  # the one opener
    "files.py": {"os.fdopen()", "os.open()", "path.open()"},  # new files, and the log, which it holds to the same rule
    "workspace.py": {"open()", "os.open()"},  # locks, and new files, in directories of its own
    "fetching.py": {"read_text()"},  # a file of the package
    "publishing/facts.py": {"read_text()"},  # a file of the package
    "evaluation/hub.py": {"fsspec.open()"},  # an address
    "network.py": {"open()"},  # an address
    # runs by itself in other Pythons, on files that the product made, and on the checkpoint, without waiting
    "verification/fairseq_side/recording.py": {"open()"},
    "verification/fairseq_side/tensorfile.py": {"open()"},
    "verification/fairseq_side/weights.py": {"open()", "os.open()"},
}


def opening(text: str) -> set[str]:
    """Name every call that opens or reads a file by its name."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = node.func.value if isinstance(node.func, ast.Attribute) else None
            if name in OPENING:
                found.add(f"{owner.id}.{name}()" if isinstance(owner, ast.Name) else f"{name}()")
        elif isinstance(node, ast.ImportFrom) and node.module in ("os", "io", "codecs"):
            found |= {f"{node.module}.{part.name}()" for part in node.names if part.name in OPENING}
    return found


def test_one_opener() -> None:
    paths = {path.relative_to(PRODUCT).as_posix(): path.read_text("utf-8") for path in PRODUCT.rglob("*.py")}
    assert {name: found for name, text in paths.items() if (found := opening(text))} == ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        "open('x')",
        "path.open('rb')",
        "(a / b).read_text()",
        "x.read_bytes()",
        "io.open('x')",
        "from os import open",
        "os.open('x', 0)",
    ],
)
def test_control_who_opens_is_seen(line: str) -> None:
    assert opening(line)
    assert not opening("open_file(path); read_file(path); file.read()")


def test_the_opener(tmp_path: Path) -> None:
    for kind, make in KINDS.items():
        make(tmp_path / kind)
        with pytest.raises(ConvertError) as caught:
            read_file(tmp_path / kind)
        assert caught.value.code == "not-a-file"
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "link", 3) == b"abc"
    with pytest.raises(ConvertError) as caught:
        read_file(tmp_path / "file", 2)
    assert caught.value.code == "too-large"
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none")


def test_a_folder_that_another_library_reads_in(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").touch()
    (tmp_path / "dangling").symlink_to("nothing")
    check_folder(tmp_path)
    os.mkfifo(tmp_path / "inner" / "pipe")
    with pytest.raises(ConvertError, match="pipe is not a regular file"):
        check_folder(tmp_path)


def test_a_model_directory_that_transformers_reads_in(tmp_path: Path) -> None:
    from transformers import AutoConfig

    from convert.loading import load

    (tmp_path / "config.json").write_text('{"model_type": "wav2vec2"}')
    load(AutoConfig, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConvertError, match="pipe is not a regular file"):
        load(AutoConfig, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_command_with_what_is_not_a_file(kind: str, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    paths = os.pathsep.join((str(ROOT / "tests/support"), str(ROOT)))
    line = [sys.executable, str(ROOT / "tests/support/irregular.py"), kind, str(tmp_path / "work")]
    done = subprocess.run(line, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) > 80 and len(outcomes) > 8, outcomes
