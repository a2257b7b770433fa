"""`fetch` against a real HTTP server that cuts, lies, changes its file, hangs and refuses; and the catalogue."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from http.client import HTTPResponse
from pathlib import Path

import pytest
from command_line import ROOT
from download_server import DICTIONARY, FIRST, HALF, MOVED, SECOND, Server, entry

from convert import files, network
from convert.errors import ConvertError, MismatchError
from convert.fetching import Entry, Fetched, Record, catalogue, fetch
from convert.files import resumable
from convert.workspace import held


def bring(
    server: Server, folder: Path, *, path: str = "/model.pt", dictionary: str | None = None, **options
) -> Fetched:
    options = {"timeout": 5.0, "attempts": 3, "pause": 0.0, **options}
    return fetch("tiny", folder, entries={"tiny": entry(server, path, dictionary)}, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupt(server: Server, folder: Path) -> Path:
    """Leave the first half of the file; return where it lies."""
    server.faults = ["cut"]
    with pytest.raises(ConvertError):
        bring(server, folder, attempts=1)
    assert len(names(folder)) == 1
    return kept(folder, FIRST[:HALF])


def kept(folder: Path, content: bytes = b"") -> Path:
    """Find what an interrupted download left."""
    ((part, size),) = resumable(folder / "tiny.pt")
    assert size == part.stat().st_size
    assert not content or part.read_bytes() == content
    return part


# ---- what a download leaves behind


def test_brings_the_checkpoint_its_dictionary_and_their_records(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    done = bring(server, folder, dictionary="/dict.txt")
    assert names(folder) == ["tiny.dict.txt", "tiny.dict.txt.json", "tiny.pt", "tiny.pt.json"]
    assert done.checkpoint.read_bytes() == FIRST
    assert done.dictionary is not None and done.dictionary.read_bytes() == DICTIONARY
    sha256 = hashlib.sha256(FIRST).hexdigest()
    assert done == Fetched(
        folder / "tiny.pt",
        folder / "tiny.dict.txt",
        Record("tiny", entry(server).address, len(FIRST), sha256, '"one"'),
        True,
    )
    assert json.loads((folder / "tiny.pt.json").read_text()) == {"schema": 1, **dataclasses.asdict(done.record)}
    assert server.gets == [(None, None)]


def test_second_fetch_asks_nothing_and_still_reads_the_bytes(server: Server, tmp_path: Path) -> None:
    first = bring(server, tmp_path, dictionary="/dict.txt")
    asked = len(server.log)
    assert bring(server, tmp_path, dictionary="/dict.txt") == dataclasses.replace(first, downloaded=False)
    assert len(server.log) == asked

    first.checkpoint.write_bytes(b"x" + FIRST[1:])  # the control: same size, one byte
    with pytest.raises(MismatchError, match=r"tiny\.pt: recorded http.*sha256 .*; nothing was changed") as caught:
        bring(server, tmp_path)
    assert (caught.value.code, caught.value.status) == ("sha256", 1)
    assert hashlib.sha256(FIRST).hexdigest() in str(caught.value)
    assert hashlib.sha256(b"x" + FIRST[1:]).hexdigest() in str(caught.value)
    assert first.checkpoint.read_bytes() == b"x" + FIRST[1:]


def test_missing_dictionary_is_brought_without_the_checkpoint(server: Server, tmp_path: Path) -> None:
    bring(server, tmp_path)
    assert bring(server, tmp_path, dictionary="/dict.txt").downloaded
    assert len(server.gets) == 1


def test_follows_a_redirect_and_resumes_behind_it(server: Server, tmp_path: Path) -> None:
    interrupt(server, tmp_path)
    assert bring(server, tmp_path, path="/moved.pt").checkpoint.read_bytes() == FIRST
    # only the last: urllib before Python 3.13 follows a redirected HEAD with a GET
    assert server.gets[-1] == (f"bytes={HALF}-", '"one"')


def test_the_page_of_a_redirect_is_not_read(server: Server, tmp_path: Path) -> None:
    assert bring(server, tmp_path, path="/paged.pt").checkpoint.read_bytes() == FIRST
    assert server.ticks < 100_000_000


# ---- interruptions


def test_resumes_after_a_cut(server: Server, tmp_path: Path) -> None:
    server.faults = ["cut"]
    assert bring(server, tmp_path).checkpoint.read_bytes() == FIRST
    assert server.gets == [(None, None), (f"bytes={HALF}-", '"one"')]
    assert names(tmp_path) == ["tiny.pt", "tiny.pt.json"]


def test_resumes_in_a_later_run(server: Server, tmp_path: Path) -> None:
    server.faults = ["cut", "empty"]
    with pytest.raises(ConvertError) as caught:
        bring(server, tmp_path, attempts=2)
    part = kept(tmp_path)
    address = entry(server).address
    assert str(caught.value) == (
        f"{address}: the connection ended at {HALF} of {len(FIRST)} bytes, 2 attempts; {HALF} bytes are kept in {part}"
    )
    assert (caught.value.code, caught.value.status) == ("network", 2)
    assert bring(server, tmp_path).checkpoint.read_bytes() == FIRST
    assert server.gets[-1] == (f"bytes={HALF}-", '"one"')


def test_never_splices_a_changed_file(server: Server, tmp_path: Path) -> None:
    interrupt(server, tmp_path)
    server.change()
    assert bring(server, tmp_path).checkpoint.read_bytes() == SECOND
    assert server.gets == [(None, None), (None, None)]
    assert names(tmp_path) == ["tiny.pt", "tiny.pt.json"]


def test_control_same_etag_would_splice(server: Server, tmp_path: Path) -> None:
    interrupt(server, tmp_path)
    server.change(etag='"one"')  # a server that lies: the ETag is all that guards the test above
    assert bring(server, tmp_path).checkpoint.read_bytes() == FIRST[:HALF] + SECOND[HALF:]


@pytest.mark.parametrize("fault", ["change", "change-and-ignore-if-range"])
def test_never_splices_a_file_that_changes_between_head_and_get(server: Server, tmp_path: Path, fault: str) -> None:
    interrupt(server, tmp_path)
    server.faults = [fault]
    assert bring(server, tmp_path).checkpoint.read_bytes() == SECOND
    assert server.gets[1:] == [(f"bytes={HALF}-", '"one"'), (None, None)]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong-range", "the server's file changed during the download"),
        ("no-etag", "the server's file changed during the download"),
        ("short-length", "the server's file changed during the download"),
        ("503", "the server answered 503 Service Unavailable"),
        ("empty", f"the connection ended at {HALF} of {len(FIRST)} bytes"),
    ],
)
def test_a_bad_answer_costs_an_attempt_and_no_bytes(server: Server, tmp_path: Path, fault: str, reason: str) -> None:
    part = interrupt(server, tmp_path)
    server.faults = [fault] * 2
    if fault == "short-length":  # of a whole answer: a rest that is too short is a cut
        shutil.rmtree(part.parent)
    with pytest.raises(ConvertError, match=re.escape(reason)):
        bring(server, tmp_path, attempts=2)
    assert names(tmp_path) == ([part.parent.name] if part.exists() else [])
    assert fault == "short-length" or part.read_bytes() == FIRST[:HALF]
    assert len(server.gets) == 3
    assert bring(server, tmp_path).checkpoint.read_bytes() == FIRST  # the control: without the fault


def test_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    interrupt(server, tmp_path)
    server.faults = ["no-ranges"]
    assert bring(server, tmp_path).checkpoint.read_bytes() == FIRST
    assert server.gets[-1] == (f"bytes={HALF}-", '"one"')


def test_weak_etag_starts_again(server: Server, tmp_path: Path) -> None:
    server.etag, server.faults = 'W/"one"', ["cut"]
    assert bring(server, tmp_path).checkpoint.read_bytes() == FIRST
    assert server.gets == [(None, None), (None, None)]


def test_a_part_that_is_too_long_starts_again(server: Server, tmp_path: Path) -> None:
    interrupt(server, tmp_path).write_bytes(b"x" * (len(FIRST) + 1))
    assert bring(server, tmp_path).checkpoint.read_bytes() == FIRST


@pytest.mark.parametrize(("faults", "heads"), [("stall", ""), ("hang", ""), ("", "hang")])
def test_silence_ends_in_a_timeout(server: Server, tmp_path: Path, faults: str, heads: str) -> None:
    server.faults, server.heads = [faults] * 2, [heads] * 2
    with pytest.raises(ConvertError, match=r"timed out, 2 attempts"):
        bring(server, tmp_path, timeout=0.3, attempts=2)
    assert not (tmp_path / "tiny.pt").exists()


@pytest.mark.parametrize("seconds", [1, 0.0001])
def test_a_trickle_is_given_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """The clock runs as the server sends: a second for each byte is too slow, 10,000 bytes a second is not."""
    monkeypatch.setattr(network, "clock", lambda: server.ticks * seconds)
    server.faults, server.content = ["trickle"], FIRST[:3000]
    if seconds < 1:
        assert bring(server, tmp_path, attempts=1, timeout=0.2).checkpoint.read_bytes() == FIRST[:3000]
        return
    with pytest.raises(ConvertError, match=r"fewer than 1000 bytes a second, 1 attempts; \d+ bytes are kept"):
        bring(server, tmp_path, attempts=1, timeout=30.0)
    assert server.ticks < 100


def test_a_slow_reader_is_not_the_server_s_fault(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What passes between two reads, such as a suspended machine, does not count."""
    now = [0.0]
    monkeypatch.setattr(network, "clock", lambda: now[0])
    read1 = HTTPResponse.read1

    def slow(self: HTTPResponse, count: int) -> bytes:
        now[0] += 1e6
        return read1(self, min(count, 1000))

    monkeypatch.setattr(HTTPResponse, "read1", slow)
    assert bring(server, tmp_path, attempts=1).checkpoint.read_bytes() == FIRST


