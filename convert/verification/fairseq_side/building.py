"""Building fairseq's models from settings, without their tasks' data; which family builds and runs which is found in this folder."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib
import pkgutil
import sys
import types
from typing import Any

import torch

from .importing import CannotBuildError

# An encoder that fairseq can pretrain: its module, the classes there of its configuration and its model, what runs it,
# fairseq's name of its task, and values for settings that its configuration leaves to the task
Encoder = collections.namedtuple("Encoder", ["module", "configuration", "model", "reference", "task", "defaults"])


def families() -> Any:
    """Every module of this folder; a family's has `ENCODERS`, `ARCHITECTURES` or a context manager `patched`."""
    package = importlib.import_module(__package__)
    found = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module("%s.%s" % (__package__, name)) for name in found if not name.startswith("_")]


def architectures() -> Any:
    """fairseq's name of a model around an encoder, or without one -> what builds it, and what runs it."""
    return {name: pair for family in families() for name, pair in getattr(family, "ARCHITECTURES", {}).items()}


def encoders() -> Any:
    """fairseq's name of an encoder -> what it is."""
    return {name: encoder for family in families() for name, encoder in getattr(family, "ENCODERS", {}).items()}


def parts_of(settings: Any) -> tuple[Any, Any]:
    """What builds a model, and the class that runs it: that of its encoder, of what is around it, or made of both."""
    name, inner = settings["model"]["_name"], settings["model"].get("w2v_args")
    known = encoders()
    if name in known:
        return build_pretrained, known[name].reference
    if name not in architectures():
        raise CannotBuildError("%s: no file in fairseq_side builds this architecture" % name)
    builder, around = architectures()[name]
    if not inner:
        return builder, around
    return builder, type(around.__name__, (encoder_of(inner["model"]).reference, around), {})


def encoder_of(settings: Any) -> Any:
    """The encoder that settings are of; omegaconf dropped the name for a time."""
    name = settings.get("_name") or "wav2vec2"
    if name not in encoders():
        raise CannotBuildError("%s: no file in fairseq_side builds this encoder" % name)
    return encoders()[name]


def build(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build fairseq's model as `task.build_model` does, without the task's data.

    Args:
        settings: `{"model", "task"}`; a fine-tuned model's `model` holds the pretrained one's as `w2v_args`.
        symbols: the number of symbols in the dictionary.
        ignored: the names of settings that are set and that this fairseq does not know are added here.
        patches: the narrow fixes of fairseq's own mistakes that it took are added here.
    """
    with contextlib.ExitStack() as stack:
        for family in families():
            if hasattr(family, "patched") and "fairseq" in sys.modules:
                stack.enter_context(family.patched(patches))
        return parts_of(settings)[0](settings, symbols, ignored, patches)


def build_pretrained(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build an encoder as it was pretrained, without the dictionaries of its pretraining."""
    encoder = encoder_of(settings["model"])
    configuration, model = classes_of(encoder)
    if configuration is None:  # 0.10: one flat Namespace
        return model.build_model(flat(outer(settings), normalized(settings)))
    from omegaconf import OmegaConf

    task = types.SimpleNamespace(cfg=types.SimpleNamespace(sample_rate=16000), dictionaries=[None])
    return model.build_model(OmegaConf.create(complete(configuration, outer(settings), ignored, encoder)), task)


def fine_tuned(settings: Any, cls: Any, ignored: list[str], **fixed: Any) -> Any:
    """The configuration of a fine-tuned model, the pretrained one's inside.

    Args:
        settings: see `build`.
        cls: the dataclass of the fine-tuned model's configuration.
        ignored: see `build`.
        fixed: settings whose value is not the checkpoint's to say.
    """
    from omegaconf import OmegaConf

    pretrained = settings["model"]["w2v_args"]["model"]
    encoder, normalize = encoder_of(pretrained), normalized(settings)
    if "adp_num" not in {field.name for field in dataclasses.fields(cls)} and "trf_adp" in (
        settings["model"].get("layer_type"),
        pretrained.get("layer_type"),
    ):
        raise CannotBuildError("this fairseq has no adapters (layer_type trf_adp came in May 2023)")
    inner = complete(classes_of(encoder)[0], pretrained, ignored, encoder)
    own = complete(cls, outer(settings), [] if "flat" in settings["model"] else ignored)
    own.update(fixed, data="", normalize=normalize, ddp_backend="legacy_ddp", w2v_path="")
    for field in ("layer_type", "adp_num", "adp_dim", "adp_act_fn", "adp_trf_idx"):
        # fairseq main's defaults would replace those of older pretrained models
        own[field] = outer(settings).get(field)
    inner["_name"] = pretrained.get("_name") or "wav2vec2"
    task = {"_name": encoder.task, "data": "", "normalize": normalize, "sample_rate": 16000}
    own["w2v_args"] = {"model": inner, "task": task, "criterion": None, "lr_scheduler": None}
    return OmegaConf.create(own)


def complete(cls: Any, values: Any, ignored: list[str], encoder: Any = None) -> dict[str, Any]:
    """All fields of a fairseq configuration: the checkpoint's values, fairseq's defaults for the rest."""
    known = dict.fromkeys(field.name for field in dataclasses.fields(cls))
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if not isinstance(default, str) or not default.startswith(("${", "???")):
            known[field.name] = getattr(default, "value", default)
    ignored += sorted(key for key, value in values.items() if key not in known and key != "_name" and value)
    known.update((key, value) for key, value in values.items() if key in known)
    for key, value in (encoder.defaults if encoder else {}).items():
        known[key] = known[key] or value
    return known


def classes_of(encoder: Any) -> tuple[Any, Any]:
    """The configuration's class and the model's class of an encoder."""
    found = importlib.import_module(encoder.module)
    return getattr(found, encoder.configuration, None), getattr(found, encoder.model)


def outer(settings: Any) -> Any:
    """The model's own settings, without those of the pretrained one inside."""
    return {key: value for key, value in settings["model"].items() if key not in ("flat", "w2v_args")}


def normalized(settings: Any) -> bool:
    """Whether the task normalises waveforms."""
    return bool(settings["task"].get("normalize", False))


def flat(values: Any, normalize: bool) -> Any:
    """Settings as fairseq 0.10 wants them."""
    from argparse import Namespace

    made = {key: value for key, value in values.items() if key != "_name"}
    if "latent_temp" in made:  # numbers, which 0.10 evaluates out of a text
        made["latent_temp"] = str(tuple(made["latent_temp"]))
    fixed = dict(arch="wav2vec2", task="audio_pretraining", criterion="wav2vec", data="", normalize=normalize)
    return Namespace(**dict(made, labels=None, enable_padding=False, w2v_path="", **fixed))


@contextlib.contextmanager
def no_random_numbers() -> Any:
    """Skip the random values of a new model: every one is replaced by `Reference.fill`, which misses none."""
    names = ("normal_", "uniform_")
    originals = {name: getattr(torch.Tensor, name) for name in names}
    for name in names:
        setattr(torch.Tensor, name, lambda self, *_, **__: self)
    try:
        yield
    finally:
        for name in names:
            setattr(torch.Tensor, name, originals[name])
