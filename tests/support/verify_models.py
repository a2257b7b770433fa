"""Converted tiny models and short inputs, so that hundreds of verifications fit into a test run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fairseq_models import save

from convert.checkpoint import open_checkpoint
from convert.package import convert
from convert.request import Options
from convert.verification import inputs, make, run
from convert.verification.compare import Answer
from convert.verification.inputs import Cut, Geometry, Probe
from convert.verification.reference import Live, Subject
from convert.verification.subject import read_subject

KEPT: dict[str, tuple[str, ...]] = {}  # what `few_inputs` keeps, for other processes
SAMPLES = 6400  # 0.4 s: 158 frames of the tiny models


def converted(
    variant: Any, folder: Path, name: str = "model", *, write: Callable[..., Path] = save, **options: Any
) -> tuple[Path, Path]:
    """Save a tiny fairseq model, with its family's `save`, and convert it; return the checkpoint and the model directory."""
    keys = ("layout", "container", "adam", "seed", "model")
    saving = {key: options.pop(key) for key in keys if key in options}
    checkpoint = write(variant, folder / f"{name}.pt", **saving)
    return checkpoint, convert(checkpoint, folder / name, **options).path


def subject_of(checkpoint: Path, **asked: Any) -> tuple[Subject, Geometry]:
    """What a reference has to know of a checkpoint, that is asked for as in `convert.plan`."""
    with open_checkpoint(checkpoint) as opened:
        return read_subject(opened, Options(**asked).request())


@contextmanager
def short_inputs() -> Iterator[None]:
    """Shorten the bundled clip and the long input."""
    with pytest.MonkeyPatch.context() as patch:
        whole = inputs.bundled()
        patch.setattr(inputs, "bundled", lambda: whole[:SAMPLES])
        patch.setattr(inputs, "LONG", 1)
        yield


@contextmanager
def few_inputs(*names: str) -> Iterator[None]:
    """Keep some of the inputs, of verifications and of recordings."""
    every = inputs.probes
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KEPT, "names", names)
        for module in (run, make):
            patch.setattr(module, "probes", lambda *a, **k: [probe for probe in every(*a, **k) if probe.name in names])
        yield


class Remembering(Live):
    """fairseq in this process, asked each question once."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.given: dict[Any, Any] = {}

    def run(self, probe: Probe, name: str) -> Answer:
        if (probe, name) not in self.given:
            self.given[probe, name] = super().run(probe, name)
        answer = self.given[probe, name]
        return Answer(answer.frames, dict(answer.stages))  # the judge drops the stages that it needs no more

    def spell(self, language: str = "") -> str:
        if ("spelling", language) not in self.given:
            self.given["spelling", language] = super().spell(language)
        return str(self.given["spelling", language])

    def end_to_end(self, piece: Cut) -> tuple[Any, Answer, str]:
        if piece not in self.given:
            self.given[piece] = super().end_to_end(piece)
        made: tuple[Any, Answer, str] = self.given[piece]
        return made


@contextmanager
def one_reference() -> Iterator[None]:
    """Build fairseq's model of a checkpoint once, and ask it each question once, however often it is verified."""
    built: dict[tuple[str, str], Live] = {}

    def live(subject: Subject, clips: Any, device: str) -> Live:
        key = (subject.sha256, device)
        if key not in built:
            built[key] = Remembering(subject, clips, device)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Live", live)
        yield


def edit(path: Path, **changes: Any) -> None:
    """Change values of a JSON file; `None` removes one."""
    content = json.loads(path.read_text())
    content |= changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
