"""Every layout in which fairseq has kept its settings: each gives the configuration that today's plain dict gives."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_models import VARIANTS, _namespace, save, settings
from omegaconf import OmegaConf
from torch_files import change_pickle, plain, read, same, text

from convert.checkpoint import open_checkpoint
from convert.errors import CheckpointError, PlanError
from convert.package import convert


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the trainer's file holds, as torch reads it."""
    return read(save("ctc_base", tmp_path_factory.mktemp("good") / "good.pt"))


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("layout", ["cfg", "omegaconf", "interpolated", "namespace"])
@pytest.mark.parametrize("variant", ["ctc_base", "pretrained_large"])
def test_layout(variant: str, layout: str, container: str, tmp_path: Path) -> None:
    path = save(variant, tmp_path / "model.pt", layout=layout, container=container, adam=True)
    options: dict[str, Any] = {}
    if layout == "namespace" and variant == "ctc_base":
        save(variant, tmp_path / "with.pt")
        symbols = open_checkpoint(tmp_path / "with.pt").dictionary
        assert symbols is not None
        (tmp_path / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in symbols.symbols[4:]))
        options["dictionary"] = tmp_path / "dict.txt"
    done = same(path, tmp_path, **options)
    with open_checkpoint(path) as opened:
        assert opened.container.kind == container
        assert opened.layout == {"namespace": "args", "interpolated": "omegaconf"}.get(layout, layout)
        assert opened.parts["last_optimizer_state"] == 2 * sum(tensor.nbytes for tensor in read(path)["model"].values())
        assert opened.settings["task"]["normalize"] is VARIANTS[variant].normalize
        assert opened.settings["model"]["_name"] == done.model.fairseq


@pytest.mark.parametrize("task", ["temp_sampled_audio_pretraining", "multiple_train_files", "my_own_task"])
def test_task_that_no_fairseq_knows(task: str, good: dict[str, Any], tmp_path: Path) -> None:
    own = good["cfg"]["task"] | {"_name": task, "multi_corpus_keys": ["a"], "sampling_alpha": 0.5}
    torch.save(good | {"cfg": good["cfg"] | {"task": own}}, tmp_path / "model.pt")
    same(tmp_path / "model.pt", tmp_path)


INNER: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": lambda plain: plain,
    "Namespace": _namespace,
    "DictConfig": OmegaConf.create,
}


@pytest.mark.parametrize("outer", ["cfg", "args"])
@pytest.mark.parametrize("kind", INNER)
def test_pretrained_settings_as(kind: str, outer: str, good: dict[str, Any], tmp_path: Path) -> None:
    plain = settings(VARIANTS["ctc_base"])
    inner = INNER[kind](plain["model"]["w2v_args"])
    if outer == "cfg":
        plain["model"]["w2v_args"] = inner
        state = good | {"cfg": plain}
    else:
        flat = _namespace(plain)
        flat.w2v_args = inner
        state = {key: value for key, value in good.items() if key != "cfg"} | {"args": flat}
    torch.save(state, tmp_path / "model.pt")
    done = same(tmp_path / "model.pt", tmp_path)
    values = {value.name: value.value for value in done.model.config}
    assert (values["num_attention_heads"], values["hidden_dropout"], values["layerdrop"]) == (4, 0.06, 0.02)


@pytest.mark.parametrize("how", ["None", "absent"])
def test_pretrained_settings_from_the_base_checkpoint(how: str, good: dict[str, Any], tmp_path: Path) -> None:
    plain = settings(VARIANTS["ctc_base"])
    plain["model"]["w2v_args"] = None
    if how == "absent":
        del plain["model"]["w2v_args"]
    torch.save(good | {"cfg": plain}, tmp_path / "model.pt")
    with pytest.raises(PlanError) as raised:
        convert(tmp_path / "model.pt", tmp_path / "model")
    assert (raised.value.code, raised.value.hint) == (
        "no-base-settings",
        "pass the pretrained checkpoint: --base base.pt",
    )
    base = save("pretrained_base", tmp_path / "base.pt")
    same(tmp_path / "model.pt", tmp_path, base=base)


def _omegaconf(value: Any, keys: tuple[str, str]) -> bytes:
    """Opcodes of a DictConfig as omegaconf 2 (`_content`, `_val`) and 1 (`content`, values bare) pickled it."""
    content, leaf = keys
    if isinstance(value, dict):
        pairs = b"".join(text(key) + _omegaconf(child, keys) for key, child in value.items())
        return b"comegaconf.dictconfig\nDictConfig\n)\x81}(" + text(content) + b"}(" + pairs + b"uub"
    if isinstance(value, list):
        items = b"".join(_omegaconf(child, keys) for child in value)
        return b"comegaconf.listconfig\nListConfig\n)\x81}(" + text(content) + b"](" + items + b"eub"
    bare = plain(value)
    return b"comegaconf.nodes\nAnyNode\n)\x81}(" + text(leaf) + bare + b"ub" if leaf else bare


@pytest.mark.parametrize("keys", [("_content", "_val"), ("content", "")], ids=["omegaconf-2", "omegaconf-1"])
def test_older_omegaconf(keys: tuple[str, str], good: dict[str, Any], tmp_path: Path) -> None:
    torch.save(good | {"cfg": "MARKER"}, tmp_path / "model.pt")
    configuration = settings(VARIANTS["ctc_base"])
    configuration["model"]["normalize"] = "${task.normalize}"
    change_pickle(tmp_path / "model.pt", lambda whole: whole.replace(text("MARKER"), _omegaconf(configuration, keys)))
    done = convert(tmp_path / "model.pt", tmp_path / "model")
    torch.save(good, tmp_path / "plain.pt")
    assert done.model.config == convert(tmp_path / "plain.pt", tmp_path / "plain").model.config
    with open_checkpoint(tmp_path / "model.pt") as opened:
        assert opened.layout == "omegaconf"
        assert opened.settings["model"]["normalize"] is False


def test_enum_in_the_settings(good: dict[str, Any], tmp_path: Path) -> None:
    plain = settings(VARIANTS["ctc_base"])
    plain["model"]["w2v_args"]["model"]["activation_fn"] = "MARKER"
    torch.save(good | {"cfg": plain}, tmp_path / "model.pt")
    member = b"cfairseq.dataclass.constants\nChoices\n" + text("relu") + b"\x85R"
    change_pickle(tmp_path / "model.pt", lambda whole: whole.replace(text("MARKER"), member))
    done = convert(tmp_path / "model.pt", tmp_path / "model")
    assert {value.name: value.value for value in done.model.config}["hidden_act"] == "relu"


def test_empty_namespace(good: dict[str, Any], tmp_path: Path) -> None:
    torch.save(good | {"cfg": None, "args": Namespace()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as raised:
        convert(tmp_path / "model.pt", tmp_path / "model")
    assert raised.value.code == "no-settings"
