"""Tiny real fairseq wav2vec 2.0 CTC models with adapters, one language or several, saved as fairseq and as MMS save them."""

from __future__ import annotations

import ast
import logging
import re
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fairseq
import fairseq_models
import torch
from fairseq.data import Dictionary
from fairseq_models import LARGE, LETTERS, Variant, dictionary

ADAPTERS: dict[str, Any] = {"layer_type": "trf_adp", "adp_num": 1, "adp_dim": 8}
ONE = Variant("ctc", LARGE, ADAPTERS, normalize=True)
ENGLISH = tuple(LETTERS)
HINDI = ("|", "ा", "क", "र", "े", "न", "ह", "ी", "स", "त")
AZERI = ("|", "a", "i", "n", "ə", "r", "l", "d", "'", "-", "ş", "ı")


@dataclass(frozen=True)
class Adapted:
    """One checkpoint.

    `keys` is the task's `multi_corpus_keys`, which names the adapters of the model by index; `languages` are the symbols of
    every language beside the model, in MMS's top-level `adapter`.
    """

    variant: Variant
    keys: str | None = None
    languages: tuple[tuple[str, tuple[str, ...]], ...] = ()


def _adapted(**changes: Any) -> Variant:
    return replace(ONE, fine_tuned=ADAPTERS | changes)


VARIANTS: dict[str, Adapted] = {
    "one": Adapted(ONE, "eng"),
    "one_without_name": Adapted(ONE),
    "one_first_layers": Adapted(_adapted(adp_trf_idx="0:2"), "eng"),
    "one_every_other_layer": Adapted(_adapted(adp_trf_idx="0:3:2"), "eng"),
    "one_no_layer": Adapted(_adapted(adp_trf_idx="1:1"), "eng"),
    "one_blank_add": Adapted(_adapted(blank_weight=1.5, blank_mode="add"), "eng"),
    "several": Adapted(_adapted(adp_num=3), "eng, hin,azj-script_latin"),
    "several_some_layers": Adapted(_adapted(adp_num=2, adp_trf_idx="1:3"), "hin,eng"),
    "mms": Adapted(ONE, "hin", (("azj-script_latin", AZERI), ("eng", ENGLISH), ("hin", HINDI))),
    "mms_without_english": Adapted(ONE, "hin", (("azj-script_latin", AZERI), ("hin", HINDI))),
    "mms_some_layers": Adapted(_adapted(adp_trf_idx="1:3"), "eng", (("eng", ENGLISH), ("hin", HINDI))),
}
# What transformers cannot represent: the setting that is refused -> the model
REFUSED: dict[str, Adapted] = {
    "layer_norm_first": Adapted(replace(ONE, encoder=LARGE | {"layer_norm_first": False}), "eng"),
    "adp_act_fn": Adapted(_adapted(adp_act_fn="gelu"), "eng"),
    "multi_corpus_keys": Adapted(_adapted(adp_num=2)),  # two adapters, and nothing says what they are for
}


def _known(model: Adapted | str) -> Adapted:
    return VARIANTS[model] if isinstance(model, str) else model


def settings(model: Adapted | str) -> dict[str, Any]:
    """The settings as today's trainer writes them."""
    model = _known(model)
    plain = fairseq_models.settings(model.variant)
    plain["task"] |= corpora(model)
    return plain


def corpora(model: Adapted) -> dict[str, Any]:
    """The part of the task's settings that names the adapters."""
    weights = None if model.keys is None else ",".join("1.0" for _ in model.keys.split(","))
    return {"multi_corpus_keys": model.keys, "multi_corpus_sampling_weights": weights}


def build(model: Adapted | str, seed: int = 0) -> torch.nn.Module:
    """Build fairseq's model in eval mode, every parameter random; each adapter acts on the result."""
    made = fairseq_models.build(_known(model).variant, seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".adapter_layer." in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def names_of_language(model: torch.nn.Module) -> list[str]:
    """The parameters that MMS keeps for each language."""
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if ".adapter_layer." in name or name.startswith("w2v_encoder.proj.")]


def language(model: Adapted | str, name: str, seed: int = 0) -> dict[str, Any]:
    """What stands in `adapter[name]`: the tensors of another model of the same kind, and its dictionary."""
    model = _known(model)
    symbols = dict(model.languages)[name]
    own = build(replace(model, variant=replace(model.variant, symbols=symbols)), seed + 1 + len(name) + len(symbols))
    weights = own.state_dict()
    tensors = OrderedDict((key, weights[key].detach().clone()) for key in names_of_language(own))
    return {"model": tensors, "task_state": {"target_dictionary": dictionary(symbols)}}


def save(
    model: Adapted | str, path: Path, *, seed: int = 0, built: torch.nn.Module | None = None, **options: Any
) -> Path:
    """Write a checkpoint; `options` are those of `fairseq_models.save`."""
    model = _known(model)
    built = build(model, seed) if built is None else built
    fairseq_models.save(model.variant, path, model=built, **options)
    state = torch.load(path, weights_only=False)
    state["cfg"]["task"].update(corpora(model))
    if model.languages:
        state["adapter"] = {name: language(model, name, seed) for name, _ in model.languages}
    torch.save(state, path, _use_new_zipfile_serialization=options.get("container", "zip") == "zip")
    return path


def speak(model: torch.nn.Module, checkpoint: dict[str, Any], name: str) -> Dictionary:
    """Give a model one of MMS's languages with fairseq's own lines; return the dictionary that the task then has.

    They stand in the middle of `InferenceProcessor.__init__` (examples/speech_recognition/new/infer.py), which cannot run as a
    whole: its batches need parts of fairseq that are compiled.
    """
    source = (Path(fairseq.__file__).parent / "examples/speech_recognition/new/infer.py").read_text()
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If) and '"adapter" in' in _text(node)]
    assert len(found) == 1
    state: dict[str, Any] = {}
    settings = SimpleNamespace(dataset=SimpleNamespace(gen_subset=f"{name}:dev"))
    processor = SimpleNamespace(cfg=settings, task=SimpleNamespace(load_state_dict=state.update))
    known = {"torch": torch, "re": re, "logger": logging.getLogger("fairseq"), "self": processor, "models": [model]}
    known |= {"ckpt_obj": checkpoint, "saved_cfg": checkpoint["cfg"]}
    exec(compile(ast.Module(found, []), "infer.py", "exec"), known)
    return state["target_dictionary"]


def _text(node: ast.If) -> str:
    return ast.unparse(node.test).replace("'", '"')


@torch.no_grad()
def logits(model: torch.nn.Module, wave: torch.Tensor, row: int = 0) -> torch.Tensor:
    """What fairseq's model computes with one of its stacked adapters: (batch, frames, symbols)."""
    encoder = model.w2v_encoder.w2v_model.encoder
    encoder.required_seq_len_multiple = 1  # as elsewhere: it pads and masks, which rounds otherwise
    return model.get_logits(model(source=wave, padding_mask=None, corpus_key=[row] * len(wave))).transpose(0, 1)