def test_no_more_than_the_declared_size(server: Server, tmp_path: Path) -> None:
    server.faults = ["chunked"] * 2
    with pytest.raises(ConvertError, match=f"sent more than the {len(FIRST)} bytes that it declared, 2 attempts"):
        bring(server, tmp_path, attempts=2)
    assert names(tmp_path) == []
    assert bring(server, tmp_path).checkpoint.read_bytes() == FIRST


@pytest.mark.parametrize("path", MOVED)
def test_redirects_to_nonsense(server: Server, tmp_path: Path, path: str) -> None:
    with pytest.raises(ConvertError) as caught:
        bring(server, tmp_path, path=path, attempts=1)
    assert caught.value.code in ("network", "http") and caught.value.status == 2
    assert "secret" not in str(caught.value) and names(tmp_path) == []


def test_a_password_in_the_address_is_shown_nowhere(tmp_path: Path) -> None:
    item = Entry("tiny", "", "http://me:secret@127.0.0.1:x/", None, "", None, None, None, (), None, "")
    with pytest.raises(ConvertError) as caught:
        fetch("tiny", tmp_path, entries={"tiny": item}, attempts=1)
    assert str(caught.value) == "http://127.0.0.1:x/: not an address that can be fetched"


@pytest.mark.parametrize("etag", ['"a\tb"', '"\xe9"'])
def test_an_odd_etag_is_no_validator(server: Server, tmp_path: Path, etag: str) -> None:
    server.etag, server.faults = etag, ["cut"]
    assert bring(server, tmp_path).checkpoint.read_bytes() == FIRST
    assert server.gets == [(None, None), (None, None)]


