"""Every byte and every word that the product makes of the tiny models, held by digests in pinned.json.

A change of pinned.json is a change of what users get: name it in the commit.

    python tests/test_pinned.py --renew     write pinned.json anew, and print the names of what changed
    python tests/test_pinned.py --into DIR  write what the digests are of, to compare two versions with `diff -r`
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from convert import mapping
from convert.cli import main
from convert.errors import ConvertError
from convert.report import size

PINNED = Path(__file__).with_name("pinned.json")
sys.path[:0] = [str(PINNED.parent / "support")] if __name__ == "__main__" else []
BUILDERS = ("fairseq", "hubert", "data2vec", "conformer", "wavlm", "mms", "classification", "seq2seq", "speech_to_text")
# model -> options of further conversions of it, done or refused
OTHERWISE = {
    "fairseq ctc_base": (
        *("--head encoder", "--head pretraining", "--head classification", "--lang eng", "--keep-final-proj"),
        *("--data-config config.yaml", "--dict dict.txt", "--base base.pt"),
    ),
    "fairseq ctc_large": ("--head ctc --dtype float16",),
    "fairseq ctc_blank_add": ("--dtype bfloat16",),
    "fairseq ctc_pos_conv_plain": ("--dtype float16 --max-shard-size 50000",),
    "fairseq pretrained_base": ("--head encoder", "--head ctc"),
    "fairseq pretrained_pos_conv_plain": ("--head encoder",),
    "hubert hubert_base": ("--keep-final-proj", "--head pretraining"),
    "hubert hubert_two_dictionaries": ("--keep-final-proj",),
    "hubert hubert_ctc_base": ("--keep-final-proj", "--head encoder"),
    "data2vec pretrained": ("--keep-final-proj",),
    "data2vec ctc": ("--head encoder",),
    "conformer ctc_rotary": ("--head encoder",),
    "conformer pretrained_relative": ("--head encoder",),
    "wavlm wavlm_base": ("--head ctc",),
    "mms one": ("--lang eng",),
    "mms several": ("--lang hin",),
    "mms mms": ("--lang azj-script_latin", "--lang deu", "--head encoder"),
    "mms mms_some_layers": ("--lang hin --head encoder",),
    "classification classification_base": ("--head ctc",),
    "classification classification_latent": ("--head encoder",),
    "seq2seq learned": ("--head ctc", "--lang eng"),
    "seq2seq pre_norm": ("--head encoder",),
    "seq2seq hubert": ("--head encoder",),
    "speech_to_text to_many": ("--data-config config.yaml --lang fr", "--data-config config.yaml --lang xx", ""),
}
KEPT = re.compile(r"(version|_float_tensor)$")  # buffers with one value, which the conversion relies on
SUBWORDS = "sentencepiece.bpe.model"


def _numbers(value: Any, name: str = "") -> None:
    """Replace every floating point number by one that each processor makes alike, in place: torch's random ones are not.

    Whole sixteenths between -8 and 8; buffers that repeat from layer to layer stay repeated.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            _numbers(item, str(key))
    elif isinstance(value, torch.Tensor) and value.is_floating_point() and not KEPT.search(name):
        name = re.sub(r"\d+", "", name) if name.endswith("inv_freq") else name
        seed = hashlib.shake_128(name.encode()).digest(value.numel())
        value.copy_((torch.frombuffer(bytearray(seed), dtype=torch.uint8).float() - 128).div(16).view(value.shape))


def models(builder: str) -> dict[str, Any]:
    """The models of a builder, those that are refused too; one of several that are refused alike."""
    module = importlib.import_module(f"{builder}_models")
    refused = {f"refused_{name}": model for name, model in module.REFUSED.items() if not isinstance(model, tuple)}
    return {**module.VARIANTS, **refused}


