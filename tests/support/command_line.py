"""The repository's folder, and what a command did."""

from __future__ import annotations

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
