"""What `inspect` and the other commands say of any file: each whole message, for those who never heard of fairseq's insides."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import held_models
import hubert_models
import pytest
import torch
from command_line import Ran
from fairseq_models import LETTERS, REFUSED, VARIANTS, build, save, settings, write
from safetensors.torch import save as safetensors_bytes
from torch_files import entries, read

import convert
from convert.errors import ConvertError
from convert.inspection import inspect

ANOTHER = "name a checkpoint of wav2vec 2.0 or another fairseq speech model"
A_CHECKPOINT = "name a checkpoint, such as checkpoint_best.pt"
UNPACK = "unpack it, and name the checkpoint inside"
THE_BASE = (
    "any checkpoint of the same architecture that fairseq's trainer wrote has the settings, such as the pretrained one that "
    "the model was made from (wav2vec_small.pt, xlsr2_300m.pt): --base CHECKPOINT.pt; for a model that writes text, its dictionary too: --dict dict.ltr.txt"
)


@pytest.fixture(scope="module")
def hubert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    model = hubert_models.build("hubert_base")
    return hubert_models.save("hubert_base", tmp_path_factory.mktemp("hubert") / "hubert.pt", model=model), model


def saved(value: Any) -> bytes:
    made = io.BytesIO()
    torch.save(value, made)
    return made.getvalue()


def scripted() -> bytes:
    made = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), made)
    return made.getvalue()


def zipped(**files: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("_DOT_", "."), content)
    return made.getvalue()


def tarred() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("checkpoint_best.pt"))
    return made.getvalue()


TRANSFORMERS = {
    "hubert.encoder.layers.0.feed_forward.intermediate_dense.weight": torch.zeros(2, 2),
    "hubert.masked_spec_embed": torch.zeros(2),
}
# Files that are not of tensors: content, what is said of x.pt, the remedy
FILES: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "empty": (lambda: b"", "is empty", "download or copy it again"),
    "zeros": (lambda: bytes(64), "begins with the bytes 00 00 00 00, as no file of torch.save or safetensors does", A_CHECKPOINT),
    "text": (lambda: b"wav2vec_small.pt\n", "is a text file", A_CHECKPOINT),
    "lfs-pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1269737156\n",
        "is a Git LFS pointer: a text that stands for the file of 1.27 GB, which was not downloaded",
        "run `git lfs pull` in the repository that x.pt is from, or download it from the repository's page",
    ),
    "web-page": (
        lambda: b"<!DOCTYPE html>\n<html><head><title>Sign in</title>",
        "is a web page: the download failed",
        "download the file itself, not the page that shows it",
    ),
    "onnx": (
        lambda: b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:\x9a\x01",
        "is an ONNX model (made by pytorch): a graph, without fairseq's settings and most of the tensors' names",
        "name the checkpoint that it was exported from",
    ),
    "gzip": (lambda: gzip.compress(b"x" * 100), "is a gzip archive", UNPACK),
    "tar": (tarred, "is a tar archive", UNPACK),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file, such as Keras writes", A_CHECKPOINT),
    "zip": (lambda: zipped(exp_DOT_pt=b"x", notes=b"y"), "is a zip archive that holds exp.pt", UNPACK),
    "zip-of-arrays": (
        lambda: zipped(a_DOT_npy=b"x"),
        "is a zip archive without torch's data.pkl; it holds a.npy",
        A_CHECKPOINT,
    ),
    "torchscript": (
        scripted,
        "is a TorchScript program, in which the names of fairseq's tensors and its settings are lost",
        "name the checkpoint that it was made from",
    ),
    "pickle": (lambda: b"\x80\x02}q\x00.", "is a pickle that torch.save did not write", A_CHECKPOINT),
    "list": (lambda: saved([1, 2]), "holds a list", ANOTHER),
    "tensor": (lambda: saved(torch.zeros(3)), "holds a single tensor", ANOTHER),
    "dict": (lambda: saved({"epoch": 1, "args": None}), "holds a dict without tensors, with the keys epoch, args", ANOTHER),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_file_of_something_else(kind: str, command: Callable[..., Ran], tmp_path: Path) -> None:
    content, said, hint = FILES[kind]
    (tmp_path / "x.pt").write_bytes(content())
    done = command("inspect", "x.pt")
    assert done.status == 2
    assert done.error == f"error: x.pt {said}; nothing was written\n\nhint: {hint}\n"


# Files of tensors that hold no fairseq model
TENSORS: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "transformers": (
        lambda: saved(TRANSFORMERS),
        "holds a model with the names of transformers; at the top it has 2 tensors: "
        "hubert.encoder.layers.0.feed_forward.intermediate_dense.weight, hubert.masked_spec_embed",
        "load it with transformers; the way back to fairseq is `fairseq-to-hf restore MODEL_DIR CHECKPOINT.pt`",
    ),
    "transformers-safetensors": (
        lambda: safetensors_bytes({"wav2vec2.encoder.layers.0.feed_forward.intermediate_dense.bias": torch.zeros(2)}),
        "holds a model with the names of transformers; at the top it has 1 tensors: "
        "wav2vec2.encoder.layers.0.feed_forward.intermediate_dense.bias",
        "load it with transformers; the way back to fairseq is `fairseq-to-hf restore MODEL_DIR CHECKPOINT.pt`",
    ),
    "torchaudio": (
        lambda: saved({"encoder.transformer.layers.0.feed_forward.intermediate_dense.weight": torch.zeros(2, 2)}),
        "holds a model with the names of torchaudio; at the top it has 1 tensors: "
        "encoder.transformer.layers.0.feed_forward.intermediate_dense.weight",
        "name the fairseq checkpoint that torchaudio imported",
    ),
    "hubert-soft": (  # transformers has a masked_spec_embed too
        lambda: saved({"hubert": {"masked_spec_embed": torch.zeros(2), "feature_extractor.conv0.weight": torch.zeros(2)}}),
        "holds no model with fairseq's names; in `hubert` it has 2 tensors: masked_spec_embed, feature_extractor.conv0.weight",
        ANOTHER,
    ),
    "wav2vec-1": (
        lambda: saved({
            "args": None,
            "model": {
                "feature_extractor.conv_layers.0.0.weight": torch.zeros(2, 1, 3),
                "feature_aggregator.conv_layers.0.1.weight": torch.zeros(2),
            },
        }),
        "holds a model with the names of wav2vec 1.0 or vq-wav2vec, which transformers has no class for; in `model` it has 2 "
        "tensors: feature_extractor.conv_layers.0.0.weight, feature_aggregator.conv_layers.0.1.weight",
        "wav2vec 2.0 is another model",
    ),
    "s3prl-downstream": (
        lambda: saved({"Downstream": {"linear.weight": torch.zeros(2, 2), "linear.bias": torch.zeros(2)}, "Featurizer": {}}),
        ", written by s3prl's trainer, holds what was trained on top of a speech model, and not that model; in `Downstream` it "
        "has 2 tensors: linear.weight, linear.bias",
        "name the checkpoint of the upstream model",
    ),
    "module": (
        lambda: saved(torch.nn.Linear(2, 3)),
        "holds no model with fairseq's names; at the top it has 2 tensors: weight, bias",
        ANOTHER,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_of_something_else(kind: str, command: Callable[..., Ran], tmp_path: Path) -> None:
    content, said, hint = TENSORS[kind]
    (tmp_path / "x.pt").write_bytes(content())
    message = f"x.pt{said}" if said.startswith(",") else f"x.pt {said}"
    done = command("inspect", "x.pt")
    assert done.status == 0
    assert f"conversion    not as it is: {message}\n  hint: {hint}\n" in done.text
    assert done.data["conversion"]["message"] == f"{message}; nothing was written"
    with pytest.raises(ConvertError) as raised:
        convert.convert(tmp_path / "x.pt", tmp_path / "model")
    assert (raised.value.message, raised.value.hint) == (f"{message}; nothing was written", hint)


PLACES = {
    "bare": "at the top",
    "model_alone": "in `model`",
    "countermeasure": "under `module.ssl_model.model.`",
    "countermeasure_inside": "under `module.ssl_model.model.` in `model_state_dict`",
    "renamed_by_hand": "under `encoders.speech.0.` in `generator`",
    "lightning": "under `feature_extractors.0.ssl_model.` in `state_dict`",
    "whole_module": "under `module.ssl_model.model.`",
    "safetensors": "at the top",
}


@pytest.mark.parametrize("kind", PLACES)
def test_model_without_settings(
    kind: str, hubert: tuple[Path, torch.nn.Module], command: Callable[..., Ran], tmp_path: Path
) -> None:
    held_models.WITHOUT_SETTINGS[kind](read(hubert[0]), hubert[1], tmp_path / "x.pt")
    done = command("inspect", "x.pt")
    assert done.status == 0
    what = "holds"
    if kind == "whole_module":
        what = "is a pickled module of the class torch.nn.parallel.data_parallel.DataParallel, and holds"
    assert (
        f"conversion    not as it is: x.pt {what} the weights of a fairseq model {PLACES[kind]}, without its settings, such "
        f"as the number of attention heads, which weights do not show\n  hint: {THE_BASE}\n"
    ) in done.text
    assert "settings      none in the file" in done.text
    assert ("written by    PyTorch Lightning 1.9.0" in done.text) == (kind == "lightning")
    assert done.data["settings"] is None and done.data["conversion"]["ok"] is False


@pytest.mark.parametrize("kind", held_models.COMPLETE)
def test_model_with_everything(kind: str, hubert: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    held_models.COMPLETE[kind](read(hubert[0]), hubert[1], tmp_path / "x.pt")
    found = inspect(tmp_path / "x.pt")
    notes = ["settings from `hyper_parameters.upstream.config` in the file"] if kind == "settings_elsewhere" else []
    assert found["conversion"] == {"ok": True, "class": "HubertModel", "head": "encoder", "notes": notes}
    assert found["architecture"] == "hubert" and len(found["pretraining_dictionaries"]) == 1


def test_an_option_supplies_it(
    hubert: tuple[Path, torch.nn.Module], command: Callable[..., Ran], tmp_path: Path
) -> None:
    held_models.lightning(read(hubert[0]), hubert[1], tmp_path / "x.pt")
    done = command("inspect", "x.pt", "--base", hubert[0])
    assert done.status == 0 and "\nconversion    to HubertModel\n  note: settings from hubert.pt (SHA-256 " in done.text
    assert "architecture  hubert (2 layers, 64 wide, 4 heads)" in done.text
    save("ctc_base", tmp_path / "old.pt", layout="namespace")
    (tmp_path / "dict.ltr.txt").write_text("".join(f"{letter} 1\n" for letter in LETTERS))
    done = command("inspect", "old.pt", "--dict", "dict.ltr.txt")
    assert done.data["conversion"]["class"] == "Wav2Vec2ForCTC"


def test_why_not_and_what_supplies_it(command: Callable[..., Ran], tmp_path: Path) -> None:
    save("ctc_base", tmp_path / "old.pt", layout="namespace")
    done = command("inspect", "old.pt")
    assert done.status == 0
    assert done.text.endswith(
        "conversion    not as it is: old.pt cannot be converted completely\n"
        "  no-dictionary: --dict: the checkpoint carries no dictionary\n"
        "  hint: pass the dictionary the model was trained with: --dict dict.ltr.txt\n"
    )
    save(REFUSED["quantize_input"], tmp_path / "refused.pt")
    done = command("inspect", "refused.pt")
    assert "  unsupported-setting: quantize_input: is True: Wav2Vec2Model does not quantize its input\n" in done.text


def test_two_models(tmp_path: Path, hubert: tuple[Path, torch.nn.Module]) -> None:
    weights = read(hubert[0])["model"]
    torch.save({"student": weights, "teacher": dict(weights)}, tmp_path / "two.pt")
    torch.save({f"{who}.{key}": value for who in "ab" for key, value in weights.items()}, tmp_path / "prefixes.pt")
    told = {name: inspect(tmp_path / f"{name}.pt")["conversion"] for name in ("two", "prefixes")}
    assert told["two"]["message"] == "two.pt holds 2 models: in `student`; in `teacher`; nothing was written"
    save_one = "save one of them in a file of its own, in Python, and convert that: torch.save("
    assert told["two"]["hint"] == f'{save_one}torch.load("two.pt", weights_only=True)["student"], "one.pt")'
    assert told["prefixes"]["message"] == "prefixes.pt holds 2 models: under `a.`; under `b.`; nothing was written"
    one = '{k: v for k, v in torch.load("prefixes.pt", weights_only=True).items() if k.startswith("a.")}'
    assert told["prefixes"]["hint"] == f'{save_one}{one}, "one.pt")'


def test_directories(hubert: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    for name, content in entries(hubert[0]).items():
        file = tmp_path / "unpacked" / "hubert" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "a.pt").write_bytes(b"x")
    convert.convert(hubert[0], tmp_path / "model")
    told = {}
    for path in (
        tmp_path / "unpacked",
        tmp_path / "unpacked/hubert/data.pkl",
        tmp_path / "several",
        tmp_path / "model",
    ):
        with pytest.raises(ConvertError) as raised:
            inspect(path)
        told[path.name] = (raised.value.message.removesuffix("; nothing was written"), raised.value.hint)
    zip_it = "zip it back without compression, from the folder above: zip -0 -r hubert.pt hubert"
    assert told == {
        "unpacked": ("unpacked is an unpacked checkpoint: the folder of a zip file that was torch's", zip_it),
        "data.pkl": (
            "data.pkl is the index of a checkpoint, without its tensors: a zip file that was unpacked",
            zip_it,
        ),
        "several": (
            "several is a directory that holds 1 .pt files",
            "name one of them, such as a.pt; `convert several OUT --all` converts each",
        ),
        "model": (
            "model is a directory that transformers loads: it holds config.json and weights",
            "load it with transformers; `fairseq-to-hf restore` makes a fairseq checkpoint of it",
        ),
    }


def test_moving_average(command: Callable[..., Ran], hubert: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    state = read(hubert[0])
    average = {key: value * 0.5 for key, value in state["model"].items()}
    state["extra_state"] |= {"ema": average, "ema_fp32_params": average}
    torch.save(state, tmp_path / "x.pt")
    done = command("inspect", "x.pt")
    assert "averages      of the weights, in extra_state.ema: --ema takes them" in done.text
    assert done.data["conversion"]["notes"] == [
        "a moving average of the weights is in `extra_state.ema`: --ema takes it"
    ]
    assert command("plan", hubert[0], "--ema").error == (
        "error: hubert.pt holds no exponential moving average of a model's weights; nothing was written\n\n"
        "hint: leave --ema out\n"
    )


def test_four_gigabytes_take_no_time(tmp_path: Path, hubert: tuple[Path, torch.nn.Module]) -> None:
    """Only the directory and the pickle are read: a hole of 4 GB beside the model costs nothing."""
    with zipfile.ZipFile(hubert[0]) as archive:
        names = archive.namelist()
        parts = {name: archive.read(name) for name in names}
    with (tmp_path / "large.pt").open("wb") as file:
        file.seek(4_000_000_000)
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                archive.writestr(name, parts[name])
        size = file.tell()
        file.seek(0)
        file.write(b"PK\x03\x04")
    assert size > 4_000_000_000
    inspect(hubert[0])  # imports
    started = time.process_time()
    assert inspect(tmp_path / "large.pt")["conversion"]["ok"]
    large = time.process_time() - started
    started = time.process_time()
    inspect(hubert[0])
    assert large < 10 * (time.process_time() - started) + 0.05


def test_json_is_plain_data(hubert: tuple[Path, torch.nn.Module]) -> None:
    json.dumps(inspect(hubert[0]))


def test_the_settings_of_the_pretrained_model_are_missing(command: Callable[..., Ran], tmp_path: Path) -> None:
    plain = settings(VARIANTS["ctc_base"])
    plain["model"] |= {"w2v_args": None, "w2v_path": "/runs/7/checkpoint_last.pt"}
    write(tmp_path / "x.pt", build("ctc_base"), plain, {})
    done = command("inspect", "x.pt")
    assert "\narchitecture  wav2vec_ctc\n" in done.text
    assert done.text.endswith("\n  hint: pass the pretrained checkpoint: --base PRETRAINED.pt\n")


def test_each_reason_keeps_its_remedy(command: Callable[..., Ran], tmp_path: Path) -> None:
    """Two reasons from two places, one of them found while the plan of the tensors is made."""
    plain = settings(VARIANTS["ctc_base"])
    plain["model"]["w2v_args"]["model"]["unheard_of"] = 3
    write(tmp_path / "x.pt", build("ctc_base"), plain, {})
    known = "if a setting acts while training only, say so: --training-only NAME"
    letters = "pass the dictionary the model was trained with: --dict dict.ltr.txt"
    for name, status in (("inspect", 0), ("plan", 1), ("convert", 1)):
        done = command(name, "x.pt", *(["out"] if name == "convert" else []))
        assert done.status == status
        assert f"hint: {letters}; {known}\n" in done.text + done.error
        answer = done.data["conversion"] if name == "inspect" else done.data
        assert {problem["code"]: problem["hint"] for problem in answer["problems"]} == {
            "no-dictionary": letters,
            "unknown-setting": known,
        }
    done = command("plan", "x.pt", "--head", "classification")
    assert "no-head" in done.error and "--head ctc or --head encoder" in done.error