def saved(builder: str, name: str, folder: Path) -> Path:
    """Write one of a builder's models as fairseq does, with numbers that each processor makes alike."""
    module = importlib.import_module(f"{builder}_models")
    model = name.removeprefix("refused_") if builder == "wavlm" else models(builder)[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.save(model, folder if builder == "speech_to_text" else folder / "model.pt")
        state = torch.load(folder / "model.pt", weights_only=False)
        for part in ("model", "adapter"):
            _numbers(state.get(part))
        torch.save(state, folder / "model.pt")
    return folder / "model.pt"


def run(line: str) -> tuple[int, str]:
    """Run a command in this process; return its exit status, and what it printed, errors first."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(line.split(), prog_name="fairseq-to-hf")
        except SystemExit as stopped:
            status = stopped.code
    return status, err.getvalue() + out.getvalue()


class Made:
    """What was made of one model: name -> bytes, without what depends on the versions of torch and of this tool."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.content: dict[str, bytes] = {}
        count = source.stat().st_size
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        self.unsteady = {digest: "SHA256", size(count): "SIZE", f'"size": {count}': '"size": SIZE'}
        self.unsteady[str(Path.cwd())] = "HERE"

    def command(self, line: str, of: str = "") -> bool:
        """Keep what a command prints, as text and as JSON; say whether its answer was yes. `of`: what tells it from others."""
        status, text = run(line)
        self.content[f"{line}{of}".strip()] = self._steady(f"exit {status}\n{text}")
        if not line.startswith(("convert", "restore")) or status:
            again, text = run(f"{line} --json")
            assert again == status
            self.content[f"{line} --json{of}".strip()] = self._steady(text)
        return status == 0

    def files(self, folder: Path, name: str) -> None:
        """Keep the files of a model directory."""
        for path in sorted(folder.iterdir()):
            data = path.read_bytes()
            if path.name == SUBWORDS:  # sentencepiece's own, as it was trained beside the model
                assert data == (self.source.parent / "spm.model").read_bytes()
                continue
            if path.name == "conversion.json":
                record = json.loads(data)
                record["tool"]["version"] = "VERSION"
                record["files"].pop(SUBWORDS, None)
                data = self._steady(json.dumps(record, indent=2, ensure_ascii=False))
            self.content[f"{name}/{path.name}"] = data

    def tables(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Keep the digests of the tables that names and shapes alone give."""
        for head in ("", "encoder"):
            try:
                found = mapping.table(mapping.infer_layout(shapes), head)
                said = f"{found.name} {found.digest}"
            except ConvertError as error:
                said = f"{error.message}\n" + "\n".join(map(str, error.problems))
            self.content[f"table {head}".strip()] = said.encode()

    def _steady(self, text: str) -> bytes:
        for old, new in self.unsteady.items():
            text = text.replace(old, new)
        return text.encode()


def _made(builder: str, name: str, folder: Path) -> Made:
    """Convert a model, and bring it back: from conversion.json, and where transformers' own directories are taken, without."""
    path = saved(builder, name, folder)
    made = Made(path)
    made.tables({key: tuple(value.shape) for key, value in _tensors(path).items()})
    made.command("inspect model.pt")
    _converted(made, folder, "--data-config config.yaml" if builder == "speech_to_text" else "")
    if builder == "fairseq" and (folder / "out").is_dir():
        (folder / "out" / "conversion.json").unlink()
        _restored(made, folder, "without-record.pt")
    for options in OTHERWISE.get(f"{builder} {name}", ()):
        shutil.rmtree(folder / "out", ignore_errors=True)
        _converted(made, folder, options)
    return made


def _converted(made: Made, folder: Path, options: str) -> None:
    planning = re.sub("--(dtype|max-shard-size) [^ ]+", "", options)
    if made.command(f"plan model.pt {planning}".strip()):
        made.command(f"convert model.pt out {options}".strip())
        made.files(folder / "out", f"out {options}".strip())
        _restored(made, folder, "restored.pt", f" {options}")


def _restored(made: Made, folder: Path, name: str, options: str = "") -> None:
    if made.command(f"restore out {name} --overwrite", options):
        made.content[f"{name}{options}".strip()] = (folder / name).read_bytes()


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    model = torch.load(path, weights_only=False)["model"]
    return {key: value for key, value in model.items() if isinstance(value, torch.Tensor)}


CASES = [f"{builder} {name}" for builder in BUILDERS for name in models(builder)]


def made_of(case: str) -> dict[str, bytes]:
    """Make everything of one model, in an empty folder that is the working directory meanwhile."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "data"  # speech-to-text models remember the name of their folder
        folder.mkdir()
        os.chdir(folder)
        try:
            return _made(*case.split(), folder).content
        finally:
            os.chdir(before)


def digests(content: dict[str, bytes]) -> dict[str, str]:
    return {key: hashlib.sha256(data).hexdigest()[:12] for key, data in content.items()}


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_as_pinned(name: str) -> None:
    pinned = json.loads(PINNED.read_text("utf-8"))
    made = made_of(name)
    changed = {key for key, _ in digests(made).items() ^ pinned[name].items()}
    assert not changed, f"{sorted(changed)}; see {Path(__file__).name}"


def test_no_pin_is_left_over() -> None:
    assert list(json.loads(PINNED.read_text("utf-8"))) == CASES


def _every() -> Iterator[tuple[str, dict[str, bytes]]]:
    for name in CASES:
        yield name, made_of(name)


def _renew() -> None:
    before = json.loads(PINNED.read_text("utf-8")) if PINNED.is_file() else {}
    after = {name: digests(made) for name, made in _every()}
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, {}), after.get(name, {})
        for key in sorted({key for key, _ in old.items() ^ new.items()}):
            what = "new" if key not in old else "gone" if key not in new else "changed"
            print(f"{what}: {name}: {key}")
    lines = [f"{json.dumps(name)}: {json.dumps(made)}" for name, made in after.items()]
    PINNED.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def _write(folder: Path) -> None:
    for name, made in _every():
        for key, data in made.items():
            path = folder / name.replace(" ", "_") / key.replace("/", "_").replace(" ", "_")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


if __name__ == "__main__":
    if sys.argv[1:] == ["--renew"]:
        _renew()
    elif len(sys.argv) == 3 and sys.argv[1] == "--into":
        _write(Path(sys.argv[2]).absolute())
    else:
        sys.exit(__doc__)
