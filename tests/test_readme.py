"""Every command and snippet of the README runs, in order, as a new user would type it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hubert_models
import mms_models
import pytest
import speech_to_text_models
from command_line import ROOT

BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
# What the tests are themselves, or what would fetch packages; `make demo` has a test of its own.
NOT_HERE = ("make ", "pip install")


OURS = ("OMP_NUM_THREADS", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "PYTHONPATH", "VIRTUAL_ENV")


def environment() -> dict[str, str]:
    """A user's: nothing that the tests set for themselves, but that nothing is asked of the Hub."""
    tools = str(Path(sys.executable).parent)
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    return {**kept, "PATH": f"{tools}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with checkpoints called as the README has them."""
    made = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "checkpoints", made / "checkpoints")
    shutil.copy(ROOT / "checkpoints/espeak-wav2vec2-ctc.pt", made / "checkpoint_best.pt")
    hubert_models.save("hubert_base", made / "hubert_base_ls960.pt")
    mms_models.save("mms", made / "mms1b_all.pt")
    path, *_ = speech_to_text_models.save("tied", made)
    path.rename(made / "s2t_checkpoint.pt")
    return made


@pytest.mark.slow
def test_every_block_runs(place: Path) -> None:
    """All in one test, since each block builds on the ones before it."""
    ran = 0
    for kind, text in BLOCKS:
        if kind == "python":
            done = subprocess.run(
                [sys.executable, "-c", text], cwd=place, env=environment(), capture_output=True, text=True
            )
            assert done.returncode == 0, f"{text}\n{done.stderr}"
            ran += 1
            continue
        for line in text.splitlines():
            if line.startswith(NOT_HERE):
                continue
            words = line.partition("#")[0].strip()
            done = subprocess.run(["sh", "-c", words], cwd=place, env=environment(), capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            if words.startswith("fairseq-to-hf publish"):  # without an account, the dry run shows the card
                assert "fairseq-to-hf: end" in done.stdout
            ran += 1
    assert ran >= 17


def test_what_is_left_out_is_known() -> None:
    lines = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
    assert [line.split()[1] for line in lines if line.startswith(NOT_HERE)] == ["demo", "test", "install"]


@pytest.mark.slow
def test_make_demo(tmp_path: Path) -> None:
    """`make demo` as it stands on a fresh clone, in a virtual environment that it makes itself."""
    for name in ("checkpoints", "convert", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    line = ["make", "demo", f"PYTHON={sys.executable}"]
    inherited = {name: value for name, value in environment().items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(line, cwd=tmp_path, env=inherited, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    heard = re.findall(r"^(heldout-\d+\.wav)  (.+)$", done.stdout, re.MULTILINE)
    said = (ROOT / "checkpoints/heldout/heldout.wrd").read_text().splitlines()
    assert [text for _, text in heard] == said
