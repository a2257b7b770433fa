"""Damaged model directories, recordings and checkpoints: each is used, or refused with one error; nothing is left behind."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from damage import MUTATIONS, PICKLED
from evaluate_fixtures import write_manifest
from fairseq_models import TINY, save
from nonsense import other_json
from verify_models import computed_once, few_inputs, short_inputs

from convert.checkpoint import open_checkpoint
from convert.directory import ModelDirectory
from convert.errors import ConvertError
from convert.evaluation import evaluate
from convert.package import compare_weights, convert
from convert.publishing import publish
from convert.restoration import restore
from convert.verification import expected, record, verify

CASES = 100


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
        meant = expected.expect(opened, directory, opened.sha256(), None)
    problems = [*compare_weights(checkpoint, folder), *expected.compare_files(directory, meant.files)]
    problems += expected.compare_records(directory, meant)[0]
    return "different" if problems else "same"


def restored(folder: Path) -> str:
    restore(folder, folder.with_name("back.pt"))
    folder.with_name("back.pt").unlink()
    return "restored"


def restored_without_its_record(folder: Path) -> str:
    """As a directory that transformers saved."""
    if os.path.lexists(folder / "conversion.json"):
        (folder / "conversion.json").rename(folder.with_name("record"))
    try:
        return restored(folder)
    finally:
        aside = folder.with_name("record")
        if aside.is_dir():
            aside.rmdir()
        else:
            aside.unlink(missing_ok=True)


def verified(checkpoint: Path, recording: Path, folder: Path) -> str:
    done = verify(checkpoint, folder, reference=recording, devices=["cpu"], write=False)
    return "same" if done.passed else "different"


def evaluated(manifest: Path, folder: Path) -> str:
    evaluate(folder, manifest=manifest, device="cpu", transcripts=folder.with_name("kept.jsonl"))
    folder.with_name("kept.jsonl").unlink()
    return "evaluated"


def published(folder: Path) -> str:
    publish(folder, "me/model", unverified=True, dry_run=True)
    return "planned"


@pytest.fixture(scope="module")
def uses(
    made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Callable[[Path], str]]]:
    checkpoint, folder = made[0], tmp_path_factory.mktemp("beside")
    with short_inputs(), few_inputs("speech-even", "quiet"), computed_once():
        recording = record(checkpoint, folder / "recording", long=False)
        manifest = write_manifest(folder, ("TO", "EAT"))
        yield {
            "files": lambda path: files_compared(checkpoint, path),
            "restore": restored,
            "restore-theirs": restored_without_its_record,
            "verify": lambda path: verified(checkpoint, recording, path),
            "evaluate": lambda path: evaluated(manifest, path),
            "publish": published,
        }


def one_outcome(use: Callable[[], str], case: int) -> str:
    try:
        return use()
    except ConvertError as error:
        assert error.status in (1, 2) and error.code != "unexpected", f"case {case}: {error}"
        return error.code
    except Exception as error:
        raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error


# what is done with a damaged directory -> outcomes that must be among those seen
SEEN = {
    "files": {"different", "not-a-model"},
    "restore": {"restored", "not-a-model", "changed"},
    "restore-theirs": {"restored", "not-a-model"},
    "verify": {"different", "not-a-model"},
    "evaluate": {"evaluated", "load", "no-model"},
    "publish": {"planned", "no-model", "unsafe-file"},
}


@pytest.mark.parametrize("use", SEEN)
def test_a_damaged_directory_is_one_error(
    use: str, uses: dict[str, Callable[[Path], str]], made: tuple[Path, Path], tmp_path: Path
) -> None:
    outcomes: Counter[str] = Counter()
    for case in range(CASES):
        chance = random.Random(case)
        folder = Path(shutil.copytree(made[1], tmp_path / "model"))
        damage(chance, chance.choice(sorted(folder.iterdir())))
        outcomes[one_outcome(lambda folder=folder: uses[use](folder), case)] += 1  # type: ignore[misc]
        (tmp_path / "kept.jsonl").unlink(missing_ok=True)  # transcripts stay where the evaluation ended early
        assert [path.name for path in tmp_path.rglob("*") if path.parent == tmp_path or "part" in path.suffix] == [
            "model"
        ]
        shutil.rmtree(folder)
    assert outcomes.keys() >= SEEN[use], outcomes


def test_a_traceback_would_be_seen(
    uses: dict[str, Callable[[Path], str]], made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelDirectory, "json", lambda self, name: json.loads((self.path / name).read_bytes()))
    with pytest.raises(AssertionError, match="case "):
        test_a_damaged_directory_is_one_error("files", uses, made, tmp_path)


def test_a_damaged_recording_is_one_error(made: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, model = made
    outcomes: Counter[str] = Counter()
    with short_inputs(), few_inputs("speech-even", "quiet"), computed_once():
        content = record(checkpoint, tmp_path / "recording", long=False).read_bytes()
        count = int.from_bytes(content[:8], "little")
        for case in range(CASES):
            chance, header = random.Random(case), content[8 : 8 + count]
            kind = chance.randrange(8)
            if kind < 5:  # what it says of itself
                values = json.loads(header)
                about = other_json(chance, values["__metadata__"]["recording"].encode())
                values["__metadata__"]["recording"] = about.decode(errors="replace")
                header = json.dumps(values).encode()
            elif kind == 5:
                header = other_json(chance, header)
            damaged = len(header).to_bytes(8, "little") + header + content[8 + count :]
            if kind == 6:
                at = chance.randrange(len(content))
                damaged = content[:at] + chance.randbytes(chance.choice((0, 1, 4))) + content[at + 1 :]
            elif kind == 7:
                damaged = content[: chance.randrange(len(content))]
            (tmp_path / "damaged").write_bytes(damaged)
            outcomes[one_outcome(lambda: verified(checkpoint, tmp_path / "damaged", model), case)] += 1
    assert outcomes.keys() >= {"bad-recording", "same", "different"}, outcomes


def test_a_damaged_checkpoint_is_recorded_or_one_error(made: tuple[Path, Path], tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    original, names = made[0].read_bytes(), PICKLED.split(",")
    with short_inputs(), few_inputs("speech-even", "quiet"), computed_once():
        for case in range(CASES):
            chance = random.Random(case)
            (tmp_path / "damaged.pt").write_bytes(MUTATIONS[chance.choice(names)][1](chance, original))

            def recorded() -> str:
                record(tmp_path / "damaged.pt", tmp_path / "recording", long=False).unlink()
                return "recorded"

            outcomes[one_outcome(recorded, case)] += 1
            assert [path.name for path in tmp_path.iterdir()] == ["damaged.pt"], f"case {case}"
    assert outcomes.keys() >= {"recorded", "refused", "corrupted-entry"}, outcomes
