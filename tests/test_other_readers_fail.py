"""Every command on every kind of checkpoint, while every other way to open one fails, here and in another interpreter."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fairseq.checkpoint_utils
import fairseq.utils
import numpy
import pytest
import torch
from command_line import HELDOUT
from evaluate_fixtures import run
from every_kind import KINDS
from verify_models import few_inputs, short_inputs

OPENING = (
    (torch, "load"),
    (torch.jit, "load"),
    (torch.hub, "load"),
    (torch.hub, "load_state_dict_from_url"),
    (torch.serialization, "load"),
    (pickle, "load"),
    (pickle, "loads"),
    (pickle, "Unpickler"),
    (numpy, "load"),
    (fairseq.checkpoint_utils, "load_checkpoint_to_cpu"),
    (fairseq.checkpoint_utils, "load_model_ensemble"),
    (fairseq.checkpoint_utils, "load_model_ensemble_and_task"),
    (fairseq.checkpoint_utils, "load_pretrained_component_from_model"),
    (fairseq.utils, "import_user_module"),
)
# the same for another interpreter, which says that it did so
ELSEWHERE = """
import os, pickle, numpy, torch
def fails(*_, **__):
    raise SystemExit("a checkpoint was handed to another reader")
torch.load = torch.jit.load = torch.hub.load = torch.serialization.load = numpy.load = fails
pickle.load = pickle.loads = fails
pickle.Unpickler = type("Unpickler", (), {"__init__": fails})
open(os.environ["GUARDED"], "a").close()
"""


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with short_inputs(), few_inputs("speech-even", "quiet"):
        yield


@contextlib.contextmanager
def others() -> Iterator[list[str]]:
    """Let every other way to open a checkpoint fail, and list the attempts."""
    asked: list[str] = []

    def failing(module: str, name: str) -> Callable[..., Any]:
        def fail(*_: Any, **__: Any) -> Any:
            asked.append(f"{module}.{name}")
            raise AssertionError(f"{module}.{name} was called")

        return type(name, (), {"__init__": fail}) if name[0].isupper() else fail  # a class may be inherited from

    with pytest.MonkeyPatch.context() as patch:
        for module, name in OPENING:
            patch.setattr(module, name, failing(module.__name__, name))
        yield asked


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An interpreter in which they fail too, and the file that it makes when it starts."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(ELSEWHERE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path / "guard"}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("GUARDED", str(tmp_path / "guarded"))
    return python, tmp_path / "guarded"


def words(options: dict[str, Any], *names: str) -> list[str]:
    """The options of a command, of those that it has."""
    flags = {"dictionary": "--dict", "data_config": "--data-config", "language": "--lang"}
    return [word for name in names if name in options for word in (flags[name], str(options[name]))]


@pytest.mark.parametrize("kind", KINDS)
def test_every_command(kind: str, tmp_path: Path) -> None:
    path, options = KINDS[kind](tmp_path)
    out, recording = tmp_path / "out", tmp_path / "recording"
    asked = words(options, "dictionary", "data_config", "language")
    known = words(options, "dictionary")
    commands: list[list[Any]] = [
        ["inspect", path],
        ["plan", path, *asked],
        ["convert", path, out, *asked],
        ["record", path, recording, *asked],
        ["verify", path, out, "--device", "cpu", "--reference", recording, *known],
        ["restore", out, tmp_path / "back.pt"],
        ["evaluate", out, "--manifest", HELDOUT, "--reference", "fairseq", "--checkpoint", path, "--device", "cpu"],
    ]
    with others() as asked_of:
        for command in commands:
            status, text, error = run(*command)
            assert asked_of == [], command
            # some write no text, and some have left out what the way back needs
            assert status == 0 or command[0] in ("evaluate", "restore"), (command, text, error)


@pytest.mark.parametrize("kind", ["ctc-2020", "mms", "speech-to-text"])
def test_another_interpreter(kind: str, guarded: tuple[Path, Path], tmp_path: Path) -> None:
    path, options = KINDS[kind](tmp_path)
    out = tmp_path / "out"
    asked = words(options, "dictionary", "data_config", "language")
    assert run("convert", path, out, *asked)[0] == 0
    more = words(options, "dictionary")
    status, text, error = run("verify", path, out, "--device", "cpu", "--fairseq-python", guarded[0], *more)
    assert status == 0, (text, error)
    assert guarded[1].exists()


def test_the_guards_are_up(guarded: tuple[Path, Path], tmp_path: Path) -> None:
    """The control: what they are there for does fail."""
    with others() as asked_of:
        with pytest.raises(AssertionError):
            torch.load(tmp_path / "model.pt")
        with pytest.raises(AssertionError):
            fairseq.checkpoint_utils.load_checkpoint_to_cpu("model.pt")
    assert asked_of == ["torch.load", "fairseq.checkpoint_utils.load_checkpoint_to_cpu"]
    for program in ("import torch; torch.load('model.pt')", "import pickle; pickle.loads(b'N.')"):
        done = subprocess.run([guarded[0], "-c", program], capture_output=True, text=True)
        assert "another reader" in done.stderr
