"""`convert.files`: whatever happens at whatever step, what stands there is the old, the new, or nothing; never another's."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from steps import FAILED, at_every_step, in_child

from convert import files, workspace
from convert.errors import ConvertError
from convert.files import (
    new_directory,
    new_file,
    resumed_file,
    write_file,
)

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def ours(path: Path) -> set[str]:
    """What a run wrote into a directory: the old one two files, the new one others."""
    return {"a.json", "c.json"} if (path / "a.json").read_bytes() == b"new" else {"a.json", "b.json"}


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was to be written to the disk: none of these tests cuts the power, and waiting for disks takes minutes."""
    seen: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: seen.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
    )
    return seen


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what is made: each with what stands there before, and what after


def file_over(place: Path) -> None:
    write_file(place / "out", b"new" * 1000)


def file_anew(place: Path) -> None:
    write_file(place / "out", b"new" * 1000, overwrite=False)


def folder_over(place: Path) -> None:
    with new_directory(place / "out", ours) as made:
        for name in ("a.json", "c.json"):
            with files.create(made / name) as file:
                file.write(b"new")


def folder_anew(place: Path) -> None:
    with new_directory(place / "out") as made, files.create(made / "a.json") as file:
        file.write(b"new")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def naive(place: Path) -> None:
    """The control: as one writes without thinking."""
    with (place / "out").open("wb") as file:
        file.write(b"new")
        file.flush()
        (place / "out").stat()
        with contextlib.suppress(FileNotFoundError):
            os.remove(place / "nothing")  # noqa: PTH107 - a step
        file.write(b"new" * 999)


def prepare(make: Callable[[Path], None], place: Path) -> None:
    for left in workspace.leftovers(place):
        workspace.shutil.rmtree(left)
    out = place / "out"
    if out.is_dir():
        workspace.shutil.rmtree(out)
    out.unlink(missing_ok=True)
    if make in (file_over, naive):
        out.write_bytes(b"old")
    if make is folder_over:
        out.mkdir()
        for name in ("a.json", "b.json"):
            (out / name).write_bytes(b"old")
        (out / "README.md").write_bytes(b"by hand")
        (out / "notes").mkdir()
        (out / "notes" / "deep.txt").write_bytes(b"by hand")


def state(place: Path) -> str:
    """Say what stands there: `old`, `new`, `nothing` or `torn`."""
    out = place / "out"
    if not os.path.lexists(out):
        return "nothing"
    if out.is_file():
        return {b"old": "old", b"new" * 1000: "new"}.get(out.read_bytes(), "torn")
    found = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    found.pop("README.md", None)
    whole: dict[str, list[dict[str, bytes]]] = {
        "old": [{"a.json": b"old", "b.json": b"old"}],
        "new": [{"a.json": b"new", "c.json": b"new"}, {"a.json": b"new"}],
    }
    return next((name for name, states in whole.items() if found in states), "torn")


def kept(place: Path) -> bool:
    """Whether what was put there by hand is there, whichever directory holds it."""
    deep = [path for path in place.rglob("deep.txt") if path.read_bytes() == b"by hand"]
    return (place / "out" / "README.md").read_bytes() == b"by hand" and len(deep) == 1


@contextlib.contextmanager
def without(monkeypatch: pytest.MonkeyPatch, *what: str, racing: Callable[[], object] | None = None) -> Iterator[None]:
    """Take away what not every file system has: `exchange`, `noreplace`, `links`; race against the first such rename."""
    rename_as, acts = workspace._rename_as, [racing] if racing else []

    def lacking(how: int, source: Path, target: Path) -> bool:
        while acts:
            acts.pop()()
        name = {workspace._NOREPLACE: "noreplace", workspace._EXCHANGE: "exchange"}[how]
        return name not in what and rename_as(how, source, target)

    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(workspace, "_rename_as", lacking)
        if "links" in what:
            patch.setattr(os, "link", no_links)
        yield


