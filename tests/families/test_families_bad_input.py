"""What is not good about the further families' checkpoints, the files beside them, and the directories made of them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hubert_models
import mms_models
import pytest
import seq2seq_models
import speech_to_text_models
import torch
import yaml

from convert.checkpoint import open_checkpoint
from convert.errors import ConvertError
from convert.package import compare_weights, convert
from convert.restoration import restore

ADAPTER = "w2v_encoder.w2v_model.encoder.layers.0.adapter_layer."
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    mms = mms_models.save("mms", folder / "mms.pt")
    hubert = hubert_models.save("hubert_two_dictionaries", folder / "hubert.pt")
    seq2seq = seq2seq_models.save("sinusoidal", folder / "seq2seq.pt")
    no_adapter = mms_models.save("one_no_layer", folder / "no_adapter.pt")
    return {"mms": mms, "hubert": hubert, "seq2seq": seq2seq, "no_adapter": no_adapter}


def refused(path: Path, folder: Path, **options: Any) -> ConvertError:
    before = sorted(folder.iterdir())
    with pytest.raises(ConvertError) as raised:
        convert(path, folder / "model", **options)
    assert sorted(folder.iterdir()) == before
    assert raised.value.status in (1, 2) and all(problem.detail for problem in raised.value.problems)
    return raised.value


def many_languages(state: dict[str, Any]) -> None:
    state["adapter"] = dict.fromkeys((f"l{number}" for number in range(20_000)), state["adapter"]["eng"])


def many_dictionaries(state: dict[str, Any]) -> None:
    state["task_state"]["dictionaries"] = state["task_state"]["dictionaries"][:1] * 500_000


def long_symbols(state: dict[str, Any]) -> None:
    one = state["task_state"]["dictionaries"][0]
    one.symbols = ["x" * 100_000] * 100_000


def many_rows(state: dict[str, Any]) -> None:
    for layer in range(100):
        name = ADAPTER.replace("layers.0", f"layers.{layer}")
        state["model"] |= {f"{name}{part}": torch.zeros(1).expand(10_000, 0) for part in ("ln_W", "ln_b", "b_a")}


def endless_rows(state: dict[str, Any]) -> None:
    state["model"][f"{ADAPTER}W_a"] = torch.zeros(1).expand(10**9, 0)


# A checkpoint -> how it is changed, the code, and the key of a problem
CHECKPOINTS: dict[str, tuple[str, Change, str, str]] = {
    "languages": ("mms", many_languages, "size-bomb", ""),
    "dictionaries": ("hubert", many_dictionaries, "size-bomb", ""),
    "symbols": ("hubert", long_symbols, "size-bomb", ""),
    "rows": ("mms", many_rows, "size-bomb", ""),
    "endless rows": ("mms", endless_rows, "size-bomb", ""),
    "name of a row": (
        "mms",
        lambda state: state["model"].update({f"{ADAPTER}b_a[0]": torch.zeros(8)}),
        "corrupted-model",
        f"{ADAPTER}b_a[0]",
    ),
    "no tensor": ("mms", lambda state: state["adapter"]["eng"]["model"].update(a=1), "corrupted-model", ""),
    "no text": (
        "mms",
        lambda state: state["adapter"]["eng"]["model"].update({"\ud800": torch.zeros(1)}),
        "corrupted-model",
        "",
    ),
    "wide zeros": (
        "no_adapter",
        lambda state: state["cfg"]["model"].update(adp_dim=10**9),
        "refused",
        "wav2vec2.encoder.layers.0.adapter_layer.linear_1.weight",
    ),
    "long sinusoids": (
        "seq2seq",
        lambda state: state["cfg"]["model"].update(max_target_positions=10**9),
        "refused",
        "decoder.model.decoder.embed_positions.weight",
    ),
    "stack of text": ("mms", lambda state: state["cfg"]["model"].update(adp_num="2"), "refused", "adp_num"),
    "NaN in an adapter": (
        "mms",
        lambda state: state["adapter"]["hin"]["model"][f"{ADAPTER}b_a"].fill_(torch.nan),
        "non-finite",
        "",
    ),
}
CHECKPOINTS |= {
    f"language {name[:9]!r}": (
        "mms",
        lambda state, name=name: state["adapter"].update({name: state["adapter"]["eng"]}),  # type: ignore[misc]
        "corrupted-model",
        "",
    )
    for name in ("..", "a/b", "", "x" * 1000, "\n", "é")
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(name: str, good: dict[str, Path], tmp_path: Path) -> None:
    model, change, code, key = CHECKPOINTS[name]
    state = torch.load(good[model], weights_only=False)
    change(state)
    torch.save(state, tmp_path / "changed.pt")
    error = refused(tmp_path / "changed.pt", tmp_path)
    assert error.code == code
    assert not key or key in {problem.key for problem in error.problems}


def test_scalar_in_the_kept_head(good: dict[str, Path], tmp_path: Path) -> None:
    state = torch.load(good["hubert"], weights_only=False)
    state["model"]["final_proj.bias"] = torch.zeros(())
    torch.save(state, tmp_path / "changed.pt")
    error = refused(tmp_path / "changed.pt", tmp_path, keep_final_proj=True)
    assert "final_proj.bias" in {problem.key for problem in error.problems}


# config.yaml: its text, or what it says beside the usual -> what the error says
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{'*' + a},{'*' + a}]}}\n" for a, b in zip("abcd", "bcde", strict=True)
)
LAUGHS = "a: &a [1, 1]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)
)
CONFIGS: dict[str, tuple[str | bytes | dict[str, Any], str]] = {
    "merge keys": (MERGED, "merge keys"),
    "aliases": (LAUGHS, "deeper or larger"),
    "itself": ("a: &a [*a]", "deeper or larger"),
    "brackets": ("[" * 5000, "deeper or larger"),
    "tag": ("a: !!python/object/apply:os.system [touch /tmp/x]", "not a YAML file"),
    "date": ("a: 2020-13-45", "not a YAML file"),
    "number": ("a: !!int ''", "not a YAML file"),
    "truth": ("a: !!bool x", "not a YAML file"),
    "time": ("a: !!timestamp x", "not a YAML file"),
    "bytes": (b"a: \xff", "not a YAML file"),
    "zero": ("a: \0", "not a YAML file"),
    "large": ("a: b\n" * 60_000, "larger than"),
    "list": ("- a", "no settings"),
    "above": ({"vocab_filename": "../secret.txt"}, "is not next to it"),
    "absolute": ({"vocab_filename": "/etc/passwd"}, "is not next to it"),
    "device": ({"vocab_filename": "/dev/zero"}, "is not next to it"),
    "pipe": ({"vocab_filename": "pipe"}, "is not next to it"),
    "long name": ({"vocab_filename": "x" * 5000}, "is not next to it"),
    "no name": ({"vocab_filename": "a\0b"}, "is not next to it"),
    "number as name": ({"vocab_filename": 3}, "names no file"),
    "other file": (
        {"bpe_tokenizer": {"bpe": "sentencepiece", "sentencepiece_model": "dict.txt"}},
        "not a sentencepiece model",
    ),
    "no model": ({"bpe_tokenizer": {"bpe": "sentencepiece"}}, "names no model"),
    "number as transforms": ({"transforms": {"*": 1}}, "names in a list expected"),
    "lists as transforms": ({"feature_transforms": {"*": [["utterance_cmvn"]]}}, "names in a list expected"),
}


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    path, _, _ = speech_to_text_models.save("untied", folder)
    (folder.parent / "secret.txt").write_bytes((folder / "dict.txt").read_bytes())
    os.mkfifo(folder / "pipe")
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_config_of_a_task(name: str, speech: Path, tmp_path: Path) -> None:
    content, message = CONFIGS[name]
    path = speech.with_name("changed.yaml")
    if isinstance(content, dict):
        content = yaml.safe_dump(yaml.safe_load(speech.with_name("config.yaml").read_text()) | content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refused(speech, tmp_path, data_config=path)
    assert any(message in text for text in (error.message, *(problem.detail for problem in error.problems)))


@pytest.mark.parametrize("option", ["data_config", "dictionary"])
def test_no_file_at_all(option: str, speech: Path, tmp_path: Path) -> None:
    for name in ("/dev/zero", speech.with_name("pipe"), tmp_path, tmp_path / "missing"):
        assert refused(speech, tmp_path, **{option: name}).code in ("bad-data-config", "bad-dictionary")


# conversion.json: what is changed in it
RECORDS: dict[str, Change] = {
    "sidecar above": lambda record: record["sidecars"].update({"../x.safetensors": {"group": "", "tensors": {}}}),
    "sidecar elsewhere": lambda record: record["sidecars"].update({"/tmp/x.safetensors": {"group": "", "tensors": {}}}),
    "sidecar of numbers": lambda record: record["sidecars"].update({"own_adapter.safetensors": 1}),
    "file above": lambda record: record["files"].update({"../x": {"sha256": "", "size": 1}}),
    "language above": lambda record: record["languages"].update({"..": record["languages"]["eng"]}),
    "symbols": lambda record: record["languages"]["eng"].update(symbols=[1]),
    "special": lambda record: record["languages"]["eng"].update(special=["x"]),
    "no drops": lambda record: record.pop("drops"),
    "a drop's constant": lambda record: record["drops"].append({"key": "a", "reason": "b", "constant": "c"}),
    "tensors": lambda record: record.update(tensors=[]),
    "dtype": lambda record: record.update(dtype="int8"),
    "request": lambda record: record["request"].update(dictionary="/etc/passwd"),
    "settings": lambda record: record["settings"]["model"]["w2v_args"].pop("task"),
    "deep settings": lambda record: record["settings"]["task"].update(data=json.loads("[" * 100 + "]" * 100)),
    "rows": lambda record: record.update(edited_rows={"lm_head.bias": {"0": "zz"}}),
}


@pytest.fixture(scope="module")
def directory(good: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = convert(good["mms"], tmp_path_factory.mktemp("made") / "mms").path
    assert compare_weights(good["mms"], folder) == []
    restore(folder, folder.with_name("restored.pt"))
    return folder


@pytest.mark.parametrize("name", RECORDS)
def test_record_that_was_changed(name: str, good: dict[str, Path], directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "model")
    path = tmp_path / "model/conversion.json"
    record = json.loads(path.read_text())
    RECORDS[name](record)
    path.write_text(json.dumps(record))
    not_a_model(good["mms"], tmp_path / "model")


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"a":' * 100_000])
def test_record_that_is_none(content: bytes, good: dict[str, Path], directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "model")
    (tmp_path / "model/conversion.json").write_bytes(content)
    not_a_model(good["mms"], tmp_path / "model")
    convert(good["mms"], tmp_path / "model", overwrite=True)  # one more reason to make it anew
    assert compare_weights(good["mms"], tmp_path / "model") == []


def not_a_model(checkpoint: Path, folder: Path) -> None:
    before = sorted(folder.parent.iterdir())
    for use in (lambda: compare_weights(checkpoint, folder), lambda: restore(folder, folder.with_name("back.pt"))):
        with pytest.raises(ConvertError) as raised:
            use()
        assert (raised.value.code, raised.value.status) == ("not-a-model", 2)
    assert sorted(folder.parent.iterdir()) == before


def head_of(data: bytes, **changes: Any) -> bytes:
    """Change what a safetensors header says of its first tensor."""
    count = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + count])
    first = next(name for name in header if name != "__metadata__")
    header[first] |= changes
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + count :]


# A sidecar: what becomes of its bytes -> the code that comparing it gives; those without one are of other weights
SIDECARS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not-a-model"),
    "head": (lambda data: data[:100], "not-a-model"),
    "truncated": (lambda data: data[:-1], "not-a-model"),
    "endless": (lambda data: (2**63).to_bytes(8, "little") + data[8:], "not-a-model"),
    "deep": (lambda data: len(data).to_bytes(8, "little") + b"[" * 100_000, "not-a-model"),
    "negative": (lambda data: head_of(data, shape=[-1, -64]), "not-a-model"),
    "fractions": (lambda data: head_of(data, shape=[64.0]), "not-a-model"),
    "huge": (lambda data: head_of(data, shape=[10**30]), "not-a-model"),
    "type": (lambda data: head_of(data, dtype=[]), "not-a-model"),
    "changed": (lambda data: data[:-4] + b"\0\0\xc0\x7f", "bytes"),
}


@pytest.mark.parametrize("name", SIDECARS)
def test_sidecar_that_was_changed(name: str, good: dict[str, Path], directory: Path, tmp_path: Path) -> None:
    change, code = SIDECARS[name]
    shutil.copytree(directory, tmp_path / "model")
    path = tmp_path / "model/adapter.hin.safetensors"
    path.write_bytes(change(path.read_bytes()))
    if code == "not-a-model":
        not_a_model(good["mms"], tmp_path / "model")
        return
    assert {problem.code for problem in compare_weights(good["mms"], tmp_path / "model")} == {code}
    assert any("adapter.hin" in note for note in restore(tmp_path / "model", tmp_path / "back.pt").notes)


def test_sidecars_missing_swapped_and_of_another_model(good: dict[str, Path], directory: Path, tmp_path: Path) -> None:
    names = ("adapter.hin.safetensors", "adapter.eng.safetensors")
    shutil.copytree(directory, tmp_path / "swapped")
    for one, other in (names, names[::-1]):
        shutil.copy(directory / one, tmp_path / "swapped" / other)
    assert compare_weights(good["mms"], tmp_path / "swapped")
    shutil.copytree(directory, tmp_path / "missing")
    (tmp_path / "missing" / names[0]).unlink()
    assert names[0] in {problem.key for problem in compare_weights(good["mms"], tmp_path / "missing")}
    shutil.copytree(directory, tmp_path / "lacks")
    shutil.copy(directory / "own_adapter.safetensors", tmp_path / "lacks" / names[0])
    data = head_of((tmp_path / "lacks" / names[0]).read_bytes())
    count = int.from_bytes(data[:8], "little")
    first = next(name for name in json.loads(data[8 : 8 + count]) if name != "__metadata__")
    (tmp_path / "lacks" / names[0]).write_bytes(data.replace(f'"{first}"'.encode(), f'"{first[:-1]}x"'.encode()))
    for folder in ("missing", "lacks"):
        with pytest.raises(ConvertError) as raised:
            restore(tmp_path / folder, tmp_path / "back.pt")
        assert raised.value.code in ("changed", "not-a-model")
    assert not (tmp_path / "back.pt").exists()


def test_full_disk_at_every_file(good: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights and the sidecars reserve their place: whichever cannot, nothing stays behind."""
    right, left = os.posix_fallocate, [0]

    def full(*arguments: int) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        right(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", full)
    for files in range(6):
        left[0] = files
        if files == 5:  # the model, three languages, and the model's own adapters
            convert(good["mms"], tmp_path / "model")
            return
        with pytest.raises(OSError, match="No space"):
            convert(good["mms"], tmp_path / "model")
        assert not list(tmp_path.iterdir())


def test_overwriting_leaves_no_sidecar_of_another_model(good: dict[str, Path], tmp_path: Path) -> None:
    convert(good["mms"], tmp_path / "model")
    convert(good["hubert"], tmp_path / "model", overwrite=True, keep_final_proj=True)
    assert [path.name for path in (tmp_path / "model").glob("*.safetensors")] != []
    convert(good["seq2seq"], tmp_path / "model", overwrite=True)
    assert [path.name for path in (tmp_path / "model").glob("*.safetensors")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_undamaged_ones_convert(good: dict[str, Path], speech: Path, tmp_path: Path) -> None:
    for name, path in good.items():
        convert(path, tmp_path / name)
        assert compare_weights(path, tmp_path / name) == []
    done = convert(speech, tmp_path / "speech", data_config=speech.with_name("config.yaml"))
    assert compare_weights(speech, done.path) == []
    with open_checkpoint(good["mms"]) as opened:
        assert set(opened.groups) == {"azj-script_latin", "eng", "hin"}
