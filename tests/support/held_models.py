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


# --- kinds that nobody has reported yet -----------------------------------------------------------------------------------


class Settings(dict):  # type: ignore[type-arg]
    """Attributes and entries alike, as Lightning's `AttributeDict`."""

    __getattr__ = dict.__getitem__


def _under(prefix: str, state: State) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in _weights(state).items()}


def deepspeed(state: State, model: torch.nn.Module, path: Path) -> None:
    """`mp_rank_00_model_states.pt` of DeepSpeed."""
    made = {"module": _under("ssl.", state), "buffer_names": ["ssl.mask_emb"], "optimizer": None, "ds_version": "0.9"}
    torch.save(made | {"global_steps": 3}, path)


def compiled(state: State, model: torch.nn.Module, path: Path) -> None:
    """The keys of `torch.compile` below those of DataParallel, and the model nested deep."""
    torch.save({"run": {"checkpoints": {"last": {"net": {"weights": _under("module._orig_mod.model.", state)}}}}}, path)


def in_a_list(state: State, model: torch.nn.Module, path: Path) -> None:
    """`torch.save([model.state_dict(), epoch])`."""
    torch.save([_weights(state), 3], path)


def with_other_values(state: State, model: torch.nn.Module, path: Path) -> None:
    """A state_dict among whose tensors texts, numbers and another program's own arguments stand."""
    others = {"ssl.version": "1.0", "ssl.step": 7, "ssl.scale": None, "arguments": Namespace(encoder_layers=3, lr=1.0)}
    torch.save({"model": _under("ssl.", state) | others, "args": Namespace(encoder_layers=3, lr=1.0)}, path)


def before_zip(state: State, model: torch.nn.Module, path: Path) -> None:
    """Saved by torch before 1.6, as parameters."""
    weights = {
        key: torch.nn.Parameter(value) if value.is_floating_point() else value for key, value in _weights(state).items()
    }
    torch.save(weights, path, _use_new_zipfile_serialization=False)


INVENTED: dict[str, Callable[[State, torch.nn.Module, Path], None]] = {
    function.__name__: function for function in (deepspeed, compiled, in_a_list, with_other_values, before_zip)
}


def whole_file_inside(state: State, model: torch.nn.Module, path: Path) -> None:
    """fairseq's file as one part of another program's."""
    torch.save({"upstream": dict(state), "head": {"weight": torch.zeros(2)}, "step": 3}, path)


def settings_elsewhere(state: State, model: torch.nn.Module, path: Path) -> None:
    """Lightning, whose hyper-parameters hold the settings of the model that was loaded, and its dictionary."""
    parameters = Settings(lr=1e-4, upstream=Settings(config=state["cfg"], name="pretrained"))
    made = {"pytorch-lightning_version": "2.0.0", "state_dict": _under("model.", state), "hyper_parameters": parameters}
    torch.save(made | {"task_state": state["task_state"]}, path)


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


def contentvec(state: State, layers: int, speaker_layers: int = 2) -> State:
    """A checkpoint of ContentVec's trainer: HuBERT, with layers behind it whose norms are made of a speaker's embedding."""
    torch.manual_seed(9)
    weights = dict(state["model"])
    width, inner = weights["encoder.layers.0.fc1.weight"].shape[::-1]
    for layer in range(layers, layers + speaker_layers):
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            weights[f"encoder.layers.{layer}.self_attn.{name}.weight"] = torch.randn(width, width)
            weights[f"encoder.layers.{layer}.self_attn.{name}.bias"] = torch.randn(width)
        for name, shape in (("fc1", (inner, width)), ("fc2", (width, inner))):
            weights[f"encoder.layers.{layer}.{name}.weight"] = torch.randn(shape)
            weights[f"encoder.layers.{layer}.{name}.bias"] = torch.randn(shape[0])
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            for part in ("weight_ln", "bias_ln"):
                weights[f"encoder.layers.{layer}.{norm}.{part}.weight"] = torch.randn(width, 16)
    for part in ("weight_ln", "bias_ln"):
        weights[f"encoder.cond_layer_norm.{part}.weight"] = torch.randn(width, 16)
    weights |= {"layer_proj.weight": torch.randn(24, width), "layer_proj.bias": torch.randn(24)}
    model = state["cfg"]["model"] | CONTENTVEC | {"_name": "contentvec", "encoder_layers_1": speaker_layers}
    task = state["cfg"]["task"] | {"_name": "contentvec_pretraining", "spk2info": "spk2info.dict", "crop": False}
    return state | {"model": weights, "cfg": state["cfg"] | {"model": model, "task": task}}


# what ContentVec's settings hold beside HuBERT's, and its author's `legacy` files keep
CONTENTVEC = {"encoder_layers_1": 3, "ctr_layers": [-6], "logit_temp_ctr": 0.1, "num_negatives": 100}
CONTENTVEC |= {"cross_sample_negatives": 0, "crop_seq_to_multiple": 1}


def legacy_contentvec(state: State) -> State:
    """What ContentVec's author makes of one, so that fairseq alone loads it: the settings stay."""
    model = state["cfg"]["model"] | CONTENTVEC | {"_name": "hubert"}
    return state | {"cfg": state["cfg"] | {"model": model}}


def around(state: State, name: str, head: dict[str, torch.Tensor], outer: State) -> State:
    """A model that fairseq built around a pretrained one: the head's tensors, and the settings of a checkpoint like it."""
    prefix = "w2v_encoder.w2v_model."
    inside = ("quantizer.", "project_q.", "final_proj.", "label_embs_concat", "target_glu.", "_ema")
    weights = {prefix + key: value for key, value in state["model"].items() if not key.startswith(inside)}
    layer_type = state["cfg"]["model"].get("layer_type", "transformer")
    own = {"_name": name, "w2v_args": state["cfg"] | {"criterion": None}, "layer_type": layer_type}
    model = outer["cfg"]["model"] | own
    return outer | {"model": weights | head, "cfg": outer["cfg"] | {"model": model}}


# kinds that hold everything
COMPLETE: dict[str, Callable[[State, torch.nn.Module, Path], None]] = {
    function.__name__: function
    for function in (
        *(s3prl, cfg_as_args, other_key, prefixed, newer_weight_norm, later_pos_conv, zipped_again),
        *(whole_file_inside, settings_elsewhere),
    )
}
