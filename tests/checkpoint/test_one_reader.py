"""Our reader against torch's and fairseq's own: every tensor, every setting, of every kind of checkpoint, layout and container."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import classification_models
import data2vec_models
import hubert_models
import numpy as np
import pytest
import torch
from every_kind import KINDS
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from torch_files import read
from verify_models import few_inputs, short_inputs

from convert.checkpoint import open_checkpoint
from convert.package import convert
from convert.verification import verify
from convert.verification.fairseq_side import opening
from convert.verification.fairseq_side.importing import CannotBuildError
from convert.verification.fairseq_side.numerics import ALIGNMENT
from convert.verification.fairseq_side.weights import Weights
from convert.verification.handed import handed, plain_settings


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    made: dict[str, Path] = {}

    class Made(dict[str, Path]):
        def __missing__(self, kind: str) -> Path:
            self[kind] = KINDS[kind](tmp_path_factory.mktemp("kind"))[0]
            return self[kind]

    yield Made(made)


def ours(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
    """What fairseq's side maps: the model's tensors, those of each language; and the settings that we read."""
    with open_checkpoint(path) as opened:
        request = handed(opened, "", opened.settings, ())
        weights = Weights(request["files"])
        groups = {name: weights.read(group["tensors"]) for name, group in request["groups"].items()}
        return weights.read(request["tensors"]), groups, opened.settings


def equal(mine: Any, theirs: Any) -> bool:
    return mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_torchs(kind: str, paths: dict[str, Path]) -> None:
    tensors, groups, _ = ours(paths[kind])
    state = read(paths[kind])
    theirs = {key: value for key, value in state["model"].items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() == theirs.keys()
    assert [key for key in theirs if not equal(tensors[key], theirs[key])] == []
    assert {name: set(group) for name, group in groups.items()} == {
        name: set(group["model"]) for name, group in state.get("adapter", {}).items()
    }
    for name, group in groups.items():
        assert [key for key in group if not equal(group[key], state["adapter"][name]["model"][key])] == []
    first = next(iter(theirs))  # the control
    assert not equal(tensors[first], theirs[first] + 1)


@contextlib.contextmanager
def unpickling() -> Iterator[None]:
    """Let fairseq's loader call `torch.load` as it did before torch 2.6."""
    with pytest.MonkeyPatch.context() as patch:
        plain = torch.load
        patch.setattr(torch, "load", lambda *a, **k: plain(*a, **k | {"weights_only": False}))
        yield


def plain(value: Any) -> Any:
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True, enum_to_str=True)
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    return [plain(child) for child in value] if isinstance(value, (list, tuple)) else value


def theirs(path: Path, kind: str) -> Any:
    """The settings as fairseq's loader leaves them; as torch does, where that fails."""
    from fairseq import checkpoint_utils

    if kind == "ctc-2020":  # hydra 1.3 takes no Namespace inside of another
        return plain(read(path)["args"])
    if kind == "wavlm":  # has the settings of unilm's model alone
        found = plain(read(path)["cfg"])
        return {"model": found, "task": {"normalize": found["normalize"]}, "criterion": {}}
    with unpickling():
        return plain(checkpoint_utils.load_checkpoint_to_cpu(str(path))["cfg"])


def differing(mine: Any, others: Any) -> list[str]:
    """The settings that are not fairseq's, which puts those of a Namespace into sections, and leaves out what it does not know."""
    if "model" not in others:  # flat
        others = {"model": others, "task": others, "criterion": others}
    flat = mine["model"].get("flat", False)
    wrong = []
    for section in ("model", "task", "criterion"):
        values, read_by_us = others.get(section) or {}, mine[section]
        values = {"_name": values.pop("arch", read_by_us["_name"])} | values if "arch" in values else values
        for name in values.keys() if flat else values.keys() | read_by_us.keys() - {"w2v_args"}:
            if name == "w2v_args":
                continue
            if (name in read_by_us or not flat) and read_by_us.get(name, ...) != values.get(name, ...):
                wrong.append(f"{section}.{name}")
    if isinstance(mine["model"].get("w2v_args"), dict):
        wrong += [f"w2v_args.{name}" for name in differing(mine["model"]["w2v_args"], others["model"]["w2v_args"])]
    return wrong


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_fairseqs(kind: str, paths: dict[str, Path]) -> None:
    mine = ours(paths[kind])[2]
    assert differing(mine, theirs(paths[kind], kind)) == []
    inner = mine["model"].get("w2v_args") or mine
    inner["model"]["encoder_layers"] += 1  # the control
    assert [name.rpartition("model.")[2] for name in differing(mine, theirs(paths[kind], kind))] == ["encoder_layers"]


# --- what is handed on ----------------------------------------------------------------------------------------------


HARMFUL = [
    "__import__('os').system('x')",
    "${oc.env:HOME}",
    "a ${b}",
    "???",
    "/etc/passwd",
    "base.pt",
    "f(1)",
    "a.b",
    "[1]",
]


@pytest.mark.parametrize("text", HARMFUL)
def test_no_text_is_handed_on_that_anything_would_evaluate_open_or_resolve(text: str) -> None:
    section = {"activation_fn": text, "w2v_path": text, "nested": {"deep": text}, "listed": [1, text]}
    settings = {"model": section | {"w2v_args": {"model": dict(section)}}, "task": {"data": text, "normalize": True}}
    made = plain_settings(settings, "wav2vec_ctc", ())
    inner = {"model": {"nested": {}}}
    assert made == {"model": {"_name": "wav2vec_ctc", "nested": {}, "w2v_args": inner}, "task": {"normalize": True}}


