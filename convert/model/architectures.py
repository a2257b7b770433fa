"""The architectures of fairseq that are supported, each with the family of its encoder and what it adds to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from convert.checkpoint import Checkpoint
from convert.errors import PlanError
from convert.mapping.rules import Drop
from convert.model import conformer, data2vec, fields, hubert, wavlm
from convert.model.classification import CLASSIFICATION
from convert.model.encoder import (
    Family,
    Kind,
    blank_edits,
    ctc_values,
    describe_encoder,
    encoder_settings,
    plain_layout,
    quantizer_values,
    unsupported,
)
from convert.model.languages import adapted_layout, adapter_values, choose, describe_languages
from convert.model.seq2seq import describe_seq2seq
from convert.model.speech_to_text import ARCHITECTURES as SPEECH_TO_TEXT
from convert.model.speech_to_text import describe_speech_to_text
from convert.model.types import Model, Request, Value

__all__ = ["ARCHITECTURES", "Model", "Request", "Value", "describe", "encoder_settings"]

WAV2VEC2 = Family(
    name="wav2vec2",
    model_type="wav2vec2",
    classes={
        "ctc": "Wav2Vec2ForCTC",
        "classification": "Wav2Vec2ForSequenceClassification",
        "pretraining": "Wav2Vec2ForPreTraining",
        "encoder": "Wav2Vec2Model",
    },
    fields=fields.WAV2VEC2,
    layout=plain_layout,
    values=quantizer_values,
)
HUBERT = Family(
    name="hubert",
    model_type="hubert",
    classes={"ctc": "HubertForCTC", "encoder": "HubertModel"},
    fields=hubert.FIELDS,
    layout=hubert.layout,
    values=hubert.values,
    sidecars=hubert.sidecars,
)
CONFORMER = Family(
    name="wav2vec2_conformer",
    model_type="wav2vec2-conformer",
    classes={
        "ctc": "Wav2Vec2ConformerForCTC",
        "pretraining": "Wav2Vec2ConformerForPreTraining",
        "encoder": "Wav2Vec2ConformerModel",
    },
    fields=conformer.FIELDS,
    layout=conformer.layout,
    values=conformer.values,
)
ADAPTED = replace(
    WAV2VEC2,
    name="wav2vec2_adapter",
    fields=fields.ADAPTED,
    layout=adapted_layout,
    values=adapter_values,
)
DATA2VEC = Family(
    name="data2vec_audio",
    model_type="data2vec-audio",
    classes={"ctc": "Data2VecAudioForCTC", "encoder": "Data2VecAudioModel"},
    fields=data2vec.FIELDS,
    layout=data2vec.layout,
    values=data2vec.values,
    sidecars=data2vec.sidecars,
)
WAVLM = Family(
    name="wavlm",
    model_type="wavlm",
    classes={"encoder": "WavLMModel"},
    fields=wavlm.FIELDS,
    layout=wavlm.layout,
)
# (fairseq's name of the encoder, its layer_type) -> what its settings mean
FAMILIES = {
    ("wav2vec2", "transformer"): WAV2VEC2,
    ("wav2vec2", "conformer"): CONFORMER,
    ("wav2vec2", "trf_adp"): ADAPTED,
    ("hubert", "transformer"): HUBERT,
    ("data2vec_audio", "transformer"): DATA2VEC,
    ("wavlm", "transformer"): WAVLM,
}

PRETRAINING = Kind("pretraining", nested=False)
CTC = Kind("ctc", True, fields.READ_CTC, "w2v_encoder.proj.bias", ctc_values, blank_edits)
HUBERT_CTC = Kind("ctc", True, fields.READ_CTC - {"blank_mode", "blank_weight"}, CTC.symbols, ctc_values)

KINDS = {
    "wav2vec2": PRETRAINING,
    "wav2vec_ctc": CTC,
    "wav2vec_classification": CLASSIFICATION,
    "hubert": PRETRAINING,
    "hubert_ctc": HUBERT_CTC,
    "data2vec_audio": PRETRAINING,
    "wavlm": PRETRAINING,
}
# fairseq's name of the architecture -> what decides its conversion
ARCHITECTURES: dict[str, Callable[[Checkpoint, Request], Model]] = {
    name: partial(describe_encoder, name=name, kind=kind, families=FAMILIES) for name, kind in KINDS.items()
}
ARCHITECTURES["wav2vec_ctc"] = partial(describe_languages, name="wav2vec_ctc", kind=CTC, families=FAMILIES)
ARCHITECTURES |= {name: partial(describe_speech_to_text, name=name) for name in SPEECH_TO_TEXT}
ARCHITECTURES |= {
    name: partial(
        describe_seq2seq, name=name, families={("wav2vec2", "transformer"): WAV2VEC2, ("hubert", "transformer"): HUBERT}
    )
    for name in ("wav2vec_seq2seq", "hubert_seq2seq")
}


def describe(checkpoint: Checkpoint, request: Request) -> Model:
    """Decide everything about a conversion, or refuse it with every reason.

    Args:
        checkpoint: the opened checkpoint.
        request: what the caller asks for.

    Raises:
        PlanError: every problem of settings, vocabulary, names and shapes at once.
    """
    name = architecture_of(checkpoint)
    if name not in ARCHITECTURES:
        raise unsupported(checkpoint.path.name, name, ARCHITECTURES)
    if request.data_config is not None and name not in SPEECH_TO_TEXT:
        raise PlanError(f"{name} has no config.yaml: leave --data-config out", code="usage", key="--data-config")
    model = ARCHITECTURES[name](checkpoint, request)
    if request.language and not model.language:
        choose({}, request.language, checkpoint.path.name)
    reason = f"does not start with {checkpoint.prefix}, as the model's names do: it belongs to another model"
    # a relic: fairseq's model does not have it, so that the way back leaves it out
    return replace(model, left_out=tuple(Drop(name, reason, relic=True) for name in checkpoint.outside))


def architecture_of(checkpoint: Checkpoint) -> str:
    """Name a checkpoint's architecture; where its settings do not (omegaconf dropped `_name` for a time), by its tensors."""
    named = str(checkpoint.settings["model"].get("_name") or "")
    if named:
        return named
    hubert_like = any(key.endswith("label_embs_concat") for key in checkpoint.tensors)
    if any(key.startswith("pooling_layer.") for key in checkpoint.tensors):
        return "wav2vec_classification"
    if any(key.startswith("w2v_encoder.proj.") for key in checkpoint.tensors):
        return "hubert_ctc" if hubert_like else "wav2vec_ctc"
    if hubert_like:
        return "hubert"
    return "wav2vec2" if "quantizer.vars" in checkpoint.tensors else "unknown"
