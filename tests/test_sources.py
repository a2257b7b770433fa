"""A checkpoint by its name in the catalogue, by its address, on the Hub, and all those of a folder."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib import request

import download_server
import fairseq_models
import hub_fixtures
import pytest
from command_line import Ran
from download_server import Server
from hub_server import Hub
from hub_store import Blob

import convert
from convert import fetching, sources
from convert.errors import ConvertError
from convert.network import _Redirects
from convert.sources import locate, open_source

LETTERS = "".join(f"{symbol} 1\n" for symbol in fairseq_models.LETTERS).encode()


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A fine-tuned checkpoint of 2020, which carries no dictionary."""
    path = tmp_path_factory.mktemp("old") / "old.pt"
    return fairseq_models.save("ctc_base", path, layout="namespace").read_bytes()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Downloads go below the working directory, and nothing is remembered from test to test."""
    monkeypatch.chdir(tmp_path)
    sources._fetched.cache_clear()
    yield
    sources._fetched.cache_clear()


def source_of(model: Path) -> dict[str, object]:
    record: dict[str, object] = json.loads((model / "conversion.json").read_text())["source"]
    return record


def test_a_name_of_the_catalogue(server: Server, old: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_server, "DICTIONARY", LETTERS)
    monkeypatch.setattr(fetching, "catalogue", lambda: {"tiny": download_server.entry(server, dictionary="/dict.txt")})
    server.content = old
    done = convert.convert("tiny", "model")
    assert done.model.dictionary is not None and done.model.dictionary.symbols[4:] == tuple(fairseq_models.LETTERS)
    source = source_of(Path("model"))
    digest = hashlib.sha256(old).hexdigest()
    assert (source["name"], source["sha256"], source["catalogue"]) == ("tiny.pt", digest, "tiny")
    assert source["address"] == f"http://127.0.0.1:{server.server_port}/model.pt"
    assert convert.compare_weights("tiny", "model") == []
    assert convert.convert("checkpoints/tiny.pt", "by-path", dictionary="checkpoints/tiny.dict.txt")
    assert source.keys() - source_of(Path("by-path")).keys() == {"address", "catalogue"}


def test_a_file_of_that_name_goes_before_the_catalogue(old: bytes) -> None:
    Path("wav2vec2-base").write_bytes(old)
    assert locate("wav2vec2-base") == (Path("wav2vec2-base"), None)


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(
        ConvertError, match=r"^no file and no released checkpoint is called 'wav2vec2-bass-960h'"
    ) as raised:
        convert.plan("wav2vec2-bass-960h")
    assert "did you mean wav2vec2-base-960h" in raised.value.hint


def test_an_address(server: Server, old: bytes) -> None:
    server.content = old
    address = f"http://127.0.0.1:{server.server_port}/model.pt?signature=secret"
    Path("dict.txt").write_bytes(LETTERS)
    convert.convert(address, "model", dictionary="dict.txt")
    source = source_of(Path("model"))
    name = f"model-{hashlib.sha256(b'signature=secret').hexdigest()[:8]}.pt"
    assert source["address"] == f"http://127.0.0.1:{server.server_port}/model.pt"
    assert source["name"] == name and "catalogue" not in source
    assert sorted(path.name for path in Path("checkpoints").iterdir()) == [name, f"{name}.json"]
    assert "secret" not in Path(f"checkpoints/{name}.json").read_text()


def test_a_query_names_a_file_of_its_own(server: Server, old: bytes) -> None:
    address = f"http://127.0.0.1:{server.server_port}/model.pt"
    found = []
    for number in (1, 2):
        server.content = old + bytes(number)
        found.append(locate(f"{address}?id={number}")[0].read_bytes())
    assert found == [old + bytes(1), old + bytes(2)]


def test_no_redirect_away_from_encryption() -> None:
    asked = request.Request("https://example.org/model.pt?token=secret")
    with pytest.raises(ConvertError) as raised:
        _Redirects().redirect_request(
            asked, SimpleNamespace(), 302, "Found", {}, "http://example.org/model.pt?token=secret"
        )
    assert raised.value.message == (
        "https://example.org/model.pt: the server redirects to http://example.org/model.pt, which is not encrypted; "
        "nothing was fetched"
    )
    assert (
        _Redirects().redirect_request(asked, SimpleNamespace(), 302, "Found", {}, "https://example.org/other.pt")
        is not None
    )


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("s3://bucket/model.pt", "unknown-address", "s3://bucket/model.pt: s3:// is not supported; nothing was fetched"),
        ("hf://lonely", "usage", "hf://lonely: does not name a file of a repository"),
        ("https://me:password@127.0.0.1:1/model.pt", "unknown-address",
         "https://127.0.0.1:1/model.pt: an address with a user and a password is not fetched: they would go to every redirect"),
    ],
)  # fmt: skip
def test_what_is_no_source(source: str, code: str, said: str) -> None:
    with pytest.raises(ConvertError) as raised:
        locate(source)
    assert (raised.value.code, raised.value.message) == (code, said)


def published(hub: Hub, files: dict[str, bytes]) -> str:
    """Put files into a repository of the tests' Hub, large ones as it stores them; return its name."""
    hub.store.create("lab/checkpoints", True, "alice")
    blobs = {}
    for name, content in files.items():
        large = hashlib.sha256(content).hexdigest() if len(content) > 10_000 else None
        blobs[name] = Blob(None if large else content, large, len(content))
        if large:
            hub.store.objects[large] = content
    hub.store.repositories["lab/checkpoints"].commit("main", None, blobs, (), "files", "", "alice")
    return "lab/checkpoints"