LACKING = [(), ("exchange",), ("noreplace",), ("exchange", "noreplace", "links")]
MAKERS = [file_over, file_anew, folder_over, folder_anew]
each_maker = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
each_lack = pytest.mark.parametrize(
    "lacking", LACKING, ids=lambda lacking: "without " + (" ".join(lacking) or "nothing")
)


@each_lack
@each_maker
def test_killed_at_every_step(
    make: Callable[[Path], None], lacking: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = "nothing" if make in (file_anew, folder_anew) else "old"
    found = []
    with without(monkeypatch, *lacking):
        for status in at_every_step(
            lambda: make(tmp_path),
            kill,
            tmp_path,
            lambda: prepare(make, tmp_path),
        ):
            assert status in (0, -signal.SIGKILL)
            found.append(state(tmp_path))
            if make is folder_over and found[-1] == "nothing":  # moved aside: the next run puts it back
                assert "exchange" in lacking
                files.check_directory(tmp_path / "out", ours)
                assert state(tmp_path) == "old"
            assert make is not folder_over or kept(tmp_path)
            if found[-1] == "torn":  # only a file system with neither links nor such renames comes to this
                assert make is file_anew and "links" in lacking and (tmp_path / "out").read_bytes() == b""
                (tmp_path / "out").unlink()
            if found[-1] in (start, "torn") or make in (file_over, folder_over):
                make(tmp_path)
            else:  # it was there already: only the leftover is to go
                workspace.sweep(tmp_path)
            assert (state(tmp_path), names(tmp_path)) == ("new", ["out"])
            assert make is not folder_over or kept(tmp_path)
    assert len(found) > 5
    allowed = {start, "new"}
    if make is folder_over and "exchange" in lacking:
        allowed |= {"nothing"}
    if make is file_anew and "links" in lacking:  # an empty file keeps the name for an instant
        allowed |= {"torn"}
    assert set(found) == allowed
    assert (found[0], found[-1]) == (start, "new")


@each_maker
@pytest.mark.parametrize("number", SIGNALS)
def test_signalled_at_every_step(make: Callable[[Path], None], number: signal.Signals, tmp_path: Path) -> None:
    start = "nothing" if make in (file_anew, folder_anew) else "old"
    found = []
    for status in at_every_step(
        lambda: make(tmp_path), lambda: signal.raise_signal(number), tmp_path, lambda: prepare(make, tmp_path)
    ):
        assert status in (0, 128 + number)
        assert names(tmp_path) == (["out"] if state(tmp_path) != "nothing" else [])
        assert make is not folder_over or kept(tmp_path)
        found.append(state(tmp_path))
    assert set(found) == {start, "new"}
    assert len(found) > 5


@each_lack
@each_maker
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_error_at_every_step(
    make: Callable[[Path], None],
    number: int,
    lacking: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = "nothing" if make in (file_anew, folder_anew) else "old"

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    found = []
    with without(monkeypatch, *lacking):
        for status in at_every_step(lambda: make(tmp_path), fail, tmp_path, lambda: prepare(make, tmp_path)):
            assert status in (0, FAILED)
            found.append(state(tmp_path))
            if status == 0:
                assert found[-1] == "new"
            assert make is not folder_over or kept(tmp_path)
    assert set(found) <= {start, "new", *(("torn",) if "links" in lacking and make is file_anew else ())}
    assert {start, "new"} <= set(found)


def test_control_a_naive_writer_is_seen(tmp_path: Path) -> None:
    found = set()
    for _ in at_every_step(lambda: naive(tmp_path), kill, tmp_path, lambda: prepare(naive, tmp_path)):
        found.add(state(tmp_path))
    assert "torn" in found


def test_control_without_the_handler_a_signal_leaves_something(tmp_path: Path) -> None:
    def die() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)

    status, _ = in_child(lambda: file_anew(tmp_path), lambda number: die() if number == 6 else None, tmp_path)
    assert status == -signal.SIGTERM
    assert len(list(workspace.leftovers(tmp_path))) == 1


# ---- a full disk


@pytest.mark.parametrize("limit", [0, 10, 2999])
@pytest.mark.parametrize("make", [file_over, file_anew], ids=lambda make: make.__name__)
def test_full_disk(make: Callable[[Path], None], limit: int, tmp_path: Path) -> None:
    prepare(make, tmp_path)
    before = names(tmp_path)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            make(tmp_path)
        except OSError as error:
            assert error.filename == str(tmp_path / "out")
            assert error.errno == errno.EFBIG
            raise

    status, _ = in_child(limited, lambda number: None, tmp_path)
    assert (status, names(tmp_path)) == (FAILED, before)
    assert state(tmp_path) == ("old" if before else "nothing")
    resource_free, _ = in_child(lambda: make(tmp_path), lambda number: None, tmp_path)  # the control: without the limit
    assert (resource_free, state(tmp_path)) == (0, "new")


def test_an_error_names_the_place_and_others_keep_their_own(tmp_path: Path) -> None:
    with pytest.raises(PermissionError) as caught, new_file(tmp_path / "out") as made:
        raise PermissionError(errno.EACCES, "no", str(made))
    assert caught.value.filename == str(tmp_path / "out")
    with pytest.raises(PermissionError) as caught, new_file(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "no", "/elsewhere")
    assert caught.value.filename == "/elsewhere"
    assert names(tmp_path) == []


# ---- refusals


@pytest.mark.parametrize(
    ("overwrite", "make", "code", "message"),
    [
        (False, lambda path: path.write_bytes(b"mine"), "exists", "exists already; nothing was written"),
        (False, lambda path: path.symlink_to("nowhere"), "exists", "exists already; nothing was written"),
        (True, lambda path: path.mkdir(), "exists", "is a directory; nothing was written"),
        (True, lambda path: os.mkfifo(path), "exists", "is not a file that can be replaced; nothing was written"),
    ],
)
def test_file_in_the_way(
    overwrite: bool, make: Callable[[Path], None], code: str, message: str, tmp_path: Path
) -> None:
    make(tmp_path / "out")
    before = (tmp_path / "out").lstat()
    with pytest.raises(ConvertError) as caught:
        write_file(tmp_path / "out", b"new", overwrite=overwrite)
    assert (caught.value.code, caught.value.message) == (code, f"{tmp_path / 'out'} {message}")
    assert caught.value.hint
    assert (tmp_path / "out").lstat() == before
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("make", [file_anew, folder_anew], ids=lambda make: make.__name__)
def test_no_parent(make: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(ConvertError) as caught:
        make(tmp_path / "missing")
    assert (caught.value.code, caught.value.hint) == ("no-parent", "make it first")


# ---- links and names that are taken


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "out").symlink_to("victim")
    file_over(tmp_path)
    assert not (tmp_path / "out").is_symlink() and state(tmp_path) == "new"
    assert (tmp_path / "victim").read_bytes() == b"mine"


@each_maker
@pytest.mark.parametrize("kind", ["link", "link to a directory", "directory", "file"])
def test_temporary_name_is_taken(
    make: Callable[[Path], None], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names cannot be guessed; and if one could, nothing would be written through it, and nothing removed."""
    prepare(make, tmp_path)
    words = iter([*[b"\x00" * 8] * 3, b"\x11" * 8])
    monkeypatch.setattr(workspace.os, "urandom", lambda count: next(words))
    elsewhere = tmp_path.with_name(tmp_path.name + "-elsewhere")
    elsewhere.mkdir()
    (elsewhere / "mine").write_bytes(b"mine")
    taken = tmp_path / f".fairseq-to-hf.out.{'0' * 16}.part"
    if kind == "directory":
        taken.mkdir()
        (taken / "mine").write_bytes(b"mine")
    elif kind == "file":
        taken.write_bytes(b"mine")
    else:
        taken.symlink_to(elsewhere / "mine" if kind == "link" else elsewhere)
    make(tmp_path)
    assert state(tmp_path) == "new"
    assert names(elsewhere) == ["mine"] and (elsewhere / "mine").read_bytes() == b"mine"
    assert names(tmp_path) == [taken.name, "out"]
    assert kind != "directory" or (taken / "mine").read_bytes() == b"mine"


def test_names_differ_and_are_private(tmp_path: Path) -> None:
    seen = set()
    for _ in range(20):
        with new_file(tmp_path / "out", overwrite=True) as made:
            seen.add(made.parent.name)
            assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
            made.write_bytes(b"")
    assert len(seen) == 20


@pytest.mark.parametrize("name", ["n" * 255, "[a*?]", "line\nbreak", os.fsdecode(b"\xff\xfe"), "new", "old"])
def test_any_name(name: str, tmp_path: Path) -> None:
    write_file(tmp_path / name, b"one")
    write_file(tmp_path / name, b"two")
    assert (tmp_path / name).read_bytes() == b"two"
    assert names(tmp_path) == [name]
    status, _ = in_child(
        lambda: write_file(tmp_path / name, b"three"),
        lambda number: kill() if number == 8 else None,
        tmp_path,
    )
    assert status == -signal.SIGKILL and len(names(tmp_path)) == 2  # the control: something was left
    write_file(tmp_path / name, b"four")
    assert names(tmp_path) == [name]


# ---- leftovers


@each_maker
def test_what_looks_like_a_leftover_and_is_not_ours_stays(make: Callable[[Path], None], tmp_path: Path) -> None:
    prepare(make, tmp_path)
    own = [".out.x.part", f".out.{'0' * 16}.part", f".fairseq-to-hf.out.{'0' * 16}.part", ".fairseq-to-hf.out.x.part"]
    for name in own:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_bytes(b"mine")
    (tmp_path / f".fairseq-to-hf.out.{'2' * 16}.part").write_bytes(b"a file")
    make(tmp_path)
    assert state(tmp_path) == "new"
    assert names(tmp_path) == sorted([*own, f".fairseq-to-hf.out.{'2' * 16}.part", "out"])
    assert all((tmp_path / name / "mine").read_bytes() == b"mine" for name in own)


def test_what_somebody_put_into_a_leftover_stays(tmp_path: Path) -> None:
    left = tmp_path / f".fairseq-to-hf.out.{'0' * 16}.part"
    left.mkdir()
    (left / ".fairseq-to-hf").write_bytes(b"")
    (left / "mine").write_bytes(b"mine")
    file_anew(tmp_path)
    assert (left / "mine").read_bytes() == b"mine"
    (left / "mine").unlink()  # the control: without it, it goes
    file_over(tmp_path)
    assert names(tmp_path) == ["out"]


@each_maker
def test_a_living_process_keeps_its_own(make: Callable[[Path], None], tmp_path: Path) -> None:
    prepare(make, tmp_path)
    with workspace.workspace(tmp_path / "out") as work:
        make(tmp_path)
        assert work.is_dir()
    assert names(tmp_path) == ["out"]


def test_without_locks_nothing_is_taken_for_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, wait: bool) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workspace, "_flock", no_locks)
    with workspace.workspace(tmp_path / "out") as work:
        file_anew(tmp_path)
        assert work.is_dir()
    assert names(tmp_path) == ["out"]


# ---- what happens between the check and the rename


@each_lack
def test_a_file_that_appears_meanwhile_stays(
    lacking: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    appear = lambda: (tmp_path / "out").write_bytes(b"mine")  # noqa: E731
    with without(monkeypatch, *lacking, racing=appear), pytest.raises(ConvertError) as caught:
        file_anew(tmp_path)
    assert caught.value.message == f"{tmp_path / 'out'} appeared meanwhile; nothing was written"
    assert (tmp_path / "out").read_bytes() == b"mine"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("what", ["file", "directory", "link"])
def test_a_directory_gives_way_to_what_appears_meanwhile(what: str, tmp_path: Path) -> None:
    with pytest.raises(ConvertError) as caught, new_directory(tmp_path / "out"):
        if what == "file":
            (tmp_path / "out").write_bytes(b"mine")
        elif what == "link":
            (tmp_path / "out").symlink_to("nowhere")
        else:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine").write_bytes(b"mine")
    assert caught.value.code == "exists"
    assert names(tmp_path) == ["out"]
    assert what != "directory" or names(tmp_path / "out") == ["mine"]


@pytest.mark.parametrize("lacking", [(), ("exchange",), ("exchange", "noreplace", "links")])
@pytest.mark.parametrize("when", ["before the check", "after the check"])
def test_what_is_put_into_a_directory_meanwhile_stays(
    when: str, lacking: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(folder_over, tmp_path)

    def put() -> None:
        (tmp_path / "out" / "late.txt").write_bytes(b"late")
        (tmp_path / "out" / "late").mkdir()
        (tmp_path / "out" / "late" / "x").write_bytes(b"late")

    late = put if when == "after the check" else None
    with without(monkeypatch, *lacking, racing=late), new_directory(tmp_path / "out", ours) as made:
        (made / "a.json").write_bytes(b"new")
        if when == "before the check":
            put()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["README.md", "a.json", "late", "late.txt", "notes"]
    assert (tmp_path / "out" / "late" / "x").read_bytes() == b"late" and kept(tmp_path)


def test_what_is_put_under_the_name_of_a_new_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(folder_over, tmp_path)
    with pytest.raises(ConvertError) as caught, new_directory(tmp_path / "out", ours) as made:
        (made / "c.json").write_bytes(b"new")
        (tmp_path / "out" / "c.json").write_bytes(b"mine")
    assert caught.value.message == f"{tmp_path / 'out' / 'c.json'} was put there meanwhile; nothing was written"
    assert (tmp_path / "out" / "c.json").read_bytes() == b"mine" and names(tmp_path) == ["out"]

    (tmp_path / "out" / "c.json").unlink()
    late = lambda: (tmp_path / "out" / "c.json").write_bytes(b"mine")  # noqa: E731 - too late to be refused
    with without(monkeypatch, racing=late), pytest.raises(ConvertError) as caught:
        folder_over(tmp_path)
    assert caught.value.code == "kept" and "kept: c.json" in caught.value.message
    assert state(tmp_path) == "new" and kept(tmp_path)
    assert (Path(caught.value.problems[0].key) / "new" / "c.json").read_bytes() == b"mine"
    folder_over(tmp_path)  # nor does the next run remove it
    assert (Path(caught.value.problems[0].key) / "new" / "c.json").read_bytes() == b"mine"


@pytest.mark.parametrize("lacking", [(), ("exchange",)])
def test_another_directory_that_takes_its_place_meanwhile_stays(
    lacking: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(folder_over, tmp_path)

    def swap() -> None:
        (tmp_path / "out").rename(tmp_path / "first")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a.json").write_bytes(b"mine")

    with without(monkeypatch, *lacking, racing=swap), pytest.raises(ConvertError) as caught:
        folder_over(tmp_path)
    assert caught.value.message == f"{tmp_path / 'out'} was replaced meanwhile; nothing was written"
    assert (tmp_path / "out" / "a.json").read_bytes() == b"mine"
    assert names(tmp_path) == ["first", "out"]


def test_a_directory_that_may_not_be_replaced_any_more(tmp_path: Path) -> None:
    prepare(folder_over, tmp_path)
    answers: list[set[str]] = [{"a.json"}]

    def once(path: Path) -> set[str]:
        if not answers:
            raise ConvertError("no more", code="not-ours")
        return answers.pop()

    with pytest.raises(ConvertError, match="no more"), new_directory(tmp_path / "out", once) as made:
        (made / "a.json").write_bytes(b"new")
    assert state(tmp_path) == "old" and names(tmp_path) == ["out"]


def test_killed_between_two_renames_and_another_directory_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one, moved aside, is the only copy: it stays until its place is free."""
    prepare(folder_over, tmp_path)
    with without(monkeypatch, "exchange"):
        for status in at_every_step(
            lambda: folder_over(tmp_path), kill, tmp_path, lambda: prepare(folder_over, tmp_path)
        ):
            if state(tmp_path) == "nothing":
                assert status == -signal.SIGKILL
                break
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.json").write_bytes(b"mine")
    with pytest.raises(ConvertError, match="exists already"):
        folder_anew(tmp_path)
    (left,) = workspace.leftovers(tmp_path)
    assert (left / "old" / "b.json").read_bytes() == b"old"
    workspace.shutil.rmtree(tmp_path / "out")
    with pytest.raises(ConvertError, match="exists already"):
        folder_anew(tmp_path)
    assert state(tmp_path) == "old" and kept(tmp_path) and names(tmp_path) == ["out"]


# ---- permissions


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0, 0o666, 0o777)])
def test_permissions_are_the_umasks(mask: int, file: int, folder: int, tmp_path: Path) -> None:
    def make() -> None:
        os.umask(mask)
        write_file(tmp_path / "file", b"")
        with new_directory(tmp_path / "folder") as made, files.create(made / "inside"):
            pass
        with resumed_file(tmp_path / "resumed", "one") as resumed:
            resumed.write(b"x")

    assert in_child(make, lambda number: None, tmp_path)[0] == 0
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder/inside", "resumed")}
    assert set(modes.values()) == {file}
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == folder


