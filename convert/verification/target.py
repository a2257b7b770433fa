"""The converted model as plain transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convert import loading
from convert.errors import ConvertError
from convert.reading import read_file
from convert.verification.attention import NAME, register
from convert.verification.decoders import EncoderDecoderTarget, SpeechToTextTarget
from convert.verification.watched import ClassificationTarget, Target, running_of

__all__ = ["ClassificationTarget", "EncoderDecoderTarget", "SpeechToTextTarget", "Target", "attention_of", "load"]


def attention_of(name: str) -> Any:
    """Name the attention that a verification loads a class with, that of each part where they differ."""
    attention = running_of(name).attention
    return register() if attention == NAME else attention if isinstance(attention, str) else dict(attention)


def load(model_dir: Path, device: str) -> Target:
    """Load a model directory with plain transformers, in float32, strictly.

    Args:
        model_dir: the directory.
        device: such as `cpu` or `cuda`.

    Raises:
        MismatchError: `load`: a tensor is missing, unexpected or of another shape.
        ConvertError: `load`, status 1: transformers cannot load the directory.
    """
    import torch
    import transformers

    config = loading.load(transformers.AutoConfig, model_dir, status=1)
    name = (config.architectures or [""])[0]
    if not hasattr(transformers, name):
        message = f"{model_dir.name}: transformers {transformers.__version__} has no class {name!r}"
        raise ConvertError(message, code="load", key=model_dir.name, status=1, hint="pip install -U transformers")
    key = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    options = {"attn_implementation": attention_of(name), "config": config}
    stored = getattr(config, key, None)
    half = stored if stored in (torch.float16, torch.bfloat16) else torch.float32  # as stored, so that it stays mapped
    model = loading.load_model(getattr(transformers, name), model_dir, status=1, **{key: half}, **options)
    if half != torch.float32 and _computed(model):
        model = loading.load_model(getattr(transformers, name), model_dir, status=1, **{key: torch.float32}, **options)
    target = _kind(model)(model, device)
    target.current = target.native = language_of(model_dir)
    return target


def _computed(model: Any) -> bool:
    """Whether a model has numbers of its own making, which half a type would round."""
    stored = model.state_dict()
    return any(name not in stored and buffer.is_floating_point() for name, buffer in model.named_buffers())


def language_of(model_dir: Path) -> str:
    """Say which of several languages the weights are of, by the tokenizer's configuration; nothing where it names none."""
    try:
        found = json.loads(read_file(model_dir / "tokenizer_config.json")).get("target_lang")
    except (OSError, ValueError, AttributeError):
        return ""
    return str(found or "")


def _kind(model: Any) -> type[Target]:
    """Choose what watches a model, by what it has."""
    if model.main_input_name == "input_features":
        return SpeechToTextTarget
    if hasattr(model, "decoder"):
        return EncoderDecoderTarget
    return ClassificationTarget if hasattr(model, "classifier") else Target