def test_waits_longer_before_every_attempt(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    server.heads = ["503"] * 4
    with pytest.raises(ConvertError, match=r"503 Service Unavailable, 4 attempts; nothing was written$"):
        bring(server, tmp_path, attempts=4, pause=1.0)
    assert waited == [0, 1, 2, 4]
    assert names(tmp_path) == []


def test_nobody_listens(tmp_path: Path) -> None:
    closed = Server()
    closed.server_close()
    with pytest.raises(ConvertError, match="refused, 3 attempts; nothing was written"):
        bring(closed, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_leaves_only_the_part_and_resumes(server: Server, tmp_path: Path, number: signal.Signals) -> None:
    server.faults = ["stall"]
    script = (
        "import sys; from convert.fetching import Entry, fetch\n"
        "entry = Entry('tiny', '', sys.argv[1], None, '', None, None, None, (), None, '')\n"
        "fetch('tiny', sys.argv[2], entries={'tiny': entry})"
    )
    arguments = [sys.executable, "-c", script, entry(server).address, str(tmp_path)]
    with subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 600  # ends a test that would hang
        while [size for _, size in resumable(tmp_path / "tiny.pt")] != [HALF]:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        process.wait(600)
    kept(tmp_path, FIRST[:HALF])
    assert bring(server, tmp_path).checkpoint.read_bytes() == FIRST
    assert server.gets[-1] == (f"bytes={HALF}-", '"one"')


@pytest.mark.parametrize("last", ["tiny.pt.json", "tiny.pt"])
def test_killed_before_either_rename(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    place = files._place

    def killed(made: Path, target: Path, overwrite: bool) -> None:
        if target.name == last:
            raise KeyboardInterrupt
        place(made, target, overwrite)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_place", killed)
        with pytest.raises(KeyboardInterrupt):
            bring(server, tmp_path)
    assert not (tmp_path / "tiny.pt").exists()
    assert bring(server, tmp_path).checkpoint.read_bytes() == FIRST
    assert len(server.gets) == 1
    assert names(tmp_path) == ["tiny.pt", "tiny.pt.json"]


def test_two_at_once(server: Server, tmp_path: Path) -> None:
    part = interrupt(server, tmp_path)
    with held(part.parent) as taken:
        assert taken
        with pytest.raises(ConvertError, match="another process is writing it") as caught:
            bring(server, tmp_path)
    assert caught.value.code == "busy"
    assert part.read_bytes() == FIRST[:HALF]
    assert bring(server, tmp_path).checkpoint.read_bytes() == FIRST  # the control: the other one has ended


# ---- refusals


def test_not_found_is_final(server: Server, tmp_path: Path) -> None:
    with pytest.raises(
        ConvertError, match=r"/gone\.pt: the server answered 404 Not Found; nothing was written$"
    ) as caught:
        bring(server, tmp_path, path="/gone.pt")
    assert (caught.value.code, caught.value.status) == ("http", 2)
    assert (len(server.log), names(tmp_path)) == (1, [])


def test_dead_dictionary_shows_before_the_checkpoint_is_transferred(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"/gone\.txt: the server answered 404"):
        bring(server, tmp_path, dictionary="/gone.txt")
    assert (server.gets, names(tmp_path)) == ([], [])


@pytest.mark.parametrize("fault", ["no-length", "long-number", "signed", "superscript", "zero"])
def test_unknown_size(server: Server, tmp_path: Path, fault: str) -> None:
    server.heads = [fault]
    with pytest.raises(ConvertError, match="the server does not say how large it is"):
        bring(server, tmp_path)
    assert names(tmp_path) == []


def test_record_outlives_its_file(server: Server, tmp_path: Path) -> None:
    bring(server, tmp_path).checkpoint.unlink()
    server.change()
    with pytest.raises(MismatchError, match=r"recorded .*; found .*; nothing was changed") as caught:
        bring(server, tmp_path)
    assert caught.value.hint == "to accept the new bytes, delete tiny.pt.json and fetch again"
    assert not (tmp_path / "tiny.pt").exists()
    asked = len(server.gets)
    (tmp_path / "tiny.pt.json").unlink()  # the remedy of the hint; the new bytes are there already
    assert bring(server, tmp_path).checkpoint.read_bytes() == SECOND
    assert len(server.gets) == asked


def test_catalogue_with_another_address_does_not_pass_for_the_same_file(server: Server, tmp_path: Path) -> None:
    bring(server, tmp_path)
    with pytest.raises(MismatchError, match=r"recorded \S+/model\.pt, .*; found \S+/moved\.pt, "):
        bring(server, tmp_path, path="/moved.pt")


def test_file_without_a_record_is_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "tiny.pt").write_bytes(b"mine")
    with pytest.raises(ConvertError, match=r"tiny\.pt: is in the way and has no record tiny\.pt\.json; left as it is"):
        bring(server, tmp_path)
    assert (tmp_path / "tiny.pt").read_bytes() == b"mine"
    assert server.log == []


RECORD = {"name": "tiny", "address": "x", "size": 1, "sha256": "x", "etag": None}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"name": "tiny"}', "\x00", "[" * 100_000, "1" * 5000]
    + [json.dumps(RECORD | {name: [{}]}) for name in RECORD],
)
def test_broken_record(server: Server, tmp_path: Path, text: str) -> None:
    bring(server, tmp_path)
    (tmp_path / "tiny.pt.json").write_text(text)
    with pytest.raises(ConvertError, match=r"tiny\.pt\.json: is not the record of a fetched file") as caught:
        bring(server, tmp_path)
    assert (caught.value.code, caught.value.status) == ("record", 2)


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(
        ConvertError, match=r"^no released checkpoint is called 'wav2vec2-large-lv60-self-10m'$"
    ) as caught:
        fetch("wav2vec2-large-lv60-self-10m", tmp_path / "never")
    assert (caught.value.code, caught.value.status) == ("unknown-name", 2)
    assert caught.value.hint == (
        "did you mean wav2vec2-large-lv60-10m, wav2vec2-large-lv60-10m-self, wav2vec2-large-lv60-100h? "
        "all names: fairseq-to-hf fetch --list"
    )
    with pytest.raises(ConvertError) as caught:
        fetch("../../etc/passwd", tmp_path / "never")
    assert caught.value.hint == "all names: fairseq-to-hf fetch --list"
    assert names(tmp_path) == []


