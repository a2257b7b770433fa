"""Every command where only `pip install fairseq-to-hf` was run: it works, or ends with the extra that it needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import base_install
import pytest
from command_line import BUNDLED, ROOT
from hub_fixtures import TOKEN, prove
from hub_server import Hub

ABSENT = (
    "torch",
    "transformers",
    "safetensors",
    "soundfile",
    "sentencepiece",
    "datasets",
    "jiwer",
    "matplotlib",
    "fairseq",
)


class Base:
    """The environment, and a model directory that was converted in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = base_install.make(folder / "site")

    def run(self, *words: object, **more: str) -> tuple[int, str, str]:
        done = base_install.run(self.environment | more, "-m", "convert", *words, cwd=self.folder)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    made = Base(tmp_path_factory.mktemp("base"))
    status, _, error = made.run("convert", BUNDLED, "model")
    assert status == 0, error
    return made


def test_it_is_the_base_install(base: Base) -> None:
    look = f"import importlib.util as u; print([n for n in {(*ABSENT, 'click', 'yaml')!r} if u.find_spec(n)])"
    assert base_install.run(base.environment, "-c", look).stdout.strip() == "['click', 'yaml']"


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["inspect", BUNDLED],
        ["plan", BUNDLED],
        ["convert", BUNDLED, "again", "--overwrite"],
        ["restore", "model", "back.pt", "--overwrite"],
        ["fetch", "--list"],
    ],
    ids=lambda words: words[0],
)
def test_what_needs_no_torch(base: Base, words: list[object]) -> None:
    status, out, error = base.run(*words)
    assert (status, error) == (0, "") and out
    for name in ("evaluate", "publish", "record", "verify"):
        assert base.run(name, "--help")[0] == 0


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        (["verify", BUNDLED, "model"], "torch", "verify"),
        (["verify", BUNDLED, "model", "--reference", BUNDLED.with_suffix(".reference.safetensors")], "torch", "verify"),
        (["verify", BUNDLED, "model", "--plot", "plot.png"], "torch", "verify"),
        (["record", BUNDLED, "out.safetensors"], "torch", "verify"),
        (["evaluate", "model", "--manifest", ROOT / "checkpoints/heldout/heldout.tsv"], "torch", "evaluate"),
        (["publish", "model", "me/model", "--unverified"], "torch", "verify"),
    ],
    ids=["verify", "recording", "plot", "record", "evaluate", "publish"],
)
def test_what_needs_more_says_what(base: Base, words: list[object], package: str, extra: str) -> None:
    before = sorted(path.name for path in base.folder.iterdir())
    status, out, error = base.run(*words)
    assert (status, out) == (2, "") and error.startswith("error: ") and package in error
    assert error.rstrip().endswith(f"hint: pip install 'fairseq-to-hf[{extra}]'")
    status, out, error = base.run(*words, "--json")
    data = json.loads(out)
    assert (status, error, data["ok"]) == (2, "", False) and data["command"] == words[0]
    assert data["hint"] == f"pip install 'fairseq-to-hf[{extra}]'" and data["problems"][0]["key"] == package
    assert sorted(path.name for path in base.folder.iterdir()) == before


@pytest.mark.parametrize(
    ("call", "extra"),
    [
        (f"convert.verify({str(BUNDLED)!r}, 'model')", "verify"),
        (f"convert.assert_identical({str(BUNDLED)!r}, 'model')", "verify"),
        (f"convert.record({str(BUNDLED)!r}, 'out.safetensors')", "verify"),
        ("convert.evaluate('model', manifest='set.tsv')", "evaluate"),
    ],
    ids=["verify", "assert_identical", "record", "evaluate"],
)
def test_from_python_too(base: Base, call: str, extra: str) -> None:
    (base.folder / "set.tsv").touch()
    program = f"""
import convert
try:
    {call}
except convert.ConvertError as error:
    print(error.code, error.status, error.hint)
"""
    done = base_install.run(base.environment, "-c", program, cwd=base.folder)
    assert done.stdout == f"missing-package 2 pip install 'fairseq-to-hf[{extra}]'\n", done.stderr
    (base.folder / "set.tsv").unlink()


def test_a_verified_model_is_published(base: Base, hub: Hub) -> None:
    folder = Path(shutil.copytree(base.folder / "model", base.folder / "verified"))
    prove(folder)
    place = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(base.folder / "hf"),
    }
    status, out, error = base.run("publish", "verified", "alice/model", **place)
    assert status == 0, error
    assert "published alice/model" in out and (folder / "README.md").is_file()
    status, _, error = base.run("publish", "verified", "alice/model", "--check", **place)
    assert status == 2 and "fairseq-to-hf[verify]" in error  # loading it needs torch
    shutil.rmtree(folder)