def run(hub: Hub, home: Path, *words: str, token: str | None = hub_fixtures.TOKEN) -> Ran:
    environment = hub_fixtures.Publisher(hub, home).environment(token)
    command = [sys.executable, "-m", "convert", *words, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return Ran(done.returncode, done.stdout, done.stderr, json.loads(done.stdout))


def test_a_file_on_the_hub(hub: Hub, old: bytes, tmp_path: Path) -> None:
    name = published(hub, {"runs/old.pt": old, "runs/dict.ltr.txt": LETTERS, "dict.other.txt": b"a 1\n"})
    source = f"hf://{name}/runs/old.pt"
    done = run(hub, tmp_path / "home", "convert", source, "model")
    assert done.status == 0, done.data
    head = hub.store.repositories[name].refs["refs/heads/main"]
    recorded = source_of(tmp_path / "model")
    assert recorded["address"] == f"hf://{name}@{head}/runs/old.pt" and recorded["name"] == "old.pt"
    assert hub_fixtures.TOKEN not in (tmp_path / "model/conversion.json").read_text()
    assert not Path("checkpoints").exists()

    fetched = [one for one in hub.seen if "/storage/" in one.path]
    assert len(fetched) == 1 and not fetched[0].authorized  # the storage does not see the token
    again = run(hub, tmp_path / "home", "plan", f"hf://{name}@{head}/runs/old.pt")
    assert again.status == 0 and len([one for one in hub.seen if "/storage/" in one.path]) == 1


@pytest.mark.parametrize(
    ("token", "file", "code"),
    [(None, "old.pt", "not-found"), (hub_fixtures.TOKEN, "other.pt", "not-found")],
)
def test_what_the_hub_does_not_give(
    token: str | None,
    file: str,
    code: str,
    hub: Hub,
    old: bytes,
    tmp_path: Path,
) -> None:
    name = published(hub, {"old.pt": old})
    done = run(hub, tmp_path / "home", "plan", f"hf://{name}/{file}", token=token)
    assert done.status == 2 and done.data["problems"][0]["code"] in (code, "token")


def test_two_dictionaries_are_asked_for(hub: Hub, old: bytes, tmp_path: Path) -> None:
    name = published(hub, {"old.pt": old, "dict.ltr.txt": LETTERS, "dict.wrd.txt": LETTERS})
    done = run(hub, tmp_path / "home", "plan", f"hf://{name}/old.pt")
    assert done.status == 1 and {problem["code"] for problem in done.data["problems"]} == {"no-dictionary"}
    done = run(hub, tmp_path / "home", "plan", f"hf://{name}/old.pt", "--dict", f"hf://{name}/dict.ltr.txt")
    assert done.status == 0


def test_every_checkpoint_of_a_folder(command: Callable[..., Ran], tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    (folder / "inside").mkdir(parents=True)
    fairseq_models.save("ctc_base", folder / "a.pt")
    fairseq_models.save(fairseq_models.REFUSED["quantize_input"], folder / "b.pt")
    (folder / "c.pt").write_text("not one")
    (folder / "notes.txt").write_text("left alone")
    clean = lambda: subprocess.run(["rm", "-r", str(tmp_path / "models")], check=True)  # noqa: E731
    done = command("convert", folder, "models", "--all", again=clean)
    assert done.status == 1
    assert "a.pt: models/a: Wav2Vec2ForCTC" in done.text and "b.pt: refused" in done.text
    assert "1 of 3 converted" in done.text
    rows = {row["checkpoint"]: row for row in done.data["conversions"]}
    assert [row["converted"] for row in rows.values()] == [True, False, False]
    assert (rows["b.pt"]["code"], rows["c.pt"]["code"]) == ("refused", "foreign-file")
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"a"}


def test_a_folder_without_checkpoints(command: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = command("convert", "empty", "models", "--all")
    assert done.status == 2
    assert "empty holds no checkpoint; nothing was written" in done.error


def test_open_source_names_where_a_file_is_from(tmp_path: Path) -> None:
    path = fairseq_models.save("pretrained_base", tmp_path / "a.pt")
    with open_source(path) as opened:
        assert opened.origin is None