# ---- in several runs


def piece(place: Path, version: str = "one") -> None:
    """Append one byte, of three; the third makes it whole."""
    with resumed_file(place / "out", version) as file:
        size = file.seek(0, os.SEEK_END)
        file.write(b"%d" % size)
        if size < 2:
            raise ConvertError("more to come", code="more")


def parts(place: Path) -> list[bytes]:
    return [path.read_bytes() for path, _ in files.resumable(place / "out")]


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    for expected in ([b"0"], [b"01"]):
        with pytest.raises(ConvertError, match="more to come"):
            piece(tmp_path)
        assert parts(tmp_path) == expected
    with pytest.raises(ConvertError, match="more to come"):
        piece(tmp_path, "two")
    assert sorted(parts(tmp_path)) == [b"0", b"01"]
    piece(tmp_path)
    assert (tmp_path / "out").read_bytes() == b"012"
    assert names(tmp_path) == ["out"]


def test_resumed_and_killed_at_every_step(tmp_path: Path) -> None:
    def two_runs() -> None:
        prepare(file_anew, tmp_path)
        for _ in range(2):
            with contextlib.suppress(ConvertError):
                piece(tmp_path)

    seen = set()
    for status in at_every_step(lambda: piece(tmp_path), kill, tmp_path, two_runs):
        assert status in (0, -signal.SIGKILL)
        done = (tmp_path / "out").exists()
        if not done:
            seen.add(parts(tmp_path)[0])
            with contextlib.suppress(ConvertError):
                piece(tmp_path)
        else:
            workspace.sweep(tmp_path, "out")
        assert (tmp_path / "out").read_bytes()[:3] == b"012"
        assert names(tmp_path) == ["out"]
    assert b"01" in seen


