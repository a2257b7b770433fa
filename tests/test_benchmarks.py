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
    ("name", "ratio"),
    [
        ("conversion", "convert / (cp and fsync)"),
        ("verify", "verify / bare process"),
        ("languages", "convert, time a language"),
    ],
)
def test_a_benchmark_prints_its_ratios(name: str, ratio: str, tmp_path: Path) -> None:
    line = [sys.executable, BENCHMARKS / f"{name}.py", "--small", "--directory", tmp_path]
    line += [] if name == "languages" else ["--rounds", "1"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^{re.escape(ratio)} +\d+\.\d\d\b", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.slow
def test_the_benchmark_of_the_judgement_prints_both_ends() -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / "judgement.py", "--small"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^3 verifications of correct models in 2 environments, 0 blamed$", done.stdout, re.MULTILINE)
    assert re.search(r"^ +wav2vec2-ctc_base +0\.\d+ of what is allowed", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^ +wav2vec2-ctc_base +2 of 2 one-unit faults stand out", done.stdout, re.MULTILINE), done.stdout
