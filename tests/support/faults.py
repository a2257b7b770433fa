"""Single faults for a converted model, and what `verify` reports of each."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from environments import recorded_elsewhere
from safetensors.numpy import load_file, save_file
from verify_models import edit

from convert.errors import ConvertError
from convert.verification import verify

Fault = Callable[[Path], None]


# Faults that outputs cannot show: the mask is for training; a bias on all keys alike leaves the attention as it is
SILENT = ("masked_spec_embed", "k_proj.bias")


def in_weights(change: Callable[[dict[str, Any]], None]) -> Fault:
    def fault(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        made = {name: np.array(value, order="C") for name, value in tensors.items()}
        save_file(made, model / "model.safetensors", metadata={"format": "pt"})

    return fault


def perturbed(name: str) -> Fault:
    def change(tensors: dict[str, Any]) -> None:
        flat = tensors[name].reshape(-1)
        flat[len(flat) // 2] += 0.05

    return in_weights(change)


def swapped(one: str, other: str) -> Fault:
    def change(tensors: dict[str, Any]) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return in_weights(change)


def transposed(name: str) -> Fault:
    return in_weights(lambda tensors: tensors.update({name: tensors[name].T.copy()}))


def rolled(name: str) -> Fault:
    return in_weights(lambda tensors: tensors.update({name: np.roll(tensors[name], 1, axis=0)}))


def weight_faults(model: Path) -> dict[str, Fault]:
    """Perturb every tensor; roll every matrix; transpose the square ones; swap pairs of one shape in one layer."""
    tensors = load_file(model / "model.safetensors")
    faults = {f"perturbed {name}": perturbed(name) for name in tensors}
    for name, value in tensors.items():
        if value.ndim >= 2 and value.shape[0] > 1:
            faults[f"rolled {name}"] = rolled(name)
        if value.ndim == 2 and value.shape[0] == value.shape[1]:
            faults[f"transposed {name}"] = transposed(name)
    for one, other in itertools.combinations(tensors, 2):
        layer = one.rpartition(".")[0].rpartition(".")[0]
        alike = tensors[one].shape == tensors[other].shape and one.rpartition(".")[2] == other.rpartition(".")[2]
        if alike and layer == other.rpartition(".")[0].rpartition(".")[0]:
            faults[f"swapped {one} and {other}"] = swapped(one, other)
    return faults


def settings(file: str, **changes: Any) -> Fault:
    return lambda model: edit(model / file, **changes)


def config_faults(model: Path) -> dict[str, Fault]:
    """Every value of config.json that changes what the model computes, or whether it can be loaded."""
    config = json.loads((model / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    wrong: dict[str, list[Any]] = {
        "hidden_act": ["relu", "gelu_new"],
        "feat_extract_activation": ["relu", "gelu_new"],
        "do_stable_layer_norm": [not config["do_stable_layer_norm"]],
        "num_attention_heads": [heads * 2, heads // 2, 1],
        "layer_norm_eps": [1e-6, 1e-3, 1.0001e-5],
        "conv_stride": [[5, 2, 2, 1], [4, 2, 2, 2]],
        "conv_kernel": [[10, 3, 2, 2]],
        "conv_dim": [[32, 32, 32, 16]],
        "conv_bias": [not config["conv_bias"]],
        "feat_extract_norm": ["layer" if config["feat_extract_norm"] == "group" else "group"],
        "num_hidden_layers": [layers - 1, layers + 1],
        "num_feat_extract_layers": [3],
        "num_conv_pos_embeddings": [17],
        "num_conv_pos_embedding_groups": [2],
        "hidden_size": [32],
        "intermediate_size": [64],
        "add_adapter": [True],
        "architectures": [["Wav2Vec2ForSequenceClassification"]],
    }
    if "vocab_size" in config:
        wrong |= {"vocab_size": [31], "pad_token_id": [1]}
    else:
        wrong |= {"num_codevector_groups": [1], "num_codevectors_per_group": [20], "codevector_dim": [24]}
        wrong |= {"proj_codevector_dim": [16]}
    return {
        f"{name} = {value}": settings("config.json", **{name: value})
        for name, values in wrong.items()
        for value in values
    }


def processor_faults(model: Path) -> dict[str, Fault]:
    """Vocabulary permutations, and the values of the tokenizer and the feature extractor that change what they make."""
    features = json.loads((model / "preprocessor_config.json").read_text())
    made = {
        "do_normalize": settings("preprocessor_config.json", do_normalize=not features["do_normalize"]),
        "sampling_rate": settings("preprocessor_config.json", sampling_rate=8000),
        "return_attention_mask": settings("preprocessor_config.json", return_attention_mask=False),
        "padding_side": settings("preprocessor_config.json", padding_side="left"),
        "padding_value": settings("preprocessor_config.json", padding_value=1.0),
    }
    if not (model / "vocab.json").exists():
        return made
    vocabulary = json.loads((model / "vocab.json").read_text())
    names = list(vocabulary)
    for one, other in [*itertools.pairwise(names[:14]), ("<pad>", "|"), ("E", "Z"), ("</s>", "<unk>"), ("|", "Z")]:
        made[f"{one} and {other} exchanged"] = settings(
            "vocab.json", **{one: vocabulary[other], other: vocabulary[one]}
        )
    made["all symbols moved by one"] = settings(
        "vocab.json", **{name: 4 + (index - 3) % (len(names) - 4) for name, index in vocabulary.items() if index > 3}
    )
    made["a symbol renamed"] = lambda model: edit(model / "vocab.json", E=None, Ё=vocabulary["E"])
    made["a symbol added"] = settings("vocab.json", Ё=len(names))
    made["do_lower_case"] = settings("tokenizer_config.json", do_lower_case=True)
    made["pad_token"] = settings("tokenizer_config.json", pad_token="<s>")
    made["replace_word_delimiter_char"] = settings("tokenizer_config.json", replace_word_delimiter_char="_")
    return made


def outcomes(pair: tuple[Path, Path], fault: Fault, work: Path) -> list[set[str]]:
    """The codes that a damaged copy is reported with: by fairseq in this process, and by what it answered elsewhere."""
    copy = work / "damaged"
    shutil.copytree(pair[1], copy)
    try:
        fault(copy)
        return [_codes(pair[0], copy), _codes(pair[0], copy, reference=recorded_elsewhere(*pair))]
    finally:
        shutil.rmtree(copy)


def reported(pair: tuple[Path, Path], fault: Fault, work: Path) -> set[str]:
    """The codes that a fault is reported with in every way."""
    return set.intersection(*outcomes(pair, fault, work))


def _codes(checkpoint: Path, model: Path, **options: Any) -> set[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # damaged copies need not outlive a power failure
        try:
            done = verify(checkpoint, model, devices=["cpu"], write=False, **options)
        except ConvertError as error:  # it does not load: the answer is no
            assert error.status == 1
            return {error.code}
    assert done.passed == (done.problems == ())
    return {problem.code for problem in done.problems}
