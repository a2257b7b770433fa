"""Audio classifiers: converted ones compute what real fairseq ones compute, and what has no twin is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from classification_models import EMOTIONS, LANGUAGES, LINEAR, REFUSED, VARIANTS, Variant, build, dictionary, save
from fairseq_models import BASE
from test_convert import EVEN, ODD, config, edited, load

import convert
from convert.errors import PlanError
from convert.verification import fairseq_worker

LENGTHS = (4160, 3000, 2000)


def wave_of(samples: int) -> torch.Tensor:
    return torch.randn(1, samples, generator=torch.Generator().manual_seed(samples))


@torch.no_grad()
def sides(
    reference: torch.nn.Module, twin: torch.nn.Module, wave: torch.Tensor, mask: Any = None
) -> list[torch.Tensor]:
    """fairseq's class scores, and transformers'."""
    given = {} if mask is None else {"attention_mask": mask.long()}
    return [reference(source=wave, padding_mask=None if mask is None else ~mask), twin(wave, **given).logits]


def rounding_only(reference: torch.nn.Module, twin: torch.nn.Module, wave: torch.Tensor, mask: Any = None) -> bool:
    """Whether two sides are as close as each is to itself in float64: nothing but rounding can keep them apart then."""
    theirs, ours = sides(reference, twin, wave, mask)
    with fairseq_worker._lifted(reference.double()):
        exact = sides(reference, twin.double(), wave.double(), mask)
    reference.float(), twin.float()
    floor = sum(float((side - best).abs().max()) for side, best in zip((theirs, ours), exact, strict=True))
    return float((theirs.double() - ours.double()).abs().max()) <= floor + 1e-12  # float64's own rounding


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_computes_the_same(name: str, tmp_path: Path) -> None:
    """Bit for bit for single utterances, at odd numbers of frames once fairseq pads none; batches within rounding."""
    reference = build(name)
    done = convert.convert(save(name, tmp_path / "model.pt", model=reference), tmp_path / "out")
    assert (done.model.target, done.model.plan.drops) == ("Wav2Vec2ForSequenceClassification", ())
    twin = load(tmp_path / "out")
    assert tuple(twin.config.id2label[i] for i in range(twin.config.num_labels)) == VARIANTS[name].labels
    encoder = reference.w2v_encoder.w2v_model.encoder
    for samples in EVEN + ODD:
        encoder.required_seq_len_multiple = 2
        assert rounding_only(reference, twin, wave_of(samples)), samples
        encoder.required_seq_len_multiple = 1
        theirs, ours = sides(reference, twin, wave_of(samples))
        assert theirs.shape == (1, len(VARIANTS[name].labels)) and torch.equal(theirs, ours), samples
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    batch = torch.randn(len(LENGTHS), max(LENGTHS)) * mask
    assert rounding_only(reference, twin, batch, mask)
    twin._get_feature_vector_attention_mask = lambda frames, _: torch.ones(len(batch), frames, dtype=torch.bool)
    assert not rounding_only(reference, twin, batch, mask)  # the control: the padding is pooled too


def test_the_comparison_sees_a_mistake(tmp_path: Path) -> None:
    reference = build("classification_latent")
    convert.convert(save("classification_latent", tmp_path / "m.pt", model=reference), tmp_path / "out")
    twin = load(tmp_path / "out")
    assert torch.equal(*sides(reference, twin, wave_of(EVEN[0])))
    with torch.no_grad():
        twin.projector.bias[0] += 1e-4
    assert not torch.equal(*sides(reference, twin, wave_of(EVEN[0])))


@pytest.mark.parametrize("key", REFUSED)
def test_a_pooling_without_a_twin_is_refused_and_its_encoder_is_not(key: str, tmp_path: Path) -> None:
    for number, variant in enumerate(REFUSED[key]):
        reference = build(variant)
        path = save(variant, tmp_path / f"{number}.pt", model=reference)
        with pytest.raises(PlanError) as raised:
            convert.convert(path, tmp_path / "out")
        (problem,) = [p for p in raised.value.problems if p.code == "unsupported-setting"]
        assert (
            problem.key == key
            and repr(variant.fine_tuned[key]) in problem.detail
            and "--head encoder" in problem.detail
        )
        out = convert.convert(path, tmp_path / f"{number}", head="encoder").path
        encoder = reference.w2v_encoder.w2v_model
        with torch.no_grad():
            expected = encoder.extract_features(source=wave_of(EVEN[0]), padding_mask=None)["x"]
            assert torch.equal(expected, load(out)(wave_of(EVEN[0])).last_hidden_state)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pooling", "activation_fn"])
def test_what_fairseq_assumes_where_the_settings_are_silent_is_refused(name: str, tmp_path: Path) -> None:
    path = edited(save("classification_base", tmp_path / "m.pt"), lambda state: state["cfg"]["model"].pop(name))
    with pytest.raises(PlanError) as raised:
        convert.plan(path)
    default = {"pooling": "first_token", "activation_fn": "gelu"}[name]
    assert [p.key for p in raised.value.problems] == [name] and repr(default) in raised.value.problems[0].detail


@pytest.mark.parametrize(
    ("edit", "code", "key"),
    [
        (lambda s: s["cfg"]["model"].update(latent_embed_dim=25), "shape", "pooling_layer.linear.weight"),
        (lambda s: s["cfg"]["model"].update(latent_embed_dim=None), "shape", "pooling_layer.linear.weight"),
        (lambda s: s["cfg"]["model"].update(new_pooling=3), "unknown-setting", "new_pooling"),
        (lambda s: s["model"].update({"pooling_layer.weights": torch.ones(3)}), "unmapped-source", "pooling_layer.weights"),
        (lambda s: s["model"].pop("pooling_layer.projection.bias"), "dead-rule", "pooling_layer.projection.bias"),
        (lambda s: s["task_state"].update(target_dictionary=dictionary(LANGUAGES)), "dictionary-size", "dictionary"),
        (lambda s: s["task_state"]["target_dictionary"].symbols.__setitem__(0, "joy"), "bad-dictionary", "dictionary"),
        (lambda s: s.pop("task_state"), "no-dictionary", "--dict"),
    ],
)  # fmt: skip
def test_a_setting_is_carried_or_a_reason(edit: Callable[..., Any], code: str, key: str, tmp_path: Path) -> None:
    path = save("classification_latent", tmp_path / "m.pt")
    convert.plan(path)  # the control
    with pytest.raises(PlanError) as raised:
        convert.plan(edited(path, edit))
    assert (code, key) in {(problem.code, problem.key) for problem in raised.value.problems}


def test_labels_from_a_file_have_no_special_symbols(tmp_path: Path) -> None:
    path = save("classification_latent", tmp_path / "m.pt")
    convert.convert(path, tmp_path / "inside")
    labels = tmp_path / "dict.lang.txt"
    labels.write_text("".join(f"{label} 1\n" for label in EMOTIONS))
    edited(path, lambda state: state.pop("task_state"))
    convert.convert(path, tmp_path / "given", dictionary=labels)
    assert config(tmp_path / "inside") == config(tmp_path / "given")
    assert config(tmp_path / "given")["id2label"] == dict(zip("012", EMOTIONS, strict=True))


def test_every_value_reaches_transformers(tmp_path: Path) -> None:
    convert.convert(save("classification_latent", tmp_path / "m.pt"), tmp_path / "out")
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    expected = {"classifier_proj_size": 24, "num_labels": 3, "final_dropout": 0.01, "use_weighted_layer_sum": False}
    assert {name: getattr(loaded, name) for name in expected} == expected
    assert loaded.label2id == {label: index for index, label in enumerate(EMOTIONS)}


def test_the_activation_of_the_pooling_is_not_the_encoders(tmp_path: Path) -> None:
    variant = Variant(BASE | {"activation_fn": "relu"}, LINEAR)
    convert.convert(save(variant, tmp_path / "m.pt"), tmp_path / "out")
    assert config(tmp_path / "out")["hidden_act"] == "relu"


def test_plain_transformers_uses_it(tmp_path: Path) -> None:
    """The pipeline names fairseq's best label; AutoProcessor is the feature extractor, there being no tokenizer."""
    reference = build("classification_large")
    convert.convert(save("classification_large", tmp_path / "m.pt", model=reference), tmp_path / "out")
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "conversion.json", "model.safetensors", "preprocessor_config.json"}
    wave = wave_of(16000)[0]
    with torch.no_grad():
        scores = reference(source=torch.nn.functional.layer_norm(wave, wave.shape)[None], padding_mask=None)[0]
    best = [LANGUAGES[index] for index in scores.argsort(descending=True)]
    classify = transformers.pipeline("audio-classification", str(tmp_path / "out"))
    assert [answer["label"] for answer in classify(wave.numpy(), top_k=5)] == best
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(processor).__name__ == "Wav2Vec2FeatureExtractor"
    assert set(processor(np.zeros(800), sampling_rate=16000)) == {"input_values", "attention_mask"}
