"""Loads the published model from the Hub and compares what it computes with the local, verified model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import ConvertError, MismatchError
from convert.files import scratch_directory
from convert.loading import load, load_model, quiet, trying


def compute(source: str | Path, class_name: str, revision: str | None = None) -> Mapping[str, Any]:
    """Load a model with plain transformers and run it on one second of a fixed signal.

    Args:
        source: a directory, or a repository on the Hub, which is then loaded into an empty cache.
        class_name: the transformers class, as `config.json` names it.
        revision: the commit to load.

    Returns:
        Every tensor the model gives, by name.

    Raises:
        ConvertError: `load`: transformers cannot load or run it.
        ImportError: torch or transformers is missing.
    """
    import numpy as np
    import torch
    import transformers

    name = source.name if isinstance(source, Path) else source
    model_class = getattr(transformers, class_name or "-", None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        message = f"{name}: transformers {transformers.__version__} has no model class {class_name!r}"
        raise ConvertError(message, code="load", key=name, hint="pip install -U transformers")
    signal = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    with scratch_directory() as cache:
        where: dict[str, Any] = {"revision": revision, "cache_dir": cache} if revision else {}
        features = load(transformers.AutoFeatureExtractor, source, **where)
        model = load_model(model_class, source, **where)
        if class_name.endswith(("ForCTC", "ForConditionalGeneration", "SpeechEncoderDecoderModel")):
            load(transformers.AutoTokenizer, source, **where)
    with trying(name, "transformers cannot run it"), quiet(), torch.no_grad():
        inputs = features(signal, sampling_rate=features.sampling_rate, return_tensors="pt")
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.tensor([[model.generation_config.decoder_start_token_id]])
        outputs = model.eval()(**inputs)
    return {name: value for name, value in outputs.items() if torch.is_tensor(value)}


def same(expected: Mapping[str, Any], found: Mapping[str, Any], repo_id: str, commit: str) -> None:
    """Raise unless two models computed exactly the same.

    Raises:
        MismatchError: with the tensor and the greatest difference.
    """
    import torch

    for name, value in expected.items():
        if name not in found or not torch.equal(value, found[name]):
            other = found.get(name)
            amount = (value - other).abs().max() if other is not None and other.shape == value.shape else "shape"
            message = f"{repo_id} at {commit[:12]} computes different {name} from the verified model: greatest difference {amount}"
            raise MismatchError(message, code="logits", key=name, hint="do not use this revision")
