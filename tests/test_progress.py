"""Progress bars: on a terminal, and nowhere else."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_line import BUNDLED, ROOT
from hub_fixtures import NAME

from convert import convert
from convert.report import counted, progress_bar

COMMAND = [sys.executable, "-m", "convert"]


def stderr_of(words: Sequence[object], env: dict[str, str] | None = None) -> str:
    """What a command writes to stderr, which is a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    written: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(ours, 1 << 16):
                written.append(piece)
        except OSError:  # how a terminal without a process ends on Linux
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        subprocess.run(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=theirs, env=env, cwd=ROOT, check=True)
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    return b"".join(written).decode()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("progress") / "model"
    convert(BUNDLED, out)
    return out


@pytest.mark.parametrize("name", ["convert", "restore"])
def test_a_command_shows_its_progress(name: str, model_dir: Path, tmp_path: Path) -> None:
    words = [*COMMAND, name, *([BUNDLED] if name == "convert" else [model_dir])]
    assert re.search(rf"{name} .*100%", stderr_of([*words, tmp_path / "shown"]))
    for flag in ("-q", "--json"):
        assert stderr_of([*words, tmp_path / flag, flag]) == ""
    assert subprocess.run([*words, tmp_path / "piped"], stderr=subprocess.PIPE, check=True, cwd=ROOT).stderr == b""


def test_publish_shows_what_it_hashes_and_sends(publisher, model) -> None:
    words = [*COMMAND, "publish", model, NAME]
    shown = stderr_of(words, publisher.environment())
    assert re.search(r"hash .*100%", shown) and "model.safetensors: 100%" in shown
    assert stderr_of([*words, "-q"], publisher.environment()) == ""


def test_a_bar_appears_with_the_first_news(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is fetched before a command can begin shows a bar of its own."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar("outer", show=True) as outer:
        with progress_bar("inner", show=True) as inner:
            inner(1, 1)
        assert "outer" not in capsys.readouterr().err
        counted(outer, 4)(4)
        outer.doing("last")
    assert "outer" in capsys.readouterr().err
    with progress_bar("none", show=False) as bar:
        counted(bar, 4)(4)
    assert bar is None and capsys.readouterr().err == ""