# ---- the bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "shown"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_bar_only_on_a_terminal(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: type, progress: bool, shown: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", text := stream())
    server.faults = ["cut"]
    bring(server, tmp_path, progress=progress)
    assert len(re.findall(r"(?<!hash )tiny\.pt [^%]*100%", text.getvalue())) == shown
    assert len(re.findall(r"hash tiny\.pt [^%]*100%", text.getvalue())) == shown
    assert bool(text.getvalue()) == shown


# ---- the catalogue


def complaints(entries: list[Entry]) -> list[str]:
    """What is wrong with a catalogue, an entry's name first."""
    hub = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
    counterparts = {item.counterpart for item in entries}
    rules = {
        "name": lambda item: re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", item.name),
        "title": lambda item: item.title and item.description,
        "address": lambda item: re.fullmatch(r"https://dl\.fbaipublicfiles\.com/[\w./-]+", item.address),
        "dictionary": lambda item: re.fullmatch(
            r"https://dl\.fbaipublicfiles\.com/[\w./-]+\.txt", item.dictionary or "https://dl.fbaipublicfiles.com/x.txt"
        ),
        # a letter model of the 2020 releases does not carry its dictionary
        "needs a dictionary": lambda item: (
            item.dictionary or "CTC" not in item.description or "lists no dict" in item.description
        ),
        "license": lambda item: item.license == ("CC-BY-NC-4.0" if item.name.startswith("mms-") else "MIT"),
        "counterpart": lambda item: item.counterpart is None or hub.fullmatch(item.counterpart),
        "language": lambda item: (
            item.language is None or all(re.fullmatch("[a-z]{2,3}", code) for code in item.language)
        ),
        "datasets": lambda item: all(hub.fullmatch(name) for name in item.datasets),
        "base_model": lambda item: item.base_model is None or item.base_model in counterparts,
        "fine-tuned from nothing": lambda item: item.base_model or "fine-tuned" not in item.description,
        "citation": lambda item: re.fullmatch(r"\d{4}\.\d{5}", item.citation),
    }
    found = [f"{item.name}: {rule}" for item in entries for rule, holds in rules.items() if not holds(item)]
    for field in ("name", "title", "address", "description"):
        values = [getattr(item, field) for item in entries]
        found += [f"{value}: twice" for value in sorted({value for value in values if values.count(value) > 1})]
    named = [item.counterpart for item in entries if item.counterpart]
    return found + [f"{name}: twice" for name in sorted({name for name in named if named.count(name) > 1})]


