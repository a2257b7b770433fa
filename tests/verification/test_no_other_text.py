"""`record` and `verify` print their own text, and nothing of fairseq, transformers and torch, into which they look."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import COMMANDS, ROOT, objects
from every_kind import KINDS

from convert.package import convert

# the clip that ships, shorter: what is printed is the same
SHORTER = """
from convert.verification import inputs
whole = inputs.bundled()
inputs.bundled = lambda: whole[:3200]
"""


# one of each family, and the layouts of which other libraries have something to say
SOME = ("ctc-2020", "pretrained-2020", "hubert", "data2vec", "conformer", "wavlm", "adapters", "classifier", "seq2seq")


def printed(line: list[str], text: str = "", **variables: str) -> tuple[str, str]:
    """Run a process as a user does, whose environment has nothing of ours; return its stdout and stderr."""
    ours = ("HF_HUB_", "TRANSFORMERS_", "OMP_", "PYTHONWARNINGS")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run([sys.executable, *line], input=text, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout, done.stderr


def asked(kind: str, folder: Path) -> list[list[str]]:
    """Make a kind of checkpoint and convert it; the words that record and verify it."""
    folder.mkdir(exist_ok=True)
    checkpoint, options = KINDS[kind](folder)
    convert(checkpoint, folder / "out", **options)
    names = {"dictionary": "--dict", "data_config": "--data-config", "language": "--lang"}
    given = {key: [names[key], str(value)] for key, value in options.items()}
    return [
        [
            "record",
            str(checkpoint),
            str(folder / "recording"),
            "--no-long",
            *[word for pair in given.values() for word in pair],
        ],
        ["verify", str(checkpoint), str(folder / "out"), "--device", "cpu", "--no-long", *given.get("dictionary", [])],
    ]


@pytest.mark.slow
def test_every_family(tmp_path: Path) -> None:
    lines = [[*words, "--json"] for kind in SOME for words in asked(kind, tmp_path / kind)]
    out, error = printed(["-c", SHORTER + COMMANDS], json.dumps(lines), OMP_NUM_THREADS="1")
    assert error == ""
    assert [(made["command"], made["ok"]) for made in objects(out)] == [("record", True), ("verify", True)] * len(SOME)


@pytest.mark.slow
def test_a_file_of_2020_as_it_is_typed(tmp_path: Path) -> None:
    """fairseq writes errors of composing settings of that time to stderr, when its own loader reads them."""
    recording, verifying = asked("speech-to-text-2020", tmp_path)
    for words in (recording, verifying):
        assert printed(["-m", "convert", *words, "-q"]) == ("", "")  # without its own text, nothing is left
    assert printed(["-m", "convert", *verifying])[1] == ""
