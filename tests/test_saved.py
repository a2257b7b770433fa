"""The way back from what transformers itself saved: fairseq's own loader takes it, and it computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data2vec_models  # noqa: F401, which lets fairseq know the model
import pytest
import torch
import transformers
from comparing import fairseq_loads
from conformer_models import buildable
from fairseq.models.hubert.hubert_asr import HubertCtc, HubertCtcConfig
from fairseq.tasks.hubert_pretraining import HubertPretrainingTask
from fairseq_models import dictionary
from omegaconf import OmegaConf, open_dict
from safetensors.torch import load_file

import convert
from convert.errors import PlanError
from convert.families import FAMILIES, of_class
from convert.verification.fairseq_side.wavlm import with_weights

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 7,
    "pad_token_id": 0,
}
POSITIONS = {"num_conv_pos_embeddings": 8}
LARGE = POSITIONS | {
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "hidden_act": "relu",
}
QUANTIZER = POSITIONS | {"num_codevectors_per_group": 6, "codevector_dim": 8, "proj_codevector_dim": 12}
DEEP = {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5}
# heads of a width whose root is exact
CONFORMER = QUANTIZER | {"num_attention_heads": 2, "hidden_act": "swish", "conv_depthwise_kernel_size": 7}
ROTARY = CONFORMER | {"position_embeddings_type": "rotary", "feat_extract_norm": "layer"}
BUCKETS = POSITIONS | {"num_buckets": 20, "max_bucket_distance": 40}
LABELS = {
    "id2label": {0: "anger", 1: "fear", 2: "joy"},
    "label2id": {"anger": 0, "fear": 1, "joy": 2},
    "classifier_proj_size": 24,
}
# what is restored: the class, and what its configuration has
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2": ("Wav2Vec2Model", QUANTIZER),
    "wav2vec2_large": ("Wav2Vec2Model", LARGE),
    "wav2vec2_pretraining_masks": (
        "Wav2Vec2ForPreTraining",
        QUANTIZER | {"mask_time_prob": 0.3, "mask_time_length": 7},
    ),
    "wav2vec2_pretraining": ("Wav2Vec2ForPreTraining", LARGE | QUANTIZER),
    "wav2vec2_ctc": ("Wav2Vec2ForCTC", LARGE | {"final_dropout": 0.2}),
    "wav2vec2_classification": ("Wav2Vec2ForSequenceClassification", LARGE | LABELS),
    "hubert": ("HubertModel", POSITIONS),
    "hubert_large": ("HubertModel", LARGE),
    "hubert_batch_norm": ("HubertModel", POSITIONS | {"conv_pos_batch_norm": True}),
    "hubert_ctc": ("HubertForCTC", LARGE),
    "data2vec": ("Data2VecAudioModel", DEEP),
    "data2vec_classification": ("Data2VecAudioForSequenceClassification", DEEP | LABELS),
    "data2vec_ctc": ("Data2VecAudioForCTC", DEEP | {"hidden_act": "relu"}),
    "conformer": ("Wav2Vec2ConformerModel", CONFORMER),
    "conformer_pretraining": ("Wav2Vec2ConformerForPreTraining", ROTARY),
    "conformer_ctc": ("Wav2Vec2ConformerForCTC", CONFORMER),
    "conformer_ctc_rotary": ("Wav2Vec2ConformerForCTC", ROTARY),
    "wavlm": ("WavLMModel", BUCKETS),
    "wavlm_large": ("WavLMModel", LARGE | BUCKETS),
}
VOCABULARY = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 6}


def saved(name: str, directory: Path, **changes: Any) -> torch.nn.Module:
    """What transformers saves of a model with random weights and running statistics."""
    target, values = MODELS[name]
    made = getattr(transformers, target)
    torch.manual_seed(1)
    configuration = made.config_class(**BASE | values | changes)
    configuration._attn_implementation = of_class(target).running.attention
    model: torch.nn.Module = made(configuration).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for key, buffer in model.named_buffers():
            if "running" in key:
                buffer.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    (directory / "vocab.json").write_text(json.dumps(VOCABULARY))
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(directory)
    return model


def fine_tuned_hubert(path: Path) -> torch.nn.Module:
    """What fairseq's loader does, with what `HubertCtcConfig` lacks, and no dictionaries of the pretraining."""
    state = torch.load(path, weights_only=False)
    settings = OmegaConf.create(state["cfg"])
    settings.model = OmegaConf.merge(HubertCtcConfig(), settings.model)
    with open_dict(settings.model):
        settings.model.autoregressive = False
    task = HubertPretrainingTask.setup_task(settings.task)
    task.load_state_dict({"dictionaries": [None], "target_dictionary": dictionary(("|", "A", "B"))})
    model = HubertCtc.build_model(settings.model, task)
    model.load_state_dict(state["model"], strict=True)
    return model.eval()


def of_unilm(path: Path) -> torch.nn.Module:
    unilm = pytest.importorskip(
        "s3prl.upstream.wavlm.WavLM", reason="s3prl carries unilm's WavLM.py and is not installed"
    )
    state = torch.load(path, weights_only=False)
    model = unilm.WavLM(unilm.WavLMConfig(state["cfg"]))
    model.load_state_dict(state["model"], strict=True)
    for (
        layer
    ) in model.encoder.layers:  # transformers always asks torch for the weights, which then multiplies otherwise
        layer.self_attn.forward = with_weights(layer.self_attn.forward)
    return model.eval()