def test_what_settings_mean_is_handed_on() -> None:
    texts = {"activation_fn": "gelu_fast", "conv_kernel_sizes": "5,5", "adp_trf_idx": "0:24:2", "labels": "ltr"}
    numbers = {"dropout": 0.1, "layer_norm_first": True, "latent_temp": [2, 0.5, 0.999995], "final_dim": None}
    written = {"conv_feature_layers": "[(512, 10, 5)] + [(512, 3, 2)] * 2"}
    made = plain_settings({"model": texts | numbers | written, "task": {}}, "wav2vec2", {"labels"})["model"]
    convolutions = "[(512, 10, 5), (512, 3, 2), (512, 3, 2)]"
    del texts["labels"]  # a text of training
    assert made == texts | numbers | {"_name": "wav2vec2", "conv_feature_layers": convolutions}


VALUES: dict[str, Callable[[], torch.Tensor]] = {
    "aligned": lambda: torch.randn(4, 16),
    "a view": lambda: torch.randn(64)[3:11],
    "transposed": lambda: torch.randn(3, 5).t(),
    "repeated": lambda: torch.randn(1, 4).expand(3, 4),
    "no axis": lambda: torch.tensor(2.5),
    "empty": lambda: torch.zeros(0, 3),
    **{
        str(kind): (lambda kind=kind: (torch.randn(5, 7) * 9).to(kind))
        for kind in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
    },
    "torch.uint8": lambda: torch.arange(9, dtype=torch.uint8),
    "torch.bool": lambda: torch.tensor([True, False, True]),
}


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("name", VALUES)
def test_numbers_of_every_kind(name: str, container: str, paths: dict[str, Path], tmp_path: Path) -> None:
    """Each as torch reads it, and where torch would allocate it; what is there already is mapped, not copied."""
    state = read(paths["ctc"])
    state["model"]["other"] = VALUES[name]()
    path = tmp_path / "model.pt"
    torch.save(state, path, _use_new_zipfile_serialization=container == "zip")
    tensors = ours(path)[0]
    assert equal(tensors["other"], state["model"]["other"])
    assert {value.data_ptr() % ALIGNMENT for value in tensors.values() if value.numel()} == {0}
    assert all(value.is_contiguous() for value in tensors.values())


def test_weights_are_mapped(paths: dict[str, Path]) -> None:
    with open_checkpoint(paths["ctc"]) as opened:
        request = handed(opened, "", opened.settings, ())
    weights = Weights(request["files"])
    start = np.frombuffer(weights.maps[0], np.uint8).ctypes.data
    inside = [
        start <= value.data_ptr() < start + len(weights.maps[0]) for value in weights.read(request["tensors"]).values()
    ]
    assert sum(inside) == len(inside)
    first = next(iter(weights.read(request["tensors"]).values()))
    before = paths["ctc"].read_bytes()
    first.fill_(7)  # stays in this process
    assert paths["ctc"].read_bytes() == before


def test_another_file_is_not_mapped(paths: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(paths["ctc"].read_bytes())
    with open_checkpoint(path) as opened:
        request = handed(opened, "", opened.settings, ())
    other = tmp_path / "other.pt"
    other.write_bytes(path.read_bytes())
    other.replace(path)
    with pytest.raises(CannotBuildError, match="changed meanwhile"):
        Weights(request["files"])


class OwnDictionary(Dictionary):
    """A user's own, as people have them."""


def test_a_dictionary_of_the_users_own(tmp_path: Path) -> None:
    state = read(KINDS["ctc"](tmp_path)[0])
    state["task_state"]["target_dictionary"].__class__ = OwnDictionary
    path = tmp_path / "own.pt"
    torch.save(state, path)
    model = convert(path, tmp_path / "out").path
    with short_inputs(), few_inputs("speech-even", "quiet"):
        assert verify(path, model, devices=["cpu"]).passed


@pytest.mark.parametrize("name", ["hubert", "data2vec"])
def test_fairseqs_classifier_runs_around_other_encoders(name: str, tmp_path: Path) -> None:
    """As files of people have it; the class has a place for any encoder that fairseq pretrains."""
    models, variant = {"hubert": (hubert_models, "hubert_base"), "data2vec": (data2vec_models, "pretrained")}[name]
    encoder, kind = models.build(variant), classification_models.VARIANTS["classification_base"]
    settings, inner = classification_models.settings(kind), models.settings(models.VARIANTS[variant])
    settings["model"] |= {"w2v_args": inner | {"criterion": None}, "normalize": inner["task"]["normalize"]}
    settings["task"]["normalize"] = inner["task"]["normalize"]
    head = classification_models.build("classification_base").state_dict()
    weights = {f"w2v_encoder.w2v_model.{key}": value for key, value in encoder.state_dict().items()}
    weights |= {key: value for key, value in head.items() if key.startswith("pooling_layer.")}
    path = tmp_path / "model.pt"
    torch.save({"cfg": settings, "model": weights, "args": None}, path)
    with open_checkpoint(path) as opened:
        request = handed(opened, "wav2vec_classification", opened.settings, ())
        request |= {"symbols": [*kind.labels], "special": [], "post_process": "none", "language": "", "languages": {}}
        reference = opening.open_reference(request)
    frames, stages = reference.run(torch.randn(1, 4000))
    assert stages["logits"].shape == (1, len(kind.labels)) and frames[0] == len(stages["encoder"])
