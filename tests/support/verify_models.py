"""Converted tiny models and short inputs, so that hundreds of verifications fit into a test run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from fairseq_models import save

from convert.checkpoint import open_checkpoint
from convert.package import convert
from convert.request import Options
from convert.verification import device_run, inputs, make, run
from convert.verification.compare import Answer
from convert.verification.inputs import Cut, Geometry, Probe
from convert.verification.judge import Judged
from convert.verification.reference import Live, Subject
from convert.verification.report import Findings
from convert.verification.subject import read_subject
from convert.verification.target import Target

KEPT: dict[str, tuple[str, ...]] = {}  # what `few_inputs` keeps, for other processes
SAMPLES = 3200  # 0.2 s: 78 frames of the tiny models


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
def computed_once() -> Iterator[None]:
    """Let verifications compute the same from the same once: fairseq's answers, the converted model's, controls, files.

    fairseq's models are kept, and the converted ones of the two latest model directories.
    """
    built: dict[tuple[str, str], Live] = {}
    loaded: dict[str, Target] = {}
    checked: dict[str, Findings] = {}

    def live(subject: Subject, clips: Any, device: str) -> Live:
        key = (subject.sha256, device)
        if key not in built:
            built[key] = Remembering(subject, clips, device)
        return built[key]

    def load(folder: Path, device: str) -> Target:
        files = sorted(path for path in folder.iterdir() if path.name not in UNREAD)
        if not all(path.is_file() for path in folder.iterdir()):
            return load_target(folder, device)
        key = _content(device, *((path.name, path.read_bytes()) for path in files))
        loaded[key] = loaded.pop(key, None) or _remembering(load_target(folder, device))
        while len(loaded) > 2:
            del loaded[next(iter(loaded))]
        return loaded[key]

    def on_outputs(target: Target, clip: Judged, batch: Any, *others: Any) -> Any:
        answers = [item for answer in (clip.reference, clip.exact) for item in answer.stages.items()]
        values = [part for name, stage in answers for part in (name, stage.shape, stage.sha256, stage.values)]
        key = _content(clip.probe, clip.differences, *batch, others, *values)
        known = KNOWN.get(target)
        if known is None:
            return every_control(target, clip, batch, *others)
        if key not in known:
            KNOWN.pop(target)  # what a damaged model computes is not remembered
            try:
                known[key] = every_control(target, clip, batch, *others)
            finally:
                KNOWN[target] = known
        return known[key]

    def check_files(opened: Any, directory: Any, sha256: str, files: Any, dictionary: Any, findings: Findings) -> None:
        key = _content(sha256, sorted(files.items()), dictionary)
        if key not in checked:
            every_file(opened, directory, sha256, files, dictionary, made := Findings())
            checked.clear()
            checked[key] = made
        findings.problems += checked[key].problems
        findings.controls += checked[key].controls
        findings.skipped |= checked[key].skipped

    load_target, every_control, every_file = device_run.load, device_run.controls.on_outputs, run._check_files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Live", live)
        patch.setattr(run, "_check_files", check_files)
        patch.setattr(device_run, "load", load)
        patch.setattr(device_run.controls, "on_outputs", on_outputs)
        yield


UNREAD = {"preprocessor_config.json", "vocab.json", "conversion.json"}  # by what loads a model
KNOWN: WeakKeyDictionary[Target, dict[str, Any]] = (
    WeakKeyDictionary()
)  # what a model computed, by the content of its inputs


def _remembering(target: Target) -> Target:
    """Let a converted model compute each input once, for as long as it stands in `KNOWN`."""
    KNOWN[target] = {}
    compute, usual = target.run, target.usual

    def once(what: str, work: Callable[..., Any], *inputs: Any) -> Any:
        key = _content(what, target.lending.kind, target.current, *inputs)
        if target not in KNOWN:
            return work()
        if key not in KNOWN[target]:
            KNOWN[target][key] = work()
        return KNOWN[target][key]

    def run(waveforms: torch.Tensor, lengths: list[int] | None, visit: Callable[..., None]) -> list[int]:
        def work() -> Any:
            stages: list[Any] = []
            frames = compute(waveforms, lengths, lambda name, values: stages.append((name, values.clone())))
            return frames, stages

        other_order = torch._C._len_torch_function_stack()
        target.frames, stages = once("run", work, waveforms, lengths, other_order)
        for name, values in stages:
            visit(name, values)
        return target.frames

    target.run = run  # type: ignore[method-assign]
    target.usual = lambda: once("usual", lambda: (other := usual()) and _remembering(other))  # type: ignore[method-assign]
    for name in ("generate", "log_probabilities"):
        if hasattr(target, name):
            work = getattr(target, name)
            setattr(target, name, lambda *a, n=name, w=work, **k: once(n, lambda: w(*a, **k), *a, sorted(k.items())))
    return target


def _content(*parts: Any) -> str:
    """Digest tensors, and whatever else is written out."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.contiguous().numpy().tobytes() if isinstance(part, torch.Tensor) else repr(part).encode())
    return digest.hexdigest()


def edit(path: Path, **changes: Any) -> None:
    """Change values of a JSON file; `None` removes one."""
    content = json.loads(path.read_text())
    content |= changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
