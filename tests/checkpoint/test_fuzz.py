"""Thousands of damaged checkpoints: each converts and verifies, or is refused cleanly; nothing hangs, bloats or stays behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import classification_models
import hubert_models
import mms_models
import pytest
import seq2seq_models
from command_line import ROOT
from damage import BYTES, CASES, ENVIRONMENT, MUTATIONS, PICKLED
from fairseq_models import BASE, FEW, LARGE, SIZES, TINY, WIDTHS, Variant, save

SUPPORT = ROOT / "tests/support"
DECODER = {"decoder_embed_dim": 8, "decoder_ffn_embed_dim": 8, "decoder_layers": 1, "decoder_attention_heads": 2}
ADAPTED = Variant("ctc", LARGE | WIDTHS, mms_models.ADAPTERS | {"adp_dim": 4}, normalize=True, symbols=FEW)
# Other kinds of models: how one is saved, and what is asked of its conversion
KINDS: dict[str, tuple[Callable[[Path], Path], dict[str, object]]] = {
    "hubert": (
        lambda path: hubert_models.save(hubert_models.Variant("hubert", hubert_models.BASE | SIZES), path),
        {"keep_final_proj": True},
    ),
    "mms": (
        lambda path: mms_models.save(
            mms_models.Adapted(ADAPTED, "eng", (("eng", FEW), ("hin", ("|", "ा", "क")))), path
        ),
        {},
    ),
    "seq2seq": (
        lambda path: seq2seq_models.save(
            seq2seq_models.Seq2Seq("wav2vec2", BASE | WIDTHS, seq2seq_models.DECODER | DECODER, symbols=FEW), path
        ),
        {},
    ),
    "classification": (
        lambda path: classification_models.save(
            classification_models.Variant(BASE | WIDTHS, classification_models.LINEAR), path
        ),
        {},
    ),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {kind: save(TINY, folder / f"{kind}.pt", container=kind) for kind in ("zip", "legacy")}


def fuzz(
    name: str, original: Path, folder: Path, change: str = "", options: str = "{}"
) -> subprocess.CompletedProcess[str]:
    """Run one mutation's cases in a process of their own, after a change to the program that runs them."""
    program = f"import sys, damage\n{change}\ndamage.main(*sys.argv[1:])"
    (folder / "cases").mkdir()
    return subprocess.run(
        [sys.executable, "-c", program, name, str(original), str(folder / "cases"), options],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join((str(SUPPORT), str(ROOT)))},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", MUTATIONS)
def test_damaged_checkpoint_converts_and_verifies_or_is_refused(
    name: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    done = fuzz(name, originals[MUTATIONS[name][0]], tmp_path)
    assert not done.stderr, done.stderr
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) == CASES
    assert len(outcomes) > 1, f"the damage is always the same: {outcomes}"


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_models(kind: str, tmp_path: Path) -> None:
    save_it, options = KINDS[kind]
    done = fuzz(PICKLED, save_it(tmp_path / "original.pt"), tmp_path, options=json.dumps(options))
    assert not done.stderr, done.stderr
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) == CASES
    assert {"converted", "refused", "corrupted-entry"} <= outcomes.keys()


# What must be seen: what a conversion does, from the second on -> how the process ends
CONTROLS = {
    "traceback": ("raise ValueError('not ours')", "ValueError: not ours"),
    "system": ("raise OSError('not ours')", "OSError: not ours"),
    "memory": (f"bytearray({BYTES + 1_000_000})", "MemoryError"),  # more than what was freed since the bound was set
    "hang": ("damage.SECONDS = 1; damage.signal.alarm(1); threading.Event().wait()", "more than 1 seconds"),
    "file": ("(path.parent / 'left').touch()", "left behind: ['damaged.pt', 'left']"),
    "thread": ("threading.Timer(1, print).start()", "left behind: [<_MainThread"),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_fault_would_be_seen(name: str, originals: dict[str, Path], tmp_path: Path) -> None:
    fault, seen = CONTROLS[name]
    change = f"""
import threading
right, calls = damage.convert, []
def convert(path, out, **options):
    calls.append(path)
    if len(calls) > 1:
        {fault}
    return right(path, out)
damage.convert = convert
"""
    done = fuzz("zip-flip", originals["zip"], tmp_path, change)
    assert done.returncode == 1
    assert seen in done.stderr
    assert "zip-flip, case 0" in done.stderr
