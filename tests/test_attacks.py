"""Checkpoints that are one thing to us and another to torch, fairseq or omegaconf: nothing in them runs, at any command."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import HELDOUT
from fairseq_models import _namespace, save
from omegaconf import OmegaConf
from torch_files import before, change_pickle, entries, pickles, read, text
from verify_models import few_inputs, short_inputs

from convert.checkpoint import open_checkpoint
from convert.errors import ConvertError
from convert.evaluation.run import evaluate
from convert.package import convert, plan
from convert.verification import record, verify
from convert.verification.fairseq_side import opening

CODE = "__import__('os').system('touch canary')"
GADGET = b"cos\nsystem\n" + text("touch canary") + b"\x85R"


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with short_inputs(), few_inputs("speech-even", "quiet"):
        yield


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("good")
    path = save("ctc_base", folder / "model.pt")
    return path, convert(path, folder / "model").path


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, where `canary` would show that something ran."""
    (tmp_path / "room").mkdir()
    monkeypatch.chdir(tmp_path / "room")
    return tmp_path / "room"


def tried(path: Path, directory: Path, room: Path) -> dict[str, tuple[int, set[str]]]:
    """Run every command that reads a checkpoint: its exit status and the codes of its problems; nothing may run.

    Of the directory it is said that it was made from this very file, so that `verify` goes all the way.
    """
    copy = Path(shutil.copytree(directory, room / "copy", dirs_exist_ok=True))
    said = (copy / "conversion.json").read_text()
    with open_checkpoint(directory.with_suffix(".pt")) as opened:
        was = opened.sha256()
    try:
        with open_checkpoint(path) as opened:
            (copy / "conversion.json").write_text(said.replace(was, opened.sha256()))
    except ConvertError:
        pass
    commands: dict[str, Callable[[], Any]] = {
        "plan": lambda: plan(path),
        "convert": lambda: convert(path, room / "out"),
        "record": lambda: record(path, room / "recording"),
        "verify": lambda: verify(path, copy, devices=["cpu"], write=False),
        "evaluate": lambda: evaluate(copy, manifest=HELDOUT, reference="fairseq", checkpoint=path, device="cpu"),
    }
    results = {}
    for name, command in commands.items():
        try:
            command()
            results[name] = (0, set())
        except ConvertError as error:
            results[name] = (error.status, {problem.code for problem in error.problems})
        assert not (room / "canary").exists(), f"{name}: something in the file ran"
    return results


def ran(room: Path) -> bool:
    """Say whether the control ran what the file holds, and clear that away."""
    there = (room / "canary").exists()
    (room / "canary").unlink(missing_ok=True)
    return there


def outcome(results: dict[str, tuple[int, set[str]]]) -> set[tuple[int, str]]:
    """The results, which are the same of every command that needs the whole of a checkpoint."""
    return {(status, code) for status, codes in results.values() for code in codes or {""}}


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["inner", "outer"])
def test_a_setting_that_fairseq_evaluates(place: str, good: tuple[Path, Path], room: Path) -> None:
    state = read(good[0])
    model = state["cfg"]["model"]
    (model["w2v_args"]["model"] if place == "inner" else model)["conv_feature_layers"] = f"{CODE} or [(32, 10, 5)]"
    torch.save(state, room / "model.pt")
    results = tried(room / "model.pt", good[1], room)
    assert outcome(results) == ({(1, "bad-setting")} if place == "inner" else {(0, "")}), results
    eval(f"{CODE} or []")  # the control
    assert ran(room)


def test_a_setting_that_fairseq_evaluates_in_a_namespace(good: tuple[Path, Path], room: Path) -> None:
    """Around the encoder's settings a Namespace may hold anything: nothing of it is handed on."""
    state = read(good[0])
    flat = _namespace(state["cfg"]["model"] and state["cfg"])
    flat.conv_feature_layers = flat.latent_temp = flat.adaptive_softmax_cutoff = CODE
    torch.save(state | {"cfg": None, "args": flat}, room / "model.pt")
    tried(room / "model.pt", good[1], room)


