"""Files as people hold them: real fairseq models that other programs saved anew, trimmed or wrapped.

Each function writes one kind of file from a checkpoint of fairseq's trainer, as torch reads it. What such a file lacks comes
from `--base`.
"""

from __future__ import annotations

import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch_files import entries

State = dict[str, Any]


class FrontEnd(torch.nn.Module):
    """How SSL_Anti-spoofing holds its model: `self.model = model[0]` of what fairseq loaded."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.out_dim = 64


class Countermeasure(torch.nn.Module):
    """A classifier of another project, with a few layers of its own around the front end."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.ssl_model = FrontEnd(model)
        self.LL = torch.nn.Linear(64, 8)
        self.first_bn = torch.nn.BatchNorm2d(1)


def _weights(state: State) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in state["model"].items() if isinstance(value, torch.Tensor)}


def _classifier(state: State, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return torch.nn.DataParallel(Countermeasure(model)).state_dict()


def bare(state: State, model: torch.nn.Module, path: Path) -> None:
    """`torch.save(model.state_dict(), path)`."""
    torch.save(_weights(state), path)


def model_alone(state: State, model: torch.nn.Module, path: Path) -> None:
    """A checkpoint from which somebody removed everything but the weights."""
    torch.save({"model": _weights(state)}, path)


def countermeasure(state: State, model: torch.nn.Module, path: Path) -> None:
    """SSL_Anti-spoofing: `torch.save(model.state_dict(), path)` of a DataParallel, with a classifier beside the front end."""
    torch.save(_classifier(state, model), path)


def countermeasure_inside(state: State, model: torch.nn.Module, path: Path) -> None:
    """The same with an optimizer and that program's own arguments."""
    arguments = Namespace(database_path="/data", batch_size=14, lr=1e-6, model=None, loss="weighted_CCE")
    torch.save({"model_state_dict": _classifier(state, model), "epoch": 7, "args": arguments}, path)


def renamed_by_hand(state: State, model: torch.nn.Module, path: Path) -> None:
    """Keys as somebody liked them, under a key that nobody else uses."""
    weights = {f"encoders.speech.0.{key}": value for key, value in _weights(state).items()}
    torch.save({"generator": weights | {"decoder.weight": torch.zeros(3)}, "step": 3}, path)


def lightning(state: State, model: torch.nn.Module, path: Path) -> None:
    """A checkpoint of PyTorch Lightning 1.9, as UTMOS's trainer writes it."""
    weights = {f"feature_extractors.0.ssl_model.{key}": value for key, value in _weights(state).items()}
    weights["output_layers.0.net.0.weight"] = torch.randn(4, 64)
    moments = {0: {"step": 3, "exp_avg": torch.randn(4, 64), "exp_avg_sq": torch.randn(4, 64)}}
    made = {"epoch": 2, "global_step": 300, "pytorch-lightning_version": "1.9.0", "state_dict": weights, "loops": {}}
    made |= {"callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_score": torch.tensor(0.5)}}}
    made |= {"optimizer_states": [{"state": moments, "param_groups": []}], "lr_schedulers": []}
    torch.save(made | {"hyper_parameters": {"cfg": {"model": {"_target_": "lightning_module.Baseline"}}}}, path)


def whole_module(state: State, model: torch.nn.Module, path: Path) -> None:
    """`torch.save(model, path)`: the module itself, pickled."""
    torch.save(torch.nn.DataParallel(Countermeasure(model)), path)


def safetensors(state: State, model: torch.nn.Module, path: Path) -> None:
    """A safetensors file with fairseq's names."""
    save_file({key: value.contiguous() for key, value in _weights(state).items()}, path, metadata={"format": "pt"})


# kinds that hold no settings
WITHOUT_SETTINGS: dict[str, Callable[[State, torch.nn.Module, Path], None]] = {
    function.__name__: function
    for function in (
        *(bare, model_alone, countermeasure, countermeasure_inside, renamed_by_hand),
        *(lightning, whole_module, safetensors),
    )
}


def s3prl(state: State, model: torch.nn.Module, path: Path) -> None:
    """What s3prl's `load_and_convert_fairseq_ckpt` writes."""
    made = {"task_cfg": state["cfg"]["task"], "model_cfg": state["cfg"]["model"], "model_weight": state["model"]}
    dictionaries = state["task_state"].get("dictionaries")
    if dictionaries:
        made["dictionaries_symbols"] = [dictionary.symbols for dictionary in dictionaries]
    torch.save(made, path)


def cfg_as_args(state: State, model: torch.nn.Module, path: Path) -> None:
    """Somebody's own trainer: `{"model", "args"}`, the settings a plain dict."""
    torch.save({"model": state["model"], "args": state["cfg"], "task_state": state["task_state"]}, path)


def other_key(state: State, model: torch.nn.Module, path: Path) -> None:
    """The state_dict under another key, everything else in its place."""
    torch.save({"state_dict": state["model"], "cfg": state["cfg"], "task_state": state["task_state"]}, path)


def prefixed(state: State, model: torch.nn.Module, path: Path) -> None:
    """fairseq's file with the keys of DistributedDataParallel."""
    torch.save(state | {"model": {f"module.{key}": value for key, value in state["model"].items()}}, path)


def newer_weight_norm(state: State, model: torch.nn.Module, path: Path) -> None:
    """The names of `torch.nn.utils.parametrizations.weight_norm`."""
    names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    weights = {}
    for key, value in state["model"].items():
        stem, _, last = key.rpartition(".")
        weights[f"{stem}.{names[last]}" if last in names else key] = value
    torch.save(state | {"model": weights}, path)


def later_pos_conv(state: State, model: torch.nn.Module, path: Path) -> None:
    """A fork with another module before the positional convolution."""
    weights = {
        key.replace("encoder.pos_conv.0.", "encoder.pos_conv.1."): value for key, value in state["model"].items()
    }
    torch.save(state | {"model": weights}, path)


def zipped_again(state: State, model: torch.nn.Module, path: Path) -> None:
    """Unpacked and zipped by an archiver, which compresses, and lists folders."""
    torch.save(state, path)
    content = entries(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder in ("checkpoint/", "checkpoint/data/"):
            archive.writestr(folder, b"")
        for name in sorted(content):
            archive.writestr(f"checkpoint/{name}", content[name])


# kinds that hold everything
COMPLETE: dict[str, Callable[[State, torch.nn.Module, Path], None]] = {
    function.__name__: function
    for function in (s3prl, cfg_as_args, other_key, prefixed, newer_weight_norm, later_pos_conv, zipped_again)
}