def test_catalogue_is_well_formed() -> None:
    assert complaints(list(catalogue().values())) == []
    assert [name for name, item in catalogue().items() if item.name != name] == []
    assert len(catalogue()) == 58
    with pytest.raises(TypeError):
        catalogue()["new"] = None  # type: ignore[index]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "Wav2Vec"}, "name"),
        ({"description": ""}, "title"),
        ({"address": "http://dl.fbaipublicfiles.com/a.pt"}, "address"),
        ({"address": "s3://dl.fbaipublicfiles.com/a.pt"}, "address"),
        ({"dictionary": "dict.ltr.txt"}, "dictionary"),
        ({"dictionary": None}, "needs a dictionary"),
        ({"license": None}, "license"),
        ({"license": "Apache-2.0"}, "license"),
        ({"counterpart": "wav2vec2"}, "counterpart"),
        ({"language": ("english",)}, "language"),
        ({"datasets": ("librispeech",)}, "datasets"),
        ({"base_model": "facebook/unknown"}, "base_model"),
        ({"base_model": None}, "fine-tuned from nothing"),
        ({"citation": "1"}, "citation"),
    ],
)
def test_control_a_wrong_entry_is_found(changes: dict[str, object], complaint: str) -> None:
    name = "wav2vec2-large-lv60-10m-self"
    changed = [dataclasses.replace(item, **changes) if item.name == name else item for item in catalogue().values()]
    assert f"{changes.get('name', name)}: {complaint}" in complaints(changed)


def test_control_an_entry_that_stands_twice_is_found() -> None:
    entries = list(catalogue().values())
    again = complaints([*entries, entries[0]])
    assert [line for line in again if line.endswith(": twice")] == [
        f"{value}: twice"
        for value in (
            entries[0].name,
            entries[0].title,
            entries[0].address,
            entries[0].description,
            entries[0].counterpart,
        )
    ]


def test_first_model_of_the_project() -> None:
    item = catalogue()["wav2vec2-large-lv60-10m-self"]
    assert item.address == "https://dl.fbaipublicfiles.com/fairseq/wav2vec/wav2vec_vox_10m_pl.pt"
    assert item.dictionary == "https://dl.fbaipublicfiles.com/fairseq/wav2vec/dict.ltr.txt"
    assert (item.counterpart, item.base_model) == (
        "Splend1dchan/wav2vec2-large-10min-lv60-self",
        "facebook/wav2vec2-large-lv60",
    )