def test_two_roots_of_interpolation(good: tuple[Path, Path], room: Path) -> None:
    """A reference in `w2v_args` starts at the root of `w2v_args` for us, at the outer root for omegaconf."""
    state = read(good[0])
    harmless = state["cfg"]["model"]["w2v_args"]["model"]["conv_feature_layers"]
    state["cfg"]["common"] = {"wandb_project": f"{CODE} or {harmless}"}
    state["cfg"]["model"]["w2v_args"]["common"] = {"wandb_project": harmless}
    state["cfg"]["model"]["w2v_args"]["model"]["conv_feature_layers"] = "${common.wandb_project}"
    torch.save(state, room / "model.pt")
    assert outcome(tried(room / "model.pt", good[1], room)) == {(0, "")}
    assert OmegaConf.create(state["cfg"]).model.w2v_args.model.conv_feature_layers.startswith(CODE)  # the control


def test_settings_twice(good: tuple[Path, Path], room: Path) -> None:
    """fairseq prefers `args`, which holds a harmful setting, to `cfg`, which does not."""
    state = read(good[0])
    flat: Namespace = _namespace(state["cfg"])
    flat.w2v_args.conv_feature_layers = f"{CODE} or []"
    torch.save(state | {"args": flat}, room / "model.pt")
    assert outcome(tried(room / "model.pt", good[1], room)) == {(0, "")}
    assert CODE in read(room / "model.pt")["args"].w2v_args.conv_feature_layers  # the control


