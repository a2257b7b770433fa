"""Building fairseq's models from settings, without their tasks' data; which family builds and runs which is found in this folder."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import pkgutil
from typing import Any

import torch

from .importing import CannotBuildError


def families() -> Any:
    """Every module of this folder; a family's has `ENCODERS`, `ARCHITECTURES` or a context manager `patched`."""
    package = importlib.import_module(__package__)
    found = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module("%s.%s" % (__package__, name)) for name in found if not name.startswith("_")]


def architectures() -> Any:
    """fairseq's name of an architecture -> what builds its model, and what runs it."""
    return {name: pair for family in families() for name, pair in getattr(family, "ARCHITECTURES", {}).items()}


def encoders() -> Any:
    """fairseq's name of an encoder -> its module, its configuration's class, its model's class."""
    return {name: classes for family in families() for name, classes in getattr(family, "ENCODERS", {}).items()}


def complete(cls: Any, values: Any, ignored: list[str]) -> Any:
    """All fields of a fairseq configuration: the checkpoint's values, fairseq's defaults for the rest."""
    known = {}
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if isinstance(default, str) and (default.startswith("${") or default == "???"):
            default = None
        known[field.name] = getattr(default, "value", default)
    ignored += sorted(
        "%s=%r" % (key, values[key]) for key in values if key not in known and key != "_name" and values[key]
    )
    return dict(known, **{key: _as(known[key], value) for key, value in values.items() if key in known})


def _as(default: Any, value: Any) -> Any:
    """Give a setting its field's type: argparse kept `latent_temp` as the text of a tuple until 2020."""
    is_text = isinstance(value, str) and isinstance(default, (list, tuple))
    return list(ast.literal_eval(value)) if is_text else value


def build(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build fairseq's model as `task.build_model` does, without the task's data.

    Args:
        settings: `{"model", "task"}`; a fine-tuned model's `model` holds the pretrained one's as `w2v_args`.
        symbols: the number of symbols in the dictionary.
        ignored: settings this fairseq does not know and that are set are added here.
        patches: the narrow fixes of fairseq's own mistakes that it took are added here.
    """
    builder, _ = architectures()[settings["model"]["_name"]]
    with contextlib.ExitStack() as stack:
        for family in families():
            if hasattr(family, "patched"):
                stack.enter_context(family.patched(patches))
        return builder(settings, symbols, ignored, patches)


def classes_of(name: str) -> tuple[Any, Any]:
    """The configuration's class and the model's class of an encoder."""
    module, configuration, model = encoders()[name]
    found = importlib.import_module(module)
    return getattr(found, configuration, None), getattr(found, model)


def outer(settings: Any) -> Any:
    """The model's own settings, without those of the pretrained one inside."""
    return {key: value for key, value in settings["model"].items() if key not in ("flat", "w2v_args")}


def build_pretrained(settings: Any, symbols: int, ignored: list[str], patches: list[str]) -> Any:
    """Build an encoder as it was pretrained."""
    configuration, model = classes_of(settings["model"]["_name"])
    normalize = bool(settings["task"].get("normalize", False))
    if configuration is None:  # 0.10: one flat Namespace
        return model.build_model(flat(outer(settings), normalize))
    from omegaconf import OmegaConf

    return model.build_model(OmegaConf.create(complete(configuration, outer(settings), ignored)), None)


def fine_tuned(settings: Any, cls: Any, ignored: list[str]) -> Any:
    """The configuration of a fine-tuned model, the pretrained one's inside.

    Args:
        settings: see `build`.
        cls: the dataclass of the fine-tuned model's configuration.
        ignored: see `build`.
    """
    from omegaconf import OmegaConf

    pretrained = settings["model"]["w2v_args"]["model"]
    name = pretrained.get("_name") or "wav2vec2"
    if "adp_num" not in {field.name for field in dataclasses.fields(cls)} and "trf_adp" in (
        settings["model"].get("layer_type"),
        pretrained.get("layer_type"),
    ):
        raise CannotBuildError("this fairseq has no adapters (layer_type trf_adp came in May 2023)")
    normalize = bool(settings["task"].get("normalize", False))
    made = complete(classes_of(name)[0], pretrained, ignored)
    own = complete(cls, outer(settings), [] if "flat" in settings["model"] else ignored)
    own = dict(own, data="", normalize=normalize, ddp_backend="legacy_ddp", w2v_path="")
    for field in ("layer_type", "adp_num", "adp_dim", "adp_act_fn", "adp_trf_idx"):
        own[field] = outer(settings).get(
            field
        )  # fairseq main's defaults would replace those of older pretrained models
    task = {"_name": "audio_pretraining", "data": "", "normalize": normalize, "sample_rate": 16000}
    own["w2v_args"] = {"model": dict(made, _name=name), "task": task, "criterion": None, "lr_scheduler": None}
    return OmegaConf.create(own)


def flat(values: Any, normalize: bool) -> Any:
    """Settings as fairseq 0.10 wants them."""
    from argparse import Namespace

    made = {key: value for key, value in values.items() if key != "_name"}
    if not isinstance(made.get("latent_temp", ""), str):
        made["latent_temp"] = str(tuple(made["latent_temp"]))
    fixed = dict(arch="wav2vec2", task="audio_pretraining", criterion="wav2vec", data="", normalize=normalize)
    return Namespace(**dict(made, labels=None, enable_padding=False, **fixed))


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
