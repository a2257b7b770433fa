"""The examples at the end of every `--help` run as they stand, with local files, addresses and a Hub in place of real ones."""

from __future__ import annotations

import hashlib
import importlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate_fixtures
import fairseq_models
import hub_fixtures
import pytest
import torch
from command_line import BUNDLED, HELDOUT, ROOT
from download_server import Server
from hub_server import Hub
from hub_store import Blob
from torch_files import read

import convert
from convert.cli import COMMANDS

# what an example names that only the net has -> what stands for it here
HERE = {"openslr/librispeech_asr": "speech", "~/fairseq-env/bin/python": sys.executable}
HERE |= {"me/my-checkpoints": "alice/my-checkpoints", "me/my-model": "alice/my-model", "their/model": "lab/model"}
# with the released models' frames, 20 ms long: other tiny models make eight times as many of the long input
FRAMES = "[(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2"
CTC = fairseq_models.Variant("ctc", fairseq_models.BASE | {"conv_feature_layers": FRAMES})
# what each example of a command makes anew
MADE = {"convert": "my-model", "restore": "checkpoint.pt", "record": "reference.safetensors"}
# the command line, with every released checkpoint at one address: the lines of a command, one after the other; what a line
# makes is removed before it
START = """
import dataclasses, json, pathlib, shutil, sys
from convert import fetching
released = {
    name: dataclasses.replace(entry, address=sys.argv[1], dictionary=None) for name, entry in fetching.catalogue().items()
}
fetching.catalogue = lambda: released
from convert.cli import main
for made, words in json.load(sys.stdin):
    for path in map(pathlib.Path, made):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    try:
        main(words)
    except SystemExit as status:
        assert not status.code, words
"""


def examples(name: str) -> list[str]:
    epilog = str(importlib.import_module(f"convert.commands.{name}").command.epilog)
    return [line.strip() for line in epilog.splitlines() if line.strip().startswith("fairseq-to-hf ")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples name."""
    folder = tmp_path_factory.mktemp("files")
    fairseq_models.save(CTC, folder / "checkpoint_best.pt")
    fairseq_models.save(CTC, folder / "wav2vec_small_960h.pt", layout="namespace")
    fairseq_models.save("pretrained_base", folder / "wav2vec_small.pt")
    torch.save(read(folder / "checkpoint_best.pt")["model"], folder / "model_state.pt")
    (folder / "dict.ltr.txt").write_text("".join(f"{symbol} 1\n" for symbol in fairseq_models.LETTERS))
    convert.convert(folder / "checkpoint_best.pt", folder / "my-model")
    shutil.copytree(folder / "my-model", folder / "model-trained-with-transformers")
    (folder / "model-trained-with-transformers/conversion.json").unlink()
    shutil.copytree(HELDOUT.parent, folder / "data")
    for path in (folder / "data").glob("heldout.*"):
        path.rename(path.with_stem("test"))
    (folder / "recordings").mkdir()
    shutil.copy(HELDOUT.parent / "heldout-000.wav", folder / "recordings")
    evaluate_fixtures.write_dataset(folder / "speech")
    return folder


SLOW = ("record", "verify", "evaluate")  # both frameworks compute in each of their examples


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in COMMANDS])
def test_every_example_runs(name: str, files: Path, server: Server, hub: Hub, tmp_path: Path) -> None:
    """All of a command in one folder, one after the other."""
    if name == "evaluate":
        pytest.importorskip("datasets")
    lines = examples(name)
    assert len(lines) >= 3
    place = Path(shutil.copytree(files, tmp_path / "here"))
    if name == "evaluate":  # both sides write the same text of a model that was trained
        shutil.copy(BUNDLED, place / "checkpoint_best.pt")
        convert.convert(BUNDLED, place / "my-model", overwrite=True)
    content = (files / "checkpoint_best.pt").read_bytes()
    server.content = content
    environment = hub_fixtures.Publisher(hub, tmp_path / "home").environment(HF_HUB_OFFLINE="0")
    address = f"http://127.0.0.1:{server.server_port}/model.pt"
    if name == "convert":
        _lay_out(hub, {"checkpoint_best.pt": content})
    if name == "verify":
        convert.record(place / "checkpoint_best.pt", place / "reference.safetensors", long=False)
    if name == "publish":
        hub.store.create("lab/model", False, "carol")
        hub_fixtures.prove(place / "my-model")
    asked = []
    for line in lines:
        words = [HERE.get(word, word.replace("me/", "alice/")) for word in shlex.split(line)[1:]]
        asked.append([[MADE[name]] if name in MADE and "--overwrite" not in words else [], words])
    done = subprocess.run(
        [sys.executable, "-c", START, address],
        input=json.dumps(asked),
        cwd=place,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def _lay_out(hub: Hub, content: dict[str, bytes]) -> None:
    hub.store.create("alice/my-checkpoints", True, "alice")
    blobs = {}
    for name, data in content.items():
        digest = hashlib.sha256(data).hexdigest()
        hub.store.objects[digest] = data
        blobs[name] = Blob(None, digest, len(data))
    hub.store.repositories["alice/my-checkpoints"].commit("main", None, blobs, (), "files", "", "alice")
