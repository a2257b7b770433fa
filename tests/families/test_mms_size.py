"""The memory of every command on checkpoints of many languages: what 100 more may take, as MMS has 1,162."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import large
import verify

# 20 MB for 100 languages of MMS's, each with six tensors of the adapters in 48 layers, and two of the head
EACH = 20e6 / 100 / (6 * 48 + 2)
LAYERS, FEW, MANY = 12, 10, 160
TENSORS = (MANY - FEW) * (6 * LAYERS + 2)

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="anonymous memory is measured on Linux alone"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], int]:
    """Run a command on a checkpoint of so many languages; return its peak of anonymous memory."""
    folder = tmp_path_factory.mktemp("languages")
    for count in (FEW, MANY):
        large.save(folder / f"{count}.pt", size=(LAYERS, 16), several=count)

    def peak(command: str, count: int) -> int:
        checkpoint, model, back = (folder / f"{count}{end}" for end in (".pt", "", ".back.pt"))
        words = {"restore": [model, back], "convert": [checkpoint, model]}.get(command, [checkpoint])
        return verify.measured(sys.executable, "-m", "convert", command, *words, "-q").peak

    return peak


@pytest.mark.parametrize("command", ["inspect", "plan", "convert", "restore"])  # restore takes what convert made
def test_memory_of_further_languages(command: str, made: Callable[[str, int], int]) -> None:
    more = made(command, MANY) - made(command, FEW)
    assert more < EACH * TENSORS
