"""The benchmarks run, at a small size: what they measure there says nothing, that they measure does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ratio"), [("conversion", "convert / (cp and fsync)"), ("verify", "verify / bare process")]
)
def test_a_benchmark_prints_its_ratios(name: str, ratio: str, tmp_path: Path) -> None:
    line = [sys.executable, BENCHMARKS / f"{name}.py", "--small", "--rounds", "1", "--directory", tmp_path]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^{re.escape(ratio)} +\d+\.\d\d\b", done.stdout, re.MULTILINE), done.stdout
