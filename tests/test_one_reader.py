"""Our reader against torch's and fairseq's own: every tensor, every setting, of every kind of checkpoint, layout and container."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from every_kind import KINDS
from omegaconf import OmegaConf
from torch_files import read

from convert.checkpoint import open_checkpoint
from convert.verification.fairseq_side.weights import Weights
from convert.verification.handed import handed


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
        return {"model": {"_name": "wavlm"} | found, "task": {"normalize": found["normalize"]}, "criterion": {}}
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