def classifier(path: Path) -> torch.nn.Module:
    """fairseq's task wants the labels as a file too, whatever the checkpoint holds."""
    (path.parent / "dict.lbl.txt").write_text("".join(f"{label} 1\n" for label in LABELS["label2id"]))
    return fairseq_loads(path, task={"data": str(path.parent)})[0]


def loaded(name: str, path: Path) -> torch.nn.Module:
    if name == "hubert_ctc":
        return fine_tuned_hubert(path)
    if name.startswith("wavlm"):
        return of_unilm(path)
    if name.endswith("classification"):
        return classifier(path)
    with buildable():
        return fairseq_loads(path)[0]


@torch.no_grad()
def output(model: torch.nn.Module, wave: torch.Tensor) -> torch.Tensor:
    """Logits, or the encoder's last hidden states."""
    encoder = getattr(model, "w2v_encoder", model)
    getattr(encoder, "w2v_model", encoder).encoder.required_seq_len_multiple = 1
    with buildable():
        if hasattr(model, "pooling_layer"):
            return model(source=wave, padding_mask=None)
        if encoder is not model:
            return model.get_logits(model(source=wave, padding_mask=None)).transpose(0, 1)
        made = model.extract_features(wave, padding_mask=None, mask=False)
    return made["x"] if isinstance(made, dict) else made[0]


@pytest.mark.parametrize("name", MODELS)
def test_fairseq_computes_the_same(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "hf")
    convert.restore(tmp_path / "hf", tmp_path / "back.pt")
    restored, wave = loaded(name, tmp_path / "back.pt"), torch.randn(1, 4120)
    with torch.no_grad():
        made = model(wave) if "pretraining" not in name else getattr(model, model.base_model_prefix)(wave)
    meant = made.logits if hasattr(made, "logits") else made.last_hidden_state
    found = output(restored, wave)
    if name.endswith("classification"):  # a mean, and a sum that is divided
        assert (meant - found).abs().max() < 1e-6 < 1e-3 < meant.std()
    else:
        assert torch.equal(meant, found)


@pytest.mark.parametrize("name", MODELS)
def test_it_converts_to_what_it_was(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "hf")
    convert.restore(tmp_path / "hf", tmp_path / "back.pt")
    head = "encoder" if MODELS[name][0].endswith("Model") else None
    convert.convert(tmp_path / "back.pt", tmp_path / "again", head=head)
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    old, new = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("hf", "again"))
    assert {key for key in old.keys() & new.keys() if old[key] != new[key]} <= {"torch_dtype", *TRAINING}


# fields of training that fairseq has no setting for, or one for several
TRAINING = {"ctc_loss_reduction", "mask_time_min_masks", "diversity_loss_weight"}


# a value with no counterpart in fairseq: what is changed in config.json -> the model
REFUSED: dict[str, tuple[str, Any]] = {
    "add_adapter": ("wav2vec2_ctc", True),
    "adapter_attn_dim": ("wav2vec2_ctc", 16),
    "hidden_act": ("conformer", "gelu"),
    "feat_extract_activation": ("hubert", "relu"),
    "layer_norm_eps": ("wavlm", 1e-6),
    "feat_proj_layer_norm": ("hubert", False),
    "rotary_embedding_base": ("conformer_ctc_rotary", 500),
    "position_embeddings_type": ("conformer", None),
    "use_weighted_layer_sum": ("wav2vec2_classification", True),
    "num_conv_pos_embeddings": ("data2vec", 1),
    "conv_pos_kernel_size": ("data2vec_ctc", 2),
    "quantization_config": ("hubert_ctc", {"bits": 8}),
    "unheard_of": ("data2vec", 1),
    "conv_dim": ("wavlm", [16]),
    "num_attention_heads": ("hubert_ctc", 5),
    "hidden_dropout": ("wavlm", 10**400),
}


@pytest.mark.parametrize(
    "name", ["HubertForSequenceClassification", "WavLMForCTC", "UniSpeechForCTC", "Wav2Vec2ForXVector"]
)
def test_a_class_without_a_way_back_is_refused_by_name(name: str, tmp_path: Path) -> None:
    saved("hubert", tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [name]}))
    with pytest.raises(PlanError) as raised:
        convert.restore(tmp_path / "hf", tmp_path / "back.pt")
    (problem,) = raised.value.problems
    assert problem.key == "architectures" and name in problem.detail and "HubertForCTC" in problem.detail


@pytest.mark.parametrize("field", REFUSED)
def test_what_fairseq_does_not_have_is_refused_by_name(field: str, tmp_path: Path) -> None:
    name, value = REFUSED[field]
    saved(name, tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(PlanError) as raised:
        convert.restore(tmp_path / "hf", tmp_path / "back.pt")
    assert field in {problem.key for problem in raised.value.problems}
    assert not (tmp_path / "back.pt").exists()


def test_what_config_json_leaves_out_is_what_transformers_takes() -> None:
    """A field that is absent has the default of transformers, in every family."""
    seen: Callable[[Any], Any] = lambda value: list(value) if isinstance(value, tuple) else value  # noqa: E731
    for family in FAMILIES.values():
        if family.from_config:
            plain = getattr(transformers, family.classes["encoder"]).config_class()
            for field, value in family.settings.absent.items():
                assert seen(getattr(plain, field, value)) == value, (family.name, field)
            shown = {*family.settings.same.values(), *(target for target, _ in family.settings.choices.values())}
            geometry = {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"}
            assert shown - geometry <= family.settings.absent.keys()
