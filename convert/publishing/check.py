"""Loads the published model from the Hub and compares what it computes with the local, verified model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.errors import ConvertError, MismatchError
from convert.files import scratch_directory


def compute(source: str, class_name: str, revision: str | None = None) -> Mapping[str, Any]:
    """Load a model with plain transformers and run it on one second of a fixed signal.

    Args:
        source: a directory, or a repository on the Hub, which is then loaded into an empty cache.
        class_name: the transformers class, as `config.json` names it.
        revision: the commit to load.

    Returns:
        Every tensor the model gives, by name.

    Raises:
        ConvertError: torch or transformers is missing, or the model does not load.
    """
    try:
        import numpy as np
        import torch
        import transformers
    except ImportError as error:
        hint = "pip install 'fairseq-to-hf[verify]'"
        raise ConvertError(f"loading the model needs {error.name}", code="no-torch", hint=hint) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    signal = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    with scratch_directory() as cache:
        where: dict[str, Any] = {"revision": revision, "cache_dir": cache} if revision else {}
        try:
            features = transformers.AutoFeatureExtractor.from_pretrained(source, **where)
            model, info = getattr(transformers, class_name).from_pretrained(source, output_loading_info=True, **where)
            if class_name.endswith(("ForCTC", "ForConditionalGeneration", "SpeechEncoderDecoderModel")):
                transformers.AutoTokenizer.from_pretrained(source, **where)
        except (OSError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            failure: ConvertError | None = ConvertError(
                f"{source}: does not load: {reason}", code="load", key=source, hint="verify the model directory again"
            )
        else:
            failure = None
    if failure is not None:
        raise failure
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ConvertError(f"{source}: does not load completely: {wrong[:3]}", code="load", key=source, status=1)
    inputs = features(signal, sampling_rate=features.sampling_rate, return_tensors="pt")
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[model.generation_config.decoder_start_token_id]])
    with torch.no_grad():
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
            message = f"{repo_id} at {commit[:12]} computes other {name} than the verified model: greatest difference {amount}"
            raise MismatchError(message, code="logits", key=name, hint="do not use this revision")
