"""Damaged model directories: each is compared and restored, or refused with one error; nothing is left behind."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fairseq_models import save
from nonsense import other_json
from test_fuzz import TINY

from convert.checkpoint import open_checkpoint
from convert.directory import ModelDirectory
from convert.errors import ConvertError
from convert.package import compare_weights, convert
from convert.restoration import restore
from convert.verification import expected

CASES = 200


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    path = save(TINY, folder / "model.pt")
    return path, convert(path, folder / "model").path


def damage(chance: random.Random, path: Path) -> None:
    """Change a value of a JSON file, bytes of any file, or what kind of file it is."""
    content = path.read_bytes()
    kind = chance.randrange(10)
    if kind < 6 and path.suffix == ".json":
        path.write_bytes(other_json(chance, content))
    elif kind < 6:
        count = int.from_bytes(content[:8], "little")
        header = other_json(chance, content[8 : 8 + count])
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + count :])
    elif kind < 8:
        at = chance.randrange(len(content))
        path.write_bytes(content[:at] + chance.randbytes(chance.choice((0, 1, 4))) + content[at + 1 :])
    else:
        path.unlink()
        if kind == 9:
            chance.choice((os.mkfifo, Path.mkdir))(path)


def files_compared(checkpoint: Path, folder: Path) -> str:
    """What `verify` does before it loads a model."""
    directory = ModelDirectory(folder)
    with open_checkpoint(checkpoint) as opened:
        meant = expected.expect(opened, directory, opened.sha256())
    problems = [*compare_weights(checkpoint, folder), *expected.compare_files(directory, meant.files)]
    problems += expected.compare_records(directory, meant)[0]
    return "different" if problems else "same"


def restored(folder: Path) -> str:
    restore(folder, folder.with_name("back.pt"))
    folder.with_name("back.pt").unlink()
    return "restored"


def test_a_damaged_directory_is_one_error(made: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, model = made
    assert files_compared(checkpoint, model) == "same"
    outcomes: Counter[str] = Counter()
    for case in range(CASES):
        chance = random.Random(case)
        folder = Path(shutil.copytree(model, tmp_path / "model"))
        damage(chance, chance.choice(sorted(folder.iterdir())))
        uses: list[Any] = [
            lambda folder=folder: files_compared(checkpoint, folder),
            lambda folder=folder: restored(folder),
        ]
        for use in uses:
            try:
                outcome = use()
            except ConvertError as error:
                assert error.status in (1, 2) and error.code != "unexpected", f"case {case}: {error}"
                outcome = error.code
            except Exception as error:
                raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
            outcomes[outcome] += 1
        assert [path.name for path in tmp_path.iterdir()] == ["model"], f"case {case}"
        shutil.rmtree(folder)
    assert {"different", "restored", "not-a-model", "changed"} <= outcomes.keys(), outcomes


def test_a_traceback_would_be_seen(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelDirectory, "json", lambda self, name: json.loads((self.path / name).read_bytes()))
    with pytest.raises(AssertionError, match="case "):
        test_a_damaged_directory_is_one_error(made, tmp_path)
