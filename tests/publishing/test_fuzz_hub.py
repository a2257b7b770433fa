"""A Hub that answers nonsense, or so slowly that it might as well not: one error each, and nothing sent twice."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT
from hub_fixtures import TOKEN
from hub_server import Hub

from convert import network
from convert.errors import ConvertError
from convert.publishing.hub import ask, client
from convert.publishing.remote import _card

SUPPORT = ROOT / "tests/support"
CASES = 250


def fuzz(folder: Path, cases: int, change: str = "") -> subprocess.CompletedProcess[str]:
    program = f"import sys, nonsense\n{change}\nnonsense.main(*sys.argv[1:])"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    mine = {"PYTHONPATH": os.pathsep.join((str(SUPPORT), str(ROOT))), "HF_HOME": str(folder.parent / "hf-home")}
    line = [sys.executable, "-c", program, str(folder), str(cases)]
    return subprocess.run(line, env=kept | mine, capture_output=True, text=True)


def test_answers_that_make_no_sense(model: Path) -> None:
    done = fuzz(model, CASES)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) == CASES
    assert outcomes["published"] > CASES // 10 and outcomes["nonsense"] > CASES // 10, outcomes


def test_a_traceback_would_be_seen(model: Path) -> None:
    change = "from convert.publishing import commit, hub\nhub.recoverable = commit.recoverable = lambda: (OSError,)"
    done = fuzz(model, CASES, change)
    assert done.returncode == 1 and "case " in done.stderr and "Traceback" in done.stderr


@pytest.mark.parametrize("seconds", [1.0, 0.0001])
def test_an_answer_that_trickles(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
) -> None:
    """The clock runs as the server sends: a second for each byte is too slow, 10,000 bytes a second is not."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "clock", lambda: hub.ticks * seconds)
    hub.fault("GET", "/whoami", "trickle", times=9)
    with client(5.0, False):
        api = huggingface_hub.HfApi(endpoint=hub.endpoint, token=TOKEN)

        def look() -> Any:
            return ask(api.whoami, "ask", "me/x")["name"]

        if seconds < 1:
            assert look() == "alice"
        else:
            with pytest.raises(ConvertError) as caught:
                look()
            assert caught.value.code == "network" and "TimeoutError" in str(caught.value)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("route", ["/whoami-v2$", "/resolve/"], ids=["answer", "card"])
def test_an_answer_that_is_too_large(hub: Hub, monkeypatch: pytest.MonkeyPatch, packed: bool, route: str) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("convert.publishing.hub.LARGEST", 100_000)
    hub.store.repositories.pop("alice/large", None)
    hub.store.create("alice/large", False, "alice")
    card = b"---\nlicense: mit\n---\n"
    hub.store.repositories["alice/large"].edit("README.md", card)

    def change(told: dict[str, str], content: bytes) -> bytes:
        content = content.replace(b"alice", b"alice" + b" " * size).replace(card, card + b" " * size)
        told |= {"Content-Encoding": "gzip"} if packed else {}
        return gzip.compress(content) if packed else content

    with client(5.0, False):
        api = huggingface_hub.HfApi(endpoint=hub.endpoint, token=TOKEN)

        def look() -> Any:
            if route == "/resolve/":
                return _card(api, "alice/large", "main")
            return ask(api.whoami, "ask", "me/x")["name"]

        for size in (1000, 200_000):
            hub.faults.clear()
            hub.fault("GET", route, "change", change=change, times=9)
            if size < 100_000:
                assert len(look()) > size
                continue
            with pytest.raises(ConvertError, match="an answer of more than") as caught:
                look()
            assert caught.value.code == "nonsense"
            assert hub.faults[-1].times == 8, "it was asked again"


def test_a_card_that_expands(model: Path) -> None:
    """YAML whose aliases stand for more than memory holds, or a value that only a tag makes."""
    from hub_fixtures import facts_of

    from convert.publishing.card import compose

    facts = facts_of(model)
    laughs = "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(12))
    blocks = [
        laughs,
        "a: &a {b: 1}\nc:\n  <<: *a\n",
        "date: 2020-99-99\n",
        "a: !!int x\n",
        "a: !!python/name:os.system x\n",
    ]
    blocks += [
        "? [a]: b\n",
        "a: " + "[" * 5000 + "]" * 5000 + "\n",
        "a: " + "b" * 200_000 + "\n",
        "a: !!binary é\n",
        "\x00: a\n",
    ]
    for block in blocks:
        with pytest.raises(ConvertError, match=r"^README\.md: ") as caught:
            compose(facts, f"---\n{block}---\ntext\n".encode())
        assert (caught.value.code, caught.value.status) == ("card", 1)
    compose(facts, b"---\ndate: 2020-09-09\na: [[[[]]]]\n---\ntext\n")


def test_files_larger_than_the_hub_s_limit_are_searched_too(model: Path, tmp_path: Path) -> None:
    """conversion.json of a thousand languages has over 10 MB: it is read, and searched for paths and tokens."""
    from hub_fixtures import prove, write

    from convert.publishing import gate
    from convert.publishing.files import read

    values = json.loads((model / "conversion.json").read_text())
    dictionary = {"symbols": ["/a/", *(f"symbol {n}" for n in range(299))], "counts": [1] * 300, "special": []}
    values["languages"] = {f"l{n}": dictionary for n in range(1162)}
    write(model / "conversion.json", values)
    assert (model / "conversion.json").stat().st_size > 10 << 20
    prove(model)
    inventory = read(model)
    assert gate.check(inventory).passed and len(inventory.record().languages) == 1162
    assert inventory.files["conversion.json"].git_sha1 is None  # stored with LFS
    for value, code in (("/home/me/data", "private-path"), (TOKEN, "token")):
        values["settings"]["task"]["data"] = value
        write(model / "conversion.json", values)
        with pytest.raises(ConvertError) as caught:
            read(model)
        assert [problem.code for problem in caught.value.problems] == [code]


SECRETS = {
    "hub": TOKEN,
    "aws": "AKIA" + "ABCDEFGH" * 2,
    "github": "ghp_" + "a1" * 18,
    "key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "address": "see https://me:secret@example.org/x",
}


@pytest.mark.parametrize("name", SECRETS)
def test_tokens_do_not_leave(name: str, model: Path, tmp_path: Path) -> None:
    from convert.publishing.files import read

    for file in ("LICENSE", "LICENSE.md", "NOTICE", "README.md", "vocab.json", "sentencepiece.bpe.model", "sample.wav"):
        copy = Path(shutil.copytree(model, tmp_path / file))
        (copy / file).write_text(json.dumps({"text": "see https://example.org/a@b, sk-learn, hf_hub"}))
        read(copy)  # the control
        (copy / file).write_text(json.dumps({"text": SECRETS[name]}))
        with pytest.raises(ConvertError) as caught:
            read(copy)
        assert [(problem.code, problem.key) for problem in caught.value.problems] == [("token", file)]
        assert SECRETS[name] not in str(caught.value.problems)


def test_a_dry_run_without_a_token_shows_the_card(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalTokenNotFoundError

    from convert.publishing import remote
    from convert.publishing.run import publish

    def no_token(*_: Any) -> None:
        raise LocalTokenNotFoundError("none")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", no_token)
    monkeypatch.setattr(remote, "read", None)
    done = publish(model, "me/x", dry_run=True)
    assert not done.committed and "+# x" in done.card_diff and "model.safetensors" in done.changed
    assert done.notes == ("there is no Hub token: the repository on the Hub was not looked at",)
    with pytest.raises(ConvertError) as caught:
        publish(model, "me/x")
    assert caught.value.code == "no-token"