def test_nothing_is_kept_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConvertError), resumed_file(tmp_path / "out", "one"):
        raise ConvertError("no", code="no")
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "second name", "another user's"])
def test_what_could_be_planted_is_not_gone_on_with(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConvertError):
        piece(tmp_path)
    ((part, _),) = files.resumable(tmp_path / "out")
    victim = tmp_path / "victim"
    part.rename(victim)
    if kind == "link":
        part.symlink_to(victim)
    else:
        os.link(victim, part)
        if kind == "another user's":
            victim.unlink()
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConvertError, match="more to come"):
        piece(tmp_path)
    assert kind == "another user's" or victim.read_bytes() == b"0"
    assert sorted(parts(tmp_path)) == [b"0", b"0"]


def test_two_at_once(tmp_path: Path) -> None:
    with resumed_file(tmp_path / "out", "one") as file:
        file.write(b"x")
        with pytest.raises(ConvertError) as caught, resumed_file(tmp_path / "out", "one"):
            pass
    assert caught.value.code == "busy"
    assert (tmp_path / "out").read_bytes() == b"x"


# ---- threads


def test_threads_have_no_handlers(tmp_path: Path) -> None:
    thread = threading.Thread(target=lambda: file_anew(tmp_path))
    thread.start()
    thread.join()
    assert state(tmp_path) == "new"