def test_a_secret_by_interpolation(good: tuple[Path, Path], room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    state = read(good[0])
    for section in (state["cfg"]["model"], state["cfg"]["model"]["w2v_args"]["model"]):
        section |= {"seed": "${oc.env:AWS_SECRET_ACCESS_KEY}", "tpu": "${oc.env:AWS_SECRET_ACCESS_KEY}"}
    path = room / "model.pt"
    torch.save(state, path)
    assert OmegaConf.create(state["cfg"]).model.seed == "wJalrXUtnFEMI"  # the control
    out = convert(path, room / "out").path
    done = verify(path, out, devices=["cpu"])
    record(path, room / "recording")
    assert done.passed
    assert [file.name for file in room.rglob("*") if file.is_file() and b"wJalrXUtnFEMI" in file.read_bytes()] == []


# --- containers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(5))
def test_side_pickles_of_the_legacy_layout(part: int, tmp_path: Path, good: tuple[Path, Path], room: Path) -> None:
    """torch unpickles magic number, version, system, model and storage keys one after the other."""
    path = save("ctc_base", room / "model.pt", container="legacy")
    pieces = pickles(path.read_bytes())
    pieces[part] = before(GADGET)(pieces[part])
    path.write_bytes(b"".join(pieces))
    assert {status for status, _ in tried(path, good[1], room).values()} <= {0, 2}
    read(path)  # the control
    assert ran(room)


def directory(names: list[str], data: dict[str, bytes]) -> tuple[bytes, bytes]:
    """The entries of a zip file, and its directory."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data[name])
        start = archive.start_dir
    whole = stream.getvalue()
    return whole[:start], whole[start:-22]


def test_two_directories_of_a_zip(good: tuple[Path, Path], room: Path) -> None:
    """Where the end record says that the directory is, one stands; right before it, another."""
    harmless = entries(good[0])
    harmful = harmless | {"data.pkl": before(GADGET)(harmless["data.pkl"])}
    harmless["data.pkl"] += bytes(len(harmful["data.pkl"]) - len(harmless["data.pkl"]))
    (one, listed), (other, found) = directory(list(harmful), harmful), directory(list(harmless), harmless)
    assert len(one) == len(other) and len(listed) == len(found)
    count = len(harmless).to_bytes(2, "little")
    end = b"PK\x05\x06" + bytes(4) + count + count + len(found).to_bytes(4, "little") + len(one).to_bytes(4, "little")
    path = room / "model.pt"
    path.write_bytes(one + listed + other + found + end + bytes(2))
    tried(path, good[1], room)
    read(path)  # the control
    assert ran(room)


@pytest.mark.parametrize("name", ["DATA.PKL", "data.pkl\0cut"])
def test_two_names_for_one_entry(name: str, good: tuple[Path, Path], room: Path) -> None:
    """torch's reader of zip files ignores case; names end at a NUL for some."""
    content = entries(good[0])
    harmful = before(GADGET)(content["data.pkl"])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for entry, data in [*content.items(), (name.replace("\0", "_"), harmful)]:
            archive.writestr(f"archive/{entry}", data)
    path = room / "model.pt"
    path.write_bytes(stream.getvalue().replace(b"data.pkl_cut", b"data.pkl\0cut"))
    results = tried(path, good[1], room)
    assert name == "DATA.PKL" or outcome(results) <= {(2, "hostile-zip"), (2, "corrupted-zip")}, results
    if name == "DATA.PKL":
        read(path)  # the control
        assert ran(room)


def test_a_name_in_an_extra_field(good: tuple[Path, Path], room: Path) -> None:
    """Python from 3.12 on takes an entry's name from the field 0x7075, earlier ones and torch from its place."""
    content = entries(good[0])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for entry, data in content.items():
            archive.writestr(f"archive/{entry}", data)
        info = zipfile.ZipInfo("archive/other.pkl")
        name = b"archive/data.pkl"
        field = b"\x01" + zlib.crc32(b"archive/other.pkl").to_bytes(4, "little") + name
        info.extra = b"up" + len(field).to_bytes(2, "little") + field
        archive.writestr(info, before(GADGET)(content["data.pkl"]))
    (room / "model.pt").write_bytes(stream.getvalue())
    results = tried(room / "model.pt", good[1], room)
    assert outcome(results) <= {(2, "hostile-zip"), (2, "corrupted-zip")}, results


def test_two_readings_of_a_string(good: tuple[Path, Path], room: Path) -> None:
    r"""`'\557s'` is `ůs` to a decoder of unicode, and `os` to Python's unpickler, which keeps the lowest eight bits."""
    gadget = b"S'\\557s'\n" + text("system") + b"\x93" + text("touch canary") + b"\x85R"
    path = room / "model.pt"
    path.write_bytes(good[0].read_bytes())
    change_pickle(path, before(gadget))
    tried(path, good[1], room)
    read(path)  # the control
    assert ran(room)


def test_a_tar_archive_that_is_a_legacy_file(good: tuple[Path, Path], room: Path) -> None:
    """The name of the archive's first member is the head of a legacy file, in which the rest of the archive is one text."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in (("x" * 99, b""), ("storages", b"\x80\x02" + GADGET + b".")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    content = bytearray(stream.getvalue())
    magic, _, _, model, *rest = pickles(save("ctc_base", room / "legacy.pt", container="legacy").read_bytes())
    start = magic + b"\x80\x02M\xe9\x03." + b"\x80\x02}." + model[:2] + b"T"
    head = start + (len(content) - len(start) - 4).to_bytes(4, "little")
    assert len(head) < 100
    content[: len(head)] = head
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path = room / "model.pt"
    path.write_bytes(bytes(content) + b"0" + model[2:] + b"".join(rest))
    results = tried(path, good[1], room)
    assert results["plan"][0] == 0, results
    with pytest.raises(Exception):  # noqa: B017 - the control: torch runs it, and then finds no number of storages
        read(path)
    assert ran(room)


# --- time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["replaced", "written to"])
@pytest.mark.parametrize("command", ["verify", "record"])
def test_a_file_that_changes_meanwhile(
    command: str, how: str, good: tuple[Path, Path], room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, copy = Path(shutil.copy(good[0], room / "model.pt")), Path(shutil.copytree(good[1], room / "model"))
    evil = change_pickle(Path(shutil.copy(good[0], room / "evil.pt")), before(GADGET))
    opened = opening.open_reference

    def late(request: Any) -> Any:
        if how == "replaced":
            evil.replace(path)
        else:
            with path.open("r+b") as file:
                file.write(file.read(1) and b"P")
        return opened(request)

    monkeypatch.setattr(opening, "open_reference", late)
    monkeypatch.setattr("convert.verification.fairseq_side.recording.open_reference", late)
    with pytest.raises(ConvertError) as error:
        verify(path, copy, devices=["cpu"]) if command == "verify" else record(path, room / "recording")
    assert (error.value.code, error.value.status) == ("changed", 2)
    assert not (room / "canary").exists() and not (room / "recording").exists()
    assert not (copy / "verification.json").exists()
