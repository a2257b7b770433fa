"""The repository's folder, what a command did, and several commands in one process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "checkpoints/espeak-wav2vec2-ctc.pt"
HELDOUT = ROOT / "checkpoints/heldout/heldout.tsv"


@dataclass(frozen=True)
class Ran:
    """What a command did: its exit status, its text, and its JSON object."""

    status: int
    text: str
    error: str
    data: dict[str, Any]


# commands one after the other in one process that has imported nothing yet: what each needs is imported once
COMMANDS = """
import json, sys
from convert.cli import main
for words in json.load(sys.stdin):
    try:
        main(words)
    except SystemExit as status:
        assert not status.code, words
"""


def objects(text: str) -> list[dict[str, Any]]:
    """Read the JSON objects that stand one after the other."""
    found, decoder = [], json.JSONDecoder()
    while text := text.lstrip("\n"):
        made, end = decoder.raw_decode(text)
        found.append(made)
        text = text[end:]
    return found
